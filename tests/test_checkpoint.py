"""checkpoint.py: which file a path means, and that a test script needs nothing but the checkpoint and the data.

Run: python -m pytest tests/test_checkpoint.py
"""
import argparse
import contextlib
import copy
import csv
import io
import os
import pickle
import shutil
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import models.mymodel
import models.weights
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
              "curve": np.arange(3.0), "table": np.zeros((2, 2), np.int32),
              "scheduler": {"milestones": Counter([30, 60])}, "flags": np.array([True])}
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


def test_tensors_that_share_their_data(tmp_path):
    whole = torch.arange(8.0)
    for name, more in {"new.pth": {"d": torch.ones(1).to(torch.uint16)}, "old.pth": {}}.items():
        torch.save({"a": whole[:3], "b": whole[4:], "c": whole.view(2, 4).T, **more}, tmp_path / name,
                   _use_new_zipfile_serialization=bool(more))
        state = checkpoint.state_dict_of(checkpoint.load_checkpoint(tmp_path / name, "--resume"), tmp_path / name, "")
        assert state["a"].tolist() == [0, 1, 2] and state["b"].tolist() == [4, 5, 6, 7] and state["c"][1, 1] == 5


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files. tests/test_fuzz_checkpoints.py has those that chance makes.


class Call:
    """What a pickle writes as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Data(int):
    """The data of a tensor in a pickle: so many numbers of float32."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", int(value)) if isinstance(value, Data) else None


def pickled(content):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def tensor(count, offset, shape, strides, hooks=None):
    return Call(torch._utils._rebuild_tensor_v2, Data(count), offset, shape, strides, False, hooks or OrderedDict())


