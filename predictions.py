"""Saved predictions: the maps of a dataset's images as files, and a manifest.json that says what they are of.

test.py --save_predictions and save_images.py write them; tools/score.py reads them. Beside each manifest lie its maps,
as 8-bit PNG (probability x 255, rounded) or as float32 .npy.
"""
import collections
import concurrent.futures
import hashlib
import io
import json
import os
import platform

import cv2
import numpy as np
import torch

import ddp
from evaluate import label_scores
from log import remove_file, write_file
from registry import UserError


def versions():
    """Return {name: version} of what a number may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "opencv": cv2.__version__}


def file_hash(path):
    """Return a hash of a file's bytes, 12 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=6)).hexdigest()


def write_manifest(path, test_set, images, **about):
    """Write what `about` tells, the dataset, and a row {"name", "label", "score", "file", "height", "width"} per image.

    The rows are in the dataset's order; label and score are None where there are none, the file is relative to the
    manifest.
    """
    write_file(path, json.dumps({
        **about, "dataset": os.path.abspath(test_set.path), "fingerprint": test_set.fingerprint,
        "image_size": test_set.image_size, "if_padding": test_set.padding, "versions": versions(), "images": images},
        indent=1) + "\n")


class Saver:
    """Saves the maps of a dataset at the network's size, without padding, as `evaluate` calls it after each batch.

        saver = Saver(folder, test_set, "8bit")
        evaluate(..., on_batch=saver)
        saver.finish(checkpoint="checkpoint-7.pth")

    Args:
        folder: for the maps and the manifest
        form: "8bit" for PNG, "float" for .npy, which scores exactly as the evaluation did
    """

    def __init__(self, folder, test_set, form):
        self.folder, self.test_set, self.form, self.rows = folder, test_set, form, []
        files = output_names(list(map(os.fsdecode, test_set.images)))[0]
        self.files = files if form == "8bit" else [os.path.splitext(file)[0] + ".npy" for file in files]
        self.first = {file: i for i, file in reversed([*enumerate(self.files)])}  # an image may be listed twice
        if ddp.is_main():
            remove_file(folder / "manifest.json")  # of an earlier run, whose maps are replaced one by one
        self.pool, self.jobs = concurrent.futures.ThreadPoolExecutor(4), []

    def __call__(self, batch, output):
        for job in self.jobs:
            job.result()
        if output.get("pred_mask") is None:
            raise UserError("--save_predictions, which --report turns on: the model's forward returned no pred_mask, "
                            "which is what it saves; leave both out (tools/report.py then makes a page of tables).")
        scores = label_scores(output, batch["label"])
        scores = [None] * len(batch["label"]) if scores is None else scores.tolist()
        maps = output["pred_mask"].detach().float().cpu().numpy()[:, 0]
        self.jobs = []
        sizes = zip(batch["shape"].tolist(), batch["original_shape"].tolist())
        for one, score, label, ((h, w), (height, width)) in zip(maps, scores, batch["label"].tolist(), sizes):
            index = ddp.rank() + ddp.world_size() * len(self.rows)  # as data.eval_loader shares them out
            file = self.files[index]
            self.rows.append({"name": os.fsdecode(self.test_set.names[index]), "label": label, "score": score,
                              "file": file, "height": height, "width": width})
            if self.first[file] != index:
                continue
            write = write_png if self.form == "8bit" else write_array
            value = to_bytes(one[:h, :w]) if self.form == "8bit" else one[:h, :w].copy()
            self.jobs.append(self.pool.submit(write, self.folder / file, value))

    def finish(self, **about):
        """Wait for the files, and write the manifest with what `about` tells; every rank calls it."""
        with ddp.fail_together():
            for job in self.jobs:
                job.result()
            self.pool.shutdown()
        shares = ddp.gather(self.rows)
        rows = [shares[i % len(shares)][i // len(shares)] for i in range(len(self.test_set))]
        if ddp.is_main():
            write_manifest(self.folder / "manifest.json", self.test_set, rows, size="network",
                           form="8-bit PNG" if self.form == "8bit" else "float32 NPY", **about)


def output_names(paths, folder=""):
    """Return (files, names): each image's PNG below pred/<folder>, and its key among the scores.

    A PNG lies where its image lies below the images' common folder, so nothing leaves the output folder whatever
    the paths are; images that differ in nothing but the extension keep it (`a.jpg.png`). The key is the file's name,
    or its relative path where names collide.
    """
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    below = [os.path.relpath(path, root) for path in paths]
    stems = [os.path.splitext(path)[0] for path in below]
    once = set(below)  # an image listed twice gives one PNG
    same_stem = collections.Counter(os.path.splitext(path)[0].lower() for path in once)
    same_name = collections.Counter(os.path.basename(path) for path in once)
    taken = {path.lower() for path in below}  # beside a.jpg, the image a.jpg.png keeps its extension too
    files = [(stem if same_stem[stem.lower()] == 1 and stem.lower() not in taken else path) + ".png"
             for stem, path in zip(stems, below)]
    names = [os.path.basename(path) if same_name[os.path.basename(path)] == 1 and not folder
             else os.path.join(folder, path) for path in below]
    return files, names


def row_names(test_set, folder=""):
    """Return the images' names in scores.csv: the files' names, or where any of them repeats, all paths relative to the
    dataset's folder (a JSON's own), absolute for an image outside of it; with `folder` in front, for one of several
    sets."""
    paths = [os.path.abspath(os.fsdecode(path)) for path in test_set.images]
    names = list(map(os.path.basename, paths))
    if len(set(names)) < len(set(paths)):
        root = os.path.abspath(test_set.path)
        if not os.path.isdir(root):  # a JSON, or several image files
            root = os.path.dirname(root) if os.path.exists(root) else os.path.commonpath(map(os.path.dirname, paths))
        names = [path.removeprefix(root.rstrip(os.sep) + os.sep) for path in paths]
    return [os.path.join(folder, name) for name in names]


def to_bytes(values):
    """Turn a float32 map into uint8: 0..1 becomes 0..255, rounded, and what lies outside is clipped."""
    return cv2.convertScaleAbs(np.maximum(values, 0), alpha=255)


def write_png(file, pixels):
    """Write a PNG, making its folder; UserError where that fails."""
    write_file(file, cv2.imencode(".png", pixels)[1])  # imwrite garbles names that are not ASCII on Windows


def write_array(file, values):
    """Write an array as .npy; UserError where that fails."""
    content = io.BytesIO()  # to a file np.save would write without telling why it can't
    np.save(content, values)
    write_file(file, content.getvalue())
