"""MSCDI-Net: multi-scale cross-domain interaction network for image manipulation localization.

A model of IMDL-BenCo (NeurIPS 2024), whose code names no paper. https://github.com/scu-zjz/IMDLBenCo

A SegFormer encoder (MiT-B4) whose two deep stages attend within windows too, besides the global attention; cross
attention merges both. The shallow features are folded onto the deep ones, merged with them in the same way, and
enlarged by an upsampling that learns where to sample (DySample, Liu et al., ICCV 2023). The mask is all it predicts.
Input: RGB, ImageNet-normalised; published at 512x512 with --if_resizing --edge_mask_width 7. Any other size is padded
to a multiple of 32 inside (noise_model needs a width of 512).
Licence: this file is MIT, written from a description. mit_b4.pth (NVIDIA) is for non-commercial use.

Kept from the published implementation because its checkpoints need it:
- the windows' result is rearranged by a reshape that doesn't fit its layout, so the fusion sees scrambled positions,
  and how scrambled depends on the image's size: test at the size of the training;
- the windows have one head over all channels, with the scale of a head of 64;
- the cross attention isn't scaled, so its softmax is nearly one-hot;
- the blocks' layer norms have an eps of 1e-5 instead of MiT's 1e-6;
- noise_model normalises over the map's width, which must be 64.
Differences from it, none of which changes a number:
- other sizes work: windows at the border are filled up with zero tokens, as in IML-ViT;
- attention is fused; cross attention, upsampling and losses stay in float32 under autocast;
- without an edge mask, training is refused, and evaluation leaves the edge loss out;
- the options that ended with an error (`ff_domain` 1 and 2, `fusion_mode` 0 with noise) are left out.

Shapes: B images of H x W pixels; maps (B, C, h, w) as in models/mit.py, of stages 1 to 4 at 1/4, 1/8, 1/16, 1/32.
"""
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from registry import MODELS, UserError

from .filters import srm_bank
from .mit import HEAD_DIM, WIDTHS, Attention, MiT, init_weights, to_map, to_tokens
from .vit import from_windows, to_windows

WINDOW = 8  # tokens per side
GROUPS = 4  # of channels that share their sampling points
STRIDE = 32  # pixels per token of stage 4
NOISE_WIDTH = 64  # of the map at 1/8 that noise_model normalises
EDGE_WEIGHT = 20


