"""Check that a model keeps the interface, before the first training: one line per check, with the cure.

    python tools/check_model.py --model MyModel                          # at 256 pixels, and at 128
    python tools/check_model.py --model MyModel --kernel_size 5 --image_size 512 --if_padding
    IMDL_TRACEBACK=1 python tools/check_model.py --model MyModel         # tracebacks of the model's exceptions too

OK: as it should be. note: allowed, but good to know. NOT OK: what was seen and what to do; the exit code is then 1. The
images are made here and weights are random: pretrained ones are fetched only where the command line asks for them.
"""
import inspect
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import data
import ddp
from checkpoint import load_weights, save_checkpoint
from evaluate import check_output, label_scores
from registry import (ROOT, Parser, UserError, build_model, counted, exit_on_user_error, hint_for, parse_args, positive,
                      post_function, relative, without_starting_weights)
from tools.list_models import example_samples

THREE, ONE, AUTHENTIC, BLACK = (0, 1, 2), (0,), (2, 3), (4, 0)  # indices of samples, see example_samples
NOT_FINITE = "is not finite: look for a division by 0, and for the root or logarithm of 0 (a gradient's cause too)."
TOLERANCE = 1e-4  # between probabilities that should be equal: float noise of other batch sizes


class Wrong(Exception):
    """What a check found wrong: what was seen, and the cure."""


class Note(Exception):
    """What a check found that is allowed."""


# ---------------------------------------------------------------------------------------------------------------------
# Running the model


def place(frames):
    """Return file:line of the innermost of a traceback's frames that lies in models/, or else of the innermost."""
    frames = list(frames)
    own = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT / "models")]
    return f"{relative((own or frames)[-1].filename)}:{(own or frames)[-1].lineno}"


def describe(error):
    """Return an exception in one line: type, text, the model's file and line, and a hint where one is known."""
    if isinstance(error, (Wrong, UserError)):
        return " ".join(str(error).split("\n"))
    text = str(error).strip().split("\n")[0]
    where, hint = place(traceback.extract_tb(error.__traceback__)), hint_for(error)
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({where})" + (f"; {hint}" if hint else ".")


class Watch(TorchFunctionMode):
    """Notes {file:line: what} of calls that make the host wait for the GPU, and of losses that autocast refuses."""

    ALWAYS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__format__",
              "__repr__", "__contains__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
              "equal", "allclose"}

    def __init__(self, device):
        super().__init__()
        self.device, self.waits, self.refused = device, {}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if self.waits_for_device(name, args, kwargs):
            self.waits.setdefault(place(traceback.extract_stack()), name)
        if name == "binary_cross_entropy" and torch.is_autocast_enabled(self.device.type):
            self.refused[place(traceback.extract_stack())] = name
        return func(*args, **kwargs)

    def waits_for_device(self, name, args, kwargs):
        """Tell whether a call reads a tensor of the device, or gives one a size that depends on values."""
        if name in ("tensor", "as_tensor"):
            return kwargs.get("device") is not None and not torch.is_tensor(args[0])
        if not any(torch.is_tensor(each) and each.device.type == self.device.type for each in args):
            return False
        if name in ("__getitem__", "__setitem__"):  # a number is written through a mask without waiting
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = any(torch.is_tensor(each) and each.dtype in (torch.bool, torch.uint8) for each in index)
            return masks and (name == "__getitem__" or torch.is_tensor(args[2]))
        return name in self.ALWAYS or name == "to" and "cpu" in args or name == "where" and len(args) == 1


@dataclass
class Pass:
    """What one forward gave, and in training its backward."""

    batch: dict
    output: dict
    differentiable: bool  # whether backward_loss has a gradient
    gradients: dict  # name of a trainable parameter -> largest absolute value, None where it got no gradient
    changed: list  # names of what forward changed in the batch and, in evaluation, in the model
    watch: Watch


