"""One labelled sample becomes masks for all images: of attention, of the registered prior, or of a folder."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from attention_priors import masks_held, mass_held
from folder import DataError, read_masks
from flags import parse
from masks import agreement, foreground

TINY = "--train-images 32 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 1".split()
CLASSIFY = "--task classify --isnet 1 --train-images 32 --embed-dim 16 --batch-size 16 --epochs 1".split()


@pytest.fixture(autouse=True, scope="module")
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.DRAWN_SIZES", {"val": 8, "test": 8})
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
        assert metrics["background"] > 0
        assert name == "vit" or 100 * metrics["mask_dice"] == pytest.approx(
            said, abs=0.06
        )  # ViT: whole patches
    started = [*CLASSIFY[:-6], "--batch-size", "16", "--epochs", "1", "--init", str(span)]
    train.main([*started, "--masks", "attention", "--out", str(tmp_path / "init")])
    assert "masks from attention: Dice" in capsys.readouterr().out


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
