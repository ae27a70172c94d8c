"""Metrics of detection and localization: formulas and metric classes. By hand:

    PixelF1()(pred_mask, mask)                 # (B, 1, H, W) each -> (B,) float64, NaN where undefined
    PixelAUC()(pred_mask, mask, shape=shape)   # only the top-left (h, w) of each image counts
    ImageAUC()(scores, labels)                 # one value per image each -> float

Pixel metrics are computed per image inside its valid area and averaged over the images where they are defined (F1
and IoU need something tampered, AUC both classes); image metrics are computed once over all (score, label). A pixel or
image is called tampered when its score is above the threshold.
"""
import numpy as np
import torch

from registry import UserError, nearest

MODES = ("origin", "reverse", "double")
NO_PIXEL = "an image has no valid pixel; give a shape or shape_mask that keeps at least one."


class Samples:
    """Scores and 0/1 truth of several samples of any size, with the counts and the AUC that metrics share.

    A sample is one image's valid pixels, or a whole set's image scores. All results hold one value per sample, (B,)
    float64. NumPy, because on a CPU it counts several times faster than torch.
    """

    def __init__(self, scores, truth):
        if not all(score.numel() for score in scores):
            raise UserError(NO_PIXEL)
        self.scores = [(x if x.dtype == torch.float64 else x.float()).detach().numpy() for x in scores]
        self.given_truth = [given.float().numpy() for given in truth]
        self.truth = [given == 1 for given in self.given_truth]
        self._counts, self._auc = {}, None

    def counts(self, threshold):
        """TP, FP, FN and TN; thresholded once however many metrics ask."""
        if threshold not in self._counts:
            counts = []
            for score, truth in zip(self.scores, self.truth):
                positive = score > threshold
                tp = np.count_nonzero(positive & truth)
                fp = np.count_nonzero(positive) - tp
                fn = np.count_nonzero(truth) - tp
                counts.append((tp, fp, fn, truth.size - tp - fp - fn))
            self._counts[threshold] = torch.tensor(counts, dtype=torch.float64).unbind(dim=1)
        return self._counts[threshold]

    def auc(self):
        """Area under the ROC curve."""
        if self._auc is None:
            self._auc = torch.tensor([exact_auc(torch.from_numpy(score), torch.from_numpy(truth))
                                      for score, truth in zip(self.scores, self.truth)], dtype=torch.float64)
        return self._auc

    def checks(self):
        """Lowest score, highest score (both NaN when any is), and 1 where the truth holds more than 0 and 1."""
        rows = [(score.min(), score.max(), np.count_nonzero(truth) + np.count_nonzero(given == 0) != truth.size)
                for score, truth, given in zip(self.scores, self.truth, self.given_truth)]
        return list(torch.tensor(rows, dtype=torch.float64).unbind(dim=1))


class BatchSamples(Samples):
    """The same for the images of a batch on a GPU: few operations of the whole batch, and nothing waits for them.

    Args:
        pred, mask: (B, 1, H, W)
        valid: (B, 1, H, W) bool
    """

    def __init__(self, pred, mask, valid):
        self.pred = (pred if pred.dtype == torch.float64 else pred.float()).flatten(1)
        self.given_truth, self.valid = mask.flatten(1), valid.flatten(1)
        self.truth = (self.given_truth == 1) & self.valid
        self._counts, self._auc = {}, None

    def counts(self, threshold):
        if threshold not in self._counts:
            positive = (self.pred > threshold) & self.valid
            tp = (positive & self.truth).sum(dim=1)
            fp, fn = positive.sum(dim=1) - tp, self.truth.sum(dim=1) - tp
            tn = self.valid.sum(dim=1) - tp - fp - fn
            self._counts[threshold] = torch.stack([tp, fp, fn, tn]).double().unbind()
        return self._counts[threshold]

    def auc(self):
        if self._auc is None:
            # An invalid pixel is authentic and above all valid ones.
            score = torch.where(self.valid, self.pred, 1.5)
            self._auc = batch_auc(score, self.truth, self.valid.sum(dim=1))
        return self._auc

    def checks(self):
        lowest = torch.where(self.valid, self.pred, torch.inf).amin(dim=1)
        highest = torch.where(self.valid, self.pred, -torch.inf).amax(dim=1)
        bad_truth = (self.valid & (self.given_truth != 0) & (self.given_truth != 1)).any(dim=1)
        return [values.double() for values in (lowest, highest, bad_truth)]


