"""Can We Get Rid of Handcrafted Feature Extractors? SparseViT: Nonsemantics-Centered, Parameter-Efficient Image
Manipulation Localization through Spare-Coding Transformer.

Lei Su, Xiaochen Ma, Xuekang Zhu, Chaoqun Niu, Zeyu Lei, Ji-Zhe Zhou. AAAI 2025, https://arxiv.org/abs/2412.14598
Original code and weights: https://github.com/scu-zjz/SparseViT

A UniFormer-Base encoder whose attention lets a token see only the tokens on a coarse regular grid through it, so that
local semantics are kept apart. Six maps of strides 16 and 32 are weighted per channel and summed into the mask.

Input: RGB, ImageNet-normalised; published at 512x512 with --if_resizing. Any other size works: the model pads with
zeros to multiples of 512 and crops. Other sparsities make the step smaller: 128 with --s_blocks3 16 8 4 4 --s_blocks4
8 4.
Licence: this file is MIT, written from the paper. UniFormer's weights (uniformer_base_in1k.pth,
https://github.com/Sense-X/UniFormer) have their own terms.

Differences from the published code, none of which changes a number:
- the start weights are loaded after the initialisation, which there overwrites most of them, and checked;
- attention is fused; grids need not be square; what is never used (`norm1`, `norm2` and the `pos_embed` of attention
  blocks) is in the state dict but frozen, so DDP needs no --find_unused_parameters;
- the size is that of the image, so there is no img_size; mlp_ratio and qkv_bias, 4 and True in all published weights,
  are not parameters. The encoder alone (`SparseViTBackbone`), which has no loss, is not registered.
Kept: all layer scales start at 1e-6, those of the head too, which therefore learns slowly in its first steps. The
image-level score (`pred_label`) is None, as published.

Shapes: B images, a map of h x w = N tokens of C channels; n heads of d channels.
"""
import math
from collections import OrderedDict
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import nn

from registry import MODELS, UserError

from .mit import Mlp, init_weights, to_map, to_tokens
from .weights import load_part, read_weights

STRIDES = (16, 32)  # of stages 3 and 4
GRIDS = (32, 16)  # their maps' sides in a 512 x 512 image
GROUPS = (5, 4)  # so many of their blocks share one sparse size
FEATURES = ((5, 10, 15), (4,))  # their blocks (from 1) whose output goes to the head, besides the last one's
DROP_PATH = 0.2  # stochastic depth of the last block, rising linearly from 0
LAYER_SCALE = 1e-6  # all scales at the start


class ConvBlock(nn.Module):
    """Block of stages 1 and 2, convolutions in place of attention: (B, C, h, w) -> same."""

    def __init__(self, channels, drop_path):
        super().__init__()
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.attn = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Conv2d(channels, 4 * channels, 1), act=nn.GELU(), fc2=nn.Conv2d(4 * channels, channels, 1)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SparseAttention(nn.Module):
    """Attention within groups of `side` x `side` tokens that lie as far apart as the map allows: (B, N, C) -> same.

    With g = h / side and f = w / side, the tokens of equal (y mod g, x mod f) form a group.
    """

    def __init__(self, channels, head_dim, side):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.head_dim, self.side = head_dim, side

    def forward(self, x, size):
        p, (g, f) = self.side, (length // self.side for length in size)
        qkv = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).unflatten(1, (p, g, p, f))  # (B, p, g, p, f, 3, n, d)
        q, k, v = qkv.permute(5, 0, 2, 4, 6, 1, 3, 7).flatten(5, 6).flatten(1, 3)  # each (B*g*f, n, p*p, d)
        x = F.scaled_dot_product_attention(q, k, v).unflatten(2, (p, p)).unflatten(0, (-1, g, f))
        return self.proj(x.permute(0, 4, 1, 5, 2, 3, 6).flatten(5).flatten(1, 4))  # (B, p, g, p, f, C) -> (B, N, C)


