"""Each public dataset's layout, in small, becomes a folder that loads, with its masks, labels and splits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.folder import load_folder

RNG = np.random.default_rng(0)
MASK = np.zeros((16, 12), dtype=np.uint8)
MASK[2:9, 3:8] = 255
HALF = np.repeat([[255], [0]], 512, axis=0).astype(np.uint8).repeat(1024, axis=1)


def save(path: Path, pixels: np.ndarray | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(256, size=(16, 12), dtype=np.uint8) if pixels is None else pixels).save(path)


def made(name: str, source: Path):
    """A dataset as it loads: its splits, and {image: labels} over all of them."""
    datasets.main([name, str(source), str(source.parent / name)])
    splits, _, _ = load_folder(source.parent / name, 16)
    return splits, {n: labels for data in splits.values() for n, labels in zip(data.names, data.labels)}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def test_montgomery_and_shenzhen(source):
    for i in range(12):
        name = f"MCUCXR_{i:04d}_{i % 2}.png"
        save(source / "CXR_png" / name)
        for side in ("left", "right"):
            save(source / "ManualMask" / f"{side}Mask" / name, MASK)
        if i:
            save(source / "mask" / f"{name[:-4]}_mask.png", MASK)
    splits, labels = made("montgomery", source)
    assert splits["train"].regions == ["left lung", "right lung"] and splits["train"].has_masks.all()
    assert len(labels) == 12 and all(int(label) == int(name[-5]) for name, label in labels.items())
    splits, _ = made("shenzhen", source)
    assert splits["train"].regions == ["lungs"] and sum(int(d.has_masks.sum()) for d in splits.values()) == 11


def test_jsrt_is_read_from_its_raw_images_as_large_as_its_masks(source):
    source.mkdir()
    for name in ("JPCLN001", "JPCNN002"):
        pixels = np.zeros((2048, 2048), dtype=">u2")
        pixels[1024:] = 4095  # black
        (source / f"{name}.IMG").write_bytes(pixels.tobytes())
        save(source / "fold1" / "masks" / "heart" / f"{name}.gif", HALF)
    splits, labels = made("jsrt", source)
    assert splits["train"].regions == ["heart"] and labels == {"JPCLN001.png": 1, "JPCNN002.png": 0}
    for data in splits.values():  # the bright half is the masked one
        assert torch.equal(data.images[:, 0] > 128, data.masks[:, 0])


def test_nih_14_has_its_own_test_images_and_validates_on_other_patients_than_it_trains_on(source):
    rows = ["Image Index,Finding Labels"]
    for i in range(60):
        name, found = f"{i // 2:08d}_{i % 2:03d}.png", ["Mass|Effusion", "No Finding", "Nodule"][i % 3]
        rows.append(f"{name},{found}")
        save(source / "images_001" / "images" / name)
    (source / "Data_Entry_2017.csv").write_text("\n".join(rows))
    (source / "test_list.txt").write_text("00000005_000.png\n00000005_001.png\n")
    splits, labels = made("nih14", source)
    assert sorted(splits["test"].names) == ["00000005_000.png", "00000005_001.png"]
    assert splits["train"].findings == ["Effusion", "Mass", "Nodule"]
    assert labels["00000000_000.png"].tolist() == [1, 1, 0] and not labels["00000000_001.png"].any()
    patients = [{name[:8] for name in data.names} for data in splits.values()]
    assert sum(map(len, patients)) == 30 and 0 < len(splits["val"].names) < 20


def test_covid_qu_ex_has_three_splits_and_lungs(source):
    for split in ("Train", "Val", "Test"):
        for kind in ("COVID-19", "Normal"):
            save(source / split / kind / "images" / "a.png")
            save(source / split / kind / "lung masks" / "a.png", MASK)
    splits, _ = made("covid_qu_ex", source)
    assert [len(data.names) for data in splits.values()] == [2, 2, 2]
    assert splits["train"].findings == ["COVID-19", "Normal"] and splits["test"].has_masks.all()


def test_mvtec_s_good_parts_have_empty_masks_and_some_defects_are_for_validation(source):
    for i in range(9):
        for name in ("train/good", "test/crack", "test/good"):
            save(source / name / f"00{i}.png")
        save(source / "ground_truth" / "crack" / f"00{i}_mask.png", MASK)
    splits, labels = made("mvtec", source)
    assert sorted(splits["train"].names) == [f"train_good_00{i}.png" for i in range(9)] and len(labels) == 27
    for data in (splits["val"], splits["test"]):
        assert data.has_masks.all() and any("crack" in name for name in data.names)
        assert data.masks.flatten(1).any(dim=1).tolist() == ["crack" in name for name in data.names]


def test_pets_take_the_border_of_the_animal_for_animal(source):
    trimap = np.full((16, 12), 2, dtype=np.uint8)
    trimap[:8], trimap[8] = 1, 3
    for name, table in (("great_pyrenees_1", "trainval"), ("Abyssinian_2", "test")):
        save(source / "images" / f"{name}.jpg")
        save(source / "annotations" / "trimaps" / f"{name}.png", trimap)
        (source / "annotations" / f"{table}.txt").write_text(f"{name} 1 2 1\n")
    splits, _ = made("pets", source)
    assert splits["test"].names == ["Abyssinian_2.jpg"]
    assert splits["train"].findings == ["Abyssinian", "great_pyrenees"]
    assert splits["test"].masks[0, 0].float().mean() == pytest.approx(9 / 16, abs=0.05)


@pytest.mark.parametrize("name, out, words", [("mvtec", "new", "no image was found"), ("pets", "", "exists")])
def test_a_source_of_another_layout_and_an_existing_folder_are_refused(name, out, words, tmp_path, refused):
    assert words in refused(datasets.main, name, str(tmp_path), str(tmp_path / out))
    assert not (tmp_path / "new").exists()
