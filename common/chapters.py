"""The chapter (demo) of each concept file: `python vit.py` prints a few facts and writes vit.png.

A chapter takes at most 20 seconds on a CPU. It trains on synthetic images or not at all. `holes.py` has that
of `isnet_lrp.py`.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from attention_priors import follow, priors_from_masks, span_loss
from common.classify import Classifier
from common.metrics import localisation_ap
from common.phantom import REGIONS, phantom, stamp
from common.plots import COLOURS, GRID, plt
from common.symbols import SETS
from crops import crop, multi_crop, random_crops
from dino import CollapseMonitor
from lrp import relevance
from relvit import chance, relation_targets
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT

EYE = torch.eye(2, 3)


def panels(rows: int, columns: int) -> tuple[plt.Figure, np.ndarray]:
    """A figure with axes (rows, columns) that show no ticks."""
    size, bare = (1.6 * columns, 1.6 * rows + 0.2), {"xticks": [], "yticks": []}
    return plt.subplots(rows, columns, figsize=size, subplot_kw=bare, **GRID)


def show(ax: plt.Axes, picture: Tensor, title: str, top: float | None = None, signed: bool = False) -> None:
    """Draw a map (h, w): in grey without `top`, else in colours from 0, or -top if signed, to top."""
    colours = "gray" if top is None else "RdBu_r" if signed else "magma"
    low, high = -top if signed else 0, 1 if top is None else top
    ax.imshow(picture.detach().numpy(), cmap=colours, vmin=low, vmax=high)
    ax.set_title(title)


def draw(figure: plt.Figure, name: str) -> None:
    """Write NAME.png into the current folder."""
    figure.savefig(f"{name}.png", dpi=100)
    plt.close(figure)
    print(f"drew {name}.png")


def fit(model: nn.Module, steps: int, n: int, loss: Callable[[Tensor], Tensor], lr: float = 1e-3) -> None:
    """Train on loss(indices (32,)) of n images."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr), Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(n, (32,), generator=generator)).backward()
        optimizer.step()
    model.eval()


def vit() -> None:
    """One row of the attention, and the whole map that it belongs to, after a short guided training."""
    torch.manual_seed(0)
    images, masks, _ = phantom(300, seed=0)
    x, model = images / 127.5 - 1, ViT(64, 8, 1, 96, 4, 6)
    prior, share = follow(masks.float(), EYE.expand(300, 2, 3), (8, 8))
    fit(model, 80, 300, lambda i: span_loss(model(x[i]).attention, prior[i], share[i]))
    row, full = model(x[:1]).attention[0], model.attention_maps(x[:1])[0, -1]  # (6, 64), (6, 65, 65)
    print(f"the row returned and row 0 of the full maps differ by {(row - full[:, 0, 1:]).abs().max():.0e}")
    print(f"numbers in the row: {row.numel()}; in the full maps of all blocks: {4 * full.numel()}")
    figure, axes = panels(2, 4)
    show(axes[0, 0], images[0, 0] / 255, "image")
    show(axes[1, 0], masks[0].any(dim=0).float(), "true regions")
    for r, region in enumerate(REGIONS):
        show(axes[0, r + 1], row[r].view(8, 8), f"head {r}: {region}", top=12 / 64)
        show(axes[1, r + 1], full[r], "full map, row 0 boxed", top=12 / 64)
        axes[1, r + 1].add_patch(plt.Rectangle((0.5, -0.5), 64, 1, fill=False, color=COLOURS[0]))
    draw(figure, "vit")


