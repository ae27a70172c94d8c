"""Every mistake of a user ends in one sentence that names the file, flag or key and the cure, with exit code 1, no
traceback, and nothing trained; a model's own exception keeps its traceback.

Run: python -m pytest tests/test_bad_input.py
"""
import os
import shutil
import socket

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import data
import models.mymodel
import probe_models
from conftest import ROOT, make_images, run_here, run_script
from registry import UserError


class Code:
    """An object whose loading makes a file: what a checkpoint from a stranger may hold."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with `good` data and checkpoints, and everything that can be wrong with either."""
    root = tmp_path_factory.mktemp("bad")
    good = make_images(root / "good", 4, authentic=1)

    def folder(name):
        shutil.copytree(good, root / name)
        return root / name

    # folders
    for name in ("empty", "no_gt/Tp", "nothing/Tp", "nothing/Gt", "photos_without_photos"):
        (root / name).mkdir(parents=True)
    (root / "photos_without_photos" / "readme.txt").write_text("no image")
    shutil.copy(good / "Tp" / "p000.png", folder("extra_image") / "Tp" / "lonely_image.png")
    shutil.copy(good / "Gt" / "p000_gt.png", folder("extra_mask") / "Gt" / "lonely_mask.png")
    cv2.imwrite(str(folder("sizes") / "Gt" / "p002_gt.png"), np.zeros((40, 50), np.uint8))
    (folder("empty_image") / "Tp" / "p001.png").write_bytes(b"")
    (folder("broken_image") / "Tp" / "p001.png").write_text("no image, whatever its name says")
    (folder("broken_mask") / "Gt" / "p001_gt.png").write_text("no image, whatever its name says")
    content = (good / "Tp" / "p001.png").read_bytes()
    (folder("truncated_png") / "Tp" / "p001.png").write_bytes(content[:len(content) // 2])
    truncated = folder("truncated_jpg") / "Tp" / "p001.jpg"
    truncated.with_suffix(".png").unlink()
    cv2.imwrite(str(truncated), cv2.imread(str(good / "Tp" / "p001.png")))
    truncated.write_bytes(truncated.read_bytes()[:-200])

    # JSON files
    for name, text in {"zero_bytes": "", "empty_list": "[]", "empty_object": "{}", "number": "7",
                       "malformed": '[["Tp/p000.png", "Negative"],]', "triple": '[["a.png", "b.png", "c.png"]]',
                       "missing": '[["good/Tp/p000.png", "Negative"], ["good/Tp/gone.png", "Negative"]]',
                       "mixed": '[["ManiDataset", "good"], ["good/Tp/p000.png", "Negative"]]',
                       "wrong_kind": '[["JsonDataset", "good"]]', "no_path": '{"casia": ["good"]}',
                       "outside": '{"../casia": "good"}', "set_missing": '{"casia": "gone"}',
                       "sets": '{"casia": "good"}',
                       "deep": 100_000 * "[", "deep_object": 100_000 * '{"a":',
                       "digits": f'[[{5000 * "9"}, "Negative"]]',
                       "itself": '{"a": "itself.json"}', "itself_balanced": '[["JsonDataset", "itself_balanced.json"]]',
                       "twice": '{"casia": "good", "casia": "good/set.json"}', "nan": '[[NaN, "Negative"]]',
                       "nul": '[["a\\u0000b.png", "Negative"]]', "lone_surrogate": '[["\\ud800.png", "Negative"]]',
                       "nul_set": '{"a": "go\\u0000od"}', "surrogate_set": '{"a": "\\ud800"}',
                       "far_object": 5000 * " " + '{"a": "good"}', "long_path": f'{{"a": "{5000 * "x"}"}}',
                       "values": "[" + 9_000_000 * "1," + "1]",
                       "image_as_mask": '[["good/Tp/p000.png", "good/Gt/gone.png"]]'}.items():
        (root / f"{name}.json").write_text(text)
    (root / "not_utf8.json").write_bytes(b'[["\xff\xfe", "Negative"]]')

    # checkpoints
    state = models.mymodel.MyModel().state_dict()
    for name, content in {"good": {"model": state}, "other_model": {"model": probe_models.RandomNet().state_dict()},
                          "other_flag": models.mymodel.MyModel(kernel_size=5).state_dict(),
                          "code": {"model": Code(root / "executed")}, "whole_model": models.mymodel.MyModel(),
                          "list": [1, 2], "no_state": {"model": "weights"}, "empty_dict": {},
                          "misnamed": {"weights": state, "epoch": 3},
                          "code_in_array": {"model": state, "best": np.array([Code(root / "executed")], object)},
                          "other_optimizer": {"model": state, "optimizer": {"state": {}, "param_groups": []},
                                              "scaler": {}, "epoch": 0},
                          "tutorial": probe_models.Tutorial(1, "").state_dict(),
                          "only32": probe_models.Only32().state_dict(),
                          "only32_half": probe_models.Only32().state_dict(), "red": probe_models.Red().state_dict(),
                          "nan": {"conv.weight": state["conv.weight"] * torch.nan, "conv.bias": state["conv.bias"]},
                          "loss_only": probe_models.LossOnly().state_dict()}.items():
        torch.save(content, root / f"{name}.pth")
    (root / "truncated.pth").write_bytes((root / "good.pth").read_bytes()[:1000])
    (root / "text.pth").write_text("no checkpoint")
    (root / "zero_bytes.pth").write_bytes(b"")
    (root / "others").mkdir()
    shutil.copy(root / "good.pth", root / "others" / "latest.pth")
    for epoch in (0, 1):
        (root / "trained").mkdir(exist_ok=True)
        torch.save({"model": state, "epoch": epoch,
                    "optimizer": torch.optim.AdamW(models.mymodel.MyModel().parameters()).state_dict()},
                   root / "trained" / f"checkpoint-{epoch}.pth")
    (root / "a_file").write_text("no folder")
    return root


TEST_DATA = {"train.py": "--data_path", "test.py": "--test_data_json", "test_robust.py": "--test_data_path",
             "save_images.py": "--test_data_path"}


def command(script, bad, output, changes):
    """The flags of a command that works, with `changes` {flag: value}: None takes a flag away, "" gives it no value;
    {bad} and {out} are paths."""
    flags = {"--model": "MyModel", TEST_DATA[script]: "{bad}/good", "--output_dir": "{out}", "--if_resizing": "",
             "--image_size": "64", "--num_workers": "0"}
    flags |= {"--epochs": "1"} if script == "train.py" else {"--checkpoint_path": "{bad}/good.pth"}
    words = []
    for flag, value in {**flags, **changes}.items():
        if value is not None:
            words += [flag, *str(value).format(bad=bad, out=output).split()]
    return [script, *words]


def check(done, words, bad, output):
    """One line on standard error with all the words, exit code 1, no traceback, nothing trained."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word.format(bad=bad, out=output) in done.stderr, done.stderr
    assert not list(output.glob("**/*.pth")) and not (output / "results.csv").exists()


DATA_CASES = {  # value of the data flag -> words of the message; `no_such_path` and so on need no images to be read
    "{bad}/gone": ["{bad}/gone", "no such file or folder"],
    "{bad}/a_file": ["{bad}/a_file", "neither a folder nor a .json"],
    "{bad}/no_gt": ["{bad}/no_gt", "no Gt/"],
    "{bad}/nothing": ["{bad}/nothing", "no image"],
    "{bad}/extra_image": ["{bad}/extra_image", "1 image in Tp/ without a mask", "lonely_image.png"],
    "{bad}/extra_mask": ["{bad}/extra_mask", "1 mask without an image", "lonely_mask.png"],
    "{bad}/sizes": ["sizes/Tp/p002.png", "80x80", "p002_gt.png", "40x50"],
    "{bad}/empty_image": ["empty_image/Tp/p001.png", "0 bytes"],
    "{bad}/broken_image": ["broken_image/Tp/p001.png"],
    "{bad}/broken_mask": ["broken_mask/Gt/p001_gt.png"],
    "{bad}/truncated_png": ["truncated_png/Tp/p001.png", "truncated"],
    "{bad}/truncated_jpg": ["truncated_jpg/Tp/p001.jpg", "truncated"],
    "{bad}/malformed.json": ["malformed.json", "not valid JSON", "line 1, column 30"],
    "{bad}/zero_bytes.json": ["zero_bytes.json", "not valid JSON"],
    "{bad}/empty_list.json": ["empty_list.json", "empty", 'list of [image, mask or "Negative"]'],
    "{bad}/empty_object.json": ["empty_object.json", "empty"],
    "{bad}/number.json": ["number.json", "no list and no object"],
    "{bad}/not_utf8.json": ["not_utf8.json", "not encoded as UTF-8"],
    "{bad}/triple.json": ["triple.json", "item 0", '["a.png", "b.png", "c.png"]'],
    "{bad}/missing.json": ["missing.json", "1 file that can't be found", "gone.png"],
    "{bad}/image_as_mask.json": ["image_as_mask.json", "gone.png"],
    "{bad}/mixed.json": ["mixed.json", "item 1 is", "not a dataset"],
    "{bad}/wrong_kind.json": ["wrong_kind.json", "as a JsonDataset, but it is a ManiDataset"],
    "{bad}/deep.json": ["deep.json", "nested too deeply"],
    "{bad}/digits.json": ["digits.json", "can't be read: Exceeds the limit (4300 digits)"],
    "{bad}/itself_balanced.json": ["itself_balanced.json as a JsonDataset, but it is a BalancedDataset"],
    "{bad}/nan.json": ["nan.json", "item 0 is [NaN"],
    "{bad}/nul.json": ["nul.json names 1 file that can't be found", "a\0b.png"],
    "{bad}/lone_surrogate.json": ["lone_surrogate.json names 1 file that can't be found"],
    "{bad}/far_object.json": ["far_object.json is an object, not a list"],
    "{bad}/values.json": ["values.json", "more than 8388608 values", "MAX_VALUES in data.py"],
}
SETS_CASES = {
    "{bad}/deep_object.json": ["deep_object.json", "nested too deeply"],
    "{bad}/itself.json": ["itself.json is a JSON of several sets, which can't be used here"],
    "{bad}/twice.json": ["twice.json names 'casia' twice"],
    "{bad}/nul_set.json": ["nul_set.json, set 'a': {bad}/go\0od: no such file or folder"],
    "{bad}/surrogate_set.json": ["surrogate_set.json, set 'a'", "no such file or folder"],
    "{bad}/long_path.json": ["long_path.json, set 'a'", "no such file or folder"],
}
DATA_CASES |= SETS_CASES


@pytest.mark.parametrize("value", DATA_CASES)
def test_data(bad, value):
    path = value.format(bad=bad)
    with pytest.raises(UserError) as caught:
        if value in SETS_CASES:
            data.open_sets(path, "--data_path")
        data.open_dataset(path, "--data_path", allowed=("ManiDataset", "JsonDataset", "BalancedDataset"))
    for word in ["--data_path", *DATA_CASES[value]]:
        assert word.format(bad=bad) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script, value", [("train.py", "sizes"), ("test.py", "truncated_jpg"),
                                           ("save_images.py", "empty_image"), ("test_robust.py", "truncated_png")])
def test_files_that_are_read_during_the_run(bad, tmp_path, script, value):
    """Without a fingerprint nothing is read beforehand."""
    changes = {TEST_DATA[script]: f"{{bad}}/{value}", "--no_fingerprint": ""}
    check(run_here(*command(script, bad, tmp_path / "out", changes)), DATA_CASES[f"{{bad}}/{value}"], bad,
          tmp_path / "out")


FLAG_CASES = {  # name -> (script, changes, words)
    # flags
    "neither fitting": ("train.py", {"--if_resizing": None}, ["exactly one of --if_resizing", "--if_padding"]),
    "no model": ("train.py", {"--model": None}, ["--model", "required"]),
    "a checkpoint that stores nothing": ("test.py", {"--model": None, "--if_resizing": None},
                                         ["good.pth does not say how it was trained: give --model and --if_resizing "
                                          "or --if_padding, and"]),
    "unknown model": ("test.py", {"--model": "MyModell"}, ["--model MyModell", "Did you mean MyModel?"]),
    "unknown flag": ("train.py", {"--epoch": "3"},
                     ["unknown flag --epoch: neither train.py nor MyModel has it. Did you mean --epochs?"]),
    "no number": ("train.py", {"--batch_size": "two"}, ["--batch_size", "two"]),
    "unknown metric": ("test.py", {"--metrics": "PixelF2"}, ["PixelF2", "PixelF1"]),
    "metric twice": ("train.py", {"--metrics": "PixelF1 PixelF1", "--test_data_path": "{bad}/good", "--epochs": "2",
                                  "--test_period": "2"}, ["pixel-level F1", "twice"]),
    "one pred_label for a batch": ("train.py", {"--model": "Tutorial", "--MyModel_Customized_param": "1",
                                                "--pre_trained_weights": "x", "--batch_size": "5",
                                                "--test_data_path": "{bad}/good/set.json", "--if_predict_label": "",
                                                "--epochs": "2", "--test_period": "2"},
                                   ["Tutorial: pred_label is () for 4 images", "image-level F1"]),
    "no such device": ("test.py", {"--device": "cuda:7"}, ["--device cuda:7"]),
    "unknown backbone": ("train.py", {"--model": "MyConvNeXt", "--backbone": "convnext_tini", "--no-pretrained": ""},
                         ["--backbone convnext_tini", "convnext_tiny"]),
    # data of the wrong kind for the place
    "plain folder for training": ("train.py", {"--data_path": "{bad}/good/Tp"},
                                  ["--data_path", "good/Tp", "without Tp/ and Gt/"]),
    "several sets for training": ("train.py", {"--data_path": "{bad}/sets.json"},
                                  ["--data_path", "sets.json", "several sets"]),
    "bad test set of a training": ("train.py", {"--test_data_path": "{bad}/gone"}, ["--test_data_path", "{bad}/gone"]),
    "set name with a slash": ("save_images.py", {"--test_data_path": "{bad}/outside.json"},
                              ["outside.json", "'../casia'"]),
    "folder without images": ("save_images.py", {"--test_data_path": "{bad}/photos_without_photos"},
                                ["photos_without_photos", "no image"]),
    # checkpoints
    "checkpoint that is missing": ("test.py", {"--checkpoint_path": "{bad}/gone.pth"},
                                   ["--checkpoint_path", "{bad}/gone.pth", "no such file"]),
    "folder without checkpoints": ("test.py", {"--checkpoint_path": "{bad}/empty"},
                                   ["--checkpoint_path", "{bad}/empty", "no checkpoint-<n>.pth"]),
    "another model": ("test.py", {"--checkpoint_path": "{bad}/other_model.pth"},
                      ["other_model.pth does not fit MyModel: 2 missing keys (conv.weight, conv.bias), 9 unexpected "
                       "(net.0.weight, net.0.bias, ...). Use the --model and flags of the training."]),
    "another flag": ("save_images.py", {"--checkpoint_path": "{bad}/other_flag.pth"},
                     ["other_flag.pth", "conv.weight (1, 3, 5, 5) instead of (1, 3, 3, 3)"]),
    "resume another optimizer": ("train.py", {"--resume": "{bad}/other_optimizer.pth"},
                                 ["--resume", "other_optimizer.pth", "optimizer"]),
    "resume nothing": ("train.py", {"--resume": "{bad}/empty"}, ["--resume", "{bad}/empty", "no checkpoint-<n>.pth"]),
    "everything trained": ("train.py", {"--start_epoch": "3", "--epochs": "3"},
                           ["nothing left to train: the next epoch is 3 and --epochs is 3; raise --epochs."]),
    # output
    "file as output folder": ("train.py", {"--output_dir": "{bad}/a_file"},
                              ["--output_dir", "a_file", "can't be written to"]),
    "log folder that nobody may write": ("train.py", {"--log_dir": "/proc/log"},
                                         ["--log_dir /proc/log", "can't be written to"]),
    # models
    "mask of another size": ("train.py", {"--model": "Only32", "--half": "", "--image_size": "32",
                                          "--test_data_path": "{bad}/good"},
                             ["Only32", "pred_mask is (1, 1, 16, 16)", "(1, 1, 32, 32)"]),
    "no pred_label for an image metric": ("test.py", {"--model": "Only32", "--checkpoint_path": "{bad}/only32.pth",
                                                      "--image_size": "32", "--metrics": "ImageAUC"},
                                          ["Only32", "no pred_label", "image-level AUC"]),
    "no pred_mask": ("save_images.py", {"--model": "LossOnly", "--checkpoint_path": "{bad}/loss_only.pth"},
                     ["LossOnly", "no pred_mask", "saved here"]),
    "no backward_loss": ("train.py", {"--model": "Red"}, ["Red", "backward_loss"]),
    "loss that diverges": ("train.py", {"--model": "LossOnly", "--scale": "inf"},
                           ["Epoch: [0] the loss of step 0 is not finite; this epoch is not saved", ".png", "--lr"]),
    "NaN weights under test": ("test.py", {"--checkpoint_path": "{bad}/nan.pth"},
                               ["MyModel", "pred_mask is NaN", "p000.png"]),
    "NaN weights, saving": ("save_images.py", {"--checkpoint_path": "{bad}/nan.pth"},
                            ["MyModel", "pred_mask is NaN", "p000.png"]),
}


@pytest.mark.parametrize("name", FLAG_CASES)
def test_flags_checkpoints_and_models(bad, tmp_path, name):
    script, changes, words = FLAG_CASES[name]
    check(run_here(*command(script, bad, tmp_path / "out", changes)), words, bad, tmp_path / "out")


CHECKPOINT_CASES = {
    "truncated": "is truncated or is not a checkpoint", "zero_bytes": "is truncated or is not a checkpoint",
    "text": "is truncated or is not a checkpoint", "gone": "No such file", "list": "no state dict",
    "no_state": "no state dict under model, state_dict, model_state_dict, net or network, nor by itself: its keys are "
                "model.",
    "empty_dict": "no state dict", "misnamed": "its keys are weights, epoch. Give",
    "whole_model": "holds the object models.mymodel.MyModel, which can execute code",
    "code": "mkdir, which can execute code", "code_in_array": "mkdir, which can execute code",
}


@pytest.mark.parametrize("name", CHECKPOINT_CASES)
def test_checkpoints(bad, name):
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(models.mymodel.MyModel(), bad / f"{name}.pth", "--resume")
    assert str(caught.value).startswith(f"--resume {bad}/{name}.pth") and "\n" not in str(caught.value)
    assert CHECKPOINT_CASES[name] in str(caught.value) and not (bad / "executed").exists()


@pytest.mark.parametrize("script", ["test.py", "test_robust.py", "save_images.py", "train.py"])
def test_code_in_a_checkpoint_is_not_executed(bad, tmp_path, script):
    flag = "--resume" if script == "train.py" else "--checkpoint_path"
    done = run_here(*command(script, bad, tmp_path / "out", {flag: "{bad}/code.pth"}))
    check(done, [flag, "code.pth", "mkdir", "can execute code"], bad, tmp_path / "out")
    assert not (bad / "executed").exists()


@pytest.mark.parametrize("script, changes, hint", [
    ("train.py", {"--model": "Only32"}, ""),
    ("test.py", {"--model": "Only32", "--checkpoint_path": "{bad}/only32.pth"}, ""),
    ("train.py", {"--model": "Edges"}, "hint: the model needs the boundary of the mask: give --edge_mask_width.\n"),
])
def test_a_models_own_exception_keeps_its_traceback(bad, tmp_path, script, changes, hint):
    """Images of 64 x 64 for a model that takes 32 x 32 only, and no edge_mask for one that needs it."""
    done = run_here(*command(script, bad, tmp_path / "out", changes))
    assert done.returncode == 1 and "error:" not in done.stderr
    assert done.stderr.startswith("Traceback") and done.stderr.endswith(hint or "\n")
    assert ("RuntimeError: mat1 and mat2" in done.stderr and "probe_models.py" in done.stderr) != bool(hint)


def test_earlier_checkpoints_are_not_touched(bad, tmp_path):
    """A second run into a folder with checkpoints is refused unless it goes on where the newest stopped."""
    trained = tmp_path / "trained"
    shutil.copytree(bad / "trained", trained)
    for changes, words in (
            ({}, ["--output_dir", str(trained), "2 checkpoints of an earlier run", "--resume auto"]),
            ({"--resume": "{bad}/good.pth"}, ["--output_dir", str(trained), "2 checkpoints of an earlier run"]),
            ({"--resume": f"{trained}/checkpoint-0.pth"},
             ["--resume", "checkpoint-0.pth", "later checkpoints up to checkpoint-1.pth"])):
        done = run_here(*command("train.py", bad, tmp_path / "out",
                                 {"--output_dir": trained, "--epochs": "9", **changes}))
        check(done, words, bad, tmp_path / "out")
    assert sorted(os.listdir(trained)) == [".lock", "checkpoint-0.pth", "checkpoint-1.pth"]

    flags = ["--model", "MyModel", "--data_path", bad / "good", "--output_dir", tmp_path / "done", "--if_resizing",
             "--image_size", 64, "--num_workers", 0]
    assert run_here("train.py", *flags, "--epochs", 1).returncode == 0
    file = tmp_path / "done" / "checkpoint-0.pth"
    done = run_here("train.py", *flags, "--epochs", 1, "--resume", "auto")
    assert done.returncode == 0 and done.stdout.endswith(f"finished: {file} is of epoch 0 and --epochs is 1; raise "
                                                         "--epochs to go on\n")
    done = run_here("train.py", *flags, "--epochs", 1, "--resume", file)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nothing left to train: the next epoch is 1 and --epochs is 1")


def test_a_mistake_as_the_user_meets_it(bad, tmp_path):
    """Two commands in processes of their own; the second message comes out of a loader's worker, whole."""
    in_worker = {"--data_path": "{bad}/sizes", "--num_workers": "2", "--no_fingerprint": ""}
    for changes, words in (({"--model": "MyModell"}, ["Did you mean MyModel?"]),
                           (in_worker, ["sizes/Tp/p002.png", "p002_gt.png", "40x50"])):
        check(run_script(*command("train.py", bad, tmp_path / "out", changes), cwd=tmp_path), words, bad,
              tmp_path / "out")


ENVIRONMENTS = {  # what a launcher sets -> words of the message
    "RANK=0 WORLD_SIZE=2": "RANK=0 but no MASTER_ADDR and no MASTER_PORT. Start several processes with torchrun",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=": "RANK=1 but no MASTER_PORT.",
    "RANK=0": "RANK=0 but no WORLD_SIZE",
    "RANK= WORLD_SIZE=": "RANK is '', which is no whole number",
    "RANK=one WORLD_SIZE=2": "RANK is 'one', which is no whole number",
    "RANK=-1 WORLD_SIZE=2": "RANK is '-1', which is no whole number",
    "RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29999": "RANK=2 and WORLD_SIZE=2, but ranks go from 0 to",
    "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=99999": "MASTER_PORT is '99999', which is no port",
    "WORLD_SIZE=two": "WORLD_SIZE is 'two', which is no whole number",
    "LOCAL_RANK=": "LOCAL_RANK is '', which is no whole number",
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environment_of_a_launcher(bad, tmp_path, monkeypatch, environment):
    """Whichever rank it is: the message is printed, at once."""
    for word in environment.split():
        monkeypatch.setenv(*word.split("="))
    done = run_here(*command("train.py", bad, tmp_path / "out", {}))
    check(done, [ENVIRONMENTS[environment]], bad, tmp_path / "out")


def test_environments_that_are_fine(bad, tmp_path, monkeypatch):
    """A Slurm script's WORLD_SIZE alone is one process; a port that is taken is a mistake of the user."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run_here(*command("train.py", bad, tmp_path / "one", {}))
    assert done.returncode == 0 and "1 process on" in done.stdout
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        done = run_script(*command("train.py", bad, tmp_path / "out", {}), cwd=tmp_path,
                          env={"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: the processes can't meet at MASTER_ADDR:MASTER_PORT, localhost:{port}" in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_traceback_on_request(repository, bad, tmp_path, workers):
    """A post function's exception out of a worker, and one that `from None` hides."""
    (repository / "models" / "frail.py").write_text(
        "from registry import MODELS, POSTFUNCS\nfrom .mymodel import MyModel\n"
        "MODELS.register_module('Frail')(type('Frail', (MyModel,), {}))\n"
        "@POSTFUNCS.register_module()\ndef frail_post_func(data_dict):\n    data_dict['no such key']\n")
    changes = {"--model": "Frail", "--num_workers": workers}
    words = ["p00", "frail_post_func failed (KeyError: 'no such key'). IMDL_TRACEBACK=1"]
    check(run_script(*command("train.py", bad, tmp_path / "out", changes), cwd=tmp_path, root=repository), words, bad,
          tmp_path / "out")
    for changes, place in ((changes, "data_dict['no such key']"),
                           ({"--data_path": "{bad}/malformed.json"}, "JSONDecodeError")):
        done = run_script(*command("train.py", bad, tmp_path / "out", changes), cwd=tmp_path, root=repository,
                          env={"IMDL_TRACEBACK": "1"})
        assert done.returncode == 1 and done.stderr.startswith("Traceback") and place in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")


def run_limited(tmp_path, name, limit, flags):
    """Run train.py in a process that lowers a resource's (soft, hard) limit first."""
    (tmp_path / "limited.py").write_text(
        f"import resource, runpy, sys\nresource.setrlimit(resource.{name}, {limit})\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    return run_script("limited.py", *flags, cwd=tmp_path, root=tmp_path)


def test_few_open_files(bad, tmp_path):
    """The soft limit is raised as far as the hard one allows; below what the workers need, a sentence says so."""
    _, *flags = command("train.py", bad, tmp_path / "out", {"--num_workers": 2})
    check(run_limited(tmp_path, "RLIMIT_NOFILE", (30, 30), flags),
          ["--num_workers 2: 30 open files", "ulimit -n", "lower --num_workers"], bad, tmp_path / "out")
    done = run_limited(tmp_path, "RLIMIT_NOFILE", (40, 256), flags)
    assert done.returncode == 0, done.stderr


def test_full_disk_under_tensorboard(bad, tmp_path):
    """A limit of a file's size acts as a full disk does; the events meet it in their own thread, after the epoch's
    checkpoint was saved."""
    _, *flags = command("train.py", bad, tmp_path / "out", {"--no_fingerprint": "", "--log_dir": tmp_path / "events"})
    done = run_limited(tmp_path, "RLIMIT_FSIZE", (12000, 12000), flags)
    assert done.returncode == 1 and (tmp_path / "out" / "checkpoint-0.pth").exists(), done.stdout
    assert done.stderr.startswith(f"error: TensorBoard's events in {tmp_path / 'events'} can't be written (File too "
                                  "large). Free some space") and done.stderr.count("\n") == 1, done.stderr


def test_a_mistake_that_one_process_finds_ends_all(bad, tmp_path):
    """Only the first process reads the files beforehand: one message, and no traceback of the waiting other."""
    truncated = command("train.py", bad, tmp_path / "out", {"--data_path": "{bad}/truncated_png"})
    done = run_script(*truncated, cwd=tmp_path, processes=2)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: --data_path: ") == 1 and "[rank" not in done.stderr, done.stderr
