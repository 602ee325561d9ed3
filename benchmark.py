"""What exposure, augmentation and ISNet cost, measured side by side on this machine.

    python benchmark.py [--json FILE]

Machines are noisy and drift, so two things are timed in turn, A B A B ..., and the median of the ratios B / A
is what is reported, with the quartiles.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from checkpoint import build_encoder, write_whole
from classify import Classifier, classification_loss, explained, isnet_losses
from crops import crop, distort, random_crops
from flags import parse
from isnet_lrp import foreground_loss
from phantom import phantom
from vit import ViT

CLASSIFIERS = {  # what trains with ISNet: its flags, and the shape of its images
    "ResNet, epsilon rule": ("--lrp-gamma 0 --isnet-layers none", (16, 1, 64, 64)),
    "ResNet, gamma rule": ("--lrp-gamma 3 --isnet-layers none", (16, 1, 64, 64)),
    "ResNet, gamma rule, inner layers": ("--lrp-gamma 3", (16, 1, 64, 64)),
    "ResNet 8 times as wide, epsilon rule": (
        "--lrp-gamma 0 --isnet-layers none --embed-dim 512",
        (8, 3, 64, 64),
    ),
    "ViT, epsilon rule": ("--backbone vit --isnet-layers none", (16, 1, 64, 64)),
    "ViT, epsilon rule, inner layers and attention": ("--backbone vit", (16, 1, 64, 64)),
    "ViT-S/16 at 224 px, epsilon rule": (
        "--backbone vit --isnet-layers none --img-size 224 --patch-size 16"
        " --embed-dim 384 --depth 12 --num-heads 6",
        (2, 3, 224, 224),
    ),
}


def ratio(a: Callable, b: Callable, runs: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of time(b) / time(a) over paired runs, after one pair."""
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
    """A step that trains through the pooled features and, if it is exposed, through the attention row."""
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


def views_with_pillow(pictures: list[Image.Image], size: int) -> list[Image.Image]:
    """One view of each picture as data loaders make it: crop, jitter, blur, solarise, one after the other."""
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


def classifier_steps(flags: str, shape: tuple[int, ...]) -> tuple[Callable, Callable]:
    """The loss of a plain step of a classifier on images (B, C, H, W), and of one with ISNet."""
    args = parse(f"--task classify --isnet 1 {flags}".split())[0]
    model = Classifier(build_encoder(args, shape[1]), 2)
    x, labels, masks = torch.rand(shape), torch.eye(2).repeat(shape[0] // 2, 1), torch.zeros(shape)[:, :1]
    masks[:, :, 16:48, 16:48] = 1

    def plain() -> Tensor:
        return classification_loss(model(x), labels, one_class=True)

    def isnet() -> Tensor:
        target = explained(labels, True, args.explain, torch.Generator())
        background, heatmap, logits = isnet_losses(model, x, masks, target, args)
        foreground = foreground_loss(heatmap, masks, 0.1, 10.0)
        return classification_loss(logits, labels, one_class=True) + (background + foreground).mean()

    return plain, isnet


def kept_bytes(loss: Callable) -> int:
    """How much memory a step keeps for its backward pass."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure(runs: int) -> dict[str, tuple[float, float, float]]:
    """{what: quartiles of the ratio}."""
    rows = {}
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as train.py does for classifiers
    for name, vit, images in (
        ("the ViT of train.py, 128 images of 64 px", ViT(64, 8, 1, 96, 4, 6), torch.rand(128, 1, 64, 64)),
        ("ViT-S/16, 8 images of 224 px", ViT(224, 16, 3, 384, 12, 6), torch.rand(8, 3, 224, 224)),
    ):
        steps = [training_step(vit, images, exposed) for exposed in (False, True)]
        rows[f"training step with the attention row / without: {name}"] = ratio(*steps, runs)
    for name, setting in CLASSIFIERS.items():
        steps = classifier_steps(*setting)
        rows[f"training step, ISNet / plain: {name}"] = ratio(
            *(lambda s=s: s().backward() for s in steps), runs
        )
        plain, isnet = map(kept_bytes, steps)
        rows[f"memory kept for the backward pass, ISNet / plain: {name}"] = (isnet / plain,) * 3
    for size, channels in ((64, 1), (64, 3), (224, 3)):
        images = phantom(64, seed=0, img_size=size)[0].repeat(1, channels, 1, 1)
        pictures = [Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy()) for x in images]
        for threads in sorted({1, os.cpu_count()}):
            torch.set_num_threads(threads)
            name = f"{size} px, {channels} channel(s), {threads} thread(s)"
            name = f"views a second, batched / Pillow one by one: {name}"
            rows[name] = ratio(batched_pipeline(images), pillow_pipeline(pictures, size), runs)
    return rows


def main() -> None:
    """Print the table; --json also writes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="paired runs of each (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(args.runs)
    for name, (low, median, high) in rows.items():
        print(f"{name:90} {median:7.3f}   ({low:.3f} to {high:.3f})")
    if args.json:
        write_whole(args.json, {name: [round(x, 3) for x in row] for name, row in rows.items()})


if __name__ == "__main__":
    main()
