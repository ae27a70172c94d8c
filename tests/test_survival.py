"""Runs that are killed, stopped and restarted: what they print, and that going on ends as an uninterrupted run.

    python -m pytest tests/test_survival.py
    FUZZ=2000 python -m pytest tests/test_survival.py     # 40 kills instead of 3, and the cases that take minutes
"""
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import checkpoint
import log
from conftest import ROOT, make_images, run_here, run_script
from registry import UserError
from test_train import SMALL, equal, random_net, rows, saved, weights

FUZZ = int(os.environ.get("FUZZ", 0))
LINES = {signal.SIGTERM: "stopped by SIGTERM: to go on, give the same command again, for a training with --resume auto",
         signal.SIGINT: "stopped by Ctrl-C: to go on, give the same command again, for a training with --resume auto"}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


def start(*command, cwd, root, launcher=()):
    """Start a script in a session of its own; standard error is in standard output."""
    return subprocess.Popen(list(map(str, [sys.executable, *launcher, root / command[0], *command[1:]])), cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(process, words):
    """Read a process's output up to a line that begins with `words`, or to its end."""
    return next((line for line in process.stdout if line.startswith(words)), None)


def alive(session):
    """The processes of a session that are still there after a second, zombies excepted."""
    time.sleep(1)
    listed = subprocess.run(["ps", "-o", "stat=,pid=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_kills_at_random_moments(images, repository, tmp_path):
    """SIGKILL, SIGTERM and Ctrl-C, to the process or to all of its group, from the imports on to the last epoch."""
    kills, rng = FUZZ // 50 or 3, random.Random(5)
    more = ["--epochs", 20 + 6 * kills, "--batch_size", 2, "--test_period", 2, "--resume", "auto", "--num_workers", 1,
            "--no_fingerprint", "--save_every_minutes", 0.0005]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_script(*random_net(images, straight, *more), cwd=tmp_path, root=repository).returncode == 0
    for kill in range(kills):
        number = list(CODES)[kill % 3]
        process = start(*random_net(images, killed, *more), cwd=tmp_path, root=repository)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.05, 4))
        else:
            assert wait_for(process, "Epoch: [")
            time.sleep(rng.uniform(0, 0.6))
        (os.killpg if rng.random() < 0.5 else os.kill)(process.pid, number)
        begun = time.time()
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == CODES[number] and "Traceback" not in printed, (number, printed)
        if number in LINES:
            assert printed.splitlines()[-1] == LINES[number] and time.time() - begun < 5
            assert alive(process.pid) == []
        assert len(list(killed.glob("*unfinished.pth"))) <= 2  # an epoch's, and the one that follows it just now
    done = run_script(*random_net(images, killed, *more), cwd=tmp_path, root=repository)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    last = f"checkpoint-{19 + 6 * kills}.pth"
    assert equal(weights(straight / last), weights(killed / last)) and rows(straight) == rows(killed)
    assert not list(killed.glob("*unfinished.pth"))


@pytest.mark.parametrize("script", ["train.py", "test.py", "tools/check_model.py"])
def test_a_signal_during_the_imports(tmp_path, script):
    for number in LINES:
        process = start(script, cwd=tmp_path, root=ROOT)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.communicate()[0] == f"{LINES[number]}\n" and process.returncode == CODES[number]


@pytest.mark.parametrize("step", [2, 6])
def test_a_checkpoint_inside_an_epoch_is_exact(images, tmp_path, monkeypatch, step):
    """Epoch 1's 6 steps in groups of 2: stopped after step 2, and after the last, before the evaluation."""
    flags = ["--batch_size", 2, "--accum_iter", 2, "--epochs", 3]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run_here(*random_net(images, straight, *flags)).returncode == 0
    save, names = checkpoint.save_checkpoint, []

    def save_and_stop(path, content):
        save(path, content)
        names.append((path.name, content.get("begun", {}).get("steps")))
        if names[-1] == ("checkpoint-1-unfinished.pth", step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_stop)
        assert run_here(*random_net(images, stopped, *flags, "--save_every_minutes", 0)).returncode == 130
    assert names[:4] == [*(("checkpoint-0-unfinished.pth", count) for count in (2, 4, 6)), ("checkpoint-0.pth", None)]
    assert sorted(path.name for path in stopped.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1-unfinished.pth"]

    def go_on(*more):
        return run_here(*random_net(images, stopped, *flags, *more))

    done = go_on()
    assert done.returncode == 1 and "holds 2 checkpoints of an earlier run: give --resume auto" in done.stderr
    done = go_on("--resume", "auto", "--batch_size", 3)
    assert done.returncode == 1 and done.stderr.startswith(
        f"error: --resume {stopped}/checkpoint-1-unfinished.pth is of inside epoch 1 and had --batch_size 2 instead of "
        "3, so other images would follow: ")
    tested = run_here("test.py", "--checkpoint_path", stopped, "--test_data_json", images, "--num_workers", 0,
                      "--output_dir", tmp_path / "test")
    assert tested.returncode == 0 and "unfinished" not in tested.stdout, tested.stderr
    done = go_on("--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {stopped}/checkpoint-1-unfinished.pth: epoch 1 goes on after step {step}\n" in done.stdout
    assert equal(weights(straight / "checkpoint-2.pth"), weights(stopped / "checkpoint-2.pth"))
    assert rows(straight) == rows(stopped) and saved(straight) == saved(stopped)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation(images, repository, tmp_path, processes):
    """The epoch is kept and its evaluation done again, also where the first rank waits for the others; what evaluating
    with batch statistics does to buffers is not saved."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    flags = ["--test_period", 2, "--test_batch_size", 2, "--no_model_eval"]

    def run(output, *more):  # never in this process, whose number of threads another test may have changed
        command = random_net(images, output, *flags, *more, model="Stopped")
        return run_script(*command, cwd=tmp_path, root=repository, processes=None if processes == 1 else processes)

    assert run(straight).returncode == 0
    done = run(stopped, "--after", 3, *["--parent"] * (processes > 1))
    assert done.returncode == (143 if processes == 1 else 1) and done.stderr.count(LINES[signal.SIGTERM]) == 1
    assert sorted(path.name for path in stopped.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1-unfinished.pth"]
    done = run(stopped, "--resume", "auto")
    assert done.returncode == 0 and "epoch 1 goes on after step" in done.stdout, done.stderr
    assert equal(weights(straight / "checkpoint-3.pth"), weights(stopped / "checkpoint-3.pth"))
    assert rows(straight) == rows(stopped)


def test_a_full_disk_while_logging_loses_no_epoch(images, tmp_path, monkeypatch):
    """The row is added by the run that goes on."""
    straight, output = tmp_path / "straight", tmp_path / "out"
    assert run_here(*random_net(images, straight)).returncode == 0

    def full(path, text):
        raise UserError(f"{path} can't be written (No space left on device).")

    with monkeypatch.context() as patch:
        patch.setattr(log, "append_file", full)
        done = run_here(*random_net(images, output, "--epochs", 1))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {output}/log.txt can't be written (No space")
    assert saved(output) == [0] and not (output / "log.txt").exists()
    assert run_here(*random_net(images, output, "--resume", "auto")).returncode == 0
    assert rows(straight) == rows(output)


def test_a_killed_loader_worker(images, repository, tmp_path):
    process = start(*random_net(images, tmp_path, "--epochs", 4000, "--test_period", 4000, "--num_workers", 2),
                    cwd=tmp_path, root=repository)
    assert wait_for(process, "Epoch: [2]")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in printed
    assert "a process that loads images was killed or could not start" in printed.splitlines()[-1]
    assert "Lower --num_workers or --batch_size" in printed and alive(process.pid) == []


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(*more):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more]


@pytest.mark.slow
def test_two_processes_that_are_killed_and_restarted(repository, tmp_path):
    """By SIGTERM to torchrun inside an epoch, and by SIGKILL to one rank, after which --max_restarts goes on by itself:
    equal to an uninterrupted run."""
    images = make_images(tmp_path / "images", 120, sizes=((64, 64),))
    more = ["--epochs", 5, "--batch_size", 2, "--test_period", 5, "--save_every_minutes", 0.01]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = run_script(*random_net(images, straight, *more), cwd=tmp_path, root=repository, processes=2)
    assert done.returncode == 0, done.stderr
    process = start(*random_net(images, stopped, *more), cwd=tmp_path, root=repository, launcher=torchrun())
    assert wait_for(process, "Epoch: [1]")
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and printed.count(LINES[signal.SIGTERM]) == 1  # 1 is torchrun's own
    assert printed.count(f"saved {stopped}/checkpoint-1-unfinished.pth after step ") == 1

    process = start(*random_net(images, stopped, *more, "--resume", "auto"), cwd=tmp_path, root=repository,
                    launcher=torchrun("--max_restarts=1"))
    assert wait_for(process, "Epoch: [3]")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    printed = process.communicate(timeout=90)[0]
    assert process.returncode == 0 and "resumed from" in printed, printed[-3000:]
    assert equal(weights(straight / "checkpoint-4.pth"), weights(stopped / "checkpoint-4.pth"))
    assert rows(straight) == rows(stopped)


@pytest.mark.skipif(not FUZZ, reason="torchrun waits half a minute before it kills a stopped process")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(images, repository, tmp_path, victim):
    process = start(*random_net(images, tmp_path, "--epochs", 4000, "--dist_timeout", 0.1), cwd=tmp_path,
                    root=repository, launcher=torchrun())
    assert wait_for(process, "Epoch: [3]")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[victim]), signal.SIGSTOP)
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and printed.count(f"no answer from rank {victim} for longer than --dist_t") == 1
