"""Reading files, pairing images with masks, datasets and loaders.

Workers hand over uint8 images and masks; `to_device` is the one place that normalises them.
"""
import collections
import concurrent.futures
import contextlib
import copyreg
import ctypes
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import stat
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate, get_worker_info

import log
from registry import UserError, counted, limit_of, usable_cpus, visible

cv2.setNumThreads(0)  # the loader's workers are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised here, with the file's name

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of pixels in 0..1
STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# Reading files

# What a file may ask for, so that no file, however it is made, takes 2 GiB of memory; Pillow's own limits are lifted.
MAX_BYTES = 2**28  # of a file; half of it for a JSON
MAX_VALUES = 2**23  # lists, objects and their members in a JSON: some 2.8 million pairs
MAX_PIXELS = 210_000_000  # width x height, a phone's 16384 x 12288 say; a part of it where decoding takes more memory
# Pixels per byte of the file, and the formats that are read: a black mask comes near to it, and no photograph does.
MAX_RATIO = {"JPEG": 600, "PNG": 9000, "BMP": 200, "GIF": 3000, "TIFF": 300_000, "WEBP": 100_000}
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # AI generators write long texts into PNGs
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF, which says nothing about the pixels


def read_regular(path, limit):
    """Return the bytes of a file as a uint8 array; OSError or ValueError (no possible path) where that can't be done.

    So it is for more than `limit` bytes, and for what is no regular file: reading a pipe would never end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    if status.st_size > limit:
        raise OSError(f"its {status.st_size} bytes are above the limit of {limit}, which MAX_BYTES in data.py sets")
    return np.fromfile(path, np.uint8, status.st_size)


def read_bytes(path):
    """Return the bytes of a file as a uint8 array; UserError for a file that is missing, unreadable, too long, empty or
    no regular one."""
    try:
        data = read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}. "
                        "Fix the path or the file, or take it out of the dataset.") from None
    if not len(data):
        raise UserError(f"{path} is empty (0 bytes): copy it again or take it out of the dataset.")
    return data


def is_complete(data):
    """Tell whether the bytes of a file (uint8 array) end as a JPEG or PNG should; other formats always do.

    OpenCV silently fills the missing rest of a truncated JPEG. An end marker counts after the start of the first scan:
    a thumbnail in the header has one of its own. Bytes after the end are allowed.
    """
    tail = data[-64:].tobytes()
    if data[:2].tobytes() == b"\xff\xd8":
        if tail.rstrip(b"\0").endswith(b"\xff\xd9"):
            return True
        content = data.tobytes()
        *_, (marker, position) = (0, 0), *jpeg_segments(content)
        return marker == 0xDA and content.find(b"\xff\xd9", position) >= 0
    if is_png(data) and b"IEND" not in tail:
        return any(kind == b"IEND" for kind, *_ in png_chunks(data.tobytes()))
    return True


def is_png(data):
    """Tell whether the bytes of a file (uint8 array) begin as a PNG does."""
    return data[:8].tobytes() == b"\x89PNG\r\n\x1a\n"


def png_chunks(content):
    """Yield (kind, start, end) of the content of each chunk of a PNG (bytes), up to its end."""
    start, kind = 16, b""
    while start <= len(content) and kind != b"IEND":
        kind, end = content[start - 4:start], start + int.from_bytes(content[start - 8:start - 4], "big")
        yield kind, start, end
        start = end + 12


def has_bad_checksum(data):
    """Tell whether the bytes of a file (uint8 array) are a PNG of which a chunk with pixels belies its checksum.

    Decoders don't look at that of the last such chunk.
    """
    content = memoryview(data)
    return is_png(data) and any(kind == b"IDAT" and zlib.crc32(content[start - 4:end]).to_bytes(4, "big")
                                != content[end:end + 4] for kind, start, end in png_chunks(data.tobytes()))


def jpeg_segments(content):
    """Yield (marker, position behind it) of the segments of a JPEG (bytes) up to its first scan, as libjpeg finds
    them."""
    position = 2
    while 0 <= (position := content.find(b"\xff", position)) < len(content) - 3:
        marker, position = content[position + 1], position + 2
        if marker == 0xFF:
            position -= 1
        elif marker > 1 and not 0xD0 <= marker <= 0xD8:  # the others have no content
            yield marker, position
            if marker in (0xD9, 0xDA):
                return
            position += int.from_bytes(content[position:position + 2], "big")


def suits_opencv(path, data):
    """Tell whether OpenCV reads the bytes of a file (uint8 array) as PIL does; UserError for too many pixels.

    True for a JPEG, and for a PNG without animation, of which OpenCV gives another frame. In other formats it fills in
    black what it can't decode, turns the image, or multiplies it by its alpha channel. CMYK it rounds otherwise: for
    such a JPEG 4, as only what OpenCV says about it is wanted.
    """
    content = data.tobytes()
    if is_png(data):
        width, height = (int.from_bytes(content[start:start + 4], "big") for start in (16, 20))
        header = content[:content.find(b"IDAT")]
        has_alpha = header[25:26] in (b"\4", b"\6") or b"tRNS" in header
        refuse_large(path, "PNG", height, width, len(data), 3 if header[24:25] == b"\x10" else 1 + has_alpha)
        return b"acTL" not in header
    if content[:2] != b"\xff\xd8":
        return False
    frame = b""  # its marker, length, precision, height, width, number of components
    for marker, start in jpeg_segments(content):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = content[start - 1:start + 8]
        elif marker == 0xDA and len(frame) == 9:
            height, width = (int.from_bytes(frame[place:place + 2], "big") for place in (4, 6))
            several_scans = frame[0] > 0xC1 or content[start + 2:start + 3] != frame[8:]  # all coefficients are kept
            refuse_large(path, "JPEG", height, width, len(data), 1 + several_scans + (frame[8] == 4))
            return frame[8] if frame[8] == 4 else frame[8] in (1, 3)
    return False


def tiff_length(image):
    """Return how long a TIFF file must be by its own header, in bytes."""
    tags = image.tag_v2  # offsets and lengths of strips, or of tiles
    starts, lengths = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in ((273, 324), (279, 325)))
    return max((start + length for start, length in zip(starts, lengths)), default=0)


def orientation_of(image):
    """Return the EXIF orientation of an opened PIL image, 1 (as stored) to 8; 1 where its EXIF is malformed."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PIL would decode the image to look for EXIF behind it
    try:
        tags = image.tag_v2 if image.format == "TIFF" else image.getexif()  # by a TIFF's own tag PIL turns it
        value = tags.get(0x0112, 1)
    except Exception:  # malformed EXIF raises many types
        return 1
    return value if value in range(1, 9) else 1


def orientation_in(file):
    """Return the EXIF orientation of an image file (path or stream), 1 to 8; 1 where PIL can't open it."""
    with contextlib.suppress(Exception), Image.open(file, formats=[*MAX_RATIO]) as image:  # PIL raises many types
        return orientation_of(image)
    return 1


def stored_size(image):
    """Return (height, width, EXIF orientation) of an opened PIL image, by its header, as its pixels are stored."""
    orientation = orientation_of(image)
    if image.format == "TIFF" and orientation > 4:  # PIL gives the size as turned
        return image.width, image.height, orientation
    return image.height, image.width, orientation