def attention_priors() -> None:
    """A prior carried through crops: what each view sees of it, and the loss of uniform attention."""
    images, masks, _ = phantom(1, seed=0)
    priors, generator = priors_from_masks(masks[0]), Generator().manual_seed(1)
    theta = torch.cat([EYE[None], random_crops(4, (0.1, 0.5), generator)])
    P, share = follow(priors, theta, (8, 8))  # (5, 3, 64), (5, 3)
    views = crop((images / 255).expand(5, 1, 64, 64), theta, 64)
    figure, axes = panels(4, 5)
    for b in range(5):
        show(axes[0, b], views[b, 0], f"view {b}" if b else "image")
        for r, region in enumerate(REGIONS):
            show(axes[r + 1, b], P[b, r].view(8, 8), f"{region}: sees {100 * share[b, r]:.0f} %", top=12 / 64)
    even, own = (span_loss(A, P, share).abs() for A in (torch.full((5, 6, 64), 1 / 64), P))
    print(f"SPAN loss, equation (4): {even:.2f} nats for uniform attention, {own:.2f} for the prior itself")
    draw(figure, "attention_priors")


def crops() -> None:
    """The views of one image: boxes in the image, and what is cut out and recoloured."""
    image, generator = phantom(1, seed=0)[0] / 255, Generator().manual_seed(0)
    views, thetas = multi_crop(image, generator, 64, 32, locals_number=4)
    figure, axes = panels(1, 7)
    show(axes[0, 0], image[0, 0], "2 global, 4 local views")
    for i, (view, theta) in enumerate(zip([*views[0], *views[1]], torch.cat(thetas))):
        (w, _, cx), (_, h, cy) = theta.tolist()
        left, up = ((c - side + 1) * 32 - 0.5 for c, side in ((cx, w), (cy, h)))
        axes[0, 0].add_patch(plt.Rectangle((left, up), 64 * w, 64 * h, fill=False, color=COLOURS[i]))
        show(axes[0, i + 1], view[0], f"{100 * w * h:.0f} % of the area")
        axes[0, i + 1].spines[:].set(color=COLOURS[i], linewidth=3)
    first, second = thetas[0].split(1)  # (1, 2, 3) each
    twice = crop(crop(image, first, 256), second, 64)
    once = crop(image, first @ torch.cat([second, torch.tensor([[[0.0, 0, 1]]])], dim=1), 64)
    print(f"two crops in turn and one crop by their product differ by {(twice - once).abs().mean():.3f}")
    draw(figure, "crops")


def dino() -> None:
    """Three toy teachers and what the monitor says of them: one healthy, two that collapse."""
    K, generator = 64, Generator().manual_seed(0)
    own, common = torch.randn(32, K, generator=generator), torch.randn(K, generator=generator)
    teachers = {  # step -> scores (32, K)
        "healthy": lambda step: 4 * own,
        "uniform": lambda step: 4 * own * 0.97**step,
        "one prototype": lambda step: 4 * own + 0.3 * step * common,
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), sharey=True, layout="constrained")
    for ax, (name, scores) in zip(axes, teachers.items()):
        monitor, lines = CollapseMonitor(K, patience=50), {"entropy h": [], "KL to the mean": []}
        for step in range(400):
            monitor.update(p := scores(step).softmax(dim=1))
            h, of_mean = (-torch.xlogy(q, q).sum(dim=-1).mean() for q in (p, p.mean(dim=0)))
            for line, value in zip(lines.values(), (h, of_mean - h)):
                line.append(float(value) / np.log(K))
        for (label, line), colour in zip(lines.items(), COLOURS[5:]):
            ax.plot(line, label=label, color=colour)
        ax.set(title=name, xlabel="step", ylabel="fraction of log K", ylim=(0, 1.02))
        print(f"toy teacher, {name}:", monitor.diagnosis() if monitor.collapsed() else "no collapse")
    axes[0].legend()
    draw(figure, "dino")


