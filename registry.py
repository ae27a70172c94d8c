"""What a command line can name: models, post functions, and the flags that follow from a model's constructor.

    python registry.py                                         # every model: file, parameters, GFLOPs
    python registry.py --model MyConvNeXt --image_size 256     # one of them, at another size

A model is any callable under `@MODELS.register_module()` in a file or folder below models/; nothing else has to be
edited. This module imports torch only where it builds a model, so that `--help` and mistakes on the command line
answer at once.
"""
import argparse
import ast
import collections.abc
import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import tempfile
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend. The text is one sentence: file, flag or key, what is wrong, what to do."""


def run(main):
    """Call main() and return what it returns; a UserError becomes one line on standard error and exit code 1."""
    try:
        return main()
    except UserError as error:
        if os.environ.get("IMDL_TRACEBACK"):  # for the author of a model: where it happened, not only what
            raise
        message = str(error).rpartition("registry.UserError: ")[2]  # a loader's worker puts its traceback before it
        print("error:", *message.strip().split("\n"), file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def nearest(word, known):
    """Return " Did you mean X?" for the known word nearest to `word`, or "" if none is near."""
    lower = {k.lower(): k for k in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f" Did you mean {lower[match[0]]}?" if match else ""


# ---------------------------------------------------------------------------------------------------------------------
# Registries


class Registry:
    """Names of callables. `register_module` is the decorator; it also works as a plain call."""

    def __init__(self, kind):
        self.kind = kind
        self.entries = {}  # name -> {file that registers it: callable}

    def register_module(self, name=None, module=None):
        """Register a class or function under `name`, or else under its own name.

        Forms: `@R.register_module()`, `@R.register_module("Name")`, `R.register_module(module=X)`.
        """
        if callable(name):  # used without brackets
            name, module = None, name

        def add(obj):
            frame = inspect.currentframe()  # up to the file that is being run: a helper elsewhere may register for it
            while frame.f_code.co_name != "<module>" and frame.f_back:
                frame = frame.f_back
            self.entries.setdefault(name or obj.__name__, {})[relative(frame.f_code.co_filename)] = obj
            return obj

        return add if module is None else add(module)

    def get(self, name):
        """Return the callable registered as `name`; UserError if there is none, or if two files register one."""
        if name not in self.entries:
            raise UserError(f"there is no {self.kind} {name!r}.{nearest(name, self.entries)}")
        if len(self.entries[name]) > 1:
            files = " and ".join(sorted(self.entries[name]))
            raise UserError(f"{files} both register the {self.kind} {name}: rename one of them.")
        return next(iter(self.entries[name].values()))

    def file(self, name):
        """Return the file that registers `name`, as seen from the repository."""
        return next(iter(self.entries[name]))

    def __contains__(self, name):
        return name in self.entries


MODELS = Registry("model")
POSTFUNCS = Registry("post function")


def relative(path):
    """Return the path as seen from the repository, for messages."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def model_files():
    """Return the Python files below models/, sorted; not those of hidden folders, such as an editor's copies."""
    files = sorted((ROOT / "models").rglob("*.py"))
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def registered_names(source):
    """Return (names, complete): the models that a file plainly registers, and whether these are all.

    Read from the text (bytes) of the file without running it: decorators of top-level classes and functions. Calls,
    helpers, loops and computed names make the answer incomplete; so does what Python can't parse.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        text = source.decode(errors="replace")
        return set(re.findall(r"^@MODELS\.register_module.*\n(?:class|def)\s+(\w+)", text, re.M)), False
    names = set()
    untold = sum(is_registration(node) for node in ast.walk(tree))
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", []):
            if is_registration(getattr(decorator, "func", decorator)):
                keywords = {keyword.arg: keyword.value for keyword in getattr(decorator, "keywords", [])}
                given = [*getattr(decorator, "args", []), *filter(None, [keywords.get("name")])]
                name = given[0] if given else ast.Constant(node.name)
                if isinstance(name, ast.Constant):
                    names.add(name.value or node.name)
                    untold -= 1
    return names, untold == 0


def is_registration(node):
    """Tell whether a syntax node is the attribute `MODELS.register_module`."""
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith("MODELS.register_module")


def import_model_file(path):
    """Import a file of models/ under its dotted name, so that relative imports work with or without `__init__.py`."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file raises: the message names the file and the line
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename, error.lineno))
        file, line = [(path, 1), *(place for place in places if Path(relative(place[0])).parts[0] == "models")][-1]
        hint = ""
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("IMDLBenCo"):
            hint = " Change that import to `from registry import MODELS`."
        raise UserError(f"{relative(file)} line {line} can't be imported: {summary(error)}{hint}") from error


