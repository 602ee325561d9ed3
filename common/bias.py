"""Does a classifier use the background? AUC and accuracy where it no longer agrees with the label."""

import torch
from torch import Generator, nn

from common.backgrounds import exchanged
from common.baselines import Pipeline
from common.data import SPLITS, Data, batches, select
from common.explain import relevance_of, scores_of
from common.foreground import mask_dice
from common.metrics import CannotMeasure, auc, best_threshold, known_mean, relevance_share
from common.objects import shows_one

Table = dict[str, dict[str, float]]  # {column: {row: value}}


def measure_bias(model: nn.Module, splits: dict[str, Data], multiclass: bool, rule: dict | None) -> Table:
    """AUC, accuracy and share of relevance in the foreground: {test images: {metric: value}}, NaN if unknown.

    The test images are unchanged ("same") and, with a marker, also those that `load` adds. For a pipeline the
    Dice of its segmenter is added. Raises CannotMeasure without labels.
    """
    kinds = {"same": splits["test"]} | {k: d for k, d in splits.items() if k not in SPLITS}
    table = classified(model, splits["val"], kinds, multiclass)
    for name, data in kinds.items():
        if (masked := shows_one(data)).names:
            foreground = masked.masks.any(dim=1, keepdim=True)  # (M, 1, S, S)
            R = relevance_of(model, masked.images, multiclass, rule or {})  # (M, C, S, S)
            table[name]["relevance share"] = float(relevance_share(R, foreground).nanmean())
            if isinstance(model, Pipeline):
                with torch.no_grad():
                    segmented = torch.cat([model.foreground(x).cpu() for x in batches(masked.images, model)])
                table[name]["segmentation Dice"] = mask_dice(segmented, masked)
    return table


def measure_backgrounds(model: nn.Module, splits: dict[str, Data], multiclass: bool) -> tuple[Table, int]:
    """AUC and accuracy on exchanged backgrounds, and how many images are "mixed same" and "mixed rand".

    Each has the same labels as another, not all unknown. Raises CannotMeasure without masks or labels.
    """
    test = shows_one(splits["test"])
    if not test.names:
        raise CannotMeasure("no test image has masks that show something: backgrounds can't be exchanged")
    label, n = test.labels.nan_to_num(-1).unique(dim=0, return_inverse=True, return_counts=True)[1:]
    paired = (n[label] > 1) & ~test.labels.isnan().all(dim=1)
    if not paired.any():
        raise CannotMeasure("no two test images with masks have equal labels: backgrounds can't be exchanged")
    m = test.masks.any(dim=1, keepdim=True).float()
    made = exchanged(test.images.float(), m, label, Generator().manual_seed(0))
    kinds = {name: test._replace(images=images.to(torch.uint8)) for name, images in made.items()}
    kinds |= {name: select(kinds[name], paired) for name in ("mixed same", "mixed rand")}
    return classified(model, splits["val"], {"original": test} | kinds, multiclass), int(paired.sum())


def classified(model: nn.Module, val: Data, kinds: dict[str, Data], multiclass: bool) -> Table:
    """AUC and accuracy on kinds of test images, {kind: {metric: value}}, NaN if unknown.

    With three or more classes the likeliest one is the prediction; otherwise a threshold decides, which is
    chosen on validation images. Raises CannotMeasure without labels.
    """
    test, table = next(iter(kinds.values())), {}
    if test.labels.isnan().all():
        raise CannotMeasure("no test image has a label: AUC can't be measured")
    findings = dict(enumerate(test.findings))
    if multiclass and len(findings) == 2:  # the second is "X", the first is "no X"
        del findings[0]
    chosen_on = scores_of(model, val.images, multiclass)
    known = [k for k in findings if not val.labels[:, k].isnan().all()]
    thresholds = torch.tensor([best_threshold(chosen_on[:, k], val.labels[:, k]) for k in known])
    for name, data in kinds.items():
        scores, labels = scores_of(model, data.images, multiclass), data.labels
        each = {f"AUC {finding}": auc(scores[:, k], labels[:, k]) for k, finding in findings.items()}
        if multiclass and len(findings) > 1:
            one = labels.sum(dim=1) == 1  # known, and of one class
            right = (scores.argmax(dim=1) == labels.argmax(dim=1))[one]
        else:
            said, true = scores[:, known] > thresholds, labels[:, known]
            right = (said == true)[~true.isnan()]  # none, and accuracy NaN, without thresholds
        table[name] = {"AUC": known_mean(each.values()), **each, "accuracy": float(right.double().mean())}
    return table
