"""Priors follow their crops, registration finds known maps, and the SPAN loss is what its formula says."""

import pytest
import torch
import torch.nn.functional as F

from attention_priors import align, bend, carry, follow, priors_from_masks, priors_from_statistics, span_loss
from crops import crop, random_crops
from common.phantom import phantom


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity(n: int) -> torch.Tensor:
    return torch.eye(2, 3).repeat(n, 1, 1)


# Following


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.3)])
def test_a_prior_drawn_into_an_image_and_cropped_with_it_equals_the_followed_prior(flip, scale):
    prior = torch.rand(2, 32, 32, generator=generator())
    theta = random_crops(6, scale, generator(), flip=flip)
    cropped = crop(prior.expand(6, 2, 32, 32), theta, 32)  # the prior as an image of two channels
    patches = F.avg_pool2d(cropped, 8).flatten(2)  # (6, 2, 16)
    followed, _ = follow(prior, theta, (4, 4))
    torch.testing.assert_close(followed, patches / patches.sum(dim=2, keepdim=True))


def test_a_prior_on_the_left_is_on_the_right_of_a_mirrored_view():
    prior = torch.zeros(1, 16, 16)
    prior[:, :, :4] = 1
    mirrored = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    followed, share = follow(prior, mirrored, (1, 4))
    torch.testing.assert_close(followed[0, 0], torch.tensor([0.0, 0, 0, 1]), atol=1e-6, rtol=0)
    torch.testing.assert_close(share, torch.ones(1, 1))


def test_the_share_is_how_much_of_a_prior_the_view_still_sees():
    prior = torch.ones(1, 16, 16)
    quarter = torch.tensor([[[0.5, 0, 0.2], [0, 0.5, -0.3]]])
    torch.testing.assert_close(follow(prior, quarter, (4, 4))[1], torch.tensor([[0.25]]))
    prior[:, :8] = 0  # all of it lies below this view
    followed, share = follow(prior, torch.tensor([[[0.5, 0, 0], [0, 0.4, -0.6]]]), (4, 4))
    assert share.item() == 0 and followed.abs().sum() == 0


def test_a_prior_is_zero_outside_the_image():
    wide = torch.tensor([[[2.0, 0, 0], [0, 2, 0]]])  # the view is twice as wide as the image
    followed, share = follow(torch.ones(1, 16, 16), wide, (4, 4))
    inside = F.pad(torch.full((2, 2), 0.25), [1] * 4).flatten()
    torch.testing.assert_close(followed[0, 0], inside)
    torch.testing.assert_close(share, torch.ones(1, 1))


def test_every_image_may_have_a_prior_of_its_own():
    priors = torch.rand(3, 2, 16, 16, generator=generator())
    theta = random_crops(3, (0.3, 1), generator())
    together = follow(priors, theta, (2, 4))
    for i in range(3):
        alone = follow(priors[i], theta[i : i + 1], (2, 4))
        torch.testing.assert_close(together[0][i], alone[0][0])
        torch.testing.assert_close(together[1][i], alone[1][0])


# Registration


def test_alignment_recovers_a_known_affine_map():
    image = phantom(1, seed=5)[0].float() / 255
    known = torch.tensor(
        [[[1.08, 0.06, 0.1], [-0.08, 0.94, -0.08]], [[0.92, -0.05, -0.06], [0.04, 1.06, 0.12]]]
    )
    moved = F.grid_sample(
        image.expand(2, -1, -1, -1), F.affine_grid(known, (2, 1, 64, 64), align_corners=False),
        padding_mode="border", align_corners=False,
    )  # fmt: skip
    found = align(image[0], moved)
    assert (found - known).abs().max() < 0.02
    assert (identity(2) - known).abs().max() > 0.1


def test_alignment_is_blind_to_exposure():
    image = phantom(1, seed=5)[0].float() / 255
    known = torch.tensor([[[1.05, 0.04, 0.08], [-0.05, 0.96, -0.06]]])
    grid = F.affine_grid(known, (1, 1, 64, 64), align_corners=False)
    moved = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    ramp = torch.linspace(0.6, 1.2, 64)
    torch.testing.assert_close(align(image[0], 0.5 * moved * ramp + 0.2), known, atol=0.03, rtol=0)


