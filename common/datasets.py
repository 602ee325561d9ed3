"""Lay out a public dataset as a folder for `train.py --data`: images/, masks/<region>/ and labels.csv.

    python -m common.datasets mvtec mvtec_anomaly_detection/bottle data/bottle

Images are hard links where possible. If a release has test images but no validation images, a tenth of the
training images becomes the validation split, chosen by patient if patients are known (of mvtec, a third of
the test images).
"""

import argparse
import csv
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# Name, file or pixels, masks by region, row of labels.csv (whose "patient" is not written).
Example = tuple[str, Path | np.ndarray, dict[str, np.ndarray], dict[str, str]]


def mask_in(path: Path) -> np.ndarray:
    """(H, W) bool: the pixels of a mask that are not black."""
    return np.asarray(Image.open(path).convert("L")) > 0


def montgomery(source: Path) -> Iterator[Example]:
    """CXR_png/<name>_<0 or 1>.png, ManualMask/{left,right}Mask/."""
    for path in sorted((source / "CXR_png").glob("*.png")):
        masks = {f"{s} lung": mask_in(source / f"ManualMask/{s}Mask" / path.name) for s in ("left", "right")}
        yield path.name, path, masks, {"tuberculosis": path.stem[-1]}


def shenzhen(source: Path) -> Iterator[Example]:
    """CXR_png/<name>_<0 or 1>.png, mask/<name>_mask.png of some."""
    for path in sorted((source / "CXR_png").glob("*.png")):
        mask = source / "mask" / f"{path.stem}_mask.png"
        masks = {"lungs": mask_in(mask)} if mask.exists() else {}
        yield path.name, path, masks, {"tuberculosis": path.stem[-1]}


def jsrt(source: Path) -> Iterator[Example]:
    """JPCLN*.IMG, JPCNN*.IMG (raw, with and without a nodule), <region>/<name>.gif of 1024x1024, anywhere."""
    for path in sorted(source.rglob("*.IMG")):
        pixels = 4095 - np.fromfile(path, dtype=">u2").reshape(2048, 2048)  # 12 bits, stored as a negative
        pixels = pixels.reshape(1024, 2, 1024, 2).mean(axis=(1, 3)).astype(np.uint16)  # the size of the masks
        masks = {mask.parent.name: mask_in(mask) for mask in sorted(source.rglob(f"{path.stem}.gif"))}
        yield f"{path.stem}.png", pixels, masks, {"nodule": str(int("LN" in path.stem))}


def nih14(source: Path) -> Iterator[Example]:
    """Data_Entry_2017.csv, test_list.txt, images*/."""
    paths = {path.name: path for path in source.glob("images*/**/*.png")}
    test = set((source / "test_list.txt").read_text().split())
    with (source / "Data_Entry_2017.csv").open(newline="") as file:
        listed = {row["Image Index"]: row["Finding Labels"].split("|") for row in csv.DictReader(file)}
    findings = sorted(set().union(*listed.values()) - {"No Finding"})
    for name, present in listed.items():
        if name in paths:
            labels = {finding: str(int(finding in present)) for finding in findings}
            row = {"split": "test" if name in test else "train", **labels, "patient": name.split("_")[0]}
            yield name, paths[name], {}, row


def covid_qu_ex(source: Path) -> Iterator[Example]:
    """{Train,Val,Test}/<class>/{images,lung masks}/, of "Lung Segmentation Data"."""
    for split in ("Train", "Val", "Test"):
        for path in sorted(source.glob(f"{split}/*/images/*.png")):
            folder = path.parents[1]
            masks = {"lungs": mask_in(folder / "lung masks" / path.name)}
            row = {"label": folder.name, "split": split.lower()}
            yield f"{split}_{folder.name}_{path.name}", path, masks, row


