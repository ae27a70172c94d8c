"""Mesorch: Mesoscopic Insights: Orchestrating Multi-scale & Hybrid Architecture for Image Manipulation Localization.

Xuekang Zhu, Xiaochen Ma, Lei Su, Zhuohang Jiang, Bo Du, Xiwen Wang, Zeyu Lei, Wentao Feng, Chi-Man Pun, Jizhe Zhou.
AAAI 2025, https://arxiv.org/abs/2412.13753    Original code and weights: https://github.com/scu-zjz/Mesorch

A ConvNeXt-Tiny sees the image with its high frequencies (local traces), a Mix-Transformer MiT-B3 the image with its low
frequencies (objects). Each of their eight maps gives a mask; a small gate on all three inputs weights them per pixel.

Input: RGB, ImageNet-normalised; published at 512x512 with --if_resizing. Any other size works: the model pads to
multiples of 32, repeating the last pixel, and crops.
Licence: this file is MIT, written from the paper. Start weights have their own terms: those of ConvNeXt come from timm
(Apache-2.0), those of SegFormer, mit_b3.pth, are for non-commercial use (NVIDIA).

Kept from the published implementation because its checkpoints need it:
- the "low" frequencies are a cross: all those that are low along one of both axes (models/dct.py);
- the first convolutions have no bias, although the weights they start from have one;
- nothing stands between the transposed convolutions, nor between the convolutions of the gate.
Differences from it, none of which changes a number:
- the mask has the size of the image, where upstream always gives 512x512;
- only the few lowest rows of the DCT are computed, in float32; an image of one colour gives no NaN;
- convolutions with nothing between them are folded into one where that is exact; attention is fused;
- the classifier of ConvNeXt (`head`) is in the state dict but frozen, so DDP needs no --find_unused_parameters;
- the parameter if_predict_label (without effect) and the second name of the same loss, `predict_maks_loss`, are gone.
The image-level score (`pred_label`) is None, as published.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from registry import MODELS

from .dct import HighPass, LowPass
from .mit import WIDTHS, MiT, init_weights
from .weights import add_channels, timm_model

CONVNEXT = (96, 192, 384, 768)  # channels of c1..c4, at H/4, H/8, H/16, H/32
STRIDE = 32


def folded(conv, *pointwise):
    """Return weight and bias of one convolution that does what `conv` and the 1x1 convolutions after it do.

    `conv` may be transposed. The products stay in float32 under autocast, so that weights are rounded once.
    """
    out = 1 if conv.transposed else 0  # the dimension of the output channels
    weight, bias = conv.weight, conv.bias
    with torch.autocast(weight.device.type, enabled=False):
        for layer in pointwise:
            matrix = layer.weight.flatten(1)
            weight = torch.tensordot(matrix, weight, dims=([1], [out])).movedim(0, out)
            bias = F.linear(bias, matrix, layer.bias)
    return weight, bias


class Upsample(nn.Module):
    """Enlarge all maps to H/4 x W/4, doubling by transposed convolutions, and reduce each to one map of logits."""

    def __init__(self):
        super().__init__()
        for stream, channels in (("c", CONVNEXT), ("s", WIDTHS)):
            for level in (2, 3, 4):
                steps = [nn.ConvTranspose2d(channels[i], channels[i - 1], 4, 2, 1) for i in range(level - 1, 0, -1)]
                self.add_module(f"upsample{stream}{level}", nn.Sequential(*steps) if level > 2 else steps[0])

    def path(self, name):
        """Return the list of transposed convolutions for the map `name`, c1..s4; c1 and s1 need none."""
        if name in ("c1", "s1"):
            return []
        return [x for x in self.get_submodule(f"upsample{name}").modules() if isinstance(x, nn.ConvTranspose2d)]

    def forward(self, maps, heads):
        """Maps c1..c4, s1..s4 and the 1x1 convolutions after their enlargement -> logits (B, 8, H/4, W/4)."""
        logits = []
        for name, x, head in zip(("c1", "c2", "c3", "c4", "s1", "s2", "s3", "s4"), maps, heads):
            steps = self.path(name)
            for step in steps[:-1]:
                x = step(x)
            # The last enlargement is done on one channel instead of 96 or 64.
            logits.append(F.conv_transpose2d(x, *folded(steps[-1], head), stride=2, padding=1) if steps else head(x))
        return torch.cat(logits, 1)


class Gate(nn.Module):
    """Weights of the eight maps per pixel: (B, 9, H, W) -> (B, 8, H/4, W/4), float32, sum 1 over the maps."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(9, 192, 7, 2, 3)
        self.invert = nn.Sequential(LayerNorm2d(192), nn.Conv2d(192, 192, 3, padding=1), nn.Conv2d(192, 768, 1),
                                    nn.Conv2d(768, 192, 1))
        self.conv2 = nn.Conv2d(192, 8, 7, 2, 3)

    def forward(self, x):
        x = self.conv1(x)  # (B, 192, H/2, W/2)
        norm, *convs = self.invert
        x = x + F.gelu(F.conv2d(norm(x), *folded(*convs), padding=1))
        return self.conv2(x).float().softmax(1)


@MODELS.register_module()
class Mesorch(nn.Module):
    """Mesorch.

    Args:
        seg_pretrain_path: file of MiT-B3 weights for the Mix-Transformer (mit_b3.pth of SegFormer)
        conv_pretrain: start ConvNeXt from ImageNet weights, which timm downloads
    """

    def __init__(self, seg_pretrain_path: Optional[str] = None, conv_pretrain: bool = False):
        super().__init__()
        self.high_dct = HighPass(0.05)
        self.low_dct = LowPass(0.95)
        self.convnext = timm_model("convnext_tiny.in12k_ft_in1k", conv_pretrain, "--conv_pretrain",
                                   "give --no-conv_pretrain")
        self.convnext.head.requires_grad_(False)
        self.convnext.stem[0] = add_channels(self.convnext.stem[0], 3)
        self.segformer = MiT("b3").apply(init_weights)
        if seg_pretrain_path:
            self.segformer.load_imagenet(seg_pretrain_path, "--seg_pretrain_path")
        self.segformer.patch_embed1.proj = add_channels(self.segformer.patch_embed1.proj, 3)
        self.upsample = Upsample()
        self.inverse = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in 4 * CONVNEXT[:1] + 4 * WIDTHS[:1])
        self.gate = Gate()

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, ImageNet-normalised; mask: (B, 1, H, W) of 0 and 1. Returns a dict:
        backward_loss: binary cross-entropy; pred_mask: (B, 1, H, W) float32 probabilities; pred_label: None;
        visual_loss: predict_loss; visual_image: pred_mask.
        """
        height, width = image.shape[2:]
        x = torch.cat((image, self.high_dct(image), self.low_dct(image)), 1)  # (B, 9, H, W)
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        image, high, low = x.split(3, 1)
        maps = [*self.convnext.forward_intermediates(torch.cat((image, high), 1), intermediates_only=True),
                *self.segformer(torch.cat((image, low), 1))]
        logits = (self.gate(x) * self.upsample(maps, self.inverse)).sum(1, keepdim=True)  # (B, 1, H/4, W/4)
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)[..., :height, :width]

        loss = F.binary_cross_entropy_with_logits(logits, mask.float())
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}
