"""MVSS-Net: Image Manipulation Detection by Multi-View Multi-Scale Supervision.

Xinru Chen, Chengbo Dong, Jiaqi Ji, Juan Cao, Xirong Li, ICCV 2021, https://arxiv.org/abs/2104.06832
(journal version MVSS-Net++, TPAMI 2022, https://arxiv.org/abs/2112.08935).

Two ResNet-50 streams: the RGB stream learns the boundaries of manipulated areas from its four stages (Sobel attention,
shallow to deep), the noise stream sees the image through a constrained convolution. Dual attention (position and
channel) fuses their last features into the mask; the image-level score is the mask's maximum.

Input: RGB, ImageNet-normalised; published at 512x512 with --if_resizing --edge_mask_width 7. Any other size works.
Licence: this file is MIT, written from the paper. The authors' repository has no licence file;
checkpoints published for IMDL-BenCo (CC BY 4.0) load with strict=True.

Kept from the published implementation because its checkpoints and losses need it:
- the grey value of the noise stream gives red the usual weight of blue, and blue that of red;
- the loss of the score applies a sigmoid to it, although it is a probability already.
Differences from it, none of which changes a number:
- the score is the maximum over the whole mask even if that is not square; sizes need not be multiples of 16;
- Sobel attention sums the channels before filtering, and its square root has a finite gradient everywhere;
- attention is fused; Sobel, constrained convolution, attention and losses stay in float32 under autocast;
- the classifiers (`fc`) of both ResNets are in the state dict but frozen, so DDP needs no --find_unused_parameters;
- `visual_image` shows the predicted boundary. There are no auxiliary heads (`aux`: they reached no output and no loss)
  and no parameters for which only one value works (`nclass`, `n_input`).
"""
import torch
import torch.nn.functional as F
from torch import nn

from registry import MODELS, UserError

from .filters import SOBEL_X, SOBEL_Y, BayarConv, SobelConv
from .losses import dice_loss
from .weights import timm_model

STAGES = (256, 512, 1024, 2048)  # channels of c1..c4, at H/4, H/8, H/16, H/16


def resize(x, size):
    """Resize bilinearly, corner pixels on corner pixels, to `size` (H, W)."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def resnet50(pretrained):
    """timm's ResNet-50 with the last stage at stride 1, dilations 1, 2, 4; ImageNet weights (V1) if `pretrained`."""
    network = timm_model("resnet50.tv_in1k", pretrained, "--pretrained_base", "give --no-pretrained_base",
                         output_stride=16, zero_init_last=False)
    last = network.layer4[2].conv2  # timm gives it dilation 2
    last.dilation = last.padding = (4, 4)
    network.fc.requires_grad_(False)
    return network


class BoundaryBlock(nn.Module):
    """Edge residual block (ERB): a 1x1 convolution to one map, refined by two 3x3 convolutions with a shortcut."""

    def __init__(self, channels, relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 1, 1)
        self.conv2 = nn.Conv2d(1, 1, 3, padding=1)
        self.bn = nn.BatchNorm2d(1)
        self.conv3 = nn.Conv2d(1, 1, 3, padding=1)
        self.relu = relu

    def forward(self, x):
        x = self.conv1(x)  # (B, 1, H, W)
        x = x + self.conv3(F.relu(self.bn(self.conv2(x))))
        return F.relu(x) if self.relu else x


