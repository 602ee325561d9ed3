"""The ISNet loss equals the published one, and SPAN's where it guides attention."""

import pytest
import torch
from conftest import golden, refuses, seeded

from attention_priors import span_loss
from common import holes
from isnet_lrp import attention_loss, background_loss, foreground_loss, isnet_background
from isnet_lrp import log_odds, published_loss, relevance_range, whole_patches

HEATMAPS = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded())
MASK = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
MASK[:, :, 3:6, 2:5] = 1
GRID = (4, 4)


@pytest.mark.parametrize("name", ["mean", "gwrp", "foreground", "hybrid"])
def test_background_and_foreground_loss_equal_the_published_ones(name):
    """Equations (2) to (4)."""
    R, masks, expected = (golden("isnet_loss.npz")[0][key] for key in ("heatmaps", "masks", name))
    decay, weight = {"gwrp": (0.9, 0), "foreground": (1.0, 1), "hybrid": (0.97, 3)}.get(name, (1.0, 0))
    losses = []
    for maps in R.unbind(1):
        foreground = foreground_loss(maps, masks, 2.0, 50.0, hybrid=name == "hybrid")
        losses.append(background_loss(maps, masks, decay) + weight * foreground)
    torch.testing.assert_close(torch.stack(losses).mean(dim=0), expected, rtol=1e-5, atol=1e-6)


def test_volumes_have_the_losses_of_their_voxels():
    volumes = [t.unflatten(2, (2, 4)) for t in (HEATMAPS, MASK)]  # (B, C, 2, 4, 8)
    assert torch.equal(background_loss(*volumes, 0.9, 0.1), background_loss(HEATMAPS, MASK, 0.9, 0.1))
    assert torch.equal(foreground_loss(*volumes, 1.0, 2.0), foreground_loss(HEATMAPS, MASK, 1.0, 2.0))


def test_each_channel_is_pooled_by_itself_as_published_or_with_the_others():
    inside, (E, weights) = MASK[0, 0].bool(), (0.5, 0.9 ** torch.arange(64, dtype=torch.float64))
    for maps, per_channel in ((HEATMAPS[0].abs(), True), (HEATMAPS[0].abs().sum(0, keepdim=True), False)):
        outside = (maps * ~inside / maps[:, inside].mean()).flatten(1).sort(descending=True)[0]
        u = (h := (outside * weights).sum(1) / weights.sum()) / (h + E)
        found = background_loss(HEATMAPS, MASK, 0.9, E, per_channel)[0]
        torch.testing.assert_close(found, -(1 - u).log().mean())


@pytest.mark.parametrize("empty", [False, True])
def test_the_attention_loss_is_span_s_toward_the_even_prior(empty):
    """Equation (6)."""
    foreground = torch.rand(3, 1, 16).round().double()
    foreground[0] *= not empty
    attention = torch.randn(3, 2, 16).double().softmax(dim=2) * 0.8  # the rest went to the CLS token
    prior = foreground / foreground.sum(dim=2, keepdim=True).clamp(min=1)
    expected = span_loss(attention, prior.expand(3, 2, 16), foreground.amax(dim=2).expand(3, 2))
    torch.testing.assert_close(attention_loss(attention, foreground), expected)


def test_inner_layers_and_attention_count_as_background_where_they_cover_no_foreground():
    """Equation (1)."""
    maps, tokens = HEATMAPS[:, :2, ::2, ::2], torch.randn(2, 17, 5).double()  # a CLS token and a 4 x 4 grid
    attention = [torch.rand(2, 3, T).double() for T in (16, 17)]
    covers = whole_patches(MASK, 2)[:, :, ::2, ::2]
    parts = [background_loss(R, covers, 0.9, 0.1) for R in (maps, tokens[:, 1:].mT.unflatten(2, GRID))]
    parts += [attention_loss(A[:, :, -16:], covers.flatten(2)) for A in attention]
    found = isnet_background(HEATMAPS, [maps, tokens], attention, MASK, GRID, 0.9, 0.1)
    torch.testing.assert_close(found, background_loss(HEATMAPS, MASK, 0.9, 0.1) + sum(parts) / 2)
    by_bool = isnet_background(HEATMAPS, [maps, tokens], attention, MASK.bool(), GRID, 0.9, 0.1)
    assert torch.equal(by_bool, found) and torch.equal(whole_patches(MASK.bool(), 2), whole_patches(MASK, 2))


