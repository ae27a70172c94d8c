"""MODELS and POSTFUNCS, and the flags that follow from a model's constructor.

A model is any callable under `@MODELS.register_module()` in a file or folder below models/; nothing else has to be
edited. This is the ground floor: of the other modules it imports only signals.py.
"""
import argparse
import collections.abc
import difflib
import functools
import importlib
import inspect
import math
import os
import re
import select
import shlex
import signal
import sys
import traceback
import types
import typing
from pathlib import Path

import signals

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can fix. The text is one sentence: file, flag or key, what is wrong, what to do."""


ANY_KEYWORD = "forward gets image, mask, label and more by keyword: name what it needs, and end with **kwargs."
HINTS = {  # pattern in an exception's words or traceback -> what to try; the first that fits counts
    r"(?s)in backward\n.*out of memory": "the backward pass needs more memory: lower --batch_size (and raise "
                                         "--accum_iter to keep the effective batch) or --image_size.",
    r"out of memory": "lower --batch_size, --test_batch_size or --image_size.",
    r"forward\(\) got an unexpected": ANY_KEYWORD,
    r"edge_mask": "the model needs the boundary of the mask: give --edge_mask_width.",
    r"unsafe to autocast": "leave out the sigmoid and give binary_cross_entropy_with_logits the logits, or train with "
                           "--if_not_amp.",
    r"does not support bfloat16": "give --amp_dtype float16, or --if_not_amp.",
    r"find_unused_parameters": "some parameters got no gradient: give --find_unused_parameters.",
    r"forward\(\) ": ANY_KEYWORD,
}


def visible(text, lines=False):
    """Return text with control characters, which a terminal would obey, and those that turn the direction of writing
    as "\\x1b" and the like; `lines` keeps "\\n". Names of files may hold any."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]",
                  lambda match: match[0] if lines and match[0] == "\n" else match[0].encode("unicode_escape").decode(),
                  str(text))


def show(text):
    """Print to standard output, at once; UserError where that can't be written, as on a full disk."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what reads it has ended: see `reader_is_gone`
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        raise UserError(f"standard output can't be written ({error.strerror}). Free some space or send it elsewhere."
                        ) from None


def hint_for(error):
    """Return what to try after an exception; "" where nothing is known."""
    text = "".join(traceback.format_exception(error)) if "out of memory" in str(error) else str(error)
    return next((hint for pattern, hint in HINTS.items() if re.search(pattern, text)), "")


LIMITS = {  # words of an exception -> what of the machine is exhausted, and the setting to lower
    "Too many open files|ancdata|too many fds":
        "too many open files for so many processes that load images. Raise the limit (ulimit -n 4096), or lower "
        "--num_workers.",
    "Bus error|[Uu]nable to .*(/torch_|shm|shared memory)|No space left on device.*(/torch_|shm)":
        "the shared memory (/dev/shm) through which the processes that load images hand them over is full. Give the "
        "container more (docker run --shm-size 8g), or lower --num_workers (0 needs none) or --batch_size.",
    "DataLoader worker.* (killed by signal|exited)|Cannot allocate memory|can't allocate memory|"
    "Resource temporarily unavailable":
        "a process that loads images was killed or could not start, most often because memory ran out. Lower "
        "--num_workers or --batch_size (in evaluation --test_batch_size).",
}


def limit_of(error):
    """Return the cure where an exception is about a limit of the machine for the loader's processes, else None."""
    return next((cure for words, cure in LIMITS.items() if re.search(words, str(error))), None)


def launched_as():
    """Return (rank, number of processes) as torchrun's environment gives them, (0, 1) where there is none.

    WORLD_SIZE alone, which Slurm scripts and other launchers leave behind, is none. UserError where the environment
    makes no sense.
    """
    cure = "Start several processes with torchrun, and for a single one unset RANK, WORLD_SIZE and LOCAL_RANK."
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    for name, text in given.items():
        if not re.fullmatch(r"[0-9]+", text):
            raise UserError(f"the environment variable {name} is {text!r}, which is no whole number. {cure}")
    if "RANK" not in given:
        return 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"the environment has RANK={given['RANK']} but no {' and no '.join(missing)}. {cure}")
    rank, size, port = int(given["RANK"]), int(given["WORLD_SIZE"]), os.environ["MASTER_PORT"]
    if rank >= size:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={size}, but ranks go from 0 to "
                        f"WORLD_SIZE - 1. {cure}")
    if not re.fullmatch(r"[0-9]+", port) or int(port) > 65535:
        raise UserError(f"the environment variable MASTER_PORT is {port!r}, which is no port. {cure}")
    return rank, size


