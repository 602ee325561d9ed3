"""Any picture of any size and aspect: attention, what it outlines, and what a decision rests on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import look
import train
from common.checkpoint import load_model, load_run
from common.folder import read_picture
from common.regions import masks_of, read_outlines
from common.models import decisions
from common.pretrain import make_priors
from vit import ViT

TINY = (
    "--train-images 16 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 1 --align none".split()
)


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 4, "test": 4})


@pytest.fixture
def wide(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(90, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.jpg")
    return tmp_path / "wide.jpg"


def test_a_picture_keeps_its_aspect_in_whole_patches_and_takes_the_channels_asked_for(wide):
    assert read_picture(wide, 64, 8, 3).shape == (1, 3, 64, 144)  # 142.2 is nearest to 144
    grey, colour = read_picture(wide, 90, 10, 1), read_picture(wide, 90, 10, 3)
    assert grey.shape == (1, 1, 90, 200)
    assert (grey.float() - colour.float().mean(dim=1, keepdim=True)).abs().max() <= 0.5


def test_a_thin_strip_does_not_become_endless(tmp_path):
    Image.new("L", (1500, 2)).save(tmp_path / "strip.png")
    assert read_picture(tmp_path / "strip.png", 64, 8, 1).shape == (1, 1, 8, 1024)


def test_pictures_of_one_name_each_get_their_own(tmp_path, monkeypatch, capsys):
    torch.save(ViT(16, 8, 3, 32, 1, 2).state_dict(), tmp_path / "vit.pth")
    drawn = []
    monkeypatch.setattr(look, "map_grid", lambda path, *a, **k: drawn.append(path))
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / folder / "1.png")
    evaluate.main(["vit.pth", "--num-heads", "2", "--image", "a/1.png", "b/1.png"])
    assert drawn == [Path(f"vit.pth-looks/{name}/attention.png") for name in ("1.png", "1_1.png")]
    with pytest.raises(SystemExit):  # what can't be read keeps nothing else from being drawn
        evaluate.main(["vit.pth", "--num-heads", "2", "--image", "none.png", "a/1.png"])
    assert len(drawn) == 3 and "none.png: this image cannot be read" in capsys.readouterr().err


def test_guided_heads_outline_their_regions_and_every_head_is_shown(wide, tmp_path, monkeypatch, capsys):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(evaluate, "load", None)  # the run's folder is enough: its data may be gone
    seen, out = [], tmp_path / "run" / "looks" / "wide.jpg"
    monkeypatch.setattr(look, "map_grid", lambda *a, **k: seen.append(a))
    evaluate.main([str(tmp_path / "run"), "--image", str(wide)])
    path, image, masks, names, maps = seen[0]
    assert path == out / "attention.png" and f"{wide}: 4 file(s) in {out}" in capsys.readouterr().out
    assert image.shape == (1, 1, 64, 144) and masks.shape == (1, 3, 64, 144)
    assert names == ["left lung", "right lung", "heart"]
    titles = ["head 0\nleft lung", "head 1\nright lung", "head 2\nheart"]
    assert {name: m.shape for name, m in maps.items()} == dict.fromkeys(titles, (1, 8, 18))
    for name, mask in zip(names, masks[0]):
        written = Image.open(out / "masks" / f"{name}.png")
        assert written.size == (200, 90)  # the picture's own
        shrunk = np.asarray(written.resize((144, 64), Image.Resampling.NEAREST)) > 0
        assert (shrunk == mask.numpy()).mean() > 0.95


def test_guided_heads_outline_as_much_as_covers_the_prior_of_the_sample(tmp_path):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    config, checkpoint = load_run(tmp_path / "run")
    parts, sample, _ = train.load("phantom", 64, 0, 16)
    i = parts["train"].names.index(sample)
    shares = read_outlines(tmp_path / "run", config)
    masks = masks_of(
        config, load_model(tmp_path / "run", config, checkpoint), shares, parts["train"].images[i : i + 1]
    )
    priors, _ = make_priors(config, parts, sample)
    for mask, prior in zip(masks[0], priors):
        assert 0.95 <= (mask & (prior >= prior.max() / 2)).sum() / (prior >= prior.max() / 2).sum() < 1


def test_a_classifier_s_decision_gets_a_heatmap_and_its_probability(wide, tmp_path, monkeypatch):
    argv = "--task classify --train-images 16 --embed-dim 16 --batch-size 8 --epochs 1 --findings all --out"
    train.main([*argv.split(), str(tmp_path / "run")])
    monkeypatch.setattr(evaluate, "load", None)
    seen = []
    monkeypatch.setattr(look, "map_grid", lambda *a, **k: seen.append((a, k)))
    evaluate.main([str(tmp_path / "run"), "--image", str(wide)])
    (path, _, _, _, maps), how = seen[0]  # and no other: a mean looks nowhere
    assert len(seen) == 1
    assert path.name == "relevance.png" and path.parent.name == "wide.jpg" and how["signed"]
    ((title, heatmap),) = maps.items()
    assert heatmap.shape == (1, 64, 144)
    what, *chances = title.split("\n")
    assert what == "relevance for enlarged heart" and len(chances) == 4
    assert any(chance.startswith("enlarged heart ") for chance in chances)


def test_what_is_explained_is_said_even_if_it_is_unlikely():
    class Sure(torch.nn.Linear):
        def forward(self, images):
            return torch.arange(6.0).expand(len(images), -1)

    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert [word[0] for word in decisions(Sure(1, 1), images, False, "abcdef")[0]] == ["a", "f", "e", "d"]
    assert [word[0] for word in decisions(Sure(1, 1), images, True, "abcdef")[1]] == ["f", "e", "d", "c"]


def test_heads_of_published_weights_outline_what_holds_most_of_their_attention(wide, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(ViT(32, 8, 3, 64, 1, 1).state_dict(), tmp_path / "vit.pth")
    seen, drawn = [], look.map_grid
    monkeypatch.setattr(look, "map_grid", lambda *a, **k: (seen.append(a), drawn(*a, **k)))
    monkeypatch.chdir(tmp_path)
    evaluate.main(["vit.pth", "--image", str(wide), "--img-size", "48", "--num-heads", "1"])
    path, image, masks, names, maps = seen[0]
    assert path.parent.parent == Path("vit.pth-looks") and min(Image.open(path).size) > 200
    assert image.shape == (1, 3, 48, 104) and names == ["head 0"] and 0.3 < masks.float().mean() < 0.7


def test_what_is_asked_beside_pictures_is_not_ignored(wide, tmp_path, capsys):
    torch.save(ViT(16, 8, 3, 32, 1, 2).state_dict(), tmp_path / "vit.pth")
    for beside in (["--html"], ["--rows", "9"], ["--only", "knn"], ["--export", "x.pth"]):
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path / "vit.pth"), "--image", str(wide), *beside])
        assert "is done alone, for one run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "vit.pth"), str(tmp_path), "--image", str(wide)])
    assert "is done alone, for one run" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named(tmp_path, capsys):
    torch.save(ViT(32, 8, 3, 64, 1, 1).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path / "vit.pth"), "--num-heads", "1", "--image", str(tmp_path / "no.png")])
    assert stop.value.code == 2 and "no.png: this image cannot be read" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_shown_like_published_weights(wide, tmp_path, monkeypatch):
    train.main([*TINY, "--out", str(tmp_path / "run")])
    (tmp_path / "run" / "outlines.json").unlink()
    seen = []
    monkeypatch.setattr(look, "map_grid", lambda *a, **k: seen.append(a))
    evaluate.main([str(tmp_path / "run"), "--image", str(wide)])
    assert seen[0][3] == ["head 0", "head 1", "head 2"]


def test_a_run_that_averages_patches_has_nothing_to_show(wide, tmp_path, capsys):
    argv = "--prior none --keep-going --pool gap --out".split()
    train.main([*TINY[:-2], *argv, str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--image", str(wide)])
    assert "wide.jpg: nothing to draw" in capsys.readouterr().out
