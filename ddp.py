"""Processes, printing, logs and checkpoints: what a run needs around its loop, with or without torchrun.

Without torchrun's environment every function here works for the one process there is.
"""
import argparse
import contextlib
import csv
import datetime
import json
import os
import pickle
import random
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from registry import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Process group


def init(args):
    """Join torchrun's process group, if there is one, and return this process's torch.device.

    `--device cuda` (the default) falls back to the CPU with one line where there is no GPU; a numbered GPU that isn't
    there is an error.
    """
    name, _, number = args.device.partition(":")
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, args.local_rank or 0)))
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UserError(f"--device {args.device}: give cuda, cuda:<number> or cpu.")
    if number and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {args.device}: several processes can't share one GPU. Give --device cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        if number:
            raise UserError(f"--device {args.device}: this machine has no CUDA device that torch can use. "
                            "Give --device cpu.")
        name = "cpu"
    if name == "cuda" and (int(number) if number else local_rank) >= torch.cuda.device_count():
        raise UserError(f"--device {args.device}, process {local_rank}: this machine has {torch.cuda.device_count()} "
                        "GPUs. Start as many processes as there are GPUs, or give a lower number.")
    device = torch.device(name, (int(number) if number else local_rank) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
    if distributed:
        # The first reading of a large dataset happens on rank 0 alone, while the others wait here: hence hours.
        dist.init_process_group("nccl" if name == "cuda" else "gloo", init_method=args.dist_url,
                                timeout=datetime.timedelta(hours=4), rank=int(os.environ["RANK"]),
                                world_size=int(os.environ["WORLD_SIZE"]),
                                device_id=device if name == "cuda" else None)
    if name == "cpu" and args.device == "cuda":
        say("no CUDA device: running on the CPU")
    if args.world_size not in (None, world_size()):
        say(f"--world_size {args.world_size} is not used: torchrun's environment decides, {world_size()} process(es)")
    return device


def rank():
    """Return the index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main():
    """Tell whether this process prints and writes."""
    return rank() == 0


def say(*words):
    """Print from rank 0, at once."""
    if is_main():
        print(*words, flush=True)


def gather(value):
    """Return the list of all ranks' picklable values, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together():
    """Make a UserError of one rank, which alone reads or writes something in this block, end all ranks.

    The others would wait for it in vain. Only the first of the ranks that met one raises it, so that it is printed
    once. There may be no other exchange within the block.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    ranks = [number for number, other in enumerate(gather(mistake)) if other]
    if ranks and rank() == ranks[0]:
        raise mistake
    if ranks:
        sys.exit(1)


def average(values):
    """Return {name: mean over the ranks that have it} of every rank's {name: float}."""
    ranks = gather(values)
    names = dict.fromkeys(name for each in ranks for name in each)
    columns = {name: [each[name] for each in ranks if name in each] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def cleanup():
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model, device, find_unused_parameters=False):
    """Return the model for training: itself, or under DistributedDataParallel, on CUDA with synchronised batch norm."""
    if world_size() == 1:
        return model
    # Strides of a depthwise kernel (C, 1, k, k) can be written in two ways; torch tells the user, who can't change it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's would drop the activation in timm's BatchNormAct2d
        model = convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                   find_unused_parameters=find_unused_parameters)


def share_buffers(model):
    """Give every rank rank 0's buffers, which checkpoints hold.

    Where batch norm isn't synchronised, its statistics differ between the ranks.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def seed_everything(seed):
    """Seed Python, NumPy and torch, each rank differently.

    The order of pictures and the augmentations have seeds of their own (data.py).
    """
    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())


def random_states():
    """Return this process's random states in plain types and tensors."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
              "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states):
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Output folder and logs


def make_output_dir(path, flag="--output_dir"):
    """Create a folder and prove that it can be written to; UserError naming the flag otherwise."""
    path = Path(path)
    if is_main():
        probe = path / f".probe{os.getpid()}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{flag} {path}: can't be written to ({error.strerror}). "
                            "Give a folder that you may write to.") from None
    return path


