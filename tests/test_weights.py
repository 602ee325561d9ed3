"""Published weights become our ViT with the same features, whatever their release calls and keeps them."""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from simpool import GAP, SimPool
from vit import ViT
from common.weights import BIAS, DEVIATION, FIRST, MEAN, exported, fit, read_weights, sizes

GOLDEN = Path(__file__).parent / "golden"
M, S = MEAN[:, None, None], DEVIATION[:, None, None]


def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "dino_vit.npz").items()}


def published_names(**options) -> dict[str, torch.Tensor]:
    """A ViT-S/16's state dict as the DINO release has it, with random weights; two blocks unless asked."""
    torch.manual_seed(0)
    dimensions = {"patch_size": 16, "embed_dim": 384, "depth": 2, "num_heads": 6} | options
    return ViT(224, in_chans=3, **dimensions).state_dict()


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


def test_features_of_the_published_vit_are_ours_from_the_raw_image(tmp_path):
    """The golden images are normalised by ImageNet's mean and deviation; ours are (x - 1/2) / (1/4)."""
    gold = golden()
    torch.save({k.removeprefix("weight."): v for k, v in gold.items() if "weight." in k}, tmp_path / "w.pth")
    weights, left = read_weights(tmp_path / "w.pth")
    vit = ViT(32, 8, 3, 48, 3, 3).eval()
    fit(weights, vit)
    raw = gold["images"] * S + M
    torch.testing.assert_close(vit((raw - 0.5) / 0.25).pooled, gold["cls"], rtol=1e-4, atol=1e-4)
    assert left == []


@pytest.mark.parametrize("patch_size, embed_dim, heads", [(16, 384, 6), (8, 192, 3), (14, 768, 12)])
def test_sizes_are_read_from_the_shapes(patch_size, embed_dim, heads, tmp_path):
    state = published_names(patch_size=patch_size, embed_dim=embed_dim, num_heads=heads, depth=1)
    state |= {"head.weight": torch.zeros(1000, embed_dim), "head.bias": torch.zeros(1000)}
    _, found, left = loaded(tmp_path, state)
    assert (found["img_size"], found["patch_size"], found["embed_dim"]) == (224, patch_size, embed_dim)
    assert (found["depth"], found["num_heads"], found["pool"], found["registers"]) == (1, heads, "cls", 0)
    assert left == ["head"]


def test_of_a_whole_dino_training_the_teacher_s_backbone_is_taken(tmp_path):
    """A full ViT-S/16 with heads, optimizer and the settings, as the authors save them."""
    student, teacher = published_names(depth=12), published_names(depth=12)
    teacher = {k: v + 1 for k, v in teacher.items()}
    content = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()},
        "teacher": {f"module.backbone.{k}": v for k, v in teacher.items()} | {"module.head.x": torch.ones(1)},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    vit, found, _ = loaded(tmp_path, content)
    assert found["depth"] == 12
    assert torch.equal(vit.state_dict()["blocks.11.mlp.fc2.weight"], teacher["blocks.11.mlp.fc2.weight"])


