"""The chain from data to table, on the command line: what it learns, how it fails, how it goes on."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import evaluate
from common import loop
from common import pretrain
import train
from common.checkpoint import build_encoder, load_run, start
from common.data import Hosted, placed
from common.config import parse, repeated
from common.phantom import REGIONS, phantom

ROOT = Path(__file__).parents[1]
TINY = "--train-images 32 --embed-dim 24 --depth 2 --num-heads 3 --batch-size 8 --epochs 2".split()


@pytest.fixture(autouse=True, scope="module")
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
        yield


def refused(capsys, *argv: str) -> str:
    """The line with which train.py refuses to start, with exit status 2 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    error = capsys.readouterr().err.split("\r")[-1].strip()  # after what progress bars have wiped out
    assert stop.value.code == 2 and "\n" not in error and error.startswith("train.py: ")
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "span"
    train.main([*TINY, "--out", str(out)])
    return out


def test_a_run_leaves_its_settings_its_figures_its_weights_and_its_pictures(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for what in ("prior", "aligned_prior", "attention"):
        values = [metrics[f"{what}_AP_{region.replace(' ', '_')}"] for region in REGIONS]
        assert (
            metrics[f"{what}_mAP"] == pytest.approx(np.mean(values)) and 0 < min(values) <= max(values) <= 1
        )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and {
        "loss",
        "span_loss",
        "teacher_entropy",
        "kl",
    } <= set(lines[0])
    config = json.loads((run / "config.json").read_text())
    assert config["embed_dim"] == 24 and config["command"].startswith("python train.py --train-images 32")
    for picture in ("attention.png", "curves.png"):
        assert min(Image.open(run / picture).size) > 100
    assert not list(run.glob("*.part"))


def test_the_registered_prior_is_better_than_the_prior_as_it_is(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["aligned_prior_mAP"] > metrics["prior_mAP"] + 0.1


def test_guided_heads_learn_to_look_where_the_sample_s_masks_say(tmp_path):
    argv = "--train-images 128 --embed-dim 48 --depth 2 --epochs 12 --batch-size 16 --out-dim 32 --lr 3e-3"
    train.main([*argv.split(), "--out", str(tmp_path / "span")])
    metrics = json.loads((tmp_path / "span" / "metrics.json").read_text())
    assert metrics["attention_mAP"] > metrics["prior_mAP"] + 0.05  # 0.1 is chance


def test_runs_are_compared_side_by_side_on_the_same_images(run, tmp_path, capsys):
    train.main([*TINY, "--prior", "none", "--out", str(tmp_path / "dino")])
    capsys.readouterr()
    evaluate.main([str(run), str(tmp_path / "dino"), "--rows", "2", "--only", "attention"])
    table = capsys.readouterr().out
    assert "span: aligned prior" in table and "dino: attention" in table and "mean" in table
    assert (run / "compare.png").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{100 * metrics['attention_mAP']:.1f}" in table  # evaluate.py measures what train.py measured


def test_what_evaluate_finds_joins_metrics_json_and_pictures_show_what_few_labels_are_worth(
    run, tmp_path, capsys
):
    train.main([*TINY, "--prior", "none", "--out", str(tmp_path / "dino")])
    capsys.readouterr()
    before = {path: json.loads((path / "metrics.json").read_text()) for path in (run, tmp_path / "dino")}
    evaluate.main([str(run), str(tmp_path / "dino"), "--only", "linear", "finetune", "--fractions", "0.25", "1"])
    said = capsys.readouterr().out
    assert "AP in %" not in said and "25 % of labels" in said and "dino: finetune mAUC" in said
    for path, old in before.items():
        found = json.loads((path / "metrics.json").read_text())
        new = {f"{how}_mAUC{share}" for how in ("linear", "finetune") for share in ("", "_25_percent")}
        assert set(found) == set(old) | new
        assert found["linear_mAUC"] == pytest.approx(old["linear_mAUC"])  # by train.py and evaluate.py alike
        assert f"{100 * found['finetune_mAUC_25_percent']:.1f}" in said
    for picture in ("low_data.png", "compare_curves.png", "compare.png"):
        assert min(Image.open(run / picture).size) > 100


def test_runs_of_which_one_cannot_be_measured_are_shown_on_the_same_images(tmp_path, capsys):
    """Masks for a training and a test image: enough for a guided run, none to choose another's heads on."""
    data = tmp_path / "data"
    rows = ["file,split"]
    for folder in ("images", "masks/heart"):
        (data / folder).mkdir(parents=True)
    for i in range(12):
        Image.new("L", (16, 16), 20 * i).save(data / "images" / f"{i}.png")
        rows.append(f"{i}.png,{'train' if i < 4 else 'val' if i < 6 else 'test'}")
    for i in (0, 9):
        Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(data / "masks" / "heart" / f"{i}.png")
    (data / "labels.csv").write_text("\n".join(rows))
    argv = [*"--epochs 1 --batch-size 4 --embed-dim 12 --depth 1 --num-heads 2 --img-size 16".split()]
    argv += ["--patch-size", "4", "--keep-going", "--data", str(data)]
    train.main([*argv, "--out", str(tmp_path / "span")])
    train.main([*argv, "--prior", "none", "--out", str(tmp_path / "dino")])
    capsys.readouterr()
    for order in (["span", "dino"], ["dino", "span"]):
        evaluate.main([*(str(tmp_path / name) for name in order), "--only", "attention"])
        assert "dino: no validation image has" in capsys.readouterr().out


def test_figures_keep_a_run_s_own_relevance_rule_when_runs_are_compared(tmp_path):
    for name, gamma in {"a": "3", "b": "0"}.items():
        argv = "--task classify --train-images 32 --embed-dim 16 --batch-size 16 --epochs 1 --lrp-gamma"
        train.main([*argv.split(), gamma, "--out", str(tmp_path / name)])
    before = json.loads((tmp_path / "b" / "metrics.json").read_text())
    evaluate.main([str(tmp_path / "a"), str(tmp_path / "b"), "--only", "bias"])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == before


def test_a_measure_that_is_none_is_refused_by_name(run, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run), "--only", "atention"])
    assert stop.value.code == 2 and "invalid choice: 'atention'" in capsys.readouterr().err


