"""Every published metric definition against what the published programs returned, and against values made by hand.

Run: pytest tests/test_definitions.py
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from counting import Draw, Levels, Samples
from metrics import parse_metrics

FOLDER = Path(__file__).parent / "reference" / "metrics"
CASES, ARRAYS = json.loads((FOLDER / "cases.json").read_text()), np.load(FOLDER / "cases.npz")

# Published definition -> our name for it, image by image.
PIXEL = {
    "PixelF1Eps6@0.5": "PixelF1:mvssnet", "PixelPrecisionEps6@0.5": "PixelPrecision:mvssnet",
    "PixelRecallEps6@0.5": "PixelRecall:mvssnet", "PixelF1Eps6Floor8": "PixelF1:mvssnet_8bit",
    "PixelF1Eps8": "PixelF1:imdlbenco", "PixelIoUEps8": "PixelIOU:imdlbenco", "PixelAcc": "PixelAccuracy",
    "PixelF1Eps8Inverted": "PixelF1:imdlbenco_reverse", "PixelIoUEps8Inverted": "PixelIOU:imdlbenco_reverse",
    "PixelAccInverted": "PixelAccuracy:reverse", "PixelF1Eps8Double": "PixelF1:imdlbenco_double",
    "PixelIoUEps8Double": "PixelIOU:imdlbenco_double", "PixelAccDouble": "PixelAccuracy:double",
    "PixelBestF1Border": "PixelBestF1:trufor", "PixelF1BorderDouble": "PixelF1:trufor",
    "PixelF1BorderDoubleSafe": "PixelF1:safire", "PixelAbsMCCBorderSafe": "PixelMCC:trufor",
    "PixelMIoU": "PixelMIOU:catnet",
    "PixelMIoUPermuted": "PixelMIOU:catnet_double", "PixelMIoUPresent": "PixelMIOU",
    "PixelF1Permuted": "PixelF1:imdlbenco_double", "PixelAccPermuted": "PixelAccuracy:double",
    "PixelAbsMCC": "PixelMCC:safire", "PixelMIoUGe": "PixelMIOU:safire", "PixelAUC": "PixelAUC",
    "PixelAP": "PixelAP:safire", "PixelAUROCMean": "PixelAUC:photoholmes",
    "PixelSoftF1_v1": "PixelSoftF1:photoholmes_v1", "PixelSoftF1_v2": "PixelSoftF1:photoholmes",
    "PixelSoftIoU_v1": "PixelSoftIOU:photoholmes_v1", "PixelSoftIoU_v2": "PixelSoftIOU:photoholmes",
    "PixelSoftMCC_v1": "PixelSoftMCC:photoholmes_v1", "PixelSoftMCC_v2": "PixelSoftMCC:photoholmes",
    "PixelFPRExactOne_heatmap": "PixelFPR:photoholmes", "TorchMCC": "PixelMCC:photoholmes",
}
IMAGE = {
    "ImageSenSpeF1": "ImageSenSpeF1", "ImageF1Eps9": "ImageF1", "ImageAcc": "ImageAccuracy", "ImageAUC": "ImageAUC",
    "ImageMCCEps9": "ImageMCC:forensichub", "ImageTPREps9": "ImageRecall", "ImageBalancedAcc": "ImageBalancedAccuracy",
    "ImageAP": "ImageAP", "ImageAbsMCC": "ImageMCC:safire", "ImageSoftF1_v1": "ImageSoftF1:photoholmes_v1",
    "ImageSoftF1_v2": "ImageSoftF1", "ImageSoftIoU_v1": "ImageSoftIOU:photoholmes_v1",
    "ImageSoftIoU_v2": "ImageSoftIOU", "ImageSoftMCC_v1": "ImageSoftMCC:photoholmes_v1",
    "ImageSoftMCC_v2": "ImageSoftMCC",
}
DATASET = {
    "PixelSoftF1_v1": "PixelSoftF1:photoholmes_v1", "PixelSoftF1_v2": "PixelSoftF1:photoholmes",
    "PixelSoftIoU_v1": "PixelSoftIOU:photoholmes_v1", "PixelSoftIoU_v2": "PixelSoftIOU:photoholmes",
    "PixelSoftMCC_v1": "PixelSoftMCC:photoholmes_v1", "PixelSoftMCC_v2": "PixelSoftMCC:photoholmes",
    "PixelFPRExactOne_heatmap": "PixelFPR:photoholmes", "PixelAUROCMean": "PixelAUC:photoholmes",
    "PixelF1Pooled": "PixelF1:pooled", "PixelIoUPooled": "PixelIOU:pooled", "PixelMCCPooled": "PixelMCC:photoholmes",
    "PixelAUCPooled": "PixelAUC:pooled", "PixelPrecisionPooled": "PixelPrecision:pooled",
    "PixelTPRPooled": "PixelRecall:pooled", "PixelMIoUPooled": "PixelMIOU:pooled", "PixelMIoU_mean": "PixelMIOU:catnet",
    "PixelMIoUPermuted_mean": "PixelMIOU:catnet_double", "PixelF1Eps8_mean": "PixelF1:imdlbenco",
    "PixelF1Eps8Double_mean": "PixelF1:imdlbenco_double", "PixelIoUEps8_mean": "PixelIOU:imdlbenco",
    "PixelAcc_mean": "PixelAccuracy", "PixelF1Eps6@0.5_mean": "PixelF1:mvssnet",
    "PixelBestF1Border_nanmean": "PixelBestF1:trufor", "PixelF1BorderDouble_nanmean": "PixelF1:trufor",
    "PixelBestF1Pooled": "PixelBestF1:pooled", "PixelBestF1PerDataset": "PixelBestF1:dataset",
    "PixelBestF1_mean_over_masks_nonempty": "PixelBestF1", "PixelAUC_mean_over_defined": "PixelAUC",
}


def number(value):
    return math.nan if value == "nan" else value


def maps(i):
    return (torch.from_numpy(ARRAYS[f"{kind}_{i}"].astype(np.float32))[None, None] for kind in ("pred", "mask"))


def of_images(name, images=range(11)):
    metric, = parse_metrics([name])
    return [metric(*maps(i)).item() for i in images]


def of_set(name, images, score=None, label=None):
    """A set's value as evaluate() puts it together from batches of one."""
    metric, = parse_metrics([name])
    samples = [Samples(*([each[0]] for each in maps(i))) for i in images]
    columns = [torch.stack(metric.columns(one)).numpy() if metric.columns(one) else np.zeros((0, 1)) for one in samples]
    levels = Levels()
    for one in samples:
        levels.add(one.keys)
    label = [float(ARRAYS[f"mask_{i}"].any()) for i in images] if label is None else label
    draw = Draw(np.zeros(len(images)) if score is None else score, label,
                {metric.name: np.concatenate(columns, axis=1)}, levels)
    return metric.value(draw)[0]


