"""Mesorch beyond the common table: the gate, its frequency parts, the folded convolutions, and start weights.

    pytest tests/test_mesorch.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from models.dct import HighPass, LowPass, lowest_frequencies
from models.mesorch import Mesorch, folded
from models.mit import MiT
from reference.fill import fill, inputs
from registry import UserError

REFERENCE = Path(__file__).parent / "reference"


@torch.no_grad()
def test_gate_and_unfolded_maps_equal_published():
    """The weights of all pixels, and the maps that folding never makes."""
    folder = REFERENCE / "Mesorch"
    stored, meta = np.load(folder / "case.npz"), json.loads((folder / "meta.json").read_text())
    model = Mesorch().eval()
    state = fill(json.loads((folder / "keys.json").read_text()), **meta["fill"])
    model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=True)
    seen = {}
    for name in ("gate", "convnext.stages.3", "segformer.norm4"):
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    image, mask, _ = map(torch.from_numpy, inputs(REFERENCE / meta["inputs"]))
    model(image, mask)
    assert np.abs(seen["gate"].numpy() - stored["gate"]).max() <= meta["tolerance"]["gate"]
    s4 = seen["segformer.norm4"].transpose(1, 2).unflatten(2, (4, 4))
    for name, x in (("c4", seen["convnext.stages.3"]), ("s4", s4)):
        up = model.upsample.get_submodule(f"upsample{name}")(x)
        mean, std = stored[f"act/up_{name}"]
        assert max(abs(up.mean() - mean), abs(up.std() - std)) <= meta["tolerance"]["act_rel"] * max(abs(mean), std)


@pytest.mark.parametrize("size", [(40, 64), (31, 5)])
def test_frequency_parts(size):
    """The same with full transforms in float64, a square of coefficients set to 0."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size)
    rows, columns = (lowest_frequencies(side, side, "cpu").double() for side in size)
    assert torch.allclose(rows @ rows.T, torch.eye(size[0], dtype=torch.float64), atol=1e-6)
    high = rows @ image.double() @ columns.T
    low = high.clone()
    high[:, :, :int(0.3 * size[0]), :int(0.3 * size[1])] = 0
    low[:, :, size[0] - int(0.7 * size[0]):, size[1] - int(0.7 * size[1]):] = 0
    with torch.autocast("cpu", torch.bfloat16):  # stays float32
        parts = HighPass(0.3)(image), LowPass(0.7)(image)
    for part, coefficients in zip(parts, (high, low)):
        x = rows.T @ coefficients @ columns
        x = x - x.amin((1, 2, 3), keepdim=True)
        assert torch.allclose(part.double(), x / x.amax((1, 2, 3), keepdim=True), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.7])
def test_image_of_one_colour_is_no_noise(value):
    for module in (HighPass(0.05), LowPass(0.95)):
        part = module(torch.full((1, 3, 64, 64), value))
        assert part.isfinite().all() and part.max() < 0.1


def test_folded_convolutions():
    torch.manual_seed(0)
    x, pointwise = torch.randn(1, 6, 7, 8), [torch.nn.Conv2d(5, 9, 1), torch.nn.Conv2d(9, 2, 1)]
    for conv, function, options in ((torch.nn.Conv2d(6, 5, 3, padding=1), F.conv2d, {"padding": 1}),
                                    (torch.nn.ConvTranspose2d(6, 5, 4, 2, 1), F.conv_transpose2d,
                                     {"stride": 2, "padding": 1})):
        expected = torch.nn.Sequential(conv, *pointwise)(x)
        assert torch.allclose(function(x, *folded(conv, *pointwise), **options), expected, atol=1e-5)


def test_start_weights(tmp_path, monkeypatch):
    """Files fill the first three channels of the first convolutions; the others are random; biases are dropped."""
    path, create = tmp_path / "mit_b3.pth", timm.create_model
    state = MiT("b3").state_dict() | {"head.weight": torch.zeros(1000, 512)}
    torch.save(state, path)
    convnext = create("convnext_tiny")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: convnext)
    monkeypatch.setattr("models.weights.cached_weights", lambda config: None)
    stem = convnext.stem[0].weight.clone()
    model = Mesorch(str(path), conv_pretrain=True)
    for conv, start in ((model.convnext.stem[0], stem),
                        (model.segformer.patch_embed1.proj, state["patch_embed1.proj.weight"])):
        assert conv.bias is None and torch.equal(conv.weight[:, :3], start)
        assert conv.weight[:, 3:].std().item() == pytest.approx((2 / start[0].numel()) ** 0.5, rel=0.05)
    assert torch.equal(model.segformer.block4[2].mlp.fc2.weight, state["block4.2.mlp.fc2.weight"])

    del state["norm4.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="--seg_pretrain_path .*mit_b3.pth: 1 of .* missing, first norm4.bias"):
        Mesorch(str(path))
