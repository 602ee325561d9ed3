"""SPAN: attention heads that follow spatial priors (Miao et al. 2022, arXiv 2209.03745).

Where things are in an image is often known beforehand: lungs and heart, the parts of a product under a fixed
camera. SPAN lets single attention heads of a ViT learn it, each from one prior over the image, while the
other heads stay free and the self-supervised objective goes on as before. No public code exists. Priors come
from one labelled sample, or from the statistics of unlabelled images. The formulas are numbered here, for the
tests to refer to (theta: a view as a matrix, see `crops.py`):

    P_r   = prior_r(theta x), averaged over each patch, normalised to sum 1 over the N patches (1) `follow`
    s_r   = share of prior_r's mass that the view still sees, in [0, 1]                        (2) `follow`
    A_r   = the CLS row of head r over the patches, normalised to sum 1                        (3) `span_loss`
    L     = sum_r s_r KL(P_r || A_r) / sum_r s_r                                               (4) `span_loss`
    T_i   = argmax_T NCC(c(image_i), c(sample o T)),  T affine, c: local contrast              (5) `align`
    f_i   = argmax_f NCC(c(image_i), c(sample o (T_i + f))) - stiffness |diff f|^2             (6) `bend`
    M_r   = the fewest pixels that hold the share m_r of A_r, m_r being the least that covers  (7)
            95 % of the prior where the prior is true                       `mass_held`, `masks_held`

(1) The same theta samples image and prior: a prior follows its crop. (2) keeps a view that shows a tenth of a
lung from being trained as if it showed all of it. (5) and (6) are ours, not the paper's: they register the
sample to each training image, once, without labels. A prior carried along fits image i, and not only the
average image. (7), ours too, makes masks of attention, for those who need some, such as ISNet. Much of what
tells lies at a region's border: so it covers the prior, and does not keep its area.

Always report the prior's own score beside the attention's: attention that only repeats its prior has learned
nothing. Claim 1 is measured with this file. Next to read: `crops.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORKING_SIZE = 64  # pixels: images are registered at this size, and blurs below are given for it


def priors_from_masks(masks: Tensor, blur: float = 0.025) -> Tensor:
    """Priors (R, H, W) from the masks (R, H, W) of one labelled sample: blurred, largest value 1.

    blur: Gaussian sigma as a share of the image's width, the doubt about where the border lies in other
    images. Raises ValueError if a mask is empty.
    """
    _check_priors(masks)
    return blurred(masks.float()[None], blur)[0]


def blurred(masks: Tensor, blur: float) -> Tensor:
    """Priors (B, R, H, W) from many images' masks, as in `priors_from_masks`; empty ones stay empty."""
    priors = _blur(masks, blur * masks.shape[-1])
    return priors / priors.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)


def priors_from_statistics(images: Tensor, clusters: int = 2, blur: float = 0.025, steps: int = 20) -> Tensor:
    """Priors (2 + clusters, H, W) from unlabelled images (M, C, H, W) of one kind of scene, largest value 1.

    In this order: the mean image, the standard deviation over images (where they differ there is something to
    see), and k-means clusters of pixel positions by mean, deviation and place, from the darkest to the
    brightest. Raises ValueError if there are fewer than 2 images, or nothing varies.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} image has no statistics to take priors from: give at least 2")
    H, W = images.shape[-2:]
    images = images.float().mean(dim=1)  # (M, H, W)
    mean, deviation = images.mean(dim=0), images.std(dim=0)  # (H, W)
    if deviation.max() == 0:
        raise ValueError("no pixel differs between the images: there are no statistics to take priors from")
    y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    points = torch.stack([mean, deviation, x.to(mean), y.to(mean)]).flatten(1).T  # (H * W, 4)
    points = (points - points.mean(dim=0)) / points.std(dim=0).clamp_min(1e-6)
    quantiles = (torch.arange(clusters) + 0.5) / clusters * len(points)
    centres = points[points[:, 0].argsort()[quantiles.long()]]  # spread over brightness: no random start
    for _ in range(steps):
        member = F.one_hot(torch.cdist(points, centres).argmin(dim=1), clusters).float()  # (H * W, clusters)
        centres = (member.T @ points) / member.sum(dim=0).clamp_min(1)[:, None]
    brightness = (member * mean.flatten()[:, None]).sum(dim=0) / member.sum(dim=0).clamp_min(1)
    member = member[:, brightness.argsort()]
    return priors_from_masks(torch.cat([torch.stack([mean, deviation]), member.T.view(clusters, H, W)]), blur)


def align(
    sample: Tensor, images: Tensor, steps: int = 75, lr: float = 0.03, blurs: tuple[float, ...] = (4.0, 1.5)
) -> Tensor:
    """Register one sample (C, H, W) to images (B, C, H, W) by affine maps, equation (5), with Adam.

    blurs: Gaussian blur at each stage, coarse to fine, in pixels at WORKING_SIZE. Returns theta (B, 2, 3),
    from an image's coordinates to the sample's. An image's map does not depend on the others. Raises
    ValueError if sample and images differ in shape.
    """
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for blur in blurs:
        source, target = _contrast(sample, images, blur)

        def points(theta: Tensor) -> tuple[Tensor, float]:
            return F.affine_grid(theta, target.shape, align_corners=False), 0.0

        theta = _register(source, target, theta, points, steps, lr)
    return theta


def bend(
    sample: Tensor,
    images: Tensor,
    theta: Tensor,
    steps: int = 60,
    lr: float = 0.02,
    blur: float = 1.5,
    knots: int = 8,
    stiffness: float = 1.0,
) -> Tensor:
    """Refine affine maps theta (B, 2, 3) by smooth displacements, equation (6), to fit non-affine shapes.

    Returns flow (B, 2, knots, knots): displacements in the sample's coordinates, [-1, 1] being its size,
    bicubic between the knots. stiffness weighs the mean squared difference of neighbouring knots.
    """
    source, target = _contrast(sample, images, blur)
    affine = F.affine_grid(theta, target.shape, align_corners=False)  # (B, h, w, 2)

    def points(flow: Tensor) -> tuple[Tensor, Tensor]:
        across, down = (flow.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (3, 2))
        return affine + _between(flow, target.shape[-2:]), stiffness * (across + down)

    flat = torch.zeros(len(images), 2, knots, knots, device=images.device)
    return _register(source, target, flat, points, steps, lr)


def carry(priors: Tensor, theta: Tensor, flow: Tensor | None = None) -> Tensor:
    """The sample's priors (R, H, W) as they lie over images registered by theta and flow: (B, R, H, W)."""
    shape = [len(theta), *priors.shape]
    points = F.affine_grid(theta, shape, align_corners=False)
    if flow is not None:
        points = points + _between(flow, priors.shape[-2:])
    return F.grid_sample(priors.float().expand(shape), points, padding_mode="zeros", align_corners=False)


