"""Data folders of every kind and the public datasets: what becomes of them, or how they are refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, refuses, save
from PIL import Image

from attention_priors import gaussian_blur
from common import data, datasets
from common.data import SPLITS, DataError, select
from common.folder import SUFFIXES, load_folder, read_masks
from common.splits import load

GREY = noise(16, 16)
LEFT = np.indices((16, 16))[1] < 8
HALF = Image.fromarray(255 * LEFT.astype(np.uint8))


def add_masks(folder: Path, *names: str):
    for name in names:
        save(folder / "masks" / name, HALF)


def table(folder: Path, text: str | bytes):
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path):
    """Six grey images a.png to f.png."""
    for name in "abcdef":
        save(tmp_path / "images" / f"{name}.png", noise(16, 16, seed=ord(name)))
    return tmp_path


def everything(folder, img_size: int = 16, **options):
    """{name: its Data} of all splits, the reference image and the notes."""
    splits, reference, notes = load_folder(folder, img_size, **options)
    found = [select(d, torch.tensor([i])) for d in splits.values() for i in range(len(d.names))]
    return {d.names[0]: d for d in sorted(found, key=lambda d: d.names)}, reference, notes


def read_one(tmp_path, picture, name: str = "x.png", img_size: int = 16, **options) -> torch.Tensor:
    """(C, S, S): what becomes of a picture that is alone in a folder."""
    save(tmp_path / "images" / name, picture, **options)
    return load_folder(tmp_path, img_size)[0]["train"].images[0]


def refusal(folder, **options) -> str:
    with pytest.raises(DataError, match=r"\A.+\Z") as error:  # one line
        load_folder(folder, 16, **options)
    return str(error.value)


def test_a_folder_becomes_three_splits_of_uint8_images(folder):
    splits, reference, notes = load_folder(str(folder), 12)
    for data, n in zip(splits.values(), (4, 1, 1)):
        assert data.images.shape == (n, 1, 12, 12) and data.images.dtype == torch.uint8
        assert data.masks.shape[1] == data.labels.shape[1] == 0 and not data.has_masks.any()
    assert reference is None and notes == []
    save(folder / "images" / "z.png", Image.new("RGB", (12, 12), "red"))
    coloured = load_folder(folder, 12)[0]["train"]  # one colour image gives all of them three channels
    assert torch.equal(coloured.images[0], splits["train"].images[0].expand(3, -1, -1))
    for name in "abcdez":  # most of them
        save(folder / "images" / f"{name}.png", noise(240, 300, seed=ord(name)))
    note = "images of 240 px become 64 px; --img-size 224 --patch-size 16 keeps more detail"
    assert load_folder(folder, 64)[2] == [note]


def test_the_names_alone_decide_on_the_split_and_one_or_two_images_all_train(tmp_path):
    for count, sizes in ((1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (100, [70, 15, 15])):
        for i in range(count):
            save(tmp_path / "images" / f"{i:02d}.png", Image.new("L", (8, 8), i))
        splits, _, notes = load_folder(tmp_path, 8)
        assert [len(splits[split].images) for split in SPLITS] == sizes and len(notes) == sizes.count(0)
    assert splits["test"].names[:4] == ["04.png", "05.png", "10.png", "11.png"]
    assert splits["test"].images[:4, 0, 0, 0].tolist() == [4, 5, 10, 11]


def test_names_with_odd_characters_load_and_all_that_is_said_of_them_can_be_printed_on_a_line(folder):
    odd = ["line\nbreak.png", "caf\udce9.png", 'ä 你, "x".png']
    for i, name in enumerate(odd):
        save(folder / "images" / name, noise(16, 16, seed=i))
        (folder / "masks" / f"h\udce9art\n{name[0]}").mkdir(parents=True)
        (folder / "masks" / f"h\udce9art\n{name[0]}" / f"not {name}").touch()
    found, _, notes = everything(folder)
    assert {*odd} < {*found} and len(notes) == 4 and not any("\n" in note for note in notes)
    assert all(note.encode() and region.encode() for note in notes for region in found[odd[0]].regions)
    assert "line\\nbreak.png" in notes[1] and "caf\\udce9.png" in notes[0]
    (folder / "masks" / "h\udce9art\nl" / "line\nbreak.png").touch()
    assert "line\\nbreak.png: this image cannot be read" in refusal(folder)


def test_a_folder_without_images_is_refused(tmp_path):
    add_masks(tmp_path, "a.png")  # masks are no class
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert "one folder of images per class" in refusal(tmp_path)
    save(tmp_path / "flat" / "a.png", GREY)
    assert f"where they belong, but 1 in {tmp_path / 'flat'}; expected" in refusal(tmp_path / "flat")
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert "none of 1 images can be read" in refusal(tmp_path) and "a.png" in refusal(tmp_path)
    save(tmp_path / "sets" / "train" / "cat" / "a.png", GREY)
    assert f"1 in {tmp_path / 'sets' / 'train' / 'cat'}; expected" in refusal(tmp_path / "sets")


def test_folders_are_classes_but_not_those_of_runs_and_none_may_be_named_like_splits(tmp_path):
    for name in ("cat/a.png", "dog/a.png", "dog/b.png", "run/attention.png"):
        save(tmp_path / name, GREY)
    (tmp_path / "run" / "config.json").write_text("{}")
    found, reference, notes = everything(tmp_path)
    labels = {name: data.labels[0].tolist() for name, data in found.items()}
    assert labels == {"cat/a.png": [1, 0], "dog/a.png": [0, 1], "dog/b.png": [0, 1]} and reference is None
    assert found["cat/a.png"].findings == ["cat", "dog"] and "not used: 1 in" in notes[0]
    for name in ("Train/a.png", "val/b.png"):
        save(tmp_path / name, GREY)
    line = "Train, val are splits, not classes: move all images to images/, add the split to labels.csv"
    assert line in refusal(tmp_path)


def test_suffixes_of_any_case_are_read_and_hidden_files_are_not(tmp_path):
    names = "a.PNG b.jpg c.JPEG c2.jfif d.bmp e.tif f.tiff g.gif h.webp i.pgm".split()
    for i, name in enumerate([*names, ".hidden.png"]):
        save(tmp_path / "images" / name, noise(16, 16, seed=i))
    found, _, notes = everything(tmp_path)
    assert list(found) == names and notes == []


@pytest.mark.filterwarnings("error")
def test_deep_grey_of_any_range_is_stretched_to_all_of_8_bits_and_black_if_it_is_constant(tmp_path):
    ramp = np.arange(256).reshape(16, 16)
    two_levels, wide = (1000 + ramp).astype(np.uint16), ramp * 1000 - 70000  # in the high byte
    big_endian = Image.frombytes("I;16B", (16, 16), (ramp * 16).astype(">u2").tobytes())
    pictures = {"x.png": two_levels, "x.pgm": two_levels, "big endian.tif": big_endian}
    pictures |= {"float.tif": wide.astype(np.float32), "integer.tif": wide.astype(np.int32)}
    for name, picture in pictures.items():
        assert read_one(tmp_path / name, picture, name).flatten().tolist() == list(range(256)), name
    assert read_one(tmp_path, np.full((16, 16), 777, dtype=np.uint16)).max() == 0


def test_an_image_is_shrunk_without_aliasing_and_after_the_stretch(tmp_path):
    for low, high, dtype in ((0, 255, np.uint8), (1000, 1256, np.uint16)):
        board = np.where(np.indices((64, 64)).sum(0) % 2, high, low).astype(dtype)
        image = read_one(tmp_path, board, img_size=16)
        assert 120 < image.min() and image.max() < 136


PALETTE = Image.fromarray(LEFT.astype(np.uint8)).convert("P")
PALETTE.putpalette([200, 30, 60, 10, 20, 30])
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3
SHOWN = {  # what the upper left and the upper right pixel become
    "one bit.png": (HALF.convert("1"), [255], [0], {}),
    "grey as RGB.png": (HALF.convert("RGB"), [255], [0], {}),
    "palette.png": (PALETTE, [10, 20, 30], [200, 30, 60], {}),
    "transparent entry.png": (PALETTE, [10, 20, 30], [0, 0, 0], {"transparency": 0}),
    "half red.png": (Image.new("RGBA", (16, 16), (200, 0, 0, 128)), [100, 0, 0], [100, 0, 0], {}),
    "cmyk.tif": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), [255, 0, 0], [255, 0, 0], {}),
    "upside down.png": (HALF, [0], [255], {"exif": UPSIDE_DOWN}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_image_becomes_what_it_shows_in_as_many_channels_as_needed(tmp_path, name):
    picture, left, right, options = SHOWN[name]
    image = read_one(tmp_path, picture, name, **options)
    assert image[:, 0, 0].tolist() == left and image[:, 0, 15].tolist() == right


def encoded(pixels: np.ndarray, suffix: str = ".png", *others: np.ndarray) -> bytes:
    file, pages = io.BytesIO(), {}
    if others:
        pages = {"save_all": True, "append_images": [Image.fromarray(page) for page in others]}
    Image.fromarray(pixels).save(file, Image.registered_extensions()[suffix], **pages)
    return file.getvalue()


NOISE = noise(99, 99)
DAMAGED = {f"half{suffix}": (encoded(NOISE, suffix)[:2000], "cannot be read") for suffix in SUFFIXES} | {
    "empty.png": (b"", "cannot identify"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    "narrow.png": (encoded(NOISE[:, :7]), "7 x 99 px"),
    "volume.tif": (encoded(NOISE, ".tif", NOISE[:50], NOISE), "3 pages; save each as a file of its own"),
    "infinite.tif": (encoded(np.full((9, 9), np.inf, dtype=np.float32), ".tif"), "NaN or infinite"),
    "bomb.png": (encoded(NOISE.repeat(2, 0)[:110]), "limits are 8 x 8 and 10000 px"),  # Pillow only warns
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


ONES = Image.fromarray(LEFT.astype(np.uint8))
EDGE = Image.fromarray(np.repeat(np.eye(1, 16, dtype=np.uint8), 16, axis=0))  # the first column
SPECKS = np.kron(LEFT, np.ones((4, 4))).astype(np.uint8)
SPECKS[::4, 40] = 1
SPOT, PIXEL = np.zeros((128, 128), np.uint8), LEFT & False
SPOT[66:69, 35:38], PIXEL[8, 4] = 255, True
BLUISH = np.full((16, 16, 3), (30, 30, 120), np.uint8)
BLUISH[4:8] = (200, 0, 0)  # its maximum is 200, of which 120 is more than half
SQUARE, LINE = np.zeros((2, 256, 256), np.uint8)
SQUARE[80:101, 80:101] = LINE[:, 70:73] = 255
BLURRED = gaussian_blur(torch.from_numpy(SQUARE).float()[None, None], 6.0)[0, 0].numpy()
BLOCKS = 255 * np.kron([[0, 0], [1, 1]], np.ones((128, 128))).astype(np.uint8)
BLOCKS[8:80, 8:80], BLOCKS[180:220, 8:80] = 4, 250
TWO = np.array([0] * 6 + [1] * 6 + [2] * 4, np.uint8)[None].repeat(16, axis=0)  # regions, (16, 16)
FEW = np.array([0, 1], np.uint8).repeat(120)[None].repeat(240, axis=0)
FEW[10:30, 10:30] = 2
COLOURED = Image.fromarray(TWO, "P")
COLOURED.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
MASKS = {  # pictures, and the mask that they mean, None for any; of two regions, what the error says
    "0/255": (HALF, LEFT),
    "0/1": (ONES, LEFT),
    "soft grey": (np.where(LEFT, 120, 40).astype(np.uint8), LEFT),
    "a blue of one beside white": (Image.merge("RGB", [EDGE, EDGE, ONES]), LEFT),
    "alpha": (Image.merge("LA", [Image.new("L", (16, 16), 255), HALF]), LEFT),
    "black on nothing": (Image.merge("LA", [Image.new("L", (16, 16), 0), HALF]), LEFT),
    "black": (Image.new("LA", (16, 16), (0, 255)), LEFT & False),
    "float": (LEFT.astype(np.float32), LEFT),
    "large, shrunk by majority": (SPECKS, LEFT),
    "full": (np.ones((16, 16), np.uint8), LEFT | True),
    "on bright ground": (BLUISH, LEFT | True),
    "too small for 16 px, which keeps a pixel": (SPOT, PIXEL),
    "a square, halved": (Image.fromarray(SQUARE).resize((128, 128), Image.Resampling.BILINEAR), None),
    "a line, halved": (Image.fromarray(LINE).resize((128, 128), Image.Resampling.BOX), None),
    "a probability": (BLURRED / 255, None),
    "blocks of a JPEG": (BLOCKS, None),
    "numbers": (TWO, "1 and 2"),
    "numbers that are near": (TWO + 8 * (TWO > 0).astype(np.uint8), "9 and 10"),
    "a small one": (FEW, "1 and 2"),
    "greys": (np.array([0, 85, 255], np.uint8)[TWO], "85 and 255"),
    "a palette": (COLOURED, "128/0/0 and 0/128/0"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_are_understood_and_those_of_several_regions_refused(folder, kind):
    picture, meant = MASKS[kind]
    path = save(folder / "masks" / "heart" / "a.tif", picture)
    save(folder / "images" / "a.png", noise(*Image.open(path).size[::-1]))
    if isinstance(meant, str):
        assert f"a.tif holds the values {meant}; give each region its own mask" in refusal(folder)
        return
    found, reference, notes = everything(folder)
    assert reference == "a.png" and found["a.png"].has_masks[0]
    mask = found["a.png"].masks[0, 0]
    assert mask.any() if meant is None else torch.equal(mask, torch.from_numpy(meant))
    full = "1 mask(s) of heart cover the whole image, such as that of a.png: a mask must be black"
    assert [note.startswith(full) for note in notes] == [True] * bool(mask.all())


def test_an_image_has_masks_if_it_has_one_of_every_region_by_its_own_name(folder):
    save(folder / "images" / "a.jpg", GREY)
    add_masks(folder, "heart/a.png", "heart/b.tif", "lung/b.png")
    found, reference, notes = everything(folder)
    assert reference == "b.png" and found["a.png"].regions == ["heart", "lung"] and notes == []
    assert [name for name, data in found.items() if data.has_masks[0]] == ["b.png"]
    assert found["a.png"].masks[0].any(dim=2).any(dim=1).tolist() == [True, False]
    assert not found["c.png"].masks.any() and not found["a.jpg"].masks.any()
    add_masks(folder, "heart/b.bmp")
    assert "heart/b.bmp and " in refusal(folder) and "remove one" in refusal(folder)
    add_masks(folder, "heart/a.bmp")
    assert "heart/a.bmp may belong to a.jpg or a.png: give it the suffix of its image" in refusal(folder)


def test_masks_of_another_tool_are_known_if_an_image_has_one_of_every_region(folder, capsys):
    masks, names = folder / "masks", ["a.png", "b.png", "c.png", "d.png"]
    add_masks(folder, "heart/a.png", "heart/b.png", "lung/a.png", ".hidden/d.png")
    found, known = read_masks(masks, str(folder), names, 16)
    assert known.tolist() == found.flatten(1).any(dim=1).tolist() == [True, False, False, False]
    assert "note: 1 image(s) have masks of some regions only" in capsys.readouterr().out
    add_masks(folder, "c.png", "Ha\u0308user.png")  # of all regions; as macOS writes an umlaut
    for region in ("heart", "lung"):  # in b.png all is background, known to be so
        save(masks / region / "b.png", np.zeros((16, 16), dtype=np.uint8))
    found, known = read_masks(masks, str(folder), names, 16)
    assert known.tolist() == [True, True, True, False] and not found[1].any() and found[2].any()
    assert read_masks(masks, None, ["H\u00e4user.png"], 16)[1].all()
    line, alike = "a.png and a.jpg would share a mask's name; rename one", ["a.png", "a.jpg"]
    refuses(line, read_masks, masks, str(folder), alike, 16, error=DataError)
    small = HALF.resize((16, 8))
    for name, picture, line in (("c.png", small, "its image"), ("images/a.png", HALF, "holds images")):
        save(masks / name, picture)
        refuses(line, read_masks, masks, str(folder), names, 16, error=DataError)


def test_a_mask_must_have_the_size_of_its_image_after_exif_rotation(tmp_path):
    exif, mask = Image.Exif(), tmp_path / "masks" / "heart" / "a.png"
    exif[0x0112] = 6  # a quarter turn: 32 x 16 becomes 16 x 32
    save(tmp_path / "images" / "a.jpg", Image.new("L", (32, 16)), exif=exif)
    save(mask, Image.new("L", (32, 16), 255))
    message = refusal(tmp_path)
    assert "heart/a.png is 32 x 16 px" in message and "images/a.jpg is 16 x 32 px" in message


def test_the_reference_is_the_first_of_train_with_all_masks_else_moves_there_else_a_note_says_so(folder):
    table(folder, "file,split\na.png,test\nb.png,test\nc.png,val\nd.png,val\n")
    add_masks(folder, "heart/b.png", "heart/d.png")
    splits, reference, notes = load_folder(folder, 16)
    assert reference == "d.png" and splits["train"].names == ["d.png", "e.png", "f.png"]
    assert splits["val"].names == ["c.png"]
    assert notes == ["d.png moves from val to train as the reference image"]
    splits, reference, _ = load_folder(folder, 16, reference="b.png")
    assert reference == "b.png" and "b.png" in splits["train"].names
    add_masks(folder, "heart/e.png")
    assert load_folder(folder, 16)[1:] == ("e.png", [])
    (folder / "masks" / "lung").mkdir()
    _, reference, (note,) = load_folder(folder, 16)
    assert reference is None and "heart has 3, lung has 0" in note
    (folder / "images").rename(folder / "Image")
    assert "Image: did you mean images/?" in refusal(folder)


def test_the_reference_must_be_readable_and_have_every_mask_and_unused_masks_are_noted(folder):
    (folder / "images" / "broken.png").write_bytes(b"")
    add_masks(folder, "heart/a.png", "heart/b.png", "heart/broken.png", "heart/zebra.png", "lung/b.png")
    unused, skipped = everything(folder)[2]
    assert "heart/zebra.png is not used" in unused and "skipped" in skipped and "broken.png" in skipped
    assert "masks/lung/a.png" in refusal(folder, reference="a.png")
    assert "masks/heart/c.png" in refusal(folder, reference="c.png")
    for name in ("nobody.png", "broken.png", "b"):
        assert f"`{name}` is no readable image" in refusal(folder, reference=name)


def test_a_label_column_becomes_one_hot_over_the_sorted_classes_and_no_labels_without_any(folder):
    table(folder, "file,label\na.png,dog\nb.png,cow\nc.png,cat\nd.png,ape\ne.png,\n")
    found, _, _ = everything(folder)
    assert found["a.png"].findings == ["ape", "cat", "cow", "dog"]
    assert [found[name].labels.tolist() for name in ("a.png", "b.png")] == [[[0, 0, 0, 1]], [[0, 0, 1, 0]]]
    assert found["e.png"].labels.isnan().all() and found["f.png"].labels.isnan().all()
    table(folder, "file,label\na.png,\n")
    assert everything(folder)[0]["a.png"].labels.shape == (1, 0)


NOTES = [  # pictures beside a.png to f.png, rows of labels.csv, and what is noted
    ("masks/c.png", "", "images not used: 1 in {0}/masks; expected"),
    ("mask/heart/a.png", "", "{0}/mask is not used: did you mean masks?"),
    ("masks/heart/b_mask.png", "", "{0}/masks/heart/b_mask.png is not used: no image has this name"),
    (" ".join(f"masks/heart/{name}_mask.png" for name in "bcdef"), "", "... and 2 more of this kind"),
    ("masks/heart/more/b.png", "", "images not used: 1 in {0}/masks/heart/more; expected"),
    ("cat/h.png cat/i.png images/more/g.png images/.cache/j.png masks/k/a.png", "",
        "images not used: 2 in {0}/cat, 1 in {0}/images/more; expected"),
    ("", "a.png,cat,train b.png,dog,train c.png,catt,test", "no training image has `catt`"),
    ("images/g.png images/h.png", "g.png,cat,train h.png,cat,test",
        "1 image(s) of test are in train as well, such as h.png"),
]  # fmt: skip


@pytest.mark.parametrize("pictures, rows, note", NOTES)
def test_what_is_not_used_never_trained_on_or_in_two_splits_is_noted(pictures, rows, note, folder):
    for name in pictures.split():
        save(folder / name, GREY)
    if rows:
        table(folder, "\n".join(["file,label,split", *rows.split()]))
    assert any(line.startswith(note.format(folder)) for line in load_folder(folder, 16)[2])


def test_headers_may_be_capitalised_and_umlauts_written_in_two_ways(folder):
    save(folder / "images" / "u\u0308.png", GREY)  # as macOS writes a name
    save(folder / "masks" / "h" / "\u00fc.png", HALF)
    table(folder, "File,Label,Split\n\u00fc.png,cat,train\na.png,dog,test\n")
    found = everything(folder)[0]
    assert found["u\u0308.png"].has_masks.all()
    assert found["u\u0308.png"].labels.tolist() == [[1, 0]] and found["a.png"].labels.tolist() == [[0, 1]]


def test_findings_that_exclude_each_other_in_training_alone_are_noted(folder):
    line = "each labelled training image shows one of wet, dry, so these are classes; 1 other image(s) show"
    expected = {"1,0 0,1 1,1": True, "1,0 0,1 1,0": False, "1, 0,1 1,1": False, ", , 1,1": False}
    for rows, noted in expected.items():
        lines = map("{}.png,{},{}".format, "abc", rows.split(), ("train", "train", "test"))
        table(folder, "\n".join(["file,wet,dry,split", *lines]))
        notes = load(str(folder), 16, findings=["wet", "dry"])[2]
        assert [note.startswith(line) for note in notes if "are classes" in note] == [True] * noted, rows


def test_finding_columns_are_multi_label_and_blank_is_unknown_and_skipped_images_are_ignored(folder):
    (folder / "images" / "d.png").write_bytes(b"")
    rows = ["\ufefffile, nodule ,effusion", "a.png,1,1", "b.png, ,0.0", "d.png,1,1", "", ""]
    for end in ("\n", "\r\n", "\r"):
        table(folder, end.join(rows))
        found, _, notes = everything(folder)
        a, b, c = (found[name].labels[0] for name in ("a.png", "b.png", "c.png"))
        assert a.tolist() == [1, 1] and b.isnan().tolist() == [True, False] and c.isnan().all()
        assert found["a.png"].findings == ["nodule", "effusion"] and len(found) == 5 and len(notes) == 1


@pytest.mark.parametrize("text, line, words", [
    ("", 1, "`file`"),
    ("file,nodule,nodule\na.png,1,1\n", 1, "once"),
    ("file,label,age\na.png,x,63\n", 1, "either `label` or findings"),
    ("file,nodule\na.png,1\nb.png,0\na.png,1\n", 4, "`a.png` is listed twice"),
    ("file,nodule\na.png,1\nnobody.png,0\n", 3, "no `nobody.png` in images/"),
    ("file,nodule,age\na.png,1,63\n", 2, "column `age` holds `63`; use 0, 1 or blank"),
    ("file,nodule,split\na.png,1,Test\n", 2, "split `Test` is not train, val or test"),
    ("file,nodule\n\na.png,1,0\n", 3, "3 cells, not 2"),
    ('file,nodule\n"a\nb.png",1\n', 3, "no `a b.png`"),
    ("file,label\na.png,gesund\nb.png,gro\xdf\n".encode("latin-1"), 3, "not UTF-8"),
])  # fmt: skip
def test_a_faulty_table_is_refused_with_its_line(folder, text, line, words):
    table(folder, text)
    message = refusal(folder)
    assert f"labels.csv, line {line}: " in message and words in message


def marked(*, n: int = 2, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.splits.DRAWN_SIZES", {"val": 60, "test": 60})
        return load("phantom", 64, seed=1, train_images=n, **options)[0]


def test_the_marker_agrees_as_often_as_asked_and_is_removed_and_flipped_in_test_images():
    bare = marked(n=60)
    for agreement in (1.0, 0.8):
        splits = marked(n=60, marker=agreement)
        present = {split: (d.images[:, 0, 2:8, -8] == 255).all(dim=1) for split, d in splits.items()}
        for split in SPLITS:
            agrees = present[split] == (splits[split].labels[:, 0] == 1)
            assert agrees.float().mean().item() == pytest.approx(agreement, abs=0.15)
            assert torch.equal(splits[split].labels, bare[split].labels)
        assert not present["removed"].any() and torch.equal(present["flipped"], ~present["test"])
        assert torch.equal(splits["removed"].images, bare["test"].images)
        assert torch.equal(splits["flipped"].images[..., 8:, :], splits["test"].images[..., 8:, :])
        new = (splits["unseen"].images != bare["test"].images).any(dim=3)[:, 0]  # a disc in the lower corner
        assert torch.equal(new[:, 54:].any(dim=1), ~present["test"]) and not new[:, :54].any()


def test_a_single_finding_becomes_two_classes_and_its_marker_agrees_with_it():
    one, every = marked(findings=["nodule"], marker=1.0)["val"], marked()["val"]
    assert one.findings == ["no nodule", "nodule"] and (one.labels.sum(dim=1) == 1).all()
    assert torch.equal(one.labels[:, 1], every.labels[:, 2])
    assert torch.equal(one.labels[:, 1] == 1, (one.images[:, 0, 2:8, -8] == 255).all(dim=1))
    two = marked(findings=["nodule", "effusion"])["val"]
    assert two.findings == ["nodule", "effusion"] and torch.equal(two.labels, every.labels[:, [2, 1]])


def test_images_lie_on_a_gpu_unless_they_take_half_of_its_memory(monkeypatch):
    images, found = torch.zeros(10, 1, 2, 2, dtype=torch.uint8), []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: f"on {device}")  # there may be no GPU here
    for free in (2 * images.nbytes, 2 * images.nbytes - 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        found.append(data.to_device(images, "cuda:0"))
    assert found[0] == "on cuda:0" and found[1] is images and data.to_device(images, "cpu") == "on cpu"


def test_larger_images_come_in_smaller_batches_so_that_none_needs_more_memory_than_training():
    model = torch.nn.Linear(1, 1)
    for side, sizes in ((64, [250, 10]), (128, [250, 10]), (256, [62] * 4 + [12]), (4096, [1] * 260)):
        images = torch.zeros(1, dtype=torch.uint8).expand(260, 1, side, side)
        assert [len(part) for part in images.split(data.at_a_time(250, images))] == sizes
    assert len(next(data.batches(torch.zeros(9, 1, 512, 512).byte(), model, 32))) == 2


SMALL, MASK = noise(16, 12), np.zeros((16, 12), dtype=np.uint8)
MASK[2:9, 3:8] = 255
BLACK_BELOW = np.repeat([[255], [0]], 512, axis=0).astype(np.uint8).repeat(1024, axis=1)


def made(name: str, source: Path):
    """A dataset as it loads: its splits, and {image: labels} over all of them."""
    datasets.main([name, str(source), str(source.parent / name)])
    splits, _, _ = load_folder(source.parent / name, 16)
    labelled = [data for data in splits.values() if data.findings]
    return splits, {name: labels for data in labelled for name, labels in zip(data.names, data.labels)}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def test_images_that_are_links_themselves_are_linked_to_their_files(tmp_path):
    save(tmp_path / "files" / "a.png", noise(8))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").symlink_to("../files/a.png")  # relative: it leads nowhere from elsewhere
    datasets.write(iter([("a.png", tmp_path / "source" / "a.png", {}, {})]), tmp_path / "in" / "out")
    assert (tmp_path / "in" / "out" / "images" / "a.png").is_file()


def test_montgomery_and_shenzhen(source):
    for i in range(12):
        name = f"MCUCXR_{i:04d}_{i % 2}.png"
        save(source / "CXR_png" / name, SMALL)
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
        save(source / "fold1" / "masks" / "heart" / f"{name}.gif", BLACK_BELOW)
    splits, labels = made("jsrt", source)
    assert splits["train"].regions == ["heart"] and labels == {"JPCLN001.png": 1, "JPCNN002.png": 0}
    for data in splits.values():  # the bright half is the masked one
        assert torch.equal(data.images[:, 0] > 128, data.masks[:, 0])


def test_nih_14_has_its_own_test_images_and_validates_on_other_patients_than_it_trains_on(source):
    rows = ["Image Index,Finding Labels"]
    for i in range(60):
        name, found = f"{i // 2:08d}_{i % 2:03d}.png", ["Mass|Effusion", "No Finding", "Nodule"][i % 3]
        rows.append(f"{name},{found}")
        save(source / "images_001" / "images" / name, SMALL)
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
            save(source / split / kind / "images" / "a.png", SMALL)
            save(source / split / kind / "lung masks" / "a.png", MASK)
    splits, _ = made("covid_qu_ex", source)
    assert [len(data.names) for data in splits.values()] == [2, 2, 2]
    assert splits["train"].findings == ["COVID-19", "Normal"] and splits["test"].has_masks.all()


def test_mvtec_s_good_parts_have_empty_masks_and_some_defects_are_for_validation(source):
    for i in range(9):
        for name in ("train/good", "test/crack", "test/good"):
            save(source / name / f"00{i}.png", SMALL)
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
        save(source / "images" / f"{name}.jpg", SMALL)
        save(source / "annotations" / "trimaps" / f"{name}.png", trimap)
        (source / "annotations" / f"{table}.txt").write_text(f"{name} 1 2 1\n")
    splits, _ = made("pets", source)
    assert splits["test"].names == ["Abyssinian_2.jpg"]
    assert splits["train"].findings == ["Abyssinian", "great_pyrenees"]
    assert splits["test"].masks[0, 0].float().mean() == pytest.approx(9 / 16, abs=0.05)


def test_weizmann_s_masks_take_the_size_of_their_pictures(source):
    """They are JPEGs, in which white is not quite white."""
    for i in range(9):
        save(source / "rgb" / f"horse{i}.jpg", SMALL)
        save(source / "figure_ground" / f"horse{i}.jpg", np.kron(MASK, np.ones((4, 4), dtype=np.uint8)))
    splits, _ = made("weizmann", source)
    assert splits["train"].regions == ["horse"] and all(data.has_masks.all() for data in splits.values())
    exact = np.asarray(Image.fromarray(MASK).resize((16, 16), Image.NEAREST)) > 0
    assert (splits["test"].masks[0, 0].numpy() != exact).mean() < 0.1


def test_ph2_s_lesions(source):
    for i in range(9):
        name = f"IMD00{i}"
        save(source / name / f"{name}_Dermoscopic_Image" / f"{name}.bmp", SMALL)
        save(source / name / f"{name}_lesion" / f"{name}_lesion.bmp", MASK)
        save(source / name / f"{name}_roi" / f"{name}_R1_Label4.bmp", MASK)  # a colour in the lesion
    splits, _ = made("ph2", source)
    assert splits["train"].regions == ["lesion"] and sum(int(d.has_masks.sum()) for d in splits.values()) == 9


@pytest.mark.parametrize("name, out, words", [("mvtec", "new", "no image was found"), ("pets", "", "exists")])
def test_a_source_of_another_layout_and_an_existing_folder_are_refused(name, out, words, tmp_path, refused):
    assert words in refused(datasets.main, name, str(tmp_path), str(tmp_path / out))
    assert not (tmp_path / "new").exists()
