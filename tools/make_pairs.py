"""Pair images with their masks, by name, recipe of a public set or split list, and write them as a JSON dataset.

    python tools/make_pairs.py --image_root Tp --mask_root Gt --output my_set.json
    python tools/make_pairs.py --image_root Tp --mask_root Gt --authentic_root Au --output my_set.json
    python tools/make_pairs.py --recipe casia2 --root "CASIA 2.0" --output CASIA2.json
    python tools/make_pairs.py --list IMD_train_list.txt --root IMD2020 --recipe imd2020 --output IMD2020.json

Writes a list of [image, mask or "Negative"], with paths relative to the JSON where the files lie below its folder. With
--recipe it also converts masks that are not 0/255 already, into a folder of their own; the sources are never changed.
--list takes the split lists of papers: one line an image, its mask (None or -1: it has none) in the second column.
What has no partner is listed, and then nothing is written unless --skip_unpaired leaves it out.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import collections
import csv
import json
import os
import posixpath
import re
import zipfile
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import cv2
import numpy as np
from PIL import Image

from data import (IMAGE_SUFFIXES, MASK_FILE_SUFFIXES, MASK_SUFFIX, MAX_BYTES, list_files, list_images, list_masks,
                  pair_by_name, read_image, read_regular, split_stem, stored_size)
from log import in_threads, make_output_dir, say, write_file
from registry import Parser, UserError, counted, exit_on_user_error, visible

LISTED = 20  # a longer list is cut on the screen and written to a text file
FILE_SUFFIXES = MASK_FILE_SUFFIXES | {".npz"}  # FantasticReality's masks are arrays
AUTHENTIC_FOLDERS = {"au", "authentic", "real", "pristine", "original", "originals", "4cam_auth"}


class SetFiles(NamedTuple):
    """The files of one set, as paths relative to its root."""

    pairs: list  # of (image, mask)
    authentic: list  # images
    images_left: list  # without a mask
    masks_left: list  # without an image


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: public sets whose names, folders or mask colours need special knowledge
#
# A recipe is a few regular expressions on the path below --root; an image belongs to the mask with the same key, which
# is what their groups hold. They match from any folder on, so an archive may have been unpacked into a doubled folder.


def green_is_tampered(pixels):
    """Columbia's edge masks, RGB (H, W, 3) -> bool (H, W): both greens, and half of what JPEG blends with the red."""
    return (pixels[..., 1] > pixels[..., 0]) & (pixels[..., 1] > 100)


def black_is_tampered(pixels):
    """Inverted masks, RGB (H, W, 3) -> bool (H, W): where the mean of the channels is below 127.5."""
    return pixels.sum(axis=2, dtype=np.uint16) <= 382


def nonzero_is_tampered(pixels):
    """Soft or 0/1 masks, RGB (H, W, 3) -> bool (H, W): where any channel is above 0."""
    return pixels.any(axis=2)


def above_10_is_tampered(pixels):
    """Korus' masks of three levels, RGB (H, W, 3) -> bool (H, W): grey, the collateral change, is tampered too."""
    return (pixels > 10).any(axis=2)


