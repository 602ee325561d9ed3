"""The evidence: runs, claims and tables fit together, and recorded commands still mean the same."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest

from common import config
from experiments import benchmark, runs, tables
from experiments.claims import claims

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "results/runs.json").read_text())
COSTS = json.loads((ROOT / "results/benchmark.json").read_text())
# The encoder of the runs that the few-label runs start from; in a repository without runs it can't be read.
PRETRAINED = {"backbone": "vit", "img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
PRETRAINED |= {"registers": 0, "pool": "cls", "pool_heads": 1, "simpool_gamma": 1.25}


@pytest.fixture(autouse=True)
def pretrained_runs_exist(monkeypatch):
    monkeypatch.setattr(config, "encoder_of", lambda init: PRETRAINED)


def settings(words: list[str]) -> dict:
    return config.as_json(config.parse(words)[0]) | {"device": None, "out": None, "overwrite": None}


def test_every_recorded_command_still_means_the_same():
    golden = json.loads((ROOT / "tests/golden/settings.json").read_text())
    assert golden.keys() == RESULTS.keys()
    for name, run in RESULTS.items():
        found = config.as_json(config.parse(shlex.split(run["command"])[2:])[0])
        found.pop("device")
        digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        assert digest[:12] == golden[name], name


def test_the_run_list_asks_for_the_settings_that_the_recorded_runs_had():
    assert runs.RUNS.keys() == RESULTS.keys()
    for name, flags in runs.RUNS.items():
        recorded = shlex.split(RESULTS[name]["command"])[2:]
        assert settings(shlex.split(flags)) == settings(recorded), name


def test_the_tables_in_the_documents_are_those_that_the_results_give():
    made, found = tables.tables(RESULTS, COSTS), []
    for file in tables.FILES:
        text = (ROOT / file).read_text()
        assert tables.fill(text, made) == text, file
        found += re.findall(r"<!-- table (\w+) -->\n(?:\|.*\n){3}", text)  # none is empty
    assert sorted(found) == sorted(made)


def test_every_experiment_that_a_claim_or_table_names_is_run():
    named = {words.split()[0] for claim in claims() for words in claim[3:6] if words}
    made = tables.of_pretraining() | tables.of_classifiers()
    made.pop("kinds")  # not every way meets every kind
    named |= {name for _, rows in made.values() for row in rows for name in (row.experiment, row.reference)}
    named |= {name for words in runs.PICTURES.values() for name in words.split()[1:]}
    assert named - {""} <= {name.rpartition("-")[0] for name in runs.RUNS}


def test_a_claim_is_measured_seed_by_seed_and_one_without_runs_says_so():
    values = {"span": (0.95, 0.9, 0.97), "dino": (0.3, 0.4, 0.2), "all": (1.0, 1.0, 1.0)}
    found = {f"{name}-{s}": {"seed": s, "x": x} for name, xs in values.items() for s, x in enumerate(xs)}

    def measured(figure: str, **about) -> list[str]:
        return tables.measured(found, claims()[0]._replace(figure=figure, minus="dino", **about))[-3:]

    assert measured("span x", bar=58.7) == ["+64.0 ± 13.5", "+30.4 to +97.6", "2 of 3"]  # 65, 50 and 77
    assert measured("other x") == ["", "", "not measured"]
    for name in ("span-1", "span-2"):  # then one seed is left: 65 of 70 points on the way to `all`
        del found[name]
    assert measured("span x", end="all", bar=80) == ["92.9", "", "1 of 1"]


def test_intervals_and_spreads_are_those_of_student_and_of_the_same_seeds():
    assert tables.interval([1.0, 2.0, 3.0]) == "-0.5 to 4.5"  # 2 ± 4.303 / sqrt(3)
    assert tables.interval([5.0]) == "" and tables.spread([1.0]) == "1.0" and tables.spread([]) == ""
    assert tables.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and tables.spread([1.0, 3.0], "+") == "+2.0 ± 1.4"
    assert tables.gaps({0: 5.0, 1: 7.0, 2: 9.0}, {1: 4.0, 2: 5.0}) == [3.0, 4.0]
    found = {name: {"seed": int(name[-1]), "x": 0.5} for name in ("span-0", "span-1", "no_span-2")}
    assert tables.points(found, "span", "x") == {0: 50.0, 1: 50.0}


def test_a_folder_without_runs_leaves_the_results_alone(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        tables.collect(tmp_path / "nowhere")


def test_a_run_is_started_resumed_or_skipped_by_what_its_folder_holds(tmp_path):
    words = ["train.py", "--out", "runs/span-0"]
    assert runs.command("span-0", tmp_path) == [*words, "--overwrite", "--seed", "0"]
    (tmp_path / "last.pt").touch()
    assert runs.command("span-0", tmp_path) == [*words, "--resume", "--seed", "0"]
    (tmp_path / "metrics.json").touch()
    assert runs.command("span-0", tmp_path) is None


def test_a_list_holds_the_asked_runs_and_what_they_start_from(capsys):
    runs.main(["--list", "--only", "isnet_attention_vit-1"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["isnet_attention_vit-1", "span_marked-1"]
    with pytest.raises(SystemExit):
        runs.main(["--only", "nothing"])


# The benchmark


def test_a_ratio_is_of_the_second_over_the_first_without_the_first_pair(monkeypatch):
    seconds = [99, 1] + [1, 2] + [2, 6] + [1, 4]  # of a and b, pair by pair: 2, 3 and 4 times
    clock = [t for i in range(len(seconds)) for t in (sum(seconds[:i]), sum(seconds[: i + 1]))]
    monkeypatch.setattr(benchmark.time, "perf_counter", iter(clock).__next__)
    assert benchmark.ratio(lambda: None, lambda: None, runs=3) == (2, 3, 4)


@pytest.mark.parametrize("name", [name for name in benchmark.CLASSIFIERS if "ViT-S" not in name])
def test_classifiers_can_be_compared(name):
    flags, added, (_, channels, *size) = benchmark.CLASSIFIERS[name]
    plain, other = (
        benchmark.classifier(f"{words} --embed-dim 16", (4, channels, *size), "cpu")
        for words in (flags, f"{flags} {added}")
    )
    assert benchmark.kept_bytes(other[0]) > 0 and plain[1]().shape == other[1]().shape == (4, 2)


def test_the_recorded_costs_are_those_that_the_benchmark_measures():
    found = {name.partition("training step, ")[2] for name in COSTS} - {""}
    assert found == benchmark.CLASSIFIERS.keys()


def test_a_table_changes_when_a_result_changes():
    other = {name: run | {"attention_mAP": 0.5} for name, run in RESULTS.items()}
    before, after = tables.tables(RESULTS, COSTS), tables.tables(other, COSTS)
    assert before["claims"] != after["claims"] and before["localisation"] != after["localisation"]
