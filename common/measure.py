"""What is reported about a model: measured on test images, with choices made on validation images.

attention  pixel average precision (AP) of one attention head per region: the one that masks guided, or else
           the best on validation images, beside the mean over all heads, which needs no masks. The prior has
           its own AP, see `prior_maps` and `best_statistics`. Mean pooling has no attention.
bias       a classifier's AUC and accuracy on test images as in training and, if these have a marker, with
           it removed, flipped, and flipped to an unseen kind. These show whether it relies on the marker.
           The share of relevance in the foreground does not: a heatmap can look right and be wrong.
objects    how well maps outline the one object of an image, see `objects.py`
backgrounds: a classifier's AUC and accuracy with exchanged backgrounds, see `backgrounds.py`
others     how good an encoder's features are, see `probe.py`
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from common.baselines import Pipeline
from common.bias import Table, measure_backgrounds, measure_bias
from common.data import Data, select
from common.explain import attention_of, pools_evenly
from common.metrics import CannotMeasure, known_mean, localisation_ap
from common.objects import measure_objects, shows_one, untrained
from common.probe import PROBES, draw_labelled, probe

MEASURES = ["attention", "objects", "bias", "backgrounds", *PROBES]
NOT_OF = {  # kind of model: measures it lacks, and what has them; a pipeline's encoder sees no background
    "encoder": (["bias", "backgrounds"], "classifiers"), "classifier": (["finetune"], "pretrained runs"),
    "pipeline": (["attention", "objects", *PROBES], "encoders of whole images")}  # fmt: skip
OF_FOREGROUND = {  # what is measured only on images with a foreground, and its name in the note on that
    "attention": "AP", "bias": "relevance share", "backgrounds": "backgrounds", "objects": "objects"
}  # fmt: skip
MEAN = "mean over regions"  # a row beside the regions
QUICK = ["attention", "bias", "knn", "linear"]  # seconds a run


class Report(NamedTuple):
    """What was measured of one model."""

    metrics: dict[str, float]  # as in metrics.json
    tables: dict[str, Table]  # by title
    curves: dict[str, dict[float, list[float]]]  # {probe: {label fraction: one value per draw}}
    heads: dict[str, int]  # {region: the head that looks at it}
    notes: list[str]  # what can't be measured, and warnings


def report(
    model: nn.Module, splits: dict[str, Data], measures: list[str], fractions: tuple[float, ...] = (1.0,), *,
    multiclass: bool | None = None, rule: dict | None = None, layer: int = -1, guided: bool = False,
    priors: Callable | None = None,
) -> Report:  # fmt: skip
    """Measure a model on test images, as far as there are masks and labels; notes say what can't be measured.

    measures: from MEASURES. fractions: of labels, to probe pretrained encoders. multiclass: None for these,
    else whether labels are classes. rule: arguments of `relevance`. layer: the block whose attention counts.
    guided: whether masks guided the first heads. priors: from images to {name: (maps (M, R, N), grid)}.
    """
    classifier = multiclass is not None
    encoder = model.encoder if classifier else model
    found, features = Report({}, {}, {}, {}, []), {}
    kind = "pipeline" if isinstance(model, Pipeline) else "classifier" if classifier else "encoder"
    left_out, others = NOT_OF[kind]
    apply = [what for what in measures if what not in left_out]
    if list(measures) not in (MEASURES, QUICK):
        found.notes.extend(f"{what} is only for {others}" for what in measures if what not in apply)
    test, n, masked = splits["test"], len(splits["test"].names), len(shows_one(splits["test"]).names)
    for what in apply:
        try:
            if what == "bias":
                table = measure_bias(model, splits, multiclass, rule)
                add_table(found, "test images, in %", table, name_of_bias)
                if (m := int((~test.labels.isnan()).any(dim=1).sum())) < 50:
                    worth = f"each is worth up to {100 / m:.0f} points of accuracy"
                    found.notes.append(f"only {m} test images with labels: {worth}")
            elif what == "backgrounds":
                table, paired = measure_backgrounds(model, splits, multiclass)
                add_table(found, "exchanged backgrounds, in %", table, name_of_bias)
                if paired < masked:
                    line = f"mixed same and rand: on {paired} of {masked} images, whose labels others share"
                    found.notes.append(line)
            elif what == "attention":
                table, heads = measure_attention(encoder, splits, layer, guided, priors)
                add_table(found, "AP in %", table, name_of_ap)
                found.heads.update(heads)
            elif what == "objects":
                table = measure_objects(model, splits, layer)
                add_table(found, "objects, in %", table, lambda of, metric: f"{of}_{metric}")
            else:
                add_probe(found, what, encoder, splits, None if classifier else fractions, features)
            if what in OF_FOREGROUND and 0 < masked < n:
                part = f"on the {masked} of {n} test images with a foreground"
                found.notes.append(f"{OF_FOREGROUND[what]}: {part}")
        except CannotMeasure as error:
            found.notes.append(str(error))
    if unknown := [name for name, value in found.metrics.items() if math.isnan(value)]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        few = "(too few test images of a kind, or validation images)"
        found.notes.append(f"not defined {few}: {', '.join(unknown[:5])}{more}")
    return found


def add_table(found: Report, title: str, table: Table, name: Callable[[str, str], str]) -> None:
    """Add a table {column: {row: value}}, and its values to the metrics, as name(column, row)."""
    found.tables[title] = table
    cells = ((column, row, value) for column, rows in table.items() for row, value in rows.items())
    found.metrics.update({name(c.replace(",", ""), row).replace(" ", "_"): value for c, row, value in cells})


def add_probe(
    found: Report, what: str, encoder: nn.Module, splits: dict, fractions: tuple | None, caches: dict
) -> None:
    """Add a probe and its control; fractions: None for classifiers, which have none. Raises CannotMeasure."""
    probed = probe(encoder, splits, what, fractions or (1.0,), caches.setdefault("trained", {}))
    name = list(probed[max(probed)])[-1]  # accuracy of classes, mAUC of findings
    found.curves[f"{what} {name}"] = {f: draws[name] for f, draws in probed.items()}
    rows = found.tables.setdefault("probes, in %", {})[f"{what} {name}"] = {}
    for f, draws in probed.items():
        part = "" if f == 1 else f"_{100 * f:g}_percent"
        means = {metric: known_mean(values) for metric, values in draws.items()}
        found.metrics.update({f"{what}_{metric}{part}": mean for metric, mean in means.items()})
        rows[f"{100 * f:g} % of labels ({len(draw_labelled(splits['train'].labels, f, 0))})"] = means[name]
    if fractions and 1.0 in probed and what in ("knn", "linear"):
        kept = caches.setdefault("untrained", {})  # the features of one control, which serves both probes
        control = probe(encoder if kept else untrained(encoder), splits, what, features=kept)[1.0][name][0]
        found.metrics[f"{what}_{name}_untrained"] = rows["untrained encoder, 100 %"] = control
        if found.metrics[f"{what}_{name}"] < control:
            found.notes.append(f"{what}: an untrained encoder does better; training has not helped")


def measure_attention(
    encoder: nn.Module, splits: dict[str, Data], layer: int, guided: bool, priors: Callable | None
) -> tuple[Table, dict[str, int]]:
    """AP {attention or another map: {region: AP}}, and heads {region: number}.

    Raises CannotMeasure without masks, or without attention.
    """
    if pools_evenly(encoder):
        raise CannotMeasure("patches are pooled by their mean: there is no attention to measure")
    val, test = (select(splits[split], splits[split].has_masks) for split in ("val", "test"))
    for split, data in {"test": test, "validation": val}.items():
        if not data.names and not (guided and data is val):
            raise CannotMeasure(f"no {split} image has all masks: AP can't be measured")
    grid, heads = encoder.grid(test.images), torch.arange(len(test.regions))
    if not guided:
        chosen_on = attention_of(encoder, val.images, layer)  # (M, heads, N)
        ap = localisation_ap(chosen_on, val.masks, grid).nanmean(dim=0)  # (heads, R)
        if missing := [region for region, best in zip(val.regions, ap[0]) if best.isnan()]:
            raise CannotMeasure(f"no validation image shows {missing[0]}: no head can be chosen for it")
        heads = ap.argmax(dim=0)  # (R,)
    all_heads, table = attention_of(encoder, test.images, layer), {}  # (M, heads, N)
    if guided and len(heads) > all_heads.shape[1]:
        raise CannotMeasure(f"{len(heads)} regions, {all_heads.shape[1]} head(s): AP can't be measured")
    attention, maps = all_heads[:, heads], dict(priors(test.images)) if priors else {}
    if not guided and all_heads.shape[1] > 1:
        maps["mean of heads"] = all_heads.mean(dim=1, keepdim=True).expand_as(attention), grid
    maps["attention"] = attention, grid  # (M, R, N)
    for name, (m, size) in maps.items():
        ap = localisation_ap(m, test.masks, size).diagonal(dim1=1, dim2=2).nanmean(dim=0)  # (R,)
        table[name] = dict(zip(test.regions, ap.tolist())) | {MEAN: known_mean(ap)}
    return table, dict(zip(test.regions, heads.tolist()))


def name_of_bias(images: str, metric: str) -> str:
    """auc_same, auc_flipped_effusion, accuracy_same ..."""
    metric, finding = ("auc", metric[3:]) if metric.startswith("AUC") else (metric, "")
    return f"{metric}_{images}{finding}"


def name_of_ap(of: str, region: str) -> str:
    """attention_AP_heart, prior_mAP ..."""
    return f"{of}_mAP" if region == MEAN else f"{of}_AP_{region}"
