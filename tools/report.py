"""One page of what a model gets right and wrong: tables, curves, and the images to look at.

    python tools/report.py output_test --output report.html
    python tools/report.py output_test output_robust --output report.html
    python tools/report.py output_test_a output_test_b --output report.html     # side by side, where they differ most

RUN is an output folder of test.py, test_robust.py, save_images.py or tools/score.py; --report of the first two calls
this at the end. The page is one file, which needs no network: tables with intervals and the best checkpoint; F1
histogram, F1 against tampered area and reliability of the best checkpoint; robustness curves; and per set the 24 worst,
best and median images, the authentic ones with the largest false alarms and, of several runs, those where these differ
most. Curves and images need the maps of test.py --save_predictions or save_images.py, and the dataset where it was.
Fewer images are shown of many sets, so that the file stays below 20 MB.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import base64
import csv
import functools
import math
import os
import re
import shlex
from typing import NamedTuple

import cv2
import jinja2
import numpy as np
import torch

import data
import results
from counting import Samples
from log import as_text, in_threads, say, write_file
from metrics import PixelAUC, PixelF1, PixelIOU
from predictions import row_names, to_bytes
from registry import Parser, UserError, counted, exit_on_user_error, visible
from tools.score import (SIZES, Misfit, Predictions, find_manifests, find_predictions, map_and_mask, open_set_of,
                         read_run, refuse_mixed, rows_of, short_names, size_of, whole_mask)

BINS = 15  # of a reliability diagram
IMAGES, THUMBNAILS = 24, 2000  # most per set and group; most on a page, which lowers the other for many sets
BYTES, EACH = 11_000_000, 24_000  # of all thumbnails, and the most of one
OUTLINE = 500  # most points of a mask's outline
NUMBERS = np.dtype([
    *((name, np.float64) for name in ("f1", "iou", "area", "height", "width", "alarm", "highest", "score")),
    *((name, np.float64, BINS) for name in ("pixels", "tampered", "probability"))])
GROUPS = {"differ": "where the runs differ most", "worst": "worst", "median": "median", "best": "best",
          "alarms": "largest false alarms", "marked": "most marked"}


def get_args():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="output folder of test.py, test_robust.py, save_images.py or tools/score.py")
    parser.add_argument("--output", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument("--dataset", default=None,
                        help="the set that the predictions are of, or a JSON object {name: path} of several (default: "
                             "as when they were saved)")
    parser.add_argument("--no_fingerprint", action="store_true",
                        help="don't read every file of a dataset for its fingerprint, compare names alone")
    parser.add_argument("--no_progress", action="store_true", help="don't show progress")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# What the runs hold


class Run(NamedTuple):
    """What an output folder holds."""

    name: str
    folder: Path
    rows: list  # of results.json
    command: str  # that made it, "" where it isn't known
    best: tuple  # (checkpoint, mean of the first metric) of several checkpoints without an attack, else (None, None)
    predictions: dict  # set -> Predictions of the best checkpoint, or the last where there is no best


def read_folder(folder, name, args):
    """Return the Run of an output folder; UserError where it holds neither results nor predictions."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give an output folder of test.py, test_robust.py, save_images.py "
                        "or tools/score.py.")
    folder, rows, command = Path(folder), [], []
    if (folder / "results.json").exists():
        rows, command = read_run(folder)[1], data.read_json(folder / "results.json").get("command", [])
    found = find_predictions(str(folder), args) if find_manifests(folder) else []
    if not rows and not found:
        raise UserError(f"{folder} holds neither a results.json nor a manifest.json: give an output folder of test.py, "
                        "test_robust.py, save_images.py or tools/score.py.")
    clean = [row for row in rows if not row.get("attack")]
    best = results.best_checkpoint(clean) if clean else (None, None)
    tested = {(row["set"], row.get("checkpoint")) for row in clean}  # an earlier run may have left other maps
    found = [each for each in found if not tested or (each.about["set"], each.about["checkpoint"]) in tested]
    chosen = {}
    for each in sorted(found, key=lambda each: (each.about["checkpoint"] == best[0],
                                                [int(part) for part in re.findall(r"\d+", each.about["checkpoint"])])):
        chosen[each.about["set"]] = each  # the last one stays
    return Run(name, folder, rows, shlex.join(map(str, command)), best, chosen)


