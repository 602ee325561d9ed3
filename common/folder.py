"""A folder of pictures becomes tensors, in three parts: training, validation and test images.

A folder may have one of two layouts, and there is nothing to configure:

    hospital/                    parts/
      images/a.png  b.jpg          good/1.png  2.png
      masks/heart/a.png            scratched/1.png
      labels.csv

With `images/`, all else is optional. `masks/<region>/` outlines one region in files named like the image
(another suffix is fine). Few images need masks: one with every region, the *labelled sample*, can teach where
to look. `labels.csv` names images in a column `file`; then either a column `label` holds the class, or there
is one column per finding with 0, 1 or blank (unknown). A column `split` (train, val, test) may join either;
without it, 70/15/15 % follow from the names alone, so no seed ever carries a test image into training;
several images of one patient need the column, or they end on both sides. In the other layout each folder is a
class, and an image is called "good/1.png".

Every picture ends as 8 bit. Deep grey (16 bit, float) is first stretched from its own minimum to its maximum,
since scanners rarely use the full range; transparency lies on black. The set has one channel if every picture
*shows* only grey, however it is stored, else three.

A damaged image is skipped with a note: one bad file should not cost a night. What would silently change the
lesson (a broken mask, a mask of another size, a label that cannot be read) is a `DataError`. Next to read:
`recipes.py`.
"""

import csv
import io
import math
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm")
# Without this list a PostScript file called x.png would run Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
LAYOUT = "expected images/ with optional masks/<region>/ and labels.csv, or one folder of images per class"
PARTS = ("train", "val", "test")
FINDING = {"0": 0.0, "1": 1.0, "": math.nan, "0.0": 0.0, "1.0": 1.0}  # 1.0: pandas, beside blanks
warnings.filterwarnings("ignore", module="PIL")  # odd metadata do no harm


class DataError(ValueError):
    """The data cannot be used as they are: one line with the file, the limit and the remedy."""


class Data(NamedTuple):
    """Images and all that is known of them; masks and labels may be unknown for some, or for all."""

    images: Tensor  # (N, C, S, S) uint8
    masks: Tensor | None  # (N, R, S, S) bool, None if there are no regions at all
    has_masks: Tensor  # (N,) bool: all R masks of this image are known
    labels: Tensor | None  # (N, K) float32, multi-hot, NaN = unknown
    names: list[str]
    regions: list[str]  # R
    findings: list[str]  # K, the class names


def select(data: Data, index: Tensor) -> Data:
    """The images at `index`, (M,) integer or (N,) bool, with everything that belongs to them."""
    index = index.nonzero().flatten() if index.dtype == torch.bool else index
    tensors = [None if tensor is None else tensor[index] for tensor in data[:4]]
    return Data(*tensors, [data.names[i] for i in index.tolist()], data.regions, data.findings)


def load_folder(
    folder: str | Path, img_size: int, sample: str | None = None
) -> tuple[dict[str, Data], str | None, list[str]]:
    """Reads a folder into {"train", "val", "test"}, the labelled sample's name (or None), and notes to print.

    Images become (N, C, S, S) uint8 in [0, 255] with S = img_size, masks (N, R, S, S) bool. The aspect ratio
    is stretched; image and masks undergo the same, so they stay aligned. The labelled sample is the image
    `sample`, else the first of train (or val, or test) with all masks; it ends up in train. Raises DataError.
    """
    folder, notes = Path(folder), []
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {LAYOUT}")
    if (folder / "images").is_dir():
        paths = {path.name: path for path in _image_files(folder / "images")}
        findings, values, split = _read_labels(folder / "labels.csv", paths)
        masks = _find_masks(folder / "masks", paths, notes)
    elif (folder / "masks").exists() or (folder / "labels.csv").exists():  # masks/ would pass for a class
        raise DataError(f"{folder} has masks/ or labels.csv but no images/; {LAYOUT}")
    else:
        paths = {f"{sub.name}/{path.name}": path for sub in _folders(folder) for path in _image_files(sub)}
        findings = sorted({path.parent.name for path in paths.values()})
        values = {name: [float(path.parent.name == f) for f in findings] for name, path in paths.items()}
        split, masks = {}, {}
    if not paths:
        raise DataError(f"{folder} holds no images ({' '.join(SUFFIXES)}); {LAYOUT}")

    data = _read_images(paths, masks, img_size, notes)
    if findings:
        labels = torch.tensor([values.get(name, [math.nan] * len(findings)) for name in data.names])  # (N, K)
        data = data._replace(labels=labels, findings=findings)
    split = split or _split(data.names)
    sample = _choose_sample(data, masks, split, sample, notes)
    parts = {part: select(data, torch.tensor([split[name] == part for name in data.names])) for part in PARTS}
    notes += [f"{folder}: no images in {part}" for part in PARTS if not parts[part].names]
    return parts, sample, notes


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [path for path in files if path.is_file() and path.name[0] != "."]


