"""Files as people in the field have them: a run, the fingerprint and tools/check_data.py give one answer about each.

Run: python -m pytest tests/test_odd_files.py
"""
import io
import json
import os
import shutil
import socket
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import data
import models.mymodel
import train
from conftest import make_images, run_here
from registry import UserError

PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8), (5, 5), 0)


def encoded(kind, pixels=PIXELS, **options):
    """The bytes of an image file, by PIL."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def by_opencv(suffix, pixels):
    """The bytes of an image file, by OpenCV, which writes types that PIL doesn't know."""
    return cv2.imencode(suffix, pixels)[1].tobytes()


def chunk(kind, content, checksum=0):
    """A chunk of a PNG; `checksum` changes its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ checksum)


def with_chunk(*args):
    """A PNG with one more chunk behind its header."""
    png = encoded("PNG")
    return png[:33] + chunk(*args) + png[33:]


def of_size(side):
    """A PNG whose header claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + encoded("PNG")[33:]


def black(side):
    """A black grey PNG of side x side pixels."""
    packer = zlib.compressobj(1)
    rows = b"".join([packer.compress(bytes(side + 1)) for _ in range(side)])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b""))


def damaged_tiff(compression):
    """A TIFF of which OpenCV would fill in black what it can't decode."""
    data = encoded("TIFF", compression=compression)
    return data[:3000] + 100 * b"\xff" + data[3100:]


def of_jpeg_size(height, width):
    """A JPEG whose header declares another size, of a single scan."""
    jpeg = encoded("JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4:]


def of_rows(rows):
    """An uncompressed TIFF whose header declares another height."""
    tiff, entry = encoded("TIFF"), struct.pack("<HHI", 257, 4, 1)
    place = tiff.index(entry) + 8
    return tiff[:place] + struct.pack("<I", rows) + tiff[place + 4:]


def bad_checksum():
    """A PNG of one row whose pixels were changed after their checksum was taken; decoders notice nothing."""
    pixels = b"\0" + bytes(range(90))
    header = struct.pack(">IIBBBBB", 30, 1, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 0), 1)
            + chunk(b"IEND", b""))


