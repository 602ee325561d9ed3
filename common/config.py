"""Settings of train.py: one frozen dataclass, whose fields are flags.

A default of None depends on other settings (DEFAULTS). Later sources win: defaults, --config, --preset, the
encoder of --init, the flags.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from common.baselines import BASELINES, PENALTIES
from common.flags import flag, kind_of, may_be, parser_of
from common.phantom import FINDINGS, MARKERS
from common.processes import rank
from common.splits import DRAWN
from common.weights import read_weights, sizes
from relvit import TASKS as RELATIONS

DEFAULTS = {  # by --task, by --backbone, and by both
    "pretrain": {"out": Path("runs/span"), "batch_size": 32, "train_images": 1500, "lr": 1.4e-3}
    | {"backbone": "vit", "embed_dim": 96, "depth": 4, "num_heads": 6, "lrp_gamma": 0.0, "clip_grad": 3.0},
    "classify": {"out": Path("runs/classifier"), "batch_size": 16, "train_images": 3000}
    | {"backbone": "resnet", "embed_dim": 64, "depth": 3, "num_heads": 4, "isnet_end": 1.0},
    "vit": {"pool": "cls", "simpool_gamma": 1.25},
    "resnet": {"pool": "gap", "simpool_gamma": 2.0},
    "classify vit": {"lr": 5e-4, "lrp_gamma": 0.0, "clip_grad": 3.0, "shift": 0.06, "isnet_margin": 0.0},
    # With larger gradients some ISNet runs do not learn.
    "classify resnet": {"lr": 2e-3, "lrp_gamma": 3.0, "clip_grad": 0.1, "shift": 0.0, "isnet_margin": 0.03},
}
PRESETS = {  # from Faster ISNet's code; its weight is P / (1 - P) with P = 0.7
    "published": {"isnet": 7 / 3, "swap": 0.0, "isnet_every": 1, "isnet_layers": "blocks", "isnet_decay": 0.9}
    | {"isnet_margin": 0.0, "isnet_e": 1.0, "explain": "selective", "lrp_epsilon": 1e-2, "lrp_gamma": 0.0}
}
# Minimum epochs, and for a folder also minimum steps. A ViT learns labels more slowly.
LENGTHS = {"pretrain": (9, 350), "classify resnet": (15, 2800), "classify vit": (40, 7500)}
ENCODER = "backbone img_size patch_size embed_dim depth num_heads registers pool pool_heads simpool_gamma"
PER_CALL = ("out", "overwrite", "resume", "keep_going", "strict", "device")  # --resume may change these
PLACES = {  # ... and these, if a file or folder that they name has moved: any value but these words
    "data": tuple(DRAWN), "init": (), "masks": ("data", "prior", "attention"),
    "prior": ("sample", "masks", "statistics", "none"),
}  # fmt: skip
NO_SETTINGS = {*"command versions machine channels classes multiclass images priors relevance_range".split()}
COUNT, FRACTION, WEIGHT, POSITIVE = (1, 10**9), (0, 1), (0, 1e9), (1e-12, 1e9)  # limits
DINO, VIEWS, PENALISED = "ssl=dino", "ssl=dino|none", "baseline=" + "|".join(PENALTIES)
MADE = "masks=prior isnet&masks=data baseline&masks=data"  # masks that may be made from others


@dataclass(frozen=True)
class Config:
    """All settings of a run. Raises TypeError for one that does not exist."""

    # fmt: off
    task: str = flag("pretrain", "without or with labels", group="run", choices=["pretrain", "classify"])
    out: Path = flag(None, "folder for everything that the run writes", "--output-dir")
    overwrite: bool = flag(False, "start again and replace the run in --out")
    resume: bool = flag(False, "continue the run in --out where it stopped")
    keep_going: bool = flag(False, "continue after a collapse of DINO", needs="ssl=dino")
    strict: bool = flag(False, "stop if DINO collapses, even if SPAN could go on", needs="ssl=dino&prior")
    seed: int = flag(0, "random seed of data, weights and views", within=(0, 2**32 - 1))
    device: str = flag("auto", "auto (cuda if there is one, else cpu), cpu, cuda, mps (untried)")
    data: str = flag("phantom", "phantom (X-rays), parts (plates), or a folder", "--data-path", group="data")
    train_images: int = flag(None, "number of synthetic training images", within=COUNT)
    img_size: int = flag(64, "images are resized to this many pixels per side", within=(1, 4096))
    findings: tuple[str, ...] = flag(None, "labels to learn, or all (default: only the phantom's first; of "
        "other data all)", nargs="+", needs="task=classify")
    marker: float = flag(None, "probability that a marker agrees with the first finding", within=FRACTION)
    marker_kind: str = flag("corner", "an L in a corner or anywhere, a tint, a frame (border), two hospitals",
        choices=[*MARKERS, "hospitals"], needs="marker")
    sample: str = flag(None, "name of the reference image (default: the first with all masks)")
    prior: str = flag("sample",
        "sample: one image's masks; masks: every image's; statistics; none; or a .npy file (R, S, S)",
        group="where to look (SPAN)", needs="task=pretrain masks=prior")
    align: str = flag("bend", "how priors are registered to each image: bend (deformable), affine, or none",
        choices=["bend", "affine", "none"], needs=f"prior=sample {MADE}")
    follow: bool = flag(True, "keep priors fixed while crops move", needs=f"{VIEWS}&prior")
    prior_blur: float = flag(0.025, "blur of priors: sigma / image width",
        within=WEIGHT, needs=f"prior {MADE}")
    span_weight: float = flag(3.0, "weight of the SPAN loss", within=WEIGHT, needs="prior")
    span_loss: str = flag("kl", "distance of attention from its prior; each needs its own --span-weight",
        choices=["kl", "mse", "dice"], needs="prior")
    span_layer: int = flag(-1, "the block whose heads are guided, -1 the last", needs="pool=cls")
    ssl: str = flag("dino", "the objective without labels; none: the SPAN loss alone",
        group="self-supervision", choices=["dino", "relvit", "none"], needs="task=pretrain")
    relations: tuple[str, ...] = flag(None, "RelViT's tasks (default: all); with --task classify, tasks to "
        "learn along with the labels (default: none)", choices=RELATIONS, nargs="+",
        needs="ssl=relvit task=classify")
    in_order: bool = flag(False, "with --relations: leave patches in order and unchanged, as published",
        needs="task=classify&relations")
    mega_patches: int = flag(0, "RelViT's mega-patches (cells of random size) per side; 0: patches",
        within=(0, 10**9), needs="ssl=relvit")
    out_dim: int = flag(256, "number K of prototypes; hundreds suit thousands of images",
        within=(2, 10**9), needs=DINO)
    teacher_temp: float = flag(0.02, "softmax temperature of the teacher", within=POSITIVE, needs=DINO)
    momentum: float = flag(0.996, "EMA momentum of the teacher at the start", "--momentum-teacher",
        within=FRACTION, needs=DINO)
    center_momentum: float = flag(0.9, "EMA momentum of the teacher's centre", within=FRACTION, needs=DINO)
    koleo: float = flag(0.1, "weight of KoLeo (spreads features; acts near a collapse); 0: as published",
        within=WEIGHT, needs=DINO)
    max_entropy: float = flag(0.8, "upper limit on the teacher's entropy, as a fraction of log K (acts "
        "near a collapse by lowering its temperature); 1: as published", within=(0.01, 1), needs=DINO)
    global_scale: tuple[float, float] = flag((0.4, 1.0), "area range of the 2 global crops (1: whole image)",
        "--global-crops-scale", nargs=2, needs=VIEWS)
    local_crops_number: int = flag(0, "number of local crops (half as wide, in whole patches)",
        within=(0, 10**9), needs=VIEWS)
    local_scale: tuple[float, float] = flag((0.1, 0.4), "area range of the local crops (1: whole image)",
        "--local-crops-scale", nargs=2, needs="local_crops_number")
    flip: float = flag(0.0, "probability of a horizontal flip", "--hflip", within=FRACTION, needs=VIEWS)
    shift: float = flag(None, "largest random (cyclic) shift of images, as a fraction of a side",
        group="classification (ISNet)", within=FRACTION, needs="task=classify")
    isnet: float = flag(0.0, "weight of the ISNet loss", within=WEIGHT)
    preset: str = flag(None, "ISNet's loss as published", choices=PRESETS, needs="task=classify")
    isnet_every: int = flag(3, "add the ISNet loss in every N-th step", within=COUNT, needs="isnet")
    swap: float = flag(1.0, "fraction of images whose background is swapped", within=FRACTION, needs="isnet")
    swap_margin: float = flag(None, "shrink the kept foreground by this fraction of a side, at least a "
        "pixel (default: 0.0125 if some masks are made from others, else 0)", within=(0, 0.2),
        needs="isnet&swap baseline=swap")
    isnet_margin: float = flag(None, "width of the unpenalised margin around the foreground, as a "
        "fraction of a side", within=(0, 0.5), needs="isnet")
    isnet_end: float = flag(None, "fraction of the weight --isnet that remains at the end; 1: constant",
        within=FRACTION, needs="isnet")
    baseline: str = flag(None, "method to train instead of ISNet; see common/baselines.py", choices=BASELINES)
    baseline_weight: float = flag(1.0, "weight of the baseline's penalty", within=WEIGHT, needs=PENALISED)
    masks: str = flag("data", "source of the foreground: data (its own masks), prior (the reference image's, "
        "registered), attention (of the run --init), another run, or a folder",
        needs=f"isnet {PENALISED}|swap")
    explain: str = flag("selective", "explain the label's logit, a random one, or the log-odds of the "
        "least likely class", choices=["label", "random", "selective"], needs="isnet")
    isnet_layers: str = flag("all", "inner maps to penalise: none, relevance of blocks, relevance of all "
        "layers, or all: also attention", choices=["none", "blocks", "relevance", "all"], needs="isnet")
    isnet_decay: float = flag(0.97, "ratio of the weights of successive ranks, where background relevance "
        "is pooled; 1: plain mean", within=(1e-3, 1), needs="isnet")
    isnet_e: float = flag(0.1, "E of the background loss, u = h / (h + E); small: faint relevance counts",
        within=POSITIVE, needs="isnet")
    lrp_epsilon: float = flag(1e-2, "epsilon of LRP", within=POSITIVE, needs="task=classify")
    lrp_gamma: float = flag(None, "gamma of LRP's signed gamma rule; 0: epsilon rule", within=WEIGHT,
        needs="task=classify")
    backbone: str = flag(None, "the encoder", group="model", choices=["vit", "resnet"])
    init: Path = flag(None, "run, or file of published ViT weights, to start from; sets the encoder's sizes")
    patch_size: int = flag(8, "pixels per side of a patch", within=COUNT)
    embed_dim: int = flag(None, "embedding width (ResNet: last stage)", within=COUNT)
    depth: int = flag(None, "blocks of the ViT", within=COUNT, needs="backbone=vit")
    num_heads: int = flag(None, "attention heads; each prior takes one", within=COUNT)
    registers: int = flag(0, "register tokens of the ViT", within=(0, 1000), needs="backbone=vit")
    drop_path: float = flag(0.0, "stochastic depth of the last block", "--drop-path-rate",
        within=(0, 0.99), needs="backbone=vit")
    pool: str = flag(None, "pooling: CLS token, mean, or SimPool", choices=["cls", "gap", "simpool"])
    simpool_gamma: float = flag(None, "exponent of SimPool's mean", within=(0.1, 10), needs="pool=simpool")
    pool_heads: int = flag(None, "attention heads of SimPool (default: --num-heads if guided, else 1)",
        within=COUNT, needs="pool=simpool")
    epochs: int = flag(None, "passes over the images (default: 9; with labels 15, or 40 for a ViT; more "
        "for small folders)", group="optimisation", within=COUNT)
    batch_size: int = flag(None, "images per step", within=COUNT)
    accumulate: int = flag(1, "split each batch into this many parts, to save memory; DINO's centre, KoLeo "
        "and monitor, the SPAN loss, means over known labels or masks, and BatchNorms see one part only")
    amp: bool = flag(False, "compute in bfloat16 where that is safe")
    compile: bool = flag(False, "pretrain with torch.compile")
    lr: float = flag(None, "peak learning rate (AdamW, cosine)", within=(1e-9, 1e9))
    warmup: float = flag(0.1, "fraction of all steps in which the learning rate rises", within=FRACTION)
    weight_decay: float = flag(0.04, "weight decay of matrices; vectors have none", within=WEIGHT)
    clip_grad: float = flag(None, "largest gradient norm; 0: no clipping", within=WEIGHT)
    # fmt: on


def as_config(values: dict) -> Config:
    """A Config from JSON values: strings become Paths, lists become tuples."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    paths = [f.name for f in fields(Config) if kind_of(f) is Path and values.get(f.name) is not None]
    return Config(**values | {name: Path(values[name]) for name in paths})


