"""The 36 plain backbones and their extractors, beyond the cases in test_models.py.

    pytest tests/test_baselines.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import run_here
from models.baselines import NAMES, NETWORKS
from models.extractors import EXTRACTORS
from models.mit import MiT
from reference.fill import fill, inputs
from registry import MODELS, UserError, parameter_help, parameters

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractor_equals_published(name):
    stored = np.load(REFERENCE / "extractors" / f"extractor_{name}.npz")
    meta = json.loads((REFERENCE / "extractors" / "extractors.json").read_text())
    extractor = EXTRACTORS[name]().eval()
    built = {f"input_head.{key}": x for key, x in extractor.state_dict().items()}
    keys = meta["keys"][name]
    assert {key: [list(x.shape), str(x.dtype).removeprefix("torch.")] for key, x in built.items()} == keys
    filled = fill(keys, **meta["fill"] | {"fixed": meta["fill"]["fixed"][name]})
    state = built | {key: torch.from_numpy(x) for key, x in filled.items()}
    extractor.load_state_dict({key.removeprefix("input_head."): x for key, x in state.items()})
    image = torch.from_numpy(inputs(REFERENCE / meta["inputs"])[0])
    limit = 1e-4 * np.abs(stored["out"]).max() if name == "bayar" else meta["tolerance_abs"][name]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which they don't follow
        whole, crop = extractor(image), extractor(image[..., :96, :120])
    assert whole.shape == (2, extractor.channels, 128, 128) and whole.dtype == torch.float32
    for ours, prefix in ((whole, ""), (crop, "crop_")):
        assert np.abs(ours[..., ::4, ::4].numpy() - stored[f"{prefix}out"]).max() <= limit
        assert np.abs(ours.mean((0, 2, 3)).numpy() - stored[f"{prefix}mean"]).max() <= limit
    if name == "sobel":  # the two that are not used
        assert torch.equal(extractor.sobel_x[0].weight, -extractor.conv_x.weight)
        assert torch.equal(extractor.sobel_y[0].weight, -extractor.conv_y.weight)
    if name == "bayar":  # in training the constrained kernel is written back
        extractor.train()(image)
        assert np.abs(extractor.BayarConv2D.weight.detach().numpy() - stored["weight_after"]).max() <= 1e-5


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractor_of_one_colour_is_finite(name):
    extractor = EXTRACTORS[name]()
    if name == "bayar":
        torch.nn.init.zeros_(extractor.BayarConv2D.weight)
    for size in ((1, 1), (16, 41), (40, 33)):
        image = torch.full((2, 3, *size), 0.3, requires_grad=True)
        maps = extractor(image)
        maps.square().sum().backward()
        assert maps.shape == (2, extractor.channels, *size)
        assert maps.isfinite().all() and image.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in extractor.parameters())


def test_names_flags_and_state_dicts():
    """All 36, built without memory: what an extractor changes, takes away and adds."""
    fused = {"resnet": "backbone.0", "unet": "net.inc.double_conv.0", "segformer": "patch_embed1.proj",
             "swin": "patch_embed.proj", "vit16": "patch_embed.proj"}
    flags = dict.fromkeys(NETWORKS, ["pretrained"]) | {"unet": [], "segformer": ["pretrain_pth_path"]}
    shapes = {}
    for name in NAMES.split():
        extractor, _, network = name.rpartition("_")
        constructor = MODELS.get(name)
        with torch.device("meta"):
            model = constructor()
        shapes[name] = {key: tuple(x.shape) for key, x in model.state_dict().items()}
        assert not [p for key, p in model.named_parameters() if not p.requires_grad]
        assert MODELS.file(name) == "models/baselines.py" and type(model).__name__ == name
        assert [key for key in parameters(constructor) if key != "image_size"] == flags[network]
        assert [*parameter_help(constructor)] == flags[network]
    assert shapes.keys() == {f"{prefix}{network}" for network in NETWORKS
                             for prefix in ("", *(f"{extractor}_" for extractor in EXTRACTORS))}
    for network in NETWORKS:
        plain = shapes[network]
        for extractor, kind in EXTRACTORS.items():
            n = kind.channels
            expected = plain | {f"input_head.{key}": tuple(x.shape) for key, x in kind().state_dict().items()}
            if network == "vit":
                expected |= {"feature_patch_embed.weight": (768, n, 16, 16), "pos_embed": (1, 2049, 768)}
            else:
                key = fused[network]
                out, _, *kernel = plain[f"{key}.weight"]
                expected[f"{key}.weight"] = (out, 3 + n, *kernel)
                expected.pop(f"{key}.bias", None)
            assert shapes[f"{extractor}_{network}"] == expected


def test_image_size():
    """vit and swin say which size they were built for, and which sizes they can be built for."""
    for name, step in (("vit", 16), ("srm_vit16", 16), ("swin", 32)):
        with pytest.raises(UserError, match=f"--image_size 72: {name} .* {step}"):
            MODELS.get(name)(image_size=72)
        with torch.device("meta"):
            model = MODELS.get(name)(image_size=128)
            for size in ((64, 64), (128, 96)):
                with pytest.raises(UserError, match=f"{name} was built with --image_size 128 and got a {size[0]} x"):
                    model(torch.zeros(1, 3, *size), torch.zeros(1, 1, *size))


def test_starting_weights(monkeypatch):
    """The first convolution keeps what it starts with; vit's second half of positions is a copy of the first."""
    published = MiT("b2").state_dict() | {"head.weight": torch.zeros(1)}
    monkeypatch.setattr("models.mit.read_weights", lambda path, flag: published)
    state = MODELS.get("srm_segformer")("mit_b2.pth").state_dict()
    first = state.pop("patch_embed1.proj.weight")
    assert torch.equal(first[:, :3], published["patch_embed1.proj.weight"])
    assert first[:, 3:].std().item() == pytest.approx((2 / (9 * 49)) ** 0.5, rel=0.05)
    encoder = [name for name in state if not name.startswith(("input_head.", "deconv_model."))]
    assert len(encoder) == len(published) - 3 and all(torch.equal(state[name], published[name]) for name in encoder)

    positions = MODELS.get("sobel_vit")(image_size=32).pos_embed
    assert positions.shape == (1, 9, 768) and torch.equal(positions[:, 1:5], positions[:, 5:])


def test_train_and_test_by_name(images, tmp_path, monkeypatch):
    """The position table follows --image_size, and a checkpoint with the unused classifier loads."""
    monkeypatch.setattr(MODELS.get("bayar_vit"), "depth", 1)
    flags = ["--data_path", images, "--if_resizing", "--image_size", 32, "--batch_size", 9, "--epochs", 1,
             "--num_workers", 0, "--no_fingerprint", "--output_dir", tmp_path / "trained"]
    done = run_here("train.py", "--model", "bayar_vit", *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "trained" / "checkpoint-0.pth"
    content = torch.load(path)
    assert content["model"]["pos_embed"].shape == (1, 9, 768)
    content["model"] |= {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}
    torch.save(content, path)
    done = run_here("test.py", "--checkpoint_path", path, "--test_data_path", images, "--no_fingerprint",
                    "--num_workers", 0, "--output_dir", tmp_path / "tested")
    assert done.returncode == 0 and "--image_size 32" in done.stdout, done.stderr
