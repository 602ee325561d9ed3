"""What can be asked of `train.py`: its flags by group, their defaults by task, and what can't be.

A flag's help says what it does; what DINO's or timm's scripts have, too, answers to its name there as well. A
setting that makes no sense is refused by one line that names it, its limits, or the remedy. Next to read:
`loop.py`.
"""

import argparse
import json
import shlex
from pathlib import Path

import torch
from torch import Generator

from common.baselines import BASELINES, PENALTIES
from common.checkpoint import FOUND, OF_THE_CALL, settings_of
from crops import random_crops
from common.phantom import FINDINGS, MARKERS
from relvit import TASKS as RELATIONS

TASKS = ["pretrain", "classify"]
DEFAULTS = {  # by --task, by --backbone, and by both
    "pretrain": {"out": Path("runs/span"), "batch_size": 64, "train_images": 1500, "lr": 2e-3}
    | {"backbone": "vit", "embed_dim": 96, "depth": 4, "num_heads": 6, "lrp_gamma": 0.0, "clip_grad": 3.0},
    "classify": {"out": Path("runs/classifier"), "batch_size": 16, "train_images": 3000}
    | {"backbone": "resnet", "embed_dim": 64, "depth": 3, "num_heads": 4},
    "vit": {"pool": "cls", "simpool_gamma": 1.25},
    "resnet": {"pool": "gap", "simpool_gamma": 2.0},
    "classify vit": {"lr": 5e-4, "lrp_gamma": 0.0, "clip_grad": 3.0, "isnet_end": 1.0},
    # With larger gradients ISNet may stand still; and at a constant weight the label is learned less well.
    "classify resnet": {"lr": 2e-3, "lrp_gamma": 3.0, "clip_grad": 0.1, "isnet_end": 0.1},
}
OF_THE_ENCODER = (
    "backbone img_size patch_size embed_dim depth num_heads registers pool pool_heads simpool_gamma".split()
)


