"""CAT-Net: Compression Artifact Tracing Network for Detection and Localization of Image Splicing.

Kwon, Yu, Nam, Lee. WACV 2021 (CAT-Net); as CAT-Net v2: Learning JPEG Compression Artifacts for Image Manipulation
Detection and Localization. Kwon, Nam, Yu, Lee, Kim. IJCV 130(8), 2022.
Paper: https://arxiv.org/abs/2108.12947    Original code and weights: https://github.com/mjkwon2021/CAT-Net
Licence of the original: code Apache-2.0, weights CC-BY-4.0 (research use only before August 2026); HRNet: MIT.

A two-stream HRNet. One stream sees the RGB image; the other sees the quantised luminance DCT coefficients of the JPEG
file with their quantisation table, and so the traces that a second compression leaves. A fifth stage merges both.
Input: 512x512 in training; any size in testing (the network pads to a multiple of 8 and crops).

`cat_net_post_func` reads the coefficients from the files (`pip install jpeglib`). They reveal most about JPEG images
that are not resampled: use --if_padding and no augmentation.

The authors' network and the one of IMDL-BenCo differ in their inputs; `input_range` chooses:
- authors: the RGB stream receives 0..255 scaled to -1..1, the DCT stream the coefficients of the file;
- imdlbenco: the RGB stream receives an ImageNet-normalised image as if it were 0..255 (nearly constant), the DCT stream
  the coefficients of that normalised image cast to bytes. Only for checkpoints that were trained this way.

Differences from the paper: none in the network. The yaml file of the original (`cfg_file`) is not a parameter: all that
it decided is written here. `pred_mask` is clamped to 0..1 after the bicubic enlargement. There is no image-level score
(`pred_label` is None), as published.
"""
import io
import tempfile
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import MEAN, STD, hear_decoder, is_complete, read_bytes, read_image
from log import as_text
from registry import MODELS, POSTFUNCS, UserError

from .hrnet import BN_MOMENTUM, BasicBlock, HRNet, Transition, conv_bn_relu, initialise, residual_layer, stage
from .weights import load_part, prepend_model, read_weights

BLOCK = 8  # side of a JPEG block in pixels
MAX_LEVEL = 20  # coefficients of this size and above share the last channel of the one-hot volume
# what the names of each stream's tensors start with
RGB_STREAM = ("conv", "bn", "layer1", "transition1", "stage2", "transition2", "stage3", "transition3", "stage4")
DCT_STREAM = "dc_"


