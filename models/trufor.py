"""TruFor: Leveraging All-Round Clues for Trustworthy Image Forgery Detection and Localization.

Fabrizio Guillaro, Davide Cozzolino, Avneesh Sud, Nicholas Dufour, Luisa Verdoliva. CVPR 2023.
https://arxiv.org/abs/2212.10957    Original code and weights: https://github.com/grip-unina/TruFor

A frozen network (Noiseprint++) turns the image into a noise map; two SegFormer-B2 encoders, one for the image and one
for the noise, exchange information at four scales (CMX). One decoder gives the mask, a second one the confidence in it,
and both maps are pooled into the image-level score. Phase 2 trains the mask, phase 3 confidence and score (phase 1
trained Noiseprint++).
Input: RGB, ImageNet-normalised, any size from 29x29 pixels; IMDL-BenCo trains at 512x512 with --if_resizing, the
authors train on crops of 512x512 and test at full size.
Licence: this file is MIT, written from the paper. The authors' code and weights (GRIP-UNINA) are for informational,
non-profit use only, with their notices, and public results must cite them; mit_b2.pth (NVIDIA) is non-commercial too.

The authors' network and the one of IMDL-BenCo differ in their inputs; `input_range` chooses:
- authors: Noiseprint++ receives levels divided by 256, the image's encoder the normalised image;
- imdlbenco: Noiseprint++ receives the normalised image, and the image's encoder one that is normalised twice. Only for
  checkpoints that were trained this way.
Differences from the published implementation of IMDL-BenCo, none of which changes a prediction:
- phase 3 runs (there it ends with an error) and trains the confidence decoder, which stayed as initialised;
- what a phase doesn't train stays in eval mode, without gradients, so its batch norms don't drift, and DDP needs no
  --find_unused_parameters;
- the loss of phase 3 is by default the authors' (`phase3_loss`); the stochastic depth of stage 2 rises like the rest;
- ImageNet weights go into both encoders; the decoders' layers are merged (see `Decoder`); attention is fused;
  Noiseprint++, the context of CMX, the pooling and the losses stay in float32 under autocast;
- the settings of the yaml file (`config_path`) are written here; `np_pretrain_weights`, `mit_b2_pretrain_weights` and
  `det_resume_ckpt` are `pretrained_noiseprint`, `pretrained_mit_b2` and `pretrained_phase2`, and none is demanded.
"""
import math
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_weights
from data import MEAN, STD
from log import say
from registry import MODELS, UserError

from .cmx import SECOND, DualEncoder
from .losses import dice_loss
from .mit import MIN_SIDE, WIDTHS
from .noiseprint import Noiseprint
from .weights import prepend_model

EMBED = 512  # channels of the decoders


