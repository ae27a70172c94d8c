"""Pair images with their masks, by name or by the recipe of a public set, and write them as a JSON dataset.

    python tools/make_pairs.py --image_root Tp --mask_root Gt --output my_set.json
    python tools/make_pairs.py --image_root Tp --mask_root Gt --authentic_root Au --output my_set.json
    python tools/make_pairs.py --recipe casia2 --root "CASIA 2.0" --output CASIA2.json

Writes a list of [image, mask or "Negative"], with paths relative to the JSON where the files lie below its folder. With
--recipe it also converts masks that are not 0/255 already, into a folder of their own; the sources are never changed.
What has no partner is listed, and then nothing is written unless --skip_unpaired leaves it out.
"""
import csv
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

from data import IMAGE_SUFFIXES, MASK_SUFFIX, list_files, list_images, pair_by_name, read_image, split_stem
from log import Progress, write_file
from registry import Parser, UserError, exit_on_user_error

LISTED = 20  # a longer list is cut on the screen and written to a text file


class SetFiles(NamedTuple):
    """The files of one set, as paths relative to its root."""

    pairs: list  # of (image, mask)
    authentic: list  # images
    images_left: list  # without a mask
    masks_left: list  # without an image


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: public sets whose names, folders or mask colours need special knowledge
#
# A recipe is a few regular expressions on the path below --root; an image belongs to the mask with the same `key`. They
# match from any folder on, so an archive may have been unpacked into a doubled folder.


def green_is_tampered(pixels):
    """Columbia's edge masks, RGB (H, W, 3) -> bool (H, W): both greens, and half of what JPEG blends with the red."""
    return (pixels[..., 1] > pixels[..., 0]) & (pixels[..., 1] > 100)


def black_is_tampered(pixels):
    """Inverted masks, RGB (H, W, 3) -> bool (H, W): where the mean of the channels is below 127.5."""
    return pixels.sum(axis=2, dtype=np.uint16) <= 382


def nonzero_is_tampered(pixels):
    """Soft or 0/1 masks, RGB (H, W, 3) -> bool (H, W): where any channel is above 0."""
    return pixels.any(axis=2)


@dataclass
class Recipe:
    """How images and masks of one public set belong together, by name, and how its masks become binary."""

    title: str
    layout: str  # where the files lie below --root, for the message when none are found
    tampered: str = ""  # regular expression with the group `key`; case does not matter
    mask: str = ""  # likewise
    authentic: str = ""  # regular expression
    table: str = ""  # instead of these three: regular expression of the table that names the pairs
    expected: tuple = ()  # published numbers: tampered images with a mask, authentic ones, masks (None: unknown)
    says: tuple = ()  # what the recipe chose or assumed, printed
    binary: Optional[Callable] = None  # RGB (H, W, 3) -> bool (H, W); None: the loader's "mean > 127.5" is right
    shared: bool = False  # one mask serves several images
    by_number: bool = False  # the key is a number in the name, and the rest of the name may differ
    without_mask: str = ""  # regular expression of images that were published without a mask

    def find(self, root):
        """Return the SetFiles of the copy of the set below `root`; UserError where one key has several files."""
        if self.table:
            return self.find_by_table(root)
        paths = list_images(root)
        groups = {}  # key -> (images, masks)
        for side, pattern in enumerate((self.tampered, self.mask)):
            for path in paths:
                if match := re.search(pattern, path, re.IGNORECASE):
                    groups.setdefault(match["key"].casefold(), ([], []))[side].append(path)
        for images, masks in groups.values():
            if len(masks) > 1 or (len(images) > 1 and not self.shared):
                raise UserError(f"{', '.join(images + masks)}: more than one image and one mask of the same name or "
                                f"number; keep one copy of {self.title} below --root.")
        pairs = [(image, mask) for images, masks in groups.values() for mask in masks for image in images]
        return SetFiles(sorted(pairs), [path for path in paths if re.search(self.authentic, path, re.IGNORECASE)],
                        [path for images, masks in groups.values() if not masks for path in images],
                        [path for images, masks in groups.values() if not images for path in masks])

    def find_by_table(self, root):
        """Return the SetFiles that the set's table names; a pair of which one file is missing is in `images_left`."""
        tables = [path for path in list_files(root, {".csv"}) if re.search(self.table, path, re.IGNORECASE)]
        if len(tables) != 1:
            raise UserError(f"--root {root}: {len(tables) or 'no'} tables of pairs {' '.join(tables)}; give the "
                            f"folder of one copy of {self.title} ({self.layout}).")
        base = tables[0][:tables[0].lower().rindex("reference/")]
        on_disk = {path.casefold(): path for path in list_images(root)}
        files = SetFiles([], [], [], [])
        for is_target, *names in read_pair_table(os.path.join(root, tables[0])):
            image, mask = (on_disk.get((base + name).casefold()) for name in names)
            if is_target.upper() != "Y":
                files.authentic.extend([image] if image else [])
            elif image and mask:
                files.pairs.append((image, mask))
            else:
                files.images_left.append(f"{names[0]} with {names[1]} (the {'mask' if image else 'image'} is missing)")
        return files