def round_up(length):
    """Return the next multiple of 8: from the side of an image to that of its coefficient plane."""
    return -(-length // BLOCK) * BLOCK


def one_hot_volume(coefficients):
    """One-hot code of each coefficient's magnitude, 0, 1, .., 19, >= 20: (B, H, W) -> (B, 21, H, W) float32."""
    levels = coefficients.abs().clamp(max=MAX_LEVEL)
    channels = torch.arange(MAX_LEVEL + 1, device=levels.device, dtype=levels.dtype)
    return (levels[:, None] == channels[:, None, None]).float()


def rearrange_blocks(x, tables):
    """Make each of the 64 frequencies of a block a channel; append the same channels times their quantisation steps.

    x (B, C, H, W), tables (B, 8, 8) -> (B, 2 * 64 * C, H/8, W/8). Channel c * 64 + u * 8 + v is frequency (u, v) of
    channel c, u vertical.
    """
    x = F.pixel_unshuffle(x, BLOCK)  # (B, C*64, H/8, W/8)
    steps = tables.flatten(1).repeat(1, x.shape[1] // BLOCK**2)  # (B, C*64)
    return torch.cat((x, x * steps[:, :, None, None]), dim=1)


class TwoStreamHRNet(HRNet):
    """RGB stream (HRNet-W48), DCT stream (three branches of HRNet) and the stage that merges them."""

    def __init__(self):
        rgb = (48, 96, 192, 384)
        dct = (96, 192, 384)
        merged = (48, 96 + 96, 192 + 192, 384 + 384)
        last = (24, 48, 96, 192)
        super().__init__(rgb, stem_stride=2, num_bottlenecks=4, num_modules=(1, 4, 3))  # the RGB stream

        # DCT stream; with dilation 8 a kernel sees one frequency in neighbouring blocks
        self.dc_layer0_dil = nn.Sequential(
            nn.Conv2d(MAX_LEVEL + 1, 64, 3, padding=BLOCK, dilation=BLOCK),
            nn.BatchNorm2d(64, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
        )
        self.dc_layer1_tail = conv_bn_relu(64, 4, 1)
        self.dc_layer2 = residual_layer(BasicBlock, 2 * 64 * 4, dct[0], num_blocks=4)
        self.dc_transition2 = Transition(dct[:1], dct[:2])
        self.dc_stage3 = stage(3, dct[:2])
        self.dc_transition3 = Transition(dct[:2], dct)
        self.dc_stage4 = stage(2, dct)

        # both
        self.transition4 = Transition(merged, last)
        self.stage5 = stage(1, last)
        self.last_layer = nn.Sequential(
            nn.Conv2d(sum(last), sum(last), 1),
            nn.BatchNorm2d(sum(last), momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
            nn.Conv2d(sum(last), 2, 1),
        )
        initialise(self)

    def dct_stream(self, coefficients, tables):
        """(B, H, W) and (B, 8, 8) -> maps of 96, 192, 384 channels at 1/8, 1/16, 1/32."""
        x = self.dc_layer0_dil(one_hot_volume(coefficients))  # (B, 64, H, W)
        x = self.dc_layer1_tail(x)  # (B, 4, H, W)
        x = rearrange_blocks(x, tables)  # (B, 512, H/8, W/8)
        maps = self.dc_transition2([self.dc_layer2(x)])
        maps = self.dc_transition3(self.dc_stage3(maps))
        return self.dc_stage4(maps)

    def forward(self, rgb, coefficients, tables):
        """Return logits (B, 2, H/4, W/4), channel 1 for manipulated; H and W are multiples of 8.

        rgb (B, 3, H, W) is in -1..1; its stream gives maps of 48, 96, 192, 384 channels at 1/4, 1/8, 1/16, 1/32.
        """
        finest, *others = super().forward(rgb)
        traces = self.dct_stream(coefficients, tables)
        merged = [finest] + [torch.cat(pair, dim=1) for pair in zip(others, traces)]
        maps = self.stage5(self.transition4(merged))
        size = maps[0].shape[-2:]
        maps = maps[:1] + [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:]]
        return self.last_layer(torch.cat(maps, dim=1))  # 360 channels -> 2


class PixelLoss(nn.Module):
    """Cross-entropy with weight 0.5 for authentic and 2.5 for manipulated pixels; -1 in the mask is ignored."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.5]), ignore_index=-1)

    def forward(self, logits, target):
        """logits (B, 2, h, w) are enlarged to target (B, H, W) int64 in {-1, 0, 1}; returns a scalar."""
        return self.criterion(F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False), target)


@MODELS.register_module()
class Cat_Net(nn.Module):
    """CAT-Net.

    Checkpoints of IMDL-BenCo load as they are; so do the authors' own, CAT_full_v1.pth.tar and CAT_full_v2.pth.tar,
    whose names lack the prefix `model.`.

    Args:
        input_range: what the two streams receive: "authors" as the paper says (image in 0..255, coefficients of the
            file), "imdlbenco" what IMDL-BenCo's published checkpoint was trained with (see models/cat_net.py)
        pretrained_rgb: start weights of the RGB stream: a file of HRNet-W48 trained on ImageNet
            (hrnetv2_w48_imagenet_pretrained.pth), or the word timm (downloads hrnet_w48)
        pretrained_dct: start weights of the DCT stream: a file trained to detect double compression (DCT_djpeg.pth.tar)
    """

    def __init__(self, input_range: Literal["authors", "imdlbenco"] = "authors",
                 pretrained_rgb: Optional[str] = None, pretrained_dct: Optional[str] = None):
        super().__init__()
        self.input_range = input_range
        self.model = TwoStreamHRNet()
        self.loss = PixelLoss()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(rename_original)
        if pretrained_rgb:
            self.load_stream(RGB_STREAM, "--pretrained_rgb", pretrained_rgb, timm_name="hrnet_w48")
        if pretrained_dct:
            self.load_stream(DCT_STREAM, "--pretrained_dct", pretrained_dct)

    def load_stream(self, stream, flag, path, timm_name=None):
        """Load the tensors whose names start with `stream` from the weights that `flag` gives."""
        own = {name: x for name, x in self.model.state_dict().items() if name.startswith(stream)}
        # files from before 2018 have no counters of batches
        load_part(own, read_weights(path, flag, timm_name), f"{flag} {path}", optional=("num_batches_tracked",))

    def prepare(self, image, mask, coefficients, shape_mask):
        """Scale the image, mark what the loss ignores, and pad all of them to multiples of 8 at the right and bottom.

        Returns rgb (B, 3, H8, W8) float32, target (B, H8, W8) int64 and coefficients (B, H8, W8).
        """
        target = mask[:, 0].long()
        if self.input_range == "imdlbenco":
            rgb = (image - 127.5) / 127.5  # although `image` is in about -2..2: what the published weights expect
        else:
            rgb = 2 * (image * self.std + self.mean) - 1
            if shape_mask is not None:  # the authors pad with grey (0 here) and ignore the padding in the loss
                rgb = rgb * shape_mask
                target = target.masked_fill(shape_mask[:, 0] == 0, -1)

        def pad(x, value):
            height, width = round_up(image.shape[-2]), round_up(image.shape[-1])
            return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)

        return pad(rgb, 0.0), pad(target, -1), pad(coefficients, 0)

    def forward(self, image, mask, DCT_coef, qtables, shape_mask=None, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        Args:
            image: (B, 3, H, W) float32, ImageNet-normalised
            mask: (B, 1, H, W), 1 = manipulated
            DCT_coef: (B, H, W), or with H and W rounded up to multiples of 8: quantised luminance coefficients, laid
                out like the image: element (8y+u, 8z+v) is frequency (u, v), u vertical, of block (y, z)
            qtables: (B, 8, 8) luminance quantisation tables, rows are vertical frequencies
            shape_mask: (B, 1, H, W), 1 on the image and 0 on padding; None without padding

        Returns a dict: backward_loss scalar; pred_mask (B, 1, H, W) float32 probabilities; pred_label None;
        visual_loss {"predict_loss": scalar}; visual_image {"pred_mask": (B, 1, H, W)}.
        """
        rgb, target, coefficients = self.prepare(image, mask, DCT_coef, shape_mask)
        logits = self.model(rgb, coefficients, qtables.float()).float()  # (B, 2, H8/4, W8/4)
        loss = self.loss(logits, target)

        probability = logits.softmax(dim=1)[:, 1:]
        pred_mask = F.interpolate(probability, target.shape[-2:], mode="bicubic", align_corners=False)
        pred_mask = pred_mask[..., :image.shape[-2], :image.shape[-1]].clamp(0, 1)  # bicubic overshoots a little
        return {
            "backward_loss": loss,
            "pred_mask": pred_mask,
            "pred_label": None,
            "visual_loss": {"predict_loss": loss},
            "visual_image": {"pred_mask": pred_mask},
        }


def rename_original(module, state_dict, prefix, *args):
    """Turn the authors' names (`conv1.weight`) into ours (`model.conv1.weight`) before loading; add the loss weight."""
    if prefix + "conv1.weight" not in state_dict:
        return
    prepend_model(state_dict, prefix)
    state_dict[f"{prefix}loss.criterion.weight"] = module.loss.criterion.weight


def read_plane(path):
    """Return the quantised coefficients of a JPEG file's first plane, their quantisation table and the colour space.

    The coefficients are int16, laid out like the image with both sides rounded up to multiples of 8 (see
    `Cat_Net.forward`); the table is int32 (8, 8), rows are vertical frequencies; the colour space is libjpeg's name of
    it, by the markers and component ids of the file. Raises OSError where libjpeg can't read the file.
    """
    try:
        import jpeglib
    except ImportError:
        raise UserError("Cat_Net needs the library jpeglib to read DCT coefficients: pip install jpeglib.") from None

    def read():
        jpeg = jpeglib.read_dct(path)
        return jpeg.Y, jpeg.qt[jpeg.quant_tbl_no[0]], jpeg.jpeg_color_space.name

    (blocks, table, space), _ = hear_decoder(read)  # what libjpeg has to say was said when the image was decoded
    rows, columns = blocks.shape[:2]
    return blocks.transpose(0, 2, 1, 3).reshape(BLOCK * rows, BLOCK * columns), table.astype(np.int32), space


def read_plane_of(content):
    """Return `read_plane` of the bytes of a JPEG file; jpeglib reads from a path only, whose name is valid text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.jpg")
        path.write_bytes(content)
        return read_plane(path)


def read_file(path):
    """Return `read_plane` of a file, or None if it isn't a JPEG file with luminance; UserError if it is damaged.

    Grey and YCbCr files have one. The first plane of RGB, CMYK and YCCK files is red, cyan or an inverse of the
    luminance, so they count as images without a JPEG history.
    """
    data = read_bytes(path)
    if data[:3].tobytes() != b"\xff\xd8\xff":
        return None
    if not is_complete(data):
        read_image(path)  # refuses what is truncated, which libjpeg would fill, and not what has a trailer for an end
    try:
        plane, table, space = read_plane(path) if as_text(path) == path else read_plane_of(data)
    except OSError:
        raise UserError(f"{path}: this JPEG file is damaged. Replace it or take it out of the dataset.") from None
    return (plane, table) if space in ("JCS_GRAYSCALE", "JCS_YCbCr") else None


def compress(pixels, **options):
    """Compress pixels (H, W, 3) uint8 RGB with Pillow's JPEG `options`.

    Returns the JPEG file as a stream, then the coefficients and the table that `read_plane` reads from it.
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream, *read_plane_of(stream.getbuffer())[:2]


def normalised_bytes(image):
    """Normalise an image (H, W, 3) uint8 as ImageNet and cast it back to uint8, as IMDL-BenCo does.

    The cast truncates toward zero and takes the result modulo 256, so only the values 0, 1, 2, 254 and 255 are left.
    """
    normalised = (np.arange(256)[:, None] / 255 - MEAN) / STD  # (256, 3)
    table = normalised.astype(np.int32).astype(np.uint8)
    return table[image, np.arange(3)]


@POSTFUNCS.register_module()
def cat_net_post_func(data_dict, input_range: Literal["authors", "imdlbenco"] = "authors"):
    """Add the DCT coefficients that CAT-Net reads to one sample, in place.

    Added: DCT_coef int16 of the size of the image, both sides rounded up to multiples of 8 (a block that the edge of
    the image cuts is kept whole), zero on padding; qtables int32 (8, 8); DCT_from_file 1 if both are those of the file,
    else 0.

    authors: an image that holds the very pixels of a grey or YCbCr JPEG file (`pristine`) gets that file's
    coefficients. Any other (PNG; a JPEG file in RGB, CMYK or YCCK, whose first plane is no luminance) is compressed at
    quality 100 without chroma subsampling; as in the authors' code, `image` becomes what that JPEG
    decodes to (a copy; levels change by 1 or 2), so that both streams see the same image.
    imdlbenco: the whole image, padding included, is normalised, cast to bytes and compressed at quality 75. These
    coefficients hold no trace of the file's history, but IMDL-BenCo's published checkpoint needs them.
    """
    image = data_dict["image"]
    if input_range == "imdlbenco":
        _, plane, table = compress(normalised_bytes(image), quality=75)
        data_dict.update(DCT_coef=plane, qtables=table, DCT_from_file=0)
        return

    height, width = (int(length) for length in data_dict["shape"])
    found = read_file(data_dict["path"]) if data_dict["pristine"] else None
    if found and (found[0].shape[0] < height or found[0].shape[1] < width):  # the luminance is subsampled
        found = None
    data_dict["DCT_from_file"] = int(found is not None)
    if found is None:
        stream, *found = compress(image[:height, :width], quality=100, subsampling=0)
        data_dict["image"] = image.copy()
        data_dict["image"][:height, :width] = np.asarray(Image.open(stream))

    plane, data_dict["qtables"] = found
    plane = plane[:round_up(height), :round_up(width)]
    room = round_up(image.shape[0]) - plane.shape[0], round_up(image.shape[1]) - plane.shape[1]
    data_dict["DCT_coef"] = np.pad(plane, ((0, room[0]), (0, room[1])))
