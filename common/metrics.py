"""Metrics on tensors, in float64 where it matters, exact with ties."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class CannotMeasure(ValueError):
    """Masks or labels are missing; the message says which."""


def known_mean(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    return float(torch.tensor(list(values), dtype=torch.float64).nanmean())


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision (...) of scores (..., P) against binary targets (..., P), which are broadcast.

    AP = sum_n (R_n - R_{n-1}) P_n over the distinct thresholds n; P and R: precision and recall of all that
    scores at least as high. Equal scores count together, so a constant map scores the share of positives. NaN
    without a positive, or if a score is NaN.
    """
    unknown = scores.isnan().any(dim=-1)
    scores, order = scores.sort(dim=-1, descending=True)
    shape = torch.broadcast_shapes(order.shape, targets.shape)
    hits = targets.expand(shape).gather(-1, order.expand(shape)).double().cumsum(dim=-1)
    precision = hits / torch.arange(1, shape[-1] + 1, device=scores.device)
    ends = F.pad(scores[..., 1:] != scores[..., :-1], (0, 1), value=True)  # of runs of equal scores
    reached = torch.where(ends, hits, 0.0).cummax(dim=-1).values  # positives up to the last threshold
    gained = torch.where(ends, hits - F.pad(reached, (1, -1)), 0.0)
    return ((gained * precision).sum(dim=-1) / hits[..., -1]).masked_fill(unknown, torch.nan)  # 0 / 0 = NaN


def at_pixels(maps: Tensor, masks: Tensor, grid: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of maps (B, M, N), upsampled to masks (B, R, H, W), and of these: (b, M or R, H * W)."""
    for m, k in zip(maps.float().unflatten(2, grid).split(32), masks.split(32)):  # sorting takes memory
        yield F.interpolate(m, size=k.shape[-2:], mode="bilinear").flatten(2), k.flatten(2)


def localisation_ap(maps: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel AP of patch maps (B, M, N) against masks (B, R, H, W): (B, M, R), NaN where a mask is empty."""
    parts = at_pixels(maps, masks, grid)
    return torch.cat([average_precision(m[:, :, None], k[:, None]) for m, k in parts])  # (b, M, R) each


def dice(maps: Tensor, masks: Tensor, grid: tuple[int, int], thresholds: int = 19) -> Tensor:
    """Dice 2 |A and B| / (|A| + |B|) of each map with its own mask: (T, B, R), NaN where a mask is empty.

    maps (B, R, N), masks (B, R, H, W). A: the pixels above t/(T + 1), t = 1 ... T, of a map's largest value.
    """
    found = []
    for m, k in at_pixels(maps, masks, grid):
        m = m / m.amax(dim=2, keepdim=True).clamp_min(1e-30)
        A = [m > t / (thresholds + 1) for t in range(1, thresholds + 1)]
        overlap = torch.stack([2 * (a & k).sum(dim=2) / (a.sum(dim=2) + k.sum(dim=2)) for a in A])
        found.append(overlap.masked_fill(k.sum(dim=2) == 0, torch.nan))  # (T, b, R)
    return torch.cat(found, dim=1)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores (M,) against labels (M,): 1, 0 or NaN (unknown, left out).

    P(positive scores above negative) + P(equal) / 2; 0.5 is chance. NaN without both, or if a score is NaN.
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
    positive = labels[~labels.isnan()][order].cumsum(dim=0)  # up to each score
    right = positive[-1] - 2 * positive + torch.arange(1, len(scores) + 1)  # with the threshold behind it
    ends = F.pad(scores[1:] != scores[:-1], (0, 1), value=True)  # no threshold lies between equal scores
    right = right.masked_fill(~ends, -1)
    best = int(right.argmax())
    if right[best] <= positive[-1]:
        return float(scores[0]) - 1  # all positive
    return float(scores[best : best + 2].mean())


def relevance_share(heatmap: Tensor, mask: Tensor) -> Tensor:
    """The share (B,) of |R| inside the mask (B, 1, H, W), of heatmaps (B, C, H, W); NaN where R is 0."""
    strength = heatmap.double().abs().sum(dim=1, keepdim=True)  # (B, 1, H, W)
    return (strength * mask).sum(dim=(1, 2, 3)) / strength.sum(dim=(1, 2, 3))
