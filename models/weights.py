"""The weights that training starts from: those in a file, or those that timm downloads."""
import torch
from torch import nn

from checkpoint import load_checkpoint, state_dict_of
from log import say
from registry import UserError


def timm_model(name, pretrained, flag, instead, **options):
    """Return timm.create_model(name, pretrained, **options); timm downloads pretrained weights once and caches them.

    Raises UserError where it can't get the weights: `flag` is the flag that asked for them, `instead` what the user can
    do without them.
    """
    import timm  # here, because it takes seconds

    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm and the hub's client raise many types
        if not pretrained:
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{flag}: timm can't load its weights {name} ({type(error).__name__}: {reason}). Run once with "
                        f"network access, copy the Hugging Face cache (HF_HOME) of such a run, or {instead}."
                        ) from error
    if pretrained:
        say(f"{flag}: starting from timm's weights {name}")
    return model


def read_weights(path, flag, timm_name=None):
    """Return the state dict in the file `path`, or of timm's model `timm_name` where `path` is the word timm."""
    if timm_name and path == "timm":
        return timm_model(timm_name, True, f"{flag} timm", "give a file").state_dict()
    state = state_dict_of(load_checkpoint(path, flag), path, flag)
    say(f"{flag}: starting from {path}")
    return state


def load_part(own, state, source, optional=()):
    """Copy tensors from `state` into those of the same names in `own`, a module's state dict or a part of one.

    Whatever else `state` holds is ignored; names that end in one of `optional` (a tuple) may be missing from it. Raises
    UserError, beginning with `source` (flag and file), where a tensor is missing or has another shape.
    """
    missing = [name for name in own if name not in state and not name.endswith(optional)]
    if missing:
        raise UserError(f"{source}: {len(missing)} of {len(own)} tensors are missing, first {missing[0]}. "
                        "Give weights of the network that --help names.")
    for name in [name for name in own if name in state]:
        if state[name].shape != own[name].shape:
            raise UserError(f"{source}: {name} has shape {list(state[name].shape)} where the model needs "
                            f"{list(own[name].shape)}. Give weights of this size, or the model's flags that fit them.")
        own[name].copy_(state[name])


def add_channels(conv, count):
    """Return `conv` for `count` more input channels, with random weights for these, and without a bias, as published.

    The new weights are Kaiming-normal, as if the new channels were all.
    """
    old = conv.in_channels
    new = nn.Conv2d(old + count, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    with torch.no_grad():
        new.weight[:, :old] = conv.weight
        nn.init.kaiming_normal_(new.weight[:, old:])
    return new
