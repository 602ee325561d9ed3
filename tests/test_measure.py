"""Metrics against worked examples; what is reported of a model, by choices on validation images only."""

import math
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses, seeded, unlabelled
from torch import nn
from torch.nn.functional import avg_pool2d

from common import explain, measure
from common.classify import Classifier
from common.data import Data, prepared, select
from common.explain import scores_in
from common.metrics import CannotMeasure, auc, average_precision, best_threshold, box_overlaps, boxes, corloc
from common.metrics import localisation_ap, max_box_acc, overlap, relevance_share
from common.objects import class_activation, measure_objects, outlined, untrained
from common.phantom import phantom
from common.probe import score
from resnet import ResNet
from simpool import GAP
from vit import ViT

NAN, GRID = torch.nan, (4, 4)


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
    for module in (measure, explain):
        monkeypatch.setattr(module, "attention_of", lambda encoder, images, layer: encoder.maps.pop(0))


@pytest.fixture
def lungs():
    """Eight phantoms with the mask of a lung as `splits`, and the exact attention (8, 1, 64) for it."""
    images, masks, _ = phantom(8, seed=3)
    has_masks = torch.ones(8, dtype=torch.bool)
    data = unlabelled(images, masks=masks[:, :1], has_masks=has_masks, regions=["lung"])
    return dict.fromkeys(("train", "val", "test"), data), avg_pool2d(data.masks.float(), 8).flatten(2)


def labelled(*rows: list[float], pixels=None) -> Data:
    """Images whose first row of pixels holds their labels, unless it is given; without masks."""
    images = torch.tensor(pixels or rows).nan_to_num()[:, None, None].to(torch.uint8)  # (M, 1, 1, K)
    findings = ["lump", "big heart", "spot"][: len(rows[0])]
    return unlabelled(images, labels=torch.tensor(rows), findings=findings)


def test_heads_of_an_unguided_encoder_are_chosen_on_validation_images(lungs):
    """Head 1 is best on validation, head 0 on test images: head 1 is reported."""
    splits, exact = lungs
    maps = torch.cat([torch.rand(8, 1, 64), exact], dim=1)
    found = measure.report(Encoder(maps, maps.flip(1)), splits, ["attention"])
    assert found.heads == {"lung": 1} and found.metrics["attention_mAP"] < 0.5


def test_the_mean_over_the_heads_of_an_unguided_encoder_stands_beside_the_best(lungs):
    splits, exact = lungs
    noise = 9 * torch.rand(8, 1, 64, generator=seeded())
    maps = torch.cat([exact + noise, exact - noise], dim=1)  # their mean is exact
    found = measure.report(Encoder(maps, maps), splits, ["attention"]).metrics
    assert found["mean_of_heads_mAP"] > 0.9 > found["attention_mAP"] + 0.2
    guided = measure.report(Encoder(maps, maps), splits, ["attention"], guided=True).metrics
    assert not any("mean_of_heads" in name for name in guided)


def test_guided_heads_belong_to_their_regions_and_stand_beside_the_prior(lungs):
    splits, exact = lungs
    maps = torch.cat([torch.rand(8, 1, 64), exact], dim=1)
    given = {"guided": True, "priors": lambda images: {"prior": (exact[: len(images)], (8, 8))}}
    found = measure.report(Encoder(maps, maps), splits, ["attention"], **given)
    assert found.heads == {"lung": 0} and list(found.tables["AP in %"]) == ["prior", "attention"]
    assert found.metrics["prior_AP_lung"] == found.metrics["prior_mAP"] > 0.9 > found.metrics["attention_mAP"]


