"""MantraNet beyond the published numbers: borders, flat images, mixed precision and the Bayar filters' constraint.

    pytest tests/test_mantranet.py
"""
import numpy as np
import pytest
import torch

from models.filters import WholeBayarConv
from models.imtfe import IMTFE, mirror
from models.mantranet import MantraNet, local_mean


@pytest.mark.parametrize("size", [(2, 3), (5, 7)])
def test_mirror_repeats_the_edge(size):
    x = torch.randn(2, 3, *size)
    assert np.array_equal(mirror(x), np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="symmetric"))


def test_local_mean_divides_by_the_pixels_inside():
    """At a border, in the middle, and where the window is larger than the image."""
    x = torch.randn(1, 1, 12, 40, dtype=torch.float64)
    for side in (7, 31):
        means, half = local_mean(x, side)[0, 0], side // 2
        for row, column in ((0, 0), (5, 20), (11, 39)):
            window = x[0, 0, max(row - half, 0):row + half + 1, max(column - half, 0):column + half + 1]
            assert means[row, column].item() == pytest.approx(window.mean().item(), abs=1e-12)


@pytest.mark.parametrize("with_GRU", [False, True])
def test_flat_image_has_finite_gradients(with_GRU):
    """Its features have no deviation, and a negative lower bound doesn't raise it."""
    model = MantraNet(with_GRU=with_GRU)
    torch.nn.init.constant_(model.AnomalyDetector.sigma_F, -0.5)
    model.AnomalyDetector.adaptation.weight.data[:8] = 0  # rounding alone gives the others a deviation
    result = model(torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16))
    result["backward_loss"].backward()
    assert result["pred_mask"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_filters_stay_float32_in_mixed_precision():
    torch.manual_seed(0)
    net, seen = IMTFE().eval(), []
    net.middle_and_last_block[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.randn(1, 3, 16, 16)
    net(image)
    with torch.autocast("cpu", torch.bfloat16):
        features = net(image)
    assert torch.equal(*seen) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(1, 16, 16))


def test_whole_bayar_kernels_keep_their_constraint():
    """They sum to 0 with -1 in the centre; only training overwrites them; the centre has a gradient, as published."""
    conv = WholeBayarConv(2, 3)
    raw = conv.weight.detach().clone()
    assert raw.min() >= 0
    x = torch.randn(1, 2, 9, 9)
    outputs = []
    for training in (False, True):
        outputs.append(conv.train(training)(x))
        assert torch.equal(conv.weight, raw) is not training
    assert torch.equal(*outputs)
    assert conv.weight.sum((2, 3)).abs().max() < 1e-5 and (conv.weight[..., 2, 2] == -1).all()
    outputs[0].sum().backward()
    assert torch.allclose(conv.weight.grad[..., 2, 2], x[..., 2:-2, 2:-2].sum((2, 3)).expand(3, 2), atol=1e-5)
