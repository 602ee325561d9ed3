"""Classification, plain and with ISNet: what is explained, what is supervised, and what it costs in use."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import Generator, nan

import train
from common.baselines import PENALTIES
from common.checkpoint import DataSpec
from common.classify import attention_seen, classification_loss, constant_loss, explained_target
from common.classify import is_multiclass, natural_range, shifted, supervised_layers, warn_if_constant
from common.config import parse
from common.models import build_classifier, build_encoder, lrp_rule
from isnet_lrp import log_odds
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT

SMALL = "--embed-dim 16"
RESNET = f"--isnet 1 --isnet-every 1 --isnet-decay 0.9 --isnet-end 1 --lrp-gamma 3 {SMALL}"
VIT = f"{RESNET} --backbone vit --img-size 16 --patch-size 4 --embed-dim 12 --depth 2 --num-heads 3 --shift 0"
LABELS = torch.tensor([[0.0], [1]] * 4)


def middle(masked: int = 8) -> torch.Tensor:
    """Masks of the middle of 8 images; only the first `masked` have one."""
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    masks[:masked, :, 4:12, 4:12] = True
    return masks


def classifier(words: str, findings: int = 1):
    """(settings, an untrained classifier) of a command line."""
    config, _ = parse(["--task", "classify", *words.split()])
    return config, build_classifier(config, build_encoder(config, 1), findings, 1)


def losses_of(words: str, labels: torch.Tensor = LABELS, masks: torch.Tensor | None = None):
    """A classifier on random images of 16 px, and its objective."""
    config, model = classifier(words, labels.shape[1])
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    masks = middle() if masks is None else masks
    spec = DataSpec(1, (), is_multiclass(labels), "", (1.0, 20.0))
    return model, train.classifier_objective(config, model, images, masks, labels, spec)


def test_images_move_at_random_within_bounds_and_their_masks_move_with_them():
    x = torch.arange(6 * 400.0).view(6, 1, 20, 20)
    moved, m = shifted(x, (x % 7 == 0).float(), 0.1, seeded())
    assert torch.equal(m, (moved % 7 == 0).float())
    origin = [(int(one.argmin()) // 20, int(one.argmin()) % 20) for one in moved]  # where the first pixel is
    assert {place for row in origin for place in row} == {0, 1, 2, 18, 19} and len(set(origin)) > 3
    assert torch.equal(moved.flatten(1).sort().values, x.flatten(1))  # nothing is lost
    assert shifted(x, None, 0.1, Generator())[1] is None and shifted(x, m, 0, None)[0] is x


def test_classes_exclude_each_other_and_findings_do_not():
    assert is_multiclass(torch.tensor([[1, 0], [0, 1], [nan, nan]]))
    assert not any(is_multiclass(torch.tensor(labels)) for labels in ([[1.0, 0], [1, 1]], [[1.0], [0]]))


def test_unknown_findings_do_not_count():
    logits, labels = torch.randn(3, 2), torch.tensor([[1, nan], [0, 1], [nan, nan]])
    known = torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]])
    expected = F.binary_cross_entropy_with_logits(known, torch.tensor([1.0, 0, 1]))
    torch.testing.assert_close(classification_loss(logits, labels, False), expected)
    classes = torch.tensor([[1.0, 0], [0, 1], [nan, nan]])
    expected = F.cross_entropy(logits[:2], torch.tensor([0, 1]))
    torch.testing.assert_close(classification_loss(logits, classes, True), expected)
    assert classification_loss(logits, torch.full((3, 2), nan), True) == 0


def test_a_constant_prediction_loses_the_labels_entropy():
    y = torch.tensor([1.0, 1, 1, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_loss(torch.stack([1 - y, y], dim=1), True) == pytest.approx(entropy)
    findings = torch.stack([y, torch.tensor([1.0, 0, nan, nan])], dim=1)  # 4 and 2 are known
    assert constant_loss(findings, False) == pytest.approx((4 * entropy + 2 * math.log(2)) / 6)


def test_of_classes_the_label_a_random_one_or_the_least_likely_is_explained():
    labels, generator = torch.eye(3)[[0, 2, 1, 1]], seeded()
    assert torch.equal(explained_target(labels, True, "label", generator), labels)
    drawn = torch.stack([explained_target(labels, True, "random", generator) for _ in range(100)])
    assert (drawn.sum(dim=2) == 1).all() and (drawn.mean(dim=(0, 1)) > 0.2).all()
    logits = torch.tensor([[3.0, -1, 0]])
    target = explained_target(labels, True, "selective", generator)
    torch.testing.assert_close(target(logits), log_odds(logits, torch.tensor([1])))


def test_of_findings_one_logit_is_explained_the_label_s_if_one_is_present():
    labels, generator = torch.tensor([[0.0, 1, 1], [0, 0, 0], [nan, nan, 1]]), seeded()
    drawn = torch.stack([explained_target(labels, False, "label", generator) for _ in range(200)])
    assert (drawn.sum(dim=2) == 1).all()
    assert drawn[:, 0, 0].sum() == 0 and (drawn[:, 0, 1:].mean(dim=0) > 0.3).all()
    assert (drawn[:, 1].mean(dim=0) > 0.2).all() and (drawn[:, 2, 2] == 1).all()


COSINE = {0: 3.0, 1: 0.6 + 2.4 * (2 + 2**0.5) / 4, 2: 1.8, 4: 0.6}
CLASSES = torch.eye(2).repeat(4, 1)
WEIGHTS = ("1", LABELS.expand(-1, 9), {0: 1 / 3}), ("0.2", LABELS, COSINE), ("1", CLASSES, {0: 3.0})


@pytest.mark.parametrize("end, labels, weights", WEIGHTS)
def test_the_weight_of_isnet_is_shared_by_all_findings_and_falls_as_half_a_cosine(end, labels, weights):
    """Of findings one logit is explained, while the classification loss is the mean of all their losses."""
    _, losses = losses_of(f"{RESNET} --isnet 3 --isnet-end {end}", labels)
    for step, weight in weights.items():
        loss, logged = losses(torch.arange(4), seeded(), step, 4)
        isnet = logged["background"] + logged["foreground"]
        torch.testing.assert_close(loss.detach(), logged["classification"] + weight * isnet)


def test_the_published_loss_is_weighed_against_the_classification_s():
    config, model = classifier(f"{SMALL} --preset published")
    images, rule = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8), lrp_rule(config)
    assert rule["input_rule"] == (-2.0, 2.0) and rule["detach_biases"]
    arguments = model, images, middle(), LABELS, False, 1e-3, 4, "selective", rule, 0, "blocks", 25.0
    ranges = natural_range(*arguments)
    assert len(ranges) == 2 * (1 + len(model.encoder.blocks))
    spec = DataSpec(1, (), False, "", ranges)
    losses = train.classifier_objective(config, model, images, middle(), LABELS, spec)
    loss, logged = losses(torch.arange(8), seeded(), 0, 1)
    assert logged.keys() == {"classification", "heatmaps"} and logged["heatmaps"] > 0
    torch.testing.assert_close(loss.detach(), logged["classification"] + 0.7 / 0.3 * logged["heatmaps"])


def test_isnet_s_loss_is_a_mean_over_the_images_with_masks_and_the_others_only_teach_the_classification():
    _, losses = losses_of(f"{VIT} --swap 0", masks=middle(4))
    with pytest.warns(UserWarning, match="empty mask"):
        masked, all_, others = (losses(torch.arange(*n), seeded(), 0, 1)[1] for n in ((4,), (8,), (4, 8)))
    for name in ("background", "foreground"):
        torch.testing.assert_close(masked[name], all_[name])
        assert others[name] == 0
    assert masked["background"] > 0 < others["classification"]


@pytest.mark.parametrize("margin, free", [(0, False), (0.1, False), (0.25, True)])
def test_relevance_is_free_in_a_margin_around_the_foreground(margin, free):
    """The foreground ends 4 of 16 pixels before the border of the image."""
    _, losses = losses_of(f"{RESNET} --isnet-margin {margin}")
    assert (losses(torch.arange(8), seeded(), 0, 1)[1]["background"] == 0) == free


def test_isnet_may_act_on_every_nth_step_alone():
    _, losses = losses_of(f"{RESNET} --isnet 3 --isnet-every 3")
    logged = [losses(torch.arange(4), seeded(), step, 6)[1].keys() for step in range(6)]
    assert [len(keys) for keys in logged] == [3, 1, 1, 3, 1, 1]
    assert all("classification" in keys for keys in logged)  # so that its mean is of all steps


def test_c1_and_c2_are_found_from_the_images_with_masks_and_leave_the_model_as_it_was():
    _, model = classifier(VIT)
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    before, rule = copy.deepcopy(model.state_dict()), {"epsilon": 0.01, "signed": True}

    def found(images: torch.Tensor, masks: torch.Tensor, lr: float) -> tuple[float, ...]:
        return natural_range(model, images, masks, LABELS, False, lr, 4, "selective", rule, 0)

    other = images.clone()
    other[4:] = 255 - other[4:]
    few = found(images, middle(4), 0.0)
    assert 0 < few[0] < few[1] and few == found(other, middle(4), 0.0) != found(other, middle(8), 0.0)
    assert few != found(images, middle(4), 1e-2)  # it has learned
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_c1_and_c2_are_found_in_parts_of_batches_but_never_of_one_image():
    (_, model), rule, seen = classifier(VIT), {"epsilon": 0.01, "signed": True}, []
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))  # also of copies
    given = model, images, middle(4), LABELS, False, 1e-2, 5, "selective", rule, 0
    whole = natural_range(*given)
    assert seen == [5, 3] * 5 + [4]  # five epochs, and the images with masks
    seen.clear()
    assert natural_range(*given, parts=2) == pytest.approx(whole, rel=1e-3)
    assert seen == [3, 2, 3] * 5 + [3, 1]  # relevance needs no batch statistics


def test_isnet_supervises_every_norm_patches_and_blocks_but_no_norm_that_pooling_leaves_without_effect():
    resnet = ResNet(1, 16)
    assert supervised_layers(resnet) == [m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(supervised_layers(ViT(16, 4, 1, 12, 2, 3))) == 1 + 2 * (2 + 1) + 1
    assert len(supervised_layers(ViT(16, 4, 1, 12, 2, 3, pool=GAP()))) == 1 + 2 * (2 + 1)


def test_what_the_cls_token_and_all_tokens_attend_to_in_each_block_is_seen_and_can_be_trained_through():
    encoder, images = ViT(16, 4, 1, 12, 2, 3), torch.rand(2, 1, 16, 16)
    maps = encoder.attention_maps(images)  # (B, depth, heads, T, T)
    with attention_seen(encoder) as seen:
        encoder(images)
    assert len(seen) == 4 and all(not m._forward_pre_hooks for m in encoder.modules())
    for block in range(2):
        torch.testing.assert_close(seen[2 * block], maps[:, block, :, 0])
        torch.testing.assert_close(seen[2 * block + 1], maps[:, block].mean(dim=2))
    seen[2].square().sum().backward()
    assert encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    simpools = {ViT(16, 4, 1, 12, 2, 3, pool=SimPool(12)): 3, ResNet(1, 16, pool=SimPool(16)): 1}
    for encoder, count in (simpools | {ResNet(1, 16): 0, ViT(16, 4, 1, 12, 2, 3, pool=GAP()): 2}).items():
        with attention_seen(encoder) as seen:
            features = encoder(images)
        assert len(seen) == count and (encoder not in simpools or seen[-1] is features.attention)


@pytest.mark.parametrize("words", [RESNET, VIT])
def test_isnet_s_foreground_for_a_vit_is_made_of_whole_patches(words, monkeypatch):
    """A patch's embedding is linear: it can't leave out those of its pixels that lie in the background."""
    seen, real = [], train.isnet_background
    monkeypatch.setattr(train, "isnet_background", lambda *args: seen.append(args) or real(*args))
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 3:6, 5] = True
    losses_of(words, masks=masks)[1](torch.arange(8), seeded(), 0, 1)
    if words == VIT:
        masks[:, :, 0:8, 4:8] = True  # two patches of 4 x 4
    assert torch.equal(seen[0][3], masks.float())
    assert [len(part) for part in seen[0][1:3]] == ([8, 4] if words == VIT else [9, 0])  # layers, attention


def step_of(words: str, masked: int = 8) -> tuple:
    """(loss, metrics, model) of one step on two classes; `masked` of 8 images have a mask."""
    torch.manual_seed(0)
    model, losses = losses_of(f"{SMALL} {words}", torch.eye(2)[torch.arange(8) % 2], middle(masked))
    return *losses(torch.arange(8), seeded(), 0, 1), model


@pytest.mark.parametrize("name", PENALTIES)
def test_a_baseline_s_loss_adds_its_weighted_penalty_which_is_zero_without_masks(name):
    loss, metrics, model = step_of(f"--baseline {name} --baseline-weight 7")
    assert metrics[name] > 0
    torch.testing.assert_close(loss.detach(), metrics["classification"] + 7 * metrics[name])
    none, one = (step_of(f"--baseline {name}", masked=n)[1][name] for n in (0, 1))
    assert none == 0 < one


def test_a_step_swaps_the_backgrounds_of_all_images_or_of_a_share():
    isnet, swap = "--isnet 1 --swap 0", "--baseline swap --swap-margin"
    flags = "", f"{swap} 0", f"{swap} 0.1", isnet, f"{isnet}.5", "--isnet 1"
    assert len({step_of(f)[0].item() for f in flags}) == 6


@pytest.mark.parametrize("part", ["loss", "background", "heatmaps"])
def test_a_classifier_no_better_than_a_constant_is_named_with_a_remedy_that_it_has(part, capsys):
    for loss in (0.7, 0.6):  # of two classes that are equally frequent a constant has 0.69
        warn_if_constant({"loss": 0.9, "classification": loss, part: 1}, torch.tensor([[0.0], [1]]), False)
    said, remedy = capsys.readouterr().out, "or more --epochs" if part == "loss" else "or a smaller --isnet"
    assert said.startswith("warning: classification loss 0.70 is no better") and said.endswith(f"{remedy}\n")
    assert "0.60" not in said
