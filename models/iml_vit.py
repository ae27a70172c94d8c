"""IML-ViT: Benchmarking Image Manipulation Localization by Vision Transformer (arXiv 2023).

Xiaochen Ma, Bo Du, Zhuohang Jiang, Ahmed Y. Al Hammadi, Jizhe Zhou. https://arxiv.org/abs/2307.14863

A plain ViT-B sees the image at full resolution (most blocks attend in windows of 14 x 14 tokens, four globally); a
simple feature pyramid and a linear head give the mask. A second loss counts only a band along the manipulated edges.
Input: 1024 x 1024, the image zero-padded and never resized (--if_padding), with --edge_mask_width 7.
Published settings: MAE weights, lr 1e-4 to 5e-7, weight decay 0.05, 200 epochs, batch 2 x accumulation 8.

Licence: the weights `mae_pretrain_vit_base.pth` of MAE (https://github.com/facebookresearch/mae) are CC BY-NC 4.0, for
non-commercial use. Checkpoints of IMDL-BenCo load as they are.

Differences from the published code, none of which changes a number:
- patch_size (ignored there), mlp_embeding_dim (must equal fpn_channels) and fpn_scale_factors (must be 4 2 1 0.5) are
  not parameters;
- the image may have any size: the model pads it to whole patches, and the result has the image's own size;
- only training needs an edge mask; evaluation without one leaves the edge loss out;
- attention never forms the matrix of all pairs of tokens, and the head fuses each pyramid level before enlarging it.
Kept because published weights depend on it: windows at the border are filled up with zero tokens that take part in
attention, and the losses count the padded area of the image as authentic.

Shapes: B images of H x W pixels, a grid of h x w = H/16 x W/16 tokens, E = embed_dim, F = fpn_channels, n heads of
d = E/n.
"""
from collections import OrderedDict
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath

from registry import MODELS, UserError

from .vit import HEADS, PATCH, Mlp, from_windows, resize_positions, to_windows
from .weights import load_part, read_weights

DEPTH = 12
GLOBAL_BLOCKS = (2, 5, 8, 11)
WINDOW = 14  # tokens per window side
DROP_PATH = 0.1  # stochastic depth of the last block, rising linearly from 0
PRETRAIN_GRID = 14  # pos_embed belongs to a 224 x 224 image


# ---------------------------------------------------------------------------------------------------------------------
# Encoder: ViT-B with windows and decomposed relative positions


