"""What comes out: runs of `train.py`, measured side by side on test images that no choice was made on.

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

Figures join each run's metrics.json; pictures go to the first run's folder. Next to read: `metrics.py`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from attention_priors import follow
from checkpoint import build_encoder, load_model, load_run, start_from, write_whole
from classify import exclusive, relevance_of, scores_of
from data import BATCH, DRAWN, Data, load, select
from flags import parse
from look import look
from masks import export_masks
from metrics import CannotMeasure, auc, best_threshold, dice, known_mean, localisation_ap, relevance_share
from page import Looks, Report, page, print_tables
from plots import curves, low_data, map_grid
from pretrain import attention_of, lay_over, make_priors
from probe import PROBES, SHARES, drawn, probe
from resnet import ResNet
from vit import ViT
from weights import exported

MEASURES = ["attention", "bias", *PROBES]
IN_PAGE = 60  # images in --html's page
EXAMPLES = """examples:
  python evaluate.py runs/span runs/dino --only attention linear --html
  python evaluate.py runs/span --image a.jpg b.png
  python evaluate.py dino_deitsmall16_pretrain.pth --data my_folder --img-size 224"""


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
    one_class, table = exclusive(parts["train"].labels), {}
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
            R = relevance_of(config, model, seen.images, one_class)
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
                table = found.tables["in %"] = measure_classifier(config, model, parts)
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


def shown_images(config: argparse.Namespace, parts: dict[str, Data], n: int) -> Data:
    """The n test images in a picture, of a classifier two thirds with the first finding; those with masks."""
    test = parts["test"] if parts["test"].names else parts["train"]
    test = select(test, test.has_masks) if test.has_masks.any() else test
    n = min(n, len(test.names))
    if config.task == "pretrain" or test.labels is None:
        return select(test, torch.arange(n))
    finding = test.labels[:, first_finding(parts)].nan_to_num()
    order = torch.argsort(finding, descending=True, stable=True)
    return select(test, torch.cat([order[: n - n // 3], order[len(order) - n // 3 :]]))


def maps_of(
    config: argparse.Namespace,
    model: nn.Module,
    images: Tensor,
    heads: dict[str, int],
    one_class: bool,
) -> dict[str, Tensor]:
    """What a run looks at in images (M, C, S, S) uint8, {title: (M, h, w)}: a classifier's heatmaps in units
    of their mean size, or the attention of heads {region: number}, of all if there are none.
    """
    if config.task == "classify":
        R = relevance_of(config, model, images, one_class).sum(dim=1)
        return {"relevance": R / R.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)}
    attention = attention_of(model, images, config.span_layer).unflatten(2, model.grid(images))
    titles = {f"head {h}\n{region}": h for region, h in heads.items()}
    titles = titles or {f"head {h}": h for h in range(attention.shape[1])}
    return {title: attention[:, h] for title, h in titles.items()}


def scores_in(
    config: argparse.Namespace, model: nn.Module, data: Data, heads: dict[str, int], one_class: bool
) -> tuple[str, list[float]]:
    """How well a run does on each image (M,), and what is meant by that: a classifier's probability of what
    is true, or the mean AP of heads {region: number} where there are masks. NaN where it can't be said.
    """
    if config.task == "classify" and data.labels is not None:
        chances, y = scores_of(model, data.images, one_class).sigmoid(), data.labels  # (M, K)
        if one_class:
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


def looks_of(
    loaded: dict[str, tuple[argparse.Namespace, nn.Module]],
    parts: dict[str, Data],
    reports: dict[str, Report],
    one_class: bool,
) -> tuple[Data, str, dict[str, Looks]]:
    """What runs {name: (settings, model)} see in test images: the first, and those that each is worst at.

    Returns the images, words that say which they are, and {name: Looks}.
    """
    part = "test" if parts["test"].names else "train"
    data = select(parts[part], parts[part].has_masks) if parts[part].has_masks.any() else parts[part]
    scores = {run: scores_in(*of, data, reports[run].heads, one_class) for run, of in loaded.items()}
    each = IN_PAGE // (len(loaded) + 1)
    index = set(range(len(data.names) if len(data.names) <= IN_PAGE else each))
    for _, values in scores.values():
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        index |= set(sorted(known, key=values.__getitem__)[:each])
    index = sorted(index)
    which = f"{len(index)} of {len(data.names)} {part} images{' with masks' if data.has_masks.any() else ''}"
    if len(index) < len(data.names):
        which += f", the first {each} and those that each model is worst at"
    shown, looks, findings = select(data, torch.tensor(index)), {}, parts["train"].findings
    for run, (config, model) in loaded.items():
        maps = maps_of(config, model, shown.images, reports[run].heads, one_class)
        of, (name, values) = "", scores[run]
        if config.task == "classify":
            several = one_class and len(findings) > 2
            of = "the likeliest class" if several else findings[first_finding(parts)]
        looks[run] = Looks(maps, of, name, [values[i] for i in index])
    return shown, which, looks


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


def load_any(run: Path, data: list[str]) -> tuple[argparse.Namespace, dict | None]:
    """A run's settings and its checkpoint; of a file of weights, those of its encoder on `data`, and None."""
    if not run.is_file():
        return load_run(run)
    out = run.with_suffix("")
    if (out / "config.json").exists():
        raise ValueError(f"what is found of {run} would go into {out}, which holds a run: move the file")
    return parse([*data, "--init", str(run), "--prior", "none", "--out", str(out)])[0], None


