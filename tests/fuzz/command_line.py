"""Hostile command lines: `python tests/fuzz/command_line.py --cases 1000 --seed 0`.

Each case is a command with some of its values exchanged for hostile ones, users' code that misbehaves among them, in an
environment that may be hostile too. Allowed is exit code 0 with the outputs whole, or 2 with one line and no output.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `fuzz` is found, as pytest finds it

from fuzz.judging import faults, repeated, run

CODE = """
import sys
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def scripted(): return torch.jit.trace(net().eval(), torch.randn(2, 3, 8, 8))
def inside(): return nn.Sequential(scripted())
def data(): return [torch.randn(4, 3, 8, 8) for _ in range(3)]
def number(): return 3
def empty(): return []
def nothing(): return [torch.zeros(0, 3, 8, 8)]
def texts(): return ["a", "b"]
def deep(): return [[], (), {}]
def other(): return [torch.randn(4, 5)]
def infinite_values(): return [torch.full((4, 3, 8, 8), torch.inf)]

class Mute(BaseException):
    def __str__(self): raise Mute
class Odd(Exception):
    def __str__(self): return 3
class Loud(Exception):
    def __str__(self): return "\\x1b[2J\\u202e\\n" * 3000

ERRORS = [SystemExit(0), SystemExit("bye"), Mute(), Odd(), Loud(), StopIteration(1), GeneratorExit(), MemoryError(),
          RecursionError(), BrokenPipeError(), OSError(28, "full"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
          RuntimeError("API call failed at tensors.hpp, line 8\\nException raised from f at /b/x.cpp:1"), EOFError()]

def raising(error):
    def model(): raise error
    def batches(): raise error
    def later():
        yield data()[0]
        raise error
    class Net(nn.Sequential):
        def forward(self, x): raise error
    class Saved(nn.Sequential):
        def state_dict(self, *_, **__): raise error
    class Sized(list):
        def __len__(self): raise error
    return model, batches, later, lambda: Net(*net()), lambda: Saved(*net()), lambda: Sized(data())

for number_, error in enumerate(ERRORS):
    names = ("model", "batches", "later", "forward", "saved", "sized")
    globals().update({f"{name}{number_}": f for name, f in zip(names, raising(error))})

class Extra(nn.Module):
    def get_extra_state(self): return {"a": {1, 2}}
    def set_extra_state(self, state): pass
    def forward(self, x): return x

def with_buffer(value, name="b"):
    model = net()
    model.register_buffer(name, value)
    return model

def extra(): return nn.Sequential(net(), Extra())
def complex_(): return with_buffer(torch.zeros(2, dtype=torch.complex64))
def complex128(): return with_buffer(torch.zeros(2, dtype=torch.complex128))
def sparse(): return with_buffer(torch.eye(3).to_sparse())
def quantized(): return with_buffer(torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8))
def expanded(): return with_buffer(torch.zeros(1).expand(5))
def meta(): return with_buffer(torch.zeros(5, device="meta"))
def views():
    model = net()
    base = torch.zeros(6)
    model.register_buffer("a", base[:4]); model.register_buffer("b", base[2:])
    return model
def named():
    model = nn.Sequential()
    model.add_module("\\x1b[31m\\u202e\\nred", net())
    return model
