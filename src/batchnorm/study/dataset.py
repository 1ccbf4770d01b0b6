"""What the experiments learn from: scikit-learn's handwritten digits, or the user's own samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm import extras
from batchnorm.errors import UsageError
from batchnorm.files import reading
from batchnorm.loading.object_reference import blaming, resolve

if TYPE_CHECKING:
    import numpy as np

FEWEST = 400  # with a fifth to test, enough to draw mini-batches of 256 from
MOST = 5_000  # more would only take longer: the networks are small, and see a few thousand samples
LEAST = 1e-5  # of the largest magnitude: a hundred times the rounding of a float32
RULE = (
    f"it must be x, {FEWEST} numeric samples at least, of shape (N, features), (N, height, width) or "
    "(N, channels, height, width), and y, a whole number for each: the class"
)


@dataclass(frozen=True)
class Part:
    """Some of the samples.

    Attributes:
        indices: (N,) which they are in the whole data set.
        inputs: (N, *shape), float32, at most 1 in magnitude in the training part.
        labels: (N,) classes from 0 on, int64.
    """

    indices: Tensor
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set cut in two: each sample is in one part only, and both hold the classes in equal shares.

    Attributes:
        train: four fifths.
        test: the rest.
        shape: of one sample: (features,) or (channels, height, width).
        classes: how many.
        name: what a report calls it.
    """

    train: Part
    test: Part
    shape: tuple[int, ...]
    classes: int
    name: str

    @property
    def features(self) -> int:
        """Numbers in a sample."""
        return int(torch.Size(self.shape).numel())

    @property
    def chance(self) -> float:
        """The test accuracy of always saying the commonest class."""
        return int(torch.bincount(self.test.labels).max()) / len(self.test.labels)

    @property
    def digest(self) -> str:
        """Names the content: equal for equal samples, cut in the same way."""
        sha = hashlib.sha256(repr((self.shape, self.classes)).encode())
        for part in (self.train, self.test):
            for tensor in (part.indices, part.inputs, part.labels):
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 1x8x8 pixels in [0, 1], always cut the same way. No download."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return cut(pixels.reshape(-1, 1, 8, 8), labels, "scikit-learn's handwritten digits")


def load(reference: str) -> Data:
    """The user's own data.

    Args:
        reference: a `.npz` file with arrays `x` and `y`, or a callable that returns (x, y), as
            `package.module:callable` or `path/file.py:callable`.

    Raises:
        UsageError: there is no such thing, or it holds or returns something else.
    """
    import numpy as np

    if reference.endswith(".npz"):
        x, y = _archive(Path(reference))
    else:
        make = resolve(reference, "DATA")
        with blaming(reference):
            made = make()
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise UsageError(f"{reference} returned {type(made).__name__}; it must be a pair (x, y)")
        with blaming(f"reading what {reference} returned"):
            x, y = (np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part) for part in made)
    checked = _checked(x, y, reference)
    try:
        data = cut(*checked, Path(reference).name)
    except ValueError as error:  # of scikit-learn: with very many classes, some may be left without a sample
        raise UsageError(f"got {reference}, which cannot be cut into a training and a test part: {error}") from error
    spread = float(data.train.inputs.flatten(1).double().std(0).max())
    if spread < LEAST:
        raise UsageError(
            f"got {reference} whose columns have standard deviations of at most {spread:.1g} times the largest "
            f"magnitude of x; there must be one of {LEAST:g} at least, or float32 cannot tell the samples apart. Drop "
            f"constant columns, and subtract the means of the others"
        )
    return data


def cut(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], name: str) -> Data:
    """Cut samples into parts, at random but always alike, in equal shares of each class.

    All are divided by one number, the largest magnitude in the training part: what brings pixels to [0, 1]. How the
    features compare with each other stays as it was. Of more than `MOST` samples, so many are drawn.

    Args:
        x: (N, features) or (N, channels, height, width), finite.
        y: (N,) labels of any kind that can be sorted.
        name: what a report calls it.
    """
    import numpy as np
    from sklearn.model_selection import train_test_split

    used = min(len(x), MOST)
    test_size = math.ceil(used / 5)
    sizes = {"test_size": test_size, "train_size": used - test_size}
    indices = train_test_split(np.arange(len(x)), stratify=y, random_state=0, **sizes)
    classes, numbers = np.unique(y, return_inverse=True)
    largest = float(np.abs(x[indices[0]].astype(np.float64)).max()) or 1.0
    train, test = (
        Part(
            torch.from_numpy(i),
            torch.from_numpy((x[i].astype(np.float64) / largest).astype(np.float32)),
            torch.from_numpy(numbers[i].astype(np.int64)),
        )
        for i in indices
    )
    share = f", {used:,} of {len(x):,} samples" if used < len(x) else ""
    return Data(train, test, tuple(x.shape[1:]), len(classes), name + share)


def _archive(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    extras.require("study", "a .npz file", "numpy")
    import numpy as np

    with reading(path), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        # A file of one array alone is read as that array, which has no names.
        arrays = dict(loaded) if isinstance(loaded, Mapping) else {}
    if not {"x", "y"} <= set(arrays):
        raise UsageError(f"got {path} with the arrays {', '.join(arrays) or '(none)'}; it must have x and y")
    return arrays["x"], arrays["y"]


def _checked(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], source: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Samples and labels that can be learnt from; pictures without channels get one."""
    import numpy as np

    came = f"got {source} with x {x.dtype} of shape {x.shape} and y {y.dtype} of shape {y.shape}"
    if x.dtype.kind not in "fiub" or x.ndim not in (2, 3, 4) or len(x) < FEWEST or not x[0].size:
        raise UsageError(f"{came}; {RULE}")
    if y.shape != (len(x),) or y.dtype.kind not in "iubf" or not np.isfinite(y).all() or (y != np.round(y)).any():
        raise UsageError(f"{came}; {RULE}")
    if not np.isfinite(x).all():
        raise UsageError(f"{came}; {int((~np.isfinite(x)).sum()):,} values of x are not finite. Replace or drop them")
    rarest = np.unique(y, return_counts=True)[1].min()
    if rarest == len(y) or rarest < 5:
        raise UsageError(
            f"{came}; its rarest class has {rarest} samples. There must be two classes at least, and five samples of "
            "each, to have some in the test part"
        )
    return (x[:, None] if x.ndim == 3 else x), y
