"""The synthetic plates hardly move, and their masks and labels tell the truth."""

import pytest
import torch
import torch.nn.functional as F

from common.plates import plates
from common.splits import load


@pytest.fixture(scope="module")
def drawn():
    return plates(400, seed=1)


def test_a_plate_has_a_defect_s_mask_only_with_a_finding(drawn):
    _, masks, labels = drawn
    assert ((0.12 < labels.mean(dim=0)) & (labels.mean(dim=0) < 0.28)).all()
    assert torch.equal(masks[:, 2].flatten(1).any(dim=1), labels.any(dim=1))


def test_plate_and_holes_do_not_overlap_hardly_move_and_a_missing_hole_is_missing(drawn):
    masks, labels = drawn[1].float(), drawn[2]
    assert (masks[:, 0] * masks[:, 1]).sum() == 0
    middle = (masks[:, 0] * torch.arange(64.0)).sum(dim=(1, 2)) / masks[:, 0].sum(dim=(1, 2))
    assert middle.std() < 2 and (middle - 32).abs().max() < 5
    only = labels.sum(dim=1) == labels[:, 1]  # no other defect, which might cover a hole
    size = masks[only, 1].sum(dim=(1, 2))
    assert size[labels[only, 1] == 1].max() < size[labels[only, 1] == 0].min()


def test_defects_change_the_image_where_their_mask_lies_and_nowhere_else(monkeypatch):
    """The same random numbers give images without any defect and with all of them."""
    drawn = []
    for prevalence in (0.0, 1.0):
        monkeypatch.setattr("common.plates.PREVALENCE", prevalence)
        drawn.append(plates(200, seed=3))
    change, defect = (drawn[1][0].float() - drawn[0][0].float())[:, 0].abs(), drawn[1][1][:, 2]
    near = F.max_pool2d(defect.float()[:, None], 3, 1, 1)[:, 0].bool()  # edges are soft
    assert change[defect].mean() > 25 and change[~near].mean() < 1.5
    assert not drawn[0][1][:, 2].any() and drawn[1][2].all()


def test_the_reference_image_has_every_region_and_each_split_its_own_images(monkeypatch):
    monkeypatch.setattr("common.splits.DRAWN_SIZES", {"val": 8, "test": 9})
    splits, reference, notes = load("parts", 64, seed=0, train_images=20)
    train = splits["train"]
    assert train.masks[train.names.index(reference)].flatten(1).any(dim=1).all() and not notes
    assert {split: len(data.names) for split, data in splits.items()} == {"train": 20, "val": 8, "test": 9}
    assert not torch.equal(train.images[:9], splits["test"].images)
