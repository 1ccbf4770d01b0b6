"""Random calls of the native operators against the reference in float64; also what runs under sanitizers.

    python tests/fuzz/operators.py --cases 2000 --seed 7

Every case is drawn from the seed and its number: shapes, also empty ones, dtypes, memory layouts, masks, residuals,
activations, samples of several domains, aliasing, and calls that must be refused. `--library` loads another build of
the extension, as `make sanitize` does. With `--threads` several threads work at once, while the instruction set changes
under them.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = 1e-2  # so that the variance of two values that are nearly equal does not magnify every rounding


def use_library(path: str) -> None:
    """Have the package, which is not imported yet, load this file."""
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, None, origin=path) if name == "batchnorm._native" else found(name, package)

    importlib.util.find_spec = find


class Case:
    """One random call."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(60))
        self.dtype = self.rng.choice(DTYPES)
        rank = self.rng.choice((2, 2, 3, 4, 4, 5, 6))
        most = {2: 300, 3: 60, 4: 20, 5: 9, 6: 5}[rank]
        self.shape = [self.rng.choice((1, 2, 3, self.rng.randint(1, most))) for _ in range(rank)]
        if self.rng.random() < 0.04:
            self.shape[self.rng.randrange(rank)] = 0
        self.axis = self.rng.choice((1, 1, 1, rank - 1, self.rng.randrange(rank)))
        self.channels = self.shape[self.axis]

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def arranged(self, values: Tensor) -> Tensor:
        """The same values in a layout of the case's choice."""
        rank, kind = values.dim(), self.rng.randrange(6)
        if kind == 0:  # any order of the dimensions
            order = self.rng.sample(range(rank), rank)
            inverse = sorted(range(rank), key=order.__getitem__)
            return values.permute(order).contiguous().permute(inverse)
        if kind == 1:  # channels last
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        if kind == 2:  # every second value of a larger tensor, from an odd address
            memory = torch.full((values.numel() * 2 + 1,), float("nan"), dtype=values.dtype)
            return memory[1:].view(*values.shape, 2)[..., 0].copy_(values) if values.numel() else values
        return values.contiguous()

    def tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.arranged(self.values(*self.shape).to(dtype or self.dtype))

    def domain(self) -> tuple[Tensor, int] | None:
        """The domain of each sample, and how many there are: in any order, in runs, or all the same."""
        if self.axis == 0 or self.rng.random() < 0.5:
            return None
        number, samples = self.rng.choice((1, 2, 2, 3, 8, 70)), self.shape[0]
        domain = torch.randint(self.rng.choice((1, number)), (samples,), generator=self.generator)
        if self.rng.random() < 0.3:
            domain = domain.sort().values
        return domain.repeat_interleave(2)[::2] if self.rng.random() < 0.2 else domain, number

    def parameter(self, domains: int | None = None) -> Tensor | None:
        if self.rng.random() < 0.3:
            return None
        if domains is not None and self.rng.random() < 0.5:
            return self.values(self.channels, domains).to(self.rng.choice(DTYPES)).t()
        return self.values(2 * self.channels)[:: self.rng.choice((1, 2))][: self.channels].to(self.rng.choice(DTYPES))

    def mask(self) -> Tensor | None:
        shape = [size for dim, size in enumerate(self.shape) if dim != self.axis]
        if self.rng.random() < 0.5:
            return None
        counts = self.values(*shape) > -0.5
        if self.rng.random() < 0.5:
            return counts
        dtype = self.rng.choice(DTYPES)
        return (self.values(*shape).abs() * counts).to(dtype)


def wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with everything floating in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def check(case: Case, name: str, actual: Tensor, expected: Tensor) -> None:
    """Within the roundings of the case's dtype and of float32."""
    from support import tolerances

    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    if expected.numel() == 0:
        return
    a, e = actual.double(), expected.double()
    relative, absolute = tolerances.ONE_ROUNDING[actual.dtype] if actual.dtype in DTYPES else (0.0, 0.0)
    size = 1 + e.abs().nan_to_num(0, 0, 0).max()
    bound = tolerances.FUZZ * tolerances.NATIVE[case.dtype] * size + relative * e.abs() + absolute
    wrong = ~((a - e).abs() <= bound) & ~(a.isnan() & e.isnan()) & (a != e)
    assert not wrong.any(), f"{name}: {a[wrong][:5].tolist()} instead of {e[wrong][:5].tolist()}"


