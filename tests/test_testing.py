"""test.py, test_robust.py and save_images.py end to end; numbers do not depend on batch size and number of processes.

Run: python -m pytest tests/test_testing.py
"""
import argparse
import csv
import json
import math
import shutil

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import models.mymodel
import probe_models
from conftest import make_images, run_here, run_script, summary

SMALL = ["--if_resizing", "--image_size", 64, "--num_workers", 0]


def csv_rows(file):
    """The rows of a CSV as dicts."""
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def log_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def random_state(seed):
    """Weights of a MyModel that calls the brighter half of the pixels tampered, each seed by another filter."""
    torch.manual_seed(seed)
    state = models.mymodel.MyModel().state_dict()
    return {"conv.weight": state["conv.weight"].abs(), "conv.bias": torch.zeros(1)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with three untrained checkpoints of MyModel, whose numbers sort otherwise as text, and another file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for number in (10, 2, 0):
        torch.save({"model": random_state(number), "epoch": number}, folder / f"checkpoint-{number}.pth")
    (folder / "checkpoint-best.txt").write_text("not for test.py")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# test.py


def test_every_checkpoint_of_a_folder_on_every_set(images, checkpoints, tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps({"mani": str(images), "all": str(images / "set.json")}))
    done = run_here("test.py", "--model", "MyModel", "--test_data_json", tmp_path / "sets.json", "--checkpoint_path",
                    checkpoints, "--output_dir", tmp_path / "out", "--save_per_image", "--if_predict_label", *SMALL)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    names, numbers = ["checkpoint-0.pth", "checkpoint-2.pth", "checkpoint-10.pth"], [0, 2, 10]
    metrics = ["pixel-level F1", "pixel-level IOU", "image-level F1", "image-level AUC", "image-level Accuracy"]

    results = csv_rows(tmp_path / "out" / "results.csv")
    expected = [(name, owner, metric) for name in names for owner in ("mani", "all") for metric in metrics]
    assert [(row["checkpoint"], row["set"], row["metric"]) for row in results] == expected
    value = {(row["checkpoint"], row["set"], row["metric"]): float(row["value"]) for row in results}
    undefined = [row for row in results if row["set"] == "mani" and row["metric"] == "image-level AUC"]
    assert all(np.isnan(float(row["value"])) and row["images"] == "0" and row["left_out"] == "9" for row in undefined)

    for owner, count in (("mani", 9), ("all", 11)):
        log = log_rows(tmp_path / "out" / owner / "log.txt")
        assert [(row["checkpoint"], row["epoch"]) for row in log] == list(zip(names, numbers))
        assert [row["test_pixel-level F1"] for row in log] == [value[name, owner, "pixel-level F1"] for name in names]
        events = EventAccumulator(str(tmp_path / "out" / owner)).Reload().Scalars("test/pixel-level F1")
        assert [event.step for event in events] == numbers
        per_image = csv_rows(tmp_path / "out" / owner / "per_image.csv")
        assert len(per_image) == 3 * count
        defined = [float(row["pixel-level F1"]) for row in per_image if row["checkpoint"] == names[2]
                   and row["label"] == "1"]
        assert np.mean(defined) == pytest.approx(value[names[2], owner, "pixel-level F1"]) and len(defined) == 9
    assert {row["name"] for row in per_image} == {pair[0] for pair in json.loads((images / "set.json").read_text())}

    best = max(names, key=lambda name: value[name, "mani", "pixel-level F1"] + value[name, "all", "pixel-level F1"])
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("mani ", "all "))]
    assert [row[1] for row in table] == 2 * names
    assert [row[2] == "*" for row in table] == [name == best for name in names] * 2
    assert summary(done.stdout)[7].startswith(
        f"* best checkpoint by the mean pixel-level F1 over the sets: {checkpoints / best}")


