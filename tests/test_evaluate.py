"""Runs side by side, and any picture of any size: metrics, tables, attention, masks, relevance."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, image_folder, metrics_of, noise, save, trained, unlabelled
from PIL import Image

import evaluate
import train
from common import runs
from common.checkpoint import load_run
from common.config import parse
from common.explain import decisions
from common.folder import read_masks
from common.models import load_model
from common.regions import attention_masks, export_masks, make_priors
from common.runs import images_to_show
from common.splits import load
from vit import ViT

pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture
def two_runs(span_run, dino_run, tmp_path) -> list[str]:
    """Copies of two runs, to write into."""
    return [str(shutil.copytree(run, tmp_path / run.name)) for run in (span_run, dino_run)]


def test_a_run_that_is_measured_beside_another_prior_than_its_own_says_so(span_run, monkeypatch, capsys):
    """The same regions have other masks in the reference image now."""

    def changed(*args, **settings) -> tuple:
        splits, reference, notes = load(*args, **settings)
        train_split = splits["train"]
        return splits | {"train": train_split._replace(masks=train_split.masks.roll(1, 1))}, reference, notes

    monkeypatch.setattr(runs, "load", changed)
    runs.load_all([span_run], [], "cpu")
    said = capsys.readouterr().out
    assert "span learned priors 00000 (hash of " in said and "the AP of its prior is of these" in said


def test_runs_are_compared_side_by_side_on_the_same_images(two_runs, capsys):
    evaluate.main([*two_runs, "--rows", "2", "--only", "attention", "linear"])
    table = capsys.readouterr().out
    assert "100 % of labels (32)" in table and "25 % of labels" not in table
    assert "8 test images of 64 px" in table
    lines = table[: table.index("left lung")].splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["dino", "attention"] and "mean" in table
    assert min(Image.open(Path(two_runs[0]) / "compare.png").size) > 100
    assert f"{100 * metrics_of(Path(two_runs[0]))['attention_mAP']:.1f}" in table  # what train.py measured


def test_few_labels_are_measured_on_request(two_runs, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.FRACTIONS", (0.25, 1.0))
    monkeypatch.setattr("common.probe.DRAWS", 1)
    out, old = Path(two_runs[0]), metrics_of(Path(two_runs[0]))
    evaluate.main([*two_runs, "--only", "linear", "--all"])
    found, said = metrics_of(out), capsys.readouterr().out
    assert "25 % of labels" in said and set(found) == set(old) | {"linear_mAUC_25_percent"}
    assert found["linear_mAUC"] == pytest.approx(old["linear_mAUC"])  # train.py and evaluate.py agree
    assert all((out / name).exists() for name in ("low_data.png", "compare_curves.png", "compare.png"))


def test_masks_of_all_images_of_a_folder_are_exported_as_large_as_they_are(tmp_path):
    data = str(image_folder(tmp_path / "data", "file", *(f"{i}.png" for i in range(12)), size=(20, 30)))
    splits, *_ = load(data, 16)
    assert export_masks(tmp_path / "out", data, ViT(16, 4, 1, 12, 1, 2), {"heart": 0.5}, splits, -1) == 12
    found = {path.name: Image.open(path).size for path in (tmp_path / "out" / "heart").iterdir()}
    assert found == {f"{i}.png": (30, 20) for i in range(12)}


def test_weights_beside_runs_take_their_data_and_keep_earlier_metrics(two_runs, tmp_path, refused):
    torch.save(ViT(16, 8, 1, 32, 1, 2).state_dict(), tmp_path / "vit.pth")
    argv = [two_runs[0], str(tmp_path / "vit.pth"), "--num-heads", "2"]
    for measure in ("attention", "knn"):
        evaluate.main([*argv, "--only", measure])
    assert {"attention_mAP", "knn_mAUC"} <= set(metrics_of(tmp_path / "vit.pth-phantom-64"))
    assert "differ in img_size: compare runs on the same" in refused(evaluate.main, *argv, "--img-size", "32")


def test_metrics_keep_a_run_s_own_relevance_rule_when_runs_are_compared(tmp_path):
    for name, gamma in {"a": "3", "b": "0"}.items():
        before = trained(tmp_path / name, f"--epochs 1 --lrp-gamma {gamma}", SMALL)
    evaluate.main([str(tmp_path / "a"), str(tmp_path / "b"), "--only", "bias"])
    assert metrics_of(tmp_path / "b") == before


def test_without_labelled_test_images_a_classifier_is_trained_but_not_measured(tmp_path, capsys):
    rows = [f"{name}.png,{'cat' if name in 'bdfh' else 'dog'},train" for name in "abcdefgh"]
    data = image_folder(tmp_path / "data", "file,label,split", *rows)
    words = f"--img-size 16 --epochs 1 --batch-size 4 --data {data}"
    assert "auc_same" not in trained(tmp_path / "run", words, SMALL[:2])
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert all(f"{what} can't be measured" in said for what in ("AUC", "knn", "linear"))
    assert "pooled by their mean" in said and "AP can't" not in said  # masks would not help
    assert "compare.png" in said  # a picture there is


def test_a_picture_shows_all_classes_though_names_are_sorted_by_class():
    names, labels = [f"{c}/{i}" for c in "abc" for i in range(5)], torch.eye(3).repeat_interleave(5, 0)
    data = unlabelled(torch.zeros(15, 1, 8, 8), labels=labels, names=names, findings=[*"abc"])
    for task in ("pretrain", "classify"):
        config, _ = parse(["--task", task])
        assert [n[0] for n in images_to_show(config, {"train": data, "test": data}, 6).names] == [*"aabbcc"]


def test_a_run_that_stopped_early_or_learned_from_other_images_is_measured_with_a_note(two_runs, capsys):
    (span, _), checkpoint = two_runs, torch.load(f"{two_runs[0]}/last.pt")
    checkpoint["history"], checkpoint["spec"]["images"] = checkpoint["history"][:1], "9 (hash: 1)"
    torch.save(checkpoint, f"{span}/last.pt")
    Path(span, "metrics.json").unlink()
    evaluate.main([span, "--only", "knn"])
    said = capsys.readouterr().out
    assert "it stopped after 1 of 2 epochs, so metrics.json is not written" in said
    assert not Path(span, "metrics.json").exists()  # it tells experiments.runs that a run is finished
    assert f"note: {span} learned images 9 (hash: 1), but phantom has 32 (hash" in said


def test_a_run_finds_its_data_where_they_have_moved_and_no_others(tmp_path, refused, capsys):
    rows = [f"{i}.png,{i % 2},{split}" for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2)]
    data, run = image_folder(tmp_path / "data", "file,sick,split", *rows), str(tmp_path / "run")
    trained(tmp_path / "run", f"--data {data} --img-size 16 --batch-size 2", SMALL)
    evaluate.main([run, "--data", f"{data}/", "--only", "bias"])
    moved = data.rename(tmp_path / "moved")
    assert f"{data}, which is not a folder: give its path by --data" in refused(evaluate.main, run)
    evaluate.main([run, "--data", str(moved), "--only", "bias"])
    (moved / "images" / "0.png").rename(moved / "images" / "9.png")
    table = moved / "labels.csv"
    table.write_text(table.read_text().replace("0.png", "9.png"))
    assert f"{run} learned images" in refused(evaluate.main, run, "--data", str(moved))


def test_what_can_not_be_compared_or_asked_is_refused_at_once(two_runs, tmp_path, refused, monkeypatch):
    trained(tmp_path / "other", "--epochs 1 --seed 1 --align none")
    span, dino = two_runs
    (tmp_path / "dino" / "metrics.json").write_text("[1]")
    monkeypatch.setattr(evaluate, "report", None)
    for argv, line in [
        ([span, f"{tmp_path}/other"], "differ in seed: compare runs on the same images"),
        ([span, "--data", "parts"], f"{span} learned from phantom, which is drawn: leave out --data"),
        ([span, "--img-size", "32"], "--img-size 32 is for files of weights; runs are measured on their own"),
        ([span, "nowhere"], "nowhere: no such file or folder"),
        ([span, "--rows", "0"], "--rows 0: draw at least 1"),
        ([span, "--export", "x.pth", "--image", "x.png"], "--image: not allowed with argument --export"),
        ([span, dino], f"{dino}/metrics.json is damaged: remove it"),
        ([str(tmp_path)], "is not a run of train.py"),
    ]:
        assert line in refused(evaluate.main, *argv)
    for beside in (["--html"], ["--rows", "9"], ["--only", "knn"], [dino]):
        line = refused(evaluate.main, span, *beside, "--image", "x.png")
        assert "--image and --export take one run alone" in line


def test_masks_cover_the_reference_s_prior_and_come_back_as_they_went(span_run, tmp_path, capsys, refused):
    evaluate.main([str(span_run), "--export-masks", str(tmp_path / "masks")])
    assert "wrote 96 masks" in capsys.readouterr().out
    run, (splits, reference, _) = load_run(span_run), load("phantom", 64, 0, 32)
    train_split = splits["train"]
    masks = attention_masks(load_model(span_run, run), run.masses, train_split.images, -1)
    priors = make_priors("sample", train_split, reference, 0.025)[0]
    for mask, prior in zip(masks[train_split.names.index(reference)], priors):
        region = prior >= prior.max() / 2
        assert 0.95 <= (mask & region).sum() / region.sum()
    again, _ = read_masks(tmp_path / "masks", None, train_split.names, 64)
    assert torch.equal(again, masks.any(dim=1, keepdim=True))
    line = refused(evaluate.main, str(span_run), "--export-masks", str(tmp_path / "masks"))
    assert "holds something already; name a new folder" in line


def test_an_unguided_run_makes_no_masks(dino_run, tmp_path, refused):
    dino, line = str(dino_run), "makes no masks: no single prior guided its heads; name a run"
    assert line in refused(evaluate.main, dino, "--export-masks", str(tmp_path / "masks"))
    isnet = *SMALL, "--isnet", "1", "--masks", dino, "--out", str(tmp_path / "run")
    assert line in refused(train.main, *isnet)
    assert not (tmp_path / "masks").exists()


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The arguments of every picture that is drawn."""
    seen = []
    monkeypatch.setattr(evaluate, "map_grid", lambda *args, **how: seen.append((args, how)))
    return seen


