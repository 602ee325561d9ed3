"""Measure runs of train.py, or published weights, side by side on test images, and draw where they look.

    python evaluate.py runs/span runs/dino                  attention, k-NN, linear layers: tables, a picture
    python evaluate.py runs/span runs/dino --all --html     also few labels, fine-tuning; a page to browse
    python evaluate.py runs/span --image a.jpg b.png        its maps over other images
    python evaluate.py dino_deitsmall16_pretrain.pth --data my_folder --img-size 224

`common/measure.py` says what is measured. Metrics are added to metrics.json of finished runs. Pictures go to
the first run's folder and replace older ones.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from common.baselines import Pipeline
from common.checkpoint import DataSpec, load_run, write_file
from common.explain import decisions, explained_class, has_attention
from common.flags import Parser
from common.measure import MEASURES, QUICK, report
from common.models import build_encoder, load_model, lrp_rule, start_from
from common.page import page, print_tables
from common.pictures import read_picture
from common.plots import curves, draw_maps, low_data, map_grid
from common.probe import FRACTIONS
from common.processes import check_device, fail, keep_freed_memory, remedy_for
from common.regions import attention_masks, check_masses, export_masks, write_mask
from common.runs import Loaded, heads_of, images_to_show, load_all, looks_of, maps_of, measured_by
from common.runs import weights_config
from common.weights import FIRST, exported, read_weights
from resnet import ResNet
from vit import ViT

MASS = 0.6  # share of attention that the masks of unguided heads hold, as in DINO's figures


def read_metrics(out: Path) -> dict[str, float]:
    """The metrics in a folder, {} if there are none yet. Raises ValueError for a damaged file."""
    path = out / "metrics.json"
    try:
        return {k: float(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else {}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: remove it and measure again") from None


def compare(args: argparse.Namespace) -> None:
    """Measure runs on the same test images, print tables, and draw maps in the first run's folder."""
    loaded, splits, reference = load_all(args.runs, args.flags, args.device)
    alike = len({path.name for path in loaded}) < len(loaded)
    runs = {str(path) if alike else path.name: run for path, run in loaded.items()}
    before = {name: read_metrics(run.out) for name, run in runs.items()}
    first, *_ = runs.values()
    n = len(splits["test"].names)
    print(f"{first.config.data}: {n} test images of {first.config.img_size} px", flush=True)
    shown = images_to_show(first.config, splits, args.rows)
    fractions = FRACTIONS if args.all else (1.0,)
    reports, maps, registered = {}, {}, {}
    for name, run in runs.items():
        settings = measured_by(run, splits, reference, registered)
        found = reports[name] = report(run.model, splits, args.measures, fractions, **settings)
        run.out.mkdir(parents=True, exist_ok=True)
        if (run.out / "last.pt").exists() and len(run.history) < run.config.epochs:  # no file of weights
            stopped = f"it stopped after {len(run.history)} of {run.config.epochs} epochs"
            found.notes.append(f"{stopped}, so metrics.json is not written until --resume finishes it")
        elif run.config.marker is None and "flipped" in splits:
            found.notes.append("metrics.json is unchanged: unlike others, this run had no marker in training")
        else:  # JSON has no NaN
            finite = {k: v for k, v in (before[name] | found.metrics).items() if math.isfinite(v)}
            write_file(run.out / "metrics.json", finite)
        seen = maps_of(run, shown.images, found.heads, lrp_rule(first.config))  # one rule for all runs
        maps |= {f"{name}\n{title}": m for title, m in seen.items()}
    print_tables(reports)
    draw_maps(first.out / "compare.png", shown, maps, signed=first.config.task == "classify")
    pictures, scores = {}, {name: found.curves for name, found in reports.items()}
    if any(len(curve) > 1 for probes in scores.values() for curve in probes.values()):
        pictures["Scores over the fraction of labels"] = low_data(first.out / "low_data.png", scores)
    histories = {name: run.history for name, run in runs.items() if run.history}
    if len(histories) > 1 or histories and args.html:
        pictures["Training curves"] = curves(first.out / "compare_curves.png", histories)
    written = ["compare.png", *(path.name for path in pictures.values())]
    if args.html:
        write_file(first.out / "report.html", page(reports, *looks_of(runs, splits, reports), pictures))
        written.append("report.html")
    print(f"wrote {first.out}/{', '.join(written)}")


