"""Reading, pairing, datasets and loaders. Run: pytest tests/test_data.py"""
import functools
import gc
import json
import os
import shutil
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image, ImageOps

import data
import transforms  # before albumentations, which it keeps from asking the network for news
import albumentations as albu
from registry import UserError

CPU = torch.device("cpu")
SIZE = 100  # larger than some sides of the fixture's images, smaller than others


def load(dataset, indices=None):
    """Return the batch of these images (default: all) as models receive it."""
    indices = range(len(dataset)) if indices is None else indices
    return data.to_device(data.collate([dataset[i] for i in indices]), CPU)


def write_list(path, count, sets=None):
    """Write a JSON of `count` pairs that share one image; returns its path."""
    cv2.imwrite(str(path.parent / "one.png"), np.zeros((4, 4, 3), np.uint8))
    path.write_text(json.dumps([["one.png", "Negative"]] * count))
    return path


def visits(dataset, epoch, batch_size=4, world_size=1, seed=42):
    """Return the batches that each rank visits in an epoch."""
    ranks = []
    for rank in range(world_size):
        batches = data.TrainBatches(dataset, batch_size, seed, rank, world_size)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    return ranks


def union(ranks):
    """Return how often each index is visited."""
    return Counter(index for batches in ranks for batch in batches for index in batch)


# ---------------------------------------------------------------------------------------------------------------------
# What forward receives


@pytest.mark.parametrize("padding, edge", [(True, None), (False, 7)])
def test_batch_has_the_keys_shapes_and_types_of_the_model_interface(images, padding, edge):
    dataset = data.JsonDataset(images / "set.json", SIZE, padding=padding, edge_mask_width=edge)
    batch, count = load(dataset), len(dataset)
    maps = {"mask", *(["edge_mask"] if edge else []), *(["shape_mask"] if padding else [])}
    assert set(batch) == {"image", "label", "shape", "original_shape", "origin_shape", "name"} | maps
    assert batch["image"].shape == (count, 3, SIZE, SIZE)
    assert batch["image"].dtype == torch.float32 and batch["image"].is_contiguous()
    for key in maps:
        assert batch[key].shape == (count, 1, SIZE, SIZE) and batch[key].dtype == torch.float32
        assert set(batch[key].unique().tolist()) == {0, 1}
    for key in ("shape", "original_shape", "origin_shape"):
        assert batch[key].shape == (count, 2) and batch[key].dtype == torch.int64
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [1] * 9 + [0] * 2
    assert batch["name"] == [pair[0] for pair in json.loads((images / "set.json").read_text())]
    sizes = [[96, 128], [128, 96], [80, 80]] * 3 + [[96, 128], [128, 96]]
    assert batch["original_shape"].tolist() == batch["origin_shape"].tolist() == sizes
    valid = [[min(side, SIZE) for side in size] for size in sizes] if padding else [[SIZE, SIZE]] * count
    assert batch["shape"].tolist() == valid
    if padding:
        for shape_mask, (height, width) in zip(batch["shape_mask"], valid):
            assert shape_mask[0, :height, :width].all() and shape_mask.sum() == height * width


@pytest.mark.parametrize("padding", [True, False])
def test_values_are_those_of_albumentations(images, padding):
    fitting = [albu.Resize(SIZE, SIZE)]
    if padding:
        fitting = [albu.PadIfNeeded(SIZE, SIZE, position="top_left"), albu.Crop(0, 0, SIZE, SIZE)]
    pipeline = albu.Compose([*fitting, albu.Normalize()])
    dataset = data.ManiDataset(images, SIZE, padding=padding)
    batch = load(dataset)
    for image, mask, name in zip(batch["image"], batch["mask"], batch["name"]):
        mask_name = name.replace("Tp", "Gt").replace(".png", "_gt.png")
        truth = np.asarray(Image.open(mask_name).convert("RGB")).mean(axis=2) > 127.5
        expected = pipeline(image=np.asarray(Image.open(name)), mask=truth.astype(np.uint8))
        assert np.abs(image.permute(1, 2, 0).numpy() - expected["image"]).max() < 1e-6
        assert np.array_equal(mask[0].numpy(), expected["mask"])
    black = data.denormalise(batch["image"])[2, :, 80:] if padding else torch.zeros(1)
    assert black.abs().max() < 1e-6


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_edge_mask_is_of_the_images_own_pixels(tmp_path, padding, width):
    """What dilation adds and erosion takes, before resizing or padding: no edge where the image ends."""
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((60, 90, 3), np.uint8))
    mask = np.zeros((60, 90), np.uint8)
    mask[20:, 50:] = 1  # reaches the right and the lower border
    cv2.imwrite(str(tmp_path / "mask.png"), 255 * mask)
    (tmp_path / "set.json").write_text('[["image.png", "mask.png"]]')
    dataset = data.JsonDataset(tmp_path / "set.json", SIZE, padding=padding, edge_mask_width=width)
    band = load(dataset)["edge_mask"][0, 0]
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (width, width))
    own = cv2.dilate(mask, kernel) - cv2.erode(mask, kernel)
    if padding:
        assert np.array_equal(band[:60, :90].numpy(), own) and not band[60:].any() and not band[:, 90:].any()
    else:
        assert np.array_equal(band.numpy(), cv2.resize(own, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST))
    if width == 7:  # by hand: three pixels on either side of the mask's two inner borders, none at the image's own
        expected = np.zeros_like(mask)
        expected[17:, 50:], expected[20:, 47:] = 1, 1
        expected[23:, 53:] = 0
        corner = np.s_[17:23, 47:53]  # where the cross makes the band narrower or wider
        expected[corner] = own[corner]
        assert np.array_equal(own, expected)


