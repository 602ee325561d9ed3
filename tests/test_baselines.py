"""The methods that ISNet is compared with do what their papers say."""

import json

import pytest
import torch
from torch import nn

from common import baselines
import evaluate
import train
from common.models import Classifier, objective
from common.data import prepared
from resnet import ResNet
from vit import ViT

BATCH = 4


def classifier(kind: str = "resnet") -> Classifier:
    torch.manual_seed(0)
    encoder = ViT(16, 4, 1, 12, 2, 2) if kind == "vit" else ResNet(1, 16)
    return Classifier(encoder, 2).double().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    masks = torch.zeros(BATCH, 1, 16, 16, dtype=torch.float64)
    masks[:, :, 4:12, 4:12] = 1
    labels = torch.eye(2, dtype=torch.float64)[torch.tensor([0, 1, 1, 0])]
    return torch.randn(BATCH, 1, 16, 16, dtype=torch.float64), masks, labels


def test_an_attention_gate_pools_as_its_formula_says():
    torch.manual_seed(0)
    gate, x = baselines.AttentionGate(6), torch.randn(3, 5, 6)
    pooled, attention = gate(x)
    for b in range(3):
        g = x[b].mean(dim=0)
        scores = torch.stack([gate.w(torch.relu(gate.x(n) + gate.g(g)))[0] for n in x[b]])
        torch.testing.assert_close(attention[b], scores.softmax(dim=0))
        torch.testing.assert_close(pooled[b], sum(a * n for a, n in zip(scores.softmax(dim=0), x[b])))