def mvtec(source: Path) -> Iterator[Example]:
    """{train,test}/<good or defect>/, ground_truth/<defect>/<name>_mask.png, of one category."""
    for path in sorted(source.glob("t*/*/*.png")):
        split, kind = path.parts[-3:-1]
        name = f"{split}_{kind}_{path.name}"
        mask = source / "ground_truth" / kind / f"{path.stem}_mask.png"
        defect = mask_in(path) & False if kind == "good" else mask_in(mask)  # a good part has an empty one
        if split == "test" and zlib.crc32(name.encode()) % 3 == 0:  # train has no defect to validate on
            split = "val"
        yield name, path, {"defect": defect}, {"label": kind, "split": split}


def pets(source: Path) -> Iterator[Example]:
    """images/<breed>_<number>.jpg, annotations/{trimaps/,trainval.txt,test.txt}; 2 is the background."""
    for table, split in (("trainval.txt", "train"), ("test.txt", "test")):
        for line in (source / "annotations" / table).read_text().splitlines():
            name = line.split()[0]
            trimap = np.asarray(Image.open(source / "annotations" / "trimaps" / f"{name}.png"))
            row = {"label": name.rpartition("_")[0], "split": split}
            yield f"{name}.jpg", source / "images" / f"{name}.jpg", {"animal": trimap != 2}, row


def weizmann(source: Path) -> Iterator[Example]:
    """rgb/<name>.jpg of horses, figure_ground/<name>.jpg of another size (Borenstein & Ullman 2002)."""
    for path in sorted((source / "rgb").glob("*.jpg")):
        with Image.open(path) as image, Image.open(source / "figure_ground" / path.name) as mask:
            yield path.name, path, {"horse": np.asarray(mask.convert("L").resize(image.size)) > 127}, {}


def ph2(source: Path) -> Iterator[Example]:
    """<name>/{<name>_Dermoscopic_Image/<name>,<name>_lesion/<name>_lesion}.bmp (Mendonca et al. 2013)."""
    for path in sorted(source.glob("*/*_Dermoscopic_Image/*.bmp")):
        lesion = path.parents[1] / f"{path.stem}_lesion" / f"{path.stem}_lesion.bmp"
        yield path.name, path, {"lesion": mask_in(lesion)}, {}


RECIPES = montgomery, shenzhen, jsrt, nih14, covid_qu_ex, mvtec, pets, weizmann, ph2
DATASETS = {recipe.__name__: recipe for recipe in RECIPES}


def write(examples: Iterator[Example], out: Path) -> int:
    """Write examples into a new folder, all or none; returns how many. Raises ValueError for none."""
    rows, part = [], out.with_name(f"{out.name}.part")  # what is half done must not be mistaken for a dataset
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    for name, image, masks, row in examples:
        target = part / "images" / name
        if isinstance(image, np.ndarray):
            Image.fromarray(image).save(target)
        else:
            try:
                os.link(image.resolve(), target)  # a link to a link might lead nowhere from here
            except OSError:  # another file system, or one without links
                shutil.copy(image, target)
        for region, mask in masks.items():
            path = part / "masks" / region / f"{target.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        rows.append({"file": name, **row})
    if not rows:
        raise ValueError("no image was found")
    patients = [row.pop("patient", row["file"]) for row in rows]
    if "split" in rows[0] and "val" not in {row["split"] for row in rows}:
        for row, patient in zip(rows, patients):
            if row["split"] == "train" and zlib.crc32(patient.encode()) % 10 == 0:
                row["split"] = "val"
    with (part / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    part.rename(out)
    return len(rows)


def main(argv: list[str] | None = None) -> None:
    """The command line; exit status 2 for a source that is not as expected."""
    layouts = "\n".join(f"{name:12} {dataset.__doc__}" for name, dataset in DATASETS.items())
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=layouts, formatter_class=as_written)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("source", type=Path, help="the unpacked dataset")
    parser.add_argument("out", type=Path, help="a new folder, for --data")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    try:
        written = write(DATASETS[args.dataset](args.source), args.out)
    except (ValueError, OSError, LookupError) as error:
        parser.error(f"{args.source}: {error}; expected {DATASETS[args.dataset].__doc__}")
    print(f"wrote {written} images into {args.out}")


if __name__ == "__main__":
    main()
