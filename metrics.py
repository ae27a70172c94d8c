"""Metrics of detection and localization: formulas and metric classes. By hand:

    PixelF1()(pred_mask, mask)                 # (B, 1, H, W) each -> (B,) float64, NaN where undefined
    PixelAUC()(pred_mask, mask, shape=shape)   # only the top-left (h, w) of each image counts
    ImageAUC()(scores, labels)                 # one value per image each -> float

Pixel metrics are computed per image inside its valid area and averaged over the images where they are defined (F1
and IoU need something tampered, AUC both classes); image metrics are computed once over all (score, label). A pixel or
image is called tampered when its score is above the threshold. Definitions that others publish are modes:
`PixelF1(mode="imdlbenco")`; README.md ("Metrics") has the table of all.
"""
import dataclasses
import functools
from typing import Callable, Optional

import numpy as np
import torch

from counting import (NO_PIXEL, Draw, Levels, area, average_precision, best_either_f1, best_f1, best_mean, eer,
                      f1_at_eer, iou_of, known, tpr_at, valid_pixels)
from registry import UserError, nearest

MODES = ("origin", "reverse", "double")

# ---------------------------------------------------------------------------------------------------------------------
# Formulas of the four counts, tensors of any shape


def f1(tp, fp, fn, tn):
    """2 TP / (2 TP + FP + FN); NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), torch.nan)


def iou(tp, fp, fn, tn):
    """Intersection over union of the tampered areas; NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, tp / (tp + fp + fn), torch.nan)


def accuracy(tp, fp, fn, tn):
    """Share of right decisions."""
    return (tp + tn) / (tp + fp + fn + tn)


def precision(tp, fp, fn, tn):
    """Share of the tampered among what is called so; NaN when nothing is tampered or nothing is called so."""
    return torch.where(tp + fn > 0, tp / (tp + fp), torch.nan)


def recall(tp, fp, fn, tn):
    """Share of the tampered that is called so (TPR); NaN when nothing is tampered."""
    return tp / (tp + fn)


def fpr(tp, fp, fn, tn):
    """Share of the authentic that is called tampered; NaN when nothing is authentic."""
    return fp / (fp + tn)


def balanced_accuracy(tp, fp, fn, tn):
    """Mean of the shares of right decisions in both classes; NaN when one is missing."""
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


def correlation(tp, fp, fn, tn):
    """Matthews correlation coefficient; 0 where one class is missing, in truth or decisions, as scikit-learn has it."""
    margins = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
    return torch.where(margins > 0, (tp * tn - fp * fn) / margins, 0.0)


def soft_mcc(tp, fp, fn, tn):
    """MCC of photoholmes' weighted counts: 1 without any error, -1 without any hit, 0 where a margin is 0."""
    value = torch.where(tp + tn == 0, -1.0, correlation(tp, fp, fn, tn))
    return torch.where(fp + fn == 0, 1.0, value)


def soft_mcc_v1(tp, fp, fn, tn):
    """The same as photoholmes' first version adds it: 2 for a perfect map of a tampered image, -2 for its inverse."""
    perfect, opposite = (fp + fn == 0).double(), (tp + tn == 0).double()
    return correlation(tp, fp, fn, tn) + perfect - opposite


def torchmetrics_mcc(tp, fp, fn, tn):
    """MCC as torchmetrics 1.9 has it: 1 without any error, -1 without any hit, small values where a margin is 0."""
    top = tn - fn
    for one, other, value in ((tp, fn, tn - fp), (fp, tn, tp - fn), (fn, tn, tp - fp)):
        top = torch.where((one == 0) & (other == 0), value, top)
    margins = torch.stack([tp + fp, tp + fn, tn + fp, tn + fn])
    degenerate = 2.0**-11.5 * top / (margins + 2.0**-23).prod(dim=0).sqrt()
    value = torch.where((margins > 0).all(dim=0), correlation(tp, fp, fn, tn), degenerate)
    return torch.where(fp + fn == 0, 1.0, torch.where(tp + tn == 0, -1.0, value))


def mean_iou(tp, fp, fn, tn):
    """Mean of the IoU of the tampered and of the authentic area, over those that the mask has."""
    own, other = tp / (tp + fp + fn), tn / (tn + fp + fn)
    return torch.where(tp + fn == 0, other, torch.where(tn + fp == 0, own, (own + other) / 2))


