"""Registration: where the regions of one labelled image lie in other images, found once and without labels.

As published, SPAN's priors are the same for all images. Here they are warped to each (theta: `crops.py`):

    T_i   = argmax_T NCC(c(image_i), c(reference) o T),  T affine, c: local contrast           (1) `align`
    f_i   = argmax_f NCC(c(image_i), c(reference) o (T_i + f)) - stiffness |diff f|^2          (2) `bend`
    s_i   = NCC(d(image_i) o T_i^-1, d(reference)) over the box around the regions             (3) `agreement`
    T_i   = argmax_T s_i,  T a shift and a scale                                               (4) `find`
    l_i   = NCC(c(image_i), c(reference) o (T_i + f_i)) over the warped regions                (5) `likeness`

(1) and (2) need images of one scene that overlap from the start. Where they fail, (4) searches everywhere,
and then (1) to (3) ignore the border, as a bright frame has more contrast than everything inside it. d is c
and its local energy; two different digits, for example, may share only the energy. Among thousands of places
one may fit by chance, so a find counts SEARCHED less, and only if searching the reference for what was found
leads back to the regions. The T_i with the largest s_i is used. If it is small, `confidence` is low. With
several reference images, an image gets the regions of the one that is most like it, with the largest l_i.
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
SEARCHED = 0.2  # how much larger s_i is by chance if the whole image is searched
NOTHING, CERTAIN = 0.3, 0.4  # priors count from the first s_i on, in full from the second


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
            return (theta.flatten(0, 1) @ centres).view(-1, 2, *target.shape[2:]).permute(0, 2, 3, 1), 0.0

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


def find(reference: Tensor, priors: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Search images (B, C, H, W) for the box around priors (R, H, W) of a reference (C, H, W), equation (4).

    Returns shifts and scales theta (B, 2, 3), from an image's coordinates to the reference's, and s (B,):
    s_i - SEARCHED, or -1 where searching the reference for what was found ends elsewhere.
    """
    box, source, target = _box(priors), _detail(reference[None]), _detail(images)
    same = torch.eye(2, 3)[None].to(target)
    there, scale = _search(target, source, same, box)
    centre, half = box.to(target)
    theta = torch.cat([same[:, :, :2] / scale[:, :, None], (centre - there / scale)[:, :, None]], dim=2)
    back, _ = _search(source, target, theta, box)
    returned = ((back - centre).abs() < (half / 4).clamp_min(2 / source.shape[-1])).all(dim=1)
    return theta, torch.where(returned, agreement(reference, priors, images, theta) - SEARCHED, -1)


def agreement(reference: Tensor, priors: Tensor, images: Tensor, theta: Tensor) -> Tensor:
    """s_i (B,) in [-1, 1] of equation (3): how well theta (B, 2, 3) fits images (B, C, H, W) to a reference.

    reference (C, H, W); priors (R, H, W), around whose box the images are compared.
    """
    same = torch.eye(2, 3, device=images.device)[None]
    a, b = (_inside(_detail(v), _box(priors), 1.0, t) for v, t in ((reference[None], same), (images, theta)))
    return (a * b).sum(dim=(1, 2, 3))


def register(reference: Tensor, priors: Tensor, images: Tensor, deformable: bool) -> tuple[Tensor, ...]:
    """Register a reference image (C, H, W) with priors (R, H, W) to images (B, C, H, W).

    Returns theta (B, 2, 3), flow (B, 2, k, k) (0 where `find` won, or if not deformable), and s (B,) before
    bending. The way with the highest s wins, a find with SEARCHED less; if that left out a rim, so does s.
    """
    theta, flow, s = _overlapping(reference, priors, images, deformable)
    discount = torch.zeros_like(s)
    for rim in (0, *RIMS):  # 0: search everywhere
        hard = (s + discount < SEARCH_BELOW).nonzero()[:, 0]
        if not len(hard):
            break
        if rim:
            inner = _without_rim(torch.cat([reference[None], images[hard]]), rim)
            tried = _overlapping(inner[0], priors, inner[1:], deformable)
        else:
            theta_i, s_i = find(reference, priors, images[hard])
            tried = theta_i, torch.zeros_like(flow[hard]), s_i
        better = tried[2] > s[hard]
        for best, new in zip((theta, flow, s), tried):
            best[hard[better]] = new[better]
        discount[hard[better]] = 0 if rim else SEARCHED
    return theta, flow, s


def _overlapping(reference: Tensor, priors: Tensor, images: Tensor, deformable: bool) -> tuple[Tensor, ...]:
    """theta, flow and s of `register` by equations (1) to (3)."""
    theta = align(reference, images)
    flow = bend(reference, images, theta) if deformable else torch.zeros(len(images), 2, 1, 1).to(theta)
    return theta, flow, agreement(reference, priors, images, theta)


