"""tools/check_data.py: every trap is planted once and found once. Run: python -m pytest tests/test_check.py"""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from conftest import ROOT, run_here

SIZE = 80, 112  # of the images here: height, width


def run_check(folder, *arguments):
    """Run the tool; returns (exit code, output, findings as a Counter of (kind, severity, names below `folder`))."""
    done = run_here("tools/check_data.py", *arguments, "--output", folder / "report.json")
    assert done.stderr == ""
    found = Counter()
    for item in json.loads((folder / "report.json").read_text())["findings"]:
        names = sorted(str(Path(folder, file).relative_to(folder)) for file in item["files"])
        found[item["kind"], item["severity"], tuple(names)] += 1
    return done.returncode, done.stdout, found


@pytest.fixture(scope="module")
def photographs():
    """Different images: the cells of scikit-learn's two photographs, plain and mirrored, but those of clear sky."""
    height, width = SIZE
    cells = [np.ascontiguousarray(photograph[y:y + height, x:x + width][:, ::step])
            for step in (1, -1) for photograph in load_sample_images().images
            for y in range(0, 5 * height, height) for x in range(0, 5 * width, width)]
    return [cell for cell in cells if cv2.cvtColor(cell, cv2.COLOR_RGB2GRAY).std() > 6]


def rectangle(size=SIZE, top=20, left=30):
    """A mask with a rectangle of 24 x 36 pixels."""
    mask = np.zeros(size, np.uint8)
    mask[top:top + 24, left:left + 36] = 255
    return mask


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return {"exif": exif}


def compress_and_resize(pixels, factor):
    """JPEG pixels of quality 70 after resizing by a factor."""
    small = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    return cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], cv2.IMREAD_COLOR)


