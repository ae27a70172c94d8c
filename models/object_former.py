"""ObjectFormer for Image Manipulation Detection and Localization (CVPR 2022).

Junke Wang, Zuxuan Wu, Jingjing Chen, Xintong Han, Abhinav Shrivastava, Ser-Nam Lim, Yu-Gang Jiang.
https://arxiv.org/abs/2203.14681

Patch tokens of the image and of its frequency-filtered version pass through layers in which learned object prototypes
attend to the tokens, the tokens attend to the resulting objects, and each cell of the grid is weighted by its
similarity to its neighbours. Convolutions give the mask. Input: 224 x 224, resized (--if_resizing --image_size 224).
Published settings: lr 1e-4 to 5e-7, weight decay 0.05, 1100 epochs, batch 12 x accumulation 8.
Licence: timm's weights vit_base_patch16_224, which training can start from, are Apache 2.0.

The authors published no code. This is the network of IMDL-BenCo's reproduction, whose checkpoints load as they are. It
differs from the paper in its width (ViT-B), in having no image-level score and in these points, kept because its
weights depend on them:
- the "high-frequency" filter combines two transforms that do not invert each other, and drops only the coefficients
  up to 0.5, about a tenth;
- residuals start from the normalised input, so the tokens themselves are not carried on;
- the similarity is divided by 9 twice, so every layer shrinks its tokens at least 9 times;
- there is no activation between the convolutions of the head.
Differences from that code, none of which changes a number: any number of prototypes works; patch_size and embedding_dim
are not parameters, as only 16 and 768 fit the head; the filter is written as matrix products; what depends on the
prototypes alone is computed once per batch; the loss `lable_loss`, which is always 0, is left out.

Shapes: B images of S x S pixels, a grid of g x g patches, g = S/16, L = g*g; 2L tokens (image, then frequency) of
C = 768 numbers; P prototypes; n heads of d = C/n.
"""
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from registry import MODELS, UserError

from .vit import HEADS, PATCH, Mlp, resize_positions
from .weights import load_part, read_weights

DIM = 768
TIMM_GRID = 14  # the grid of a 224 x 224 image, which timm's position embeddings belong to


class HighFrequencyExtractor(nn.Module):
    """Transform each channel (a kind of DCT), drop the coefficients of magnitude 0.5 and less, transform back.

    forward: (B, 3, S, S) -> (B, 3, S, S) float32. The two transforms are matrices:
    D[k, n] = cos(pi k n / S) + cos(pi k (n + 1) / S),
    E[n, k] = w_k cos(pi n k / (S - 1)) / (2S - 2), w = 1 at both ends and 2 between.
    """

    def __init__(self, size):
        super().__init__()
        # The cosines have large arguments: in float32 the filtered image would be wrong by 1e-4.
        n = torch.arange(size, dtype=torch.float64)
        grid = math.pi * n[:, None] * n
        forward = torch.cos(grid / size) + torch.cos((grid + math.pi * n[:, None]) / size)
        weight = torch.full_like(n, 2)
        weight[[0, -1]] = 1
        inverse = weight * torch.cos(grid / (size - 1)) / (2 * size - 2)
        self.register_buffer("transform", forward.float(), persistent=False)
        self.register_buffer("inverse", inverse.float(), persistent=False)

    def forward(self, image):
        # Coefficients grow with S^2 and exceed float16's 65504; bfloat16 changes the mask visibly.
        with torch.autocast(image.device.type, enabled=False):
            coefficients = F.hardshrink(self.transform @ image.float() @ self.transform.T, 0.5)
            return self.inverse @ coefficients @ self.inverse.T


