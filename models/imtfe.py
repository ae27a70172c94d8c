"""IMTFE, the image manipulation trace feature extractor of ManTra-Net, which SPAN uses too.

Wu, AbdAlmageed, Natarajan, CVPR 2019 (see mantranet.py). Free, SRM and Bayar filters, then twelve 3x3 convolutions at
full resolution, give each pixel a vector of unit length. Public weights: `IMTFEv4.pt` of the community's PyTorch port
ManTraNet-pytorch, which has these names (academic or non-commercial use only).
"""
import torch
import torch.nn.functional as F
from torch import nn

from data import denormalise

from .filters import WholeBayarConv, srm_bank

WIDTHS = (16, 32, 64, 64, 128, 128, 128, *6 * (256,))  # channels before and after the twelve convolutions


def mirror(x):
    """Repeat the two outer rows and columns, mirrored, edge included: (B, C, H, W), H, W >= 2 -> (B, C, H+4, W+4)."""
    for dim in (2, 3):
        first, last = x.narrow(dim, 0, 2).flip(dim), x.narrow(dim, x.shape[dim] - 2, 2).flip(dim)
        x = torch.cat((first, x, last), dim)
    return x


class IMTFE(nn.Module):
    """Image (B, 3, H, W), ImageNet-normalised -> features (B, 256, H, W) float32 of unit length at each pixel.

    Args:
        residual: add its input to each convolution that keeps the width (IMDL-BenCo's SPAN)
    """

    def __init__(self, residual=False):
        super().__init__()
        self.residual = residual
        self.init_conv = nn.Conv2d(3, 4, 5, bias=False)
        self.SRMConv2D = nn.Conv2d(3, 9, 5, bias=False).requires_grad_(False)
        self.SRMConv2D.weight.copy_(srm_bank())
        self.BayarConv2D = WholeBayarConv(3, 3)
        layers = []
        for widths in zip(WIDTHS, WIDTHS[1:]):
            layers += [nn.Conv2d(*widths, 3, padding=1, padding_mode="replicate"), nn.ReLU(inplace=True)]
        self.middle_and_last_block = nn.ModuleList(layers[:-1])

    def forward(self, image):
        with torch.autocast(image.device.type, enabled=False):  # the filters look for traces of one grey level
            x = mirror(2 * denormalise(image) - 1)
            x = torch.cat([conv(x) for conv in (self.init_conv, self.SRMConv2D, self.BayarConv2D)], dim=1).relu()
        for layer in self.middle_and_last_block:
            y = layer(x)
            adds = self.residual and isinstance(layer, nn.Conv2d) and y.shape == x.shape
            x = y + x if adds else y
        return F.normalize(x.float(), dim=1)
