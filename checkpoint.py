"""Finding, loading and saving checkpoints, and what they know about their training.

A checkpoint may come from a stranger, and a disk may have damaged it: see "What a file may hold".
"""
import argparse
import copy
import hashlib
import io
import math
import pickletools
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import ddp
from log import as_text, replacing, say
from registry import UserError, counted, is_starting_weights, note_changes, parameters

# ---------------------------------------------------------------------------------------------------------------------
# Files


def checkpoint_epoch(path):
    """Return n of `checkpoint-<n>.pth`, or None for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)\.pth", Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(folder):
    """Return the checkpoint-<n>.pth files of a folder in order of n."""
    return sorted((p for p in Path(folder).iterdir() if checkpoint_epoch(p) is not None), key=checkpoint_epoch)


def find_checkpoints(path, flag):
    """Return the checkpoint files that a path means: the file, or all checkpoint-<n>.pth of a folder in order of n."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder. "
                        "Give a .pth or .safetensors file, or a folder with checkpoint-<n>.pth files.")
    found = list_checkpoints(path)
    if not found:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".safetensors"))
        cure = f"It holds {', '.join(others[:5])}: give one of them." if others else "Give another, or a .pth file."
        raise UserError(f"{flag} {path}: this folder holds no checkpoint-<n>.pth. {cure}")
    return found


def save_checkpoint(path, checkpoint):
    """Write a dict of plain types and tensors; no reader sees half a file, also after a power cut."""
    with replacing(path, lasting=True) as file:
        torch.save(checkpoint, file)


def refuse_broken_weights(model, epoch):
    """Raise UserError, on all ranks, where a parameter is not finite or a buffer holds NaN (some hold infinity)."""
    with ddp.fail_together():
        broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
        broken += [name for name, value in model.named_buffers() if value.isnan().any()]
        if broken:
            raise UserError(f"after epoch {epoch} the weights are not finite ({counted(len(broken), 'tensor')}, first "
                            f"{broken[0]}), so they are not saved: lower --lr, or resume from an earlier checkpoint.")


STATE_KEYS = ("model", "state_dict", "model_state_dict", "net", "network")  # where a checkpoint may keep its weights


def state_dict_of(content, path, flag):
    """Return a checkpoint's state dict, under one of STATE_KEYS or the whole.

    The prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are taken off. Raises UserError where there is none,
    where two keys become one, and where a tensor is damaged.
    """
    for state in (*(content[key] for key in STATE_KEYS if key in content), content):
        if content and isinstance(state, dict) and all(torch.is_tensor(value) for value in state.values()):
            break
    else:
        keys = f": its keys are {', '.join(map(shown, list(content)[:8]))}{', ...' * (len(content) > 8)}"
        raise UserError(f"{flag} {path} holds no state dict under {', '.join(STATE_KEYS[:-1])} or {STATE_KEYS[-1]}, "
                        f"nor by itself{keys * bool(content)}. Give a file with {{'model': state_dict}}.")
    sources = {}
    for key in state:
        if not isinstance(key, str):
            raise UserError(f"{flag} {path}: its state dict has the key {shown(key)}, which is no name of a weight. "
                            "Save it again with names as keys.")
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
        if name in sources:
            raise UserError(f"{flag} {path} holds both {shown(sources[name])} and {shown(key)}, which are one weight "
                            "of the model: save one of them.")
        sources[name] = key
    refuse_damaged(state.values(), path, flag)
    return {name: state[key] for name, key in sources.items()}


def shown(value):
    """Return text out of a checkpoint for a message: on one line, and not too long."""
    text = str(value)
    return (text if text.isprintable() else ascii(text))[:100]


