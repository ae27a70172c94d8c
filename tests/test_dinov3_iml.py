"""DINOv3_IML beyond the rows of test_models.py: what each --finetune trains, LoRA, start weights, other checkpoints.

    pytest tests/test_dinov3_iml.py
"""
import argparse
import math

import numpy as np
import pytest
import timm
import torch

from conftest import run_here
from gradcam import GradCam
from models.dinov3_iml import DINOv3_IML
from registry import UserError
from test_models import MODEL_CASES, REFERENCE, dinov3_names, make_batch, rows, zoo  # noqa: F401

CASE = next(case for case in MODEL_CASES if case.name == "DINOv3_IML")  # LoRA of rank 4, its B not 0


def build(state, **flags):
    """A ViT-S in eval mode on the tensors of a state dict, without drawing random ones first."""
    with torch.device("meta"):
        model = DINOv3_IML("dinov3_vits16", **flags)
    model.load_state_dict(state, assign=True)
    return model.eval()


def without_lora(model):
    return {name: x for name, x in model.state_dict().items() if "lora_" not in name}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("size, rank, millions", [
    ("s", 32, 1.42), ("s", 64, 2.01), ("b", 32, 4.50), ("b", 64, 5.68), ("l", 32, 9.05), ("l", 64, 12.19)])
def test_published_numbers_of_parameters(size, rank, millions):
    with torch.device("meta"):
        model = DINOv3_IML(f"dinov3_vit{size}16", lora_rank=rank)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert round(sum(counts[name] for name in trained(model)) / 1e6, 2) == millions
    assert all("qkv.lora_" in name or name.startswith("seg_head.") for name in trained(model))
    assert sum(n for name, n in counts.items() if name.startswith("backbone.") and "lora_" not in name) == {
        "s": 21586944, "b": 85641216, "l": 303079424}[size]


@rows([CASE])
@torch.no_grad()
def test_lora_is_an_update_of_the_weight(zoo):
    """Merged into the weight it gives the same masks; by default alpha is twice the rank; with B = 0 there is none."""
    model, batch = zoo[1], make_batch(CASE, 32, 48, count=1)
    masks = model(**batch)["pred_mask"]
    merged = without_lora(model)
    for i, block in enumerate(model.backbone.blocks):
        qkv = block.attn.qkv
        merged[f"backbone.blocks.{i}.attn.qkv.weight"] = qkv.weight + 2 * qkv.lora_B @ qkv.lora_A
    assert torch.allclose(build(merged, finetune="full")(**batch)["pred_mask"], masks, atol=1e-5)
    plain = build(without_lora(model), finetune="frozen")(**batch)["pred_mask"]
    assert (plain - masks).abs().max() > 0.01
    assert torch.equal(build(model.state_dict(), lora_rank=4, lora_alpha=0.0)(**batch)["pred_mask"], plain)
    no_update = {name: torch.zeros_like(x) if "lora_B" in name else x for name, x in model.state_dict().items()}
    assert torch.equal(build(no_update, lora_rank=4)(**batch)["pred_mask"], plain)


@rows([CASE])
def test_loss_without_an_edge_mask(zoo):
    stored = np.load(REFERENCE / "DINOv3_IML" / "case.npz")["noedge/backward_loss"]
    result = zoo[1](**make_batch(CASE) | {"edge_mask": None})
    assert result["visual_loss"]["edge_loss"] == 0
    assert result["backward_loss"].item() == pytest.approx(float(stored), rel=1e-5)


@rows([CASE])
def test_positions_are_stretched_anew_in_every_block_of_a_training_step(zoo):
    """By exp(u), u uniform in [-ln 2, ln 2]; not where the backbone is frozen, which isn't differentiated either."""
    batch = make_batch(CASE, 32, 48, count=1)
    for finetune in ("lora", "full", "frozen"):
        state = {name: x.clone() for name, x in zoo[1].state_dict().items() if finetune == "lora" or "lora" not in name}
        model = build(state, finetune=finetune, lora_rank=4)
        tables, passed = [], []
        for block in model.backbone.blocks:
            block.register_forward_pre_hook(lambda block, x, named: tables.append(named["rope"]), with_kwargs=True)
        model.backbone.norm.register_forward_hook(lambda module, args, out: passed.append(out.requires_grad))
        for training in (False, True):
            torch.manual_seed(0)
            result = model.train(training)(**batch)
        assert passed == 2 * [finetune != "frozen"] and len(tables) == 24
        factors = [table.asin()[0, 15] / tables[0].asin()[0, 15] for table in tables]  # of the smallest angle
        torch.manual_seed(0)
        draws = [torch.empty(1).uniform_(-math.log(2), math.log(2)).exp() for _ in range(12 * (finetune != "frozen"))]
        expected = torch.cat(12 * [torch.ones(1)] + (draws or 12 * [torch.ones(1)]))
        assert torch.allclose(torch.stack(factors), expected, rtol=1e-4)
        result["backward_loss"].backward()
        assert trained(model) == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert finetune != "full" or len(trained(model)) == len(list(model.parameters()))