def refused(said: str, operation: Any, *arguments: Any) -> None:
    """The call raises an error that says so."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        if said in str(error):
            return
        raise
    raise AssertionError(f"{operation}: a call was accepted that must be refused, as {said!r}")


def run(seed: int, number: int) -> None:
    """One case.

    Raises:
        AssertionError: a result is wrong, or a call that must be refused is not.
    """
    from batchnorm.activations import ACTIVATIONS
    from batchnorm.kernels import reference

    native = torch.ops.batchnorm
    case = Case(seed, number)
    rng = case.rng
    x, dy = case.tensor(), case.tensor()
    table = case.domain()
    domain, domains = table or (None, None)
    weight, bias, mask = case.parameter(domains), case.parameter(domains), case.mask()
    which = () if domain is None else (domain,)
    residual = case.tensor() if rng.random() < 0.5 else None
    activation = rng.choice((None, *ACTIVATIONS))
    options = (EPS, case.axis, activation)
    affine = (weight, bias, residual, *options)

    expected = reference.forward(*wide((x, *affine, mask)), *(table or ()))
    results = native.forward(x, *affine, mask, *(table or ()))
    for name, a, e in zip(("y", "count", "mean", "m2"), results, expected, strict=True):
        check(case, f"forward {name}", a, e)
    moments = native.batch_moments(x, case.axis, mask, *(table or ()))
    for name, a, e in zip(("count", "mean", "m2"), moments, expected[1:], strict=True):
        check(case, f"moments {name}", a, e)

    _, count, mean, m2 = expected
    z = reference.normalize(*wide((x, mean, reference.biased_variance(count, m2), *affine[:-1], None)), *which)
    for kink in ACTIVATIONS[activation].kinks if activation else ():
        dy = torch.where((z - kink).abs() < 1e-2, 0, dy)  # where the derivative jumps, rounding decides
    dy = case.arranged(dy)
    expected_gradients = reference.backward(*wide((dy, x, count, mean, m2, *affine, mask)), *which)
    gradients = native.backward(dy, x, count, mean, m2, *affine, mask, *which)
    for name, a, e in zip(("dx", "dweight", "dbias", "dresidual"), gradients, expected_gradients, strict=True):
        check(case, f"backward {name}", a, e)

    shape = (case.channels,) if domains is None else (domains, case.channels)
    fixed = (case.values(*shape), case.values(*shape).abs() + 0.1)
    e = reference.normalize(*wide((x, *fixed, *affine)), *which)
    check(case, "normalize", native.normalize(x, *fixed, *affine, *which), e)
    if domain is not None and domains is not None:
        if len(domain):
            outside = domain.clone()
            outside[rng.randrange(len(domain))] = rng.choice((-1, domains, 2**40))
            refused("must lie in", native.forward, x, *affine, mask, outside, domains)
        commit(case, results[1:], rng.randrange(domains))
        return
    if x.numel() and rng.random() < 0.3:
        in_place(case, x, fixed, affine)
    commit(case, results[1:])


def in_place(case: Case, x: Tensor, fixed: tuple[Tensor, Tensor], affine: tuple[Any, ...]) -> None:
    """`normalize_`, with a residual that may be the input, or overlap it."""
    from batchnorm.kernels import reference

    native = torch.ops.batchnorm
    weight, bias, residual, *options = affine
    kind = case.rng.randrange(3)
    if kind == 0:
        residual = x
    if kind == 1:
        memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
        x, residual = memory[1:].view(x.shape).copy_(x), memory[:-1].view(x.shape)
        if x.numel() > 1:
            refused("shares memory", native.normalize_, x, *fixed, weight, bias, residual, *options)
            return
    e = reference.normalize(*wide((x, *fixed, weight, bias, residual, *options)))
    native.normalize_(x, *fixed, weight, bias, residual, *options)
    check(case, "normalize_", x, e)


def commit(case: Case, moments: tuple[Tensor, ...], *domain: int) -> None:
    """`commit`, into statistics of any dtype and stride, also of a domain's moments; a wrong size is refused."""
    from batchnorm.kernels import reference

    native = torch.ops.batchnorm
    c, step = case.channels, case.rng.choice((1, 2))
    dtype = case.rng.choice(DTYPES)
    momentum = case.rng.choice((None, 0.0, 0.1, 1.0))
    ours = [case.values(c * step).abs().to(dtype)[::step] for _ in range(2)]
    ours += [torch.tensor(case.rng.randrange(3)), torch.zeros(c, dtype=torch.int64)]
    theirs = [t.clone() for t in ours]
    if case.rng.random() < 0.1:
        ours[case.rng.choice((0, 1, 3))] = torch.zeros(c + 1)
        refused("must", native.commit, *ours, *moments, momentum, *domain)
        return
    native.commit(*ours, *moments, momentum, *domain)
    reference.commit(*theirs, *moments, momentum, *domain)
    for name, a, e in zip(("running_mean", "running_var", "tracked", "skipped"), ours, theirs, strict=True):
        check(case, f"commit {name}", a, e)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 1 and what to repeat if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", help="the instruction set; the best if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--library", help="a build of the extension")
    options = parser.parse_args(arguments)
    if options.library:
        use_library(options.library)
    from batchnorm.kernels import cpu

    if not cpu.AVAILABLE:
        print(cpu.UNAVAILABLE_REASON, file=sys.stderr)
        return 1
    if options.level:
        cpu.use_level(options.level)
    chosen = cpu.level()

    def one(number: int) -> str:
        if options.threads > 1:
            cpu.use_level(random.Random(number).choice(cpu.levels()))
            with cpu.resizable_outputs():
                pass
        try:
            run(options.seed, number)
        except (AssertionError, RuntimeError) as error:
            return f"case {number} of seed {options.seed} (--seed {options.seed} --first {number} --cases 1): {error}"
        return ""

    with ThreadPoolExecutor(options.threads) as pool:
        numbers = range(options.first, options.first + options.cases)
        failures = [text for text in (map(one, numbers) if options.threads == 1 else pool.map(one, numbers)) if text]
    cpu.use_level(chosen)
    for text in failures[:20]:
        print(text, file=sys.stderr)
    print(f"{options.cases} cases, {len(failures)} failed, {chosen}")
    return bool(failures)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
