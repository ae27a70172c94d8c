"""CAT-Net beyond the published numbers: DCT coefficients, padding, files of weights.

    pytest tests/test_cat_net_jpeg.py
"""
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.cat_net import Cat_Net, cat_net_post_func, normalised_bytes, read_file
from reference.fill import fill
from registry import UserError

jpeglib = pytest.importorskip("jpeglib")
REFERENCE = Path(__file__).parent / "reference"
STREAMS = np.load(REFERENCE / "Cat_Net" / "jpeg_case.npz")
IMAGE = np.load(REFERENCE / "inputs256.npz")["image"][0]
KINDS = {  # how Pillow writes them
    "444": {"quality": 90, "subsampling": 0},
    "422": {"quality": 70, "subsampling": 1},
    "420": {"quality": 83, "subsampling": 2},
    "progressive": {"quality": 75, "progressive": True},
    "grey": {"quality": 60},
}
OTHER_SPACES = {  # name -> (Pillow's mode, options): files whose first plane is no luminance
    "rgb": ("RGB", {"keep_rgb": True}), "cmyk": ("CMYK", {}), "ycck": ("CMYK", {}),
}


def make_jpeg(path, height=61, width=45, kind="420", **options):
    image = Image.fromarray(IMAGE[32:32 + height, 64:64 + width])
    image = image.convert("L") if kind == "grey" else image
    image.save(path, "JPEG", **KINDS[kind], **options)
    return str(path)


def make_other_space(path, marker=True):
    """Save what make_jpeg does as RGB, CMYK or YCCK, by the name of the file; without `marker` the Adobe marker, which
    says which it is, is missing: component ids tell RGB."""
    mode, options = OTHER_SPACES[path.stem]
    Image.fromarray(IMAGE[32:93, 64:109]).convert(mode).save(path, "JPEG", quality=90, subsampling=0, **options)
    content = path.read_bytes()
    start = content.index(b"\xff\xee\0\x0eAdobe")
    if path.stem == "ycck":  # Pillow writes none: the last byte of the marker makes it one
        content = content[:start + 15] + b"\2" + content[start + 16:]
    path.write_bytes(content if marker else content[:start] + content[start + 16:])


