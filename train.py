"""Train DINO or RelViT with attention guided by SPAN, or a classifier that ISNet keeps off the background.

    python train.py                                 one labelled image guides three heads, on synthetic X-rays
    python train.py --prior none --out runs/dino    the same without guidance: plain DINO
    python train.py --data DIR --out runs/mine      your own images; docs/data.md shows how to lay them out
    python train.py --ssl relvit --out runs/relvit  relations between patches instead of DINO
    python train.py --task classify --marker 1 --isnet 0.3 --out runs/isnet     ignore a hospital's marker

The file reads from top to bottom: set-up, objectives, the loop, the command line. An objective is a
function losses(index (B,), generator, step, total) -> (loss, {name: value to log}).
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from attention_priors import guidance, span_loss
from common.baselines import PENALTIES, grown, swapped
from common.checkpoint import DataSpec, check_folder, check_spec, data_spec, restore, resumed, save
from common.checkpoint import start_run
from common.checks import check, check_step
from common.classify import attention_seen, classification_loss, explained_target, labelled
from common.classify import natural_range, shifted, supervised_layers
from common.config import Config, epochs_for, parse
from common.data import Data, normalise, prepared, printable, rows_at, to_device
from common.foreground import are_made, check_foreground, foreground, keep_masks, kept_masks
from common.models import build_model, decayed, lrp_rule, make_encoder
from common.processes import Collapse, average_gradients, fail, from_first, join, keep_freed_memory
from common.processes import rank, remedy_for, share_model, stop_requests, world_size
from common.regions import priors_over
from common.runs import data_of, finish, masses_of, pretrained
from common.splits import load
from crops import multi_crop
from dino import DINO, over_processes
from isnet_lrp import foreground_loss, isnet_background, published_loss, whole_patches
from lrp import relevance
from relvit import RelViT, cut, patch_views
from vit import ViT

# Set-up


def load_data(config: Config) -> tuple[dict[str, Data], str | None]:
    """Images by split and the reference image's name. Raises ValueError."""
    splits, reference, notes = load(**data_of(config), marker=config.marker, marker_kind=config.marker_kind)
    sizes = ", ".join(f"{len(data.names)} {split}" for split, data in splits.items())
    print(*(f"note: {note}" for note in notes), printable(f"{config.data}: {sizes} images"), sep="\n")
    if not splits["train"].names:
        raise ValueError(f"{config.data}: no training images; look at the column split in labels.csv")
    return splits, reference


def foreground_masks(
    config: Config, splits: dict[str, Data], reference: str | None
) -> tuple[Tensor | None, Tensor]:
    """The foreground (N, 1, S, S) bool of the training images, if it is needed, and which images stay (N,).

    Images without a known foreground are left out: they would teach the shortcut. Raises ValueError.
    """
    train, by_labels = splits["train"], config.task == "classify" and not config.relations
    known = labelled(train.labels) if by_labels else torch.ones(len(train.names), dtype=torch.bool)
    if not config.isnet and config.baseline in (None, "gated"):  # no loss uses masks
        return None, known
    if config.resume:  # as checked when the run began
        return kept_masks(config.out, train.images[:, :1].shape)
    prior = config.prior, train, reference, config.prior_blur, config.align, config.device
    masks, stay = from_first(foreground(config.masks, splits, config.data, config.init, prior))
    check_foreground(config.masks, train, masks, stay)
    if not masks[stay & known].any():
        raise ValueError(f"--masks {config.masks}: all masks are empty; draw the foreground in at least one")
    return masks, stay & known


# The objectives