def catnet_iou(tp, fp, fn, tn):
    """CAT-Net's mean IoU: a class that neither mask nor map has counts as 0."""
    return (tp / (tp + fp + fn).clamp(min=1) + tn / (tn + fp + fn).clamp(min=1)) / 2


def mvssnet_f1(tp, fp, fn, tn):
    """F1 as MVSS-Net has it: 1 when mask and map are both empty, 0 when only the mask is."""
    return torch.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), 1.0)


def trufor_f1(tp, fp, fn, tn):
    """The better F1 of map and inverted map; NaN when all is of one class and called so (TruFor's table is 1 x 1)."""
    total = tp + fp + fn + tn
    return torch.where((tp == total) | (tn == total), torch.nan, zero(either(f1))(tp, fp, fn, tn))


def sensitivity_specificity(tp, fp, fn, tn):
    """Harmonic mean of sensitivity and specificity, which MVSS-Net calls image-level F1; NaN when both are 0."""
    sensitivity, specificity = tp / (tp + fn).clamp(min=1), tn / (tn + fp).clamp(min=1)
    return 2 * sensitivity * specificity / (sensitivity + specificity)


def both_classes(formula):
    """The formula with NaN where nothing is tampered or nothing authentic."""
    return lambda tp, fp, fn, tn: torch.where((tp + fn > 0) & (tn + fp > 0), formula(tp, fp, fn, tn), torch.nan)


def absolute(formula):
    """The size of the formula's value, without its sign."""
    return lambda *counts: formula(*counts).abs()


def zero(formula):
    """The formula with 0 in place of NaN, so that authentic images count as 0."""
    return lambda *counts: formula(*counts).nan_to_num(nan=0.0)


def inverted(formula):
    """The formula for the inverted map."""
    return lambda tp, fp, fn, tn: formula(fn, tn, tp, fp)


def either(formula):
    """The better value of map and inverted map."""
    return lambda *counts: torch.maximum(formula(*counts), inverted(formula)(*counts))


# ---------------------------------------------------------------------------------------------------------------------
# From images to a set's value


