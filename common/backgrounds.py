"""Does a classifier use the background? Test images whose foreground or background is replaced.

As in ImageNet-9 (Xiao et al. 2020, arXiv 2006.09994), for all images with masks:

    mixed same      the background is that of another image with the same labels
    mixed rand      the background is that of any other image (of the same images as mixed same)
    no foreground   black where the foreground was
    only background background where the foreground was

How far the accuracy falls from mixed same to mixed rand shows how much the classifier uses backgrounds. Where
we differ: a removed foreground is filled with background pixels from half or a quarter of the image's size
away (published: its bounding box is tiled). A faint outline of the foreground therefore stays visible.
"""

import torch
from torch import Generator, Tensor


def without_foreground(x: Tensor, m: Tensor) -> Tensor:
    """Images (B, C, H, W) with background in place of their foreground m (B, 1, H, W), 0 or 1."""
    h, w = (side // 2 for side in x.shape[2:])
    filled, left = x, m
    for shift in ((h, w), (h, 0), (0, w), (h // 2, w // 2), (-h // 2, w // 2)):
        free = left * (1 - m.roll(shift, (2, 3)))
        filled, left = torch.where(free > 0, x.roll(shift, (2, 3)), filled), left - free
    ground = (x * (1 - m)).sum(dim=(2, 3), keepdim=True) / (1 - m).sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(left > 0, ground, filled)  # the mean where no shifted pixel is background


def others(rows: Tensor, generator: Generator) -> Tensor:
    """For each of rows (n,), a random other one; the row itself if there is only one."""
    ring, other = torch.randperm(len(rows), generator=generator), torch.empty_like(rows)
    other[ring] = rows[ring.roll(1)]
    return other


def exchanged(x: Tensor, m: Tensor, label: Tensor, generator: Generator) -> dict[str, Tensor]:
    """The four kinds of images (M, C, H, W); m (M, 1, H, W): 0 or 1; label (M,): equal for equal labels."""
    empty, same = without_foreground(x, m), torch.arange(len(x))
    order = others(same, generator)
    for k in label.unique():
        rows = (label == k).nonzero()[:, 0]
        same[rows] = others(rows, generator)
    made = {"mixed same": x * m + empty[same] * (1 - m), "mixed rand": x * m + empty[order] * (1 - m)}
    return made | {"no foreground": x * (1 - m), "only background": empty}
