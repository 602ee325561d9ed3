"""How wrong may the one mask be? Other reference images, and masks that are shifted, scaled or swapped.

    python -m experiments.wrong_mask      some minutes; writes wrong_mask.json and two pictures into results/

SPAN's attention follows its priors, so the priors themselves are measured: the reference image's blurred
masks, registered to test images. AP at every pixel, mean over regions; Dice of the union with the true union.
All images count, not only those whose registration is trusted. Masks for ISNet are measured by what their
reference images show, since background that is left in the masks of one class alone tells the label.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import write_file
from common.baselines import grown
from common.data import Data, select
from common.foreground import mask_dice, registered_masks
from common.metrics import localisation_ap
from common.plots import LINES, plt
from common.regions import priors_over
from common.splits import load
from experiments.runs import ROOT

REFERENCES, IMAGES, BLUR = 20, 60, 0.025  # wrong masks: of a quarter of the reference images
SHIFTS = (0, 2, 4, 6, 8, 12)  # percent of a side, to the right
SCALES = (50, 70, 85, 100, 120, 140, 170)  # percent of the true width and height


def wrong(masks: Tensor, shift: float, scale: float) -> Tensor:
    """Masks (R, H, W) bool, each scaled about its own centre and moved right by a fraction of a side."""
    (R, H, W), (y, x) = masks.shape, (2 * (torch.arange(n) + 0.5) / n - 1 for n in masks.shape[1:])
    centre = torch.stack([(masks.sum(dim=1) * x).sum(dim=1), (masks.sum(dim=2) * y).sum(dim=1)], dim=1)
    centre = centre / masks.sum(dim=(1, 2)).clamp(min=1)[:, None]  # (R, 2)
    offset = centre - (centre + torch.tensor([2 * shift, 0.0])) / scale
    theta = torch.cat([torch.eye(2).expand(R, 2, 2) / scale, offset[:, :, None]], dim=2)
    points = F.affine_grid(theta, [R, 1, H, W], align_corners=False)
    return F.grid_sample(masks[:, None].float(), points, mode="nearest", align_corners=False)[:, 0] > 0.5


def scores(train: Data, reference: int, masks: Tensor, test: Data) -> tuple[float, float]:
    """Mean AP and Dice, in percent, of a reference image's priors by masks (R, S, S), registered to test."""
    name, given = train.names[reference], train.masks.clone()
    given[reference] = masks
    over = priors_over(test.images, "sample", train._replace(masks=given), name, BLUR, "bend", "cpu")
    priors, *_ = over(torch.arange(len(test.names)))  # (M, R, S, S)
    ap = localisation_ap(priors.flatten(2), test.masks, tuple(priors.shape[2:]))
    found = (priors > 0.5).any(dim=1, keepdim=True)
    return 100 * float(ap.diagonal(dim1=1, dim2=2).nanmean()), 100 * mask_dice(found, test)


def made_from(train: Data, references: tuple[int, ...], images: Tensor) -> Tensor:
    """Masks (M, 1, S, S) bool of images by the masks of one reference image or several."""
    known = torch.zeros_like(train.has_masks)
    known[list(references)] = True
    prior = "sample", train._replace(has_masks=known), train.names[references[0]], BLUR, "bend", "cpu"
    return registered_masks(images, prior, len(references))


def left_inside(train: Data, references: tuple[int, ...], test: Data) -> tuple[float, ...]:
    """Dice in percent of masks by reference images; how many pixels of background a mask holds 1 pixel inside
    its outline (the default margin), at a normal and at an enlarged heart; and how many of the foreground it
    lacks at an enlarged heart.
    """
    masks, true = made_from(train, references, test.images), test.masks.any(dim=1, keepdim=True)
    inside = 1 - grown(1 - masks.float(), 1) > 0
    normal, large = (test.labels[:, 0] == label for label in (0, 1))
    pixels = (inside & ~true)[normal], (inside & ~true)[large], (true & ~masks)[large]  # (m, 1, S, S) each
    return 100 * mask_dice(masks, test), *(float(p.sum() / len(p)) for p in pixels)


