"""registry.py: finding models, their flags, and the messages for mistakes.

    python -m pytest tests/test_registry.py

Most tests write small model files (without torch) into a repository of their own that holds a copy of registry.py, and
import that copy in place of the real one.
"""
import ast
import importlib
import pickle
import shutil
import sys
import textwrap

import pytest

from conftest import ROOT, run_script

PLAIN = """
    from registry import MODELS

    @MODELS.register_module()
    class {name}:
        def forward(self):
            return "{name}"
"""
LOOP = """
    from registry import MODELS

    class Other: pass

    for name in ({names}):
        MODELS.register_module(name)(Other)
"""


class Repository:
    """A folder with registry.py and models/; `registry` is that copy, imported."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "models").mkdir()
        shutil.copy(ROOT / "registry.py", folder)
        shutil.copy(ROOT / "models" / "__init__.py", folder / "models")
        self.registry = importlib.import_module("registry")

    def write(self, name, text):
        """Write a file of models/."""
        path = self.folder / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def find(self, name):
        return self.registry.find_model(name)

    def imported(self):
        """Return the files of models/ that were imported."""
        return {name.removeprefix("models.") for name in sys.modules if name.startswith("models.")}

    def mistake(self, name):
        """Look for a model in vain and return the message."""
        with pytest.raises((self.registry.UserError, ImportError)) as caught:
            self.find(name)
        return str(caught.value)

    def parse(self, line, stored=None):
        """Parse a script's command line; `stored` is what a checkpoint c.pth stores, None for a script that trains."""
        parser = self.registry.script_parser("A script.", trains=stored is None, output_dir="out")
        find_stored = None if stored is None else lambda args: ("c.pth", stored)
        return self.registry.parse_args(parser, line.split(), find_stored)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    def ours():
        return [name for name in sys.modules if name in ("registry", "models") or name.startswith("models.")]

    monkeypatch.syspath_prepend(str(tmp_path))
    saved = {name: sys.modules.pop(name) for name in ours()}
    yield Repository(tmp_path)
    for name in ours():
        del sys.modules[name]
    sys.modules.update(saved)


# ---------------------------------------------------------------------------------------------------------------------
# Finding models


def test_class_and_function(repo):
    repo.write("net.py", PLAIN.format(name="Net"))
    repo.write("function.py", """
        from registry import MODELS
        from .net import Net

        @MODELS.register_module(name="Small")
        def build(width: int = 3):
            net = Net()
            net.width = width
            return net
    """)
    _, model_args = repo.parse("--model Net")
    assert repo.registry.build_model("Net", model_args).forward() == "Net"
    _, model_args = repo.parse("--model Small --width 5")
    assert repo.registry.build_model("Small", model_args).width == 5


@pytest.mark.parametrize("form", [
    '@MODELS.register_module()\nclass Net: pass',
    '@MODELS.register_module\nclass Net: pass',
    '@MODELS.register_module(name=None)\nclass Net: pass',
    '@MODELS.register_module("Net")\nclass Other: pass',
    '@MODELS.register_module(name="Net")\ndef other(): pass',
    'class Net: pass\nMODELS.register_module()(Net)',
    'class Net: pass\nMODELS.register_module(module=Net)',
    'class Other: pass\nMODELS.register_module("Net", Other)',
    'def add(name, cls):\n    MODELS.register_module(name)(cls)\nclass Other: pass\nadd("Net", Other)',
    'class Other: pass\nfor size in ("N", "M"):\n    MODELS.register_module(size + "et")(Other)',
    'if True:\n    @MODELS.register_module()\n    class Net: pass',
    'from models.sub.help import register\n@register\nclass Net: pass',
])
def test_forms_of_registration(repo, form):
    """The name need not be the file's; a call, a helper of the file's own or of another file, and a loop will do."""
    repo.write("some_file.py", f"from registry import MODELS\n{form}\n")
    repo.write("other.py", PLAIN.format(name="Unasked"))
    repo.write("sub/help.py", """
        from registry import MODELS

        def register(cls):
            return MODELS.register_module()(cls)
    """)
    assert repo.find("Net").__name__ in ("Net", "Other", "other")
    assert repo.registry.MODELS.file("Net") == "models/some_file.py"


