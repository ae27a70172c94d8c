"""SparseViT beyond the published numbers: groups of tokens, sizes, flags, and UniFormer weights.

    pytest tests/test_sparse_vit.py
"""
import pytest
import torch

from models.sparse_vit import SparseAttention, SparseViT
from registry import UserError

SMALL = {"depth": [1, 1, 15, 4], "embed_dim": [8, 8, 16, 16], "head_dim": 8}


@pytest.mark.parametrize("size", [(4, 6), (8, 2)])
def test_groups_are_as_a_mask_says(size):
    """Sparse attention is full attention in which a token sees those of its own residues only; maps need no square."""
    torch.manual_seed(0)
    sparse, full = SparseAttention(16, 8, 2), SparseAttention(16, 8, 2)
    full.load_state_dict(sparse.state_dict())
    x = torch.randn(2, size[0] * size[1], 16)
    y, x_ = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    group = (y % (size[0] // 2) * size[1] + x_ % (size[1] // 2)).flatten()
    q, k, v = full.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / 8 ** 0.5).masked_fill(group[:, None] != group, -torch.inf).softmax(3)
    expected = full.proj((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(sparse(x, size), expected, atol=1e-6)


def test_eps_of_the_norms():
    """Another eps of a layer norm would be too small a change for the published numbers to show."""
    norms = {name: x for name, x in SparseViT(**SMALL).named_modules() if isinstance(x, torch.nn.LayerNorm)}
    assert {x.eps for name, x in norms.items() if "patch_embed" in name} == {1e-5}
    assert {x.eps for name, x in norms.items() if "patch_embed" not in name} == {1e-6}


def test_image_of_another_size_is_padded():
    """It gives what the image with zeros at the right and bottom gives; the published flags pad to 512."""
    torch.manual_seed(0)
    model = SparseViT(**SMALL, s_blocks3=[16, 8, 4], s_blocks4=[8]).eval()
    assert model.step == 128 and SparseViT(**SMALL | {"depth": [1, 1, 20, 7]}).step == 512
    image, mask = torch.zeros(1, 3, 128, 256), torch.zeros(1, 1, 128, 256)
    image[:, :, :75, :130] = torch.randn(1, 3, 75, 130)
    with torch.no_grad():
        whole = model(image, mask)["pred_mask"]
        part = model(image[:, :, :75, :130], mask[:, :, :75, :130])["pred_mask"]
    assert torch.allclose(part, whole[:, :, :75, :130], atol=1e-6)


@pytest.mark.parametrize("args, message", [
    ({"depth": [5, 8, 21, 7]}, "--depth .*third 15 to 20"),
    ({"head_dim": 48}, "--embed_dim .*multiples of 48"),
    ({"s_blocks3": [8, 4, 2]}, "--s_blocks3 .*give 4 numbers from 1 to 32"),
    ({"s_blocks4": [2, 17]}, "--s_blocks4 .*give 2 numbers from 1 to 16"),
])
def test_wrong_flags(args, message):
    with pytest.raises(UserError, match=message):
        SparseViT(**args)


def test_uniformer_weights(tmp_path):
    """They stay as they are in the file; names may begin with `backbone.`; what UniFormer lacks may be missing."""
    torch.manual_seed(0)
    path = tmp_path / "uniformer.pth"
    start = SparseViT(**SMALL).encoder_net.state_dict()
    state = {f"backbone.{name}": torch.randn(x.shape) if x.is_floating_point() else x for name, x in start.items()
             if not name.startswith("norm") and "dwconv" not in name and "gamma" not in name}
    torch.save({"model": state | {"backbone.head.weight": torch.zeros(10, 16)}}, path)
    loaded = SparseViT(**SMALL, pretrained_path=str(path)).encoder_net.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("backbone.")], x) for name, x in state.items())

    del state["backbone.blocks3.7.attn.qkv.weight"]
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="--pretrained_path .*uniformer.pth: 1 of .* missing, first blocks3.7.attn.qkv"):
        SparseViT(**SMALL, pretrained_path=str(path))
