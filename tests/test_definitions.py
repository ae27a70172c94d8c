"""Every published metric definition against what the published programs returned, and against values worked out by hand.

Run: pytest tests/test_definitions.py
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
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
    "PixelF1BorderDoubleSafe": "PixelF1:safire", "PixelAbsMCCBorderSafe": "PixelMCC:trufor", "PixelMIoU": "PixelMIOU:catnet",
    "PixelMIoUPermuted": "PixelMIOU:catnet_double", "PixelMIoUPresent": "PixelMIOU",
    "PixelF1Permuted": "PixelF1:imdlbenco_double", "PixelAccPermuted": "PixelAccuracy:double",
    "PixelAbsMCC": "PixelMCC:safire", "PixelMIoUGe": "PixelMIOU:safire", "PixelAUC": "PixelAUC",
    "PixelAP": "PixelAP:safire", "PixelAUROCMean": "PixelAUC:photoholmes",
    "PixelSoftF1_v1": "PixelSoftF1:photoholmes_v1", "PixelSoftF1_v2": "PixelSoftF1:photoholmes",
    "PixelSoftIoU_v1": "PixelSoftIOU:photoholmes_v1", "PixelSoftIoU_v2": "PixelSoftIOU:photoholmes",
    "PixelSoftMCC_v1": "PixelSoftMCC:photoholmes_v1", "PixelSoftMCC_v2": "PixelSoftMCC:photoholmes",
    "PixelFPRExactOne_heatmap": "PixelFPR:photoholmes", "TorchMCC": "PixelMCC:photoholmes",
}
# ... -> our name, and what ours is where the published value is no number or a 0 for something undefined.
OURS = {"PixelF1Eps8": "PixelF1", "PixelF1BorderPlain": "PixelF1:border", "PixelBestF1Border": "PixelBestF1:trufor"}
IMAGE = {
    "ImageSenSpeF1": "ImageSenSpeF1", "ImageF1Eps9": "ImageF1", "ImageAcc": "ImageAccuracy", "ImageAUC": "ImageAUC",
    "ImageMCCEps9": "ImageMCC:forensichub", "ImageTPREps9": "ImageRecall", "ImageBalancedAcc": "ImageBalancedAccuracy",
    "ImageAP": "ImageAP", "ImageAbsMCC": "ImageMCC:safire", "ImageSoftF1_v1": "ImageSoftF1:photoholmes_v1",
    "ImageSoftF1_v2": "ImageSoftF1", "ImageSoftIoU_v1": "ImageSoftIOU:photoholmes_v1", "ImageSoftIoU_v2": "ImageSoftIOU",
    "ImageSoftMCC_v1": "ImageSoftMCC:photoholmes_v1", "ImageSoftMCC_v2": "ImageSoftMCC",
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
    for published, name, undefined in (("TorchMCC", "PixelMCC", (4, 5, 10)), ("PixelSoftMCC_v1", "PixelSoftMCC", (4, 5, 10))):
        expected = [math.nan if i in undefined else value for i, value in enumerate(correct[published])]
        assert of_images(name) == pytest.approx(expected, abs=1e-9, nan_ok=True), name  # one class only: undefined
    own = {name: [number(value) for value in values] for name, values in CASES["pixel_own"].items()}
    for name, ours in (("PixelBestF1", "PixelBestF1"), ("PixelF1AtEER", "PixelF1:eer")):
        expected = [math.nan if not ARRAYS[f"mask_{i}"].any() else value for i, value in enumerate(own[name])]
        assert of_images(ours) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_areas_whose_ties_the_published_program_breaks_by_chance():
    """IMDL-BenCo's AUC lies anywhere between the areas with all ties lost and won; ours counts them one half."""
    for mode, published in (("imdlbenco", "PixelAUCUnstable"), ):
        ours = of_images(f"PixelAUC:{mode}")
        assert ours[4] == ours[10] == 0 and math.isnan(ours[5])
        for i in (0, 7, 8, 9):  # hardly any ties
            assert ours[i] == pytest.approx(CASES["pixel"][published]["original"][i], abs=1e-4)


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
        if one_class and name in ("ImageBalancedAccuracy", ):  # TruFor leaves the missing class out
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