@pytest.mark.parametrize("init", [None, "", "from .net import Net\n"])
def test_folder_with_relative_imports(repo, init):
    repo.write("folder/parts/layer.py", "from ..common import WIDTH\n")
    repo.write("folder/common.py", "WIDTH = 7\n")
    repo.write("folder/net.py", PLAIN.format(name="Net") + "        from .parts.layer import WIDTH as width\n")
    if init is not None:
        repo.write("folder/__init__.py", init)
    assert repo.find("Net").width == 7


def test_model_in_init_file(repo):
    repo.write("folder/__init__.py", PLAIN.format(name="Net"))
    assert repo.find("Net").__module__ == "models.folder"


def test_only_what_is_asked_for_is_imported(repo, capfd):
    """Files with other models, with errors, or in hidden folders (an editor's copies) don't matter."""
    repo.write("net.py", PLAIN.format(name="Net"))
    repo.write("a_loud.py", "print('imported')\n" + textwrap.dedent(PLAIN.format(name="Loud")))
    repo.write("a_broken.py", "def broken(:\n")
    repo.write("a_crash.py", "1 / 0\n")
    repo.write("a_latin.py", "")
    (repo.folder / "models/a_latin.py").write_bytes(b"# Netz gr\xf6\xdfer\n")
    repo.write("a_loop.py", LOOP.format(names="'A', 'B'"))
    repo.write(".ipynb_checkpoints/net-checkpoint.py", PLAIN.format(name="Net"))
    assert repo.find("Net").__module__ == "models.net"
    assert repo.imported() == {"net"}
    assert capfd.readouterr() == ("", "")


def test_broken_file_that_mentions_the_model(repo):
    """A file whose registrations can't be told is imported where it mentions the name; that it fails is no matter."""
    repo.write("net.py", PLAIN.format(name="Net"))
    repo.write("a_wrapper.py", "from registry import MODELS\nMODELS.register_module('Wrapped Net')(object)\n1 / 0\n")
    repo.write("b_broken.py", "Net = (\n")
    assert repo.find("Net").__module__ == "models.net"


@pytest.mark.parametrize("text, reason", [
    ("import no_such_package\n", "No module named 'no_such_package'"),
    ("\n\nraise SystemExit('stop')\n", "SystemExit: stop"),
    ("from .part import x\n", "ZeroDivisionError: division by zero"),
    ("def f(:\n", "SyntaxError: invalid syntax"),
])
@pytest.mark.parametrize("first", [True, False])
def test_file_that_fails_to_import(repo, text, reason, first):
    """Before or after the model is registered; the file's own exception is kept, and its traceback with it."""
    repo.write("part.py", "x = 1\nx / 0\n")
    registration = "from registry import MODELS\n@MODELS.register_module()\nclass Net: pass\n"
    repo.write("net.py", text + registration if first else registration + text)
    with pytest.raises(ImportError) as caught:
        repo.find("Net")
    message = str(caught.value)
    assert message.startswith("models/net.py can't be imported: ") and reason in message and "\n" not in message
    assert type(caught.value.__cause__).__name__ in message


def test_file_for_imdlbenco(repo):
    repo.write("net.py", PLAIN.format(name="Net").replace("from registry", "from IMDLBenCo.registry"))
    assert repo.mistake("Net") == ("models/net.py can't be imported: ModuleNotFoundError: No module named 'IMDLBenCo'. "
                                   "Change that import to `from registry import MODELS`.")


def test_broken_file_of_a_model_that_cannot_be_told(repo):
    repo.write("net.py", "def f(:\nMODELS.register_module('Net')(f)\n")
    assert "models/net.py can't be imported: SyntaxError" in repo.mistake("Net")


@pytest.mark.parametrize("second", [
    PLAIN.format(name="Net"),
    "from registry import MODELS\ndef Net(): pass\nMODELS.register_module(module=Net)\n",
    LOOP.format(names="'Net', 'Nut'"),
])
def test_two_files_with_one_name(repo, second):
    repo.write("net.py", PLAIN.format(name="Net"))
    repo.write("folder/copy.py", second)
    assert repo.mistake("Net") == ("models/folder/copy.py and models/net.py both register the model Net: "
                                   "rename one of them.")


