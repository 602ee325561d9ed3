"""A run is a folder: what it was asked for, how far it came, and how it goes on.

    config.json      every setting, the command line, versions and machine
    last.pt          weights, optimizer, random states and history, after an epoch or where it was interrupted
    metrics.jsonl    a line an epoch;  metrics.json  final figures, flat names to numbers
    outlines.json    of heads that one prior guided: {region: share of attention that outlines it}
    masks.pt         a classifier's foreground, if its masks didn't come with the images

Every file is written beside its place and then moved there, so that a kill leaves the old one or the new one,
never half of one. Checkpoints are read with `weights_only=True`: one that would run code is refused. The
settings say what to build, and `load_model` builds it. Next to read: `weights.py`.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
from pathlib import Path

import torch
from torch import Generator, nn
from torch.optim import Optimizer

from common.baselines import AttentionGate, Pipeline, Segmenter
from common.models import Classifier
from common.data import Data
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT
from common.weights import fit, read_weights, sizes, unread

FORMAT = 1  # of last.pt: what it holds, and what its settings mean
FOUND = "command versions machine channels classes one_class images relevance_range".split()
OF_THE_CALL = ("out", "overwrite", "resume", "keep_going", "device")  # settings that --resume may change
PLACES = ("data", "init", "masks", "prior")  # settings that may be edited, if what they name has moved
WORDS = (
    "phantom parts data prior attention sample masks statistics none".split()
)  # of these, what is no place


class Unfit(ValueError):
    """A run's files that fit neither its settings nor each other."""