@dataclass
class Recipe:
    """How images and masks of one public set belong together, by name, and how its masks become binary."""

    title: str
    layout: str  # where the files lie below --root, for the message when none are found
    tampered: str = ""  # regular expression whose groups are the key; case does not matter
    mask: str = ""  # likewise
    authentic: str = "(?!)"  # regular expression; the default matches nothing
    mask_key: Callable = str  # from the key of an image to that of its mask
    table: str = ""  # instead of these three: regular expression of the table that names the pairs
    expected: tuple = ()  # published numbers: tampered images with a mask, authentic ones, masks (None: unknown)
    says: tuple = ()  # what the recipe chose or assumed, printed
    binary: Optional[Callable] = None  # RGB (H, W, 3) -> bool (H, W); None: the loader's "mean > 127.5" is right
    shared: bool = False  # one mask serves several images
    foreign_masks: bool = False  # masks of images of another recipe lie there too
    by_number: bool = False  # the key is a part of the name, and the rest may differ
    without_mask: str = ""  # regular expression of images that were published without a mask
    twice: str = "keep one copy below --root"  # what to do where several images have one key

    def find(self, root):
        """Return the SetFiles of the copy of the set below `root`; UserError where one key has several files."""
        if self.table:
            return self.find_by_table(root)
        paths = list_files(root, FILE_SUFFIXES)
        groups = {}  # key -> (images, masks)
        for side, (pattern, to_key) in enumerate(((self.tampered, self.mask_key), (self.mask, str))):
            for path in paths:
                if match := re.search(pattern, path, re.IGNORECASE):
                    key = to_key(" ".join(group or "" for group in match.groups())).casefold()
                    groups.setdefault(key, ([], []))[side].append(path)
        twice = [images for images, _ in groups.values() if len(images) > 1 and not self.shared]
        if twice:
            raise UserError(f"--root {root} holds images of {self.title} more than once ({len(twice)}), such as "
                            f"{' and '.join(twice[0])}: {self.twice}.")
        twice = [masks for _, masks in groups.values() if len(masks) > 1]
        if twice:
            raise UserError(f"--root {root} holds masks of {self.title} more than once ({len(twice)}), such as "
                            f"{' and '.join(twice[0])}: keep one copy below --root.")
        pairs = [(image, mask) for images, masks in groups.values() for mask in masks for image in images]
        return SetFiles(sorted(pairs), [path for path in paths if re.search(self.authentic, path, re.IGNORECASE)],
                        [path for images, masks in groups.values() if not masks for path in images],
                        [path for images, masks in groups.values() if not images for path in masks
                         if not self.foreign_masks])

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
        tampered=rf"(?:^|/)Forged_JPEG{quality}/(?:.*/)?([^/]+)_\d+\.jpe?g$",
        mask=r"(?:^|/)Mask/(?:.*/)?([^/]+)_mask\.png$", authentic=r"(?:^|/)Authentic/(?:.*/)?[^/]+\.jpe?g$",
        expected=(3621, 2273, None), binary=nonzero_is_tampered, shared=True,
        says=(f"images of Forged_JPEG{quality}; the recipes autosplice, autosplice90 and autosplice75 give the same "
              "forgeries in three qualities, so never train on one and test on another",
              "masks: tampered where any channel is above 0; one mask serves all edits of an image",
              "assumed (unverified): an all-white mask is right, the whole image is generated then"))


def tampcoco(*kinds, images=None):
    """Return the recipe for some of tampCOCO's kinds: sp, cm, bcm and bcmc, which has bcm's masks."""
    def mask_key(key):
        if key.startswith("bcmc"):
            key = "bcm" + re.sub(r"_aligned_Q\d+(?=\.jpg)", "", key.removeprefix("bcmc"))
        return key.replace(".jpg", ".png")

    mask_kinds = dict.fromkeys("bcm" if kind == "bcmc" else kind for kind in kinds)
    return Recipe(
        f"tampCOCO {' '.join(kinds)}", " and ".join(f"{kind}_images/*.jpg" for kind in kinds) + " with " +
        " and ".join(f"{kind}_masks/*.png" for kind in mask_kinds),
        tampered=rf"(?:^|/)({'|'.join(kinds)})_images/(?:.*/)?([^/]+\.jpg)$",
        mask=rf"(?:^|/)({'|'.join(mask_kinds)})_masks/(?:.*/)?([^/]+\.png)$", mask_key=mask_key,
        expected=(images, None, None), shared=True, foreign_masks=kinds in (("bcm",), ("bcmc",)),
        says=("images: all on disk; CAT-Net's own split is in its lists (--list)",
              *(["bcm and bcmc are one set with and without a last compression, so never train on one and test on the "
                 "other"] if "bcmc" in kinds else []),
              "assumed (unverified): masks hold 0 and 255; CAT-Net takes all above 0 as tampered"))


