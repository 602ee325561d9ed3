"""Public datasets as the folders that `folder.py` reads: images/, masks/<region>/, labels.csv.

    python -m common.datasets mvtec mvtec_anomaly_detection/bottle data/bottle
    python train.py --data data/bottle --prior statistics --out runs/bottle

    montgomery, shenzhen   chest X-rays with lungs outlined (NLM; Shenzhen's masks are a release of their own)
    jsrt                   chest X-rays with lungs, heart and clavicles (images and SCR's masks side by side)
    chexpert, nih14        chest X-rays with 14 findings; blank and uncertain ones are unknown
    covid_qu_ex            chest X-rays of three classes with lungs outlined
    mvtec                  one category of industrial parts, with defects outlined
    pets                   37 breeds, the animal outlined (its border counts to it)
    cifar10, cifar100      the binary versions: the others would have to be unpickled, which may run code

Image files are linked where the file system allows it, else copied; masks are written anew. Where a dataset
has test images but none to choose by, a tenth of the training images become validation images, by patient
where there are patients (of mvtec a third of the test images, since only these show defects). The layouts are
those of the releases as they are described; the tests make small ones. Next to read: `resnet.py`.
"""

import argparse
import csv
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FINDINGS = "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass"
FINDINGS = [*FINDINGS.split(), "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"]  # of NIH-14


class Example(NamedTuple):
    """An image of a dataset, by the name that it gets, its masks, its row of labels.csv, and whose it is."""

    name: str
    image: Path | Image.Image
    masks: dict[str, np.ndarray]
    row: dict[str, str]
    patient: str | None = None


def mask_in(path: Path) -> np.ndarray:
    """What is not black in a mask (H, W)."""
    return np.asarray(Image.open(path).convert("L")) > 0


def montgomery(source: Path) -> Iterator[Example]:
    """CXR_png/<name>_<0 or 1>.png, ManualMask/{left,right}Mask/."""
    for path in sorted((source / "CXR_png").glob("*.png")):
        manual = source / "ManualMask"
        masks = {f"{side} lung": mask_in(manual / f"{side}Mask" / path.name) for side in ("left", "right")}
        yield Example(path.name, path, masks, {"tuberculosis": path.stem[-1]})


def shenzhen(source: Path) -> Iterator[Example]:
    """CXR_png/<name>_<0 or 1>.png, mask/<name>_mask.png of some."""
    for path in sorted((source / "CXR_png").glob("*.png")):
        mask = source / "mask" / f"{path.stem}_mask.png"
        masks = {"lungs": mask_in(mask)} if mask.exists() else {}
        yield Example(path.name, path, masks, {"tuberculosis": path.stem[-1]})


def jsrt(source: Path) -> Iterator[Example]:
    """JPCLN*.IMG, JPCNN*.IMG (raw, with and without a nodule), <region>/<name>.gif of 1024x1024, anywhere."""
    for path in sorted(source.rglob("*.IMG")):
        pixels = 4095 - np.fromfile(path, dtype=">u2").reshape(2048, 2048)  # 12 bits, stored as a negative
        small = pixels.reshape(1024, 2, 1024, 2).mean(axis=(1, 3)).astype(np.uint16)  # as large as the masks
        found = {mask.parent.name: mask_in(mask) for mask in sorted(source.rglob(f"{path.stem}.gif"))}
        yield Example(
            f"{path.stem}.png", Image.fromarray(small), found, {"nodule": str(int("LN" in path.stem))}
        )


def chexpert(source: Path) -> Iterator[Example]:
    """train.csv and valid.csv (for testing), whose Path begins with the name of the release."""
    known = {"1.0": "1", "0.0": "0"}
    for table, split in (("train.csv", "train"), ("valid.csv", "test")):
        for row in csv.DictReader((source / table).open(newline="")):
            path = source / Path(row["Path"]).relative_to(Path(row["Path"]).parts[0])
            findings = {name: known.get(value, "") for name, value in list(row.items())[5:]}
            yield Example("_".join(path.parts[-4:]), path, {}, {"split": split, **findings}, path.parts[-3])


def nih14(source: Path) -> Iterator[Example]:
    """Data_Entry_2017.csv, test_list.txt, images*/."""
    paths = {path.name: path for path in source.glob("images*/**/*.png")}
    test = set((source / "test_list.txt").read_text().split())
    for row in csv.DictReader((source / "Data_Entry_2017.csv").open(newline="")):
        name, present = row["Image Index"], row["Finding Labels"].split("|")
        if name in paths:
            findings = {finding: str(int(finding in present)) for finding in FINDINGS}
            row = {"split": "test" if name in test else "train", **findings}
            yield Example(name, paths[name], {}, row, name.split("_")[0])


def covid_qu_ex(source: Path) -> Iterator[Example]:
    """{Train,Val,Test}/<class>/{images,lung masks}/, of "Lung Segmentation Data"."""
    for split in ("Train", "Val", "Test"):
        for path in sorted(source.glob(f"{split}/*/images/*.png")):
            kind = path.parent.parent
            masks = {"lungs": mask_in(kind / "lung masks" / path.name)}
            row = {"label": kind.name, "split": split.lower()}
            yield Example(f"{split}_{kind.name}_{path.name}", path, masks, row)