def test_guided_heads_get_masks_of_their_regions(two_runs, tmp_path, drawn, monkeypatch, capsys):
    monkeypatch.setattr("common.runs.load", None)  # the run's folder is enough: its data may be gone
    run, wide = Path(two_runs[0]), save(tmp_path / "wide.jpg", noise(90, 200, 3))
    evaluate.main([str(run), "--image", str(wide)])
    out, (path, image, masks, names, maps) = run / "looks" / "wide", drawn[0][0]
    assert path == out / "attention.png" and f"{wide}: 4 file(s) in {out}" in capsys.readouterr().out
    assert image.shape == (1, 1, 64, 144) and masks.shape == (1, 3, 64, 144)
    assert names == ["left lung", "right lung", "heart"]
    titles = ["head 0\nleft lung", "head 1\nright lung", "head 2\nheart"]
    assert {name: m.shape for name, m in maps.items()} == dict.fromkeys(titles, (1, 8, 18))
    for name, mask in zip(names, masks[0]):
        written = Image.open(out / "masks" / f"{name}.png")
        assert written.size == (200, 90)  # the picture's own
        shrunk = np.asarray(written.resize((144, 64), Image.Resampling.NEAREST)) > 0
        assert (shrunk == mask.numpy()).mean() > 0.95
    torch.save(torch.load(run / "last.pt") | {"masses": {}}, run / "last.pt")  # shown like published weights
    evaluate.main([str(run), "--image", str(wide)])
    assert drawn[1][0][3] == ["head 0", "head 1", "head 2"]


