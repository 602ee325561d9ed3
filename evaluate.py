"""What comes out: runs of `train.py`, or published weights, measured side by side, and where they look.

`measure.py` says what is measured. Figures join each run's metrics.json; tables go to the terminal, pictures
and, with --html, a page for the browser (`page.py`) to the first run's folder. Next to read: `metrics.py`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import build_encoder, check_data, load_model, load_run, start_from, write_whole
from common.models import attention_of, decisions, explained_class, pools_evenly, relevance_of, rule
from common.data import DRAWN, load
from common.config import check_device, dashed, parse
from common.folder import Data, DataError, select
from common.look import look
from common.regions import export_masks
from common.measure import MEASURES, QUICK, Report, report, scores_in
from common.page import Looks, page, print_tables
from common.plots import curves, low_data, map_grid
from common.pretrain import measured_priors
from vit import ViT
from common.weights import exported

ROWS = 6  # images in compare.png
IN_PAGE = 60  # images in --html's page
EXAMPLES = """examples:
  python evaluate.py runs/span runs/dino --only attention linear --html
  python evaluate.py runs/span --image a.jpg b.png
  python evaluate.py dino_deitsmall16_pretrain.pth --data my_folder --img-size 224"""


def shown_images(config: argparse.Namespace, parts: dict[str, Data], n: int) -> Data:
    """The n test images in a picture, of a classifier two thirds with the first finding; those with masks."""
    test = parts["test"] if parts["test"].names else parts["train"]
    test = select(test, test.has_masks) if test.has_masks.any() else test
    n = min(n, len(test.names))
    if config.task == "pretrain" or test.labels is None:
        return select(test, torch.arange(n))
    finding = test.labels[:, int(config.one_class and test.labels.shape[1] == 2)].nan_to_num()
    order = torch.argsort(finding, descending=True, stable=True)
    return select(test, torch.cat([order[: n - n // 3], order[len(order) - n // 3 :]]))


def maps_of(
    config: argparse.Namespace, model: nn.Module, images: Tensor, heads: dict[str, int]
) -> dict[str, Tensor]:
    """What a run looks at in images (M, C, S, S) uint8, {title: (M, h, w)}: a classifier's heatmaps in units
    of their mean size, or the attention of heads {region: number}, of all if none is named.
    """
    if config.task != "classify":
        return heads_of(config, model, images, heads, every=not heads)
    R = relevance_of(model, images, config.one_class, rule(config)).sum(dim=1)
    return {"relevance": R / R.abs().mean(dim=(1, 2), keepdim=True).clamp_min(1e-30)}


def heads_of(
    config: argparse.Namespace, encoder: nn.Module, images: Tensor, heads: dict[str, int], every: bool
) -> dict[str, Tensor]:
    """The attention of heads {region: number}, and perhaps of every other, {title: (M, h, w)}."""
    attention = attention_of(encoder, images, config.span_layer).unflatten(2, encoder.grid(images))
    titles = {f"head {h}\n{region}": h for region, h in heads.items()}
    if every:
        titles |= {f"head {h}": h for h in range(attention.shape[1]) if h not in heads.values()}
    return {title: attention[:, h] for title, h in titles.items()}


def looks_of(
    loaded: dict[str, tuple[argparse.Namespace, nn.Module]],
    parts: dict[str, Data],
    reports: dict[str, Report],
) -> tuple[Data, str, dict[str, Looks]]:
    """What runs {name: (settings, model)} see in test images: the first, and those that each is worst at.

    Returns the images, words that say which they are, and {name: Looks}.
    """
    part = "test" if parts["test"].names else "train"
    data = select(parts[part], parts[part].has_masks) if parts[part].has_masks.any() else parts[part]
    scores = {}
    for run, (config, model) in loaded.items():
        multiclass = config.one_class if config.task == "classify" else None
        scores[run] = scores_in(model, data, reports[run].heads, multiclass, config.span_layer)
    each = IN_PAGE // (len(loaded) + 1)
    index = set(range(len(data.names) if len(data.names) <= IN_PAGE else each))
    for _, values in scores.values():
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        index |= set(sorted(known, key=values.__getitem__)[:each])
    index = sorted(index)
    config, _ = next(iter(loaded.values()))
    which = f"{config.data} at {config.img_size} px: {len(index)} of {len(data.names)} {part} images"
    which += " with masks" if data.has_masks.any() else ""
    if len(index) < len(data.names):
        which += f", the first {each} and those that each model is worst at"
    shown, looks = select(data, torch.tensor(index)), {}
    for run, (config, model) in loaded.items():
        encoder, said, (name, values) = model, [], scores[run]
        values = [values[i] for i in index]
        if config.task == "classify":
            encoder, said = model.encoder, decisions(model, shown.images, config.one_class, config.classes)
            maps = maps_of(config, model, shown.images, {})
            looks[run] = Looks(maps, explained_class(config.classes, config.one_class), said, name, values)
        if config.task != "classify" or not (pools_evenly(encoder) or config.baseline == "pipeline"):
            maps = heads_of(config, encoder, shown.images, reports[run].heads, every=True)
            looks[f"{run}, attention" if run in looks else run] = Looks(maps, "", said, name, values)
    return shown, which, looks


def settings_for(weights: Path, data: list[str]) -> argparse.Namespace:
    """Those of the encoder in a file of weights, to be measured on `data`, flags of train.py."""
    config = parse([*data, "--init", str(weights), "--prior", "none"])[0]
    config.out = weights.with_name(f"{weights.name}-{Path(config.data).name}")  # figures of one data set
    return config


def wanted_by(config: argparse.Namespace) -> dict:
    """The data that a run is measured on, as arguments of `load`."""
    findings = config.findings or ["all"] if config.task == "classify" else None
    wanted = {"data": config.data, "img_size": config.img_size, "sample": config.sample, "findings": findings}
    drawn = {"seed": config.seed, "train_images": config.train_images} if config.data in DRAWN else {}
    return wanted | drawn


def load_all(
    runs: list[Path], data: list[str], device: str = "cpu"
) -> tuple[dict, dict[str, Data], str | None]:
    """{run: (settings, model, history)}, the data that all of them share, and its labelled sample.

    data: train.py's flags for files of weights; the data of a run beside them are added. Raises ValueError
    if data are not shared.
    """
    loaded = {run: load_run(run) for run in runs if not run.is_file()}
    configs = {run: config for run, (config, _) in loaded.items()}
    if configs:
        shared = wanted_by(next(iter(configs.values()))) | {"findings": None}
        pairs = ((f"--{k.replace('_', '-')}", str(v)) for k, v in shared.items() if v is not None)
        data = [word for pair in pairs for word in pair] + data
    configs = {run: configs[run] if run in configs else settings_for(run, data) for run in runs}
    markers = {
        (config.marker, config.marker_kind) for config in configs.values() if config.marker is not None
    }
    if len(markers) > 1:
        both = " and ".join(f"{kind} {share:g}" for share, kind in sorted(markers))
        raise ValueError(f"the runs have markers of {both}: compare runs on the same images")
    first = configs[runs[0]]
    for run, config in configs.items():
        here, there = ({"task": c.task, **wanted_by(c)} for c in (first, config))
        differ = [name for name in here | there if here.get(name) != there.get(name)]
        if differ:
            raise ValueError(
                f"{runs[0]} and {run} differ in {', '.join(differ)}: compare runs on the same images"
            )
    marker = dict(zip(("marker", "marker_kind"), markers.pop())) if markers else {}
    parts, sample, _ = load(**wanted_by(first), **marker)
    train, found = parts["train"], {}
    for run, config in configs.items():
        if run in loaded:
            check_data(run, config, train)
            found[run] = config, load_model(run, *loaded[run]).to(device), loaded[run][1]["history"]
        else:
            model = build_encoder(config, train.images.shape[1])
            start_from(run, model)
            found[run] = config, model.to(device), []
    return found, parts, sample


def compare(args: argparse.Namespace) -> None:
    """Measure runs on the same test images, print them side by side, draw them into the first's folder."""
    runs = args.runs
    loaded, parts, sample = load_all(runs, args.data, args.device)
    home = {run: config.out if run.is_file() else run for run, (config, *_) in loaded.items()}
    out = home[runs[0]]
    first, *_ = loaded[runs[0]]
    print(f"{first.data}: {len(parts['test'].names)} test images of {first.img_size} px")
    short = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    shown, reports, maps, registered = shown_images(first, parts, args.rows), {}, {}, {}
    for run, (config, model, _) in loaded.items():
        asked_for = args.only, args.fractions, registered
        found = reports[short[run]] = measured(config, model, parts, sample, *asked_for)
        path = home[run] / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() and run.is_dir() else {}  # of files: other data
        if config.marker is None and "removed" in parts:
            found.notes.append("its figures are not kept: it was trained without the marker that others have")
        else:  # NaN is no JSON
            write_whole(path, old | {k: v for k, v in found.metrics.items() if math.isfinite(v)})
        config.lrp_epsilon, config.lrp_gamma = first.lrp_epsilon, first.lrp_gamma  # heatmaps by one rule
        seen = maps_of(config, model, shown.images, found.heads)
        maps |= {f"{short[run]}\n{title}": m for title, m in seen.items()}
    print_tables(reports)
    draw(out / "compare.png", shown, maps, first.task)
    written, pictures = ["compare.png"], {}
    if any(len(curve) > 1 for found in reports.values() for curve in found.curves.values()):
        low_data(out / "low_data.png", {run: found.curves for run, found in reports.items()})
        pictures["Scores over label fractions"] = out / "low_data.png"
    histories = {short[run]: history for run, (_, _, history) in loaded.items() if history}
    if len(histories) > 1 or histories and args.html:
        curves(out / "compare_curves.png", histories)
        pictures["Training curves"] = out / "compare_curves.png"
    written += [path.name for path in pictures.values()]
    if args.html:
        models = {short[run]: (config, model) for run, (config, model, _) in loaded.items()}
        seen = looks_of(models, parts, reports)
        write_whole(out / "report.html", page(reports, *seen, pictures))
        written.append("report.html")
    print(f"wrote {out}/{', '.join(written)}")


