"""What a run prints and writes: lines on the screen, progress, output folders, JSON lines, CSV, TensorBoard.

Rank 0 alone prints and writes.
"""
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import errno
import io
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import cv2
import numpy as np
import torch
from tqdm import tqdm

from ddp import fail_together, gather, is_main, rank, world_size
from registry import UserError, counted, show, usable_cpus, visible

# ---------------------------------------------------------------------------------------------------------------------
# The screen


def say(*words):
    """Print from rank 0, at once; names of files need not be text that the terminal's encoding can show, and what they
    hold to control it is shown, not obeyed. Lines stay lines: where names may hold "\\n", use `visible` before."""
    if is_main():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = visible(" ".join(map(str, words)), lines=True)
        show(text.encode(encoding, "backslashreplace").decode(encoding))


def as_text(path):
    """Return a path with "_" for each byte that is no UTF-8, as in names out of an old zip file."""
    return re.sub("[\ud800-\udfff]", "_", str(path))


def format_table(header, rows):
    """Return a text table: numbers with 4 decimals, "-" for NaN and None."""
    def text(value):
        if value is None or value != value:
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else visible(value)

    lines = [list(map(text, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def first_lines(text, most, where):
    """Return a text, or of one with more than `most` lines the first, and a line that names the file with all."""
    lines = text.split("\n")
    if len(lines) > most:
        lines = [*lines[:most - 1], f"... and {counted(len(lines) - most + 1, 'line')} more, all of them in {where}"]
    return "\n".join(lines)


def say_places(places):
    """Print where to look next, the last lines of a script: {path: what is there}, of the paths that exist."""
    places = {visible(path): what for path, what in places.items() if os.path.exists(path)}
    width = max(map(len, places), default=0)  # there are none on other machines
    say("look next at:\n" + "\n".join(f"   {path.ljust(width)}   {what}" for path, what in places.items()))


class Progress:
    """How far long work is: a bar on a terminal, elsewhere a line at most every 30 seconds; rank 0 shows it.

        with Progress("testing", len(dataset)) as bar:
            for batch in loader:
                ...
                bar.update(len(batch["name"]))

    Args:
        label: what is being done
        total: how many items there are
        enabled: False shows nothing
        unit: what the items are
    """

    def __init__(self, label, total, enabled=True, unit="images"):
        enabled, terminal = enabled and is_main(), sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=visible(label), unit=f" {unit}", leave=False, dynamic_ncols=True,
                        disable=not (enabled and terminal))
        self.label, self.total, self.unit, self.lines = label, total, unit, enabled and not terminal
        self.done, self.start, self.shown = 0, time.time(), time.time()

    def update(self, count=1):
        """Add items that are done; other ranks' shares are counted as equal to this one's."""
        count = min(count, self.total - self.done)
        self.done += count
        self.bar.update(count)
        now = time.time()
        if self.lines and self.done and now - self.shown >= 30:
            self.shown, per_second = now, self.done / (now - self.start)
            left = datetime.timedelta(seconds=int((self.total - self.done) / per_second))
            say(f"{self.label}: {self.done} of {self.total} {self.unit}, {per_second:.1f} {self.unit}/s, {left} left")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()


def in_threads(function, items, label, progress, unit):
    """Yield function(item) for every item, in order, from a thread per CPU, with `Progress`; an error ends all threads.

    Threads suffice where codecs do the work, as these release Python's lock, and no process can outlive the run.
    """
    items = list(items)
    with (concurrent.futures.ThreadPoolExecutor(usable_cpus()) as pool,
          Progress(label, len(items), progress, unit) as bar):
        for start in range(0, len(items), 1000):  # all at once, the pool would hold an object for each of millions
            for result in pool.map(function, items[start:start + 1000]):
                yield result
                bar.update()


class EpochLog:
    """Progress lines of an epoch of training, and the averages behind them.

    Losses and gradient norms stay on the device and are read only where a line is printed, so that the GPU's queue
    never runs dry. There one that is not finite is noticed, and ends all ranks.

    Args:
        header: what stands in front of every line
        total: number of steps
        lines: how many lines to print
        scaler: the loss scaler; if it is enabled, it skips steps whose gradient is not finite, and they are counted
        begun: what `state` gave inside the same epoch, to go on from there
    """

    def __init__(self, header, total, lines, scaler=None, begun=None):
        self.header, self.total, self.every = header, total, -(-total // lines)
        self.scaler = scaler if scaler and scaler.is_enabled() else None
        self.unread, self.images = [], 0
        begun = begun or {"steps": 0, "skipped": 0, "lr": 0.0, "ranks": []}
        self.steps, self.skipped, self.lr = begun["steps"], begun["skipped"], begun["lr"]
        sums, self.counts, self.norms = begun["ranks"][rank()] if begun["ranks"] else ({}, {}, [])
        self.sums = {name: torch.tensor(value, dtype=torch.float32) for name, value in sums.items()}
        self.first = self.steps
        self.start = self.clock = time.time()
        self.data_times = 0.0

    def each(self, loader):
        """Yield (step, batch), timing the wait for data."""
        for step, batch in enumerate(loader, self.steps):
            self.data_times += time.time() - self.clock
            self.images += len(batch["name"]) * world_size()
            yield step, batch
            self.clock = time.time()

    def update(self, losses, lr, norm, names):
        """Add a step's {name: scalar tensor}, the norm of the gradient (None before an accumulated step is complete)
        and the names of its images; print a line if it is time."""
        values = {name: torch.as_tensor(value).detach().float().reshape(()) for name, value in losses.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        loss = values["total_loss"]
        self.unread.append((self.steps, names, norm is not None, torch.stack([loss, loss if norm is None else norm])))
        self.steps, self.lr = self.steps + 1, lr
        if self.steps % self.every and self.steps != self.total:
            return
        means, elapsed, steps = self.means(), time.time() - self.start, self.steps - self.first
        values = {**({"grad_norm": self.norms[-1]} if self.norms else {}), **values}
        left = datetime.timedelta(seconds=int(elapsed / steps * (self.total - self.steps)))
        parts = [self.header, f"[{self.steps}/{self.total}]", f"eta: {left}", f"lr: {lr:.6f}",
                 *(f"{name}: {float(values[name]):.4f} ({means[name]:.4f})" for name in means if name in values),
                 f"time: {elapsed / steps:.4f}",
                 f"data: {self.data_times / steps:.4f} ({self.data_times / elapsed:.0%})",
                 f"images/s: {self.images / elapsed:.1f}"]
        if self.scaler:
            scale = self.scaler.get_scale()
            parts.append(f"loss scale: {scale:g}  skipped steps: {self.skipped}")
        if torch.cuda.is_available():
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB")
        say("  ".join(parts))
        if self.scaler and scale < 1:  # the same on all ranks, whose gradients are averaged
            with fail_together():
                raise UserError(f"{self.header} the loss is finite but its gradient is not: {self.skipped} steps were "
                                f"skipped and the loss scale fell to {scale:g}. Look for a root or logarithm of 0 or a "
                                "division by 0 in the loss, or give --if_not_amp or --amp_dtype bfloat16.")

    def speed(self):
        """Return {name: value} of the steps so far: images per second, and the share of waiting for data."""
        elapsed = self.clock - self.start
        return {"images per second": self.images / elapsed, "waiting for data": self.data_times / elapsed
                } if self.images else {}

    def state(self):
        """Return, on all ranks, what an EpochLog needs to go on from here: plain types, for a checkpoint."""
        self.means()  # refuses what is not finite
        ranks = gather(({name: float(value) for name, value in self.sums.items()}, self.counts, self.norms))
        return {"steps": self.steps, "skipped": self.skipped, "lr": self.lr, "ranks": ranks}

    def means(self):
        """Return {name: average so far}; UserError, on all ranks, where a loss or a gradient is not finite."""
        self.read()
        means = {name: value.item() / self.counts[name] for name, value in self.sums.items()}
        with fail_together():
            for name, value in means.items():
                if not np.isfinite(value):
                    raise UserError(f"{self.header} {name} became {value} in the first {counted(self.steps, 'step')}: "
                                    "look for a division by zero in the model.")
        if self.norms:
            means.setdefault("grad_norm", sum(self.norms) / len(self.norms))
        return {"skipped_steps": self.skipped, **means} if self.scaler else means

    def read(self):
        """Read losses and norms of the last steps; UserError, on all ranks, for the first step that isn't finite."""
        unread, self.unread, first = self.unread, [], None
        table = torch.stack([pair for *_, pair in unread]).tolist() if unread else []
        for (step, names, complete, _), (loss, norm) in zip(unread, table):
            if not np.isfinite(loss):
                first = first or (step, "loss", names)
            elif complete and np.isfinite(norm):
                self.norms.append(norm)
            elif complete and self.scaler:
                self.skipped += 1
            elif complete:
                first = first or (step, "gradient", names)
        found = [each for each in gather(first) if each]
        if found:
            step = min(step for step, *_ in found)  # the ranks average their gradients, but each has its own loss
            what = "loss" if any(each[:2] == (step, "loss") for each in found) else "gradient"
            names = [name for each in found if each[:2] == (step, what) for name in each[2]]
            with fail_together():
                raise UserError(f"{self.header} the {what} of step {step} is not finite"
                                f"{', although its loss is' if what == 'gradient' else ''}; this epoch is not saved. "
                                f"Its images: {', '.join(names)}. Lower --lr, try --if_not_amp, or look for a division "
                                "by 0 or a square root of 0 in the model.")


# ---------------------------------------------------------------------------------------------------------------------
# Files


UNFINISHED = ".unfinished-"  # begins the name of a file until all of it is written
held = collections.deque(maxlen=2)  # the files that lock the folders of this run: --output_dir, and --log_dir if given


def open_output(args, model_args):
    """Make and lock the folders of --output_dir and --log_dir, print command and arguments; return both paths.

    Says whether there are results of an earlier test, which are replaced. Raises UserError, on all ranks, where nothing
    can be written, or another run writes there.
    """
    with fail_together():
        output_dir = make_output_dir(args.output_dir, "--output_dir")
        log_dir = output_dir
        if getattr(args, "log_dir", None):
            log_dir = make_output_dir(args.log_dir, "--log_dir")  # two runs' curves in one folder would be mixed, too
        if hasattr(args, "log_dir") and str(log_dir) != as_text(log_dir):
            raise UserError(f"--{'log_dir' if args.log_dir else 'output_dir'} {log_dir}: TensorBoard can't write to a "
                            "folder whose name is not UTF-8. Give another folder.")
    if any((output_dir / name).exists() for name in ("results.csv", "pred")):
        say(f"note: {output_dir} holds results of an earlier run; those of the same name are replaced")
    say(f"command: {visible(shlex.join(sys.argv))}\narguments: {json.dumps({**vars(args), **model_args})}")
    return output_dir, log_dir


def make_output_dir(path, flag):
    """Create a folder, prove that it can be written to, lock it for this process and return it.

    What killed runs left unfinished is removed. UserError naming the flag where that fails or another run has the lock.
    """
    path = Path(path)
    if is_main():
        probes = [path / f"{UNFINISHED}{os.getpid()}{end}" for end in "ab"]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if lock(path, flag):
                remove_unfinished(path)
            try:
                for probe in probes:
                    probe.touch()
                os.replace(*probes)  # as saving does: not every file system can replace a file
            finally:
                for probe in probes:
                    probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {path}: can't be written to ({error.strerror}). "
                            "Give a folder that you may write to.") from None
    return path


def remove_unfinished(path):
    """Remove what killed runs left unfinished in a folder and below it, but for folders with a lock of their own."""
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not os.path.exists(os.path.join(folder, name, ".lock"))]
        for name in files:
            if name.startswith(UNFINISHED):
                os.unlink(os.path.join(folder, name))


def lock(folder, flag):
    """Keep other runs out of a folder until this process ends, however it does; UserError where one is in it.

    Tells whether there is a lock: where the system or the file system has none, a line says so. It is POSIX's, which
    children don't inherit: the worker of a loader that outlives its run would else keep the folder for ever.
    """
    file = open(folder / ".lock", "a+b", buffering=0)
    for attempt in range(31):  # for 3 seconds: the rank that torchrun replaces may be about to end
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                say(f"note: {folder} can't be locked ({error.strerror}), so no run will notice another that writes "
                    "there")
                return False
            time.sleep(0.1)
    else:
        file.seek(0)
        raise UserError(f"{flag} {folder}: another run writes there, {file.read().decode().strip()}. Wait for its "
                        "end, or give another folder.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    held.append(file)
    return True


@contextlib.contextmanager
def writing(path, what="written"):
    """Make a UserError of an error in this block, which writes to `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter, in the course of the former
        while error and not getattr(error, "strerror", None):
            error = error.__context__
        raise UserError(f"{path} can't be {what} ({error.strerror if error else 'writing failed'}). Free some space or "
                        "give another folder.") from None


@contextlib.contextmanager
def replacing(path, lasting=False):
    """Yield a binary file to write to, which then becomes `path`, so that no reader sees half a file.

    Makes the folder. Raises UserError where writing fails, and leaves an earlier file as it was. With `lasting` all is
    on the disk afterwards, also after a power cut.
    """
    path = Path(path)
    temporary = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        temporary = path  # a device or a pipe, such as /dev/stdout
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            if temporary != path:
                os.replace(temporary, path)
        except BaseException:  # Ctrl-C too
            if temporary != path:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise
    if lasting:
        with contextlib.suppress(OSError):  # not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_file(path, content):
    """Write str (UTF-8) or bytes, all or nothing (see `replacing`)."""
    with replacing(path) as file:
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def append_file(path, text):
    """Append str (UTF-8) to a file, all or nothing; makes the folder. UserError where that fails."""
    path, data = Path(path), text.encode("utf-8", "surrogateescape")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            length = file.tell()
            try:
                while data:
                    data = data[file.write(data):]
            except OSError:
                file.truncate(length)
                if not length:
                    path.unlink()
                raise


def remove_file(path):
    """Remove a file if it is there; UserError where that fails."""
    with writing(path, "removed"):
        Path(path).unlink(missing_ok=True)


def json_lines(records):
    """Return dicts as lines of JSON; NaN and infinity, which JSON doesn't know, become null."""
    return "".join(json.dumps({key: None if isinstance(value, float) and not np.isfinite(value) else value
                               for key, value in record.items()}) + "\n" for record in records)


def forget_rows_from(path, epoch):
    """Take the rows of epochs that will be trained again out of log.txt; return the epochs of those that stay.

    A run that was killed may have logged more than it saved, and its last line may be cut off.
    """
    def is_earlier(line):
        try:
            return json.loads(line)["epoch"] < epoch
        except (ValueError, KeyError, TypeError):
            return False

    if is_main() and path.exists():
        with writing(path):
            rows = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        rows = list(filter(is_earlier, rows))
        write_file(path, "".join(rows))
        return [json.loads(row)["epoch"] for row in rows]
    return []


def record(row, log, writer, speed=None):
    """Add an epoch's row to log.txt, and its numbers to TensorBoard's curves, with {name: value} of `speed`, which an
    interrupted run doesn't share with an uninterrupted one."""
    append_file(log, json_lines([row]))
    curves = {name.replace("_", "/", 1): value for name, value in row.items() if name.startswith(("train_", "test_"))}
    curves |= {f"train/{name}": value for name, value in (speed or {}).items()}
    for name, value in curves.items():
        writer.add_scalar(name, value, row["epoch"])
    writer.flush()


def csv_lines(rows, header=True):
    """Return dicts that share their keys as lines of CSV.

    Text that a spreadsheet would take for a formula, and text that begins with an apostrophe, gets one in front: taking
    one off where a cell begins with it gives the text back.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    if header:
        writer.writeheader()
    writer.writerows({key: f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n'")) else value
                      for key, value in row.items()} for row in rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


NO_HYPERPARAMETERS = set("""
    output_dir log_dir device num_workers pin_mem no_progress no_fingerprint dist_timeout world_size local_rank dist_url
    dist_on_itp resume start_epoch log_per_epoch_count save_period save_every_minutes save_trainable_only
    test_batch_size find_unused_parameters
""".split())


@contextlib.contextmanager
def tensorboard(log_dir, fresh=False, purge_step=None):
    """Yield a SummaryWriter on rank 0 and None elsewhere.

    `fresh` removes the events of an earlier run from the folder, `purge_step` hides those from a step on. UserError
    where they can't be written.
    """
    if not is_main():
        yield None
        return
    for earlier in Path(log_dir).glob("events.out.tfevents.*") if fresh else ():
        remove_file(earlier)
    from torch.utils.tensorboard import SummaryWriter  # here, as it takes seconds to import
    former = threading.excepthook
    threading.excepthook = lambda failed: None if is_tensorboards(failed.exc_value) else former(failed)
    try:
        with SummaryWriter(str(log_dir), purge_step=purge_step) as writer:
            yield writer
    except OSError as error:  # the thread that writes hands its exception to the next call
        if not is_tensorboards(error):
            raise
        raise UserError(f"TensorBoard's events in {log_dir} can't be written ({error.strerror}). Free some space or "
                        "give another folder.") from error
    finally:
        threading.excepthook = former


def add_image(writer, tag, pixels, step):
    """Write (H, W, 3) uint8 BGR to TensorBoard, as JPEG: its own add_image, PNG, takes ten times the time and space."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # here, see above
    height, width, channels = pixels.shape
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def add_hyperparameters(writer, flags, metrics):
    """Show a run's {flag: value} on TensorBoard's HParams page, with the newest values of its loss and of some metrics.

    Left out are flags that are not given and those that change no result. SummaryWriter.add_hparams would write this as
    a run of its own.
    """
    from torch.utils.tensorboard.summary import hparams  # here, see above
    flags = {flag: value if isinstance(value, (bool, int, float)) else as_text(visible(value))
             for flag, value in flags.items() if flag not in NO_HYPERPARAMETERS and value is not None}
    curves = [*(f"test/{metric}" for metric in metrics), "train/total_loss"]
    for summary in hparams(flags, dict.fromkeys(curves))[:2]:  # the third would say that the run has ended
        writer.file_writer.add_summary(summary)


def is_tensorboards(error):
    """Tell whether an exception is an OSError out of TensorBoard's own code."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, OSError) and any(module.startswith("tensorboard.") for module in modules)