class CrossAttention(nn.Module):
    """Each position of `source` attends to all of `guide`, without scaling: two (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels, reduction):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, source, guide):
        with torch.autocast(source.device.type, enabled=False):  # the products are not scaled down
            source, guide = source.float(), guide.float()
            out = F.scaled_dot_product_attention(*map(to_tokens, (self.query(source), self.key(guide),
                                                                  self.value(guide))), scale=1.0)
            return self.gamma * to_map(out, source.shape[2:]) + source


class CrossFusion(nn.Module):
    """Two maps attend to each other, and gates mix the results: two (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels, reduction=1):
        super().__init__()
        self.cross_att1 = CrossAttention(channels, reduction)
        self.cross_att2 = CrossAttention(channels, reduction)
        self.fuse_gate = nn.Sequential(nn.Conv2d(2 * channels, channels // 4, 3, padding=1), nn.ReLU(inplace=True),
                                       nn.Conv2d(channels // 4, 2, 3, padding=1))

    def forward(self, x1, x2):
        a1, a2 = self.cross_att1(x1, x2), self.cross_att2(x2, x1)
        gate1, gate2 = self.fuse_gate(torch.cat((a1, a2), dim=1)).softmax(dim=1).chunk(2, dim=1)
        return gate1 * a1 + gate2 * a2


class SqueezeFusion(nn.Module):
    """Mix two maps with a weight per channel (squeeze and excitation): two (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.SEBock = nn.ModuleDict({"fc": nn.Sequential(  # named so in published checkpoints
            nn.Linear(channels, channels // 16, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channels // 16, channels, bias=False), nn.Sigmoid())})

    def forward(self, x1, x2):
        weight = self.SEBock["fc"]((x1 + x2).mean((2, 3)))[:, :, None, None]
        return weight * x1 + (1 - weight) * x2


class ConcatFusion(nn.Conv2d):
    """Mix two maps by a 1x1 convolution: two (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__(2 * channels, channels, 1)

    def forward(self, x1, x2):
        return super().forward(torch.cat((x1, x2), dim=1))


# fusion_mode -> class, and the names of those of stage 4, of stage 3 and of the noise
FUSIONS = {
    0: (ConcatFusion, "fusion_conv42", "fusion_conv31"),
    1: (SqueezeFusion, "SE_fusion42", "SE_fusion31", "SE_fusion_noise"),
    2: (CrossFusion, "interfuse1", "interfuse2", "interfuse_noise"),
}


class GlobalLocalAttention(Attention):
    """MiT's attention, and one within windows of 8 x 8 queries, merged: tokens (B, N, C) -> same."""

    def __init__(self, channels, reduction):
        super().__init__(channels, reduction)
        self.fusion = CrossFusion(channels, reduction=4)

    def attend_locally(self, query, key, value, size):
        """As `attend`, with one head in each window, in the published (scrambled) order of the result."""
        h, w = size
        maps = [x.unflatten(1, (h // step, w // step))
                for x, step in ((query, 1), (key, self.reduction), (value, self.reduction))]
        windows = [to_windows(x, WINDOW * x.shape[1] // h).flatten(1, 2) for x in maps]  # (B*windows, tokens, C)
        out = F.scaled_dot_product_attention(*windows, scale=HEAD_DIM ** -0.5)
        out = from_windows(out.unflatten(1, (WINDOW, WINDOW)), h, w)
        # channel by channel in memory, but read as token by token
        return out.permute(0, 3, 1, 2).reshape(query.shape)

    def forward(self, x, size):
        parts = self.query_key_value(x, size)
        merged = self.fusion(to_map(self.attend(*parts), size), to_map(self.attend_locally(*parts, size), size))
        return self.proj(to_tokens(merged))


class Fold(nn.Module):
    """Cut the size by `factor` and keep all pixels as channels, then project: (B, C, h, w) -> (B, out, h/f, w/f)."""

    def __init__(self, channels, out_channels, factor):
        super().__init__()
        self.factor = factor
        self.proj = nn.Conv2d(channels * factor ** 2, out_channels, 1)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")

    def forward(self, x):
        return F.channel_shuffle(self.proj(F.pixel_unshuffle(x, self.factor)), self.factor)


class DynamicUpsample(nn.Module):
    """Sample a map at twice its size, at points that it chooses itself: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.offset_conv = nn.Conv2d(channels, 2 * GROUPS * 4, 1)
        nn.init.normal_(self.offset_conv.weight, std=0.001)
        nn.init.zeros_(self.offset_conv.bias)
        # channel 16d + 4g + 2i + j: axis d (x, y) and channel group g, at row i and column j of the 2 x 2 new pixels
        pixel = torch.tensor((-0.25, 0.25))
        columns, rows = pixel.expand(2, 2), pixel[:, None].expand(2, 2)
        initial = torch.stack((columns, rows))[:, None].expand(2, GROUPS, 2, 2)
        self.register_buffer("initial_pos", initial.reshape(1, -1, 1, 1).clone())

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # sampling points need more than 8 bits
            x = x.float()
            h, w = x.shape[2:]
            offset = 0.25 * self.offset_conv(x) + self.initial_pos
            offset = offset.view(-1, 2, GROUPS, 2, 2, h, w).permute(0, 2, 5, 3, 6, 4, 1)  # (B, g, h, i, w, j, d)
            columns = torch.arange(w, device=x.device)[:, None] + 0.5
            rows = torch.arange(h, device=x.device)[:, None, None, None] + 0.5
            # grid_sample counts from -1 to 1 between the outer edges
            points = torch.stack(((offset[..., 0] + columns) * (2 / w) - 1, (offset[..., 1] + rows) * (2 / h) - 1), -1)
            out = F.grid_sample(x.reshape(-1, x.shape[1] // GROUPS, h, w), points.reshape(-1, 2 * h, 2 * w, 2),
                                padding_mode="border", align_corners=False)
            return out.view(len(x), -1, 2 * h, 2 * w)


class NoiseExtractor(nn.Module):
    """Noise features of the image: (B, 3, H, 512) -> (B, 128, H/8, 64).

    SRM's filters are frozen; the constraint of the Bayar convolution is applied to the initial weights alone.
    """

    def __init__(self, kind):
        super().__init__()
        self.filter = "srm_conv" if kind == "SRM" else "bayar"
        conv = nn.Conv2d(3, 9 if kind == "SRM" else 1, 5, padding=2)
        with torch.no_grad():
            if kind == "SRM":
                conv.weight.copy_(srm_bank())
                conv.weight.requires_grad_(False)
            else:
                nn.init.uniform_(conv.weight, -0.1, 0.1)
                conv.weight[:, :, 2, 2] = 0
                conv.weight -= conv.weight.mean((2, 3), keepdim=True)
                nn.init.uniform_(conv.bias, -0.1, 0.1)
        self.add_module(self.filter, conv)
        self.downsample = nn.Sequential(Fold(conv.out_channels, 16, 2), Fold(16, 64, 2), Fold(64, 128, 2),
                                        nn.LayerNorm(NOISE_WIDTH), nn.LeakyReLU(0.2))

    def forward(self, image):
        return self.downsample(self.get_submodule(self.filter)(image))


@MODELS.register_module()
class MSCDI_Net(nn.Module):
    """MSCDI-Net.

    Args:
        backbone: the encoder, MiT-B2 to MiT-B5
        backbone_weights_path: ImageNet weights of SegFormer for the encoder (mit_b4.pth)
        noise_model: filters of a noise branch, which needs images 512 pixels wide
        fusion_mode: how shallow and deep features merge: 0 concatenation, 1 squeeze and excitation, 2 cross attention
        glca: number of leading blocks of stage 3 and of stage 4 that attend within windows too
    """

    def __init__(self, backbone: Literal["mit_bit2", "mit_bit3", "mit_bit4", "mit_bit5"] = "mit_bit4",
                 backbone_weights_path: Optional[str] = None, noise_model: Optional[Literal["SRM", "Bayar"]] = None,
                 fusion_mode: Literal[0, 1, 2] = 2, glca: int = 12):
        super().__init__()
        if noise_model and fusion_mode == 0:
            raise UserError("--fusion_mode 0 has no way to merge the features of --noise_model: give 1 or 2.")
        encoder = MiT(f"b{backbone[-1]}", eps=1e-5)
        for stage, channels, reduction in ((encoder.block3, WIDTHS[2], 2), (encoder.block4, WIDTHS[3], 1)):
            for block in stage[:glca]:
                block.attn = GlobalLocalAttention(channels, reduction)
        self.segformer = nn.ModuleDict({"segformer": encoder.apply(init_weights)})
        self.downf1 = Fold(WIDTHS[0], WIDTHS[2], 4)
        self.downf2 = Fold(WIDTHS[1], WIDTHS[3], 4)
        fusion, *self.fusions = FUSIONS[fusion_mode]
        for name, channels in zip(self.fusions, (WIDTHS[3], WIDTHS[2]) + (128,) * bool(noise_model)):
            self.add_module(name, fusion(channels))
        self.upsamplingers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c_in, c_out, 1), DynamicUpsample(c_out))
            for c_in, c_out in ((512, 320), (640, 128), (128, 64), (64, 16), (16, 4)))
        self.final_conv = nn.Conv2d(4, 1, 1)
        self.NoiseExtractor = NoiseExtractor(noise_model) if noise_model else None
        if backbone_weights_path:
            encoder.load_imagenet(backbone_weights_path, "--backbone_weights_path")

    def fuse(self, i, x1, x2):
        """Merge two maps of one shape with the fusion of place i: deepest, second deepest, noise."""
        return self.get_submodule(self.fusions[i])(x1, x2)

    def predict(self, image):
        """Image (B, 3, H, W), both sides multiples of 32, -> logits (B, 1, H, W)."""
        f1, f2, f3, f4 = self.segformer["segformer"](image)
        deepest = self.fuse(0, f4, self.downf2(f2))  # (B, 512, H/32, W/32)
        second = self.fuse(1, f3, self.downf1(f1))  # (B, 320, H/16, W/16)
        x = torch.cat((self.upsamplingers[0](deepest), second), dim=1)
        x = self.upsamplingers[1](x)  # (B, 128, H/8, W/8)
        if self.NoiseExtractor:
            x = self.fuse(2, x, self.NoiseExtractor(image))
        for upsample in self.upsamplingers[2:]:
            x = upsample(x)
        return self.final_conv(x)

    def forward(self, image, mask, edge_mask=None, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, normalised; mask, edge_mask: (B, 1, H, W) float32 of 0 and 1. Returns a dict:
        backward_loss: cross-entropy, plus 20 times its part on the edge; pred_mask: (B, 1, H, W) float32 probabilities;
        pred_label: None; visual_loss: predict_loss; visual_image: pred_mask. Raises UserError when training without an
        edge mask, and with noise_model where the width does not fit.
        """
        if edge_mask is None and self.training:
            raise UserError("MSCDI_Net trains with an edge loss and the batch has no edge_mask; set "
                            "--edge_mask_width 7.")
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE))
        if self.NoiseExtractor and x.shape[3] != 8 * NOISE_WIDTH:
            raise UserError(f"MSCDI_Net with --noise_model takes images {8 * NOISE_WIDTH} pixels wide and got one of "
                            f"{width}; give --if_resizing --image_size {8 * NOISE_WIDTH}.")
        logits = self.predict(x)[:, :, :height, :width].float()

        bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        loss = bce.mean()
        if edge_mask is not None:
            loss = loss + EDGE_WEIGHT * (edge_mask * bce).mean()
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}
