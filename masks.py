"""From one mask to all: where ISNet's foreground comes from, when not every image has been outlined.

    data        the masks that come with the images
    prior       the labelled sample's masks, registered to each image (SPAN's priors, `attention_priors.py`)
    attention   what the guided heads of the run --init look at
    RUN         the same, of another run's folder: a convnet can't start from a ViT
    DIR         masks of any other tool: DIR/<region>/<image's name>, or DIR/<image's name>

Attention becomes a mask by equation (7) of `attention_priors.py`: the pixels most looked at that cover the
prior, in the image that it belongs to, hold a share of the attention; the fewest that hold as much are the
mask elsewhere. No label is used but the prior. Claim 8 (one mask is enough) rests on this file. Next to read:
`baselines.py`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from attention_priors import mass_held, masks_held
from checkpoint import load_model, load_run
from data import BATCH, DRAWN
from folder import Data, image_size, read_masks
from pretrain import attention_of, lay_over, make_priors


def guided_masks(
    run: Path, parts: dict[str, Data], sample: str | None, images: Tensor
) -> tuple[Tensor, list[str]]:
    """`attention_masks` of a run's folder. Raises ValueError if it is none."""
    config, checkpoint = load_run(run)
    if config.task != "pretrain" or config.prior in ("none", "masks"):
        raise ValueError(f"{run} has no heads that one prior guided: train one with --prior sample")
    return attention_masks(config, load_model(run, config, checkpoint, parts["train"]), parts, sample, images)


def attention_masks(
    config: argparse.Namespace, encoder: nn.Module, parts: dict[str, Data], sample: str | None, images: Tensor
) -> tuple[Tensor, list[str]]:
    """Masks (M, R, H, W) bool of images (M, C, H, W) uint8 from guided heads, and the regions' names."""
    priors, names = make_priors(config, parts, sample)
    train, R = parts["train"], len(names)
    true_of = train.images[train.names.index(sample)][None] if config.prior == "sample" else train.images
    regions = priors >= priors.amax(dim=(1, 2), keepdim=True) / 2
    attention = attention_of(encoder, true_of, config.span_layer)[:, :R]
    mass = mass_held(attention, encoder.grid(true_of), regions)
    grid, size = encoder.grid(images), tuple(images.shape[2:])
    attention = attention_of(encoder, images, config.span_layer)[:, :R].split(BATCH)
    return torch.cat([masks_held(part, grid, size, mass) for part in attention]), names


def foreground(args: argparse.Namespace, parts: dict[str, Data], sample: str | None) -> Tensor:
    """The union of the training images' masks, (N, 1, S, S) bool; empty where there is none.

    ISNet's, for a ViT, in whole patches: their embedding is linear, so it can't leave out a part of their
    pixels. Prints how well masks that weren't given agree with those that were. Raises ValueError.
    """
    train, where = parts["train"], Path(args.init if args.masks == "attention" else args.masks)
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
        masks = guided_masks(where, parts, sample, train.images)[0].any(dim=1, keepdim=True)
    else:
        masks = read_masks(where, None if args.data in DRAWN else args.data, train.names, args.img_size)
    if args.masks != "data" and train.has_masks.any():
        share = 100 * agreement(masks, train)
        print(
            f"masks from {args.masks}: Dice {share:.1f} % with the {int(train.has_masks.sum())} of the data"
        )
    if args.isnet and args.backbone == "vit":
        p = args.patch_size
        masks = F.max_pool2d(masks.float(), p).repeat_interleave(p, 2).repeat_interleave(p, 3).bool()
    return masks


def agreement(masks: Tensor, data: Data) -> float:
    """Mean Dice of masks (N, 1, S, S) with the union of the data's own, over the images that have them."""
    own, masks = data.masks[data.has_masks].any(dim=1), masks[data.has_masks][:, 0]
    both, size = (own & masks).sum(dim=(1, 2)), own.sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
    return float((2 * both / size).nanmean())


def export_masks(run: Path, parts: dict[str, Data], sample: str | None, data: str, out: Path) -> int:
    """Write a run's attention masks as PNGs, out/<region>/<image's name>.png; returns how many.

    As large as the images on disk, so that they line up; of drawn data, the training images'. Raises
    ValueError rather than write into a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--export-masks {out} is there already, and holds something; name a new folder")
    written = 0
    for part in ["train"] if data in DRAWN else ["train", "val", "test"]:
        if not parts[part].names:
            continue
        masks, regions = guided_masks(run, parts, sample, parts[part].images)
        for name, of_image in zip(parts[part].names, masks):
            size = of_image.shape[1:] if data in DRAWN else image_size(data, name)
            for region, mask in zip(regions, of_image):
                path = (out / region / name).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
                picture.resize((size[1], size[0]), Image.Resampling.NEAREST).save(path)
                written += 1
    return written