def views_objective(config: Config, model: nn.Module, images: Tensor, priors: Callable | None) -> Callable:
    """DINO's loss over random views of images (N, C, S, S) uint8, plus SPAN's if `priors_over` gave priors.

    Without DINO (--ssl none), or after DINO has collapsed, SPAN's loss is used alone.
    """
    size, p, encoder = images.shape[-1], config.patch_size, pretrained(model)
    always = priors is None or config.keep_going  # DINO goes on even after a collapse
    local_size = max(1, size // 2 // p) * p if isinstance(encoder, ViT) else size // 2
    recipe = size, local_size, config.global_scale, config.local_scale, config.local_crops_number, config.flip

    def losses(index: Tensor, generator: Generator, step: int, total: int) -> tuple[Tensor, dict]:
        views, thetas = multi_crop(rows_at(images, index).float() / 255, generator, *recipe)
        views = [normalise(v) for v in views]  # 2 B global views, and V B local ones
        with torch.autocast(index.device.type, torch.bfloat16, enabled=config.amp):
            if isinstance(model, DINO) and (always or not model.health.collapsed()):
                loss, features = model(views, config.teacher_temp, config.span_layer)
            else:
                loss, features = None, [encoder(v, layer=config.span_layer, patches=False) for v in views]
        if priors is None:
            return loss, {}
        attentions, grids = [f.attention for f in features], [encoder.grid(v) for v in views]
        thetas = thetas if config.follow else None
        prior, confidence, _ = priors(index)
        span = guidance(attentions, prior, thetas, grids, config.span_loss, confidence)
        if loss is None:
            return config.span_weight * span, {"span_loss": span.detach()}
        return loss + config.span_weight * span, {"loss": loss.detach(), "span_loss": span.detach()}

    return losses


def relvit_objective(config: Config, relvit: RelViT, images: Tensor, priors: Callable | None) -> Callable:
    """RelViT's loss over patches of images (N, C, S, S) uint8, plus SPAN's if `priors_over` gave priors."""
    grid, p = relvit.grid, config.patch_size

    def losses(index: Tensor, generator: Generator, step: int, total: int) -> tuple[Tensor, dict]:
        x = rows_at(images, index).float() / 255
        views, boxes, _ = patch_views(x, grid, p, generator, mega=config.mega_patches > 0)
        with torch.autocast(index.device.type, torch.bfloat16, enabled=config.amp):
            loss, scores, features = relvit(normalise(views), layer=config.span_layer)
        if priors is None:
            return loss, scores
        prior, confidence, _ = priors(index)
        prior = F.avg_pool2d(cut(prior, boxes, grid, p), p).flatten(2)  # (B, R, N)
        prior = prior * boxes[:, None, :, 2:].prod(dim=3)  # a larger cell holds more of a prior
        mass = prior.sum(dim=2)
        prior = prior / mass.clamp_min(1e-12)[:, :, None]
        span = span_loss(features.attention, prior, (mass > 0) * confidence[:, None], config.span_loss)
        return loss + config.span_weight * span, {"loss": loss.detach(), **scores, "span_loss": span.detach()}

    return losses


def classifier_objective(
    config: Config, model: nn.Module, images: Tensor, masks: Tensor | None, labels: Tensor, spec: DataSpec
) -> Callable:
    """The loss of images (N, C, S, S) uint8 with labels (N, K), plus ISNet's, a baseline's or RelViT's.

    masks (N, 1, S, S) bool: the foreground, for ISNet's loss, (1) of isnet_lrp.py, and most baselines.
    """
    multiclass, encoder, rule = spec.multiclass, model.encoder, lrp_rule(config)
    layers, pooling = supervised_layers(encoder, config.isnet_layers), (config.isnet_decay, config.isnet_e)
    swap = config.swap if config.isnet else float(config.baseline == "swap")  # share of the images
    narrower = max(1, round(config.swap_margin * images.shape[-1])) if config.swap_margin else 0  # pixels
    wider = round(config.isnet_margin * images.shape[-1])

    def isnet_parts(x: Tensor, m: Tensor, y: Tensor, mean: Tensor, generator: Generator) -> tuple:
        """Logits (B, K) and the parts of ISNet's loss; mean (B,): weights of images, 0 without a mask."""
        m = grown(m, wider)  # outlines have relevance on both sides
        m = whole_patches(m, encoder.patch_size) if isinstance(encoder, ViT) else m
        target = explained_target(y, multiclass, config.explain, generator)
        with attention_seen(encoder, config.isnet_layers) as attention:
            heatmaps, logits = relevance(model, x, target, create_graph=True, layers=layers, **rule)
        heatmap, *inner = heatmaps if layers else [heatmaps]
        grid, ranges = encoder.grid(x), spec.relevance_range
        if config.preset == "published":
            masked, pairs = mean > 0, list(zip(ranges[::2], ranges[1::2]))
            known = masked | ~masked.any()  # all if none has a mask: a mean over none would be NaN
            loss = published_loss([R[known] for R in (heatmap, *inner)], m[known], grid, pairs, *pooling)
            return logits, {"heatmaps": loss * masked.any()}
        background = isnet_background(heatmap, inner, attention, m, grid, *pooling)
        foreground = foreground_loss(heatmap, m, *ranges, hybrid=True)
        return logits, {"background": (background * mean).sum(), "foreground": (foreground * mean).sum()}

    def losses(index: Tensor, generator: Generator, step: int, total: int) -> tuple[Tensor, dict]:
        y, m = labels[index], None if masks is None else rows_at(masks, index).float()
        x, m = shifted(rows_at(images, index), m, config.shift, generator)
        if config.relations:
            x, order = x.float() / 255, None
            if not config.in_order:
                x, _, order = patch_views(x, model.relvit.grid, config.patch_size, generator, shuffle=True)
            features = encoder(normalise(x))
            loss, scores = model.relvit.compare(features.patches, order)
            classification = classification_loss(model.head(features.pooled), y, multiclass)
            return loss + classification, {"classification": classification.detach(), **scores}
        x = swapped(prepared(x), m, generator, swap, narrower) if swap else prepared(x)
        isnet = config.isnet and step % config.isnet_every == 0
        if not isnet and config.baseline not in PENALTIES:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                logits = model(x)
            loss = classification_loss(logits.float(), y, multiclass)
            return loss, {"classification": loss.detach()} if config.isnet else {}
        masked = m.flatten(1).any(dim=1)  # empty masks: only the classification loss
        mean = masked / masked.sum().clamp(min=1)  # (B,), the weights of a mean over the masked
        if config.baseline:
            logits, penalty = PENALTIES[config.baseline](model, x, m, y, multiclass)
            parts, weight = {config.baseline: (penalty * mean).sum()}, config.baseline_weight
        else:
            logits, parts = isnet_parts(x, m, y, mean, generator)
            weight = config.isnet * cosine(step / total, 1, 1.0, config.isnet_end)
            weight /= 1 if multiclass else y.shape[1]  # only one finding of K is explained
        classification = classification_loss(logits, y, multiclass)
        logged = {name: part.detach() for name, part in [("classification", classification), *parts.items()]}
        return classification + weight * sum(parts.values()), logged

    return losses


# The loop


def train(
    config: Config, spec: DataSpec, model: nn.Module, images: Tensor, losses: Callable, saved: dict | None,
    masses_now: Callable[[], dict[str, float]],
) -> list[dict]:  # fmt: skip
    """Train on images (N, C, S, S) with an objective; returns the history, one row per epoch.

    masses_now: see `masses_of`. One generator draws order and views. Checkpoints hold its state and that of
    PyTorch, so a resumed run ends with the weights of an uninterrupted one. Each process takes its share of a
    batch. Raises Collapse, FloatingPointError (before weights are damaged), KeyboardInterrupt (after saving).
    """
    generator = Generator().manual_seed(config.seed)
    optimizer = AdamW(decayed(model, config.weight_decay), config.lr)
    history, begun = restore(saved, model, optimizer, generator) if saved else ([], None)
    share_model(model)
    processes = world_size()
    batch = min(config.batch_size, len(images)) // processes * processes
    steps = len(images) // batch
    total, terminal = steps * config.epochs, sys.stderr.isatty() and not rank()
    print(f"{config.epochs} epoch(s) of {steps} step(s)")
    model.train()
    done = (len(history) * steps + (begun[1] if begun else 0)) * batch
    bar = tqdm(total=total * batch, initial=done, unit="img", smoothing=0.05, disable=not terminal)
    with stop_requests() as stop, bar:
        for epoch in range(len(history), config.epochs):
            order, first, sums = begun or (torch.randperm(len(images), generator=generator), 0, {})
            begun, started = None, time.perf_counter()
            order = from_first(order).to(config.device)
            for i in range(first, steps):
                step = epoch * steps + i
                index = order[i * batch : (i + 1) * batch][rank() :: processes]  # this process's share
                if rank():  # its own views, reproducible after --resume
                    generator.manual_seed((config.seed * total + step) * processes + rank())
                    torch.manual_seed(generator.initial_seed() + 2**40)
                logged = train_step(config, model, losses, optimizer, index, generator, step, total)
                for name, value in logged.items():  # not every step has every value
                    whole, n = sums.get(name, (0.0, 0))
                    sums[name] = whole + value, n + 1
                bar.set_postfix(logged, refresh=False)
                bar.update(batch)
                if over_processes(torch.tensor(float(stop.is_set()), device=index.device)):
                    within = order.cpu(), i + 1, sums
                    save(config, spec, model, optimizer, generator, history, masses_now, within)
                    if processes > 1:
                        dist.barrier()  # the first process that ends makes torchrun end the others
                    flags = " --keep-going" * config.keep_going + " --strict" * config.strict
                    raise KeyboardInterrupt(f"--out {config.out} --resume{flags} continues from here")
            means = {name: whole / n for name, (whole, n) in sums.items()}
            speed = (steps - first) * batch / (time.perf_counter() - started)
            history.append({"epoch": epoch + 1, **means, "images_per_s": round(speed, 1)})
            save(config, spec, model, optimizer, generator, history, masses_now)
            if not terminal and (config.epochs - 1 - epoch) % max(1, config.epochs // 100) == 0:
                words = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
                print(f"epoch {epoch + 1}/{config.epochs}: {words}, {speed:.0f} img/s", flush=True)
    return history


def train_step(
    config: Config, model: nn.Module, losses: Callable, optimizer: Optimizer, index: Tensor,
    generator: Generator, step: int, total: int,
) -> dict[str, float]:  # fmt: skip
    """Step number `step` of `total` on images (B,); returns what to log, as means over all processes."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total)
    collapsed = isinstance(model, DINO) and model.health.collapsed()  # before this step
    optimizer.zero_grad()
    logged, whole = {}, 0.0
    for part in index.tensor_split(min(config.accumulate, len(index))):
        loss, values = losses(part, generator, step, total)
        share = len(part) / len(index)
        (loss * share).backward()
        whole = whole + loss.detach() * share
        for name, value in {"loss": loss.detach(), **values}.items():
            logged[name] = logged.get(name, 0.0) + value * share
    average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
    if not (over_processes(whole).isfinite() and norm.isfinite()):  # in all processes, or none
        sizes = f"the loss is {whole.item():.3g}, its gradient's norm {norm.item():.3g}"
        raise FloatingPointError(f"step {step} is not taken: {sizes}. Lower --lr, or look for outlier images")
    optimizer.step()
    if isinstance(model, DINO):
        model.update_teacher(cosine(step, total, config.momentum, 1.0))
        health = model.health
        if health.collapsed() and not config.keep_going:
            if config.prior == "none" or config.strict:
                raise Collapse(f"{health.diagnosis()}. --keep-going continues anyway")
            if not collapsed:  # it is news
                goes_on = "Training continues with SPAN alone (--strict stops, --keep-going keeps DINO)"
                print(f"\nwarning: {health.diagnosis()}. {goes_on}")
        if config.keep_going or not collapsed:
            logged |= {"teacher_entropy": health.entropy, "kl": health.kl, "prototypes": health.prototypes()}
    values = torch.stack([torch.as_tensor(value, device=index.device).float() for value in logged.values()])
    return dict(zip(logged, over_processes(values).tolist()))


def learning_rate(config: Config, step: int, total: int) -> float:
    """The learning rate at a step: linear warm-up, then half a cosine down to 1 % of --lr."""
    rising = max(1, round(config.warmup * total))
    falling = cosine(max(0, step - rising), max(1, total - rising), config.lr, config.lr / 100)
    return falling * min(1, (step + 1) / rising)


def cosine(step: float, total: float, first: float, last: float) -> float:
    """Half a cosine wave from `first` at step 0 to `last` at step `total`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / total)) / 2


