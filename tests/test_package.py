"""What a user installs: one wheel for every Python and torch, and a pure one where nothing can be compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = ROOT / "tests" / "support" / "installed.py"
ENVIRONMENT = Path(sys.prefix)
OLDEST = "2.10.0"
# All that torch 2.10.0 exports of its stable ABI:
# nm -D --defined-only libtorch_cpu.so | awk '{print $3}' | grep -E '^(aoti_)?torch_' | sort
SYMBOLS = ROOT / "tests" / "torch_2_10_symbols.txt"
SOURCES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def symbols(library: Path, *options: str) -> dict[str, str]:
    """Of a shared library, the names and kinds that `nm` tells, without versions."""
    lines = run("nm", "-D", *options, library).splitlines()
    return {name.partition("@")[0]: kind for *_, kind, name in map(str.split, lines)}


def of_torch(names: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in names.items() if re.match("(aoti_)?torch_", name)}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes; in the folder of the developers' own build, so that little is compiled again."""
    folder = tmp_path_factory.mktemp("wheel")
    # This environment is as it has to be, whatever its stamps say; and no words of a make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    stamp = f"--old-file={ENVIRONMENT / 'dev'}"
    run("make", stamp, "wheel", f"VENV={ENVIRONMENT}", f"DIST={folder}", cwd=ROOT, env=environment)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty one."""
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    return tmp_path / "environment" / "bin"


def use(python: Path, what: str, *options: str) -> str:
    """What the installed package says, where nothing but Python is to be found: no compiler, no variables of ours."""
    return run(python, *options, USE, what, env={"PATH": str(python.parent)}, cwd=python.parent)


def test_the_extension_needs_nothing_newer_than_the_oldest_torch() -> None:
    """Weak symbols may be missing: the code looks whether they are there."""
    extension = importlib.util.find_spec("batchnorm._native")
    assert extension is not None
    assert extension.origin is not None
    used = of_torch(symbols(Path(extension.origin), "--undefined-only"))
    assert "torch_library_impl" in used
    exported = set(SYMBOLS.read_text().split())
    assert {name for name, kind in used.items() if kind not in "wv"} <= exported


@pytest.mark.long
def test_the_wheel_serves_every_python_and_most_systems(wheel: Path) -> None:
    """auditwheel has looked up which versions of the system's libraries it needs: the tag says it."""
    *_, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    if sys.platform == "linux":
        glibc = re.match(r"manylinux_2_(\d+)_", platform)
        assert glibc is not None, platform
        assert int(glibc[1]) <= 35, "Ubuntu 22.04 and Debian 12 are to have what it needs"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"batchnorm/_native.so", "batchnorm/py.typed", "batchnorm/report/templates/page.html.j2"} <= names
    (pinned,) = re.findall(r"^torch==(.*)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    (library,) = (name for name in names if name.startswith("batchnorm/_autograd-"))
    assert re.fullmatch(rf"batchnorm/_autograd-{re.escape(pinned)}-[0-9a-f]{{8}}\.so", library)
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"batchnorm"}
    assert not [name for name in names if name.startswith("batchnorm.libs/")], "a library of the system's came along"


@pytest.mark.long
def test_the_wheel_in_an_empty_environment(wheel: Path, environment: Path) -> None:
    """Everything that it needs comes with it, in the developers' versions."""
    pip("install", "--no-compile", "-c", ROOT / "constraints.txt", wheel, python=environment / "python")
    said = use(environment / "python", "native")
    (pinned,) = re.findall(r"^torch==(.*)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert re.match(rf"torch {re.escape(pinned)}(\+.*)?\n{re.escape(str(environment.parent))}", said)


@pytest.mark.long
@pytest.mark.parametrize("version", [OLDEST, "2.14.1"])
def test_the_wheel_with_another_torch(wheel: Path, environment: Path, version: str) -> None:
    """With those that `make test-torch` has installed: on Linux each is gigabytes, most of them for GPUs."""
    torch = ROOT / ".torch" / version
    if not (torch / "torch").is_dir():
        pytest.skip(f"torch {version} is not at hand: `make .torch/{version}/installed TORCH={version}` installs it")
    python = environment / "python"
    pip("install", "--no-deps", wheel, python=python)
    pip("install", "-c", ROOT / "constraints.txt", "click", "rich", "greenlet", python=python)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "torch.pth").write_text(f"{torch}\n")
    assert use(python, "native").startswith(f"torch {version}")
    if version == OLDEST and sys.platform == "linux":
        exported = of_torch(symbols(torch / "torch" / "lib" / "libtorch_cpu.so", "--defined-only"))
        assert set(SYMBOLS.read_text().split()) == set(exported)


@pytest.mark.long
def test_the_sources_without_a_compiler_are_plain_python(tmp_path: Path) -> None:
    """Nothing that the build needs is missing in what is published, and without the extension everything works."""
    build = "from scikit_build_core.build import build_sdist; import sys; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.?pp")}
    assert needed
    assert {*SOURCES, *needed} <= inside
    assert not [name for name in inside if name.endswith(".so")]
    no_compiler = ["--no-build-isolation", "--config-settings=wheel.cmake=false"]
    site = tmp_path / "site"
    pip(
        "install", "--no-deps", *no_compiler, f"--config-settings=build-dir={tmp_path}/build", "--target", site, archive
    )
    # -S keeps the developers' own installation, a path hook, from being found.
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    said = run(sys.executable, "-S", USE, "reference", env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path)
    assert f"\n{site}" in said
    assert "No native kernels: this installation has no native extension" in said