def load_weights(model, path, flag, mmap=True):
    """Load a checkpoint's weights into a bare model, strictly, and return all that the checkpoint holds.

    Frozen parameters that it leaves out stay as they are. Raises UserError with the first keys or shapes that differ.
    """
    content = load_checkpoint(path, flag, mmap)
    state, own = state_dict_of(content, path, flag), model.state_dict()
    if content.get("frozen_hashes"):
        state |= left_out_weights(model, content, f"{flag} {path}")

    def check_types(module, state, *_):  # after the model's own hooks have renamed keys
        for name in [name for name in own if name in state]:
            refuse_other_type(state[name], own[name], name)

    hook = model.register_load_state_dict_pre_hook(check_types)
    try:
        model.load_state_dict(state, strict=True)
    except UserError as error:  # of a model that checks what it loads
        raise UserError(f"{flag} {path}: {error}") from None
    except RuntimeError as error:
        shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                  for key in own if key in state and state[key].shape != own[key].shape]
        parts = [("missing keys", [key for key in own if key not in state]),
                 ("unexpected", [shown(key) for key in state if key not in own]), ("of another shape", shapes)]
        found = ", ".join(f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' * (len(keys) > 2)})"
                          for what, keys in parts if keys)
        raise UserError(f"{flag} {path} does not fit {type(model).__name__}: {found or str(error).splitlines()[0]}. "
                        "Use the --model and flags of the training.") from None
    finally:
        hook.remove()
    return content


def refuse_other_type(value, own, what):
    """Raise UserError, beginning with `what`, where copying a tensor into the model's own would change its numbers."""
    if not value.is_floating_point() and (own.is_floating_point() or value.is_complex()):
        raise UserError(f"{what} is of type {value.dtype} where the model has {own.dtype}, so its numbers would "
                        "change. Save it as it was trained.")


def tensor_hash(value):
    """Return a hash of a tensor's bytes, on whatever device it is."""
    return hashlib.blake2b(value.detach().cpu().flatten().view(torch.uint8).numpy(), digest_size=16).hexdigest()


def frozen_hashes(model):
    """Return {name: hash} of the parameters that don't train, for checkpoints that leave them out."""
    return {name: tensor_hash(value) for name, value in model.named_parameters() if not value.requires_grad}


def left_out_weights(model, content, source):
    """Return the model's own tensors for those that a checkpoint of --save_trainable_only leaves out, and say so.

    Raises UserError, beginning with `source`, where they differ from those of the training.
    """
    own, hashes, stored = model.state_dict(), content["frozen_hashes"], args_of(content)
    names = [p.name for p in parameters(type(model)).values() if is_starting_weights(p) and stored.get(p.name)]
    flags = " ".join(f"--{name} {stored.get(name)}" for name in [*names, "seed"])
    wrong = [name for name in hashes if name in own and tensor_hash(own[name]) != hashes[name]]
    if wrong:
        raise UserError(f"{source} leaves {counted(len(hashes), 'frozen tensor')} to the flags of its training, "
                        f"{flags}, and {len(wrong)} of them, first {wrong[0]}, are others here: give these flags, with "
                        "the same files.")
    say(f"{source} holds {counted(len(own) - len(hashes), 'tensor')}; {len(hashes)} more, frozen ones, are the model's "
        f"own, the same as in its training ({flags})")
    return {name: own[name] for name in hashes if name in own}


# ---------------------------------------------------------------------------------------------------------------------
# What a file may hold. torch.load(weights_only=True) runs no code, but it allocates what a file claims and calls
# constructors with arguments of the file's choice. So the pickle is gone through first, without making anything.

LIMIT = 4 << 20  # bytes of a pickle, a zip's directory or a safetensors header; 15,000 tensors take less


class Damaged(UserError):
    """A file that is not whole, as a crash or a broken disk leaves it: an earlier checkpoint may do."""


