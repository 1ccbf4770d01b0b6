"""What a user installs: one wheel for every Python, and a pure one where nothing can be compiled."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long

USE = """
import torch, batchnorm as bn
x = torch.randn(8, 3, 5)
torch.testing.assert_close(bn.BatchNorm1d(3)(x), torch.nn.BatchNorm1d(3)(x))
print(bn.__file__)
print(bn.kernels())
"""


def install(tmp_path: Path, *options: str) -> tuple[Path, Path]:
    """A wheel built from the sources, and a folder that it is installed in."""
    # The sources are copied by the build itself; its working folder is its own, not the developers'.
    build = ["--config-settings=build-dir=" + str(tmp_path / "build"), *options]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", *build, "-w", str(tmp_path), str(ROOT)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300
    )
    return wheel, site


def use(site: Path) -> str:
    """What the installed package prints; -S keeps the developers' own installation, a path hook, from being found."""
    paths = [str(site), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path[:0] = {paths!r}\n" + USE
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(site))
    return run.stdout


def test_a_wheel_brings_the_native_kernels(tmp_path: Path) -> None:
    wheel, site = install(tmp_path)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert {"batchnorm/_native.so", "batchnorm/py.typed", "batchnorm/report/templates/page.html.j2"} <= names
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]
    assert "float32    native (" in use(site)


def test_without_a_compiler_it_is_plain_python(tmp_path: Path) -> None:
    wheel, site = install(tmp_path, "--config-settings=wheel.cmake=false")
    assert wheel.name.endswith("-py3-none-any.whl")
    printed = use(site)
    assert "float32    reference" in printed
    assert "No native kernels: this installation has no native extension" in printed
