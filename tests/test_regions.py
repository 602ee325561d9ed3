"""One labelled sample becomes masks for all images: of attention, of the registered prior, or of a folder."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from common import loop
import train
from attention_priors import masks_held, mass_held
from common.checkpoint import load_run
from common.data import DataError, read_masks
from common.config import parse
from common.regions import agreement, foreground

TINY = "--train-images 32 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 1".split()
CLASSIFY = "--task classify --isnet 1 --train-images 32 --embed-dim 16 --batch-size 16 --epochs 1".split()


@pytest.fixture(autouse=True, scope="module")
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
        yield


@pytest.fixture(scope="module")
def span(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "span"
    train.main([*TINY, "--out", str(out)])
    return out


def test_the_fewest_pixels_that_hold_the_mass_are_kept():
    attention = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]])  # (1, 2, 4), a 2x2 grid
    found = masks_held(attention, (2, 2), (2, 2), torch.tensor([0.65, 0.7]))
    assert found[0, 0, 0, 0] and found[0, 0].sum() == 2  # 0.5 + 0.2 suffices, 0.5 does not
    assert found[0, 1].tolist() == [[False, False], [False, True]]


def test_a_mask_of_the_image_that_the_prior_belongs_to_covers_the_prior_and_no_more_than_it_must():
    torch.manual_seed(0)
    attention = torch.rand(1, 2, 16).softmax(dim=2)
    regions = torch.zeros(2, 32, 32, dtype=torch.bool)
    regions[0, :10, :10] = regions[1, 5:9, 3:30] = True
    mass = mass_held(attention, (4, 4), regions)
    found = masks_held(attention, (4, 4), (32, 32), mass)[0]
    covered = (found & regions).sum(dim=(1, 2)) / regions.sum(dim=(1, 2))
    assert ((covered >= 0.95) & (covered < 0.97)).all()
    less = masks_held(attention, (4, 4), (32, 32), mass_held(attention, (4, 4), regions, covered=0.5))[0]
    assert (less.sum(dim=(1, 2)) < found.sum(dim=(1, 2))).all() and (less <= found).all()


def test_attention_that_is_the_prior_makes_a_mask_of_nearly_its_area():
    regions = torch.zeros(1, 32, 32, dtype=torch.bool)
    regions[0, 8:24, 4:28] = True
    attention = F.avg_pool2d(regions.float(), 2).flatten(1)[None]  # (1, 1, 256)
    mass = mass_held(attention / attention.sum(), (16, 16), regions)
    found = masks_held(attention / attention.sum(), (16, 16), (32, 32), mass)[0]
    assert 0.94 < found.sum() / regions.sum() < 1.02


def test_a_wider_map_makes_a_wider_mask_of_the_same_mass():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    maps = [torch.exp(-(x**2 + y**2) / (2 * s**2)).flatten() for s in (0.25, 0.5)]
    attention = torch.stack([m / m.sum() for m in maps])[:, None]  # (2, 1, 64)
    areas = masks_held(attention, (8, 8), (64, 64), torch.tensor([0.6])).sum(dim=(1, 2, 3)).tolist()
    assert 2.5 < areas[1] / areas[0] < 4.5  # four times the area, less what bilinear interpolation blurs


def test_attention_masks_train_a_classifier_of_either_kind_and_their_quality_is_said(span, tmp_path, capsys):
    for name, flags in {"cnn": [], "vit": ["--backbone", "vit", "--depth", "1", "--num-heads", "2"]}.items():
        train.main([*CLASSIFY, *flags, "--masks", str(span), "--out", str(tmp_path / name)])
        said = float(re.search(r"Dice ([\d.]+) %", capsys.readouterr().out)[1])
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["background"] > 0 and 100 * metrics["mask_dice"] == pytest.approx(said, abs=0.06)
    started = [*CLASSIFY[:-6], "--batch-size", "16", "--epochs", "1", "--init", str(span)]
    train.main([*started, "--masks", "attention", "--out", str(tmp_path / "init")])
    assert re.search(r"masks from attention: of 32 of 32 training images; Dice", capsys.readouterr().out)


def test_the_registered_prior_is_a_better_mask_than_chance(capsys):
    args, _ = parse([*CLASSIFY, "--masks", "prior"])
    parts, sample, _ = train.load("phantom", 64, 0, 32)
    masks = foreground(args, parts, sample)
    assert masks.shape == (32, 1, 64, 64) and agreement(masks, parts["train"]) > 0.85


def test_exported_masks_line_up_with_the_files_and_come_back_as_they_went(span, tmp_path, capsys):
    evaluate.main([str(span), "--export-masks", str(tmp_path / "masks")])
    assert "wrote 96 masks" in capsys.readouterr().out
    parts, sample, _ = train.load("phantom", 64, 0, 32)
    args, _ = parse([*CLASSIFY, "--masks", str(span)])
    direct = foreground(args, parts, sample)
    assert torch.equal(read_masks(tmp_path / "masks", None, parts["train"].names, 64), direct)
    with pytest.raises(SystemExit):
        evaluate.main([str(span), "--export-masks", str(tmp_path / "masks")])
    assert "holds something; name a new folder" in capsys.readouterr().err


def test_masks_of_a_folder_are_as_large_as_its_images(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "masks" / "heart").mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 30), dtype=np.uint8)).save(
            tmp_path / "data" / "images" / f"{i}.png"
        )
    square = np.zeros((20, 30), np.uint8)
    square[5:15, 5:20] = 255
    Image.fromarray(square).save(tmp_path / "data" / "masks" / "heart" / "0.png")
    argv = [*TINY[2:], "--data", str(tmp_path / "data"), "--img-size", "16", "--patch-size", "4"]
    train.main([*argv, "--out", str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--export-masks", str(tmp_path / "out")])
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert files == sorted(f"heart/{i}.png" for i in range(12))
    assert Image.open(tmp_path / "out" / "heart" / "3.png").size == (30, 20)


def plain_folder(path, names=("a.png", "b.png", "c.png", "d.png"), size=(20, 30)):
    """A user's folder of labelled images without any mask."""
    (path / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(path / "images" / name)
    rows = [f"{name},{i % 2},train" for i, name in enumerate(names)]
    (path / "labels.csv").write_text("\n".join(["file,sick,split", *rows]))
    return path


def mask_file(path, size=(20, 30), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[5:15, 5:20] = value
    Image.fromarray(mask).save(path)


def test_masks_of_another_tool_serve_data_that_has_none_and_it_is_said_of_how_many(tmp_path, capsys):
    data = plain_folder(tmp_path / "data")
    for name in ("a", "b", "c"):
        mask_file(tmp_path / "masks" / f"{name}.png")
    mask_file(tmp_path / "masks" / ".hidden" / "d.png")
    argv = [*CLASSIFY[:-4], "--epochs", "2", "--batch-size", "2", "--img-size", "16", "--data", str(data)]
    argv += ["--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "run")]
    train.main(argv)
    assert f"masks from {tmp_path / 'masks'}: of 3 of 4 training images\n" in capsys.readouterr().out
    assert "mask_dice" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda data, masks: mask_file(masks / "a.png", value=0), "of all training images are empty"),
        (lambda data, masks: mask_file(masks / "a.png", size=(30, 20)), "is 20 x 30 px but its image"),
        (lambda data, masks: (masks / "images").mkdir(parents=True), "holds images, which are no masks"),
        (
            lambda data, masks: mask_file(data / "images" / "a.jpg") or mask_file(masks / "a.png"),
            "rename one",
        ),
    ],
)
def test_masks_of_another_tool_that_do_not_fit_are_refused(damage, line, tmp_path, capsys):
    data, masks = plain_folder(tmp_path / "data"), tmp_path / "masks"
    damage(data, masks)
    (data / "labels.csv").write_text(
        (data / "labels.csv").read_text() + "\na.jpg,1,train" * (line == "rename one")
    )
    argv = [*CLASSIFY, "--img-size", "16", "--data", str(data), "--masks", str(masks)]
    with pytest.raises(SystemExit):
        train.main([*argv, "--out", str(tmp_path / "run")])
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_a_run_resumes_with_its_masks_though_what_made_them_has_gone(backbone, span, tmp_path, monkeypatch):
    shutil.copytree(span, tmp_path / "span")
    argv = [*CLASSIFY[:-2], "--epochs", "2", "--backbone", backbone, "--depth", "1", "--num-heads", "2"]
    argv += ["--masks", str(tmp_path / "span"), "--out"]
    train.main([*argv, str(tmp_path / "whole")])
    real = loop.save

    def stop(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", stop)
    with pytest.raises(SystemExit):
        train.main([*argv, str(tmp_path / "stopped")])
    monkeypatch.setattr(loop, "save", real)
    shutil.rmtree(tmp_path / "span")
    train.main(["--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (load_run(tmp_path / name)[1]["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    dice = {
        json.loads((tmp_path / name / "metrics.json").read_text())["mask_dice"]
        for name in ("whole", "stopped")
    }
    assert len(dice) == 1
    (tmp_path / "stopped" / "masks.pt").write_bytes(b"no masks")
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "stopped"), "--resume"])