def run_model(model, batch, training, device, seed=0, amp=False):
    """Run a model on a batch, with backward in training, and return the `Pass`; Wrong where it returns no dict."""
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    if not training:
        tensors |= dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: value.detach().clone() for name, value in tensors.items()}
    model.train(training)
    ddp.seed_everything(seed)
    with torch.set_grad_enabled(training), torch.autocast(device.type, enabled=amp), Watch(device) as watch:
        output = model(**batch)
    changed = [name for name, value in before.items() if not torch.equal(value, tensors[name])]
    if not isinstance(output, Mapping):
        raise Wrong(f"forward returned {type(output).__name__}: return a dict with backward_loss, pred_mask and so on.")
    loss, gradients = output.get("backward_loss"), {}
    differentiable = training and torch.is_tensor(loss) and loss.requires_grad and loss.numel() == 1
    if differentiable:
        loss.backward()
        gradients = {name: None if p.grad is None else p.grad.abs().max().item()
                     for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    output = {key: value.detach() if torch.is_tensor(value) else value for key, value in output.items()}
    return Pass(batch, output, differentiable, gradients, changed, watch)


class Bench:
    """The model under check; nothing that checks share is computed twice."""

    def __init__(self, args, model_args, device):
        self.args, self.device, self.done = args, device, {}
        self.model_args = without_starting_weights(args.model, model_args)

    def once(self, key, make):
        """Return what make() returned, or raise what it raised, when it was called first under this key."""
        if key not in self.done:
            try:
                self.done[key] = make(), None
            except Exception as error:  # whatever a user's model raises
                self.done[key] = None, error
        value, error = self.done[key]
        if error:
            raise error
        return value

    def build(self, seed=0, **changes):
        """Return a new model with random weights."""
        ddp.seed_everything(seed)
        return build_model(self.args.model, {**self.model_args, **changes}).to(self.device)

    def model(self):
        return self.once("model", self.build)

    def samples(self, size):
        post_func = post_function(self.args.model, self.model_args)
        return self.once(("samples", size), lambda: example_samples(size, post_func, 5, self.args.if_padding))

    def batch(self, images, size=None):
        """Return a new batch of the samples that `images` indexes."""
        samples = self.samples(size or self.args.image_size)
        post_func = post_function(self.args.model, self.model_args)
        return data.to_device(data.collate([samples[i] for i in images], post_func), self.device)

    def run(self, images, training, alter=None, **options):
        """Return the `Pass` of some samples, of a batch that alter(batch) has changed."""
        def make():
            batch = self.batch(images)
            if alter:
                alter(batch)
            return run_model(self.model(), batch, training, self.device, **options)

        return self.once((images, training, alter, *options.items()), make)

    def train(self, images, alter=None, **options):
        return self.run(images, True, alter, **options)

    def evaluate(self, images, alter=None, **options):
        return self.run(images, False, alter, **options)

    def check(self, function):
        """Return what a check returns; one that needs another's success calls it so."""
        return self.once(function, lambda: function(self))


def refuse_nonfinite(done):
    """Raise Wrong where a `Pass` gave a loss, a prediction or a gradient that isn't finite."""
    for key in ("backward_loss", "pred_mask", "pred_label"):
        value = done.output.get(key)
        if torch.is_tensor(value) and not value.isfinite().all():
            raise Wrong(f"{key} {NOT_FINITE}")
    broken = [name for name, value in done.gradients.items() if value is not None and not math.isfinite(value)]
    if broken:
        raise Wrong(f"the gradient of {some(broken)} {NOT_FINITE}")


def refuse_no_probabilities(values):
    """Raise Wrong where a tensor holds other values than 0..1."""
    low, high = (value.item() for value in values.aminmax())
    if not math.isfinite(high - low):
        raise Wrong(f"it {NOT_FINITE}")
    if low < 0 or high > 1:
        raise Wrong(f"values from {low:.3g} to {high:.3g}: put the logits through torch.sigmoid.")


def some(names):
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def refuse_difference(first, second, cure):
    """Raise Wrong where the predictions for the first image of two `Pass`es differ."""
    for key in ("pred_mask", "pred_label"):
        a, b = (torch.as_tensor(done.output[key], device="cpu").float().reshape(len(done.batch["label"]), -1)[0]
                for done in (first, second)) if first.output.get(key) is not None else (torch.zeros(1),) * 2
        difference = (a - b).abs().max().item()
        if not difference <= TOLERANCE:
            raise Wrong(f"{key} differs by {difference:.2g}: {cure}")


# ---------------------------------------------------------------------------------------------------------------------
# The checks: the docstring is what the line says


def builds(bench):
    """builds"""
    sizes = [(p.numel(), p.requires_grad) for p in bench.model().parameters()]
    trainable = sum(n for n, requires_grad in sizes if requires_grad)
    if not trainable:
        raise Wrong("no parameter is trainable: give the model an nn.Parameter or a layer, and leave it unfrozen.")
    return f"{sum(n for n, _ in sizes):,} parameters, {trainable:,} of them trainable"


def batches(bench):
    """images become batches"""
    bench.batch(THREE)


def trains(bench):
    """trains on three images"""
    bench.train(THREE)


def trains_on_one(bench):
    """trains on one image, as the last batch of an epoch may have"""
    bench.train(ONE)


def evaluates(bench):
    """evaluates three images, and one"""
    bench.evaluate(THREE)
    bench.evaluate(ONE)


def loss_form(bench):
    """backward_loss is a finite float32 scalar with a gradient"""
    done = bench.train(THREE)
    loss = done.output.get("backward_loss")
    if not torch.is_tensor(loss) or loss.numel() != 1:
        shape = f"a tensor {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise Wrong(f"it is {shape}: return a scalar tensor, such as the mean.")
    if not done.differentiable:
        raise Wrong("it has no gradient: it was detached, or computed under torch.no_grad or outside of torch.")
    if loss.dtype != torch.float32:
        raise Wrong(f"it is {loss.dtype}: cast what makes it so, such as a target from NumPy, with .float().")
    if not loss.isfinite():
        refuse_nonfinite(done)


def mask_form(bench):
    """pred_mask has one floating-point value per pixel"""
    for done in bench.train(THREE), bench.evaluate(THREE):
        pred, mask = done.output.get("pred_mask"), done.batch["mask"]
        if pred is None:
            raise Note("forward returns none, so the model can be trained but no mask be evaluated or saved.")
        if not torch.is_tensor(pred) or pred.shape != mask.shape:
            shape = tuple(pred.shape) if torch.is_tensor(pred) else f"of type {type(pred).__name__}"
            raise Wrong(f"it is {shape} and the mask is {tuple(mask.shape)}: bring it to that shape with "
                        "F.interpolate or unsqueeze.")
        if not pred.is_floating_point():
            raise Wrong(f"it is {pred.dtype}: return probabilities, not classes.")


def mask_range(bench):
    """pred_mask holds probabilities"""
    bench.check(mask_form)
    for done in bench.train(THREE), bench.evaluate(THREE):
        refuse_no_probabilities(done.output["pred_mask"])


def label_form(bench):
    """pred_label holds one probability per image"""
    for done in bench.train(THREE), bench.evaluate(THREE):
        if done.output.get("pred_label") is None:
            raise Note("forward returns none, so ImageF1, ImageAUC and ImageAccuracy can't be computed.")
        scores = label_scores(done.output, done.batch["label"])
        if scores is None:
            shape = tuple(torch.as_tensor(done.output["pred_label"]).shape)
            raise Wrong(f"it is {shape} for 3 images: return (B,) or (B, 1), a mean or maximum over each image alone.")
        refuse_no_probabilities(scores)


def visual_form(bench):
    """visual_loss and visual_image can be logged"""
    done = bench.train(THREE)
    visual = {key: done.output.get(key) for key in ("visual_loss", "visual_image")}
    check_output(visual, done.batch, (), bench.args.model)


def gradients(bench):
    """gradients reach every trainable parameter"""
    bench.check(loss_form)
    mixed, authentic = bench.train(THREE).gradients, bench.train(AUTHENTIC).gradients
    absent = [name for name in mixed if mixed[name] is None and authentic[name] is None]
    if absent:
        raise Wrong(f"none reaches {some(absent)}: use it in the loss, freeze it with requires_grad_(False) or take it "
                    "out; as it is, several processes need --find_unused_parameters.")
    partly = [name for name in mixed if None in (mixed[name], authentic[name])]
    if partly:
        raise Wrong(f"only with or only without tampered images does one reach {some(partly)}: several processes need "
                    "--find_unused_parameters; or let a term of weight 0 depend on it.")
    zero = [name for name in mixed if mixed[name] == authentic[name] == 0]
    if zero:
        raise Note(f"that of {some(zero)} is zero everywhere: fine only where the start makes it so.")


def gradients_finite(bench):
    """gradients are finite"""
    bench.check(loss_form)
    refuse_nonfinite(bench.train(THREE))


def all_authentic(bench):
    """a batch without tampered images gives a finite loss and gradient"""
    refuse_nonfinite(bench.train(AUTHENTIC))


def inputs_kept(bench):
    """forward leaves its inputs as they are"""
    changed = {name for done in (bench.train(THREE), bench.evaluate(THREE)) for name in done.changed}
    changed = [name for name in bench.batch(ONE) if name in changed]
    if changed:
        raise Wrong(f"it changes {some(changed)}, which metrics and logs still use: work on a copy, without += and "
                    "methods that end in an underscore.")


def state_kept(bench):
    """evaluation leaves weights and buffers as they are"""
    changed = [name for name in bench.evaluate(THREE).changed if name not in bench.batch(ONE)]
    if changed:
        raise Wrong(f"it changes {some(changed)}: do so only where self.training is True.")


def repeatable(bench):
    """evaluation gives the same twice"""
    refuse_difference(bench.evaluate(ONE), bench.evaluate(ONE, seed=1),
                      "draw random numbers only where self.training is True; F.dropout takes training=self.training.")


def independent(bench):
    """an image's result doesn't depend on the others in its batch"""
    refuse_difference(bench.evaluate(ONE), bench.evaluate(THREE),
                      "compute statistics per image or use running ones, as nn.BatchNorm2d does in evaluation.")


def other_answer(batch):
    """Turn mask, edge mask and label into their opposites."""
    batch.update({key: 1 - batch[key] for key in ("mask", "edge_mask", "label")})


def blind(bench):
    """predictions don't depend on mask and label"""
    refuse_difference(bench.evaluate(ONE), bench.evaluate(ONE, other_answer),
                      "in evaluation use mask, edge_mask and label for the losses alone.")


def without_edges(batch):
    """Take edge_mask out, as without --edge_mask_width."""
    del batch["edge_mask"]


def edges(bench):
    """works with and without edge_mask"""
    parameter = inspect.signature(bench.model().forward).parameters.get("edge_mask")
    if parameter and parameter.default is parameter.empty:
        return "forward declares that it needs it, so give --edge_mask_width"
    bench.check(loss_form)
    try:
        refuse_nonfinite(bench.evaluate(ONE, without_edges))
        done = bench.train(THREE, without_edges)
        refuse_nonfinite(done)
    except UserError as error:
        return f"it answers without: {describe(error)}"
    except Exception as error:  # whatever a user's model raises
        raise Wrong(f"without it: {describe(error)} Name it in forward without a default, or raise a UserError that "
                    "asks for --edge_mask_width.") from error
    if not torch.allclose(bench.train(THREE).output["backward_loss"], done.output["backward_loss"], rtol=TOLERANCE):
        raise Note("with --edge_mask_width the loss is another one.")


def other_size(bench):
    """works at another size"""
    size = bench.args.image_size // 2
    sizes = {name: size for name, value in bench.model_args.items() if "size" in name and value == bench.args.image_size}
    try:
        model = bench.build(**sizes) if sizes else bench.model()
        for training in True, False:
            done = run_model(model, bench.batch((0, 2), size), training, bench.device)
            refuse_nonfinite(done)
            check_output({"pred_mask": done.output.get("pred_mask")}, done.batch, (), bench.args.model)
    except UserError as error:
        return f"at {size} it answers: {describe(error)}"
    except Exception as error:  # whatever a user's model raises
        raise Wrong(f"at {size}: {describe(error)} Resize or pad within the model, or raise a UserError that names the "
                    "sizes it takes.") from error
    return f"{size} as well as {bench.args.image_size}" + f", built with --{' --'.join(sizes)} {size}" * bool(sizes)


def reload(bench):
    """saved and loaded again, strictly, it gives the same"""
    fresh = bench.build(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "checkpoint-0.pth"), {"model": bench.model().state_dict()})
        load_weights(fresh, Path(folder, "checkpoint-0.pth"), "its own")
    refuse_difference(run_model(fresh, bench.batch(ONE), False, bench.device), bench.evaluate(ONE, seed=2),
                      "something that matters is no parameter and no persistent buffer: use nn.Parameter or "
                      "register_buffer.")


