"""A run is a folder that can be resumed, repeated and measured.

    config.json    a record: settings, command line, versions, machine, and facts about the data
    last.pt        settings, the guided heads' masses, weights, optimizer, random states and history, written
                   after each epoch and at Ctrl-C
    metrics.jsonl  one line per epoch
    metrics.json   final metrics, {name: number}
    masks.pt       the foreground of a classifier's training images

Each of these is written under another name and then renamed: if the process is killed, the old file or the
new one is there. Checkpoints are read with `weights_only=True`: one that would run code is refused.
"""

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from common.classify import is_multiclass
from common.config import PER_CALL, PLACES, Config, as_config, as_json
from common.data import Data, printable
from common.flags import option
from common.processes import rank
from common.weights import reason

FORMAT = 11  # of last.pt; rises when its content or the meaning of a setting changes
WRITTEN = "last.pt metrics.jsonl metrics.json masks.pt report.html".split()
WRITTEN += [f"{name}.png" for name in "attention heatmaps curves compare compare_curves low_data".split()]


class DataSpec(NamedTuple):
    """What a run knows about its data beyond its settings."""

    channels: int
    classes: tuple[str, ...]  # or findings; empty in pretraining
    multiclass: bool  # each image has one of the classes
    images: str  # how many training images there were, and a hash of their names and, of classifiers, labels
    relevance_range: tuple[float, ...] | None = None  # C1, C2 of ISNet; if published, also of inner layers
    priors: str = ""  # of masks or a file: a hash, and the reference image


class Run(NamedTuple):
    """A run as it lies in its folder."""

    config: Config
    spec: DataSpec
    masses: dict[str, float]  # {region: m_r}, (2) in common/regions.py, if one prior guided heads; else {}
    checkpoint: dict