def is_first():
    """Tell whether this is torchrun's first process, also before the process group is there; any, where that is
    unknown."""
    try:
        return launched_as()[0] == 0
    except UserError:
        return True


def exit_on_user_error(main):
    """Call main() and return what it returns.

    A UserError becomes one line on standard error, after its traceback where the environment has IMDL_TRACEBACK=1, and
    so do what is known of a loader's worker or another rank that died; any other exception, a model's for example,
    keeps its traceback and gets a line of hint where one is known. All end the program with exit code 1.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        result = main()
        signals.heed()
        return result
    except UserError as error:
        message = str(error).rpartition("registry.UserError: ")[2]  # a loader's worker puts its traceback in front
        if joined_ranks() or is_first():  # before the ranks have joined, all fail in the same way
            if os.environ.get("IMDL_TRACEBACK", "0") not in ("", "0"):
                link = error
                while link:  # what `raise ... from None` hides too
                    link.__suppress_context__, link = False, link.__context__
                traceback.print_exception(error)
            print(f"error{on_rank()}:", visible(message.strip()), file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # where another program than a script of ours calls main
        print(signals.farewell(signal.SIGINT), file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        signals.heed()  # which may be the cause
        # what becomes of a worker torch raises wherever the main process stands
        known = limit_of(error) if "DataLoader worker" in str(error) else None
        if known is None and joined_ranks():
            known = sys.modules["ddp"].lost_contact(error)
        if known:
            print(f"error{on_rank()}: {known}", file=sys.stderr, flush=True)
        elif known is None:
            if not (isinstance(error, BrokenPipeError) and reader_is_gone()):
                print(f"error{on_rank()}:\n" * bool(on_rank()) + traceback.format_exc(), end="", file=sys.stderr)
            if hint := hint_for(error):
                print("hint:", hint, file=sys.stderr, flush=True)
    except SystemExit as error:
        leave(error.code)
    leave(1)


def leave(code):
    """End the program, where ranks have joined at once: gloo's threads would abort it on its way out.

    A signal that waits decides the code; what failed meanwhile, such as saving on a full disk, was said before.
    """
    signals.heed()
    if joined_ranks():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(bool(code)))
    sys.exit(code)


def joined_ranks():
    """Tell whether this process has joined torchrun's process group."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return bool(dist and dist.is_available() and dist.is_initialized())


def on_rank():
    """Return " on rank 1" and so on for messages; "" on rank 0 and before the ranks have joined."""
    return f" on rank {launched_as()[0]}" if joined_ranks() and not is_first() else ""