def _find_masks(folder: Path, images: dict[str, Path], notes: list[str]) -> dict[str, dict[str, Path]]:
    """{region: {image name: mask file}}: the mask with the image's name, or else its stem."""
    regions = _folders(folder) if folder.is_dir() else []
    if folder.is_dir() and not regions:
        notes.append(f"{folder} is not used: it holds no folder per region, so there is no labelled sample")
    found = {region.name: {} for region in regions}
    for region in regions:
        files = _image_files(region)
        for path in [region, *files]:
            _refuse_way_out(path, folder)
        by_stem = {path.stem: [] for path in files}
        for path in files:
            by_stem[path.stem].append(path)
        for name, image in images.items():
            # masks/heart/a.png belongs to images/a.png, so never to an images/a.jpg beside it.
            own = [p for p in by_stem.get(image.stem, []) if p.name == name or p.name not in images]
            if len(own) > 1:
                raise DataError(f"{own[0]} and {own[1]} are both masks of {image}; remove one")
            found[region.name] |= {name: path for path in own}
        stray = sorted(set(files) - set(found[region.name].values()))
        notes += [f"{path} is not used: no image has this name" for path in stray]
    return found


def _refuse_way_out(path: Path, folder: Path) -> None:
    """Raise DataError for a mask that is a link to somewhere else: who sent the folder may not mean well."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} is a link that leads out of {folder}; put a copy in its place")


def _decode(path: Path) -> tuple[np.ndarray | None, str]:
    """Upright pixels (H, W) or (H, W, 3), uint8, or as deep as grey is; or None and what is wrong."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if math.prod(file.size) > (Image.MAX_IMAGE_PIXELS or math.inf):  # of which Pillow only warns
                return (
                    None,
                    f"{file.size[0]} x {file.size[1]} px, but {Image.MAX_IMAGE_PIXELS} px are the most",
                )
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # I, I;16, I;16B, F
            pixels = np.asarray(image)
        else:
            if image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image.convert("RGBA"))
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on a damaged file, not only OSError
        return None, " ".join(str(error).split()) or type(error).__name__
    return (pixels, "") if np.isfinite(pixels).all() else (None, "it has NaN or infinite pixels")


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    size = width, height
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))  # antialiased


