"""The README says what was measured, and its examples run."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_s_tables_are_those_that_the_results_give():
    assert tables.fill(README, ROOT / "results") == README
    tables_in = re.findall(r"<!-- table (\w+) -->\n\|", README)
    expected = "ablation benchmark claims failures few_labels localisation parts parts_transfer pooling"
    expected += " shortcut transfer"
    assert sorted(tables_in) == expected.split()  # none empty, none lost


def test_a_table_changes_when_a_result_changes(tmp_path):
    for file in (ROOT / "results").glob("*.json"):
        text = re.sub(r'("attention_mAP": 0\.)\d', r"\g<1>1", file.read_text(), count=1)
        (tmp_path / file.name).write_text(text)
    assert tables.fill(README, tmp_path) != README


def test_the_readme_s_lines_for_copying_run():
    span, isnet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    masks = torch.zeros(2, 32, 32)
    masks[0, 4:12, 4:12] = masks[1, 20:28, 8:24] = 1
    sample, images = torch.rand(1, 32, 32), torch.rand(3, 1, 32, 32)
    theta = torch.eye(2, 3).expand(3, 2, 3)
    attention = torch.rand(3, 6, 196).softmax(dim=2).requires_grad_()
    names = dict(
        masks=masks, sample=sample, images=images, theta=theta, attention=attention, loss=torch.tensor(0.0)
    )
    exec(span, names)
    names["loss"].backward()
    assert attention.grad[:, :2].abs().sum() > 0 and attention.grad[:, 2:].abs().sum() == 0
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU(True), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 28 * 28, 2))
    names = dict(model=model, images=images, mask=masks[:1, None].expand(3, -1, -1, -1), loss=0.0)
    exec(isnet, names)
    names["loss"].backward()
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("file", re.findall(r"`(\w+\.(?:py|sh))`", README))
def test_every_file_that_the_readme_names_exists(file):
    assert (ROOT / file).exists()


def test_a_claim_is_measured_seed_by_seed_and_one_without_runs_says_so():
    runs = {
        f"{name}-{seed}": {"seed": seed, "attention_mAP": value, "linear_mAUC": 0.6}
        for name, values in {"span": (0.95, 0.9, 0.97), "dino": (0.3, 0.4, 0.2)}.items()
        for seed, value in enumerate(values)
    }
    first, second, *others = tables.claims(runs).splitlines()[2:]
    assert first.endswith("| +58.7 | 58.7 | +64.0 ± 13.5 | +30.4 to +97.6 | 2 of 3 |")
    assert second.endswith("|  |  | not measured |")
    assert [line for line in others if "linear layer's mAUC" in line][0].endswith("| 0 of 3 |")


def test_every_experiment_that_a_table_names_is_run():
    listed = subprocess.run([ROOT / "reproduce.sh", "--list"], capture_output=True, text=True, check=True)
    run = {line.split()[0].rpartition("-")[0] for line in listed.stdout.splitlines()}
    claimed = [cell for line in tables.CLAIMS.strip().splitlines() for cell in line.split("|")[4:]]
    named = {cell.split()[0] for cell in claimed if cell.strip()} - {"."}
    named |= {cell.split()[2] for cell in claimed if " from " in cell}
    named |= {*tables.ABLATIONS, *tables.FAILURES, *(name for of in tables.POOLINGS.values() for name in of)}
    named |= {f"{how}_{kind}" for how in ("plain", "isnet") for kind in tables.KINDS}
    named |= {f"{how}_{backbone}" for how in tables.SHORTCUT for backbone in ("resnet", "vit")}
    assert named <= run


def test_a_claim_may_be_the_share_of_the_way_from_one_experiment_to_another():
    flipped = {"isnet_prior_resnet": 0.8, "isnet_resnet": 0.9, "plain_resnet": 0.4}
    runs = {f"{name}-0": {"seed": 0, "auc_flipped_enlarged_heart": x} for name, x in flipped.items()}
    found, sign = tables.compared(runs, "isnet_prior_resnet flipped", "isnet_resnet from plain_resnet")
    assert found == [pytest.approx(80)] and sign == ""


def test_the_interval_is_student_s():
    assert tables.interval([1.0, 2.0, 3.0]) == "-0.5 to 4.5"  # 2 ± 4.303 / sqrt(3)
    assert tables.interval([5.0]) == ""


def test_spread_and_gaps_are_mean_and_deviation_of_the_same_seeds():
    assert tables.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and tables.spread([1.0, 3.0], "+") == "+2.0 ± 1.4"
    assert tables.spread([1.0]) == "1.0"
    assert tables.gaps({0: 5.0, 1: 7.0, 2: 9.0}, {1: 4.0, 2: 5.0}) == [3.0, 4.0]
    runs = {
        "span-0": {"seed": 0, "x": 0.5},
        "span-1": {"seed": 1, "x": 0.25},
        "no_span-0": {"seed": 0, "x": 0.9},
    }
    assert tables.points(runs, "span", "x") == {0: 50.0, 1: 25.0}
