"""What metrics share: counts, sorted scores and curves, of each image and of a set. metrics.py has the metrics."""
import functools

import cv2
import numpy as np
import torch

from registry import UserError

NO_PIXEL = "an image has no valid pixel; give a shape or shape_mask that keeps at least one."

# ---------------------------------------------------------------------------------------------------------------------
# Images


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

    def each(self, function):
        """Return function(score, truth), a number or several, of every sample: (B,) or (B, n) float64."""
        return torch.tensor([function(*sample) for sample in zip(self.scores, self.truth)], dtype=torch.float64)

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
            self._auc = torch.tensor([area_of(keys) for keys in self.keys], dtype=torch.float64)
        return self._auc

    @functools.cached_property
    def keys(self):
        """The `sorted_keys` of each sample, which all metrics of ranked scores share."""
        return [sorted_keys(torch.from_numpy(score).flatten(), torch.from_numpy(truth).flatten()).numpy()
                for score, truth in zip(self.scores, self.truth)]

    @functools.cached_property
    def rocs(self):
        """The `roc` of each sample."""
        return [roc(keys) for keys in self.keys]

    def ranked(self, function):
        """Return function(tp, fp) of each sample's `roc`, (B,)."""
        return torch.tensor([float(function(*curve)) for curve in self.rocs], dtype=torch.float64)

    @functools.cached_property
    def soft(self):
        """TP, FP, FN and TN where a pixel of score p counts as p tampered and 1 - p authentic ones."""
        def count(score, truth):
            tampered, authentic = score[truth], score[~truth]
            return (tampered.sum(dtype=np.float64), authentic.sum(dtype=np.float64),
                    np.subtract(1, tampered, dtype=np.float64).sum(), np.subtract(1, authentic, dtype=np.float64).sum())
        return self.each(count).unbind(dim=1)

    @functools.cached_property
    def inside(self):
        """The same samples without the border of their masks, as in TruFor (CVPR 2023).

        Tampered is what erosion by 15 x 15 leaves of the mask, authentic what dilation by 11 x 11 leaves of the rest;
        the pixels between don't count. UserError where a sample isn't the whole of a rectangle.
        """
        def keep(score, truth):
            if score.ndim == 1:
                raise UserError("a metric without the mask's border needs whole images: give shape instead of a "
                                "shape_mask that is no rectangle at the top left.")
            mask = truth.reshape(truth.shape[-2:]).astype(np.uint8)
            tampered = cv2.erode(mask, np.ones((15, 15), np.uint8)) == 1
            kept = (tampered | (cv2.dilate(mask, np.ones((11, 11), np.uint8)) == 0)).reshape(truth.shape)
            return score[kept], truth[kept]
        within = Samples.__new__(Samples)  # an image may keep no pixel
        within.scores, within.truth = zip(*map(keep, self.scores, self.truth))
        within._counts, within._auc = {}, None
        return within

    def checks(self):
        """Lowest score, highest score (both NaN when any is), and 1 where the truth holds more than 0 and 1."""
        rows = [(score.min(), score.max(), np.count_nonzero(truth) + np.count_nonzero(given == 0) != truth.size)
                for score, truth, given in zip(self.scores, self.truth, self.given_truth)]
        return list(torch.tensor(rows, dtype=torch.float64).unbind(dim=1))


class BatchSamples(Samples):
    """The same for the images of a batch on a GPU: few operations of the whole batch, and nothing waits for them.

    What needs more than counts and the AUC is computed on the CPU, where the maps are copied then.

    Args:
        pred, mask: (B, 1, H, W)
        valid: (B, 1, H, W) bool
    """

    def __init__(self, pred, mask, valid):
        self.maps = pred, mask, valid
        self.pred = (pred if pred.dtype == torch.float64 else pred.float()).flatten(1)
        self.mask, self.valid = mask.flatten(1), valid.flatten(1)
        self.tampered = (self.mask == 1) & self.valid
        self._counts, self._auc = {}, None

    @functools.cached_property
    def on_cpu(self):
        """The `Samples` of the same images."""
        pred, mask, valid = (maps.detach().cpu() for maps in self.maps)
        return valid_pixels(pred, mask, shape_mask=valid)

    scores = property(lambda self: self.on_cpu.scores)
    truth = property(lambda self: self.on_cpu.truth)

    def counts(self, threshold):
        if threshold not in self._counts:
            positive = (self.pred > threshold) & self.valid
            tp = (positive & self.tampered).sum(dim=1)
            fp, fn = positive.sum(dim=1) - tp, self.tampered.sum(dim=1) - tp
            tn = self.valid.sum(dim=1) - tp - fp - fn
            self._counts[threshold] = torch.stack([tp, fp, fn, tn]).double().unbind()
        return self._counts[threshold]

    def auc(self):
        if self._auc is None:
            # An invalid pixel is authentic and above all valid ones.
            score = torch.where(self.valid, self.pred, 1.5)
            self._auc = batch_auc(score, self.tampered, self.valid.sum(dim=1))
        return self._auc

    def checks(self):
        lowest = torch.where(self.valid, self.pred, torch.inf).amin(dim=1)
        highest = torch.where(self.valid, self.pred, -torch.inf).amax(dim=1)
        bad_truth = (self.valid & (self.mask != 0) & (self.mask != 1)).any(dim=1)
        return [values.double() for values in (lowest, highest, bad_truth)]


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