@pytest.mark.parametrize("published", PIXEL)
def test_each_image_is_what_the_published_program_gives(published):
    expected = [number(value) for value in CASES["pixel"][published]["original"]]
    assert of_images(PIXEL[published]) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_ours_is_the_right_value_where_the_published_one_is_not():
    correct = {name: [number(value) for value in case["correct"]] for name, case in CASES["pixel"].items()
               if "correct" in case}
    assert of_images("PixelF1") == pytest.approx(correct["PixelF1Eps8"], abs=1e-9, nan_ok=True)
    assert of_images("PixelAUC:double") == pytest.approx(correct["PixelAUCUnstableDouble"], abs=1e-9, nan_ok=True)
    for published, name in (("TorchMCC", "PixelMCC"), ("PixelSoftMCC_v1", "PixelSoftMCC")):
        expected = [math.nan if i in (4, 5, 10) else value for i, value in enumerate(correct[published])]  # one class
        assert of_images(name) == pytest.approx(expected, abs=1e-9, nan_ok=True), name
    own = {name: [number(value) for value in values] for name, values in CASES["pixel_own"].items()}
    for name, ours in (("PixelBestF1", "PixelBestF1"), ("PixelF1AtEER", "PixelF1:eer")):
        expected = [math.nan if not ARRAYS[f"mask_{i}"].any() else value for i, value in enumerate(own[name])]
        assert of_images(ours) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_areas_whose_ties_the_published_program_breaks_by_chance():
    """IMDL-BenCo's AUC lies anywhere between the areas with all ties lost and won; ours counts them one half."""
    ours, theirs = of_images("PixelAUC:imdlbenco"), CASES["pixel"]["PixelAUCUnstable"]["original"]
    assert ours[4] == ours[10] == 0 and math.isnan(ours[5]) and theirs[5] == "nan"
    assert ours[8] == pytest.approx(theirs[8], abs=1e-6) and ours[9] == theirs[9] == 1  # no ties across the classes
    for i in (0, 1, 2, 3, 6, 7):
        pred, mask = (values.numpy().ravel() for values in maps(i))
        tampered, authentic = pred[mask == 1], np.sort(pred[mask == 0])
        lost, won = (np.searchsorted(authentic, tampered, side).mean() / len(authentic) for side in ("left", "right"))
        assert lost - 1e-6 <= theirs[i] <= won + 1e-6 and ours[i] == pytest.approx((lost + won) / 2)


