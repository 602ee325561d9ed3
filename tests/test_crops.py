"""Views are matrices; colours change by the image, in range, and by the seed."""

import pytest
import torch
import torch.nn.functional as F

from crops import colour_matrix, crop, distort, gaussian_blur, random_crops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crops_have_the_asked_share_of_the_area_and_stay_inside():
    theta = random_crops(2000, (0.2, 0.5), generator())
    w, cx, h, cy = theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2]
    assert 0.2 <= (w * h).min() < 0.21 and 0.49 < (w * h).max() <= 0.5 + 1e-6
    assert (cx.abs() + w).max() <= 1 + 1e-6 and (cy.abs() + h).max() <= 1 + 1e-6
    assert 0.74 < (w / h).min() < 0.77 and 1.3 < (w / h).max() < 1.34
    assert (cx.abs() + w).max() > 0.95  # they reach the border


def test_half_of_the_views_are_mirrored_at_flip_one_half():
    theta = random_crops(2000, (0.2, 0.5), generator(), flip=0.5)
    assert 0.45 < (theta[:, 0, 0] < 0).float().mean() < 0.55 and (theta[:, 1, 1] > 0).all()
    image = torch.rand(1, 1, 4, 6)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(crop(image, mirror, (4, 6)), image.flip(3))


def test_a_crop_of_whole_pixels_is_a_slice():
    image = torch.rand(2, 3, 8, 8)
    corner = torch.tensor([[[0.5, 0, 0.5], [0, 0.5, -0.5]]]).repeat(2, 1, 1)  # upper right quarter
    torch.testing.assert_close(crop(image, corner, 4), image[:, :, :4, 4:])


def test_a_crop_of_a_crop_is_one_matrix():
    # Linear ramps are sampled exactly, so two steps and one must agree.
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    image = torch.stack([x, y])[None]
    first, second = torch.tensor([[[0.7, 0, 0.1], [0, 0.6, 0.2]]]), torch.tensor(
        [[[-0.5, 0, 0.3], [0, 0.8, -0.1]]]
    )
    both = torch.cat(
        [first[:, :, :2] @ second[:, :, :2], first[:, :, :2] @ second[:, :, 2:] + first[:, :, 2:]], dim=2
    )
    torch.testing.assert_close(
        crop(crop(image, first, 64), second, 64), crop(image, both, 64), atol=1e-4, rtol=0
    )


def test_a_seed_gives_the_same_views_again():
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(distort(images, generator(3), 0.5, 0.5), distort(images, generator(3), 0.5, 0.5))
    assert torch.equal(random_crops(4, (0.1, 1), generator(3)), random_crops(4, (0.1, 1), generator(3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_stay_in_range_and_differ_from_image_to_image(channels):
    images = torch.rand(1, channels, 8, 8).repeat(50, 1, 1, 1)
    changed = distort(images, generator(), blur=0.5, solarise=0.3)
    assert changed.shape == images.shape and 0 <= changed.min() and changed.max() <= 1
    assert len(changed.flatten(1).unique(dim=0)) > 35


def test_colours_of_an_image_do_not_depend_on_its_batch_mates():
    images = torch.rand(6, 3, 8, 8)
    other = images.clone()
    other[1:] = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(
        distort(images, generator(), 1.0, 0.5)[0], distort(other, generator(), 1.0, 0.5)[0]
    )


def test_hue_turns_colours_but_leaves_grey_alone_and_saturation_zero_is_grey():
    grey = torch.full((3, 5), 0.4)
    matrix = colour_matrix(torch.tensor([1.2, 0.0]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(matrix[0] @ grey, grey, atol=1e-5, rtol=0)
    assert (matrix[1] @ torch.rand(3, 5)).std(dim=0).max() < 1e-5
    torch.testing.assert_close(
        colour_matrix(torch.ones(1), torch.zeros(1))[0], torch.eye(3), atol=1e-5, rtol=0
    )


def test_blur_is_a_normalised_gaussian_of_each_image_s_own_width():
    images = torch.zeros(2, 1, 21, 21)
    images[:, :, 10, 10] = 1
    sigma = torch.tensor([1.0, 2.0])
    blurred = gaussian_blur(images, sigma)
    torch.testing.assert_close(blurred.sum(dim=(1, 2, 3)), torch.ones(2))
    offsets = torch.arange(21) - 10
    width = (blurred[:, 0].sum(dim=1) * offsets**2).sum(dim=1).sqrt()
    torch.testing.assert_close(width, sigma, rtol=0.03, atol=0)
    constant = torch.full((1, 2, 9, 9), 0.3)
    torch.testing.assert_close(gaussian_blur(constant, torch.tensor([1.5])), constant)


def test_solarise_inverts_what_is_bright_and_nothing_else():
    images = F.pad(torch.full((40, 1, 4, 4), 0.9), (0, 4), value=0.1)  # right half dark
    changed = distort(images, generator(), blur=0.0, solarise=1.0)
    assert changed.max() < 0.5 + 1e-6


def test_an_impossible_scale_is_refused():
    with pytest.raises(ValueError, match="0 < a <= b <= 1"):
        random_crops(2, (0.5, 0.2), generator())
