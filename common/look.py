"""Any picture, of any size: where a model's heads look in it, and what a classifier's decision rests on.

    python evaluate.py runs/span --image a.jpg b.png
    python evaluate.py dino_deitsmall16_pretrain.pth --image a.jpg

Each picture gets a folder. attention.png shows every head's attention and what it outlines by equation (7) of
`attention_priors.py`, and masks/ holds these outlines, as large as the picture; relevance.png shows a
classifier's heatmap. Guided heads outline as much as covers their prior, others the pixels that hold 60 % of
the attention, as DINO's authors show it. Next to read: `benchmark.py`.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from common.models import attention_of, decisions, explained_class, pools_evenly, relevance_of, rule
from common.folder import picture_size, read_picture
from common.regions import masks_of, one_prior, read_outlines, write_mask
from common.plots import map_grid
from resnet import ResNet

MASS = 0.6
PANEL = 2.4  # inches


@torch.no_grad()
def look(run: Path, config: argparse.Namespace, model: nn.Module, path: Path, out: Path) -> list[Path]:
    """Draw what a run sees in the picture at `path`; returns the files written into the folder `out`.

    The picture keeps its aspect; its shorter side becomes the run's --img-size. No data but it is needed.
    Raises DataError, or ValueError for a damaged outlines.json.
    """
    classifies = config.task == "classify"
    encoder = model.encoder if classifies else model
    channels = next(p for p in encoder.parameters() if p.dim() == 4).shape[1]  # of the first convolution
    multiple = encoder.stride if isinstance(encoder, ResNet) else config.patch_size
    image = read_picture(path, config.img_size, multiple, channels)  # (1, C, H, W)
    shown, written = image.float() / 255, []
    if not pools_evenly(encoder) and config.baseline != "pipeline":  # which sees its own segmenter's foreground
        attention = attention_of(encoder, image, config.span_layer)  # (1, heads, N)
        heads = [f"head {h}" for h in range(attention.shape[1])]
        guided = one_prior(config) and (run / "outlines.json").exists()  # or it did not come to its end
        shares = read_outlines(run, config) if guided else dict.fromkeys(heads, MASS)
        if guided:
            heads = [f"{head}\n{region}" for head, region in zip(heads, shares)] + heads[len(shares) :]
        maps = dict(zip(heads, attention.unflatten(2, encoder.grid(image)).unbind(1)))  # each (1, h, w)
        masks = masks_of(config, encoder, shares, image)  # (1, R, H, W)
        size = picture_size(path)
        for name, mask in zip(shares, masks[0]):
            written.append(out / "masks" / f"{name}.png")
            write_mask(written[-1], mask, size)
        written.append(out / "attention.png")
        map_grid(written[-1], shown, masks, list(shares), maps, outlined="outlined", side=PANEL)
    if classifies:
        out.mkdir(parents=True, exist_ok=True)
        R = relevance_of(model, image, config.one_class, rule(config)).sum(dim=1)  # (1, H, W)
        (said,) = decisions(model, image, config.one_class, config.classes)
        title = "\n".join([f"relevance for {explained_class(config.classes, config.one_class)}", *said])
        written.append(out / "relevance.png")
        R = R / R.abs().mean().clamp_min(1e-30)
        map_grid(written[-1], shown, None, [], {title: R}, signed=True, side=PANEL)
    return written
