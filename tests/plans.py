"""The smallest plan of each experiment: everything happens, nothing means anything."""

from __future__ import annotations

from batchnorm.study import dropout, placement, rates, speed

TINY = {
    "placement": placement.Plan(seeds=2, steps=3, rates=(0.1,), hidden=(8,), width=2, blocks=1),
    "speed": speed.Plan(seeds=2, steps=4, evaluate_every=2, rates=(0.1, 0.5), hidden=(8,)),
    "rates": rates.Plan(seeds=2, steps=3, rates=(0.01, 0.1, 1.0), hidden=(8,)),
    "dropout": dropout.Plan(seeds=2, samples=64, steps=3, rates=(0.1,), hidden=(8,)),
}
