"""Backbone: timm's families, extractors, decoders, pretrained weights, image sizes, mistakes.

    pytest tests/test_backbone.py
"""
import csv

import pytest
import timm
import torch

from conftest import run_here
from data import MEAN, STD
from models.backbone import Backbone, feature_maps
from models.extractors import EXTRACTORS
from registry import UserError

NAMES = [  # kinds of models that differ in their maps, sizes or layouts
    "resnet18",                               # maps from 1/2 on, any size
    "swin_tiny_patch4_window7_224",           # channels last, fixed size
    "vit_tiny_patch16_224",                   # maps of one size, fixed size
    "eva02_tiny_patch14_224",                 # 1/14
    "vit_small_patch16_dinov3.lvd1689m",      # with the tag of its weights
    "pvt_v2_b0",                              # attends to maps that are reduced once more
    "levit_128s",                             # from 1/16 on
    "pit_ti_224",                             # has a norm that no map passes
]


def make_batch(height, width):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, height, width, generator=generator)
    return {"image": image, "mask": (image[:, :1] > 0).float(), "label": torch.tensor([1, 0])}


def check_output(output, batch):
    assert output["pred_mask"].shape == batch["mask"].shape and output["pred_label"].shape == (2,)
    for value in (output["backward_loss"], output["pred_mask"], output["pred_label"]):
        assert value.dtype == torch.float32 and value.isfinite().all()