CASIA1_NAME = r"Sp_[DS]_([A-Z]{3}_[A-Z]_[a-z]{3}\d{4})_[a-z]{3}\d{4}[_.](\d{4})"  # the number alone is not unique
RECIPES = {
    "columbia": Recipe(
        "Columbia", "4cam_splc/*.tif, 4cam_splc/edgemask/*_edgemask.jpg, 4cam_auth/*.tif",
        tampered=r"(?:^|/)4cam_splc/(?:4cam_splc/)?([^/]+)\.(?:tiff?|bmp)$",
        mask=r"(?:^|/)4cam_splc/(?:.*/)?([^/]+)_edgemask\.[^./]+$",
        authentic=r"(?:^|/)4cam_auth/(?:4cam_auth/)?[^/]+\.(?:tiff?|bmp)$",
        expected=(180, 183, 180), binary=green_is_tampered,
        says=("masks: green (G > R and G > 100) is the spliced region and red the host; some scripts take red instead",
              "the masks *_edgemask_3, with a blue band of unknown pixels, are not used")),
    "coverage": Recipe(
        "COVERAGE", "image/<n>t.tif, mask/<n>forged.tif, image/<n>.tif",
        tampered=r"(?:^|/)(\d+)t\.tiff?$", mask=r"(?:^|/)(\d+)forged\.tiff?$",
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
        tampered=rf"^(?!(?:.*/)?Au/)(?:.*/)?{CASIA1_NAME}\.[^./]+$",
        mask=rf"(?:^|/){CASIA1_NAME}_gt3?\.[^./]+$", authentic=r"(?:^|/)Au_[a-z]+_\d{4}\.[^./]+$",
        expected=(920, 800, 920), by_number=True, without_mask=r"Sp_D_NRN_A_cha0011_sec0011_0542\.[^./]+$",
        twice="original and modified images lie together; move the folder of the original ones (Original Tp) out of "
              "--root, or give as --root a folder that holds the modified ones and the masks alone",
        says=("masks: as they are, found by technique, first content and number in the image's name, which all "
              "versions of the names share",
              "its authentic images are in CASIAv2 too: no image-level result on them after training there")),
    "casia2": Recipe(
        "CASIAv2", "Tp/Tp_*.{jpg,tif}, any folder with Tp_*_gt.png, Au/Au_*.{jpg,bmp}",
        tampered=r"^(?!(?:.*/)?(?:Au|jpg)/)(?:.*/)?Tp_[^/]*[_.](\d{5})\.[^./]+$",
        mask=r"(?:^|/)Tp_[^/]*[_.](\d{5})_gt3?\.[^./]+$",
        authentic=r"^(?!(?:.*/)?jpg/)(?:.*/)?Au_[a-z]+_\d{5}\.[^./]+$",
        expected=(5123, 7491, 5123), by_number=True,
        says=("masks: as they are, found by the 5-digit number at the end of the image's name",
              "a folder jpg/, which CAT-Net's script makes, is left out",
              "assumed (unverified): masks hold nothing but 0 and 255")),
    "imd2020": Recipe(
        "IMD2020", "<folder>/<name>.{jpg,png}, <folder>/<name>_mask.png, <folder>/*_orig.jpg",
        tampered=r"^(?!(?:.*/)?0jpg/)(.+)(?<!_orig)(?<!_mask)\.(?:jpe?g|png)$",
        mask=r"^(?!(?:.*/)?0jpg/)(.+)_mask\.png$", authentic=r"^(?!(?:.*/)?0jpg/).+_orig\.(?:jpe?g|png)$",
        expected=(2010, 414, 2010), binary=nonzero_is_tampered,
        says=("masks: tampered where any channel is above 0, as in CAT-Net and TruFor; above 127 would move soft edges",
              "assumed (unverified): outside of the tampered region the masks are exactly 0")),
    "dso1": Recipe(
        "DSO-1", "DSO-1/splicing-<n>.png, DSO-1-Fake-Images-Masks/splicing-<n>.png, DSO-1/normal-<n>.png",
        tampered=r"(?:^|/)DSO-1/(?:DSO-1/)?(splicing-\d+)\.png$",
        mask=r"(?:^|/)DSO-1-Fake-Images-Masks/(?:.*/)?(splicing-\d+)\.png$",
        authentic=r"(?:^|/)DSO-1/(?:DSO-1/)?normal-\d+\.png$", expected=(100, 100, 100), binary=black_is_tampered,
        says=("masks: inverted, black is tampered",
              "assumed (unverified): grey values, if there are any, are split in the middle")),
    "autosplice": autosplice(100), "autosplice90": autosplice(90), "autosplice75": autosplice(75),
    "cocoglide": Recipe(
        "CocoGlide", "fake/glide_inpainting_val2017_<id>_up.png, mask/<class>_<id>_mask.png, real/<class>_<id>.png",
        tampered=r"(?:^|/)fake/(?:.*/)?glide_inpainting_val2017_(\d+)_up\.png$",
        mask=r"(?:^|/)mask/(?:.*/)?[^/]*_(\d+)_mask\.png$", authentic=r"(?:^|/)real/(?:.*/)?[^/]+_\d+\.png$",
        expected=(512, 512, 512),
        says=("masks: found by the number, since they bear the authentic image's name",
              "assumed (unverified): masks hold 0 and 255, and white is generated")),
    "openforensics": Recipe(
        "OpenForensics", "Test-Dev/<x>.jpg, Annotations_GT/Images/Test-Dev/<x>.png",
        tampered=r"(?:^|/)Test-Dev/([^/]+)\.jpe?g$", mask=r"(?:^|/)Annotations_GT/(?:.*/)?Test-Dev/([^/]+)\.png$",
        expected=(2000, None, 2000),
        says=("the 2000 tampered images of TruFor's test, which takes no authentic ones",
              "assumed (unverified): masks hold 0 and 255, and white is tampered")),
    "fantasticreality": Recipe(
        "FantasticReality", "ColorFakeImages/<x>.jpg, SegmentationFake/<x>.npz, ColorRealImages/<x>.jpg",
        tampered=r"(?:^|/)ColorFakeImages/(?:.*/)?([^/]+)\.jpe?g$",
        mask=r"(?:^|/)SegmentationFake/(?:.*/)?([^/]+)\.npz$",
        authentic=r"(?:^|/)ColorRealImages/(?:.*/)?[^/]+\.jpe?g$", expected=(19423, 16592, 19423),
        binary=nonzero_is_tampered,
        says=("masks: the array arr_0 of each .npz, tampered where it is above 0",)),
    "tampcoco": tampcoco("sp", "cm", "bcm", "bcmc"), "tampcoco_sp": tampcoco("sp"),
    "tampcoco_cm": tampcoco("cm", images=199429), "tampcoco_bcm": tampcoco("bcm", images=199443),
    "tampcoco_bcmc": tampcoco("bcmc"),
    "defacto": Recipe(
        "DEFACTO", "<kind>-images/img/<x>.tif, <kind>-annotations/probe_mask/<x>.{jpg,tif}",
        tampered=r"(?:^|/)([^/]+)-images(-\d+)?/(?:.*/)?img/([^/]+)\.tiff?$",
        mask=r"(?:^|/)([^/]+)-annotations(-\d+)?/(?:.*/)?probe_mask/([^/]+)\.(?:jpe?g|tiff?)$",
        says=("masks: those of probe_mask/ as they are; names repeat, so kind and part (Splicing-1) count too",
              "its authentic images are COCO's, which are not looked for here",
              "assumed (unverified): white is tampered")),
    "comofod": Recipe(
        "CoMoFoD", "<nnn>_F.png, <nnn>_B.png, <nnn>_O.png",
        tampered=r"(?:^|/)(\d{3})_F\.png$", mask=r"(?:^|/)(\d{3})_B\.png$", authentic=r"(?:^|/)\d{3}_O\.png$",
        expected=(200, 200, 200),
        says=("the images without postprocessing alone; those with it (<nnn>_F_JC1.jpg, ...) are left out",
              "assumed (unverified): masks hold 0 and 255; white is the copy and its source")),
    "korus": Recipe(
        "Korus", "<camera>/tampered-realistic/<x>.TIF, <camera>/ground-truth/<x>.PNG, <camera>/pristine/<x>.TIF",
        tampered=r"(?:^|/)([^/]+)/tampered-realistic/([^/]+)\.tiff?$",
        mask=r"(?:^|/)([^/]+)/ground-truth/([^/]+)\.png$", authentic=r"(?:^|/)pristine/[^/]+\.tiff?$",
        expected=(220, 220, 220), binary=above_10_is_tampered,
        says=("masks: tampered where any channel is above 10, so their grey (collateral change) counts, as in "
              "PhotoHolmes; white alone is the other choice",)),
}


