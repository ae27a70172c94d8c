"""TruFor beyond the rows of test_models.py: confidence, Noiseprint++, inputs, what each phase trains, start weights.

    pytest tests/test_trufor.py
    NOISEPRINT=noiseprint++.th pytest tests/test_trufor.py      # checks the authors' released weights too
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mit import MiT
from models.noiseprint import Noiseprint
from models.trufor import Trufor
from reference.fill import fill, inputs
from registry import UserError

REFERENCE = Path(__file__).parent / "reference"
CASE = np.load(REFERENCE / "Trufor" / "case.npz")


@pytest.fixture(scope="module")
def model():
    """Phase 3 with the weights of the case, in eval mode."""
    keys, meta = (json.loads((REFERENCE / "Trufor" / file).read_text()) for file in ("keys.json", "meta.json"))
    model = Trufor(phase=3, input_range="imdlbenco").eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in fill(keys, **meta["fill"]).items()})
    return model


@pytest.fixture(scope="module")
def batch():
    image, mask, label = map(torch.from_numpy, inputs(REFERENCE / "inputs128.npz"))
    return {"image": image, "mask": mask, "label": torch.tensor([1, 0])}


def test_confidence_score_and_noise_equal_the_published_ones(model, batch):
    outputs = {}
    hooks = [model.model[name].register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
             for name in ("detection", "dncnn")]
    with torch.no_grad():
        result = model(**batch)
    for hook in hooks:
        hook.remove()
    assert np.abs(result["visual_image"]["confidence"].logit().numpy() - CASE["conf_logits"]).max() < 2e-4
    assert np.abs(outputs["detection"].numpy() - CASE["det_logits"]).max() < 2e-4
    assert np.abs(outputs["dncnn"][..., ::4, ::4].numpy() - CASE["noiseprint"]).max() < 2e-4


@pytest.mark.skipif("NOISEPRINT" not in os.environ, reason="NOISEPRINT names no file of the authors' weights")
def test_released_noiseprint_weights():
    """Against the network computed in float64; float32 differs from it by up to 5e-4."""
    stored, network = np.load(REFERENCE / "Trufor" / "noiseprint_case.npz"), Noiseprint().eval()
    network.load(os.environ["NOISEPRINT"], "NOISEPRINT")
    unit = torch.from_numpy(np.load(REFERENCE / "inputs128.npz")["image"].transpose(0, 3, 1, 2)) / 256
    normalised = torch.from_numpy(inputs(REFERENCE / "inputs128.npz")[0])
    for name, image, step in (("unit", unit, 1), ("imagenet", normalised, 4)):
        noise = network(image).double()
        assert np.abs(noise[..., ::step, ::step].numpy() - stored[f"{name}/full"]).max() < 3e-3
        assert np.abs(noise.mean((1, 2, 3)).numpy() - stored[f"{name}/mean"]).max() < 1e-3
        assert np.abs(noise.std((1, 2, 3), correction=0).numpy() - stored[f"{name}/std"]).max() < 1e-3


def test_noiseprint_computes_in_float32(model, batch):
    """Under autocast, and on a GPU without TF32, whose setting is restored."""
    network, settings, seen = model.model["dncnn"], torch.backends.cudnn.conv, []
    hook = network[0].register_forward_hook(lambda *args: seen.append(settings.fp32_precision))
    before = settings.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(batch["image"])
    hook.remove()
    assert torch.equal(mixed, network(batch["image"]))
    assert seen == ["ieee"] and settings.fp32_precision == before != "ieee"


def test_input_range(model, batch, monkeypatch):
    """authors: levels / 256 for Noiseprint++, the same normalised once for the encoder; imdlbenco: once and twice."""
    levels = torch.from_numpy(np.load(REFERENCE / "inputs128.npz")["image"].transpose(0, 3, 1, 2)) / 256
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = []
    hooks = [model.model[name].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
             for name in ("dncnn", "backbone")]
    for input_range, expected in (("authors", levels), ("imdlbenco", batch["image"])):
        monkeypatch.setattr(model, "input_range", input_range)
        with torch.no_grad():
            model.encode(batch["image"])
        assert torch.allclose(seen[-2], expected, atol=1e-6)
        assert torch.allclose(seen[-1], (expected - mean) / std, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_phase_3_trains_confidence_and_score_alone(model, batch):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.zero_grad()
    model.train()(**batch)["backward_loss"].backward()
    model.eval()
    trained = ("model.decode_head_conf.", "model.detection.")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == \
        {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == \
        {name for name, p in model.named_parameters() if name.startswith(trained)}
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"model.decode_head_conf.linear_fuse.1.{name}"
                       for name in ("running_mean", "running_var", "num_batches_tracked")}
    model.load_state_dict(before)


def test_losses_of_phase_3(model, batch):
    """The authors' by hand: pixels whose 15 x 15 are tampered or whose 11 x 11 are authentic count."""
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 40, 40))
    mask[0, 10:32, 5:] = 1
    tampered, confidence = rng.normal(size=(2, 2, 40, 40))
    score, label = np.array([0.3, -0.7]), np.array([1.0, 0.0])
    padded = np.pad(mask, ((0, 0), (7, 7), (7, 7)), constant_values=np.nan)
    total = count = 0
    for i, y, x in np.ndindex(mask.shape):
        window = padded[i, y:y + 15, x:x + 15]
        if np.nanmin(window) == 1 or np.nanmax(window[2:-2, 2:-2]) == 0:
            probability = 1 / (1 + np.exp(-tampered[i, y, x]))
            right = probability if mask[i, y, x] else 1 - probability
            total, count = total + (1 / (1 + np.exp(-confidence[i, y, x])) - right) ** 2, count + 1
    maps = [torch.from_numpy(x)[:, None] for x in (tampered, confidence, mask)]
    losses = model.losses(*maps[:2], torch.from_numpy(score), maps[2], torch.from_numpy(label))
    assert losses["loss_conf"].item() == pytest.approx(total / count)
    expected = (np.log1p(np.exp(-0.3)) * 0.5 / 0.7 + np.log1p(np.exp(-0.7)) * 0.5 / 0.3) / 2
    assert losses["loss_det"].item() == pytest.approx(expected)


