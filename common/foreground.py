"""The foreground of a classifier's training images, from one of these sources:

data        the masks that come with the images; images without masks get those of others, registered
prior       the reference image's masks, registered to all images
attention   the guided heads of the run --init
RUN         the guided heads of another run, since a convnet can't start from a ViT
DIR         masks from any other tool: DIR/<region>/<image's name>, or DIR/<image's name>, as large as the
            image, after any rotation by EXIF; masks of several regions are united
"""

import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_run, write_file
from common.data import BATCH, Data, at_a_time, printable, select
from common.folder import read_masks
from common.models import load_model
from common.regions import attention_masks, check_masses, priors_over
from common.splits import DRAWN
from common.weights import reason

# train.py knows, and gives such images no weight.
warnings.filterwarnings("ignore", "background_loss: an image with an empty mask has no background loss")
REFERENCES = 5  # images with masks that are registered to those without


def foreground(
    source: str, splits: dict[str, Data], data: str, init: Path | None, prior: tuple
) -> tuple[Tensor, Tensor]:
    """The foreground of the training images by a source, (N, 1, S, S) bool, and for which it is known (N,).

    A mask that is made is known unless it is empty. One that is given may be empty: all is background then.
    prior: the arguments of `priors_over` after images. Prints Dice with the data's masks. Raises ValueError.
    """
    train, folder = splits["train"], Path(init if source == "attention" else source)
    _, _, reference, _, _, device = prior
    given = train.has_masks & (source == "data")  # (N,)
    if source == "data":
        if not given.any():
            counts = ", ".join(f"{s} {int(d.has_masks.sum())} of {len(d.names)}" for s, d in splits.items())
            line = f"images with a mask for every region: {counts}; one of train must have them"
            raise ValueError(f"{line}: add masks/<region>/ beside images/, or change labels.csv")
        masks = given[:, None, None, None] & train.masks.any(dim=1, keepdim=True)
        if not given.all():
            counts = f"masks: {int(given.sum())} of {len(given)} training images"
            print(f"note: {counts}; those of up to {REFERENCES} images are carried to the others")
            masks[~given] = registered_masks(train.images[~given], ("sample", *prior[1:]), REFERENCES)
    elif source == "prior":
        masks = registered_masks(train.images, prior)
    elif (folder / "config.json").is_file():
        masks = masks_of_run(folder, data, train.images, device)
    else:
        size = train.images.shape[-1]
        masks, given = read_masks(folder, None if data in DRAWN else data, train.names, size)
    if source != "data":
        dice, n = masks_compared(masks, train, reference)
        found = f"Dice {100 * dice:.1f} % with those of the data, in {n} image(s)"
        print(f"masks from {source}: {found if n else 'no other image has masks to compare them with'}")
    return masks, given | masks.flatten(1).any(dim=1)


def are_made(source: str, has_masks: Tensor) -> bool:
    """Whether masks are derived from those of a few images; such masks fit less well."""
    if source == "data":
        return not bool(has_masks.all())
    return source in ("prior", "attention") or (Path(source) / "config.json").is_file()


def check_foreground(source: str, train: Data, masks: Tensor, stay: Tensor) -> None:
    """Print for how many training images the foreground, masks (N, 1, S, S), is known: only these stay (N,).

    Raises ValueError if fewer than a tenth stay, or none of a class, which then can't be learned; also if the
    masks cover nearly everything, which leaves no background.
    """
    line = f"--masks {source}: the foreground of {int(stay.sum())} of {len(stay)} training images is known"
    found, names = train.labels == 1, [*train.findings, "no finding"]
    found = torch.cat([found, (train.labels == 0).all(dim=1, keepdim=True)], dim=1)  # (N, K + 1)
    there, kept = found.sum(dim=0), found[stay].sum(dim=0)
    lost = [name for name, before, now in zip(names, there, kept) if before and not now]
    if lost or stay.sum() < max(2, len(stay) / 10):
        of_class = f", of none labelled {', '.join(lost[:5])}" if lost else ""
        raise ValueError(f"{line}{of_class}: add masks, or use those of a run (--masks RUN)")
    area = int(masks.count_nonzero()) / (int(stay.sum()) * masks[0].numel())
    covers = f"It covers {100 * area:.0f} % of an image"
    if area > 0.97:
        raise ValueError(f"{line}. {covers}: almost nothing is background. Check the masks")
    few = bool(stay.sum() < 0.9 * len(stay))
    left = "; the others are left out of training" + (": add masks" if few else "")
    print(f"{'warning: ' if few else ''}{line}{'' if stay.all() else left}. {covers}")
    shares = {name: int(now) / int(n) for name, n, now in zip(names, there, kept) if n}
    least, most = min(shares, key=shares.get, default=""), max(shares, key=shares.get, default="")
    if shares and 2 * shares[least] < shares[most]:
        both = " but ".join(f"{100 * shares[name]:.0f} % of {name}" for name in (least, most))
        print(f"warning: {both} have masks, so the class balance changes: add masks")


