"""Check that a model keeps the interface, before the first training: one line per check, with the cure.

    python tools/check_model.py --model MyModel                          # at 256 pixels, and at 128
    python tools/check_model.py --model MyModel --kernel_size 5 --image_size 512 --if_padding
    IMDL_TRACEBACK=1 python tools/check_model.py --model MyModel         # tracebacks of the model's exceptions too

OK: as it should be. note: allowed, but good to know. NOT OK: what was seen and what to do; the exit code is then 1. The
images are made here. The weights are random, unless the command line asks for pretrained ones, and what a model does
with trained weights alone isn't seen.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import signals  # first: the others take seconds

import functools
import inspect
import math
import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

import data
import ddp
from checkpoint import load_weights, save_checkpoint
from evaluate import check_output, label_scores
from registry import (ROOT, Parser, UserError, build_model, exit_on_user_error, hint_for, parse_args, positive,
                      post_function, relative, without_starting_weights)
from tools.list_models import example_samples

THREE, ONE, AUTHENTIC, BLACK = (0, 1, 2), (0,), (2, 3), (4, 0)  # indices of samples, see example_samples
NOT_FINITE = "is not finite: look for a division by 0, and for the root or logarithm of 0 (a gradient's cause too)."
TOLERANCE = 1e-4  # float noise, which other batch sizes bring, as a share of the values' range


class Wrong(Exception):
    """What a check found wrong: what was seen, and the cure."""


class Note(Exception):
    """What a check found that is allowed."""


# ---------------------------------------------------------------------------------------------------------------------
# Running the model


def place(frames):
    """Return file:line of the innermost of a traceback's frames that lies in models/; "" where none does."""
    own = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT / "models")]
    return f"{relative(own[-1].filename)}:{own[-1].lineno}" if own else ""


def describe(error):
    """Return an exception in one line: type, text, the model's file and line, and a hint where one is known."""
    if isinstance(error, (Wrong, UserError)):
        return " ".join(str(error).split("\n"))
    text = str(error).strip().split("\n")[0]
    where, hint = place(traceback.extract_tb(error.__traceback__)), hint_for(error)
    return (f"{type(error).__name__}{': ' * bool(text)}{text}" + (f" ({where})" if where else "")
            + (f"; {hint}" if hint else "."))


class Watch(TorchFunctionMode):
    """Notes {file:line: what} of calls that make the host wait for the GPU, and of losses that autocast refuses."""

    ALWAYS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__format__",
              "__repr__", "__contains__", "__array__", "nonzero", "argwhere", "masked_select", "unique",
              "unique_consecutive", "equal", "allclose"}

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
        if name == "to":
            return "cpu" in (*args, kwargs.get("device"))
        return name in self.ALWAYS or name == "where" and len(args) == 1


@dataclass
class Pass:
    """What one forward gave, and in training its backward."""

    batch: dict
    output: dict
    differentiable: bool  # whether backward_loss has a gradient
    gradients: dict  # after backward: name of a trainable parameter -> largest absolute value, None without gradient
    changed: list  # names of what forward changed in the batch and, in evaluation, in the model (`model.<name>`)
    watch: Watch


