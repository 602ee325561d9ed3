"""Average precision and AUC, against worked examples and brute force."""

import math

import pytest
import torch

from common.metrics import auc, average_precision, best_threshold, dice, localisation_ap, relevance_share


def brute_force(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """AP by its definition, one threshold after the other."""
    ap, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = targets[chosen].sum().item()
        ap += (hits / targets.sum().item() - recall) * hits / chosen.sum().item()
        recall = hits / targets.sum().item()
    return ap


def test_a_worked_example():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, torch.tensor([1, 0, 1, 0])).item() == pytest.approx(
        0.5 * 1 + 0.5 * 2 / 3
    )


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_it_equals_the_definition_with_few_and_many_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        scores = torch.randint(levels, (30,), generator=generator).double()
        targets = torch.randint(2, (30,), generator=generator)
        targets[0] = 1
        assert average_precision(scores, targets).item() == pytest.approx(
            brute_force(scores, targets), abs=1e-12
        )


def test_a_constant_map_scores_the_share_of_positives_wherever_they_lie():
    targets = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    assert average_precision(torch.zeros(2, 5), targets).tolist() == pytest.approx([0.4, 0.4])


def test_without_a_positive_it_is_nan_and_with_only_positives_one():
    scores = torch.rand(2, 4)
    result = average_precision(scores, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert result[0].isnan() and result[1] == 1


def test_a_map_that_is_the_region_scores_one_and_each_map_meets_each_region():
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, :, :4] = True
    masks[0, 1, :, 4:] = True
    maps = torch.zeros(1, 2, 4)
    maps[0, 0, [0, 2]] = 0.5  # left patches of a 2x2 grid
    maps[0, 1, [1, 3]] = 0.5
    ap = localisation_ap(maps, masks, (2, 2))
    assert ap.shape == (1, 2, 2)
    assert ap[0].diagonal().tolist() == [1, 1] and ap[0, 0, 1] < 0.5 and ap[0, 1, 0] < 0.5


def test_auc_is_the_share_of_pairs_in_order_ties_counting_half():
    torch.manual_seed(0)
    scores, labels = torch.randint(5, (60,)).double(), torch.randint(2, (60,)).double()
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert auc(scores, labels) == pytest.approx(
        ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    )
    assert auc(torch.tensor([1.0, 2, 3, 9]), torch.tensor([0.0, 1, 1, float("nan")])) == 1
    assert auc(torch.ones(4), torch.tensor([0.0, 1, 1, 0])) == 0.5
    assert math.isnan(auc(torch.rand(3), torch.ones(3)))


def test_the_relevance_share_is_the_part_of_absolute_relevance_in_the_mask():
    R = torch.tensor([[[[1.0, -2], [3, 0]]], [[[0.0, 0], [0, 0]]]])
    mask = torch.tensor([[[[1, 1], [0, 0]]]]).expand(2, 1, 2, 2)
    share = relevance_share(R, mask)
    assert share[0] == 0.5 and share[1].isnan()


def test_the_best_threshold_gets_as_many_right_as_any():
    torch.manual_seed(0)
    for _ in range(20):
        scores, labels = torch.randn(15).mul(2).round(), torch.randint(2, (15,)).float()
        labels[3] = float("nan")
        known = ~labels.isnan()
        right = lambda t: ((scores[known] > t) == labels[known].bool()).sum()  # noqa: E731
        best = max(right(t) for t in [*scores.tolist(), -9.0])
        assert right(best_threshold(scores, labels)) == best
    assert best_threshold(torch.ones(2), torch.full((2,), float("nan"))) == 0


def test_dice_is_the_overlap_of_the_mask_with_what_lies_above_a_share_of_the_map_s_maximum():
    maps = torch.tensor([[[0.0, 2.0, 4.0, 8.0]]])  # (1, 1, 4) on a 1x4 grid, at the masks' size
    mask = torch.tensor([0, 0, 1, 1], dtype=torch.bool).view(1, 1, 1, 4)
    found = dice(maps, mask, (1, 4), thresholds=3)[:, 0, 0]  # above 2, above 4, above 6
    assert found.tolist() == pytest.approx([1.0, 2 / 3, 2 / 3])
    torch.testing.assert_close(dice(maps * 1e-3, mask, (1, 4), thresholds=3)[:, 0, 0], found)


def test_dice_of_a_map_that_is_flat_or_zero_is_defined_and_of_an_empty_mask_unknown():
    maps = torch.stack([torch.ones(2, 4), torch.zeros(2, 4)])  # (2, 2, 4)
    masks = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    masks[:, 0, 0] = True  # half of the image; the second region is nowhere
    found = dice(maps, masks, (2, 2))
    assert found[:, 0, 0].tolist() == pytest.approx([2 / 3] * 19)
    assert (found[:, 1, 0] == 0).all() and found[:, :, 1].isnan().all()


def test_a_score_that_is_not_a_number_gives_no_figure():
    scores, labels = torch.tensor([0.9, torch.nan, 0.1]), torch.tensor([1.0, 1.0, 0.0])
    assert math.isnan(auc(scores, labels)) and average_precision(scores, labels).isnan()
    both = torch.stack([scores, torch.tensor([0.9, 0.5, 0.1])])
    assert average_precision(both, labels).isnan().tolist() == [True, False]  # only where it is
