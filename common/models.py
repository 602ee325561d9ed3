"""A classifier, plain or kept off the background: an encoder, a linear layer, and ISNet's training step.

A classifier takes what predicts the label, a hospital's marker as gladly as a heart. ISNet (`isnet_lrp.py`)
trains it with a heatmap beside each prediction and punishes relevance outside a mask,

    L = L_class + weight (L_bg(image) + mean of L_bg(inner layers) + mean of L_span(attention) + L_fg(image)),

and needs the masks no more once it is trained. A convnet's weight falls along half a cosine: L_bg pulls with
its full strength as long as any relevance is left there, and the label is learned against that pull; once a
way past the shortcut is found, a tenth of the weight keeps to it.

What hides a shortcut from these losses, and what finds it, is told in `isnet_lrp.py`. A ViT can hide it in
its attention: the marker's token draws a head's attention off all others and adds nothing itself, so that
what is missing tells the label. The softmax is saturated there and the token's value zero: no relevance, by
the rules here. And where relevance alone is punished, or attention outside the mask by L_bg, that is met by
attention saturated on one or two patches, from which little can be learned. So attention is guided as in SPAN
(`attention_priors.py`), toward all of the foreground alike.

Labels are multi-hot: findings, each present or not by itself (a sigmoid each), or classes, of which each
image has one (a softmax). Next to read: `train.py`.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from attention_priors import span_loss
from common.baselines import PENALTIES, swapped
from common.data import BATCH, batches, normalise, prepared
from isnet_lrp import background_loss, foreground_loss, relevance
from relvit import patch_views
from resnet import ResNet
from simpool import GAP
from vit import Attention, Block, PatchEmbed, ViT

EXPLAINED = 32  # images at a time whose relevance is asked for: each keeps its graph
WARM_UP = 5  # epochs of a plain classifier, before its range of relevance is taken


class Classifier(nn.Module):
    """An encoder and a linear layer: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).pooled)


def exclusive(labels: Tensor) -> bool:
    """Whether labels (N, K), multi-hot with NaN for unknown, give each image one class of several."""
    known = labels[~labels.isnan().all(dim=1)]
    return labels.shape[1] > 1 and bool((known.sum(dim=1) == 1).all())


def classification_loss(logits: Tensor, labels: Tensor, one_class: bool) -> Tensor:
    """Cross-entropy of logits (B, K) with classes, or the mean of binary ones with the known findings."""
    known = ~labels.isnan()
    if one_class:
        rows = known.all(dim=1)
        return F.cross_entropy(logits[rows], labels[rows]) if rows.any() else logits.sum() * 0
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def constant_loss(labels: Tensor, one_class: bool) -> float:
    """The classification loss of the best answer that is the same for all images, from labels (N, K)."""
    shares = labels.nanmean(dim=0).clamp(1e-6, 1 - 1e-6)  # (K,)
    logits = shares.log() if one_class else shares.logit()
    return float(classification_loss(logits.nan_to_num().expand(labels.shape), labels, one_class))


