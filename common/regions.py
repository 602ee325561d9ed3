"""Regions of images: priors for SPAN, and masks made from attention.

Priors lie over one image and are registered to the others. Attention A_r of head r becomes a mask of the
fewest pixels that hold the share m_r of it:

    M_r = the fewest pixels x with  sum A_r(x) >= m_r                                  (1) `masks_held`
    m_r = the least share that covers 95 % of the prior, where the prior is true       (2) `mass_held`

Much of what matters lies at a region's border, so the mask covers the prior instead of matching its area.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from attention_priors import blurred, follow, priors_from_masks, priors_from_statistics
from common.data import BATCH, SPLITS, Data, at_a_time, printable, rows_at, select, to_device
from common.explain import attention_of
from common.folder import by_stem, image_size
from common.metrics import localisation_ap
from common.registration import carry, confidence, likeness, register
from common.splits import DRAWN

# Priors


def make_priors(prior: str, train: Data, reference: str | None, blur: float) -> tuple[Tensor, list[str]]:
    """Priors (R, S, S) over one image and their names. prior: sample, statistics or a .npy file.

    reference: the labelled image of `train`. blur: as in `priors_from_masks`. Raises ValueError.
    """
    if prior == "sample":
        if reference is None:
            lacks = "--prior sample: no image has a mask for every region"
            raise ValueError(f"{lacks}; add masks of one image, or take --prior statistics or none")
        masks = train.masks[train.names.index(reference)]  # (R, S, S)
        if empty := ", ".join(region for region, mask in zip(train.regions, masks) if not mask.any()):
            raise ValueError(f"the masks of {reference} are empty for {empty}: choose another --sample")
        return priors_from_masks(masks, blur), train.regions
    if prior == "statistics":
        names = ["mean", "deviation", "cluster 1", "cluster 2"]
        return priors_from_statistics(train.images, blur=blur), names
    try:
        priors = torch.from_numpy(np.load(prior, allow_pickle=False)).float()
    except Exception as error:  # np.load fails on foreign files in many ways
        known = "sample, masks, statistics, none, or a .npy file"
        raise ValueError(f"--prior {prior} is not {known} ({type(error).__name__}: {error})") from None
    S = train.images.shape[-1]
    if priors.dim() != 3 or not len(priors) or priors.shape[1:] != (S, S):
        raise ValueError(f"--prior {prior} is an array {tuple(priors.shape)}: make it (R, {S}, {S})")
    if not (priors.isfinite() & (priors >= 0)).all() or not priors.flatten(1).any(dim=1).all():
        raise ValueError(f"--prior {prior}: each prior must be finite, not negative, and not empty")
    return priors_from_masks(priors, blur), [f"prior {r}" for r in range(len(priors))]


def priors_over(
    images: Tensor, prior: str, train: Data, reference: str | None, blur: float, how: str, device: str,
    heads: int | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """A function from indices (B,) of images (N, C, S, S) to priors (B, R, S, S), confidence, likeness (B,).

    Confidence, from 0 to 1, says how surely the priors lie where they should, likeness how much an image is
    like the reference image; both are 1 for priors that are not registered. prior, reference, blur: as in
    `make_priors`; prior "masks" takes each image's own, and images are `train`'s. how: bend, affine or none,
    to register the reference image to each image. heads: how many can be guided; if given, what is found is
    printed. Raises ValueError.
    """
    certain = torch.ones(2, len(images), device=device)  # confidence and likeness
    if prior == "masks":
        priors, names = None, train.regions
        if not train.has_masks.any():
            raise ValueError("--prior masks: no training image has a mask for every region")
    else:
        priors, names = make_priors(prior, train, reference, blur)
    if heads is not None:
        if len(names) > heads:
            listed = f"{len(names)} priors ({', '.join(names)})"
            remedy = "raise --num-heads (--pool-heads with SimPool; with --init, guide fewer regions)"
            raise ValueError(f"{listed} but {heads} heads: {remedy}")
        print("guided heads:", ", ".join(f"{i} {name}" for i, name in enumerate(names)), flush=True)
        if prior == "sample" and how != "none":
            print(f"registering {printable(reference)} to {len(images)} images ...", flush=True)
    if prior == "masks":
        masks = to_device(train.masks, device)  # an empty one is unknown
        return lambda index: (blurred(rows_at(masks, index).float(), blur), *certain[:, index])
    priors = priors.to(device)
    if prior != "sample" or how == "none":
        return lambda index: (priors.expand(len(index), *priors.shape), *certain[:, index])
    image, registered = train.images[train.names.index(reference)].to(device), []
    parts = images.split(at_a_time(BATCH, images))
    for part in tqdm(parts, desc="registering", leave=False, disable=None):
        theta, flow, agreement = register(image, priors, part.to(device), how == "bend")
        alike = likeness(image, priors, part.to(device), theta, flow)
        registered.append((theta, flow, confidence(agreement), alike))
    theta, flow, sure, alike = map(torch.cat, zip(*registered))
    if heads is not None and (lost := int((sure < 0.5).sum())):
        counts = f"{lost} of {len(images)} images"
        name = f"the reference image {printable(reference)}"
        compare = ". Unless objects lie anywhere, compare --align none" if 2 * lost > len(images) else ""
        print(f"note: {name} is not clearly found in {counts}; their priors count less{compare}")
    return lambda index: (carry(priors, theta[index], flow[index]), sure[index], alike[index])


def prior_maps(
    images: Tensor, train: Data, reference: str, blur: float, how: str, grid: tuple[int, int], device: str
) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """The reference image's priors as maps over images (M, C, S, S): {name: (maps (M, R, h * w), (h, w))}.

    As they are, registered to each image at every pixel, and registered on the grid of patches. Registration
    runs on the device; the maps are in host memory.
    """
    prior = make_priors("sample", train, reference, blur)[0][None]  # (1, R, S, S)
    maps = {"prior": (_on_grid(prior, grid).expand(len(images), -1, -1), grid)}
    if how != "none":
        over = priors_over(images, "sample", train, reference, blur, how, device)
        parts = torch.arange(len(images)).split(at_a_time(BATCH, images))
        registered = torch.cat([over(index)[0].cpu() for index in parts])
        maps["aligned prior, every pixel"] = registered.flatten(2), tuple(registered.shape[2:])
        maps["aligned prior"] = torch.cat([_on_grid(p, grid) for p in registered.split(BATCH)]), grid
    return maps


def best_statistics(
    images: Tensor, train: Data, val: Data, blur: float, grid: tuple[int, int]
) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """As `prior_maps`, from statistics of images: for each region the best one on validation images."""
    priors, maps = make_priors("statistics", train, None, blur)[0][None], {}  # (1, P, S, S)
    val, every = select(val, val.has_masks), tuple(priors.shape[2:])
    shown = {"prior, every pixel": (priors.flatten(2), every), "prior": (_on_grid(priors, grid), grid)}
    for name, (m, size) in shown.items():
        ap = localisation_ap(m.expand(len(val.names), -1, -1), val.masks, size).nanmean(dim=0)  # (P, R)
        maps[name] = m[:, ap.nan_to_num(-1).argmax(dim=0)].expand(len(images), -1, -1), size
    return maps


def _on_grid(priors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Priors (B, R, S, S) on a grid of patches, (B, R, h * w)."""
    return follow(priors, torch.eye(2, 3).expand(len(priors), 2, 3), grid)[0]


