"""The one evaluation loop that every script uses, its `Result`, and the check of a model's output."""
import collections
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

import data
import ddp
from counting import Draw, Levels, Rows, Samples, valid_pixels
from log import Progress
from metrics import PixelMetric, refuse_bad_values, refuse_repeated, scores_from
from registry import UserError, counted


def check_output(output, batch, metrics, model_name, training=False):
    """Raise UserError where the form of a model's output isn't that of the interface; see models/mymodel.py.

    Called once per epoch and evaluation. Needed are a dict, what the metrics name, and in training a `backward_loss`;
    what is optional must have its shape where it is there.
    """
    def refuse(text):
        raise UserError(f"model {model_name}: {text}")

    if not isinstance(output, Mapping):
        refuse(f"forward returned {type(output).__name__}; return a dict with backward_loss, pred_mask and so on.")
    for metric in metrics:
        for key in metric.keys():
            if output.get(key) is None:
                has_map = key == "pred_label" and output.get("pred_mask") is not None
                instead = ", give --score_from max" if has_map else ""
                refuse(f"forward returned no {key}, which the metric '{metric.name}' needs; return {key}{instead} or "
                       "take the metric off the list.")
    mask, pred, loss, count = batch["mask"], output.get("pred_mask"), output.get("backward_loss"), len(batch["label"])
    if pred is not None and (not torch.is_tensor(pred) or pred.shape != mask.shape):
        shape = tuple(pred.shape) if torch.is_tensor(pred) else type(pred).__name__
        refuse(f"pred_mask is {shape} but the mask is {tuple(mask.shape)}; return pred_mask with one value "
               "for every pixel of the mask.")
    for metric in [metric for metric in metrics if "pred_label" in metric.keys()][:1]:
        if label_scores(output, batch["label"]) is None:
            shape = tuple(torch.as_tensor(output["pred_label"]).shape)
            refuse(f"pred_label is {shape} for {counted(count, 'image')}; return one value per image, "
                   f"shape ({count},), or take '{metric.name}' off the list.")
    for name, value in (output.get("visual_loss") or {}).items():
        if not (isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)):
            refuse(f"visual_loss {name!r} is no scalar; return one number per name.")
    for name, value in (output.get("visual_image") or {}).items():
        if not (torch.is_tensor(value) and value.dim() == 4 and value.shape[1] in (1, 3)):
            shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            refuse(f"visual_image {name!r} is {shape}; return (B, 1, H, W) or (B, 3, H, W).")
    if training and (not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad):
        what = f"a tensor {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        refuse(f"training needs backward_loss, a scalar tensor with a gradient; forward returned {what}.")


def label_scores(output, label):
    """Return pred_label as (B,) float64 on the device of `label` (B,); None where it isn't one value per image."""
    scores, count = output.get("pred_label"), len(label)
    if scores is None:
        return None
    scores = torch.as_tensor(scores, dtype=torch.float64, device=label.device).detach()
    fits = scores.shape in ((count,), (count, 1)) or scores.dim() == 0 and count == 1
    return scores.reshape(count) if fits else None


@dataclass
class Result:
    """What `evaluate` found, the same on every rank; the arrays are in the order of the dataset."""

    values: dict  # metric's name -> value, NaN when it is undefined for every image
    counted: dict  # metric's name -> number of images that it is over
    left_out: dict  # metric's name -> number of images left out because it is undefined for them
    score: np.ndarray  # (N,) pred_label, NaN without one
    label: np.ndarray  # (N,)
    per_image: dict  # name of a metric that each image has -> (N,)
    names: Optional[list]
    columns: dict  # pixel metric's name -> (K, N), what is kept of each image
    levels: Optional[Levels]  # of the set, where a metric needs them

    def draw(self, weights=None):
        """Return the images with weights (R, N), or 1 each, for `Metric.value`."""
        return Draw(self.score, self.label, self.columns, self.levels, weights)

    def rows(self):
        """Yield one dict per image, for a CSV."""
        for i, (score, label) in enumerate(zip(self.score, self.label)):
            row = {"index": i, "name": self.names[i] if self.names else "", "label": int(label), "score": score}
            yield row | {name: column[i] for name, column in self.per_image.items()}

    def describe(self):
        """Return one line: each value and the images it is over; of more than eight metrics, the first eight."""
        parts = [f"{name}: {value:.4f} ({counted(self.counted[name], 'image')}, {self.left_out[name]} left out)"
                 for name, value in self.values.items()]
        return ", ".join(parts[:8] + [f"and {len(parts) - 8} more"] * (len(parts) > 8))


