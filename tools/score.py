"""Score saved predictions again, compare two models, put runs into one table: without a model and without a GPU.

    python tools/score.py output_test --metrics all --where "area<0.05"
    python tools/score.py maps_of_another_program --dataset CASIA1.json --metrics PixelF1 ImageAUC --score_from max
    python tools/score.py compare output_test_a output_test_b --metrics PixelF1 PixelAUC
    python tools/score.py table output_test_a output_test_b --metrics PixelF1 PixelIOU --output_dir output_table

Predictions are what test.py --save_predictions and save_images.py write: a manifest.json, or any folder above several;
or a folder of PNGs, paired with the images of --dataset by name. --where takes area (tampered share of the mask), size
(longer side in pixels), label and name (~ and !~: a regular expression), and all its conditions must hold. Writes to
--output_dir results.csv (one row per checkpoint, dataset and metric, with a 95 % interval over the images), the same
as .json, .md and .tex; `compare` writes compare.csv, .json and .md; `table`, of runs with a results.json, results.md
and results.tex with the best in bold and the second underlined.

Float maps score exactly as the run that saved them. A grey PNG's k is the score k/255, k/65535 with 16 bits. Rounding
to 8 bits moves a score by at most 1/510: F1 and what else has a threshold move only by the pixels that near to it, AUC
and AP only by pairs of pixels that near to each other, and any metric that rises with each right pixel's score lies
between its values for the map made 1/510 better and 1/510 worse everywhere. What rests on the equal error rate may
jump.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import argparse
import collections
import concurrent.futures
import functools
import operator
import os
import re
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import metrics
import results
from counting import Samples
from evaluate import Record, needs_levels, read_table, summarize, tabulate
from log import Progress, as_text, csv_lines, format_table, make_output_dir, say, write_file
from predictions import versions
from registry import Parser, UserError, counted, exit_on_user_error, finite, usable_cpus

FORMS = ("compare", "table")  # what may stand before the paths
SIZES = {"network": "size of the model's input", "original": "images' own size"}
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
             "!=": operator.ne}


class Misfit(UserError):
    """A map of another size than its mask."""


class Condition(NamedTuple):
    """A condition of --where: as given, and whether an image's name and mask (H, W) meet it."""

    text: str
    holds: Callable


def condition(text):
    """argparse type: a Condition."""
    fields = {"area": lambda mask: mask.mean(), "size": lambda mask: max(mask.shape), "label": lambda mask: mask.any()}
    parts = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|!~|[<>=~])\s*(.*\S)\s*", text, re.S)
    field, sign, value = parts.groups() if parts else ("", "", "")
    if field == "name" and sign in ("~", "!~"):
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no regular expression ({error})") from None
        return Condition(text, lambda name, mask: bool(pattern.search(name)) == (sign == "~"))
    if field not in fields or sign not in OPERATORS:
        raise argparse.ArgumentTypeError(f"{text!r} can't be read, give area, size or label with < <= > >= = != and a "
                                         "number, or name with ~ or !~ and a regular expression, in quotes")
    number = finite(value)
    return Condition(text, lambda name, mask: OPERATORS[sign](fields[field](mask), number))


