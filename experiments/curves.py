"""Cost curves: time and memory of a training step by image size, patches, heads, batch, width and depth.

    python -m experiments.curves      some minutes on an idle machine; writes curves.json and curves.png

A ViT that exposes one row of its attention, against one that exposes none and one that writes attention out;
ISNet by default, against the plain classifier. The settings of a panel are timed in turn, round after round,
so that a drifting machine affects all alike. Values are medians over rounds, relative to a panel's first line
at its first setting. ISNet's time is the mean of three steps, its memory that of the step with relevance.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from matplotlib.ticker import LogLocator
from torch import Tensor

from common.checkpoint import write_file
from common.plots import LINES, plt
from experiments.benchmark import RESNET, SMALL, VIT, classifier, timed
from experiments.costs import kept_bytes, written_out
from experiments.layout import NONE, PATCHES, ROW, WHOLE
from experiments.runs import ROOT
from vit import ViT

ROUNDS = 7
PLAIN, ISNET = "plain classifier", "ISNet, every third step"
VITS = {  # panel: settings, each (x, image side, patch size, heads, batch)
    "image side, px (patches of 16 px)": [(side, side, 16, 6, 8) for side in (64, 128, 224, 448)],
    PATCHES: [(n * n, 8 * n, 8, 6, 2) for n in (8, 16, 32, 64)],
    "heads (256 patches)": [(heads, 128, 8, heads, 8) for heads in (1, 2, 3, 6, 12)],
    "images a batch (64 patches)": [(batch, 64, 8, 6, batch) for batch in (4, 16, 64, 256)],
}
CLASSIFIERS = {  # panel: settings, each (x, flags)
    "width of a ResNet": [(width, f"{RESNET} --embed-dim {width}") for width in (16, 64, 256)],
    "depth of a ViT": [(depth, f"{VIT} --depth {depth}") for depth in (1, 3, 6, 12)],
}


def vit_step(side: int, patch_size: int, heads: int, batch: int, line: str) -> Callable[[], Tensor]:
    """A loss of the features, and of the attention that is exposed, by a ViT of 2 blocks."""
    torch.manual_seed(0)
    vit, images = ViT(side, patch_size, 1, 96, 2, heads), torch.rand(batch, 1, side, side)
    if line == WHOLE:
        written_out(vit)

    def loss(step: int = 0) -> Tensor:
        features = vit(images, layer=None if line == NONE else -1)
        return features.pooled.square().mean() + (0 if line == NONE else features.attention.square().mean())

    return loss


def seconds(works: list[Callable]) -> list[float]:
    """The median time of each, timed in turn, each after one call that is not timed."""
    rounds = [[(timed(work), timed(work))[1] for work in works] for _ in range(ROUNDS)]
    return [median(times) for times in zip(*rounds)]


def panel(x: list[int], lines: dict[str, list[Callable]], steps: int = 1) -> dict:
    """Time and memory of {line: a loss for each x}; a loss of several steps is called with each in turn."""

    def trained(loss: Callable) -> Callable:
        return lambda: [loss(step).backward() for step in range(steps)]

    flat = [line[i] for i in range(len(x)) for line in lines.values()]
    times, memory = seconds([trained(loss) for loss in flat]), [kept_bytes(loss) for loss in flat]
    made: dict = {"x": x}
    for what, values in {"time": times, "memory": memory}.items():
        relative = [round(v / values[0], 3) for v in values]
        made[what] = {name: relative[i :: len(lines)] for i, name in enumerate(lines)}
    return made


def measured() -> dict[str, dict]:
    """{panel: x, time and memory}."""
    found = {}
    for name, settings in VITS.items():
        lines = {line: [vit_step(*sizes, line) for _, *sizes in settings] for line in (NONE, ROW, WHOLE)}
        found[name] = panel([x for x, *_ in settings], lines)
    for name, settings in CLASSIFIERS.items():
        lines = {}
        for line, added in {PLAIN: "", ISNET: "--isnet 0.3"}.items():
            lines[line] = [classifier(f"{flags} {added}", SMALL, "cpu")[0] for _, flags in settings]
        found[name] = panel([x for x, _ in settings], lines, steps=3)
    return found


def draw(found: dict[str, dict], path: Path) -> None:
    """Write the curves, three panels a row: time above, memory below."""
    figure, axes = plt.subplots(4, 3, figsize=(8.4, 8.4), layout="constrained")
    for k, (name, made) in enumerate(found.items()):
        for row, what in enumerate(("time", "memory")):
            ax = axes[2 * (k // 3) + row, k % 3]
            for (line, values), colour in zip(made[what].items(), LINES):
                ax.plot(made["x"], values, "o-", color=colour, markersize=3, label=line)
            ax.set(xscale="log", yscale="log", ylabel="memory kept" if row else "time of a step", xlabel=name)
            ax.set_xticks(made["x"], [str(x) for x in made["x"]])
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            if not row:
                ax.legend(loc="upper left")
    figure.savefig(path)


def main() -> None:
    """Measure, write the figures and draw them."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    out = ROOT / "results"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as train.py does for classifiers
    found = measured()
    write_file(out / "curves.json", found)
    draw(found, out / "curves.png")


if __name__ == "__main__":
    main()
