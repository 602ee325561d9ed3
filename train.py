"""Teach a Vision Transformer where to look: DINO without labels, with attention heads guided by SPAN.

    python train.py                                    one labelled sample guides three heads, on drawn chest X-rays
    python train.py --prior none --out runs/dino       the same without guidance: plain DINO
    python train.py --data my_folder --out runs/mine   your own images (see the README for the layout of a folder)

What happens: the labelled sample's masks become priors; the sample is registered to every training image, once; then each step
cuts random views of a batch, lets student and teacher look at them, and adds to DINO's loss the SPAN loss between the
guided heads' attention and the priors seen through the same views. In --out this leaves last.pt (written whole, each
epoch), config.json, metrics.jsonl (a line an epoch), metrics.json (final figures) and pictures.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention_priors import follow, span_loss
from crops import crop, distort, random_crops
from data import load, normalise, select
from dino import Collapse
from evaluate import build_encoder, flatten, lay_over, make_priors, measure, print_table, write_json
from plots import attention_grid, curves
from ssl import DINO  # the doorway ssl.py in this folder, which leaves Python's own ssl as it was


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings, from the command line."""
    formatter = lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=34, width=110)  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("runs/span"), help="folder for everything that the run writes")
    add("--overwrite", action="store_true", help="start again in a folder that holds a run")
    add("--resume", action="store_true", help="go on with the run in --out after its last finished epoch")
    add("--keep-going", action="store_true", help="train on after a collapse")
    add("--seed", type=int, default=0, help="of the drawn data, the weights and the views")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="phantom", help="phantom (drawn chest X-rays), or a folder of images")
    add("--train-images", type=int, default=1500, help="how many phantoms to draw for training")
    add("--img-size", type=int, default=64, help="pixels a side that images are resized to")
    add("--sample", help="name of the labelled image (default: the first that has all masks)")
    add = parser.add_argument_group("where to look (SPAN)").add_argument
    add("--prior", default="sample", help="sample: one image's masks; masks: every image's, the upper bound; statistics; "
        "a .npy file (R, H, W); none")  # fmt: skip
    add("--align", choices=["bend", "affine", "none"], default="bend", help="how the sample is registered to each image")
    add("--no-follow", dest="follow", action="store_false", help="don't let priors follow the crops, to see what is lost")
    add("--prior-blur", type=float, default=0.025, help="sigma as a share of the image's width")
    add("--span-weight", type=float, default=1.0, help="of the SPAN loss beside DINO's")
    add("--span-loss", choices=["kl", "mse", "dice"], default="kl", help="distance between prior and attention")
    add("--span-layer", type=int, default=-1, help="the block whose heads are guided, -1 the last")
    add = parser.add_argument_group("DINO").add_argument
    add("--out-dim", type=int, default=256, help="prototypes; hundreds for thousands of images")
    add("--teacher-temp", type=float, default=0.04, help="the teacher's temperature; lower is sharper")
    add("--momentum", type=float, default=0.99, help="of the teacher at the start; rises to 1")
    add("--center-momentum", type=float, default=0.9, help="of the teacher's centre")
    add("--global-scale", type=float, nargs=2, default=(0.4, 1.0), help="area of the 2 global crops")
    add("--local-crops-number", type=int, default=0, help="local crops, of half the size, beside the global ones")
    add("--local-scale", type=float, nargs=2, default=(0.1, 0.4), help="area of the local crops")
    add("--flip", type=float, default=0.0, help="probability of mirror images; 0 where left and right differ")
    add = parser.add_argument_group("model").add_argument
    add("--patch-size", type=int, default=8, help="pixels a side of a patch")
    add("--embed-dim", type=int, default=96, help="width")
    add("--depth", type=int, default=4, help="blocks")
    add("--num-heads", type=int, default=6, help="attention heads; one prior needs one head")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--lr", type=float, default=1e-3, help="highest learning rate (AdamW, cosine)")
    add("--warmup", type=float, default=0.1, help="share of all steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.04, help="of matrices; vectors have none")
    add("--clip-grad", type=float, default=3.0, help="largest norm of the gradient")
    return parser.parse_args(argv)


def check_folder(args: argparse.Namespace) -> None:
    """Refuse, with a ValueError, to touch a folder that holds something."""
    holds_run = (args.out / "config.json").exists()
    if args.resume and not (args.out / "last.pt").exists():
        raise ValueError(f"--resume: {args.out}/last.pt does not exist; start without --resume")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if args.out.exists() and any(args.out.iterdir()) and not (args.resume or args.overwrite and holds_run):
        remedy = "--resume goes on, --overwrite starts again" if holds_run else "it holds no run"
        raise ValueError(f"--out {args.out} exists and is not empty: {remedy}; or name another folder")


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine wave from start (step 0) to end (step total)."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def views_of(images: Tensor, args: argparse.Namespace, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """DINO's views of images (B, C, S, S) in [0, 1]: 2 B global ones, then the local ones; and the theta of each.

    As published: the first global view is always blurred, the second seldom but at times solarised.
    """
    B, size = len(images), images.shape[-1]
    theta = random_crops(2 * B, args.global_scale, generator, flip=args.flip).to(images.device)
    views = crop(images.repeat(2, 1, 1, 1), theta, size)  # (2 B, C, S, S)
    views = torch.cat([distort(views[:B], generator, 1.0, 0.0), distort(views[B:], generator, 0.1, 0.2)])
    views, thetas = [normalise(views)], [theta]
    if args.local_crops_number:
        half = max(1, size // 2 // args.patch_size) * args.patch_size
        theta = random_crops(args.local_crops_number * B, args.local_scale, generator, flip=args.flip).to(images.device)
        local = crop(images.repeat(args.local_crops_number, 1, 1, 1), theta, half)
        views, thetas = views + [normalise(distort(local, generator, 0.5, 0.0))], thetas + [theta]
    return views, thetas


def span(features: list, thetas: list[Tensor], priors: Tensor, args: argparse.Namespace) -> Tensor:
    """The SPAN loss over all views: features and theta a resolution, priors (B, R, H, W) over the whole images."""
    losses = []
    for f, theta in zip(features, thetas):
        whole = torch.eye(2, 3, device=theta.device).expand_as(theta)
        side = math.isqrt(f.patches.shape[1])
        laid = priors.repeat(len(theta) // len(priors), 1, 1, 1)
        seen, share = follow(laid, theta if args.follow else whole, (side, side))
        losses.append(span_loss(f.attention, seen, share, args.span_loss) * len(theta))
    return sum(losses) / sum(map(len, thetas))


def train(args: argparse.Namespace, dino: DINO, images: Tensor, priors: Tensor | None) -> list[dict]:
    """Train on images (N, C, S, S) uint8 with priors (N, R, H, W), or (R, H, W) for all, or None. Returns the history."""
    generator = torch.Generator().manual_seed(args.seed)
    learned = [p for p in dino.parameters() if p.requires_grad]
    decays = [{"params": [p for p in learned if p.dim() > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(decays, lr=args.lr)
    batch = min(args.batch_size, len(images))
    steps, first, history = len(images) // batch, 0, []
    total = steps * args.epochs
    warmup = max(1, round(args.warmup * total))
    if args.resume:
        first, history = restore(args, dino, optimizer, generator)

    dino.train()
    bar = tqdm(total=total * batch, initial=first * steps * batch, unit="img", smoothing=0.05)
    for epoch in range(first, args.epochs):
        sums, started = {}, time.perf_counter()
        for i, index in enumerate(torch.randperm(len(images), generator=generator)[: steps * batch].split(batch)):
            step = epoch * steps + i
            lr = args.lr * (step + 1) / warmup if step < warmup else cosine(step - warmup, total - warmup, args.lr, args.lr / 100)
            for group in optimizer.param_groups:
                group["lr"] = lr
            index = index.to(images.device)
            views, thetas = views_of(images[index].float() / 255, args, generator)
            loss, features = dino(views, args.teacher_temp, args.span_layer)
            logged = {"loss": loss}
            if priors is not None:
                laid = priors[index].float() if priors.dim() == 4 else priors.expand(batch, *priors.shape)
                logged["span_loss"] = span(features, thetas, laid, args)
                loss = loss + args.span_weight * logged["span_loss"]
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learned, args.clip_grad)
            if not (loss.isfinite() and norm.isfinite()):  # before the step: the weights are still good
                raise FloatingPointError(
                    f"step {step} (epoch {epoch}): loss {loss:.3g}, gradient norm {norm:.3g}. The weights in {args.out}/last.pt "
                    "are from before; lower --lr or --clip-grad and start again, or look for odd images in the data"
                )
            optimizer.step()
            dino.update_teacher(cosine(step, total, args.momentum, 1.0))
            if not args.keep_going:
                dino.health.check()

            health = dino.health
            logged |= {"teacher_entropy": health.entropy, "kl": health.kl, "prototypes": health.prototypes()}
            sums = {k: sums.get(k, 0.0) + float(v) for k, v in logged.items()}
            bar.set_postfix({SHORT[k]: f"{float(v):.4g}" for k, v in logged.items()}, refresh=False)
            bar.update(batch)
        row = {"epoch": epoch + 1, **{k: v / steps for k, v in sums.items()}, "lr": lr}
        row["images_per_s"] = steps * batch / (time.perf_counter() - started)
        history.append(row)
        save(args, dino, optimizer, generator, history)
    bar.close()
    return history


SHORT = {"loss": "loss", "span_loss": "span", "teacher_entropy": "entropy", "kl": "KL", "prototypes": "protos"}


def save(args, dino: DINO, optimizer, generator, history: list[dict]) -> None:
    """Write last.pt and metrics.jsonl, each whole or not at all."""
    checkpoint = {
        "objective": dino.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "history": history,
    }
    torch.save(checkpoint, args.out / "last.pt.part")
    (args.out / "last.pt.part").replace(args.out / "last.pt")
    (args.out / "metrics.jsonl.part").write_text("".join(json.dumps(row) + "\n" for row in history))
    (args.out / "metrics.jsonl.part").replace(args.out / "metrics.jsonl")


def restore(args, dino: DINO, optimizer, generator) -> tuple[int, list[dict]]:
    """Put everything back as it was after the last finished epoch; returns the epochs done and their history."""
    checkpoint = torch.load(args.out / "last.pt", map_location="cpu", weights_only=True)
    dino.load_state_dict(checkpoint["objective"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    generator.set_state(checkpoint["generator"])
    torch.set_rng_state(checkpoint["torch_rng"])
    return len(checkpoint["history"]), checkpoint["history"]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the value and the remedy, for settings that cannot be."""
    limits = {"epochs": 1, "batch_size": 1, "out_dim": 2, "patch_size": 1, "depth": 1, "train_images": 1, "num_heads": 1}
    for name, least in limits.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    for name in ("lr", "teacher_temp", "clip_grad"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number above 0")
    if not -args.depth <= args.span_layer < args.depth:
        raise ValueError(f"--span-layer {args.span_layer}: the model has {args.depth} blocks, 0 to {args.depth - 1}")


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """The settings of the run in --out, which --resume goes on with; ValueError if the command line says otherwise."""
    saved = json.loads((args.out / "config.json").read_text())
    default = parse([])
    for name, value in vars(args).items():
        if name in ("out", "overwrite", "resume", "keep_going", "device") or name not in saved:
            saved[name] = value
        elif value != getattr(default, name) and json.loads(json.dumps(value)) != saved[name]:
            raise ValueError(f"--resume: the run in {args.out} has {name} = {saved[name]}, not {value}; drop the flag")
    return argparse.Namespace(**saved)


def prepare(args: argparse.Namespace):
    """Data, model and priors, with everything checked that a user can get wrong, before anything is written."""
    check(args)
    torch.manual_seed(args.seed)
    parts, sample, notes = load(args.data, args.img_size, args.seed, args.train_images, args.sample)
    for note in notes:
        print(f"note: {note}")
    images = parts["train"].images
    dino = DINO(build_encoder(args, images.shape[1]), args.embed_dim, args.out_dim, center_momentum=args.center_momentum)
    print(f"{args.data}: {', '.join(f'{len(data.names)} {part}' for part, data in parts.items())} images, "
          f"{sum(p.numel() for p in dino.student.parameters()) / 1e6:.2f} M weights, on {args.device}")  # fmt: skip
    if args.prior == "none":
        return parts, sample, dino, None
    if args.prior == "masks":
        if not parts["train"].has_masks.any():
            raise ValueError(f"--prior masks: no training image of {args.data} has a mask for every region")
        priors, names = parts["train"].masks, parts["train"].regions
    else:
        priors, names = make_priors(args, parts, sample)
    if len(names) > args.num_heads:
        raise ValueError(f"{len(names)} priors ({', '.join(names)}) but --num-heads {args.num_heads}: give each its head")
    print("guided heads: " + ", ".join(f"{i} {name}" for i, name in enumerate(names)))
    if args.prior == "sample" and args.align != "none":
        print(f"registering sample {sample} to the training images ...", end=" ", flush=True)
        started = time.perf_counter()
        priors = lay_over(args, priors, images[parts["train"].names.index(sample)], images).half()  # (N, R, S, S)
        print(f"{time.perf_counter() - started:.0f} s")
    return parts, sample, dino, priors


def finish(args: argparse.Namespace, dino: DINO, parts: dict, sample: str | None, history: list[dict]) -> None:
    """Measure on the test images, print the table, draw the pictures."""
    encoder = dino.student.to("cpu")
    test = parts["test"] if len(parts["test"].names) else parts["train"]
    metrics = {k: v for k, v in history[-1].items() if k != "epoch"}
    masks = None
    try:
        table, maps = measure(args, encoder, parts, sample)
        print_table(table)
        metrics |= flatten(table)
        test = select(test, test.has_masks)
        masks = test.masks[:6]
    except ValueError as error:  # no masks to measure with
        print(error)
        attention = encoder.eval()(normalise(test.images[:6].float() / 255), layer=args.span_layer).attention.detach()
        maps = {f"head {h}": attention[:, h] for h in range(args.num_heads)}
    write_json(args.out / "metrics.json", metrics)
    maps = {title: m[:6] for title, m in maps.items()}
    attention_grid(
        args.out / "attention.png", test.images[:6].float() / 255, masks, test.regions, maps, encoder.native_grid
    )
    curves(args.out / "curves.png", history)
    print(f"wrote {args.out}/attention.png (where the heads look), curves.png, metrics.json, last.pt")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        check_folder(args)
        if args.resume:
            args = resumed(args)
        parts, sample, dino, priors = prepare(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    config = {**vars(args), "out": str(args.out), "command": shlex.join(["python", "train.py", *(argv or sys.argv[1:])])}
    config["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    config["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}"
    if not args.resume:
        for stale in ("last.pt", "metrics.jsonl", "metrics.json"):
            (args.out / stale).unlink(missing_ok=True)
        write_json(args.out / "config.json", config)
    started = time.perf_counter()
    try:
        dino.to(args.device)
        images = parts["train"].images.to(args.device)
        history = train(args, dino, images, None if priors is None else priors.to(args.device))
    except (Collapse, FloatingPointError) as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nstopped; finished epochs are kept: go on with python train.py --out {args.out} --resume")
        sys.exit(130)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    finish(args, dino, parts, sample, history)


if __name__ == "__main__":
    main()
