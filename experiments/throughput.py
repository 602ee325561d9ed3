"""How fast a device trains: images a second, and the share of its matrix rate that a step reaches.

    python -m experiments.throughput --device cuda     about ten minutes; writes results/throughput.json

SPAN with DINO on a ViT-S/16 at 224 px with 2 + 6 crops in bfloat16, with and without --compile; classifiers
with and without ISNet; the peak memory of each; whether a step waits for its views; two GPUs against one,
where there are two; the loss of one step beside the CPU's; and `python train.py` from start to table.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Generator
from torch.optim import AdamW

from common.checkpoint import DataSpec, write_file
from common.config import parse
from common.models import build_encoder, build_model, decayed
from common.processes import check_device, remedy_for
from crops import multi_crop
from experiments.benchmark import RESNET, VIT, VIT_S, classifier, images_a_second, timed
from experiments.costs import operations
from experiments.runs import ROOT
from train import train_step, views_objective

SPAN, SHAPE = f"{VIT_S} --local-crops-number 6 --amp", (64, 3, 224, 224)  # images (B, C, H, W)
CLASSIFIERS = {
    "ResNet 8 times as wide, 224 px": f"{RESNET} --img-size 224 --embed-dim 512",
    "ViT-S/16 at 224 px": f"{VIT} {VIT_S}",
}
MATRIX, REPEATS = 8192, 10  # side of the matrices whose product gives the rate; timed calls of each


def seconds(work: Callable) -> float:
    """The median over REPEATS calls, after two to warm up."""
    return median([timed(work) for _ in range(REPEATS + 2)][2:])


def matrix_rate(device: str) -> float:
    """Additions and multiplications a second of one large matrix product in bfloat16."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    return 2 * MATRIX**3 / seconds(lambda: a @ b)


def span_step(flags: str, shape: tuple[int, ...], device: str) -> tuple[Callable, Callable]:
    """A training step of SPAN with DINO as train.py takes it, and the making of its views alone."""
    config, _ = parse(f"--device {device} {flags}".split())
    B, C, H, W = shape
    images = torch.randint(256, shape, dtype=torch.uint8).to(device)
    priors, sure = torch.rand(B, 3, H, W).to(device), torch.ones(B, device=device)
    grid = H // config.patch_size, W // config.patch_size
    model = build_model(config, DataSpec(C, (), False, ""), build_encoder(config, C), grid).to(device).train()
    losses = views_objective(config, model, images, lambda index: (priors[index], sure, sure))
    optimizer, generator = AdamW(decayed(model, config.weight_decay), config.lr), Generator().manual_seed(0)
    index, V = torch.arange(B, device=device), config.local_crops_number
    step = partial(train_step, config, model, losses, optimizer, index, generator, 0, 100)
    return step, lambda: multi_crop(images.float() / 255, generator, H, H // 2, locals_number=V)


@contextmanager
def of(name: str, found: dict[str, float], device: str) -> Iterator[None]:
    """What is measured inside gets the GPU's peak memory; if it has too little, or can't compile, a line."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except RuntimeError as error:
        print(f"{name}: {remedy_for(error)}")
        return
    if device.startswith("cuda"):
        found[f"{name}: peak memory in GB"] = torch.cuda.max_memory_allocated() / 1e9


def measured(device: str) -> dict[str, float]:
    """{what: images a second, a share, seconds, or GB}."""
    rate, found, B, done = matrix_rate(device), {}, SHAPE[0], 0
    for name, way in {"SPAN": "", "SPAN, --compile": " --compile"}.items():
        with of(name, found, device):
            step, make_views = span_step(SPAN + way, SHAPE, device)
            done = done if way else operations(step)  # can't be counted in a compiled step
            took = seconds(step)
            found[f"{name}: images a second"] = B / took
            found[f"{name}: share of the matrix rate"] = done / took / rate
            found[f"{name}: share of the step for its views"] = seconds(make_views) / took
        step = make_views = None  # frees their memory
    for name, flags in CLASSIFIERS.items():
        for way, added in {"plain": "", "ISNet": "--isnet 1 --lrp-gamma 0 --isnet-layers none"}.items():
            with of(f"{name}, {way}", found, device):
                loss, _ = classifier(f"{flags} {added}", SHAPE, device)
                found[f"{name}, {way}: images a second"] = B / seconds(lambda loss=loss: loss().backward())
            loss = None
    for where in ("cpu", device):
        torch.manual_seed(0)
        step, _ = span_step("--embed-dim 96", (16, 1, 64, 64), where)
        found[f"SPAN at 64 px, one step, loss on {where}"] = step()["loss"]
    if torch.cuda.device_count() > 1:
        found["images a second, two GPUs / one"] = images_a_second(2, device) / images_a_second(1, device)
    with TemporaryDirectory() as out:
        words = [sys.executable, "train.py", "--device", device, "--out", f"{out}/run"]
        found["python train.py: seconds"] = timed(lambda: subprocess.run(words, cwd=ROOT, check=True))
    return found


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: cuda)")
    device = parser.parse_args().device
    try:
        check_device(device)  # and make it the current one, which `timed` waits for
    except ValueError as error:
        parser.error(str(error))
    found = measured(device)
    for name, value in found.items():
        print(f"{name:70} {value:9.3g}")
    write_file(ROOT / "results/throughput.json", {name: float(f"{x:.4g}") for name, x in found.items()})


if __name__ == "__main__":
    main()
