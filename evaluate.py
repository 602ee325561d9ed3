"""What comes out: runs of `train.py`, measured side by side on test images that no choice was made on.

For each region the pixel average precision (AP) of an attention head, averaged over test images. A head that
was guided by masks belongs to their region; in any other run each region gets the head that is best on
validation images. A run guided by one labelled sample also shows its prior, as it is and registered to each
test image, on the attention's grid of patches and, for honesty, at every pixel.

A classifier is measured by AUC and accuracy on test images as they were in training and, if a hospital's
marker was drawn on them, with the marker removed and flipped: only these show what it relies on. The share of
relevance in the foreground is printed beside them, since a heatmap can look right and be wrong.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attention_priors import align, bend, blurred, carry, follow, priors_from_masks, priors_from_statistics
from checkpoint import load_run
from classify import Classifier, exclusive, log_odds, prepared, rule
from data import Data, load, normalise, select
from isnet_lrp import relevance
from metrics import auc, best_threshold, localisation_ap, relevance_share
from plots import map_grid
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT

BATCH = 250  # images at a time, where no gradient is kept


class CannotMeasure(ValueError):
    """There are no masks or labels to measure with; the message says which."""


def build_encoder(config: argparse.Namespace, in_chans: int) -> ViT | ResNet:
    """The encoder that a run's settings describe. Raises ValueError for sizes that don't fit."""
    D, pool = config.embed_dim, None  # None: the ViT's CLS token, the ResNet's mean
    if config.pool == "simpool":
        pool = SimPool(D, config.simpool_gamma, config.pool_heads)
    elif config.pool == "gap" and config.backbone == "vit":
        pool = GAP()
    if config.backbone == "resnet":
        return ResNet(in_chans, D, pool=pool)
    sizes = config.img_size, config.patch_size, in_chans, D, config.depth, config.num_heads
    return ViT(*sizes, drop_path=config.drop_path, pool=pool)


def make_priors(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None
) -> tuple[Tensor, list[str]]:
    """Priors (R, S, S) over one image, as --prior asks, and their names. Raises ValueError."""
    train, blur = parts["train"], config.prior_blur
    if config.prior == "sample":
        if sample is None:
            raise ValueError(
                f"--prior sample: no image of {config.data} has a mask for every region; outline one"
            )
        masks = train.masks[train.names.index(sample)]
        empty = [region for region, mask in zip(train.regions, masks) if not mask.any()]
        if empty:
            raise ValueError(
                f"the masks of sample {sample} are empty for {', '.join(empty)}: choose another --sample"
            )
        return priors_from_masks(masks, blur), train.regions
    if config.prior == "statistics":
        names = ["mean", "deviation", "cluster 1", "cluster 2"]
        return priors_from_statistics(train.images, blur=blur), names
    try:
        priors = torch.from_numpy(np.load(config.prior, allow_pickle=False)).float()
    except Exception as error:  # np.load fails on foreign files in many ways
        what = "sample, masks, statistics, none, or a .npy file"
        raise ValueError(f"--prior {config.prior} is not {what} ({type(error).__name__}: {error})") from None
    S = config.img_size
    if priors.dim() != 3 or not len(priors) or priors.shape[1:] != (S, S):
        raise ValueError(f"--prior {config.prior} is an array {tuple(priors.shape)}: make it (R, {S}, {S})")
    if not (priors.isfinite() & (priors >= 0)).all() or not priors.flatten(1).any(dim=1).all():
        raise ValueError(f"--prior {config.prior}: each prior must be finite, not negative, and not empty")
    return priors_from_masks(priors, blur), [f"prior {r}" for r in range(len(priors))]


def register(config: argparse.Namespace, sample: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The sample (C, S, S) registered to images (N, C, S, S): theta (N, 2, 3) and flow (N, 2, k, k).

    Without bending the flow is zero.
    """
    thetas, flows = [], []
    for part in images.split(BATCH):
        thetas.append(align(sample, part))
        bends = bend(sample, part, thetas[-1]) if config.align == "bend" else torch.zeros(len(part), 2, 1, 1)
        flows.append(bends.to(images.device))
    return torch.cat(thetas), torch.cat(flows)