def confidence(agreement: Tensor) -> Tensor:
    """Weights in [0, 1] of priors by s (B,) of `register`: 0 up to NOTHING, 1 from CERTAIN on."""
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
    """Warp a reference's priors (R, H, W) by theta (B, 2, 3) and flow (B, 2, k, k) to (B, R, H, W)."""
    shape = [len(theta), *priors.shape]
    points = F.affine_grid(theta, shape, align_corners=False)
    if flow is not None:
        points = points + _between(flow, priors.shape[-2:])
    return F.grid_sample(priors.float().expand(shape), points, padding_mode="zeros", align_corners=False)


def _box(priors: Tensor) -> Tensor:
    """The box around priors (R, H, W), with a margin, in [-1, 1]: [[x, y] of its centre, half its sides]."""
    inside = (priors > priors.amax(dim=(1, 2), keepdim=True) / 2).any(dim=0).cpu()  # (H, W)
    at, sides = inside.nonzero().flip(1), torch.tensor(inside.shape[::-1])  # x, y
    first, last = at.amin(dim=0) / sides, (at.amax(dim=0) + 1) / sides
    return torch.stack([first + last - 1, 1.5 * (last - first) + 0.03])


def _inside(maps: Tensor, box: Tensor, scale: float, theta: Tensor) -> Tensor:
    """Maps (B, C, h, w) in a box of the reference, which theta (B, 2, 3) maps them to: (B, C, rows, columns).

    Each map has mean 0, all of an image have norm 1. rows and columns are odd. scale: points a pixel.
    """
    size, sides = scale * maps.shape[-1], []
    for centre, half in box.T.flip(0).tolist():  # y, then x
        n = max(3, round(half * size) | 1)
        sides.append(centre + torch.linspace(1 - n, n - 1, n) / size)
    points = torch.cartesian_prod(*sides).flip(1).to(maps)  # (rows * columns, 2): x, y
    back = torch.linalg.pinv(theta[:, :, :2])  # from the reference to the image; of nothing, 0
    moved = ((points - theta[:, None, :, 2]) @ back.mT).unflatten(1, [len(side) for side in sides])
    part = F.grid_sample(maps, moved, padding_mode="border", align_corners=False)
    return F.normalize(part - part.mean(dim=(2, 3), keepdim=True), dim=(1, 2, 3))


def _search(maps: Tensor, others: Tensor, theta: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Where maps are most like the box in others, (B or 1, C, h, w) both: x, y (B, 2), and scale (B, 1)."""
    (h, w), best = maps.shape[2:], None
    for scale in SCALES:
        template = _inside(others, box, scale, theta)
        rows, columns = template.shape[2:]
        padded = F.pad(maps, [columns // 2] * 2 + [rows // 2] * 2, mode="replicate")
        down = (F.avg_pool2d(v, (rows, 1), 1) for v in (padded, padded.square()))
        mean, square = (F.avg_pool2d(v, (1, columns), 1) for v in down)  # one side at a time is faster
        energy = (square - mean.square()).sum(dim=1, keepdim=True) * rows * columns
        ncc = F.conv2d(padded, template) / energy.clamp_min(1e-12).sqrt()  # (B, 1, h, w) or (1, B, h, w)
        value, place = ncc.flatten(0, 1).flatten(1).max(dim=1, keepdim=True)  # (B, 1)
        there = torch.cat([(place % w + 0.5) / w, (place // w + 0.5) / h], dim=1) * 2 - 1
        found = torch.cat([value, there, torch.full_like(value, scale)], dim=1)  # (B, 4)
        best = found if best is None else torch.where(value > best[:, :1], found, best)
    return best[:, 1:3], best[:, 3:]


def _detail(images: Tensor) -> Tensor:
    """d: local contrast of images (B, C, H, W) and its local energy, each of deviation 1: (B, 2 C, h, w)."""
    c = _contrast(images, 1.5, window=4.0)
    maps = c, gaussian_blur(c.square(), 0.5).sqrt()
    return torch.cat([m / m.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6) for m in maps], dim=1)


def _contrast(images: Tensor, blur: float, window: float = 8.0) -> Tensor:
    """Local contrast c of images (B, C, H, W), at WORKING_SIZE, blurred and then subsampled.

    It does not depend on exposure; borders of faint organs count as much as the bright outline of the body.
    """
    x = gaussian_blur(F.interpolate(images.float(), size=(WORKING_SIZE, WORKING_SIZE), mode="area"), blur)
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
    """Minimise penalty - NCC over x (B, ...) by Adam; points(x): grid (B, h, w, 2) and penalty, (B,) or 0."""
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