def turn(pixels, orientation):
    """Return an array (H, W, ...) turned and mirrored as an EXIF orientation of 1 to 8 asks for."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (slice(None, None, -1 if orientation in some else 1) for some in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels[rows, columns])


# What libjpeg and libtiff say when pixels are wrong.
DAMAGE = re.compile("Corrupt JPEG data(?!: bad ICC)|Premature end|Invalid SOS|Inconsistent progression|"
                    "JPEGLib: Unsupported marker|Decode: ")
BAD_CHECKSUM = "a checksum of its pixels is wrong"
ONE_AT_A_TIME = threading.Lock()


@functools.lru_cache(maxsize=1)
def scratch_file(process):
    """Return a temporary file of this process alone: one shared with a fork's parent would mix the words of both."""
    return tempfile.TemporaryFile(buffering=0)


def hear_decoder(decoder, *args):
    """Return (decoder(*args), what libjpeg, libpng or libtiff said); they print to descriptor 2, and name no file."""
    with ONE_AT_A_TIME:
        try:
            heard, screen = scratch_file(os.getpid()), os.dup(2)
        except OSError:  # no temporary folder, or no standard error
            return decoder(*args), ""
        os.dup2(heard.fileno(), 2)
        said = b""
        try:
            result = decoder(*args)
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            if heard.tell():
                heard.seek(0)
                said = heard.read()
                heard.seek(0)
                heard.truncate()
    lines = dict.fromkeys(line for line in said.decode(errors="replace").split("\n") if line)
    if bars := "\n".join(line for line in lines if "\r" in line):  # a progress bar of another thread
        os.write(2, bars.encode())
    return result, "; ".join(line for line in lines if "\r" not in line)


@functools.lru_cache(maxsize=None)
def say_damage(path, words):
    """Print, once in a process, that a file is damaged."""
    log.say(f"warning: {path}: damaged inside, so that some of its pixels may be wrong ({words}); python "
            "tools/check_data.py finds all such files")


def decode(path, data, as_mask=False, on_damage=say_damage):
    """Decode the bytes of a file (uint8 array) as they are stored, whatever EXIF asks for.

    PIL takes what OpenCV can't read or reads otherwise.

    Args:
        path: for messages
        as_mask: keep grey, alpha, 16 bits and other types; else RGB
        on_damage: called as on_damage(path, words of libjpeg) where a JPEG is damaged but can be decoded

    Returns:
        uint8 (H, W, 3); with `as_mask` (H, W) or (H, W, channels) of the file's type, BGR or RGB

    Raises:
        UserError: truncated, too large, or nothing that can be decoded
    """
    flags = (cv2.IMREAD_UNCHANGED if as_mask else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    image, words, complete = None, "", is_complete(data)
    suited = suits_opencv(path, data)
    if suited and complete:
        with contextlib.suppress(cv2.error):  # sides longer than OpenCV allows
            image, words = hear_decoder(cv2.imdecode, data, flags)
    try:
        if is_png(data) and not complete:
            raise OSError("image file is truncated")
        if image is None or suited == 4 or words and not is_png(data):  # only PIL tells whether decoding broke off
            image = None  # frees its memory
            image, more = hear_decoder(decode_with_pillow, path, data, as_mask)
            words = "; ".join(filter(None, (words, more)))
    except UserError:
        raise
    except Exception as error:  # PIL raises many types; each means that this file can't be decoded
        refuse_float(path, data)
        if "truncated" in str(error).lower():
            raise UserError(f"{path} is truncated: copy it again or take it out.") from None
        if isinstance(error, UnidentifiedImageError):
            raise UserError(f"{path} is broken or of no format that is read here (JPEG, PNG, BMP, TIFF, WebP): copy it "
                            "again, convert it or take it out.") from None
        raise UserError(f"{path} can't be decoded, it is broken ({error}): copy it again or take it out.") from None
    if DAMAGE.search(words):
        on_damage(path, words)
    return image


def decode_with_pillow(path, data, as_mask):
    """Decode bytes with PIL, as `decode` does; what PIL raises, ValueError for float, UserError for too many pixels."""
    image = open_pillow(path, data)
    orientation = orientation_of(image) if image.format == "TIFF" else 1
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}")  # `decode` says what they are
    if image.mode.startswith("I;16"):  # PIL would clip at 255
        image.load()
        pixels = np.asarray(image).astype(np.uint16)
        pixels = pixels if as_mask else np.dstack([(pixels >> 8).astype(np.uint8)] * 3)
    else:
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would be a copy
    return turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # PIL has turned it


def open_pillow(path, data, weight=2):
    """Open the bytes of a file with PIL; UserError for too many pixels (see `refuse_large`), else what PIL raises."""
    image = Image.open(io.BytesIO(data), formats=[*MAX_RATIO])
    weight = 4 if image.format == "WEBP" else weight
    refuse_large(path, image.format.replace("MPO", "JPEG"), image.height, image.width, len(data), weight)
    return image


def refuse_large(path, kind, height, width, size, weight):
    """Raise UserError for an image of more pixels than MAX_PIXELS and MAX_RATIO allow a file of `size` bytes.

    `weight` tells how much memory decoding takes: 1 where rows are decoded one by one, as of an ordinary JPEG or PNG.
    """
    limit = MAX_PIXELS // weight
    if width * height > limit:
        raise UserError(f"{path} is {height}x{width} pixels (height x width), above the limit of {limit // 10**6} "
                        f"megapixels for such a {kind}: make it smaller, take it out, or raise MAX_PIXELS in data.py.")
    if width * height > MAX_RATIO[kind] * size:
        raise UserError(f"{path} has {size} bytes, too few for the {height}x{width} pixels (height x width) that it "
                        f"declares: a {kind} holds at most {MAX_RATIO[kind]} a byte; take it out, or raise MAX_RATIO "
                        "in data.py.")


def refuse_float(path, data):
    """Raise UserError for a TIFF whose pixels are no unsigned integers of up to 16 bits."""
    bits = form = 1
    with contextlib.suppress(Exception):  # PIL raises many types
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        bits, form = tags.get(258, (1,))[0], tags.get(339, (1,))[0]
    if form in (2, 3) or bits > 16:
        raise UserError(f"{path} holds {('uint', 'int', 'float')[form - 1]}{bits} pixels, whose range nothing tells: "
                        "save it with 8 bits.")


def read_image(path, turned=False, on_damage=say_damage):
    """Read an image as RGB uint8 (H, W, 3), the same pixels as PIL gives, as stored or turned as its EXIF asks for.

    Raises UserError for files that are missing, empty, truncated or no images.
    """
    data = read_bytes(path)
    pixels = decode(path, data, on_damage=on_damage)
    return turn(pixels, orientation_in(io.BytesIO(data)) if turned else 1)


def read_mask(path, data=None):
    """Read a mask as uint8 (H, W): 1 where the mean of the colour channels is above 127.5, else 0.

    `data` are the bytes of the file where they were read already. Raises UserError also for a mask that marks
    something, but nothing bright enough to count (see `dark_mask`).
    """
    pixels = mask_pixels(path, read_bytes(path) if data is None else data)
    mask = binary_mask(pixels)
    if not mask.any() and (why := dark_mask(pixels)):
        raise UserError(f"{path}: {why}, so it counts as empty: save it with 0 and 255.")
    return mask


def mask_pixels(path, data, on_damage=say_damage):
    """Decode the bytes of a mask to its colours or grey values, uint8 or uint16 (H, W) or (H, W, 3); UserError."""
    pixels = decode(path, data, True, on_damage)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: a mask of {pixels.dtype} pixels. Store it with 8 bits, 0 and 255.")
    if pixels.ndim == 3:
        return pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]  # without alpha
    return pixels


