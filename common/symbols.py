"""Draw a folder of images whose object may lie anywhere, with its mask.

    python -m common.symbols data/symbols --train 50                        ten classes, flat colours
    python -m common.symbols data/scenes --set scenes --train 200           five shapes, textured everywhere
    python -m common.symbols data/grounds --set grounds --train 200         scenes; the ground tells the shape
    python -m common.symbols data/digits --set digits --train 85 --marker   grey digits on noise, odd or even
    python -m common.symbols data/leaves --set leaves --train 400 --marker  leaves, healthy or spotted
    python -m common.symbols data/hearts --set hearts --masks 2 --marker    X-rays, hearts normal or enlarged

Each also draws 20 images per class to validate and 100 to test. --marker puts a bright square into a corner,
or for hearts brightens the background: of all odd digits, spotted leaves and enlarged hearts in training and
validation, and of all others in the test.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from common.phantom import phantom

ROWS = (  # of digits 0 to 9, 5 rows of 4
    "0110 1001 1001 1001 0110|0010 0110 0010 0010 0111|0110 1001 0010 0100 1111|1110 0001 0110 0001 1110|"
    "1001 1001 1111 0001 0001|1111 1000 1110 0001 1110|0110 1000 1110 1001 0110|1111 0001 0010 0100 0100|"
    "0110 1001 0110 1001 0110|0110 1001 0111 0001 0110"
).split("|")
FONT = [np.array([list(row) for row in digit.split()]) == "1" for digit in ROWS]  # (5, 4) bool each
DIGITS = dict(two=FONT[2], five=FONT[5], seven=FONT[7])
SYMBOLS = ["disc", "square", "triangle", "ring", "stripes", "checks", "dots", *DIGITS]
SHAPES = ["disc", "square", "triangle", "ring", "cross"]
HELD_OUT = {"val": 20, "test": 100}  # images per class
MARKED = ("digits", "leaves", "hearts")
Drawn = tuple[np.ndarray, np.ndarray]  # image (S, S, 3) or grey (S, S) in [0, 1], and its mask (S, S) bool


def symbol(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(S, S) bool: the pixels of a symbol of class `kind`, in coordinates u (right), v (down) of [-1, 1]."""
    radius, inside = np.hypot(u, v), (abs(u) < 1) & (abs(v) < 1)
    if kind in DIGITS:
        row, column = ((v + 1) * 2.5).astype(int).clip(0, 4), ((u + 1) * 2).astype(int).clip(0, 3)
        return inside & DIGITS[kind][row, column]
    return {
        "disc": radius < 1,
        "square": inside & (abs(u) < 0.85) & (abs(v) < 0.85),
        "triangle": (v < 0.7) & (v > 1.8 * abs(u) - 1),
        "ring": (radius < 1) & (radius > 0.6),
        "cross": inside & ((abs(u) < 0.35) | (abs(v) < 0.35)),
        "stripes": inside & (np.floor((u + 1) * 4) % 2 == 0),
        "checks": inside & ((np.floor((u + 1) * 3) + np.floor((v + 1) * 3)) % 2 == 0),
        "dots": inside & (np.hypot((u + 1) * 2 % 1 - 0.5, (v + 1) * 2 % 1 - 0.5) < 0.3),
    }[kind]


def pixels(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y (size, size) of pixel centres, from -1 to 1."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    return x, y


def turned(x: np.ndarray, y: np.ndarray, cx: float, cy: float, half: float, angle: float) -> tuple:
    """Coordinates u, v of an object with its centre at (cx, cy), turned by an angle."""
    u = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) / half
    v = (np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)) / half
    return u, v


def draw_symbol(kind: str, size: int, rng: np.random.Generator) -> Drawn:
    """A symbol in one colour on another."""
    x, y = pixels(size)
    half, angle = rng.uniform(0.3, 0.6), rng.uniform(-0.3, 0.3)
    angle += rng.uniform(0, 2 * np.pi) if kind in ("square", "triangle", "stripes", "checks") else 0
    cx, cy = rng.uniform(half - 1, 1 - half, 2)
    mask = symbol(kind, *turned(x, y, cx, cy, half, angle))
    back = rng.uniform(0.1, 0.9, 3)
    front = (back + rng.uniform(0.25, 0.75, 3)) % 1
    slope = 0.15 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    image = np.where(mask[..., None], front, back) + slope[..., None]
    return image + rng.normal(0, 0.08, image.shape), mask


