"""What comes out: runs of `train.py`, measured side by side on test images that no choice was made on.

For each region the pixel average precision (AP) of an attention head, averaged over test images. A head that
was guided by masks belongs to their region; in any other run each region gets the head that is best on
validation images. A run guided by one labelled sample also shows its prior, as it is and registered to each
test image, on the attention's grid of patches and, for honesty, at every pixel.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attention_priors import align, bend, blurred, carry, follow, priors_from_masks, priors_from_statistics
from checkpoint import load_run
from data import Data, load, normalise, select
from metrics import localisation_ap
from plots import attention_grid
from vit import ViT

BATCH = 250  # images at a time, where no gradient is kept


class CannotMeasure(ValueError):
    """There are no masks to measure with; the message says which."""


def build_encoder(config: argparse.Namespace, in_chans: int) -> ViT:
    """The ViT that a run's settings describe. Raises ValueError for sizes that don't fit."""
    sizes = config.img_size, config.patch_size, in_chans, config.embed_dim, config.depth, config.num_heads
    return ViT(*sizes, drop_path=config.drop_path)


def make_priors(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None
) -> tuple[Tensor, list[str]]:
    """Priors (R, S, S) over one image, as --prior asks, and their names. Raises ValueError."""
    train, blur = parts["train"], config.prior_blur
    if config.prior == "sample":
        if sample is None:
            raise ValueError(
                f"--prior sample: no image of {config.data} has a mask for every region; outline one"
            )
        masks = train.masks[train.names.index(sample)]
        empty = [region for region, mask in zip(train.regions, masks) if not mask.any()]
        if empty:
            raise ValueError(
                f"the masks of sample {sample} are empty for {', '.join(empty)}: choose another --sample"
            )
        return priors_from_masks(masks, blur), train.regions
    if config.prior == "statistics":
        names = ["mean", "deviation", "cluster 1", "cluster 2"]
        return priors_from_statistics(train.images, blur=blur), names
    try:
        priors = torch.from_numpy(np.load(config.prior, allow_pickle=False)).float()
    except Exception as error:  # np.load fails on foreign files in many ways
        what = "sample, masks, statistics, none, or a .npy file"
        raise ValueError(f"--prior {config.prior} is not {what} ({type(error).__name__}: {error})") from None
    S = config.img_size
    if priors.dim() != 3 or not len(priors) or priors.shape[1:] != (S, S):
        raise ValueError(f"--prior {config.prior} is an array {tuple(priors.shape)}: make it (R, {S}, {S})")
    if not (priors.isfinite() & (priors >= 0)).all() or not priors.flatten(1).any(dim=1).all():
        raise ValueError(f"--prior {config.prior}: each prior must be finite, not negative, and not empty")
    return priors_from_masks(priors, blur), [f"prior {r}" for r in range(len(priors))]


def register(config: argparse.Namespace, sample: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The sample (C, S, S) registered to images (N, C, S, S): theta (N, 2, 3) and flow (N, 2, k, k).

    Without bending the flow is zero.
    """
    thetas, flows = [], []
    for part in images.split(BATCH):
        thetas.append(align(sample, part))
        bends = bend(sample, part, thetas[-1]) if config.align == "bend" else torch.zeros(len(part), 2, 1, 1)
        flows.append(bends.to(images.device))
    return torch.cat(thetas), torch.cat(flows)


def lay_over(
    config: argparse.Namespace, parts: dict[str, Data], sample: str | None, images: Tensor
) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """A function from indices (B,) of images (N, C, S, S) to the priors (B, R, S, S) over them; their names.

    images are the training images if --prior is masks. Raises ValueError.
    """
    train = parts["train"]
    if config.prior == "masks":
        if not train.has_masks.any():
            raise ValueError(f"--prior masks: no training image of {config.data} has a mask for every region")
        masks = train.masks.to(images.device)  # blurred as the sample's are; a missing mask stays empty
        return lambda index: blurred(masks[index].float(), config.prior_blur), train.regions
    priors, names = make_priors(config, parts, sample)
    priors = priors.to(images.device)
    if config.prior != "sample" or config.align == "none":
        return lambda index: priors.expand(len(index), *priors.shape), names
    theta, flow = register(config, train.images[train.names.index(sample)].to(images.device), images)
    return lambda index: carry(priors, theta[index], flow[index]), names


@torch.no_grad()
def attention_of(encoder: ViT, images: Tensor, layer: int) -> Tensor:
    """One block's attention (M, heads, N) over images (M, C, S, S) uint8, in evaluation mode."""
    encoder.eval()
    batches = (normalise(part.float() / 255) for part in images.split(BATCH))
    return torch.cat([encoder(batch, layer=layer).attention for batch in batches])