def sorted_keys(score, truth):
    """Return the scores along the last dimension as sorted integers, with the truth in the lowest bit.

    The bits of non-negative floats sort like the floats, and integers sort many times faster than an argsort. Authentic
    comes before tampered among equal scores. Adding 0 turns -0 into 0.
    """
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    return torch.sort((score + 0.0).view(bits).mul_(2).add_(truth)).values


def exact_auc(score, truth):
    """Area under the ROC curve: the share of (tampered, authentic) pairs in the right order, ties counting one half.

    Takes non-negative float32 or float64 scores and a bool truth of the same shape, on the CPU; returns a float, NaN
    where there is one class only.
    """
    keys = sorted_keys(score.flatten(), truth.flatten()).numpy()
    places = np.flatnonzero(keys & 1)  # of the tampered
    pairs = len(places) * (len(keys) - len(places))
    # A pixel's place, less the tampered before it, is the number of authentic before it, those of equal score included.
    before = int(places.sum()) - len(places) * (len(places) - 1) // 2
    # Few scores are of both classes: there a tampered key follows the authentic one, which is less by 1.
    tampered = keys[places]
    first = tampered[keys[places - 1] == tampered - 1]
    from_here, authentic = np.searchsorted(keys, first), np.searchsorted(keys, first - 1)
    tied = int(((np.searchsorted(keys, first, "right") - from_here) * (from_here - authentic)).sum())
    return (2 * before - tied) / (2 * pairs) if pairs else float("nan")


def batch_auc(score, truth, count):
    """`exact_auc` of each row of (B, N) scores in 0..1, as (B,) float64, without waiting for a GPU.

    Only the `count` (B,) lowest scores of a row count; those above must be authentic.
    """
    keys = sorted_keys(score, truth)
    tampered = keys & 1
    place = torch.arange(keys.shape[1], device=keys.device)
    number = tampered.sum(dim=1)
    tied = torch.searchsorted(keys, keys) - torch.searchsorted(keys, keys - 1)  # authentic ones, of a tampered's score
    twice = (tampered * (2 * place - tied)).sum(dim=1) - number * (number - 1)
    return twice.double() / (2 * number * (count - number)).double()


def f1(tp, fp, fn, tn):
    """2 TP / (2 TP + FP + FN); NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), torch.nan)


def iou(tp, fp, fn, tn):
    """Intersection over union of the tampered areas; NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, tp / (tp + fp + fn), torch.nan)


def accuracy(tp, fp, fn, tn):
    """Share of right decisions."""
    return (tp + tn) / (tp + fp + fn + tn)


METRICS = {}  # name of the class -> class, for --metrics


