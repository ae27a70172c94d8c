"""Small models, each with a property that some test needs.

The fixture `repository` puts this file into models/ of a copy, and importing it registers them here.
"""
import os
import signal
import time
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import MODELS


@MODELS.register_module()
class RandomNet(nn.Module):
    """Batch norm (buffers) and dropout (random states), which a resumed run must restore."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
                                 nn.Conv2d(8, 1, 1))

    def forward(self, image, mask, *args, **kwargs):
        logits = self.net(image)
        loss = F.binary_cross_entropy_with_logits(logits, mask)
        return {"backward_loss": loss, "pred_mask": logits.sigmoid(),
                "pred_label": logits.sigmoid().amax(dim=(1, 2, 3))}


@MODELS.register_module()
class Stopped(RandomNet):
    """Gets SIGTERM in the `after`-th forward of evaluation, its own process or, with `parent`, torchrun; this rank then
    takes a second, the others are done."""

    def __init__(self, after: int = 0, parent: bool = False):
        super().__init__()
        self.after, self.parent = after, parent

    def forward(self, image, mask, *args, **kwargs):
        self.after -= not torch.is_grad_enabled()
        if self.after == 0 and not torch.is_grad_enabled():
            os.kill(os.getppid() if self.parent else os.getpid(), signal.SIGTERM)
            time.sleep(self.parent)
        return super().forward(image, mask)


@MODELS.register_module()
class Frozen(RandomNet):
    """With a frozen convolution, random or from a file, before the others."""

    def __init__(self, start_path: Optional[str] = None):
        super().__init__()
        self.net[0].requires_grad_(False)
        if start_path:
            self.net[0].load_state_dict(torch.load(start_path))


@MODELS.register_module()
class Tutorial(nn.Module):
    """The model of IMDL-BenCo's tutorial: required flags, logits as pred_mask, one pred_label for the whole batch."""

    def __init__(self, MyModel_Customized_param: int, pre_trained_weights: str) -> None:
        super().__init__()
        self.size, self.weights = MyModel_Customized_param, pre_trained_weights
        self.conv = nn.Conv2d(3, 1, 3, 1, 1)
        self.loss = nn.BCEWithLogitsLoss()

    def forward(self, image, mask, label, *args, **kwargs):
        pred_mask = self.conv(image)
        loss = self.loss(pred_mask, mask)
        return {"backward_loss": loss, "pred_mask": 9 * pred_mask, "pred_label": torch.mean(pred_mask),
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}


@MODELS.register_module()
class Red(nn.Module):
    """Predicts the red channel, so that a saved mask can be compared with its image; returns no other key."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image, mask, *args, **kwargs):
        return {"pred_mask": (image[:, :1] * 0.229 + 0.485) * self.weight}


@MODELS.register_module()
class LossOnly(nn.Module):
    """Returns the one key that training without evaluation needs, and a visual_loss of a name that might be taken; a
    constant `scale` of inf makes it diverge."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 1, 1), scale

    def forward(self, image, *args, **kwargs):
        return {"backward_loss": self.conv(image).mean() * self.scale,
                "visual_loss": {"plain_number": 0.5, "loss": 7.0}}


@MODELS.register_module()
class ScoreOnly(nn.Module):
    """Judges images and predicts no mask."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, image, mask, label, *args, **kwargs):
        score = self.linear(image.mean(dim=(2, 3)))[:, 0].sigmoid()
        return {"backward_loss": nn.functional.binary_cross_entropy(score, label.float()), "pred_label": score}


@MODELS.register_module()
class Only32(nn.Module):
    """Takes only images of 32 x 32 pixels; with `half` its mask has another size than the image."""

    def __init__(self, half: bool = False):
        super().__init__()
        self.linear, self.half = nn.Linear(3 * 32 * 32, 32 * 32), half

    def forward(self, image, mask, *args, **kwargs):
        logits = self.linear(image.flatten(1)).view(-1, 1, 32, 32)
        pred_mask = logits.sigmoid()[..., ::2, ::2] if self.half else logits.sigmoid()
        return {"backward_loss": F.binary_cross_entropy_with_logits(logits, mask), "pred_mask": pred_mask}


@MODELS.register_module()
class Edges(nn.Module):
    """Needs edge_mask, and leaves its absence to Python."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, image, edge_mask, **kwargs):
        return {"backward_loss": (self.conv(image) * edge_mask).mean()}


@MODELS.register_module()
class Root(nn.Module):
    """The loss is finite and its gradient is not: the square root of 0, at step `step` of epoch `epoch`. `exempt` are
    the parameters without weight decay."""

    def __init__(self, step: int = 0, exempt: str = "weight"):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        self.step, self.calls, self.exempt = step, 0, exempt

    def no_weight_decay(self):
        return {self.exempt}

    def forward(self, image, *args, **kwargs):
        self.calls += 1
        return {"backward_loss": (self.weight * (self.calls <= self.step)).square().sum().sqrt() + self.other.sum()}