def test_every_form_of_a_checkpoint_loads(images, tmp_path):
    state = random_state(0)
    prefixed = {f"module.{key}": value for key, value in state.items()}
    forms = {"bare": state, "model": {"model": state}, "module": prefixed, "both": {"model": prefixed},
             "benco": {"model": state, "optimizer": {}, "epoch": 7, "scaler": {},
                       "args": argparse.Namespace(lr=1e-4, model="MyModel", if_resizing=True, if_padding=False,
                                                  image_size=64, edge_mask_width=None, if_not_amp=False)}}
    values = []
    for form, content in forms.items():
        torch.save(content, tmp_path / f"{form}.pth")
        flags = [] if form == "benco" else ["--model", "MyModel", "--if_resizing", "--image_size", 64]
        done = run_here("test.py", "--test_data_json", images, "--checkpoint_path", tmp_path / f"{form}.pth",
                        "--output_dir", tmp_path / form, "--num_workers", 0, *flags)
        assert done.returncode == 0, (form, done.stderr)
        assert ("taken from" in done.stdout) == (form == "benco")
        values.append([row["value"] for row in csv_rows(tmp_path / form / "results.csv")])
    assert values == [values[0]] * len(forms) and 0 < float(values[0][0]) < 1


@pytest.mark.parametrize("fitting", ["--if_resizing", "--if_padding"])
def test_original_size_and_scores_from_maps(images, checkpoints, tmp_path, fitting):
    """By hand from the saved maps: brought to each image's own size, and pooled to a score."""
    done = run_here("test.py", "--model", "MyModel", fitting, "--image_size", 64, "--num_workers", 0, "--output_dir",
                    tmp_path, "--test_data_json", images / "set.json", "--checkpoint_path",
                    checkpoints / "checkpoint-2.pth", "--metrics", "PixelF1", "ImageAUC", "ImageRecall", "--score_from",
                    "top1%", "--eval_size", "original", "--save_predictions", "float", "--save_per_image")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    row = {row["metric"]: row for row in csv_rows(tmp_path / "results.csv")}
    assert row["pixel-level F1"]["eval_size"] == "original"
    assert list(row) == ["pixel-level F1", "image-level AUC (score: top1%)", "image-level Recall (score: top1%)"]
    folder = tmp_path / "set" / "predictions" / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    dataset = data.open_dataset(str(images / "set.json"), "--data")
    values, scores, labels = [], [], []
    for i, (entry, listed) in enumerate(zip(manifest["images"], csv_rows(tmp_path / "set" / "per_image.csv"))):
        _, mask, _ = dataset.read(i)
        pred = np.load(folder / entry["file"])
        assert entry["name"] == listed["name"] and mask.shape == (entry["height"], entry["width"])
        if fitting == "--if_resizing":
            pred = cv2.resize(pred, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        else:
            pred = np.pad(pred, [(0, size - has) for size, has in zip(mask.shape, pred.shape)])
        if mask.any():
            values.append(2 * (mask & (pred > 0.5)).sum() / (mask.sum() + (pred > 0.5).sum()))
            assert float(listed["pixel-level F1"]) == pytest.approx(values[-1])
        scores.append(np.sort(pred, axis=None)[-math.ceil(pred.size / 100):].mean(dtype=np.float64))
        labels.append(int(mask.any()))
        assert float(listed["score"]) == pytest.approx(scores[-1], abs=1e-6)
    assert float(row["pixel-level F1"]["value"]) == pytest.approx(np.mean(values))
    pairs = [(a > b) + (a == b) / 2 for a, y in zip(scores, labels) if y for b, x in zip(scores, labels) if not x]
    assert float(row["image-level AUC (score: top1%)"]["value"]) == pytest.approx(np.mean(pairs))


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory):
    """Twenty-three images, three of them authentic, which neither batches nor processes divide."""
    return make_images(tmp_path_factory.mktemp("odd"), 20, seed=5, authentic=3)


