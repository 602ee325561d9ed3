"""One labelled image becomes priors and masks for all: of attention, of the registered prior, of a folder."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refuses, seeded, unlabelled
from torch import nn

from common import runs
from common.config import parse
from common.data import Data
from common.foreground import are_made, check_foreground, foreground, keep_masks, kept_masks
from common.foreground import mask_dice, masks_compared, references_for, registered_masks
from common.phantom import REGIONS, phantom
from common.regions import make_priors, masks_held, mass_held, prior_maps, priors_over
from common.regions import warn_if_unguided
from common.runs import Loaded
from common.splits import load
from vit import ViT

pytestmark = pytest.mark.usefixtures("few_test_images")


def test_a_prior_file_that_does_not_fit_is_refused(tmp_path):
    file, train_split = tmp_path / "prior.npy", load("phantom", 64, 0, 2)[0]["train"]
    for prior, message in [
        (np.ones((2, 32, 32)), r"is an array \(2, 32, 32\): make it \(R, 64, 64\)"),
        (np.ones((64, 64)), "make it"), (np.ones((0, 64, 64)), "make it"),
        (-np.ones((1, 64, 64)), "must be finite, not negative, and not empty"),
        (np.eye(2)[:, :1, None] * np.ones((64, 64)), "must be finite, not negative, and not empty"),
        (np.array([{"a": 1}], dtype=object), "a .npy file"),
    ]:  # fmt: skip
        np.save(file, prior, allow_pickle=True)
        refuses(message, make_priors, str(file), train_split, None, 0.0)


def test_priors_are_registered_to_each_image_unless_told_otherwise(monkeypatch):
    splits, reference, _ = load("phantom", 64, 0, 16)
    train_split, test = splits["train"], splits["test"]
    given = train_split, reference, 0.025
    same, certain, _ = priors_over(test.images, "sample", *given, "none", "cpu")(torch.arange(8))
    moved, sure, _ = priors_over(test.images, "sample", *given, "bend", "cpu")(torch.arange(8))
    assert (certain == 1).all() and (sure > 0.5).all()
    assert same.shape == moved.shape == (8, 3, 64, 64) and torch.equal(same[0], same[7])
    true = test.masks.float()
    assert ((moved - true).square().mean() < (same - true).square().mean()).item()
    monkeypatch.setattr("common.regions.BATCH", 3)  # so that there is a smaller last batch
    maps = prior_maps(test.images, *given, "bend", (8, 8), "cpu")
    assert torch.equal(maps["aligned prior, every pixel"][0], moved.flatten(2))
    sizes = {"prior": 64, "aligned prior, every pixel": 4096, "aligned prior": 64}
    assert {name: m.shape for name, (m, _) in maps.items()} == {name: (8, 3, n) for name, n in sizes.items()}


def test_a_note_names_the_remedy_if_the_reference_is_found_in_few_images(capsys):
    splits, reference, _ = load("phantom", 64, 0, 8)
    noise, given = torch.randint(256, (9, 1, 64, 64), generator=seeded()).byte(), (0.025, "bend", "cpu")
    for shown, others in ((6, 2), (2, 9)):
        images = torch.cat([splits["test"].images[:shown], noise[:others]])
        over = priors_over(images, "sample", splits["train"], reference, *given, heads=3)
        assert (over(torch.arange(len(images)))[1][shown:] < 0.5).all()
        said = capsys.readouterr().out
        assert f"is not clearly found in {others} of" in said
        assert ("--align none" in said) == (others > shown)


def test_the_fewest_pixels_that_hold_the_mass_are_kept():
    """Equation (1)."""
    attention = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]])  # (1, 2, 4), a 2x2 grid
    found = masks_held(attention, (2, 2), (2, 2), torch.tensor([0.65, 0.7]))
    assert found[0, 0, 0, 0] and found[0, 0].sum() == 2  # 0.5 + 0.2 suffices, 0.5 does not
    assert found[0, 1].tolist() == [[False, False], [False, True]]


def test_attention_that_is_the_prior_makes_a_mask_of_nearly_its_area():
    """Equation (2)."""
    regions = torch.zeros(1, 32, 32, dtype=torch.bool)
    regions[0, 8:24, 4:28] = True
    attention = F.avg_pool2d(regions.float(), 2).flatten(1)[None]  # (1, 1, 256)
    mass = mass_held(attention / attention.sum(), (16, 16), regions)
    found = masks_held(attention / attention.sum(), (16, 16), (32, 32), mass)[0]
    assert 0.94 < found.sum() / regions.sum() < 1.02


def test_a_mass_is_that_of_the_reference_image_and_measuring_it_does_not_end_training(monkeypatch):
    splits, reference, _ = load("phantom", 64, 0, 4)
    train_split, model = splits["train"], nn.ModuleDict({"encoder": ViT(64, 8, 1, 24, 1, 3)})
    monkeypatch.setattr(runs, "attention_of", attention := Mock(wraps=runs.attention_of))
    masses = runs.masses_of(parse(["--ssl", "none"])[0], model, train_split, reference)()
    _, images, _ = attention.call_args.args
    assert torch.equal(images, train_split.images[[train_split.names.index(reference)]])
    assert list(masses) == train_split.regions and model.training and model["encoder"].training


def test_a_loss_of_span_that_did_not_fall_is_a_warning(capsys):
    for losses in ([1.0, 0.5], [1.0], [0.5, 1.0]):
        warn_if_unguided([{"loss": 9.0, "span_loss": loss} for loss in losses])
    warn_if_unguided([{"loss": 9.0}] * 2)  # without SPAN
    said = capsys.readouterr().out
    assert said.count("warning") == said.count("warning: SPAN's loss rose from 0.5 in the first epoch") == 1


def test_masks_of_attention_are_those_of_the_run_that_the_encoder_starts_from(span_run):
    splits, reference, _ = load("phantom", 64, 0, 32)
    prior = "sample", splits["train"], reference, 0.025, "none", "cpu"
    by_init, _ = foreground("attention", splits, "phantom", span_run, prior)
    assert torch.equal(by_init, foreground(str(span_run), splits, "phantom", None, prior)[0])


def test_priors_may_be_each_image_s_own_masks_or_a_file(tmp_path):
    split = load("phantom", 64, 0, 6)[0]["train"]
    np.save(tmp_path / "p.npy", 7 * split.masks[4].float().numpy())
    for prior, index in (("masks", [3, 1]), (str(tmp_path / "p.npy"), [4, 4])):
        over = priors_over(split.images, prior, split, None, 0.0, "bend", "cpu")
        priors, sure, _ = over(torch.tensor([3, 1]))
        assert torch.equal(priors, split.masks[index].float()) and (sure == 1).all()


def test_masks_are_made_unless_every_image_has_its_own_or_another_tool_s(span_run, tmp_path):
    all_, some = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    assert not are_made("data", all_) and are_made("data", some) and not are_made(str(tmp_path), some)
    assert all(are_made(source, all_) for source in ("prior", "attention", str(span_run)))


def test_images_without_masks_get_the_reference_s_by_registration_or_are_left_out(capsys):
    """An image in which nothing agrees with the reference would teach what lies in its background."""
    splits, reference, _ = load("phantom", 64, 0, 8)
    train_split = splits["train"]
    lacking = torch.tensor([i for i, name in enumerate(train_split.names) if name != reference])
    train_split.has_masks[lacking] = False
    train_split.images[lacking[0]] = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    prior = "none", train_split, reference, 0.025, "bend", "cpu"
    masks, known = foreground("data", splits, "phantom", None, prior)
    covered = masks.flatten(1).any(dim=1)
    assert torch.equal(known, covered)
    assert "masks: 1 of 8 training images; those of up to 5 images are carried" in capsys.readouterr().out
    check_foreground("data", train_split._replace(labels=torch.ones(8, 1)), masks, covered)
    line = "the foreground of 7 of 8 training images is known; the others are left out"
    assert line in capsys.readouterr().out
    assert not covered[lacking[0]] and covered.sum() == 7
    train_split.has_masks[covered] = True
    by_prior, _ = foreground("prior", splits, "phantom", None, ("sample", *prior[1:]))
    assert mask_dice(masks, train_split) > 0.85 < mask_dice(by_prior, train_split)
    train_split.has_masks[:] = True
    exact = train_split.masks.any(dim=1, keepdim=True) & covered[:, None, None, None]
    assert masks_compared(exact, train_split, None) == (1.0, 7)  # an empty mask is unknown, not wrong
    own = train_split.names[int(covered.nonzero()[0])]  # the reference's says nothing of the others
    assert masks_compared(exact, train_split, own) == (1.0, 6)
    assert math.isnan(masks_compared(masks & False, train_split, own)[0])


def test_a_class_whose_images_would_all_be_left_out_is_named():
    few = Data(None, None, None, torch.eye(2)[[0, 0, 0, 1]], [], [], ["well", "ill"])
    many, masks = few._replace(labels=torch.ones(40, 1), findings=["ill"]), torch.ones(40, 1, 8, 8) > 0
    line = "3 of 4 training images is known, of none labelled ill: add masks"
    refuses(line, check_foreground, "prior", few, masks[:4], torch.arange(4) < 3)
    refuses("3 of 40 training images is known", check_foreground, "prior", many, masks, torch.arange(40) < 3)


def test_a_region_gets_the_statistic_that_is_best_on_validation_images():
    """Priors of half images: the mean is bright on the left, the deviation high on the right."""
    images = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    images[..., :8], images[::2, ..., 8:] = 250, 200
    masks = torch.zeros(8, 2, 16, 16, dtype=torch.bool)
    masks[:, 0, :, :8] = masks[:, 1, :, 8:] = True
    has_masks = torch.ones(8, dtype=torch.bool)
    data = unlabelled(images, masks=masks, has_masks=has_masks, regions=["left", "right"])
    swapped = data._replace(masks=masks.flip(1), has_masks=torch.arange(8) > 4)
    swapped.masks[:5] = masks[:5]  # not known
    config = parse("--prior statistics --prior-blur 0".split())[0]
    run = Loaded(config, None, ViT(16, 4, 1, 12, 1, 2), [], "", {})
    for val, order in ((data, (0, 1)), (swapped, (1, 0))):
        splits = {"train": data, "val": val, "test": data}
        maps = runs.measured_by(run, splits, None, {})["priors"](images[:3])
        for name, n in (("prior, every pixel", 256), ("prior", 16)):
            m = maps[name][0].unflatten(2, (n // round(n**0.5), -1))  # (3, R, h, w)
            half = m.shape[3] // 2
            left = m[0, :, :, :half].sum(dim=(1, 2)) > m[0, :, :, half:].sum(dim=(1, 2))
            assert m.shape[:2] == (3, 2) and left[list(order)].tolist() == [True, False]


def test_masks_that_leave_no_background_stop_the_run_and_classes_that_lose_unevenly_are_named(capsys):
    data = Data(None, None, None, torch.eye(2)[torch.arange(40) % 2], [], [], ["well", "ill"])
    masks, all_ = torch.ones(40, 1, 64, 64, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    line = "It covers 100 % of an image: almost nothing is background"
    refuses(line, check_foreground, "RUN", data, masks, all_)
    masks[:, :, :32] = False
    check_foreground("RUN", data, masks, all_)
    assert capsys.readouterr().out.endswith("is known. It covers 50 % of an image\n")
    check_foreground("prior", data, masks, (torch.arange(40) % 2 == 0) | (torch.arange(40) < 10))
    assert "warning: 25 % of ill but 100 % of well have masks" in capsys.readouterr().out
    both = data._replace(labels=data.labels[:, [1, 1]], findings=["ill", "worse"])  # findings that lose alike
    check_foreground("prior", both, masks, (torch.arange(40) % 2 == 0) | (torch.arange(40) < 10))
    assert "warning: 25 % of ill but 100 % of no finding have masks" in capsys.readouterr().out
    both.labels[36:] = torch.nan  # labels that are unknown are no class of their own
    check_foreground("prior", both, masks, torch.arange(40) < 36)
    assert "class balance" not in capsys.readouterr().out


def test_of_two_references_each_image_takes_the_masks_of_the_one_that_is_more_like_it(monkeypatch):
    sure = {"a": torch.tensor([1, 1, 1, 0.4]), "b": torch.tensor([1, 1, 0.4, 0.4])}
    alike = {"a": torch.tensor([0.9, 0.1, 0.2, 0.9]), "b": torch.tensor([0.5, 0.6, 0.9, 0.9])}

    def over(images, source, train, name, *how):
        prior = (torch.arange(2) == "ab".index(name)).float().expand(4, 1, 2, 2)  # a's column, or b's
        return lambda index: (prior[index], sure[name][index], alike[name][index])

    monkeypatch.setattr("common.foreground.priors_over", over)
    monkeypatch.setattr("common.foreground.references_for", lambda *_: ["a", "b"])
    found = registered_masks(torch.zeros(4, 1, 2, 2), ("masks", None, "a", 0.0, "none", "cpu"), most=2)
    assert found[:, 0, 0].int().tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]


def test_regions_that_no_image_shows_together_are_united_to_be_registered():
    images, masks, _ = phantom(3, seed=10)
    masks[0, 1:] = masks[1:, 0] = False
    data = Data(images, masks, torch.tensor([True, False, False]), None, list("abc"), REGIONS, [])
    made = registered_masks(images, ("sample", data, "a", 0.025, "none", "cpu"))
    assert torch.equal(made[1], made[0]) and (made[0, 0] & masks[0, 0]).sum() > 0.9 * masks[0, 0].sum()
    with pytest.raises(ValueError, match="no image has a mask for every region; add masks of one image"):
        registered_masks(images, ("sample", data, None, 0.025, "bend", "cpu"))


def test_kept_masks_come_back_with_the_images_that_stay(tmp_path):
    masks, stay = torch.rand(3, 1, 5, 5) > 0.5, torch.tensor([True, False, True])
    keep_masks(tmp_path, masks, stay)
    assert all(map(torch.equal, kept_masks(tmp_path, masks.shape), (masks, stay)))


def test_references_show_each_label_in_turn():
    labels, names = torch.tensor([[0.0], [0], [0], [1], [1], [0]]), list("abcdef")
    masks = torch.ones(6, 1, 8, 8, dtype=torch.bool)
    masks[1] = False  # it shows no region
    data = Data(masks, masks, torch.arange(6) < 5, labels, names, ["heart"], ["ill"])
    assert references_for(data, "c", 5) == ["c", "d", "a", "e"] and references_for(data, "a", 2) == ["a", "d"]
    assert references_for(data._replace(labels=labels[:, :0]), "c", 3) == ["c", "a", "d"]
