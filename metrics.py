"""Numbers that say how good: each on tensors, in float64 where it counts, exact with ties.

`average_precision` ranks pixels (or images) by a score and asks how pure the top of the ranking is:

    AP = sum_n (R_n - R_{n-1}) P_n

over the distinct thresholds n, P and R being precision and recall of all that scores at least as high. Equal
scores enter together, so a constant map scores exactly the share of positives: no luck from the order of
pixels. Next to read: `evaluate.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision (...) of scores (..., P) against binary targets (..., P); NaN without a positive."""
    scores, order = scores.sort(dim=-1, descending=True)
    hits = targets.expand(order.shape).gather(-1, order).double().cumsum(dim=-1)
    precision = hits / torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    # A threshold lies where a run of equal scores ends; within a run nothing is gained.
    ends = F.pad(scores[..., 1:] != scores[..., :-1], (0, 1), value=True)
    reached = torch.where(ends, hits, 0.0).cummax(dim=-1).values  # positives found up to the last threshold
    gained = torch.where(ends, hits - F.pad(reached, (1, -1)), 0.0)
    return (gained * precision).sum(dim=-1) / hits[..., -1]  # 0 / 0 = NaN


def localisation_ap(maps: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel AP of patch maps (B, M, N) against masks (B, R, H, W): (B, M, R), NaN where a mask is empty.

    Maps on a grid (h, w) are upsampled bilinearly to the size of the masks first.
    """
    size, found = masks.shape[-2:], []
    for m, k in zip(maps.float().unflatten(2, grid).split(32), masks.split(32)):  # sorting takes memory
        m = F.interpolate(m, size=size, mode="bilinear", align_corners=False).flatten(2)[:, :, None]
        k = k.flatten(2)[:, None]
        found.append(average_precision(m.expand(-1, -1, k.shape[2], -1), k))  # (b, M, R)
    return torch.cat(found)
