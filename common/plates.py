"""Synthetic industrial plates under a fixed camera, with defects and exact masks: visual inspection.

A brushed plate with a bore, four holes and a sticker lies on a dark belt, shifted by up to two pixels and
turned by up to two degrees. So the statistics of unlabelled images show where to look (`--prior statistics`).

Masks: `plate` is the metal that is left, `holes` the bore and the drilled holes, `defect` the union of an
image's defects, often empty. A misplaced sticker's mask covers where it lies and where it should lie.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.phantom import canvas, in_batches, turned

REGIONS = ["plate", "holes", "defect"]
FINDINGS = ["scratch", "missing hole", "chip", "stain", "misplacement"]
PREVALENCE = 0.2  # of each finding: a third of all plates are good
NUMBERS = 48  # random numbers per image
HOLES = [(-0.52, -0.34), (0.52, -0.34), (-0.52, 0.34), (0.52, 0.34)]  # (u, v) in the plate's coordinates
STICKER = (0.36, 0.0)


def plates(n: int, seed: int, img_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """n plates: images (n, 1, S, S) uint8, masks (n, 3, S, S) bool in the order of REGIONS, and labels (n, 5)
    float, 0 or 1, in the order of FINDINGS. Raises ValueError for n < 1 or img_size < 64 (no defect is lost).
    """
    if n < 1 or img_size < 64:
        raise ValueError(f"parts: {n} images of {img_size} px, but 1 image of 64 px is the minimum")
    return in_batches(_draw, n, seed, img_size, NUMBERS)


def _draw(numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks and labels from numbers (B, NUMBERS) in [0, 1) and normal noise (B, S, S)."""
    draw, inside, x, y = canvas(numbers, noise.shape[-1])

    def disc(u0: Tensor | float, v0: Tensor | float, radius: Tensor | float) -> Tensor:
        return inside(radius - torch.sqrt((u - u0) ** 2 + (v - v0) ** 2 + 1e-6))

    def box(u: Tensor, v: Tensor, a: float, b: float, corner: float = 0.0) -> Tensor:  # > 0 inside
        p, q = u.abs() - a + corner, v.abs() - b + corner
        outside = torch.sqrt(p.clamp(min=0) ** 2 + q.clamp(min=0) ** 2 + 1e-6)
        return corner - outside - torch.maximum(p, q).clamp(max=0)

    # Pose: the camera is fixed, so the plate hardly moves.
    u, v = turned(x - draw(-0.06, 0.06), y - draw(-0.06, 0.06), draw(-0.035, 0.035))
    scratch, missing, chip, stain, misplaced = ((draw(0, 1) < PREVALENCE).float() for _ in FINDINGS)

    # The plate, chips off its edge, and holes.
    whole = inside(box(u, v, 0.74, 0.56, corner=0.12))
    along, edge = draw(-0.85, 0.85), (draw(0, 1) * 4).floor()  # a side of the plate
    u0 = torch.where(edge < 2, along * 0.62, (2 * edge - 5) * 0.74)
    v0 = torch.where(edge < 2, (2 * edge - 1) * 0.56, along * 0.44)
    bite = whole * chip * disc(u0, v0, draw(0.09, 0.16))
    absent, undrilled = (draw(0, 1) * 4).floor(), torch.zeros_like(whole)
    holes = disc(-0.14, 0.0, 0.24)
    for k, (u0, v0) in enumerate(HOLES):
        hole, gone = disc(u0, v0, 0.1), missing * (absent == k)
        holes, undrilled = holes + hole * (1 - gone), undrilled + hole * gone
    holes = holes * (1 - bite)
    metal = whole * (1 - bite) * (1 - holes)

    # The sticker, in its place or shifted and turned.
    away, turn = draw(0, 6.28), draw(0.15, 0.5) * (draw(0, 1) - 0.5).sign()
    shift = misplaced * draw(0.06, 0.13)
    p, q = u - STICKER[0] - shift * away.cos(), v - STICKER[1] - shift * away.sin()
    p, q = turned(p, q, misplaced * turn)
    sticker = inside(box(p, q, 0.12, 0.18))
    bars = (torch.cos(p * 78) > 0) * inside(box(p, q, 0.09, 0.1))

    # Scratches and stains lie above or below the bore, so that they are always visible.
    def beside() -> tuple[Tensor, Tensor]:
        side = (draw(0, 1) - 0.5).sign()
        return turned(u - draw(-0.6, 0.6), v - side * draw(0.28, 0.42), draw(0, 3.14))

    p, q = beside()
    line = scratch * inside(box(p, q + 0.6 * draw(-1, 1) * p**2, 0.3, 0.02)) * metal
    p, q = beside()
    wide, lobes = draw(0.1, 0.17), 1 + 0.25 * torch.cos(3 * torch.atan2(q, p) + draw(0, 6.28))
    blot = stain * inside(wide * lobes - torch.sqrt((p / 1.3) ** 2 + q**2 + 1e-6)) * metal

    # Light, and the grain of brushed metal: noise smoothed in one direction.
    grain = F.avg_pool2d(noise[:, None], (1, 9), 1, (0, 4), count_include_pad=False)[:, 0] * 3
    belt, steel = draw(0.06, 0.14), draw(0.5, 0.66)
    image = belt + (steel - belt) * metal + draw(0.01, 0.025) * grain * metal
    image = image + metal * sticker * (0.92 - steel - 0.6 * bars)
    image = image + line * draw(0.16, 0.3) * (draw(0, 1) - 0.4).sign() - blot * draw(0.1, 0.2)
    image = image * (1 + draw(-0.15, 0.15) * x + draw(-0.15, 0.15) * y) * draw(0.9, 1.1)
    image = image + draw(0.01, 0.03) * noise

    place = inside(box(u - STICKER[0], v - STICKER[1], 0.12, 0.18))
    off = misplaced * torch.maximum(sticker, place) * metal
    defect = torch.stack([line, undrilled, bite, blot, off]).amax(dim=0)
    masks = torch.stack([metal, holes, defect], dim=1) > 0.5  # (B, 3, S, S)
    labels = torch.cat([scratch, missing, chip, stain, misplaced], dim=1)[..., 0]  # (B, 5)
    return (image[:, None].clamp(0, 1) * 255).round().to(torch.uint8), masks, labels
