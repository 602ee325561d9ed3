"""Teach a model where to look: DINO with attention heads guided by SPAN, or a classifier held by ISNet.

    python train.py                                 one labelled sample guides three heads, on drawn X-rays
    python train.py --prior none --out runs/dino    the same without guidance: plain DINO
    python train.py --data DIR --out runs/mine      your own images; the README shows how to lay them out
    python train.py --task classify --marker 1 --isnet 1 --out runs/isnet       blind to a hospital's marker

Pretraining: the labelled sample's masks become priors; the sample is registered to every training image,
once. Each step cuts random views of a batch, lets student and teacher look at them, and adds to DINO's loss
the SPAN loss between the guided heads' attention and the priors seen through the same views. Classification:
see `classify.py`. `checkpoint.py` says what is left in --out. Next to read: `evaluate.py`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from checkpoint import check_folder, load_run, restore, resumed, save, start, write_whole
from classify import Classifier, exclusive, objective
from crops import random_crops
from data import Data, load, select
from dino import Collapse
from evaluate import CannotMeasure, attention_of, build_encoder, flatten, flatten_classifier
from evaluate import heatmaps_of, load_encoder, measure, measure_classifier, print_table
from phantom import FINDINGS
from plots import curves, map_grid
from pretrain import move_teacher, priors_over, self_distillation
from ssl import DINO  # the doorway ssl.py in this folder, which leaves Python's own ssl as it was

TASKS = ["pretrain", "classify"]
DEFAULTS = {  # by --task, and to classify also by --backbone
    "pretrain": {"out": Path("runs/span"), "epochs": 15, "batch_size": 64, "train_images": 1500}
    | {"backbone": "vit", "embed_dim": 96, "depth": 4, "num_heads": 6, "lr": 2e-3, "lrp_gamma": 0.0},
    "classify": {"out": Path("runs/classifier"), "epochs": 10, "batch_size": 16, "train_images": 3000}
    | {"backbone": "resnet", "embed_dim": 64, "depth": 3, "num_heads": 4},
    "vit": {"lr": 5e-4, "lrp_gamma": 0.0},
    "resnet": {"lr": 2e-3, "lrp_gamma": 3.0},
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """The settings, and the names of those that were typed."""
    intro, examples = __doc__.split("\n\n")[:2]
    usage = "python train.py [--task TASK] [--out DIR] [--data DIR] [flags below]"
    parser = argparse.ArgumentParser(
        usage=usage, description=intro, epilog=examples, formatter_class=Formatter
    )
    add = parser.add_argument_group("run").add_argument
    add("--task", type=str, choices=TASKS, default="pretrain", help="which other flags apply")
    add("--out", type=Path, help=f"folder for all that the run writes{by_task('out')}")
    add("--overwrite", action="store_true", help="start again in a folder that holds a run")
    add("--resume", action="store_true", help="go on with the run in --out after its last whole epoch")
    add("--keep-going", action="store_true", help="train on after a collapse")
    add("--seed", type=int, default=0, help="of drawn data, weights and views")
    add("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=str, default="phantom", help="phantom (drawn chest X-rays), or a folder of images")
    add("--train-images", type=int, help=f"how many phantoms to draw for training{by_task('train_images')}")
    add("--img-size", type=int, default=64, help="pixels a side that images are resized to")
    add("--findings", type=str, nargs="+", help="to classify, or all (default: phantom one, else all)")
    add("--marker", type=float, help="share of phantoms whose marker agrees with the first finding")
    add("--sample", type=str, help="name of the labelled image (default: the first that has all masks)")
    add_task_flags(parser)
    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=str, choices=["vit", "resnet"], help=f"vit to pretrain{by_task('backbone')}")
    add("--init", type=Path, help="a finished run whose encoder to start from, in its sizes")
    add("--patch-size", type=int, default=8, help="pixels a side of a patch")
    add("--embed-dim", type=int, help=f"width; the ResNet's in its last stage{by_task('embed_dim')}")
    add("--depth", type=int, help=f"blocks of the ViT{by_task('depth')}")
    add("--num-heads", type=int, help=f"attention heads; each prior takes one{by_task('num_heads')}")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, help=f"passes over the training images{by_task('epochs')}")
    add("--batch-size", type=int, help=f"images a step{by_task('batch_size')}")
    add("--lr", type=float, help=f"highest learning rate (AdamW, cosine){by_task('lr')}")
    add("--warmup", type=float, default=0.1, help="share of all steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.04, help="of matrices; vectors have none")
    add("--clip-grad", type=float, default=3.0, help="largest norm of the gradient")
    parser.set_defaults(**DEFAULTS[parser.parse_args(argv).task])
    chosen = parser.parse_args(argv)
    if chosen.init:
        before = vars(load_run(chosen.init)[0])
        sizes = ("backbone", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
        parser.set_defaults(**{name: before[name] for name in sizes})
        chosen = parser.parse_args(argv)
    if chosen.task == "classify":
        parser.set_defaults(**DEFAULTS[chosen.backbone])
        if chosen.data == "phantom":
            parser.set_defaults(findings=FINDINGS[:1])
    args = parser.parse_args(argv)
    untyped = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is there already gets no default
    return args, {name for name, value in vars(parser.parse_args(argv, untyped)).items() if value is not None}


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the methods: SPAN and DINO to pretrain, ISNet to classify."""
    add = parser.add_argument_group("where to look (SPAN)").add_argument
    priors = "sample: one image's masks; masks: every image's; statistics; none; or a .npy file (R, S, S)"
    add("--prior", type=str, default="sample", help=priors)
    add("--align", type=str, choices=["bend", "affine", "none"], default="bend", help="registers the sample")
    add("--no-follow", dest="follow", action="store_false", help="let priors stay while crops move")
    add("--prior-blur", type=float, default=0.025, help="sigma, as a share of the image's width")
    add("--span-weight", type=float, default=3.0, help="of the SPAN loss beside DINO's")
    add("--span-loss", type=str, choices=["kl", "mse", "dice"], default="kl", help="prior to attention")
    add("--span-layer", type=int, default=-1, help="the block whose heads are guided, -1 the last")
    add = parser.add_argument_group("DINO").add_argument
    add("--out-dim", type=int, default=256, help="prototypes; hundreds for thousands of images")
    add("--teacher-temp", type=float, default=0.02, help="the teacher's temperature; lower is sharper")
    add("--momentum", type=float, default=0.996, help="of the teacher at first; rises to 1")
    add("--center-momentum", type=float, default=0.9, help="of the teacher's centre")
    add("--global-scale", type=float, nargs=2, default=[0.4, 1.0], help="area of the 2 global crops")
    add("--local-crops-number", type=int, default=0, help="local crops, of half the size")
    add("--local-scale", type=float, nargs=2, default=[0.1, 0.4], help="area of the local crops")
    add("--flip", type=float, default=0.0, help="share of mirrored views; 0 where left and right differ")
    add = parser.add_argument_group("classification (ISNet)").add_argument
    add("--isnet", type=float, default=0.0, help="weight of the ISNet loss; 0 for a plain classifier")
    what = "the label's logit, a random one, or the least likely class's log-odds"
    add("--explain", type=str, choices=["label", "random", "selective"], default="selective", help=what)
    where = "supervise relevance and attention in inner layers, besides the image"
    add("--isnet-layers", type=str, choices=["none", "all"], default="all", help=where)
    add("--isnet-decay", type=float, default=0.97, help="weight of the next largest background pixel")
    add("--isnet-e", type=float, default=0.1, help="E in u = h / (h + E); small ones punish traces, too")
    add("--lrp-epsilon", type=float, default=1e-2, help="the stabiliser of the rule")
    what = "0: epsilon rule; larger: toward the z+ rule"
    add("--lrp-gamma", type=float, help=what + by_task("lrp_gamma"))