def reader_is_gone():
    """Tell whether what read standard output, such as `head`, has ended; if so, what is left goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def counted(number, noun, plural=None):
    """Return a number with its noun: "1 image", "2 images"; `plural` is one that doesn't end in s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def nearest(word, known):
    """Return " Did you mean X?" for the known word nearest to `word`, or "" if none is near."""
    lower = {k.lower(): k for k in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" Did you mean {lower[match[0]]}?" if match else ""


# ---------------------------------------------------------------------------------------------------------------------
# Registries


class Registry:
    """Names of callables. `register_module` is the decorator; it also works as a plain call."""

    def __init__(self, kind):
        self.kind = kind
        self.entries = {}  # name -> {file that defines the callable: callable}

    def register_module(self, name=None, module=None):
        """Register a class or function under `name`, or else under its own name.

        Forms: `@R.register_module()`, `@R.register_module("Name")`, `R.register_module(module=X)`.
        """
        if callable(name):  # used without brackets
            name, module = None, name

        def add(obj):
            defined_in = sys.modules.get(getattr(obj, "__module__", None))
            file = relative(getattr(defined_in, "__file__", None) or "a built-in module")
            self.entries.setdefault(name or obj.__name__, {})[file] = obj
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
        """Return the file that defines what is registered as `name`, as seen from the repository."""
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


def import_files(paths):
    """Import files of models/; return {file as seen from the repository: exception} of those that fail.

    The dotted name makes relative imports work with or without `__init__.py`.
    """
    failures = {}
    for path in paths:
        try:
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        except (Exception, SystemExit) as error:  # whatever a user's file raises
            failures[relative(path)] = error
    return failures


def import_failure(file, error):
    """Return the sentence that says why a file of models/ can't be imported."""
    text = str(error).strip().split("\n")[0].rstrip(".")
    old = str(getattr(error, "name", None)).startswith("IMDLBenCo")
    cure = " Change that import to `from registry import MODELS`." if old else ""
    return f"{file} can't be imported: {type(error).__name__}{': ' * bool(text)}{text}.{cure}"


def find_model(name):
    """Import what is needed of models/ and return the callable registered as `name`.

    First the files whose text holds the name or that of its post function; all others only if that was in vain. Raises
    ImportError (from the file's own exception) where the file of the model or of its post function fails, UserError
    where there is no such model, with the nearest name, or where two files register it.
    """
    post_func = post_function_key(name)
    texts = {path: path.read_bytes().decode(errors="replace") for path in model_files()}
    words = rf"(?<!\w)({re.escape(name)}|{re.escape(post_func)})(?!\w)"
    mentions = [path for path, text in texts.items() if re.search(words, text)]
    failures = import_files(mentions)
    if name not in MODELS:
        failures |= import_files(path for path in texts if path not in mentions)
    defines = rf"^def {re.escape(post_func)}\b" + rf"|(?<!\w){re.escape(name)}(?!\w)" * (name not in MODELS)
    for path, text in texts.items():
        file = relative(path)
        if file in failures and (file in MODELS.entries.get(name, ()) or re.search(defines, text, re.M)):
            raise ImportError(import_failure(file, failures[file])) from failures[file]
    if name not in MODELS:
        raise UserError(" ".join([f"--model {name}: there is no such model in models/.{nearest(name, MODELS.entries)} "
                                  f"Known: {', '.join(sorted(MODELS.entries)) or 'none'}.",
                                  *(import_failure(file, error) for file, error in failures.items())]))
    return MODELS.get(name)


def build_model(name, model_args):
    """Call the model's constructor and return the model; UserError if that is no torch.nn.Module."""
    model = MODELS.get(name)(**model_args)
    if not callable(getattr(model, "forward", None)):
        raise UserError(f"--model {name}: {MODELS.file(name)} returned a {type(model).__name__}, no torch.nn.Module.")
    return model


def post_function_key(name):
    """Return what the post function of a model has to be registered as."""
    return f"{name.lower()}_post_func"


def refuse_misspelt(key, name):
    """Raise UserError where a post function of no model stands in the file of the model `name`, or is nearly named
    `key`, as its own would be."""
    def simple(word):
        return word.replace("_", "").lower()

    def near(words):
        close = difflib.get_close_matches(simple(key), set(map(simple, words)), n=9, cutoff=0.85)
        return [word for word in words if simple(word) in close]

    files = {word: path for path in model_files()
             for word in re.findall(r"(?i)\w*post_?func\w*", path.read_bytes().decode(errors="replace"))}
    import_files(dict.fromkeys(files[word] for word in near(files)))
    found = {*near(POSTFUNCS.entries)}
    found |= {word for word in POSTFUNCS.entries if POSTFUNCS.file(word) == MODELS.file(name)}
    if found:
        import_files(model_files())  # only then is it known which ones belong to a model
        for word in sorted(found - {post_function_key(model) for model in MODELS.entries}):
            raise UserError(f"{POSTFUNCS.file(word)} registers the post function {word}, which belongs to no model. If "
                            f"it is meant for {name}, register it as {key}; else take it out.")


def post_function(name, model_args):
    """Return the post function of a model with its own flags bound, or None if the model has none.

    UserError where it has none but another is registered that belongs to no model and is nearly named so.
    """
    key = post_function_key(name)
    if key not in POSTFUNCS:
        refuse_misspelt(key, name)
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
    """Return {parameter: text} from the docstrings of a class and its constructor, in Google's style.

    That is `name: text` or `name (type): text`; a text goes on over lines that are indented deeper.
    """
    doc = inspect.getdoc(model) or ""
    if inspect.isclass(model):
        doc += "\n" + (inspect.getdoc(model.__init__) or "")
    found = {}
    for name in parameters(model):
        match = re.search(rf"^( *){name}(?: *\(.*?\))?:(.*(?:\n\1 +.*)*)", doc, re.M)
        if match:
            found[name] = " ".join(match[2].split())
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
    if None in choices:
        choices, optional = tuple(choice for choice in choices if choice is not None), True
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
    """Add the constructor parameters of a model as flags, except those that are flags of the script already."""
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


def is_given(name, argv=None):
    """Tell whether a command line (default: this program's) gives the flag `--name` or `--no-name`."""
    argv = sys.argv[1:] if argv is None else argv
    return any(word.split("=")[0] in (f"--{name}", f"--no-{name}") for word in argv)


def is_pretrained_flag(parameter):
    """Tell whether a bool parameter asks for pretrained weights, by its name `pretrained...` or `..._pretrain`."""
    named = parameter.name.startswith("pretrained") or parameter.name.endswith("_pretrain")
    return named and bool in (parameter.annotation, type(parameter.default))


def is_starting_weights(parameter):
    """Tell whether a parameter only says which weights a training starts from: a bool as above, or an optional path."""
    named = parameter.name.startswith("pretrained") or parameter.name.endswith("_path")
    return is_pretrained_flag(parameter) or named and parameter.default is not parameter.empty


def without_starting_weights(name, model_args, argv=None):
    """Return a model's arguments for a model that a checkpoint is loaded into.

    Nothing is fetched or read that the checkpoint replaces: unless the command line gives it, a bool `pretrained...`
    is False and an optional path stays at its default.
    """
    model_args = dict(model_args)
    for parameter in parameters(MODELS.get(name)).values():
        if parameter.name in model_args and is_starting_weights(parameter) and not is_given(parameter.name, argv):
            model_args[parameter.name] = False if is_pretrained_flag(parameter) else parameter.default
    return model_args


TRAINED_WITH = ("model", "image_size", "if_resizing", "if_padding", "edge_mask_width", "if_not_amp", "amp_dtype",
                "no_model_eval")


def flags_of_training(name, stored):
    """Return the names of the flags that a checkpoint, which stores {flag: value}, passes on to the model `name`.

    The weights to start from are among them where it leaves frozen weights out (--save_trainable_only).
    """
    own = parameters(MODELS.get(name)).values() if stored.get("model", name) == name else ()
    partial = stored.get("save_trainable_only")
    return [*TRAINED_WITH, *(parameter.name for parameter in own if partial or not is_starting_weights(parameter))]


def take_stored(parser, names, stored, source, argv):
    """Make what a checkpoint stores of the flags `names`, and `argv` leaves out, the parser's defaults.

    Returns it as words of a command line, for the log. Raises UserError where a value doesn't suit its flag.
    """
    if is_given("if_resizing", argv) or is_given("if_padding", argv):
        names = [name for name in names if name not in ("if_resizing", "if_padding")]
    words = []
    for action in parser._actions:
        key, value = action.dest, plain(stored.get(action.dest))
        if key not in names or key not in stored or is_given(key, argv):
            continue
        if value == plain(action.default) and (not value or key != "image_size"):
            continue
        values, is_switch = value if isinstance(value, list) else [value], action.nargs == 0
        if is_switch or isinstance(action, BoolFlag):
            suits = isinstance(value, bool)
        else:
            suits = isinstance(value, list) == (action.nargs == "+") and all(suits_flag(action, one) for one in values)
        if not suits:
            raise UserError(f"{source} stores {value!r} for --{key}, which that flag doesn't take: give --{key}.")
        parser.set_defaults(**{key: stored[key]})
        action.required = False
        words += [f"--{key}", *map(str, [] if is_switch else values)]
    return words


def suits_flag(action, value):
    """Tell whether a flag could have given this value."""
    try:
        return (action.type or str)(str(value)) == value and (not action.choices or value in action.choices)
    except (ValueError, argparse.ArgumentTypeError):
        return False


def plain(value):
    """Return a value for comparison: what a command line gives as a list, a default may hold as a tuple."""
    return list(value) if isinstance(value, tuple) else value


def print_once(text):
    """Print from torchrun's first process, also before the process group is there."""
    if is_first():
        show(visible(text))


def note_changes(stored, source, values):
    """Print which of {flag: value} differ from those that a checkpoint stores."""
    for key, value in values.items():
        if key in stored and plain(stored[key]) != plain(value):
            print_once(f"note: --{key} was {stored[key]} in {source} and is {value} now")


def refuse_empty(parser, argv):
    """Raise UserError for an empty argument, unless it may be the value of the flag before it."""
    count = {option: action.nargs for action in parser._actions for option in action.option_strings}
    for word, before in zip(argv, ["", *argv]):
        if not word.strip() and (not before.startswith("--") or "=" in before or count.get(before) is not None):
            raise UserError(f"there is an empty argument after {before or 'the name of the script'}. Most often a line "
                            "ends in a backslash and blanks: let nothing follow the backslash, or the lines below are "
                            "no part of the command; or a variable of the shell is empty.")


def parse_args(parser, argv=None, find_stored=None):
    """Parse a script's command line together with the flags of the model it names.

    Args:
        parser: from `script_parser`
        argv: list of words; default: this program's
        find_stored: given by scripts that load a checkpoint: a function from the script's own flags (a Namespace) to
            the checkpoint's path and the {flag: value} of its training. What the command line leaves out of
            TRAINED_WITH and of the model's own flags is then taken from there, and nothing is fetched to start from,
            unless the checkpoint leaves frozen weights out (--save_trainable_only)

    Returns:
        (args, model_args): the script's flags as a Namespace, and the keyword arguments of the model's constructor. A
        parameter of the constructor that has the name of a script's flag receives that flag's value.

    Raises:
        UserError: a mistake on the command line, or a flag that neither it nor the checkpoint gives
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--model", type=str.strip)
    first.add_argument("-h", "--help", action="store_true")
    try:
        asked = first.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        asked = argparse.Namespace(model=None, help=False)
    refuse_empty(parser, argv)
    if asked.help and not asked.model:
        parser.epilog = "--model NAME --help also shows that model's flags; tools/list_models.py lists all models."
        parser.print_help()
        sys.exit(0)
    source, stored = "", {}
    if not asked.help:
        args = parser.parse_known_args(argv)[0]  # the script's own flags first: a mistake there needs no model
        if find_stored:
            source, stored = find_stored(args)
            fitted = args.if_resizing or args.if_padding or stored.get("if_resizing") or stored.get("if_padding")
            missing = ["--model"] * (not (args.model or stored.get("model")))
            missing += ["--if_resizing or --if_padding"] * (not fitted)
            if missing:
                raise UserError(f"--checkpoint_path {source} does not say how it was trained: give "
                                f"{' and '.join(missing)}, and the other flags of the training (--image_size, the "
                                "model's own).")
    name = asked.model or stored.get("model") or ""
    if not name or not isinstance(name, str):
        raise UserError(f"--model {name!r}: give the name of a model.")
    model = find_model(name)
    script_flags = [action.dest for action in parser._actions if action.dest != "help"]
    add_model_flags(parser, name, model)
    names = [key for key in flags_of_training(name, stored) if key in TRAINED_WITH or key not in script_flags]
    partial = stored.get("save_trainable_only")
    names += ["seed"] * bool(partial)  # of frozen weights that nothing was read for
    for action in parser._actions if find_stored else ():
        if action.dest in parameters(model) and is_pretrained_flag(parameters(model)[action.dest]):
            action.required = False  # no weights are fetched, so nothing has to be said about them
    taken = take_stored(parser, names, stored, source, argv)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise UserError(f"{word} belongs to no flag. {parser.prog} --help lists the flags.")
        raise UserError(f"unknown flag {word}: neither {parser.prog} nor {name} has it.{nearest(word, flags)}")
    args = argparse.Namespace(**{key: getattr(values, key) for key in script_flags})
    model_args = {key: getattr(values, key) for key in parameters(model) if hasattr(values, key)}
    if find_stored:
        if not partial:
            model_args = without_starting_weights(name, model_args, argv)
        if taken:
            print_once(f"taken from {source}: {shlex.join(taken)}")
        untold = [key for key in names if key not in (*TRAINED_WITH, *stored) and not is_given(key, argv)]
        if stored and untold:  # IMDL-BenCo stores no flags of the model
            defaults = " ".join(f"--{key} {model_args[key]}" for key in untold if key in model_args)
            print_once(f"note: {source} does not store these flags of {name}, whose defaults are used: {defaults}")
        note_changes(stored, source, {key: value for key, value in vars(values).items() if key in names})
    return args, model_args


def usable_cpus():
    """Return how many CPUs this process may use, its share of them where torchrun started several on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(cpus // max(int(local) if local.isdecimal() else 1, 1), 1)


def script_parser(doc, trains=False, evaluates=True, **defaults):
    """Return a Parser with the flags that all scripts share; `defaults` replaces defaults (such as output_dir).

    `trains` is True for the script that no checkpoint tells its model, `evaluates` False for one without metrics.
    """
    parser = Parser(description=doc)
    group = parser.add_argument_group("model and data" if trains else "model and data (default: as in the training)")
    group.add_argument("--model", required=trains, help="registered name (python tools/list_models.py lists them)")
    group.add_argument("--image_size", type=positive, default=512,
                       help="side of the square that images are brought to, in pixels (default: %(default)s)")
    group.add_argument("--if_resizing", action="store_true",
                       help="resize images to image_size (bilinear, masks nearest)")
    group.add_argument("--if_padding", action="store_true",
                       help="pad with black at the right and bottom; larger images are cropped (logged once)")
    group.add_argument("--edge_mask_width", type=positive, default=None,
                       help="width of the boundary band in edge_mask, in pixels (default: no edge_mask)")
    group.add_argument("--test_batch_size", type=positive, default=2,
                       help="images per process and step in evaluation (default: %(default)s)")
    group.add_argument("--no_model_eval", action="store_true",
                       help="evaluate in training mode (dropout on, batch statistics), as some published tables did")
    group.add_argument("--no_fingerprint", action="store_true",
                       help="don't read every file of a dataset to print its fingerprint")
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=None, help="folder for all that the run writes (default: %(default)s)")
    group.add_argument("--device", default="cuda",
                       help="cuda, cuda:<number> or cpu; without a GPU, cuda means cpu (default: %(default)s)")
    group.add_argument("--seed", type=natural, default=42,
                       help="seed of everything that is random (default: %(default)s)")
    group.add_argument("--num_workers", type=natural, default=min(8, usable_cpus()),
                       help="processes per rank that load images; 0 = none (default: the rank's share of the CPUs that "
                            "may be used, at most 8)")
    group.add_argument("--pin_mem", action="store_true", default=True, dest="pin_mem",
                       help="pinned memory for transfers to a GPU (on by default)")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="turn pinned memory off")
    group.add_argument("--if_not_amp", action="store_true", help="no mixed precision (it is used on CUDA only)")
    group.add_argument("--amp_dtype", choices=["float16", "bfloat16"], default="float16",
                       help="of mixed precision; bfloat16 is coarser but doesn't overflow (default: %(default)s)")
    group.add_argument("--dist_timeout", type=minutes, default=10.0, metavar="MINUTES",
                       help="of several processes: how long to wait for one that doesn't answer, before the run ends; "
                            "reading datasets and starting weights is not limited (default: %(default)g)")
    group.add_argument("--no_progress", action="store_true", help="hide the progress of evaluation, saving and reading")
    if evaluates:
        group = parser.add_argument_group("metrics and curves")
        group.add_argument("--metrics", nargs="+", default=None, metavar="NAME",
                           help="replaces the list in the script: PixelF1, ImageAUC, ..., all, pixel or image; others' "
                                "definitions as PixelF1:imdlbenco (README.md has the table)")
        group.add_argument("--threshold", type=finite, default=None,
                           help="what is above it counts as tampered, for the metrics that have a threshold (default: "
                                "that of the script's list, 0.5)")
        group.add_argument("--score_from", choices=["max", "mean", "top1%"], default=None,
                           help="judge images by a score pooled from the predicted mask instead of pred_label: its "
                                "maximum, its mean, or the mean of its highest 1%%")
        group.add_argument("--eval_size", choices=["network", "original"], default="network",
                           help="judge masks at the size of the model's input, or at each image's own, to which the "
                                "map is brought back (default: %(default)s)")
        group.add_argument("--if_predict_label", action="store_true",
                           help="the image-level metrics too (the model must return pred_label)")
        group.add_argument("--log_dir", default=None, help="folder for TensorBoard events (default: output_dir)")
    for flag in ("--world_size", "--local_rank", "--dist_url"):  # IMDL-BenCo's launchers pass what torchrun decides
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)
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


def finite(text):
    """argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def rate(text):
    """argparse type: a finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return value


def minutes(text):
    """argparse type: a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value