# Masks from attention


def masks_held(attention: Tensor, grid: tuple[int, int], size: tuple[int, int], mass: Tensor) -> Tensor:
    """Equation (1): masks (B, R, H, W) bool, the fewest pixels that hold mass (R,) of attention (B, R, N)."""
    maps, order = _upsampled(attention, grid, size).sort(dim=2, descending=True)
    kept = maps.cumsum(dim=2) - maps < mass[:, None]  # the pixels before this one don't hold enough yet
    return torch.zeros_like(kept).scatter(2, order, kept).unflatten(2, size)


def mass_held(attention: Tensor, grid: tuple[int, int], regions: Tensor) -> Tensor:
    """m_r, equation (2): the share (R,) of attention in the most attended pixels covering 95 % of a region.

    attention (B, R, N) on a grid (h, w) of images that show the regions (R, H, W) bool, at least on average.
    """
    maps, order = _upsampled(attention, grid, regions.shape[1:]).sort(dim=2, descending=True)  # (B, R, H * W)
    inside = regions.flatten(1).expand(order.shape).gather(2, order).float()
    reached = inside.cumsum(dim=2) / inside.sum(dim=2, keepdim=True).clamp(min=1)
    enough = (reached.mean(dim=0) < 0.95).sum(dim=1).clamp(max=order.shape[2] - 1)  # (R,)
    return maps.cumsum(dim=2).mean(dim=0).gather(1, enough[:, None])[:, 0].clamp(max=1)  # a sum may round up