def registered_masks(images: Tensor, prior: tuple, most: int = 1) -> Tensor:
    """Masks (M, 1, S, S) bool of images (M, C, S, S) by priors, empty where these can't be trusted.

    prior: the arguments of `priors_over` after images. most: how many reference images are tried; each image
    gets the masks of the one that, warped, is most like it around them. Raises ValueError.
    """
    source, train, reference, blur, how, device = prior
    if source == "sample" and reference:
        own = train.masks[train.names.index(reference)]
        if not own.flatten(1).any(dim=1).all():  # regions of which each image shows some: their union will do
            train = train._replace(masks=train.masks.any(dim=1, keepdim=True), regions=["foreground"])
    masks, best = torch.zeros_like(images[:, :1], dtype=torch.bool), torch.full((len(images),), -2.0)
    for name in references_for(train, reference, most) if most > 1 else [reference]:
        if source == "sample" and name and how != "none":
            print(f"registering masks of {printable(name)} to {len(images)} images ...", flush=True)
        over = priors_over(images, source, train, name, blur, how, device)
        for index in torch.arange(len(images), device=device).split(at_a_time(BATCH, images)):
            priors, confidence, likeness = (x.cpu() for x in over(index))
            index = index.cpu()
            better = (confidence > 0.49) & (likeness > best[index])
            masks[index[better]] = (priors[better] > 0.5).any(dim=1, keepdim=True)
            best[index[better]] = likeness[better]
    return masks


def references_for(train: Data, reference: str, most: int) -> list[str]:
    """The reference image, and others whose masks are all there and not empty; of each label in turn."""
    complete = train.has_masks & train.masks.flatten(2).any(dim=2).all(dim=1)  # (N,)
    label, turn, turns = dict(zip(train.names, map(str, train.labels.tolist()))), {}, Counter()
    others = (name for name, whole in zip(train.names, complete.tolist()) if whole and name != reference)
    for name in (reference, *others):
        turn[name] = turns[label[name]]  # how many of its label come before
        turns[label[name]] += 1
    return sorted(turn, key=turn.get)[:most]


def masks_of_run(folder: Path, data: str, images: Tensor, device: str) -> Tensor:
    """The union (M, 1, H, W) of a run's attention masks, for images (M, C, H, W) uint8. Raises ValueError."""
    run = load_run(folder)
    check_masses(folder, run.masses)
    if images.shape[1] != run.spec.channels:
        counts = f"{run.spec.channels} channels, these images have {images.shape[1]}"
        raise ValueError(f"{folder} learned from {counts}: name a run of such images")
    if (trained_on := run.config.data) != data:
        look = f"look at what it sees in images of {data}: python evaluate.py {folder} --image FILE ..."
        print(f"note: {folder} was trained on {trained_on}; {look}")
    encoder, layer = load_model(folder, run).to(device), run.config.span_layer
    masks = (attention_masks(encoder, run.masses, x, layer) for x in images.split(BATCH))
    return torch.cat([m.any(dim=1, keepdim=True) for m in masks])


def mask_dice(masks: Tensor, data: Data) -> float:
    """Mean Dice of masks (N, 1, S, S) with the union of the data's own, over the images that have them."""
    own, masks = data.masks[data.has_masks].any(dim=1), masks[data.has_masks][:, 0]
    both, size = (own & masks).sum(dim=(1, 2)), own.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return float((2 * both / size).nanmean())


def masks_compared(masks: Tensor, data: Data, reference: str | None) -> tuple[float, int]:
    """Mean Dice, as `mask_dice`, over the images whose masks (N, 1, S, S) are not empty, and their number.

    The reference image does not count, since the masks may be made from its own. NaN if no image is left.
    """
    both = masks.flatten(1).any(dim=1) & data.has_masks  # (N,); an empty mask may be unknown
    both &= torch.tensor([name != reference for name in data.names])
    return (mask_dice(masks[both], select(data, both)) if both.any() else math.nan), int(both.sum())


def keep_masks(run: Path, masks: Tensor, stay: Tensor) -> None:
    """Write masks (N, 1, S, S) bool, and which images stay (N,), into a run's folder, for --resume."""
    write_file(run / "masks.pt", {"masks": torch.from_numpy(np.packbits(masks.numpy())), "stay": stay})


def kept_masks(run: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The masks (N, 1, S, S) and (N,) bool that `keep_masks` wrote. Raises ValueError."""
    try:
        kept = torch.load(run / "masks.pt", weights_only=True)
        bits = np.unpackbits(kept["masks"].numpy())
        return torch.from_numpy(bits[: math.prod(shape)].reshape(shape).astype(bool)), kept["stay"]
    except Exception as error:  # a damaged file fails in the unpickler in many ways
        raise ValueError(f"{run}/masks.pt can't be read ({reason(error)}): train again") from None
