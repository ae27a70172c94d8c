"""PSCC-Net: Progressive Spatio-Channel Correlation Network for Image Manipulation Detection and Localization.

Xiaohong Liu, Yaojie Liu, Jun Chen, Xiaoming Liu, IEEE TCSVT 2022, https://arxiv.org/abs/2103.10596
Original code and weights: https://github.com/proteus1991/PSCC-Net

A small HRNet without the usual reduction to 1/4 extracts features at four sizes. Masks are predicted from coarse to
fine: each level correlates its positions and its channels and is gated by the mask of the coarser level. A head of its
own on the same features classifies the whole image.

Input: RGB, ImageNet-normalised; published at 256x256 with --if_resizing. Any other size works, as the features are
resized to --input_size before both heads and the mask back to the image's size.
Licence of the original: PSCC-Net MIT, HRNet MIT; no line of either is copied here.

Checkpoints of IMDL-BenCo load as they are. The authors' weights are three files, which --pretrain_path takes to start a
training from; joined to one, they load as any checkpoint. Their network has another gate and input: give them with
--variant authors.

    python -c "import torch; torch.save({name: x for part in ('HRNet', 'NLCDetection', 'DetectionHead')
        for name, x in torch.load(part + '.pth', map_location='cpu').items()}, 'pscc_net.pth')"
    python test.py --checkpoint_path pscc_net.pth --model PSCC_Net --variant authors --if_resizing --image_size 256 ...

Kept from the published implementation because its checkpoints and losses need it:
- `variant` imdlbenco: features are multiplied by the logits of the coarser mask, not by its probabilities;
- before the correlations each channel is cut into r^2 runs of its memory, not by space-to-depth, and the output of the
  channel correlation is read as (C, h, w) although positions come first in it;
- the balance of authentic and manipulated pixels in the loss is taken over the whole batch.
Differences from it, none of which changes a number:
- the mask has the size of the image, whatever --input_size is;
- attention between positions is fused; both correlations and the losses stay in float32 under autocast;
- the loss of the score is the cross-entropy of the logits, which is stable where that of a probability is not.

Shapes: B images of H x W pixels; S = input_size; level k = 1..4 has C = 18, 36, 72, 144 channels of h x w = S/2^(k-1)
x S/2^(k-1), correlated as K = C r^2 channels at N = hw/r^2 positions.
"""
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from data import MEAN, STD
from registry import MODELS, UserError

from .hrnet import BN_MOMENTUM, Bottleneck, HRNet, initialise, residual_layer
from .weights import load_part, read_weights

CHANNELS = (18, 36, 72, 144)  # of levels 1..4
REDUCTIONS = (4, 2, 2, 1)  # r of levels 1..4
MULTIPLE = 8  # the least side that every level's h and w and its reduction divide


