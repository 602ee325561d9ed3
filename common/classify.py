"""A classifier, its loss, and what ISNet needs from it during training.

Labels are multi-hot: findings, each present or not (a sigmoid each), or classes, of which each image has one
(multiclass, a softmax). NaN is unknown.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from common.data import at_a_time, prepared, rows_at
from isnet_lrp import log_odds, relevance_range
from lrp import relevance
from vit import Attention, Block, PatchEmbed

WARM_UP = 5  # epochs of the plain classifier that C1 and C2 are taken from


class Classifier(nn.Module):
    """An encoder and a linear layer: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).pooled)


def is_multiclass(labels: Tensor) -> bool:
    """Whether labels (N, K), NaN for unknown, give each image one class of several."""
    known = labels[~labels.isnan().all(dim=1)]
    return labels.shape[1] > 1 and bool((known.sum(dim=1) == 1).all())


def labelled(labels: Tensor) -> Tensor:
    """Which images (N,) have a label (N, K) to learn; prints how many have none."""
    known = (~labels.isnan()).any(dim=1)
    if lost := int((~known).sum()):
        print(f"note: {lost} of {len(known)} training images have no label and are left out of training")
    return known


def classification_loss(logits: Tensor, labels: Tensor, multiclass: bool) -> Tensor:
    """Cross-entropy of logits (B, K) with classes, or the mean binary cross-entropy over known findings."""
    known = ~labels.isnan()
    if multiclass:
        rows = known.all(dim=1)
        return F.cross_entropy(logits[rows], labels[rows]) if rows.any() else logits.sum() * 0
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def constant_loss(labels: Tensor, multiclass: bool) -> float:
    """The classification loss of the best constant prediction for labels (N, K)."""
    rates = labels.nanmean(dim=0).clamp(1e-6, 1 - 1e-6)  # (K,)
    logits = rates.log() if multiclass else rates.logit()
    return float(classification_loss(logits.nan_to_num().expand(labels.shape), labels, multiclass))


