"""Registration finds known maps, also of an object that may lie anywhere, and says where it finds nothing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import digits, seeded

from attention_priors import gaussian_blur, priors_from_masks
from common.phantom import phantom
from common.registration import CERTAIN, NOTHING, SEARCHED, _between, agreement, align, bend, carry
from common.registration import confidence, find, likeness, register
from crops import crop, random_crops


def sample(images: torch.Tensor, theta: torch.Tensor, wave: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Images (1, C, H, W) as seen through maps (B, 2, 3), moved by a wave."""
    images = images.float().expand(len(theta), -1, -1, -1)
    grid = F.affine_grid(theta, images.shape, align_corners=False) + wave
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def dice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.flatten(1) > 0.5, b.flatten(1) > 0.5
    return 2 * (a & b).sum(dim=1) / (a.sum(dim=1) + b.sum(dim=1))


def test_alignment_recovers_a_known_affine_map_whatever_the_exposure():
    """Equation (1)."""
    image = phantom(1, seed=5)[0].float() / 255
    first, second = [[1.08, 0.06, 0.1], [-0.08, 0.94, -0.08]], [[0.92, -0.05, -0.06], [0.04, 1.06, 0.12]]
    known = torch.tensor([first, second])
    moved = sample(image, known)
    moved[1] = 0.5 * moved[1] * torch.linspace(0.6, 1.2, 64) + 0.2  # another exposure
    first, second = (align(image[0], moved) - known).abs().amax(dim=(1, 2))
    assert first < 0.02 and second < 0.03


def test_registration_of_an_image_does_not_depend_on_its_batch_nor_on_grad_mode():
    images = phantom(4, seed=6)[0].float() / 255
    with torch.no_grad():
        theta = align(images[0], images[1:], steps=10)
        flow = bend(images[0], images[1:], theta, steps=10)
    alone = align(images[0], images[2:3], steps=10)[0]
    bent = bend(images[0], images[2:3], theta[1:2], steps=10)[0]
    torch.testing.assert_close((alone, bent), (theta[1], flow[1]), atol=1e-4, rtol=0)


def test_bending_fits_what_no_affine_map_can():
    """Equation (2)."""
    image, masks, _ = phantom(1, seed=5)
    identity = torch.eye(2, 3)[None]
    x, y = F.affine_grid(identity, (1, 1, 64, 64), align_corners=False).unbind(-1)
    wave = 0.06 * torch.stack([torch.sin(3 * y), torch.cos(4 * x)], dim=-1)
    moved, truth = sample(image / 255, identity, wave), sample(masks, identity, wave)
    theta = align(image[0] / 255, moved)
    flow = bend(image[0] / 255, moved, theta)
    affine, deformed = ((carry(masks[0], theta, f) - truth).abs().mean() for f in (None, flow))
    assert deformed < 0.6 * affine


def test_stiffness_keeps_displacements_smooth(monkeypatch):
    images, rough = phantom(2, seed=5)[0] / 255, []
    for stiffness in (0.0, 1.0):
        monkeypatch.setattr("common.registration.STIFFNESS", stiffness)
        flow = bend(images[0], images[1:], torch.eye(2, 3)[None])
        rough.append(sum(flow.diff(dim=d).square().mean() for d in (2, 3)))
    assert rough[1] < 0.6 * rough[0]