def read_pair_table(path):
    """Return [(IsTarget, image, mask)] of a NIST table, old or new header, with "|" or "," between; or UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.read().splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy this table again.") from None
    rows = list(csv.reader(lines, delimiter="|" if lines[0].count("|") > lines[0].count(",") else ","))
    header = [name.strip().lower() for name in rows[0]]
    names = "istarget", "probefilename", "imgfname", "probemaskfilename", "maskfname"
    columns = [header.index(name) for name in names if name in header]
    if len(columns) != 3:
        raise UserError(f"{path}: the header lacks IsTarget, ProbeFileName or ProbeMaskFileName ({lines[0][:80]}); "
                        "copy this table again.")
    return [tuple(row[column].strip().replace("\\", "/") for column in columns)
            for row in rows[1:] if len(row) == len(header)]


def autosplice(quality):
    """Return the recipe for one of the three JPEG qualities in which AutoSplice holds the same forgeries."""
    return Recipe(
        f"AutoSplice JPEG {quality}", f"Forged_JPEG{quality}/<id>_<k>.jpg, Mask/<id>_mask.png, Authentic/<id>.jpg",
        tampered=rf"(?:^|/)Forged_JPEG{quality}/(?:.*/)?(?P<key>[^/]+)_\d+\.jpe?g$",
        mask=r"(?:^|/)Mask/(?:.*/)?(?P<key>[^/]+)_mask\.png$", authentic=r"(?:^|/)Authentic/(?:.*/)?[^/]+\.jpe?g$",
        expected=(3621, 2273, None), binary=nonzero_is_tampered, shared=True,
        says=(f"images of Forged_JPEG{quality}; the recipes autosplice, autosplice90 and autosplice75 give the same "
              "forgeries in three qualities, so never train on one and test on another",
              "masks: tampered where any channel is above 0; one mask serves all edits of an image",
              "assumed (unverified): an all-white mask is right, the whole image is generated then"))


RECIPES = {
    "columbia": Recipe(
        "Columbia", "4cam_splc/*.tif, 4cam_splc/edgemask/*_edgemask.jpg, 4cam_auth/*.tif",
        tampered=r"(?:^|/)4cam_splc/(?:4cam_splc/)?(?P<key>[^/]+)\.(?:tiff?|bmp)$",
        mask=r"(?:^|/)4cam_splc/(?:.*/)?(?P<key>[^/]+)_edgemask\.[^./]+$",
        authentic=r"(?:^|/)4cam_auth/(?:4cam_auth/)?[^/]+\.(?:tiff?|bmp)$",
        expected=(180, 183, 180), binary=green_is_tampered,
        says=("masks: green (G > R and G > 100) is the spliced region and red the host; some scripts take red instead",
              "the masks *_edgemask_3, with a blue band of unknown pixels, are not used")),
    "coverage": Recipe(
        "COVERAGE", "image/<n>t.tif, mask/<n>forged.tif, image/<n>.tif",
        tampered=r"(?:^|/)(?P<key>\d+)t\.tiff?$", mask=r"(?:^|/)(?P<key>\d+)forged\.tiff?$",
        authentic=r"(?:^|/)\d+\.tiff?$", expected=(100, 100, 100),
        says=("masks: <n>forged.tif as they are, white is tampered; <n>copy.tif and <n>paste.tif are no ground truth",
              "in copies from before 27 Sep 2017 some tampered and authentic images are exchanged")),
    "nist16": Recipe(
        "NIST16", "reference/manipulation/NC2016-manipulation-ref.csv and the files that it names",
        table=r"(?:^|/)reference/manipulation/[^/]*manipulation-ref\.csv$",
        expected=(564, 560, 282), binary=black_is_tampered, shared=True,
        says=("pairs: from the manipulation table alone, which holds the splices and removals too",
              "masks: inverted, black is tampered; each serves two images",
              "the images come from 69 base images, so training and test images of a random split are related")),
    "casia1": Recipe(
        "CASIAv1", "Tp/{CM,Sp}/Sp_*.jpg, any folder with Sp_*_gt.png, Au_*.jpg",
        tampered=r"^(?!(?:.*/)?Au/)(?:.*/)?Sp_[^/]*[_.](?P<key>\d{4})\.[^./]+$",
        mask=r"(?:^|/)Sp_[^/]*[_.](?P<key>\d{4})_gt3?\.[^./]+$", authentic=r"(?:^|/)Au_[a-z]+_\d{4}\.[^./]+$",
        expected=(920, 800, 920), by_number=True, without_mask=r"_0542\.[^./]+$",
        says=("masks: as they are, found by the 4-digit number at the end of the image's name",
              "its authentic images are in CASIAv2 too: no image-level result on them after training there")),
    "casia2": Recipe(
        "CASIAv2", "Tp/Tp_*.{jpg,tif}, any folder with Tp_*_gt.png, Au/Au_*.{jpg,bmp}",
        tampered=r"^(?!(?:.*/)?Au/)(?:.*/)?Tp_[^/]*[_.](?P<key>\d{5})\.[^./]+$",
        mask=r"(?:^|/)Tp_[^/]*[_.](?P<key>\d{5})_gt3?\.[^./]+$", authentic=r"(?:^|/)Au_[a-z]+_\d{5}\.[^./]+$",
        expected=(5123, 7491, 5123), by_number=True,
        says=("masks: as they are, found by the 5-digit number at the end of the image's name",
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
              "assumed (unverified): grey values, if there are any, are split in the middle")),
    "autosplice": autosplice(100), "autosplice90": autosplice(90), "autosplice75": autosplice(75),
}


def report_recipe(recipe, files, tampered_only):
    """Print what a recipe assumes and how the files it found differ from the published set.

    Images that were published without a mask are taken out of `files.images_left`.
    """
    title = recipe.title
    for line in recipe.says:
        print(f"{title}: {line}")
    for path in [path for path in files.images_left if recipe.without_mask and re.search(recipe.without_mask, path)]:
        print(f"{title}: {path} was published without a mask and is left out")
        files.images_left.remove(path)
    renamed = sum(split_stem(image)[1] != MASK_SUFFIX.sub("", split_stem(mask)[1]) for image, mask in files.pairs)
    if recipe.by_number and renamed:
        print(f"{title}: {renamed} pairs agree in their number only, since one side has names of another version")
    kinds = (("tampered images with a mask", files.pairs), ("authentic images", files.authentic),
             ("masks", {mask for _, mask in files.pairs}))
    for (kind, found), expected in zip(kinds, recipe.expected):
        if expected not in (None, len(found)) and (found or not tampered_only):
            print(f"warning: {title}: expected {expected} {kind}, found {len(found)}; this is not the whole published "
                  "set")


def drop_unequal_sizes(pairs, root, output):
    """Return the pairs (relative to `root`) whose image and mask have the same size by their headers; list the others.

    Raises UserError if none is left.
    """
    good, bad = [], []
    for pair in pairs:
        image, mask = (os.path.join(root, path) for path in pair)
        size, mask_size = header_size(image), header_size(mask)
        if size and mask_size and (mask_size == size or mask_size == header_size(image, turn=True)):
            good.append(pair)
        else:
            texts = [f"{side[0]}x{side[1]}" if side else "unreadable" for side in (size, mask_size)]
            bad.append(f"{pair[0]} {texts[0]}, {pair[1]} {texts[1]}")
    print_list("pairs left out, sizes differ or unreadable", bad, output)
    if not good:
        raise UserError(f"--root {root}: no image has the size of its mask; nothing was written, copy the set again.")
    return good


def header_size(path, turn=False):
    """Return (height, width) without decoding, with `turn` after the turn that EXIF asks for; None for no image."""
    try:
        with warnings.catch_warnings():  # Pillow warns of more than 89 megapixels, which are all right here
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = turn and image.getexif().get(0x0112, 1) in range(5, 9)
                return image.size if turned else image.size[::-1]
    except Exception:  # PIL raises many types; each means that this is no image
        return None


def check_mask_output(mask_output, root, overwrite):
    """Raise UserError where converted masks would be written into the source or between other files."""
    target, source = os.path.realpath(mask_output), os.path.realpath(root)
    if is_inside(target, source) or is_inside(source, target):
        raise UserError(f"{mask_output}: converted masks would mix with --root {root}; give an --output or "
                        "--mask_output outside of it.")
    if os.path.isdir(mask_output) and os.listdir(mask_output) and not overwrite:
        raise UserError(f"{mask_output}: converted masks go here, but it is not empty; give --overwrite or another "
                        "--mask_output.")


def convert_masks(masks, root, mask_output, binary, progress):
    """Write each mask as a 0/255 PNG into the same tree below `mask_output`; return {mask: converted mask}."""
    targets = {mask: os.path.join(mask_output, os.path.splitext(os.path.relpath(mask, root))[0] + ".png")
               for mask in masks}

    def convert(mask):
        pixels = binary(read_image(mask)).astype(np.uint8) * 255
        write_file(targets[mask], cv2.imencode(".png", pixels)[1].tobytes())

    print(f"converting {len(targets)} masks to 0/255 PNG files in {mask_output} (--root is not changed)", flush=True)
    with ThreadPool(os.cpu_count()) as pool, Progress("converting", len(targets), progress, "masks") as bar:
        for _ in pool.imap(convert, targets):
            bar.update()
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of folders


def find_in_folders(roots):
    """Return the SetFiles of `roots`, {"image_root": folder, "mask_root": folder, perhaps "authentic_root": folder}.

    Masks may lie beside their images. A root that lies below another one, even by a link, belongs to itself alone.
    Raises UserError for a root without images.
    """
    real = {flag: os.path.realpath(root) for flag, root in roots.items()}
    absolute = {flag: os.path.abspath(root) for flag, root in roots.items()}
    images = {}
    for flag, root in roots.items():
        inner = tuple(path_for_json(other, full[flag]) + "/" for full in (real, absolute) for other in full.values()
                      if other != full[flag] and is_inside(other, full[flag]))
        images[flag] = [path for path in list_images(root) if not path.startswith(inner)]
        if not images[flag]:
            raise UserError(f"--{flag} {root}: no image in it or below ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    if real.get("authentic_root") in (real["image_root"], real["mask_root"]):
        raise UserError(f"--authentic_root {roots['authentic_root']}: is also --image_root or --mask_root; give the "
                        "folder of the authentic images alone.")
    tampered, masks = images["image_root"], images["mask_root"]
    if real["image_root"] == real["mask_root"]:
        stems = {"".join(split_stem(path)).casefold() for path in tampered}
        masks = [path for path in tampered if is_mask_beside(path, stems)]
        tampered = sorted({*tampered}.difference(masks))
    pairs, *left = pair_by_name(tampered, masks)
    return SetFiles(pairs, images.get("authentic_root", []), *left)


def is_mask_beside(path, stems):
    """Tell whether a file is the mask of another one in its folder: its stem is that one's plus a suffix."""
    stem = "".join(split_stem(path)).casefold()
    bare = MASK_SUFFIX.sub("", stem)
    return bare != stem and bare in stems


