"""List the models, or measure some: parameters, operations, time and memory of a forward.

    python tools/list_models.py                                            # all: file, needs, paper, flags
    python tools/list_models.py --model MyConvNeXt --image_size 256        # measured at 256 pixels
    python tools/list_models.py --model MyConvNeXt MVSSNet --test_batch_size 8
    python tools/list_models.py --model MyModel --kernel_size 5            # a single one also takes its own flags

Weights are random: none are read or downloaded. A forward runs as in test.py: eval mode, no gradients, mixed precision
on a GPU. GMACs are 1e9 multiply-adds and GFLOPs 1e9 floating-point operations, two per multiply-add, for one image;
attention counts, element-wise operations, FFTs and what only the losses need don't. Time is the median of at least
three forwards after a first, losses included. Peak memory holds weights and activations: on a GPU what torch allocates,
on a CPU by how much the process has grown since its start (Linux only).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import inspect
import math
import json
import re
import statistics
import tempfile
import time

import cv2
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import ddp
from evaluate import eval_mode
from registry import (MODELS, POSTFUNCS, Parser, UserError, build_model, exit_on_user_error, find_model, import_failure,
                      import_files, is_pretrained_flag, model_files, parameters, parse_args, positive, post_function,
                      post_function_key)

BATCH_KEYS = ("image", "mask", "label", "edge_mask", "shape", "original_shape", "origin_shape", "name", "shape_mask")


def example_samples(image_size, post_func, count=1, padding=True):
    """Return the first `count` of five samples of a dataset with edge masks, as `data.collate` takes them.

    They are JPEGs of smooth noise, two of them tampered and two authentic, and a black one with a mask. The second and
    the fourth are less high than wide.
    """
    rng, pairs = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            shape = image_size * (4 - i % 2) // 4, image_size
            image = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
            image = cv2.add(image, rng.integers(0, 16, image.shape, np.uint8)) * (i < 4)
            cv2.imwrite(f"{folder}/{i}.jpg", image)
            cv2.imwrite(f"{folder}/{i}.png", 255 * np.tri(*shape, -(i % 4) * shape[1] // 4, dtype=np.uint8))
            pairs.append([f"{i}.jpg", "Negative" if i in (2, 3) else f"{i}.png"])
        Path(folder, "set.json").write_text(json.dumps(pairs))
        dataset = data.JsonDataset(f"{folder}/set.json", image_size, padding=padding, edge_mask_width=7,
                                   post_func=post_func, fingerprint=False)
        return [dataset[i] for i in range(count)]


def example_batch(image_size, post_func, count=1, device=torch.device("cpu")):
    """Return a batch, one tampered image `count` times, as `forward` receives it with every optional key."""
    return data.to_device(data.collate(example_samples(image_size, post_func) * count, post_func), device)


def build_untrained(name, model_args):
    """Build a model without downloading weights; UserError if `model_args` lacks a parameter that it needs."""
    constructor = parameters(MODELS.get(name)).values()
    missing = [f"--{p.name}" for p in constructor if p.default is p.empty and p.name not in model_args]
    if missing:
        raise UserError(f"needs {' '.join(missing)}: list it alone, with `--model {name}` and these flags.")
    return build_model(name, {**model_args, **{p.name: False for p in constructor if is_pretrained_flag(p)}})


# ---------------------------------------------------------------------------------------------------------------------
# What a model is


def count_parameters(name, model_args):
    """Return (number of parameters, model); the model has no memory for them where its constructor permits that."""
    try:
        with torch.device("meta"):
            model = build_untrained(name, model_args)
    except UserError:
        raise
    except Exception:  # a constructor that reads its own tensors
        model = build_untrained(name, model_args)
    return sum(p.numel() for p in model.parameters()), model


def needs(name, model):
    """Return what `forward` takes besides image and mask, in brackets what it can do without, and what of it comes from
    the model's post function."""
    takes = [p for p in inspect.signature(model.forward).parameters.values()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("image", "mask")]
    words = [p.name if p.default is p.empty else f"[{p.name}]" for p in takes if p.name in BATCH_KEYS]
    added = [p.name for p in takes if p.name not in BATCH_KEYS and p.default is p.empty]
    if post_function_key(name) in POSTFUNCS:
        words.append(f"post function ({', '.join(added)})" if added else "post function")
    return " ".join(words) or "-"


def paper(name):
    """Return the first link in the docstring of the model or of its file, or "-"."""
    model = MODELS.get(name)
    for text in (model.__doc__, getattr(sys.modules.get(model.__module__), "__doc__", None)):
        link = re.search(r"https?://[^\s),;]+", text or "")
        if link:
            return link[0].rstrip(".")
    return "-"


def describe(name, image_size):
    """Return a row of the list: parameters, needs, paper, flags."""
    own = [key for key in parameters(MODELS.get(name)) if key != "image_size"]
    given = {"image_size": image_size} if "image_size" in parameters(MODELS.get(name)) else {}
    count, model = count_parameters(name, given)
    return [f"{count:,}", needs(name, model), paper(name), " ".join(f"--{key}" for key in own) or "-"]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