class View(NamedTuple):
    """One run's predictions of one set, image by image in the order of the dataset."""

    run: Run
    predictions: Predictions
    test_set: data.ImageDataset
    rows: list  # of the manifest
    threshold: float
    at_network: bool  # judged at the size of the model's input
    numbers: np.ndarray  # (N,) NUMBERS


def measure_set(run, predictions, args):
    """Return the View of a run's predictions of a set: every map is read once, and only numbers are kept."""
    if predictions.is_unlabelled() and not args.dataset:
        about = predictions.about
        names = [row["name"] for row in about["images"]]
        try:
            test_set = data.FilesDataset(names, image_size=about["image_size"], padding=about["if_padding"])
        except UserError as error:
            raise UserError(f"{predictions.path}: {error}") from None
    else:
        test_set = open_set_of(predictions, args)
    flags = predictions.about.get("args", {})
    at_network = size_of([predictions], flags.get("eval_size")) == "network"
    threshold = flags.get("threshold")
    view = View(run, predictions, test_set, rows_of(predictions, test_set), 0.5 if threshold is None else threshold,
                at_network, np.zeros(len(test_set), NUMBERS))
    label = f"reading {predictions.about['set']}, {predictions.about['checkpoint']}"
    measured = in_threads(functools.partial(measure, view), range(len(test_set)), label, not args.no_progress, "images")
    for i, row in enumerate(measured):
        view.numbers[i] = row
    return view


def read_sample(view, index, whole):
    """Return an image's map and mask as the metrics of the run saw them; UserError where they don't fit."""
    try:
        return map_and_mask(whole, view.rows[index], view.predictions, view.test_set, view.at_network)
    except Misfit as misfit:
        raise UserError(f"{view.predictions.path}: a map has another size than wanted here ({misfit}, height x width): "
                        "save the maps again.") from None


def measure(view, index):
    """Return one image's row of NUMBERS: area and size of the whole image, NaN for the area without labels."""
    row = view.rows[index]
    whole = whole_mask(index, row, view.test_set)
    values, mask = read_sample(view, index, whole)
    samples = Samples([torch.from_numpy(values)], [torch.from_numpy(mask)])
    f1, iou = (metric(threshold=view.threshold).compute(samples).item() for metric in (PixelF1, PixelIOU))
    level = np.clip(values * BINS, 0, BINS - 1).astype(np.intp).ravel()
    tampered = np.bincount(level[mask.ravel() > 0], minlength=BINS)
    area = math.nan if isinstance(view.test_set, data.FolderDataset) else whole.mean()
    return (f1, iou, area, *whole.shape, np.count_nonzero(values > view.threshold) / values.size, values.max(),
            math.nan if row["score"] is None else row["score"], np.bincount(level, minlength=BINS), tampered,
            np.bincount(level, values.ravel(), BINS))


def per_image_f1(run, name):
    """Return the F1 of a set's images, (N,) without NaN, from a run's per_image.csv; None where there is none."""
    for file in (run.folder / name / "per_image.csv", run.folder / "per_image.csv"):
        if file.exists():
            with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
                values = [float(row["pixel-level F1"]) for row in csv.DictReader(lines) if row.get("pixel-level F1")
                          and row.get("set", name) == name and row["checkpoint"] == (run.best[0] or row["checkpoint"])]
            values = np.array(values)
            return values[~np.isnan(values)]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Curves


