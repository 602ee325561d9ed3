"""Probes of features, with all labels or few; what is asked of a model is asked in evaluation mode."""

import copy

import pytest
import torch
from torch import nn

from common import probe
from common.classify import Classifier
from common.data import SPLITS, Data
from common.explain import attention_of, relevance_of, scores_of
from common.metrics import CannotMeasure
from isnet_lrp import log_odds
from lrp import relevance
from resnet import ResNet
from vit import ViT

NAN = torch.nan


def bright_or_dark(n: int = 80) -> dict[str, Data]:
    """Images whose brightness is their label."""
    torch.manual_seed(0)
    splits = {}
    for split in ("train", "val", "test"):
        bright = torch.rand(n) < 0.5
        images = (torch.rand(n, 1, 4, 4) * 120 + 110 * bright[:, None, None, None]).to(torch.uint8)
        splits[split] = Data(images, None, torch.zeros(n), bright[:, None].float(), [""] * n, [], ["x"])
    return splits


def encoder() -> ViT:
    torch.manual_seed(0)
    return ViT(4, 2, 1, 16, 1, 2)


def mean_auc(splits, how):
    return probe.probe(encoder(), splits, how)[1.0]["mAUC"][0]


def test_neighbours_vote_with_weights_by_similarity():
    x, queries = torch.randn(30, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    labels = torch.randint(2, (30, 2)).float()
    labels[::3, 1] = NAN  # a third of the images don't know the second finding
    votes = probe.knn_scores(x, labels, queries, k=7, temperature=0.1)
    for m, k in [(m, k) for m in range(4) for k in range(2)]:
        cosines = torch.cosine_similarity(queries[m], x)
        near = [n for n in cosines.argsort(descending=True).tolist() if not labels[n, k].isnan()][:7]
        weights = (cosines[near] / 0.1).exp()
        assert votes[m, k].item() == pytest.approx(((weights * labels[near, k]).sum() / weights.sum()).item())
    many = probe.knn_scores(x, labels, queries.repeat(300, 1), k=7, temperature=0.1)
    torch.testing.assert_close(many, votes.repeat(300, 1))
    few = probe.knn_scores(torch.eye(3), torch.tensor([[1.0, NAN], [0, NAN], [NAN, NAN]]), torch.eye(3)[:1])
    assert 0.99 < few[0, 0] <= 1 and few[0, 1].isnan()  # fewer images than neighbours, or none


@pytest.mark.parametrize("multiclass", [True, False])
def test_the_gradient_vanishes_at_the_linear_layer(multiclass):
    x, labels = torch.randn(60, 4, dtype=torch.float64), torch.eye(3)[torch.randint(3, (60,))]
    layer = probe.linear_layer(x, labels, 0.1, multiclass).requires_grad_()
    loss = probe.classification_loss(layer(x), labels.double(), multiclass)
    loss = loss + 0.05 * layer.weight.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, list(layer.parameters()))) < 1e-5


def test_the_weight_decay_is_best_on_validation_images_and_not_that_of_a_fit_that_diverged(monkeypatch):
    """Validation images are all of the class that argmax finds in NaN; training labels want another fit."""
    x = {split: 5 + 3 * torch.randn(40, 6) for split in ("train", "val")}
    x["val"][:, 0] += 99
    classes = {"train": (x["train"][:, 0] > x["train"][:, 1]).long(), "val": torch.zeros(40).long()}
    splits = {s: Data(None, None, None, torch.eye(2)[c], [], [], []) for s, c in classes.items()}

    def fitted(z, labels, decay, multiclass, steps):
        layer = nn.Linear(6, 2).requires_grad_(False)
        layer.weight.copy_(torch.eye(2, 6) * {0: torch.nan, 2: 1}.get(probe.DECAYS.index(decay), -1))
        layer.bias.zero_()
        return layer

    monkeypatch.setattr(probe, "linear_layer", fitted)
    z = (x["val"] - x["train"].mean(dim=0)) / x["train"].std(dim=0, correction=0)
    found = probe.best_layer(x, splits, torch.arange(40))(x["val"])
    torch.testing.assert_close(found, z[:, :2], rtol=1e-4, atol=1e-4)


def test_images_are_ranked_by_the_probability_of_a_class_not_by_its_logit():
    generator, features, splits = torch.Generator().manual_seed(0), {}, {}
    for split in SPLITS:
        y = torch.arange(300) % 3  # on a line: logits alone can't rank the middle class
        features[split] = 2.0 * y[:, None] + torch.randn(300, 1, generator=generator).double()
        images, masked = torch.zeros(300, 1, 8, 8, dtype=torch.uint8), torch.zeros(300, dtype=torch.bool)
        splits[split] = Data(images, None, masked, torch.eye(3)[y], [""] * 300, [], [*"abc"])
    (score,) = probe.probe(None, splits, "linear", features=features)[1.0]["mAUC"]
    assert score > 0.88  # 0.81 by logits


def test_each_head_averages_the_patches_with_its_own_weights_without_cls():
    model, images = encoder().eval(), bright_or_dark(3)["test"].images
    _, patches, attention = model(probe.prepared(images))
    expected = (attention / attention.sum(dim=2, keepdim=True)) @ patches  # (B, heads, D)
    torch.testing.assert_close(probe.features_of(model, images, heads=True).float(), expected.flatten(1))