def test_layer_scale_is_worked_into_the_last_matrices(tmp_path):
    state = published_names()
    plain, images = ViT(224, 16, 3, 384, 2, 6).eval(), torch.randn(1, 3, 224, 224)
    plain.load_state_dict(state)
    gammas = [(torch.rand(384), torch.rand(384)) for _ in range(2)]
    scaled = dict(state)
    for i, (first, second) in enumerate(gammas):
        scaled |= {f"blocks.{i}.ls1.gamma": first, f"blocks.{i}.ls2.gamma": second}
    vit, _, _ = loaded(tmp_path, scaled)
    x = plain.embed(images)
    for block, (first, second) in zip(plain.blocks, gammas):
        x = x + first * block.attn(block.norm1(x))[0]
        x = x + second * block.mlp(block.norm2(x))
    ours = vit((images * S + M - 0.5) / 0.25)
    torch.testing.assert_close(ours.pooled, plain.norm(x)[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["reg_token", "register_tokens", "dist_token"])
def test_tokens_without_a_place_become_registers(name, tmp_path):
    state, images = published_names(), torch.randn(1, 3, 224, 224)
    state["pos_embed"] = torch.randn(1, 197, 384) * 0.02
    plain = ViT(224, 16, 3, 384, 2, 6).eval()
    plain.load_state_dict(state)
    extra = torch.randn(1, 1 if name == "dist_token" else 4, 384)
    x = plain.embed(images)
    if name == "dist_token":  # DeiT's has a position of its own, the second
        place = torch.randn(1, 1, 384)
        tokens = torch.cat([x[:, :1], extra + place, x[:, 1:]], dim=1)
        pos = torch.cat([state["pos_embed"][:, :1], place, state["pos_embed"][:, 1:]], dim=1)
    else:
        tokens, pos = torch.cat([x[:, :1], extra, x[:, 1:]], dim=1), state["pos_embed"]
    for block in plain.blocks:
        tokens, _ = block(tokens)
    vit, found, _ = loaded(tmp_path, state | {name: extra, "pos_embed": pos})
    ours = vit((images * S + M - 0.5) / 0.25)
    assert found["registers"] == extra.shape[1]
    assert ours.patches.shape == (1, 196, 384) and ours.attention.shape == (1, 6, 196)
    torch.testing.assert_close(ours.pooled, plain.norm(tokens)[:, 0], rtol=1e-3, atol=1e-4)


def test_a_cls_token_without_position_gets_none(tmp_path):
    state = published_names()
    state["pos_embed"] = torch.randn(1, 196, 384)
    vit, _, _ = loaded(tmp_path, state)
    assert torch.equal(vit.pos_embed[:, 1:], state["pos_embed"]) and not vit.pos_embed[:, 0].any()


def test_grey_images_and_other_sizes_fit(tmp_path):
    state = published_names()
    colour, _, _ = loaded(tmp_path, state, img_size=64)
    grey, _, _ = loaded(tmp_path, state, img_size=64, in_chans=1)
    image = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(
        colour(image.expand(-1, 3, -1, -1)).pooled, grey(image).pooled, rtol=1e-3, atol=1e-4
    )
    native, _, _ = loaded(tmp_path, state)
    torch.testing.assert_close(colour.pos_embed, native.positions_for((4, 4)))


def test_simpool_s_release_is_known(tmp_path):
    torch.manual_seed(0)
    ours = ViT(224, 16, 3, 384, 2, 6, pool=SimPool(384, 1.25))
    state = {k.replace("pool.", "simpool."): v for k, v in ours.state_dict().items()}
    vit, found, left = loaded(tmp_path, {"teacher": state | {"simpool.beta": torch.zeros(1)}})
    assert found["pool"] == "simpool" and left == []
    assert torch.equal(vit.pool.wq.weight, ours.pool.wq.weight)


class Evil:
    def __reduce__(self):
        return os.system, ("echo spoiled",)


@pytest.mark.parametrize(
    "content, line",
    [
        ({"conv1.weight": torch.ones(1)}, "no name in it ends in patch_embed.proj.weight"),
        ([1, 2], "no name in it ends in patch_embed.proj.weight"),
        (Evil(), "can't be read as weights"),
        (lambda s: s | {"blocks.0.mlp.w12.weight": torch.ones(1)}, "it has blocks.0.mlp.w12.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.weight"}, "it lacks norm.weight"),
        (lambda s: {"model": s, "history": []}, "name its folder"),
        (lambda s: s | {"norm_pre.weight": torch.ones(1)}, "it has norm_pre.weight"),
        (lambda s: s | {"pos_embed": torch.ones(1, 141, 384)}, "its 140 places are no square"),
        (lambda s: s | {"pos_embed": torch.ones(197, 384)}, "holds no ViT that is known here"),
        (lambda s: {k: v for k, v in s.items() if "blocks" not in k}, "holds no ViT that is known here"),
    ],
)
def test_what_is_no_such_vit_is_refused_in_one_line(content, line, tmp_path, capfd):
    torch.save(
        content(published_names()) if callable(content) and not isinstance(content, Evil) else content,
        tmp_path / "w.pth",
    )
    with pytest.raises(SystemExit) as stop:
        train.main(["--init", str(tmp_path / "w.pth"), "--prior", "none", "--out", str(tmp_path / "run")])
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and line in error and "\n" not in error.strip() and "spoiled" not in out
    assert not (tmp_path / "run").exists()


def test_weights_go_out_under_the_published_names_and_come_back_the_same(tmp_path):
    torch.manual_seed(0)
    vit = ViT(224, 16, 3, 384, 2, 6).eval()
    out = exported(vit)
    assert list(out) == [k for k in published_names()]
    again, _, left = loaded(tmp_path, out)
    images = torch.rand(1, 3, 224, 224)
    theirs = ViT(224, 16, 3, 384, 2, 6).eval()  # computes what timm and DINO do: see test_vit.py
    theirs.load_state_dict(out, strict=True)
    expected = vit((images - 0.5) / 0.25).pooled
    torch.testing.assert_close(again((images - 0.5) / 0.25).pooled, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(theirs((images - M) / S).pooled, expected, rtol=1e-3, atol=1e-4)
    assert left == [] and out[BIAS].dtype == torch.float32 and out[FIRST].shape == (384, 3, 16, 16)


def test_published_weights_are_measured_trained_on_and_exported_again(tmp_path, capsys, monkeypatch):
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8) // (
                1 + (name == "cats")
            )
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    torch.save({"teacher": published_names(depth=1, embed_dim=64, num_heads=1)}, tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    evaluate.main("vit.pth --data data --img-size 32 --num-heads 1 --only attention knn".split())
    said = capsys.readouterr().out
    out = Path("vit.pth-data")  # of one data set, lest figures of another join them
    assert "a ViT 64 wide, 1 deep, patches of 16 px, 1 heads, positions of 224 px resized" in said
    assert "knn accuracy" in said and (out / "compare.png").exists()
    assert "knn_accuracy" in json.loads((out / "metrics.json").read_text())
    train.main(
        "--init vit.pth --num-heads 1 --task classify --data data --img-size 32 --epochs 1 --out run".split()
    )
    evaluate.main("run --export out.pth".split())
    assert set(torch.load("out.pth")) == set(published_names(depth=1, embed_dim=64, num_heads=1))
    for wrong, line in {
        "run --export out.pth": "exists already",
        "run --export vit.bin": "name a .pth file",
        "run --data data": "files of weights",
        "vit.pth --data data": "add --num-heads",
    }.items():
        with pytest.raises(SystemExit):
            evaluate.main(wrong.split())
        assert line in capsys.readouterr().err


def test_a_file_beside_a_run_is_measured_on_the_run_s_data_whichever_comes_first(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 8, "test": 8})
    monkeypatch.chdir(tmp_path)
    torch.save(published_names(depth=1, embed_dim=192, num_heads=3), "vit.pth")
    argv = "--train-images 16 --img-size 32 --seed 3 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8"
    train.main([*argv.split(), *"--epochs 1 --align none --prior none --keep-going --out run".split()])
    for runs in (["run", "vit.pth"], ["vit.pth", "run"]):
        capsys.readouterr()
        evaluate.main([*runs, "--only", "attention"])
        said = capsys.readouterr().out
        assert "phantom: 8 test images of 32 px" in said and "vit.pth: attention" in said
        assert Path(runs[0] if runs[0] == "run" else "vit.pth-phantom", "compare.png").exists()
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--device", "abacus"])
    assert "--device abacus is none: auto, cpu, cuda or mps" in capsys.readouterr().err


