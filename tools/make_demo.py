"""Make a small dataset of tampered and authentic images, from the two photographs that scikit-learn ships.

    python tools/make_demo.py --output demo_data
    bash runs/demo.sh                                # makes it, then trains and tests on it

Writes one set to train on and two to test on (splicing; copy-move and inpainting): a folder each with Tp/, Gt/ and Au/,
a JSON list of its [image, mask or "Negative"] pairs, and test_datasets.json, which names the two test sets. Training
uses the left part of both photographs and testing the right part, so no pixel serves both. The same seed gives the same
bytes.

What gives a forgery away here, as in real ones:
- every image, authentic or not, has sensor noise and was saved as JPEG before the manipulation and after it;
- splicing: the object comes from an image with other colours, little noise and strong compression, and was resampled;
- copy-move: the object was rotated and enlarged, and interpolation smoothed its noise;
- inpainting: the filled area is smooth and has no noise.
So the set is easy: a method that does well on it has learned local noise and traces of resampling, no more than that.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import json
import math

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

from log import make_output_dir, say, write_file
from registry import Parser, UserError, counted, exit_on_user_error, natural
from transforms import INPAINT_RADIUS, compress_jpeg, encode_jpeg

SETS = {  # name -> kinds of images, taken in turn
    "train": ("splicing", "copymove", "inpainting", "authentic"),
    "test_splicing": ("splicing", "splicing", "splicing", "authentic"),
    "test_copymove_inpainting": ("copymove", "inpainting", "copymove", "inpainting", "authentic"),
}
SHAPES = ((256, 256), (256, 192), (192, 256))  # (H, W) in pixels
TRAIN_COLUMNS = slice(0, 376)  # of the 640 columns of both photographs
TEST_COLUMNS = slice(384, 640)  # the 8 columns between keep JPEG's chroma interpolation from crossing over
MARKER = "made_by_demo.json"


def crop_photograph(rng, photograph, shape):
    """Return a random view of `photograph`, uint8 (H, W, 3) RGB, as float32 (h, w, 3) of `shape` (h, w).

    It is cropped, shrunk by at most 1.3, perhaps flipped, and varied in brightness, contrast and colours.
    """
    height, width = shape
    scale = rng.uniform(1, min(1.3, photograph.shape[0] / height, photograph.shape[1] / width))
    tall, wide = int(height * scale), int(width * scale)
    top, left = rng.integers(photograph.shape[0] - tall + 1), rng.integers(photograph.shape[1] - wide + 1)
    view = cv2.resize(photograph[top:top + tall, left:left + wide], (width, height), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        view = view[:, ::-1]
    colour = rng.uniform(0.9, 1.1, 3) * rng.uniform(0.75, 1)
    view = 255 * (view / 255 * colour).clip(0, 1) ** rng.uniform(0.8, 1.25)
    return view.astype(np.float32)


def add_sensor_noise(rng, image, sigma):
    """Return `image` (H, W, 3), 0-255, as uint8 with Gaussian noise of standard deviation `sigma`."""
    return np.rint(image + rng.normal(0, sigma, image.shape)).clip(0, 255).astype(np.uint8)


def random_outline(rng, shape, smallest, largest):
    """Return a smooth area that looks like an object's, uint8 0/1 of `shape` (H, W).

    The outline is a circle whose radius is bent by a few random waves, then stretched and turned. The area covers a
    fraction of the image of about `smallest` to `largest`.
    """
    height, width = shape
    angles = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    while True:
        radius = np.ones_like(angles)
        for wave in range(2, 8):
            radius += rng.normal(0, 0.4 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
        points = np.stack([np.cos(angles), np.sin(angles)]) * radius.clip(0.3)
        stretch, turn = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = rotation @ (points * [[stretch], [1 / stretch]])
        points *= math.sqrt(rng.uniform(smallest, largest) * height * width / np.pi)
        points += [[rng.uniform(0.15, 0.85) * width], [rng.uniform(0.15, 0.85) * height]]
        area = cv2.fillPoly(np.zeros(shape, np.uint8), [np.rint(points.T).astype(np.int32)], 1)
        if smallest <= area.mean() <= 1.2 * largest:
            return area


def blend(rng, host, patch, area):
    """Put `patch` over `host`, both (H, W, 3), inside `area` (H, W, 0/1), with a soft edge of about two pixels.

    Returns the image, uint8, and its mask, uint8 (H, W): 1 where the patch has the greater part.
    """
    soft = cv2.GaussianBlur(area.astype(np.float32), (0, 0), rng.uniform(0.6, 1.5))
    image = host + soft[..., None] * (patch.astype(np.float32) - host)
    return np.rint(image).clip(0, 255).astype(np.uint8), (soft > 0.5).astype(np.uint8)


def move_object(rng, source, area, distance):
    """Turn, enlarge and shift `source` (H, W, 3): what lies `distance` (dx, dy; pixels) away comes to `area`."""
    moments = cv2.moments(area, binaryImage=True)
    centre = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    turn = rng.uniform(8, 40) * rng.choice([-1, 1])
    matrix = cv2.getRotationMatrix2D((centre[0] + distance[0], centre[1] + distance[1]), turn, rng.uniform(1.1, 1.8))
    matrix[:, 2] -= distance
    return cv2.warpAffine(source, matrix, area.shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def splice(rng, host, photographs):
    """Paste an object from another view of the photographs; returns image and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.04, 0.22)
    views = [crop_photograph(rng, photographs[rng.integers(len(photographs))], host.shape[:2]) for _ in range(4)]
    donor = max(views, key=lambda view: view[area == 1].std())  # an object, rather than sky
    donor = compress_jpeg(add_sensor_noise(rng, donor, 0.8), int(rng.integers(40, 76)))
    patch = move_object(rng, donor, area, (0, 0)).astype(np.float32)
    # as a forger would, bring the object's brightness and colour nearer to those of the place
    patch += rng.uniform(0.2, 0.6) * np.subtract(cv2.mean(host, area), cv2.mean(patch, area))[:3]
    return blend(rng, host, patch.clip(0, 255), area)


