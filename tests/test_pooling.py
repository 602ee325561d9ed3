"""Pooling and self-supervision on the command line: what trains is measured, guided and handed on."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, seeded, trained

import evaluate
import train
from common.checkpoint import DataSpec, load_run
from common.classify import Classifier, classification_loss
from common.config import parse
from common.data import prepared
from common.models import build_encoder, load_model
from relvit import RelViT
from vit import ViT

pytestmark = pytest.mark.usefixtures("few_test_images")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_run(out).checkpoint["model"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain --prior none", "classify"])
@pytest.mark.parametrize(
    "pooling", ["vit --pool gap", "vit --pool simpool", "resnet --pool simpool", "resnet"]
)
def test_every_pooling_trains_with_and_without_labels_and_is_measured(pooling, task, tmp_path):
    metrics = trained(tmp_path / "run", f"--task {task} --backbone {pooling}")
    assert 0 < metrics["attention_AP_heart"] < 1
    assert all(0 <= metrics[f"{how}_mAUC"] <= 1 for how in ("knn", "linear"))
    evaluate.main([str(tmp_path / "run"), "--only", "attention", "knn"])  # builds the same encoder again


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "--pool simpool", "--backbone resnet --pool simpool", "--ssl relvit"])
def test_priors_guide_attention_whatever_pools_and_whatever_the_objective(how, tmp_path):
    words = f"{how} --depth 2 --epochs 10 --train-images 48 --lr 5e-3"
    free, guided = (trained(tmp_path / weight, f"{words} --span-weight {weight}") for weight in ("0", "3"))
    assert guided["attention_mAP"] > free["attention_mAP"] + 0.2


def test_relvit_learns_tasks_shown_beside_chance_and_a_classifier_starts_from_its_encoder(tmp_path, capsys):
    words = "--ssl relvit --prior none --mega-patches 3 --relations relations distances"
    metrics = trained(tmp_path / "relvit", f"{words} --train-images 64 --epochs 8 --lr 5e-3")
    said, before = capsys.readouterr().out, weights(tmp_path / "relvit")
    assert f"reaches: relations {metrics['relations_test']:.3f} (0.111), distances" in said
    assert "a constant prediction reaches relations 0.111, distances" in said and "angles" not in said
    assert "relations 0." in said.split("epoch 1/8")[1] and metrics["relations"] > 0.111 + 0.1
    assert not before["encoder.pos_embed"].any()  # measured without positions
    argv = f"--task classify --train-images 16 --epochs 1 --lr 1e-9 --init {tmp_path}/relvit"
    trained(tmp_path / "tuned", tiny=argv.split())
    after, name = weights(tmp_path / "tuned"), "encoder.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(before[name], after[name])
    assert 0.15 < after["encoder.pos_embed"].std() < 0.25


def test_a_large_cell_holds_more_of_a_prior():
    config, _ = parse([*TINY, *"--ssl relvit --mega-patches 2 --span-weight 1".split()])
    relvit, seen = train.RelViT(build_encoder(config, 1), 24, (2, 2)), []
    relvit.register_forward_hook(lambda module, inputs, output: seen.append(output[2].attention))
    images, even = torch.randint(256, (4, 1, 64, 64)).byte(), torch.ones(4, 1, 64, 64)
    losses = train.relvit_objective(config, relvit, images, lambda index: (even, torch.ones(4)))
    span = losses(torch.arange(4), seeded(), 0, 1)[1]["span_loss"]
    boxes = train.patch_views(images.float(), (2, 2), 8, seeded(), mega=True)[1]
    area = boxes[:, None, :, 2:].prod(dim=3)
    prior, attention = (p / p.sum(dim=2, keepdim=True) for p in (area, seen[0][:, :1]))
    torch.testing.assert_close(span, (prior * (prior / attention).log()).sum(dim=2).mean().detach())
    assert prior.std() > 0.03


def test_a_classifier_that_learns_relations_beside_its_labels_is_used_without_them(tmp_path):
    metrics = trained(tmp_path / "joint", "--task classify --backbone vit --relations relations positions")
    assert {"classification", "relations", "positions", "auc_same"} <= set(metrics)
    assert any(name.startswith("relvit.heads") for name in weights(tmp_path / "joint"))
    model = load_model(tmp_path / "joint", load_run(tmp_path / "joint"))
    assert not any("relvit" in name for name in model.state_dict())


def test_in_order_a_joint_classifier_sees_its_images_as_they_are_and_else_shuffled():
    images, labels = torch.randint(256, (4, 1, 16, 16)).byte(), torch.tensor([[0.0], [1], [1], [0]])
    spec = DataSpec(1, (), False, "", None)
    flags = "--task classify --backbone vit --patch-size 4 --shift 0 --relations angles"
    encoder = ViT(16, 4, 1, 18, 1, 2)
    model = Classifier(encoder, 1)
    model.relvit = RelViT(encoder, 18, (4, 4), ["angles"])
    whole = classification_loss(model(prepared(images)), labels, False)
    for more, same in (("", False), ("--in-order", True)):
        config, _ = parse(f"{flags} {more}".split())
        losses = train.classifier_objective(config, model, images, None, labels, spec)
        found = losses(torch.arange(4), seeded(), 0, 1)[1]["classification"]
        assert torch.equal(found, whole.detach()) == same
