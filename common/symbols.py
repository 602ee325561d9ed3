"""Draw a dataset of ten classes: shapes, textures and digits of any size, place, colour and rotation.

python -m common.symbols data/symbols --train 50      and 20 images per class to validate, 100 to test
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

FONT = dict(two="0110 1001 0010 0100 1111", five="1111 1000 1110 0001 1110", seven="1111 0001 0010 0100 0100")
CLASSES = ["disc", "square", "triangle", "ring", "stripes", "checks", "dots", *FONT]


def symbol(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(S, S) bool: the pixels of a symbol of class `kind`, in coordinates u (right), v (down) of [-1, 1]."""
    radius, inside = np.hypot(u, v), (abs(u) < 1) & (abs(v) < 1)
    if kind in FONT:
        bits = np.array([[int(bit) for bit in row] for row in FONT[kind].split()], bool)  # (5, 4)
        row, column = ((v + 1) * 2.5).astype(int).clip(0, 4), ((u + 1) * 2).astype(int).clip(0, 3)
        return inside & bits[row, column]
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
    """One image of class `kind`, (size, size, 3) uint8."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    half, angle = rng.uniform(0.3, 0.6), rng.uniform(-0.3, 0.3)
    angle += rng.uniform(0, 2 * np.pi) if kind in ("square", "triangle", "stripes", "checks") else 0
    cx, cy = rng.uniform(half - 1, 1 - half, 2)
    u = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) / half
    v = (np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)) / half
    back = rng.uniform(0.1, 0.9, 3)
    front = (back + rng.uniform(0.25, 0.75, 3)) % 1
    slope = 0.15 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    image = np.where(symbol(kind, u, v)[..., None], front, back) + slope[..., None]
    image += rng.normal(0, 0.08, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def main(argv: list[str] | None = None) -> None:
    """The command line; exit status 2 for bad values or a folder that is not empty."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--train", type=int, default=50, help="training images per class (default: 50)")
    parser.add_argument("--size", type=int, default=64, help="pixels per side (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    if args.train < 1 or args.size < 8 or args.seed < 0:
        values = f"--train {args.train} --size {args.size} --seed {args.seed}"
        parser.error(f"{values}: they must be at least 1, 8 and 0")
    if args.folder.is_file() or any(args.folder.glob("*")):
        parser.error(f"{args.folder} exists and is not empty; name a new folder")
    (args.folder / "images").mkdir(parents=True)
    rows = [("file", "label", "split")]
    for s, (split, n) in enumerate({"train": args.train, "val": 20, "test": 100}.items()):
        for k, kind in enumerate(CLASSES):
            for i in range(n):
                name, rng = f"{split}_{kind}_{i:04d}.png", np.random.default_rng([args.seed, s, k, i])
                Image.fromarray(draw(kind, args.size, rng)).save(args.folder / "images" / name)
                rows.append((name, kind, split))
    (args.folder / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    print(f"drew {len(rows) - 1} images into {args.folder}")


if __name__ == "__main__":
    main()