class Ledger(TorchDispatchMode):
    """Notes the operations of each operator that runs, and which tensors it made from which.

    Tensors are told by their memory: a view or an in-place result belongs to what was there before.
    """

    def __init__(self, counter):
        super().__init__()
        self.counter, self.maker = counter, {}  # address -> (operations, makers of the operands)

    @classmethod
    def addresses(cls, value):
        if torch.is_tensor(value):
            return [value.untyped_storage().data_ptr()]
        return [address for x in value for address in cls.addresses(x)] if isinstance(value, (list, tuple)) else []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        operands = [self.maker[x] for x in self.addresses([*args, *(kwargs or {}).values()]) if x in self.maker]
        step = (self.counter.get_total_flops() - before, operands)
        self.maker |= dict.fromkeys(self.addresses(result), step)
        return result

    def behind(self, *tensors):
        """Return the operations of all that these tensors were made from."""
        found, left = {}, [self.maker[x] for x in self.addresses(tensors) if x in self.maker]
        while left:
            step = left.pop()
            if id(step) not in found:
                found[id(step)] = step[0]
                left += step[1]
        return sum(found.values())


def count_flops(model, batch):
    """Return the floating-point operations of one forward in eval mode, two per multiply-add, for the whole batch.

    Counted is what pred_mask and pred_label were made from, and so no loss. The model is left as it was.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)  # the counter would put hooks on what needs gradients
        # Attention as plain products, since not all of its fused kernels are counted.
        with (torch.no_grad(), eval_mode(model, True), sdpa_kernel(SDPBackend.MATH),
              FlopCounterMode(display=False) as counter, Ledger(counter) as ledger):
            output = model(**batch)
            return ledger.behind(output.get("pred_mask"), output.get("pred_label"))
    finally:
        for p in trainable:
            p.requires_grad_(True)


def resident(key):
    """Return the process's memory in bytes on Linux: VmRSS now, or VmHWM at its peak since `clear_refs` got a 5."""
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_memory(device, run):
    """Call run() and return the peak of memory in bytes, on a CPU the whole process's; NaN where that isn't told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run()
        return math.nan
    run()
    return resident("VmHWM")


def measure(model, batch, device, amp):
    """Return (seconds per forward, peak of memory in bytes)."""
    def forward():
        start = time.perf_counter()
        with torch.autocast(device.type, enabled=amp):
            model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad(), eval_mode(model, True):
        peak = peak_memory(device, forward)
        times = [forward() for _ in range(3)]
        while sum(times) < 1:
            times.append(forward())
    return statistics.median(times), peak


def cost(name, model_args, args, device, before):
    """Return a row of measured figures: parameters, trainable ones, GMACs, GFLOPs, milliseconds per image, MiB.

    `before` is the memory that the process takes without a model.
    """
    model = build_untrained(name, model_args).to(device)
    batch = example_batch(args.image_size, post_function(name, model_args), args.test_batch_size, device)
    amp = device.type == "cuda" and not args.if_not_amp
    seconds, peak = measure(model, batch, device, amp)
    flops = count_flops(model, batch) / args.test_batch_size
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return [f"{sum(n for n, _ in sizes):,}", f"{sum(n for n, trains in sizes if trains):,}", f"{flops / 2e9:.2f}",
            f"{flops / 1e9:.2f}", f"{1000 * seconds / args.test_batch_size:.1f}",
            f"{max(peak - before, 0) / 2**20:.0f}"]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", metavar="NAME",
                        help="models to measure; a single one also takes its own flags (default: list all)")
    parser.add_argument("--image_size", type=positive, default=512,
                        help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--test_batch_size", type=positive, default=1, help="images per forward (default: %(default)s)")
    parser.add_argument("--device", default="cuda",
                        help="cuda, cuda:<number> or cpu; without a GPU, cuda means cpu (default: %(default)s)")
    parser.add_argument("--if_not_amp", action="store_true", help="no mixed precision (it is used on CUDA only)")
    asked = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0].model or []
    args, model_args = parse_args(parser) if len(asked) == 1 else (parser.parse_args(), {})
    for name in asked:
        find_model(name)
    broken = {} if asked else import_files(model_files())
    names = asked or sorted(MODELS.entries)

    if asked:
        device = ddp.init(args.device)
        before = resident("VmRSS") if device.type == "cpu" and Path("/proc/self/status").exists() else 0
        print(f"{args.image_size}x{args.image_size} pixels, batch of {args.test_batch_size}, {device.type}, "
              f"{torch.get_num_threads()} threads\n")
        header = ["model", "file", "parameters", "trainable", "GMACs", "GFLOPs", "ms/image", "peak MiB"]
        widths = [0, 0, 13, 13, 9, 9, 9, 9]
    else:
        print("needs: what forward takes besides image and mask, in brackets if it can do without; edge_mask comes "
              "with --edge_mask_width\n")
        header, widths = ["model", "file", "parameters", "needs", "paper", "flags"], [0, 0, 13, -46, -40, 0]
    widths[:2] = [-max(map(len, column)) for column in ([*names, "model"], [*map(MODELS.file, names), "file"])]

    def show(words):
        cells = [word.rjust(width) if width > 0 else word.ljust(-width) for word, width in zip(words, widths)]
        print("  ".join(cells).rstrip(), flush=True)

    show(header)
    listed = 0
    for name in names:
        try:
            given = {key: value for key, value in vars(args).items() if key in parameters(MODELS.get(name))}
            row = (cost(name, {**given, **model_args}, args, device, before) if asked else
                   describe(name, args.image_size))
            listed += 1
        except UserError as error:
            row = [str(error) if len(asked) == 1 else re.split(r"(?<=[.!?])\s", str(error))[0]]  # the first sentence
        except Exception as error:  # whatever a user's model raises
            row = [f"{type(error).__name__}: {error}".split("\n")[0]]
        show([name, MODELS.file(name), *row])
    for file, error in broken.items():
        print(import_failure(file, error))
    if not listed:
        raise UserError("no model could be measured, the lines above say why." if names else "models/ holds no model.")


if __name__ == "__main__":
    exit_on_user_error(main)