def test_unknown_model(repo):
    repo.write("net.py", PLAIN.format(name="NoiseNet"))
    repo.write("loop.py", LOOP.format(names="'Loop' + n for n in '12'"))
    assert repo.mistake("noisnet") == ("--model noisnet: there is no such model in models/. Did you mean NoiseNet? "
                                       "Known: Loop1, Loop2, NoiseNet.")
    assert "Did you mean Loop2?" in repo.mistake("loop_2")
    for strange in ("*", "Noise(Net", "["):
        assert repo.mistake(strange).startswith(f"--model {strange}: there is no such model in models/.")
    with pytest.raises(repo.registry.UserError, match="--model '': give the name of a model"):
        repo.registry.parse_args(repo.registry.script_parser("A script.", output_dir="out"), ["--model="])


def test_post_function(repo):
    """It may stand in a file of its own, takes the model's flags that it names, and goes to a worker by pickle."""
    repo.write("net.py", """
        from registry import MODELS

        @MODELS.register_module()
        class NoiseNet:
            def __init__(self, level: int = 2, other: int = 0): pass
            def forward(self): pass
    """)
    repo.write("net_post.py", """
        from registry import POSTFUNCS

        @POSTFUNCS.register_module()
        def noisenet_post_func(data_dict, level=0, own=4):
            data_dict["sum"] = level + own
    """)
    args, model_args = repo.parse("--model NoiseNet --level 7")
    function = pickle.loads(pickle.dumps(repo.registry.post_function(args.model, model_args)))
    sample = {}
    function(sample)
    assert sample == {"sum": 11}
    repo.write("plain.py", PLAIN.format(name="Plain"))
    assert repo.find("Plain") and repo.registry.post_function("Plain", {}) is None


@pytest.mark.parametrize("registered, file, refused", [
    ("plane_post_func", "other.py", True), ("Plain_post_func", "other.py", True), ("plain_postfunc", "other.py", True),
    ("plain_post_function", "other.py", True), ("prepare", "plain.py", True),
    ("plain2_post_func", "other.py", False),  # that of Plain2
    ("prepare", "other.py", False), ("noise_residual_net_post_func", "other.py", False),
])
def test_post_function_of_no_model(repo, registered, file, refused):
    """It would silently not be used."""
    repo.write("plain.py", PLAIN.format(name="Plain"))
    repo.write("plain2.py", PLAIN.format(name="Plain2"))
    text = f"""
    from registry import POSTFUNCS

    @POSTFUNCS.register_module("{registered}")
    def function(data_dict): pass
    """
    repo.write(file, (PLAIN.format(name="Plain") if file == "plain.py" else "") + text)
    repo.find("Plain")
    if not refused:
        assert repo.registry.post_function("Plain", {}) is None
        return
    with pytest.raises(repo.registry.UserError) as caught:
        repo.registry.post_function("Plain", {})
    assert str(caught.value) == (f"models/{file} registers the post function {registered}, which belongs to no model. "
                                 "If it is meant for Plain, register it as plain_post_func; else take it out.")


@pytest.mark.parametrize("words, after", [
    (["--lr", "1", " ", "--epochs", "2"], "1"), (["--if_resizing", ""], "--if_resizing"),
    (["--metrics", "PixelF1", "  "], "PixelF1"), (["--metrics", " "], "--metrics"), (["--lr=1", ""], "--lr=1"),
    ([""], "the name of the script"), (["--log_dir", ""], None), (["--of_the_model", ""], None)])
def test_empty_arguments(repo, words, after):
    """A backslash with blanks behind it ends the command with one, so that flags on later lines are missing."""
    parser = repo.registry.script_parser("A script.", trains=True, output_dir="out")
    with pytest.raises(repo.registry.UserError) as caught:
        repo.registry.parse_args(parser, words)
    assert ("there is an empty argument" in str(caught.value)) == (after is not None)
    assert after is None or f"an empty argument after {after}. Most often a line ends" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