def test_what_ap_lacks_is_noted(lungs):
    (splits, exact), undefined = lungs, "(too few test images of a kind, or validation images)"
    data, maps = splits["test"], torch.cat([torch.rand(8, 1, 64), exact], dim=1)
    none, empty = data._replace(has_masks=torch.zeros(8) > 0), data._replace(masks=data.masks & False)
    two = data._replace(masks=data.masks.repeat(1, 2, 1, 1), regions=["lung", "x"])
    some = data._replace(has_masks=torch.arange(8) < 3)
    for guided, changed, seen, note in (
        (False, {"val": none}, [maps], "no validation image has all masks: AP can't be measured"),
        (False, {"val": empty}, [maps], "no validation image shows lung: no head can be chosen for it"),
        (False, {"test": some}, [maps, maps[:3]], "AP: on the 3 of 8 test images with a foreground"),
        (True, {"val": none}, [maps], ""),
        (True, dict.fromkeys(splits, two), [exact], "2 regions, 1 head(s): AP can't be measured"),
        (True, {"test": empty}, [exact], f"not defined {undefined}: attention_AP_lung, attention_mAP"),
    ):
        found = measure.report(Encoder(*seen), splits | changed, ["attention"], guided=guided)
        measured = note.startswith(("AP", "not")) or not note
        assert found.notes == [note] * bool(note) and bool(found.metrics) == measured


@pytest.mark.parametrize("encoder", [ViT(8, 1, 1, 8, 1, 1, pool=GAP()), ResNet(1, 8)])
def test_an_even_pooling_has_no_attention_to_measure(encoder, lungs):
    found = measure.report(encoder, lungs[0], ["attention"])
    assert found.notes == ["patches are pooled by their mean: there is no attention to measure"]
    assert not found.metrics


def test_a_classifier_is_measured_on_every_kind_of_test_image_by_validation_thresholds():
    rows = [0.0, 1], [1.0, 0], [NAN, 1], [1.0, 1]
    test = labelled(*rows)
    flipped = test._replace(images=1 - test.images)
    val = labelled(*rows, pixels=[[7.0, 8], [8.0, 7], [0.0, 8], [8.0, 8]])  # the best threshold lies near 7.5
    half = test._replace(labels=test.labels * torch.tensor([1.0, -1]) + torch.tensor([0.0, 1]))
    splits = {"train": test, "val": test, "test": test, "flipped": flipped, "half": half}
    found, _, _, _, notes = measure.report(Encoder(), splits, ["bias"], multiclass=False)
    assert notes == ["only 4 test images with labels: each is worth up to 25 points of accuracy"]
    assert found["auc_same"] == found["auc_same_lump"] == found["auc_same_big_heart"] == 1
    assert found["auc_half_lump"] == 1 and found["auc_half_big_heart"] == 0 and found["auc_half"] == 0.5
    assert found["accuracy_same"] == 1 and found["accuracy_flipped"] == found["auc_flipped"] == 0
    masks = torch.zeros(len(test.names), 1, *test.images.shape[2:], dtype=torch.bool)
    masks[:3, :, :1] = True
    shown = test._replace(masks=masks, has_masks=torch.arange(len(test.names)) < 3, regions=["lung"])
    notes = measure.report(Encoder(), splits | {"test": shown}, ["bias"], multiclass=False).notes
    assert notes[1] == "relevance share: on the 3 of 4 test images with a foreground"
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


def test_accuracy_is_that_of_images_of_one_class_though_test_images_show_none_or_two():
    test = labelled([0.0, 1, 0], [0.0, 0, 0], [1.0, 1, 0], pixels=[[0.0, 9, 0], [0.0, 9, 0], [0.0, 0, 9]])
    splits = {"train": test, "val": test, "test": test}
    assert measure.report(Encoder(), splits, ["bias"], multiclass=True).metrics["accuracy_same"] == 1
    assert score(test.images[:, 0, 0].float(), test.labels, True)["accuracy"] == 1


def test_what_does_not_apply_is_said_only_if_it_was_asked_for(lungs):
    splits, exact = lungs
    assert measure.report(Encoder(), splits, ["bias"]).notes == ["bias is only for classifiers"]
    notes = measure.report(Encoder(), splits, ["bias"], multiclass=True).notes
    assert notes == ["no test image has a label: AUC can't be measured"]
    notes = measure.report(Encoder(exact, exact), splits, measure.QUICK).notes
    assert notes == [f"no train image has a label: {how} can't be measured" for how in ("knn", "linear")]


