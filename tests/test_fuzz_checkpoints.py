"""checkpoint.py against seeded mutations of small checkpoints: each loads with equal weights, or is one sentence.

    python -m pytest tests/test_fuzz_checkpoints.py                # 60 cases
    FUZZ=2000 python -m pytest tests/test_fuzz_checkpoints.py -s   # the full run; shows how many ended how

The cases run in a process of their own, which this file is too: a crash, a hang or a file outside would show.
"""
import argparse
import collections
import io
import json
import os
import pickletools
import random
import resource
import signal
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from conftest import ROOT  # noqa: F401  puts the repository on the path

import checkpoint
import models.mymodel
from registry import UserError

MEMORY = 500 << 20  # bytes that a case may take beyond what the process has
STRANGE = [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "../../x", "a\nb\x1b[2J", b"x", [], [1], {},
           {"a": 1}, {1: {2: 3}}, (1, 2), 1j, torch.zeros(0), torch.ones(2, 3), torch.tensor(float("nan")),
           torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool), np.float64(2), np.arange(3)]
NUMBERS = [b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x05\x00\x00\x00\x00\x40",
           b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"K\x00", b"K\x01", b"N", b"]", b"h\x00", b"X\xff\xff\xff\x7f"]
NAMES = [b"cos\nsystem\n", b"cposix\nmkdir\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"ctorch\nTensor\n",
         b"cnumpy\nndarray\n", b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
         b"ctorch\nUntypedStorage\n", b"ctorch\nDoubleStorage\n", b"ctorch\nQInt8Storage\n", b"ccollections\nCounter\n"]


def forms():
    """Return {form: (bytes, content)} of a checkpoint of a small model in every form, and its weights."""
    torch.manual_seed(0)
    model = models.mymodel.MyModel()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    state = model.state_dict()
    args = {"model": "MyModel", "image_size": 64, "if_resizing": True, "lr": 1e-4, "metrics": ["PixelF1"]}
    ours = {"model": state, "optimizer": optimizer.state_dict(), "scaler": {}, "epoch": 3, "args": args,
            "best": {"epoch": 2, "value": 0.5, "metric": "pixel-level F1", "folder": "out"},
            "fingerprint": {"train": "abc"}, "rng": [1, 2]}
    contents = {"ours": ours, "bare": dict(state), "old": ours, "numpy": {"state_dict": state, "f1": np.float64(0.5),
                                                                          "curve": np.arange(9.0)},
                "namespace": {"model": {f"module.{name}": value for name, value in state.items()},
                              "args": argparse.Namespace(**args)}}
    found = {}
    for form, content in contents.items():
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=form != "old")
        found[form] = file.getvalue(), content
    found["safetensors"] = safetensors.torch.save(dict(state)), None
    return found, state