def hearts(train: Data) -> dict[str, list[tuple[int, ...]]]:
    """Five references, or five pairs, by what they show."""
    complete = train.masks.flatten(2).any(dim=2).all(dim=1)  # (N,)
    normal, large = ((complete & (train.labels[:, 0] == y)).nonzero()[:5, 0].tolist() for y in (0, 1))
    pairs = [*zip(normal, large)]
    return {"a normal heart": [*zip(normal)], "an enlarged heart": [*zip(large)], "one of each": pairs}


def draw_hearts(train: Data, test: Data, path: Path) -> None:
    """Write masks of six test images, the last three with an enlarged heart, by each kind of references."""
    shown = [i for y in (0, 1) for i in (test.labels[:, 0] == y).nonzero()[:3, 0].tolist()]
    figure, axes = plt.subplots(3, 6, figsize=(9, 4.8), layout="constrained")
    for row, (title, references) in zip(axes, hearts(train).items()):
        masks = made_from(train, references[0], test.images[shown])
        for ax, i, mask in zip(row, shown, masks):
            ax.imshow(test.images[i, 0], cmap="gray")
            ax.contour(test.masks[i].any(dim=0), [0.5], colors=LINES[4], linewidths=1)
            ax.contour(mask[0], [0.5], colors=LINES[1], linewidths=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"reference:\n{title}")
    figure.savefig(path, dpi=80)


def measured(train: Data, all_test: Data) -> dict[str, list]:
    """{what is wrong: [(how much, (AP, Dice) of each reference image), ...]}, and `left_inside` by hearts."""
    test = select(all_test, torch.arange(IMAGES))
    complete = train.masks.flatten(2).any(dim=2).all(dim=1).nonzero()[:REFERENCES, 0].tolist()
    few, masks = complete[:: REFERENCES // 5], train.masks

    def of(references: list[int], shift: float = 0, scale: float = 1, roll: int = 0) -> list[tuple]:
        changed = [wrong(masks[k].roll(roll, dims=0), shift, scale) for k in references]
        return [scores(train, k, m, test) for k, m in zip(references, changed)]

    return {
        "reference image": [(0, of(complete))],
        "shift": [(s, of(few, shift=s / 100)) for s in SHIFTS],
        "scale": [(s, of(few, scale=s / 100)) for s in SCALES],
        "swapped": [(1, of(few, roll=1))],  # each region has another one's mask
        "hearts": [
            (what, [left_inside(train, k, all_test) for k in ks]) for what, ks in hearts(train).items()
        ],
    }


def draw(found: dict[str, list], path: Path) -> None:
    """Write the curves: AP and Dice by shift and by scale, and of each reference image, in order of AP."""
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.4), sharey=True, layout="constrained")
    panels = {"reference image": "reference image", "shift": "mask shifted, % of a side"}
    panels["scale"] = "mask, % as wide and high"
    for ax, (what, label) in zip(axes, panels.items()):
        for i, (name, colour) in enumerate(zip(("mAP", "Dice"), LINES)):
            values = [[score[i] for score in sorted(map(tuple, each))] for _, each in found[what]]
            if what == "reference image":
                ax.plot(range(1, 1 + len(values[0])), values[0], "o", color=colour, ms=3, label=name)
                continue
            x = [amount for amount, _ in found[what]]
            ax.plot(x, [mean(v) for v in values], color=colour, marker="o", markersize=3)
            ax.fill_between(x, *([f(v) for v in values] for f in (min, max)), color=colour, alpha=0.2, lw=0)
        ax.set_xlabel(label)
    axes[0].set_ylabel("registered prior, %")
    axes[0].set_ylim(0, 102)
    axes[0].legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Measure, write the figures and draw them."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    out, (splits, *_) = ROOT / "results", load("phantom", 64, 0, 200)
    found = measured(splits["train"], splits["test"])
    rounded = {w: [[a, [[round(x, 2) for x in s] for s in each]] for a, each in v] for w, v in found.items()}
    write_file(out / "wrong_mask.json", rounded)
    draw(found, out / "wrong_mask.png")
    draw_hearts(splits["train"], splits["test"], out / "references.png")


if __name__ == "__main__":
    main()
