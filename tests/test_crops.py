"""Views are matrices; colours change per image, stay in range, and follow the seed."""

import pytest
import torch
from conftest import refuses, seeded

from attention_priors import gaussian_blur as blurred
from crops import colour_matrix, crop, distort, gaussian_blur, multi_crop, random_crops


def test_crops_have_the_requested_area_stay_inside_and_are_mirrored_as_often_as_requested():
    theta = random_crops(2000, (0.2, 0.5), seeded(), flip=0.2)
    w, cx, h, cy = theta[:, 0, 0].abs(), theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2]
    assert 0.2 <= (w * h).min() < 0.21 and 0.49 < (w * h).max() <= 0.5 + 1e-6
    assert 0.95 < (cx.abs() + w).max() <= 1 + 1e-6 and 0.95 < (cy.abs() + h).max() <= 1 + 1e-6
    assert 0.74 < (w / h).min() < 0.77 and 1.3 < (w / h).max() < 1.34
    assert 0.15 < (theta[:, 0, 0] < 0).float().mean() < 0.25
    theta = random_crops(500, (0.9, 1.0), seeded())
    assert theta[:, 0, 0].max() == theta[:, 1, 1].max() == 1  # clipped to the image


def test_a_crop_of_whole_pixels_is_a_slice_and_a_negative_width_a_mirror_image():
    image = torch.rand(2, 3, 8, 8)
    corner = torch.tensor([[[0.5, 0, 0.5], [0, 0.5, -0.5]]]).repeat(2, 1, 1)  # upper right quarter
    torch.testing.assert_close(crop(image, corner.requires_grad_(), 4), image[:, :, :4, 4:])
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(crop(image[:1, :, :4], mirror, (4, 8)), image[:1, :, :4].flip(3))


def test_half_precision_images_are_sampled_at_the_same_points():
    images, theta = torch.rand(2, 1, 128, 128), random_crops(2, (0.3, 0.6), seeded())
    views = crop(images.bfloat16(), theta, 96)
    assert views.dtype == torch.bfloat16
    torch.testing.assert_close(views.float(), crop(images, theta, 96), rtol=0, atol=0.01)


def test_multi_crop_blurs_the_first_global_view_always_and_solarises_the_second_at_times(monkeypatch):
    chances, images = [], torch.rand(4, 1, 32, 32)
    monkeypatch.setattr("crops.distort", lambda x, generator, *chance: chances.append(chance) or x)
    views, thetas = multi_crop(images, seeded(), 32, 12, (0.5, 1.0), (0.1, 0.3), locals_number=3, flip=0.5)
    assert chances == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    assert [t.shape for t in thetas] == [(8, 2, 3), (12, 2, 3)]
    torch.testing.assert_close(views[0], crop(images.repeat(2, 1, 1, 1), thetas[0], 32))
    torch.testing.assert_close(views[1], crop(images.repeat(3, 1, 1, 1), thetas[1], 12))
    areas = [t[:, :, :2].det().abs() for t in thetas]
    assert areas[0].min() > 0.49 and 0.09 < areas[1].min() and areas[1].max() < 0.31
    (alone,), _ = multi_crop(images, seeded(), 32, global_scale=(0.5, 1.0), flip=0.5)
    assert torch.equal(alone, views[0])  # the same seed, and no local views
    refuses("2 local views of 0 px: give local_size", multi_crop, images, seeded(), 32, locals_number=2)
    multi_crop(images * 1.001 - 0.001, seeded(), 32)  # resizing may overshoot a little
    for normalised in (images - 0.5, images * 2, (images * 255).byte()):
        refuses("needs float images in .0, 1.", multi_crop, normalised, seeded(), 32)


def test_brightness_contrast_grey_and_blur_have_their_strengths_and_probabilities(monkeypatch):
    sigmas = []
    monkeypatch.setattr("crops.gaussian_blur", lambda x, sigma: sigmas.append(sigma) or x)
    two = distort(torch.tensor([0.3, 0.5]).repeat(2000, 1, 1, 1), seeded(), blur=0.1)
    red = torch.tensor([0.6, 0.3, 0.3]).view(3, 1, 1).repeat(2000, 1, 1, 56)
    red, brightness = distort(red, seeded(), blur=0.1), two.mean(dim=3) / 0.4
    for factor in (brightness, two.diff(dim=3)[..., 0] / 0.2 / brightness):
        assert 0.6 - 1e-4 < factor.min() < 0.62 and 1.38 < factor.max() < 1.4 + 1e-4
        assert 0.17 < ((factor - 1).abs() < 1e-5).float().mean() < 0.23
    grey, sigma = (red.std(dim=1) < 1e-3).all(dim=-1).float().mean(), 4 * sigmas[1]  # at 224 px
    assert 0.17 < grey < 0.23 and 150 < len(sigma) < 250
    assert 0.1 <= sigma.min() < 0.2 and 1.9 < sigma.max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_stay_in_range_and_differ_between_images_but_not_with_the_rest_of_the_batch(channels):
    images = torch.rand(1, channels, 8, 8).repeat(50, 1, 1, 1)
    changed = distort(images, seeded(), blur=0.5, solarise=0.3)
    in_double = distort(images.double(), seeded(), blur=0.5, solarise=0.3)
    torch.testing.assert_close(in_double.float(), changed, rtol=0, atol=1e-4)
    assert 0 <= changed.min() and changed.max() <= 1 and len(changed.flatten(1).unique(dim=0)) > 35
    assert distort(images, seeded(), blur=0.0, solarise=1.0).max() < 0.5 + 1e-6  # what is bright is inverted
    other = torch.cat([images[:1], torch.rand(49, channels, 8, 8)])
    torch.testing.assert_close(distort(images, seeded(), 1.0, 0.5)[0], distort(other, seeded(), 1.0, 0.5)[0])


def test_hue_rotates_colours_but_leaves_grey_alone_and_saturation_zero_is_grey():
    grey = torch.full((3, 5), 0.4)
    turned, none = colour_matrix(torch.tensor([1.2, 0.0]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(turned @ grey, grey, atol=1e-5, rtol=0)
    assert (none @ torch.rand(3, 5)).std(dim=0).max() < 1e-5
    unchanged = colour_matrix(torch.ones(1), torch.zeros(1))[0]
    torch.testing.assert_close(unchanged, torch.eye(3), atol=1e-5, rtol=0)


def test_blur_is_that_of_priors_with_each_image_s_own_width():
    """Kernels are as long as the widest one needs; what lies beyond 3 sigma weighs little."""
    images, sigma = torch.rand(3, 2, 21, 21), torch.tensor([1.0, 2.0, 1.5])
    expected = [blurred(image[None], float(width)) for image, width in zip(images, sigma)]
    torch.testing.assert_close(gaussian_blur(images, sigma), torch.cat(expected), rtol=0, atol=1e-3)
