"""Symbols are drawn from their seed into a folder that is read as it is."""

import numpy as np
import pytest

from common import symbols
from common.data import load


def test_symbols_are_drawn_from_their_seed_into_a_folder_that_is_read_as_it_is(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = ["symbols.py", str(tmp_path / name), "--train", "2", "--size", "32", "--seed", str(seed)]
        monkeypatch.setattr("sys.argv", argv)
        symbols.main()
    name = "images/train_disc_0001.png"
    a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
    assert a == b != c
    parts, _, notes = load(str(tmp_path / "a"), 32)
    assert {part: len(data.names) for part, data in parts.items()} == {"train": 20, "val": 200, "test": 1000}
    assert sorted(parts["train"].findings) == sorted(symbols.CLASSES) and not notes
    assert (parts["train"].labels.sum(dim=0) == 2).all() and parts["train"].images.shape[1] == 3


@pytest.mark.parametrize("flags", ["--train 0", "--size 4", "--seed -1", ""])
def test_a_folder_that_holds_something_and_sizes_that_cannot_be_are_refused(
    flags, tmp_path, monkeypatch, capsys
):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    folder = tmp_path / ("new" if flags else "old")
    monkeypatch.setattr("sys.argv", ["symbols.py", str(folder), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        symbols.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and ("must be at least" in said) == bool(flags) and "Traceback" not in said
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "old").iterdir())) == 1


def test_every_symbol_shows_and_differs_from_the_others():
    v, u = np.mgrid[:40, :40] / 20 - 1
    drawn = np.stack([symbols.symbol(kind, u, v) for kind in symbols.CLASSES])
    assert (0.1 < drawn.mean(axis=(1, 2))).all() and (drawn.mean(axis=(1, 2)) < 0.9).all()
    apart = (drawn[:, None] != drawn[None]).mean(axis=(2, 3))
    assert (apart + np.eye(len(drawn)) > 0.1).all()
