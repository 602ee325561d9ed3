"""The page for a browser loads nothing, escapes names, and holds what was measured; and pictures."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics_of, trained, unlabelled
from PIL import Image

import evaluate
from common import plots
from common import runs as loaded_runs
from common.checkpoint import DataSpec
from common.config import parse
from common.data import Data
from common.measure import Report
from common.page import Looks, page

EVIL = "</script><img src=//x onerror=alert(1)>"


def data_in(text: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture
def made():
    """A page of two images with hostile names, and the images and maps in it."""
    images, masks = torch.randint(256, (2, 1, 5, 7)).byte(), torch.rand(2, 2, 5, 7) > 0.5
    labels = torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]])
    known, names = torch.tensor([True, False]), ["a", EVIL]
    shown = Data(images, masks, known, labels, names, ["left", "right"], ["sick", EVIL])
    maps = torch.rand(2, 2, 3)
    looks = {EVIL: Looks({"head 0\nleft": maps}, "", [], "AP", [0.5, torch.nan])}
    report = Report({}, {EVIL: {"same": {EVIL: 0.5}}}, {}, {}, [EVIL])
    return page({EVIL: report}, shown, EVIL, looks, {}), shown, maps


def test_the_page_loads_nothing_and_names_stay_text(made):
    text, tags = made[0], []
    assert "default-src 'none'" in text and "{{" not in text
    assert not re.search(r"https?:|@import|url\(", text)

    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append(tag)
    reader.feed(text)
    assert tags.count("script") == 2 and "img" not in tags
    assert data_in(text)["images"][1]["name"] == EVIL


def test_the_page_holds_images_maps_and_masks_exactly(made):
    text, shown, maps = made
    first, second = data_in(text)["images"]
    png = base64.b64decode(first["src"].removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(BytesIO(png))) == shown.images[0, 0].numpy()).all()
    bits = [np.unpackbits(numbers(mask, np.uint8))[:35].reshape(5, 7) for mask in first["masks"]]
    assert (np.stack(bits) == shown.masks[0].numpy()).all() and second["masks"] is None
    (run,) = data_in(text)["runs"]
    seen = numbers(run["maps"]["head 0, left"], "<f4").reshape(2, 2, 3)
    np.testing.assert_allclose(seen, maps.numpy() * 6, rtol=1e-6)  # 1 = uniform
    assert run["scores"] == [0.5, None] and run["grid"] == [2, 3]
    assert numbers(run["colours"], np.uint8).reshape(256, 3)[[0, -1]].tolist() == [[0, 0, 3], [251, 252, 191]]
    assert [first["about"], second["about"]] == [f"{EVIL}.", "no label."]
    fine = {"a": Looks({"R": torch.randn(2, 256, 256)}, "nodule", [], "", [])}
    none = shown._replace(has_masks=torch.zeros(2), labels=torch.zeros(2, 0))
    bare = data_in(page({}, none, "", fine, {}))
    R = numbers(bare["runs"][0]["maps"]["R"], "<f4").reshape(2, 64, 64)
    assert abs(R).mean(axis=(1, 2)) == pytest.approx([1, 1])
    assert [image["masks"] for image in bare["images"]] == [None, None]


def test_an_unknown_finding_is_not_called_absent(made):
    shown = made[1]._replace(labels=torch.tensor([[1.0, torch.nan], [0, torch.nan]]))
    about = [image["about"] for image in data_in(page({}, shown, "", {}, {}))["images"]]
    assert about == [f"sick ({EVIL}: unknown).", f"no finding ({EVIL}: unknown)."]


def test_a_page_has_a_score_for_each_image_but_none_of_even_pooling(span_run, few_test_images, tmp_path):
    run = shutil.copytree(span_run, tmp_path / "span")
    trained(tmp_path / "even", "--prior none --pool gap --epochs 1")
    evaluate.main([str(run), str(tmp_path / "even"), "--only", "attention", "--html"])
    span, even = data_in((run / "report.html").read_text())["runs"]
    assert list(span["maps"]) == ["head 0, left lung", "head 1, right lung", "head 2, heart"]
    assert np.mean(span["scores"]) == pytest.approx(metrics_of(run)["attention_mAP"], abs=1e-5)
    assert list(even["maps"]) == ["head 0"] and even["score"] == ""


def test_a_classifier_is_shown_by_its_relevance_and_by_its_heads_if_it_has_some(few_test_images, tmp_path):
    runs = [tmp_path / name for name in ("resnet", "vit")]
    for out in runs:
        trained(out, f"--backbone {out.name} --epochs 1", SMALL)
    evaluate.main([*map(str, runs), "--only", "bias", "--html"])
    resnet, relevance, heads = data_in((runs[0] / "report.html").read_text())["runs"]
    assert list(resnet["maps"]) == list(relevance["maps"]) == ["relevance"]
    assert resnet["score"] == "probability of the true class" and heads["name"] == "vit, attention"
    assert relevance["scores"] == heads["scores"] and len(heads["maps"]) == 2
    assert relevance["least"] == -relevance["most"] and heads["least"] == 0
    assert re.fullmatch(r"enlarged heart \d+ %, no enlarged heart \d+ %", relevance["said"][0])


def test_the_page_shows_the_first_images_and_those_that_each_model_is_worst_at(monkeypatch):
    monkeypatch.setattr(loaded_runs, "ON_PAGE", 6)
    data = unlabelled(torch.zeros(9, 1, 8, 8))
    config, spec = parse(["--data", "d", "--img-size", "8"])[0], DataSpec(1, (), False, "")
    runs = {name: loaded_runs.Loaded(config, spec, name, [], Path(), {}) for name in ("a", "b")}
    scores = {"a": [0.9] * 7 + [0.2, 0.1], "b": [0.9] * 4 + [math.nan, 0.3, 0.4, 0.9, 0.9]}
    monkeypatch.setattr(loaded_runs, "scores_in", lambda model, *args: ("AP", scores[model]))
    monkeypatch.setattr(loaded_runs, "heads_of", lambda model, layer, images, *args, **kw: {"": images[:, 0]})
    monkeypatch.setattr(loaded_runs, "has_attention", lambda encoder, baseline: True)
    reports = {name: Report({}, {}, {}, {}, []) for name in runs}
    shown, which, looks = loaded_runs.looks_of(runs, {"test": data, "train": data}, reports)
    assert shown.names == ["0", "1", "5", "6", "7", "8"]
    assert which.startswith("d at 8 px: 6 of 9 test images, the first 2")
    assert looks["a"].scores == [0.9, 0.9, 0.9, 0.9, 0.2, 0.1] and len(looks["b"].maps[""]) == 6


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["a$b_{c", "$b_{c$", "_x", "two\nlines"]  # two $ make it a formula, an open { a broken one
    images, masks, path = torch.rand(1, 1, 16, 16), torch.rand(1, 4, 16, 16) > 0.5, tmp_path / "a.png"
    plots.map_grid(path, images, masks, names, {f"head 0\n{name}": torch.rand(1, 2, 2) for name in names})
    assert min(Image.open(path).size) > 100
    plots.curves(path, {name: [{"epoch": 1, name: 2.0}] for name in names})
    plots.low_data(path, {name: {name: {0.1: [0.5], 1.0: [0.6]}} for name in names})


def test_a_measure_that_ends_with_a_collapse_keeps_its_panel(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.curves(None, {"run": [{"epoch": 1, "loss": 1.0, "kl": 0.1}, {"epoch": 2, "loss": 2.0}]})
    assert [ax.get_ylabel() for ax in drawn[0].axes] == ["loss", "kl"]
    assert drawn[0].axes[1].lines[0].get_marker() == "o"