def relvit() -> None:
    """RelViT's targets on a grid of 4 x 4 patches, and those of one patch as a map."""
    targets = relation_targets(4, 4)
    levels = ", ".join(f"{task} {value:.2f}" for task, value in chance(targets).items())
    print(f"what a constant prediction reaches (accuracy, or root mean squared error): {levels}")
    figure, axes = panels(2, 3)
    for k, task in enumerate(["relations", "distances", "angles"]):
        colours = "tab10" if k == 0 else "viridis"
        axes[0, k].imshow(targets[task], cmap=colours)
        axes[1, k].imshow(targets[task][5].view(4, 4), cmap=colours)
        axes[0, k].set_title(f"{task} of all pairs")
        axes[1, k].set_title("of patch 5 with each")
    draw(figure, "relvit")


def simpool() -> None:
    """CLS, GAP and SimPool, each trained for seconds on digits that lie anywhere: where does each look?"""
    rng, (_, draw_one) = np.random.default_rng(0), SETS["digits"]
    drawn = [draw_one(k, 32, rng) for k in (1, 8) for _ in range(250)]
    x = torch.tensor(np.stack([image for image, _ in drawn]), dtype=torch.float32)[:, None] * 2 - 1
    masks, y = torch.tensor(np.stack([m for _, m in drawn])), torch.arange(2).repeat_interleave(250)
    figure, axes = panels(4, 4)
    for k, (name, pool) in enumerate({"CLS": None, "GAP": GAP(), "SimPool": SimPool(48, 1.25)}.items()):
        torch.manual_seed(0)
        encoder, head = ViT(32, 4, 1, 48, 2, 3, pool=pool), nn.Linear(48, 2)
        model = nn.ModuleList([encoder, head])
        fit(model, 150, 500, lambda i: F.cross_entropy(head(encoder(x[i]).pooled), y[i]), lr=2e-3)
        features = encoder(x)
        maps = features.attention.mean(dim=1, keepdim=True)  # over heads: (500, 1, 64)
        ap = localisation_ap(maps.detach(), masks[:, None], (8, 8)).mean()
        right = (head(features.pooled).argmax(dim=1) == y).float().mean()
        print(f"{name}: training accuracy {100 * right:.0f} %, attention's AP on the digit {100 * ap:.0f} %")
        for i, row in enumerate(axes):
            show(row[0], x[100 * i + 50, 0] / 2 + 0.5, "image" if i == 0 else "")
            show(row[k + 1], maps[100 * i + 50, 0].view(8, 8), name if i == 0 else "", top=5 / 64)
    draw(figure, "simpool")


def lrp() -> None:
    """Four rules for one network that reads an L: heatmaps, and how much of the score they hold."""
    images, _, labels = phantom(300, seed=0)
    y, x = labels[:, 0], stamp(images, labels[:, 0] == 1) / 127.5 - 1
    torch.manual_seed(0)
    model, some = Classifier(ResNet(1, 32), 1), y.nonzero()[:3, 0]
    fit(model, 60, 300, lambda i: F.binary_cross_entropy_with_logits(model(x[i])[:, 0], y[i]), lr=2e-3)
    rules = {
        "epsilon, 1e-6": {}, "gamma, 3": {"gamma": 3.0}, "signed gamma, 3": {"gamma": 3.0, "signed": True},
        "signed gamma, z^B": {"gamma": 3.0, "signed": True, "input_rule": (-1.0, 1.0)},
    }  # fmt: skip
    figure, axes = panels(3, 5)
    for k, (name, rule) in enumerate(rules.items()):
        R, logits = relevance(model, x[some], torch.ones(3, 1), **rule)
        sums = ", ".join(f"{r:.2f} (score {z:.2f})" for r, z in zip(R.sum(dim=(1, 2, 3)), logits[:, 0]))
        print(f"{name}: relevance sums to {sums}; biases hold the rest")
        for i, row in enumerate(axes):
            show(row[0], x[some[i], 0] / 2 + 0.5, "image" if i == 0 else "")
            heat = R[i, 0] / R[i].abs().mean()
            show(row[k + 1], heat, name if i == 0 else "", top=12, signed=True)
    draw(figure, "lrp")