def by_task(name: str) -> str:
    """The defaults of a setting, for --help; those by --backbone are for classification."""
    found = {key: values[name] for key, values in DEFAULTS.items() if name in values}
    found = {key if key in TASKS else f"classify {key}": value for key, value in found.items()}
    return " (default: " + ", ".join(f"{key} {value}" for key, value in found.items()) + ")"


class Formatter(
    argparse.ArgumentDefaultsHelpFormatter,
    argparse.MetavarTypeHelpFormatter,
    argparse.RawDescriptionHelpFormatter,
):
    """Help with types and defaults beside the flags, and the examples as they were written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        says = not (action.default is None or isinstance(action.default, bool))
        return super()._get_help_string(action) if says else action.help


def check(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the value and the limits, for settings that cannot be."""
    limits = {
        (1, 10**9): "epochs batch_size patch_size embed_dim num_heads depth train_images img_size",
        (2, 10**9): "out_dim",
        (0, 2**32 - 1): "seed local_crops_number",
        (1e-9, 1e9): "lr teacher_temp clip_grad",
        (0, 1e9): "prior_blur span_weight weight_decay isnet lrp_gamma",
        (1e-12, 1e9): "lrp_epsilon isnet_e",
        (0, 1): "momentum center_momentum flip warmup marker",
        (1e-3, 1): "isnet_decay",
        (0, 0.99): "drop_path",
        (-args.depth, args.depth - 1): "span_layer",
    }
    for (least, most), names in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value <= most:  # NaN is not, either
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: it must lie between {least:g} and {most:g}")
    if args.task == "pretrain" and (args.backbone == "resnet" or args.isnet):
        raise ValueError("--backbone resnet and --isnet need --task classify")
    for scale in (args.global_scale, args.local_scale):
        random_crops(1, scale, Generator())  # it knows which scales can be
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} can't be used: {str(error).splitlines()[0]}") from None