def binary_mask(pixels):
    """Turn what `mask_pixels` gives into a mask, uint8 0/1 (H, W)."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return (pixels.sum(axis=2, dtype=np.uint16) > 382 if pixels.ndim == 3 else pixels > 127).view(np.uint8)


def dark_mask(pixels):
    """Say why a mask of these pixels, none of which counts as tampered, is no empty one; "" where it is all black."""
    brightest = int(pixels.max())
    if not brightest:
        return ""
    if brightest == 1:
        return "it holds 0 and 1 instead of 0 and 255"
    return (f"its brightest value is {brightest} of {np.iinfo(pixels.dtype).max}, and no mean of the channels is above "
            "half of that")


def read_pair(image_path, mask_path):
    """Read an image and its mask (None: authentic) and return (image, mask, turned).

    Both as stored, unless only the image as its EXIF orientation turns it has the size of its mask (`turned` is True
    then). Raises UserError with both paths where no choice makes the sizes agree.
    """
    image = read_image(image_path)
    if mask_path is None:
        return image, np.zeros(image.shape[:2], np.uint8), False
    mask = read_mask(mask_path)
    if mask.shape == image.shape[:2]:
        return image, mask, False
    turned = turn(image, orientation_in(image_path))
    if mask.shape == turned.shape[:2]:
        return turned, mask, True
    raise UserError(f"{image_path} is {image.shape[0]}x{image.shape[1]} pixels (height x width) but its mask "
                    f"{mask_path} is {mask.shape[0]}x{mask.shape[1]}: fix or remove the pair "
                    "(python tools/check_data.py finds all such pairs).")


# ---------------------------------------------------------------------------------------------------------------------
# Which images belong to a dataset

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
MASK_FILE_SUFFIXES = {*IMAGE_SUFFIXES, ".gif"}
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".gif", ".psd", ".dng", ".cr2", ".nef", ".arw"}
FOREIGN_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "__MACOSX"}  # made by a NAS or an archiver, none of the user's
# What public sets append to the image's stem. Columbia's second file `_edgemask_3` (three colours) is left out on
# purpose: with it each of its images would have two masks.
MASK_SUFFIXES = ("_gt", "_gt3", "_mask", "_edgemask", "_groundtruth", "_ground_truth", "_msk", "-gt", "-mask")
MASK_SUFFIX = re.compile("(?:" + "|".join(MASK_SUFFIXES) + ")$", re.IGNORECASE)
JSON_FORMS = ('Give a list of [image, mask or "Negative"], a list of ["ManiDataset" or "JsonDataset", path], '
              "or an object {name: path} of several sets.")


def list_files(root, suffixes=None):
    """Return all files below `root`, or those whose extension (lower case, with the dot) is in `suffixes`.

    Paths are relative to `root`, with "/", sorted. Names starting with a dot and FOREIGN_FOLDERS are left out; links
    are followed, but a folder is not entered again below itself. Raises UserError when `root` or a folder below can't
    be listed.
    """
    def refuse(error):
        raise UserError(f"{error.filename}: can't list this folder ({error.strerror}); give an existing folder that "
                        "you may read.")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        folders[:] = [name for name in folders if not name.startswith(".") and name not in FOREIGN_FOLDERS
                      and not here.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)]
        below = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        found += [below.removeprefix("./") + name for name in names if not name.startswith(".")
                  and (suffixes is None or os.path.splitext(name)[1].lower() in suffixes)]
    return sorted(found)


def list_images(root, suffixes=IMAGE_SUFFIXES):
    """Return all files below `root` with these extensions as sorted relative paths (see list_files).

    One line counts the images of formats that are not read.
    """
    found = {path: os.path.splitext(path)[1].lower() for path in list_files(root, suffixes | UNREAD_SUFFIXES)}
    unread = collections.Counter(suffix for suffix in found.values() if suffix not in suffixes)
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        log.say(f"note: {root} holds {counts}, which {'is' if unread.total() == 1 else 'are'} not read: convert to PNG "
                "or JPEG")
    return [path for path, suffix in found.items() if suffix in suffixes]


def list_masks(root):
    """Return all masks below `root`, as `list_images` does; a mask may also be a GIF."""
    return list_images(root, MASK_FILE_SUFFIXES)


def split_stem(path):
    """Split a relative path into "folder/" and "stem". Only the last extension goes: stems of public sets hold dots."""
    folder, slash, name = path.rpartition("/")
    return folder + slash, os.path.splitext(name)[0]


def pair_by_name(images, masks):
    """Pair images with masks by name, whatever the order of the lists.

    A mask belongs to the image with the same relative folder and stem, or whose stem it extends by one of
    MASK_SUFFIXES; the same stem goes before a suffix, equal upper and lower case before different. What is left is
    paired without regard to the folder if the stem occurs only once among all images and once among all masks.

    Args:
        images, masks: lists of paths relative to the root of the images and to the root of the masks
    Returns:
        pairs: list of (image, mask) in the order of `images`; images_left; masks_left
    Raises:
        UserError: several images or masks of one folder claim the same partner
    """
    parts = [[(path, *split_stem(path)) for path in images],
             [(path, *split_stem(path)) for path in masks]]
    partner, used = {}, set()  # image -> mask, and the masks taken
    for same_folder, with_suffix, any_case in ((1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)):
        groups = {}
        for side, taken in enumerate((partner, used)):
            for path, folder, stem in parts[side]:
                if same_folder and path in taken:
                    continue
                stem = MASK_SUFFIX.sub("", stem) if side and with_suffix else stem
                key = folder + stem if same_folder else stem
                groups.setdefault(key.casefold() if any_case else key, ([], []))[side].append(path)
        unclear = []
        for group_images, group_masks in groups.values():
            image, mask = (group_images + [None])[0], (group_masks + [None])[0]
            if len(group_images) == len(group_masks) == 1 and image not in partner and mask not in used:
                partner[image] = mask
                used.add(mask)
            elif len(group_images) + len(group_masks) > 2 and group_images and group_masks:
                unclear.append((group_images, group_masks))
        if unclear and same_folder and any_case:
            group_images, group_masks = unclear[0]
            raise UserError(f"{', '.join(group_images)}: belongs to {counted(len(group_masks), 'mask')} by name "
                            f"({', '.join(group_masks)}); {counted(len(unclear), 'such case')}. Keep one image and one "
                            "mask of each stem in a folder.")
        if len(partner) == len(images) or len(used) == len(masks):
            break
    return ([(image, partner[image]) for image in images if image in partner],
            [image for image in images if image not in partner], [mask for mask in masks if mask not in used])


def pair_by_order(path, images, masks):
    """Pair two lists of one length, in order; UserError where the numbers in their names contradict that."""
    numbers = [counting_numbers(names) for names in (images, masks)]
    for image, mask, *pair in zip(images, masks, *numbers) if all(numbers) else ():
        if pair[0] != pair[1]:
            raise UserError(f"{path}: no name in Gt/ fits a name in Tp/, and by dictionary order {image} would get the "
                            f"mask {mask}, of another number: give masks the names of their images, or list the pairs "
                            "in a JSON.")
    return list(zip(images, masks))


def counting_numbers(names):
    """Return the number in each name by which the names differ, the last one if several do; [] where none does."""
    numbers = [list(map(int, re.findall(r"\d+", split_stem(name)[1])))[::-1] for name in names]
    return next((list(column) for column in zip(*numbers) if len(set(column)) > 1), [])


def read_json(path):
    """Return the content of a JSON file (UTF-8, UTF-16 or UTF-32), a list or an object; UserError for anything else.

    So it is for a name that an object holds twice, and for what would take too much memory.
    """
    def refuse_twice(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path} names {twice!r} twice in one object, of which only one would count: give each a "
                            "name of its own.")
        return content

    try:
        data = read_regular(path, MAX_BYTES // 2).tobytes()
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise OSError(f"more than {MAX_VALUES} values, the limit that MAX_VALUES in data.py sets")
        content = json.loads(data, object_pairs_hook=refuse_twice)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise UserError(f"{path} holds several JSON values, one per line perhaps, and not one JSON list: put [ and "
                            "] around them all and one comma between each two.") from None
        raise UserError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
                        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not encoded as UTF-8 (byte {error.start}: {error.object[error.start]:#04x}): save "
                        "it as UTF-8, or write it with ASCII escapes, as Python's json.dump does.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a dataset. {JSON_FORMS}") from None
    except (OSError, ValueError) as error:  # the latter of a number of thousands of digits
        raise UserError(f"{path} can't be read: {error}.") from None
    if not content or not isinstance(content, (list, dict)):
        raise UserError(f"{path} is {'empty' if content in ([], {}) else 'no list and no object'}. {JSON_FORMS}")
    return content


def read_pairs(path, of_sets):
    """Return the list of [image, mask] of a JSON, or with `of_sets` of [kind of dataset, path]; UserError otherwise."""
    def refuse(position, what):
        raise UserError(f"{path}: item {position} is {json.dumps(content[position])[:80]}, not {what}. {JSON_FORMS}")

    content = read_json(path)
    if isinstance(content, dict):
        raise UserError(f"{path} is an object, not a list. {JSON_FORMS}")
    for position, item in enumerate(content):
        if not (isinstance(item, list) and len(item) == 2
                and isinstance(item[0], str) and isinstance(item[1], str) and item[0] and item[1]):
            refuse(position, "a pair of strings")
        if (item[0] in ("ManiDataset", "JsonDataset")) != of_sets:
            refuse(position, "a dataset" if of_sets else "an image and its mask")
    return content


def read_sets(path):
    """Return {name: path} of a JSON object of several sets; UserError where that isn't what it holds."""
    content = read_json(path)
    for name, member in content.items():
        if not isinstance(member, str):
            raise UserError(f"{path}: the value of {name!r} is no path. {JSON_FORMS}")
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise UserError(f"{path}: the set name {name!r} can't name a folder for its results. Use letters, digits, "
                            "- and _; images and masks go into a list, [[image, mask], ...].")
    return content


