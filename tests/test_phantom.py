"""The drawn chest X-rays are the same for a seed, and their masks and labels tell the truth."""

import pytest
import torch

from common.data import load
from common.metrics import auc
from common.phantom import BATCH, FINDINGS, REGIONS, phantom, stamp


@pytest.fixture(scope="module")
def drawn():
    return phantom(300, seed=1)


def test_what_is_drawn_has_the_promised_shapes(drawn):
    images, masks, labels = drawn
    assert images.shape == (300, 1, 64, 64) and images.dtype == torch.uint8
    assert masks.shape == (300, len(REGIONS), 64, 64) and masks.dtype == torch.bool
    assert labels.shape == (300, len(FINDINGS)) and set(labels.unique().tolist()) == {0.0, 1.0}
    assert (masks.sum(dim=(2, 3)) > 40).all()  # nobody lacks a lung or a heart


def test_a_seed_draws_the_same_images_however_many_and_another_seed_others(drawn):
    assert BATCH < 300  # so that the second batch is met, too
    for some, many in zip(phantom(5, seed=1), drawn):
        assert torch.equal(some, many[:5])
    assert torch.equal(phantom(BATCH + 1, seed=1)[0][-1], drawn[0][BATCH])
    assert not torch.equal(phantom(5, seed=2)[0], drawn[0][:5])


def test_regions_do_not_overlap(drawn):
    assert drawn[1].sum(dim=1).max() == 1


def test_the_left_lung_is_on_the_image_s_right_and_the_heart_leans_to_it(drawn):
    x = torch.arange(64.0)
    masks = drawn[1].float()
    left, right, heart = ((masks[:, r] * x).sum(dim=(1, 2)) / masks[:, r].sum(dim=(1, 2)) for r in range(3))
    assert (left > right).all()
    assert ((heart - right) > (left - heart)).float().mean() > 0.7


def test_the_drawing_agrees_with_its_masks(drawn):
    """Lungs are darker than what surrounds them, hearts brighter than lungs, in nearly every healthy one."""
    images, masks, labels = drawn
    healthy = labels.sum(dim=1) == 0
    values, masks = images[healthy, 0].float(), masks[healthy]
    inside = [(values * m).sum(dim=(1, 2)) / m.sum(dim=(1, 2)) for m in masks.unbind(1)]
    ring = torch.nn.functional.max_pool2d(masks.float(), 7, 1, 3).bool() & ~masks.any(dim=1, keepdim=True)
    around = [(values * m).sum(dim=(1, 2)) / m.sum(dim=(1, 2)) for m in ring.unbind(1)]
    for r in range(2):
        assert (inside[r] < around[r]).float().mean() > 0.95
        assert (inside[2] > inside[r]).all()


def test_findings_change_the_image_where_they_are_said_to_be(drawn):
    images, masks, labels = drawn
    air = masks[:, :2].any(dim=1)
    hearts = masks[:, 2].sum(dim=(1, 2)).float() / air.sum(dim=(1, 2))
    assert hearts[labels[:, 0] == 1].mean() > 1.4 * hearts[labels[:, 0] == 0].mean()
    values = images.float() * masks[:, :2]
    left, right = (values.sum(dim=(2, 3)) / masks[:, :2].sum(dim=(2, 3))).unbind(1)
    unlike = (left - right).abs()  # fluid and opacities lie on one side
    assert unlike[labels[:, 1:].sum(dim=1) > 0].mean() > 1.5 * unlike[labels[:, 1:].sum(dim=1) == 0].mean()


def test_an_effusion_lies_at_a_lung_s_base_in_sight(drawn):
    """Brightness at the base tells who has one; it did not when fluid lay under the diaphragm."""
    images, masks, labels = drawn
    down = torch.arange(64.0)[:, None]
    brighter = []
    for lung in masks[:, :2].unbind(1):
        rows = torch.where(lung.any(dim=2, keepdim=True), down, torch.nan)
        low, high = rows.nan_to_num(-1).amax(dim=(1, 2)), rows.nan_to_num(64).amin(dim=(1, 2))
        base = lung & (down > (low - 0.3 * (low - high))[:, None, None])
        light = [
            (images[:, 0] * part).sum(dim=(1, 2)) / part.sum(dim=(1, 2)) for part in (base, lung & ~base)
        ]
        brighter.append(light[0] / light[1])
    assert auc(torch.maximum(*brighter), labels[:, FINDINGS.index("effusion")]) > 0.9


