"""RelViT's targets are the published ones, its views give nothing away, and it learns what it is asked."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

from relvit import TASKS, RelViT, chance, cut, jitter, patch_boxes, patch_views, relation_targets, shuffled
from vit import ViT

NAMES = {"positions": "abs_positions"}  # as published, where it differs


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_published_ones_ordered_and_shuffled(task):
    golden = np.load(Path(__file__).parent / "golden" / "relvit_targets.npz")
    side, order = int(golden["side"]), torch.from_numpy(golden["permutation"])[None]
    targets = relation_targets(side, side)
    mixed = shuffled(targets, order)[task][0]
    for got, how in ((targets[task], "ordered"), (mixed, "shuffled")):
        want = torch.from_numpy(golden[f"{how}.{NAMES.get(task, task)}"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4 if task == "angles" else 1e-5)


def test_targets_of_a_grid_that_is_not_square():
    targets = relation_targets(2, 3)
    positions, angles = [(y, x) for y in range(2) for x in range(3)], np.zeros((6, 6))
    for i, (y, x) in enumerate(positions):
        assert targets["positions"][i] == i
        for j, (y2, x2) in enumerate(positions):
            sign = (y > y2) - (y < y2), (x > x2) - (x < x2)
            assert targets["relations"][i, j] == 3 * (sign[0] + 1) + sign[1] + 1
            a, b = (x + 1.5, y + 1.0), (x2 + 1.5, y2 + 1.0)  # moved by half of the columns and of the rows
            cosine = (a[0] * b[0] + a[1] * b[1]) / (np.hypot(*a) * np.hypot(*b) + 1e-4)
            angles[i, j] = 0 if i == j else np.arccos(cosine)
            distance = 2 * ((y - y2) ** 2 + (x - x2) ** 2) ** 0.5 / 5**0.5 - 1
            assert targets["distances"][i, j].item() == pytest.approx(distance, abs=1e-6)
    np.testing.assert_allclose(targets["angles"], 2 * angles / angles.max() - 1, atol=1e-3)


def test_chance_is_what_the_best_constant_reaches():
    targets = relation_targets(3, 4)
    levels = chance(targets)
    counts = np.bincount(targets["relations"].flatten())
    assert levels["relations"] == pytest.approx(counts.max() / counts.sum())
    assert levels["positions"] == pytest.approx(1 / 12)
    constant = targets["distances"].mean()
    assert levels["distances"] == pytest.approx(
        (targets["distances"] - constant).square().mean().sqrt().item()
    )


def test_whole_boxes_cut_an_image_into_itself_and_an_order_moves_its_patches():
    images = torch.rand(2, 3, 8, 12, generator=seeded())
    boxes = patch_boxes(2, 2, 3, seeded(), shrink=1.0)
    torch.testing.assert_close(cut(images, boxes, (2, 3), 4), images)
    order = torch.tensor([[5, 1, 2, 3, 4, 0]] * 2)
    moved = cut(images, boxes.gather(1, order[..., None].expand(-1, -1, 4)), (2, 3), 4)
    torch.testing.assert_close(moved[:, :, :4, :4], images[:, :, 4:, 8:])
    torch.testing.assert_close(moved[:, :, :4, 4:8], images[:, :, :4, 4:8])


@pytest.mark.parametrize("mega", [False, True])
def test_boxes_stay_within_their_cells_which_fill_the_image(mega):
    cells = patch_boxes(50, 3, 4, seeded(), shrink=1.0, mega=mega).view(50, 3, 4, 4)
    boxes = patch_boxes(50, 3, 4, seeded(), shrink=0.8, mega=mega).view(50, 3, 4, 4)
    top, left, height, width = cells.unbind(-1)
    torch.testing.assert_close(height.sum(dim=1), torch.ones(50, 4))
    torch.testing.assert_close(width.sum(dim=2), torch.ones(50, 3))
    torch.testing.assert_close(top[:, 1:], (top + height)[:, :-1])
    torch.testing.assert_close(left[:, :, 1:], (left + width)[:, :, :-1])
    assert (height >= 1 / 6 - 1e-6).all() and (width >= 1 / 8 - 1e-6).all()
    inner = boxes[..., :2] - cells[..., :2]
    assert (inner >= -1e-6).all() and (inner <= 0.2 * cells[..., 2:] + 1e-6).all()
    torch.testing.assert_close(boxes[..., 2:], 0.8 * cells[..., 2:])


def test_rows_and_columns_of_mega_patches_are_split_independently():
    cells = patch_boxes(2000, 3, 3, seeded(), shrink=1.0, mega=True).view(2000, 3, 3, 4)
    heights, widths = cells[:, 0, 0, 2], cells[:, 0, 0, 3]
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.1 and heights.std() > 0.03


def test_borders_do_not_continue_from_patch_to_patch():
    """In a ramp each patch's last column, cut whole, is followed by the next one's first; not so here."""
    ramp = torch.arange(32.0).expand(4, 1, 32, 32) / 32
    steps = []
    for shrink in (1.0, 1 / 1.15):
        view = cut(ramp, patch_boxes(4, 4, 4, seeded(), shrink), (4, 4), 8)
        steps.append((view[..., 8::8] - view[..., 7:-1:8]).std())
    assert steps[0] < 1e-6 and steps[1] > 0.01


def test_each_patch_changes_its_colours_by_itself_and_stays_in_range():
    views = torch.rand(3, 3, 8, 16, generator=seeded())
    changed = jitter(views, 4, seeded())
    assert changed.shape == views.shape and changed.min() >= 0 and changed.max() <= 1
    grey = jitter(torch.full((20, 1, 8, 8), 0.5), 4, seeded()).unflatten(3, (2, 4)).unflatten(2, (2, 4))
    level = grey[:, 0, :, 0, :, 0]
    assert torch.equal(grey, level[:, None, :, None, :, None].expand_as(grey))  # even within a patch
    assert level.flatten(1).std(dim=1).min() > 0 and 0.1 < (level == 0.5).float().mean() < 0.3
    torch.testing.assert_close(jitter(views, 4, seeded(), strength=0.0), views)
    halves = torch.cat([torch.full((9, 1, 4, 4), 0.2), torch.full((9, 1, 4, 4), 0.8)], dim=3)
    left = jitter(halves, 4, seeded())[..., :4]  # even patches have no contrast of their own to change
    factor = left.mean(dim=(1, 2, 3)) / 0.2
    assert (factor > 0.6 - 1e-6).all() and (factor < 1.4 + 1e-6).all()


@pytest.mark.parametrize("mega", [False, True])
def test_a_shuffled_view_says_where_each_patch_was_cut(mega):
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    images = torch.stack([y, x]).expand(6, 2, 32, 48)  # every pixel tells its place
    views, boxes, order = patch_views(images, (2, 3), 8, seeded(), mega=mega, shuffle=True)
    assert views.shape == (6, 2, 16, 24)
    assert (
        torch.equal(order.sort(dim=1).values, torch.arange(6).expand(6, 6))
        and (order != torch.arange(6)).any()
    )
    patches = (
        cut(images, boxes, (2, 3), 8).unflatten(3, (3, 8)).unflatten(2, (2, 8)).mean(dim=(3, 5)).flatten(2)
    )
    centres = (boxes[:, :, :2] + boxes[:, :, 2:] / 2).transpose(1, 2)  # (B, 2, N)
    torch.testing.assert_close(patches, centres, rtol=0, atol=0.02)
    back = centres.gather(2, order.argsort(dim=1)[:, None].expand(-1, 2, -1)).unflatten(2, (2, 3))
    assert (back[:, 0, 0] < back[:, 0, 1]).all() and (back[:, 1].diff(dim=2) > 0).all()  # in order again
    sizes = boxes[..., 2:].flatten(1).std(dim=1, correction=0)
    assert (sizes.std() > 0.01) == mega
    plain, _, none = patch_views(images, (2, 3), 8, seeded(), mega=mega)
    assert none is None and plain.shape == views.shape


def test_large_cells_are_averaged_not_stepped_over():
    noise = torch.rand(4, 1, 64, 64, generator=seeded())
    cells = patch_boxes(4, 2, 2, seeded(), shrink=1.0)
    means = torch.nn.functional.avg_pool2d(noise, 4)
    torch.testing.assert_close(cut(noise, cells, (2, 2), 8), means, rtol=0, atol=0.08)
    assert cut(noise, cells, (2, 2), 8).std() < 1.2 * means.std()


def test_what_lies_over_an_image_is_cut_with_it():
    images = torch.rand(2, 1, 16, 16, generator=seeded())
    boxes = patch_boxes(2, 4, 4, seeded(), mega=True)
    both = cut(torch.cat([images, 2 * images], dim=1), boxes, (4, 4), 4)
    torch.testing.assert_close(both[:, 1], 2 * both[:, 0])


@pytest.mark.parametrize("tasks", [TASKS, ("relations",), ("angles", "positions")])
def test_losses_are_those_of_the_tasks_asked_for(tasks):
    torch.manual_seed(0)
    model = RelViT(ViT((16, 24), 8, 1, 18, 1, 2), 18, (2, 3), tasks)
    patches, order = torch.randn(2, 6, 18), torch.stack([torch.randperm(6) for _ in range(2)])
    loss, shown = model.compare(patches, order)
    assert set(shown) == set(model.chance) == set(tasks)
    want, targets = 0.0, relation_targets(2, 3)
    for b in range(2):
        for task in tasks:
            s, t = model.heads[task](patches[b : b + 1])[0], targets[task][order[b]]
            if task == "positions":
                want += torch.nn.functional.cross_entropy(s, t) / 2
                continue
            t = t[:, order[b]]
            if task == "relations":
                want += -s.log_softmax(dim=0).gather(0, t[None]).mean() / 2
            else:
                want += (s[0] - t).square().mean() / 2
    torch.testing.assert_close(loss, want)
    for task in set(tasks) & {"relations", "positions"}:
        scores = model.heads[task](patches)
        told = scores.argmax(dim=1 if task == "relations" else 2)
        right = told == shuffled(targets, order)[task]
        torch.testing.assert_close(shown[task], right.float().mean())
    for task in set(tasks) & {"distances", "angles"}:
        t = torch.stack([targets[task][o][:, o] for o in order])
        error = (model.heads[task](patches)[:, 0] - t).square().mean().sqrt()
        torch.testing.assert_close(shown[task], error.detach())


def test_pair_scores_are_scaled_products_of_two_maps():
    torch.manual_seed(0)
    scores, x = RelViT(ViT(16, 8, 1, 18, 1, 2), 18, (2, 2)).heads["relations"], torch.randn(1, 4, 18)
    q, k = scores.q(x)[0], scores.k(x)[0]
    for c in range(9):
        part = slice(2 * c, 2 * c + 2)
        torch.testing.assert_close(scores(x)[0, c], q[:, part] @ k[:, part].T / 2**0.5)


def test_without_positions_the_order_of_patches_tells_nothing():
    """Upstream, shuffled patches get the same features, shuffled: where they lie has to be seen."""
    torch.manual_seed(0)
    model = RelViT(ViT(16, 4, 1, 18, 2, 2), 18, (4, 4)).eval()
    images, boxes = torch.rand(2, 1, 16, 16), patch_boxes(2, 4, 4, seeded())
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    mixed = cut(images, boxes.gather(1, order[..., None].expand(-1, -1, 4)), (4, 4), 4)
    whole = model(cut(images, boxes, (4, 4), 4))[2].patches
    torch.testing.assert_close(
        model(mixed, order)[2].patches,
        whole.gather(1, order[..., None].expand(-1, -1, 18)),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(model(mixed, order)[0], model(cut(images, boxes, (4, 4), 4))[0])


def test_it_learns_to_tell_where_patches_lie():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    images = torch.stack([y, x]).expand(8, 2, 16, 16)  # every patch shows its place
    model = RelViT(ViT(16, 4, 2, 36, 2, 2), 36, (4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        loss, shown, _ = model(cut(images, patch_boxes(8, 4, 4, seeded(step)), (4, 4), 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shown["relations"] > 0.8 > 2 * model.chance["relations"] and shown["positions"] > 0.8
    assert shown["distances"] < 0.5 * model.chance["distances"]
    assert shown["angles"] < 0.7 * model.chance["angles"]


def test_targets_cost_less_than_a_hundredth_of_a_step():
    model = RelViT(ViT(64, 8, 1, 96, 4, 6), 96, (8, 8))
    views, order = torch.rand(64, 1, 64, 64), torch.stack([torch.randperm(64) for _ in range(64)])
    targets = {task: getattr(model, f"target_{task}") for task in TASKS}

    def seconds(what) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            what()
            times.append(time.perf_counter() - started)
        return sorted(times)[2]

    step = seconds(lambda: model(views, order)[0].backward())
    assert seconds(lambda: shuffled(targets, order)) < 0.01 * step


@pytest.mark.parametrize(
    "grid, tasks, dim, message",
    [
        ((1, 8), TASKS, 18, "1x8 patches have no relations"),
        ((1, 1), TASKS, 18, "1x1 patches have no relations"),
        ((2, 2), (), 18, "no task; choose from relations"),
        ((2, 2), ("relation",), 18, "unknown task 'relation'; choose from relations"),
        ((2, 2), TASKS, 8, "embed_dim 8 is too small for 9 relations"),
    ],
)
def test_what_cannot_be_learned_is_named(grid, tasks, dim, message):
    with pytest.raises(ValueError, match=message):
        RelViT(ViT(16, 8, 1, dim, 1, 1), dim, grid, tasks)
