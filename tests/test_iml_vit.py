"""IML_ViT beyond the published numbers: other image sizes than it was built for, and MAE weights.

    pytest tests/test_iml_vit.py
"""
import os
import subprocess

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from models.iml_vit import Attention, IML_ViT
from registry import UserError

SMALL = {"input_size": 64, "embed_dim": 48, "fpn_channels": 8}


def resized_row(table, side):
    """The table of offsets resized to 2*side-1 entries by hand: linear, half-pixel centres, ends repeated."""
    count, old = 2 * side - 1, len(table)
    at = np.clip((np.arange(count) + 0.5) * old / count - 0.5, 0, None)
    low = np.floor(at).astype(int)
    part = (at - low)[:, None]
    return table[low] * (1 - part) + table[np.minimum(low + 1, old - 1)] * part


@pytest.mark.parametrize("h, w", [(5, 5), (3, 7)])
def test_attention_follows_the_formula_at_any_grid(h, w):
    """Compared with the matrix of all logits; 5 is the side that the tables are made for."""
    torch.manual_seed(0)
    attention, d = Attention(48, 5).double(), 4
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, h, w, 48, dtype=torch.float64)
    q, k, v = attention.qkv(x).detach().reshape(2, h * w, 3, 12, d).permute(2, 0, 3, 1, 4).numpy()
    rel_h = resized_row(attention.rel_pos_h.detach().numpy(), h)
    rel_w = resized_row(attention.rel_pos_w.detach().numpy(), w)
    y, x_ = np.divmod(np.arange(h * w), w)
    offsets = rel_h[y[:, None] - y + h - 1] + rel_w[x_[:, None] - x_ + w - 1]  # (query, key, d)
    logits = q @ k.swapaxes(-1, -2) / 2 + np.einsum("bnqd,qkd->bnqk", q, offsets)
    result = torch.from_numpy(logits).softmax(-1) @ torch.from_numpy(v)  # (B, heads, tokens, d)
    expected = attention.proj(result.transpose(1, 2).reshape(2, h, w, 48))
    assert torch.allclose(attention(x), expected, atol=1e-10)


@pytest.mark.parametrize("h, w", [(14, 14), (16, 16), (5, 20)])
def test_positions_are_resized_bicubically(h, w):
    encoder = IML_ViT(**SMALL).encoder_net
    encoder.blocks = torch.nn.ModuleList()
    torch.nn.init.zeros_(encoder.patch_embed.proj.weight)
    torch.nn.init.zeros_(encoder.patch_embed.proj.bias)
    with torch.no_grad():
        positions = encoder(torch.randn(1, 3, 16 * h, 16 * w))[0].permute(1, 2, 0)
    grid = encoder.pos_embed.detach()[0, 1:].reshape(14, 14, 48).numpy()
    assert np.allclose(positions, cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC), atol=1e-5)


def test_incomplete_patches_are_padded_and_cropped():
    torch.manual_seed(0)
    model = IML_ViT(**SMALL).eval()
    image = torch.randn(2, 3, 75, 100)
    with torch.no_grad():
        pred = model(image, torch.zeros(2, 1, 75, 100))["pred_mask"]
        padded = model(F.pad(image, (0, 12, 0, 5)), torch.zeros(2, 1, 80, 112))["pred_mask"]
    assert torch.allclose(pred, padded[:, :, :75, :100], atol=1e-6)


def test_eps_of_the_norms():
    """Another eps would be too small a change for the published numbers to show."""
    assert {m.eps for m in IML_ViT(**SMALL).modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("norm", ["LN", "IN"])
def test_other_head_norms(norm):
    model = IML_ViT(predict_head_norm=norm, **SMALL)
    names = {name for name in model.state_dict() if name.startswith("predict_head.norm.")}
    assert len(names) == {"LN": 2, "IN": 5}[norm]
    x = torch.randn(2, 3, 64, 64)
    model(x, torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64))["backward_loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mae_weights_load(tmp_path):
    """A file as MAE publishes it: class token and last norm left over, no relative positions."""
    torch.manual_seed(0)
    encoder = IML_ViT(**SMALL).encoder_net.state_dict()
    state = {name: torch.randn_like(x) for name, x in encoder.items() if "rel_pos" not in name}
    left_over = {"cls_token": torch.zeros(1, 1, 48), "norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
    path = tmp_path / "mae.pth"
    torch.save({"model": state | left_over}, path)
    loaded = IML_ViT(vit_pretrain_path=str(path), **SMALL).encoder_net.state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in state.items())
    assert all(not x.any() for name, x in loaded.items() if "rel_pos" in name)

    with pytest.raises(UserError, match=r"--vit_pretrain_path .*mae.pth: .*\[1, 197, 48\].*\[1, 197, 96\]"):
        IML_ViT(vit_pretrain_path=str(path), **SMALL | {"embed_dim": 96})


@pytest.mark.parametrize("content", [None, b"not weights", [1], {"model": {"a": 1}}, {"head.weight": torch.zeros(1)}])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match="--vit_pretrain_path .*weights.pth"):
        IML_ViT(vit_pretrain_path=str(path), **SMALL)


@pytest.mark.parametrize("launcher, variable, flag", [
    ("iml_vit", "MAE", "--vit_pretrain_path"), ("span", "IMTFE", "--weight_path"),
    ("mesorch", "MIT", "--seg_pretrain_path"), ("mscdi_net", "MIT_B4", "--backbone_weights_path"),
    ("sparse_vit", "UNIFORMER", "--pretrained_path"), ("trufor", "MIT_B2", "--pretrained_mit_b2"),
    ("dinov3_iml", "DINOV3", "--dinov3_weights_path"),
    ("baseline", "MIT", "--pretrain_pth_path")])
def test_launchers_need_no_starting_weights_to_resume(tmp_path, launcher, variable, flag):
    def run(*flags, **env):
        done = subprocess.run(["sh", str(ROOT / "runs" / f"train_{launcher}.sh"), *flags], capture_output=True,
                              text=True, cwd=tmp_path,
                              env={"PATH": os.environ["PATH"], "PYTHON": "echo", "DATA": "d", "TEST": "t",
                                   "MODEL": "srm_segformer", **env})  # which only train_baseline.sh reads
        return done.returncode, done.stdout + done.stderr

    for flags in (["--resume", "auto"], ["--lr", "1", "--resume=auto"]):
        code, printed = run(*flags)
        assert code == 0 and flag not in printed and printed.rstrip().endswith(" ".join(flags))
    assert f"{flag} my weights.pth --" in run("--resume", "auto", **{variable: "my weights.pth"})[1]
    code, printed = run("--lr", "1", **({"NOISEPRINT": "n"} if launcher == "trufor" else {}))
    assert code != 0 and f"set {variable} to " in printed and "--model" not in printed
