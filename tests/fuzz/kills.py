"""Runs that are killed at any moment: `python tests/fuzz/kills.py --cases 200 --seed 0`.

Each case is a command that is sent a signal after a random part of the time that it takes undisturbed, sometimes a
second one. Afterwards the output is the old one, or the right new one; nothing else is left after Ctrl-C, and hidden
files at most after the others; and the same command, given again, ends with the right bits, from the progress kept.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `fuzz` is found, as pytest finds it

from batchnorm.cli import main as cli
from batchnorm.population import checkpoint
from fuzz.judging import repeated

CODE = """
import time
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))

def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(60)]
"""
COMMANDS = {
    "exact": ("recalibrate", "net.py:net", "--data", "net.py:data", "--output", "out.pt"),
    "pooled": (
        *("recalibrate", "net.py:net", "--data", "net.py:data", "--output", "out.pt"),
        *("--method", "pooled", "--checkpoint", "progress"),
    ),
    "fold": ("fold", "net.py:net", "--example", "4,6", "--output", "out.pt"),
}
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
OLD = b"what was there before"
LIMIT = 60.0  # seconds for a command that takes about one; then it hangs


def start(command: str) -> int:
    """The command in a process of its own, which has torch imported already."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        checkpoint.SECONDS_BETWEEN = 0.0
        code = cli.main(list(COMMANDS[command]))
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """How a process ended: its exit code, negative for a signal; None if it hangs, and is killed."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Killer:
    """Cases in the current folder; knows what is right, and how long each command takes."""

    def __init__(self) -> None:
        Path("net.py").write_text(CODE)
        self.right: dict[str, bytes] = {}
        self.seconds: dict[str, float] = {}
        self.outcomes: dict[str, int] = {}
        for command in COMMANDS:
            begin = time.monotonic()
            assert ended(start(command)) == 0, command
            self.seconds[command] = time.monotonic() - begin
            self.right[command] = Path("out.pt").read_bytes()
            Path("out.pt").unlink()
        self.files = set(os.listdir())

    def case(self, source: random.Random) -> tuple[str, list[str]]:
        """Kill one run, look at what it left, and do it again."""
        command, number = source.choice(sorted(COMMANDS)), source.choice(SIGNALS)
        delay = source.random() * self.seconds[command]
        second = source.random() * 0.01 if source.random() < 0.3 else None
        output = Path("out.pt")
        output.write_bytes(OLD)
        child = start(command)
        time.sleep(delay)
        os.kill(child, number)  # a child that has ended is there until it is waited for
        if second is not None:
            time.sleep(second)
            os.kill(child, number)
        found, code = [], ended(child)
        self.outcomes[str(code)] = self.outcomes.get(str(code), 0) + 1
        if code is None:
            found.append("it hangs")
        elif code not in (0, 2, 70, 130, -number):
            found.append(f"it ended with {code}")
        content = output.read_bytes()
        if not self.right_or_old(command, content):
            found.append(f"the output has {len(content)} bytes that are neither the old nor the right ones")
        if code == 0 and content == OLD:
            found.append("exit code 0 without an output")
        left = set(os.listdir()) - self.files - {"out.pt", "progress"}
        # What SIGKILL and SIGTERM's default end can clean up nothing; it must be a hidden file.
        if left and (number is signal.SIGINT or not all(name.startswith(".") for name in left)):
            found.append(f"it left {sorted(left)}")
        for name in left:
            Path(name).unlink()
        again = ended(start(command))
        if again != 0 or not self.is_right(command, output.read_bytes()):
            found.append(f"the same command again ended with {again}, or with other weights")
        for name in set(os.listdir()) - self.files:
            found += [f"the second run left {name}"] if name != "out.pt" else []
            Path(name).unlink()
        shutil.rmtree("__pycache__", ignore_errors=True)
        return f"{command}, {number.name} after {delay:.3f} s{'' if second is None else ', twice'}", found

    def right_or_old(self, command: str, content: bytes) -> bool:
        return content == OLD or self.is_right(command, content)

    def is_right(self, command: str, content: bytes) -> bool:
        """Whether these are the weights of an undisturbed run."""
        Path("compared.pt").write_bytes(content)
        try:
            actual = torch.load("compared.pt", weights_only=True)
        except Exception:
            return False
        finally:
            Path("compared.pt").unlink()
        Path("compared.pt").write_bytes(self.right[command])
        wanted = torch.load("compared.pt", weights_only=True)
        Path("compared.pt").unlink()
        return actual.keys() == wanted.keys() and all(torch.equal(actual[key], wanted[key]) for key in wanted)


def fuzz(cases: int, seed: int) -> list[str]:
    """Do so many cases in the current folder; what is wrong, a line each."""
    torch.set_num_threads(1)  # a fork has none of the others
    killer = Killer()
    found = repeated(killer.case, cases, seed)
    print("how they ended:", ", ".join(f"{code}: {n}" for code, n in sorted(killer.outcomes.items())))
    return found


if __name__ == "__main__":
    from fuzz.judging import main

    main(__doc__, fuzz)
