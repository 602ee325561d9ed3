"""The README's tables, from measured figures: no number in them is typed.

    python tables.py runs     collect the finished runs in a folder into results/runs.json, and fill
    python tables.py          fill the README from results/ as it is

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Runs are named EXPERIMENT-SEED.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from checkpoint import write_whole

ROOT = Path(__file__).parent
REGIONS = ["left_lung", "right_lung", "heart"]
ABLATIONS = {
    "span": "default: KL, last block, global crops, bent alignment, blur 2.5 %",
    "affine_alignment": "affine alignment only",
    "no_alignment": "no alignment",
    "no_following": "priors don't follow the crops",
    "mse": "MSE in place of KL",
    "dice": "Dice in place of KL",
    "layer_before": "second-last block guided",
    "local_crops": "2 local crops besides",
    "no_blur": "prior not blurred",
}

FAILURES = {
    "isnet_resnet": "ResNet, as it should be",
    "plain_resnet": "no ISNet at all",
    "pixels_only": "relevance of the image alone, no inner layers",
    "epsilon_rule": "epsilon rule in place of gamma = 3",
    "one_logit": "the label's logit explained, not log-odds",
    "mean_pooling": "mean over the background, not ranked",
    "large_e": "E = 1, as published, in place of 0.1",
    "isnet_vit": "ViT, as it should be",
    "vit_unguided": "relevance alone, attention unguided",
    "vit_pixels_only": "relevance of the image alone",
}
POOLINGS = {  # what was learned: {experiment: (how it was pooled, what to compare it with)}
    "enlarged heart, with labels": {
        "unmarked_vit": ("ViT, CLS", None),
        "vit_gap_labels": ("ViT, mean", "unmarked_vit"),
        "vit_simpool_labels": ("**ViT, SimPool**", "unmarked_vit"),
        "unmarked_resnet": ("ResNet, mean", None),
        "resnet_simpool_labels": ("**ResNet, SimPool**", "unmarked_resnet"),
    },
    "without labels, DINO": {
        "vit_cls_dino": ("ViT, CLS", None),
        "vit_gap_dino": ("ViT, mean", "vit_cls_dino"),
        "vit_simpool_dino": ("**ViT, SimPool**", "vit_cls_dino"),
        "vit_simpool_span": ("**ViT, SimPool, guided by SPAN**", "vit_cls_dino"),
        "resnet_gap_dino": ("ResNet, mean", None),
        "resnet_simpool_dino": ("**ResNet, SimPool**", "resnet_gap_dino"),
    },
}
FEW_LABELS = {
    "scratch": "labels alone",
    "joint": "labels and relations together",
    "tuned_relvit": "RelViT, then labels",
    "tuned_dino": "DINO, then labels",
    "tuned_span": "DINO guided by SPAN, then labels",
    "tuned_relvit_span": "RelViT guided by SPAN, then labels",
    "half": "labels alone, half the steps",
    "tuned_relvit_long": "RelViT 5 times as long, then labels",
}


def collect(runs: Path) -> dict[str, dict]:
    """{run name: command, versions, machine and figures} of all finished runs in a folder."""
    found = {}
    for path in sorted(runs.glob("*/metrics.json")):
        config = json.loads((path.parent / "config.json").read_text())
        about = {key: config[key] for key in ("command", "seed", "versions", "machine")}
        figures = {name: round(value, 5) for name, value in json.loads(path.read_text()).items()}
        found[path.parent.name] = about | figures
    return found


def points(runs: dict, experiment: str, name: str) -> dict[int, float]:
    """{seed: percentage points} of one figure over the runs of an experiment."""
    found = [run for key, run in runs.items() if key.rsplit("-", 1)[0] == experiment]
    return {run["seed"]: 100 * run[name] for run in found}


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation over seeds; of one seed, its value."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def gaps(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """a - b for each seed that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def localisation(runs: dict) -> str:
    """AP by region: prior, aligned prior, SPAN's attention, its upper bound, DINO's best heads."""
    columns = {
        "prior": ("span", "prior"),
        "aligned prior": ("span", "aligned_prior"),
        "**attention, one labelled sample**": ("span", "attention"),
        "attention, all masks": ("masks", "attention"),
        "DINO, best heads": ("dino", "attention"),
    }
    rows = []
    for region in [f"AP_{region}" for region in REGIONS] + ["mAP"]:
        cells = [
            spread(list(points(runs, run, f"{what}_{region}").values())) for run, what in columns.values()
        ]
        rows.append([region.removeprefix("AP_").replace("_", " "), *cells])
    return markdown(["pixel AP, %", *columns], rows)