FLAGS = """
    {future}
    from typing import TYPE_CHECKING, Dict, List, Literal, Optional, Union
    from registry import MODELS
    if TYPE_CHECKING:
        from nowhere import Unknown

    @MODELS.register_module()
    class Net:
        def __init__(self, count: int, word, rate: float = 0.5, name: str = "50% grey", deep: bool = False,
                     wide: bool = True, limit: Optional[int] = None, path: "str | None" = None,
                     kind: Literal["a", "b"] = "a", side: Literal[7, 14] = 7,
                     taste: Optional[Literal["x", "y"]] = "x", sizes: List[int] = (1, 2),
                     weights: Optional[list[float]] = None, plain=3, plain_bool=False, plain_list=[1.5], nothing=None,
                     either: Union[int, str] = "auto", table: Dict[str, int] = {{}}, odd: "Unknown" = 4,
                     image_size: int = 224, edge_mask_width: int = 3, **kwargs):
            pass
        def forward(self): pass
"""


@pytest.fixture(params=["", "from __future__ import annotations"])
def flags(repo, request):
    """A repository whose Net has parameters of all kinds; returns a function: flags -> constructor's arguments."""
    repo.write("net.py", FLAGS.format(future=request.param))
    return lambda line="", needed="--count 4 --word ab": repo.parse(f"--model Net {needed} {line}")[1]


def test_defaults(flags):
    assert flags("--edge_mask_width 9") == dict(
        count=4, word="ab", rate=0.5, name="50% grey", deep=False, wide=True, limit=None, path=None, kind="a", side=7,
        taste="x", sizes=(1, 2), weights=None, plain=3, plain_bool=False, plain_list=[1.5], nothing=None,
        either="auto", odd=4, image_size=512, edge_mask_width=9)


@pytest.mark.parametrize("line, key, value", [
    ("--rate 1e-3", "rate", 1e-3), ("--name=x", "name", "x"), ("--name none", "name", "none"),
    ("--deep", "deep", True), ("--deep true", "deep", True), ("--deep=false", "deep", False),
    ("--no-wide", "wide", False), ("--wide False", "wide", False), ("--no-deep", "deep", False),
    ("--limit 5", "limit", 5), ("--limit none", "limit", None),
    ("--path None", "path", None), ("--path a/b", "path", "a/b"),
    ("--kind b", "kind", "b"), ("--side 14", "side", 14), ("--taste none", "taste", None), ("--taste y", "taste", "y"),
    ("--sizes 3 4 5", "sizes", [3, 4, 5]), ("--weights 1 .5", "weights", [1.0, 0.5]),
    ("--plain 5", "plain", 5), ("--plain_bool", "plain_bool", True), ("--plain_list 2 3", "plain_list", [2.0, 3.0]),
    ("--nothing x", "nothing", "x"), ("--either 5", "either", "5"), ("--odd 6", "odd", 6),
    ("--image_size 96", "image_size", 96),
])
def test_values(flags, line, key, value):
    given = flags(line)[key]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize("annotation, line, value", [
    ("Literal[0, 1]", "--x 1", 1), ("Literal[1, 'a']", "--x a", "a"), ("Literal['a', 1]", "--x 1", 1),
    ("Literal[True, False]", "--no-x", False), ("list[bool]", "--x true False", [True, False]),
    ("Sequence[int]", "--x 3 4", [3, 4]), ("Union[int, float]", "--x 0.5", 0.5),
    ("Optional[Literal['a']]", "--x none", None),
])
def test_rarer_annotations(repo, annotation, line, value):
    repo.write("net.py", f"""
from collections.abc import Sequence
from typing import Literal, Optional, Union
from registry import MODELS

@MODELS.register_module()
class Net:
    def __init__(self, x: {annotation} = 5): pass
""")
    given = repo.parse(f"--model Net {line}")[1]["x"]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize("line, message", [
    ("--limit five", "--limit: invalid int value: 'five'"),
    ("--kind c", "--kind: invalid choice: 'c' (choose from 'a', 'b')"),
    ("--side 8", "--side: invalid choice: 8 (choose from 7, 14)"),
    ("--wide maybe", "--wide: 'maybe' is neither true nor false"),
    ("--sizes 3 x", "--sizes: invalid int value: 'x'"),
    ("--image_size 0", "--image_size: '0' is not a whole number of at least 1"),
    ("--rat 3", "unknown flag --rat: neither {prog} nor Net has it. Did you mean --rate?"),
    ("--image-size=3", "unknown flag --image-size: neither {prog} nor Net has it. Did you mean --image_size?"),
    ("--table 3", "unknown flag --table: neither {prog} nor Net has it."),
    ("--rate 3 4", "4 belongs to no flag. {prog} --help lists the flags."),
    ("--device", "--device: expected one argument"),
])
def test_wrong_flags(flags, repo, line, message):
    with pytest.raises(repo.registry.UserError) as caught:
        flags(line)
    prog = repo.registry.Parser().prog
    assert str(caught.value).startswith(message.format(prog=prog)) and "\n" not in str(caught.value)


