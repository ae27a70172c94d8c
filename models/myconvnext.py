"""The tutorial's model: a timm ConvNeXt with a decoder of transposed convolutions and a linear image-level head.

ConvNeXt: Liu et al., "A ConvNet for the 2020s", CVPR 2022, https://arxiv.org/abs/2201.03545; weights by timm
(Apache-2.0), downloaded only with `pretrained`. Any image size works; the features have 1/32 of it, so multiples of 32
waste nothing.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import MODELS

from .backbone import build_backbone, feature_maps


@MODELS.register_module()
class MyConvNeXt(nn.Module):
    """The mask from the backbone's last feature map, the image-level score from the mean of that map.

    Args:
        backbone: any timm model that can be built with features_only
        pretrained: start from ImageNet weights, which timm downloads (--no-pretrained: random weights)
    """

    def __init__(self, backbone: str = "convnext_tiny", pretrained: bool = True):
        super().__init__()
        self.backbone = build_backbone(backbone, pretrained, out_indices=(-1,))
        channels = self.backbone.feature_info.channels()[-1]
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(channels, 256, 4, stride=4), nn.GELU(),     # (B, 256, H/8, W/8)
            nn.ConvTranspose2d(256, 128, 4, stride=4), nn.GELU(),          # (B, 128, H/2, W/2)
            nn.Conv2d(128, 64, 3, padding=1), nn.GELU(),
            nn.Conv2d(64, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 1, 1),                                           # (B, 1, H/2, W/2)
        )
        self.head = nn.Linear(channels, 1)

    def forward(self, image, mask, label, *args, **kwargs):
        """Return the dict that models/mymodel.py describes; visual_loss has seg and cls."""
        features, = feature_maps(self.backbone, image)                     # (B, C, H/32, W/32)
        mask_logits = self.decoder(features)
        mask_logits = F.interpolate(mask_logits, mask.shape[-2:], mode="bilinear").float()    # (B, 1, H, W)
        label_logits = self.head(features.mean(dim=(2, 3))).squeeze(1).float()    # (B,)
        seg_loss = F.binary_cross_entropy_with_logits(mask_logits, mask)
        cls_loss = F.binary_cross_entropy_with_logits(label_logits, label.float())
        loss = seg_loss + cls_loss
        pred_mask = torch.sigmoid(mask_logits)
        return {
            "backward_loss": loss,
            "pred_mask": pred_mask,
            "pred_label": torch.sigmoid(label_logits),
            "visual_loss": {"seg": seg_loss, "cls": cls_loss},
            "visual_image": {"pred_mask": pred_mask},
        }
