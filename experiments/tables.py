"""The tables of README.md, results/README.md and docs/isnet.md, from measured figures: no number is typed.

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
from typing import NamedTuple

from common.checkpoint import Run, load_run, write_file
from common.config import PER_CALL, as_json, parse
from experiments.claims import BACKBONES, KINDS, Claim, claims
from experiments.runs import REMEDIES, RESNET_CHANGES, ROOT, RUNS, SPAN_CHANGES, VIT_CHANGES

FILES = ["README.md", "results/README.md", "docs/isnet.md", "docs/collapse.md"]
FLOOR = 0.02 * log(256)  # of the KL: lower is a collapse, see dino.CollapseMonitor
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 % quantile; 2 to 10 seeds
AUC = ["auc_same", "auc_removed", "auc_flipped", "auc_unseen"]
SHORTCUT = {
    "unmarked": "no marker in training", "plain": "plain", "multitask": "multi-task",
    "gated": "attention-gated", "gain": "GAIN", "rrr": "right for the right reasons",
    "pipeline": "segmenter, then classifier", "swap": "backgrounds swapped", "isnet": "**ISNet, true masks**",
    "isnet_prior": "**ISNet, one mask, registered**",
    "isnet_attention": "**ISNet, one mask, SPAN's attention**",
    "pipeline_attention": "segmenter, then classifier, the same mask",
    "swap_attention": "backgrounds swapped, the same mask",
}  # fmt: skip
POOLINGS = [  # title, experiment, and what it is compared with
    ("with labels: ViT, CLS, best head", "unmarked_vit", ""),
    ("with labels: ViT, mean", "vit_gap_labels", "unmarked_vit"),
    ("with labels: **ViT, SimPool**", "vit_simpool_labels", "unmarked_vit"),
    ("with labels: ResNet, mean", "unmarked_resnet", ""),
    ("with labels: **ResNet, SimPool**", "resnet_simpool_labels", "unmarked_resnet"),
    ("DINO: ViT, CLS, best head", "vit_cls_dino", ""),
    ("DINO: ViT, mean", "vit_gap_dino", "vit_cls_dino"),
    ("DINO: **ViT, SimPool**", "vit_simpool_dino", "vit_cls_dino"),
    ("DINO: **ViT, SimPool, guided by SPAN**", "vit_simpool_span", "vit_cls_dino"),
    ("DINO: ResNet, mean", "resnet_gap_dino", ""),
    ("DINO: **ResNet, SimPool**", "resnet_simpool_dino", "resnet_gap_dino"),
]
OBJECTS = {  # title: experiment, and the map that is measured
    "ViT, CLS: mean of its heads": ("vit_cls", "mean_of_heads"),
    "ViT, CLS: best head, chosen by masks": ("vit_cls", "best_head"),
    "ViT, mean: class activation map": ("vit_gap", "class_activation"),
    "**ViT, SimPool**": ("vit_simpool", "mean_of_heads"),
    "ResNet, mean: class activation map": ("resnet_gap", "class_activation"),
    "**ResNet, SimPool**": ("resnet_simpool", "mean_of_heads"),
    "untrained ViT, SimPool": ("vit_simpool", "untrained"),
    "untrained ResNet, SimPool": ("resnet_simpool", "untrained"),
    "a Gaussian in the middle of the image": ("vit_simpool", "middle"),
}
FEW_LABELS = {
    "scratch": "labels alone", "joint": "labels and relations together",
    "tuned_relvit": "RelViT, then labels", "tuned_dino": "DINO, then labels",
    "half": "labels alone, half the steps", "tuned_relvit_long": "RelViT 5 times as long, then labels",
}  # fmt: skip
LOCALISATION = {  # title: experiment, and what is measured
    "prior": ("span", "prior"),
    "registered prior": ("span", "aligned_prior"),
    "**attention, one reference image**": ("span", "attention"),
    "attention, one reference image, defaults of today": ("phantom_span", "attention"),
    "attention, all masks": ("masks", "attention"),
    "DINO, best head chosen on validation images": ("dino", "attention"),
}
FEW_MASKS = {  # of digits and leaves
    "plain": "plain",
    "swap_one": "1 mask: backgrounds swapped, masks registered",
    "blind_one": "**1 mask: ISNet, swapping (default), masks registered**",
    "blind_attention": "**1 mask: default, masks of SPAN's attention**",
    "blind_ten": "10 masks: default, the others registered",
    "blind_all": "all masks: default",
}
BLIND = {  # ways against backgrounds
    "blind": "**ISNet, swapping: default**", "blind_one": "**the same, one mask, registered**",
    "published": "ISNet as published",
}  # fmt: skip
READOUTS = {"linear": "linear layer", "heads": "each head's patches", "finetune": "fine-tuned"}
# {table: what the names of its rows contain}; the first that fits
COSTS = {
    "dino_costs": "DINO's step", "default_costs": "three steps", "isnet_costs": "ISNet / plain",
    "baseline_costs": "/ plain",
    "exposure": "attention", "views": "views",
}  # fmt: skip


class Row(NamedTuple):
    """Figures of one experiment, beside those of a reference."""

    title: str
    experiment: str
    figures: list[str]
    reference: str = ""


def layout() -> dict[str, tuple[str, list[Row]]]:
    """Header and rows of all tables of runs."""
    regions = ["AP_left_lung", "AP_right_lung", "AP_heart", "mAP"]
    where = [Row(title, run, [f"{of}_{x}" for x in regions]) for title, (run, of) in LOCALISATION.items()]
    of_features = ["knn_mAUC", "linear_mAUC"]
    titles = {"dino_long": "published loss", "always_long": "both additions in every step"}
    titles |= {"long_dino": "**both near collapse, default**"}
    lengths = [Row(title, run, of_features) for run, title in titles.items()]
    ablation = [Row("settings of claim 1", "span", ["attention_mAP"])]
    ablation += [Row(f"`{flag}`", run, ["attention_mAP"], "span") for run, flag in SPAN_CHANGES.items()]
    parts = [f"attention_{x}" for x in ("AP_plate", "AP_holes", "AP_defect", "mAP")]
    plates = [Row("DINO", "parts_dino", parts), Row("**SPAN, priors from statistics**", "parts_span", parts)]
    transfer: dict[str, list[Row]] = {"": [], "parts_": []}
    for how, readout in READOUTS.items():
        figures = [f"{how}_mAUC{n}" for n in ("_1_percent", "_5_percent", "_10_percent", "_25_percent", "")]
        for data, rows in transfer.items():
            rows.append(Row(f"DINO: {readout}", f"{data}dino", figures))
            rows.append(Row(f"**SPAN**: {readout}", f"{data}span", figures, f"{data}dino"))
    shortcut, kinds, few = [], [], []
    for backbone, name in BACKBONES.items():
        for how, title in SHORTCUT.items():
            figures = [*AUC, "relevance_share_same", "mask_dice"]
            shortcut.append(Row(f"{name}: {title}", f"{how}_{backbone}", figures))
            for kind, words in KINDS.items():
                run = f"{how}_{kind}" if backbone == "resnet" else f"{backbone}_{how}_{kind}"
                kinds.append(Row(f"{words}, {name}: {title}", run, AUC))
    kinds.sort(key=lambda row: row.experiment.rpartition("_")[2])
    changes = {"plain_resnet": "ResNet without ISNet", "isnet_resnet": "ResNet, ISNet"}
    changes |= {run: f"ResNet, ISNet `{flag}`" for run, flag in RESNET_CHANGES.items()}
    changes["isnet_vit"] = "ViT, ISNet"
    changes |= {run: f"ViT, ISNet `{flag}`" for run, flag in VIT_CHANGES.items()}
    failures = [Row(title, run, [*AUC[:3], "relevance_share_same"]) for run, title in changes.items()]
    for n in (50, 500):
        for how, title in FEW_LABELS.items():
            alone = "" if how == "scratch" else f"scratch_symbols{n}"
            few.append(Row(f"{n} labels a class: {title}", f"{how}_symbols{n}", ["accuracy_same"], alone))
    of_few, masks = ["auc_same", "accuracy_same", "relevance_share_same", "mask_dice"], []
    for kind in ("digits", "leaves"):
        masks += [Row(f"{kind}, {title}", f"{kind}_{run}", of_few) for run, title in FEW_MASKS.items()]
    blind, hospitals, grounds = [], [], []
    exchanged = ("original", "mixed_same", "mixed_rand", "no_foreground", "only_background")
    for backbone, name in BACKBONES.items():
        for kind, words in {"corner": "an L in a corner", **KINDS}.items():
            figures = ["auc_same", "auc_flipped", "auc_unseen", "relevance_share_same", "mask_dice"]
            blind += [Row(f"{words}, {name}: {BLIND[w]}", f"{w}_{backbone}_{kind}", figures) for w in BLIND]
        for way, title in (SHORTCUT | BLIND | {"tight": "default, no margin"}).items():
            at = [f"auc_{x}" for x in ("same", "flipped", "hospital_A", "hospital_B", "hospital_C")]
            at += ["relevance_share_hospital_C", "segmentation_Dice_hospital_C"]
            hospitals.append(Row(f"{name}: {title}", f"{way}_{backbone}_hospitals", at))
            of = [*(f"accuracy_{x}" for x in exchanged), "relevance_share_same"]
            grounds.append(Row(f"{name}: {title}", f"{way}_{backbone}_grounds", of))
    pooling = ["attention_AP_heart", "knn_mAUC", "linear_mAUC"]
    scores, objects = ("AP", "MaxBoxAccV2", "CorLoc"), []
    for title, (run, of) in OBJECTS.items():
        accuracy = "no_accuracy" if of in ("untrained", "middle") else "accuracy_same"
        objects.append(Row(title, f"object_{run}", [*(f"{of}_{score}" for score in scores), accuracy]))
    labels = "mean AUC of findings; labels: | 1 % | 5 % | 10 % | 25 % | all"
    header = "AUC | shortcut as in training | removed | flipped | another one"
    at_each = "AUC | as in training | flipped | at A | at B | at C"
    return {
        "localisation": ("pixel AP | left lung | right lung | heart | mAP", where),
        "lengths": ("DINO on 1500 phantoms, 60 epochs | k-NN, mAUC | linear layer, mAUC", lengths),
        "ablation": ("one flag added | attention mAP", ablation),
        "transfer": (labels, transfer[""]),
        "parts": ("attention AP, heads chosen on validation images | plate | holes | defect | mAP", plates),
        "parts_transfer": (labels, transfer["parts_"]),
        "shortcut": (f"{header} | relevance in lungs and heart | Dice of masks", shortcut),
        "kinds": (header, kinds),
        "blind": ("AUC | as in training | flipped | another one | relevance inside | Dice of masks", blind),
        "hospitals": (f"{at_each} | relevance inside, C | segmenter's Dice, C", hospitals),
        "grounds": (f"accuracy | {' | '.join(exchanged).replace('_', ' ')} | relevance inside", grounds),
        "failures": ("AUC | as in training | removed | flipped | relevance in lungs and heart", failures),
        "pooling": (
            "500 test images | attention on the heart, AP | k-NN, AUC | linear, AUC",
            [Row(title, run, pooling, other) for title, run, other in POOLINGS],
        ),
        "objects": (f"objects anywhere | {' | '.join(scores)} | accuracy", objects),
        "few_labels": ("symbols | accuracy", few),
        "few_masks": ("marker flipped | AUC | accuracy | relevance in the mask | Dice of masks", masks),
    }


def why_not(name: str, run: Run, record: dict) -> str:
    """Why a run is not what the run list asks for under its name today; empty if it is."""
    if name not in RUNS:
        return "the run list does not name it"
    way = name.split("_")[0]
    if (f"experiments.remedies {way} " if way in REMEDIES else " train.py ") not in record["command"]:
        return f"it was started by {record['command'][:40]} ..."
    asked, found = as_json(parse(RUNS[name].split())[0]), as_json(run.config)
    of_data = ("epochs", "swap_margin")  # None until the images are counted
    other = [key for key, x in asked.items() if found[key] != x and (x is not None or key not in of_data)]
    other = [key for key in other if key not in PER_CALL]
    return f"the run list has another {', '.join(other)}" if other else ""


def collect(runs: Path) -> dict[str, dict]:
    """{run: command, seed, versions, machine and metrics} of the finished runs in a folder.

    A run from before a default changed would pass for one of today: it is left out, with a note.
    """
    results, found = {}, sorted(runs.glob("*/metrics.json"))
    for path in (path for path in found if (path.parent / "config.json").exists()):  # not of weights alone
        name = path.parent.name
        record, metrics = (json.loads(file.read_text()) for file in (path.parent / "config.json", path))
        try:
            wrong = why_not(name, load_run(path.parent), record)
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
    """Mean ± standard deviation; of one value, the value; of none, nothing."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{deviation}" if values else ""


