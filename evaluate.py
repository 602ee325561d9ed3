"""What comes out: runs of `train.py`, measured side by side on test images that no choice was made on.

For each region the pixel average precision (AP) of an attention head, averaged over test images; for a run that was guided by one
labelled sample also the AP of its prior, as it is and registered to each test image. A guided head is fixed beforehand; for a run
without guidance the best head of each region is chosen on validation images.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attention_priors import align, bend, carry, follow, priors_from_masks, priors_from_statistics
from data import Data, load, normalise, select
from metrics import localisation_ap
from plots import attention_grid
from vit import ViT

BATCH = 250


def build_encoder(config: argparse.Namespace, in_chans: int) -> ViT:
    """The ViT that the settings of a run describe. Raises ValueError for sizes that do not fit."""
    return ViT(
        config.img_size, config.patch_size, in_chans, config.embed_dim, config.depth, config.num_heads,
        drop_path=config.drop_path,
    )  # fmt: skip


def make_priors(config: argparse.Namespace, parts: dict[str, Data], sample: str | None) -> tuple[Tensor, list[str]]:
    """Priors (R, H, W) over an unregistered image, and their names, as `--prior` asks. Raises ValueError."""
    train, size = parts["train"], config.img_size
    if config.prior == "sample":
        if sample is None:
            raise ValueError(f"--prior sample: no image of {config.data} has a mask for every region; draw masks for one")
        masks = train.masks[train.names.index(sample)]
        empty = [region for region, mask in zip(train.regions, masks) if not mask.any()]
        if empty:
            raise ValueError(f"the masks of sample {sample} are empty for {', '.join(empty)}: draw them, or choose another")
        return priors_from_masks(masks, config.prior_blur), train.regions
    if config.prior == "statistics":
        names = ["mean", "deviation", "cluster 1", "cluster 2"]
        return priors_from_statistics(train.images, blur=config.prior_blur), names
    try:
        priors = torch.from_numpy(np.load(config.prior, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"--prior {config.prior}: not sample, masks, statistics, none or a .npy file ({error})") from None
    if priors.dim() != 3 or priors.shape[1:] != (size, size) or not priors.isfinite().all() or priors.min() < 0:
        raise ValueError(
            f"--prior {config.prior} is {tuple(priors.shape)}: it must be (R, {size}, {size}) like the images, "
            "finite and not negative; resize it or change --img-size"
        )
    return priors_from_masks(priors, config.prior_blur), [f"prior {r}" for r in range(len(priors))]


def lay_over(config: argparse.Namespace, priors: Tensor, sample: Tensor | None, images: Tensor) -> Tensor:
    """Priors (R, H, W) as they lie over images (N, C, H, W) uint8 after `--align`: (N, R, H, W) on the images' device.

    sample (C, H, W) uint8: the image that the priors were drawn on, or None for priors that no image comes with.
    """
    if config.align == "none" or sample is None:
        return priors.expand(len(images), *priors.shape)
    laid = []
    for part in images.split(BATCH):
        theta = align(sample, part)
        laid.append(carry(priors, theta, bend(sample, part, theta) if config.align == "bend" else None))
    return torch.cat(laid)


@torch.no_grad()
def attention_of(encoder: ViT, images: Tensor, layer: int) -> Tensor:
    """Attention (N, heads, N_patches) of one block over images (N, C, H, W) uint8, in evaluation mode."""
    encoder.eval()
    return torch.cat([encoder(normalise(part.float() / 255), layer=layer).attention for part in images.split(BATCH)])


def measure(
    config: argparse.Namespace, encoder: ViT, parts: dict[str, Data], sample: str | None
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """AP on the test images with masks: {what: {region: AP}}, what being prior, aligned prior, attention.

    Also the maps behind them, {title: (N, N_patches)}, for pictures. Raises ValueError if no test image has masks.
    """
    grid = encoder.native_grid
    val, test = (select(parts[part], parts[part].has_masks) for part in ("val", "test"))
    if not len(test.names):
        raise ValueError(f"no test image of {config.data} has a mask for every region: AP can't be measured")
    R = len(test.regions)
    heads = list(range(R))
    if config.prior not in ("sample", "masks"):  # no head belongs to a region: choose, on validation images
        if not len(val.names):
            raise ValueError(f"no validation image of {config.data} has masks to choose the heads by: AP can't be measured")
        heads = localisation_ap(attention_of(encoder, val.images, config.span_layer), val.masks, grid).nanmean(0).argmax(0)
    maps = {"attention": attention_of(encoder, test.images, config.span_layer)[:, torch.as_tensor(heads)]}  # (N, R, N_p)
    if config.prior == "sample":
        train, (priors, _) = parts["train"], make_priors(config, parts, sample)
        whole = torch.eye(2, 3).expand(len(test.names), 2, 3)
        laid = lay_over(config, priors, train.images[train.names.index(sample)], test.images)
        maps = {"prior": follow(priors, whole, grid)[0], "aligned prior": follow(laid, whole, grid)[0], **maps}
    scores = {what: localisation_ap(m, test.masks, grid).diagonal(dim1=1, dim2=2).nanmean(0) for what, m in maps.items()}
    if config.prior == "sample":
        scores["aligned prior, every pixel"] = (
            localisation_ap(laid.flatten(2), test.masks, laid.shape[2:]).diagonal(dim1=1, dim2=2).nanmean(0)
        )
    table = {what: dict(zip(test.regions, ap.tolist())) for what, ap in scores.items()}
    return table, {f"head {h}\n({region})": maps["attention"][:, r] for r, (h, region) in enumerate(zip(heads, test.regions))}


def flatten(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{what: {region: AP}} to the flat names of metrics.json: `attention_mAP`, `attention_AP_heart`, ..."""
    flat = {}
    for what, row in table.items():
        name = what.replace(",", "").replace(" ", "_")
        flat[f"{name}_mAP"] = float(np.mean(list(row.values())))
        flat |= {f"{name}_AP_{region.replace(' ', '_')}": ap for region, ap in row.items()}
    return flat


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """A table on the terminal: a row a region and their mean, a column a map, AP in percent."""
    regions = list(next(iter(columns.values())))
    width = [max(len(title), 7) for title in columns]
    print("AP in %".ljust(16) + "".join(f"  {title:>{w}}" for title, w in zip(columns, width)))
    for region in regions + ["mean"]:
        values = [np.mean(list(row.values())) if region == "mean" else row[region] for row in columns.values()]
        print(f"{region:16}" + "".join(f"  {100 * value:>{w}.1f}" for value, w in zip(values, width)))


