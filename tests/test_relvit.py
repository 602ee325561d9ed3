"""RelViT's targets are the published ones, its views give nothing away, and it learns its tasks."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, seeded

from relvit import TASKS, PairScores, RelViT, chance, cut, jitter
from relvit import patch_boxes, patch_views, relation_targets, shuffled
from vit import ViT


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_published_ones_ordered_and_shuffled(task):
    numbers, _ = golden("relvit_targets.npz")
    side, order = int(numbers["side"]), numbers["permutation"][None]
    targets, published = relation_targets(side, side), {"positions": "abs_positions"}.get(task, task)
    for target, how in ((targets[task], "ordered"), (shuffled(targets, order)[task][0], "shuffled")):
        expected = numbers[f"{how}.{published}"]
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=2e-4 if task == "angles" else 1e-5)


def test_targets_of_a_grid_that_is_not_square_and_what_a_constant_reaches():
    targets, angles = relation_targets(2, 3), np.zeros((6, 6))
    for (i, y, x), (j, y2, x2) in itertools.product([(i, *divmod(i, 3)) for i in range(6)], repeat=2):
        assert targets["relations"][i, j] == 3 * (np.sign(y - y2) + 1) + np.sign(x - x2) + 1
        a, b = (x + 1.5, y + 1.0), (x2 + 1.5, y2 + 1.0)  # moved by half of the columns and of the rows
        angles[i, j] = i != j and np.arccos(np.dot(a, b) / (np.hypot(*a) * np.hypot(*b) + 1e-4))
        distance = 2 * np.hypot(y - y2, x - x2) / 5**0.5 - 1
        assert targets["distances"][i, j].item() == pytest.approx(distance, abs=1e-6)
    np.testing.assert_allclose(targets["angles"], 2 * angles / angles.max() - 1, atol=1e-3)
    assert targets["positions"].tolist() == list(range(6))
    levels, d = chance(targets), targets["distances"]
    counts = np.bincount(targets["relations"].flatten())
    assert levels["relations"] == pytest.approx(counts.max() / 36) and levels["positions"] == 1 / 6
    assert levels["distances"] == pytest.approx((d - d.mean()).square().mean().sqrt().item())


def test_whole_boxes_cut_an_image_into_itself_and_an_order_moves_its_patches():
    images, boxes = torch.rand(2, 3, 8, 12, generator=seeded()), patch_boxes(2, 2, 3, seeded(), shrink=1.0)
    torch.testing.assert_close(cut(images, boxes, (2, 3), 4), images)
    torch.testing.assert_close(cut(images.double(), boxes, (2, 3), 4).float(), images)
    moved = cut(images, boxes[:, [5, 1, 2, 3, 4, 0]], (2, 3), 4)
    torch.testing.assert_close(moved[:, :, :4, :4], images[:, :, 4:, 8:])
    torch.testing.assert_close(moved[:, :, :4, 4:8], images[:, :, :4, 4:8])


@pytest.mark.parametrize("mega", [False, True])
def test_boxes_stay_within_their_cells_which_fill_the_image(mega):
    cells = patch_boxes(2000, 3, 4, seeded(), shrink=1.0, mega=mega).view(2000, 3, 4, 4)
    boxes = patch_boxes(2000, 3, 4, seeded(), shrink=0.8, mega=mega).view(2000, 3, 4, 4)
    corner, size = cells.split(2, dim=-1)
    for axis, dim in enumerate((1, 2)):  # cells begin where the one before ends, and the last ends at 1
        starts, ends = corner[..., axis].movedim(dim, 0), (corner + size)[..., axis].movedim(dim, 0)
        torch.testing.assert_close(starts[1:], ends[:-1])
        torch.testing.assert_close(ends[-1], torch.ones_like(ends[-1]))
    inner = boxes[..., :2] - corner
    assert (inner >= -1e-6).all() and (inner <= 0.2 * size + 1e-6).all()
    torch.testing.assert_close(boxes[..., 2:], 0.8 * size)
    heights, widths = size[:, 0, 0].unbind(-1)
    assert (heights.std() > 0.03) == mega and heights.min() >= 1 / 6 - 1e-6 and widths.min() >= 1 / 8 - 1e-6
    if mega:  # rows and columns are divided independently
        assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.1


def test_each_patch_changes_its_colours_on_its_own_and_stays_in_range():
    views = torch.rand(3, 3, 8, 16, generator=seeded())
    changed = jitter(views, 4, seeded())
    assert changed.min() >= 0 and changed.max() <= 1
    torch.testing.assert_close(jitter(views, 4, seeded(), strength=0.0), views)
    grey = jitter(torch.full((20, 1, 8, 8), 0.5), 4, seeded()).unflatten(3, (2, 4)).unflatten(2, (2, 4))
    level = grey[:, 0, :, 0, :, 0]
    assert torch.equal(grey, level[:, None, :, None, :, None].expand_as(grey))  # even within a patch
    assert 0.3 - 1e-6 < level.min() and level.max() < 0.7 + 1e-6  # 40 % of 0.5
    assert level.flatten(1).std(dim=1).min() > 0 and 0.1 < (level == 0.5).float().mean() < 0.3


def test_patches_of_a_view_do_not_touch_and_most_change_brightness_and_contrast():
    """Content that continues across a border would reveal neighbours."""
    images = torch.rand(4, 1, 16, 24, generator=seeded())
    views, boxes, _ = patch_views(images, (2, 3), 8, seeded())
    torch.testing.assert_close(boxes[..., 2:], torch.tensor([1 / 2, 1 / 3]).expand(4, 6, 2) / 1.15)
    changed = F.avg_pool2d((views - cut(images, boxes, (2, 3), 8)).abs(), 8) > 1e-3
    assert 0.5 < changed.float().mean() < 1
    two = jitter(torch.tensor([0.4, 0.6]).repeat(50, 1, 8, 4), 4, seeded())
    two = two.unflatten(3, (2, 4)).unflatten(2, (2, 4))
    contrast = two.std(dim=(3, 5), correction=0) / two.mean(dim=(3, 5)) / 0.2
    assert 0.6 - 1e-4 < contrast.min() < 0.7 and 1.3 < contrast.max() < 1.4 + 1e-4


@pytest.mark.parametrize("mega", [False, True])
def test_a_shuffled_view_says_where_each_patch_was_cut(mega):
    places = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    images = torch.stack(places).expand(6, 2, 32, 48)  # every pixel holds its place in [0, 1]
    views, boxes, order = patch_views(images, (2, 3), 8, seeded(), mega=mega, shuffle=True)
    assert views.shape == (6, 2, 16, 24) and (order != torch.arange(6)).any()
    assert torch.equal(order.sort(dim=1).values, torch.arange(6).expand(6, 6))
    means = F.avg_pool2d(cut(images, boxes, (2, 3), 8), 8).flatten(2)  # (B, 2, N)
    centres = (boxes[:, :, :2] + boxes[:, :, 2:] / 2).transpose(1, 2)
    torch.testing.assert_close(means, centres, rtol=0, atol=0.02)
    back = centres.gather(2, order.argsort(dim=1)[:, None].expand(-1, 2, -1)).unflatten(2, (2, 3))
    assert (back[:, 0, 0] < back[:, 0, 1]).all() and (back[:, 1].diff(dim=2) > 0).all()  # in order again
    assert patch_views(images, (2, 3), 8, seeded(), mega=mega)[2] is None


@pytest.mark.parametrize("grid", [(28, 28), (16, 32)])
def test_targets_of_large_grids_are_finite(grid):
    assert all(target.isfinite().all() for target in relation_targets(*grid).values())


def test_large_cells_are_averaged():
    noise, cells = torch.rand(4, 1, 64, 64, generator=seeded()), patch_boxes(4, 2, 2, seeded(), shrink=1.0)
    found, means = cut(noise, cells, (2, 2), 8), F.avg_pool2d(noise, 4)
    torch.testing.assert_close(found, means, rtol=0, atol=0.08)
    assert found.std() < 1.2 * means.std()


def test_patches_of_half_precision_lie_where_those_of_float32_do():
    images = torch.rand(2, 1, 224, 224, generator=seeded())
    boxes = patch_boxes(2, 14, 14, seeded())
    found, expected = (cut(x, boxes, (14, 14), 16) for x in (images.half(), images))
    assert found.dtype == torch.half
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("tasks", [TASKS, ("relations",), ("angles", "positions")])
def test_losses_and_metrics_are_those_of_the_requested_tasks(tasks):
    model = RelViT(ViT((16, 24), 8, 1, 18, 1, 2), 18, (2, 3), tasks)
    patches, order = torch.randn(2, 6, 18), torch.rand(2, 6).argsort(dim=1)
    loss, metrics = model.compare(patches, order)
    assert set(metrics) == set(model.chance) == set(tasks)
    expected, targets = 0.0, shuffled(relation_targets(2, 3), order)
    for task in tasks:
        scores, target = model.heads[task](patches), targets[task]
        if task in ("distances", "angles"):
            error = (scores[:, 0] - target).square().mean()
            torch.testing.assert_close(metrics[task], error.sqrt().detach())
        else:
            scores = scores.permute(0, 2, 3, 1) if task == "relations" else scores  # classes last
            error = F.cross_entropy(scores.flatten(0, -2), target.flatten())
            torch.testing.assert_close(metrics[task], (scores.argmax(dim=-1) == target).float().mean())
        expected += error
    torch.testing.assert_close(loss, expected)


def test_scores_of_pairs_are_scaled_products_of_two_maps_for_each_class():
    pairs, patches = PairScores(18, 9), torch.randn(2, 6, 18)  # two dimensions for each of nine relations
    q, k = (m(patches).unflatten(2, (9, 2)).transpose(1, 2) for m in (pairs.q, pairs.k))
    torch.testing.assert_close(pairs(patches), q @ k.mT / 2**0.5)


def test_without_positions_the_order_of_patches_carries_no_information():
    """Upstream, shuffled patches get the same features, shuffled: places must be seen in the image."""
    model = RelViT(ViT(16, 4, 1, 18, 2, 2), 18, (4, 4)).eval()
    images, boxes = torch.rand(2, 1, 16, 16), patch_boxes(2, 4, 4, seeded())
    order = torch.randperm(16)
    loss, _, mixed = model(cut(images, boxes[:, order], (4, 4), 4), order.expand(2, 16))
    expected, _, whole = model(cut(images, boxes, (4, 4), 4))
    torch.testing.assert_close(mixed.patches, whole.patches[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.encoder.patch_embed.proj.weight.grad.any()  # it is the encoder that learns
