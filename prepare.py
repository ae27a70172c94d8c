"""The commands behind `python data.py`: demo, pairs, check, resize. Nothing here is imported by a run.

    python data.py demo --output demo_data                                     # a small data set, made here
    python data.py pairs --image_root Tp --mask_root Gt --output my_set.json   # pair pictures and masks by name
    python data.py check my_set.json other_set                                 # find every fault before a run does
    python data.py resize my_set my_set_1024 --long_side 1024                  # shrink pictures and masks
"""
import collections
import concurrent.futures
import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin

from data import (IMAGE_SUFFIXES, INPAINT_RADIUS, MASK_SUFFIX, beside, compress_jpeg, dataset_kind, decode, encode_jpeg,
                  list_files, list_pictures, pair_by_name, read_bytes, read_image, read_json, read_mask, split_stem)
from registry import Parser, UserError


# ---------------------------------------------------------------------------------------------------------------------
# demo: a small data set from scikit-learn's two photographs
#
# What gives a demo forgery away, on purpose and as in real ones:
# - every picture, authentic or not, has sensor noise all over and was saved as JPEG before the manipulation and after;
# - copy-move: the object was rotated and enlarged, and interpolation smoothed its noise;
# - splicing: the object comes from a picture of other colours, with little noise and strong compression, resampled;
# - inpainting: the filled area is smooth and has no noise.
# So it is an easy set: a method that does well here has learned local noise and resampling traces, no more than that.

DEMO_SETS = {  # folder and JSON name -> the kinds of pictures, taken in turn
    "train": ("splicing", "copymove", "inpainting", "authentic"),
    "test_splicing": ("splicing", "splicing", "splicing", "authentic"),
    "test_copymove_inpainting": ("copymove", "inpainting", "copymove", "inpainting", "authentic"),
}
DEMO_SIDES = ((256, 256), (256, 192), (192, 256))  # (H, W) in pixels
DEMO_TRAIN_COLUMNS = slice(0, 376)  # of the 640 columns of both photographs
DEMO_TEST_COLUMNS = slice(384, 640)  # the 8 columns between keep JPEG's chroma interpolation from crossing over
DEMO_MARKER = "made_by_demo.json"


def demo_photographs():
    """The two photographs that scikit-learn ships (a pagoda and a dahlia), uint8 (427, 640, 3) RGB."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def demo_regions(photographs, name):
    """The parts of the photographs that the demo set `name` may use, hosts and donors alike: no pixel serves both."""
    columns = DEMO_TRAIN_COLUMNS if name == "train" else DEMO_TEST_COLUMNS
    return [photograph[:, columns] for photograph in photographs]


def crop_photograph(rng, region, shape):
    """A random view of `region`, uint8 (H, W, 3) RGB, of `shape` (h, w): cropped, shrunk at most 1.3 times, flipped,
    with varied brightness, contrast and colours."""
    height, width = shape
    scale = rng.uniform(1, min(1.3, region.shape[0] / height, region.shape[1] / width))
    tall, wide = int(height * scale), int(width * scale)
    top, left = rng.integers(region.shape[0] - tall + 1), rng.integers(region.shape[1] - wide + 1)
    view = cv2.resize(region[top:top + tall, left:left + wide], (width, height), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        view = view[:, ::-1]
    colour = rng.uniform(0.9, 1.1, 3) * rng.uniform(0.75, 1)
    view = 255 * (view / 255 * colour).clip(0, 1) ** rng.uniform(0.8, 1.25)
    return view.astype(np.float32)


def add_sensor_noise(rng, view, sigma):
    """`view` (H, W, 3) with noise of standard deviation `sigma` (0-255 scale), as uint8."""
    return np.rint(view + rng.normal(0, sigma, view.shape)).clip(0, 255).astype(np.uint8)


def random_outline(rng, shape, smallest, largest):
    """A smooth object-like area in a picture of `shape` (h, w), as uint8 0/1; its size is a fraction of the picture.

    The outline is a circle whose radius is bent by a few random waves, then stretched and turned.
    """
    height, width = shape
    angles = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    while True:
        radius = np.ones_like(angles)
        for wave in range(2, 8):
            radius += rng.normal(0, 0.4 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
        points = np.stack([np.cos(angles), np.sin(angles)]) * radius.clip(0.3)
        stretch, turn = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = rotation @ (points * [[stretch], [1 / stretch]])
        points *= math.sqrt(rng.uniform(smallest, largest) * height * width / np.pi)
        points += [[rng.uniform(0.15, 0.85) * width], [rng.uniform(0.15, 0.85) * height]]
        area = cv2.fillPoly(np.zeros(shape, np.uint8), [np.rint(points.T).astype(np.int32)], 1)
        if smallest <= area.mean() <= 1.2 * largest:
            return area


def blend(rng, host, patch, area):
    """Put `patch` over `host` (both (H, W, 3)) inside `area` (H, W, 0/1) with a soft edge of about two pixels.

    Returns the uint8 picture and its mask (H, W), uint8 0/1: 1 where the patch has the greater part.
    """
    soft = cv2.GaussianBlur(area.astype(np.float32), (0, 0), rng.uniform(0.6, 1.5))
    picture = host + soft[..., None] * (patch.astype(np.float32) - host)
    return np.rint(picture).clip(0, 255).astype(np.uint8), (soft > 0.5).astype(np.uint8)


def move_object(rng, source, area, distance):
    """`source` (H, W, 3) turned, enlarged and shifted: what lies `distance` (dx, dy; pixels) away comes to `area`."""
    moments = cv2.moments(area, binaryImage=True)
    centre = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    turn = rng.uniform(8, 40) * rng.choice([-1, 1])
    matrix = cv2.getRotationMatrix2D((centre[0] + distance[0], centre[1] + distance[1]), turn, rng.uniform(1.1, 1.8))
    matrix[:, 2] -= distance
    return cv2.warpAffine(source, matrix, area.shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def splice(rng, host, regions):
    """Paste an object from another view of the photographs; returns picture and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.04, 0.22)
    views = [crop_photograph(rng, regions[rng.integers(len(regions))], host.shape[:2]) for _ in range(4)]
    donor = max(views, key=lambda view: view[area == 1].std())  # an object, rather than sky
    donor = compress_jpeg(add_sensor_noise(rng, donor, 0.8), int(rng.integers(40, 76)))
    patch = move_object(rng, donor, area, (0, 0)).astype(np.float32)
    # as a forger would, bring the object's brightness and colour nearer to those of the place
    patch += rng.uniform(0.2, 0.6) * np.subtract(cv2.mean(host, area), cv2.mean(patch, area))[:3]
    return blend(rng, host, patch.clip(0, 255), area)


def copy_move(rng, host, regions):
    """Copy an object of the picture to another place of it; returns picture and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.04, 0.18)
    height, width = area.shape
    patches = []
    for angle in rng.uniform(0, 2 * np.pi, 4):
        distance = rng.uniform(0.35, 0.6) * width * np.cos(angle), rng.uniform(0.35, 0.6) * height * np.sin(angle)
        patches.append(move_object(rng, host, area, distance))
    patch = max(patches, key=lambda candidate: candidate[area == 1].std())  # an object, rather than sky
    return blend(rng, host, patch, area)


def inpaint_object(rng, host, regions):
    """Remove what lies in an area by inpainting; returns picture and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.03, 0.12)
    hole = cv2.dilate(area, np.ones((7, 7), np.uint8))
    method = [cv2.INPAINT_TELEA, cv2.INPAINT_NS][rng.integers(2)]
    return blend(rng, host, cv2.inpaint(host, hole, INPAINT_RADIUS, method), area)


DEMO_MANIPULATIONS = {"splicing": splice, "copymove": copy_move, "inpainting": inpaint_object}


def make_demo_picture(rng, regions, kind):
    """One picture of a demo set: JPEG bytes, and its mask (H, W), uint8 0/1 (None for "authentic")."""
    shape = DEMO_SIDES[rng.integers(len(DEMO_SIDES))]
    host = crop_photograph(rng, regions[rng.integers(len(regions))], shape)
    picture = compress_jpeg(add_sensor_noise(rng, host, rng.uniform(4, 7)), int(rng.integers(85, 99)))
    mask = None
    if kind != "authentic":
        picture, mask = DEMO_MANIPULATIONS[kind](rng, picture, regions)
    return encode_jpeg(picture, int(rng.integers(70, 99))), mask