def test_local_contrast_finds_organs_where_the_outline_of_the_trunk_would_mislead():
    """Two samples in odd poses, which raw intensities would lead astray."""
    images, masks, _ = phantom(22, seed=0)
    for sample in (19, 21):
        found = carry(masks[sample].float(), align(images[sample], images[:12])) > 0.5
        both, either = (found & masks[:12]).sum(), found.sum() + masks[:12].sum()
        assert 2 * both / either > 0.75


def test_registration_works_where_gradients_are_switched_off():
    images = phantom(2, seed=6)[0].float() / 255
    with torch.no_grad():
        theta = align(images[0], images[1:], steps=3)
        bend(images[0], images[1:], theta, steps=3)
    assert not theta.requires_grad


def test_an_image_is_registered_the_same_whatever_its_batch_mates_are():
    images = phantom(4, seed=6)[0].float() / 255
    theta = align(images[0], images[1:], steps=10)
    torch.testing.assert_close(align(images[0], images[2:3], steps=10)[0], theta[1], atol=1e-4, rtol=0)
    flow = bend(images[0], images[1:], theta, steps=10)
    torch.testing.assert_close(
        bend(images[0], images[2:3], theta[1:2], steps=10)[0], flow[1], atol=1e-4, rtol=0
    )


def test_bending_fits_what_no_affine_map_can():
    image, masks, _ = phantom(1, seed=5)
    grid = F.affine_grid(identity(1), (1, 1, 64, 64), align_corners=False)
    wave = torch.stack([0.06 * torch.sin(3 * grid[..., 1]), 0.06 * torch.cos(4 * grid[..., 0])], dim=-1)
    look = lambda x: F.grid_sample(x, grid + wave, padding_mode="border", align_corners=False)  # noqa: E731
    moved, truth = look(image.float() / 255), look(masks.float())
    theta = align(image[0] / 255, moved)
    flow = bend(image[0] / 255, moved, theta)
    error = [(carry(masks[0].float(), theta, f) - truth).abs().mean() for f in (None, flow)]
    assert error[1] < 0.6 * error[0]


def test_a_carried_prior_lies_where_the_sample_s_pixels_lie():
    image = torch.rand(1, 16, 16, generator=generator())
    theta = random_crops(2, (0.5, 1), generator())
    torch.testing.assert_close(carry(image, theta), crop(image.expand(2, 1, 16, 16), theta, 16))
    shift = torch.full((2, 2, 4, 4), 0.25)
    moved = theta.clone()
    moved[:, :, 2] += 0.25
    torch.testing.assert_close(carry(image, theta, shift), carry(image, moved), atol=1e-5, rtol=0)


def test_a_sample_of_another_size_than_the_images_is_refused():
    with pytest.raises(ValueError, match=r"the sample is \(1, 8, 8\), images \(1, 16, 16\): resize"):
        align(torch.rand(1, 8, 8), torch.rand(2, 1, 16, 16))


# Priors


def test_a_prior_from_a_mask_is_largest_inside_it_and_fades_over_its_border():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    prior = priors_from_masks(mask, blur=0.05)
    assert (
        prior.max() == 1
        and prior[0, 20, 20] > 0.99
        and 0.3 < prior[0, 20, 10] < 0.7
        and prior[0, 20, 2] < 0.01
    )
    assert torch.equal(priors_from_masks(mask, blur=0.0), mask.float())


def test_an_empty_mask_is_refused_by_number():
    masks = torch.ones(3, 8, 8)
    masks[1] = 0
    with pytest.raises(ValueError, match="prior 1 .* is empty"):
        priors_from_masks(masks)