def scores_from(rule, samples):
    """Return one score per image, pooled from its map by one of SCORES_FROM: (B,)."""
    def pool(score, _):
        score = score.ravel()  # a mean depends on the order of the sum, and so on padding beside the pixels
        if rule == "max":
            return score.max()
        if rule == "top1%":
            count = -(-score.size // 100)
            score = np.partition(score, score.size - count)[-count:]
        return score.mean(dtype=np.float64)
    return samples.each(pool)


SCORES_FROM = ("max", "mean", "top1%")


@dataclasses.dataclass(frozen=True)
class Way:
    """One definition of a metric.

    Attributes:
        columns: (samples, threshold) -> list of tensors (B,), what is kept of each image
        pooled: formula of the columns' sums over the set; None: the value is the mean of the one column
        of_set: function of a `Draw`, instead of both
        fixed: it has no threshold to set
        ranks: it needs scores in 0..1
        needs_levels: it needs the `Levels` of the set
    """

    columns: Callable = lambda samples, threshold: []
    pooled: Optional[Callable] = None
    of_set: Optional[Callable] = None
    fixed: bool = False
    ranks: bool = False
    needs_levels: bool = False


def counted_at(formula, threshold=None, inside=False):
    """A formula of each image's counts, at a threshold of its own if one is given, without the mask's border or not."""
    def column(samples, given):
        return [formula(*(samples.inside if inside else samples).counts(given if threshold is None else threshold))]
    return Way(column, fixed=threshold is not None)


def pooled(formula, threshold=None):
    """A formula of the counts over all pixels of the set."""
    return Way(lambda samples, given: samples.counts(given if threshold is None else threshold), formula,
               fixed=threshold is not None)


def ranked(function, inside=False):
    """A function of each image's ROC curve, without the mask's border or not."""
    return Way(lambda samples, _: [(samples.inside if inside else samples).ranked(function)], fixed=True, ranks=True)


def over_set(function):
    """A function of the set's `Levels`."""
    return Way(of_set=lambda draw: function(draw.levels), fixed=True, ranks=True, needs_levels=True)


def weighted(formula, pooled=False):
    """A formula of photoholmes' weighted counts of each image, or of their sums."""
    def columns(samples, _):
        return samples.soft if pooled else [formula(*samples.soft)]
    return Way(columns, formula if pooled else None, fixed=True, ranks=True)


def auc_or_zero(one_class, of_area=lambda area: area):
    """A function of each image's AUC; 0 where something is missing: "tampered", or "either" class."""
    def column(samples, _):
        tp, fp, fn, tn = samples.counts(0.5)
        missing = (tp + fn == 0) | ((fp + tn == 0) & (one_class == "either"))
        return [torch.where(missing, 0.0, of_area(samples.auc()))]
    return Way(column, fixed=True, ranks=True)


def just_below(value):
    """The next smaller float32, as a number."""
    return float(np.nextafter(np.float32(value), np.float32(-1)))


# Conventions that differ from `score > 0.5`, as thresholds of float32 scores.
AT_LEAST_HALF = just_below(0.5)  # SAFIRE: score >= 0.5
EXACTLY_ONE = just_below(1)  # photoholmes' FPR: score == 1
FLOOR_8_BIT = just_below(128 / 255)  # MVSS-Net: floor(255 score) / 255 > 0.5
INVERSE_HALF = 0.5 - 2.0**-24  # IMDL-BenCo's IoU of the inverted map: 1 - score > 0.5


def imdlbenco_double_iou(samples, _):
    """The better IoU of map and of inverted map, in which 0.5 is authentic too."""
    return [torch.maximum(zero(iou)(*samples.counts(0.5)), zero(inverted(iou))(*samples.counts(INVERSE_HALF)))]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

METRICS = {}  # name of the class -> class, for --metrics


class Metric:
    """What pixel and image metrics share; a subclass of either is known to --metrics as soon as it is defined."""

    key = None  # the model output that it judges
    title = None  # under which it is reported
    formula = None  # static method of the four counts, (B,) each -> (B,)
    takes_scores = False  # True where it has no threshold and needs scores in 0..1
    modes = MODES  # those of `compute`
    ways = {}  # further modes -> Way
    judges_images = False  # True where it needs a score of each image

    def __init_subclass__(cls):
        if Metric not in cls.__bases__:
            METRICS[cls.__name__] = cls

    def __init__(self, threshold=0.5, mode="origin"):
        self.mode, self.way = mode, self.ways.get(mode)
        kind = PixelMetric if isinstance(self, PixelMetric) else ImageMetric
        overridden = any(getattr(type(self), name) is not getattr(kind, name)
                         for name in ("compute", "value") if hasattr(kind, name))
        own_way = self.way or self.takes_scores or overridden
        missing = "title" if not self.title else "formula" if not (self.formula or own_way) else None
        if missing:
            raise UserError(f"metric {type(self).__name__} has no {missing}: give it a title, under which it is "
                            "reported, and a static method formula(tp, fp, fn, tn) of tensors.")
        known = list(dict.fromkeys([*self.modes, *self.ways]))
        if mode not in known:
            raise UserError(f"unknown metric mode '{mode}' of {type(self).__name__}.{nearest(mode, known)} Modes: "
                            f"{', '.join(known)}.")
        self.fixed, self.rule = self.way.fixed if self.way else self.takes_scores, None
        self.takes_scores = self.way.ranks if self.way else self.takes_scores
        if self.fixed and threshold != 0.5:
            raise UserError(f"metric {type(self).__name__} (mode '{mode}') has no threshold that could be set to "
                            f"{threshold}; leave it out.")
        self.set_threshold(threshold)

    def keys(self):
        """Return the names of the model's outputs that it needs."""
        return [self.key]

    def set_threshold(self, threshold):
        """Call tampered what is above `threshold` from now on; the name tells one that is not 0.5."""
        self.threshold = threshold
        notes = ([f"threshold {threshold}"] * (threshold != 0.5) + [self.mode] * (self.mode != "origin")
                 + [f"score: {self.rule}"] * bool(self.rule))
        self.name = self.title + (f" ({', '.join(notes)})" if notes else "")

    def set_rule(self, rule):
        """Judge images by a score pooled from their maps by one of SCORES_FROM; the name tells it."""
        self.rule, self.key = rule, "pred_mask"
        self.set_threshold(self.threshold)


class PixelMetric(Metric):
    """A metric of the pixels of each image.

    Args:
        threshold: a pixel is called tampered above this
        mode: "origin"; "reverse" judges the inverted prediction; "double" takes the better of both for each image; or
            the name of those who use another definition (README.md, "Metrics")
    """

    key = "pred_mask"

    def __call__(self, pred, mask, shape_mask=None, shape=None):
        """The metric of each image: (B,) float64, NaN where undefined.

        Args:
            pred: (B, 1, H, W) probabilities; those with a threshold take logits too, and compare them as they are
            mask: (B, 1, H, W), 1 = tampered, 0 = authentic
            shape_mask: (B, 1, H, W), 1 = valid, 0 = not counted
            shape: (B, 2) valid (h, w) from the top left; cheaper than `shape_mask`
        """
        if pred.shape != mask.shape:
            raise UserError(f"'{self.name}' got pred {tuple(pred.shape)} and mask {tuple(mask.shape)}; give one value "
                            "for every pixel of the mask.")
        pixels = valid_pixels(pred, mask, shape, shape_mask)
        refuse_bad_values([self], *torch.stack(pixels.checks()).tolist())
        return self.compute(pixels)

    def compute(self, samples):
        """One value per sample, (B,) float64; NaN where undefined. A value of a set is that of each image alone."""
        if self.way:
            columns = self.way.columns(samples, self.threshold)
            if self.way.of_set:
                alone = [Draw([np.nan], [0], levels=Levels([keys])) for keys in samples.keys]
                return torch.tensor([self.way.of_set(draw)[0] for draw in alone], dtype=torch.float64)
            return self.way.pooled(*columns) if self.way.pooled else columns[0]

        def judge(reverse):
            if self.takes_scores:
                return 1 - samples.auc() if reverse else samples.auc()
            tp, fp, fn, tn = samples.counts(self.threshold)
            return self.formula(fn, tn, tp, fp) if reverse else self.formula(tp, fp, fn, tn)

        if self.mode == "double":
            return torch.maximum(judge(reverse=False), judge(reverse=True))
        return judge(reverse=self.mode == "reverse")

    def columns(self, samples):
        """What `value` needs of each image: a list of (B,) tensors."""
        return [self.compute(samples)] if self.way is None else self.way.columns(samples, self.threshold)

    def has_images(self):
        """Tell whether each image has a value, of which the set's is the mean."""
        return not (self.way and (self.way.pooled or self.way.of_set))

    def count_columns(self):
        """Return how many tensors `columns` gives: those of a pooled formula are counts."""
        return 4 if self.way and self.way.pooled else 0 if self.way and self.way.of_set else 1

    def value(self, draw):
        """The value of a set and of each of its resamples, (R,), from a `Draw`."""
        if self.way and self.way.of_set:
            return self.way.of_set(draw)
        sums, images = draw.sums[self.name]
        if self.way and self.way.pooled:
            return self.way.pooled(*torch.from_numpy(sums).unbind(dim=1)).numpy()
        return sums[:, 0] / known(images[:, 0])


class ImageMetric(Metric):
    """A metric of one score per image over a whole set.

    Args:
        threshold: an image is called tampered above this
        mode: "origin", or the name of those who use another definition (README.md, "Metrics")
    """

    key, modes, judges_images = "pred_label", ("origin",), True

    def __call__(self, scores, labels):
        """The metric of (N,) probabilities against (N,) labels, 1 = tampered: a float, NaN where undefined."""
        scores, labels = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in (scores, labels))
        if scores.shape != labels.shape or scores.dim() != 1 or not len(scores):
            raise UserError(f"'{self.name}' got scores {tuple(scores.shape)} and labels {tuple(labels.shape)}; give "
                            "one score and one label per image.")
        refuse_bad_values([self], scores.tolist(), scores.tolist(), (labels * (labels - 1)).tolist())
        return float(self.value(Draw(scores.numpy(), labels.numpy()))[0])

    def value(self, draw):
        """The value of a set and of each of its resamples, (R,), from a `Draw`."""
        if self.way and self.way.of_set:
            return self.way.of_set(draw)
        formula = self.way.pooled if self.way else self.formula
        return formula(*draw.counts(self.threshold)).numpy()


