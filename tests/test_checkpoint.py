"""A run survives kills, Ctrl-C, full disks and damaged files, and goes on to the weights of an unbroken one."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, same_weights
from PIL import Image

import evaluate
import train
from common.checkpoint import load_run, write_file

ROOT = Path(__file__).parents[1]
MOVING = "--align none --local-crops-number 2 --flip 0.5 --drop-path 0.2".split()  # all that draws numbers
pytestmark = pytest.mark.usefixtures("few_test_images")


def in_a_process_of_its_own(argv: list[str]) -> int:
    """A fork, which need not load torch again, that trains with one thread, as a forked process must."""
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


def finished_in_spite_of(stop, argv: list[str], out: Path) -> int:
    """Starts a run and goes on until it is done; stop(process, n) may end it meanwhile; how often it did."""
    stops = 0
    while not (out / "metrics.json").exists():
        how = ["--resume"] if (out / "last.pt").exists() else [*argv, "--overwrite"]
        stops += stop(in_a_process_of_its_own([*how, "--out", str(out)]), stops)
    return stops


def same_rows(*runs: Path) -> bool:
    """Whether the runs logged the same, but for their speed."""
    logs = [[json.loads(line) | {"images_per_s": 0} for line in (r / "metrics.jsonl").open()] for r in runs]
    return all(log == logs[0] for log in logs)


@pytest.mark.slow
def test_a_run_killed_20_times_ends_at_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    """By SIGKILL, at any moment, or with half a file on the disk, as when the power fails."""
    threads, chance, killed, real = torch.get_num_threads(), random.Random(0), tmp_path / "killed", os.fsync
    argv = [*TINY, *MOVING, "--epochs", "24", "--depth", "3"]
    os.waitpid(in_a_process_of_its_own([*argv, "--out", str(tmp_path / "whole")]), 0)
    last_row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    epoch = 32 / last_row["images_per_s"]

    def half(file):
        """In a fork: of its third file only a half reaches the disk."""
        written.append(file)
        if len(written) == 3 and len(plan) < 20:
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
    """After 3, 5, 1 and 4 of its steps, 4 of which are an epoch."""
    threads, stopped, real, calls, after = torch.get_num_threads(), tmp_path / "stopped", train.train_step, [], []
    argv = [*TINY, *MOVING, "--epochs", "4"]
    os.waitpid(in_a_process_of_its_own([*argv, "--out", str(tmp_path / "whole")]), 0)

    def step(*args):
        calls.append(args)
        if len(calls) == [3, 5, 1, 4, 99][len(after)]:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    def stop(process, stops):
        os.waitpid(process, 0)
        after.append(load_run(stopped).checkpoint["begun"] is not None)
        return len(after) < 5

    monkeypatch.setattr(train, "train_step", step)
    assert finished_in_spite_of(stop, argv, stopped) == 4 and after == [True] * 4 + [False]
    torch.set_num_threads(threads)
    assert same_weights(tmp_path / "whole", stopped) and same_rows(tmp_path / "whole", stopped)


def stopped_after_an_epoch(monkeypatch, argv: list[str]) -> None:
    real = train.save

    def save_and_stop(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(SystemExit):
        train.main(argv)
    monkeypatch.setattr(train, "save", real)


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_an_isnet_run_resumes_with_its_masks_though_what_made_them_has_gone(
    backbone, span_run, tmp_path, monkeypatch, refused
):
    shutil.copytree(span_run, tmp_path / "span")
    argv = [*SMALL, "--isnet", "1", "--backbone", backbone, "--masks", str(tmp_path / "span"), "--out"]
    train.main([*argv, str(tmp_path / "whole")])
    stopped_after_an_epoch(monkeypatch, [*argv, str(tmp_path / "stopped")])
    shutil.rmtree(tmp_path / "span")
    resume = "--out", str(tmp_path / "stopped"), "--resume"
    train.main(list(resume))
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert len({load_run(tmp_path / name).spec.relevance_range for name in ("whole", "stopped")}) == 1
    dice = {json.loads((tmp_path / n / "metrics.json").read_text())["mask_dice"] for n in ("whole", "stopped")}
    assert len(dice) == 1
    (tmp_path / "stopped" / "masks.pt").write_bytes(b"no masks")
    assert "masks.pt can't be read" in refused(train.main, *resume)


def test_rows_that_a_kill_kept_from_being_written_are_written_when_the_run_goes_on(span_run, tmp_path):
    shutil.copytree(span_run, tmp_path / "run")
    rows = (span_run / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(rows.splitlines()[0] + "\n")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_a_run_whose_data_moved_goes_on_and_one_whose_settings_were_edited_does_not(
    tmp_path, monkeypatch, refused
):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i in range(12):
        Image.new("L", (16, 16), 20 * i).save(tmp_path / "data" / "images" / f"{i}.png")
    out = tmp_path / "run"
    words = "--img-size 16 --patch-size 4 --prior none --keep-going --data".split()
    stopped_after_an_epoch(monkeypatch, [*TINY[2:], *words, str(tmp_path / "data"), "--out", str(out)])
    (tmp_path / "data").rename(tmp_path / "moved")
    resume = "--out", str(out), "--resume"
    assert "is not a folder" in refused(train.main, *resume)
    record = (out / "config.json").read_text()
    (out / "config.json").write_text(record.replace('"lr": 0.002', '"lr": 0.1'))
    assert "was started with --lr 0.002, not 0.1" in refused(train.main, *resume)
    (out / "config.json").write_text("no json")
    assert "something else than a run" in refused(train.main, *resume)
    (out / "config.json").write_text(record)
    train.main([*resume, "--data", str(tmp_path / "moved")])
    assert len(load_run(out).checkpoint["history"]) == 2
    train.main(list(resume))  # it remembers where the data lie now


@pytest.mark.parametrize("words", ["--prior none", "--prior statistics", "--data parts", "--masks prior"])
def test_a_resumed_run_keeps_the_data_priors_and_masks_that_it_was_trained_on(words, span_run, refused):
    line = refused(train.main, "--out", str(span_run), "--resume", *words.split())
    assert f"was started with {words.split()[0]} " in line and f", not {words.split()[1]}" in line
    line = refused(train.main, "--out", str(span_run), "--resume", "--config", str(span_run))
    assert "leave out either" in line


def test_a_full_disk_leaves_the_last_checkpoint_usable_and_ends_in_one_line(tmp_path, monkeypatch, capfd):
    """No file may become larger than a limit that is set after the first checkpoint, which is larger."""
    process, real = os.fork(), train.save
    if process == 0:
        try:
            torch.set_num_threads(1)

            def save_and_fill(*args):
                real(*args)
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

            monkeypatch.setattr(train, "save", save_and_fill)
            train.main([*TINY, "--align", "none", "--out", str(tmp_path / "run")])
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: [Errno 27] File too large: ") and said.endswith("continue with --resume")
    assert len(load_run(tmp_path / "run").checkpoint["history"]) == 1
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="a.json"):
        write_file(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--epochs", "500", "--out", str(tmp_path / "my run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "my run" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = f"stopped; python train.py --out '{tmp_path}/my run' --resume continues from here"
    assert said in process.communicate()[0] and process.returncode == 130


def test_a_run_stopped_before_it_trains_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_data", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130 and "if an epoch was finished, --resume" in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return os.system, ("echo spoiled",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", Evil()])
def test_a_checkpoint_that_is_damaged_or_would_run_code_is_refused(content, span_run, tmp_path, capfd):
    if isinstance(content, Evil):
        torch.save(content, tmp_path / "last.pt")
    else:
        whole = (span_run / "last.pt").read_bytes()
        (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and "last.pt is damaged" in error and "\n" not in error.strip()
    assert "spoiled" not in out and "weights_only" not in error  # torch's advice would run it
    assert not isinstance(content, Evil) or "it holds posix.system, which might run code" in error


def test_a_checkpoint_of_another_version_or_with_something_missing_is_refused(span_run, tmp_path, refused):
    (tmp_path / "config.json").write_text((span_run / "config.json").read_text())
    whole = torch.load(span_run / "last.pt", weights_only=True)
    for change, line in (
        ({"format": 1}, "written by another version of train.py (format 1, here 2)"),
        ({"torch_rng": None}, "last.pt does not fit its settings"),
        ({"model": {}}, "last.pt does not fit its settings"),
        ({"optimizer": None}, "last.pt does not fit its settings"),
        ({"begun": 3}, "last.pt does not fit its settings"),
        ({"settings": 3}, "last.pt is damaged"),
        ({"settings": {"epochs": 3}}, "last.pt is damaged"),
        ({"spec": {}}, "last.pt is damaged"),
    ):
        torch.save(whole | change, tmp_path / "last.pt")
        assert line in refused(train.main, "--out", str(tmp_path), "--resume")
    del whole["optimizer"]
    torch.save(whole, tmp_path / "last.pt")
    assert "does not fit its settings (KeyError" in refused(train.main, "--out", str(tmp_path), "--resume")


def test_a_folder_that_is_no_run_is_refused(tmp_path, refused):
    assert "is not a run of train.py" in refused(evaluate.main, str(tmp_path))