def measure(
    config: argparse.Namespace, encoder: ViT, parts: dict[str, Data], sample: str | None
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """AP on the test images that have masks: {attention, prior, aligned prior ...: {region: AP}}.

    Also the attention (M, h, w) behind it, {title: maps}, for pictures. Raises CannotMeasure without masks.
    """
    val, test = (select(parts[part], parts[part].has_masks) for part in ("val", "test"))
    guided = config.prior in ("sample", "masks")
    for part, data in (("test", test), ("validation", val)):
        if not data.names and not (guided and data is val):
            raise CannotMeasure(f"no {part} image of {config.data} has all masks: AP can't be measured")
    grid, layer, heads = encoder.native_grid, config.span_layer, torch.arange(len(test.regions))
    if not guided:
        ap = localisation_ap(attention_of(encoder, val.images, layer), val.masks, grid)  # (M, heads, R)
        heads = ap.nanmean(dim=0).argmax(dim=0)  # the best for each region
    maps, attention = {}, attention_of(encoder, test.images, layer)[:, heads]  # (M, R, N)
    if config.prior == "sample":
        whole, everyone = torch.eye(2, 3).expand(len(test.names), 2, 3), torch.arange(len(test.names))
        maps["prior"] = follow(make_priors(config, parts, sample)[0], whole, grid)[0], grid
        if config.align != "none":
            laid = lay_over(config, parts, sample, test.images)[0](everyone)
            maps["aligned prior, every pixel"] = laid.flatten(2), tuple(laid.shape[2:])
            maps["aligned prior"] = follow(laid, whole, grid)[0], grid
    maps["attention"] = attention, grid
    table = {}
    for what, (m, size) in maps.items():
        ap = localisation_ap(m, test.masks, size).diagonal(dim1=1, dim2=2).nanmean(dim=0)  # (R,)
        table[what] = dict(zip(test.regions, ap.tolist()))
    titles = [f"head {h}\n{region}" for h, region in zip(heads.tolist(), test.regions)]
    return table, dict(zip(titles, attention.unflatten(2, grid).unbind(1)))


def flatten(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{what: {region: AP}} under the flat names of metrics.json: attention_mAP, attention_AP_heart ..."""
    flat = {}
    for what, row in table.items():
        name = what.replace(",", "").replace(" ", "_")
        flat |= {f"{name}_AP_{region.replace(' ', '_')}": ap for region, ap in row.items()}
        flat[f"{name}_mAP"] = float(np.mean(list(row.values())))
    return flat


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print AP in percent: a row a region and their mean, a column for each entry of {what: {region: AP}}."""
    regions = list(next(iter(columns.values())))
    first = max(map(len, [*regions, "AP in %"]))
    print(f"\n{'AP in %':{first}}" + "".join(f"  {title:>7}" for title in columns))
    for region in [*regions, "mean"]:
        row = [np.mean(list(c.values())) if region == "mean" else c[region] for c in columns.values()]
        cells = [f"  {100 * ap:{max(7, len(title))}.1f}" for ap, title in zip(row, columns)]
        print(f"{region:{first}}" + "".join(cells))
    print()


def load_encoder(run: Path, config: argparse.Namespace, checkpoint: dict, in_chans: int) -> ViT:
    """The trained encoder, the student's, of a run. Raises ValueError if settings and checkpoint disagree."""
    encoder, prefix = build_encoder(config, in_chans), "student."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{run}: last.pt holds a model of other sizes than config.json says") from None
    return encoder


def compare(runs: list[Path], n_images: int) -> None:
    """Measure runs on the same test images, print them side by side, write compare.png into the first."""
    columns, pictures, source = {}, {}, None
    short = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    for run in runs:
        config, checkpoint = load_run(run)
        wanted = {"data": config.data, "img_size": config.img_size, "sample": config.sample}
        if config.data == "phantom":
            wanted |= {"seed": config.seed, "train_images": config.train_images}
        if source is None:
            source, (parts, sample, _) = wanted, load(**wanted)
        differ = [name for name in source | wanted if source.get(name) != wanted.get(name)]
        if differ:
            raise ValueError(
                f"{runs[0]} and {run} differ in {', '.join(differ)}: compare runs on the same images"
            )
        encoder = load_encoder(run, config, checkpoint, parts["test"].images.shape[1])
        table, maps = measure(config, encoder, parts, sample)
        columns |= {f"{short[run]}: {what}": row for what, row in table.items()}
        pictures |= {f"{short[run]}\n{title}": m[:n_images] for title, m in maps.items()}
    print_table(columns)
    test, path = select(parts["test"], parts["test"].has_masks), runs[0] / "compare.png"
    images, masks = test.images[:n_images].float() / 255, test.masks[:n_images]
    attention_grid(path, images, masks, test.regions, pictures)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    """The command line: exit status 0 when done, 2 for a folder that is no run."""
    parser = argparse.ArgumentParser(
        description="Measure runs of train.py side by side, and draw where they look.",
        epilog="example: python evaluate.py runs/span runs/dino",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--images", type=int, default=6, help="test images in the picture (default: 6)")
    args = parser.parse_args(argv)
    try:
        if args.images < 1:
            raise ValueError(f"--images {args.images}: draw at least 1")
        compare(args.runs, args.images)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
