"""The tables of README.md, results/README.md and docs/collapse.md, from measured figures: no number is typed.

    python -m experiments.tables runs                  collect the finished runs in a folder; fill all tables
    python -m experiments.tables                       fill the tables from results/ as it is
    python -m experiments.tables runs --only claims    print one table of the runs in a folder; change nothing

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Figures are percentages: mean ± standard
deviation over seeds; in brackets the difference to a reference with the same seeds.
"""

import argparse
import json
import re
from math import log
from pathlib import Path
from statistics import mean, stdev

from common.checkpoint import Run, load_run, write_file
from common.config import PER_CALL, as_json, parse
from experiments.claims import Claim, claims
from experiments.commands import RUNS
from experiments.layout import Row, layout
from experiments.runs import ROOT

FILES = ["README.md", "results/README.md", "docs/collapse.md"]
FLOOR = 0.02 * log(256)  # of the KL: lower is a collapse, see dino.CollapseMonitor
# 97.5 % quantiles of Student's t for 3 to 12 seeds
STUDENT = [4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010]
# {table: what the names of its rows contain}; the first that fits
COSTS = {
    "dino_costs": "DINO's step", "default_costs": "three steps", "isnet_costs": "ISNet / plain",
    "baseline_costs": "/ plain", "exposure": "exposed",
}  # fmt: skip


def why_not(name: str, run: Run) -> str:
    """Why a run is not the one that today's run list has under its name; empty if it is."""
    if name not in RUNS:
        return "the run list does not name it"
    asked, found = as_json(parse(RUNS[name].split())[0]), as_json(run.config)
    of_data = {key for key in ("epochs", "swap_margin") if asked[key] is None}  # until images are counted
    other = [key for key in asked if found[key] != asked[key] and key not in {*PER_CALL, *of_data}]
    return f"the run list has another {', '.join(other)}" if other else ""


def collect(runs: Path) -> dict[str, dict]:
    """{run: command, seed, versions, machine and metrics} of the finished runs in a folder.

    A run whose settings are not those of today's run list, perhaps old defaults, is left out with a note.
    """
    results, found = {}, sorted(runs.glob("*/metrics.json"))
    for path in (path for path in found if (path.parent / "config.json").exists()):  # not of weights alone
        name = path.parent.name
        record, metrics = (json.loads(file.read_text()) for file in (path.parent / "config.json", path))
        try:
            wrong = why_not(name, load_run(path.parent))
        except ValueError as error:  # written by another version, or a run that it starts from is missing
            wrong = str(error)
        if wrong:
            print(f"{path.parent} is left out: {wrong}; delete it to train it again")
            continue
        facts = {key: record[key] for key in ("command", "seed", "versions", "machine")}
        results[name] = facts | {metric: round(x, 5) for metric, x in metrics.items()}
    if not results:
        raise SystemExit(f"experiments.tables: {runs} holds no finished run to collect; the tables stay")
    return results


def points(runs: dict, experiment: str, figure: str) -> dict[int, float]:
    """{seed: percentage} of a figure, over the runs EXPERIMENT-SEED that have it."""
    named = [run for name, run in runs.items() if name.rpartition("-")[0] == experiment]
    return {run["seed"]: 100 * run[figure] for run in named if figure in run}


