"""Pooling and self-supervision on the command line, and the probes that measure them."""

import json

import pytest
import torch

import evaluate
from common import pretrain
import train
from common.checkpoint import build_encoder, load_model, load_run

TINY = "--train-images 32 --embed-dim 24 --depth 2 --num-heads 3 --batch-size 8 --epochs 2"
TINY = TINY.split()
SMALL = "--task classify --train-images 32 --embed-dim 16 --depth 1 --num-heads 2 --batch-size 8 --epochs 2"
SMALL = SMALL.split()


@pytest.fixture(autouse=True, scope="module")
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
        yield


POOLINGS = ["--backbone vit --pool gap", "--backbone vit --pool simpool", "--backbone resnet --pool simpool"]


@pytest.mark.parametrize("pooling", [*POOLINGS, "--backbone resnet"])
@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_every_pooling_trains_with_and_without_labels_and_is_measured(pooling, task, tmp_path):
    argv = [*TINY, "--task", task, *pooling.split()] + (["--prior", "none"] if task == "pretrain" else [])
    train.main([*argv, "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (
        0 < metrics["attention_AP_heart"] < 1
        and 0 <= metrics["knn_mAUC"] <= 1
        and 0 <= metrics["linear_mAUC"] <= 1
    )
    evaluate.main([str(tmp_path / "run"), "--only", "attention", "knn"])  # the same encoder is built again


@pytest.mark.parametrize("how", ["--pool simpool", "--backbone resnet --pool simpool", "--ssl relvit"])
def test_priors_guide_attention_whatever_pools_and_whatever_the_objective_is(how, tmp_path):
    argv = [*TINY, *how.split(), "--epochs", "10", "--train-images", "48", "--lr", "5e-3"]
    before, after = tmp_path / "before", tmp_path / "after"
    train.main([*argv, "--span-weight", "0", "--out", str(before)])
    train.main([*argv, "--out", str(after)])
    free, guided = (
        json.loads((out / "metrics.json").read_text())["attention_mAP"] for out in (before, after)
    )
    assert guided > free + 0.2


def test_relvit_shows_its_tasks_beside_chance_and_hands_its_encoder_on(tmp_path, capsys):
    out = tmp_path / "relvit"
    argv = [*TINY, "--ssl", "relvit", "--prior", "none", "--mega-patches", "3", "--out", str(out)]
    train.main([*argv, "--relations", "relations", "distances"])
    bar = capsys.readouterr().err
    assert "relations=" in bar and "distances=" in bar and "(chance " in bar and "angles" not in bar
    started = [
        "--task",
        "classify",
        "--train-images",
        "16",
        "--epochs",
        "1",
        "--lr",
        "1e-9",
        "--init",
        str(out),
    ]
    train.main([*started, "--out", str(tmp_path / "tuned")])
    before, after = (load_run(tmp_path / name)[1]["model"] for name in ("relvit", "tuned"))
    name = "encoder.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(before[name], after[name])


def test_upstream_the_encoder_is_measured_without_positions_and_a_classifier_gets_some(tmp_path):
    out = tmp_path / "relvit"
    train.main([*TINY, "--ssl", "relvit", "--prior", "none", "--out", str(out)])
    assert not load_run(out)[1]["model"]["encoder.pos_embed"].any()
    argv = ["--task", "classify", "--train-images", "16", "--epochs", "1", "--lr", "1e-9", "--init", str(out)]
    train.main([*argv, "--out", str(tmp_path / "tuned")])
    assert 0.15 < load_run(tmp_path / "tuned")[1]["model"]["encoder.pos_embed"].std() < 0.25


def test_a_large_cell_holds_more_of_a_prior():
    args, _ = train.parse([*TINY, *"--ssl relvit --mega-patches 2 --span-weight 1".split()])
    relvit = train.RelViT(build_encoder(args, 1), 24, (2, 2))
    seen = []
    relvit.register_forward_hook(lambda module, inputs, output: seen.append(output[2].attention))
    even = torch.ones(4, 1, 64, 64)
    losses = pretrain.relations(args, relvit, torch.randint(256, (4, 1, 64, 64)).byte(), lambda index: even)
    generator = torch.Generator().manual_seed(0)
    span = losses(torch.arange(4), generator)[1]["span_loss"]
    boxes = pretrain.patch_views(
        torch.rand(4, 1, 64, 64), (2, 2), 8, torch.Generator().manual_seed(0), mega=True
    )[1]
    area = boxes[:, None, :, 2:].prod(dim=3)
    prior, attention = area / area.sum(dim=2, keepdim=True), seen[0][:, :1]
    attention = attention / attention.sum(dim=2, keepdim=True)
    want = (prior * (prior / attention).log()).sum(dim=2).mean()
    torch.testing.assert_close(span, want.detach())
    assert prior.std() > 0.03


def test_a_classifier_that_learns_relations_beside_its_labels_is_used_without_them(tmp_path):
    out = tmp_path / "joint"
    train.main([*SMALL, "--backbone", "vit", "--relations", "relations", "positions", "--out", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"classification", "relations", "positions", "auc_same"} <= set(metrics)
    config, checkpoint = load_run(out)
    model = load_model(out, config, checkpoint)
    assert not any("relvit" in name for name in model.state_dict())
    assert any(name.startswith("relvit.heads") for name in checkpoint["model"])