def archive(pickle, data=b"\0" * 16, compression=zipfile.ZIP_STORED, more=()):
    """A checkpoint with this pickle and the data of one tensor."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as entries:
        for name, content in {"data.pkl": pickle, "version": b"3\n", "data/0": data, **dict(more)}.items():
            entries.writestr(f"archive/{name}", content)
    return file.getvalue()


def old_format(pickle):
    head = [pickled(part) for part in (0x1950a86a20f9469cfc6c, 1001, {"little_endian": True})]
    return b"".join([*head, pickle, pickled(["0"])]) + (4).to_bytes(8, "little") + b"\0" * 16


def structured():
    """A dtype whose flags hide that it holds objects: reading such an array follows pointers out of the file."""
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"), (
        1, (1,), np.dtype([("a", object)]), False, b"\1" * 8)


DEEP = b"]" * 10**5 + b"a" * (10**5 - 1)
DEEP_KEY = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."  # its hash takes the interpreter's whole stack
SAFE = safetensors.torch.save({"a": torch.zeros(4)})
FITS, OBJECT, BROKEN = "does not fit the 16 bytes stored", "holds the object ", "is truncated or is not a checkpoint"
HOSTILE = {
    "the largest that fits": (lambda: archive(pickled({"a": tensor(4, 0, (4,), (1,))})), None),
    "expanded": (lambda: archive(pickled({"a": tensor(4, 3, (9,), (0,))})), None),
    "beyond its data": (lambda: archive(pickled({"a": tensor(4, 1, (4,), (1,))})), FITS),
    "strides beyond its data": (lambda: archive(pickled({"a": tensor(4, 0, (2, 2), (3, 1))})), FITS),
    "beyond its data, old format": (lambda: old_format(pickled({"a": tensor(4, 0, (5,), (1,))})), FITS),
    "negative stride": (lambda: archive(pickled({"a": tensor(4, 3, (4,), (-1,))})), BROKEN),
    "negative offset": (lambda: archive(pickled({"a": tensor(4, -1, (4,), (1,))})), BROKEN),
    "negative shape": (lambda: archive(pickled({"a": tensor(4, 0, (-4,), (1,))})), BROKEN),
    "a terabyte of one number": (lambda: archive(pickled({"a": tensor(4, 0, (10**6, 10**6), (0, 0))})), FITS),
    "a terabyte": (lambda: archive(pickled({"a": tensor(10**12, 0, (10**12,), (1,))})), "more bytes than the file has"),
    "a terabyte, old format": (lambda: old_format(pickled({"a": tensor(10**12, 0, (4,), (1,))})), "more bytes than"),
    "more data than its entry": (lambda: archive(pickled({"a": tensor(8, 0, (8,), (1,))})), "truncated|damaged"),
    "calls in place of data": (lambda: archive(pickled({"a": Call(torch._utils._rebuild_tensor_v2, 1, 0, (4,), (1,))})),
                               BROKEN),
    "hooks": (lambda: archive(pickled({"a": tensor(4, 0, (4,), (1,), hooks=[print])})), OBJECT + "__builtin__.print"),
    "bytearray": (lambda: archive(pickled({"a": Call(bytearray, 10**12)})), OBJECT + "__builtin__.bytearray"),
    "a Counter of more": (lambda: archive(pickled({"a": Call(Counter, 10**12)})), BROKEN),
    "a million dimensions": (lambda: archive(pickled({"a": tensor(4, 0, (2**31,) * 10**6, (0,) * 10**6)})), BROKEN),
    "a deep tuple as key of data": (lambda: archive(DEEP_KEY[:3] + b"(X\7\0\0\0storagectorch\nFloatStorage\n)" +
                                                    b"\x85" * 200_000 + b"X\3\0\0\0cpuK\4tQ."), BROKEN),
    "a class called": (lambda: archive(pickled({"a": Call(torch.FloatTensor, 10**12)})), OBJECT + "torch.FloatTensor"),
    "a storage called": (lambda: archive(pickled({"a": Call(torch.FloatStorage, 10**12)})), BROKEN),
    "a large array": (lambda: archive(pickled({"a": Call(np.ndarray, (10**12,))})), BROKEN),
    "a codec": (lambda: archive(pickled({"a": Call(__import__("_codecs").encode, "a" * 10**6, "punycode")})), BROKEN),
    "an array of structures": (lambda: archive(pickled({"a": structured()})), BROKEN),
    "shadowed methods": (lambda: archive(b"\x80\x02ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\1sb."), BROKEN),
    "a deep list": (lambda: archive(b"\x80\x02}X\1\0\0\0a" + DEEP + b"s."), "no state dict"),
    "a deep tuple as key": (lambda: archive(DEEP_KEY), BROKEN),
    "a deep tuple as key, old format": (lambda: old_format(DEEP_KEY), BROKEN),
    "a dict that holds itself": (lambda: archive(b"\x80\x02}q\0X\1\0\0\0ah\0s."), "no state dict"),
    "a key that is no text": (lambda: archive(pickled({"model": {7: tensor(4, 0, (4,), (1,))}})), "has the key 7"),
    "a key of two lines": (lambda: archive(pickled({"a\n\x1b[2J": 1})), r"its keys are 'a\\n\\x1b\[2J'"),
    "one weight twice": (lambda: archive(pickled({name: tensor(4, 0, (4,), (1,)) for name in ("module.a", "a")})),
                         "both module.a and a"),
    "deflated": (lambda: archive(pickled({"a": "a" * 10**6}), compression=zipfile.ZIP_DEFLATED), "is a compressed zip"),
    "many entries": (lambda: archive(pickled({}), more={f"{'a' * 4000}{i}": b"" for i in range(2100)}.items()),
                     "too many entries"),
    "two pickles": (lambda: archive(pickled({}), more=[("more/data.pkl", b"")]), BROKEN),
    "TorchScript": (lambda: archive(pickled({}), more=[("constants.pkl", b"")]), "is a TorchScript archive"),
    "a long pickle": (lambda: archive(pickled(["a" * (9 << 20)])), BROKEN),
    "protocol 4": (lambda: archive(pickle.dumps({"a": 1}, 4)), BROKEN),
    "a frame without end": (lambda: archive(b"\x80\x02X\xff\xff\xff\x7fa."), BROKEN),
    "safetensors, long header": (lambda: (10**12).to_bytes(8, "little") + b"{}", BROKEN),
    "safetensors, offsets": (lambda: SAFE.replace(b"[0,16]", b"[0,99]"), BROKEN),
    "safetensors, shape": (lambda: SAFE.replace(b"[4]", b"[9]"), BROKEN),
    "safetensors, cut": (lambda: SAFE[:-1], BROKEN),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    make, words = HOSTILE[name]
    path = tmp_path / "hostile.pth"
    path.write_bytes(make())
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext() as caught:
        checkpoint.state_dict_of(checkpoint.load_checkpoint(path, "--resume"), path, "--resume")
    if words:
        text, cause = str(caught.value), str(caught.value.__context__)
        assert text.startswith(f"--resume {path}") and text.isprintable() and "allocate" not in cause


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that it may drop quantized and sparse tensors
@pytest.mark.parametrize("name, make", {
    "sparse": torch.Tensor.to_sparse, "sparse rows": lambda one: one[None].to_sparse_csr(),
    "quantized": lambda one: torch.quantize_per_tensor(one, 1.0, 0, torch.qint8), "meta": lambda one: one.to("meta"),
    "a parameter": torch.nn.Parameter, "half": torch.Tensor.half, "bfloat16": torch.Tensor.bfloat16,
    "float8": lambda one: one.to(torch.float8_e5m2), "integer": torch.Tensor.long, "boolean": torch.Tensor.bool,
    "complex": lambda one: one + 0j}.items())
def test_types_of_weights(tmp_path, name, make):
    """What would be cast to other numbers is refused; other kinds of tensors aren't even made."""
    model, path = models.mymodel.MyModel(), tmp_path / "typed.pth"
    torch.save({**model.state_dict(), "conv.bias": make(torch.ones(1))}, path)
    words = {"integer": "conv.bias is of type torch.int64", "boolean": "conv.bias is of type torch.bool", "complex":
             "conv.bias is of type torch.complex64", "sparse": OBJECT, "sparse rows": OBJECT, "meta": OBJECT,
             "quantized": OBJECT}.get(name)
    for load in (lambda: checkpoint.load_weights(model, path, "--resume"),
                 lambda: models.weights.load_part({"conv.bias": model.state_dict()["conv.bias"]},
                                                  models.weights.read_weights(path, "--resume"), f"--resume {path}")):
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext() as caught:
            load()
        assert str(caught.value).startswith(f"--resume {path}") if words else model.conv.bias == 1