def write_atomically(path, write):
    """Call write(temporary path), then rename to `path`, so that `path` is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "writing failed"
        raise UserError(f"{path} can't be written ({reason}). Free some space or give another folder.") from None


def json_line(record):
    """Return a dict as one line of JSON; NaN and infinity, which JSON doesn't know, become null."""
    return json.dumps({key: None if isinstance(value, float) and not np.isfinite(value) else value
                       for key, value in record.items()}) + "\n"


def append_line(path, record):
    """Append a dict as one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(record))


def write_lines(path, records):
    """Write dicts as JSON lines, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(map(json_line, records)), encoding="utf-8"))


def write_csv(path, rows):
    """Write dicts that share their keys as CSV, whole or not at all."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def append_csv(path, rows):
    """Add dicts that share their keys to a CSV, with a header if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def announce(args, model_args):
    """Print the command and all arguments."""
    say(f"command: {' '.join(sys.argv)}\narguments: {json.dumps({**vars(args), **model_args})}")


def start_testing(args, model_args):
    """Make the output folder of a test script, print what runs, seed; return the folder."""
    with together():
        output_dir = make_output_dir(args.output_dir)
    if any((output_dir / name).exists() for name in ("results.csv", "pred")):
        say(f"note: {output_dir} holds results of an earlier run; those of the same name are replaced")
    announce(args, model_args)
    seed_everything(args.seed)
    return output_dir


def note_changes(checkpoint, path, settings):
    """Say which of the run's {flag: value} differ from those that a checkpoint of ours was trained with."""
    stored = checkpoint.get("args")
    for name, value in settings.items() if isinstance(stored, dict) else ():
        if name in stored and stored[name] != value:
            say(f"note: --{name} was {stored[name]} in {path.name} and is {value} now")


def load_for_testing(model, path, args, model_args):
    """Load a checkpoint into a bare model and return its content; say which flags differ from the training's."""
    checkpoint = load_weights(model, path, "--checkpoint_path")
    fitting = {name: vars(args)[name] for name in ("image_size", "if_resizing", "if_padding")}
    note_changes(checkpoint, path, {**fitting, **model_args})
    return checkpoint


def newest_for_testing(model, args, model_args):
    """Load what --checkpoint_path means, of a folder the newest checkpoint, into a bare model; return its path."""
    path = find_checkpoints(args.checkpoint_path, "--checkpoint_path")[-1]
    say(f"checkpoint {path}")
    best = load_for_testing(model, path, args, model_args).get("best") or {}
    if Path(args.checkpoint_path).is_dir() and best.get("epoch") not in (None, checkpoint_epoch(path)):
        say(f"note: this is the newest of the folder; its best by {best['metric']} is checkpoint-{best['epoch']}.pth")
    return path


@contextlib.contextmanager
def tensorboard(log_dir, fresh=False, purge_step=None):
    """Yield a SummaryWriter on rank 0 and None elsewhere.

    `fresh` removes the events of an earlier run from the folder, `purge_step` hides those from a step on.
    """
    if not is_main():
        yield None
        return
    for earlier in Path(log_dir).glob("events.out.tfevents.*") if fresh else ():
        earlier.unlink()
    from torch.utils.tensorboard import SummaryWriter  # imported late: it takes its time
    with SummaryWriter(str(log_dir), purge_step=purge_step) as writer:
        yield writer


