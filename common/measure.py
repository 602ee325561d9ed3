"""What a run is worth, in numbers, on test images that no choice was made on.

    attention   For each region the pixel average precision (AP) of an attention head, and its Dice overlap.
                A head that was guided by masks belongs to their region; in any other run each region gets the
                head that is best on validation images. A run guided by one labelled sample also shows its
                prior, as it is and registered to each test image, on the attention's grid of patches and, for
                honesty, at every pixel.
    bias        A classifier's AUC and accuracy on test images as they were in training and, if a hospital's
                marker was drawn on them, with the marker removed, flipped, and flipped as another one, unseen
                in training: only these show what it relies on. The share of relevance in the foreground is
                printed beside them, since a heatmap can look right and be wrong.
    knn, linear, heads, finetune
                What the encoder is good for, with all labels and with few: see `probe.py`.

Next to read: `evaluate.py`.
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention_priors import follow
from common.models import exclusive, explained_by, relevance_of, scores_of
from common.data import Data, select
from common.metrics import CannotMeasure, auc, best_threshold, dice, known_mean, localisation_ap, relevance_share
from common.pretrain import attention_of, lay_over, make_priors
from common.probe import PROBES, drawn, probe
from resnet import ResNet
from vit import ViT

MEASURES = ["attention", "bias", *PROBES]


class Report(NamedTuple):
    """What was found of one run."""

    figures: dict[str, float]  # flat names to numbers, as in metrics.json
    tables: dict[str, dict[str, dict[str, float]]]  # {title: {column: {row: value}}}
    curves: dict[str, dict[float, list[float]]]  # {probe: {share of the labels: a value a draw}}
    heads: dict[str, int]  # {region: the head that looks at it}
    notes: list[str]  # what can't be measured


def measure(
    config: argparse.Namespace, encoder: ViT | ResNet, parts: dict[str, Data], sample: str | None
) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, int]]:
    """AP on the test images that have masks, {attention, prior, aligned prior ...: {region: AP}}.

    Also the attention's Dice {region: overlap}, where validation images have masks to choose a threshold
    with, and the heads {region: number}. Raises CannotMeasure without masks.
    """
    val, test = (select(parts[part], parts[part].has_masks) for part in ("val", "test"))
    guided = config.task == "pretrain" and config.prior in ("sample", "masks")
    for part, data in (("test", test), ("validation", val)):
        if not data.names and not (guided and data is val):
            raise CannotMeasure(f"no {part} image of {config.data} has all masks: AP can't be measured")
    grid, layer, heads = encoder.grid(test.images), config.span_layer, torch.arange(len(test.regions))
    chosen_on = attention_of(encoder, val.images, layer) if val.names else None  # (M, heads, N)
    if not guided:
        ap = localisation_ap(chosen_on, val.masks, grid).nanmean(dim=0)  # (heads, R)
        for region in (region for region, best in zip(val.regions, ap[0]) if best.isnan()):
            raise CannotMeasure(f"no validation image shows {region}: no head can be chosen for it")
        heads = ap.argmax(dim=0)  # the best for each region
    maps, attention = {}, attention_of(encoder, test.images, layer)[:, heads]  # (M, R, N)
    if guided and config.prior == "sample":
        whole, everyone = torch.eye(2, 3).expand(len(test.names), 2, 3), torch.arange(len(test.names))
        maps["prior"] = follow(make_priors(config, parts, sample)[0], whole, grid)[0], grid
        if config.align != "none":
            laid = lay_over(config, parts, sample, test.images)(everyone)
            maps["aligned prior, every pixel"] = laid.flatten(2), tuple(laid.shape[2:])
            maps["aligned prior"] = follow(laid, whole, grid)[0], grid
    maps["attention"] = attention, grid
    table = {}
    for what, (m, size) in maps.items():
        ap = localisation_ap(m, test.masks, size).diagonal(dim1=1, dim2=2).nanmean(dim=0)  # (R,)
        table[what] = dict(zip(test.regions, ap.tolist()))
    overlap = {}
    if chosen_on is not None:
        best = dice(chosen_on[:, heads], val.masks, grid).nanmean(dim=1).nan_to_num(-1).argmax(dim=0)  # (R,)
        overlap = dice(attention, test.masks, grid).nanmean(dim=1)  # (T, R)
        overlap = dict(zip(test.regions, overlap.gather(0, best[None])[0].tolist()))
    return table, overlap, dict(zip(test.regions, heads.tolist()))


def measure_classifier(
    config: argparse.Namespace, model: nn.Module, parts: dict[str, Data]
) -> dict[str, dict[str, float]]:
    """AUC, accuracy and the foreground's share of relevance: {set: {what: value}}.

    The sets are the test images as the training images are (same) and, if there is a marker, with it removed,
    flipped, and flipped as one unseen. Thresholds are those that are best on validation images, where these
    have labels; of three classes or more the likeliest counts. What can't be said is NaN. Raises
    CannotMeasure without labels.
    """
    test, val = parts["test"], parts["val"]
    if test.labels is None or test.labels.isnan().all():
        raise CannotMeasure(f"no test image of {config.data} has a label: AUC can't be measured")
    sets = {"same": test, **{name: parts[name] for name in ("removed", "flipped", "unseen") if name in parts}}
    one_class, table = config.one_class, {}
    findings = dict(enumerate(test.findings))
    if first_finding(parts):
        del findings[0]
    known = (k for k in findings if val.labels is not None and not val.labels[:, k].isnan().all())
    chosen = scores_of(model, val.images, one_class)
    thresholds = {k: best_threshold(chosen[:, k], val.labels[:, k]) for k in known}
    for name, data in sets.items():
        scores, labels = scores_of(model, data.images, one_class), data.labels
        each = {f"AUC {finding}": auc(scores[:, k], labels[:, k]) for k, finding in findings.items()}
        if len(findings) > 1 and one_class:
            right = (scores.argmax(dim=1) == labels.argmax(dim=1))[~labels.isnan().any(dim=1)]
        else:
            right = [
                ((scores[:, k] > t) == labels[:, k])[~labels[:, k].isnan()] for k, t in thresholds.items()
            ]
            right = torch.cat([torch.zeros(0, dtype=torch.bool), *right])
        table[name] = {"AUC": known_mean(each.values()), **each}
        table[name]["accuracy"] = float(right.double().mean())
        if data.has_masks.any():
            seen = select(data, data.has_masks)
            R = relevance_of(config, model, seen.images)
            share = relevance_share(R, seen.masks.any(dim=1)[:, None])
            table[name]["relevance share"] = float(share.nanmean())
    return table


def first_finding(parts: dict[str, Data]) -> int:
    """The column of labels that is asked for first: of two classes the second, "X" and not "no X"."""
    labels = parts["train"].labels
    return int(labels.shape[1] == 2 and exclusive(labels))


def report(
    config: argparse.Namespace,
    model: nn.Module,
    parts: dict[str, Data],
    sample: str | None,
    only: list[str],
    shares: tuple[float, ...],
) -> Report:
    """Measure one run's model on test images, as far as masks and labels allow."""
    classifies = config.task == "classify"
    encoder = model.encoder if classifies else model
    found = Report({}, {}, {}, {}, [])
    for what in only:
        try:
            if what == "bias" and classifies:
                table = found.tables["test images, in %"] = measure_classifier(config, model, parts)
                found.figures.update(flatten_classifier(table))
            elif what == "attention":
                table, overlap, heads = measure(config, encoder, parts, sample)
                found.figures.update(flatten(table) | flatten({"attention": overlap}, "Dice"))
                found.tables.update(
                    {"AP in %": table, "Dice in %": {"attention": overlap} if overlap else {}}
                )
                found.heads.update(heads)
            elif what in PROBES and not (classifies and what == "finetune"):
                probed = probe(encoder, parts, what, shares[-1:] if classifies else shares)
                found.figures.update(flatten_probe(what, probed))
                name = list(probed[shares[-1]])[-1]  # accuracy, of classes, else mAUC
                curve = {share: values[name] for share, values in probed.items()}
                found.curves[f"{what} {name}"] = curve
                images = {share: len(drawn(parts["train"].labels, share, 0)) for share in curve}
                rows = {f"{100 * s:g} % of labels ({images[s]})": known_mean(v) for s, v in curve.items()}
                found.tables.setdefault("probes, in %", {})[f"{what} {name}"] = rows
            elif only != MEASURES:
                found.notes.append(f"{what} is of {'pretrained runs' if classifies else 'classifiers'} only")
        except CannotMeasure as error:
            found.notes.append(str(error))
    unknown = [name for name, value in found.figures.items() if math.isnan(value)]
    if unknown:
        found.notes.append(f"not defined, too few images of a kind: {', '.join(unknown)}")
    return found