def copy_move(rng, host, photographs):
    """Copy an object of the image to another place of it; returns image and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.04, 0.18)
    height, width = area.shape
    patches = []
    for angle in rng.uniform(0, 2 * np.pi, 4):
        distance = rng.uniform(0.35, 0.6) * width * np.cos(angle), rng.uniform(0.35, 0.6) * height * np.sin(angle)
        patches.append(move_object(rng, host, area, distance))
    patch = max(patches, key=lambda candidate: candidate[area == 1].std())  # an object, rather than sky
    return blend(rng, host, patch, area)


def inpaint_object(rng, host, photographs):
    """Remove what lies in an area by inpainting; returns image and mask as `blend` does."""
    area = random_outline(rng, host.shape[:2], 0.03, 0.12)
    hole = cv2.dilate(area, np.ones((7, 7), np.uint8))
    method = [cv2.INPAINT_TELEA, cv2.INPAINT_NS][rng.integers(2)]
    return blend(rng, host, cv2.inpaint(host, hole, INPAINT_RADIUS, method), area)


MANIPULATIONS = {"splicing": splice, "copymove": copy_move, "inpainting": inpaint_object}


def make_image(rng, photographs, kind):
    """Return the bytes of one JPEG and its mask, uint8 0/1 (H, W); the mask of an authentic image is None."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    host = crop_photograph(rng, photographs[rng.integers(len(photographs))], shape)
    image, mask = compress_jpeg(add_sensor_noise(rng, host, rng.uniform(4, 7)), int(rng.integers(85, 99))), None
    if kind != "authentic":
        image, mask = MANIPULATIONS[kind](rng, image, photographs)
    return encode_jpeg(image, int(rng.integers(70, 99))).tobytes(), mask


def clear_folder(output):
    """Delete what an earlier demo wrote to the folder `output` (a Path); UserError if it holds anything else."""
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: this is a file; give the name of a new folder.")
        if output.exists() and any(output.iterdir()) and not (output / MARKER).is_file():
            raise UserError(f"--output {output}: the folder holds files that this script did not make (it has no "
                            f"{MARKER}); give a new or empty folder.")
        for name, kinds in SETS.items():
            old = [path for kind in kinds for path in (output / name).glob(f"*/{kind}_*")]
            for path in {*old, output / f"{name}.json", output / "test_datasets.json"}:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: can't be used ({error}); give a folder that you may write to.") from None


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder to write; new, empty or an earlier demo's")
    parser.add_argument("--seed", type=natural, default=42, help="same seed, same files (default: %(default)s)")
    parser.add_argument("--train", type=natural, default=300, help="images to train on (default: %(default)s)")
    parser.add_argument("--test", type=natural, default=40,
                        help="images in each of the two test sets (default: %(default)s)")
    args = parser.parse_args()
    for flag, count in (("--train", args.train), ("--test", args.test)):
        if count < 5:  # so that every kind of image is there
            raise UserError(f"{flag} {count}: too small; give at least 5.")

    output = Path(args.output)
    clear_folder(output)
    make_output_dir(output, "--output")
    settings = {"made_by": "python tools/make_demo.py", "seed": args.seed, "train": args.train, "test": args.test}
    write_file(output / MARKER, json.dumps(settings) + "\n")  # first, so that an unfinished demo is known as one

    photographs = load_sample_images().images  # a pagoda and a dahlia, uint8 (427, 640, 3) RGB
    for number, (name, kinds) in enumerate(SETS.items()):
        is_train = name == "train"
        regions = [photograph[:, TRAIN_COLUMNS if is_train else TEST_COLUMNS] for photograph in photographs]
        rows, fractions = [], []
        for index in range(args.train if is_train else args.test):
            kind = kinds[index % len(kinds)]
            jpeg, mask = make_image(np.random.default_rng([args.seed, number, index]), regions, kind)
            image_path = f"{name}/{'Au' if mask is None else 'Tp'}/{kind}_{index:04d}.jpg"
            mask_path = "Negative" if mask is None else f"{name}/Gt/{kind}_{index:04d}_gt.png"
            write_file(output / image_path, jpeg)
            if mask is not None:
                write_file(output / mask_path, cv2.imencode(".png", mask * 255)[1])
                fractions.append(mask.mean())
            rows.append(json.dumps([image_path, mask_path]))
        write_file(output / f"{name}.json", "[\n" + ",\n".join(rows) + "\n]\n")

        line = (f"{output / name}.json: {counted(len(rows), 'image')}, {len(fractions)} tampered, "
                f"tampered fraction {np.mean(fractions):.3f}")
        if not is_train:
            # The best constant prediction: on an image of which the fraction a is tampered, precision a and recall 1.
            f1 = np.mean([2 * a / (1 + a) for a in fractions])
            line += f", pixel-level F1 of predicting everything tampered: {f1:.2f}"
        say(line)
    test_sets = {name.removeprefix("test_"): f"{name}.json" for name in SETS if name != "train"}
    write_file(output / "test_datasets.json", json.dumps(test_sets, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
