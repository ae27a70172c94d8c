"""Datasets, transforms and loaders, and the commands that prepare data.

    python data.py demo --output demo_data                                     # a small data set, made here
    python data.py pairs --image_root Tp --mask_root Gt --output my_set.json   # pair pictures and masks by name
    python data.py check my_set.json other_set                                 # find every fault before a run does
    python data.py resize my_set my_set_1024 --long_side 1024                  # shrink pictures and masks

This file holds what a run uses: reading files, pairing, datasets, loaders, augmentations, attacks. The four commands
are in prepare.py, which no run imports. Workers hand over uint8 pictures and masks; `to_device` is the one place that
normalises them.
"""
import concurrent.futures
import contextlib
import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else albumentations asks the network for its newest version

import albumentations as albu
import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate

from registry import UserError, run

cv2.setNumThreads(0)  # the loader's workers are the parallelism
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # faults are raised here, with the file's name

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of pixels in 0..1
STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# Reading files


def read_bytes(path):
    """Return the bytes of a file as a uint8 array; UserError for a missing, unreadable or empty file."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. "
                        "Mend the path or the file, or take it out of the dataset.") from None
    if not len(data):
        raise UserError(f"{path} is empty (0 bytes): copy it anew or take it out of the dataset.")
    return data


def is_complete(data):
    """Tell whether a JPEG or PNG ends as it should; OpenCV silently fills the missing rest of a truncated JPEG."""
    head, tail = data[:4].tobytes(), data[-64:].tobytes()
    if head.startswith(b"\xff\xd8"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    return b"IEND" in tail if head == b"\x89PNG" else True


def is_tiff_with_alpha(data):
    """Tell whether OpenCV would multiply the colours by the alpha channel, as it does for TIFF alone."""
    try:
        return data[:4].tobytes() in (b"II*\0", b"MM\0*") and Image.open(io.BytesIO(data)).mode == "RGBA"
    except OSError:
        return False


def decode(path, data, flags, mode):
    """Decode with OpenCV; PIL (converting to `mode`) takes what OpenCV can't read or what doesn't end as it should."""
    if is_complete(data) and not is_tiff_with_alpha(data):
        try:
            image = cv2.imdecode(data, flags)
        except cv2.error:  # more pixels than OpenCV allows
            image = None
        if image is not None:
            return image
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert(mode))
    except Exception as error:  # PIL raises many types; each means that this file can't be decoded
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} can't be decoded, it is broken or truncated ({reason}): "
                        "copy it anew or take it out.") from None


def read_image(path, turn=False):
    """Read a picture as RGB uint8 (H, W, 3), the same pixels as PIL gives. `turn` applies its EXIF orientation.

    (OpenCV and PIL both turn a TIFF by its orientation whether asked to or not.)
    Raises UserError for files that are missing, empty, truncated or no picture.
    """
    flags = cv2.IMREAD_COLOR_RGB | (0 if turn else cv2.IMREAD_IGNORE_ORIENTATION)
    return np.ascontiguousarray(decode(path, read_bytes(path), flags, "RGB"))


def read_mask(path):
    """Read a mask as uint8 (H, W): 1 where the mean of the colour channels is above 127.5, else 0. Raises UserError."""
    mask = decode(path, read_bytes(path), cv2.IMREAD_UNCHANGED, "RGB")
    if mask.dtype == np.uint16:
        mask = (mask >> 8).astype(np.uint8)
    elif mask.dtype != np.uint8:
        raise UserError(f"{path}: a mask of {mask.dtype} pixels. Store it with 8 bits, 0 and 255.")
    if mask.ndim == 3:
        mask = mask[..., :3].sum(axis=2, dtype=np.uint16) > 382 if mask.shape[2] > 1 else mask[..., 0] > 127
    else:
        mask = mask > 127
    return mask.astype(np.uint8)


def read_pair(image_path, mask_path):
    """Read a picture and its mask (None: authentic) and return (image, mask, turned).

    EXIF orientation is applied to neither, unless only the turned picture has the size of its mask (`turned` is True
    then). Raises UserError with both paths where no choice makes the sizes agree.
    """
    image = read_image(image_path)
    if mask_path is None:
        return image, np.zeros(image.shape[:2], np.uint8), False
    mask = read_mask(mask_path)
    if mask.shape == image.shape[:2]:
        return image, mask, False
    turned = read_image(image_path, turn=True)
    if mask.shape == turned.shape[:2]:
        return turned, mask, True
    raise UserError(f"{image_path} is {image.shape[0]}x{image.shape[1]} pixels (height x width) but its mask "
                    f"{mask_path} is {mask.shape[0]}x{mask.shape[1]}: mend or remove the pair "
                    "(`python data.py check` finds all such pairs).")


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures belong to a dataset

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# What public sets append to the picture's stem. Columbia's second file `_edgemask_3` (three colours) is left out on
# purpose: with it each of its pictures would have two masks.
MASK_SUFFIXES = ("_gt", "_gt3", "_mask", "_edgemask", "_groundtruth", "_ground_truth", "_msk", "-gt", "-mask")
MASK_SUFFIX = re.compile("(?:" + "|".join(MASK_SUFFIXES) + ")$", re.IGNORECASE)


def list_files(root, suffixes):
    """Return all files below `root` whose extension (lower case, with the dot) is in `suffixes`.

    Paths are relative to `root`, with "/", sorted. Names starting with a dot are left out; links are followed, but
    a folder is not entered again below itself. Raises UserError when `root` or a folder below can't be listed.
    """
    found, waiting = [], [("", ())]
    try:
        while waiting:
            folder, parents = waiting.pop()
            status = os.stat(os.path.join(root, folder))
            here = (status.st_dev, status.st_ino)
            if here in parents:
                continue
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((folder + entry.name + "/", parents + (here,)))
                    elif os.path.splitext(entry.name)[1].lower() in suffixes:
                        found.append(folder + entry.name)
    except OSError as error:
        raise UserError(f"{error.filename or root}: can't list this folder ({error.strerror}); "
                        "give an existing folder that you may read.") from None
    return sorted(found)


def list_pictures(root):
    """Return all pictures (IMAGE_SUFFIXES) below `root` as sorted relative paths; see list_files."""
    return list_files(root, IMAGE_SUFFIXES)


def split_stem(path):
    """Split a relative path into "folder/" and "stem". Only the last extension goes: stems of public sets hold dots."""
    folder, slash, name = path.rpartition("/")
    return folder + slash, os.path.splitext(name)[0]


def pair_by_name(images, masks):
    """Pair pictures with masks by name, whatever the order of the lists.

    A mask belongs to the picture with the same relative folder and stem, or whose stem it extends by one of
    MASK_SUFFIXES; the same stem goes before a suffix, the same upper and lower case before another. What is left is
    paired without regard to the folder if the stem occurs only once among all pictures and once among all masks.

    Args:
        images, masks: lists of paths relative to the root of the pictures and to the root of the masks
    Returns:
        pairs: list of (image, mask) in the order of `images`; images_left; masks_left
    Raises:
        UserError: several pictures or masks of one folder claim the same partner
    """
    image_parts, mask_parts = [split_stem(path) for path in images], [split_stem(path) for path in masks]
    bare_parts = [(folder, MASK_SUFFIX.sub("", stem)) for folder, stem in mask_parts]
    partner, used = {}, set()  # positions: picture -> mask, and the masks taken

    def match(same_folder, same_case, parts):
        """Pair what is alone on both sides with its key; return the other groups of pictures and masks."""
        def key(folder, stem):
            name = folder + stem if same_folder else stem
            return name if same_case else name.casefold()

        waiting = {}
        for index, part in enumerate(parts):
            if not same_folder or index not in used:
                waiting.setdefault(key(*part), ([], []))[1].append(index)
        for index, part in enumerate(image_parts):
            if not same_folder or index not in partner:
                group = waiting.get(key(*part))
                if group:
                    group[0].append(index)
        unclear = []
        for group in waiting.values():
            if len(group[0]) == len(group[1]) == 1:
                (image,), (mask,) = group
                if image not in partner and mask not in used:
                    partner[image] = mask
                    used.add(mask)
            elif group[0]:
                unclear.append(group)
        return unclear

    for same_folder in (True, False):
        for parts in (mask_parts, bare_parts):
            for same_case in (True, False):
                if len(partner) == len(images) or len(used) == len(masks):
                    break
                unclear = match(same_folder, same_case, parts)
            else:
                if unclear and same_folder:
                    group_images, group_masks = unclear[0]
                    raise UserError(
                        f"{', '.join(images[i] for i in group_images)}: belongs to {len(group_masks)} mask(s) by name "
                        f"({', '.join(masks[i] for i in group_masks)}); {len(unclear)} such case(s). Keep one picture "
                        "and one mask of each stem in a folder.")
    pairs = [(images[i], masks[partner[i]]) for i in range(len(images)) if i in partner]
    return (pairs, [path for i, path in enumerate(images) if i not in partner],
            [path for i, path in enumerate(masks) if i not in used])


class PackedStrings:
    """A list of strings in two tensors, which forked workers share; a list of str would be copied as it is read."""

    def __init__(self, strings):
        self.bytes = torch.frombuffer(bytearray(os.fsencode("\0".join(["", *strings, ""]))), dtype=torch.uint8)
        self.ends = torch.from_numpy(np.flatnonzero(self.bytes.numpy() == 0))  # no path holds a NUL

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        start, end = self.ends[index:index + 2].tolist()
        return os.fsdecode(self.bytes[start + 1:end].numpy().tobytes())


def read_json(path):
    """Return the content of a JSON file; UserError where it is malformed or empty."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors on Windows put a mark in front
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
                        "Mend it there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}.") from None
    if not content or not isinstance(content, (list, dict)):
        raise UserError(f"{path} is {'empty' if content in ([], {}) else 'no list and no object'}. {JSON_FORMS}")
    return content


