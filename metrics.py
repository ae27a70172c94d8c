"""Metrics of detection and localization, and the one evaluation loop that every script uses.

By hand, without a process group:

    PixelF1()(pred_mask, mask)                 # (B, 1, H, W) each -> (B,) float64, NaN where undefined
    PixelAUC()(pred_mask, mask, shape=shape)   # only the top-left (h, w) of each picture counts
    ImageAUC()(scores, labels)                 # one value per picture each -> float

Pixel metrics are computed per picture inside its valid area and averaged over the pictures where they are defined (F1
and IoU need something tampered, AUC both classes); image metrics are computed once over all (score, label). A pixel or
picture is called tampered when its score is above the threshold.
"""

import contextlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist

from registry import UserError, nearest

MODES = ("origin", "reverse", "double")


class Samples:
    """Scores and 0/1 truth of several samples of any size, with the counts and the AUC that metrics share.

    A sample is one picture's valid pixels, or a whole set's picture scores. All results hold one value per sample, (B,)
    float64, and stay on the scores' device, so that a batch on the GPU is read once and not once per picture.
    """

    def __init__(self, scores, truth):
        if not all(score.numel() for score in scores):
            raise UserError("a picture has no valid pixel; give a shape or shape_mask that keeps at least one.")
        self.scores = [score if score.dtype == torch.float64 else score.float() for score in scores]
        self.given_truth, self.truth = truth, [given > 0.5 for given in truth]
        self._counts, self._auc = {}, None

    def counts(self, threshold):
        """TP, FP, FN and TN; thresholded once however many metrics ask."""
        if threshold not in self._counts:
            counts = []
            for score, truth in zip(self.scores, self.truth):
                positive = score > threshold
                tp = torch.count_nonzero(positive & truth)
                fp = torch.count_nonzero(positive) - tp
                fn = torch.count_nonzero(truth) - tp
                counts.append(torch.stack([tp, fp, fn, truth.numel() - tp - fp - fn]))
            self._counts[threshold] = torch.stack(counts, dim=1).double().unbind()
        return self._counts[threshold]

    def auc(self):
        """Area under the ROC curve."""
        if self._auc is None:
            self._auc = torch.stack([exact_auc(score, truth) for score, truth in zip(self.scores, self.truth)])
        return self._auc

    def checks(self):
        """Lowest score, highest score (both NaN when any is), and 1 where the truth holds more than 0 and 1."""
        lowest, highest = zip(*(torch.aminmax(score) for score in self.scores))
        bad_truth = [(truth != given).any() for truth, given in zip(self.truth, self.given_truth)]
        return [torch.stack(values).double() for values in (lowest, highest, bad_truth)]


def exact_auc(score, truth):
    """Area under the ROC curve: the share of (tampered, authentic) pairs in the right order, ties counting one half.

    Takes non-negative float32 or float64 scores and a bool truth of the same shape; returns a 0-dimensional float64
    tensor, NaN when there is one class only.
    """
    # The bits of non-negative floats sort like the floats, and integers sort many times faster than an argsort. The
    # truth rides in the lowest bit: authentic comes before tampered among equal scores. Adding 0 turns -0 into 0.
    bits = torch.int64 if score.dtype == torch.float64 else torch.int32
    keys = torch.sort((score.flatten() + 0.0).view(bits).mul_(2).add_(truth.flatten())).values
    tampered = keys & 1
    place = torch.arange(keys.numel(), dtype=bits, device=keys.device)

    def first_place(values):
        starts = torch.zeros_like(place)
        starts[1:] = torch.where(values[1:] != values[:-1], place[1:], 0)
        return starts.cummax(dim=0).values

    # A pixel's place, less the tampered before it, is the number of authentic before it, those of equal score included.
    num_tampered = tampered.sum()
    twice_before = 2 * (tampered * place).sum() - num_tampered * (num_tampered - 1)
    tied = (tampered * (first_place(keys) - first_place(keys >> 1))).sum()
    pairs = num_tampered * (keys.numel() - num_tampered)
    return (twice_before - tied).double() / (2 * pairs).double()


