"""registry.py: finding models, their flags, the messages for mistakes, and the listing.

    python -m pytest tests/test_registry.py

Most tests write small model files (without torch) into a repository of their own that holds a copy of registry.py, and
import that copy in place of the real one.
"""
import importlib
import pickle
import re
import shutil
import subprocess
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

    for name in ({names}):
        MODELS.register_module(name)(object)
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
        with pytest.raises(self.registry.UserError) as caught:
            self.find(name)
        return str(caught.value)

    def parse(self, line):
        """Parse a script's command line."""
        return self.registry.parse_args(self.registry.script_parser("A script.", output_dir="out"), line.split())


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


@pytest.mark.parametrize("text, place, reason", [
    ("import no_such_package\n", "models/net.py line 1 ", "No module named 'no_such_package'"),
    ("\n\nraise SystemExit('stop')\n", "models/net.py line 3 ", "SystemExit: stop"),
    ("from .part import x\n", "models/part.py line 2 ", "ZeroDivisionError: division by zero"),
    ("import vendor.models.deep\n", "models/net.py line 1 ", "ZeroDivisionError"),
    ("def f(:\n", "models/net.py line 1 ", "SyntaxError: invalid syntax"),
])
def test_file_that_fails_to_import(repo, text, place, reason):
    repo.write("part.py", "x = 1\nx / 0\n")
    repo.write("../vendor/models/deep.py", "x = 1\n\nx / 0\n")
    repo.write("net.py", text + "from registry import MODELS\n@MODELS.register_module()\nclass Net: pass\n")
    message = repo.mistake("Net")
    assert message.startswith(f"{place}can't be imported: ") and reason in message and "\n" not in message


def test_file_for_imdlbenco(repo):
    repo.write("net.py", PLAIN.format(name="Net").replace("from registry", "from IMDLBenCo.registry"))
    assert re.fullmatch(r"models/net.py line \d can't be imported: ModuleNotFoundError: No module named 'IMDLBenCo'\. "
                        r"Change that import to `from registry import MODELS`\.", repo.mistake("Net"))


def test_broken_file_of_a_model_that_cannot_be_told(repo):
    repo.write("net.py", "def f(:\nMODELS.register_module('Net')(f)\n")
    assert "models/net.py line 1 can't be imported: SyntaxError" in repo.mistake("Net")


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
    assert repo.mistake("noisnet") == ("--model noisnet: models/ registers no such model. Did you mean NoiseNet? "
                                       "Known: Loop1, Loop2, NoiseNet.")
    assert "Did you mean Loop2?" in repo.mistake("loop_2")


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
    ("--rat 3", "--rat: neither {prog} nor the model Net has this flag. Did you mean --rate?"),
    ("--image-size=3", "--image-size: neither {prog} nor the model Net has this flag. Did you mean --image_size?"),
    ("--table 3", "--table: neither {prog} nor the model Net has this flag."),
    ("--rate 3 4", "4: neither {prog} nor the model Net has this flag. Values follow a flag that starts with --."),
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
NUMPY = """A net.

    Parameters
    ----------
    size : int
        side of the window,
        in % of the image
    rate : float, optional
        a rate

    Returns
    -------
    nothing
"""
SPHINX = """A net.

    :param size: side of the window,
        in % of the image
    :param float rate: a rate
    :returns: nothing
"""


