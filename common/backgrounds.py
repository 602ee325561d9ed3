"""Does a classifier use the background? Test images whose foreground or background is replaced.

As in ImageNet-9 (Xiao et al. 2020, arXiv 2006.09994), for all images with masks:

    mixed same      the background is that of another image with the same labels, where there is one
    mixed rand      the background is that of any other image
    no foreground   black where the foreground was
    only background background where the foreground was

How far the accuracy falls from mixed same to mixed rand shows how much the classifier uses backgrounds. Where
we differ: a removed foreground is filled with background pixels from half or a quarter of the image's size
away (published: its bounding box is tiled). A faint outline of the foreground therefore stays visible.
"""

import torch
from torch import Generator, Tensor, nn

from common.data import Data, select
from common.explain import scores_of
from common.metrics import CannotMeasure, auc, best_threshold, known_mean
from common.objects import shows_one

Table = dict[str, dict[str, float]]  # {column: {row: value}}


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


def measure_backgrounds(model: nn.Module, splits: dict[str, Data], multiclass: bool) -> tuple[Table, int]:
    """AUC and accuracy on exchanged backgrounds, and how many images are "mixed same".

    Those share their labels, not all unknown, with another. Raises CannotMeasure without masks or labels.
    """
    test = shows_one(splits["test"])
    if not test.names or not test.has_masks.all():
        raise CannotMeasure("no test image has masks that show something: backgrounds can't be exchanged")
    labels = torch.zeros(len(test.names), 1) if test.labels is None else test.labels
    label, n = labels.nan_to_num(-1).unique(dim=0, return_inverse=True, return_counts=True)[1:]
    paired = (n[label] > 1) & ~labels.isnan().all(dim=1)
    if not paired.any():
        raise CannotMeasure("no two test images with masks have equal labels: backgrounds can't be exchanged")
    m = test.masks.any(dim=1, keepdim=True).float()
    made = exchanged(test.images.float(), m, label, Generator().manual_seed(0))
    kinds = {name: test._replace(images=images.to(torch.uint8)) for name, images in made.items()}
    kinds["mixed same"] = select(kinds["mixed same"], paired)
    return classified(model, splits["val"], {"original": test} | kinds, multiclass), int(paired.sum())


def classified(model: nn.Module, val: Data, kinds: dict[str, Data], multiclass: bool) -> Table:
    """AUC and accuracy on kinds of test images, {kind: {metric: value}}, NaN if unknown.

    Of three or more classes, accuracy counts the likeliest; otherwise it takes the thresholds that are best
    on validation images. Raises CannotMeasure without labels.
    """
    test, table = next(iter(kinds.values())), {}
    if test.labels is None or test.labels.isnan().all():
        raise CannotMeasure("no test image has a label: AUC can't be measured")
    findings = dict(enumerate(test.findings))
    if multiclass and len(findings) == 2:  # the second is "X", the first is "no X"
        del findings[0]
    chosen_on = scores_of(model, val.images, multiclass)
    known = [k for k in findings if val.labels is not None and not val.labels[:, k].isnan().all()]
    thresholds = {k: best_threshold(chosen_on[:, k], val.labels[:, k]) for k in known}
    for name, data in kinds.items():
        scores, labels = scores_of(model, data.images, multiclass), data.labels
        each = {f"AUC {finding}": auc(scores[:, k], labels[:, k]) for k, finding in findings.items()}
        if multiclass and len(findings) > 1:
            one = labels.sum(dim=1) == 1  # known, and of one class
            right = (scores.argmax(dim=1) == labels.argmax(dim=1))[one]
        else:
            columns = [(scores[:, k] > t, labels[:, k]) for k, t in thresholds.items()]
            right = torch.cat([torch.zeros(0), *((said == y)[~y.isnan()] for said, y in columns)])
        table[name] = {"AUC": known_mean(each.values()), **each, "accuracy": float(right.double().mean())}
    return table
