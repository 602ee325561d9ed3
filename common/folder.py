"""A folder of pictures, with masks and labels, as tensors in three splits: train, val and test.

    hospital/images/a.png  b.jpg          parts/good/1.png  2.png
    hospital/masks/heart/a.png            parts/scratched/1.png
    hospital/labels.csv

docs/data.md describes both layouts, masks, labels and splits, and how images are converted.
"""

import math
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.data import SPLITS, Data, DataError, LoadedData, printable, select
from common.labels import notes_on, one_hot, read_labels
from common.pictures import decode, read_mask, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm")
LAYOUT = "expected images/ with optional masks/<region>/ and labels.csv, or one folder of images per class"
NO_CLASSES = {*SPLITS, "training", "validation", "valid", "testing"}  # names of folders
ENTRIES = ["images", "masks", "labels.csv"]  # of a folder


def load_folder(folder: str | Path, img_size: int, reference: str | None = None) -> LoadedData:
    """The images and masks of a folder, resized to S = img_size, each side independently.

    The reference image is the one asked for, else the first in train (or val, or test) that has all masks, if
    possible none empty; it moves to train. A damaged image is skipped with a note. Raises DataError.
    """
    folder, notes = Path(folder), []
    paths, findings, labels, split, masks = {}, [], {}, {}, {}
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {LAYOUT}")
    for path in sorted(folder.glob("[!.]*")):
        near = get_close_matches(path.name.lower(), ENTRIES, 1, 0.8)
        if near == ["images"] and not (folder / "images").exists():  # not a class
            raise DataError(f"{path}: did you mean images/? {LAYOUT}")
        if near and (folder / "images").exists() and not (folder / near[0]).exists():
            notes.append(f"{path} is not used: did you mean {near[0]}?")
    if (folder / "images").is_dir():
        paths = {path.name: path for path in _listed(folder / "images")}
        findings, labels, split = read_labels(folder / "labels.csv", paths)
        masks = _find_masks(folder / "masks", paths, notes)
    elif not (folder / "masks").exists() and not (folder / "labels.csv").exists():  # masks are not a class
        classes = [sub for sub in _listed(folder, True) if not (sub / "config.json").exists()]  # a run
        if len(splits := [sub.name for sub in classes if sub.name.lower() in NO_CLASSES]) > 1:
            line = f"{', '.join(splits)} are splits, not classes"
            raise DataError(f"{folder}: {line}: move all images to images/, add the split to labels.csv")
        paths = {f"{sub.name}/{path.name}": path for sub in classes for path in _listed(sub)}
        findings, labels = one_hot({name: printable(path.parent.name) for name, path in paths.items()})
    elsewhere = _unused(folder, paths)
    if not paths:
        where = f" where they belong, but{elsewhere[1:]}" if elsewhere else f" ({' '.join(SUFFIXES)})"
        raise DataError(f"{folder} holds no images{where}; {LAYOUT}")
    notes += [f"images not used:{elsewhere[1:]}; {LAYOUT}"] if elsewhere else []
    data = _read_images(paths, masks, img_size, notes)
    for region, m in zip(data.regions, data.masks.unbind(1)):  # (N, S, S)
        if (full := torch.stack([mask.float().mean() for mask in m]) > 0.98).any():
            name = data.names[int(full.int().argmax())]
            line = f"{int(full.sum())} mask(s) of {region} cover the whole image, such as that of {name}"
            notes.append(f"{line}: a mask must be black where the region is not")
    unknown = torch.full((len(findings),), math.nan)
    rows = torch.stack([labels.get(name, unknown) for name in data.names])  # (N, K)
    data = data._replace(labels=rows, findings=findings)
    if not split:  # by the checksum of the names: the same for every seed, on every machine
        order = sorted(data.names, key=lambda n: (zlib.crc32(n.encode("utf-8", "surrogateescape")), n))
        held_out = max(1, round(0.15 * len(order))) if len(order) > 2 else 0
        split = dict.fromkeys(order, "train") | dict.fromkeys(order[len(order) - 2 * held_out :], "val")
        split |= dict.fromkeys(order[len(order) - held_out :], "test")
    reference = _choose_reference(data, masks, split, reference, notes)
    splits = {s: select(data, torch.tensor([split[name] == s for name in data.names])) for s in SPLITS}
    notes += [f"{folder}: no images in {s}" for s in SPLITS if not splits[s].names] + _repeated(splits)
    notes += notes_on(findings, rows, torch.tensor([split[name] == "train" for name in data.names]))
    return splits, reference, [printable(note) for note in notes]


