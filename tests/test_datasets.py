"""Each public dataset's layout, in small, becomes a folder that loads, with its masks, labels and parts."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets as recipes
import train
from common.folder import load_folder

RNG = np.random.default_rng(0)
MASK = np.zeros((16, 12), dtype=np.uint8)
MASK[2:9, 3:8] = 255


def grey(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(256, size=(16, 12), dtype=np.uint8) if pixels is None else pixels).save(path)


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def then(name):
    """What docs/data.md says that SOURCE holds, and the flags to train with after it."""
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    return re.search(rf"\| `{name}` \| `(.*)` \| `(--.*)` \|", page).groups()


def made(name, source):
    """The parts of a dataset as they load after its recipe, joined: names, masks, labels; and which part.

    The line of docs/data.md for it trains on them, too.
    """
    recipes.main([name, str(source), str(source.parent / "out")])
    holds, flags = then(name)
    assert getattr(recipes, name).__doc__ == f"{holds}."
    tiny = "--epochs 1 --embed-dim 24 --depth 1 --num-heads 4 --batch-size 4 --out".split()
    train.main([*flags.split(), "--data", str(source.parent / "out"), *tiny, str(source.parent / "run")])
    parts, sample, _ = load_folder(source.parent / "out", 16)
    where = {n: part for part, data in parts.items() for n in data.names}
    rows = {n: data.labels[i] for data in parts.values() for i, n in enumerate(data.names)}
    return parts, sample, where, rows


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def test_montgomery_and_shenzhen(source):
    for i in range(12):
        name = f"MCUCXR_{i:04d}_{i % 2}.png"
        grey(source / "CXR_png" / name)
        for side in ("left", "right"):
            grey(source / "ManualMask" / f"{side}Mask" / name, MASK)
        if i:
            grey(source / "mask" / f"{name[:-4]}_mask.png", MASK)
    parts, sample, _, rows = made("montgomery", source)
    assert parts["train"].regions == ["left lung", "right lung"] and sample is not None
    assert {name: float(row[0]) for name, row in rows.items()} == {
        f"MCUCXR_{i:04d}_{i % 2}.png": i % 2 for i in range(12)
    }
    (source.parent / "out").rename(source.parent / "one")
    (source.parent / "run").rename(source.parent / "done")
    parts, sample, _, _ = made("shenzhen", source)
    assert parts["train"].regions == ["lungs"] and sum(int(p.has_masks.sum()) for p in parts.values()) == 11


def test_jsrt_is_read_from_its_raw_images_as_large_as_its_masks(source):
    for name in ("JPCLN001", "JPCNN002"):
        (source / "images").mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((2048, 2048), dtype=">u2")
        pixels[1024:] = 4095  # black
        (source / "images" / f"{name}.IMG").write_bytes(pixels.tobytes())
        mask = np.zeros((1024, 1024), dtype=np.uint8)
        mask[:512] = 255
        grey(source / "fold1" / "masks" / "heart" / f"{name}.gif", mask)
    parts, _, _, rows = made("jsrt", source)
    assert parts["train"].regions == ["heart"] and float(rows["JPCLN001.png"]) == 1
    for data in parts.values():  # the bright half is the masked one
        assert torch.equal(data.images[:, 0] > 128, data.masks[:, 0])


def test_chexpert_s_blanks_and_minus_ones_are_unknown_and_patients_stay_together(source):
    head = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "Edema", "Cardiomegaly"]
    train, valid = [head], [head]
    for patient in range(30):
        for view in range(2):
            path = f"train/patient{patient:05d}/study1/view{view}_frontal.jpg"
            of = ["-1.0", "1.0"] if view else ["", "0.0"]
            train.append([f"CheXpert-v1.0-small/{path}", "F", "40", "Frontal", "AP", *of])
            grey(source / path)
    valid.append(
        [
            "CheXpert-v1.0-small/valid/patient9/study1/view1_frontal.jpg",
            "F",
            "4",
            "Frontal",
            "AP",
            "0.0",
            "1.0",
        ]
    )
    grey(source / "valid" / "patient9" / "study1" / "view1_frontal.jpg")
    table(source / "train.csv", train), table(source / "valid.csv", valid)
    parts, _, where, rows = made("chexpert", source)
    assert parts["train"].findings == ["Edema", "Cardiomegaly"]
    for view in range(2):
        known = ~rows[f"train_patient00000_study1_view{view}_frontal.jpg"].isnan()
        assert known.tolist() == [False, True]
    assert rows["valid_patient9_study1_view1_frontal.jpg"].tolist() == [0, 1]
    assert where["valid_patient9_study1_view1_frontal.jpg"] == "test"
    for patient in range(30):
        of = {where[f"train_patient{patient:05d}_study1_view{view}_frontal.jpg"] for view in range(2)}
        assert len(of) == 1
    assert 0 < len(parts["val"].names) < 20


def test_nih_14_has_its_own_test_images(source):
    rows = [["Image Index", "Finding Labels", "Patient ID"]]
    for i, found in enumerate(["Mass|Effusion", "No Finding", "Nodule"] * 3):
        rows.append([f"0000000{i}_000.png", found, str(i)])
        grey(source / "images_001" / "images" / f"0000000{i}_000.png")
    table(source / "Data_Entry_2017.csv", rows)
    (source / "test_list.txt").write_text("00000002_000.png\n00000003_000.png\n")
    parts, _, where, rows = made("nih14", source)
    assert where["00000002_000.png"] == "test" and len(parts["train"].findings) == 14
    assert rows["00000000_000.png"].sum() == 2 and rows["00000001_000.png"].sum() == 0


def test_covid_qu_ex_has_three_parts_and_lungs(source):
    for split in ("Train", "Val", "Test"):
        for kind in ("COVID-19", "Normal"):
            grey(source / split / kind / "images" / "a.png")
            grey(source / split / kind / "lung masks" / "a.png", MASK)
    parts, sample, where, _ = made("covid_qu_ex", source)
    assert {part: len(data.names) for part, data in parts.items()} == {"train": 2, "val": 2, "test": 2}
    assert parts["train"].findings == ["COVID-19", "Normal"] and parts["test"].has_masks.all()


def test_mvtec_s_good_parts_have_empty_masks_and_some_defects_are_there_to_choose_by(source):
    for i in range(9):
        grey(source / "train" / "good" / f"00{i}.png")
        grey(source / "test" / "crack" / f"00{i}.png")
        grey(source / "test" / "good" / f"00{i}.png")
        grey(source / "ground_truth" / "crack" / f"00{i}_mask.png", MASK)
    parts, _, where, _ = made("mvtec", source)
    for part in ("val", "test"):
        assert parts[part].has_masks.all() and any("crack" in name for name in parts[part].names)
        for name, mask in zip(parts[part].names, parts[part].masks):
            assert bool(mask.any()) == ("crack" in name)
    assert {name for name, part in where.items() if part == "train"} == {
        f"train_good_00{i}.png" for i in range(9)
    }


def test_pets_take_the_border_of_the_animal_for_animal(source):
    trimap = np.full((16, 12), 2, dtype=np.uint8)
    trimap[:8], trimap[8] = 1, 3
    for name in ("great_pyrenees_1", "Abyssinian_2"):
        grey(source / "images" / f"{name}.jpg")
        grey(source / "annotations" / "trimaps" / f"{name}.png", trimap)
    (source / "annotations" / "trainval.txt").write_text("great_pyrenees_1 1 2 1\n")
    (source / "annotations" / "test.txt").write_text("Abyssinian_2 2 1 1\n")
    parts, _, where, rows = made("pets", source)
    assert where["Abyssinian_2.jpg"] == "test" and parts["train"].findings == ["Abyssinian", "great_pyrenees"]
    assert parts["test"].masks[0, 0].float().mean() == pytest.approx(9 / 16, abs=0.05)


@pytest.mark.parametrize("name, labels", [("cifar10", 1), ("cifar100", 2)])
def test_cifar_is_read_from_its_binary_version(name, labels, source):
    source.mkdir()
    files = (
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if labels == 1
        else ["train.bin", "test.bin"]
    )
    (source / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt")).write_text("cat\ndog\n")
    for file in files:
        rows = np.zeros((8, labels + 3072), dtype=np.uint8)
        rows[1::2, labels - 1], rows[:, labels : labels + 1024] = 1, 200  # dogs; red
        (source / file).write_bytes(rows.tobytes())
    parts, _, _, rows = made(name, source)
    assert parts["test"].findings == ["cat", "dog"] and len(parts["test"].names) == 8
    assert parts["test"].images[0].float().mean(dim=(1, 2)).tolist() == [200, 0, 0]
    assert len(rows) == 8 * len(files)


def test_a_source_that_is_none_is_refused_in_one_line(source, capsys):
    source.mkdir()
    for argv, line in (
        (["mvtec", source, source.parent / "x"], "no image was found"),
        (["pets", source, source], "exists already"),
    ):
        with pytest.raises(SystemExit) as stop:
            recipes.main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and line in error and error.count("\n") == 1
