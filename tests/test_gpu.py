"""What only GPUs and several machines need, as far as a CPU can tell. Run: python -m pytest tests/test_gpu.py"""
import argparse
import copy
import os
import subprocess

import pytest
import torch

import checkpoint
import ddp
import counting
import metrics
import models.mymodel
import train
from conftest import ROOT
from models.hrnet import HRNet
from registry import UserError, usable_cpus


def test_processes_without_a_gpu_or_on_a_shared_one_are_refused():
    ddp.refuse_unequal([("a", "1"), ("a", "2"), ("b", "1")])
    ddp.refuse_unequal([("a", None), ("a", None)])
    with pytest.raises(UserError, match="process 1 on b finds no GPU that torch can use, but others have one"):
        ddp.refuse_unequal([("a", "1"), ("b", None), ("c", "1")])
    with pytest.raises(UserError, match="processes 0 and 2 on a would share one GPU"):
        ddp.refuse_unequal([("a", "1"), ("a", "2"), ("a", "1")])


@pytest.mark.parametrize("device, flags, used, scales", [
    ("cuda", {}, True, True), ("cuda", {"amp_dtype": "bfloat16"}, True, False),
    ("cuda", {"if_not_amp": True}, False, False), ("cpu", {}, False, False)])
def test_mixed_precision(device, flags, used, scales):
    args = argparse.Namespace(**{"if_not_amp": False, "amp_dtype": "float16", **flags})
    context, scaled = ddp.mixed_precision(args, torch.device(device))
    assert context.args == (device, getattr(torch, args.amp_dtype), used) and scaled == scales


def test_a_state_saved_on_a_cpu_goes_to_where_a_fused_step_needs_it(tmp_path):
    """The fused AdamW of today's run wants its step counter as a float32 tensor beside the parameter."""
    def step(optimizer):
        model.conv.weight.grad, model.conv.bias.grad = torch.ones_like(model.conv.weight), torch.ones(1)
        optimizer.step()

    model = models.mymodel.MyModel()
    plain = train.make_optimizer(model, 0.05, 0.1)
    step(plain)
    fused = torch.optim.AdamW([{"params": group["params"], "weight_decay": 0.05} for group in plain.param_groups],
                              lr=0.2, fused=True)
    content = {"optimizer": plain.state_dict()}
    assert not any(group["fused"] for group in content["optimizer"]["param_groups"])
    checkpoint.load_optimizer(fused, torch.amp.GradScaler("cpu", enabled=False), content, tmp_path)
    assert [(group["fused"], group["lr"]) for group in fused.param_groups] == [(True, 0.2)] * 2
    step(fused)
    assert fused.state[model.conv.weight]["step"] == 2


def test_a_state_takes_the_memory_layout_of_todays_weights():
    """A fused step reads them side by side: --channels_last given anew changed weights wrongly, or failed on a GPU."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3)
    conv.weight.grad, conv.bias.grad = torch.randn_like(conv.weight), torch.zeros(4)
    before = torch.optim.AdamW(conv.parameters(), lr=0.1)
    before.step()
    today = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(today.parameters(), lr=0.1, fused=True)
    checkpoint.load_optimizer(optimizer, torch.amp.GradScaler("cpu", enabled=False),
                              {"optimizer": copy.deepcopy(before.state_dict())}, "file")
    for module, optimizer in ((conv, before), (today, optimizer)):
        module.weight.grad = torch.linspace(-1, 1, 108).view(4, 3, 3, 3).to(
            memory_format=torch.channels_last if module is today else torch.contiguous_format)
        module.bias.grad = torch.zeros(4)
        optimizer.step()
    assert torch.allclose(today.weight, conv.weight, atol=1e-6)


def test_a_gpus_metrics_refuse_an_area_without_pixels(monkeypatch):
    """As on the CPU, with the class for GPUs, which takes any device."""
    monkeypatch.setattr(metrics, "valid_pixels", lambda pred, mask, shape, valid: counting.BatchSamples(
        pred, mask, counting.valid_area(mask, shape, valid)))
    pred, mask, valid = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    assert metrics.PixelAccuracy()(pred, mask, shape_mask=valid).shape == (2,)
    valid[1] = 0
    with pytest.raises(UserError, match="an image has no valid pixel"):
        metrics.PixelAccuracy()(pred, mask, shape_mask=valid)


def test_hrnets_maps_stay_in_half_precision(monkeypatch):
    """Autocast on CUDA gives float32 out of interpolate; on the CPU it doesn't."""
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, *args, **how: interpolate(x.float(), *args,
                                                                                               **how))
    net = HRNet((4, 8, 16, 32), stem_stride=2, num_bottlenecks=1, num_modules=(1, 1, 1)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in net(torch.zeros(1, 3, 64, 64))] == [torch.bfloat16] * 4


def test_cpus_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert usable_cpus() == 12
    for local, share in (("8", 1), ("4", 3), ("100", 1), ("0", 12), ("x", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert usable_cpus() == share


def test_launchers_give_each_machine_its_rank(tmp_path):
    """With the rendezvous that heeds --node_rank, so that rank 0, which writes, is on the first machine."""
    env = {"PATH": os.environ["PATH"], "PYTHON": "echo", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1",
           "NPROC": "8", "DATA": "d", "TEST": "t", "OUTPUT": str(tmp_path)}
    done = subprocess.run(["sh", str(ROOT / "runs/train_several_machines.sh")], env=env, capture_output=True, text=True)
    words = done.stdout.split()
    assert done.returncode == 0 and words[:4] == ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=8"]
    assert words[4:7] == ["--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29400"]
    assert not any("rdzv" in word for word in words)
