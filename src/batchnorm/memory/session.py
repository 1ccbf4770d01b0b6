"""One forward pass: what of each tensor that autograd saves in it is kept, and what is computed again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batchnorm import _torch
from batchnorm._torch import version
from batchnorm.memory.recipes import ACTIVATIONS, MAX_POOLS, RULES, Recipe, places
from batchnorm.memory.values import Saved, Value, changed

# In the metadata of a node of the graph: the values of its results, by their number. Nodes do not keep them alive.
_KEY = "batchnorm.memory"
_LEAST = 3 * 2**17  # bytes: below, what Python does for it takes longer than the pass over the values
_MOST_MOVED = 6  # bytes read and written for each byte that is saved; a normalisation with a residual moves 3
# Values one after the other that may have to be computed for one that is asked for. They live until their own readers
# have them: with four, four of five outputs in a chain of residuals are computed again, and at most four are there
# at a time before their turn.
_DEEPEST = 4
_REMEMBERED = 32  # outputs; what they are computed from is saved anyway by the layers
IN_PLACE_CHANGE = "its output is changed in place afterwards"
UNKNOWN = "\0"  # the path of a layer that has nothing to know it by: no module has it
UNREAD = "nobody saves its output"


@dataclass
class Note:
    """What became of one layer's outputs.

    Attributes:
        saved, kept: bytes of those that are computed again, and of those that are kept.
        why: why they are kept.
    """

    saved: int = 0
    kept: int = 0
    why: list[str] = field(default_factory=list)


class Session:
    """The recorder of one forward pass, and the hooks that autograd calls in it.

    Args:
        label: from a layer's parameter to the layer's path; None where it is not known.

    Attributes:
        notes: by layer; `UNKNOWN` has outputs of layers that are not known by a parameter.
        between: bytes of results of other operations that are computed again.
        copied: bytes that are kept for this alone.
    """

    def __init__(self, label: Callable[[Tensor], str | None]) -> None:
        self._label = label
        self.notes: dict[str, Note] = {}
        self.between = self.copied = 0
        self._kept: dict[int, int] = {}  # bytes of storages, by where they are
        # Outputs that are alive, by identity: a value lives as long as somebody may save it,
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        # and the last ones longer: a concatenation of outputs is saved when they are gone.
        self._last: deque[Value] = deque(maxlen=_REMEMBERED)
        self._asked = False
        self._places: dict[int, weakref.ref[Saved]] = {}  # integers that are saved, by where they are

    @property
    def kept(self) -> int:
        """Bytes of all tensors that are kept and no parameters; a storage counts once."""
        return sum(self._kept.values()) + self.copied

    # --- what our layers tell ---

    def record(
        self,
        output: Tensor,
        inputs: tuple[Tensor, ...],
        make: Callable[[], Callable[..., Tensor]],
        owner: Tensor | None,
    ) -> None:
        """Take note of an output of one of our layers: `recording.Recorder`."""
        if not self._asked:  # what the layer saved went to hooks of others, as in activation checkpointing
            return
        self._asked = False
        small = output.untyped_storage().nbytes() < _LEAST
        if small:
            value = Value(output)
            value.decided = False  # whether somebody saves it, so that it is counted
        else:
            value = Value(output, make(), tuple([self._value_of(t) for t in inputs]))
        path = None if owner is None else self._label(owner)
        value.label = UNKNOWN if path is None else path
        if value.label not in self.notes:
            self.notes[value.label] = Note()
        _register(output, value)
        key, outputs = id(output), self._outputs

        def forget(_: object) -> None:
            outputs.pop(key, None)

        self._outputs[key] = weakref.ref(output, forget), value
        if not small:
            self._last.append(value)

    def finish(self) -> None:
        """Let go of everything but the counts."""
        self._outputs.clear()
        self._last.clear()
        self._places.clear()

    # --- what autograd asks ---

    def pack(self, tensor: Tensor) -> Saved | tuple[Tensor, int]:
        """What is kept instead of a tensor that is saved. Of one without a history, itself and its version: quick."""
        self._asked = True
        if tensor.grad_fn is None:
            if tensor.requires_grad or tensor.layout != torch.strided:  # a parameter
                return tensor, version(tensor)
            self._count(tensor)
            if tensor.dtype != torch.int64 or tensor.dim() < 3:
                return tensor, version(tensor)
            saved = Saved(tensor)
            self._places[tensor.data_ptr()] = weakref.ref(saved)
            return saved
        recorded = self._outputs.get(id(tensor))
        if recorded is not None and recorded[1].version == version(tensor):
            value = recorded[1]
        elif type(tensor) is not Tensor or tensor.layout != torch.strided:
            return Saved(tensor.detach())
        else:
            value = self._value_of(tensor)
        if not value.decided:
            self._decide(value, tensor, 0)
        return Saved(value=value)

    @staticmethod
    def unpack(saved: Saved | tuple[Tensor, int]) -> Tensor:
        """What autograd gets.

        Raises:
            OrderError: it was changed in place since.
        """
        if isinstance(saved, Saved):
            return saved.get()
        tensor, before = saved
        if version(tensor) != before:
            raise changed(tensor, before)
        return tensor

    def _value_of(self, tensor: Tensor) -> Value:
        """The value that a tensor has now."""
        if tensor.grad_fn is None:
            return Value(tensor)
        now = version(tensor)
        value = _registered(tensor.grad_fn, tensor.output_nr)
        if value is not None and value.version == now:
            return value
        recorded = self._outputs.get(id(tensor))
        if recorded is not None:
            self._note(recorded[1], IN_PLACE_CHANGE)
        recipe = self._view(tensor) or self._recipe(tensor, now)
        if recipe is None:
            value = Value(tensor)
            self._count(tensor)
            if (dimensions := MAX_POOLS.get(_name(tensor))) is not None:
                self._shorten_places(tensor.grad_fn, dimensions)
        else:
            value = Value(tensor, recipe.again, recipe.inputs)
            if _name(tensor) in ACTIVATIONS:  # the layer's output to whoever looks at the report
                value.label = value.inputs[0].label
            for source in value.inputs:  # small ones are kept, from now on for this
                if not source.decided and source.kept is not None:
                    self._decide(source, source.kept, 0)
            self._decide(value, tensor, recipe.copied)
        _register(tensor, value)
        return value

    def _view(self, tensor: Tensor) -> Recipe | None:
        """A view of something that is computed again is a view of that."""
        base = _torch.base(tensor)
        if base is None or base.grad_fn is None or base.dtype != tensor.dtype or type(base) is not Tensor:
            return None
        value = self._value_of(base)
        if not value.decided:
            self._decide(value, base, 0)
        if value.kept is not None:
            return None
        size, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset()
        return Recipe(lambda whole: whole.as_strided(size, stride, whole.storage_offset() + offset), (value,))

    def _recipe(self, tensor: Tensor, now: int) -> Recipe | None:
        """How to compute the result of an operation between the layers."""
        node: Any = tensor.grad_fn
        rule = RULES.get(node.name())
        if rule is None or tensor.untyped_storage().nbytes() < _LEAST:
            return None

        def find(number: int) -> Value | None:
            """An input's value, if it is sure that the operation has seen it."""
            source, output = node.next_functions[number]
            value = None if source is None else _registered(source, output)
            if value is None:
                return None
            if now == 0:  # a result that nobody has changed, of an input that nobody has changed
                return value if value.version == 0 and value.unchanged else None
            recorded = self._outputs.get(id(tensor))
            in_place = recorded is not None and recorded[1] is value and node.name() in ACTIVATIONS
            return value if in_place and value.changed_once and now == value.version + 1 else None

        return rule(node, tensor, find)

    def _shorten_places(self, node: Any, dimensions: int) -> None:  # noqa: ANN401 - torch's nodes have no type
        """The places that a max pooling has saved are kept in fewer bytes."""
        source = _registered(*node.next_functions[0]) if node.next_functions[0][0] is not None else None
        saved_places: Tensor = _torch.saved_by(node, "result1")
        ref = self._places.pop(saved_places.data_ptr(), None)
        saved = None if ref is None else ref()
        if source is None or saved is None or saved.kept is None or saved_places.nbytes < _LEAST:
            return
        if saved.kept.data_ptr() != saved_places.data_ptr():
            return
        recipe = places(saved_places, source.shape, dimensions)
        value = Value(saved_places, recipe.again, recipe.inputs)
        value.decided = True
        self._kept.pop(saved_places.untyped_storage().data_ptr(), None)
        self.between += value.bytes
        self.copied += recipe.copied
        saved.become(value)

    def _decide(self, value: Value, tensor: Tensor, copied: int) -> None:
        """Settle whether a value is kept, and count it."""
        saved = value.bytes - copied
        moved = value.bytes + copied + sum(source.bytes for source in value.inputs)
        why = None
        if value.bytes < _LEAST:
            why = f"its output has {value.bytes} bytes, too few"
        elif value.depth > _DEEPEST:
            why = f"it ends a chain of {_DEEPEST} that are computed again one from the other"
        elif moved > _MOST_MOVED * saved:
            why = f"{moved} bytes would be moved to save {saved}"
        if why is None:
            value.decided = True
            if value.label is None:
                self.between += 0 if _torch.base(tensor) is not None else value.bytes
                self.copied += copied
            else:
                self.notes[value.label].saved += value.bytes
            return
        value.keep(tensor)
        self._count(tensor)
        self._note(value, why)

    def _note(self, value: Value, why: str) -> None:
        if value.label is not None:
            note = self.notes[value.label]
            note.kept += value.bytes
            if why not in note.why:
                note.why.append(why)

    def _count(self, tensor: Tensor) -> None:
        base = _torch.base(tensor)
        if base is not None and base.is_leaf and base.requires_grad:  # a parameter's, such as a transposed weight
            return
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()


def _name(tensor: Tensor) -> str:
    """The operation that a tensor is the result of."""
    node = tensor.grad_fn
    return "" if node is None else node.name()


def _registered(node: Any, output: int) -> Value | None:  # noqa: ANN401 - torch's nodes have no type
    """The value of one result of a node."""
    values = node.metadata.get(_KEY)
    ref = None if values is None else values.get(output)
    return None if ref is None else ref()


def _register(tensor: Tensor, value: Value) -> None:
    """From now on this is what the tensor's history says that it is."""
    node: Any = tensor.grad_fn
    node.metadata.setdefault(_KEY, {})[tensor.output_nr] = weakref.ref(value)
