"""DINOv3-IML: DINOv3 Beats Specialized Detectors: A Simple Foundation Model Baseline for Image Forensics.

Jieming Yu, Qiuxiao Feng, Zhuohan Wang, Xiaochen Ma, 2026. https://arxiv.org/abs/2604.16083
Backbone: DINOv3, https://arxiv.org/abs/2508.10104, code and weights: https://github.com/facebookresearch/dinov3

A plain ViT turns the image into one vector per patch of 16 x 16 pixels; three convolutions and one enlargement make a
mask of them. The ViT stays as it is, is trained as a whole, or gets low-rank updates (LoRA) of its projections to
query, key and value, which is what the authors recommend.

Input: RGB, ImageNet-normalised; published at 512x512 with --if_resizing and --edge_mask_width 7. Any other size works:
the model pads to multiples of 16, repeating the last pixel, and crops.
Licence: this file is MIT, written from the paper. DINOv3's weights, timm's copies and what is trained from them
included, are under Meta's DINOv3 License, and none are shipped. Published checkpoints load as they are.

Kept from the published implementation because its checkpoints need it:
- Meta's files store the periods of the position embedding rounded to bfloat16, and what is trained from them inherits
  that, so the periods belong to the state dict; timm's weights come with exact ones;
- training, except with a frozen backbone, stretches the coordinates of the patches by a factor of 1/2 to 2, drawn anew
  in every block.
Differences from it, none of which changes a number:
- one model with --finetune for its three classes, built without the code of DINOv3;
- the mask has the size of the image, where upstream always gives `image_size`;
- DINOv3's mask token, the masks of its qkv biases and a norm that only its own training uses are dropped on loading.
  The qkv biases, which are 0 in the released weights, are constants here: no kind of training changes them.
"""
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from registry import MODELS, UserError

from .vit import PATCH
from .weights import load_part, read_weights, timm_model

TIMM_NAMES = {size: f"vit_{word}_patch16_dinov3.lvd1689m" for size, word in (
    ("dinov3_vits16", "small"), ("dinov3_vitb16", "base"), ("dinov3_vitl16", "large"))}
