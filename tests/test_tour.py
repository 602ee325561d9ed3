"""The tour: all its steps fit together, and a lecturer can show the whole of it."""

import re
import runpy
from pathlib import Path

import pytest
import torch

TOUR = Path(__file__).parents[1] / "tour.py"


def test_the_tour_fits_on_two_screens_and_has_no_flag():
    text = TOUR.read_text()
    assert len(text.splitlines()) <= 150 and "argparse" not in text and "sys.argv" not in text


@pytest.mark.slow
def test_a_shortened_tour_prints_each_figure_and_draws_its_picture(tmp_path, monkeypatch, capsys):
    text = TOUR.read_text()
    for long, short in {
        "STEPS, GRID = 200": "STEPS, GRID = 2",
        "phantom(800": "phantom(32",
        "phantom(300": "phantom(16",
    }.items():
        assert long in text
        text = text.replace(long, short)
    text = re.sub(r"train\((\S+), (600|900)", r"train(\1, 3", text)
    (tmp_path / "tour.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)  # other tests go on in this process
    names = runpy.run_path("tour.py")
    said = capsys.readouterr().out
    assert said.count("average precision: left lung") == said.count("plain classifier, AUC") == 1
    assert (tmp_path / "tour.png").exists() and len(names["heat"]) == 2