def report_recipe(recipe, files, tampered_only):
    """Print what a recipe assumes and how the files it found differ from the published set.

    Images that were published without a mask are taken out of `files.images_left`.
    """
    title = recipe.title
    for line in recipe.says:
        say(f"{title}: {line}")
    for path in [path for path in files.images_left if recipe.without_mask and re.search(recipe.without_mask, path)]:
        say(f"{title}: {path} was published without a mask and is left out")
        files.images_left.remove(path)
    renamed = sum(split_stem(image)[1] != MASK_SUFFIX.sub("", split_stem(mask)[1]) for image, mask in files.pairs)
    if recipe.by_number and renamed:
        say(f"{title}: {counted(renamed, 'pair')} whose names agree in their number only, as one side has those of "
            "another version")
    kinds = (("tampered images with a mask", files.pairs), ("authentic images", files.authentic),
             ("masks", {mask for _, mask in files.pairs}))
    for (kind, found), expected in zip(kinds, recipe.expected):
        if expected not in (None, len(found)) and (found or not tampered_only):
            say(f"warning: {title}: expected {expected} {kind}, found {len(found)}; this is not the whole published "
                "set")


def drop_unequal_sizes(pairs, root, output):
    """Return the pairs (relative to `root`) whose image and mask have the same size by their headers; list the others.

    Raises UserError if none is left.
    """
    good, bad = [], []
    for pair in pairs:
        image, mask = (os.path.join(root, path) for path in pair)
        (size, orientation), (mask_size, _) = header_size(image), header_size(mask)
        if size and mask_size and (mask_size == size or orientation > 4 and mask_size == size[::-1]):
            good.append(pair)
        else:
            texts = [f"{side[0]}x{side[1]}" if side else "unreadable" for side in (size, mask_size)]
            bad.append(f"{pair[0]} {texts[0]}, {pair[1]} {texts[1]}")
    print_list("pairs left out, sizes differ or unreadable", bad, output)
    if not good:
        raise UserError(f"--root {root}: no image has the size of its mask; nothing was written, copy the set again.")
    return good