def as_json(config: Config) -> dict:
    """The settings as JSON has them."""
    return json.loads(json.dumps(asdict(config), default=str))


def epochs_for(task: str, backbone: str, steps: float = math.inf) -> int:
    """How many epochs a run trains for by default, if an epoch has so many steps."""
    epochs, floor = LENGTHS["pretrain" if task == "pretrain" else f"classify {backbone}"]
    return max(epochs, math.ceil(floor / steps))


def parse(argv: list[str], doc: str = "") -> tuple[Config, set[str]]:
    """The settings of a command line, and the names of those that were typed. Raises ValueError."""
    typed = vars(parser_of(Config, DEFAULTS, doc).parse_args(argv))
    if "config" in typed and "resume" in typed:
        raise ValueError("--config starts a new run, --resume continues one: leave out either")
    if "config" in typed and "overwrite" in typed and "out" not in typed:
        raise ValueError(f"--config {typed['config']} with --overwrite would replace that run: add --out")
    saved = read_settings(typed.pop("config"), "--config") if "config" in typed else {}
    encoder = encoder_of(typed["init"]) if "init" in typed else {}
    given = saved | PRESETS.get(typed.get("preset"), {}) | encoder | typed
    if encoder and given["num_heads"] is None:
        raise ValueError(f"{typed['init']} doesn't say how many heads it has: add --num-heads")
    same_pool = encoder and typed["init"].is_dir() and given["pool"] == encoder["pool"]
    for name in ("num_heads", "pool_heads", "simpool_gamma") if same_pool else ():
        if given[name] != encoder[name]:  # such weights would fit, and mean something else
            flag = name.replace("_", "-")
            raise ValueError(f"{typed['init']} has --{flag} {encoder[name]}, not {given[name]}: leave it out")
    if encoder and given["backbone"] != encoder["backbone"]:
        masks = f"; for its masks alone, --masks {typed['init']}" if typed["init"].is_dir() else ""
        raise ValueError(f"{typed['init']} is not a {given['backbone']}: leave out --backbone{masks}")
    task = given.get("task", "pretrain")
    backbone = given.get("backbone", DEFAULTS[task]["backbone"])
    values = {f.name: f.default for f in fields(Config)}
    for key in (task, backbone, f"{task} {backbone}"):
        values |= DEFAULTS.get(key, {})
    if task == "classify" and given.get("data", "phantom") == "phantom":
        values["findings"] = (FINDINGS[0],)
    if given.get("data", "phantom") in DRAWN:
        values["epochs"] = epochs_for(task, backbone)  # for a folder, set when its images are counted
    values |= PRESETS.get(given.get("preset"), {}) | given
    if values["pool_heads"] is None:
        values["pool_heads"] = values["num_heads"] if task == "pretrain" and values["prior"] != "none" else 1
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return as_config(values), set(typed)


