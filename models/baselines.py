"""The plain backbones that IMDL-BenCo compares with: how far does a generic network get, with and without an extractor?

IMDL-BenCo: A Comprehensive Benchmark and Codebase for Image Manipulation Detection & Localization. Ma, Zhu, Su, Du,
Jiang, Tong, Lei, Yang, Pun, Lv, Zhou. NeurIPS 2024. https://arxiv.org/abs/2406.10580

Six networks, each alone and with one of five extractors (extractors.py): NAMES below. Transposed convolutions enlarge
the last feature map to the mask (the UNet has its own decoder). The extractor's maps are further channels of the first
convolution, but `*_vit` gives them patches of their own.

Input: RGB, ImageNet-normalised; published with --if_resizing at 1024, vit, vit16 and swin at 512. resnet, unet and
segformer take any size of at least 16 pixels: they pad to whole strides, repeating the last pixel, and crop. vit, vit16
and swin are built for the script's --image_size, which may be any multiple of 16, for swin of 32.
Licence: this file is MIT, written from descriptions of the networks. timm's weights (ResNet, ViT, Swin) are Apache-2.0,
those of SegFormer, mit_b2.pth, for non-commercial use (NVIDIA).

Kept from the published implementation because its checkpoints need it:
- nothing stands between the transposed convolutions of resnet, so its decoder is one linear map;
- with an extractor the first convolution has no bias, although the weights it starts from have one.
Differences from it, none of which changes a mask:
- the classifier of ViT and Swin, which nothing uses, is left out, so DDP needs no --find_unused_parameters; checkpoints
  with one (`head.*`) load;
- any size, where it needs whole strides or exactly 512;
- no weights are loaded by default; `unet` starts from random ones (published: from the Carvana UNet);
- positions start as ImageNet's, resampled in two dimensions, where it stretches the list of them;
- what extractors.py says about images of one colour; Bayar's kernel is written over in training only.
The image-level score (`pred_label`) is None, as published.
"""
from collections import OrderedDict
from itertools import pairwise
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from registry import MODELS, UserError

from .extractors import EXTRACTORS
from .mit import MiT, init_weights
from .weights import add_channels, timm_model

NAMES = """
    resnet     sobel_resnet     srm_resnet     bayar_resnet     fft_resnet     dct_resnet
    unet       sobel_unet       srm_unet       bayar_unet       fft_unet       dct_unet
    segformer  sobel_segformer  srm_segformer  bayar_segformer  fft_segformer  dct_segformer
    swin       sobel_swin       srm_swin       bayar_swin       fft_swin       dct_swin
    vit        sobel_vit        srm_vit        bayar_vit        fft_vit        dct_vit
    vit16      sobel_vit16      srm_vit16      bayar_vit16      fft_vit16      dct_vit16
"""


def decoder(*widths):
    """Transposed convolutions, each doubling the sides, with ReLUs between them."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Baseline(nn.Module):
    """Extractor, padding, loss: what the six networks share.

    A subclass has `logits`, from the image and the extractor's maps (B, 3 + n, H, W), H and W multiples of `stride`, to
    the mask's logits (B, 1, H, W).
    """

    extractor = ""  # a key of EXTRACTORS
    stride = 1  # pixels of the image per pixel of the coarsest map
    side = None  # the only height and width, if there is one

    def __init__(self, **options):
        super().__init__(**options)
        self.input_head = EXTRACTORS[self.extractor]() if self.extractor else None
        self.register_load_state_dict_pre_hook(drop_classifier)

    def widened(self, conv):
        """Return the network's first convolution with inputs for the extractor's maps."""
        return add_channels(conv, self.input_head.channels) if self.input_head else conv

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, H, W) float32, ImageNet-normalised; mask: (B, 1, H, W) float32 of 0 and 1. Returns a dict:
        backward_loss: binary cross-entropy; pred_mask: (B, 1, H, W) float32 probabilities; pred_label: None;
        visual_loss: predict_loss; visual_image: pred_mask. Raises UserError where the model needs another size.
        """
        height, width = image.shape[2:]
        name = type(self).__name__
        if self.side and (height, width) != (self.side, self.side):
            raise UserError(f"{name} was built with --image_size {self.side} and got a {height} x {width} image: "
                            "give --image_size the size of the images.")
        if min(height, width) < 16:
            raise UserError(f"{name} got a {height} x {width} image and needs at least 16 x 16 pixels: "
                            "give a larger --image_size.")
        x = torch.cat((image, self.input_head(image)), 1) if self.input_head else image
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        logits = self.logits(x)[..., :height, :width].float()
        loss = F.binary_cross_entropy_with_logits(logits, mask.float())
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}