def check_idle(args: argparse.Namespace, typed: set[str]) -> None:
    """Raise ValueError for typed flags that would do nothing, as those of ISNet without --isnet."""
    idle = typed & {"explain", "isnet_layers", "isnet_decay", "isnet_e"}
    if idle and not args.isnet and not args.resume:
        raise ValueError(f"--{idle.pop().replace('_', '-')} does nothing without --isnet; add --isnet 1")


def prepare(args: argparse.Namespace) -> tuple[dict[str, Data], str | None, nn.Module, Tensor, Any]:
    """Data by part, the sample's name, model and training images on the device, and what guides the model.

    That is priors as from `lay_over` or None to pretrain, foreground masks (N, 1, S, S) or None to classify.
    Raises ValueError for all that a user can get wrong; nothing is written before it returns.
    """
    check(args)
    if args.task == "classify" and args.device == "cpu":
        torch.set_flush_denormal(True)  # relevance fades into numbers that make a CPU crawl
    findings = (args.findings or ["all"]) if args.task == "classify" else None
    given = args.data, args.img_size, args.seed, args.train_images, args.sample, args.marker, findings
    parts, sample, notes = load(*given)
    for note in notes:
        print(f"note: {note}")
    train = parts["train"]
    if not train.names:
        raise ValueError(f"{args.data}: no image is left to train on; look at the column split in labels.csv")
    torch.manual_seed(args.seed)
    encoder = build_encoder(args, train.images.shape[1])
    if args.init:
        load_encoder(Path(args.init), *load_run(Path(args.init)), encoder)
    if args.task == "classify":
        guides = foreground(args, train)
        model = Classifier(encoder, len(train.findings))
    else:
        model = DINO(encoder, args.embed_dim, args.out_dim, center_momentum=args.center_momentum)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    counts = ", ".join(f"{len(d.names)} {part}" for part, d in parts.items())
    print(f"{args.data}: {counts} images; {size:.2f} M weights, on {args.device}")
    model, images = model.to(args.device), train.images.to(args.device)
    if args.task == "pretrain":
        guides = priors_over(args, parts, sample, images)
    return parts, sample, model, images, guides


def foreground(args: argparse.Namespace, train: Data) -> Tensor | None:
    """The union of the regions, (N, 1, S, S) bool, for --isnet. Raises ValueError without it, or labels."""
    if train.labels is None or train.labels.isnan().all():
        raise ValueError(f"--task classify: no training image of {args.data} has a label; add labels.csv")
    if not ((train.labels == 1).any(dim=0) & (train.labels == 0).any(dim=0)).any():
        raise ValueError(f"--task classify: all training images of {args.data} have the same labels")
    if not args.isnet:
        return None
    if not train.has_masks.any():
        raise ValueError(f"--isnet: no training image of {args.data} has masks of all regions; add masks/")
    known = train.has_masks[:, None, None, None]
    return (train.masks.any(dim=1, keepdim=True) & known).to(args.device)