@rows([CASE])
def test_start_weights(zoo, tmp_path, monkeypatch):
    """Meta's file with what we drop and periods as they come; timm's weights have neither biases nor periods."""
    state = {name.removeprefix("backbone."): x for name, x in dinov3_names(without_lora(zoo[1])).items()
             if name.startswith("backbone.")}
    bias = torch.arange(1152.0)
    state |= {"rope_embed.periods": state["rope_embed.periods"].bfloat16(), "local_cls_norm.weight": torch.ones(384),
              "blocks.1.attn.qkv.bias": bias, "blocks.2.attn.qkv.bias_mask": torch.full((1152,), math.nan)}
    torch.save(state, tmp_path / "dinov3.pth")
    own = zoo[1].backbone.state_dict()
    backbone = DINOv3_IML("dinov3_vits16", str(tmp_path / "dinov3.pth"), lora_rank=4).backbone.state_dict()
    changed = {name for name, x in backbone.items() if "lora" not in name and not torch.equal(x, own[name])}
    assert changed == {"rope.periods", "blocks.1.attn.qkv.bias"}
    assert torch.equal(backbone["rope.periods"], own["rope.periods"].bfloat16().float())
    assert torch.equal(backbone["blocks.1.attn.qkv.bias"], bias * state["blocks.1.attn.qkv.bias_mask"])
    torch.save(state | {"cls_token": torch.zeros(1, 1, 768)}, tmp_path / "dinov3.pth")
    with pytest.raises(UserError, match="--dinov3_weights_path .*dinov3.pth: cls_token has shape .* 768. where .* 384"):
        DINOv3_IML("dinov3_vits16", str(tmp_path / "dinov3.pth"))

    create, asked = timm.create_model, []
    monkeypatch.setattr("models.weights.cached_weights", lambda config: None)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, pretrained_cfg_overlay, **options: asked.append(
        (name, pretrained)) or create(name, **options))
    backbone = DINOv3_IML("dinov3_vits16", "timm").backbone
    assert asked == [("vit_small_patch16_dinov3.lvd1689m", True)]
    assert torch.allclose(backbone.rope.periods, 100 ** (torch.arange(16) / 16))


def test_gradcam_of_a_frozen_backbone():
    model = DINOv3_IML("dinov3_vits16", finetune="frozen").eval()
    with GradCam(model, "backbone.blocks.11") as cam:
        output = cam.run(image=torch.randn(1, 3, 32, 32), mask=torch.zeros(1, 1, 32, 32))
        assert cam.maps(output, torch.tensor([[32, 32]])).shape == (1, 32, 32)


@rows([CASE])
def test_published_checkpoints(zoo, images, tmp_path):
    """As upstream's trainer saves them: names of DINOv3 and peft, a Namespace, no flags of the model."""
    path, state = tmp_path / "upstream.pth", dinov3_names(zoo[1].state_dict())
    torch.save({"model": state, "epoch": 3, "scaler": {}, "optimizer": {},
                "args": argparse.Namespace(model="DINOv3ForensicsLoRA", if_resizing=True, image_size=48)}, path)
    flags = ["--model", "DINOv3_IML", "--dinov3_model_type", "dinov3_vits16", "--checkpoint_path", path,
             "--test_data_json", images, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    done = run_here("test.py", *flags, "--lora_rank", 4)
    assert done.returncode == 0 and "pixel-level F1: " in done.stdout, done.stderr
    done = run_here("test.py", *flags)
    assert (done.returncode, done.stderr) == (1, f"error: --checkpoint_path {path}: it holds LoRA of rank 4, and the "
                                                 "model has 32: give --finetune lora --lora_rank 4.\n")
    with pytest.raises(UserError, match="it holds LoRA of rank 4, and the model has none: give --finetune lora"):
        build(state, finetune="full")
    with pytest.raises(UserError, match="it holds no LoRA, and the model has 32: give --finetune frozen or full"):
        build(without_lora(zoo[1]))
    with pytest.raises(UserError, match="its tokens are 768 wide, the model's 384: give the --dinov3_model_type"):
        build(state | {"backbone.cls_token": torch.zeros(1, 1, 768)})
