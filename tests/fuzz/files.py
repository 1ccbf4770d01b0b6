"""Damaged files of every kind that is read: `python tests/fuzz/files.py --cases 1000 --seed 0`.

Each case damages one good file and gives it to a command. Allowed is one line with exit code 2 and nothing written; or
exit code 0 with the right weights. Right are those of the undamaged file where the format has checksums; the others'
numbers may have become others, but must be weights of the model.
"""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `fuzz` is found, as pytest finds it

from batchnorm.population import checkpoint
from fuzz.judging import faults, repeated, run

CODE = '''
import torch
from torch import nn

def net():
    """A small network: ünïcode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))

def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(4)]

def stopping():
    yield from data()[:2]
    raise ValueError("stop")
'''
POOLED = ["--method", "pooled", "--checkpoint", "progress"]
COMMANDS = {
    "w.safetensors": ["--data", "net.py:data", "--weights", "w.safetensors"],
    "w.pt": ["--data", "net.py:data", "--weights", "w.pt"],
    "old.pt": ["--data", "net.py:data", "--weights", "old.pt"],
    "x.npz": ["--data", "x.npz"],
    "small.npz": ["--data", "small.npz"],
    "progress": ["--data", "net.py:data", *POOLED],
    "net.py": ["--data", "net.py:data"],
}
CHECKED = {"w.pt", "x.npz", "small.npz", "progress"}  # formats with checksums
FOREIGN = (
    b"",
    b"\0" * 1000,
    b"PK\x03\x04",
    b"\x93NUMPY\x01\x00",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"8\0\0\0\0\0\0\0" + b"{" * 56,
    b"\xff" * 8 + b"{}",
    pickle.dumps({"a": [1, 2]}),
    pickle.dumps(print),
    b"def net(:\n  '''",
    b"raise SystemExit(0)",
    b"class E(BaseException):\n def __str__(self): raise E\nraise E",
    b"def net(): raise GeneratorExit\n",
)
VALUES: tuple[Any, ...] = (
    *(None, -1, True, 1.5, "x", b"x", [], {}, (), 10**30),
    torch.zeros(2),
    torch.zeros(()),
    torch.zeros(3, 3).to_sparse(),
    torch.zeros(2, dtype=torch.complex64),
    torch.full((5,), torch.nan, dtype=torch.float64),
)


def make() -> dict[str, bytes]:
    """The good files, in the current folder."""
    Path("net.py").write_text(CODE, encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    state = scope["net"]().state_dict()
    state["0.weight"] = state["0.weight"] + 0.5
    save_file(state, "w.safetensors")
    torch.save(state, "w.pt")
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.savez("x.npz", x=x, y=np.arange(40))
    np.savez_compressed("small.npz", x=x, y=np.arange(40))
    before, checkpoint.SECONDS_BETWEEN = checkpoint.SECONDS_BETWEEN, 0.0
    outcome = run(["recalibrate", "net.py:net", "--data", "net.py:stopping", *POOLED, "--output", "out.pt"])
    checkpoint.SECONDS_BETWEEN = before
    assert "ValueError: stop" in outcome.err, outcome
    return {name: Path(name).read_bytes() for name in COMMANDS}


def damaged(good: dict[str, bytes], name: str, source: random.Random) -> tuple[bytes, bool]:
    """One way to damage a file; and whether its checksums are still right: weights may be exchanged for others."""
    content = bytearray(good[name])
    kinds = ["bit", "bits", "cut", "lost", "doubled", "foreign", "swapped", "noise"]
    kind = source.choice([*kinds, "field"] if name in ("progress", "w.pt", "old.pt") else kinds)
    place = source.randrange(len(content))
    if kind == "bit":
        content[place] ^= 1 << source.randrange(8)
    elif kind == "bits":
        for _ in range(source.randrange(2, 50)):
            content[source.randrange(len(content))] = source.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "lost":
        del content[place : place + source.randrange(1, 64)]
    elif kind == "doubled":
        content[place:place] = content[place : place + 64]
    elif kind == "foreign":
        return source.choice(FOREIGN), False
    elif kind == "swapped":
        return good[source.choice(sorted(good))], True
    elif kind == "noise":
        content[place : place + 200] = source.randbytes(200)
    else:
        return _edited(name, source), name != "progress"
    return bytes(content), False


def _edited(name: str, source: random.Random) -> bytes:
    """A dict of torch.save's with a field of another type, without one, or with two exchanged."""
    content = dict(torch.load(name, weights_only=True))
    first, second = source.sample(sorted(content), 2)
    change = source.randrange(3)
    if change == 0:
        content[first] = source.choice(VALUES)
    elif change == 1:
        del content[first]
    else:
        content[first], content[second] = content[second], content[first]
    torch.save(content, "edited")
    edited = Path("edited").read_bytes()
    Path("edited").unlink()
    return edited


def case(good: dict[str, bytes], right: dict[str, Any], source: random.Random) -> tuple[str, list[str]]:
    """Damage one file, run its command, and say what is wrong."""
    name = source.choice(sorted(COMMANDS))
    for other, content in good.items():
        Path(other).write_bytes(content)
    content, whole = damaged(good, name, source)
    Path(name).write_bytes(content)
    output = Path("out.pt")
    output.unlink(missing_ok=True)
    before = {path.name for path in Path().iterdir()}
    outcome = run(["recalibrate", "net.py:net", *COMMANDS[name], "--output", str(output)])
    found = faults(outcome)
    left = {path.name for path in Path().iterdir()} - before
    if outcome.code == 2 and left:
        found.append(f"it left {sorted(left)}")
    if outcome.code == 0:
        found += [f"it left {sorted(left)}"] if left != {output.name} else []
        state = torch.load(output, weights_only=True)
        if name != "net.py" and state.keys() != right[name].keys():
            found.append("it wrote weights of another model")
        elif name in CHECKED and not whole:
            found += [f"{key} is wrong" for key, value in right[name].items() if not torch.equal(state[key], value)]
    elif content == good[name]:
        found.append("it refused a good file")
    return f"{name} of {len(content)} bytes", found


def results(good: dict[str, bytes]) -> dict[str, Any]:
    """What each command writes with good files."""
    right = {}
    for name, arguments in COMMANDS.items():
        Path("progress").write_bytes(good["progress"])
        assert run(["recalibrate", "net.py:net", *arguments, "--output", "out.pt"]).code == 0, name
        right[name] = torch.load("out.pt", weights_only=True)
    return right


def fuzz(cases: int, seed: int) -> list[str]:
    """Do so many cases in the current folder; what is wrong, a line each."""
    good = make()
    right = results(good)
    return repeated(lambda source: case(good, right, source), cases, seed)


if __name__ == "__main__":
    from fuzz.judging import main

    main(__doc__, fuzz)
