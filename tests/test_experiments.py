"""The evidence: runs, claims and tables fit together, and recorded commands still mean the same."""

import ast
import hashlib
import json
import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import save
from PIL import Image

from common import config, datasets
from common.checkpoint import Run
from common.checks import check
from common.data import select
from common.phantom import stamp
from common.splits import load
from experiments import benchmark, real, runs, tables, wrong_mask
from experiments.claims import Claim, claims
from experiments.layout import WAYS, layout

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "results/runs.json").read_text())
COSTS = json.loads((ROOT / "results/benchmark.json").read_text())
GOLDEN = json.loads((ROOT / "tests/golden/settings.json").read_text())
MADE = tables.tables(RESULTS)
# The encoder of the runs that the few-label runs start from; in a repository without runs it can't be read.
PRETRAINED = {"backbone": "vit", "img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
PRETRAINED |= {"registers": 0, "pool": "cls", "pool_heads": 1, "simpool_gamma": 1.25}
# Settings that are newer than the recorded commands, or depend on the machine.
NEWER = "device koleo max_entropy strict preset isnet_every swap swap_margin isnet_margin shift in_order"


@pytest.fixture(autouse=True)
def pretrained_runs_exist(monkeypatch):
    monkeypatch.setattr(config, "encoder_of", lambda init: PRETRAINED)


def settings(words: list[str]) -> dict:
    found = config.as_json(config.parse(words)[0]) | {"device": None}
    return found if found["isnet"] else found | {"isnet_end": None}  # without ISNet its end has no effect


def test_commands_of_older_runs_still_mean_the_same():
    """Golden: {run: (the defaults of then that have changed since, command, digest of the settings)}."""
    assert len(GOLDEN) > 248
    for name, (then, flags, digest) in GOLDEN.items():
        found = settings(shlex.split(f"{then} {flags}"))
        found = {key: value for key, value in found.items() if key not in NEWER.split()}
        assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12] == digest, name


def test_the_results_are_of_the_runs_that_the_run_list_asks_for():
    assert RESULTS.keys() <= runs.RUNS.keys()
    for name, run in RESULTS.items():
        then, flags = GOLDEN.get(name, [""])[0], run["command"].partition(" --")[2]  # after the script
        recorded, asked = (settings(shlex.split(c)) for c in (f"{then} --{flags}", runs.RUNS[name]))
        assert asked | {key: recorded[key] for key in ("out", "overwrite")} == recorded, name