def load_checkpoint(path, flag, mmap=True):
    """Read a checkpoint, a dict, without executing anything in it: a file of torch.save, or of safetensors.

    With `mmap` tensors come from the disk only where they are used, so that an optimizer's state costs nothing. Raises
    UserError where the file holds code, other tensors than dense ones, or tensors larger than itself, and its subclass
    Damaged where it is truncated or no checkpoint.
    """
    source = f"{flag} {path}"
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe would wait for ever
        raise UserError(f"{source} is not a file. Give the path of a file that torch.save wrote.")
    try:
        with open(path, "rb") as file:
            size, head = file.seek(0, 2), file.seek(0) or file.read(9)
            is_zip, is_safetensors = head.startswith(b"PK\3\4"), head[8:] == b"{"
            if is_safetensors:
                import safetensors.torch  # here, because few need it

                if int.from_bytes(head[:8], "little") > LIMIT:
                    raise ValueError("its header is too long")
                content = safetensors.torch.load_file(path)
            else:
                (check_zip if is_zip else check_pickles)(file, size, source)
                with torch.serialization.safe_globals(harmless_globals()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # NumPy 2 about what NumPy 1 wrote
                    content = torch.load(path, map_location="cpu", weights_only=True,
                                         mmap=mmap and is_zip and as_text(path) == str(path))  # torch maps UTF-8 paths
    except UserError:
        raise
    except Exception as error:  # each reader raises many types; each means that this can't be loaded
        if isinstance(error, OSError) and error.filename:
            raise UserError(f"{source}: {error.strerror}. Give the path of a file that torch.save wrote.") from None
        raise Damaged(f"{source} is truncated or is not a checkpoint. Copy it again or give another file that "
                      "torch.save wrote.") from None
    if not isinstance(content, dict) or not content:
        state_dict_of({}, path, flag)  # refuses
    refuse_malformed(content, source, ("best", "frozen_hashes"))
    return content


def harmless_globals():
    """Return what a checkpoint may name, for torch.serialization.safe_globals: it makes data and can't run code.

    NumPy's are those of its scalars and arrays, under the name of their module in NumPy 2 and, as a pair, in NumPy 1.
    """
    makers = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    types = [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in np.typecodes["All"] + "?"}]
    named = [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in makers for core in ("core", "_core")]
    return [argparse.Namespace, *types, *named]  # IMDL-BenCo stores its arguments as a Namespace


def check_zip(file, size, source):
    """Raise an exception where a zip file is not as torch.save writes one, or its pickle is not harmless."""
    file.seek(max(0, size - (1 << 16) - 22))
    tail = file.read()
    end, end64 = tail.rindex(b"PK\5\6"), tail.rfind(b"PK\6\6")
    directory = struct.unpack_from("<Q", tail, end64 + 40) if end64 >= 0 else struct.unpack_from("<I", tail, end + 12)
    if directory[0] > LIMIT:
        raise UserError(f"{source} is a zip file with too many entries to be a checkpoint. Give a file that torch.save "
                        "wrote.")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries):
            raise UserError(f"{source} is a compressed zip file, which torch.save never writes. Unpack it, or give a "
                            "file that torch.save wrote.")
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") for name in names):
            raise UserError(f"{source} is a TorchScript archive, which holds code. Save the weights alone: "
                            "torch.save({'model': model.state_dict()}, path).")
        pickle, = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size:
            raise ValueError("entries overlap")
        if pickle.file_size > LIMIT:
            raise ValueError("the pickle is too long")
        pickle.CRC = pickle.CRC or None  # 0: none was written, see torch.serialization.set_crc32_options
        PickleCheck(size, source).read(io.BytesIO(archive.read(pickle)))


def check_pickles(file, size, source):
    """Raise an exception where the pickles of PyTorch's old format, five in a row, are not harmless."""
    file.seek(0)
    data, check = io.BytesIO(file.read(LIMIT)), PickleCheck(size, source)
    for _ in range(5):  # magic number, version, system, content, keys of the tensors' data
        check.read(data)


PLAIN = (str, bytes, int, float, complex, type(None))
FRESH = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
         "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
BYTES = {f"torch.{name}Storage": size for name, size in {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8}.items()} | {"torch.storage.UntypedStorage": 1}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
SCALARS, ARRAYS = ([f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")] for name in
                   ("scalar", "_reconstruct"))
HARMLESS = {*BYTES, *DTYPES, *SCALARS, *ARRAYS, "numpy.dtype", "numpy.ndarray", "argparse.Namespace", "_codecs.encode",
            "collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set", "torch.Size",
            "torch.device", *(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3",
                                                                           "parameter"))}


class Ordered(dict):
    """What stands for an OrderedDict."""