def run_model(model, batch, training, device, seed=0, amp=False, backward=True):
    """Run a model on a batch, in training with backward, and return the `Pass`; Wrong where it returns no dict."""
    def watched():
        state = [] if training else [*model.named_parameters(), *model.named_buffers()]
        return {key: value for key, value in batch.items() if torch.is_tensor(value)} | {
            f"model.{name}": value for name, value in state}

    before = {name: value.detach().clone() for name, value in watched().items()}
    model.train(training)
    ddp.seed_everything(seed)
    with torch.set_grad_enabled(training), torch.autocast(device.type, enabled=amp), Watch(device) as watch:
        output = model(**batch)
    changed = [name for name, value in watched().items() if name in before and not torch.equal(value, before[name])]
    if not isinstance(output, Mapping):
        raise Wrong(f"forward returned {type(output).__name__}: return a dict with backward_loss, pred_mask and so on.")
    loss, gradients = output.get("backward_loss"), {}
    differentiable = training and torch.is_tensor(loss) and loss.requires_grad and loss.numel() == 1
    if differentiable and backward:
        loss.backward()
        gradients = {name: None if p.grad is None else p.grad.abs().max().item()
                     for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    output = {key: value.detach() if torch.is_tensor(value) else value for key, value in output.items()}
    return Pass(batch, output, differentiable, gradients, changed, watch)


class Bench:
    """The model under check; nothing that checks share is computed twice."""

    def __init__(self, args, model_args):
        self.args, self.device, self.done = args, ddp.init(args.device), {}
        self.model_args = without_starting_weights(args.model, model_args)
        self.post_func = post_function(args.model, model_args)

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

    def batch(self, images, size=None):
        """Return a new batch of the samples that `images` indexes."""
        size = size or self.args.image_size
        samples = self.once(size, lambda: example_samples(size, self.post_func, 5, self.args.if_padding))
        return data.to_device(data.collate([samples[i] for i in images], self.post_func), self.device)

    def run(self, training, images, alter=None, **options):
        """Return the `Pass` of some samples; alter(batch) may change the batch before."""
        def make():
            batch = self.batch(images)
            if alter:
                alter(batch)
            return run_model(self.model(), batch, training, self.device, **options)

        return self.once((training, images, alter, *options.items()), make)

    def check(self, function):
        """Return what a check returns; one that makes sense only after another's success calls that so."""
        return self.once(function, lambda: function(self))

    train = functools.partialmethod(run, True)
    evaluate = functools.partialmethod(run, False)


def some(names):
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


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


def refuse_difference(first, second, cure):
    """Raise Wrong where the predictions for the first image of two `Pass`es differ."""
    for key in ("pred_mask", "pred_label"):
        values = [done.output.get(key) if key == "pred_mask" else label_scores(done.output, done.batch["label"])
                  for done in (first, second)]
        if all(value is not None for value in values):
            difference, spread = (values[0][0] - values[1][0]).abs().max().item(), values[1].max() - values[1].min()
            if not difference <= TOLERANCE * (0.1 + spread):
                raise Wrong(f"{key} differs by {difference:.2g}: {cure}")


def refuse_failure(make, cure):
    """Call make() and return what the model says if it refuses with a UserError; Wrong where it fails otherwise."""
    try:
        make()
        return ""
    except UserError as error:
        return f"the model answers: {describe(error)}"
    except Exception as error:  # whatever a user's model raises
        raise Wrong(f"{describe(error)} {cure}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The checks: the docstring is what the line says, what is returned comes after it


def builds(bench):
    """builds"""
    sizes = [(p.numel(), p.requires_grad) for p in bench.model().parameters()]
    trainable = sum(n for n, requires_grad in sizes if requires_grad)
    if not trainable:
        raise Wrong("no parameter is trainable: give the model an nn.Parameter or a layer, and leave it unfrozen.")
    return f"{sum(n for n, _ in sizes):,} parameters, {trainable:,} of them trainable"


def trains(bench):
    """trains on three images, and on one"""
    bench.train(THREE)
    bench.train(ONE, backward=False)


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
        raise Wrong(f"it {NOT_FINITE}")


def mask_form(bench):
    """pred_mask holds one probability per pixel"""
    for done in bench.train(THREE), bench.evaluate(THREE):
        pred = done.output.get("pred_mask")
        if pred is None:
            raise Note("forward returns none, so the model can be trained but no mask be evaluated or saved.")
        check_output({"pred_mask": pred}, done.batch, (), bench.args.model)
        if not pred.is_floating_point():
            raise Wrong(f"it is {pred.dtype}: return probabilities, not classes.")
        refuse_no_probabilities(pred)


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


def nothing_changes(bench):
    """forward changes none of its inputs, and in evaluation no weight or buffer"""
    changed = sorted({*bench.train(THREE).changed, *bench.evaluate(THREE).changed})
    if changed:
        raise Wrong(f"it changes {some(changed)}: work on a copy, without += and methods that end in an underscore; "
                    "running statistics only where self.training is True.")


def repeatable(bench):
    """evaluation gives the same twice"""
    refuse_difference(bench.evaluate(ONE), bench.evaluate(ONE, seed=1),
                      "draw random numbers only where self.training is True; F.dropout takes training=self.training.")


def independent(bench):
    """an image's result doesn't depend on the others in its batch"""
    refuse_difference(bench.evaluate(ONE), bench.evaluate(THREE),
                      "compute statistics per image or use running ones, as nn.BatchNorm2d does in evaluation.")


def blind(bench):
    """predictions don't depend on mask and label"""
    def opposite(batch):
        batch.update({key: 1 - batch[key] for key in ("mask", "edge_mask", "label")})

    refuse_difference(bench.evaluate(ONE), bench.evaluate(ONE, opposite),
                      "in evaluation use mask, edge_mask and label for the losses alone.")


def reload(bench):
    """saved and loaded again, strictly, it gives the same"""
    exact, fresh = bench.evaluate(ONE), bench.build(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "checkpoint-0.pth"), {"model": bench.model().state_dict()})
        load_weights(fresh, Path(folder, "checkpoint-0.pth"), "its own")
    refuse_difference(exact, run_model(fresh, bench.batch(ONE), False, bench.device),
                      "something that matters is neither a parameter nor a persistent buffer: use nn.Parameter or "
                      "register_buffer.")


def gradients(bench):
    """finite gradients reach every trainable parameter"""
    bench.check(loss_form)
    refuse_nonfinite(bench.train(THREE))
    mixed, authentic = bench.train(THREE).gradients, bench.train(AUTHENTIC).gradients
    absent = [name for name in mixed if mixed[name] is None and authentic.get(name) is None]
    if absent:
        raise Wrong(f"none reaches {some(absent)}: use it in the loss, freeze it with requires_grad_(False) or take it "
                    "out; as it is, several processes need --find_unused_parameters.")
    partly = [name for name in mixed if None in (mixed[name], authentic.get(name))]
    if partly:
        raise Wrong(f"only with or only without tampered images does one reach {some(partly)}: several processes need "
                    "--find_unused_parameters; or let a term of weight 0 depend on it.")
    zero = [name for name in mixed if mixed[name] == authentic[name] == 0]
    if zero:
        raise Note(f"that of {some(zero)} is zero everywhere, which is fine only where the start makes it so.")


def all_authentic(bench):
    """a batch without tampered images gives finite predictions, losses and gradients"""
    refuse_nonfinite(bench.train(AUTHENTIC))


def edges(bench):
    """works with and without edge_mask"""
    def without(batch):
        del batch["edge_mask"]

    parameter = inspect.signature(bench.model().forward).parameters.get("edge_mask")
    if parameter and parameter.default is parameter.empty:
        return "forward declares that it needs it, so give --edge_mask_width"
    bench.check(loss_form)
    for run in (functools.partial(bench.evaluate, ONE, without),
                functools.partial(bench.train, THREE, without, backward=False)):
        if text := refuse_failure(lambda: refuse_nonfinite(run()), "That is without edge_mask: name it in forward "
                                  "without a default, or raise a UserError that asks for --edge_mask_width."):
            return text
    if not torch.allclose(run().output["backward_loss"], bench.train(THREE).output["backward_loss"], rtol=TOLERANCE):
        raise Note("with --edge_mask_width the loss is another one.")


def other_size(bench):
    """works at another size"""
    first, second = bench.args.image_size, bench.args.image_size // 2
    own = [name for name, value in bench.model_args.items() if "size" in name and value == first]
    bench.train(THREE), bench.evaluate(THREE)

    def make():
        model = bench.build(**dict.fromkeys(own, second)) if own else bench.model()
        for training in True, False:
            done = run_model(model, bench.batch((0, 2), second), training, bench.device)
            refuse_nonfinite(done)
            pred, mask = done.output.get("pred_mask"), done.batch["mask"]
            if pred is not None and pred.shape != mask.shape:
                raise Wrong(f"pred_mask is {tuple(pred.shape)} and the mask is {tuple(mask.shape)}.")

    said = refuse_failure(make, f"That is at {second} pixels: resize or pad within the model, or raise a UserError "
                          "that names the sizes it takes.")
    return said or f"{second} as well as {first}" + f", built with --{' --'.join(own)} {second}" * bool(own)


def autocast(bench):
    """trains under autocast, the mixed precision that --if_not_amp turns off"""
    bench.check(loss_form)
    done = bench.train(THREE, amp=True)
    for where in done.watch.refused:
        raise Wrong(f"on CUDA autocast refuses F.binary_cross_entropy and nn.BCELoss ({where}): use "
                    "F.binary_cross_entropy_with_logits, or torch.autocast(device_type, enabled=False) around it.")
    refuse_nonfinite(done)
    loss, exact = done.output["backward_loss"], bench.train(THREE).output["backward_loss"]
    if loss.dtype != torch.float32:
        raise Wrong(f"backward_loss is {loss.dtype}: compute it from logits.float().")
    if not torch.allclose(loss, exact, rtol=0.1):
        raise Note(f"the loss is {loss.item():.4g} instead of {exact.item():.4g}.")


def no_waiting(bench):
    """nothing makes the host wait for the GPU"""
    waits = bench.train(THREE).watch.waits | bench.evaluate(THREE).watch.waits
    if waits:
        raise Wrong(f"{some([f'{name} at {where}' for where, name in waits.items()])}: keep values on the device, with "
                    "torch.where, masks and buffers in place of Python's if, item and indexing by a mask.")


def black_image(bench):
    """a black image gives finite predictions, losses and gradients"""
    refuse_nonfinite(bench.evaluate(BLACK))
    refuse_nonfinite(bench.train(BLACK))


# Training changes running statistics: what compares evaluations comes first, and the black image, which may leave NaN
# in them, last.
CHECKS = [builds, trains, evaluates, loss_form, mask_form, label_form, visual_form, nothing_changes, repeatable,
          independent, blind, reload, gradients, all_authentic, edges, other_size, autocast, no_waiting, black_image]


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
    torch.backends.cudnn.allow_tf32 = False  # whose noise is larger than TOLERANCE
    bench, told, wrong = Bench(args, model_args), {}, 0  # told: text of a failure -> the check that met it first
    for check in CHECKS:
        state, text = "OK", ""
        try:
            text = bench.check(check) or ""
        except Note as note:
            state, text = "note", str(note)
        except Exception as error:  # whatever a user's model raises
            wrong += 1
            state, text = "NOT OK", describe(error)
            if told.setdefault(text, check) is not check:
                state, text = "-", f"not checked, see \"{told[text].__doc__}\" above"
            elif os.environ.get("IMDL_TRACEBACK", "0") not in ("", "0"):
                traceback.print_exception(error)
        print(f"{state:7} {check.__doc__}{': ' * bool(text)}{text}", flush=True)
    print(f"{args.model} at {args.image_size} pixels: {len(CHECKS) - wrong} of {len(CHECKS)} OK")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
