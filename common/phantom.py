"""Synthetic chest X-rays with exact masks: no download, and enough variation to compare methods in minutes.

An image is a stack of soft shapes in body coordinates (u to the image's right, v down; the trunk spans about
[-1, 1]): trunk, bones, mediastinum, lungs, heart, and findings. Pose, shape, exposure and noise vary.

Sides are the patient's, as in radiology: the left lung is on the image's right, and the heart leans to it.
A lung's mask ends where the heart covers it. Findings are present or absent independently of each other.

Every image has its own random stream, so image i of a seed does not depend on the number of images.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

REGIONS = ["left lung", "right lung", "heart"]
FINDINGS = ["enlarged heart", "effusion", "nodule", "opacity"]
MARKERS, UNSEEN = ["corner", "anywhere", "tint", "border"], "disc"  # UNSEEN is for test images alone
PREVALENCE = 0.3  # of each finding
NUMBERS = 64  # random numbers per image for pose, shape, contrast and findings
BATCH = 256


def phantom(n: int, seed: int, img_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """n chest X-rays: images (n, 1, S, S) uint8, masks (n, 3, S, S) bool in the order of REGIONS, and labels
    (n, 4) float, 0 or 1, in the order of FINDINGS. Raises ValueError for n < 1 or img_size < 16.
    """
    if n < 1 or img_size < 16:
        raise ValueError(f"phantom: {n} images of {img_size} px, but 1 image of 16 px is the minimum")
    return in_batches(_draw, n, seed, img_size, NUMBERS)


def in_batches(draw: Callable, n: int, seed: int, size: int, numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """draw(uniform (B, numbers), normal (B, size, size)) for n images, each with its own random stream."""
    drawn = []
    for start in range(0, n, BATCH):
        streams = [np.random.default_rng([seed, i]) for i in range(start, min(start + BATCH, n))]
        uniform = np.stack([stream.random(numbers, dtype=np.float32) for stream in streams])
        normal = np.stack([stream.standard_normal((size, size), dtype=np.float32) for stream in streams])
        drawn.append(draw(torch.from_numpy(uniform), torch.from_numpy(normal)))
    return tuple(torch.cat(tensors) for tensors in zip(*drawn))


def canvas(numbers: Tensor, size: int) -> tuple[Callable, Callable, Tensor, Tensor]:
    """What images are drawn with: draw, inside, and the pixels' x (1, 1, S) and y (1, S, 1) in [-1, 1].

    draw(low, high) takes the next of the numbers (B, n) of each image; inside(z) is 1 where z > 0, softly.
    """
    columns, steps = iter(numbers.unbind(1)), (torch.arange(size) + 0.5) / size * 2 - 1
    soft = 3.0 / size  # an edge is about a pixel and a half wide

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * next(columns))[:, None, None]  # (B, 1, 1)

    return draw, lambda z: torch.sigmoid(z / soft * 2), steps[None, None, :], steps[None, :, None]


def turned(u: Tensor, v: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates u and v (B, S, S) in a frame that is turned by an angle (B, 1, 1)."""
    return u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()


