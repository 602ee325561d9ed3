"""The page for a browser: nothing comes from outside, nothing breaks out, it shows what was found."""

import argparse
import base64
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import measure
import train
from common.data import Data
from common.measure import Report
from common.page import Looks, _looks_of, _said, page
from vit import ViT

TINY = (
    "--train-images 16 --embed-dim 24 --depth 1 --num-heads 3 --batch-size 8 --epochs 1 --align none".split()
)
EVIL = "</script><img src=//x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 4, "test": 4})


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
        {EVIL: report}, shown, EVIL, {EVIL: Looks({"head 0\nleft": maps}, "", [], "AP", [0.5, torch.nan])}, {}
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
    assert all(len(run["scores"]) == 4 and run["said"] == [] for run in held["runs"])
    assert list(held["runs"][0]["maps"]) == ["head 0, left lung", "head 1, right lung", "head 2, heart"]
    of_dino = {title.split(",")[0] for title in held["runs"][1]["maps"]}
    assert of_dino == {"head 0", "head 1", "head 2"}  # every head, those chosen for no region, too
    found = json.loads((tmp_path / "span" / "metrics.json").read_text())
    # of the same four images, each with all its regions: a mean of means
    assert np.mean(held["runs"][0]["scores"]) == pytest.approx(found["attention_mAP"], abs=1e-5)


def test_a_classifier_s_score_is_its_probability_of_what_is_true(tmp_path):
    argv = "--task classify --train-images 16 --embed-dim 16 --batch-size 8 --epochs 1 --out"
    train.main([*argv.split(), str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--only", "bias", "--html"])
    (run,) = data_in((tmp_path / "run" / "report.html").read_text())["runs"]  # a mean looks nowhere
    assert run["least"] == -run["most"] and list(run["maps"]) == ["relevance"]
    loaded, parts, _ = evaluate.load_all([tmp_path / "run"], [])
    _, model, _ = loaded[tmp_path / "run"]
    with torch.no_grad():
        chances = model.eval()((parts["test"].images.float() / 255 - 0.5) / 0.25).softmax(dim=1)
    true = chances.gather(1, parts["test"].labels.argmax(dim=1)[:, None])[:, 0]
    np.testing.assert_allclose(run["scores"], true.numpy(), rtol=1e-4)
    no, yes = (100 * chance for chance in chances[0].tolist())
    assert run["said"][0] == f"enlarged heart {yes:.0f} %, no enlarged heart {no:.0f} %"


def test_a_classifier_that_attends_is_shown_by_its_relevance_and_by_its_heads(tmp_path):
    argv = (
        "--task classify --backbone vit --train-images 16 --embed-dim 24 --depth 1 --num-heads 2 --epochs 1"
    )
    train.main([*argv.split(), "--out", str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--only", "bias", "--html"])
    held = data_in((tmp_path / "run" / "report.html").read_text())["runs"]
    maps = {run["name"]: list(run["maps"]) for run in held}
    assert maps == {"run": ["relevance"], "run, attention": ["head 0", "head 1"]}
    assert held[0]["scores"] == held[1]["scores"] and held[1]["least"] == 0


def test_of_several_classes_the_score_is_the_probability_of_the_true_one():
    class Sure(torch.nn.Linear):
        def forward(self, images):
            return torch.tensor([[5.0, 0.0, 0.0, 0.0]]).expand(len(images), -1)

    config = argparse.Namespace(task="classify", one_class=True)
    shown = Data(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), None, None, torch.eye(4)[:3], [], [], [])
    shown.labels[2] = torch.nan
    _, scores = measure.scores_in(config, Sure(1, 1), shown, {})
    right, wrong = torch.tensor([5.0, 0.0, 0.0, 0.0]).softmax(dim=0)[:2].tolist()
    assert scores[:2] == pytest.approx([right, wrong]) and math.isnan(scores[2])


def test_the_page_shows_the_first_images_and_those_that_each_model_is_worst_at(monkeypatch):
    monkeypatch.setattr(evaluate, "IN_PAGE", 6)
    data = Data(torch.zeros(9, 1, 8, 8), None, torch.zeros(9), None, [str(i) for i in range(9)], [], [])
    parts = {"test": data, "train": data}
    config = argparse.Namespace(task="pretrain", data="d", img_size=8)
    runs = {name: (config, name) for name in ("a", "b")}
    scores = {"a": [0.9] * 7 + [0.2, 0.1], "b": [0.9] * 4 + [math.nan, 0.3, 0.4, 0.9, 0.9]}
    monkeypatch.setattr(evaluate, "scores_in", lambda config, model, *args: ("AP", scores[model]))
    monkeypatch.setattr(evaluate, "heads_of", lambda config, model, images, *args, **kw: {"": images[:, 0]})
    reports = {name: Report({}, {}, {}, {}, []) for name in runs}
    shown, which, looks = evaluate.looks_of(runs, parts, reports)
    assert shown.names == ["0", "1", "5", "6", "7", "8"]
    assert which.startswith("d at 8 px: 6 of 9 test images, the first 2")
    assert looks["a"].scores == [0.9, 0.9, 0.9, 0.9, 0.2, 0.1] and len(looks["b"].maps[""]) == 6


def test_what_is_unknown_of_an_image_is_not_called_absent():
    labels = torch.tensor([[0.0, torch.nan], [1.0, torch.nan], [0.0, 0.0]])
    shown = Data(torch.zeros(3, 1, 8, 8), None, None, labels, [], [], ["nodule", "effusion"])
    said = [_said(shown, i) for i in range(3)]
    assert said == ["no finding (effusion: unknown).", "nodule (effusion: unknown).", "no finding."]


def test_relevance_finer_than_the_page_keeps_its_unit():
    R = torch.randn(2, 256, 256)
    report = _looks_of("a", Looks({"relevance": R}, "nodule", [], "", [0.1, 0.2]))
    held = numbers(report["maps"]["relevance"], "<f4").reshape(2, 64, 64)
    np.testing.assert_allclose(abs(held).mean(axis=(1, 2)), 1, rtol=1e-5)


def test_images_without_masks_and_labels_are_shown_without_scores(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(256, size=(16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{i}.png")
    weights = tmp_path / "vit.pth"
    torch.save(ViT(16, 8, 3, 32, 1, 2).state_dict(), weights)
    argv = [str(weights), "--data", str(tmp_path / "data"), "--num-heads", "2", "--html"]
    evaluate.main(argv)
    held = data_in((tmp_path / "vit.pth-data" / "report.html").read_text())
    assert held["runs"][0]["scores"] == [None] and held["images"][0]["masks"] is None
    assert list(held["runs"][0]["maps"]) == ["head 0", "head 1"]