def summary(error):
    """Return the type of an exception and the first line of its text."""
    text = str(getattr(error, "msg", error)).strip().split("\n")[0].rstrip(".")  # msg lacks the place
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."


def import_files(paths, until=None):
    """Import files of models/ up to the one that registers the model `until`; return a sentence for each that fails."""
    errors = []
    for path in paths:
        try:
            import_model_file(path)
        except UserError as error:
            errors.append(str(error))
        if until in MODELS:
            break
    return errors


def find_model(name):
    """Import what is needed of models/ and return the callable registered as `name`.

    First the files that plainly register the model or hold its post function; then those that mention the name and
    whose registrations can't be told; only if that was in vain all others, the less certain ones first. Raises
    UserError: a file that can't be imported, no such model (with the nearest name), or two files that register it.
    """
    sources = {path: path.read_bytes() for path in model_files()}
    told = {path: registered_names(source) for path, source in sources.items()}
    post_func = f"def {name.lower()}_post_func(".encode()
    for path in sources:
        if name in told[path][0] or post_func in sources[path]:
            import_model_file(path)
    import_files(path for path in sources if name.encode() in sources[path] and not told[path][1])
    if name not in MODELS:
        errors = import_files(sorted(sources, key=lambda path: told[path][1]), until=name)
        if name not in MODELS:
            known = set(MODELS.entries).union(*(names for names, _ in told.values()))
            raise UserError(" ".join([f"--model {name}: models/ registers no such model.{nearest(name, known)}",
                                      f"Known: {', '.join(sorted(known)) or 'none'}.", *errors]))
    return MODELS.get(name)


