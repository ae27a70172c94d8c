"""tools/resize_data.py: sizes, tree, quality, after kill -9, JSON. Run: python -m pytest tests/test_resize.py"""
import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from sklearn.datasets import load_sample_images

from conftest import ROOT, run_here


def run_resize(*arguments):
    """Run the tool; returns (exit code, standard output, standard error)."""
    done = run_here("tools/resize_data.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def tree(folder):
    """{relative path: bytes} of everything below a folder, hidden files too, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def dataset(tmp_path):
    """A ManiDataset of one photograph (427 x 640) in several file formats, and a small image."""
    photograph = load_sample_images().images[0]
    mask = np.zeros(photograph.shape[:2], np.uint8)
    cv2.circle(mask, (300, 200), 90, 255, -1)
    root = tmp_path / "source"
    (root / "Tp/sub").mkdir(parents=True)
    (root / "Gt/sub").mkdir(parents=True)
    image = Image.fromarray(photograph)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "Tp/a.jpg", quality=83, subsampling=0)
    image.save(root / "Tp/b.jpg", quality=61, exif=exif)
    image.save(root / "Tp/sub/c.png")
    image.save(root / "Tp/d.tif")
    image.crop((0, 0, 120, 90)).save(root / "Tp/small.jpg", quality=90)
    for name in ("a_gt", "b_gt", "sub/c_gt", "d_gt"):
        Image.fromarray(mask).rotate(-90 if name == "b_gt" else 0, expand=True).save(root / f"Gt/{name}.png")
    Image.fromarray(mask[:90, :120]).save(root / "Gt/small_gt.png")
    (root / "readme.csv").write_text("kept, as it is")
    return root


def test_resize_keeps_tree_quality_and_pairs(dataset, tmp_path):
    code, output, _ = run_resize(dataset, tmp_path / "small", "--long_side", 160)
    assert code == 0 and "8 files changed, 3 copied, 0 already there" in output
    before, after = tree(dataset), tree(tmp_path / "small")
    assert set(after) == set(before) | {".resize.json"}
    for name in ("Tp/small.jpg", "Gt/small_gt.png", "readme.csv"):
        assert after[name] == before[name]
    for name in ("Tp/a.jpg", "Tp/b.jpg"):
        old, new = Image.open(dataset / name), Image.open(tmp_path / "small" / name)
        assert new.size == (160, 107) and new.quantization == old.quantization
        assert JpegImagePlugin.get_sampling(new) == JpegImagePlugin.get_sampling(old)
        assert new.getexif().get(0x0112) == old.getexif().get(0x0112)
    assert Image.open(tmp_path / "small/Gt/b_gt.png").size == (107, 160)  # fits the image turned by EXIF, as before
    assert set(np.unique(Image.open(tmp_path / "small/Gt/a_gt.png"))) == {0, 255}
    expected = cv2.resize(np.asarray(Image.open(dataset / "Tp/sub/c.png")), (160, 107), interpolation=cv2.INTER_AREA)
    assert np.array_equal(Image.open(tmp_path / "small/Tp/sub/c.png"), expected)


def test_masks_of_a_plain_tree_are_not_blurred(dataset, tmp_path):
    (dataset / "Gt").rename(dataset / "truth")
    (dataset / "truth/a_gt.png").rename(dataset / "truth/a.png")
    assert run_resize(dataset, tmp_path / "small", "--long_side", 160, "--masks", "truth")[0] == 0
    assert set(np.unique(Image.open(tmp_path / "small/truth/a.png"))) == {0, 255}


def test_killed_resize_continues_to_the_same_bytes(tmp_path):
    source, noise = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for number in range(20):
        Image.fromarray(noise.integers(0, 256, (600, 600, 3), np.uint8)).save(source / f"{number}.png")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_resize(source, whole, "--long_side", 500)[0] == 0
    command = [sys.executable, ROOT / "tools/resize_data.py", source, killed, "--long_side", "500"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(killed.glob("*.png")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(list(killed.glob("*.png")))
    assert 0 < done < 20, "the run was over before it could be killed"
    code, output, _ = run_resize(source, killed, "--long_side", 500)
    assert code == 0 and f"{20 - done} files changed, 0 copied, {done} already there" in output
    assert tree(killed) == tree(whole)


def test_resize_rewrites_json(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [["source/Tp/a.jpg", "source/Gt/a_gt.png"], [str(dataset / "Tp/small.jpg"), "Negative"]]
    (tmp_path / "list.json").write_text(json.dumps(pairs))
    (tmp_path / "sets.json").write_text(json.dumps({"list": "list.json", "folder": "source"}))
    assert run_resize("sets.json", "small", "--long_side", 160)[0] == 0
    small = json.loads((tmp_path / "small/list.json").read_text())
    assert small == [["Tp/a.jpg", "Gt/a_gt.png"], ["Tp/small.jpg", "Negative"]]
    assert json.loads((tmp_path / "small/sets.json").read_text()) == {"list": "list.json", "folder": "."}
    assert Image.open(tmp_path / "small/Gt/sub/c_gt.png").size == (160, 107)


def test_resize_refuses_in_one_sentence(dataset, tmp_path):
    (dataset / "Tp/cut.jpg").write_bytes((dataset / "Tp/a.jpg").read_bytes()[:9000])
    before = tree(dataset)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for arguments, word in (((dataset, dataset), "inside"), ((dataset, dataset / "small"), "inside"),
                            ((tmp_path / "none", tmp_path / "x"), "none"), ((dataset, tmp_path / "full"), "not empty"),
                            ((dataset, tmp_path / "ok", "--long_side", 160), "cut.jpg")):
        code, output, error = run_resize(*arguments)
        assert code == 1 and error.count("\n") == 1 and word in error, error
    assert len(tree(tmp_path / "ok")) == len(before)  # all but the broken one, and the note
    assert tree(dataset) == before