def test_the_score_of_an_image_is_the_probability_of_its_true_class_or_the_mean_ap(lungs):
    data = labelled([1.0, 0, 0], [0.0, 1, 0], [NAN] * 3, pixels=[[5.0, 0, 0]] * 3)
    _, scores = scores_in(Encoder(), data, {}, True, -1)
    right, wrong = (torch.tensor([5.0, 0, 0]) / 255 / 0.25).softmax(dim=0)[:2].tolist()
    assert scores[:2] == pytest.approx([right, wrong]) and math.isnan(scores[2])
    splits, exact = lungs
    what, scores = scores_in(Encoder(exact), splits["test"], {"lung": 0}, None, -1)
    assert what == "mean AP" and min(scores) > 0.9
    assert scores_in(Encoder(), splits["test"], {}, None, -1)[0] == ""


def squares(n: int = 12, regions: int = 1) -> Data:
    """Images of 16 px with a bright square of 8 px, on the grid of patches of 4 px, and its mask."""
    masks = torch.zeros(n, regions, 16, 16, dtype=torch.bool)
    for i in range(n):
        top, left = 4 * (i % 3), 4 * (i // 3 % 3)
        masks[i, :, top : top + 8, left : left + 8] = True
    images = (masks[:, :1] * 200).to(torch.uint8)
    names, known = [str(i) for i in range(n)], torch.ones(n, dtype=torch.bool)
    labels = torch.eye(2)[torch.arange(n) % 2]
    return Data(images, masks, known, labels, names, [f"object {r}" for r in range(regions)], ["a", "b"])


def test_a_map_of_the_object_reaches_everything_at_any_offset_and_one_of_the_background_nothing():
    data = squares()
    maps = avg_pool2d(data.masks.float(), 4).flatten(2)  # (M, 1, N)
    found = outlined(maps, maps, data.masks, data.masks, GRID)
    assert found["AP"] > 0.99 and found["CorLoc"] == 1 and found["MaxBoxAccV2"] > 0.99
    assert outlined(maps + 99, maps + 99, data.masks, data.masks, GRID) == pytest.approx(found)
    inverted = outlined(1 - maps, 1 - maps, data.masks, data.masks, GRID)
    assert inverted["AP"] < 0.2 and inverted["CorLoc"] < 0.2


def test_corloc_takes_its_threshold_from_validation_images():
    maps, small, large = torch.zeros(1, 1, 4, 4), *torch.zeros(2, 1, 1, 16, 16, dtype=torch.bool)
    maps[..., :3, :3], maps[..., 0, 0], small[..., :4, :4], large[..., :12, :12] = 0.5, 1, True, True
    maps = maps.flatten(2)
    assert outlined(maps, maps, small, small, GRID)["CorLoc"] == 1
    assert outlined(maps, maps, large, small, GRID)["CorLoc"] == 0  # a low one is best there


@pytest.mark.parametrize(
    "encoder", [ViT(16, 4, 1, 12, 1, 2, pool=GAP()), ResNet(1, 16)], ids=["vit", "resnet"]
)
@torch.no_grad()
def test_the_mean_of_a_class_activation_map_is_the_logit_of_the_likeliest_class(encoder):
    model, images = Classifier(encoder, 3).eval(), squares().images
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=seeded()) / 4)
    maps = class_activation(model, images)[:, 0]  # (M, N)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (maps.std(dim=1) > 1e-4).all()
    torch.testing.assert_close(maps.mean(dim=1), model(prepared(images)).amax(dim=1), rtol=1e-4, atol=1e-4)


def test_the_head_that_is_best_on_validation_images_and_two_controls_stand_beside_the_mean(monkeypatch):
    encoder, val, test = ViT(16, 4, 1, 12, 1, 2), squares(), squares(6)
    right = avg_pool2d(val.masks.float(), 4).flatten(2)
    maps, even = {encoder: torch.cat([1 - right, right], dim=1)}, torch.ones_like(right)
    monkeypatch.setattr("common.objects.attention_of", lambda net, x, layer: maps.get(net, even)[: len(x)])
    found = measure_objects(encoder, {"val": val, "test": test}, -1)
    assert list(found) == ["mean of heads", "best head", "untrained", "middle"]
    assert found["best head"]["AP"] > 0.99 > 0.3 > found["mean of heads"]["AP"] == found["untrained"]["AP"]
    middle = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    middle[..., 4:12, 4:12] = True
    val, test = (data._replace(masks=middle[:1].expand(len(data.names), -1, -1, -1)) for data in (val, test))
    assert measure_objects(encoder, {"val": val, "test": test}, -1)["middle"]["CorLoc"] == 1


