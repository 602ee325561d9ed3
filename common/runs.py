"""Runs: what they write at their end, and how they are loaded to be measured side by side."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoint import DataSpec, check_spec, data_spec, load_run, write_file
from common.classify import is_multiclass, warn_if_constant
from common.config import Config, parse
from common.data import BATCH, Data, select
from common.explain import attention_of, decisions, explained_class, has_attention, related, relevance_of
from common.explain import scores_in
from common.foreground import masks_compared
from common.measure import QUICK, report
from common.models import build_encoder, load_model, lrp_rule, start_from
from common.page import Looks, print_tables
from common.plots import curves, draw_maps
from common.regions import best_statistics, make_priors, mass_held, prior_maps, warn_if_unguided
from common.splits import DRAWN, load
from dino import DINO
from relvit import RelViT

ON_PAGE = 60  # images on the page


class Loaded(NamedTuple):
    """A run, or a file of weights, ready to be measured."""

    config: Config
    spec: DataSpec
    model: nn.Module
    history: list[dict]
    out: Path  # for its metrics
    masses: dict[str, float]  # as in `Run`


def data_of(config: Config) -> dict:
    """The data that a run is measured on, as arguments of `load`."""
    findings = list(config.findings or ["all"]) if config.task == "classify" else None
    wanted = dict(data=config.data, img_size=config.img_size, reference=config.sample, findings=findings)
    drawn = dict(seed=config.seed, train_images=config.train_images) if config.data in DRAWN else {}
    return wanted | drawn


def weights_config(file: Path, flags: list[str], run: Config | None = None) -> Config:
    """The settings of the encoder in a file of weights, and of its data; flags win over those of a run."""
    config, typed = parse([*flags, "--init", str(file), "--prior", "none"])
    shared = {"data", "img_size", "sample", "seed", "train_images"} - typed if run else ()
    return replace(config, **{name: getattr(run, name) for name in shared})


def load_all(
    paths: list[Path], flags: list[str], device: str
) -> tuple[dict[Path, Loaded], dict[str, Data], str | None]:
    """Runs and files of weights, the splits that all of them share, and the reference image's name.

    flags: as in `weights_config`; for runs, --data says where their data are now. Raises ValueError if the
    runs have different data.
    """
    runs, moved = {path: load_run(path) for path in paths if not path.is_file()}, flags[:1] == ["--data"]
    for path, run in runs.items():
        data = flags[1] if moved else run.config.data
        if run.config.data in DRAWN and data != run.config.data:
            raise ValueError(f"{path} learned from {run.config.data}, which is drawn: leave out --data")
        if data not in DRAWN and not Path(data).is_dir():
            learned = f"{path} learned from {data}, which is not a folder: give its path by --data"
            raise ValueError(f"--data {data} is not a folder" if moved else learned)
        runs[path] = run._replace(config=replace(run.config, data=data))
    shared = next((run.config for run in runs.values()), None)
    configs = {p: runs[p].config if p in runs else weights_config(p, flags, shared) for p in paths}
    first = configs[paths[0]]
    for path, config in configs.items():
        both = first, config
        here, there = ({"task": c.task} | data_of(c) | {"data": Path(c.data).resolve()} for c in both)
        if names := [name for name in here if name in there and here[name] != there[name]]:
            alike = "of one --task" if "task" in names else "on the same images"
            raise ValueError(f"{paths[0]} and {path} differ in {', '.join(names)}: compare runs {alike}")
    markers = {(c.marker, c.marker_kind) for c in configs.values() if c.marker is not None}
    if len(markers) > 1:
        both = " and ".join(f"{kind} {share:g}" for share, kind in sorted(markers))
        raise ValueError(f"the runs have markers of {both}: compare runs on the same images")
    marker, kind = markers.pop() if markers else (None, "corner")
    splits, reference, _ = load(**data_of(first), marker=marker, marker_kind=kind)
    loaded, classify = {}, first.task == "classify"
    for path, config in configs.items():
        spec = data_spec(splits["train"], classify, config.data, config.prior, reference)
        if run := runs.get(path):
            check_spec(path, run, spec, splits["train"].regions, config.data, goes_on=moved)
            model, history = load_model(path, run).to(device), run.checkpoint["history"]
            loaded[path] = Loaded(config, run.spec, model, history, path, run.masses)
        else:
            model = start_from(path, build_encoder(config, spec.channels))
            out = path.with_name(f"{path.name}-{Path(config.data).name}-{config.img_size}")
            loaded[path] = Loaded(config, spec, model.to(device), [], out, {})
    return loaded, splits, reference


def measured_by(run: Loaded, splits: dict, reference: str | None, known: dict) -> dict:
    """Keyword arguments of `measure.report` for a run. known: caches registered priors for the next run."""
    config, model = run.config, run.model
    if config.task == "classify":
        return {"layer": config.span_layer, "multiclass": run.spec.multiclass, "rule": lrp_rule(config)}

    def priors(images: Tensor) -> dict:
        grid = model.grid(images)
        if config.prior == "statistics":
            return best_statistics(images, splits["train"], splits["val"], config.prior_blur, grid)
        settings = config.prior_blur, config.align, grid
        if settings not in known:
            device = str(next(model.parameters()).device)
            known[settings] = prior_maps(images, splits["train"], reference, *settings, device)
        return known[settings]

    guided = {"layer": config.span_layer, "guided": config.prior in ("sample", "masks")}
    return guided | ({"priors": priors} if config.prior in ("sample", "statistics") else {})


def worth_showing(splits: dict[str, Data]) -> tuple[str, Data]:
    """The split to show, test unless it is empty, and its images: those with masks if any has them."""
    split = "test" if splits["test"].names else "train"
    data = splits[split]
    return split, select(data, data.has_masks) if data.has_masks.any() else data


def images_to_show(config: Config, splits: dict[str, Data], n: int) -> Data:
    """n test images for a picture: spread over classes, or two thirds with the finding, or the first n."""
    _, test = worth_showing(splits)
    n = min(n, len(test.names))
    labels, pretraining = splits["train"].labels, config.task == "pretrain"
    if is_multiclass(labels) and (pretraining or labels.shape[1] > 2):
        return select(test, torch.linspace(0, len(test.names) - 1, n).long())  # often sorted by class
    if pretraining or not test.findings:
        return select(test, torch.arange(n))
    column = 1 if labels.shape[1] == 2 and is_multiclass(labels) else 0  # the first of two classes is "no X"
    finding = test.labels[:, column].nan_to_num()
    order = torch.argsort(finding, descending=True, stable=True)
    return select(test, torch.cat([order[: n - n // 3], order[len(order) - n // 3 :]]))


def maps_of(run: Loaded, images: Tensor, heads: dict[str, int], rule: dict) -> dict[str, Tensor]:
    """What a run looks at in images (M, C, S, S) uint8, {title: (M, h, w)}: a classifier's heatmaps by an LRP
    rule, in units of their mean size; or the attention of heads {region: number}, of all if none is named.
    """
    if run.config.task != "classify":
        return heads_of(run.model, run.config.span_layer, images, heads, others=not heads)
    R = relevance_of(run.model, images, run.spec.multiclass, rule).sum(dim=1)
    return {"relevance": R / R.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)}


def heads_of(encoder: nn.Module, layer: int, images: Tensor, heads: dict[str, int], others: bool) -> dict:
    """The attention of heads {region: number}, and of all others if asked for, {title: (M, h, w)}."""
    attention = attention_of(encoder, images, layer).unflatten(2, encoder.grid(images))
    titles = {f"head {h}\n{region}": h for region, h in heads.items()}
    if others:
        titles |= {f"head {h}": h for h in range(attention.shape[1]) if h not in heads.values()}
    return {title: attention[:, h] for title, h in titles.items()}


def pretrained(model: nn.Module) -> nn.Module:
    """The encoder that is kept after training with DINO, RelViT, or SPAN alone."""
    return model.student if isinstance(model, DINO) else model.encoder


def masses_of(config: Config, model: nn.Module, train: Data, reference: str | None) -> Callable[[], dict]:
    """A function that measures m_r, {region: share}, for --masks; {} without priors over one image."""
    if config.task == "classify" or config.prior in ("none", "masks"):
        return dict  # which makes {}
    priors, names = make_priors(config.prior, train, reference, config.prior_blur)
    regions, encoder = priors >= priors.amax(dim=(1, 2), keepdim=True) / 2, pretrained(model)  # (R, S, S)
    # Priors from statistics or a file are true of images only on average.
    images = train.images[[train.names.index(reference)] if config.prior == "sample" else slice(BATCH)]

    def measured() -> dict[str, float]:
        training = model.training
        attention = attention_of(encoder, images, config.span_layer)[:, : len(names)]
        model.train(training)
        return dict(zip(names, mass_held(attention, encoder.grid(images), regions).tolist()))

    return measured


def finish(
    config: Config, spec: DataSpec, model: nn.Module, splits: dict, reference: str | None,
    masks: Tensor | None, history: list[dict],
) -> None:  # fmt: skip
    """Measure on test images, print the tables, draw the pictures, write the metrics."""
    train, picture, held_out = splits["train"], "heatmaps.png", {}
    relvit = model if isinstance(model, RelViT) else getattr(model, "relvit", None)
    if relvit and len(splits["test"].names):
        cut_as = config.patch_size, config.mega_patches > 0, config.in_order
        held_out = related(relvit, splits["test"].images, config.task == "classify", *cut_as)
    if config.task == "pretrain":
        model, picture = pretrained(model), "attention.png"
        warn_if_unguided(history)
    run = Loaded(config, spec, model, history, config.out, {})
    measured = report(model, splits, QUICK, **measured_by(run, splits, reference, {}))
    print_tables({"": measured})
    metrics = {k: v for k, v in history[-1].items() if k != "epoch"} | held_out | measured.metrics
    if config.task == "classify":
        warn_if_constant(history[-1], train.labels, spec.multiclass)
        if masks is not None and config.masks != "data":
            metrics |= zip(("mask_dice", "masks_compared"), masks_compared(masks, train, reference))
    write_file(config.out / "metrics.json", {k: v for k, v in metrics.items() if math.isfinite(v)})
    shown = images_to_show(config, splits, 6)
    maps = maps_of(run, shown.images, measured.heads, lrp_rule(config))
    if config.task == "classify":
        maps = {f"relevance for\n{explained_class(spec.classes, spec.multiclass)}": maps["relevance"]}
    draw_maps(config.out / picture, shown, maps, signed=config.task == "classify")
    curves(config.out / "curves.png", {config.out.name: history})
    print(f"wrote {config.out}/{picture}, curves.png, metrics.json, last.pt")


def looks_of(
    loaded: dict[str, Loaded], splits: dict[str, Data], reports: dict
) -> tuple[Data, str, dict[str, Looks]]:
    """Images for the page, a description of them, and what each run sees in them.

    The images are the first test images, and those that each run is worst at.
    """
    (split, data), scores, looks = worth_showing(splits), {}, {}
    for name, (config, spec, model, *_) in loaded.items():
        multiclass = spec.multiclass if config.task == "classify" else None
        scores[name] = scores_in(model, data, reports[name].heads, multiclass, config.span_layer)
    each, n = ON_PAGE // (len(loaded) + 1), len(data.names)
    index = set(range(n if n <= ON_PAGE else each))
    for _, values in scores.values():
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        index |= set(sorted(known, key=values.__getitem__)[:each])
    shown = select(data, torch.tensor(sorted(index)))
    which = f"{config.data} at {config.img_size} px: {len(index)} of {n} {split} images"
    which += " with masks" if data.has_masks.any() else ""
    which += f", the first {each} and those that each model is worst at" if len(index) < n else ""
    for name, run in loaded.items():
        config, spec, model, *_ = run
        score, values = scores[name][0], [scores[name][1][i] for i in sorted(index)]
        encoder, said, title = model, [], name
        if config.task == "classify":
            encoder, title = model.encoder, f"{name}, attention"
            said = decisions(model, shown.images, spec.multiclass, spec.classes)
            maps = maps_of(run, shown.images, {}, lrp_rule(config))
            looks[name] = Looks(maps, explained_class(spec.classes, spec.multiclass), said, score, values)
        if config.task == "pretrain" or has_attention(encoder, config.baseline):
            maps = heads_of(encoder, config.span_layer, shown.images, reports[name].heads, others=True)
            looks[title] = Looks(maps, "", said, score, values)
    return shown, which, looks