def dataset_kind(path):
    """Tell what a path is: ManiDataset, JsonDataset, BalancedDataset, several (an object of sets) or FolderDataset.

    Of a JSON only the first characters are read, the dataset's class checks the rest. Anything else is a UserError that
    says which of these it nearly was.
    """
    path = Path(path)
    if os.path.isdir(path):
        have = [name for name in ("Tp", "Gt") if (path / name).is_dir()]
        if len(have) == 1:
            raise UserError(f"{path} has {have[0]}/ but no {'Gt' if have == ['Tp'] else 'Tp'}/: "
                            "a dataset folder needs both, images in Tp/ and masks in Gt/.")
        return "ManiDataset" if have else "FolderDataset"
    if not exists(path):
        raise UserError(f"{path}: no such file or folder. Give a folder with Tp/ and Gt/, or a JSON file.")
    if path.suffix.lower() != ".json" or not path.is_file():  # reading a pipe would never end
        raise UserError(f"{path} is neither a folder nor a .json file. Give a folder with Tp/ and Gt/, or a JSON file.")
    try:
        with open(path, "rb") as file:
            data = file.read(4000)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    start = data.decode(json.detect_encoding(data), errors="replace").lstrip()
    if start.startswith("{"):
        return "several"
    return "BalancedDataset" if re.match(r'\[\s*\[\s*"(Mani|Json)Dataset"', start) else "JsonDataset"


def exists(path):
    """Tell whether a file or folder exists, like os.path.exists but in half the time: a dataset may list a million."""
    try:
        return os.access(path, os.F_OK)
    except ValueError:  # a NUL or a character that no path can hold
        return False


def resolve_path(json_path, path):
    """Return a path that a JSON gives: taken from the JSON's folder if it is there, else from the working directory.

    One written on Windows, with backslashes, is taken with slashes where it isn't there as it is.
    """
    folder = os.path.dirname(os.path.abspath(json_path))
    for each in dict.fromkeys((path, path.replace("\\", "/"))):
        near = os.path.join(folder, each)
        if exists(near):
            return near
        if exists(each):
            return each
    return os.path.join(folder, path)


# ---------------------------------------------------------------------------------------------------------------------
# Scan: what every file of a dataset is, read once and remembered

SCAN_DTYPE = np.dtype([("size", "i8"), ("mtime", "i8"), ("digest", "S32"), ("height", "i4"), ("width", "i4"),
                       ("orientation", "i2"),
                       # of a mask, the side of the smallest square at its top left that holds a 1, in pixels; 0 where
                       # it holds none, -1 of an image
                       ("corner", "i4")])


def scan_file(path, is_mask):
    """Read a whole file and return its SCAN_DTYPE row: bytes, mtime (ns), BLAKE2 digest, size as stored, orientation.

    Raises UserError for a file that `decode` refuses. The compressed pixels of images are decoded only where something
    is odd (tools/check_data.py decodes all).
    """
    data = read_bytes(path)
    try:
        height, width, orientation = read_header(path, data)
    except UserError:
        raise
    except Exception:  # PIL raises many types; what can be decoded is accepted all the same
        height, width = decode(path, data).shape[:2]
        if has_bad_checksum(data):
            say_damage(path, BAD_CHECKSUM)
        orientation = orientation_in(io.BytesIO(data))
    status = os.stat(path)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    corner = first_corner(read_mask(path, data)) if is_mask else -1
    return np.array((status.st_size, status.st_mtime_ns, digest, height, width, orientation, corner), SCAN_DTYPE)


def read_header(path, data):
    """Return (height, width, EXIF orientation) of an image as stored; what PIL raises where the bytes look damaged."""
    if not is_complete(data):
        raise OSError("image file is truncated")
    image = open_pillow(path, data, 1 if suits_opencv(path, data) else 2)
    if image.format == "PNG":
        Image.open(io.BytesIO(data)).verify()  # its checksums
    elif image.format in ("BMP", "GIF"):
        image.load()  # writers of BMP don't agree on the length in the header
    elif image.format == "TIFF" and len(data) < tiff_length(image):
        raise OSError("image file is truncated")
    if image.mode in ("I", "F"):
        refuse_float(path, data)
    return stored_size(image)


def first_corner(mask):
    """Return the side of the smallest square at the top left of a mask (H, W) that holds a 1, in pixels; 0 for none."""
    rows = np.flatnonzero(mask.any(axis=1))
    return int(np.maximum(rows, mask[rows].argmax(axis=1)).min()) + 1 if len(rows) else 0


def read_cache(cache):
    """Return (names, SCAN_DTYPE rows) of a file that `scan` has written; none where it isn't there or broken."""
    with contextlib.suppress(Exception):  # a broken one raises many types
        if os.path.isfile(cache):  # reading a pipe would never end
            with np.load(cache) as stored:
                if all(info.compress_type == 0 for info in stored.zip.infolist()):  # what is packed may unpack for ever
                    names, rows = stored["files"].tobytes(), stored["rows"]
                    if rows.dtype == SCAN_DTYPE and rows.shape == (names.count(b"\0") + 1,):
                        return names, rows
    return b"", np.zeros(0, SCAN_DTYPE)


