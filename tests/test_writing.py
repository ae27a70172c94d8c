"""Everything that is written: full disks, obstacles, removed folders, two runs in one folder, names that are code.

Run: python -m pytest tests/test_writing.py
"""
import collections
import contextlib
import csv
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import log
import models.mymodel
from conftest import ROOT, make_images, run_here, run_script
from registry import UserError

SMALL = ["--model", "MyModel", "--if_resizing", "--image_size", 64, "--num_workers", 0, "--no_fingerprint"]
TRAIN = ["train.py", "--data_path", "{data}", "--test_data_path", "{data}", *SMALL, "--output_dir", "out"]
TEST = ["--checkpoint_path", "{data}/checkpoints", *SMALL, "--output_dir", "out"]
COMMANDS = {  # all write to the folder out
    "train": [*TRAIN, "--epochs", 2, "--resume", "auto", "--save_period", 1],
    "test": ["test.py", "--test_data_json", "{data}", "--save_per_image", *TEST],
    "robust": ["test_robust.py", "--test_data_path", "{data}", "--attacks", "JpegCompression", *TEST],
    "save": ["save_images.py", "--test_data_path", "{data}", "--save_overlay", "--gradcam", "conv", *TEST],
    "resize": ["tools/resize_data.py", "{data}", "out", "--long_side", 60],
    "pairs": ["tools/make_pairs.py", "--recipe", "imd2020", "--root", "{data}/imd", "--output", "out/pairs.json",
              "--overwrite"],
    "demo": ["tools/make_demo.py", "--output", "out", "--train", 5, "--test", 5],
    "check": ["tools/check_data.py", "{data}", "--output", "out/report.json", "--contact_sheet", "out/sheet.png"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A ManiDataset of 6 images, two checkpoints of MyModel and a set for make_pairs.py."""
    folder = make_images(tmp_path_factory.mktemp("writing") / "set", 6)
    (folder / "checkpoints").mkdir()
    for epoch in (0, 1):
        torch.manual_seed(epoch)
        torch.save({"model": models.mymodel.MyModel().state_dict()}, folder / f"checkpoints/checkpoint-{epoch}.pth")
    (folder / "imd/a").mkdir(parents=True)
    for number, name in enumerate(sorted(os.listdir(folder / "Tp"))):
        shutil.copy(folder / "Tp" / name, folder / f"imd/a/x_{number}.png")
        shutil.copy(folder / "Gt" / name.replace(".png", "_gt.png"), folder / f"imd/a/x_{number}_mask.png")
    return folder


def run(name, data, folder):
    """Run a command of COMMANDS in a folder, within this process."""
    former = os.getcwd()
    os.chdir(folder)
    try:
        return run_here(*(str(word).format(data=data) for word in COMMANDS[name]))
    finally:
        os.chdir(former)


def put(files, folder):
    """Write what an earlier run left: all files, but of a training that was stopped after its first epoch."""
    for path, content in files.items():
        if path != "checkpoint-1.pth":
            path = folder / "out" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.splitlines(keepends=True)[0] if path.name == "log.txt" else content)
            os.utime(path, (0, 0))  # older than the source, for resize_data.py


def contents(folder):
    """{relative path: bytes} of the files below a folder, but for the lock and TensorBoard's events."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != ".lock" and "tfevents" not in path.name}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """{name of a command: {relative path: bytes} of all that it writes}, in folders <name>/out."""
    top, found = tmp_path_factory.mktemp("whole"), {}
    for name in COMMANDS:
        (top / name).mkdir()
        done = run(name, data, top / name)
        assert done.returncode == 0, (name, done.stderr)
        found[name] = contents(top / name / "out")
    return found


@contextlib.contextmanager
def largest_file(size):
    """A limit on a file's size acts as a full disk does: the write that passes it is cut short, the next one fails."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def check(done, folder, whole, words=""):
    """One sentence, exit code 1; each file is there as a whole or not at all (of a log, whole lines) and no other."""
    assert done.returncode == 1, done.stdout
    assert re.fullmatch(rf"error: [^\n]* can't be (written|removed|used)[^\n]*{words}[^\n]*\n", done.stderr), done.stderr
    for name, content in contents(folder).items():
        same = content == whole[name] or content and content[-1:] == b"\n" and whole[name].startswith(content)
        assert same, f"{name}: {len(content)} bytes, whole {len(whole[name])}"
    return re.search(r"(\S+) can't be", done.stderr)[1]


@pytest.fixture
def no_curves(monkeypatch):
    """TensorBoard's events are large: without them the limit meets other files."""
    monkeypatch.setattr(log, "tensorboard", lambda *args, **kwargs: contextlib.nullcontext(unittest.mock.MagicMock()))


def limits(name, files):
    """Sizes of file, each one byte short of some file's; FUZZ=<n> takes n in all, at random."""
    sizes = sorted({len(content) for content in files.values()})
    count = int(os.environ.get("FUZZ", 0)) // len(COMMANDS)
    if count:
        rng = np.random.default_rng(0)
        return [int(rng.integers(2, rng.choice(sizes) + 1)) for _ in range(count)]
    return [sizes[0] - 1, sizes[len(sizes) // 2] - 1, sizes[-1] - 1]


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(data, whole, no_curves, tmp_path, name):
    """In an empty folder and over what an earlier run left, which stays or is replaced."""
    failed = collections.Counter()
    for number, limit in enumerate(limits(name, whole[name])):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 2:
            put(whole[name], folder)
        with largest_file(limit):
            done = run(name, data, folder)
        failed[check(done, folder / "out", whole[name], "File too large")] += 1
        shutil.rmtree(folder)
    print(name, dict(failed))


def obstacles(files):
    """One file of each kind, but no checkpoint, which --resume auto would find, and one folder of each name."""
    return [*{(Path(path).parent.name, Path(path).suffix): path for path in files if not path.endswith(".pth")}.values(),
            *{Path(path).name: path for path in map(os.path.dirname, files) if path}.values()]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "robust"])  # which writes as test does
def test_obstacles(data, whole, no_curves, tmp_path, name):
    """A folder where a file is to be written, and a file where a folder is to be made."""
    files = whole[name]
    for number, obstacle in enumerate(obstacles(files)):
        out = tmp_path / str(number) / "out"
        if obstacle in files:
            (out / obstacle / "mine").mkdir(parents=True)
        else:
            (out / obstacle).parent.mkdir(parents=True, exist_ok=True)
            (out / obstacle).write_text("mine")
        if name in ("resize", "demo") and obstacle not in (".resize.json", "made_by_demo.json"):  # whose folder it is
            note = {"resize": ".resize.json", "demo": "made_by_demo.json"}[name]
            (out / note).write_bytes(files[note])
        done = run(name, data, out.parent)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and obstacle in done.stderr, (obstacle, done.stderr)
        assert re.search(r" can't be (written|removed|used)| give a file name", done.stderr), (obstacle, done.stderr)
        assert (out / obstacle / "mine").is_dir() if obstacle in files else (out / obstacle).read_text() == "mine"
        assert not list(out.rglob(".unfinished*"))
