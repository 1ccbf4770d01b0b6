"""Progress of method "pooled" in a file, so that a run that was killed can go on."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import OptionError
from batchnorm.moments import Moments
from batchnorm.population.context import Context
from batchnorm.population.layers import Layer
from batchnorm.population.raw import raw
from batchnorm.population.torch_state import random_state, set_random_state

SECONDS_BETWEEN = 5.0
_FORMAT = "batchnorm pooled statistics 1"


class Checkpoint:
    """A file with the moments of the batches that were read.

    Args:
        path: the file; with several processes, one for each, with its rank at the end of the name.
        context: what is recalibrated, by what.
    """

    def __init__(self, path: Path, context: Context) -> None:
        group = context.group
        self._path = path if group.size == 1 else path.with_name(f"{path.name}.{group.rank}")
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._context = context
        self._identity = _identity(context)
        self._last = time.monotonic()

    def load(self) -> dict[Layer, Moments] | None:
        """The moments in the file; None where there is none. The batches that they are of will be passed over.

        Raises:
            OptionError: the file is of something else, or holds more batches than there are.
        """
        if not self._path.exists():
            return None
        try:
            content: Any = torch.load(self._path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._unfit(f"it cannot be read ({error})") from error
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise self._unfit("it is no such file")
        if content["identity"] != self._identity:
            raise self._unfit("its model, weights, layers or processes are others")
        if not self._context.batches.skip(content["read"], content["used"], content["samples"]):
            raise self._unfit(f"it is of {content['read']} batches, and there are fewer")
        self._context.progress.calls, self._context.progress.done = content["calls"], content["done"]
        set_random_state(list(zip([g for g, _ in random_state()], content["random"], strict=False)))
        values = iter(content["moments"])
        return {layer: Moments(*(t.to(layer.mean.device) for t in next(values))) for layer in self._context.layers}

    def save(self, joined: Mapping[Layer, Moments], *, now: bool = False) -> None:
        """Replace the file, if it is time to: in one step, so that there is a whole one whenever this is killed."""
        if not now and time.monotonic() - self._last < SECONDS_BETWEEN:
            return
        batches = self._context.batches
        content = {
            "format": _FORMAT,
            "identity": self._identity,
            "read": batches.read,
            "used": batches.used,
            "samples": batches.samples,
            "calls": self._context.progress.calls,
            "done": self._context.progress.done,
            "random": [state for _, state in random_state()],
            "moments": [(m.count.cpu(), m.mean.cpu(), m.m2.cpu()) for m in joined.values()],
        }
        with self._temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        self._temporary.replace(self._path)
        self._last = time.monotonic()

    def remove(self) -> None:
        """It is not needed any more."""
        self._temporary.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def _unfit(self, why: str) -> OptionError:
        return OptionError(
            f'got checkpoint "{self._path}" that does not fit: {why}. It must be of the same method, model and data. '
            f"Delete it to start again, or name another file"
        )


def _identity(context: Context) -> str:
    """Layers, processes and weights as a short text; not the statistics that are going to be replaced."""
    replaced = {id(t) for layer in context.layers for t in (layer.mean, layer.var)}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{context.group.rank} of {context.group.size}".encode())
    for layer in context.layers:
        digest.update(f"{layer.name} {layer.num_channels}\n".encode())
    for name, tensor in [*context.model.named_parameters(), *context.model.named_buffers()]:
        if id(tensor) not in replaced and not tensor.is_meta:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(raw(values.data_ptr(), values.nbytes))
    return digest.hexdigest()