JSON_FORMS = ('Give a list of [image, mask or "Negative"], a list of ["ManiDataset" or "JsonDataset", path], '
              "or an object {name: path} of several sets.")


def dataset_kind(path):
    """Tell what a path is: ManiDataset, JsonDataset, BalancedDataset, several (an object of sets) or FolderDataset.

    Anything else is a UserError that says which of these it nearly was.
    """
    return read_dataset(path)[0]


def read_dataset(path):
    """Return (kind, content) of a path: `dataset_kind`, and what its JSON holds or None for a folder; or UserError."""
    path = Path(path)
    if path.is_dir():
        have = [name for name in ("Tp", "Gt") if (path / name).is_dir()]
        if len(have) == 1:
            raise UserError(f"{path} has {have[0]}/ but no {'Gt' if have == ['Tp'] else 'Tp'}/: "
                            "a dataset folder needs both, pictures in Tp/ and masks in Gt/.")
        return ("ManiDataset" if have else "FolderDataset"), None
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give a folder with Tp/ and Gt/, or a JSON file.")
    if path.suffix.lower() != ".json":
        raise UserError(f"{path} is neither a folder nor a .json file. Give a folder with Tp/ and Gt/, or a JSON file.")
    content = read_json(path)
    if isinstance(content, dict):
        wrong = [key for key, value in content.items() if not isinstance(value, str)]
        if wrong:
            raise UserError(f"{path}: the value of {wrong[0]!r} is no path. {JSON_FORMS}")
        return "several", content
    for position, item in enumerate(content):
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) and text for text in item)):
            raise UserError(f"{path}: item {position} is {json.dumps(item)[:80]}, not a pair of strings. {JSON_FORMS}")
    sets = [item[0] in ("ManiDataset", "JsonDataset") for item in content]
    if any(sets) and not all(sets):
        raise UserError(f"{path}: item {sets.index(not sets[0])} is of another kind than item 0. {JSON_FORMS}")
    return ("BalancedDataset" if sets[0] else "JsonDataset"), content


