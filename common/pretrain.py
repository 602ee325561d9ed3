"""Pretraining without labels: the views of a batch, and SPAN's guidance of the heads that look at them.

Each step of DINO cuts random views and lets student and teacher look at them; each step of RelViT cuts images
into patches that shall be put in order. To either loss comes the SPAN loss between the guided heads'
attention and the priors, seen through the same views. Next to read: `classify.py`.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from attention_priors import (
    align,
    bend,
    blurred,
    carry,
    follow,
    priors_from_masks,
    priors_from_statistics,
    span_loss,
)
from crops import crop, distort, random_crops
from common.data import BATCH, normalise, placed
from common.folder import Data
from relvit import RelViT, cut, patch_views


def make_priors(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None
) -> tuple[Tensor, list[str]]:
    """Priors (R, S, S) over one image, as --prior asks, and their names. Raises ValueError."""
    train, blur = parts["train"], config.prior_blur
    if config.prior == "sample":
        if sample is None:
            raise ValueError(
                f"--prior sample: no image of {config.data} has a mask for every region; outline one"
            )
        masks = train.masks[train.names.index(sample)]
        empty = [region for region, mask in zip(train.regions, masks) if not mask.any()]
        if empty:
            raise ValueError(
                f"the masks of sample {sample} are empty for {', '.join(empty)}: choose another --sample"
            )
        return priors_from_masks(masks, blur), train.regions
    if config.prior == "statistics":
        names = ["mean", "deviation", "cluster 1", "cluster 2"]
        return priors_from_statistics(train.images, blur=blur), names
    try:
        priors = torch.from_numpy(np.load(config.prior, allow_pickle=False)).float()
    except Exception as error:  # np.load fails on foreign files in many ways
        what = "sample, masks, statistics, none, or a .npy file"
        raise ValueError(f"--prior {config.prior} is not {what} ({type(error).__name__}: {error})") from None
    S = config.img_size
    if priors.dim() != 3 or not len(priors) or priors.shape[1:] != (S, S):
        raise ValueError(f"--prior {config.prior} is an array {tuple(priors.shape)}: make it (R, {S}, {S})")
    if not (priors.isfinite() & (priors >= 0)).all() or not priors.flatten(1).any(dim=1).all():
        raise ValueError(f"--prior {config.prior}: each prior must be finite, not negative, and not empty")
    return priors_from_masks(priors, blur), [f"prior {r}" for r in range(len(priors))]


def register(config: argparse.Namespace, sample: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The sample (C, S, S) registered to images (N, C, S, S): theta (N, 2, 3) and flow (N, 2, k, k).

    Without bending the flow is zero.
    """
    thetas, flows = [], []
    for part in tqdm(images.split(BATCH), desc="registering", leave=False):
        thetas.append(align(sample, part))
        bends = bend(sample, part, thetas[-1]) if config.align == "bend" else torch.zeros(len(part), 2, 1, 1)
        flows.append(bends.to(images.device))
    return torch.cat(thetas), torch.cat(flows)


