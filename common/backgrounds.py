"""Does a classifier read the background? Test images whose foreground or background is exchanged.

As in ImageNet-9 (Xiao et al. 2020, arXiv 2006.09994), for all images with masks:

    mixed same      the background is that of another image with the same labels, where there is one
    mixed rand      it is that of any other image
    no foreground   black where the foreground was
    only background background where the foreground was

From mixed same to mixed rand, the accuracy falls by what the background alone tells. Where we differ: a hole
is filled with the same image's pixels from a half or a quarter of its size away, where these are background
(published: its bounding box, by tiles). So the outline of what was there stays, faint, in every background.
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


def others(rows: Tensor, generator: Generator) -> Tensor:
    """For each of rows (n,), another one of them; itself if it is alone."""
    ring, other = torch.randperm(len(rows), generator=generator), torch.empty_like(rows)
    other[ring] = rows[ring.roll(1)]
    return other


def exchanged(x: Tensor, m: Tensor, label: Tensor, generator: Generator) -> dict[str, Tensor]:
    """The four kinds of images (M, C, H, W), with masks (M, 1, H, W), 0 or 1, and numbers of labels (M,)."""
    empty, same = without_foreground(x, m), torch.arange(len(x))
    order = others(same, generator)
    for k in label.unique():
        rows = (label == k).nonzero()[:, 0]
        same[rows] = others(rows, generator)
    made = {"mixed same": x * m + empty[same] * (1 - m), "mixed rand": x * m + empty[order] * (1 - m)}
    return made | {"no foreground": x * (1 - m), "only background": empty}