def f1(tp, fp, fn, tn):
    """2 TP / (2 TP + FP + FN); NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), torch.nan)


def iou(tp, fp, fn, tn):
    """Intersection over union of the tampered areas; NaN when nothing is tampered."""
    return torch.where(tp + fn > 0, tp / (tp + fp + fn), torch.nan)


def accuracy(tp, fp, fn, tn):
    """Share of right decisions."""
    return (tp + tn) / (tp + fp + fn + tn)


class Metric:
    """What pixel and image metrics share. `key` is the model output that they judge, `formula` a function of the four
    counts; a metric without one is the AUC, which needs scores in 0..1."""

    formula = None

    def __init__(self, threshold=0.5, mode="origin"):
        if mode not in MODES:
            raise UserError(f"unknown metric mode '{mode}'.{nearest(mode, MODES)} Modes: {', '.join(MODES)}.")
        self.threshold, self.mode = threshold, mode
        notes = [f"threshold {threshold}"] * (threshold != 0.5) + [mode] * (mode != "origin")
        self.name = self.title + (f" ({', '.join(notes)})" if notes else "")

    def compute(self, samples):
        """One value per sample, (B,) float64; NaN where undefined."""
        if self.formula:
            tp, fp, fn, tn = samples.counts(self.threshold)
            origin, reverse = self.formula(tp, fp, fn, tn), self.formula(fn, tn, tp, fp)
        else:
            origin, reverse = samples.auc(), 1 - samples.auc()
        return {"origin": origin, "reverse": reverse, "double": torch.maximum(origin, reverse)}[self.mode]


class PixelMetric(Metric):
    """A metric of the pixels of each picture.

    Args:
        threshold: a pixel is called tampered above this
        mode: "origin"; "reverse" judges the inverted prediction; "double" takes the better of both for each picture
    """

    key = "pred_mask"

    def __call__(self, pred, mask, shape_mask=None, shape=None):
        """The metric of each picture: (B,) float64, NaN where undefined.

        Args:
            pred: (B, 1, H, W) probabilities; all but the AUC take logits too, and compare them as they are
            mask: (B, 1, H, W), 1 = tampered, 0 = authentic
            shape_mask: (B, 1, H, W), 1 = valid, 0 = not counted
            shape: (B, 2) valid (h, w) from the top left; cheaper than `shape_mask`
        """
        pixels = valid_pixels(pred, mask, shape, shape_mask)
        refuse_bad_values([self], *torch.stack(pixels.checks()).tolist())
        return self.compute(pixels)


class ImageMetric(Metric):
    """A metric of one score per picture over a whole set.

    Args:
        threshold: a picture is called tampered above this
    """

    key = "pred_label"

    def __init__(self, threshold=0.5):
        super().__init__(threshold)

    def __call__(self, scores, labels):
        """The metric of (N,) probabilities against (N,) labels, 1 = tampered: a float, NaN where undefined."""
        scores, labels = (torch.as_tensor(values, dtype=torch.float64) for values in (scores, labels))
        if scores.shape != labels.shape or scores.dim() != 1 or not len(scores):
            raise UserError(f"'{self.name}' got scores {tuple(scores.shape)} and labels {tuple(labels.shape)}; give "
                            "one score and one label per picture.")
        refuse_bad_values([self], scores.tolist(), scores.tolist(), (labels * (labels - 1)).tolist())
        return self.compute(Samples([scores], [labels])).item()


class PixelF1(PixelMetric):
    title, formula = "pixel-level F1", staticmethod(f1)


class PixelIOU(PixelMetric):
    title, formula = "pixel-level IOU", staticmethod(iou)


class PixelAccuracy(PixelMetric):
    title, formula = "pixel-level Accuracy", staticmethod(accuracy)


class PixelAUC(PixelMetric):
    title = "pixel-level AUC"

    def __init__(self, mode="origin"):
        super().__init__(mode=mode)


class ImageF1(ImageMetric):
    title, formula = "image-level F1", staticmethod(f1)


class ImageAUC(ImageMetric):
    title = "image-level AUC"

    def __init__(self):
        super().__init__()


class ImageAccuracy(ImageMetric):
    title, formula = "image-level Accuracy", staticmethod(accuracy)


METRICS = {m.__name__: m for m in (PixelF1, PixelIOU, PixelAccuracy, PixelAUC, ImageF1, ImageAUC, ImageAccuracy)}


def parse_metrics(specs):
    """Metric objects from texts such as "PixelF1" and "PixelF1:double"."""
    metrics = []
    for spec in specs:
        name, _, mode = spec.partition(":")
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'.{nearest(name, METRICS)} Metrics: {', '.join(METRICS)}.")
        if mode and not issubclass(METRICS[name], PixelMetric):
            raise UserError(f"metric '{spec}': image metrics have no modes; write '{name}'.")
        metrics.append(METRICS[name](mode=mode) if mode else METRICS[name]())
    return metrics


def choose(specs, default, image_level):
    """The metrics of a script: those that `--metrics` names, else its own list.

    With `image_level` the three image metrics are added.
    """
    chosen = parse_metrics(specs) if specs else list(default)
    if image_level:
        chosen += [metric for metric in (ImageF1(), ImageAUC(), ImageAccuracy())
                   if metric.name not in [m.name for m in chosen]]
    refuse_repeated(chosen)
    return chosen


def refuse_repeated(metrics):
    """UserError where two metrics share a name, under which results are kept."""
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the metric '{name}' is on the list twice; keep one.")


def run_model(model, data, model_name, metrics=(), training=False):
    """Call `model(**data)` and return its dict; UserError when it fails, is no dict, or lacks a key that is needed.

    Needed are what the metrics name, `pred_mask` of the mask's size, and in training a scalar `backward_loss`.
    """
    try:
        output = model(**data)
    except UserError:
        raise
    except Exception as error:  # whatever a user's model raises
        frames = traceback.extract_tb(error.__traceback__)
        place = ([frame for frame in frames if "models" in Path(frame.filename).parts[:-1]
                  and "site-packages" not in frame.filename] or frames)[-1]
        hint = "is --image_size one that the model takes?"
        if "edge_mask" in str(error):
            hint = "the model needs --edge_mask_width."
        elif isinstance(error, TypeError) and "forward()" in str(error):
            hint = "forward gets image, mask, label and so on by keyword: name what it needs, and end with **kwargs."
        elif "find_unused_parameters" in str(error):
            hint = "some parameters got no gradient: give --find_unused_parameters."
        elif "out of memory" in str(error):
            hint = "lower the batch size or --image_size."
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(f"model {model_name} failed on images of {tuple(data['image'].shape)}: {type(error).__name__}: "
                        f"{first_line} ({Path(place.filename).name} line {place.lineno}); {hint} "
                        "IMDL_TRACEBACK=1 in the environment shows the whole traceback.") from error
    if not isinstance(output, Mapping):
        raise UserError(f"model {model_name}: forward returned {type(output).__name__}; return a dict with "
                        "backward_loss, pred_mask and so on.")
    for metric in metrics:
        if output.get(metric.key) is None:
            raise UserError(f"model {model_name}: forward returned no {metric.key}, which the metric '{metric.name}' "
                            f"needs; return {metric.key} or take the metric off the list.")
    if by_kind(metrics)[1]:
        picture_scores(output, data["label"], model_name, by_kind(metrics)[1])  # refuses at once what evaluation would
    for name, value in (output.get("visual_loss") or {}).items():
        if not (isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)):
            raise UserError(f"model {model_name}: visual_loss {name!r} is no scalar; return one number per name.")
    for name, value in (output.get("visual_image") or {}).items():
        if not (torch.is_tensor(value) and value.dim() == 4 and value.shape[1] in (1, 3)):
            shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise UserError(f"model {model_name}: visual_image {name!r} is {shape}; return (B, 1, H, W) or "
                            "(B, 3, H, W).")
    pred, loss = output.get("pred_mask"), output.get("backward_loss")
    if pred is not None and pred.shape != data["mask"].shape:
        raise UserError(f"model {model_name}: pred_mask is {tuple(pred.shape)} but the mask is "
                        f"{tuple(data['mask'].shape)}; return pred_mask with one value for every pixel of the mask.")
    if training and (not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad):
        what = f"a tensor {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise UserError(f"model {model_name}: training needs backward_loss, a scalar tensor with a gradient; "
                        f"forward returned {what}.")
    return output


def valid_pixels(pred, mask, shape=None, shape_mask=None, model_name="metric"):
    """`Samples` of each picture's pixels inside its `shape` (h, w) and where its `shape_mask` is 1."""
    if pred.shape != mask.shape:
        raise UserError(f"{model_name}: pred_mask is {tuple(pred.shape)} but the mask is {tuple(mask.shape)}; return "
                        "one value for every pixel of the mask.")
    pictures = [pred.unbind(), mask.unbind()] + ([] if shape_mask is None else [shape_mask.unbind()])
    if shape is not None:
        pictures = [[one[..., :h, :w] for one, (h, w) in zip(maps, shape.tolist())] for maps in pictures]
    if shape_mask is not None:
        pictures = [[one[valid > 0.5] for one, valid in zip(maps, pictures[2])] for maps in pictures]
    return Samples(*pictures[:2])