JPEG, LONG = encoded("JPEG", quality=90), b"x" * 2_000_000
GREY16 = np.arange(90 * 120).reshape(90, 120).astype(np.uint16) * 6
HALF = len(JPEG) // 2
CMYK = Image.fromarray(PIXELS).convert("CMYK")
RGB_OF_CMYK = np.asarray(Image.open(io.BytesIO(encoded("JPEG", CMYK))).convert("RGB"))
FILES = {  # name -> (bytes, what check finds, RGB or grey pixels or None)
    "exif.png": (with_chunk(b"eXIf", b"garbage!!"), None, PIXELS),
    "exif.webp": (encoded("WEBP", exif=b"Exif\0\0garbage!", lossless=True), None, PIXELS),
    "exif.jpg": (encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), None, None),
    "compressed_text.png": (with_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG)), None, PIXELS),
    "unicode_text.png": (with_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)), None, PIXELS),
    "profile.png": (with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG)), None, PIXELS),
    "huge_text.png": (with_chunk(b"tEXt", b"prompt\0" + 40 * LONG), None, PIXELS),
    "text_checksum.png": (with_chunk(b"tEXt", b"a\0hello", 1), None, PIXELS),
    "panorama.jpg": (JPEG[:-2] + b"SEFH" + 200 * b"\1\2\3" + b"SEFT", None, None),  # Samsung's: no end, a trailer
    "revision.jpg": (JPEG[:11] + b"\x09\x09" + JPEG[13:], None, None),  # libjpeg warns of it, but the pixels are right
    "grey16.png": (by_opencv(".png", GREY16), None, GREY16 >> 8),
    "grey16_trailer.png": (by_opencv(".png", GREY16) + 200 * b"trailer ", None, GREY16 >> 8),
    "grey16_turned.tif": (encoded("TIFF", GREY16, tiffinfo={274: 3}), None, GREY16 >> 8),  # read by PIL
    "black196.png": (black(14_000), None, None),  # above PIL's own limit
    "damaged.jpg": (JPEG[:HALF] + JPEG[HALF + 500:], "damaged file", None),
    "end_marker.jpg": (JPEG[:HALF] + b"\xff\xd9", "damaged file", None),
    "lzw.tif": (damaged_tiff("tiff_lzw"), "unreadable file", None),
    "deflate.tif": (damaged_tiff("tiff_adobe_deflate"), "unreadable file", None),
    "no_end.png": (encoded("PNG")[:-12], "truncated file", None),
    "truncated.jpg": (JPEG[:-300], "truncated file", None),
    "zeros.jpg": (JPEG[:HALF] + bytes(HALF), "truncated file", None),
    "truncated.bmp": (encoded("BMP")[:-900], "truncated file", None),
    "truncated.tif": (encoded("TIFF")[:-900], "truncated file", None),
    "truncated.webp": (encoded("WEBP")[:-300], "unreadable file", None),
    "float.tif": (by_opencv(".tiff", np.float32(PIXELS / 255)), "unreadable file", None),
    "float_grey.tif": (by_opencv(".tiff", np.float32(GREY16)), "unreadable file", None),
    "int32.tif": (encoded("TIFF", GREY16.astype(np.int32)), "unreadable file", None),
    "too_large.png": (of_size(40_000), "unreadable file", None),
    "jpeg.jfif": (JPEG, None, None), "jpeg.jpe": (JPEG, None, None),
    "cmyk.jpg": (encoded("JPEG", CMYK), None, RGB_OF_CMYK),  # OpenCV rounds otherwise than PIL
    "animated.png": (encoded("PNG", save_all=True, default_image=True, append_images=[Image.fromarray(255 - PIXELS)]),
                     None, PIXELS),  # OpenCV gives another frame
    "white_mask.png": (encoded("PNG", np.full((3000, 4000), 255, np.uint8)), None, None),
    "bits.webp": (encoded("WEBP", np.zeros((3000, 4000), np.uint8), lossless=True), None, None),
    "declared.jpg": (of_jpeg_size(16960, 30000), "unreadable file", None),  # 2.9 GiB, if anyone asked for them
    "declared_less.jpg": (of_jpeg_size(9000, 9000), "unreadable file", None),
    "declared.bmp": (encoded("BMP")[:18] + struct.pack("<ii", 10_000, 10_000) + encoded("BMP")[26:], "unreadable file",
                     None),
    "no_checksum.png": (by_opencv(".png", GREY16)[:-4], None, GREY16 >> 8),
    "checksum.png": (bad_checksum(), "damaged file", None),
    "values.tif": (encoded("TIFF")[:4] + b"\xff" * 4 + encoded("TIFF")[8:], "unreadable file", None),
    "rows.tif": (of_rows(10**7), "unreadable file", None),  # Pillow works on it for minutes
    "photoshop.png": (b"8BPS\0\1" + bytes(60), "unreadable file", None),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with FILES, and what check finds in it: {name: kind of the fault}."""
    folder = tmp_path_factory.mktemp("odd")
    for name, (content, _, _) in FILES.items():
        (folder / name).write_bytes(content)
    done = run_here("tools/check_data.py", folder, "--output", folder / "report.json")
    assert done.stderr == "", done.stderr
    found = json.loads((folder / "report.json").read_text())["findings"]
    return folder, {os.path.basename(item["files"][0]): item for item in found if item["severity"] == "fault"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest shows what data.py hides
@pytest.mark.parametrize("name", FILES)
def test_run_fingerprint_and_check_agree(odd, tmp_path, name, capfd):
    folder, faults = odd
    _, kind, pixels = FILES[name]
    assert faults.get(name, {}).get("kind") == kind
    (tmp_path / "one.json").write_text(json.dumps([[str(folder / name), "Negative"]]))
    if kind in (None, "damaged file"):
        assert len(data.JsonDataset(tmp_path / "one.json")) == 1
        image = data.read_image(folder / name)
        if pixels is not None:
            assert np.array_equal(image, pixels if pixels.ndim == 3 else np.dstack([pixels] * 3))
    else:
        if name not in ("lzw.tif", "deflate.tif"):  # only decoding tells
            with pytest.raises(UserError, match=name):
                data.JsonDataset(tmp_path / "one.json")
        with pytest.raises(UserError, match=name):
            data.read_image(folder / name)
    said = capfd.readouterr()
    assert said.err == ""  # where libjpeg and libpng print, without the file's name
    assert (name in said.out) == (kind == "damaged file")


def test_what_is_said_about_odd_files(odd):
    _, faults = odd
    assert "Corrupt JPEG data" in faults["damaged.jpg"]["text"]
    assert "float32" in faults["float.tif"]["text"] and "float32" in faults["float_grey.tif"]["text"]
    assert faults["truncated.jpg"]["text"] == "is truncated: copy it again or take it out."
    assert "too few for the 9000x9000 pixels" in faults["declared_less.jpg"]["text"]
    assert "16960x30000" in faults["declared.jpg"]["text"] and "MAX_PIXELS" in faults["declared.jpg"]["text"]
    assert "40000x40000" in faults["too_large.png"]["text"] and "210 megapixels" in faults["too_large.png"]["text"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_masks_are_as_stored_unless_only_the_turned_image_fits(tmp_path, kind, orientation):
    exif, (height, width) = Image.Exif(), PIXELS.shape[:2]
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    name = f"a.{kind.lower()}"
    (tmp_path / name).write_bytes(encoded(kind, exif=exif, **options))
    image, _, turned = data.read_pair(str(tmp_path / name), None)
    assert not turned and np.abs(image.astype(int) - PIXELS).mean() < 2
    mask = np.zeros((height, width), np.uint8)
    mask[:30, :50] = 255
    (tmp_path / "as_stored.tif").write_bytes(encoded("TIFF", mask, exif=exif))  # a mask with an orientation of its own
    Image.fromarray(mask.T).save(tmp_path / "turned.png")
    (tmp_path / "set.json").write_text(json.dumps([[name, "as_stored.tif"]]))
    data.JsonDataset(tmp_path / "set.json")
    image, found, turned = data.read_pair(str(tmp_path / name), str(tmp_path / "as_stored.tif"))
    assert not turned and np.array_equal(found, mask > 0) and np.abs(image.astype(int) - PIXELS).mean() < 2
    done = run_here("tools/resize_data.py", tmp_path / "set.json", tmp_path / "smaller", "--long_side", 60)
    small = data.JsonDataset(tmp_path / "smaller" / "set.json").read(0)[1]
    assert np.array_equal(small, found[1::2, 1::2]) or np.array_equal(small, found[::2, ::2]), done.stderr

    (tmp_path / "set.json").write_text(json.dumps([[name, "turned.png"]]))
    done = run_here("tools/check_data.py", tmp_path / "set.json", "--output", tmp_path / "report.json")
    assert done.returncode == (0 if orientation > 4 else 1)
    if orientation < 5:
        with pytest.raises(UserError, match="turned.png"):
            data.JsonDataset(tmp_path / "set.json")
        return
    data.JsonDataset(tmp_path / "set.json")
    image, _, turned = data.read_pair(str(tmp_path / name), str(tmp_path / "turned.png"))
    expected = {5: PIXELS.swapaxes(0, 1), 6: np.rot90(PIXELS, -1), 7: np.rot90(PIXELS.swapaxes(0, 1), 2),
                8: np.rot90(PIXELS)}[orientation]
    assert turned and np.abs(image.astype(int) - expected).mean() < 2

    # a smaller copy keeps all of that
    done = run_here("tools/resize_data.py", tmp_path / "set.json", tmp_path / "small", "--long_side", 60)
    assert done.returncode == 0, done.stderr
    small = data.JsonDataset(tmp_path / "small" / "set.json").read(0)[0]
    assert np.abs(small.astype(int) - cv2.resize(expected, (45, 60), interpolation=cv2.INTER_AREA)).mean() < 3


@pytest.mark.parametrize("value", [1, 100])
@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_mask_of_0_and_1_ends_the_run_at_its_first_reading(tmp_path, value, fingerprint):
    make_images(tmp_path, 2)
    mask = cv2.imread(str(tmp_path / "Gt/p001_gt.png"), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(tmp_path / "Gt/p001_gt.png"), mask // 255 * value)
    with pytest.raises(UserError, match="p001_gt.png: .*0 and 255"):
        data.ManiDataset(tmp_path, fingerprint=fingerprint)[1]


def test_the_last_pixel_of_a_side_survives_augmentation(tmp_path):
    image = np.zeros((1, 40, 3), np.uint8)
    transform = train.train_transform()
    shapes = set()
    for seed in range(20):
        transform.set_random_seed(seed)
        shapes.add(min(transform(image=image, mask=image[..., 0])["image"].shape[:2]))
    assert shapes == {1}


# ---------------------------------------------------------------------------------------------------------------------
# What a folder holds


def test_gif_masks_and_what_is_not_read(tmp_path, capsys):
    make_images(tmp_path, 2)
    mask = Image.open(tmp_path / "Gt/p001_gt.png")
    mask.save(tmp_path / "Gt/p001_gt.gif")
    (tmp_path / "Gt/p001_gt.png").unlink()
    for name in ("Tp/photo.heic", "Tp/other.HEIC", "Tp/moving.gif", "Tp/notes.txt"):
        (tmp_path / name).write_bytes(b"no image that is read")
    (tmp_path / "Tp/@eaDir").mkdir()
    shutil.copy(tmp_path / "Tp/p000.png", tmp_path / "Tp/@eaDir/p000.png")
    dataset = data.ManiDataset(tmp_path)
    assert len(dataset) == 2 and np.array_equal(dataset.read(1)[1] * 255, np.asarray(mask))
    assert capsys.readouterr().out == (f"note: {tmp_path}/Tp holds 1 .gif, 2 .heic, which are not read: convert to PNG "
                                       "or JPEG\n")
    done = run_here("tools/check_data.py", tmp_path, "--output", tmp_path / "report.json")
    assert done.returncode == 0 and "1 .gif, 2 .heic" in done.stdout


def test_what_is_no_file_and_what_resize_leaves_out(tmp_path):
    make_images(tmp_path / "set", 3, sizes=((96, 128),))
    (tmp_path / "set/Tp/p000.png").write_text("<html>")
    done = run_here("tools/resize_data.py", tmp_path / "set", tmp_path / "small", "--long_side", 60)
    assert done.returncode == 1 and "1 of 7 files can't be read and are left out, first" in done.stderr
    assert (tmp_path / "small/Tp/p002.png").exists()
    (tmp_path / "set/Tp/p000.png").unlink()
    os.mkfifo(tmp_path / "set/Tp/p000.png")  # reading it would never end
    done = run_here("tools/check_data.py", tmp_path / "set", "--output", tmp_path / "report.json")
    assert done.returncode == 1 and "no regular file" in done.stdout


def test_resize_knows_images_from_masks_by_their_folder(tmp_path):
    source = tmp_path / "set"
    for name in ("Tp/a_mask.png", "Tp/b_gt.png", "Gt/a_mask_gt.gif", "Gt/b_gt_gt.png", "masks/c.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        grey = PIXELS[..., 0] if name.startswith("Tp") else np.uint8(PIXELS[..., 0] > 128) * 255
        Image.fromarray(grey).save(source / name)
    colours = np.dstack([PIXELS, np.zeros((90, 120), np.uint8)])
    Image.fromarray(colours).save(source / "Tp/clear.webp", lossless=True, exact=True)
    done = run_here("tools/resize_data.py", source, tmp_path / "small", "--long_side", 60)
    assert done.returncode == 0 and "2 files of 6 taken for masks" in done.stdout, done.stderr
    for name in ("Tp/a_mask.png", "Tp/b_gt.png"):
        small = np.asarray(Image.open(tmp_path / "small" / name))
        assert np.array_equal(small, cv2.resize(PIXELS[..., 0], (60, 45), interpolation=cv2.INTER_AREA))
    for name in ("Gt/a_mask_gt.gif", "Gt/b_gt_gt.png"):
        assert set(np.unique(Image.open(tmp_path / "small" / name).convert("L"))) == {0, 255}
    small = np.asarray(Image.open(tmp_path / "small/Tp/clear.webp"))
    assert np.array_equal(small, cv2.resize(colours, (60, 45), interpolation=cv2.INTER_AREA))


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of MyModel."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "mymodel.pth"
    torch.save(models.mymodel.MyModel().state_dict(), path)
    return path


SMALL = ["--model", "MyModel", "--if_padding", "--image_size", 64, "--num_workers", 0]


def test_names_that_are_no_utf8(tmp_path, checkpoint):
    """As a zip file from a Chinese Windows unpacks: in names of files and of the dataset's folder."""
    folder = os.path.join(os.fsdecode(tmp_path), os.fsdecode(b"set_\xc4\xe3"))
    os.rename(make_images(tmp_path / "set", 2, authentic=1), folder)
    image, mask = os.fsdecode(b"Tp/\xb2\xe2.png"), os.fsdecode(b"Gt/\xb2\xe2_gt.png")
    os.rename(f"{folder}/Tp/p000.png", f"{folder}/{image}")
    os.rename(f"{folder}/Gt/p000_gt.png", f"{folder}/{mask}")
    tests = ["--checkpoint_path", checkpoint, *SMALL]
    commands = {
        "train": ["train.py", "--data_path", folder, "--test_data_path", folder, "--epochs", 1, *SMALL],
        "test": ["test.py", "--test_data_json", folder, "--save_per_image", *tests],
        "robust": ["test_robust.py", "--test_data_path", folder, "--attacks", "GaussianNoise", *tests],
        "save": ["save_images.py", "--test_data_path", folder, "--save_overlay", *tests]}
    for name, command in commands.items():
        done = run_here(*command, "--output_dir", tmp_path / name)
        assert done.returncode == 0 and done.stderr == "", (name, done.stderr)
    name = b"\xb2\xe2.png"
    assert name in (tmp_path / "test/set___/per_image.csv").read_bytes()
    assert name in (tmp_path / "save/scores.csv").read_bytes()
    assert os.path.exists(os.fsencode(tmp_path) + b"/save/pred/" + name)
    for words in (["tools/check_data.py", folder, "--output", tmp_path / "report.json"],
                  ["tools/make_pairs.py", "--image_root", f"{folder}/Tp", "--mask_root", f"{folder}/Gt", "--output",
                   tmp_path / "pairs.json"],
                  ["tools/resize_data.py", folder, tmp_path / "small", "--long_side", 64]):
        done = run_here(*words)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    done = run_here(*commands["test"], "--output_dir", f"{folder}/results")
    assert done.returncode == 1 and "not UTF-8" in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_with_a_dot_keeps_its_name(tmp_path):
    names = [list(data.open_sets(str(make_images(tmp_path / f"14_CASIA {version}", 1)), "--test_data_path"))
             for version in ("1.0", "2.0")]
    assert names == [["14_CASIA 1.0"], ["14_CASIA 2.0"]]


