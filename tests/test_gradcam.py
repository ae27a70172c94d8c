"""Grad-CAM: gradcam.py against maps worked out by hand, and save_images.py --gradcam.

Run: python -m pytest tests/test_gradcam.py
"""
import cv2
import numpy as np
import pytest
import torch
from torch import nn

from conftest import run_here
from gradcam import GradCam
from registry import UserError


class Net(nn.Module):
    """Two feature maps, image and its negative, in the layout that a test asks for; the mask's logit is 2a - b/2."""

    def __init__(self, layout="maps", scale=1.0):
        super().__init__()
        self.features, self.again, self.unused = Features(layout), nn.ReLU(inplace=True), nn.Conv2d(1, 1, 1)
        self.scale, self.layout = scale, layout

    def forward(self, image, **batch):
        a, b = self.features(image[:, :1]).unbind(1)
        logits = self.scale * (2 * a - 0.5 * b)[:, None]
        with torch.no_grad():
            self.unused(image[:, :1])
        return {"pred_mask": torch.sigmoid(logits), "pred_label": torch.sigmoid(self.again(a.mean(dim=(1, 2)) - 1))}


class Features(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layer, self.layout = Layer(layout), layout

    def forward(self, x):
        maps = self.layer(torch.cat([x, -x], dim=1))
        if self.layout == "tuple":
            maps = maps[1]
        if self.layout == "channels last":
            maps = maps.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            maps = maps[:, 5:].transpose(1, 2).unflatten(2, (8, 8))
        return maps.relu_() if self.layout == "in place" else maps


class Layer(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, maps):
        if self.layout == "channels last":
            return maps.permute(0, 2, 3, 1)
        if self.layout == "tokens":
            return torch.cat([maps.new_full((len(maps), 5, 2), 9.0), maps.flatten(2).transpose(1, 2)], dim=1)
        return (maps.mean(), maps, None) if self.layout == "tuple" else maps


def cam_of(net, image, layer="features.layer", target="mask", shape=(8, 8)):
    with torch.no_grad(), GradCam(net.eval(), layer, target) as cam:
        output = cam.run(image=image, name=["x"] * len(image))
        return cam.maps(output, torch.tensor([shape] * len(image)))


IMAGE = torch.linspace(-2, 3, 64).reshape(1, 1, 8, 8).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("layout", ["maps", "channels last", "tokens", "tuple"])
def test_by_hand(layout, scale):
    """S is a sum of logits over n pixels of 64, so dS/da is 2 there: the weights are 2n/64 and -n/128, and the map is
    ReLU(2a - b/2) = ReLU(2.5a) but for a factor: the image above 0, divided by its highest value, 3. Sure predictions
    (scale 200: float32 says 0 or 1 exactly) change nothing."""
    torch.testing.assert_close(cam_of(Net(layout, scale), IMAGE), (IMAGE[:, 0] / 3).relu())


def test_what_is_in_place_or_runs_twice():
    net = Net("in place")
    torch.testing.assert_close(cam_of(net, IMAGE), (IMAGE[:, 0] / 3).relu())  # b is 0 where a is above 0
    net.forward = lambda image, **batch: {"pred_mask": torch.sigmoid(1 - net.features(image[:, :1])[:, :1])}
    torch.testing.assert_close(cam_of(net, IMAGE), (-IMAGE[:, 0] / 2).relu())  # the layer's values, not the ReLU's
    twice, between, net = nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False), Net()
    nn.init.eye_(between.weight[..., 0, 0])
    net.features.layer = nn.Sequential(twice, between, twice)
    for parameter in net.parameters():
        parameter.requires_grad_(False)  # a frozen layer has its map too
    torch.testing.assert_close(cam_of(net, IMAGE, "features.layer.0"), (IMAGE[:, 0] / 3).relu())


def test_batch_padding_and_authentic_images():
    """Images of a batch don't mix, padding is 0, and where no pixel is predicted the whole image is explained."""
    dark = torch.cat([IMAGE, -IMAGE.abs() - 1, IMAGE.flip(3)])
    maps = cam_of(Net(), dark)
    for i in range(3):
        torch.testing.assert_close(maps[i:i + 1], cam_of(Net(), dark[i:i + 1]))
    assert maps[1].max() == 0  # the features speak against it
    padded = cam_of(Net(), IMAGE, shape=(8, 6))
    assert padded[..., 6:].max() == 0 and padded.max() == 1


def test_label_and_errors():
    torch.testing.assert_close(cam_of(Net(), IMAGE + 3, target="label"), (IMAGE[:, 0] + 3) / 6)
    for layer, text in (("features.later", "no such layer. Did you mean features.layer? Layers in features: "),
                        ("", "no such layer"), ("unused", "doesn't depend on this layer's output"),
                        ("again", "the predicted mask doesn't depend")):
        with pytest.raises(UserError, match=text.replace(".", r"\.").replace("?", r"\?")):
            cam_of(Net(), IMAGE, layer)
    with pytest.raises(UserError, match=r"its output of shape \(1,\) is no map of 1 image"):
        cam_of(Net(), IMAGE + 3, "again", "label")


def test_script(tmp_path):
    """The PNG and the array have the image's own size, and a second run in the folder of images leaves them out."""
    from models.noisenet import NoiseNet
    torch.manual_seed(0)
    torch.save({"model": NoiseNet().state_dict()}, tmp_path / "net.pth")
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "a.png", "b.c.png"):
        cv2.imwrite(str(tmp_path / "images" / name), np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    flags = ["--model", "NoiseNet", "--checkpoint_path", tmp_path / "net.pth", "--test_data_path", tmp_path / "images",
             "--output_dir", tmp_path / "images/out", "--image_size", 64, "--num_workers", 0]
    for fitting in "--if_resizing", "--if_padding":
        done = run_here("save_images.py", *flags, fitting, "--gradcam", "fine.1")
        assert done.returncode == 0 and done.stderr == ""
        assert "3 masks in" in done.stdout and "Grad-CAM of fine.1 in" in done.stdout
        files = sorted(path.name for path in (tmp_path / "images/out/gradcam").iterdir())
        assert files == ["a.jpg.npy", "a.jpg.png", "a.png.npy", "a.png.png", "b.c.npy", "b.c.png"]
        cam = np.load(tmp_path / "images/out/gradcam/b.c.npy")
        assert cam.shape == (60, 90) and cam.dtype == np.float32 and cam.min() >= 0 and 0.5 < cam.max() <= 1
        assert (cam[:, 64:].max() == 0) == (fitting == "--if_padding")
        assert cv2.imread(str(tmp_path / "images/out/gradcam/b.c.png")).shape == (60, 90, 3)
    done = run_here("save_images.py", *flags, "--if_resizing", "--gradcam_target", "label")
    assert done.returncode == 1 and done.stderr.startswith("error: --gradcam_target says what Grad-CAM explains: give ")
    done = run_here("save_images.py", *flags, "--if_resizing", "--gradcam", "fin")
    assert done.returncode == 1 and done.stderr.startswith("error: --gradcam fin: NoiseNet has no such layer. Did you ")
