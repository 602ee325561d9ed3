"""Measure runs of train.py, or published weights, side by side on test images, and draw where they look.

    python evaluate.py runs/span runs/dino                  attention, k-NN, linear layers: tables, a picture
    python evaluate.py runs/span runs/dino --all --html     also few labels, fine-tuning; a page to browse
    python evaluate.py runs/span --image a.jpg b.png        where it looks in any picture
    python evaluate.py dino_deitsmall16_pretrain.pth --data my_folder --img-size 224

`common/measure.py` says what is measured. Metrics join each run's metrics.json; pictures go to the first run's
folder.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import DataSpec, load_run, write_file
from common.checks import check_device
from common.config import Config, Parser
from common.data import Data, DataError, prepared, read_picture
from common.explain import attention_of, decisions, explained_class, pools_evenly, relevance_of
from common.measure import MEASURES, QUICK, report
from common.models import build_encoder, load_model, lrp_rule, start_from
from common.page import page, print_tables
from common.plots import curves, draw_maps, low_data, map_grid
from common.probe import FRACTIONS
from common.processes import fail
from common.regions import attention_masks, export_masks, read_masses, write_mask
from common.runs import images_to_show, load_all, looks_of, maps_of, measured_by, weights_config
from common.weights import exported
from resnet import ResNet
from vit import ViT

MASS = 0.6  # of the attention that unguided heads' masks hold, as in DINO's figures


def expected_seconds(model: nn.Module, splits: dict[str, Data], measures: list[str], few: bool) -> float:
    """About how long the measures take: images through the model at the speed of one batch, and fits."""
    x = prepared(splits["train"].images[:64].to(next(model.parameters()).device))
    with torch.no_grad():
        model.eval()(x)
        started = time.perf_counter()
        model(x)
    a_pass = (time.perf_counter() - started) / len(x)
    n, test = len(splits["train"].names), len(splits["test"].names)
    steps = max(100, 5 * n // 32) + (2500 if few else 0)  # of fine-tuning: 32 images, forward and backward
    passes = {"attention": 2 * test, "bias": 25 * test, "finetune": 32 * 3 * steps}
    fits = {"attention": 5, "linear": 20 if few else 2, "heads": 90 if few else 15}  # seconds
    return sum(a_pass * passes.get(m, n + test) + fits.get(m, 0) for m in measures)


def compare(args: argparse.Namespace) -> None:
    """Measure runs on the same test images, print them side by side, draw them into the first's folder."""
    loaded, splits, reference = load_all(args.runs, args.flags, args.device)
    (first, *_), test = loaded.values(), splits["test"]
    seconds = len(loaded) * expected_seconds(first.model, splits, args.measures, args.all)
    size = f"{len(test.names)} test images of {first.config.img_size} px"
    print(f"{first.config.data}: {size}; this takes about {seconds:.0f} s", flush=True)
    alike = len({path.name for path in loaded}) < len(loaded)
    shown, known = images_to_show(first.config, splits, args.rows), {}
    reports, maps, histories = {}, {}, {}
    fractions = FRACTIONS if args.all else (1.0,)
    for path, (config, spec, model, history, out) in loaded.items():
        name = str(path) if alike else path.name
        about = measured_by(config, spec, model, splits, reference, known)
        found = reports[name] = report(model, splits, args.measures, fractions, **about)
        out.mkdir(parents=True, exist_ok=True)
        old = json.loads((out / "metrics.json").read_text()) if (path / "metrics.json").exists() else {}
        if config.marker is None and "removed" in splits:
            found.notes.append(
                "its metrics are not kept: it was trained without the marker that the others have"
            )
        else:  # NaN is no JSON
            write_file(
                out / "metrics.json", old | {k: v for k, v in found.metrics.items() if math.isfinite(v)}
            )
        seen = maps_of(
            config, spec, model, shown.images, found.heads, lrp_rule(first.config)
        )  # one rule for all
        maps |= {f"{name}\n{title}": m for title, m in seen.items()}
        histories |= {name: history} if history else {}
    print_tables(reports)
    draw_maps(first.out / "compare.png", shown, maps, signed=first.config.task == "classify")
    written, pictures = ["compare.png"], {}
    if any(len(curve) > 1 for found in reports.values() for curve in found.curves.values()):
        low_data(first.out / "low_data.png", {run: found.curves for run, found in reports.items()})
        pictures["Scores over the fraction of labels"] = first.out / "low_data.png"
    if len(histories) > 1 or histories and args.html:
        curves(first.out / "compare_curves.png", histories)
        pictures["Training curves"] = first.out / "compare_curves.png"
    written += [path.name for path in pictures.values()]
    if args.html:
        seen = looks_of(dict(zip(reports, loaded.values())), splits, reports)
        write_file(first.out / "report.html", page(reports, *seen, pictures))
        written.append("report.html")
    print(f"wrote {first.out}/{', '.join(written)}")


