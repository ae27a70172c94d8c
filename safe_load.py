"""Reading checkpoints that may come from a stranger, or that a disk may have damaged.

torch.load(weights_only=True) runs no code, but it allocates what a file claims and calls constructors with arguments of
the file's choice. So the pickle is gone through first, without making anything. What the loaded values must look like
is said here too, in FORMS.
"""
import argparse
import io
import math
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from log import as_text
from registry import UserError

LIMIT = 4 << 20  # bytes of a pickle, a zip's directory or a safetensors header; 15,000 tensors take less


class Damaged(UserError):
    """A file that is not whole, as a crash or a broken disk leaves it: an earlier checkpoint may do."""


def read_checkpoint(path, flag, mmap=True):
    """Return what a file of torch.save or safetensors holds, without executing anything in it.

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
                return safetensors.torch.load_file(path)
            (check_zip if is_zip else check_pickles)(file, size, source)
            with torch.serialization.safe_globals(harmless_globals()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy 2 about what NumPy 1 wrote
                is_mapped = mmap and is_zip and as_text(path) == str(path)  # torch maps no path that is not UTF-8
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except UserError:
        raise
    except Exception as error:  # each reader raises many types; each means that this can't be loaded
        if isinstance(error, OSError) and error.filename:
            raise UserError(f"{source}: {error.strerror}. Give the path of a file that torch.save wrote.") from None
        raise Damaged(f"{source} is truncated or is not a checkpoint. Copy it again or give another file that "
                      "torch.save wrote.") from None


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


def is_begun(state):
    """Tell whether a value has the form of `EpochLog.state`."""
    def is_share(share):
        return (isinstance(share, (list, tuple)) and len(share) == 3 and isinstance(share[2], list)
                and all(isinstance(part, dict) for part in share[:2]) and share[0].keys() == share[1].keys()
                and all(map(is_number, (*share[0].values(), *share[1].values(), *share[2]))))
    return (isinstance(state, dict) and {"steps", "skipped", "lr", "ranks"} <= {*state}
            and is_natural(state["steps"], state["skipped"]) and is_number(state["lr"])
            and isinstance(state["ranks"], list) and all(map(is_share, state["ranks"])))


def is_row(row):
    """Tell whether a value can be a row of log.txt."""
    return isinstance(row, dict) and is_epoch(row.get("epoch")) and all(
        isinstance(key, str) and isinstance(value, (str, int, float, dict)) for key, value in row.items())


FORMS = {  # key of a checkpoint -> what it must be, and how to tell
    "best": ("the epoch, value, metric and folder of the best score", is_best),
    "frozen_hashes": ("a text for each name", lambda hashes: isinstance(hashes, dict)
                      and all(isinstance(text, str) for pair in hashes.items() for text in pair)),
    "epoch": ("the number of an epoch", is_epoch),
    "optimizer": ("the state of an optimizer", is_optimizer),
    "scaler": ("the numbers of a loss scaler", is_scaler),
    "begun": ("how far an epoch is", is_begun),
    "order": ("what the order of the images depends on", lambda order: isinstance(order, dict)
              and all(map(is_plain, order.values()))),
    "row": ("a row of log.txt", is_row),
}


def refuse_malformed(content, source, keys):
    """Raise UserError, beginning with `source`, where a checkpoint holds something else under a key than FORMS says."""
    for key in keys:
        if key in content and not FORMS[key][1](content[key]):
            raise UserError(f"{source} does not hold {FORMS[key][0]} under {key}. Give another checkpoint, or keep "
                            "only the weights: torch.save({'model': ...}).")


def shown(value):
    """Return text out of a checkpoint for a message: on one line, and not too long."""
    text = str(value)
    return (text if text.isprintable() else ascii(text))[:100]