def measured(
    config: argparse.Namespace,
    model: nn.Module,
    parts: dict[str, Data],
    sample: str | None,
    measures: list[str],
    fractions: list[float] = (1.0,),
    registered: dict | None = None,
) -> Report:
    """`report` of a run, by its settings; registered: priors over test images, kept for other runs."""
    classifies = config.task == "classify"
    return report(
        model,
        parts,
        measures,
        tuple(fractions),
        multiclass=config.one_class if classifies else None,
        rule=rule(config) if classifies else None,
        layer=config.span_layer,
        guided=not classifies and config.prior in ("sample", "masks"),
        priors=measured_priors(config, parts, sample, model, {} if registered is None else registered),
    )


def draw(path: Path, shown: Data, maps: dict[str, Tensor], task: str) -> None:
    """The picture of maps {title: (M, h, w)} over images."""
    masks = shown.masks if shown.has_masks.any() else None
    map_grid(path, shown.images.float() / 255, masks, shown.regions, maps, signed=task == "classify")


def write_weights(run: Path, path: Path) -> None:
    """Write the ViT of a run for timm and DINO's code. Raises ValueError rather than overwrite something."""
    if path.exists() or path.suffix not in (".pth", ".pt") or not path.parent.is_dir():
        wrong = "it exists already" if path.exists() else "name a .pth file in a folder that exists"
        raise ValueError(f"--export {path}: {wrong}")
    if run.is_file():
        raise ValueError(f"--export: {run} is a file of weights already; name a run of train.py")
    config, checkpoint = load_run(run)
    model = load_model(run, config, checkpoint)
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, ViT) or hasattr(model, "segmenter"):
        raise ValueError(f"--export: {run} holds no ViT that stands alone")
    write_whole(path, exported(encoder))
    sizes = f"img_size={config.img_size}, patch_size={config.patch_size}, in_chans={config.channels}, "
    sizes += f"embed_dim={config.embed_dim}, depth={config.depth}, num_heads={config.num_heads}"
    expected = "(x - 0.5) / 0.25" if config.channels == 1 else "ImageNet's mean and deviation"
    print(f"wrote {path}: a ViT of {sizes}, for images with {expected}")