def exists(path):
    """Tell whether a file or folder exists, like os.path.exists but in half the time: a dataset may list a million."""
    try:
        return os.access(path, os.F_OK)
    except ValueError:  # a NUL or a character that no path can hold
        return False


def beside(json_path, path):
    """Return a path that a JSON gives: taken from the JSON's folder if it is there, else from the working directory."""
    near = os.path.join(os.path.dirname(os.path.abspath(json_path)), path)
    return near if os.path.exists(near) else path


def find_pairs(path, opened=None):
    """Return (names, image_paths, mask_paths) of one dataset; mask path "" = authentic or unlabelled.

    The kinds are ManiDataset, JsonDataset and FolderDataset. `names` are the pictures as listed: below Tp/ or the
    folder, or the JSON's own text. `opened` is what `read_dataset` gave, where that was called already. Raises
    UserError for other kinds, extra pictures or masks, and missing files.
    """
    kind, content = opened or read_dataset(path)
    if kind == "ManiDataset":
        pictures, masks = list_pictures(os.path.join(path, "Tp")), list_pictures(os.path.join(path, "Gt"))
        pairs, lone_pictures, lone_masks = pair_by_name(pictures, masks)
        if not pairs and pictures and len(pictures) == len(masks):
            print(f"warning: {path}: no name in Gt/ fits a name in Tp/, so the files are paired by dictionary order; "
                  f"check that {pictures[0]} belongs to {masks[0]}", flush=True)
            pairs, lone_pictures, lone_masks = list(zip(pictures, masks)), [], []
        if lone_pictures or lone_masks:
            raise UserError(f"{path}: " + " and ".join(
                f"{len(lone)} {what}: {', '.join(lone[:10])}{' ...' if len(lone) > 10 else ''}"
                for lone, what in ((lone_pictures, "pictures in Tp/ without a mask in Gt/"),
                                   (lone_masks, "masks without a picture")) if lone)
                + ". Add what is missing or move these files away.")
        names = [os.path.join(path, "Tp", image) for image, _ in pairs]
        images, masks = names, [os.path.join(path, "Gt", mask) for _, mask in pairs]
    elif kind == "FolderDataset":
        images = names = [os.path.join(path, image) for image in list_pictures(path)]
        masks = [""] * len(images)
    elif kind == "JsonDataset":
        folder, missing = os.path.dirname(os.path.abspath(path)), []

        def locate(file):
            near = os.path.join(folder, file)
            if exists(near):
                return near
            if not exists(file):
                missing.append(file)
            return file

        names = [image for image, _ in content]
        images = [locate(image) for image in names]
        masks = ["" if mask == "Negative" else locate(mask) for _, mask in content]
        del content
        for file in missing[:5]:
            for word in ("Negative", "ManiDataset", "JsonDataset"):
                if difflib.get_close_matches(file.lower(), [word.lower()], 1, 0.8):
                    raise UserError(f"{path}: {file!r} is no file. Did you mean {word!r}? {JSON_FORMS}")
        if missing:
            raise UserError(f"{path} names {len(missing)} files that do not exist: {', '.join(missing[:5])}"
                            f"{' ...' if len(missing) > 5 else ''}. Relative paths are taken from the JSON's folder, "
                            "then from the working directory.")
    else:
        raise UserError(f"{path}: a {'JSON of several sets' if kind == 'several' else kind} can't be used here. "
                        "Give one dataset.")
    if not names:
        raise UserError(f"{path} holds no picture ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    return names, images, masks


# ---------------------------------------------------------------------------------------------------------------------
# Scan: what every file of a dataset is, read once and remembered

SCAN_DTYPE = np.dtype([("size", "i8"), ("mtime", "i8"), ("digest", "S32"), ("height", "i4"), ("width", "i4"),
                       ("orientation", "i2")])


def tiff_length(picture):
    """Return how long a TIFF file must be by its own header, in bytes."""
    tags = picture.tag_v2  # offsets and lengths of strips, or of tiles
    starts, lengths = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in ((273, 324), (279, 325)))
    return max((start + length for start, length in zip(starts, lengths)), default=0)


