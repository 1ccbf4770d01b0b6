"""What the scripts say where a library is missing."""

from __future__ import annotations

import pytest

from libraries import library


@pytest.mark.parametrize("name", ["torchvision", "transformers"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(SystemExit, match=f"pip install .*{name}$"):
        library({"torchvision": "torchvision.models"}.get(name, name))
