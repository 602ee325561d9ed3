"""Priors follow their crops, and the SPAN loss is what its formula says."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refuses, seeded

from attention_priors import follow, gaussian_blur, guidance
from attention_priors import priors_from_masks, priors_from_statistics, span_loss
from crops import crop, random_crops
from isnet_lrp import attention_loss


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.3)])
def test_a_prior_drawn_into_an_image_and_cropped_with_it_equals_the_followed_prior(flip, scale):
    """Equation (1)."""
    prior, theta = torch.rand(2, 32, 32, generator=seeded()), random_crops(6, scale, seeded(), flip=flip)
    cropped = crop(prior.expand(6, 2, 32, 32), theta, 32)  # the prior as an image of two channels
    patches = F.avg_pool2d(cropped, 8).flatten(2)  # (6, 2, 16)
    followed, _ = follow(prior, theta, (4, 4))
    torch.testing.assert_close(followed, patches / patches.sum(dim=2, keepdim=True))
    for same in (prior.double(), prior.half()):  # points in half precision would be pixels off
        torch.testing.assert_close(follow(same, theta, (4, 4))[0].float(), followed, rtol=2e-3, atol=1e-5)


def test_the_share_is_how_much_of_a_prior_the_view_sees_and_outside_the_image_there_is_none():
    """Equation (2)."""
    prior, quarter = torch.ones(1, 16, 16), torch.tensor([[[0.5, 0, 0.2], [0, 0.5, -0.3]]])
    torch.testing.assert_close(follow(prior, quarter, (4, 4))[1], torch.tensor([[0.25]]))
    wide = torch.tensor([[[2.0, 0, 0], [0, 2, 0]]])  # the view is twice as wide as the image
    followed, share = follow(prior, wide, (4, 4))
    torch.testing.assert_close(followed[0, 0], F.pad(torch.full((2, 2), 0.25), [1] * 4).flatten())
    torch.testing.assert_close(share, torch.ones(1, 1))
    prior[:, :8] = 0  # all of it lies below this view
    followed, share = follow(prior, torch.tensor([[[0.5, 0, 0], [0, 0.4, -0.6]]]), (4, 4))
    assert share.item() == 0 and followed.abs().sum() == 0


def test_a_prior_from_a_mask_is_largest_inside_it_and_fades_over_its_border():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    inside, border, outside = priors_from_masks(mask, blur=0.05)[0, 20, [20, 10, 2]]
    assert inside > 0.99 and 0.3 < border < 0.7 and outside < 0.01
    assert torch.equal(priors_from_masks(mask, blur=0.0), mask.float())
    for other in (mask[0], mask[None]):
        refuses(r"give \(R, H, W\)", priors_from_masks, other)


def test_a_blur_is_a_gaussian_convolution_with_repeated_borders():
    x, sigma, radius = torch.rand(2, 3, 12, 15, dtype=torch.float64), 1.3, 4
    weights = torch.exp(-(torch.arange(-radius, radius + 1.0).double() ** 2) / (2 * sigma**2))
    kernel = torch.outer(weights, weights)[None, None] / weights.sum() ** 2
    padded = F.pad(x, [radius] * 4, mode="replicate").flatten(0, 1)[:, None]
    torch.testing.assert_close(gaussian_blur(x, sigma), F.conv2d(padded, kernel).view_as(x))
    assert torch.equal(gaussian_blur(x, 0), x) and gaussian_blur(x, 50.0).isfinite().all()


def test_statistics_find_where_images_differ_and_what_is_bright():
    images = torch.full((20, 1, 16, 16), 0.2)
    images[:, :, :, 8:] = 0.9  # always bright on the right
    images[:, :, 2:5, 2:5] += torch.rand(20, 1, 1, 1, generator=seeded()) * 0.5  # varies in one corner
    mean, deviation, dark, bright = priors_from_statistics(images, blur=0.0)
    assert deviation[3, 3] == 1 and deviation[10, 3] < 0.01
    assert mean[10, 12] > 4 * mean[10, 3]
    assert bright[:, 8:].min() == 1 and bright[10:, :7].max() == 0 and dark[10:, :7].min() == 1
    mean, _, *four = priors_from_statistics(torch.rand(5, 1, 8, 8, generator=seeded(1)), 4, blur=0.0)
    levels = [(mean * cluster).sum() / cluster.sum() for cluster in four]
    assert levels == sorted(levels)  # from the darkest to the brightest


FORMULAS = {
    "kl": lambda P, A: (P * (P / A).log()).sum(dim=2),
    "mse": lambda P, A: ((6 * P - 6 * A) ** 2).mean(dim=2),
    "dice": lambda P, A: 1 - 2 * (P * A).sum(dim=2) / (P**2 + A**2).sum(dim=2),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_loss_is_its_formula_weighted_by_what_views_see_and_heads_without_a_prior_stay_free(kind):
    """Equations (3), (4)."""
    P, A = (torch.randn(2, n, 6, generator=seeded(n)).double().softmax(dim=2) for n in (2, 3))
    share = torch.tensor([[1.0, 0.3], [0.5, 0]]).double()
    attention = (0.7 * A).requires_grad_()  # 0.3 on the CLS token
    loss = span_loss(attention, P, share, kind)
    torch.testing.assert_close(loss, (share * FORMULAS[kind](P, A[:, :2])).sum() / share.sum())
    (gradient,) = torch.autograd.grad(loss, attention)
    assert gradient[:, 0].abs().min() > 0 and not gradient[:, 2].any()
    assert span_loss(0.5 * P, P, share, kind).abs() < 1e-12 and span_loss(attention, P, 0 * share, kind) == 0
    assert span_loss(attention[:, 0], P[:, :1], share[:, :1], kind) > 0.01  # SimPool's single head
    P[:, 0, :3] = 0
    assert torch.autograd.gradcheck(lambda a: span_loss(a, P, share, kind), attention)


@pytest.mark.parametrize("gap", [1.0, 60.0])
def test_a_saturated_head_still_learns(gap):
    scores = torch.tensor([[[gap, 0.0, 0.0, 0.0]]]).requires_grad_()
    A, prior = scores.softmax(dim=2), torch.full((1, 1, 4), 0.25)
    for loss in (span_loss(A, prior, torch.ones(1, 1)), attention_loss(A, torch.ones(1, 1, 4))):
        (gradient,) = torch.autograd.grad(loss, scores, retain_graph=True)
        torch.testing.assert_close(gradient, A - prior)


def test_guidance_weighs_resolutions_by_the_share_that_views_see_and_images_by_confidence():
    priors, large, small = torch.rand(2, 3, 64, 64), torch.rand(4, 3, 64), torch.rand(6, 3, 16)
    whole, half = torch.eye(2, 3).repeat(4, 1, 1), torch.eye(2, 3).repeat(6, 1, 1)
    half[:, 0] *= 0.5
    one, other = guidance([large], priors, [whole], [(8, 8)]), guidance([small], priors, [half], [(4, 4)])
    prior, share = follow(priors.repeat(2, 1, 1, 1), whole, (8, 8))
    torch.testing.assert_close(one, span_loss(large, prior, share))
    mse = guidance([large], priors, [whole], [(8, 8)], "mse")
    torch.testing.assert_close(mse, span_loss(large, prior, share, "mse"))
    seen = follow(priors.repeat(3, 1, 1, 1), half, (4, 4))[1].sum()
    both = guidance([large, small], priors, [whole, half], [(8, 8), (4, 4)])
    torch.testing.assert_close(both, (share.sum() * one + seen * other) / (share.sum() + seen))
    # Where priors do not follow, a view gets the whole prior, whatever it sees.
    torch.testing.assert_close(guidance([large], priors, None, [(8, 8)]), one)
    sure = guidance([large], priors, None, [(8, 8)], confidence=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(sure, guidance([large[::2]], priors[:1], None, [(8, 8)]))


def test_the_loss_stays_finite_where_attention_vanishes_in_half_precision():
    attention = torch.tensor([[[1.0, 0.0]]], dtype=torch.float16, requires_grad=True)
    loss = span_loss(attention, torch.full((1, 1, 2), 0.5).half(), torch.ones(1, 1).half())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and attention.grad.isfinite().all()
