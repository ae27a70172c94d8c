"""Shared by all tests: the repository on the path, and a small dataset made once per session.

    python -m pytest                       # all
    python -m pytest -m "not slow"         # without the slow ones
"""
import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run_script(*command, cwd, processes=None, env=None, timeout=300, root=ROOT):
    """Run a script of the repository as a user does, under torchrun with `processes`; returns the CompletedProcess."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script, *flags = map(str, command)
    return subprocess.run([*launcher, str(root / script), *flags], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def run_here(script, *flags):
    """Run `python <script> <flags>` of the repository within this process; returns a CompletedProcess.

    The same file runs as `__main__` with the same exit code and output; only the seconds of a new interpreter's imports
    are saved.
    """
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [script, *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) or end.code is None else 1
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *flags], code or 0, out.getvalue(), err.getvalue())


def summary(printed):
    """The last lines of a script, after its last empty one; at most 15, and every path to look at is there."""
    lines = printed.rsplit("\n\n", 1)[1].splitlines()
    assert len(lines) <= 15, lines
    places = lines[lines.index("look next at:") + 1:]
    assert places and all(os.path.exists(line.split()[0]) for line in places), places
    return lines


def make_images(folder, count, seed=0, authentic=0, sizes=((96, 128), (128, 96), (80, 80))):
    """Make a ManiDataset of `count` tampered images in `folder`, `authentic` ones in Au/, and set.json over all.

    The images are smooth noise with a bright rectangle pasted in, which its mask shows.
    """
    rng = np.random.default_rng(seed)
    for name in ("Tp", "Gt", "Au"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(count + authentic):
        height, width = sizes[i % len(sizes)]
        image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (9, 9), 0)
        if i < count:
            mask = np.zeros((height, width), np.uint8)
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            mask[top:top + height // 3, left:left + width // 3] = 255
            image[mask > 0] = rng.integers(200, 256, 3)
            cv2.imwrite(str(folder / "Gt" / f"p{i:03d}_gt.png"), mask)
            pairs.append([f"Tp/p{i:03d}.png", f"Gt/p{i:03d}_gt.png"])
        else:
            pairs.append([f"Au/p{i:03d}.png", "Negative"])
        cv2.imwrite(str(folder / pairs[-1][0]), image)
    (folder / "set.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A ManiDataset of 9 tampered images, with 2 authentic ones and set.json besides."""
    return make_images(tmp_path_factory.mktemp("images"), 9, authentic=2)


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A copy of the repository's code with the models of probe_models.py, for scripts run in their own processes."""
    root = tmp_path_factory.mktemp("repository")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    shutil.copytree(ROOT / "models", root / "models", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "probe_models.py", root / "models")
    return root
