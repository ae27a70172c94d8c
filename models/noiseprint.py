"""Noiseprint++, the learned noise residual that TruFor localises in.

From TruFor: Leveraging All-Round Clues for Trustworthy Image Forgery Detection and Localization. Guillaro, Cozzolino,
Sud, Dufour, Verdoliva. CVPR 2023. https://arxiv.org/abs/2212.10957    Code: https://github.com/grip-unina/TruFor

A flat network of 17 convolutions turns an image into a noise map, in which camera model and editing history show and
the content does not. It was trained apart (by contrastive learning on pairs of patches) and stays frozen. Input: RGB
in [0, 1), levels divided by 256.
"""
import contextlib
import math

import torch
from torch import nn

from .weights import load_part, read_weights

CHANNELS = 64
NUM_CONVS = 17


@contextlib.contextmanager
def without_tf32():
    """Let cuDNN's convolutions compute in float32, where their default is TF32."""
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Noiseprint(nn.Sequential):
    """Noiseprint++: (B, 3, H, W) -> (B, 1, H, W) float32, without gradient.

    With the released weights the norms subtract means in the thousands and leave spreads near 1: TF32 would change the
    result by 10 %, bfloat16 by 66 %, so this always computes in float32.
    """

    def __init__(self):
        layers = [nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(NUM_CONVS - 2):
            layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS),
                       nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(CHANNELS, 1, 3, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * CHANNELS)))

    @torch.no_grad()
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False), without_tf32():
            return super().forward(x.float())

    def load(self, path, flag):
        """Load weights from a file, the authors' ({"network": state dict}) or a bare state dict; `flag` names it."""
        load_part(self.state_dict(), read_weights(path, flag), f"{flag} {path}", optional=("num_batches_tracked",))
