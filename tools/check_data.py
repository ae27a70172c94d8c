"""Find every fault of datasets before a run meets it: broken files, wrong masks, wrong pairs, leaks between sets.

    python tools/check_data.py my_set
    python tools/check_data.py train.json test_datasets.json --if_padding --image_size 1024 --contact_sheet sheet.png

Every image and mask is decoded. A fault would break or falsify a run and gives exit code 1; a remark is only odd. Sets
given as separate paths, or as members of one {name: path} JSON, are also compared: an image that two of them share is
a leak. Writes all findings to report.json and, if asked to, the images with the outlines of their masks to a PNG.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import threading
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from data import (BAD_CHECKSUM, binary_mask, dark_mask, dataset_kind, decode, has_bad_checksum, list_images, list_masks,
                  mask_pixels, open_pillow, orientation_of, pair_by_name, read_bytes, read_image, read_json, read_mask,
                  read_pairs, read_sets, resolve_path)
from log import Progress, say, write_file
from registry import ROOT, Parser, UserError, counted, exit_on_user_error, positive, visible

FAULT, REMARK = "fault", "remark"


class Finding(NamedTuple):
    """One thing that is wrong or odd."""

    kind: str
    severity: str  # FAULT or REMARK
    files: list  # of paths
    text: str  # one sentence


class CheckedSet(NamedTuple):
    """One set of images; the lists have one entry per image."""

    name: str
    path: str
    group: tuple  # sets of different groups must not share images; the parts of a BalancedDataset have one group
    images: list  # of paths
    masks: list  # of paths, "" for none
    roles: list  # 1 tampered, 0 authentic, -1 unknown (a plain folder)


RECORD = np.dtype([  # what is kept of each image
    ("height", "i4"), ("width", "i4"),  # pixels; 0: unreadable
    ("area", "f4"),         # tampered share of the mask; nan: no mask
    ("quality", "i2"),      # JPEG quality; 0: no JPEG
    ("agree", "i1"),        # whether image and mask have one size: 1 yes, -1 no, 0 not known
    ("digest", "u8"),       # of the file; 0: none
    ("mask_digest", "u8"),  # of the binary mask; 0: none
    ("hash", "u8", 4),      # perceptual hash
])

# The perceptual hash: of the 256 lowest frequencies (lowest first) of a 64 x 64 DCT without the mean, those above NOISE
# are the bits set. Measured on CASIA v1 and crops of photographs: JPEG quality 70 with 10 % resizing changes up to 10 %
# of the bits set in either (nearest-neighbour resizing up to 30 %), other images differ in more than half of them.
FREQUENCIES = tuple(np.array(sorted(np.ndindex(24, 24), key=lambda f: (sum(f), f))[1:257]).T)
NOISE = 15.0           # what compression changes in a coefficient; without it the hash of a smooth image is noise
ENOUGH_BITS = 16       # an image with fewer bits set (clear sky) is too flat to be compared
HASH_DIFFERENCE = 0.3  # share of differing bits up to which a pair is worth comparing
SAME_SCENE = 0.9       # correlation of the 64 x 64 thumbnails from which two images show the same scene
# Grey levels, mean over 3 x 3 pixels of the thumbnails, below which nothing was edited: 8 after JPEG quality 70 with
# 10 % resizing (26 with nearest-neighbour resizing), 34 by the mildest tampering of 24 CASIA v1 images.
LOCAL_CHANGE = 24.0


def fault(kind, files, text):
    """Return a Finding that makes the command fail."""
    return Finding(kind, FAULT, files, text)


def remark(kind, files, text):
    """Return a Finding that does not."""
    return Finding(kind, REMARK, files, text)


# ---------------------------------------------------------------------------------------------------------------------
# One image and its mask, in a worker process


def open_checked(path, read, found):
    """Return (pixels, PIL image for its header or None, bytes as uint8); or None, with a finding that says why.

    `read` decodes as a run does: it is called as read(path, bytes, on_damage=...).
    """
    def damaged(path, words):
        found.append(fault("damaged file", [path], f"some of its pixels may be wrong ({words}): copy the file again "
                           "or leave it out."))

    try:
        data = read_bytes(path)
        pixels = read(path, data, on_damage=damaged)
        if has_bad_checksum(data):
            damaged(path, BAD_CHECKSUM)
    except UserError as error:
        size = os.path.getsize(path) if os.path.isfile(path) else None
        kind = ("missing file" if not os.path.exists(path) else "empty file" if size == 0 else
                "truncated file" if "is truncated" in str(error) else "unreadable file")
        found.append(fault(kind, [path], str(error).removeprefix(str(path)).lstrip(": ")))
        return None
    try:
        return pixels, open_pillow(path, data, weight=1), data
    except Exception:  # PIL raises many types; the pixels could be read
        return pixels, None, data


def ignore(*args):
    """Say nothing about damage: `open_checked` has."""


def small_digest(content):
    """Return a digest of 64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def thumbnail(pixels):
    """Return an RGB image in grey, float32 (64, 64)."""
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)


