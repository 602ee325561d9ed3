"""The chain from data to table on the command line: what it learns, what it leaves, how it fails."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, TINY, epochs_of, image_folder, metrics_of, refuses, same_weights, save, seeded
from conftest import trained
from PIL import Image
from torch.multiprocessing import start_processes

import evaluate
import train
from common.checkpoint import DataSpec, Run, check_spec, data_spec, load_run, start_run
from common.checks import check
from common.classify import Classifier, classification_loss
from common.config import LENGTHS, parse
from common.data import Data, prepared
from common.explain import related
from common.models import build_encoder, build_model, decayed, load_model
from common.phantom import REGIONS, phantom
from common.processes import Collapse, fail, from_first, join
from dino import DINO
from relvit import RelViT
from vit import Features, ViT

ROOT, SPEC = Path(__file__).parents[1], DataSpec(1, (), False, "")
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # by torchrun
pytestmark = pytest.mark.usefixtures("few_test_images")


def test_a_run_leaves_its_settings_its_metrics_its_weights_and_its_pictures(span_run):
    metrics = metrics_of(span_run)
    for what in ("prior", "aligned_prior", "attention"):
        values = [metrics[f"{what}_AP_{region.replace(' ', '_')}"] for region in REGIONS]
        assert metrics[f"{what}_mAP"] == pytest.approx(np.mean(values)) and 0 < min(values) <= 1
    assert metrics["aligned_prior_mAP"] > metrics["prior_mAP"] + 0.1  # registration is worth something
    first, second = epochs_of(span_run)
    assert {"loss", "span_loss", "teacher_entropy", "kl", "prototypes"} <= set(first)
    assert [first["epoch"], second["epoch"]] == [1, 2]
    config = json.loads((span_run / "config.json").read_text())
    assert config["embed_dim"] == 24 and config["command"].startswith("python train.py --train-images 32")
    assert list(load_run(span_run).masses) == REGIONS
    for picture in ("attention.png", "curves.png"):
        assert min(Image.open(span_run / picture).size) > 100
    assert not list(span_run.glob("*.part"))


def test_a_seed_gives_the_same_weights_again_and_so_does_a_run_s_config(span_run, tmp_path):
    train.main(["--config", str(span_run / "config.json"), "--out", str(tmp_path / "again")])
    assert same_weights(span_run, tmp_path / "again")


def test_an_existing_run_is_neither_overwritten_nor_resumed_unless_asked_to(span_run, tmp_path, refused):
    before = (span_run / "last.pt").read_bytes()
    line = refused(train.main, *TINY, "--out", str(span_run))
    assert "holds a run: --resume continues it, --overwrite starts again" in line
    resume = "--out", str(span_run), "--resume"
    for words in ("epochs 15", "prior none", "prior statistics", "data parts", "masks prior"):
        flag, value = words.split()
        line = refused(train.main, *resume, f"--{flag}", value)
        assert f"was started with {flag} " in line and f", not {value}: leave out --{flag}" in line
    assert "with amp off, not on: leave out --amp" in refused(train.main, *resume, "--amp")
    assert "leave out either" in refused(train.main, *resume, "--config", str(span_run))
    assert "choose one" in refused(train.main, *resume, "--overwrite")
    assert "check --out; --overwrite" in refused(train.main, "--out", str(tmp_path / "new"), "--resume")
    for name, content in [("dead", (span_run / "config.json").read_text()), ("other", '{"model": "vit"}')]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    assert "--overwrite starts again" in refused(train.main, "--out", str(tmp_path / "dead"), "--resume")
    assert "other than a run" in refused(train.main, "--out", str(tmp_path / "other"), "--overwrite")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "something other than a run" in refused(train.main, "--out", str(tmp_path), "--overwrite")
    assert "Not a directory: " in refused(train.main, "--out", str(tmp_path / "thesis.txt"))
    line = refused(train.main, "--data=nowhere", "--out", str(span_run))  # mistyped
    assert "nowhere is not a folder" in line and "overwrite" not in line
    assert (span_run / "last.pt").read_bytes() == before and not (tmp_path / "new").exists()


def folder_of_phantoms(path: Path, masked: int) -> Path:
    """A user's folder: 24 images, the first `masked` of them with masks."""
    images, masks, _ = phantom(24, seed=3)
    for i in range(24):
        save(path / "images" / f"{i:02d}.png", images[i, 0].numpy())
        for r, region in enumerate(REGIONS[: 3 if i < masked else 0]):
            save(path / "masks" / region / f"{i:02d}.png", masks[i, r].numpy())
    return path


