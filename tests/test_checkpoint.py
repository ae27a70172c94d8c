"""checkpoint.py: which file a path means, and that a test script needs nothing but the checkpoint and the data.

Run: python -m pytest tests/test_checkpoint.py
"""
import argparse
import contextlib
import csv

import numpy as np
import pytest
import torch

import checkpoint
import models.mymodel
from conftest import run_here
from registry import UserError

SMALL = ["--num_workers", 0]


def numbers(output):
    """What a script found: the values of its CSV, or the bytes of its masks."""
    if (output / "results.csv").exists():
        with open(output / "results.csv", newline="") as lines:
            return [row["value"] for row in csv.DictReader(lines)]
    return {path.name: path.read_bytes() for path in (output / "pred").rglob("*.png")}


def run(script, output, *flags):
    done = run_here(script, "--output_dir", output, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name, own, shared", [
    ("MyModel", ["--kernel_size", 5], ["--if_padding", "--image_size", 100, "--edge_mask_width", 7]),
    ("MyConvNeXt", ["--backbone", "convnext_atto", "--no-pretrained"], ["--if_resizing", "--image_size", 64]),
])
def test_nothing_but_the_checkpoint_and_the_data(images, tmp_path, monkeypatch, name, own, shared):
    """The numbers are those with every flag, also where IMDL-BenCo's Namespace stores them; and nothing is fetched,
    though the checkpoint says that its training started from pretrained weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("train.py", tmp_path / "run", "--model", name, *own, *shared, "--data_path", images, "--epochs", 1,
        "--batch_size", 3)
    file = tmp_path / "run" / "checkpoint-0.pth"
    content = torch.load(file, weights_only=True)
    content["args"] |= {key: True for key in content["args"] if key.startswith("pretrained")}
    torch.save(content, file)
    torch.save({"model": content["model"], "args": argparse.Namespace(**content["args"])}, tmp_path / "benco.pth")

    for script in ("test.py", "test_robust.py", "save_images.py")[:: 1 if name == "MyModel" else 2]:
        data_flags = ["--test_data_json" if script == "test.py" else "--test_data_path", images]
        full, short, benco = (tmp_path / f"{script}-{form}" for form in ("full", "short", "benco"))
        printed = run(script, short, "--checkpoint_path", tmp_path / "run", *data_flags)
        assert f"taken from {file}: --model {name} " in printed and "note: --" not in printed
        run(script, full, "--checkpoint_path", file, *data_flags, "--model", name, *own, *shared)
        run(script, benco, "--checkpoint_path", tmp_path / "benco.pth", *data_flags)
        assert numbers(short) == numbers(full) == numbers(benco) and len(numbers(short)) > 1

    # --resume loads the checkpoint over weights that were to be downloaded, so they aren't
    flags = [word for word in own if word != "--no-pretrained"]
    printed = run("train.py", tmp_path / "run", "--model", name, *flags, *shared, "--data_path", images, "--epochs", 2,
                  "--batch_size", 3, "--resume", "auto")
    assert "epoch 1 comes next" in printed and "pretrained was" not in printed


def test_ranks_that_find_different_checkpoints_stop(monkeypatch):
    """Several machines, each with a disk of its own."""
    monkeypatch.setattr("ddp.gather", lambda value: [value, "checkpoint-1.pth"])
    monkeypatch.setattr("ddp.fail_together", contextlib.nullcontext)
    checkpoint.refuse_different("checkpoint-1.pth", "--checkpoint_path o")
    with pytest.raises(UserError, match="--checkpoint_path o: the processes find different checkpoints .checkpoint-0"):
        checkpoint.refuse_different("checkpoint-0.pth", "--checkpoint_path o")


def test_what_a_folder_means(tmp_path):
    """The best if the newest checkpoint records one that is there, else the newest; a file means itself."""
    state = models.mymodel.MyModel().state_dict()
    best = {"epoch": 2, "value": 0.5, "metric": "pixel-level F1", "folder": "moved/away"}
    for epoch in (0, 2, 10):
        torch.save({"model": state, "epoch": epoch, "best": best}, tmp_path / f"checkpoint-{epoch}.pth")
    path, content, why = checkpoint.choose_checkpoint(tmp_path)
    assert path.name == "checkpoint-2.pth" and content["epoch"] == 2
    assert why == ", epoch 2, the best of the folder by pixel-level F1 (0.5000)"
    assert checkpoint.choose_checkpoint(tmp_path / "checkpoint-0.pth")[0].name == "checkpoint-0.pth"
    assert checkpoint.find_resume("auto", tmp_path).name == "checkpoint-10.pth"
    assert checkpoint.find_resume(None, tmp_path / "of another machine") is None  # where only rank 0 makes the folder
    (tmp_path / "checkpoint-2.pth").unlink()
    path, content, why = checkpoint.choose_checkpoint(tmp_path)
    assert path.name == "checkpoint-10.pth" and content["epoch"] == 10
    assert why == ", epoch 10, the newest of the folder (its best, of epoch 2, is not there)"
    for strange in (0.5, {"epoch": 2}, None):  # other people's code
        torch.save({"model": state, "best": strange}, tmp_path / "checkpoint-11.pth")
        path, content, why = checkpoint.choose_checkpoint(tmp_path)
        assert path.name == "checkpoint-11.pth" and why.endswith("(which records no best)")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "network", None])
def test_where_a_state_dict_may_lie_and_numpy_beside_it(tmp_path, key):
    """NumPy's scalars and arrays are no code, also as NumPy 1 named them."""
    state = models.mymodel.MyModel().state_dict()
    beside = {"best_f1": np.float64(0.5), "loss": np.float32(2), "epoch": np.int64(3), "done": np.bool_(True),
              "half": np.float16(1), "byte": np.uint8(7), "complex": np.complex64(1j), "text": np.str_("a"),
              "curve": np.arange(3.0), "table": np.zeros((2, 2), np.int32), "flags": np.array([True])}
    content = state if key is None else {**beside, key: {f"module.{name}": value for name, value in state.items()}}
    torch.save(content, tmp_path / "new.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    # as NumPy 1 pickles: the same bytes with another name of the module
    old = (tmp_path / "old.pth").read_bytes()
    assert key is None or b"numpy._core.multiarray" in old
    (tmp_path / "old.pth").write_bytes(old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for name in ("new.pth", "old.pth"):
        model = models.mymodel.MyModel()
        loaded = checkpoint.load_weights(model, tmp_path / name, "--resume")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        for name, value in beside.items() if key else ():
            assert type(loaded[name]) is type(value) and np.array_equal(loaded[name], value)