def write_whole(path: Path, content: str | dict) -> None:
    """Write text, or a dict as JSON if the name says so, else as torch does: whole or not at all.

    Raises OSError, the old file untouched, if there is no room.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            elif path.suffix == ".json":
                file.write((json.dumps(content, indent=1) + "\n").encode())
            else:
                torch.save(content, whole := io.BytesIO())  # on a full disk torch would not raise OSError
                file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # which a write does not name
        raise


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise ValueError rather than touch a folder that holds something, unless asked to."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    empty = not out.exists() or all(path.suffix == ".part" for path in out.iterdir())  # which a kill left
    config = out / "config.json"
    is_run = config.exists() and '"command": "python train.py' in config.read_text()
    if not empty and not is_run:
        raise ValueError(f"--out {out} holds something else than a run; name another folder")
    if resume and not (out / "last.pt").exists():
        stopped = "it stopped before its first epoch ended, --overwrite starts again"
        remedy = "start without --resume" if empty else stopped
        raise ValueError(f"--resume: there is no {out}/last.pt; {remedy}")
    if not (empty or resume or overwrite):
        raise ValueError(
            f"--out {out} holds a run: --resume goes on with it, --overwrite starts again; or name another"
        )


def start(args: argparse.Namespace, argv: list[str]) -> None:
    """Make the folder of a new run and write its config.json; what an overwritten run left is removed."""
    args.out.mkdir(parents=True, exist_ok=True)
    for stale in (
        "last.pt",
        "metrics.jsonl",
        "metrics.json",
        "outlines.json",
        "masks.pt",
        "attention.png",
        "heatmaps.png",
        "curves.png",
        "compare.png",
        "compare_curves.png",
        "low_data.png",
        "report.html",
    ):
        (args.out / stale).unlink(missing_ok=True)
    shutil.rmtree(args.out / "looks", ignore_errors=True)
    config = plain(args) | {"command": shlex.join(["python", "train.py", *argv])}
    config["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    config["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}"
    write_whole(args.out / "config.json", config)


def plain(args: argparse.Namespace) -> dict:
    """Settings as JSON has them: paths are text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def named(train: Data) -> str:
    """How many training images there are, and a short mark of their names."""
    mark = hashlib.sha256("\n".join(train.names).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{len(train.names)} images (their names: {mark})"


def resumed(args: argparse.Namespace, typed: set[str]) -> argparse.Namespace:
    """The settings of the run in --out; ValueError if what was typed asks for others."""
    saved, _ = load_run(args.out)
    for name in typed - set(OF_THE_CALL):
        there, asked = getattr(saved, name, None), getattr(args, name)
        if str(asked) != str(there):  # a path is kept as text
            flag = name.replace("_", "-")
            raise ValueError(
                f"--resume: {args.out} was started with --{flag} {there}, not {asked}; drop the flag"
            )
    return argparse.Namespace(**{**vars(saved), **{name: getattr(args, name) for name in OF_THE_CALL}})


def save(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: Optimizer,
    generator: Generator,
    history: list[dict],
    begun: tuple | None = None,
) -> None:
    """Write last.pt and metrics.jsonl after an epoch; or within one, with what `train.train` has begun."""
    checkpoint = {
        "format": FORMAT,
        "settings": plain(args),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "history": history,
        "begun": begun,
    }
    write_whole(args.out / "last.pt", checkpoint)
    write_rows(args.out, history)


def write_rows(out: Path, history: list[dict]) -> None:
    """Write metrics.jsonl, a line an epoch."""
    write_whole(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def restore(
    out: Path, model: nn.Module, optimizer: Optimizer, generator: Generator
) -> tuple[list[dict], tuple | None]:
    """Put everything back as `save` found it; returns the history, a row an epoch, and what is begun.

    Raises Unfit.
    """
    _, checkpoint = load_run(out)
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        generator.set_state(checkpoint["generator"])
        torch.set_rng_state(checkpoint["torch_rng"])
        history, begun = checkpoint["history"], checkpoint["begun"]
        if begun is not None:
            order, first, sums = begun
            order[:first], sums.items()  # a Tensor and a dict
        return [dict(row) for row in history], begun
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise Unfit(f"{out}/last.pt does not fit its settings ({unread(error)}): train again") from None


def load_run(folder: Path) -> tuple[argparse.Namespace, dict]:
    """A run's settings and its checkpoint; ValueError if the folder is no run or a file is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text())
        checkpoint = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        config["command"], config["task"], checkpoint["model"], checkpoint["history"]  # what every run has
        version, settings = checkpoint.get("format"), checkpoint.get("settings", {})
        differ = [
            name for name in settings if name not in config or not _same(name, config[name], settings[name])
        ]
    except OSError as error:
        missing = error.filename or folder / "last.pt"  # torch names no file that it finds cut off
        raise ValueError(f"{folder} is not a run of train.py: {missing} cannot be read") from None
    except Exception as error:  # a damaged or foreign file fails in the unpickler in many ways
        raise ValueError(f"{folder}: config.json or last.pt is damaged ({unread(error)})") from None
    if version != FORMAT:
        raise ValueError(
            f"{folder} was written by another version of train.py (format {version}, here {FORMAT}): "
            "use that one, or train again"
        )
    if differ:
        there, was = config.get(differ[0]), settings[differ[0]]
        raise ValueError(
            f"{folder}/config.json says {differ[0]} {there}, but it was trained with {was}: undo "
            "that, or train anew with --config"
        )
    return argparse.Namespace(**config), checkpoint


def _same(name: str, there: object, was: object) -> bool:
    """Whether a setting is still what it was, as far as it matters."""
    moved = name in PLACES and type(there) is type(was) is str and not {there, was} & set(WORDS)
    return name in OF_THE_CALL or there == was or moved


def settings_of(init: Path) -> dict:
    """The settings of a run's folder, or those of the encoder in a file of weights. Raises ValueError."""
    if not init.exists():
        raise ValueError(f"--init {init}: no such file or folder")
    return sizes(read_weights(init)[0]) if init.is_file() else vars(load_run(init)[0])


def start_from(init: Path, encoder: nn.Module) -> None:
    """Load the encoder of a run's folder, or of a file of weights. Raises ValueError if it doesn't fit."""
    if not init.is_file():
        return load_encoder(init, *load_run(init), encoder)
    weights, left = read_weights(init)
    try:
        fit(weights, encoder)
    except ValueError as error:
        raise ValueError(f"{init}: {error}") from None
    found, (side, _) = sizes(weights), encoder.native_grid
    about = f"{found['embed_dim']} wide, {found['depth']} deep, patches of {found['patch_size']} px"
    resized = f" of {found['img_size']} px resized" if found["img_size"] != side * encoder.patch_size else ""
    without = f"; left out: {', '.join(left)}" if left else ""
    print(f"{init}: a ViT {about}, {encoder.num_heads} heads, positions{resized or ' as they are'}{without}")


def build_encoder(config: argparse.Namespace, in_chans: int) -> ViT | ResNet:
    """The encoder that a run's settings describe. Raises ValueError for sizes that don't fit."""
    D, pool = config.embed_dim, None  # None: the ViT's CLS token, the ResNet's mean
    if config.baseline == "gated":
        pool = AttentionGate(D)
    elif config.pool == "simpool":
        pool = SimPool(D, config.simpool_gamma, config.pool_heads)
    elif config.pool == "gap" and config.backbone == "vit":
        pool = GAP()
    if config.backbone == "resnet":
        resnet = ResNet(in_chans, D, pool=pool)
        return resnet.to(memory_format=torch.channels_last) if config.channels_last else resnet
    dimensions = config.img_size, config.patch_size, in_chans, D, config.depth, config.num_heads
    return ViT(*dimensions, drop_path=config.drop_path, pool=pool, registers=config.registers)


def build_classifier(
    config: argparse.Namespace, encoder: ViT | ResNet, classes: int, in_chans: int
) -> nn.Module:
    """A classifier on an encoder, with what a baseline adds to it."""
    model = Classifier(encoder, classes)
    if config.baseline == "multitask":
        model.segmenter = nn.Linear(encoder.embed_dim, 1)
    if config.baseline == "pipeline":
        return Pipeline(model, Segmenter(build_encoder(config, in_chans)))
    return model


def load_model(run: Path, config: argparse.Namespace, checkpoint: dict) -> nn.Module:
    """The encoder (of the student) or the classifier of a run. Raises ValueError if it doesn't fit."""
    try:
        model = encoder = build_encoder(config, config.channels)
        if config.task == "classify":
            model = build_classifier(config, encoder, len(config.classes), config.channels)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # not settings of train.py's
        raise ValueError(f"{run}: config.json is damaged ({' '.join(str(error).split())[:120]})") from None
    if config.task != "classify":
        load_encoder(run, config, checkpoint, encoder)
        return encoder
    try:
        model.load_state_dict({k: v for k, v in checkpoint["model"].items() if not k.startswith("relvit.")})
    except RuntimeError:
        raise ValueError(f"{run}: last.pt holds a model of other sizes than config.json says") from None
    return model


def check_data(run: Path, config: argparse.Namespace, train: Data) -> None:
    """Raise ValueError if a run learned other channels or classes than its data have by now.

    And if it goes on with other images.
    """
    learned = config.channels, *config.classes
    there = train.images.shape[1], *(train.findings if config.task == "classify" else ())
    if learned != there:
        learned, there = (f"{c} channel(s){', '.join(['', *classes])}" for c, *classes in (learned, there))
        raise ValueError(
            f"{run} learned {learned}; but {config.data} has {there}: restore it, or train again"
        )
    if config.resume and config.images != named(train):
        raise ValueError(
            f"--resume: {run} was trained on {config.images}, now there are {named(train)}: restore "
            f"{config.data}"
        )


def load_encoder(run: Path, config: argparse.Namespace, checkpoint: dict, encoder: nn.Module) -> None:
    """Load a run's encoder, of a student or a classifier. Raises ValueError if it has other sizes."""
    prefix = "student." if config.task == "pretrain" and config.ssl == "dino" else "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["model"].items() if k.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"{run}: last.pt holds an encoder of other sizes, channels or pooling than asked for"
        ) from None