def test_images_without_a_label_do_not_dilute_a_classifier_s_loss(tmp_path, capsys):
    rows = [f"{i}.png,{i % 2 if i < 4 else ''},train" for i in range(12)]
    data = image_folder(tmp_path / "data", "file,sick,split", *rows)
    trained(tmp_path / "run", f"--data {data} --img-size 16 --batch-size 4 --lr 1e-9", SMALL)
    said = capsys.readouterr().out
    assert "note: 8 of 12 training images have no label and are left out of training" in said
    assert "2 epoch(s) of 1 step(s)" in said and "is no better than a constant prediction" in said
    for row in rows:
        save(data / "masks" / "spot" / row.split(",")[0], np.eye(16, dtype=np.uint8) * 255)
    trained(tmp_path / "isnet", f"--data {data} --img-size 16 --batch-size 4 --isnet 1", SMALL)
    said = capsys.readouterr().out
    assert "2 epoch(s) of 1 step(s)" in said and "C1 " in said and "C2 " in said
    assert "the foreground of 12 of 12 training images is known" in said


def test_a_folder_with_one_labelled_image_trains_and_says_what_is_missing(tmp_path, capsys):
    data = folder_of_phantoms(tmp_path / "mine", masked=1)
    (data / "images" / "05.png").write_bytes(b"")
    trained(tmp_path / "run", f"--data {data}")
    printed, error = capsys.readouterr()
    assert "note: skipped" in printed and "05.png: this image cannot be read" in printed
    assert "no test image" in printed and "can't be measured" in printed
    assert len(re.findall(r"^epoch \d/2: loss [\d.]+, span_loss .* img/s$", printed, re.MULTILINE)) == 2
    assert "img" not in error and (tmp_path / "run" / "attention.png").exists()


def test_a_small_folder_is_passed_over_more_often_if_no_epochs_are_typed(tmp_path, monkeypatch):
    """24 images: 4 of them test, 4 validate, so an epoch has 2 steps of 8."""
    monkeypatch.setitem(LENGTHS, "pretrain", (2, 5))
    data = folder_of_phantoms(tmp_path / "mine", masked=24)
    trained(tmp_path / "run", f"--prior none --data {data}", TINY[:-2])
    assert len(epochs_of(tmp_path / "run")) == 3


def test_what_a_folder_lacks_is_said_in_one_line(tmp_path, refused):
    data = folder_of_phantoms(tmp_path / "mine", masked=0)
    where = "--data", str(data), "--out", str(tmp_path / "run")
    assert "add masks of one image, or take --prior statistics or none" in refused(train.main, *TINY, *where)
    assert "has a mask for every region" in refused(train.main, *TINY, *where, "--prior", "masks")
    assert "add labels.csv" in refused(train.main, *SMALL, *where)
    for header, cells, flags, line in (
        ("split", ["test"], [*TINY, "--prior", "none"], "look at the column split"),
        ("goitre", ["0", "1"], [*SMALL, "--isnet", "1"], "one of train must have them"),
        ("label", ["cat"], SMALL, "have the same labels"),
    ):
        rows = [f"file,{header}", *(f"{i:02d}.png,{cells[i % len(cells)]}" for i in range(24))]
        (data / "labels.csv").write_text("\n".join(rows))
        assert line in refused(train.main, *flags, *where)
    data = folder_of_phantoms(tmp_path / "empty", masked=24)
    save(data / "masks" / "heart" / "07.png", np.zeros((64, 64), np.uint8))
    where = "--data", str(data), "--sample", "07.png", "--out", str(tmp_path / "run")
    assert "the masks of 07.png are empty for heart" in refused(train.main, *TINY, *where)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_collapse_stops_a_run_but_a_guided_one_goes_on_by_span_alone(tmp_path, capsys, refused):
    """Unless --strict stops the guided one, or --keep-going lets the other go on."""
    words = "--epochs 160 --teacher-temp 5 --koleo 0 --max-entropy 1"
    argv = [*TINY, *words.split(), "--out", str(tmp_path / "stopped"), "--overwrite"]
    assert "DINO has collapsed, uniform" in refused(train.main, *argv, "--prior", "none", status=1)
    trained(tmp_path / "kept", f"{words} --prior none --epochs 1 --keep-going")
    trained(tmp_path / "on", f"{words} --align none")
    assert capsys.readouterr().out.count("continues with SPAN alone") == 1
    first, *_, last = epochs_of(tmp_path / "on")
    assert last["span_loss"] < 0.5 * first["span_loss"]
    assert last["loss"] == pytest.approx(3 * last["span_loss"], rel=1e-4)  # its weight is 3
    assert "DINO has collapsed" in refused(train.main, *argv, "--align", "none", "--strict", status=1)
    assert load_run(tmp_path / "stopped").masses and load_run(tmp_path / "on").masses  # for --masks RUN