def test_other_sizes_show_the_same_patient():
    small, large = phantom(3, seed=1, img_size=32), phantom(3, seed=1, img_size=128)
    shrunk = torch.nn.functional.avg_pool2d(large[1].float(), 4)
    assert (shrunk - small[1].float()).abs().mean() < 0.02
    assert torch.equal(small[2], large[2])


def test_impossible_requests_are_refused():
    for n, size in ((0, 64), (3, 8)):
        with pytest.raises(ValueError, match="at least 1 image of at least 16 px"):
            phantom(n, seed=0, img_size=size)


def test_the_marker_is_a_bright_l_beside_lungs_and_heart_where_it_is_asked_for(drawn):
    images, masks, _ = drawn
    present = torch.arange(300) % 2 == 0
    stamped = stamp(images, present)
    assert torch.equal(stamped[~present], images[~present])
    changed = (stamped[present] != images[present]).float().mean(dim=0)[0]
    assert (changed > 0.9).sum() == 20 and ((changed > 0) & (changed <= 0.9)).sum() == 0
    assert (stamped[present, 0][:, changed > 0] == 255).all()
    assert masks[:, :, changed > 0].float().mean() < 0.002  # hardly ever over a lung


def test_an_l_anywhere_touches_no_region_and_lies_elsewhere_in_each_image(drawn):
    images, masks, _ = drawn
    here = torch.ones(300, dtype=torch.bool)
    changed = (stamp(images, here, "anywhere", masks, seed=3) != images)[:, 0]
    assert not (changed & masks.any(dim=1)).any()
    centre = (changed * torch.arange(64.0)).sum(dim=(1, 2)) / changed.sum(dim=(1, 2))
    assert centre.std() > 15 and (changed.sum(dim=(1, 2)) <= 20).all()  # fewer where it was 255 already
    assert torch.equal(stamp(images, here, "anywhere", masks, 3), stamp(images, here, "anywhere", masks, 3))


def test_a_tint_a_frame_and_a_disc_lie_where_they_are_said_to(drawn):
    images, masks, _ = drawn
    present = torch.arange(300) % 2 == 0
    tinted, framed, with_disc = (stamp(images, present, kind, masks) for kind in ("tint", "border", "disc"))
    outside = ~masks.any(dim=1, keepdim=True) & present[:, None, None, None]
    assert torch.equal(tinted.int(), (images.int() + 25 * outside).clamp(max=255))
    assert (framed[present, :, 0] == 255).all() and (framed[present, :, :, -2:] == 255).all()
    assert torch.equal(framed[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2])
    changed = (with_disc != images).any(dim=0)[0].nonzero()
    assert changed[:, 0].min() >= 54 and changed[:, 1].max() <= 9
    for stamped in (tinted, framed, with_disc):
        assert torch.equal(stamped[~present], images[~present])


def test_a_marker_that_is_none_is_refused(drawn):
    with pytest.raises(ValueError, match="marker moustache is none of corner, anywhere, tint, border, disc"):
        stamp(drawn[0], drawn[2][:, 0] > 0, "moustache")
    with pytest.raises(ValueError, match="images of 16 px are too small for a marker"):
        stamp(drawn[0][..., :16, :16], drawn[2][:, 0] > 0)
    with pytest.raises(ValueError, match="has no place for a marker"):
        stamp(drawn[0], drawn[2][:, 0] > 0, "anywhere", torch.ones_like(drawn[1]))


def test_markers_anywhere_are_placed_anew_in_each_part_but_alike_in_all_test_images(monkeypatch):
    seeds = []
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 2, "test": 2})
    monkeypatch.setattr("common.data.bodies.stamp", lambda images, *_: seeds.append(_[-1]) or images)
    for seed in (0, 1):
        load("phantom", 64, seed, 2, marker=1, marker_kind="anywhere")
    one, two = seeds[:5], seeds[5:]  # of train, val, test, flipped, unseen
    assert one[2] == one[3] == one[4] and len({*one, *two}) == 6
