"""Backbone: any timm model that gives feature maps, with a decoder for the mask and an optional forensic extractor.

    python train.py --model Backbone --backbone vit_small_patch16_dinov3 --pretrained --extractor srm --if_resizing ...

The extractor's maps (models/extractors.py) enter the backbone beside the image: its first convolution has as many more
input channels. Decoders: the top-down sums of FPN (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR
2017, https://arxiv.org/abs/1612.03144) and the all-MLP of SegFormer (Xie et al., NeurIPS 2021,
https://arxiv.org/abs/2105.15203). Maps of 1/4 of the image's size and smaller are used; the levels of a plain ViT, all
of one size, are enlarged to such a pyramid.

Image sizes: any. The model pads to what the backbone takes, repeating the last pixel, and crops. Backbones of a fixed
size (Swin, ViT, ...) are built for --image_size; smaller images are padded to it.
Licence: this file is MIT; pretrained weights have the terms that timm's page of the name gives.
"""
import difflib
import logging
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from torch import nn

from data import MEAN, STD
from registry import MODELS, UserError

from .extractors import EXTRACTORS
from .weights import timm_model

WIDTH = 128  # channels of the decoder
FINEST = 4  # reduction of the decoder's finest map
logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of each classifier weight that feature maps don't need


def near_names(word):
    """Return timm's model names near `word`: those that hold it (without its tag), then those spelt like it."""
    word, known = word.lower(), timm.list_models(include_tags="." in word)
    stem = word.split(".")[0]
    holding = sorted((name for name in known if stem in name), key=lambda name: name.find(stem))
    return list(dict.fromkeys([*holding, *difflib.get_close_matches(word, known, n=50, cutoff=0.5)]))


def build_backbone(name, pretrained, **options):
    """Return timm's model `name` as one that gives feature maps (features_only), with more `options` of create_model.

    Raises UserError where timm has no such model, or its pretrained weights can't be had.
    """
    if name not in timm.list_models() and name not in timm.list_models(include_tags=True):
        near = ", ".join(near_names(name)[:5])
        raise UserError(f"--backbone {name}: timm {timm.__version__} has no such model."
                        + f" Did you mean one of these: {near}?" * bool(near))
    return timm_model(name, pretrained, "--pretrained", "give --no-pretrained", features_only=True, **options)


def feature_maps(backbone, image):
    """Return the list of maps (B, C, h, w) of a model that `build_backbone` made; some models keep channels last."""
    is_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    return [x.permute(0, 3, 1, 2) if is_last else x for x in backbone(image)]


