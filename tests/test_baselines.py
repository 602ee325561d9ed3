"""The methods that ISNet is compared with do what their papers say; hospitals and exchanged backgrounds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded, slope_error, with_statistics_of
from torch import nn

from common import baselines
from common.backgrounds import exchanged, without_foreground
from common.bias import measure_backgrounds, measure_bias
from common.checkpoint import DataSpec, Run
from common.classify import Classifier
from common.config import parse
from common.data import SPLITS, Data
from common.hospitals import HOSPITALS, mixed, taken_at
from common.measure import report
from common.metrics import CannotMeasure
from common.models import build_classifier, build_encoder, load_model
from common.phantom import phantom
from common.splits import load
from resnet import ResNet
from vit import ViT


def classifier(kind: str = "resnet") -> Classifier:
    torch.manual_seed(0)
    return Classifier(ViT(16, 4, 1, 12, 2, 2) if kind == "vit" else ResNet(1, 16), 2).double().eval()


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, masks of the middle, and classes."""
    torch.manual_seed(1)
    masks = F.pad(torch.ones(n, 1, 8, 8).double(), [4] * 4)
    labels = torch.eye(2).double()[torch.tensor([0, 1, 1, 0] * (n // 4))]
    return torch.randn(n, 1, 16, 16, dtype=torch.float64), masks, labels


def test_an_attention_gate_pools_as_its_formula_says():
    """Equation (1)."""
    gate, x = baselines.AttentionGate(6), torch.randn(3, 5, 6)
    pooled, attention = gate(x)
    for b in range(3):
        g = x[b].mean(dim=0)
        a = torch.stack([gate.w(torch.relu(gate.x(n) + gate.g(g)))[0] for n in x[b]]).softmax(dim=0)
        torch.testing.assert_close((attention[b], pooled[b]), (a, sum(w * n for w, n in zip(a, x[b]))))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_grad_cam_weighs_the_last_block_s_maps_by_their_mean_gradient(kind):
    """Equation (2). Of a convnet its output; of a ViT its input's patches, by rows, without the CLS token."""
    model, (x, _, y), seen = classifier(kind), batch(), []
    model.encoder.blocks[-1].register_forward_hook(lambda *called: seen.append(called))
    A = baselines.grad_cam(model, x, y)
    with baselines.sdpa_kernel(baselines.SDPBackend.MATH):
        output = model(x)
    maps = seen[-1][2] if kind == "resnet" else seen[-1][1][0]
    (gradient,) = torch.autograd.grad((output * y).sum(), maps)
    if kind == "resnet":
        maps, gradient = (t.flatten(2).mT for t in (maps, gradient))
    maps, weights = maps[:, -16:], gradient[:, -16:].mean(dim=1, keepdim=True)  # (B, N, D), (B, 1, D)
    expected = torch.relu((weights * maps).sum(dim=2)).unflatten(1, A.shape[2:])[:, None]
    expected = expected / expected.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
    torch.testing.assert_close(A, expected)


def test_gain_adds_the_map_s_distance_from_the_mask_and_the_label_s_probability_without_the_map(monkeypatch):
    model, (x, m, y) = classifier(), batch()
    mask = F.adaptive_avg_pool2d(m, (4, 4))
    for A in (mask, 1 - mask):
        monkeypatch.setattr(baselines, "grad_cam", lambda *args, A=A: A)
        T = torch.sigmoid(10 * (F.interpolate(A, size=(16, 16), mode="bilinear") - 0.5))
        left = (model(x * (1 - T)).softmax(dim=1) * y).sum(dim=1)
        penalty = baselines.gain(model, x, m, y, True)[1]
        torch.testing.assert_close(penalty, left + 10 * (A - mask).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kind, training", [("resnet", False), ("resnet", True), ("vit", False)])
def test_rrr_punishes_the_gradient_at_the_input_outside_the_mask(kind, training):
    """Equation (3). In training the batch's statistics are constants, else an image would see others."""
    model, (x, m, y) = classifier(kind).train(training), batch()
    _, penalty = baselines.rrr(model, x, m, y, True)
    twin = with_statistics_of(x, model) if training else model
    (gradient,) = torch.autograd.grad(twin(x.requires_grad_()).log_softmax(dim=1).sum(), x)
    expected = gradient.masked_fill(m > 0, 0).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["gain", "rrr"])
def test_a_penalty_in_training_leaves_no_trace_in_running_statistics(name):
    model, once, (x, m, y) = classifier().train(), classifier().train(), batch()
    once(x)
    baselines.PENALTIES[name](model, x, m, y, True)
    for (key, running), expected in zip(model.state_dict().items(), once.state_dict().values()):
        assert "running" not in key or torch.equal(running, expected)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("name", ["gain", "rrr"])
def test_the_second_backward_through_gradients_agrees_with_finite_differences(kind, name):
    model, (x, m, y) = classifier(kind), batch()
    weight = model.head.weight if name == "rrr" else next(model.encoder.blocks[-1].parameters())
    assert slope_error(lambda: baselines.PENALTIES[name](model, x, m, y, True)[1].sum(), [weight]) < 1e-4


def test_a_swapped_image_keeps_its_foreground_before_the_filled_background_of_one_other_image():
    m = torch.zeros(24, 1, 16, 16)
    for i in range(24):
        m[i, :, i % 8 : i % 8 + 6, 2 + i % 8 : 8 + i % 8] = i % 4 > 0
    x = torch.arange(24.0).view(24, 1, 1, 1) + 100 * m
    found = baselines.swapped(x, m, seeded())
    assert torch.equal(found * (found >= 100), x * m)  # no foreground but its own
    for i in range(24):  # also where nothing is in the foreground
        (other,) = found[i][m[i] == 0].unique().tolist()
        assert other != i
    some = baselines.swapped(x, m, seeded(), share=0.2)
    assert 1 <= (some != x).flatten(1).any(dim=1).sum() <= 10  # a fifth of 24


def test_with_a_margin_an_image_keeps_no_pixel_near_the_border_of_its_mask():
    m, x = torch.zeros(2, 2, 1, 12, 12)
    m[0, :, 2:10, 2:10], m[1, :, 2:, 2:10] = 1, 1  # the second reaches the image's lower border
    x[0], x[1] = 1, 2
    kept = (baselines.swapped(x, m, seeded(), margin=2) == x)[:, 0]
    assert kept[0].nonzero().unique().tolist() == [4, 5, 6, 7] and kept[1].sum() == 4 * 8
    assert kept[1, 11, 4:8].all()  # there nothing is next to it
    m[0] *= 0
    m[0, :, :6, :6], m[0, :, 9:11] = 1, 1  # a thin part beside another
    kept = (baselines.swapped(x, m, torch.Generator(), margin=2) == x)[0, 0]
    assert kept[:4, :4].all() and kept[9:11].all() and kept.sum() == 16 + 24
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    rhomb = torch.stack([(x - 20).abs() + (y - 20).abs() < 15] * 2)[:, None].float()
    core = 1 - baselines.grown(1 - rhomb, 2)  # a tip is no thin part
    assert torch.equal(baselines.swapped(rhomb, rhomb, torch.Generator(), 1, 2), core)


def test_in_use_the_pipeline_s_classifier_sees_nothing_outside_the_segmenter_s_mask():
    (x, _, _), middle = batch(), lambda x: F.pad(torch.ones(len(x), 2, 2).to(x), [1] * 4, value=-1)
    pipeline, other = baselines.Pipeline(classifier(), middle), x.clone()
    other[:, :, :3] = other[:, :, 13:] = other[..., :3] = other[..., 13:] = 7.0
    torch.testing.assert_close(pipeline(other), pipeline(x))
    other[:, :, 8, 8] = 7.0
    assert (pipeline(other) - pipeline(x)).abs().max() > 1e-3


def test_in_training_it_sees_the_foreground_of_the_given_mask_or_of_its_own_without_one():
    x, m, y = batch()
    m[0] = 0
    pipeline = baselines.Pipeline(classifier(), baselines.Segmenter(classifier().encoder).double())
    nn.init.zeros_(pipeline.segmenter.head.weight)
    nn.init.ones_(pipeline.segmenter.head.bias)  # all is foreground
    moved = [baselines.pipeline(pipeline, x + d * (1 - m), m, y, True)[0] for d in (0, 3)]
    change = (moved[1] - moved[0]).abs()
    assert change[0].max() > 1e-3 and change[1:].max() < 1e-9


def test_the_segmenter_learns_the_masked_fraction_of_each_patch():
    logits, masks = torch.tensor([[[0.0, 2.0], [-2.0, 1.0]]]), torch.zeros(1, 1, 4, 4)
    masks[0, 0, :2, :2] = masks[0, 0, 0, 2] = 1
    p, fractions = logits.sigmoid()[0], torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    expected = -(fractions * p.log() + (1 - fractions) * (1 - p).log()).mean()
    torch.testing.assert_close(baselines.overlap_loss(logits, masks), expected[None])


def test_multitask_learning_teaches_the_encoder_where_the_mask_is():
    """The penalty is small for logits that are high in the mask, not in its mirror images."""
    model, (x, _, y), found = classifier(), batch(), []
    m = F.pad(torch.ones(4, 1, 8, 8).double(), (0, 8, 0, 8))
    for corner in (m, m.flip(2), m.flip(3)):
        logits = 20 * F.adaptive_avg_pool2d(corner, model.encoder.grid(x)) - 10
        model.segmenter = lambda patches, logits=logits: logits.flatten(2).mT
        found.append(baselines.multitask(model, x, m, y, True)[1].mean())
    assert found[0] < 0.01 < min(found[1:])


def test_a_hospital_moves_image_and_masks_together_draws_the_same_for_a_seed_and_is_mixed_image_by_image():
    images, masks, _ = phantom(40, seed=1)
    coded = (masks[:, 2:] * 255).to(torch.uint8)  # the heart alone, as an image
    for name in HOSPITALS:
        moved, where = taken_at(name, coded, masks, seed=3)
        heart = where[:, 2:]
        inside, outside = ((moved.float() * m).sum() / m.sum() for m in (heart, ~heart))
        assert inside > 5 * outside
        assert not torch.equal(where, masks) and torch.equal(taken_at(name, coded, masks, seed=3)[0], moved)
    a, b, c = (taken_at(name, images, masks, 3) for name in "ABC")
    assert c[1].sum() < a[1].sum()  # smaller on the image
    for found, of_a, of_b in zip(mixed(torch.arange(40) % 2 == 0, images, masks, 3), a, b):
        assert torch.equal(found[::2], of_a[::2]) and torch.equal(found[1::2], of_b[1::2])


def test_positives_come_from_hospital_a_and_flipped_ones_from_b(few_test_images):
    splits, *_ = load("phantom", 64, 0, 30, marker=1.0, marker_kind="hospitals", findings=["enlarged heart"])
    assert set(splits) == {*SPLITS, "flipped", "hospital A", "hospital B", "hospital C"}
    corners = {split: data.images[:, 0, :8, -8:] for split, data in splits.items()}  # where A has an L
    from_a = {split: corner.amax(dim=(1, 2)) == 255 for split, corner in corners.items()}
    for split, of_a in {"train": True, "test": True, "flipped": False}.items():
        assert torch.equal(from_a[split], (splits[split].labels[:, 1] == 1) == of_a)
    assert from_a["hospital A"].all() and not from_a["hospital B"].any()
    assert torch.equal(splits["hospital C"].labels, splits["test"].labels)


def striped(n: int) -> Data:
    """Images of 16 px whose background is 50 or 150 by the label, and a square object of 250 or 0."""
    y, m = torch.eye(2)[torch.arange(n) % 2], torch.zeros(n, 1, 16, 16, dtype=torch.bool)
    m[:, :, 4:8, 4:8] = True
    y1 = y[:, 1, None, None, None]
    x = torch.where(m, 250 * y1, 50 + 100 * y1).to(torch.uint8)
    return Data(x, m, torch.ones(n).bool(), y, [str(i) for i in range(n)], ["o"], ["a", "b"])


def test_a_hole_is_filled_with_the_image_s_background_or_black_as_its_kind_says():
    data = striped(40)
    x, m = data.images.float(), data.masks.float()
    kinds = exchanged(x, m, data.labels[:, 0], torch.Generator())
    assert torch.equal(kinds["only background"], x[:, :, :1, :1].expand_as(x))
    assert not (kinds["no foreground"] * m).any()
    large = torch.zeros_like(m)
    large[:, :, 1:15, 1:15] = 1
    assert set(without_foreground(x, large).unique().tolist()) == {50, 150}


READS = {"ground": (0, 0, (100, 100, 50, 100, 100)), "object": (5, 1, (100, 100, 100, 50, 50))}


@pytest.mark.parametrize("reads", READS)
def test_exchanged_backgrounds_tell_what_a_model_reads(reads):
    (pixel, level, aucs), data, reader = READS[reads], striped(400), nn.Linear(1, 1)
    reader.forward = lambda x: (x[:, :1, pixel, pixel] > level) * torch.tensor([-1.0, 1.0])
    table, _ = measure_backgrounds(reader, {"test": data, "val": data}, True)
    assert [100 * row["AUC"] for row in table.values()] == pytest.approx(aucs, abs=6)


def test_no_image_keeps_its_own_background_and_one_whose_label_no_other_has_is_left_out(monkeypatch):
    n = 5
    x, m = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 4, 4).float(), torch.zeros(n, 1, 4, 4)
    for seed in range(20):
        kinds = exchanged(x, m, torch.tensor([0, 1, 0, 1, 0]), torch.Generator().manual_seed(seed))
        same, rand = (kinds[kind][:, 0, 0, 0].long() for kind in ("mixed same", "mixed rand"))
        assert sorted(same.tolist()) == sorted(rand.tolist()) == list(range(n))
        assert not (same == torch.arange(n)).any() and not (rand == torch.arange(n)).any()
        assert torch.equal(same % 2, torch.arange(n) % 2)
    data = striped(5)
    data.labels[4] = torch.nan
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    model.encoder = None
    found = report(model, {"test": data, "val": data}, ["backgrounds"], multiclass=True)
    assert "mixed same and rand: on 4 of 5 images, whose labels others share" in found.notes
    with pytest.raises(CannotMeasure, match="no two test images with masks have equal labels"):
        measure_backgrounds(model, {"test": striped(2), "val": data}, True)
    sizes = lambda model, val, kinds, _: {k: len(d.names) for k, d in kinds.items()}  # noqa: E731
    monkeypatch.setattr("common.bias.classified", sizes)
    sizes, paired = measure_backgrounds(model, {"test": data, "val": data}, True)
    assert paired == 4 and list(sizes.values()) == [5, 4, 4, 5, 5]


def test_of_a_pipeline_the_segmenter_is_measured_and_its_encoder_is_shown_no_whole_image():
    data, classifier = striped(8), nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    classifier.encoder = None
    model = baselines.Pipeline(classifier, nn.Identity())
    model.foreground = lambda images: data.masks.flip(0) & (torch.arange(16) < 6)
    table = measure_bias(model, {"test": data, "val": data}, True, {"epsilon": 0.1})
    assert table["same"]["segmentation Dice"] == pytest.approx(2 / 3)  # half of each mask
    found = report(model, {"test": data, "val": data}, ["attention", "knn"], multiclass=True)
    assert found.notes == [f"{what} is only for encoders of whole images" for what in ("attention", "knn")]


@pytest.mark.parametrize("flags", ["multitask", "pipeline", "gated --backbone vit"])
def test_a_baseline_s_model_is_loaded_as_it_was_built(flags, tmp_path):
    config = parse(f"--task classify --embed-dim 16 --baseline {flags}".split())[0]
    model = build_classifier(config, build_encoder(config, 1), 2, 1)
    run = Run(config, DataSpec(1, ("no", "yes"), True, ""), {}, {"model": model.state_dict()})
    assert [*load_model(tmp_path, run).state_dict()] == [*model.state_dict()]
    assert ("gated" in flags) == any("pool" in name for name in model.state_dict())