def load_run(folder: Path) -> tuple[argparse.Namespace, dict]:
    """A run's settings and its checkpoint. Raises ValueError if it isn't a finished run, or runs code when loaded."""
    try:
        config = argparse.Namespace(**json.loads((folder / "config.json").read_text()))
        checkpoint = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        return config, checkpoint
    except OSError as error:
        raise ValueError(f"{folder} is not a run of train.py: {error.filename} cannot be read") from None
    except Exception as error:  # a damaged or foreign file fails in torch's unpickler in many ways
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder}: config.json or last.pt is damaged ({reason}); train again with --overwrite") from None


def load_encoder(config: argparse.Namespace, checkpoint: dict, in_chans: int) -> ViT:
    """The trained student encoder of a run."""
    encoder = build_encoder(config, in_chans)
    prefix = "student."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["objective"].items() if k.startswith(prefix)}
    encoder.load_state_dict(state)
    return encoder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure runs of train.py side by side and draw where they look.",
        epilog="example: python evaluate.py runs/span runs/dino",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders written by train.py --out")
    parser.add_argument("--images", type=int, default=6, help="test images in the picture (default: 6)")
    args = parser.parse_args(argv)
    try:
        evaluate(args.runs, args.images)
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


def evaluate(runs: list[Path], n_images: int) -> None:
    """Print the table of all runs and write `compare.png` into the first and `metrics.json` into each."""
    columns, pictures, data_of = {}, {}, None
    for run in runs:
        config, checkpoint = load_run(run)
        source = (config.data, config.img_size, config.patch_size, config.seed, config.sample)
        if data_of not in (None, source):
            raise ValueError(f"{run} and {runs[0]} differ in data, sizes, seed or sample: compare runs on the same images")
        data_of = source
        parts, sample, _ = load(config.data, config.img_size, config.seed, config.train_images, config.sample)
        encoder = load_encoder(config, checkpoint, parts["test"].images.shape[1])
        table, maps = measure(config, encoder, parts, sample)
        write_json(run / "metrics.json", flatten(table))
        columns |= {f"{run.name} {what}": row for what, row in table.items()}
        pictures |= {f"{run.name} {title}": m[:n_images] for title, m in maps.items()}
    print_table(columns)
    test = select(parts["test"], parts["test"].has_masks)
    path = runs[0] / "compare.png"
    n = n_images
    attention_grid(path, test.images[:n].float() / 255, test.masks[:n], test.regions, pictures, encoder.native_grid)
    print(f"wrote {path}")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