def repeated(argv: list[str]) -> list[str]:
    """argv with a run's own flags in place of --config FILE; a value typed beside it wins, switches stay.

    What was edited in the file counts, too. Raises ValueError if the file is no run's.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, others = parser.parse_known_args(argv)
    if known.config is None:
        return argv
    file = known.config / "config.json" if known.config.is_dir() else known.config
    if not file.is_file():
        raise ValueError(f"--config: there is no {file}; name a run, or its config.json")
    try:
        config = json.loads(file.read_text())
        python, script, *words = shlex.split(str(config["command"]))
    except (ValueError, TypeError, LookupError):
        script = None
    if script != "train.py":
        raise ValueError(f"--config {known.config} is not the config.json of a run")
    words = [word for word in words if word not in ("--overwrite", "--resume")]
    typed, beside = parse(others)
    init = ["--init", str(typed.init)] if "init" in beside else []  # the run's own may be gone
    settings = vars(parse(words + init)[0])
    unknown = config.keys() - settings.keys() - set(FOUND)
    if unknown:
        wrong = ", ".join(sorted(unknown))
        raise ValueError(f"--config {known.config}: train.py has no setting {wrong}; remove it from the file")
    for name, now in settings.items():
        asked = config.get(name, now)
        fixed = beside | set(OF_THE_CALL) | set(OF_THE_ENCODER if init else ())
        if str(asked) == str(now) or name in fixed:
            continue
        if name in ("task", "backbone") or asked is None or bool in (type(asked), type(now)):
            undo = "undo that, and type its flag beside --config"  # what it brings with it stands there, too
            raise ValueError(f"--config {known.config}: {name} became {asked}; {undo}")
        words += [f"--{name.replace('_', '-')}", *map(str, asked if isinstance(asked, list) else [asked])]
    return words + others


def parse(argv: list[str], doc: str = "\n\n") -> tuple[argparse.Namespace, set[str]]:
    """The settings, and the names of those that were typed; doc: what train.py says of itself."""
    argv = [dashed(word) for word in argv]
    intro, examples = doc.split("\n\n")[:2]
    usage = "python train.py [--task TASK] [--out DIR] [--data DIR] [flags below]"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=intro,
        epilog=f"examples:\n{examples}",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_run_flags(parser)
    add_pretrain_flags(parser)
    add_classify_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(**DEFAULTS[parser.parse_args(argv).task])
    chosen = parser.parse_args(argv)
    before = settings_of(chosen.init) if chosen.init else {}
    if before:
        parser.set_defaults(**{name: before[name] for name in OF_THE_ENCODER})
        asked = parser.parse_args(argv)
        if asked.num_heads is None:
            raise ValueError(f"{chosen.init} doesn't say how many heads it has: add --num-heads")
        if asked.backbone != before["backbone"]:
            masks = f"; for its masks alone, --masks {chosen.init}" if chosen.init.is_dir() else ""
            raise ValueError(f"{chosen.init} is no {asked.backbone}: leave out --backbone{masks}")
    chosen = parser.parse_args(argv)
    guided = chosen.task == "pretrain" and chosen.prior != "none"
    by_kind = DEFAULTS[chosen.backbone] | DEFAULTS.get(f"{chosen.task} {chosen.backbone}", {})
    by_kind |= {"pool_heads": chosen.num_heads if guided else 1}
    parser.set_defaults(**{k: v for k, v in by_kind.items() if not (before and k in OF_THE_ENCODER)})
    if chosen.task == "classify" and chosen.data == "phantom":
        parser.set_defaults(findings=FINDINGS[:1])
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    untyped = argparse.Namespace(**dict.fromkeys(vars(args)))  # what is there already gets no default
    return args, {name for name, value in vars(parser.parse_args(argv, untyped)).items() if value is not None}


def dashed(word: str) -> str:
    """A flag with dashes: --patch_size, as DINO's scripts write it, is --patch-size."""
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every run, and of its data."""
    add = parser.add_argument_group("run").add_argument
    add("--task", type=str, choices=TASKS, default="pretrain", help="which other flags apply")
    add("--out", "--output-dir", type=Path, help=f"folder for all that the run writes{by_task('out')}")
    what = "a run, or its config.json, to repeat in another --out; flags beside it change it"
    add("--config", type=Path, default=argparse.SUPPRESS, help=what)
    add("--overwrite", action="store_true", help="start again in a folder that holds a run")
    add("--resume", action="store_true", help="go on with the run in --out where it stopped")
    add("--keep-going", action="store_true", help="train on after a collapse")
    add("--seed", type=int, default=0, help="of drawn data, weights and views")
    what = "auto (cuda if there is one, else cpu), cpu, cuda, mps: where to train"
    add("--device", type=str, default="auto", help=what)
    add = parser.add_argument_group("data").add_argument
    what = "phantom (drawn chest X-rays), parts (drawn plates), or a folder"
    add("--data", "--data-path", type=str, default="phantom", help=what)
    add("--train-images", type=int, help=f"how many to draw for training{by_task('train_images')}")
    add("--img-size", type=int, default=64, help="pixels a side that images are resized to")
    add("--findings", type=str, nargs="+", help="to classify, or all (default: phantom one, else all)")
    add("--marker", type=float, help="share of phantoms whose marker agrees with the first finding")
    what = "an L in a corner or anywhere, a tint, or a frame"
    add("--marker-kind", type=str, choices=MARKERS, default="corner", help=what)
    add("--sample", type=str, help="name of the labelled image (default: the first that has all masks)")


def add_pretrain_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of pretraining: SPAN, DINO and RelViT."""
    add = parser.add_argument_group("where to look (SPAN)").add_argument
    priors = "sample: one image's masks; masks: every image's; statistics; none; or a .npy file (R, S, S)"
    add("--prior", type=str, default="sample", help=priors)
    add("--align", type=str, choices=["bend", "affine", "none"], default="bend", help="registers the sample")
    add("--no-follow", dest="follow", action="store_false", help="let priors stay while crops move")
    add("--prior-blur", type=float, default=0.025, help="sigma, as a share of the image's width")
    add("--span-weight", type=float, default=3.0, help="of the SPAN loss, beside --ssl's")
    add("--span-loss", type=str, choices=["kl", "mse", "dice"], default="kl", help="prior to attention")
    add("--span-layer", type=int, default=-1, help="the block whose heads are guided, -1 the last")
    add = parser.add_argument_group("self-supervision (DINO, RelViT)").add_argument
    add("--ssl", type=str, choices=["dino", "relvit"], default="dino", help="what pretraining learns from")
    what = "RelViT's tasks (default: all); with --task classify they are learned beside it"
    add("--relations", type=str, nargs="+", choices=RELATIONS, help=what)
    add("--mega-patches", type=int, default=0, help="cells a side that RelViT cuts images into; 0: patches")
    add("--out-dim", type=int, default=256, help="prototypes; hundreds for thousands of images")
    add("--teacher-temp", type=float, default=0.02, help="the teacher's temperature; lower is sharper")
    what = "of the teacher at first; rises to 1"
    add("--momentum", "--momentum-teacher", type=float, default=0.996, help=what)
    add("--center-momentum", type=float, default=0.9, help="of the teacher's centre")
    what = "area of the 2 global crops"
    add("--global-scale", "--global-crops-scale", type=float, nargs=2, default=[0.4, 1.0], help=what)
    add("--local-crops-number", type=int, default=0, help="local crops, of half the size")
    what = "area of the local crops"
    add("--local-scale", "--local-crops-scale", type=float, nargs=2, default=[0.1, 0.4], help=what)
    what = "share of mirrored views; 0 where left and right differ"
    add("--flip", "--hflip", type=float, default=0.0, help=what)


