"""ManTra-Net: Manipulation Tracing Network for Detection and Localization of Image Forgeries with Anomalous Features.

Yue Wu, Wael AbdAlmageed, Premkumar Natarajan, CVPR 2019.
Paper: https://openaccess.thecvf.com/CVPR2019 (not on arXiv)
Original code: https://github.com/ISICV/ManTraNet (Keras)

IMTFE (imtfe.py) gives each pixel a feature vector. An anomaly detector compares it with its means over three windows
and over the image, in units of the image's standard deviation, and a small convolutional LSTM reads these four maps.

Input: RGB, ImageNet-normalised, of any size; published at 512, resized for training, padded for testing.
Licence: this file is MIT, written from the paper. The authors' code and weights are for academic or non-commercial use
only; so is `MantraNetv4.pt`, their weights as converted by ManTraNet-pytorch, which loads as it is, like checkpoints of
IMDL-BenCo: --checkpoint_path to test it, --resume to train from it.

Kept from the published implementation because its weights need it: one norm uses the mean and variance of the whole
batch, in evaluation too, so a mask depends on the other images of its batch. --batch_size 1 and --test_batch_size 1
avoid that.
Differences from it, none of which changes a mask:
- the loss is the cross-entropy of the logit; `double_sigmoid` brings back the published one, which takes the
  probability for a logit and can't fall below 0.31 on manipulated and 0.69 on authentic pixels;
- the weights of the Bayar filters are written over in training only, and start positive;
- the global mean is one at any size; `in_channel`, for which only 3 works, and `device` are not parameters.
"""
import torch
import torch.nn.functional as F
from torch import nn

from registry import MODELS

from .imtfe import IMTFE

WINDOWS = (7, 15, 31)  # sides of the windows of the local means, in pixels
CHANNELS, HIDDEN = 64, 8  # of a map of z-scores and of the recurrent state


def local_mean(x, side):
    """Mean over the window around each pixel, clipped at the border of the image: (B, C, H, W) -> same."""
    for kernel in ((side, 1), (1, side)):  # a clipped window is a rectangle still, so its mean separates
        x = F.avg_pool2d(x, kernel, 1, (kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    return x


def hard_sigmoid(x):
    """The one of Keras, whose slope is 0.2; PyTorch's is 1/6."""
    return (0.2 * x + 0.5).clamp(0, 1)


def gates(channels):
    """The convolution from a map and the state to the gates: (B, 64+8, H, W) -> (B, channels, H, W)."""
    return nn.Conv2d(CHANNELS + HIDDEN, channels, 7, padding=3)


class ConvLSTM(nn.Module):
    """Maps (B, 64, H, W), read one after the other -> last hidden state (B, 8, H, W) float32."""

    def __init__(self):
        super().__init__()
        self.cell_list = nn.ModuleList([nn.ModuleDict({"conv": gates(4 * HIDDEN)})])

    def forward(self, maps):
        cell = self.cell_list[0]
        h = c = torch.zeros_like(maps[0][:, :HIDDEN])
        for x in maps:
            i, f, g, o = cell["conv"](torch.cat((x, h), dim=1)).float().chunk(4, dim=1)
            c = hard_sigmoid(f) * c + hard_sigmoid(i) * g.tanh()
            h = hard_sigmoid(o) * c.tanh()
        return h


class ConvGRU(nn.Module):
    """Maps (B, 64, H, W), read one after the other -> last state (B, 8, H, W) float32."""

    def __init__(self):
        super().__init__()
        self.cell_list = nn.ModuleList([nn.ModuleDict({"conv1": gates(2 * HIDDEN), "conv2": gates(HIDDEN)})])

    def forward(self, maps):
        cell = self.cell_list[0]
        h = torch.zeros_like(maps[0][:, :HIDDEN])
        for x in maps:
            r, u = hard_sigmoid(cell["conv1"](torch.cat((h, x), dim=1)).float()).chunk(2, dim=1)
            new = cell["conv2"](torch.cat((x, r * h), dim=1)).float().tanh()  # the other order than for conv1
            h = (1 - u) * h + u * new
        return h


class AnomalyDetector(nn.Module):
    """Features (B, 256, H, W) -> mask logits (B, 1, H, W) float32; the arguments are those of MantraNet."""

    def __init__(self, eps, with_GRU):
        super().__init__()
        self.eps = eps
        self.adaptation = nn.Conv2d(256, CHANNELS, 1, bias=False)
        self.sigma_F = nn.Parameter(torch.zeros(1, CHANNELS, 1, 1))
        self.recurrence = "conv_gru" if with_GRU else "conv_lstm"
        self.add_module(self.recurrence, ConvGRU() if with_GRU else ConvLSTM())
        self.end = nn.Sequential(nn.Conv2d(HIDDEN, 1, 7, padding=3))

    def z_scores(self, x):
        """How far (B, 64, H, W) is from its means over the windows and the image, in deviations: four such maps."""
        mean = x.mean((2, 3), keepdim=True)
        variance = (x - mean).square().mean((2, 3), keepdim=True)
        # the clamp changes no value; where the variance is 0 it makes the gradient 0 instead of NaN
        deviation = torch.maximum(variance.clamp_min(1e-24).sqrt(), self.sigma_F + self.eps)
        return [(m - x).abs() / deviation for m in (*(local_mean(x, side) for side in WINDOWS), mean)]

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # small differences over a small deviation
            x = self.adaptation(features.float())
            # statistics of the whole batch, in evaluation too, as published
            maps = self.z_scores(F.batch_norm(x, None, None, training=True, eps=1e-3))
        return self.end(self.get_submodule(self.recurrence)(maps)).float()


@MODELS.register_module()
class MantraNet(nn.Module):
    """ManTra-Net.

    Args:
        eps: added to the learned lower bound of the standard deviations
        with_GRU: read the four maps with a convolutional GRU in place of the LSTM (no published weights)
        double_sigmoid: apply a second sigmoid in the loss, as IMDL-BenCo does: only to reproduce its losses
    """

    def __init__(self, eps: float = 1e-6, with_GRU: bool = False, double_sigmoid: bool = False):
        super().__init__()
        self.double_sigmoid = double_sigmoid
        self.IMTFE = IMTFE()
        self.AnomalyDetector = AnomalyDetector(eps, with_GRU)

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, ImageNet-normalised, at least 2 x 2; mask: (B, 1, H, W) float32 of 0 and 1.
        Returns a dict: backward_loss: binary cross-entropy; pred_mask: (B, 1, H, W) float32 probabilities; pred_label:
        None; visual_loss: predict_loss; visual_image: pred_mask.
        """
        logits = self.AnomalyDetector(self.IMTFE(image))
        pred_mask = logits.sigmoid()
        loss = F.binary_cross_entropy_with_logits(pred_mask if self.double_sigmoid else logits, mask)
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}
