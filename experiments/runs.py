"""The evidence: all runs, the claims that they test, and a runner.

    python -m experiments.runs           3 seeds of claims 1 to 7 with older defaults, then all tables
    python -m experiments.runs --all     and all other runs: defaults, claim 8, baselines, ablations, costs
    python -m experiments.runs --quick   1 seed of some runs; prints their tables (12 minutes)

Two runs train at a time, on one core each. Finished runs are skipped, stopped ones resumed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
ISNET = {"resnet": "--isnet 3", "vit": "--isnet 1"}  # chosen on seeds 10 and 11, which are in no table
BLIND = "--isnet 0.3"  # with swapped backgrounds; chosen on seed 10
BASELINES = ["multitask --baseline-weight 100", "gain --baseline-weight 10", "rrr --baseline-weight 1"]
BASELINES += ["gated", "pipeline", "swap"]  # weights chosen on seed 10
LABELS = "--task classify --backbone"
PLATES = "--data parts --lr 5e-4 --teacher-temp 0.01 --global-scale 0.7 1 --keep-going"  # suits DINO alone
LOSSES = {"steady": "", "published": "--koleo 0 --max-entropy 1"}  # DINO's
REMEDIES = {  # of experiments/remedies.py
    "always": "", "koleo": "--max-entropy 1", "sinkhorn": LOSSES["published"],
    "warmed": f"{LOSSES['published']} --teacher-temp 0.07", "followed": LOSSES["published"],
}  # fmt: skip
HALF = "--train-images 750"  # of SPAN's images
GUIDED = {  # experiment: flags; SPAN against DINO, and ISNet against a marker
    "span": "",
    "dino": "--prior none",
    "masks": "--prior masks",
    "parts_span": f"{PLATES} --prior statistics",
    "parts_dino": f"{PLATES} --prior none",
    "unmarked_resnet": f"{LABELS} resnet",
    "plain_resnet": f"{LABELS} resnet --marker 1",
    "isnet_resnet": f"{LABELS} resnet --marker 1 {ISNET['resnet']}",
    "unmarked_vit": f"{LABELS} vit",
    "plain_vit": f"{LABELS} vit --marker 1",
    "isnet_vit": f"{LABELS} vit --marker 1 {ISNET['vit']}",
}
POOLINGS = {  # SimPool with labels, beside the unmarked classifiers, and without
    "vit_gap_labels": f"{LABELS} vit --pool gap",
    "vit_simpool_labels": f"{LABELS} vit --pool simpool",
    "resnet_simpool_labels": "--task classify --pool simpool",
    "vit_cls_dino": f"{HALF} --prior none",
    "vit_gap_dino": f"{HALF} --prior none --pool gap",
    "vit_simpool_dino": f"{HALF} --prior none --pool simpool",
    "resnet_gap_dino": f"{HALF} --prior none --backbone resnet",
    "resnet_simpool_dino": f"{HALF} --prior none --backbone resnet --pool simpool",
    "vit_simpool_span": f"{HALF} --pool simpool",
}
SPAN_CHANGES = {  # one thing changed at a time, at seed 0
    "affine_alignment": "--align affine", "no_alignment": "--align none", "no_following": "--no-follow",
    "mse": "--span-loss mse", "dice": "--span-loss dice", "layer_before": "--span-layer -2",
    "local_crops": "--local-crops-number 2", "no_blur": "--prior-blur 0",
}  # fmt: skip
RESNET_CHANGES = {
    "pixels_only": "--isnet-layers none", "epsilon_rule": "--lrp-gamma 0", "one_logit": "--explain label",
    "mean_pooling": "--isnet-decay 1", "large_e": "--isnet-e 1", "constant_weight": "--isnet-end 1",
}  # fmt: skip
VIT_CHANGES = {"vit_unguided": "--isnet-layers relevance", "vit_pixels_only": "--isnet-layers none"}


def few_labels(sets: dict[str, tuple[str, int, str]]) -> dict[str, str]:
    """RelViT and DINO before labels or beside them; all but `half` and `relvit_long` take as many steps.

    sets: {name: images, epochs with labels after pretraining, flags of what RelViT relates}.
    """
    runs, relvit = {}, "--ssl relvit --prior none"
    for name, (images, E, relations) in sets.items():
        drawn = f"--backbone vit --embed-dim 64 --depth 3 --num-heads 4 --batch-size 32 --lr 1e-3 {images}"
        label = f"--task classify {drawn}" + " --findings all" * ("--train-images" in images)
        runs[f"scratch_{name}"] = f"{label} --epochs {2 * E}"
        runs[f"joint_{name}"] = f"{label} --epochs {2 * E} {relations}"
        runs[f"half_{name}"] = f"{label} --epochs {E}"
        before = {"relvit": f"{E} {relvit}", "dino": f"{E} --prior none --keep-going"}
        if "symbols" in name:
            before["relvit_long"] = f"{5 * E} {relvit}"
        else:
            before["relvit"] += f" {relations}"  # as released
            runs[f"ordered_{name}"] = f"{label} --epochs {2 * E} {relations} --in-order"
        for how, epochs in before.items():
            runs[f"pre_{how}_{name}"] = f"{drawn} --epochs {epochs}"
            runs[f"tuned_{how}_{name}"] = f"{label} --epochs {E} --init runs/pre_{how}_{name}-{{seed}}"
    return runs


def against_shortcuts() -> dict[str, str]:
    """Baselines, other shortcuts, and masks from one reference image."""
    runs = {"span_marked": "--marker 1"}
    for backbone, isnet in ISNET.items():
        label = f"{LABELS} {backbone} --marker 1"
        runs |= {f"{how.split()[0]}_{backbone}": f"{label} --baseline {how}" for how in BASELINES}
        runs[f"isnet_prior_{backbone}"] = f"{label} {isnet} --masks prior"
        attention = f"{label} --masks runs/span_marked-{{seed}}"
        runs[f"isnet_attention_{backbone}"] = f"{attention} {isnet}"
        for how in ("swap", "pipeline"):
            runs[f"{how}_attention_{backbone}"] = f"{attention} --baseline {how}"
    for kind in ("anywhere", "tint", "border"):
        label = f"--task classify --marker 1 --marker-kind {kind}"
        runs |= {f"plain_{kind}": label, f"isnet_{kind}": f"{label} {ISNET['resnet']}"}
        runs |= {f"{way}_{kind}": f"{label} --baseline {way}" for way in ("swap", "pipeline")}
        runs |= {f"vit_plain_{kind}": f"{label} --backbone vit"}
        runs |= {f"vit_isnet_{kind}": f"{label} --backbone vit {ISNET['vit']}"}
    return runs


def on_other_data() -> dict[str, str]:
    """DINO on four kinds of images in three sizes; a shortcut, with masks of 1, 10 or all images."""
    runs = {"phantom_span": ""}
    long = {200: "--epochs 117", 850: "--epochs 27", 3000: "--epochs 8"}  # 350 steps each
    for n, epochs in long.items():
        drawn = {kind: f"--data {kind} --train-images {n}" for kind in ("phantom", "parts")}
        folders = {kind: f"--data data/{kind}{n // 10}-{{seed}}" for kind in ("symbols", "digits")}
        for kind, data in (drawn | folders).items():
            for way, flags in (LOSSES | REMEDIES).items():
                runs[f"{way}_{kind}_{n}"] = f"{data} --prior none {epochs} --keep-going {flags}".strip()
    for kind, n in {"digits": 85, "leaves": 400}.items():  # leaves: no default was chosen on them
        data = f"--data data/{kind}{n}-{{seed}}"
        runs |= {f"{kind}_span": data, f"{kind}_plain": f"{data} --task classify"}
        for how, flags in {"blind": BLIND, "swap": "--baseline swap"}.items():
            label = f"{data} --task classify {flags}"
            runs[f"{kind}_{how}_one"] = f"{label} --masks prior"
        runs[f"{kind}_blind_attention"] = f"{data} --task classify {BLIND} --masks runs/{kind}_span-{{seed}}"
        runs[f"{kind}_blind_ten"] = f"{data} --task classify {BLIND}".replace(f"{kind}{n}", f"{kind}{n}m10")
        runs[f"{kind}_blind_all"] = f"{data} --task classify {BLIND}"
    return runs


def against_backgrounds() -> dict[str, str]:
    """ISNet by default and as published on four shortcuts; all methods on hospitals, and on grounds."""
    runs = {}
    for backbone in ISNET:
        ways = {"blind": BLIND} | ({"published": "--preset published"} if backbone == "resnet" else {})
        others = {how.split()[0]: f"--baseline {how}" for how in BASELINES}
        for kind in ("corner", "anywhere", "tint", "border"):
            label = f"{LABELS} {backbone} --marker 1 --marker-kind {kind}"
            runs |= {f"{way}_{backbone}_{kind}": f"{label} {flags}" for way, flags in ways.items()}
            runs[f"blind_one_{backbone}_{kind}"] = f"{label} {BLIND} --masks prior"
        for way, flags in ({"plain": ""} | others | ways).items():
            label = f"{LABELS} {backbone} --marker 1 --marker-kind hospitals"
            runs[f"{way}_{backbone}_hospitals"] = f"{label} {flags}".strip()
            label = f"{LABELS} {backbone} --data data/grounds200-{{seed}}"
            runs[f"{way}_{backbone}_grounds"] = f"{label} {flags}".strip()
    return runs | {"tight_resnet_grounds": f"{runs['blind_resnet_grounds']} --isnet-margin 0"}


def poolings_of_objects() -> dict[str, str]:
    """Poolings on textured objects of 5 to 25 % of the area that lie anywhere, with labels, to a plateau."""
    label = f"--data data/scenes1000-{{seed}} {LABELS}"
    runs = {f"object_vit_{pool}": f"{label} vit --pool {pool}" for pool in ("cls", "gap", "simpool")}
    return runs | {f"object_resnet_{pool}": f"{label} resnet --pool {pool}" for pool in ("gap", "simpool")}


def at_equal_length() -> dict[str, str]:
    """SPAN and DINO for 60 epochs each, on X-rays and on plates."""
    long = "--epochs 60"
    return {
        "long_dino": f"--prior none {long}", "long_span": long, "long_published": f"--align none {long}",
        "long_light": f"--span-weight 0.3 {long}", "after_dino": "--init runs/long_dino-{seed}",
        "dino_long": f"{LOSSES['published']} --prior none {long}", "always_long": f"--prior none {long}",
        "plates_dino": f"{PLATES} --prior none {long}", "plates_span": f"{PLATES} --prior statistics {long}",
        "plates_default": f"--data parts --prior statistics {long}",
    }  # fmt: skip


def seeded(experiments: dict[str, str], seeds: Iterable[int] = (0, 1, 2)) -> dict[str, str]:
    """{experiment: flags} as {experiment-seed: flags}; {seed} in the flags becomes the seed."""
    runs = {(name, seed): flags.format(seed=seed) for seed in seeds for name, flags in experiments.items()}
    return {f"{name}-{seed}": f"--seed {seed} {flags}".strip() for (name, seed), flags in runs.items()}


def as_then(flags: str) -> str:
    """The flags of a run whose results are older than some defaults, which it sets back."""
    before, label = [], "--task classify" in flags
    if not label and "--ssl relvit" not in flags:
        before += [LOSSES["published"]]
    if label and "--backbone vit" in flags:
        before += ["--epochs 15 --shift 0"]
    if "--baseline swap" in flags:
        before += ["--swap-margin 0"]
    if "--isnet " in flags:
        before += ["--swap 0 --isnet-every 1 --isnet-margin 0"]
        before += ["--isnet-end 0.1"] * ("--backbone vit" not in flags)
    return " ".join([*before, flags])


ALL_TASKS, RELEASED = "--relations relations distances angles positions", "--relations relations positions"
SYMBOLS = {
    "symbols50": ("--data data/symbols50-{seed}", 30, ALL_TASKS),
    "symbols500": ("--data data/symbols500-{seed}", 6, ALL_TASKS),
}
PHANTOMS = {  # epochs: about 3000 steps, chosen on seed 10 with 250 images and kept for 1000
    "phantom250": ("--train-images 250", 400, RELEASED),
    "phantom1000": ("--train-images 1000", 100, RELEASED),
}
MAIN = seeded(GUIDED | POOLINGS | few_labels(SYMBOLS))  # claims 1 to 7
CHANGED = dict(SPAN_CHANGES)
for guided, changes in {"isnet_resnet": RESNET_CHANGES, "isnet_vit": VIT_CHANGES}.items():
    CHANGED |= {name: f"{GUIDED[guided]} {flags}" for name, flags in changes.items()}
RUNS = MAIN | seeded(against_shortcuts()) | seeded(CHANGED, [0])
RUNS = {name: as_then(flags) for name, flags in RUNS.items()}
RECENT = on_other_data() | against_backgrounds() | poolings_of_objects() | at_equal_length()
RECENT |= few_labels(PHANTOMS)
RUNS |= seeded(RECENT, range(5))
# The runs that a run starts from, or whose attention becomes its masks.
NEEDED = {name: set(re.findall(r"runs/(\S+)", flags)) for name, flags in RUNS.items()}
QUICK = r"(span|dino|(unmarked|plain|isnet)_resnet|resnet_simpool_labels|(?!.*_long_).*_symbols50)-0"
# Pairs that are also measured with few labels, side by side.
PROBED = {"dino": "span", "parts_dino": "parts_span", "dino_long": "long_span", "plates_dino": "plates_span"}
# Part of a name: what is measured of the finished run, and a figure that tells whether it was.
AFTER = {"_grounds-": ("backgrounds", "mixed_rand"), "object_": ("objects", "CorLoc")}
PICTURES = {  # results/NAME.png: what evaluate.py measures, and the runs that stand side by side
    "compare": "attention span dino",
    "pooling": "attention vit_cls_dino vit_simpool_dino vit_simpool_span",
    "isnet": "bias isnet_resnet plain_resnet pixels_only",
    "one_mask": "bias isnet_attention_resnet pipeline_resnet swap_resnet rrr_resnet gain_resnet"
    " multitask_resnet gated_resnet",
}


def command(name: str, folder: Path) -> list[str] | None:
    """The words after `python` that start or resume a run in its folder; None if it is finished."""
    if (folder / "metrics.json").exists():
        return None
    how = "--resume" if (folder / "last.pt").exists() else "--overwrite"
    way = name.split("_")[0]
    script = ["-m", "experiments.remedies", way] if way in REMEDIES else ["train.py"]
    return [*script, "--out", f"runs/{name}", how, *RUNS[name].split()]


def python(*words: str, log: IO | None = None) -> int:
    """Run `python WORDS` on one core, its output in an open file if there is one; returns the exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.call([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)


def two_at_a_time(commands: dict[str, list[str]]) -> None:
    """Run {name: command}, output in runs/NAME.log. Ctrl-C stops the two that run and starts no others."""

    def run(name: str, words: list[str]) -> None:
        print(name, flush=True)
        with (ROOT / f"runs/{name}.log").open("a" if "--resume" in words else "w") as log:
            if python(*words, log=log):
                print(f"{name} did not finish, see runs/{name}.log", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands, commands.values()))


