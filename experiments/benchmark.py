"""What exposed attention, DINO and ISNet cost on this machine, as ratios.

    python -m experiments.benchmark [--only PART] [--json FILE] [--device cpu]

Machines drift, so two things are timed in turn, A B A B ..., and the median of the ratios B / A is reported,
with its quartiles. Memory is what a loss keeps for its backward pass. A classifier's step leaves out the
update of its weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim import AdamW

from common.checkpoint import DataSpec, write_file
from common.config import parse
from common.data import prepared
from common.models import build_classifier, build_encoder, build_model, decayed
from common.processes import check_device, keep_freed_memory
from crops import multi_crop
from experiments.costs import kept_bytes, operations, written_out
from experiments.runs import ROOT
from train import classifier_objective, train_step
from vit import ViT

SMALL, WIDE, LARGE = (16, 1, 64, 64), (8, 3, 64, 64), (2, 3, 224, 224)  # images (B, C, H, W)
RESNET, VIT = "--backbone resnet", "--backbone vit"
VIT_S = "--img-size 224 --patch-size 16 --embed-dim 384 --depth 12 --num-heads 6"
EPSILON = "--isnet 1 --lrp-gamma 0 --isnet-layers none"
NONE, ROW, WHOLE = "no attention exposed", "one row exposed", "attention written out"
PRETRAINING = {  # name: flags, local crops, images (B, C, H, W)
    "64 px, 2 crops": ("", 0, (64, 1, 64, 64)),
    "64 px, 2 + 4 crops": ("", 4, (64, 1, 64, 64)),
    "ViT-S/16 at 224 px, 2 + 6 crops": (VIT_S, 6, (4, 3, 224, 224)),
}
CLASSIFIERS = {  # name: flags of the plain classifier, added flags, images
    "ISNet / plain: ResNet, epsilon rule": (RESNET, EPSILON, SMALL),
    "ISNet / plain: ResNet, gamma rule": (RESNET, "--isnet 1 --isnet-layers none", SMALL),
    "ISNet / plain: ResNet, gamma rule, inner layers": (RESNET, "--isnet 1", SMALL),
    "ISNet / plain: ResNet, three steps by default": (RESNET, "--isnet 1", SMALL),
    "ISNet / plain: ResNet 8 times as wide, epsilon rule": (f"{RESNET} --embed-dim 512", EPSILON, WIDE),
    "ISNet / plain: ViT, epsilon rule": (VIT, EPSILON, SMALL),
    "ISNet / plain: ViT, epsilon rule, inner layers and attention": (VIT, "--isnet 1", SMALL),
    "ISNet / plain: ViT, three steps by default": (VIT, "--isnet 1", SMALL),
    "ISNet / plain: ViT-S/16 at 224 px, epsilon rule": (f"{VIT} {VIT_S}", EPSILON, LARGE),
} | {
    f"{way} / plain: {name}": (flags, f"--baseline {way}", SMALL)
    for name, flags in {"ResNet": RESNET, "ViT": VIT}.items()
    for way in ("multitask", "gain", "rrr", "pipeline", "gated", "swap")
}


def timed(work: Callable) -> float:
    """The seconds that a call takes."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(a: Callable, b: Callable, runs: int) -> tuple[float, ...]:
    """Quartiles of time(b) / time(a) over paired runs, after one pair to warm up."""
    pairs = [(timed(a), timed(b)) for _ in range(runs + 1)]
    return tuple(statistics.quantiles([second / first for first, second in pairs[1:]], n=4))


def exposed(side: int, line: str, device: str) -> Callable[[], Tensor]:
    """A loss of a ViT's features, and of the attention that NONE, ROW or WHOLE exposes; side: in patches."""
    torch.manual_seed(0)
    vit = ViT(img_size=8 * side, patch_size=8, in_chans=1, embed_dim=96, depth=2, num_heads=6).to(device)
    vit, images = written_out(vit) if line == WHOLE else vit, torch.rand(2, 1, 8 * side, 8 * side).to(device)

    def loss() -> Tensor:
        features = vit(images, layer=None if line == NONE else -1)
        return features.pooled.square().mean() + (0 if line == NONE else features.attention.square().mean())

    return loss