@functools.cache
def quality_sums():
    """Return the sums of libjpeg's luminance quantisation tables of quality 1 to 100, int (100,)."""
    sums = []
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
        sums.append(sum(Image.open(file).quantization[0]))
    return np.array(sums)


def inspect_sizes(image, mask, shape, mask_shape, orientation, found):
    """Compare the sizes of a pair (mask_shape None: no mask), stored and turned by EXIF; returns RECORD's `agree`."""
    swapped = orientation > 4 and shape[0] != shape[1]
    agree = 0 if mask_shape is None else 1 if mask_shape == shape or (swapped and mask_shape == shape[::-1]) else -1
    if agree < 0:
        ratios = mask_shape[0] / shape[0], mask_shape[1] / shape[1]
        why = ("; the mask is turned by 90 degrees" if mask_shape == shape[::-1] else
               f"; the mask is scaled by {ratios[0]:.3g}" if abs(ratios[0] - ratios[1]) < 0.01 else "")
        found.append(fault("sizes differ", [image, mask], f"the image is {shape[0]}x{shape[1]} (height x width), its "
                           f"mask {mask_shape[0]}x{mask_shape[1]}{why}."))
    elif orientation > 1:
        text = ("is ignored when loading, as there is no mask to tell whether it applies" if agree == 0 else
                "keeps the size, so the mask can't tell whether it applies: it is ignored when loading; look at the "
                "image" if not swapped else
                "is ignored when loading, since the mask fits the image as stored" if mask_shape == shape else
                "is applied when loading, since only the turned image fits the mask")
        found.append(remark("EXIF orientation", [image], f"the EXIF orientation {orientation} {text}."))
    return agree


def inspect_mask(path, found):
    """Judge the mask of a tampered image; returns it as loaded, uint8 0/1 (H, W), or None if it can't be read."""
    opened = open_checked(path, mask_pixels, found)
    if not opened:
        return None
    pixels, header, _ = opened
    binary, has_palette = binary_mask(pixels), header is not None and header.mode == "P"
    if not binary.any():
        why = dark_mask(pixels)
        if not why:
            found.append(remark("mask all black", [path], "no pixel is marked, so the image counts as authentic."))
            return binary
        kind = "palette mask" if has_palette else "mask 0/1" if pixels.max() == 1 else "mask too dark"
        why = f"the colours of its palette are too dark: {why}" if has_palette else why
        found.append(fault(kind, [path], f"{why}, so it counts as empty, which a run refuses: save it with 0 and 255."))
        return binary
    if binary.all():
        found.append(fault("mask all white", [path], "every pixel is marked as tampered."))
        return binary
    if has_palette:
        found.append(remark("palette mask", [path], "it has a palette; the colours are read, not the indices."))
    grey = (pixels >> 8 * (pixels.dtype == np.uint16)).astype(np.uint8)
    grey = cv2.cvtColor(grey, cv2.COLOR_BGR2GRAY) if grey.ndim == 3 else grey
    between = np.count_nonzero((grey >= 32) & (grey < 225)) / grey.size
    if between > 0.01:
        found.append(remark("grey mask", [path], f"{between:.1%} of the pixels are between 32 and 224."))
    # Large regions are legitimate (CASIA v1 has 70 %), so most of the frame must be white too.
    frame = np.concatenate([binary[0], binary[-1], binary[:, 0], binary[:, -1]]).mean()
    if binary.mean() > 0.5 and frame >= 0.8:
        found.append(remark("inverted-looking mask", [path], f"{binary.mean():.0%} of the mask and {frame:.0%} of its "
                            "border are white: should black be the tampered region?"))
    return binary


