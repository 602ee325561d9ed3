"""The page for a browser: nothing comes from outside, nothing breaks out, it shows what was found."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from data import Data
from page import Looks, Report, page
from vit import ViT

TINY = (
    "--train-images 16 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 1 --align none".split()
)
EVIL = "</script><img src=//x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr("data.DRAWN_SIZES", {"val": 4, "test": 4})


def data_in(text: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture
def made():
    """A page of two images with names that are not meant well, and the maps and masks in it."""
    torch.manual_seed(0)
    masks, maps = torch.rand(2, 2, 5, 7) > 0.5, torch.rand(2, 2, 3)
    shown = Data(
        images=torch.randint(256, (2, 1, 5, 7), dtype=torch.uint8),
        masks=masks,
        has_masks=torch.tensor([True, False]),
        labels=torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]]),
        names=["a", EVIL],
        regions=["left", "right"],
        findings=["sick", EVIL],
    )
    report = Report({}, {EVIL: {"same": {EVIL: 0.5}}}, {}, {}, [EVIL])
    text = page(
        {EVIL: report}, shown, {EVIL: Looks({"head 0\nleft": maps}, False, "AP", [0.5, torch.nan])}, {}
    )
    return text, shown, maps


def test_the_page_takes_nothing_from_outside_and_says_so_to_the_browser(made):
    text, *_ = made
    assert "default-src 'none'" in text and "{{" not in text
    assert not re.search(r"https?:|@import|url\(", text)


def test_names_stay_text_wherever_they_stand(made):
    text, *_ = made
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)

    Reader().feed(text)
    assert tags.count("script") == 2 and "img" not in tags
    assert data_in(text)["images"][1]["name"] == EVIL


def test_the_page_holds_the_very_images_maps_and_masks(made):
    text, shown, maps = made
    held = data_in(text)
    png = base64.b64decode(held["images"][0]["src"].removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(BytesIO(png))) == shown.images[0, 0].numpy()).all()
    bits = [np.unpackbits(numbers(mask, np.uint8))[:35].reshape(5, 7) for mask in held["images"][0]["masks"]]
    assert (np.stack(bits) == shown.masks[0].numpy()).all() and held["images"][1]["masks"] is None
    run = held["runs"][0]
    seen = numbers(run["maps"]["head 0, left"], "<f4").reshape(2, 2, 3)
    np.testing.assert_allclose(seen, maps.numpy() * 6, rtol=1e-6)  # 1 = uniform
    assert run["scores"] == [0.5, None] and run["grid"] == [2, 3]
    assert [image["about"] for image in held["images"]] == [f"{EVIL}.", "no label."]


def test_runs_write_a_page_with_each_image_s_own_score(tmp_path):
    runs = [str(tmp_path / name) for name in ("span", "dino")]
    train.main([*TINY, "--out", runs[0]])
    train.main([*TINY, "--out", runs[1], "--prior", "none"])
    evaluate.main([*runs, "--only", "attention", "--html"])
    held = data_in((tmp_path / "span" / "report.html").read_text())
    assert [run["name"] for run in held["runs"]] == ["span", "dino"]
    assert all(len(run["maps"]) == 3 and len(run["scores"]) == 4 for run in held["runs"])
    found = json.loads((tmp_path / "span" / "metrics.json").read_text())
    # of the same four images, each with all its regions: a mean of means
    assert np.mean(held["runs"][0]["scores"]) == pytest.approx(found["attention_mAP"], abs=1e-5)


def test_a_classifier_s_score_is_its_probability_of_what_is_true(tmp_path):
    argv = "--task classify --train-images 16 --embed-dim 16 --batch-size 8 --epochs 1 --out"
    train.main([*argv.split(), str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--only", "bias", "--html"])
    (run,) = data_in((tmp_path / "run" / "report.html").read_text())["runs"]
    assert run["least"] == -run["most"] and list(run["maps"]) == ["relevance"]
    config, model, shown = _loaded(tmp_path / "run")
    with torch.no_grad():
        chances = model((shown.images.float() / 255 - 0.5) / 0.25).softmax(dim=1)
    true = chances.gather(1, shown.labels.argmax(dim=1)[:, None])[:, 0]
    np.testing.assert_allclose(run["scores"], true.numpy(), rtol=1e-4)


def _loaded(run):
    loaded, parts, _ = evaluate.load_all([run], [])
    config, model, _ = loaded[run]
    return config, model.eval(), evaluate.shown_images(config, parts, 60)


def test_images_without_masks_and_labels_are_shown_without_scores(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(256, size=(16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{i}.png")
    weights = tmp_path / "vit.pth"
    torch.save(ViT(16, 8, 3, 32, 1, 2).state_dict(), weights)
    argv = [str(weights), "--data", str(tmp_path / "data"), "--num-heads", "2", "--html"]
    evaluate.main(argv)
    held = data_in((tmp_path / "vit" / "report.html").read_text())
    assert held["runs"][0]["scores"] == [None] and held["images"][0]["masks"] is None
    assert list(held["runs"][0]["maps"]) == ["head 0", "head 1"]