def gaps(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """a - b for each seed that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; a single value alone; "" without values."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{deviation}" if values else ""


def interval(values: list[float], sign: str = "") -> str:
    """The 95 % confidence interval of the mean by Student's t; "" for fewer than three values."""
    if len(values) < 3:
        return ""
    half = STUDENT[len(values) - 3] * stdev(values) / len(values) ** 0.5
    return f"{mean(values) - half:{sign}.1f} to {mean(values) + half:{sign}.1f}"


def markdown(header: str, rows: list[list[str]], words: int = 1) -> str:
    """A table whose first columns are words and whose others are numbers; header: `first | second | ...`."""
    columns = header.split(" | ")
    lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(runs: dict, header: str, rows: list[Row]) -> str:
    """The rows that were measured: figures, in brackets their differences to the reference, and seeds."""
    lines = []
    for row in rows:
        found = [points(runs, *[row.experiment, *figure.split()][-2:]) for figure in row.figures]
        cells = [spread(list(values.values())) for values in found]
        for i, figure in enumerate(row.figures):
            gap = gaps(found[i], points(runs, row.reference, figure))
            fewer = f", {len(gap)} seed{'s' * (len(gap) > 1)}" if len(gap) < len(found[i]) else ""
            cells[i] += f" ({spread(gap, '+')}{fewer})" if gap else ""
        if any(found):
            seeds = [len(values) for values in found if values]
            few, most = min(seeds), max(seeds)
            lines.append([row.title, *cells, f"{few}" if few == most else f"{few} to {most}"])
    return markdown(f"{header} | seeds", lines)


def measured(runs: dict, claim: Claim) -> list[str]:
    """A claim's row: the paper's figure, bar, mean, interval, and in how many seeds it reaches the bar."""
    experiment, figure = claim.figure.split()
    values = points(runs, experiment, figure)
    results, sign = list(values.values()), "+" if claim.minus else ""
    if claim.minus:
        results = gaps(values, points(runs, *[*claim.minus.split(), figure][:2]))
    reach = sum(round(x, 6) >= claim.bar for x in results)
    held = f"{reach} of {len(results)}" if results else "not measured"
    row = [str(claim.number), claim.text, claim.paper, f"{claim.bar:g}"]
    return [*row, spread(results, sign), interval(results, sign), held]


def of_claims(runs: dict) -> dict[str, str]:
    """All claims; also the first of each number, and how many others hold in each of three or more seeds."""
    header = "no. | claim, in points | paper | at least | here | 95 % interval | holds in seeds"
    rows, first, others = [measured(runs, claim) for claim in claims()], {}, []
    for row in (row for row in rows if row[-1] != "not measured"):
        if first.setdefault(row[0], row) is not row and row[-2]:  # an interval needs three seeds
            held, _, seeds = row[-1].partition(" of ")
            others.append(held == seeds)
    beside = "other comparisons with three seeds or more that hold in every seed"
    last = ["1-8", beside, *[""] * 4, f"{sum(others)} of {len(others)}"]
    return {"claims": markdown(header, rows, 2), "summary": markdown(header, [*first.values(), last], 2)}


def of_steadiness(runs: dict) -> dict[str, str]:
    """DINO alone, by kind and number of images: how many seeds collapsed, and the lowest KL, in nats."""
    rows, kinds = [], {"phantom": "phantoms", "parts": "plates", "symbols": "symbols", "digits": "digits"}
    for loss, title in {"published": "published loss", "steady": "**default loss**"}.items():
        for kind, images in kinds.items():
            cells = []
            for n in (200, 850, 3000):
                kl = [x / 100 for x in points(runs, f"{loss}_{kind}_{n}", "kl").values()]
                collapsed = sum(x < FLOOR for x in kl)
                cells.append(f"{collapsed} of {len(kl)} ({min(kl):.2f})" if kl else "not measured")
            if set(cells) != {"not measured"}:
                rows.append([f"{title}: {images}", *cells])
    return {"steady": markdown("seeds collapsed (lowest KL) | 200 images | 850 | 3000", rows)}


def of_costs(costs: dict[str, list[float]]) -> dict[str, str]:
    """Medians and quartiles of benchmark.py's ratios."""
    rows: dict[str, list] = {table: [] for table in COSTS}
    for name, (low, median, high) in costs.items():
        table = next(table for table, word in COSTS.items() if word in name)
        rows[table].append([name, f"{median:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else "")])
    return {table: markdown("measured | ratio", lines) for table, lines in rows.items()}


def of_wrong_masks(found: dict[str, list]) -> dict[str, str]:
    """AP and Dice of registered priors by how wrong the reference's masks are: mean, lowest to highest."""
    titles = {"reference image": "true masks of {n} reference images", "swapped": "masks of other regions"}
    titles |= {"shift": "shifted by {amount} % of a side", "scale": "{amount} % as wide and high"}
    rows, hearts = [], []
    for what, amounts in found.items():
        for amount, each in amounts:
            cells = [f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in zip(*each)]
            if what == "hearts":
                hearts.append([amount, *cells])
            elif (what, amount) != ("scale", 100):  # the same as shifted by 0
                rows.append([titles[what].format(n=len(each), amount=amount), *cells])
    inside = "background inside, pixels: normal hearts | enlarged hearts | enlarged hearts: cut off, pixels"
    made = {"wrong_mask": markdown("the one mask | mAP | Dice of the union", rows)}
    return made | {"hearts": markdown(f"reference images show | Dice | {inside}", hearts)}


def tables(runs: dict) -> dict[str, str]:
    """All tables, by name, of runs and of the measured costs in results/."""
    files = (ROOT / f"results/{name}.json" for name in ("benchmark", "wrong_mask"))
    costs, wrong = (json.loads(file.read_text()) for file in files)
    seed_0 = {name: run for name, run in runs.items() if run["seed"] == 0}
    made = {name: compared(seed_0 if name == "failures" else runs, *x) for name, x in layout().items()}
    return of_claims(runs) | made | of_steadiness(runs) | of_costs(costs) | of_wrong_masks(wrong)


def fill(text: str, made: dict[str, str]) -> str:
    """A text with its tables made anew."""
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def main() -> None:
    """Collect the runs if there is a folder, and fill or print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, help="folder of runs to collect into results/runs.json")
    parser.add_argument("--only", nargs="+", metavar="TABLE", default=[], help="print these; change no file")
    args = parser.parse_args()
    known = json.loads((ROOT / "results/runs.json").read_text())
    runs = collect(args.runs or ROOT / "runs") if args.runs or args.only else None
    made = tables(runs if args.only else known | (runs or {}))
    if args.only:
        print("\n\n".join(made[name] for name in args.only))
        return
    if runs:
        write_file(ROOT / "results/runs.json", known | runs)  # others stay as they are
    for file in FILES:
        write_file(ROOT / file, fill((ROOT / file).read_text(), made))


if __name__ == "__main__":
    main()