def scores_in(
    config: argparse.Namespace, model: nn.Module, data: Data, heads: dict[str, int]
) -> tuple[str, list[float]]:
    """How well a run does on each image (M,), and what is meant by that: a classifier's probability of what
    is true, or the mean AP of heads {region: number} where there are masks. NaN where it can't be said.
    """
    if config.task == "classify" and data.labels is not None:
        chances, y = scores_of(model, data.images, config.one_class).sigmoid(), data.labels  # (M, K)
        if config.one_class:
            true = (chances * y).sum(dim=1)  # NaN if any is unknown
            return "probability of the true class", true.tolist()
        true = torch.where(y == 1, chances, 1 - chances).masked_fill(y.isnan(), torch.nan).nanmean(dim=1)
        return "probability of what is true, mean of the findings", true.tolist()
    if config.task == "pretrain" and set(data.regions) == set(heads) and data.has_masks.any():
        attention = attention_of(model, data.images, config.span_layer)[:, list(heads.values())]
        regions = [data.regions.index(region) for region in heads]
        ap = localisation_ap(attention, data.masks[:, regions], model.grid(data.images))  # (M, R, R)
        return "mean AP", ap.diagonal(dim1=1, dim2=2).nanmean(dim=1).tolist()
    return "", [math.nan] * len(data.names)


