"""SPAN beyond the published numbers: shifts, start weights, and checkpoints without a decoder.

    pytest tests/test_span.py
"""
import numpy as np
import pytest
import torch

from checkpoint import load_weights
from models.mantranet import MantraNet
from models.span import SPAN, shift
from registry import UserError


@pytest.mark.parametrize("down, right", [(1, -2), (-3, 3), (81, 0), (0, -81)])
def test_shift(down, right):
    """Also farther than the image is wide."""
    x = np.random.default_rng(0).random((4, 6))
    expected = np.zeros_like(x)
    for row, column in np.ndindex(*x.shape):
        if 0 <= row + down < 4 and 0 <= column + right < 6:
            expected[row, column] = x[row + down, column + right]
    assert np.array_equal(shift(torch.from_numpy(x), down, right), expected)


def test_layers_steps():
    model = SPAN(layers_steps=[2, 5])
    assert [layer.distance for layer in model.pixel_attention] == [2, 5]
    model(torch.randn(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))["backward_loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_extractor_starts_from_its_file_or_from_mantranet(tmp_path):
    source, path = MantraNet(), tmp_path / "weights.pt"
    for content in (source.IMTFE.state_dict(), {"model": source.state_dict()}):
        torch.save(content, path)
        featex = SPAN(str(path), [1]).featex.state_dict()
        assert all(torch.equal(featex[name], x) for name, x in source.IMTFE.state_dict().items())
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="--weight_path .*weights.pt: 27 of 27 tensors are missing"):
        SPAN(str(path))


def test_without_residual_the_features_are_those_of_mantranet():
    torch.manual_seed(0)
    source, image = MantraNet().eval(), torch.randn(1, 3, 16, 16)
    for residual in (False, True):
        model = SPAN(residual=residual, layers_steps=[1]).eval()
        model.featex.load_state_dict(source.IMTFE.state_dict())
        with torch.no_grad():
            assert torch.equal(model.featex(image), source.IMTFE(image)) is not residual


def test_checkpoint_without_decoder_loads_with_a_note(tmp_path, capsys):
    torch.manual_seed(0)
    model, path = SPAN(layers_steps=[1]), tmp_path / "checkpoint-0.pth"
    state = {name: torch.randn_like(x) for name, x in model.state_dict().items() if not name.startswith("last_layer")}
    decoder = model.last_layer[0].weight.detach().clone()
    torch.save({"model": state}, path)
    load_weights(model, path, "--checkpoint_path")
    assert "no decoder (last_layer)" in capsys.readouterr().out
    assert torch.equal(model.last_layer[0].weight, decoder)
    assert torch.equal(model.outlier_trans.bias, state["outlier_trans.bias"])

    del state["outlier_trans.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match="outlier_trans.bias"):
        load_weights(model, path, "--checkpoint_path")