@pytest.mark.slow
def test_same_numbers_for_any_batch_size_and_processes(odd_set, checkpoints, tmp_path):
    """Also in padding mode, where the valid areas of a batch differ, and under attack."""
    def values(script, processes, batch_size, *flags):
        output = tmp_path / f"{script}-{processes}-{batch_size}"
        command = [script, "--model", "MyModel", "--test_data_path", odd_set / "set.json", "--checkpoint_path",
                   checkpoints / "checkpoint-2.pth", "--if_predict_label", "--if_padding", "--image_size", 96,
                   "--test_batch_size", batch_size, "--output_dir", output, *flags]
        done = run_script(*command, cwd=tmp_path, processes=processes) if processes > 1 else run_here(*command)
        assert done.returncode == 0, done.stderr
        rows = csv_rows(output / "results.csv")
        assert {int(row["images"]) + int(row["left_out"]) for row in rows} == {23}
        return [float(row["value"]) for row in rows]

    every = ["--metrics", "PixelF1", "PixelIOU", "PixelAccuracy", "PixelAUC", "--num_workers", 0]
    expected = values("test.py", 1, 1, *every)
    assert len(expected) == 7 and all(0 < value < 1 for value in expected[:4])
    for processes, batch_size in ((1, 4), (1, 7), (2, 4), (3, 1), (3, 7)):
        found = values("test.py", processes, batch_size, *every)
        assert found == pytest.approx(expected, abs=1e-6), (processes, batch_size)
    expected = values("test_robust.py", 1, 1, "--num_workers", 0)
    assert values("test_robust.py", 2, 7, "--num_workers", 1) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_no_model_eval_does_not_hang(odd_set, repository, tmp_path):
    """Batch norm in training mode on three processes with 8, 8 and 7 images; its statistics are not kept."""
    torch.manual_seed(0)
    torch.save(probe_models.RandomNet().state_dict(), tmp_path / "random.pth")
    done = run_script("test.py", "--model", "RandomNet", "--test_data_json", odd_set, "--checkpoint_path",
                      tmp_path / "random.pth", "--output_dir", tmp_path / "out", "--no_model_eval", "--test_batch_size",
                      3, *SMALL, cwd=tmp_path, processes=3, timeout=120, root=repository)
    assert done.returncode == 0, done.stderr
    assert csv_rows(tmp_path / "out" / "results.csv")[0]["images"] == "20"


# ---------------------------------------------------------------------------------------------------------------------
# test_robust.py


def test_attacks_and_strengths(images, checkpoints, tmp_path):
    common = ["--model", "MyModel", "--checkpoint_path", checkpoints, "--test_data_path", images, *SMALL]
    done = run_here("test_robust.py", *common, "--output_dir", tmp_path / "variance")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"checkpoint {checkpoints}/checkpoint-10.pth" in done.stdout  # the newest by number
    assert "variance on the 0-255 scale" in done.stdout
    rows = csv_rows(tmp_path / "variance" / "results.csv")
    strengths = {"GaussianBlur": [0, 3, 7, 11, 15, 19, 23], "GaussianNoise": [3, 7, 11, 15, 19, 23],
                 "JpegCompression": [50, 60, 70, 80, 90, 100]}
    assert [(row["attack"], int(row["strength"])) for row in rows if row["metric"] == "pixel-level F1"] == [
        (attack, strength) for attack in strengths for strength in strengths[attack]]
    value = {(row["attack"], int(row["strength"])): float(row["value"]) for row in rows
             if row["metric"] == "pixel-level F1"}
    for attack in strengths:
        log = log_rows(tmp_path / "variance" / attack / "log.txt")
        expected = [value[attack, strength] for strength in strengths[attack]]
        assert [row["test_pixel-level F1"] for row in log] == expected
        events = EventAccumulator(str(tmp_path / "variance" / attack)).Reload().Scalars("test/pixel-level F1")
        assert [event.step for event in events] == strengths[attack]
        lines = summary(done.stdout)
        place, = (i for i, line in enumerate(lines) if line.startswith(f"{attack} ("))
        assert lines[place].split()[-len(expected):] == list(map(str, strengths[attack]))
        assert lines[place + 1].split()[-len(expected):] == [f"{each:.4f}" for each in expected]

    done = run_here("test.py", *common[:2], "--checkpoint_path", checkpoints / "checkpoint-10.pth", "--test_data_json",
                    images, "--output_dir", tmp_path / "plain", *SMALL)
    assert done.returncode == 0
    assert value["GaussianBlur", 0] == float(csv_rows(tmp_path / "plain" / "results.csv")[0]["value"])
    assert len(set(value.values())) > 10  # the attacks differ

    for flags, text, changed in ((["--noise_unit", "std"], "standard deviation on the 0-255 scale", ["GaussianNoise"]),
                                 (["--attack_convention", "imdlbenco"], "imdlbenco",
                                  ["GaussianNoise", "JpegCompression"])):
        done = run_here("test_robust.py", *common, "--output_dir", tmp_path / flags[1], *flags)
        assert done.returncode == 0 and text in done.stdout
        other = {(row["attack"], int(row["strength"])): float(row["value"])
                 for row in csv_rows(tmp_path / flags[1] / "results.csv") if row["metric"] == "pixel-level F1"}
        assert all(other[key] == value[key] or key[0] in changed for key in value)
        assert {key[0] for key in value if other[key] != value[key]} == set(changed)