class Attention(nn.Module):
    """Multi-head attention of queries (b, Q, C) to keys (B, K, C); b = B, or 1 for queries that all images share."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(DIM, DIM)
        self.k = nn.Linear(DIM, DIM)
        self.v = nn.Linear(DIM, DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, queries, keys):
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, n, ., d)
                   for layer, x in ((self.q, queries), (self.k, keys), (self.v, keys)))
        x = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, Q, C)


class AttentionBlock(nn.Module):
    """Attention and MLP: queries (b, Q, C), b = B or 1, and keys (B, K, C) -> (B, Q, C).

    One norm serves both inputs, and the residuals start from the normalised queries.
    """

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-5)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM, eps=1e-5)
        self.mlp = Mlp(DIM)

    def forward(self, queries, keys):
        queries = self.norm1(queries)
        x = queries + self.attn(queries, self.norm1(keys))
        return x + self.mlp(self.norm2(x))


class ObjectEncoder(AttentionBlock):
    """The learned prototypes (P, C) attend to the tokens: (B, 2L, C) -> objects (B, P, C)."""

    def __init__(self, num_prototypes):
        super().__init__()
        self.object_prototypes = nn.Parameter(torch.randn(num_prototypes, DIM))

    def forward(self, tokens):
        return super().forward(self.object_prototypes[None], tokens)


def boundary_sensitive(tokens, grid):
    """Weight each cell of the grid by its mean cosine with its 3x3 neighbourhood, over 9: (B, 2L, C) -> (B, 2L, C).

    The vector of a cell holds both of its tokens; cells outside the grid count as 0. The mean of the cosines is the
    product of the cell's unit vector with the mean of its neighbours' unit vectors, which is an average pooling.
    """
    streams = tokens.unflatten(1, (2, grid, grid))  # (B, 2, g, g, C)
    cells = streams.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, 2C, g, g)
    unit = F.normalize(cells.float(), dim=1, eps=1e-8)
    similarity = (unit * F.avg_pool2d(unit, 3, 1, 1)).sum(1) / 9  # (B, g, g)
    return (streams * similarity[:, None, :, :, None]).flatten(1, 3)


class EncoderDecoder(nn.Module):
    """One layer: tokens (B, 2L, C) -> the same shape.

    The prototypes attend to the tokens, the tokens to the resulting objects; then comes the boundary-sensitive weight.
    """

    def __init__(self, num_prototypes, grid):
        super().__init__()
        self.grid = grid
        self.encoder = ObjectEncoder(num_prototypes)
        self.decoder = AttentionBlock()

    def forward(self, tokens):
        objects = self.encoder(tokens)  # (B, P, C)
        return boundary_sensitive(self.decoder(tokens, objects), self.grid)


def upsample(x):
    """(B, C, H, W) -> (B, C, 2H, 2W), bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