def empty_mask(mask, **params):
    """An augmentation that takes the tampering away."""
    return np.zeros_like(mask)


@pytest.mark.parametrize("fingerprint", [True, False])
def test_the_mask_decides_the_label(tmp_path, fingerprint):
    """A black mask is that of an authentic image, whatever its folder; so is one that an augmentation empties."""
    make_images(tmp_path, 3)
    cv2.imwrite(str(tmp_path / "Gt/p001_gt.png"), np.zeros((128, 96), np.uint8))
    dataset = data.ManiDataset(tmp_path, SIZE, fingerprint=fingerprint)
    assert load(dataset)["label"].tolist() == [1, 0, 1]
    assert ("3 images, 2 tampered, 1 authentic" in dataset.describe()) == fingerprint
    dataset.transform = albu.Compose([albu.Lambda(mask=empty_mask, p=1)])
    assert load(dataset)["label"].tolist() == [0, 0, 0]
    (tmp_path / "all.json").write_text(json.dumps([["ManiDataset", str(tmp_path)]]))
    balanced = data.BalancedDataset(tmp_path / "all.json", sample_number=3, fingerprint=fingerprint)
    assert balanced.describe().count("2 tampered, 1 authentic") == 2 * fingerprint


def test_augmented_sizes_and_labels(images):
    dataset = data.JsonDataset(images / "set.json", SIZE, transform=albu.Compose([albu.Resize(50, 70)]))
    batch = load(dataset)
    assert batch["origin_shape"].tolist() == [[50, 70]] * 11 and batch["original_shape"][0].tolist() == [96, 128]
    assert batch["label"].tolist() == [1] * 9 + [0] * 2
    dataset.transform = albu.Compose([transforms.RandomCopyMove(p=1)])  # tampers with authentic images too
    batch = load(dataset)
    assert batch["label"].tolist() == [1] * 11 and batch["mask"].amax(dim=(1, 2, 3)).tolist() == [1] * 11


def test_larger_images_are_cropped_and_that_is_said_at_opening(images):
    assert "; 6 larger than 90x90 are cropped" in data.ManiDataset(images, 90, padding=True).describe()
    masks = [data.read_mask(images / f"Gt/p{number:03d}_gt.png") for number in range(9)]
    for size in range(1, 80):  # how many lose their whole mask
        lost = sum(not mask[:size, :size].any() for mask in masks)
        words = f"; 9 larger than {size}x{size} are cropped" + (
            f", {lost} of them {'loses its' if lost == 1 else 'lose their'} whole mask" if lost else "")
        assert data.ManiDataset(images, size, padding=True).describe().endswith(words)
    unread = data.ManiDataset(images, 90, padding=True, fingerprint=False)
    assert "; those larger than 90x90 are cropped" in unread.describe()
    assert "cropped" not in data.ManiDataset(images, 128, padding=True).describe() + data.ManiDataset(images).describe()
    assert load(unread)["shape"].amax(dim=0).tolist() == [90, 90]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def mask_files():
    """Return {file name: PIL image or uint16 array}: one mask in every form that sets come in."""
    rng = np.random.default_rng(0)
    grey, rgb = rng.integers(100, 156, (31, 37)).astype(np.uint8), rng.integers(90, 170, (31, 37, 3)).astype(np.uint8)
    rgb[0, :2] = (255, 127, 1), (255, 126, 1)  # a mean just above 127.5 and one just below
    coarse = cv2.resize(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8), (37, 31))
    image = Image.fromarray
    return {"grey.png": image(grey), "rgb.png": image(rgb), "rgba.png": image(np.dstack([rgb, 255 - grey])),
            "grey_alpha.png": image(np.dstack([grey, 255 - grey])), "palette.png": image(rgb).quantize(64),
            "bits.png": image(grey).convert("1"), "grey.jpg": image(coarse[..., 0]),
            "rgb.jpg": image(coarse), "rgb.bmp": image(rgb), "bits.tif": image(grey).convert("1"),
            "palette.tif": image(rgb).quantize(64), "rgb.webp": image(rgb),
            "rgba.tif": image(np.dstack([rgb, 255 - grey])),
            "16.png": rng.integers(32000, 33500, (31, 37)).astype(np.uint16)}


