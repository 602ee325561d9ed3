"""SPAN: attention heads guided by spatial priors (Miao et al. 2022, arXiv 2209.03745).

Often we know where things are in an image: lungs and heart in a chest X-ray, the parts of a product under
a fixed camera. SPAN guides some attention heads of a ViT, each with one prior. The other heads stay free, and
self-supervised training goes on as before. Priors come from one labelled reference image, or from statistics
of unlabelled images. There is no public code; equation numbers are ours (theta maps a view to its image):

    P_r   = prior_r(theta x), averaged over each patch, normalised to sum 1 over patches       (1) `follow`
    s_r   = fraction of prior_r's mass that the view sees, in [0, 1]                           (2) `follow`
    A_r   = the CLS row of head r over the patches, normalised to sum 1                        (3) `span_loss`
    L     = sum_vr s_vr KL(P_vr || A_vr) / sum_vr s_vr,  over all views v of a batch           (4) `span_loss`

(1) The same theta samples image and prior, so a prior follows its crop. (2) A view that shows a tenth of a
lung has a tenth of the weight. The weights (2) and the KL divergence (or another `kind` of loss) are ours. In
the paper all images share their priors; here `common/registration.py` warps them to each image. `train.py`
adds 3 L to the loss of DINO or RelViT. `guidance` computes (4) over all resolutions of a batch, with s times
the registration's confidence. Always report the prior's own score as well: attention that only copies its
prior has learned nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def priors_from_masks(masks: Tensor, blur: float = 0.025) -> Tensor:
    """Priors (R, H, W) from the masks (R, H, W) of one reference image: blurred, largest value 1.

    blur: Gaussian sigma as a fraction of the width, because borders differ in other images. Raises
    ValueError for another shape, or if a mask is empty.
    """
    if masks.dim() != 3:
        raise ValueError(f"masks {tuple(masks.shape)}: give (R, H, W), one mask of each region")
    empty = (masks.flatten(1).sum(dim=1) <= 0).nonzero()[:, 0].tolist()
    if empty:
        numbers = ", ".join(map(str, empty))
        raise ValueError(f"prior {numbers} (counted from 0) is empty: it must cover some of the image")
    return blurred(masks.float()[None], blur)[0]


def blurred(masks: Tensor, blur: float) -> Tensor:
    """Priors (B, R, H, W) from masks of many images, as in `priors_from_masks`; empty ones stay empty."""
    priors = gaussian_blur(masks, blur * masks.shape[-1])
    return priors / priors.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)


def priors_from_statistics(images: Tensor, clusters: int = 2, blur: float = 0.025) -> Tensor:
    """Priors (2 + clusters, H, W) from unlabelled images (M, C, H, W) >= 0 of one scene, largest value 1.

    In this order: the mean image, the standard deviation over images, and k-means clusters of pixels by mean,
    deviation and place, from the darkest to the brightest. Raises ValueError for fewer than 2 images, for
    normalised ones, or if nothing varies.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} image(s) are too few for statistics: give at least 2")
    if images.min() < 0:
        raise ValueError(f"pixels of {images.min():.3g} give negative priors: do not normalise images")
    H, W = images.shape[-2:]
    images = images.float().mean(dim=1)  # (M, H, W)
    mean, deviation = images.mean(dim=0), images.std(dim=0)  # (H, W)
    if deviation.max() == 0:
        raise ValueError("no pixel differs between the images: there are no statistics to take priors from")
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    points = torch.stack([mean, deviation, x.to(mean), y.to(mean)]).flatten(1).T  # (H * W, 4)
    points = (points - points.mean(dim=0)) / points.std(dim=0).clamp_min(1e-6)
    quantiles = (torch.arange(clusters) + 0.5) / clusters * len(points)
    centres = points[points[:, 0].argsort()[quantiles.long()]]  # even quantiles of brightness: deterministic
    for _ in range(20):
        member = F.one_hot(torch.cdist(points, centres).argmin(dim=1), clusters).float()  # (H * W, clusters)
        centres = (member.T @ points) / member.sum(dim=0).clamp_min(1)[:, None]
    brightness = (member * mean.flatten()[:, None]).sum(dim=0) / member.sum(dim=0).clamp_min(1)
    member = member[:, brightness.argsort()]
    return priors_from_masks(torch.cat([mean[None], deviation[None], member.T.view(clusters, H, W)]), blur)


