"""Metrics against scikit-learn and by hand. Run: pytest tests/test_metrics.py"""
import math

import numpy as np
import pytest
import torch

import counting
import metrics
from metrics import ImageAccuracy, ImageAUC, ImageF1, PixelAccuracy, PixelAUC, PixelF1, PixelIOU, parse_metrics
from registry import UserError


def same(ours, theirs):
    return math.isnan(ours) and math.isnan(theirs) or abs(ours - theirs) < 1e-9


def random_case(rng):
    """Scores and truth of one random kind of image: continuous, tied, half precision, constant, signed zero."""
    size = (int(rng.integers(1, 13)), int(rng.integers(1, 13)))
    kinds = [rng.random(size), rng.random(size).astype("half"), rng.integers(0, 256, size) / 255,
             rng.integers(0, 4, size) / 4, rng.choice([-0.0, 0.0, 1.0, 0.5], size), np.full(size, rng.random())]
    score = kinds[rng.integers(len(kinds))]
    truth = rng.random(size) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return torch.tensor(score.astype(rng.choice(["float32", "float64"]))), torch.tensor(truth).float()


def expected_values(score, truth):
    """F1, IoU, accuracy and AUC by scikit-learn; NaN where the metric is not defined."""
    from sklearn import metrics as sk

    score, truth = score.numpy(), truth.numpy() > 0
    tampered, both = truth.any(), truth.any() and not truth.all()
    return [sk.f1_score(truth, score > 0.5) if tampered else math.nan,
            sk.jaccard_score(truth, score > 0.5) if tampered else math.nan,
            sk.accuracy_score(truth, score > 0.5),
            sk.roc_auc_score(truth, score) if both else math.nan]


def test_further_metrics_equal_scikit_learn():
    """Random, tied and degenerate inputs: one class, constant, one pixel, an empty map."""
    from sklearn import metrics as sk
    rng = np.random.default_rng(1)
    names = ["Precision", "Recall", "AP", "MCC", "BalancedAccuracy"]
    images = parse_metrics([f"Image{name}" for name in names])
    pixels = parse_metrics([f"Pixel{name}" for name in names[:4]])
    for case in range(300):
        score, truth = random_case(rng)
        s, g = score.numpy().ravel(), truth.numpy().ravel() > 0
        tampered, both, h = g.any(), g.any() and not g.all(), s > 0.5
        theirs = [sk.precision_score(g, h) if tampered and h.any() else math.nan,
                  sk.recall_score(g, h) if tampered else math.nan,
                  sk.average_precision_score(g, s) if tampered else math.nan,
                  sk.matthews_corrcoef(g, h) if both else math.nan,
                  sk.balanced_accuracy_score(g, h) if both else math.nan]
        assert all(map(same, [metric(score.flatten(), truth.flatten()) for metric in images], theirs)), (case, theirs)
        assert all(map(same, [metric(score[None, None], truth[None, None]).item() for metric in pixels], theirs)), case


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
        on_gpu = counting.BatchSamples(score[None, None], truth[None, None], valid[None, None])
        assert all(map(same, [metric.compute(on_gpu).item() for metric in pixel_metrics], theirs)), (case, theirs)
        ours = [metric(score[valid], truth[valid]) for metric in image_metrics]
        assert all(map(same, ours, [theirs[0], *theirs[2:]])), (case, ours, theirs)


def test_a_batch_on_a_gpu():
    """What a GPU computes of a whole batch, here on the CPU, is what the CPU computes image by image."""
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(4, 1, 9, 7, generator=generator)
    mask = (torch.rand(4, 1, 9, 7, generator=generator) < 0.3).float()
    shape, shape_mask = torch.tensor([[9, 7], [3, 7], [9, 1], [4, 4]]), torch.ones_like(mask)
    pred[1, 0, 5:], mask[2, 0, :, 3], pred[3, 0, 2, 2] = torch.nan, 0.5, torch.nan  # two of them in the padding
    shape_mask[0, 0, :, ::2] = 0
    for given in ((shape, None), (None, shape_mask), (shape, shape_mask)):
        gpu = counting.BatchSamples(pred, mask, counting.valid_area(mask, *given))
        cpu = counting.valid_pixels(pred, mask, *given)
        for ours, theirs in zip((*gpu.counts(0.3), *gpu.checks()), (*cpu.counts(0.3), *cpu.checks())):
            assert ours.dtype == theirs.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        defined = ~gpu.checks()[0].isnan() & (gpu.checks()[2] == 0)
        torch.testing.assert_close(gpu.auc()[defined], cpu.auc()[defined], rtol=0, atol=1e-15, equal_nan=True)
    assert gpu.checks()[2].tolist() == [0, 0, 0, 0] and gpu.checks()[0].isnan().tolist() == [False, False, False, True]



def test_large_image_and_one_batch_of_different_images():
    """Counts above 2^31 pairs, and values that do not leak from one image of a batch into the next."""
    rng = torch.Generator().manual_seed(1)
    pred = (torch.rand(3, 1, 300, 400, generator=rng) * 50).round() / 50
    mask = (torch.rand(3, 1, 300, 400, generator=rng) < 0.4).float()
    mask[1] = 0
    for metric, column in ((PixelF1(), 0), (PixelAUC(), 3)):
        ours = metric(pred, mask)
        assert ours.shape == (3,) and ours.dtype == torch.float64
        theirs = [expected_values(*image)[column] for image in zip(pred.flatten(1), mask.flatten(1))]
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
                          ("PixelF1:revers", "Did you mean reverse"),
                          ("ImageF1:double", "unknown metric mode 'double' of ImageF1"),
                          ("PixelF1:imdlbenko", "Did you mean imdlbenco")):
        with pytest.raises(UserError, match=message):
            parse_metrics([spec])


def test_a_metric_of_ones_own_is_known_by_name_as_soon_as_it_is_defined():
    class PixelRatio(metrics.PixelMetric):
        title = "pixel-level ratio"

        @staticmethod
        def formula(tp, fp, fn, tn):
            return tp / (tp + fp)

    metric, double = parse_metrics(["PixelRatio", "PixelRatio:double"])
    pred, mask = torch.tensor([[[[0.9, 0.8, 0.7, 0.1]]]]), torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    assert metric(pred, mask).item() == pytest.approx(2 / 3) and metric.name == "pixel-level ratio"
    assert double(1 - pred, mask).item() == pytest.approx(2 / 3)

    class ImageNameless(metrics.ImageMetric):
        formula = PixelRatio.formula

    class PixelEmpty(metrics.PixelMetric):
        title = "pixel-level nothing"

    for name, word in (("ImageNameless", "title"), ("PixelEmpty", "formula")):
        with pytest.raises(UserError, match=f"metric {name} has no {word}: give it a title"):
            parse_metrics([name])
    for name in ("PixelRatio", "ImageNameless", "PixelEmpty"):
        del metrics.METRICS[name]