def get_args():
    form = sys.argv[1] if sys.argv[1:] and sys.argv[1] in FORMS else "score"
    parser = Parser(description=__doc__, prog="score.py" + f" {form}" * (form in FORMS))
    if form == "table":
        parser.add_argument("paths", nargs="+", metavar="RUN", help="folder with a results.json, or the file")
    else:
        parser.add_argument("paths", nargs=2 if form == "compare" else "+", metavar="PREDICTIONS",
                            help="manifest.json, folder above such, or folder of PNGs; after `compare` two of them, "
                                 "after `table` folders with results.json")
    parser.add_argument("--metrics", nargs="+", default=None, metavar="NAME",
                        help="PixelF1, ImageAUC, PixelF1:imdlbenco, ..., all, pixel or image, as in test.py; of "
                             "`table` also a column's name (default: PixelF1 PixelIOU; of `table`, all)")
    if form != "table":
        parser.add_argument("--dataset", default=None,
                            help="the set that the predictions are of, or a JSON object {name: path} of several "
                                 "(default: the manifest's)")
        parser.add_argument("--threshold", type=finite, default=None,
                            help="what is above it counts as tampered, for the metrics that have a threshold (default: "
                                 "0.5)")
        parser.add_argument("--score_from", choices=metrics.SCORES_FROM, default=None,
                            help="judge images by a score pooled from the map instead of the saved one: its maximum, "
                                 "its mean, or the mean of its highest 1%%")
        parser.add_argument("--eval_size", choices=["network", "original"], default=None,
                            help="judge at the size of the model's input, or at each image's own, to which the map is "
                                 "brought back (default: network where the maps were saved at it)")
        parser.add_argument("--where", nargs="+", type=condition, default=[], metavar="COND",
                            help="only images that meet all conditions: \"area<0.05\" \"size>=1024\" \"label=1\" "
                                 "\"name~Sp_D\" \"name!~Sp_D\"")
        parser.add_argument("--no_fingerprint", action="store_true",
                            help="don't read every file of a dataset for its fingerprint, compare names alone")
        parser.add_argument("--no_progress", action="store_true", help="don't show progress")
    if form == "score":
        parser.add_argument("--save_per_image", action="store_true",
                            help="also write every image's metrics and score to per_image.csv")
    parser.add_argument("--output_dir", default="output_table" if form == "table" else "output_score",
                        help="folder for all that is written (default: %(default)s)")
    return form, parser.parse_args(sys.argv[1 + (form in FORMS):])


def few(names):
    """Return the first names of a list as words."""
    return ", ".join(names[:3]) + " ..." * (len(names) > 3)


