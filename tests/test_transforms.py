"""Training augmentations and robustness attacks. Run: pytest tests/test_transforms.py"""

import pickle
import warnings

import cv2
import numpy as np
import pytest

import transforms  # before albumentations, which it keeps from asking the network for news
import albumentations as albu
from registry import UserError

SHAPES = [(1, 1), (1, 2), (2, 1), (1, 90), (90, 1), (3, 3), (7, 200), (200, 7), (61, 83)]


def random_image(shape, seed=0):
    """Smooth structure plus noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.uniform(0, 255, (6, 6, 3)), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (coarse + rng.normal(0, 8, (*shape, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("transform", [transforms.RandomCopyMove, transforms.RandomInpainting])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_masked_rectangle_changes(transform, shape):
    image, mask = random_image(shape), np.zeros(shape, np.uint8)
    mask[:1] = 1
    before = image.copy(), mask.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = albu.Compose([transform(p=1)], seed=1)
        for _ in range(8):
            result = pipeline(image=image, mask=mask)
            changed = (result["image"] != image).any(-1)
            assert result["image"].dtype == result["mask"].dtype == np.uint8
            assert result["image"].shape == image.shape and set(np.unique(result["mask"])) <= {0, 1}
            assert (result["mask"] >= mask).all() and result["mask"][changed].all()
            new_rows, new_columns = np.nonzero(result["mask"] != mask)
            for extent, positions in zip(shape, (new_rows, new_columns)):
                assert np.ptp(positions) < max(1, 0.8 * extent) + 0.5 if positions.size else True
            if min(shape) > 60:
                assert changed.sum() > 0
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


@pytest.mark.parametrize("transform", [transforms.RandomCopyMove, transforms.RandomInpainting])
def test_augmentation_follows_the_seed_of_compose(transform):
    image, mask = random_image((64, 96)), np.zeros((64, 96), np.uint8)
    pipeline = albu.Compose([transform(p=0.7)])

    def run(seed):
        pipeline.set_random_seed(seed)
        return np.stack([pipeline(image=image, mask=mask)["image"] for _ in range(10)])

    first = run(5)
    assert np.array_equal(first, run(5)) and not np.array_equal(first, run(6))


def test_copy_move_copies_and_never_onto_itself():
    image = np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    # a place or two to choose from
    transform = transforms.RandomCopyMove(min_h=0.95, max_h=1, min_w=0.95, max_w=1, p=1)
    transform.set_random_seed(0)
    applied = 0
    for _ in range(60):
        result = transform(image=image, mask=np.zeros((40, 30), np.uint8))
        (window, source) = transform.params["window"], transform.params["source"]
        assert (window is None) == (result["mask"].sum() == 0)
        if window is not None:
            applied += 1
            top, left, height, width = window
            moved = result["image"][top:top + height, left:left + width]
            assert (top, left) != source and result["mask"].sum() == height * width
            assert np.array_equal(moved, image[source[0]:source[0] + height, source[1]:source[1] + width])
    assert 0 < applied < 60


@pytest.mark.parametrize("transform", [transforms.RandomCopyMove, transforms.RandomInpainting])
def test_windows_have_the_published_distribution(transform):
    """Sides uniform from 0.05 to 0.8 of the image's: a mean area of 0.425 squared, 0.18 (published: 0.178, 0.189)."""
    transform, image = transform(p=1), np.zeros((40, 60, 3), np.uint8)
    transform.set_random_seed(0)
    windows = []
    for _ in range(500):
        transform(image=image, mask=image[..., 0])
        windows.append(transform.params["window"][2:])
    shares = np.array(windows) / image.shape[:2]
    assert shares.prod(axis=1).mean() == pytest.approx(0.1806, abs=0.015)
    assert shares.max() == 0.8 and shares.min() == 0.05
    assert np.abs(np.quantile(shares, [0.25, 0.5, 0.75], axis=0).T - [0.2375, 0.425, 0.6125]).max() < 0.05