GAMMA = """
import numpy as np
import transforms

class Curve(transforms.AttackWrapper):
    name, strength_unit, strengths = "Gamma", "exponent", [0, 0.5]

    def attack(self, image, strength, name):
        return np.rint(255 * (image / 255) ** strength).astype(np.uint8)
"""


def test_attacks_of_ones_own_and_the_threshold(images, checkpoints, repository, tmp_path):
    """An attack in a file of models/ needs no edit; above a threshold of -1 every pixel is called tampered."""
    file = repository / "models" / "my_attacks.py"
    file.write_text(GAMMA)
    common = ["test_robust.py", "--model", "MyModel", "--checkpoint_path", checkpoints, "--test_data_path", images,
              *SMALL]
    try:
        done = run_script(*common, "--attacks", "Gamma", "GaussianBlur", "--threshold", -1, "--output_dir",
                          tmp_path / "out", cwd=tmp_path, root=repository)
    finally:
        file.unlink()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [row for row in csv_rows(tmp_path / "out/results.csv") if row["metric"].startswith("pixel-level F1")]
    assert [(row["attack"], row["strength"]) for row in rows] == [
        ("Gamma", "0"), ("Gamma", "0.5"), *(("GaussianBlur", str(size)) for size in (0, 3, 7, 11, 15, 19, 23))]
    shares = [cv2.resize(data.read_mask(path), (64, 64), interpolation=cv2.INTER_NEAREST).mean()
              for path in sorted((images / "Gt").glob("*.png"))]
    for row in rows:
        assert row["metric"] == "pixel-level F1 (threshold -1.0)"
        assert float(row["value"]) == pytest.approx(np.mean([2 * share / (1 + share) for share in shares]))

    for flags, words in ((["--attacks", "GausianBlur"], "--attacks GausianBlur: there is no such attack. Did you mean "
                          "GaussianBlur? Known: "),
                         (["--metrics", "PixelAUC", "--threshold", 0.3], "--threshold 0.3: none of the metrics"),
                         (["--threshold", "nan"], "'nan' is not a finite number")):
        done = run_here(*common, *flags, "--output_dir", tmp_path / "none")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# save_images.py


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """A checkpoint of the model that predicts the red channel."""
    file = tmp_path_factory.mktemp("red") / "red.pth"
    torch.save(probe_models.Red().state_dict(), file)
    return file


