"""The demo data set. Run: pytest tests/test_demo.py"""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "data.py"

import prepare
from registry import UserError

SMALL = {"train": 8, "test": 5}


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo_data"
    prepare.make_demo(folder, **SMALL)
    return folder


def test_sets_are_complete_and_consistent(demo_folder):
    listed = set()
    for name, count in (("train", 8), ("test_splicing", 5), ("test_copymove_inpainting", 5)):
        pairs = json.loads((demo_folder / f"{name}.json").read_text())
        assert len(pairs) == count
        assert {Path(image).name.split("_")[0] for image, _ in pairs} == set(prepare.DEMO_SETS[name])
        for image, mask in pairs:
            listed |= {image, mask}
            picture = cv2.imread(str(demo_folder / image))
            assert max(picture.shape[:2]) == 256
            assert (mask == "Negative") == (Path(image).parent.name == "Au")
            if mask != "Negative":
                assert Path(mask).stem == Path(image).stem + "_gt"
                values = cv2.imread(str(demo_folder / mask), cv2.IMREAD_UNCHANGED)
                assert values.shape == picture.shape[:2] and set(np.unique(values)) == {0, 255}
                assert 0.01 < (values > 0).mean() < 0.4
    assert listed - {"Negative"} == {path for path in read_files(demo_folder) if "/" in path}
    test_sets = json.loads((demo_folder / "test_datasets.json").read_text())
    assert test_sets == {"splicing": "test_splicing.json", "copymove_inpainting": "test_copymove_inpainting.json"}


@pytest.mark.parametrize("kind", list(prepare.DEMO_MANIPULATIONS))
def test_mask_marks_what_changed(kind):
    regions = prepare.demo_regions(prepare.demo_photographs(), "train")
    rng = np.random.default_rng(0)
    for _ in range(6):
        host = prepare.add_sensor_noise(rng, prepare.crop_photograph(rng, regions[0], (256, 192)), 4)
        picture, mask = prepare.DEMO_MANIPULATIONS[kind](rng, host, regions)
        changed = (picture != host).any(-1)
        assert changed[mask == 1].mean() > 0.9
        assert not changed[cv2.dilate(mask, np.ones((25, 25), np.uint8)) == 0].any()  # but for the soft edge


def test_same_seed_same_bytes_and_other_seed_other_pictures(demo_folder, tmp_path):
    prepare.make_demo(tmp_path / "again", **SMALL)
    prepare.make_demo(tmp_path / "other", seed=7, **SMALL)
    first, again, other = (read_files(folder) for folder in (demo_folder, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert all(other[path] != first[path] for path in other if path in first and path.endswith(".jpg"))


def test_training_and_test_pictures_share_no_pixel(demo_folder, tmp_path, monkeypatch):
    """Blacking out the columns of one side leaves every file of the other side, donors included, byte for byte."""
    train, test = prepare.DEMO_TRAIN_COLUMNS, prepare.DEMO_TEST_COLUMNS
    assert train.stop < test.start
    originals, reference = prepare.demo_photographs(), read_files(demo_folder)
    for kept, side in ((train, "train"), (test, "test")):
        blackened = [np.zeros_like(photograph) for photograph in originals]
        for black, photograph in zip(blackened, originals):
            black[:, kept] = photograph[:, kept]
        monkeypatch.setattr(prepare, "demo_photographs", lambda: blackened)
        prepare.make_demo(tmp_path / side, **SMALL)
        files = read_files(tmp_path / side)
        pictures = [path for path in reference if path.endswith(".jpg")]
        same = {path for path in pictures if files[path] == reference[path]}
        assert same == {path for path in pictures if path.startswith(side)}


def test_foreign_folder_is_refused_and_own_output_replaced(tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "train" / "Tp").mkdir(parents=True)
    keepsake = foreign / "train" / "Tp" / "splicing_0000.jpg"
    keepsake.write_bytes(b"mine")
    with pytest.raises(UserError, match="foreign.*did not make"):
        prepare.make_demo(foreign, **SMALL)
    assert keepsake.read_bytes() == b"mine" and read_files(foreign).keys() == {"train/Tp/splicing_0000.jpg"}

    own = tmp_path / "own"
    prepare.make_demo(own, seed=1, train=12, test=5)
    prepare.make_demo(own, seed=2, **SMALL)
    prepare.make_demo(tmp_path / "fresh", seed=2, **SMALL)
    assert read_files(own) == read_files(tmp_path / "fresh")

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: this is a file"):
        prepare.make_demo(tmp_path / "file", **SMALL)
    with pytest.raises(UserError, match="cannot write"):
        prepare.make_demo(tmp_path / "file" / "below", **SMALL)


def test_constant_prediction_f1_by_hand(tmp_path):
    for name, tampered in (("half", 2), ("quarter", 1)):
        mask = np.zeros((2, 2), np.uint8)
        mask.flat[:tampered] = 255
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    pairs = [["a.jpg", "half.png"], ["b.jpg", "quarter.png"], ["c.jpg", "Negative"]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    assert prepare.constant_prediction_f1(tmp_path / "pairs.json") == pytest.approx((2 / 3 + 0.4) / 2)


def test_command_prints_the_sets_and_refuses_in_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / COMMAND), "demo", "--output", "d", "--test", "5", "--train"]
    done = subprocess.run([*command, "5"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("pixel-level F1 of predicting everything tampered: 0.") == 2
    failed = subprocess.run([*command, "1"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "--train 1" in failed.stderr