class Stand:
    """What stands for anything else that a pickle names or makes: `kind` says what, `value` what is known of it."""

    def __init__(self, kind, value=None):
        self.kind, self.value = kind, value


class PickleCheck:
    """Goes through pickles as torch.load(weights_only=True) will, but makes only plain values.

    Raises UserError where something is named that is not known to be harmless, or a tensor does not fit what is stored
    for it; any other exception means that the pickle is broken.

    Args:
        size: bytes of the whole file; nothing in it can be larger
        source: beginning of the UserError
    """

    def __init__(self, size, source):
        self.size, self.source, self.storages, self.total = size, source, {}, 0

    def read(self, data):
        """Go through the pickle at the position of a BytesIO."""
        stack, below, memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(data):
            name, items = opcode.name, ()
            if name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, below.pop()
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "SETITEM"):
                count = {"APPEND": 1, "SETITEM": 2}.get(name) or int(name[-1])
                items, stack[-count:] = stack[-count:], []
            if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"):
                stack.append(argument)
            elif name in FRESH:
                stack.append(FRESH[name]())
            elif name == "GLOBAL":
                stack.append(self.named(argument.replace(" ", ".")))
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name.startswith("TUPLE"):
                stack.append(tuple(items))
            elif name.startswith("APPEND") and type(stack[-1]) is list:
                stack[-1].extend(items)
            elif name.startswith("SETITEM") and isinstance(stack[-1], dict):
                keys = items[::2]
                if not all(is_plain(key) for key in keys):  # to hash a deep tuple crashes the interpreter
                    raise ValueError("a strange key")
                stack[-1].update(zip(keys, items[1::2], strict=True))
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "BINPERSID":
                stack.append(self.storage(*stack.pop()))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = stack.pop()
                stack.append(self.made(stack.pop().kind, arguments))
            elif name == "BUILD":
                state = stack.pop()
                self.fill(stack[-1], state)
            elif name != "STOP" and (name, argument) != ("PROTO", 2):
                raise ValueError(f"{name} is in no file of torch.save")

    def named(self, name):
        """Return what stands for a class or function that the pickle names; UserError if it is not HARMLESS."""
        if name in HARMLESS:
            return Stand(name)
        why = "is no dense tensor" if name.startswith("torch.") else "can execute code"
        raise UserError(f"{self.source} holds the object {shown(name)}, which {why}, so it is not loaded. Save the "
                        "weights alone: torch.save({'model': model.state_dict()}, path).")

    def storage(self, kind, maker, key, location, count, view=None):
        """Return what stands for the data of tensors: its bytes, and the bytes of an element."""
        if (kind, view) != ("storage", None) or not is_natural(count) or not isinstance(key, str):
            raise ValueError("strange data")
        item = BYTES[maker.kind]
        if key not in self.storages:
            self.storages[key] = count * item
            self.total += count * item
        if self.storages[key] != count * item:
            raise ValueError("data of two sizes")
        if self.total > self.size:
            raise UserError(f"{self.source} declares tensors of more bytes than the file has, so it is not loaded. "
                            "Copy it again or give another.")
        return Stand("storage", (count * item, item))

    def made(self, name, arguments):
        """Return what stands for the result of a call, whose arguments must be as torch.save writes them."""
        match name, arguments:
            case "collections.OrderedDict", ():
                return Ordered()
            case "collections.OrderedDict", (list(pairs),) if all(is_plain(key) for key, _ in pairs):  # by Python 2
                return Ordered(pairs)
            case "collections.Counter", (dict(),):  # in the state of a MultiStepLR
                return Stand("counter")
            case "argparse.Namespace", ():
                return Stand("namespace")
            case "_codecs.encode", (str(text), "latin1"):  # how protocol 2 writes bytes
                return text.encode("latin1")
            case ("builtins.set" | "__builtin__.set"), (list(items),) if all(map(is_plain, items)):
                return Stand("set")
            case "torch.Size", (tuple(shape),) if is_natural(*shape):
                return Stand("shape")
            case "torch.device", (str(), *index) if is_natural(*index):
                return Stand("device")
            case "numpy.dtype", (str(text), *_) if re.fullmatch(r"[biufcSUO]\d{1,6}", text):
                return Stand("dtype", np.dtype(text))
            case _, (Stand(kind="dtype"), bytes()) if name in SCALARS:
                return Stand("number")
            case _, (Stand(kind="numpy.ndarray"), (0,), bytes()) if name in ARRAYS:
                return Stand("array")
            case "torch._utils._rebuild_parameter", (Stand(kind="tensor"), bool(), Ordered()):
                return Stand("tensor")
            case "torch._utils._rebuild_tensor", (data, offset, shape, strides):
                return self.tensor(data, offset, shape, strides)
            case "torch._utils._rebuild_tensor_v2", (data, offset, shape, strides, bool(), Ordered()):
                return self.tensor(data, offset, shape, strides)
            case "torch._utils._rebuild_tensor_v3", (data, offset, shape, strides, bool(), Ordered(), dtype):
                return self.tensor(data, offset, shape, strides, DTYPES[dtype.kind].itemsize)
        raise ValueError(f"a strange call of {name}")

    def tensor(self, data, offset, shape, strides, item=None):
        """Return what stands for a dense tensor, which must lie within its data.

        One that was expanded, a number that stands for many, may be larger than the file, but not without limit.
        """
        if data.kind != "storage" or len(shape) > 64 or not is_natural(offset, *shape, *strides):
            raise ValueError("a strange tensor")
        total, item = data.value[0], item or data.value[1]
        last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
        if math.prod(shape) * item > max(self.size, 1 << 30) or math.prod(shape) and (last + 1) * item > total:
            raise UserError(f"{self.source} holds a tensor of shape {shown(shape)} that does not fit the {total} bytes "
                            "stored for it, so it is not loaded. Copy the file again or give another.")
        return Stand("tensor")

    def fill(self, target, state):
        """Check a state that is given to something made, which must be as torch.save writes it."""
        match target, state:
            case Ordered(), {"_metadata": Ordered()} if len(state) == 1:
                return
            case Stand(kind="namespace"), dict() if all(isinstance(key, str) for key in state):
                return
            case Stand(kind="dtype"), (int(), str(), *rest) if rest == list(target.value.__reduce__()[2][2:]):
                return
            case Stand(kind="array"), (int(), tuple(shape), Stand(kind="dtype", value=dtype), _, bytes() | list()):
                if len(shape) <= 64 and is_natural(*shape) and math.prod(shape) * dtype.itemsize <= self.size:
                    return
        raise ValueError("a strange state")