def test_a_warped_prior_lies_where_the_pixels_of_the_reference_lie():
    image, theta = torch.rand(1, 16, 16, generator=seeded()), random_crops(2, (0.5, 1), seeded())
    theta = theta + 0.1 * torch.rand(2, 2, 3, generator=seeded())  # turned and sheared
    torch.testing.assert_close(carry(image, theta), crop(image.expand(2, 1, 16, 16), theta, 16))
    shift, moved = torch.full((2, 2, 4, 4), 0.25), theta + torch.tensor([0, 0, 0.25])
    torch.testing.assert_close(carry(image, theta, shift), carry(image, moved), atol=1e-5, rtol=0)
    knots = torch.rand(2, 2, 4, 4, generator=seeded())
    bicubic = F.interpolate(knots, (16, 24), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(_between(knots, (16, 24)), bicubic)


def test_local_contrast_finds_organs_where_the_outline_of_the_body_would_mislead():
    """Two reference images in odd poses, for which raw intensities fail."""
    images, masks, _ = phantom(22, seed=0)
    for i in (19, 21):
        found = carry(masks[i].float(), align(images[i], images[:12]))
        assert dice(found, masks[:12]).mean() > 0.75


def test_an_object_is_found_anywhere_where_an_affine_start_fails():
    images, masks = digits(21)
    reference, priors = images[0], priors_from_masks(masks[0])
    theta, flow, s = register(reference, priors, images[1:], deformable=True)
    found = dice(carry(priors, theta, flow), masks[1:])
    assert dice(carry(priors, align(reference, images[1:])), masks[1:]).mean() < 0.6
    assert found.mean() > 0.85 and confidence(s).mean() > 0.8
    moved = (flow == 0).flatten(1).all(dim=1)  # a shift and a scale, which nothing bends
    assert moved.sum() > 10 and (theta[moved][:, 0, 1] == 0).all()


def test_a_bright_frame_does_not_hide_the_regions():
    images, masks, _ = phantom(13, seed=0)
    narrow, wide = images.clone(), images.clone()
    for framed, pixels in ((narrow, 2), (wide, 5)):
        framed[..., :pixels], framed[..., -pixels:] = 255, 255
        framed[..., :pixels, :], framed[..., -pixels:, :] = 255, 255
    for reference, others, enough in ((narrow[0], images[1:], 0.9), (images[0], wide[1:], 0.7)):
        theta, flow, s = register(reference, masks[0], others, deformable=True)
        sure = confidence(s) > 0.5
        found = dice(carry(masks[0], theta, flow), masks[1:])
        assert sure.float().mean() > enough and found[sure].mean() > 0.8


def test_likeness_compares_what_lies_around_the_regions_and_nothing_else():
    """Equation (5)."""
    images, masks, _ = phantom(2, seed=0)
    heart, theta, flow = masks[0, 2:], torch.tensor([[[1.0, 0, 0.25], [0, 1, 0]]]), torch.zeros(1, 2, 1, 1)
    moved = crop(images[:1].float(), theta, 64)
    beside, within = moved.clone(), moved.clone()
    beside[..., 52:], within[..., 24:40, 16:32] = 0, 0
    seen = moved, beside / 2 + 9, within, images[1:]
    alike, also, less, other = (likeness(images[0], heart, x, theta, flow) for x in seen)
    assert alike > 0.99 and also > 0.97 and less < 0.6 and other < 0.9
    assert likeness(images[0], heart, moved, theta, flow + 0.2) < 0.9  # displaced
    elsewhere = moved.clone()
    elsewhere[..., 24:50, 48:54] = 0  # where the heart lies in the reference image
    assert likeness(images[0], heart, elsewhere, theta, flow) > 0.97


def test_a_shift_and_a_scale_are_found_exactly():
    """Equation (4)."""
    images, masks = digits(1)
    known = torch.tensor([[[1 / 1.25, 0, -0.3], [0, 1 / 1.25, 0.2]], [[1 / 0.8, 0, 0.25], [0, 1 / 0.8, 0.0]]])
    seen = sample(images, known) + 0.02 * torch.randn(2, 1, 64, 64, generator=seeded())
    priors = priors_from_masks(masks[0])
    theta, s = find(images[0], priors, seen)
    assert (theta - known).abs().max() < 0.06  # two pixels
    assert s.min() > 0.6 - SEARCHED
    torch.testing.assert_close(s + SEARCHED, agreement(images[0], priors, seen, theta))
    torch.testing.assert_close(find(images[0], priors, seen[1:]), (theta[1:], s[1:]))
    priors = F.pad(torch.ones(1, 1, 1), (30, 33, 30, 33))  # one pixel
    image = gaussian_blur(torch.rand(1, 1, 64, 64, generator=seeded()), 2.0)
    assert find(image[0], priors, image)[1].item() > 0.7 - SEARCHED


def test_what_is_more_like_another_object_of_the_reference_image_is_not_found():
    images, masks = digits(23)  # image i shows the digit i % 10
    for labelled in (0, 1):
        reference = torch.where(masks[2] > 0, images[2], images[labelled])  # a 2 beside it, without a mask
        seen = images[[2, 12, 22, 10 + labelled, 20 + labelled]]
        theta, s = find(reference, masks[labelled], seen)
        assert (s[:3] == -1).all() and s[3:].min() > 0.4
        assert agreement(reference, masks[labelled], seen, theta)[:3].min() > 0.6


def test_priors_count_little_in_images_without_the_object():
    """Equation (3)."""
    images, masks = digits(12)
    noise = 0.25 + 0.08 * torch.randn(30, 1, 64, 64, generator=seeded())
    reference, priors = images[1], priors_from_masks(masks[1])
    _, flow, nothing = register(reference, priors, noise, deformable=False)
    _, _, something = register(reference, priors, images[2:], deformable=False)
    assert nothing.max() < something.min() and confidence(nothing).mean() < 0.2
    assert confidence(torch.tensor([-1.0, (NOTHING + CERTAIN) / 2, 1])).tolist() == pytest.approx([0, 0.5, 1])
    assert flow.shape == (30, 2, 1, 1)