def inspect_pair(image, mask, crop):
    """Decode an image and its mask ("" for none); returns (findings, RECORD).

    `crop` is the side in pixels that --if_padding crops to, or None.
    """
    found, record, binary = [], np.zeros((), RECORD), None
    record["area"] = np.nan
    opened = open_checked(image, decode, found)
    if mask:
        binary = inspect_mask(mask, found)
    if binary is not None:
        record["area"] = binary.mean()
        record["mask_digest"] = small_digest(str(binary.shape).encode() + np.packbits(binary).tobytes())
    if opened:
        pixels, header, data = opened
        shape = pixels.shape[:2]
        record["height"], record["width"] = shape
        record["digest"] = small_digest(data)
        if tables := getattr(header, "quantization", None):
            record["quality"] = np.abs(quality_sums() - sum(next(iter(tables.values())))).argmin() + 1
        record["hash"] = np.packbits(cv2.dct(thumbnail(pixels))[FREQUENCIES] > NOISE).view(np.uint64)
        mask_shape = None if binary is None else binary.shape
        orientation = 1 if header is None else orientation_of(header)
        record["agree"] = agree = inspect_sizes(image, mask, shape, mask_shape, orientation, found)
        if crop and max(shape) > crop:
            gone = agree == 1 and binary.any() and not binary[:crop, :crop].any()
            found.append(Finding("tampering cropped away" if gone else "cropped", FAULT if gone else REMARK, [image],
                                 f"{shape[0]}x{shape[1]} is cropped to {crop} by --if_padding" +
                                 (", and the whole tampered region with it." if gone else ".")))
    return found, record


def read_thumbnail(path):
    """Return the thumbnail of an image file, uint8 (64, 64)."""
    return thumbnail(read_image(path, on_damage=ignore)).astype(np.uint8)  # grey values are whole numbers


def compare_thumbnails(a, b):
    """Return 2 if two thumbnails show one image, 1 for one scene with a local edit, 0 for different images."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if np.corrcoef(a.ravel(), b.ravel())[0, 1] < SAME_SCENE:
        return 0
    change = np.abs(cv2.blur((a - a.mean()) - (b - b.mean()), (3, 3))).max()
    return 2 if change < LOCAL_CHANGE else 1


def start_worker():
    """Begin a worker process: no warnings of libraries, and an end when the parent is killed (else it would stay)."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()


def map_parallel(function, *columns, label, progress):
    """Yield function(*row) for every row of `columns` (lists of one length), in order, from a process per core.

    Raises UserError if a process dies.
    """
    # Forked processes start at once; elsewhere than on Linux forking is unsafe, and the platform's own way is taken.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    total, done = len(columns[0]), 0
    with (concurrent.futures.ProcessPoolExecutor(mp_context=context, initializer=start_worker) as pool,
          Progress(label, total, progress) as bar):
        try:
            for result in pool.map(function, *columns, chunksize=16):
                yield result
                done += 1
                bar.update()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"{label}: a worker process died after {done} of {counted(total, 'image')}, because "
                            "memory ran out or a decoder crashed; check fewer images at a time to find which."
                            ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Which images and masks there are


def collect_sets(path, name, group, sets, found, above=()):
    """Add the CheckedSets of a dataset of any form to `sets`; what is wrong with the pairing goes to `found`.

    `above` are the JSONs that hold it, each of which might be it.
    """
    kind, above = dataset_kind(path), (*above, os.path.realpath(path))
    if above[-1] in above[:-1]:
        raise UserError(f"{path} holds itself.")
    if kind in ("several", "BalancedDataset"):
        members = read_sets(path).items() if kind == "several" else read_pairs(path, of_sets=True)
        for title, member in members:
            title = f"{name}: {title if kind == 'several' else member}"
            member_group = group + (title,) if kind == "several" else group
            try:
                collect_sets(resolve_path(path, member), title, member_group, sets, found, above)
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
        pairs = read_pairs(path, of_sets=False)
        images = [resolve_path(path, image) for image, _ in pairs]
        masks = ["" if mask == "Negative" else resolve_path(path, mask) for _, mask in pairs]
        roles = [int(mask != "") for mask in masks]
        check_names(name, images, masks, found)
    elif kind == "FolderDataset":
        images = [os.path.join(path, image) for image in list_images(path)]
        masks, roles = [""] * len(images), [-1] * len(images)
    else:
        images, masks = mani_pairs(path, name, found)
        roles = [1] * len(images)
    if not images:
        raise UserError(f"{path} holds no image.")
    sets.append(CheckedSet(name, path, group, images, masks, roles))


