"""tools/report.py and --report: numbers equal those of the runs, names are escaped, weight is bounded, and in a browser
the gallery sorts, filters and enlarges.

Run: python -m pytest tests/test_report.py
"""
import base64
import csv
import html.parser
import json
import re
import shutil
import statistics

import cv2
import numpy as np
import pytest
import torch

import models.mymodel
from conftest import make_images, run_here
from tools import report

ODD = "<script>document.title='taken'<img src=x onerror=\"alert(1)\">字é&amp;.png"  # no "/" in the name of a file
SET = "<b>'one\" & 字"
SMALL = ["--if_resizing", "--image_size", 64, "--num_workers", 0]


def make(*flags):
    """Run tools/report.py; returns its standard output."""
    done = run_here("tools/report.py", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


class Page(html.parser.HTMLParser):
    """What a page holds: `tags`, [(tag, attributes)], and `text`, what stands between them without style and script."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.text, self.raw = [], "", file.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.cards = [attributes for tag, attributes in self.tags if attributes.get("class") == "card"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.cdata_elem is None:
            self.text += text


def csv_rows(file):
    """The rows of a CSV as dicts."""
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with two untrained checkpoints of MyModel."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for number in (1, 2):
        torch.manual_seed(number)
        state = models.mymodel.MyModel().state_dict()
        state = {"conv.weight": state["conv.weight"].abs() * number, "conv.bias": torch.full((1,), -0.5)}
        torch.save({"model": state}, folder / f"checkpoint-{number}.pth")
    return folder


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory):
    """(sets, output) of test.py --report on two sets, one with an odd name, and the odd name of a file in it."""
    folder = tmp_path_factory.mktemp("run")
    make_images(folder / "one", 4, authentic=2)
    pairs = json.loads((folder / "one" / "set.json").read_text())
    (folder / "one" / pairs[0][0]).rename(folder / "one" / "Tp" / ODD)
    pairs[0][0] = f"Tp/{ODD}"
    (folder / "one" / "set.json").write_text(json.dumps(pairs))
    make_images(folder / "two", 30, seed=1, authentic=1)
    (folder / "sets.json").write_text(json.dumps({SET: "one/set.json", "two": "two/set.json"}))
    done = run_here("test.py", "--model", "MyModel", "--checkpoint_path", checkpoints, "--test_data_json",
                    folder / "sets.json", "--output_dir", folder / "out", *SMALL, "--metrics", "PixelF1", "PixelIOU",
                    "PixelAUC", "ImageAUC", "--score_from", "max", "--save_predictions", "float", "--report")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "sets.json", folder / "out"


def test_numbers_are_those_of_the_run_and_odd_names_are_text(run):
    page = Page(run[1] / "report.html")
    assert [tag for tag, _ in page.tags].count("script") == 1 and not any(tag in ("img", "b") and "src" in attributes
                                                                          for tag, attributes in page.tags)
    assert ODD in page.text and SET in page.text and ODD in {card["data-name"] for card in page.cards}
    assert not re.search(r"https?://|@import|<link", page.raw) and "default-src 'none'" in page.raw

    results = csv_rows(run[1] / "results.csv")
    mean = {name: statistics.mean(float(row["value"]) for row in results if row["checkpoint"] == name
                                  and row["metric"] == "pixel-level F1") for name in
            ("checkpoint-1.pth", "checkpoint-2.pth")}
    best = max(mean, key=mean.get)
    assert f"Best checkpoint by the mean pixel-level F1 over the sets: {best} ({mean[best]:.4f})" in page.text
    for row in results:
        assert f"{float(row['value']):.4f}" in page.text
        assert f"[{float(row['low']):.4f}, {float(row['high']):.4f}]" in page.text or row["low"] == "nan"

    # the gallery holds 24 + 24 + 24 of 30 tampered images, and all of a small set, with the values of the evaluation
    (folder,) = [each.parent for each in run[1].glob("*/per_image.csv") if each.parent.name != "two"]
    for number, file, count in (("1", folder / "per_image.csv", 6), ("2", run[1] / "two" / "per_image.csv", 31)):
        rows = {row["name"].rpartition("/")[2]: row for row in csv_rows(file) if row["checkpoint"] == best}
        cards = [card for card in page.cards if card["data-set"] == number]
        assert len(rows) == count and {card["data-name"] for card in cards} == set(rows)
        for card in cards:
            row = rows[card["data-name"]]
            assert card["data-f1"] == ("" if row["label"] == "0" else f"{float(row['pixel-level F1']):.6f}")
            assert ("alarms" in card["data-group"]) == (row["label"] == "0")
            if row["label"] == "1":
                assert re.search(rf"F1 {float(row['pixel-level F1']):.3f}, IoU {float(row['pixel-level IOU']):.3f}, "
                                 rf"AUC {float(row['pixel-level AUC']):.3f}\D", page.text)
        tampered = sorted(float(row["pixel-level F1"]) for row in rows.values() if row["label"] == "1")
        worst, best_images, median = ([float(card["data-f1"]) for card in cards if group in card["data-group"].split()]
                                      for group in ("worst", "best", "median"))
        assert sorted(worst) == pytest.approx(tampered[:24], abs=1e-6)
        assert sorted(best_images) == pytest.approx(tampered[-24:], abs=1e-6)
        start = max((len(tampered) - 24) // 2, 0)
        assert sorted(median) == pytest.approx(tampered[start:start + 24], abs=1e-6)

    # curves: as many images in the histogram, and the pixels' reliability from the maps themselves
    bars = re.findall(r"<title>[\d.]+ to [\d.]+: (\d+) image", page.raw)
    dots = re.findall(r"<circle[^>]*soft[^>]*><title>(\d+) image", page.raw)
    assert sum(map(int, bars)) == sum(map(int, dots)) == 34
    values, truth = [], []
    maps = run[1] / "two" / "predictions" / best[:-4]
    for row in json.loads((maps / "manifest.json").read_text())["images"]:
        values.append(np.load(maps / row["file"]).ravel())
        mask = run[0].parent / "two" / "Gt" / row["name"].rpartition("/")[2].replace(".png", "_gt.png")
        mask = cv2.imread(str(mask), 0) if row["label"] else np.zeros((64, 64), np.uint8)
        truth.append(cv2.resize(mask, (64, 64), interpolation=cv2.INTER_NEAREST).ravel() > 127)
    values, truth = np.concatenate(values), np.concatenate(truth)
    dots = re.findall(r"probability ([\d.]+), tampered ([\d.]+), ", page.raw)
    fullest = max(range(15), key=lambda i: np.count_nonzero((values >= i / 15) & (values < (i + 1) / 15)))
    inside = (values >= fullest / 15) & (values < (fullest + 1) / 15)
    assert (f"{values[inside].mean():.3f}", f"{truth[inside].mean():.3f}") in dots


def test_robustness_curves_have_the_clean_value_and_the_area(run, checkpoints, tmp_path):
    done = run_here("test_robust.py", "--model", "MyModel", "--checkpoint_path", checkpoints / "checkpoint-2.pth",
                    "--test_data_path", run[0].parent / "one" / "set.json", "--attacks", "GaussianBlur",
                    "JpegCompression", "--output_dir", tmp_path / "out", *SMALL, "--report")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    page, rows = Page(tmp_path / "out" / "report.html"), csv_rows(tmp_path / "out" / "results.csv")
    for metric in ("pixel-level F1", "pixel-level IOU"):
        clean, = [float(row["value"]) for row in rows if row["metric"] == metric and row["strength"] == "0"]
        for attack in ("GaussianBlur", "JpegCompression"):
            points = [(float(row["strength"]), float(row["value"])) for row in rows if row["metric"] == metric
                      and row["attack"] == attack and row["strength"] != "0"]
            area = np.trapezoid([y for _, y in points], [x for x, _ in points]) / (points[-1][0] - points[0][0])
            start = page.text.index(f"{metric}: {attack}")
            assert f"clean {clean:.4f}, area under the curve {area:.4f}" in page.text[start:start + 600]
    assert page.cards == [] and "script" not in [tag for tag, _ in page.tags]


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run[1], other)
    page = Page(run[1] / "report.html")
    best = re.search(r"over the sets: (checkpoint-\d)", page.text)[1]
    maps = other / "two" / "predictions" / best
    rows = json.loads((maps / "manifest.json").read_text())["images"]
    changed = [row["name"].rpartition("/")[2] for row in rows[:3]]
    for row in rows[:3]:
        np.save(maps / row["file"], 1 - np.load(maps / row["file"]))
    earlier = other / "earlier" / "predictions" / best  # of a set that results.json doesn't know
    shutil.copytree(maps, earlier)
    manifest = json.loads((earlier / "manifest.json").read_text())
    (earlier / "manifest.json").write_text(json.dumps({**manifest, "set": "earlier"}))
    assert "37 images of 2 sets" in make(run[1], other, "--output", tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    differ = [card for card in page.cards if "differ" in card["data-group"].split()]
    assert sorted(card["data-name"] for card in differ) == sorted(changed)
    assert all(float(card["data-apart"]) > 0 and "--map2:" in card["style"] for card in differ)
    assert "prediction: out" in page.text and "prediction: other" in page.text


def test_what_is_missing_is_said(run, checkpoints, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run[1] / "results.json", bare)
    make(bare, "--output", tmp_path / "bare.html")
    assert "give test.py --report, or --save_predictions (--save_per_image for" in Page(tmp_path / "bare.html").text
    (bare / "two").mkdir()
    shutil.copy(run[1] / "two" / "per_image.csv", bare / "two")
    make(bare, "--output", tmp_path / "bare.html")
    assert "30 images, mean " in Page(tmp_path / "bare.html").text

    for source, group in (("Tp", "marked"), ("set.json", "worst")):  # without labels, and at the images' own size
        output = tmp_path / source.partition(".")[0]
        done = run_here("save_images.py", "--model", "MyModel", "--checkpoint_path", checkpoints / "checkpoint-2.pth",
                        "--test_data_path", run[0].parent / "one" / source, "--output_dir", output, *SMALL)
        assert done.returncode == 0, done.stderr
        make(output, "--output", tmp_path / "images.html")
        page = Page(tmp_path / "images.html")
        assert sum(group in card["data-group"].split() for card in page.cards) == 4
        assert ("unlabelled" in page.text) == (group == "marked") == ("\nmask" not in page.text)

    (tmp_path / "empty").mkdir()
    manifest = json.loads((output / "manifest.json").read_text())
    moved, another = tmp_path / "moved", tmp_path / "another"
    for folder, change in ((moved, {"dataset": "/nowhere.json"}), (another, {"fingerprint": "0" * 12})):
        shutil.copytree(output, folder)
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    for flags, words in (([tmp_path / "nothing"], "no such folder"), ([tmp_path / "empty"], "neither a results.json"),
                         ([moved], "give --dataset"), ([output, another], "fingerprints"),
                         ([bare, bare], "given twice")):
        done = run_here("tools/report.py", *flags, "--output", tmp_path / "no.html")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "no.html").exists()


def test_weight_is_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    sizes = []
    for limit in (24_000, 5_500, 1):
        content = base64.b64decode(report.thumbnail(noise, limit))
        assert len(content) <= max(limit, 5_500)
        sizes.append(cv2.imdecode(np.frombuffer(content, np.uint8), 1).shape)
    assert sizes[0] > sizes[1] > sizes[2] == (75, 96, 3)
    assert len(report.outline((noise[..., 0] > 250).view(np.uint8))[0]) < 20 * report.OUTLINE
    tiny = np.zeros((3000, 4000), np.uint8)
    tiny[1500:1504, 2000:2004] = 1  # smaller than a unit of the outline
    assert report.outline(tiny) == ("M100 75Z", 200, 150)


def test_a_browser_sorts_filters_and_enlarges(run):
    browsers = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium: apt-get install chromium")
    with browsers.sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
        page, faults = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("pageerror", lambda error: faults.append(error))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: None if request.url.startswith(("data:", "file:")) else
                faults.append(request.url))
        page.goto((run[1] / "report.html").as_uri())
        form, shown = page.locator("form"), page.locator(".gallery .card:visible")

        def values(key):
            return shown.evaluate_all(f"cards => cards.map(card => card.dataset.{key})")

        assert values("f1") == sorted(values("f1")) and len(values("f1")) == 28  # the worst of both sets
        form.get_by_label("descending").check()
        assert values("f1") == sorted(values("f1"), reverse=True)
        form.get_by_label("Set").select_option(label=SET)
        form.get_by_label("Show").select_option(label="all")
        form.get_by_label("Sort by").select_option(label="name")
        assert len(values("name")) == 6 and form.locator("output").inner_text() == "6 of 37 images"
        assert set(values("set")) == {"1"} and ODD in values("name")
        for label, key in (("tampered area", "area"), ("size", "side")):
            form.get_by_label("Sort by").select_option(label=label)
            found = [float(value) for value in values(key) if value]
            assert found == sorted(found, reverse=True) and len(set(found)) > 1
        form.get_by_label("Show").select_option(label="largest false alarms")
        assert values("f1") == ["", ""]

        first, second = values("name")
        shown.first.click()
        assert page.locator("dialog .name").inner_text() == first
        page.keyboard.press("ArrowRight")
        assert page.locator("dialog .name").inner_text() == second
        page.keyboard.press("Escape")
        assert not page.locator("dialog").is_visible()
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.title() == "Report of out" and faults == []