def scan(path, images, masks, progress=True):
    """Return two arrays of SCAN_DTYPE rows, for the images and for the masks of the dataset at `path`.

    Rows are kept in `.<name>.scan.npz` beside the dataset (inside it, for a folder), and a file is read again when its
    size or time of change differs. The cache is a convenience: where it can't be written the scan works all the same.
    """
    path, files = Path(path), [*images, *masks]
    cache = path / ".scan.npz" if path.is_dir() else path.with_name(f".{path.name}.scan.npz")
    rows, listing = np.zeros(len(files), SCAN_DTYPE), os.fsencode("\0".join(files))
    known_listing, known = read_cache(cache)
    if known_listing == listing:
        rows = known
    else:
        places = {name: i for i, name in enumerate(known_listing.split(b"\0"))} if len(known) else {}
        for i, name in enumerate(listing.split(b"\0")):
            if name in places:
                rows[i] = known[places[name]]
    try:
        now = np.fromiter(((status.st_size, status.st_mtime_ns) for status in map(os.stat, files)), "2i8", len(files))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Fix the file or take it out of the dataset.") from None
    is_mask = np.arange(len(files)) >= len(images)
    stale = np.flatnonzero((rows["size"] != now[:, 0]) | (rows["mtime"] != now[:, 1])
                           | is_mask & (rows["corner"] < 0))
    if not len(stale):
        return rows[:len(images)], rows[len(images):]
    with (concurrent.futures.ThreadPoolExecutor(min(8, usable_cpus())) as pool,
          log.Progress(f"reading {path}", len(stale), progress, "files") as bar):
        for start in range(0, len(stale), 1000):  # all at once, the pool would hold an object for each of millions
            some = stale[start:start + 1000]
            for i, row in zip(some, pool.map(scan_file, [files[i] for i in some], is_mask[some])):
                rows[i] = row
                bar.update()
    try:
        partial = cache.with_name(f"{cache.name}.{os.getpid()}.npz")
        np.savez(partial, files=np.frombuffer(listing, np.uint8), rows=rows)
        os.replace(partial, cache)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        log.say(f"note: {cache} can't be written, so the files will be read again next time")
    return rows[:len(images)], rows[len(images):]


def check_sizes(image_paths, mask_paths, image_rows, mask_rows):
    """Raise UserError, with their number, where masks fit their images neither as stored nor as EXIF turns these."""
    same = (image_rows["height"] == mask_rows["height"]) & (image_rows["width"] == mask_rows["width"])
    swapped = (image_rows["height"] == mask_rows["width"]) & (image_rows["width"] == mask_rows["height"])
    turned = swapped & (image_rows["orientation"] > 4)
    wrong = np.flatnonzero(~(same | turned))
    if len(wrong):
        i = wrong[0]
        raise UserError(f"{counted(len(wrong), 'mask')} of another size than the image, first {image_paths[i]} "
                        f"({image_rows['height'][i]}x{image_rows['width'][i]} pixels, height x width) and "
                        f"{mask_paths[i]} ({mask_rows['height'][i]}x{mask_rows['width'][i]}): "
                        "fix or remove them (python tools/check_data.py lists all).")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


NOT_COMPUTED = "not computed"  # in place of a fingerprint


class Facts(NamedTuple):
    """What the files of a dataset tell; None where they were not read."""

    tampered: int  # masks that mark something
    larger: Optional[int]  # images of which a side is above image_size
    lost: Optional[int]  # tampered images whose whole mask is outside of the top left image_size x image_size
    fingerprint: str


def name_of(function):
    """Return the name of a function, or the class of a method or an object; those of what a functools.partial calls."""
    function = getattr(function, "func", function)
    owner = getattr(function, "__self__", function)
    return function.__name__ if inspect.isfunction(function) else type(owner).__name__


@contextlib.contextmanager
def blame(function, name):
    """Turn an exception of a user's function into a UserError that names it and the image.

    Of an albumentations pipeline the transform that failed is named.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from albumentations import BasicTransform  # takes seconds where it isn't there yet
        selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        failed = [each for each in selves if isinstance(each, BasicTransform)] or [function]
        words = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{name}: {name_of(failed[-1])} failed ({type(error).__name__}{': ' * bool(words)}{words}). "
                        "IMDL_TRACEBACK=1 shows where.") from error


class ImageDataset(Dataset):
    """Images with masks, one sample an image; the kinds below differ only in how they find the files.

    A sample is a dict of NumPy arrays: image (S, S, 3) uint8 RGB, mask (S, S) uint8 0/1, edge_mask likewise if asked
    for, label, shape, original_shape, origin_shape ((H, W) of the valid area, of the file, after augmentation), name,
    index, and whatever the model's post function adds.

    Args:
        path: folder or JSON (see `open_dataset`)
        image_size: S in pixels
        padding: pad (and crop) to S x S instead of resizing
        edge_mask_width: width of the boundary band in pixels, None = no edge_mask
        transform: albumentations pipeline for training, drawn again for each (seed, epoch, image) whatever the worker
            or rank
        post_func: the model's post function
        attacks: list of (strength, transform); a sample is then a list with one dict per strength
        fingerprint: read all files and compute `fingerprint`; checks every file's header and the sizes of all pairs
        progress: show how far that reading is
    """

    def __init__(self, path, image_size=512, padding=False, edge_mask_width=None, transform=None, post_func=None,
                 attacks=None, seed=0, fingerprint=True, progress=True):
        self.path, self.image_size, self.padding, self.seed = str(path), image_size, padding, seed
        self.transform, self.post_func, self.attacks, self.progress = transform, post_func, attacks, progress
        cross = (edge_mask_width, edge_mask_width)
        self.edge_kernel = edge_mask_width and cv2.getStructuringElement(cv2.MORPH_CROSS, cross)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.keep_masks = False  # True adds whole_mask (H, W), the mask as read, to each sample
        names, images, masks = self.find(path)
        if not names:
            raise UserError(f"{path} holds no image ({' '.join(sorted(IMAGE_SUFFIXES))}).")
        # What only the files tell: before, a mask counts as one that marks something.
        unread = Facts(sum(map(bool, masks)), None, None, NOT_COMPUTED)
        self.facts = self.read_files(images, masks) if fingerprint else unread
        self.fingerprint = self.facts.fingerprint
        # One array of bytes each, which forked workers share; a list of str would be copied as it is read.
        self.names, self.images, self.masks = (np.array([os.fsencode(text) for text in texts], dtype=bytes)
                                               for texts in (names, images, masks))

    @staticmethod
    def find(path):
        """Return three lists: names of the images as listed, their paths, and the masks' paths ("": no mask)."""
        raise NotImplementedError

    def read_files(self, images, masks):
        """Return the Facts of some images and their masks ("": none).

        The fingerprint is 12 hexadecimal digits of the names, sizes and contents of all pairs, wherever the dataset
        lies. Raises UserError for broken files and for masks of another size than their images.
        """
        with_mask = [i for i, mask in enumerate(masks) if mask]
        image_rows, mask_rows = scan(self.path, images, [masks[i] for i in with_mask], self.progress)
        check_sizes([images[i] for i in with_mask], [masks[i] for i in with_mask], image_rows[with_mask], mask_rows)

        def lines(paths, rows):
            return [f"{os.path.basename(path)} {size} {digest.decode(errors='replace')}" for path, size, digest in
                    zip(paths, rows["size"].tolist(), rows["digest"].tolist())]

        pairs = lines(images, image_rows)
        for i, line in zip(with_mask, lines([masks[i] for i in with_mask], mask_rows)):
            pairs[i] += f" {line}"
        digest = hashlib.blake2b(os.fsencode("\n".join(sorted(pairs))), digest_size=6).hexdigest()
        larger = np.maximum(image_rows["height"], image_rows["width"]) > self.image_size
        return Facts(np.count_nonzero(mask_rows["corner"]), np.count_nonzero(larger),
                     np.count_nonzero(mask_rows["corner"] > self.image_size), digest)

    def describe(self):
        """Return the line that a run prints about the dataset."""
        cropped = ""
        if self.padding and self.facts.larger != 0:
            larger, lost = self.facts.larger, self.facts.lost
            cropped = (f"; {'those' if larger is None else larger} larger than {self.image_size}x{self.image_size} "
                       f"{'is' if larger == 1 else 'are'} cropped")
            cropped += f", {lost} of them {'loses its' if lost == 1 else 'lose their'} whole mask" if lost else ""
        return (f"{type(self).__name__} {visible(self.path)}: {self.describe_labels()}, fingerprint {self.fingerprint}"
                f"{cropped}")

    def describe_labels(self):
        """Return the numbers of images for `describe`."""
        return (f"{counted(len(self.images), 'image')}, {self.facts.tampered} tampered, "
                f"{len(self.images) - self.facts.tampered} authentic")

    def __len__(self):
        return len(self.images)

    def epoch_indices(self, rng):
        """Return the indices that one epoch visits, in order, drawn from a NumPy generator."""
        return rng.permutation(len(self.images))

    def read(self, index):
        """Return what `read_pair` gives for one image."""
        return read_pair(os.fsdecode(self.images[index]), os.fsdecode(self.masks[index]) or None)

    def __getitem__(self, index):
        image, mask, turned = self.read(index)
        info = {"name": os.fsdecode(self.names[index]), "path": os.fsdecode(self.images[index]),
                "index": np.int64(index), "original_shape": np.array(image.shape[:2]), "pristine": not turned}
        if self.transform is not None and self.attacks is None:
            rng = np.random.default_rng([self.seed, int(self.epoch), index])
            with blame(self.transform, info["name"]):
                self.transform.set_random_seed(int(rng.integers(2**31)))
                augmented = self.transform(image=image, mask=mask)
                image, mask, info["pristine"] = augmented["image"], augmented["mask"], False
                if image.dtype != np.uint8 or image.shape != (*mask.shape, 3):
                    raise UserError(f"the augmentation returned {image.dtype} {tuple(image.shape)} for {info['name']}; "
                                    "it must return a uint8 image (H, W, 3) and a mask of its size: leave out "
                                    "Normalize and ToTensorV2, as images are normalised later.")
        info["label"] = np.int64(mask.any())
        if self.keep_masks:
            info["whole_mask"] = mask
        maps = {"mask": mask}
        if self.edge_kernel is not None:  # on the image's own pixels, as published: before resizing or padding
            maps["edge_mask"] = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, self.edge_kernel)
        if self.attacks is None:
            return self.finish(image, maps, info)
        file = os.path.basename(info["name"])
        samples = []
        for strength, transform in self.attacks:
            with blame(transform, info["name"]):
                attacked = transform(image, file)
            samples.append(self.finish(attacked, maps, {**info, "pristine": info["pristine"] and not strength}))
        return samples

    def finish(self, image, maps, info):
        """Bring an image and its maps (mask, edge_mask) to S x S, add shapes, and call the post function."""
        size, shape = self.image_size, np.array(image.shape[:2])
        sample = {"image": image, **maps, **info, "origin_shape": shape, "shape": np.array((size, size))}
        if self.padding:
            sample |= {key: self.pad(sample[key]) for key in ("image", *maps)}
            sample |= {"shape": np.minimum(shape, size), "padded": True}
        elif image.shape[:2] != (size, size):
            sample["image"] = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
            sample |= {key: cv2.resize(each, (size, size), interpolation=cv2.INTER_NEAREST)
                       for key, each in maps.items()}
            sample["pristine"] = False
        if self.post_func is not None:
            with blame(self.post_func, info["name"]):
                sample.update(self.post_func(sample) or {})  # it may change the sample in place, or return a dict
        for key in ("path", "pristine"):
            sample.pop(key, None)
        return sample

    def pad(self, pixels):
        """Return the top-left S x S of an array, black where it is smaller."""
        size = self.image_size
        padded = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
        padded[:pixels.shape[0], :pixels.shape[1]] = pixels[:size, :size]
        return padded