def test_eps_of_the_norms(model):
    """Another eps would be too small a change for the published numbers to show."""
    eps = {name: m.eps for name, m in model.named_modules() if hasattr(m, "eps")}
    assert {e for name, e in eps.items() if "block" in name and ".attn." not in name} == {1e-6}
    assert {e for name, e in eps.items() if "backbone.norm" in name or "backbone.extra_norm" in name} == {1e-6}
    assert {e for name, e in eps.items() if "embed" in name or ".attn." in name or "FFMs" in name} == {1e-5}


def test_start_weights(model, tmp_path):
    """Noiseprint++ as released, SegFormer's file for both encoders, the authors' checkpoint without `model.`."""
    torch.manual_seed(0)
    noiseprint, encoder = Noiseprint().state_dict(), MiT("b2").state_dict()
    torch.save({"network": noiseprint, "global_step": 39}, tmp_path / "noiseprint.th")
    torch.save(encoder | {"head.weight": torch.zeros(1000, 512)}, tmp_path / "mit_b2.pth")
    started = Trufor(pretrained_noiseprint=str(tmp_path / "noiseprint.th"),
                     pretrained_mit_b2=str(tmp_path / "mit_b2.pth")).state_dict()
    for prefix, part in (("dncnn.", noiseprint), ("backbone.", encoder), ("backbone.extra_", encoder)):
        assert all(torch.equal(started[f"model.{prefix}{name}"], x) for name, x in part.items())

    state = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 100}, tmp_path / "trufor.pth.tar")
    phase3 = Trufor(phase=3, pretrained_phase2=str(tmp_path / "trufor.pth.tar"))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in phase3.state_dict().items())
    with pytest.raises(UserError, match="--pretrained_noiseprint .*mit_b2.pth: .* missing, first 0.weight"):
        Trufor(pretrained_noiseprint=str(tmp_path / "mit_b2.pth"))
