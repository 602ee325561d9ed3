"""Classification, plain and with ISNet: what is explained, what is supervised, and what it costs in use."""

import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nan

from common import models as classify
from common.checkpoint import build_classifier, build_encoder
from common.models import Classifier, classification_loss, exclusive, explained, isnet_losses, log_odds
from common.models import attention_seen, constant_loss, natural_range, objective, supervised_layers
from common.config import parse
from resnet import ResNet
from simpool import GAP, SimPool
from vit import ViT

SETTINGS = Namespace(
    isnet=1.0, isnet_end=1.0, isnet_layers="all", isnet_decay=0.9, isnet_e=0.1, lrp_epsilon=0.01,
    lrp_gamma=3.0, explain="selective", lr=1e-3, batch_size=4, seed=0, relations=None, baseline=None,
    relevance_range=[1.0, 20.0],
)  # fmt: skip
ENCODERS = {"resnet": lambda: ResNet(1, 16), "vit": lambda: ViT(16, 4, 1, 12, 2, 3)}


def test_classes_exclude_each_other_and_findings_do_not():
    assert exclusive(torch.tensor([[1, 0], [0, 1], [nan, nan]]))
    assert not exclusive(torch.tensor([[1.0, 0], [1, 1]])) and not exclusive(torch.tensor([[1.0], [0]]))


def test_unknown_findings_do_not_count():
    logits, labels = torch.randn(3, 2), torch.tensor([[1, nan], [0, 1], [nan, nan]])
    known = torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]])
    expected = F.binary_cross_entropy_with_logits(known, torch.tensor([1.0, 0, 1]))
    torch.testing.assert_close(classification_loss(logits, labels, False), expected)
    classes = torch.tensor([[1.0, 0], [0, 1], [nan, nan]])
    expected = F.cross_entropy(logits[:2], torch.tensor([0, 1]))
    torch.testing.assert_close(classification_loss(logits, classes, True), expected)
    assert classification_loss(logits, torch.full((3, 2), nan), True) == 0


def test_log_odds_are_those_of_the_softmax():
    logits = torch.randn(5, 4, dtype=torch.float64)
    p = logits.softmax(dim=1)[torch.arange(5), torch.tensor([0, 1, 2, 3, 0])]
    torch.testing.assert_close(log_odds(logits, torch.tensor([0, 1, 2, 3, 0])), (p / (1 - p)).log())


def test_of_classes_the_label_a_random_one_or_the_least_likely_is_explained():
    labels, generator = torch.eye(3)[[0, 2, 1, 1]], Generator().manual_seed(0)
    assert torch.equal(explained(labels, True, "label", generator), labels)
    drawn = torch.stack([explained(labels, True, "random", generator) for _ in range(100)])
    assert (drawn.sum(dim=2) == 1).all() and (drawn.mean(dim=(0, 1)) > 0.2).all()
    logits = torch.tensor([[3.0, -1, 0]])
    target = explained(labels, True, "selective", generator)
    torch.testing.assert_close(target(logits), log_odds(logits, torch.tensor([1])))


def test_of_findings_one_logit_is_explained_the_label_s_if_one_is_present():
    labels, generator = torch.tensor([[0.0, 1, 1], [0, 0, 0], [nan, nan, 1]]), Generator().manual_seed(0)
    drawn = torch.stack([explained(labels, False, "label", generator) for _ in range(200)])
    assert (drawn.sum(dim=2) == 1).all()
    assert drawn[:, 0, 0].sum() == 0 and (drawn[:, 0, 1:].mean(dim=0) > 0.3).all()
    assert (drawn[:, 1].mean(dim=0) > 0.2).all() and (drawn[:, 2, 2] == 1).all()


def test_one_of_several_findings_has_its_share_of_the_loss():
    """Its logit is explained alone, while the classification loss is the mean of all findings' losses."""
    torch.manual_seed(0)
    images, masks = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8), torch.zeros(4, 1, 16, 16).bool()
    masks[..., :8] = True
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    model = Classifier(ENCODERS["resnet"](), 3)
    _, logged = objective(SETTINGS, model, images, masks, labels)(torch.arange(4), Generator().manual_seed(0))
    isnet = logged["background"] + logged["foreground"]
    torch.testing.assert_close(logged["loss"], logged["classification"] + isnet / 3)


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_to_supervise_exist_in_every_encoder(name):
    encoder = ENCODERS[name]()
    none, relevant, layers = (supervised_layers(encoder, which) for which in ("none", "relevance", "all"))
    assert none == [] and relevant == layers and len(layers) > 3


