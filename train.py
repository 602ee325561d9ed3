"""Teach a Vision Transformer where to look: DINO without labels, with attention heads guided by SPAN.

    python train.py                                 one labelled sample guides three heads, on drawn X-rays
    python train.py --prior none --out runs/dino    the same without guidance: plain DINO
    python train.py --data DIR --out runs/mine      your own images; the README shows how to lay them out

The labelled sample's masks become priors; the sample is registered to every training image, once. Each step
cuts random views of a batch, lets student and teacher look at them, and adds to DINO's loss the SPAN loss
between the guided heads' attention and the priors seen through the same views. `checkpoint.py` says what is
left in --out. Next to read: `evaluate.py`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from attention_priors import follow, span_loss
from checkpoint import check_folder, restore, resumed, save, start, write_whole
from crops import crop, distort, random_crops
from data import Data, load, normalise, select
from dino import Collapse
from evaluate import CannotMeasure, attention_of, build_encoder, flatten, lay_over, measure, print_table
from plots import attention_grid, curves
from vit import ViT
from ssl import DINO  # the doorway ssl.py in this folder, which leaves Python's own ssl as it was


def parse(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """The settings, and the names of those that were typed."""
    intro, examples = __doc__.split("\n\n")[:2]
    usage = "python train.py [--out DIR] [--data DIR] [--prior PRIOR] [flags below]"
    parser = argparse.ArgumentParser(
        usage=usage, description=intro, epilog=examples, formatter_class=Formatter
    )
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("runs/span"), help="folder for all that the run writes")
    add("--overwrite", action="store_true", help="start again in a folder that holds a run")
    add("--resume", action="store_true", help="go on with the run in --out after its last whole epoch")
    add("--keep-going", action="store_true", help="train on after a collapse")
    add("--seed", type=int, default=0, help="of drawn data, weights and views")
    add("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=str, default="phantom", help="phantom (drawn chest X-rays), or a folder of images")
    add("--train-images", type=int, default=1500, help="how many phantoms to draw for training")
    add("--img-size", type=int, default=64, help="pixels a side that images are resized to")
    add("--sample", type=str, help="name of the labelled image (default: the first that has all masks)")
    add = parser.add_argument_group("where to look (SPAN)").add_argument
    priors = "sample: one image's masks; masks: every image's; statistics; none; or a .npy file (R, S, S)"
    add("--prior", type=str, default="sample", help=priors)
    add("--align", type=str, choices=["bend", "affine", "none"], default="bend", help="registers the sample")
    add("--no-follow", dest="follow", action="store_false", help="let priors stay while crops move")
    add("--prior-blur", type=float, default=0.025, help="sigma, as a share of the image's width")
    add("--span-weight", type=float, default=3.0, help="of the SPAN loss beside DINO's")
    add(
        "--span-loss",
        type=str,
        choices=["kl", "mse", "dice"],
        default="kl",
        help="distance from prior to attention",
    )
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
    add = parser.add_argument_group("model").add_argument
    add("--patch-size", type=int, default=8, help="pixels a side of a patch")
    add("--embed-dim", type=int, default=96, help="width")
    add("--depth", type=int, default=4, help="blocks")
    add("--num-heads", type=int, default=6, help="attention heads; each prior takes one")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--lr", type=float, default=2e-3, help="highest learning rate (AdamW, cosine)")
    add("--warmup", type=float, default=0.1, help="share of all steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.04, help="of matrices; vectors have none")
    add("--clip-grad", type=float, default=3.0, help="largest norm of the gradient")
    args = parser.parse_args(argv)
    untyped = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is there already gets no default
    return args, {name for name, value in vars(parser.parse_args(argv, untyped)).items() if value is not None}


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
        (0, 1e9): "prior_blur span_weight weight_decay",
        (0, 1): "momentum center_momentum flip warmup",
        (0, 0.99): "drop_path",
        (-args.depth, args.depth - 1): "span_layer",
    }
    for (least, most), names in limits.items():
        for name in names.split():
            if not least <= getattr(args, name) <= most:  # NaN is not, either
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} {getattr(args, name)}: it must lie between {least:g} and {most:g}"
                )
    for scale in (args.global_scale, args.local_scale):
        random_crops(1, scale, Generator())  # it knows which scales can be
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} can't be used: {str(error).splitlines()[0]}") from None


def prepare(args: argparse.Namespace) -> tuple[dict[str, Data], str | None, DINO, Tensor, Callable | None]:
    """Data by part, the sample's name, model and training images on the device, priors as from `lay_over`.

    Raises ValueError for all that a user can get wrong; nothing is written before it returns.
    """
    check(args)
    parts, sample, notes = load(args.data, args.img_size, args.seed, args.train_images, args.sample)
    for note in notes:
        print(f"note: {note}")
    train = parts["train"]
    if not train.names:
        raise ValueError(f"{args.data}: no image is left to train on; look at the column split in labels.csv")
    torch.manual_seed(args.seed)
    encoder = build_encoder(args, train.images.shape[1])
    dino = DINO(encoder, args.embed_dim, args.out_dim, center_momentum=args.center_momentum)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    counts = ", ".join(f"{len(d.names)} {part}" for part, d in parts.items())
    print(f"{args.data}: {counts} images; {size:.2f} M weights, on {args.device}")
    dino, images, started = dino.to(args.device), train.images.to(args.device), time.perf_counter()
    if args.prior == "none":
        return parts, sample, dino, images, None
    if args.prior == "sample" and args.align != "none":
        print(f"registering the sample to {len(images)} images ...", flush=True)
    laid, names = lay_over(args, parts, sample, images)
    if len(names) > args.num_heads:
        raise ValueError(
            f"{len(names)} priors ({', '.join(names)}) but --num-heads {args.num_heads}: give each a head"
        )
    guided = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    print(f"guided heads: {guided}; priors ready after {time.perf_counter() - started:.0f} s")
    return parts, sample, dino, images, laid


def views_of(
    images: Tensor, args: argparse.Namespace, generator: Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """DINO's views of images (B, C, S, S) in [0, 1]: 2 B global ones, then the local ones; and their theta.

    As published: the first global view is always blurred, the second seldom, but at times solarised.
    """
    B, size = len(images), images.shape[-1]
    theta = random_crops(2 * B, args.global_scale, generator, flip=args.flip).to(images.device)
    views = crop(images.repeat(2, 1, 1, 1), theta, size)  # (2 B, C, S, S)
    views = torch.cat([distort(views[:B], generator, 1.0, 0.0), distort(views[B:], generator, 0.1, 0.2)])
    if not args.local_crops_number:
        return [normalise(views)], [theta]
    half = max(1, size // 2 // args.patch_size) * args.patch_size
    V = args.local_crops_number
    near = random_crops(V * B, args.local_scale, generator, flip=args.flip).to(images.device)
    local = distort(crop(images.repeat(V, 1, 1, 1), near, half), generator, 0.5, 0.0)  # (V B, C, half, half)
    return [normalise(views), normalise(local)], [theta, near]


def guide(
    views: list[Tensor],
    features: list,
    thetas: list[Tensor],
    priors: Tensor,
    dino: DINO,
    args: argparse.Namespace,
) -> Tensor:
    """The SPAN loss over all views, with a tensor, Features and theta (V B, 2, 3) for each resolution.

    priors (B, R, S, S) lie over the whole images. Each resolution counts by the share of the priors that its
    views see, as each view does within it.
    """
    losses, shares = [], []
    for view, f, theta in zip(views, features, thetas):
        seen_through = theta if args.follow else torch.eye(2, 3, device=theta.device).expand_as(theta)
        everyone = priors.repeat(len(theta) // len(priors), 1, 1, 1)  # (V B, R, S, S)
        prior, share = follow(everyone, seen_through, dino.student.grid(view))
        shares.append(share.sum())
        losses.append(span_loss(f.attention, prior, share, args.span_loss) * shares[-1])
    return sum(losses) / sum(shares).clamp_min(1e-12)


def cosine(step: int, total: int, first: float, last: float) -> float:
    """Half a cosine wave from `first` at step 0 to `last` at step `total`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices but neither biases nor norms."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in learned if p.dim() > 1], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=args.lr)


