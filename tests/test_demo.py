"""tools/make_demo.py: the demo dataset. Run: python -m pytest tests/test_demo.py"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from conftest import ROOT, run_here

sys.path.insert(0, str(ROOT / "tools"))

import make_demo

SMALL = "--train", 8, "--test", 5


def run_demo(folder, *flags):
    """Run the tool; returns the CompletedProcess."""
    return run_here("tools/make_demo.py", "--output", folder, *(flags or SMALL))


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo_data"
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pixel-level F1 of predicting everything tampered: 0.") == 2
    return folder


def test_sets_are_complete_and_consistent(demo_folder):
    listed = set()
    for name, count in (("train", 8), ("test_splicing", 5), ("test_copymove_inpainting", 5)):
        pairs = json.loads((demo_folder / f"{name}.json").read_text())
        assert len(pairs) == count
        assert {Path(image).name.split("_")[0] for image, _ in pairs} == set(make_demo.SETS[name])
        for image, mask in pairs:
            listed |= {image, mask}
            shape = cv2.imread(str(demo_folder / image)).shape[:2]
            assert max(shape) == 256
            assert (mask == "Negative") == (Path(image).parent.name == "Au")
            if mask != "Negative":
                assert Path(mask).stem == Path(image).stem + "_gt"
                values = cv2.imread(str(demo_folder / mask), cv2.IMREAD_UNCHANGED)
                assert values.shape == shape and set(np.unique(values)) == {0, 255}
                assert 0.01 < (values > 0).mean() < 0.4
    assert listed - {"Negative"} == {path for path in read_files(demo_folder) if "/" in path}
    test_sets = json.loads((demo_folder / "test_datasets.json").read_text())
    assert test_sets == {"splicing": "test_splicing.json", "copymove_inpainting": "test_copymove_inpainting.json"}


@pytest.mark.parametrize("kind", list(make_demo.MANIPULATIONS))
def test_mask_marks_what_changed(kind):
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for _ in range(6):
        host = make_demo.add_sensor_noise(rng, make_demo.crop_photograph(rng, photographs[0], (256, 192)), 4)
        image, mask = make_demo.MANIPULATIONS[kind](rng, host, photographs)
        changed = (image != host).any(-1)
        assert changed[mask == 1].mean() > 0.9
        assert not changed[cv2.dilate(mask, np.ones((25, 25), np.uint8)) == 0].any()  # but for the soft edge


def test_same_seed_same_bytes_and_other_seed_other_images(demo_folder, tmp_path):
    run_demo(tmp_path / "again")
    run_demo(tmp_path / "other", *SMALL, "--seed", 7)
    first, again, other = (read_files(folder) for folder in (demo_folder, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert all(other[path] != first[path] for path in other if path in first and path.endswith(".jpg"))


def test_training_and_test_images_share_no_pixel(demo_folder, tmp_path, monkeypatch):
    """Blacking out the columns of one side leaves every file of the other side, donors included, byte for byte."""
    train, test = make_demo.TRAIN_COLUMNS, make_demo.TEST_COLUMNS
    assert train.stop < test.start
    originals, reference = load_sample_images().images, read_files(demo_folder)
    for kept, side in ((train, "train"), (test, "test")):
        blackened = [np.zeros_like(photograph) for photograph in originals]
        for black, photograph in zip(blackened, originals):
            black[:, kept] = photograph[:, kept]
        monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: SimpleNamespace(images=blackened))
        run_demo(tmp_path / side)
        files = read_files(tmp_path / side)
        images = [path for path in reference if path.endswith(".jpg")]
        same = {path for path in images if files[path] == reference[path]}
        assert same == {path for path in images if path.startswith(side)}


def test_own_output_is_replaced(tmp_path):
    run_demo(tmp_path / "own", "--train", 12, "--test", 5, "--seed", 1)
    run_demo(tmp_path / "own", *SMALL, "--seed", 2)
    run_demo(tmp_path / "fresh", *SMALL, "--seed", 2)
    assert read_files(tmp_path / "own") == read_files(tmp_path / "fresh")


def test_mistakes_are_refused_in_one_sentence(tmp_path):
    keepsake = tmp_path / "foreign/train/Tp/splicing_0000.jpg"
    keepsake.parent.mkdir(parents=True)
    keepsake.write_bytes(b"mine")
    (tmp_path / "file").write_text("")
    for folder, flags, words in (("foreign", SMALL, "did not make"), ("file", SMALL, "this is a file"),
                                 ("file/below", SMALL, "can't be"), ("new", ("--train", 1), "--train 1"),
                                 ("new", ("--seed", -1), "--seed")):
        done = run_demo(tmp_path / folder, *flags)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr
    assert keepsake.read_bytes() == b"mine" and len(read_files(tmp_path)) == 2


def test_constant_prediction_f1_by_hand(tmp_path, demo_folder):
    """Predicting everything tampered has precision a, the tampered fraction, and recall 1: F1 is 2a / (1 + a)."""
    printed = run_demo(tmp_path / "demo").stdout.splitlines()[1]
    masks = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127 for path in (demo_folder / "test_splicing/Gt").iterdir()]
    f1 = np.mean([2 * mask.sum() / (mask.sum() + mask.size) for mask in masks])
    assert f"tampered fraction {np.mean([mask.mean() for mask in masks]):.3f}" in printed
    assert printed.endswith(f" {f1:.2f}")
