"""Augmentations that tamper, for training, and the attacks of the robustness test.

Importing this file imports albumentations, which takes seconds: the scripts do so where they use it.
"""
import functools
import hashlib
import math
import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else albumentations asks the network for its newest version

import albumentations as albu
import cv2
import numpy as np

from registry import Registry, UserError, import_failure, import_files, model_files, nearest

# ---------------------------------------------------------------------------------------------------------------------
# Augmentations that tamper, for albumentations 2

INPAINT_RADIUS = 3  # pixels


class RandomWindowTransform(albu.DualTransform):
    """Base of augmentations that tamper with one random rectangle of an image and set the mask to 1 there.

    Args:
        min_h, max_h: height of the rectangle as a fraction of the image's height (0..1)
        min_w, max_w: width of the rectangle as a fraction of the image's width (0..1)
        p: probability of applying it to an image
    """

    def __init__(self, min_h=0.05, max_h=0.8, min_w=0.05, max_w=0.8, p=0.5):
        super().__init__(p=p)
        for side, low, high in (("h", min_h, max_h), ("w", min_w, max_w)):
            if not 0 < low <= high <= 1:
                raise UserError(f"{type(self).__name__}: min_{side}={low} and max_{side}={high} are fractions of the "
                                f"image; give 0 < min_{side} <= max_{side} <= 1.")
        self.min_h, self.max_h, self.min_w, self.max_w = min_h, max_h, min_w, max_w

    def draw_size(self, shape):
        """Height and width in pixels of a random rectangle in an image of shape (H, W, ...), at least 1 each."""
        height = round(self.py_random.uniform(self.min_h, self.max_h) * shape[0])
        width = round(self.py_random.uniform(self.min_w, self.max_w) * shape[1])
        return max(1, height), max(1, width)

    def draw_corner(self, shape, size):
        """Top and left in pixels of a rectangle of `size` (h, w) somewhere within an image of shape (H, W, ...)."""
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
    """Copies a random rectangle of the image to another place of it, where the mask becomes 1.

    Works on uint8 images (H, W, 3) with masks (H, W) of 0/1. An image in which the rectangle has one possible place
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
        """The image with the rectangle copied; `source` and `window` as drawn."""
        if window is None:
            return img
        top, left, height, width = window
        result = img.copy()
        result[top:top + height, left:left + width] = img[source[0]:source[0] + height, source[1]:source[1] + width]
        return result


class RandomInpainting(RandomWindowTransform):
    """Fills a random rectangle from its surroundings (cv2.inpaint, Telea or Navier-Stokes); the mask becomes 1 there.

    Works on uint8 images (H, W, 3) with masks (H, W) of 0/1. An image that the rectangle covers whole, or
    that has a side of one pixel, stays as it is. Arguments as in `RandomWindowTransform`.
    """

    def get_params_dependent_on_data(self, params, data):
        """Draw `window` (top, left, height, width), pixels, and `method`, one of OpenCV's two algorithms."""
        shape = params["shape"]
        size = self.draw_size(shape)
        nothing_around = size == tuple(shape[:2]) or min(shape[:2]) == 1  # in one row OpenCV reads beyond the image
        window = None if nothing_around else (*self.draw_corner(shape, size), *size)
        return {"window": window, "method": self.py_random.choice([cv2.INPAINT_TELEA, cv2.INPAINT_NS])}

    def apply(self, img, window=None, method=cv2.INPAINT_TELEA, **params):
        """The image with the rectangle filled; `window` and `method` as drawn."""
        if window is None:
            return img
        hole = self.apply_to_mask(np.zeros(img.shape[:2], np.uint8), window)
        return cv2.inpaint(img, hole, INPAINT_RADIUS, method)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations in place of albumentations' own


class RandomScale(albu.RandomScale):
    """albumentations' RandomScale, but a side of one pixel is never made shorter, which would leave none."""

    def get_params_dependent_on_data(self, params, data):
        """Return `scale`, as drawn or the least that leaves a pixel of the shorter side."""
        return {"scale": max(params["scale"], 1 / min(params["shape"][:2]))}