class Metric:
    """What pixel and image metrics share; a subclass of either is known to --metrics as soon as it is defined."""

    key = None  # the model output that it judges
    title = None  # under which it is reported
    formula = None  # static method of the four counts, (B,) each -> (B,)
    takes_scores = False  # True for the AUC, which has no formula and needs scores in 0..1

    def __init_subclass__(cls):
        if Metric not in cls.__bases__:
            METRICS[cls.__name__] = cls

    def __init__(self, threshold=0.5, mode="origin"):
        own_way = self.takes_scores or type(self).compute is not Metric.compute
        missing = "title" if not self.title else "formula" if not (self.formula or own_way) else None
        if missing:
            raise UserError(f"metric {type(self).__name__} has no {missing}: give it a title, under which it is "
                            "reported, and a static method formula(tp, fp, fn, tn) of tensors.")
        if mode not in MODES:
            raise UserError(f"unknown metric mode '{mode}'.{nearest(mode, MODES)} Modes: {', '.join(MODES)}.")
        self.mode = mode
        self.set_threshold(threshold)

    def set_threshold(self, threshold):
        """Call tampered what is above `threshold` from now on; the name tells one that is not 0.5."""
        self.threshold = threshold
        notes = [f"threshold {threshold}"] * (threshold != 0.5) + [self.mode] * (self.mode != "origin")
        self.name = self.title + (f" ({', '.join(notes)})" if notes else "")

    def compute(self, samples):
        """One value per sample, (B,) float64; NaN where undefined."""
        def judge(reverse):
            if self.takes_scores:
                return 1 - samples.auc() if reverse else samples.auc()
            tp, fp, fn, tn = samples.counts(self.threshold)
            return self.formula(fn, tn, tp, fp) if reverse else self.formula(tp, fp, fn, tn)

        if self.mode == "double":
            return torch.maximum(judge(reverse=False), judge(reverse=True))
        return judge(reverse=self.mode == "reverse")


class PixelMetric(Metric):
    """A metric of the pixels of each image.

    Args:
        threshold: a pixel is called tampered above this
        mode: "origin"; "reverse" judges the inverted prediction; "double" takes the better of both for each image
    """

    key = "pred_mask"

    def __call__(self, pred, mask, shape_mask=None, shape=None):
        """The metric of each image: (B,) float64, NaN where undefined.

        Args:
            pred: (B, 1, H, W) probabilities; all but the AUC take logits too, and compare them as they are
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


class ImageMetric(Metric):
    """A metric of one score per image over a whole set.

    Args:
        threshold: an image is called tampered above this
    """

    key = "pred_label"

    def __init__(self, threshold=0.5):
        super().__init__(threshold)

    def __call__(self, scores, labels):
        """The metric of (N,) probabilities against (N,) labels, 1 = tampered: a float, NaN where undefined."""
        scores, labels = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in (scores, labels))
        if scores.shape != labels.shape or scores.dim() != 1 or not len(scores):
            raise UserError(f"'{self.name}' got scores {tuple(scores.shape)} and labels {tuple(labels.shape)}; give "
                            "one score and one label per image.")
        refuse_bad_values([self], scores.tolist(), scores.tolist(), (labels * (labels - 1)).tolist())
        return self.compute(Samples([scores], [labels])).item()


class PixelF1(PixelMetric):
    title, formula = "pixel-level F1", staticmethod(f1)


class PixelIOU(PixelMetric):
    title, formula = "pixel-level IOU", staticmethod(iou)


class PixelAccuracy(PixelMetric):
    title, formula = "pixel-level Accuracy", staticmethod(accuracy)


class PixelAUC(PixelMetric):
    title, takes_scores = "pixel-level AUC", True

    def __init__(self, mode="origin"):
        super().__init__(mode=mode)


class ImageF1(ImageMetric):
    title, formula = "image-level F1", staticmethod(f1)


class ImageAUC(ImageMetric):
    title, takes_scores = "image-level AUC", True

    def __init__(self):
        super().__init__()


class ImageAccuracy(ImageMetric):
    title, formula = "image-level Accuracy", staticmethod(accuracy)


def parse_metrics(specs):
    """Return metric objects from texts such as "PixelF1" and "PixelF1:double"."""
    metrics = []
    for spec in specs:
        name, _, mode = spec.partition(":")
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'.{nearest(name, METRICS)} Metrics: {', '.join(METRICS)}.")
        if mode and not issubclass(METRICS[name], PixelMetric):
            raise UserError(f"metric '{spec}': image metrics have no modes; write '{name}'.")
        metrics.append(METRICS[name](mode=mode) if mode else METRICS[name]())
    return metrics


def choose(specs, default, image_level, threshold=None):
    """Return the metrics of a script: those that `--metrics` names, else its own list.

    With `image_level` the three image metrics are added. A `threshold` goes to all that have one; UserError if none
    has.
    """
    chosen = parse_metrics(specs) if specs else list(default)
    if image_level:
        chosen += [metric for metric in (ImageF1(), ImageAUC(), ImageAccuracy())
                   if metric.name not in [m.name for m in chosen]]
    refuse_repeated(chosen)
    thresholded = [metric for metric in chosen if not metric.takes_scores]
    if threshold is not None and not thresholded:
        raise UserError(f"--threshold {threshold}: none of the metrics has a threshold "
                        f"({', '.join(metric.name for metric in chosen)}); leave it out.")
    for metric in thresholded if threshold is not None else ():
        metric.set_threshold(threshold)
    return chosen


def refuse_repeated(metrics):
    """Raise UserError where two metrics share a name, under which results are kept."""
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the metric '{name}' is on the list twice; keep one.")


def valid_pixels(pred, mask, shape=None, shape_mask=None):
    """Return the `Samples` of each image's pixels inside its `shape` (h, w) and where its `shape_mask` is 1."""
    if pred.device.type != "cpu":
        return BatchSamples(pred, mask, valid_area(mask, shape, shape_mask))
    images = [pred.unbind(), mask.unbind()] + ([] if shape_mask is None else [shape_mask.unbind()])
    if shape is not None:
        images = [[one[..., :h, :w] for one, (h, w) in zip(maps, shape.tolist())] for maps in images]
    if shape_mask is not None:
        images = zip(*(select(*image) for image in zip(*images)))
    return Samples(*images)


