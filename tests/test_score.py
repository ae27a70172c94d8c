"""tools/score.py: saved-then-scored equals evaluated, other programs' maps, subsets, comparison, tables, bad input.

Run: python -m pytest tests/test_score.py
"""
import csv
import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch

import data
import models.mymodel
from conftest import run_here, run_script
from counting import Draw, Levels, Samples
from metrics import METRICS, parse_metrics


def csv_rows(file):
    """The rows of a CSV as dicts."""
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return list(csv.DictReader(lines))


def values(folder):
    """{metric: (value, low, high, images, left out)} of a results.csv of one set, as text."""
    return {row["metric"]: tuple(row[key] for key in ("value", "low", "high", "images", "left_out"))
            for row in csv_rows(folder / "results.csv")}


def score(*flags):
    """Run tools/score.py; returns its standard output."""
    done = run_here("tools/score.py", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(*flags):
    """Run tools/score.py on something bad; returns its one sentence."""
    done = run_here("tools/score.py", *flags)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained MyModel."""
    torch.manual_seed(3)
    state = models.mymodel.MyModel().state_dict()
    file = tmp_path_factory.mktemp("checkpoint") / "checkpoint-3.pth"
    torch.save({"model": {"conv.weight": state["conv.weight"].abs(), "conv.bias": torch.zeros(1)}}, file)
    return file


def test_command(checkpoint, test_set, output, *flags):
    """The words of a test.py command."""
    return ["test.py", "--model", "MyModel", "--checkpoint_path", checkpoint, "--test_data_json", test_set,
            "--output_dir", output, "--num_workers", 0, *flags]


test_command.__test__ = False
FITTINGS = {"resizing": ["--if_resizing", "--image_size", 64], "padding": ["--if_padding", "--image_size", 100]}
EVERY = [f"{name}:{mode}" for name, each in METRICS.items() for mode in dict.fromkeys([*each.modes, *each.ways])]


@pytest.fixture(scope="module")
def saved(images, checkpoint, tmp_path_factory):
    """{fitting: the output of test.py --save_predictions float}, of images of which padding crops the larger."""
    outputs = {}
    for fitting, flags in FITTINGS.items():
        outputs[fitting] = tmp_path_factory.mktemp(fitting)
        done = run_here(*test_command(checkpoint, images / "set.json", outputs[fitting], "--save_predictions", "float",
                                      "--metrics", "all", "--save_per_image", "--test_batch_size", 3, *flags))
        assert done.returncode == 0 and done.stderr == "", done.stderr
    return outputs


@pytest.mark.parametrize("fitting", FITTINGS)
def test_saved_then_scored_equals_evaluated(images, checkpoint, saved, fitting, tmp_path):
    printed = score(saved[fitting], "--metrics", "all", "--output_dir", tmp_path / "network", "--save_per_image")
    evaluated, scored = (folder / "results.csv" for folder in (saved[fitting], tmp_path / "network"))
    assert len(values(saved[fitting])) == len(EVERY) and scored.read_text() == evaluated.read_text()
    assert "set, checkpoint-3.pth: 11 of 11 images, at the size of the model's input" in printed
    per_image = csv_rows(saved[fitting] / "set" / "per_image.csv")
    assert [{**row, "set": "set"} for row in per_image] == csv_rows(tmp_path / "network" / "per_image.csv")

    flags = ["--metrics", "all", "--eval_size", "original", "--score_from", "mean"]
    done = run_here(*test_command(checkpoint, images / "set.json", tmp_path / "evaluated", "--test_batch_size", 3,
                                  *flags, *FITTINGS[fitting]))
    assert done.returncode == 0, done.stderr
    score(saved[fitting], *flags, "--output_dir", tmp_path / "scored")
    assert values(tmp_path / "scored") == values(tmp_path / "evaluated") != values(saved[fitting])


@pytest.mark.slow
def test_two_processes_save_the_same(images, checkpoint, saved, tmp_path):
    done = run_script(*test_command(checkpoint, images / "set.json", tmp_path / "out", "--save_predictions", "float",
                                    "--metrics", "all", *FITTINGS["padding"]), cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    score(tmp_path / "out", "--metrics", "all", "--output_dir", tmp_path / "scored")
    found, expected = values(tmp_path / "scored"), values(saved["padding"])
    assert found == values(tmp_path / "out")
    assert {name: float(row[0]) for name, row in found.items()} == pytest.approx(
        {name: float(row[0]) for name, row in expected.items()}, abs=1e-6, nan_ok=True)


def test_odd_names_an_image_listed_twice_and_a_set_that_moved(checkpoint, tmp_path):
    (tmp_path / "here").mkdir()
    pairs, rng = [], np.random.default_rng(0)
    for i, name in enumerate((b"a\xff.png", "\u5b57 b|_&.png".encode(), b"c.jpg.png", b"c.jpg")):
        image = rng.integers(0, 256, (40, 50, 3), np.uint8)
        mask = np.zeros((40, 50), np.uint8)
        mask[5 * i:20, 10:30] = 255
        for folder, pixels, suffix in (("", image, ".png"), ("m", mask, ".png")):
            file = tmp_path / "here" / os.fsdecode(folder.encode() + name + (b".png" if folder else b""))
            file.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
        pairs.append([os.fsdecode(name), os.fsdecode(b"m" + name + b".png")])
    pairs.append([pairs[2][0], pairs[1][1]])  # the same image with another mask
    (tmp_path / "here" / "set.json").write_text(json.dumps(pairs))
    for form in ("float", "8bit"):
        done = run_here(*test_command(checkpoint, tmp_path / "here" / "set.json", tmp_path / form, *FITTINGS["padding"],
                                      "--save_predictions", form, "--test_batch_size", 5))
        assert done.returncode == 0, done.stderr
    os.rename(tmp_path / "here", tmp_path / "there")
    assert "isn't there: give --dataset" in refused(tmp_path / "float", "--output_dir", tmp_path / "no")
    score(tmp_path / "float", "--dataset", tmp_path / "there" / "set.json", "--output_dir", tmp_path / "scored",
          "--save_per_image")
    assert values(tmp_path / "scored") == values(tmp_path / "float")
    assert [row["name"] for row in csv_rows(tmp_path / "scored" / "per_image.csv")] == [pair[0] for pair in pairs]
    assert "set.json by name, without a fingerprint" in score(
        tmp_path / "8bit", "--dataset", tmp_path / "there" / "set.json", "--no_fingerprint", "--output_dir",
        tmp_path / "8")
    assert values(tmp_path / "8")["pixel-level F1"][3] == "5"


# ---------------------------------------------------------------------------------------------------------------------
# Maps at the images' own size, with a manifest and without


@pytest.fixture(scope="module")
def pngs(images, checkpoint, tmp_path_factory):
    """The output of save_images.py."""
    output = tmp_path_factory.mktemp("pngs")
    done = run_here("save_images.py", "--model", "MyModel", "--checkpoint_path", checkpoint, "--test_data_path",
                    images / "set.json", "--output_dir", output, "--num_workers", 0, *FITTINGS["resizing"])
    assert done.returncode == 0, done.stderr
    return output


def rewrite(source, target, change):
    """Copy a folder of PNGs, each as change(pixels)."""
    for file in source.rglob("*.png"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(copy), change(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)))
    return target


def test_maps_at_the_images_own_size(images, pngs, tmp_path):
    printed = score(pngs, "--metrics", "PixelF1", "PixelAUC", "ImageAUC", "--output_dir", tmp_path / "own")
    assert "11 of 11 images, at the images' own size" in printed
    by_hand = []
    for file in sorted((images / "Tp").glob("*.png")):
        mask = data.read_mask(str(images / "Gt" / f"{file.stem}_gt.png"))
        decided, truth = cv2.imread(str(pngs / "pred" / "Tp" / file.name), 0) > 127, mask == 1
        by_hand.append(2 * np.count_nonzero(decided & truth) / (np.count_nonzero(decided) + np.count_nonzero(truth)))
    own = values(tmp_path / "own")
    assert float(own["pixel-level F1"][0]) == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert own["pixel-level F1"][3:] == ("9", "2") and float(own["image-level AUC"][0]) <= 1

    folders = {"plain": pngs / "pred", "rgb": rewrite(pngs / "pred", tmp_path / "rgb", lambda x: np.dstack([x] * 3)),
               "16": rewrite(pngs / "pred", tmp_path / "16", lambda x: x.astype(np.uint16) * 257),
               "opaque": rewrite(pngs / "pred", tmp_path / "opaque", lambda x: np.dstack([x] * 3 + [x * 0 + 255]))}
    for name, folder in folders.items():
        printed = score(folder, "--dataset", images / "set.json", "--metrics", "PixelF1", "PixelAUC", "ImageAUC",
                        "--score_from", "max", "--output_dir", tmp_path / f"of_{name}")
        found = values(tmp_path / f"of_{name}")
        assert {**found, **own} == {**own, "image-level AUC (score: max)": found["image-level AUC (score: max)"]}
        assert "by name" in printed


def test_where(images, saved, tmp_path):
    every = csv_rows(saved["padding"] / "set" / "per_image.csv")
    pairs = dict(json.loads((images / "set.json").read_text()))
    masks = {name: np.zeros((96, 128)) if mask == "Negative" else data.read_mask(str(images / mask))
             for name, mask in pairs.items()}
    tests = {"area<0.09": lambda row, mask: mask.mean() < 0.09, "area >= 0.09": lambda row, mask: mask.mean() >= 0.09,
             "size=80": lambda row, mask: max(mask.shape) == 80, "size>100": lambda row, mask: max(mask.shape) > 100,
             "label=1": lambda row, mask: mask.any(), "label!=1": lambda row, mask: not mask.any(),
             "name~p00[1-4]": lambda row, mask: row["name"][-5] in "1234",
             "name!~Tp/": lambda row, mask: row["name"].startswith("Au")}
    for given in (["area<0.09"], ["area >= 0.09", "size=80"], ["size>100", "label=1"], ["label!=1"],
                  ["name~p00[1-4]", "size>100"], ["name!~Tp/"]):
        kept = [row for row in every if all(tests[each](row, masks[row["name"]]) for each in given)]
        printed = score(saved["padding"], "--metrics", "PixelF1", "PixelAccuracy", "--where", *given, "--output_dir",
                        tmp_path, "--save_per_image")
        place = f"set [{', '.join(given)}]"
        rows = csv_rows(tmp_path / "results.csv")
        assert 0 < len(kept) < 11 and f"{len(kept)} of 11 images" in printed and place in printed, given
        assert {row["set"] for row in rows} == {place}
        assert json.loads((tmp_path / "results.json").read_text())["where"] == given
        assert [row["name"] for row in csv_rows(tmp_path / "per_image.csv")] == [row["name"] for row in kept]
        for row in rows:
            expected = [float(each[row["metric"]]) for each in kept]
            assert float(row["value"]) == pytest.approx(np.nanmean(expected) if not np.isnan(expected).all() else
                                                        np.nan, abs=1e-12, nan_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Two models, several runs


@pytest.fixture(scope="module")
def rivals(images, tmp_path_factory):
    """Maps of a good and of a bad model, as another program might write them."""
    folder, rng = tmp_path_factory.mktemp("rivals"), np.random.default_rng(1)
    for name, mask in json.loads((images / "set.json").read_text()):
        height, width = cv2.imread(str(images / name)).shape[:2]
        truth = np.zeros((height, width)) if mask == "Negative" else data.read_mask(str(images / mask))
        for model, weight in (("good", 0.7), ("bad", 0.05)):
            values = 255 * (weight * truth + (1 - weight) * rng.random((height, width)))
            (folder / model / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / model / name), values.round().astype(np.uint8))
    return folder


def test_compare(images, rivals, saved, pngs, tmp_path):
    flags = ["--dataset", images / "set.json", "--output_dir", tmp_path, "--metrics", "PixelF1", "PixelFPR",
             "PixelF1:pooled", "PixelBestF1:dataset", "ImageAUC", "--score_from", "mean"]
    names = ["pixel-level F1", "pixel-level FPR", "pixel-level F1 (pooled)", "pixel-level best F1 (dataset)"]
    for first, second, winner in (("good", "bad", "A"), ("bad", "good", "B")):
        printed = score("compare", rivals / first, rivals / second, *flags)
        rows = {row["metric"]: row for row in csv_rows(tmp_path / "compare.csv")}
        assert all(rows[name]["verdict"] == f"{winner} is better" for name in names)
        assert all(f"{winner} is better" in line for line in printed.splitlines() if line.startswith("pixel-level"))
        for row in rows.values():
            assert float(row["difference"]) == float(row["A"]) - float(row["B"])
            assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert all(0 < float(rows[name]["p"]) < 0.05 for name in names)
    assert set(json.loads((tmp_path / "compare.json").read_text())["results"][0]) == set(rows[names[0]])
    assert (tmp_path / "compare.md").read_text().count("B is better") >= 4

    shutil.copytree(saved["padding"], tmp_path / "copy")
    printed = score("compare", saved["padding"], tmp_path / "copy", "--metrics", "all", "--output_dir", tmp_path)
    rows = csv_rows(tmp_path / "compare.csv")
    assert len(rows) == len(EVERY) and {row["verdict"] for row in rows} == {"not decided"}
    assert {row["p"] for row in rows} <= {"1.0", "nan"} and "is better" not in printed
    # A map at the network's size and one at the images' own are both judged at the latter.
    printed = score("compare", saved["resizing"], pngs, "--where", "label=1", "--output_dir", tmp_path)
    assert printed.count("9 of 11 images, at the images' own size") == 2


def test_table(images, rivals, saved, tmp_path):
    for name in ("good", "bad"):
        score(rivals / name, "--dataset", images / "set.json", "--metrics", "PixelF1", "PixelFPR", "PixelAUC",
              "--output_dir", tmp_path / "runs" / name)
    worst = json.loads((tmp_path / "runs" / "bad" / "results.json").read_text())
    for row in worst["results"]:
        row["value"] /= 2
    (tmp_path / "runs" / "worst").mkdir()
    (tmp_path / "runs" / "worst" / "results.json").write_text(json.dumps(worst))
    runs = [tmp_path / "runs" / "bad", tmp_path / "runs" / "good" / "results.json", tmp_path / "runs" / "worst"]
    printed = score("table", *runs, "--metrics", "pixel-level FPR", "PixelF1", "--output_dir", tmp_path / "table")
    f1, rate = ({"good": float(values(tmp_path / "runs" / "good")[metric][0]), "bad": (bad := float(
        values(tmp_path / "runs" / "bad")[metric][0])), "worst": bad / 2} for metric in ("pixel-level F1",
                                                                                         "pixel-level FPR"))
    text = (tmp_path / "table" / "results.md").read_text()
    assert text.splitlines()[0] == "| set | run | pixel-level FPR | pixel-level F1 |" and len(text.splitlines()) == 5
    for numbers, ordered in ((f1, sorted(f1.values(), reverse=True)), (rate, sorted(rate.values()))):
        assert f"**{ordered[0]:.4f}** [" in text and f"<u>{ordered[1]:.4f}</u> [" in text
        assert f" {ordered[2]:.4f} [" in text and f"{ordered[2]:.4f}" in printed
    latex = (tmp_path / "table" / "results.tex").read_text()
    assert rf"\textbf{{{max(f1.values()):.4f}}}" in latex and latex.count(r"\underline{") == 2

    twins = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    for twin in twins:
        shutil.copytree(tmp_path / "runs" / "good", twin)
    score("table", *twins, "--output_dir", tmp_path / "table")
    text = (tmp_path / "table" / "results.md").read_text()
    assert "| a/out good |" in text and "| b/out good |" in text
    for name in ("good", "bad"):
        shutil.copytree(rivals / name, tmp_path / name / "maps")
    score(tmp_path / "good" / "maps", tmp_path / "bad" / "maps", "--dataset", images / "set.json", "--output_dir",
          tmp_path / "both")
    score("table", tmp_path / "both", "--output_dir", tmp_path / "table")
    text = (tmp_path / "table" / "results.md").read_text()
    assert "| both good/maps maps |" in text and "| both bad/maps maps |" in text
    content = json.loads((twins[1] / "results.json").read_text())
    for row in content["results"]:
        row["fingerprint"] = "0123456789ab"
    (twins[1] / "results.json").write_text(json.dumps(content))
    words = refused("table", *twins, "--output_dir", tmp_path / "table")
    assert "the set set is not the same in a/out and b/out" in words and "0123456789ab" in words
    assert "is given twice" in refused("table", twins[0], twins[0], "--output_dir", tmp_path)
    assert "there is no" in refused("table", images, "--output_dir", tmp_path)
    assert "none of the runs has it" in refused("table", twins[0], "--metrics", "ImageF1", "--output_dir", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_maps_that_do_not_fit(images, pngs, tmp_path):
    def refused_maps(*flags):
        return refused(tmp_path / "maps", "--dataset", images / "set.json", "--output_dir", tmp_path / "out", *flags)

    def afresh():
        shutil.rmtree(tmp_path / "maps", ignore_errors=True)
        shutil.copytree(pngs / "pred", tmp_path / "maps")

    afresh()
    for name in ("Tp/p001.png", "Tp/p003.png"):
        cv2.imwrite(str(tmp_path / "maps" / name), np.zeros((20, 30), np.uint8))
    assert "2 maps of another size than wanted here (Tp/p001.png is 20x30 instead of 128x96, Tp/p003" in refused_maps()
    afresh()
    (tmp_path / "maps" / "Tp" / "p002.png").rename(tmp_path / "maps" / "Tp" / "other.png")
    (tmp_path / "maps" / "Au" / "p009.png").unlink()
    words = refused_maps()
    assert "2 images of" in words and "without a map (Tp/p002.png, Au/p009.png), 1 map without" in words
    assert "an image (Tp/other.png)" in words
    afresh()
    colour = np.zeros((96, 128, 3), np.uint8)
    colour[..., 1] = 200
    cv2.imwrite(str(tmp_path / "maps" / "Tp" / "p000.png"), colour)
    assert "p000.png is coloured or transparent" in refused_maps()
    cv2.imwrite(str(tmp_path / "maps" / "Tp" / "p000.png"), np.zeros((96, 128, 4), np.uint8))
    assert "p000.png is coloured or transparent" in refused_maps()
    (tmp_path / "maps" / "Tp" / "p000.png").write_bytes(b"no image")
    assert "p000.png is broken" in refused_maps()
    rewrite(pngs / "pred", tmp_path / "maps", lambda pixels: (pixels > 127).astype(np.uint8))
    assert "as if they held 0 and 1 instead of 0 and 255" in refused_maps()
    afresh()
    assert "no saved score, which the metric 'image-level AUC' needs: give --score_from" in refused_maps("--metrics",
                                                                                                     "ImageAUC")
    assert "give --dataset with the set" in refused(tmp_path / "maps", "--output_dir", tmp_path / "out")
    assert "--eval_size network: the maps of" in refused(pngs, "--eval_size", "network", "--output_dir",
                                                         tmp_path / "out")


def test_wrong_predictions(images, saved, pngs, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    assert "holds neither a manifest.json nor a PNG" in refused(tmp_path / "empty", *out)
    assert "no such file or folder" in refused(tmp_path / "nothing", *out)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    assert "is no manifest of saved predictions" in refused(tmp_path / "manifest.json", *out)
    shutil.copytree(saved["padding"], tmp_path / "twice" / "a")
    shutil.copytree(saved["padding"], tmp_path / "twice" / "b")
    assert "holds two predictions of checkpoint-3.pth on set" in refused(tmp_path / "twice", *out)
    printed = score(tmp_path / "twice" / "a", tmp_path / "twice" / "b", *out)
    assert "a checkpoint-3.pth" in printed and "b checkpoint-3.pth" in printed

    maps = tmp_path / "twice" / "a" / "set" / "predictions" / "checkpoint-3"
    about = json.loads((maps / "manifest.json").read_text())
    (maps / about["images"][4]["file"]).unlink()
    assert "1 map that it names can't be found (Tp/p004.npy)" in refused(tmp_path / "twice" / "a", *out)
    np.save(maps / about["images"][4]["file"], np.zeros((3, 4)))
    assert "p004.npy holds float64 (3, 4)" in refused(tmp_path / "twice" / "a", *out)

    # Of another data set: by the fingerprint, without one by the names
    other = tmp_path / "other"
    shutil.copytree(images, other)
    cv2.imwrite(str(other / "Gt" / "p000_gt.png"), 255 - cv2.imread(str(other / "Gt" / "p000_gt.png")))
    flags = ["--dataset", other / "set.json", *out]
    assert "is of a dataset with the fingerprint" in refused(saved["padding"], *flags)
    pairs = json.loads((other / "set.json").read_text())
    (other / "set.json").write_text(json.dumps(pairs[1:] + [["Tp/p000.png", "Negative"]]))
    score(saved["padding"], *flags, "--no_fingerprint")  # another order
    (other / "set.json").write_text(json.dumps(pairs[:5]))
    words = refused(saved["padding"], *flags, "--no_fingerprint")
    assert "of other images than" in words and "not in the set 6 (Tp/p005.png, Tp/p006.png, Tp/p007.png ...)" in words

    # Two models of other images, of other sets
    side = tmp_path / "twice" / "b" / "set" / "predictions" / "checkpoint-3" / "manifest.json"
    about["fingerprint"], about["images"][0]["name"] = "0123456789ab", "Tp/new.png"
    side.write_text(json.dumps(about))
    words = refused("compare", saved["padding"], side, *out)
    assert "are of different images of set" in words and "only in A: Tp/p000.png; only in B: Tp/new.png" in words
    side.write_text(json.dumps({**about, "set": "else"}))
    assert "have no set in common" in refused("compare", saved["padding"], side, *out)
    side.with_name("manifest_other.json").write_text(json.dumps({**about, "set": "else", "checkpoint": "other.pth"}))
    assert "several checkpoints on else" in refused("compare", saved["padding"], side.parent, *out)

    # Of unlabelled images
    for row in about["images"]:
        row["label"] = None
    side.write_text(json.dumps(about))
    assert "is of images without masks" in refused(side, *out)


@pytest.mark.parametrize("given, words", [
    (["area"], "'area' can't be read"), (["colour=1"], "can't be read"), (["area~1"], "can't be read"),
    (["name<3"], "can't be read"), (["size>large"], "'large' is not a finite number"),
    (["name~("], "is no regular expression"), (["area<0.5", "size>5000"], "selects none of the 11 images")])
def test_conditions_that_cannot_be_used(saved, given, words, tmp_path):
    assert words in refused(saved["padding"], "--where", *given, "--output_dir", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


def test_how_far_8_bits_move_each_metric():
    """Between the values of the maps 1/510 better and 1/510 worse in every pixel, as the module says."""
    rng, step, sets = np.random.default_rng(2), 1 / 510, {name: [] for name in ("float", "8bit", "better", "worse")}
    for i in range(8):
        truth = np.zeros((60, 70), np.uint8)
        truth[10:10 + 5 * i, 20:50] = 1
        noise = cv2.GaussianBlur(rng.normal(0, 1, truth.shape), (0, 0), 3) * 2
        signs = 2.0 * truth - 1
        one = (1 / (1 + np.exp(-(signs + 2 * noise + rng.normal(0, 0.2, truth.shape))))).astype(np.float32)
        maps = {"float": one, "8bit": np.rint(255 * one.astype(np.float64)) / 255, "better": one + step * signs,
                "worse": one - step * signs}
        for name, each in maps.items():
            sets[name].append((np.clip(each, 0, 1).astype(np.float32), truth))
    # Images' scores move with their maps' pixels: each by 1/510 at most.
    labels = np.array([float(truth.any()) for _, truth in sets["float"]])
    scores = rng.random(8)
    image_scores = {"float": scores, "8bit": np.rint(255 * scores) / 255, "better": scores + step * (2 * labels - 1),
                    "worse": scores - step * (2 * labels - 1)}

    moved = {}
    for spec in EVERY:
        metric, = parse_metrics([spec])
        found = {}
        for name, each in sets.items():
            samples = Samples(*([torch.from_numpy(part) for part in parts] for parts in zip(*each)))
            columns = {metric.name: np.stack([column.numpy() for column in metric.columns(samples)])
                       if not spec.startswith("Image") and metric.count_columns() else np.zeros((0, 8))}
            levels = Levels(samples.keys) if metric.way and metric.way.needs_levels else None
            draw = Draw(np.clip(image_scores[name], 0, 1), labels, columns, levels)
            found[name] = float(metric.value(draw)[0])
        moved[spec] = abs(found["8bit"] - found["float"])
        if "eer" not in spec.lower():  # the place of the equal error rate may jump
            low, high = sorted((found["better"], found["worse"]))
            assert low - 1e-6 <= found["8bit"] <= high + 1e-6, (spec, found)
            assert low - 1e-6 <= found["float"] <= high + 1e-6, (spec, found)
        assert not np.isnan(moved[spec])
    assert max(moved.values()) < 0.05 and moved["PixelAUC:origin"] < 1e-4, moved
    # A threshold moves only the pixels within 1/510 of it.
    for (exact, _), (rounded, _) in zip(sets["float"], sets["8bit"]):
        assert (np.abs(exact - 0.5)[(exact > 0.5) != (rounded > 0.5)] <= step).all()