class RandomGaussianBlur(albu.ImageOnlyTransform):
    """Gaussian blur with a random odd kernel size, from which OpenCV derives sigma, as published training did.

    albumentations 2 draws sigma by itself, uniformly from 0.5 to 3.

    Args:
        kernel_range: smallest and largest side of the kernel in pixels, both odd
        p: probability of applying it to an image
    """

    def __init__(self, kernel_range=(3, 7), p=0.5):
        super().__init__(p=p)
        if not (kernel_range[0] % 2 == kernel_range[1] % 2 == 1 and 0 < kernel_range[0] <= kernel_range[1]):
            raise UserError(f"RandomGaussianBlur: kernel_range={kernel_range} is refused; give two odd numbers of "
                            "pixels, the smaller one first.")
        self.kernel_range = kernel_range

    def get_params(self):
        """Draw `kernel`, the side in pixels."""
        return {"kernel": self.py_random.randrange(self.kernel_range[0], self.kernel_range[1] + 1, 2)}

    def apply(self, img, kernel, **params):
        """The blurred image."""
        return cv2.GaussianBlur(img, (kernel, kernel), 0)


class RandomJpegCompression(albu.ImageOnlyTransform):
    """JPEG compression with a random quality, of the colours as they are.

    albumentations' ImageCompression hands RGB to a codec that takes it for BGR, so red and blue are swapped in it.

    Args:
        quality_range: lowest and highest quality, 1..100
        p: probability of applying it to an image
    """

    def __init__(self, quality_range=(70, 100), p=0.5):
        super().__init__(p=p)
        if not 1 <= quality_range[0] <= quality_range[1] <= 100:
            raise UserError(f"RandomJpegCompression: quality_range={quality_range} is refused; give two numbers of 1 "
                            "to 100, the smaller one first.")
        self.quality_range = quality_range

    def get_params(self):
        """Draw `quality`."""
        return {"quality": self.py_random.randint(*self.quality_range)}

    def apply(self, img, quality, **params):
        """The image after compression."""
        return compress_jpeg(img, quality)


# ---------------------------------------------------------------------------------------------------------------------
# Attacks of the robustness test

ATTACKS = Registry("attack")
CONVENTIONS = ("exact", "imdlbenco")


def check_convention(convention):
    """Raise UserError for an unknown convention of an attack."""
    if convention not in CONVENTIONS:
        raise UserError(f"attack convention {convention!r} is unknown; give {' or '.join(CONVENTIONS)}.")


class AttackWrapper:
    """An attack at several strengths: iterating gives (strength, transform), with transform(image, name) -> image.

    Images are uint8 (H, W, 3) RGB; `name` is the image's name as its dataset lists it. Strength 0 is no attack. An
    attack of your own is a subclass that overrides `attack`, and names what its strength counts. In any file below
    models/ it is known to `test_robust.py --attacks` by its `name`, with the strengths of the class:

        class GammaWrapper(AttackWrapper):
            name, strength_unit, strengths = "Gamma", "exponent", [0, 0.5, 1.5, 2]

            def attack(self, image, strength, name):
                return np.rint(255 * (image / 255) ** strength).astype(np.uint8)

    Args:
        strengths: list of numbers (default: the class's own)
    """

    name, strength_unit, strengths = "Attack", "strength", ()
    allowed = "a number"  # what a strength must be, besides 0

    def __init_subclass__(cls):
        if "name" in vars(cls):
            ATTACKS.register_module(cls.name, cls)

    def __init__(self, strengths=None):
        strengths = self.strengths if strengths is None else strengths
        self.strengths = list(strengths if np.iterable(strengths) else [strengths])
        if not self.strengths:
            raise UserError(f"{type(self).__name__}: the list of strengths is empty; give at least one, to the object "
                            "or as `strengths` of the class.")
        for strength in self.strengths:
            if not self.allows(strength):
                raise UserError(f"{type(self).__name__}: strength {strength!r} is refused; give {self.allowed}, or 0 "
                                "for no attack.")

    def __iter__(self):
        for strength in self.strengths:
            yield strength, functools.partial(self.apply, strength)

    def __len__(self):
        return len(self.strengths)

    def __repr__(self):
        return f"{type(self).__name__}({self.strengths}, {self.strength_unit})"

    def allows(self, strength):
        """Tell whether a strength makes sense."""
        return isinstance(strength, (int, float, np.number)) and math.isfinite(strength)

    def attack(self, image, strength, name):
        """The attacked copy of `image`, uint8 (H, W, 3) RGB; `image` itself must stay as it is."""
        raise UserError(f"the attack {type(self).__name__} has no method attack(self, image, strength, name), which "
                        "returns the attacked image; write it.")

    def apply(self, strength, image, name):
        """What the pairs of `__iter__` call: `attack`, or `image` itself at strength 0."""
        if strength == 0:
            return image
        attacked = self.attack(image, strength, name)
        if attacked.dtype != np.uint8 or attacked.shape != image.shape:
            raise UserError(f"{type(self).__name__}.attack returned {attacked.dtype} {attacked.shape} for {name}; "
                            f"it must return uint8 {image.shape}, like the image that it was given.")
        return attacked


