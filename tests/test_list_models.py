"""tools/list_models.py: parameters and FLOPs of the models. Run: python -m pytest tests/test_list_models.py"""
import shutil
import textwrap

from conftest import ROOT, run_here, run_script

LISTED = """
    import torch
    from registry import MODELS, POSTFUNCS, UserError

    class Base(torch.nn.Module):
        def __init__(self, width: int = 1000):
            super().__init__()
            self.linear = torch.nn.Linear(width, 1000)
            self.fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        def forward(self, image, mask, label, shape, original_shape, origin_shape, edge_mask, shape_mask, name, extra):
            assert image.shape == (1, 3, 32, 32)
            assert mask.shape == edge_mask.shape == shape_mask.shape == (1, 1, 32, 32)
            assert label.shape == (1,) and shape.shape == (1, 2) and name[0].endswith(".jpg") and extra.shape == (1, 3)
            assert mask.mean().item() > 0 and not self.training
            self.linear(self.linear(torch.zeros(50, 1000)))  # 0.2 GFLOPs
            queries = torch.zeros(1, 8, 512, 64)  # 0.54 GFLOPs
            torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)

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
                super().forward(image, **kwargs)

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


def test_list_one_model():
    done = run_here("tools/list_models.py", "--model", "MyModel", "--kernel_size", 5, "--image_size", 64)
    assert done.returncode == 0 and done.stderr == ""
    name, file, total, trainable, gflops = done.stdout.splitlines()[-1].split()
    assert (name, file, total, trainable) == ("MyModel", "models/mymodel.py", "76", "76")
    assert float(gflops) == round(2 * 75 * 64 * 64 / 1e9, 2)


def test_a_wrong_name_gets_the_nearest():
    done = run_here("tools/list_models.py", "--model", "MyModel", "NoiseNot")
    assert done.returncode == 1 and "NoiseNot" in done.stderr and "Did you mean NoiseNet?" in done.stderr


def test_list_all_models(tmp_path):
    """In a copy of the repository with models of its own."""
    def list_models(*flags):
        return run_script("tools/list_models.py", *flags, cwd=tmp_path, root=tmp_path)

    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in "models", "tools":
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tools/list_models.py", tmp_path / "tools")
    done = list_models()
    assert (done.returncode, done.stderr) == (1, "error: models/ holds no model.\n")

    (tmp_path / "models/nets.py").write_text(textwrap.dedent(LISTED))
    for copy in "a.py", "b.py":
        (tmp_path / "models" / copy).write_text(textwrap.dedent(TWICE))
    (tmp_path / "models/broken.py").write_text("def f(:\n")
    done = list_models("--image_size", 32)
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[3:])
    assert "32x32" in done.stdout.splitlines()[0]
    assert lines["Plain"].split() == lines["Pretrained"].split() == ["models/nets.py", "1,001,005", "1,001,000", "0.74"]
    assert lines["Needs"].endswith("  needs --path --count: list it alone, with `--model Needs` and these flags.")
    assert lines["Refuses"] == "models/nets.py  --image_size 32: too small."
    assert lines["Fails"].startswith("models/nets.py  RuntimeError: ")
    assert "models/a.py and models/b.py both register the model Twice" in lines["Twice"]
    assert lines["models/broken.py"].startswith("can't be imported: SyntaxError")

    done = list_models("--model", "Needs", "Fails")
    assert (done.returncode, done.stderr) == (1, "error: no model could be measured, the lines above say why.\n")