def test_a_seed_gives_the_same_weights_again(run, tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "again")])
    assert same_weights(run, tmp_path / "again")


def same_weights(*runs: Path) -> bool:
    first, second = (load_run(run)[1]["model"] for run in runs)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_s_settings_repeat_it_and_flags_beside_them_change_it(run, tmp_path):
    again = ["--config", str(run / "config.json")]
    train.main([*again, "--out", str(tmp_path / "again")])
    assert same_weights(tmp_path / "again", run)
    train.main([*again, "--out", str(tmp_path / "other"), "--seed", "1", "--epochs", "1", "--overwrite"])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["seed"], config["epochs"], config["embed_dim"]) == (1, 1, 24)
    train.main(["--config", str(tmp_path / "other" / "config.json"), "--out", str(tmp_path / "third")])
    assert same_weights(tmp_path / "third", tmp_path / "other")


def test_settings_edited_in_the_file_count(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"seed": 3, "global_scale": [0.5, 0.9]}))
    args, _ = parse(repeated(["--config", str(file), "--epochs", "7"]))
    assert (args.seed, args.global_scale, args.epochs) == (3, [0.5, 0.9], 7)
    assert args.embed_dim == config["embed_dim"]
    for name, asked in (("follow", False), ("task", "classify"), ("prior_blur", None), ("amp", "yes")):
        file.write_text(json.dumps(config | {name: asked}))
        assert f"{name} became {asked}" in refused(capsys, "--config", str(file))
    file.write_text(json.dumps(config | {"epoch": 50}))
    assert "train.py has no setting epoch" in refused(capsys, "--config", str(file))
    assert parse(repeated(["--config", str(run)]))[0].seed == config["seed"]  # its folder will do


def test_what_is_typed_beside_settings_need_not_suit_what_they_were(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"command": config["command"] + " --init gone --device cuda"}))
    args, _ = parse(repeated(["--config", str(file), "--init", str(run), "--device", "cpu"]))
    assert (args.init, args.device, args.embed_dim) == (run, "cpu", 24)


def test_a_run_is_not_resumed_on_data_with_other_classes_than_it_learns(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=24)
    names = sorted(path.name for path in (data / "images").iterdir())
    rows = [f"{name},{i % 2},{i // 2 % 2}" for i, name in enumerate(names)]
    (data / "labels.csv").write_text("\n".join(["file,nodule,effusion", *rows]))
    argv = ["--task", "classify", "--data", str(data), "--embed-dim", "16", "--out", str(tmp_path / "run")]
    train.main([*argv, "--epochs", "1"])
    (data / "labels.csv").write_text("\n".join(["file,effusion,nodule", *rows]))
    capsys.readouterr()
    said = refused(capsys, *argv, "--epochs", "1", "--resume")
    assert "learned 1 channel(s), nodule, effusion; but" in said
    assert "has 1 channel(s), effusion, nodule" in said


def test_a_run_is_not_resumed_on_other_images_than_it_was_trained_on(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=0)
    argv = [*TINY, "--prior", "none", "--data", str(data), "--out", str(tmp_path / "run")]
    train.main([*argv, "--epochs", "1"])
    (data / "images" / os.fsdecode(b"03\xff.png")).write_bytes((data / "images" / "03.png").read_bytes())
    (data / "images" / "03.png").unlink()  # a name that is no UTF-8, either
    capsys.readouterr()
    assert "run was trained on 16 images (" in refused(capsys, "--out", str(tmp_path / "run"), "--resume")