def interval(values: list[float], sign: str = "") -> str:
    """The 95 % confidence interval of the mean by Student's t; of one value, none."""
    if len(values) < 2:
        return ""
    half = STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5
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
        measured = [points(runs, row.experiment, figure) for figure in row.figures]
        cells = [spread(list(values.values())) for values in measured]
        for i, figure in enumerate(row.figures):
            gap = gaps(measured[i], points(runs, row.reference, figure))
            cells[i] += f" ({spread(gap, '+')})" if gap else ""
        if any(measured):
            lines.append([row.title, *cells, str(len(measured[0]))])
    return markdown(f"{header} | seeds", lines)


def measured(runs: dict, claim: Claim) -> list[str]:
    """A claim's row: the paper's figure, bar, mean, interval, and in how many seeds it reaches the bar."""
    experiment, figure = claim.figure.split()
    values, sign = points(runs, experiment, figure), ""
    results = list(values.values())
    if claim.minus:
        start = points(runs, *[*claim.minus.split(), figure][:2])
        results, sign = gaps(values, start), "+"
    if claim.end:
        end, sign = points(runs, claim.end, figure), ""
        seeds = sorted(values.keys() & start.keys() & end.keys())
        results = [100 * (values[s] - start[s]) / (end[s] - start[s]) for s in seeds]
    bar, holds = "", "not tested"
    if claim.bar is not None:
        bar, holds = f"{claim.bar:g}", f"{sum(x >= claim.bar for x in results)} of {len(results)}"
    row = [str(claim.number), claim.text, claim.paper, bar, spread(results, sign), interval(results, sign)]
    return [*row, holds if results else "not measured"]


