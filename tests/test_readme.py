"""The README says what was measured, and its examples run."""

import ast
import copy
import re
import subprocess
from pathlib import Path

import pytest
import torch

from experiments import tables
from vit import ViT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_s_tables_are_those_that_the_results_give():
    assert tables.fill(README, ROOT / "results") == README
    tables_in = re.findall(r"<!-- table (\w+) -->\n(?:\|.*\n){3}", README)
    expected = "ablation benchmark claims exposure failures few_labels floors isnet_costs kinds localisation"
    expected += " parts parts_transfer pooling shortcut transfer"
    assert sorted(tables_in) == expected.split()  # none empty, none lost


def test_a_table_changes_when_a_result_changes(tmp_path):
    for file in (ROOT / "results").glob("*.json"):
        text = re.sub(r'("attention_mAP": 0\.)\d', r"\g<1>1", file.read_text(), count=1)
        (tmp_path / file.name).write_text(text)
    assert tables.fill(README, tmp_path) != README


def lines_for(file: str) -> str:
    """The README's block that imports from a file."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if f"from {file} import" in block)


class Foreign(ViT):
    """A ViT with timm's face."""

    num_features, num_prefix_tokens = 32, 1

    def __init__(self):
        super().__init__(224, 16, 3, self.num_features, 2, 4)

    def forward_features(self, images):
        tokens, seen = [], self.norm.register_forward_hook(lambda m, inputs, output: tokens.append(output))
        self.row = super().forward(images).attention
        seen.remove()
        return tokens[0]

    def forward(self, images):
        return self.forward_features(images)[:, 0]


def test_the_lines_for_span_guide_the_first_heads_of_a_foreign_vit():
    masks = torch.zeros(2, 224, 224)
    masks[0, 30:90, 30:90] = masks[1, 140:200, 60:170] = 1
    vit, theta = Foreign(), torch.eye(2, 3).expand(2, 2, 3)
    names = dict(masks=masks, sample=torch.rand(3, 224, 224), images=torch.rand(2, 3, 224, 224), vit=vit)
    names |= dict(views=names["images"], index=[0, 1], theta=theta, loss=torch.tensor(0.0))
    exec(lines_for("attention_priors"), names)
    torch.testing.assert_close(names["attention"], vit.row)
    (gradient,) = torch.autograd.grad(names["loss"], names["attention"])
    assert gradient[:, :2].abs().sum() > 0 and gradient[:, 2:].abs().sum() == 0


def test_the_lines_for_dino_move_a_foreign_student_and_its_teacher():
    encoder = Foreign()
    names = dict(torch=torch, copy=copy, encoder=encoder, views=torch.rand(4, 3, 224, 224), loss=0.0)
    exec(lines_for("dino"), names)
    names["loss"].backward()
    assert encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in names["teacher"].parameters())
    with torch.no_grad():
        encoder.cls_token.fill_(1.0)
    teacher = names["teacher"][0].cls_token
    before = teacher.clone()
    exec(lines_for("dino").splitlines()[-2] + "\n" + lines_for("dino").splitlines()[-1], names)
    torch.testing.assert_close(teacher, 0.996 * before + 0.004)


def test_the_lines_for_relvit_teach_a_foreign_vit_without_its_positions():
    vit = Foreign()
    names = dict(
        torch=torch, vit=vit, images=torch.rand(2, 3, 224, 224), generator=torch.Generator(), loss=0.0
    )
    names["normalise"] = lambda x: x - 0.5
    exec(lines_for("relvit"), names)
    names["loss"].backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert vit.pos_embed.grad is None and not vit.pos_embed.any()


def test_the_lines_for_simpool_pool_a_foreign_convnet():
    convnet = torch.nn.Conv2d(3, 8, 16, stride=16)
    convnet.num_features, convnet.forward_features = 8, convnet.forward
    names = dict(convnet=convnet, images=torch.rand(2, 3, 64, 64), head=torch.nn.Linear(8, 5))
    exec(lines_for("simpool"), names)
    assert names["logits"].shape == (2, 5) and names["attention"].shape == (2, 16)
    torch.testing.assert_close(names["attention"].sum(dim=1), torch.ones(2))