def test_border():
    """An image whose mask is thinner than 15 pixels keeps nothing tampered."""
    ours, theirs = of_images("PixelF1:border"), CASES["pixel"]["PixelF1BorderPlain"]["original"]
    for i, value in enumerate(theirs):
        undefined = i in (4, 8, 10)
        assert math.isnan(ours[i]) if undefined else ours[i] == pytest.approx(value, abs=1e-6)


def test_padding():
    pred, mask = maps(0)
    valid = torch.from_numpy(ARRAYS["shape_mask_0"].astype(np.float32))[None, None]
    for key, expected in {**CASES["padded_case0"]["original"], **CASES["padded_case0"]["correct"]}.items():
        name, mode = key.rsplit("_", 1)
        name = {"PixelF1Eps8": "PixelF1", "PixelIoUEps8": "PixelIOU", "PixelAcc": "PixelAccuracy",
                "PixelAUCUnstable": "PixelAUC"}[name]
        metric, = parse_metrics([f"{name}:{mode}"])
        tolerance = 1e-4 if key == "PixelAUCUnstable_double" else 1e-6  # its ties
        assert metric(pred, mask, valid).item() == pytest.approx(expected, abs=tolerance), key


@pytest.mark.parametrize("scores", ["main", "oneclass", "low", "allwrong"])
def test_image_level(scores):
    score, label = (ARRAYS[name] for name in CASES["image_arrays"][scores])
    case = CASES["image"][scores]

    def ours(name):
        metric, = parse_metrics([name])
        return metric(score, label)

    one_class = scores == "oneclass"
    for published, name in IMAGE.items():
        expected = number(case["original"][published])
        if one_class and name == "ImageBalancedAccuracy":  # TruFor leaves the missing class out
            expected = math.nan
        assert ours(name) == pytest.approx(expected, abs=1e-6, nan_ok=True), published
    right = {name: number(value) for name, value in case["correct_or_bounds"].items() if not isinstance(value, list)}
    assert ours("ImageMCC") == pytest.approx(math.nan if one_class else right["ImageMCC"], nan_ok=True)
    assert ours("ImageAP") == pytest.approx(right["ImageAP"])
    assert ours("ImageEER") == pytest.approx(right.get("ImageEER_full_curve", math.nan), nan_ok=True)
    assert ours("ImageTPRAt5FPR") == pytest.approx(right.get("ImageTPRatFPR_max_step@0.0500", math.nan), nan_ok=True)


@pytest.mark.parametrize("members", ["all", "tampered_nonempty"])
def test_sets(members):
    images, case = CASES["dataset_members"][members], CASES["dataset"][members]
    for published, expected in {**case["original"], **case["correct_or_ours"]}.items():
        if published in DATASET:
            from_levels = published in ("PixelAUCPooled", "PixelBestF1Pooled", "PixelBestF1PerDataset")
            tolerance = 1e-4 if from_levels else 1e-6  # of float maps
            assert of_set(DATASET[published], images) == pytest.approx(number(expected), abs=tolerance), published