def is_natural(*values):
    """Tell whether all are integers from 0 on."""
    return all(type(value) is int and value >= 0 for value in values)


def is_plain(value):
    """Tell whether a value is text or a number, or a tuple or list of such."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(part, (*PLAIN, np.generic)) for part in parts)


def tensors_in(content):
    """Return all tensors of nested dicts, lists and tuples, which may contain themselves."""
    found, queue, seen = [], [content], set()
    while queue:
        item = queue.pop()
        if id(item) not in seen:
            seen.add(id(item))
            found += [item] if torch.is_tensor(item) else []
            queue += item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return found


def refuse_damaged(tensors, path, flag):
    """Raise Damaged where the bytes of a loaded tensor have none of the checksums of the zip file it came from.

    The other two formats have no checksums. Nor has a zip file, 0 instead, if set_crc32_options(False) was in force.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        with zipfile.ZipFile(file) as archive:
            sums = {(entry.file_size, entry.CRC) for entry in archive.infolist()}
    storages = {data.data_ptr(): data for data in (tensor.untyped_storage() for tensor in tensors) if data.nbytes()}
    for data in storages.values():
        checksum = zlib.crc32(torch.tensor([], dtype=torch.uint8).set_(data).numpy())
        if not {(data.nbytes(), checksum), (data.nbytes(), 0)} & sums:
            raise Damaged(f"{flag} {path} is damaged: its bytes do not have the checksum that was stored with them. "
                          "Copy it again or give another checkpoint.")


