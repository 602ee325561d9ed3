"""Any picture, of any size: where a model's heads look in it, and what a classifier's decision rests on.

    python evaluate.py runs/span --image a.jpg b.png
    python evaluate.py dino_deitsmall16_pretrain.pth --image a.jpg

Beside the attention of each head stands what it outlines by equation (7) of `attention_priors.py`: of guided
heads as much as covers their prior, of others the pixels that hold 60 % of the attention, as DINO's authors
show it. Next to read: `benchmark.py`.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from attention_priors import masks_held
from classify import exclusive, relevance_of, scores_of
from folder import Data, read_picture
from masks import attention_masks
from plots import map_grid
from pretrain import attention_of
from resnet import ResNet
from simpool import GAP

MASS = 0.6


@torch.no_grad()
def look(
    run: Path,
    config: argparse.Namespace,
    model: nn.Module,
    parts: dict[str, Data],
    sample: str | None,
    path: Path,
    out: Path,
) -> list[Path]:
    """Draw what a run sees in the picture at `path`; returns the files written: <out>.png, unless
    patches are just averaged, and, of a classifier, <out>_relevance.png.

    The picture keeps its aspect; its shorter side becomes the run's --img-size. Raises DataError.
    """
    classifies = config.task == "classify"
    encoder = model.encoder if classifies else model
    channels = next(p for p in encoder.parameters() if p.dim() == 4).shape[1]  # of the first convolution
    multiple = encoder.stride if isinstance(encoder, ResNet) else config.patch_size
    image = read_picture(path, config.img_size, multiple, channels)  # (1, C, H, W)
    shown, written = image.float() / 255, []
    out.parent.mkdir(parents=True, exist_ok=True)
    averaged = encoder.pool is None if isinstance(encoder, ResNet) else isinstance(encoder.pool, GAP)
    if not averaged:
        attention = attention_of(encoder, image, config.span_layer)  # (1, heads, N)
        grid = encoder.grid(image)
        heads = {f"head {h}": attention[:, h].unflatten(1, grid) for h in range(attention.shape[1])}
        if not classifies and run.is_dir() and config.prior not in ("none", "masks"):
            masks, names = attention_masks(config, encoder, parts, sample, image)  # (1, R, H, W)
        else:
            masks = masks_held(attention, grid, tuple(image.shape[2:]), torch.full((len(heads),), MASS))
            names = list(heads)
        written.append(out.with_name(f"{out.name}.png"))
        map_grid(written[-1], shown, masks, names, heads, outlined="outlined")
    if classifies:
        findings, one_class = parts["train"].findings, exclusive(parts["train"].labels)
        R = relevance_of(config, model, image, one_class).sum(dim=1)  # (1, H, W)
        chances = scores_of(model, image, one_class)[0].sigmoid().tolist()
        said = [f"{name} {100 * chance:.0f} %" for name, chance in zip(findings, chances)]
        k = (chances.index(max(chances)) if len(said) > 2 else 1) if one_class else 0  # as in relevance_of
        title = "\n".join([f"relevance for {findings[k]}", *said])
        written.append(out.with_name(f"{out.name}_relevance.png"))
        map_grid(written[-1], shown, None, [], {title: R / R.abs().mean().clamp_min(1e-30)}, signed=True)
    return written