def train(args: argparse.Namespace, dino: DINO, images: Tensor, laid: Callable | None) -> list[dict]:
    """Train on images (N, C, S, S) uint8, guided by the priors laid(index) (B, R, S, S) unless laid is None.

    Returns the history, a row an epoch. Raises Collapse, or FloatingPointError before weights are spoiled.
    """
    generator, optimizer = Generator().manual_seed(args.seed), optimizer_for(dino, args)
    history = restore(args.out, dino, optimizer, generator) if args.resume else []
    batch = min(args.batch_size, len(images))
    steps = len(images) // batch
    total = steps * args.epochs
    rising = max(1, round(args.warmup * total))
    dino.train()
    bar = tqdm(total=total * batch, initial=len(history) * steps * batch, unit="img", smoothing=0.05)
    for epoch in range(len(history), args.epochs):
        sums, started = {}, time.perf_counter()
        order = torch.randperm(len(images), generator=generator)[: steps * batch]
        for step, index in enumerate(order.to(images.device).split(batch), start=epoch * steps):
            lr = cosine(max(0, step - rising), max(1, total - rising), args.lr, args.lr / 100)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / rising)
            views, thetas = views_of(images[index].float() / 255, args, generator)
            loss, features = dino(views, args.teacher_temp, args.span_layer)
            logged = {"loss": loss.detach()}
            if laid is not None:
                span = guide(views, features, thetas, laid(index), dino, args)
                loss, logged["span_loss"] = loss + args.span_weight * span, span.detach()
            descend(loss, dino, optimizer, args, step)
            dino.update_teacher(cosine(step, total, args.momentum, 1.0))
            health = dino.health
            if not args.keep_going:
                health.check()
            logged |= {"teacher_entropy": health.entropy, "kl": health.kl, "prototypes": health.prototypes()}
            logged = {name: float(value) for name, value in logged.items()}
            sums = {name: sums.get(name, 0.0) + value for name, value in logged.items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in logged.items()}, refresh=False)
            bar.update(batch)
        means = {name: value / steps for name, value in sums.items()}
        speed = steps * batch / (time.perf_counter() - started)
        history.append({"epoch": epoch + 1, **means, "images_per_s": round(speed, 1)})
        save(args.out, dino, optimizer, generator, history)
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