def test_safetensors_and_what_is_no_file(tmp_path):
    """safetensors is known by its first bytes, whatever the name; a pipe is not waited for."""
    state = models.mymodel.MyModel().state_dict()
    for name in ("weights.safetensors", "weights.pth"):
        safetensors.torch.save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / name)
        model = models.mymodel.MyModel()
        path, _, _ = checkpoint.choose_checkpoint(tmp_path / name)
        checkpoint.load_weights(model, path, "--checkpoint_path")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="It holds weights.pth, weights.safetensors: give one of them"):
        checkpoint.choose_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            checkpoint.load_checkpoint(path, "--pretrained")


def trained_content():
    model = models.mymodel.MyModel()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "epoch": 3, "args": {},
            "best": {"epoch": 2, "value": 0.5, "metric": "pixel-level F1", "folder": "out"}}


def damage(path, number):
    """Flip a bit of the data of the tensor of this number."""
    with zipfile.ZipFile(path) as entries:
        entry, = [entry for entry in entries.infolist() if entry.filename.endswith(f"/data/{number}")]
        entry.CRC = None  # it may be damaged already
        data = entries.read(entry)
    content = path.read_bytes()
    place = content.index(data, entry.header_offset)
    path.write_bytes(content[:place] + bytes([data[0] ^ 64]) + content[place + 1:])


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    """What is read is checked: a test doesn't read the optimizer's state, --resume does."""
    path, model = tmp_path / "checkpoint-3.pth", models.mymodel.MyModel()
    torch.save(trained_content(), path)
    damage(path, "3")  # part of the optimizer's state
    checkpoint.load_weights(model, path, "--checkpoint_path")
    with pytest.raises(checkpoint.Damaged, match="is damaged"):
        resume(path)
    damage(path, "0")
    with pytest.raises(checkpoint.Damaged, match="is damaged"):
        checkpoint.load_weights(model, path, "--checkpoint_path")
    torch.serialization.set_crc32_options(False)
    torch.save(trained_content(), path)
    torch.serialization.set_crc32_options(True)
    damage(path, "0")
    assert resume(path)[0] == 4  # there is no checksum


def resume(path, content=None):
    """Resume from a checkpoint, or from one with this content, as train.py does, and train a step."""
    if content is not None:
        torch.save(content, path)
    model = models.mymodel.MyModel()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    args = argparse.Namespace(start_epoch=0, epochs=10**9, output_dir="out", resume=str(path))
    order = {"--seed": 42, "fingerprint": None}
    found = checkpoint.resume_training(path, model, optimizer, scaler, args, {}, "pixel-level F1", order)
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert found[1]["value"] < 1 and all(p.isfinite().all() for p in model.parameters())
    return found