def short_names(folders):
    """Return the folders' names, with as many of the folders above as tell them apart; UserError for one that is given
    twice."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = [as_text("/".join(each[-count:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(folder for folder, each in zip(folders, parts) if parts.count(each) > 1)
    raise UserError(f"{twice} is given twice: leave it out once.")


# ---------------------------------------------------------------------------------------------------------------------
# Which maps belong to which images


class Predictions(NamedTuple):
    """The maps of one checkpoint on one set."""

    given: str  # the command line's word that led here
    path: Path  # of the manifest; of maps without one, their folder
    about: dict  # the manifest's content; of maps without one, the same without "images"

    def file(self, row):
        """Return the path of the map that a row of the manifest names."""
        return (self.path if self.is_foreign() else self.path.parent) / row["file"]

    def is_foreign(self):
        """Tell whether another program wrote the maps, without a manifest."""
        return "images" not in self.about

    def is_unlabelled(self):
        """Tell whether the maps were saved of images without masks."""
        return not self.is_foreign() and any(row["label"] is None for row in self.about["images"])

    def fingerprint(self):
        """Return that of the labelled dataset, or data.NOT_COMPUTED."""
        return data.NOT_COMPUTED if self.is_unlabelled() else self.about["fingerprint"]


def find_manifests(folder):
    """Return the paths of all manifests of saved predictions below a folder."""
    return [Path(folder) / name for name in data.list_files(folder, {".json"})
            if re.fullmatch(r"manifest(_.*)?\.json", os.path.basename(name))]


def find_predictions(given, args):
    """Return the Predictions that one word of the command line means."""
    path = Path(given)
    if not path.exists():
        raise UserError(f"{given}: no such file or folder; give a manifest.json, a folder above such, or one of PNGs.")
    if not path.is_dir():
        return [Predictions(given, path, read_manifest(path))]
    if found := find_manifests(path):
        every = [Predictions(given, manifest, read_manifest(manifest)) for manifest in found]
        seen = {}
        for each in every:
            key = each.about["set"], each.about["checkpoint"]
            if key in seen:
                raise UserError(f"{given} holds two predictions of {key[1]} on {key[0]}, {seen[key].path} and "
                                f"{each.path}: give their folders one by one.")
            seen[key] = each
        return every
    if not data.list_files(path, {".png"}):
        raise UserError(f"{given} holds neither a manifest.json nor a PNG: give the folder that test.py "
                        "--save_predictions or save_images.py wrote, or maps as PNG.")
    if not args.dataset:
        raise UserError(f"{given} holds PNGs and no manifest.json: give --dataset with the set that they are of.")
    about = {"checkpoint": as_text(path.resolve().name), "fingerprint": data.NOT_COMPUTED, "size": "original"}
    members = members_of(args.dataset)
    return [Predictions(given, path / name if len(members) > 1 else path, {**about, "set": name, "dataset": member})
            for name, member in members.items()]


def read_manifest(path):
    """Return the content of a manifest; UserError where it is none."""
    about = data.read_json(path)
    needed = {"set", "checkpoint", "dataset", "fingerprint", "size", "image_size", "if_padding", "images"}
    keys = {"name", "label", "score", "file", "height", "width"}
    if (not isinstance(about, dict) or not needed <= {*about} or not isinstance(about["images"], list)
            or not all(isinstance(row, dict) and keys <= {*row} for row in about["images"])):
        raise UserError(f"{path} is no manifest of saved predictions: give one that test.py --save_predictions or "
                        "save_images.py wrote.")
    return about


def members_of(dataset):
    """Return {name: path} of what --dataset gives, one set or a JSON object of several."""
    try:
        if data.dataset_kind(dataset) == "several":
            return {as_text(name): data.resolve_path(dataset, path) for name, path in data.read_sets(dataset).items()}
    except UserError as error:
        raise UserError(f"--dataset: {error}") from None
    full = Path(dataset).resolve()
    return {as_text(full.name if full.is_dir() else full.stem): dataset}


@functools.cache
def open_set(path, flag, **options):
    """Open a labelled dataset, once for all predictions of it; errors name `flag`."""
    return data.open_dataset(path, flag, **options)


def open_set_of(predictions, args):
    """Return the dataset that predictions are of; UserError where it is another, or none with masks."""
    path, about = predictions.path, predictions.about
    dataset, flag = about["dataset"], "--dataset"
    if not predictions.is_foreign():
        if args.dataset:
            members = members_of(args.dataset)
            dataset = members.get(about["set"]) or (len(members) == 1 and args.dataset)
            if not dataset:
                raise UserError(f"--dataset {args.dataset}: has no set {about['set']!r}, which {path} is of; name it.")
        elif predictions.is_unlabelled():
            raise UserError(f"{path}: is of images without masks, which can't be scored: give --dataset with a set of "
                            "the same images and their masks.")
        elif not os.path.exists(dataset):
            raise UserError(f"{path}: its dataset {dataset} isn't there: give --dataset with the path that it has now.")
        else:
            flag = str(path)
    options = {"image_size": about["image_size"], "padding": about["if_padding"]} if "image_size" in about else {}
    test_set = open_set(dataset, flag, fingerprint=not args.no_fingerprint, progress=not args.no_progress, **options)
    theirs, ours = predictions.fingerprint(), test_set.fingerprint
    if data.NOT_COMPUTED in (theirs, ours):
        say(f"note: {path}: paired with the images of {dataset} by name, without a fingerprint of both")
    elif theirs != ours:
        raise UserError(f"{path}: is of a dataset with the fingerprint {theirs}, but that of {dataset} is {ours}: its "
                        "images or masks are others; give --dataset with the copy that was predicted.")
    return test_set


def below(paths):
    """Return paths relative to their common folder, with "/"."""
    paths = list(map(os.path.abspath, paths))
    root = os.path.commonpath(list(map(os.path.dirname, paths)))
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]


def matched(first, second):
    """Return two lists of images' names in a form in which they can be compared, and the names that only one has.

    Names are taken as listed, or below their common folder where that fits more of them, as of a set that has moved,
    and with how often each came before: an image may be listed twice.
    """
    def numbered(names):
        seen = collections.Counter()
        return [(name, seen.update([name]) or seen[name]) for name in names]

    views = [[numbered(view(names)) for names in (first, second)] for view in (list, below)]
    ours, theirs = max(views, key=lambda view: len({*view[0]} & {*view[1]}))
    alone = ([name for name, number in one if (name, number) not in other]
             for one, other in ((ours, {*theirs}), (theirs, {*ours})))
    return ours, theirs, *alone


def rows_of(predictions, test_set):
    """Return the manifest's row for each image of the dataset; UserError where they are of other images, or a map is
    missing."""
    path, names = predictions.path, list(map(os.fsdecode, test_set.names))
    if predictions.is_foreign():
        return pair_maps(path, test_set)
    rows = predictions.about["images"]
    ours, theirs, lacking, extra = matched(names, [row["name"] for row in rows])
    if lacking or extra:
        raise UserError(f"{path}: is of other images than {test_set.path}: without a map are {len(lacking)} "
                        f"({few(lacking)}), not in the set {len(extra)} ({few(extra)}); give --dataset with the set "
                        "that was predicted.")
    by_name = dict(zip(theirs, rows))
    rows = [by_name[name] for name in ours]
    missing = [row["file"] for row in rows if not data.exists(predictions.file(row))]
    if missing:
        raise UserError(f"{path}: {counted(len(missing), 'map')} that it names can't be found ({few(missing)}): copy "
                        "the whole folder, or save the predictions again.")
    return rows


def pair_maps(folder, test_set):
    """Return a row as in a manifest for each image of a dataset, of PNGs without one; UserError where the names of
    images and maps don't fit one to one."""
    images = below(map(os.fsdecode, test_set.images))
    try:
        pairs, alone, extra = data.pair_by_name(list(dict.fromkeys(images)), data.list_files(folder, {".png"}))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if alone or extra:
        raise UserError(f"{folder}: {counted(len(alone), 'image')} of {test_set.path} without a map ({few(alone)}), "
                        f"{counted(len(extra), 'map')} without an image ({few(extra)}): give maps the names of their "
                        "images, and move others away.")
    maps = dict(pairs)
    return [{"file": maps[image], "score": None} for image in images]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def read_map(path):
    """Read a saved map as float32 (H, W): .npy as it is, a grey PNG's k as k/255 or k/65535.

    A coloured PNG of three equal channels is grey too, and an alpha channel may be there where it hides nothing.
    UserError for any other file.
    """
    if path.suffix == ".npy":
        try:
            values = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} can't be read ({error}): save the predictions again.") from None
        if values.dtype != np.float32 or values.ndim != 2:
            raise UserError(f"{path} holds {values.dtype} {values.shape}, no float32 (H, W): save it again.")
        return values
    pixels = data.decode(path, data.read_bytes(path), as_mask=True)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path} holds {pixels.dtype} pixels: save grey values of 8 or 16 bits.")
    most = np.iinfo(pixels.dtype).max
    if pixels.ndim == 3:
        colours, alpha = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1], pixels[..., 3:]
        if (colours != colours[..., :1]).any() or (alpha != most).any():
            raise UserError(f"{path} is coloured or transparent, so its pixels are no scores: save grey values, 0 for "
                            "authentic and the highest for tampered.")
        pixels = colours[..., 0]
    return pixels / np.float32(most)