def load_all(runs: list[Path], data: list[str]) -> tuple[dict, dict[str, Data], str | None]:
    """{run: (settings, model, history)}, the data that all of them share, and its labelled sample.

    data: flags of train.py for the runs that are files of weights. Raises ValueError if data are not shared.
    """
    loaded, source, found = {run: load_any(run, data) for run in runs}, None, {}
    for run, (config, checkpoint) in loaded.items():
        wanted = {"data": config.data, "img_size": config.img_size, "sample": config.sample}
        wanted |= {
            "findings": config.findings or ["all"] if config.task == "classify" else None,
            "task": config.task,
        }
        if config.data in DRAWN:
            wanted |= {"seed": config.seed, "train_images": config.train_images}
        if source is None:
            source = wanted
            configs = [other for other, _ in loaded.values() if other.marker is not None]
            markers = {(other.marker, other.marker_kind) for other in configs}
            if len(markers) > 1:
                found = " and ".join(f"{kind} {share:g}" for share, kind in sorted(markers))
                raise ValueError(f"the runs have markers of {found}: compare runs on the same images")
            marker = dict(zip(("marker", "marker_kind"), markers.pop())) if markers else {}
            parts, sample, _ = load(**{k: v for k, v in wanted.items() if k != "task"}, **marker)
        differ = [name for name in source | wanted if source.get(name) != wanted.get(name)]
        if differ:
            raise ValueError(
                f"{runs[0]} and {run} differ in {', '.join(differ)}: compare runs on the same images"
            )
        if checkpoint is None:
            model = build_encoder(config, parts["train"].images.shape[1])
            start_from(run, model)
            found[run] = config, model, []
        else:
            found[run] = config, load_model(run, config, checkpoint, parts["train"]), checkpoint["history"]
    return found, parts, sample


def compare(runs: list[Path], data: list[str], only: list[str], n_images: int, as_page: bool) -> None:
    """Measure runs on the same test images, print them side by side, draw them into the first's folder."""
    loaded, parts, sample = load_all(runs, data)
    home = {run: config.out if run.is_file() else run for run, (config, *_) in loaded.items()}
    out = home[runs[0]]
    first, *_ = loaded[runs[0]]
    short = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    shown, reports, maps = shown_images(first, parts, n_images), {}, {}
    one_class = first.task == "classify" and exclusive(parts["train"].labels)
    for run, (config, model, _) in loaded.items():
        found = reports[short[run]] = report(config, model, parts, sample, only, SHARES)
        path = home[run] / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() else {}
        if config.marker is None and "removed" in parts:
            found.notes.append("its figures are not kept: it was trained without the marker that others have")
        else:  # NaN is no JSON
            write_whole(path, old | {k: v for k, v in found.figures.items() if math.isfinite(v)})
        config.lrp_epsilon, config.lrp_gamma = first.lrp_epsilon, first.lrp_gamma  # heatmaps by one rule
        seen = maps_of(config, model, shown.images, found.heads, one_class)
        maps |= {f"{short[run]}\n{title}": m for title, m in seen.items()}
    print_tables(reports)
    draw(out / "compare.png", shown, maps, first.task)
    written, pictures = ["compare.png"], {}
    if any(len(curve) > 1 for found in reports.values() for curve in found.curves.values()):
        low_data(out / "low_data.png", {run: found.curves for run, found in reports.items()})
        pictures["Scores over the share of labels"] = out / "low_data.png"
    histories = {short[run]: history for run, (_, _, history) in loaded.items() if history}
    if len(histories) > 1 or histories and as_page:
        curves(out / "compare_curves.png", histories)
        pictures["Training curves"] = out / "compare_curves.png"
    written += [path.name for path in pictures.values()]
    if as_page:
        models = {short[run]: (config, model) for run, (config, model, _) in loaded.items()}
        seen = looks_of(models, parts, reports, one_class)
        write_whole(out / "report.html", page(reports, *seen, pictures))
        written.append("report.html")
    print(f"wrote {out}/{', '.join(written)}")


