"""Parts of a plain Vision Transformer that IML_ViT and ObjectFormer share."""
import torch.nn as nn
import torch.nn.functional as F

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
