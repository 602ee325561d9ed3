"""Runs and files of weights, loaded to be measured side by side, and what they show."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import DataSpec, check_spec, data_spec, load_run
from common.classify import is_multiclass
from common.config import Config, parse
from common.data import DRAWN, Data, load, select
from common.explain import attention_of, decisions, explained_class, pools_evenly, relevance_of
from common.measure import scores_in
from common.models import build_encoder, load_model, lrp_rule, start_from
from common.page import Looks
from common.regions import prior_maps

ON_PAGE = 60  # images on the page


class Loaded(NamedTuple):
    """A run, or a file of weights, ready to be measured."""

    config: Config
    spec: DataSpec
    model: nn.Module
    history: list[dict]
    out: Path  # for its metrics


def data_of(config: Config) -> dict:
    """The data that a run is measured on, as arguments of `load`."""
    findings = list(config.findings or ["all"]) if config.task == "classify" else None
    wanted = dict(data=config.data, img_size=config.img_size, reference=config.sample, findings=findings)
    drawn = dict(seed=config.seed, train_images=config.train_images) if config.data in DRAWN else {}
    return wanted | drawn


def weights_config(file: Path, flags: list[str]) -> Config:
    """The settings of the encoder in a file of weights. flags: of train.py, the data to measure it on."""
    return parse([*flags, "--init", str(file), "--prior", "none"])[0]


def load_all(
    paths: list[Path], flags: list[str], device: str
) -> tuple[dict[Path, Loaded], dict[str, Data], str | None]:
    """Runs and files of weights, the splits that all of them share, and the reference image's name.

    flags: of train.py, the data for files of weights; beside runs, that of the runs. Raises ValueError if the
    runs have different data.
    """
    runs = {path: load_run(path) for path in paths if not path.is_file()}
    if runs:
        shared = data_of(next(iter(runs.values())).config)
        shared = {"sample" if k == "reference" else k: v for k, v in shared.items() if v and k != "findings"}
        flags = [word for k, v in shared.items() for word in (f"--{k.replace('_', '-')}", str(v))] + flags
    configs = {path: runs[path].config if path in runs else weights_config(path, flags) for path in paths}
    first = configs[paths[0]]
    for path, config in configs.items():
        here, there = ({"task": c.task, **data_of(c)} for c in (first, config))
        differ = [name for name in here | there if here.get(name) != there.get(name)]
        if differ:
            differ = f"{paths[0]} and {path} differ in {', '.join(differ)}"
            raise ValueError(f"{differ}: compare runs on the same images")
    markers = {(c.marker, c.marker_kind) for c in configs.values() if c.marker is not None}
    if len(markers) > 1:
        both = " and ".join(f"{kind} {share:g}" for share, kind in sorted(markers))
        raise ValueError(f"the runs have markers of {both}: compare runs on the same images")
    marker = dict(zip(("marker", "marker_kind"), markers.pop())) if markers else {}
    splits, reference, _ = load(**data_of(first), **marker)
    spec, found = data_spec(splits["train"], first.task == "classify", first.data), {}
    for path, config in configs.items():
        if path in runs:
            check_spec(path, runs[path].spec._replace(images=spec.images), spec, config.data)
            model, history = load_model(path, runs[path]), runs[path].checkpoint["history"]
            found[path] = Loaded(config, runs[path].spec, model.to(device), history, path)
        else:
            start_from(path, model := build_encoder(config, spec.channels))
            out = path.with_name(f"{path.name}-{Path(config.data).name}")  # the metrics of one data set
            found[path] = Loaded(config, spec, model.to(device), [], out)
    return found, splits, reference


def measured_by(
    config: Config, spec: DataSpec, model: nn.Module, splits: dict, reference: str | None, known: dict
) -> dict:
    """What `measure.report` needs to know of a run, as keyword arguments.

    known: keeps registered priors for the next run with the same settings; it may be empty.
    """
    pretrain = config.task == "pretrain"
    about = {"layer": config.span_layer, "guided": pretrain and config.prior in ("sample", "masks")}
    if not pretrain:
        return about | {"multiclass": spec.multiclass, "rule": lrp_rule(config)}
    if config.prior != "sample":
        return about

    def priors(images: Tensor) -> dict:
        given = config.prior_blur, config.align, model.grid(images)
        if given not in known:
            device = str(next(model.parameters()).device)
            known[given] = prior_maps(images, splits["train"], reference, *given, device)
        return known[given]

    return about | {"priors": priors}


def images_to_show(config: Config, splits: dict[str, Data], n: int) -> Data:
    """n test images for a picture, those with masks; of a classifier, two thirds with the first finding."""
    test = splits["test"] if splits["test"].names else splits["train"]
    test = select(test, test.has_masks) if test.has_masks.any() else test
    n = min(n, len(test.names))
    if config.task == "pretrain" or test.labels is None:
        return select(test, torch.arange(n))
    labels = splits["train"].labels
    finding = test.labels[:, int(labels.shape[1] == 2 and is_multiclass(labels))].nan_to_num()
    order = torch.argsort(finding, descending=True, stable=True)
    return select(test, torch.cat([order[: n - n // 3], order[len(order) - n // 3 :]]))


def maps_of(
    config: Config, spec: DataSpec, model: nn.Module, images: Tensor, heads: dict[str, int], rule: dict
) -> dict[str, Tensor]:
    """What a run looks at in images (M, C, S, S) uint8, {title: (M, h, w)}.

    A classifier's heatmaps by an LRP rule, in units of their mean size; or the attention of heads {region:
    number}, of all heads if none is named.
    """
    if config.task != "classify":
        return heads_of(model, config.span_layer, images, heads, others=not heads)
    R = relevance_of(model, images, spec.multiclass, rule).sum(dim=1)
    return {"relevance": R / R.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)}


def heads_of(encoder: nn.Module, layer: int, images: Tensor, heads: dict[str, int], others: bool) -> dict:
    """The attention of heads {region: number}, and perhaps of all others, {title: (M, h, w)}."""
    attention = attention_of(encoder, images, layer).unflatten(2, encoder.grid(images))
    titles = {f"head {h}\n{region}": h for region, h in heads.items()}
    if others:
        titles |= {f"head {h}": h for h in range(attention.shape[1]) if h not in heads.values()}
    return {title: attention[:, h] for title, h in titles.items()}


def looks_of(
    loaded: dict[str, Loaded], splits: dict[str, Data], reports: dict
) -> tuple[Data, str, dict[str, Looks]]:
    """Images for the page, words that say which, and what each run sees in them.

    The images are the first test images, and those that each run is worst at.
    """
    split = "test" if splits["test"].names else "train"
    data = select(splits[split], splits[split].has_masks) if splits[split].has_masks.any() else splits[split]
    scores = {}
    for name, run in loaded.items():
        multiclass = run.spec.multiclass if run.config.task == "classify" else None
        scores[name] = scores_in(run.model, data, reports[name].heads, multiclass, run.config.span_layer)
    each = ON_PAGE // (len(loaded) + 1)
    index = set(range(len(data.names) if len(data.names) <= ON_PAGE else each))
    for _, values in scores.values():
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        index |= set(sorted(known, key=values.__getitem__)[:each])
    index, (config, *_) = sorted(index), next(iter(loaded.values()))
    which = f"{config.data} at {config.img_size} px: {len(index)} of {len(data.names)} {split} images"
    which += " with masks" if data.has_masks.any() else ""
    if len(index) < len(data.names):
        which += f", the first {each} and those that each model is worst at"
    shown, looks = select(data, torch.tensor(index)), {}
    for name, (config, spec, model, *_) in loaded.items():
        score, values = scores[name][0], [scores[name][1][i] for i in index]
        encoder, said = model, []
        if config.task == "classify":
            encoder, classes = model.encoder, (spec.classes, spec.multiclass)
            said = decisions(model, shown.images, spec.multiclass, spec.classes)
            maps = maps_of(config, spec, model, shown.images, {}, lrp_rule(config))
            looks[name] = Looks(maps, explained_class(*classes), said, score, values)
        if config.task != "classify" or not (pools_evenly(encoder) or config.baseline == "pipeline"):
            maps = heads_of(encoder, config.span_layer, shown.images, reports[name].heads, others=True)
            looks[f"{name}, attention" if name in looks else name] = Looks(maps, "", said, score, values)
    return shown, which, looks
