"""Registration: where the regions of one labelled image lie in other images, found once and without labels.

As published, SPAN's priors are the same for all images. Here they are warped to each (theta: `crops.py`):

    T_i   = argmax_T NCC(c(image_i), c(reference) o T),  T affine, c: local contrast           (1) `align`
    f_i   = argmax_f NCC(c(image_i), c(reference) o (T_i + f)) - stiffness |diff f|^2          (2) `bend`
    s_i   = NCC(d(image_i) o T_i^-1, d(reference)) over the box around the regions             (3) `agreement`
    T_i   = argmax_T s_i,  T a shift and a scale                                               (4) `find`
    l_i   = NCC(c(image_i), c(reference) o (T_i + f_i)) over the warped regions                (5) `likeness`

(1) and (2) need images of one scene that overlap from the start. Where they fail, (4) searches everywhere,
and then (1) to (3) ignore the border, as a bright frame has more contrast than everything inside it. d is c
and its local energy; two different digits, for example, may share only the energy. The T_i with the largest
s_i is used. If it is small, the regions are not found, and `confidence` is low. With several reference
images, an image gets the regions of the one that is most like it, with the largest l_i.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_priors import gaussian_blur

WORKING_SIZE = 64  # pixels: images are registered at this size, for which blurs are given
KNOTS, STIFFNESS = 8, 1.0  # of `bend`: a side, and the weight of squared differences of neighbours
SCALES = (0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.4)  # of objects in an image, relative to the reference's
SEARCH_BELOW = 0.6  # s_i under which `find`, and then RIMS are tried
RIMS = 3, 6  # pixels at WORKING_SIZE, left out at each border
AROUND = 3  # pixels beside the regions that `likeness` compares
NOTHING, CERTAIN = 0.4, 0.5  # s_i is 0.2 to 0.4 in noise, but up to 0.6 where another object lies


def align(reference: Tensor, images: Tensor, steps: int = 50) -> Tensor:
    """Register a reference image (C, H, W) to images (B, C, H, W) by affine maps, equation (1).

    Returns theta (B, 2, 3), from an image's coordinates to the reference's; each depends on its own image
    alone. steps: of Adam, at each of two resolutions. Raises ValueError if the shapes differ.
    """
    if reference.shape != images.shape[1:]:
        shapes = f"{tuple(reference.shape)}, images {tuple(images.shape[1:])}"
        raise ValueError(f"the reference image is {shapes}: resize one")
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for blur in (4.0, 1.5):  # pixels, coarse to fine
        source, target = _contrast(reference[None], blur), _contrast(images, blur)
        centres = F.affine_grid(torch.eye(2, 3)[None], (1, 1, *target.shape[2:]), align_corners=False)
        centres = F.pad(centres, (0, 1), value=1.0).to(target).flatten(0, 2).T  # (3, h * w): x, y, 1

        def points(theta: Tensor) -> tuple[Tensor, float]:  # F.affine_grid makes the centres anew each time
            moved = (theta.flatten(0, 1) @ centres).view(-1, 2, *target.shape[2:])
            return moved.permute(0, 2, 3, 1), 0.0

        theta = _register(source, target, theta, points, steps, lr=0.03)
    return theta


def bend(reference: Tensor, images: Tensor, theta: Tensor, steps: int = 40) -> Tensor:
    """Refine affine maps theta (B, 2, 3) by smooth displacements, equation (2): deformable registration.

    Returns flow (B, 2, KNOTS, KNOTS): displacements in [-1, 1] at knots, bicubic in between.
    """
    source, target = _contrast(reference[None], 1.5), _contrast(images, 1.5)
    affine = F.affine_grid(theta, target.shape, align_corners=False)  # (B, h, w, 2)

    def points(flow: Tensor) -> tuple[Tensor, Tensor]:
        across, down = (flow.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (3, 2))
        return affine + _between(flow, target.shape[-2:]), STIFFNESS * (across + down)

    flat = torch.zeros(len(images), 2, KNOTS, KNOTS, device=images.device)
    return _register(source, target, flat, points, steps, lr=0.02)


def find(reference: Tensor, priors: Tensor, images: Tensor) -> Tensor:
    """Search images (B, C, H, W) for the box around priors (R, H, W) of a reference (C, H, W), equation (4).

    Returns theta (B, 2, 3), shifts and scales (SCALES), from an image's coordinates to the reference's.
    """
    x, y, width, height = _box(priors)
    source, target = _detail(reference[None]), _detail(images)  # (1 or B, 2 C, h, w)
    best, theta = torch.full((len(images),), -1.0).to(target), torch.zeros(len(images), 2, 3).to(target)
    for scale in SCALES:
        points = _points(x, y, width, height, scale * target.shape[-1]).to(target)  # (rows, columns, 2)
        template = F.grid_sample(source, points[None], padding_mode="border", align_corners=False)
        template = template - template.mean(dim=(2, 3), keepdim=True)
        rows, columns = template.shape[2:]
        margins = [columns // 2] * 2 + [rows // 2] * 2  # rows and columns are odd
        padded = F.pad(target, margins, mode="replicate")
        down = (F.avg_pool2d(v, (rows, 1), 1) for v in (padded, padded.square()))
        mean, square = (F.avg_pool2d(v, (1, columns), 1) for v in down)  # one side at a time is faster
        variance = (square - mean.square()).sum(dim=1, keepdim=True).clamp_min(1e-12) * rows * columns
        ncc = F.conv2d(padded, template) / (variance * template.square().sum()).sqrt()  # (B, 1, h, w)
        (h, w), (value, place) = ncc.shape[2:], ncc.flatten(1).max(dim=1)
        there = torch.stack([(place % w + 0.5) / w, (place // w + 0.5) / h], dim=1) * 2 - 1  # (B, 2)
        shift = torch.tensor([x, y]).to(there) - there / scale
        found = torch.cat([torch.eye(2).to(shift).expand(len(shift), 2, 2) / scale, shift[:, :, None]], dim=2)
        theta = torch.where((value > best)[:, None, None], found, theta)
        best = torch.maximum(value, best)
    return theta


def agreement(reference: Tensor, priors: Tensor, images: Tensor, theta: Tensor) -> Tensor:
    """s_i (B,) in [-1, 1] of equation (3): how well theta (B, 2, 3) fits images (B, C, H, W) to a reference.

    reference (C, H, W); priors (R, H, W), around whose box the images are compared.
    """
    source, target = _detail(reference[None]), _detail(images)
    points = _points(*_box(priors), target.shape[-1]).to(target)  # (rows, columns, 2)
    back = torch.linalg.pinv(theta[:, :, :2])  # from the reference to the image; of nothing, 0
    moved = (points.flatten(0, 1) - theta[:, None, :, 2]) @ back.transpose(1, 2)  # (B, rows * columns, 2)
    moved = moved.view(len(theta), *points.shape)
    source = F.grid_sample(source, points[None], padding_mode="border", align_corners=False)
    target = F.grid_sample(target, moved, padding_mode="border", align_corners=False)
    a, b = ((v - v.mean(dim=(2, 3), keepdim=True)).flatten(1) for v in (source, target))
    return F.cosine_similarity(a, b, dim=1)


def register(reference: Tensor, priors: Tensor, images: Tensor, deformable: bool) -> tuple[Tensor, ...]:
    """Register a reference image (C, H, W) with priors (R, H, W) to images (B, C, H, W).

    Returns theta (B, 2, 3), flow (B, 2, k, k) (0 where `find` won, or if not deformable), and s (B,) before
    bending. The way with the highest s wins; if that left out a rim, so does s.
    """
    theta, flow, s = _overlapping(reference, priors, images, deformable)
    for rim in (0, *RIMS):  # 0: search everywhere
        hard = (s < SEARCH_BELOW).nonzero()[:, 0]
        if not len(hard):
            break
        if rim:
            inner = _without_rim(torch.cat([reference[None], images[hard]]), rim)
            tried = _overlapping(inner[0], priors, inner[1:], deformable)
        else:
            found = find(reference, priors, images[hard])
            tried = found, torch.zeros_like(flow[hard]), agreement(reference, priors, images[hard], found)
        better = tried[2] > s[hard]
        for best, new in zip((theta, flow, s), tried):
            best[hard[better]] = new[better]
    return theta, flow, s


def _overlapping(reference: Tensor, priors: Tensor, images: Tensor, deformable: bool) -> tuple[Tensor, ...]:
    """theta, flow and s of `register` by equations (1) to (3)."""
    theta = align(reference, images)
    s = agreement(reference, priors, images, theta)
    flow = bend(reference, images, theta) if deformable else torch.zeros(len(images), 2, 1, 1).to(theta)
    return theta, flow, s


def confidence(agreement: Tensor) -> Tensor:
    """Weights in [0, 1] of priors by their agreement (B,): 0 up to NOTHING, 1 from CERTAIN on."""
    return ((agreement - NOTHING) / (CERTAIN - NOTHING)).clamp(0, 1)


def likeness(reference: Tensor, priors: Tensor, images: Tensor, theta: Tensor, flow: Tensor) -> Tensor:
    """l_i (B,) in [-1, 1] of equation (5): how alike a registered reference and images (B, C, H, W) are.

    Over the priors (R, H, W), carried by theta and flow, and AROUND pixels at WORKING_SIZE beside them,
    since a region's outline has two sides.
    """
    source, target = _contrast(reference[None], 1.0), _contrast(images, 1.0)  # (1 or B, C, h, w)
    regions = F.interpolate(priors[None].float(), size=target.shape[2:], mode="area")[0]
    regions = (carry(regions, theta, flow) > 0.5).any(dim=1, keepdim=True).float()  # (B, 1, h, w)
    weight = F.max_pool2d(regions, 2 * AROUND + 1, 1, AROUND)
    moved = carry(source[0], theta, flow)
    total = weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    a, b = (weight * (v - (weight * v).sum(dim=(2, 3), keepdim=True) / total) for v in (moved, target))
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-6)


def carry(priors: Tensor, theta: Tensor, flow: Tensor | None = None) -> Tensor:
    """Warp the reference's priors (R, H, W) to images registered by theta and flow: (B, R, H, W)."""
    shape = [len(theta), *priors.shape]
    points = F.affine_grid(theta, shape, align_corners=False)
    if flow is not None:
        points = points + _between(flow, priors.shape[-2:])
    return F.grid_sample(priors.float().expand(shape), points, padding_mode="zeros", align_corners=False)