def test_missing_flags(flags, repo):
    with pytest.raises(repo.registry.UserError, match="the following arguments are required: --word"):
        flags(needed="--count 4")
    with pytest.raises(repo.registry.UserError, match="the following arguments are required: --model"):
        repo.parse("--image_size 3")
    with pytest.raises(repo.registry.UserError, match="--model: expected one argument"):
        repo.parse("--model")


def test_parameter_that_cannot_be_a_flag(repo):
    repo.write("net.py", "from registry import MODELS\n@MODELS.register_module()\ndef Net(table: dict): pass\n")
    with pytest.raises(repo.registry.UserError, match="models/net.py: parameter 'table' of Net .* can't become a flag"):
        repo.parse("--model Net")


def test_wrong_flag_of_the_script_needs_no_model(repo):
    repo.write("net.py", "print('imported')\n" + textwrap.dedent(PLAIN.format(name="Net")))
    with pytest.raises(repo.registry.UserError, match="--seed: 'x' is not a whole number of at least 0"):
        repo.parse("--model Net --seed x")
    assert not repo.imported()


GOOGLE = """A net.

    Args:
        size: side of the window,
            in % of the image
        rate (float, optional): a rate

    Returns:
        size: not this one
"""
@pytest.mark.parametrize("cls_doc, init_doc", [
    (GOOGLE, ""), ("A net.", GOOGLE), (None, GOOGLE),
])
def test_help_from_docstrings(repo, cls_doc, init_doc):
    class Net:
        __doc__ = cls_doc

        def __init__(self, size: int, rate: float = 0.5, bare: int = 1):
            pass

        __init__.__doc__ = init_doc

    assert repo.registry.parameter_help(Net) == {"size": "side of the window, in % of the image", "rate": "a rate"}


def test_help(repo, capsys):
    repo.write("net.py", FLAGS.format(future="from __future__ import annotations"))
    with pytest.raises(SystemExit) as end:
        repo.parse("--help")
    alone = capsys.readouterr().out
    assert end.value.code == 0 and "--if_resizing" in alone and "--count" not in alone
    assert "--model NAME --help" in alone
    assert not repo.imported()
    with pytest.raises(SystemExit) as end:
        repo.parse("--model Net --help")
    both = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--if_resizing" in both and "flags of Net (models/net.py)" in both
    for text in "--count COUNT (required)", "(default: 50% grey)", "--no-deep", "{a,b}":
        assert text in both
    with pytest.raises(repo.registry.UserError, match="no such model"):
        repo.parse("--model Nat --help")


# ---------------------------------------------------------------------------------------------------------------------
# Errors, as a user sees them