def whole_mask(index, row, test_set):
    """Return an image's mask at its own size, (H, W) uint8, black for an authentic image."""
    if path := os.fsdecode(test_set.masks[index]):
        return data.read_mask(path)
    if row.get("height"):
        return np.zeros((row["height"], row["width"]), np.uint8)
    facts = data.scan_file(os.fsdecode(test_set.images[index]), False)
    return np.zeros((facts["height"], facts["width"]), np.uint8)


def map_and_mask(mask, row, predictions, test_set, at_network):
    """Return an image's map, float32 (H, W), and its mask of the same size, that of the model's input or the image's
    own; UserError where the map has another. `mask` is the whole mask."""
    values, whole = read_map(predictions.file(row)), mask
    if predictions.about["size"] == "network":
        sample = test_set.finish(mask, {"mask": mask}, {})
        height, width = sample["shape"].tolist()
        mask = sample["mask"][:height, :width]
    if values.shape != mask.shape:
        raise Misfit(f"{row['file']} is {values.shape[0]}x{values.shape[1]} instead of {mask.shape[0]}x{mask.shape[1]}")
    if predictions.about["size"] == "network" and not at_network:
        values, mask = data.restore_size(values, values.shape, whole.shape, test_set.padding), whole
    return values, mask


def score_image(index, row, predictions, test_set, wanted, conditions, at_network):
    """Return what `score` keeps of one image: None where it isn't selected, a text where its map doesn't fit, else its
    row of `read_table`, name, sorted keys and highest score (1 where no map is needed)."""
    name, mask = os.fsdecode(test_set.names[index]), whole_mask(index, row, test_set)
    if not all(each.holds(name, mask) for each in conditions):
        return None
    label, pixels, highest = float(mask.any()), None, 1
    if any("pred_mask" in metric.keys() for metric in wanted):
        try:
            values, mask = map_and_mask(mask, row, predictions, test_set, at_network)
        except Misfit as misfit:
            return str(misfit)
        highest = values.max()
        pixels = Samples([torch.from_numpy(values)], [torch.from_numpy(mask)])
    score = None if row["score"] is None else torch.tensor([row["score"]], dtype=torch.float64)
    table, ready = tabulate(score, torch.tensor([label], dtype=torch.float64), pixels, wanted)
    columns = read_table(table, ready, wanted, [name], str(predictions.path))
    return columns, name, pixels.keys if needs_levels(wanted) else (), highest