@pytest.mark.parametrize("bad", [lambda w: w.sum() * math.nan, lambda w: (w.sum() * 0).sqrt()])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_no_weight(bad):
    """The second one is finite, but its slope is not."""
    model, config = torch.nn.Linear(1, 1), parse([])[0]
    before, times = model.weight.clone(), []
    losses = lambda index, generator, *when: times.append(when) or (bad(model.weight), {})  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(FloatingPointError, match="step 7 is not taken: the loss is .* Lower --lr"):
        train.train_step(config, model, losses, optimizer, torch.arange(2), torch.Generator(), 7, 14)
    assert torch.equal(model.weight, before) and times == [(7, 14)]


@pytest.mark.parametrize("words", ["", "--task classify --isnet 1"])
def test_an_absurd_learning_rate_ends_in_one_line_that_says_what_to_lower(words, tmp_path, refused):
    small = SMALL if "classify" in words else TINY
    argv = [*small, *words.split(), "--lr", "1e9", "--epochs", "9", "--out", str(tmp_path / "run")]
    assert re.search(r"train.py: .*[Ll]ower (--lr|the learning rate)", refused(train.main, *argv, status=1))


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory ..."
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA ..."), MemoryError(), RuntimeError(ALLOCATOR)
OUT_OF_MEMORY += RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ..."), RuntimeError(CUBLAS)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_ends_in_one_line_with_a_remedy(error, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(train, "load_data", Mock(side_effect=error))
    line = refused(train.main, *TINY, "--out", str(tmp_path / "run"), status=1)
    assert "not enough memory: raise --accumulate, or lower --batch-size" in line
    monkeypatch.setattr(evaluate, "draw_pictures", Mock(side_effect=error))
    line = refused(evaluate.main, str(tmp_path), "--image", __file__, "--device", "cpu", status=1)
    assert line == "evaluate.py: not enough memory: end other programs"