def test_the_lines_for_isnet_teach_any_classifier():
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 4:12, 4:12] = 1
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU(True), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 28 * 28, 2))
    names = dict(model=model, images=torch.rand(3, 1, 32, 32), mask=mask, loss=0.0)
    exec(lines_for("isnet_lrp"), names)
    names["loss"].backward()
    assert model[0].weight.grad.abs().sum() > 0


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


def listed(flag: str) -> set[str]:
    """The experiments that reproduce.sh lists."""
    said = subprocess.run([ROOT / "reproduce.sh", flag], capture_output=True, text=True, check=True).stdout
    return {line.split()[0].rpartition("-")[0] for line in said.splitlines()}


def claimed(numbers: str) -> set[str]:
    """The experiments that these claims name."""
    lines = [line for line in tables.CLAIMS.strip().splitlines() if line[0] in numbers]
    cells = [cell for line in lines for cell in line.split("|")[4:] if cell.strip()]
    found = {cell.split()[0] for cell in cells} | {c.split()[2] for c in cells if " from " in c}
    return found - {"."}


def test_an_unknown_flag_of_reproduce_starts_nothing():
    said = subprocess.run([ROOT / "reproduce.sh", "--help"], capture_output=True, text=True)
    assert said.returncode == 2 and "--quick" in said.stdout


def test_every_experiment_that_a_table_names_is_run():
    run, always = listed("--list-all"), listed("--list")
    assert always < run and claimed("1234567") - {"dino_long"} <= always  # it takes four times as long
    named = claimed("12345678")
    named |= {*tables.ABLATIONS, *tables.FAILURES, *(name for of in tables.POOLINGS.values() for name in of)}
    named |= {f"{how}_{kind}" for how in tables.AGAINST for kind in tables.KINDS}
    named |= {f"{how}_{backbone}" for how in tables.SHORTCUT for backbone in ("resnet", "vit")}
    assert named <= run


def test_a_claim_may_be_the_share_of_the_way_from_one_experiment_to_another():
    flipped = {"isnet_prior_resnet": 0.8, "isnet_resnet": 0.9, "plain_resnet": 0.4}
    runs = {f"{name}-0": {"seed": 0, "auc_flipped_enlarged_heart": x} for name, x in flipped.items()}
    found, sign = tables.compared(runs, "isnet_prior_resnet flipped", "isnet_resnet from plain_resnet")
    assert found == [pytest.approx(80)] and sign == ""


def test_a_folder_without_runs_leaves_the_results_alone(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        tables.collect(tmp_path / "nowhere")


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


def test_ratios_of_one_thing_stand_side_by_side():
    costs = {"time: a": [1, 2, 3], "time: b": [4, 5, 6], "memory: b": [7, 7, 7], "else: b": [1, 1, 1]}
    lines = tables.costs_of(costs, "what", {"memory": "kept", "time": "step"}).splitlines()
    assert lines[0] == "| what | kept | step |"
    assert lines[2:] == ["| a |  | 2.00 (1.00 to 3.00) |", "| b | 7.00 | 5.00 (4.00 to 6.00) |"]


def test_each_kind_of_shortcut_has_its_figures_in_their_columns():
    figures = {"same": 0.9, "removed": 0.8, "flipped": 0.7, "unseen": 0.6}
    run = {"seed": 0} | {f"auc_{part}_enlarged_heart": value for part, value in figures.items()}
    lines = tables.kinds({"isnet_tint-0": run}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][2:6] == [
        "shortcut as in training",
        "removed",
        "flipped",
        "another one",
    ]
    assert lines[2:] == ["| a tint of the background: **ResNet, ISNet** | 90.0 | 80.0 | 70.0 | 60.0 | 1 |"]