def of_roc(function):
    """A function of the ROC curve of a set's image scores."""
    return Way(of_set=lambda draw: function(*draw.roc), fixed=True, ranks=True)


def of_soft(formula):
    """A formula of the set's scores as photoholmes' weighted counts."""
    return Way(of_set=lambda draw: formula(*draw.soft).numpy(), fixed=True, ranks=True)


def of_soft_mean(formula):
    """The mean over images of a formula of each score alone as photoholmes' weighted counts (its first version)."""
    def value(draw):
        p, g = map(torch.from_numpy, (draw.score, draw.truth))
        return draw.mean(formula(p * g, p * ~g, (1 - p) * g, (1 - p) * ~g).numpy())
    return Way(of_set=value, fixed=True, ranks=True)


class PixelF1(PixelMetric):
    title, formula = "pixel-level F1", staticmethod(f1)
    ways = {"imdlbenco": counted_at(zero(f1)), "imdlbenco_reverse": counted_at(zero(inverted(f1))),
            "imdlbenco_double": counted_at(zero(either(f1))), "mvssnet": counted_at(mvssnet_f1),
            "mvssnet_8bit": counted_at(mvssnet_f1, FLOOR_8_BIT), "border": counted_at(f1, inside=True),
            "trufor": counted_at(trufor_f1, inside=True), "safire": counted_at(zero(either(f1)), inside=True),
            "eer": ranked(f1_at_eer), "pooled": pooled(f1)}