def test_grad_cam_of_a_linear_readout_is_the_weighted_map():
    """Of the mean of the last block's input, the gradient is the label's weights, 1/N each."""
    model, (x, _, y) = classifier(), batch()
    model.encoder.blocks[-1] = nn.Identity()
    model.head = nn.Linear(8, 2).double()
    model.encoder.embed_dim = 8
    logits, A = baselines.grad_cam(model, x, y)
    maps = model.encoder(x).patches.transpose(1, 2).unflatten(2, A.shape[2:])  # (B, 8, h, w)
    weights = y @ model.head.weight  # (B, 8)
    want = torch.relu((weights[:, :, None, None] * maps).sum(dim=1, keepdim=True))
    torch.testing.assert_close(A, want / want.amax(dim=(2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, model(x))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_gradient_that_rrr_punishes_is_that_at_the_input_outside_the_mask(kind):
    model, (x, m, y) = classifier(kind), batch()
    _, penalty = baselines.rrr(model, x, m, y, True)
    step, total = 1e-5, torch.zeros(BATCH, dtype=torch.float64)
    with torch.no_grad():
        for i in range(16):
            for j in range(16):
                moved = torch.zeros_like(x)
                moved[:, 0, i, j] = step
                up, down = (model(x + s * moved).log_softmax(dim=1).sum(dim=1) for s in (1, -1))
                total += ((1 - m[:, 0, i, j]) * (up - down) / (2 * step)) ** 2
    torch.testing.assert_close(penalty, total, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("name", ["gain", "rrr"])
def test_penalties_of_gradients_lose_no_term_in_the_second_backward(kind, name):
    model, (x, m, y) = classifier(kind), batch()
    weight = model.head.weight if name == "rrr" else next(model.encoder.blocks[-1].parameters())

    def penalty() -> torch.Tensor:
        return baselines.PENALTIES[name](model, x, m, y, True)[1].sum()

    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        weight.data += sign * step * direction
        values.append(penalty().item())
        weight.data -= sign * step * direction
    assert (gradient * direction).sum().item() == pytest.approx(
        (values[0] - values[1]) / (2 * step), rel=1e-3
    )


def test_gain_wants_the_map_to_be_the_mask_and_nothing_left_beside_it(monkeypatch):
    model, (x, m, y) = classifier(), batch()
    share = torch.nn.functional.adaptive_avg_pool2d(m, (4, 4))
    for A, most in ((share, 1.0), (1 - share, 11.0)):
        monkeypatch.setattr(baselines, "grad_cam", lambda *args, A=A: (None, A))
        T = torch.sigmoid(10 * (torch.nn.functional.interpolate(A, size=(16, 16), mode="bilinear") - 0.5))
        left = (model(x * (1 - T)).softmax(dim=1) * y).sum(dim=1)
        want = left + 10 * (A - share).square().mean(dim=(1, 2, 3))
        found = baselines.gain(model, x, m, y, True)[1]
        torch.testing.assert_close(found, want)
        assert (found <= most).all()


def test_a_swapped_image_keeps_its_foreground_and_an_unmasked_one_everything():
    x, m, _ = (t.repeat(8, *[1] * (t.dim() - 1)) for t in batch())
    x = torch.randn_like(x)
    m[::4] = 0
    found = baselines.swapped(x, m, torch.Generator().manual_seed(0))
    assert torch.equal(found * m, x * m) and torch.equal(found[::4], x[::4])
    changed = (found != x).flatten(1).any(dim=1)
    assert changed[m.flatten(1).any(dim=1)].sum() > 20  # all of 24, but who met himself
    for image in found[changed]:  # the background is one other image's, and not a mixture
        same = (image == x) | (m[1] == 1)
        assert same.flatten(1).all(dim=1).any()


def test_in_use_the_pipeline_s_classifier_sees_nothing_outside_the_segmenter_s_mask():
    class Middle(nn.Module):
        def forward(self, images):
            logits = -torch.ones(len(images), 4, 4, dtype=images.dtype)
            logits[:, 1:3, 1:3] = 1
            return logits

    x, _, _ = batch()
    pipeline = baselines.Pipeline(classifier(), Middle())
    other = x.clone()
    other[:, :, :3] = other[:, :, 13:] = other[..., :3] = other[..., 13:] = 7.0
    torch.testing.assert_close(pipeline(other), pipeline(x))
    other[:, :, 8, 8] = 7.0
    assert (pipeline(other) - pipeline(x)).abs().max() > 1e-3


def test_in_training_it_sees_nothing_outside_the_true_mask_or_its_own_where_there_is_none():
    x, m, y = batch()
    m[0] = 0
    pipeline = baselines.Pipeline(classifier(), baselines.Segmenter(classifier().encoder).double())
    nn.init.zeros_(pipeline.segmenter.head.weight)
    nn.init.constant_(pipeline.segmenter.head.bias, 1.0)  # all is foreground
    other = torch.where(m == 1, x, x + 3.0)
    changed = (
        baselines.pipeline(pipeline, other, m, y, True)[0] - baselines.pipeline(pipeline, x, m, y, True)[0]
    )
    assert changed[0].abs().max() > 1e-3 and changed[1:].abs().max() < 1e-9


def test_the_segmenter_learns_the_share_of_the_mask_in_each_patch():
    logits, masks = torch.tensor([[[0.0, 2.0], [-2.0, 1.0]]]), torch.zeros(1, 1, 4, 4)
    masks[0, 0, :2, :2] = masks[0, 0, 0, 2] = 1  # shares 1, 1/4, 0, 0
    p = logits.sigmoid()[0]
    shares = torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    want = -(shares * p.log() + (1 - shares) * (1 - p).log()).mean()
    torch.testing.assert_close(baselines.overlap_loss(logits, masks), want[None])


@pytest.mark.parametrize("name", baselines.PENALTIES)
def test_an_image_without_a_mask_has_no_penalty(name):
    args, _ = train.parse(["--task", "classify", "--baseline", name])
    torch.manual_seed(0)
    model = train.build_classifier(args, ResNet(1, 16), 2, 1)
    images = torch.randint(255, (4, 1, 16, 16), dtype=torch.uint8)
    masks, labels = torch.zeros(4, 1, 16, 16, dtype=torch.bool), torch.eye(2)[[0, 1, 0, 1]]
    for known in (0, 1):
        masks[:known, :, 4:12, 4:12] = True
        losses = objective(args, model, images, masks, labels)
        _, logged = losses(torch.arange(4), torch.Generator().manual_seed(0))
        assert (logged[name] > 0) == bool(known)


def trained_on(flags: str, model: nn.Module) -> tuple[torch.Tensor, dict, torch.Tensor, torch.Tensor]:
    """Loss and figures of a step of a baseline on random images, and these with their masks."""
    args, _ = train.parse(["--task", "classify", *flags.split()])
    images = torch.randint(255, (8, 1, 16, 16), dtype=torch.uint8)
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.bool)
    masks[:, :, 4:12, 4:12] = True
    losses = objective(args, model, images, masks, torch.eye(2)[torch.arange(8) % 2])
    return *losses(torch.arange(8), torch.Generator().manual_seed(0)), images, masks


@pytest.mark.parametrize("name", baselines.PENALTIES)
def test_a_baseline_s_loss_is_the_classification_s_and_its_weight_times_its_penalty(name):
    args, _ = train.parse(["--task", "classify", "--baseline", name])
    torch.manual_seed(0)
    model = train.build_classifier(args, ResNet(1, 16), 2, 1)
    loss, logged, _, _ = trained_on(f"--baseline {name} --baseline-weight 7", model)
    assert logged[name] > 0
    torch.testing.assert_close(loss.detach(), logged["classification"] + 7 * logged[name])
    loss.backward()
    assert model.encoder.conv1.weight.grad.abs().sum() > 0


def test_with_swapped_backgrounds_a_step_sees_each_foreground_before_another_background():
    seen = []

    class Looking(Classifier):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    _, _, images, masks = trained_on("--baseline swap", Looking(ResNet(1, 16), 2))
    x, own = seen[0], prepared(images)
    assert torch.equal(x[masks], own[masks])
    assert ((x == own) | masks).flatten(1).all(dim=1).sum() <= 2  # a few met themselves


def test_multitask_learning_teaches_the_encoder_where_the_mask_is():
    """By gradients that reach it, toward logits that are high in the mask, not in its mirror image."""
    torch.manual_seed(0)
    args, _ = train.parse(["--task", "classify", "--baseline", "multitask"])
    model = train.build_classifier(args, ResNet(1, 16), 2, 1)
    x, m, y = (t.float() for t in batch())
    m = torch.zeros_like(m)
    m[:, :, :8, :8] = 1
    penalty = baselines.multitask(model, x, m, y, True)[1].sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(penalty, model.encoder.blocks[-1].conv2.weight))
    found = []
    del model.segmenter  # in its place, one that finds the mask, or its mirror images
    for corner in (m, m.flip(2), m.flip(3)):
        share = torch.nn.functional.adaptive_avg_pool2d(corner, model.encoder.grid(x))
        model.segmenter = lambda patches, s=share: (20 * s - 10).flatten(2).transpose(1, 2)
        found.append(baselines.multitask(model, x, m, y, True)[1].mean())
    assert found[0] < 0.01 < min(found[1:])


def test_presence_and_absence_of_a_finding_share_its_probability():
    logits = torch.randn(3, 2, dtype=torch.float64)
    p = baselines.log_probabilities(logits, one_class=False).exp()  # (3, 2, 2)
    torch.testing.assert_close(p[..., 0], logits.sigmoid())
    torch.testing.assert_close(p.sum(dim=2), torch.ones(3, 2, dtype=torch.float64))
    classes = baselines.log_probabilities(logits, one_class=True).exp()
    torch.testing.assert_close(classes[..., 0], logits.softmax(dim=1))


def test_grad_cam_of_a_vit_is_made_of_its_patches_row_by_row_without_the_cls_token():
    model, (x, _, y) = classifier("vit"), batch()
    maps = []
    model.encoder.blocks[-1].register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    _, A = baselines.grad_cam(model, x, y)
    score = (model(x) * y).sum()
    tokens = maps[-1]
    with baselines.sdpa_kernel(baselines.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(score, tokens)
    weights = gradient[:, 1:].mean(dim=1, keepdim=True)  # (B, 1, D)
    want = torch.relu((weights * tokens[:, 1:]).sum(dim=2)).unflatten(1, (4, 4))[:, None]
    torch.testing.assert_close(A, want / want.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6))


@pytest.mark.parametrize("flags", ["multitask", "gated", "pipeline", "gated --backbone vit"])
def test_evaluate_builds_the_same_model_again(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
    argv = "--task classify --marker 1 --train-images 32 --embed-dim 16 --batch-size 16 --epochs 1"
    argv = [*argv.split(), "--baseline", *flags.split(), "--out", str(tmp_path / "run")]
    train.main([*argv])
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (tmp_path / "run" / "metrics.json").unlink()
    evaluate.main([str(tmp_path / "run"), "--only", "bias"])
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert after == {name: before[name] for name in after} and "auc_flipped" in after


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--baseline gain --isnet 1", "--baseline gain stands alone"),
        ("--baseline gated --masks prior", "--masks does nothing without"),
        ("--baseline swap --baseline-weight 2", "--baseline-weight does nothing without"),
    ],
)
def test_baselines_that_cannot_be_are_refused(flags, line, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--task", "classify", *flags.split(), "--out", str(tmp_path / "run")])
    assert line in capsys.readouterr().err