def test_a_run_whose_data_moved_goes_on_and_one_whose_settings_were_changed_does_not(run, tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=0)
    out = tmp_path / "run"
    train.main([*TINY, "--prior", "none", "--data", str(data), "--out", str(out)])
    config = json.loads((out / "config.json").read_text())
    data.rename(tmp_path / "moved")
    (out / "config.json").write_text(json.dumps(config | {"data": str(tmp_path / "moved")}))
    train.main(["--out", str(out), "--resume"])
    capsys.readouterr()
    for name, value in (
        ("embed_dim", 48),
        ("lr", "fast"),
        ("data", 3),
        ("data", "parts"),
        ("classes", ["a"]),
    ):
        (out / "config.json").write_text(json.dumps(config | {name: value}))
        said = f"config.json says {name} {value}, but it was trained with {config[name]}"
        assert said in refused(capsys, "--out", str(out), "--resume")
    for name in ("ssl", "marker"):  # one that says something, and one that says None
        (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        assert f"config.json says {name} None, but" in refused(capsys, "--out", str(out), "--resume")


def test_a_checkpoint_of_another_version_or_with_something_missing_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    whole = torch.load(run / "last.pt", weights_only=True)
    resume = "--out", str(tmp_path), "--resume"
    for change, line in (
        ({"format": 2}, "written by another version of train.py (format 2, here 1)"),
        ({"format": None}, "written by another version of train.py (format None, here 1)"),
        ({"torch_rng": None}, "last.pt does not fit its settings"),
        ({"model": {}}, "last.pt does not fit its settings"),
        ({"optimizer": None}, "last.pt does not fit its settings"),
        ({"begun": 3}, "last.pt does not fit its settings"),
        ({"settings": 3}, "config.json or last.pt is damaged"),
    ):
        torch.save(whole | change, tmp_path / "last.pt")
        assert line in refused(capsys, *resume)
    del whole["optimizer"]
    torch.save(whole, tmp_path / "last.pt")
    assert "does not fit its settings (KeyError" in refused(capsys, *resume)


def test_underscores_as_in_dino_s_scripts_are_understood_in_flags_but_not_in_values():
    args, typed = parse(["--patch_size", "4", "--out_dim=64", "--data", "my_data"])
    assert (args.patch_size, args.out_dim, args.data) == (4, 64, "my_data")
    assert typed == {"patch_size", "out_dim", "data"}


def test_flags_answer_to_the_names_that_they_have_in_dino_s_and_timm_s_scripts():
    theirs = "--output_dir o --data_path d --momentum_teacher 0.9 --global_crops_scale 0.5 1 --hflip 0.5"
    theirs += " --local_crops_scale 0.1 0.3 --drop_path_rate 0.1"
    ours = "--out o --data d --momentum 0.9 --global-scale 0.5 1 --flip 0.5"
    ours += " --local-scale 0.1 0.3 --drop-path 0.1"
    assert parse(theirs.split()) == parse(ours.split())


def test_settings_that_are_no_run_s_are_refused_and_a_repeated_run_is_not_overwritten(tmp_path, capsys):
    train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "old"), "--overwrite"])
    capsys.readouterr()
    (tmp_path / "config.json").write_text("{}")
    assert "not the config.json of a run" in refused(capsys, "--config", str(tmp_path / "config.json"))
    assert f"there is no {tmp_path / 'none.json'}" in refused(capsys, "--config", str(tmp_path / "none.json"))
    # its --out is the run's own; that it was once overwritten is not repeated
    assert "holds a run" in refused(capsys, "--config", str(tmp_path / "old" / "config.json"))


def in_a_process_of_its_own(argv):
    """A fork, which needs not load torch again, that trains with one thread, as a forked process must."""
    torch.set_num_threads(1)
    process, status = os.fork(), 1
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            train.main(argv)
            status = 0
        finally:
            os._exit(status)
    return process


MOVING = "--align none --local-crops-number 2 --flip 0.5 --drop-path 0.2".split()  # all that draws numbers


def finished_in_spite_of(stop, argv, out):
    """Starts a run and goes on until it is done; stop(process, n) may end it meanwhile; how often it did."""
    stops = 0
    while not (out / "metrics.json").exists():
        how = ["--resume"] if (out / "last.pt").exists() else [*argv, "--overwrite"]
        process = in_a_process_of_its_own([*how, "--out", str(out)])
        stops += stop(process, stops)
    return stops