def shifted(x: Tensor, m: Tensor | None, most: float, generator: Generator) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, H, W) and masks (B, 1, H, W), each rolled at random by up to `most` of a side."""
    if not most:
        return x, m
    moves = (2 * torch.rand(len(x), 2, generator=generator) - 1) * most * torch.tensor(x.shape[2:])
    pixels = moves.round().int().tolist()  # down and to the right, (B, 2)
    x = torch.stack([image.roll(by, (1, 2)) for image, by in zip(x, pixels)])
    return x, None if m is None else torch.stack([mask.roll(by, (1, 2)) for mask, by in zip(m, pixels)])


def explained_target(
    labels: Tensor, multiclass: bool, explain: str, generator: Generator
) -> Tensor | Callable:
    """What to explain in each image, as a target for `relevance`; labels (B, K).

    Of classes: the logit of the label, of a random class ("random"; Stochastic ISNet prefers the highest), or
    the log-odds of the class that the model finds least likely ("selective"). Of findings: the logit of a
    random one, which is its log-odds already; with "label" it is one of those present, if there are any.
    """
    if multiclass and explain == "selective":
        return lambda logits: log_odds(logits, logits.argmin(dim=1))
    wanted = torch.ones(labels.shape)
    if explain == "label":
        present = (labels == 1).float().cpu()
        wanted = torch.where(present.any(dim=1, keepdim=True), present, wanted)
    chosen = torch.multinomial(wanted, 1, generator=generator)[:, 0]
    return F.one_hot(chosen, labels.shape[1]).float().to(labels.device)


def supervised_layers(encoder: nn.Module, which: str = "all") -> list[nn.Module]:
    """The modules whose outputs' relevance ISNet supervises. which: "none"; "blocks", as published; else all
    normalisations, which includes units within blocks, and the patch embedding and blocks of a ViT.
    """
    if which in ("none", "blocks"):
        return list(encoder.blocks) if which == "blocks" else []
    kinds = nn.BatchNorm2d, nn.LayerNorm, PatchEmbed, Block
    layers = [m for m in encoder.modules() if isinstance(m, kinds)]
    if encoder.pool is not None:  # the last norm runs twice then, once on patches that nothing depends on
        layers = [m for m in layers if m is not getattr(encoder, "norm", None)]
    return layers


@contextmanager
def attention_seen(encoder: nn.Module, which: str = "all") -> Iterator[list[Tensor]]:
    """Collects two maps (B, heads, T) for each attention layer of an encoder that runs inside this context.

    They hold how much the CLS token attends to each token, and how much all tokens do on average. An encoder
    without CLS lacks the first; if its pooling is learned, it gives that attention (B, heads, N) once. which:
    as in `supervised_layers`; unless it is "all", nothing is collected.
    """
    seen: list[Tensor] = []
    if which != "all":
        yield seen
        return

    def collect(attention: Attention, inputs: tuple[Tensor]) -> None:
        q, k, _ = attention.split(inputs[0])
        weights = Attention.weights(q, k)  # (B, heads, T, T)
        seen.extend([weights[:, :, 0]] if encoder.pool is None else [])
        seen.append(weights.mean(dim=2))

    hooks = [m.register_forward_pre_hook(collect) for m in encoder.modules() if isinstance(m, Attention)]
    if encoder.pool is not None and any(p.requires_grad for p in encoder.pool.parameters()):
        hooks.append(encoder.register_forward_hook(lambda m, x, features: seen.append(features.attention)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def natural_range(
    model: Classifier, images: Tensor, masks: Tensor, labels: Tensor, multiclass: bool, lr: float,
    batch_size: int, explain: str, rule: dict, seed: int, layers: str = "none", most: float = math.inf,
    parts: int = 1,
) -> tuple[float, ...]:  # fmt: skip
    """C1 and C2 of the foreground loss: `relevance_range` of a plain classifier's heatmaps.

    A copy of the model is trained for WARM_UP epochs without ISNet on images (N, C, S, S) uint8; heatmaps are
    made for up to 512 images with masks (N, 1, S, S). layers: as in `supervised_layers`; their C1 and C2 come
    after the input's. most: the largest C2 / C1. parts: of each batch, to save memory, as by --accumulate.
    Raises FloatingPointError if the relevance has no range.
    """
    print(f"training a plain classifier for {WARM_UP} epochs, to measure its relevance ...", flush=True)
    plain, generator = copy.deepcopy(model).train(), Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=lr)
    for _ in range(WARM_UP):
        order = torch.randperm(len(images), generator=generator).to(labels.device)
        for index in order.split(batch_size):
            if len(index) == 1 < batch_size:  # a last batch of one image
                continue
            optimizer.zero_grad()
            for part in index.tensor_split(min(parts, max(1, len(index) // 2))):  # BatchNorm needs two
                logits = plain(prepared(rows_at(images, part)))
                (classification_loss(logits, labels[part], multiclass) * len(part) / len(index)).backward()
            optimizer.step()
    inner, totals = supervised_layers(plain.eval().encoder, layers), []
    masked = masks.flatten(1).any(dim=1).nonzero()[:, 0]
    chosen = torch.randperm(len(masked), generator=generator)[:512]  # of all classes
    masked = masked[chosen].to(labels.device)
    for index in masked.split(at_a_time(min(64, math.ceil(batch_size / parts)), images)):
        target = explained_target(labels[index], multiclass, explain, generator)
        heatmaps, _ = relevance(plain, prepared(rows_at(images, index)), target, layers=inner, **rule)
        heatmaps = heatmaps if inner else [heatmaps]
        totals.append(torch.stack([R.detach().abs().flatten(1).sum(dim=1) for R in heatmaps]))
    return tuple(c for sums in torch.cat(totals, dim=1) for c in relevance_range(sums, most))


def warn_if_constant(last: dict[str, float], labels: Tensor, multiclass: bool) -> None:
    """Print a warning if a classifier, by its last losses, is no better than a constant prediction."""
    loss, constant = last.get("classification", last["loss"]), constant_loss(labels, multiclass)
    if loss > 0.97 * constant:
        why = f"classification loss {loss:.2f} is no better than a constant prediction ({constant:.2f})"
        isnet = {"background", "heatmaps"} & last.keys()  # by default, published
        remedy = "more --epochs, or a smaller --isnet" if isnet else "or more --epochs"
        print(f"warning: {why}: try another --seed or --lr, {remedy}")
