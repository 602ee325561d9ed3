"""What an encoder is good for is measured as it is said to be, on labels that are all there, or few."""

import numpy as np
import pytest
import torch
from torch import nn

from common import probe
from common.data import Data, load
from common.metrics import CannotMeasure
from vit import ViT


def test_neighbours_vote_with_weights_by_their_similarity():
    torch.manual_seed(0)
    x, queries = torch.randn(30, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    labels = torch.randint(2, (30, 2)).float()
    labels[::3, 1] = torch.nan  # a third of the images don't know the second finding
    votes = probe.knn_scores(x, labels, queries, k=7, temperature=0.1)
    for m, query in enumerate(queries):
        for k in range(2):
            near = sorted(
                (-float(torch.cosine_similarity(query, x[n], dim=0)), n)
                for n in range(30)
                if labels[n, k] >= 0
            )[:7]
            weights = np.array([np.exp(-minus / 0.1) for minus, _ in near])
            vote = sum(w * labels[n, k].item() for w, (_, n) in zip(weights, near)) / weights.sum()
            assert votes[m, k].item() == pytest.approx(vote)


def test_fewer_images_than_neighbours_all_vote():
    votes = probe.knn_scores(torch.eye(3), torch.tensor([[1.0], [0], [torch.nan]]), torch.eye(3)[:1])
    assert 0.99 < votes.item() <= 1
    unknown = torch.full((3, 1), torch.nan)
    assert probe.knn_scores(torch.eye(3), unknown, torch.eye(3)).isnan().all()


@pytest.mark.parametrize("one_class", [True, False])
def test_the_linear_layer_is_where_the_gradient_vanishes(one_class):
    torch.manual_seed(0)
    x, labels = torch.randn(60, 4, dtype=torch.float64), torch.eye(3)[torch.randint(3, (60,))]
    layer = probe.linear_layer(x, labels, 0.1, one_class).requires_grad_()
    loss = (
        probe.classification_loss(layer(x), labels.double(), one_class) + 0.05 * layer.weight.square().sum()
    )
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-5


def test_the_weight_decay_is_chosen_on_validation_images(monkeypatch):
    torch.manual_seed(0)
    features = {part: torch.randn(40, 6) for part in ("train", "val", "test")}
    labels = {part: torch.eye(2)[torch.randint(2, (40,))] for part in features}
    data = {
        p: Data(torch.zeros(40), None, torch.zeros(40, dtype=torch.bool), labels[p], [p], [], [])
        for p in features
    }
    monkeypatch.setattr(probe, "features_of", lambda encoder, images, heads: features[seen.pop(0)])

    def one_or_the_opposite(x, y, decay, one_class):
        layer = nn.Linear(6, 2).requires_grad_(False)
        layer.weight.copy_(torch.eye(2, 6) * (1 if decay == probe.DECAYS[2] else -1))
        layer.bias.zero_()
        return layer

    monkeypatch.setattr(probe, "linear_layer", one_or_the_opposite)
    for better in (1, -1):  # the labels of validation images decide, not those of test images
        x = (features["val"] - features["train"].mean(0)) * better
        data["val"] = data["val"]._replace(labels=torch.eye(2)[x[:, :2].argmax(dim=1)])
        seen = ["train", "val", "test"]
        found = probe.probe(None, data, "linear")
        z = (features["test"] - features["train"].mean(0)) / features["train"].std(0, correction=0)
        right = ((z[:, :2] * better).argmax(dim=1) == data["test"].labels.argmax(dim=1)).double().mean()
        assert found[1.0]["accuracy"] == [pytest.approx(float(right))]


def test_each_head_averages_the_patches_with_its_own_weights_cls_left_out():
    torch.manual_seed(0)
    encoder, images = ViT(8, 4, 1, 6, 1, 2).eval(), torch.randint(255, (3, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        patches, attention = encoder(probe.prepared(images))[1:]
    found = probe.features_of(encoder, images, heads=True)
    assert found.shape == (3, 2 * 6)
    for h in range(2):
        weights = attention[:, h] / attention[:, h].sum(dim=1, keepdim=True)
        mean = sum(weights[:, n, None] * patches[:, n] for n in range(4))
        torch.testing.assert_close(found[:, 6 * h : 6 * h + 6].float(), mean)


# Few labels


def test_a_share_of_the_labels_is_drawn_from_labelled_images_alike_for_every_encoder():
    labels = torch.zeros(200, 2)
    labels[::2] = torch.nan  # no label at all
    labels[1::4, 0] = torch.nan  # one of two is enough
    index = probe.drawn(labels, 0.1, draw=3)
    assert len(index) == 10 == len(index.unique()) and (index % 2 == 1).all()
    assert torch.equal(index, probe.drawn(labels, 0.1, draw=3))
    assert not torch.equal(index, probe.drawn(labels, 0.1, draw=4))
    assert set(probe.drawn(labels, 0.05, draw=3).tolist()) < set(index.tolist())  # more labels, not others
    assert len(probe.drawn(labels, 0.001, draw=0)) == 0 and len(probe.drawn(labels, 1.0, draw=0)) == 100


class Blobs(nn.Module):
    """An encoder whose features are the image's mean and noise."""

    embed_dim = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        features = images.flatten(1)
        pooled = torch.stack([features.mean(dim=1), features[:, 0]], dim=1) * self.scale
        attention = torch.full((len(images), 3, 1), 0.5)  # of three heads, to the only patch
        return type("Features", (), {"pooled": pooled, "patches": pooled[:, None], "attention": attention})


def bright_or_dark(n: int = 80) -> dict[str, Data]:
    torch.manual_seed(0)
    found = {}
    for part in ("train", "val", "test"):
        bright = torch.rand(n) < 0.5
        images = (torch.rand(n, 1, 4, 4) * 120 + 110 * bright[:, None, None, None]).to(torch.uint8)
        names = [f"{i}" for i in range(n)]
        found[part] = Data(
            images, None, torch.zeros(n, dtype=torch.bool), bright[:, None].float(), names, [], ["x"]
        )
    return found


@pytest.mark.parametrize("how", probe.PROBES)
def test_each_probe_sees_what_is_there_and_no_more_than_chance_where_labels_are_drawn_by_lot(how):
    parts = bright_or_dark()
    assert probe.probe(Blobs(), parts, how)[1.0]["mAUC"][0] > 0.97
    lot = {p: d._replace(labels=d.labels[torch.randperm(len(d.labels))]) for p, d in parts.items()}
    assert 0.3 < probe.probe(Blobs(), lot, how)[1.0]["mAUC"][0] < 0.7


@pytest.mark.parametrize("how", probe.PROBES)
def test_few_labels_are_measured_several_times_and_give_the_same_figures_again(how):
    parts = bright_or_dark()
    first, second = (probe.probe(Blobs(), parts, how, (0.1, 1.0)) for _ in range(2))
    assert first == second
    assert {share: len(v["mAUC"]) for share, v in first.items()} == {0.1: probe.DRAWS, 1.0: 1}


def test_fine_tuning_changes_a_copy_and_starts_alike_whatever_was_drawn_before():
    parts, encoder = bright_or_dark(20), ViT(4, 2, 1, 16, 1, 2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first = probe.probe(encoder, parts, "finetune")
    torch.rand(5)
    assert probe.probe(encoder, parts, "finetune") == first
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("how", probe.PROBES)
def test_one_positive_or_none_among_the_few_labels_is_no_crash(how):
    parts = bright_or_dark(12)
    for positives in (0, 1):
        labels = torch.zeros(12, 1)
        labels[:positives] = 1
        few = parts | {"train": parts["train"]._replace(labels=labels)}
        assert 0 <= probe.probe(Blobs(), few, how)[1.0]["mAUC"][0] <= 1


def test_without_labels_it_is_said_what_cannot_be_measured():
    parts, _, _ = load("phantom", 16, 0, 2)
    parts["val"] = parts["val"]._replace(labels=None)
    with pytest.raises(CannotMeasure, match="no val image has a label: linear can't be measured"):
        probe.probe(Blobs(), parts, "linear")


@pytest.mark.parametrize("how", probe.PROBES)
def test_a_finding_that_no_training_image_knows_does_not_count(how):
    parts = bright_or_dark()
    for part, data in parts.items():
        other = data.labels[torch.randperm(80)] if part != "train" else torch.full((80, 1), torch.nan)
        parts[part] = data._replace(labels=torch.cat([data.labels, other], dim=1))
    assert probe.probe(Blobs(), parts, how)[1.0]["mAUC"][0] > 0.97  # and not the mean with 0.5


def test_shares_of_less_than_two_images_are_left_out_and_a_single_label_is_said():
    parts = bright_or_dark(30)
    assert list(probe.probe(Blobs(), parts, "knn", (0.01, 0.05, 0.1, 1.0))) == [0.05, 0.1, 1.0]
    parts["train"].labels[1:] = torch.nan
    with pytest.raises(CannotMeasure, match="a single training image has a label: knn"):
        probe.probe(Blobs(), parts, "knn")


def test_neighbours_need_no_validation_images_but_a_weight_decay_does():
    parts = bright_or_dark()
    parts["val"] = parts["val"]._replace(labels=torch.ones(80, 1))
    assert probe.probe(Blobs(), parts, "knn")[1.0]["mAUC"][0] > 0.97
    with pytest.raises(CannotMeasure, match="no weight decay is best"):
        probe.probe(Blobs(), parts, "linear")