def draw(path: Path, shown: Data, maps: dict[str, Tensor], task: str) -> None:
    """The picture of maps {title: (M, h, w)} over images."""
    masks = shown.masks if shown.has_masks.any() else None
    map_grid(path, shown.images.float() / 255, masks, shown.regions, maps, signed=task == "classify")


def write_weights(run: Path, data: list[str], path: Path) -> None:
    """Write the ViT of a run for timm and DINO's code. Raises ValueError rather than overwrite something."""
    if path.exists() or path.suffix not in (".pth", ".pt"):
        raise ValueError(f"--export {path}: {'it exists already' if path.exists() else 'name a .pth file'}")
    loaded, _, _ = load_all([run], data)
    _, model, _ = loaded[run]
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, ViT) or hasattr(model, "segmenter"):
        raise ValueError(f"--export: {run} holds no ViT that stands alone")
    write_whole(path, exported(encoder))
    print(f"wrote {path}")


def draw_pictures(run: Path, data: list[str], paths: list[Path]) -> None:
    """Draw what a run, or a file of weights, sees in pictures. Raises ValueError if one can't be read."""
    parts, sample = {}, None
    if run.is_file():  # needs no data
        config, _ = load_any(run, data)
        model, out = build_encoder(config, in_chans=3), config.out / "looks"
        start_from(run, model)
    else:
        loaded, parts, sample = load_all([run], data)
        (config, model, _), out = loaded[run], run / "looks"
    for path in paths:
        written = look(run, config, model, parts, sample, path, out)
        nothing = "nothing to draw: it averages all patches alike"
        print(f"{path}: {'wrote ' + ', '.join(map(str, written)) if written else nothing}")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for what can't be read or measured."""
    parser = argparse.ArgumentParser(
        description="Measure runs of train.py side by side, and draw where they look.",
        usage="python evaluate.py RUN [RUN ...] [flags below]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "a folder that train.py wrote, or a file of a ViT's published weights"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
    add = parser.add_argument_group("what is measured and shown").add_argument
    what = f"of {', '.join(MEASURES)} (default: all that apply)"
    add("--only", nargs="+", choices=MEASURES, default=MEASURES, metavar="MEASURE", help=what)
    add("--rows", type=int, default=6, help="test images in compare.png (default: 6)")
    what = "write report.html, too: figures, and images to move through in a browser"
    add("--html", action="store_true", help=what)
    add = parser.add_argument_group("in place of that, of the first run").add_argument
    what = "draw what it sees in these pictures, of any size, into its folder"
    add("--image", nargs="+", type=Path, metavar="FILE", help=what)
    what = "write the masks that its guided heads make into a new folder"
    add("--export-masks", type=Path, metavar="DIR", help=what)
    add("--export", type=Path, metavar="FILE", help="write its ViT for timm and DINO's code")
    add = parser.add_argument_group("of files of weights").add_argument
    add("--data", help="what to measure them on: as for train.py")
    add("--img-size", help="pixels a side (default: theirs)")
    add("--num-heads", help="where their width does not tell")
    args = parser.parse_args(argv)
    first, typed = args.runs[0], {k: getattr(args, k) for k in ("data", "img_size", "num_heads")}
    data = [word for k, v in typed.items() if v is not None for word in (f"--{k.replace('_', '-')}", v)]
    try:
        if args.rows < 1:
            raise ValueError(f"--rows {args.rows}: draw at least 1")
        if data and not any(run.is_file() for run in args.runs):
            raise ValueError(f"{data[0]} is for files of weights; runs are measured on their own data")
        if args.export:
            write_weights(first, data, args.export)
        elif args.export_masks:
            loaded, parts, sample = load_all([first], data)
            written = export_masks(first, parts, sample, loaded[first][0].data, args.export_masks)
            print(f"wrote {written} masks into {args.export_masks}")
        elif args.image:
            draw_pictures(first, data, args.image)
        else:
            compare(args.runs, data, args.only, args.rows, args.html)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; nothing of the run that was being measured is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
