"""evaluate() over batch sizes and processes, the check of a model's output, and what is shown meanwhile.

Run: pytest tests/test_evaluate.py
"""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import data
from evaluate import check_output, evaluate
from log import Progress, format_table
from metrics import CombinedF1, ImageAccuracy, ImageAUC, ImageF1, PixelAUC, PixelF1, parse_metrics
from registry import UserError

NUM_IMAGES, SIDE = 23, 24


class Images(torch.utils.data.Dataset):
    """What a padded ImageDataset gives; every third image is authentic. `attacks` are functions of the pixels."""

    def __init__(self, count=NUM_IMAGES, attacks=None):
        self.count, self.attacks = count, attacks

    def __len__(self):
        return self.count

    def sample(self, i, attack=None):
        rng = np.random.default_rng(i)
        height, width = rng.integers(5, SIDE + 1, 2)
        image, mask = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        image[:height, :width] = rng.integers(0, 256, (height, width, 3))
        mask[:height // 2, 2:width] = i % 3 > 0
        return {"index": i, "image": attack(image) if attack else image, "mask": mask, "label": int(i % 3 > 0),
                "shape": np.array([height, width]), "name": f"folder/{i}.png", "padded": True}

    def __getitem__(self, i):
        return [self.sample(i, attack) for attack in self.attacks] if self.attacks else self.sample(i)


class Toy(nn.Module):
    """Scores that depend on the image alone in evaluation mode, with what training mode could disturb."""

    def __init__(self):
        super().__init__()
        self.norm, self.sync = nn.BatchNorm2d(3), nn.SyncBatchNorm(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image, **kwargs):
        if self.training:
            self.calls = self.calls + 1
        score = self.frozen(self.sync(self.norm(image))).mean(dim=1, keepdim=True).sigmoid()
        return {"pred_mask": score, "pred_label": score.amax(dim=(1, 2, 3))}


class Fixed(nn.Module):
    """Returns what it was given."""

    def __init__(self, **output):
        super().__init__()
        self.output = output

    def forward(self, **batch):
        return self.output


def all_metrics():
    return parse_metrics(["all"])


def toy_results():
    """{(batch size, model_eval): (values, counted, left_out)} of all ranks, seen from this one."""
    torch.manual_seed(0)
    results = {}
    for batch_size in (1, 4, 7):
        for model_eval in (True, False):
            model = Toy()
            before = {name: value.clone() for name, value in model.state_dict().items()}
            result, = evaluate(model, Images(), all_metrics(), batch_size=batch_size, model_eval=model_eval,
                               keep_names=True)
            assert model.training and model.sync.training and not model.frozen.training
            assert before.keys() == model.state_dict().keys()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert result.names == [f"folder/{i}.png" for i in range(NUM_IMAGES)]
            results[batch_size, model_eval] = result.values, result.counted, result.left_out
    return results


def run_rank(rank, folder):
    """Three processes, then two of them; each leaves its results."""
    for world_size in (3, 2):
        if rank >= world_size:
            break
        dist.init_process_group("gloo", f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
        torch.save(toy_results(), f"{folder}/{world_size}-{rank}.pt")
        few, = evaluate(Toy(), Images(2), all_metrics(), batch_size=4)  # the third process has no image
        assert few.counted["pixel-level F1"] == 1
        one, = evaluate(Toy(), Images(1), [PixelF1()], batch_size=4)
        assert len(one.score) == 1
        # A mistake of one rank ends all; that rank tells it.
        poison = Fixed(pred_mask=torch.full((1, 1, SIDE, SIDE), math.nan if rank == 1 else 0.5))
        with pytest.raises(UserError if rank == 1 else SystemExit, match=r"folder/1\.png" if rank == 1 else "1"):
            evaluate(poison, Images(), [PixelF1()])
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process():
    return toy_results()


def test_result_is_the_same_for_any_batch_size_and_number_of_processes(one_process, tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=3)
    for world_size in (1, 2, 3):
        ranks = [one_process] if world_size == 1 else [torch.load(tmp_path / f"{world_size}-{rank}.pt")
                                                       for rank in range(world_size)]
        assert all(results == ranks[0] for results in ranks)
        assert all(ranks[0][batch_size, True] == one_process[4, True] for batch_size in (1, 4, 7))
        # In training mode the value depends on the batches; it must only be there.
        assert all(math.isfinite(value) for values, *_ in ranks[0].values() for value in values.values())


def test_evaluate_equals_the_metrics_by_hand(one_process):
    dataset = Images()
    whole = data.to_device(data.collate([dataset[i] for i in range(NUM_IMAGES)]), torch.device("cpu"))
    with torch.no_grad():
        output = Toy().eval()(**whole)
    values, counted, left_out = one_process[4, True]
    for metric in all_metrics():
        if metric.key == "pred_mask" and (metric.judges_images or not metric.has_images()):
            continue  # of a whole set: tests/test_definitions.py
        if metric.key == "pred_mask":
            hand = metric(output["pred_mask"], whole["mask"], shape_mask=whole["shape_mask"])
            assert counted[metric.name] == int((~hand.isnan()).sum())
            assert values[metric.name] == pytest.approx(hand.nanmean().item(), abs=1e-9)
        else:
            assert values[metric.name] == pytest.approx(metric(output["pred_label"], whole["label"]), abs=1e-9)
    assert counted["pixel-level F1"] == 15 and left_out["pixel-level F1"] == 8 and left_out["pixel-level Accuracy"] == 0


def test_attacks_rows_and_batch_callback():
    seen = []
    attacks = [lambda image: image, lambda image: 255 - image]
    first, second = evaluate(Toy(), Images(5, attacks), all_metrics(), batch_size=2, keep_names=True,
                             on_batch=lambda batch, output: seen.append((len(batch["label"]), set(batch) & {"index"})))
    assert seen == [(2, set())] * 4 + [(1, set())] * 2
    plain, = evaluate(Toy(), Images(5), all_metrics())
    assert plain.values == first.values and first.values != second.values
    rows = list(first.rows())
    assert [row["name"] for row in rows] == [f"folder/{i}.png" for i in range(5)]
    assert math.isnan(rows[0]["pixel-level F1"]) and 0 <= rows[1]["pixel-level F1"] <= 1 and 0 < rows[1]["score"] < 1
    assert "pixel-level AP" in rows[0] and "combined F1" not in rows[0]  # which is of the set alone
    assert "pixel-level F1: " in first.describe() and "(3 images, 2 left out)" in first.describe()


def test_images_that_come_twice_or_never_are_an_error(monkeypatch):
    for indices in ([0, 1, 1], [0, 1], [1, 2, 3]):
        loader = [data.collate([Images().sample(i)]) for i in indices]
        monkeypatch.setattr(data, "eval_loader", lambda *args: loader)
        with pytest.raises(RuntimeError, match="every image once"):
            evaluate(Toy(), Images(3), [PixelF1()])


@pytest.mark.parametrize("output, metric, message", [
    ({}, PixelF1(), "Fixed: forward returned no pred_mask, which the metric 'pixel-level F1' needs"),
    ({"pred_label": None}, ImageAUC(), "no pred_label, which the metric 'image-level AUC' needs"),
    ({"pred_mask": torch.zeros(2, 1, 6, 6)}, PixelF1(), r"is \(2, 1, 6, 6\) but the mask is \(2, 1, 24, 24\)"),
    ({"pred_label": torch.tensor(0.5)}, ImageF1(), "one value per image"),
    ({"pred_label": torch.zeros(2, 2)}, ImageF1(), "one value per image"),
    ({"pred_label": torch.tensor([0.5, math.nan])}, ImageF1(), r"pred_label is NaN for image folder/1\.png"),
    ({"pred_label": torch.tensor([0.5, 3.0])}, ImageAccuracy(), "'image-level Accuracy' needs probabilities"),
    ({"pred_mask": torch.zeros(2, 1, 24, 24), "pred_label": torch.tensor([0.5, 3.0])}, CombinedF1(),
     "pred_label reaches from 3 to 3 for image folder/1"),
    ({"pred_mask": torch.full((2, 1, 24, 24), 2.0)}, PixelAUC(), r"image folder/0\.png.*'pixel-level AUC' needs"),
    ({"pred_label": torch.zeros(2), "visual_loss": {"a": torch.zeros(2)}}, ImageF1(), "'a' is no scalar"),
    ({"pred_label": torch.zeros(2), "visual_image": {"a": torch.zeros(2, 24, 24)}}, ImageF1(), "visual_image 'a' is"),
])
def test_bad_output_is_one_clear_sentence(output, metric, message):
    with pytest.raises(UserError, match=message):
        evaluate(Fixed(**output), Images(2), [metric], batch_size=2)


@pytest.mark.parametrize("output, message", [
    ([1], "returned list; return a dict"), ({}, "training needs backward_loss"),
    ({"backward_loss": torch.zeros(())}, "a scalar tensor with a gradient"),
    ({"backward_loss": torch.zeros(2, requires_grad=True)}, r"returned a tensor \(2,\)"),
])
def test_training_needs_a_loss(output, message):
    batch = data.to_device(data.collate([Images()[0]]), torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        check_output(output, batch, [], "Net", training=True)


def test_unneeded_output_is_not_judged():
    output = {"pred_mask": torch.randn(2, 1, SIDE, SIDE) * 9, "pred_label": torch.tensor(7.0)}
    result, = evaluate(Fixed(**output), Images(2), [PixelF1()], batch_size=2)
    assert result.counted["pixel-level F1"] == 1 and np.isnan(result.score).all()
    for label in (torch.tensor(0.9), torch.tensor([0.9]), torch.tensor([[0.9]])):
        result, = evaluate(Fixed(pred_label=label), Images(1), [ImageAccuracy()])
        assert result.values["image-level Accuracy"] == 0 and result.score[0] == pytest.approx(0.9)
    with pytest.raises(UserError, match="twice"):
        evaluate(Fixed(**output), Images(2), [PixelF1(), PixelF1()])


def test_table():
    table = format_table(["set", "F1", "AUC"], [["casia", 0.51239, math.nan], ["columbia", 1.0, None]])
    assert table.splitlines() == ["set           F1  AUC", "casia     0.5124    -", "columbia  1.0000    -"]


def test_progress_is_a_line_every_30_seconds_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("log.time.time", lambda: now[0])
    for enabled in (True, False):
        now[0] = 0.0
        with Progress("testing", 200, enabled) as bar:
            for _ in range(20):
                now[0] += 4
                bar.update(10)
    assert capsys.readouterr().out.splitlines() == ["testing: 80 of 200 images, 2.5 images/s, 0:00:48 left",
                                                    "testing: 160 of 200 images, 2.5 images/s, 0:00:16 left"]