def mani_pairs(path, name, found):
    """Return (images, masks) of a ManiDataset, paired as the loader does it, with "" for the mask that is missing."""
    tampered, truth = os.path.join(path, "Tp"), os.path.join(path, "Gt")
    images, masks = list_images(tampered), list_masks(truth)
    try:
        pairs, lone_images, lone_masks = pair_by_name(images, masks)
    except UserError as error:
        found.append(fault("unclear pairs", [str(path)], str(error)))
        pairs, lone_images, lone_masks = [(image, "") for image in images], [], []
    if not pairs and images and len(images) == len(masks):
        pairs, lone_images, lone_masks = list(zip(images, masks)), [], []
        found.append(fault("paired by order", [os.path.join(tampered, images[0]), os.path.join(truth, masks[0])],
                           f"no name in Gt/ of {name} fits a name in Tp/: its {counted(len(images), 'pair')} agree in "
                           "nothing but their order; rename the masks, or list the pairs in a JSON."))
    for image in lone_images:
        found.append(fault("unpaired file", [os.path.join(tampered, image)], "an image in Tp/ without a mask."))
    for mask in lone_masks:
        found.append(fault("unpaired file", [os.path.join(truth, mask)], "a mask in Gt/ without an image."))
    pairs += [(image, "") for image in lone_images]
    images = [os.path.join(tampered, image) for image, _ in pairs]
    return images, [mask and os.path.join(truth, mask) for _, mask in pairs]


def name_tokens(path):
    """Return the words and numbers of a file's stem, without those that only say "mask" or "tampered"."""
    words = re.findall(r"[a-z]+|\d+", os.path.splitext(os.path.basename(path))[0].lower())
    idle = ("gt", "mask", "edgemask", "forged", "groundtruth", "msk", "mani", "jpg", "png")
    return tuple(word for word in words if word not in idle)


def check_names(name, images, masks, found):
    """Find pairs of a JSON whose names share nothing while other names of the set do.

    One name must begin with the words of the other (one mask may serve several images), or end with _B for _F
    (CoMoFoD). A pair that does not is a fault if another mask of the set carries the image's name. It is one, too, if
    its last numbers differ (CASIA's renamed files keep theirs) while most pairs of the same two folders agree in this
    or in that; tables of unrelated names (NIST16) are not judged.
    """
    def agree(pair):
        a, b = map(name_tokens, pair)
        return bool(a and b) and (a[:len(b)] == b or b[:len(a)] == a or (a[-1] == "f" and b == (*a[:-1], "b")))

    def same_number(pair):
        a, b = ([word for word in name_tokens(path) if word.isdigit()][-1:] for path in pair)
        return bool(a) and a == b

    def folders(pair):
        return tuple(map(os.path.dirname, pair))

    pairs = [pair for pair in zip(images, masks) if pair[1]]
    odd = [pair for pair in pairs if not agree(pair)]
    if not odd:
        return
    known = {(os.path.dirname(mask), name_tokens(mask)) for mask in masks if mask}
    strange = [pair for pair in odd if not same_number(pair)]
    count, strange_count = (collections.Counter(map(folders, some)) for some in (pairs, strange))
    for pair in odd:
        few = not same_number(pair) and strange_count[folders(pair)] < count[folders(pair)] / 2
        if few or (os.path.dirname(pair[1]), name_tokens(pair[0])) in known:
            found.append(fault("names do not match", list(pair), "the names of this pair share nothing, while others "
                               f"in {name} do: paired by order?"))


# ---------------------------------------------------------------------------------------------------------------------
# What only all images together show


