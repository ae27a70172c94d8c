"""What the repository's work costs, beside the least work found that gives the same: the floor.

    python tests/benchmark.py                # the table (minutes)
    python tests/benchmark.py counts auc     # some of its parts
    python tests/benchmark.py --json         # the table as JSON
    python tests/benchmark.py models         # forward, forward + backward and memory of every model (minutes)
    python tests/benchmark.py pairs          # JSONs of 200,000 and 1,000,000 pairs (minutes, two million hard links)

No test: nothing is asserted about time, and pytest doesn't collect it. Each time is the median of repetitions that
alternate between ours and the floor, on one thread; a ratio of 1 can't be bettered.
"""
import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import cv2
import numpy as np
import torch

import data
import metrics
import panels
import registry
import save_images
from counting import area_of, sorted_keys
from log import format_table

torch.set_num_threads(1)
cv2.setNumThreads(1)
ROOT = Path(__file__).resolve().parents[1]


def seconds(function):
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(name, ours, floor, repetitions=15, unit=1000):
    """Return a table row: median of `ours` and of `floor`, called in turn, in 1 / unit seconds, and their ratio."""
    ours(), floor()
    times = [(seconds(ours), seconds(floor)) for _ in range(repetitions)]
    first, second = (unit * statistics.median(column) for column in zip(*times))
    return {"work": name, "ours": first, "floor": second, "ratio": first / second}


def image(height=256, width=384, seed=0):
    """Return smooth colours with sensor noise, (H, W, 3) uint8, which compress about as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.uniform(0, 255, (8, 12, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (coarse + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


def write_set(folder, count, **size):
    """Write a ManiDataset of JPEG images with PNG masks, which show a rectangle; returns `folder` as text."""
    for name in ("Tp", "Gt"):
        (Path(folder) / name).mkdir()
    for i in range(count):
        pixels = image(**size, seed=i)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[40:140, 60:200] = 255
        cv2.imwrite(f"{folder}/Tp/p{i}.jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
        cv2.imwrite(f"{folder}/Gt/p{i}.png", mask)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The table: each part yields rows


def read_floor(image, mask, size):
    """An image and its mask as tensors, resized: OpenCV alone, no check of anything."""
    image = cv2.imdecode(np.fromfile(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    mask = cv2.imdecode(np.fromfile(mask, np.uint8), cv2.IMREAD_GRAYSCALE)
    image = cv2.resize(image, (size, size))
    return image, cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST) > 127


def tensors_floor(images, masks):
    """Normalised tensors of a batch."""
    mean, scale = data.normalisation(torch.device("cpu"))
    image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return image.sub_(mean).mul_(scale), torch.from_numpy(np.stack(masks))[:, None].float()


def loading():
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.ManiDataset(write_set(folder, 8), fingerprint=False)
        files = list(zip(map(os.fsdecode, dataset.images), map(os.fsdecode, dataset.masks)))
        yield race("load 8 images of 384 x 256 to 512, ms",
                   lambda: data.to_device(data.collate([dataset[i] for i in range(8)]), torch.device("cpu")),
                   lambda: tensors_floor(*zip(*(read_floor(*pair, 512) for pair in files))))


def predictions(size, count=1):
    """Predictions and masks (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, size, size)
    mask[..., size // 5:size // 2, size // 5:size // 2] = 1
    return (torch.rand(mask.shape, generator=generator) + 0.3 * mask) / 1.3, mask


def counts():
    """Three metrics of a batch of two, with the checks that prediction and mask are what they should be."""
    chosen = [metrics.PixelF1(), metrics.PixelIOU(), metrics.PixelAccuracy()]
    for size in 512, 1024:
        (pred, mask), shape = predictions(size, 2), torch.tensor([[size, size]] * 2)
        whole, count = torch.ones_like(mask), np.count_nonzero

        def ours(**area):
            pixels = metrics.valid_pixels(pred, mask, **area)
            return [metric.compute(pixels) for metric in chosen] + pixels.checks()

        def floor():
            for score, given in zip(pred.numpy(), mask.numpy()):
                positive, truth = score > 0.5, given == 1
                tp, bad = count(positive & truth), count(truth) + count(given == 0) != given.size
                count(positive) - tp, count(truth) - tp, bad, score.min(), score.max()

        yield race(f"F1, IoU, accuracy of 2 images of {size} x {size}, ms", lambda: ours(shape=shape), floor)
        yield race(f"the same through a shape_mask, {size} x {size}, ms", lambda: ours(shape_mask=whole), floor)


def auc():
    for size in 512, 1024:
        pred, mask = (x.flatten() for x in predictions(size))
        keys, truth = pred.view(torch.int32) * 2 + mask.int(), mask > 0.5
        yield race(f"exact AUC of {size} x {size} (floor: the sort), ms",
                   lambda: area_of(sorted_keys(pred, truth).numpy()), lambda: torch.sort(keys))


def robustness():
    """The data side of the script's 18 attacks and the clean images."""
    from test_robust import make_attacks
    pairs = [pair for wrapper in make_attacks(None, "variance", 42, "exact") for pair in wrapper]
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.ManiDataset(write_set(folder, 8), attacks=pairs, fingerprint=False)
        files = list(zip(map(os.fsdecode, dataset.images), map(os.fsdecode, dataset.masks)))

        def ours():
            for batch in data.collate([dataset[i] for i in range(8)]):
                data.to_device(batch, torch.device("cpu"))

        def floor():
            versions = []
            for image, mask in files:
                pixels = cv2.imdecode(np.fromfile(image, np.uint8), cv2.IMREAD_COLOR_RGB)
                mask = read_floor(image, mask, 512)[1]
                noise = cv2.randn(np.empty(pixels.shape, np.float32), 0, 1)
                attacked = [pixels] + [cv2.GaussianBlur(pixels, (k, k), 0) for k in (3, 7, 11, 15, 19, 23)]
                attacked += [cv2.addWeighted(pixels, 1, noise, v ** 0.5, 0, dtype=cv2.CV_8U) for v in range(3, 24, 4)]
                for quality in (50, 60, 70, 80, 90, 100):
                    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
                    attacked.append(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB))
                versions.append([(cv2.resize(each, (512, 512)), mask) for each in attacked])
            for version in zip(*versions):
                tensors_floor(*zip(*version))

        yield race(f"{len(pairs)} strengths of 8 images, ms", ours, floor, repetitions=5)