def size_of(several, asked):
    """Return the --eval_size that predictions are judged at together; UserError where they can't be at the one asked
    for."""
    original = [each for each in several if each.about["size"] == "original"]
    if asked == "network" and original:
        raise UserError(f"--eval_size network: the maps of {original[0].path} are saved at the images' own size and "
                        "can be judged at that alone; leave it out, or save them with test.py --save_predictions.")
    return asked or ("original" if original else "network")


def score(predictions, test_set, wanted, args, eval_size):
    """Return the `Result` of predictions on the images that meet --where, as `evaluate` would."""
    rows, place = rows_of(predictions, test_set), f"{predictions.about['set']}, {predictions.about['checkpoint']}"
    needing = [metric.name for metric in wanted if "pred_label" in metric.keys()]
    unscored = sum(row["score"] is None for row in rows)
    if needing and unscored:
        raise UserError(f"{predictions.path}: {unscored} of {counted(len(rows), 'image')} have no saved score, which "
                        f"the metric '{needing[0]}' needs: give --score_from max, or take it off the list.")
    record, misfits, highest = Record(wanted), [], 0
    job = functools.partial(score_image, predictions=predictions, test_set=test_set, wanted=wanted,
                            conditions=args.where, at_network=eval_size == "network")
    with (concurrent.futures.ThreadPoolExecutor(usable_cpus()) as pool,
          Progress(f"scoring {place}", len(rows), not args.no_progress) as bar):
        waiting, left = collections.deque(), iter(enumerate(rows))
        while True:
            waiting.extend(pool.submit(job, *each) for _, each in zip(range(2 * usable_cpus() - len(waiting)), left))
            if not waiting:
                break
            found = waiting.popleft().result()
            bar.update()
            if isinstance(found, str):
                misfits.append(found)
            elif found:
                columns, name, keys, own = found
                highest = max(highest, own)
                if record.levels:
                    record.levels.add(keys)
                record.add([record.table.count], columns, [name])
    if misfits:
        own = predictions.about["size"] == "original"
        raise UserError(f"{predictions.path}: {counted(len(misfits), 'map')} of another size than wanted here "
                        f"({few(misfits)}, height x width): save the maps again{' as large as the images' * own}.")
    count = record.table.count
    if predictions.is_foreign() and count and 0 < highest < 1.5 / 255:
        raise UserError(f"{predictions.path}: no map holds a score above 1/255, as if they held 0 and 1 instead of 0 "
                        "and 255: save them with 255, or 65535 with 16 bits, for the score 1.")
    if not count:
        raise UserError(f"--where {words_of(args.where)}: selects none of the {counted(len(rows), 'image')} of "
                        f"{place}; loosen it.")
    say(f"{place}: {count} of {counted(len(rows), 'image')}, at the {SIZES[eval_size]}")
    return summarize([record], wanted, count, keep_names=True)


def words_of(conditions):
    """Return the conditions of --where as words."""
    return ", ".join(each.text for each in conditions)


def set_name(name, conditions):
    """Return the name of a set, or of the part of it that meets the conditions."""
    return f"{name} [{words_of(conditions)}]" if conditions else name


def chosen_metrics(args):
    """Return the metrics that the command line names."""
    return metrics.choose(args.metrics, [metrics.PixelF1(), metrics.PixelIOU()], False, args.threshold, args.score_from)


