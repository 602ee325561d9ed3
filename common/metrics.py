"""Numbers that say how good: each on tensors, in float64 where it counts, exact with ties.

`average_precision` ranks pixels (or images) by a score and asks how pure the top of the ranking is:

    AP = sum_n (R_n - R_{n-1}) P_n

over the distinct thresholds n, P and R being precision and recall of all that scores at least as high. Equal
scores enter together, so a constant map scores exactly the share of positives: no luck from the order of
pixels. `auc` asks how often a positive scores above a negative, ties counting half. Next to read: `plots.py`.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


class CannotMeasure(ValueError):
    """There are no masks or labels to measure with; the message says which."""


def known_mean(values: Iterable[float]) -> float:
    """The mean of those values that are not NaN; NaN if all are."""
    return float(torch.tensor(list(values), dtype=torch.float64).nanmean())


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision (...) of scores (..., P) against binary targets (..., P).

    NaN without a positive, or with a score that is NaN.
    """
    unknown = scores.isnan().any(dim=-1)
    scores, order = scores.sort(dim=-1, descending=True)
    hits = targets.expand(order.shape).gather(-1, order).double().cumsum(dim=-1)
    precision = hits / torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    # A threshold lies where a run of equal scores ends; within a run nothing is gained.
    ends = F.pad(scores[..., 1:] != scores[..., :-1], (0, 1), value=True)
    reached = torch.where(ends, hits, 0.0).cummax(dim=-1).values  # positives found up to the last threshold
    gained = torch.where(ends, hits - F.pad(reached, (1, -1)), 0.0)
    return ((gained * precision).sum(dim=-1) / hits[..., -1]).masked_fill(unknown, torch.nan)  # 0 / 0 = NaN


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


def dice(maps: Tensor, masks: Tensor, grid: tuple[int, int], thresholds: int = 19) -> Tensor:
    """Dice overlap 2 |A and B| / (|A| + |B|) of each map with its own mask: (T, B, R), NaN for empty masks.

    maps (B, R, N) on a grid (h, w), upsampled bilinearly to the masks (B, R, H, W). A holds the pixels above
    t/(T + 1), t = 1 ... T, of the map's largest value, so a map's scale has no say.
    """
    found = []
    for m, k in zip(maps.float().unflatten(2, grid).split(32), masks.split(32)):  # as in `localisation_ap`
        m = F.interpolate(m, size=k.shape[-2:], mode="bilinear").flatten(2)  # (b, R, H * W)
        m, k = m / m.amax(dim=2, keepdim=True).clamp_min(1e-30), k.flatten(2)
        A = [m > t / (thresholds + 1) for t in range(1, thresholds + 1)]
        overlap = torch.stack([2 * (a & k).sum(dim=2) / (a.sum(dim=2) + k.sum(dim=2)) for a in A])
        found.append(overlap.masked_fill(k.sum(dim=2) == 0, torch.nan))  # (T, b, R)
    return torch.cat(found, dim=1)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores (M,) against labels (M,), 1, 0 or NaN (unknown, left out).

    P(score of a positive > score of a negative) + P(equal) / 2; NaN unless there are both, or with a score
    that is NaN. 0.5 is chance.
    """
    if scores.isnan().any():
        return float("nan")
    scores, labels = scores.double(), labels.double()
    positive, negative = scores[labels == 1], scores[labels == 0].sort().values
    below, up_to = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return float((below + up_to).sum() / 2 / torch.tensor(len(positive) * len(negative)).double())


def best_threshold(scores: Tensor, labels: Tensor) -> float:
    """The threshold on scores (M,) that gets most labels (M,) right, NaN unknown; 0 if none is known."""
    scores, order = scores[~labels.isnan()].sort()
    if not len(scores):
        return 0.0
    positive = labels[~labels.isnan()][order].cumsum(dim=0)  # up to each score, in order
    right = positive[-1] - 2 * positive + torch.arange(1, len(scores) + 1)  # above it: yes, up to it: no
    ends = F.pad(scores[1:] != scores[:-1], (0, 1), value=True)  # equal scores can't be parted
    right = right.masked_fill(~ends, -1)
    best = int(right.argmax())
    if right[best] <= positive[-1]:
        return float(scores[0]) - 1  # yes to all
    return float(scores[best : best + 2].mean())


def relevance_share(heatmap: Tensor, mask: Tensor) -> Tensor:
    """The share (B,) of |R| that lies in the mask (B, 1, H, W), for heatmaps (B, C, H, W); NaN if R is 0."""
    strength = heatmap.double().abs().sum(dim=1, keepdim=True)  # (B, 1, H, W)
    return (strength * mask).sum(dim=(1, 2, 3)) / strength.sum(dim=(1, 2, 3))