def classifier(flags: str, shape: tuple[int, ...], device: str) -> tuple[Callable, Callable]:
    """A classifier's loss in a training step (step 0 has ISNet's) on images (B, C, H, W), and its use."""
    config, _ = parse(f"--task classify --device {device} {flags}".split())
    B, C, H, W = shape
    torch.manual_seed(0)
    model = build_classifier(config, build_encoder(config, C), 2, C).to(device)
    images = torch.randint(256, shape, dtype=torch.uint8).to(device)
    labels = torch.eye(2, device=device).repeat(B // 2, 1)
    masks = torch.zeros(B, 1, H, W, dtype=torch.bool, device=device)
    masks[:, :, H // 4 : 3 * H // 4, W // 4 : 3 * W // 4] = True
    spec = DataSpec(C, ("without", "with"), True, "", relevance_range=(1.0, 10.0))  # any costs the same
    losses = classifier_objective(config, model, images, masks, labels, spec)
    index, generator = torch.arange(B, device=device), Generator().manual_seed(0)
    use = torch.inference_mode()(lambda: model(prepared(images)))
    return lambda step=0: losses(index, generator, step, 3)[0], use


def dino_steps(flags: str, shape: tuple[int, ...], device: str) -> tuple[Callable, Callable]:
    """A training step of DINO as train.py takes it, and as DINO's release does, on the same views."""
    config, _ = parse(f"--prior none --koleo 0 --max-entropy 1 --device {device} {flags}".split())
    B, C, H, W = shape
    views = [torch.randn(2 * B, C, H, W, device=device)]
    if V := config.local_crops_number:
        views.append(torch.randn(V * B, C, H // 2, W // 2, device=device))
    spec, grid = DataSpec(C, (), False, ""), (H // config.patch_size, W // config.patch_size)
    encoders = build_encoder(config, C), build_encoder(config, C)
    model, other = (build_model(config, spec, encoder, grid).to(device).train() for encoder in encoders)
    optimizer, slower = (AdamW(decayed(m, config.weight_decay), config.lr) for m in (model, other))
    index, generator, temp = torch.arange(B, device=device), Generator(), config.teacher_temp
    written_out(other)

    def losses(*_) -> tuple[Tensor, dict]:
        with torch.autocast(index.device.type, torch.bfloat16, enabled=config.amp):
            return model(views, temp, config.span_layer)[0], {}

    def released() -> float:
        student = other.student_head(torch.cat([other.student(x, layer=None).pooled for x in views]))
        with torch.no_grad():
            teacher = other.teacher_head(other.teacher(views[0], layer=None).pooled)  # (2 B, K)
            targets = ((teacher - other.loss.center) / temp).softmax(dim=-1).split(B)
            other.loss.center.mul_(0.9).add_(0.1 * teacher.mean(dim=0, keepdim=True))
        scores = (student / 0.1).split(B)  # V x (B, K), of V views of B images
        pairs = [(q, s) for i, q in enumerate(targets) for j, s in enumerate(scores) if i != j]
        loss = sum((-q * F.log_softmax(s, dim=-1)).sum(dim=-1).mean() for q, s in pairs) / len(pairs)
        slower.zero_grad()
        loss.backward()
        for p in (p for p in other.parameters() if p.grad is not None):
            p.grad.mul_(min(1.0, config.clip_grad / (p.grad.norm().item() + 1e-6)))
        slower.step()
        with torch.no_grad():
            for t, s in ((other.teacher, other.student), (other.teacher_head, other.student_head)):
                for q, p in zip(t.parameters(), s.parameters()):
                    q.mul_(config.momentum).add_((1 - config.momentum) * p)
        return loss.item()

    return partial(train_step, config, model, losses, optimizer, index, generator, 0, 100), released


def images_a_second(processes: int, device: str) -> float:
    """How many synthetic X-rays per second DINO trains on, in processes of one CPU thread or GPU each."""
    command = f"-m torch.distributed.run --standalone --nproc-per-node {processes} train.py"
    command += f" --prior none --train-images 512 --batch-size 64 --epochs 3 --device {device} --out"
    with TemporaryDirectory() as out:
        words = [sys.executable, *command.split(), f"{out}/run"]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(words, cwd=ROOT, env=threads, check=True, capture_output=True)
        rows = Path(out, "run", "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(row)["images_per_s"] for row in rows)


Ratios = Iterator[tuple[str, tuple[float, ...]]]  # name, and lower quartile, median and upper quartile


def of_attention(runs: int, device: str) -> Ratios:
    """A training step and its memory with exposed attention, over those of the same ViT without."""
    for side in (8, 16, 32, 64):
        none = exposed(side, NONE, device)
        for line in (ROW, WHOLE):
            loss, name = exposed(side, line, device), f"{line} / {NONE}: {side * side} patches"
            a, b = (lambda x=x: x().backward() for x in (none, loss))
            yield f"training step, {name}", ratio(a, b, runs if side < 64 else max(2, runs // 4))
            yield f"memory, {name}", (kept_bytes(loss) / kept_bytes(none),) * 3


def of_dino(runs: int, device: str) -> Ratios:
    """DINO's step here, beside one as in its release, and with other settings."""
    for name, (flags, V, shape) in PRETRAINING.items():
        size = shape[-1]
        fewer = runs if size == 64 else max(2, runs // 4)  # seconds a step
        flags = f"{flags} --local-crops-number {V}"
        ours, released = dino_steps(flags, shape, device)
        images, generator = torch.rand(shape, device=device), Generator()
        make_views = partial(multi_crop, images, generator, size, size // 2, locals_number=V)
        yield f"DINO's step, released / here: {name}", ratio(ours, released, fewer)
        more = operations(released) / operations(ours)
        yield f"operations of DINO's step, released / here: {name}", (more,) * 3
        yield f"making the views / DINO's step: {name}", ratio(ours, make_views, fewer)
        for way in ("--amp", "--compile") if size == 64 else ("--compile",):  # bfloat16 may take minutes
            other, _ = dino_steps(f"{flags} {way}", shape, device)
            some = max(2, fewer // 4) if way == "--amp" else fewer  # seconds a step
            yield f"DINO's step, here / with {way}: {name}", ratio(other, ours, some)
    if device.startswith("cuda") and (device != "cuda" or torch.cuda.device_count() < 2):
        return  # a GPU for each
    two = [images_a_second(2, device) / images_a_second(1, device) for _ in range(3)]
    yield "images a second of DINO's steps, two processes / one", tuple(statistics.quantiles(two, n=4))


def of_classifiers(runs: int, device: str) -> Ratios:
    """ISNet's and the baselines' training steps and memory, over those of a plain classifier."""
    for name, (flags, added, shape) in CLASSIFIERS.items():
        plain, plain_use = classifier(flags, shape, device)
        other, use = classifier(f"{flags} {added}", shape, device)
        steps = range(3 if "three" in name else 1)
        trained = [lambda loss=loss: [loss(step).backward() for step in steps] for loss in (plain, other)]
        yield f"training step, {name}", ratio(*trained, runs)
        if "ISNet /" in name and len(steps) == 1:
            yield f"memory kept for the backward pass, {name}", (kept_bytes(other) / kept_bytes(plain),) * 3
        if "gated" in name or "pipeline" in name:  # the others leave a plain model
            yield f"use, {name}", ratio(plain_use, use, runs)


PARTS = {"attention": of_attention, "dino": of_dino, "classifiers": of_classifiers}


def main() -> None:
    """Print the ratios; --json also writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)"
    )
    parser.add_argument("--runs", type=int, default=20, help="paired runs of each (default: 20)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of ratios; --only keeps others")
    args = parser.parse_args()
    check_device(args.device)  # and make it the current one, which `timed` waits for
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as train.py does for classifiers
    keep_freed_memory()  # as train.py does
    kept = args.only != PARTS and args.json and args.json.exists()
    known = json.loads(args.json.read_text()) if kept else {}
    for part in args.only:
        for name, ratios in PARTS[part](args.runs, args.device):
            low, median, high = known[name] = [round(x, 3) for x in ratios]
            print(f"{name:90} {median:7.3f}   ({low:.3f} to {high:.3f})", flush=True)
        if args.json:
            write_file(args.json, known)


if __name__ == "__main__":
    main()
