"""Metrics against worked examples and brute force."""

import math

import pytest
import torch

from common.metrics import auc, average_precision, best_threshold, box_overlaps, boxes, corloc, dice
from common.metrics import localisation_ap, max_box_acc, overlap, relevance_share

NAN = torch.nan


def brute_force(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """AP by its definition, one threshold after the other."""
    ap, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = targets[chosen].sum().item()
        ap += (hits / targets.sum().item() - recall) * hits / chosen.sum().item()
        recall = hits / targets.sum().item()
    return ap


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_its_definition_with_few_and_many_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (20, 1, 30), generator=generator).double()
    targets = torch.randint(2, (20, 3, 30), generator=generator)
    targets[..., 0] = 1
    expected = [[brute_force(s[0], t) for t in several] for s, several in zip(scores, targets)]
    torch.testing.assert_close(average_precision(scores, targets), torch.tensor(expected).double())


def test_average_precision_of_constant_scores_is_the_share_of_positives_and_nan_without_one():
    targets = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    found = average_precision(torch.zeros(4, 5), targets)
    assert found[:3].tolist() == pytest.approx([0.4, 0.4, 1]) and found[3].isnan()
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
    assert best_threshold(torch.ones(2), torch.full((2,), NAN)) == 0


def test_dice_compares_the_mask_with_the_pixels_above_a_share_of_the_map_s_maximum():
    maps = torch.tensor([[[0.0, 2.0, 4.0, 8.0]]])  # (1, 1, 4) on a 1x4 grid, at the masks' size
    mask = torch.tensor([0, 0, 1, 1], dtype=torch.bool).view(1, 1, 1, 4)
    found = dice(maps, mask, (1, 4), thresholds=3)[:, 0, 0]  # above 2, 4 and 6
    assert found.tolist() == pytest.approx([1.0, 2 / 3, 2 / 3])
    torch.testing.assert_close(dice(maps * 1e-3, mask, (1, 4), thresholds=3)[:, 0, 0], found)
    maps = torch.stack([torch.ones(2, 4), torch.zeros(2, 4)])  # (2, 2, 4), flat
    masks = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    masks[:, 0, 0] = True  # half of the image; the second region is empty
    found = dice(maps, masks, (2, 2))
    assert found[:, 0, 0].tolist() == pytest.approx([2 / 3] * 19)
    assert (found[:, 1, 0] == 0).all() and found[:, :, 1].isnan().all()


def test_the_relevance_share_is_the_part_of_absolute_relevance_in_the_mask():
    R = torch.tensor([[[[1.0, -2], [3, 0]]], [[[0.0, 0], [0, 0]]]])
    share = relevance_share(R, torch.tensor([[[[1, 1], [0, 0]]]]).expand(2, 1, 2, 2))
    assert share[0] == 0.5 and share[1].isnan()


def flooded(mask):
    """The boxes of a mask's components, found by flood fill."""
    left, found = {(int(y), int(x)) for y, x in mask.nonzero()}, []
    while left:
        front, part = [left.pop()], []
        while front:
            part.append(front.pop())
            near = {(part[-1][0] + dy, part[-1][1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        ys, xs = zip(*part)
        found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return sorted(found)


@pytest.mark.parametrize("density", [0.2, 0.35, 0.5, 0.8])
def test_boxes_are_those_of_flood_fill(density):
    masks = torch.rand(10, 9, 13, generator=torch.Generator().manual_seed(0)) < density
    for mask, found in zip(masks, boxes(masks).long().tolist()):
        assert sorted(tuple(box) for box in found if any(box)) == flooded(mask)
    spiral = torch.zeros(1, 7, 7, dtype=torch.bool)
    spiral[0, 0], spiral[0, :, 6], spiral[0, 6], spiral[0, 2:, 0], spiral[0, 2, :5] = (True,) * 5
    assert boxes(spiral).tolist() == [[[0, 0, 7, 7]]] and not boxes(spiral & False).any()


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
