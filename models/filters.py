"""Forensic filters for any model: fixed Sobel and SRM filters and the constrained convolution of Bayar and Stamm.

Such filters suppress the content of an image, so that the traces of an edit (edges, noise) stand out.
"""
import torch
import torch.nn.functional as F
from torch import nn

SOBEL_X = ((1, 0, -1), (2, 0, -2), (1, 0, -1))
SOBEL_Y = ((1, 2, 1), (0, 0, 0), (-1, -2, -1))
SRM = (  # three high-pass kernels of the steganalysis rich model (Fridrich and Kodovsky 2012) and their divisors
    (((0, 0, 0, 0, 0), (0, -1, 2, -1, 0), (0, 2, -4, 2, 0), (0, -1, 2, -1, 0), (0, 0, 0, 0, 0)), 4),
    (((-1, 2, -2, 2, -1), (2, -6, 8, -6, 2), (-2, 8, -12, 8, -2), (2, -6, 8, -6, 2), (-1, 2, -2, 2, -1)), 12),
    (((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, -2, 1, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)), 2),
)


def srm_bank():
    """Return convolution weights (9, 3, 5, 5): filter 3k + c applies SRM kernel k to colour c alone."""
    kernels = torch.stack([torch.tensor(rows) / divisor for rows, divisor in SRM])
    return torch.einsum("kyx,cd->kcdyx", kernels, torch.eye(3)).flatten(0, 1)


class SobelConv(nn.Module):
    """One fixed 3x3 Sobel kernel over the sum of all channels, zero padding 1: (B, C, H, W) -> (B, 1, H, W).

    Published checkpoints hold the kernel once per input channel: the buffer `weight` (1, C, 3, 3). As these copies are
    equal, the channels can be summed before the convolution: `forward` takes that sum (B, 1, H, W), which both
    directions share. Its values reach thousands, so call it in float32.

    Args:
        channels: number C of channels that are summed
        kernel: SOBEL_X or SOBEL_Y
    """

    def __init__(self, channels, kernel):
        super().__init__()
        self.register_buffer("weight", torch.tensor(kernel, dtype=torch.float32).repeat(1, channels, 1, 1))

    def forward(self, channel_sum):
        return F.conv2d(channel_sum, self.weight[:, :1], padding=1)  # (B, 1, H, W)


def constrained(parameter, constraint, training):
    """Return constraint(parameter) with the gradient of `parameter`, as in the published trainings.

    There the optimizer steps freely from constrained weights, and the next forward constrains them again. So the
    constraint is not differentiated, and in training mode the parameter itself is overwritten by the constrained
    weights; eval mode leaves it as it is.
    """
    with torch.no_grad():
        value = constraint(parameter)
        if training:
            parameter.copy_(value)
    return value + (parameter - parameter.detach())  # the bracket is exactly 0


class BayarConv(nn.Module):
    """Constrained convolution (Bayar and Stamm 2018), 5x5, zero padding 2, no bias: (B, in, H, W) -> (B, out, H, W).

    Each filter predicts a pixel from its 24 neighbours and subtracts the pixel: the neighbours' weights sum to 1, the
    centre is -1. `kernel` (in, out, 24) holds the neighbours' weights row by row; see `constrained`. Stays float32
    under autocast: rounded weights would not sum to 0.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(in_channels, out_channels, 24))

    def forward(self, x):
        neighbours = constrained(self.kernel, lambda kernel: kernel / kernel.sum(dim=2, keepdim=True), self.training)
        centre = neighbours.new_full((*neighbours.shape[:2], 1), -1.0)
        weight = torch.cat((neighbours[..., :12], centre, neighbours[..., 12:]), dim=2).transpose(0, 1)  # (out, in, 25)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), weight.unflatten(2, (5, 5)), padding=2)


class WholeBayarConv(nn.Conv2d):
    """BayarConv with its `weight` (out, in, 5, 5) stored whole, with the centres. Call it in float32.

    The published gradient is that of the constrained weight: that of the centre is not 0.
    """

    def __init__(self, in_channels, out_channels, padding=0):
        super().__init__(in_channels, out_channels, 5, padding=padding, bias=False)
        nn.init.uniform_(self.weight)  # of one sign: where a sum is near 0, the division makes the weights huge

    @staticmethod
    def constraint(weight):
        weight = weight.clone()
        weight[..., 2, 2] = 0
        total = weight.sum((2, 3), keepdim=True)
        weight /= torch.where(total.abs() < 1e-6, 1e-6, total)
        weight[..., 2, 2] = -1
        return weight

    def forward(self, x):
        weight = constrained(self.weight, self.constraint, self.training)
        return F.conv2d(x, weight, padding=self.padding)