def of_claims(runs: dict) -> dict[str, str]:
    """All claims; of those measured, the first of each number, and which others do not hold in every seed."""
    header = "no. | claim, in points | paper | at least | here | 95 % interval | holds in seeds"
    rows, first, others = [measured(runs, claim) for claim in claims()], {}, {}
    for row in (row for row in rows if row[-1] != "not measured"):
        number, text, _, _, here, _, holds = row
        held, _, seeds = holds.partition(" of ")
        if first.setdefault(number, row) is not row and held != seeds:
            value = f"{here.split(' ')[0]} ({holds})" if seeds else holds
            others[number] = [*others.get(number, []), f"{text}: {value}"]
    summary = [[*row, "; ".join(others.get(number, []))] for number, row in first.items()]
    also = f"{header} | other comparisons that do not hold in every seed"
    return {"claims": markdown(header, rows, 2), "summary": markdown(also, summary, 2)}


def of_steadiness(runs: dict) -> dict[str, str]:
    """DINO alone, by kind and number of images: how many seeds collapsed, and the lowest KL, in nats."""
    rows = []
    titles = {"published": "published loss", "koleo": "KoLeo in every step"}
    titles |= {"always": "both in every step", "steady": "**both near collapse, default**"}
    titles |= {"sinkhorn": "Sinkhorn-Knopp", "warmed": "warmed up", "followed": "entropy held at half"}
    for loss, title in titles.items():
        for kind in ("phantom", "parts", "symbols", "digits"):
            cells = []
            for n in (200, 850, 3000):
                kl = [x / 100 for x in points(runs, f"{loss}_{kind}_{n}", "kl").values()]
                collapsed = sum(x < FLOOR for x in kl)
                cells.append(f"{collapsed} of {len(kl)} ({min(kl):.2f})" if kl else "not measured")
            if set(cells) != {"not measured"}:
                rows.append([f"{title}: {kind}", *cells])
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
    rows = []
    for what, measured in found.items():
        for amount, each in measured:
            cells = [f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in zip(*each)]
            if (what, amount) != ("scale", 100):  # the same as shifted by 0
                rows.append([titles[what].format(n=len(each), amount=amount), *cells])
    return {"wrong_mask": markdown("the one mask | mAP | Dice of the union", rows)}


