"""Figures. Maps have one colour scale everywhere, so that panels can be compared.

Attention is shown in units of a uniform map, from 0 to SCALE; relevance in units of its mean absolute value,
from -SCALE to SCALE. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, no windows
matplotlib.rcParams |= {"axes.titlesize": 7, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
matplotlib.rcParams |= {"legend.fontsize": 7, "legend.frameon": False, "savefig.dpi": 120}
matplotlib.rcParams["image.interpolation"] = "nearest"  # pixels as they are, in half as many bytes
matplotlib.rcParams["text.parse_math"] = False  # a region's name may hold $, _ or {

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from common.data import Data

COLOURS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00"]
LINES = COLOURS[5:] + COLOURS[:5]  # the dark ones first
SCALE = 12.0
GRID = {"squeeze": False, "layout": "constrained"}  # of panels


def _lines(names: Iterable[str], colours: list[str]) -> list[Line2D]:
    """A legend's lines."""
    return [Line2D([], [], color=colour, label=name) for name, colour in zip(names, cycle(colours))]


def _save(figure: Figure, path: Path, **how) -> Path:
    figure.savefig(path, **how)
    plt.close(figure)
    return path


def map_grid(
    path: Path, images: Tensor, masks: Tensor | None, regions: list[str], columns: dict[str, Tensor],
    signed: bool = False, outlined: str = "true regions", side: float = 1.15,
) -> None:  # fmt: skip
    """Write a figure with a row for each image: the image, its masks (titled `outlined`), maps over it.

    images (B, C, H, W) in [0, 1], masks (B, R, H, W), columns {title: maps (B, h, w)}: attention over patches
    or, if signed, relevance / mean |relevance|: red is evidence for, blue against. side: inches a panel.
    """
    titles = ["image"] + [outlined] * (masks is not None) + list(columns)
    B, (H, W) = len(images), images.shape[-2:]
    lines = max(title.count("\n") for title in titles)
    height = max(side * B * min(3, H / W), 1.1)  # room for the colour bar's label
    size = (side * len(titles) + 0.7, height + 0.6 + 0.13 * lines)
    figure, axes = plt.subplots(B, len(titles), figsize=size, **GRID)
    how = {"cmap": "bwr" if signed else "magma", "vmin": -SCALE if signed else 0, "vmax": SCALE}
    for b, row in enumerate(axes):
        for ax, title in zip(row, titles):
            ax.imshow(images[b].permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
            if b == 0:
                ax.set_title(title)
        for r in range(0 if masks is None else len(regions)):
            row[1].contour(masks[b, r].float().numpy(), [0.5], colors=COLOURS[r % len(COLOURS)], linewidths=1)
        for ax, maps in zip(row[len(titles) - len(columns) :], columns.values()):
            heat = maps[b][None, None] * (1 if signed else maps[b].numel())  # 1 = uniform
            heat = F.interpolate(heat, size=(H, W), mode="bilinear", align_corners=False)[0, 0]
            shown = ax.imshow(heat.numpy(), alpha=1.0 if signed else 0.8, **how)
    bar = figure.colorbar(shown, ax=axes, fraction=0.012, pad=0.01)
    label = "relevance / its mean size; red: for, blue: against" if signed else "attention / uniform"
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)
    if masks is not None:
        figure.legend(handles=_lines(regions, COLOURS), loc="outside lower center", ncols=len(regions))
    _save(figure, path, bbox_inches="tight")  # a title may be wider than its panel


def draw_maps(path: Path, shown: Data, maps: dict[str, Tensor], signed: bool) -> None:
    """`map_grid` of maps {title: (M, h, w)} over images and their true regions."""
    masks = shown.masks if shown.has_masks.any() else None
    map_grid(path, shown.images.float() / 255, masks, shown.regions, maps, signed)


def curves(path: Path, histories: dict[str, list[dict]]) -> Path:
    """Write training curves of {run: [{"epoch": e, name: value}, ...]}: a panel per name, a line per run."""
    rows = [row for history in histories.values() for row in history]
    names = list(dict.fromkeys(name for row in rows for name in row))  # DINO's end with its collapse
    names = [name for name in names if name not in ("epoch", "images_per_s")]
    figure, axes = plt.subplots(1, len(names), figsize=(2.4 * len(names), 2.1), **GRID)
    for ax, name in zip(axes[0], names):
        for history, colour in zip(histories.values(), cycle(LINES)):
            values = [row.get(name, np.nan) for row in history]
            dot = "o" if np.isfinite(values).sum() == 1 else None  # a line of one point can't be seen
            ax.plot([row["epoch"] for row in history], values, color=colour, marker=dot)
        ax.set_xlabel("epoch")
        ax.locator_params("x", integer=True)
        ax.set_ylabel(name.replace("_", " "))
        ax.set_ylim(bottom=0)
    if len(histories) > 1:
        figure.legend(handles=_lines(histories, LINES), loc="outside lower center", ncols=len(histories))
    return _save(figure, path)


def low_data(path: Path, runs: dict[str, dict[str, dict[float, list[float]]]]) -> Path:
    """Write curves of scores over label fractions: one panel per probe, one line per run, its range over
    draws shaded. runs: {run: {probe: {fraction: one value per draw}}}, all in [0, 1].
    """
    probes = list(dict.fromkeys(probe for found in runs.values() for probe in found))
    figure, axes = plt.subplots(1, len(probes), figsize=(2.9 * len(probes), 2.6), sharey=True, **GRID)
    for ax, probe in zip(axes[0], probes):
        for found, colour in zip(runs.values(), cycle(LINES)):
            values = found.get(probe, {})
            x = [100 * fraction for fraction in values]
            low, mean, high = ([100 * f(v) for v in values.values()] for f in (np.min, np.mean, np.max))
            ax.plot(x, mean, color=colour, marker="o", markersize=3)
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        x = sorted({100 * fraction for found in runs.values() for fraction in found.get(probe, {})})
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{percent:g}" for percent in x])
        ax.minorticks_off()
        ax.set_xlabel("label fraction, %")
        ax.set_ylabel(f"{probe}, %")
    axes[0][0].legend(handles=_lines(runs, LINES))
    return _save(figure, path)