def write_file(path: Path, content: str | dict) -> None:
    """Write text, a dict as JSON if the name ends in .json, or else by torch.save: all of it or nothing.

    Raises OSError, and leaves an old file untouched, if the disk is full.
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
            error.filename = str(path)  # a failed write does not name its file
        raise


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """In the first process, raise ValueError rather than touch a folder that holds anything, unless asked."""
    if rank():
        return
    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite starts again: choose one")
    empty = not out.exists() or all(path.suffix == ".part" for path in out.iterdir())  # of a killed process
    record = out / "config.json"
    if not empty and not (record.exists() and b'"command": "python ' in record.read_bytes()):
        raise ValueError(f"--out {out} holds something other than a run; name another folder")
    if resume and not (out / "last.pt").exists():
        raise ValueError(f"--resume: there is no {out}/last.pt: check --out; --overwrite starts again")
    if not (empty or resume or overwrite):
        raise ValueError(f"--out {out} holds a run: --resume continues it, --overwrite starts again")


def start_run(config: Config, spec: DataSpec, argv: list[str]) -> None:
    """Make the folder of a new run and write its config.json; files of an overwritten run are removed."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (config.out / name).unlink(missing_ok=True)
    shutil.rmtree(config.out / "looks", ignore_errors=True)
    record = as_json(config) | spec._asdict() | {"command": shlex.join(["python", "train.py", *argv])}
    record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    record["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {config.device}"
    write_file(config.out / "config.json", record)


def _hash(names: list[str], values: Tensor | None) -> str:
    content = "\n".join(names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(content + (b"" if values is None else values.numpy().tobytes())).hexdigest()[:8]


def data_spec(
    train: Data, classify: bool, data: str, prior: str = "none", reference: str | None = None
) -> DataSpec:
    """What a run takes from its training images.

    prior, reference: those of pretraining. Raises ValueError if images can't be classified.
    """
    labels, priors = train.labels if classify else None, ""
    images = f"{len(train.names)} (hash of names{' and labels' * classify}: {_hash(train.names, labels)})"
    if not classify:
        if prior == "sample" and reference is not None:
            mark = _hash(train.regions, train.masks[train.names.index(reference)])
            priors = f"{printable(reference)} (hash of its masks: {mark})"
        elif prior == "masks":
            mark = _hash(train.regions, train.masks & train.has_masks[:, None, None, None])
            priors = f"all masks (hash: {mark})"
        elif Path(prior).is_file():
            priors = f"a file (hash: {hashlib.sha256(Path(prior).read_bytes()).hexdigest()[:8]})"
        return DataSpec(train.images.shape[1], (), False, images, priors=priors)
    if labels.isnan().all():
        raise ValueError(f"--task classify: no training image of {data} has a label; add labels.csv")
    if not ((labels == 1).any(dim=0) & (labels == 0).any(dim=0)).any():
        raise ValueError(f"--task classify: all training images of {data} have the same labels")
    return DataSpec(train.images.shape[1], tuple(train.findings), is_multiclass(labels), images)


def check_spec(
    folder: Path, run: Run, now: DataSpec, regions: list[str], data: str, goes_on: bool = True
) -> None:
    """Raise ValueError if the data now have other channels, classes or training images than a run had, other
    priors (if both name them), or other regions than those to which one image's masks guided its heads.
    regions: those of the data now. goes_on: False if a run is only measured, on data that have not moved.
    Then other images only cause a note. So do other priors, unless they are the masks of all images.
    """
    for name in ("channels", "classes", "multiclass", "images", "priors"):
        was, there = getattr(run.spec, name), getattr(now, name)
        if was != there and (name != "priors" or was and there):
            was, there = (", ".join(x) if isinstance(x, tuple) else x for x in (was, there))
            has = "but now they are" if name == "priors" else f"but {data} has"
            learned = f"{folder} learned {name} {was}, {has} {there}"
            if not goes_on and (name == "images" or name == "priors" and run.config.prior != "masks"):
                some = "it may have been trained on some of the test images"
                print(f"note: {learned}; {some if name == 'images' else 'the AP of its prior is of these'}")
                continue
            raise ValueError(f"{learned}: give its own data by --data, restore its files, or train again")
    guided = list(run.masses) if run.config.prior == "sample" else []  # other priors are of no region
    if guided and regions and guided != regions:  # else a head counts for another's region
        was, there = (", ".join(map(printable, names)) for names in (guided, regions))
        heads = f"the heads of {folder} were guided to {was}, but {data} has masks of {there}"
        raise ValueError(f"{heads}: give its own data by --data, restore its masks, or train again")


def save(
    config: Config, spec: DataSpec, model: nn.Module, optimizer: Optimizer, generator: Generator,
    history: list[dict], masses_now: Callable[[], dict[str, float]], begun: tuple | None = None,
) -> None:  # fmt: skip
    """Write metrics.jsonl and last.pt, in the first process; begun: (order (N,), steps done, sums) if it is
    within an epoch; masses_now: as in `train`.
    """
    if rank():
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"generator": generator.get_state(), "torch_rng": torch.get_rng_state()}
    about = {"format": FORMAT, "settings": as_json(config), "spec": spec._asdict(), "masses": masses_now()}
    # Rows first: a process killed in between leaves one row too many, which the resumed run rewrites.
    write_file(config.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    write_file(config.out / "last.pt", about | state | {"history": history, "begun": begun})


def load_run(folder: Path) -> Run:
    """A run's settings, data spec and checkpoint. Raises ValueError if it is no run or a file is damaged."""
    path = folder / "last.pt"
    try:
        with ZipFile(path) as archive:
            if changed := archive.testzip():  # by checksums, which torch writes but does not check
                raise ValueError(f"{changed} has changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format"]
        if version == FORMAT:
            settings = {name: checkpoint["settings"][name] for name in Config.__dataclass_fields__}
            config = as_config(settings | {"out": str(folder)})
            return Run(config, DataSpec(**checkpoint["spec"]), checkpoint["masses"], checkpoint)
    except OSError as error:
        why = error.strerror or reason(error)
        raise ValueError(f"{folder} is not a run of train.py: {path} can't be read ({why})") from None
    except Exception as error:  # a damaged or foreign file fails in the unpickler in many ways
        raise ValueError(f"{path} is damaged ({reason(error)}): restore it, or train again") from None
    version = f"another version of train.py (format {version}, here {FORMAT})"
    raise ValueError(f"{folder} was written by {version}: train again")


def resumed(config: Config, typed: set[str]) -> Run:
    """The run in --out, to be continued with the settings in last.pt. Raises ValueError if flags differ."""
    run = load_run(config.out)
    saved, asked = as_json(run.config), as_json(config)
    moved = {k for k, words in PLACES.items() if not {saved[k], asked[k]} & {*words, None}}
    for name in sorted(typed - {*PER_CALL, *moved}):
        if asked[name] != saved[name]:
            flag = option(Config.__dataclass_fields__[name])
            then, now = (("off", "on")[v] if isinstance(v, bool) else v for v in (saved[name], asked[name]))
            begun = f"--resume: {config.out} was started with {name} {then}, not {now}"
            raise ValueError(f"{begun}: leave out {flag}, or train in another --out")
    changed = {name: asked[name] for name in asked if name in PER_CALL or name in moved and name in typed}
    return run._replace(config=as_config(saved | changed))


def restore(
    checkpoint: dict, model: nn.Module, optimizer: Optimizer, generator: Generator
) -> tuple[list[dict], tuple | None]:
    """Restore what `save` wrote; returns the history, and `begun` as `save` got it."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    generator.set_state(checkpoint["generator"])
    torch.set_rng_state(checkpoint["torch_rng"])
    return list(checkpoint["history"]), checkpoint["begun"]
