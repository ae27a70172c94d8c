"""Parts of a plain Vision Transformer that IML_ViT and ObjectFormer share, and the copying of pretrained weights."""
import torch.nn as nn
import torch.nn.functional as F

from registry import UserError

PATCH = 16  # pixels per token side, as in the ViT-B/16 weights that both models start from
HEADS = 12


class Mlp(nn.Module):
    """The two-layer perceptron of a ViT block: C -> 4C, exact GELU, 4C -> C."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def resize_positions(positions, size, antialias=False):
    """Resample a square grid of position embeddings (1, n*n, C), row-major, to `size` = (h, w); returns (1, h*w, C)."""
    side = int(positions.shape[1] ** 0.5)
    if size == (side, side):
        return positions
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=antialias)
    return grid.flatten(2).transpose(1, 2)


def load_part(module, state, source, absent_ok=()):
    """Copy the tensors that `module` has out of `state`; others in `state` are ignored.

    `source` says flag and file in the errors; `absent_ok` holds endings of names that `state` may lack. Raises
    UserError that names what is missing or has another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(tuple(absent_ok))]
    if missing:
        raise UserError(f"{source}: lacks {len(missing)} of the {len(own)} tensors needed, {missing[0]} first; "
                        "give weights of a ViT-B/16 with the usual names.")
    found = {name: state[name] for name in own if name in state}
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise UserError(f"{source}: {name} has the shape {list(value.shape)}, the model needs "
                            f"{list(own[name].shape)}; give weights of a ViT-B/16.")
    module.load_state_dict(found, strict=False)