def claims(runs: dict) -> str:
    """What is claimed of SPAN's localisation, what was measured, and in how many seeds it holds."""
    attention, rows = points(runs, "span", "attention_mAP"), []
    for claim, bar, experiment, what in (
        ("above DINO's best heads (paper: 58.7)", 58.7, "dino", "attention"),
        ("above DINO's best heads after 60 epochs", 58.7, "dino_long", "attention"),
        ("above the prior as it is", 15, "span", "prior"),
        ("above the aligned prior, on the same grid", 0, "span", "aligned_prior"),
        ("above the aligned prior at every pixel", 0, "span", "aligned_prior_every_pixel"),
        ("within 1 point of all masks", -1, "masks", "attention"),
    ):
        gap = gaps(attention, points(runs, experiment, f"{what}_mAP"))
        holds = sum(value > bar for value in gap)
        rows += [[claim, f"{bar:g}", spread(gap, "+"), f"{holds} of {len(gap)}"]] if gap else []
    return markdown(["SPAN's attention mAP is ...", "bar", "measured", "seeds in which it holds"], rows)


def ablation(runs: dict) -> str:
    """Attention mAP with one thing changed at a time, and the difference to the default on the same seeds."""
    default, rows = points(runs, "span", "attention_mAP"), []
    for experiment, title in ABLATIONS.items():
        values = points(runs, experiment, "attention_mAP")
        if values:
            gap = "" if experiment == "span" else spread(gaps(values, default), "+")
            rows.append([title, spread(list(values.values())), gap, str(len(values))])
    return markdown(["changed", "attention mAP, %", "to the default, same seeds", "seeds"], rows)


def shortcut(runs: dict) -> str:
    """AUC with the marker as in training, removed and flipped, for both backbones."""
    rows = []
    for title, experiment in (
        ("ResNet, no marker in training", "unmarked_resnet"),
        ("ResNet, plain", "plain_resnet"),
        ("**ResNet, ISNet**", "isnet_resnet"),
        ("ViT, no marker in training", "unmarked_vit"),
        ("ViT, plain", "plain_vit"),
        ("**ViT, ISNet**", "isnet_vit"),
        ("ResNet, 4 findings, plain", "plain_findings"),
        ("**ResNet, 4 findings, ISNet**", "isnet_findings"),
    ):
        sets = ["same"] if experiment.startswith("unmarked") else ["same", "removed", "flipped"]
        found = [list(points(runs, experiment, f"auc_{name}_enlarged_heart").values()) for name in sets]
        share = list(points(runs, experiment, "relevance_share_same").values())
        if share:
            cells = [*map(spread, found), "", ""][:3]
            rows.append([title, *cells, spread(share), str(len(share))])
    header = ["enlarged heart: AUC, %", "marker as in training", "removed", "flipped"]
    return markdown([*header, "relevance in lungs and heart, %", "seeds"], rows)


def isnet_claims(runs: dict) -> str:
    """What is asked of ISNet, what was measured, and in how many seeds it holds."""
    rows = []
    for name, experiment, reference in (
        ("ResNet", "isnet_resnet", "unmarked_resnet"),
        ("ViT", "isnet_vit", "unmarked_vit"),
        ("ResNet, 4 findings", "isnet_findings", "unmarked_findings"),
    ):
        same, flipped = (points(runs, experiment, f"auc_{x}_enlarged_heart") for x in ("same", "flipped"))
        without = points(runs, reference, "auc_same_enlarged_heart")
        for claim, bar, values, sign in (
            ("flipped - same", -5, gaps(flipped, same), "+"),
            ("flipped", 85, list(flipped.values()), ""),
            ("flipped - trained without marker", -5, gaps(flipped, without), "+"),
        ):
            holds = f"{sum(value >= bar for value in values)} of {len(values)}"
            rows += [[f"{name}: {claim}", f"{bar}", spread(values, sign), holds]] if values else []
    return markdown(["AUC, points", "at least", "measured", "seeds in which it holds"], rows)