@pytest.mark.slow
def test_a_compiled_step_learns_the_same_and_what_cannot_be_compiled_is_said(tmp_path, monkeypatch, refused):
    """Through torch.compile, but by a backend that needs no compiler."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    plain, compiled = two_losses(tmp_path, "--align none", "--compile")
    assert plain == pytest.approx(compiled, rel=1e-5)
    broken = Mock(side_effect=RuntimeError("there is no compiler"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=broken))
    torch._dynamo.reset()
    argv = *TINY, "--align", "none", "--out", str(tmp_path / "broken"), "--compile"
    line = refused(train.main, *argv, status=1)
    assert "--compile can't be used here" in line and line.endswith("leave it out")


@pytest.mark.parametrize("words", ["1 --koleo 0 --max-entropy 1", "3 --batch-size 1000000000"])
def test_a_single_image_and_a_batch_larger_than_the_data_are_trained_on(words, tmp_path):
    trained(tmp_path / "run", f"--align none --train-images {words}")
    states = load_run(tmp_path / "run").checkpoint["optimizer"]["state"].values()
    assert {float(state["step"]) for state in states} == {2.0}  # one in each epoch
    assert all(math.isfinite(row["loss"]) for row in epochs_of(tmp_path / "run"))


def two_losses(tmp_path: Path, words: str, flags: str, tiny: list[str] = TINY) -> list[float]:
    """The losses of an epoch without and with some flags."""
    runs = {"without": f"{words} --epochs 1", "with": f"{words} {flags} --epochs 1"}
    return [trained(tmp_path / name, words, tiny)["loss"] for name, words in runs.items()]


def test_a_step_has_the_scheduled_learning_rate_and_a_clipped_gradient():
    config, model = parse("--lr 0.5 --warmup 0.5 --clip-grad 2".split())[0], torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    # A gradient of norm 200, of which 2 are left.
    losses = lambda *_: (100 * model.weight.sum(), {})  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train.train_step(config, model, losses, optimizer, torch.arange(2), seeded(), 0, 10)
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), -0.1))  # 0.5 / 5 in the first step


def test_dino_is_built_with_its_settings():
    config, _ = parse("--koleo 0.3 --max-entropy 0.7 --center-momentum 0.6 --out-dim 32".split())
    model = build_model(config, SPEC, build_encoder(config, 1), (8, 8))
    found = model.koleo, model.max_entropy, model.loss.center_momentum, model.loss.center.shape[1]
    assert found == (0.3, 0.7, 0.6, 32)


def test_matrices_of_the_student_decay_and_vectors_do_not():
    dino = DINO(ViT(16, 4, 1, 12, 1, 3), 12, 16, 8, 4)
    matrices, vectors = decayed(dino, 0.04)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.04, 0.0)
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() < 2 for p in vectors["params"])
    student = [*dino.student.parameters(), *dino.student_head.parameters()]
    learned = {id(p) for p in student if p.requires_grad}
    assert {id(p) for group in (matrices, vectors) for p in group["params"]} == learned


@pytest.mark.parametrize("images, sizes", [(16, [3, 3, 2, 2, 2, 2, 2]), (3, [1, 1, 1])])
def test_a_batch_in_even_parts_gives_the_same_step(images, sizes):
    """`Tensor.chunk` would split 16 images for 7 parts into five of 3 and one of 1, which swaps nothing."""
    x, seen, weights = torch.rand(images, 1), [], []
    for parts in (1, 7):
        model, config = torch.nn.Linear(1, 1, bias=False), parse(["--accumulate", str(parts)])[0]
        torch.nn.init.ones_(model.weight)

        def losses(i: torch.Tensor, *_, model=model) -> tuple[torch.Tensor, dict]:
            seen.append(len(i))
            return model(x[i]).square().mean(), {}

        optimizer, index = torch.optim.SGD(model.parameters()), torch.arange(images)
        train.train_step(config, model, losses, optimizer, index, seeded(), 0, 10)
        weights.append(model.weight.item())
    assert seen == [images, *sizes] and weights[0] == pytest.approx(weights[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--keep-going", "--ssl relvit", "--task classify"])
def test_bfloat16_learns_nearly_the_same(words, tmp_path):
    whole, amp = two_losses(tmp_path, words, "--amp", SMALL if "classify" in words else TINY)
    assert 0 < abs(whole - amp) < 0.1 * whole


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_two_processes_train_as_one_does(backbone, tmp_path):
    """With the same batches and nothing random: losses and weights of an ISNet, up to rounding."""
    words = f"--backbone {backbone} --isnet 1 --swap 0 --shift 0 --epochs 1"
    trained(tmp_path / "one", words, SMALL)
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 train.py".split()]
    argv = *command, *SMALL, *words.split(), "--out", str(tmp_path / "two")
    subprocess.run(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    one, two = (load_run(tmp_path / name).checkpoint for name in ("one", "two"))
    for a, b in zip(one["history"], two["history"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert all((one["model"][name] - two["model"][name]).abs().max() < 1e-3 for name in one["model"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_no_thread_outlives_the_group_of_processes():
    """One that ends a message while Python shuts down aborts a training that is done (exit status -6)."""
    code = """