def scan_file(path):
    """Read a whole file and return its SCAN_DTYPE row: bytes, mtime (ns), BLAKE2 digest, header size, EXIF orientation.

    Raises UserError for a file that is empty, truncated or no picture. Compressed pixels are not decoded: `check` does.
    """
    data = read_bytes(path)
    if not is_complete(data):
        decode(path, data, cv2.IMREAD_COLOR_RGB, "RGB")
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # its checksums
        elif picture.format == "BMP":
            picture.load()  # raw pixels; writers don't agree on the length in the header
        elif picture.format == "TIFF" and len(data) < tiff_length(picture):
            raise OSError("image file is truncated")
        # For a PNG without EXIF, PIL would decode the whole picture to learn that.
        orientation = picture.getexif().get(0x0112, 1) if picture.format != "PNG" or b"eXIf" in data.tobytes() else 1
    except Exception as error:  # PIL raises many types; each means that this is no picture
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} is no picture that can be read ({reason}): copy it anew or take it out.") from None
    stat = os.stat(path)
    orientation = orientation if orientation in range(1, 9) else 1
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return np.array((stat.st_size, stat.st_mtime_ns, digest, picture.height, picture.width, orientation), SCAN_DTYPE)


def scan(path, files):
    """Return one SCAN_DTYPE row for each of `files`, a dataset's pictures and masks.

    Rows are kept in `.<name>.scan.npz` beside the dataset (inside it, for a folder), and a file is read anew when its
    size or time of change differs. The cache is a convenience: where it can't be written the scan works all the same.
    """
    path = Path(path)
    cache = path / ".scan.npz" if path.is_dir() else path.with_name(f".{path.name}.scan.npz")
    rows, listing = np.zeros(len(files), SCAN_DTYPE), os.fsencode("\0".join(files))
    try:
        with np.load(cache) as stored:
            known_listing, known = stored["files"].tobytes(), stored["rows"]
        if known.dtype != SCAN_DTYPE:
            raise ValueError("written by another version")
        if known_listing == listing:
            rows = known
        else:
            places = {name: i for i, name in enumerate(known_listing.split(b"\0"))}
            for i, name in enumerate(listing.split(b"\0")):
                if name in places:
                    rows[i] = known[places[name]]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):  # none, or none that can be read
        rows = np.zeros(len(files), SCAN_DTYPE)
    now = np.fromiter(((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)), "2i8", len(files))
    stale = np.flatnonzero((rows["size"] != now[:, 0]) | (rows["mtime"] != now[:, 1]))
    if len(stale):
        start = time.time()
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for done in range(0, len(stale), 1000):  # all at once, the pool would hold an object for each of millions
                some = stale[done:done + 1000]
                rows[some] = list(pool.map(lambda i: scan_file(files[i]), some))
                if time.time() - start > 5:
                    print(f"reading {path}: {done + len(some)} of {len(stale)} files", file=sys.stderr, flush=True)
        try:
            partial = cache.with_name(f"{cache.name}.{os.getpid()}.npz")
            np.savez(partial, files=np.frombuffer(listing, np.uint8), rows=rows)
            os.replace(partial, cache)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            print(f"note: {cache} can't be written, so the files will be read again next time", flush=True)
    return rows