def is_epoch(value):
    """Tell whether a value can be the number of an epoch, and of a file."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < 10**9


def is_number(value):
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and (
        math.isfinite(value))


def is_best(best):
    """Tell whether a value is a record of the best score; other people's `best`, without our keys, may be anything."""
    if not isinstance(best, dict) or not {"epoch", "value", "metric"} <= set(best) or best["epoch"] is None:
        return True
    return (is_epoch(best["epoch"]) and is_number(best["value"]) and isinstance(best["metric"], str)
            and isinstance(best.get("folder", ""), str))


def is_optimizer(state):
    """Tell whether a value has the form of an optimizer's state_dict()."""
    groups, values = (state.get("param_groups"), state.get("state")) if isinstance(state, dict) else (None, None)
    return (isinstance(groups, list) and isinstance(values, dict) and all(isinstance(v, dict) for v in values.values())
            and all(isinstance(group, dict) and isinstance(group.get("params"), list) and is_natural(*group["params"])
                    for group in groups))


def is_scaler(state):
    """Tell whether a value has the form of a GradScaler's state_dict(), which is empty if it is not enabled."""
    whole = ("growth_interval", "_growth_tracker")
    return isinstance(state, dict) and all(is_number(value) and (is_natural(value) if key in whole else value > 0)
                                           for key, value in state.items())


FORMS = {  # key of a checkpoint -> what it must be, and how to tell
    "best": ("the epoch, value, metric and folder of the best score", is_best),
    "frozen_hashes": ("a text for each name", lambda hashes: isinstance(hashes, dict)
                      and all(isinstance(text, str) for pair in hashes.items() for text in pair)),
    "epoch": ("the number of an epoch", is_epoch),
    "optimizer": ("the state of an optimizer", is_optimizer),
    "scaler": ("the numbers of a loss scaler", is_scaler),
}


def refuse_malformed(content, source, keys):
    """Raise UserError, beginning with `source`, where a checkpoint holds something else under a key than FORMS says."""
    for key in keys:
        if key in content and not FORMS[key][1](content[key]):
            raise UserError(f"{source} does not hold {FORMS[key][0]} under {key}. Give another checkpoint, or keep "
                            "only the weights: torch.save({'model': ...}).")


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint knows


def choose_checkpoint(path):
    """Return the one checkpoint that `--checkpoint_path` means, its content, and why it was chosen.

    Of a folder that is the run's best by its first metric if the newest records one whose file is there, else the
    newest.
    """
    found = find_checkpoints(path, "--checkpoint_path")
    newest = load_checkpoint(found[-1], "--checkpoint_path")
    if not Path(path).is_dir():
        return found[0], newest, ""
    best = best_of(newest)
    best_file = Path(path) / f"checkpoint-{best.get('epoch')}.pth"
    if best_file in found:
        return (best_file, load_checkpoint(best_file, "--checkpoint_path"),
                f", epoch {best['epoch']}, the best of the folder by {best['metric']} ({best['value']:.4f})")
    reason = f"its best, of epoch {best['epoch']}, is not there" if best else "which records no best"
    return found[-1], newest, f", epoch {checkpoint_epoch(found[-1])}, the newest of the folder ({reason})"


def best_of(content):
    """Return a checkpoint's {"epoch", "value", "metric", "folder"} of the best score so far; {} if it records none."""
    best = content.get("best")  # load_checkpoint has checked its types
    if not isinstance(best, dict) or not {"epoch", "value", "metric"} <= set(best) or best["epoch"] is None:
        return {}
    return {"epoch": int(best["epoch"]), "value": float(best["value"]), "metric": shown(best["metric"]),
            "folder": best.get("folder", "")}


