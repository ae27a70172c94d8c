"""SPAN: Spatial Pyramid Attention Network for Image Manipulation Localization.

Xuefeng Hu, Zhihan Zhang, Zhenye Jiang, Syomantak Chaudhuri, Zhenheng Yang, Ram Nevatia, ECCV 2020.
Paper: https://arxiv.org/abs/2009.00726    Original code: https://github.com/ZhiHanZ/IRIS0-SPAN (Keras)

IMTFE (imtfe.py), ManTra-Net's extractor, gives each pixel a feature vector. In five attention layers a pixel looks at
its nine neighbours at distances 1, 3, 9, 27 and 81; four convolutions make the mask.

Input: RGB, ImageNet-normalised, of any size; published at 224 x 224 (--if_resizing --image_size 224).
Licence: this file is MIT, written from the paper. The authors' repository states no licence. The extractor's weights
`IMTFEv4.pt` (ManTraNet-pytorch) are for academic or non-commercial use only.

Kept from IMDL-BenCo's implementation by flags:
- `residual` (default): the extractor adds the input to each convolution that keeps the width. The authors' does not,
  and IMTFEv4.pt was trained without: with these weights --no-residual is what they mean;
- `attention imdlbenco`: it reshapes where it should transpose, so that pixels, channels and neighbours get mixed up.
Differences from it:
- its four last convolutions (`last_layer`) are drawn at random in every forward, neither trained nor saved, so that its
  masks and published figures are those of a random decoder. Here they are trained. Its checkpoints lack them: they load
  with a note, and give no meaningful mask before the decoder is trained;
- `weight_path` is optional; `device` is not a parameter.
"""
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from log import say
from registry import MODELS

from .imtfe import IMTFE
from .weights import load_part, read_weights

DIM = 32  # channels of the attention layers
TAPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]  # rows and columns, in units of a layer's distance


def shift(x, down, right):
    """Return y with y[..., r, c] = x[..., r + down, c + right], and 0 where that is outside x."""
    height, width = x.shape[-2:]
    down, right = max(-height, min(down, height)), max(-width, min(right, width))
    return F.pad(x, (-right, right, -down, down))


class PixelAttention(nn.Module):
    """Each pixel attends to itself and its eight neighbours at a distance: (B, 32, H, W) -> same."""

    def __init__(self, distance, scrambled):
        super().__init__()
        self.distance = distance
        self.scrambled = scrambled
        self.k_p = nn.Conv2d(DIM, len(TAPS) * DIM, 1)
        self.v_p = nn.Conv2d(DIM, len(TAPS) * DIM, 1)
        self.q_p = nn.Conv2d(DIM, DIM, 1)
        self.ff1 = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.ff2 = nn.Conv2d(DIM, 2 * DIM, 3, padding=1)
        self.ff3 = nn.Conv2d(2 * DIM, DIM, 3, padding=1)

    def neighbours(self, x):
        """(B, 9C, H, W), C channels for each tap -> nine maps (B, C, H, W), where each pixel holds its neighbour's."""
        return [shift(part, i * self.distance, j * self.distance) for part, (i, j) in zip(x.chunk(9, dim=1), TAPS)]

    def attend(self, query, keys, values):
        """query (B, 32, H, W), nine keys and values alike -> (B, 32, H, W); outside the image key and value are 0."""
        scores = torch.stack([(query * key).sum(1, keepdim=True) for key in keys]) / 8  # (9, B, 1, H, W)
        return sum(weight * value for weight, value in zip(scores.softmax(0), values))

    def attend_scrambled(self, query, keys, values):
        """The same, with each array read in memory order as if its pixels came first, as IMDL-BenCo does."""
        batch, _, height, width = query.shape
        inside = torch.cat(self.neighbours(query.new_ones(1, 9, height, width)), dim=1).view(-1, 9)  # (HW, 9)
        keys, values = (torch.stack(maps, dim=1).view(batch, -1, 9, DIM) for maps in (keys, values))  # (B, HW, 9, 32)
        scores = (keys * query.reshape(batch, -1, 1, DIM)).sum(3) * inside / 8
        return (scores.softmax(2)[..., None] * values).sum(2).view(query.shape)

    def forward(self, x):
        attend = self.attend_scrambled if self.scrambled else self.attend
        x = x + attend(self.q_p(x), self.neighbours(self.k_p(x)), self.neighbours(self.v_p(x)))
        return x + self.ff3(self.ff2(self.ff1(x).relu()).relu()).relu()


@MODELS.register_module()
class SPAN(nn.Module):
    """SPAN.

    Args:
        weight_path: start weights of the extractor: IMTFEv4.pt, or a checkpoint of MantraNet
        layers_steps: distances in pixels of the attention layers, one layer each
        residual: add the input to the extractor's convolutions as IMDL-BenCo does; IMTFEv4.pt was trained without
        attention: "authors" attends to neighbours as the paper says, "imdlbenco" mixes pixels up (see models/span.py)
    """

    def __init__(self, weight_path: Optional[str] = None, layers_steps: list[int] = (1, 3, 9, 27, 81),
                 residual: bool = True, attention: Literal["authors", "imdlbenco"] = "authors"):
        super().__init__()
        self.featex = IMTFE(residual)
        self.pixel_attention = nn.ModuleList(PixelAttention(step, attention == "imdlbenco") for step in layers_steps)
        self.outlier_trans = nn.Conv2d(256, DIM, 1)
        self.last_layer = nn.Sequential(
            nn.Conv2d(DIM, 16, 5, padding=2), nn.ReLU(inplace=True),
            nn.Conv2d(16, 8, 5, padding=2), nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 5, padding=2), nn.ReLU(inplace=True),
            nn.Conv2d(4, 1, 5, padding=2),
        )
        self.register_load_state_dict_pre_hook(add_decoder)
        if weight_path:
            state = {name.removeprefix("IMTFE."): x for name, x in read_weights(weight_path, "--weight_path").items()}
            load_part(self.featex.state_dict(), state, f"--weight_path {weight_path}")

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, ImageNet-normalised, at least 2 x 2; mask: (B, 1, H, W) float32 of 0 and 1.
        Returns a dict: backward_loss: binary cross-entropy; pred_mask: (B, 1, H, W) float32 probabilities; pred_label:
        None; visual_loss: predict_loss; visual_image: pred_mask.
        """
        x = self.outlier_trans(self.featex(image))  # (B, 32, H, W)
        for layer in self.pixel_attention:
            x = layer(x)
        logits = self.last_layer(x).float()
        pred_mask = logits.sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits, mask)
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}


def add_decoder(module, state_dict, prefix, *args):
    """Give a checkpoint of IMDL-BenCo, which lacks the decoder, this module's own before loading, and say so."""
    if f"{prefix}outlier_trans.weight" not in state_dict or f"{prefix}last_layer.0.weight" in state_dict:
        return
    say("note: these weights of SPAN hold no decoder (last_layer), so it stays as it is: train it before using a mask")
    for name, value in module.last_layer.state_dict().items():
        state_dict[f"{prefix}last_layer.{name}"] = value