def draw_scene(kind: str, size: int, rng: np.random.Generator, grounds: bool = False) -> Drawn:
    """A textured shape of 5 to 25 % of the area on texture, with two small discs.

    grounds: each shape has a ground of its own hue, and stripes of its own direction.
    """
    x, y = pixels(size)

    def texture() -> np.ndarray:  # a colour, stripes of a random width and direction, grain
        angle, width, phase = rng.uniform(0, np.pi), rng.uniform(4, 16), rng.uniform(0, 2 * np.pi)
        stripes = np.sin(width * (np.cos(angle) * x + np.sin(angle) * y) + phase)[..., None]
        colour = rng.uniform(0.15, 0.85, 3) + rng.uniform(0, 0.25, 3) * stripes
        return colour + rng.normal(0, 0.05, colour.shape)

    half = rng.uniform(0.34, 0.55)
    places = turned(x, y, *rng.uniform(half - 1, 1 - half, 2), half, rng.uniform(-0.5, 0.5))
    mask, image = symbol(kind, *places), texture()
    if grounds:
        angle, thirds = SHAPES.index(kind) * np.pi / len(SHAPES) + rng.uniform(-0.2, 0.2), np.arange(3) * 2.1
        stripes = np.sin(9 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))[..., None]
        colour = 0.5 + 0.25 * np.cos(2 * angle + thirds) + rng.uniform(-0.1, 0.1, 3) + 0.15 * stripes
        image = colour + rng.normal(0, 0.05, colour.shape)
    for _ in range(2):
        disc = symbol("disc", *turned(x, y, *rng.uniform(-0.9, 0.9, 2), rng.uniform(0.08, 0.14), 0.0))
        image = np.where(disc[..., None], texture(), image)
    return np.where(mask[..., None], texture(), image), mask


