"""Finding, loading and saving checkpoints, and what they know about their training."""
import argparse
import copy
import hashlib
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

import ddp
from log import replacing, say
from registry import UserError, counted, is_starting_weights, note_changes, parameters
from safe_load import (FORMS, Damaged, is_number, is_plain, read_checkpoint, refuse_damaged, refuse_malformed, shown,
                       tensors_in)

# ---------------------------------------------------------------------------------------------------------------------
# Files


def checkpoint_epoch(path):
    """Return n of `checkpoint-<n>.pth`, or None for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)\.pth", Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(folder):
    """Return the checkpoint-<n>.pth files of a folder in order of n."""
    return sorted((p for p in Path(folder).iterdir() if checkpoint_epoch(p) is not None), key=checkpoint_epoch)


def list_resumable(folder):
    """Return a folder's checkpoints and that inside an epoch, checkpoint-<n>-unfinished.pth; the newest is the last."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)(-unfinished)?\.pth", p.name), p) for p in Path(folder).iterdir()]
    return [p for *_, p in sorted((int(match[1]), not match[2], p) for match, p in matches if match)]


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


def load_checkpoint(path, flag, mmap=True):
    """Return a checkpoint, a dict, as `read_checkpoint` reads it; UserError where it is none."""
    content = read_checkpoint(path, flag, mmap)
    if not isinstance(content, dict) or not content:
        state_dict_of({}, path, flag)  # refuses
    refuse_malformed(content, f"{flag} {path}", ("best", "frozen_hashes"))
    return content


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

    The word auto means the newest of `output_dir` that is not damaged, and stands for any other where torchrun has
    started the processes again (--max_restarts). An earlier run's checkpoints there are neither overwritten nor mixed
    in: UserError.
    """
    earlier = list_resumable(output_dir) if output_dir.exists() else []  # rank 0 alone has made it
    if earlier and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        resume = "auto"
    if resume == "auto":
        if not earlier:
            say(f"--resume auto: no checkpoint in {output_dir}, so training starts at the beginning")
        with ddp.fail_together():
            path = newest_whole(earlier) if earlier else None
        refuse_different(path and path.name, "--resume auto")
        return path
    with ddp.fail_together():
        found = list_resumable(resume) if resume and Path(resume).is_dir() else []
        path = (found or find_checkpoints(resume, "--resume"))[-1] if resume else None
    refuse_different(path and path.name, f"--resume {resume}")
    with ddp.fail_together():
        if earlier and path and path.parent.resolve() == Path(output_dir).resolve():
            if path.name != earlier[-1].name:
                raise UserError(f"--resume {path}: {output_dir} holds later checkpoints up to {earlier[-1].name}, "
                                "which would get mixed with new ones: move them away, or give another --output_dir.")
        elif earlier:
            raise UserError(f"--output_dir {output_dir} holds {counted(len(earlier), 'checkpoint')} of an earlier "
                            "run: give --resume auto to go on with it, or another --output_dir.")
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


def resume_training(path, model, optimizer, scaler, args, model_args, metric, order):
    """Load a checkpoint into model, optimizer and scaler, if one is given, and decide where training starts.

    Args:
        path: checkpoint file or None (see `find_resume`)
        args, model_args: this run's flags, which override those in the checkpoint; changes are said
        metric: name of the metric that decides which checkpoint is best
        order: {what: value} of all that the order of the images depends on

    Returns:
        (epoch, best, begun, row): the first epoch to train, {"epoch", "value", "metric", "folder"} of the best so far,
        `EpochLog.state` where the checkpoint is of inside this epoch, and log.txt's row of the epoch before; or None
    """
    begun, row = None, None
    epoch, best = args.start_epoch, {"epoch": None, "value": -math.inf, "metric": metric, "folder": args.output_dir}
    if path:
        with ddp.fail_together():
            content = load_weights(model, path, "--resume", mmap=False)
            if "optimizer" in content:
                refuse_damaged(tensors_in(content["optimizer"]), path, "--resume")
                refuse_malformed(content, f"--resume {path}", FORMS)
                load_optimizer(optimizer, scaler, content, path)
        if "optimizer" in content:
            begun, row = content.get("begun"), content.get("row")
            epoch = int(content["epoch"]) + (not begun) if "epoch" in content else epoch
            if epoch >= args.epochs and args.resume == "auto":  # a script may start it again and again
                say(f"finished: {path} is of epoch {epoch - 1} and --epochs is {args.epochs}; raise --epochs to go on")
                ddp.cleanup()
                sys.exit(0)
            with ddp.fail_together():
                if begun:
                    refuse_other_order(path, epoch, content.get("order", {}), order)
            free = ("resume", "start_epoch", "output_dir", "log_dir", "num_workers", "no_progress", "world_size",
                    "local_rank", "dist_url", "dist_on_itp")  # of no consequence for the result
            note_changes(args_of(content), path.name, {key: value for key, value in {**vars(args), **model_args}.items()
                                                       if key not in free})
            best = stored_best(content, path, best)
            inside = f" after step {begun['steps']}" if begun else ""
            say(f"resumed from {path}: epoch {epoch} {'goes on' if begun else 'comes next'}{inside}")
        else:
            say(f"weights from {path}; it holds no optimizer, so training starts at epoch {epoch}")
    with ddp.fail_together():
        if epoch >= args.epochs:
            raise UserError(f"nothing left to train: the next epoch is {epoch} and --epochs is {args.epochs}; raise "
                            "--epochs.")
    return epoch, best, begun, row


def refuse_other_order(path, epoch, stored, order):
    """Raise UserError where other images would follow a checkpoint inside an epoch than in its own run."""
    changed = [f"{what} {shown(stored[what])} instead of {value}" for what, value in order.items()
               if what in stored and stored[what] != value]  # a fingerprint may not be there
    if changed:
        raise UserError(f"--resume {path} is of inside epoch {epoch} and had {', '.join(changed)}, so other images "
                        "would follow: give the same flags, dataset and number of processes, or move the file away to "
                        "go on from the checkpoint before it.")


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
