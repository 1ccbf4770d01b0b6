"""What a forward pass kept for its backward pass, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One layer.

    Attributes:
        layer: its path in the model; "" is the model itself.
        saved: bytes of its outputs that are computed again.
        kept: bytes of its outputs that are kept, though somebody saves them.
        why: why they are kept, or why there is nothing to save; "" if all are computed again.
    """

    layer: str
    saved: int
    kept: int
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The last forward pass; iterates over the layers, in the model's order, and prints well.

    Attributes:
        entries: one for each batch-norm layer.
        kept: bytes of all tensors that are kept for the backward pass, parameters left out, a storage once.
        between: bytes of results of other operations, such as poolings, that are computed again.
        why: why nothing is done at all; "" where something is.
    """

    entries: tuple[Entry, ...]
    kept: int
    between: int
    why: str = ""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def saved(self) -> int:
        """Bytes that would be kept otherwise."""
        return self.between + sum(entry.saved for entry in self.entries)

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The layers with outputs that are computed again."""
        return tuple(entry.layer for entry in self.entries if entry.saved)

    @property
    def left(self) -> dict[str, str]:
        """The other layers, and why."""
        return {entry.layer: entry.why for entry in self.entries if not entry.saved}

    def __str__(self) -> str:
        if self.why:
            return self.why
        share = self.saved / max(self.saved + self.kept, 1)
        layers = f"{len(self.recomputed)} of {len(self)} layers recomputed"
        head = f"{layers}: {_mib(self.saved)} saved, {_mib(self.kept)} kept ({share:.0%} less)"
        width = max((len(entry.layer) for entry in self.entries), default=0)
        lines = [head]
        for entry in self.entries:
            done = f"{_mib(entry.saved)} saved" if entry.saved else ""
            left = f"left: {entry.why}" if entry.why else ""
            lines.append(f"{entry.layer:<{width}}  {'; '.join(filter(None, (done, left)))}")
        if self.between:
            lines.append(f"{'':<{width}}  {_mib(self.between)} saved between the layers")
        return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