def autocast(bench):
    """trains under autocast, the mixed precision that --if_not_amp turns off"""
    bench.check(loss_form)
    done = bench.train(THREE, amp=True)
    for where in done.watch.refused:
        raise Wrong(f"{where}: on CUDA autocast refuses F.binary_cross_entropy and nn.BCELoss: use "
                    "F.binary_cross_entropy_with_logits, or torch.autocast(device_type, enabled=False) around it.")
    refuse_nonfinite(done)
    loss, exact = done.output["backward_loss"], bench.train(THREE).output["backward_loss"]
    if loss.dtype != torch.float32:
        raise Wrong(f"backward_loss is {loss.dtype}: compute it from logits.float().")
    if not torch.allclose(loss, exact, rtol=0.1):
        raise Note(f"the loss is {loss.item():.4g} instead of {exact.item():.4g}.")


def no_waiting(bench):
    """nothing makes the host wait for the GPU"""
    waits = {where: name for done in (bench.train(THREE), bench.evaluate(THREE))
             for where, name in done.watch.waits.items()}
    if waits:
        raise Wrong(f"{some([f'{name} at {where}' for where, name in waits.items()])}: keep values on the device, with "
                    "torch.where, masks and buffers in place of Python's if, item and indexing by a mask.")


def black_image(bench):
    """a black image gives finite losses, gradients and predictions"""
    refuse_nonfinite(bench.evaluate(BLACK))
    refuse_nonfinite(bench.train(BLACK))