def follow(priors: Tensor, theta: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Priors as views see them, equations (1) and (2).

    priors: (R, H, W), the same for all views, or (B, R, H, W), non-negative, and 0 outside the image; theta
    (B, 2, 3): the views; grid: rows and columns (h, w) of patches in a view. Returns the distributions
    (B, R, h * w), all zero where a view sees nothing of a prior, and the share seen (B, R).
    """
    h, w = grid
    priors = priors.to(torch.promote_types(priors.dtype, torch.float32))  # points need 32 bits, too
    priors = priors.expand(len(theta), *priors.shape[-3:])
    H, W = priors.shape[-2:]
    per_patch = -(-H // h), -(-W // w)  # samples along a patch, rounded up, so that no pixel is skipped
    size = [len(theta), priors.shape[1], h * per_patch[0], w * per_patch[1]]
    points = F.affine_grid(theta.to(priors), size, align_corners=False)
    seen = F.grid_sample(priors, points, padding_mode="zeros", align_corners=False)  # (B, R, h * k, w * k)
    seen = F.avg_pool2d(seen, per_patch).flatten(2)  # (B, R, N)
    area = torch.linalg.det(theta[:, :, :2]).abs().to(priors)[:, None]  # the view's share of the image
    share = seen.mean(dim=2) * area / priors.mean(dim=(2, 3)).clamp_min(1e-12)
    return seen / seen.sum(dim=2, keepdim=True).clamp_min(1e-12), share.clamp(max=1)


def span_loss(attention: Tensor, prior: Tensor, share: Tensor, kind: str = "kl") -> Tensor:
    """The SPAN loss, equations (3) and (4), a scalar.

    attention (B, heads, N) or, of one head, (B, N): probabilities; prior r guides head r, heads beyond R stay
    free. prior (B, R, N) and share (B, R): from `follow`. kind: "kl", KL(P || A) in nats; "mse", N^2 times
    the mean squared difference, as for a map of mean 1; "dice", 1 - 2 sum(P A) / (sum(P^2) + sum(A^2)).
    Raises ValueError for more priors than heads, other or different sizes, or an unknown kind.
    """
    attention = attention[:, None] if attention.dim() == 2 else attention
    if attention.dim() != 3:
        remedy = "give the CLS token's rows (B, heads, N), such as attention[:, :, 0, 1:]"
        raise ValueError(f"attention {tuple(attention.shape)}: {remedy}")
    (B, heads, N), R = attention.shape, prior.shape[1]
    if R > heads:
        raise ValueError(f"{R} priors but {heads} attention heads: use at least {R} heads or fewer priors")
    if prior.shape != (B, R, N) or share.shape != (B, R):
        given = f"prior {tuple(prior.shape)}, share {tuple(share.shape)}, attention {tuple(attention.shape)}"
        raise ValueError(f"{given}: B, R or N differ")
    halves = (torch.float16, torch.bfloat16)
    attention, prior, share = (t.float() if t.dtype in halves else t for t in (attention, prior, share))
    A = attention[:, :R]
    A = A / A.sum(dim=2, keepdim=True).clamp_min(1e-12)  # (3)
    if kind == "kl":
        log_A = A.clamp_min(1e-30).log()  # lower, P / A may overflow; higher, a saturated head can't learn
        losses = (torch.xlogy(prior, prior) - prior * log_A).sum(dim=2)  # (B, R)
    elif kind == "mse":
        losses = N**2 * (prior - A).square().mean(dim=2)
    elif kind == "dice":
        losses = 1 - 2 * (prior * A).sum(dim=2) / (prior.square() + A.square()).sum(dim=2).clamp_min(1e-12)
    else:
        raise ValueError(f"unknown SPAN loss '{kind}': choose kl, mse or dice")
    return (share * losses).sum() / share.sum().clamp_min(1e-12)  # (4)


def guidance(
    attentions: list[Tensor], priors: Tensor, thetas: list[Tensor] | None, grids: list[tuple[int, int]],
    kind: str = "kl", confidence: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The SPAN loss over all views of a batch, equation (4), a scalar.

    One entry per resolution, as from `crops.multi_crop`: attentions (V B, heads, N), thetas (V B, 2, 3) and
    grids (h, w), N = h w. priors (B, R, H, W) lie over the whole images (expand those that all share); if
    thetas is None, they do not follow the crops. Each resolution is weighted by the share of the priors that
    its views see, and each image by confidence (B,), in [0, 1]. The mean is over these images, so each part
    of a batch has its own. Raises ValueError as `span_loss` does.
    """
    losses, shares = [], []
    for i, attention in enumerate(attentions):
        V = len(attention) // len(priors)  # views of each image
        whole = torch.eye(2, 3, device=attention.device).expand(len(attention), 2, 3)
        theta = whole if thetas is None else thetas[i]
        prior, share = follow(priors.repeat(V, 1, 1, 1), theta, grids[i])  # (V B, R, N), (V B, R)
        share = share if confidence is None else share * confidence.repeat(V)[:, None]
        shares.append(share.sum())
        losses.append(span_loss(attention, prior, share, kind) * shares[-1])
    return sum(losses) / sum(shares).clamp_min(1e-12)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of x (B, C, H, W) by sigma pixels, with borders repeated; 0 changes nothing."""
    if sigma <= 0:
        return x
    radius = min(int(3 * sigma + 0.5), x.shape[-2] - 1, x.shape[-1] - 1)
    for _ in range(2):  # as matrix products, which a CPU does faster than convolutions with one channel
        side = x.shape[-1]
        near = torch.arange(-radius, side + radius, device=x.device)  # pixels, and borders repeated outward
        distance = (near - torch.arange(side, device=x.device)[:, None]).to(x)  # (side, side + 2 radius)
        weights = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance.abs() <= radius)
        weights = weights / weights.sum(dim=1, keepdim=True)
        kernel = weights @ F.one_hot(near.clamp(0, side - 1), side).to(x)  # (side, side)
        x = (x @ kernel.T).transpose(2, 3)  # across, then down
    return x.contiguous()


if __name__ == "__main__":
    from common import chapters

    chapters.attention_priors()  # prints a few facts and draws attention_priors.png