def _repeated(splits: dict[str, Data]) -> list[str]:
    """A note for val and for test if they hold images of train, equal in all pixels."""
    pixels = {s: [hash(image.numpy().tobytes()) for image in splits[s].images] for s in SPLITS}
    train, notes = {*pixels["train"]}, []
    for s in ("val", "test"):
        if again := [name for name, x in zip(splits[s].names, pixels[s]) if x in train]:
            line = f"{len(again)} image(s) of {s} are in train as well, such as {again[0]}"
            notes.append(f"{line}: remove one of each, or scores will be too high")
    return notes


def _listed(folder: Path, folders: bool = False) -> list[Path]:
    """The image files in a folder, or its subfolders, without hidden ones."""
    paths = (path for path in sorted(folder.iterdir()) if path.name[0] != ".")
    return [p for p in paths if (p.is_dir() if folders else p.suffix.lower() in SUFFIXES and p.is_file())]


def _few(notes: list[str]) -> list[str]:
    """The first notes, and how many more there are: a folder may have thousands."""
    return notes[:3] + [f"... and {len(notes) - 3} more of this kind"] * (len(notes) > 3)


def _unused(folder: Path, used: dict[str, Path]) -> str:
    """Where images lie that are not used, in words, "" for none; masks and hidden files don't count."""
    found, left = {*used.values()}, Counter()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        misplaced = parts[0] != "masks" or len(parts) != 3  # a mask is masks/<region>/<name>
        if path.suffix.lower() in SUFFIXES and misplaced and path not in found and path.is_file():
            left[path.parent] += not any(part[0] == "." for part in parts)
    words = [f", {n} in {parent}" for parent, n in sorted(left.items()) if n]
    return "".join(words[:5]) + f", and in {len(words) - 5} more folders" * (len(words) > 5)


def _find_masks(folder: Path, images: dict[str, Path], notes: list[str]) -> dict[str, dict[str, Path]]:
    """{region: {image name: mask file}}: by the image's full name, or else by its stem.

    Adds notes on unused files. Raises DataError if a mask may belong to two images, or two masks to one.
    """
    stems, masks = defaultdict(list), {}
    for name, path in images.items():
        stems[normalize("NFC", path.stem)].append(name)  # macOS may write an umlaut as two characters
    for region in _listed(folder, folders=True) if folder.is_dir() else []:
        own, unused = {}, []
        masks[printable(region.name)] = own
        for path in _listed(region):
            # masks/heart/a.png belongs to images/a.png, never to an images/a.jpg beside it.
            names = [path.name] if path.name in images else stems[normalize("NFC", path.stem)]
            if len(names) > 1:
                raise DataError(f"{path} may belong to {' or '.join(names)}: give it the suffix of its image")
            unused += [] if names else [f"{path} is not used: no image has this name"]
            for name in names:
                if own.setdefault(name, path) != path:
                    raise DataError(f"{own[name]} and {path} are both masks of {images[name]}; remove one")
        notes += _few(unused)
    return masks


def image_size(data: str, name: str) -> tuple[int, int]:
    """Height and width of an image of the folder `data`, upright. Raises DataError if it can't be read."""
    images = Path(data) / "images"
    return decode((images if images.is_dir() else Path(data)) / name).shape[:2]


def by_stem(names: list[str]) -> dict[str, int]:
    """{name without suffix: its index}, as masks name images. Raises DataError if two are alike."""
    stems: dict[str, int] = {}
    for i, name in enumerate(names):
        first = stems.setdefault(normalize("NFC", Path(name).with_suffix("").as_posix()), i)
        if first != i:
            raise DataError(f"{names[first]} and {name} would share a mask's name; rename one of them")
    return stems