def known_bad_key(name):
    """Return how a file of known_bad.json is recognised: (folder, stem), with the extension if the stem is a number."""
    folder, _, file = name.lower().rpartition("/")
    stem = os.path.splitext(file)[0]
    return (folder.rpartition("/")[2], stem if re.search("[a-z]", stem) else file)


def find_known_bad(sets, agreements, found):
    """Add the published faulty files, recognised by name; it is a remark if this copy is fixed or does not show it.

    `agreements` is RECORD's `agree` of all images.
    """
    published = read_json(ROOT / "runs" / "known_bad.json")
    known = {known_bad_key(entry["name"]): (title, entry) for title, entries in published.items() for entry in entries}
    rows = itertools.chain.from_iterable(zip(part.images, part.masks, part.roles) for part in sets)
    for (image, mask, role), agree in zip(rows, agreements):
        for file in filter(None, (image, mask)):
            key = known_bad_key(file.replace(os.sep, "/"))
            title, entry = known.get(key) or known.get(("", key[1])) or (None, None)
            if not entry:
                continue
            about_size = entry["fault"] == "size_mismatch"
            broken = entry["breaks"] and (agree < 0 if about_size else role >= 0 and not mask)
            text = f"{title}: {entry['text']}.{' The sizes agree in this copy.' if about_size and agree > 0 else ''}"
            found.append((fault if broken else remark)("published faulty file", [file], text))


def find_inverted_sets(sets, found):
    """Add sets of which most masks look inverted: a single odd mask may be right."""
    odd = {finding.files[0] for finding in found if finding.kind == "inverted-looking mask"}
    for part in sets if odd else ():
        masks = [mask for mask in part.masks if mask]
        inverted = sum(mask in odd for mask in masks)
        if inverted >= 3 and inverted > len(masks) / 2:
            found.append(fault("inverted masks", [str(part.path)], f"{inverted} of {len(masks)} masks look inverted."))