class PixelIOU(PixelMetric):
    title, formula = "pixel-level IOU", staticmethod(iou)
    ways = {"imdlbenco": counted_at(zero(iou)), "imdlbenco_reverse": counted_at(zero(inverted(iou)), INVERSE_HALF),
            "imdlbenco_double": Way(imdlbenco_double_iou, fixed=True), "pooled": pooled(iou)}


class PixelAccuracy(PixelMetric):
    title, formula = "pixel-level Accuracy", staticmethod(accuracy)


class PixelAUC(PixelMetric):
    title, takes_scores = "pixel-level AUC", True
    ways = {"imdlbenco": auc_or_zero("tampered"),
            "imdlbenco_reverse": auc_or_zero("tampered", lambda area: 1 - area),
            "imdlbenco_double": auc_or_zero("tampered", lambda area: torch.maximum(area, 1 - area)),
            "photoholmes": auc_or_zero("either"),
            "pooled": over_set(lambda levels: area(levels.tp, levels.fp))}


class PixelPrecision(PixelMetric):
    title, formula, modes = "pixel-level Precision", staticmethod(precision), ("origin",)
    ways = {"mvssnet": counted_at(zero(precision)), "pooled": pooled(precision)}


class PixelRecall(PixelMetric):
    title, formula, modes = "pixel-level Recall", staticmethod(recall), ("origin",)
    ways = {"mvssnet": counted_at(zero(recall)), "pooled": pooled(recall)}


class PixelFPR(PixelMetric):
    title, formula, modes = "pixel-level FPR", staticmethod(fpr), ("origin",)
    ways = {"pooled": pooled(fpr), "photoholmes": pooled(zero(fpr), EXACTLY_ONE)}


class PixelMCC(PixelMetric):
    title, formula, modes = "pixel-level MCC", staticmethod(both_classes(correlation)), ("origin",)
    ways = {"safire": counted_at(absolute(correlation)), "trufor": counted_at(absolute(correlation), inside=True),
            "pooled": pooled(both_classes(correlation)), "photoholmes": pooled(torchmetrics_mcc)}


class PixelMIOU(PixelMetric):
    title, formula, modes = "pixel-level mIOU", staticmethod(mean_iou), ("origin",)
    ways = {"catnet": counted_at(catnet_iou), "catnet_double": counted_at(either(catnet_iou)),
            "safire": counted_at(catnet_iou, AT_LEAST_HALF), "pooled": pooled(catnet_iou)}


class PixelAP(PixelMetric):
    title, modes = "pixel-level AP", ("origin",)
    ways = {"origin": ranked(average_precision),
            "safire": ranked(lambda tp, fp: np.nan_to_num(average_precision(tp, fp))),
            "pooled": over_set(lambda levels: average_precision(levels.tp, levels.fp))}


