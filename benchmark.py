"""What exposure and augmentation cost, measured side by side on this machine.

    python benchmark.py [--json FILE]

Machines are noisy and drift, so two things are timed in turn, A B A B ..., and the median of the ratios B / A
is what is reported, with the quartiles. Everything runs on one thread, so that the ratios are ratios per
core.
"""

import argparse
import io
import json
import random
import statistics
import time
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn

from checkpoint import write_whole
from crops import crop, distort, random_crops
from phantom import phantom
from vit import ViT


def ratio(a: Callable, b: Callable, runs: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of time(b) / time(a) over paired runs, one pair of
    warm-up."""
    ratios = []
    for _ in range(runs + 1):
        times = []
        for work in (a, b):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return tuple(statistics.quantiles(ratios[1:], n=4))


def training_step(vit: ViT, images: Tensor, exposed: bool) -> Callable:
    """A step that trains through the pooled features, and through the attention row as well if it is
    exposed."""
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4)

    def step() -> None:
        features = vit(images, layer=-1 if exposed else None)
        loss = features.pooled.square().mean()
        if exposed:
            loss = loss + features.attention.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def kept_bytes(side: int) -> int:
    """Bytes that autograd keeps for the exposed row of a small ViT with patches of 4 px on images of `side`
    px."""
    vit, images, kept = ViT(side, 4, 1, 24, 1, 3), torch.rand(1, 1, side, side), {}
    for layer in (None, -1):
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
            vit(images, layer=layer)
        kept[layer] = sum(held)
    return kept[-1] - kept[None]


def views_with_pillow(pictures: list[Image.Image], size: int) -> list[Image.Image]:
    """One view of each picture as data loaders make it: crop, resize, jitter, blur, solarise, one image at a
    time."""
    views = []
    for picture in pictures:
        area, aspect = random.uniform(0.4, 1.0), (3 / 4) * (16 / 9) ** random.random()
        w, h = (min(1.0, side) * size for side in ((area * aspect) ** 0.5, (area / aspect) ** 0.5))
        left, top = random.uniform(0, size - w), random.uniform(0, size - h)
        view = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        if random.random() < 0.8:
            view = ImageEnhance.Brightness(view).enhance(random.uniform(0.6, 1.4))
            view = ImageEnhance.Contrast(view).enhance(random.uniform(0.6, 1.4))
            if view.mode == "RGB":
                view = ImageEnhance.Color(view).enhance(random.uniform(0.8, 1.2))
                hue, saturation, value = view.convert("HSV").split()
                turn = random.randint(-25, 25)
                hue = hue.point(lambda x: (x + turn) % 256)
                view = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if random.random() < 0.55:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0) * size / 224))
        if random.random() < 0.1:
            view = ImageOps.solarize(view)
        views.append(view)
    return views


def pillow_pipeline(pictures: list[Image.Image], size: int) -> Callable:
    """Views of all pictures as a tensor, as a data loader without workers would make them."""

    def work() -> Tensor:
        views = [
            torch.frombuffer(bytearray(v.tobytes()), dtype=torch.uint8)
            for v in views_with_pillow(pictures, size)
        ]
        return torch.stack([v.view(size, size, -1).permute(2, 0, 1).float() / 255 for v in views])

    return work


def batched_pipeline(images: Tensor) -> Callable:
    """The same views of images (B, C, S, S) uint8, batched, as train.py makes them."""
    generator = torch.Generator().manual_seed(0)

    def work() -> Tensor:
        theta = random_crops(len(images), (0.4, 1.0), generator)
        return distort(
            crop(images.float() / 255, theta, images.shape[-1]), generator, blur=0.55, solarise=0.1
        )

    return work


def main() -> None:
    """Print the table; --json also writes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="paired runs of each (default: 30)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name, vit, images in (
        ("ViT of train.py, 128 images of 64 px", ViT(64, 8, 1, 96, 4, 6), torch.rand(128, 1, 64, 64)),
        ("ViT-S/16, 4 images of 224 px", ViT(224, 16, 3, 384, 12, 6), torch.rand(4, 3, 224, 224)),
    ):
        steps = [training_step(vit, images, exposed) for exposed in (False, True)]
        rows[f"training step with attention / without: {name}"] = ratio(*steps, args.runs)
    for side in (64, 128, 256):
        rows[f"bytes kept for the attention row, N = {(side // 4) ** 2}"] = (kept_bytes(side),) * 3
    for size, channels in ((64, 1), (64, 3), (224, 3)):
        images = phantom(64, seed=0, img_size=size)[0].repeat(1, channels, 1, 1)
        pictures = [Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy()) for x in images]
        pair = batched_pipeline(images), pillow_pipeline(pictures, size)
        rows[f"views per second, batched / Pillow one by one: {size} px, {channels} channel(s)"] = ratio(
            *pair, args.runs
        )
    for name, (low, median, high) in rows.items():
        print(f"{name:78} {median:10.3f}   ({low:.3f} to {high:.3f})")
    if args.json:
        write_whole(args.json, {name: [round(x, 4) for x in row] for name, row in rows.items()})


if __name__ == "__main__":
    main()