def header_size(path):
    """Return ((height, width), EXIF orientation) without decoding, or (None, 1) for what is no image."""
    if not os.path.isfile(path):  # reading a pipe would never end
        return None, 1
    try:
        if path.lower().endswith(".npz"):
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                height, width = (side for side in np.lib.format.read_array_header_1_0(file)[0] if side != 1)
                return (height, width), 1
        with Image.open(path) as image:
            *size, orientation = stored_size(image)
            return tuple(size), orientation
    except Exception:  # PIL and NumPy raise many types; each means that this is no image
        return None, 1


def read_npz(path):
    """Read the mask arr_0 of a .npz as bool (H, W, 1): above 0. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return (archive["arr_0"].squeeze() > 0)[..., None]
    except Exception as error:  # NumPy and zipfile raise many types; each means that this is no such mask
        raise UserError(f"{path}: no array arr_0 can be read, the file is broken or truncated ({error}): copy it "
                        "again or take it out.") from None


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
        read = read_npz if mask.lower().endswith(".npz") else read_image
        pixels = binary(read(mask)).astype(np.uint8) * 255
        write_file(targets[mask], cv2.imencode(".png", pixels)[1])

    say(f"converting {len(targets)} masks to 0/255 PNG files in {mask_output} (--root is not changed)")
    make_output_dir(mask_output, "--mask_output")
    for _ in in_threads(convert, targets, "converting", progress, "masks"):
        pass
    return targets


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of folders


def find_in_folders(roots):
    """Return the SetFiles of `roots`, {"image_root": folder, "mask_root": folder, perhaps "authentic_root": folder}.

    Masks may lie beside their images. A root that lies below another one, even by a link, belongs to itself alone.
    Raises UserError for a root without images, and where images of a folder of authentic ones have masks.
    """
    real = {flag: os.path.realpath(root) for flag, root in roots.items()}
    absolute = {flag: os.path.abspath(root) for flag, root in roots.items()}
    images = {}
    for flag, root in roots.items():
        inner = tuple(path_for_json(other, full[flag]) + "/" for full in (real, absolute) for other in full.values()
                      if other != full[flag] and is_inside(other, full[flag]))
        list_root = list_masks if flag == "mask_root" else list_images
        images[flag] = [path for path in list_root(root) if not path.startswith(inner)]
        if not images[flag]:
            raise UserError(f"--{flag} {root}: no image in it or below ({' '.join(sorted(IMAGE_SUFFIXES))}).")
    if real.get("authentic_root") in (real["image_root"], real["mask_root"]):
        raise UserError(f"--authentic_root {roots['authentic_root']}: is also --image_root or --mask_root; give the "
                        "folder of the authentic images alone.")
    tampered, masks = images["image_root"], images["mask_root"]
    if real["image_root"] == real["mask_root"]:
        stems = {"".join(split_stem(path)).casefold() for path in tampered}
        masks = [path for path in masks if is_mask_beside(path, stems)]
        tampered = sorted({*tampered}.difference(masks))
    pairs, *left = pair_by_name(tampered, masks)
    own = os.path.basename(absolute["image_root"])
    folders = collections.Counter(folder for image, _ in pairs for folder in {own, *image.split("/")[:-1]}
                                  if folder.casefold() in AUTHENTIC_FOLDERS)
    if folders:
        folder, count = folders.most_common(1)[0]
        raise UserError(f"--image_root {roots['image_root']}: images with a mask ({count}) lie in a folder named "
                        f"{folder}, as authentic images do, and a mask may bear an authentic image's name: give that "
                        "folder as --authentic_root and the tampered images alone as --image_root, or --recipe "
                        "cocoglide for CocoGlide, or rename the folder if its images are tampered.")
    return SetFiles(pairs, images.get("authentic_root", []), *left)


def is_mask_beside(path, stems):
    """Tell whether a file is the mask of another one in its folder: its stem is that one's plus a suffix."""
    stem = "".join(split_stem(path)).casefold()
    bare = MASK_SUFFIX.sub("", stem)
    return bare != stem and bare in stems