def lay_over(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None, images: Tensor
) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """A function from indices (B,) of images (N, C, S, S) to the priors (B, R, S, S) over them; their names.

    images are the training images if --prior is masks. Raises ValueError.
    """
    train = parts["train"]
    if config.prior == "masks":
        if not train.has_masks.any():
            raise ValueError(f"--prior masks: no training image of {config.data} has a mask for every region")
        masks = train.masks.to(images.device)  # blurred as the sample's are; a missing mask stays empty
        return lambda index: blurred(masks[index].float(), config.prior_blur), train.regions
    priors, names = make_priors(config, parts, sample)
    priors = priors.to(images.device)
    if config.prior != "sample" or config.align == "none":
        return lambda index: priors.expand(len(index), *priors.shape), names
    theta, flow = register(config, train.images[train.names.index(sample)].to(images.device), images)
    return lambda index: carry(priors, theta[index], flow[index]), names


@torch.no_grad()
def attention_of(encoder: ViT | ResNet, images: Tensor, layer: int) -> Tensor:
    """One block's attention (M, heads, N) over images (M, C, S, S) uint8, in evaluation mode."""
    encoder.eval()
    batches = (normalise(part.float() / 255) for part in images.split(BATCH))
    return torch.cat([encoder(batch, layer=layer).attention for batch in batches])