def make_sample(path, height=64, width=80, pristine=True):
    """The sample that the dataset makes with --if_padding --image_size height x width."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[:height, :width]
    image = np.zeros((height, width, 3), np.uint8)
    image[:pixels.shape[0], :pixels.shape[1]] = pixels
    return {"image": image, "name": "as listed", "path": path, "shape": pixels.shape[:2], "pristine": pristine}


def decoded_luminance(path):
    """What libjpeg decodes the luminance of a file to, without colour conversion."""
    image = Image.open(path)
    image.draft("L", image.size)
    return np.asarray(image)


def inverse_dct(plane, table):
    """Luminance (float, not rounded) from coefficients by the formula of the JPEG standard (ITU-T T.81, A.3.3)."""
    frequency, position = np.mgrid[:8, :8]
    basis = np.cos((2 * position + 1) * frequency * np.pi / 16) / 2  # [u, x]
    basis[0] /= np.sqrt(2)
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    blocks = plane.reshape(rows, 8, columns, 8).astype(float) * table[:, None, :]
    luminance = np.einsum("ruwv,ux,vy->rxwy", blocks, basis, basis)
    return np.clip(luminance.reshape(plane.shape) + 128, 0, 255)


@pytest.mark.parametrize("kind", ["420", "444", "422", "progressive", "gray"])
def test_reads_what_jpegio_reads(tmp_path, kind):
    path = tmp_path / "image.bin"  # the content makes it a JPEG file, not the name
    path.write_bytes(STREAMS[f"{kind}/jpeg"].tobytes())
    plane, table = read_file(path)
    assert np.array_equal(plane, STREAMS[f"{kind}/coef"])
    assert np.array_equal(table, STREAMS[f"{kind}/qtable"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(61, 45), (64, 80), (5, 17), (90, 83)], ids=str)
def test_coefficients_of_the_file_decode_to_its_pixels(tmp_path, kind, size):
    """Smaller than the image (padding), equal, tiny, larger (cropped)."""
    sample = make_sample(make_jpeg(tmp_path / "a.jpg", *size, kind=kind))
    cat_net_post_func(sample)
    assert sample["DCT_from_file"] == 1
    assert sample["DCT_coef"].shape == (64, 80) and sample["DCT_coef"].dtype == np.int16
    height, width = sample["shape"]
    luminance = inverse_dct(sample["DCT_coef"], sample["qtables"])[:height, :width]
    assert np.abs(luminance - decoded_luminance(sample["path"])[:height, :width]).max() < 1.5
    assert not sample["DCT_coef"][-(-height // 8) * 8:].any() and not sample["DCT_coef"][:, -(-width // 8) * 8:].any()


def test_blocks_that_the_crop_cuts_are_kept_whole(tmp_path):
    path = make_jpeg(tmp_path / "a.jpg", 90, 83)
    sample = make_sample(path, 60, 50)
    cat_net_post_func(sample)
    assert np.array_equal(sample["DCT_coef"], read_file(path)[0][:64, :56])


@pytest.mark.parametrize("name, pristine", [("a.png", True), ("a.jpg", False), ("subsampled.jpg", True),
                                            *((f"{space}.jpg", True) for space in OTHER_SPACES)])
def test_other_images_are_compressed_at_quality_100(tmp_path, monkeypatch, name, pristine):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = make_jpeg(tmp_path / "a.jpg")
    if name == "a.png":
        Image.open(path).save(tmp_path / name)
    if Path(name).stem in OTHER_SPACES:
        make_other_space(tmp_path / name)
    if name == "subsampled.jpg":  # luminance at half the size of the chroma planes: not aligned with the image
        jpeg = jpeglib.from_spatial(np.asarray(Image.open(path)))
        jpeg.samp_factor = [[1, 1], [2, 2], [2, 2]]
        jpeg.write_spatial(str(tmp_path / name))
    sample = make_sample(str(tmp_path / name), pristine=pristine)
    given = sample["image"]
    before = given.copy()
    cat_net_post_func(sample)
    assert sample["DCT_from_file"] == 0 and (sample["qtables"] == 1).all()
    assert sample["DCT_coef"].shape == (64, 80) and not sample["DCT_coef"][:, 48:].any()
    grey = sample["image"][:61, :45] @ (0.299, 0.587, 0.114)  # both streams get the compressed image
    assert np.abs(inverse_dct(sample["DCT_coef"], sample["qtables"])[:61, :45] - grey).max() < 1.5
    assert np.abs(sample["image"].astype(int) - before).max() <= 4 and not sample["image"][61:].any()
    assert np.array_equal(given, before)  # the caller may hold it for the next attack
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("space", OTHER_SPACES)
@pytest.mark.parametrize("marker", [True, False])
def test_only_luminance_has_a_history(tmp_path, space, marker):
    make_other_space(tmp_path / f"{space}.jpg", marker)
    assert Image.open(tmp_path / f"{space}.jpg").mode == OTHER_SPACES[space][0]
    assert read_file(tmp_path / f"{space}.jpg") is None
    content = (tmp_path / f"{space}.jpg").read_bytes()
    (tmp_path / f"{space}.jpg").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match=f"{space}.jpg is truncated"):
        read_file(tmp_path / f"{space}.jpg")


def test_imdlbenco_casts_the_normalised_image_to_bytes():
    image = np.load(REFERENCE / "inputs128.npz")["image"][0, :64, :48]
    assert np.array_equal(normalised_bytes(image), STREAMS["post/uint8"])
    sample = {"image": image, "path": "not read", "shape": (40, 40), "pristine": True}
    cat_net_post_func(sample, input_range="imdlbenco")
    assert np.array_equal(sample["DCT_coef"], STREAMS["post/coef"])
    assert np.array_equal(sample["qtables"], STREAMS["post/qtable"])
    assert sample["DCT_from_file"] == 0


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_damaged_file_is_named(tmp_path, kept):
    thumbnail = io.BytesIO()
    make_jpeg(thumbnail, 16, 16)  # its end marker is not that of the image
    path = make_jpeg(tmp_path / "cut.jpg", exif=b"Exif\0\0" + thumbnail.getvalue())
    content = (tmp_path / "cut.jpg").read_bytes()
    assert read_file(path) is not None
    (tmp_path / "cut.jpg").write_bytes(content[:int(kept * len(content))])
    with pytest.raises(UserError, match="cut.jpg is truncated"):
        read_file(path)


def test_a_panorama_and_a_name_that_is_no_utf8(tmp_path, capfd):
    """Samsung's panoramas have a trailer instead of an end marker; libjpeg's words about it reach no screen."""
    plane, table = read_file(make_jpeg(tmp_path / "a.jpg"))
    content = (tmp_path / "a.jpg").read_bytes()
    odd = os.path.join(os.fsdecode(tmp_path), os.fsdecode(b"\xb2\xe2.jpg"))
    for path, data in ((str(tmp_path / "panorama.jpg"), content[:-2] + b"SEFH" + bytes(600) + b"SEFT"), (odd, content)):
        with open(path, "wb") as file:
            file.write(data)
        found = read_file(path)
        assert np.array_equal(found[0], plane) and np.array_equal(found[1], table)
    assert capfd.readouterr().err == ""


def test_missing_library_and_no_file_left_behind(tmp_path, monkeypatch):
    path = make_jpeg(tmp_path / "a.jpg")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setitem(sys.modules, "jpeglib", None)
    for pristine in (True, False):
        with pytest.raises(UserError, match="pip install jpeglib"):
            cat_net_post_func(make_sample(path, pristine=pristine))
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.fixture(scope="module")
def model():
    """With the weights of test_models.py, as the random ones that training starts from give a constant mask."""
    model = Cat_Net()
    shapes, recipe = (json.loads((REFERENCE / "Cat_Net" / name).read_text()) for name in ("keys.json", "meta.json"))
    weights = {name: torch.from_numpy(x) for name, x in fill(shapes, **recipe["fill"]).items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def collate(samples):
    batch = torch.utils.data.default_collate([{key: sample[key] for key in ("image", "DCT_coef", "qtables")}
                                              for sample in samples])
    image = batch.pop("image").permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    batch["image"] = (image - mean) / std
    batch["mask"] = torch.zeros(len(samples), 1, *image.shape[-2:])
    batch["mask"][..., 20:40, 10:30] = 1
    return batch


@torch.no_grad()
def test_padding_has_no_influence(tmp_path, model):
    """61x45 padded to 64x48 by --if_padding gives what 61x45 gives, which the network itself pads to 64x48."""
    path = make_jpeg(tmp_path / "a.jpg")
    results = []
    for size in ((61, 45), (64, 48)):
        sample = make_sample(path, *size)
        cat_net_post_func(sample)
        batch = collate([sample, sample])
        shape_mask = torch.zeros_like(batch["mask"])
        shape_mask[..., :61, :45] = 1
        results.append(model(**batch, shape_mask=shape_mask if size == (64, 48) else None))
    own, padded = results
    assert own["pred_mask"].shape == (2, 1, 61, 45) and padded["pred_mask"].shape == (2, 1, 64, 48)
    assert torch.equal(own["pred_mask"], padded["pred_mask"][..., :61, :45]) and own["pred_mask"].std() > 1e-3
    assert torch.equal(own["backward_loss"], padded["backward_loss"])


def test_checkpoint_of_the_authors_loads(model):
    ours = {name: x.clone() for name, x in model.state_dict().items()}
    theirs = {name: x + 1 for name, x in model.model.state_dict().items()}
    model.load_state_dict(theirs, strict=True)
    assert "conv1.weight" in theirs  # the caller's dict is left as it was
    assert all(torch.equal(x, theirs[name]) for name, x in model.model.state_dict().items())
    assert model.loss.criterion.weight.tolist() == [0.5, 2.5]
    model.load_state_dict(ours, strict=True)


def test_weights_of_the_streams(tmp_path, model):
    # one number expanded to the shape of each tensor: small files
    weights = {name: torch.full((), 3, dtype=x.dtype).expand(x.shape) for name, x in model.model.state_dict().items()}
    dct = {name: x for name, x in weights.items() if name.startswith("dc_")}
    merged = ("transition4", "stage5", "last_layer")
    rgb = {name: x for name, x in weights.items() if name not in dct and not name.startswith(merged)}
    assert len(rgb) == 1830
    torch.save({**rgb, "classifier.weight": torch.zeros(1)}, tmp_path / "rgb.pth")
    torch.save({"state_dict": {**dct, "last_layer.3.bias": torch.full((2,), 3.0)}, "epoch": 3}, tmp_path / "dct.pth")
    loaded = Cat_Net(pretrained_rgb=str(tmp_path / "rgb.pth"), pretrained_dct=str(tmp_path / "dct.pth"))
    for name, x in loaded.model.state_dict().items():
        assert (x == 3).all() == (name in rgb or name in dct), name
    with pytest.raises(UserError, match="--pretrained_rgb .*dct.pth: 1525 of 1830 tensors are missing, first conv1"):
        Cat_Net(pretrained_rgb=str(tmp_path / "dct.pth"))