def mvtec(source: Path) -> Iterator[Example]:
    """{train,test}/<good or defect>/, ground_truth/<defect>/<name>_mask.png, of one category."""
    for path in sorted(source.glob("t*/*/*.png")):
        part, kind = path.parts[-3], path.parts[-2]
        with Image.open(path) as image:
            defect = np.zeros(image.size[::-1], dtype=bool)
        if kind != "good":
            defect = mask_in(source / "ground_truth" / kind / f"{path.stem}_mask.png")
        name = f"{part}_{kind}_{path.name}"
        chosen = part == "test" and zlib.crc32(name.encode()) % 3 == 0  # to choose by: train has no defect
        row = {"label": kind, "split": "val" if chosen else part}
        yield Example(name, path, {"defect": defect}, row)


def pets(source: Path) -> Iterator[Example]:
    """images/<breed>_<number>.jpg, annotations/{trimaps/,trainval.txt,test.txt}; 2 is the background."""
    for table, split in (("trainval.txt", "train"), ("test.txt", "test")):
        for line in (source / "annotations" / table).read_text().splitlines():
            name = line.split()[0]
            trimap = np.asarray(Image.open(source / "annotations" / "trimaps" / f"{name}.png"))
            row = {"label": name.rpartition("_")[0], "split": split}
            yield Example(f"{name}.jpg", source / "images" / f"{name}.jpg", {"animal": trimap != 2}, row)


def cifar10(source: Path) -> Iterator[Example]:
    """data_batch_*.bin, test_batch.bin, batches.meta.txt."""
    yield from _cifar(
        source, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1
    )


def cifar100(source: Path) -> Iterator[Example]:
    """train.bin, test.bin, fine_label_names.txt: the fine classes."""
    yield from _cifar(source, ["train.bin"], "test.bin", "fine_label_names.txt", 2)


def _cifar(source: Path, train: list[str], test: str, names: str, labels: int) -> Iterator[Example]:
    classes = (source / names).read_text().split()
    for file in [*train, test]:
        rows = np.fromfile(source / file, dtype=np.uint8).reshape(-1, labels + 3072)
        for i, row in enumerate(rows):
            label, pixels = classes[row[labels - 1]], row[labels:].reshape(3, 32, 32).transpose(1, 2, 0)
            about = {"label": label, "split": "test" if file == test else "train"}
            yield Example(f"{Path(file).stem}_{i:05d}.png", Image.fromarray(pixels), {}, about)


RECIPES = [montgomery, shenzhen, jsrt, chexpert, nih14, covid_qu_ex, mvtec, pets, cifar10, cifar100]


def write(examples: Iterator[Example], out: Path) -> int:
    """Write examples into a new folder; returns how many. Raises ValueError if there are none."""
    rows, held_out = [], {}
    for example in examples:
        target = out / "images" / example.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise ValueError(f"two images would both be named {example.name}")
        if isinstance(example.image, Path):
            try:
                os.link(example.image, target)
            except OSError:  # another disk, or links are not known there
                shutil.copy(example.image, target)
        else:
            example.image.save(target)
        for region, mask in example.masks.items():
            path = out / "masks" / region / f"{target.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        rows.append({"file": example.name, **example.row})
        held_out[example.name] = zlib.crc32((example.patient or example.name).encode()) % 10 == 0
    if not rows:
        raise ValueError("no image was found where the recipe expects them")
    if "split" in rows[0] and "val" not in {row["split"] for row in rows}:
        for row in rows:  # a tenth of the training images, whole patients, to choose by
            row["split"] = "val" if row["split"] == "train" and held_out[row["file"]] else row["split"]
    with (out / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return len(rows)


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for a source that is not as expected."""
    intro, _, kinds = __doc__.split("\n\n")[:3]
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=intro, epilog=kinds, formatter_class=how)
    parser.add_argument("dataset", choices=[recipe.__name__ for recipe in RECIPES])
    parser.add_argument("source", type=Path, help="the folder as it was unpacked")
    parser.add_argument("out", type=Path, help="a new folder, for --data")
    args = parser.parse_args(argv)
    try:
        recipe = next(recipe for recipe in RECIPES if recipe.__name__ == args.dataset)
        if args.out.exists():
            raise ValueError(f"{args.out} exists already: name a new folder")
        part = args.out.with_name(args.out.name + ".part")  # what is half done must not pass for a dataset
        shutil.rmtree(part, ignore_errors=True)
        written = write(recipe(args.source), part)
        part.rename(args.out)
        print(f"wrote {written} images into {args.out}")
    except (ValueError, OSError, LookupError) as error:
        expected = "" if args.out.exists() else f"; expected: {recipe.__doc__}"
        print(f"common.datasets {args.dataset}: {error}{expected}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