def test_a_classifier_s_decision_gets_a_heatmap_and_its_probability(tmp_path, drawn):
    trained(tmp_path / "run", "--epochs 1 --findings all", SMALL)
    evaluate.main([str(tmp_path / "run"), "--image", str(save(tmp_path / "wide.jpg", noise(90, 200, 3)))])
    (((path, _, _, _, maps), how),) = drawn  # and no other: a mean attends to nothing
    assert path.name == "relevance.png" and path.parent.name == "wide" and how["signed"]
    ((title, heatmap),) = maps.items()
    what, first, *others = title.split("\n")
    assert heatmap.shape == (1, 64, 144) and what == "relevance for enlarged heart"
    assert first.startswith("enlarged heart ") and len(others) == 3


@pytest.mark.parametrize("multiclass, said", [(False, "afed"), (True, "fedc")])
def test_what_is_explained_is_said_even_if_it_is_unlikely(multiclass, said):
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images: torch.arange(6.0).expand(len(images), -1)
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    (words,) = decisions(model, images, multiclass, list("abcdef"))
    assert "".join(word[0] for word in words) == said


def test_pictures_of_one_name_are_numbered_and_a_missing_one_is_named(tmp_path, monkeypatch, drawn, refused):
    torch.save(ViT(16, 8, 3, 32, 1, 2).state_dict(), tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        save(tmp_path / folder / "1.png", noise(16, 32))
    pictures = "--num-heads", "2", "--img-size", "24", "--image"
    evaluate.main(["vit.pth", *pictures, "a/1.png", "b/1.png"])
    paths = [args[0] for args, _ in drawn]
    assert paths == [Path(f"vit.pth-looks/{name}/attention.png") for name in ("1_1", "2_1")]
    _, image, masks, names, _ = drawn[0][0]
    assert image.shape == (1, 3, 24, 48) and names == ["head 0", "head 1"]
    assert 0.3 < masks.float().mean() < 0.7
    assert "none.png: no such file or folder" in refused(evaluate.main, "vit.pth", *pictures, "none.png")