def uniform_kl(A):
    """The mean KL of even attention to 16 patches from the attention (B, heads, T) that there is."""
    A = A[:, :, -16:] / A[:, :, -16:].sum(dim=2, keepdim=True)
    return (1 / 16 * (1 / 16 / A).log()).sum(dim=2).mean()


@pytest.mark.parametrize("name", ENCODERS)
def test_inner_layers_count_as_background_where_they_cover_no_foreground(name):
    """With a mask over the whole image nothing is background, though a ViT shall look at all of it alike."""
    model = Classifier(ENCODERS[name](), 1)
    images, target = torch.rand(3, 1, 16, 16), torch.ones(3, 1)
    everywhere, corner = torch.ones(3, 1, 16, 16), torch.zeros(3, 1, 16, 16)
    corner[:, :, :3, :3] = 1
    with attention_seen(model.encoder) as seen:
        model(images)
    uneven = sum(uniform_kl(A) for A in seen) / max(1, len(seen))
    whole = isnet_losses(model, images, everywhere, target, SETTINGS)[0]
    torch.testing.assert_close(whole, torch.full((3,), uneven.item() if seen else 0.0))
    alone = isnet_losses(
        model, images, corner, target, Namespace(**{**vars(SETTINGS), "isnet_layers": "none"})
    )
    both = isnet_losses(model, images, corner, target, SETTINGS)
    torch.testing.assert_close(both[1], alone[1])
    assert (both[0] > alone[0]).all()


def test_the_same_answer_for_all_images_loses_the_labels_entropy():
    y = torch.tensor([1.0, 1, 1, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_loss(torch.stack([1 - y, y], dim=1), True) == pytest.approx(entropy)
    findings = torch.stack([y, torch.tensor([1.0, 0, nan, nan])], dim=1)  # 4 and 2 are known
    assert constant_loss(findings, False) == pytest.approx((4 * entropy + 2 * math.log(2)) / 6)


def test_the_weight_of_isnet_falls_as_half_a_cosine_to_its_share():
    torch.manual_seed(0)
    model = Classifier(ENCODERS["resnet"](), 1)
    images, labels = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8), torch.tensor([[0.0], [1]] * 2)
    masks = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 4:12, 4:12] = True
    settings = Namespace(**vars(SETTINGS) | {"isnet": 3.0, "isnet_end": 0.2})
    losses = objective(settings, model, images, masks, labels)
    for done, weight in ((0.0, 3.0), (0.25, 0.6 + 2.4 * (2 + 2**0.5) / 4), (0.5, 1.8), (1.0, 0.6)):
        _, found = losses(torch.arange(4), Generator().manual_seed(0), done)
        punished = found["background"] + found["foreground"]
        torch.testing.assert_close(found["loss"], found["classification"] + weight * punished)