import os, torch, torch.distributed as dist
from common.processes import join
join("cpu", 4)
dist.all_reduce(torch.ones(3))
torch.optim.AdamW([torch.ones(1, requires_grad=True)])
dist.destroy_process_group()
print([open(f"/proc/self/task/{name}/comm").read() for name in os.listdir("/proc/self/task")])
"""
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ | ALONE, text=True)
    assert "python" in said and "gloo" not in said


def by_two_processes(folder: Path, name: str, words: str, stop_at: int | None = None) -> list:
    """Two forks fit a line to 10 numbers, one may be stopped: [(indices, noise)], last words, weights ..."""
    config, _ = parse([*words.split(), "--batch-size", "4", "--out", str(folder)])

    def process(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        dist.init_process_group("gloo", f"file://{folder}/{name}", rank=rank, world_size=2)
        torch.manual_seed(rank)
        batches, model, last_words = [], torch.nn.Linear(1, 1), ""

        def losses(index, generator, step, total):
            noise = torch.rand(len(index), 1, generator=generator)
            noise = torch.cat([noise, torch.rand(1).expand(noise.shape)], dim=1)
            batches.append((index, noise))
            if len(batches) == stop_at and rank:
                os.kill(os.getpid(), signal.SIGINT)
            return model(index[:, None] + noise.sum(dim=1, keepdim=True)).square().mean(), {}

        checkpoint, history = load_run(folder).checkpoint if config.resume else None, []
        try:
            history = train.train(config, SPEC, model, torch.zeros(10, 1, 2, 2), losses, checkpoint, dict)
        except KeyboardInterrupt as stop:
            last_words = str(stop)
        logged = [row["loss"] for row in history]
        result = batches, last_words, model.state_dict(), from_first(f"by {rank}"), logged
        torch.save(result, folder / f"{name}-{rank}.pt")

    start_processes(process, nprocs=2, start_method="fork")
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def test_two_processes_share_every_batch_stop_together_and_resume_to_the_weights_of_an_unbroken_run(tmp_path):
    """10 images in batches of 4, by two forks: 2 steps an epoch, and never an image twice in it."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = (one, _, *same), (two, _, *other) = by_two_processes(tmp_path / "whole", "run", "--epochs 4")
    assert [len(index) for index, _ in one] == [len(index) for index, _ in two] == [2] * 8
    for epoch in range(4):
        steps = slice(2 * epoch, 2 * epoch + 2)
        assert len(set(torch.cat([index for index, _ in one[steps] + two[steps]]).tolist())) == 8
    drawn = torch.cat([noise for _, noise in one + two])  # by the loop's generator, and by torch's
    assert len(set(drawn[:, 0].tolist())) == 32 and len(set(drawn[:, 1].tolist())) == 16  # its own in each
    assert same == other and same[1] == "by 0"  # though each was started with other weights
    start_run(parse(["--batch-size", "4", "--out", str(tmp_path / "stopped")])[0], SPEC, [])
    stopped = by_two_processes(tmp_path / "stopped", "first", "--epochs 4", stop_at=3)  # within an epoch
    assert [len(batches) for batches, *_ in stopped] == [3, 3]
    assert all(words.endswith("stopped --resume continues from here") for _, words, *_ in stopped)
    resumed = by_two_processes(tmp_path / "stopped", "second", "--epochs 4 --resume")
    assert whole[0][2] == resumed[0][2] and [len(batches) for batches, *_ in resumed] == [5, 5]
    assert whole[0][4] == resumed[0][4]  # what was logged in an epoch that was stopped