# ---------------------------------------------------------------------------------------------------------------------
# Shared by both ways


def is_inside(path, folder):
    """Tell whether a path is `folder` or lies below it; both absolute."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def path_for_json(path, folder):
    """Return a path relative to the JSON's folder, with "/", if the file lies below it, else the absolute path."""
    path = os.path.abspath(path)
    return path[len(folder.rstrip(os.sep)) + 1:].replace(os.sep, "/") if is_inside(path, folder) else path


def print_list(title, paths, output):
    """Print a list of names; a long one is cut, and written in full beside the output."""
    if paths:
        print("\n  ".join([f"{title} ({len(paths)}):", *paths[:LISTED]]))
    if len(paths) > LISTED:
        full = f"{os.path.splitext(output)[0]}_{title.replace(' ', '_')}.txt"
        write_file(full, "\n".join([*paths, ""]))
        print(f"  ... all {len(paths)} are in {full}")


def refuse_unpaired(files, no_pair, output, skip_unpaired):
    """List what has no partner; UserError if there is any, unless it may be skipped, or if there is no pair at all."""
    lists = ("images without a mask", files.images_left), ("masks without an image", files.masks_left)
    for title, paths in lists:
        print_list(title, paths, output)
    if not files.pairs:
        raise UserError(f"{no_pair}; nothing was written.")
    if any(paths for _, paths in lists) and not skip_unpaired:
        raise UserError(f"{' and '.join(f'{title} ({len(paths)})' for title, paths in lists if paths)}, listed above, "
                        "so nothing was written: fix that, or leave them out with --skip_unpaired.")