class SparseBlock(nn.Module):
    """Block of stages 3 and 4: sparse attention and a perceptron with a depthwise convolution: (B, N, C) -> same."""

    def __init__(self, channels, head_dim, side, drop_path):
        super().__init__()
        self.gamma_1 = nn.Parameter(LAYER_SCALE * torch.ones(channels))
        self.gamma_2 = nn.Parameter(LAYER_SCALE * torch.ones(channels))
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels).requires_grad_(False)  # unused
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = SparseAttention(channels, head_dim, side)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, size):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), size))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x), size))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> six maps: four (B, C3, H/16, W/16), then two (B, C4, H/32, W/32).

    sides: for stages 3 and 4, the sparse size of each block
    """

    def __init__(self, depth, channels, head_dim, sides):
        super().__init__()
        rates = iter(torch.linspace(0, DROP_PATH, sum(depth)).tolist())
        for i in range(4):
            stride = 2 if i else 4
            self.add_module(f"patch_embed{i + 1}", nn.Sequential(OrderedDict(
                proj=nn.Conv2d(channels[i - 1] if i else 3, channels[i], stride, stride),
                norm=LayerNorm2d(channels[i], eps=1e-5))))
            if i < 2:
                blocks = [ConvBlock(channels[i], next(rates)) for _ in range(depth[i])]
            else:
                blocks = [SparseBlock(channels[i], head_dim, side, next(rates)) for side in sides[i - 2]]
            self.add_module(f"blocks{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(channels[i], eps=1e-6).requires_grad_(i >= 2))
        for blocks in (self.blocks3, self.blocks4):
            blocks.apply(init_weights)

    def forward(self, x):
        for i in (1, 2):
            x = self.get_submodule(f"patch_embed{i}")(x)
            for block in self.get_submodule(f"blocks{i}"):
                x = block(x)
        maps = []
        for i, features in zip((3, 4), FEATURES):
            x = self.get_submodule(f"patch_embed{i}")(x)
            size, tokens = x.shape[2:], to_tokens(x)
            for number, block in enumerate(self.get_submodule(f"blocks{i}"), start=1):
                tokens = block(tokens, size)
                if number in features:
                    maps.append(to_map(tokens, size))
            x = to_map(tokens, size)
            maps.append(to_map(self.get_submodule(f"norm{i}")(tokens), size))  # the next stage takes x without norm
        return maps


class Head(nn.Module):
    """Sum of the six maps, weighted per channel, then one logit: -> (B, 1, H/16, W/16)."""

    def __init__(self, c3, c4):
        super().__init__()
        for i in range(1, 7):
            self.register_parameter(f"gamma{i}", nn.Parameter(LAYER_SCALE * torch.ones(c4)))
        for i in range(1, 5):
            self.add_module(f"conv_layer{i}", nn.Conv2d(c3, c4, 1))
        self.norm = LayerNorm2d(c4)
        self.conv_last = nn.Conv2d(c4, 1, 1)

    def forward(self, maps):
        gammas = [self.get_parameter(f"gamma{i}")[:, None, None] for i in range(1, 7)]
        x = gammas[4] * maps[4] + gammas[5] * maps[5]  # (B, C4, H/32, W/32)
        x = F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
        for i in range(4):
            x = x + gammas[i] * self.get_submodule(f"conv_layer{i + 1}")(maps[i])
        return self.conv_last(self.norm(x))


@MODELS.register_module()
class SparseViT(nn.Module):
    """SparseViT.

    Args:
        depth: blocks of the four stages; the third needs 15 to 20, the fourth 4 to 7, for six feature maps
        embed_dim: channels of the four stages
        head_dim: channels per attention head in stages 3 and 4
        s_blocks3: sparsity of each five blocks of stage 3: attention joins 32 // s tokens per side
        s_blocks4: sparsity of each four blocks of stage 4: attention joins 16 // s tokens per side
        pretrained_path: file of UniFormer-Base weights for the encoder (uniformer_base_in1k.pth)
    """

    def __init__(self, depth: list[int] = (5, 8, 20, 7), embed_dim: list[int] = (64, 128, 320, 512), head_dim: int = 64,
                 s_blocks3: list[int] = (8, 4, 2, 1), s_blocks4: list[int] = (2, 1),
                 pretrained_path: Optional[str] = None):
        super().__init__()
        if len(depth) != 4 or not (15 <= depth[2] <= 20 and 4 <= depth[3] <= 7):
            raise UserError(f"--depth {depth}: give four numbers, the third 15 to 20 and the fourth 4 to 7.")
        if len(embed_dim) != 4 or embed_dim[2] % head_dim or embed_dim[3] % head_dim:
            raise UserError(f"--embed_dim {embed_dim}: give four numbers, the last two multiples of {head_dim}, the "
                            "--head_dim.")
        sides = []
        for i, s_blocks in enumerate((s_blocks3, s_blocks4)):
            groups = -(-depth[i + 2] // GROUPS[i])
            if len(s_blocks) < groups or not all(1 <= s <= GRIDS[i] for s in s_blocks):
                raise UserError(f"--s_blocks{i + 3} {s_blocks}: give {groups} numbers from 1 to {GRIDS[i]}.")
            sides.append([GRIDS[i] // s_blocks[block // GROUPS[i]] for block in range(depth[i + 2])])
        self.step = math.lcm(*(stride * side for stride, of_stage in zip(STRIDES, sides) for side in of_stage))
        self.encoder_net = Encoder(depth, embed_dim, head_dim, sides)
        self.lmu = Head(*embed_dim[2:])
        if pretrained_path:
            self.load_uniformer(pretrained_path)

    def load_uniformer(self, path):
        """Start the encoder from a UniFormer-Base file, which has no layer scales and no convolution in the Mlp."""
        own = self.encoder_net.state_dict()
        own = {name: own[name] for name in own if name.startswith(("patch_embed", "blocks"))}
        state = {name.removeprefix("backbone."): x for name, x in read_weights(path, "--pretrained_path").items()}
        load_part(own, state, f"--pretrained_path {path}",
                  optional=("gamma_1", "gamma_2", "dwconv.weight", "dwconv.bias", "num_batches_tracked"))

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, ImageNet-normalised; mask: (B, 1, H, W) of 0 and 1. Returns a dict:
        backward_loss: binary cross-entropy; pred_mask: (B, 1, H, W) float32 probabilities; pred_label: None;
        visual_loss: predict_loss; visual_image: pred_mask.
        """
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % self.step, 0, -height % self.step))
        logits = self.lmu(self.encoder_net(x)).float()
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)[..., :height, :width]

        loss = F.binary_cross_entropy_with_logits(logits, mask.float())
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}
