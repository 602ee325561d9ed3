"""Fixtures and helpers that several test files share: small runs of train.py, folders, golden numbers."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Some tests fork, and numbers of a GPU differ: there is none. Read when torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
import train
from common import runs
from common.checkpoint import load_run
from common.data import Data
from common.runs import images_to_show
from common.symbols import draw_digit

torch.set_num_threads(1)  # a forked process must have one, and for small tensors it is faster
TINY = "--train-images 32 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 2".split()
SMALL = "--task classify --train-images 32 --embed-dim 16 --num-heads 2".split()
SMALL += "--batch-size 8 --epochs 2".split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@contextmanager
def few_images() -> Iterator[None]:
    """Runs in half the time: 8 validation and 8 test images, one shown, strong weight decays, plain plots."""
    real = images_to_show
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.splits.DRAWN_SIZES", {"val": 8, "test": 8})
        patch.setattr("common.probe.DECAYS", [0.1, 1.0])  # weaker ones fit so few images for long
        patch.setattr("common.plots.GRID", {"squeeze": False})  # the layout takes longer than the training
        for script in (runs, evaluate):
            patch.setattr(script, "images_to_show", lambda config, splits, n: real(config, splits, 1))
        yield


@pytest.fixture(scope="module")
def few_test_images():
    with few_images():
        yield


@pytest.fixture(scope="session")
def span_run(tmp_path_factory) -> Path:
    """A finished run: SPAN with DINO, guided by one reference image. Read it, don't change it."""
    out = tmp_path_factory.mktemp("runs") / "span"
    with few_images():
        train.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def dino_run(tmp_path_factory) -> Path:
    """A finished run of DINO alone, on the images of `span_run`."""
    out = tmp_path_factory.mktemp("runs") / "dino"
    with few_images():
        train.main([*TINY, "--prior", "none", "--out", str(out)])
    return out


@pytest.fixture
def refused(capsys) -> Callable:
    """Runs a script's main, which must end with one line after argparse's usage, and a status; the line.

    Status 1 is of a training that fails: its line comes last.
    """

    def run(main: Callable, *argv: str, status: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        error = capsys.readouterr().err.split("\r")[-1].strip()  # after what progress bars have wiped out
        error = error.splitlines()[-1] if error.startswith("usage: ") or status == 1 else error
        assert stop.value.code == status and "\n" not in error
        return error

    return run


def refuses(line: str, call: Callable, *args, error: type = ValueError, **given) -> None:
    """The call raises a ValueError, or another error, whose message has this line, a pattern."""
    with pytest.raises(error, match=line):
        call(*args, **given)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slope_error(loss: Callable[[], torch.Tensor], weights: list[nn.Parameter]) -> float:
    """How far a gradient is from finite differences along a random direction through all weights."""
    gradient = torch.autograd.grad(loss(), weights)
    # As long in each weight as its gradient is short, so that no weight hides another's part.
    directions = [torch.randn_like(p) / (g.norm() + 1e-4) for p, g in zip(weights, gradient)]
    originals = [p.detach().clone() for p in weights]

    def moved(step: float) -> float:
        for p, original, d in zip(weights, originals, directions):
            p.data.copy_(original + step * d)
        return loss().item()

    slope = sum((g * d).sum() for g, d in zip(gradient, directions)).item()
    steps = (1e-7, 1e-8, 1e-9)  # the loss may have kinks; one of the steps meets none
    errors = [abs(slope - (moved(step) - moved(-step)) / (2 * step)) for step in steps]
    return min(errors) / max(1, abs(slope))


def with_statistics_of(images: torch.Tensor, model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, where the statistics of these images are fixed numbers in each BatchNorm."""

    def hold(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0].detach(), (0, 2, 3), correction=0)

    twin = copy.deepcopy(model).eval()
    hooks = [m.register_forward_pre_hook(hold) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    twin(images)
    for hook in hooks:
        hook.remove()
    return twin


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Published numbers, and those of them that are a model's weights."""
    arrays = np.load(Path(__file__).parent / "golden" / name)
    numbers = {k: torch.from_numpy(arrays[k]) for k in arrays if arrays[k].dtype.kind != "U"}
    return numbers, {k.removeprefix("weight."): v for k, v in numbers.items() if k.startswith("weight.")}


def save(path: Path, picture: Image.Image | np.ndarray, **options) -> Path:
    """Write a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=size, dtype=np.uint8)


def image_folder(path: Path, *rows: str, size: tuple[int, int] = (16, 16)) -> Path:
    """A user's folder of noisy images (H, W), with these rows of labels.csv, the first one its header."""
    for i, row in enumerate(rows[1:]):
        save(path / "images" / row.split(",")[0], noise(*size, seed=i))
    (path / "labels.csv").write_text("\n".join(rows))
    return path


def unlabelled(images: torch.Tensor, **known) -> Data:
    """Images (n, C, S, S) as a split, without masks and labels, but for what is known."""
    n, size = len(images), images.shape[2:]
    masks, has_masks = torch.zeros(n, 0, *size, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    data = Data(images, masks, has_masks, torch.zeros(n, 0), [str(i) for i in range(n)], [], [])
    return data._replace(**known)


def digits(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 64, 64) of digits anywhere on noise, and the masks (n, 1, 64, 64) of their squares."""
    drawn = [draw_digit(i % 10, 64, np.random.default_rng(i)) for i in range(n)]
    return tuple(torch.from_numpy(np.stack(part))[:, None].float() for part in zip(*drawn))


class Evil:
    """When it is unpickled, it runs code: a file `spoiled` appears."""

    def __reduce__(self):
        return os.system, ("touch spoiled",)


def metrics_of(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def epochs_of(run: Path) -> list[dict[str, float]]:
    """The rows that a run logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def trained(out: Path, words: str = "", tiny: list[str] = TINY) -> dict[str, float]:
    """Trains a tiny run into a folder; its metrics."""
    train.main([*tiny, *words.split(), "--out", str(out)])
    return metrics_of(out)


def same_weights(*runs: Path) -> bool:
    first, second = (load_run(run).checkpoint["model"] for run in runs)
    return all(torch.equal(first[name], second[name]) for name in first)