class ManiDataset(ImageDataset):
    """A folder with tampered images in Tp/ and their masks in Gt/, paired by name."""

    @staticmethod
    def find(path):
        images, masks = list_images(os.path.join(path, "Tp")), list_masks(os.path.join(path, "Gt"))
        pairs, lone_images, lone_masks = pair_by_name(images, masks)
        if not pairs and images and len(images) == len(masks):
            pairs, lone_images, lone_masks = pair_by_order(path, images, masks), [], []
            log.say(f"warning: {path}: no name in Gt/ fits a name in Tp/, so the files are paired by dictionary order; "
                    f"check that {images[0]} belongs to {masks[0]}")
        if lone_images or lone_masks:
            raise UserError(f"{path}: " + " and ".join(
                f"{counted(len(lone), noun)} {what}: {', '.join(lone[:10])}{' ...' if len(lone) > 10 else ''}"
                for lone, noun, what in ((lone_images, "image", "in Tp/ without a mask in Gt/"),
                                         (lone_masks, "mask", "without an image")) if lone)
                + ". Add what is missing or move these files away.")
        names = [os.path.join(path, "Tp", image) for image, _ in pairs]
        return names, names, [os.path.join(path, "Gt", mask) for _, mask in pairs]


class JsonDataset(ImageDataset):
    """A JSON list of [image, mask or "Negative"]."""

    @staticmethod
    def find(path):
        pairs, folder, missing = read_pairs(path, of_sets=False), os.path.dirname(os.path.abspath(path)), []

        def locate(file):  # as `resolve_path` does, with one look at the disk for most files
            near = os.path.join(folder, file)
            if exists(near):
                return near
            found = resolve_path(path, file)
            if not exists(found):
                missing.append(file)
            return found

        names = [image for image, _ in pairs]
        images = [locate(image) for image in names]
        masks = ["" if mask == "Negative" else locate(mask) for _, mask in pairs]
        for file in missing[:5]:
            for word in ("Negative", "ManiDataset", "JsonDataset"):
                if difflib.get_close_matches(file.lower(), [word.lower()], 1, 0.8):
                    raise UserError(f"{path}: {file!r} is no file. Did you mean {word!r}? {JSON_FORMS}")
        if missing:
            raise UserError(f"{path} names {counted(len(missing), 'file')} that can't be found: "
                            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Relative paths are taken "
                            "from the JSON's folder, then from the working directory.")
        return names, images, masks


class FolderDataset(ImageDataset):
    """A plain folder of images, unlabelled: masks are black and labels 0. Without what lies below the folders of
    `leave_out`, where a run writes."""

    def __init__(self, path, leave_out=(), **options):
        self.leave_out = leave_out
        super().__init__(path, **options)

    def find(self, path):
        images, real = [os.path.join(path, image) for image in list_images(path)], Path(path).resolve()
        for folder in self.leave_out:
            if (output := Path(folder).resolve()).is_relative_to(real):
                kept = [image for image in images if not Path(image).resolve().is_relative_to(output)]
                if len(kept) < len(images):
                    count = counted(len(images) - len(kept), "image")
                    log.say(f"note: {count} in {folder}, where this run writes, left out of {path}")
                images = kept
        return images, images, [""] * len(images)

    def describe_labels(self):
        oriented = sum(orientation_in(os.fsdecode(path)) > 1 for path in self.images if os.path.isfile(path))
        return f"{counted(len(self), 'image')}, unlabelled" + (
            f", {oriented} of them with an EXIF orientation, which is not applied: masks are as stored" if oriented
            else "")