def evaluation_options(args, device):
    """Return the keyword arguments that a script calls `evaluate` with, from its flags."""
    return dict(device=device, batch_size=args.test_batch_size, num_workers=args.num_workers, pin_memory=args.pin_mem,
                autocast=ddp.mixed_precision(args, device)[0], model_eval=not args.no_model_eval,
                progress=not args.no_progress, model_name=args.model, eval_size=args.eval_size)


def evaluate(model, dataset, metrics, *, device=torch.device("cpu"), batch_size=1, num_workers=0, pin_memory=False,
             autocast=contextlib.nullcontext, model_eval=True, progress=False, model_name=None, label="testing",
             on_batch=None, keep_names=False, eval_size="network"):
    """Run the bare model over this rank's share of a dataset, and judge all ranks' images together.

    The ranks meet once, after the loop, so their numbers of batches may differ. Values are averaged in the order of the
    dataset, so neither batch size nor number of processes changes them. A UserError on one rank ends all.

    Args:
        model: the bare module, not its DDP wrapper; left as it was found
        dataset: an ImageDataset, with or without attacks
        metrics: list of metric objects
        device: torch.device of the model
        batch_size, num_workers, pin_memory: of the loader
        autocast: makes the context of a forward, mixed precision for example
        model_eval: False leaves the model in the mode it is in (`--no_model_eval`)
        progress: show how far it is, under `label`
        model_name: for messages, the class by default
        on_batch: called as on_batch(batch, output) after each batch
        keep_names: keep the images' names for `Result.rows`
        eval_size: "network" judges at the size of the model's input, "original" at each image's own

    Returns:
        list of `Result`, one per attack strength of the dataset, or one where it has no attacks
    """
    refuse_repeated(metrics)
    model_name = model_name or type(model).__name__
    dataset.keep_masks = eval_size == "original"
    loader = data.eval_loader(dataset, batch_size, num_workers, pin_memory, ddp.rank(), ddp.world_size())
    records, checked = [Record(metrics) for _ in dataset.attacks or [None]], False  # one per attack strength
    unread = collections.deque()  # read after the next forward is queued, so that a GPU doesn't wait for its results

    def read_one():
        record, index, names, table, ready = unread.popleft()
        record.add(index, read_table(table, ready, metrics, names, model_name), names if keep_names else [])

    # Not inference_mode: what a model caches during forward (position grids) must stay usable in training.
    with (torch.no_grad(), eval_mode(model, model_eval), ddp.fail_together(),
          Progress(label, len(dataset), progress) as bar):
        for versions in loader:
            versions = versions if dataset.attacks else [versions]
            for record, loaded in zip(records, versions, strict=True):
                batch = data.to_device(loaded, device)
                with autocast():
                    output = model(**batch)
                if not checked:
                    check_output(output, batch, metrics, model_name)
                    checked = True
                unread.append((record, loaded["index"].numpy(), batch["name"],
                               *score_batch(output, batch, metrics, model_name, record.levels,
                                            loaded.get("whole_mask"))))
                if len(unread) > 1:
                    read_one()
                if on_batch:
                    on_batch(batch, output)
            bar.update(len(batch["name"]) * ddp.world_size())
        while unread:
            read_one()
    return [summarize(parts, metrics, len(dataset), keep_names) for parts in zip(*ddp.gather(records))]


class Record:
    """What a rank has found of its images: their index and table of `read_table`, their names, and their `Levels`, None
    where no metric needs them."""

    def __init__(self, metrics):
        self.table, self.names, self.levels = Rows(), [], Levels() if needs_levels(metrics) else None

    def add(self, index, table, names):
        """Add the images of a batch."""
        self.table.add(np.column_stack([index, table]))
        self.names += names


@contextlib.contextmanager
def eval_mode(model, model_eval):
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


def pixel_metrics(metrics):
    """Return those of a list that judge pixels."""
    return [metric for metric in metrics if isinstance(metric, PixelMetric)]


def image_metrics(metrics):
    """Return those of a list that judge whole images, by a score of each."""
    return [metric for metric in metrics if metric.judges_images]