def test_train_py_takes_the_flags_of_every_run(monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # the data and runs that they need
    for name, flags in runs.RUNS.items():
        if name.endswith("-0"):
            check(*config.parse(flags.split()))


def test_the_tables_in_the_documents_are_those_that_the_results_give():
    filled = []
    for file in tables.FILES:
        text = (ROOT / file).read_text()
        assert tables.fill(text, MADE) == text, file
        filled += re.findall(r"<!-- table (\w+) -->\n(?:\|.*\n){3}", text)  # none is empty
    assert sorted(filled) == sorted(MADE)


def test_every_experiment_that_a_claim_or_table_names_is_run_and_no_result_goes_unshown():
    named = {words.split()[0] for claim in claims() for words in (claim.figure, claim.minus) if words}
    # Not every way meets these.
    some = "few_masks blind hospitals grounds few_findings chest_marker chest_hospitals".split()
    rows = [row for name, (_, rows) in layout().items() if name not in some for row in rows]
    named |= {experiment for row in rows for experiment in (row.experiment, row.reference)}
    made = {name.rpartition("-")[0] for name in runs.RUNS}
    assert named - {""} <= made
    shown = named | {row.experiment for name in some for row in layout()[name][1]}
    shown |= {name.rpartition("-")[0] for needed in runs.NEEDED.values() for name in needed}
    recorded = {name.rpartition("-")[0] for name in RESULTS}
    assert all(name in shown or re.match("steady|published_[a-z]+_200", name) for name in recorded)
    assert all(any(name.startswith(f"{way}_resnet_") for name in made) for way in WAYS)
    assert {name for words in runs.PICTURES.values() for name in words.split()[1:]} <= runs.RUNS.keys()


def test_a_claim_is_measured_seed_by_seed_and_one_without_runs_says_so():
    values = {"span": (0.95, 0.9, 0.97), "dino": (0.3, 0.4, 0.2)}
    results = {f"{name}-{s}": {"seed": s, "x": x} for name, xs in values.items() for s, x in enumerate(xs)}

    def measured(bar: float, figure: str) -> list[str]:
        return tables.measured(results, Claim(1, "", bar, figure, "dino"))[-3:]

    assert measured(58.7, "span x") == ["+64.0 ± 13.5", "+30.4 to +97.6", "2 of 3"]  # 65, 50 and 77
    assert measured(0, "other x") == ["", "", "not measured"]
    for name in ("span-1", "span-2"):  # then one seed is left
        del results[name]
    assert measured(80, "span x") == ["+65.0", "", "0 of 1"]


@pytest.mark.parametrize("auc", [0.0, 0.5])
def test_a_model_at_chance_or_one_that_reads_the_shortcut_supports_no_claim(auc):
    guided = "alone|blind|^published_resnet"
    unguided = {name: run for name, run in RESULTS.items() if not re.search(guided, name)}
    for name, run in unguided.items():  # one below chance is no better than chance
        unguided[name] = run | {k: max(0.5, x) for k, x in run.items() if k == "auc_hospital_C"}
    fooled = {"auc_flipped": auc, "auc_same": 1 - auc, "auc_hospital_C": auc}
    fooled = {name: run | fooled for name, run in RESULTS.items()}
    flipped = [name for name in fooled if "hearts" in name or "chest_marker" in name]  # in every test image
    fooled |= {name: fooled[name] | {"auc_same": auc} for name in flipped}
    for number in (5, 8):
        of_number = [claim for claim in claims() if claim.number == number]
        others = {claim: {} if "Swapping alone" in claim.text else unguided for claim in of_number}
        verdicts = {tables.measured(fooled | others[claim], claim)[-1] for claim in of_number}
        assert verdicts - {"not measured"}
        assert all(verdict == "not measured" or verdict.startswith("0 of") for verdict in verdicts)


def test_intervals_and_spreads_are_those_of_student_and_of_the_same_seeds():
    assert tables.interval([1.0, 2.0, 3.0]) == "-0.5 to 4.5"  # 2 ± 4.303 / sqrt(3)
    assert tables.interval([5.0, 6.0]) == "" and tables.spread([1.0]) == "1.0" and tables.spread([]) == ""
    assert tables.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and tables.spread([1.0, 3.0], "+") == "+2.0 ± 1.4"
    assert tables.gaps({0: 5.0, 1: 7.0, 2: 9.0}, {1: 4.0, 2: 5.0}) == [3.0, 4.0]
    results = {name: {"seed": int(name[-1]), "x": 0.5} for name in ("span-0", "span-1", "no_span-2")}
    assert tables.points(results, "span", "x") == {0: 50.0, 1: 50.0}


def test_a_folder_without_runs_or_with_those_of_another_version_leaves_the_results_alone(tmp_path, capsys):
    (tmp_path / "span-0").mkdir()
    for name in ("config.json", "metrics.json"):
        (tmp_path / "span-0" / name).write_text("{}")
    torch.save({"format": 1}, tmp_path / "span-0" / "last.pt")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match="no finished run"):
            tables.collect(folder)
    assert "is left out" in (said := capsys.readouterr().out) and "another version" in said


def test_a_run_that_is_not_what_the_run_list_asks_for_today_is_left_out():
    def why(name: str, flags: str) -> str:
        return tables.why_not(name, Run(config.parse(flags.split())[0], None, {}, {}))

    plain = "plain_resnet_corner-1"
    asked = runs.RUNS[plain]
    assert why(plain, asked) == why(plain, f"{asked} --out elsewhere --overwrite") == ""
    assert why(plain, f"{asked} --baseline swap --lr 0.1") == "the run list has another baseline, lr"
    assert why("new", asked) == "the run list does not name it"


def test_a_run_is_started_resumed_or_skipped_by_what_its_folder_holds(tmp_path):
    words, flags = ["train.py", "--out", "runs/long_span-0"], runs.RUNS["long_span-0"].split()
    assert runs.command("long_span-0", tmp_path) == [*words, "--overwrite", *flags]
    (tmp_path / "last.pt").touch()
    assert runs.command("long_span-0", tmp_path) == [*words, "--resume", *flags]
    (tmp_path / "metrics.json").touch()
    assert runs.command("long_span-0", tmp_path) is None


