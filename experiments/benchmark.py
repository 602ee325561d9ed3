"""What exposure, augmentation and ISNet cost, measured side by side on this machine.

    python -m experiments.benchmark [--json FILE] [--device cpu]

Machines are noisy and drift, so two things are timed in turn, A B A B ..., and the median of the ratios B / A
is what is reported, with the quartiles. A training step has two floors, both counted operation by operation:
products of large matrices with as many multiplications as its convolutions and matrix products, and copies of
a large block with as many bytes as all its operations read and write. The second is one of main memory: what
fits into a cache may be faster. Next to read: `experiments.py`.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from common.baselines import BASELINES
from common.checkpoint import build_classifier, build_encoder, write_whole
from common.models import natural_range, objective, relevance_of, rule, scores_of
from crops import crop, distort, random_crops
from common.data import BATCH, prepared
from common.config import parse
from common.loop import Step, learn, optimizer_for
from common.phantom import phantom
from common.pretrain import relations, self_distillation
from relvit import TASKS
from ssl import DINO, RelViT
from vit import Attention, ViT

PRETRAINING = {
    "SPAN, 64 images of 64 px": "",
    "DINO": "--prior none",
    "RelViT": "--ssl relvit --prior none",
    "RelViT guided by SPAN": "--ssl relvit",
}
ON_GPU = {  # and there, a step as large as DINO's authors take
    "SPAN, ViT-S/16, 64 images of 224 px, 2 + 6 views, bfloat16": (
        "--img-size 224 --patch-size 16 --embed-dim 384 --depth 12 --num-heads 6 --local-crops-number 6 --amp"
    )
}
ATTENTION = {  # on a CPU, where torch doesn't count it: by the shapes of q, k, v and of the gradient, q, k, v
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_: sdpa_backward_flop_count(g, q, k, v)
    ),
}
SMALL, WIDE, LARGE = (16, 1, 64, 64), (8, 3, 64, 64), (2, 3, 224, 224)  # images (B, C, H, W)
RESNET, VIT = "--backbone resnet", "--backbone vit"
STEPS = {  # classifiers' steps, against their floors: flags and images
    "plain ResNet, 16 images of 64 px": (RESNET, SMALL),
    "ISNet, ResNet": (f"{RESNET} --isnet 3", SMALL),
    "plain ViT": (VIT, SMALL),
    "ISNet, ViT": (f"{VIT} --isnet 3", SMALL),
}
VIT_S = f"{VIT} --img-size 224 --patch-size 16 --embed-dim 384 --depth 12 --num-heads 6"
CLASSIFIERS = {  # what is compared with the plain classifier of the same encoder: its flags, and what it adds
    "ISNet / plain: ResNet, epsilon rule": (RESNET, "--isnet 1 --lrp-gamma 0 --isnet-layers none", SMALL),
    "ISNet / plain: ResNet, gamma rule": (RESNET, "--isnet 1 --isnet-layers none", SMALL),
    "ISNet / plain: ResNet, gamma rule, inner layers": (RESNET, "--isnet 1", SMALL),
    "ISNet / plain: ResNet 8 times as wide, epsilon rule": (
        f"{RESNET} --embed-dim 512",
        "--isnet 1 --lrp-gamma 0 --isnet-layers none",
        WIDE,
    ),
    "ISNet / plain: ViT, epsilon rule": (VIT, "--isnet 1 --isnet-layers none", SMALL),
    "ISNet / plain: ViT, epsilon rule, inner layers and attention": (VIT, "--isnet 1", SMALL),
    "ISNet / plain: ViT-S/16 at 224 px, epsilon rule": (VIT_S, "--isnet 1 --isnet-layers none", LARGE),
    "channels last / as usual: ResNet": (RESNET, "--channels-last", SMALL),
    "channels last / as usual: ResNet, ISNet": (f"{RESNET} --isnet 1", "--channels-last", SMALL),
} | {
    f"{baseline} / plain: {name}": (encoder, f"--baseline {baseline}", SMALL)
    for name, encoder in {"ResNet": RESNET, "ViT": VIT}.items()
    for baseline in BASELINES
}


def ratio(a: Callable, b: Callable, runs: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of time(b) / time(a) over paired runs, after one pair."""
    ratios, wait = [], torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(runs + 1):
        times = []
        for work in (a, b):
            wait()
            started = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return tuple(statistics.quantiles(ratios[1:], n=4))


class Counted(TorchDispatchMode):
    """Counts operations of matrix products, convolutions and attention, and bytes that any operation moves.

    That is, reads or writes; a view moves none.
    """

    operations = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made, name = func(*args, **kwargs), func._overloadpacket
        if name in ATTENTION:
            self.operations += ATTENTION[name](*(t.shape for t in args if isinstance(t, Tensor)))
        elif name in flop_registry:
            self.operations += flop_registry[name](*args, **kwargs, out_val=made)
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)]
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)  # if expanded
        return made