class PositionAttention(nn.Module):
    """Each position attends to the positions most like it; the products are not scaled as usual."""

    def __init__(self, channels):
        super().__init__()
        self.conv_b = nn.Conv2d(channels, channels // 8, 1)  # query
        self.conv_c = nn.Conv2d(channels, channels // 8, 1)  # key
        self.conv_d = nn.Conv2d(channels, channels, 1)  # value
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # the products are not scaled down
            x = x.float()
            query, key, value = (conv(x).flatten(2).transpose(1, 2) for conv in (self.conv_b, self.conv_c, self.conv_d))
            out = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, HW, C)
            return self.alpha * out.transpose(1, 2).reshape_as(x) + x


class ChannelAttention(nn.Module):
    """Each channel attends to the channels least like it: softmax over the negated products of channels."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # the products are sums over all positions
            x = x.float()
            maps = x.flatten(2)  # (B, C, HW)
            # softmax(row maximum - products) is softmax(-products)
            out = F.scaled_dot_product_attention(-maps, maps, maps, scale=1.0)
            return self.beta * out.reshape_as(x) + x


def conv_bn_relu(channels, out_channels):
    """3x3 convolution, batch norm, ReLU: (B, channels, H, W) -> (B, out_channels, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DualAttentionHead(nn.Module):
    """Sum of position and channel attention, then mask logits at H/16: (B, C, h, w) -> (B, 1, h, w)."""

    def __init__(self, channels):
        super().__init__()
        inner = channels // 4
        self.conv_p1 = conv_bn_relu(channels, inner)
        self.conv_c1 = conv_bn_relu(channels, inner)
        self.pam = PositionAttention(inner)
        self.cam = ChannelAttention()
        self.conv_p2 = conv_bn_relu(inner, inner)
        self.conv_c2 = conv_bn_relu(inner, inner)
        self.out = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(inner, 1, 1))

    def forward(self, x):
        position = self.conv_p2(self.pam(self.conv_p1(x)))  # (B, C/4, h, w)
        channel = self.conv_c2(self.cam(self.conv_c1(x)))  # (B, C/4, h, w)
        return self.out(position + channel)


@MODELS.register_module()
class MVSSNet(nn.Module):
    """MVSS-Net.

    Args:
        sobel: weight the RGB stream's features by their Sobel gradient before the boundary blocks
        if_label: train the image-level score too: 0.16 mask + 0.04 score + 0.8 edge loss (else 0.2 mask + 0.8 edge)
        constrain: use the noise stream, which sees the image through the constrained convolution
        pretrained_base: start both ResNets from ImageNet weights, which timm downloads
    """

    def __init__(self, sobel: bool = True, if_label: bool = True, constrain: bool = True,
                 pretrained_base: bool = False):
        super().__init__()
        self.sobel = sobel
        self.if_label = if_label
        self.constrain = constrain
        self.model = resnet50(pretrained_base)
        for i, channels in enumerate(STAGES, start=1):
            self.add_module(f"erb_db_{i}", BoundaryBlock(channels))
            if sobel:
                self.add_module(f"sobel_x{i}", nn.Sequential(SobelConv(channels, SOBEL_X), nn.BatchNorm2d(1)))
                self.add_module(f"sobel_y{i}", nn.Sequential(SobelConv(channels, SOBEL_Y), nn.BatchNorm2d(1)))
        self.erb_trans_1 = BoundaryBlock(1)
        self.erb_trans_2 = BoundaryBlock(1)
        self.erb_trans_3 = BoundaryBlock(1, relu=False)
        if constrain:
            self.constrain_conv = BayarConv(1, 3)
            self.noise_extractor = nn.ModuleDict({"model": resnet50(pretrained_base)})
        self.head = DualAttentionHead(STAGES[3] * (2 if constrain else 1))

    def sobel_attention(self, i, x):
        """Weight all channels of c_i by the sigmoid of their sum's gradient magnitude: (B, C, h, w) -> same."""
        if not self.sobel:
            return x
        with torch.autocast(x.device.type, enabled=False):  # the filtered sums leave the range of float16
            total = x.float().sum(1, keepdim=True)
            gx = self.get_submodule(f"sobel_x{i}")(total)  # (B, 1, h, w)
            gy = self.get_submodule(f"sobel_y{i}")(total)
            # the clamp changes no value; where both are 0 it makes the gradient 0 instead of NaN
            magnitude = (gx.square() + gy.square()).clamp_min(1e-24).sqrt()
            return x * magnitude.sigmoid().to(x.dtype)

    def boundary_branch(self, c1, c2, c3, c4):
        """Shallow to deep: each stage refines the boundary found so far. Returns logits (B, 1, H/4, W/4)."""
        size = c1.shape[2:]
        edge = self.erb_db_1(self.sobel_attention(1, c1))
        edge = self.erb_trans_1(edge + resize(self.erb_db_2(self.sobel_attention(2, c2)), size))
        edge = self.erb_trans_2(edge + resize(self.erb_db_3(self.sobel_attention(3, c3)), size))
        return self.erb_trans_3(edge + resize(self.erb_db_4(self.sobel_attention(4, c4)), size))

    def noise_stream(self, image):
        """Last features of the noise stream: (B, 3, H, W) -> (B, 2048, H/16, W/16)."""
        # red has the usual weight of blue, and blue that of red, as in the published checkpoints
        grey = 0.1140 * image[:, 0:1] + 0.5870 * image[:, 1:2] + 0.2989 * image[:, 2:3]
        return self.noise_extractor["model"].forward_features(self.constrain_conv(grey))

    def forward(self, image, mask, label, edge_mask=None, *args, **kwargs):
        """Compute the predictions and losses of a batch.

        Args:
            image: (B, 3, H, W) float32, RGB, ImageNet-normalised
            mask: (B, 1, H, W), 1 = manipulated
            label: (B,), 1 = manipulated
            edge_mask: (B, 1, H, W), 1 = boundary band of the mask; only training needs it, for the edge loss

        Returns:
            dict of `backward_loss`, scalar; `pred_mask`, (B, 1, H, W) probabilities; `pred_label`, (B,) probabilities;
            `visual_loss`, name -> scalar; `visual_image`, name -> (B, 1, H, W) probabilities, of the mask and its edge
        """
        if edge_mask is None and self.training:
            raise UserError("MVSSNet trains with an edge loss and the batch has no edge_mask; set --edge_mask_width 7.")
        size = image.shape[2:]
        # (B, 256, H/4, W/4), (B, 512, H/8, W/8), (B, 1024, H/16, W/16), (B, 2048, H/16, W/16)
        c1, c2, c3, c4 = self.model.forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)
        edge = resize(self.boundary_branch(c1, c2, c3, c4).float(), size).sigmoid()
        views = torch.cat((c4, self.noise_stream(image)), dim=1) if self.constrain else c4  # (B, 4096 or 2048, ...)
        pred_mask = resize(self.head(views).float(), size).sigmoid()
        pred_label = pred_mask.amax((1, 2, 3))

        losses = {"predict_loss": dice_loss(pred_mask, mask)}
        # this applies a second sigmoid, to a probability, as published
        losses["label_loss"] = F.binary_cross_entropy_with_logits(pred_label, label.float())
        if self.if_label:
            combined = 0.16 * losses["predict_loss"] + 0.04 * losses["label_loss"]
        else:
            combined = 0.2 * losses["predict_loss"]
        if edge_mask is not None:
            losses["edge_loss"] = dice_loss(edge, edge_mask)
            combined = combined + 0.8 * losses["edge_loss"]
        return {
            "backward_loss": combined,
            "pred_mask": pred_mask,
            "pred_label": pred_label,
            "visual_loss": {**losses, "combined_loss": combined},
            "visual_image": {"pred_mask": pred_mask, "pred_edge": edge},
        }
