"""Thousands of damaged files: each is read, skipped with a note, or refused in one line."""

import io
import random
import signal

import numpy as np
import pytest
from PIL import Image

import train
from checkpoint import load_model, load_run
from folder import DataError, load_folder

ROWS = "file,split,heart,note\na.png,train,1,0\nb.png,val,0,1\nc.png,test,,0\n"


@pytest.fixture(autouse=True)
def nothing_hangs():
    def late(number, frame):
        raise TimeoutError("a damaged file hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(content, chance):
    """Some bytes changed, cut out, doubled or put in; or the end is lost."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        at, n = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 4, 64))
        match chance.randrange(5):
            case 0:
                content[at : at + n] = chance.randbytes(n)
            case 1:
                del content[at : at + n]
            case 2:
                content[at:at] = content[at : at + n]
            case 3:
                content[at:at] = chance.choice((b"\0", b"\xff" * 4, b",", b"\n", b'"', b"../", b"\xe9"))
            case 4:
                del content[max(1, at) :]
    return bytes(content)


def pictures():
    """One image in each of the formats and depths that are read: (suffix, bytes)."""
    grey = np.random.default_rng(0).integers(256, size=(12, 12), dtype=np.uint8)
    made = {"L": Image.fromarray(grey), "RGB": Image.fromarray(np.stack([grey] * 3, axis=2))}
    made |= {"P": made["RGB"].convert("P"), "RGBA": made["RGB"].convert("RGBA"), "1": made["L"].convert("1")}
    made |= {"CMYK": made["RGB"].convert("CMYK"), "I;16": Image.fromarray(grey.astype(np.uint16) * 257)}
    for suffix, modes in {
        "png": "L RGB P RGBA 1 I;16",
        "jpg": "L RGB CMYK",
        "tif": "L RGB CMYK I;16",
        "bmp": "L RGB P",
    }.items():
        for mode in modes.split():
            file = io.BytesIO()
            made[mode].save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
            yield suffix, file.getvalue()


def test_damaged_images_are_skipped_or_read_but_never_break_the_loading(tmp_path):
    chance, whole, read, skipped = random.Random(0), list(pictures()), 0, 0
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "whole.png").write_bytes(whole[0][1])
    for _ in range(10):
        for i in range(200):
            suffix, content = chance.choice(whole)
            (tmp_path / "images" / f"{i}.{suffix}").write_bytes(damaged(content, chance))
        parts, _, notes = load_folder(tmp_path, 8)
        assert all("\n" not in note for note in notes)
        read += sum(len(part.names) for part in parts.values())
        skipped += sum("is skipped" in note for note in notes)
        for path in (tmp_path / "images").glob("[0-9]*"):
            path.unlink()
    assert read > 200 and skipped > 200  # both ways are met


def test_damaged_tables_are_refused_with_their_line_or_understood(tmp_path):
    chance, refused = random.Random(0), 0
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("L", (8, 8), 90).save(tmp_path / "images" / f"{name}.png")
    for _ in range(1000):
        (tmp_path / "labels.csv").write_bytes(damaged(ROWS.encode(), chance))
        try:
            parts, _, _ = load_folder(tmp_path, 8)
            assert sum(len(part.names) for part in parts.values()) == 3
        except DataError as error:
            assert "labels.csv, line " in str(error) and "\n" not in str(error)
            refused += 1
    assert 100 < refused < 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "run"
    argv = "--task classify --train-images 8 --embed-dim 8 --epochs 1 --batch-size 8 --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.DRAWN_SIZES", {"val": 4, "test": 4})
        train.main([*argv.split(), str(out)])
    return out


def test_damaged_checkpoints_are_refused_or_read_and_run_no_code(run, tmp_path):
    chance, refused = random.Random(0), 0
    config, whole = (run / "config.json").read_bytes(), (run / "last.pt").read_bytes()
    for i in range(600):
        (tmp_path / "config.json").write_bytes(damaged(config, chance) if i % 2 else config)
        (tmp_path / "last.pt").write_bytes(whole if i % 2 else damaged(whole, chance))
        try:
            load_model(tmp_path, *load_run(tmp_path))
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "last.pt"]
