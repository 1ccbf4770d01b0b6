"""The digits, and the user's own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.errors import UsageError
from batchnorm.study import noise
from batchnorm.study.dataset import FEWEST, Data, cut, digits, load
from batchnorm.study.experiment import Setting
from batchnorm.study.networks import OURS
from study.plans import TINY, carried_out


def test_every_image_is_in_exactly_one_part() -> None:
    data = digits()
    indices = torch.cat([data.train.indices, data.test.indices])
    assert indices.sort().values.tolist() == list(range(1797))
    assert len(data.test.labels) == 360


def test_both_parts_hold_the_digits_in_equal_shares() -> None:
    data = digits()
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    expected = (train + test) * len(data.test.labels) / 1797
    assert (test - expected).abs().max() < 1, "rounding to whole images is all that may differ"


def test_images_are_pixels_in_the_unit_interval() -> None:
    data = digits()
    assert (data.shape, data.classes, data.features) == ((1, 8, 8), 10, 64)
    for part in (data.train, data.test):
        assert part.inputs.shape == (len(part.labels), 1, 8, 8)
        assert part.inputs.dtype == torch.float32
        assert part.inputs.min() == 0
        assert part.inputs.max() == 1


def test_images_and_labels_belong_together() -> None:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    part = digits().test
    expected = torch.from_numpy(pixels)[part.indices]
    torch.testing.assert_close(part.inputs.flatten(1).double() * 16, expected, rtol=0, atol=0)
    assert part.labels.tolist() == targets[part.indices.numpy()].tolist()


def test_the_cut_is_always_the_same() -> None:
    def order(data: Data) -> list[int]:
        return data.train.indices.tolist() + data.test.indices.tolist()

    torch.manual_seed(1)
    np.random.seed(1)
    first = digits()
    torch.manual_seed(2)
    np.random.seed(2)
    assert order(digits()) == order(first)
    assert digits().digest == first.digest


def test_chance_is_the_commonest_class() -> None:
    y = np.repeat([3, 7], [100, 300])
    data = cut(np.random.default_rng(0).normal(size=(400, 5)), y, "made")
    assert data.chance == 0.75
    assert data.classes == 2


def test_another_value_is_another_digest() -> None:
    x, y = np.ones((400, 2)), np.arange(400) % 2
    first = cut(x, y, "made").digest
    assert cut(x, y, "another name").digest == first
    changed = x.copy()
    changed[7, 1] = 0.5
    assert cut(changed, y, "made").digest != first
    assert cut(x, 1 - y, "made").digest != first


def test_everything_is_divided_by_one_number() -> None:
    """Features of different scales stay different; the test part has no say."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 3)) * np.array([1.0, 10.0, 100.0])
    data = cut(x, np.arange(400) % 2, "made")
    divisor = np.abs(x[data.train.indices.numpy()]).max()
    for part in (data.train, data.test):
        np.testing.assert_array_equal(part.inputs.numpy(), (x[part.indices.numpy()] / divisor).astype(np.float32))
    assert data.train.inputs.abs().max() == 1


def test_nothing_but_zeros_stays_so() -> None:
    data = cut(np.zeros((400, 3)), np.arange(400) % 2, "made")
    assert not data.train.inputs.any()


def test_of_many_samples_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.study.dataset.MOST", 500)
    y = np.repeat([0, 1], [200, 600])
    data = cut(np.arange(800.0)[:, None], y, "made")
    assert (len(data.train.labels), len(data.test.labels)) == (400, 100)
    assert data.test.labels.sum() == 75, "classes keep their shares"
    assert len(set(data.train.indices.tolist()) | set(data.test.indices.tolist())) == 500
    assert data.name == "made, 500 of 800 samples"


def samples(n: int = FEWEST, shape: tuple[int, ...] = (3,)) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.random.default_rng(0).normal(size=(n, *shape)), np.arange(n) % 4


