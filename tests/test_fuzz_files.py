"""Mutated images, JSONs and names: each is read as Pillow reads it, or refused in one sentence with its path.

Never a traceback, a crash, a hang, or more than 2 GiB. A small number of cases by default; the full run, in child
processes, which prints its counts: FUZZ=2000 python -m pytest tests/test_fuzz_files.py -s
"""
import collections
import concurrent.futures
import io
import json
import multiprocessing
import os
import resource
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

import data
from registry import UserError

CASES, CHUNK = int(os.environ.get("FUZZ", 120)), 25
PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8), (5, 5), 0)
GREY16 = np.arange(90 * 120).reshape(90, 120).astype(np.uint16) * 6


def seeds():
    """Return {name: bytes} of one good file of each kind."""
    rgb, grey, frame = (Image.fromarray(pixels) for pixels in (PIXELS, PIXELS[..., 0], 255 - PIXELS))
    alpha = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
    mask = Image.fromarray(np.uint8(PIXELS[..., 0] > 128) * 255)
    images = {"grey.jpg": (grey, {}), "rgb.jpg": (rgb, {"quality": 95}), "progressive.jpg": (rgb, {"progressive": True}),
              "cmyk.jpg": (rgb.convert("CMYK"), {}), "rgb.png": (rgb, {}), "grey.png": (grey, {}),
              "palette.png": (rgb.quantize(64), {}), "alpha.png": (alpha, {}), "bits.png": (mask.convert("1"), {}),
              "animated.png": (rgb, {"save_all": True, "append_images": [frame], "default_image": True}),
              "rgb.bmp": (rgb, {}), "palette.bmp": (rgb.quantize(64), {}), "raw.tif": (rgb, {}),
              "lossy.webp": (rgb, {}), "lossless.webp": (rgb, {"lossless": True}), "mask.gif": (mask, {}),
              "animated.gif": (mask, {"save_all": True, "append_images": [grey]}), "row.png": (rgb.resize((30_000, 1)), {}),
              "dot.jpg": (rgb.resize((1, 1)), {})}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        images[f"{compression}.tif"] = rgb, {"compression": compression}
    images["group4.tif"] = mask.convert("1"), {"compression": "group4"}
    found = {"grey16.png": cv2.imencode(".png", GREY16)[1].tobytes(),
             "rgb16.png": cv2.imencode(".png", PIXELS * np.uint16(257))[1].tobytes()}
    for name, (image, options) in images.items():
        file, kind = io.BytesIO(), {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2])
        image.save(file, kind, **options)
        found[name] = file.getvalue()
    return found


def mutate(rng, content, other):
    """Return (what was done, the mutated bytes); `other` is a file of another kind."""
    content, size = bytearray(content), len(content)
    kind = rng.choice(["nothing", "flip", "flips", "header", "truncated", "zeros", "hole", "doubled", "other header",
                       "noise", "empty", "trailer", "end"], p=[.02, .2, .14, .2, .12, .08, .06, .04, .03, .03, .01, .02, .05])
    start, length = int(rng.integers(size)), int(rng.integers(1, 1 + max(1, size // 8)))
    if kind in ("flip", "flips", "header"):
        for place in rng.integers(min(size, 100) if kind == "header" else size, size=1 if kind == "flip" else 8):
            content[place] ^= 1 << int(rng.integers(8)) if kind == "flips" else int(rng.integers(1, 256))
    elif kind == "other header":
        content[:16] = other[:16]
    elif kind == "noise":
        content[start:start + length] = rng.bytes(len(content[start:start + length]))
    elif kind == "zeros":
        content[start:start + length] = bytes(len(content[start:start + length]))
    elif kind == "doubled":
        content[start:start] = content[start:start + length]
    else:
        keep = {"truncated": (start, size), "hole": (start, start + length), "empty": (0, size),
                "end": (size - int(rng.integers(1, 21)), size)}.get(kind, (size, size))
        del content[max(keep[0], 0):keep[1]]
        content += rng.bytes(length) if kind == "trailer" else b""
    return str(kind), bytes(content)


def by_pillow(path):
    """Return the RGB pixels that Pillow reads, or None where it refuses the file."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > 10**7:  # Pillow may try for minutes
                return None
            if image.mode.startswith("I;16"):
                image.load()
                return np.dstack([(np.asarray(image) >> 8).astype(np.uint8)] * 3)
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def outcome(path, name, kind, original):
    """Read a file as a run does, with and without a scan, as image and as mask; return what came out, in two words."""
    results = []
    for read in (data.read_image, data.read_mask, lambda path: data.scan_file(path, False),
                 lambda path: data.scan_file(path, True)):
        try:
            results.append(read(path))
        except UserError as error:
            if path not in str(error) or "\n" in str(error):
                return f"BAD message: {error!r}"
            results.append(None)
        except Exception as error:
            return f"TRACEBACK {type(error).__name__}: {error}"
    image, expected = results[0], by_pillow(path)
    if image is None:
        return "refused" if expected is None else "refused, Pillow reads"
    if np.array_equal(image, original):
        return "the original"
    if expected is not None and any(np.array_equal(data.turn(image, way), expected) for way in range(1, 9)):
        return "as Pillow"
    return f"WRONG pixels ({'Pillow refuses' if expected is None else 'other than Pillow'}, mean {image.mean():.0f})"


def run_chunk(folder, numbers):
    """Return [(name of the seed, mutation, outcome)] of some cases; a case is made from its number alone."""
    found, files = [], seeds()
    names = sorted(files)
    for number in numbers:
        rng = np.random.default_rng([15, number])
        name = names[number % len(names)]
        kind, content = mutate(rng, files[name], files[names[int(rng.integers(len(names)))]])
        path, good = (os.path.join(folder, f"{number}{'_good' * good}_{name}") for good in (False, True))
        for file, written in ((path, content), (good, files[name])):
            with open(file, "wb") as opened:
                opened.write(written)
        signal.alarm(20)  # a hang ends the process
        found.append((name, kind, outcome(path, name, kind, by_pillow(good))))
        signal.alarm(0)
        os.unlink(good)
        if found[-1][2].split()[0].islower():
            os.unlink(path)
    return found
