"""Weights in files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchnorm.errors import UsageError
from batchnorm.files import check_writable
from batchnorm.loading import state_dict
from batchnorm.loading.state_dict import (
    Weights,
    check_state_dict,
    check_state_dict_path,
    load_state_dict,
    read_state_dict,
    save_state_dict,
)


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last.weight = self.first.weight
        self.norm.running_mean.normal_()


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    path, model, other = tmp_path / name, Tied(0), Tied(1)
    check_state_dict_path(path)
    save_state_dict(model, path)
    assert os.listdir(tmp_path) == [name]
    load_state_dict(other, path)
    assert state(other) == state(model)
    assert other.last.weight is other.first.weight


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    save_state_dict(Tied(0), tmp_path / "w.pt")
    read = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {name: tensor.tolist() for name, tensor in read.items()} == state(Tied(0))


def test_any_other_suffix_is_read_as_torchs(tmp_path: Path) -> None:
    torch.save(Tied(0).state_dict(), tmp_path / "w.bin")
    other = Tied(1)
    load_state_dict(other, tmp_path / "w.bin")
    assert state(other) == state(Tied(0))


def written(path: Path, content: dict[str, Tensor]) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_of_another_model(name: str, tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / name
    written(path, {"weight": torch.zeros(2, 2), "scale": torch.zeros(2)})
    with pytest.raises(UsageError) as caught:
        load_state_dict(model, path)
    assert str(caught.value).startswith(f"{path} does not fit the model: it lacks bias; the model has no scale. ")
    written(path, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    with pytest.raises(UsageError, match="size mismatch for weight"):
        load_state_dict(model, path)


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "w.pt")
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(UsageError, match=r"lacks 0\.weight, .*, 2\.weight and 3 more; the model has no state_dict\. "):
        load_state_dict(model, tmp_path / "w.pt")


class Trap:
    """Code that a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    with (tmp_path / "w.pt").open("wb") as file:
        torch.save({"weight": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(UsageError, match=r"^cannot load \S*w\.pt: it holds other things than tensors"):
        load_state_dict(nn.Linear(1, 1), tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"{ no weights }", pickle.dumps([1, 2])])
def test_files_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"^cannot load \S*{name}: "):
        load_state_dict(nn.Linear(1, 1), tmp_path / name)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="it holds an object of type Tensor; it must be a state_dict"):
        load_state_dict(nn.Linear(1, 1), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot read .*{name}: No such file"):
        load_state_dict(nn.Linear(1, 1), tmp_path / name)


def test_paths_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end with \.safetensors, \.pt, \.pth"):
        check_state_dict_path(tmp_path / "w.onnx")
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "no" / "w.pt", tmp_path / "folder.pt"):
        for check in (check_state_dict_path, check_writable):
            with pytest.raises(UsageError, match="cannot write to"):
                check(path)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(model: nn.Module, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    (tmp_path / "w.pt").write_bytes(b"old")
    monkeypatch.setitem(state_dict._FORMATS, ".pt", state_dict._FORMATS[".pt"]._replace(save=half))
    with pytest.raises(UsageError if isinstance(error, OSError) else KeyboardInterrupt):
        save_state_dict(nn.Linear(1, 1), tmp_path / "w.pt")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"w.pt": b"old"}


class Extra(nn.Linear):
    """Has more state than tensors."""

    def get_extra_state(self) -> object:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None:
        pass


def with_buffer(value: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("b", value)
    return model


UNFIT = {
    "extra": (lambda: Extra(2, 2), "_extra_state, an object of type dict"),
    "complex": (lambda: with_buffer(torch.zeros(2, dtype=torch.complex64)), "b, a tensor of torch.complex64"),
    "sparse": (
        lambda: with_buffer(torch.eye(2).to_sparse()),
        "b, a tensor of torch.float32 and layout torch.sparse_coo",
    ),
    "meta": (lambda: with_buffer(torch.zeros(2, device="meta")), 'b, on the device "meta"'),
    "quantized": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)),
        "b, a tensor of torch.qint8",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings("ignore")
def test_what_safetensors_cannot_hold(name: str, tmp_path: Path) -> None:
    make, part = UNFIT[name]
    for work in (check_state_dict, save_state_dict):
        with pytest.raises(UsageError) as caught:
            work(make(), tmp_path / "w.safetensors")
        assert part in str(caught.value)
        assert str(caught.value).endswith("Give a name that ends with .pt")
    assert os.listdir(tmp_path) == []
    if name != "meta":
        save_state_dict(make(), tmp_path / "w.pt")
        assert os.listdir(tmp_path) == ["w.pt"]


class Refusing(nn.Linear):
    """Gives no state."""

    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise SystemExit(0)


def test_a_model_that_gives_no_state(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^the model's state_dict raised SystemExit: 0 \("):
        save_state_dict(Refusing(1, 1), tmp_path / "w.pt")


def test_a_disk_without_room_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UsageError, match=r"it will have 4,000,000 bytes, and 100 are free there\. Make room"):
        check_state_dict(with_buffer(torch.zeros(1_000_000 - 6)), tmp_path / "w.pt")


def test_flipped_bits_in_what_torch_wrote(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    model = nn.Linear(50, 50)
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    place = whole.index(model.weight.detach().numpy().tobytes())
    for offset in (0, 777, 9_999):
        content = bytearray(whole)
        content[place + offset] ^= 4
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"^cannot load \S*w\.pt: it is damaged: the checksum of its part"):
            load_state_dict(model, path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(Tied(0).state_dict(), tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    other = Tied(1)
    load_state_dict(other, tmp_path / "w.pt")
    assert state(other) == state(Tied(0))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    torch.save({3: torch.zeros(1), "weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"w\.pt"):
        load_state_dict(nn.Linear(1, 1), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_without_a_model(name: str, tmp_path: Path) -> None:
    content = {"a.running_mean": torch.arange(3.0), "a.num_batches_tracked": torch.tensor(7)}
    written(tmp_path / name, content)
    read = read_state_dict(tmp_path / name)
    assert read.keys() == content.keys()
    assert all(torch.equal(read[key], value) for key, value in content.items())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "words"), [("w.pt", "cannot load"), ("w.bin", "must end with"), ("x.pt", "cannot read")]
)
def test_weights_without_a_model_that_cannot_be_read(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"{ no weights }")
    with pytest.raises(UsageError, match=words):
        read_state_dict(tmp_path / name)


def test_a_state_dict_without_its_model(tmp_path: Path) -> None:
    weights = Tied(0).state_dict()
    for name in ("w.pt", "w.safetensors"):
        save_state_dict(Weights(weights), tmp_path / name)
        other = Tied(1)
        load_state_dict(other, tmp_path / name)
        assert state(other) == state(Tied(0))