def get_args():
    """Return the parsed command line; UserError for flags that do not go together or an --output that can't be it."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--image_root", help="folder of the tampered images (with all folders below)")
    add("--mask_root", help="folder of their masks; the same folder when they lie beside the images")
    add("--authentic_root", help='folder of authentic images, listed as "Negative" (default: none)')
    add("--recipe", metavar="NAME", choices=RECIPES, help=f"instead: rules for a public set, {', '.join(RECIPES)}")
    add("--root", help="with --recipe: the set's own folder")
    add("--mask_output", help="with --recipe: folder for masks that have to be converted to 0/255 (default: "
        "<output>_masks beside the JSON)")
    add("--tampered_only", action="store_true", help="with --recipe: leave the authentic images out")
    add("--output", required=True, help='JSON to write, a list of [image, mask or "Negative"]')
    add("--skip_unpaired", action="store_true", help="leave out images without a mask and masks without an image "
        "(otherwise they are listed and nothing is written)")
    add("--overwrite", action="store_true", help="replace an existing --output and its converted masks")
    add("--no_progress", action="store_true", help="don't show progress")
    args = parser.parse_args()
    if args.recipe:
        needed, foreign = ["root"], ["authentic_root", "image_root", "mask_root"]
    else:
        needed, foreign = ["image_root", "mask_root"], ["mask_output", "root", "tampered_only"]
    wrong = [f"--{flag} is missing" for flag in needed if not getattr(args, flag)]
    wrong += [f"--{flag} does not belong here" for flag in foreign if getattr(args, flag)]
    if wrong:
        raise UserError(f"{' and '.join(wrong)}: give --image_root and --mask_root [--authentic_root], or --recipe and "
                        "--root [--mask_output --tampered_only].")
    if not args.output.lower().endswith(".json") or os.path.isdir(args.output):
        raise UserError(f"--output {args.output}: give a file name that ends in .json.")
    if os.path.exists(args.output) and not args.overwrite:
        raise UserError(f"--output {args.output} exists: give another name or --overwrite.")
    return args


def main():
    args = get_args()
    if args.recipe:
        recipe = RECIPES[args.recipe]
        mask_output = args.mask_output or os.path.splitext(args.output)[0] + "_masks"
        if recipe.binary:
            check_mask_output(mask_output, args.root, args.overwrite)
        image_root = mask_root = authentic_root = args.root
        files = recipe.find(args.root)
        no_pair = f"--root {args.root} holds no {recipe.title} ({recipe.layout})"
        if not files.pairs and not files.images_left:
            raise UserError(f"{no_pair}; give the set's own folder.")
        if args.tampered_only:
            files.authentic.clear()
        report_recipe(recipe, files, args.tampered_only)
    else:
        image_root, mask_root, authentic_root = args.image_root, args.mask_root, args.authentic_root
        roots = {"image_root": image_root, "mask_root": mask_root, "authentic_root": authentic_root}
        files = find_in_folders({flag: root for flag, root in roots.items() if root})
        no_pair = "no image and mask agree in name (stem, suffix such as _gt)"
    refuse_unpaired(files, no_pair, args.output, args.skip_unpaired)

    pairs = drop_unequal_sizes(files.pairs, args.root, args.output) if args.recipe else files.pairs
    images = [os.path.join(image_root, image) for image, _ in pairs]
    masks = [os.path.join(mask_root, mask) for _, mask in pairs]
    if args.recipe and recipe.binary:
        converted = convert_masks(masks, args.root, mask_output, recipe.binary, not args.no_progress)
        masks = [converted[mask] for mask in masks]

    folder = os.path.dirname(os.path.abspath(args.output))
    rows = [[path_for_json(image, folder), path_for_json(mask, folder)] for image, mask in zip(images, masks)]
    rows += [[path_for_json(os.path.join(authentic_root, path), folder), "Negative"] for path in files.authentic]
    write_file(args.output, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for i in sorted({*range(len(pairs))[:3], *range(len(pairs))[-3:]}):
        print(f"  pair {i + 1}: {rows[i][0]} with {rows[i][1]}")
    print(f"{args.output}: {len(pairs)} tampered and {len(files.authentic)} authentic images; "
          f"`python tools/check_data.py {args.output}` looks into all files.")


if __name__ == "__main__":
    exit_on_user_error(main)