def build_model(name, model_args):
    """Call the model's constructor and return the model; UserError if that is no torch.nn.Module."""
    try:
        model = MODELS.get(name)(**model_args)
    except UserError:
        raise
    except Exception as error:  # whatever a user's constructor raises
        flags = " ".join(f"--{key} {value}" for key, value in model_args.items()) or "no flags"
        raise UserError(f"--model {name}: its constructor failed with {flags} ({summary(error)[:-1]}). Correct "
                        "these flags; IMDL_TRACEBACK=1 in the environment shows the whole traceback.") from error
    if not callable(getattr(model, "forward", None)):
        raise UserError(f"--model {name}: {MODELS.file(name)} gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def post_function(name, model_args):
    """Return the post function of a model with its own flags bound, or None if the model has none."""
    key = f"{name.lower()}_post_func"
    if key not in POSTFUNCS:
        return None
    function = POSTFUNCS.get(key)
    wanted = list(inspect.signature(function).parameters)[1:]
    return functools.partial(function, **{k: v for k, v in model_args.items() if k in wanted})


# ---------------------------------------------------------------------------------------------------------------------
# Signature -> argparse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors (one sentence, exit code 1) and which knows no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}. {self.prog} --help lists the flags.")


class BoolFlag(argparse.Action):
    """`--x`, `--no-x` and `--x true|false`."""

    def __init__(self, option_strings, dest, **kwargs):
        names = [*option_strings, *("--no-" + option.removeprefix("--") for option in option_strings)]
        super().__init__(names, dest, nargs="?", metavar="true|false", **kwargs)

    def __call__(self, parser, namespace, value, option=None):
        word = "true" if value is None else value.lower()
        if word not in ("true", "false", "1", "0", "yes", "no"):
            parser.error(f"{option}: {value!r} is neither true nor false")
        setattr(namespace, self.dest, (word in ("true", "1", "yes")) != option.startswith("--no-"))


def parameters(model):
    """Return {name: inspect.Parameter} of a model's constructor or function, annotations resolved, no *args."""
    target = model.__init__ if inspect.isclass(model) else model
    names = getattr(inspect.unwrap(target), "__globals__", {})
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = parameter.annotation
        try:
            while isinstance(kind, str):  # "int", or '"int"' under `from __future__ import annotations`
                kind = eval(kind, names)
        except Exception:  # a name that only a type checker can resolve
            kind = parameter.empty
        found[name] = parameter.replace(annotation=kind)
    return found


def parameter_help(model):
    """Return {parameter: text} from the docstrings of a class and its constructor.

    Understood: `name: text` and `name (type): text` as in Google style, `:param name: text`, and NumPy's `name : type`
    with the text below; a text goes on over deeper indented lines.
    """
    doc = inspect.getdoc(model) or ""
    if inspect.isclass(model):
        doc += "\n" + (inspect.getdoc(model.__init__) or "")
    found = {}
    for name in parameters(model):
        match = re.search(rf"^( *)(?::param +(?:\S+ +)?)?`*{name}`*(?: *\(.*?\))?( *):(.*(?:\n\1 +.*)*)", doc, re.M)
        if match:
            _, numpy_style, text = match.groups()
            below = text.partition("\n")[2]
            found[name] = " ".join((below if numpy_style and below else text).split())
    return found


def flag_options(parameter):
    """Translate one parameter into add_argument options; None where its annotation has no form on a command line."""
    kind, default, optional = parameter.annotation, parameter.default, False
    options = {"required": True} if default is parameter.empty else {"default": default}
    if kind is parameter.empty:
        if default is parameter.empty or default is None:
            kind = str
        else:
            kind = list[type(default[0])] if isinstance(default, (list, tuple)) and default else type(default)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        optional = len(members) < len(typing.get_args(kind))
        kind = members[0] if len(members) == 1 else float if set(members) == {int, float} else str
    sequences = (list, tuple, collections.abc.Sequence)
    if kind in sequences or typing.get_origin(kind) in sequences:
        options["nargs"] = "+"
        kind = (*typing.get_args(kind), str)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices:
        kind = bool if all(isinstance(choice, bool) for choice in choices) else type(choices[0])
    if kind is bool and "nargs" not in options:
        return {"action": BoolFlag, **options}
    if kind not in (int, float, str, bool):
        return None
    if choices and kind is not bool:
        options["choices"] = [*choices, *[None] * optional]
    words = {str(choice): choice for choice in choices} or ({"true": True, "false": False} if kind is bool else {})

    def convert(text):
        if optional and text.lower() == "none":
            return None
        for word in (text, text.lower()):
            if word in words:
                return words[word]
        return text if kind is bool else kind(text)

    convert.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    if kind is bool:
        options["choices"] = [True, False]
    return {"type": convert, **options}


def add_model_flags(parser, name, model):
    """Add the constructor parameters of a model as flags, save those that are flags of the script already."""
    group = parser.add_argument_group(f"flags of {name} ({MODELS.file(name)})")
    taken = {action.dest for action in parser._actions}
    texts = parameter_help(model)
    for parameter in parameters(model).values():
        if parameter.name in taken:
            continue
        options = flag_options(parameter)
        if options:
            note = "required" if "required" in options else f"default: {options['default']}"
            text = f"{texts.get(parameter.name, '')} ({note})".strip()
            group.add_argument(f"--{parameter.name}", help=text.replace("%", "%%"), **options)
        elif parameter.default is parameter.empty:
            raise UserError(f"{MODELS.file(name)}: parameter {parameter.name!r} of {name} has the annotation "
                            f"{parameter.annotation!r}, which can't become a flag: use int, float, str, bool, "
                            "Optional, Literal or list, or give it a default.")


def parse_args(parser, argv=None):
    """Parse a script's command line together with the flags of the model it names.

    Returns (args, model_args): the script's flags as a Namespace, and the keyword arguments of the model's constructor.
    A parameter of the constructor that has the name of a script's flag receives that flag's value. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--model")
    first.add_argument("-h", "--help", action="store_true")
    try:
        asked = first.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        asked = argparse.Namespace(model=None, help=False)
    if not asked.help:
        parser.parse_known_args(argv)  # the script's own flags first: a mistake there needs no model
    elif asked.model is None:
        parser.epilog = "With --model NAME, --help also shows that model's flags. `python registry.py` lists all."
        parser.print_help()
        sys.exit(0)
    script_flags = [action.dest for action in parser._actions if action.dest != "help"]
    model = find_model(asked.model)
    add_model_flags(parser, asked.model, model)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        hint = nearest(word, flags) if word.startswith("-") else " Values follow a flag that starts with --."
        raise UserError(f"{word}: neither {parser.prog} nor the model {asked.model} has this flag.{hint}")
    values = vars(values)
    args = argparse.Namespace(**{k: values[k] for k in script_flags})
    return args, {k: values[k] for k in parameters(model) if k in values}


def script_parser(doc, evaluates=True, **defaults):
    """Return a Parser with the flags that all scripts share; `defaults` replaces defaults (such as output_dir).

    `evaluates` is False for a script that computes no metrics.
    """
    parser = Parser(description=doc)
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", required=True, help="registered name of the model (python registry.py lists them)")
    group.add_argument("--image_size", type=positive, default=512,
                       help="side of the square that pictures are brought to, in pixels (default: %(default)s)")
    group.add_argument("--if_resizing", action="store_true",
                       help="resize pictures to image_size (bilinear, masks nearest)")
    group.add_argument("--if_padding", action="store_true",
                       help="put pictures top-left on black, crop what is larger; this or --if_resizing")
    group.add_argument("--edge_mask_width", type=positive, default=None,
                       help="width of the boundary band in edge_mask, in pixels; off when not given")
    group.add_argument("--test_batch_size", type=positive, default=2,
                       help="pictures per process and step in evaluation (default: %(default)s)")
    group.add_argument("--no_model_eval", action="store_true",
                       help="evaluate in training mode (dropout on, batch statistics), as some published tables did")
    group.add_argument("--no_fingerprint", action="store_true",
                       help="don't read every file of a dataset to print its fingerprint")
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=None, help="folder for all that the run writes (default: %(default)s)")
    group.add_argument("--device", default="cuda",
                       help="cuda, cuda:1, cpu, ...; cuda falls back to cpu where there is none (default: %(default)s)")
    group.add_argument("--seed", type=natural, default=42,
                       help="seed of everything that is random (default: %(default)s)")
    group.add_argument("--num_workers", type=natural, default=min(8, os.cpu_count() or 1),
                       help="processes per rank that load pictures; 0 = none (default: as many as cores, at most 8)")
    group.add_argument("--pin_mem", action="store_true", default=True, dest="pin_mem",
                       help="pinned memory for transfers to a GPU (on by default)")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="turn pinned memory off")
    group.add_argument("--if_not_amp", action="store_true", help="no mixed precision (it is used on CUDA only)")
    if evaluates:
        group = parser.add_argument_group("metrics and curves")
        group.add_argument("--metrics", nargs="+", default=None, metavar="NAME",
                           help="replaces the list in the script: PixelF1 PixelIOU PixelAccuracy PixelAUC ImageF1 "
                                "ImageAUC ImageAccuracy, pixel metrics also as PixelF1:reverse or PixelF1:double")
        group.add_argument("--if_predict_label", action="store_true",
                           help="the image-level metrics too (the model must return pred_label)")
        group.add_argument("--log_dir", default=None, help="folder for TensorBoard events (default: output_dir)")
    group = parser.add_argument_group("distributed (torchrun's environment decides; these suit IMDL-BenCo's launchers)")
    group.add_argument("--world_size", type=int, default=None,
                       help="number of processes; compared with torchrun's, which counts")
    group.add_argument("--local_rank", type=int, default=None,
                       help="index of this process's GPU where torchrun gives none")
    group.add_argument("--dist_url", default="env://",
                       help="where the processes meet (default: %(default)s, torchrun's environment)")
    parser.set_defaults(**defaults)
    return parser


def whole(text, least):
    """Return the integer that a flag gives; argparse's error where it is none or below `least`."""
    if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text):
    """argparse type: an integer of at least 1."""
    return whole(text, 1)


