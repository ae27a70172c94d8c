"""Temporary home of three sections of data.py: training augmentations, robustness attacks and the demo data set."""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as albu
import cv2
import numpy as np

from registry import UserError

# ----------------------------------------------- training augmentations -----------------------------------------------

INPAINT_RADIUS = 3  # pixels
INPAINT_MARGIN = 8  # pixels around the window that cv2.inpaint needs to give what it gives on the whole picture


class RandomWindowTransform(albu.DualTransform):
    """Base of augmentations that tamper with one random rectangle of a picture and set the mask to 1 there.

    Args:
        min_h, max_h: height of the rectangle as a fraction of the picture's height (0..1)
        min_w, max_w: width of the rectangle as a fraction of the picture's width (0..1)
        p: probability of applying it to a picture
    """

    def __init__(self, min_h=0.05, max_h=0.5, min_w=0.05, max_w=0.5, p=0.5):
        super().__init__(p=p)
        for side, low, high in (("h", min_h, max_h), ("w", min_w, max_w)):
            if not 0 < low <= high <= 1:
                raise UserError(f"{type(self).__name__}: min_{side}={low} and max_{side}={high} are fractions of the "
                                f"picture; give 0 < min_{side} <= max_{side} <= 1.")
        self.min_h, self.max_h, self.min_w, self.max_w = min_h, max_h, min_w, max_w

    def draw_size(self, shape):
        """Height and width in pixels of a random rectangle in a picture of shape (H, W, ...), at least 1 each."""
        height = round(self.py_random.uniform(self.min_h, self.max_h) * shape[0])
        width = round(self.py_random.uniform(self.min_w, self.max_w) * shape[1])
        return max(1, height), max(1, width)

    def draw_corner(self, shape, size):
        """Top and left in pixels of a rectangle of `size` (h, w) somewhere within a picture of shape (H, W, ...)."""
        return self.py_random.randint(0, shape[0] - size[0]), self.py_random.randint(0, shape[1] - size[1])

    def apply_to_mask(self, mask, window=None, **params):
        """Mask (H, W), uint8 0/1, with 1 inside the rectangle; `window` is (top, left, height, width) or None."""
        if window is None:
            return mask
        top, left, height, width = window
        mask = mask.copy()
        mask[top:top + height, left:left + width] = 1
        return mask


class RandomCopyMove(RandomWindowTransform):
    """Copies a random rectangle of the picture to another place of it, where the mask becomes 1.

    Works on uint8 pictures (H, W, 3) with masks (H, W) of 0/1. A picture in which the rectangle has one possible place
    only stays as it is. Arguments as in `RandomWindowTransform`.
    """

    def get_params_dependent_on_data(self, params, data):
        """Draw `source` (top, left) and `window` (top, left, height, width), pixels; they are at different places."""
        shape = params["shape"]
        size = self.draw_size(shape)
        if size == tuple(shape[:2]):
            return {"source": None, "window": None}
        source = target = self.draw_corner(shape, size)
        while target == source:
            target = self.draw_corner(shape, size)
        return {"source": source, "window": (*target, *size)}

    def apply(self, img, source=None, window=None, **params):
        """The picture with the rectangle copied; `source` and `window` as drawn."""
        if window is None:
            return img
        top, left, height, width = window
        result = img.copy()
        result[top:top + height, left:left + width] = img[source[0]:source[0] + height, source[1]:source[1] + width]
        return result


class RandomInpainting(RandomWindowTransform):
    """Fills a random rectangle from its surroundings (cv2.inpaint, Telea or Navier-Stokes); the mask becomes 1 there.

    Works on uint8 pictures (H, W, 3) with masks (H, W) of 0/1. A picture that the rectangle covers whole, or
    that has a side of one pixel, stays as it is. Arguments as in `RandomWindowTransform`.
    """

    def get_params_dependent_on_data(self, params, data):
        """Draw `window` (top, left, height, width), pixels, and `method`, one of OpenCV's two algorithms."""
        shape = params["shape"]
        size = self.draw_size(shape)
        nothing_around = size == tuple(shape[:2]) or min(shape[:2]) == 1  # in one row OpenCV reads beyond the picture
        window = None if nothing_around else (*self.draw_corner(shape, size), *size)
        return {"window": window, "method": self.py_random.choice([cv2.INPAINT_TELEA, cv2.INPAINT_NS])}

    def apply(self, img, window=None, method=cv2.INPAINT_TELEA, **params):
        """The picture with the rectangle filled; `window` and `method` as drawn."""
        return img if window is None else inpaint_window(img, window, method)


def inpaint_window(image, window, method):
    """Inpaint the rectangle `window` (top, left, height, width; pixels) of a copy of `image` (H, W, 3) uint8.

    OpenCV looks no farther than its radius and a border beyond the rectangle, so it runs on the rectangle and
    INPAINT_MARGIN pixels around it: equal pixels, a fraction of the time.
    """
    top, left, height, width = window
    above, before = max(0, top - INPAINT_MARGIN), max(0, left - INPAINT_MARGIN)
    result = image.copy()
    part = result[above:top + height + INPAINT_MARGIN, before:left + width + INPAINT_MARGIN]
    hole = np.zeros(part.shape[:2], np.uint8)
    hole[top - above:top - above + height, left - before:left - before + width] = 1
    part[...] = cv2.inpaint(np.ascontiguousarray(part), hole, INPAINT_RADIUS, method)
    return result


# ------------------------------------------------- robustness attacks -------------------------------------------------