def counted(work: Callable) -> Counted:
    """The operations and bytes of one call of `work`."""
    with Counted() as count:
        work()
    return count


def product_of(work: Callable, device: str, dtype: torch.dtype = torch.float32) -> Callable:
    """Products of large matrices with as many operations as `work`."""
    side, total = (4096 if device != "cpu" else 512), counted(work).operations
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    whole, rows = divmod(round(total / (2 * side**2)), side)

    def product() -> None:
        for size in [side] * whole + [rows]:
            a[:size] @ b

    return product


def copies_of(work: Callable, device: str) -> Callable:
    """Copies of a large block that move as many bytes as the operations in `work`."""
    block = torch.zeros(2, 2**28, dtype=torch.uint8, device=device)  # 256 MiB, which no cache holds
    whole, rest = divmod(counted(work).bytes // 2, block.shape[1])  # a copied byte is read and written

    def copies() -> None:
        for size in [block.shape[1]] * whole + [rest]:
            block[0, :size].copy_(block[1, :size])

    return copies


def pretraining_step(flags: str, images: Tensor) -> Callable:
    """A whole step of train.py's pretraining on images (B, C, S, S) uint8: views, losses, update, teacher."""
    args = parse(f"--img-size {images.shape[-1]} {flags}".split())[0]
    torch.manual_seed(0)
    encoder = build_encoder(args, images.shape[1])
    if args.ssl == "relvit":
        model = RelViT(encoder, args.embed_dim, encoder.grid(images), TASKS)
    else:
        model = DINO(encoder, args.embed_dim, args.out_dim)
    model = model.to(images.device).train()
    everyone, generator, optimizer = torch.arange(len(images)), torch.Generator(), optimizer_for(model, args)
    priors = torch.rand(len(images), 3, *images.shape[2:], device=images.device)
    guided = None if args.prior == "none" else lambda index: priors[index]
    losses = (relations if args.ssl == "relvit" else self_distillation)(args, model, images, guided)
    step = Step(model, losses)
    return lambda: learn(args, model, step, optimizer, everyone.to(images.device), generator, 1, 100)


def attention_of_size(tokens: int, how: str, device: str) -> Callable:
    """Forward and backward of an attention layer over (B, tokens, 64), its row exposed, or all, or none."""
    torch.manual_seed(0)
    attention = Attention(64, 4).to(device)
    x = torch.randn(max(1, 4096 // tokens), tokens, 64, device=device, requires_grad=True)

    def work() -> None:
        if how == "all":
            q, k, v = attention.split(x)
            A = Attention.weights(q, k)
            y = attention.proj((A @ v).transpose(1, 2).flatten(2))
            loss = y.square().mean() + A[:, :, 0].square().mean()
        else:
            y, row = attention(x, row=how == "row")
            loss = y.square().mean() + (row.square().mean() if how == "row" else 0)
        loss.backward()

    return work


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


def classifier(flags: str, shape: tuple[int, ...], device: str) -> tuple[Callable, Callable]:
    """A classifier on images (B, C, H, W): its training loss, as in train.py, and its use."""
    args = parse(f"--task classify --device {device} {flags}".split())[0]
    B, C, H, W = shape
    torch.manual_seed(0)
    model = build_classifier(args, build_encoder(args, C), 2, C).to(device)
    images = torch.randint(256, shape, dtype=torch.uint8).to(device)
    labels = torch.eye(2, device=device).repeat(B // 2, 1)
    masks = torch.zeros(B, 1, H, W, dtype=torch.bool, device=device)
    masks[:, :, H // 4 : 3 * H // 4, W // 4 : 3 * W // 4] = True
    if args.isnet:
        args.relevance_range = natural_range(model, images, masks, labels, args)
    losses = objective(args, model, images, masks, labels)
    everyone, generator = torch.arange(B, device=device), torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def use() -> Tensor:
        return model(prepared(images))

    return lambda: losses(everyone, generator)[0], use


def kept_bytes(loss: Callable) -> int:
    """How much memory a step keeps for its backward pass."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step_costs(runs: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Training steps over their floors; and what exposing attention costs."""
    rows = {}
    images = phantom(64, seed=0)[0].to(device)
    if device != "cpu":
        for name, flags in ON_GPU.items():
            large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :224, :224]
            step = pretraining_step(f"{flags} --device {device}", large)
            floor = product_of(step, device, torch.bfloat16)
            rows[f"training step / its operations' floor: {name}"] = ratio(floor, step, runs)
    steps = {
        name: pretraining_step(f"{flags} --device {device}", images) for name, flags in PRETRAINING.items()
    }
    for name, (flags, shape) in STEPS.items():
        loss = classifier(flags, shape, device)[0]
        steps[name] = lambda loss=loss: loss().backward()
    for name, step in steps.items():
        rows[f"training step / its operations' floor: {name}"] = ratio(product_of(step, device), step, runs)
        rows[f"training step / its bytes' floor: {name}"] = ratio(copies_of(step, device), step, runs)
    for name, size, images in (
        ("the ViT of train.py, 128 images of 64 px", (64, 8, 1, 96, 4, 6), (128, 1, 64, 64)),
        ("ViT-S/16, 8 images of 224 px", (224, 16, 3, 384, 12, 6), (8, 3, 224, 224)),
    ):
        vit, x = ViT(*size).to(device), torch.rand(images, device=device)
        steps = [training_step(vit, x, exposed) for exposed in (False, True)]
        rows[f"training step with the attention row / without: {name}"] = ratio(*steps, runs)
    for tokens in (64, 256, 1024, 4096):
        none, row, whole = (attention_of_size(tokens, how, device) for how in ("none", "row", "all"))
        rows[f"attention layer with its row / without: {tokens} tokens"] = ratio(none, row, runs)
        rows[f"attention layer written out / without its row: {tokens} tokens"] = ratio(none, whole, runs)
    return rows


def heatmaps(flags: str, device: str) -> tuple[Callable, Callable]:
    """Predictions and LRP heatmaps of 250 phantoms, as in evaluate.py."""
    args = parse(f"--task classify --device {device} {flags}".split())[0]
    args.one_class = True
    images = phantom(BATCH, seed=0)[0]
    model = build_classifier(args, build_encoder(args, 1), 2, 1).to(device)
    return lambda: scores_of(model, images, True), lambda: relevance_of(model, images, True, rule(args))


def classifier_costs(runs: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Steps, memory and use of classifiers over those of the plain one; and a heatmap over a prediction."""
    rows = {}
    for name, (encoder, added, shape) in CLASSIFIERS.items():
        plain, plain_use = classifier(encoder, shape, device)
        other, use = classifier(f"{encoder} {added}", shape, device)
        steps = (lambda: plain().backward()), (lambda: other().backward())
        rows[f"training step, {name}"] = ratio(*steps, runs)
        if "ISNet /" in name:
            rows[f"memory kept for the backward pass, {name}"] = (kept_bytes(other) / kept_bytes(plain),) * 3
        elif "gated" in name or "pipeline" in name:  # the others leave the plain model behind
            rows[f"use, {name}"] = ratio(plain_use, use, runs)
    for name, flags in {"ResNet, gamma rule": RESNET, "ViT, epsilon rule": VIT}.items():
        rows[f"LRP heatmap / prediction: {name}, {BATCH} images of 64 px"] = ratio(
            *heatmaps(flags, device), runs
        )
    return rows


def view_costs(runs: int, device: str) -> dict[str, tuple[float, float, float]]:
    """Views cut by Pillow, one by one, over views cut a batch at a time; and phantoms drawn so."""
    rows = {}

    def one_by_one() -> None:
        for seed in range(BATCH):
            phantom(1, seed=seed)

    name = f"phantoms a second, {BATCH} in a batch / one by one: 64 px, 1 thread(s)"
    rows[name] = ratio(lambda: phantom(BATCH, seed=0), one_by_one, runs)
    for size, channels in ((64, 1), (64, 3), (224, 3)):
        images = phantom(64, seed=0, img_size=size)[0].repeat(1, channels, 1, 1)
        pictures = [Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy()) for x in images]
        for threads in sorted({1, os.cpu_count()}):
            torch.set_num_threads(threads)
            name = f"{size} px, {channels} channel(s), {threads} thread(s)"
            name = f"views a second, batched / Pillow one by one: {name}"
            batched = batched_pipeline(images.to(device))
            rows[name] = ratio(batched, pillow_pipeline(pictures, size), runs)
    return rows


def main() -> None:
    """Print the table; --json also writes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="paired runs of each (default: 20)")
    what = (
        "cpu or cuda (default: cuda if there is one); pictures are always drawn, and cut by Pillow, by a CPU"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as train.py does for classifiers
    rows = {}
    for costs in (step_costs, classifier_costs, view_costs):
        rows |= costs(args.runs, args.device)
    for name, (low, median, high) in rows.items():
        print(f"{name:90} {median:7.3f}   ({low:.3f} to {high:.3f})")
    if args.json:
        write_whole(args.json, {name: [round(x, 3) for x in row] for name, row in rows.items()})


if __name__ == "__main__":
    main()