def test_a_process_opens_no_gpu_but_its_own_in_full_precision(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default for convolutions
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    opened, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device="cpu": opened.append(device) or zeros(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", opened.append)
    monkeypatch.setattr(dist, "init_process_group", opened.append)
    check(*parse(["--device", "cuda"]))
    for shared in ("cuda:1", "mps"):
        refuses(f"{shared} can't be shared by 2 processes: take cuda, a GPU", join, shared, 4)
    assert not opened and join("cuda", 4) == "cuda:1"
    assert opened == ["cuda:1", "cuda:1", "nccl"] and not torch.backends.cudnn.allow_tf32


def test_what_ends_all_processes_is_said_by_the_first_and_what_may_end_one_by_that_one(monkeypatch, capsys):
    printed = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        for error, status in ((ValueError("input"), 2), (Collapse("collapse"), 1), (OSError("disk"), 1)):
            with pytest.raises(SystemExit) as stop:
                fail("train.py", error, status)
            assert stop.value.code == status
        printed[rank] = capsys.readouterr().err.split()[1::2]
    assert printed == {"0": ["input", "collapse", "disk"], "1": ["disk"]}


def test_a_marker_that_tells_all_deceives_a_plain_classifier(tmp_path, capsys):
    words = "--marker 1 --train-images 256 --epochs 4 --lr 1e-2 --batch-size 16"
    metrics = trained(tmp_path / "run", words, SMALL)
    assert metrics["auc_same"] > 0.95 and metrics["auc_flipped"] < 0.1
    assert min(Image.open(tmp_path / "run" / "heatmaps.png").size) > 100
    assert "constant prediction" not in capsys.readouterr().out


def test_a_run_is_not_resumed_on_other_classes_images_labels_or_regions_than_it_was_trained_on(tmp_path):
    def pets(names: str = "abc", findings: str = "cat dog", labels=((0.0, 1), (1, 1), (1, 0))) -> DataSpec:
        images, known = torch.zeros(3, 1, 8, 8).byte(), torch.zeros(3).bool()
        data = Data(images, None, known, torch.tensor(labels), list(names), [], findings.split())
        return data_spec(data, True, "mine")

    def guided(reference: str, prior: str = "sample", area: int = 4) -> DataSpec:
        masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        masks[:, :, :area] = True
        data = Data(masks.byte(), masks, torch.ones(2).bool(), None, ["a", "b"], ["heart"], [])
        return data_spec(data, False, "mine", prior, reference)

    def resumed(was: DataSpec, now: DataSpec, *regions: str, words: str = "", goes_on: bool = True) -> None:
        run = Run(parse(words.split())[0], was, {"heart": 0.6}, {})
        check_spec(Path("run"), run, now, [*regions], "mine", goes_on)

    resumed(guided("a"), guided("a"), "heart")
    resumed(guided("a", "none"), guided("a"), "heart")  # a run from before priors were recorded
    every = [guided("a", "masks", area) for area in (3, 4)]
    refuses("learned priors all masks", resumed, *every, words="--prior masks", goes_on=False)
    resumed(guided("a"), guided("b", "none"), "heart")  # the reference's masks are gone
    for other in (guided("b"), guided("a", area=3), guided("a", "masks")):
        refuses("run learned priors a .hash of its masks", resumed, guided("a"), other, "heart")
    for content in "ab":
        (tmp_path / content).write_text(content)
    of_files = [guided("a", str(tmp_path / content)) for content in "ab"]
    refuses("run learned priors a file", resumed, *of_files, "heart")
    resumed(pets(), pets(), "heart")
    resumed(pets(), pets())  # all masks are gone: the heads can't be mistaken
    resumed(pets(), pets(), "aorta", words="--prior statistics")
    line = "guided to heart, but mine has masks of aorta, heart: give its"
    refuses(line, resumed, pets(), pets(), "aorta", "heart")
    line = "run learned classes cat, dog, but mine has dog, cat"
    refuses(line, resumed, pets(), pets(findings="dog cat"))
    for other in (pets("ab\udcff"), pets(labels=((1.0, 0), (1, 1), (0, 1)))):
        refuses("run learned images 3 .hash", resumed, pets(), other)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "--pool simpool", "--backbone resnet --pool simpool", "--ssl relvit"])
def test_priors_guide_attention_whatever_pools_and_whatever_the_objective(how, tmp_path):
    words = f"{how} --embed-dim 24 --num-heads 3 --epochs 10 --train-images 48 --lr 5e-3 --span-weight"
    free, guided = (trained(tmp_path / weight, f"{words} {weight}", SMALL[2:]) for weight in ("0", "3"))
    assert guided["attention_mAP"] > free["attention_mAP"] + 0.2