def finish(args: argparse.Namespace, encoder: ViT, parts: dict, sample: str | None, history: list) -> None:
    """Measure on test images, print the table, draw the pictures."""
    metrics = {name: value for name, value in history[-1].items() if name != "epoch"}
    shown = parts["test"] if parts["test"].names else parts["train"]
    masks = None
    try:
        table, maps = measure(args, encoder, parts, sample)
        shown = select(shown, shown.has_masks)
        masks = shown.masks[:6]
        metrics |= flatten(table)
        print_table(table)
    except CannotMeasure as error:
        print(error)
        attention = attention_of(encoder, shown.images[:6], args.span_layer)
        maps = {f"head {h}": attention[:, h].unflatten(1, encoder.native_grid) for h in range(args.num_heads)}
    write_whole(args.out / "metrics.json", metrics)
    images, maps = shown.images[:6].float() / 255, {title: m[:6] for title, m in maps.items()}
    attention_grid(args.out / "attention.png", images, masks, shown.regions, maps)
    curves(args.out / "curves.png", history)
    print(f"wrote {args.out}/attention.png (where the heads look), curves.png, metrics.json, last.pt")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 1 for a failed training, 2 for unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    args, typed = parse(argv)
    try:
        try:
            check_folder(args.out, args.resume, args.overwrite)
            args = resumed(args, typed) if args.resume else args
            parts, sample, dino, images, laid = prepare(args)
            if not args.resume:
                start(args, argv)
        except (ValueError, OSError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            sys.exit(2)
        started = time.perf_counter()
        history = train(args, dino, images, laid)
        print(f"trained in {time.perf_counter() - started:.0f} s")
        finish(args, dino.student.cpu(), parts, sample, history)
    except (Collapse, FloatingPointError) as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nstopped; --out {args.out} --resume goes on after the last whole epoch, if there was one")
        sys.exit(130)


if __name__ == "__main__":
    main()