class Chart:
    """A diagram as shapes for the template, which draws them as SVG.

    Args:
        title, x, y: words above it and at its axes
        x_ticks, y_ticks: {value: word}; the first and the last value are the ends of the axis
        log: the x axis is logarithmic
    """

    width, height = 360, 230
    left, right, top, bottom = 50, 20, 10, 40

    def __init__(self, title, x, y, x_ticks, y_ticks, log=False):
        self.title, self.x, self.y, self.log, self.shapes, self.notes = title, x, y, log, [], []
        self.ends = [[*x_ticks][0], [*x_ticks][-1], [*y_ticks][0], [*y_ticks][-1]]
        self.x_ticks = [(self.place(value, self.ends[2])[0], word) for value, word in x_ticks.items()]
        self.y_ticks = [(self.place(self.ends[0], value)[1], word) for value, word in y_ticks.items()]

    def place(self, x, y):
        """Return where a point lies, in pixels, cut off at the ends of the axes."""
        x_low, x_high, y_low, y_high = self.ends
        scale = math.log if self.log else float
        share = (scale(min(max(x, x_low), x_high)) - scale(x_low)) / ((scale(x_high) - scale(x_low)) or 1)
        up = (min(max(y, y_low), y_high) - y_low) / ((y_high - y_low) or 1)
        return (round(self.left + share * (self.width - self.left - self.right), 1),
                round(self.height - self.bottom - up * (self.height - self.top - self.bottom), 1))

    def add(self, tag, css, title="", **attributes):
        """Add an SVG element."""
        self.shapes.append({"tag": tag, "attributes": {"class": css, **attributes}, "title": title})

    def line(self, points, css, closed=False):
        """Add a line through points (x, y), or the area that they enclose."""
        places = " ".join("{},{}".format(*self.place(*point)) for point in points)
        self.add("polygon" if closed else "polyline", css, points=places)

    def dot(self, x, y, radius, css, title):
        """Add a dot."""
        x, y = self.place(x, y)
        self.add("circle", css, title, cx=x, cy=y, r=round(radius, 1))

    def bar(self, x, end, y, css, title):
        """Add a bar from the bottom."""
        (left, top), (right, bottom) = self.place(x, y), self.place(end, self.ends[2])
        self.add("rect", css, title, x=left + 0.5, y=top, width=max(right - left - 1, 0.5), height=bottom - top)


UNIT = {value: f"{value:g}" for value in (0, 0.25, 0.5, 0.75, 1)}