def picture_scores(output, label, model_name, metrics):
    """The model's pred_label as (B,) float64; NaN when it is missing or misshapen and no metric needs it."""
    pred, size = output.get("pred_label"), len(label)
    scores = torch.as_tensor(torch.nan if pred is None else pred, dtype=torch.float64, device=label.device)
    if scores.shape in ((size,), (size, 1)) or scores.dim() == 0 and size == 1:
        return scores.reshape(size)
    if metrics:
        raise UserError(f"{model_name}: pred_label is {tuple(scores.shape)} for {size} pictures; return one value per "
                        f"picture, shape ({size},), or take '{metrics[0].name}' off the list.")
    return torch.full_like(label, torch.nan, dtype=torch.float64)


def refuse_bad_values(metrics, lowest, highest, bad_truth, names=None, model_name="metric"):
    """UserError for the first picture whose prediction is NaN, or no probability where one is needed, or whose truth is
    not 0/1: see `Samples.checks`. The metrics are those of one key; without any, nothing is refused."""
    for metric in metrics:
        for i, (low, high, bad) in enumerate(zip(lowest, highest, bad_truth)):
            picture = f"picture {names[i] if names else i}"
            if bad:
                truth = metric.key.removeprefix("pred_")
                raise UserError(f"{picture}: its {truth} holds values other than 0 and 1; correct it.")
            if low != low:
                raise UserError(f"{model_name}: {metric.key} is NaN for {picture}; the training has probably diverged.")
            if (low < 0 or high > 1) and (metric.key == "pred_label" or not metric.formula):
                raise UserError(f"{model_name}: {metric.key} reaches from {low:.4g} to {high:.4g} for {picture}, but "
                                f"'{metric.name}' needs probabilities in 0..1; return them through a sigmoid.")