def test_the_untrained_control_shares_no_weight_and_leaves_the_model_alone():
    model = Classifier(ViT(16, 4, 1, 12, 1, 2, registers=1), 2)
    for weight in model.parameters():
        weight.data.fill_(3)
    control, new = untrained(model), ViT(16, 4, 1, 12, 1, 2, registers=1)
    assert all((weight == 3).all() for weight in model.parameters())
    for name, weight in new.state_dict().items():  # drawn as those of a new one
        drawn = control.encoder.state_dict()[name]
        assert not (drawn == 3).any() and float(drawn.std()) == pytest.approx(float(weight.std()), rel=0.5)


def test_features_are_measured_beside_those_of_an_untrained_encoder(monkeypatch):
    """This one tells nothing about images: training has made its features worse than none."""
    labels = (torch.arange(24) % 2)[:, None].float()
    images = (100 * labels[..., None, None] + 20 * torch.rand(24, 1, 16, 16)).to(torch.uint8)
    data = unlabelled(images, labels=labels, findings=["bright"])
    splits, model = dict.fromkeys(("train", "val", "test"), data), Classifier(ViT(16, 4, 1, 12, 1, 2), 1)
    for weight in model.parameters():
        weight.data.zero_()
    made = Mock(side_effect=untrained)
    monkeypatch.setattr("common.measure.untrained", made)
    found = measure.report(model.encoder, splits, ["knn", "linear", "heads"])
    assert made.call_count == 1  # one control, whose features are kept
    assert found.metrics.pop("heads_mAUC") == 0.5
    for how in ("knn", "linear"):
        assert (found.metrics.pop(f"{how}_mAUC"), found.metrics.pop(f"{how}_mAUC_untrained")) == (0.5, 1)
        assert found.tables["probes, in %"][f"{how} mAUC"]["untrained encoder, 100 %"] == 1
    assert not found.metrics  # that is all, and a classifier has no such control
    assert found.notes[0] == "knn: an untrained encoder does better; training has not helped"
    assert list(measure.report(model, splits, ["knn"], multiclass=False).metrics) == ["knn_mAUC"]


def test_images_without_an_object_do_not_count():
    encoder, data = ViT(16, 4, 1, 12, 1, 2), squares()
    empty = data._replace(masks=data.masks.clone())
    empty.masks[6:] = False
    some = measure_objects(encoder, {"val": data, "test": select(data, torch.arange(6))}, -1)
    assert measure_objects(encoder, {"val": data, "test": empty}, -1) == some


def test_what_has_no_map_of_one_object_says_so():
    one, two = (dict.fromkeys(("val", "test"), squares(regions=n)) for n in (1, 2))
    even, encoder = ViT(16, 4, 1, 12, 1, 2, pool=GAP()), ViT(16, 4, 1, 12, 1, 2)
    refuses("mean pooling without a linear", measure_objects, even, one, -1, error=CannotMeasure)
    refuses("masks of exactly one region", measure_objects, encoder, two, -1, error=CannotMeasure)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_average_precision_is_its_definition_with_few_and_many_ties_and_constant_scores(levels):
    """The mean of the precisions at the score of each positive."""
    scores, targets = torch.randint(levels, (20, 1, 30)).double(), torch.randint(2, (20, 3, 30))
    targets[..., 0] = 1
    reached = (scores[..., None, :] >= scores[..., None]).double()  # (20, 1, 30, 30), a row a threshold
    precision = (reached * targets[..., None, :]).sum(dim=3) / reached.sum(dim=3)
    expected = (precision * targets).sum(dim=2) / targets.sum(dim=2)
    torch.testing.assert_close(average_precision(scores, targets), expected)


def test_average_precision_is_nan_without_a_positive_and_with_a_score_that_is_nan():
    assert average_precision(torch.zeros(1, 5), torch.zeros(1, 5)).isnan()
    unknown = torch.tensor([[NAN, 0, 1], [2, 0, 1]])  # a score that is NaN spoils its own row
    assert average_precision(unknown, torch.eye(3)[0]).isnan().tolist() == [True, False]