def choose_attacks(names, listed):
    """Return the attacks that `--attacks` names, of the script's list or of a file below models/; without names, the
    list. Raises UserError for an unknown name, with the nearest."""
    if not names:
        return listed
    failures = import_files(path for path in model_files() if b"transforms" in path.read_bytes())
    known = {attack.name: attack for attack in listed}
    known_names = sorted({*known, *ATTACKS.entries})
    for name in names:
        if name not in known_names:
            raise UserError(" ".join([f"--attacks {name}: there is no such attack.{nearest(name, known_names)} Known: "
                                      f"{', '.join(known_names)}.",
                                      *(import_failure(file, error) for file, error in failures.items())]))
        if name in ATTACKS:
            ATTACKS.get(name)  # refuses a name that two files take
    return [known.get(name) or ATTACKS.get(name)() for name in names]


class GaussianBlurWrapper(AttackWrapper):
    """OpenCV's Gaussian blur; the strength is the side k of the k x k kernel, from which OpenCV derives sigma:
    0.3 ((k - 1) / 2 - 1) + 0.8 pixels."""

    name, strength_unit = "GaussianBlur", "side of the kernel in pixels"
    allowed = "an odd, positive kernel size in pixels"

    def allows(self, strength):
        return super().allows(strength) and (strength == 0 or strength > 0 and strength % 2 == 1)

    def attack(self, image, strength, name):
        return cv2.GaussianBlur(image, (int(strength), int(strength)), 0)


class GaussianNoiseWrapper(AttackWrapper):
    """Zero-mean Gaussian noise, drawn for each pixel and channel, then rounded and clipped to 0..255.

    It depends on (name, seed) only, so neither the batch, the worker nor the process changes it; the strength scales
    it.

    Args:
        strengths: list of variances, or of standard deviations, on the 0-255 scale
        unit: "variance" (as in IMDL-BenCo) or "std" (the standard deviation, as in most papers)
        seed: whole number that makes another set of noises
        convention: "exact", or "imdlbenco", which cuts fractions off instead of rounding: the mean is -0.5
    """

    name, allowed = "GaussianNoise", "a positive number"

    def __init__(self, strengths, unit="variance", seed=42, convention="exact"):
        names = {"variance": "variance on the 0-255 scale", "std": "standard deviation on the 0-255 scale"}
        if unit not in names:
            raise UserError(f"GaussianNoiseWrapper: unit={unit!r} is unknown; give \"variance\" or \"std\".")
        check_convention(convention)
        super().__init__(strengths)
        self.unit, self.seed, self.convention = unit, seed, convention
        self.strength_unit = names[unit]

    def allows(self, strength):
        return super().allows(strength) and strength >= 0

    def attack(self, image, strength, name):
        deviation = math.sqrt(strength) if self.unit == "variance" else strength
        noise = unit_noise(name, self.seed, image.shape)
        if self.convention == "exact":
            return cv2.addWeighted(image, 1, noise, deviation, 0, dtype=cv2.CV_8U)
        return np.clip(noise * np.float32(deviation) + image, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)  # the strengths of an image follow each other, and drawing is what takes the time
def unit_noise(name, seed, shape):
    """Standard Gaussian noise, float32 of `shape`; not to be written to."""
    digest = hashlib.blake2b(f"{name}|{seed}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(shape, np.float32)


class JpegCompressionWrapper(AttackWrapper):
    """JPEG compression; the strength is exactly the quality, 1..100, that OpenCV's encoder is given (4:2:0 chroma).

    Args:
        strengths: list of qualities
        convention: "exact", or "imdlbenco", which hands RGB to the encoder as BGR: red and blue are swapped within
    """

    name, strength_unit = "JpegCompression", "JPEG quality"
    allowed = "a whole JPEG quality of 1 to 100"

    def __init__(self, strengths, convention="exact"):
        check_convention(convention)
        super().__init__(strengths)
        self.convention = convention

    def allows(self, strength):
        return super().allows(strength) and 0 <= strength <= 100 and strength % 1 == 0

    def attack(self, image, strength, name):
        if self.convention == "exact":
            return compress_jpeg(image, int(strength))
        return np.ascontiguousarray(compress_jpeg(image[..., ::-1], int(strength))[..., ::-1])


def encode_jpeg(image, quality):
    """Bytes (a uint8 vector) of the JPEG file of `image`, uint8 (H, W, 3) RGB, at `quality` 1..100."""
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]


def compress_jpeg(image, quality):
    """`image`, uint8 (H, W, 3) RGB, as it comes back from a JPEG file of `quality` 1..100."""
    return cv2.imdecode(encode_jpeg(image, quality), cv2.IMREAD_COLOR_RGB)