@dataclass
class Result:
    """What `evaluate` found, the same on every rank; the arrays are in the order of the dataset."""

    values: dict  # metric's name -> value, NaN when it is undefined for every picture
    counted: dict  # metric's name -> number of pictures that it is over
    left_out: dict  # metric's name -> number of pictures left out because it is undefined for them
    score: np.ndarray  # (N,) pred_label, NaN without one
    label: np.ndarray  # (N,)
    per_picture: dict  # pixel metric's name -> (N,)
    names: Optional[list]

    def rows(self):
        """One dict per picture, for `csv.DictWriter`."""
        for i, (score, label) in enumerate(zip(self.score, self.label)):
            row = {"index": i, "name": self.names[i] if self.names else "", "label": int(label), "score": score}
            yield row | {name: column[i] for name, column in self.per_picture.items()}

    def describe(self):
        """One line: each value and the pictures it is over."""
        return ", ".join(f"{name}: {value:.4f} ({self.counted[name]} pictures, {self.left_out[name]} left out)"
                         for name, value in self.values.items())


def evaluate(model, loader, metrics, to_device, *, amp=False, model_eval=True, expected=None, variants=1, on_batch=None,
             model_name=None, keep_names=False):
    """Run the bare model over this rank's share of the pictures, and judge all ranks' pictures together.

    The ranks meet once, after the loop, so their numbers of batches may differ. Values are averaged in the order of the
    dataset, so neither batch size nor number of processes changes them. A UserError on one rank is raised on all.

    Args:
        model: the bare module, not its DDP wrapper; left as it was found
        loader: yields batches on the CPU, each with "index" (B,), the places of its pictures in the dataset; with
            several variants (attack strengths), lists of that many batches
        metrics: list of metric objects
        to_device: turns a batch (without "index") into the data dict of `forward`
        amp: mixed precision on CUDA
        model_eval: False leaves the model in the mode it is in (`--no_model_eval`)
        expected: number of pictures in the dataset; None takes any set of different indices
        variants: number of batches that the loader gives for the same pictures
        on_batch: called as on_batch(data, output, variant) after each batch
        model_name: for messages, the class by default
        keep_names: keep the pictures' names for `Result.rows`

    Returns:
        list of `Result`, one per variant
    """
    refuse_repeated(metrics)
    model_name = model_name or type(model).__name__

    def run(batch, variant):
        data = to_device({key: value for key, value in batch.items() if key != "index"})
        with torch.autocast(data["image"].device.type, enabled=amp and data["image"].is_cuda):
            output = run_model(model, data, model_name, metrics)
        table = measure(output, data, batch["shape"], metrics, model_name)
        if on_batch:
            on_batch(data, output, variant)
        return batch["index"].numpy(), table, data["name"] if keep_names else []

    records, error = [[] for _ in range(variants)], None
    # Not inference_mode: what a model caches during forward (position grids) must stay usable in training.
    with torch.no_grad(), left_as_found(model, model_eval):
        try:
            for batches in loader:
                batches = [batches] if isinstance(batches, Mapping) else batches
                for variant, (record, batch) in enumerate(zip(records, batches, strict=True)):
                    record.append(run(batch, variant))
        except UserError as mistake:
            error = mistake
    return [summarize(record, metrics, expected, keep_names) for record in gather(records, error)]


