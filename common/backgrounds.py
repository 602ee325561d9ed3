"""Does a classifier read the background? Test images whose foreground or background is exchanged.

As in ImageNet-9 (Xiao et al. 2020, arXiv 2006.09994), for all images with masks:

    mixed same      the background is that of another image of the same class
    mixed rand      it is that of any image
    no foreground   black where the foreground was: its outline stays
    only background background where the foreground was

From mixed same to mixed rand, the accuracy falls by what the background alone tells. Where we differ: a hole
is filled with the same image's pixels from a half or a quarter of its size away, where these are background.
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
    return torch.where(left > 0, ground, filled)  # its mean, where a mask is too large for that


def exchanged(x: Tensor, m: Tensor, y: Tensor, generator: Generator) -> dict[str, Tensor]:
    """The four kinds of images (M, C, H, W), with masks (M, 1, H, W), 0 or 1, and labels (M, K)."""
    empty, order = without_foreground(x, m), torch.randperm(len(x), generator=generator)
    same = torch.arange(len(x))
    for label in y.nan_to_num(-1).unique(dim=0):
        rows = (y.nan_to_num(-1) == label).all(dim=1).nonzero()[:, 0]
        same[rows] = rows[torch.randperm(len(rows), generator=generator)].roll(1)
    kinds = {"mixed same": x * m + empty[same] * (1 - m), "mixed rand": x * m + empty[order] * (1 - m)}
    return kinds | {"no foreground": x * (1 - m), "only background": empty}
