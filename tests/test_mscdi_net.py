"""MSCDI_Net beyond the rows of test_models.py: windows, upsampling, noise and fusion options, start weights.

    pytest tests/test_mscdi_net.py
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.mit import MiT
from models.mscdi_net import DynamicUpsample, GlobalLocalAttention, MSCDI_Net
from registry import UserError

SMALL = {"backbone": "mit_bit2", "glca": 1}


@pytest.mark.parametrize("channels, reduction, h, w", [(128, 2, 16, 8), (128, 2, 6, 10), (64, 1, 9, 5)])
def test_local_attention_follows_the_formula(channels, reduction, h, w):
    """Window by window; zero tokens fill up those at the border; then the published order, element by element."""
    torch.manual_seed(0)
    query = torch.randn(2, h * w, channels)
    key, value = torch.randn(2, 2, h // reduction * (w // reduction), channels)
    ours = GlobalLocalAttention(channels, reduction).attend_locally(query, key, value, (h, w))
    small = 8 // reduction
    for b in range(2):
        q = query[b].view(h, w, channels)
        k, v = (x[b].view(h // reduction, w // reduction, channels) for x in (key, value))
        local = torch.zeros(h, w, channels)
        for i in range(-(-h // 8)):
            for j in range(-(-w // 8)):
                rows, columns = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
                part = (slice(small * i, small * i + small), slice(small * j, small * j + small))
                k_part, v_part = (x[part].reshape(-1, channels) for x in (k, v))
                weight = (q[rows, columns] @ k_part.T / 8).exp()
                zeros = small ** 2 - len(k_part)  # each has the weight exp(0) and the value 0
                local[rows, columns] = weight @ v_part / (weight.sum(-1, keepdim=True) + zeros)
        flat = local.permute(2, 0, 1).flatten()
        n, c = np.ogrid[:h * w, :channels]
        assert torch.allclose(ours[b], flat[torch.from_numpy(n * channels + c)], atol=1e-5)


def test_upsampling_without_offsets_is_bilinear():
    torch.manual_seed(0)
    upsample, x = DynamicUpsample(8), torch.randn(2, 8, 5, 7)
    torch.nn.init.zeros_(upsample.offset_conv.weight)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(upsample(x), expected, atol=1e-5)


@pytest.mark.parametrize("noise_model, fusion_mode, names", [
    (None, 0, {"fusion_conv42.weight": (512, 1024, 1, 1), "fusion_conv31.bias": (320,)}),
    ("SRM", 1, {"SE_fusion42.SEBock.fc.0.weight": (32, 512), "SE_fusion_noise.SEBock.fc.2.weight": (128, 8),
                "NoiseExtractor.srm_conv.weight": (9, 3, 5, 5),
                "NoiseExtractor.downsample.2.proj.weight": (128, 256, 1, 1)}),
    ("Bayar", 2, {"interfuse_noise.cross_att1.gamma": (1,), "NoiseExtractor.bayar.weight": (1, 3, 5, 5),
                  "NoiseExtractor.downsample.0.proj.weight": (16, 4, 1, 1),
                  "NoiseExtractor.downsample.3.weight": (64,)}),
])
def test_options(noise_model, fusion_mode, names):
    torch.manual_seed(0)
    model = MSCDI_Net(noise_model=noise_model, fusion_mode=fusion_mode, **SMALL)
    state = model.state_dict()
    assert {name: tuple(state[name].shape) for name in names} == names
    batch = {"image": torch.randn(1, 3, 32, 512), "mask": torch.zeros(1, 1, 32, 512)}
    result = model(**batch, edge_mask=torch.ones(1, 1, 32, 512))
    result["backward_loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    if noise_model:
        assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 675 * (noise_model == "SRM")
        filters = next(model.NoiseExtractor.children())
        assert filters.weight.sum((1, 2, 3)).abs().max() < 1e-6
        with pytest.raises(UserError, match="--noise_model .* 512 pixels wide and got one of 480"):
            model.eval()(batch["image"][..., :480], batch["mask"][..., :480])


def test_noise_needs_a_fusion():
    with pytest.raises(UserError, match="--fusion_mode 0"):
        MSCDI_Net(noise_model="SRM", fusion_mode=0)


def test_eps_of_the_norms():
    """Another eps would be too small a change for the published numbers to show."""
    norms = {name: m.eps for name, m in MSCDI_Net(**SMALL).named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {eps for name, eps in norms.items() if "block" in name or "embed" in name} == {1e-5}
    assert {eps for name, eps in norms.items() if "block" not in name and "embed" not in name} == {1e-6}


def test_start_weights(tmp_path):
    """SegFormer's file fills the encoder; what the local branch adds keeps its own initial weights."""
    torch.manual_seed(0)
    encoder = MiT("b2").state_dict()
    torch.save(encoder | {"head.weight": torch.zeros(1000, 512)}, tmp_path / "mit_b2.pth")
    model = MSCDI_Net(backbone_weights_path=str(tmp_path / "mit_b2.pth"), **SMALL)
    started = model.segformer["segformer"].state_dict()
    assert all(torch.equal(started[name], x) for name, x in encoder.items())
    assert {name.split(".")[3] for name in started.keys() - encoder.keys()} == {"fusion"}
    with pytest.raises(UserError, match=r"--backbone_weights_path .*mit_b2.pth: .* missing, first block"):
        MSCDI_Net("mit_bit3", str(tmp_path / "mit_b2.pth"), glca=0)
