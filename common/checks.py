"""Invalid settings stop with a one-line error that names the value, the limit and the remedy."""

from dataclasses import fields
from pathlib import Path

from common.baselines import PENALTIES
from common.config import PLACES, Config
from common.flags import option, suggestion
from common.folder import LAYOUT
from common.processes import rank
from common.splits import DRAWN

PRIORS, MASKS = PLACES["prior"], PLACES["masks"]
PRETRAINING = ("ssl", "prior")  # have no effect outside pretraining, except --prior with --masks prior


def check(config: Config, typed: set[str]) -> None:
    """Raise ValueError, naming value, limit and remedy, for settings that make no sense or have no effect."""
    limits = {f.name: f.metadata["within"] for f in fields(Config) if f.metadata["within"]}
    blocks = max(1, config.depth)
    limits |= {"span_layer": (-blocks, blocks - 1), "accumulate": (1, config.batch_size)}
    for f in fields(Config):
        value, needs = getattr(config, f.name), f.metadata["needs"].split()
        if f.name in limits and value is not None:
            low, high = limits[f.name]
            if not low <= value <= high:  # NaN is not within either
                raise ValueError(f"{option(f)} {value}: it must lie between {low:g} and {high:,.12g}")
        useful = not needs or any(all(met(config, name) for name in need.split("&")) for need in needs)
        if f.name in typed and not useful and not config.resume:
            if config.task == "classify":
                needs = ["task=pretrain" if need.startswith(PRETRAINING) else need for need in needs]
            flags = " or ".join(f"--{need.replace('=', ' ').replace('&', ' and --')}" for need in needs)
            flags = flags.replace("|", " or ").replace("_", "-")
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            shown = option(f) if isinstance(value, bool) else f"{option(f)} {value}"
            raise ValueError(f"{shown} does nothing without {flags}")
    for flag, (low, high) in {"global": config.global_scale, "local": config.local_scale}.items():
        if not 0 < low <= high <= 1:
            line = "give two fractions of the area, 0 < a <= b <= 1"
            raise ValueError(f"--{flag}-scale {low:g} {high:g}: {line}")
    check_pairs(config)
    if not rank() and "train_images" in typed and config.data not in DRAWN:
        print(f"note: --train-images is for synthetic images; all images of {config.data} are used")


def met(config: Config, need: str) -> bool:
    """Whether a setting is on (NAME), or has one of the named values (NAME=A|B)."""
    name, _, values = need.partition("=")
    value = getattr(config, name)
    if name in PRETRAINING and config.task != "pretrain":
        return False
    if values:
        return value in values.split("|")
    return value not in (None, 0, "none") or name == "marker" and value == 0


def check_step(c: Config, images: int, processes: int) -> None:
    """Raise ValueError if a process has no image in a step, or a part of a step has one but needs two."""
    here = min(c.batch_size, images) // processes  # images in a step
    if not here:
        raise ValueError(f"{images} training image(s) for {processes} processes: take fewer processes")
    near_collapse = c.task == "pretrain" and c.ssl == "dino" and (c.koleo or c.max_entropy < 1)
    swaps = c.isnet and c.swap or c.baseline == "swap"
    if (near_collapse or swaps) and here < 2 * c.accumulate:
        what = "swapping backgrounds" if swaps else "what keeps DINO from collapse (--koleo, --max-entropy)"
        line = f"{what} needs 2 images in each of {c.accumulate} part(s) of a step, which has {here}"
        raise ValueError(f"{line}: add images, lower --accumulate, or raise --batch-size")


def check_pairs(c: Config) -> None:
    """Raise ValueError for settings that exclude each other."""
    classify, vit, most = c.task == "classify", c.backbone == "vit", c.img_size // c.patch_size
    relational = bool(c.relations) if classify else c.ssl == "relvit"
    plain = not (c.isnet or c.baseline in PENALTIES or c.relations)
    guided = not classify and c.prior != "none"
    from_run = c.resume or c.init and c.init.is_dir()
    some_masks = c.masks in MASKS or c.resume or Path(c.masks).is_dir()
    known_prior = c.prior in PRIORS or Path(c.prior).is_file()
    heads_fit = c.pool != "simpool" or c.embed_dim % c.pool_heads == 0
    # fmt: off
    for wrong, line in [
        (vit and c.local_crops_number and most < 2, "--local-crops-number needs 2 patches a side or more"),
        (c.mega_patches > most, f"--mega-patches {c.mega_patches}: more than the {most} patches per side"),
        (c.data not in DRAWN and not Path(c.data).is_dir(), f"--data {c.data} is not a folder; {LAYOUT}"
         + suggestion(c.data, DRAWN)),
        (not known_prior, f"--prior {c.prior} is not {', '.join(PRIORS)}, or a .npy file that exists"),
        (not heads_fit, f"--pool-heads {c.pool_heads} must divide --embed-dim {c.embed_dim}: change either"),
        (c.masks == "prior" and c.prior == "none", "--masks prior needs a prior: leave out --prior none"),
        (c.masks == "prior" and c.prior == "masks",
         "--masks prior --prior masks are the data's own masks: leave out both"),
        (c.masks == "prior" and c.prior == "statistics",
         "--masks prior --prior statistics: clusters cover the whole image; leave out --prior statistics"),
        (c.masks == "attention" and not from_run, "--masks attention needs --init RUN; or use --masks RUN"),
        (not some_masks, f"--masks {c.masks} is not {', '.join(MASKS)}, or a folder"),
        (not classify and c.ssl == "none" and not guided, "--ssl none learns from a --prior alone: set one"),
        (c.isnet and not classify, "--isnet needs --task classify"),
        (c.baseline and not classify, "--baseline needs --task classify"),
        (c.baseline and (c.isnet or c.relations), "--baseline excludes --isnet and --relations: choose one"),
        (c.amp and classify and not plain, "--amp is for pretraining and plain classifiers; leave it out"),
        (c.compile and classify, "--compile is for pretraining: LRP follows each operation; leave it out"),
        (c.preset == "published" and vit, "--preset published needs --backbone resnet, as published"),
        (c.baseline == "gated" and c.pool == "simpool", "--baseline gated pools by gates: leave out --pool"),
        (c.pool == "cls" and not vit, "--pool cls needs --backbone vit; a ResNet has gap or simpool"),
        (relational and not vit, "RelViT (--ssl relvit, --relations) needs --backbone vit"),
        (relational and c.isnet, "--relations moves patches, and --isnet's masks don't follow: choose one"),
        (guided and c.pool == "gap", "--pool gap has no attention to guide: add --prior none"),
    ]:
        # fmt: on
        if wrong:
            raise ValueError(line)