"""
RAISING = [f"{what}{i}" for what in ("model", "batches", "later", "forward", "saved", "sized") for i in range(14)]
MODELS = [
    *("net", "scripted", "inside", "number", "data", "extra", "complex_", "complex128", "sparse", "quantized"),
    *("expanded", "meta", "views", "named", "Extra", "ERRORS"),
]
DATA = ["data", "number", "empty", "nothing", "texts", "deep", "other", "infinite_values", "net"]
LONG, DIGITS = "n" * 5000, "9" * 5000
TEXTS = [
    *("", " ", "-", "--", ".", "/", "..", ":", "a:b", "net.py", "net.py:", ":net", "net.py:no.no", "no.py:net"),
    *("builtins:dict", "time:time", "os:_exit_", "torch:nn", "sys:exit", "math:pi", "..x:y", "a b:c", "net.py:data.x"),
    *(LONG, f"{LONG}.py:net", f"{LONG}:net", f"{LONG}.npz", "\x1b[2J", "\u202e.npz", "é.npz", "\udcff.npz", "a\nb:c"),
    *("folder", "folder.npz", "folder.py:net", "x.npz", "text.npz", "/dev/null", "/proc/self/mem", "/dev/null/x.npz"),
]
PLACES = [
    *("out.pt", "out.safetensors", "out.pt2", "out.onnx_", "out", "", ".", "no/out.pt", "folder.pt", "loop.pt"),
    *("/proc/out.pt", "/sys/out.safetensors", "/dev/null/out.pt", "file/out.pt", f"{LONG}.pt", "n" * 252 + ".pt"),
    *("\x1b[2J.pt", "\udcff.pt", "\u202e.safetensors", "link.pt", "dangling.pt", "pipe.pt", "old.pt", "net.py"),
]
NUMBERS = ["0", "-1", "1", "3", "1.5", "nan", "inf", "x", "", "1e9", "9" * 30, DIGITS, str(2**63 - 1), str(2**63), "٣"]
SHAPES = [
    *("2,3,8,8", "2x3x8x8", "0,3,8,8", "2,5,8,8", "2", "", "2,,3", "-1,3", "1e3", DIGITS, f"{DIGITS},3", "9" * 18),
    *("100000,100000,100000", "4294967296,4294967296", ",".join(["1"] * 100), "1,3,2,2", "٣,3,8,8", "0,0,0,0"),
]
VARIABLES = {
    "LOCAL_WORLD_SIZE": ["", "x", "0", "-1", "2", DIGITS],
    "TORCHELASTIC_RUN_ID": ["", "x"],
    "RANK": ["x", "-1", "7"],
    "WORLD_SIZE": ["x", "0", "1"],
    "BATCHNORM_NOTHING": ["x"],
}


def make() -> None:
    """What command lines name, in the current folder."""
    Path("net.py").write_text(CODE, encoding="utf-8")
    for name in ("folder", "folder.npz", "folder.py", "folder.pt"):
        Path(name).mkdir()
    Path("file").touch()
    Path("text.npz").write_text("no arrays")
    os.symlink("loop.pt", "loop.pt")
    os.symlink("dangling_target.pt", "dangling.pt")
    os.symlink("link_target.pt", "link.pt")
    os.mkfifo("pipe.pt")
    x = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32)
    np.savez("x.npz", x=x)
    torch.save({"a": torch.zeros(2)}, "wrong.pt")
    refresh()


def refresh() -> None:
    """The files that commands may write to, as they are before each."""
    for name in ("old.pt", "link_target.pt"):
        Path(name).write_bytes(b"old")
    Path("dangling_target.pt").unlink(missing_ok=True)


def arguments(source: random.Random) -> list[str]:
    """A command line, most of which is in order."""

    def often(good: str, *hostile: list[str]) -> str:
        return good if source.random() < 0.6 else source.choice(source.choice(hostile))

    def reference(names: list[str]) -> list[str]:
        return [f"net.py:{name}" for name in names]

    model = often("net.py:net", reference(MODELS), reference(RAISING), TEXTS)
    output = often("out.pt", PLACES)
    if source.random() < 0.35:
        example = often("2,3,8,8", SHAPES, reference(DATA), reference(RAISING), TEXTS)
        words = ["fold", model, "--example", example, "--output", output]
    else:
        data = often("net.py:data", reference(DATA), reference(RAISING), TEXTS)
        words = ["recalibrate", model, "--data", data, "--output", output]
        options = {
            "--method": ["exact", "pooled", "average", "", "best", LONG],
            "--batch-size": NUMBERS,
            "--max-samples": NUMBERS,
            "--memory-limit": [*NUMBERS, "2GB", "9" * 20 + "T", f"{DIGITS}GB", "1.5XB", f"0.{DIGITS}"],
            "--checkpoint": [*PLACES, "wrong.pt", "x.npz"],
        }
        for name in source.sample(sorted(options), source.choice((0, 0, 1, 1, 2))):
            words += [name, source.choice(options[name])]
            if name == "--checkpoint" and source.random() < 0.8:
                words += ["--method", "pooled"]
    if source.random() < 0.15:
        words += ["--weights", source.choice([*TEXTS, *PLACES, "wrong.pt", "x.npz"])]
    if source.random() < 0.1:
        words.insert(source.randrange(len(words) + 1), source.choice([*TEXTS, *NUMBERS, "--help", "--nothing"]))
    return words


@contextmanager
def environment(source: random.Random) -> Iterator[None]:
    """Sometimes a hostile one. Never a whole one of torchrun's: nobody else would come to the meeting."""
    names = source.sample(sorted(VARIABLES), source.choice((1, 2))) if source.random() < 0.1 else []
    with mock.patch.dict(os.environ, {name: source.choice(VARIABLES[name]) for name in names}):
        yield


def entries() -> set[str]:
    """What is in the current folder."""
    return set(os.listdir())


def case(source: random.Random) -> tuple[str, list[str]]:
    """Do one command line, and say what is wrong."""
    refresh()
    words, before = arguments(source), entries()
    with environment(source):
        outcome = run(words)
    found = faults(outcome)
    new = entries() - before
    if outcome.code == 2:
        # What ended early may have kept its progress, on purpose.
        kept = {Path(w).name for a, w in itertools.pairwise(words) if a == "--checkpoint"}
        found += [f"it left {left!r}" for left in sorted(new - kept)]
        found += [
            f"{name} is another" for name in ("old.pt",) if name not in kept and Path(name).read_bytes() != b"old"
        ]
    elif "--help" not in words:
        if "0 layers" in outcome.out and "scripted" in words[1]:
            found.append(f"it did nothing, and says that all is well: {outcome.out!r}")
        output = Path(words[words.index("--output") + 1])
        if output.suffix == ".pt":
            torch.load(output, weights_only=False)
    for left in new:
        Path(left).unlink()
    short = [word if len(word) < 60 else f"{word[:20]}...({len(word)})" for word in words]
    return ascii(short), found


def fuzz(cases: int, seed: int) -> list[str]:
    """Do so many cases in the current folder; what is wrong, a line each."""
    make()
    return repeated(case, cases, seed)


if __name__ == "__main__":
    from fuzz.judging import main

    main(__doc__, fuzz)
