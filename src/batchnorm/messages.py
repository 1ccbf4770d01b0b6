"""Text of others in our messages: names and errors, made fit for one line of a terminal."""

from __future__ import annotations

import re
import unicodedata

# Control, formatting (those that turn the direction of text among them), lone surrogates, and separators of lines.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_KEPT = frozenset("\n\t")
# Where in torch's C++ an error comes from; the line before says what it is.
_TRACE = re.compile(
    r"\s*(Exception raised from |frame #\d|C\+\+ CapturedTraceback|\(most recent call first\)|Device-side assertion|"
    r"Compile with `?TORCH_USE_CUDA_DSA)"
)
_NATIVE_FILE = r"[^\s\[\]():,]*\.(?:cpp|hpp|cuh|cu|cc)"
_NATIVE_PLACES = (
    re.compile(rf"\[enforce fail at {_NATIVE_FILE}:\d+\]\s*(?:[^.]*\.\s+)?"),
    re.compile(rf"\s*\(?\b(?:at|in|from) \"?{_NATIVE_FILE}\"?(?:(?::|, line |\()\d+\)?)*\)?"),
    re.compile(rf"\"?{_NATIVE_FILE}\"?:\d+,?\s*"),
)
_LONGEST = 2000  # characters of a message
_LONGEST_WORD = 300  # so that a name of thousands of characters does not hide what is said about it


def printable(text: str) -> str:
    r"""Text with what a terminal or a browser would obey instead of show written as \x1b, \u202e and so on.

    Lines and tabs stay.
    """
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _UNPRINTABLE else _escaped(ord(c)) for c in text)


def one_line(text: str) -> str:
    """`printable` text in one line, of bounded length."""
    line = " ".join(_shortened(word) for word in printable(text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def described(error: BaseException) -> str:
    """What an error says, without traces of native code: they name files of the machine that it was built on.

    Also of errors that cannot be printed, or have nothing to say.
    """
    if isinstance(error, MemoryError) and not error.args:
        return "not enough memory"
    try:
        text = str(error)
    except BaseException as unprintable:  # whatever an error of somebody else's does
        if isinstance(unprintable, KeyboardInterrupt):
            raise
        return f"its message cannot be printed, that raises {type(unprintable).__name__}"
    lines = []
    for line in text.splitlines():
        if _TRACE.match(line):
            break
        lines.append(line)
    message = "\n".join(lines)
    for place in _NATIVE_PLACES:
        message = place.sub("", message)
    return one_line(message) or "without a message"


def _shortened(word: str) -> str:
    return word if len(word) <= _LONGEST_WORD else f"{word[:100]}...{word[-100:]}"


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
