"""Synthetic images, or a folder of pictures, in three splits; a marker on phantoms adds test splits."""

import numpy as np
import torch

from common import phantom, plates
from common.classify import is_multiclass
from common.data import SPLITS, Data, DataError, LoadedData
from common.folder import load_folder
from common.hospitals import HOSPITALS, mixed, taken_at

DRAWN = {  # name: function, regions, findings
    "phantom": (phantom.phantom, phantom.REGIONS, phantom.FINDINGS),
    "parts": (plates.plates, plates.REGIONS, plates.FINDINGS),
}
DRAWN_SIZES = {"val": 200, "test": 500}


def load(
    data: str, img_size: int, seed: int = 0, train_images: int = 1500, reference: str | None = None,
    marker: float | None = None, marker_kind: str = "corner", findings: list[str] | None = None,
) -> LoadedData:  # fmt: skip
    """A folder, or a key of DRAWN (which alone uses seed, train_images and marker), as three splits.

    marker: how likely a marker on a phantom agrees with its first finding. It adds three splits, the test
    images with the marker "flipped" (present where it was absent), "removed", and flipped and of a kind
    "unseen" in training. marker_kind "hospitals" takes images at A or B instead, and adds the test images
    "flipped", and all of them at "hospital A", B and C. findings: a list, or ["all"], to choose labels; a
    single one becomes two classes, without and with it. Raises DataError.
    """
    if data in DRAWN:
        splits, reference, notes = _draw_splits(data, img_size, seed, train_images, reference)
    else:
        splits, reference, notes = load_folder(data, img_size, reference)
    known = splits["train"].findings
    chosen = known if findings in (None, ["all"]) else findings
    if unknown := [finding for finding in chosen if finding not in known]:
        raise DataError(f"--findings: `{unknown[0]}` is not in {data}; it has {', '.join(known) or 'none'}")
    keep = [known.index(finding) for finding in chosen]
    if marker is not None:
        if data != "phantom":
            raise DataError(f"a marker can be drawn only on phantoms, not on {data}; remove --marker")
        _stamp_splits(splits, keep[0], marker, marker_kind, seed)
    if findings is not None and keep:
        chosen = [f"no {chosen[0]}", chosen[0]] if len(keep) == 1 else chosen
        for split, d in splits.items():
            labels = d.labels[:, keep]
            labels = torch.cat([1 - labels, labels], dim=1) if len(keep) == 1 else labels
            splits[split] = d._replace(labels=labels, findings=chosen)
        every, shown = torch.cat([d.labels for d in splits.values()]), splits["train"].labels
        one = (every.isnan() | (every.nansum(dim=1, keepdim=True) == 1)).all(dim=1)  # or none that is known
        if is_multiclass(shown) and (shown == 1).any() and not one.all():
            line = f"each labelled training image shows one of {', '.join(chosen)}, so these are classes"
            notes.append(f"{line}; {int((~one).sum())} other image(s) show none or several of them")
    return splits, reference, notes


def _draw_splits(data: str, img_size: int, seed: int, train_images: int, reference: str | None) -> LoadedData:
    splits, (draw, regions, findings) = {}, DRAWN[data]
    for i, (split, n) in enumerate({"train": train_images, **DRAWN_SIZES}.items()):
        images, masks, labels = draw(n, len(SPLITS) * seed + i, img_size)  # each split has its own seed
        known, names = torch.ones(n, dtype=torch.bool), [f"{k:05d}" for k in range(n)]
        splits[split] = Data(images, masks, known, labels, names, regions, findings)
    names = splits["train"].names
    if reference is not None and reference not in names:
        raise DataError(f"sample `{reference}` is not drawn; choose one from {names[0]} to {names[-1]}")
    complete = splits["train"].masks.flatten(2).any(dim=2).all(dim=1).int()  # (N,): no region is empty
    return splits, reference or names[int(complete.argmax())], []


def _stamp_splits(splits: dict[str, Data], column: int, agreement: float, kind: str, seed: int) -> None:
    """Put markers that agree with a column of labels on all splits; add the splits that `load` describes."""
    hospitals = {f"hospital {name}": name for name in HOSPITALS} if kind == "hospitals" else {}
    added = ["flipped", *hospitals] if hospitals else ["removed", "flipped", "unseen"]
    splits |= dict.fromkeys(added, splits["test"])
    for i, (split, data) in enumerate(splits.items()):
        stream = np.random.default_rng([seed, min(i, 2)])  # the same for all kinds of test images
        agrees = torch.from_numpy(stream.random(len(data.names))) < agreement
        present = ((data.labels[:, column] == 1) == agrees) ^ (split in ("flipped", "unseen"))
        images, masks, chance = data.images, data.masks, int(stream.integers(2**31))
        if split in hospitals:
            images, masks = taken_at(hospitals[split], images, masks, chance)
        elif hospitals:
            images, masks = mixed(present, images, masks, chance)
        elif split != "removed":
            look = phantom.UNSEEN if split == "unseen" else kind
            images = phantom.stamp(images, present, look, masks, chance)
        splits[split] = data._replace(images=images, masks=masks)
