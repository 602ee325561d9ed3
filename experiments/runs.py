"""Make the results: train the runs of commands.py, measure them, fill the tables.

    python -m experiments.runs           2 seeds of what the claims need, then all tables (11 to 14 h)
    python -m experiments.runs --all     all runs and seeds, and the costs
    python -m experiments.runs --quick   4 runs; prints their tables (12 minutes)

Two runs train at a time, on one core each. Finished runs are skipped, stopped ones resumed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from common.symbols import MARKED
from experiments.claims import claims
from experiments.commands import NEEDED, RUNS

ROOT = Path(__file__).parents[1]
# The experiments that claims need.
CLAIMED = {words.split()[0] for claim in claims() for words in (claim.figure, claim.minus) if words}
MAIN = [name for name in RUNS if name.rpartition("-")[0] in CLAIMED and name.endswith(("-0", "-1"))]
QUICK = ["phantom_span-0", "plain_resnet_corner-0", "blind_resnet_corner-0", "blind_close_resnet_corner-0"]
# Part of a name: what is measured after the run, and a figure that shows whether it was measured.
AFTER = {
    "_grounds-": ("evaluate.py RUN --only backgrounds", "mixed_rand"),
    "object_": ("evaluate.py RUN --only objects", "CorLoc"),
    "_chest_hospitals-": ("-m experiments.real RUN", "auc_hospitals_flipped"),
    "_chest_marker-": ("-m experiments.real RUN", "auc_removed"),
    "dino_long-": (
        "evaluate.py runs/long_span-SEED RUN --all --only linear heads finetune", "finetune_mAUC_1_percent"
    ),
}  # fmt: skip
PICTURES = {  # results/NAME.png: what evaluate.py measures, and the runs that stand side by side
    "compare": "attention long_span-0 dino_long-0",
    "isnet": "bias alone_resnet_corner-0 plain_resnet_corner-0 pixels_only-0",
}


def command(name: str, folder: Path) -> list[str] | None:
    """The words after `python` that start or resume a run in its folder; None if it is finished."""
    if (folder / "metrics.json").exists():
        return None
    how = "--resume" if (folder / "last.pt").exists() else "--overwrite"
    return ["train.py", "--out", f"runs/{name}", how, *RUNS[name].split()]


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


def train(names: list[str]) -> list[str]:
    """Draw the data that these runs need, and train them; those that start from another run come last.

    Runs on real images are left out where these are missing. Returns the names of the others.
    """
    (ROOT / "runs").mkdir(exist_ok=True)
    folders = r"data/(chest\w*|horses|lesions)"
    real = {name: found[0] for name in names if (found := re.search(folders, RUNS[name]))}
    if missing := {folder for folder in real.values() if not (ROOT / folder).is_dir()}:
        print(f"note: no runs on {', '.join(sorted(missing))}: docs/data.md says how to lay them out")
        names = [name for name in names if real.get(name) not in missing]
    flags = " ".join(RUNS[name] for name in names)
    names_of_folders = r"(data/(symbols|scenes|grounds|digits|leaves|hearts)(\d+)(?:m(\d+))?-(\d+))"
    for folder, kind, n, masks, seed in sorted(set(re.findall(names_of_folders, flags))):
        if not (ROOT / folder / "labels.csv").exists():
            shutil.rmtree(ROOT / folder, ignore_errors=True)  # drawn in part
            words = [folder, "--set", kind, "--train", n, "--seed", seed]
            words += ["--marker"] * (kind in MARKED) + (["--masks", masks] if masks else [])
            python("-m", "common.symbols", *words)
    commands = {name: command(name, ROOT / "runs" / name) for name in names}
    for later in (False, True):
        two_at_a_time({n: words for n, words in commands.items() if words and bool(NEEDED[n]) == later})
    return names


def measure(names: list[str]) -> None:
    """Measure what finished runs still lack of AFTER."""
    commands = {}
    for name in names:
        metrics = ROOT / f"runs/{name}/metrics.json"
        for part, (what, figure) in AFTER.items():
            if part in name and metrics.exists() and figure not in metrics.read_text():
                words = what.replace("RUN", f"runs/{name}").replace("SEED", name.rpartition("-")[2])
                commands[f"{name}.after"] = words.split()
    two_at_a_time(commands)


def draw() -> None:
    """Make the pictures in results/ of finished runs."""
    if (low_data := ROOT / "runs/long_span-0/low_data.png").exists():
        shutil.copy(low_data, ROOT / "results")
    for picture, words in PICTURES.items():
        what, *names = words.split()
        folders = [f"runs/{name}" for name in names]
        if all((ROOT / folder / "metrics.json").exists() for folder in folders):
            python("evaluate.py", *folders, "--only", what)
            shutil.copy(ROOT / folders[0] / "compare.png", ROOT / f"results/{picture}.png")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="4 runs; prints their tables")
    which.add_argument("--all", action="store_true", help="all runs, and what they cost")
    which.add_argument("--only", metavar="PATTERN", help="matching runs, and what they need")
    parser.add_argument("--list", action="store_true", help="print the runs and their flags, and stop")
    args = parser.parse_args(argv)
    names = QUICK if args.quick else list(RUNS) if args.all or args.only else MAIN
    names = [name for name in names if re.search(args.only or "", name)]
    if not names:
        parser.error(f"--only {args.only}: no run has such a name, see --all --list")
    names = asked = sorted({*names}.union(*(NEEDED[name] for name in names)))
    if args.list:
        print("\n".join(f"{name} {RUNS[name]}" for name in names))
        return
    try:
        names = train(names)
        measure(names)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if args.only:
        sys.exit(not all((ROOT / f"runs/{name}/metrics.json").exists() for name in asked))
    tables = ["-m", "experiments.tables", "runs"]
    if args.quick:
        sys.exit(python(*tables, "--only", "claims", "localisation", "blind"))
    if args.all:
        python("-m", "experiments.benchmark", "--json", "results/benchmark.json")
        python("-m", "experiments.wrong_mask")
    python(*tables)
    draw()


if __name__ == "__main__":
    main()