# ---------------------------------------------------------------------------------------------------------------------
# Lists: how papers publish their splits, one line an image

# A column where none is separated by a comma. Names hold spaces, so one ends behind a known extension alone.
COLUMN = re.compile(rf"(?:(?<= )(?:None|-?\d+)|\S[^\t]*?(?:{'|'.join(map(re.escape, FILE_SUFFIXES))}))(?= |$)",
                    re.IGNORECASE)


def read_list(path):
    """Return the columns of each line of a split list: one, or image and mask and, between spaces, perhaps a third.

    Raises UserError, with the line's number, for a line that can't be split or that holds a label instead of a mask.
    """
    def refuse(what):
        raise UserError(f"--list {path}, line {number} ({line[:100]}): {what}.")

    try:
        text = read_regular(path, MAX_BYTES).tobytes().decode("utf-8-sig", "surrogateescape")  # any names
    except OSError as error:
        raise UserError(f"--list {path}: can't be read ({error.strerror or error}); give a text file.") from None
    text = text.replace("\r\n", "\n")
    if "\0" in text:
        raise UserError(f"--list {path}: is no text, or text in UTF-16; save the list as UTF-8.")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip().replace("\\", "/")
        if not line:
            continue
        columns = [column.strip() for column in line.split(",")] if "," in line else COLUMN.findall(line)
        if not all(columns[:2]) or ("," not in line and " ".join(columns) != line):
            refuse("can't be split; put a comma, or one space behind an extension "
                   f"({' '.join(sorted(FILE_SUFFIXES))}), between image and mask")
        if len(columns) > 1 and re.fullmatch(r"\d+", columns[1]):
            refuse("the second column is a label and no mask, so the list says nothing about the tampered pixels; take "
                   "one that names the masks")
        if rows and (len(columns) > 1) != (len(rows[0]) > 1):
            refuse("this line and the first one differ in their columns; name a mask, or None, in each line or in none")
        rows.append(columns[:2 if "," in line else 3])
    if not rows:
        raise UserError(f"--list {path}: is empty; give a text file with one line an image.")
    return rows


def list_truth(rows):
    """Yield (image, mask, "Negative" or None) of the rows of a list; None: tampered, and the mask isn't there.

    A missing mask means authentic if the list has no masks at all; a label in the third column goes before that.
    """
    missing = "none", "-1"
    some = any(mask.lower() not in missing for _, mask, *_ in rows)
    for image, mask, *label in rows:
        if mask.lower() in missing:
            tampered = label != ["0"] if label and label[0].isdigit() else some
            mask = None if tampered else "Negative"
        yield image, mask


def recipe_truth(names, files):
    """Yield (image, mask, "Negative" or None) of names, paths or their ends, by a recipe's SetFiles; see list_truth.

    What is there not at all or more than once is yielded with a remark, which makes it a name of no file.
    """
    known = dict([*files.pairs, *((path, "Negative") for path in files.authentic)])
    ends = collections.defaultdict(list)
    for image in [*known, *files.images_left]:
        ends[posixpath.basename(image).casefold()].append(image)
    for name in map(posixpath.normpath, names):
        images = [image for image in ends[posixpath.basename(name).casefold()]
                  if f"/{image}".casefold().endswith(f"/{name}".casefold())]
        image = (name if name in images else images[0] if len(images) == 1 else
                 f"{name} ({len(images) or 'none'} of the recipe's images)")
        yield image, known.get(image)