def plant(root, photographs):
    """Write one JSON set, p.json, that holds each fault of a file or pair once; returns what check must find in it."""
    pixels, pairs, expected = iter(photographs), [], Counter()

    def add(name, mask=None, image=None, kinds=(), suffix=".png", mask_bytes=None, on_mask=False, negative=False,
            **options):
        image_path, mask_path = f"p/{name}{suffix}", f"m/{name}_gt.png"
        save(root / image_path, next(pixels) if image is None else image, **options)
        if not negative:
            save(root / mask_path, rectangle() if mask is None else mask)
            if mask_bytes is not None:
                (root / mask_path).write_bytes(mask_bytes((root / mask_path).read_bytes()))
        pairs.append([image_path, "Negative" if negative else mask_path])
        for kind, severity in kinds:
            files = (mask_path, image_path) if kind == "sizes differ" else (mask_path,) if on_mask else (image_path,)
            expected[kind, severity, files] += 1
        return root / image_path

    def damage(kind, name, change, suffix=".png"):
        path = add(name, kinds=[(kind, "fault")], suffix=suffix)
        path.write_bytes(change(path.read_bytes()))
        return path

    for number in range(6):
        add(f"good_{number}", suffix=".jpg", quality=60 + 5 * number)
        add(f"authentic_{number}", negative=True)

    damage("truncated file", "cut_jpeg", lambda data: data[:-400], ".jpg")
    damage("truncated file", "cut_png", lambda data: data[:-9])
    damage("truncated file", "cut_bmp", lambda data: data[:-3000], ".bmp")
    damage("empty file", "empty", lambda data: b"")
    damage("unreadable file", "text", lambda data: b"<html>not found</html>", ".jpg")
    damage("missing file", "gone", lambda data: data).unlink()
    add("mask_cut", kinds=[("truncated file", "fault")], mask_bytes=lambda data: data[:-20], on_mask=True)
    thumb = add("exif_thumb", suffix=".jpg", kinds=[("truncated file", "fault")])
    data = thumb.read_bytes()  # it gets an end marker in its header only
    thumb.write_bytes(data[:2] + b"\xff\xe1\x00\x08\xff\xd8\xff\xd9\x00\x00" + data[2:-2])

    add("cropped_mask", rectangle((76, 112)), kinds=[("sizes differ", "fault")])
    add("turned_mask", rectangle(SIZE[::-1]), kinds=[("sizes differ", "fault")])
    add("black", np.zeros(SIZE, np.uint8), kinds=[("mask all black", "remark")], on_mask=True)
    add("white", np.full(SIZE, 255, np.uint8), kinds=[("mask all white", "fault")], on_mask=True)
    add("zero_one", rectangle() // 255, kinds=[("mask 0/1", "fault")], on_mask=True)
    add("dark", rectangle() // 255 * 100, kinds=[("mask too dark", "fault")], on_mask=True)
    add("inverted", 255 - rectangle(), kinds=[("inverted-looking mask", "remark")], on_mask=True)
    add("grey", cv2.GaussianBlur(rectangle(), (15, 15), 0), kinds=[("grey mask", "remark")], on_mask=True)
    large = np.zeros(SIZE, np.uint8)
    large[25:] = 255
    add("rightly_large", large)
    for name, colours, severity in (("palette_red", [0, 0, 0, 128, 0, 0], "fault"),
                                    ("palette_white", [0, 0, 0, 255, 255, 255], "remark")):
        add(name, kinds=[("palette mask", severity)], on_mask=True)
        palette = Image.fromarray(rectangle() // 255).convert("P")
        palette.putpalette(colours)
        palette.save(root / f"m/{name}_gt.png")

    add("as_stored", suffix=".jpg", kinds=[("EXIF orientation", "remark")], **with_orientation(6))
    add("to_turn", rectangle(SIZE[::-1]), suffix=".jpg", kinds=[("EXIF orientation", "remark")], **with_orientation(8))
    add("upside_down", suffix=".jpg", kinds=[("EXIF orientation", "remark")], **with_orientation(3))

    for name, other in (("swapped_a", "swapped_b"), ("swapped_b", "swapped_a")):
        add(name)
        pairs[-1][1] = f"m/{other}_gt.png"
        expected["names do not match", "fault", tuple(sorted(pairs[-1]))] += 1

    twice = next(pixels)
    for name in ("twice_a", "twice_b"):
        add(name, image=twice)
    expected["duplicate", "remark", ("p/twice_a.png", "p/twice_b.png")] += 1
    doubtful = next(pixels)
    for name, top in (("doubtful_a", 20), ("doubtful_b", 30)):
        add(name, rectangle(top=top), image=doubtful)
    expected["duplicate with another mask", "fault", ("p/doubtful_a.png", "p/doubtful_b.png")] += 1
    add("again", suffix=".jpg", quality=95, image=next(pixels))
    add("again_small", suffix=".jpg", image=compress_and_resize(np.asarray(Image.open(root / "p/again.jpg")), 1.1),
        mask=cv2.resize(rectangle(), (123, 88), interpolation=cv2.INTER_NEAREST), quality=95)
    expected["near duplicate", "remark", ("p/again.jpg", "p/again_small.jpg")] += 1
    original = next(pixels)  # an original and two edited versions of it in one set are normal
    add("original", image=original, negative=True)
    for name, left in (("edited_a", 10), ("edited_b", 70)):
        mask = rectangle(left=left)
        add(name, mask, image=np.where(mask[..., None] > 0, next(pixels), original))

    wide = np.concatenate([next(pixels), next(pixels)], axis=1)
    add("wide", rectangle((80, 224)), image=wide, kinds=[("cropped", "remark")])
    add("wide_gone", rectangle((80, 224), left=180), image=wide[::-1].copy(),
        kinds=[("tampering cropped away", "fault")])

    known = "published faulty file"
    add("Tp_D_CNN_M_N_sec00011_cha00085_11227", suffix=".jpg", kinds=[(known, "remark")])  # fixed: the sizes agree
    add("z14/00030_fake", rectangle((70, 112)), suffix=".jpg", kinds=[(known, "fault"), ("sizes differ", "fault")])
    # Tampered, but listed as authentic:
    add("Sp_D_NRN_A_cha0011_sec0011_0542", suffix=".jpg", negative=True, kinds=[(known, "fault")])
    add("41", mask=rectangle((80, 100)), kinds=[("sizes differ", "fault")])
    (root / "m/41_gt.png").rename(root / "m/41forged.tif")
    pairs[-1][1] = "m/41forged.tif"
    del expected["sizes differ", "fault", ("m/41_gt.png", "p/41.png")]
    expected["sizes differ", "fault", ("m/41forged.tif", "p/41.png")] += 1
    expected[known, "fault", ("m/41forged.tif",)] += 1

    (root / "p.json").write_text(json.dumps(pairs))
    return expected, pixels


def test_each_trap_is_found_and_nothing_else(tmp_path, photographs):
    expected, pixels = plant(tmp_path, photographs)
    for name in ("extra/Tp/a.png", "extra/Tp/b.png", "order/Tp/one.png", "order/Tp/two.png"):
        save(tmp_path / name, next(pixels))
    for name in ("extra/Gt/a_gt.png", "extra/Gt/c_gt.png", "order/Gt/first.png", "order/Gt/second.png"):
        save(tmp_path / name, rectangle())
    expected["unpaired file", "fault", ("extra/Tp/b.png",)] += 1
    expected["unpaired file", "fault", ("extra/Gt/c_gt.png",)] += 1
    expected["paired by order", "fault", ("order/Gt/first.png", "order/Tp/one.png")] += 1

    code, output, found = run_check(tmp_path, tmp_path / "p.json", tmp_path / "extra", tmp_path / "order",
                                    "--if_padding", "--image_size", 160, "--contact_sheet", tmp_path / "sheet.png")
    assert found == expected
    assert code == 1
    faults = sum(count for (_, severity, _), count in expected.items() if severity == "fault")
    assert output.splitlines()[-1] == f"{faults} faults, {sum(expected.values()) - faults} remarks"
    assert "turned by 90 degrees" in output
    assert Image.open(tmp_path / "sheet.png").size == (1600, 1080)


def test_leaks_between_sets(tmp_path, photographs):
    originals = photographs[:12]
    for number, pixels in enumerate(originals):
        save(tmp_path / f"train/Tp/{number}.png", pixels)
        save(tmp_path / f"train/Gt/{number}_gt.png", rectangle())
    for number, pixels in enumerate(originals[:6]):
        save(tmp_path / f"test/leak_{number}.jpg", compress_and_resize(pixels, 0.9 if number % 2 else 1.1), quality=70)
    save(tmp_path / "test/bytes.png", originals[6])
    save(tmp_path / "test/edited.png", np.where(rectangle()[..., None] > 0, photographs[50], originals[7]))
    for number, pixels in enumerate(photographs[60:66]):
        save(tmp_path / f"test/new_{number}.png", pixels)
    code, output, found = run_check(tmp_path, tmp_path / "train", tmp_path / "test")
    assert found == Counter({
        **{("leak", "fault", (f"test/leak_{number}.jpg", f"train/Tp/{number}.png")): 1 for number in range(6)},
        ("leak", "fault", ("test/bytes.png", "train/Tp/6.png")): 1,
        ("shared scene", "remark", ("test/edited.png", "train/Tp/7.png")): 1})
    assert code == 1 and f"(equal bytes) is in {tmp_path}/train and {tmp_path}/test." in output

    (tmp_path / "b.json").write_text(json.dumps([["ManiDataset", "train"]]))
    code, output, found = run_check(tmp_path, tmp_path / "b.json")
    assert (code, found) == (0, Counter())
    assert "replaces" in output and output.splitlines()[-1].startswith("OK: 12 images")

    (tmp_path / "sets.json").write_text(json.dumps({"train": "train", "gone": "nowhere"}))
    code, output, found = run_check(tmp_path, tmp_path / "sets.json")
    assert (code, found) == (1, Counter({("unusable set", "fault", ("sets.json",)): 1}))


def test_frames_of_one_video_are_one_finding(tmp_path, photographs):
    rng = np.random.default_rng(0)
    for number in range(40):
        frame = photographs[0].astype(int) + rng.integers(-6, 7, photographs[0].shape)
        folder = "train" if number < 30 else "test"
        save(tmp_path / folder / f"{number:02}.png", np.clip(frame, 0, 255).astype(np.uint8))
    frames = [f"train/{number:02}.png" for number in range(30)]
    _, _, found = run_check(tmp_path, tmp_path / "train")
    assert found == Counter({("near duplicate", "remark", tuple(frames)): 1})
    frames = tuple(sorted(frames + [f"test/{number:02}.png" for number in range(30, 40)]))
    code, output, found = run_check(tmp_path, tmp_path / "train", tmp_path / "test")
    assert code == 1 and found == Counter({("leak", "fault", frames): 1})
    assert "(40 in all)" in output and f"is in {tmp_path}/train and {tmp_path}/test." in output


def test_an_equal_last_number_is_a_match_unless_another_mask_has_the_name(tmp_path, photographs):
    masks = ["Sp_S_CNN_A_nat0078_nat0078_0004", "Sp_D_NNN_A_ani0099_ani0100.0288",
             "Sp_S_NNN_C_txt0004_txt0004_0004", "Sp_S_NNN_R_txt0004_txt0004_0004",
             "Sp_S_NRD_A_pla0075_pla0075_0588", "Tp_D_NRN_M_N_cha00085_ani10104_10029", "Tp_S_NNN_S_N_sec00012_11230",
             "Tp_D_CRN_M_N_pla00035_pla00033_10997"]
    images = [*masks[:2], masks[3], masks[2], "Sp_D_NRD_A_pla0075_pla0075_0588",  # two with one number are swapped
              "Tp_S_NRN_M_N_cha00085_ani10104_10029", masks[6], "Tp_D_CRN_M_N_pla00035_pla00033_10998"]
    pairs = [[f"p/{image}.jpg", f"m/{mask}_gt.png"] for image, mask in zip(images, masks)]
    for (image, mask), pixels in zip(pairs, photographs):
        save(tmp_path / image, pixels)
        save(tmp_path / mask, rectangle())
    (tmp_path / "p.json").write_text(json.dumps(pairs))
    code, _, found = run_check(tmp_path, tmp_path / "p.json")
    assert code == 1 and {files: kind for kind, severity, files in found if severity == "fault"} == {
        tuple(sorted(pairs[i])): "names do not match" for i in (2, 3, 7)}


def test_real_known_bad_names(tmp_path, photographs):
    published = json.loads((ROOT / "runs/known_bad.json").read_text())
    names = [entry["name"] for part in published.values() for entry in part]
    save(tmp_path / "set/tiny.png", photographs[0])
    for name in names:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "set/tiny.png").read_bytes())
    code, output, found = run_check(tmp_path, tmp_path / "set")
    recognised = {files for kind, _, files in found if kind == "published faulty file"}
    assert recognised == {(f"set/{name}",) for name in names}
    assert code == 0  # in a plain folder nothing shows that these copies are not fixed


def test_a_reader_that_ends_early(tmp_path, photographs):
    """As `| head -1` does."""
    for number in range(400):  # more than a pipe holds
        save(tmp_path / f"set/{'long name ' * 20}{number}.png", rectangle())
    command = [sys.executable, ROOT / "tools/check_data.py", tmp_path / "set", "--output", tmp_path / "report.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    assert errors == "" and process.returncode == 1


@pytest.mark.parametrize("content", [None, "{", "[[1, 2]]"])
def test_bad_input_is_one_sentence(tmp_path, content):
    if content:
        (tmp_path / "set.json").write_text(content)
    done = run_here("tools/check_data.py", tmp_path / "set.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "set.json" in done.stderr
