"""CMX: two MiT-B2 encoders that correct each other after every stage, and the fusion of their maps.

CMX: Cross-Modal Fusion for RGB-X Semantic Segmentation with Transformers. Zhang, Liu, Yang, Hu, Liu, Stiefelhagen.
IEEE T-ITS 2023. https://arxiv.org/abs/2203.04838
Original code: https://github.com/huaaaliu/RGBX_Semantic_Segmentation (MIT)

Shapes: a is the map of the first encoder (RGB) and b that of the second one (noise), both (B, C, h, w), N = h*w.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .mit import HEAD_DIM, WIDTHS, MiT, init_weights, split_heads, to_map, to_tokens

SECOND = "extra_"  # what the names of the second encoder's layers start with


class ChannelWeights(nn.Module):
    """Weights of the channels from global statistics: (B, 2C, h, w) -> (B, 2C, 1, 1)."""

    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * channels, 4 * channels), nn.ReLU(inplace=True),
                                 nn.Linear(4 * channels, 2 * channels), nn.Sigmoid())

    def forward(self, both):
        return self.mlp(torch.cat((both.mean((2, 3)), both.amax((2, 3))), dim=1))[:, :, None, None]


class SpatialWeights(nn.Module):
    """Weights of the positions: (B, 2C, h, w) -> (B, 2, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.ReLU(inplace=True),
                                 nn.Conv2d(channels, 2, 1), nn.Sigmoid())

    def forward(self, both):
        return self.mlp(both)


class Rectification(nn.Module):
    """Feature rectification module (FRM): each encoder adds what it lacks from the other one: a, b -> a, b."""

    def __init__(self, channels):
        super().__init__()
        self.channel_weights = ChannelWeights(channels)
        self.spatial_weights = SpatialWeights(channels)

    def forward(self, a, b):
        both = torch.cat((a, b), dim=1)
        channel_a, channel_b = self.channel_weights(both).chunk(2, dim=1)  # (B, C, 1, 1)
        spatial_a, spatial_b = self.spatial_weights(both).chunk(2, dim=1)  # (B, 1, h, w)
        return a + 0.5 * (channel_b + spatial_b) * b, b + 0.5 * (channel_a + spatial_a) * a


class CrossAttention(nn.Module):
    """Linear attention to the context of the other encoder: two token lists (B, N, C) -> the same shapes."""

    def __init__(self, channels):
        super().__init__()
        self.kv1 = nn.Linear(channels, 2 * channels, bias=False)
        self.kv2 = nn.Linear(channels, 2 * channels, bias=False)

    @staticmethod
    def context(key_value):
        """(B, N, 2C) -> (B, n, d, d): keys times values, softmax over the channels of the keys."""
        key, value = map(split_heads, key_value.chunk(2, dim=2))
        return (key.transpose(2, 3) @ value * HEAD_DIM ** -0.5).softmax(dim=2)

    def forward(self, u1, u2):
        with torch.autocast(u1.device.type, enabled=False):  # the context sums over all positions
            u1, u2 = u1.float(), u2.float()
            v1 = split_heads(u1) @ self.context(self.kv2(u2))
            v2 = split_heads(u2) @ self.context(self.kv1(u1))
        return v1.transpose(1, 2).flatten(2), v2.transpose(1, 2).flatten(2)


class CrossPath(nn.Module):
    """Exchange between both encoders' tokens: a, b (B, N, C) -> the same shapes."""

    def __init__(self, channels):
        super().__init__()
        self.channel_proj1 = nn.Linear(channels, 2 * channels)
        self.channel_proj2 = nn.Linear(channels, 2 * channels)
        self.cross_attn = CrossAttention(channels)
        self.end_proj1 = nn.Linear(2 * channels, channels)
        self.end_proj2 = nn.Linear(2 * channels, channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, a, b):
        y1, u1 = F.relu(self.channel_proj1(a)).chunk(2, dim=2)
        y2, u2 = F.relu(self.channel_proj2(b)).chunk(2, dim=2)
        v1, v2 = self.cross_attn(u1, u2)
        return (self.norm1(a + self.end_proj1(torch.cat((y1, v1), dim=2))),
                self.norm2(b + self.end_proj2(torch.cat((y2, v2), dim=2))))


class ChannelEmbed(nn.Module):
    """Merge both maps by convolutions with a shortcut: (B, 2C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.channel_embed = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, both):
        return self.norm(self.residual(both) + self.channel_embed(both))


class Fusion(nn.Module):
    """Feature fusion module (FFM): a, b -> one map (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.cross = CrossPath(channels)
        self.channel_emb = ChannelEmbed(channels)

    def forward(self, a, b):
        tokens = self.cross(to_tokens(a), to_tokens(b))
        return self.channel_emb(to_map(torch.cat(tokens, dim=2), a.shape[2:]))


class DualEncoder(MiT):
    """Two MiT-B2 encoders with rectification and fusion: two (B, 3, H, W) -> four fused maps (B, C_i, h_i, w_i)."""

    def __init__(self):
        super().__init__("b2")
        self.add_encoder("b2", 1e-6, SECOND)
        self.FRMs = nn.ModuleList(map(Rectification, WIDTHS))
        self.FFMs = nn.ModuleList(map(Fusion, WIDTHS))
        self.apply(init_weights)

    def forward(self, a, b):
        maps = []
        for i, (rectify, fuse) in enumerate(zip(self.FRMs, self.FFMs), start=1):
            a, b = rectify(self.stage(i, a), self.stage(i, b, SECOND))
            maps.append(fuse(a, b))
        return maps