def _read_image(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """(H, W) or (H, W, 3) to (1 or 3, height, width) uint8."""
    if pixels.dtype == np.uint8:
        resized = _resize(pixels, height, width)
    else:  # all precision is kept until after the stretch
        exact = np.float32 if pixels.dtype.itemsize == 2 else np.float64
        low, high = exact(pixels.min()), exact(pixels.max())
        pixels = ((pixels.astype(exact) - low) / (high - low or exact(1))).astype(np.float32)
        resized = np.rint(255 * _resize(pixels, height, width)).astype(np.uint8)  # a constant image is black
    image = torch.from_numpy(np.atleast_3d(resized)).permute(2, 0, 1)
    return image[:1].clone() if (image == image[:1]).all() else image


def read_picture(path: Path, side: int, multiple: int, channels: int) -> Tensor:
    """One image (1, channels, H, W) uint8, its shorter side about `side` px, both multiples of `multiple`.

    If it is more than 16 times as long as wide, its longer side is 16 times `side`. Raises DataError if it
    can't be read.
    """
    height, width = picture_size(path)
    scale = side / min(height, width)
    scale = min(scale, 16 * side / max(height, width))  # a thin strip would become endless
    near = [max(1, round(edge * scale / multiple)) * multiple for edge in (height, width)]
    image = _read_image(_decode(path)[0], *near).float()  # (1 or 3, H, W)
    image = image if len(image) == channels else image.mean(dim=0, keepdim=True).expand(channels, -1, -1)
    return image[None].round().to(torch.uint8)


def _read_mask(path: Path, image_path: Path, shape: tuple[int, ...], size: int) -> Tensor:
    """(S, S) bool: true from half of the mask's own maximum, so 0/1, 0/255 and soft grey mean the same."""
    pixels, problem = _decode(path)
    if pixels is None:
        raise DataError(f"{path}: this mask cannot be read ({problem}); repair or remove it")
    (h, w), (height, width) = pixels.shape[:2], shape[:2]
    if (h, w) != (height, width):
        sizes = f"{path} is {w} x {h} px but its image {image_path} is {width} x {height} px"
        raise DataError(f"{sizes}; draw the mask on the image as it is, or resize it to the image's size")
    pixels = np.atleast_3d(pixels).max(axis=2)  # (H, W); not the luminance: blue counts like white
    inside = (pixels > 0) & (pixels >= pixels.max() / 2)
    return torch.from_numpy(_resize(inside.astype(np.float32), size, size) >= 0.5)


def image_size(data: str, name: str) -> tuple[int, int]:
    """Height and width of an image of the folder `data`, upright, as it is on disk."""
    folder = Path(data) / "images" if (Path(data) / "images").is_dir() else Path(data)
    return picture_size(folder / name)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, upright. Raises DataError if it can't be read."""
    pixels, problem = _decode(path)
    if pixels is None:
        raise DataError(f"{path}: this image cannot be read ({problem}); repair or remove it")
    return pixels.shape[:2]


def by_stem(names: list[str]) -> dict[str, int]:
    """{name without suffix: its place}, as masks name images. Raises DataError if two of them are alike."""
    found: dict[str, int] = {}
    for i, name in enumerate(names):
        stem = Path(name).with_suffix("").as_posix()
        if stem in found:
            raise DataError(f"{names[found[stem]]} and {name} would have one mask's name; rename one of them")
        found[stem] = i
    return found


def read_masks(folder: Path, data: str | None, names: list[str], size: int) -> Tensor:
    """Masks (N, 1, S, S) bool of the images `names` from a folder: <name> or <region>/<name>, united.

    data: the folder of the images; None if they are drawn: then any size of a mask will do. Another suffix is
    fine; an image without any has an empty mask; what begins with a dot is left alone. Raises DataError if no
    image has one, one has another size than its image, or if the folder holds images.
    """
    if (folder / "images").is_dir() or data and folder.resolve() == Path(data).resolve():
        raise DataError(f"{folder} holds images, which are no masks; name the folder of its masks")
    wanted = by_stem(names)
    masks, found = torch.zeros(len(names), 1, size, size, dtype=torch.bool), set()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not str(inner).startswith("."):
            name = inner.with_suffix("").as_posix()
            i = wanted.get(name, wanted.get(name.partition("/")[2]))
            if i is not None:
                _refuse_way_out(path, folder)
                shape = picture_size(path) if data is None else image_size(data, names[i])
                masks[i, 0] |= _read_mask(path, Path(names[i]), shape, size)
                found.add(i)
    if not found:
        raise DataError(f"{folder} holds no mask of any training image; name them like `{names[0]}`")
    return masks


def _read_images(paths: dict[str, Path], masks: dict[str, dict], size: int, notes: list[str]) -> Data:
    blank = torch.zeros(size, size, dtype=torch.bool)

    def read(name: str) -> tuple[str, Tensor | None, list[Tensor]]:
        """What is wrong with an image, or "", it (C, S, S), and a mask (S, S) for each region."""
        pixels, problem = _decode(paths[name])
        if pixels is not None and min(pixels.shape[:2]) < 8:
            problem = f"{pixels.shape[1]} x {pixels.shape[0]} px, but 8 x 8 is the least"
        if problem:
            return problem, None, []
        shape, files = pixels.shape, [m.get(name) for m in masks.values()]
        own = [blank if file is None else _read_mask(file, paths[name], shape, size) for file in files]
        return "", _read_image(pixels, size, size), own

    names, images, layers = [], [], []
    with ThreadPoolExecutor(min(8, os.cpu_count())) as threads:  # each holds an image as it is on disk
        found = tqdm(threads.map(read, paths), total=len(paths), desc="reading", leave=False, delay=5)
        for (name, path), (problem, image, own) in zip(paths.items(), found):
            if problem:
                notes.append(f"{path} is skipped: {problem}; repair or remove it")
                continue
            names.append(name)
            images.append(image)
            layers.append(torch.stack(own) if masks else None)  # (R, S, S)
    if not names:
        raise DataError(f"none of {len(paths)} images can be read; replace them. The last: {notes[-1]}")
    channels = max(len(image) for image in images)
    stacked = torch.stack([image.expand(channels, -1, -1) for image in images])  # (N, C, S, S)
    known = torch.tensor([bool(masks) and all(name in m for m in masks.values()) for name in names])
    return Data(stacked, torch.stack(layers) if masks else None, known, None, names, list(masks), [])


def _read_labels(path: Path, images: dict) -> tuple[list[str], dict[str, list[float]], dict[str, str]]:
    """Findings (K), {image name: K values}, and {image name: part}, empty without a column `split`."""

    def fail(line: int, problem: str) -> NoReturn:
        raise DataError(f"{path}, line {line}: {' '.join(problem.split())}")  # cells may hold newlines

    raw = path.read_bytes() if path.is_file() else b"file"  # no table is an empty one
    try:
        reader = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fail(line, f"byte {raw[error.start]:#x} is not UTF-8; save the table as 'CSV UTF-8'")
    except csv.Error as error:
        fail(reader.line_num, f"{error}; check the quotes")
    header = lines[0][1] if lines else []
    columns = [column for column in header if column not in ("file", "split", "label")]
    if "file" not in header or "" in header or len(set(header)) < len(header):
        fail(1, f"`{','.join(header)}` must name each column once, `file` among them, with commas between")
    if "label" in header and columns:
        fail(1, f"unknown column `{columns[0]}` beside `label`; remove one of them")

    rows = {}
    for line, cells in lines[1:]:
        row = dict(zip(header, cells))
        if len(cells) != len(header):
            fail(line, f"`{','.join(cells)}` has {len(cells)} cells, not {len(header)}; add or remove some")
        if row["file"] not in images:
            fail(line, f"no `{row['file']}` in images/; give the name with its suffix or remove the row")
        if row["file"] in rows:
            fail(line, f"`{row['file']}` is listed twice; remove one of its rows")
        if row.get("split", "train") not in PARTS:
            fail(line, f"split `{row['split']}` is not train, val or test; use one of these")
        for column in columns:
            if row[column] not in FINDING:
                fail(line, f"column `{column}` holds `{row[column]}`; remove it or use 0, 1 or blank")
        rows[row["file"]] = row

    classes = sorted({row["label"] for row in rows.values() if row.get("label")})
    values = {name: [FINDING[row[column]] for column in columns] for name, row in rows.items()}
    for name, row in rows.items():
        values[name] += [float(row["label"] == c) if row["label"] else math.nan for c in classes]
    split = {name: rows[name]["split"] if name in rows else "train" for name in images if "split" in header}
    return columns + classes, values, split


def _split(names: list[str]) -> dict[str, str]:
    """70/15/15 % by the checksum of the name: the same for every seed, on every machine."""
    order = sorted(names, key=lambda name: (zlib.crc32(name.encode("utf-8", "surrogateescape")), name))
    held_out = max(1, round(0.15 * len(names))) if len(names) > 2 else 0
    parts = ["train"] * (len(names) - 2 * held_out) + ["val"] * held_out + ["test"] * held_out
    return dict(zip(order, parts))


def _choose_sample(
    data: Data, masks: dict[str, dict], split: dict[str, str], sample: str | None, notes: list[str]
) -> str | None:
    """The labelled sample's name; moves it to train in `split` if it is elsewhere."""
    complete = [name for name, known in zip(data.names, data.has_masks.tolist()) if known]
    if sample is None and not complete:
        counts = ", ".join(f"{region} has {len(found)}" for region, found in masks.items())
        notes += [f"no image has a mask in every region ({counts}): no labelled sample"] if masks else []
        return None
    elif sample is None:
        sample = min(complete, key=lambda name: (PARTS.index(split[name]), name))
    elif sample not in data.names:
        raise DataError(f"sample `{sample}` is no readable image; give an exact name, e.g. `{data.names[0]}`")
    elif sample not in complete:
        region = next((region for region, found in masks.items() if sample not in found), "<region>")
        raise DataError(f"sample `{sample}` has no mask of {region}; expected masks/{region}/{sample}")
    if split[sample] != "train":
        notes.append(f"{sample} moves from {split[sample]} to train as the labelled sample")
        split[sample] = "train"
    return sample