def read_lists(lists, root, recipe, authentic, output):
    """Return the SetFiles that split lists name, in their order, and print what each holds.

    Args:
        lists: paths of text files
        root: folder that their paths start from
        recipe: Recipe that tells authentic images of lists of one column, and their masks; or None
        authentic: whether these are all authentic
        output: beside it long lists of wrong names are written
    Raises:
        UserError: files that are not there, or images that are listed with two masks
    """
    paths = list_files(root, FILE_SUFFIXES)
    exact, any_case = set(paths), {path.casefold(): path for path in paths}

    def find(name):
        name = posixpath.normpath(name)
        return name if name in exact else any_case.get(name.casefold())

    truth, missing, unclear = {}, {}, {}  # image -> mask; names that are not there, in order; image -> its masks
    found = None
    for path in lists:
        rows = read_list(path)
        if len(rows[0]) > 1:
            if authentic:
                raise UserError(f"--list {path}: its second column says what is authentic; leave --authentic out.")
            entries = list_truth(rows)
        elif authentic:
            entries = ((name, "Negative") for name, in rows)
        elif recipe:
            found = found or recipe.find(root)
            entries = recipe_truth([name for name, in rows], found)
        else:
            raise UserError(f"--list {path}: has one column; give --authentic if all its images are authentic, or the "
                            "--recipe of a set that knows their masks.")
        own, again = {}, 0
        for names in entries:
            image, mask = (name if name in (None, "Negative") else find(name) for name in names)
            lost = [name for name, file in zip(names, (image, mask)) if name and not file]
            missing.update(dict.fromkeys(lost))
            if lost:
                continue
            again += image in own and own[image] == mask
            own[image] = mask
            if truth.setdefault(image, mask) != mask:
                unclear.setdefault(image, [truth[image]]).append(mask)
        authentic_count, left = (list(own.values()).count(kind) for kind in ("Negative", None))
        say(f"{path}: pairs {len(own) - authentic_count - left}, authentic {authentic_count}, without a mask {left}" +
            f", repeated lines {again}" * (again > 0))
    print_list("listed files that are not there", list(missing), output)
    print_list("images listed with two masks", [f"{image}: {' and '.join(mask or 'none' for mask in masks)}"
                                                for image, masks in unclear.items()], output)
    wrong = [what.format(len(names)) for what, names in (
        ("listed files that are not there ({}; give the folder that the lists start from)", missing),
        ("images listed with two masks ({}; keep one line of each)", unclear)) if names]
    if wrong:
        raise UserError(f"--list with --root {root}: {' and '.join(wrong)}, named above, so nothing was written.")
    if any(str(mask).lower().endswith(".npz") for mask in truth.values()) and not (recipe and recipe.binary):
        raise UserError("--list: names masks that are arrays (.npz); give --recipe fantasticreality, which makes PNG "
                        "files of them.")
    return SetFiles([pair for pair in truth.items() if pair[1] not in (None, "Negative")],
                    [image for image, mask in truth.items() if mask == "Negative"],
                    [image for image, mask in truth.items() if mask is None], [])


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all ways


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
        say("\n  ".join([f"{title} ({len(paths)}):", *map(visible, paths[:LISTED])]))
    if len(paths) > LISTED:
        full = f"{os.path.splitext(output)[0]}_{title.replace(' ', '_')}.txt"
        write_file(full, "\n".join([*paths, ""]))
        say(f"  ... all {len(paths)} are in {full}")