def resize(x, size):
    """Resize bilinearly to `size` (H, W)."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """SegFormer's decoder: four maps (B, C_i, h_i, w_i) -> logits (B, outputs, h_1, w_1).

    As published, each map passes a linear layer, three of them are enlarged, and `linear_fuse.0` acts on the
    concatenation of all. Nothing between the two layers is nonlinear, and both commute with the resizing, so each map
    is multiplied once, at its own size, with the product of both weights, and the enlarged results are summed.
    """

    def __init__(self, outputs, eps):
        super().__init__()
        for i, channels in enumerate(WIDTHS, start=1):
            self.add_module(f"linear_c{i}", nn.ModuleDict({"proj": nn.Linear(channels, EMBED)}))
        self.linear_fuse = nn.Sequential(nn.Conv2d(4 * EMBED, EMBED, 1), nn.BatchNorm2d(EMBED, eps=eps),
                                         nn.ReLU(inplace=True))
        self.dropout = nn.Dropout2d(0.1)
        self.linear_pred = nn.Conv2d(EMBED, outputs, 1)

    def forward(self, maps):
        fuse, norm, relu = self.linear_fuse
        parts = fuse.weight.flatten(1).chunk(4, dim=1)[::-1]  # stored for maps 4, 3, 2, 1
        x = fuse.bias[:, None, None]
        for i, (y, part) in enumerate(zip(maps, parts), start=1):
            linear = self.get_submodule(f"linear_c{i}.proj")
            y = F.conv2d(y, (part @ linear.weight)[:, :, None, None], part @ linear.bias)
            x = x + (y if i == 1 else resize(y, maps[0].shape[2:]))
        return self.linear_pred(self.dropout(relu(norm(x))))


def pool(x, log_weight):
    """Weighted statistics of maps (B, H*W): soft minimum, soft maximum, mean, mean square, (B, 4)."""
    weight = log_weight.exp()
    return torch.stack((-(log_weight - x).logsumexp(1), (log_weight + x).logsumexp(1),
                        (weight * x).sum(1), (weight * x.square()).sum(1)), dim=1)


def cross_entropy(logits, mask):
    """Mean over all pixels, tampered ones weighted 2.5 and authentic ones 0.5; probabilities end at 1e-7."""
    least = math.log(1e-7)
    tampered, authentic = F.logsigmoid(logits).clamp_min(least), F.logsigmoid(-logits).clamp_min(least)
    return -(2.5 * mask * tampered + 0.5 * (1 - mask) * authentic).mean()


@MODELS.register_module()
class Trufor(nn.Module):
    """TruFor. Loads IMDL-BenCo's checkpoints and the authors' own, whose names lack the prefix `model.`.

    Args:
        phase: 2 trains the mask, 3 the confidence map and the image-level score; the predictions are the same
        input_range: what the two encoders receive: "authors" as the paper says, "imdlbenco" what IMDL-BenCo's
            checkpoints were trained with (see models/trufor.py)
        phase3_loss: "authors": error of the confidence as a probability, away from the mask's border, and the score's
            loss with weights; "imdlbenco": error of its logit, everywhere, and the score's loss without
        pretrained_noiseprint: Noiseprint++ weights, the authors' file or a bare state dict; phase 2 needs them to make
            sense, since this part isn't trained
        pretrained_mit_b2: ImageNet weights of SegFormer (mit_b2.pth), for both encoders
        pretrained_phase2: checkpoint of phase 2, which phase 3 starts from
    """

    def __init__(self, phase: Literal[2, 3] = 2, input_range: Literal["authors", "imdlbenco"] = "authors",
                 phase3_loss: Literal["authors", "imdlbenco"] = "authors", pretrained_noiseprint: Optional[str] = None,
                 pretrained_mit_b2: Optional[str] = None, pretrained_phase2: Optional[str] = None):
        super().__init__()
        self.phase = phase
        self.input_range = input_range
        self.phase3_loss = phase3_loss
        self.model = nn.ModuleDict({
            "backbone": DualEncoder(),
            "decode_head": Decoder(2, eps=1e-3),
            "decode_head_conf": Decoder(1, eps=1e-5),
            "detection": nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 1)),
            "dncnn": Noiseprint(),
        })
        for module in self.model["decode_head"].modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(rename_original)
        trained = ("backbone", "decode_head") if phase == 2 else ("decode_head_conf", "detection")
        self.frozen = [part.requires_grad_(False) for name, part in self.model.items() if name not in trained]
        if pretrained_noiseprint:
            self.model["dncnn"].load(pretrained_noiseprint, "--pretrained_noiseprint")
        if pretrained_mit_b2:
            self.model["backbone"].load_imagenet(pretrained_mit_b2, "--pretrained_mit_b2", ("", SECOND))
        if pretrained_phase2:
            load_weights(self, pretrained_phase2, "--pretrained_phase2")
            say(f"--pretrained_phase2: starting from {pretrained_phase2}")

    def train(self, mode=True):
        """As usual, but what this phase doesn't train stays in eval mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def encode(self, image):
        """Fused maps of the image and its noise: (B, 3, H, W) -> four of (B, C_i, h_i, w_i)."""
        # Noiseprint++ was trained on levels divided by 256
        x = image if self.input_range == "imdlbenco" else (image * self.std + self.mean) * (255 / 256)
        noise = self.model["dncnn"](x)  # (B, 1, H, W)
        return self.model["backbone"]((x - self.mean) / self.std, noise.expand(-1, 3, -1, -1))

    def losses(self, tampered, confidence, score, mask, label):
        """The phase's losses by name; all predictions are logits."""
        probability = tampered.sigmoid()
        if self.phase == 2:
            losses = {"loss_ce": cross_entropy(tampered, mask), "dice_loss": dice_loss(probability, mask)}
            return losses | {"combined_loss": 0.3 * losses["loss_ce"] + 0.7 * losses["dice_loss"]}
        right = mask * probability + (1 - mask) * (1 - probability)  # the probability of the true class
        if self.phase3_loss == "imdlbenco":
            loss_conf, weight = F.mse_loss(confidence, right), None
        else:
            sure = 1 - F.max_pool2d(mask, 11, 1, 5) - F.max_pool2d(-mask, 15, 1, 7)  # 0 near the border, else 1
            loss_conf = (sure * (confidence.sigmoid() - right).square()).sum() / sure.sum().clamp_min(1)
            weight = torch.where(label > 0.5, 0.5 / 0.7, 0.5 / 0.3)
        loss_det = F.binary_cross_entropy_with_logits(score, label, weight)
        return {"loss_conf": loss_conf, "loss_det": loss_det, "combined_loss": loss_conf + 0.5 * loss_det}

    def forward(self, image, mask, label, *args, **kwargs):
        """Predict mask, confidence and score, and compute the losses of the phase.

        Args:
            image: (B, 3, H, W) float32, RGB, ImageNet-normalised, at least 29 x 29 pixels
            mask: (B, 1, H, W), 1 = manipulated
            label: (B,), 1 = manipulated

        Returns:
            dict of `backward_loss`, scalar; `pred_mask`, (B, 1, H, W) probabilities; `pred_label`, (B,) probabilities;
            `visual_loss`, name -> scalar; `visual_image`: pred_mask, and confidence, (B, 1, H, W) in 0..1
        """
        size = image.shape[2:]
        if min(size) < MIN_SIDE:
            raise UserError(f"Trufor got a {size[0]} x {size[1]} image and needs {MIN_SIDE} pixels a side; give larger "
                            "images, or a larger --image_size.")
        gradients = torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients and self.phase == 2):
            maps = self.encode(image)
            logits = resize(self.model["decode_head"](maps).float(), size)  # (B, 2, H, W)
            tampered = logits[:, 1:] - logits[:, :1]
        with torch.set_grad_enabled(gradients and self.phase == 3):
            confidence = resize(self.model["decode_head_conf"](maps).float(), size)  # (B, 1, H, W)
            flat = confidence.flatten(1)
            equal = torch.full_like(flat, -math.log(flat.shape[1]))
            clues = torch.cat((pool(flat, equal), pool(tampered.flatten(1), F.logsigmoid(flat).log_softmax(1))), dim=1)
            score = self.model["detection"](clues)[:, 0].float()  # (B,)

        losses = self.losses(tampered, confidence, score, mask, label.float())
        pred_mask = tampered.sigmoid()
        return {
            "backward_loss": losses["combined_loss"],
            "pred_mask": pred_mask,
            "pred_label": score.sigmoid(),
            "visual_loss": losses,
            "visual_image": {"pred_mask": pred_mask, "confidence": confidence.sigmoid()},
        }


def rename_original(module, state_dict, prefix, *args):
    """Turn the authors' names (`dncnn.0.weight`) into ours (`model.dncnn.0.weight`) before loading."""
    if prefix + "dncnn.0.weight" in state_dict:
        prepend_model(state_dict, prefix)