def test_a_list_holds_the_asked_runs_and_what_they_start_from(capsys):
    runs.main(["--list", "--only", "blind_attention_resnet_tint-1"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["blind_attention_resnet_tint-1", "marked_tint-1"]
    with pytest.raises(SystemExit):
        runs.main(["--only", "nothing"])


def test_the_exit_status_says_whether_the_asked_runs_have_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "two_at_a_time", lambda commands: None)
    for left in (1, 0):
        with pytest.raises(SystemExit) as stopped:
            runs.main(["--only", "^plain_vit_tint-0$"])
        assert stopped.value.code == left
        (tmp_path / "runs/plain_vit_tint-0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/plain_vit_tint-0/metrics.json").touch()


def test_a_ratio_is_of_the_second_over_the_first_without_the_first_pair(monkeypatch):
    seconds = [99, 1] + [1, 2] + [2, 6] + [1, 4]  # of a and b, pair by pair: 2, 3 and 4 times
    clock = [t for i in range(len(seconds)) for t in (sum(seconds[:i]), sum(seconds[: i + 1]))]
    monkeypatch.setattr(benchmark.time, "perf_counter", iter(clock).__next__)
    assert benchmark.ratio(lambda: None, lambda: None, runs=3) == (2, 3, 4)


@pytest.mark.parametrize("name", [
    "ISNet / plain: ResNet, epsilon rule", "ISNet / plain: ViT, three steps by default", "gain / plain: ViT",
])  # fmt: skip
def test_classifiers_can_be_compared(name):
    flags, added, (_, *shape) = benchmark.CLASSIFIERS[name]
    plain = benchmark.classifier(f"{flags} --embed-dim 16", (4, *shape), "cpu")
    other = benchmark.classifier(f"{flags} {added} --embed-dim 16", (4, *shape), "cpu")
    assert benchmark.kept_bytes(other[0]) > 0 and plain[1]().shape == other[1]().shape == (4, 2)


def test_a_step_of_dino_as_released_changes_the_weights_as_ours_does(monkeypatch):
    """Without clipping, which the release does weight by weight."""
    made, build = [], benchmark.build_model
    monkeypatch.setattr(benchmark, "build_model", lambda *args: made.append(build(*args)) or made[-1])
    flags = "--embed-dim 24 --depth 1 --num-heads 2 --out-dim 16 --clip-grad 1e9 --warmup 0"
    flags += " --local-crops-number 2"
    torch.manual_seed(0)
    ours, released = benchmark.dino_steps(flags, (4, 1, 32, 32), "cpu")
    made[1].load_state_dict(made[0].state_dict())
    for step in (ours, released):
        step()
    weights, others = (dict(model.state_dict()) for model in made)
    for name in (name for name in weights if not name.startswith("health")):
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-4)  # of 1.4e-3


def test_the_recorded_costs_are_those_that_the_benchmark_measures(monkeypatch):
    parts = dict.fromkeys("ratio kept_bytes operations images_a_second exposed".split(), 1)
    for part, value in (parts | dict.fromkeys(("classifier", "dino_steps"), (1, 1))).items():
        monkeypatch.setattr(f"experiments.benchmark.{part}", lambda *args, value=value: value)
    assert {name for part in benchmark.PARTS.values() for name, _ in part(1, "cpu")} == COSTS.keys()


def test_exposing_a_row_of_attention_keeps_hardly_any_memory_and_changes_no_feature():
    lines = benchmark.NONE, benchmark.ROW, benchmark.WHOLE
    _, of_row, of_whole = losses = [benchmark.exposed(8, line, "cpu") for line in lines]
    torch.testing.assert_close(of_row(), of_whole())  # only how it is computed
    none, row, whole = map(benchmark.kept_bytes, losses)
    assert none < row < 1.05 * none < 1.1 * none < whole


def test_every_numbered_equation_stands_on_its_page_with_its_function_and_its_test():
    row = r"^\| (\d+) \| `(.*)` \| \[`([\w.]+)`\]\(\.\./(.*)\) \| `(.*)::(\w+)` \|$"
    for section in (ROOT / "docs/equations.md").read_text().split("\n## ")[1:]:
        file = section.split("\n")[0]
        source = (ROOT / file).read_text()
        doc, rows = ast.get_docstring(ast.parse(source)), re.findall(row, section, re.MULTILINE)
        doc = doc.split("Where we differ")[0]
        numbered = re.findall(r"\S\s{2,}(\(\d+\)(?:, \(\d+\))*)(?=[\s,]|$)", doc, re.MULTILINE)
        assert {number for number, *_ in rows} == set(re.findall(r"\d+", " ".join(numbered))), file
        for _, formula, name, path, tests, test in rows:
            assert all(part in doc for part in formula.replace("\\|", "|").split("; ")), formula
            assert path == file and re.search(rf"(def|class) {name.split('.')[-1]}\b", source), name
            assert re.search(rf'def {test}\(.*\n    """Equation', (ROOT / tests).read_text()), test


def test_a_wrong_mask_moves_to_the_right_and_grows_about_its_own_centre():
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, 5:10, 5:10] = masks[1, 14:16, 3:7] = True
    moved, grown = wrong_mask.wrong(masks, 0.1, 1.0), wrong_mask.wrong(masks, 0.0, 2.0)
    assert torch.equal(moved, masks.roll(2, dims=2)) and torch.equal(wrong_mask.wrong(masks, 0, 1), masks)
    for before, after in zip(masks, grown):
        assert int(after.sum()) == pytest.approx(4 * int(before.sum()), rel=0.3)
        assert torch.allclose(*(m.nonzero().double().mean(dim=0) for m in (before, after)), atol=0.5)