OURS = (  # a part of a name in checkpoints of DINOv3, peft or both, and what it is here
    ("storage_tokens", "reg_token"), ("rope_embed.", "rope."), (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"),
    (".base_layer.", "."), ("lora_A.default.weight", "lora_A"), ("lora_B.default.weight", "lora_B"))


class Qkv(nn.Module):
    """Tokens (B, N, D) -> query, key and value (B, N, 3D): a linear layer, with LoRA beside it if `rank` is not 0."""

    def __init__(self, linear, rank, scale):
        super().__init__()
        self.weight, self.scale = linear.weight, scale
        count, dim = linear.weight.shape
        self.register_buffer("bias", torch.zeros(count))
        if rank:
            self.lora_A = nn.Parameter(torch.empty(rank, dim).uniform_(-dim ** -0.5, dim ** -0.5))
            self.lora_B = nn.Parameter(torch.zeros(count, rank))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if hasattr(self, "lora_A") else y


@MODELS.register_module()
class DINOv3_IML(nn.Module):
    """DINOv3-IML. Loads the checkpoints of its three published classes.

    Args:
        dinov3_model_type: size of the ViT
        dinov3_weights_path: DINOv3 weights to start from, Meta's .pth; or the word timm, whose copy is downloaded
        finetune: what is trained besides the head: LoRA, nothing, or the whole ViT
        lora_rank: rank of the updates
        lora_alpha: the updates count alpha / rank times (default: twice the rank)
        edge_lambda: weight of the edge loss
    """

    def __init__(self, dinov3_model_type: Literal["dinov3_vits16", "dinov3_vitb16", "dinov3_vitl16"] = "dinov3_vitl16",
                 dinov3_weights_path: Optional[str] = None, finetune: Literal["lora", "frozen", "full"] = "lora",
                 lora_rank: int = 32, lora_alpha: Optional[float] = None, edge_lambda: float = 20.0):
        super().__init__()
        if lora_rank < 1:
            raise UserError(f"--lora_rank {lora_rank}: give a whole number of at least 1.")
        self.finetune, self.edge_lambda = finetune, edge_lambda
        self.rank = lora_rank if finetune == "lora" else 0
        self.backbone = timm_model(TIMM_NAMES[dinov3_model_type], dinov3_weights_path == "timm",
                                   "--dinov3_weights_path timm", "give a file", num_classes=0, rope_rescale_coords=2)
        self.backbone.requires_grad_(finetune == "full")
        rope = self.backbone.rope
        rope.register_buffer("periods", rope.periods)  # into the state dict, where timm leaves it out
        for block in self.backbone.blocks:
            scale = 2.0 if lora_alpha is None else lora_alpha / lora_rank
            block.attn.qkv = Qkv(block.attn.qkv, self.rank, scale)
        if dinov3_weights_path not in (None, "timm"):
            state = read_weights(dinov3_weights_path, "--dinov3_weights_path")
            rename_published(state)
            load_part(self.backbone.state_dict(), state, f"--dinov3_weights_path {dinov3_weights_path}",
                      optional=("qkv.bias", "rope.periods", "lora_A", "lora_B"))
        dim = self.backbone.embed_dim
        self.seg_head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1), nn.BatchNorm2d(dim // 2), nn.ReLU(),
            nn.Conv2d(dim // 2, dim // 4, 3, padding=1), nn.BatchNorm2d(dim // 4), nn.ReLU(),
            nn.Conv2d(dim // 4, 1, 1))
        for module in self.seg_head:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(adapt_checkpoint)

    def train(self, mode=True):
        """As usual, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.finetune == "frozen":
            self.backbone.eval()
        return self

    def features(self, image):
        """Image (B, 3, H, W), sides multiples of 16 -> the last block's normalised patch tokens (B, D, H/16, W/16)."""
        vit = self.backbone
        x = vit.patch_embed(image)  # (B, h, w, D)
        count, h, w, _ = x.shape
        prefix = torch.cat((vit.cls_token, vit.reg_token), 1).expand(count, -1, -1)
        x = torch.cat((prefix, x.flatten(1, 2)), 1)
        # timm's own forward draws one factor for all blocks
        draws = len(vit.blocks) if vit.training else 1
        tables = [vit.rope.get_embed((h, w)) for _ in range(draws)] * (len(vit.blocks) // draws)
        for block, table in zip(vit.blocks, tables):
            x = block(x, rope=table)
        return vit.norm(x)[:, vit.num_prefix_tokens:].transpose(1, 2).unflatten(2, (h, w))

    def forward(self, image, mask, edge_mask=None, *args, **kwargs):
        """Predict the tampered area and compute the losses.

        image: (B, 3, H, W) float32, ImageNet-normalised; mask, edge_mask: (B, 1, H, W) of 0 and 1. Returns a dict:
        backward_loss: predict_loss + edge_loss; pred_mask: (B, 1, H, W) float32 probabilities; pred_label: None;
        visual_loss: predict_loss, edge_loss (with its weight; 0 without an edge mask), combined_loss; visual_image:
        pred_mask.
        """
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")
        logits = self.seg_head(self.features(x)).float()
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]

        bce = F.binary_cross_entropy_with_logits(logits, mask.float(), reduction="none")
        predict_loss = bce.mean()
        edge_loss = bce.new_zeros(()) if edge_mask is None else self.edge_lambda * (edge_mask * bce).mean()
        loss = predict_loss + edge_loss
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": predict_loss, "edge_loss": edge_loss, "combined_loss": loss},
                "visual_image": {"pred_mask": pred_mask}}


def rename_published(state, prefix=""):
    """Give the names of DINOv3 and peft below `prefix` in a state dict ours, in place, and drop what isn't used.

    The biases become what DINOv3 adds: bias times mask, where 0 stays 0 whatever its mask holds.
    """
    for name in [name for name in state if name.startswith(prefix)]:
        if name.endswith((".qkv.bias", ".qkv.base_layer.bias")):
            mask = state.get(f"{name}_mask", 1)
            state[name] = torch.where(state[name] == 0, 0, state[name] * mask)
    for name in [name for name in state if name.startswith(prefix)]:
        value, own = state.pop(name), name.removeprefix(prefix)
        if not own.endswith("bias_mask") and not own.startswith(("mask_token", "local_cls_norm.")):
            for part, ours in OURS:
                own = own.replace(part, ours)
            state[prefix + own] = value


def adapt_checkpoint(module, state_dict, prefix, *args):
    """Give a checkpoint our names before loading; UserError where the ViT's width or LoRA's rank is another."""
    prefix += "backbone."
    rename_published(state_dict, prefix)
    token, lora = (state_dict.get(prefix + name) for name in ("cls_token", "blocks.0.attn.qkv.lora_A"))
    if token is not None and token.shape[-1] != module.backbone.embed_dim:
        raise UserError(f"its tokens are {token.shape[-1]} wide, the model's {module.backbone.embed_dim}: give the "
                        "--dinov3_model_type of the training.")
    rank = 0 if lora is None else len(lora)
    if token is not None and rank != module.rank:
        have = f"LoRA of rank {rank}" if rank else "no LoRA"
        give = f"--finetune lora --lora_rank {rank}" if rank else "--finetune frozen or full"
        raise UserError(f"it holds {have}, and the model has {module.rank or 'none'}: give {give}.")