def saving():
    """A predicted mask to a PNG of the image's size."""
    pred = cv2.GaussianBlur(predictions(512)[0][0, 0].numpy(), (0, 0), 9)
    with tempfile.TemporaryDirectory() as folder:
        for height, width in (256, 384), (768, 1024):
            file = Path(folder, "mask.png")

            def ours():
                full = data.restore_size(pred, (512, 512), (height, width), padding=False)
                save_images.write_png(file, save_images.to_bytes(full))

            def floor():
                cv2.imencode(".png", cv2.resize(cv2.convertScaleAbs(pred, alpha=255), (width, height)))[1].tofile(file)

            yield race(f"save a mask of {width} x {height}, ms", ours, floor)


def imports():
    """A new interpreter with what a training of MyModel imports, and with torch, OpenCV and albumentations."""
    def run(code):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

    ours = """
import train, registry
registry.find_model("MyModel")
train.train_transform()
train.make_optimizer(registry.build_model("MyModel", {}), 0.05, 1e-3)
"""
    yield race("imports of a training, s", lambda: run(ours),
               lambda: run("import torch, cv2, albumentations, torch.utils.data"), repetitions=3, unit=1)


def tensorboard():
    """The panel of six images of 512 x 512; the floor scales its thirty tiles and writes a JPEG of its size."""
    from torch.utils.tensorboard import SummaryWriter
    pixels = [image(512, 512, seed=i) for i in range(6)]
    mask = torch.zeros(6, 1, 512, 512)
    mask[..., 100:200, 100:300] = 1
    batch = {"image": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, "mask": mask,
             "label": torch.ones(6), "shape": torch.full((6, 2), 512), "name": [f"image_{i}.jpg" for i in range(6)]}
    output = {"pred_mask": batch["image"][:, :1]}
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        def floor():
            rows = [np.hstack([cv2.resize(each, (256, 256), interpolation=cv2.INTER_AREA) for _ in range(5)])
                    for each in pixels]
            cv2.imencode(".jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 90])

        yield race("images of an evaluation to TensorBoard, ms",
                   lambda: panels.write_rows(writer, "test", panels.rows_of(batch, output, range(6)), 0), floor,
                   repetitions=5)


def lists():
    """A JSON of 100,000 pairs; the fingerprint of 300."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_pairs(folder, 100_000)

        def floor():
            for image, mask in json.loads(Path(path).read_bytes()):
                os.access(os.path.join(folder, image), os.F_OK)
                os.access(os.path.join(folder, mask), os.F_OK)

        yield race("open a JSON of 100,000 pairs, ms", lambda: data.JsonDataset(path, fingerprint=False), floor,
                   repetitions=5)
        dataset = data.JsonDataset(path, fingerprint=False)
        columns = [column.tolist() for column in (dataset.names, dataset.images, dataset.masks)]
        yield race("look up 100,000 pairs, ms",
                   lambda: [[os.fsdecode(column[i]) for column in (dataset.names, dataset.images, dataset.masks)]
                            for i in range(100_000)],
                   lambda: [[os.fsdecode(column[i]) for column in columns] for i in range(100_000)], repetitions=5)
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.ManiDataset(write_set(folder, 300), fingerprint=False)
        files = list(map(os.fsdecode, [*dataset.images, *dataset.masks]))

        def first():
            Path(folder, ".scan.npz").unlink(missing_ok=True)
            data.ManiDataset(folder, progress=False)

        def read():
            """Every file's bytes hashed, and the masks decoded, whose labels are counted."""
            for file in files:
                content = np.fromfile(file, np.uint8)
                hashlib.blake2b(content, digest_size=16).hexdigest()
                if file.endswith(".png"):
                    cv2.imdecode(content, cv2.IMREAD_GRAYSCALE).any()

        yield race("first fingerprint of 300 pairs, ms", first, read, repetitions=5)
        yield race("the same again, ms", lambda: data.ManiDataset(folder), lambda: [os.stat(file) for file in files])


def loops():
    """The loop of test.py around a model, and its forward passes alone, on batches that are there already."""
    from evaluate import evaluate
    from models.noisenet import NoiseNet
    model = NoiseNet().eval()
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.ManiDataset(write_set(folder, 32), fingerprint=False)
        batches = [data.to_device(data.collate([dataset[i] for i in range(at, at + 4)]), torch.device("cpu"))
                   for at in range(0, 32, 4)]

        def floor():
            with torch.no_grad():
                for batch in batches:
                    model(**batch)

        chosen = [metrics.PixelF1(), metrics.PixelIOU()]
        yield race("evaluate 32 images by NoiseNet, 1 worker, ms",
                   lambda: evaluate(model, dataset, chosen, batch_size=4, num_workers=1), floor, repetitions=3)


# ---------------------------------------------------------------------------------------------------------------------
# Slow measurements, each case in a process of its own


def apart(function, *args):
    """Call a function of this file in a new interpreter, whose memory is its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory(process, *keys, file="smaps_rollup"):
    """Return the sum in MB of entries of /proc/<process>/<file>."""
    lines = [line.split() for line in Path(f"/proc/{process}/{file}").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0].rstrip(":") in keys) / 1024


def model_row(name, folder, size=512):
    """Return the table row of a model: one image of size x size, batch of 1."""
    sizes = {"image_size": size, "input_size": size, "pretrained": False}
    model_args = {key: sizes[key] for key in registry.parameters(registry.find_model(name)) if key in sizes}
    dataset = data.ManiDataset(folder, image_size=size, edge_mask_width=7, fingerprint=False,
                               post_func=registry.post_function(name, model_args))
    batch = data.to_device(data.collate([dataset[0]]), torch.device("cpu"))
    model = registry.build_model(name, model_args)
    count = sum(parameter.numel() for parameter in model.parameters())

    def forward():
        with torch.no_grad():
            model.eval()(**batch)

    def both():
        model.train()(**batch)["backward_loss"].backward()

    row = [name, f"{count / 1e6:.1f}"]
    for function in (forward, both):
        before = memory("self", "VmRSS", file="status")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        row += [f"{statistics.median(seconds(function) for _ in range(3)):.2f}",
                f"{memory('self', 'VmHWM', file='status') - before:.0f}"]
    return row


def models():
    """Print forward and forward + backward of every model at 512."""
    registry.import_files(registry.model_files())
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = write_set(folder, 1, height=512, width=512), []
        for name in sorted(registry.MODELS.entries):
            rows.append(apart(model_row, name, folder))
            print("measured", name, file=sys.stderr, flush=True)
    print(format_table(["model, 1 image of 512 x 512, 1 thread", "M parameters", "forward s", "peak MB",
                        "forward + backward s", "peak MB"], rows))


class LookUps(data.JsonDataset):
    """A JsonDataset whose samples are looked up, not read."""

    def __getitem__(self, index):
        return {"index": index, "length": len(self.names[index]) + len(self.images[index]) + len(self.masks[index])}


def pairs_row(path, workers=4, batch_size=256):
    """Return the table row of a JSON: time to open it and to the first batch, memory of workers and main process."""
    multiprocessing.set_start_method("fork", force=True)  # as in a run; a spawned process would spawn its workers too
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores, on purpose
    idle = memory("self", "Rss")
    start = time.perf_counter()
    dataset = LookUps(path, fingerprint=False)
    row = [f"{len(dataset):,}", f"{time.perf_counter() - start:.1f}"]
    loader = data.make_loader(dataset, data.TrainBatches(dataset, batch_size, seed=0), workers, False, persistent=True)

    def worker_memory(*keys):
        return f"{sum(memory(child.pid, *keys) for child in multiprocessing.active_children()):.0f}"

    start = time.perf_counter()
    batches = iter(loader)
    seen = len(next(batches)["index"])
    row += [f"{time.perf_counter() - start:.2f}", worker_memory("Pss"), worker_memory("Private_Dirty", "Private_Clean")]
    start = time.perf_counter()
    seen += sum(len(batch["index"]) for batch in batches)
    assert seen == len(dataset)
    row += [f"{time.perf_counter() - start:.1f}", worker_memory("Pss"), worker_memory("Private_Dirty", "Private_Clean")]
    return row + [f"{memory('self', 'Rss') - idle:.0f}", f"{memory('self', 'VmHWM', file='status') - idle:.0f}"]


def write_pairs(folder, count):
    """Write a JSON of `count` pairs of different files: hard links, as many to each real file as file systems allow."""
    pairs = []
    for part in range(count // 1000):
        for kind in ("Tp", "Gt"):
            place = Path(folder) / kind / f"{part:04d}"
            if not place.exists():
                place.mkdir(parents=True)
                cv2.imwrite(f"{place}/image_000.png", np.zeros((4, 4), np.uint8))
                for i in range(1, 1000):
                    os.link(f"{place}/image_000.png", f"{place}/image_{i:03d}.png")
        pairs += [[f"Tp/{part:04d}/image_{i:03d}.png", f"Gt/{part:04d}/image_{i:03d}.png"] for i in range(1000)]
    path = f"{folder}/set_{count}.json"
    Path(path).write_text(json.dumps(pairs))
    return path


def pairs(counts=(200_000, 1_000_000)):
    """Print time and memory of large JSONs: an epoch of look-ups in 4 workers, without decoding."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [apart(pairs_row, write_pairs(folder, count)) for count in counts]
    print(format_table(["pairs, 4 workers (MB of all 4)", "open s", "first batch s", "PSS", "private", "epoch s",
                        "PSS after", "private after", "main MB", "main peak"], rows))


TABLE = {function.__name__: function for function in (loading, counts, auc, robustness, saving, imports, tensorboard,
                                                      lists, loops)}
SLOW = {function.__name__: function for function in (models, pairs)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"what to measure: {' '.join([*TABLE, *SLOW])} (default: all but the last two)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    names = args.names or list(TABLE)
    unknown = set(names) - {*TABLE, *SLOW}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not known. Known: {', '.join([*TABLE, *SLOW])}")
    rows = [row for name in names if name in TABLE for row in TABLE[name]()]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(format_table(["work", "ours", "floor", "ours / floor"],
                           [[row["work"], f"{row['ours']:.3g}", f"{row['floor']:.3g}", f"{row['ratio']:.2f}"]
                            for row in rows]))
    for name in names:
        if name in SLOW:
            SLOW[name]()


if __name__ == "__main__":
    main()
