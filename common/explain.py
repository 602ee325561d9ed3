"""What models say about images (M, C, S, S) uint8, in evaluation mode: attention, scores, relevance."""

import math

import torch
from torch import Tensor, nn

from common.data import Data, at_a_time, batches, normalise
from common.metrics import localisation_ap
from isnet_lrp import log_odds
from lrp import relevance
from relvit import RelViT, patch_views
from resnet import ResNet
from simpool import GAP

EXPLAINED = 32  # images at a time whose relevance is computed: each keeps its graph


@torch.no_grad()
def attention_of(encoder: nn.Module, images: Tensor, layer: int) -> Tensor:
    """One block's attention (M, heads, N)."""
    encoder.eval()
    return torch.cat([encoder(x, layer=layer).attention.cpu() for x in batches(images, encoder)])


def pools_evenly(encoder: nn.Module) -> bool:
    """Whether an encoder pools its patches by their mean: there is no attention to show."""
    return encoder.pool is None if isinstance(encoder, ResNet) else isinstance(encoder.pool, GAP)


def has_attention(encoder: nn.Module, baseline: str | None) -> bool:
    """Whether there is attention to show; not in a pipeline, whose encoder sees only the foreground."""
    return not pools_evenly(encoder) and baseline != "pipeline"


@torch.no_grad()
def scores_of(model: nn.Module, images: Tensor, multiclass: bool) -> Tensor:
    """Log-odds (M, K) of classes, or logits of findings."""
    model.eval()
    logits = torch.cat([model(x).cpu() for x in batches(images, model)])
    if not multiclass:
        return logits
    M, K = logits.shape
    return torch.stack([log_odds(logits, torch.full((M,), k)) for k in range(K)], dim=1)


def relevance_of(model: nn.Module, images: Tensor, multiclass: bool, rule: dict) -> Tensor:
    """LRP heatmaps (M, C, S, S) of the first finding, the second of two classes, the likeliest of more."""

    def target(logits: Tensor) -> Tensor:
        if not multiclass:
            return logits[:, 0]
        likeliest = logits.argmax(dim=1)
        return log_odds(logits, likeliest if logits.shape[1] > 2 else torch.ones_like(likeliest))

    model.eval()
    heatmaps = (relevance(model, x, target, **rule)[0] for x in batches(images, model, EXPLAINED))
    return torch.cat([R.cpu() for R in heatmaps])


def explained_class(classes: tuple[str, ...], multiclass: bool) -> str:
    """What `relevance_of` explains, in words."""
    return "the likeliest class" if multiclass and len(classes) > 2 else classes[int(multiclass)]


def decisions(model: nn.Module, images: Tensor, multiclass: bool, classes: tuple) -> list[list[str]]:
    """A classifier's decisions in words, by image: first what `relevance_of` explains, then the likeliest."""
    said, explained = [], explained_class(classes, multiclass)
    for chances in scores_of(model, images, multiclass).sigmoid().tolist():
        ranked = sorted(zip(classes, chances), key=lambda pair: (pair[0] != explained, -pair[1]))
        said.append([f"{name} {100 * chance:.0f} %" for name, chance in ranked[:4]])
    return said


def scores_in(
    model: nn.Module, data: Data, heads: dict[str, int], multiclass: bool | None, layer: int
) -> tuple[str, list[float]]:
    """The name of an image's score, and the scores (M,), NaN if unknown; heads: {region: number}."""
    if multiclass is not None and data.findings:
        p, y = scores_of(model, data.images, multiclass).sigmoid(), data.labels  # (M, K)
        if multiclass:
            true = (p * y).sum(dim=1).masked_fill(y.sum(dim=1) != 1, torch.nan)  # of no class, or of two
            return "probability of the true class", true.tolist()
        true = torch.where(y == 1, p, 1 - p).masked_fill(y.isnan(), torch.nan).nanmean(dim=1)
        return "probability of what is true, mean of the findings", true.tolist()
    if multiclass is None and set(data.regions) == set(heads) and data.has_masks.any():
        attention = attention_of(model, data.images, layer)[:, list(heads.values())]
        regions = [data.regions.index(region) for region in heads]
        ap = localisation_ap(attention, data.masks[:, regions], model.grid(data.images))  # (M, R, R)
        return "mean AP", ap.diagonal(dim1=1, dim2=2).nanmean(dim=1).tolist()
    return "", [math.nan] * len(data.names)


@torch.no_grad()
def related(
    relvit: RelViT, images: Tensor, joint: bool, patch_size: int, mega: bool, in_order: bool
) -> dict[str, float]:
    """RelViT's metrics, TASK_test, on images (M, C, S, S) uint8 that it has not seen, cut as in training.

    joint: with labels, so with positions; its patches may keep their order. mega: cut into mega-patches.
    """
    generator, found, errors = torch.Generator().manual_seed(0), {}, ("distances", "angles")
    relvit.eval()
    device = next(relvit.parameters()).device
    for x in images.split(at_a_time(64, images)):
        x, order = x.to(device).float() / 255, None
        if not in_order:
            x, _, order = patch_views(x, relvit.grid, patch_size, generator, mega, shuffle=joint)
        patches = relvit.encoder(normalise(x), positions=joint).patches
        for task, value in relvit.compare(patches, order)[1].items():  # errors are squared before their mean
            value = float(value) ** (2 if task in errors else 1)
            found[task] = found.get(task, 0.0) + value * len(x) / len(images)
    found = {task: v**0.5 if task in errors else v for task, v in found.items()}
    kinds = {task: "error" if task in errors else "accuracy" for task in found}
    levels = [f"{kinds[t]} of {t} {value:.3f} ({relvit.chance[t]:.3f})" for t, value in found.items()]
    print(f"on test images (in brackets: a constant prediction): {', '.join(levels)}")
    return {f"{task}_test": value for task, value in found.items()}
