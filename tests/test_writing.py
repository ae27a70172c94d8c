"""Everything that is written: full disks, obstacles, removed folders, two runs in one folder, names that are code.

Run: python -m pytest tests/test_writing.py
"""
import collections
import contextlib
import csv
import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch

import log
import models.mymodel
from conftest import ROOT, make_images, run_here
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
WRITERS = [name for name in COMMANDS if name != "robust"]  # which is slow, and writes as "test" does


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
    for name in WRITERS:
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
    assert re.fullmatch(rf"error: [^\n]* can't be written[^\n]*{words}[^\n]*\n", done.stderr), done.stderr
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
    count = int(os.environ.get("FUZZ", 0)) // len(WRITERS)
    if count:
        rng = np.random.default_rng(0)
        return [int(rng.integers(40, rng.choice(sizes))) for _ in range(count)]  # below 32 no semaphore can be made
    return [sizes[0] - 1, sizes[len(sizes) // 2] - 1, sizes[-1] - 1]


@pytest.mark.parametrize("name", WRITERS)
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
    print(name, dict(failed))  # with FUZZ and -s: how often each file was the one that failed


def obstacles(files):
    """One file of each kind, but no checkpoint, which --resume auto would find, and one folder of each name."""
    kinds = {(Path(path).parent.name, Path(path).suffix): path for path in files if not path.endswith(".pth")}
    return [*kinds.values(), *{Path(path).name: path for path in map(os.path.dirname, files) if path}.values()]


@pytest.mark.parametrize("name", WRITERS)
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
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (obstacle, done.stderr)
        words = f"{re.escape(obstacle)}.* can't be (written|removed)|can't be used .*{obstacle}|give a file name"
        assert re.search(words, done.stderr), (obstacle, done.stderr)
        assert (out / obstacle / "mine").is_dir() if obstacle in files else (out / obstacle).read_text() == "mine"
        assert not list(out.rglob(".unfinished*"))


def test_folder_removed_meanwhile(data, whole, no_curves, tmp_path, monkeypatch):
    """What is still to be written makes the folder again; only what lay in it is lost."""
    monkeypatch.setattr(log.Progress, "update", lambda self, count=1: shutil.rmtree(tmp_path / "out", True))
    for name, files in (("train", {"log.txt", "checkpoint-1.pth"}), ("test", {"results.csv", "set"}),
                        ("robust", {"results.csv", "JpegCompression"}), ("save", {"scores.csv"})):
        done = run(name, data, tmp_path)
        if name == "save" and done.returncode:  # the folder was lost while a file was written to it
            check(done, tmp_path / "out", whole[name], "No such file")
        else:
            assert done.returncode == 0 and files <= set(os.listdir(tmp_path / "out")), (name, done.stderr)


def test_a_file_system_that_replaces_no_file(data, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    done = run("train", data, tmp_path)
    assert done.stderr == ("error: --output_dir out: can't be written to (Operation not permitted). Give a folder that "
                           "you may write to.\n") and not contents(tmp_path)


def test_append_is_all_or_nothing(tmp_path):
    log.append_file(tmp_path / "new/log.txt", "1\n")
    for path in (tmp_path / "new/log.txt", tmp_path / "none.txt"):
        with largest_file(5), pytest.raises(UserError, match=f"{path} can't be written .File too large"):
            log.append_file(path, "23456\n")
    assert contents(tmp_path) == {"new/log.txt": b"1\n"}


def test_devices_stay_devices(data, tmp_path):
    """As root, a rename would make a file of /dev/null."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").symlink_to("/dev/null")
    (tmp_path / "out/sheet.png").symlink_to("/dev/full")
    done = run("check", data, tmp_path)
    assert done.returncode == 1 and done.stderr == ("error: out/sheet.png can't be written (No space left on device). "
                                                    "Free some space or give another folder.\n")
    assert (tmp_path / "out/report.json").is_symlink() and (tmp_path / "out/sheet.png").is_symlink()


def test_standard_output_on_a_full_disk():
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        with pytest.raises(UserError, match="standard output can't be written .No space left on device"):
            log.say("lost")


def test_what_killed_runs_left_is_removed(data, whole, tmp_path):
    """But not below a folder of another run, which may be writing there."""
    for folder in ("", "pred", "overlay", "test"):
        (tmp_path / "out" / folder).mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / folder / f"{log.UNFINISHED}0").write_text("half")
    (tmp_path / "out/test/.lock").touch()
    assert run("save", data, tmp_path).returncode == 0
    assert contents(tmp_path / "out") == {**whole["save"], f"test/{log.UNFINISHED}0": b"half"}


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import log
log.make_output_dir(sys.argv[2], "--output_dir")
if os.fork():  # the child, as a loader's worker, outlives its parent
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_two_runs_in_one_folder(data, whole, tmp_path, monkeypatch):
    """The second is refused while the first lives; `kill -9` frees the folder, whatever children stay behind."""
    (tmp_path / "holder.py").write_text(HOLDER)
    holder = subprocess.Popen([sys.executable, tmp_path / "holder.py", ROOT, tmp_path / "out"], text=True,
                              stdout=subprocess.PIPE, start_new_session=True)
    try:
        pid = int(holder.stdout.readline())
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        commands = {"train": "--output_dir", "robust": "--output_dir", "save": "--output_dir", "resize": "target",
                    "demo": "--output"}
        (tmp_path / "out/.resize.json").write_bytes(whole["resize"][".resize.json"])
        (tmp_path / "out/made_by_demo.json").write_bytes(whole["demo"]["made_by_demo.json"])
        before = contents(tmp_path)
        for name, flag in commands.items():
            done = run(name, data, tmp_path)
            assert done.returncode == 1 and done.stderr == (
                f"error: {flag} {tmp_path / 'out' if flag == 'target' else 'out'}: another run writes there, process "
                f"{pid} on {socket.gethostname()}. Wait for its end, or give another folder.\n"), done.stderr
        monkeypatch.setitem(COMMANDS, "events", [*COMMANDS["train"], "--output_dir", "other", "--log_dir", "out"])
        assert run("events", data, tmp_path).stderr.startswith("error: --log_dir out: another run writes there")
        assert contents(tmp_path) == before
        os.kill(pid, signal.SIGKILL)
        holder.wait()
        assert run("test", data, tmp_path).returncode == 0
        os.killpg(pid, 0)  # the child is still there
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("change", [lambda m: m.setattr(log, "fcntl", None), lambda m: m.setattr(
    log.fcntl, "lockf", unittest.mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))])
def test_where_there_are_no_locks_a_line_says_so(data, tmp_path, monkeypatch, change):
    change(monkeypatch)
    done = run("test", data, tmp_path)
    assert done.returncode == 0 and re.search(r"note: out can't be locked \((No locks|Function not)", done.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Names


ODD = "=cmd|'x'!A1 \x1b[31mred\x07\n\u202egnp\x9b2J, \"q\"\t.png"
SHOWN = r"""=cmd|'x'!A1 \x1b[31mred\x07\n\u202egnp\x9b2J, "q"\t.png"""


def test_names_that_terminals_and_spreadsheets_would_obey(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "set")
    shutil.rmtree(folder / "imd")
    os.rename(folder / "Tp/p000.png", folder / "Tp" / ODD)
    os.rename(folder / "Gt/p000_gt.png", folder / "Gt" / ODD.replace(".png", "_gt.png"))
    for name in ("test", "save", "resize", "check"):
        done = run(name, folder, tmp_path)
        assert done.returncode == 0, done.stderr
        if name in ("test", "save"):
            file = tmp_path / ("out/set/per_image.csv" if name == "test" else "out/scores.csv")
            with open(file, encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
            names = [row["name"] for row in rows]
            if name == "test":  # gives paths
                names = [os.path.relpath(path, folder / "Tp").replace(ODD, "'" + ODD) for path in names]
            assert len(names) == (12 if name == "test" else 6)
            assert {*names} == {"'" + ODD, *os.listdir(data / "Tp")} - {"p000.png"}
        shutil.rmtree(tmp_path / "out")

    def shown(done):
        text = done.stdout + done.stderr
        assert SHOWN in text and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), text

    shown(run_here("save_images.py", "--test_data_path", folder / "Tp" / ODD, *map(str, TEST[2:-1]), tmp_path / "out",
                   "--checkpoint_path", folder / "checkpoints"))
    (folder / "Tp" / ODD).write_bytes(b"no image")
    for name in ("train", "test", "save", "resize", "check"):
        shutil.rmtree(tmp_path / "out", True)
        shown(run(name, folder, tmp_path))
    shown(run_here("tools/make_pairs.py", "--image_root", folder / "Tp", "--mask_root", data / "Gt", "--output",
                   tmp_path / "x.json"))


def test_csv_cells():
    text = log.csv_lines([{"name": name, "score": score} for name, score in
                          (("=1", -0.5), ("+1", -1), ("-1", ""), ("@a", 0.0), ("\ta", 1), ("'=1", 1), ("a=1", 1))])
    assert [line.split(",") for line in text.splitlines()[1:]] == [
        ["'=1", "-0.5"], ["'+1", "-1"], ["'-1", ""], ["'@a", "0.0"], ["'\ta", "1"], ["''=1", "1"], ["a=1", "1"]]


def test_the_longest_names_and_folders_that_are_no_utf8(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "set")
    long = "x" * 251 + ".png"  # 255 bytes
    os.rename(folder / "Tp/p000.png", folder / "Tp" / long)
    outputs = [os.path.join(tmp_path, os.fsdecode(b"out_\xc4\xe3")), tmp_path / "events"]
    done = run_here("save_images.py", "--test_data_path", folder / "Tp", *TEST[2:-1], outputs[0], "--save_overlay",
                    "--checkpoint_path", data / "checkpoints")
    assert done.returncode == 0 and os.path.exists(os.path.join(outputs[0], "pred", long)), done.stderr
    for epochs in (1, 2):
        done = run_here("train.py", "--data_path", data, *SMALL, "--epochs", epochs, "--output_dir", outputs[0],
                        "--log_dir", outputs[1], "--resume", "auto")
        assert done.returncode == 0, done.stderr
    assert os.path.exists(os.path.join(outputs[0], "checkpoint-1.pth"))