def measure(
    config: argparse.Namespace, encoder: ViT | ResNet, parts: dict[str, Data], sample: str | None
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """AP on the test images that have masks: {attention, prior, aligned prior ...: {region: AP}}.

    Also the attention (M, h, w) behind it, {title: maps}, for pictures. Raises CannotMeasure without masks.
    """
    val, test = (select(parts[part], parts[part].has_masks) for part in ("val", "test"))
    guided = config.task == "pretrain" and config.prior in ("sample", "masks")
    for part, data in (("test", test), ("validation", val)):
        if not data.names and not (guided and data is val):
            raise CannotMeasure(f"no {part} image of {config.data} has all masks: AP can't be measured")
    grid, layer, heads = encoder.grid(test.images), config.span_layer, torch.arange(len(test.regions))
    if not guided:
        ap = localisation_ap(attention_of(encoder, val.images, layer), val.masks, grid)  # (M, heads, R)
        heads = ap.nanmean(dim=0).argmax(dim=0)  # the best for each region
    maps, attention = {}, attention_of(encoder, test.images, layer)[:, heads]  # (M, R, N)
    if guided and config.prior == "sample":
        whole, everyone = torch.eye(2, 3).expand(len(test.names), 2, 3), torch.arange(len(test.names))
        maps["prior"] = follow(make_priors(config, parts, sample)[0], whole, grid)[0], grid
        if config.align != "none":
            laid = lay_over(config, parts, sample, test.images)[0](everyone)
            maps["aligned prior, every pixel"] = laid.flatten(2), tuple(laid.shape[2:])
            maps["aligned prior"] = follow(laid, whole, grid)[0], grid
    maps["attention"] = attention, grid
    table = {}
    for what, (m, size) in maps.items():
        ap = localisation_ap(m, test.masks, size).diagonal(dim1=1, dim2=2).nanmean(dim=0)  # (R,)
        table[what] = dict(zip(test.regions, ap.tolist()))
    titles = [f"head {h}\n{region}" for h, region in zip(heads.tolist(), test.regions)]
    return table, dict(zip(titles, attention.unflatten(2, grid).unbind(1)))


def measure_classifier(
    config: argparse.Namespace, model: Classifier, parts: dict[str, Data], n_images: int = 6
) -> tuple[dict[str, dict[str, float]], Data, dict[str, Tensor]]:
    """AUC, accuracy and the foreground's share of relevance: {set: {what: value}}.

    The sets are the test images as the training images are (same) and, if there is a marker, with it removed
    and flipped. Thresholds are those that are best on validation images; of three classes or more the
    likeliest counts. Also n_images test images, two thirds with the first finding, and their heatmaps
    {title: (n_images, S, S)}.
    """
    test = parts["test"]
    if test.labels is None or test.labels.isnan().all():
        raise CannotMeasure(f"no test image of {config.data} has a label: AUC can't be measured")
    sets = {"same": test, **{name: parts[name] for name in ("removed", "flipped") if name in parts}}
    one_class, table = exclusive(parts["train"].labels), {}
    findings = dict(enumerate(test.findings))
    first = 1 if one_class and len(findings) == 2 else 0  # "no X" and X are one question
    if first:
        del findings[0]
    chosen = scores_of(model, parts["val"], one_class)
    thresholds = {k: best_threshold(chosen[:, k], parts["val"].labels[:, k]) for k in findings}
    for name, data in sets.items():
        scores, labels = scores_of(model, data, one_class), data.labels
        each = {f"AUC {finding}": auc(scores[:, k], labels[:, k]) for k, finding in findings.items()}
        if len(findings) > 1 and one_class:
            right = (scores.argmax(dim=1) == labels.argmax(dim=1))[~labels.isnan().any(dim=1)]
        else:
            right = [
                ((scores[:, k] > t) == labels[:, k])[~labels[:, k].isnan()] for k, t in thresholds.items()
            ]
            right = torch.cat(right)
        found = [value for value in each.values() if not np.isnan(value)]
        table[name] = {"AUC": float(np.mean(found)) if found else float("nan"), **each}
        table[name]["accuracy"] = float(right.double().mean())
        if data.has_masks.any():
            seen = select(data, data.has_masks)
            R = relevance_of(config, model, seen.images, one_class)
            table[name]["relevance share"] = float(
                relevance_share(R, seen.masks.any(dim=1)[:, None]).nanmean()
            )
    order = torch.argsort(test.labels[:, first].nan_to_num(), descending=True, stable=True)
    n = min(n_images, len(order))
    shown = select(test, torch.cat([order[: n - n // 3], order[len(order) - n // 3 :]]))
    return table, shown, heatmaps_of(config, model, shown.images, one_class)


@torch.no_grad()
def scores_of(model: Classifier, data: Data, one_class: bool) -> Tensor:
    """Log-odds (M, K) of classes, or the logits of findings, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(prepared(images)) for images in data.images.split(BATCH)])
    if not one_class:
        return logits
    return torch.stack(
        [log_odds(logits, torch.full((len(logits),), k)) for k in range(logits.shape[1])], dim=1
    )


def relevance_of(config: argparse.Namespace, model: Classifier, images: Tensor, one_class: bool) -> Tensor:
    """LRP heatmaps (M, C, S, S) of the first finding, the second of two classes, the likeliest of more."""

    def target(logits: Tensor) -> Tensor:
        if not one_class:
            return logits[:, 0]
        likeliest = logits.argmax(dim=1)
        return log_odds(logits, likeliest if logits.shape[1] > 2 else torch.ones_like(likeliest))

    model.eval()
    heatmaps = (relevance(model, prepared(x), target, **rule(config))[0] for x in images.split(BATCH))
    return torch.cat([R.detach() for R in heatmaps])


def heatmaps_of(
    config: argparse.Namespace, model: Classifier, images: Tensor, one_class: bool
) -> dict[str, Tensor]:
    """Heatmaps of images (M, C, S, S) in units of their mean size, for a picture: {title: (M, S, S)}."""
    R = relevance_of(config, model, images, one_class).sum(dim=1)
    return {"relevance": R / R.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)}


def flatten(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{what: {region: AP}} under the flat names of metrics.json: attention_mAP, attention_AP_heart ..."""
    flat = {}
    for what, row in table.items():
        name = what.replace(",", "").replace(" ", "_")
        flat |= {f"{name}_AP_{region.replace(' ', '_')}": ap for region, ap in row.items()}
        flat[f"{name}_mAP"] = float(np.mean(list(row.values())))
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


def print_table(columns: dict[str, dict[str, float]], mean: bool = True) -> None:
    """Print {what: {name: value}} in percent: a row a name, a column for each what, means below."""
    names, corner = list(next(iter(columns.values()))), "AP in %" if mean else "in %"
    first = max(map(len, [*names, corner]))
    print(f"\n{corner:{first}}" + "".join(f"  {title:>7}" for title in columns))
    for name in names + ["mean"] * mean:
        row = [np.mean(list(c.values())) if name == "mean" else c[name] for c in columns.values()]
        cells = [f"  {100 * value:{max(7, len(title))}.1f}" for value, title in zip(row, columns)]
        print(f"{name:{first}}" + "".join(cells))
    print()


def load_model(run: Path, config: argparse.Namespace, checkpoint: dict, train: Data) -> ViT | Classifier:
    """The encoder (of the student) or the classifier of a run. Raises ValueError if it doesn't fit."""
    encoder = build_encoder(config, train.images.shape[1])
    if config.task == "pretrain":
        load_encoder(run, config, checkpoint, encoder)
        return encoder
    model = Classifier(encoder, len(train.findings))
    try:
        model.load_state_dict({k: v for k, v in checkpoint["model"].items() if not k.startswith("relvit.")})
    except RuntimeError:
        raise ValueError(f"{run}: last.pt holds a model of other sizes or classes than asked for") from None
    return model


def load_encoder(run: Path, config: argparse.Namespace, checkpoint: dict, encoder: nn.Module) -> None:
    """Load a run's encoder, of a student or a classifier. Raises ValueError if it has other sizes."""
    prefix = "student." if config.task == "pretrain" and config.ssl == "dino" else "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"{run}: last.pt holds an encoder of other sizes, channels or pooling than asked for"
        ) from None


def compare(runs: list[Path], n_images: int) -> None:
    """Measure runs on the same test images, print them side by side, write compare.png into the first."""
    columns, pictures, source = {}, {}, None
    short = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    loaded = {run: load_run(run) for run in runs}
    for run, (config, checkpoint) in loaded.items():
        wanted = {"data": config.data, "img_size": config.img_size, "sample": config.sample}
        wanted |= {
            "findings": config.findings or ["all"] if config.task == "classify" else None,
            "task": config.task,
        }
        if config.data == "phantom":
            wanted |= {"seed": config.seed, "train_images": config.train_images}
        if source is None:
            source, first = wanted, config
            markers = {other.marker for other, _ in loaded.values()} - {None}
            if len(markers) > 1:
                raise ValueError(
                    f"the runs have markers of {sorted(markers)}: compare runs on the same images"
                )
            marker = markers.pop() if markers else None
            parts, sample, _ = load(**{k: v for k, v in wanted.items() if k != "task"}, marker=marker)
        differ = [name for name in source | wanted if source.get(name) != wanted.get(name)]
        if differ:
            raise ValueError(
                f"{runs[0]} and {run} differ in {', '.join(differ)}: compare runs on the same images"
            )
        model = load_model(run, config, checkpoint, parts["train"])
        if config.task == "classify":
            # By the first run's rule, so that heatmaps can be compared.
            config.lrp_epsilon, config.lrp_gamma = first.lrp_epsilon, first.lrp_gamma
            table, shown, maps = measure_classifier(config, model, parts, n_images)
        else:
            table, maps = measure(config, model, parts, sample)
            shown = select(parts["test"], parts["test"].has_masks)
        columns |= {f"{short[run]}: {what}": row for what, row in table.items()}
        pictures |= {f"{short[run]}\n{title}": m[:n_images] for title, m in maps.items()}
    print_table(columns, mean=first.task == "pretrain")
    path = runs[0] / "compare.png"
    images, masks = shown.images[:n_images].float() / 255, shown.masks
    masks = masks if masks is None else masks[:n_images]
    map_grid(path, images, masks, shown.regions, pictures, signed=first.task == "classify")
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for a folder that is no run."""
    parser = argparse.ArgumentParser(
        description="Measure runs of train.py side by side, and draw where they look.",
        epilog="example: python evaluate.py runs/span runs/dino",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--images", type=int, default=6, help="test images in the picture (default: 6)")
    args = parser.parse_args(argv)
    try:
        if args.images < 1:
            raise ValueError(f"--images {args.images}: draw at least 1")
        compare(args.runs, args.images)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