def draw_pictures(run: Path, flags: list[str], paths: list[Path], device: str) -> None:
    """Draw what a run, or a file of weights, sees in pictures; those that can't be read are left out.

    Raises ValueError in the end if there were such.
    """
    if run.is_file():
        config, out = settings_for(run, flags), run.with_name(f"{run.name}-looks")
        model = build_encoder(config, in_chans=3)
        start_from(run, model)
    else:
        config, checkpoint = load_run(run)
        model, out = load_model(run, config, checkpoint), run / "looks"
    failed, folders = [], set()
    for path in paths:
        name = path.name if path.name not in folders else f"{len(folders)}_{path.name}"  # a/1.png and b/1.png
        folders.add(name)
        try:
            written = look(run, config, model.to(device), path, out / name)
        except DataError as error:
            failed.append(str(error))
            continue
        nothing = "nothing to draw: it averages all patches alike"
        print(f"{path}: {f'{len(written)} file(s) in {out / name}' if written else nothing}")
    if failed:
        raise ValueError("; ".join(failed))


def asked(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with `data`, flags of train.py for the runs that are files of weights."""
    parser = argparse.ArgumentParser(
        description="Measure runs of train.py side by side, and draw where they look.",
        usage="python evaluate.py RUN [RUN ...] [flags below]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "a folder that train.py wrote, or a file of a ViT's published weights"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
    what = "auto (default: cuda if there is one, else cpu), cpu, cuda, mps"
    parser.add_argument("--device", default="auto", help=what)
    add = parser.add_argument_group("what is measured and shown").add_argument
    what = f"of {', '.join(MEASURES)} (default: {' '.join(QUICK)}); measure.py and probe.py say what they are"
    add("--only", nargs="+", choices=MEASURES, default=QUICK, metavar="MEASURE", help=what)
    what = "of the labels, for probes, such as 0.01 0.05 0.1 0.25 1 (default: 1, all)"
    add("--fractions", nargs="+", type=float, default=[1.0], metavar="F", help=what)
    add("--rows", type=int, default=ROWS, help=f"test images in compare.png (default: {ROWS})")
    what = "write report.html, too: figures, and images to move through in a browser"
    add("--html", action="store_true", help=what)
    add = parser.add_argument_group("in place of that, of one run").add_argument
    what = "draw what it sees in these pictures, of any size, into its folder"
    add("--image", nargs="+", type=Path, metavar="FILE", help=what)
    what = "write the masks that its guided heads make into a new folder"
    add("--export-masks", type=Path, metavar="DIR", help=what)
    add("--export", type=Path, metavar="FILE", help="write its ViT for timm and DINO's code")
    add = parser.add_argument_group("of files of weights").add_argument
    what = "what to measure them on: as for train.py (default: phantom, or that of the runs beside them)"
    add("--data", dest="of_data", metavar="DATA", help=what)
    add("--img-size", type=int, help="pixels a side (default: theirs, or that of the runs beside them)")
    add("--num-heads", type=int, help="where their width does not tell")
    args = parser.parse_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])
    typed = {"--data": args.of_data, "--img-size": args.img_size, "--num-heads": args.num_heads}
    args.data = [word for flag, v in typed.items() if v is not None for word in (flag, str(v))]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what can't be done."""
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: draw at least 1")
    if not all(0 < fraction <= 1 for fraction in args.fractions):
        raise ValueError("--fractions: they must lie between 0 and 1")
    for run in args.runs:
        if not run.exists():
            raise ValueError(f"{run}: no such file or folder")
    if args.data and not any(run.is_file() for run in args.runs):
        raise ValueError(f"{args.data[0]} is for files of weights; runs are measured on their own data")
    others = {"--export": args.export, "--export-masks": args.export_masks, "--image": args.image}
    others = [flag for flag, value in others.items() if value]
    measuring = args.html or args.only != QUICK or args.rows != ROWS
    if len(others) > 1 or others and (measuring or len(args.runs) > 1):
        raise ValueError(
            f"{others[0]} is done alone, for one run: leave out other runs and what else is asked"
        )
    check_device(args.device)


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for what can't be read or measured."""
    args = asked(argv)
    try:
        check(args)
        first = args.runs[0]
        if args.export:
            write_weights(first, args.export)
        elif args.export_masks:
            loaded, parts, _ = load_all([first], args.data, args.device)
            config, model, _ = loaded[first]
            written = export_masks(first, config, model, parts, args.export_masks)
            print(f"wrote {written} masks into {args.export_masks}")
        elif args.image:
            draw_pictures(first, args.data, args.image, args.device)
        else:
            compare(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(f"evaluate.py: {args.device} has not enough memory: add --device cpu", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; nothing of the run that was being measured is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