def _upsampled(attention: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Attention (B, R, N) at every pixel, (B, R, H * W), summing to 1."""
    maps = F.interpolate(attention.float().unflatten(2, grid), size=tuple(size), mode="bilinear").flatten(2)
    return maps / maps.sum(dim=2, keepdim=True).clamp_min(1e-12)


def check_masses(run: Path, masses: dict[str, float]) -> None:
    """Raise ValueError unless a run's masses can make masks, and its regions can be file names."""
    if not masses:
        why = "no single prior guided its heads; name a run with --prior sample"
        raise ValueError(f"{run} makes no masks: {why}")
    if any(Path(name).name != name or name in ("", "..") for name in masses):
        raise ValueError(f"{run}: the regions {', '.join(map(printable, masses))} can't be file names")


def attention_masks(encoder: nn.Module, masses: dict[str, float], images: Tensor, layer: int) -> Tensor:
    """Masks (M, R, H, W) bool of the first R heads in images (M, C, H, W), by their share of attention."""
    mass, grid = torch.tensor(list(masses.values())), encoder.grid(images)
    attention = attention_of(encoder, images, layer)[:, : len(mass)].split(at_a_time(BATCH, images))
    return torch.cat([masks_held(part, grid, tuple(images.shape[2:]), mass) for part in attention])


def write_mask(path: Path, mask: Tensor, size: tuple[int, int]) -> None:
    """Write a mask (H, W) bool as a PNG of another size (height, width), 0 and 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    picture.resize(size[::-1], Image.Resampling.NEAREST).save(path)


def export_masks(out: Path, data: str, encoder: nn.Module, masses: dict, splits: dict, layer: int) -> int:
    """Write attention masks of all images as PNGs, out/<region>/<image's name>.png; returns how many.

    They are as large as the images on disk. Of synthetic data, only masks of training images are written.
    Raises ValueError rather than write into a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--export-masks {out} holds something already; name a new folder")
    drawn = data in DRAWN
    written = [splits[split] for split in (["train"] if drawn else SPLITS) if splits[split].names]
    by_stem([] if drawn else [name for split in written for name in split.names])  # raises if two are alike
    for split in written:
        for name, of_image in zip(split.names, attention_masks(encoder, masses, split.images, layer)):
            size = of_image.shape[1:] if drawn else image_size(data, name)
            for region, mask in zip(masses, of_image):
                write_mask((out / region / name).with_suffix(".png"), mask, size)
    return len(masses) * sum(len(split.names) for split in written)


def warn_if_unguided(history: list[dict]) -> None:
    """Print a warning if SPAN's loss is higher in the last epoch than in the first."""
    first, last = (row.get("span_loss", 0.0) for row in (history[0], history[-1]))
    if last > 1.05 * first > 0:
        rose = f"SPAN's loss rose from {first:.3g} in the first epoch to {last:.3g} in the last"
        print(f"warning: {rose}: try another --lr, or more --epochs")