def same_rows(*runs):
    """Whether the runs logged the same, but for their speed."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    return all(
        [row | {"images_per_s": 0} for row in log] == [row | {"images_per_s": 0} for row in logs[0]]
        for log in logs
    )


def test_a_run_killed_20_times_ends_at_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    """By SIGKILL, at any moment, or with half a file on the disk, as when the power fails."""
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
    threads, chance, killed, real = torch.get_num_threads(), random.Random(0), tmp_path / "killed", os.fsync
    argv = [*TINY, *MOVING, "--epochs", "24"]
    os.waitpid(in_a_process_of_its_own([*argv, "--out", str(tmp_path / "whole")]), 0)
    epoch = (
        32 / json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["images_per_s"]
    )

    def half(file):
        """In a fork: of its fourth file only a half reaches the disk."""
        written.append(file)
        if len(written) == 4 and len(plan) < 20:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)

    plan, written, last = [], [], killed / "last.pt"
    monkeypatch.setattr(os, "fsync", half)

    def stop(process, kills):
        before, done = last.stat().st_mtime_ns if last.exists() else 0, 0
        while not done and (kills >= 20 or (last.stat().st_mtime_ns if last.exists() else 0) == before):
            done, status = os.waitpid(process, os.WNOHANG)
            assert not done or status in (0, signal.SIGKILL)
            time.sleep(0.001)
        if not done and kills % 2:
            time.sleep(chance.uniform(0, 1.2 * epoch))
            os.kill(process, signal.SIGKILL)
        if not done:
            os.waitpid(process, 0)
        plan.extend([process] * (kills < 20))
        return kills < 20

    assert finished_in_spite_of(stop, argv, killed) == 20
    torch.set_num_threads(threads)
    assert same_weights(tmp_path / "whole", killed) and same_rows(tmp_path / "whole", killed)


def test_a_run_stopped_by_ctrl_c_within_its_epochs_ends_at_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch
):
    """After 3, 5, 1, ... of its steps, 4 of which are an epoch."""
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
    threads, stopped, real, calls, after = torch.get_num_threads(), tmp_path / "stopped", loop.learn, [], []
    argv = [*TINY, *MOVING, "--epochs", "5"]
    os.waitpid(in_a_process_of_its_own([*argv, "--out", str(tmp_path / "whole")]), 0)

    def learn(*args):
        calls.append(args)
        if len(calls) == ([3, 5, 1, 4] + [99])[len(after)]:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    def stop(process, stops):
        os.waitpid(process, 0)
        after.append(load_run(stopped)[1]["begun"] is not None)
        return len(after) < 5

    monkeypatch.setattr(loop, "learn", learn)
    assert finished_in_spite_of(stop, argv, stopped) == 4 and after == [True] * 4 + [False]
    torch.set_num_threads(threads)
    assert same_weights(tmp_path / "whole", stopped) and same_rows(tmp_path / "whole", stopped)


def test_rows_that_a_kill_kept_from_being_written_are_written_when_the_run_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(rows.splitlines()[0] + "\n")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_priors_may_be_every_image_s_masks_statistics_or_a_file(tmp_path):
    np.save(tmp_path / "priors.npy", phantom(1, seed=9)[1][0].numpy().astype(np.float32))
    for prior in ("masks", "statistics", str(tmp_path / "priors.npy")):
        out = tmp_path / Path(prior).stem
        train.main([*TINY, "--num-heads", "4", "--epochs", "1", "--prior", prior, "--out", str(out)])
        assert json.loads((out / "metrics.json").read_text())["span_loss"] > 0


def test_the_span_loss_weighs_resolutions_by_the_share_that_their_views_see():
    args, _ = train.parse("--embed-dim 24 --depth 1 --num-heads 3 --out-dim 16".split())
    dino = train.DINO(build_encoder(args, 1), 24, 16)
    images, priors = torch.rand(2, 1, 64, 64), torch.rand(2, 3, 64, 64)
    theta = torch.eye(2, 3).repeat(4, 1, 1)
    blind = theta.clone()
    blind[:, 0, 2] = 5.0  # looks far beside the image
    views = [images.repeat(2, 1, 1, 1), images.repeat(2, 1, 1, 1)[..., :32, :32]]
    features = [dino.student(view) for view in views]
    one = pretrain.guide(views[:1], features[:1], [theta], priors, dino, args)
    torch.testing.assert_close(pretrain.guide(views, features, [theta, blind], priors, dino, args), one)
    args.follow = False  # then a view gets the whole prior, whatever it sees
    torch.testing.assert_close(pretrain.guide(views[:1], features[:1], [blind], priors, dino, args), one)


# Refusals


def test_an_existing_run_is_neither_overwritten_nor_resumed_unless_asked_to(run, tmp_path, capsys):
    before = (run / "last.pt").read_bytes()
    assert "--resume goes on with it, --overwrite starts again" in refused(capsys, *TINY, "--out", str(run))
    assert "was started with --embed-dim 24, not 48" in refused(
        capsys, "--out", str(run), "--resume", "--embed-dim", "48"
    )
    typed_default = refused(capsys, "--out", str(run), "--resume", "--epochs", "15")
    assert "was started with --epochs 2, not 15" in typed_default
    assert "start without --resume" in refused(capsys, "--out", str(tmp_path / "new"), "--resume")
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "config.json").write_text((run / "config.json").read_text())
    assert "--overwrite starts again" in refused(capsys, "--out", str(tmp_path / "dead"), "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json.part").write_text('{"se')  # killed before anything was there
    assert "--epochs 0" in refused(capsys, *TINY, "--out", str(tmp_path / "cut"), "--epochs", "0")
    assert "something else than a run" in refused(
        capsys, *TINY, "--out", str(tmp_path / "other"), "--overwrite"
    )
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "something else than a run" in refused(capsys, *TINY, "--out", str(tmp_path), "--overwrite")
    assert "is a file" in refused(capsys, *TINY, "--out", str(tmp_path / "thesis.txt"))
    assert (run / "last.pt").read_bytes() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            "--img-size 60",
            "60x60 px cannot be cut into patches of 8 px: use a multiple of 8, such as 56 or 64",
        ),
        ("--num-heads 2", "3 priors (left lung, right lung, heart) but --num-heads 2"),
        ("--embed-dim 25", "embed_dim 25 is not a multiple of num_heads 3"),
        ("--epochs 0", "--epochs 0: it must lie between 1 and"),
        ("--lr nan", "--lr nan: it must lie between"),
        ("--lr 0", "--lr 0.0: it must lie between"),
        ("--warmup 5", "--warmup 5.0: it must lie between 0 and 1"),
        ("--momentum 1.5", "--momentum 1.5: it must lie between 0 and 1"),
        ("--seed -1", "--seed -1: it must lie between 0 and"),
        ("--span-layer 2", "--span-layer 2: it must lie between -2 and 1"),
        ("--global-scale 0.9 0.4", "0 < a <= b <= 1"),
        ("--device abacus", "--device abacus is none: auto, cpu, cuda or mps"),
        ("--sample nobody", "sample `nobody` is not drawn"),
        ("--data nowhere", "nowhere is not a folder; expected images/"),
        ("--prior nowhere.npy", "nowhere.npy is not sample, masks, statistics, none, or a .npy file"),
        ("--pool simpool --simpool-gamma 0", "--simpool-gamma 0.0: it must lie between 0.1 and 10"),
        ("--pool simpool --pool-heads 2", "3 priors (left lung, right lung, heart) but --pool-heads 2"),
        ("--pool gap", "--prior sample guides attention, --pool gap has none"),
        ("--backbone resnet --prior none --pool cls", "--pool cls needs --backbone vit"),
        ("--pool-heads 2", "--pool-heads does nothing without --pool simpool"),
        ("--ssl relvit --mega-patches 9", "--mega-patches 9: more than the 8 patches a side"),
        ("--ssl relvit --patch-size 64 --mega-patches 4", "--mega-patches 4: more than the 1 patches"),
        ("--ssl relvit --patch-size 0", "--patch-size 0: it must lie between 1"),
        ("--ssl relvit --momentum 0.5", "--momentum does nothing without --ssl dino"),
        ("--ssl relvit --no-follow", "--no-follow does nothing without --ssl dino"),
        ("--pool simpool --span-layer 0", "--span-layer does nothing without --pool cls"),
        ("--pool simpool --pool-heads 5", "--pool-heads 5 must divide --embed-dim 24"),
        ("--ssl relvit --mega-patches 1", "1x1 patches have no relations"),
        ("--ssl relvit --patch-size 64", "1x1 patches have no relations"),
        ("--ssl relvit --backbone resnet --pool simpool", "needs --backbone vit"),
        ("--relations angles", "--relations does nothing without --ssl relvit or --task classify"),
        ("--task classify --backbone vit --isnet 1 --relations angles", "masks don't follow: choose one"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line_before_anything_is_written(
    argv, message, tmp_path, capsys
):
    assert message in refused(capsys, *TINY, *argv.split(), "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "prior, message",
    [
        (np.ones((2, 32, 32)), "is an array (2, 32, 32): make it (R, 64, 64)"),
        (np.ones((64, 64)), "make it (R, 64, 64)"),
        (np.ones((0, 64, 64)), "make it (R, 64, 64)"),
        (-np.ones((1, 64, 64)), "must be finite, not negative, and not empty"),
        (np.stack([np.ones((64, 64)), np.zeros((64, 64))]), "must be finite, not negative, and not empty"),
        (np.array([{"a": 1}], dtype=object), "a .npy file"),
    ],
)
def test_a_prior_file_that_does_not_fit_is_refused(prior, message, tmp_path, capsys):
    np.save(tmp_path / "prior.npy", prior, allow_pickle=True)
    argv = [*TINY, "--prior", str(tmp_path / "prior.npy"), "--out", str(tmp_path / "new")]
    assert message in refused(capsys, *argv)


def folder_of_phantoms(path: Path, masked: int) -> Path:
    """A user's folder: 24 images, the first `masked` of them with masks."""
    images, masks, _ = phantom(24, seed=3)
    for region in REGIONS:
        (path / "masks" / region).mkdir(parents=True)
    (path / "images").mkdir()
    for i in range(24):
        Image.fromarray(images[i, 0].numpy()).save(path / "images" / f"{i:02d}.png")
        for r, region in enumerate(REGIONS[: 3 if i < masked else 0]):
            Image.fromarray(masks[i, r].numpy()).save(path / "masks" / region / f"{i:02d}.png")
    return path