def check_gradients(model, batch):
    """Every parameter that is trained gets a gradient, which DDP needs."""
    output = model.train()(**batch)
    check_output(output, batch)
    output["backward_loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_families(name):
    model = Backbone(name, "srm", image_size=64)
    check_gradients(model, make_batch(64, 64))
    info, side = model.backbone.feature_info, model.side or 64
    maps = feature_maps(model.backbone, torch.zeros(2, 12, side, side))
    assert [x.shape[1] for x in maps] == info.channels() and len(maps) == (3 if name[:3] in ("lev", "pit") else 4)
    assert all(abs(x.shape[2] - side / reduction) <= 1 and x.shape[2] == x.shape[3]
               for x, reduction in zip(maps, info.reduction()))
    for size in ((50, 37), (20, 64)):  # odd, not square, with mixed precision
        batch = make_batch(*size)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            check_output(model.eval()(**batch), batch)
    batch = make_batch(96, 40)
    if model.side:
        with pytest.raises(UserError, match="--image_size .*96"):
            model(**batch)
    else:
        check_output(model(**batch), batch)


@pytest.mark.parametrize("extractor, decoder", [("none", "mlp"), *((name, "fpn") for name in EXTRACTORS)])
def test_extractors_and_decoders(extractor, decoder):
    model = Backbone("test_resnet", extractor, decoder=decoder, image_size=64)
    check_gradients(model, make_batch(64, 64))
    batch = make_batch(64, 64)
    check_gradients(model, {**batch, "image": torch.ones_like(batch["image"])})  # of one colour


def test_mask_is_where_the_image_is():
    """What lies at the right and bottom of an image whose sides are padded answers to changes there alone."""
    model = Backbone("test_resnet", image_size=64).eval()
    batch = make_batch(75, 130)
    changed = {**batch, "image": batch["image"].clone()}
    changed["image"][..., 60:68, 110:118] += 3
    with torch.no_grad():
        difference = (model(**batch)["pred_mask"] - model(**changed)["pred_mask"]).abs().mean(dim=(0, 1))
    row, column = divmod(int(difference.argmax()), 130)
    assert 54 <= row <= 74 and 104 <= column <= 124


@pytest.fixture
def weights(monkeypatch):
    """{name: state dict} of what was asked for as pretrained; timm gives random weights in their place."""
    given, create = {}, timm.create_model

    def create_model(name, pretrained=False, pretrained_cfg_overlay=None, **options):
        model = create(name, **options)
        if pretrained:
            given[name] = {key: x.clone() for key, x in model.state_dict().items()}
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr("models.weights.cached_weights", lambda config: None)
    return given


@pytest.mark.parametrize("name, first", [
    ("test_resnet", "conv1.0.weight"),
    ("vit_tiny_patch16_224", "model.patch_embed.proj.weight"),
    ("tresnet_m", "body_conv1.conv.weight"),  # which sees squares of 4 x 4 pixels as channels
])
def test_pretrained_network_is_kept(weights, name, first):
    """All weights are those of timm's, and the extractor's maps change nothing before the training does."""
    model = Backbone(name, "srm", pretrained=True, image_size=64).eval()
    state = model.backbone.state_dict()
    assert {key for key in state if state[key].shape != weights[name][key].shape} == {first}
    assert all(torch.equal(state[key], x) for key, x in weights[name].items() if key != first)
    plain = Backbone(name, image_size=64).eval()
    plain.backbone.load_state_dict(weights[name])
    image, noise = torch.randn(1, 3, 64, 64), torch.randn(1, 9, 64, 64)
    with torch.no_grad():
        expected = plain.backbone(image)
        for maps in (noise, 100 * noise):
            for x, y in zip(model.backbone(torch.cat((image, maps), 1)), expected):
                assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    state[first].zero_()
    assert not any(torch.equal(x, y) for x, y in zip(model.backbone(torch.cat((image, noise), 1)), expected))


def test_backbone_sees_the_image_as_its_weights_expect():
    model, image = Backbone("vit_tiny_patch16_224", image_size=32), torch.randn(1, 3, 32, 32)
    pixels = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert torch.allclose(image * model.scale + model.shift, (pixels - 0.5) / 0.5, atol=1e-5)


def test_no_weights_without_a_network(monkeypatch):
    def fail(config):
        raise ConnectionError("no network")
    monkeypatch.setattr("models.weights.cached_weights", fail)
    with pytest.raises(UserError, match="--pretrained: .* resnet18 .*no network.* give --no-pretrained"):
        Backbone("resnet18", "srm", pretrained=True)


@pytest.mark.parametrize("flags, words", [
    (["--backbone", "resnet-50"], ["resnet-50", "resnet50, resnet50"]),
    (["--backbone", "DINOv3"], ["DINOv3", "vit_base_patch16_dinov3", ", "]),
    (["--backbone", "resnet18.no_tag"], ["resnet18.no_tag", ": resnet18.a1_in1k, "]),
    (["--backbone", "efficientformer_l1"], ["efficientformer_l1", "--image_size 224 or", "efficientformerv2_"]),
    (["--backbone", "resnet18", "--extractor", "sobol"], ["--extractor", "'sobel'"]),
])
def test_mistakes(images, tmp_path, flags, words):
    done = run_here("train.py", "--model", "Backbone", *flags, "--data_path", images, "--if_resizing", "--image_size",
                    64, "--no_fingerprint", "--num_workers", 0, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_train_and_test(images, tmp_path):
    """At a size that is no multiple of a patch; the checkpoint tells the rest."""
    shared = ["--num_workers", 0, "--no_fingerprint", "--test_batch_size", 4]
    done = run_here("train.py", "--model", "Backbone", "--backbone", "test_vit", "--extractor", "bayar", "--decoder",
                    "mlp", "--data_path", images, "--test_data_path", images, "--if_padding", "--image_size", 75,
                    "--epochs", 1, "--batch_size", 3, "--output_dir", tmp_path / "run", *shared)
    assert done.returncode == 0 and not done.stderr, done.stderr
    done = run_here("test.py", "--checkpoint_path", tmp_path / "run", "--test_data_json", images / "set.json",
                    "--if_predict_label", "--output_dir", tmp_path / "test", *shared)
    assert done.returncode == 0 and "--backbone test_vit" in done.stdout, done.stderr
    with open(tmp_path / "test" / "results.csv") as file:
        assert all(0 <= float(row["value"]) <= 1 for row in csv.DictReader(file))