def test_errors_are_one_line(repo, capsys, monkeypatch):
    run, UserError = repo.registry.exit_on_user_error, repo.registry.UserError

    def fail(error):
        raise error

    in_worker = "Caught UserError in worker 0.\nTraceback:\n  File x\nregistry.UserError: a.png is empty:\ncopy it.\n"
    for text, line in ("--x: wrong.", "error: --x: wrong.\n"), (in_worker, "error: a.png is empty:\\ncopy it.\n"):
        with pytest.raises(SystemExit) as end:
            run(lambda: fail(UserError(text)))
        assert end.value.code == 1 and capsys.readouterr() == ("", line)
    assert run(lambda: 5) == 5
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)  # before the process group is there all ranks meet the same mistake
    with pytest.raises(SystemExit) as end:
        run(lambda: fail(UserError("--x: wrong.")))
    assert end.value.code == 1 and capsys.readouterr() == ("", "")
    # any other exception keeps its traceback, and gets a hint where there is one
    def backward():
        fail(ValueError("CUDA out of memory"))

    refused = "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast."  # torch's words
    for error, hint in ((ValueError("CUDA out of memory"), "hint: lower --batch_size, --test"), (ValueError("x"), ""),
                        (ValueError(refused), "hint: leave out the sigmoid"), (backward, "hint: the backward pass")):
        with pytest.raises(SystemExit) as end:
            run(error if error is backward else lambda: fail(error))
        error = "CUDA out of memory" if error is backward else error
        printed = capsys.readouterr().err
        assert end.value.code == 1 and printed.startswith("Traceback") and "test_registry.py" in printed
        assert f"ValueError: {error}\n" in printed and printed.splitlines()[-1].startswith(hint or "ValueError")