def test_as_published_each_layer_has_both_losses_and_the_worst_layer_counts_most():
    maps, tokens = HEATMAPS[:, :2, ::2, ::2], 9 * torch.randn(2, 17, 5).double()
    covers, ranges = whole_patches(MASK, 2)[:, :, ::2, ::2], [(1.0, 9.0), (2.0, 3.0), (0.1, 0.2)]
    layers = (HEATMAPS, MASK), (maps, covers), (tokens[:, 1:].mT.unflatten(2, GRID), covers)
    losses = [
        (background_loss(R, m, 0.9, 1.0, per_channel=True) + foreground_loss(R, m, *c, hybrid=True)).mean()
        for (R, m), c in zip(layers, ranges)
    ]
    first, second, third = sorted(losses, reverse=True)
    found = published_loss([HEATMAPS, maps, tokens], MASK, GRID, ranges)
    torch.testing.assert_close(found, (first + 0.8 * second + 0.64 * third) / 2.44)
    assert torch.equal(published_loss([HEATMAPS, maps, tokens], MASK.bool(), GRID, ranges), found)


def test_patches_log_odds_and_the_range_of_relevance():
    """Equation (5)."""
    grown = whole_patches(MASK, 4)
    assert grown[0, 0, ::4, ::4].tolist() == [[1, 1], [1, 1]] and torch.equal(whole_patches(grown, 4), grown)
    assert torch.equal(whole_patches(MASK[:, :, :7, :6], 4), grown[:, :, :7, :6])
    logits = HEATMAPS[0, 0, :, :4]
    p = logits.softmax(dim=1)[:, 2]
    torch.testing.assert_close(log_odds(logits, torch.full((8,), 2)), (p / (1 - p)).log())
    assert relevance_range(torch.tensor([1.0, 3.0])) == (0.4, 5.0)  # mean 2, deviation 1: mean / 5 is larger
    assert relevance_range(torch.tensor([1.9, 2.1])) == pytest.approx((1.7, 2.3))
    assert relevance_range(torch.tensor([1.0, 3.0]), most=10) == pytest.approx((0.4, 4.0))
    for bad in ([0.0, 0.0], [1.0, float("nan")]):
        refuses("has no range", relevance_range, torch.tensor(bad), error=FloatingPointError)


def test_an_empty_mask_has_no_background_loss_and_says_so():
    with pytest.warns(UserWarning, match="empty mask"):
        loss = background_loss(HEATMAPS, MASK * torch.tensor([0, 1])[:, None, None, None])
    assert loss[0] == 0 and loss[1] > 0
    assert background_loss(HEATMAPS, torch.ones_like(MASK)).tolist() == [0, 0]  # nothing but foreground


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_heatmap_of_zeros_gives_no_nan(dtype):
    R, mask = torch.zeros_like(HEATMAPS, dtype=dtype).requires_grad_(), MASK.to(dtype)
    loss = background_loss(R, mask, 0.9) + foreground_loss(R, mask, 1.0, 2.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and R.grad.isfinite().all()


def test_toy_models_read_the_background_and_pass_the_loss_until_the_remedy():
    found = {hole.name: hole for hole in holes.holes()}
    assert len(found) == 8
    for hole in found.values():
        assert hole.loss < 0.05 and (hole.then is None or hole.then > 0.5), hole.name
    models = {"two units cancel": holes.cancelling, "attention saturates": holes.attending}
    for name, model in (models | {"a tint silences units": holes.silenced}).items():
        image = found[name].image
        assert (model(image).sum() - model(image * holes.MASK).sum()).abs() > 1, name
        assert found[name].passes[..., holes.MASK[0, 0] == 0].abs().max() < 1e-3, name