def sorted_keys(score, truth):
    """Return the scores along the last dimension as sorted integers, with the truth in the lowest bit.

    The bits of non-negative floats sort like the floats, and integers sort many times faster than an argsort. Authentic
    comes before tampered among equal scores. Adding 0 turns -0 into 0.
    """
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    return torch.sort((score + 0.0).view(bits).mul_(2).add_(truth)).values


def area_of(keys):
    """Area under the ROC curve: the share of (tampered, authentic) pairs in the right order, ties counting one half.

    Takes the `sorted_keys` of one sample, an array; returns a float, NaN where there is one class only.
    """
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
    """`area_of` each row of (B, N) scores in 0..1, as (B,) float64, without waiting for a GPU.

    Only the `count` (B,) lowest scores of a row count; those above must be authentic.
    """
    keys = sorted_keys(score, truth)
    tampered = keys & 1
    place = torch.arange(keys.shape[1], device=keys.device)
    number = tampered.sum(dim=1)
    tied = torch.searchsorted(keys, keys) - torch.searchsorted(keys, keys - 1)  # authentic ones, of a tampered's score
    twice = (tampered * (2 * place - tied)).sum(dim=1) - number * (number - 1)
    return twice.double() / (2 * number * (count - number)).double()


# ---------------------------------------------------------------------------------------------------------------------
# ROC curves, as counts of the tampered and the authentic above each threshold


def roc(keys):
    """Return (tp, fp): the tampered and the authentic above nothing, and from each distinct score on, highest first.

    Takes `sorted_keys` of one sample, an array; returns two float64 arrays.
    """
    descending = keys[::-1]
    last = np.flatnonzero(np.diff(descending >> 1, append=-1))  # of each group of equal scores
    tp = np.concatenate([[0], np.cumsum(descending & 1, dtype=np.int64)[last]]).astype(np.float64)
    return tp, np.concatenate([[0], last + 1]) - tp


def known(count):
    """Return a count with NaN in place of 0, so that what is divided by it is undefined."""
    return np.where(count > 0, count, np.nan)


def area(tp, fp):
    """Area under a ROC curve of counts (..., thresholds), by trapezoids; NaN where there is one class only."""
    twice = (np.diff(fp) * (tp[..., 1:] + tp[..., :-1])).sum(axis=-1)
    return twice / known(2 * tp[..., -1] * fp[..., -1])


def average_precision(tp, fp):
    """Average precision: the sum over thresholds of precision times the rise of recall; NaN without tampered."""
    precision = tp[..., 1:] / np.maximum((tp + fp)[..., 1:], 1)  # counts: below 1 only where nothing is drawn
    return (precision * np.diff(tp)).sum(axis=-1) / known(tp[..., -1])


def f1_curve(tp, fp):
    """F1 at every threshold; NaN without tampered."""
    return 2 * tp / (tp + fp + known(tp[..., -1:]))


def best_f1(tp, fp):
    """F1 at the best of all thresholds; NaN without tampered."""
    return f1_curve(tp, fp).max(axis=-1)


def iou_of(f1_value):
    """The intersection over union that belongs to an F1; both rise together."""
    return f1_value / (2 - f1_value)


def best_mean(sums, count):
    """The highest mean over thresholds, from `Levels`' sums (R, thresholds) over `count` (R,) images; NaN of none."""
    return sums.max(axis=-1) / FIXED_POINT / known(count)