@pytest.mark.parametrize("cls_doc, init_doc", [
    (GOOGLE, ""), ("A net.", GOOGLE), (NUMPY, ""), ("", NUMPY), (SPHINX, None), (None, SPHINX),
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
    assert end.value.code == 0 and "--if_resizing" in alone and "--count" not in alone and "With --model NAME" in alone
    assert not repo.imported()
    with pytest.raises(SystemExit) as end:
        repo.parse("--model Net --help")
    both = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--if_resizing" in both and "flags of Net (models/net.py)" in both
    for text in "--count COUNT (required)", "(default: 50% grey)", "--no-deep", "{a,b}":
        assert text in both
    with pytest.raises(repo.registry.UserError, match="registers no such model"):
        repo.parse("--model Nat --help")


# ---------------------------------------------------------------------------------------------------------------------
# Errors, as a user sees them


def test_errors_are_one_line(repo, capsys, monkeypatch):
    monkeypatch.delenv("IMDL_TRACEBACK", raising=False)
    run, UserError = repo.registry.run, repo.registry.UserError

    def fail(text):
        raise UserError(text)

    in_worker = "Caught UserError in worker 0.\nTraceback:\n  File x\nregistry.UserError: a.png is empty:\ncopy it.\n"
    for text, line in ("--x: wrong.", "error: --x: wrong.\n"), (in_worker, "error: a.png is empty: copy it.\n"):
        with pytest.raises(SystemExit) as end:
            run(lambda: fail(text))
        assert end.value.code == 1 and capsys.readouterr() == ("", line)
    assert run(lambda: 5) == 5
    monkeypatch.setenv("IMDL_TRACEBACK", "1")
    with pytest.raises(UserError):
        run(lambda: fail("x"))


def test_mistake_in_a_script(tmp_path):
    done = run_script("train.py", "--model", "MyModel", "--data_path", "x", "--kernl_size", 3, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("error: --kernl_size: neither train.py nor the model MyModel has this flag. "
                           "Did you mean --kernel_size?\n")


# ---------------------------------------------------------------------------------------------------------------------
# The listing


def test_models_of_this_repository():
    """Told from the text of the files alone, so that asking for one never imports another."""
    import registry

    told = [registry.registered_names(path.read_bytes()) for path in registry.model_files()]
    assert all(complete for _, complete in told)
    names = set().union(*(names for names, _ in told))
    assert names >= {"MVSSNet", "Cat_Net", "IML_ViT", "ObjectFormer", "MyModel", "MyConvNeXt"}


def test_list_one_model(tmp_path):
    done = run_script("registry.py", "--model", "MyModel", "--kernel_size", "5", "--image_size", "64", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    name, file, total, trainable, gflops = done.stdout.splitlines()[-1].split()
    assert (name, file, total, trainable) == ("MyModel", "models/mymodel.py", "76", "76")
    assert float(gflops) == round(2 * 75 * 64 * 64 / 1e9, 2)


LISTED = """
    import torch
    from registry import MODELS, POSTFUNCS, UserError

    class Base(torch.nn.Module):
        def __init__(self, width: int = 1000):
            super().__init__()
            self.linear = torch.nn.Linear(width, 1000)
            self.fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        def forward(self, image, mask, label, shape, original_shape, origin_shape, edge_mask, shape_mask, name, extra):
            assert image.shape == (1, 3, 32, 32)
            assert mask.shape == edge_mask.shape == shape_mask.shape == (1, 1, 32, 32)
            assert label.shape == (1,) and shape.shape == (1, 2) and name[0].endswith(".jpg") and extra.shape == (1, 3)
            self.linear(self.linear(torch.zeros(50, 1000)))  # 0.2 GFLOPs
            queries = torch.zeros(1, 8, 512, 64)  # 0.54 GFLOPs
            torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)

    def post(data_dict, width: int = 0):
        data_dict["extra"] = torch.full((3,), width)

    @MODELS.register_module()
    class Meta(Base):
        pass

    @MODELS.register_module()
    class Values(Base):  # needs values in constructor and forward, which the meta device does not have
        def __init__(self, pretrained_net: bool = True, pretrained_other=True, image_size=1):
            assert not pretrained_net and not pretrained_other and image_size == 32
            super().__init__(int(torch.tensor(1000.0)))
        def forward(self, image, mask, **kwargs):
            assert mask.mean().item() > 0 and not self.training
            with torch.autocast(image.device.type):
                super().forward(image, mask, **kwargs)

    @MODELS.register_module()
    def Needs(path: str, count): pass

    @MODELS.register_module()
    class Refuses(Base):
        def forward(self, image, **kwargs):
            raise UserError("--image_size 32: too small. Take 64.")

    @MODELS.register_module()
    class Fails(Base):
        def forward(self, image, **kwargs):
            return self.linear(image)

    for name in ("Meta", "Values", "Refuses", "Fails"):
        POSTFUNCS.register_module(f"{name.lower()}_post_func")(post)
"""


def test_list_all_models(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/nets.py").write_text(textwrap.dedent(LISTED))
    for copy in "a.py", "b.py":
        (tmp_path / "models" / copy).write_text(textwrap.dedent(PLAIN.format(name="Twice")))
    (tmp_path / "models/broken.py").write_text("def f(:\n")

    command = [sys.executable, "registry.py", "--image_size", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[3:])
    assert "32x32" in done.stdout.splitlines()[0]
    assert lines["Meta"].split() == lines["Values"].split() == ["models/nets.py", "1,001,005", "1,001,000", "0.74"]
    assert lines["Needs"].endswith("  needs --path --count: list it alone, with `--model Needs` and these flags.")
    assert lines["Refuses"] == "models/nets.py  --image_size 32: too small."
    assert lines["Fails"].startswith("models/nets.py  RuntimeError: ")
    assert "models/a.py and models/b.py both register the model Twice" in lines["Twice"]
    assert lines["models/broken.py"].startswith("line 1 can't be imported: SyntaxError")


@pytest.mark.parametrize("argv, message", [
    ([], "models/ holds no model."),
    (["--model", "A", "B"], "no model could be measured, the lines above say why."),
    (["--model", "A"], "the following arguments are required: --size. registry.py --help lists the flags."),
    (["--model", "A", "Bb"], "--model Bb: models/ registers no such model. Did you mean B? Known: A, B."),
])
def test_nothing_to_list(repo, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["registry.py", *argv])
    if argv:
        repo.write("ab.py", """
            from registry import MODELS

            @MODELS.register_module("A")
            @MODELS.register_module("B")
            def build(size: int):
                pass
        """)
    with pytest.raises(SystemExit) as end:
        repo.registry.run(repo.registry.main)
    assert end.value.code == 1 and capsys.readouterr().err == f"error: {message}\n"