def save_images(model, checkpoint, path, output, *flags):
    """Run save_images.py; returns its standard output."""
    done = run_here("save_images.py", "--model", model, "--checkpoint_path", checkpoint, "--test_data_path", path,
                    "--output_dir", output, "--num_workers", 0, *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_masks_have_the_original_size(images, red, tmp_path):
    """96 x 128, 128 x 96, 80 x 80 pixels, brought to 100 x 100: what padding cropped is 0, what it added is cut off."""
    printed = save_images("Red", red, images, tmp_path / "padded", "--if_padding", "--image_size", 100,
                          "--test_batch_size", 4)
    assert "no scores: the model returns no pred_label" in printed
    assert printed.rsplit("\n\n", 1)[1].splitlines() == [
        f"predicted by Red, {red}:", f"9 masks in {tmp_path}/padded/pred", f"9 rows in {tmp_path}/padded/scores.csv"]
    assert "; 6 larger than 100x100 are cropped" in printed
    assert not list((tmp_path / "padded").glob("pred_label*.json"))
    save_images("Red", red, images, tmp_path / "resized", "--if_resizing", "--image_size", 100)
    for i in range(9):
        image = data.read_image(images / "Tp" / f"p{i:03d}.png")[..., 0]
        padded, resized = (cv2.imread(str(tmp_path / mode / "pred" / f"p{i:03d}.png"), cv2.IMREAD_UNCHANGED)
                           for mode in ("padded", "resized"))
        assert padded.dtype == np.uint8 and padded.shape == resized.shape == image.shape
        assert np.abs(padded[:100, :100].astype(int) - image[:100, :100]).max() <= 1
        assert not padded[100:].any() and not padded[:, 100:].any()
        assert np.abs(resized.astype(int) - image).mean() < 3  # down and up again


def test_scores_csv(checkpoints, red, images, tmp_path):
    """Names are the files' own, or where one repeats all paths from the dataset's folder; each row has its PNG."""
    save_images("MyModel", checkpoints, images / "set.json", tmp_path / "labelled", *SMALL)
    rows, combined = (csv_rows(tmp_path / "labelled/scores.csv"),
                      json.loads((tmp_path / "labelled/pred_label_combined.json").read_text()))
    assert [row["name"] for row in rows] == [f"p{number:03d}.png" for number in range(11)]
    assert [row["label"] for row in rows] == ["1"] * 9 + ["0"] * 2
    assert {row["name"]: float(row["score"]) for row in rows} == combined
    for row in rows:
        assert (tmp_path / "labelled" / row["png"]).is_file()
    folder = tmp_path / "photos"
    for name in ("one/a.png", "one/b.png", "one/c/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "Tp/p000.png", folder / name)
    save_images("Red", red, folder, tmp_path / "plain", *SMALL)
    assert csv_rows(tmp_path / "plain/scores.csv") == [
        {"name": name, "label": "", "score": "", "png": f"pred/{name[4:]}"}
        for name in ("one/a.png", "one/b.png", "one/c/a.png")]
    done = run_here("save_images.py", "--model", "Red", "--checkpoint_path", red, "--test_data_path",
                    folder / "one/a.png", folder / "one/c/a.png", "--output_dir", tmp_path / "files", *SMALL)
    assert [row["name"] for row in csv_rows(tmp_path / "files/scores.csv")] == ["a.png", "c/a.png"], done.stderr


def test_folders_with_equal_names_and_overlays(checkpoints, tmp_path):
    """A plain folder: sub-folders are kept, and images that differ in the extension alone get masks of their own."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    names = ["a.jpg", "a.png", "a.jpg.png", "b.PNG", "one/a.jpg", "two/a.jpg", "two/deep/c.bmp"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (40, 60, 3), np.uint8))
    printed = save_images("MyModel", checkpoints, folder, tmp_path / "out", *SMALL, "--save_overlay")
    masks = files_below(tmp_path / "out" / "pred")
    assert masks == files_below(tmp_path / "out" / "overlay") and len(masks) == len(names)
    assert {"a.jpg.png", "a.png.png", "b.png", "one/a.png", "two/a.png", "two/deep/c.png"} <= set(masks)
    overlay = cv2.imread(str(tmp_path / "out" / "overlay" / "b.png"))
    height, width, _ = overlay.shape
    assert 171 < height < 200 and 2 * 256 < width < 3 * 256  # no mask, so no third tile
    tile = cv2.resize(cv2.imread(str(folder / "b.PNG")), (256, 171), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(overlay[:171, :256], tile)
    assert (overlay[175:, :256] < 100).any()  # its name
    scores = json.loads((tmp_path / "out" / "pred_label_combined.json").read_text())
    assert scores == json.loads((tmp_path / "out" / "pred_label_rank0.json").read_text())
    assert sorted(scores) == ["a.jpg", "a.jpg.png", "a.png", "b.PNG", "c.bmp", "one/a.jpg", "two/a.jpg"]
    assert all(0 < score < 1 for score in scores.values()) and "7 scores in" in printed


def test_nothing_is_written_outside_the_output_folder(images, checkpoints, tmp_path):
    """A JSON may list anything: parents, absolute paths, and one image twice under different spellings."""
    inner = tmp_path / "x" / "y"
    make_images(inner, 2)
    make_images(tmp_path / "other", 2, seed=1)
    pairs = [["../../other/Tp/p000.png", "Negative"], [str(inner / "Tp/p000.png"), str(inner / "Gt/p000_gt.png")],
             ["Tp/../../../other/Tp/p001.png", "Negative"], ["Tp/p001.png", "Gt/p001_gt.png"],
             ["./Tp/p001.png", "Gt/p001_gt.png"]]
    (inner / "list.json").write_text(json.dumps(pairs))
    before = set(files_below(tmp_path))
    printed = save_images("MyModel", checkpoints, inner / "list.json", tmp_path / "out", *SMALL, "--no_fingerprint",
                          "--save_overlay")
    new = set(files_below(tmp_path)) - before
    assert new and all(name.startswith("out/") for name in new)
    masks = ["other/Tp/p000.png", "other/Tp/p001.png", "x/y/Tp/p000.png", "x/y/Tp/p001.png"]
    assert files_below(tmp_path / "out" / "pred") == masks
    combined = json.loads((tmp_path / "out" / "pred_label_combined.json").read_text())
    assert sorted(combined) == masks and "4 scores" in printed
    with_mask = cv2.imread(str(tmp_path / "out" / "overlay" / "x/y/Tp/p000.png"))
    truth = cv2.imread(str(inner / "Gt/p000_gt.png"), cv2.IMREAD_GRAYSCALE)
    tiles = with_mask[:192, :256].astype(int), with_mask[:192, 262:518].astype(int)  # image, mask's outline
    changed = np.abs(tiles[0] - tiles[1]).max(axis=2) > 0
    edge = cv2.morphologyEx(cv2.resize(truth, (256, 192), interpolation=cv2.INTER_NEAREST), cv2.MORPH_GRADIENT,
                            np.ones((9, 9), np.uint8)) > 0
    assert changed.any() and not changed[~edge].any()

    (tmp_path / "sets.json").write_text(json.dumps({"first": str(inner), "second": str(tmp_path / "other")}))
    save_images("MyModel", checkpoints, tmp_path / "sets.json", tmp_path / "sets", *SMALL)
    assert files_below(tmp_path / "sets" / "pred") == ["first/p000.png", "first/p001.png", "second/p000.png",
                                                       "second/p001.png"]
    assert sorted(json.loads((tmp_path / "sets" / "pred_label_combined.json").read_text())) == [
        "first/p000.png", "first/p001.png", "second/p000.png", "second/p001.png"]


def test_an_image_listed_many_times_is_saved(images, checkpoints, tmp_path):
    (tmp_path / "twice.json").write_text(json.dumps([[str(images / "Tp/p000.png"), "Negative"]] * 40))
    save_images("MyModel", checkpoints, tmp_path / "twice.json", tmp_path / "out", *SMALL, "--test_batch_size", 8)
    assert files_below(tmp_path / "out" / "pred") == ["p000.png"]


@pytest.mark.slow
def test_two_processes_merge_their_scores(images, checkpoints, tmp_path):
    alone = save_images("MyModel", checkpoints, images / "set.json", tmp_path / "one", *SMALL)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "pred_label_rank7.json").write_text('{"old": 1}')  # of an earlier run with more processes
    done = run_script("save_images.py", "--model", "MyModel", "--checkpoint_path", checkpoints, "--test_data_path",
                      images / "set.json", "--output_dir", tmp_path / "two", *SMALL, cwd=tmp_path, processes=2)
    assert done.returncode == 0 and "11 scores in" in done.stdout and "11 scores in" in alone, done.stderr
    assert files_below(tmp_path / "two") == sorted([*files_below(tmp_path / "one"), "pred_label_rank1.json"])
    one, two, *ranks = (json.loads((tmp_path / name).read_text()) for name in (
        "one/pred_label_combined.json", "two/pred_label_combined.json", "two/pred_label_rank0.json",
        "two/pred_label_rank1.json"))
    assert two == pytest.approx(one, abs=1e-6) and [len(rank) for rank in ranks] == [6, 5]
    for name in files_below(tmp_path / "one" / "pred"):
        masks = [cv2.imread(str(tmp_path / folder / "pred" / name), cv2.IMREAD_UNCHANGED).astype(int)
                 for folder in ("one", "two")]
        assert np.abs(masks[0] - masks[1]).max() <= 1  # another batch may round differently


def test_flags_of_the_tutorials_launcher_are_accepted_and_that_is_said(images, checkpoints, tmp_path):
    printed = save_images("MyModel", checkpoints, images, tmp_path / "out", *SMALL, "--log_dir", tmp_path / "log",
                          "--if_predict_label", "--metrics", "PixelF1", "--world_size", 1, "--dist_url", "env://",
                          "--dist_on_itp")
    assert "note: --metrics --log_dir --if_predict_label does nothing here" in printed
    assert not (tmp_path / "log").exists() and "does nothing" not in save_images("MyModel", checkpoints, images,
                                                                                 tmp_path / "plain", *SMALL)


def test_image_files(images, checkpoints, tmp_path):
    """Works like a folder that holds them; prints each score and where the mask is."""
    photos = [images / "Tp/p000.png", images / "Au/p009.png"]
    printed = save_images("MyModel", checkpoints, photos[0], tmp_path / "one", *SMALL)
    flags = ["--model", "MyModel", "--checkpoint_path", checkpoints, *SMALL]
    done = run_here("save_images.py", *flags, "--output_dir", tmp_path / "two", "--test_data_path", *photos)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / "two" / "pred") == ["Au/p009.png", "Tp/p000.png"]
    scores = json.loads((tmp_path / "two" / "pred_label_combined.json").read_text())
    for photo, mask in zip(photos, ("Tp/p000.png", "Au/p009.png")):
        assert f"{photo}: score {scores[photo.name]:.4f}, mask {tmp_path}/two/pred/{mask}\n" in done.stdout
    assert f"{photos[0]}: score {scores['p000.png']:.4f}, mask {tmp_path}/one/pred/p000.png\n" in printed
    folder = save_images("MyModel", checkpoints, images / "Tp", tmp_path / "folder", *SMALL)
    assert "score 0" not in folder
    for name in ("one", "two"):
        mask = next((tmp_path / name / "pred").rglob("p000.png"))
        assert mask.read_bytes() == (tmp_path / "folder" / "pred" / "p000.png").read_bytes()
    (tmp_path / "holiday.jpg").mkdir()  # a folder, whatever its name says
    shutil.copy(photos[0], tmp_path / "holiday.jpg")
    save_images("MyModel", checkpoints, tmp_path / "holiday.jpg", tmp_path / "named", *SMALL)
    assert files_below(tmp_path / "named" / "pred") == ["p000.png"]
    done = run_here("save_images.py", *flags, "--output_dir", tmp_path / "no", "--test_data_path", photos[0], images)
    assert done.returncode == 1 and f"error: --test_data_path {images} is no image file" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The model of IMDL-BenCo's tutorial


def test_tutorial_model(images, tmp_path):
    """Logits as pred_mask do for pixel F1 and are clipped as masks; one pred_label for a batch is refused where each
    image needs one."""
    model = ["--model", "Tutorial", "--MyModel_Customized_param", 128, "--pre_trained_weights", "none.pth"]
    done = run_here("train.py", *model, "--data_path", images, "--test_data_path", images, "--epochs", 1,
                    "--batch_size", 2, "--output_dir", tmp_path / "run", *SMALL)
    assert done.returncode == 0 and "pixel-level F1: " in done.stdout and "predict_loss: " in done.stdout, done.stderr
    common = ["--checkpoint_path", tmp_path / "run", "--test_data_path", images, "--num_workers", 0]
    done = run_here("test.py", *common, "--output_dir", tmp_path / "test")
    assert done.returncode == 0 and 0 < float(csv_rows(tmp_path / "test" / "results.csv")[0]["value"]) < 1, done.stderr
    for flags in (["--if_predict_label"], ["--metrics", "ImageF1"]):
        done = run_here("test.py", *common, "--output_dir", tmp_path / "image", *flags)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        wanted = "error: model Tutorial: pred_label is () for 2 images; return one value per image"
        assert done.stderr.startswith(wanted), done.stderr
    done = run_here("save_images.py", *common, "--output_dir", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    assert len(files_below(tmp_path / "images" / "pred")) == 9
    assert not list((tmp_path / "images").glob("pred_label*.json"))
    assert "note: pred_mask of Tutorial leaves 0..1" in done.stdout
    reason = "pred_label has shape () for a batch of 2 images: one value per image is wanted"
    assert f"no scores: {reason}" in done.stdout
