"""What is reported of a model: choices on validation images only, names as in metrics.json, clear notes."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from common import measure
from common.data import Data
from common.phantom import phantom
from resnet import ResNet
from simpool import GAP
from vit import ViT

NAN = torch.nan


class Encoder(nn.Module):
    """Attention is taken from `maps`, one after the other; predictions are the first row of pixels."""

    def __init__(self, *maps):
        super().__init__()
        self.maps, self.p, self.pool = list(maps), nn.Parameter(torch.zeros(())), None

    encoder = property(lambda self: self)

    def grid(self, images):
        return 8, 8

    def forward(self, images):
        return images[:, 0, 0]


@pytest.fixture(autouse=True)
def attention(monkeypatch):
    monkeypatch.setattr(measure, "attention_of", lambda encoder, images, layer: encoder.maps.pop(0))


@pytest.fixture
def lungs():
    """Eight phantoms with the mask of a lung as `splits`, and the exact attention (8, 1, 64) for it."""
    images, masks, _ = phantom(8, seed=3)
    data = Data(images, masks[:, :1], torch.ones(8, dtype=torch.bool), None, list("abcdefgh"), ["lung"], [])
    return dict.fromkeys(("train", "val", "test"), data), avg_pool2d(data.masks.float(), 8).flatten(2)


def labelled(*rows: list[float], pixels=None) -> Data:
    """Images whose first row of pixels holds their labels, unless it is given; without masks."""
    labels = torch.tensor(rows)
    images = torch.tensor(pixels or rows).nan_to_num()[:, None, None].to(torch.uint8)  # (M, 1, 1, K)
    empty, findings = torch.zeros(len(rows), dtype=torch.bool), ["lump", "big heart", "spot"][: len(rows[0])]
    return Data(images, None, empty, labels, [""] * len(rows), [], findings)


def test_heads_of_an_unguided_encoder_are_chosen_on_validation_images(lungs):
    """Head 1 is best on validation, head 0 on test images: head 1 is reported."""
    splits, exact = lungs
    maps = torch.cat([torch.rand(8, 1, 64), exact], dim=1)
    found = measure.report(Encoder(maps, maps.flip(1)), splits, ["attention"])
    assert found.heads == {"lung": 1} and found.metrics["attention_mAP"] < 0.5


def test_the_mean_over_the_heads_of_an_unguided_encoder_stands_beside_the_best(lungs):
    splits, exact = lungs
    noise = 9 * torch.rand(8, 1, 64, generator=torch.Generator().manual_seed(0))
    maps = torch.cat([exact + noise, exact - noise], dim=1)  # their mean is exact
    found = measure.report(Encoder(maps, maps), splits, ["attention"]).metrics
    assert found["mean_of_heads_mAP"] > 0.9 > found["attention_mAP"] + 0.2
    guided = measure.report(Encoder(maps, maps), splits, ["attention"], guided=True).metrics
    assert not any("mean_of_heads" in name for name in guided)


def test_the_dice_threshold_is_chosen_on_validation_images(lungs):
    splits, exact = lungs
    flat = exact + 1.0  # above half of the largest value: the whole image
    other, own = (measure.report(Encoder(v, flat), splits, ["attention"]).metrics for v in (exact, flat))
    assert other["attention_mDice"] < own["attention_mDice"] - 0.2


def test_guided_heads_belong_to_their_regions_and_stand_beside_the_prior(lungs):
    splits, exact = lungs
    maps = torch.cat([torch.rand(8, 1, 64), exact], dim=1)
    given = {"guided": True, "priors": lambda images: {"prior": (exact[: len(images)], (8, 8))}}
    found = measure.report(Encoder(maps, maps), splits, ["attention"], **given)
    assert found.heads == {"lung": 0} and list(found.tables["AP in %"]) == ["prior", "attention"]
    assert found.metrics["prior_AP_lung"] == found.metrics["prior_mAP"] > 0.9 > found.metrics["attention_mAP"]
    none = splits["val"]._replace(has_masks=torch.zeros(8, dtype=torch.bool))
    found = measure.report(Encoder(maps), splits | {"val": none}, ["attention"], guided=True)
    assert "attention_mAP" in found.metrics and "attention_mDice" not in found.metrics
    found = measure.report(Encoder(maps), splits | {"val": none}, ["attention"])
    assert found.notes == ["no validation image has all masks: AP can't be measured"] and not found.metrics
    empty = splits["val"]._replace(masks=torch.zeros_like(splits["val"].masks))
    found = measure.report(Encoder(maps), splits | {"val": empty}, ["attention"])
    assert found.notes == ["no validation image shows lung: no head can be chosen for it"]


@pytest.mark.parametrize("encoder", [ViT(8, 1, 1, 8, 1, 1, pool=GAP()), ResNet(1, 8)])
def test_an_even_pooling_has_no_table_of_attention_but_the_ap_of_a_flat_map(encoder, lungs):
    splits, exact = lungs
    encoder.maps, encoder.grid = [torch.full_like(exact, 1 / 64)] * 2, lambda images: (8, 8)
    found = measure.report(encoder, splits, ["attention"])
    assert found.notes == ["the pooling is even: no attention; its AP is that of a flat map"]
    assert not found.tables and not found.heads
    assert found.metrics["attention_AP_lung"] == pytest.approx(splits["test"].masks.double().mean().item())


def test_a_classifier_is_measured_on_every_kind_of_test_image_by_validation_thresholds():
    rows = [0.0, 1], [1.0, 0], [NAN, 1], [1.0, 1]
    test = labelled(*rows)
    flipped = test._replace(images=1 - test.images)
    val = labelled(*rows, pixels=[[7.0, 8], [8.0, 7], [0.0, 8], [8.0, 8]])  # the best threshold lies near 7.5
    splits = {"train": test, "val": test, "test": test, "flipped": flipped}
    found = measure.report(Encoder(), splits, ["bias"], multiclass=False).metrics
    assert found["auc_same"] == found["auc_same_lump"] == found["auc_same_big_heart"] == 1
    assert found["accuracy_same"] == 1 and found["accuracy_flipped"] == found["auc_flipped"] == 0
    # for other thresholds, test images are all negative: 2 of 7 known labels are right
    found = measure.report(Encoder(), splits | {"val": val}, ["bias"], multiclass=False).metrics
    assert found["accuracy_same"] == pytest.approx(2 / 7) and found["auc_same"] == 1


def test_two_classes_are_measured_by_the_second_and_three_by_the_likeliest():
    two, pixels = labelled([0.0, 1], [1.0, 0]), [[142.0, 123, 123], [149, 156, 9], [0, 0, 200]]
    three = labelled(*torch.eye(3).tolist(), pixels=pixels)  # no threshold for the lump gets all right
    for data, columns in (two, {"big_heart"}), (three, {"lump", "big_heart", "spot"}):
        splits = dict.fromkeys(("train", "val", "test"), data)
        found = measure.report(Encoder(), splits, ["bias"], multiclass=True)
        assert {name.removeprefix("auc_same_") for name in found.metrics if name.count("_") > 1} == columns
        assert found.metrics["accuracy_same"] == found.metrics["auc_same_big_heart"] == 1


def test_what_does_not_apply_is_said_only_if_it_was_asked_for(lungs):
    splits, exact = lungs
    assert measure.report(Encoder(), splits, ["bias"]).notes == ["bias is of classifiers only"]
    notes = measure.report(Encoder(), splits, ["bias"], multiclass=True).notes
    assert notes == ["no test image has a label: AUC can't be measured"]
    notes = measure.report(Encoder(exact, exact), splits, measure.QUICK).notes
    assert notes == [f"no train image has a label: {how} can't be measured" for how in ("knn", "linear")]


def test_the_score_of_an_image_is_the_probability_of_its_true_class_or_the_mean_ap(lungs):
    data = labelled([1.0, 0, 0], [0.0, 1, 0], [NAN] * 3, pixels=[[5.0, 0, 0]] * 3)
    _, scores = measure.scores_in(Encoder(), data, {}, True, -1)
    right, wrong = (torch.tensor([5.0, 0, 0]) / 255 / 0.25).softmax(dim=0)[:2].tolist()
    assert scores[:2] == pytest.approx([right, wrong]) and math.isnan(scores[2])
    splits, exact = lungs
    what, scores = measure.scores_in(Encoder(exact), splits["test"], {"lung": 0}, None, -1)
    assert what == "mean AP" and min(scores) > 0.9
    assert measure.scores_in(Encoder(), splits["test"], {}, None, -1)[0] == ""
