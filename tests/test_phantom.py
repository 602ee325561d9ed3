"""Drawn images are the same for a seed; masks, labels and markers of all kinds tell the truth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import symbols
from common.metrics import auc
from common.phantom import BATCH, FINDINGS, MARKERS, phantom, stamp
from common.plates import plates
from common.splits import DRAWN, load


@pytest.fixture(scope="module")
def drawn():
    return phantom(300, seed=1)


@pytest.mark.parametrize("kind, least", [("phantom", 16), ("parts", 64)])
def test_a_seed_draws_the_same_however_many_in_the_promised_shapes_and_another_seed_draws_others(kind, least):
    draw, regions, findings = DRAWN[kind]
    images, masks, labels = many = draw(BATCH + 9, seed=1)  # there is a second batch
    assert images.shape == (BATCH + 9, 1, 64, 64) and images.dtype == torch.uint8
    assert masks.shape == (BATCH + 9, len(regions), 64, 64) and masks.dtype == torch.bool
    assert labels.shape == (BATCH + 9, len(findings)) and set(labels.unique().tolist()) == {0.0, 1.0}
    assert all(torch.equal(some, more[:5]) for some, more in zip(draw(5, seed=1), many))
    assert torch.equal(draw(BATCH + 1, seed=1)[0][-1], images[BATCH])
    assert not torch.equal(images[BATCH], images[0]) and not torch.equal(draw(5, seed=2)[0], images[:5])
    for n, size in ((0, 64), (3, least - 1)):
        line = f"{n} images of {size} px, but 1 image of {least} px is the min"
        with pytest.raises(ValueError, match=line):
            draw(n, seed=0, img_size=size)


def test_the_left_lung_is_on_the_image_s_right_and_the_heart_leans_to_it(drawn):
    masks = drawn[1].float()
    left, right, heart = ((masks * torch.arange(64.0)).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))).unbind(1)
    assert (left > right).all() and ((heart - right) > (left - heart)).float().mean() > 0.7


def brightness(images, masks):
    """Mean brightness (N, R) of images (N, 1, S, S) inside masks (N, R, S, S)."""
    return (images * masks).sum(dim=(2, 3)) / masks.sum(dim=(2, 3))


def test_findings_enlarge_the_heart_and_change_either_lung_and_nothing_else(drawn, monkeypatch):
    """The same random numbers give images without any finding and with all of them."""
    _, masks, labels = drawn
    hearts = masks[:, 2].sum(dim=(1, 2)) / masks[:, :2].sum(dim=(1, 2, 3))
    assert hearts[labels[:, 0] == 1].mean() > 1.4 * hearts[labels[:, 0] == 0].mean()
    both = []
    for prevalence in (0.0, 1.0):
        monkeypatch.setattr("common.phantom.PREVALENCE", prevalence)
        both.append(phantom(100, seed=3))
    change, regions = (both[1][0].float() - both[0][0].float()).abs(), both[0][1] | both[1][1]
    assert (brightness(change, both[1][1][:, :2]).mean(dim=0) > 10).all()
    near = F.max_pool2d(regions.any(dim=1, keepdim=True).float(), 5, 1, 2).bool()  # edges are soft
    assert brightness(change, ~near).mean() < 0.1


def test_an_effusion_shows_at_the_base_of_a_lung(drawn):
    images, masks, labels = drawn
    down, lungs = torch.arange(64.0)[:, None], masks[:, :2]
    rows = torch.where(lungs.any(dim=3, keepdim=True), down, torch.nan)
    low = rows.nan_to_num(-1).amax(dim=(2, 3), keepdim=True)
    high = rows.nan_to_num(64).amin(dim=(2, 3), keepdim=True)
    base = lungs & (down > low - 0.3 * (low - high))
    brighter = brightness(images, base) / brightness(images, lungs & ~base)
    assert auc(brighter.amax(dim=1), labels[:, FINDINGS.index("effusion")]) > 0.9


PINNED = {  # kind: mean of 20 images in [0, 1], area of their masks as a fraction
    "phantom": (0.4397, 0.0912),
    "parts": (0.2703, 0.1408),
    "symbols": (0.4980, 0.1200),
    "scenes": (0.5051, 0.1309),
    "grounds": (0.5026, 0.1309),
    "digits": (0.2410, 0.1530),
    "leaves": (0.4135, 0.0872),
    "hearts": (0.4281, 0.2824),
}


@pytest.mark.parametrize("kind", PINNED)
def test_brightness_and_areas_are_those_of_the_images_that_results_were_measured_on(kind):
    if kind in DRAWN:
        images, masks, _ = DRAWN[kind][0](20, seed=1)
        images = images / 255
    else:
        classes, draw = symbols.SETS[kind]
        drawn = [draw(classes[i % len(classes)], 64, np.random.default_rng(i)) for i in range(20)]
        images, masks = (torch.as_tensor(np.stack(each)).float() for each in zip(*drawn))
    found = images.mean().item(), masks.float().mean().item()
    assert found == pytest.approx(PINNED[kind], abs=2e-4)


def test_other_sizes_show_the_same_patient():
    small, large = phantom(3, seed=1, img_size=32), phantom(3, seed=1, img_size=128)
    assert (F.avg_pool2d(large[1].float(), 4) - small[1].float()).abs().mean() < 0.02
    assert torch.equal(small[2], large[2])


def test_each_marker_lies_where_it_is_said_to_and_only_where_it_is_present(drawn):
    images, masks, _ = drawn
    present = torch.arange(300) % 2 == 0
    stamped = {kind: stamp(images, present, kind, masks, seed=3) for kind in [*MARKERS, "disc"]}
    assert all(torch.equal(image[~present], images[~present]) for image in stamped.values())
    changed = {kind: (image != images)[:, 0] for kind, image in stamped.items()}
    corner = changed["corner"][present].float().mean(dim=0) > 0.9  # the others were 255 before
    assert corner.sum() == 20 and (stamped["corner"][present, 0][:, corner] == 255).all()
    assert masks[:, :, corner].float().mean() < 0.002 and not changed["corner"][:, ~corner].any()
    assert not (changed["anywhere"] & masks.any(dim=1)).any()
    at = (changed["anywhere"] * torch.arange(64.0)).sum(dim=(1, 2)) / changed["anywhere"].sum(dim=(1, 2))
    assert at[present].std() > 15 and (changed["anywhere"].sum(dim=(1, 2)) <= 20).all()
    assert torch.equal(stamp(images, present, "anywhere", masks, 3), stamped["anywhere"])
    assert not torch.equal(stamp(images, present, "anywhere", masks, 4), stamped["anywhere"])
    outside = ~masks.any(dim=1, keepdim=True) & present[:, None, None, None]
    assert torch.equal(stamped["tint"].int(), (images.int() + 25 * outside).clamp(max=255))
    frame = stamped["border"][present]
    assert (frame[..., 0, :] == 255).all() and (frame[..., -2:] == 255).all()
    assert not changed["border"][:, 2:-2, 2:-2].any()
    where = changed["disc"].any(dim=0).nonzero()
    assert where[:, 0].min() >= 54 and where[:, 1].max() <= 9


def test_markers_anywhere_are_placed_anew_in_each_split_but_alike_in_all_test_images(monkeypatch):
    seeds = []
    monkeypatch.setattr("common.splits.DRAWN_SIZES", {"val": 2, "test": 2})
    monkeypatch.setattr("common.phantom.stamp", lambda images, *given: seeds.append(given[-1]) or images)
    for seed in (0, 1):
        load("phantom", 64, seed, 2, marker=1, marker_kind="anywhere")
    one, two = seeds[:5], seeds[5:]  # of train, val, test, flipped, unseen
    assert one[2] == one[3] == one[4] and len({*one, *two}) == 6


def test_plate_and_holes_do_not_overlap_hardly_move_and_a_missing_hole_is_missing():
    _, masks, labels = plates(400, seed=1)
    masks = masks.float()
    assert (masks[:, 0] * masks[:, 1]).sum() == 0
    middle = (masks[:, 0] * torch.arange(64.0)).sum(dim=(1, 2)) / masks[:, 0].sum(dim=(1, 2))
    assert middle.std() < 2 and (middle - 32).abs().max() < 5
    only = labels.sum(dim=1) == labels[:, 1]  # no other defect, which might cover a hole
    size = masks[only, 1].sum(dim=(1, 2))
    assert size[labels[only, 1] == 1].max() < size[labels[only, 1] == 0].min()


def test_defects_change_the_image_where_their_mask_lies_and_nowhere_else(monkeypatch):
    """The same random numbers give images without any defect and with all of them."""
    both = []
    for prevalence in (0.0, 1.0):
        monkeypatch.setattr("common.plates.PREVALENCE", prevalence)
        both.append(plates(200, seed=3))
    change, defect = (both[1][0].float() - both[0][0].float())[:, 0].abs(), both[1][1][:, 2]
    near = F.max_pool2d(defect.float()[:, None], 3, 1, 1)[:, 0].bool()  # edges are soft
    assert change[defect].mean() > 25 and change[~near].mean() < 1.5
    assert not both[0][1][:, 2].any() and both[1][2].all()


def test_the_reference_image_has_every_region_and_each_split_its_own_images(monkeypatch):
    monkeypatch.setattr("common.splits.DRAWN_SIZES", {"val": 8, "test": 9})
    splits, reference, notes = load("parts", 64, seed=0, train_images=20)
    train = splits["train"]
    assert train.masks[train.names.index(reference)].flatten(1).any(dim=1).all() and not notes
    assert {split: len(data.names) for split, data in splits.items()} == {"train": 20, "val": 8, "test": 9}
    assert not torch.equal(train.images[:9], splits["test"].images)


def test_symbols_are_drawn_from_their_seed_into_a_folder_that_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(symbols, "HELD_OUT", {"val": 2, "test": 3})  # of each class
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


def test_digits_have_a_marker_that_turns_in_test_images_and_as_many_masks_as_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(symbols, "HELD_OUT", {"val": 2, "test": 3})
    symbols.main([str(tmp_path / "d"), *"--set digits --train 1 --marker --masks 3".split()])
    splits, reference, _ = load(str(tmp_path / "d"), 64)
    for split, agrees in (("train", True), ("val", True), ("test", False)):
        odd = splits[split].labels[:, splits[split].findings.index("odd")] == 1
        marked = splits[split].images[:, 0, 2:8, 56:62].flatten(1).min(dim=1).values == 255
        assert torch.equal(marked, odd) == agrees and torch.equal(marked, ~odd) != agrees
    assert [int(data.has_masks.sum()) for data in splits.values()] == [3, 0, 30] and reference
    area = splits["test"].masks.float().mean(dim=(1, 2, 3))
    assert 0.05 < area.min() and area.max() < 0.25


def test_hearts_are_tinted_outside_their_mask_the_other_way_round_in_test_images(monkeypatch, tmp_path):
    monkeypatch.setattr(symbols, "HELD_OUT", {"val": 1, "test": 3})
    for name, flags in (("plain", []), ("tinted", ["--marker"])):
        symbols.main([str(tmp_path / name), *"--set hearts --train 2 --masks 2".split(), *flags])
    plain, tinted = (load(str(tmp_path / name), 64)[0] for name in ("plain", "tinted"))
    for split, enlarged in (("train", True), ("test", False)):
        brighter = (tinted[split].images.int() - plain[split].images.int())[:, 0]  # (N, S, S)
        marked = plain[split].labels[:, plain[split].findings.index("enlarged")] == enlarged
        assert (brighter.flatten(1).amax(dim=1) > 20).tolist() == marked.tolist()
    outside = ~tinted["test"].masks[marked, 0]
    assert (brighter[marked][outside] > 0).float().mean() > 0.99 and not brighter[marked][~outside].any()
    known = tinted["train"].labels[tinted["train"].has_masks]
    assert known.sum(dim=0).tolist() == [1, 1]  # one of each class