class FilesDataset(FolderDataset):
    """Image files one by one, unlabelled; `path` is the list of them."""

    def __init__(self, path, **options):
        super().__init__(path, **{**options, "fingerprint": False})  # whose cache would lie among a user's photos
        self.path = path[0] + ", ..." * (len(path) > 1)

    @staticmethod
    def find(path):
        for file in path:
            if not exists(file):
                raise UserError(f"{file}: no such file.")
            if os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES or os.path.isdir(file):
                raise UserError(f"{file} is no image file: give one dataset or folder alone, or several image files "
                                f"({' '.join(sorted(IMAGE_SUFFIXES))}).")
        return path, path, [""] * len(path)


class BalancedDataset(ImageDataset):
    """A JSON list of ["ManiDataset" | "JsonDataset", path]: every epoch visits `sample_number` images of each set.

    They are drawn without replacement and differently each epoch; of a smaller set every image comes equally often,
    give or take one. IMDL-BenCo's Protocol-CAT draws as many, but with replacement.
    """

    def __init__(self, path, sample_number=1840, fingerprint=True, **options):
        self.sample_number = sample_number
        super().__init__(path, fingerprint=fingerprint, **options)
        self.members = []  # the describing line of each set
        for name, start, end in zip(self.paths, self.ends, self.ends[1:]):
            images, masks = (list(map(os.fsdecode, texts[start:end])) for texts in (self.images, self.masks))
            facts = self.read_files(images, masks) if fingerprint else None
            tampered, own = (facts.tampered, facts.fingerprint) if facts else (sum(map(bool, masks)), NOT_COMPUTED)
            self.members.append(f"  {name}: {counted(end - start, 'image')}, {tampered} tampered, "
                                f"{end - start - tampered} authentic, fingerprint {own}"
                                + (", repeated within an epoch" if end - start < sample_number else ""))

    def find(self, path):
        names, images, masks, self.ends, self.paths = [], [], [], [0], []
        for kind, member in read_pairs(path, of_sets=True):
            member = resolve_path(path, member)
            try:
                found_kind = dataset_kind(member)
                if found_kind != kind:
                    raise UserError(f"{member} as a {kind}, but it is a {found_kind}. Fix the JSON.")
                for total, part in zip((names, images, masks), KINDS[kind].find(member)):
                    total.extend(part)
            except UserError as error:
                raise UserError(f"{path} names {error}") from None
            self.ends.append(len(names))
            self.paths.append(member)
        return names, images, masks

    def __len__(self):
        return self.sample_number * (len(self.ends) - 1)

    def describe(self):
        return "\n".join([f"{super().describe()}; {len(self)} drawn per epoch", *self.members])

    def epoch_indices(self, rng):
        drawn = []
        for start, end in zip(self.ends, self.ends[1:]):
            rounds = -(-self.sample_number // (end - start))
            order = np.concatenate([rng.permutation(end - start) for _ in range(rounds)])
            drawn.append(start + order[:self.sample_number])
        return rng.permutation(np.concatenate(drawn))


KINDS = {kind.__name__: kind for kind in (ManiDataset, JsonDataset, FolderDataset, BalancedDataset)}
FORMS = {"ManiDataset": "a folder with Tp/ and Gt/", "JsonDataset": "a JSON list of [image, mask]",
         "BalancedDataset": "a JSON of balanced sets", "FolderDataset": "a folder of images"}


def open_dataset(path, flag, allowed=("ManiDataset", "JsonDataset"), sample_number=1840, leave_out=(), **options):
    """Open the one dataset that a path means; errors name the command line's `flag`.

    `sample_number` goes to a BalancedDataset, `leave_out` to a FolderDataset, `options` to any.
    """
    try:
        kind = dataset_kind(path)
        if kind not in allowed:
            words = {"FolderDataset": "a folder without Tp/ and Gt/", "several": "a JSON of several sets"}
            what = words.get(kind, f"a {kind}") + (near_dataset(path) if kind == "FolderDataset" else "")
            raise UserError(f"{path} is {what}, which can't be used here. Give "
                            f"{' or '.join(FORMS[kind] for kind in allowed)}.")
        own = {"BalancedDataset": {"sample_number": sample_number}, "FolderDataset": {"leave_out": leave_out}}
        return KINDS[kind](path, **own.get(kind, {}), **options)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def near_dataset(path):
    """Return what a folder that is no dataset nearly was: " (did you mean ...?)", or ""."""
    path = Path(path).resolve()
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir())
    for folder in (path.parent, *inside):
        if (folder / "Tp").is_dir() and (folder / "Gt").is_dir():
            return f" (did you mean {folder}?)"
    wrong_case = [entry.name for entry in inside if entry.name.lower() in ("tp", "gt")]
    return f" (rename {' and '.join(wrong_case)} to Tp and Gt?)" if wrong_case else ""


def folder_names(names):
    """Return a list with a safe name for a folder for each of some distinct texts; no two are equal in lower case.

    One without separators and unprintable characters, neither "." nor ".." nor empty, not that of a file of a run, and
    of 200 bytes or little more.
    """
    found = {}
    for name in names:
        name = "".join(each if each.isprintable() and each not in "/\\" else "_" for each in name)
        name = name.encode()[:200].decode(errors="ignore").strip(". ") or "test"
        name += "_" * name.lower().endswith((".csv", ".json", ".pth", ".txt"))
        numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        name = next(each for each in numbered if each.lower() not in found)
        found[name.lower()] = name
    return [*found.values()]


def open_sets(path, flag, **options):
    """Open one dataset, to be named after its file or folder, or a JSON object of several; return {name: dataset}."""
    try:
        members = read_sets(path) if dataset_kind(path) == "several" else None
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if members is None:
        full = Path(path).resolve()
        name, = folder_names([full.name if full.is_dir() else full.stem])
        return {name: open_dataset(path, flag, **options)}
    return {safe: open_dataset(resolve_path(path, member), f"{flag} {path}, set {name!r}", **options)
            for safe, (name, member) in zip(folder_names(members), members.items())}


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class TrainBatches:
    """Batch sampler: every index of an epoch exactly once over all ranks, in batches as even as possible.

    No batch exceeds `batch_size`, and all ranks make the same number of steps, as gradient averaging needs. Only where
    images can't be dealt out evenly (fewer of them than steps x ranks) are the first ones visited twice. The order
    depends on (seed, epoch) alone.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world_size=1):
        self.dataset, self.seed, self.rank, self.world_size = dataset, seed, rank, world_size
        self.epoch = self.first_step = 0
        self.steps = -(-len(dataset) // (batch_size * world_size))

    def set_epoch(self, epoch, first_step=0):
        """Choose the epoch that the next iteration draws, and the step that it begins with."""
        self.epoch, self.first_step = epoch, first_step
        self.dataset.epoch.fill_(epoch)

    def __len__(self):
        return self.steps

    def __iter__(self):
        indices = self.dataset.epoch_indices(np.random.default_rng([self.seed, self.epoch]))
        count = self.steps * self.world_size
        if len(indices) < count:
            indices = np.resize(indices, count)
        edges = np.arange(count + 1) * len(indices) // count
        for step in range(self.first_step, self.steps):
            batch = step * self.world_size + self.rank
            yield indices[edges[batch]:edges[batch + 1]].tolist()


def collate(samples, post_func=None):
    """Stack samples to a batch of tensors; lists of samples (one dict per attack strength) to a list of batches."""
    if isinstance(samples[0], list):
        batch = [stack(version, post_func) for version in zip(*samples)]
    else:
        batch = stack(samples, post_func)
    return batch if get_worker_info() is None else Parcel(batch)


def stack(samples, post_func):
    """Stack dicts of equal keys and shapes; UserError, which blames the post function, where they aren't equal."""
    batch = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        try:
            values = [sample[key] for sample in samples]
            if key == "whole_mask":  # of any size
                batch[key] = values
                continue
            are_arrays = isinstance(values[0], np.ndarray)
            batch[key] = torch.from_numpy(np.stack(values)) if are_arrays else default_collate(values)
        except Exception as error:
            if post_func is None:  # all else has the same form in every sample
                raise
            found = "; ".join(f"{sample['name']}: {describe_value(sample, key)}" for sample in samples[:4])
            raise UserError(f"the post function {name_of(post_func)} gives {key!r} in a form that can't be stacked to "
                            f"a batch ({found}). Give it the same shape and type for every image.") from error
    return batch


