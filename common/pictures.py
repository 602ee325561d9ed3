"""One picture as pixels: any format, depth and orientation; a damaged one is refused by a clear error."""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.data import DataError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")  # a PostScript file would run Ghostscript
warnings.filterwarnings("ignore", module="PIL")  # about odd metadata


def decode(path: Path, mask: bool = False) -> np.ndarray:
    """Upright pixels (H, W) or (H, W, 3): uint8, or grey in its own depth. Raises DataError.

    Transparent pixels are black; a mask that is black on a transparent ground is its own opacity.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            most = Image.MAX_IMAGE_PIXELS or math.inf  # Pillow only warns
            if min(file.size) < 8 or math.prod(file.size) > most:
                raise ValueError(f"{file.width} x {file.height} px; the limits are 8 x 8 and {most} px")
            if file.format == "TIFF" and file.n_frames > 1:
                raise ValueError(f"{file.n_frames} pages; save each as a file of its own")
            image = ImageOps.exif_transpose(file)
        if image.mode[0] not in "IF":  # I, I;16, I;16B and F are deeper than 8 bit
            if image.has_transparency_data:
                image = image.convert("RGBA")
                opacity, black = image.getchannel("A"), Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image)
                if mask and len(opacity.getcolors()) > 1 and not image.convert("RGB").getbbox():
                    image = opacity
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinite pixels")
        return pixels
    except Exception as error:  # Pillow raises almost anything on a damaged file, not only OSError
        problem = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: this image cannot be read ({problem}); repair or remove it") from None


def read_mask(path: Path, image: str, shape: tuple[int, int] | None, size: int) -> Tensor:
    """(S, S) bool, S = size: pixels of at least half the mask's maximum, so 0/1, 0/255, soft grey all work.

    A region that is too small for this size keeps the pixels that show most of it. image: the name of its
    image. shape: that image's height and width, if the mask must have the same. Raises DataError.
    """
    colours = np.atleast_3d(decode(path, mask=True))  # (H, W, 1 or 3)
    pixels = colours.max(axis=2)  # (H, W); not the luminance: blue counts like white
    if shape is not None and pixels.shape != shape:
        mine, theirs = (f"{width} x {height} px" for height, width in (pixels.shape, shape))
        raise DataError(f"{path} is {mine} but its image {image} is {theirs}; resize the mask to that")
    _refuse_several(path, colours)
    inside = Image.fromarray(((pixels > 0) & (pixels >= pixels.max() / 2)).astype(np.float32))
    inside = np.array(inside.resize((size, size), Image.Resampling.BILINEAR))  # shares of pixels
    return torch.from_numpy((inside > 0) & (inside >= min(0.5, inside.max())))


def _refuse_several(path: Path, colours: np.ndarray) -> None:
    """Raise DataError if a mask (H, W, 1 or 3) seems to show several regions by different values."""
    (H, W), (down, right) = colours.shape[:2], (side // 128 or 1 for side in colours.shape[:2])
    moves = (0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)
    inner, *beside = (colours[1 + y : H - 1 + y : down, 1 + x : W - 1 + x : right] for y, x in moves)
    flat = np.logical_and.reduce([(inner == each).all(axis=2) for each in beside])  # no soft outline is
    peaks = inner.max(axis=2).astype(np.float64)
    shown = inner[flat & (peaks > peaks.min() + np.ptp(peaks) / 8)]  # (M, 1 or 3)
    if not len(shown):
        return
    codes = shown.astype(np.float64) @ 256.0 ** np.arange(shown.shape[1])  # fast to sort
    _, first, often = np.unique(codes, return_index=True, return_counts=True)
    values = shown[first].astype(np.float64)  # (n, 1 or 3)
    main = values[often.argmax()]
    tolerance, least = (0.2 * shown.max(), len(shown) / 50) if shown.max() >= 32 else (0, 0)  # for JPEGs
    often[abs(values - main).max(axis=1) <= tolerance] = 0
    if often.max() > max(4, least):
        two = main.tolist(), values[often.argmax()].tolist()
        listed = " and ".join("/".join(f"{v:g}" for v in value) for value in two)
        raise DataError(f"{path} holds the values {listed}; give each region its own mask, 0 and 255")


def to_tensor(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """(H, W) or (H, W, 3) to (1 or 3, height, width) uint8."""
    deep = pixels.dtype != np.uint8
    if deep:  # stretch in full precision, before the resize; a constant image is black
        pixels = pixels.astype(np.float64) - float(pixels.min())
        pixels = (pixels / (pixels.max() or 1)).astype(np.float32)
    resized = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    resized = np.rint(255 * resized).astype(np.uint8) if deep else resized
    image = torch.from_numpy(np.atleast_3d(resized)).permute(2, 0, 1)
    return image[:1].clone() if (image == image[:1]).all() else image


def read_picture(path: Path, side: int, multiple: int, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """One image (1, channels, H, W) uint8, H and W multiples of `multiple`, and the file's height and width.

    The shorter side is about `side` px, the longer at most 16 times that. Raises DataError.
    """
    pixels = decode(path)
    size = pixels.shape[:2]
    scale = min(side / min(size), 16 * side / max(size))
    image = to_tensor(pixels, *(max(1, round(edge * scale / multiple)) * multiple for edge in size)).float()
    image = image if len(image) == channels else image.mean(dim=0, keepdim=True).expand(channels, -1, -1)
    return image[None].round().to(torch.uint8), size
