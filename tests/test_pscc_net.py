"""PSCC-Net beyond the published numbers: the authors' weights and variant, the balance of the loss, other sizes.

    pytest tests/test_pscc_net.py
"""
import pytest
import torch
import torch.nn.functional as F

from checkpoint import load_weights
from models.pscc_net import PSCC_Net, balanced_loss
from registry import UserError

PARTS = {"FENet": "HRNet.pth", "SegNet": "NLCDetection.pth", "ClsNet": "DetectionHead.pth"}


def random_model(*args):
    torch.manual_seed(0)
    model = PSCC_Net(*args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def authors(tmp_path):
    """A model and the paths of its weights in three files, as the authors published theirs."""
    model = random_model(32, "authors")
    for part, file in PARTS.items():
        torch.save({f"module.{name}": x for name, x in model.get_submodule(part).state_dict().items()}, tmp_path / file)
    return model, [str(tmp_path / file) for file in PARTS.values()]


def same(model, other):
    return all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


def test_three_files_of_the_authors(authors):
    model, paths = authors
    assert same(model, PSCC_Net(32, "authors", paths))
    hrnet = PSCC_Net(32, "authors", paths[:1])
    assert same(model.FENet, hrnet.FENet) and not same(model.SegNet, hrnet.SegNet)
    with pytest.raises(UserError, match="--pretrain_path .*HRNet.pth .*NLCDetection.pth: .* missing, first incre_"):
        PSCC_Net(32, "authors", paths[:2])


def test_joined_file_of_the_authors_loads_as_a_checkpoint(authors, tmp_path):
    model, paths = authors
    joined = {name: x for path in paths for name, x in torch.load(path).items()}
    torch.save(joined, tmp_path / "joined.pth")
    other = PSCC_Net(32, "authors")
    load_weights(other, tmp_path / "joined.pth", "--checkpoint_path")
    assert same(model, other)


@pytest.mark.parametrize("variant", ["imdlbenco", "authors"])
def test_variant_chooses_input_and_gate(variant):
    model, seen = random_model(32, variant), {}
    for name in ("FENet", "SegNet.getmask4", "SegNet.getmask3"):
        def keep(module, args, output, name=name):
            seen[name] = args[0], output
        model.get_submodule(name).register_forward_hook(keep)
    pixels = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    image = (pixels - mean) / std
    with torch.no_grad():
        model(image, torch.zeros(1, 1, 32, 32), torch.tensor([0]))
    assert torch.allclose(seen["FENet"][0], pixels if variant == "authors" else image, atol=1e-6)
    gate = seen["SegNet.getmask4"][1]
    gate = F.interpolate(gate.sigmoid() if variant == "authors" else gate, (8, 8), mode="bilinear", align_corners=True)
    assert torch.allclose(seen["SegNet.getmask3"][0], seen["FENet"][1][2] * gate)


def test_balance_of_the_loss():
    """Each class counts half of what there is of it; alone it counts fully if authentic, and half if manipulated."""
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4, :2] = 1  # 8 of 128
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    expected = (bce[mask == 1].mean() + bce[mask == 0].mean()) / 2
    assert torch.allclose(balanced_loss(logits, mask), expected)
    for value, weight in ((0.0, 1.0), (1.0, 0.5)):
        mask = torch.full_like(mask, value)
        loss = balanced_loss(logits, mask)
        assert torch.allclose(loss, weight * F.binary_cross_entropy_with_logits(logits, mask))
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("side, columns, counted", [
    (16, slice(5, 7), []),  # fills 0.44 of one of the four columns of a quarter's size; without antialiasing all of it
    (8, slice(3, 8), [2, 3]),  # fills exactly half of column 1, which counts as authentic
])
def test_target_of_a_coarse_level_is_antialiased(side, columns, counted):
    mask, target, logits = torch.zeros(1, 1, side, side), torch.zeros(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    mask[..., columns] = 1
    target[..., counted] = 1
    assert torch.equal(balanced_loss(logits, mask), balanced_loss(logits, target))


def test_input_size_is_that_of_the_heads_alone():
    model = random_model(16)
    shapes = []
    model.SegNet.register_forward_hook(lambda module, args, out: shapes.extend(x.shape[2:] for x in out))
    result = model(torch.randn(1, 3, 40, 24), torch.ones(1, 1, 40, 24), torch.tensor([1]))
    assert shapes == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert result["pred_mask"].shape == (1, 1, 40, 24) and result["pred_label"].shape == (1,)
    with pytest.raises(UserError, match="--input_size 100: "):
        PSCC_Net(100)


def test_batch_norm_and_start_values():
    model = PSCC_Net(16)
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-5, 0.01)}
    assert model.SegNet.getmask1.gamma_s.item() == model.SegNet.getmask1.gamma_c.item() == 1
    assert model.FENet.conv2.weight.std().item() == pytest.approx(0.001, rel=0.05)
