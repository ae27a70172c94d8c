"""train.py end to end: what it writes and prints, its arithmetic against a plain loop, and that a stopped run goes on
as if never stopped.

Run: python -m pytest tests/test_train.py
"""
import copy
import functools
import json
import math
import os
import re
import shutil
import subprocess
import types

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

import checkpoint
import data
import ddp
import models.mymodel
import panels
import probe_models  # noqa: F401  registers the models of these tests
import train
from conftest import ROOT, make_images, run_here, run_script, summary
from log import EpochLog
from registry import UserError

SMALL = ["--if_resizing", "--image_size", 64, "--num_workers", 0, "--seed", 3]


def rows(folder):
    """The rows of a log.txt."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def weights(file):
    return torch.load(file, weights_only=True)["model"]


def equal(first, second):
    """Tell whether two state dicts are equal bit for bit."""
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def saved(folder):
    """The epochs whose checkpoints a folder holds."""
    return [checkpoint.checkpoint_epoch(p) for p in checkpoint.list_checkpoints(folder)]


# ---------------------------------------------------------------------------------------------------------------------
# One run, two test sets


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Five epochs of two accumulated steps, evaluated after 2, 4 and 5 on two sets; returns (output folder, output)."""
    folder = tmp_path_factory.mktemp("run")
    sets = folder / "sets.json"
    sets.write_text(json.dumps({"mani": str(images), "all": str(images / "set.json")}))
    done = run_here("train.py", "--model", "MyModel", "--data_path", images, "--test_data_path", sets, "--epochs", 5,
                    "--test_period", 2, "--save_period", 3, "--batch_size", 2, "--accum_iter", 2, "--lr", 0.3,
                    "--warmup_epochs", 1, "--output_dir", folder / "out", *SMALL)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "out", done.stdout


def test_log_has_one_row_per_epoch_with_means_over_the_sets(run):
    log = rows(run[0])
    assert [row["epoch"] for row in log] == [0, 1, 2, 3, 4]
    assert ["test_pixel-level F1" in row for row in log] == [False, True, False, True, True]
    for row in log:
        assert {"train_lr", "train_mask_loss", "train_label_loss", "train_total_loss", "train_grad_norm"} <= set(row)
    last = log[-1]
    for metric in ("pixel-level F1", "pixel-level IOU"):
        assert last[f"test_{metric}"] == pytest.approx((last[f"test_mani/{metric}"] + last[f"test_all/{metric}"]) / 2)


def test_keeps_the_newest_the_best_and_every_save_period(run):
    folder, printed = run
    scores = {row["epoch"]: row["test_pixel-level F1"] for row in rows(folder) if "test_pixel-level F1" in row}
    best = max(scores, key=scores.get)
    assert len(set(scores.values())) > 1
    assert saved(folder) == sorted({4, best, 2})
    lines = summary(printed)
    assert lines[0].startswith("trained MyModel on ") and lines[0].endswith("; after epoch 4")
    assert [line.split()[0] for line in lines[1:5]] == ["set", "mani", "all", "mean"]
    assert lines[4].split()[1] == f"{scores[4]:.4f}" and lines[5:7] == [
        f"best pixel-level F1: {scores[best]:.4f} at epoch {best}, in {folder}/checkpoint-{best}.pth",
        f"newest checkpoint: {folder}/checkpoint-4.pth"]
    content = torch.load(folder / "checkpoint-4.pth", weights_only=True)
    assert {"model", "optimizer", "scaler", "epoch", "args", "best"} <= set(content)
    assert content["epoch"] == 4 and content["args"]["lr"] == 0.3 and content["best"]["epoch"] == best


def test_progress_lines(run):
    lines = [line for line in run[1].splitlines() if line.startswith("Epoch: [3]")]
    number, pair = r"\d+\.\d{4}", r"\d+\.\d{4} \(\d+\.\d{4}\)"
    assert len(lines) == 5
    assert re.fullmatch(rf"Epoch: \[3\]  \[2/5\]  eta: 0:00:0\d  lr: 0\.\d{{6}}  "
                        rf"total_loss: {pair}  mask_loss: {pair}  label_loss: {pair}  "
                        rf"grad_norm: {pair}  time: {number}  data: {number} \(\d+%\)  images/s: \d+\.\d"
                        r"(  max mem: .*)?",
                        lines[1]), lines[1]
    assert re.search(r"model MyModel: 28 parameters, 28 of them trainable; 1 process on c", run[1])
    assert "Test: [3]  all  pixel-level F1: " in run[1] and "(9 images, 2 left out)" in run[1]


