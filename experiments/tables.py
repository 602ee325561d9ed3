"""The README's tables, from measured figures: no number in them is typed.

    python -m experiments.tables runs     collect the finished runs in a folder into results/runs.json, and fill
    python -m experiments.tables          fill the README from results/ as it is
    python -m experiments.tables runs --only claims     print a table of the finished runs in a folder, and change nothing

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Runs are named EXPERIMENT-SEED.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from common.checkpoint import write_whole
from experiments.runs import ABLATIONS, AGAINST, CLAIMS, COSTS, FAILURES, FEW_LABELS
from experiments.runs import KINDS, PLATES, POOLINGS, SHORTCUT, TRANSFER

ROOT = Path(__file__).parents[1]
FIGURES = {name: f"auc_{name}_enlarged_heart" for name in ("same", "flipped")}  # short for
FIGURES["accuracy"] = "accuracy_same"
# The 97.5 % quantile of Student's t, by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def collect(runs: Path) -> dict[str, dict]:
    """{run name: command, versions, machine and figures} of all finished runs in a folder."""
    found = {}
    for path in sorted(runs.glob("*/metrics.json")):
        if not (path.parent / "config.json").exists():
            continue  # what evaluate.py found of published weights
        config = json.loads((path.parent / "config.json").read_text())
        about = {key: config[key] for key in ("command", "seed", "versions", "machine")}
        figures = {name: round(value, 5) for name, value in json.loads(path.read_text()).items()}
        found[path.parent.name] = about | figures
    if not found:
        raise SystemExit(f"experiments.tables: {runs} holds no finished run; results/ and README.md stay as they are")
    return found


def points(runs: dict, experiment: str, name: str) -> dict[int, float]:
    """{seed: percentage points} of one figure over the runs of an experiment."""
    found = [run for key, run in runs.items() if key.rsplit("-", 1)[0] == experiment]
    return {run["seed"]: 100 * run[name] for run in found if name in run}


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation over seeds; of one seed, its value; of none, nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def interval(values: list[float], sign: str = "") -> str:
    """The 95 % confidence interval of the mean over seeds, by Student's t; of one seed, none."""
    if len(values) < 2:
        return ""
    mean, half = statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean - half:{sign}.1f} to {mean + half:{sign}.1f}"


