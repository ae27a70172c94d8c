"""Parts of Vision Transformers that several models share."""
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


def to_windows(x, side):
    """Cut (B, h, w, C) into windows (B*rows*columns, side, side, C); zeros fill up the last row and column."""
    _, h, w, dim = x.shape
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, side, columns, side, C)
    return x.transpose(2, 3).reshape(-1, side, side, dim)


def from_windows(windows, h, w):
    """Undo to_windows: windows (B*rows*columns, side, side, C) -> (B, h, w, C), without the zeros."""
    side = windows.shape[1]
    x = windows.unflatten(0, (-1, -(-h // side), -(-w // side))).transpose(2, 3)  # (B, rows, side, columns, side, C)
    return x.flatten(3, 4).flatten(1, 2)[:, :h, :w]