def draw_pictures(run: Path, flags: list[str], paths: list[Path], device: str) -> None:
    """Draw what a run sees in pictures of any size. Raises ValueError, at the end, for unreadable ones."""
    if run.is_file():
        config, spec, out = (
            weights_config(run, flags),
            DataSpec(3, (), False, ""),
            run.with_name(f"{run.name}-looks"),
        )
        start_from(run, model := build_encoder(config, spec.channels))
    else:
        found = load_run(run)
        config, spec, model, out = found.config, found.spec, load_model(run, found), run / "looks"
    failed, folders = [], set()
    for path in paths:
        name = path.name if path.name not in folders else f"{len(folders)}_{path.name}"  # a/1.png and b/1.png
        folders.add(name)
        try:
            written = draw_picture(run, config, spec, model.to(device), path, out / name)
        except DataError as error:
            failed.append(str(error))
            continue
        print(f"{path}: {written} file(s) in {out / name}" if written else f"{path}: the pooling is even")
    if failed:
        raise ValueError("; ".join(failed))


@torch.no_grad()
def draw_picture(run: Path, config: Config, spec: DataSpec, model: nn.Module, path: Path, out: Path) -> int:
    """Draw every head's attention, its masks as large as the picture, and a classifier's heatmap into `out`.

    Masks are those of equation (7), `common/regions.py`. The picture keeps its aspect; its shorter side becomes
    the run's --img-size. Returns how many files were written. Raises DataError.
    """
    encoder = model.encoder if config.task == "classify" else model
    multiple = encoder.stride if isinstance(encoder, ResNet) else config.patch_size
    image, size = read_picture(path, config.img_size, multiple, spec.channels)  # (1, C, H, W)
    written = 0
    if (
        not pools_evenly(encoder) and config.baseline != "pipeline"
    ):  # which sees its own segmenter's foreground
        attention = attention_of(encoder, image, config.span_layer).unflatten(2, encoder.grid(image))
        heads = [f"head {h}" for h in range(attention.shape[1])]
        guided = (run / "attention_mass.json").exists()
        masses = read_masses(run) if guided else dict.fromkeys(heads, MASS)
        titles = [f"{head}\n{region}" for head, region in zip(heads, masses)] if guided else heads
        titles += heads[len(titles) :]
        masks = attention_masks(encoder, masses, image, config.span_layer)  # (1, R, H, W)
        for name, mask in zip(masses, masks[0]):
            write_mask(out / "masks" / f"{name}.png", mask, size)
        maps = dict(zip(titles, attention.unbind(1)))  # each (1, h, w)
        shown = image.float() / 255, masks, list(masses)
        map_grid(out / "attention.png", *shown, maps, outlined="masks", side=2.4)
        written += 1 + len(masses)
    if config.task == "classify":
        out.mkdir(parents=True, exist_ok=True)
        (said,) = decisions(model, image, spec.multiclass, spec.classes)
        title = "\n".join([f"relevance for {explained_class(spec.classes, spec.multiclass)}", *said])
        R = relevance_of(model, image, spec.multiclass, lrp_rule(config)).sum(dim=1)  # (1, H, W)
        maps = {title: R / R.abs().mean().clamp_min(1e-30)}
        map_grid(out / "relevance.png", image.float() / 255, None, [], maps, signed=True, side=2.4)
        written += 1
    return written


