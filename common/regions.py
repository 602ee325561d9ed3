"""From one mask to all: where ISNet's foreground comes from, when not every image has been outlined.

    data        the masks that come with the images
    prior       the labelled sample's masks, registered to each image (SPAN's priors, `attention_priors.py`)
    attention   what the guided heads of the run --init look at
    RUN         the same, of another run's folder: a convnet can't start from a ViT
    DIR         masks of any other tool: DIR/<region>/<image's name>, or DIR/<image's name>, as large as the
                image, upright if its EXIF turns it; of several regions the union

Attention becomes a mask by equation (7) of `attention_priors.py`: the pixels most looked at that cover the
prior, in the image that it belongs to, hold a share of the attention; the fewest that hold as much are the
mask elsewhere. No label is used but the prior. Claim 8 (one mask is enough) rests on this file. Next to read:
`baselines.py`.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attention_priors import mass_held, masks_held
from common.checkpoint import load_model, load_run, write_whole
from common.data import BATCH, DRAWN
from common.folder import Data, by_stem, image_size, read_masks
from common.models import attention_of
from common.pretrain import lay_over, make_priors
from common.weights import unread


def one_prior(config: argparse.Namespace) -> bool:
    """Whether a run's heads were guided by priors that hold for all images at once."""
    return config.task == "pretrain" and config.prior not in ("none", "masks")


def outlines(
    config: argparse.Namespace, encoder: nn.Module, parts: dict[str, Data], sample: str | None
) -> dict[str, float]:
    """The share of attention, 0 to 1, that outlines each region, {region: share} by guided head."""
    priors, names = make_priors(config, parts, sample)
    train = parts["train"]
    only = [train.names.index(sample)] if config.prior == "sample" else slice(BATCH)
    true_of = train.images[only]  # priors that no image gave are true of images on average
    regions = priors >= priors.amax(dim=(1, 2), keepdim=True) / 2
    attention = attention_of(encoder, true_of, config.span_layer)[:, : len(names)]
    return dict(zip(names, mass_held(attention, encoder.grid(true_of), regions).tolist()))


def guided_masks(run: Path, data: str, images: Tensor) -> Tensor:
    """What a run's guided heads outline in images (M, C, H, W) uint8 of some data, united: (M, 1, H, W) bool.

    Raises ValueError.
    """
    config, checkpoint = load_run(run)
    if images.shape[1] != config.channels:
        raise ValueError(
            f"{run} learned from {config.channels} channels, these images have {images.shape[1]}"
        )
    if config.data != data:
        print(
            f"note: {run} learned to look at {config.data}; check that its masks fit {data}: --export-masks"
        )
    encoder, shares = load_model(run, config, checkpoint), read_outlines(run, config)
    united = (masks_of(config, encoder, shares, x).any(dim=1, keepdim=True) for x in images.split(BATCH))
    return torch.cat(list(united))


def read_outlines(run: Path, config: argparse.Namespace) -> dict[str, float]:
    """What `outlines` found at the end of a run. Raises ValueError for a run without one prior, or end."""
    if not one_prior(config):
        raise ValueError(f"{run} has no heads that one prior guided: train one with --prior sample")
    try:
        shares = json.loads((run / "outlines.json").read_text())
        plain = all(Path(name).name == name not in ("", "..") for name in shares)  # they become files' names
        if shares and plain and all(0 <= share <= 1 for share in shares.values()):
            return shares
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{run}/outlines.json can't be used: train.py writes it at the end of a run")


def masks_of(
    config: argparse.Namespace, encoder: nn.Module, shares: dict[str, float], images: Tensor
) -> Tensor:
    """What the first R heads outline, by their shares of attention: (M, R, H, W) of images (M, C, H, W)."""
    mass, grid = torch.tensor(list(shares.values())), encoder.grid(images)
    attention = attention_of(encoder, images, config.span_layer)[:, : len(mass)].split(BATCH)
    return torch.cat([masks_held(part, grid, tuple(images.shape[2:]), mass) for part in attention])


