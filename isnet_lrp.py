"""The ISNet loss: classifiers that decide by the foreground (Bassi et al. 2022, arXiv 2202.00232).

A classifier uses whatever predicts the label, including a hospital's marker in a corner. ISNet penalises the
relevance R that LRP (`lrp.py`) finds outside a mask m, 1 in the foreground. Only training needs masks.

    L     = L_class + weight (L_bg(R) + mean_l L_bg(R_l) + mean_a L_att(A_a) + L_fg(R))              (1)
    H     = |R| / its mean in the foreground,  h = sum_n d^n H_n / sum_n d^n,                        (2)
            H_n the n-th largest (from n = 0) of (1 - m) H, d = decay: rank pooling
    L_bg  = -log(1 - u),  u = h / (h + E)                        (E > 0; published: 1)               (3)
    L_fg  = (min(F / C1, 1) - 1)^2 + x^2,  F = sum of |R| in the foreground,                         (4)
            x = max(F / C1 - C2 / C1, 0);  "hybrid": 2 x - 1 in place of x^2 where x > 1
    C1    = max(mean / 5, mean - 3 sd),  C2 = mean + 3 sd, of a plain classifier's sums of |R|       (5)
    L_att = KL(P || A),  P = 1 / n on the n patches that touch the foreground, 0 elsewhere           (6)

R_l is the relevance of an inner layer, A_a an attention map. "Hybrid" is from Faster ISNet (2024, arXiv
2401.08409). (6) is ours: the SPAN loss of `attention_priors.py`, toward a uniform prior.

A network can satisfy the loss and keep its shortcut. Each part closes one way to do so:

    a small marker is averaged away          rank pooling (decay < 1); a small E, so that traces count
    the foreground's relevance is inflated   L_fg
    relevance of two units cancels           the gamma rule instead of the epsilon rule, in a ReLU network
    z' of the gamma rule passes through 0    the signed gamma rule, for residual sums and signed inputs
    another logit reads the marker           log-odds are explained, not one logit
    units respond to the marker's absence    L_bg of inner layers
    saturated attention has no relevance     L_att: attention must lie on the foreground

On absence: suppose a bias activates a unit and the marker silences it. At the marker the silent unit has no
relevance. Where it is active, its relevance goes to the bias, not to pixels, but L_bg sees it in the unit's
own layer. This is no proof: LRP hardly sees what silences units, so a frame or tint around the foreground
passes the loss. Backgrounds swapped between images, as in `train.py`, say nothing about the label if the
masks are exact. Test on images where the shortcut contradicts the label.

Grow exact masks by a few pixels for this loss: an outline has relevance on both of its sides, and classes
that differ in outline are learned far worse if one side is penalised. For a ViT, `whole_patches` grows them:
a patch is one token, which cannot be split.

Where we differ:

    published                                             here
    (1 - P) L_class + P L_heat, `published_loss`          (1); `train.py --preset published` uses theirs
    L_bg + 3 L_fg (LRP Block), L_bg + L_fg (LRP-Flex)     L_bg + L_fg
    epsilon rule, eps = 0.01; z^B rule at the input       signed gamma rule (`lrp.relevance` has all)
    explains the log-odds of the least likely class       the same, or a logit: of any class with equal
      (Selective), or a logit: half the time the highest,   chance, or of the label
      else that of a random other class (Stochastic)
    2022: explains every class                            one score of each image
    pools each channel, averages L_bg over channels       sums |R| over channels; per_channel=True: published
    inner layers have their own C1, C2 and L_fg, and      plain mean of L_bg, no L_fg there
      are pooled by rank
    C2 = min(25 C1, mean + 3 sd)                          no bound by default; `relevance_range` takes one
    biases are detached in denominators (LRP Block)       differentiated; `lrp.relevance` does both
    -                                                     L_att
    Not implemented here:
    hybrid L_fg grows as C1 (x - 1) + 1 above x = 1       2 x - 1, which continues the slope of x^2
    log-odds are bounded, log(p + 0.01) - log(1.01 - p)   log p - log(1 - p)
    batch norm is folded into the convolution before it   a layer of its own
    z^B rule: eps = 0.01, positive biases stay in z       eps = 1e-9, biases cancel
    LRP-Flex: eps at the outputs of ReLUs only            eps in each linear layer
    u is at most 1 - 1e-7; sd over n - 1                  no limit; sd over n

Compute: a plain training step costs 3 forward passes (forward 1, backward 2). The epsilon rule adds 1 for
relevance and 2 for its derivative: at least 2 x a plain step. The gamma rule adds w' x and its derivative:
3 x. The signed gamma rule computes both z and |w| |x|: 4 x.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def background_loss(
    heatmap: Tensor, mask: Tensor, decay: float = 1.0, E: float = 1.0, per_channel: bool = False
) -> Tensor:
    """L_bg, (2) and (3): the background's relevance relative to the foreground's, (B,).

    heatmap (B, C, H, W), signed; mask (B, 1, H, W), 1 in the foreground. decay: 1 averages all pixels, with
    0 in the foreground; below 1, the n-th largest pixel, from n = 0, has weight decay^n. per_channel: pool
    and apply (3) in each channel (the mean in (2) is over all), then average. An image with
    an empty mask has loss 0, with one warning. Raises ValueError for decay or E out of range, and for a mask
    of another shape or with other values.
    """
    if not (0 < decay <= 1 and E > 0):
        raise ValueError(f"background_loss: decay {decay} must be in (0, 1], E {E} above 0")
    R, inside = _checked(heatmap, mask)  # |R| (B, C, H * W), m (B, 1, H * W)
    R = R if per_channel else R.sum(dim=1, keepdim=True)  # (B, 1, H * W)
    size = inside.sum(dim=2)
    if (size == 0).any():
        warnings.warn("background_loss: an image with an empty mask has no background loss", stacklevel=2)
    mean = ((R * inside).sum(dim=2) / size.clamp(min=1)).mean(dim=1, keepdim=True)  # (B, 1)
    least = torch.finfo(R.dtype).tiny ** 0.5  # neither 1 / mean nor its derivative overflows
    outside = R * (1 - inside) / mean.clamp(min=least)[:, :, None]  # (1 - m) H
    n = R.shape[2] if decay == 1 else min(R.shape[2], math.ceil(math.log(1e-6) / math.log(decay)))
    weights = decay ** torch.arange(n, device=R.device, dtype=R.dtype)  # further weights are below 1e-6
    h = (outside.topk(n, dim=2).values * weights).sum(dim=2) / weights.sum()  # (B, C) or (B, 1)
    return (torch.log1p(h / E) * (size > 0)).mean(dim=1)  # log1p(h / E) = -log(1 - u)


def foreground_loss(heatmap: Tensor, mask: Tensor, c1: float, c2: float, hybrid: bool = False) -> Tensor:
    """L_fg, (4): keeps the foreground's relevance F between c1 and c2, (B,).

    Without it, inflating F satisfies the background loss. heatmap (B, C, H, W), mask (B, 1, H, W). hybrid:
    linear above x = 1, so that no outlier dominates the batch. An empty mask gives 1, without a gradient:
    leave such images out. Raises ValueError, also unless 0 < c1 < c2.
    """
    if not 0 < c1 < c2:
        raise ValueError(f"foreground_loss: c1 {c1} and c2 {c2} must be 0 < c1 < c2")
    R, inside = _checked(heatmap, mask)
    F_c1 = (R.sum(dim=1) * inside[:, 0]).sum(dim=1) / c1
    x = (F_c1 - c2 / c1).clamp(min=0)
    above = torch.where(x > 1, 2 * x - 1, x.square()) if hybrid else x.square()
    return (F_c1.clamp(max=1) - 1).square() + above


def isnet_background(
    heatmap: Tensor, layers: list[Tensor], attention: list[Tensor], mask: Tensor, grid: tuple[int, int],
    decay: float = 1.0, E: float = 1.0,
) -> Tensor:  # fmt: skip
    """L_bg(R) + mean_l L_bg(R_l) + mean_a L_att(A_a) of (1): (B,). L_att is a mean over the batch.

    heatmap (B, C, H, W) and mask (B, 1, H, W) as in `background_loss`. layers: relevance of inner layers,
    maps (B, D, h, w) or tokens (B, T, D); attention: maps (B, heads, T). The last h * w tokens lie on the
    grid (h, w). An inner position is background if it covers no foreground at all.
    """
    h, w = grid
    loss = background_loss(heatmap, mask, decay, E)
    for R in layers:
        R = _as_map(R, grid)
        covers = F.adaptive_max_pool2d(mask.float(), R.shape[2:])
        loss = loss + background_loss(R, covers, decay, E) / len(layers)
    covers = F.adaptive_max_pool2d(mask.float(), grid).flatten(2)  # (B, 1, N)
    for A in attention:
        loss = loss + attention_loss(A[:, :, -h * w :], covers) / len(attention)
    return loss


def published_loss(
    heatmaps: list[Tensor], mask: Tensor, grid: tuple[int, int], ranges: list[tuple[float, float]],
    decay: float = 0.9, E: float = 1.0, layer_decay: float = 0.8,
) -> Tensor:  # fmt: skip
    """L_heat of Faster ISNet, a scalar: L_bg + L_fg of the image and of inner layers, pooled by rank.

    heatmaps: relevance of the image (B, C, H, W) and of layers, as in `isnet_background`; ranges: C1 and C2
    of each. The n-th largest of their means over the batch has weight layer_decay^n, from n = 0. Defaults are
    those of RunISNetFlex.py. Raises ValueError as `background_loss` and `foreground_loss` do, or for fewer or
    more ranges than heatmaps.
    """
    losses = []
    for R, (c1, c2) in zip(heatmaps, ranges, strict=True):
        R = _as_map(R, grid)
        m = F.adaptive_max_pool2d(mask.float(), R.shape[2:])
        loss = background_loss(R, m, decay, E, per_channel=True) + foreground_loss(R, m, c1, c2, hybrid=True)
        losses.append(loss.mean())
    weights = layer_decay ** torch.arange(len(losses), device=mask.device)
    return (torch.stack(losses).sort(descending=True).values * weights).sum() / weights.sum()


def attention_loss(attention: Tensor, foreground: Tensor) -> Tensor:
    """L_att, (6), averaged over heads and the images with foreground: a scalar.

    attention (B, heads, N), normalised here; foreground (B, 1, N), 1 on patches that touch it, else 0.
    """
    A = attention.to(torch.promote_types(attention.dtype, torch.float32))
    A = A / A.sum(dim=2, keepdim=True).clamp_min(1e-12)
    P = (foreground / foreground.sum(dim=2, keepdim=True).clamp(min=1)).expand_as(A)
    log_A = A.clamp_min(1e-30).log()  # lower, P / A may overflow; higher, a saturated head can't learn
    losses = (torch.xlogy(P, P) - P * log_A).sum(dim=2)  # (B, heads)
    weight = foreground.amax(dim=2).expand_as(losses)
    return (weight * losses).sum() / weight.sum().clamp_min(1e-12)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """The log-odds (B,) of classes (B,) from logits (B, K): z_c - log sum_{k != c} exp z_k.

    Selective ISNet explains the least likely class, `logits.argmin(dim=1)`.
    Raises ValueError for a single logit, which is a log-odds itself.
    """
    if logits.shape[1] < 2:
        raise ValueError("one logit is a log-odds itself: explain logits[:, 0]")
    chosen = F.one_hot(classes, logits.shape[1]).bool()
    return (logits * chosen).sum(dim=1) - logits.masked_fill(chosen, -torch.inf).logsumexp(dim=1)


def whole_patches(masks: Tensor, patch_size: int) -> Tensor:
    """Masks (B, 1, H, W), 0 or 1, grown to whole patches: the foreground for a ViT."""
    H, W = masks.shape[2:]
    touched = F.max_pool2d(masks.float(), patch_size, ceil_mode=True)  # (B, 1, h, w)
    return touched.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)[:, :, :H, :W]


def relevance_range(totals: Tensor, most: float = math.inf) -> tuple[float, float]:
    """C1 and C2, (5), from a plain classifier's sums of |R| over images (N,). most: C2 / C1, published 25.

    Raises FloatingPointError unless 0 < C1 < C2 < infinity.
    """
    mean, sd = totals.mean().item(), totals.std(correction=0).item()
    c1 = max(mean / 5, mean - 3 * sd)
    c2 = min(mean + 3 * sd, most * c1)
    if not 0 < c1 < c2 < math.inf:
        sizes = f"mean {mean:.3g}, deviation {sd:.3g}"
        remedy = "give masks to more images, or lower the learning rate"
        raise FloatingPointError(f"a plain classifier's relevance has no range ({sizes}): {remedy}")
    return c1, c2


def _as_map(R: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, D, h, w) as they are; of tokens (B, T, D), the last h * w as maps (B, D, h, w)."""
    return R[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid) if R.dim() == 3 else R


def _checked(heatmap: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """|R| (B, C, H * W) and the mask (B, 1, H * W), in float32 or better. Raises ValueError."""
    if mask.shape != (len(heatmap), 1, *heatmap.shape[2:]):
        shapes = f"mask {tuple(mask.shape)} does not fit heatmap {tuple(heatmap.shape)}"
        raise ValueError(f"{shapes}: give (B, 1, H, W)")
    inside = mask.to(torch.promote_types(heatmap.dtype, torch.float32)).flatten(2)
    if not ((inside == 0) | (inside == 1)).all():
        raise ValueError("a mask must hold only 0 (background) and 1 (foreground): threshold it first")
    return heatmap.to(inside.dtype).abs().flatten(2), inside


if __name__ == "__main__":
    from common import holes

    holes.isnet_lrp()  # prints a few facts and draws isnet_lrp.png
