"""A run survives kills, Ctrl-C, full disks and damage, and goes on to the weights of an unbroken one."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, Evil, epochs_of, image_folder, metrics_of, same_weights, save

import train
from common.checkpoint import FORMAT, load_run

MOVING = "--align none --local-crops-number 2 --flip 0.5 --drop-path 0.2".split()  # all that draws numbers
pytestmark = pytest.mark.usefixtures("few_test_images")


def forked(argv: list[str]) -> int:
    """A fork, which need not load torch again, that trains."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            train.main(argv)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    return process


@pytest.mark.slow
def test_a_run_killed_or_stopped_20_times_ends_at_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    """By Ctrl-C or SIGKILL at any moment, or with half a file on the disk, as when the power fails."""
    chance, killed, real = random.Random(0), tmp_path / "killed", os.fsync
    argv = [*TINY, *MOVING, "--epochs", "24", "--depth", "3"]
    os.waitpid(forked([*argv, "--out", str(tmp_path / "whole")]), 0)
    epoch, last = 32 / epochs_of(tmp_path / "whole")[-1]["images_per_s"], killed / "last.pt"  # seconds
    written, within, stops = [], [], 0

    def half(file):
        """In a fork: of its third file only a half reaches the disk."""
        written.append(file)
        if len(written) == 3 and stops < 20 and stops % 3 == 0:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)

    def changed() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    monkeypatch.setattr(os, "fsync", half)
    while not (killed / "metrics.json").exists():
        before, done = changed(), 0
        process = forked([*(["--resume"] if before else [*argv, "--overwrite"]), "--out", str(killed)])
        while not done and (stops >= 20 or changed() == before):
            done, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0.001)
        if not done and stops % 3:
            time.sleep(chance.uniform(0, 1.2 * epoch))
            os.kill(process, signal.SIGKILL if stops % 3 == 1 else signal.SIGINT)
        if not done:
            _, status = os.waitpid(process, 0)
        status = os.waitstatus_to_exitcode(status)
        assert status in (0, 130, -signal.SIGKILL)
        if status == 130:
            within.append(load_run(killed).checkpoint["begun"] is not None)
        stops += status != 0
    assert stops == 20 and any(within)
    runs = tmp_path / "whole", killed
    first, second = ([row | {"images_per_s": 0} for row in epochs_of(run)] for run in runs)
    assert same_weights(*runs) and first == second


def stopped_after_an_epoch(argv: list[str]) -> None:
    def save_and_stop(*args, real=train.save):
        real(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "save", save_and_stop)
        train.main(argv)
    assert stop.value.code == 130


def test_an_isnet_run_resumes_with_the_masks_that_it_kept(span_run, tmp_path, monkeypatch, refused):
    shutil.copytree(span_run, tmp_path / "span")
    argv = [*SMALL, "--isnet", "1", "--masks", str(tmp_path / "span"), "--out"]
    monkeypatch.setattr(train, "check_foreground", Mock())  # masks of so short a run leave no background
    train.main([*argv, str(tmp_path / "whole")])
    stopped_after_an_epoch([*argv, str(tmp_path / "stopped")])
    shutil.rmtree(tmp_path / "span")
    resume = "--out", str(tmp_path / "stopped"), "--resume"
    train.main(list(resume))
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert len({load_run(tmp_path / name).spec.relevance_range for name in ("whole", "stopped")}) == 1
    assert load_run(tmp_path / "whole").config.swap_margin == 0.0125  # made masks are kept narrower
    assert metrics_of(tmp_path / "whole")["mask_dice"] == metrics_of(tmp_path / "stopped")["mask_dice"]
    (tmp_path / "stopped" / "masks.pt").write_bytes(b"no masks")
    assert "masks.pt can't be read" in refused(train.main, *resume)