def choose_levels(reductions):
    """Return the indices of the maps to decode, from the reduction of each: the last of each size from 1/4 down.

    Where all are of one size, as in a plain ViT: four, spread over the depth.
    """
    last = {reduction: i for i, reduction in enumerate(reductions) if reduction >= FINEST}
    if len(last) > 1:
        return list(last.values())
    return sorted({max(len(reductions) * k // 4 - 1, 0) for k in (1, 2, 3, 4)})


def plan(name, in_chans, image_size):
    """Return how to build a backbone: (options of `build_backbone`, multiple of the sides that it takes, fixed side or
    None, names of parameters that get no gradient).

    Tried on the meta device, which computes shapes and no values; raises whatever timm does where that fails.
    """
    with torch.device("meta"):
        info = build_backbone(name, False).feature_info
        levels = choose_levels(info.reduction(list(range(len(info)))))
        multiple = max(info.reduction(levels))
        side = -(-image_size // multiple) * multiple
        options = {"in_chans": in_chans, "out_indices": tuple(levels)}
        is_fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
        if is_fixed:
            options["img_size"] = side, side
        backbone = build_backbone(name, False, **options)
        sum(x.sum() for x in backbone(torch.empty(2, in_chans, side, side))).backward()
    unused = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    return options, multiple, side if is_fixed else None, unused


def can_be_built(*args):
    """Tell whether `plan` succeeds."""
    try:
        return bool(plan(*args))
    except Exception:  # timm raises many types
        return False


def refuse(name, in_chans, image_size, reason):
    """Raise UserError: timm can't run this backbone so, for `reason` (an exception); names what can be given."""
    own = timm.models.get_pretrained_cfg(name).input_size[-1]
    cures = [f"--image_size {own}"] * can_be_built(name, in_chans, own)
    cures += ["--extractor none"] * can_be_built(name, 3, image_size)
    family = timm.model_entrypoint(name).__module__  # whose other names fail too, most often
    near = [other for other in near_names(name) if timm.model_entrypoint(other).__module__ != family][:2]
    near = [other for other in near if can_be_built(other, in_chans, image_size)]
    raise UserError(f"--backbone {name}: timm {timm.__version__} can't give its feature maps for --image_size "
                    f"{image_size} and {in_chans} channels ({type(reason).__name__}); give "
                    f"{' or '.join([*cures, 'another name'])}, such as {', '.join(near) or 'resnet50'}.") from reason


def build_widened(name, pretrained, in_chans, **options):
    """Return `build_backbone` for more input channels than the image's 3.

    The pretrained weights of the first layer stay as they are, where timm's own in_chans would repeat and rescale them,
    and those of the new channels are 0: at first the network is the pretrained one. (Not quite where a model
    standardises the weights of its first layer, as NFNet does.)
    """
    wide = build_backbone(name, pretrained and in_chans == 3, in_chans=in_chans, **options)
    if pretrained and in_chans > 3:
        state = build_backbone(name, True, **options).state_dict()
        for key, value in wide.state_dict().items():
            if value.shape != state[key].shape:  # (out, in, ...); `in` is a multiple if the image's pixels are folded
                widened = torch.zeros_like(value)
                widened.unflatten(1, (-1, in_chans))[:, :, :3] = state[key].unflatten(1, (-1, 3))
                state[key] = widened
        wide.load_state_dict(state)
    return wide


class Decoder(nn.Module):
    """Maps (B, C_i, h_i, w_i), the finest first -> logits (B, 1, h, w), about a quarter of the image's sides.

    Args:
        kind: fpn or mlp
        channels: C_i
        reductions: of the image's sides in each map
    """

    def __init__(self, kind, channels, reductions):
        super().__init__()
        self.kind = kind
        # Maps coarser than 1/4, 1/8, ... are enlarged to these. The norms are there because the maps of the blocks of
        # pretrained ViTs differ in scale by orders of magnitude; they are of whole maps, since a norm of each pixel
        # would take away what differs between the regions of an image, such as the strength of its noise.
        factors = [max(reduction // (FINEST * 2 ** i), 1) for i, reduction in enumerate(reductions)]
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, count), nn.ConvTranspose2d(count, WIDTH, factor, stride=factor))
            for count, factor in zip(channels, factors))
        fuse = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if kind == "fpn" else nn.Conv2d(len(factors) * WIDTH, WIDTH, 1))
        self.fuse = nn.Sequential(fuse, nn.GroupNorm(1, WIDTH), nn.GELU())
        self.mask = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, maps):
        def enlarge(x, like):
            return F.interpolate(x, like.shape[-2:], mode="bilinear")

        maps = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        if self.kind == "fpn":
            x = maps[-1]
            for finer in maps[-2::-1]:
                x = finer + enlarge(x, finer)
        else:
            x = torch.cat([enlarge(x, maps[0]) for x in maps], 1)
        return self.mask(self.fuse(x))


@MODELS.register_module()
class Backbone(nn.Module):
    """The mask from a timm backbone's maps of several sizes, the image-level score from the mean of the deepest one.

    Args:
        backbone: any timm model with feature maps, also with the tag of its weights: convnext_tiny.in12k_ft_in1k
        extractor: forensic filter whose maps join the image in the backbone's first layer
        pretrained: start from the weights of this name, which timm downloads
        decoder: fpn sums the maps from coarse to fine, mlp joins all at the finest size
        image_size: side that a backbone of fixed size is built for
    """

    def __init__(self, backbone: str = "resnet50",
                 extractor: Literal["none", "sobel", "srm", "bayar", "fft", "dct"] = "none", pretrained: bool = False,
                 decoder: Literal["fpn", "mlp"] = "fpn", image_size: int = 512):
        super().__init__()
        self.extractor = None if extractor == "none" else EXTRACTORS[extractor]()
        in_chans = 3
        if self.extractor:
            in_chans += self.extractor.channels
            # An extractor's maps have scales of their own, from a thousandth to a thousand times that of the image.
            self.norm = nn.BatchNorm2d(self.extractor.channels)
        try:
            options, self.multiple, self.side, unused = plan(backbone, in_chans, image_size)
        except UserError:
            raise
        except Exception as error:  # timm raises many types
            refuse(backbone, in_chans, image_size, error)
        self.backbone = build_widened(backbone, pretrained, **options)
        for key in unused:  # so that DDP needs no --find_unused_parameters
            self.backbone.get_parameter(key).requires_grad_(False)
        channels = self.backbone.feature_info.channels()
        self.decoder = Decoder(decoder, channels, self.backbone.feature_info.reduction())
        self.head = nn.Sequential(nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], 1))
        # From the normalisation of all models here to that of this name's weights.
        config = timm.models.get_pretrained_cfg(backbone)
        mean, std, own_mean, own_std = (torch.tensor(x).view(3, 1, 1)
                                        for x in (MEAN, STD, config.mean, config.std))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, image, mask, label, shape_mask=None, *args, **kwargs):
        """Return the dict that models/mymodel.py describes; visual_loss has seg and cls.

        Raises UserError for an image larger than the --image_size that a backbone of fixed size was built for.
        """
        height, width = image.shape[2:]
        if self.side and max(height, width) > self.side:
            raise UserError(f"--image_size: the backbone was built for images of up to {self.side} pixels and got "
                            f"{height}x{width}; give --image_size {max(height, width)} when it is built.")
        x = image * self.scale + self.shift                                # (B, 3, H, W)
        if self.extractor:
            x = torch.cat((x, self.norm(self.extractor(image))), 1)
        down, right = (self.side - n if self.side else -n % self.multiple for n in (height, width))
        x = F.pad(x, (0, right, 0, down), mode="replicate")
        maps = feature_maps(self.backbone, x)
        logits = F.interpolate(self.decoder(maps), x.shape[2:], mode="bilinear")[..., :height, :width].float()
        score = self.head(maps[-1].mean(dim=(2, 3))).squeeze(1).float()    # (B,)
        seg_loss = F.binary_cross_entropy_with_logits(logits, mask, shape_mask)  # ignores padding
        cls_loss = F.binary_cross_entropy_with_logits(score, label.float())
        pred_mask = torch.sigmoid(logits)                                  # (B, 1, H, W)
        return {
            "backward_loss": seg_loss + cls_loss,
            "pred_mask": pred_mask,
            "pred_label": torch.sigmoid(score),
            "visual_loss": {"seg": seg_loss, "cls": cls_loss},
            "visual_image": {"pred_mask": pred_mask},
        }
