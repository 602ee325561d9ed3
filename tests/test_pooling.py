"""Pooling and self-supervision on the command line: what trains is measured, guided and handed on."""

import json

import pytest
import torch

import evaluate
import train
from common import pretrain
from common.checkpoint import build_encoder, load_model, load_run

TINY = "--train-images 32 --embed-dim 24 --depth 2 --num-heads 3 --batch-size 8 --epochs 2".split()


@pytest.fixture(autouse=True, scope="module")
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
        yield


def trained(out, *flags: str) -> tuple[dict, dict]:
    """The metrics and the weights of a run."""
    train.main([*TINY, *flags, "--out", str(out)])
    return json.loads((out / "metrics.json").read_text()), load_run(out)[1]["model"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain --prior none", "classify"])
@pytest.mark.parametrize(
    "pooling", ["vit --pool gap", "vit --pool simpool", "resnet --pool simpool", "resnet"]
)
def test_every_pooling_trains_with_and_without_labels_and_is_measured(pooling, task, tmp_path):
    metrics, _ = trained(tmp_path / "run", "--task", *task.split(), "--backbone", *pooling.split())
    assert 0 < metrics["attention_AP_heart"] < 1
    assert 0 <= metrics["knn_mAUC"] <= 1 and 0 <= metrics["linear_mAUC"] <= 1
    evaluate.main([str(tmp_path / "run"), "--only", "attention", "knn"])  # builds the same encoder again


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--pool simpool", "--backbone resnet --pool simpool", "--ssl relvit"])
def test_priors_guide_attention_whatever_pools_and_whatever_the_objective(how, tmp_path):
    flags = [*how.split(), "--epochs", "10", "--train-images", "48", "--lr", "5e-3"]
    free, _ = trained(tmp_path / "free", *flags, "--span-weight", "0")
    guided, _ = trained(tmp_path / "guided", *flags)
    assert guided["attention_mAP"] > free["attention_mAP"] + 0.2


def test_relvit_shows_its_tasks_beside_chance_and_a_classifier_starts_from_its_encoder(tmp_path, capsys):
    out, how = (
        tmp_path / "relvit",
        "--ssl relvit --prior none --mega-patches 3 --relations relations distances",
    )
    _, before = trained(out, *how.split())
    bar = capsys.readouterr().err
    assert "relations=" in bar and "distances=" in bar and "(chance " in bar and "angles" not in bar
    assert not before["encoder.pos_embed"].any()  # measured without positions
    argv = f"--task classify --train-images 16 --epochs 1 --lr 1e-9 --init {out} --out {tmp_path}/tuned"
    train.main(argv.split())
    after, name = load_run(tmp_path / "tuned")[1]["model"], "encoder.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(before[name], after[name])
    assert 0.15 < after["encoder.pos_embed"].std() < 0.25


def test_a_large_cell_holds_more_of_a_prior():
    args, _ = train.parse([*TINY, *"--ssl relvit --mega-patches 2 --span-weight 1".split()])
    relvit, seen = train.RelViT(build_encoder(args, 1), 24, (2, 2)), []
    relvit.register_forward_hook(lambda module, inputs, output: seen.append(output[2].attention))
    images, even = torch.randint(256, (4, 1, 64, 64)).byte(), torch.ones(4, 1, 64, 64)
    losses = pretrain.relations(args, relvit, images, lambda index: even)
    span = losses(torch.arange(4), torch.Generator().manual_seed(0))[1]["span_loss"]
    seeded = torch.Generator().manual_seed(0)
    boxes = pretrain.patch_views(images.float(), (2, 2), 8, seeded, mega=True)[1]
    area = boxes[:, None, :, 2:].prod(dim=3)
    prior, attention = (p / p.sum(dim=2, keepdim=True) for p in (area, seen[0][:, :1]))
    torch.testing.assert_close(span, (prior * (prior / attention).log()).sum(dim=2).mean().detach())
    assert prior.std() > 0.03


def test_a_classifier_that_learns_relations_beside_its_labels_is_used_without_them(tmp_path):
    how = "--task classify --backbone vit --relations relations positions"
    metrics, weights = trained(tmp_path / "joint", *how.split())
    assert {"classification", "relations", "positions", "auc_same"} <= set(metrics)
    assert any(name.startswith("relvit.heads") for name in weights)
    config, checkpoint = load_run(tmp_path / "joint")
    model = load_model(tmp_path / "joint", config, checkpoint)
    assert not any("relvit" in name for name in model.state_dict())