NAN, WRONG = float("nan"), torch.ones(2, 2)
SCALES = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0}
MALFORMED = {
    "epoch": ["3", None, -1, 1.5, NAN, True, [3], {}, 10**9, WRONG, "../../x"],
    "best": [{"epoch": 2, "value": 0.5, "metric": "a", "folder": "b", **change} for change in (
        {"epoch": "../../x"}, {"epoch": "2"}, {"epoch": -1}, {"epoch": 2.0}, {"epoch": 10**30}, {"epoch": [2]},
        {"value": "0.5"}, {"value": None}, {"value": NAN}, {"value": WRONG}, {"metric": 1}, {"metric": None},
        {"folder": 1}, {"folder": None})],
    "frozen_hashes": [1, "a", ["a"], {1: "a"}, {"a": 1}, {"a": None}],
    "optimizer": [None, 1, [], {}, {"state": {}}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": [1]},
                  {"state": {}, "param_groups": [{}]}, {"state": {}, "param_groups": [{"params": 1}]},
                  {"state": {}, "param_groups": [{"params": ["a", "b"]}]}, {"state": {0: 1}, "param_groups": []},
                  {"state": {}, "param_groups": [{"params": [0]}]},
                  {"state": {}, "param_groups": [{"params": [0, 1]}] * 2}],
    "scaler": [1, [], {"scale": 2.0}, {**SCALES, "scale": "a"}, {**SCALES, "scale": NAN}, {**SCALES, "scale": WRONG},
               {**SCALES, "scale": 0.0}, {**SCALES, "scale": -1.0}, {**SCALES, "growth_interval": 1.5}],
    "begun": [1, "a", {"steps": 1}, {"steps": -1, "skipped": 0, "lr": 0.1, "ranks": []},
              {"steps": 1, "skipped": 0, "lr": NAN, "ranks": []}, {"steps": 1, "skipped": 0, "lr": 0.1, "ranks": [7]},
              {"steps": 1, "skipped": 0, "lr": 0.1, "ranks": [({"loss": 1.0}, {}, [])]}],
    "order": [1, ["a"]], "row": [1, {}, {"epoch": "3"}, {"epoch": 3, 1: 2}, {"epoch": 3, "a": [1]}],
    "state": [{"step": "a"}, {"step": None}, {"step": WRONG}, {"step": NAN}, {"step": -1.0},
              {"step": torch.tensor(NAN)}, {"step": torch.tensor(1j)}, {"exp_avg": WRONG}, {"exp_avg": 1.0},
              {"exp_avg": None}, {"exp_avg": [1]},
              {"exp_avg": torch.tensor(1.0)}, {"exp_avg": torch.ones(1, 3, 3, 3, dtype=torch.int64)},
              {"exp_avg_sq": torch.ones(1, 1, 1, 1)}, "momentum_buffer"],
}


def test_malformed_checkpoints_are_refused_before_an_epoch_is_trained(tmp_path):
    path, good = tmp_path / "checkpoint-3.pth", trained_content()
    assert resume(path, good) == (4, {**good["best"], "folder": "out"}, None, None)
    for key, values in MALFORMED.items():
        for value in values:
            content = copy.deepcopy(good)
            if key != "state":
                content[key] = value
            elif isinstance(value, dict):
                content["optimizer"]["state"][0] |= value
            else:  # of another optimizer
                content["optimizer"]["state"] = {number: {value: state["exp_avg"]} for number, state in
                                                 content["optimizer"]["state"].items()}
            with pytest.raises(UserError) as caught:
                resume(path, content)
                raise AssertionError(f"{key}: {value} is accepted")
            assert str(caught.value).startswith(f"--resume {path}") and "\n" not in str(caught.value), str(caught.value)
    deep, itself = [], {}
    itself["itself"] = itself
    for _ in range(10):
        deep = [deep, deep]
    for harmless in ({"args": 7}, {"args": {"resume": [deep], 1: 2, "itself": itself}}, {"rng": [deep]}, {"best": 0.5},
                     {"fingerprint": 7}, {"epoch": np.int64(3)}, {"scaler": {}}, {"scaler": SCALES}):
        assert resume(path, {**good, **harmless})[0] == 4
    assert checkpoint.args_of({"args": {"a": [deep], 1: 2, "itself": itself, "b": "\x1b[2J", "c": ["x", 1]}}) == {
        "c": ["x", 1]}
    groups = copy.deepcopy(good)
    groups["optimizer"]["param_groups"][0] |= {"lr": NAN, "betas": "a", "weight_decay": None, "lr_scale": NAN}
    assert resume(path, groups)[0] == 4  # this run's flags decide


