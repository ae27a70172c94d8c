"""tools/check_model.py on good models and on broken ones. Run: python -m pytest tests/test_check_model.py"""
import shutil
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import ROOT, run_here, run_script
from registry import MODELS, UserError


class Base(nn.Module):
    """Keeps the interface; the models below break one rule each."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, image, mask, label, **kwargs):
        logits = self.conv(image)
        return {"backward_loss": F.binary_cross_entropy_with_logits(logits, mask), "pred_mask": logits.sigmoid(),
                "pred_label": logits.sigmoid().amax((1, 2, 3))}


class Logits(Base):
    def forward(self, image, **batch):
        return {**super().forward(image, **batch), "pred_mask": 9 * self.conv(image)}


class ScalarLabel(Base):
    def forward(self, **batch):
        output = super().forward(**batch)
        return {**output, "pred_label": output["pred_label"].mean()}


class Detached(Base):
    def forward(self, **batch):
        output = super().forward(**batch)
        return {**output, "backward_loss": output["backward_loss"].detach()}


class BatchStatistics(Base):
    def forward(self, image, **batch):
        return super().forward(F.batch_norm(image, None, None, training=True), **batch)


class Unused(Base):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class UsedForTampered(Unused):
    def forward(self, label, **batch):
        output = super().forward(label=label, **batch)
        if label.any():
            output["backward_loss"] = output["backward_loss"] + self.extra.weight.sum() + self.extra.bias.sum()
        return output


class HalfSize(Base):
    def forward(self, **batch):
        output = super().forward(**batch)
        return {**output, "pred_mask": output["pred_mask"][..., ::2, ::2]}


class BlackIsNaN(Base):
    def forward(self, image, **batch):
        return super().forward((image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True), **batch)


class NeedsEdges(Base):
    def forward(self, edge_mask=None, **batch):
        output = super().forward(**batch)
        return {**output, "backward_loss": output["backward_loss"] * edge_mask.mean()}


class DoubleLoss(Base):
    def forward(self, **batch):
        output = super().forward(**batch)
        return {**output, "backward_loss": output["backward_loss"].double()}


class ChangesImage(Base):
    def forward(self, image, **batch):
        return super().forward(image.mul_(0.5), **batch)


class Peeks(Base):
    def forward(self, image, mask, **batch):
        return super().forward(image + mask, mask=mask, **batch)


class DropsOut(Base):
    def forward(self, image, **batch):
        return super().forward(F.dropout(image), **batch)


class Counts(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, **batch):
        self.calls += 1
        return super().forward(**batch)


class Unsaved(Base):
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(())

    def forward(self, image, **batch):
        return super().forward(image * self.scale, **batch)


class PlainCrossEntropy(Base):
    def forward(self, mask, **batch):
        output = super().forward(mask=mask, **batch)
        return {**output, "backward_loss": F.binary_cross_entropy(output["pred_mask"], mask)}


class OneSize(Base):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 32, 32))

    def forward(self, image, **batch):
        return super().forward(image + self.position, **batch)


class Takes(Base):
    def forward(self, image, mask, label):
        return super().forward(image, mask, label)


class Declared(Base):
    """Keeps the interface, in ways that the checks must allow: flags, a second size by flag, edge_mask, no label."""

    def __init__(self, input_size: int = 32, pretrained: bool = True):
        super().__init__()
        assert not pretrained
        self.input_size = input_size
        self.register_parameter("zero", nn.Parameter(torch.zeros(())))

    def forward(self, image, edge_mask, **batch):
        if image.shape[-1] != self.input_size:
            raise UserError(f"--input_size {self.input_size}: the image has {image.shape[-1]} pixels.")
        output = super().forward(image, **batch)
        output["backward_loss"] = output["backward_loss"] + edge_mask.mean() * self.zero * 0
        return {**output, "pred_label": None}


WRONG = {  # model -> the lines that are not OK, with words of what was seen or of the cure
    Logits: {"pred_mask holds one probability per pixel": "put the logits through torch.sigmoid"},
    ScalarLabel: {"pred_label holds one probability per image": "it is () for 3 images"},
    Detached: {"backward_loss is a finite float32 scalar with a gradient": "it has no gradient"},
    BatchStatistics: {"an image's result doesn't depend on the others in its batch": "pred_mask differs by"},
    Unused: {"finite gradients reach every trainable parameter": "none reaches extra.weight, extra.bias: "},
    UsedForTampered: {"finite gradients reach every trainable parameter": "does one reach extra.weight, extra.bias: ",
                      "nothing makes the host wait for the GPU": "__bool__ at "},
    HalfSize: {"pred_mask holds one probability per pixel": "(3, 1, 16, 16) but the mask is (3, 1, 32, 32)",
               "works at another size": "pred_mask is (2, 1, 8, 8) and the mask is (2, 1, 16, 16)"},
    BlackIsNaN: {"a black image gives finite predictions, losses and gradients": "backward_loss is not finite"},
    NeedsEdges: {"works with and without edge_mask": "AttributeError: 'NoneType' object has no attribute 'mean'"},
    DoubleLoss: {"backward_loss is a finite float32 scalar with a gradient": "it is torch.float64"},
    ChangesImage: {"forward changes none of its inputs, and in evaluation no weight or buffer": "it changes image: "},
    Counts: {"forward changes none of its inputs, and in evaluation no weight or buffer": "it changes model.calls: "},
    Peeks: {"predictions don't depend on mask and label": "pred_mask differs by"},
    DropsOut: {"evaluation gives the same twice": "pred_mask differs by"},
    Unsaved: {"saved and loaded again, strictly, it gives the same": "register_buffer"},
    PlainCrossEntropy: {"trains under autocast, the mixed precision that --if_not_amp turns off": "nn.BCELoss"},
    OneSize: {"works at another size": "RuntimeError: The size of tensor a (16)"},
    Takes: {"trains on three images, and on one": "end with **kwargs"},
    Declared: {},
}


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.__name__)
def test_what_is_wrong_is_named(model, monkeypatch):
    """By the line that is about it, and by no other."""
    monkeypatch.setitem(MODELS.entries, model.__name__, {"tests/test_check_model.py": model})
    done = run_here("tools/check_model.py", "--model", model.__name__, "--image_size", 32)
    lines = [line for line in done.stdout.splitlines() if line.startswith("NOT OK  ")]
    assert done.returncode == bool(WRONG[model]) and done.stderr == "" and len(lines) == len(WRONG[model]), done.stdout
    for line, (title, words) in zip(sorted(lines), sorted(WRONG[model].items())):
        assert line.startswith(f"NOT OK  {title}: ") and words in line


def test_what_is_allowed_is_said(monkeypatch):
    monkeypatch.setitem(MODELS.entries, "Declared", {"tests/test_check_model.py": Declared})
    done = run_here("tools/check_model.py", "--model", "Declared", "--image_size", 32, "--if_padding")
    assert "OK      works with and without edge_mask: forward declares that it needs it" in done.stdout
    assert "OK      works at another size: 16 as well as 32, built with --input_size 16\n" in done.stdout
    assert "note    finite gradients reach every trainable parameter: that of zero is zero everywhere" in done.stdout
    assert "note    pred_label holds one probability per image: forward returns none" in done.stdout
    assert done.stdout.endswith("Declared at 32 pixels: 19 of 19 OK\n")


def test_in_a_process_of_its_own(tmp_path):
    """Exceptions and what waits for the GPU come with file and line of the model."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in "models", "tools":
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models/mine.py").write_text(textwrap.dedent("""
        from models.mymodel import MyModel
        from registry import MODELS

        @MODELS.register_module()
        class Mine(MyModel):
            def forward(self, image, **batch):
                if self.training:
                    image = image * image.amax().item()
                image, _ = image[batch["label"] >= 0], 1 / (len(image) - 1 + self.training)
                return super().forward(image, **batch)
    """))
    done = run_script("tools/check_model.py", "--model", "Mine", "--kernel_size", 5, "--image_size", 64, cwd=tmp_path,
                      root=tmp_path, env={"IMDL_TRACEBACK": "1"})
    failed = "evaluates three images, and one"
    assert done.returncode == 1 and done.stdout.startswith("OK      builds: 76 parameters, 76 of them trainable\n")
    assert f"NOT OK  {failed}: ZeroDivisionError: division by zero (models/mine.py:10).\n" in done.stdout
    assert f"\n-       evaluation gives the same twice: not checked, see \"{failed}\" above\n" in done.stdout
    assert "item at models/mine.py:9, __getitem__ at models/mine.py:10: keep values on the device" in done.stdout
    assert done.stderr.startswith("Traceback") and "1 / (len(image) - 1 + self.training)" in done.stderr


def test_the_template_is_ok():
    done = run_here("tools/check_model.py", "--model", "MyModel", "--image_size", 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line[:8] for line in done.stdout.splitlines()[:-1]} == {"OK      "}
    assert done.stdout.endswith("\nMyModel at 64 pixels: 19 of 19 OK\n")