def _box(priors: Tensor) -> tuple[float, float, float, float]:
    """Centre x, y and half width, height of the box around priors (R, H, W), in [-1, 1], with a margin."""
    inside = (priors > priors.amax(dim=(1, 2), keepdim=True) / 2).any(dim=0)  # (H, W)
    box = []
    for dim in (0, 1):  # x, then y
        covered = inside.any(dim=dim).nonzero()
        first, last = covered.min() / inside.shape[1 - dim], (covered.max() + 1) / inside.shape[1 - dim]
        box.append((float(first + last - 1), float(last - first)))
    (x, width), (y, height) = box
    return x, y, 1.5 * width + 0.03, 1.5 * height + 0.03


def _points(x: float, y: float, width: float, height: float, size: float) -> Tensor:
    """Points (rows, columns, 2), both odd, over a box, as dense as the pixels of an image of `size` px."""
    sides = []
    for centre, half in ((y, height), (x, width)):
        n = max(3, round(half * size) | 1)
        sides.append(centre + torch.linspace(1 - n, n - 1, n) / size)
    down, across = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([across, down], dim=2)


def _detail(images: Tensor) -> Tensor:
    """d: local contrast of images (B, C, H, W) and its local energy, each of deviation 1: (B, 2 C, h, w)."""
    c = _contrast(images, 1.5, window=4.0)
    maps = c, gaussian_blur(c.square(), 0.5).sqrt()
    return torch.cat([m / m.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6) for m in maps], dim=1)


