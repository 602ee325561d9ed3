"""Drawn parts are the same for a seed, stand still under the camera, and their masks tell the truth."""

import pytest
import torch

from common import data
from common.plates import BATCH, FINDINGS, REGIONS, industrial_parts


@pytest.fixture(scope="module")
def drawn():
    return industrial_parts(400, seed=1)


def test_what_is_drawn_has_the_promised_shapes(drawn):
    images, masks, labels = drawn
    assert images.shape == (400, 1, 64, 64) and images.dtype == torch.uint8
    assert masks.shape == (400, len(REGIONS), 64, 64) and masks.dtype == torch.bool
    assert labels.shape == (400, len(FINDINGS)) and set(labels.unique().tolist()) == {0.0, 1.0}
    assert ((0.12 < labels.mean(dim=0)) & (labels.mean(dim=0) < 0.28)).all()


def test_a_seed_draws_the_same_parts_however_many_and_another_seed_others(drawn):
    for some, many in zip(industrial_parts(5, seed=1), drawn):
        assert torch.equal(some, many[:5])
    assert torch.equal(industrial_parts(BATCH + 1, seed=1)[0][-1], drawn[0][BATCH])
    assert not torch.equal(industrial_parts(5, seed=2)[0], drawn[0][:5])


def test_a_part_has_a_defect_mask_if_and_only_if_a_defect_is_named(drawn):
    _, masks, labels = drawn
    assert torch.equal(masks[:, 2].flatten(1).any(dim=1), labels.any(dim=1))


def test_plate_and_holes_do_not_overlap_and_hardly_move(drawn):
    masks = drawn[1].float()
    assert (masks[:, 0] * masks[:, 1]).sum() == 0
    x = torch.arange(64.0)
    middle = (masks[:, 0] * x).sum(dim=(1, 2)) / masks[:, 0].sum(dim=(1, 2))
    assert middle.std() < 2 and (middle - 32).abs().max() < 5


def test_each_defect_changes_the_picture_where_its_mask_lies_and_nowhere_else(monkeypatch):
    """The same numbers are drawn with no defect and with all: what differs is what the mask outlines."""
    pictures = {}
    for prevalence in (0.0, 1.0):
        monkeypatch.setattr("common.plates.PREVALENCE", prevalence)
        pictures[prevalence] = industrial_parts(200, seed=3)
    change = (pictures[1.0][0].float() - pictures[0.0][0].float())[:, 0].abs()
    defect = pictures[1.0][1][:, 2]
    near = torch.nn.functional.max_pool2d(defect.float()[:, None], 3, 1, 1)[:, 0].bool()  # edges are soft
    inside, outside = change[defect].mean(), change[~near].mean()
    assert inside > 25 and outside < 1.5
    assert not pictures[0.0][1][:, 2].any() and pictures[1.0][2].all()


def test_a_missing_hole_is_missing_from_the_holes(drawn):
    _, masks, labels = drawn
    only = labels.sum(dim=1) == labels[:, 1]  # nothing else, which might cover one
    size = masks[only, 1].sum(dim=(1, 2)).float()
    assert size[labels[only, 1] == 1].max() < size[labels[only, 1] == 0].min()


def test_parts_are_data_like_any_other_and_the_sample_is_one_with_every_region():
    loaded, sample, notes = data.load("parts", 64, seed=0, train_images=20)
    train = loaded["train"]
    assert train.regions == REGIONS and train.findings == FINDINGS and not notes
    assert train.masks[train.names.index(sample)].flatten(1).any(dim=1).all()
    assert {part: len(d.names) for part, d in loaded.items()} == {"train": 20, "val": 200, "test": 500}
    assert not torch.equal(train.images[:20], loaded["test"].images[:20])
    with pytest.raises(data.DataError, match="a marker can be drawn only on phantoms"):
        data.load("parts", 64, train_images=2, marker=1.0)


def test_impossible_requests_are_refused():
    for n, size in ((0, 64), (3, 48)):
        with pytest.raises(ValueError, match="at least 1 of at least 64 px, lest defects vanish"):
            industrial_parts(n, seed=0, img_size=size)