def add_classify_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of classification: ISNet, and what it is compared with."""
    add = parser.add_argument_group("classification (ISNet)").add_argument
    add("--isnet", type=float, default=0.0, help="weight of the ISNet loss; 0 for a plain classifier")
    what = "share of --isnet that is left at the end, 0 to 1; the weight falls as half a cosine"
    add("--isnet-end", type=float, help=what + by_task("isnet_end"))
    what = "what to train in place of ISNet, to compare it with: see baselines.py"
    add("--baseline", type=str, choices=BASELINES, help=what)
    add("--baseline-weight", type=float, default=1.0, help="of the baseline's penalty")
    what = "the foreground: data, prior, attention (of --init), a run, or a folder of masks named like images"
    add("--masks", type=str, default="data", help=what)
    what = "the label's logit, a random one, or the least likely class's log-odds"
    add("--explain", type=str, choices=["label", "random", "selective"], default="selective", help=what)
    where = "what is supervised in inner layers, besides the image: relevance; all: a ViT's attention, too"
    add("--isnet-layers", type=str, choices=["none", "relevance", "all"], default="all", help=where)
    add("--isnet-decay", type=float, default=0.97, help="weight of the next largest background pixel")
    add("--isnet-e", type=float, default=0.1, help="E in u = h / (h + E); small ones punish traces, too")
    add("--lrp-epsilon", type=float, default=1e-2, help="the stabiliser of the rule")
    what = "0: epsilon rule; larger: toward the z+ rule"
    add("--lrp-gamma", type=float, help=what + by_task("lrp_gamma"))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of encoders and their optimisation."""
    add = parser.add_argument_group("model").add_argument
    add("--backbone", type=str, choices=["vit", "resnet"], help=f"the encoder{by_task('backbone')}")
    what = "a finished run, or a file of a ViT's published weights, to start from in its sizes"
    add("--init", type=Path, help=what)
    add("--patch-size", type=int, default=8, help="pixels a side of a patch")
    add("--embed-dim", type=int, help=f"width; the ResNet's in its last stage{by_task('embed_dim')}")
    add("--depth", type=int, help=f"blocks of the ViT{by_task('depth')}")
    add("--num-heads", type=int, help=f"attention heads; each prior takes one{by_task('num_heads')}")
    add("--registers", type=int, default=0, help="tokens of a ViT that have no place in the image")
    add("--drop-path", "--drop-path-rate", type=float, default=0.0, help="stochastic depth of the last block")
    what = "how patches become one vector: a CLS token, their mean, or SimPool"
    add("--pool", type=str, choices=["cls", "gap", "simpool"], help=what + by_task("pool"))
    what = "exponent of SimPool's mean, 0.1 to 10"
    add("--simpool-gamma", type=float, help=what + by_task("simpool_gamma"))
    add("--pool-heads", type=int, help="of SimPool (default: --num-heads if priors guide them, else 1)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--batch-size", type=int, help=f"images a step{by_task('batch_size')}")
    what = "parts of a batch, one after the other, where memory is short; norms and DINO's centre see a part"
    add("--accumulate", type=int, default=1, help=what)
    add("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    add("--compile", action="store_true", help="pretrain with torch.compile")
    add("--channels-last", action="store_true", help="another layout of a ResNet's weights")
    add("--lr", type=float, help=f"highest learning rate (AdamW, cosine){by_task('lr')}")
    add("--warmup", type=float, default=0.1, help="share of all steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.04, help="of matrices; vectors have none")
    add("--clip-grad", type=float, help=f"largest norm of the gradient, 0: unlimited{by_task('clip_grad')}")


def by_task(name: str) -> str:
    """The defaults of a setting, for --help."""
    found = {key: values[name] for key, values in DEFAULTS.items() if name in values}
    return " (default: " + ", ".join(f"{key} {value}" for key, value in found.items()) + ")"


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types and defaults beside the flags, and the examples as they were written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", Path: "PATH", str: "NAME"}[action.type]

    def _get_help_string(self, action: argparse.Action) -> str:
        says = not (action.default is None or isinstance(action.default, bool))
        return super()._get_help_string(action) if says else action.help


def check(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the value and the limits, for settings that cannot be."""
    limits = {
        (1, 10**9): "patch_size epochs batch_size embed_dim num_heads pool_heads depth train_images img_size",
        (2, 10**9): "out_dim",
        (0, 10**3): "registers",
        (0, 2**32 - 1): "seed local_crops_number mega_patches",
        (0.1, 10): "simpool_gamma",
        (1e-9, 1e9): "lr teacher_temp",
        (0, 1e9): "clip_grad prior_blur span_weight weight_decay isnet lrp_gamma baseline_weight",
        (1e-12, 1e9): "lrp_epsilon isnet_e",
        (0, 1): "momentum center_momentum flip warmup marker isnet_end",
        (1e-3, 1): "isnet_decay",
        (0, 0.99): "drop_path",
        (-args.depth, args.depth - 1): "span_layer",
    }
    for (least, most), names in limits.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value <= most:  # NaN is not, either
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: it must lie between {least:g} and {most:g}")
    if not 1 <= args.accumulate <= args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate}: it must lie between 1 and --batch-size")
    check_device(args.device)
    check_pairs(args)
    for scale in (args.global_scale, args.local_scale):
        random_crops(1, scale, Generator())  # it knows which scales can be


def check_device(device: str) -> None:
    """Raise ValueError if a device can't be used."""
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device} is none: auto, cpu, cuda or mps")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:150]
        raise ValueError(f"--device {device} can't be used, try --device cpu ({reason})") from None


def check_pairs(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that don't go together."""
    relational = bool(args.relations) if args.task == "classify" else args.ssl == "relvit"
    if args.mega_patches > args.img_size // args.patch_size:
        most = args.img_size // args.patch_size
        raise ValueError(
            f"--mega-patches {args.mega_patches}: more than the {most} patches a side; at most that"
        )
    if args.pool == "simpool" and args.embed_dim % args.pool_heads:
        raise ValueError(
            f"--pool-heads {args.pool_heads} must divide --embed-dim {args.embed_dim}: change either"
        )
    if args.masks == "prior" and args.prior == "none":
        raise ValueError("--masks prior needs one: leave out --prior none")
    if args.masks == "attention" and not (args.resume or args.init and args.init.is_dir()):
        raise ValueError(
            "--masks attention needs --init, a run whose heads were guided; or name one: --masks RUN"
        )
    if args.masks not in ("data", "prior", "attention") and not (args.resume or Path(args.masks).is_dir()):
        raise ValueError(f"--masks {args.masks} is neither data, prior, attention, nor a folder")
    if args.task == "pretrain" and (args.isnet or args.baseline):
        raise ValueError(f"--{'isnet' if args.isnet else 'baseline'} needs --task classify")
    if args.baseline and (args.isnet or args.relations):
        raise ValueError(f"--baseline {args.baseline} stands alone: leave out --isnet and --relations")
    if args.amp and (args.isnet or args.baseline in PENALTIES or args.task == "classify" and args.relations):
        raise ValueError("--amp is for pretraining and plain classifiers; leave it out")
    if args.compile and args.task == "classify":
        raise ValueError("--compile is for pretraining: heatmaps follow each operation; leave it out")
    if args.backbone == "resnet" and args.pool == "cls":
        raise ValueError("--pool cls needs --backbone vit; a ResNet has gap or simpool")
    if args.backbone == "resnet" and relational:
        raise ValueError("RelViT (--ssl relvit, --relations) needs --backbone vit")
    if relational and args.isnet:
        raise ValueError("--relations shuffles patches, and --isnet's masks don't follow: choose one")
    if args.task == "pretrain" and args.prior != "none" and args.pool == "gap":
        raise ValueError(
            f"--prior {args.prior} guides attention, --pool gap has none: add --prior none or --pool simpool"
        )


def check_idle(args: argparse.Namespace, typed: set[str]) -> None:
    """Raise ValueError for typed flags that would do nothing, as those of ISNet without --isnet."""
    upstream = args.task == "pretrain" and args.ssl == "relvit"
    masked = args.baseline not in (None, "gated")
    learned = None if args.task == "pretrain" else "--task pretrain"
    missing = {  # flags, and what they need if it isn't there
        "explain isnet_layers isnet_decay isnet_e isnet_end": (
            None if args.isnet else "--isnet; add --isnet 1"
        ),
        "marker_kind": "--marker; add --marker 1" if args.marker is None else None,
        "masks": None if args.isnet or masked else "--isnet or a --baseline that needs masks",
        "baseline_weight": None if args.baseline in PENALTIES else f"--baseline {', '.join(PENALTIES)}",
        "relations": None if upstream or args.task == "classify" else "--ssl relvit or --task classify",
        "mega_patches": None if upstream else "--ssl relvit",
        "momentum center_momentum out_dim teacher_temp global_scale local_scale local_crops_number flip": (
            "--ssl dino" if upstream else learned
        ),
        "span_weight span_loss": learned,
        "follow": "--ssl dino; RelViT's priors are cut with the patches" if upstream else learned,
        "prior align prior_blur": learned and (None if args.masks == "prior" else "--masks prior"),
        "span_layer": "--pool cls" if args.pool != "cls" else None,
        "registers": "--backbone vit" if args.backbone == "resnet" else None,
        "channels_last": "--backbone resnet" if args.backbone == "vit" else None,
        "simpool_gamma pool_heads": None if args.pool == "simpool" else "--pool simpool",
        "ssl": learned and f"{learned}; to classify, see --relations",
    }
    for names, needed in missing.items():
        idle = typed & set(names.split())
        if idle and needed and not args.resume:
            flag = idle.pop().replace("_", "-").replace("follow", "no-follow")
            raise ValueError(f"--{flag} does nothing without {needed}")
