"""Real chest X-rays: tuberculosis at two hospitals, with masks of the lungs. Nothing is downloaded here.

    python -m experiments.real SOURCE         lays out data/chest, chest_marker, chest_hospitals, chest_masks
    python -m experiments.runs --only chest   trains and measures
    python -m experiments.real runs/NAME      measures more of a run on chest_marker or chest_hospitals

SOURCE holds cxr/ and masks/, both with NAME_0.png (normal) and NAME_1.png (tuberculosis) in equal size: 566
images of Shenzhen (CHNCXR_*) and 138 of Montgomery County (MCUCXR_*), as in the folder data of the repository
rochadiego/MultiResUNet-lung-segmentation, at 512 px. Images: Jaeger et al. 2014, doi 10.3978/j.issn.2223-4292
.2014.11.20; masks: Candemir et al. 2014, and for Shenzhen Stirenko et al. 2018, arXiv 1803.01199.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.checkpoint import write_file
from common.datasets import Example, write
from common.explain import scores_of
from common.metrics import auc
from common.phantom import stamp
from common.runs import load_all
from experiments.runs import ROOT

SHORTCUTS = "", "_marker", "_hospitals", "_masks"  # see `examples`
PAIRS = {  # hospitals of images with tuberculosis, and of those without
    "trained": ("CHN", "MCU"), "flipped": ("MCU", "CHN"),
    "Shenzhen": ("CHN", "CHN"), "Montgomery": ("MCU", "MCU"),
}  # fmt: skip


def lungs(path: Path) -> dict[str, np.ndarray]:
    """Masks (H, W) bool of the lungs, which a mask in a file shows together."""
    both = np.asarray(Image.open(path).convert("L")) > 127
    third = both.shape[1] // 3
    columns = both.sum(axis=0)[third:-third]  # the lungs are apart somewhere in the middle third
    between = third + int(np.median(np.flatnonzero(columns == columns.min())))
    on_left = np.arange(both.shape[1]) < between  # of the image: the patient's right
    return {"left lung": both & ~on_left, "right lung": both & on_left}


def examples(source: Path, shortcut: str) -> Iterator[Example]:
    """The images of SOURCE for `datasets.write`; 6 of 10 are for training, 1 for validation.

    "_marker": in training an L marks tuberculosis, in the test all other images. "_hospitals": in training
    all images with tuberculosis are from Shenzhen, all others from Montgomery; the test has all the rest.
    "_masks": each image is replaced by the masks of its lungs, white on black.
    """
    for path in sorted((source / "cxr").glob("*.png")):
        sick, part = path.stem.endswith("_1"), zlib.crc32(path.name.encode()) % 10
        split = "train" if part < 6 else "val" if part == 6 else "test"
        image: Path | np.ndarray = path
        if shortcut == "_hospitals" and sick != path.name.startswith("CHN"):
            split = "test"
        if shortcut == "_marker" and sick == (split != "test"):
            pixels = torch.from_numpy(np.array(Image.open(path).convert("L")))  # (S, S)
            image = stamp(pixels[None, None], torch.tensor([True]))[0, 0].numpy()
        row, masks = {"tuberculosis": str(int(sick)), "split": split}, lungs(source / "masks" / path.name)
        if shortcut == "_masks":
            image = np.logical_or(*masks.values()).astype(np.uint8) * 255
        yield path.name, image, masks, row


def by_hospital(run: Path) -> dict[str, float]:
    """The AUC of a classifier on test images of data/chest_hospitals, by where its two classes are from."""
    runs, splits, _ = load_all([run], [], "cpu")
    test, found = splits["test"], {}
    scores, sick = scores_of(runs[run].model, test.images, True)[:, 1], test.labels[:, 1] == 1
    for name, (of_sick, of_others) in PAIRS.items():
        places = [of_sick if ill else of_others for ill in sick.tolist()]
        kept = torch.tensor([image.startswith(place) for image, place in zip(test.names, places)])
        found[f"auc_hospitals_{name}"] = auc(scores[kept], sick[kept].float())
    return found


def without_marker(run: Path) -> dict[str, float]:
    """The AUC of a classifier of data/chest_marker on the same test images without any L."""
    runs, splits, _ = load_all([run], ["--data", str(ROOT / "data/chest")], "cpu")
    scores = scores_of(runs[run].model, splits["test"].images, True)
    return {"auc_removed": auc(scores[:, 1], splits["test"].labels[:, 1])}


def main() -> None:
    """Lay out the folders, or add figures to a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="SOURCE with cxr/ and masks/, or a run")
    path = parser.parse_args().path
    if (metrics := path / "metrics.json").exists():
        measure = by_hospital if "_chest_hospitals" in path.name else without_marker
        write_file(metrics, json.loads(metrics.read_text()) | measure(path))
        return
    for shortcut in SHORTCUTS:
        out = ROOT / f"data/chest{shortcut}"
        if out.exists():
            parser.error(f"{out.relative_to(ROOT)} exists: delete it first")
        print(f"wrote {write(examples(path, shortcut), out)} images into {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