def drop_classifier(module, state_dict, prefix, *args):
    """Take the unused classifier out of a published checkpoint before loading."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}head.")]:
        del state_dict[name]


class ResNet(Baseline):
    """ResNet-152 (https://arxiv.org/abs/1512.03385) without its last stage.

    Args:
        pretrained: start from ImageNet weights, which timm downloads
    """

    stride = 16

    def __init__(self, pretrained: bool = False):
        super().__init__()
        resnet = timm_model("resnet152", pretrained, "--pretrained", "give --no-pretrained")
        self.backbone = nn.Sequential(*list(resnet.children())[:7])
        self.backbone[0] = self.widened(self.backbone[0])
        self.deconv_model = nn.Sequential(
            *(nn.ConvTranspose2d(before, after, 4, 2, 1) for before, after in pairwise((1024, 256, 128, 64, 1))))

    def logits(self, x):
        return self.deconv_model(self.backbone(x))


def double_conv(before, after):
    """Two 3x3 convolutions with batch norm and ReLU: (B, before, H, W) -> (B, after, H, W)."""
    layers = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(OrderedDict(double_conv=nn.Sequential(*layers)))


class Up(nn.Module):
    """Double the sides of the coarse map and join it with the finer one of half as many channels."""

    def __init__(self, channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels // 2, 2, 2)
        self.conv = double_conv(channels, channels // 2)

    def forward(self, coarse, fine):
        x = self.up(coarse)
        rows, columns = fine.shape[2] - x.shape[2], fine.shape[3] - x.shape[3]  # 1 where the finer map's side is odd
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return self.conv(torch.cat((fine, x), 1))


class UNet(Baseline):
    """The network of U-Net (https://arxiv.org/abs/1505.04597), with batch norm and zero padding."""

    def __init__(self):
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.net = nn.Module()
        self.net.inc = double_conv(3, widths[0])
        for i, (fine, coarse) in enumerate(pairwise(widths), start=1):
            down = nn.Sequential(nn.MaxPool2d(2), double_conv(fine, coarse))
            self.net.add_module(f"down{i}", nn.Sequential(OrderedDict(maxpool_conv=down)))
        for i, coarse in enumerate(widths[:0:-1], start=1):
            self.net.add_module(f"up{i}", Up(coarse))
        self.net.outc = nn.Sequential(OrderedDict(conv=nn.Conv2d(widths[0], 1, 1, bias=False)))
        first = self.net.inc.double_conv
        first[0] = self.widened(first[0])

    def logits(self, x):
        net = self.net
        maps = [net.inc(x)]
        for down in (net.down1, net.down2, net.down3, net.down4):
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in (net.up1, net.up2, net.up3, net.up4):
            x = up(x, maps.pop())
        return net.outc(x)


class SegFormer(Baseline, MiT):
    """The encoder MiT-B2 of SegFormer (https://arxiv.org/abs/2105.15203).

    Args:
        pretrain_pth_path: file of MiT-B2 weights (mit_b2.pth of SegFormer, non-commercial)
    """

    stride = 32

    def __init__(self, pretrain_pth_path: Optional[str] = None):
        super().__init__(variant="b2")
        self.apply(init_weights)
        if pretrain_pth_path:
            self.load_imagenet(pretrain_pth_path, "--pretrain_pth_path")
        self.patch_embed1.proj = self.widened(self.patch_embed1.proj)
        self.deconv_model = decoder(512, 256, 128, 64, 32, 1)

    def logits(self, x):
        return self.deconv_model(MiT.forward(self, x)[-1])


class Fixed(Baseline):
    """A network of timm's that is built for one size of square images; `parts` of it are kept under their names."""

    def __init__(self, image_size, parts, *args, **options):
        if image_size % self.stride:
            raise UserError(f"--image_size {image_size}: {type(self).__name__} needs a multiple of {self.stride}.")
        super().__init__()
        self.side = image_size
        model = timm_model(*args, img_size=image_size, num_classes=0, **options)
        for part in parts:
            setattr(self, part, getattr(model, part))


class Swin(Fixed):
    """Swin-B with windows of 7 x 7 patches (https://arxiv.org/abs/2103.14030).

    Args:
        pretrained: start from ImageNet weights, which timm downloads
    """

    stride = 32

    def __init__(self, image_size: int = 512, pretrained: bool = False):
        # always_partition keeps the windows, and so the shapes of weights, for small images too.
        super().__init__(image_size, ("patch_embed", "layers", "norm"), "swin_base_patch4_window7_224", pretrained,
                         "--pretrained", "give --no-pretrained", always_partition=True)
        self.patch_embed.proj = self.widened(self.patch_embed.proj)
        self.deconv_model = decoder(1024, 256, 128, 64, 32, 1)

    def no_weight_decay(self):
        """Return the names of the parameters that weight decay leaves alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def logits(self, x):
        return self.deconv_model(self.norm(self.layers(self.patch_embed(x))).permute(0, 3, 1, 2))


class ViT16(Fixed):
    """ViT-B/16 (https://arxiv.org/abs/2010.11929).

    Args:
        pretrained: start from ImageNet weights, which timm downloads
    """

    stride = 16
    depth = 12  # blocks

    def __init__(self, image_size: int = 512, pretrained: bool = False):
        super().__init__(image_size, ("patch_embed", "cls_token", "pos_embed", "blocks", "norm"),
                         "vit_base_patch16_224", pretrained, "--pretrained", "give --no-pretrained")
        self.blocks = self.blocks[:self.depth]
        if self.input_head:
            self.add_extractor()
        self.deconv_model = decoder(768, 256, 128, 64, 1)

    def add_extractor(self):
        self.patch_embed.proj = self.widened(self.patch_embed.proj)

    def no_weight_decay(self):
        """Return the names of the parameters that weight decay leaves alone."""
        return {"cls_token", "pos_embed"}

    def tokens(self, x):
        """(B, 3 + n, S, S) -> patch tokens (B, N, 768), row by row; those of the extractor, if any, follow."""
        return self.patch_embed(x)

    def logits(self, x):
        grid = self.side // self.stride
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), self.tokens(x)), 1) + self.pos_embed
        tokens = self.norm(self.blocks(tokens))[:, 1:]
        x = tokens.unflatten(1, (-1, grid, grid)).sum(1)  # the sum over one or two tokens of a patch
        return self.deconv_model(x.permute(0, 3, 1, 2))


class ViT(ViT16):
    """The first 8 blocks of ViT-B/16 (https://arxiv.org/abs/2010.11929).

    The extractor's maps have tokens of their own, which follow those of the image; the two of a patch are added in the
    end.

    Args:
        pretrained: start from ImageNet weights, which timm downloads
    """

    depth = 8

    def add_extractor(self):
        self.feature_patch_embed = nn.Conv2d(self.input_head.channels, 768, self.stride, self.stride, bias=False)
        self.pos_embed = nn.Parameter(torch.cat((self.pos_embed, self.pos_embed[:, 1:]), 1).detach())

    def tokens(self, x):
        tokens = self.patch_embed(x[:, :3])
        if not self.input_head:
            return tokens
        return torch.cat((tokens, self.feature_patch_embed(x[:, 3:]).flatten(2).transpose(1, 2)), 1)


NETWORKS = {"resnet": ResNet, "unet": UNet, "segformer": SegFormer, "swin": Swin, "vit": ViT, "vit16": ViT16}

for name in NAMES.split():
    extractor, _, network = name.rpartition("_")
    base = NETWORKS[network]
    MODELS.register_module(name, type(name, (base,), {"extractor": extractor, "__doc__": base.__doc__}))