def test_training_with_isnet_leaves_a_plain_model_behind():
    """No parameter, hook or operation more than the plain classifier has, so no cost in use."""
    torch.manual_seed(0)
    model = Classifier(ENCODERS["resnet"](), 1)
    images, labels = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8), torch.tensor([[0.0], [1]] * 4)
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 4:12, 4:12] = True
    before = copy.deepcopy(model)
    loss, logged = objective(SETTINGS, model, images, masks, labels)(
        torch.arange(4), Generator().manual_seed(0)
    )
    loss.backward()
    assert set(logged) == {"loss", "classification", "background", "foreground"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert str(model) == str(before)
    x = torch.rand(2, 1, 16, 16)
    assert not torch.equal(model.eval()(x), before.eval()(x))  # BatchNorm has moved
    before.load_state_dict(model.state_dict())
    assert torch.equal(model(x), before(x))


def test_c1_and_c2_are_found_from_the_images_with_masks_and_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = Classifier(ENCODERS["vit"](), 1)
    images, labels = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8), torch.tensor([[0.0], [1]] * 4)
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    masks[:4, :, 4:12, 4:12] = True
    before = copy.deepcopy(model.state_dict())
    c1, c2 = natural_range(model, images, masks, labels, SETTINGS)
    assert 0 < c1 < c2 and [c1, c2] == natural_range(model, images, masks, labels, SETTINGS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_the_cls_token_and_all_tokens_look_at_in_each_block_is_seen_and_can_be_trained_through():
    encoder = ViT(16, 4, 1, 12, 2, 3)
    images = torch.rand(2, 1, 16, 16)
    maps = encoder.attention_maps(images)  # (B, depth, heads, T, T)
    with attention_seen(encoder) as seen:
        encoder(images)
    assert len(seen) == 4 and all(not m._forward_pre_hooks for m in encoder.modules())
    for block in range(2):
        torch.testing.assert_close(seen[2 * block], maps[:, block, :, 0])
        torch.testing.assert_close(seen[2 * block + 1], maps[:, block].mean(dim=2))
    seen[2].square().sum().backward()
    assert encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    with attention_seen(ResNet(1, 16)) as seen:
        assert seen == []
    for encoder, maps in (
        (ViT(16, 4, 1, 12, 2, 3, pool=SimPool(12)), 3),
        (ResNet(1, 16, pool=SimPool(16)), 1),
    ):
        with attention_seen(encoder) as seen:
            features = encoder(images)
        assert len(seen) == maps and seen[-1] is features.attention  # in place of what CLS looks at
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    with attention_seen(ViT(16, 4, 1, 12, 2, 3, pool=GAP())) as seen:  # the mean looks at all alike
        assert seen == []


def test_attention_to_the_background_costs_even_if_it_carries_no_relevance():
    """A token that draws attention off all others, with a value of 0, has no relevance; the loss sees it."""
    torch.manual_seed(0)
    model, mask = Classifier(ViT(16, 4, 1, 12, 1, 3), 1), torch.zeros(2, 1, 16, 16)
    mask[:, :, :, 4:] = 1
    losses = []
    for strength in (0.0, 30.0):  # of the first head's attention to the patch in the upper left
        with torch.no_grad():
            q = model.encoder.blocks[0].attn.qkv.bias[:4]
            q.fill_(strength)
            model.encoder.pos_embed.zero_()
            model.encoder.pos_embed[0, 1] = (
                model.encoder.blocks[0].attn.qkv.weight[12:16].sum(dim=0) * strength
            )
        losses.append(
            isnet_losses(model, torch.zeros(2, 1, 16, 16), mask, torch.ones(2, 1), SETTINGS)[0].sum()
        )
    assert losses[1] > losses[0] + 0.5


@pytest.mark.parametrize(
    "flags", ["--pool gap", "--pool simpool", "--registers 2", "--pool gap --registers 2"]
)
def test_isnet_trains_vits_of_every_pooling_and_with_registers(flags):
    args, _ = parse(f"--task classify --isnet 1 --backbone vit --depth 1 {flags}".split())
    torch.manual_seed(0)
    model = build_classifier(args, build_encoder(args, 1), 2, 1)
    images, masks, labels = torch.rand(2, 1, 64, 64), torch.zeros(2, 1, 64, 64), torch.eye(2)
    masks[..., 16:40, 16:40] = 1
    target = explained(labels, True, args.explain, torch.Generator())
    loss, heatmap, _ = isnet_losses(model, images, masks, target, args)
    loss.sum().backward()
    assert heatmap.shape == images.shape and model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_isnet_s_foreground_for_a_vit_is_made_of_whole_patches(name, monkeypatch):
    """A patch's embedding is linear: it can't leave out those of its pixels that lie in the background."""
    seen, real = [], classify.isnet_losses
    monkeypatch.setattr(classify, "isnet_losses", lambda *args: seen.append(args[2]) or real(*args))
    masks = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 3:6, 5] = True
    images, labels = torch.randint(256, masks.shape, dtype=torch.uint8), torch.tensor([[0.0], [1]] * 2)
    losses = objective(SETTINGS, Classifier(ENCODERS[name](), 1), images, masks, labels)
    losses(torch.arange(4), Generator().manual_seed(0))
    if name == "vit":
        masks[:, :, 0:8, 4:8] = True  # two patches of 4 x 4
    assert torch.equal(seen[0], masks.float())
