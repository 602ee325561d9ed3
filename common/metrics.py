"""Metrics on tensors, in float64 where it matters, exact with ties."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import at_a_time

THRESHOLDS = 20  # of a map, for boxes


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
    most = at_a_time(32, masks)  # sorting takes memory
    for m, k in zip(maps.float().unflatten(2, grid).split(most), masks.split(most)):
        yield F.interpolate(m, size=k.shape[-2:], mode="bilinear").flatten(2), k.flatten(2)


def localisation_ap(maps: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel AP of patch maps (B, M, N) against masks (B, R, H, W): (B, M, R), NaN where a mask is empty."""
    parts = at_pixels(maps, masks, grid)
    return torch.cat([average_precision(m[:, :, None], k[:, None]) for m, k in parts])  # (b, M, R) each


def boxes(masks: Tensor) -> Tensor:
    """Boxes (B, K, 4) around the connected components of masks (B, H, W) bool: left, top, right, bottom.

    Pixels are connected to their 8 neighbours; right and bottom lie behind the last one. K: the largest
    number of components in a mask; they are sorted by size, and missing ones are all 0.
    """
    B, H, W = masks.shape
    pixels, inside = torch.arange(H * W, device=masks.device), masks.flatten(1)
    roots = pixels.expand(B, -1)  # a later pixel of the same component, in the end the last one
    while True:
        numbers = torch.where(inside, roots, -1).view(B, 1, H, W).float()  # exact below 2^24
        near = torch.where(inside, F.max_pool2d(numbers, 3, 1, 1).flatten(1).long(), pixels)
        joined = roots.scatter_reduce(1, roots, near, "amax")  # each root points to its largest neighbour
        joined = joined.gather(1, joined.gather(1, joined))
        if torch.equal(joined, roots):
            break
        roots = joined
    sizes = torch.zeros(B, H * W, device=masks.device).scatter_add_(1, roots, inside.float())
    sizes, kept = sizes.topk(max(1, int((sizes > 0).sum(dim=1).max())), dim=1)  # (B, K)
    sides = []
    for place, n in ((pixels % W, W), (pixels // W, H)):
        place = place.expand(B, -1).float()
        first = torch.full_like(place, n).scatter_reduce(1, roots, place, "amin").gather(1, kept)
        last = torch.zeros_like(place).scatter_reduce(1, roots, place + 1, "amax").gather(1, kept)
        sides.append(torch.stack([first, last], dim=2) * (sizes > 0)[:, :, None])  # (B, K, 2)
    return torch.stack(sides, dim=3).flatten(2)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (...) of boxes (..., 4), which are broadcast."""
    sides = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)]
    both = sides.prod(dim=-1)
    return both / (sum(areas) - both).clamp_min(1e-12)


def box_overlaps(maps: Tensor, masks: Tensor) -> Tensor:
    """IoU of the object's box with boxes around what reaches t / THRESHOLDS of a map's largest value.

    maps (B, H, W), non-negative; masks (B, H, W) bool, one object in each, whose parts need not touch; t =
    0, 1, ... Returns (2, THRESHOLDS, B): the IoU of the best component's box, and of the largest one's.
    """
    parts = boxes(masks)  # (B, K, 4), missing ones 0
    first = parts[..., :2].masked_fill(parts[..., 2:] == 0, math.inf).amin(dim=1)
    true = torch.cat([first, parts[..., 2:].amax(dim=1)], dim=1)[:, None]  # (B, 1, 4)
    top = maps.amax(dim=(1, 2), keepdim=True)
    found = (overlap(boxes(maps >= top * max(t / THRESHOLDS, 1e-6)), true) for t in range(THRESHOLDS))
    return torch.stack([torch.stack([of.amax(dim=1), of[:, 0]]) for of in found], dim=1)


def max_box_acc(overlaps: Tensor) -> float:
    """MaxBoxAccV2 (Choe et al. 2020, arXiv 2007.04178) of `box_overlaps` (T, B), in [0, 1].

    The share of images whose IoU reaches d at the best common threshold, averaged over d = 0.3, 0.5, 0.7. A
    lower bound, as only THRESHOLDS values are tried (released: 100 or 1,000).
    """
    return float(torch.stack([(overlaps >= d).double().mean(dim=1).amax() for d in (0.3, 0.5, 0.7)]).mean())


def corloc(overlaps: Tensor, chosen_on: Tensor) -> float:
    """The share of images, in [0, 1], with an IoU of 0.5 or more, of `box_overlaps` (T, B).

    The common threshold is the best on other images' overlaps (T, M).
    """
    best = (chosen_on >= 0.5).double().mean(dim=1).argmax()
    return float((overlaps[best] >= 0.5).double().mean())


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
    """The threshold on scores (M,) that gets most labels (M,) right, 0, 1, or NaN for unknown."""
    scores, labels = scores[~labels.isnan()], labels[~labels.isnan()]
    values = scores.unique()  # sorted
    between = torch.cat([values[:1] - 1, (values[:-1] + values[1:]) / 2, values[-1:]])
    right = torch.stack([((scores > t) == labels).sum() for t in between])
    return float(between[right.argmax()])


def relevance_share(heatmap: Tensor, mask: Tensor) -> Tensor:
    """The share (B,) of |R| inside the mask (B, 1, H, W), of heatmaps (B, C, H, W); NaN where R is 0."""
    strength = heatmap.double().abs().sum(dim=1, keepdim=True)  # (B, 1, H, W)
    return (strength * mask).sum(dim=(1, 2, 3)) / strength.sum(dim=(1, 2, 3))