def resize(x, size):
    """Resize bilinearly, corner pixels on corner pixels, to `size` (H, W); what has that size is returned itself."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


# ---------------------------------------------------------------------------------------------------------------------
# Localisation


class CorrelationBlock(nn.Module):
    """Spatio-channel correlation (SCCM) and the mask of one level: (B, C, h, w) -> logits (B, 1, h, w)."""

    def __init__(self, channels, reduction):
        super().__init__()
        self.reduction = reduction
        inner = channels * reduction ** 2
        self.gamma_s = nn.Parameter(torch.ones(1))
        self.gamma_c = nn.Parameter(torch.ones(1))
        self.g = nn.Conv2d(inner, inner, 1)
        self.theta = nn.Conv2d(inner, inner, 1)
        self.phi = nn.Conv2d(inner, inner, 1)
        self.W_s = nn.Conv2d(channels, channels, 1)
        self.W_c = nn.Conv2d(channels, channels, 1)
        self.getmask = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 1, 3, padding=1))

    def correlate(self, x):
        """Return the spatial and the channel correlation of x, both (B, C, h, w) float32."""
        batch, channels, height, width = x.shape
        r = self.reduction
        # in memory, not space-to-depth: channel c becomes r^2 channels of N consecutive values each
        runs = x.reshape(batch, channels * r ** 2, height // r, width // r)
        g, theta, phi = (conv(runs).flatten(2).transpose(1, 2).contiguous() for conv in (self.g, self.theta, self.phi))
        # g, theta, phi: (B, N, K); the attention has one head
        spatial = F.scaled_dot_product_attention(*(y[:, None] for y in (theta, phi, g)), scale=1.0)  # (B, 1, N, K)
        channel = g @ (theta.transpose(1, 2) @ phi).softmax(-1)  # (B, N, K)
        # the channel correlation should be transposed as the spatial one is; published weights need that it isn't
        return spatial[:, 0].transpose(1, 2).reshape(x.shape), channel.reshape(x.shape)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # the products are not scaled down, and sums over positions
            spatial, channel = self.correlate(x.float())
        return self.getmask(x + self.gamma_s * self.W_s(spatial) + self.gamma_c * self.W_c(channel))


class LocalizationHead(nn.Module):
    """Masks from coarse to fine; `gate` turns the logits of one into what the features of the next are multiplied by.

    forward: maps of levels 1..4 -> logits of levels 1..4, each (B, 1, h, w).
    """

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        for k in (4, 3, 2, 1):
            self.add_module(f"getmask{k}", CorrelationBlock(CHANNELS[k - 1], REDUCTIONS[k - 1]))

    def forward(self, maps):
        logits = [self.getmask4(maps[3])]
        for k in (3, 2, 1):
            x = maps[k - 1]
            x = x * resize(self.gate(logits[0]), x.shape[2:])
            logits.insert(0, self.get_submodule(f"getmask{k}")(x))
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Classification


class HeadBottleneck(Bottleneck):
    """A bottleneck that doubles the channels: (B, C, h, w) -> (B, 2C, h, w)."""

    expansion = 2


def biased_conv_bn_relu(c_in, c_out, kernel_size, stride=1):
    """Convolution with bias, batch norm, ReLU: the size is kept, or halved with stride 2."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2),
        nn.BatchNorm2d(c_out, momentum=BN_MOMENTUM),
        nn.ReLU(inplace=True),
    )


