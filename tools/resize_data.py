"""Copy a dataset with smaller images and masks, since decoding large images is what makes loading slow.

    python tools/resize_data.py my_set my_set_1024 --long_side 1024
    python tools/resize_data.py NIST16.json NIST16_1024 --long_side 1024

The source is a folder (any tree; every file of it is copied) or a dataset JSON, which is rewritten into the target.
Images are averaged over areas; masks, which are the files below Gt/ or --masks and, elsewhere than in Tp/, those named
like a_gt or a_mask, keep their values. Files that are small enough are copied byte for byte. Pixels stay as they are
stored, with the EXIF orientation beside them. JPEGs keep their quantisation tables and subsampling, and WebP becomes
lossless. The same command again continues where an interrupted one stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import collections
import io
import json
import os
import shutil

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from data import (IMAGE_SUFFIXES, MASK_FILE_SUFFIXES, MASK_SUFFIX, dataset_kind, list_files, list_images, list_masks,
                  open_pillow, orientation_of, read_bytes, read_image, read_json, read_pairs, read_sets, resolve_path)
from log import in_threads, make_output_dir, replacing, say, write_file
from registry import Parser, UserError, counted, exit_on_user_error, positive

NOTE = ".resize.json"  # in the target: the command's arguments, so that no run mixes two sizes
IMAGE, MASK, OTHER = "image", "mask", "other"  # kinds of files
UNTURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}  # EXIF orientation -> what undoes its turn


def list_tree(source, masks):
    """Return {path: IMAGE, MASK or OTHER} of all files below a folder, hidden ones excepted.

    `masks` is a folder of masks beside those that their names or a folder Gt tell, or None; both paths are resolved.
    """
    files = {}
    for name in list_files(source):
        folder, suffix = Path(name).parent, os.path.splitext(name)[1].lower()
        of_masks = "Gt" in folder.parts or masks and Path(source, folder).resolve().is_relative_to(masks)
        is_mask = of_masks or "Tp" not in folder.parts and MASK_SUFFIX.search(os.path.splitext(name)[0])
        kind = MASK if is_mask and suffix in MASK_FILE_SUFFIXES else IMAGE if suffix in IMAGE_SUFFIXES else OTHER
        files[os.path.join(source, name)] = kind
    return files


def list_dataset(path, documents):
    """Return {path: IMAGE or MASK} of all files of a dataset; JSONs go to `documents`, {path: content}."""
    kind = dataset_kind(path)
    if kind == "ManiDataset":
        sides = ("Tp", IMAGE, list_images), ("Gt", MASK, list_masks)
        return {os.path.join(path, side, name): what for side, what, list_side in sides
                for name in list_side(os.path.join(path, side))}
    if kind == "FolderDataset":
        return {os.path.join(path, name): IMAGE for name in list_images(path)}
    files = {}
    if os.path.abspath(path) in documents:  # a JSON may name itself
        return files
    content = read_sets(path) if kind == "several" else read_pairs(path, of_sets=kind == "BalancedDataset")
    documents[os.path.abspath(path)] = content
    if kind == "JsonDataset":
        for image, mask in content:
            files[resolve_path(path, image)] = IMAGE
            if mask != "Negative":
                files[resolve_path(path, mask)] = MASK
    else:
        for member in content.values() if kind == "several" else (member for _, member in content):
            files |= list_dataset(resolve_path(path, member), documents)
    return files


def rewrite_paths(document, content, target_of, folder):
    """Return the content of a dataset JSON with the paths of the smaller copies, relative to `folder`."""
    def rewrite(path):
        return Path(os.path.relpath(target_of(resolve_path(document, path)), folder)).as_posix()

    if isinstance(content, dict):
        return {name: rewrite(path) for name, path in content.items()}
    return [[first, rewrite(second)] if first in ("ManiDataset", "JsonDataset") else
            [rewrite(first), second if second == "Negative" else rewrite(second)] for first, second in content]


def save_options(image):
    """Return the options with which PIL saves a smaller copy of an opened image the way the original was saved.

    Pixels are never turned, so the EXIF orientation stays.
    """
    options = {}
    if image.format in ("JPEG", "MPO"):
        options |= {"qtables": image.quantization, "progressive": bool(image.info.get("progressive"))}
        if JpegImagePlugin.get_sampling(image) >= 0:
            options["subsampling"] = JpegImagePlugin.get_sampling(image)
    elif image.format == "WEBP":
        options |= {"lossless": True, "exact": True}  # exact: also the colours under alpha 0
    elif image.info.get("compression") in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        options["compression"] = image.info["compression"]
    if image.info.get("icc_profile"):
        options["icc_profile"] = image.info["icc_profile"]
    if (orientation := orientation_of(image)) > 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    return options


def open_image(path):
    """Open an image file; one that PIL refuses and the loader reads is as if it were opened."""
    try:
        return open_pillow(path, read_bytes(path))  # PIL turns some TIFFs only if it reads them from memory
    except UnidentifiedImageError:
        image = Image.fromarray(read_image(path))
        image.format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
        return image


def shrink(image, long_side, nearest):
    """Return an opened image as stored, with sides of at most `long_side` pixels; `nearest` keeps a mask's values."""
    if image.format == "TIFF" and (orientation := orientation_of(image)) > 1:  # which PIL turns when it loads
        image = image.transpose(UNTURN[orientation])
    size = [max(1, round(side * long_side / max(image.size))) for side in image.size]
    if nearest:
        return image.resize(size, Image.Resampling.NEAREST)
    plain = {"1": "L", "P": "RGBA" if "transparency" in image.info else "RGB", "PA": "RGBA"}
    full = image.convert(plain.get(image.mode, image.mode))  # palette indices can't be averaged
    small = Image.fromarray(cv2.resize(np.asarray(full), size, interpolation=cv2.INTER_AREA))
    return small if small.mode == full.mode else Image.frombytes(full.mode, small.size, small.tobytes())