def read_settings(path: Path, by: str) -> dict:
    """The settings in a run's config.json, or in that file, except None and per-call flags.

    by: the flag that names it. Raises ValueError if it can't be read, or train.py doesn't know a setting.
    """
    try:
        record = json.loads((path / "config.json" if path.is_dir() else path).read_text())
        record["command"], record["task"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{by} {path}: there is no config.json of a run, or it is damaged") from None
    known, left_out = {f.name: f for f in fields(Config)}, NO_SETTINGS | {"overwrite", "resume", "device"}
    settings = {name: v for name, v in record.items() if v is not None and name not in left_out}
    for name, value in settings.items():
        if name not in known or not may_be(known[name], value):
            raise ValueError(f"{by} {path} has {name} {json.dumps(value)[:80]}, which train.py doesn't know")
    if not rank() and by == "--config" and (newer := known.keys() - record.keys()):
        print(f"note: {by} {path} is older than {', '.join(sorted(newer))}: today's defaults are used")
    return settings


def encoder_of(init: Path) -> dict:
    """The encoder's settings of a run, or of a file of published weights. Raises ValueError."""
    if not init.exists():
        raise ValueError(f"--init {init}: no such file or folder; name a run, or a file of weights")
    found = sizes(read_weights(init)[0]) if init.is_file() else read_settings(init, "--init")
    if missing := [name for name in ENCODER.split() if name not in found]:
        raise ValueError(f"--init {init}: its config.json lacks {', '.join(missing)}; restore it")
    return {name: found[name] for name in ENCODER.split()}
