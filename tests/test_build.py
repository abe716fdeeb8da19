"""Guards the promise that whatever stops a build or an import is one sentence that says what to do.

A build is tried with a torch that is too old and without a compiler, an import without the library
and with a broken one. Each must end in our sentence, and not in a traceback from deep inside.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_build_without_a_compiler_says_what_to_install():
    result = run("setup.py", "--version", cwd=ROOT, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler called 'no-such-compiler' was found; install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_build_against_an_old_torch_names_the_version_that_is_needed(tmp_path):
    package = tmp_path / "torch" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.9.1+cpu"\n')
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text("")
    result = run("setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "torch 2.10 or newer is needed, found 2.9.1+cpu; upgrade torch" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fused_ce", tmp_path / "fused_ce", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def test_import_without_the_library_says_how_to_build_it(bare_package):
    result = run("-c", "import fused_ce", cwd=bare_package)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_ce has no compiled library at ")
    assert "pip install --no-build-isolation -e ." in last


def test_import_of_a_library_that_does_not_load_says_to_reinstall(bare_package):
    (bare_package / "fused_ce" / "_C.so").write_bytes(b"not a library")
    result = run("-c", "import fused_ce", cwd=bare_package)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_ce could not load ")
    assert "reinstall fused_ce for this machine" in last


def test_import_under_an_old_torch_names_the_version_that_is_needed(bare_package):
    code = "import torch; torch.__version__ = '2.9.0'; import fused_ce"
    result = run("-c", code, cwd=bare_package)
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: fused_ce needs torch 2.10 or newer, found 2.9.0; upgrade torch."


def test_wheel_serves_every_python_and_carries_type_information(tmp_path):
    """Its tag, its files, and that it works away from the source tree."""
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    built = run(*pip, "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name

    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(wheel, unpacked, "zip")
    names = {p.name for p in (unpacked / "fused_ce").iterdir()}
    assert {"__init__.py", "_C.so", "py.typed"} <= names
    code = (
        "import torch, fused_ce; print(fused_ce.__file__); "
        "print(fused_ce.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item())"
    )
    used = run("-c", code, cwd=unpacked)
    file, loss = used.stdout.split()
    assert file.startswith(str(unpacked))
    assert float(loss) == pytest.approx(1.3862943611198906, rel=1e-6)  # log(4)