# Training changes running statistics: what compares evaluations comes first, and the black image, which may leave NaN in
# them, last.
CHECKS = [builds, batches, trains, evaluates, loss_form, mask_form, mask_range, label_form, visual_form, inputs_kept,
          state_kept, repeatable, independent, blind, reload, gradients, gradients_finite, trains_on_one, all_authentic,
          edges, other_size, autocast, no_waiting, black_image]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="registered name (python tools/list_models.py lists them)")
    parser.add_argument("--image_size", type=positive, default=256,
                        help="side of the images in pixels; half of it is the second size (default: %(default)s)")
    fitting = parser.add_mutually_exclusive_group()
    fitting.add_argument("--if_resizing", action="store_true", help="images as with this flag in training (default)")
    fitting.add_argument("--if_padding", action="store_true", help="images as with this flag in training")
    parser.add_argument("--device", default="cpu", help="cuda, cuda:<number> or cpu (default: %(default)s)")
    args, model_args = parse_args(parser)
    bench, told, wrong = Bench(args, model_args, ddp.init(args.device)), {}, 0
    for check in CHECKS:
        state, text = "OK", ""
        try:
            text = bench.check(check)
        except Note as note:
            state, text = "note", str(note)
        except Exception as error:  # whatever a user's model raises
            wrong += 1
            state = "NOT OK"
            if error in told:
                state, text = "-", f"not checked, as it needs what failed above: {told[error]}"
            else:
                told[error], text = check.__doc__, describe(error)
        print(f"{state:7} {check.__doc__}{': ' * bool(text)}{text or ''}", flush=True)
        if state == "NOT OK" and os.environ.get("IMDL_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exception(next(reversed(told)))
    print(f"{args.model} at {args.image_size} pixels: {len(CHECKS) - wrong} of {len(CHECKS)} OK")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
