"""Grad-CAM: where a layer's features speak for what the model predicts.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
https://arxiv.org/abs/1610.02391. With A_k the maps of a layer and S the target, the map is ReLU(sum_k w_k A_k), where
w_k is the mean over the map of dS/dA_k.
"""
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from registry import UserError, nearest

PREFIX_TOKENS = 16  # at most: class and register tokens in front of a transformer's patches


class GradCam:
    """Records one layer while the model runs; `maps` then gives a map per image of the batch.

        with GradCam(model, "backbone.layer4") as cam:
            output = cam.run(**batch)
            maps = cam.maps(output, batch["shape"])

    Args:
        model: the bare module, left as it was found
        layer: name of a module in `named_modules()`; UserError where there is none
        target: "mask", the mean logit of pred_mask over the pixels where it is above 0.5 (over all pixels where there
            are none), or "label", the logit of pred_label
    """

    def __init__(self, model, layer, target="mask"):
        layers = [name for name, _ in model.named_modules() if name]
        if layer not in layers:
            outer = layer.rpartition(".")[0]
            inside = [name for name in layers if name.rpartition(".")[0] == (outer if outer in layers else "")]
            raise UserError(f"--gradcam {layer}: {type(model).__name__} has no such layer.{nearest(layer, layers)} "
                            f"Layers {f'in {outer}' if outer in layers else 'at the top'}: "
                            f"{', '.join(inside)}.")
        self.model, self.layer, self.target = model, layer, target
        self.outputs = []  # of the layer: one per time it runs in a forward, or more where it returns several

    def __enter__(self):
        self.hook = self.model.get_submodule(self.layer).register_forward_hook(self.record)
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def record(self, module, inputs, output):
        parts = output.values() if isinstance(output, dict) else output
        parts = parts if isinstance(parts, Iterable) and not torch.is_tensor(parts) else [parts]
        self.outputs += [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
        return output.clone() if torch.is_tensor(output) else None  # the next layer may write to what it gets

    def run(self, image, **batch):
        """Call the model with gradients and return its output."""
        self.outputs.clear()
        self.size = image.shape[-2:]
        with torch.enable_grad():
            # An image that needs gradients makes frozen layers record them too; not a leaf, which some models write to.
            return self.model(image=image.detach().requires_grad_().clone(), **batch)

    def score(self, output, valid):
        """Return S, summed over the batch, whose images don't depend on each other.

        Logits, because the gradient of a probability vanishes where the model is sure. What remains of the mean's
        denominator would scale the map alone, which is scaled anyway.
        """
        if self.target == "label":
            if output.get("pred_label") is None:
                raise UserError("--gradcam_target label: the model returns no pred_label; take mask.")
            return self.logits(output["pred_label"]).sum()
        pred = output["pred_mask"]
        region = (pred > 0.5) & valid
        region = torch.where(region.flatten(1).any(dim=1)[:, None, None, None], region, valid)
        return (self.logits(pred) * region).sum()

    @staticmethod
    def logits(pred):
        """Return what has the gradient of the logits of probabilities, also where these are rounded to 0 or 1."""
        if type(pred.grad_fn).__name__ == "SigmoidBackward0":  # whose own gradient is 0 there
            pred.grad_fn.register_hook(lambda inputs, outputs: outputs)
            return pred.double()
        return torch.logit(pred.double(), eps=1e-12)

    def maps(self, output, shape):
        """Return float32 (B, S, S) on the CPU, in 0..1 in each image's `shape` (H, W), 0 outside of it.

        A map is 0 everywhere where nothing in the layer speaks for the target. UserError where the layer's output is
        no map, or the target doesn't depend on it.
        """
        count, (height, width) = len(output["pred_mask"]), self.size
        rows, columns = torch.arange(height, device=shape.device), torch.arange(width, device=shape.device)
        valid = (rows[:, None] < shape[:, 0, None, None]) & (columns < shape[:, 1, None, None])  # (B, S, S)
        if not self.outputs:
            raise UserError(f"--gradcam {self.layer}: this layer doesn't run in evaluation, or returns no tensor; name "
                            "another.")
        total, reached = torch.zeros(count, height, width), False
        with torch.enable_grad():
            score = self.score(output, valid[:, None])
        needed = [part for part in self.outputs if part.requires_grad]
        gradients = torch.autograd.grad(score, needed, allow_unused=True) if score.requires_grad and needed else []
        for part, gradient in zip(needed, gradients):
            if gradient is None:  # a second output, say, that the target doesn't use
                continue
            reached = True
            features, gradient = self.as_map(part.detach(), count), self.as_map(gradient, count)
            weights = gradient.mean(dim=(2, 3), keepdim=True)
            cam = (weights * features).sum(dim=1, keepdim=True).relu()
            total += F.interpolate(cam, (height, width), mode="bilinear", align_corners=False)[:, 0].float().cpu()
        if not reached:
            raise UserError(f"--gradcam {self.layer}: the predicted {self.target} doesn't depend on this layer's "
                            "output, or the model runs the layer without gradients; name another.")
        self.outputs.clear()
        total *= valid.cpu()
        return total / total.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo().tiny)

    def as_map(self, x, count):
        """Bring (B, C, h, w), (B, h, w, C) or tokens (B, prefix + h*w, C) to (B, C, h, w) in float64.

        Inputs of the scripts are square, and so are their maps, which tells the layouts apart.
        """
        def fits(side, other):
            return side == other <= self.size[0]

        if x.ndim == 4 and len(x) == count and fits(*x.shape[2:]):
            return x.double()
        if x.ndim == 4 and len(x) == count and fits(*x.shape[1:3]):
            return x.double().permute(0, 3, 1, 2)
        if x.ndim == 3 and len(x) == count:
            side = math.isqrt(x.shape[1])
            sides = [n for n in range(side, 0, -1) if x.shape[1] - n * n <= PREFIX_TOKENS]
            for n in [*(n for n in sides if self.size[0] % n == 0), *sides][:1]:
                return x.double()[:, -n * n:].transpose(1, 2).unflatten(2, (n, n))
        raise UserError(f"--gradcam {self.layer}: its output of shape {tuple(x.shape)} is no map of {count} images: "
                        "(B, C, h, w), (B, h, w, C) or tokens (B, N, C); name a whole block or stage.")