def test_masks_that_not_all_regions_have_are_left_out():
    parts, _, _ = train.load("phantom", 64, 0, 4, findings=["all"])
    parts["train"].has_masks[1] = False
    args, _ = parse(CLASSIFY)
    assert foreground(args, parts, None).flatten(1).any(dim=1).tolist() == [True, False, True, True]


def test_a_folder_s_masks_are_united_over_regions_and_found_by_name_alone(tmp_path):
    for path, column in {"a/one.png": 0, "b/one.png": 3, "two.png": 1}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        mask = np.zeros((4, 4), np.uint8)
        mask[:, column] = 255
        Image.fromarray(mask).save(tmp_path / path)
    found = read_masks(tmp_path, None, ["one", "two", "three"], 4)
    assert found[0, 0, 0].tolist() == [True, False, False, True]
    assert found[1, 0, 0].tolist() == [False, True, False, False] and not found[2].any()
    with pytest.raises(DataError, match="holds no mask of any training image; name them like `x`"):
        read_masks(tmp_path, None, ["x"], 4)


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--masks attention", "--masks attention needs --init"),
        ("--masks prior --prior none", "leave out --prior none"),
        ("--prior-blur 0.1", "--prior-blur does nothing without --masks prior"),
        ("--span-weight 1", "--span-weight does nothing without --task pretrain"),
        ("--teacher-temp 0.1", "--teacher-temp does nothing without --task pretrain"),
        ("--masks nowhere", "--masks nowhere is neither data, prior, attention, nor a folder"),
    ],
)
def test_masks_that_cannot_be_are_refused(flags, line, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*CLASSIFY, *flags.split(), "--out", str(tmp_path / "run")])
    assert line in capsys.readouterr().err


def test_a_run_that_did_not_come_to_its_end_makes_no_masks(span, tmp_path, capsys):
    for file in ("config.json", "last.pt"):
        (tmp_path / file).write_bytes((span / file).read_bytes())
    for content in (None, '{"../heart": 0.5}', '{"..": 0.5}', '{"": 0.5}', '{"heart": 7}', "[1]", "{}"):
        if content:
            (tmp_path / "outlines.json").write_text(content)
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path), "--export-masks", str(tmp_path / "masks")])
        assert "outlines.json can't be used" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_a_run_that_no_prior_guided_makes_no_masks(tmp_path, capsys):
    train.main([*TINY, "--prior", "none", "--out", str(tmp_path / "dino")])
    with pytest.raises(SystemExit):
        train.main([*CLASSIFY, "--masks", str(tmp_path / "dino"), "--out", str(tmp_path / "run")])
    assert "has no heads that one prior guided" in capsys.readouterr().err