def rewritten(data, change, compression=zipfile.ZIP_STORED):
    """Return a zip file with the entries {name: bytes} that `change` returns for those of another: right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = change({name: archive.read(name) for name in archive.namelist()})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def edited(pickle, rng):
    """Return a pickle in which an opcode is another one, or gone, or twice."""
    places = []
    try:
        places = [(opcode.name, place) for opcode, _, place in pickletools.genops(pickle)]
    except ValueError:
        return flipped(pickle, rng)
    index = rng.randrange(1, len(places) - 1)
    (name, start), (_, end) = places[index:index + 2]
    other = rng.randrange(1, len(places) - 1)
    others = [pickle[places[other][1]:places[other + 1][1]], b"", pickle[start:end] * 2]
    others += NUMBERS * 2 if "INT" in name else NAMES * 2 if name == "GLOBAL" else NUMBERS
    return pickle[:start] + rng.choice(others) + pickle[end:]


def replaced(content, rng):
    """Return a copy of nested dicts and lists in which a value, or a key, is a strange one."""
    if not isinstance(content, (dict, list)) or not content or rng.random() < 0.2:
        return rng.choice(STRANGE)
    if isinstance(content, list):
        index = rng.randrange(len(content))
        return content[:index] + [replaced(content[index], rng)] + content[index + 1:]
    key = rng.choice(list(content))
    if rng.random() < 0.1:
        new = rng.choice([0, None, "x", ("a", 1), "module.conv.weight", *[key] * 2])
        return {new if name == key else name: value for name, value in content.items()} | {new: content[key]}
    return {**content, key: replaced(content[key], rng)}


def mutate(found, rng):
    """Return (form, kind, bytes, whether a file that loads must hold the same weights)."""
    form = rng.choice(list(found))
    data, content = found[form]
    is_zip = data.startswith(b"PK")
    kinds = ["flip", "cut", "insert"] + ["swap", "entries", "pickle", "pickle", "damaged pickle"] * is_zip
    kind = rng.choice(kinds + ["type"] * 3 * (content is not None))
    if kind == "flip":
        return form, kind, flipped(data, rng), is_zip
    if kind == "cut":
        return form, kind, data[:rng.randrange(len(data))], True
    if kind == "insert":
        place = rng.randrange(len(data))
        return form, kind, data[:place] + rng.randbytes(rng.choice([1, 64])) + data[place:], is_zip
    if kind == "type":
        file = io.BytesIO()
        torch.save(replaced(content, rng), file, _use_new_zipfile_serialization=is_zip)
        return form, kind, file.getvalue(), False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickle = archive.read(names[0])
    if kind == "swap":  # the bytes of two tensors, or the names of two entries; of one size, no one can tell
        first, second = rng.sample([name for name in names if "/data/" in name], 2)
        pairs = [[name.encode() for name in (first, second)]] * 2
        if rng.random() < 0.5:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                pairs = [[archive.read(name) for name in (first, second)]]
        for old, new in pairs:
            if len(old) == len(new) and data.count(old) and data.count(new):
                data = data.replace(old, b"\0" * len(old)).replace(new, old).replace(b"\0" * len(old), new)
        return form, kind, data, False
    if kind == "entries":
        name = rng.choice(names)
        changes = [lambda entries: {**entries, name: b""}, lambda entries: {**entries, name: entries[name] * 2},
                   lambda entries: {key: value for key, value in entries.items() if key != name},
                   lambda entries: {**entries, **{f"archive/more/{i}": b"" for i in range(rng.choice([1, 3000]))}},
                   lambda entries: {**entries, "archive/constants.pkl": b"x", "other/data.pkl": b"x"},
                   lambda entries: {key.replace("archive/", ""): value for key, value in entries.items()}]
        return form, kind, rewritten(data, rng.choice(changes), rng.choice([0, 0, 8])), name != names[0]
    if kind == "damaged pickle":
        other = edited(pickle, rng)[:len(pickle)].ljust(len(pickle), b".")
        return form, kind, data.replace(pickle, other), True
    return form, kind, rewritten(data, lambda entries: {**entries, names[0]: edited(pickle, rng)}), False


def use(path, form):
    """Use a checkpoint as train.py and the test scripts do; return the weights."""
    if form != "safetensors" and path.stat().st_size % 2:  # one way or the other, by chance
        chosen, content, _ = checkpoint.choose_checkpoint(path.parent)
        checkpoint.args_of(content)
        model = models.mymodel.MyModel()
        checkpoint.load_weights(model, chosen, "--checkpoint_path")
        return {name: value.clone() for name, value in model.state_dict().items()}
    model = models.mymodel.MyModel()
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(start_epoch=0, epochs=10**9, output_dir="out", resume=str(path), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    epoch, best, *_ = checkpoint.resume_training(path, model, optimizer, scaler, args, {}, "pixel-level F1", {})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()  # an optimizer's state that doesn't fit would show here
    assert 0 <= epoch <= 10**9 and 1.0 > best["value"] - 10**9 and (best["epoch"] is None or best["epoch"] + 1)
    return weights


def run(count):
    """Print {outcome: number of cases} as JSON, after a report of each case that ended wrongly."""
    found, state = forms()
    outcomes, folder = collections.Counter(), Path("folder")
    folder.mkdir()
    use_first = Path("folder/checkpoint-3.pth")
    use_first.write_bytes(found["ours"][0])
    use(use_first, "ours")  # everything is imported now
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY,) * 2)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("a case hangs"))
    for number in range(count):
        rng = random.Random(number)
        form, kind, data, exact = mutate(found, rng)
        path = folder / ("model.safetensors" if form == "safetensors" else "checkpoint-3.pth")
        for file in folder.iterdir():
            file.unlink()
        path.write_bytes(data)
        signal.alarm(20)
        try:
            weights = use(path, form)
        except UserError as error:
            text, cause = str(error), repr(error.__context__)
            fine = str(path) in text and text.isprintable() and "MemoryError" not in cause and "allocate" not in cause
            outcome, wrong = ("refused", "") if fine else ("WRONG SENTENCE OR MEMORY", f"{text} {cause}")
        except Exception:
            outcome, wrong = "TRACEBACK", traceback.format_exc()
        else:
            equal = all(value.equal(state[name]) for name, value in weights.items())
            outcome = "equal" if equal else "OTHER WEIGHTS" if exact else "other weights, which no checksum could tell"
            wrong = exact and not equal
        signal.alarm(0)
        if sorted(os.listdir()) != ["folder"] or os.listdir("folder") != [path.name]:
            outcome, wrong = "FILES", f"{os.listdir()} {os.listdir('folder')}"
        outcomes[f"{kind}: {outcome}"] += 1
        if wrong:
            print(f"case {number} ({form}, {kind}): {outcome}: {wrong}", file=sys.stderr)
            Path(os.environ.get("FUZZ_KEEP", os.devnull)).write_bytes(data)
    print(json.dumps(dict(sorted(outcomes.items()))))


def test_mutated_checkpoints(tmp_path):
    count = int(os.environ.get("FUZZ", 60))
    done = subprocess.run([sys.executable, __file__, str(count)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60 + count)
    print(done.stdout[-2000:])
    assert done.returncode == 0 and not done.stderr, done.stderr[-5000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == count and {key.split(": ")[1] for key in outcomes} > {"refused", "equal"}


if __name__ == "__main__":
    run(int(sys.argv[1]))