@pytest.mark.parametrize("name", ["...json", "...x", "..."])
def test_no_set_is_named_after_the_folder_above(tmp_path, checkpoint, name):
    """Whose log.txt and events a test would replace."""
    make_images(tmp_path / "set", 1)
    if name.endswith("json"):
        (tmp_path / name).write_text('[["set/Tp/p000.png", "set/Gt/p000_gt.png"]]')
    else:
        os.rename(tmp_path / "set", tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/log.txt").write_text("an earlier run's")
    done = run_here("test.py", "--test_data_json", tmp_path / name, "--checkpoint_path", checkpoint, *SMALL,
                    "--output_dir", tmp_path / "runs/out")
    assert done.returncode == 0 and os.listdir(tmp_path / "runs") == ["log.txt", "out"], done.stderr
    assert (tmp_path / "runs/log.txt").read_text() == "an earlier run's"
    folder = {"...json": "test", "...x": "x", "...": "test"}[name]
    assert os.path.exists(tmp_path / "runs/out" / folder / "log.txt")


def test_masks_stay_in_the_output_folder(tmp_path, checkpoint):
    """Whatever the paths are: absolute, with "..", through links, with newlines and quotes, or no UTF-8."""
    for folder in ("in", "in/deep", "away"):
        make_images(tmp_path / folder, 1)
    (tmp_path / "in/link").symlink_to(tmp_path / "away")
    for name in ("two\nlines.png", "quo'te\".png", "日本.png", os.fsdecode(b"\xb2\xe2.png"), "=1+1.png"):
        shutil.copy(tmp_path / "away/Tp/p000.png", tmp_path / "away" / name)
    images = ["deep/../deep/Tp/p000.png", str(tmp_path / "away/Tp/../Tp/p000.png"), "link/Tp/p000.png",
              "../away/Gt/p000_gt.png", *(f"../away/{name}" for name in os.listdir(tmp_path / "away") if "." in name)]
    images = [name for name in images if not name.endswith(".json")]
    (tmp_path / "in/all.json").write_text(json.dumps([[name, "Negative"] for name in images]))
    before = sorted(map(str, tmp_path.rglob("*")))
    done = run_here("save_images.py", "--test_data_path", tmp_path / "in/all.json", "--checkpoint_path", checkpoint,
                    *SMALL, "--output_dir", tmp_path / "out", "--save_overlay", "--no_fingerprint")
    assert done.returncode == 0, done.stderr
    written = [path for path in map(str, tmp_path.rglob("*")) if path not in before]
    assert all(f"{path}/".startswith(f"{tmp_path}/out/") for path in written)
    assert sum(path.endswith(".png") for path in written) == 2 * len(images) == 18


def test_output_inside_the_folder_of_images(tmp_path, checkpoint):
    photos = make_images(tmp_path, 3) / "Tp"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(photos / "turned.jpg", exif=exif)
    command = ["save_images.py", "--test_data_path", photos, "--checkpoint_path", checkpoint, "--output_dir",
               photos / "out", *SMALL]
    first, second = run_here(*command), run_here(*command)
    assert "4 masks in" in first.stdout and "left out" not in first.stdout, first.stderr
    assert "4 masks in" in second.stdout and f"4 images in {photos}/out/pred, where this run writes" in second.stdout
    assert "1 of them with an EXIF orientation, which is not applied: masks are as stored" in first.stdout
    assert Image.open(photos / "out/pred/turned.png").size == (120, 90)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_json_from_windows(tmp_path):
    make_images(tmp_path, 2)
    pairs = [["Tp\\p000.png", "Gt\\p000_gt.png"], ["Tp\\p001.png", "Negative"]]
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / "windows.json").write_text(json.dumps(pairs), encoding=encoding)
        dataset = data.open_dataset(str(tmp_path / "windows.json"), "--data_path")
        assert dataset[0]["label"] == 1 and len(dataset) == 2
    (tmp_path / "sets.json").write_text(json.dumps({"set": ".\\windows.json"}), encoding="utf-16")
    assert len(data.open_sets(str(tmp_path / "sets.json"), "--test_data_path")["set"]) == 2
    done = run_here("tools/check_data.py", tmp_path / "sets.json", "--output", tmp_path / "report.json")
    assert done.returncode == 0 and "OK: 2 images" in done.stdout


