"""Guards the promise that whatever stops a build or an import is one sentence that says what to do.

A build is tried with a torch that is too old and without a compiler, an import without the library
and with a broken one. Each must end in our sentence, and not in a traceback from deep inside.
"""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from support.processes import ROOT, Done, finish
from torch.utils import cpp_extension

import fused_ce
from fused_ce.ops import LIBRARY


def run(*command: str, cwd: Path, **more: str) -> Done:
    return finish(*command, cwd=cwd, env={**os.environ, **more})


def run_anew(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    """With nothing loaded before."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Runs setup.py here, where torch is loaded, and gives what it tells setuptools."""

    def run_here(**variables):
        told = {}
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", told.update)
        # What it sets where it builds with CUDA.
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        monkeypatch.setattr(cpp_extension, "_check_cuda_version", None)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
        for name, value in {"CUDA_HOME": str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        runpy.run_path("setup.py", run_name="__main__")
        return told

    return run_here


def test_build_without_a_compiler_says_what_to_install():
    result = run("setup.py", "--version", cwd=ROOT, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler called 'no-such-compiler' was found; install g++" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "wish, sentence",
    [
        (
            "1",
            "no CUDA toolkit with nvcc was found; install one (12.8 or newer), name it in",
        ),
        ("yes", "FUSED_CE_CUDA must be 0, 1 or empty, got 'yes'; correct it"),
    ],
)
def test_build_with_cuda_that_is_not_there_says_what_to_do(build, wish, sentence):
    with pytest.raises(SystemExit) as ended:  # its text is all that Python prints
        build(FUSED_CE_CUDA=wish)
    assert sentence in ended.value.code


@pytest.mark.parametrize("wish", ["", "0"])
def test_build_without_cuda_needs_no_toolkit(build, wish):
    assert build(FUSED_CE_CUDA=wish)["ext_modules"]


def test_another_torch_is_given_a_setuptools_that_it_takes(tmp_path):
    # torch 2.11 takes none from 82 on; ours builds with 77 or newer.
    command = ["make", "-n", "TORCH=torch==2.11.0", f"VENV={tmp_path}"]
    command.append(f"{tmp_path}/.installed-torch==2.11.0")
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("MAKE")}
    dry = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    (line,) = (line for line in dry.stdout.splitlines() if line.startswith("sed"))
    subprocess.run(line, shell=True, cwd=ROOT, check=True)
    wanted = (tmp_path / "requirements.txt").read_text().splitlines()
    assert "torch==2.11.0" in wanted
    assert [name.partition("<=")[0] for name in wanted if name.startswith("setuptools")] == [
        "setuptools>=77,"
    ]


@pytest.mark.parametrize(
    "torch_cuda, toolkit, wish, expected",
    [
        ("12.8", True, "", True),
        ("12.8", False, "", False),  # explain() then says what is missing
        ("12.8", True, "0", False),
        (None, True, "", False),
        (None, True, "1", True),
    ],
)
def test_kernels_are_built_where_they_can_be_and_are_wanted(
    build, torch_cuda, toolkit, wish, expected, tmp_path, monkeypatch
):
    for name in ("include/cuda_runtime.h", "bin/nvcc") if toolkit else ():
        path = tmp_path / name
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    told = build(FUSED_CE_CUDA=wish)
    assert told["version"] == fused_ce.__version__ + ("+cuda" if expected else "")
    (extension,) = told["ext_modules"]
    sources = extension.sources
    assert "csrc/cpu/backend.cpp" in sources
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/**/*.cu")}
    assert kernels
    assert kernels & set(sources) == (kernels if expected else set())


def test_an_index_shows_no_file_of_the_repository(build):
    shown = build()["long_description"]
    assert "# fused_ce" in shown and "fuse_head(" in shown
    targets = re.findall(r"\]\(([^)]*)\)", shown)
    assert all(target.startswith("https://") for target in targets)


def has_cuda_kernels():
    from fused_ce import ops

    return ops.has_cuda_kernels


@pytest.mark.skipif(not has_cuda_kernels(), reason="this build has no CUDA kernels")
def test_library_finds_the_stream_of_torch_and_keeps_the_assertion():
    # The weak symbol for the stream is looked for in what the library itself depends on.
    library = ROOT / "fused_ce" / "_C.so"
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "[libtorch.so]" in listed.stdout
    assert "libcudart" not in listed.stdout
    assert b"t >= 0 && t < n_classes" in library.read_bytes()


def test_build_against_an_old_torch_names_the_version_that_is_needed(tmp_path):
    package = tmp_path / "torch" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.9.1+cpu"\n')
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text("")
    result = run_anew("setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "torch 2.10 or newer is needed, found 2.9.1+cpu; upgrade torch" in result.stderr
    assert "Traceback" not in result.stderr


def test_library_names_no_folder_of_the_machine_that_built_it():
    held = LIBRARY.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in held


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fused_ce", tmp_path / "fused_ce", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def test_import_without_the_library_says_how_to_build_it(bare_package):
    result = run("-c", "import fused_ce", cwd=bare_package)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_ce has no compiled library at ")
    assert "pip install --no-build-isolation -e ." in last


def test_import_in_the_source_folder_says_that_it_hides_what_is_installed(bare_package, tmp_path):
    installed = tmp_path / "site-packages"
    (installed / "fused_ce").mkdir(parents=True)
    (installed / "fused_ce" / "__init__.py").touch()
    code = f"import sys; sys.path.append({str(installed)!r}); import fused_ce"
    last = run("-c", code, cwd=bare_package).stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: fused_ce is installed in {installed / 'fused_ce'}, but")
    assert last.endswith("start Python in another folder.")


def test_a_second_copy_in_one_process_is_an_error_and_no_crash(bare_package):
    shutil.copy(LIBRARY, bare_package / "fused_ce")
    code = f"""
import sys, fused_ce
for name in [name for name in sys.modules if name.partition(".")[0] == "fused_ce"]:
    del sys.modules[name]
sys.path.insert(0, {str(bare_package)!r})
import fused_ce
"""
    result = run("-c", code, cwd=ROOT)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_ce found another copy of itself in this process")
    assert str(LIBRARY) in last


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


def test_import_leaves_dynamo_alone():
    """It takes nearly as long to import as all of torch."""
    code = "import sys, fused_ce; print([m for m in sys.modules if m.startswith('torch._dynamo')])"
    assert run_anew("-c", code, cwd=ROOT).stdout == "[]\n"


def test_source_distribution_has_every_file(tmp_path):
    """What builds, tests and measures elsewhere."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no clone")
    made = run("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=ROOT)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert set(listed.stdout.splitlines()) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    shutil.unpack_archive(archive, tmp_path)
    (elsewhere,) = (path for path in tmp_path.iterdir() if path.is_dir())
    told = run("setup.py", "--version", "--long-description", cwd=elsewhere)
    assert told.stdout.startswith(f"{fused_ce.__version__}\n# fused_ce\n"), told.stderr


def test_wheel_serves_every_python_and_carries_type_information(tmp_path):
    """Its tag, its files, and that it works away from the source tree."""
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    built = run_anew(*pip, "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name

    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(wheel, unpacked, "zip")
    names = {p.name for p in (unpacked / "fused_ce").iterdir()}
    assert {"__init__.py", "_C.so", "py.typed"} <= names
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    told = email.message_from_string(metadata.read_text())
    assert told["Description-Content-Type"] == "text/markdown"
    assert "Programming Language :: Python :: 3.10" in told.get_all("Classifier")
    assert told.get_payload().startswith("# fused_ce")
    code = (
        "import torch, fused_ce; print(fused_ce.__file__); "
        "print(fused_ce.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item())"
    )
    used = run("-c", code, cwd=unpacked)
    file, loss = used.stdout.split()
    assert file.startswith(str(unpacked))
    assert float(loss) == pytest.approx(1.3862943611198906, rel=1e-6)  # log(4)