@pytest.mark.parametrize("name, flags", {
    "SGD": {"momentum": 0.9}, "Adagrad": {}, "RMSprop": {}, "NAdam": {}, "RAdam": {}, "Adamax": {}, "Adadelta": {},
    "ASGD": {}, "Rprop": {}, "Adafactor": {}, "Adam": {"amsgrad": True}, "AdamW": {"fused": True}}.items())
def test_optimizers_of_ones_own_go_on(tmp_path, name, flags):
    """Any of torch.optim: a state that the optimizer made fits, and the next step is that of the uninterrupted run."""
    def step(model, optimizer):
        (model(torch.linspace(0, 1, 27).view(1, 3, 3, 3)).square().sum() + model.scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    model.scale = torch.nn.Parameter(torch.tensor(-1.0))
    optimizer = getattr(torch.optim, name)(model.parameters(), **flags)
    step(model, optimizer)
    path = tmp_path / "checkpoint-0.pth"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    resumed = copy.deepcopy(model)
    fresh = getattr(torch.optim, name)(resumed.parameters(), **flags)
    checkpoint.load_optimizer(fresh, torch.amp.GradScaler("cpu", enabled=False),
                              checkpoint.load_checkpoint(path, "--resume", mmap=False), path)
    for _ in range(2):
        step(model, optimizer)
        step(resumed, fresh)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), resumed.parameters()))


def test_auto_takes_the_one_before_a_damaged_checkpoint(images, tmp_path, capsys):
    """And the run that goes on from there is the same run; what a killed run left half written goes."""
    flags = ["--model", "MyModel", "--data_path", images, "--if_resizing", "--image_size", 64, "--epochs", 3,
             "--save_period", 1]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run("train.py", straight, *flags)
    newest = straight / "checkpoint-2.pth"
    content = newest.read_bytes()
    leftover = resumed / ".unfinished-2"
    for form in ("empty", "cut", "weight", "optimizer", "all"):
        shutil.copytree(straight, resumed, dirs_exist_ok=True)
        newest = resumed / "checkpoint-2.pth"
        newest.write_bytes(content[:{"empty": 0, "cut": 1000}.get(form, len(content))])
        if form in ("weight", "optimizer"):
            damage(newest, "0" if form == "weight" else "3")
        if form == "all":
            for path in resumed.glob("*.pth"):
                path.write_bytes(b"\0" * 1000)
            with pytest.raises(UserError, match=f"{newest} is truncated or is not a checkpoint"):
                checkpoint.find_resume("auto", resumed)
            break
        assert checkpoint.find_resume("auto", resumed) == resumed / "checkpoint-1.pth"
        said = capsys.readouterr().out
        assert said.startswith(f"note: --resume {newest} is ") and said.count("\n") == 1
        assert said.endswith("Instead, --resume auto goes on from checkpoint-1.pth.\n")
        with pytest.raises(UserError, match="checkpoint-2.pth is (truncated|damaged)"):  # asked for by name
            checkpoint.refuse_damaged(checkpoint.tensors_in(checkpoint.load_checkpoint(newest, "--resume")), newest,
                                      "--resume")
        with pytest.raises(UserError, match="checkpoint-2.pth is (truncated|damaged)") if form != "optimizer" else (
                contextlib.nullcontext()):  # so that no other one is tested than one thinks
            _, stored, _ = checkpoint.choose_checkpoint(resumed)
            checkpoint.load_weights(models.mymodel.MyModel(), newest, "--checkpoint_path")
        if form == "weight":
            leftover.write_bytes(content[:100])
            assert "goes on from checkpoint-1.pth" in run("train.py", resumed, *flags, "--resume", "auto")
            weights = [torch.load(folder / "checkpoint-2.pth")["model"] for folder in (straight, resumed)]
            assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
            assert not leftover.exists()