def write_mask(path: Path, mask: Tensor, size: tuple[int, int]) -> None:
    """Write a mask (H, W) bool as a PNG of another size (height, width), 0 and 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    picture.resize(size[::-1], Image.Resampling.NEAREST).save(path)


def foreground(args: argparse.Namespace, parts: dict[str, Data], sample: str | None) -> Tensor:
    """The union of the training images' masks, (N, 1, S, S) bool; empty where there is none.

    Prints for how many there is one, and how well masks that weren't given agree with those that were. Raises
    ValueError.
    """
    train, where = parts["train"], Path(args.init if args.masks == "attention" else args.masks)
    if args.resume and args.masks != "data":
        return kept(args, len(train.names))
    if args.masks == "data":
        if not train.has_masks.any():
            asked = "--isnet" if args.isnet else f"--baseline {args.baseline}"
            raise ValueError(
                f"{asked}: no training image of {args.data} has all regions' masks; add some or use --masks"
            )
        masks = train.masks.any(dim=1, keepdim=True) & train.has_masks[:, None, None, None]
    elif args.masks == "prior":
        laid = lay_over(args, parts, sample, train.images)
        everyone = torch.arange(len(train.names)).split(BATCH)
        masks = torch.cat([(laid(index) > 0.5).any(dim=1, keepdim=True) for index in everyone])
    elif (where / "config.json").is_file():
        masks = guided_masks(where, args.data, train.images)
    else:
        masks = read_masks(where, None if args.data in DRAWN else args.data, train.names, args.img_size)
    found = int(masks.flatten(1).any(dim=1).sum())
    if not found:
        raise ValueError(f"--masks {args.masks}: the masks of all training images are empty; look at some")
    if args.masks != "data":
        given = train.has_masks.any()
        dice = f"; Dice {100 * agreement(masks, train):.1f} % with those given" if given else ""
        print(f"masks from {args.masks}: of {found} of {len(masks)} training images{dice}")
    return masks


def keep(args: argparse.Namespace, masks: Tensor) -> None:
    """Write masks (N, 1, S, S) bool beside the run, so that --resume needs nothing else."""
    if args.masks != "data":
        write_whole(args.out / "masks.pt", torch.from_numpy(np.packbits(masks.numpy())))


def kept(args: argparse.Namespace, n: int) -> Tensor:
    """The n masks (n, 1, S, S) bool that `keep` wrote. Raises ValueError."""
    shape = n, 1, args.img_size, args.img_size
    try:
        bits = np.unpackbits(torch.load(args.out / "masks.pt", weights_only=True).numpy())
        return torch.from_numpy(bits[: math.prod(shape)].reshape(shape).astype(bool))
    except Exception as error:  # a damaged file fails in the unpickler in many ways
        raise ValueError(f"{args.out}/masks.pt can't be read ({unread(error)}): train again") from None


def agreement(masks: Tensor, data: Data) -> float:
    """Mean Dice of masks (N, 1, S, S) with the union of the data's own, over the images that have them."""
    own, masks = data.masks[data.has_masks].any(dim=1), masks[data.has_masks][:, 0]
    both, size = (own & masks).sum(dim=(1, 2)), own.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return float((2 * both / size).nanmean())


def export_masks(
    run: Path, config: argparse.Namespace, encoder: nn.Module, parts: dict[str, Data], out: Path
) -> int:
    """Write a run's attention masks as PNGs, out/<region>/<image's name>.png; returns how many.

    As large as the images on disk, so that they line up; of drawn data, the training images'. Raises
    ValueError rather than write into a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--export-masks {out} is there already, and holds something; name a new folder")
    data, shares, written = config.data, read_outlines(run, config), 0
    by_stem([name for part in parts.values() for name in part.names] if data not in DRAWN else [])
    for part in ["train"] if data in DRAWN else ["train", "val", "test"]:
        if not parts[part].names:
            continue
        masks = masks_of(config, encoder, shares, parts[part].images)
        for name, of_image in zip(parts[part].names, masks):
            size = of_image.shape[1:] if data in DRAWN else image_size(data, name)
            for region, mask in zip(shares, of_image):
                write_mask((out / region / name).with_suffix(".png"), mask, size)
                written += 1
    return written
