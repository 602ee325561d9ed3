"""Data folders with images, masks and tables of every kind: what becomes of them, or how they are refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import SPLITS, SUFFIXES, DataError, batches, load, load_folder
from common.data import placed, read_masks, select, take

RNG = np.random.default_rng(0)


def grey(size: int = 16) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size, size), dtype=np.uint8))


LEFT = np.indices((16, 16))[1] < 8
HALF = Image.fromarray(255 * LEFT.astype(np.uint8))


def save(path: Path, picture: Image.Image | np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def add_masks(folder: Path, *names: str):
    for name in names:
        save(folder / "masks" / name, HALF)


def table(folder: Path, text: str | bytes):
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path):
    """Six grey images a.png to f.png."""
    for name in "abcdef":
        save(tmp_path / "images" / f"{name}.png", grey())
    return tmp_path


def everything(folder, img_size: int = 16, **options):
    """{name: its Data} of all splits, the reference image and the notes."""
    splits, reference, notes = load_folder(folder, img_size, **options)
    found = {n: select(d, torch.tensor([i])) for d in splits.values() for i, n in enumerate(d.names)}
    return dict(sorted(found.items())), reference, notes


def read_one(tmp_path, picture, name: str = "x.png", img_size: int = 16, **options) -> torch.Tensor:
    """(C, S, S): what becomes of a picture that is alone in a folder."""
    save(tmp_path / "images" / name, picture, **options)
    return load_folder(tmp_path, img_size)[0]["train"].images[0]


def refusal(folder, **options) -> str:
    with pytest.raises(DataError) as error:
        load_folder(folder, 16, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_becomes_three_splits_of_uint8_images(folder):
    splits, reference, notes = load_folder(str(folder), 12)
    assert [len(splits[split].names) for split in SPLITS] == [4, 1, 1]
    for data in splits.values():
        assert data.images.shape == (len(data.names), 1, 12, 12) and data.images.dtype == torch.uint8
        assert data.masks is None and data.labels is None and not data.has_masks.any()
    assert reference is None and notes == []
    save(folder / "images" / "z.png", Image.new("RGB", (12, 12), "red"))
    coloured = load_folder(folder, 12)[0]["train"]  # one colour image gives all of them three channels
    assert torch.equal(coloured.images[0], splits["train"].images[0].expand(3, -1, -1))


def test_the_names_alone_decide_on_the_split(tmp_path):
    for i in range(100):
        save(tmp_path / "images" / f"{i:02d}.png", grey(8))
    splits = load_folder(tmp_path, 8)[0]
    assert [len(splits[split].names) for split in SPLITS] == [70, 15, 15]
    assert splits["test"].names[:4] == ["04.png", "05.png", "10.png", "11.png"]


@pytest.mark.parametrize("count, sizes", [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1])])
def test_one_or_two_images_all_train_and_three_are_one_for_each_split(tmp_path, count, sizes):
    for i in range(count):
        save(tmp_path / "images" / f"{i}.png", grey())
    splits, _, notes = load_folder(tmp_path, 16)
    assert [len(splits[split].images) for split in SPLITS] == sizes
    assert ["no images in val" in note for note in notes] == ([] if count == 3 else [True, False])


def test_select_takes_everything_that_belongs_to_an_image(folder):
    add_masks(folder, *(f"heart/{name}.png" for name in "abcdef"))
    table(folder, "file,sick,split\n" + "".join(f"{n}.png,{i % 2},train\n" for i, n in enumerate("abcdef")))
    train = load_folder(folder, 16)[0]["train"]
    for index in (torch.tensor([1, 4]), torch.tensor([False, True, False, False, True, False])):
        some = select(train, index)
        assert some.names == ["b.png", "e.png"] and some.labels.tolist() == [[1], [0]]
        assert torch.equal(some.images, train.images[[1, 4]]) and len(some.masks) == len(some.has_masks) == 2


def test_class_folders_give_one_hot_labels(tmp_path):
    for name in ("bad/1.png", "good/1.png", "good/2.png"):
        save(tmp_path / name, grey())
    found, reference, _ = everything(tmp_path)
    assert list(found) == ["bad/1.png", "good/1.png", "good/2.png"] and reference is None
    assert [data.labels[0].tolist() for data in found.values()] == [[1, 0], [0, 1], [0, 1]]
    assert found["bad/1.png"].findings == ["bad", "good"]


def test_a_folder_without_images_is_refused(tmp_path):
    assert "nowhere is not a folder; expected images/" in refusal(tmp_path / "nowhere")
    assert "one folder of images per class" in refusal(tmp_path)
    add_masks(tmp_path, "a.png")  # masks are no class
    assert "no images/" in refusal(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert "none of 1 images can be read" in refusal(tmp_path) and "a.png" in refusal(tmp_path)


def test_suffixes_of_any_case_are_read_and_hidden_files_are_not(tmp_path):
    names = ["a.PNG", "b.jpg", "c.JPEG", "d.bmp", "e.tif", "f.tiff", "g.gif", "h.webp", "i.pgm"]
    for name in names + [".hidden.png"]:
        save(tmp_path / "images" / name, grey())
    found, _, notes = everything(tmp_path)
    assert list(found) == names and notes == []


RAMP = np.arange(256).reshape(16, 16)
STRETCHED = {  # all become the numbers from 0 to 255
    "x.png": (1000 + RAMP).astype(np.uint16),  # two levels in the high byte
    "x.pgm": (1000 + RAMP).astype(np.uint16),
    "big endian.tif": Image.frombytes("I;16B", (16, 16), (RAMP * 16).astype(">u2").tobytes()),
    "float.tif": (RAMP * 1000 - 70000).astype(np.float32),
    "integer.tif": (RAMP * 1000 - 70000).astype(np.int32),
    "tiny.tif": (np.linspace(0, 1, 256) * 1e-35).reshape(16, 16).astype(np.float32),
    "huge.tif": (-3e38 + np.linspace(0, 1, 256) * 6e38).reshape(16, 16).astype(np.float32),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STRETCHED)
def test_deep_grey_of_any_range_is_stretched_from_its_minimum_to_its_maximum(tmp_path, name):
    assert read_one(tmp_path, STRETCHED[name], name).flatten().tolist() == list(range(256))


@pytest.mark.filterwarnings("error")
def test_deep_grey_is_stretched_before_the_resize_and_black_if_it_is_constant(tmp_path):
    columns = np.tile(np.array([1000, 1256], dtype=np.uint16), (32, 16))
    image = read_one(tmp_path, columns, img_size=8)
    assert 110 < image.min() and image.max() < 145
    assert read_one(tmp_path, np.full((16, 16), 777, dtype=np.uint16)).max() == 0


PALETTE = Image.fromarray(LEFT.astype(np.uint8)).convert("P")
PALETTE.putpalette([200, 30, 60, 10, 20, 30])
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3
SHOWN = {  # what the upper left and the upper right pixel become
    "one bit.png": (HALF.convert("1"), [255], [0], {}),
    "eight bit.png": (HALF, [255], [0], {}),
    "grey as RGB.png": (HALF.convert("RGB"), [255], [0], {}),
    "palette.png": (PALETTE, [10, 20, 30], [200, 30, 60], {}),
    "transparent entry.png": (PALETTE, [10, 20, 30], [0, 0, 0], {"transparency": 0}),
    "half red.png": (Image.new("RGBA", (16, 16), (200, 0, 0, 128)), [100, 0, 0], [100, 0, 0], {}),
    "half grey.png": (Image.new("LA", (16, 16), (200, 128)), [100], [100], {}),
    "cmyk.tif": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), [255, 0, 0], [255, 0, 0], {}),
    "upside down.png": (HALF, [0], [255], {"exif": UPSIDE_DOWN}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_image_becomes_what_it_shows_in_as_many_channels_as_needed(tmp_path, name):
    picture, left, right, options = SHOWN[name]
    image = read_one(tmp_path, picture, name, **options)
    assert image[:, 0, 0].tolist() == left and image[:, 0, 15].tolist() == right


def test_an_image_is_shrunk_without_aliasing(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = read_one(tmp_path, board, img_size=16)
    assert 120 < image.min() and image.max() < 136


def encoded(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, Image.registered_extensions()[suffix])
    return file.getvalue()


NOISE = RNG.integers(0, 256, (99, 99), dtype=np.uint8)
DAMAGED = {f"half{suffix}": (encoded(NOISE, suffix)[:2000], "cannot be read") for suffix in SUFFIXES} | {
    "empty.png": (b"", "cannot identify"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    "narrow.png": (encoded(NOISE[:, :7]), "7 x 99 px"),
    "low.png": (encoded(NOISE[:7]), "99 x 7 px"),
    "infinite.tif": (encoded(np.full((9, 9), np.inf, dtype=np.float32), ".tif"), "NaN or infinite"),
    "bomb.png": (encoded(NOISE.repeat(2, 0)[:110]), "the limit is 10000 px"),  # of which Pillow only warns
    "larger bomb.png": (encoded(NOISE.repeat(3, 0)), "could be decompression bomb"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", DAMAGED)
def test_an_image_that_cannot_be_used_is_skipped_with_a_note(folder, name, monkeypatch):
    content, words = DAMAGED[name]
    (folder / "images" / name).write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    found, _, notes = everything(folder)
    assert list(found) == [f"{name}.png" for name in "abcdef"] and len(notes) == 1
    assert notes[0].startswith("skipped ") and f"images/{name}: " in notes[0] and words in notes[0]


def mask_of(folder, picture, image_size: int = 16) -> torch.Tensor:
    """(S, S) bool: the heart mask of a.png, made from `picture`."""
    save(folder / "images" / "a.png", grey(image_size))
    save(folder / "masks" / "heart" / "a.tif", picture)
    found, reference, _ = everything(folder)
    assert reference == "a.png" and found["a.png"].has_masks[0]
    return found["a.png"].masks[0, 0]


ONES = Image.fromarray(LEFT.astype(np.uint8))
EDGE = Image.fromarray(np.repeat(np.eye(1, 16, dtype=np.uint8), 16, axis=0))  # the first column
ALIKE = {
    "0/255": HALF,
    "0/1": ONES,
    "one bit": HALF.convert("1"),
    "soft grey": np.where(LEFT, 120, 40).astype(np.uint8),
    "a blue of one beside white": Image.merge("RGB", [EDGE, EDGE, ONES]),
    "alpha": Image.merge("LA", [Image.new("L", (16, 16), 255), HALF]),
    "sixteen bit": LEFT.astype(np.uint16),
    "float": LEFT.astype(np.float32),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_masks_of_every_kind_mean_the_same(folder, kind):
    assert torch.equal(mask_of(folder, ALIKE[kind]), torch.from_numpy(LEFT))


def test_a_full_mask_is_full_a_zero_one_is_known_and_empty_and_a_large_one_shrinks_by_majority(folder):
    for kind in (np.uint8, np.uint16):
        assert mask_of(folder, np.ones((16, 16), dtype=kind)).all()
        assert not mask_of(folder, np.zeros((16, 16), dtype=kind)).any()
    mask = np.kron(LEFT, np.ones((4, 4))).astype(np.uint8)
    mask[::4, 40] = 1  # specks
    assert torch.equal(mask_of(folder, mask, image_size=64), torch.from_numpy(LEFT))


def test_has_masks_means_every_region(folder):
    add_masks(folder, "heart/a.png", "heart/b.png", "lung/b.png")
    found, reference, _ = everything(folder)
    assert reference == "b.png" and found["a.png"].regions == ["heart", "lung"]
    assert [name for name, data in found.items() if data.has_masks[0]] == ["b.png"]
    assert found["a.png"].masks[0].any(dim=2).any(dim=1).tolist() == [True, False]
    assert not found["c.png"].masks.any()


def test_images_of_one_stem_keep_their_own_masks_and_two_masks_of_one_image_are_refused(folder):
    save(folder / "images" / "a.jpg", grey())
    add_masks(folder, "heart/a.png")
    found, _, notes = everything(folder)
    assert found["a.png"].has_masks[0] and not found["a.jpg"].has_masks[0] and notes == []
    add_masks(folder, "heart/a.bmp")
    assert "heart/a.bmp and " in refusal(folder) and "remove one" in refusal(folder)


def test_a_mask_must_be_readable_and_have_the_size_of_its_image_after_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 32 x 16 becomes 16 x 32
    save(tmp_path / "images" / "a.jpg", Image.new("L", (32, 16)), exif=exif)
    save(tmp_path / "masks" / "heart" / "a.png", Image.new("L", (16, 32), 255))
    assert everything(tmp_path)[1] == "a.jpg"
    save(tmp_path / "masks" / "heart" / "a.png", Image.new("L", (32, 16), 255))
    message = refusal(tmp_path)
    assert "heart/a.png is 32 x 16 px" in message and "images/a.jpg is 16 x 32 px" in message
    (tmp_path / "masks" / "heart" / "a.png").write_bytes(b"broken")
    assert "heart/a.png: this image cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("link", ["heart", "heart/a.png"])
def test_a_mask_that_is_a_link_out_of_its_folder_is_refused_by_name(folder, link):
    save(folder / "elsewhere" / "a.png", grey())
    (folder / "masks" / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / "masks" / link).symlink_to(folder / "elsewhere" / Path(link).relative_to("heart"))
    assert "masks/heart/a.png is a link that leads out of" in refusal(folder)
    with pytest.raises(DataError, match="is a link that leads out of|holds no mask"):
        read_masks(folder / "masks", str(folder), ["a.png"], 16)


def test_a_mask_without_an_image_is_noted_but_not_that_of_a_skipped_image(folder):
    (folder / "images" / "b.png").write_bytes(b"")
    add_masks(folder, "heart/a.png", "heart/b.png", "heart/zebra.png")
    _, reference, notes = everything(folder)
    assert reference == "a.png" and len(notes) == 2
    assert "heart/zebra.png is not used" in notes[0] and "skipped" in notes[1]


def test_the_reference_is_the_first_of_train_with_all_masks_else_moves_there_else_a_note_says_so(folder):
    table(folder, "file,split\na.png,test\nb.png,test\nc.png,val\nd.png,val\n")
    add_masks(folder, "heart/b.png", "heart/d.png")
    splits, reference, notes = load_folder(folder, 16)
    assert reference == "d.png" and splits["train"].names == ["d.png", "e.png", "f.png"]
    assert splits["val"].names == ["c.png"]
    assert notes == ["d.png moves from val to train as the reference image"]
    splits, reference, notes = load_folder(folder, 16, reference="b.png")
    assert reference == "b.png" and "b.png" in splits["train"].names and len(notes) == 1
    add_masks(folder, "heart/e.png")
    assert load_folder(folder, 16)[1:] == ("e.png", [])
    (folder / "masks" / "lung").mkdir()
    _, reference, notes = load_folder(folder, 16)
    assert reference is None and len(notes) == 1 and "heart has 3, lung has 0" in notes[0]


def test_the_reference_must_be_readable_and_have_every_mask(folder):
    (folder / "images" / "broken.png").write_bytes(b"")
    add_masks(folder, "heart/a.png", "heart/b.png", "lung/b.png")
    assert everything(folder, reference="b.png")[1] == "b.png"
    assert "masks/lung/a.png" in refusal(folder, reference="a.png")
    assert "masks/heart/c.png" in refusal(folder, reference="c.png")
    for name in ("nobody.png", "broken.png", "b"):
        assert f"`{name}` is no readable image" in refusal(folder, reference=name)


def test_a_label_column_becomes_one_hot_over_the_sorted_classes(folder):
    table(folder, "file,label\na.png,dog\nb.png,cow\nc.png,cat\nd.png,ape\ne.png,\n")
    found, _, _ = everything(folder)
    assert found["a.png"].findings == ["ape", "cat", "cow", "dog"]
    assert [found[name].labels.tolist() for name in ("a.png", "b.png")] == [[[0, 0, 0, 1]], [[0, 0, 1, 0]]]
    assert found["e.png"].labels.isnan().all() and found["f.png"].labels.isnan().all()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_finding_columns_are_multi_label_and_blank_is_unknown(folder, end):
    rows = ["\ufefffile, nodule ,effusion", "a.png,1,1", "b.png, ,0.0", "", ""]
    table(folder, end.join(rows))
    found, _, _ = everything(folder)
    assert found["a.png"].findings == ["nodule", "effusion"] and found["a.png"].labels.tolist() == [[1, 1]]
    assert found["b.png"].labels.isnan().tolist() == [[True, False]] and found["c.png"].labels.isnan().all()


def test_a_table_without_findings_gives_no_labels_and_a_row_of_a_skipped_image_is_ignored(folder):
    table(folder, "file,label\na.png,\n")
    assert everything(folder)[0]["a.png"].labels is None
    (folder / "images" / "b.png").write_bytes(b"")
    table(folder, "file,nodule\na.png,1\nb.png,0\n")
    found, _, notes = everything(folder)
    assert len(found) == 5 and len(notes) == 1 and found["a.png"].labels.tolist() == [[1]]


@pytest.mark.parametrize("findings", ["", ",label", ",nodule"])
def test_a_split_column_decides_and_unlisted_images_train(folder, findings):
    value = findings and ",1"
    table(folder, f"file,split{findings}\na.png,test{value}\nb.png,val{value}\nc.png,val{value}\n")
    splits = load_folder(folder, 16)[0]
    assert [splits[s].names for s in SPLITS] == [["d.png", "e.png", "f.png"], ["b.png", "c.png"], ["a.png"]]


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("", 1, "`file`"),
        ("name,label\na.png,x\n", 1, "name,label"),
        ("file,nodule,nodule\na.png,1,1\n", 1, "once"),
        ("file,label,age\na.png,x,63\n", 1, "either `label` or findings"),
        ("file,nodule\na.png,1\nb.png,0\na.png,1\n", 4, "`a.png` is listed twice"),
        ("file,nodule\na.png,1\nnobody.png,0\n", 3, "no `nobody.png` in images/"),
        ("file,nodule\n../images/a.png,1\n", 2, "no `../images/a.png` in images/"),
        ("file,nodule,age\na.png,1,63\n", 2, "column `age` holds `63`; use 0, 1 or blank"),
        ("file,nodule,split\na.png,1,Test\n", 2, "split `Test` is not train, val or test"),
        ("file,nodule\n\na.png,1,0\n", 3, "3 cells, not 2"),
        ('file,nodule\n"a.png,1\nb.png,0\n', 3, "unexpected end of data"),
        ('file,nodule\n"a\nb.png",1\n', 3, "no `a b.png`"),
        ("file,label\na.png,gesund\nb.png,gro\xdf\n".encode("latin-1"), 3, "not UTF-8"),
        ("file,label\na.png,x\n".encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_a_faulty_table_is_refused_with_its_line(folder, text, line, words):
    table(folder, text)
    message = refusal(folder)
    assert f"labels.csv, line {line}: " in message and words in message


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr("common.data.DRAWN_SIZES", {"val": 60, "test": 60})


def test_the_marker_agrees_as_often_as_asked_and_is_removed_and_flipped_in_test_images(few):
    bare, _, _ = load("phantom", 64, seed=1, train_images=200, findings=["nodule", "opacity"])
    for agreement in (1.0, 0.8):
        splits, _, _ = load("phantom", 64, 1, 200, marker=agreement, findings=["nodule", "opacity"])
        present = {split: (d.images[:, 0, 2:8, -8] == 255).all(dim=1) for split, d in splits.items()}
        for split in SPLITS:
            label = splits[split].labels[:, 0] == 1
            assert (present[split] == label).float().mean().item() == pytest.approx(agreement, abs=0.1)
            assert torch.equal(splits[split].labels, bare[split].labels)
        assert not present["removed"].any() and torch.equal(present["flipped"], ~present["test"])
        assert torch.equal(splits["removed"].images, bare["test"].images)
        assert torch.equal(splits["flipped"].images[..., 8:, :], splits["test"].images[..., 8:, :])
        new = (splits["unseen"].images != bare["test"].images).any(dim=3)[:, 0]  # a disc in the lower corner
        assert torch.equal(new[:, 54:].any(dim=1), ~present["test"]) and not new[:, :54].any()


@pytest.mark.parametrize("kind", ["anywhere", "tint", "border"])
def test_a_marker_of_any_kind_lies_at_the_same_place_in_test_images_and_in_flipped_ones(kind, few):
    without = load("phantom", 64, seed=1, train_images=2)[0]["test"].images
    splits, _, _ = load("phantom", 64, 1, 2, marker=1.0, marker_kind=kind)
    label = splits["test"].labels[:, 0, None, None, None] == 1
    assert torch.equal(torch.where(label, splits["flipped"].images, splits["test"].images), without)
    again, _, _ = load("phantom", 64, 1, 2, marker=0.0, marker_kind=kind)
    assert torch.equal(again["test"].images, splits["flipped"].images)


def test_a_single_finding_becomes_two_classes_and_its_marker_agrees_with_it(few):
    one, _, _ = load("phantom", 64, train_images=20, findings=["nodule"], marker=1.0)
    all_of_them, _, _ = load("phantom", 64, train_images=20)
    assert one["val"].findings == ["no nodule", "nodule"]
    assert torch.equal(one["val"].labels[:, 1], all_of_them["val"].labels[:, 2])
    assert (one["val"].labels.sum(dim=1) == 1).all()
    assert torch.equal(one["val"].labels[:, 1] == 1, (one["val"].images[:, 0, 2:8, -8] == 255).all(dim=1))


def test_what_is_not_there_is_refused(folder, few):
    with pytest.raises(DataError, match="finding `gout` is not in phantom; it has enlarged heart"):
        load("phantom", 64, train_images=2, findings=["gout"])
    with pytest.raises(DataError, match="`nobody` is not drawn; choose one from 00000 to 00001"):
        load("phantom", 64, train_images=2, reference="nobody")
    for data in (str(folder), "parts"):
        with pytest.raises(DataError, match="a marker can be drawn only on phantoms"):
            load(data, 64, train_images=2, marker=1.0)


def test_batches_are_as_encoders_expect_them_and_where_the_model_is():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None, None]
    found = list(batches(images, torch.nn.Linear(1, 1), size=2))
    assert [len(batch) for batch in found] == [2, 1]
    torch.testing.assert_close(torch.cat(found).flatten(), torch.tensor([-2.0, 2.0, -1.2]))
    (batch,) = batches(images[:1], torch.nn.Linear(1, 1, device="meta"))
    assert batch.device.type == "meta"


def test_images_lie_on_a_gpu_unless_they_would_take_half_of_its_free_memory(monkeypatch):
    images = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2)
    index = torch.tensor([3, 1], device="cuda" if torch.cuda.is_available() else "cpu")
    taken = take(images, index)
    assert taken.device == index.device and torch.equal(taken.cpu(), images[[3, 1]])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: f"on {device}")  # there may be no GPU here
    assert placed(images, "cpu") == "on cpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes, 10**9))
    assert placed(images, "cuda:0") == "on cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes - 1, 10**9))
    assert placed(images, "cuda:0") is images
