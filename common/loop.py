"""The loop: epoch after epoch, step by step, stopped and resumed at any moment, shared by several processes.

Each step draws its images and views from one generator, whose state is in every checkpoint, so that a run
that was stopped ends at the weights of one that never was. Of several processes (torchrun) each takes its
share of every batch, and gradients are averaged: the same step as that of one process, but for normalisation
over a batch (a ResNet's), which is over the share. Next to read: `checkpoint.py`.
"""

import argparse
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.checkpoint import restore, save, write_rows
from dino import DINO, over_processes
from common.pretrain import move_teacher
from relvit import RelViT


def train(
    args: argparse.Namespace, model: nn.Module, images: Tensor, losses: Callable
) -> list[dict]:
    """Train on images (N, C, S, S), with losses(index, generator, done) -> (loss, what to log), index (B,).

    done: the share of the training that is done, 0 to 1.
    Returns the history, a row an epoch. Raises Unfit for a checkpoint of something else, Collapse,
    FloatingPointError before weights are spoiled, or KeyboardInterrupt, which says how to go on, the
    checkpoint written. Of several processes each takes its share of every batch.
    """
    generator, optimizer = Generator().manual_seed(args.seed), optimizer_for(model, args)
    history, begun = restore(args.out, model, optimizer, generator) if args.resume else ([], None)
    if args.resume and not rank():
        write_rows(args.out, history)  # a kill may have come between the checkpoint and its last row
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
    done = (len(history) * steps + (begun[1] if begun else 0)) * batch
    bar = tqdm(total=total * batch, initial=done, unit="img", smoothing=0.05, disable=rank() > 0)
    with stop_requests() as stop, bar:
        for epoch in range(len(history), args.epochs):
            order, first, sums = begun or (torch.randperm(len(images), generator=generator), 0, {})
            begun, started, order = None, time.perf_counter(), order.to(args.device)
            if dist.is_initialized():
                dist.broadcast(order, src=0)
            for i in range(first, steps):
                at, index = epoch * steps + i, order[i * batch : (i + 1) * batch][rank() :: shares]
                if rank():  # views of its own, the same again after --resume, which has the first's states
                    generator.manual_seed((args.seed * total + at) * shares + rank())
                    torch.manual_seed(generator.initial_seed() + 2**40)
                logged = learn(args, model, step, optimizer, index, generator, at, total)
                sums = {name: sums.get(name, 0.0) + value for name, value in logged.items()}
                beside = {name: f"{value:.3g}{constant.get(name, '')}" for name, value in logged.items()}
                bar.set_postfix(beside, refresh=False)
                bar.update(batch)
                if over_processes(torch.tensor(float(stop.is_set()), device=index.device)):
                    if not rank():
                        save(args, model, optimizer, generator, history, (order.cpu(), i + 1, sums))
                    if dist.is_initialized():
                        dist.barrier()  # who ends first has torchrun end the others
                    raise KeyboardInterrupt(f"{resuming(args)} goes on from here")
            means = {name: value / steps for name, value in sums.items()}
            speed = (steps - first) * batch / (time.perf_counter() - started)
            history.append({"epoch": epoch + 1, **means, "images_per_s": round(speed, 1)})
            if not rank():
                save(args, model, optimizer, generator, history)
    return history


@contextmanager
def stop_requests() -> Iterator[Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is finished first; Ctrl-C again stops at once."""
    asked = Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resuming(args: argparse.Namespace) -> str:
    """The command that goes on with a run."""
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", os.environ.get("WORLD_SIZE", "1")]
    words = torchrun if "RANK" in os.environ else ["python"]
    flags = ["--out", str(args.out), "--resume", *(["--keep-going"] if args.keep_going else [])]
    return shlex.join([*words, "train.py", *flags])


class Step(nn.Module):
    """A model's losses as a forward pass, which is what DistributedDataParallel takes."""

    def __init__(self, model: nn.Module, losses: Callable):
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, index: Tensor, generator: Generator, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(index, generator, done)


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


def learning_rate(args: argparse.Namespace, step: int, total: int) -> float:
    """--lr at a step of `total`: rising in a line at first (--warmup), then falling to 1 % as a cosine."""
    rising = max(1, round(args.warmup * total))
    falling = cosine(max(0, step - rising), max(1, total - rising), args.lr, args.lr / 100)
    return falling * min(1, (step + 1) / rising)


def cosine(step: int, total: int, first: float, last: float) -> float:
    """Half a cosine wave from `first` at step 0 to `last` at step `total`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


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


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices but neither biases nor norms."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in learned if p.dim() > 1], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=args.lr)


def rank() -> int:
    """Which of the processes that torchrun started this one is; 0 if it is alone."""
    return int(os.environ.get("RANK", 0))
