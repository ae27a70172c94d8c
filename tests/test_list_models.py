"""tools/list_models.py: what models need, and what they cost. Run: python -m pytest tests/test_list_models.py"""
import shutil
import sys
import textwrap

import pytest
import timm
import torch

from conftest import ROOT, run_here, run_script

sys.path.insert(0, str(ROOT / "tools"))

import list_models  # noqa: E402

LISTED = """
    'A test. Nobody, 2026, https://example.org/nets.'
    import torch
    from registry import MODELS, POSTFUNCS, UserError

    class Base(torch.nn.Module):
        def __init__(self, width: int = 1000):
            super().__init__()
            self.linear = torch.nn.Linear(width, 1000)
            self.fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        def forward(self, image, mask, label, shape, original_shape, origin_shape, edge_mask, shape_mask, name, extra):
            count = len(image)
            assert image.shape == (count, 3, 32, 32)
            assert mask.shape == edge_mask.shape == shape_mask.shape == (count, 1, 32, 32)
            assert label.shape == (count,) and shape.shape == (count, 2) and extra.shape == (count, 3)
            assert len(name) == count and name[0].endswith(".jpg")
            assert mask.mean().item() > 0 and not self.training
            self.linear(torch.zeros(50, 1000))  # 0.1 GFLOPs that no prediction is made from
            x = self.linear(self.linear(image.new_zeros(50 * count, 1000)))  # 0.2 GFLOPs per image
            queries = image.new_zeros(count, 8, 512, 64)  # 0.54 GFLOPs per image
            x = x.sum() + torch.nn.functional.scaled_dot_product_attention(queries, queries, queries).sum()
            pred_mask = torch.zeros_like(mask)
            pred_mask[:, :, 1:] += x
            return {"backward_loss": (self.linear(x.expand(50, 1000)) - mask.mean()).mean(), "pred_mask": pred_mask}

    def post(data_dict, width: int = 0):
        data_dict["extra"] = torch.full((3,), width)

    @MODELS.register_module()
    class Plain(Base):
        pass

    @MODELS.register_module()
    class Pretrained(Base):
        def __init__(self, pretrained_net: bool = True, pretrained_other=True, image_size=1):
            assert not pretrained_net and not pretrained_other and image_size == 32
            super().__init__()
        def forward(self, image, **kwargs):
            with torch.autocast(image.device.type):
                return super().forward(image, **kwargs)

    @MODELS.register_module()
    def Needs(path: str, count): pass

    @MODELS.register_module()
    class Refuses(Base):
        def forward(self, image, **kwargs):
            raise UserError("--image_size 32: too small. Take 64.")

    @MODELS.register_module()
    class Fails(Base):
        def forward(self, image, **kwargs):
            return self.linear(image)

    for name in ("Plain", "Pretrained", "Refuses", "Fails"):
        POSTFUNCS.register_module(f"{name.lower()}_post_func")(post)
"""
TWICE = """
    from registry import MODELS

    @MODELS.register_module()
    class Twice:
        pass
"""


class Imagenet(torch.nn.Module):
    """A classifier whose loss costs more than it does."""

    def __init__(self, name):
        super().__init__()
        self.net = timm.create_model(name)

    def forward(self, image):
        scores = self.net(image)
        big = scores[:1].expand(10000, -1)
        return {"pred_label": scores, "backward_loss": (big @ big.t()).sum()}


@pytest.mark.parametrize("name, gmacs", [("resnet50", 4.09), ("vit_base_patch16_224", 17.56)])
def test_published_operations(name, gmacs):
    """Multiply-adds at 224 pixels as published: He et al. and timm's tables, 4.1 and 17.6 (with attention)."""
    model = Imagenet(name).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flops = list_models.count_flops(model, {"image": torch.zeros(2, 3, 224, 224)})
    assert flops / 2 / 2e9 == pytest.approx(gmacs, rel=2e-3)
    assert all(module.training for module in model.modules())
    assert [p is frozen for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_measure_one_model():
    done = run_here("tools/list_models.py", "--model", "MyModel", "--kernel_size", 5, "--image_size", 64,
                    "--test_batch_size", 3)
    assert done.returncode == 0 and done.stderr == ""
    name, file, total, trainable, gmacs, gflops, milliseconds, memory = done.stdout.splitlines()[-1].split()
    assert (name, file, total, trainable) == ("MyModel", "models/mymodel.py", "76", "76")
    assert (float(gmacs), float(gflops)) == (0, round(2 * 75 * 64 * 64 / 1e9, 2)) and float(milliseconds) > 0
    assert 0 <= float(memory) < 500


def test_a_wrong_name_gets_the_nearest():
    done = run_here("tools/list_models.py", "--model", "MyModel", "NoiseNot")
    assert done.returncode == 1 and "NoiseNot" in done.stderr and "Did you mean NoiseNet?" in done.stderr


def test_list_all_models(tmp_path):
    """In a copy of the repository with models of its own."""
    def run(*flags):
        return run_script("tools/list_models.py", *flags, cwd=tmp_path, root=tmp_path)

    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in "models", "tools":
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tools/list_models.py", tmp_path / "tools")
    done = run()
    assert (done.returncode, done.stderr) == (1, "error: models/ holds no model.\n")

    (tmp_path / "models/nets.py").write_text(textwrap.dedent(LISTED))
    for copy in "a.py", "b.py":
        (tmp_path / "models" / copy).write_text(textwrap.dedent(TWICE))
    (tmp_path / "models/broken.py").write_text("def f(:\n")
    done = run("--image_size", 32)
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[3:])
    needs = "label shape original_shape origin_shape edge_mask shape_mask name post function (extra)"
    assert " ".join(lines["Plain"].split()) == f"models/nets.py 1,001,005 {needs} https://example.org/nets --width"
    assert lines["Pretrained"].split()[-2:] == ["--pretrained_net", "--pretrained_other"]
    assert lines["Needs"].endswith("  needs --path --count: list it alone, with `--model Needs` and these flags.")
    assert "models/a.py and models/b.py both register the model Twice" in lines["Twice"]
    assert lines["models/broken.py"].startswith("can't be imported: SyntaxError")

    done = run("--image_size", 32, "--test_batch_size", 2, "--model", "Plain", "Pretrained", "Refuses", "Fails")
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[3:])
    assert "32x32" in done.stdout and "batch of 2" in done.stdout
    for name in "Plain", "Pretrained":
        assert lines[name].split()[:5] == ["models/nets.py", "1,001,005", "1,001,000", "0.37", "0.74"]
    assert lines["Refuses"] == "models/nets.py  --image_size 32: too small."
    assert lines["Fails"].startswith("models/nets.py  RuntimeError: ")

    done = run("--model", "Needs", "Fails")
    assert (done.returncode, done.stderr) == (1, "error: no model could be measured, the lines above say why.\n")