def best_either_f1(tp, fp):
    """TruFor's best F1: thresholds that leave something authentic, the better of map and inverted map."""
    positives, negatives, tp, fp = tp[..., -1], fp[..., -1], tp[..., :-1], fp[..., :-1]
    if not positives + negatives:
        return np.nan
    if not positives:
        return 0.0
    fn, tn = positives - tp, negatives - fp
    return max((2 * tp / (tp + fp + positives)).max(), (2 * fn / (fn + tn + positives)).max())


def equal_error(tp, fp):
    """Return (place, rate) of the threshold where FPR and FNR are closest, the first of several; NaN with one class."""
    positives, negatives = tp[..., -1:], fp[..., -1:]
    place = np.abs(fp * positives - (positives - tp) * negatives).argmin(axis=-1)  # whole numbers: ties are exact
    rates = (1 - tp / known(positives) + fp / known(negatives)) / 2
    return place, np.take_along_axis(rates, place[..., None], axis=-1)[..., 0]


def eer(tp, fp):
    """Equal error rate: the mean of FPR and FNR at the threshold where they are closest, without interpolation."""
    return equal_error(tp, fp)[1]


def f1_at_eer(tp, fp):
    """F1 at the threshold of the equal error rate; NaN with one class."""
    place, rate = equal_error(tp, fp)
    return rate if np.isnan(rate) else f1_curve(tp, fp)[place]


def tpr_at(limit, tp, fp):
    """The largest TPR of a threshold whose FPR is at most `limit`; NaN with one class."""
    reached = np.where(fp <= limit * known(fp[..., -1:]), tp, 0).max(axis=-1)
    return np.where(fp[..., -1] > 0, reached, np.nan) / known(tp[..., -1])


# ---------------------------------------------------------------------------------------------------------------------
# Sets


class Rows:
    """Rows of an array, added piece by piece. They move into twice the memory where it is full: small pieces that stay
    from every batch would keep the memory of its large ones from being used again."""

    def __init__(self, rows=()):
        self.memory, self.count = np.array(rows), len(rows)

    def add(self, rows):
        """Append (n, ...) rows."""
        if self.count + len(rows) > len(self.memory):
            former, self.memory = self.all(), np.empty((2 * (self.count + len(rows)), *rows.shape[1:]), rows.dtype)
            self.memory[:self.count] = former.reshape(-1, *rows.shape[1:])
        self.memory[self.count:self.count + len(rows)] = rows
        self.count += len(rows)

    def all(self):
        """Return all rows, an array."""
        return self.memory[:self.count]


def score_levels():
    """Return float32 scores in rising order that part those from 0 to 1: steps of 1/1024 of the distance to the
    nearer end, down to 2^-40 at 0 and 2^-24 at 1. Each value of an 8-bit map lies between two of its own."""
    steps = np.concatenate([2.0**exponent * (1 + np.arange(1024) / 1024) for exponent in range(-40, -1)])
    return np.unique(np.concatenate([[0], steps, [0.5], 1 - steps[steps >= 2.0**-24], [1]]).astype(np.float32))


LEVELS = score_levels()
BYTE_LEVELS = np.maximum((np.arange(256) - 0.5) / 255, 0).astype(np.float32)  # one per value of an 8-bit map
FIXED_POINT = 2.0**30  # whole numbers add up to the same in any order, up to 2^53