def stamp(
    images: Tensor, present: Tensor, kind: str = "corner", masks: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Copies of images (n, C, S, S) uint8 with a marker, a shortcut for classifiers, where present (n,) bool.

    corner: a bright L in the upper right corner, a tenth of the width; anywhere: the L at a random place
    outside all regions; tint: everything outside the regions 10 % of the range brighter; border: a bright
    frame; disc: a bright disc in the lower left corner. anywhere and tint need masks (n, R, S, S) bool.
    Raises ValueError for another kind, images under 24 px, or if regions leave no place.
    """
    n, S = len(images), images.shape[-1]
    if kind not in [*MARKERS, UNSEEN]:
        raise ValueError(f"marker {kind} is not one of {', '.join(MARKERS)}, {UNSEEN}")
    if S < 24:
        raise ValueError(f"images of {S} px are too small for a marker: use 24 px or more")
    if kind == "tint":
        outside = ~masks.any(dim=1, keepdim=True) & present[:, None, None, None]
        return (images + 25 * outside.int()).clamp(max=255).to(torch.uint8)
    size, frame = round(S * 6 / 64), max(1, S // 32)
    stroke = margin = max(1, size // 3)
    letter, border = torch.zeros(size, size), torch.ones(S, S)
    letter[:, :stroke] = letter[-stroke:] = 1
    border[frame:-frame, frame:-frame] = 0
    across = torch.linspace(-1, 1, size).square()
    disc = (across + across[:, None] <= 1.1).float()
    stencil = {"border": border, "disc": disc}.get(kind, letter)
    room = S - len(stencil) + 1  # places (n, 1, room, room) of the stencil's upper left pixel
    places = torch.zeros(n, 1, room, room)
    if kind == "anywhere":
        free = F.max_pool2d(masks.any(dim=1, keepdim=True).float(), size, stride=1) == 0
        if not free.flatten(1).any(dim=1).all():
            raise ValueError("an image has no place for a marker outside its regions: use another kind")
        chosen = torch.multinomial(free.flatten(1).float(), 1, generator=Generator().manual_seed(seed))
        places.flatten(1).scatter_(1, chosen, 1.0)
    else:
        places[:, 0, *{"border": (0, 0), "disc": (-1 - margin, margin)}.get(kind, (margin, -1 - margin))] = 1
    ink = F.conv_transpose2d(places, stencil[None, None]) > 0.5  # (n, 1, S, S)
    return torch.where(ink & present[:, None, None, None], 255, images)


def _draw(numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks and labels from numbers (B, NUMBERS) in [0, 1) and normal noise (B, S, S)."""
    draw, inside, x, y = canvas(numbers, noise.shape[-1])

    def happens(probability: float) -> Tensor:
        return (draw(0, 1) < probability).float()  # (B, 1, 1)

    def ellipse(u0: Tensor, v0: Tensor, a: Tensor, b: Tensor, angle: Tensor) -> Tensor:  # > 0 inside
        p, q = turned(u - u0, v - v0, angle)
        return (1 - torch.sqrt((p / a) ** 2 + (q / b) ** 2 + 1e-6)) * torch.minimum(a, b)

    # Pose: an affine map from the image to the body.
    x, y = x - draw(-0.18, 0.18), y - draw(-0.15, 0.2)
    tilt, width, height = draw(-0.2, 0.2), draw(0.68, 1.0), draw(0.72, 1.1)
    u, v = turned(x, y, tilt)
    u, v = u / width, v / height  # (B, S, S)

    # Findings.
    big_heart, effusion, nodule, opacity = (happens(PREVALENCE) for _ in FINDINGS)
    side = {name: happens(0.5) * 2 - 1 for name in FINDINGS[1:]}  # +1: the image's right, the patient's left

    # Trunk, narrower at the neck, and bones.
    shoulder = 0.92 - 0.55 * torch.sigmoid((draw(-0.98, -0.86) - v) * 14)
    trunk = inside(shoulder - u.abs() * (1 + 0.08 * v))
    spine = torch.exp(-((u / 0.085) ** 2)) * (0.8 + 0.2 * torch.cos(v * draw(26, 32)))
    middle = torch.exp(-((u / draw(0.16, 0.22)) ** 4))
    ribs = v + draw(0.35, 0.55) * (u.abs() - 0.35) ** 2 + 0.25 * u.abs()
    ribs = torch.cos(ribs * draw(19, 24) + draw(0, 6.28)).clamp(min=0.3) - 0.3
    clavicles = torch.exp(-(((v - draw(-0.8, -0.72) + 0.22 * u.abs()) / 0.05) ** 2))
    clavicles = clavicles * inside(u.abs() - 0.08) * inside(0.8 - u.abs())

    # Lungs: eggs cut off by a domed diaphragm, with the heart in front.
    lungs, bases = [], []
    for direction in (1, -1):  # the patient's left lung is on the image's right
        u0, v0, a, b = draw(0.42, 0.5) * direction, draw(-0.2, -0.08), draw(0.28, 0.36), draw(0.54, 0.68)
        taper = 1 + 0.22 * ((v - v0) / b).clamp(-1, 1)
        egg = (1 - torch.sqrt(((u - u0) / (a * taper)) ** 2 + ((v - v0) / b) ** 2 + 1e-6)) * a
        bases.append(v0 + b * draw(0.55, 0.85))  # how far down the dome of the diaphragm lets it reach
        dome = bases[-1] + 0.9 * (u - u0 + 0.06 * direction) ** 2 - v
        lungs.append(torch.minimum(egg, dome))
    size = draw(0.22, 0.29) * (1 + big_heart * draw(0.28, 0.5))
    u0, v0 = draw(0.06, 0.14) + 0.25 * (size - 0.22), draw(0.1, 0.24)
    heart = ellipse(u0, v0, size * draw(1.1, 1.3), size, draw(0.3, 0.8))
    left, right = (inside(torch.minimum(lung, -heart)) for lung in lungs)
    heart, air = inside(heart), inside(torch.maximum(*lungs))

    # Intensities: bone and fluid are bright, air is dark.
    tissue = draw(0.42, 0.62)
    image = tissue + 0.06 * spine + 0.06 * middle + 0.08 * clavicles + 0.05 * (v > 0.5) * (v - 0.5)
    depth = draw(0.24, 0.42)
    image = image - depth * air * (1 - 0.75 * middle) + draw(0.06, 0.13) * ribs * (0.4 + 0.6 * air)
    image = image + heart * air * depth + heart * draw(0.07, 0.16)
    where = {name: torch.where(at > 0, left, right) for name, at in side.items()}
    base = torch.where(side["effusion"] > 0, *bases)
    level = base - draw(0.04, 0.28) - 0.35 * (u.abs() - 0.45)  # the meniscus climbs towards the chest wall
    image = image + effusion * where["effusion"] * inside(v - level) * depth * draw(0.5, 0.9)
    spot = ellipse(draw(0.36, 0.55) * side["nodule"], draw(-0.45, 0.15), *(draw(0.06, 0.1),) * 2, draw(0, 1))
    image = image + nodule * where["nodule"] * inside(spot) * draw(0.12, 0.26)
    u0, v0, spread = draw(0.34, 0.56) * side["opacity"], draw(-0.45, 0.2), draw(0.14, 0.26)
    cloud = torch.exp(-((u - u0) ** 2 + (v - v0) ** 2) / spread**2)
    image = image + opacity * where["opacity"] * cloud * draw(0.1, 0.22)

    # Exposure: scatter outside the trunk, an uneven beam, contrast, noise.
    image = draw(0.02, 0.14) + trunk * image
    image = (image * (1 + draw(-0.12, 0.12) * x + draw(-0.12, 0.12) * y)).clamp(0.01, 1) ** draw(0.8, 1.25)
    image = image * draw(0.85, 1.1) + draw(0.015, 0.05) * noise
    masks = torch.stack([left, right, heart], dim=1) > 0.5  # (B, 3, S, S)
    labels = torch.cat([big_heart, effusion, nodule, opacity], dim=1)[..., 0]  # (B, 4)
    return (image[:, None].clamp(0, 1) * 255).round().to(torch.uint8), masks, labels