def cosine(step: int, total: int, first: float, last: float) -> float:
    """Half a cosine wave from `first` at step 0 to `last` at step `total`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices but neither biases nor norms."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in learned if p.dim() > 1], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=args.lr)


def train(args: argparse.Namespace, model: nn.Module, images: Tensor, losses: Callable) -> list[dict]:
    """Train on images (N, C, S, S), with losses(index, generator) -> (loss, what to log) for indices (B,).

    Returns the history, a row an epoch. Raises Collapse, or FloatingPointError before weights are spoiled.
    """
    generator, optimizer = Generator().manual_seed(args.seed), optimizer_for(model, args)
    history = restore(args.out, model, optimizer, generator) if args.resume else []
    batch = min(args.batch_size, len(images))
    steps = len(images) // batch
    total = steps * args.epochs
    rising = max(1, round(args.warmup * total))
    model.train()
    bar = tqdm(total=total * batch, initial=len(history) * steps * batch, unit="img", smoothing=0.05)
    for epoch in range(len(history), args.epochs):
        sums, started = {}, time.perf_counter()
        order = torch.randperm(len(images), generator=generator)[: steps * batch]
        for step, index in enumerate(order.to(images.device).split(batch), start=epoch * steps):
            lr = cosine(max(0, step - rising), max(1, total - rising), args.lr, args.lr / 100)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / rising)
            loss, logged = losses(index, generator)
            descend(loss, model, optimizer, args, step)
            if args.task == "pretrain":
                logged |= move_teacher(args, model, cosine(step, total, args.momentum, 1.0))
            logged = {name: float(value) for name, value in logged.items()}
            sums = {name: sums.get(name, 0.0) + value for name, value in logged.items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items()}, refresh=False)
            bar.update(batch)
        means = {name: value / steps for name, value in sums.items()}
        speed = steps * batch / (time.perf_counter() - started)
        history.append({"epoch": epoch + 1, **means, "images_per_s": round(speed, 1)})
        save(args.out, model, optimizer, generator, history)
    bar.close()
    return history


def descend(loss: Tensor, model: nn.Module, optimizer, args: argparse.Namespace, step: int) -> None:
    """One optimizer step, or FloatingPointError, the weights untouched, if loss or gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(
            f"step {step}: the loss is {loss.item():.3g}, its gradient's norm {norm.item():.3g}: step not "
            "taken. Lower --lr, or look for a setting or an image that is out of range"
        )
    optimizer.step()


def finish(
    args: argparse.Namespace, model: nn.Module, parts: dict, sample: str | None, history: list
) -> None:
    """Measure on test images, print the table, draw the pictures."""
    metrics = {name: value for name, value in history[-1].items() if name != "epoch"}
    shown, masks = parts["test"] if parts["test"].names else parts["train"], None
    if args.task == "classify":
        try:
            table, shown, maps = measure_classifier(args, model, parts)
            metrics |= flatten_classifier(table)
            print_table(table, mean=False)
        except CannotMeasure as error:
            print(error)
            shown = select(shown, torch.arange(min(6, len(shown.names))))
            maps = heatmaps_of(args, model, shown.images, exclusive(parts["train"].labels))
        picture, about = "heatmaps.png", "what the decision rests on"
        masks = shown.masks
    else:
        try:
            table, maps = measure(args, model.student, parts, sample)
            shown = select(shown, shown.has_masks)
            masks = shown.masks[:6]
            metrics |= flatten(table)
            print_table(table)
        except CannotMeasure as error:
            print(error)
            attention = attention_of(model.student, shown.images[:6], args.span_layer).unflatten(
                2, model.student.native_grid
            )
            maps = {f"head {h}": attention[:, h] for h in range(args.num_heads)}
        picture, about = "attention.png", "where the heads look"
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # NaN is no JSON
    write_whole(args.out / "metrics.json", metrics)
    images, maps = shown.images[:6].float() / 255, {title: m[:6] for title, m in maps.items()}
    map_grid(args.out / picture, images, masks, shown.regions, maps, signed=args.task == "classify")
    curves(args.out / "curves.png", history)
    print(f"wrote {args.out}/{picture} ({about}), curves.png, metrics.json, last.pt")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 1 for a failed training, 2 for unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args, typed = parse(argv)
            check_idle(args, typed)
            check_folder(args.out, args.resume, args.overwrite)
            args = resumed(args, typed) if args.resume else args
            parts, sample, model, images, guides = prepare(args)
            if not args.resume:
                start(args, argv)
        except (ValueError, OSError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            sys.exit(2)
        started = time.perf_counter()
        if args.task == "classify":
            losses = objective(args, model, images, guides, parts["train"].labels.to(args.device))
        else:
            losses = self_distillation(args, model, images, guides)
        history = train(args, model, images, losses)
        print(f"trained in {time.perf_counter() - started:.0f} s")
        finish(args, model.cpu(), parts, sample, history)
    except (Collapse, FloatingPointError) as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nstopped; --out {args.out} --resume goes on after the last whole epoch, if there was one")
        sys.exit(130)


if __name__ == "__main__":
    main()