def test_tensorboard_has_the_curves_and_the_images(run):
    events = EventAccumulator(str(run[0]), size_guidance={"images": 0})
    events.Reload()
    assert {"train/lr", "train/total_loss", "train/mask_loss", "train/grad_norm", "test/pixel-level F1",
            "test/mani/pixel-level F1", "test/all/pixel-level IOU"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/total_loss")] == [0, 1, 2, 3, 4]
    assert [e.value for e in events.Scalars("test/pixel-level F1")] == pytest.approx(
        [row["test_pixel-level F1"] for row in rows(run[0]) if "test_pixel-level F1" in row])
    assert {"train/images per second", "train/waiting for data"} <= set(events.Tags()["scalars"])
    assert all(0 < e.value <= 1 for e in events.Scalars("train/waiting for data"))
    assert not any("waiting" in name or "images" in name for row in rows(run[0]) for name in row)
    assert set(events.Tags()["images"]) == {"train/images", "test mani/images", "test all/images"}
    shown = [cv2.imdecode(np.frombuffer(e.encoded_image_string, np.uint8), cv2.IMREAD_COLOR).astype(int)
              for e in events.Images("test all/images")]
    assert [e.step for e in events.Images("test all/images")] == [1, 3, 4]
    height, width, _ = shown[0].shape
    assert width // 256 == 6 and height // 256 == 6  # columns: with visual_image; rows: the handful
    same, other = (np.abs(shown[0] - shown[2])[:, columns].mean() for columns in (slice(256), slice(530, 780)))
    assert same < 1 < other  # the images are the same ones, their predictions are not
    curve = events.Tensors("test all/pixels")[-1].tensor_proto
    assert [dim.size for dim in curve.tensor_shape.dim] == [6, 127]
    written = events.PluginTagToContent("hparams")
    curves = parse_experiment_plugin_data(written["_hparams_/experiment"]).metric_infos
    assert {curve.name.tag for curve in curves} < set(events.Tags()["scalars"]) and len(curves) == 3
    start = parse_session_start_info_plugin_data(written["_hparams_/session_start_info"])
    assert start.hparams["lr"].number_value == 0.3 and start.hparams["model"].string_value == "MyModel"
    assert "output_dir" not in start.hparams and len([path for path in run[0].iterdir() if path.is_dir()]) == 0


def test_panels_and_curves_leave_out_padding():
    """An image of 12 x 4 pixels in the upper left of 16 x 16, in whose padding all is predicted tampered."""
    rng, written = np.random.default_rng(0), {}
    pred, mask = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    pred[..., :12, :4] = torch.from_numpy(rng.integers(0, 127, (12, 4)) / 126)
    mask[..., :12, :4] = torch.from_numpy(rng.integers(0, 2, (12, 4)))
    batch = {"image": torch.zeros(1, 3, 16, 16), "mask": mask, "label": torch.ones(1, dtype=torch.int64),
             "shape": torch.tensor([[12, 4]]), "name": ["a/\u4e2d.png"]}
    output = {"pred_mask": pred, "pred_label": torch.tensor([0.7]), "visual_image": {"mine": pred[..., ::2, ::2]}}
    watch = panels.Watch([None])
    watch(batch, output)
    writer = types.SimpleNamespace(add_pr_curve_raw=lambda tag, *curve: written.update(curve=curve),
                                   file_writer=types.SimpleNamespace(add_summary=lambda *summary: None))
    watch.write(writer, "test", 0)
    score, truth = pred[0, 0, :12:2, :4:2].numpy(), mask[0, 0, :12:2, :4:2].numpy()
    tp, fp, *_ = written["curve"]
    for number in range(127):
        above = np.rint(score * 126) >= number
        assert (tp[number], fp[number]) == ((above * truth).sum(), (above * (1 - truth)).sum())
    row, = watch.rows
    for left in range(0, row.shape[1] - 255, 256 + 6):  # tiles of 256 x 85
        assert (row[:256, left + 85:left + 256] == panels.PAGE[0]).all() and (row[:256, left:left + 85] < 224).any()


def test_a_model_that_judges_images_alone(images, tmp_path):
    """Its evaluation has scores and panels, but no masks; one that counts errors is best where it is lowest."""
    done = run_here("train.py", "--model", "ScoreOnly", "--data_path", images / "set.json", "--test_data_path",
                    images / "set.json", "--epochs", 2, "--test_period", 1, "--lr", 1, "--metrics", "ImageFPR",
                    "ImageAUC", "--output_dir", tmp_path, *SMALL)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rates = [row["test_image-level FPR"] for row in rows(tmp_path)]
    assert f"best image-level FPR: {min(rates):.4f} at epoch {rates.index(min(rates))}" in done.stdout


def test_trains_without_a_test_set_on_a_model_that_returns_the_loss_alone(images, tmp_path):
    done = run_here("train.py", "--model", "LossOnly", "--data_path", images, "--epochs", 1, "--output_dir",
                    tmp_path / "out", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    row, = rows(tmp_path / "out")
    assert row["train_plain_number"] == 0.5 and row["train_loss"] == 7  # the model's own; the total is total_loss
    assert row["train_total_loss"] != 7 and saved(tmp_path / "out") == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize("clip, flags", [(math.inf, []), (0.3, ["--clip_grad", 0.3, "--channels_last"]),
                                         pytest.param(math.inf, ["--compile"], marks=pytest.mark.slow)])
def test_equals_a_plain_loop_with_an_incomplete_last_group(images, tmp_path, monkeypatch, clip, flags):
    """Ten images in batches of 2, two accumulated: an epoch's third step is over one batch, and counts in full."""
    pairs = json.loads((images / "set.json").read_text())[:10]
    (tmp_path / "ten.json").write_text(json.dumps([[str(images / a), b if b == "Negative" else str(images / b)]
                                                   for a, b in pairs]))
    monkeypatch.setattr("albumentations.Compose", lambda transforms: None)  # no augmentation
    epochs, warmup, peak = 4, 1, 0.05
    done = run_here("train.py", "--model", "MyModel", "--data_path", tmp_path / "ten.json", "--epochs", epochs,
                    "--batch_size", 2, "--accum_iter", 2, "--lr", peak, "--min_lr", 0.001, "--warmup_epochs", warmup,
                    "--weight_decay", 0.5, "--output_dir", tmp_path / "out", *flags, *SMALL)
    assert done.returncode == 0, done.stderr
    assert clip == math.inf or rows(tmp_path / "out")[0]["train_grad_norm"] > clip  # that before clipping is logged

    dataset = data.open_dataset(tmp_path / "ten.json", "", image_size=64, seed=3)
    batches = data.TrainBatches(dataset, 2, seed=3)
    ddp.seed_everything(3)
    model = models.mymodel.MyModel()
    optimizer = torch.optim.AdamW([{"params": [model.conv.weight], "weight_decay": 0.5},
                                   {"params": [model.conv.bias], "weight_decay": 0.0}])
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        order = list(batches)
        assert [len(batch) for batch in order] == [2] * 5
        for start in (0, 2, 4):
            now = epoch + start / 5
            cosine = math.cos(math.pi * (now - warmup) / (epochs - warmup))
            lr = peak * now if now < warmup else 0.001 + (peak - 0.001) / 2 * (1 + cosine)
            for group in optimizer.param_groups:
                group["lr"] = lr
            group = sum(order[start:start + 2], [])  # one batch of all images of the group
            batch = data.to_device(data.collate([dataset[i] for i in group]), torch.device("cpu"))
            optimizer.zero_grad()
            model(**batch)["backward_loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    found = weights(tmp_path / "out" / "checkpoint-3.pth")
    for key, value in model.state_dict().items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-5 if flags else 1e-6), (key, found[key], value)


def test_groups_keep_their_ratio_to_the_peak(images, repository, tmp_path):
    """Two groups of a user's own: a tenth of the learning rate, and half of it by `lr_scale`; after ten steps."""
    root = tmp_path / "root"
    shutil.copytree(repository, root)
    text = (root / "train.py").read_text()
    start = text.index("    return torch.optim.AdamW(")
    (root / "train.py").write_text(text[:start] + """    return torch.optim.SGD([
        {"params": [model.conv.weight], "lr": lr / 10}, {"params": [model.conv.bias], "lr_scale": 0.5}], lr=lr)
""" + text[text.index("\n", start) + 1:])
    done = run_script("train.py", "--model", "MyModel", "--data_path", images, "--epochs", 2, "--batch_size", 2, "--lr",
                      0.1, "--min_lr", 0.01, "--warmup_epochs", 0, "--output_dir", tmp_path / "out", *SMALL,
                      cwd=tmp_path, root=root)
    assert done.returncode == 0, done.stderr
    last = 0.01 + 0.09 / 2 * (1 + math.cos(math.pi * 0.9))  # the tenth of ten steps
    groups = torch.load(tmp_path / "out" / "checkpoint-1.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([last / 10, last / 2])
    assert rows(tmp_path / "out")[1]["train_lr"] == pytest.approx(last)


@pytest.mark.parametrize("optimizer", [types.SimpleNamespace(param_groups=[]),
                                       types.SimpleNamespace(param_groups=[{"params": []}])])
def test_an_optimizer_without_groups_or_rates_is_refused(optimizer):
    with pytest.raises(UserError, match="SimpleNamespace of make_optimizer has . parameter groups, and each needs"):
        train.rate_shares(optimizer, 0.1)


def test_no_weight_decay_of_the_model_is_honoured():
    model = probe_models.Root()
    exempt, decayed = train.make_optimizer(model, 0.05, 0.1).param_groups
    assert exempt["params"][0] is model.weight and exempt["weight_decay"] == 0
    assert decayed["params"][0] is model.other and decayed["weight_decay"] == 0.05
    assert exempt["betas"] == (0.9, 0.999)
    with pytest.raises(UserError, match="no_weight_decay.. of Root names wieght, .* no parameter"):
        train.make_optimizer(probe_models.Root(exempt="wieght"), 0.05, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_saved(images, tmp_path):
    """At step 3 of epoch 1, after which the losses are NaN too before the next line is printed; epoch 0 stays."""
    command = ["train.py", "--model", "Root", "--step", 9, "--data_path", images / "set.json", "--epochs", 3,
               "--batch_size", 2, "--log_per_epoch_count", 2, "--save_period", 1, "--output_dir", tmp_path / "out",
               *SMALL]
    done = run_here(*command)
    assert done.returncode == 1 and saved(tmp_path / "out") == [0] and len(rows(tmp_path / "out")) == 1
    sampler = data.TrainBatches(data.JsonDataset(images / "set.json"), 2, seed=3)
    sampler.set_epoch(1)
    names = [json.loads((images / "set.json").read_text())[i][0] for i in list(sampler)[9 - 6]]
    assert done.stderr.startswith("error: Epoch: [1] the gradient of step 3 is not finite")
    assert done.stderr.count("\n") == 1
    assert f"Its images: {', '.join(names)}." in done.stderr


def test_a_loss_scaler_skips_such_a_step_and_it_is_counted(capsys):
    log = EpochLog("Epoch: [0]", 4, 1, torch.amp.GradScaler("cpu"))
    for norm in (2.0, math.inf, math.nan, 4.0):
        log.update({"total_loss": torch.tensor(1.0)}, 0.1, torch.tensor(norm), ["a.png"])
    assert log.means() == {"total_loss": 1, "grad_norm": 3, "skipped_steps": 2}
    printed = capsys.readouterr().out
    assert "grad_norm: 4.0000 (3.0000)" in printed and "loss scale: 65536  skipped steps: 2" in printed


def test_a_loss_scaler_that_skips_every_step_ends_the_run(images, tmp_path, monkeypatch):
    """On the CPU, with bfloat16 in place of float16: from 65536 the 17th skipped step leads below 1."""
    monkeypatch.setattr(ddp, "mixed_precision", lambda args, device: (
        functools.partial(torch.autocast, "cpu", torch.bfloat16), True))
    done = run_here("train.py", "--model", "Root", "--step", 3, "--data_path", images / "set.json", "--epochs", 3,
                    "--log_per_epoch_count", 1, "--output_dir", tmp_path / "out", *SMALL)
    assert done.returncode == 1 and saved(tmp_path / "out") == [0]
    assert "loss scale: 256  skipped steps: 8" in done.stdout and rows(tmp_path / "out")[0]["train_skipped_steps"] == 8
    assert done.stderr.startswith("error: Epoch: [1] the loss is finite but its gradient is not: 11 steps were skipped "
                                  "and the loss scale fell to 0.125.")


def test_weights_that_are_not_finite_are_never_saved():
    model = probe_models.RandomNet()
    model.register_buffer("mask", torch.tensor([-math.inf, 0]))  # as attention masks have it
    checkpoint.refuse_broken_weights(model, 3)
    for name, value in (("net.1.running_var", math.nan), ("net.4.bias", math.inf)):
        broken = copy.deepcopy(model)
        broken.state_dict()[name].fill_(value)
        with pytest.raises(UserError, match=f"after epoch 3 the weights are not finite .1 tensor, first {name}"):
            checkpoint.refuse_broken_weights(broken, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def random_net(images, output, *more, model="RandomNet"):
    """The command line of a run with dropout and batch norm."""
    return ["train.py", "--model", model, "--data_path", images / "set.json", "--test_data_path", images,
            "--epochs", 4, "--test_period", 1, "--batch_size", 4, "--lr", 0.02, "--warmup_epochs", 1, "--metrics",
            "PixelAUC", "--output_dir", output, *SMALL, *more]


@pytest.mark.parametrize("stop", ["after epoch 1 was saved", "before epoch 2 is saved"])
def test_stopped_and_resumed_equals_an_uninterrupted_run(images, tmp_path, monkeypatch, stop):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run_here(*random_net(images, straight)).returncode == 0

    save = checkpoint.save_checkpoint

    def save_and_stop(path, content):
        if content["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, content)
        if content["epoch"] == 1 and stop.startswith("after"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_stop)
        assert run_here(*random_net(images, resumed)).returncode == 130
    assert len(rows(resumed)) == (1 if stop.startswith("after") else 2)  # a row is logged after its epoch is saved
    done = run_here(*random_net(images, resumed, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert f"resumed from {resumed}/checkpoint-1.pth: epoch 2 comes next" in done.stdout and "note:" not in done.stdout
    assert equal(weights(straight / "checkpoint-3.pth"), weights(resumed / "checkpoint-3.pth"))
    assert rows(straight) == rows(resumed)
    assert set(saved(resumed)) >= set(saved(straight))
    first, second = (torch.load(folder / "checkpoint-3.pth", weights_only=True) for folder in (straight, resumed))
    assert first["best"] == {**second["best"], "folder": first["best"]["folder"]}
    said = [line for line in done.stdout.splitlines() if line.startswith("best ")]
    assert said[0].endswith(f"checkpoint-{first['best']['epoch']}.pth")


def test_checkpoints_of_trained_weights_alone(images, tmp_path):
    """The frozen ones come from the file of the training, moved or not; resuming and testing give the same numbers."""
    file, other = tmp_path / "start.pth", tmp_path / "other.pth"
    torch.manual_seed(9)
    torch.save(torch.nn.Conv2d(3, 8, 3).state_dict(), file)
    torch.save({**torch.load(file), "bias": torch.zeros(8)}, other)

    def train(name, *more):
        return run_here(*random_net(images, tmp_path / name, "--save_period", 1, *more, model="Frozen"))

    def test(name, *more, script="test.py"):
        flag = "--test_data_json" if script == "test.py" else "--test_data_path"
        return run_here(script, "--checkpoint_path", tmp_path / name / "checkpoint-3.pth", flag, images,
                        "--num_workers", 0, "--output_dir", tmp_path / f"{name}-{script}", *more)

    flags, middle = ["--save_trainable_only", "--start_path", file], tmp_path / "straight" / "checkpoint-1.pth"
    assert train("whole", *flags[1:]).returncode == train("straight", *flags).returncode == 0
    done = train("resumed", *flags, "--resume", middle)
    said = ("holds 7 tensors; 2 more, frozen ones, are the model's own, the same as in its training (--start_path "
            f"{file} --seed 3)")
    assert done.returncode == 0 and f"--resume {middle} {said}" in done.stdout, done.stderr
    whole, straight, resumed = (weights(tmp_path / name / "checkpoint-3.pth")
                                for name in ("whole", "straight", "resumed"))
    assert set(whole) - set(straight) == {"net.0.weight", "net.0.bias"} and equal(straight, resumed)
    assert all(torch.equal(x, whole[name]) for name, x in straight.items())
    assert rows(tmp_path / "whole") == rows(tmp_path / "straight") == rows(tmp_path / "straight")[:1] + rows(
        tmp_path / "resumed")

    for script in ("test.py", "save_images.py"):
        for name in ("whole", "straight"):
            done = test(name, script=script)
            assert done.returncode == 0 and (said in done.stdout) == (name == "straight"), done.stderr
    results = [(tmp_path / f"{name}-test.py" / "results.csv").read_text() for name in ("whole", "straight")]
    masks = [{path.name: path.read_bytes() for path in (tmp_path / f"{name}-save_images.py" / "pred").iterdir()}
             for name in ("whole", "straight")]
    assert results[0] == results[1] and masks[0] == masks[1] and len(masks[0]) == 9

    for done in (test("straight", "--start_path", other), train("new", *flags[:1], "--resume", middle)):
        assert done.returncode == 1 and re.fullmatch(
            rf"error: --\w+ \S+.pth leaves 2 frozen tensors to the flags of its training, --start_path {file} --seed "
            r"3, and [12] of them, first net.0.\w+, are others here: give these flags, with the same files.\n",
            done.stderr)
    done = train("lost", *flags[:2], other, "--resume", tmp_path / "whole" / "checkpoint-1.pth")
    assert done.returncode == 1 and "are not those that these flags and --seed give, so they would be lo" in done.stderr
    file.rename(other)
    done = test("straight", "--start_path", other)
    assert done.returncode == 0 and f"note: --start_path was {file} in " in done.stdout


def test_frozen_weights_that_were_random_come_from_the_seed(images, tmp_path):
    flags = "--epochs", 1, "--save_trainable_only"
    assert run_here(*random_net(images, tmp_path, *flags, model="Frozen")).returncode == 0
    flags = ["--checkpoint_path", tmp_path, "--test_data_path", images, "--num_workers", 0, "--attacks", "GaussianBlur",
             "--output_dir", tmp_path / "robust"]
    done = run_here("test_robust.py", *flags)
    assert done.returncode == 0 and " --seed 3\n" in done.stdout and "(--seed 3)\n" in done.stdout, done.stderr
    done = run_here("test_robust.py", *flags, "--seed", 4)
    assert done.returncode == 1 and "--seed 3, and 2 of them, first net.0.weight, are others here" in done.stderr


def test_a_model_without_frozen_parameters_saves_all(images, tmp_path):
    done = run_here(*random_net(images, tmp_path, "--epochs", 1, "--save_trainable_only"))
    assert done.returncode == 0 and "note: --save_trainable_only: RandomNet has no frozen parameter" in done.stdout
    content = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert len(content["model"]) == 9 and not content["args"]["save_trainable_only"]


def test_resume_takes_weights_alone_keeps_the_best_and_says_what_changed(images, tmp_path, run):
    """With a learning rate of 0 every epoch scores the same, so the first stays the best."""
    torch.save({"model": weights(run[0] / "checkpoint-4.pth")}, tmp_path / "weights.pth")
    flags = ["--model", "MyModel", "--data_path", images, "--test_data_path", images, "--lr", 0, "--output_dir",
             tmp_path / "out", *SMALL]
    done = run_here("train.py", "--resume", tmp_path / "weights.pth", "--epochs", 1, *flags)
    assert done.returncode == 0 and "holds no optimizer, so training starts at epoch 0" in done.stdout, done.stderr
    assert equal(weights(tmp_path / "out" / "checkpoint-0.pth"), weights(run[0] / "checkpoint-4.pth"))
    done = run_here("train.py", "--resume", "auto", "--epochs", 3, "--weight_decay", 0.1, *flags)
    assert done.returncode == 0, done.stderr
    assert "note: --weight_decay was 0.05 in checkpoint-0.pth and is 0.1 now" in done.stdout
    assert saved(tmp_path / "out") == [0, 2] and "at epoch 0, in " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.slow
def test_two_processes(tmp_path, repository):
    """Two processes with batches of 2 train as one with batches of 4; a run of two goes on as if never stopped, and its
    evaluation is that of the saved weights, batch norm's statistics included."""
    images = make_images(tmp_path / "images", 8)
    flags = ["--model", "MyModel", "--data_path", images, "--epochs", 2, "--lr", 0.1, "--warmup_epochs", 0, *SMALL]
    assert run_here("train.py", "--batch_size", 4, "--output_dir", tmp_path / "one", *flags).returncode == 0
    done = run_script("train.py", "--batch_size", 2, "--output_dir", tmp_path / "two", *flags, cwd=tmp_path,
                      processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch: [0]  [2/2]") == 1  # only one of the two prints
    one, two = weights(tmp_path / "one" / "checkpoint-1.pth"), weights(tmp_path / "two" / "checkpoint-1.pth")
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-6) for key in one)
    for first, second in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        assert first["train_total_loss"] == pytest.approx(second["train_total_loss"], abs=1e-6)
        assert first["train_grad_norm"] == pytest.approx(second["train_grad_norm"], rel=1e-4)

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = run_script(*random_net(images, straight, "--save_period", 1), cwd=tmp_path, root=repository, processes=2)
    assert done.returncode == 0, done.stderr
    resumed.mkdir()
    (straight / "checkpoint-1.pth").rename(resumed / "checkpoint-1.pth")
    done = run_script(*random_net(images, resumed, "--resume", "auto"), cwd=tmp_path, root=repository, processes=2)
    assert done.returncode == 0, done.stderr
    assert equal(weights(straight / "checkpoint-3.pth"), weights(resumed / "checkpoint-3.pth"))
    assert rows(straight)[1:] == rows(resumed)  # epoch 1's comes out of the checkpoint
    done = run_here("test.py", "--model", "RandomNet", "--test_data_json", images, "--checkpoint_path", straight,
                    "--metrics", "PixelAUC", "--output_dir", tmp_path / "test", *SMALL)
    assert done.returncode == 0, done.stderr
    tested, trained = rows(tmp_path / "test" / "images"), rows(straight)
    assert [row["epoch"] for row in tested] == [0, 2, 3]
    for row in tested:
        assert row["test_pixel-level AUC"] == pytest.approx(trained[row["epoch"]]["test_pixel-level AUC"], abs=1e-6)


def test_learning_rate_rises_and_falls_to_its_ends():
    def rate(epoch):
        return train.learning_rate(epoch, epochs=10, warmup_epochs=2.0, peak=1e-3, lowest=1e-6)

    rates = [rate(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, (1e-3 + 1e-6) / 2, 1e-6])
    assert np.all(np.diff([rate(epoch) for epoch in np.arange(2, 10, 0.1)]) < 0)


def test_tensorboard_launcher(tmp_path):
    """What it runs, by a stand-in for Python; a run that is not there is refused."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for words, code, said in (
            (["a", "--port", "1"], 0, "-m tensorboard.main --logdir a --port 1\n"),
            (["a", tmp_path / "b"], 0, f"-m tensorboard.main --logdir_spec a:a,{str(tmp_path)[1:]}/b:{tmp_path}/b\n"),
            (["c"], 1, "error: c: give the output folder"), ([], 1, "error: no folder given: give")):
        done = subprocess.run(["sh", str(ROOT / "runs/tensorboard.sh"), *map(str, words)], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, "PYTHON": "echo"})
        assert done.returncode == code and (done.stdout + done.stderr).startswith(said), (done.stdout, done.stderr)
