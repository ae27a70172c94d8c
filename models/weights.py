"""The weights that training starts from: those in a file, or those that timm downloads."""
import torch
from torch import nn

from checkpoint import load_checkpoint, refuse_other_type, state_dict_of
from log import say
from registry import UserError


def timm_model(name, pretrained, flag, instead, **options):
    """Return timm.create_model(name, pretrained, **options); timm downloads pretrained weights once and caches them.

    Weights in the Hugging Face cache are taken from there, without a network. Raises UserError where the weights can't
    be had: `flag` is the flag that asked for them, `instead` what the user can do without them.
    """
    import timm  # here, because it takes seconds

    try:
        if pretrained:
            options["pretrained_cfg_overlay"] = {"file": cached_weights(timm.models.get_pretrained_cfg(name))}
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm and the hub's client raise many types
        if not pretrained:
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{flag}: timm can't load its weights {name} ({type(error).__name__}: {reason}). Run once with "
                        "network access and without HF_HUB_OFFLINE, copy the Hugging Face cache (HF_HOME) of such a "
                        f"run, or {instead}.") from error
    if pretrained:
        say(f"{flag}: starting from timm's weights {name}")
    return model


def cached_weights(config):
    """Return the file of timm's weights in the Hugging Face cache, or None if it has to be downloaded.

    Raises an exception at once where the hub can't be reached: its client would try again for a minute.
    """
    import huggingface_hub  # here, because timm brings it, which takes seconds

    if not config or not config.hf_hub_id:
        return None
    for file in filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
        path = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(path, str):
            return path
    huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    return None


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
        refuse_other_type(state[name], own[name], f"{source}: {name}")
        own[name].copy_(state[name])


def prepend_model(state_dict, prefix):
    """Rename a state dict's `<prefix>x` to `<prefix>model.x`: files of authors whose network IMDL-BenCo has wrapped."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[f"{prefix}model.{name[len(prefix):]}"] = state_dict.pop(name)


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