def run_score(args, output_dir):
    """Score predictions; print one table and write it."""
    wanted, rows, per_image = chosen_metrics(args), [], []
    every = [each for given in args.paths for each in find_predictions(given, args)]
    repeated = collections.Counter((each.about["set"], each.about["checkpoint"]) for each in every)
    runs = dict(zip(args.paths, short_names(args.paths))) if max(repeated.values()) > 1 else {}
    about = {"command": sys.argv, "versions": versions(), "where": [each.text for each in args.where], "scored": []}
    for each in every:
        test_set, eval_size = open_set_of(each, args), size_of([each], args.eval_size)
        result = score(each, test_set, wanted, args, eval_size)
        place = {"checkpoint": each.about["checkpoint"], "set": set_name(each.about["set"], args.where)}
        place = {"run": runs[each.given], **place} if runs else place
        say(f"{' '.join(place.values())}  {result.describe()}")
        rows += results.result_rows(result, wanted, place, {"fingerprint": test_set.fingerprint,
                                                            "eval_size": eval_size})
        per_image += [{**place, **row} for row in result.rows()] if args.save_per_image else []
        about["scored"].append({**place, "predictions": str(each.path)})
    results.write_results(output_dir, rows, about)
    if per_image:
        write_file(output_dir / "per_image.csv", csv_lines(per_image))
    results.print_table(rows)
    say(f"results, with 95 % intervals, in {output_dir / 'results.csv'}, and as .json, .md and .tex")


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of two models


def pairs_of(first, second, args):
    """Return [(A, B)] of two lists of Predictions, matched by the set's name; UserError where that can't be done."""
    given = args.paths
    for side, word in zip((first, second), given):
        names = [each.about["set"] for each in side]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"compare: {word} holds the predictions of several checkpoints on {name}: give the "
                                "folder of one of them.")
    if len(first) == len(second) == 1 and args.dataset:
        return [(first[0], second[0])]  # of that set, whatever a manifest calls it
    by_name = {each.about["set"]: each for each in second}
    pairs = [(each, by_name[each.about["set"]]) for each in first if each.about["set"] in by_name]
    if not pairs:
        sets = (few([each.about["set"] for each in side]) for side in (first, second))
        raise UserError(f"compare: {given[0]} ({next(sets)}) and {given[1]} ({next(sets)}) have no set in common; give "
                        "two models' predictions of the same sets.")
    return pairs


def refuse_different(a, b):
    """Raise UserError where two manifests of one set are of different images; says which."""
    prints = [each.fingerprint() for each in (a, b)]
    if data.NOT_COMPUTED in prints or prints[0] == prints[1]:
        return  # what isn't told by fingerprints, the names in `rows_of` will
    _, _, *alone = matched(*([row["name"] for row in each.about["images"]] for each in (a, b)))
    which = "; ".join(f"only in {side}: {few(found)}" for side, found in zip("AB", alone) if found)
    raise UserError(f"compare: {a.path} and {b.path} are of different images of {a.about['set']}, fingerprints "
                    f"{' and '.join(prints)} ({which or 'the names agree, but files or masks differ'}): predict the "
                    "same copy with both.")


def run_compare(args, output_dir):
    """Compare two models' predictions; print and write a table per set."""
    wanted, rows = chosen_metrics(args), []
    sides = [find_predictions(given, args) for given in args.paths]
    pairs = pairs_of(*sides, args)
    left_out = {each.about["set"] for side in sides for each in side} - {each.about["set"] for pair in pairs
                                                                         for each in pair}
    if left_out:
        say(f"note: not compared, as only one side has them: {', '.join(sorted(left_out))}")
    for a, b in pairs:
        refuse_different(a, b)
        eval_size, test_sets = size_of([a, b], args.eval_size), [open_set_of(a, args)]
        b = b._replace(about={**b.about, "dataset": test_sets[0].path})  # one copy, in one order
        test_sets.append(open_set_of(b, args))
        fits = [(each.about.get("image_size"), each.about.get("if_padding")) for each in (a, b)]
        if eval_size == "network" and fits[0] != fits[1]:
            say(f"note: {a.path} and {b.path} were predicted at other sizes, and each is judged at its own: "
                "--eval_size original judges both at the images'")
        compared = [score(each, test_set, wanted, args, eval_size) for each, test_set in zip((a, b), test_sets)]
        name = set_name(a.about["set"], args.where)
        for metric, row in results.compare(*compared, wanted).items():
            better = (row["difference"] > 0) != results.lower_is_better(metric)
            verdict = f"{'A' if better else 'B'} is better" if row["decided"] else "not decided"
            rows.append({"set": name, "metric": metric, "A": row["first"], "B": row["second"],
                         **{key: row[key] for key in ("difference", "low", "high", "p")}, "verdict": verdict,
                         "images": compared[0].counted[metric], "fingerprint": test_sets[0].fingerprint,
                         "eval_size": eval_size})
    header = ["metric", "A", "B", "difference", "95 % interval", "p", ""]
    say(f"A: {args.paths[0]}\nB: {args.paths[1]}")
    for name in dict.fromkeys(row["set"] for row in rows):
        say("\n" + name + "\n" + format_table(header, [
            [row["metric"], row["A"], row["B"], row["difference"], interval(row), row["p"], row["verdict"]]
            for row in rows if row["set"] == name]))
    lines = [[row["set"], row["metric"], *(number(row[key]) for key in ("A", "B", "difference")), interval(row),
              number(row["p"]), row["verdict"]] for row in rows]
    write_file(output_dir / "compare.csv", csv_lines(rows))
    write_file(output_dir / "compare.md", results.markdown(["set", *header], lines))
    about = {"command": sys.argv, "versions": versions(), "where": [each.text for each in args.where]}
    results.write_json(output_dir / "compare.json", rows, {**about, "A": args.paths[0], "B": args.paths[1]})
    say(f"comparison in {output_dir / 'compare.csv'}, .json and .md")