@contextlib.contextmanager
def left_as_found(model, model_eval):
    """Evaluation mode if asked for; afterwards every module's mode and every buffer are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer, buffer.detach().clone()) for module in model.modules()
               for name, buffer in module.named_buffers(recurse=False)]
    try:
        if model_eval:
            model.eval()
        for module in model.modules():
            if isinstance(module, torch.nn.SyncBatchNorm) and module.training:
                # In training mode each forward would wait for all ranks. In evaluation mode without running statistics
                # it normalises by this rank's batch, with no waiting.
                module.training, module.running_mean, module.running_var = False, None, None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            setattr(module, name, buffer)


def by_kind(metrics):
    """The pixel metrics and the image metrics of a list."""
    return [m for m in metrics if isinstance(m, PixelMetric)], [m for m in metrics if isinstance(m, ImageMetric)]


def measure(output, data, shape, metrics, model_name):
    """(B, 2 + pixel metrics) float64 array of one batch: score, label, pixel metrics.

    The device is read once, at the end; `shape` is the batch's on the CPU, since reading the device's stops it.
    """
    pixel_metrics, image_metrics = by_kind(metrics)
    columns = [picture_scores(output, data["label"], model_name, image_metrics), data["label"].double()]
    if pixel_metrics:
        pixels = valid_pixels(output["pred_mask"], data["mask"], shape, model_name=model_name)
        columns += [metric.compute(pixels) for metric in pixel_metrics] + pixels.checks()
    columns = torch.stack(columns).cpu().numpy()
    score, label = columns[:2]
    refuse_bad_values(image_metrics, score, score, label * (label - 1), data["name"], model_name)
    refuse_bad_values(pixel_metrics, *columns[-3:], data["name"], model_name)
    return columns[:2 + len(pixel_metrics)].T


def gather(records, error):
    """All ranks' records, one list per variant. If any rank had a UserError, the first one is raised on all."""
    shares = [(records, error)]
    if dist.is_available() and dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (records, error))
    for _, error in shares:
        if error is not None:
            raise error
    return [sum(lists, []) for lists in zip(*(records for records, _ in shares))]


def summarize(record, metrics, expected, keep_names):
    """The `Result` of one variant's (index, table of `measure`, names) from all batches of all ranks."""
    if not record:
        raise UserError("there is no picture to evaluate; give a test set with at least one.")
    index, table, names = zip(*record)
    index, table, names = np.concatenate(index), np.concatenate(table), [name for part in names for name in part]
    order, total, distinct = np.argsort(index), len(index), len(np.unique(index))
    if distinct < total or expected is not None and index[order].tolist() != list(range(expected)):
        raise RuntimeError(f"evaluated {total} pictures, {distinct} of them different, of a dataset of {expected}; the "
                           "sampler must give every picture once over all ranks.")
    score, label, *columns = table[order].T
    per_picture = {metric.name: column for metric, column in zip(by_kind(metrics)[0], columns)}
    values, counted = {}, {}
    for metric in metrics:
        if metric.name in per_picture:
            defined = per_picture[metric.name][~np.isnan(per_picture[metric.name])]
            value, count = float(defined.mean()) if len(defined) else float("nan"), len(defined)
        else:
            value = metric(score, label)
            count = 0 if np.isnan(value) else total
        values[metric.name], counted[metric.name] = value, count
    left_out = {name: total - count for name, count in counted.items()}
    names = [names[i] for i in order] if keep_names else None
    return Result(values, counted, left_out, score, label, per_picture, names)


def format_table(header, rows):
    """A text table: numbers with 4 decimals, "-" for NaN and None."""
    def text(value):
        if value is None or value != value:
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [list(map(text, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
