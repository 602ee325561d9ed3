"""Ways round the ISNet loss on toy images, and what closes each: the picture of docs/isnet.md."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.chapters import draw, panels, show
from isnet_lrp import attention_loss, background_loss, foreground_loss
from lrp import relevance

MASK = F.pad(torch.ones(1, 1, 8, 8), [4] * 4)  # the foreground of all toys, 16 x 16 px
WIDE = F.pad(torch.ones(1, 1, 10, 10), [3] * 4)  # a made mask that is too wide by a pixel
MARKER = F.pad(torch.ones(1, 1, 2, 2), [2, 12, 2, 12])
OUTSIDE = 1 - MASK
PATCHES = F.max_pool2d(MASK, 2).flatten(2)  # (1, 1, 64)


def heat(score: Callable[[Tensor], Tensor], x: Tensor, **rule) -> Tensor:
    """The heatmap of a toy model whose outputs are summed."""
    R, _ = relevance(lambda image: score(image).sum().view(1, 1), x, torch.ones(1, 1), **rule)
    return R.detach()


def cancelling(x: Tensor) -> Tensor:
    """Two units read each pixel of the marker; their gradients cancel, their values do not."""
    units = F.relu(F.conv2d(x * MARKER, torch.ones(2, 1, 1, 1), torch.tensor([0.0, -0.5])))
    return x * MASK + F.conv2d(units, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))


def attended(x: Tensor) -> Tensor:
    """Attention (1, 1, 64) on patches of 2 x 2 px, nearly all of it on the marker, if there is one."""
    return (200 * F.avg_pool2d(x, 2).flatten(2) - 180).softmax(dim=2)


def attending(x: Tensor) -> Tensor:
    """The attention's value at the marker is a bias."""
    value = 9 * F.avg_pool2d(MARKER, 2).flatten(2)
    return torch.cat([(x * MASK).flatten(), (attended(x) * value).flatten()])


def silenced(x: Tensor) -> Tensor:
    """Units outside the foreground detect darkness; a tint silences them."""
    return x * MASK + F.relu(0.2 - x) * OUTSIDE


class Hole(NamedTuple):
    """A way round the loss: an image, a heatmap that passes, and what a remedy shows, (1, 1, 16, 16) each."""

    name: str
    image: Tensor
    passes: Tensor
    loss: Tensor
    remedy: str
    closed: Tensor  # a heatmap, or an image with a swapped background
    then: Tensor | None = None  # the loss with the remedy; None for swapped backgrounds


def holes() -> list[Hole]:
    """The eight rows of the table in docs/isnet.md."""
    noise = torch.rand(1, 1, 16, 16, generator=Generator().manual_seed(0))
    marked, tinted = noise * MASK + MARKER, noise * MASK + 0.5 * OUTSIDE
    strict = partial(background_loss, mask=MASK, decay=0.97, E=0.1)
    both, clean = heat(lambda x: x * (MASK + MARKER), marked), heat(lambda x: x * MASK, marked)
    faint = background_loss(both, MASK)
    loud, absent = both * (1 + 200 * MASK), clean + F.relu(MARKER - MARKER * (marked - MARKER))
    bounded = strict(loud) + foreground_loss(loud, MASK, 10, 60, hybrid=True)
    cancels, signed = heat(cancelling, marked), heat(cancelling, marked, gamma=3.0, signed=True)
    hidden, A = heat(attending, marked), attended(marked)
    seen, guided = F.interpolate(A.view(1, 1, 8, 8), scale_factor=2), attention_loss(A, PATCHES)
    dark, ring = heat(silenced, tinted), heat(lambda x: x * WIDE, tinted)
    swapped = noise * MASK + torch.linspace(0.1, 0.6, 16) * OUTSIDE  # WIDE less a pixel is MASK
    return [
        Hole("a small marker", marked, both, faint, "small E, ranks", both, strict(both)),
        Hole("a louder foreground", marked, loud, strict(loud), "foreground loss", loud.clip(max=1), bounded),
        Hole("the other logit reads it", marked, clean, strict(clean), "log-odds", both, strict(both)),
        Hole("its absence is coded", marked, clean, strict(clean), "inner layer", absent, strict(absent)),
        Hole("two units cancel", marked, cancels, strict(cancels), "signed gamma", signed, strict(signed)),
        Hole("attention saturates", marked, hidden, strict(hidden), "attention loss", seen, guided),
        Hole("a tint silences units", tinted, dark, strict(dark), "background swapped", swapped),
        Hole("the mask is too wide", tinted, ring, strict(ring, mask=WIDE), "swap with less", swapped),
    ]


def isnet_lrp() -> None:
    """Eight ways round the ISNet loss and what closes each, on 16 x 16 px, the foreground in the middle."""
    figure, axes = panels(6, 4)
    for k, (name, image, passes, loss, remedy, closed, then) in enumerate(holes()):
        image_ax, passes_ax, closed_ax = axes[3 * (k // 4) :, k % 4][:3]
        show(image_ax, image[0, 0], name)
        show(passes_ax, passes[0, 0] / passes.max(), f"loss {float(loss):.2f}", top=1, signed=True)
        if then is None:
            show(closed_ax, closed[0, 0], remedy)
            print(f"{name}: background loss {float(loss):.2f}; remedy: {remedy}")
        else:
            show(closed_ax, closed[0, 0] / closed.max(), f"{remedy}: {float(then):.2f}", top=1, signed=True)
            print(f"{name}: background loss {float(loss):.2f}; with {remedy} {float(then):.2f}")
    for ax, what in zip(axes[:, 0], 2 * ("image", "heatmap that passes", "what closes the hole")):
        ax.set_ylabel(what)
    draw(figure, "isnet_lrp")
