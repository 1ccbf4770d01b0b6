"""Every error that this package raises on purpose.

::

    BatchNormError                     catch this one to catch them all
    ├── ShapeError    (ValueError, RuntimeError)  a tensor's rank, channels or shape do not fit
    ├── DTypeError    (TypeError, RuntimeError)   a dtype cannot be normalised, or two do not go together
    ├── CountError    (ValueError)                too few values for the statistic that was asked for
    ├── OptionError   (ValueError, RuntimeError)  an argument is outside what it may be
    ├── TransformError (RuntimeError)             a transform of torch.func cannot do what was asked
    ├── OrderError    (RuntimeError)              layers are called in an order that the method cannot work with
    ├── NonFiniteError (ArithmeticError)          activations, or statistics, are inf or NaN
    ├── ProcessError  (RuntimeError)              another process of the group failed, or does something else
    └── UsageError                                the command line was used wrongly

The built-in types beside each are those that torch raises for the same mistake, so that code written for
`torch.nn` catches ours too. A message says what came, what the rule is, and what to do.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Base of all errors of this package."""

    def within(self, where: str) -> BatchNormError:
        """The same error with the place where it happened put before its message."""
        return type(self)(f"{where}: {self}")


class ShapeError(BatchNormError, ValueError, RuntimeError):
    """A tensor's rank, number of channels or shape does not fit."""


class DTypeError(BatchNormError, TypeError, RuntimeError):
    """A tensor's dtype cannot be normalised, or two dtypes do not go together."""


class CountError(BatchNormError, ValueError):
    """Too few values for the statistic that was asked for."""


class OptionError(BatchNormError, ValueError, RuntimeError):
    """An argument is outside the values that it may take."""


class TransformError(BatchNormError, RuntimeError):
    """A transform of `torch.func` cannot do what was asked of it."""


class OrderError(BatchNormError, RuntimeError):
    """Layers are called in an order, or so often, that the method cannot work with."""


class NonFiniteError(BatchNormError, ArithmeticError):
    """Activations, or statistics in the dtype that they are kept in, are not finite."""


class ProcessError(BatchNormError, RuntimeError):
    """Another process of the group failed, is gone, or does something else than this one."""


class UsageError(BatchNormError):
    """The command line was used wrongly; the message is one line."""