def read_masks(folder: Path, data: str | None, names: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Masks (N, 1, S, S) bool of the images `names`: the union of the files <name> and <region>/<name>.

    data: the folder of the images, or None for synthetic ones, whose masks may have any size. Also returns
    which images have a mask of every region, (N,) bool; the others' are empty. Raises DataError without any.
    """
    if (folder / "images").is_dir() or data and folder.resolve() == Path(data).resolve():
        raise DataError(f"{folder} holds images, not masks; name the folder of the masks")
    wanted, known = by_stem(names), defaultdict(set)  # region: images that have a mask of it
    masks = torch.zeros(len(names), 1, size, size, dtype=torch.bool)
    for path in sorted(folder.rglob("*")):
        name = normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        i = wanted.get(name, wanted.get(name.partition("/")[2]))
        if i is not None and name[0] != "." and path.suffix.lower() in SUFFIXES and path.is_file():
            known["" if name in wanted else name.partition("/")[0]].add(i)
            shape = image_size(data, names[i]) if data else None
            masks[i, 0] |= read_mask(path, names[i], shape, size)
    if not known:
        raise DataError(f"{folder} holds no mask of any training image; name them like `{names[0]}`")
    whole = known.pop("", set())  # a single mask for all regions
    whole |= set.intersection(*known.values() or [set()])
    if partly := set.union(set(), *known.values()) - whole:
        print(f"note: {len(partly)} image(s) have masks of some regions only: their foreground is unknown")
        masks[list(partly)] = False
    return masks, torch.tensor([i in whole for i in range(len(names))])


def _read_images(paths: dict[str, Path], masks: dict[str, dict], size: int, notes: list[str]) -> Data:
    def read(name: str) -> tuple[Tensor, Tensor, int] | DataError:
        """An image (C, S, S), its masks (R, S, S), its shorter side in the file; or why it is skipped."""
        try:
            pixels = decode(paths[name])
        except DataError as error:
            return error
        own = torch.zeros(len(masks), size, size, dtype=torch.bool)
        for mask, files in zip(own, masks.values()):
            if path := files.get(name):
                mask[:] = read_mask(path, str(paths[name]), pixels.shape[:2], size)
        return to_tensor(pixels, size, size), own, min(pixels.shape[:2])

    with ThreadPoolExecutor(8) as threads:
        bar = dict(desc="reading", total=len(paths), leave=False, delay=5, disable=None)
        results = list(tqdm(threads.map(read, paths), **bar))
    notes += _few(skipped := [f"skipped {result}" for result in results if isinstance(result, DataError)])
    names = [name for name, result in zip(paths, results) if isinstance(result, tuple)]
    if not names:
        raise DataError(f"none of {len(paths)} images can be read; replace them ({skipped[-1]})")
    images, own, sides = zip(*(result for result in results if isinstance(result, tuple)))
    side = int(np.median(sides))
    more = 224 if side >= 224 else 128
    if side >= max(128, 2 * size) and more > size:
        flags = f"--img-size {more} --patch-size 16"
        notes.append(f"images of {side} px become {size} px; {flags} keeps more detail")
    channels = max(map(len, images))
    images = torch.stack([image.expand(channels, -1, -1) for image in images])  # (N, C, S, S)
    known = torch.tensor([bool(masks) and all(name in files for files in masks.values()) for name in names])
    return Data(images, torch.stack(own), known, torch.zeros(len(names), 0), names, list(masks), [])


def _choose_reference(data: Data, masks: dict, split: dict, name: str | None, notes: list) -> str | None:
    """The reference image's name, None without one; moves it to train in `split`. Raises DataError."""
    complete = [name for name, known in zip(data.names, data.has_masks.tolist()) if known]
    if name is None and not complete:
        if masks:
            counts = ", ".join(f"{region} has {len(files)}" for region, files in masks.items())
            notes.append(f"no image has a mask in every region: {counts}")
        return None
    empty = dict(zip(data.names, (~data.masks.flatten(2).any(dim=2)).any(dim=1).tolist()))
    name = name or min(complete, key=lambda n: (SPLITS.index(split[n]), empty[n]))  # the first that shows all
    if name not in data.names:
        raise DataError(f"sample `{name}` is no readable image; use a name like `{data.names[0]}`")
    if name not in complete:
        region, *_ = [region for region, files in masks.items() if name not in files] or ["<region>"]
        raise DataError(f"sample `{name}` has no mask of {region}; expected masks/{region}/{name}")
    if split[name] != "train":
        notes.append(f"{name} moves from {split[name]} to train as the reference image")
        split[name] = "train"
    return name
