"""Batches: what they hold, how they are cut, moved and given to a model, and the reading of an iterable of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import CountError, OptionError
from batchnorm.models.devices import device
from batchnorm.models.nested import map_tensors, tensors
from batchnorm.population.interrupts import caller

Forward = Callable[[nn.Module, Any], object]


def samples(batch: object) -> int | None:
    """The size of the first dimension of a batch's first tensor that has one; None where there is no such tensor."""
    return next((t.shape[0] for t in tensors(batch) if t.dim()), None)


def cut(batch: Any, n: int) -> Any:  # noqa: ANN401 - as `map_tensors`
    """A batch's first n samples: every tensor that has as many rows as the batch has samples loses the others."""
    size = samples(batch)
    return map_tensors(batch, lambda t: t[:n] if t.dim() and t.shape[0] == size else t)


def of_samples(batch: Any, numbers: list[int]) -> Any:  # noqa: ANN401 - as `map_tensors`
    """Some of a batch's samples: of every tensor that has as many rows as the batch has samples these rows."""
    size = samples(batch)
    return map_tensors(batch, lambda t: t[numbers] if t.dim() and t.shape[0] == size else t)


def default_forward(model: nn.Module, batch: object) -> object:
    """A tensor, the first item of a tuple or list, or a dict as keywords, on the model's device.

    Raises:
        OptionError: the batch is none of these.
    """
    home = device(model)
    there: Callable[[Tensor], Tensor] = lambda t: t.to(home)  # noqa: E731 - one expression
    if isinstance(batch, Mapping):
        return model(**{key: map_tensors(value, there) for key, value in batch.items()})
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise OptionError(
            f"got a batch of type {type(batch).__name__}; the model is called with a tensor, the first item of a tuple "
            f"or list if that is a tensor, or a dict as keywords. Pass forward=lambda model, batch: ... for others"
        )
    return model(there(first))


@dataclass(frozen=True, eq=False)
class Batch:
    """One item of the iterable.

    Attributes:
        index: its position in the iterable, from 0.
        content: what the iterable gave, cut where only a part of it is wanted.
        domain: of its samples, by name or number; None where none was asked for.
    """

    index: int
    content: Any
    domain: str | int | None = None


_EXHAUSTED = object()


class Batches:
    """An iterable of batches, read once, one at a time; empty ones are left out.

    Args:
        iterable: the batches.
        max_samples: how many samples to use at most; None for all.
        domain_of: the domain of a batch, or one for each of its samples, which then makes a batch for each domain.

    Attributes:
        expected: how many the iterable says there are, or None.
        read: how many items were read.
        used: how many of them held samples.
        samples: how many samples these held; None where a batch has no tensor to count by.
    """

    def __init__(
        self, iterable: Iterable[Any], max_samples: int | None, domain_of: Callable[[Any], Any] | None = None
    ) -> None:
        if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
            raise OptionError(f"got max_samples={max_samples}; it must be a positive number of samples, or None")
        self._iterable = iterable
        self._items: Iterator[Any] | None = None
        self._limit = max_samples
        self._domain_of = domain_of
        # Not len(): that of a DataLoader over an iterable data set raises.
        length = operator.length_hint(iterable, -1)
        # With a limit, how many batches there will be depends on their sizes.
        self.expected = length if max_samples is None and length >= 0 and domain_of is None else None
        self.read = 0
        self.used = 0
        self.samples: int | None = 0

    def skip(self, read: int, used: int, samples: int | None) -> bool:
        """Pass over what was read before, and count it as it was counted then; False where there are not so many."""
        for _ in range(read):
            if self._next() is _EXHAUSTED:
                return False
        self.read, self.used, self.samples = read, used, samples
        return True

    def __iter__(self) -> Iterator[Batch]:
        while self._limit is None or self.samples != self._limit:
            content = self._next()
            if content is _EXHAUSTED:
                return
            index, n = self.read, samples(content)
            if self._limit is not None:
                content, n = self._within_limit(content, n)
            self.read += 1
            if n != 0:
                self.used += 1
                self.samples = None if n is None or self.samples is None else self.samples + n
                for domain, part in self._parts(content):
                    yield Batch(index, part, domain)

    def _next(self) -> Any:  # noqa: ANN401 - as `map_tensors`
        """The next item, or _EXHAUSTED. The first one may draw random numbers, to shuffle."""
        with caller():
            if self._items is None:
                self._items = iter(self._iterable)
            return next(self._items, _EXHAUSTED)

    def _parts(self, content: Any) -> Iterator[tuple[str | int | None, Any]]:  # noqa: ANN401 - as `map_tensors`
        """The samples of each domain with its name or number; all of them where nobody asks for domains."""
        if self._domain_of is None:
            yield None, content
            return
        with caller():
            domain = self._domain_of(content)
        if hasattr(domain, "tolist"):  # tensors and arrays
            domain = domain.tolist()
        if isinstance(domain, (str, int)):
            yield domain, content
            return
        if not isinstance(domain, Sequence) or len(domain) != samples(content):
            raise OptionError(
                f"got {domain!r} from domain_of for a batch of {samples(content)} samples; it must return a domain, or "
                f"one for each sample"
            )
        for one in dict.fromkeys(domain):
            yield one, of_samples(content, [number for number, of_it in enumerate(domain) if of_it == one])

    def _within_limit(self, content: Any, n: int | None) -> tuple[Any, int]:  # noqa: ANN401 - as `map_tensors`
        assert self._limit is not None
        assert self.samples is not None
        if n is None:
            raise OptionError(
                f"got max_samples={self._limit} and a batch of type {type(content).__name__} without a tensor to count "
                f"its samples by. Leave max_samples out, and give fewer batches"
            )
        wanted = self._limit - self.samples
        return (content, n) if n <= wanted else (cut(content, wanted), wanted)


def nothing_to_learn_from(read: int) -> CountError:
    """The error for data without samples."""
    return CountError(
        f"got {read} batches without a sample; population statistics need data. Check the data, and that an iterator "
        f"was not used up before"
    )