# The command line


def begin(argv: list[str]) -> tuple:
    """Set up what `train` and `finish` need, in the order of the last line. Raises ValueError or OSError."""
    config, typed = parse(argv, __doc__)
    check(config, typed)
    check_folder(config.out, config.resume, config.overwrite)
    run = resumed(config, typed) if config.resume else None
    config = run.config if run else config
    keep_freed_memory()
    config = replace(config, device=join(config.device, config.batch_size))
    if config.task == "classify" and config.device == "cpu":
        torch.set_flush_denormal(True)  # relevance has denormal numbers, which make a CPU slow
    splits, reference = load_data(config)
    train = splits["train"]
    spec = data_spec(train, config.task == "classify", config.data, config.prior, reference)
    check_step(config, len(train.names), world_size())  # before masks are made, which may take minutes
    if run:
        check_spec(config.out, run, spec, train.regions, config.data)
        spec = run.spec  # also knows C1 and C2
    torch.manual_seed(config.seed)
    encoder = make_encoder(config, spec.channels)
    masks, stay = foreground_masks(config, splits, reference)
    check_step(config, int(stay.sum()), world_size())
    if masks is not None and config.swap_margin is None:
        config = replace(config, swap_margin=0.0125 if are_made(config.masks, train.has_masks) else 0.0)
    if config.epochs is None:
        steps = max(1, int(stay.sum()) // config.batch_size)  # per epoch
        config = replace(config, epochs=epochs_for(config.task, config.backbone, steps))
    model = build_model(config, spec, encoder, encoder.grid(train.images)).to(config.device)
    print(f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M encoder weights, on {config.device}")
    kept = slice(None) if stay.all() else stay  # a slice copies nothing
    images = to_device(train.images[kept], config.device)
    if config.task == "classify":
        labels = train.labels[kept].to(config.device)
        foreground_of = None if masks is None else to_device(masks[kept], config.device)
        if config.isnet and not run:
            given = model, images, foreground_of, labels, spec.multiclass
            settings = config.lr, config.batch_size, config.explain, lrp_rule(config), config.seed
            inner = {"layers": config.isnet_layers, "most": 25.0} if config.preset == "published" else {}
            c1_c2 = natural_range(*given, *settings, parts=config.accumulate, **inner)
            spec = spec._replace(relevance_range=from_first(c1_c2))
            print("C1 {:.4g}, C2 {:.4g}: relevance range of a plain classifier".format(*spec.relevance_range))
        losses = classifier_objective(config, model, images, foreground_of, labels, spec)
    else:
        heads = config.pool_heads if config.pool == "simpool" else config.num_heads
        prior = config.prior, train, reference, config.prior_blur, config.align, config.device, heads
        priors = None if config.prior == "none" else priors_over(images, *prior)
        objective = relvit_objective if config.ssl == "relvit" else views_objective
        losses = objective(config, model, images, priors)
    if not run and not rank():
        start_run(config, spec, argv)
        if masks is not None:
            keep_masks(config.out, masks, stay)
    return config, spec, model, splits, reference, masks, images, losses, run.checkpoint if run else None


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 1 for a failed run, 2 for unusable input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            config, spec, model, splits, reference, masks, images, losses, saved = begin(argv)
        except (ValueError, OSError) as error:
            fail("train.py", error, 2)
        started = time.perf_counter()
        masses_now = masses_of(config, model, splits["train"], reference)
        history = train(config, spec, model, images, losses, saved, masses_now)
        if not saved or len(saved["history"]) < len(history):
            print(f"trained in {time.perf_counter() - started:.0f} s{' since --resume' * bool(saved)}")
        if dist.is_initialized():
            dist.destroy_process_group()  # by all at once: NCCL may wait for the others
        if not rank():
            finish(config, spec, model, splits, reference, masks, history)
    except (Collapse, FloatingPointError) as error:
        fail("train.py", error, 1)
    except OSError as error:
        fail("train.py", f"{error}: if the disk is full, free some of it, and continue with --resume", 1)
    except (RuntimeError, MemoryError) as error:
        fail("train.py", remedy_for(error), 1)
    except KeyboardInterrupt as error:
        print(f"\nstopped; {str(error) or 'if an epoch was finished, --resume continues after it'}")
        sys.exit(130)


if __name__ == "__main__":
    main()