class PixelBestF1(PixelMetric):
    title, modes = "pixel-level best F1", ("origin",)
    ways = {"origin": ranked(best_f1), "trufor": ranked(best_either_f1, inside=True),
            "dataset": over_set(lambda levels: best_mean(levels.f1, levels.tampered)),
            "pooled": over_set(lambda levels: best_f1(levels.tp, levels.fp))}


class PixelBestIOU(PixelMetric):
    title, modes = "pixel-level best IOU", ("origin",)
    ways = {"origin": ranked(lambda tp, fp: iou_of(best_f1(tp, fp))),
            "dataset": over_set(lambda levels: best_mean(levels.iou, levels.tampered)),
            "pooled": over_set(lambda levels: iou_of(best_f1(levels.tp, levels.fp)))}


class PixelSoftF1(PixelMetric):
    title, modes = "pixel-level soft F1", ("origin",)
    ways = {"origin": weighted(f1), "photoholmes_v1": weighted(zero(f1)),
            "photoholmes": weighted(zero(f1), pooled=True)}


class PixelSoftIOU(PixelMetric):
    title, modes = "pixel-level soft IOU", ("origin",)
    ways = {"origin": weighted(iou), "photoholmes_v1": weighted(zero(iou)),
            "photoholmes": weighted(zero(iou), pooled=True)}


class PixelSoftMCC(PixelMetric):
    title, modes = "pixel-level soft MCC", ("origin",)
    ways = {"origin": weighted(both_classes(soft_mcc)), "photoholmes_v1": weighted(soft_mcc_v1),
            "photoholmes": weighted(soft_mcc, pooled=True)}


class ImageF1(ImageMetric):
    title, formula = "image-level F1", staticmethod(f1)


class ImageAUC(ImageMetric):
    title, ways = "image-level AUC", {"origin": of_roc(area)}


class ImageAccuracy(ImageMetric):
    title, formula = "image-level Accuracy", staticmethod(accuracy)


class ImagePrecision(ImageMetric):
    title, formula = "image-level Precision", staticmethod(precision)


class ImageRecall(ImageMetric):
    title, formula = "image-level Recall", staticmethod(recall)


class ImageFPR(ImageMetric):
    title, formula = "image-level FPR", staticmethod(fpr)


class ImageBalancedAccuracy(ImageMetric):
    title, formula = "image-level balanced Accuracy", staticmethod(balanced_accuracy)


class ImageMCC(ImageMetric):
    title, formula = "image-level MCC", staticmethod(both_classes(correlation))
    ways = {"forensichub": Way(pooled=correlation), "safire": Way(pooled=absolute(correlation))}


class ImageSenSpeF1(ImageMetric):
    title, formula = "image-level F1 of sensitivity and specificity", staticmethod(sensitivity_specificity)


class ImageAP(ImageMetric):
    title, ways = "image-level AP", {"origin": of_roc(average_precision)}


class ImageEER(ImageMetric):
    title, ways = "image-level EER", {"origin": of_roc(eer)}


class ImageTPRAt1FPR(ImageMetric):
    title, ways = "image-level TPR at 1% FPR", {"origin": of_roc(functools.partial(tpr_at, 0.01))}


class ImageTPRAt5FPR(ImageMetric):
    title, ways = "image-level TPR at 5% FPR", {"origin": of_roc(functools.partial(tpr_at, 0.05))}


class ImageSoftF1(ImageMetric):
    title = "image-level soft F1"
    ways = {"origin": of_soft(zero(f1)), "photoholmes_v1": of_soft_mean(zero(f1))}


class ImageSoftIOU(ImageMetric):
    title = "image-level soft IOU"
    ways = {"origin": of_soft(zero(iou)), "photoholmes_v1": of_soft_mean(zero(iou))}


class ImageSoftMCC(ImageMetric):
    title = "image-level soft MCC"
    ways = {"origin": of_soft(soft_mcc), "photoholmes_v1": of_soft_mean(soft_mcc_v1)}