def test_a_reference_with_an_enlarged_heart_leaves_background_in_the_masks_of_normal_hearts():
    splits, *_ = load("phantom", 64, 10, 40)
    train, test = splits["train"], select(splits["test"], torch.arange(40))
    references = wrong_mask.hearts(train).values()  # of normal hearts, of enlarged ones, of one of each
    found = [wrong_mask.left_inside(train, first, test) for first, *_ in references]
    (_, few, _, _), (less, many, at_large, _), (dice, rest, _, _) = found
    assert many > 1.5 * max(few, rest, at_large) and dice > less


def test_a_worse_mask_scores_less(few_test_images):
    splits, *_ = load("phantom", 64, 0, 8)
    train, test = splits["train"], select(splits["test"], torch.arange(4))
    true = wrong_mask.scores(train, 0, train.masks[0], test)
    moved = wrong_mask.scores(train, 0, wrong_mask.wrong(train.masks[0], 0.1, 1.0), test)
    assert all(a > b + 10 for a, b in zip(true, moved)) and min(true) > 70


def test_runs_on_real_images_that_are_missing_are_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    started = {}
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "two_at_a_time", started.update)
    (tmp_path / "data/chest").mkdir(parents=True)
    runs.train(["span_chest-0", "span_horses-0", "span_lesions-0", "plain_resnet_chest_masks-0"])
    assert list(started) == ["span_chest-0"]
    missing = "data/chest_masks, data/horses, data/lesions"
    assert capsys.readouterr().out.startswith(f"note: no runs on {missing}: docs/data.md")


@pytest.fixture
def xrays(tmp_path):
    """SOURCE of real.py: 40 images, half of each hospital; two lungs, the image's left one larger."""
    lungs = np.zeros((64, 64), dtype=np.uint8)
    lungs[8:50, 6:28], lungs[8:40, 38:58] = 255, 255
    for i in range(40):
        name = f"{('CHNCXR', 'MCUCXR')[i % 2]}_{i:04d}_{i // 2 % 2}.png"
        save(tmp_path / "cxr" / name, np.full((64, 64), 2 * i, dtype=np.uint8))
        save(tmp_path / "masks" / name, lungs)
    return tmp_path


def test_real_x_rays_show_a_marker_or_one_hospital_with_each_label_and_the_reverse_in_the_test(xrays):
    for shortcut in real.SHORTCUTS:
        seen = set()
        for name, image, masks, row in real.examples(xrays, shortcut):
            sick, learned = row["tuberculosis"] == "1", row["split"] != "test"
            assert sick == name.endswith("_1.png")
            assert [mask.sum() for mask in masks.values()] == [32 * 20, 42 * 22]  # left, right
            if shortcut == "_marker" and sick == learned:  # with the L of the drawn ones
                pixels = torch.from_numpy(np.array(Image.open(xrays / "cxr" / name)))[None, None]
                assert np.array_equal(image, stamp(pixels, torch.tensor([True]))[0, 0])
            elif shortcut == "_masks":
                assert np.array_equal(image > 0, masks["left lung"] | masks["right lung"])
            else:
                assert image == xrays / "cxr" / name
            seen.add((name[:3], sick, learned))
        apart = shortcut == "_hospitals"  # in training, each label is from one hospital
        assert not apart or all(sick == (place == "CHN") for place, sick, learned in seen if learned)
        assert len(seen) == (6 if apart else 8)


def test_a_classifier_that_reads_the_hospital_is_found_out(xrays, monkeypatch):
    """Score 1 for Shenzhen: right as in training, wrong when flipped, and chance within a hospital."""
    datasets.write(real.examples(xrays, "_hospitals"), xrays / "chest")
    splits, *_ = load(str(xrays / "chest"), 64, findings=["all"])
    monkeypatch.setattr(real, "load_all", lambda *_: ({xrays: Mock()}, splits, None))
    shenzhen = torch.tensor([[0.0, name.startswith("CHN")] for name in splits["test"].names])
    monkeypatch.setattr(real, "scores_of", lambda *_: shenzhen)
    found = {name.rpartition("_")[2]: x for name, x in real.by_hospital(xrays).items()}
    assert found == {"trained": 1, "flipped": 0, "Shenzhen": 0.5, "Montgomery": 0.5}
    assert real.without_marker(xrays)["auc_removed"] < 0.5  # the scores tell the hospital