@pytest.mark.parametrize("name, image", mask_files().items())
def test_images_are_what_pil_reads_and_masks_where_the_mean_of_the_channels_is_above_half(tmp_path, name, image):
    if isinstance(image, np.ndarray):
        cv2.imwrite(str(tmp_path / name), image)
        expected = image / 257 > 127.5
    else:
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        expected = pixels.mean(axis=2) > 127.5
        assert np.array_equal(data.read_image(tmp_path / name), pixels)
    mask = data.read_mask(tmp_path / name)
    assert mask.dtype == np.uint8 and np.array_equal(mask, expected) and 0 < mask.mean() < 1


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_applied_where_the_mask_wants_it(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    stored, turned = Image.open(tmp_path / "a.jpg"), ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    for shape, expected in (((40, 56), stored), ((56, 40), turned)):
        cv2.imwrite(str(tmp_path / "a.png"), np.full(shape, 255, np.uint8))
        (tmp_path / "set.json").write_text('[["a.jpg", "a.png"]]')
        if orientation == 3 and expected is turned:  # half a turn keeps the size, so this mask fits neither way
            with pytest.raises(UserError, match="a.jpg.*a.png"):
                data.JsonDataset(tmp_path / "set.json")
            continue
        pristine = []
        dataset = data.JsonDataset(tmp_path / "set.json", 64, padding=True,
                                   post_func=lambda sample: pristine.append(sample["pristine"]))
        assert np.array_equal(dataset[0]["image"][:shape[0], :shape[1]], np.asarray(expected))
        assert dataset[0]["original_shape"].tolist() == list(shape)
        assert set(pristine) == {expected is stored}  # CAT-Net's coefficients are those of the stored pixels
    (tmp_path / "set.json").write_text('[["a.jpg", "Negative"]]')
    assert data.JsonDataset(tmp_path / "set.json", 64)[0]["original_shape"].tolist() == [40, 56]


@pytest.mark.parametrize("fault", ["empty", "truncated jpeg", "truncated png", "text", "other size"])
@pytest.mark.parametrize("file", ["Tp/p000.png", "Gt/p000_gt.png"])
def test_faulty_files_are_named_at_the_start_and_while_reading(tmp_path, fault, file):
    make_images(tmp_path, 2)
    pixels = cv2.imread(str(tmp_path / file))
    pixels = pixels[1:] if fault == "other size" else pixels
    content = cv2.imencode(".jpg" if "jpeg" in fault else ".png", pixels)[1].tobytes()
    content = content[:-100] if "truncated" in fault else content
    (tmp_path / file).write_bytes({"empty": b"", "text": b"no image"}.get(fault, content))
    with pytest.raises(UserError, match=file):
        data.ManiDataset(tmp_path)
    with pytest.raises(UserError, match=file):
        data.ManiDataset(tmp_path, fingerprint=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together


def touch(folder, *names):
    """Write a tiny image under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.zeros((4, 4), np.uint8))


def test_pairs_follow_names_and_not_the_order(tmp_path, capsys):
    touch(tmp_path, "Tp/a1.png", "Tp/a10.PNG", "Tp/a2.jpg", "Tp/sub/b.v1.png", "Tp/gt.png",
          "Gt/a1_gt.png", "Gt/a10_mask.png", "Gt/a2_edgemask.png", "Gt/sub/b.v1.png", "Gt/gt_gt.png")
    names, images, masks = data.ManiDataset.find(str(tmp_path))
    assert {os.path.basename(image): os.path.basename(mask) for image, mask in zip(images, masks)} == {
        "a1.png": "a1_gt.png", "a10.PNG": "a10_mask.png", "a2.jpg": "a2_edgemask.png", "b.v1.png": "b.v1.png",
        "gt.png": "gt_gt.png"}
    touch(tmp_path, "Tp/extra.png", "Gt/lone_gt.png")
    with pytest.raises(UserError, match=r"extra\.png.*lone_gt\.png"):
        data.ManiDataset.find(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_without_any_common_name_the_order_decides_with_a_warning(tmp_path, capsys):
    touch(tmp_path, "Tp/x1.png", "Tp/x2.png", "Gt/m1.png", "Gt/m2.png")
    _, images, masks = data.ManiDataset.find(str(tmp_path))
    assert [os.path.basename(mask) for mask in masks] == ["m1.png", "m2.png"] and images[0].endswith("x1.png")
    assert "warning" in capsys.readouterr().out
    touch(tmp_path, "Gt/m3.png")
    with pytest.raises(UserError, match="m3"):
        data.ManiDataset.find(str(tmp_path))


def test_relative_paths_are_taken_from_the_json_then_from_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path, "sets/near.png", "work/near.png", "work/far.png", "absolute.png")
    path = tmp_path / "sets" / "set.json"
    absolute = str(tmp_path / "absolute.png")
    path.write_text(json.dumps([["near.png", "Negative"], ["far.png", "Negative"], [absolute, "far.png"]]))
    monkeypatch.chdir(tmp_path / "work")
    names, images, masks = data.JsonDataset.find(str(path))
    assert names == ["near.png", "far.png", absolute]
    for image, file in zip(images, ("sets/near.png", "work/far.png", "absolute.png"), strict=True):
        assert os.path.samefile(image, tmp_path / file)
    assert masks[:2] == ["", ""] and os.path.samefile(masks[2], "far.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"2 files.*far\.png"):
        data.JsonDataset.find(str(path))


@pytest.mark.parametrize("content, message", [
    ("[", "not valid JSON"), ("[]", "is empty"), ("3", "no list"), ('[["a"]]', "item 0"),
    ('["a.png"]', "item 0"), ('[["a.png", "b.png"], ["a.png", 3]]', "item 1"),
    ('[["a.png", "b.png"], ["ManiDataset", "x"]]', "item 1 is .*, not an image"), ('[["a.png", "b.png"]]', "2 files"),
    ('[["ManiDataset", "x"]]', "BalancedDataset, which can't be used here"), ('{"a": "b"}', "several sets"),
])
def test_a_wrong_json_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(UserError, match=f"--data_path: .*{message}"):
        data.open_dataset(str(tmp_path / "set.json"), "--data_path")


def test_a_path_decides_the_kind(images, tmp_path):
    (tmp_path / "several.json").write_text(json.dumps({"folder": str(images), "list": str(images / "set.json")}))
    sets = data.open_sets(str(tmp_path / "several.json"), "--test_data_path")
    assert [(name, type(each).__name__, len(each), each.facts.tampered) for name, each in sets.items()] == [
        ("folder", "ManiDataset", 9, 9), ("list", "JsonDataset", 11, 9)]
    (tmp_path / "wrong.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="--test_data_path: .*'a' is no path"):
        data.open_sets(str(tmp_path / "wrong.json"), "--test_data_path")
    folder = data.open_dataset(str(images / "Au"), "--data_path", allowed=("FolderDataset",), image_size=SIZE)
    assert len(folder) == 2 and load(folder)["label"].tolist() == [0, 0] and load(folder)["mask"].max() == 0
    with pytest.raises(UserError, match="without Tp/ and Gt/"):
        data.open_dataset(str(images / "Au"), "--data_path")
    (tmp_path / "Tp").mkdir()
    with pytest.raises(UserError, match="no Gt/"):
        data.open_dataset(str(tmp_path), "--data_path")


# ---------------------------------------------------------------------------------------------------------------------
# Order, ranks, seeds


def test_each_image_once_per_epoch_over_all_ranks(tmp_path):
    for count in (1, 2, 7, 30):
        dataset = data.JsonDataset(write_list(tmp_path / "set.json", count), fingerprint=False)
        for world_size in (1, 2, 3, 5):
            for batch_size in (1, 4, 64):
                ranks = visits(dataset, 0, batch_size, world_size)
                sizes = {len(batch) for batches in ranks for batch in batches}
                assert len({len(batches) for batches in ranks}) == 1
                assert 1 <= min(sizes) and max(sizes) <= min(batch_size, min(sizes) + 1)
                seen, slots = union(ranks), world_size * len(ranks[0])
                assert set(seen) == set(range(count)) and sum(seen.values()) == max(count, slots)
                batches = [list(data.eval_loader(dataset, batch_size, 0, False, rank, world_size).batch_sampler)
                           for rank in range(world_size)]
                assert union(batches) == Counter(range(count))
                assert all(len(batch) <= batch_size for rank in batches for batch in rank)
    assert visits(dataset, 0) == visits(dataset, 0)
    assert visits(dataset, 0) != visits(dataset, 1) and visits(dataset, 0) != visits(dataset, 0, seed=1)


def test_balanced_dataset_draws_the_same_multiset_for_any_number_of_processes(tmp_path):
    sizes = {"large": 100, "small": 20, "equal": 50}
    for name, count in sizes.items():
        write_list(tmp_path / f"{name}.json", count)
    (tmp_path / "all.json").write_text(json.dumps([["JsonDataset", f"{name}.json"] for name in sizes]))
    dataset = data.open_dataset(str(tmp_path / "all.json"), "--data_path", allowed=("BalancedDataset",),
                                sample_number=50, fingerprint=False)
    assert len(dataset) == 150
    covered, first = set(), union(visits(dataset, 0))
    for epoch in range(20):
        drawn = union(visits(dataset, epoch))
        assert drawn == union(visits(dataset, epoch, world_size=3))
        assert drawn == union(visits(dataset, epoch, batch_size=7, world_size=2))
        times = [[drawn[index] for index in range(start, end)] for start, end in ((0, 100), (100, 120), (120, 170))]
        assert list(map(sum, times)) == [50] * 3
        assert max(times[0]) == 1 and set(times[1]) == {2, 3} and set(times[2]) == {1}
        assert epoch == 0 or drawn != first
        covered |= {index for index in drawn if index < 100}
    assert len(covered) >= 99


def test_balanced_dataset_reads_its_members(images, tmp_path):
    members = [["ManiDataset", str(images)], ["JsonDataset", str(images / "set.json")]]
    (tmp_path / "all.json").write_text(json.dumps(members))
    dataset = data.BalancedDataset(str(tmp_path / "all.json"), sample_number=4, image_size=SIZE)
    assert len(dataset) == 8 and "20 images, 18 tampered, 2 authentic" in dataset.describe()
    assert "8 drawn per epoch" in dataset.describe()
    labels = {dataset[index]["label"].item() for index in union(visits(dataset, 0))}
    assert labels <= {0, 1} and dataset[19]["label"] == 0
    (tmp_path / "all.json").write_text(json.dumps([["JsonDataset", str(images)]]))
    with pytest.raises(UserError, match="it is a ManiDataset"):
        data.BalancedDataset(str(tmp_path / "all.json"))


def test_augmentation_depends_on_seed_epoch_and_image_only(images, tmp_path):
    from train import train_transform

    def epochs(workers, persistent=False, rank=0, world_size=1, seed=42, batch_size=2):
        """Return {(epoch, index): augmented image} of two epochs."""
        dataset, seen = data.ManiDataset(images, 64, transform=train_transform(), seed=seed, fingerprint=False), {}
        batches = data.TrainBatches(dataset, batch_size, seed, rank, world_size)
        loader = data.make_loader(dataset, batches, workers, False, persistent=persistent)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            for batch in loader:
                seen |= {(epoch, index): image.numpy() for index, image in zip(batch["index"].tolist(), batch["image"])}
        return seen

    def agree(one, other):
        return all(np.array_equal(one[key], other[key]) for key in other)

    expected = epochs(0)
    assert len(expected) == 18 and not any(np.array_equal(expected[0, i], expected[1, i]) for i in range(9))
    for workers, persistent in ((1, False), (2, False), (2, True)):
        seen = epochs(workers, persistent, batch_size=3)
        assert len(seen) == 18 and agree(expected, seen)
    ranks = [epochs(0, rank=rank, world_size=2) for rank in (0, 1)]
    assert ranks[0].keys() | ranks[1].keys() == expected.keys() and all(agree(expected, seen) for seen in ranks)
    assert not agree(expected, epochs(0, seed=1))
    image = str(images / "Tp" / "p000.png")
    (tmp_path / "twins.json").write_text(json.dumps([[image, "Negative"]] * 2))
    twins = data.JsonDataset(tmp_path / "twins.json", 64, transform=train_transform(), fingerprint=False)
    assert not np.array_equal(twins[0]["image"], twins[1]["image"])


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_workers_hand_over_few_pieces(images):
    """A batch costs one file descriptor, a small part of it that is kept costs none; all arrive as they were."""
    def post_func(sample):
        sample["large"] = np.full((40, 40), len(sample["name"]), np.float64)
        sample["nested"] = {"bfloat16": torch.ones(3000, dtype=torch.bfloat16), "words": ["a", sample["name"]]}

    attacks = list(transforms.GaussianBlurWrapper([0, 3, 5]))
    dataset = data.ManiDataset(images, 64, edge_mask_width=3, attacks=attacks, post_func=post_func, fingerprint=False)
    own = list(data.eval_loader(dataset, 2, 0, False))
    before, kept, most = open_files(), [], 0
    for batches, expected in zip(data.eval_loader(dataset, 2, 2, False), own, strict=True):
        most = max(most, open_files() - before)
        for batch, same in zip(batches, expected, strict=True):
            assert batch.keys() == same.keys()
            assert torch.equal(batch["nested"].pop("bfloat16"), same["nested"].pop("bfloat16"))
            for key, value in same.items():
                assert type(batch[key]) is type(value)
                equal = torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value
                assert equal and getattr(batch[key], "dtype", None) == getattr(value, "dtype", None)
            kept.append(batch["index"])
            batch["image"][:] = 0  # nothing that other tensors share
        assert all(batch["mask"].any() for batch in batches)
    del batches, batch
    gc.collect()
    assert open_files() <= before + 1 and most < 30


@pytest.mark.parametrize("message, cure", [
    ("[Errno 24] Too many open files", "ulimit -n"), ("received 0 items of ancdata", "ulimit -n"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "--shm-size"),
    ("unable to write to file </torch_17_1>: No space left on device (28)", "--shm-size"),
    ("unable to allocate shared memory(shm) for file </torch_1_1>: No space left on device (28)", "--shm-size"),
    ("DataLoader worker (pid 7) is killed by signal: Killed. ", "memory"),
    ("[Errno 12] Cannot allocate memory", "memory")])
def test_limits_of_the_machine(images, message, cure):
    def fail(samples):
        raise RuntimeError(message)

    loader = data.eval_loader(data.ManiDataset(images, 64, fingerprint=False), 2, 0, False)
    loader.collate_fn = fail
    with pytest.raises(UserError, match=f"^--num_workers 0: .*{cure}"):
        list(loader)
    loader.collate_fn = lambda samples: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(loader)


# ---------------------------------------------------------------------------------------------------------------------
# Post functions and attacks


class Shear(albu.ImageOnlyTransform):
    """A transform with a mistake, which the call of `fault` is."""

    def __init__(self, fault):
        super().__init__(p=1)
        self.fault = fault

    def apply(self, img, **params):
        return self.fault(img)


class Blot(transforms.AttackWrapper):
    """An attack that forgets to return the image."""

    def attack(self, image, strength, name):
        return None


def no_shear(image):
    raise ValueError("no such\n  shear.")


def table_post_func(sample, table):
    number = int(os.path.basename(sample["name"])[1:4])
    if table[number] is not KeyError:
        sample["table"] = table[number]


@pytest.mark.parametrize("kind, function, words", [
    ("transform", albu.Compose([albu.OneOf([albu.Sequential([albu.HorizontalFlip(p=1), Shear(no_shear)], p=1)], p=1)]),
     "p000.png: Shear failed (ValueError: no such shear). IMDL_TRACEBACK=1 shows where."),
    ("transform", albu.Compose([albu.RandomCrop(9999, 9999)]), "p000.png: RandomCrop failed ("),
    ("transform", albu.Compose([albu.Normalize()]), "the augmentation returned float32 (96, 128, 3) for p000.png"),
    ("transform", albu.Compose([albu.ToTensorV2()]), "the augmentation returned torch.uint8 (3, 96, 128) for p000.png"),
    ("attacks", list(Blot([0, 1])), "p000.png: Blot failed (AttributeError: 'NoneType'"),
    ("attacks", [(1, lambda image, name: image / 0)], "p000.png: <lambda> failed (RuntimeWarning"),
    ("post_func", functools.partial(table_post_func, table=[]), "p000.png: table_post_func failed (IndexError: list"),
    ("post_func", lambda sample: 5, "p000.png: <lambda> failed (TypeError: 'int'"),
    ("post_func", functools.partial(table_post_func, table=[np.zeros(2), np.zeros((2, 1))]),
     "the post function table_post_func gives 'table' in a form that can't be stacked to a batch (p000.png: ndarray "
     "(2,); p001.png: ndarray (2, 1))"),
    ("post_func", functools.partial(table_post_func, table=[KeyError, torch.ones(1)]),
     "(p000.png: none; p001.png: Tensor (1,))"),
    ("post_func", functools.partial(table_post_func, table=[np.ones(1), KeyError]),
     "(p000.png: ndarray (1,); p001.png: none)"),
    ("post_func", functools.partial(table_post_func, table=[None, None]), "(p000.png: NoneType; p001.png: NoneType)"),
])
@pytest.mark.filterwarnings("error:divide by zero")
def test_mistakes_in_functions_of_the_user(images, kind, function, words):
    """One sentence names the image, the transform or function, and what that said."""
    dataset = data.ManiDataset(images, 64, fingerprint=False, **{kind: function})
    with pytest.raises(UserError) as caught:
        list(data.eval_loader(dataset, 2, 0, False))
    message = str(caught.value).replace(f"{images}/Tp/", "")
    assert words in message and "\n" not in message


def test_a_post_function_may_return_a_dict(images):
    """In place, as a dict of its own, or as no more than what is new."""
    def in_place(sample):
        sample["table"] = np.ones(3)

    for function in (in_place, lambda sample: {**sample, "table": np.ones(3)}, lambda sample: {"table": np.ones(3)}):
        batch = load(data.ManiDataset(images, 64, post_func=function, fingerprint=False), [0, 1])
        assert batch["table"].shape == (2, 3) and batch["image"].shape == (2, 3, 64, 64)


def test_post_function_sees_bytes_path_and_whether_the_pixels_are_the_files(images):
    seen = []

    def post_func(sample):
        seen.append((sample["pristine"], sample["shape"].tolist()))
        assert sample["image"].dtype == sample["mask"].dtype == np.uint8 and sample["image"].flags.c_contiguous
        height, width = sample["shape"]
        stored = np.asarray(Image.open(sample["path"]).convert("RGB"))
        if sample["pristine"]:
            assert np.array_equal(sample["image"][:height, :width], stored[:height, :width])
        sample["table"], sample["number"] = np.full((2, 8, 8), 3, np.int64), 5.0

    def flags(**options):
        seen.clear()
        batch = load(data.JsonDataset(images / "set.json", post_func=post_func, fingerprint=False, **options), [0, 2])
        assert batch["table"].shape == (2, 2, 8, 8) and batch["table"].dtype == torch.int64
        assert batch["number"].tolist() == [5, 5] and not {"path", "pristine"} & set(batch)
        return [pristine for pristine, _ in seen]

    assert flags(image_size=SIZE, padding=True) == [True, True]  # one is cropped at its right, which keeps the origin
    assert flags(image_size=80) == [False, True]  # the second has that size
    assert flags(image_size=SIZE, padding=True, transform=albu.Compose([albu.HorizontalFlip(p=1)])) == [False, False]
    seen.clear()
    attacks = list(transforms.GaussianBlurWrapper([0, 3]))
    dataset = data.ManiDataset(images, SIZE, padding=True, post_func=post_func, attacks=attacks, fingerprint=False)
    batches = data.collate([dataset[0], dataset[2]])
    assert [pristine for pristine, _ in seen] == [True, False] * 2
    plain = data.ManiDataset(images, SIZE, padding=True, fingerprint=False)[0]["image"]
    assert torch.equal(batches[0]["image"][0], torch.from_numpy(plain))
    path = os.fsdecode(dataset.images[0])
    blurred = cv2.GaussianBlur(np.asarray(Image.open(path)), (3, 3), 0)
    assert path.endswith("p000.png") and np.array_equal(batches[1]["image"][0, :96, :100], blurred[:, :100])


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprint and its cache


def test_fingerprint_is_of_names_and_contents_wherever_they_lie(tmp_path):
    original = make_images(tmp_path / "original", 3, authentic=1)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(original, copy)
    first = data.JsonDataset(original / "set.json").fingerprint
    assert len(first) == 12 and first == data.JsonDataset(copy / "set.json").fingerprint
    assert first != data.ManiDataset(copy).fingerprint
    changed = bytearray((copy / "Au/p003.png").read_bytes())
    changed[-20] ^= 1  # in the checksum of the last pixels
    (copy / "Au/p003.png").write_bytes(changed)
    with pytest.raises(UserError, match="p003.png can't be decoded"):
        data.JsonDataset(copy / "set.json")
    pixels = cv2.imread(str(original / "Au/p003.png"))
    pixels[0, 0, 0] ^= 1
    cv2.imwrite(str(copy / "Au/p003.png"), pixels)
    assert data.JsonDataset(copy / "set.json").fingerprint != first


def test_a_broken_link_is_named(tmp_path):
    make_images(tmp_path, 2)
    (tmp_path / "Tp/p001.png").unlink()
    (tmp_path / "Tp/p001.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="Tp/p001.png: No such file"):
        data.ManiDataset(tmp_path)


@pytest.mark.parametrize("name", ["x.tif", "x.bmp", "x.png", "x.jpg"])
def test_truncated_files_are_found_before_training(tmp_path, name):
    make_images(tmp_path, 2)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    image.save(tmp_path / "Au" / name)
    (tmp_path / "one.json").write_text(json.dumps([[f"Au/{name}", "Negative"]]))
    data.JsonDataset(tmp_path / "one.json")
    content = (tmp_path / "Au" / name).read_bytes()
    (tmp_path / "Au" / name).write_bytes(content[:len(content) * 2 // 3])
    with pytest.raises(UserError, match=name):
        data.JsonDataset(tmp_path / "one.json")


@pytest.mark.parametrize(("content", "words"), [
    ([["ManiDatset", "a"]], "Did you mean 'ManiDataset'"), ([["Tp/p000.png", "negative"]], "Did you mean 'Negative'")])
def test_an_error_says_what_a_json_nearly_was(tmp_path, content, words):
    make_images(tmp_path, 1)
    (tmp_path / "near.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        data.open_dataset(tmp_path / "near.json", "--data_path")


def test_an_error_says_what_a_folder_nearly_was(tmp_path):
    make_images(tmp_path / "deep" / "set", 1)
    for wrong in ("deep", "deep/set/Tp"):
        with pytest.raises(UserError, match="did you mean .*set.?"):
            data.open_dataset(tmp_path / wrong, "--data_path")


def test_a_renamed_image_has_another_fingerprint(tmp_path):
    original, copy = make_images(tmp_path / "original", 3, authentic=1), tmp_path / "copy"
    shutil.copytree(original, copy)
    first = data.JsonDataset(original / "set.json").fingerprint
    shutil.copy(original / "Au/p003.png", copy / "Au/renamed.png")
    (copy / "set.json").write_text((original / "set.json").read_text().replace("Au/p003", "Au/renamed"))
    assert data.JsonDataset(copy / "set.json").fingerprint != first


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch, capsys):
    folder, read, scan_file = make_images(tmp_path, 3), [], data.scan_file

    def read_and_scan(path, is_mask):
        read.append(os.path.basename(path))
        return scan_file(path, is_mask)

    monkeypatch.setattr(data, "scan_file", read_and_scan)

    def opened(path=folder):
        """Return the fingerprint and the files read for it."""
        read.clear()
        return data.open_dataset(str(path), "--data_path").fingerprint, sorted(read)

    everything = ["p000.png", "p000_gt.png", "p001.png", "p001_gt.png", "p002.png", "p002_gt.png"]
    first = opened()
    assert first[1] == everything and opened() == (first[0], [])
    os.utime(folder / "Tp/p001.png", ns=(1, 1))
    assert opened() == (first[0], ["p001.png"]) and opened()[1] == []
    shutil.copy(folder / "Tp/p001.png", folder / "Tp/p003.png")
    shutil.copy(folder / "Gt/p001_gt.png", folder / "Gt/p003_gt.png")
    second = opened()
    assert second[0] != first[0] and second[1] == ["p003.png", "p003_gt.png"]
    (folder / "Tp/p003.png").unlink(), (folder / "Gt/p003_gt.png").unlink()
    assert opened() == (first[0], [])
    cache = folder / ".scan.npz"
    for broken in (b"", b"garbage", cache.read_bytes()[:-50]):
        cache.write_bytes(broken)
        assert opened() == first
    assert "note" not in capsys.readouterr().out
    cache.unlink()
    # What a folder does that one may not write to; the superuser may write to any.
    monkeypatch.setattr(np, "savez", lambda file, **arrays: open(folder / "missing" / "file", "wb"))
    assert opened() == opened() == first and "can't be written" in capsys.readouterr().out


def test_lists_of_paths_hold_any_path(tmp_path, monkeypatch):
    names = ["a/b.png", "ü ñ/日本.png", os.fsdecode(b"\xff\xfe.png"), "x" * 5000]
    monkeypatch.setattr(data.FolderDataset, "find", lambda self, path: (names, names, [""] * len(names)))
    dataset = data.FolderDataset(tmp_path, fingerprint=False)
    assert list(map(os.fsdecode, dataset.images)) == names and list(map(os.fsdecode, dataset.masks)) == [""] * 4


def test_calling_a_class_means_that_class(images):
    """A folder with Tp/ and Gt/ is a plain folder of images too, where the name of the class says so."""
    folder = data.FolderDataset(images, fingerprint=False)
    assert len(folder) == 9 + 9 + 2 and folder.facts.tampered == 0
    with pytest.raises(UserError, match="item 0 is .*, not a dataset"):
        data.BalancedDataset(images / "set.json")
    with pytest.raises(UserError, match="can't be read"):
        data.JsonDataset(images)


def test_image_files_one_by_one(images, tmp_path):
    paths = [shutil.copy(images / file, tmp_path) for file in ("Tp/p000.png", "Au/p009.png")]
    dataset = data.FilesDataset(list(map(str, paths)), image_size=SIZE)
    assert load(dataset)["name"] == list(map(str, paths)) and "2 images, unlabelled" in dataset.describe()
    assert len(list(tmp_path.iterdir())) == 2  # no cache among a user's photos
    for wrong, text in ((tmp_path / "gone.png", ": no such file"), (images / "set.json", " is no image file"),
                        (images, " is no image file")):
        with pytest.raises(UserError, match=f"{wrong}{text}"):
            data.FilesDataset([*map(str, paths), str(wrong)])


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_completeness_of_jpeg_and_png(extension):
    """Bytes after the end are allowed; a thumbnail's own end marker in the header doesn't count."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3)).astype(np.uint8)
    content = cv2.imencode(extension, pixels)[1].tobytes()
    if extension == ".jpg":
        thumbnail = content
        content = content[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + content[2:]

    def complete(content):
        return data.is_complete(np.frombuffer(content, np.uint8))

    assert complete(content) and complete(content + b"\0" * 9) and complete(content + b"more" * 99)
    assert not any(complete(content[:length]) for length in (50, len(content) // 2, len(content) - 20))
    assert complete(b"BM" + content)