def test_training_blur_takes_sigma_from_the_kernel():
    transform, image = transforms.RandomGaussianBlur(p=1), random_image((40, 50))
    transform.set_random_seed(0)
    kernels = []
    for _ in range(300):
        blurred = transform(image=image)["image"]
        kernels.append(transform.params["kernel"])
        assert np.array_equal(blurred, cv2.GaussianBlur(image, (kernels[-1], kernels[-1]), 0))
    assert min(map(kernels.count, (3, 5, 7))) > 70 and set(kernels) == {3, 5, 7}


def test_training_jpeg_keeps_red_and_blue_apart():
    """albumentations' own swaps them in the codec, which gives other pixels."""
    transform, image = transforms.RandomJpegCompression(p=1), random_image((40, 50))
    image[..., 0] //= 3
    transform.set_random_seed(0)
    qualities = set()
    for _ in range(300):
        compressed, quality = transform(image=image)["image"], transform.params["quality"]
        qualities.add(quality)
        assert np.array_equal(compressed, transforms.compress_jpeg(image, quality))
        assert not np.array_equal(compressed, transforms.compress_jpeg(image[..., ::-1], quality)[..., ::-1])
    assert qualities == set(range(70, 101))


@pytest.mark.parametrize("make", [
    lambda: transforms.RandomGaussianBlur(kernel_range=(4, 7)),
    lambda: transforms.RandomGaussianBlur(kernel_range=(7, 3)),
    lambda: transforms.RandomJpegCompression(quality_range=(0, 90)),
    lambda: transforms.RandomJpegCompression(quality_range=(90, 70)),
])
def test_wrong_ranges_are_refused(make):
    with pytest.raises(UserError, match="_range=.*is refused; give two"):
        make()


def test_attacks_by_the_convention_of_imdlbenco():
    """Red and blue are swapped in the codec, and the noise is cut off instead of rounded: its mean is -0.5."""
    image = random_image((40, 50))
    image[..., 0] //= 3
    (_, jpeg), = transforms.JpegCompressionWrapper([60], convention="imdlbenco")
    swapped = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    assert np.array_equal(jpeg(image, "a"), swapped)
    assert not np.array_equal(swapped, transforms.compress_jpeg(image, 60))
    grey = np.full((300, 300, 3), 128, np.uint8)
    (_, noise), = transforms.GaussianNoiseWrapper([9], convention="imdlbenco")
    (_, rounded), = transforms.GaussianNoiseWrapper([9])
    assert noise(grey, "a").mean() - 128 == pytest.approx(-0.5, abs=0.02)
    assert set(np.unique(rounded(grey, "a").astype(int) - noise(grey, "a"))) == {0, 1}
    for wrapper in (transforms.JpegCompressionWrapper, transforms.GaussianNoiseWrapper):
        with pytest.raises(UserError, match="'benco' is unknown; give exact or imdlbenco"):
            wrapper([60], convention="benco")


@pytest.mark.parametrize("fractions", [{"min_h": 0}, {"max_w": 1.5}, {"min_w": 0.6, "max_w": 0.5}])
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(UserError, match=next(iter(fractions))):
        transforms.RandomInpainting(**fractions)


def test_blur_is_opencvs_with_sigma_from_the_kernel():
    image = random_image((40, 50))
    (zero, same), (_, blur) = transforms.GaussianBlurWrapper([0, 7])
    sigma = 0.3 * ((7 - 1) * 0.5 - 1) + 0.8
    assert zero == 0 and same(image, "a") is image
    assert np.abs(blur(image, "a").astype(int) - cv2.GaussianBlur(image, (7, 7), sigma)).max() <= 1
    tiny = random_image((1, 3))
    assert [transform(tiny, "a").shape for _, transform in transforms.GaussianBlurWrapper([23])] == [(1, 3, 3)]


@pytest.mark.parametrize("unit, deviation", [("variance", 9 ** 0.5), ("std", 9)])
def test_noise_has_the_stated_deviation(unit, deviation):
    grey = np.full((300, 300, 3), 128, np.uint8)
    (_, transform), = transforms.GaussianNoiseWrapper([9], unit=unit)
    noise = transform(grey, "a.png").astype(float) - 128
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx((deviation ** 2 + 1 / 12) ** 0.5, rel=0.01)  # 1/12: rounding
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.02  # drawn per channel
    assert ("standard deviation" in transforms.GaussianNoiseWrapper([9], unit=unit).strength_unit) == (unit == "std")


