"""ObjectFormer beyond the published numbers: the threshold of the filter, other sizes, and ViT weights.

    pytest tests/test_object_former.py
"""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.object_former import HighFrequencyExtractor, ObjectFormer, boundary_sensitive
from reference.fill import inputs
from registry import UserError

REFERENCE = Path(__file__).parent / "reference"


def test_threshold_of_the_frequency_filter():
    """Of the case's two images 9125 of 98304 coefficients go, which moves pixels by 3.03e-4 (std), at most 1.96e-3."""
    extractor = HighFrequencyExtractor(128).double()
    image = torch.from_numpy(inputs(REFERENCE / "inputs128.npz")[0]).double()
    coefficients = extractor.transform @ image @ extractor.transform.T
    unfiltered = extractor.inverse @ coefficients @ extractor.inverse.T
    assert coefficients.numel() == 98304
    assert abs(int((coefficients.abs() <= 0.5).sum()) - 9125) <= 2  # the matrices are rounded to float32

    moved = HighFrequencyExtractor(128)(image.float()) - unfiltered
    assert moved.std(correction=0).item() == pytest.approx(3.03e-4, abs=1e-6)
    assert moved.abs().max().item() == pytest.approx(1.96e-3, abs=1e-5)


def test_frequency_filter_stays_float32_in_mixed_precision():
    torch.manual_seed(0)
    extractor, image = HighFrequencyExtractor(64), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = extractor(image)
    assert torch.equal(mixed, extractor(image))


@pytest.mark.parametrize("num_prototypes", [None, 7])
def test_any_number_of_prototypes(num_prototypes):
    model = ObjectFormer(64, num_prototypes, 1)
    assert len(model.encoder_decoders[0].encoder.object_prototypes) == (num_prototypes or 32)
    result = model(torch.randn(1, 3, 64, 64), torch.zeros(1, 1, 64, 64))
    result["backward_loss"].backward()
    assert result["pred_mask"].shape == (1, 1, 64, 64)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", [1, 1e-10])
def test_boundary_weight_is_a_mean_of_cosines(scale):
    """Compared pair by pair with torch's cosine; vectors near 0 show the 1e-8 under the norms."""
    torch.manual_seed(0)
    grid, tokens = 4, scale * torch.randn(1, 32, 768)
    cells = torch.cat([tokens[0, :16], tokens[0, 16:]], 1).view(grid, grid, 1536)
    weighted = boundary_sensitive(tokens, grid)[0].view(2, grid, grid, 768)
    for y, x in ((0, 0), (1, 2), (3, 1)):
        neighbours = cells[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].flatten(0, 1)
        weight = F.cosine_similarity(cells[y, x], neighbours, dim=-1, eps=1e-8).sum() / 81
        expected = weight * cells[y, x].view(2, 768)
        assert torch.allclose(weighted[:, y, x], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_eps_of_the_norms():
    """Another eps would be too small a change for the published numbers to show."""
    assert {m.eps for m in ObjectFormer(32, 4, 1).modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_sizes_name_the_flags():
    with pytest.raises(UserError, match="--image_size and --input_size"):
        ObjectFormer(64, 4, 1)(torch.zeros(1, 3, 64, 48), torch.zeros(1, 1, 64, 48))
    with pytest.raises(UserError, match="--input_size 100: "):
        ObjectFormer(100)


def vit_state(blocks):
    """Random weights with the names and shapes of timm's vit_base_patch16_224, without those that are not used."""
    shapes = {"pos_embed": (1, 197, 768), "cls_token": (1, 1, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
              "patch_embed.proj.bias": (768,)}
    for i in range(blocks):
        linears = (("attn.qkv", 2304, 768), ("attn.proj", 768, 768), ("mlp.fc1", 3072, 768), ("mlp.fc2", 768, 3072))
        for name, out, into in linears:
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (768,), f"blocks.{i}.{name}.bias": (768,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_vit_weights_fill_encoder_and_decoder(tmp_path):
    torch.manual_seed(0)
    state, path = vit_state(1), tmp_path / "vit.pth"
    torch.save(state, path)
    model = ObjectFormer(224, 4, 1, str(path))
    for block in (model.encoder_decoders[0].encoder, model.encoder_decoders[0].decoder):
        assert torch.equal(block.attn.k.weight, state["blocks.0.attn.qkv.weight"][768:1536])
        assert torch.equal(block.attn.v.bias, state["blocks.0.attn.qkv.bias"][1536:])
        assert torch.equal(block.mlp.fc2.weight, state["blocks.0.mlp.fc2.weight"])
    assert torch.equal(model.encoder_net_q[0].weight, state["patch_embed.proj.weight"])
    assert torch.equal(model.pos_encoding[:, 196:], state["pos_embed"][:, 1:])

    # The processed file, with q, k and v apart and positions of the model's own shape, is taken as it is.
    del state["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.bias"], state["cls_token"]
    attention = model.encoder_decoders[0].encoder.attn
    state |= {f"blocks.0.attn.{name}": value for name, value in attention.state_dict().items()}
    state["pos_embed"] = torch.randn(1, 50, 768)
    torch.save(state, path)
    again = ObjectFormer(80, 4, 1, str(path))
    assert torch.equal(again.encoder_decoders[0].decoder.attn.q.weight, attention.q.weight)
    assert torch.equal(again.pos_encoding, state["pos_embed"])

    with pytest.raises(UserError, match=r"--init_weight_path .*vit.pth: pos_embed .*\[1, 50, 768\].*\[1, 32, 768\]"):
        ObjectFormer(64, 4, 1, str(path))
    with pytest.raises(UserError, match="--init_weight_path .*vit.pth: .* missing, first blocks.1"):  # holds one block
        ObjectFormer(80, 4, 2, str(path))
