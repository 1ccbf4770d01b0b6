"""Every tolerance of the test suite, with its reason."""

from __future__ import annotations

import torch

# Statistics against the oracle. The sums of float32 values are float64, so what remains is the rounding of a few
# thousand additions: far below 1e-9. Half precision is added up in float32 for eight steps of 6e-8. 1e-6 is
# the promise to users (in standard deviations for a mean, relative for a variance), and holds for |mean| / std up to
# 1e4.
STATISTIC = 1e-6

# One float32 output against the oracle, times (1 + |output|): half a unit in the last place is 6e-8; the subtraction,
# the scale, the fused multiply-add and the residual round once each.
OUTPUT = 1e-6

# A float32 gradient of the input against the oracle, times (1 + |gradient|): as the output, with two more roundings.
GRADIENT = 2e-6

# A sum over n terms of which each was rounded to float32, against the oracle, times the root of n: the roundings are
# independent, and the terms of the tests are of order 1.
SUM_PER_ROOT = 1e-6

# Moments joined in another order, in float64, per unit of the offset: a few hundred additions of rounding 1.1e-16.
ASSOCIATIVITY = 1e-12

# m2 after a scaling by hand, relative: two more roundings of a value that may be a difference of large ones.
SCALED_SQUARES = 1e-9

# Running statistics of order 1 in float64, absolute: one blend is four roundings of 1.1e-16.
BLEND = 1e-15

# A float32 running statistic of up to 4 after 5,000 steps, absolute: each rounds by at most 2.4e-7.
MANY_STEPS = 1.2e-3

# Results that need sums over 70,001 float32 values, over 1 + |value|: torch keeps such sums in float32, and is off by
# 1e-3 with one thread, less with more. Wrong values are off by more.
LONG_SUMS = 1e-2

# Results of a half-precision layer, over 1 + |value|: torch rounds between its steps, eight times at most.
SEVERAL_ROUNDINGS = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}

# A gradient behind layers and ReLUs in bfloat16 against float32, in norms: of the inputs to a ReLU, one in a hundred is
# so near 0 that rounding opens or closes it. A wrong gradient is off by 1 and more.
TRAINED_IN_BFLOAT16 = 0.2

# What a gradient that is 0 up to rounding may be, absolute, beside the other bounds: float32's 6e-8.
GRADIENT_ZERO = 1e-7

# A third derivative of a cube of order 10, relative: every derivative multiplies the roundings up, and float32 keeps
# about three digits.
THIRD_DERIVATIVE = {torch.float64: 1e-9, torch.float32: 5e-3}

# How far a recalibrated layer may be from the moments of what comes into it in inference: of the mean in standard
# deviations, and of the log of the variance. Statistics are stored in float32, 6e-8 each, and the layers after a
# rounded one see inputs that differ by as much; a wrong method is off by 1e-2 and more.
POPULATION = 1e-5

# The same statistics computed from the same data in other parts, relative: float64 sums in another order, stored in
# float32, through a few layers.
PARTS = 1e-6

# The same on the CPU and on a GPU, relative and absolute: convolutions add up float32 values in other orders.
CONVOLVED = 1e-4

# A benchmark's answer against float64, relative, and ten times that absolute for sums: it need only tell right from
# wrong.
BENCH_ANSWER = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

# Ours against torch.nn in the same dtype, (relative, absolute): both round, so the bounds are the field's usual ones
# for one dtype (torch.testing.assert_close). Where intermediate results in half precision differ, a gradient that
# should be 0 is not, hence the larger absolute bounds.
AGAINST_TORCH = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

# What a native result may be off besides the rounding to its dtype, times (1 + |value|): the arithmetic is float32 for
# half precision too; float64's is a few hundred roundings of 1.1e-16.
NATIVE = {
    torch.float64: 1e-13,
    torch.float32: GRADIENT,
    torch.float16: GRADIENT,
    torch.bfloat16: GRADIENT,
}

# A result of the reference in a dtype against the oracle, (relative, absolute): the reference computes in float64 and
# rounds once, so this is one rounding.
ONE_ROUNDING = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (6.0e-8, 1e-30),
    torch.float16: (4.9e-4, 6.0e-8),
    torch.bfloat16: (3.92e-3, 1e-30),
}

# A number of the study's that passed through a few float32 layers, against the same in float64, relative or of values
# of order 1: some hundred roundings of 6e-8. A wrong formula is off by 1e-2 and more.
STUDY = 1e-4

# The same where a network was trained on the way, or where a value less itself is divided by sqrt(eps), 316 times it.
STUDY_TRAINED = 1e-3

# A share of samples, where two ways to compute the same network round differently: one in a hundred near the border.
STUDY_SHARE = 0.01

# A number of the study's that is float64 throughout, relative.
STUDY_DOUBLE = 1e-9

# Random calls against the reference in float64, in units of NATIVE, over 1 + the largest |value|: sums of hundreds of
# terms, each rounded once, and eps = 1e-2, which multiplies by ten at most. A wrong value is off by 1e-2 and more.
FUZZ = 100

# Outputs of two quantized models, in parts of the range of outputs: a value near the middle of two levels may become
# either, in each layer. Three levels of 7 bits, which is what x86 takes of 8 so that sums do not overflow.
QUANTIZED_TWICE = 3 / 127

# A quantized network's mean error relative to its largest output: the input, two or three activations and the weights
# are rounded to 8 bits, 7 for x86, and what is outside of the ranges seen so far is cut off; 0.8 % each.
QUANTIZED = 2e-2

# Numbers in six digits, or in float32 as TensorBoard keeps them: relative.
SIX_DIGITS = 1e-5
