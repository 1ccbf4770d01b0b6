"""The covering sets cover."""

from __future__ import annotations

import itertools

from support import samples


def test_pairwise_has_every_pair_in_few_combinations() -> None:
    axes = ("abcd", (None, True, False), (0, 1), (0, 1), (0, 1))
    combinations = samples.pairwise(*axes)
    for (i, axis), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(c[i], c[j]) for c in combinations} == set(itertools.product(axis, other))
    assert 12 <= len(combinations) <= 14  # 96 in all; 12 pairs of the two longest axes


def test_every_activation_in_every_dtype_and_layout() -> None:
    everywhere = samples.every_activation()
    for activation in (None, *samples.ACTIVATIONS):
        found = [sample for sample in everywhere if sample.activation == activation]
        assert {(s.dtype, s.with_residual) for s in found} == set(itertools.product(samples.DTYPES, (False, True)))
        assert {s.layout for s in found} == set(samples.THREE)


def test_no_sample_twice() -> None:
    assert len({sample.name for sample in samples.NATIVE}) == len(samples.NATIVE)


def test_every_layout_of_the_operators_exists() -> None:
    assert len(samples.OPERATOR_LAYOUTS) == 9
    assert {case.sample.layout for case in samples.operator_cases()} == set(samples.OPERATOR_LAYOUTS)