@pytest.mark.parametrize(
    ("given", "shape"), [((3,), (3,)), ((6, 5), (1, 6, 5)), ((2, 6, 5), (2, 6, 5))], ids=["vectors", "grey", "colour"]
)
def test_a_file_of_arrays(given: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    x, y = samples(shape=given)
    np.savez(tmp_path / "mine.npz", x=x, y=y + 10)
    data = load(str(tmp_path / "mine.npz"))
    assert (data.shape, data.classes, data.name) == (shape, 4, "mine.npz")
    assert data.train.inputs.shape[1:] == shape
    for part in (data.train, data.test):
        assert part.labels.tolist() == y[part.indices.numpy()].tolist(), "classes from 0 on, in order"


CALLABLE = """
# mine.py
import numpy as np, torch
x = np.arange({n} * 3.0).reshape({n}, 3)
y = np.arange({n}) % 2
def arrays(): return x, y
def tensors(): return torch.tensor(x), torch.tensor(y)
def lists(): return [x.tolist(), y.tolist()]
def one(): return x
def three(): return x, y, y
def broken(): raise OSError("no such disk")
def ragged(): return [[1], [2, 3]] * 200, y
"""


@pytest.mark.parametrize("name", ["arrays", "tensors", "lists"])
def test_a_callable(name: str, project: Path) -> None:
    (project / "mine.py").write_text(CALLABLE.format(n=FEWEST))
    data = load(f"mine.py:{name}")
    assert (data.shape, data.classes, data.name) == ((3,), 2, f"mine.py:{name}")
    assert data.train.inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", r"^mine\.py:one returned ndarray; it must be a pair \(x, y\)$"),
        ("three", r"^mine\.py:three returned tuple; it must be a pair"),
        ("broken", r"^mine\.py:broken raised OSError: no such disk \(.*mine\.py, line 11\)$"),
        ("ragged", r"^reading what mine\.py:ragged returned raised ValueError: "),
        ("absent", r"has no absent"),
    ],
)
def test_a_callable_that_returns_something_else(name: str, message: str, project: Path) -> None:
    (project / "mine.py").write_text(CALLABLE.format(n=FEWEST))
    with pytest.raises(UsageError, match=message):
        load(f"mine.py:{name}")


X, Y = samples()
INFINITE = X.copy()
INFINITE[3, 1] = np.inf


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:399], Y[:399], r"x float64 of shape \(399, 3\).*400 numeric samples at least"),
        (X[:, 0], Y, r"of shape \(400,\) and y"),
        (X.reshape(400, 3, 1, 1, 1), Y, "numeric samples at least, of shape"),
        (X[:, :0], Y, r"of shape \(400, 0\)"),
        (X.astype(str), Y, "x <U"),
        (X + 1j, Y, "x complex128"),
        (X, Y[:399], r"y int64 of shape \(399,\).*a whole number for each"),
        (X, Y[:, None], r"y int64 of shape \(400, 1\)"),
        (X, Y + 0.5, "y float64.*a whole number for each"),
        (X, Y + np.inf, "y float64.*a whole number for each"),
        (X, Y * np.nan, "y float64.*a whole number for each"),
        (X, Y.astype(str), "y <U"),
        (INFINITE, Y, "1 values of x are not finite. Replace or drop them"),
        (X, np.zeros(400), "its rarest class has 400 samples. There must be two classes at least"),
        (X, np.minimum(np.arange(400), 1), "its rarest class has 1 samples.*five samples of each"),
        (X, np.arange(400), "its rarest class has 1 samples"),
    ],
)
def test_arrays_that_cannot_be_learnt_from(x: object, y: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    np.savez(file, x=x, y=y)
    with pytest.raises(UsageError, match=f"^got {file} with .*{message}"):
        load(str(file))


CONSTANT, HUGE = np.ones((400, 3)), np.concatenate([X, np.full((400, 1), 1e9)], axis=1)


@pytest.mark.parametrize("x", [CONSTANT, CONSTANT * 0, CONSTANT[:, :1], HUGE], ids=str)
def test_samples_that_float32_cannot_tell_apart(x: np.ndarray[Any, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=x, y=Y)
    with pytest.raises(
        UsageError, match=r"mine\.npz whose columns have .* Drop constant columns, and subtract the means"
    ):
        load(str(tmp_path / "mine.npz"))


def test_a_constant_column_beside_others_is_fine(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.concatenate([X, CONSTANT], axis=1), y=Y)
    data = load(str(tmp_path / "mine.npz"))
    assert data.shape == (6,)
    carried_out(noise.EXPERIMENT, Setting(data, OURS), TINY["noise"])


def test_more_classes_than_can_be_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.random.default_rng(0).normal(size=(10_000, 2)), y=np.arange(10_000) // 5)
    with pytest.raises(UsageError, match=r"mine\.npz, which cannot be cut into a training and a test part"):
        load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("position", [30, 200, 700])
def test_a_damaged_file(position: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    np.savez_compressed(file, x=X, y=Y)
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.npz"):
        load(str(file))


def test_whole_numbers_may_be_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=X, y=Y.astype(float))
    assert load(str(tmp_path / "mine.npz")).classes == 4


def test_files_that_are_no_such_archive(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    with pytest.raises(UsageError, match=r"^cannot read .*mine\.npz: .*No such file"):
        load(str(file))
    file.write_bytes(b"PK something else")
    with pytest.raises(UsageError, match=r"^cannot read "):
        load(str(file))
    np.savez(file, x=X, labels=Y)
    with pytest.raises(UsageError, match=r"with the arrays x, labels; it must have x and y$"):
        load(str(file))
    with file.open("wb") as plain:
        np.save(plain, X)
    with pytest.raises(UsageError, match=r"with the arrays \(none\); it must have x and y$"):
        load(str(file))