def draw_pictures(run: Path, flags: list[str], paths: list[Path], device: str) -> None:
    """Draw what a run sees in pictures of any size. Raises ValueError for one that can't be read."""
    if run.is_file():
        channels = 1 if read_weights(run)[0][FIRST].shape[1] == 1 else 3
        config, spec = weights_config(run, flags), DataSpec(channels, (), False, "")
        model = start_from(run, build_encoder(config, channels))
        out, masses = run.with_name(f"{run.name}-looks"), {}
    else:
        config, spec, masses, _ = found = load_run(run)
        if masses:
            check_masses(run, masses)
        model, out = load_model(run, found), run / "looks"
    loaded = Loaded(config, spec, model.to(device), [], run, masses)
    alike = len({path.stem for path in paths}) < len(paths)  # a/1.png and b/1.png
    for i, path in enumerate(paths, 1):
        name = f"{i}_{path.stem}" if alike else path.stem
        written = draw_picture(loaded, path, out / name)
        print(f"{path}: {written} file(s) in {out / name}" if written else f"{path}: no attention map")


@torch.no_grad()
def draw_picture(run: Loaded, path: Path, out: Path) -> int:
    """Draw the heads' attention, their masks at the picture's size, and a classifier's heatmap into `out`.

    Masks: equation (1), `common/regions.py`. The picture keeps its aspect ratio; its shorter side becomes the
    run's --img-size. Returns how many files were written. Raises DataError.
    """
    config, spec, model, *_ = run
    encoder = model.encoder if config.task == "classify" else model
    multiple = encoder.stride if isinstance(encoder, ResNet) else config.patch_size
    image, size = read_picture(path, config.img_size, multiple, spec.channels)  # (1, C, H, W)
    pixels, written = image.float() / 255, 0
    if has_attention(encoder, config.baseline):
        heads = {region: head for head, region in enumerate(run.masses)}
        maps = heads_of(encoder, config.span_layer, image, heads, others=True)  # each (1, h, w)
        masses = run.masses or dict.fromkeys(maps, MASS)
        masks = attention_masks(encoder, masses, image, config.span_layer)  # (1, R, H, W)
        for name, mask in zip(masses, masks[0]):
            write_mask(out / "masks" / f"{name}.png", mask, size)
        map_grid(out / "attention.png", pixels, masks, list(masses), maps, outlined="masks", side=2.4)
        written += 1 + len(masses)
    if config.task == "classify":
        out.mkdir(parents=True, exist_ok=True)
        (chances,) = decisions(model, image, spec.multiclass, spec.classes)
        title = "\n".join([f"relevance for {explained_class(spec.classes, spec.multiclass)}", *chances])
        (relevance,) = maps_of(run, image, {}, lrp_rule(config)).values()  # (1, H, W)
        map_grid(out / "relevance.png", pixels, None, [], {title: relevance}, signed=True, side=2.4)
        written += 1
    return written


