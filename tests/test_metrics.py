"""Metrics against scikit-learn and by hand; evaluate() over batch sizes and processes.

Run: pytest tests/test_metrics.py (CPU, half a minute)
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from metrics import (ImageAccuracy, ImageAUC, ImageF1, PixelAccuracy, PixelAUC, PixelF1, PixelIOU, evaluate,
                     format_table, parse_metrics)
from registry import UserError

NUM_PICTURES = 23
SIDE = 24


def same(ours, theirs):
    return math.isnan(ours) and math.isnan(theirs) or abs(ours - theirs) < 1e-9


def random_case(rng):
    """Scores and truth of one random kind of picture: continuous, tied, half precision, constant, signed zero."""
    size = (int(rng.integers(1, 13)), int(rng.integers(1, 13)))
    kinds = [rng.random(size), rng.random(size).astype("half"), rng.integers(0, 256, size) / 255,
             rng.integers(0, 4, size) / 4, rng.choice([-0.0, 0.0, 1.0, 0.5], size), np.full(size, rng.random())]
    score = kinds[rng.integers(len(kinds))]
    truth = rng.random(size) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return torch.tensor(score.astype(rng.choice(["float32", "float64"]))), torch.tensor(truth).float()


def expected_values(score, truth):
    """F1, IoU, accuracy and AUC by scikit-learn; NaN where the metric is not defined."""
    from sklearn import metrics as sk  # here, so that the processes below start without it

    score, truth = score.numpy(), truth.numpy() > 0
    tampered, both = truth.any(), truth.any() and not truth.all()
    return [sk.f1_score(truth, score > 0.5) if tampered else math.nan,
            sk.jaccard_score(truth, score > 0.5) if tampered else math.nan,
            sk.accuracy_score(truth, score > 0.5),
            sk.roc_auc_score(truth, score) if both else math.nan]


def test_equals_scikit_learn_on_1000_random_cases():
    rng = np.random.default_rng(0)
    pixel_metrics = [PixelF1(), PixelIOU(), PixelAccuracy(), PixelAUC()]
    image_metrics = [ImageF1(), ImageAccuracy(), ImageAUC()]
    for case in range(1000):
        score, truth = random_case(rng)
        (height, width), how = score.shape, case % 4
        shape = torch.tensor([[int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))]]) if how & 1 else None
        shape_mask = torch.tensor(rng.random((1, 1, height, width)) < 0.7).float() if how & 2 else None
        valid = torch.ones(height, width, dtype=bool)
        if shape is not None:
            valid[shape[0, 0]:] = valid[:, shape[0, 1]:] = False
        if shape_mask is not None:
            shape_mask[..., 0, 0] = 1
            valid &= shape_mask[0, 0] > 0
        theirs = expected_values(score[valid], truth[valid])
        ours = [metric(score[None, None], truth[None, None], shape_mask, shape).item() for metric in pixel_metrics]
        assert all(map(same, ours, theirs)), (case, ours, theirs)
        ours = [metric(score[valid], truth[valid]) for metric in image_metrics]
        assert all(map(same, ours, [theirs[0], *theirs[2:]])), (case, ours, theirs)


def test_large_picture_and_one_batch_of_different_pictures():
    """Counts above 2^31 pairs, and values that do not leak from one picture of a batch into the next."""
    rng = torch.Generator().manual_seed(1)
    pred = (torch.rand(3, 1, 300, 400, generator=rng) * 50).round() / 50
    mask = (torch.rand(3, 1, 300, 400, generator=rng) < 0.4).float()
    mask[1] = 0
    for metric, column in ((PixelF1(), 0), (PixelAUC(), 3)):
        ours = metric(pred, mask)
        assert ours.shape == (3,) and ours.dtype == torch.float64
        theirs = [expected_values(*picture)[column] for picture in zip(pred.flatten(1), mask.flatten(1))]
        assert all(map(same, ours.tolist(), theirs))


def test_by_hand_with_modes_and_thresholds():
    pred = torch.tensor([0.9, 0.5, 0.4, 0.1]).reshape(1, 1, 2, 2)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    # TP 1, FN 1 (0.5 is not above 0.5), TN 2; inverted: TP 1, FP 2, FN 1.
    cases = [(PixelF1(), 2 / 3), (PixelF1(mode="reverse"), 2 / 5), (PixelF1(mode="double"), 2 / 3),
             (PixelIOU(), 1 / 2), (PixelIOU(mode="reverse"), 1 / 4), (PixelAccuracy(mode="reverse"), 1 / 4),
             (PixelAUC(), 1.0), (PixelAUC(mode="reverse"), 0.0), (PixelAUC(mode="double"), 1.0), (PixelF1(0.45), 1.0)]
    for metric, value in cases:
        assert metric(pred, mask).item() == pytest.approx(value, abs=1e-12), metric.name
    assert PixelF1(mode="double")(1 - pred, mask).item() == 1  # inverted, 0.1 and 0.5 are the tampered ones
    names = [metric.name for metric, _ in cases]
    assert len(set(names)) == len(names)
    assert names[0] == "pixel-level F1" and names[1] == "pixel-level F1 (reverse)"


def test_logits_are_taken_where_only_thresholded():
    pred, mask = torch.tensor([[[[-7.0, 9.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert PixelF1()(pred, mask).item() == PixelIOU()(pred, mask).item() == PixelAccuracy()(pred, mask).item() == 1
    with pytest.raises(UserError, match="pred_mask reaches from -7 to 9 .* sigmoid"):
        PixelAUC()(pred, mask)
    with pytest.raises(UserError, match="probabilities"):
        ImageF1()([0.2, 1.5], [0, 1])
    for metric in (PixelF1(), PixelAUC()):
        with pytest.raises(UserError, match="pred_mask is NaN"):
            metric(torch.tensor([[[[math.nan, 0.0]]]]), mask)
        with pytest.raises(UserError, match="other than 0 and 1"):
            metric(mask, mask * 0.7)


def test_metric_names_are_parsed():
    assert [m.name for m in parse_metrics(["PixelF1", "PixelF1:double", "ImageAUC"])] == [
        "pixel-level F1", "pixel-level F1 (double)", "image-level AUC"]
    for spec, message in (("PixelFl", "Did you mean PixelF1"), ("pixelauc", "Did you mean PixelAUC"),
                          ("PixelF1:revers", "Did you mean reverse"), ("ImageF1:double", "no modes")):
        with pytest.raises(UserError, match=message):
            parse_metrics([spec])


def test_table():
    table = format_table(["set", "F1", "AUC"], [["casia", 0.51239, math.nan], ["columbia", 1.0, None]])
    assert table.splitlines() == ["set           F1  AUC", "casia     0.5124    -", "columbia  1.0000    -"]


class Toy(nn.Module):
    """Scores that depend on the picture alone in evaluation mode, with what training mode could disturb."""

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

    def forward(self, **data):
        return self.output


def picture(i):
    rng = torch.Generator().manual_seed(i)
    height, width = torch.randint(5, SIDE + 1, (2,), generator=rng).tolist()
    image = torch.zeros(3, SIDE, SIDE)
    image[:, :height, :width] = torch.randn(3, height, width, generator=rng)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :height // 2, 2:width] = i % 3 > 0  # every third is authentic
    return {"index": i, "image": image, "mask": mask, "label": int(i % 3 > 0), "shape": torch.tensor([height, width]),
            "name": f"folder/{i}.png"}


def batches(indices, batch_size):
    return [torch.utils.data.default_collate([picture(i) for i in indices[start:start + batch_size]])
            for start in range(0, len(indices), batch_size)]


def all_metrics():
    return parse_metrics(["PixelF1", "PixelIOU", "PixelAccuracy", "PixelAUC", "PixelF1:double", "ImageF1", "ImageAUC",
                          "ImageAccuracy"])


def toy_results(share):
    """{(batch size, model_eval): (values, counted, left_out)} of all ranks, seen from the rank that has this share."""
    torch.manual_seed(0)
    results = {}
    for batch_size in (1, 4, 7):
        for model_eval in (True, False):
            model = Toy()
            before = {name: value.clone() for name, value in model.state_dict().items()}
            (result,) = evaluate(model, batches(share, batch_size), all_metrics(), dict, model_eval=model_eval,
                                 expected=NUM_PICTURES, keep_names=True)
            assert model.training and model.sync.training and not model.frozen.training
            assert before.keys() == model.state_dict().keys()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert result.names == [f"folder/{i}.png" for i in range(NUM_PICTURES)]
            results[batch_size, model_eval] = result.values, result.counted, result.left_out
    return results


def run_rank(rank, folder):
    """Three processes, then two of them, with uneven shares (the third has no picture); each leaves its results."""
    shares = [[2, 0, 3, 1], list(range(22, 3, -1)), []]
    for world_size in (3, 2):
        if rank >= world_size:
            break
        dist.init_process_group("gloo", f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
        torch.save(toy_results(shares[rank]), f"{folder}/{world_size}-{rank}.pt")
        # The mistake of one rank is told by all.
        poison = Fixed(pred_mask=torch.full((1, 1, SIDE, SIDE), math.nan if rank == 0 else 0.5))
        with pytest.raises(UserError, match=r"pred_mask is NaN for picture folder/2\.png"):
            evaluate(poison, batches(shares[rank], 1), [PixelF1()], dict)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process():
    return toy_results(range(NUM_PICTURES))


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
    model, whole = Toy().eval(), batches(range(NUM_PICTURES), NUM_PICTURES)[0]
    with torch.no_grad():
        output = model(**whole)
    values, counted, left_out = one_process[4, True]
    for metric in all_metrics():
        if metric.key == "pred_mask":
            hand = metric(output["pred_mask"], whole["mask"], shape=whole["shape"])
            assert counted[metric.name] == int((~hand.isnan()).sum())
            assert values[metric.name] == pytest.approx(hand.nanmean().item(), abs=1e-9)
        else:
            assert values[metric.name] == pytest.approx(metric(output["pred_label"], whole["label"]), abs=1e-9)
    assert counted["pixel-level F1"] == 15 and left_out["pixel-level F1"] == 8 and left_out["pixel-level Accuracy"] == 0


def test_variants_rows_and_batch_callback():
    seen = []
    loader = [[batch, {**batch, "image": -batch["image"]}] for batch in batches(range(5), 2)]
    first, second = evaluate(Toy(), loader, all_metrics(), dict, variants=2, expected=5, keep_names=True,
                             on_batch=lambda data, output, variant: seen.append((len(data["label"]), variant)))
    assert seen == [(2, 0), (2, 1), (2, 0), (2, 1), (1, 0), (1, 1)]
    assert first.values["pixel-level AUC"] == pytest.approx(1 - second.values["pixel-level AUC"])
    rows = list(first.rows())
    assert [row["name"] for row in rows] == [f"folder/{i}.png" for i in range(5)]
    assert math.isnan(rows[0]["pixel-level F1"]) and 0 <= rows[1]["pixel-level F1"] <= 1 and 0 < rows[1]["score"] < 1
    assert "pixel-level F1: " in first.describe() and "(3 pictures, 2 left out)" in first.describe()


def test_pictures_that_come_twice_or_never_are_an_error():
    for indices, expected in (([0, 1, 1], 3), ([0, 1], 3), ([1, 2, 3], 3), ([1, 1], None)):
        with pytest.raises(RuntimeError, match="every picture once"):
            evaluate(Toy(), batches(indices, 2), [PixelF1()], dict, expected=expected)
    with pytest.raises(UserError, match="no picture"):
        evaluate(Toy(), [], [PixelF1()], dict, expected=0)


@pytest.mark.parametrize("output, metric, message", [
    ({}, PixelF1(), "Fixed: forward returned no pred_mask, which the metric 'pixel-level F1' needs"),
    ({"pred_label": None}, ImageAUC(), "no pred_label, which the metric 'image-level AUC' needs"),
    ({"pred_mask": torch.zeros(2, 1, 6, 6)}, PixelF1(), r"is \(2, 1, 6, 6\) but the mask is \(2, 1, 24, 24\)"),
    ({"pred_label": torch.tensor(0.5)}, ImageF1(), "one value per picture"),
    ({"pred_label": torch.zeros(2, 2)}, ImageF1(), "one value per picture"),
    ({"pred_label": torch.tensor([0.5, math.nan])}, ImageF1(), r"pred_label is NaN for picture folder/1\.png"),
    ({"pred_label": torch.tensor([0.5, 3.0])}, ImageAccuracy(), "'image-level Accuracy' needs probabilities"),
    ({"pred_mask": torch.full((2, 1, 24, 24), 2.0)}, PixelAUC(), r"picture folder/0\.png.*'pixel-level AUC' needs"),
])
def test_bad_output_is_one_clear_sentence(output, metric, message):
    with pytest.raises(UserError, match=message):
        evaluate(Fixed(**output), batches(range(2), 2), [metric], dict)


def test_unneeded_output_is_not_judged():
    output = {"pred_mask": torch.randn(2, 1, SIDE, SIDE) * 9, "pred_label": torch.tensor(7.0)}
    (result,) = evaluate(Fixed(**output), batches(range(2), 2), [PixelF1()], dict)
    assert result.counted["pixel-level F1"] == 1 and np.isnan(result.score).all()
    for label in (torch.tensor(0.9), torch.tensor([0.9]), torch.tensor([[0.9]])):
        (result,) = evaluate(Fixed(pred_label=label), batches([0], 1), [ImageAccuracy()], dict)
        assert result.values["image-level Accuracy"] == 0 and result.score[0] == pytest.approx(0.9)
    with pytest.raises(UserError, match="twice"):
        evaluate(Fixed(**output), [], [PixelF1(), PixelF1()], dict)