class Levels:
    """A set's tampered and authentic pixels at or above each of LEVELS, and the sum of its images' F1 and IoU there.

    What a threshold for the whole set, or a curve over all its pixels, follows from, in memory that grows neither with
    pixels nor, but for 2 KB each, with images. Exact for 8-bit maps; for others, scores between two levels tie.

    Attributes:
        tp, fp: (R, levels + 1) float64 counts, above all and from the highest level down; R is 1, or the resamples
        f1, iou: (R, levels + 1) sums of FIXED_POINT times the values of images that hold something tampered
        tampered: (R,) their number
        images: `Rows` (2, 256) uint32 of each image, its tampered and authentic pixels of each 8-bit value
    """

    def __init__(self, samples_keys=()):
        self.tp, self.fp, self.f1, self.iou = np.zeros((4, 1, len(LEVELS) + 1))
        self.tampered, self.images = np.zeros(1), Rows()
        self.add(samples_keys)

    def add(self, samples_keys):
        """Count images, of which the `sorted_keys` are given."""
        for keys in samples_keys:
            tampered = np.concatenate([[0], np.cumsum(keys & 1, dtype=np.int64)])
            tp, fp = self.above(LEVELS, keys, tampered)
            self.tp += tp
            self.fp += fp
            if tp[-1]:
                f1_values = f1_curve(tp, fp)
                self.f1 += np.rint(f1_values * FIXED_POINT)
                self.iou += np.rint(iou_of(f1_values) * FIXED_POINT)
                self.tampered += 1
            self.images.add(np.diff(self.above(BYTE_LEVELS, keys, tampered)).astype(np.uint32)[None])

    @staticmethod
    def above(levels, keys, tampered):
        """Return (2, levels + 1) counts: above all, then at or above each level, highest first."""
        levels = levels.astype(np.float64 if keys.dtype == np.int64 else np.float32)
        below = np.append(len(keys), np.searchsorted(keys, levels.view(keys.dtype) << 1)[::-1])
        tp = (tampered[-1] - tampered[below]).astype(np.float64)
        return np.stack([tp, len(keys) - below - tp])

    def merge(self, other):
        """Add what another process counted."""
        for name in ("tp", "fp", "f1", "iou", "tampered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.images.add(other.images.all())


class Draw:
    """Images of a set with a weight each, 1 or how often a resample drew it, for R resamples at a time.

    Args:
        score, label: (N,) arrays
        columns: {metric's name: (K, N) array}, what each pixel metric keeps of an image
        levels: `Levels` of the set, or None
        weights: (R, N) array; None weighs all images 1
    """

    def __init__(self, score, label, columns=None, levels=None, weights=None):
        self.score, self.truth, self.columns, self.whole = score, np.asarray(label) > 0, columns or {}, levels
        self.is_whole, self.weights = weights is None, np.ones((1, len(score))) if weights is None else weights

    def counts(self, threshold):
        """TP, FP, FN and TN of the scores, (R,) tensors."""
        positive = self.score > threshold
        table = np.stack([positive & self.truth, positive & ~self.truth, ~positive & self.truth,
                          ~positive & ~self.truth])
        return torch.from_numpy(self.weights @ table.T.astype(np.float64)).unbind(dim=1)

    @functools.cached_property
    def roc(self):
        """Return (tp, fp) as `roc` does, (R, distinct scores + 1) each."""
        order = np.argsort(-self.score, kind="stable")
        last = np.flatnonzero(np.diff(self.score[order], append=np.nan))
        weights, truth = self.weights[:, order], self.truth[order]
        return tuple(np.pad(np.cumsum(weights * which, axis=1)[:, last], ((0, 0), (1, 0)))
                     for which in (truth, ~truth))

    @functools.cached_property
    def soft(self):
        """`Samples.soft` of the scores, as one image whose pixels they are: (R,) tensors."""
        p, g = self.score, self.truth
        return torch.from_numpy(self.weights @ np.stack([p * g, p * ~g, (1 - p) * g, (1 - p) * ~g]).T).unbind(dim=1)

    @functools.cached_property
    def sums(self):
        """{metric's name: (2, R, K)}: the sums of its columns where they are not NaN, and of how many images."""
        table = np.concatenate([np.zeros((0, len(self.score))), *self.columns.values()])
        sums = np.stack([self.weights @ each.T for each in (np.nan_to_num(table), ~np.isnan(table))])  # at once: fast
        ends = np.cumsum([len(column) for column in self.columns.values()])
        return {name: sums[..., end - len(column):end] for end, (name, column) in zip(ends, self.columns.items())}

    def mean(self, column, where=True):
        """Weighted mean of (N,) values where they are not NaN, (R,); NaN where there is none."""
        defined = ~np.isnan(column) & where
        return self.weights @ np.where(defined, column, 0) / known(self.weights @ defined)

    @functools.cached_property
    def levels(self):
        """The `Levels` of every resample, from its images' 8-bit values, or of the set as a whole."""
        if self.is_whole:
            return self.whole
        drawn, counts = Levels(), self.whole.images.all().reshape(-1, 2, 256).astype(np.float64)
        tp, fp = np.pad(np.cumsum(counts, axis=2), ((0, 0), (0, 0), (1, 0))).transpose(1, 0, 2)
        f1_values = np.nan_to_num(f1_curve(tp, fp))
        drawn.tp, drawn.fp, drawn.tampered = self.weights @ tp, self.weights @ fp, self.weights @ (tp[:, -1] > 0)
        drawn.f1, drawn.iou = (self.weights @ each * FIXED_POINT for each in (f1_values, iou_of(f1_values)))
        return drawn
