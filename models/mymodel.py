"""A template: the smallest model that trains. Copy this file, rename the class, and it is on the command line:

    python train.py --model MyModel --kernel_size 5 --data_path demo_data/train.json --if_resizing --image_size 128

Nothing else has to be edited. Every parameter of the constructor is a flag, and its line under Args is the flag's help.
`python tools/check_model.py --model MyModel` tells what is wrong with it before the first training.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import MODELS, UserError


@MODELS.register_module()
class MyModel(nn.Module):
    """One convolution from the image to the mask; the mean of the mask's logits gives the image-level score.

    Args:
        kernel_size: side of the convolution's kernel in pixels, odd
        label_weight: weight of the image-level loss
    """

    def __init__(self, kernel_size: int = 3, label_weight: float = 0.1):
        super().__init__()
        if kernel_size % 2 == 0:  # a mistake on the command line is told in one sentence
            raise UserError(f"--kernel_size {kernel_size}: give an odd number.")
        self.conv = nn.Conv2d(3, 1, kernel_size, padding=kernel_size // 2)
        self.label_weight = label_weight

    def forward(self, image, mask, label, *args, **kwargs):
        """Compute losses and predictions of a batch.

        The whole batch comes by keyword: name what the model needs, the rest goes into **kwargs. Besides these three
        a batch holds edge_mask (with --edge_mask_width), shape_mask (with --if_padding), shape, original_shape,
        origin_shape, name, and what a post function adds.

        Args:
            image: (B, 3, H, W) float32, RGB, ImageNet-normalised
            mask: (B, 1, H, W) float32, 1 = manipulated
            label: (B,) int64, 1 = manipulated

        Returns:
            dict, in which every key but the first two may be missing:
            backward_loss  scalar, the loss to minimise
            pred_mask      (B, 1, H, W) float, probabilities
            pred_label     (B,) float, probabilities
            visual_loss    {name: scalar} for the log
            visual_image   {name: (B, 1 or 3, H, W)} for TensorBoard, in 0..1
        """
        logits = self.conv(image).float()  # (B, 1, H, W); mixed precision would give float16, with ties near 1
        score = logits.flatten(1).mean(dim=1)                              # (B,)
        mask_loss = F.binary_cross_entropy_with_logits(logits, mask)
        label_loss = F.binary_cross_entropy_with_logits(score, label.to(score.dtype))
        loss = mask_loss + self.label_weight * label_loss
        pred_mask = torch.sigmoid(logits)
        return {
            "backward_loss": loss,
            "pred_mask": pred_mask,
            "pred_label": torch.sigmoid(score),
            "visual_loss": {"mask_loss": mask_loss, "label_loss": label_loss},
            "visual_image": {"inverted": 1 - pred_mask},
        }