def test_localisation_compares_each_map_with_each_region():
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = True
    maps = torch.tensor([[[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]])  # left, right patches of a 2x2 grid
    (left, other), (another, right) = localisation_ap(maps, masks, (2, 2))[0].tolist()
    assert left == right == 1 and max(other, another) < 0.5


def test_auc_is_the_share_of_pairs_in_order_where_ties_count_half():
    scores, labels = torch.randint(5, (60,)).double(), torch.randint(2, (60,)).double()
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert auc(scores, labels) == pytest.approx(expected)
    assert auc(torch.tensor([1.0, 2, 3, 9]), torch.tensor([0.0, 1, 1, NAN])) == 1
    assert math.isnan(auc(torch.rand(3), torch.ones(3)))  # no negative
    assert math.isnan(auc(torch.tensor([NAN, 1, 2]), torch.tensor([0.0, 1, 0])))


def test_the_best_threshold_gets_as_many_right_as_any():
    for _ in range(20):
        scores, labels = torch.randn(15).mul(2).round(), torch.randint(2, (15,)).float()
        labels[3] = NAN
        known = ~labels.isnan()
        right = [((scores > t) == labels)[known].sum() for t in [best_threshold(scores, labels), -9, *scores]]
        assert right[0] == max(right)


def test_the_relevance_share_is_the_part_of_absolute_relevance_in_the_mask():
    R = torch.tensor([[[[1.0, -2], [1, 0]]], [[[0.0, 0], [0, 0]]]])
    share = relevance_share(R, torch.tensor([[[[1, 1], [0, 0]]]]).expand(2, 1, 2, 2))
    assert share[0] == 0.75 and share[1].isnan()


def boxes_of_parts(mask):
    """The boxes of a mask's components: each pixel joins those that it touches into one."""
    parts = []
    for y, x in mask.nonzero().tolist():
        touched = [part for part in parts if any(abs(y - v) < 2 and abs(x - u) < 2 for v, u in part)]
        parts = [part for part in parts if part not in touched] + [{(y, x)}.union(*touched)]
    sides = [tuple(zip(*part)) for part in parts]
    return sorted((min(xs), min(ys), max(xs) + 1, max(ys) + 1) for ys, xs in sides)


@pytest.mark.parametrize("density", [0.2, 0.35, 0.5, 0.8])
def test_boxes_are_those_of_pixels_that_touch(density):
    masks = torch.rand(10, 9, 13, generator=seeded()) < density
    for mask, found in zip(masks, boxes(masks).long().tolist()):
        assert sorted(tuple(box) for box in found if any(box)) == boxes_of_parts(mask)
    spiral = torch.zeros(1, 7, 7, dtype=torch.bool)
    spiral[0, 0], spiral[0, :, 6], spiral[0, 6], spiral[0, 2:, 0], spiral[0, 2, :5] = (True,) * 5
    assert boxes(spiral).tolist() == [[[0, 0, 7, 7]]] and not boxes(spiral & False).any()


def test_the_object_behind_a_pole_has_one_box():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 1:6, 1:4] = mask[0, 1:6, 5:7] = True
    exact = torch.zeros(1, 8, 8)
    exact[0, 1:6, 1:7] = 1
    masks = torch.cat([mask, mask.flip(2), exact > 0])  # the larger part is left, right; there is one
    assert (box_overlaps(torch.cat([exact, exact.flip(2), exact]), masks) == 1).all()


def test_the_best_component_counts_for_box_accuracy_and_the_largest_for_corloc():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 1:5, 1:5] = True
    larger = torch.zeros(1, 8, 8)
    larger[0, 6:8], larger[0, 1:5, 1:4] = 1, 1  # beside it a larger part; 3 of the 4 columns
    assert overlap(boxes(larger > 0), boxes(mask)).amax() == 0.75
    best, largest = box_overlaps(larger, mask)
    assert best.unique().tolist() == [0.75] and not largest.any()


def test_one_threshold_serves_all_images_and_corloc_takes_it_from_others():
    overlaps = torch.tensor([[0.4, 0.6], [0.9, 0.2], [0.6, 0.3]])  # 3 thresholds, 2 images
    assert max_box_acc(overlaps) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert corloc(overlaps, torch.tensor([[0.1], [0.1], [0.6]])) == 0.5
    assert corloc(torch.tensor([[0.4], [0.7]]), overlaps[:2]) == 0.0  # equally good there: the lower one