def check_sizes(image_paths, mask_paths, image_rows, mask_rows):
    """Raise UserError, with their number, where masks fit their pictures neither as stored nor as EXIF turns these."""
    same = (image_rows["height"] == mask_rows["height"]) & (image_rows["width"] == mask_rows["width"])
    swapped = (image_rows["height"] == mask_rows["width"]) & (image_rows["width"] == mask_rows["height"])
    turned = swapped & (image_rows["orientation"] > 4)
    wrong = np.flatnonzero(~(same | turned))
    if len(wrong):
        i = wrong[0]
        raise UserError(f"{len(wrong)} masks differ in size from their pictures, first {image_paths[i]} "
                        f"({image_rows['height'][i]}x{image_rows['width'][i]} pixels, height x width) and "
                        f"{mask_paths[i]} ({mask_rows['height'][i]}x{mask_rows['width'][i]}): "
                        "mend or remove them (`python data.py check` lists all).")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


class PictureDataset(Dataset):
    """Pictures with masks, one sample a picture; the kinds below differ only in how they find the files.

    A sample is a dict of NumPy arrays: image (S, S, 3) uint8 RGB, mask (S, S) uint8 0/1, edge_mask likewise if asked
    for, label, shape, original_shape, origin_shape ((H, W) of the valid area, of the file, after augmentation), name,
    index, and whatever the model's post function adds.

    Args:
        path: folder or JSON (see `open_dataset`)
        image_size: S in pixels
        padding: pad (and crop) to S x S instead of resizing
        edge_mask_width: width of the boundary band in pixels, None = no edge_mask
        transform: albumentations pipeline for training, drawn anew for each (seed, epoch, picture) whatever the worker
            or rank
        post_func: the model's post function
        attacks: list of (strength, transform); a sample is then a list with one dict per strength
        fingerprint: read all files and compute `fingerprint`; checks every file's header and the sizes of all pairs
        opened: what `read_dataset` gave for the path, where that was called already
    """

    def __init__(self, path, image_size=512, padding=False, edge_mask_width=None, transform=None, post_func=None,
                 attacks=None, seed=0, fingerprint=True, opened=None):
        self.path, self.image_size, self.padding, self.seed = str(path), image_size, padding, seed
        self.transform, self.post_func, self.attacks = transform, post_func, attacks
        cross = (edge_mask_width, edge_mask_width)
        self.edge_kernel = edge_mask_width and cv2.getStructuringElement(cv2.MORPH_CROSS, cross)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.said_crop = torch.tensor(os.environ.get("RANK", "0") != "0").share_memory_()  # by one worker of rank 0
        names, images, masks = self.find(path, opened or read_dataset(path))
        self.num_tampered = sum(map(bool, masks))
        self.fingerprint = self.compute_fingerprint(images, masks) if fingerprint else "not computed"
        self.names, self.images, self.masks = map(PackedStrings, (names, images, masks))

    def find(self, path, opened):
        """Return (names, image_paths, mask_paths)."""
        return find_pairs(path, opened)

    def compute_fingerprint(self, images, masks):
        """Return 12 hexadecimal digits of the names, sizes and contents of all pairs, wherever the dataset lies."""
        tampered = [i for i, mask in enumerate(masks) if mask]
        rows = scan(self.path, [*images, *(masks[i] for i in tampered)])
        check_sizes([images[i] for i in tampered], [masks[i] for i in tampered], rows[tampered], rows[len(images):])
        files = [f"{os.path.basename(file)} {size} {digest.decode()}" for file, size, digest in
                 zip([*images, *(masks[i] for i in tampered)], rows["size"].tolist(), rows["digest"].tolist())]
        for i, mask in zip(tampered, files[len(images):]):
            files[i] += f" {mask}"
        lines = "\n".join(sorted(files[:len(images)]))
        return hashlib.blake2b(os.fsencode(lines), digest_size=6).hexdigest()

    def describe(self):
        """Return the line that a run prints about the dataset."""
        return (f"{type(self).__name__} {self.path}: {len(self.images)} pictures, {self.num_tampered} tampered, "
                f"{len(self.images) - self.num_tampered} authentic, fingerprint {self.fingerprint}")

    def __len__(self):
        return len(self.images)

    def epoch_indices(self, rng):
        """Return the indices that one epoch visits, in order, drawn from a NumPy generator."""
        return rng.permutation(len(self.images))

    def __getitem__(self, index):
        image, mask, turned = read_pair(self.images[index], self.masks[index] or None)
        info = {"name": self.names[index], "path": self.images[index], "index": np.int64(index),
                "original_shape": np.array(image.shape[:2]),
                "label": np.int64(bool(self.masks[index])), "pristine": not turned}
        if self.attacks is None:
            if self.transform is not None:
                rng = np.random.default_rng([self.seed, int(self.epoch), index])
                self.transform.set_random_seed(int(rng.integers(2**31)))
                augmented = self.transform(image=image, mask=mask)
                image, mask = augmented["image"], augmented["mask"]
                info["label"] = np.int64(info["label"] or mask.any())  # an augmentation may have tampered with it
                info["pristine"] = False
            return self.finish(image, mask, info)
        file = os.path.basename(info["name"])
        return [self.finish(transform(image, file), mask, {**info, "pristine": info["pristine"] and not strength})
                for strength, transform in self.attacks]

    def finish(self, image, mask, info):
        """Bring a picture to S x S, add edge mask and shapes, and call the post function."""
        size, info = self.image_size, dict(info)
        info["origin_shape"] = np.array(image.shape[:2])
        if self.padding:
            image, mask = self.pad(image, info["name"]), self.pad(mask, info["name"])
            info["shape"] = np.minimum(info["origin_shape"], size)
        else:
            if image.shape[:2] != (size, size):
                image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
                mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)
                info["pristine"] = False
            info["shape"] = np.array((size, size))
        sample = {"image": image, "mask": mask, **info}
        if self.edge_kernel is not None:
            sample["edge_mask"] = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, self.edge_kernel)
        if self.post_func is not None:
            self.post_func(sample)
        del sample["path"], sample["pristine"]
        return sample

    def pad(self, pixels, name):
        """Return the top-left S x S of an array, black where it is smaller."""
        size = self.image_size
        height, width = pixels.shape[:2]
        if (height > size or width > size) and not self.said_crop:
            self.said_crop.fill_(True)
            print(f"note: {name} comes to {height}x{width} pixels, more than --image_size {size}: --if_padding crops "
                  "it and others like it", flush=True)
        padded = np.zeros((size, size, *pixels.shape[2:]), np.uint8)
        padded[:min(height, size), :min(width, size)] = pixels[:size, :size]
        return padded


