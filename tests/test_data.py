"""Every kind of picture and table a user may bring, drawn here: what becomes of it, or how it is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import batches, load
from common.folder import DataError, _split, load_folder, read_masks, select

RNG = np.random.default_rng(0)


def grey(size: int = 16) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size, size), dtype=np.uint8))


def left_half(size: int = 16) -> Image.Image:
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, : size // 2] = 255
    return Image.fromarray(pixels)


def save(path, picture: Image.Image | np.ndarray, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def table(folder, text: str | bytes):
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path):
    """Six grey images a.png … f.png."""
    for name in "abcdef":
        save(tmp_path / "images" / f"{name}.png", grey())
    return tmp_path


def everything(folder, img_size: int = 16, **options):
    """All parts joined in the order of their names, the sample and the notes."""
    parts, sample, notes = load_folder(folder, img_size, **options)
    rows = sorted((name, part, i) for part, data in parts.items() for i, name in enumerate(data.names))
    found = {name: select(parts[part], torch.tensor([i])) for name, part, i in rows}
    return found, sample, notes


def read_one(tmp_path, picture, name: str = "x.png", img_size: int = 16, **options) -> torch.Tensor:
    """(C, S, S): what becomes of one picture alone in a folder."""
    save(tmp_path / "images" / name, picture, **options)
    return load_folder(tmp_path, img_size)[0]["train"].images[0]


def refusal(folder, **options) -> str:
    with pytest.raises(DataError) as error:
        load_folder(folder, 16, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Parts


def test_a_folder_becomes_three_parts_of_uint8_images(folder):
    parts, sample, notes = load_folder(str(folder), 12)
    assert [len(parts[part].names) for part in ("train", "val", "test")] == [4, 1, 1]
    for data in parts.values():
        assert data.images.shape == (len(data.names), 1, 12, 12) and data.images.dtype == torch.uint8
        assert data.masks is None and data.labels is None and not data.has_masks.any()
        assert data.regions == [] and data.findings == []
    assert sample is None and notes == []


def test_the_split_follows_from_the_names_alone():
    names = [f"{i}.png" for i in range(100)]
    split = _split(names)
    assert split == _split(names[::-1])
    assert [list(split.values()).count(part) for part in ("train", "val", "test")] == [70, 15, 15]
    assert [name for name in names if split[name] == "test"][:4] == ["7.png", "10.png", "11.png", "19.png"]


def test_three_images_are_one_for_each_part():
    assert sorted(_split(["a", "b", "c"]).values()) == ["test", "train", "val"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images_all_train(tmp_path, count):
    for i in range(count):
        save(tmp_path / "images" / f"{i}.png", grey())
    parts, _, notes = load_folder(tmp_path, 16)
    assert [len(parts[part].names) for part in ("train", "val", "test")] == [count, 0, 0]
    assert parts["val"].images.shape == (0, 1, 16, 16)
    assert any("no images in val" in note for note in notes) and any("in test" in note for note in notes)


def test_select_takes_everything_that_belongs_to_an_image(folder):
    for name in "abcdef":
        save(folder / "masks" / "heart" / f"{name}.png", left_half())
    table(folder, "file,sick,split\n" + "".join(f"{n}.png,{i % 2},train\n" for i, n in enumerate("abcdef")))
    train = load_folder(folder, 16)[0]["train"]
    for index in (torch.tensor([1, 4]), torch.tensor([False, True, False, False, True, False])):
        some = select(train, index)
        assert some.names == ["b.png", "e.png"] and some.labels.tolist() == [[1], [0]]
        assert torch.equal(some.images, train.images[[1, 4]]) and some.masks.shape == (2, 1, 16, 16)
        assert some.has_masks.tolist() == [True, True] and some.regions == ["heart"]


def test_class_folders_give_one_hot_labels(tmp_path):
    for name in ("good/1.png", "good/2.png", "bad/1.png"):
        save(tmp_path / name, grey())
    (tmp_path / "empty").mkdir()
    found, sample, _ = everything(tmp_path)
    assert {name: data.labels[0].tolist() for name, data in found.items()} == {
        "bad/1.png": [1, 0],
        "good/1.png": [0, 1],
        "good/2.png": [0, 1],
    }
    assert found["bad/1.png"].findings == ["bad", "good"] and sample is None


def test_masks_without_images_are_no_class(tmp_path):
    save(tmp_path / "image" / "a.png", grey())
    save(tmp_path / "masks" / "a.png", left_half())
    assert "no images/" in refusal(tmp_path)


def test_a_missing_or_empty_folder_is_told_the_layout(tmp_path):
    assert "images/" in refusal(tmp_path / "nowhere") and "nowhere" in refusal(tmp_path / "nowhere")
    assert "one folder of images per class" in refusal(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert "one folder of images per class" in refusal(tmp_path)


# Images


def test_suffixes_of_any_case_are_read_and_hidden_files_are_not(tmp_path):
    names = ["a.PNG", "b.jpg", "c.JPEG", "d.bmp", "e.tif", "f.tiff", "g.gif", "h.webp", "i.pgm"]
    for name in names + [".hidden.png"]:
        save(tmp_path / "images" / name, grey())
    (tmp_path / "images" / "readme.txt").write_text("no image")
    found, _, notes = everything(tmp_path)
    assert list(found) == names and notes == []


def test_an_eight_bit_grey_image_is_kept_as_it_is(tmp_path):
    picture = grey()
    assert read_one(tmp_path, picture).tolist() == [np.asarray(picture).tolist()]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_a_sixteen_bit_image_is_stretched_from_its_minimum_to_its_maximum(tmp_path, name):
    ramp = np.linspace(1000, 1256, 256).reshape(16, 16).astype(np.uint16)  # its high bytes: 2 levels
    expected = np.rint((ramp - 1000.0) * 255 / 256)
    assert read_one(tmp_path, ramp, name)[0].tolist() == expected.tolist()


def test_a_big_endian_sixteen_bit_image_reads_like_a_little_endian_one(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    big = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    assert read_one(tmp_path, big, "x.tif").flatten().tolist() == list(range(256))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_float_and_long_integer_images_are_stretched(tmp_path, kind):
    ramp = (np.arange(256).reshape(16, 16) * 1000 - 70000).astype(kind)
    assert read_one(tmp_path, ramp, "x.tif").flatten().tolist() == list(range(256))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("low, high", [(0, 1e-35), (-3e38, 3e38)])
def test_floats_of_any_range_are_stretched(low, high, tmp_path):
    ramp = (low + np.linspace(0, 1, 256) * (high - low)).reshape(16, 16).astype(np.float32)
    assert read_one(tmp_path, ramp, "x.tif").flatten().tolist() == list(range(256))


def test_a_sixteen_bit_image_is_stretched_by_the_extremes_before_the_resize(tmp_path):
    columns = np.tile(np.array([1000, 1256], dtype=np.uint16), (32, 16))
    image = read_one(tmp_path, columns, img_size=8)
    assert 110 < image.min() and image.max() < 145


@pytest.mark.filterwarnings("error")
def test_a_constant_sixteen_bit_image_is_black(tmp_path):
    assert read_one(tmp_path, np.full((16, 16), 777, dtype=np.uint16)).max() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_that_is_no_number_is_refused(tmp_path, value):
    pixels = np.ones((16, 16), dtype=np.float32)
    pixels[3, 4] = value
    save(tmp_path / "images" / "x.tif", pixels)
    assert "x.tif" in refusal(tmp_path) and "NaN" in refusal(tmp_path)


def test_a_one_bit_image_becomes_black_and_white(tmp_path):
    image = read_one(tmp_path, left_half().convert("1"))
    assert image.shape == (1, 16, 16) and image[0, 0].tolist() == [255] * 8 + [0] * 8


def test_a_palette_image_shows_its_colours(tmp_path):
    image = read_one(tmp_path, Image.new("RGB", (16, 16), (200, 30, 60)).quantize(4))
    assert image[:, 0, 0].tolist() == [200, 30, 60]


def test_a_transparent_palette_entry_is_black(tmp_path):
    picture = Image.fromarray(np.asarray(left_half()) // 255).convert("P")
    picture.putpalette([200, 30, 60, 10, 20, 30])
    image = read_one(tmp_path, picture, transparency=0)
    assert image[:, 0, 0].tolist() == [10, 20, 30] and image[:, 0, 15].tolist() == [0, 0, 0]


def test_transparency_lies_on_black(tmp_path):
    half_red = read_one(tmp_path, Image.new("RGBA", (16, 16), (200, 0, 0, 128)))
    assert half_red[:, 0, 0].tolist() == [100, 0, 0]
    half_grey = read_one(tmp_path, Image.new("LA", (16, 16), (200, 128)))
    assert half_grey.shape[0] == 1 and half_grey[0, 0, 0] == 100


def test_a_cmyk_image_becomes_rgb(tmp_path):
    image = read_one(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.tif")
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = read_one(tmp_path, left_half(), "x.jpg", exif=exif, quality=95)
    assert image[0, 8, 2] < 20 and image[0, 8, 13] > 235


def test_one_colour_image_gives_all_images_three_channels(folder):
    before = everything(folder)[0]["a.png"].images
    save(folder / "images" / "z.png", Image.new("RGB", (16, 16), "red"))
    after = everything(folder)[0]["a.png"].images
    assert before.shape == (1, 1, 16, 16) and torch.equal(after, before.repeat(1, 3, 1, 1))


def test_grey_stored_as_rgb_is_still_grey(tmp_path):
    assert read_one(tmp_path, grey().convert("RGB")).shape == (1, 16, 16)


def test_an_image_is_shrunk_without_aliasing(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = read_one(tmp_path, board, img_size=16)
    assert 120 < image.min() and image.max() < 136


# Damaged images


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp", "pgm"])
def test_a_truncated_image_is_skipped_with_a_note(folder, suffix):
    broken = save(folder / "images" / f"broken.{suffix}", grey(128))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    found, _, notes = everything(folder)
    assert list(found) == [f"{name}.png" for name in "abcdef"]
    assert len(notes) == 1 and f"broken.{suffix} is skipped: " in notes[0]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


@pytest.mark.parametrize("content", [b"", b"not an image", POSTSCRIPT])
def test_a_file_that_is_no_image_is_skipped_with_a_note(folder, content):
    (folder / "images" / "broken.png").write_bytes(content)
    found, _, notes = everything(folder)
    assert len(found) == 6 and len(notes) == 1 and "broken.png is skipped: cannot identify" in notes[0]


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_an_image_under_eight_pixels_is_skipped_with_a_note(folder, size):
    save(folder / "images" / "tiny.png", Image.new("L", size))
    found, _, notes = everything(folder)
    assert len(found) == 6 and len(notes) == 1 and f"{size[0]} x {size[1]} px" in notes[0]


@pytest.mark.parametrize("limit", [200, 300])  # beyond twice the limit Pillow raises, below it only warns
def test_a_decompression_bomb_is_skipped_with_a_note(folder, limit, monkeypatch):
    save(folder / "images" / "bomb.png", Image.new("L", (21, 21)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 200:
        for name in "abcdef":
            save(folder / "images" / f"{name}.png", grey(12))
    found, _, notes = everything(folder)
    assert len(found) == 6 and len(notes) == 1 and "bomb.png is skipped: " in notes[0]
    assert "300 px are the most" in notes[0] or limit == 200 and "Image size" in notes[0]


def test_a_folder_without_any_readable_image_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert "a.png" in refusal(tmp_path) and "none of 1 images" in refusal(tmp_path)


# Masks


def masks_of(folder, picture, image_size: int = 16) -> torch.Tensor:
    """(S, S) bool: the heart mask of a.png, made from `picture`."""
    save(folder / "images" / "a.png", grey(image_size))
    save(folder / "masks" / "heart" / "a.tif", picture)
    found, sample, _ = everything(folder)
    assert sample == "a.png" and found["a.png"].has_masks[0]
    return found["a.png"].masks[0, 0]


LEFT = np.asarray(left_half()) > 0
ONES = Image.fromarray(LEFT.astype(np.uint8))
EDGE = Image.fromarray(np.repeat(np.eye(1, 16, dtype=np.uint8), 16, axis=0))  # the first column
ALIKE = {
    "0/255": left_half(),
    "0/1": ONES,
    "one bit": left_half().convert("1"),
    "soft grey": np.where(LEFT, 120, 40).astype(np.uint8),
    "a blue of one beside white": Image.merge("RGB", [EDGE, EDGE, ONES]),
    "alpha": Image.merge("LA", [Image.new("L", (16, 16), 255), left_half()]),
    "sixteen bit": LEFT.astype(np.uint16),
    "float": LEFT.astype(np.float32),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_masks_of_every_kind_mean_the_same(folder, kind):
    assert torch.equal(masks_of(folder, ALIKE[kind]), torch.from_numpy(LEFT))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_that_is_full_everywhere_is_full_and_a_zero_one_is_known_and_empty(folder, kind):
    assert masks_of(folder, np.ones((16, 16), dtype=kind)).all()
    assert not masks_of(folder, np.zeros((16, 16), dtype=kind)).any()


def test_a_large_mask_shrinks_by_majority(folder):
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, :32] = 255
    mask[::4, 40] = 255  # specks
    assert torch.equal(masks_of(folder, mask, image_size=64), torch.from_numpy(LEFT))


def test_has_masks_means_every_region(folder):
    for name in ("heart/a.png", "heart/b.png", "lung/b.png"):
        save(folder / "masks" / name, left_half())
    found, sample, _ = everything(folder)
    assert sample == "b.png" and found["a.png"].regions == ["heart", "lung"]
    assert [name for name, data in found.items() if data.has_masks[0]] == ["b.png"]
    assert found["a.png"].masks[0].any(dim=2).any(dim=1).tolist() == [True, False]
    assert not found["c.png"].masks.any()


def test_two_masks_of_one_stem_are_refused(folder):
    save(folder / "masks" / "heart" / "a.png", left_half())
    save(folder / "masks" / "heart" / "a.bmp", left_half())
    assert "a.bmp" in refusal(folder) and "remove one" in refusal(folder)


def test_images_of_one_stem_keep_their_own_masks(folder):
    save(folder / "images" / "a.jpg", grey())
    save(folder / "masks" / "heart" / "a.png", left_half())
    found, _, notes = everything(folder)
    assert found["a.png"].has_masks[0] and not found["a.jpg"].has_masks[0] and notes == []


def test_a_mask_of_another_size_is_refused_with_both_sizes(folder):
    save(folder / "masks" / "heart" / "a.png", Image.new("L", (20, 10)))
    message = refusal(folder)
    assert "heart/a.png is 20 x 10 px" in message and "images/a.png is 16 x 16 px" in message


def test_a_mask_fits_its_image_after_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 32 x 16 becomes 16 x 32
    save(tmp_path / "images" / "a.jpg", Image.new("L", (32, 16)), exif=exif)
    save(tmp_path / "masks" / "heart" / "a.png", Image.new("L", (16, 32), 255))
    assert everything(tmp_path)[1] == "a.jpg"
    save(tmp_path / "masks" / "heart" / "a.png", Image.new("L", (32, 16), 255))
    assert "16 x 32" in refusal(tmp_path)


def test_a_broken_mask_is_refused(folder):
    path = save(folder / "masks" / "heart" / "a.png", left_half())
    path.write_bytes(path.read_bytes()[:50])
    assert "heart/a.png: this mask cannot be read" in refusal(folder)


@pytest.mark.parametrize("link", ["heart", "heart/a.png"])
def test_a_mask_that_is_a_link_out_of_its_folder_is_refused_by_name(folder, link):
    save(folder / "elsewhere" / "a.png", grey())
    (folder / "masks" / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / "masks" / link).symlink_to(folder / "elsewhere" / Path(link).relative_to("heart"))
    assert f"masks/{link} is a link that leads out of" in refusal(folder)
    with pytest.raises(DataError, match="is a link that leads out of|holds no mask"):
        read_masks(folder / "masks", str(folder), ["a.png"], 16)


def test_a_table_that_names_a_file_outside_is_refused(folder):
    save(folder / "secret.png", grey())
    (folder / "labels.csv").write_text("file,label\n../secret.png,x\n")
    assert "labels.csv, line 2: no `../secret.png` in images/" in refusal(folder)


def test_a_mask_without_an_image_is_noted(folder):
    for name in ("a.png", "zebra.png"):
        save(folder / "masks" / "heart" / name, left_half())
    _, sample, notes = everything(folder)
    assert sample == "a.png" and len(notes) == 1 and "heart/zebra.png is not used" in notes[0]


def test_a_mask_of_a_skipped_image_is_not_noted(folder):
    (folder / "images" / "b.png").write_bytes(b"")
    for name in ("a.png", "b.png"):
        save(folder / "masks" / "heart" / name, left_half())
    assert len(everything(folder)[2]) == 1


# The labelled sample


def test_without_a_completely_masked_image_there_is_no_sample_but_a_note(folder):
    (folder / "masks").mkdir()
    _, sample, notes = everything(folder)
    assert sample is None and len(notes) == 1 and "no folder per region" in notes[0]
    save(folder / "masks" / "heart" / "a.png", left_half())
    (folder / "masks" / "lung").mkdir()
    _, sample, notes = everything(folder)
    assert sample is None and len(notes) == 1 and "heart has 1, lung has 0" in notes[0]


def test_the_sample_is_the_first_of_train_with_all_masks(folder):
    table(folder, "file,split\na.png,test\nb.png,val\nc.png,train\nd.png,train\ne.png,train\nf.png,train\n")
    for name in "abde":
        save(folder / "masks" / "heart" / f"{name}.png", left_half())
    parts, sample, notes = load_folder(folder, 16)
    assert sample == "d.png" and sample in parts["train"].names and notes == []


def test_a_sample_from_val_or_test_moves_to_train_with_a_note(folder):
    table(folder, "file,split\na.png,test\nb.png,test\nc.png,val\nd.png,val\n")
    for name in "bd":
        save(folder / "masks" / "heart" / f"{name}.png", left_half())
    parts, sample, notes = load_folder(folder, 16)
    assert sample == "d.png" and parts["train"].names == ["d.png", "e.png", "f.png"]
    assert parts["val"].names == ["c.png"]
    assert notes == ["d.png moves from val to train as the labelled sample"]
    parts, sample, notes = load_folder(folder, 16, sample="b.png")
    assert sample == "b.png" and "b.png" in parts["train"].names and len(notes) == 1


def test_a_sample_must_be_readable_and_have_every_mask(folder):
    (folder / "images" / "broken.png").write_bytes(b"")
    for name in ("heart/a.png", "heart/b.png", "lung/b.png"):
        save(folder / "masks" / name, left_half())
    assert everything(folder, sample="b.png")[1] == "b.png"
    assert "masks/lung/a.png" in refusal(folder, sample="a.png")
    assert "masks/heart/c.png" in refusal(folder, sample="c.png")
    for name in ("nobody.png", "broken.png", "b"):
        assert f"`{name}` is no readable image" in refusal(folder, sample=name)


# labels.csv


def test_a_label_column_becomes_one_hot_over_the_sorted_classes(folder):
    table(folder, "file,label\na.png,dog\nb.png,cow\nc.png,cat\nd.png,ape\ne.png,\n")
    found, _, _ = everything(folder)
    assert found["a.png"].findings == ["ape", "cat", "cow", "dog"]
    assert found["a.png"].labels.dtype == torch.float32
    assert found["a.png"].labels.tolist() == [[0, 0, 0, 1]]
    assert found["b.png"].labels.tolist() == [[0, 0, 1, 0]]
    assert found["e.png"].labels.isnan().all() and found["f.png"].labels.isnan().all()


def test_finding_columns_are_multi_label_and_blank_is_unknown(folder):
    table(folder, "\ufefffile, nodule ,effusion\r\na.png,1,1\r\nb.png, ,0.0\r\n\r\n")
    found, _, _ = everything(folder)
    assert found["a.png"].findings == ["nodule", "effusion"] and found["a.png"].labels.tolist() == [[1, 1]]
    assert found["b.png"].labels.isnan().tolist() == [[True, False]] and found["c.png"].labels.isnan().all()


def test_a_table_without_findings_gives_no_labels(folder):
    table(folder, "file,label\na.png,\n")
    assert everything(folder)[0]["a.png"].labels is None


@pytest.mark.parametrize("findings", ["", ",label", ",nodule"])
def test_a_split_column_decides_and_unlisted_images_train(folder, findings):
    value = ",1" if findings else ""
    table(folder, f"file,split{findings}\na.png,test{value}\nb.png,val{value}\nc.png,val{value}\n")
    parts, _, _ = load_folder(folder, 16)
    names = {part: data.names for part, data in parts.items()}
    assert names == {"train": ["d.png", "e.png", "f.png"], "val": ["b.png", "c.png"], "test": ["a.png"]}


def test_a_row_of_a_skipped_image_is_ignored(folder):
    (folder / "images" / "b.png").write_bytes(b"")
    table(folder, "file,nodule\na.png,1\nb.png,0\n")
    found, _, notes = everything(folder)
    assert len(found) == 5 and len(notes) == 1 and found["a.png"].labels.tolist() == [[1]]


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("", 1, "`file`"),
        ("name,label\na.png,x\n", 1, "name,label"),
        ("file;label\na.png;x\n", 1, "commas"),
        ("file,nodule,nodule\na.png,1,1\n", 1, "once"),
        (",file,nodule\n0,a.png,1\n", 1, "name each column"),
        ("file,label,age\na.png,x,63\n", 1, "unknown column `age` beside `label`"),
        ("file,nodule\na.png,1\nb.png,0\na.png,1\n", 4, "`a.png` is listed twice"),
        ("file,nodule\na.png,1\nnobody.png,0\n", 3, "no `nobody.png` in images/"),
        ("file,nodule\n../images/a.png,1\n", 2, "no `../images/a.png` in images/"),
        ("file,nodule\n/etc/passwd,1\n", 2, "no `/etc/passwd` in images/"),
        ("file,nodule\na,1\n", 2, "suffix"),
        ("file,nodule,age\na.png,1,63\n", 2, "column `age` holds `63`; remove it or use 0, 1 or blank"),
        ("file,nodule\na.png,-1\n", 2, "`-1`"),
        ("file,nodule,split\na.png,1,Test\n", 2, "split `Test` is not train, val or test"),
        ("file,nodule,split\na.png,1,\n", 2, "split ``"),
        ("file,nodule\n\na.png,1,0\n", 3, "3 cells, not 2"),
        ("file,nodule\na.png\n", 2, "1 cells, not 2"),
        ('file,nodule\n"a.png,1\nb.png,0\n', 3, "quotes"),
        ('file,nodule\n"a\nb.png",1\n', 3, "no `a b.png`"),
        ("file,label\na.png,gesund\nb.png,gro\xdf\n".encode("latin-1"), 3, "0xdf is not UTF-8"),
        ("file,label\na.png,x\n".encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_a_faulty_table_is_refused_with_its_line(folder, text, line, words):
    table(folder, text)
    message = refusal(folder)
    assert f"labels.csv, line {line}: " in message and words in message


# The marker


def test_the_marker_agrees_as_often_as_asked_and_is_removed_and_flipped_in_test_images():
    bare, _, _ = load("phantom", 64, seed=1, train_images=200, findings=["nodule", "opacity"])
    for agreement in (1.0, 0.8):
        parts, _, _ = load("phantom", 64, 1, 200, marker=agreement, findings=["nodule", "opacity"])
        present = {part: (d.images[:, 0, 2:8, -8] == 255).all(dim=1) for part, d in parts.items()}
        for part in ("train", "val", "test"):
            label = parts[part].labels[:, 0] == 1
            assert (present[part] == label).float().mean().item() == pytest.approx(agreement, abs=0.08)
            assert torch.equal(parts[part].labels, bare[part].labels)
        assert not present["removed"].any() and torch.equal(present["flipped"], ~present["test"])
        assert torch.equal(parts["removed"].images, bare["test"].images)
        assert torch.equal(parts["flipped"].images[..., 8:, :], parts["test"].images[..., 8:, :])
        new = (parts["unseen"].images != bare["test"].images).any(dim=3)[:, 0]  # a disc in the lower corner
        assert torch.equal(new[:, 54:].any(dim=1), ~present["test"]) and not new[:, :54].any()


@pytest.mark.parametrize("kind", ["anywhere", "tint", "border"])
def test_a_marker_of_any_kind_lies_at_the_same_place_in_test_images_and_in_flipped_ones(kind):
    bare, _, _ = load("phantom", 64, seed=1, train_images=2)
    parts, _, _ = load("phantom", 64, 1, 2, marker=1.0, marker_kind=kind)
    test, flipped, without = parts["test"].images, parts["flipped"].images, bare["test"].images
    label = parts["test"].labels[:, 0] == 1
    assert torch.equal(torch.where(label[:, None, None, None], flipped, test), without)
    again, _, _ = load("phantom", 64, 1, 2, marker=0.0, marker_kind=kind)
    assert torch.equal(again["test"].images, flipped)


def test_a_single_finding_becomes_two_classes():
    parts, _, _ = load("phantom", 64, train_images=20, findings=["nodule"])
    many, _, _ = load("phantom", 64, train_images=20)
    assert parts["val"].findings == ["no nodule", "nodule"]
    assert torch.equal(parts["val"].labels[:, 1], many["val"].labels[:, 2])
    assert (parts["val"].labels.sum(dim=1) == 1).all()


def test_findings_and_markers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="finding `gout` is not in phantom; it has enlarged heart"):
        load("phantom", 64, train_images=2, findings=["gout"])
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match="a marker can be drawn only on phantoms"):
        load(str(tmp_path), 16, marker=1.0)


def test_batches_are_as_encoders_expect_them_and_where_the_model_is():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None, None]
    parts = list(batches(images, torch.nn.Linear(1, 1), size=2))
    assert [len(part) for part in parts] == [2, 1]
    torch.testing.assert_close(torch.cat(parts).flatten(), torch.tensor([-2.0, 2.0, -1.2]))
    (part,) = batches(images[:1], torch.nn.Linear(1, 1, device="meta"))
    assert part.device.type == "meta"
