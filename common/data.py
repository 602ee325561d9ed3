"""The images of a split as tensors, and how batches of them reach a model."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

SPLITS = ("train", "val", "test")
BATCH = 250  # images at a time, if small, where no gradient is needed
LoadedData = tuple[dict[str, "Data"], str | None, list[str]]  # splits, reference image's name, notes


def printable(text: str) -> str:
    """Text on one line, with control characters and bytes that are not UTF-8 escaped: names may hold any."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda match: repr(match[0])[1:-1], text)


class DataError(ValueError):
    """Unusable data: one line with the file, the limit and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Data(NamedTuple):
    """The images of a split; masks and labels may be unknown for some of them. R or K may be 0."""

    images: Tensor  # (N, C, S, S) uint8
    masks: Tensor  # (N, R, S, S) bool
    has_masks: Tensor  # (N,) bool: all R masks of an image are known; none if R = 0
    labels: Tensor  # (N, K) float32, multi-hot, NaN = unknown
    names: list[str]
    regions: list[str]  # R
    findings: list[str]  # K, the class names


def select(data: Data, index: Tensor) -> Data:
    """The images at `index`, (M,) integer or (N,) bool, with their masks, labels and names."""
    names = [data.names[i] for i in torch.arange(len(data.names))[index].tolist()]
    return Data(*(tensor[index] for tensor in data[:4]), names, data.regions, data.findings)


def to_device(images: Tensor, device: str) -> Tensor:
    """Images (N, ...) on the device, or left where they are if they would take over half its free memory."""
    large = device.startswith("cuda") and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2
    return images if large else images.to(device)


def rows_at(images: Tensor, index: Tensor) -> Tensor:
    """images[index] on the device of index (B,), wherever `to_device` left the images (N, ...)."""
    return images[index.to(images.device)].to(index.device)


def at_a_time(most: int, images: Tensor) -> int:
    """How many of images (N, C, H, W) to compute with at once: `most` of 128 px a side, fewer larger ones."""
    return min(most, max(1, most * 128**2 // images.shape[-2:].numel()))


def batches(images: Tensor, model: nn.Module, most: int = BATCH) -> Iterator[Tensor]:
    """Images (M, C, S, S) uint8 in batches, see `at_a_time`, normalised, on the model's device."""
    device = next(model.parameters()).device
    return (prepared(batch.to(device)) for batch in images.split(at_a_time(most, images)))


def prepared(images: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8 as the encoders expect them."""
    return normalise(images.float() / 255)


def normalise(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] to about zero mean and unit deviation."""
    return (images - 0.5) / 0.25