class ManiDataset(PictureDataset):
    """A folder with tampered pictures in Tp/ and their masks in Gt/, paired by name."""


class JsonDataset(PictureDataset):
    """A JSON list of [image, mask or "Negative"]."""


class FolderDataset(PictureDataset):
    """A plain folder of pictures, unlabelled: masks are black and labels 0."""

    def describe(self):
        return f"{type(self).__name__} {self.path}: {len(self)} pictures, unlabelled, fingerprint {self.fingerprint}"


class BalancedDataset(PictureDataset):
    """A JSON list of ["ManiDataset" | "JsonDataset", path]: every epoch visits `sample_number` pictures of each set.

    They are drawn without replacement and differently each epoch; of a smaller set every picture comes equally often,
    give or take one. IMDL-BenCo's Protocol-CAT draws as many, but with replacement.
    """

    def __init__(self, path, sample_number=1840, fingerprint=True, **kwargs):
        self.sample_number = sample_number
        super().__init__(path, fingerprint=fingerprint, **kwargs)
        self.members = []  # the describing line of each set
        for name, start, end in zip(self.paths, self.ends, self.ends[1:]):
            images, masks = ([strings[i] for i in range(start, end)] for strings in (self.images, self.masks))
            tampered = sum(map(bool, masks))
            own = self.compute_fingerprint(images, masks) if fingerprint else "not computed"
            self.members.append(f"  {name}: {end - start} pictures, {tampered} tampered, "
                                f"{end - start - tampered} authentic, fingerprint {own}"
                                + (", repeated within an epoch" if end - start < sample_number else ""))

    def find(self, path, opened):
        names, images, masks, self.ends, self.paths = [], [], [], [0], []
        for kind, member in opened[1]:
            member = beside(path, member)
            try:
                opened_member = read_dataset(member)
            except UserError as error:
                raise UserError(f"{path} names {error}") from None
            if opened_member[0] != kind:
                raise UserError(f"{path} calls {member} a {kind}, but it is a {opened_member[0]}. Mend the JSON.")
            for total, part in zip((names, images, masks), find_pairs(member, opened_member)):
                total.extend(part)
            self.ends.append(len(names))
            self.paths.append(member)
        return names, images, masks

    def __len__(self):
        return self.sample_number * (len(self.ends) - 1)

    def describe(self):
        return "\n".join([f"{super().describe()}, {len(self)} drawn per epoch", *self.members])

    def epoch_indices(self, rng):
        drawn = []
        for start, end in zip(self.ends, self.ends[1:]):
            rounds = -(-self.sample_number // (end - start))
            order = np.concatenate([rng.permutation(end - start) for _ in range(rounds)])
            drawn.append(start + order[:self.sample_number])
        return rng.permutation(np.concatenate(drawn))


KINDS = {kind.__name__: kind for kind in (ManiDataset, JsonDataset, FolderDataset, BalancedDataset)}


def open_dataset(path, flag, allowed=("ManiDataset", "JsonDataset"), sample_number=1840, opened=None, **options):
    """Open the one dataset that a path means; `options` go to PictureDataset, errors name the command line's `flag`."""
    try:
        opened = opened or read_dataset(path)
        kind = opened[0]
        if kind not in allowed:
            words = {"FolderDataset": "a folder without Tp/ and Gt/", "several": "a JSON of several sets"}
            what = words.get(kind, f"a {kind}") + (near_dataset(path) if kind == "FolderDataset" else "")
            forms = {"ManiDataset": "a folder with Tp/ and Gt/", "JsonDataset": "a JSON list of [picture, mask]",
                     "BalancedDataset": "a JSON of balanced sets", "FolderDataset": "a folder of pictures"}
            raise UserError(f"{path} is {what}, which can't be used here. Give "
                            f"{' or '.join(forms[kind] for kind in allowed)}.")
        balance = {"sample_number": sample_number} if kind == "BalancedDataset" else {}
        return KINDS[kind](path, opened=opened, **balance, **options)
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


def open_sets(path, flag, **options):
    """Open one dataset, to be named after its file or folder, or a JSON object of several; return {name: dataset}."""
    try:
        kind, content = opened = read_dataset(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if kind != "several":
        return {Path(path).resolve().stem or "test": open_dataset(path, flag, opened=opened, **options)}
    for name in content:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise UserError(f"{flag} {path}: the set name {name!r} can't name a folder for its results. Use letters, "
                            "digits, - and _; pictures and masks go into a list, [[picture, mask], ...].")
    return {name: open_dataset(beside(path, member), f"{flag} {path}, set {name!r}", **options)
            for name, member in content.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class TrainBatches:
    """Batch sampler: every index of an epoch exactly once over all ranks, in batches as even as possible.

    No batch exceeds `batch_size`, and all ranks make the same number of steps, as gradient averaging needs. Only where
    pictures can't be dealt out evenly (fewer of them than steps x ranks) are the first ones visited twice. The order
    depends on (seed, epoch) alone.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world_size=1):
        self.dataset, self.seed, self.rank, self.world_size, self.epoch = dataset, seed, rank, world_size, 0
        self.steps = -(-len(dataset) // (batch_size * world_size))

    def set_epoch(self, epoch):
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch
        self.dataset.epoch.fill_(epoch)

    def __len__(self):
        return self.steps

    def __iter__(self):
        indices = self.dataset.epoch_indices(np.random.default_rng([self.seed, self.epoch]))
        count = self.steps * self.world_size
        if len(indices) < count:
            indices = np.resize(indices, count)
        edges = np.arange(count + 1) * len(indices) // count
        for step in range(self.steps):
            batch = step * self.world_size + self.rank
            yield indices[edges[batch]:edges[batch + 1]].tolist()


class EvalBatches:
    """Batch sampler: the indices rank, rank + world_size, ... in order, none repeated or dropped; maybe none at all."""

    def __init__(self, length, batch_size, rank=0, world_size=1):
        self.indices, self.batch_size = range(rank, length, world_size), batch_size

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start:start + self.batch_size])


def collate(samples):
    """Stack samples to a batch of tensors; lists of samples (one dict per attack strength) to a list of batches."""
    if isinstance(samples[0], list):
        return [default_collate(list(version)) for version in zip(*samples)]
    return default_collate(samples)


def make_loader(dataset, batches, num_workers, pin_memory, persistent=False):
    """Return a DataLoader over a batch sampler; `persistent` workers outlive an epoch."""
    num_workers = min(num_workers, len(batches))
    generator = torch.Generator().manual_seed(0)  # its own, so that loading never disturbs the run's random states
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate, generator=generator,
                      persistent_workers=persistent and num_workers > 0,
                      pin_memory=pin_memory and torch.cuda.is_available())


def eval_loader(dataset, batch_size, num_workers, pin_memory, rank=0, world_size=1):
    """Return a loader over this rank's share of a dataset, in order, for `metrics.evaluate`."""
    return make_loader(dataset, EvalBatches(len(dataset), batch_size, rank, world_size), num_workers, pin_memory)


@functools.lru_cache
def normalisation(device):
    """Return the (1, 3, 1, 1) mean of pixels in 0..255 and the factor after it.

    They are made once per device, since every new tensor from the host stops the GPU's queue.
    """
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return mean.to(device), (1 / std).to(device)


def to_device(batch, device, padding=False):
    """Move a batch to the device and give it the types that models expect.

    image becomes normalised float32 (B, 3, H, W), mask and edge_mask float32 (B, 1, H, W); with `padding` there is also
    shape_mask. Other entries keep their types.
    """
    batch = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    mean, scale = normalisation(device)
    batch["image"] = batch["image"].permute(0, 3, 1, 2).contiguous().float().sub_(mean).mul_(scale)
    for key in ("mask", "edge_mask"):
        if key in batch:
            batch[key] = batch[key].float().unsqueeze(1)
    if padding:
        height, width = batch["image"].shape[-2:]
        rows = torch.arange(height, device=device).view(1, 1, -1, 1) < batch["shape"][:, 0].view(-1, 1, 1, 1)
        columns = torch.arange(width, device=device).view(1, 1, 1, -1) < batch["shape"][:, 1].view(-1, 1, 1, 1)
        batch["shape_mask"] = (rows & columns).float()
    return batch


def denormalise(image):
    """Return the RGB picture in 0..1 of a normalised (B, 3, H, W) image."""
    mean, scale = normalisation(image.device)
    return ((image.float() / scale + mean) / 255).clamp(0, 1)


def dataset_options(args, post_func, fingerprint):
    """Return the keyword arguments that a script opens its datasets with.

    Raises UserError unless one of the two fittings, resizing and padding, is chosen.
    """
    if args.if_resizing == args.if_padding:
        raise UserError("give exactly one of --if_resizing (resize to --image_size) and --if_padding (pad with black, "
                        "crop what is larger).")
    return dict(image_size=args.image_size, padding=args.if_padding, edge_mask_width=args.edge_mask_width,
                post_func=post_func, seed=args.seed, fingerprint=fingerprint and not args.no_fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations that tamper, for albumentations 2

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
    INPAINT_MARGIN pixels around it: equal pixels, and less time where the rectangle is small.
    """
    top, left, height, width = window
    above, before = max(0, top - INPAINT_MARGIN), max(0, left - INPAINT_MARGIN)
    result = image.copy()
    part = result[above:top + height + INPAINT_MARGIN, before:left + width + INPAINT_MARGIN]
    hole = np.zeros(part.shape[:2], np.uint8)
    hole[top - above:top - above + height, left - before:left - before + width] = 1
    part[...] = cv2.inpaint(np.ascontiguousarray(part), hole, INPAINT_RADIUS, method)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Attacks of the robustness test


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


if __name__ == "__main__":
    from prepare import main  # the commands are no part of a run
    sys.exit(run(main))