def test_statistics_find_where_images_differ_and_what_is_bright():
    images = torch.full((20, 1, 16, 16), 0.2)
    images[:, :, :, 8:] = 0.9  # always bright on the right
    images[:, :, 2:5, 2:5] += torch.rand(20, 1, 1, 1, generator=generator()) * 0.5  # varies in one corner
    mean, deviation, dark, bright = priors_from_statistics(images, blur=0.0)
    assert deviation[3, 3] == 1 and deviation[10, 3] < 0.01
    assert mean[10, 12] > 4 * mean[10, 3]
    assert bright[:, 8:].min() == 1 and bright[10:, :7].max() == 0 and dark[10:, :7].min() == 1
    with pytest.raises(ValueError, match="no pixel differs"):
        priors_from_statistics(images[:1].repeat(3, 1, 1, 1))
    _, _, *three = priors_from_statistics(images, clusters=3, blur=0.0)
    levels = [(mean * cluster).sum() / cluster.sum() for cluster in three]
    assert levels == sorted(levels)  # from the darkest to the brightest
    with pytest.raises(ValueError, match="give at least 2"):
        priors_from_statistics(images[:1])


# The loss


def distributions(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).add(0.01).log().softmax(dim=-1)


def test_kl_is_the_formula_with_attention_renormalised():
    prior, attention = distributions(2, 1, 5), 0.7 * distributions(
        2, 3, 5, seed=1
    )  # 0.3 went to the CLS token
    A = attention[:, :1] / 0.7
    expected = (prior * (prior / A).log()).sum(dim=2).mean()
    torch.testing.assert_close(span_loss(attention, prior, torch.ones(2, 1).double()), expected)


@pytest.mark.parametrize("kind", ["kl", "mse", "dice"])
def test_the_loss_is_zero_where_attention_equals_the_prior_and_positive_elsewhere(kind):
    prior, share = distributions(2, 2, 6), torch.ones(2, 2, dtype=torch.float64)
    assert span_loss(0.5 * prior, prior, share, kind).abs() < 1e-12
    assert span_loss(distributions(2, 2, 6, seed=1), prior, share, kind) > 0.01


@pytest.mark.parametrize("kind", ["kl", "mse", "dice"])
def test_the_gradient_is_right_also_for_a_prior_with_zeros(kind):
    prior = distributions(2, 2, 6)
    prior[:, 0, :3] = 0
    attention = distributions(2, 3, 6, seed=1).requires_grad_()
    share = torch.rand(2, 2, generator=generator(), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: span_loss(a, prior, share, kind), attention)


def test_heads_without_a_prior_stay_free():
    attention = distributions(2, 4, 6).requires_grad_()
    span_loss(attention, distributions(2, 3, 6, seed=1), torch.ones(2, 3).double()).backward()
    assert attention.grad[:, :3].abs().min() > 0 and attention.grad[:, 3].abs().max() == 0


def test_a_view_that_sees_less_of_a_prior_counts_less_and_none_not_at_all():
    attention, prior = distributions(2, 1, 6), distributions(2, 1, 6, seed=1)
    one = [span_loss(attention[i : i + 1], prior[i : i + 1], torch.ones(1, 1).double()) for i in range(2)]
    both = span_loss(attention, prior, torch.tensor([[0.75], [0.25]]).double())
    torch.testing.assert_close(both, 0.75 * one[0] + 0.25 * one[1])
    torch.testing.assert_close(span_loss(attention, prior, torch.tensor([[1.0], [0.0]]).double()), one[0])
    assert span_loss(attention, prior, torch.zeros(2, 1).double()) == 0


def test_the_loss_stays_finite_where_attention_vanishes_in_half_precision():
    for small in (0.0, 1e-4):
        attention = torch.tensor([[[1.0, small]]], dtype=torch.float16, requires_grad=True)
        prior = torch.tensor([[[0.5, 0.5]]], dtype=torch.float16)
        loss = span_loss(attention, prior, torch.ones(1, 1, dtype=torch.float16))
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and attention.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    share = torch.ones(1, 2)
    with pytest.raises(ValueError, match="2 priors but 1 attention heads"):
        span_loss(torch.ones(1, 1, 4), torch.ones(1, 2, 4), share)
    with pytest.raises(ValueError, match="B or N differ"):
        span_loss(torch.ones(1, 2, 4), torch.ones(1, 2, 9), share)
    with pytest.raises(ValueError, match="unknown SPAN loss 'l1': choose kl, mse or dice"):
        span_loss(torch.ones(1, 2, 4), torch.ones(1, 2, 4), share, "l1")