def number(value):
    """Return a number as a cell of a table."""
    return "-" if value != value else f"{value:.4f}"


def interval(row):
    """Return the interval of a compared row as a cell of a table."""
    return "-" if row["low"] != row["low"] else f"[{row['low']:.4f}, {row['high']:.4f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Table of several runs


def read_run(path):
    """Return (folder, rows) of a run's results.json; UserError where there is none."""
    file = Path(path) / "results.json" if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no {file}; give the --output_dir of test.py, test_robust.py or "
                        "tools/score.py.")
    content = data.read_json(file)
    rows = content.get("results") if isinstance(content, dict) else None
    if not rows or not all(isinstance(row, dict) and {"set", "metric", "value"} <= {*row} for row in rows):
        raise UserError(f"{file} holds no results of test.py, test_robust.py or tools/score.py; give their "
                        "--output_dir.")
    return file.parent, rows


def columns_of(specs, known):
    """Return which of the metrics' names `known` --metrics asks for, in its order, by that name or by the class."""
    names = []
    for spec in specs:
        found = [spec] if spec in known else [each.name for each in metrics.parse_metrics([spec])]
        names += [name for name in found if name in known]
        if not {*found} & {*known}:
            raise UserError(f"--metrics {spec}: none of the runs has it; they have {', '.join(known)}.")
    return list(dict.fromkeys(names))


def refuse_mixed(rows):
    """Raise UserError where rows of several runs, each with "set", "fingerprint" and "run", are of different copies of
    a set."""
    prints = {}
    for row in rows:
        own = row.get("fingerprint") or data.NOT_COMPUTED
        other, run = prints.setdefault(row["set"], (own, row["run"])) if own != data.NOT_COMPUTED else (own, None)
        if own != other:
            raise UserError(f"the set {row['set']} is not the same in {run} and {row['run']}: fingerprints {other} and "
                            f"{own}; test both on one copy.")


def run_table(args, output_dir):
    """Print and write one table of the results of several runs."""
    folders, tables = zip(*map(read_run, args.paths))
    rows = [{**row, "run": f"{name} {row['run']}" if row.get("run") else name}  # a run may be a score of several
            for name, table in zip(short_names(folders), tables) for row in table]
    refuse_mixed(rows)
    known = list(dict.fromkeys(row["metric"] for row in rows))
    names = columns_of(args.metrics, known) if args.metrics else known
    rows = sorted((row for row in rows if row["metric"] in names), key=lambda row: names.index(row["metric"]))
    results.print_table(rows)
    results.write_tables(output_dir, rows)
    say(f"table in {output_dir / 'results.md'} and {output_dir / 'results.tex'}")


def main():
    form, args = get_args()
    output_dir = make_output_dir(args.output_dir, "--output_dir")
    {"score": run_score, "compare": run_compare, "table": run_table}[form](args, output_dir)


if __name__ == "__main__":
    exit_on_user_error(main)