@MODELS.register_module()
class ObjectFormer(nn.Module):
    """Object prototypes and the patch tokens of the image and its frequencies attend to each other.

    Args:
        input_size: image side in pixels, a multiple of 16; give --image_size the same value
        num_prototypes: object prototypes per layer; default 2*(input_size/16)^2, one for each token
        num_layers: layers of encoder, decoder and boundary weighting
        init_weight_path: start weights: a file of a ViT-B/16, or the word timm (downloads vit_base_patch16_224)
    """

    def __init__(self, input_size: int = 224, num_prototypes: Optional[int] = None, num_layers: int = 8,
                 init_weight_path: Optional[str] = None):
        super().__init__()
        if input_size < PATCH or input_size % PATCH:
            raise UserError(f"--input_size {input_size}: ObjectFormer cuts the image into patches of {PATCH} x {PATCH} "
                            f"pixels; give a multiple of {PATCH}.")
        self.input_size = input_size
        self.grid = input_size // PATCH
        num_tokens = 2 * self.grid ** 2
        self.high_freq_extractor = HighFrequencyExtractor(input_size)
        self.encoder_net_r = nn.Sequential(nn.Conv2d(3, DIM, PATCH, PATCH))
        self.encoder_net_q = nn.Sequential(nn.Conv2d(3, DIM, PATCH, PATCH))
        self.pos_encoding = nn.Parameter(0.02 * torch.randn(1, num_tokens, DIM))
        self.encoder_decoders = nn.Sequential(
            *(EncoderDecoder(num_prototypes or num_tokens, self.grid) for _ in range(num_layers)))
        self.localization = nn.ModuleList(
            nn.Conv2d(*channels, 3, padding=1) for channels in ((2 * DIM, DIM), (DIM, DIM // 2), (DIM // 2, 1)))
        if init_weight_path:
            self.load_vit(init_weight_path)

    def load_vit(self, path):
        """Start from a ViT-B/16: block i fills encoder i and decoder i, both streams get its patches and positions.

        path: "timm" or a file, with q, k and v in one tensor or in three, and positions (1, 197, C) or (1, 2L, C).
        """
        state = as_published(read_weights(path, "--init_weight_path", timm_name="vit_base_patch16_224"), self.grid)
        parts = [("patch_embed.proj.", self.encoder_net_r[0]), ("patch_embed.proj.", self.encoder_net_q[0])]
        for i, layer in enumerate(self.encoder_decoders):
            parts += [(f"blocks.{i}.", layer.encoder), (f"blocks.{i}.", layer.decoder)]
        for prefix, module in parts:
            own = {prefix + name: x for name, x in module.state_dict().items()}
            load_part(own, state, f"--init_weight_path {path}", optional=("object_prototypes",))
        load_part({"pos_embed": self.pos_encoding.detach()}, state, f"--init_weight_path {path}")

    def forward(self, image, mask, *args, **kwargs):
        """Predict the manipulated area and compute the loss.

        image: (B, 3, S, S) float32, normalised; mask: (B, 1, S, S) float32 of 0 and 1. Returns a dict:
        backward_loss: binary cross-entropy; pred_mask: (B, 1, S, S) float32 probabilities; pred_label: None;
        visual_loss: predict_loss; visual_image: pred_mask. Raises UserError where S is not input_size, the size that
        the position encoding and the frequency filter are made for.
        """
        height, width = image.shape[2:]
        if height != self.input_size or width != self.input_size:
            raise UserError(f"ObjectFormer was built with --input_size {self.input_size} and got a {height} x {width} "
                            "image; give --image_size and --input_size the same value.")
        frequencies = self.high_freq_extractor(image)
        tokens = torch.cat([self.encoder_net_r(image), self.encoder_net_q(frequencies)], 2)  # (B, C, 2g, g)
        tokens = tokens.flatten(2).transpose(1, 2) + self.pos_encoding  # (B, 2L, C)
        tokens = self.encoder_decoders(tokens)

        # Channel 2c + s of the map is feature c of stream s.
        x = tokens.unflatten(1, (2, self.grid, self.grid)).permute(0, 4, 1, 2, 3).flatten(1, 2)  # (B, 2C, g, g)
        for convolution in self.localization:
            x = convolution(upsample(x))
        logits = upsample(x).float()  # (B, 1, S, S)

        loss = F.binary_cross_entropy_with_logits(logits, mask)
        pred_mask = logits.sigmoid()
        return {"backward_loss": loss, "pred_mask": pred_mask, "pred_label": None,
                "visual_loss": {"predict_loss": loss}, "visual_image": {"pred_mask": pred_mask}}


def as_published(state, grid):
    """Convert a state dict of timm's ViT to the form of the published start file; one of that form is left as it is.

    attn.qkv becomes attn.q, .k and .v. pos_embed (1, 197, C) becomes (1, 2L, C): the class token's entry is dropped,
    the rest is resampled to g x g (bicubic, antialiased) and given to both streams. The published recipe does not say
    how it was resampled; this is our reading.
    """
    result = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            result |= {name.replace(".qkv.", f".{part}."): third for part, third in zip("qkv", value.chunk(3))}
        elif name == "pos_embed" and value.shape[1] == 1 + TIMM_GRID ** 2:
            result[name] = resize_positions(value[:, 1:], (grid, grid), antialias=True).repeat(1, 2, 1)
        else:
            result[name] = value
    return result
