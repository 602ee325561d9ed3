"""Published weights become our ViT with the same features, whatever their release calls them."""

import argparse
from pathlib import Path

import pytest
import torch
from conftest import Evil, metrics_of, noise, save

import evaluate
import train
from common.checkpoint import load_run
from common.models import start_from
from common.weights import BIAS, DEVIATION, FIRST, MEAN, exported, fit, read_weights, sizes
from simpool import SimPool
from vit import ViT, resized


def published_names(**options) -> dict[str, torch.Tensor]:
    """The state dict of a ViT-Ti/16 under the names of the DINO release, with random weights, one block."""
    return ViT(224, in_chans=3, **{"embed_dim": 192, "depth": 1, "num_heads": 3, **options}).state_dict()


def loaded(tmp_path, content, img_size=224, in_chans=3):
    """(our ViT, the settings that build it, what was left out) of a file with this content."""
    torch.save(content, tmp_path / "weights.pth")
    weights, left = read_weights(tmp_path / "weights.pth")
    found = sizes(weights)
    pool = SimPool(found["embed_dim"], 1.25) if found["pool"] == "simpool" else None
    keys = ("patch_size", "embed_dim", "depth", "num_heads", "registers")
    vit = ViT(img_size, in_chans=in_chans, pool=pool, **{k: found[k] for k in keys}).eval()
    fit(weights, vit)
    return vit, found, left


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Images normalised by ImageNet's mean and deviation as ours are: (x - 1/2) / (1/4)."""
    return (images * DEVIATION + MEAN - 0.5) / 0.25


def test_of_a_whole_dino_training_the_teacher_s_backbone_is_taken(tmp_path):
    state = {f"module.backbone.{k}": v for k, v in published_names(depth=12).items()}
    teacher = {k: v + 1 for k, v in state.items()} | {"module.head.mlp.0.weight": torch.ones(1)}
    content = {"student": state, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(patch_size=16)}
    vit, found, left = loaded(tmp_path, content)
    expected = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    assert (expected | {"pool": "cls", "registers": 0}).items() <= found.items() and left == ["head"]
    assert torch.equal(vit.blocks[11].mlp.fc2.weight, teacher["module.backbone.blocks.11.mlp.fc2.weight"])