class DetectionHead(nn.Module):
    """Maps of levels 1..4 are summed from fine to coarse -> logits (B, 2), channel 1 for manipulated."""

    def __init__(self):
        super().__init__()
        width = [HeadBottleneck.expansion * channels for channels in CHANNELS]
        self.incre_modules = nn.ModuleList(residual_layer(HeadBottleneck, c, c, num_blocks=1) for c in CHANNELS)
        self.downsamp_modules = nn.ModuleList(
            biased_conv_bn_relu(*pair, 3, stride=2) for pair in zip(width, width[1:]))
        self.final_layer = biased_conv_bn_relu(width[-1], 128, 1)
        self.classifier = nn.Sequential(nn.Linear(128, 16), nn.ReLU(inplace=True), nn.Linear(16, 2))

    def forward(self, maps):
        y = self.incre_modules[0](maps[0])
        for x, widen, halve in zip(maps[1:], self.incre_modules[1:], self.downsamp_modules):
            y = widen(x) + halve(y)
        return self.classifier(self.final_layer(y).mean((2, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Model


def balanced_loss(logits, mask):
    """Cross-entropy of one level, in which manipulated and authentic pixels of the batch count half each.

    logits: (B, 1, h, w) float32; mask: (B, 1, H, W), which is resized; returns a scalar.
    """
    target = F.interpolate(mask, logits.shape[2:], mode="bilinear", antialias=True) > 0.5
    share = target.float().mean()
    weight = torch.where(target, 0.5 / share, 0.5 / (1 - share))
    weight = torch.where(share > 0, weight, 1.0)  # without a manipulated pixel all count alike
    return F.binary_cross_entropy_with_logits(logits, target.float(), weight)


@MODELS.register_module()
class PSCC_Net(nn.Module):
    """PSCC-Net.

    Args:
        input_size: side in pixels, a multiple of 8, of the square that features are resized to before both heads; give
            --image_size the same value to leave them as they are
        variant: "imdlbenco" as its checkpoints were trained; "authors" as the authors' weights need it: the network
            sees the image in 0..1 instead of normalised, and features are gated by probabilities instead of logits
        pretrain_path: start weights of the HRNet: a file of HRNet-W18-small-v2 trained on ImageNet
            (hrnet_w18_small_v2.pth), or the word timm (downloads hrnet_w18_small_v2); or start weights of the whole
            model: the authors' three files HRNet.pth NLCDetection.pth DetectionHead.pth
    """

    def __init__(self, input_size: int = 256, variant: Literal["imdlbenco", "authors"] = "imdlbenco",
                 pretrain_path: Optional[list[str]] = None):
        super().__init__()
        if input_size < MULTIPLE or input_size % MULTIPLE:
            raise UserError(f"--input_size {input_size}: the features of PSCC_Net are halved three times; give a "
                            f"multiple of {MULTIPLE}.")
        self.sizes = [(input_size >> k, input_size >> k) for k in range(len(CHANNELS))]
        self.variant = variant
        self.register_buffer("weights", torch.tensor([1 / 0.5947, 1 / 0.4053]))  # unused, but in checkpoints
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.FENet = HRNet(CHANNELS, stem_stride=1, num_bottlenecks=2, num_modules=(1, 1, 1),
                           num_blocks=2, align_corners=True)
        self.SegNet = LocalizationHead(nn.Sigmoid() if variant == "authors" else nn.Identity())
        self.ClsNet = DetectionHead()
        initialise(self.FENet)
        self.register_load_state_dict_pre_hook(rename_original)
        if pretrain_path:
            self.load_start(pretrain_path)

    def load_start(self, paths):
        """Load the HRNet, or all three parts where the files hold them."""
        state = {}
        for path in paths:
            state |= read_weights(path, "--pretrain_path", timm_name="hrnet_w18_small_v2")
        for part in self.children() if MARK in state else (self.FENet,):
            # files from before 2018 have no counters of batches
            load_part(part.state_dict(), state, f"--pretrain_path {' '.join(paths)}", optional=("num_batches_tracked",))

    def forward(self, image, mask, label, *args, **kwargs):
        """Predict the manipulated area and the image-level score, and compute the losses.

        Args:
            image: (B, 3, H, W) float32, ImageNet-normalised
            mask: (B, 1, H, W), 1 = manipulated
            label: (B,), 1 = manipulated

        Returns a dict: backward_loss scalar; pred_mask (B, 1, H, W) float32 probabilities; pred_label (B,) float32
        probabilities; visual_loss seg_loss, cls_loss and combined_loss; visual_image pred_mask.
        """
        x = image * self.std + self.mean if self.variant == "authors" else image
        maps = [resize(x, size) for x, size in zip(self.FENet(x), self.sizes)]  # (B, C, h, w) of levels 1..4
        logits = [x.float() for x in self.SegNet(maps)]  # (B, 1, h, w) of levels 1..4
        scores = self.ClsNet(maps).float()  # (B, 2)

        seg_loss = sum(balanced_loss(x, mask.float()) for x in logits)
        cls_loss = F.cross_entropy(scores, label.long())
        loss = seg_loss + cls_loss
        pred_mask = resize(logits[0], image.shape[2:]).sigmoid()
        return {
            "backward_loss": loss,
            "pred_mask": pred_mask,
            "pred_label": scores.softmax(dim=1)[:, 1],
            "visual_loss": {"seg_loss": seg_loss, "cls_loss": cls_loss, "combined_loss": loss},
            "visual_image": {"pred_mask": pred_mask},
        }


MARK = "getmask4.gamma_s"  # a tensor that only the authors' files name so


def rename_original(module, state_dict, prefix, *args):
    """Turn the authors' names (`getmask4.g.bias`) into ours (`SegNet.getmask4.g.bias`) when loading; add `weights`."""
    if prefix + MARK not in state_dict:
        return
    for part, child in module.named_children():
        for name in child.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}{part}.{name}"] = state_dict.pop(prefix + name)
    state_dict[prefix + "weights"] = module.weights
