"""A peer's side of the benchmark: run by the peer's own Python, it imports nothing of this package.

    python worker.py jax|tensorflow THREADS

Reads requests from stdin, a line of JSON each, and answers on stdout likewise.
"""

# mypy: ignore-errors
# The peers are not installed where this package is checked.

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EPS = 1e-5
Functions = dict[str, Callable[[], Any]]


def jax_functions(x: Any, dy: Any, weight: Any, bias: Any, axis: int, dtype: str) -> Functions:
    """Batch normalization and ReLU as jax.numpy says it, jitted."""
    import jax
    import jax.numpy as jnp

    axis %= x.ndim
    dims = tuple(d for d in range(x.ndim) if d != axis)
    shape = tuple(-1 if d == axis else 1 for d in range(x.ndim))
    x, dy = (jnp.asarray(a, dtype=dtype) for a in (x, dy))
    weight, bias = jnp.asarray(weight), jnp.asarray(bias)

    def normalize(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        scale = (weight / jnp.sqrt(var + EPS)).reshape(shape)
        return jax.nn.relu((x - mean.reshape(shape)) * scale + bias.reshape(shape)).astype(dtype)

    def train(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(jnp.float32)
        mean = wide.mean(dims)
        return normalize(wide, mean, jnp.square(wide - mean.reshape(shape)).mean(dims), weight, bias)

    def both(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(train, x, weight, bias)
        return y, *pullback(dy)

    forward_j, both_j, infer_j = jax.jit(train), jax.jit(both), jax.jit(normalize)
    zeros, ones = jnp.zeros_like(bias), jnp.ones_like(bias)
    return {
        "forward": lambda: jax.block_until_ready(forward_j(x, weight, bias)),
        "both": lambda: jax.block_until_ready(both_j(x, weight, bias, dy)),
        "inference": lambda: jax.block_until_ready(infer_j(x, zeros, ones, weight, bias)),
    }


def tensorflow_functions(x: Any, dy: Any, weight: Any, bias: Any, axis: int, dtype: str) -> Functions | None:
    """FusedBatchNorm and ReLU in a tf.function. On the CPU it knows the channels last alone."""
    import tensorflow as tf

    if axis % x.ndim != x.ndim - 1:
        return None
    shape = x.shape
    flat = (1, 1, -1, shape[-1]) if x.ndim != 4 else shape
    x, dy = (tf.cast(tf.constant(a.reshape(flat)), dtype) for a in (x, dy))
    weight, bias = tf.constant(weight), tf.constant(bias)
    zeros, ones = tf.zeros_like(bias), tf.ones_like(bias)

    def normalize(x: Any, training: bool) -> Any:
        given = {} if training else {"mean": zeros, "variance": ones}
        y, *_ = tf.compat.v1.nn.fused_batch_norm(x, weight, bias, epsilon=EPS, is_training=training, **given)
        return tf.nn.relu(y)

    @tf.function
    def forward() -> Any:
        return normalize(x, True)

    @tf.function
    def both() -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, weight, bias))
            y = normalize(x, True)
        return y, *tape.gradient(y, (x, weight, bias), output_gradients=dy)

    @tf.function
    def inference() -> Any:
        return normalize(x, False)

    return {"forward": forward, "both": both, "inference": inference}


def main() -> None:
    """Serve requests until stdin ends."""
    name, threads = sys.argv[1:]
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS=threads, CUDA_VISIBLE_DEVICES="")
    functions: Functions | None = {}
    shape: tuple[int, ...] = ()
    for line in sys.stdin:
        request = json.loads(line)
        reply: object = True
        if request["do"] == "load":
            arrays = [np.load(Path(request["folder"]) / f"{key}.npy") for key in ("x", "dy", "weight", "bias")]
            shape = arrays[0].shape
            make = jax_functions if name == "jax" else tensorflow_functions
            functions = make(*arrays, request["axis"], request["dtype"])
            reply = functions is not None
        elif request["do"] == "run":
            work = (functions or {}).get(request["phase"])
            start = time.perf_counter()
            result = work() if work else None
            reply = time.perf_counter() - start if work else None
            del result
        else:
            results = (functions or {})["both"]()
            for key, value in zip(("y", "dx", "dweight", "dbias"), results, strict=True):
                array = np.asarray(value).astype(np.float32)
                np.save(Path(request["folder"]) / f"{key}.npy", array.reshape(shape if key in ("y", "dx") else -1))
        print(json.dumps(reply), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    main()