def test_mistake_in_a_script(tmp_path):
    done = run_script("train.py", "--model", "MyModel", "--data_path", "x", "--kernl_size", 3, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("error: unknown flag --kernl_size: neither train.py nor MyModel has it. Did you mean "
                           "--kernel_size?\n")


def test_imports_point_one_way():
    """No circle among our modules, and nothing at the top imports tools/."""
    imports = {}
    for path in ROOT.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "tools" not in names
        imports[path.stem] = {name for name in names if (ROOT / f"{name}.py").exists()} - {"test"}
    assert imports["registry"] == {"signals"} and imports["signals"] == set()
    while imports:  # take away what imports nothing that is left
        free = {name for name, needs in imports.items() if not needs & set(imports)}
        assert free, imports
        imports = {name: needs for name, needs in imports.items() if name not in free}


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint knows

TRAINED = {"model": "Net", "image_size": 96, "if_padding": True, "if_resizing": False, "edge_mask_width": 7,
           "if_not_amp": False, "lr": 0.1, "count": 4, "word": "-x", "deep": True, "wide": False, "sizes": (3, 4),
           "limit": None, "taste": None, "weights": [0.5], "rate": 0.5, "name": "a b", "either": "5", "seed": 9}


def test_what_the_command_line_leaves_out_comes_from_the_checkpoint(flags, repo, capsys):
    args, model_args = repo.parse("", TRAINED)
    assert (args.model, args.image_size, args.if_padding, args.if_resizing, args.edge_mask_width, args.if_not_amp) == (
        "Net", 96, True, False, 7, False)
    assert args.seed == 42  # of no concern to the training
    assert model_args == {**flags(), "count": 4, "word": "-x", "deep": True, "wide": False, "sizes": (3, 4),
                          "taste": None, "weights": [0.5], "name": "a b", "either": "5", "image_size": 96,
                          "edge_mask_width": 7}
    said, untold = capsys.readouterr().out.splitlines()
    assert untold.startswith("note: c.pth does not store these flags of Net, whose defaults are used: --path None ")
    for words in ("taken from c.pth: ", "--model Net", "--image_size 96", "--if_padding", "--edge_mask_width 7",
                  "--word -x", "--deep True", "--wide False", "--sizes 3 4"):
        assert words in said
    assert not any(f"--{name}" in said for name in ("seed", "lr", "limit", "rate", "if_resizing", "if_not_amp"))


def test_the_command_line_wins_and_a_difference_is_said(flags, repo, capsys):
    args, model_args = repo.parse("--image_size 64 --if_resizing --no-deep --sizes 3 4 --count 4 --limit 5", TRAINED)
    assert (args.image_size, args.if_padding, args.if_resizing) == (64, False, True)
    assert not model_args["deep"] and model_args["sizes"] == [3, 4] and model_args["word"] == "-x"
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --")]
    assert sorted(notes) == [f"note: --{name} was {was} in c.pth and is {now} now" for name, was, now in (
        ("deep", True, False), ("if_padding", True, False), ("if_resizing", False, True), ("image_size", 96, 64),
        ("limit", None, 5))]


def test_another_model_takes_no_flags_of_the_stored_one(flags, repo, capsys):
    repo.write("other.py", """
        from registry import MODELS

        @MODELS.register_module()
        def Other(rate: float = 2): pass
    """)
    args, model_args = repo.parse("--model Other", {**TRAINED, "rate": 7.0})
    assert model_args == {"rate": 2} and args.image_size == 96
    assert "note: --model was Net in c.pth and is Other now" in capsys.readouterr().out


@pytest.mark.parametrize("line, stored, missing", [
    ("", {}, "--model and --if_resizing or --if_padding, and"),
    ("--model Net", {}, "--if_resizing or --if_padding, and"),
    ("--if_padding", {}, "--model, and"),
    ("", {"model": "Net", "lr": 1}, "--if_resizing or --if_padding, and"),
])
def test_a_checkpoint_that_stores_nothing_needs_the_flags(flags, repo, line, stored, missing):
    with pytest.raises(repo.registry.UserError) as caught:
        repo.parse(line, stored)
    assert str(caught.value).startswith(f"--checkpoint_path c.pth does not say how it was trained: give {missing}")


def test_missing_model_flags_and_strange_values(flags, repo):
    with pytest.raises(repo.registry.UserError, match="required: --count, --word"):
        repo.parse("--model Net --if_padding", {})
    for key, value in {"kind": "z", "image_size": -3, "rate": None, "deep": "yes", "sizes": 3, "count": [4]}.items():
        with pytest.raises(repo.registry.UserError, match=f"c.pth stores .* for --{key}, which that flag doesn't take"):
            repo.parse("", {**TRAINED, key: value})
        repo.parse(f"--{key} {dict(kind='a', deep='').get(key, 5)}", {**TRAINED, key: value})
    for key, value in {"weights": [-1e-5, 1.0], "sizes": [], "plain_list": [-3e-7], "limit": None}.items():
        assert repo.parse("", {**TRAINED, key: value})[1][key] == value
    with pytest.raises(repo.registry.UserError, match="--model Gone: there is no such model"):
        repo.parse("", {**TRAINED, "model": "Gone"})


def test_no_weights_to_start_from_are_fetched(repo, capsys):
    repo.write("net.py", """
        from typing import Optional
        from registry import MODELS

        @MODELS.register_module()
        def Net(pretrained: bool = True, net_pretrain=True, pretrained_dct: Optional[str] = None,
                start_path: str = "default.pth", data_path_like: str = "x"): pass

        @MODELS.register_module()
        def Bare(pretrained: bool, seed: int = 1): pass
    """)
    assert repo.parse("", {"model": "Bare", "if_padding": True, "pretrained": True, "seed": 7})[1] == {
        "pretrained": False, "seed": 42}  # which is the script's own flag, of concern to this run
    capsys.readouterr()
    stored = {"model": "Net", "if_padding": True, "pretrained": True, "net_pretrain": True, "pretrained_dct": "a.pth",
              "start_path": "b.pth", "data_path_like": "y"}
    left_out = {"pretrained": False, "net_pretrain": False, "pretrained_dct": None, "start_path": "default.pth",
                "data_path_like": "y"}
    assert repo.parse("", stored)[1] == left_out
    assert capsys.readouterr().out == "taken from c.pth: --model Net --if_padding --data_path_like y\n"
    given = repo.parse("--pretrained --pretrained_dct c.pth --start_path=d.pth", stored)[1]
    assert given == {**left_out, "pretrained": True, "pretrained_dct": "c.pth", "start_path": "d.pth"}
    training = repo.parse("--model Net --if_padding")[1]
    assert training["pretrained"] and training["start_path"] == "default.pth"
    resumed = repo.registry.without_starting_weights("Net", training, ["--model", "Net"])
    assert resumed == {**left_out, "data_path_like": "x"}
