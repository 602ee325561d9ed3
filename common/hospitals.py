"""Three hospitals take the same X-rays: a shortcut of many parts, as in data pooled from several sources.

Positives from hospital A and negatives from B differ in marker and collimation, and partly in pose, exposure
and noise, whose ranges overlap. C's ranges reach beyond both, so its images are unlike any training image.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from common.phantom import stamp
from crops import crop

Range = tuple[float, float]


class Hospital(NamedTuple):
    """How a hospital takes images; each image draws its own values within the ranges."""

    marker: str  # a kind of `phantom.stamp`
    frame: Range  # black collimation at each side, as a fraction of the width
    gamma: Range  # of the brightness
    gain: Range  # a factor on the brightness
    noise: Range  # standard deviation; the images' range is 1
    turn: Range  # radians
    zoom: Range


HOSPITALS = {
    "A": Hospital("corner", (0.02, 0.06), (0.8, 1.15), (0.9, 1.1), (0, 0.03), (-0.02, 0.12), (0.95, 1.05)),
    "B": Hospital("disc", (0, 0.02), (0.9, 1.3), (0.8, 1.0), (0.01, 0.04), (-0.12, 0.02), (0.92, 1.0)),
    "C": Hospital("border", (0.05, 0.1), (1.2, 1.5), (0.7, 0.9), (0.03, 0.07), (0.12, 0.25), (0.8, 0.9)),
}


def taken_at(hospital: str, images: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, S, S) uint8 and masks (n, R, S, S) bool as a hospital, A, B or C, would have them."""
    h, (n, size) = HOSPITALS[hospital], (len(images), images.shape[-1])
    generator = Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    turn, zoom, zero = draw(*h.turn).flatten(), draw(*h.zoom).flatten(), torch.zeros(n)
    rows = turn.cos() / zoom, -turn.sin() / zoom, zero, turn.sin() / zoom, turn.cos() / zoom, zero
    theta = torch.stack(rows, dim=1).view(n, 2, 3)  # from the hospital's image to the given one
    x = crop(images.float() / 255, theta, size)
    masks = crop(masks.float(), theta, size) > 0.5
    x = x.clamp(min=1e-3) ** draw(*h.gamma) * draw(*h.gain)
    x = x + draw(*h.noise) * torch.randn(x.shape, generator=generator)
    edge = (torch.arange(size) + 0.5).minimum(size - 0.5 - torch.arange(size)) / size  # distance to a side
    lit = edge.minimum(edge[:, None]) > draw(*h.frame)  # (n, 1, S, S)
    x = (x.clamp(0, 1) * lit * 255).round().to(torch.uint8)
    return stamp(x, torch.ones(n, dtype=torch.bool), h.marker), masks


def mixed(present: Tensor, images: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images and masks from hospital A where present (n,), and from hospital B elsewhere; as `taken_at`."""
    at_a, at_b = (taken_at(hospital, images, masks, seed) for hospital in "AB")
    return tuple(torch.where(present[:, None, None, None], a, b) for a, b in zip(at_a, at_b))