# Values on paper. One image of 2 x 4 pixels, prediction and mask:
#     .9 .8 .6 .4      1 1 0 1        above .5: TP 2 (.9 .8), FP 1 (.6), FN 1 (.4), TN 4
#     .3 .2 .1 .0      0 0 0 0
# Thresholds from the highest score down, (TP, FP): (1,0) (2,0) (2,1) (3,1) (3,2) (3,3) (3,4) (3,5).
PAPER = (torch.tensor([[.9, .8, .6, .4], [.3, .2, .1, .0]]), torch.tensor([[1., 1, 0, 1], [0, 0, 0, 0]]))
ON_PAPER = {
    "PixelF1": 4 / 6, "PixelIOU": 2 / 4, "PixelAccuracy": 6 / 8, "PixelPrecision": 2 / 3, "PixelRecall": 2 / 3,
    "PixelFPR": 1 / 5,
    "PixelMCC": (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5),
    "PixelMIOU": (2 / 4 + 4 / 6) / 2,
    "PixelAUC": 14 / 15,  # of 3 x 5 pairs only (.4, .6) is in the wrong order
    "PixelAP": 1 / 3 * 1 + 1 / 3 * 1 + 1 / 3 * 3 / 4,
    "PixelBestF1": 6 / 7,  # from .4 on: TP 3, FP 1
    "PixelBestIOU": 3 / 4,
    "PixelF1:eer": 4 / 6,  # FPR 1/5 and FNR 1/3 at .6 differ by 2/15; at .8 (0 and 1/3) and .4 (1/5 and 0) by more
    # Inverted: TP 1 (.4), FP 4, FN 2.
    "PixelF1:reverse": 2 / 8, "PixelF1:imdlbenco_double": 4 / 6, "PixelIOU:imdlbenco_reverse": 1 / 7,
    # Weighted counts: TP .9 + .8 + .4 = 2.1, FN .9, FP .6 + .3 + .2 + .1 = 1.2, TN 3.8.
    "PixelSoftF1": 4.2 / 6.3, "PixelSoftIOU": 2.1 / 4.2,
    "PixelSoftMCC": (2.1 * 3.8 - 1.2 * .9) / math.sqrt(3.3 * 3.0 * 5.0 * 4.7),
}
# Four images, scores .9 .6 .4 .2 with labels 1 0 1 0: at .5 TP, FP, FN, TN are 1 each. (TP, FP) from the highest
# score down: (1,0) (1,1) (2,1) (2,2).
SCORES = np.array([.9, .6, .4, .2]), np.array([1, 0, 1, 0])
SCORES_ON_PAPER = {
    "ImageF1": 1 / 2, "ImageAccuracy": 1 / 2, "ImagePrecision": 1 / 2, "ImageRecall": 1 / 2, "ImageFPR": 1 / 2,
    "ImageBalancedAccuracy": 1 / 2, "ImageMCC": 0, "ImageSenSpeF1": 1 / 2, "ImageAUC": 3 / 4,
    "ImageAP": 1 / 2 + 1 / 2 * 2 / 3, "ImageEER": 1 / 2,  # FPR and FNR are 1/2 each at .6
    "ImageTPRAt1FPR": 1 / 2, "ImageTPRAt5FPR": 1 / 2,  # at .9, with no false alarm
    "ImageSoftF1": 2.6 / (2.6 + .8 + .7), "ImageSoftIOU": 1.3 / 2.8,  # TP .9 + .4, FP .6 + .2, FN .1 + .6
    "ImageSoftMCC": (1.3 * 1.2 - .8 * .7) / math.sqrt(2.1 * 2.0 * 2.0 * 1.9),
}


def test_on_paper():
    for name, expected in ON_PAPER.items():
        metric, = parse_metrics([name])
        assert metric(*(values[None, None] for values in PAPER)).item() == pytest.approx(expected, abs=1e-6), name
    for name, expected in SCORES_ON_PAPER.items():
        metric, = parse_metrics([name])
        assert metric(*SCORES) == pytest.approx(expected), name


def test_equal_errors_as_close_as_each_other():
    """Scores .5 .4 .3 .2 .1, tampered .4 and .1. From .4 on FPR is 1/3 and FNR 1/2, from .3 on 2/3 and 1/2: the first
    counts, though in floating point the second difference of 1/6 is the smaller one."""
    score, truth = np.array([.5, .4, .3, .2, .1]), np.array([0, 1, 0, 0, 1])
    rate, f1_there = parse_metrics(["ImageEER", "PixelF1:eer"])
    assert rate(score, truth) == pytest.approx((1 / 3 + 1 / 2) / 2)
    pred, mask = (torch.tensor(values, dtype=torch.float)[None, None, None] for values in (score, truth))
    assert f1_there(pred, mask).item() == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))


def test_border_on_paper():
    """A square of 21 x 21 in 41 x 41: erosion by 15 leaves 7 x 7, dilation by 11 spares all but 31 x 31."""
    mask, pred = torch.zeros(1, 1, 41, 41), torch.zeros(1, 1, 41, 41)
    mask[..., 10:31, 10:31] = 1
    pred[..., 15:31, 10:31] = 1  # all but the five upper rows, which lie in the border that doesn't count
    pred[..., :2, :] = 1  # 2 x 41 false alarms outside of it: FP 82
    tp, fp, tn = 49, 82, 41 * 41 - 31 * 31 - 82
    for name, expected in (("PixelF1:border", 2 * tp / (2 * tp + fp)), ("PixelF1:trufor", 2 * tp / (2 * tp + fp)),
                           ("PixelMCC:trufor", tp * tn / math.sqrt((tp + fp) * tp * tn * (tn + fp)))):
        metric, = parse_metrics([name])
        assert metric(pred, mask).item() == pytest.approx(expected)
        assert metric(1 - pred, mask).item() == pytest.approx(0 if name == "PixelF1:border" else expected)


