"""Mutated images, JSONs and names: each is read as Pillow reads it, or refused in one sentence with its path.

Never a traceback, a crash, a hang, or more than 2 GiB. A small number of cases by default; the full run, in child
processes with a limit of memory, which prints its counts: FUZZ=2000 python -m pytest tests/test_fuzz_files.py -s
"""
import collections
import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import data
import save_images
from registry import UserError

CASES, CHUNK = int(os.environ.get("FUZZ", 120)), 30
GIB = 2**30
SOUND = {"the original", "as Pillow", "refused", "refused, Pillow reads", "loaded"}  # outcomes
PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8), (5, 5), 0)
GREY16 = np.arange(90 * 120).reshape(90, 120).astype(np.uint16) * 6


def seeds():
    """Return {name: bytes} of one good file of each kind."""
    rgb, grey, frame = (Image.fromarray(pixels) for pixels in (PIXELS, PIXELS[..., 0], 255 - PIXELS))
    alpha = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
    mask = Image.fromarray(np.uint8(PIXELS[..., 0] > 128) * 255)
    images = {"grey.jpg": (grey, {}), "rgb.jpg": (rgb, {"quality": 95}),
              "progressive.jpg": (rgb, {"progressive": True}), "cmyk.jpg": (rgb.convert("CMYK"), {}),
              "rgb.png": (rgb, {}), "grey.png": (grey, {}),
              "palette.png": (rgb.quantize(64), {}), "alpha.png": (alpha, {}), "bits.png": (mask.convert("1"), {}),
              "animated.png": (rgb, {"save_all": True, "append_images": [frame], "default_image": True}),
              "rgb.bmp": (rgb, {}), "palette.bmp": (rgb.quantize(64), {}), "raw.tif": (rgb, {}),
              "lossy.webp": (rgb, {}), "lossless.webp": (rgb, {"lossless": True}), "mask.gif": (mask, {}),
              "animated.gif": (mask, {"save_all": True, "append_images": [grey]}),
              "row.png": (rgb.resize((30_000, 1)), {}), "column.jpg": (rgb.resize((1, 30_000)), {}),
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


def declare(content, side):
    """Make the header of a file (bytearray) declare side x side pixels."""
    if content[:4] == b"\x89PNG":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif content[:2] == b"\xff\xd8":
        place = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
        content[place:place + 4] = struct.pack(">HH", side, side)
    elif content[:2] == b"BM":
        content[18:26] = struct.pack("<ii", side, side)
    elif content[:3] == b"GIF":
        content[6:10] = struct.pack("<HH", side, side)
    elif content[12:16] == b"VP8 ":
        content[26:30] = struct.pack("<HH", side, side)
    for tag in (256, 257) if content[:2] == b"II" else ():
        place = max(content.find(struct.pack("<HHI", tag, size, 1)) for size in (3, 4)) + 8
        content[place:place + 4] = struct.pack("<I", side)


def mutate(rng, content, other):
    """Return (what was done, the mutated bytes); `other` is a file of another kind."""
    content, size = bytearray(content), len(content)
    kinds = {"nothing": 2, "flip": 20, "flips": 14, "header": 18, "truncated": 11, "zeros": 8, "hole": 6, "doubled": 4,
             "other header": 3, "noise": 3, "empty": 1, "trailer": 2, "end": 5, "size": 3}
    kind = rng.choice(list(kinds), p=np.array(list(kinds.values())) / 100)
    start, length = int(rng.integers(size)), int(rng.integers(1, 1 + max(1, size // 8)))
    if kind == "size":
        declare(content, 10_000)
    elif kind in ("flip", "flips", "header"):
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


def outcome(path, original):
    """Read a file as a run does, with and without a scan, as image and as mask; return what came out in few words."""
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


def run_images(folder, numbers):
    """Return [(name of the seed, mutation, outcome)] of some cases; a case is made from its number alone."""
    found, files = [], seeds()
    names = sorted(files)
    for number in numbers:
        rng = np.random.default_rng([15, number])
        name = names[number % len(names)]
        kind, content = mutate(rng, files[name], files[names[int(rng.integers(len(names)))]])
        path, good = (os.path.join(folder, f"{number}{suffix}_{name}") for suffix in ("", "_good"))
        Path(path).write_bytes(content)
        Path(good).write_bytes(files[name])
        found.append((name, kind, outcome(path, by_pillow(good))))
    return found


TOKENS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 2000, "{" * 2000, '"\\ud800"', '"\\u0000"', "null", '""', "[]",
          "{}", '"Negative"', '"ManiDataset"', '"JsonDataset"', '"/dev/zero"', '"."', '".."', '"/"', '"\n"', '"a.png"',
          '"one"', '"good.json"', ",", ":", "]", "}", '"', "\\", "\0", "\ufeff", '{"a": 1, "a": 2}', f'"{5000 * "x"}"']


def run_jsons(folder, numbers):
    """Return [(kind of JSON, mutation, outcome)] of some cases."""
    found = []
    cv2.imwrite(os.path.join(folder, "a.png"), PIXELS)
    seeds = {"list": '[["a.png", "Negative"], ["a.png", "a.png"]]', "sets": '{"one": "good.json", "two": "good.json"}',
             "balanced": '[["JsonDataset", "good.json"], ["JsonDataset", "good.json"]]'}
    Path(folder, "good.json").write_text('[["a.png", "Negative"]]')
    for number in numbers:
        draw = random.Random(number)
        kind, text = draw.choice(list(seeds.items()))
        parts = re.findall(r'"[^"]*"|.', text)
        for _ in range(draw.randint(0, 2)):
            parts[draw.randrange(len(parts))] = draw.choice([*TOKENS, ""])
        content = bytearray("".join(parts).encode(draw.choice(["utf-8", "utf-8", "utf-16", "utf-32"])))
        for _ in range(draw.choice([0, 0, 0, 1, 4])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = os.path.join(folder, f"{number}.json")
        Path(path).write_bytes(content)
        try:
            data.open_sets(path, "--data_path", allowed=(*data.FORMS,), image_size=32, fingerprint=False)
            result = "loaded"
        except UserError as error:
            result = "refused" if path in str(error) else f"BAD message: {error!r}"
        except Exception as error:
            result = f"TRACEBACK {type(error).__name__}: {error}"
        found.append((kind, "", result))
    return found


def run_limited(run, folder, numbers):
    """Call one of the two above where 2 GiB more of memory, or a minute, would end it; in a process of its own."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    if pages:
        limit = pages * resource.getpagesize() + 2 * GIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.alarm(60)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)  # libtiff's words
        found = run(folder, numbers)
    signal.alarm(0)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_all(run, folder, cases):
    """Return the Counter of (name, outcome) over `cases` cases, having printed it by outcome and by name."""
    context = multiprocessing.get_context("fork")  # a child that crashes or hangs breaks the pool, and so the test
    chunks = [range(start, min(start + CHUNK, cases)) for start in range(0, cases, CHUNK)]
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        results = list(pool.map(run_limited, [run] * len(chunks), [str(folder)] * len(chunks), chunks))
    found = collections.Counter((name, result) for part, _ in results for name, _, result in part)
    odd = [(number, *case) for number, case in enumerate(case for part, _ in results for case in part)
           if case[2] not in SOUND]
    print(f"\n{run.__name__}: {cases} cases, at most {max(most for _, most in results) / GIB:.2f} GiB in a process")
    outcomes = collections.Counter()
    for (name, result), count in found.items():
        outcomes[result] += count
    print(dict(outcomes.most_common()))
    for name in sorted({name for name, _ in found}):
        print(f"  {name:24}", *(f"{result} {found[name, result]}," for result in outcomes if found[name, result]))
    assert not odd, odd[:5]
    assert max(most for _, most in results) < 2 * GIB
    return outcomes


def test_mutated_images(tmp_path):
    outcomes = run_all(run_images, tmp_path, CASES)
    assert min(outcomes["the original"], outcomes["as Pillow"], outcomes["refused"]) > CASES / 50


def test_mutated_jsons(tmp_path):
    outcomes = run_all(run_jsons, tmp_path, CASES)
    assert min(outcomes["loaded"], outcomes["refused"]) > CASES / 100


def test_names_of_sets_and_masks_stay_in_their_folder(tmp_path):
    draw = random.Random(0)
    parts = ["..", ".", "/", "\\", "\n", "\0", "\x1b[31m", "'", '"', " ", "日本", "\ud800", os.fsdecode(b"\xb2"), "a",
             "A", "x" * 300, "é" * 150, "results.csv", "log.txt", "\u202e", "-2", "", "=1"]
    for _ in range(CASES):
        names = list({"".join(draw.choices(parts, k=draw.randint(0, 4))) for _ in range(20)})
        folders = data.folder_names(names)
        assert len({folder.lower() for folder in folders}) == len(names)
        for folder in folders:
            assert folder.isprintable() and len(folder.encode()) < 220 and folder not in ("", ".", "..")
            assert os.path.dirname(os.path.normpath(os.path.join(tmp_path, folder))) == str(tmp_path)
            assert "\\" not in folder and not folder.startswith(".")
        paths = [f"{draw.choice(['/', '', '../', './'])}{name}/{draw.choice(parts)}.png" for name in names]
        for file in save_images.output_names(paths, folders[0])[0]:
            assert not os.path.isabs(file) and ".." not in file.split("/")
    assert data.folder_names(["CASIA v1", "14_CASIA 2.0", ".."]) == ["CASIA v1", "14_CASIA 2.0", "test"]