def gaps(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """a - b for each seed that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A table in Markdown, its first columns words, the others numbers, to the right."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(runs: dict, experiment: str, figures: list[str], reference: str | None = None) -> list[str]:
    """A spread for each figure of an experiment, its difference to a reference in brackets."""
    made = []
    for figure in figures:
        values = points(runs, experiment, figure)
        gap = gaps(values, points(runs, reference, figure)) if reference else []
        made.append(spread(list(values.values())) + (f" ({spread(gap, '+')})" if gap else ""))
    return made


def localisation(runs: dict) -> str:
    """AP by region: prior, aligned prior, SPAN's attention, its upper bound, DINO's best heads."""
    columns = {
        "prior": ("span", "prior"),
        "aligned prior": ("span", "aligned_prior"),
        "**attention, one labelled sample**": ("span", "attention"),
        "attention, all masks": ("masks", "attention"),
        "DINO, best heads": ("dino", "attention"),
    }
    names = {"left lung": "AP_left_lung", "right lung": "AP_right_lung", "heart": "AP_heart", "mAP": "mAP"}
    found = [
        cells(runs, run, [f"{what}_{name}" for name in names.values()]) for run, what in columns.values()
    ]
    return markdown(["pixel AP, %", *columns], [[region, *row] for region, row in zip(names, zip(*found))])


def compared(runs: dict, of: str, to: str) -> tuple[list[float], str]:
    """A line of CLAIMS: its values, one a seed, and their sign if they are differences.

    of: experiment and figure; to: nothing, or what is taken off, an experiment (. is the same) and, if it is
    another one, its figure; or "A from B": then it is the share of the way from B to A.
    """
    (experiment, figure), (reference, *other) = of.split(), to.replace(".", of.split()[0]).split() or [""]
    figure = FIGURES.get(figure, figure)
    values = points(runs, experiment, figure)
    if not reference:
        return list(values.values()), ""
    if other[:1] == ["from"]:
        end, start = (points(runs, name, figure) for name in (reference, other[1]))
        seeds = sorted(values.keys() & end.keys() & start.keys())
        return [100 * (values[s] - start[s]) / (end[s] - start[s]) for s in seeds], ""
    other = FIGURES.get(other[0], other[0]) if other else figure
    return gaps(values, points(runs, reference, other)), "+"


def claims(runs: dict) -> str:
    """Every claim: the paper's figure, the bar here, what was measured, and in how many seeds it holds."""
    rows = []
    for line in CLAIMS.strip().splitlines():
        number, claim, paper, bar, of, to = (cell.strip() for cell in line.split("|"))
        found, sign = compared(runs, of, to)
        holds = f"{sum(value >= float(bar) for value in found)} of {len(found)}" if found else "not measured"
        rows.append([number, claim, paper, bar, spread(found, sign), interval(found, sign), holds])
    header = ["no.", "claim, in points", "paper", "at least", "here", "95 % interval", "holds in seeds"]
    return markdown(header, rows, words=2)


def transfer(runs: dict, experiments: dict[str, tuple[str, str | None]]) -> str:
    """Mean AUC of the findings by three readouts, over the share of labels."""
    shares = ["_1_percent", "_5_percent", "_10_percent", "_25_percent", ""]
    readouts = {"linear": "linear layer", "heads": "each head's patches", "finetune": "fine-tuned"}
    rows = [
        [f"{title}: {name}", *cells(runs, experiment, [f"{how}_mAUC{share}" for share in shares], reference)]
        for how, name in readouts.items()
        for title, (experiment, reference) in experiments.items()
    ]
    return markdown(["mean AUC of findings, %; labels:", "1 %", "5 %", "10 %", "25 %", "all"], rows)


def inspection(runs: dict) -> str:
    """Parts under a fixed camera: attention AP by region."""
    names = [f"attention_{name}" for name in ("AP_plate", "AP_holes", "AP_defect", "mAP")]
    rows = [[title, *cells(runs, experiment, names)] for title, (experiment, _) in PLATES.items()]
    return markdown(["attention AP, best heads, %", "plate", "holes", "defect", "mAP"], rows)


def ablation(runs: dict) -> str:
    """Attention mAP with one thing changed at a time, and the difference to the default on the same seeds."""
    default, rows = points(runs, "span", "attention_mAP"), []
    for experiment, title in ABLATIONS.items():
        values = points(runs, experiment, "attention_mAP")
        if values:
            gap = "" if experiment == "span" else spread(gaps(values, default), "+")
            rows.append([title, spread(list(values.values())), gap, str(len(values))])
    return markdown(["changed", "attention mAP, %", "to the default, same seeds", "seeds"], rows)


def shortcut(runs: dict, costs: dict[str, list[float]]) -> str:
    """AUC with the marker as in training, removed, flipped, and another in its place, for both backbones.

    costs: what benchmark.py measured.
    """
    rows = []
    isnet = {"ResNet": "gamma rule, inner layers", "ViT": "epsilon rule, inner layers and attention"}
    for backbone, name in {"resnet": "ResNet", "vit": "ViT"}.items():
        for how, title in SHORTCUT.items():
            experiment = f"{how}_{backbone}"
            sets = ["same"] if how == "unmarked" else ["same", "removed", "flipped", "unseen"]
            names = [f"auc_{part}_enlarged_heart" for part in sets] + [""] * (4 - len(sets))
            names += ["relevance_share_same", "mask_dice"]
            found = [list(points(runs, experiment, figure).values()) for figure in names]
            kind = how.split("_")[0]
            step = f"ISNet / plain: {name}, {isnet[name]}" if kind == "isnet" else f"{kind} / plain: {name}"
            found.append([1.0] if how in ("unmarked", "plain") else [costs[f"training step, {step}"][1]])
            beside = kind in ("gated", "pipeline")  # all others leave the plain model behind
            found.append([costs[f"use, {kind} / plain: {name}"][1]] if beside else [1.0])
            rows += [[f"{name}: {title}", *map(spread, found), str(len(found[0]))]] if found[0] else []
    header = ["enlarged heart: AUC, %", "marker as in training", "removed", "flipped", "another one"]
    header += ["relevance in lungs and heart, %", "Dice of masks, %", "training step / plain", "use / plain"]
    return markdown([*header, "seeds"], rows)


def kinds(runs: dict) -> str:
    """AUC of classifiers trained with shortcuts of other kinds."""
    rows, names = [], [f"auc_{part}_enlarged_heart" for part in ("same", "removed", "flipped", "unseen")]
    for kind, title in KINDS.items():
        for how, what in AGAINST.items():
            seeds = len(points(runs, f"{how}_{kind}", names[0]))
            rows += [[f"{title}: {what}", *cells(runs, f"{how}_{kind}", names), str(seeds)]] if seeds else []
    header = ["enlarged heart: AUC, %", "shortcut as in training", "removed", "flipped", "another one"]
    return markdown([*header, "seeds"], rows)


def failures(runs: dict) -> str:
    """AUC of the same and the flipped marker with one part of ISNet left out at a time."""
    first = {name: run for name, run in runs.items() if run["seed"] == 0}
    names = [f"auc_{name}" for name in ("same", "removed", "flipped")] + ["relevance_share_same"]
    rows = [[title, *cells(first, experiment, names)] for experiment, title in FAILURES.items()]
    header = ["seed 0: AUC, %", "marker as in training", "removed", "flipped"]
    return markdown([*header, "relevance in lungs and heart, %"], [row for row in rows if row[1]])


def pooling(runs: dict) -> str:
    """What the pooling's attention outlines, and what its features know, by architecture and objective."""
    rows = []
    for learned, experiments in POOLINGS.items():
        for experiment, (title, reference) in experiments.items():
            ap = points(runs, experiment, "attention_AP_heart")
            gap = gaps(ap, points(runs, reference, "attention_AP_heart")) if reference else []
            beside = cells(runs, experiment, ["knn_mAUC", "linear_mAUC"])
            row = [f"{learned}: {title}", spread(list(ap.values())), spread(gap, "+"), *beside, str(len(ap))]
            rows += [row] if ap else []
    header = ["500 test images", "attention on the heart, AP %", "to CLS or mean, same seeds"]
    return markdown([*header, "k-NN, AUC %", "linear, AUC %", "seeds"], rows)


def few_labels(runs: dict) -> str:
    """What comes of a few labels, from nothing and after pretraining on the same images."""
    rows = []
    for how, title in FEW_LABELS.items():
        row = [title]
        for n in ("symbols50", "symbols500"):
            row += cells(runs, f"{how}_{n}", ["accuracy_same"], None if how == "scratch" else f"scratch_{n}")
        rows.append(row)
    return markdown(["symbols: accuracy, %", "50 labels a class", "500 labels a class"], rows)


def costs_of(costs: dict[str, list[float]], first: str, columns: dict[str, str]) -> str:
    """Medians and quartiles of benchmark.py's ratios "WHAT: OF WHAT", a column for each WHAT."""
    rows: dict[str, list[str]] = {}
    for name, (low, median, high) in costs.items():
        what, subject = name.split(": ", 1)
        if what in columns:
            cells = rows.setdefault(subject, [""] * len(columns))
            quartiles = f" ({low:.2f} to {high:.2f})" if low < high else ""
            cells[list(columns).index(what)] = f"{median:.2f}{quartiles}"
    return markdown([first, *columns.values()], [[subject, *cells] for subject, cells in rows.items()])


def benchmark(costs: dict[str, list[float]]) -> str:
    """The ratios of benchmark.py that stand in no other table."""
    elsewhere = {what for _, columns in COSTS.values() for what in columns}
    elsewhere |= {f"{cost}, {how} / plain" for how in SHORTCUT for cost in ("training step", "use")}
    rest = {name: ratio for name, ratio in costs.items() if name.split(": ")[0] not in elsewhere}
    rows = [[name, f"{median:.2f} ({low:.2f} to {high:.2f})"] for name, (low, median, high) in rest.items()]
    return markdown(["measured", "ratio"], rows)


def tables(runs: dict, results: Path) -> dict[str, str]:
    """All tables, by name."""
    costs = json.loads((results / "benchmark.json").read_text())
    return {
        "claims": claims(runs),
        "localisation": localisation(runs),
        "ablation": ablation(runs),
        "transfer": transfer(runs, TRANSFER),
        "parts": inspection(runs),
        "parts_transfer": transfer(runs, PLATES),
        "shortcut": shortcut(runs, costs),
        "kinds": kinds(runs),
        "failures": failures(runs),
        "pooling": pooling(runs),
        "few_labels": few_labels(runs),
        **{name: costs_of(costs, *of) for name, of in COSTS.items()},
        "benchmark": benchmark(costs),
    }


def fill(readme: str, results: Path) -> str:
    """The README with every table made anew from results/*.json."""
    made = tables(json.loads((results / "runs.json").read_text()), results)
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", readme)


def main() -> None:
    """Collect if asked to, and fill, or print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = "the folder of runs to collect into results/runs.json, in place of what it holds"
    parser.add_argument("runs", nargs="?", type=Path, help=what)
    what = "print these tables of the runs, and leave results/ and README.md as they are"
    parser.add_argument("--only", nargs="+", metavar="TABLE", default=[], help=what)
    args = parser.parse_args()
    results, readme = ROOT / "results", ROOT / "README.md"
    if args.only:
        made = tables(collect(args.runs or ROOT / "runs"), results)
        if not set(args.only) <= set(made):
            parser.error(f"--only: choose from {', '.join(made)}")
        print("\n\n".join(made[name] for name in args.only))
        return
    if args.runs:
        write_whole(results / "runs.json", collect(args.runs))
    write_whole(readme, fill(readme.read_text(), results))


if __name__ == "__main__":
    main()