def natural(text):
    """argparse type: an integer of at least 0."""
    return whole(text, 0)


def rate(text):
    """argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# python registry.py


def example_batch(image_size, post_func, device):
    """Return a batch of one tampered picture of noise as `forward` receives it, with every optional key."""
    import numpy as np
    from PIL import Image

    import data

    pixels = np.random.default_rng(0).integers(0, 256, (image_size, image_size), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(pixels).convert("RGB").save(f"{folder}/noise.jpg")
        Image.fromarray(255 * np.tri(image_size, dtype=np.uint8)).save(f"{folder}/mask.png")
        Path(folder, "set.json").write_text('[["noise.jpg", "mask.png"]]')
        dataset = data.JsonDataset(f"{folder}/set.json", image_size, padding=True, edge_mask_width=7,
                                   post_func=post_func, fingerprint=False)
        batch = data.collate([dataset[0]])
    del batch["index"]  # the loader's own
    return data.to_device(batch, device, padding=True)


def measure(name, image_size, model_args):
    """Build a model, run it on one picture and return (parameters, trainable parameters, floating-point operations).

    A multiply-add is two operations; element-wise ones are not counted. The losses are part of forward and so of the
    count, which they hardly change. On the meta device tensors have shapes but no values, so that nothing is allocated
    or computed; a model that needs values is built, and if need be run, on the CPU. Raises UserError with the model's
    own complaint.
    """
    from unittest import mock

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    constructor = parameters(MODELS.get(name)).values()
    missing = [f"--{p.name}" for p in constructor if p.default is p.empty and p.name not in model_args]
    if missing:
        raise UserError(f"needs {' '.join(missing)}: list it alone, with `--model {name}` and these flags.")
    for p in constructor:
        if p.name.startswith("pretrained") and bool in (p.annotation, type(p.default)):
            model_args = {**model_args, p.name: False}  # nothing is downloaded
    for build_on, run_on in ("meta", "meta"), ("cpu", "meta"), ("cpu", "cpu"):
        try:
            with torch.device(build_on):
                model = MODELS.get(name)(**model_args)
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            model.to(run_on).eval().requires_grad_(False)  # the counter would put hooks on what needs gradients
            batch = example_batch(image_size, post_function(name, model_args), run_on)
            with (
                torch.device(run_on), torch.no_grad(),
                mock.patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext()),  # it refuses meta
                sdpa_kernel(SDPBackend.MATH),  # attention as plain products: not all fused kernels are counted
                FlopCounterMode(display=False) as counter,
            ):
                model(**batch)
            return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable), counter.get_total_flops()
        except UserError:
            raise
        except Exception as error:  # whatever a user's model raises; what it says at last, on the CPU, is told
            complaint = summary(error)
    raise UserError(complaint)


def main():
    """List the models; UserError if there is nothing to list."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", metavar="NAME",
                        help="models to list (default: all); a single one also takes its own flags")
    parser.add_argument("--image_size", type=positive, default=512,
                        help="side of the picture in pixels (default: %(default)s)")
    asked = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0].model or []
    args, model_args = parse_args(parser) if len(asked) == 1 else (parser.parse_args(), {})
    for name in asked:
        find_model(name)
    broken = [] if asked else import_files(model_files())
    names = asked or sorted(MODELS.entries)

    row = f"{{:{max(map(len, names), default=0)}}}  {{:{max(map(len, map(MODELS.file, names)), default=0)}}}  "
    print(f"GFLOPs: 1e9 floating-point operations, a multiply-add being 2, for one {args.image_size}x{args.image_size} "
          f"picture forward, losses included\n\n{row.format('model', 'file')}   parameters     trainable    GFLOPs")
    listed = 0
    for name in names:
        print(row.format(name, MODELS.file(name)), end="", flush=True)
        try:
            given = {key: value for key, value in vars(args).items() if key in parameters(MODELS.get(name))}
            total, trainable, flops = measure(name, args.image_size, {**given, **model_args})
            print(f"{total:13,} {trainable:13,} {flops / 1e9:9.2f}", flush=True)
            listed += 1
        except UserError as error:
            print(re.split(r"(?<=[.!?])\s", str(error))[0], flush=True)
    for sentence in broken:
        print(sentence)
    if not listed:
        raise UserError("no model could be measured, the lines above say why." if names else "models/ holds no model.")


if __name__ == "__main__":
    from registry import main, run  # models register with the module `registry`, which `__main__` is not
    run(main)
