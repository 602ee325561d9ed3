"""Teach a model where to look: DINO or RelViT with attention guided by SPAN, or a classifier held by ISNet.

    python train.py                                 one labelled sample guides three heads, on drawn X-rays
    python train.py --prior none --out runs/dino    the same without guidance: plain DINO
    python train.py --data DIR --out runs/mine      your own images; the README shows how to lay them out
    python train.py --ssl relvit --out runs/relvit  patches tell how they lie, in place of DINO
    python train.py --task classify --marker 1 --isnet 3 --out runs/isnet       blind to a hospital's marker
    torchrun --standalone --nproc-per-node 2 train.py   the same batches, shared by two processes or GPUs

Pretraining: the labelled sample's masks become priors; the sample is registered to every training image,
once. Each step cuts views of a batch and adds to the objective's loss (DINO's or RelViT's, see `pretrain.py`)
the SPAN loss between the guided heads' attention and the priors seen through the same views. Classification:
see `classify.py`. `checkpoint.py` says what is left in --out. Next to read: `flags.py`.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import (
    build_classifier,
    build_encoder,
    check_data,
    check_folder,
    restore,
    resumed,
    save,
    start,
    start_from,
)
from checkpoint import write_whole
from classify import constant_loss, exclusive, objective
from data import Hosted, load, placed
from dino import Collapse, over_processes
from evaluate import draw, maps_of, shown_images
from flags import check, check_idle, parse, repeated
from folder import Data
from masks import agreement, foreground, one_prior, outlines
from measure import report
from page import print_tables
from plots import curves
from pretrain import move_teacher, priors_over, relations, self_distillation
from relvit import TASKS
from ssl import DINO, RelViT  # the doorway ssl.py in this folder, which leaves Python's own ssl as it was


def prepare(args: argparse.Namespace) -> tuple[dict[str, Data], str | None, nn.Module, Tensor | Hosted, Any]:
    """Data by part, the sample's name, model and training images on the device, and what guides the model.

    That is priors as from `lay_over` or None to pretrain, foreground masks (N, 1, S, S) or None to classify.
    Raises ValueError for all that a user can get wrong; nothing is written before it returns.
    """
    check(args)
    if args.task == "classify" and args.device == "cpu":
        torch.set_flush_denormal(True)  # relevance fades into numbers that make a CPU crawl
    findings = (args.findings or ["all"]) if args.task == "classify" else None
    given = args.data, args.img_size, args.seed, args.train_images, args.sample
    parts, sample, notes = load(*given, args.marker, args.marker_kind, findings)
    for note in notes:
        print(f"note: {note}")
    train = parts["train"]
    if not train.names:
        raise ValueError(f"{args.data}: no image is left to train on; look at the column split in labels.csv")
    if len(train.names) < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{args.data}: {len(train.names)} images can't be shared by more processes than that"
        )
    classifies = args.task == "classify"
    if classifies:
        check_labels(args, train)
    if args.resume:
        check_data(args.out, args, train)
    args.channels, args.classes = train.images.shape[1], train.findings if classifies else []
    args.one_class = classifies and exclusive(train.labels)
    torch.manual_seed(args.seed)
    encoder = build_encoder(args, args.channels)
    if args.init:
        start_from(Path(args.init), encoder)
    if args.backbone == "vit" and classifies and (not args.init or not encoder.pos_embed.any()):
        # At 0.02 positions are lost beside the patches, and a classifier may stand still for many epochs.
        nn.init.trunc_normal_(encoder.pos_embed, std=0.2)
    masked = classifies and (args.isnet or args.baseline not in (None, "gated"))
    guides = placed(foreground(args, parts, sample), args.device) if masked else None
    model = learner(args, encoder, encoder.grid(train.images)).to(args.device)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    counts = ", ".join(f"{len(d.names)} {part}" for part, d in parts.items())
    print(f"{args.data}: {counts} images; {size:.2f} M weights, on {args.device}")
    images = placed(train.images, args.device)
    if not classifies:
        guides = priors_over(args, parts, sample, images)
    return parts, sample, model, images, guides


def learner(args: argparse.Namespace, encoder: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """What is trained around an encoder: a classifier, RelViT or DINO; grid (h, w) of the images' patches."""
    if args.task == "classify":
        model = build_classifier(args, encoder, len(args.classes), args.channels)
        if args.relations:
            model.relvit = RelViT(encoder, args.embed_dim, grid, args.relations)
    elif args.ssl == "relvit":
        nn.init.zeros_(encoder.pos_embed)  # unused: who uses the encoder next sees what it was trained on
        grid = (args.mega_patches, args.mega_patches) if args.mega_patches else grid
        model = RelViT(encoder, args.embed_dim, grid, args.relations or TASKS)
    else:
        model = DINO(encoder, args.embed_dim, args.out_dim, center_momentum=args.center_momentum)
    if args.compile:
        for module in (model.student, model.teacher) if isinstance(model, DINO) else (model.encoder,):
            module.compile()
    return model