def _contrast(images: Tensor, blur: float, window: float = 8.0) -> Tensor:
    """Local contrast c of images (B, C, H, W), at WORKING_SIZE, blurred and then subsampled.

    It does not depend on exposure; borders of faint organs count as much as the bright outline of the body.
    """
    x = F.interpolate(images.float(), size=(WORKING_SIZE, WORKING_SIZE), mode="area")
    x = gaussian_blur(x, blur)
    noise = 0.3 * x.std(dim=(1, 2, 3), keepdim=True) + 1e-6  # weaker structures are not amplified
    x = x - gaussian_blur(x, window)
    x = x / (gaussian_blur(x.square(), window) + noise**2).sqrt()
    return F.avg_pool2d(x, max(1, int(blur + 0.5)))


def _without_rim(images: Tensor, rim: int) -> Tensor:
    """Images (B, C, H, W) at WORKING_SIZE, whose outermost `rim` pixels repeat those beside them."""
    x = F.interpolate(images.float(), size=(WORKING_SIZE, WORKING_SIZE), mode="area")
    return F.pad(x[:, :, rim:-rim, rim:-rim], [rim] * 4, mode="replicate")


@torch.enable_grad()
def _register(source: Tensor, target: Tensor, start: Tensor, points, steps: int, lr: float) -> Tensor:
    """Minimise penalty - NCC over x (B, ...) with Adam; points(x) returns the sampling grid and penalty."""
    source, x = source.expand_as(target), start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        grid, penalty = points(x)
        moved = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
        a, b = (v.flatten(1) - v.flatten(1).mean(dim=1, keepdim=True) for v in (moved, target))
        loss = (penalty - F.cosine_similarity(a, b, dim=1, eps=1e-6)).sum()  # each image counts on its own
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x.detach()


def _between(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Displacements (B, 2, knots, knots) at every pixel, bicubic between the knots: (B, h, w, 2)."""
    k = flow.shape[-1]
    unit = torch.eye(k).to(flow)[None, None]  # interpolation is linear: a matrix (h or w, k) for each side
    down, across = (F.interpolate(unit, (n, k), mode="bicubic", align_corners=True)[0, 0] for n in size)
    return (down @ flow @ across.T).permute(0, 2, 3, 1)
