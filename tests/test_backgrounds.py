"""Hospitals and exchanged backgrounds: what they change, and what they tell of a model."""

import pytest
import torch

from common.backgrounds import exchanged, without_foreground
from common.baselines import Pipeline
from common.data import SPLITS, Data
from common.hospitals import HOSPITALS, mixed, taken_at
from common.measure import measure_backgrounds, measure_bias
from common.phantom import phantom
from common.splits import load


def has_the_letter(images):
    """Whether images (n, 1, 64, 64) have hospital A's L in the upper right corner, (n,) bool."""
    return images[:, 0, :8, -8:].amax(dim=(1, 2)) == 255


def test_a_hospital_moves_image_and_masks_together_draws_the_same_for_a_seed_and_is_mixed_image_by_image():
    images, masks, _ = phantom(40, seed=1)
    coded = (masks[:, 2:] * 255).to(torch.uint8)  # the heart alone, as an image
    for name in HOSPITALS:
        moved, where = taken_at(name, coded, masks, seed=3)
        heart = where[:, 2:]
        inside, outside = ((moved.float() * m).sum() / m.sum() for m in (heart, ~heart))
        assert inside > 5 * outside
        assert not torch.equal(where, masks) and torch.equal(taken_at(name, coded, masks, seed=3)[0], moved)
    a, b, c = (taken_at(name, images, masks, 3) for name in "ABC")
    assert c[1].sum() < a[1].sum()  # smaller on the image
    for found, of_a, of_b in zip(mixed(torch.arange(40) % 2 == 0, images, masks, 3), a, b):
        assert torch.equal(found[::2], of_a[::2]) and torch.equal(found[1::2], of_b[1::2])


def test_positives_come_from_hospital_a_and_flipped_ones_from_b(few_test_images):
    splits, *_ = load("phantom", 64, 0, 30, marker=1.0, marker_kind="hospitals", findings=["enlarged heart"])
    assert set(splits) == {*SPLITS, "flipped", "hospital A", "hospital B", "hospital C"}
    for split, of_a in {"train": True, "test": True, "flipped": False}.items():
        assert torch.equal(has_the_letter(splits[split].images), (splits[split].labels[:, 1] == 1) == of_a)
    assert has_the_letter(splits["hospital A"].images).all()
    assert not has_the_letter(splits["hospital B"].images).any()
    assert torch.equal(splits["hospital C"].labels, splits["test"].labels)


def striped(n: int = 40):
    """Images (n, 1, 16, 16) whose background is 50 or 150 by the label, an object of 250 or 0, and masks."""
    y = torch.eye(2)[torch.arange(n) % 2]
    x = torch.where(y[:, 1] == 1, 150.0, 50.0)[:, None, None, None].repeat(1, 1, 16, 16)
    m = torch.zeros(n, 1, 16, 16)
    m[:, :, 4:8, 4:8] = 1
    return torch.where(m > 0, 250 * y[:, 1, None, None, None], x), m, y


def striped_data(n: int):
    """The same as Data, and the masks (n, 1, 16, 16)."""
    (x, m, y), names = striped(n), [str(i) for i in range(n)]
    return Data(x.to(torch.uint8), m.bool(), torch.ones(n).bool(), y, names, ["o"], ["a", "b"]), m


def test_a_hole_is_filled_with_the_image_s_background_or_black_as_its_kind_says():
    x, m, y = striped()
    kinds = exchanged(x, m, y, torch.Generator())
    assert torch.equal(kinds["only background"], x[:, :, :1, :1].expand_as(x))
    assert not (kinds["no foreground"] * m).any()
    large = torch.zeros_like(m)
    large[:, :, 1:15, 1:15] = 1
    assert set(without_foreground(x, large).unique().tolist()) == {50, 150}


@pytest.mark.parametrize(
    "reads, expected", [("ground", (100, 100, 50, 100, 100)), ("object", (100, 100, 100, 50, 50))]
)
def test_exchanged_backgrounds_tell_what_a_model_reads(reads, expected):
    data, _ = striped_data(400)

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            x = images[:, 0, 0, 0] if reads == "ground" else images[:, 0, 4:8, 4:8].mean(dim=(1, 2)) > 1
            return torch.stack([-x.float(), x.float()], dim=1) * self.weight

    table = measure_backgrounds(Reader(), {"test": data, "val": data}, True)
    assert [100 * row["AUC"] for row in table.values()] == pytest.approx(expected, abs=6)


def test_of_a_pipeline_the_segmenter_s_dice_is_measured_on_each_kind_of_test_images():
    data, m = striped_data(8)

    class Half(Pipeline):
        def foreground(self, images):
            return (torch.ones_like(images[:, :1]) * m.flip(0)).bool() & (torch.arange(16) < 6)

    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
    classifier.encoder = None
    model = Half(classifier, torch.nn.Identity())
    table = measure_bias(model, {"test": data, "val": data}, True, {"epsilon": 0.1})
    assert table["same"]["segmentation Dice"] == pytest.approx(2 / 3)  # half of each mask