def write_weights(run: Path, path: Path) -> None:
    """Write the ViT of a run for timm and DINO's code. Raises ValueError rather than overwrite a file."""
    if path.exists():
        raise ValueError(f"--export {path}: it exists already")
    if path.suffix not in (".pth", ".pt") or not path.parent.is_dir():
        raise ValueError(f"--export {path}: name a .pth file in a folder that exists")
    found = load_run(run)
    model, c = load_model(run, found), found.config
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, ViT) or isinstance(model, Pipeline):
        raise ValueError(f"--export: {run} is not a single ViT; --export writes ViTs only")
    write_file(path, exported(encoder))
    sizes = f"img_size={c.img_size}, patch_size={c.patch_size}, in_chans={found.spec.channels}, "
    sizes += f"embed_dim={c.embed_dim}, depth={c.depth}, num_heads={c.num_heads}"
    expected = "(x - 0.5) / 0.25" if found.spec.channels == 1 else "ImageNet's mean and deviation"
    print(f"wrote {path}: a ViT of {sizes}, for images with {expected}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; `flags` are those of train.py for files of weights. Raises ValueError."""
    intro, examples = __doc__.split("\n\n")[:2]
    about = "python evaluate.py RUN [RUN ...] [flags below]", intro, f"examples:\n{examples}"
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("evaluate.py", *about, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run of train.py, or a file of a ViT's weights")
    devices = "auto (default: cuda if there is one, else cpu), cpu, cuda, mps (untried)"
    add("--device", default="auto", help=devices)
    add = parser.add_argument_group("what is measured and shown").add_argument
    what = f"some of {', '.join(MEASURES)} (default: {', '.join(QUICK)})"
    add("--only", dest="measures", nargs="+", choices=MEASURES, metavar="MEASURE", help=what)
    what = "all measures; probes also with 1 to 25 %% of the labels: minutes per run"
    add("--all", action="store_true", help=what)
    add("--rows", type=int, help="test images in compare.png (default: 6)")
    add("--html", action="store_true", help="also write report.html, with metrics and images to browse")
    group = parser.add_argument_group("for one run, instead of measuring (one of these)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--image", nargs="+", type=Path, metavar="FILE", help="draw its maps over images of any size")
    add("--export-masks", type=Path, metavar="DIR", help="write its guided heads' masks into a new folder")
    add("--export", type=Path, metavar="FILE", help="write its ViT for timm and DINO's code")
    add = parser.add_argument_group("for files of weights").add_argument
    add("--data", help="data to measure them on (default: phantom); for a run: new path of its data")
    add("--img-size", type=int, help="pixels a side (default: that of the weights, or of the runs)")
    add("--num-heads", type=int, help="attention heads; needed if no known release has this width")
    args = parser.parse_args(argv)
    typed = {"--data": args.data, "--img-size": args.img_size, "--num-heads": args.num_heads}
    args.flags = [word for flag, v in typed.items() if v is not None for word in (flag, str(v))]
    alone = args.export or args.export_masks or args.image
    others = args.html or args.measures or args.rows or args.all or len(args.runs) > 1
    missing = ", ".join(str(path) for path in [*args.runs, *(args.image or [])] if not path.exists())
    files = any(run.is_file() for run in args.runs)
    flags = "" if files else " ".join(args.flags[2 if args.data else 0 :])  # all but --data
    for wrong, line in [
        (alone and others, "--image and --export take one run alone, without flags of what is measured"),
        (args.data and not files and (args.image or args.export), "--image and --export use no --data"),
        (missing, f"{missing}: no such file or folder"),
        (flags, f"{flags} is for files of weights; runs are measured on their own data"),
        (args.rows is not None and args.rows < 1, f"--rows {args.rows}: draw at least 1"),
    ]:
        if wrong:
            raise ValueError(line)
    args.rows, args.measures = args.rows or 6, args.measures or (MEASURES if args.all else QUICK)
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    check_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 if done, 2 for unreadable or unsuitable input."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        keep_freed_memory()
        first = args.runs[0]
        if args.export:
            write_weights(first, args.export)
        elif args.export_masks:
            loaded, splits, _ = load_all([first], args.flags, args.device)
            run, out = loaded[first], args.export_masks
            check_masses(first, run.masses)
            n = export_masks(out, run.config.data, run.model, run.masses, splits, run.config.span_layer)
            print(f"wrote {n} masks into {out}")
        elif args.image:
            draw_pictures(first, args.flags, args.image, args.device)
        else:
            compare(args)
    except (ValueError, OSError) as error:
        fail("evaluate.py", error, 2)
    except (RuntimeError, MemoryError) as error:
        remedy = "end other programs" + ("" if args.device == "cpu" else ", or add --device cpu")
        fail("evaluate.py", remedy_for(error, remedy), 1)
    except KeyboardInterrupt:
        print("\nstopped; metrics of the current run are not saved")
        sys.exit(130)


if __name__ == "__main__":
    main()