@pytest.mark.parametrize("content, words", [
    (json.dumps([["é.png", "Negative"]], ensure_ascii=False).encode("latin-1"), "not encoded as UTF-8"),
    (b'["a.png", "Negative"]\n["b.png", "Negative"]\n', "several JSON values, one per line"),
    (b'["a.png", "Negative"],\n["b.png", "Negative"],\n', "several JSON values, one per line"),
    (b'{"image": "a.png"}\n{"image": "b.png"}\n', "several JSON values, one per line")])
def test_lists_of_another_kind_get_their_own_cure(tmp_path, content, words):
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        data.JsonDataset(tmp_path / "set.json")


@pytest.mark.parametrize("first, second, fits", [("img{}", "{:03d}_mask", False), ("img{:02d}", "m{:03d}", True),
                                                 ("img{}", "m{}", True), ("img{}_512", "m{:03d}_512", False),
                                                 ("a{:02d}_2020", "m{:02d}_1", True)])
def test_pairs_by_order_whose_numbers_disagree_are_refused(tmp_path, first, second, fits):
    for side, name in (("Tp", first), ("Gt", second)):
        (tmp_path / side).mkdir()
        for number in range(1, 13):
            (tmp_path / side / f"{name.format(number)}.png").write_bytes(b"not read here")
    if fits:
        assert len(data.ManiDataset.find(str(tmp_path))[0]) == 12
    else:
        with pytest.raises(UserError, match=r"img10(.png .* 002_mask|_512.png .* m001_512).png, of another number"):
            data.ManiDataset.find(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# What is no file, and caches


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "sparse"])
def test_what_is_no_regular_file_is_never_waited_for(tmp_path, monkeypatch, kind):
    make_images(tmp_path / "set", 2)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short

    def put(path):
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(path.relative_to(tmp_path)))
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with open(path, "wb") as file:
                file.truncate(2**33)

    put(tmp_path / "list.json")
    for options in ({}, {"fingerprint": False}):
        with pytest.raises(UserError, match="list.json"):
            data.open_sets(str(tmp_path / "list.json"), "--test_data_json", **options)
    (tmp_path / "sets.json").write_text('{"one": "list.json"}')
    done = run_here("tools/check_data.py", tmp_path / "sets.json", "--output", tmp_path / "report.json",
                    "--contact_sheet", tmp_path / "sheet.png")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    put(tmp_path / "set/.scan.npz")  # a cache that isn't one is replaced
    assert data.ManiDataset(tmp_path / "set").facts.tampered == 2
    (tmp_path / "set/set.json").write_text('[["Tp/p000.png", "Gt/p000_gt.png"]]')
    for name in ("Gt/p000_gt.png", "Tp/p000.png"):
        put(tmp_path / "set" / name)
        for options in ({}, {"fingerprint": False}):
            with pytest.raises(UserError, match=name):
                data.JsonDataset(tmp_path / "set/set.json", **options)[0]
    data.FolderDataset(tmp_path / "set", fingerprint=False).describe()


