"""Text of others in messages."""

from __future__ import annotations

import pytest
import torch

from batchnorm.messages import described, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer.0 é 漢 \N{MINUS SIGN}1", "layer.0 é 漢 \N{MINUS SIGN}1"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\u202egpj.b", r"a\u202egpj.b"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("\x9b2J", r"\x9b2J"),
        ("\udcff", r"\udcff"),
        ("\r\x07\x08\x00", r"\x0d\x07\x08\x00"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\U000e0001", r"\U000e0001"),
        ("two\n\tlines", "two\n\tlines"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_one_line_is_bounded() -> None:
    assert one_line("a\n  b\tc\x1b") == r"a b c\x1b"
    assert len(one_line("x " * 10**6)) < 3000
    assert one_line(f"cannot write to {'n' * 5000}: File name too long").endswith("nnn: File name too long")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class NoTextError(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\nb"), "a b"),
        (ValueError(), "without a message"),
        (MemoryError(), "not enough memory"),
        (UnprintableError(), "its message cannot be printed, that raises SystemExit"),
        (NoTextError(), "its message cannot be printed, that raises TypeError"),
        (
            RuntimeError("batchnorm::forward API call failed at /build/host/tensors.hpp, line 88"),
            "batchnorm::forward API call failed",
        ),
        (RuntimeError("API call failed at tensors.hpp:88"), "API call failed"),
        (
            RuntimeError(
                "no zip\nException raised from read at /pytorch/a.cc:1 (most recent call first):\nframe #0: f"
            ),
            "no zip",
        ),
        (
            RuntimeError('INTERNAL ASSERT FAILED at "/pytorch/c10/x.cpp":83, please report. Wrong'),
            "INTERNAL ASSERT FAILED, please report. Wrong",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_error_says(error: BaseException, text: str) -> None:
    assert described(error) == text


def test_torchs_own_error_names_no_file_of_its_build() -> None:
    with pytest.raises(RuntimeError, match="cpp") as caught:
        torch.zeros(10**16)
    assert ".cpp" not in described(caught.value)
    assert "allocate memory" in described(caught.value)