def decisions(config: argparse.Namespace, model: nn.Module, images: Tensor) -> list[list[str]]:
    """What a classifier says of each image (M, C, S, S) uint8, in words: what `relevance_of` explains, if it
    is always the same, and then the likeliest, four in all.
    """
    said = []
    for chances in scores_of(model, images, config.one_class).sigmoid().tolist():
        ranked = sorted(zip(config.classes, chances), key=lambda pair: -pair[1])
        ranked.sort(key=lambda pair: pair[0] != explained_by(config))  # the others stay in order
        said.append([f"{name} {100 * chance:.0f} %" for name, chance in ranked[:4]])
    return said


def flatten(table: dict[str, dict[str, float]], score: str = "AP") -> dict[str, float]:
    """{what: {region: AP}} under the flat names of metrics.json: attention_mAP, attention_AP_heart ..."""
    flat = {}
    for what, row in table.items():
        name = what.replace(",", "").replace(" ", "_")
        flat |= {f"{name}_{score}_{region.replace(' ', '_')}": value for region, value in row.items()}
        flat |= {f"{name}_m{score}": known_mean(row.values())} if row else {}
    return flat


def flatten_classifier(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{set: {what: value}} under the flat names of metrics.json: auc_same, auc_flipped_effusion ..."""
    flat = {}
    for name, column in table.items():
        for what, value in column.items():
            measure, *finding = (
                what.lower().split(" ", 1) if what.startswith("AUC") else (what.replace(" ", "_"),)
            )
            flat["_".join([measure, name, *finding]).replace(" ", "_")] = value
    return flat


def flatten_probe(how: str, probed: dict[float, dict[str, list[float]]]) -> dict[str, float]:
    """A probe's figures by flat names: linear_mAUC, and linear_mAUC_5_percent, the mean of the draws."""
    flat = {}
    for share, figures in probed.items():
        suffix = "" if share == 1 else f"_{100 * share:g}_percent"
        flat |= {f"{how}_{name}{suffix}": known_mean(values) for name, values in figures.items()}
    return flat