def failures(runs: dict) -> str:
    """AUC of the same and the flipped marker with one part of ISNet left out at a time."""
    rows = []
    for experiment, title in FAILURES.items():
        names = [f"auc_{name}" for name in ("same", "removed", "flipped")] + ["relevance_share_same"]
        found = [list(points(runs, experiment, name).values())[:1] for name in names]
        rows += [[title, *map(spread, found)]] if found[0] else []
    header = ["seed 0: AUC, %", "marker as in training", "removed", "flipped"]
    return markdown([*header, "relevance in lungs and heart, %"], rows)


def pooling(runs: dict) -> str:
    """What the pooling's attention outlines, and what its features know, by architecture and objective."""
    rows = []
    for learned, experiments in POOLINGS.items():
        for experiment, (title, reference) in experiments.items():
            ap = points(runs, experiment, "attention_AP_heart")
            if not ap:
                continue
            gap = gaps(ap, points(runs, reference, "attention_AP_heart")) if reference else []
            found = [list(points(runs, experiment, name).values()) for name in ("knn_mAUC", "linear_mAUC")]
            cells = [spread(list(ap.values())), spread(gap, "+") if gap else "", *map(spread, found)]
            rows.append([f"{learned}: {title}", *cells, str(len(ap))])
    header = ["500 test images", "attention on the heart, AP %", "to CLS or mean, same seeds"]
    return markdown([*header, "k-NN, AUC %", "linear, AUC %", "seeds"], rows)


def few_labels(runs: dict) -> str:
    """What comes of a few labels, from nothing and after pretraining on the same images."""
    sets = {
        "phantom": ("phantoms, 500 labels: AUC of 4 findings, %", "auc_same"),
        "symbols50": ("symbols, 50 a class: accuracy, %", "accuracy_same"),
        "symbols500": ("symbols, 500 a class: accuracy, %", "accuracy_same"),
    }
    rows = []
    for how, title in FEW_LABELS.items():
        cells = []
        for name, (_, figure) in sets.items():
            values = points(runs, f"{how}_{name}", figure)
            gap = gaps(values, points(runs, f"scratch_{name}", figure))
            beside = f" ({spread(gap, '+')})" if gap and how != "scratch" else ""
            cells.append(spread(list(values.values())) + beside if values else "")
        rows += [[title, *cells]] if any(cells) else []
    return markdown(["trained with", *(title for title, _ in sets.values())], rows)


def benchmark(rows: dict[str, list[float]]) -> str:
    """Medians and quartiles of benchmark.py."""
    return markdown(
        ["measured", "median", "quartiles"],
        [[name, f"{median:g}", f"{low:g} to {high:g}"] for name, (low, median, high) in rows.items()],
    )


def fill(readme: str, results: Path) -> str:
    """The README with every table made anew from results/*.json."""
    runs = json.loads((results / "runs.json").read_text())
    made = {"localisation": localisation(runs), "claims": claims(runs), "ablation": ablation(runs)}
    made |= {"shortcut": shortcut(runs), "isnet_claims": isnet_claims(runs), "failures": failures(runs)}
    made |= {"pooling": pooling(runs), "few_labels": few_labels(runs)}
    made["benchmark"] = benchmark(json.loads((results / "benchmark.json").read_text()))
    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", readme)


def main() -> None:
    """Collect if asked to, and fill."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="?", type=Path, help="the folder of runs to collect into results/runs.json"
    )
    args = parser.parse_args()
    if args.runs:
        (ROOT / "results").mkdir(exist_ok=True)
        write_whole(ROOT / "results" / "runs.json", collect(args.runs))
    readme = ROOT / "README.md"
    write_whole(readme, fill(readme.read_text(), ROOT / "results"))


if __name__ == "__main__":
    main()