def near_pairs(hashes):
    """Return all pairs (i, j) of hashes, uint64 (n, 4), that look alike (HASH_DIFFERENCE) and share a band, int (m, 2).

    A band is 16 bits of neighbouring frequencies, some of them set. Sorting by band instead of comparing all pairs
    takes a second for 100,000 images; versions without an equal band are rare, as low frequencies hardly change.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for band in hashes.view(np.uint16).T:
        order = np.argsort(band, kind="stable")
        order = order[band[order] > 0]
        ends = np.searchsorted(band[order], band[order], side="right")
        starts = np.arange(len(order))
        for step in itertools.count(1):  # compare each image with the step-th after it in its run of equal bands
            starts = starts[starts + step < ends[starts]]
            if not len(starts):
                break
            i, j = order[starts], order[starts + step]
            either = np.bitwise_count(hashes[i] | hashes[j]).sum(axis=1)
            near = np.bitwise_count(hashes[i] ^ hashes[j]).sum(axis=1) <= HASH_DIFFERENCE * either
            pairs.append(np.sort(np.stack([i[near], j[near]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


class Alike:
    """Images that are versions of one another, joined pair by pair to groups."""

    def __init__(self):
        self.parent = {}

    def root(self, i):
        """Return the image that stands for the group of image i."""
        while (parent := self.parent.get(i, i)) != i:
            self.parent[i] = i = self.parent.get(parent, parent)
        return i

    def join(self, i, j):
        """Make one group of the groups of two images."""
        self.parent.setdefault(i, i)
        self.parent.setdefault(j, j)
        self.parent[self.root(j)] = self.root(i)

    def groups(self):
        """Return the groups, each a sorted list of images, in order of their first."""
        found = collections.defaultdict(list)
        for i in sorted(self.parent):
            found[self.root(i)].append(i)
        return list(found.values())


def find_duplicates(images, set_names, roles, groups, records, progress, found):
    """Add images that occur twice: by the bytes of the file, then by perceptual hash and comparison of thumbnails.

    Within a group equal images are a remark (a fault if mask or label differ), and edited versions of one scene are
    normal. Between groups equal images are a fault (a leak), and edited versions of one scene, as a tampered image and
    its original, a remark. Versions of one image give one finding, however many they are. `set_names` is a list with
    the name of each image's set, `roles` and `groups` are int arrays, one entry per image.
    """
    def sets_of(same):
        return " and ".join(dict.fromkeys(set_names[i] for i in same))

    digests, masks = records["digest"], records["mask_digest"]
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] > 0]
    for same in np.split(order, np.flatnonzero(np.diff(digests[order])) + 1):
        if len(same) < 2:
            continue
        files = [images[i] for i in same]
        if len(np.unique(groups[same])) > 1:
            found.append(fault("leak", files, f"the same file (equal bytes) is in {sets_of(same)}."))
        elif len(np.unique(masks[same][masks[same] > 0])) > 1 or {0, 1} <= set(roles[same]):
            found.append(fault("duplicate with another mask", files, "equal bytes, but masks or labels differ."))
        else:
            found.append(remark("duplicate", files, "equal bytes within one set."))

    # Each file of each group once, but for those too flat; then the pairs that would be worth a finding.
    _, first = np.unique(np.stack([digests, groups.astype(np.uint64)], axis=1), axis=0, return_index=True)
    first = first[np.bitwise_count(records["hash"][first]).sum(axis=1) >= ENOUGH_BITS]
    i, j = first[near_pairs(np.ascontiguousarray(records["hash"][first]))].T
    wanted = (digests[i] != digests[j]) & ((groups[i] != groups[j]) | (roles[i] == roles[j]))
    i, j = i[wanted], j[wanted]
    needed = np.unique(np.concatenate([i, j]))
    thumbnails = np.zeros((len(needed), 64, 64), np.uint8)
    read = map_parallel(read_thumbnail, [images[k] for k in needed], label="comparing", progress=progress)
    for k, pixels in enumerate(read):
        thumbnails[k] = pixels
    same_image, edits = Alike(), []
    for a, b, k, m in zip(i.tolist(), j.tolist(), np.searchsorted(needed, i), np.searchsorted(needed, j)):
        if same_image.root(a) == same_image.root(b):
            continue  # which spares most comparisons of many frames of one video
        likeness = compare_thumbnails(thumbnails[k], thumbnails[m])
        if likeness == 2:
            same_image.join(a, b)
        elif likeness == 1 and groups[a] != groups[b]:
            edits.append((a, b))
    again = "the same image, compressed or resized again,"
    for same in same_image.groups():
        first = [same[k] for k in np.unique(groups[same], return_index=True)[1]]  # of each set, named first
        files = [images[k] for k in [*first, *sorted({*same}.difference(first))]]
        if len(first) > 1:
            found.append(fault("leak", files, f"{again} is in {sets_of(same)}."))
        else:
            found.append(remark("near duplicate", files, f"{again} is in one set more than once."))
    same_scene = Alike()
    for a, b in edits:
        if same_image.root(a) != same_image.root(b):
            same_scene.join(a, b)
    for same in same_scene.groups():
        found.append(remark("shared scene", [images[k] for k in same], "versions of one photograph, edited "
                            f"differently, are in {sets_of(same)}."))


# ---------------------------------------------------------------------------------------------------------------------
# Output


def print_findings(found):
    """Print a table of kinds with their number and first examples; `found` is sorted, faults first."""
    if found:
        say(f"\n{'severity':10}{'kind':30}{'count':>6}")
    for (severity, kind), same in itertools.groupby(found, key=lambda finding: (finding.severity, finding.kind)):
        same = list(same)
        say(f"{severity:10}{kind:30}{len(same):6}")
        for finding in same[:3]:
            files = finding.files[:3] + [f"... ({len(finding.files)} in all)"] * (len(finding.files) > 3)
            say(f"    {visible(', '.join(files))}: {visible(finding.text)}")


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
            say(f"\n{title} ({counted(len(values), 'image')})")
        for name, count in histograms[title].items():
            if count:
                say(f"  {name:>8} {count:8d} {'#' * int(np.ceil(40 * count / max(counts)))}")
    return histograms


def draw_cell(image, mask, caption, colour):
    """Return one cell of the contact sheet, uint8 (180, 200, 3) RGB: image, outline of the mask, name and caption."""
    cell = np.full((180, 200, 3), 255, np.uint8)
    try:
        pixels, marked = read_image(image, on_damage=ignore), read_mask(mask) if mask else None
        if marked is not None and marked.shape != pixels.shape[:2]:
            turned = read_image(image, turned=True, on_damage=ignore)
            pixels = turned if turned.shape[:2] == marked.shape else pixels
        scale = min(192 / pixels.shape[1], 144 / pixels.shape[0])
        size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        view = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
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


def draw_contact_sheet(sets, found):
    """Return up to 48 images with mask outlines as uint8 (H, W, 3) RGB: faults (red), remarks (orange), others (grey).

    `found` is sorted, faults first.
    """
    pairs = [pair for part in sets for pair in zip(part.images, part.masks)]
    place = {file: i for i, pair in enumerate(pairs) for file in pair if file}
    chosen = {}  # position in `pairs` -> Finding or None
    for finding in found:
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
    return np.concatenate([np.concatenate(cells[i:i + columns], axis=1) for i in range(0, len(cells), columns)])


def write_output(path, content, what):
    """Write a file and name it; says so if that replaces an earlier one."""
    replaced = os.path.exists(path)
    write_file(path, content)
    say(f"{path}: {what}{' (replaces the earlier file)' if replaced else ''}")


def main():
    """Print and write what is wrong with datasets; returns the exit code, 0 without a fault."""
    parser = Parser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="dataset (folder or JSON of any form) or plain folder of images; several are compared")
    parser.add_argument("--image_size", type=positive, default=512,
                        help="side in pixels, for --if_padding (default: %(default)s)")
    parser.add_argument("--if_padding", action="store_true", help="name what a run with --if_padding would crop")
    parser.add_argument("--output", default="report.json", help="JSON of all findings (default: %(default)s)")
    parser.add_argument("--contact_sheet", help="PNG to write: images with mask outlines, faults first (default: none)")
    parser.add_argument("--no_progress", action="store_true", help="don't show progress")
    args = parser.parse_args()

    sets, found = [], []
    for number, path in enumerate(args.paths):
        collect_sets(path, path, (number,), sets, found)
    images, masks = ([value for part in sets for value in getattr(part, field)] for field in ("images", "masks"))
    numbers = {group: i for i, group in enumerate(dict.fromkeys(part.group for part in sets))}
    groups = np.array([numbers[part.group] for part in sets for _ in part.images], np.int64)

    records = np.zeros(len(images), RECORD)
    crops = [args.image_size if args.if_padding else None] * len(images)
    results = map_parallel(inspect_pair, images, masks, crops, label="checking", progress=not args.no_progress)
    for i, (findings, record) in enumerate(results):
        records[i] = record
        found += findings
    places = [(part.roles, i) for part in sets for i in range(len(part.images))]
    for (roles, i), area in zip(places, records["area"]):
        roles[i] = 0 if area == 0 else roles[i]  # as in training, the mask decides
    roles = np.array([role for part in sets for role in part.roles], np.int8)
    find_known_bad(sets, records["agree"], found)
    find_inverted_sets(sets, found)
    set_names = [part.name for part in sets for _ in part.images]
    find_duplicates(images, set_names, roles, groups, records, not args.no_progress, found)
    found.sort(key=lambda finding: (finding.severity, finding.kind))  # "fault" comes before "remark"

    for part in sets:
        say(f"{part.name}: {counted(len(part.images), 'image')}, {part.roles.count(1)} tampered, "
            f"{part.roles.count(0)} authentic")
    print_findings(found)
    histograms = print_histograms(records)
    faults = sum(finding.severity == FAULT for finding in found)
    remarks = len(found) - faults
    report = {"sets": [{"name": part.name, "path": str(part.path), "images": len(part.images),
                        "tampered": part.roles.count(1)} for part in sets],
              "faults": faults, "remarks": remarks, "histograms": histograms,
              "findings": [finding._asdict() for finding in found]}
    say()
    write_output(args.output, json.dumps(report, indent=1), "all findings")
    if args.contact_sheet and images:
        sheet = cv2.cvtColor(draw_contact_sheet(sets, found), cv2.COLOR_RGB2BGR)
        write_output(args.contact_sheet, cv2.imencode(".png", sheet)[1], "contact sheet")
    say(f"{counted(faults, 'fault')}, {counted(remarks, 'remark')}" if faults else
        f"OK: {counted(len(images), 'image')} in {counted(len(sets), 'set')}, no fault, {counted(remarks, 'remark')}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