def relative_table(table, side):
    """Return R (side, d, side), R[y, :, y'] = table[y - y' + side - 1]: the embedded offset from key y' to query y.

    table: (2*n-1, d); where `side` is not n, it is resized linearly to 2*side-1 entries.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], 2 * side - 1, mode="linear", align_corners=False)[0].T
    # Row y of R is a slice of the table in reverse order, so a view replaces a table of indices.
    return table.unfold(0, side, 1).flip(-1)


class Attention(nn.Module):
    """Multi-head attention on a grid of tokens, with learned terms for the vertical and horizontal offset of a pair.

    All heads share the two tables rel_pos_h and rel_pos_w, (2*side-1, d).
    """

    def __init__(self, dim, side):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // HEADS))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // HEADS))

    def forward(self, x):  # (B, h, w, E)
        _, h, w, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(3, 0, 4, 1, 2, 5)  # each (B, n, h, w, d)
        rel_h = torch.einsum("bnyxd,ydk->bnyxk", q, relative_table(self.rel_pos_h, h))  # (B, n, h, w, h)
        rel_w = torch.einsum("bnyxd,xdk->bnyxk", q, relative_table(self.rel_pos_w, w))  # (B, n, h, w, w)

        # The logit of query (y, x) and key (y', x') is scale * q.k + rel_h[y'] + rel_w[x']. With the one-hot codes of
        # y' and x' appended to the key it is a single inner product, so fused kernels can be used and no (h*w)^2 matrix
        # is stored. They need q, k and v of one width, a multiple of 8, hence the padding with zeros.
        dim, spare = q.shape[-1], -(h + w) % 8
        rows = torch.eye(h, dtype=k.dtype, device=k.device)[:, None].expand(h, w, h)
        columns = torch.eye(w, dtype=k.dtype, device=k.device).expand(h, w, w)
        codes = torch.cat([rows, columns], -1).expand(*k.shape[:2], -1, -1, -1)
        q = F.pad(torch.cat([q * dim ** -0.5, rel_h, rel_w], -1), (0, spare)).flatten(2, 3)  # (B, n, h*w, d+h+w+.)
        k = F.pad(torch.cat([k, codes], -1), (0, spare)).flatten(2, 3)
        v = F.pad(v, (0, h + w + spare)).flatten(2, 3)
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :dim]  # (B, n, h*w, d)
        return self.proj(x.permute(0, 2, 1, 3).flatten(2).unflatten(1, (h, w)))  # (B, h, w, E)


class Block(nn.Module):
    """Transformer block on a grid (B, h, w, E): attention in windows, or global for a grid of side `global_side`."""

    def __init__(self, dim, drop_path, global_side=None):
        super().__init__()
        self.windowed = global_side is None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, global_side or WINDOW)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.norm1(x)
        if self.windowed:
            y = from_windows(self.attn(to_windows(y, WINDOW)), *x.shape[1:3])
        else:
            y = self.attn(y)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The windowed ViT-B: image (B, 3, H, W) -> features (B, E, h, w)."""

    def __init__(self, dim, grid):
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, PATCH, PATCH)))
        # The shape in MAE's files; the first entry belongs to a class token, which this network does not have.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + PRETRAIN_GRID ** 2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, DROP_PATH * i / (DEPTH - 1), grid if i in GLOBAL_BLOCKS else None) for i in range(DEPTH))

    def forward(self, image):
        x = self.patch_embed(image).permute(0, 2, 3, 1)  # (B, h, w, E)
        x = x + resize_positions(self.pos_embed[:, 1:], tuple(x.shape[1:3])).view(1, *x.shape[1:])
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Simple feature pyramid (as in ViTDet)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """Convolution without bias that keeps the size, then ChannelNorm."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class FeaturePyramid(nn.Module):
    """Features (B, E, h, w) -> five maps (B, F, ., .) of 4, 2, 1, 1/2 and 1/4 times their size."""

    def __init__(self, dim, channels):
        super().__init__()
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, 2), ChannelNorm(dim // 2), nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2), *self.smooth(dim // 4, channels))
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, 2), *self.smooth(dim // 2, channels))
        self.simfp_4 = nn.Sequential(*self.smooth(dim, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), *self.smooth(dim, channels))

    @staticmethod
    def smooth(in_channels, out_channels):
        """The two convolutions that end every level."""
        return ConvNorm(in_channels, out_channels, 1), ConvNorm(out_channels, out_channels, 3)

    def forward(self, x):
        p5 = self.simfp_5(x)
        return self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), p5, p5[:, :, ::2, ::2]


# ---------------------------------------------------------------------------------------------------------------------
# Head and model


class PredictHead(nn.Module):
    """Five pyramid levels -> logits (B, 1, 4h, 4w)."""

    def __init__(self, channels, norm):
        super().__init__()
        self.linear_fuse = nn.Conv2d(5 * channels, channels, 1)
        self.norm = {
            "BN": nn.BatchNorm2d(channels),
            "LN": ChannelNorm(channels),
            "IN": nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
        }[norm]
        self.dropout = nn.Dropout(0.5)
        self.linear_predict = nn.Conv2d(channels, 1, 1)

    def forward(self, levels):
        # As published, linear_fuse acts on the concatenation of all levels, enlarged to 4h x 4w. A 1x1 convolution and
        # a bilinear resize commute, so each level is multiplied with its part of the weight at its own size, and the
        # enlarged results are summed.
        weights = self.linear_fuse.weight.chunk(len(levels), 1)
        x = F.conv2d(levels[0], weights[0], self.linear_fuse.bias)
        for level, weight in zip(levels[1:], weights[1:]):
            x = x + F.interpolate(F.conv2d(level, weight), x.shape[2:], mode="bilinear", align_corners=False)
        return self.linear_predict(self.dropout(self.norm(x)))


@MODELS.register_module()
class IML_ViT(nn.Module):
    """ViT-B on full-resolution images with a feature pyramid and an edge loss.

    Args:
        input_size: image side in pixels that the tables of relative positions are made for; they are resized for others
        vit_pretrain_path: file with MAE weights for the encoder (mae_pretrain_vit_base.pth, CC BY-NC 4.0)
        fpn_channels: channels of the pyramid and the head
        predict_head_norm: norm in the head: BN (batch), LN (layer), IN (instance, steadier with 1-2 images per process)
        edge_lambda: weight of the edge loss
        embed_dim: width of the encoder, a multiple of 12
    """

    def __init__(self, input_size: int = 1024, vit_pretrain_path: Optional[str] = None, fpn_channels: int = 256,
                 predict_head_norm: Literal["BN", "LN", "IN"] = "BN", edge_lambda: float = 20, embed_dim: int = 768):
        super().__init__()
        if embed_dim % HEADS:
            raise UserError(f"--embed_dim {embed_dim}: give a multiple of {HEADS}, the number of attention heads.")
        self.edge_lambda = edge_lambda
        self.encoder_net = Encoder(embed_dim, -(-input_size // PATCH))
        self.featurePyramid_net = FeaturePyramid(embed_dim, fpn_channels)
        self.predict_head = PredictHead(fpn_channels, predict_head_norm)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if vit_pretrain_path:
            state = read_weights(vit_pretrain_path, "--vit_pretrain_path")
            # MAE has no relative positions (they start at 0); its class token and last norm are not used here.
            load_part(self.encoder_net.state_dict(), state, f"--vit_pretrain_path {vit_pretrain_path}",
                      optional=("rel_pos_h", "rel_pos_w"))

    def forward(self, image, mask, edge_mask=None, *args, **kwargs):
        """Predict the manipulated area and compute the losses.

        image: (B, 3, H, W) float32, normalised; mask, edge_mask: (B, 1, H, W) float32 of 0 and 1. Returns a dict:
        backward_loss: predict_loss + edge_loss; pred_mask: (B, 1, H, W) float32 probabilities; pred_label: None;
        visual_loss: predict_loss, edge_loss (with its weight; only with an edge mask), combined_loss;
        visual_image: pred_mask, edge_mask (if given). Raises UserError when training without an edge mask.
        """
        if edge_mask is None and self.training:
            raise UserError("IML_ViT trains with an edge loss and the batch has no edge_mask; set --edge_mask_width 7.")
        height, width = image.shape[2:]
        # Whole patches, at least two in each direction, because the coarsest level halves the grid.
        x = F.pad(image, (0, max(-width % PATCH, 2 * PATCH - width), 0, max(-height % PATCH, 2 * PATCH - height)))
        logits = self.predict_head(self.featurePyramid_net(self.encoder_net(x))).float()
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)[:, :, :height, :width]

        bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        predict_loss = loss = bce.mean()
        losses, images = {"predict_loss": predict_loss}, {"pred_mask": logits.sigmoid()}
        if edge_mask is not None:
            losses["edge_loss"] = self.edge_lambda * (edge_mask * bce).mean()
            loss = predict_loss + losses["edge_loss"]
            images["edge_mask"] = edge_mask
        losses["combined_loss"] = loss
        return {"backward_loss": loss, "pred_mask": images["pred_mask"], "pred_label": None,
                "visual_loss": losses, "visual_image": images}