class AttackWrapper:
    """An attack at several strengths: iterating gives (strength, transform), with transform(image, name) -> image.

    Images are uint8 (H, W, 3) RGB; `name` is the picture's name as its data set lists it. Strength 0 is no attack. An
    attack of your own is a subclass that overrides `attack`, and names what its strength counts:

        class GammaWrapper(AttackWrapper):
            name = "Gamma"
            strength_unit = "exponent"

            def attack(self, image, strength, name):
                return np.rint(255 * (image / 255) ** strength).astype(np.uint8)

    Args:
        strengths: list of numbers
    """

    name = "Attack"
    strength_unit = "strength"

    def __init__(self, strengths):
        self.strengths = list(strengths)
        if not self.strengths:
            raise UserError(f"{type(self).__name__}: the list of strengths is empty; give at least one.")
        for strength in self.strengths:
            self.check(strength)

    def __iter__(self):
        for strength in self.strengths:
            yield strength, functools.partial(self.apply, strength)

    def __len__(self):
        return len(self.strengths)

    def __repr__(self):
        return f"{type(self).__name__}({self.strengths}, {self.strength_unit})"

    def describe(self):
        """Name of the attack and what its strengths count, for logs and table headings."""
        return f"{self.name} ({self.strength_unit})"

    def check(self, strength):
        """Raise UserError where a strength makes no sense; every strength does unless a subclass says otherwise."""

    def refuse(self, strength, wanted):
        """Raise the UserError that `check` owes the user for a strength; `wanted` says what to give instead."""
        raise UserError(f"{type(self).__name__}: strength {strength!r} is refused; give {wanted}, or 0 for no attack.")

    def attack(self, image, strength, name):
        """The attacked copy of `image`, uint8 (H, W, 3) RGB; `image` itself must stay as it is."""
        raise NotImplementedError

    def apply(self, strength, image, name):
        """What the pairs of `__iter__` call: `attack`, or `image` itself at strength 0."""
        if strength == 0:
            return image
        attacked = self.attack(image, strength, name)
        if attacked.dtype != np.uint8 or attacked.shape != image.shape:
            raise UserError(f"{type(self).__name__}.attack returned {attacked.dtype} {attacked.shape} for {name}; "
                            f"it must return uint8 {image.shape}, like the picture that it was given.")
        return attacked


def is_whole(value):
    """Whether a strength is a whole number (an int, or a float such as 3.0)."""
    return isinstance(value, (int, float, np.number)) and float(value).is_integer()


class GaussianBlurWrapper(AttackWrapper):
    """OpenCV's Gaussian blur; the strength is the side k of the k x k kernel, from which OpenCV derives sigma:
    0.3 ((k - 1) / 2 - 1) + 0.8 pixels."""

    name = "GaussianBlur"
    strength_unit = "side of the kernel in pixels"

    def check(self, strength):
        if not is_whole(strength) or strength < 0 or (strength and strength % 2 == 0):
            self.refuse(strength, "an odd, positive kernel size in pixels")

    def attack(self, image, strength, name):
        return cv2.GaussianBlur(image, (int(strength), int(strength)), 0)


class GaussianNoiseWrapper(AttackWrapper):
    """Zero-mean Gaussian noise, drawn for each pixel and channel, then rounded and clipped to 0..255.

    The noise depends on (name, strength, seed) only, so neither the batch, the worker nor the process changes it.

    Args:
        strengths: list of variances, or of standard deviations, on the 0-255 scale
        unit: "variance" (as in IMDL-BenCo) or "std" (the standard deviation, as in most papers)
        seed: whole number that makes another set of noises
    """

    name = "GaussianNoise"

    def __init__(self, strengths, unit="variance", seed=42):
        names = {"variance": "variance on the 0-255 scale", "std": "standard deviation on the 0-255 scale"}
        if unit not in names:
            raise UserError(f"GaussianNoiseWrapper: unit={unit!r} is unknown; give \"variance\" or \"std\".")
        super().__init__(strengths)
        self.unit, self.seed = unit, seed
        self.strength_unit = names[unit]

    def check(self, strength):
        if not isinstance(strength, (int, float, np.number)) or not math.isfinite(strength) or strength < 0:
            self.refuse(strength, "a positive number")

    def attack(self, image, strength, name):
        digest = hashlib.blake2b(f"{name}|{float(strength)}|{self.seed}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        noisy = rng.standard_normal(image.shape, np.float32)
        noisy *= math.sqrt(strength) if self.unit == "variance" else strength
        noisy += image
        np.rint(noisy, out=noisy)
        np.clip(noisy, 0, 255, out=noisy)
        return noisy.astype(np.uint8)


class JpegCompressionWrapper(AttackWrapper):
    """JPEG compression; the strength is exactly the quality, 1..100, that OpenCV's encoder is given (4:2:0 chroma)."""

    name = "JpegCompression"
    strength_unit = "JPEG quality"

    def check(self, strength):
        if not is_whole(strength) or not 0 <= strength <= 100:
            self.refuse(strength, "a whole JPEG quality of 1 to 100")

    def attack(self, image, strength, name):
        return compress_jpeg(image, int(strength))


def encode_jpeg(image, quality):
    """Bytes (a uint8 vector) of the JPEG file of `image`, uint8 (H, W, 3) RGB, at `quality` 1..100."""
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]


def compress_jpeg(image, quality):
    """`image`, uint8 (H, W, 3) RGB, as it comes back from a JPEG file of `quality` 1..100."""
    return cv2.imdecode(encode_jpeg(image, quality), cv2.IMREAD_COLOR_RGB)


# --------------------------------------------------- the demo data ----------------------------------------------------
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
DEMO_MARKER = "made_by_data_demo.json"


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


def main():
    parser = argparse.ArgumentParser(description="Makes the demo data.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="make a small data set from scikit-learn's two photographs")
    add_demo_arguments(command)
    command.set_defaults(run=demo)
    args = parser.parse_args()
    try:
        args.run(args)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
