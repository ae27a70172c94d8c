"""NoiseNet: a small detector of inconsistent noise, made for the demo: it learns from scratch in minutes on two cores.

Not from a paper. A camera leaves the same noise everywhere in an image; what was pasted or painted in brings noise of
its own. The network takes a high-pass residual, applies learned filters, and computes the logarithm of their local
energy (the noise level). Normalising each image leaves only the differences within it; dilated convolutions add
context. Any image size works; give images at their own resolution (--if_padding), since resizing removes the noise.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import MODELS


def conv_norm_relu(in_channels, out_channels, dilation=1, stride=1):
    """3x3 convolution, normalisation over each image, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.InstanceNorm2d(out_channels, affine=True), nn.ReLU())


@MODELS.register_module()
class NoiseNet(nn.Module):
    """The mask from local differences in noise, the image-level score from the highest logit of the mask.

    Args:
        width: channels of the convolutions
        label_weight: weight of the image-level loss
    """

    def __init__(self, width: int = 48, label_weight: float = 0.05):
        super().__init__()
        self.filters = nn.Conv2d(3, 16, 5, padding=2, bias=False)
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.fine = nn.Sequential(conv_norm_relu(16, width), conv_norm_relu(width, width))
        self.context = nn.Sequential(conv_norm_relu(width, width, stride=2), conv_norm_relu(width, width, 2),
                                     conv_norm_relu(width, width, 4))
        self.head = nn.Conv2d(2 * width, 1, 1)
        self.score = nn.Linear(1, 1)  # from the mask's highest logit to the image's
        nn.init.ones_(self.score.weight)
        self.label_weight = label_weight

    def forward(self, image, mask, label, shape_mask=None, *args, **kwargs):
        """Return the dict that models/mymodel.py describes; visual_loss has mask and label."""
        residual = image - F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)                   # (B, 3, H, W)
        energy = torch.log(F.avg_pool2d(self.filters(residual).float() ** 2, 4) + 1e-4)            # (B, 16, H/4, W/4)
        fine = self.fine(self.norm(energy))
        context = F.interpolate(self.context(fine), fine.shape[-2:], mode="bilinear")              # from H/8, W/8
        logits = self.head(torch.cat([fine, context], dim=1))
        logits = F.interpolate(logits, mask.shape[-2:], mode="bilinear").float()                   # (B, 1, H, W)
        score = self.score(logits.amax(dim=(2, 3)).detach()).squeeze(1).float()                    # (B,)
        mask_loss = F.binary_cross_entropy_with_logits(logits, mask, shape_mask)                   # ignores padding
        label_loss = F.binary_cross_entropy_with_logits(score, label.float())
        loss = mask_loss + self.label_weight * label_loss
        return {
            "backward_loss": loss,
            "pred_mask": torch.sigmoid(logits),
            "pred_label": torch.sigmoid(score),
            "visual_loss": {"mask": mask_loss, "label": label_loss},
        }