def describe_value(sample, key):
    """Return a sample's value in few words: type and shape."""
    if key not in sample:
        return "none"
    shape = getattr(sample[key], "shape", None)
    return type(sample[key]).__name__ + (f" {tuple(shape)}" if shape is not None else "")


class Parcel:
    """A batch on its way out of a worker, with its arrays in one piece of shared memory.

    As tensors each would be a piece of its own, and every piece costs the receiver a file descriptor for as long as the
    tensor lives. Arrays below 4 KiB travel as bytes, so that keeping one of them doesn't keep the images. The memory is
    filled here, as an error in the thread that sends is never told and leaves the receiver waiting.
    """

    def __init__(self, batch):
        stream, buffers = io.BytesIO(), []
        pickler = pickle.Pickler(stream, 5,
                                 buffer_callback=lambda each: each.raw().nbytes < 4096 or buffers.append(each))
        pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: reduce_tensor}
        pickler.dump(batch)
        self.stream, self.spans, end = stream.getvalue(), [], 0
        for buffer in buffers:
            self.spans.append((end, end + buffer.raw().nbytes))
            end = -(-self.spans[-1][1] // 64) * 64  # keeps every type aligned
        self.memory = torch.empty(end, dtype=torch.uint8).share_memory_()
        for (start, stop), buffer in zip(self.spans, buffers):
            self.memory.numpy()[start:stop] = buffer.raw()

    def __reduce__(self):
        return unpack, (self.stream, self.memory, self.spans)


def reduce_tensor(tensor):
    """Make pickle take a tensor for an array, unless NumPy doesn't know its type."""
    try:
        return torch.from_numpy, (tensor.numpy(),)
    except (TypeError, RuntimeError):
        return tensor.__reduce_ex__(5)


def unpack(stream, memory, spans):
    """Return the batch of a `Parcel`; its large tensors are parts of `memory`."""
    return pickle.loads(stream, buffers=[memory.numpy()[start:stop] for start, stop in spans])


class Loader(DataLoader):
    """A DataLoader that tells a machine's limits from mistakes of code: UserError with the cure."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except (OSError, RuntimeError, UserError) as error:
            if cure := limit_of(error):
                raise UserError(f"--num_workers {self.num_workers}: {cure}") from error
            raise


def raise_file_limit(num_workers):
    """Allow this process and its workers as many open files as the system lets it; UserError where those can't do."""
    try:
        import resource  # not on Windows
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, ValueError, OSError):  # macOS refuses "unlimited"
        return
    if hard != resource.RLIM_INFINITY and hard < 32 + 8 * num_workers:  # as measured
        raise UserError(f"--num_workers {num_workers}: {hard} open files, which is all that is allowed here, are too "
                        "few for so many processes. Raise the limit (ulimit -n 4096), or lower --num_workers.")


def start_worker(number):
    """Make a forked worker end with its parent, on Linux; elsewhere torch has it notice within 5 seconds."""
    if sys.platform == "linux" and multiprocessing.get_start_method() == "fork":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def make_loader(dataset, batches, num_workers, pin_memory, persistent=False):
    """Return a DataLoader over a batch sampler; `persistent` workers outlive an epoch."""
    num_workers = min(num_workers, len(batches))
    if num_workers:
        raise_file_limit(num_workers)
    generator = torch.Generator().manual_seed(0)  # its own, so that loading never disturbs the run's random states
    return Loader(dataset, batch_sampler=batches, num_workers=num_workers, generator=generator,
                  collate_fn=functools.partial(collate, post_func=getattr(dataset, "post_func", None)),
                  worker_init_fn=start_worker, persistent_workers=persistent and num_workers > 0,
                  pin_memory=pin_memory and torch.cuda.is_available())


def eval_loader(dataset, batch_size, num_workers, pin_memory, rank=0, world_size=1):
    """Return a loader over this rank's share of a dataset: the indices rank, rank + world_size, ... in order."""
    batches = BatchSampler(range(rank, len(dataset), world_size), batch_size, drop_last=False)
    return make_loader(dataset, batches, num_workers, pin_memory)


@functools.lru_cache
def normalisation(device):
    """Return the (1, 3, 1, 1) mean of pixels in 0..255 and the factor after it.

    They are made once per device, since every new tensor from the host stops the GPU's queue.
    """
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return mean.to(device), (1 / std).to(device)


def to_device(batch, device):
    """Move a batch to the device and give it the types that models expect.

    image becomes normalised float32 (B, 3, H, W), mask and edge_mask float32 (B, 1, H, W); padded images also get their
    shape_mask, float32 (B, 1, H, W). The loader's own "index" and "whole_mask" are left out, other entries keep their
    types.
    """
    padded = "padded" in batch
    batch = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
             for key, value in batch.items() if key not in ("index", "padded", "whole_mask")}
    mean, scale = normalisation(device)
    batch["image"] = batch["image"].permute(0, 3, 1, 2).contiguous().float().sub_(mean).mul_(scale)
    for key in ("mask", "edge_mask"):
        if key in batch:
            batch[key] = batch[key].float().unsqueeze(1)
    if padded:
        height, width = batch["image"].shape[-2:]
        rows = torch.arange(height, device=device).view(1, 1, -1, 1) < batch["shape"][:, 0].view(-1, 1, 1, 1)
        columns = torch.arange(width, device=device).view(1, 1, 1, -1) < batch["shape"][:, 1].view(-1, 1, 1, 1)
        batch["shape_mask"] = (rows & columns).float()
    return batch


def denormalise(image):
    """Return the RGB values in 0..1 of a normalised (B, 3, H, W) image."""
    mean, scale = normalisation(image.device)
    return ((image.float() / scale + mean) / 255).clamp(0, 1)


def restore_size(pred, shape, original, padding):
    """Bring a map (S, S) float32 back to the image's original (H, W).

    Padding is cut off, and what padding mode had cropped away is 0; otherwise it is resized bilinearly.
    """
    height, width = original
    if padding:
        full = np.zeros((height, width), np.float32)
        full[:shape[0], :shape[1]] = pred[:shape[0], :shape[1]]
    else:
        full = cv2.resize(pred, (width, height), interpolation=cv2.INTER_LINEAR)
    return full


def dataset_options(args, post_func, fingerprint):
    """Return the keyword arguments that a script opens its datasets with.

    Raises UserError unless one of the two fittings, resizing and padding, is chosen.
    """
    if args.if_resizing == args.if_padding:
        raise UserError("give exactly one of --if_resizing (resize to --image_size) and --if_padding (pad with black, "
                        "crop what is larger).")
    return dict(image_size=args.image_size, padding=args.if_padding, edge_mask_width=args.edge_mask_width,
                post_func=post_func, seed=args.seed, fingerprint=fingerprint and not args.no_fingerprint,
                progress=not args.no_progress)