def _contrast(sample: Tensor, images: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """Local contrast c of sample (1, C, h, w) and images (B, C, h, w): what is bright for its surroundings.

    Exposure differs between images and the trunk outshines what lies in it; local contrast weighs all borders
    alike. The images are blurred and thinned, which loses nothing after a blur and saves time.
    """
    if sample.shape != images.shape[1:]:
        raise ValueError(f"the sample is {tuple(sample.shape)}, images {tuple(images.shape[1:])}: resize one")

    def contrast(x: Tensor) -> Tensor:
        x = _blur(F.interpolate(x.float(), size=(WORKING_SIZE, WORKING_SIZE), mode="area"), blur)
        noise = 0.3 * x.std(dim=(1, 2, 3), keepdim=True) + 1e-6  # what varies less than this is left flat
        x = x - _blur(x, 8.0)
        return F.avg_pool2d(x / (_blur(x.square(), 8.0) + noise**2).sqrt(), max(1, int(blur + 0.5)))

    return contrast(sample[None]), contrast(images)


@torch.enable_grad()
def _register(source: Tensor, target: Tensor, start: Tensor, points, steps: int, lr: float) -> Tensor:
    """Adam from `start` (B, ...) on penalty - NCC, where points(x) is the sampling grid and the penalty."""
    source, x = source.expand_as(target), start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        grid, penalty = points(x)
        moved = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
        loss = (penalty - _ncc(moved, target)).sum()  # a sum: no image's step depends on another image
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x.detach()


def _between(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Displacements (B, 2, knots, knots) at every pixel: (B, h, w, 2)."""
    return F.interpolate(flow, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _ncc(a: Tensor, b: Tensor) -> Tensor:
    """Normalised cross-correlation in [-1, 1] of images (B, C, H, W): (B,)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=1, eps=1e-6)


def follow(priors: Tensor, theta: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Look at priors through views: equations (1) and (2).

    priors: (R, H, W), the same for all views, or (B, R, H, W), non-negative; theta (B, 2, 3): the views,
    crops or alignments or one after the other; grid: rows and columns (h, w) of patches in a view. Outside
    the image the prior is 0. Returns the distributions (B, R, h * w), all zero where a view sees nothing of a
    prior, and the share seen (B, R).
    """
    h, w = grid
    if priors.dim() == 3:
        priors = priors.expand(len(theta), *priors.shape)
    H, W = priors.shape[-2:]
    per_patch = -(-H // h), -(-W // w)  # samples along a patch, rounded up: no pixel is stepped over
    size = [len(theta), priors.shape[1], h * per_patch[0], w * per_patch[1]]
    points = F.affine_grid(theta, size, align_corners=False)
    seen = F.grid_sample(priors, points, padding_mode="zeros", align_corners=False)  # (B, R, h * k, w * k)
    seen = F.avg_pool2d(seen, per_patch).flatten(2)  # (B, R, N)
    area = torch.linalg.det(theta[:, :, :2]).abs()[:, None]  # of the view, in images
    share = seen.mean(dim=2) * area / priors.mean(dim=(2, 3)).clamp_min(1e-12)
    return seen / seen.sum(dim=2, keepdim=True).clamp_min(1e-12), share.clamp(max=1)


def span_loss(attention: Tensor, prior: Tensor, share: Tensor, kind: str = "kl") -> Tensor:
    """The SPAN loss, a scalar: equations (3) and (4).

    attention (B, heads, N): probabilities; head r is guided by prior r, heads beyond R stay free. prior (B,
    R, N) and share (B, R): from `follow`. kind: "kl" KL(P || A) in nats; "mse" N^2 times the mean squared
    difference, so that 1 is the scale of a uniform map; "dice" 1 - 2 sum(P A) / (sum(P^2) + sum(A^2)). Raises
    ValueError for more priors than heads, different grids, or an unknown kind.
    """
    (B, heads, N), R = attention.shape, prior.shape[1]
    if R > heads:
        raise ValueError(f"{R} priors but {heads} attention heads: use at least {R} heads or fewer priors")
    if prior.shape != (B, R, N):
        raise ValueError(f"prior {tuple(prior.shape)}, attention {tuple(attention.shape)}: B or N differ")
    halves = (torch.float16, torch.bfloat16)
    attention, prior, share = (t.float() if t.dtype in halves else t for t in (attention, prior, share))
    A = attention[:, :R]
    A = A / A.sum(dim=2, keepdim=True).clamp_min(1e-12)
    if kind == "kl":
        losses = (torch.xlogy(prior, prior) - prior * A.clamp_min(1e-12).log()).sum(dim=2)  # (B, R)
    elif kind == "mse":
        losses = N**2 * (prior - A).square().mean(dim=2)
    elif kind == "dice":
        losses = 1 - 2 * (prior * A).sum(dim=2) / (prior.square() + A.square()).sum(dim=2).clamp_min(1e-12)
    else:
        raise ValueError(f"unknown SPAN loss '{kind}': choose kl, mse or dice")
    return (share * losses).sum() / share.sum().clamp_min(1e-12)


def mass_held(attention: Tensor, grid: tuple[int, int], regions: Tensor, covered: float = 0.95) -> Tensor:
    """m_r of equation (7): the share (R,) of attention that the pixels hold which cover a region so far.

    attention (B, R, N) of images that the regions (R, H, W) bool are true of, on average at least; on a grid
    (h, w), upsampled bilinearly to the regions' size. covered: the share of a region's pixels, 0 to 1.
    """
    maps, order = _upsampled(attention, grid, regions.shape[1:]).sort(dim=2, descending=True)  # (B, R, H * W)
    inside = regions.flatten(1).expand(order.shape).gather(2, order).float()
    reached = inside.cumsum(dim=2) / inside.sum(dim=2, keepdim=True).clamp(min=1)
    enough = (reached.mean(dim=0) < covered).sum(dim=1).clamp(max=order.shape[2] - 1)  # (R,)
    return maps.cumsum(dim=2).mean(dim=0).gather(1, enough[:, None])[:, 0]


def masks_held(attention: Tensor, grid: tuple[int, int], size: tuple[int, int], mass: Tensor) -> Tensor:
    """Equation (7): masks (B, R, H, W) bool, the fewest pixels that hold mass (R,) of attention (B, R, N)."""
    maps, order = _upsampled(attention, grid, size).sort(dim=2, descending=True)
    kept = maps.cumsum(dim=2) - maps < mass[:, None]  # what is held before a pixel does not suffice yet
    return torch.zeros_like(kept).scatter(2, order, kept).unflatten(2, size)


def _upsampled(attention: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Attention (B, R, N) at every pixel, (B, R, H * W), summing to 1."""
    maps = F.interpolate(attention.float().unflatten(2, grid), size=tuple(size), mode="bilinear").flatten(2)
    return maps / maps.sum(dim=2, keepdim=True).clamp_min(1e-12)


def _check_priors(priors: Tensor) -> None:
    empty = (priors.flatten(1).sum(dim=1) <= 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"prior {', '.join(map(str, empty))} (counted from 0) is empty: it must cover some of the image"
        )


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of x (B, C, H, W) by sigma pixels, edges repeated outward; 0 leaves it as it is."""
    if sigma <= 0:
        return x
    radius = min(int(3 * sigma + 0.5), *(side - 1 for side in x.shape[-2:]))
    kernel = torch.exp(
        -torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) ** 2 / (2 * sigma**2)
    )
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    x, shape = F.pad(x, [radius] * 4, mode="replicate").flatten(0, 1)[:, None], x.shape
    return F.conv2d(F.conv2d(x, kernel), kernel.transpose(2, 3)).view(shape)
