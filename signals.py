"""SIGTERM, as a scheduler sends it, and Ctrl-C end a script with one line and exit code 143 or 130.

Scripts import this first of all, since the other modules take seconds. A program that only uses our modules keeps its
own answer to signals.
"""
import contextlib
import os
import signal
import sys

wait = False  # training: the first signal waits until the weights' step is done
asked = 0  # the number of the signal that waits


def end(number, frame=None):
    """Handle a signal: end the program at once, or leave the number in `asked`.

    At once is as `kill -9` does it, which every script survives: an exception could get lost in a destructor, or have
    to wait for threads.
    """
    global asked
    processes = sys.modules.get("multiprocessing")
    if processes and processes.parent_process():  # a loader's worker; Ctrl-C reaches it too, but its parent decides
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if wait and not asked:
        asked = number
        if hasattr(signal, "SIGCHLD"):  # by which torch would raise where a scheduler has ended the workers as well
            signal.signal(signal.SIGCHLD, lambda *_: None)
        return
    with contextlib.suppress(Exception):
        for child in processes.active_children() if processes else ():
            child.kill()
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{farewell(number)}\n".encode())
        sys.stdout.flush()
    os._exit(128 + number)


def heed():
    """Let signals end the program at once again, also one that had to wait."""
    global wait
    wait = False
    if asked:
        end(asked)


def farewell(number):
    """Return the line that a program ends with after a signal."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name}: to go on, give the same command again, for a training with --resume auto"


folder = os.path.dirname(os.path.abspath(__file__))
if os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", "/"))) in (
        folder, os.path.join(folder, "tools")):
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