def tables(runs: dict, costs: dict[str, list[float]]) -> dict[str, str]:
    """All tables, by name."""
    wrong = json.loads((ROOT / "results/wrong_mask.json").read_text())
    seed_0 = {name: run for name, run in runs.items() if run["seed"] == 0}
    made = {name: compared(runs, *table) for name, table in layout().items()}
    made["failures"] = compared(seed_0, *layout()["failures"])
    return of_claims(runs) | made | of_steadiness(runs) | of_costs(costs) | of_wrong_masks(wrong)


def fill(text: str, made: dict[str, str]) -> str:
    """A text with its tables made anew."""
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def main() -> None:
    """Collect the runs if there is a folder, and fill or print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, help="folder of runs to collect into results/runs.json")
    parser.add_argument("--only", nargs="+", metavar="TABLE", default=[], help="print these; change nothing")
    args = parser.parse_args()
    costs = json.loads((ROOT / "results/benchmark.json").read_text())
    known = json.loads((ROOT / "results/runs.json").read_text())
    runs = collect(args.runs or ROOT / "runs") if args.runs or args.only else None
    made = tables(runs if args.only else known | (runs or {}), costs)
    if not set(args.only) <= set(made):
        parser.error(f"--only: choose from {', '.join(made)}")
    if args.only:
        print("\n\n".join(made[name] for name in args.only))
        return
    if runs:
        write_file(ROOT / "results/runs.json", known | runs)  # others stay as they are
    for file in FILES:
        write_file(ROOT / file, fill((ROOT / file).read_text(), made))


if __name__ == "__main__":
    main()