def lay_over(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None, images: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function from indices (B,) of images (N, C, S, S) to the priors (B, R, S, S) over them.

    images are the training images if --prior is masks. Raises ValueError.
    """
    train = parts["train"]
    if config.prior == "masks":
        if not train.has_masks.any():
            raise ValueError(f"--prior masks: no training image of {config.data} has a mask for every region")
        # blurred as the sample's are; a missing mask stays empty
        masks = placed(train.masks, str(images.device))
        return lambda index: blurred(masks[index].float(), config.prior_blur)
    priors, _ = make_priors(config, parts, sample)
    priors = priors.to(images.device)
    if config.prior != "sample" or config.align == "none":
        return lambda index: priors.expand(len(index), *priors.shape)
    theta, flow = register(config, train.images[train.names.index(sample)].to(images.device), images)
    return lambda index: carry(priors, theta[index], flow[index])


def measured_priors(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None, encoder: nn.Module, known: dict
) -> Callable | None:
    """The priors of one labelled sample over test images (M, C, S, S), as `measure.report` takes them.

    known: those over the same images that were registered for other runs, by the settings that matter.
    """
    if config.task != "pretrain" or config.prior != "sample":
        return None

    def maps(images: Tensor) -> dict[str, tuple[Tensor, tuple[int, int]]]:
        whole, grid = torch.eye(2, 3).expand(len(images), 2, 3), encoder.grid(images)
        found = {"prior": (follow(make_priors(config, parts, sample)[0], whole, grid)[0], grid)}
        if config.align != "none":
            key = config.align, config.prior_blur
            if key not in known:
                known[key] = lay_over(config, parts, sample, images)(torch.arange(len(images)))
            found["aligned prior, every pixel"] = known[key].flatten(2), tuple(known[key].shape[2:])
            found["aligned prior"] = follow(known[key], whole, grid)[0], grid
        return found

    return maps


def priors_over(
    args: argparse.Namespace, parts: dict[str, Data], sample: str | None, images: Tensor
) -> Callable | None:
    """The priors laid over the training images (N, C, S, S), as from `lay_over`; None without --prior."""
    if args.prior == "none":
        return None
    names = parts["train"].regions if args.prior == "masks" else make_priors(args, parts, sample)[1]
    flag = "pool-heads" if args.pool == "simpool" else "num-heads"
    heads = vars(args)[flag.replace("-", "_")]
    if len(names) > heads:
        raise ValueError(f"{len(names)} priors ({', '.join(names)}) but --{flag} {heads}: give each a head")
    started = time.perf_counter()
    if args.prior == "sample" and args.align != "none":
        print(f"registering the sample to {len(images)} images ...", flush=True)
    laid = lay_over(args, parts, sample, images)
    guided = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    print(f"guided heads: {guided}; priors ready after {time.perf_counter() - started:.0f} s")
    return laid


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
    dino: nn.Module,
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


def self_distillation(
    args: argparse.Namespace, dino: nn.Module, images: Tensor, laid: Callable | None
) -> Callable:
    """DINO's loss as `train.train` takes it, guided by laid(index) (B, R, S, S) unless laid is None."""

    def losses(index: Tensor, generator: Generator, *_) -> tuple[Tensor, dict[str, Tensor]]:
        views, thetas = views_of(images[index].float() / 255, args, generator)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            loss, features = dino(views, args.teacher_temp, args.span_layer)
        logged = {"loss": loss.detach()}
        if laid is not None:
            span = guide(views, features, thetas, laid(index), dino, args)
            loss, logged["span_loss"] = loss + args.span_weight * span, span.detach()
        return loss, logged

    return losses


def relations(args: argparse.Namespace, relvit: RelViT, images: Tensor, laid: Callable | None) -> Callable:
    """RelViT's loss as `train.train` takes it, guided by laid(index) (B, R, S, S) unless laid is None."""
    grid, p = relvit.grid, args.patch_size

    def losses(index: Tensor, generator: Generator, *_) -> tuple[Tensor, dict[str, Tensor]]:
        views, boxes, _ = patch_views(
            images[index].float() / 255, grid, p, generator, mega=args.mega_patches > 0
        )
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            loss, shown, features = relvit(normalise(views), layer=args.span_layer)
        logged = {"loss": loss.detach(), **shown}
        if laid is not None:
            prior = F.avg_pool2d(cut(laid(index), boxes, grid, p), p).flatten(2)  # (B, R, N)
            prior = prior * boxes[:, None, :, 2:].prod(dim=3)  # a large cell holds more of it
            mass = prior.sum(dim=2)
            prior = prior / mass.clamp_min(1e-12)[:, :, None]
            span = span_loss(features.attention, prior, (mass > 0).float(), args.span_loss)
            loss, logged["span_loss"] = loss + args.span_weight * span, span.detach()
        return loss, logged

    return losses


def move_teacher(args: argparse.Namespace, dino: nn.Module, momentum: float) -> dict[str, Tensor]:
    """What follows a step of DINO: the teacher moves, its health is taken. Raises Collapse."""
    dino.update_teacher(momentum)
    health = dino.health
    if not args.keep_going:
        health.check()
    return {"teacher_entropy": health.entropy, "kl": health.kl, "prototypes": health.prototypes()}
