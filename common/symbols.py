"""A small set of pictures in ten classes, drawn from a seed: shapes, textures, digits of a pixel font.

    python -m common.symbols data/symbols --train 50       a class: 50 images to train, 20 to validate, 100 to test

Each picture has a symbol of random size, place and colour on a background of another colour, with a gradient
and noise; shapes are turned, textures fill a square. The folder has the layout of `folder.py`, so that
`train.py --data` takes it. It serves to measure what pretraining is worth with few labels. Next to read:
`data.py`.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

DIGITS = {
    "two": "0110 1001 0010 0100 1111",
    "five": "1111 1000 1110 0001 1110",
    "seven": "1111 0001 0010 0100 0100",
}
CLASSES = ["disc", "square", "triangle", "ring", "stripes", "checks", "dots", *DIGITS]


def symbol(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a symbol of the class `kind` lies: (S, S) bool; u (right), v (down): its frame is [-1, 1]."""
    radius, inside = np.hypot(u, v), (abs(u) < 1) & (abs(v) < 1)
    if kind in DIGITS:
        bits = np.array([[int(bit) for bit in row] for row in DIGITS[kind].split()], bool)  # (5, 4)
        row, column = np.floor((v + 1) * 2.5).astype(int), np.floor((u + 1) * 2).astype(int)
        return inside & bits[row.clip(0, 4), column.clip(0, 3)]
    return {
        "disc": radius < 1,
        "square": inside & (abs(u) < 0.85) & (abs(v) < 0.85),
        "triangle": (v < 0.7) & (v > 1.8 * abs(u) - 1),
        "ring": (radius < 1) & (radius > 0.6),
        "stripes": inside & (np.floor((u + 1) * 4) % 2 == 0),
        "checks": inside & ((np.floor((u + 1) * 3) + np.floor((v + 1) * 3)) % 2 == 0),
        "dots": inside & (np.hypot((u + 1) * 2 % 1 - 0.5, (v + 1) * 2 % 1 - 0.5) < 0.3),
    }[kind]


def draw(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of the class `kind`, (size, size, 3) uint8."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    half, angle = rng.uniform(0.3, 0.6), rng.uniform(-0.3, 0.3)
    angle += rng.uniform(0, 2 * np.pi) if kind in ("square", "triangle", "stripes", "checks") else 0
    cx, cy = rng.uniform(half - 1, 1 - half, 2)
    u, v = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) / half, (
        np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    ) / half
    back = rng.uniform(0.1, 0.9, 3)
    front = (back + rng.uniform(0.25, 0.75, 3)) % 1
    slope = 0.15 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    picture = np.where(symbol(kind, u, v)[..., None], front, back) + slope[..., None]
    picture = picture + rng.normal(0, 0.08, picture.shape)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def main() -> None:
    """Draw into a new folder; exit status 2 for sizes or a folder that cannot be."""
    parser = argparse.ArgumentParser(
        description="Draw pictures in ten classes into a folder for train.py --data."
    )
    parser.add_argument("folder", type=Path, help="where to draw; made if it isn't there")
    parser.add_argument("--train", type=int, default=50, help="training images a class (default: 50)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    args = parser.parse_args()
    for name, least in (("train", 1), ("size", 8), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least {least}")
    if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
        parser.error(f"{args.folder} is there already, and holds something; name a new folder")
    (args.folder / "images").mkdir(parents=True)
    rows = [("file", "label", "split")]
    for p, (part, n) in enumerate({"train": args.train, "val": 20, "test": 100}.items()):
        for k, kind in enumerate(CLASSES):
            for i in range(n):
                rows.append((f"{part}_{kind}_{i:04d}.png", kind, part))
                picture = draw(kind, args.size, np.random.default_rng([args.seed, p, k, i]))
                Image.fromarray(picture).save(args.folder / "images" / rows[-1][0])
    with open(args.folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"drew {len(rows) - 1} pictures into {args.folder}")


if __name__ == "__main__":
    main()