def write_weights(run: Path, path: Path) -> None:
    """Write the ViT of a run for timm and DINO's code. Raises ValueError rather than overwrite something."""
    if path.exists() or path.suffix not in (".pth", ".pt") or not path.parent.is_dir():
        wrong = "it exists already" if path.exists() else "name a .pth file in a folder that exists"
        raise ValueError(f"--export {path}: {wrong}")
    if run.is_file():
        raise ValueError(f"--export: {run} is a file of weights already; name a run of train.py")
    found = load_run(run)
    model, c = load_model(run, found), found.config
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, ViT) or hasattr(model, "segmenter"):
        raise ValueError(f"--export: {run} is no single ViT; --export writes ViTs only")
    write_file(path, exported(encoder))
    sizes = f"img_size={c.img_size}, patch_size={c.patch_size}, in_chans={found.spec.channels}, "
    sizes += f"embed_dim={c.embed_dim}, depth={c.depth}, num_heads={c.num_heads}"
    expected = "(x - 0.5) / 0.25" if found.spec.channels == 1 else "ImageNet's mean and deviation"
    print(f"wrote {path}: a ViT of {sizes}, for images with {expected}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, with `flags` of train.py for files of weights. Raises ValueError."""
    (intro, examples), layout = __doc__.split("\n\n")[:2], argparse.RawDescriptionHelpFormatter
    usage = "python evaluate.py RUN [RUN ...] [flags below]"
    parser = Parser(
        "evaluate.py", usage, intro, f"examples:\n{examples}", formatter_class=layout, allow_abbrev=False
    )
    what = "a folder that train.py wrote, or a file of a ViT's published weights"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
    what = "auto (default: cuda if there is one, else cpu), cpu, cuda, mps"
    parser.add_argument("--device", default="auto", help=what)
    add = parser.add_argument_group("what is measured and shown").add_argument
    what = f"some of {', '.join(MEASURES)} (default: {', '.join(QUICK)})"
    add("--only", dest="measures", nargs="+", choices=MEASURES, metavar="MEASURE", help=what)
    add("--all", action="store_true", help="all of them, and with 1 to 25 %% of the labels: minutes a run")
    add("--rows", type=int, help="test images in compare.png (default: 6)")
    add("--html", action="store_true", help="write report.html as well: metrics, and images to browse")
    add = parser.add_argument_group("instead, of one run").add_argument
    what = "draw what it sees in these pictures, of any size"
    add("--image", nargs="+", type=Path, metavar="FILE", help=what)
    add("--export-masks", type=Path, metavar="DIR", help="write its guided heads' masks into a new folder")
    add("--export", type=Path, metavar="FILE", help="write its ViT for timm and DINO's code")
    add = parser.add_argument_group("for files of weights").add_argument
    add("--data", help="what to measure them on, as for train.py (default: phantom, or the runs' data)")
    add("--img-size", type=int, help="pixels a side (default: theirs, or that of the runs)")
    add("--num-heads", type=int, help="if their width does not tell")
    args = parser.parse_args(argv)
    typed = {"--data": args.data, "--img-size": args.img_size, "--num-heads": args.num_heads}
    args.flags = [word for flag, v in typed.items() if v is not None for word in (flag, str(v))]
    alone = {"--export": args.export, "--export-masks": args.export_masks, "--image": args.image}
    alone = [flag for flag, value in alone.items() if value]
    others = args.html or args.measures or args.rows or args.all or len(args.runs) > 1 or len(alone) > 1
    missing = [run for run in args.runs if not run.exists()]
    if alone and others:
        raise ValueError(f"{alone[0]} takes one run and no other flags: leave out the others")
    if missing:
        raise ValueError(f"{missing[0]}: no such file or folder")
    if args.flags and not any(run.is_file() for run in args.runs):
        raise ValueError(f"{args.flags[0]} is for files of weights; runs are measured on their own data")
    if args.rows is not None and args.rows < 1:
        raise ValueError(f"--rows {args.rows}: draw at least 1")
    args.rows, args.measures = args.rows or 6, args.measures or (MEASURES if args.all else QUICK)
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    check_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for what can't be read or measured."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        first = args.runs[0]
        if args.export:
            write_weights(first, args.export)
        elif args.export_masks:
            loaded, splits, _ = load_all([first], args.flags, args.device)
            config, _, model, *_ = loaded[first]
            out, masses = args.export_masks, read_masses(first)
            written = export_masks(out, config.data, model, masses, splits, config.span_layer)
            print(f"wrote {written} masks into {args.export_masks}")
        elif args.image:
            draw_pictures(first, args.flags, args.image, args.device)
        else:
            compare(args)
    except (ValueError, OSError) as error:
        fail("evaluate.py", error, 2)
    except torch.OutOfMemoryError:
        fail("evaluate.py", f"{args.device} has not enough memory: add --device cpu", 1)
    except KeyboardInterrupt:
        print("\nstopped; nothing of the run that was being measured is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