def refuse_unpaired(files, no_pair, output, skip_unpaired):
    """List what has no partner; UserError if there is any, unless it may be skipped, or where `no_pair` says why not.

    `no_pair` is for the case that there is no pair; empty, if none is needed.
    """
    lists = ("images without a mask", files.images_left), ("masks without an image", files.masks_left)
    for title, paths in lists:
        print_list(title, paths, output)
    if not files.pairs and no_pair:
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
    add("--list", metavar="FILE", nargs="+", help="instead: split lists, one line an image: image and mask (None or "
        "-1: no mask), with a comma or else one space between; with --recipe masks are converted as that set's, "
        "and the images of lists of one column are looked up in that set")
    add("--authentic", action="store_true", help="with --list: all images of lists of one column are authentic")
    add("--root", help="with --recipe or --list: the set's own folder, from which the paths of a list start")
    add("--mask_output", help="with --recipe: folder for masks that have to be converted to 0/255 (default: "
        "<output>_masks beside the JSON)")
    add("--tampered_only", action="store_true", help="with --recipe or --list: leave the authentic images out")
    add("--output", required=True, help='JSON to write, a list of [image, mask or "Negative"]')
    add("--skip_unpaired", action="store_true", help="leave out images without a mask and masks without an image "
        "(otherwise they are listed and nothing is written)")
    add("--overwrite", action="store_true", help="replace an existing --output and its converted masks")
    add("--no_progress", action="store_true", help="don't show progress")
    args = parser.parse_args()
    if args.recipe or args.list:
        needed, foreign = ["root"], ["authentic_root", "image_root", "mask_root"]
        foreign += ["authentic"] * (not args.list or args.recipe is not None)
    else:
        needed, foreign = ["image_root", "mask_root"], ["authentic", "mask_output", "root", "tampered_only"]
    wrong = [f"--{flag} is missing" for flag in needed if not getattr(args, flag)]
    wrong += [f"--{flag} does not belong here" for flag in foreign if getattr(args, flag)]
    if wrong:
        raise UserError(f"{' and '.join(wrong)}: give --image_root and --mask_root [--authentic_root], or --recipe and "
                        "--root [--mask_output --tampered_only], or --list and --root [--authentic, or --recipe].")
    if not args.output.lower().endswith(".json") or os.path.isdir(args.output):
        raise UserError(f"--output {args.output}: give a file name that ends in .json.")
    if os.path.exists(args.output) and not args.overwrite:
        raise UserError(f"--output {args.output} exists: give another name or --overwrite.")
    return args


def main():
    args = get_args()
    recipe = RECIPES.get(args.recipe)
    mask_output = args.mask_output or os.path.splitext(args.output)[0] + "_masks"
    if recipe and recipe.binary:
        check_mask_output(mask_output, args.root, args.overwrite)
    image_root, mask_root, authentic_root = (args.root or root for root in
                                             (args.image_root, args.mask_root, args.authentic_root))
    if args.list:
        files = read_lists(args.list, args.root, recipe, args.authentic, args.output)
        no_pair = "the lists name no image that has a mask or is authentic"
        for line in recipe.says if recipe and recipe.binary else ():
            if line.startswith("masks:"):  # the rest is about files that the recipe would choose
                say(f"{recipe.title}: {line}")
    elif recipe:
        files = recipe.find(args.root)
        no_pair = f"--root {args.root} holds no {recipe.title} ({recipe.layout})"
        if not files.pairs and not files.images_left:
            raise UserError(f"{no_pair}; give the set's own folder.")
    else:
        roots = {"image_root": image_root, "mask_root": mask_root, "authentic_root": authentic_root}
        files = find_in_folders({flag: root for flag, root in roots.items() if root})
        no_pair = "no image and mask agree in name (stem, suffix such as _gt)"
    if args.tampered_only:
        files.authentic.clear()
    if recipe and not args.list:
        report_recipe(recipe, files, args.tampered_only)
    refuse_unpaired(files, "" if args.list and files.authentic else no_pair, args.output, args.skip_unpaired)

    pairs = drop_unequal_sizes(files.pairs, args.root, args.output) if args.root and files.pairs else files.pairs
    images = [os.path.join(image_root, image) for image, _ in pairs]
    masks = [os.path.join(mask_root, mask) for _, mask in pairs]
    if recipe and recipe.binary and masks:
        converted = convert_masks(masks, args.root, mask_output, recipe.binary, not args.no_progress)
        masks = [converted[mask] for mask in masks]

    folder = os.path.dirname(os.path.abspath(args.output))
    rows = [[path_for_json(image, folder), path_for_json(mask, folder)] for image, mask in zip(images, masks)]
    rows += [[path_for_json(os.path.join(authentic_root, path), folder), "Negative"] for path in files.authentic]
    write_file(args.output, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for i in sorted({*range(len(pairs))[:3], *range(len(pairs))[-3:]}):
        say(visible(f"  pair {i + 1}: {rows[i][0]} with {rows[i][1]}"))
    say(f"{args.output}: {len(pairs)} tampered and {len(files.authentic)} authentic images; "
        f"`python tools/check_data.py {args.output}` looks into all files.")


if __name__ == "__main__":
    exit_on_user_error(main)