def test_layer_scale_is_folded_into_the_last_matrices(tmp_path):
    state, images = published_names(depth=2), torch.randn(1, 3, 224, 224)
    plain = ViT(224, 16, 3, 192, 2, 3).eval()
    plain.load_state_dict(state)
    x = plain.embed(images)
    for i, block in enumerate(plain.blocks):
        first, second = torch.rand(2, 192)
        state |= {f"blocks.{i}.ls1.gamma": first, f"blocks.{i}.ls2.gamma": second}
        x = x + first * block.attn(block.norm1(x))[0]
        x = x + second * block.mlp(block.norm2(x))
    pooled = loaded(tmp_path, state)[0](normalised(images)).pooled
    torch.testing.assert_close(pooled, plain.norm(x)[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["reg_token", "register_tokens", "dist_token"])
def test_tokens_without_position_become_registers(name, tmp_path):
    state, images = published_names(), torch.randn(1, 3, 224, 224)
    pos = state["pos_embed"] = torch.randn(1, 197, 192) * 0.02
    plain, extra = ViT(224, 16, 3, 192, 1, 3).eval(), torch.randn(1, 1 if name == "dist_token" else 4, 192)
    plain.load_state_dict(state)
    tokens, added = plain.embed(images), extra
    if name == "dist_token":  # DeiT's has a position of its own, the second
        own = torch.randn(1, 1, 192)
        pos, added = torch.cat([pos[:, :1], own, pos[:, 1:]], dim=1), extra + own
    tokens, _ = plain.blocks[0](torch.cat([tokens[:, :1], added, tokens[:, 1:]], dim=1))
    vit, found, _ = loaded(tmp_path, state | {name: extra, "pos_embed": pos})
    ours = vit(normalised(images))
    assert found["registers"] == extra.shape[1]
    assert ours.patches.shape == (1, 196, 192) and ours.attention.shape == (1, 3, 196)
    torch.testing.assert_close(ours.pooled, plain.norm(tokens)[:, 0], rtol=1e-3, atol=1e-4)


def test_other_positions_grey_images_and_other_sizes_fit(tmp_path):
    state = published_names()
    colour, _, _ = loaded(tmp_path, state, img_size=64)
    grey, _, _ = loaded(tmp_path, state, img_size=64, in_chans=1)
    image = torch.rand(2, 1, 64, 64)
    pooled = colour(image.expand(-1, 3, -1, -1)).pooled
    torch.testing.assert_close(pooled, grey(image).pooled, rtol=1e-3, atol=1e-4)
    native, _, _ = loaded(tmp_path, state)
    torch.testing.assert_close(colour.pos_embed, resized(native.pos_embed, native.native_grid, (4, 4)))
    state["pos_embed"] = torch.randn(1, 196, 192)  # none for CLS
    vit, _, _ = loaded(tmp_path, state)
    assert torch.equal(vit.pos_embed[:, 1:], state["pos_embed"]) and not vit.pos_embed[:, 0].any()


def test_simpool_s_release_is_known(tmp_path):
    ours = ViT(224, 16, 3, 192, 1, 3, pool=SimPool(192, 1.25))
    state = {k.replace("pool.", "simpool."): v for k, v in ours.state_dict().items()}
    vit, found, left = loaded(tmp_path, {"teacher": state | {"simpool.beta": torch.zeros(1)}})
    assert found["pool"] == "simpool" and left == []
    assert torch.equal(vit.pool.wq.weight, ours.pool.wq.weight)


def test_other_heads_than_the_release_s_cause_a_warning_as_their_weights_would_fit(tmp_path, capsys):
    torch.save(published_names(), tmp_path / "vit.pth")
    for heads, warned in ((3, False), (6, True)):
        start_from(tmp_path / "vit.pth", ViT(224, 16, 3, 192, 1, heads))
        assert ("releases of this width have 3 heads" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("registers", [0, 4])
def test_exported_weights_have_the_published_names_and_come_back_the_same(registers, tmp_path):
    vit = ViT(32, 8, 3, 192, 1, 3, registers=registers).eval()
    out, images = exported(vit), torch.rand(1, 3, 32, 32)
    expected = vit((images - 0.5) / 0.25).pooled
    again, found, left = loaded(tmp_path, out, img_size=32)
    torch.testing.assert_close(again((images - 0.5) / 0.25).pooled, expected, rtol=1e-3, atol=1e-4)
    assert left == [] and found["registers"] == registers
    if registers:  # as timm has them
        assert out["pos_embed"].shape == (1, 16, 192) and out["reg_token"].shape == (1, 4, 192)
        return
    assert list(out) == list(published_names())
    assert "simpool.wq.weight" in exported(ViT(16, 8, 3, 32, 1, 2, pool=SimPool(32, 1.25)))
    assert out[BIAS].dtype == torch.float32 and out[FIRST].shape == (192, 3, 8, 8)
    theirs = ViT(32, 8, 3, 192, 1, 3).eval()  # computes what timm and DINO do: see test_vit.py
    theirs.load_state_dict(out, strict=True)
    torch.testing.assert_close(theirs((images - MEAN) / DEVIATION).pooled, expected, rtol=1e-3, atol=1e-4)


def test_published_weights_are_measured_trained_on_and_exported_again(tmp_path, capsys, refused, monkeypatch):
    for value, name in enumerate(("cats", "dogs"), start=1):
        for i in range(12):
            save(tmp_path / "data" / name / f"{i}.png", noise(40, 40, 3, seed=i) // value)
    torch.save({"teacher": published_names(embed_dim=64, num_heads=1)}, tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    evaluate.main("vit.pth --data data --img-size 32 --num-heads 1 --only attention knn".split())
    said, out = capsys.readouterr().out, Path("vit.pth-data-32")
    assert "64 wide, 1 deep, patches of 16 px, 1 heads, positions of 224 px resized" in said
    assert "knn_accuracy" in metrics_of(out) and (out / "compare.png").exists()
    argv = "--init vit.pth --num-heads 1 --task classify --data data --img-size 32 --epochs 1 --out run"
    train.main(argv.split())
    evaluate.main("run --export out.pth".split())
    assert set(torch.load("out.pth")) == set(published_names(embed_dim=64, num_heads=1))
    train.main("--init run --task classify --data data --img-size 64 --epochs 1 --lr 1e-9 --out larger".split())
    name, runs = "encoder.pos_embed", [load_run(Path(run)).checkpoint["model"] for run in ("run", "larger")]
    torch.testing.assert_close(runs[1][name], resized(runs[0][name], (2, 2), (4, 4)))
    capsys.readouterr()
    wide = "--init vit.pth --num-heads 1 --embed-dim 32 --prior none --out wide".split()
    assert "vit.pth doesn't fit: size mismatch for " in refused(train.main, *wide)
    for wrong, line in {
        "run --export out.pth": "exists already",
        "run --export vit.bin": "name a .pth file",
        "vit.pth --data data": "add --num-heads",
    }.items():
        assert line in refused(evaluate.main, *wrong.split())


@pytest.mark.parametrize("damage, line", [
    (lambda s: {"conv1.weight": torch.ones(1)}, "it lacks patch_embed.proj.weight"),
    (lambda s: Evil(), "can't be read as weights"),
    (lambda s: {"model": s, "history": []}, "name its folder"),
    (lambda s: s | {"blocks.0.mlp.w12.weight": torch.ones(1)}, "it has blocks.0.mlp.w12.weight"),
    (lambda s: s | {"norm.weight": torch.full((192,), torch.nan)}, "norm.weight is not finite"),
    (lambda s: {k: v for k, v in s.items() if k != "norm.weight"}, "it lacks norm.weight"),
    (lambda s: {k: v for k, v in s.items() if "blocks" not in k}, "holds no ViT that is known here"),
    (lambda s: s | {"pos_embed": torch.ones(1, 141, 192)}, "its 140 positions are not a square grid"),
])  # fmt: skip
def test_a_file_that_is_no_such_vit_is_refused_in_one_line(damage, line, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    torch.save(damage(published_names()), "w.pth")
    assert line in refused(train.main, *"--init w.pth --prior none --out run".split())
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]  # nor did it run any code
