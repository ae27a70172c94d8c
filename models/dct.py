"""Frequency parts of an image by the orthonormal DCT-II, for Mesorch and for the `dct_` extractors.

X = D x D^T per channel, D[k, n] = sqrt(2/N) cos(pi k (2n + 1) / 2N), row 0 = 1/sqrt(N); some coefficients are set to 0,
and D^T X D is the image again. Only the first rows of D, those of the few lowest frequencies, are ever needed: with P
these rows, P^T P x is the part of x that varies slowly along the columns, and the rest is x minus that. This takes a
tenth of the operations of full transforms or less, and the rows are cheap enough to be made anew for every batch.
"""
import math

import torch
from torch import nn


def lowest_frequencies(length, count, device):
    """Return the first `count` rows of the orthonormal DCT-II matrix of `length`: (count, length) float32."""
    k = torch.arange(count, device=device)[:, None]
    n = torch.arange(length, device=device)
    # In whole periods of the cosine, so that no large argument is rounded.
    rows = torch.cos(k * (2 * n + 1) % (4 * length) * (math.pi / (2 * length))) * math.sqrt(2 / length)
    rows[:1] *= math.sqrt(0.5)
    return rows


def rescale(x):
    """Rescale each image (C, H, W) of a batch to 0..1, all channels together; what is constant but for rounding to 0.

    The least range, 1e-4, is far under one grey level (0.017 in a normalised image).
    """
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-4)


class HighPass(nn.Module):
    """Drop the int(share * H) x int(share * W) lowest frequencies: (B, C, H, W) -> the same in 0..1, float32."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, image):
        with torch.autocast(image.device.type, enabled=False):
            x = image.float()
            rows, columns = (lowest_frequencies(side, int(self.share * side), x.device) for side in x.shape[2:])
            return rescale(x - rows.T @ (rows @ x @ columns.T) @ columns)


class LowPass(nn.Module):
    """Drop the int(share * H) x int(share * W) highest frequencies: (B, C, H, W) -> the same in 0..1, float32.

    What is left is no square but a cross: every frequency that is low along the rows or along the columns.
    """

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, image):
        with torch.autocast(image.device.type, enabled=False):
            x = image.float()
            rows, columns = (lowest_frequencies(side, side - int(self.share * side), x.device) for side in x.shape[2:])
            slow = rows.T @ (rows @ x)
            return rescale(slow + (x - slow) @ columns.T @ columns)
