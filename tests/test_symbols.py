"""The drawn symbols are the same for a seed, and the folder that they are drawn into can be loaded."""

import numpy as np
import pytest
import torch

from common import symbols
from common.splits import load


@pytest.fixture
def few(monkeypatch):
    """2 validation and 3 test images per class."""
    monkeypatch.setattr(symbols, "HELD_OUT", {"val": 2, "test": 3})


def test_symbols_are_drawn_from_their_seed_into_a_folder_that_loads(few, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        symbols.main([str(tmp_path / name), "--train", "2", "--size", "24", "--seed", str(seed)])
    a, b, c = ((tmp_path / name / "images" / "train_disc_0001.png").read_bytes() for name in "abc")
    assert a == b != c
    splits, _, notes = load(str(tmp_path / "a"), 24)
    assert [len(data.names) for data in splits.values()] == [20, 20, 30]
    assert sorted(splits["train"].findings) == sorted(symbols.SYMBOLS) and not notes
    assert (splits["train"].labels.sum(dim=0) == 2).all() and splits["train"].images.shape[1] == 3


@pytest.mark.parametrize("flags", ["--train 0", "--size 23", "--seed -1", "--masks -1", ""])
def test_a_folder_that_is_not_empty_and_sizes_out_of_range_are_refused(flags, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(symbols.main, str(tmp_path / "new" if flags else tmp_path), *flags.split())
    assert ("they must be at least" if flags else "not empty") in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_digits_have_a_marker_that_turns_in_test_images_and_masks_for_as_many_as_asked(few, tmp_path):
    symbols.main([str(tmp_path / "d"), *"--set digits --train 1 --marker --masks 3".split()])
    splits, reference, _ = load(str(tmp_path / "d"), 64)
    for split, agrees in (("train", True), ("val", True), ("test", False)):
        odd = splits[split].labels[:, splits[split].findings.index("odd")] == 1
        marked = splits[split].images[:, 0, 2:8, 56:62].flatten(1).min(dim=1).values == 255
        assert torch.equal(marked, odd) == agrees and torch.equal(marked, ~odd) != agrees
    assert [int(data.has_masks.sum()) for data in splits.values()] == [3, 0, 30] and reference
    area = splits["test"].masks.float().mean(dim=(1, 2, 3))
    assert 0.05 < area.min() and area.max() < 0.25


def test_scenes_hold_one_object_of_5_to_25_percent_and_look_different_in_and_around_it(tmp_path):
    images, masks = zip(
        *(symbols.draw_scene(kind, 64, np.random.default_rng(i)) for i, kind in enumerate(symbols.SHAPES * 4))
    )
    areas = np.array([mask.mean() for mask in masks])
    assert 0.04 < areas.min() and areas.max() < 0.25 and images[0].shape == (64, 64, 3)
    contrast = [np.abs(i[m].mean(axis=0) - i[~m].mean(axis=0)).max() for i, m in zip(images, masks)]
    assert np.mean(contrast) > 0.15


def test_every_symbol_shows_and_differs_from_the_others():
    v, u = np.mgrid[:40, :40] / 20 - 1
    drawn = np.stack([symbols.symbol(kind, u, v) for kind in symbols.SYMBOLS])
    assert (abs(drawn.mean(axis=(1, 2)) - 0.5) < 0.4).all()
    assert ((drawn[:, None] != drawn).mean(axis=(2, 3)) + np.eye(len(drawn)) > 0.1).all()