def histogram(f1):
    """Return the Chart of how many images have which F1, from an array without NaN."""
    counts = np.histogram(f1, 20, (0, 1))[0]
    half = max(-(-int(counts.max()) // 2), 1)
    chart = Chart("F1 of the images", "F1", "images", UNIT, {value: str(value) for value in (0, half, 2 * half)})
    for i, count in enumerate(counts.tolist()):
        if count:
            chart.bar(i / 20, (i + 1) / 20, count, "s0", f"{i / 20:g} to {(i + 1) / 20:g}: {counted(count, 'image')}")
    if len(f1):
        chart.notes.append(f"{counted(len(f1), 'image')}, mean {f1.mean():.4f}, median {np.median(f1):.4f}")
    return chart


def against_area(numbers):
    """Return the Chart of F1 against tampered area: dots that stand for the images of a cell, and medians."""
    ticks = {0.001: "0.1 %", 0.01: "1 %", 0.1: "10 %", 1: "100 %"}
    chart = Chart("F1 against tampered area", "tampered share of the image", "F1", ticks, UNIT, log=True)
    columns = np.clip((np.log10(numbers["area"]) + 3) * 8, 0, 23).astype(int)  # 8 to a factor of 10
    levels = np.clip(numbers["f1"] * 20, 0, 19).astype(int)
    counts = np.bincount(columns * 20 + levels, minlength=24 * 20).reshape(24, 20)
    for column, level in np.argwhere(counts).tolist():
        count = int(counts[column, level])
        radius = 1.5 + 4.5 * math.sqrt(count / counts.max())
        chart.dot(10 ** ((column + 0.5) / 8 - 3), (level + 0.5) / 20, radius, "s0 soft", counted(count, "image"))
    thirds = [(10 ** ((third + 0.5) / 2 - 3), numbers["f1"][columns // 4 == third]) for third in range(6)]
    chart.line([(x, np.median(f1)) for x, f1 in thirds if len(f1)], "s1")
    chart.notes.append("line: median of each half of a factor of 10; a dot's area: number of images")
    return chart


def reliability(numbers):
    """Return the Chart of the tampered share of pixels against their probability, over all pixels of a set."""
    pixels, tampered, probability = (numbers[name].sum(axis=0) for name in ("pixels", "tampered", "probability"))
    chart = Chart("Reliability", "predicted probability", "tampered share of pixels", UNIT, UNIT)
    chart.line([(0, 0), (1, 1)], "guide")
    filled = pixels > 0
    shares, means = tampered[filled] / pixels[filled], probability[filled] / pixels[filled]
    chart.line([*zip(means.tolist(), shares.tolist())], "s0")
    for x, y, count in zip(means.tolist(), shares.tolist(), pixels[filled].tolist()):
        chart.dot(x, y, 3, "s0", f"probability {x:.3f}, tampered {y:.3f}, {100 * count / pixels.sum():.2g} % of pixels")
    error = np.abs(shares - means) @ pixels[filled] / pixels.sum()
    chart.notes.append(f"expected calibration error {error:.4f} ({BINS} bins); on the diagonal, probabilities are true")
    return chart


def robustness(rows):
    """Return {set: {metric: [Chart of each attack]}} of rows of several runs' results.json, each with "run"."""
    found, curves, clean = {}, {}, {}
    for row in rows:
        if row.get("attack"):
            if row["strength"] == 0 and row["value"] is not None:  # whichever attack it belongs to
                clean[row["run"], row["set"], row["metric"]] = row["value"]
            key = row["set"], row["metric"], row["attack"], row.get("unit") or "strength"
            curves.setdefault(key, {}).setdefault(row["run"], []).append(row)
    for (name, metric, attack, unit), runs in curves.items():
        runs = {run: sorted((row for row in each if row["value"] is not None and row["strength"] != 0),
                            key=lambda row: row["strength"]) for run, each in runs.items()}
        strengths = sorted({row["strength"] for each in runs.values() for row in each})
        if not strengths:
            continue
        low = {-1: "-1"} if min(row["value"] for each in runs.values() for row in each) < 0 else {}
        ticks = {strength: f"{strength:g}" for strength in strengths}
        chart = Chart(f"{metric}: {attack}", unit, metric, ticks, {**low, **UNIT})
        for number, (run, each) in enumerate(runs.items()):
            css, ends, own = f"s{number % 6}", chart.ends, clean.get((run, name, metric))
            banded = [row for row in each if row.get("low") is not None]
            chart.line([(row["strength"], row["low"]) for row in banded]
                       + [(row["strength"], row["high"]) for row in reversed(banded)], f"{css} band", closed=True)
            if own is not None:
                chart.line([(ends[0], own), (ends[1], own)], f"{css} clean")
            chart.line([(row["strength"], row["value"]) for row in each], css)
            for row in each:
                chart.dot(row["strength"], row["value"], 3, css, f"{run}: {row['value']:.4f} at {row['strength']:g}")
            x, y = ([row[key] for row in each] for key in ("strength", "value"))
            note = f"{run}: " * (len(runs) > 1) + ("not tested without attack" if own is None else f"clean {own:.4f}")
            if len(x) > 1:
                note += f", area under the curve {np.trapezoid(y, x) / (x[-1] - x[0]):.4f}"
            chart.notes.append((css, note))
        found.setdefault(name, {}).setdefault(metric, []).append(chart)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Images


def difference(numbers):
    """Return how far several runs lie apart on an image, or on each: in F1, or else in the share that they mark."""
    return np.where(numbers[0]["area"] > 0, *(np.ptp([each[name] for each in numbers], axis=0)
                                              for name in ("f1", "alarm")))


def choose(views, most):
    """Return {index: [groups]} of the images of a set that the gallery shows, up to `most` of each group.

    Of several runs, the mean decides.
    """
    f1, alarm, highest = (np.mean([view.numbers[name] for view in views], axis=0)
                          for name in ("f1", "alarm", "highest"))
    area = views[0].numbers["area"]
    ranked = np.flatnonzero(area > 0)
    ranked = ranked[np.argsort(f1[ranked], kind="stable")]
    ranked = ranked[~np.isnan(f1[ranked])]
    authentic = np.lexsort((-highest, -alarm))
    start = max((len(ranked) - most) // 2, 0)
    groups = {"worst": ranked[:most], "median": ranked[start:start + most], "best": ranked[::-1][:most],
              "alarms": authentic[area[authentic] == 0][:most], "marked": authentic[np.isnan(area[authentic])][:most]}
    if len(views) > 1:
        apart = difference([view.numbers for view in views])
        order = np.argsort(-apart, kind="stable")
        groups = {"differ": order[apart[order] > 0][:most], **groups}
    chosen = {}
    for group, indices in groups.items():
        for index in indices.tolist():
            chosen.setdefault(index, []).append(group)
    return chosen


def thumbnail(pixels, limit):
    """Return an image (H, W, 3) BGR as WebP, in base64: as large as `limit` bytes allow, but for the smallest size."""
    for side in (480, 400, 320, 240, 160, 96):
        share = min(side / max(pixels.shape[:2]), 1)
        size = [max(round(length * share), 1) for length in pixels.shape[1::-1]]
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        content = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, 75])[1].tobytes()
        if len(content) <= limit:
            break
    return base64.b64encode(content).decode()


def outline(mask):
    """Return the outline of a mask as the path of an SVG with (200 w / h) x 200 or 200 x (200 h / w) units, without
    the smallest parts of one that has very many, and the two lengths."""
    share = 200 / max(mask.shape)
    width, height = (max(round(length * share), 1) for length in mask.shape[::-1])
    small = cv2.resize(mask * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA if share < 1 else
                       cv2.INTER_NEAREST)
    contours, _ = cv2.findContours((small > 0).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    path, points = "", 0
    for contour in sorted(contours, key=cv2.contourArea, reverse=True):
        contour = cv2.approxPolyDP(contour, 0.7, True)[:OUTLINE, 0]
        points += len(contour)
        if points > OUTLINE:
            break
        path += "M" + "L".join(f"{x} {y}" for x, y in contour.tolist()) + "Z"
    return path, width, height


def make_card(item, set_name, limit):
    """Return what the template shows of one image of a set: `item` is its index, name, groups and the Views."""
    index, name, groups, views = item
    image, mask, _ = views[0].test_set.read(index)
    path, width, height = outline(mask)
    def plain(value):
        return "" if np.isnan(value) else f"{value:.6f}"

    maps = []
    for view in views:
        values, judged = read_sample(view, index, mask)
        own = view.numbers[index]
        auc = PixelAUC().compute(Samples([torch.from_numpy(values)], [torch.from_numpy(judged)])).item()
        if values.shape != mask.shape:
            values = data.restore_size(values, values.shape, mask.shape, view.test_set.padding)
        heat = cv2.applyColorMap(to_bytes(values), cv2.COLORMAP_INFERNO)
        found = ({"F1": own["f1"], "IoU": own["iou"], "AUC": auc} if own["area"] > 0 else
                 {"marked": own["alarm"], "highest": own["highest"]}) | {"score": own["score"]}
        maps.append({"run": view.run.name, "data": thumbnail(heat, limit),
                     "numbers": {name: f"{value:.3f}" for name, value in found.items() if value == value}})
    first = views[0].numbers[index]
    return {"set": set_name, "groups": groups, "maps": maps, "outline": path, "width": width, "height": height,
            "name": visible(as_text(name)), "f1": plain(np.mean([view.numbers[index]["f1"] for view in views])),
            "apart": plain(difference([view.numbers[index] for view in views])), "area": plain(first["area"]),
            "size": f"{first['width']:.0f} x {first['height']:.0f}",
            "side": int(max(first["width"], first["height"])), "image": thumbnail(image[..., ::-1], limit),
            "kind": f"{100 * first['area']:.2g} % tampered" if first["area"] > 0 else
            "unlabelled" if np.isnan(first["area"]) else "authentic"}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_sections(runs, names, views):
    """Return what the template shows of each set: the charts of each run, and what is missing."""
    sections = []
    for name in names:
        section = {"name": name, "runs": []}
        for run in runs:
            charts, note = [], ""
            view = next((each for each in views[name] if each.run is run), None)
            if view:
                tampered = view.numbers[view.numbers["area"] > 0]
                tampered = tampered[~np.isnan(tampered["f1"])]
                charts = [histogram(tampered["f1"]), against_area(tampered)] if len(tampered) else []
                charts += [reliability(view.numbers)] if not np.isnan(view.numbers["area"]).any() else []
                note = (f"{view.predictions.about['checkpoint']}, {counted(len(view.numbers), 'image')}, judged at the "
                        f"{SIZES['network' if view.at_network else 'original']}, threshold {view.threshold:g}")
            elif any(row["set"] == name and not row.get("attack") for row in run.rows):
                f1 = per_image_f1(run, name)
                charts = [histogram(f1)] if f1 is not None and len(f1) else []
                alone = " (--save_per_image for the histogram alone)" * (not charts)
                note = ("no saved maps, so no images and no further curves: give test.py --report, or "
                        f"--save_predictions{alone}, and make the page again")
            if charts or note:
                section["runs"].append({"name": run.name, "charts": charts, "note": note})
        sections += [section] if section["runs"] else []
    return sections


def tables(runs, rows):
    """Return [(title, header, lines of cells)] of rows with "run": without an attack, and under attacks."""
    found = []
    for title, chosen in (("Results", [row for row in rows if not row.get("attack")]),
                          ("Under attack", [row for row in rows if row.get("attack")])):
        if chosen:
            plain = [{**row, "run": row["run"] if len(runs) > 1 else ""} for row in chosen]
            found.append((title, *results.paper_table(plain)))
    return found


def main():
    args = get_args()
    runs = [read_folder(folder, name, args) for folder, name in zip(args.runs, short_names(args.runs))]
    rows = [{**row, "run": run.name} for run in runs for row in run.rows]
    saved = [{"set": name, "fingerprint": each.fingerprint(), "run": run.name}
             for run in runs for name, each in run.predictions.items()]
    refuse_mixed(rows + saved)
    names = list(dict.fromkeys(row["set"] for row in rows + saved))

    # Every map once, for numbers; then those of the chosen images, for the gallery
    views = {name: [] for name in names}
    for name, of_set in views.items():
        for run in runs:
            if name in run.predictions:
                each = run.predictions[name]
                if of_set and not args.dataset:  # one copy, in one order
                    each = each._replace(about={**each.about, "dataset": of_set[0].predictions.about["dataset"]})
                of_set.append(measure_set(run, each, args))
    shown = sum(len(GROUPS) * (1 + len(of_set)) for of_set in views.values() if of_set)
    most = max(min(IMAGES, THUMBNAILS // max(shown, 1)), 1)
    chosen = {name: choose(of_set, most) for name, of_set in views.items() if of_set}
    count = sum(len(found) * (1 + len(views[name])) for name, found in chosen.items())
    cards = []
    for name, found in chosen.items():
        make = functools.partial(make_card, set_name=name, limit=min(EACH, BYTES // max(count, 1)))
        files = row_names(views[name][0].test_set)
        items = [(index, files[index], groups, views[name]) for index, groups in found.items()]
        cards += in_threads(make, items, f"drawing {name}", not args.no_progress, "images")

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined,
                                     loader=jinja2.FileSystemLoader(Path(__file__).parent))
    environment.filters["visible"] = lambda text: visible(as_text(text))
    page = environment.get_template("report.html.jinja").render(
        runs=runs, sets=names, tables=tables(runs, rows), sections=make_sections(runs, names, views),
        robustness=robustness(rows), cards=cards, most=most, only=len(runs) == 1,
        groups={group: words for group, words in GROUPS.items() if any(group in card["groups"] for card in cards)},
        title=" and ".join(run.name for run in runs))
    write_file(args.output, page)
    what = f"{counted(len(cards), 'image')} of {counted(len(names), 'set')}" if cards else "tables and curves"
    say(f"{what} in {args.output} ({os.path.getsize(args.output) / 1e6:.1f} MB)")


if __name__ == "__main__":
    exit_on_user_error(main)