def explained(labels: Tensor, one_class: bool, explain: str, generator: Generator) -> Tensor | Callable:
    """What to explain of each image, as a target for `relevance`.

    Of classes: the logit of the label, of a random class, or ("selective") the log-odds of the class that the
    model holds least likely. A finding's logit is its log-odds already; so of findings one is drawn, for
    "label" among those that are present if there are any.
    """
    K = labels.shape[1]
    if one_class and explain == "selective":
        return lambda logits: log_odds(logits, logits.argmin(dim=1))
    wanted = torch.ones(labels.shape)
    if explain == "label":
        present = (labels == 1).float().cpu()
        wanted = torch.where(present.any(dim=1, keepdim=True), present, wanted)
    chosen = torch.multinomial(wanted, 1, generator=generator)[:, 0]
    return F.one_hot(chosen, K).float().to(labels.device)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-odds (B,) of classes (B,) by the logits (B, K): z_c - log sum_{k != c} exp z_k."""
    chosen = F.one_hot(classes, logits.shape[1]).bool()
    return (logits * chosen).sum(dim=1) - logits.masked_fill(chosen, -torch.inf).logsumexp(dim=1)


def supervised_layers(encoder: nn.Module, which: str) -> list[nn.Module]:
    """The modules whose outputs' relevance is supervised besides the image's, unless `which` is none.

    All normalisations, so that the units within a block are among them, and the patches and blocks of a ViT.
    """
    kinds = nn.BatchNorm2d, nn.LayerNorm, PatchEmbed, Block
    layers = [m for m in encoder.modules() if isinstance(m, kinds)]
    if encoder.pool is not None:  # the last norm runs twice then, on the patches for nothing
        layers = [m for m in layers if m is not getattr(encoder, "norm", None)]
    return [] if which == "none" else layers


def rule(args: argparse.Namespace) -> dict[str, float | bool]:
    """The relevance rule that the settings ask for, as arguments of `relevance`."""
    return {"epsilon": args.lrp_epsilon, "gamma": args.lrp_gamma, "signed": True}


def whole_patches(masks: Tensor, patch_size: int) -> Tensor:
    """Masks (B, 1, H, W), 0 or 1, grown to the patches that they touch.

    So ISNet's for a ViT: patches are embedded by a linear map, which can't leave out some of their pixels.
    """
    touched = F.max_pool2d(masks, patch_size)
    return touched.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def isnet_losses(
    model: Classifier, images: Tensor, masks: Tensor, target: Tensor | Callable, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """The background losses (B,), the image's heatmap (B, C, H, W) and the logits (B, K), to train through.

    masks (B, 1, H, W), 1 in the foreground. To the background loss of the heatmap come the mean of those of
    the supervised layers' relevance, where a position counts as background if it covers no foreground at all,
    and the mean SPAN loss of the attention, whose prior is even over the positions that cover some.
    """
    layers = supervised_layers(model.encoder, args.isnet_layers)
    with attention_seen(model.encoder if args.isnet_layers == "all" else None) as attention:
        heatmaps, logits = relevance(model, images, target, **rule(args), create_graph=True, layers=layers)
    heatmap, *inner = heatmaps if layers else [heatmaps]
    loss = background_loss(heatmap, masks, args.isnet_decay, args.isnet_e)
    h, w = model.encoder.grid(images)
    for R in inner:
        if R.dim() == 3:  # tokens (B, T, D): a CLS token, perhaps, before the N patches
            R = R[:, R.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
        covers = F.adaptive_max_pool2d(masks, R.shape[2:])
        loss = loss + background_loss(R, covers, args.isnet_decay, args.isnet_e) / len(inner)
    covers = F.adaptive_max_pool2d(masks, (h, w)).flatten(2)  # (B, 1, N)
    prior, maps = covers / covers.sum(dim=2, keepdim=True).clamp(min=1), len(attention)
    for A in attention:
        A = A[:, :, A.shape[2] - h * w :]  # (B, heads, N)
        loss = loss + span_loss(A, prior.expand_as(A), covers.amax(dim=2).expand(A.shape[:2])) / maps
    return loss, heatmap, logits


@contextmanager
def attention_seen(encoder: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects two maps (B, heads, T) for each attention layer of an encoder that runs meanwhile.

    They say how much the CLS token looks at each token, and how much all tokens do on average. An encoder
    without CLS gives, in place of the first, the attention (B, heads, N) of its pooling, if that is learned.
    """
    seen: list[Tensor] = []
    pool = None if encoder is None else encoder.pool

    def look(attention: Attention, inputs: tuple[Tensor]) -> None:
        q, k, _ = attention.split(inputs[0])
        weights = Attention.weights(q, k)  # (B, heads, T, T)
        seen.extend([] if pool is not None else [weights[:, :, 0]])
        seen.append(weights.mean(dim=2))

    modules = [] if encoder is None else [m for m in encoder.modules() if isinstance(m, Attention)]
    hooks = [m.register_forward_pre_hook(look) for m in modules]
    if pool is not None and any(p.requires_grad for p in pool.parameters()):
        hooks.append(
            encoder.register_forward_hook(lambda m, inputs, features: seen.append(features.attention))
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def natural_range(
    model: Classifier, images: Tensor, masks: Tensor, labels: Tensor, args: argparse.Namespace
) -> list[float]:
    """C1 and C2 for the foreground loss, from a plain classifier's heatmaps (Bassi et al. 2022).

    A copy of the model is trained for WARM_UP epochs without ISNet; with mean and deviation of its total |R|,
    all of which belongs into the foreground, C1 = max(mean / 5, mean - 3 sd) and C2 = mean + 3 sd. Arguments
    as for `objective`.
    """
    plain, generator = copy.deepcopy(model).train(), Generator().manual_seed(args.seed)
    optimizer, one_class = torch.optim.AdamW(plain.parameters(), lr=args.lr), exclusive(labels)
    for _ in range(WARM_UP):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for index in order.split(args.batch_size):
            if len(index) == 1:  # has no variance to normalise by
                continue
            loss = classification_loss(plain(prepared(images[index])), labels[index], one_class)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    plain.eval()
    total = []
    has_mask = torch.cat([part.flatten(1).any(dim=1) for part in masks.split(BATCH)])
    for index in has_mask.nonzero()[:512, 0].split(64):
        target = explained(labels[index], one_class, args.explain, generator)
        heatmap, _ = relevance(plain, prepared(images[index]), target, **rule(args))
        total.append(heatmap.detach().abs().sum(dim=(1, 2, 3)))
    mean, sd = torch.cat(total).mean().item(), torch.cat(total).std(correction=0).item()
    c1, c2 = max(mean / 5, mean - 3 * sd), mean + 3 * sd
    if not 0 < c1 < c2 < math.inf:
        raise FloatingPointError(
            f"a plain classifier's relevance has no range (mean {mean:.3g}, deviation {sd:.3g}): give masks "
            "to more images, or lower --lr"
        )
    return [c1, c2]


def objective(
    args: argparse.Namespace, model: Classifier, images: Tensor, masks: Tensor | None, labels: Tensor
) -> Callable[[Tensor, Generator, float], tuple[Tensor, dict[str, Tensor]]]:
    """The training loss as losses(index (B,), generator, share of the training done): (loss, what to log).

    images (N, C, S, S) uint8, masks (N, 1, S, S) bool, needed with --isnet and most baselines, labels (N, K)
    multi-hot, NaN for unknown. With --isnet, args.relevance_range is C1 and C2. With --relations, the model
    has a `relvit`, which learns them from the same shuffled patches.
    """
    one_class = exclusive(labels)

    def losses(index: Tensor, generator: Generator, done: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        known = labels[index]
        if args.relations:
            views = images[index].float() / 255, model.relvit.grid, args.patch_size, generator
            views, _, order = patch_views(*views, shuffle=True)
            features = model.encoder(normalise(views))
            loss, shown = model.relvit.compare(features.patches, order)
            classification = classification_loss(model.head(features.pooled), known, one_class)
            loss = loss + classification
            return loss, {"loss": loss.detach(), "classification": classification.detach(), **shown}
        x, inside = prepared(images[index]), None if masks is None else masks[index].float()
        if args.baseline == "swap":
            x = swapped(x, inside, generator)
        if not args.isnet and args.baseline not in PENALTIES:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(x)
            loss = classification_loss(logits.float(), known, one_class)
            return loss, {"loss": loss.detach()}
        has_mask = inside.flatten(1).any(dim=1)  # the others have no loss but that of classification
        share = has_mask / has_mask.sum().clamp(min=1)
        if args.baseline:
            logits, penalty = PENALTIES[args.baseline](model, x, inside, known, one_class)
            classification, penalty = classification_loss(logits, known, one_class), (penalty * share).sum()
            loss = classification + args.baseline_weight * penalty
            return loss, {"loss": loss.detach(), "classification": classification.detach()} | {
                args.baseline: penalty.detach()
            }
        if isinstance(model.encoder, ViT):
            inside = whole_patches(inside, model.encoder.patch_size)
        target = explained(known, one_class, args.explain, generator)
        background, heatmap, logits = isnet_losses(model, x, inside, target, args)
        foreground = foreground_loss(heatmap, inside, *args.relevance_range, hybrid=True)
        parts = {
            "classification": classification_loss(logits, known, one_class),
            "background": (background * share).sum(),
            "foreground": (foreground * share).sum(),
        }
        explained_share = 1 if one_class else 1 / known.shape[1]  # one finding of K, as in the mean of all
        left = args.isnet_end + (1 - args.isnet_end) * (1 + math.cos(math.pi * done)) / 2
        weight = args.isnet * left * explained_share
        loss = parts["classification"] + weight * (parts["background"] + parts["foreground"])
        return loss, {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    return losses


is_multiclass = exclusive


@torch.no_grad()
def scores_of(model: nn.Module, images: Tensor, multiclass: bool) -> Tensor:
    """Log-odds (M, K) of classes, or logits of findings, of images (M, C, S, S) uint8, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(x).cpu() for x in batches(images, model)])
    if not multiclass:
        return logits
    return torch.stack(
        [log_odds(logits, torch.full((len(logits),), k)) for k in range(logits.shape[1])], dim=1
    )


def relevance_of(model: nn.Module, images: Tensor, multiclass: bool, rule: dict) -> Tensor:
    """LRP heatmaps (M, C, S, S) of the first finding, the second of two classes, the likeliest of more."""

    def target(logits: Tensor) -> Tensor:
        if not multiclass:
            return logits[:, 0]
        likeliest = logits.argmax(dim=1)
        return log_odds(logits, likeliest if logits.shape[1] > 2 else torch.ones_like(likeliest))

    model.eval()
    heatmaps = (relevance(model, x, target, **rule)[0] for x in batches(images, model, EXPLAINED))
    return torch.cat([R.detach().cpu() for R in heatmaps])


def explained_class(classes: list[str], multiclass: bool) -> str:
    """What `relevance_of` explains, in words."""
    if multiclass and len(classes) > 2:
        return "the likeliest class"
    return classes[int(multiclass)]


def decisions(model: nn.Module, images: Tensor, multiclass: bool, classes: list[str]) -> list[list[str]]:
    """What a classifier says of each image (M, C, S, S) uint8, in words: what `relevance_of` explains, if it
    is always the same, and then the likeliest, four in all.
    """
    said = []
    for chances in scores_of(model, images, multiclass).sigmoid().tolist():
        ranked = sorted(zip(classes, chances), key=lambda pair: -pair[1])
        ranked.sort(key=lambda pair: pair[0] != explained_class(classes, multiclass))  # the others stay
        said.append([f"{name} {100 * chance:.0f} %" for name, chance in ranked[:4]])
    return said


@torch.no_grad()
def attention_of(encoder: nn.Module, images: Tensor, layer: int) -> Tensor:
    """One block's attention (M, heads, N) over images (M, C, S, S) uint8, in evaluation mode."""
    encoder.eval()
    return torch.cat([encoder(x, layer=layer).attention.cpu() for x in batches(images, encoder)])


def pools_evenly(encoder: nn.Module) -> bool:
    """Whether an encoder pools its patches by their mean, so that it looks at all alike."""
    return encoder.pool is None if isinstance(encoder, ResNet) else isinstance(encoder.pool, GAP)