def train(names: list[str]) -> None:
    """Draw the data that these runs need, and train them: last those that start from another run."""
    (ROOT / "runs").mkdir(exist_ok=True)
    flags = " ".join(RUNS[name] for name in names)
    names_of_folders = r"(data/(symbols|scenes|grounds|digits|leaves)(\d+)(?:m(\d+))?-(\d+))"
    for folder, kind, n, masks, seed in sorted(set(re.findall(names_of_folders, flags))):
        if not (ROOT / folder / "labels.csv").exists():
            shutil.rmtree(ROOT / folder, ignore_errors=True)  # drawn in part
            words = [folder, "--set", kind, "--train", n, "--seed", seed]
            words += ["--marker"] * (kind in ("digits", "leaves")) + (["--masks", masks] if masks else [])
            python("-m", "common.symbols", *words)
    commands = {name: command(name, ROOT / "runs" / name) for name in names}
    for later in (False, True):
        two_at_a_time({n: words for n, words in commands.items() if words and bool(NEEDED[n]) == later})
    measures = {}
    for part, (what, figure) in AFTER.items():
        for name in (name for name in names if part in name):
            metrics = ROOT / f"runs/{name}/metrics.json"
            if metrics.exists() and figure not in metrics.read_text():
                measures[f"{name}.{what}"] = ["evaluate.py", f"runs/{name}", "--only", what]
    two_at_a_time(measures)