def test_a_broken_cache_is_ignored_and_replaced(tmp_path):
    dataset = data.ManiDataset(make_images(tmp_path, 2))
    cache, rng = tmp_path / ".scan.npz", np.random.default_rng(0)
    good = cache.read_bytes()
    with np.load(cache) as stored:
        files, rows = stored["files"], stored["rows"]

    def saved(save=np.savez, **arrays):
        save(cache, **arrays)
        return cache.read_bytes()

    broken = [saved(files=files), saved(rows=rows), saved(files=files, rows=rows[:1]), saved(files=files, rows=rows[0]),
              saved(files=files, rows=rows[None]), saved(files=files, rows=np.array([None])), b"",
              saved(np.savez_compressed, files=np.zeros(10**7, np.uint8), rows=rows)]
    broken += [good.replace(b"(4,)", b"(%d,)" % (10**count))[:len(good)] for count in (5, 12)]
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(len(good), size=rng.integers(1, 9)):
            content[place] ^= 1 << rng.integers(8)
        broken += [bytes(content), good[:rng.integers(len(good))]]
    for content in broken:
        cache.write_bytes(content)
        assert data.ManiDataset(tmp_path).fingerprint == dataset.fingerprint
    os.utime(tmp_path / "Tp/p000.png")
    assert data.ManiDataset(tmp_path).fingerprint == dataset.fingerprint
    assert data.read_cache(cache)[1].shape == (4,)