def test_weights_that_are_not_finite_or_do_not_fit_are_refused_by_what_is_wrong(tmp_path):
    state = published_names(depth=1, embed_dim=192, num_heads=3)
    torch.save(state | {"norm.weight": torch.full((192,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="norm.weight is not finite"):
        read_weights(tmp_path / "nan.pth")
    torch.save({k: v for k, v in state.items() if "blocks.0.mlp.fc2" not in k}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="it lacks blocks.0.mlp.fc2.weight$"):
        read_weights(tmp_path / "less.pth")
    torch.save(state, tmp_path / "tiny.pth")
    weights, _ = read_weights(tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="they have embed_dim 192, not 96$"):
        fit(weights, ViT(32, 16, 3, 96, 1, 3))
    grey, _ = read_weights(tmp_path / "tiny.pth")
    grey["patch_embed.proj.weight"] = grey["patch_embed.proj.weight"][:, :1]
    with pytest.raises(ValueError, match="they have channels 1, not 3$"):
        fit(grey, ViT(224, 16, 3, 192, 1, 3))


def test_only_what_others_can_load_is_exported():
    for options in ({"registers": 2, "pool": SimPool(24, 1.25)}, {"pool": GAP()}):
        with pytest.raises(ValueError, match="a CLS token, or with SimPool and no registers"):
            exported(ViT(32, 8, 3, 24, 1, 3, **options))


def test_registers_go_out_as_timm_has_them_and_come_back_the_same(tmp_path):
    torch.manual_seed(0)
    vit = ViT(32, 8, 3, 192, 2, 3, registers=4).eval()
    out = exported(vit)
    assert out["pos_embed"].shape == (1, 16, 192) and out["reg_token"].shape == (1, 4, 192)
    again, found, left = loaded(tmp_path, out)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x).pooled, vit(x).pooled, rtol=1e-3, atol=1e-4)
    assert found["registers"] == 4 and left == []


def test_what_lies_beside_the_encoder_in_a_whole_training_is_named(tmp_path):
    state = {
        f"module.backbone.{k}": v for k, v in published_names(depth=1, embed_dim=192, num_heads=3).items()
    }
    _, _, left = loaded(tmp_path, {"student": state | {"module.head.mlp.0.weight": torch.zeros(2, 192)}})
    assert left == ["head"]


def test_damaged_weights_are_refused_by_name_or_read(tmp_path):
    chance, refused, path = random.Random(0), 0, tmp_path / "w.pth"
    whole = published_names(depth=1, embed_dim=192, num_heads=3, patch_size=32)
    for _ in range(150):
        state = dict(whole)
        for name in chance.sample(list(state), 2):
            tensor = state.pop(name)
            shapes = (tensor[:1], tensor[..., :-1], tensor[None], tensor.flatten(), tensor.sum(), None)
            state[chance.choice((name, name + "x", "blocks.x", 3))] = chance.choice(shapes)
        torch.save(state, path)
        try:
            weights, _ = read_weights(path)
            fit(weights, ViT(64, 32, 3, 192, 1, 3))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_a_simpool_that_a_file_can_not_tell_is_not_exported():
    for heads, gamma in ((2, 1.25), (1, 3.0)):
        with pytest.raises(ValueError, match="one head and gamma 1.25"):
            exported(ViT(16, 8, 3, 32, 1, 2, pool=SimPool(32, gamma, heads)))
    assert "simpool.wq.weight" in exported(ViT(16, 8, 3, 32, 1, 2, pool=SimPool(32, 1.25)))