def test_an_isnet_run_on_images_that_are_labelled_in_part_resumes(tmp_path):
    """All images have masks, which cover 60 %, and half of them labels: no image is all foreground."""
    rows = [f"{i}.png,{i % 2 if i < 6 else ''},train" for i in range(12)]
    data = image_folder(tmp_path / "data", "file,sick,split", *rows, size=(20, 20))
    mask = np.repeat(np.arange(20) < 12, 20).reshape(20, 20).astype(np.uint8) * 255
    for i in range(12):
        save(data / "masks" / "spot" / f"{i}.png", mask)
    words = f"--isnet 1 --img-size 16 --batch-size 4 --data {data} --out {tmp_path / 'run'}"
    stopped_after_an_epoch([*SMALL[:4], "--epochs", "2", *words.split()])
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert len(load_run(tmp_path / "run").checkpoint["history"]) == 2


def test_a_finished_run_that_is_resumed_is_measured_again_and_not_trained(span_run, tmp_path, capsys):
    shutil.copytree(span_run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert same_weights(span_run, tmp_path / "run") and "trained in" not in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == pytest.approx(metrics_of(span_run))


def test_a_run_goes_on_though_its_data_moved_but_not_on_others(tmp_path, capsys, refused, monkeypatch):
    """Even if their folder was named as --masks names a source."""
    image_folder(tmp_path / "data", "file", *(f"{i}.png" for i in range(12)))
    monkeypatch.chdir(tmp_path)
    out, words = tmp_path / "run", "--img-size 16 --patch-size 4 --prior none --keep-going --data".split()
    stopped_after_an_epoch([*TINY[2:], *words, "data", "--out", str(out)])
    assert "if an epoch was finished, --resume continues after it" in capsys.readouterr().out
    (tmp_path / "data").rename(tmp_path / "moved")
    resume = "--out", str(out), "--resume"
    assert "is not a folder" in refused(train.main, *resume)
    train.main([*resume, "--data", str(tmp_path / "moved")])
    assert len(load_run(out).checkpoint["history"]) == 2 and "since --resume" in capsys.readouterr().out
    train.main(list(resume))  # it remembers where the data lie now
    for name in ("labels.csv", "images/3.png"):
        (tmp_path / "moved" / name).unlink()
    assert "learned images" in refused(train.main, *resume)


def test_a_full_disk_leaves_the_last_checkpoint_usable_and_ends_in_one_line(tmp_path, monkeypatch, capfd):
    """No file may become larger than a limit that is set after the first checkpoint, which is larger."""
    out, real = tmp_path / "run", train.save

    def save_and_fill(*args):
        real(*args)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    monkeypatch.setattr(train, "save", save_and_fill)
    monkeypatch.setattr(os, "dup2", lambda *files: None)  # the fork shows what it prints
    process = forked([*TINY, "--align", "none", "--out", str(out)])
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"train.py: [Errno 27] File too large: '{out}/last.pt'")
    assert line.endswith("continue with --resume")
    assert len(load_run(out).checkpoint["history"]) == 1 and not list(out.glob("*.part"))
    assert len(epochs_of(out)) == 2  # no checkpoint is ahead of its rows


@pytest.mark.parametrize("change, line", [
    ({"format": 1}, f"written by another version of train.py (format 1, here {FORMAT})"),
    ({"settings": {"epochs": 3}}, "last.pt is damaged"),
    ({"spec": {}}, "last.pt is damaged"),
    ({"spec": Evil()}, "last.pt is damaged (it holds posix.system, which might run code)"),
    (None, "last.pt is damaged"),  # one bit of the weights
])  # fmt: skip
def test_an_old_damaged_or_evil_checkpoint_is_refused(change, line, span_run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text((span_run / "config.json").read_text())
    whole = bytearray((span_run / "last.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    Path("last.pt").write_bytes(whole)
    if change:
        torch.save(torch.load(span_run / "last.pt", weights_only=True) | change, "last.pt")
    said = refused(train.main, "--out", ".", "--resume")
    assert line in said and "weights_only" not in said  # torch's advice would run it
    assert not Path("spoiled").exists()