def probe(names: list[str], readouts: list[str]) -> None:
    """Measure features with all labels and with few, of pairs that have not been measured so."""
    commands = {}
    for name in names:
        experiment, _, seed = name.rpartition("-")
        metrics = ROOT / "runs" / name / "metrics.json"
        known = not metrics.exists() or f"{readouts[-1]}_mAUC_1_percent" in metrics.read_text()
        if experiment in PROBED and not known:
            pair = [f"runs/{PROBED[experiment]}-{seed}", f"runs/{name}"]
            commands[f"{name}.probe"] = ["evaluate.py", *pair, "--all", "--only", *readouts]
    two_at_a_time(commands)


def draw() -> None:
    """Make the pictures in results/ of finished runs with seed 0."""
    if (low_data := ROOT / "runs/span-0/low_data.png").exists():
        shutil.copy(low_data, ROOT / "results")
    for picture, words in PICTURES.items():
        measure, *experiments = words.split()
        folders = [f"runs/{experiment}-0" for experiment in experiments]
        if all((ROOT / folder / "metrics.json").exists() for folder in folders):
            python("evaluate.py", *folders, "--only", measure)
            shutil.copy(ROOT / folders[0] / "compare.png", ROOT / f"results/{picture}.png")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="one seed of some runs; prints their tables")
    which.add_argument("--all", action="store_true", help="all runs, and what they cost")
    parser.add_argument("--only", metavar="PATTERN", help="train matching runs and what they need")
    parser.add_argument("--list", action="store_true", help="print the runs and their flags, and stop")
    args = parser.parse_args(argv)
    names = [n for n in (RUNS if args.all or args.only else MAIN) if re.fullmatch(QUICK, n) or not args.quick]
    if args.only:
        names = [name for name in names if re.search(args.only, name)]
        names = sorted({*names}.union(*(NEEDED[name] for name in names)))
    if not names:
        parser.error(f"--only {args.only}: no run has such a name, see --all --list")
    if args.list:
        print("\n".join(f"{name} {RUNS[name]}" for name in names))
        return
    try:
        train(names)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if args.only:
        return
    probe(names, ["linear", "heads"] if args.quick else ["linear", "heads", "finetune"])
    tables = ["-m", "experiments.tables", "runs"]
    if args.quick:
        sys.exit(python(*tables, "--only", "claims", "few_labels", "transfer"))
    if args.all:
        python("-m", "experiments.benchmark", "--json", "results/benchmark.json")
        python("-m", "experiments.curves")
        python("-m", "experiments.wrong_mask")
    python(*tables)
    draw()


if __name__ == "__main__":
    main()
