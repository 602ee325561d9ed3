"""Pictures: any name can be drawn, and epochs are whole numbers."""

import torch
from PIL import Image

from common import plots

NAMES = ["a$b_{c", "$b_{c$", "_x", "two\nlines"]  # two $ make it a formula, an open { a broken one


def test_names_are_drawn_as_they_are(tmp_path):
    images, masks, path = torch.rand(1, 1, 16, 16), torch.rand(1, 4, 16, 16) > 0.5, tmp_path / "a.png"
    plots.map_grid(path, images, masks, NAMES, {f"head 0\n{name}": torch.rand(1, 2, 2) for name in NAMES})
    assert min(Image.open(path).size) > 100
    plots.curves(path, {name: [{"epoch": 1, name: 2.0}] for name in NAMES})
    plots.low_data(path, {name: {name: {0.1: [0.5], 1.0: [0.6]}} for name in NAMES})


def test_epochs_are_whole_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.curves(None, {"run": [{"epoch": epoch, "loss": 1.0} for epoch in (1, 2, 3)]})
    assert [tick for tick in drawn[0].axes[0].get_xticks() if 1 <= tick <= 3] == [1, 2, 3]