def smaller_file(source, long_side, kind):
    """Return `source` with sides of at most `long_side` pixels as an open file, and whether that changed it."""
    image = None if kind == OTHER else open_image(source)
    if image is None or max(image.size) <= long_side:
        return open(source, "rb"), False
    image_format = "JPEG" if image.format == "MPO" else image.format
    options, file = save_options(image), io.BytesIO()
    shrink(image, long_side, kind == MASK).save(file, image_format, **options)
    file.seek(0)
    return file, True


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("source", help="a folder (any tree), or a dataset JSON")
    parser.add_argument("target", help="folder to write; new, empty or an interrupted run's")
    parser.add_argument("--long_side", type=positive, default=1024,
                        help="longest side of a copy, in pixels (default: %(default)s)")
    parser.add_argument("--masks", help="folder below source that holds masks too (default: none)")
    parser.add_argument("--no_progress", action="store_true", help="don't show progress")
    args = parser.parse_args()

    # What to copy.
    source, target, documents = os.path.realpath(args.source), os.path.realpath(args.target), {}
    if os.path.isdir(source):
        masks = Path(source, args.masks).resolve() if args.masks else None
        if masks and not masks.is_dir():
            raise UserError(f"--masks {args.masks}: no such folder below {args.source}.")
        files = list_tree(source, masks)
        if Path(target).is_relative_to(source):
            raise UserError(f"{args.target} is {args.source} or lies inside it; choose another folder to write to.")
        say(f"{counted(sum(kind == MASK for kind in files.values()), 'file')} of {len(files)} taken for masks: those "
            "below Gt/ and --masks, and by names like a_gt or a_mask")
    else:
        if args.masks:
            raise UserError("--masks is for a folder; a JSON says itself which files are masks.")
        files = {os.path.abspath(path): kind for path, kind in list_dataset(source, documents).items()}
    if not files:
        raise UserError(f"{args.source} holds no file to copy.")
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        raise UserError(f"{args.source} names {counted(len(missing), 'file')} that can't be found, first {missing[0]}; "
                        "fix the paths.")

    root = source if os.path.isdir(source) else os.path.commonpath([os.path.dirname(path) for path in files])

    def target_of(path):
        path = os.path.abspath(path)
        return os.path.join(target, os.path.basename(path) if path in documents else os.path.relpath(path, root))

    # Nothing may be overwritten but an earlier result of the same command.
    taken = {os.path.realpath(target_of(path)) for path in (*files, *documents)}
    if taken & {os.path.realpath(path) for path in (*files, *documents)}:
        raise UserError(f"{args.target} would overwrite files of {args.source}; choose another folder to write to.")
    if len(taken) < len(files) + len(documents):
        raise UserError(f"{args.source}: two of its files would get the same path in {args.target}; rename one.")
    note_path = os.path.join(target, NOTE)
    note = {"source": source, "long_side": args.long_side, "masks": args.masks}
    if os.path.isdir(target) and os.listdir(target) and not os.path.exists(note_path):
        raise UserError(f"{args.target} is not empty and no earlier resizing made it; give a new or empty folder.")
    if os.path.exists(note_path) and read_json(note_path) != note:
        raise UserError(f"{args.target} holds the result of another command (see {NOTE} in it); give a new folder, or "
                        "the same arguments to continue.")
    make_output_dir(target, "target")
    write_file(note_path, json.dumps(note, indent=1))

    def copy(path):
        target = target_of(path)
        try:
            if os.path.isfile(target) and os.stat(target).st_mtime_ns >= os.stat(path).st_mtime_ns:
                return "there"
            file, changed = smaller_file(path, args.long_side, files[path])
        except UserError as error:
            return str(error)
        except (OSError, ValueError, SyntaxError, cv2.error) as error:  # what PIL raises for broken files
            return f"{path}: {error}"
        with file, replacing(target) as copied:  # what goes wrong here ends the run
            shutil.copyfileobj(file, copied)
        return "changed" if changed else "copied"

    count, broken = collections.Counter(), []
    for result in in_threads(copy, files, "resizing", not args.no_progress, "files"):
        if result in ("changed", "copied", "there"):
            count[result] += 1
        else:
            broken.append(result)
    for document, content in documents.items():
        content = rewrite_paths(document, content, target_of, target)
        write_file(target_of(document), json.dumps(content, indent=1))
    dataset = "".join(f"; the dataset is {target_of(document)}" for document in list(documents)[:1])
    say(f"{args.target}: {counted(count['changed'], 'file')} changed, {count['copied']} copied, {count['there']} "
        f"already there{dataset}")
    if broken:
        raise UserError(f"{len(broken)} of {len(files)} files can't be read and are left out, first "
                        f"{broken[0].rstrip('.')}; fix them and run again.")


if __name__ == "__main__":
    exit_on_user_error(main)