@pytest.mark.parametrize("how", probe.PROBES)
def test_a_probe_finds_what_is_there_and_only_chance_with_shuffled_labels(how):
    splits = bright_or_dark()
    assert mean_auc(splits, how) > 0.97
    shuffled = {s: d._replace(labels=d.labels[torch.randperm(len(d.labels))]) for s, d in splits.items()}
    assert 0.3 < mean_auc(shuffled, how) < 0.7


def test_fine_tuning_trains_a_copy_and_depends_on_no_seed_but_its_own(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 10)
    splits, model, before = bright_or_dark(20), encoder(), encoder().state_dict()
    model.blocks[0].drop_path = 0.5
    x = {split: probe.features_of(model, data.images) for split, data in splits.items()}
    a, b, c = (probe.finetuned_scores(model, splits, x, torch.arange(20), seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_are_extracted_once_for_several_probes(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 4)
    splits, kept, real, extracted = bright_or_dark(), {}, probe.features_of, []
    alone = {how: probe.probe(encoder(), splits, how) for how in probe.PROBES}
    monkeypatch.setattr(probe, "features_of", lambda *a, heads: extracted.append(heads) or real(*a, heads))
    for how, found in alone.items():
        assert probe.probe(encoder(), splits, how, features=kept) == found
    assert extracted == [False] * 3 + [True] * 3


def test_labelled_images_are_drawn_alike_for_every_encoder_and_nested_by_fraction():
    labels = torch.zeros(200, 2)
    labels[::2] = NAN  # no label at all
    labels[1::4, 0] = NAN  # one of two is enough
    index = probe.draw_labelled(labels, 0.1, draw=3)
    assert len(index) == 10 == len(index.unique()) and (index % 2 == 1).all()
    assert torch.equal(index, probe.draw_labelled(labels, 0.1, draw=3))
    assert not torch.equal(index, probe.draw_labelled(labels, 0.1, draw=4))
    assert set(probe.draw_labelled(labels, 0.05, draw=3).tolist()) < set(index.tolist())
    assert len(probe.draw_labelled(labels, 1.0, draw=0)) == 100


def test_a_fraction_is_measured_by_several_draws(monkeypatch):
    monkeypatch.setattr(probe, "DRAWS", 2)
    found = probe.probe(encoder(), bright_or_dark(30), "linear", (0.01, 0.2, 1.0))
    assert {f: len(values["mAUC"]) for f, values in found.items()} == {0.2: 2, 1.0: 1}  # 0.01: no image


def test_fine_tuning_starts_from_the_best_linear_layer(monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 1)
    splits, model, index = bright_or_dark(20), encoder(), torch.arange(20)
    x = {split: probe.features_of(model, data.images) for split, data in splits.items()}
    start = probe.best_layer(x, splits, index)(x["test"]).float()
    tuned = probe.finetuned_scores(model, splits, x, index, 0)
    torch.testing.assert_close(tuned, start, rtol=0, atol=0.5 * float(start.std()))


def test_models_are_measured_in_evaluation_mode():
    model, images = Classifier(ResNet(1, 8), 2), torch.randint(256, (4, 1, 16, 16)).byte()
    before = copy.deepcopy(model.state_dict())
    for measure in (
        lambda: scores_of(model, images, True), lambda: relevance_of(model, images, True, {}),
        lambda: attention_of(model.encoder, images, -1), lambda: probe.features_of(model.encoder, images),
    ):  # fmt: skip
        model.train()
        measure()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_heatmap_is_of_the_first_finding_the_second_of_two_classes_or_the_likeliest():
    images, targets = torch.randint(256, (3, 1, 4, 4)).byte(), {
        (3, False): lambda z: z[:, 0], (2, True): lambda z: z[:, 1] - z[:, 0],
        (3, True): lambda z: log_odds(z, torch.full((3,), 2)),
    }  # fmt: skip
    for (K, multiclass), target in targets.items():
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, K))
        model[1].bias.data[-1] = 99  # the last is the likeliest
        expected, _ = relevance(model, probe.prepared(images), target)
        torch.testing.assert_close(relevance_of(model, images, multiclass, {}), expected)


@pytest.mark.parametrize("how", probe.PROBES)
def test_few_or_no_known_labels_do_not_crash_or_count(how, monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 30)
    splits = bright_or_dark(12)
    for positives in (0, 1):
        splits["train"].labels[:, 0] = torch.arange(12) < positives
        assert 0 <= mean_auc(splits, how) <= 1
    splits = bright_or_dark()  # and a finding that no training image knows
    for split, data in splits.items():
        other = NAN * data.labels if split == "train" else data.labels[torch.randperm(80)]
        splits[split] = data._replace(labels=torch.cat([data.labels, other], dim=1))
    assert mean_auc(splits, how) > 0.97  # not the mean with 0.5


def test_what_cannot_be_measured_is_said_in_one_line():
    splits = bright_or_dark()
    with pytest.raises(CannotMeasure, match="no val image has a label: linear can't be measured"):
        mean_auc(splits | {"val": splits["val"]._replace(labels=torch.zeros(80, 0))}, "linear")
    splits["val"] = splits["val"]._replace(labels=torch.ones(80, 1))
    assert mean_auc(splits, "knn") > 0.97  # which needs no validation images
    with pytest.raises(CannotMeasure, match="no weight decay can be chosen"):
        mean_auc(splits, "linear")
    splits["train"].labels[1:] = NAN
    with pytest.raises(CannotMeasure, match="knn can't be measured with fewer than 2 labelled"):
        mean_auc(splits, "knn")