class CombinedF1(PixelMetric):
    """MVSS-Net's combined F1: harmonic mean of the tampered images' pixel F1 and of ImageSenSpeF1."""

    title, modes, ways, judges_images = "combined F1", ("origin",), {"origin": counted_at(mvssnet_f1)}, True

    def keys(self):
        return ["pred_mask"] if self.rule else ["pred_mask", "pred_label"]

    def has_images(self):
        return False  # the column is that of PixelF1:mvssnet

    def value(self, draw):
        pixel = draw.mean(draw.columns[self.name][0], where=draw.truth)
        image = sensitivity_specificity(*draw.counts(self.threshold)).numpy()
        return 2 * pixel * image / np.maximum(pixel + image, 1e-300)  # 0 where both are


def expand(specs):
    """Return the names of metrics that texts such as "PixelF1", "pixel", "image" and "all" stand for."""
    every = {name: [name if mode == "origin" else f"{name}:{mode}" for mode in dict.fromkeys([*each.modes, *each.ways])]
             for name, each in METRICS.items()}
    groups = {"pixel": [name for name, each in METRICS.items() if not each.judges_images],
              "image": [name for name, each in METRICS.items() if each.judges_images]}
    groups["all"] = [*groups["pixel"], *groups["image"]]
    names = []
    for spec in specs:
        found = [spec] if spec not in groups else sum(map(every.get, groups[spec]), [])
        names += [name for name in found if spec not in groups or name not in names]
    return names


def parse_metrics(specs):
    """Return metric objects from texts such as "PixelF1", "PixelF1:double" and "all"."""
    metrics = []
    for spec in expand(specs):
        name, _, mode = spec.partition(":")
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'.{nearest(name, METRICS)} Metrics: all, pixel, image, "
                            f"{', '.join(METRICS)}.")
        metrics.append(METRICS[name](mode=mode) if mode else METRICS[name]())
    return metrics


def choose(specs, default, image_level, threshold=None, score_from=None):
    """Return the metrics of a script: those that `--metrics` names, else its own list.

    With `image_level` the three image metrics are added. A `threshold` goes to all that have one, and `score_from`, a
    rule of SCORES_FROM, to all that judge images; UserError if none has or does.
    """
    chosen = parse_metrics(specs) if specs else list(default)
    if image_level:
        chosen += [metric for metric in (ImageF1(), ImageAUC(), ImageAccuracy())
                   if metric.name not in [m.name for m in chosen]]
    refuse_repeated(chosen)
    names = ", ".join(metric.name for metric in chosen)
    thresholded, judging = [m for m in chosen if not m.fixed], [m for m in chosen if m.judges_images]
    if threshold is not None and not thresholded:
        raise UserError(f"--threshold {threshold}: none of the metrics has a threshold ({names}); leave it out.")
    if score_from and not judging:
        raise UserError(f"--score_from {score_from}: none of the metrics judges images ({names}); leave it out, or add "
                        "ImageAUC to --metrics.")
    for metric in thresholded if threshold is not None else ():
        metric.set_threshold(threshold)
    for metric in judging if score_from else ():
        metric.set_rule(score_from)
    return chosen


def refuse_repeated(metrics):
    """Raise UserError where two metrics share a name, under which results are kept."""
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the metric '{name}' is on the list twice; keep one.")


def refuse_bad_values(metrics, lowest, highest, bad_truth, names=None, model_name="metric", key=None):
    """Raise UserError for the first image whose prediction is NaN, or no probability where one is needed, or whose
    truth isn't 0/1 (see `Samples.checks`). The values are those of one `key`, the metrics' own if None; without any
    metric, nothing is refused."""
    if any(low > high for low, high in zip(lowest, highest)):  # infinities, of nothing on a GPU
        raise UserError(NO_PIXEL)
    for metric in metrics:
        judged = key or metric.key
        for i, (low, high, bad) in enumerate(zip(lowest, highest, bad_truth)):
            image = f"image {names[i] if names else i}"
            if bad:
                truth = judged.removeprefix("pred_")
                raise UserError(f"{image}: its {truth} holds values other than 0 and 1; correct it.")
            if low != low:
                raise UserError(f"{model_name}: {judged} is NaN for {image}: the training has diverged, or a value "
                                "overflows in mixed precision, which --if_not_amp turns off.")
            if (low < 0 or high > 1) and (judged == "pred_label" or metric.takes_scores):
                raise UserError(f"{model_name}: {judged} reaches from {low:.4g} to {high:.4g} for {image}, but "
                                f"'{metric.name}' needs probabilities in 0..1; return them through a sigmoid.")
