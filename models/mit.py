"""Mix-Transformer (MiT), the hierarchical encoder of SegFormer, which TruFor, Mesorch, MSCDI-Net and baselines share.

SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers. Xie, Wang, Yu, Anandkumar, Alvarez,
Luo. NeurIPS 2021. https://arxiv.org/abs/2105.15203

Four stages give maps of 1/4, 1/8, 1/16 and 1/32 of the image's size. The queries of attention see keys and values of a
map that a strided convolution has reduced; a depthwise convolution in the perceptron stands for position embeddings.
Parameter names are those of the published ImageNet files (mit_b2.pth to mit_b5.pth of
https://github.com/NVlabs/SegFormer, whose code and weights are for non-commercial use; this file is written from the
paper), so these load.

Shapes: B images, a map of h x w = N tokens of C channels, reduced to M tokens; n heads of d = 64.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_

from .weights import load_part, read_weights

WIDTHS = (64, 128, 320, 512)
REDUCTIONS = (8, 4, 2, 1)  # of the sides of the map that keys and values come from
HEAD_DIM = 64
DEPTHS = {"b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3), "b4": (3, 8, 27, 3), "b5": (3, 6, 40, 3)}
DROP_PATH = 0.1  # stochastic depth of the last block, rising linearly from 0
MIN_SIDE = 29  # pixels: a map of 8 x 8 tokens in stage 1, which reduces it 8 times


def to_map(tokens, size):
    """Tokens (B, h*w, C) -> map (B, C, h, w); size = (h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def to_tokens(x):
    """Map (B, C, h, w) -> tokens (B, h*w, C)."""
    return x.flatten(2).transpose(1, 2)


def split_heads(tokens):
    """(B, N, C) -> (B, n, N, d)."""
    return tokens.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Strided convolution with overlapping kernels, then layer norm: (B, C_in, H, W) -> tokens (B, N, C), (h, w)."""

    def __init__(self, in_channels, channels, kernel_size, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(to_tokens(x)), x.shape[2:]


class Attention(nn.Module):
    """Multi-head attention of all tokens to those of a map that is `reduction` times smaller: (B, N, C) -> same."""

    def __init__(self, channels, reduction):
        super().__init__()
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels, eps=1e-5)

    def query_key_value(self, x, size):
        """(B, N, C) -> query (B, N, C), key and value (B, M, C), the heads side by side."""
        reduced = self.norm(to_tokens(self.sr(to_map(x, size)))) if self.reduction > 1 else x
        return self.q(x), *self.kv(reduced).chunk(2, dim=2)

    def attend(self, query, key, value):
        """Softmax attention in each head: (B, N, C), twice (B, M, C) -> (B, N, C)."""
        out = F.scaled_dot_product_attention(*map(split_heads, (query, key, value)))
        return out.transpose(1, 2).flatten(2)

    def forward(self, x, size):
        return self.proj(self.attend(*self.query_key_value(x, size)))


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel by itself, on the map that the tokens form."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x, size):
        return to_tokens(self.dwconv(to_map(x, size)))


class Mlp(nn.Module):
    """Mix-FFN: C -> 4C, depthwise convolution, exact GELU, 4C -> C."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.dwconv = DepthwiseConv(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x, size):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), size)))


class Block(nn.Module):
    """Attention and Mix-FFN, each with a norm before it and a shortcut: tokens (B, N, C) -> same."""

    def __init__(self, channels, reduction, drop_path, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.attn = Attention(channels, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = Mlp(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, size):
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class MiT(nn.Module):
    """The encoder: image (B, 3, H, W) of at least 29 x 29 pixels -> list of four maps (B, C_i, h_i, w_i).

    Args:
        variant: b2, b3, b4 or b5, the number of blocks per stage
        eps: of the blocks' layer norms
    """

    def __init__(self, variant, eps=1e-6):
        super().__init__()
        self.add_encoder(variant, eps)

    def add_encoder(self, variant, eps, prefix=""):
        """Add the layers of an encoder; those of a second one in the same module have names with a `prefix`."""
        depths = DEPTHS[variant]
        rates = iter(torch.linspace(0, DROP_PATH, sum(depths), device="cpu").tolist())  # "meta" holds no values
        for i, (channels, reduction, depth) in enumerate(zip(WIDTHS, REDUCTIONS, depths), start=1):
            embed = PatchEmbed(WIDTHS[i - 2], channels, 3, 2) if i > 1 else PatchEmbed(3, channels, 7, 4)
            blocks = nn.ModuleList(Block(channels, reduction, next(rates), eps) for _ in range(depth))
            self.add_module(f"{prefix}patch_embed{i}", embed)
            self.add_module(f"{prefix}block{i}", blocks)
            self.add_module(f"{prefix}norm{i}", nn.LayerNorm(channels, eps=1e-6))

    def stage(self, i, x, prefix=""):
        """Stage i = 1..4: the map of the stage before, or the image -> map (B, C_i, h_i, w_i)."""
        x, size = self.get_submodule(f"{prefix}patch_embed{i}")(x)
        for block in self.get_submodule(f"{prefix}block{i}"):
            x = block(x, size)
        return to_map(self.get_submodule(f"{prefix}norm{i}")(x), size)

    def forward(self, x):
        maps = []
        for i in range(1, 5):
            x = self.stage(i, x)
            maps.append(x)
        return maps

    def load_imagenet(self, path, flag, prefixes=("",)):
        """Start the encoders whose names have these prefixes from a published ImageNet file, the value of `flag`."""
        state, own = read_weights(path, flag), self.state_dict()
        for prefix in prefixes:
            encoder = {name.removeprefix(prefix): x for name, x in own.items()
                       if name.startswith(tuple(prefix + part for part in ("patch_embed", "block", "norm")))
                       and ".fusion." not in name}  # which MSCDI-Net adds
            load_part(encoder, state, f"{flag} {path}")


def init_weights(module):
    """Initialise one layer as SegFormer does: linear 0.02, convolutions by their fan-out, biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