def check_labels(args: argparse.Namespace, train: Data) -> None:
    """Raise ValueError for training images without labels, or with the same ones."""
    if train.labels is None or train.labels.isnan().all():
        raise ValueError(f"--task classify: no training image of {args.data} has a label; add labels.csv")
    if not ((train.labels == 1).any(dim=0) & (train.labels == 0).any(dim=0)).any():
        raise ValueError(f"--task classify: all training images of {args.data} have the same labels")


def cosine(step: int, total: int, first: float, last: float) -> float:
    """Half a cosine wave from `first` at step 0 to `last` at step `total`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


def learning_rate(args: argparse.Namespace, step: int, total: int) -> float:
    """--lr at a step of `total`: rising in a line at first (--warmup), then falling to 1 % as a cosine."""
    rising = max(1, round(args.warmup * total))
    falling = cosine(max(0, step - rising), max(1, total - rising), args.lr, args.lr / 100)
    return falling * min(1, (step + 1) / rising)


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices but neither biases nor norms."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in learned if p.dim() > 1], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=args.lr)


@contextmanager
def stop_requests() -> Iterator[Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is finished first; the second stops at once."""
    asked = Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    args: argparse.Namespace, model: nn.Module, images: Tensor | Hosted, losses: Callable
) -> list[dict]:
    """Train on images (N, C, S, S), with losses(index, generator, done) -> (loss, what to log), index (B,).

    done: the share of the training that is done, 0 to 1.
    Returns the history, a row an epoch. Raises Collapse, FloatingPointError before weights are spoiled, or
    KeyboardInterrupt, the checkpoint written. Of several processes each takes its share of every batch.
    """
    generator, optimizer = Generator().manual_seed(args.seed), optimizer_for(model, args)
    history, begun = restore(args.out, model, optimizer, generator) if args.resume else ([], None)
    shares = dist.get_world_size() if dist.is_initialized() else 1
    batch = min(args.batch_size, len(images)) // shares * shares
    steps = len(images) // batch
    total = steps * args.epochs
    constant = next((m.chance for m in model.modules() if isinstance(m, RelViT)), {})
    constant = {task: f" (chance {value:.2g})" for task, value in constant.items()}
    model.train()
    step = Step(model, losses)
    if dist.is_initialized():
        unused = isinstance(model, RelViT)  # its position embedding
        step = DistributedDataParallel(step, find_unused_parameters=unused)
        if rank():  # views of its own; the order of images is the first's
            generator.manual_seed((args.seed + 1) * 10**6 + 1000 * len(history) + rank())
    done = (len(history) * steps + (begun[1] if begun else 0)) * batch
    bar = tqdm(total=total * batch, initial=done, unit="img", smoothing=0.05, disable=rank() > 0)
    with stop_requests() as stop, bar:
        for epoch in range(len(history), args.epochs):
            order, first, sums = begun or (torch.randperm(len(images), generator=generator), 0, {})
            begun, started, order = None, time.perf_counter(), order.to(images.device)
            if dist.is_initialized():
                dist.broadcast(order, src=0)
            for i in range(first, steps):
                index = order[i * batch : (i + 1) * batch][rank() :: shares]
                logged = learn(args, model, step, optimizer, index, generator, epoch * steps + i, total)
                sums = {name: sums.get(name, 0.0) + value for name, value in logged.items()}
                beside = {name: f"{value:.3g}{constant.get(name, '')}" for name, value in logged.items()}
                bar.set_postfix(beside, refresh=False)
                bar.update(batch)
                if stop.is_set() and not rank():
                    save(args.out, model, optimizer, generator, history, (order.cpu(), i + 1, sums))
                    raise KeyboardInterrupt
            means = {name: value / steps for name, value in sums.items()}
            speed = (steps - first) * batch / (time.perf_counter() - started)
            history.append({"epoch": epoch + 1, **means, "images_per_s": round(speed, 1)})
            if not rank():
                save(args.out, model, optimizer, generator, history)
    return history


def learn(
    args: argparse.Namespace,
    model: nn.Module,
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    index: Tensor,
    generator: Generator,
    at: int,
    total: int,
) -> dict[str, float]:
    """The optimizer step number `at` of `total`, on images (B,); what to log, as means over all processes."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, at, total)
    optimizer.zero_grad()
    loss, logged = accumulate(args, step, index, generator, at / total)
    descend(loss, model, optimizer, args, at)
    if isinstance(model, DINO):
        logged |= move_teacher(args, model, cosine(at, total, args.momentum, 1.0))
    values = torch.stack([torch.as_tensor(value, device=index.device).float() for value in logged.values()])
    return dict(zip(logged, over_processes(values).tolist()))


class Step(nn.Module):
    """A model's losses as a forward pass, which is what DistributedDataParallel takes."""

    def __init__(self, model: nn.Module, losses: Callable):
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, index: Tensor, generator: Generator, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(index, generator, done)