def needs_levels(metrics):
    """Tell whether a metric needs the `Levels` of a set."""
    return any(metric.way and metric.way.needs_levels for metric in metrics)


def score_batch(output, batch, metrics, model_name, levels=None, whole_masks=None):
    """Return (table, ready) of one batch for `read_table`: on the way to the CPU, nothing waits for it.

    With `whole_masks`, [(H, W) uint8 of each image's own size], the maps are brought to that size before. The batch's
    pixels are added to the `levels`.
    """
    score, label = label_scores(output, batch["label"]), batch["label"].double()
    pixels = None
    if any("pred_mask" in metric.keys() for metric in metrics):
        if output["pred_mask"].shape != batch["mask"].shape:
            check_output(output, batch, metrics, model_name)  # which refuses it: the form has changed since the start
        if whole_masks is None:
            pixels = valid_pixels(output["pred_mask"], batch["mask"], batch["shape"])
        else:
            maps = zip(output["pred_mask"].detach().float().cpu().numpy(), batch["shape"].tolist(), whole_masks)
            maps = [data.restore_size(one[0], shape, mask.shape, "shape_mask" in batch) for one, shape, mask in maps]
            pixels = Samples(*([torch.from_numpy(each) for each in several] for several in (maps, whole_masks)))
    return tabulate(score, label, pixels, metrics, levels)


def tabulate(score, label, pixels, metrics, levels=None):
    """Return (table, ready) for `read_table` of images' scores (B,) or None, labels (B,) and `Samples` or None."""
    rules = {metric.rule for metric in metrics if metric.rule}  # one at most, see metrics.choose
    if rules:
        score = scores_from(rules.pop(), pixels).to(label.device)
    columns = [torch.full_like(label, torch.nan) if score is None else score, label]
    columns += [column.to(label.device) for metric in pixel_metrics(metrics) for column in metric.columns(pixels)]
    columns += pixels.checks() if pixels else []
    if levels is not None:
        levels.add(pixels.keys)
    table = torch.stack([column.to(label.device) for column in columns])
    if not table.is_cuda:
        return table, None
    table, ready = table.to("cpu", non_blocking=True), torch.cuda.Event()
    ready.record()
    return table, ready


def read_table(table, ready, metrics, names, model_name):
    """Return a (B, 2 + columns) float64 array: score, label, pixel metrics' columns. UserError for bad values."""
    if ready:
        ready.synchronize()
    columns = table.numpy()
    score, label = columns[:2]
    for metric in image_metrics(metrics):
        refuse_bad_values([metric], score, score, label * (label - 1), names, model_name, metric.keys()[-1])
    if not any("pred_mask" in metric.keys() for metric in metrics):
        return columns.T
    refuse_bad_values(pixel_metrics(metrics), *columns[-3:], names, model_name)
    return columns[:-3].T


def summarize(records, metrics, expected, keep_names):
    """Return the `Result` of all ranks' `Record`s of `expected` images."""
    records = [record for record in records if record.table.count]  # a rank may have no image
    index, *columns = np.concatenate([record.table.all() for record in records]).T
    order = np.argsort(index)
    if index[order].tolist() != list(range(expected)):
        raise RuntimeError(f"evaluated {len(index)} images, {len(np.unique(index))} of them different, of a dataset of "
                           f"{expected}: the sampler must give every image once over all ranks.")
    score, label, *rows = np.array(columns)[:, order]
    columns, values, counted = {}, {}, {}
    for metric in pixel_metrics(metrics):
        count = metric.count_columns()
        columns[metric.name], rows = np.array(rows[:count]).reshape(count, expected), rows[count:]
    per_image = {metric.name: columns[metric.name][0] for metric in pixel_metrics(metrics) if metric.has_images()}
    levels, names = records[0].levels, [name for record in records for name in record.names]
    for record in records[1:] if levels else ():
        levels.merge(record.levels)
    if levels:
        levels.images = Rows(levels.images.all()[order])
    names = [names[i] for i in order] if keep_names else None
    result = Result(values, counted, {}, score, label, per_image, names, columns, levels)
    for metric in metrics:
        value = float(metric.value(result.draw())[0])
        defined = int((~np.isnan(per_image[metric.name])).sum()) if metric.name in per_image else expected
        values[metric.name], counted[metric.name] = value, 0 if np.isnan(value) else defined
        result.left_out[metric.name] = expected - counted[metric.name]
    return result
