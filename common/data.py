"""What goes in: drawn data (`phantom.py`, `parts.py`) or a folder of pictures (`folder.py`), in three parts.

Drawn images come anew from a seed, each part from one of its own. On phantoms a hospital's marker may agree
with the first finding; then there are test images with it removed, flipped, and flipped as another one.
Next to read: `folder.py`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common import plates as plates
from common import phantom as bodies
from common.folder import PARTS, Data, DataError, load_folder, select as select

SPLITS = PARTS  # the name to come

DRAWN = {  # how it is drawn, its regions and its findings
    "phantom": (bodies.phantom, bodies.REGIONS, bodies.FINDINGS),
    "parts": (plates.industrial_parts, plates.REGIONS, plates.FINDINGS),
}
DRAWN_SIZES = {"val": 200, "test": 500}
BATCH = 250  # images at a time, where no gradient is kept


def load(
    data: str,
    img_size: int,
    seed: int = 0,
    train_images: int = 1500,
    sample: str | None = None,
    marker: float | None = None,
    marker_kind: str = "corner",
    findings: list[str] | None = None,
) -> tuple[dict[str, Data], str | None, list[str]]:
    """{"train", "val", "test"}, the labelled sample's name, and notes, as `load_folder` returns them.

    data: one of DRAWN, drawn anew from the seed (each part from a seed of its own), or a folder, which
    img_size, sample and findings apply to but the others don't. marker (of phantoms): the probability with
    which a marker, of a kind that `phantom.stamp` knows, agrees with the first finding; then there are three
    more parts, the test images with the marker "removed", "flipped" (present where it was absent), and
    flipped with one "unseen" in training in its place. findings: None for the labels as they are, ["all"],
    or those to classify; a single one becomes two classes, without and with it. Raises DataError.
    """
    if data in DRAWN:
        parts = _draw_parts(data, img_size, seed, train_images)
        if sample is not None and sample not in parts["train"].names:
            raise DataError(
                f"sample `{sample}` is not drawn; give a name from 00000 to {train_images - 1:05d}"
            )
        complete = parts["train"].masks.flatten(2).any(dim=2).all(dim=1).int()
        sample, notes = sample or parts["train"].names[int(complete.argmax())], []
    else:
        parts, sample, notes = load_folder(data, img_size, sample)
    known = parts["train"].findings
    if findings not in (None, ["all"]):
        for finding in findings:
            if finding not in known:
                raise DataError(f"finding `{finding}` is not in {data}; it has {', '.join(known) or 'none'}")
        keep = [known.index(finding) for finding in findings]
        parts = {part: d._replace(labels=d.labels[:, keep], findings=findings) for part, d in parts.items()}
    if marker is not None:
        if data != "phantom":
            raise DataError(f"a marker can be drawn only on phantoms, not on the images of {data}")
        _stamp_parts(parts, marker, marker_kind, seed)
    if findings is not None and len(parts["train"].findings) == 1:  # without and with it: two classes
        for part, d in parts.items():
            names = [f"no {d.findings[0]}", *d.findings]
            parts[part] = d._replace(labels=torch.cat([1 - d.labels, d.labels], dim=1), findings=names)
    return parts, sample, notes


def _draw_parts(data: str, img_size: int, seed: int, train_images: int) -> dict[str, Data]:
    parts, (draw, regions, findings) = {}, DRAWN[data]
    for i, (part, n) in enumerate({"train": train_images, **DRAWN_SIZES}.items()):
        images, masks, labels = draw(n, len(PARTS) * seed + i, img_size)
        names = [f"{k:05d}" for k in range(n)]
        parts[part] = Data(images, masks, torch.ones(n, dtype=torch.bool), labels, names, regions, findings)
    return parts


def _stamp_parts(parts: dict[str, Data], agreement: float, kind: str, seed: int) -> None:
    """Put a marker on all parts, and add the test images with it removed, flipped, and with an unseen one."""
    parts["removed"] = parts["flipped"] = parts["unseen"] = parts["test"]
    for i, (part, data) in enumerate(parts.items()):
        stream = np.random.default_rng([seed, min(i, 2)])  # the same for every kind of test image
        chance = torch.from_numpy(stream.random(len(data.names)))
        present = ((data.labels[:, 0] == 1) == (chance < agreement)) ^ (part in ("flipped", "unseen"))
        this = bodies.UNSEEN if part == "unseen" else kind
        if part != "removed":
            images = bodies.stamp(data.images, present, this, data.masks, int(stream.integers(2**31)))
            parts[part] = data._replace(images=images)


class Hosted:
    """Images (N, C, S, S) that a device has no room for: they stay with the host, and come as asked for.

    To train on, they are as good as a tensor there.
    """

    def __init__(self, images: Tensor, device: str):
        self.images, self.device, self.shape = images, torch.device(device), images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        picked = self.images[index.to("cpu")]
        picked = picked.pin_memory() if self.device.type == "cuda" else picked  # else the copy would block
        return picked.to(self.device, non_blocking=True)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them, in parts, on the device."""
        return (part.to(self.device) for part in self.images.split(size))

    def cpu(self) -> Tensor:
        """All of them, with the host."""
        return self.images


def placed(images: Tensor, device: str) -> Tensor | Hosted:
    """Images on the device, for indices there; or with the host if they would take half of what is free."""
    if device.startswith("cuda") and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return Hosted(images, device)
    return images.to(device)


def batches(images: Tensor, model: nn.Module, size: int = BATCH) -> Iterator[Tensor]:
    """Images (M, C, S, S) uint8 in parts of a size, as encoders expect them, on the model's device."""
    device = next(model.parameters()).device
    for part in images.split(size):
        yield prepared(part.to(device))


def prepared(images: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8 as encoders expect them."""
    return normalise(images.float() / 255)


def normalise(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] to about zero mean and unit deviation, as encoders expect them."""
    return (images - 0.5) / 0.25