def test_noise_depends_on_name_and_seed_and_is_scaled_by_the_strength():
    image = random_image((30, 40))

    def run(name, strength, seed):
        return dict(transforms.GaussianNoiseWrapper([3, strength], seed=seed))[strength](image, name)

    reference = run("a/1.png", 9, 42)
    np.random.seed(0)
    assert np.array_equal(reference, run("a/1.png", 9, 42)) and np.array_equal(reference, run("a/1.png", 9.0, 42))
    for other in (("b/1.png", 9, 42), ("a/1.png", 9, 43)):
        assert not np.array_equal(reference, run(*other))
    image = np.full_like(image, 128)
    small, large = run("a/1.png", 400, 42).astype(int) - 128, run("a/1.png", 1600, 42).astype(int) - 128
    inside = np.abs(large) < 127  # not clipped
    assert inside.mean() > 0.9 and np.abs(2 * small - large)[inside].max() <= 1


def test_noise_clips_and_does_not_wrap():
    image = np.zeros((50, 50, 3), np.uint8)
    image[25:] = 255
    (_, transform), = transforms.GaussianNoiseWrapper([20], unit="std")
    noisy = transform(image, "a")
    assert noisy[:25].max() < 130 and noisy[25:].min() > 125 and (image[:25] == 0).all()


def test_jpeg_has_the_quality_and_the_channel_order():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 200  # red
    strengths, attacks = zip(*transforms.JpegCompressionWrapper([0, 50, 100]))
    assert strengths == (0, 50, 100) and attacks[0](image, "a") is image
    for transform in attacks[1:]:
        assert np.abs(transform(image, "a").astype(int) - image).max() < 8
    assert bytes.fromhex("ffdb004300100b0c0e0c0a10") in transforms.encode_jpeg(image, 50).tobytes()  # Annex K's table


@pytest.mark.parametrize("wrapper, strengths", [
    ("GaussianBlurWrapper", [3, 4]), ("GaussianBlurWrapper", [-3]), ("GaussianBlurWrapper", [2.5]),
    ("GaussianBlurWrapper", []), ("GaussianNoiseWrapper", [-1]), ("GaussianNoiseWrapper", [float("nan")]),
    ("JpegCompressionWrapper", [101]), ("JpegCompressionWrapper", [-1]), ("JpegCompressionWrapper", ["50"]),
])
def test_impossible_strengths_are_refused(wrapper, strengths):
    with pytest.raises(UserError, match=wrapper):
        getattr(transforms, wrapper)(strengths)


def test_unknown_unit_is_refused():
    with pytest.raises(UserError, match="sigma"):
        transforms.GaussianNoiseWrapper([3], unit="sigma")


class InvertWrapper(transforms.AttackWrapper):
    name = "Invert"
    strength_unit = "any"

    def attack(self, image, strength, name):
        return (255 - image) if strength == 1 else (255 - image).astype(np.float32)


def test_wrappers_are_picklable_and_a_users_own_is_a_few_lines():
    image = random_image((20, 20))
    wrappers = [transforms.GaussianBlurWrapper([0, 3]), transforms.GaussianNoiseWrapper([0, 3]),
                transforms.JpegCompressionWrapper([0, 60]), InvertWrapper([0, 1])]
    for wrapper in wrappers:
        for (strength, transform), (_, copy) in zip(wrapper, pickle.loads(pickle.dumps(list(wrapper)))):
            assert np.array_equal(transform(image, "a"), copy(image, "a"))
            assert np.array_equal(transform(image, "a"), image) == (strength == 0)
        assert wrapper.strength_unit in repr(wrapper)
    (_, wrong), = InvertWrapper([2])
    with pytest.raises(UserError, match="float32"):
        wrong(image, "a")