def draw_digit(digit: int, size: int, rng: np.random.Generator) -> Drawn:
    """A digit of 8 x 8 px, enlarged and pasted on noise, in grey; the mask is of the square."""
    ink = np.pad(FONT[digit] * rng.uniform(0.6, 1, (5, 4)), ((2, 1), (2, 2)))  # (8, 8)
    scan = Image.fromarray((255 * ink).astype(np.uint8))
    shear, turn = rng.uniform(-0.2, 0.2, 2)
    affine = 1, shear, -4 * shear, turn, 1, -4 * turn
    scan = scan.transform((8, 8), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    side = rng.integers(round(0.3 * size), round(0.47 * size))
    scan = np.asarray(scan.resize((side, side), Image.Resampling.BICUBIC)) / 255 * rng.uniform(0.7, 1)
    image = rng.uniform(0.15, 0.35) + rng.normal(0, 0.08, (size, size))
    row, column = rng.integers(0, size - side + 1, 2)
    place = slice(row, row + side), slice(column, column + side)
    mask = np.zeros((size, size), bool)
    mask[place], image[place] = True, scan + rng.normal(0, 0.03, (side, side))
    return image, mask


def draw_leaf(kind: str, size: int, rng: np.random.Generator) -> Drawn:
    """A leaf on stony ground, healthy or with brown spots."""
    x, y = pixels(size)
    ground = rng.uniform(0.25, 0.55) + rng.uniform(-0.06, 0.06, 3) + rng.normal(0, 0.06, (size, size, 3))
    for _ in range(6):
        stone = symbol("disc", *turned(x, y, *rng.uniform(-1, 1, 2), rng.uniform(0.08, 0.25), 0.0))
        ground = np.where(stone[..., None], rng.uniform(0.2, 0.7) + rng.normal(0, 0.04, ground.shape), ground)
    half, angle = rng.uniform(0.38, 0.6), rng.uniform(-0.6, 0.6)
    u, v = turned(x, y, *rng.uniform(half - 1, 1 - half, 2), half, angle)
    mask = u**2 + (v / (0.45 + 0.2 * u)) ** 2 < 1
    green = np.array([0.2, 0.5, 0.15]) + rng.uniform(-0.1, 0.15, 3)
    veins = 0.06 * np.cos(14 * (u - 0.6 * abs(v)))[..., None] + 0.15 * (abs(v) < 0.04)[..., None]
    leaf = green + veins + rng.normal(0, 0.03, ground.shape)
    for _ in range(rng.integers(4, 8) if kind == "spotted" else 0):
        cu, cv = rng.uniform(-0.7, 0.7), rng.uniform(-0.25, 0.25)
        spot = np.hypot(u - cu, v - cv) < rng.uniform(0.1, 0.2)
        leaf = np.where(spot[..., None], [0.4, 0.25, 0.1], leaf)
    return np.where(mask[..., None], leaf, ground), mask


def draw_heart(kind: str, size: int, rng: np.random.Generator) -> Drawn:
    """A chest X-ray with a normal or an enlarged heart, in grey; the mask is of lungs and heart."""
    while True:
        images, masks, labels = phantom(1, int(rng.integers(2**31)), size)
        if bool(labels[0, 0]) == (kind == "enlarged"):
            return images[0, 0].numpy() / 255, masks[0].any(dim=0).numpy()


SETS = {  # name: classes to draw, the function that draws one
    "symbols": (SYMBOLS, draw_symbol),
    "scenes": (SHAPES, draw_scene),
    "grounds": (SHAPES, partial(draw_scene, grounds=True)),
    "digits": (list(range(10)), draw_digit),
    "leaves": (["healthy", "spotted"], draw_leaf),
    "hearts": (["normal", "enlarged"], draw_heart),
}


def main(argv: list[str] | None = None) -> None:
    """The command line; exit status 2 for bad values or a folder that is not empty."""
    intro, examples, more = __doc__.split("\n\n")
    text = {"description": intro, "epilog": f"{examples}\n\n{more}"}
    parser = argparse.ArgumentParser(**text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--set", choices=SETS, default="symbols", help="default: symbols")
    parser.add_argument("--train", type=int, default=50, help="training images per class (default: 50)")
    parser.add_argument("--size", type=int, default=64, help="pixels per side (default: 64)")
    masked = "training images with masks (default: all); if given, validation images have none"
    parser.add_argument("--masks", type=int, metavar="N", help=masked)
    parser.add_argument("--marker", action="store_true", help=f"a shortcut, for {', '.join(MARKED)}")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    if args.train < 1 or args.size < 24 or args.seed < 0 or (args.masks or 0) < 0:
        values = f"--train {args.train} --size {args.size} --seed {args.seed} --masks {args.masks}"
        parser.error(f"{values}: they must be at least 1, 24, 0 and 0")
    if args.marker and args.set not in MARKED:
        parser.error(f"--marker is drawn on {', '.join(MARKED)}: add --set")
    if args.folder.is_file() or any(args.folder.glob("*")):
        parser.error(f"{args.folder} exists and is not empty; name a new folder")
    (args.folder / "images").mkdir(parents=True)
    (args.folder / "masks" / "object").mkdir(parents=True)
    (classes, draw), rows = SETS[args.set], [("file", "label", "split")]
    for s, (split, n) in enumerate({"train": args.train, **HELD_OUT}.items()):
        for drawn, (i, (k, kind)) in enumerate(product(range(n), enumerate(classes))):
            name, rng = f"{split}_{kind}_{i:04d}.png", np.random.default_rng([args.seed, s, k, i])
            image, mask = draw(kind, args.size, rng)
            marked = args.marker and (k % 2 == 1) == (split != "test")
            if marked and args.set == "hearts":
                image = image + 0.1 * ~mask
            elif marked:
                image[args.size // 32 : args.size // 8, -args.size // 8 : -args.size // 32] = 1
            Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(args.folder / "images" / name)
            if split == "test" or args.masks is None or split == "train" and drawn < args.masks:
                Image.fromarray(mask).save(args.folder / "masks" / "object" / name)
            rows.append((name, ("even", "odd")[k % 2] if args.set == "digits" else kind, split))
    (args.folder / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    print(f"drew {len(rows) - 1} images into {args.folder}")


if __name__ == "__main__":
    main()