def test_relvit_learns_tasks_beside_chance_and_classifiers_start_from_its_encoder(tmp_path, capsys, refused):
    words = "--ssl relvit --prior none --mega-patches 3 --relations relations distances"
    metrics = trained(tmp_path / "relvit", f"{words} --train-images 64 --epochs 8 --lr 5e-3")
    said, before = capsys.readouterr().out, load_run(tmp_path / "relvit").checkpoint["model"]
    assert f"accuracy of relations {metrics['relations_test']:.3f} (0.111), error of distances" in said
    assert "a constant prediction reaches relations 0.111, distances" in said and "angles" not in said
    assert "relations 0." in said.split("epoch 1/8")[1] and metrics["relations"] > 0.111 + 0.1
    assert not before["encoder.pos_embed"].any()  # measured without positions
    argv = f"--task classify --train-images 16 --epochs 1 --lr 1e-9 --init {tmp_path}/relvit"
    trained(tmp_path / "tuned", tiny=argv.split())
    after, name = load_run(tmp_path / "tuned").checkpoint["model"], "encoder.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(before[name], after[name])
    assert 0.15 < after["encoder.pos_embed"].std() < 0.25
    line = refused(train.main, *argv.split(), "--embed-dim", "12", "--out", str(tmp_path / "no"))
    assert "relvit doesn't fit: size mismatch for " in line


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine_and_the_teacher_slows_down():
    config = parse("--lr 1 --warmup 0.1".split())[0]
    rates = [train.learning_rate(config, step, 100) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert rates[55] == pytest.approx(0.505) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.01 < rates[99] < 0.0105
    dino, momenta = DINO(build_encoder(config, 1), 96, out_dim=8), []
    dino.update_teacher = momenta.append
    losses = lambda index, *when: (sum(p.sum() for p in dino.student.parameters()), {})  # noqa: E731
    optimizer = torch.optim.SGD(dino.parameters())
    for step in (0, 5, 10):
        train.train_step(config, dino, losses, optimizer, torch.arange(2), None, step, 10)
    assert momenta == pytest.approx([0.996, 0.998, 1])


@pytest.mark.parametrize("words", ["", "--no-follow", "--ssl none", "--span-loss mse"])
def test_guidance_gets_the_crops_and_the_confidence_of_each_image_and_is_added(words, monkeypatch):
    config, given = parse([*TINY, *words.split(), "--span-weight", "3"])[0], []
    monkeypatch.setattr(train, "guidance", lambda *arguments: given.append(arguments) or torch.ones(()))
    images, sure = torch.randint(256, (4, 1, 64, 64)).byte(), torch.tensor([1.0, 0.5, 0, 1])
    priors = lambda index: (torch.ones(len(index), 3, 64, 64), sure[index], sure[index])  # noqa: E731
    model = build_model(config, SPEC, build_encoder(config, 1), (8, 8))
    losses = train.views_objective(config, model, images, priors)
    found, logged = losses(torch.tensor([3, 1]), torch.Generator(), 0, 1)
    ((_, _, thetas, _, kind, confidence),) = given
    assert (thetas is None) == (words == "--no-follow") and torch.equal(confidence, sure[[3, 1]])
    assert kind == config.span_loss and (found - logged.get("loss", 0)).item() == pytest.approx(3, abs=1e-5)


def test_views_reach_the_student_normalised_as_test_images_are_and_its_chosen_block_is_seen(monkeypatch):
    config, seen = parse([*TINY, *"--prior none --depth 2 --span-layer 0".split()])[0], []
    model = build_model(config, SPEC, build_encoder(config, 1), (8, 8))
    images = torch.randint(256, (4, 1, 64, 64)).byte()
    monkeypatch.setattr(train, "multi_crop", lambda x, *_: ([x.repeat(2, 1, 1, 1)], None))
    watch = lambda module, views, how: seen.append((views[0], how["layer"]))  # noqa: E731
    model.student.register_forward_pre_hook(watch, with_kwargs=True)
    train.views_objective(config, model, images, None)(torch.tensor([3, 1]), seeded(), 0, 1)
    ((views, layer),) = seen
    torch.testing.assert_close(views, prepared(images[[3, 1]]).repeat(2, 1, 1, 1))
    assert layer == 0


def test_a_large_cell_holds_more_of_a_prior_and_an_image_counts_by_its_confidence():
    config, _ = parse([*TINY, *"--ssl relvit --mega-patches 2 --span-weight 1".split()])
    relvit, seen = train.RelViT(build_encoder(config, 1), 24, (2, 2)), []
    relvit.register_forward_hook(lambda module, inputs, output: seen.append(output[2].attention))
    images, even = torch.randint(256, (4, 1, 64, 64)).byte(), torch.ones(4, 1, 64, 64)
    sure = torch.tensor([1.0, 0.5, 0, 1])
    losses = train.relvit_objective(config, relvit, images, lambda index: (even, sure, sure))
    loss, logged = losses(torch.arange(4), seeded(), 0, 1)
    span = logged["span_loss"]
    torch.testing.assert_close(loss.detach(), logged["loss"] + span)
    boxes = train.patch_views(images.float(), (2, 2), 8, seeded(), mega=True)[1]
    area = boxes[:, None, :, 2:].prod(dim=3)
    prior, attention = (p / p.sum(dim=2, keepdim=True) for p in (area, seen[0][:, :1]))
    kl = (prior * (prior / attention).log()).sum(dim=2)[:, 0].detach()
    torch.testing.assert_close(span, (sure * kl).sum() / sure.sum())
    assert prior.std() > 0.03


def test_a_classifier_that_learns_relations_beside_its_labels_is_used_without_them(tmp_path):
    metrics = trained(tmp_path / "joint", "--task classify --backbone vit --relations relations positions")
    assert {"classification", "relations", "positions", "relations_test", "auc_same"} <= set(metrics)
    run = load_run(tmp_path / "joint")
    assert any(name.startswith("relvit.heads") for name in run.checkpoint["model"])
    assert not any("relvit" in name for name in load_model(tmp_path / "joint", run).state_dict())


def test_relations_are_measured_on_test_images_cut_as_in_training():
    def places(views: torch.Tensor, positions: bool) -> Features:
        """An encoder that knows of each patch its place in a dark view, if it has position embeddings."""
        dark = (views.mean(dim=(1, 2, 3)) < 0)[:, None, None]
        return Features(None, positions * dark * torch.eye(16), None)

    relvit, images = RelViT(places, 16, (4, 4), ["positions"]), torch.zeros(70, 1, 16, 16).byte()
    images[64:] = 255  # the second batch, which is smaller
    relvit.heads["positions"].weight.data.copy_(torch.eye(16))
    relvit.heads["positions"].bias.data.zero_()
    ways = (False, False), (True, False), (True, True)  # joint, in order
    found = (related(relvit, images, joint, 4, False, in_order) for joint, in_order in ways)
    upstream, shuffled, ordered = (levels["positions_test"] for levels in found)
    assert upstream == 0 and 0 < shuffled < 0.2 and ordered == pytest.approx(64 / 70)


def test_in_order_a_joint_classifier_sees_its_images_as_they_are_and_else_shuffled():
    images, labels = torch.randint(256, (4, 1, 16, 16)).byte(), torch.tensor([[0.0], [1], [1], [0]])
    spec = DataSpec(1, (), False, "", None)
    flags = "--task classify --backbone vit --patch-size 4 --shift 0 --relations angles"
    encoder = ViT(16, 4, 1, 18, 1, 2)
    model = Classifier(encoder, 1)
    model.relvit = RelViT(encoder, 18, (4, 4), ["angles"])
    whole = classification_loss(model(prepared(images)), labels, False)
    for more, same in (("", False), ("--in-order", True)):
        config, _ = parse(f"{flags} {more}".split())
        losses = train.classifier_objective(config, model, images, None, labels, spec)
        found = losses(torch.arange(4), seeded(), 0, 1)[1]["classification"]
        assert torch.equal(found, whole.detach()) == same


def test_all_processes_leave_their_group_at_once_before_the_first_measures(tmp_path, monkeypatch):
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(train, "train", lambda *_: joined.append(dist.is_initialized()) or [{}])
    monkeypatch.setattr(train, "finish", lambda *_: joined.append(dist.is_initialized()))
    train.main([*TINY, "--align", "none", "--out", str(tmp_path / "run")])
    assert joined == [True, False]