def make_demo_set(output, name, regions, count, seed):
    """Write `count` pictures of the demo set `name` to `output`/`name`/{Tp,Gt,Au}; returns the JSON's list of pairs."""
    pairs = []
    for folder in ("Tp", "Gt", "Au"):
        (output / name / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        kind = DEMO_SETS[name][index % len(DEMO_SETS[name])]
        rng = np.random.default_rng([seed, list(DEMO_SETS).index(name), index])
        jpeg, mask = make_demo_picture(rng, regions, kind)
        picture_path = f"{name}/{'Au' if mask is None else 'Tp'}/{kind}_{index:04d}.jpg"
        mask_path = "Negative" if mask is None else f"{name}/Gt/{kind}_{index:04d}_gt.png"
        (output / picture_path).write_bytes(jpeg.tobytes())
        if mask is not None:
            (output / mask_path).write_bytes(cv2.imencode(".png", mask * 255)[1].tobytes())
        pairs.append([picture_path, mask_path])
    return pairs


def prepare_demo_folder(output):
    """Make the folder `output` (a Path) ready: new, empty, or cleared of what an earlier run of the demo wrote.

    Raises UserError when it holds anything that the demo did not make.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: this is a file; give the name of a new folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / DEMO_MARKER).is_file():
        raise UserError(f"--output {output}: the folder holds files that `data.py demo` did not make (it has no "
                        f"{DEMO_MARKER}); give a new or empty folder.")
    output.mkdir(parents=True, exist_ok=True)
    for name, kinds in DEMO_SETS.items():
        (output / f"{name}.json").unlink(missing_ok=True)
        for kind in kinds:
            for path in (output / name).glob(f"*/{kind}_*"):
                path.unlink()
    (output / "test_datasets.json").unlink(missing_ok=True)


def make_demo(output, seed=42, train=300, test=40):
    """Write the demo data set: `train` pictures for training and `test` for each of two test sets.

    Splicing, copy-move, inpainting and authentic pictures (JPEG, masks PNG 0/255) from scikit-learn's two photographs;
    training uses the left part of both, testing the right part. The same seed gives the same bytes.

    Args:
        output: folder to write; must be new, empty or an earlier output of this function
        seed: whole number from 0
        train, test: numbers of pictures, at least 5

    Returns:
        dict: name of the set -> path of its JSON, the training set first

    Raises:
        UserError: see `prepare_demo_folder`; counts too small; a folder that cannot be written
    """
    for flag, value, least in (("--train", train, 5), ("--test", test, 5), ("--seed", seed, 0)):
        if value < least:
            raise UserError(f"{flag} {value}: too small; give at least {least}.")
    output = Path(output)
    photographs = demo_photographs()
    try:
        prepare_demo_folder(output)
        settings = {"made_by": "python data.py demo", "seed": seed, "train": train, "test": test}
        (output / DEMO_MARKER).write_text(json.dumps(settings) + "\n")
        paths = {}
        for name in DEMO_SETS:
            count = train if name == "train" else test
            pairs = make_demo_set(output, name, demo_regions(photographs, name), count, seed)
            paths[name] = output / f"{name}.json"
            paths[name].write_text("[\n" + ",\n".join(json.dumps(pair) for pair in pairs) + "\n]\n")
        test_sets = {name.removeprefix("test_"): f"{name}.json" for name in DEMO_SETS if name != "train"}
        (output / "test_datasets.json").write_text(json.dumps(test_sets, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error}); name a writable folder.") from error
    return paths


def tampered_fractions(json_path):
    """Tampered fraction (0..1) of each tampered picture of a JSON list of [image, mask | "Negative"] pairs."""
    folder = Path(json_path).parent
    masks = [mask for _, mask in json.loads(Path(json_path).read_text()) if mask != "Negative"]
    return [float((cv2.imread(str(folder / mask), cv2.IMREAD_GRAYSCALE) > 127).mean()) for mask in masks]


def constant_prediction_f1(json_path):
    """Pixel-level F1 of the best constant prediction, "all is tampered", on a JSON list of [image, mask | "Negative"].

    With a the tampered fraction of a picture its precision is a and its recall 1: the mean of 2a / (1 + a) over the
    tampered pictures. (F1 of an authentic picture is undefined.)
    """
    return float(np.mean([2 * a / (1 + a) for a in tampered_fractions(json_path)]))


def demo(args):
    """`python data.py demo`: make the demo data and print what it holds."""
    for name, path in make_demo(args.output, args.seed, args.train, args.test).items():
        fractions = tampered_fractions(path)
        count = len(json.loads(path.read_text()))
        line = f"{path}: {count} pictures, {len(fractions)} tampered, tampered fraction {np.mean(fractions):.3f}"
        if name != "train":
            line += f", pixel-level F1 of predicting everything tampered: {constant_prediction_f1(path):.2f}"
        print(line)


def add_demo_arguments(parser):
    """The flags of `python data.py demo`."""
    parser.add_argument("--output", required=True, help="folder to write; new, empty or an earlier demo's")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same files (default 42)")
    parser.add_argument("--train", type=int, default=300, help="pictures to train on (default 300)")
    parser.add_argument("--test", type=int, default=40, help="pictures in each of the two test sets (default 40)")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: public sets whose names, folders or mask colours ask for knowledge
#
# A recipe is a few regular expressions on the path below --root, and pictures belong to the mask with the same `key`.
# They search from any folder on, so an archive may have been unpacked into a doubled folder.

SetFiles = namedtuple("SetFiles", "pairs authentic images_left masks_left")  # paths relative to the root


def green_is_tampered(pixels):
    """Columbia's edge masks, RGB (H, W, 3) -> bool (H, W): both greens, and half of the JPEG blends with red."""
    return (pixels[..., 1] > pixels[..., 0]) & (pixels[..., 1] > 100)


def black_is_tampered(pixels):
    """Inverted masks, RGB (H, W, 3) -> bool (H, W): where the mean of the channels is below 127.5."""
    return pixels.sum(axis=2, dtype=np.uint16) <= 382


def nonzero_is_tampered(pixels):
    """Soft or 0/1 masks, RGB (H, W, 3) -> bool (H, W): where any channel is above 0."""
    return pixels.any(axis=2)


@dataclass
class Recipe:
    """What belongs to what in one public set, by name, and how its masks become binary."""

    title: str
    layout: str  # where the files lie below --root, for the message when none are found
    tampered: str = ""  # regular expression with the group `key`; upper and lower case alike
    mask: str = ""  # likewise
    authentic: str = ""  # regular expression
    table: str = ""  # instead of these three: regular expression of the table that names the pairs
    expected: tuple = ()  # published numbers: tampered pictures with a mask, authentic ones, masks (None: unknown)
    says: tuple = ()  # what the recipe chose or assumed, printed
    binary: Optional[Callable] = None  # RGB (H, W, 3) -> bool (H, W); None: the loader's "mean > 127.5" is right
    shared: bool = False  # one mask serves several pictures
    by_number: bool = False  # the key is a number in the name, and the rest of the name may differ
    without_mask: str = ""  # pictures that were published without a mask

    def find(self, root):
        """Return the SetFiles of the copy of the set below `root`."""
        if self.table:
            return self.find_by_table(root)
        paths = list_pictures(root)
        groups = {}
        for side, pattern in enumerate((self.tampered, self.mask)):
            for path in paths:
                match = re.search(pattern, path, re.IGNORECASE)
                if match:
                    groups.setdefault(match["key"].casefold(), ([], []))[side].append(path)
        for images, masks in groups.values():
            if len(masks) > 1 or (len(images) > 1 and not self.shared):
                raise UserError(f"{', '.join(images + masks)}: more than one picture and one mask of one name or "
                                f"number; keep one copy of {self.title} below --root.")
        pairs = [(image, mask) for images, masks in groups.values() for mask in masks for image in images]
        return SetFiles(sorted(pairs), [path for path in paths if re.search(self.authentic, path, re.IGNORECASE)],
                        [path for images, masks in groups.values() if not masks for path in images],
                        [path for images, masks in groups.values() if not images for path in masks])

    def find_by_table(self, root):
        """Return the SetFiles that the set's table names; what it names and the disk lacks stands among those left."""
        tables = [path for path in list_files(root, {".csv"}) if re.search(self.table, path, re.IGNORECASE)]
        if len(tables) != 1:
            raise UserError(f"--root {root}: {len(tables) or 'no'} tables of pairs {' '.join(tables)}; give the "
                            f"folder of one copy of {self.title} ({self.layout}).")
        base = tables[0][:tables[0].lower().rindex("reference/")]
        on_disk = {path.casefold(): path for path in list_pictures(root)}
        files = SetFiles([], [], [], [])
        for is_target, *names in read_pair_table(os.path.join(root, tables[0])):
            image, mask = (on_disk.get((base + name).casefold()) for name in names)
            if is_target.upper() != "Y":
                files.authentic.extend([image] if image else [])
            elif image and mask:
                files.pairs.append((image, mask))
            else:
                files.images_left.append(f"{names[0]} with {names[1]} ({'mask' if image else 'picture'} not there)")
        return files


def read_pair_table(path):
    """Return [(IsTarget, picture, mask)] of a NIST table by the header's names, old or new, with "|" or "," between."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.read().splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy this table anew.") from None
    rows = list(csv.reader(lines, delimiter="|" if lines[0].count("|") > lines[0].count(",") else ","))
    header = [name.strip().lower() for name in rows[0]]
    names = "istarget", "probefilename", "imgfname", "probemaskfilename", "maskfname"
    columns = [header.index(name) for name in names if name in header]
    if len(columns) != 3:
        raise UserError(f"{path}: the header lacks IsTarget, ProbeFileName or ProbeMaskFileName ({lines[0][:80]}); "
                        "copy this table anew.")
    return [tuple(row[column].strip().replace("\\", "/") for column in columns)
            for row in rows[1:] if len(row) == len(header)]


def autosplice(quality):
    """Return the recipe for one of the three JPEG qualities in which AutoSplice holds the same forgeries."""
    return Recipe(
        f"AutoSplice JPEG {quality}", f"Forged_JPEG{quality}/<id>_<k>.jpg, Mask/<id>_mask.png, Authentic/<id>.jpg",
        tampered=rf"(?:^|/)Forged_JPEG{quality}/(?:.*/)?(?P<key>[^/]+)_\d+\.jpe?g$",
        mask=r"(?:^|/)Mask/(?:.*/)?(?P<key>[^/]+)_mask\.png$", authentic=r"(?:^|/)Authentic/(?:.*/)?[^/]+\.jpe?g$",
        expected=(3621, 2273, None), binary=nonzero_is_tampered, shared=True,
        says=(f"pictures of Forged_JPEG{quality}; recipes autosplice, autosplice90 and autosplice75 give the same "
              "forgeries in three qualities, never split them over training and test",
              "masks: tampered where any channel is above 0; one mask serves all edits of a picture",
              "assumed (unverified): an all-white mask is right, the whole picture is generated then"))


RECIPES = {
    "columbia": Recipe(
        "Columbia", "4cam_splc/*.tif, 4cam_splc/edgemask/*_edgemask.jpg, 4cam_auth/*.tif",
        tampered=r"(?:^|/)4cam_splc/(?:4cam_splc/)?(?P<key>[^/]+)\.(?:tiff?|bmp)$",
        mask=r"(?:^|/)4cam_splc/(?:.*/)?(?P<key>[^/]+)_edgemask\.[^./]+$",
        authentic=r"(?:^|/)4cam_auth/(?:4cam_auth/)?[^/]+\.(?:tiff?|bmp)$",
        expected=(180, 183, 180), binary=green_is_tampered,
        says=("masks: green (G > R and G > 100) is the spliced region and red the host; some scripts take red instead",
              "the masks *_edgemask_3 with a blue band of unknown pixels are not used")),
    "coverage": Recipe(
        "COVERAGE", "image/<n>t.tif, mask/<n>forged.tif, image/<n>.tif",
        tampered=r"(?:^|/)(?P<key>\d+)t\.tiff?$", mask=r"(?:^|/)(?P<key>\d+)forged\.tiff?$",
        authentic=r"(?:^|/)\d+\.tiff?$", expected=(100, 100, 100),
        says=("masks: <n>forged.tif as they are, white is tampered; <n>copy.tif and <n>paste.tif are no ground truth",
              "in copies from before 27 Sep 2017 some tampered and authentic pictures are exchanged")),
    "nist16": Recipe(
        "NIST16", "reference/manipulation/NC2016-manipulation-ref.csv and the files that it names",
        table=r"(?:^|/)reference/manipulation/[^/]*manipulation-ref\.csv$",
        expected=(564, 560, 282), binary=black_is_tampered, shared=True,
        says=("pairs: the manipulation table alone, it holds the splices and removals too",
              "masks: inverted, black is tampered; each serves two pictures",
              "the pictures come from 69 base pictures, so training and test pictures of a random split are related")),
    "casia1": Recipe(
        "CASIAv1", "Tp/{CM,Sp}/Sp_*.jpg, any folder with Sp_*_gt.png, Au_*.jpg",
        tampered=r"^(?!(?:.*/)?Au/)(?:.*/)?Sp_[^/]*[_.](?P<key>\d{4})\.[^./]+$",
        mask=r"(?:^|/)Sp_[^/]*[_.](?P<key>\d{4})_gt3?\.[^./]+$", authentic=r"(?:^|/)Au_[a-z]+_\d{4}\.[^./]+$",
        expected=(920, 800, 920), by_number=True, without_mask=r"_0542\.[^./]+$",
        says=("masks: as they are, found by the 4-digit number that ends the picture's name",
              "its authentic pictures are in CASIAv2 too: no image-level result on them after training there")),
    "casia2": Recipe(
        "CASIAv2", "Tp/Tp_*.{jpg,tif}, any folder with Tp_*_gt.png, Au/Au_*.{jpg,bmp}",
        tampered=r"^(?!(?:.*/)?Au/)(?:.*/)?Tp_[^/]*[_.](?P<key>\d{5})\.[^./]+$",
        mask=r"(?:^|/)Tp_[^/]*[_.](?P<key>\d{5})_gt3?\.[^./]+$", authentic=r"(?:^|/)Au_[a-z]+_\d{5}\.[^./]+$",
        expected=(5123, 7491, 5123), by_number=True,
        says=("masks: as they are, found by the 5-digit number that ends the picture's name and never changed",
              "assumed (unverified): masks hold nothing but 0 and 255")),
    "imd2020": Recipe(
        "IMD2020", "<folder>/<name>.{jpg,png}, <folder>/<name>_mask.png, <folder>/*_orig.jpg",
        tampered=r"^(?!(?:.*/)?0jpg/)(?P<key>.+)(?<!_orig)(?<!_mask)\.(?:jpe?g|png)$",
        mask=r"^(?!(?:.*/)?0jpg/)(?P<key>.+)_mask\.png$", authentic=r"^(?!(?:.*/)?0jpg/).+_orig\.(?:jpe?g|png)$",
        expected=(2010, 414, 2010), binary=nonzero_is_tampered,
        says=("masks: tampered where any channel is above 0, as in CAT-Net and TruFor; above 127 would move soft edges",
              "assumed (unverified): outside of the tampered region the masks are exactly 0")),
    "dso1": Recipe(
        "DSO-1", "DSO-1/splicing-<n>.png, DSO-1-Fake-Images-Masks/splicing-<n>.png, DSO-1/normal-<n>.png",
        tampered=r"(?:^|/)DSO-1/(?:DSO-1/)?(?P<key>splicing-\d+)\.png$",
        mask=r"(?:^|/)DSO-1-Fake-Images-Masks/(?:.*/)?(?P<key>splicing-\d+)\.png$",
        authentic=r"(?:^|/)DSO-1/(?:DSO-1/)?normal-\d+\.png$", expected=(100, 100, 100), binary=black_is_tampered,
        says=("masks: inverted, black is tampered",
              "assumed (unverified): gray values, if there are any, are split in the middle")),
    "autosplice": autosplice(100), "autosplice90": autosplice(90), "autosplice75": autosplice(75),
}


# ---------------------------------------------------------------------------------------------------------------------
# python data.py pairs

LISTED = 20  # a longer list is cut on the screen and written to a text file


def add_pairs_arguments(parser):
    """Add the flags of `pairs`."""
    add = parser.add_argument
    add("--image_root", help="folder of the tampered pictures (with all folders below)")
    add("--mask_root", help="folder of their masks; the same folder when they lie beside the pictures")
    add("--authentic_root", help='folder of authentic pictures, listed as "Negative" (default: none)')
    add("--recipe", metavar="NAME", choices=RECIPES, help=f"instead: rules for a public set, {', '.join(RECIPES)}")
    add("--root", help="with --recipe: the set's own folder")
    add("--mask_output", help="with --recipe: folder for masks that have to be converted to 0/255 (default: "
        "<output>_masks beside the JSON)")
    add("--tampered_only", action="store_true", help="with --recipe: leave the authentic pictures out")
    add("--output", required=True, help='JSON to write, a list of [image, mask or "Negative"]')
    add("--skip_unpaired", action="store_true", help="leave out pictures without mask and masks without picture "
        "(otherwise they are listed and nothing is written)")
    add("--overwrite", action="store_true", help="replace an existing --output and its converted masks")


def run_pairs(args):
    """Run `python data.py pairs`: find the pairs, show them, write the JSON. Raises UserError."""
    needed, extra = {"image_root", "mask_root"}, {"authentic_root"}
    if args.recipe:
        needed, extra = {"root"}, {"mask_output", "tampered_only"}
    given = {flag for flag in ("image_root", "mask_root", "authentic_root", "root", "mask_output", "tampered_only")
             if getattr(args, flag)}
    wrong = [f"--{flag} is missing" for flag in sorted(needed - given)]
    wrong += [f"--{flag} does not belong here" for flag in sorted(given - needed - extra)]
    if wrong:
        raise UserError(f"{' and '.join(wrong)}: give --image_root and --mask_root [--authentic_root], or --recipe and "
                        "--root [--mask_output --tampered_only].")
    if not args.output.lower().endswith(".json") or os.path.isdir(args.output):
        raise UserError(f"--output {args.output}: give a file name that ends in .json.")
    if os.path.exists(args.output) and not args.overwrite:
        raise UserError(f"--output {args.output} exists: give another name or --overwrite.")
    tampered, authentic = pairs_of_recipe(args) if args.recipe else pairs_of_folders(args)
    folder = os.path.dirname(os.path.abspath(args.output))
    rows = [[path_for_json(image, folder), path_for_json(mask, folder)] for image, mask in tampered]
    rows += [[path_for_json(image, folder), "Negative"] for image in authentic]
    write_file(args.output, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
    for i in sorted({*range(len(tampered))[:3], *range(len(tampered))[-3:]}):
        print(f"  pair {i + 1}: {rows[i][0]} with {rows[i][1]}")
    print(f"{args.output}: {len(tampered)} tampered and {len(authentic)} authentic pictures; "
          f"`python data.py check {args.output}` looks into all files.")


def pairs_of_folders(args):
    """Return ([(image, mask)], [authentic]) of --image_root, --mask_root, --authentic_root; paths with their roots."""
    roots = {flag: getattr(args, flag) for flag in ("image_root", "mask_root", "authentic_root") if getattr(args, flag)}
    real = {flag: os.path.realpath(root) for flag, root in roots.items()}
    absolute = {flag: os.path.abspath(root) for flag, root in roots.items()}
    pictures = {}
    for flag, root in roots.items():
        inner = tuple(path_for_json(other, full[flag]) + "/" for full in (real, absolute) for other in full.values()
                      if other != full[flag] and is_inside(other, full[flag]))
        pictures[flag] = [path for path in list_pictures(root) if not path.startswith(inner)]
        if not pictures[flag]:
            raise UserError(f"--{flag} {root}: no picture in it or below ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    if real.get("authentic_root") in (real["image_root"], real["mask_root"]):
        raise UserError(f"--authentic_root {args.authentic_root}: is also --image_root or --mask_root; give the folder "
                        "of the authentic pictures alone.")
    images, masks = pictures["image_root"], pictures["mask_root"]
    if real["image_root"] == real["mask_root"]:
        stems = {"".join(split_stem(path)).casefold() for path in images}
        masks = [path for path in images if is_mask_beside(path, stems)]
        images = sorted({*images}.difference(masks))
    pairs, *left = pair_by_name(images, masks)
    refuse_unpaired(args, SetFiles(pairs, [], *left), "no picture and mask agree in name (stem, suffix such as _gt)")
    return ([(os.path.join(args.image_root, image), os.path.join(args.mask_root, mask)) for image, mask in pairs],
            [os.path.join(args.authentic_root, path) for path in pictures.get("authentic_root", ())])


def is_mask_beside(path, stems):
    """Tell whether a file is the mask of another one in its folder: its stem is that one's plus a suffix."""
    stem = "".join(split_stem(path)).casefold()
    bare = MASK_SUFFIX.sub("", stem)
    return bare != stem and bare in stems


def pairs_of_recipe(args):
    """Return ([(image, mask)], [authentic]) of the public set below --root; write the masks that need conversion."""
    recipe = RECIPES[args.recipe]
    title, mask_output = recipe.title, args.mask_output or os.path.splitext(args.output)[0] + "_masks"
    if recipe.binary:
        check_mask_output(mask_output, args.root, args.overwrite)
    files = recipe.find(args.root)
    nothing = f"--root {args.root} holds no {title} ({recipe.layout})"
    if not files.pairs and not files.images_left:
        raise UserError(f"{nothing}; give the set's own folder.")
    if args.tampered_only:
        files.authentic.clear()
    for line in recipe.says:
        print(f"{title}: {line}")
    for path in [path for path in files.images_left if recipe.without_mask and re.search(recipe.without_mask, path)]:
        print(f"{title}: {path} was published without a mask and is left out")
        files.images_left.remove(path)
    renamed = sum(split_stem(os.path.basename(image))[1] != MASK_SUFFIX.sub("", split_stem(os.path.basename(mask))[1])
                  for image, mask in files.pairs)
    if recipe.by_number and renamed:
        print(f"{title}: {renamed} pairs agree in their number only, one side has another generation of names")
    found = len(files.pairs), len(files.authentic), len({mask for _, mask in files.pairs})
    kinds = "tampered pictures with a mask", "authentic pictures", "masks"
    for what, expected, number in zip(kinds, recipe.expected, found):
        if expected not in (None, number) and not (args.tampered_only and number == 0):
            print(f"warning: {title}: expected {expected} {what}, found {number}; this is not the whole published set")
    refuse_unpaired(args, files, nothing)
    pairs = [(os.path.join(args.root, image), os.path.join(args.root, mask))
             for image, mask in drop_unequal_sizes(args, files.pairs)]
    if recipe.binary:
        pairs = convert_masks(pairs, args.root, mask_output, recipe.binary)
    return pairs, [os.path.join(args.root, path) for path in files.authentic]


def refuse_unpaired(args, files, no_pair):
    """List what has no partner; UserError if there is any, unless --skip_unpaired, and if there is no pair at all."""
    lists = ("pictures without a mask", files.images_left), ("masks without a picture", files.masks_left)
    for title, paths in lists:
        print_list(title, paths, args.output)
    if not files.pairs:
        raise UserError(f"{no_pair}; nothing was written.")
    if any(paths for _, paths in lists) and not args.skip_unpaired:
        raise UserError(f"{' and '.join(f'{title} ({len(paths)})' for title, paths in lists if paths)}, listed above, "
                        "so nothing was written: mend that, or leave them out with --skip_unpaired.")


def print_list(title, paths, output):
    """Print a list of names; a long one is cut, and written in full beside the output."""
    if paths:
        print("\n  ".join([f"{title} ({len(paths)}):", *paths[:LISTED]]))
    if len(paths) > LISTED:
        full = f"{os.path.splitext(output)[0]}_{title.replace(' ', '_')}.txt"
        write_file(full, "\n".join([*paths, ""]).encode("utf-8", "surrogateescape"))
        print(f"  ... all {len(paths)} are in {full}")


def drop_unequal_sizes(args, pairs):
    """Return the pairs of which picture and mask have the same size by their headers; the others are named."""
    good, bad = [], []
    for pair in pairs:
        image, mask = (os.path.join(args.root, path) for path in pair)
        size, mask_size = header_size(image), header_size(mask)
        if size and mask_size and (size == mask_size or header_size(image, turn=True) == mask_size):
            good.append(pair)
        else:
            texts = ["x".join(map(str, side)) if side else "unreadable" for side in (size, mask_size)]
            bad.append(f"{pair[0]} {texts[0]}, {pair[1]} {texts[1]}")
    print_list("pairs left out, sizes differ or unreadable", bad, args.output)
    if not good:
        raise UserError(f"--root {args.root}: no picture has the size of its mask; nothing was written, copy it anew.")
    return good


def header_size(path, turn=False):
    """Return (height, width) without decoding, with `turn` after the turn that EXIF asks for; None for no picture."""
    try:
        with warnings.catch_warnings():  # Pillow warns of more than 89 megapixels, which are all right here
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                turned = turn and picture.getexif().get(0x0112, 1) in range(5, 9)
                return picture.size if turned else picture.size[::-1]
    except Exception:  # PIL raises many types; each means that this is no picture
        return None


def check_mask_output(mask_output, root, overwrite):
    """Raise UserError where converted masks would go into the source or between other files."""
    target, source = os.path.realpath(mask_output), os.path.realpath(root)
    if is_inside(target, source) or is_inside(source, target):
        raise UserError(f"{mask_output}: converted masks would mix with --root {root}; give an --output or "
                        "--mask_output outside of it.")
    if os.path.isdir(mask_output) and os.listdir(mask_output) and not overwrite:
        raise UserError(f"{mask_output}: converted masks go here, but it is not empty; give --overwrite or another "
                        "--mask_output.")


def convert_masks(pairs, root, mask_output, binary):
    """Write each mask as a 0/255 PNG below `mask_output`, in the same tree, and return the pairs with the new masks."""
    targets = {mask: os.path.join(mask_output, os.path.splitext(os.path.relpath(mask, root))[0] + ".png")
               for _, mask in pairs}

    def convert(mask):
        write_file(targets[mask], cv2.imencode(".png", binary(read_image(mask)).astype(np.uint8) * 255)[1].tobytes())

    print(f"converting {len(targets)} masks to 0/255 PNG files in {mask_output} (--root is not changed)", flush=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(convert, targets))
    return [(image, targets[mask]) for image, mask in pairs]


def is_inside(path, folder):
    """Tell whether a path is `folder` or lies below it; both absolute."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def path_for_json(path, folder):
    """Return a path relative to the JSON's folder, with "/", if the file lies below it, else the absolute path."""
    path = os.path.abspath(path)
    return path[len(folder.rstrip(os.sep)) + 1:].replace(os.sep, "/") if is_inside(path, folder) else path


def write_file(path, data):
    """Write bytes by way of a temporary file, so that nobody meets half a file; makes the folder. Raises UserError."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"{path}: can't be written ({error.strerror}); give a place where you may write.") from None


# ---------------------------------------------------------------------------------------------------------------------
# check: every fault of a dataset, before a run meets it

FAULT, REMARK = "fault", "remark"  # a fault would break or falsify a run, a remark is only odd
Finding = collections.namedtuple("Finding", "kind severity files text")  # `files` are paths, `text` is one sentence

# One set of pictures: `masks` hold "" for none; `roles` 1 tampered, 0 authentic, -1 not known (a plain folder). Sets
# with different `group` must not share pictures (one may train, the other test); parts of a BalancedDataset do.
CheckedSet = collections.namedtuple("CheckedSet", "name path group images masks roles")

# What is kept of each picture: size (0 = unreadable), tampered share of the mask (nan = no mask), JPEG quality (0 = no
# JPEG), whether the sizes of picture and mask agree (1, -1, 0 = not known), digests of the file and of the binary mask
# (0 = none), perceptual hash.
RECORD = np.dtype([("height", "i4"), ("width", "i4"), ("area", "f4"), ("quality", "i2"), ("agree", "i1"),
                   ("digest", "u8"), ("mask_digest", "u8"), ("hash", "u8", 4)])

# The perceptual hash: of the 256 lowest frequencies (lowest first) of a 64 x 64 DCT without the mean, those above NOISE
# are the bits set. Measured on CASIA v1 and cells of photographs: JPEG quality 70 with 10 % resizing changes up to 10 %
# of the bits set in either (nearest-neighbour resizing up to 30 %), other pictures differ in more than half of them.
FREQUENCIES = tuple(np.array(sorted(np.ndindex(24, 24), key=lambda f: (sum(f), f))[1:257]).T)
NOISE = 15.0           # what compression changes in a coefficient; without it the hash of a smooth picture is noise
ENOUGH_BITS = 16       # a picture with fewer bits set (clear sky) is too flat to be compared
HASH_DIFFERENCE = 0.3  # share of differing bits up to which a pair is worth comparing
SAME_SCENE = 0.9       # correlation of the 64 x 64 thumbnails from which two pictures show the same scene
# Grey levels, mean over 3 x 3 pixels of the thumbnails, below which nothing was edited: 8 after JPEG quality 70 with
# 10 % resizing (26 with nearest-neighbour resizing), 34 by the mildest tampering of 24 CASIA v1 pictures.
LOCAL_CHANGE = 24.0

LUMINANCE_50 = np.array([  # the quantisation table of quality 50, ISO/IEC 10918-1, table K.1
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99])
SCALES = [5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)]
QUALITY_SUMS = np.array([np.clip((LUMINANCE_50 * scale + 50) // 100, 1, 255).sum() for scale in SCALES])


def fault(kind, files, text):
    """A Finding that makes the command fail."""
    return Finding(kind, FAULT, files, text)


def remark(kind, files, text):
    """A Finding that does not."""
    return Finding(kind, REMARK, files, text)


def run_parallel(pool, workers, function, jobs, total, label):
    """Yield function(job) for every job in order, with progress on standard error; few jobs wait in memory."""
    jobs, waiting, done, shown = iter(jobs), collections.deque(), 0, time.time()
    start = shown
    while True:
        while len(waiting) < 4 * workers and (chunk := list(itertools.islice(jobs, 16))):
            waiting.append(pool.submit(call_each, function, chunk))
        if not waiting:
            break
        try:
            results = waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"{label}: a worker process died after {done} of {total} pictures, for lack of memory or "
                            "by a decoder's crash; give it fewer pictures at a time to find the one.") from None
        done += len(results)
        yield from results
        if time.time() - shown > (0.5 if sys.stderr.isatty() else 10) or (done == total and sys.stderr.isatty()):
            shown = time.time()
            print(f"{label}: {done} of {total}, {done / (shown - start):.0f} a second", file=sys.stderr, flush=True,
                  end="\r" if sys.stderr.isatty() and done < total else "\n")


def call_each(function, jobs):
    """The work of one task of a pool."""
    return [function(job) for job in jobs]


def start_check_worker(parent):
    """Start a worker process: libraries are quiet, and it ends when its parent is killed (else it would wait)."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    warnings.simplefilter("ignore")
    cv2.setNumThreads(0)
    Image.MAX_IMAGE_PIXELS = None
    threading.Thread(target=watch, daemon=True).start()


def truncation(data):
    """Return how a file (bytes) ends too early, or None. Decoders fill what is missing with grey and say nothing."""
    if data[:2] == b"\xff\xd8":
        position = 2
        while position + 4 <= len(data):
            if data[position + 1] == 0xDA:  # the picture's own data; an end marker before it is an EXIF thumbnail's
                return None if data.find(b"\xff\xd9", position) >= 0 else "the JPEG has no end marker (EOI)"
            position += 1 if data[position + 1] == 0xFF else 2 + int.from_bytes(data[position + 2:position + 4], "big")
        return "the JPEG ends in its header"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        position = 8
        while position + 8 <= len(data):
            if data[position + 4:position + 8] == b"IEND":
                return None
            position += 12 + int.from_bytes(data[position:position + 4], "big")
        return "the PNG has no end chunk (IEND)"
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception as error:  # PIL raises many types; what it can't read for other reasons is left to the reader
        return f"the file ends early ({error})" if "truncated" in str(error) else None


def open_checked(path, flags, mode, found):
    """Return (pixels, PIL picture with the header, bytes), or None after adding the finding that says why not."""
    try:
        data = read_bytes(path)
    except UserError as error:
        empty = os.path.isfile(path) and not os.path.getsize(path)
        kind = "empty file" if empty else "unreadable file" if os.path.exists(path) else "missing file"
        found.append(fault(kind, [path], str(error)))
        return None
    content = data.tobytes()
    if early := truncation(content):
        found.append(fault("truncated file", [path], f"{early}: copy it anew or take it out."))
        return None
    try:
        return decode(path, data, flags | cv2.IMREAD_IGNORE_ORIENTATION, mode), Image.open(io.BytesIO(content)), content
    except (UserError, OSError) as error:
        found.append(fault("unreadable file", [path], str(error)))
        return None


def small_digest(content):
    """A 64-bit digest, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def thumbnail(pixels):
    """(64, 64) float32 grey of an RGB picture."""
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)


def perceptual_hash(small):
    """The hash of a thumbnail as 4 words of 64 bits."""
    return np.packbits(cv2.dct(small)[FREQUENCIES] > NOISE).view(np.uint64)


def orientation_of(header):
    """The EXIF orientation of an opened picture, 1 (as stored) to 8."""
    try:
        value = header.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF raises many types
        return 1
    return value if value in range(1, 9) else 1


def inspect_sizes(image, mask, shape, mask_shape, orientation, found):
    """Compare the sizes of a pair (mask_shape None: no mask), stored and turned by EXIF; returns RECORD's `agree`."""
    swapped = orientation > 4 and shape[0] != shape[1]
    agree = 0 if mask_shape is None else 1 if mask_shape == shape or (swapped and mask_shape == shape[::-1]) else -1
    if agree < 0:
        ratios = mask_shape[0] / shape[0], mask_shape[1] / shape[1]
        why = ("; the mask is turned by 90 degrees" if mask_shape == shape[::-1] else
               f"; the mask is scaled by {ratios[0]:.3g}" if abs(ratios[0] - ratios[1]) < 0.01 else "")
        found.append(fault("sizes differ", [image, mask], f"the picture is {shape[0]}x{shape[1]} (height x width), its "
                           f"mask {mask_shape[0]}x{mask_shape[1]}{why}."))
    elif orientation > 1:
        text = ("has no mask that could tell, so it is loaded as stored" if agree == 0 else
                "keeps its size, so sizes can't tell: loaded as stored, look at it" if not swapped else
                "is not applied, since the mask fits the picture as stored" if mask_shape == shape else
                "is applied when loading, since only the turned picture fits the mask")
        found.append(remark("EXIF orientation", [image], f"the EXIF orientation {orientation} {text}."))
    return agree


def inspect_mask(path, grey, binary, palette, found):
    """Judge a tampered picture's mask: `grey` levels as stored, `binary` as loaded, `palette` whether it has one."""
    brightest = int(grey.max())
    if not binary.any():
        kind, text = (("mask all black", "no pixel is marked as tampered") if brightest == 0 else
                      ("palette mask", "its palette's colours are too dark (below 127.5)") if palette else
                      ("mask 0/1", "it holds 0 and 1 instead of 0 and 255") if brightest == 1 else
                      ("mask too dark", f"the brightest grey is {brightest}, and no mean of the channels above 127.5"))
        found.append(fault(kind, [path], f"{text}, so it counts as empty: mend it."))
        return
    if binary.all():
        found.append(fault("mask all white", [path], "every pixel is marked as tampered."))
        return
    if palette:
        found.append(remark("palette mask", [path], "a palette picture; its colours, not its indices, are read."))
    levels = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel()
    between = levels[32:225].sum() / grey.size
    if between > 0.01:
        found.append(remark("grey mask", [path], f"{between:.1%} of the pixels are between 32 and 224."))
    # Large regions are legitimate (CASIA v1 has 70 %), so most of the frame must be white too.
    frame = np.concatenate([binary[0], binary[-1], binary[:, 0], binary[:, -1]]).mean()
    if binary.mean() > 0.5 and frame >= 0.8:
        found.append(remark("inverted-looking mask", [path], f"{binary.mean():.0%} of the mask and {frame:.0%} of its "
                            "border are white: should black be the tampered region?"))


def inspect_pair(job):
    """Decode a picture and its mask; returns (findings, RECORD). `job` is (image, mask or "", crop side or None)."""
    image, mask, image_size = job
    found, record, binary = [], np.zeros((), RECORD), None
    record["area"] = np.nan
    picture = open_checked(image, cv2.IMREAD_COLOR_RGB, "RGB", found)
    opened = open_checked(mask, cv2.IMREAD_GRAYSCALE, "L", found) if mask else None
    if opened:
        grey, header, _ = opened
        try:
            binary = read_mask(mask)
            inspect_mask(mask, grey, binary, header.mode == "P", found)
            record["area"] = binary.mean()
            record["mask_digest"] = small_digest(str(binary.shape).encode() + np.packbits(binary).tobytes())
        except UserError as error:
            found.append(fault("unreadable file", [mask], str(error)))
    if picture:
        pixels, header, content = picture
        shape = pixels.shape[:2]
        record["height"], record["width"] = shape
        record["digest"] = small_digest(content)
        if table := getattr(header, "quantization", None):
            record["quality"] = np.abs(QUALITY_SUMS - sum(next(iter(table.values())))).argmin() + 1
        record["hash"] = perceptual_hash(thumbnail(pixels))
        mask_shape = None if binary is None else binary.shape
        record["agree"] = agree = inspect_sizes(image, mask, shape, mask_shape, orientation_of(header), found)
        if image_size and max(shape) > image_size:
            gone = agree == 1 and binary.any() and not binary[:image_size, :image_size].any()
            found.append(Finding("tampering cropped away" if gone else "cropped", FAULT if gone else REMARK, [image],
                                 f"{shape[0]}x{shape[1]} is cropped to {image_size} by --if_padding" +
                                 (", and the whole tampered region with it." if gone else ".")))
    return found, record


def collect_sets(path, name, group, sets, found):
    """Add the CheckedSets of a dataset of any form to `sets`; what is wrong with the pairing goes to `found`."""
    kind = dataset_kind(path)
    if kind in ("several", "BalancedDataset"):
        content = read_json(path)
        for title, member in content.items() if kind == "several" else content:
            title = f"{name}: {title if kind == 'several' else member}"
            try:
                collect_sets(beside(path, member), title, group + (title,) if kind == "several" else group, sets, found)
            except UserError as error:
                found.append(fault("unusable set", [str(path)], f"{title}: {error}"))
        return
    twin = next((other for other in sets if os.path.realpath(other.path) == os.path.realpath(path)), None)
    if twin:
        text = f"the whole set is given twice, as {twin.name} and as {name}."
        same_group = twin.group == group
        found.append(remark("duplicate", [str(path)], text) if same_group else fault("leak", [str(path)], text))
        return
    if kind == "JsonDataset":
        content = read_json(path)
        images = [beside(path, image) for image, _ in content]
        masks = ["" if mask == "Negative" else beside(path, mask) for _, mask in content]
        roles = [int(mask != "") for mask in masks]
        check_names(name, images, masks, found)
    elif kind == "FolderDataset":
        images = [os.path.join(path, image) for image in list_pictures(path)]
        masks, roles = [""] * len(images), [-1] * len(images)
    else:
        images, masks = mani_pairs(path, name, found)
        roles = [1] * len(images)
    if not images:
        raise UserError(f"{path} holds no picture.")
    sets.append(CheckedSet(name, path, group, images, masks, roles))


def mani_pairs(path, name, found):
    """Pictures and masks of a ManiDataset, paired as the loader does it; the mask "" stands for none."""
    tampered, truth = os.path.join(path, "Tp"), os.path.join(path, "Gt")
    pictures, masks = list_pictures(tampered), list_pictures(truth)
    try:
        pairs, lone_pictures, lone_masks = pair_by_name(pictures, masks)
    except UserError as error:
        found.append(fault("unclear pairs", [str(path)], str(error)))
        pairs, lone_pictures, lone_masks = [(picture, "") for picture in pictures], [], []
    if not pairs and pictures and len(pictures) == len(masks):
        pairs, lone_pictures, lone_masks = list(zip(pictures, masks)), [], []
        found.append(fault("paired by order", [os.path.join(tampered, pictures[0]), os.path.join(truth, masks[0])],
                           f"no name in Gt/ of {name} fits a name in Tp/: the {len(pictures)} pairs agree in nothing "
                           "but their order; rename the masks, or list the pairs in a JSON."))
    for picture in lone_pictures:
        found.append(fault("unpaired file", [os.path.join(tampered, picture)], "a picture in Tp/ without a mask."))
    for mask in lone_masks:
        found.append(fault("unpaired file", [os.path.join(truth, mask)], "a mask in Gt/ without a picture."))
    pairs += [(picture, "") for picture in lone_pictures]
    images = [os.path.join(tampered, picture) for picture, _ in pairs]
    return images, [mask and os.path.join(truth, mask) for _, mask in pairs]


def name_tokens(path):
    """The words and numbers of a file's stem without what only says "mask" or "tampered", to compare a pair's names."""
    words = re.findall(r"[a-z]+|\d+", os.path.splitext(os.path.basename(path))[0].lower())
    idle = ("gt", "mask", "edgemask", "forged", "groundtruth", "msk", "mani", "jpg", "png")
    return tuple(word for word in words if word not in idle)


def check_names(name, images, masks, found):
    """Find pairs of a JSON whose names share nothing while other names of the set do.

    One name must begin with the words of the other (one mask may serve several pictures), or end with _B for _F
    (CoMoFoD). A pair that does not is a fault if another mask of the set carries the picture's name, or if most pairs
    of the same two folders agree; tables of unrelated names (NIST16) are left.
    """
    def agree(pair):
        a, b = map(name_tokens, pair)
        return bool(a and b) and (a[:len(b)] == b or b[:len(a)] == a or (a[-1] == "f" and b == (*a[:-1], "b")))

    def folders(pair):
        return tuple(map(os.path.dirname, pair))

    pairs = [pair for pair in zip(images, masks) if pair[1]]
    odd = [pair for pair in pairs if not agree(pair)]
    if not odd:
        return
    known = {(os.path.dirname(mask), name_tokens(mask)) for mask in masks if mask}
    count, odd_count = (collections.Counter(map(folders, some)) for some in (pairs, odd))
    for pair in odd:
        few = odd_count[folders(pair)] < count[folders(pair)] / 2
        if few or (os.path.dirname(pair[1]), name_tokens(pair[0])) in known:
            found.append(fault("names do not match", list(pair), "the names of this pair share nothing, while others "
                               f"in {name} do: paired by order?"))


def known_bad_key(name):
    """How a file of known_bad.json is recognised: by its stem, names of digits (40574.jpg) by their extension too."""
    folder, _, file = name.lower().rpartition("/")
    stem = os.path.splitext(file)[0]
    return (folder.rpartition("/")[2], stem if re.search("[a-z]", stem) else file)


def find_known_bad(sets, records, found):
    """Add the published faulty files, recognised by name; what this copy has mended or can't show is a remark."""
    published = read_json(Path(__file__).resolve().parent / "runs" / "known_bad.json")
    known = {known_bad_key(entry["name"]): (title, entry) for title, entries in published.items() for entry in entries}
    rows = itertools.chain.from_iterable(zip(part.images, part.masks, part.roles) for part in sets)
    for (image, mask, role), agree in zip(rows, records["agree"]):
        for file in filter(None, (image, mask)):
            key = known_bad_key(file.replace(os.sep, "/"))
            title, entry = known.get(key) or known.get(("", key[1])) or (None, None)
            if not entry:
                continue
            about_size = entry["fault"] == "size_mismatch"
            broken = entry["breaks"] and (agree < 0 if about_size else role >= 0 and not mask)
            text = f"{title}: {entry['text']}.{' The sizes agree in this copy.' if about_size and agree > 0 else ''}"
            found.append((fault if broken else remark)("published faulty file", [file], text))


def near_pairs(hashes, wanted):
    """All pairs (i, j) of hashes (n, 4) uint64 that look alike (HASH_DIFFERENCE), equal one band and pass wanted(i, j).

    A band is 16 bits of neighbouring frequencies, some of them set. Sorting by band instead of comparing all pairs
    takes a second for 100,000 pictures; versions without an equal band are rare, as low frequencies hardly change.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for band in hashes.view(np.uint16).T:
        order = np.argsort(band, kind="stable")
        order = order[band[order] > 0]
        ends = np.searchsorted(band[order], band[order], side="right")
        starts = np.arange(len(order))
        for step in itertools.count(1):  # compare each picture with the step-th after it in its run of equal bands
            starts = starts[starts + step < ends[starts]]
            if not len(starts):
                break
            i, j = order[starts], order[starts + step]
            either = np.bitwise_count(hashes[i] | hashes[j]).sum(axis=1)
            near = np.bitwise_count(hashes[i] ^ hashes[j]).sum(axis=1) <= HASH_DIFFERENCE * either
            near[near] = wanted(i[near], j[near])
            pairs.append(np.sort(np.stack([i[near], j[near]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def compare_pictures(job):
    """2 if two files show the same picture, 1 the same scene with a local edit, 0 different pictures."""
    a, b = (thumbnail(read_image(path)) for path in job)
    if np.corrcoef(a.ravel(), b.ravel())[0, 1] < SAME_SCENE:
        return 0
    change = np.abs(cv2.blur((a - a.mean()) - (b - b.mean()), (3, 3))).max()
    return 2 if change < LOCAL_CHANGE else 1


def find_duplicates(images, roles, groups, records, parallel, found):
    """Add pictures that occur twice: by the bytes of the file, then by perceptual hash and comparison of thumbnails.

    Within a group equal pictures are a remark (a fault if mask or label differ), edited versions of one scene normal.
    Between groups equal pictures are a fault (a leak), edited versions of one scene, as a tampered picture and its
    original, a remark.
    """
    digests, masks = records["digest"], records["mask_digest"]
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] > 0]
    for same in np.split(order, np.flatnonzero(np.diff(digests[order])) + 1):
        if len(same) < 2:
            continue
        files = [images[i] for i in same]
        if len(np.unique(groups[same])) > 1:
            found.append(fault("leak", files, "the same file (equal bytes) is in two of the sets."))
        elif len(np.unique(masks[same][masks[same] > 0])) > 1 or {0, 1} <= set(roles[same]):
            found.append(fault("duplicate with another mask", files, "equal bytes, but masks or labels differ."))
        else:
            found.append(remark("duplicate", files, "equal bytes within one set."))
    _, first = np.unique(np.stack([digests, groups.astype(np.uint64)], axis=1), axis=0, return_index=True)
    first = first[np.bitwise_count(records["hash"][first]).sum(axis=1) >= ENOUGH_BITS]

    def wanted(i, j):
        i, j = first[i], first[j]
        return (digests[i] != digests[j]) & ((groups[i] != groups[j]) | (roles[i] == roles[j]))

    pairs = first[near_pairs(np.ascontiguousarray(records["hash"][first]), wanted)]
    jobs = [(images[i], images[j]) for i, j in pairs]
    again = "the same picture, compressed or resized anew,"
    for (i, j), files, likeness in zip(pairs, jobs, parallel(compare_pictures, jobs, len(jobs), "comparing")):
        if likeness == 2 and groups[i] != groups[j]:
            found.append(fault("leak", list(files), f"{again} is in two of the sets."))
        elif likeness == 2:
            found.append(remark("near duplicate", list(files), f"{again} within one set."))
        elif likeness == 1 and groups[i] != groups[j]:
            found.append(remark("shared scene", list(files), "versions of one photograph, edited differently, are in "
                                "two of the sets."))


def find_inverted_sets(sets, found):
    """One odd mask may be right; if most masks of a set look inverted the set is."""
    odd = {finding.files[0] for finding in found if finding.kind == "inverted-looking mask"}
    for part in sets if odd else ():
        masks = [mask for mask in part.masks if mask]
        inverted = sum(mask in odd for mask in masks)
        if inverted >= 3 and inverted > len(masks) / 2:
            found.append(fault("inverted masks", [str(part.path)], f"{inverted} of {len(masks)} masks look inverted."))


def print_histograms(records):
    """Print one bar for each interval of area, side and JPEG quality; returns {title: {interval: count}}."""
    histograms, sides, qualities = {}, np.maximum(records["height"], records["width"]), records["quality"]
    for title, values, edges in (
            ("tampered area", records["area"][np.isfinite(records["area"])], [0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5]),
            ("longer side in pixels", sides[sides > 0], [256, 512, 1024, 2048, 4096]),
            ("estimated JPEG quality", qualities[qualities > 0], [50, 60, 70, 75, 80, 85, 90, 95, 100])):
        counts = np.histogram(values, [-np.inf, *edges, np.inf])[0].tolist()
        names = [f"< {edge:g}" for edge in edges] + [f">= {edges[-1]:g}"]
        histograms[title] = dict(zip(names, counts))
        if len(values):
            print(f"\n{title} ({len(values)} pictures)")
        for name, count in histograms[title].items():
            if count:
                print(f"  {name:>8} {count:8d} {'#' * int(np.ceil(40 * count / max(counts)))}")
    return histograms


def print_findings(found):
    """Print a table of kinds with their number and first examples, faults first."""
    kinds = collections.Counter((finding.severity, finding.kind) for finding in found)
    if kinds:
        print(f"\n{'severity':10}{'kind':30}{'count':>6}")
    for (severity, kind), count in sorted(kinds.items()):
        print(f"{severity:10}{kind:30}{count:6}")
        for finding in itertools.islice((f for f in found if (f.severity, f.kind) == (severity, kind)), 3):
            files = finding.files[:3] + ["..."] * (len(finding.files) > 3)
            print(f"    {', '.join(files)}: {finding.text}")


def draw_cell(image, mask, caption, colour):
    """One cell of the contact sheet, (180, 200, 3) uint8 RGB: picture, outline of the mask, name and what was found."""
    cell = np.full((180, 200, 3), 255, np.uint8)
    try:
        picture, marked = read_image(image), read_mask(mask) if mask else None
        if marked is not None and marked.shape != picture.shape[:2]:
            turned = read_image(image, turn=True)
            picture = turned if turned.shape[:2] == marked.shape else picture
        scale = min(192 / picture.shape[1], 144 / picture.shape[0])
        size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
        view = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        if marked is not None:
            marked = cv2.resize(marked, size, interpolation=cv2.INTER_NEAREST)
            outlines, _ = cv2.findContours(marked, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(view, outlines, -1, (0, 0, 0), 3)
            cv2.drawContours(view, outlines, -1, (255, 255, 0), 1)
        cell[4:4 + size[1], 4:4 + size[0]] = view
    except UserError:
        cell[4:148, 4:196] = 200
    for line, text in enumerate((os.path.basename(image)[-33:], caption)):
        text = text.encode("ascii", "replace").decode()
        cv2.putText(cell, text, (4, 160 + 14 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.34, colour, 1, cv2.LINE_AA)
    cv2.rectangle(cell, (0, 0), (199, 179), colour, 1)
    return cell


def write_contact_sheet(output, sets, found):
    """Write a PNG of up to 48 pictures with mask outlines: first faults (red), then remarks (orange), others (grey)."""
    pairs = [pair for part in sets for pair in zip(part.images, part.masks)]
    place = {file: i for i, pair in enumerate(pairs) for file in pair if file}
    chosen = {}
    for finding in sorted(found, key=lambda finding: finding.severity):
        for file in finding.files:
            if file in place and len(chosen) < 48:
                chosen.setdefault(place[file], finding)
    for i in np.linspace(0, len(pairs) - 1, min(48, len(pairs))).astype(int).tolist():
        if len(chosen) < 48:
            chosen.setdefault(i, None)
    colours = {FAULT: (200, 0, 0), REMARK: (190, 110, 0), None: (90, 90, 90)}
    cells = [draw_cell(*pairs[i], finding.kind if finding else "", colours[finding and finding.severity])
             for i, finding in chosen.items()]
    columns = min(8, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i:i + columns], axis=1) for i in range(0, len(cells), columns)])
    Image.fromarray(sheet).save(output, "PNG")


def check(args):
    """`python data.py check`: print and write what is wrong with datasets; returns the exit code, 0 without a fault."""
    sets, found = [], []
    for number, path in enumerate(args.paths):
        collect_sets(path, path, (number,), sets, found)
    images, masks, roles = ([value for part in sets for value in getattr(part, field)]
                            for field in ("images", "masks", "roles"))
    numbers = {group: i for i, group in enumerate(dict.fromkeys(part.group for part in sets))}
    groups = np.repeat([numbers[part.group] for part in sets], [len(part.images) for part in sets])
    records = np.zeros(len(images), RECORD)

    workers = os.cpu_count() or 1
    # Forked workers start at once; elsewhere than on Linux forking is unsafe, and the platform's own way is taken.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_check_worker, (os.getpid(),)) as pool:
        def parallel(*work):
            return run_parallel(pool, workers, *work)

        jobs = zip(images, masks, itertools.repeat(args.image_size if args.if_padding else None))
        for i, (findings, record) in enumerate(parallel(inspect_pair, jobs, len(images), "checking")):
            records[i] = record
            found += findings
        find_known_bad(sets, records, found)
        find_inverted_sets(sets, found)
        find_duplicates(images, np.array(roles, np.int8), groups, records, parallel, found)

    for part in sets:
        tampered, authentic = part.roles.count(1), part.roles.count(0)
        print(f"{part.name}: {len(part.images)} pictures, {tampered} tampered, {authentic} authentic")
    found.sort(key=lambda finding: (finding.severity, finding.kind))
    print_findings(found)
    histograms = print_histograms(records)

    faults = sum(finding.severity == FAULT for finding in found)
    remarks = len(found) - faults
    replaced = os.path.exists(args.output)
    report = {"sets": [{"name": part.name, "path": str(part.path), "pictures": len(part.images),
                        "tampered": part.roles.count(1)} for part in sets],
              "faults": faults, "remarks": remarks, "histograms": histograms,
              "findings": [finding._asdict() for finding in found]}
    write_file(args.output, json.dumps(report, indent=1).encode())
    print(f"\n{args.output}: all findings{' (replaces the earlier file)' if replaced else ''}")
    if args.contact_sheet:
        replaced = os.path.exists(args.contact_sheet)
        write_contact_sheet(args.contact_sheet, sets, found)
        print(f"{args.contact_sheet}: contact sheet{' (replaces the earlier file)' if replaced else ''}")
    print(f"{faults} faults, {remarks} remarks" if faults else
          f"OK: {len(images)} pictures in {len(sets)} set{'s' * (len(sets) > 1)}, no fault, {remarks} remarks")
    return 1 if faults else 0


def add_check_arguments(parser):
    """The flags of `python data.py check`."""
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="dataset folder or JSON of any form, or plain folder; several are compared")
    parser.add_argument("--image_size", type=int, default=512, help="side in pixels, for --if_padding (default 512)")
    parser.add_argument("--if_padding", action="store_true", help="name what a run with --if_padding would crop")
    parser.add_argument("--output", default="report.json", help="JSON of all findings (default report.json)")
    parser.add_argument("--contact_sheet", help="PNG to write: pictures with mask outlines, faults first")


# ---------------------------------------------------------------------------------------------------------------------
# resize: smaller copies of pictures and masks

RESIZE_NOTE = ".resize.json"  # in the target: what it was made from, so that a resumed run does not mix two sizes
UNFINISHED = ".unfinished"    # appended to a name until the file is whole; what a killed run left the next overwrites


def resize_tree(source, masks):
    """All files below a folder as {path: "mask" | "picture" | "other"}, and no JSONs.

    Masks are what lies below `masks` (a folder) or a folder called Gt, or is named like one (_gt, _mask, ...).
    """
    files = {}
    pictures = {os.path.join(source, name) for name in list_pictures(source)}
    for folder, folders, names in os.walk(source, followlinks=True):
        here = Path(folder).resolve()  # links are followed, but not to a folder above
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and not here.is_relative_to((here / name).resolve()))
        below = "Gt" in Path(os.path.relpath(folder, source)).parts or (masks and here.is_relative_to(masks))
        for path in (os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")):
            mask = below or MASK_SUFFIX.search(os.path.splitext(path)[0])
            files[path] = "other" if path not in pictures else "mask" if mask else "picture"
    return files


def resize_dataset(path, documents):
    """All files of a dataset as {path: "mask" | "picture"}; JSONs go to `documents`, {path: content}."""
    kind, files = dataset_kind(path), {}
    if kind == "ManiDataset":
        return {os.path.join(path, side, name): what for side, what in (("Tp", "picture"), ("Gt", "mask"))
                for name in list_pictures(os.path.join(path, side))}
    if kind == "FolderDataset":
        return {os.path.join(path, name): "picture" for name in list_pictures(path)}
    content = documents[os.path.abspath(path)] = read_json(path)
    if kind == "JsonDataset":
        for image, mask in content:
            files[beside(path, image)] = "picture"
            if mask != "Negative":
                files[beside(path, mask)] = "mask"
    else:
        for member in content.values() if kind == "several" else (member for _, member in content):
            files |= resize_dataset(beside(path, member), documents)
    return files


def shrink(source, target, long_side, what):
    """Write `source` to `target` with sides of at most `long_side` pixels; returns "changed", "copied" or "there".

    Picture and mask of one size keep one size, and since pixels are never turned and the EXIF orientation is kept, what
    fitted before fits after. Small files are copied byte for byte; JPEGs keep their quantisation tables and
    subsampling; WebP becomes lossless.
    """
    if os.path.exists(target) and os.stat(target).st_mtime_ns >= os.stat(source).st_mtime_ns:
        return "there"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    picture = Image.open(source) if what != "other" else None
    if picture is None or max(picture.size) <= long_side:
        shutil.copy2(source, target + UNFINISHED)
    else:
        width, height = (max(1, round(side * long_side / max(picture.size))) for side in picture.size)
        options, orientation = {}, orientation_of(picture)
        if picture.format in ("JPEG", "MPO"):
            options |= {"qtables": picture.quantization, "progressive": bool(picture.info.get("progressive"))}
            if JpegImagePlugin.get_sampling(picture) >= 0:
                options["subsampling"] = JpegImagePlugin.get_sampling(picture)
        elif picture.format == "WEBP":
            options["lossless"] = True
        elif picture.info.get("compression") in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
            options["compression"] = picture.info["compression"]
        if picture.info.get("icc_profile"):
            options["icc_profile"] = picture.info["icc_profile"]
        if orientation > 1:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = orientation
        if what == "mask":
            small = picture.resize((width, height), Image.Resampling.NEAREST)
        else:
            plain = {"1": "L", "P": "RGBA" if "transparency" in picture.info else "RGB", "PA": "RGBA"}
            full = picture.convert(plain.get(picture.mode, picture.mode))  # palette indices can't be averaged
            small = Image.fromarray(cv2.resize(np.asarray(full), (width, height), interpolation=cv2.INTER_AREA))
            small = small if small.mode == full.mode else Image.frombytes(full.mode, small.size, small.tobytes())
        small.save(target + UNFINISHED, "JPEG" if picture.format == "MPO" else picture.format, **options)
    os.replace(target + UNFINISHED, target)
    return "changed" if picture and max(picture.size) > long_side else "copied"


def rewrite_paths(document, content, target_of, folder):
    """The content of a dataset JSON with the paths of the shrunken copies, relative to `folder`."""
    def new(path):
        return Path(os.path.relpath(target_of(beside(document, path)), folder)).as_posix()

    if isinstance(content, dict):
        return {name: new(path) for name, path in content.items()}
    return [[first, new(second)] if first in ("ManiDataset", "JsonDataset") else
            [new(first), second if second == "Negative" else new(second)] for first, second in content]


def resize(args):
    """`python data.py resize`: a smaller copy of a tree, or of what a dataset JSON names, with the JSON."""
    if args.long_side < 1:
        raise UserError(f"--long_side {args.long_side}: give the longer side in pixels, 1 or more.")
    Image.MAX_IMAGE_PIXELS = None  # large pictures are what this is for
    source, target, documents = os.path.realpath(args.source), os.path.realpath(args.target), {}
    if os.path.isdir(source):
        masks = args.masks and Path(source, args.masks).resolve()
        if masks and not masks.is_dir():
            raise UserError(f"--masks {args.masks}: no such folder below {args.source}.")
        files, root = resize_tree(source, masks), source
        if Path(target).is_relative_to(source):
            raise UserError(f"{args.target} is {args.source} or lies inside it; choose another folder to write to.")
    else:
        if args.masks:
            raise UserError("--masks is for a folder; a JSON says itself which files are masks.")
        files = {os.path.abspath(path): what for path, what in resize_dataset(source, documents).items()}
        root = os.path.commonpath([os.path.dirname(path) for path in files])
    if not files:
        raise UserError(f"{args.source} holds no file to copy.")
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        raise UserError(f"{args.source}: {len(missing)} of its files do not exist, first {missing[0]}; mend the paths.")

    def target_of(path):
        path = os.path.abspath(path)
        return os.path.join(target, os.path.basename(path) if path in documents else os.path.relpath(path, root))

    taken = {os.path.realpath(target_of(path)) for path in (*files, *documents)}
    if taken & {os.path.realpath(path) for path in (*files, *documents)}:
        raise UserError(f"{args.target} would overwrite files of {args.source}; choose another folder to write to.")
    if len(taken) < len(files) + len(documents):
        raise UserError(f"{args.source}: two of its files would get the same path in {args.target}; rename one.")
    note_path = os.path.join(target, RESIZE_NOTE)
    note = {"source": source, "long_side": args.long_side, "masks": args.masks}
    if os.path.isdir(target) and os.listdir(target) and not os.path.exists(note_path):
        raise UserError(f"{args.target} is not empty and no earlier resize made it; give a new or empty folder.")
    if os.path.exists(note_path) and read_json(note_path) != note:
        raise UserError(f"{args.target} holds another resize (see {RESIZE_NOTE} in it); give a new folder, or the same "
                        "arguments to resume.")
    write_file(note_path, json.dumps(note, indent=1).encode())

    def work(path):
        try:
            return shrink(path, target_of(path), args.long_side, files[path])
        except (OSError, ValueError, SyntaxError, cv2.error) as error:  # what PIL raises for broken files
            return f"{path}: {error}"

    # Threads suffice, as codecs release Python's lock, and a killed run leaves no process that writes on.
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = list(run_parallel(pool, workers, work, files, len(files), "resizing"))
    for document, content in documents.items():
        content = rewrite_paths(document, content, target_of, target)
        write_file(target_of(document), json.dumps(content, indent=1).encode())
    count = collections.Counter(results)
    broken = [result for result in results if result not in ("changed", "copied", "there")]
    print(f"{args.target}: {count['changed']} files changed, {count['copied']} copied, {count['there']} already there")
    if broken:
        raise UserError(f"{len(broken)} of {len(files)} files can't be read and are left out, first {broken[0]}; "
                        "mend them and run again.")


def add_resize_arguments(parser):
    """The flags of `python data.py resize`."""
    parser.add_argument("source", help="a folder (any tree), or a dataset JSON, which is rewritten into the target")
    parser.add_argument("target", help="folder to write; new, empty or an interrupted run's")
    parser.add_argument("--long_side", type=int, default=1024, help="longest side in pixels of a copy (default 1024)")
    parser.add_argument("--masks", help="folder of masks below source, beside Gt/ and names like a_gt, a_mask")


# ---------------------------------------------------------------------------------------------------------------------
# The command line of data.py


def main():
    """Run `python data.py <command>`; returns the exit code."""
    parser = Parser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, add_arguments, function, text in (
            ("demo", add_demo_arguments, demo, "make a small data set from scikit-learn's two photographs"),
            ("pairs", add_pairs_arguments, run_pairs,
             "pair pictures and masks by name, or by the recipe of a public set, and write a JSON"),
            ("check", add_check_arguments, check, "find every fault of datasets, and leaks between them"),
            ("resize", add_resize_arguments, resize, "shrink pictures and masks into another folder")):
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=function)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names on disk need not be valid text
    return args.run(args) or 0
