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
see `classify.py`. The loop is `loop.py`'s; `checkpoint.py` says what is left in --out. Next to read:
`flags.py`.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.checkpoint import Unfit, build_classifier, build_encoder, check_data, check_folder, named, resumed, start
from common.checkpoint import start_from, write_whole
from common.models import constant_loss, exclusive, natural_range, objective
from common.data import Hosted, load, placed
from dino import Collapse
from evaluate import draw, maps_of, measured, shown_images
from common.config import check, check_idle, parse, repeated
from common.folder import Data
from common.loop import rank, train
from common.regions import agreement, foreground, keep, one_prior, outlines
from common.page import print_tables
from common.plots import curves
from common.pretrain import priors_over, relations, self_distillation
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
    own = parts["train"]
    if not own.names:
        raise ValueError(f"{args.data}: no image is left to train on; look at the column split in labels.csv")
    if len(own.names) < int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{args.data}: {len(own.names)} images can't be shared by {os.environ['WORLD_SIZE']} processes: "
            "start fewer"
        )
    classifies = args.task == "classify"
    if classifies:
        check_labels(args, own)
    if args.resume:
        check_data(args.out, args, own)
    args.channels, args.classes = own.images.shape[1], own.findings if classifies else []
    args.one_class, args.images = classifies and exclusive(own.labels), named(own)
    torch.manual_seed(args.seed)
    encoder = build_encoder(args, args.channels)
    if args.init and not args.resume:
        start_from(Path(args.init), encoder)
    if args.backbone == "vit" and classifies and (not args.init or not encoder.pos_embed.any()):
        # At 0.02 positions are lost beside the patches, and a classifier may stand still for many epochs.
        nn.init.trunc_normal_(encoder.pos_embed, std=0.2)
    masked = classifies and (args.isnet or args.baseline not in (None, "gated"))
    guides = placed(foreground(args, parts, sample), args.device) if masked else None
    model = learner(args, encoder, encoder.grid(own.images)).to(args.device)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    counts = ", ".join(f"{len(d.names)} {part}" for part, d in parts.items())
    print(f"{args.data}: {counts} images; {size:.2f} M weights, on {args.device}")
    images = placed(own.images, args.device)
    if args.isnet and not args.resume:
        args.relevance_range = natural_range(model, images, guides, own.labels.to(args.device), args)
        print("C1 {:.4g}, C2 {:.4g}: total relevance of a plain classifier".format(*args.relevance_range))
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


def finish(
    args: argparse.Namespace, model: nn.Module, parts: dict, sample: str | None, history: list, guides: Any
) -> None:
    """Measure on test images, print the tables, draw the pictures; guides as from `prepare`."""
    what = ["bias", "attention", "knn", "linear"]
    if args.task == "pretrain":
        model, what = model.student if isinstance(model, DINO) else model.encoder, what[1:]
    found = measured(args, model, parts, sample, what)
    print_tables({"": found})
    metrics = {name: value for name, value in history[-1].items() if name != "epoch"} | found.metrics
    if args.task == "classify":
        warn_if_idle(args, history[-1], parts["train"].labels)
        if guides is not None and parts["train"].has_masks.any():  # how true was the foreground?
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


def begin(argv: list[str]) -> tuple:
    """What `train` and `finish` take, from the command line; exit status 2 for unusable input."""
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
            if args.task == "classify" and guides is not None:
                keep(args, guides.cpu())
        return args, parts, sample, model, images, guides
    except (ValueError, OSError) as error:
        fail(error, 2)


def fail(error: Exception | str, status: int) -> NoReturn:
    """End with one line for who started it; what is unusable is said by the first process alone."""
    if status == 1 or not rank():
        print(f"train.py: {error}", file=sys.stderr)
    sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 1 for a failed training, 2 for unusable input."""
    try:
        args, parts, sample, model, images, guides = begin(sys.argv[1:] if argv is None else argv)
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
    except Unfit as error:
        fail(error, 2)
    except (Collapse, FloatingPointError) as error:
        fail(error, 1)
    except OSError as error:
        fail(f"{error}: if the disk is full, free some of it, and --resume goes on", 1)
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile can't be used here ({' '.join(str(error).split())[:150]}): leave it out", 1)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate" not in str(error):
            raise
        fail("not enough memory: raise --accumulate, or lower --batch-size, --img-size or --embed-dim", 1)
    except KeyboardInterrupt as error:
        print(f"\nstopped; {str(error) or 'if an epoch was finished, --resume goes on after it'}")
        sys.exit(130)


if __name__ == "__main__":
    main()