def test_a_folder_with_one_labelled_image_trains_and_says_what_cannot_be_measured(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=1)
    (data / "images" / "05.png").write_bytes(b"")
    train.main([*TINY, "--data", str(data), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert (
        "05.png is skipped" in printed and "no test image has" in printed and "AP can't be measured" in printed
    )
    assert (tmp_path / "run" / "attention.png").exists()


def test_a_folder_without_masks_is_refused_unless_the_prior_needs_none(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=0)
    argv = [*TINY, "--data", str(data), "--out", str(tmp_path / "run")]
    assert "has a mask for every region; outline one" in refused(capsys, *argv)
    assert "has a mask for every region" in refused(capsys, *argv, "--prior", "masks")
    train.main([*argv, "--prior", "none", "--epochs", "1"])


def test_a_folder_whose_split_leaves_nothing_to_train_on_is_refused(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=0)
    rows = "".join(f"{i:02d}.png,test\n" for i in range(24))
    (data / "labels.csv").write_text("file,split\n" + rows)
    argv = [*TINY, "--data", str(data), "--prior", "none", "--out", str(tmp_path / "run")]
    assert "no image is left to train on" in refused(capsys, *argv)


def test_an_empty_mask_of_the_sample_is_refused_by_region(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=24)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(data / "masks" / "heart" / "07.png")
    argv = [*TINY, "--data", str(data), "--sample", "07.png", "--out", str(tmp_path / "run")]
    assert "the masks of sample 07.png are empty for heart" in refused(capsys, *argv)


# Failures while training


def test_a_collapse_stops_the_run_and_keep_going_overrides(tmp_path, capsys):
    argv = [*TINY, "--prior", "none", "--epochs", "40", "--teacher-temp", "5"]
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--out", str(tmp_path / "stopped")])
    assert stop.value.code == 1 and "DINO has collapsed, uniform" in capsys.readouterr().err
    train.main([*argv, "--out", str(tmp_path / "on"), "--keep-going"])


def test_a_loss_that_is_not_finite_stops_the_run_by_name_before_the_weights_are_spoiled(
    tmp_path, capsys, monkeypatch
):
    steps, real, make, seen = iter(range(100)), pretrain.span_loss, loop.optimizer_for, []
    monkeypatch.setattr(
        pretrain, "span_loss", lambda *args: real(*args) * (float("nan") if next(steps) == 6 else 1)
    )
    monkeypatch.setattr(loop, "optimizer_for", lambda model, args: seen.append(model) or make(model, args))
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 1 and "step 6: the loss is nan" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in seen[0].parameters())


@pytest.mark.parametrize("flags", ["", "--ssl relvit", "--task classify", "--task classify --isnet 1"])
def test_an_absurd_learning_rate_ends_in_one_line_that_says_what_to_lower(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *flags.split(), "--lr", "1e9", "--epochs", "9", "--out", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert re.search(r"train.py: .*[Ll]ower --lr", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        MemoryError("Unable to allocate 3 TiB for an array"),
    ],
)
@pytest.mark.parametrize("where", [(loop, "learn"), (train, "prepare")])
def test_too_little_memory_ends_in_one_line_with_a_remedy(where, error, tmp_path, capsys, monkeypatch):
    def too_large(*args):
        raise error

    monkeypatch.setattr(*where, too_large)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--align", "none", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "not enough memory: raise --accumulate, or lower --batch-size" in said


def test_a_compiled_step_learns_the_same_and_what_cannot_be_compiled_is_said(tmp_path, monkeypatch, capsys):
    """Through torch.compile, but by a backend that needs no compiler."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    argv = [*TINY, "--align", "none", "--epochs", "1", "--out"]
    for name, flags in {"plain": [], "compiled": ["--compile"]}.items():
        train.main([*argv, str(tmp_path / name), *flags])
    plain, compiled = (load_run(tmp_path / name)[1]["history"][0]["loss"] for name in ("plain", "compiled"))
    assert plain == pytest.approx(compiled, rel=1e-5)

    def broken(graph, inputs):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, str(tmp_path / "broken"), "--compile"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "--compile can't be used here" in said and said.endswith("leave it out")


@pytest.mark.parametrize("flags", ["--train-images 1", "--train-images 3 --batch-size 1000000000"])
def test_a_single_image_and_a_batch_larger_than_the_data_are_trained_on(flags, tmp_path):
    train.main([*TINY, *flags.split(), "--align", "none", "--out", str(tmp_path / "run")])
    row, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open())
    assert math.isfinite(row["loss"]) and row["loss"] != last["loss"]  # a step an epoch


def test_a_step_with_an_infinite_gradient_changes_no_weight():
    model = torch.nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(FloatingPointError, match="step 7"):
        loss = (model.weight.sum() * 0).sqrt()  # finite, but its slope is not
        loss.backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        loop.descend(loss, model, optimizer, train.parse([])[0], step=7)
    assert torch.equal(model.weight, before)


def test_two_processes_train_as_one_does(tmp_path):
    """With the same batches and no random views: losses and weights of an ISNet ViT, up to rounding."""
    argv = ["train.py", *SMALL, "--backbone", "vit", "--isnet", "1", "--out"]
    train.main([*argv[1:], str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tmp_path / "two")], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    (_, one), (_, two) = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    for a, b in zip(one["history"], two["history"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert all((one["model"][name] - two["model"][name]).abs().max() < 1e-3 for name in one["model"])


def by_two_processes(folder: Path, name: str, flags: str, stop_at: int | None = None) -> list:
    """Two forks fit a line to 10 numbers, one may be stopped: [(indices, noise)], last words, weights."""
    args, threads = (
        train.parse([*flags.split(), "--batch-size", "4", "--out", str(folder)])[0],
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    processes, images = [], torch.zeros(10, 1, 2, 2)
    for rank in range(2):
        processes.append(os.fork())
        if processes[-1] == 0:
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
                dist.init_process_group("gloo", f"file://{folder}/{name}", rank=rank, world_size=2)
                torch.manual_seed(0)
                seen, model, said = [], torch.nn.Linear(1, 1), ""

                def losses(index, generator, done):
                    noise = torch.rand(len(index), 1, generator=generator)
                    noise = torch.cat([noise, torch.rand(1).expand(noise.shape)], dim=1)
                    seen.append((index, noise))
                    if len(seen) == stop_at and rank:
                        os.kill(os.getpid(), signal.SIGINT)
                    loss = model(index[:, None] + noise.sum(dim=1, keepdim=True)).square().mean()
                    return loss, {"loss": loss.detach()}

                try:
                    train.train(args, model, images, losses)
                except KeyboardInterrupt as stop:
                    said = str(stop)
                torch.save((seen, said, model.state_dict()), folder / f"{name}-{rank}.pt")
            finally:
                os._exit(0)
    for process in processes:
        os.waitpid(process, 0)
    torch.set_num_threads(threads)
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def test_each_process_trains_on_its_share_of_every_batch(tmp_path):
    """10 images in batches of 4, by two forks: 2 steps an epoch, and never an image twice in it."""
    (one, _, weights), (two, _, other_weights) = by_two_processes(tmp_path, "run", "--epochs 2")
    assert [len(index) for index, _ in one] == [len(index) for index, _ in two] == [2, 2, 2, 2]
    for epoch in range(2):
        steps = slice(2 * epoch, 2 * epoch + 2)
        assert len(set(torch.cat([index for index, _ in one[steps] + two[steps]]).tolist())) == 8
    noise = torch.cat([noise for _, noise in one + two])  # by the loop's generator, and by torch's
    assert len(set(noise[:, 0].tolist())) == 16 and len(set(noise[:, 1].tolist())) == 8  # its own in each
    assert torch.equal(weights["weight"], other_weights["weight"])


def test_two_processes_stop_together_and_resume_to_the_weights_of_a_run_that_never_stopped(tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = by_two_processes(tmp_path / "whole", "run", "--epochs 4")
    start(train.parse(["--epochs", "4", "--batch-size", "4", "--out", str(tmp_path / "stopped")])[0], [])
    stopped = by_two_processes(tmp_path / "stopped", "first", "--epochs 4", stop_at=3)  # within an epoch
    assert [len(seen) for seen, *_ in stopped] == [3, 3]
    assert all(said.startswith("torchrun --standalone --nproc-per-node 2 train.py") for _, said, _ in stopped)
    resumed = by_two_processes(tmp_path / "stopped", "second", "--epochs 4 --resume")
    assert torch.equal(whole[0][2]["weight"], resumed[0][2]["weight"])
    assert [len(seen) for seen, *_ in resumed] == [5, 5]


def test_a_batch_in_parts_gives_the_same_step_and_in_bfloat16_nearly(tmp_path):
    for name, flags in {"whole": "", "parts": "--accumulate 4", "amp": "--amp"}.items():
        argv = [*SMALL, "--backbone", "vit", *flags.split(), "--epochs", "1", "--out", str(tmp_path / name)]
        train.main(argv)
    whole, parts, amp = (load_run(tmp_path / name)[1] for name in ("whole", "parts", "amp"))
    assert all((whole["model"][k] - parts["model"][k]).abs().max() < 1e-4 for k in whole["model"])
    assert whole["history"][0]["loss"] == pytest.approx(parts["history"][0]["loss"], rel=1e-4)
    assert 0 < abs(whole["history"][0]["loss"] - amp["history"][0]["loss"]) < 0.02


@pytest.mark.parametrize("flags", ["", "--prior masks", "--ssl relvit", "--task classify --isnet 1"])
def test_images_that_stay_with_the_host_train_to_the_same_weights(flags, tmp_path, monkeypatch):
    argv = [*TINY, "--epochs", "1", "--keep-going", *flags.split(), "--out"]
    train.main([*argv, str(tmp_path / "resident")])
    for module in (train, pretrain):
        monkeypatch.setattr(module, "placed", Hosted)
    train.main([*argv, str(tmp_path / "hosted")])
    assert same_weights(tmp_path / "resident", tmp_path / "hosted")


def test_images_lie_on_a_gpu_unless_they_would_take_half_of_its_free_memory(monkeypatch):
    images = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (images.nbytes * 2 - 1, 10**9))
    assert isinstance(placed(images, "cuda:0"), Hosted) and isinstance(placed(images, "cpu"), torch.Tensor)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (images.nbytes * 2, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: device)  # there may be no GPU here
    assert placed(images, "cuda:0") == "cuda:0"


def test_a_classifier_that_stood_still_is_called_so(tmp_path, capsys):
    argv = [*SMALL, "--epochs", "1", "--out"]
    train.main([*argv, str(tmp_path / "still"), "--lr", "1e-9", "--isnet", "1"])
    assert "note: it has hardly learned: its loss is 0.7" in capsys.readouterr().out
    train.main([*argv[:-3], "--epochs", "12", "--marker", "1", "--out", str(tmp_path / "learns")])
    assert "hardly learned" not in capsys.readouterr().out


def test_the_weight_of_isnet_falls_while_training_goes_on(tmp_path):
    for end in ("0", "1"):
        argv = [*SMALL, "--isnet", "5", "--isnet-end", end, "--out", str(tmp_path / end)]
        train.main(argv)
    for row, other in zip(*(load_run(tmp_path / end)[1]["history"] for end in ("0", "1"))):
        weight = {
            end: (r["loss"] - r["classification"]) / (r["background"] + r["foreground"])
            for end, r in (("0", row), ("1", other))
        }
        assert weight["1"] == pytest.approx(5, rel=1e-3)
        assert weight["0"] == pytest.approx({1: 4.5, 2: 1.2}[row["epoch"]], abs=0.6)


def test_channels_last_is_another_layout_of_the_same_step(tmp_path):
    for name, flags in {"usual": [], "last": ["--channels-last"]}.items():
        argv = [*SMALL, "--backbone", "resnet", "--isnet", "1", *flags, "--epochs", "1", "--batch-size", "32"]
        train.main([*argv, "--out", str(tmp_path / name)])
    usual, last = (load_run(tmp_path / name)[1]["history"][0] for name in ("usual", "last"))
    assert usual["loss"] == pytest.approx(last["loss"], rel=1e-4)
    model = build_encoder(load_run(tmp_path / "last")[0], in_chans=1)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


@pytest.mark.parametrize("flags", ["", "--ssl relvit", "--local-crops-number 2"])
def test_pretraining_in_bfloat16_learns_nearly_the_same(flags, tmp_path):
    for name, precision in {"whole": [], "amp": ["--amp"]}.items():
        argv = [*TINY, *flags.split(), *precision, "--epochs", "1", "--align", "none", "--keep-going"]
        train.main([*argv, "--out", str(tmp_path / name)])
    whole, amp = (load_run(tmp_path / name)[1]["history"][0] for name in ("whole", "amp"))
    assert 0 < abs(whole["loss"] - amp["loss"]) < 0.1 * whole["loss"]
    assert whole["span_loss"] == pytest.approx(amp["span_loss"], rel=0.05)


def test_a_full_disk_leaves_the_last_checkpoint_usable_and_ends_in_one_line(tmp_path, monkeypatch, capfd):
    """No file may become larger than a limit that is set after the first checkpoint, which is larger."""
    process, real = os.fork(), loop.save
    if process == 0:
        try:
            torch.set_num_threads(1)

            def save_and_fill(*args):
                real(*args)
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

            monkeypatch.setattr(loop, "save", save_and_fill)
            train.main([*TINY, "--align", "none", "--out", str(tmp_path / "run")])
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: [Errno 27] File too large: ") and said.endswith("--resume goes on")
    assert len(load_run(tmp_path / "run")[1]["history"]) == 1
    assert not list((tmp_path / "run").glob("*.part"))


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--epochs", "500", "--out", str(tmp_path / "my run")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / "my run" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = f"stopped; python train.py --out '{tmp_path}/my run' --resume goes on from here"
    assert said in process.communicate()[0] and process.returncode == 130


class Evil:
    def __reduce__(self):
        return os.system, ("echo spoiled",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", Evil()])
def test_a_checkpoint_that_is_damaged_or_would_run_code_is_refused(content, run, tmp_path, capfd):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    if isinstance(content, Evil):
        torch.save(content, tmp_path / "last.pt")
    else:
        whole = (run / "last.pt").read_bytes()
        (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and "last.pt is damaged" in error and "\n" not in error.strip()
    assert "spoiled" not in out and "weights_only" not in error  # torch's advice would run it
    assert not isinstance(content, Evil) or "it holds posix.system, which might run code" in error


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    assert stop.value.code == 2 and "is not a run of train.py" in capsys.readouterr().err


# Classification

SMALL = "--task classify --train-images 32 --embed-dim 16 --depth 1 --num-heads 2 --batch-size 8"
SMALL = f"{SMALL} --epochs 2".split()


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_a_classifier_is_measured_with_the_marker_as_in_training_removed_and_flipped(
    backbone, tmp_path, capsys
):
    argv = [*SMALL, "--backbone", backbone, "--marker", "1", "--out", str(tmp_path / "isnet")]
    train.main([*argv, "--isnet", "1"])
    printed = capsys.readouterr().out
    assert "C1 " in printed and "C2 " in printed and "flipped" in printed
    metrics = json.loads((tmp_path / "isnet" / "metrics.json").read_text())
    for name in ("same", "removed", "flipped", "unseen"):
        for what in ("auc", "accuracy", "relevance_share"):
            assert 0 <= metrics[f"{what}_{name}"] <= 1
        assert metrics[f"auc_{name}_enlarged_heart"] == metrics[f"auc_{name}"]
    assert {"classification", "background", "foreground", "loss"} <= set(metrics)
    assert min(Image.open(tmp_path / "isnet" / "heatmaps.png").size) > 100
    train.main([*argv[:-1], str(tmp_path / "plain")])
    assert "C1 " not in capsys.readouterr().out
    evaluate.main([str(tmp_path / "isnet"), str(tmp_path / "plain"), "--rows", "3", "--only", "bias"])
    table = capsys.readouterr().out
    assert "isnet: flipped" in table and "plain: flipped" in table and "relevance share" in table
    assert f"{100 * metrics['auc_flipped']:.1f}" in table  # what train.py measured
    assert (tmp_path / "isnet" / "compare.png").exists()


def test_several_findings_are_measured_one_by_one(tmp_path):
    argv = [
        *SMALL,
        "--findings",
        "nodule",
        "opacity",
        "--isnet",
        "1",
        "--explain",
        "label",
        "--marker",
        "0.9",
    ]
    train.main([*argv, "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    both = [metrics[f"auc_flipped_{finding}"] for finding in ("nodule", "opacity")]
    assert metrics["auc_flipped"] == pytest.approx(np.mean(both))


def test_a_marker_that_tells_all_deceives_a_plain_classifier(tmp_path):
    argv = "--task classify --marker 1 --train-images 256 --embed-dim 16 --epochs 4 --lr 1e-2".split()
    train.main([*argv, "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["auc_same"] > 0.95 and metrics["auc_flipped"] < 0.1


def test_an_isnet_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    argv = [*SMALL, "--isnet", "1", "--marker", "1"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    real = loop.save

    def stop(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", stop)
    with pytest.raises(SystemExit):
        train.main([*argv, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(loop, "save", real)
    train.main(["--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (load_run(tmp_path / name)[1]["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_a_classifier_lacks_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in "abcdefghij":
        Image.new("L", (16, 16), ord(name)).save(tmp_path / "data" / "images" / f"{name}.png")
    folder = ["--task", "classify", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert "no training image" in refused(capsys, *folder) and "labels.csv" in refused(capsys, *folder)
    rows = [f"{name}.png,{i % 2}" for i, name in enumerate("abcdefghij")]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(["file,goitre", *rows]))
    assert "--isnet: no training image" in refused(capsys, *folder, "--isnet", "1")
    assert "marker can be drawn only on phantoms" in refused(capsys, *folder, "--marker", "1")
    assert "finding `gout` is not in" in refused(capsys, *folder, "--findings", "gout")
    assert "--lrp-gamma -1" in refused(capsys, *SMALL, "--lrp-gamma", "-1")
    assert "--isnet needs --task classify" in refused(capsys, "--isnet", "1", "--out", str(tmp_path / "run"))
    assert "--isnet-decay does nothing without --isnet" in refused(capsys, *SMALL, "--isnet-decay", "0.9")
    (tmp_path / "data" / "labels.csv").write_text(
        "file,label\n" + "\n".join(f"{n}.png,cat" for n in "abcdefghij")
    )
    assert "have the same labels" in refused(capsys, *folder)
    assert not (tmp_path / "run").exists()


def test_a_classifier_may_start_from_a_pretrained_encoder_in_its_sizes(run, tmp_path, capsys):
    argv = ["--task", "classify", "--train-images", "16", "--epochs", "1", "--lr", "1e-9", "--init", str(run)]
    train.main([*argv, "--out", str(tmp_path / "run")])
    config, checkpoint = load_run(tmp_path / "run")
    assert (config.backbone, config.embed_dim, config.lrp_gamma) == ("vit", 24, 0.0)
    before = load_run(run)[1]["model"]["student.blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(checkpoint["model"]["encoder.blocks.0.attn.qkv.weight"], before)
    capsys.readouterr()
    assert "encoder of other sizes" in refused(
        capsys, *argv, "--embed-dim", "12", "--out", str(tmp_path / "no")
    )


def test_without_labelled_test_images_a_classifier_is_trained_but_not_measured(tmp_path, capsys):
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = ["file,label,split"]
    for i, name in enumerate("abcdefgh"):
        Image.new("L", (16, 16), 30 * i).save(tmp_path / "data" / "images" / f"{name}.png")
        rows.append(f"{name}.png,{'cat' if i % 2 else 'dog'},train")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(rows))
    argv = "--task classify --img-size 16 --embed-dim 8 --epochs 1 --batch-size 4".split()
    train.main([*argv, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    assert "AUC can't be measured" in capsys.readouterr().out
    assert "auc_same" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    evaluate.main([str(tmp_path / "run")])
    said = capsys.readouterr().out
    for what in ("AUC", "AP", "knn", "linear"):
        assert f"{what} can't be measured" in said
    assert "compare.png" in said  # a picture there is


def test_a_run_stopped_before_it_trains_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130 and "if an epoch was finished, --resume" in capsys.readouterr().out
