"""Damaged files, thousands with -m slow: each is read, skipped with a note, or refused in one line."""

import io
import random
import signal

import numpy as np
import pytest
from conftest import noise, save
from PIL import Image

import train
from common.checkpoint import load_run
from common.config import parse
from common.data import DataError
from common.folder import load_folder
from common.models import load_model

STRANGE = b"\0", b"\xff" * 4, b",", b"\n", b'"', b"../", b"\xe9"
ROWS = "file,split,heart,note\na.png,train,1,0\nb.png,val,0,1\nc.png,test,,0\n"


@pytest.fixture(autouse=True)
def nothing_hangs():
    signal.signal(signal.SIGALRM, lambda *late: pytest.fail("a damaged file hangs"))
    signal.alarm(300)
    yield
    signal.alarm(0)


def damaged(content, chance):
    """Some bytes changed, cut out, doubled or put in; or the end is lost."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        at, n = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 4, 64))
        part = content[at : at + n]
        new = chance.randbytes(n), b"", part * 2, chance.choice(STRANGE) + part
        content[at : at + n] = chance.choice(new)
        if not chance.randrange(5):
            del content[max(1, at) :]
    return bytes(content)


def pictures():
    """One image in each of the formats and depths that are read: (suffix, bytes)."""
    grey = noise(12, 12)
    made = {"L": Image.fromarray(grey), "RGB": Image.fromarray(np.stack([grey] * 3, axis=2))}
    made |= {"P": made["RGB"].convert("P"), "RGBA": made["RGB"].convert("RGBA"), "1": made["L"].convert("1")}
    made |= {"CMYK": made["RGB"].convert("CMYK"), "I;16": Image.fromarray(grey.astype(np.uint16) * 257)}
    kinds = {"png": "L RGB P RGBA 1 I;16", "jpg": "L RGB CMYK", "tif": "L RGB CMYK I;16", "bmp": "L RGB P"}
    for suffix, modes in kinds.items():
        for mode in modes.split():
            file = io.BytesIO()
            made[mode].save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
            yield suffix, file.getvalue()


def few_or_many(few: int, many: int):
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


@few_or_many(100, 2000)
def test_damaged_images_are_skipped_or_read_but_never_break_the_loading(n, tmp_path):
    chance, whole = random.Random(0), list(pictures())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "whole.png").write_bytes(whole[0][1])
    for i in range(n):
        suffix, content = chance.choice(whole)
        (tmp_path / "images" / f"{i}.{suffix}").write_bytes(damaged(content, chance))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.folder._few", list)  # all notes
        splits, _, notes = load_folder(tmp_path, 8)
    assert all("\n" not in note for note in notes)
    read = sum(len(data.names) for data in splits.values())
    skipped = sum(note.startswith("skipped ") for note in notes)
    assert read > n / 10 and skipped > n / 10  # both ways are met


@few_or_many(50, 1000)
def test_damaged_tables_are_refused_with_their_line_or_understood(n, tmp_path):
    chance, refused = random.Random(0), 0
    for name in "abc":
        save(tmp_path / "images" / f"{name}.png", Image.new("L", (8, 8), 90))
    for _ in range(n):
        (tmp_path / "labels.csv").write_bytes(damaged(ROWS.encode(), chance))
        try:
            splits, _, _ = load_folder(tmp_path, 8)
            assert sum(len(data.names) for data in splits.values()) == 3
        except DataError as error:
            assert "labels.csv, line " in str(error) and "\n" not in str(error)
            refused += 1
    assert n / 10 < refused < n


@pytest.fixture(scope="module", params=["--task classify --isnet 1", "--prior none --depth 1"])
def run(request, few_test_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "run"
    argv = "--train-images 8 --embed-dim 8 --num-heads 2 --epochs 1 --batch-size 8 --out"
    train.main([*request.param.split(), *argv.split(), str(out)])
    return out


@few_or_many(30, 600)
def test_damaged_runs_are_refused_or_read_and_run_no_code(n, run, tmp_path):
    chance, refused = random.Random(0), []
    for i in range(n):  # in turn a damaged record and a damaged checkpoint
        for name in ("config.json", "last.pt"):
            whole = (run / name).read_bytes()
            (tmp_path / name).write_bytes(damaged(whole, chance) if (name == "last.pt") == i % 2 else whole)
        reads = [lambda path, flag=flag: parse([flag, str(path)]) for flag in ("--config", "--init")]
        for read in (lambda path: load_model(path, load_run(path)), *reads):
            try:
                read(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                refused.append(read)
    assert n / 10 < len(refused) < 3 * n
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "last.pt"]