def args_of(content):
    """Return the {flag: value} of a checkpoint's training, stored as a dict or IMDL-BenCo's Namespace; {} if none.

    What no flag can hold is left out.
    """
    stored = content.get("args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    stored = stored if isinstance(stored, dict) else {}
    return {key: value for key, value in stored.items() if isinstance(key, str) and is_plain(value)
            and not re.search("[\x00-\x1f\x7f-\x9f]", f"{key}{value}")}  # which a terminal would obey


def stored_args(args):
    """Return (path, {flag: value} of the training) of the checkpoint that `--checkpoint_path` means."""
    path, content, _ = choose_checkpoint(args.checkpoint_path)
    return path, args_of(content)


def load_chosen(model, path):
    """Load the one checkpoint that `--checkpoint_path` means into a bare model, say which it is, return its path."""
    with ddp.fail_together():
        chosen, _, why = choose_checkpoint(path)
        load_weights(model, chosen, "--checkpoint_path")
    refuse_different(chosen.name, f"--checkpoint_path {path}")
    say(f"checkpoint {chosen}{why}")
    return chosen


def refuse_different(found, flag):
    """Raise UserError, on all ranks, where they don't find the same: several machines, each with a disk of its own."""
    shares = ddp.gather(found)
    with ddp.fail_together():
        if any(share != shares[0] for share in shares):
            raise UserError(f"{flag}: the processes find different checkpoints ({', '.join(map(str, shares))}). Copy "
                            "the same files to the same place on every machine, or share the folder.")


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def find_resume(resume, output_dir):
    """Return the checkpoint file that `--resume` means, or None to start from the beginning.

    The word auto means the newest of `output_dir` that is not damaged. An earlier run's checkpoints there are neither
    overwritten nor mixed in: UserError.
    """
    earlier = list_checkpoints(output_dir) if output_dir.exists() else []  # rank 0 alone has made it
    if resume == "auto":
        if not earlier:
            say(f"--resume auto: no checkpoint in {output_dir}, so training starts at the beginning")
        with ddp.fail_together():
            path = newest_whole(earlier) if earlier else None
        refuse_different(path and path.name, "--resume auto")
        return path
    with ddp.fail_together():
        path = find_checkpoints(resume, "--resume")[-1] if resume else None
    refuse_different(path and path.name, f"--resume {resume}")
    if earlier and path and path.parent.resolve() == Path(output_dir).resolve():
        if path.name != earlier[-1].name:
            raise UserError(f"--resume {path}: {output_dir} holds later checkpoints up to {earlier[-1].name}, which "
                            "would get mixed with new ones: move them away, or give another --output_dir.")
    elif earlier:
        raise UserError(f"--output_dir {output_dir} holds {counted(len(earlier), 'checkpoint')} of an earlier run: "
                        "give --resume auto to go on with it, or another --output_dir.")
    return path


def newest_whole(files):
    """Return the newest of a run's checkpoints that is not damaged, and say why it is no newer one.

    Raises UserError, naming the newest, if all are damaged.
    """
    errors = []
    for path in reversed(files):
        try:
            refuse_damaged(tensors_in(load_checkpoint(path, "--resume")), path, "--resume")
        except Damaged as error:
            errors.append(error)
            continue
        if errors:
            say(f"note: {errors[0]} Instead, --resume auto goes on from {path.name}.")
        return path
    raise errors[0]


def resume_training(path, model, optimizer, scaler, args, model_args, metric):
    """Load a checkpoint into model, optimizer and scaler, if one is given, and decide where training starts.

    Args:
        path: checkpoint file or None (see `find_resume`)
        args, model_args: this run's flags, which override those in the checkpoint; changes are said
        metric: name of the metric that decides which checkpoint is best

    Returns:
        (epoch, best): the first epoch to train, and {"epoch", "value", "metric", "folder"} of the best so far
    """
    epoch, best = args.start_epoch, {"epoch": None, "value": -math.inf, "metric": metric, "folder": args.output_dir}
    if path:
        with ddp.fail_together():
            content = load_weights(model, path, "--resume", mmap=False)
            if "optimizer" in content:
                refuse_damaged(tensors_in(content["optimizer"]), path, "--resume")
                refuse_malformed(content, f"--resume {path}", FORMS)
                load_optimizer(optimizer, scaler, content, path)
        if "optimizer" in content:
            epoch = int(content["epoch"]) + 1 if "epoch" in content else epoch
            if epoch >= args.epochs and args.resume == "auto":  # a script may start it again and again
                say(f"finished: {path} is of epoch {epoch - 1} and --epochs is {args.epochs}; raise --epochs to go on")
                ddp.cleanup()
                sys.exit(0)
            free = ("resume", "start_epoch", "output_dir", "log_dir", "num_workers", "no_progress", "world_size",
                    "local_rank", "dist_url", "dist_on_itp")  # of no consequence for the result
            note_changes(args_of(content), path.name, {key: value for key, value in {**vars(args), **model_args}.items()
                                                       if key not in free})
            best = stored_best(content, path, best)
            say(f"resumed from {path}: epoch {epoch} comes next")
        else:
            say(f"weights from {path}; it holds no optimizer, so training starts at epoch {epoch}")
    if epoch >= args.epochs:
        raise UserError(f"nothing left to train: the next epoch is {epoch} and --epochs is {args.epochs}; raise "
                        "--epochs.")
    return epoch, best


def load_optimizer(optimizer, scaler, content, path):
    """Restore the state of optimizer and loss scaler; UserError where it doesn't fit."""
    stored, groups = content["optimizer"], optimizer.param_groups
    try:
        there, here = ([len(group["params"]) for group in each] for each in (stored["param_groups"], groups))
        if there != here:
            raise ValueError(f"its parameter groups have {there} parameters, and here they have {here}")
        # This run's flags override those in the checkpoint, and tell where the state belongs.
        stored = {"state": stored["state"], "param_groups": [{**own, "params": group["params"]} for group, own in
                                                             zip(stored["param_groups"], groups)]}
        places = {number: (group, p) for group, own in zip(stored["param_groups"], groups)
                  for number, p in zip(group["params"], own["params"])}
        stored["state"] = {number: fitting_state(values, optimizer, *places[number])
                           for number, values in stored["state"].items() if values}
        optimizer.load_state_dict(stored)
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                    # A fused step needs them alike, and one run may have had --channels_last and the other not.
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if content.get("scaler"):  # empty in a checkpoint from a run without mixed precision
            scaler.load_state_dict(content["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"--resume {path}: its optimizer state doesn't fit this optimizer ({error}). Resume with the "
                        "same optimizer, or keep only the weights: torch.save({'model': ...}).") from None


def fitting_state(values, optimizer, group, p):
    """Return what a checkpoint says that the optimizer keeps of the weight `p` of a parameter group.

    Raises ValueError if it is not as the optimizer itself makes it in a step on a small weight of as many dimensions.
    """
    small = torch.nn.Parameter(torch.zeros([2] * max(p.ndim, 1), device=p.device))
    small.grad = torch.zeros_like(small)
    other = copy.copy(optimizer)
    other.param_groups, other.state = [{**group, "params": [small]}], defaultdict(dict)
    other.step()
    expected = other.state[small]
    for name, own in expected.items():
        if name not in values:
            raise ValueError(f"{name} is missing")
        value = values[name]
        if torch.is_tensor(own) and own.ndim:  # of the weight's shape, or of length 1 in some dimensions
            fits = torch.is_tensor(value) and value.is_floating_point() and value.shape == (
                p.shape if own.shape == small.shape else
                tuple(1 if length == 1 else whole for length, whole in zip(own.shape, p.shape, strict=True)))
        elif own is None:
            fits = value is None
        else:  # a number, such as the count of steps
            value = value.item() if torch.is_tensor(value) and value.numel() == 1 else value
            fits = is_number(value) and value >= 0
        if not fits:
            raise ValueError(f"{name} is not that of a tensor of shape {tuple(p.shape)}")
    return {name: values[name] for name in expected}


def stored_best(content, path, best):
    """Return the best score that a checkpoint records, or `best`, which has none yet, where it is of another metric."""
    stored = best_of(content) or best
    if stored["metric"] != best["metric"]:
        say(f"note: the best score of {path.name} was of {stored['metric']}; the best {best['metric']} counts from "
            "here on")
        return best
    if (path.parent / f"checkpoint-{stored['epoch']}.pth").exists():  # the folder may have been moved
        stored["folder"] = str(path.parent)
    return stored