def valid_area(mask, shape=None, shape_mask=None):
    """Return (B, 1, H, W) bool: what `valid_pixels` keeps."""
    valid = torch.ones_like(mask, dtype=torch.bool) if shape_mask is None else shape_mask > 0.5
    if shape is not None:
        h, w = shape.to(mask.device)[:, :, None, None, None].unbind(dim=1)
        rows, columns = (torch.arange(size, device=mask.device) for size in mask.shape[2:])
        valid = valid & (rows[:, None] < h) & (columns < w)
    return valid


def select(pred, mask, shape_mask):
    """Return an image's pred and mask (1, H, W) where its `shape_mask` is 1, not copied where that is a rectangle at
    the top left."""
    valid = (shape_mask > 0.5).numpy()
    h, w = np.count_nonzero(valid[0, :, :1]), np.count_nonzero(valid[0, :1])
    if np.count_nonzero(valid) == np.count_nonzero(valid[:, :h, :w]) == h * w:
        return pred[..., :h, :w], mask[..., :h, :w]
    return pred[torch.from_numpy(valid)], mask[torch.from_numpy(valid)]


def refuse_bad_values(metrics, lowest, highest, bad_truth, names=None, model_name="metric"):
    """Raise UserError for the first image whose prediction is NaN, or no probability where one is needed, or whose
    truth isn't 0/1 (see `Samples.checks`). The metrics are those of one key; without any, nothing is refused."""
    if any(low > high for low, high in zip(lowest, highest)):  # infinities, of nothing on a GPU
        raise UserError(NO_PIXEL)
    for metric in metrics:
        for i, (low, high, bad) in enumerate(zip(lowest, highest, bad_truth)):
            image = f"image {names[i] if names else i}"
            if bad:
                truth = metric.key.removeprefix("pred_")
                raise UserError(f"{image}: its {truth} holds values other than 0 and 1; correct it.")
            if low != low:
                raise UserError(f"{model_name}: {metric.key} is NaN for {image}: the training has diverged, or a value "
                                "overflows in mixed precision, which --if_not_amp turns off.")
            if (low < 0 or high > 1) and (metric.key == "pred_label" or metric.takes_scores):
                raise UserError(f"{model_name}: {metric.key} reaches from {low:.4g} to {high:.4g} for {image}, but "
                                f"'{metric.name}' needs probabilities in 0..1; return them through a sigmoid.")