def test_sets_on_paper():
    """Image a: scores .9 .7 .2 .1, tampered the first two. Image b: .8 .6 .4 .3, tampered the first three. Image c:
    .5 .1 .1 .1, authentic."""
    sets = [([.9, .7, .2, .1], [1, 1, 0, 0]), ([.8, .6, .4, .3], [1, 1, 1, 0]), ([.5, .1, .1, .1], [0, 0, 0, 0])]
    samples = Samples(*zip(*((torch.tensor(p)[None, None], torch.tensor(g, dtype=torch.float)[None, None])
                             for p, g in sets)))
    score, label = np.array([.9, .8, .6]), np.array([1, 1, 0])
    for name, expected in {
            "PixelF1:pooled": 8 / 9,  # TP 2 + 2, FP 0, FN 1
            "PixelIOU:pooled": 4 / 5, "PixelRecall:pooled": 4 / 5, "PixelFPR:pooled": 0,
            "PixelBestF1:pooled": 10 / 11,  # from .4 on: TP 5, FP 1 (c's .5)
            "PixelBestF1:dataset": 1,  # between .3 and .4 both tampered images are exact; c does not count
            "PixelAUC:pooled": 34 / 35,  # 5 x 7 pairs, (.4, .5) wrong
            "PixelAP:pooled": 4 / 5 + 1 / 5 * 5 / 6,
            "PixelF1": (1 + 4 / 5) / 2, "PixelF1:imdlbenco": (1 + 4 / 5 + 0) / 3,
            "PixelF1:mvssnet": (1 + 4 / 5 + 1) / 3,  # c's map is empty, as .5 is not above .5
            "PixelSoftF1:photoholmes": 2 * 3.4 / (4.8 + 5),  # TP 1.6 + 1.8; all scores 1.9 + 2.1 + .8; 5 tampered
            # Sensitivity 1, specificity 0 (c's .6 is a false alarm): no combined F1 but 0.
            "ImageSenSpeF1": 0, "CombinedF1": 0}.items():
        metric, = parse_metrics([name])
        columns = metric.columns(samples) if metric.key == "pred_mask" else []
        columns = {metric.name: torch.stack(columns).numpy()} if columns else {}
        value = metric.value(Draw(score, label, columns, Levels(samples.keys)))[0]
        assert value == pytest.approx(expected, abs=1e-6), name


def test_eight_bit_maps_are_exact_and_float_maps_within_a_bound_at_data_set_level():
    """Levels part all values of 8-bit maps; scores of a float map that share a level tie."""
    from sklearn.metrics import average_precision_score, roc_auc_score
    rng = np.random.default_rng(0)
    truth = [rng.random((32, 32)) < share for share in (.1, .3, 0, .6)]
    maps_ = [1 / (1 + np.exp(-3 * (rng.normal(size=(32, 32)) + each - .5))) for each in truth]
    for bits in (8, 32):
        given = [(np.rint(each * 255) / 255 if bits == 8 else each).astype(np.float32) for each in maps_]
        levels = Levels(Samples([torch.from_numpy(each) for each in given],
                                [torch.from_numpy(each).float() for each in truth]).keys)
        score, flat = np.concatenate(given, axis=None), np.concatenate(truth, axis=None)
        tied = np.diff(levels.tp) * np.diff(levels.fp) / (flat.sum() * (~flat).sum())
        bound = 1e-12 if bits == 8 else tied.sum() / 2
        assert bound < 1e-4
        auc, ap, best = (metric.value(Draw([], [], levels=levels))[0] for metric in
                         parse_metrics(["PixelAUC:pooled", "PixelAP:pooled", "PixelBestF1:dataset"]))
        assert abs(auc - roc_auc_score(flat, score)) <= bound
        assert ap == pytest.approx(average_precision_score(flat, score), abs=1e-12 if bits == 8 else 1e-4)
        exact = max(np.mean([2 * (p[g] >= v).sum() / ((p >= v).sum() + g.sum()) for p, g in zip(given, truth)
                             if g.any()]) for v in np.unique(score))
        assert exact - (1e-8 if bits == 8 else 1e-3) <= best <= exact + 1e-8
