"""Measurements of what is meant to be cheap, each as a ratio to a plain way of doing the same in the same run.

    python tests/benchmark.py                # loading, auc, edge, seeding, robustness (a minute)
    python tests/benchmark.py auc edge       # some of them
    python tests/benchmark.py models         # forward, forward + backward and memory of every model (minutes)
    python tests/benchmark.py pairs          # JSONs of 200,000 and 1,000,000 pairs (minutes, two million hard links)

No test: nothing is asserted about time, and pytest doesn't collect it. Each time is the median of repetitions that
alternate between the two ways, on one thread.
"""
import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
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
from PIL import Image
from torch.utils.data import default_collate

import data
import registry
import transforms  # before albumentations, which it keeps from asking the network for news
import albumentations as albu
from albumentations.pytorch import ToTensorV2
from log import format_table
from metrics import exact_auc

torch.set_num_threads(1)


def seconds(function):
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def race(name, ours, plain, repetitions=15):
    """Return a table row: median milliseconds of `ours` and of `plain`, called in turn, and plain / ours."""
    ours(), plain()
    times = [(seconds(ours), seconds(plain)) for _ in range(repetitions)]
    fast, slow = (1000 * statistics.median(column) for column in zip(*times))
    return [name, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.2f}"]


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
# Quick measurements: each yields table rows


def loading():
    """A batch of 8 files to normalised tensors: this repository, and PIL with albumentations."""
    with tempfile.TemporaryDirectory() as folder:
        for fitting, plain_fitting in (("resizing", albu.Resize(512, 512)),
                                       ("padding", albu.PadIfNeeded(512, 512, position="top_left"))):
            root = Path(folder) / fitting
            root.mkdir()
            dataset = data.ManiDataset(write_set(root, 8), padding=fitting == "padding", fingerprint=False)
            pipeline = albu.Compose([plain_fitting, albu.Normalize(), ToTensorV2()])
            files = list(zip(map(os.fsdecode, dataset.images), map(os.fsdecode, dataset.masks)))

            def ours():
                data.to_device(data.collate([dataset[i] for i in range(8)]), torch.device("cpu"))

            def plain():
                samples = []
                for image, mask in files:
                    mask = np.asarray(Image.open(mask).convert("RGB")).mean(axis=2) > 127.5
                    sample = pipeline(image=np.asarray(Image.open(image).convert("RGB")), mask=mask.astype(np.uint8))
                    samples.append({"image": sample["image"], "mask": sample["mask"][None].float()})
                default_collate(samples)

            yield race(f"load 8 images, {fitting}", ours, plain)


def auc():
    """Exact AUC of one 512 x 512 image against scikit-learn and an argsort with torch."""
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(512 * 512, generator=generator) < 0.2
    score = (torch.rand(512 * 512, generator=generator) + 0.3 * truth) / 1.3

    def argsort():
        """Right without ties only."""
        rank = torch.empty(len(score), dtype=torch.int64)
        rank[torch.argsort(score)] = torch.arange(1, len(score) + 1)
        count = truth.sum()
        return (rank[truth].sum() - count * (count + 1) / 2) / (count * (len(score) - count))

    def sklearn():
        return roc_auc_score(truth.numpy(), score.numpy())

    yield race("AUC, against scikit-learn", lambda: exact_auc(score, truth), sklearn)
    yield race("AUC, against argsort", lambda: exact_auc(score, truth), argsort)


def edge():
    """Edge mask of 512 x 512 pixels: one morphological gradient, and dilation minus erosion, also of a float mask."""
    mask = np.zeros((512, 512), np.uint8)
    mask[100:300, 150:400] = 1
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (7, 7))
    real = mask.astype(np.float32)
    yield race("edge mask, against dilate - erode", lambda: cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, kernel),
               lambda: cv2.dilate(mask, kernel) - cv2.erode(mask, kernel))
    yield race("edge mask, against the same in float32", lambda: cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, kernel),
               lambda: cv2.dilate(real, kernel) - cv2.erode(real, kernel))


def seeding():
    """What it costs that each image's augmentation has a seed of its own, beside the augmentation itself."""
    from train import train_transform

    transform, pixels, mask = train_transform(), image(), np.zeros((256, 384), np.uint8)
    rounds = 20

    def seeded():
        for i in range(rounds):
            transform.set_random_seed(int(np.random.default_rng([42, 0, i]).integers(2**31)))

    def augmented():
        for i in range(rounds):
            transform(image=pixels, mask=mask)

    yield race("seeds of 20 images, against augmenting them", seeded, augmented)


def robustness():
    """Seven blurs of 8 images: decoded once, and decoded for each strength."""
    attacks = list(transforms.GaussianBlurWrapper([0, 3, 7, 11, 15, 19, 23]))
    with tempfile.TemporaryDirectory() as folder:
        folder = write_set(folder, 8, height=1024, width=1536)
        together = data.ManiDataset(folder, attacks=attacks, fingerprint=False)
        apart = [data.ManiDataset(folder, attacks=[attack], fingerprint=False) for attack in attacks]
        yield race("7 blurs of 8 images of 1024 x 1536", lambda: [together[i] for i in range(8)],
                   lambda: [dataset[i] for dataset in apart for i in range(8)], repetitions=3)


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


QUICK = {function.__name__: function for function in (loading, auc, edge, seeding, robustness)}
SLOW = {function.__name__: function for function in (models, pairs)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"what to measure: {' '.join([*QUICK, *SLOW])} (default: all but the last two)")
    names = parser.parse_args().names or list(QUICK)
    unknown = set(names) - {*QUICK, *SLOW}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not known. Known: {', '.join([*QUICK, *SLOW])}")
    rows = [row for name in names if name in QUICK for row in QUICK[name]()]
    if rows:
        print(format_table(["milliseconds, median", "ours", "plain", "plain / ours"], rows))
    for name in names:
        if name in SLOW:
            SLOW[name]()


if __name__ == "__main__":
    main()