class Progress:
    """Progress lines of a loop, and the averages behind them.

    Losses stay on the device and are read only where a line is printed, so that the GPU's queue never runs dry; that
    is also where a loss that is not finite is noticed.

    Args:
        header: what stands in front of every line
        total: number of steps
        lines: how many lines to print
    """

    def __init__(self, header, total, lines):
        self.header, self.total, self.every = header, total, -(-total // lines)
        self.sums, self.counts, self.steps, self.read_until = {}, {}, 0, 0
        self.start = self.clock = time.time()
        self.times = self.data_times = 0.0

    def each(self, loader):
        """Yield (step, batch), timing the wait for data."""
        for step, batch in enumerate(loader):
            self.data_times += time.time() - self.clock
            yield step, batch
            self.times += time.time() - self.clock
            self.clock = time.time()

    def update(self, values, lr):
        """Add a step's {name: scalar tensor}; print a line if it is time, UserError when a value is not finite then."""
        values = {name: torch.as_tensor(value).detach().float().reshape(()) for name, value in values.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1
        if self.steps % self.every and self.steps != self.total:
            return
        means = self.means()
        done, per_step = self.steps, (time.time() - self.start) / self.steps
        parts = [self.header, f"[{done}/{self.total}]",
                 f"eta: {datetime.timedelta(seconds=int(per_step * (self.total - done)))}", f"lr: {lr:.6f}",
                 *(f"{name}: {value.item():.4f} ({means[name]:.4f})" for name, value in values.items()),
                 f"time: {self.times / max(1, done - 1):.4f}", f"data: {self.data_times / done:.4f}"]
        if torch.cuda.is_available():
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
        say("  ".join(parts))

    def means(self):
        """Return {name: average so far}; UserError where one is not finite."""
        means = {name: value.item() / self.counts[name] for name, value in self.sums.items()}
        for name, value in means.items():
            if not np.isfinite(value) and name != "grad_norm":  # the loss scaler skips a gradient that overflows
                raise UserError(f"{self.header} {name} became {value} between steps {self.read_until} and "
                                f"{self.steps}: lower --lr, try --if_not_amp, or look for a division by zero in the "
                                "model's loss.")
        self.read_until = self.steps
        return means


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_epoch(path):
    """Return n of `checkpoint-<n>.pth`, or None for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)\.pth", Path(path).name)
    return int(match[1]) if match else None


def find_checkpoints(path, flag):
    """Return the checkpoint files that a path means: the file, or all checkpoint-<n>.pth of a folder in order of n."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder. "
                        "Give a .pth file or a folder with checkpoint-<n>.pth files.")
    found = sorted((p for p in path.iterdir() if checkpoint_epoch(p) is not None), key=checkpoint_epoch)
    if not found:
        others = sorted(p.name for p in path.glob("*.pth"))
        cure = "Give another folder or a file."
        if others:
            cure = f"It does hold {', '.join(others[:5])}: give one of these files."
        raise UserError(f"{flag} {path}: this folder holds no checkpoint-<n>.pth. {cure}")
    return found


def save_checkpoint(path, checkpoint):
    """Write a dict of plain types and tensors, whole or not at all."""
    write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(path, flag):
    """Read a checkpoint without executing anything in it; UserError where it is truncated, none, or holds code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # IMDL-BenCo stores its arguments so
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = re.search(r"GLOBAL ([\w.]+)", str(error))
        if detail:
            raise UserError(f"{flag} {path}: holds the object {detail[1]}, which can execute code, so it is not "
                            "loaded. Save the weights alone: torch.save({'model': model.state_dict()}, path)."
                            ) from None
        raise UserError(f"{flag} {path}: is no checkpoint. Give a file that torch.save wrote.") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        reason = f" ({reason})" if re.search("[a-z]{3}", reason) else ""
        raise UserError(f"{flag} {path}: is truncated or no checkpoint{reason}. Copy it anew or give another."
                        ) from None
    if not isinstance(content, dict) or not content:
        what = "nothing" if content == {} else f"a {type(content).__name__}"
        raise UserError(f"{flag} {path}: holds {what}, not a checkpoint. "
                        "Give a file with {'model': state_dict} or a state dict.")
    return content


def state_dict_of(content, path, flag):
    """Return a checkpoint's state dict, under "model" or "state_dict" or the whole.

    The prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are taken off.
    """
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{flag} {path}: holds no state dict, neither under 'model' nor by itself. "
                        "Give a file with {'model': state_dict}.")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def load_weights(model, path, flag):
    """Load a checkpoint's weights into a bare model, strictly, and return all that the checkpoint holds.

    Raises UserError with the first keys or shapes that differ.
    """
    content = load_checkpoint(path, flag)
    state = state_dict_of(content, path, flag)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        own = model.state_dict()
        parts = [("missing", [key for key in own if key not in state]),
                 ("unexpected", [key for key in state if key not in own]),
                 ("of another shape", [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                                       for key in own if key in state and state[key].shape != own[key].shape])]
        lines = [f"{len(keys)} keys {what}, first {', '.join(keys[:3])}" for what, keys in parts if keys]
        raise UserError(f"{flag} {path}: is a checkpoint of another model or of other model flags than this "
                        f"{type(model).__name__}: {'; '.join(lines) or str(error).splitlines()[0]}. "
                        "Give --model and its flags as in training, or another checkpoint.") from None
    return content