def rank() -> int:
    """Which of the processes that torchrun started this one is; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def accumulate(
    args: argparse.Namespace, step: nn.Module, index: Tensor, generator: Generator, done: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of a batch's loss, in --accumulate parts; returns the loss and what to log, as means."""
    total, logged = 0.0, {}
    for part in index.chunk(args.accumulate):
        share = len(part) / len(index)
        loss, found = step(part, generator, done)
        (loss * share).backward()
        total = total + loss.detach() * share
        logged = {name: logged.get(name, 0.0) + value * share for name, value in found.items()}
    return total, logged


def descend(loss: Tensor, model: nn.Module, optimizer, args: argparse.Namespace, step: int) -> None:
    """One optimizer step, or FloatingPointError, the weights untouched, if loss or gradient is not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(
            f"step {step}: the loss is {loss.item():.3g}, its gradient's norm {norm.item():.3g}: step not "
            "taken. Lower --lr, or look for a setting or an image that is out of range"
        )
    optimizer.step()


def finish(
    args: argparse.Namespace, model: nn.Module, parts: dict, sample: str | None, history: list, guides: Any
) -> None:
    """Measure on test images, print the tables, draw the pictures; guides as from `prepare`."""
    what = ["bias", "attention", "knn", "linear"]
    if args.task == "pretrain":
        model, what = model.student if isinstance(model, DINO) else model.encoder, what[1:]
    found = report(args, model, parts, sample, what, shares=(1.0,))
    print_tables({"": found})
    metrics = {name: value for name, value in history[-1].items() if name != "epoch"} | found.figures
    if args.task == "classify":
        warn_if_idle(args, history[-1], parts["train"].labels)
    if args.task == "classify" and guides is not None:  # the foreground that was used: how true was it?
        metrics["mask_dice"] = agreement(guides.cpu(), parts["train"])
    if one_prior(args):
        write_whole(args.out / "outlines.json", outlines(args, model, parts, sample))
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # NaN is no JSON
    write_whole(args.out / "metrics.json", metrics)
    picture, about = {
        "pretrain": ("attention.png", "where the heads look"),
        "classify": ("heatmaps.png", "what the decision rests on"),
    }[args.task]
    shown = shown_images(args, parts, 6)
    draw(args.out / picture, shown, maps_of(args, model, shown.images, found.heads), args.task)
    curves(args.out / "curves.png", {args.out.name: history})
    print(f"wrote {args.out}/{picture} ({about}), curves.png, metrics.json, last.pt")


def warn_if_idle(args: argparse.Namespace, last: dict[str, float], labels: Tensor) -> None:
    """Say so if a classifier is no better than one answer for all images: ISNet may stand still."""
    reached, constant = last.get("classification", last["loss"]), constant_loss(labels, args.one_class)
    if reached > 0.97 * constant:
        remedy = "less --isnet" if args.isnet else "another --lr"
        print(
            f"note: it has hardly learned: its loss is {reached:.2f}, that of one answer for all images "
            f"{constant:.2f}. Try another --seed, more --epochs, or {remedy}"
        )


def join(args: argparse.Namespace) -> None:
    """Become one of the processes that torchrun started, if it did: the first alone prints and writes."""
    if "RANK" not in os.environ:
        return
    shares = int(os.environ["WORLD_SIZE"])
    if args.batch_size % shares:
        raise ValueError(
            f"--batch-size {args.batch_size} can't be shared by {shares} processes: a multiple can"
        )
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 1 for a failed training, 2 for unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            argv = repeated(argv)
            args, typed = parse(argv, __doc__)
            check_idle(args, typed)
            if not rank():
                check_folder(args.out, args.resume, args.overwrite)
            args = resumed(args, typed) if args.resume else args
            join(args)
            parts, sample, model, images, guides = prepare(args)
            if not args.resume and not rank():
                start(args, argv)
        except (ValueError, OSError) as error:
            if not rank():
                print(f"train.py: {error}", file=sys.stderr)
            sys.exit(2)
        started = time.perf_counter()
        if args.task == "classify":
            losses = objective(args, model, images, guides, parts["train"].labels.to(args.device))
        else:
            objective_of = self_distillation if args.ssl == "dino" else relations
            losses = objective_of(args, model, images, guides)
        history = train(args, model, images, losses)
        print(f"trained in {time.perf_counter() - started:.0f} s")
        if not rank():
            finish(args, model, parts, sample, history, guides)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Collapse, FloatingPointError, OSError) as error:  # the last: a full disk, say
        print(f"\ntrain.py: {error}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError:
        remedy = f"raise --accumulate {args.accumulate} or lower --img-size {args.img_size} or --batch-size"
        print(f"\ntrain.py: {args.device} has not enough memory: {remedy}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        kept = f"python train.py --out {args.out} --resume goes on from here"
        print(f"\nstopped; {kept if (args.out / 'last.pt').exists() else 'nothing was trained yet'}")
        sys.exit(130)


if __name__ == "__main__":
    main()
