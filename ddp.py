"""Processes: joining torchrun's process group, exchange between ranks, the DDP wrapper and seeds.

Without torchrun's environment every function here works for the one process there is.
"""
import contextlib
import datetime
import functools
import os
import random
import re
import socket
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import signals
from registry import UserError, launched_as, show

patient = None  # the process group whose members may wait for hours
store = None  # torchrun's, where ranks leave word


def init(name, minutes=10):
    """Join torchrun's process group, if there is one, and return this process's torch.device.

    `name` is `--device`: cuda falls back to the CPU with one line where there is no GPU; a numbered GPU that isn't
    there is an error. A rank that doesn't answer for so many `minutes` ends the run (`lost_contact`).
    """
    processes = launched_as()[1]
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: give cuda, cuda:<number> or cpu.")
    if number and processes > 1:
        raise UserError(f"--device {name}: several processes can't share one GPU. Give --device cuda.")
    if number and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that torch can use. Give --device cpu.")
    device = torch.device("cpu")
    if kind == "cuda" and torch.cuda.is_available():
        index, count = int(number or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if processes > 1 and count == 1:
            index = 0  # a scheduler may show each process its own GPU alone; `meet` refuses a shared one
        if index >= count:
            raise UserError(f"--device {name}: there is no GPU {index}, this machine has {count}. Start as many "
                            "processes as there are GPUs, or give a lower number.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # the sizes of images don't change
        # What isn't in mixed precision is meant to be float32; for products NVIDIA's containers turn TF32 on.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if "RANK" in os.environ:
        meet(device, datetime.timedelta(minutes=minutes))
    if name == "cuda" and device.type == "cpu" and is_main():
        show("no CUDA device: running on the CPU")
    return device


def meet(device, timeout):
    """Join the process group: gloo for tensors on the CPU and what `gather` exchanges, NCCL for those on GPUs.

    UserError where the processes can't meet, some have a GPU and others none, or two share one.
    """
    global patient, store
    try:
        shared, number, processes = next(dist.rendezvous("env://"))
        # After --max_restarts torchrun gives the same store, in which the addresses of dead processes still stand.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout,
                                store=store, rank=number, world_size=processes)
        # The first reading of a large dataset happens on rank 0 alone, while the others wait in `gather`: hence hours.
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes can't meet at MASTER_ADDR:MASTER_PORT, {place} ({str(error).splitlines()[0]}). "
                        "Give torchrun another --master_port, or the address of the first machine.") from error
    chip = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    places = gather((socket.gethostname(), chip))
    with fail_together():
        refuse_unequal(places)


def refuse_unequal(places):
    """Raise UserError, on all ranks alike, for their [(machine, its GPU or None)] where some have no GPU, or share."""
    without = [i for i, (_, chip) in enumerate(places) if not chip]
    if without and len(without) < len(places):
        raise UserError(f"process {without[0]} on {places[without[0]][0]} finds no GPU that torch can use, but others "
                        "have one. Look at nvidia-smi there, or give --device cpu.")
    for i, place in enumerate(places):
        if not without and place in places[:i]:
            raise UserError(f"processes {places.index(place)} and {i} on {place[0]} would share one GPU. Start as many "
                            "processes as there are GPUs, and let the scheduler show all of them or one to each.")


def rank():
    """Return the index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main():
    """Tell whether this process prints and writes."""
    return rank() == 0


def gather(value, patiently=False):
    """Return the list of all ranks' picklable values, on every rank.

    `patiently` waits for hours instead of `--dist_timeout`, where one rank may have more to do than the others.
    """
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=patient if patiently else None)
    return values


def lost_contact(error):
    """Return what to say of an exception in an exchange between ranks; "" where another rank says it, and None for
    any other exception.

    Waits for torchrun to end this process, so that the first to fail is the one that torchrun names.
    """
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    try:
        store.set(f"waited {rank()}", "")
        time.sleep(10)
        waited = [number for number in range(world_size()) if store.check([f"waited {number}"])]
    except dist.DistError:  # the store has gone with its process
        waited = [rank()]
    if "imed out" not in str(error):
        return ("another process of this run has ended; what it printed, or torchrun's summary on its machine, tells "
                "why") if int(os.environ.get("LOCAL_RANK", 0)) == 0 else ""
    silent = ", ".join(str(number) for number in range(world_size()) if number not in waited)
    return (f"no answer from rank {silent or 'unknown'} for longer than --dist_timeout: it hangs, was stopped, or is "
            "cut off from the network") if rank() == waited[0] else ""


class Agreement:
    """Brings what one rank wants to all ranks at the same step.

    They exchange it about every two seconds, so that it costs nothing, and at an epoch's last step.
    """

    def __init__(self, minutes):
        """`minutes` between two checkpoints inside an epoch, by rank 0's clock; None = none."""
        self.minutes, self.saved = minutes, time.monotonic()
        self.clock, self.steps, self.left = time.monotonic(), 1, 1

    def wish(self, last):
        """Return, on all ranks alike, the number of the signal that ends the run, 1 where a checkpoint is due, else 0.

        Called after every step of the weights; `last` tells that it is an epoch's last.
        """
        now, wish = time.monotonic(), signals.asked
        if not wish and is_main() and self.minutes is not None and now - self.saved >= 60 * self.minutes:
            wish = 1
        if world_size() > 1:
            self.left -= 1
            if self.left > 0 and not last:
                return 0
            per_step = (now - self.clock) / (self.steps - self.left)
            shared = torch.tensor([wish, min(max(int(2 / max(per_step, 1e-3)), 1), 2 * self.steps) if is_main() else 0])
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            wish, self.steps = shared.tolist()
            self.left, self.clock = self.steps, time.monotonic()
        if wish:
            self.saved = now
        return wish


@contextlib.contextmanager
def fail_together(patiently=False):
    """Make a UserError that any rank meets in this block end all ranks, which would wait for that rank in vain.

    Only the first of the ranks that met one raises it, so that it is printed once; the others exit. No other exchange
    between ranks may stand in the block. `patiently`: see `gather`.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    ranks = [number for number, other in enumerate(gather(mistake, patiently)) if other]
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
    """Leave the process group, all ranks at once: rank 0 may still write while the others are done."""
    global patient, store
    if dist.is_available() and dist.is_initialized():
        gather(None)
        dist.destroy_process_group()
        patient = store = None  # their threads must not outlive the interpreter


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


def mixed_precision(args, device):
    """Return (context, scales): what a forward runs in, by --amp_dtype and --if_not_amp, and whether its loss needs a
    scaler. Only CUDA mixes."""
    use = device.type == "cuda" and not args.if_not_amp
    dtype = getattr(torch, args.amp_dtype)
    return functools.partial(torch.autocast, device.type, dtype, use), use and dtype == torch.float16


def share_buffers(model):
    """Give every rank rank 0's buffers, which checkpoints hold.

    Where batch norm isn't synchronised, its statistics differ between the ranks.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            whole = buffer.contiguous()  # NCCL takes no other
            dist.broadcast(whole, 0)
            buffer.copy_(whole)


def seed_everything(*numbers):
    """Seed Python, NumPy and torch from whole numbers, such as (seed, epoch, step), and the rank.

    From one number, before a model is built, the same on all ranks: then they build the same. The order of images and
    the augmentations have seeds of their own (data.py).
    """
    state = int(np.random.SeedSequence([*numbers, rank() if len(numbers) > 1 else 0]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
