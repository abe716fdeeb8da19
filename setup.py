"""Builds the operator library, fused_ce/_C, against the LibTorch stable ABI.

The library holds no Python symbols and asks for nothing newer than torch 2.10, so one wheel serves
every Python, free-threaded ones too, and every torch from there on; fused_ce.ops loads it. It has
CUDA kernels where torch has CUDA and nvcc is found. FUSED_CE_CUDA=1 asks for them beside any torch,
which need not be the one that runs; FUSED_CE_CUDA=0 leaves them out.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch
except ImportError:
    sys.exit(
        "fused_ce: torch 2.10 or newer must be installed to build with --no-build-isolation; "
        "install it first, or leave that option out."
    )
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
    sys.exit(f"fused_ce: torch 2.10 or newer is needed, found {torch.__version__}; upgrade torch.")

from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler  # noqa: E402

if shutil.which(get_cxx_compiler()) is None:
    sys.exit(
        f"fused_ce: no C++ compiler called {get_cxx_compiler()!r} was found; install g++ 11 or "
        "newer (or clang 14), or name one in the environment variable CXX."
    )

SOURCES = ["csrc/ops.cpp", "csrc/checks.cpp", *sorted(map(str, Path("csrc/cpu").rglob("*.cpp")))]
CUDA_SOURCES = ["csrc/cuda/backend.cpp", *sorted(map(str, Path("csrc/cuda").rglob("*.cu")))]
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"

COMMON_FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Folders of the machine that builds do not go into the library: it is the same from any.
FOLDERS = [f"-ffile-prefix-map={path}=." for path in (Path(torch.__file__).parents[1], Path.cwd())]
# NaN and infinity keep their meaning (no -ffast-math); what is given up here is errno, traps, the
# sign of zero, and separate rounding of a product that is added to something.
CXX_FLAGS = [
    *COMMON_FLAGS,
    *FOLDERS,
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-g0",
]
# The assertion on a target out of range stays, whatever the flags that Python was built with say.
NVCC_FLAGS = [
    *COMMON_FLAGS,
    "-UNDEBUG",
    *(f"-Xcompiler={flag}" for flag in ("-fvisibility=hidden", *FOLDERS)),
]


def version(has_cuda: bool) -> str:
    """The package's; a wheel with CUDA kernels is not to be taken for the one without."""
    text = Path("fused_ce", "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    return found + ("+cuda" if has_cuda else "")


def long_description() -> str:
    """The README without pictures and links into the repository, which an index has no files of."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\n+", "", text, flags=re.M)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def cuda_home() -> Path | None:
    """The toolkit that has nvcc: a CPU-only torch does not look for one."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(named)] if named else [Path("/usr/local/cuda")]
    if on_path and not named:
        homes.insert(0, Path(on_path).resolve().parents[1])
    # A script in place of nvcc may lie anywhere, but a toolkit has the runtime's header as well.
    complete = (home for home in homes if (home / "include" / "cuda_runtime.h").exists())
    return next((home for home in complete if (home / "bin" / "nvcc").exists()), None)


def wanted_cuda_home() -> Path | None:
    wish = os.environ.get("FUSED_CE_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"fused_ce: FUSED_CE_CUDA must be 0, 1 or empty, got {wish!r}; correct it.")
    if wish == "0" or not (wish or torch.version.cuda):
        return None
    home = cuda_home()
    if wish and home is None:
        sys.exit(
            "fused_ce: FUSED_CE_CUDA=1 asks for the CUDA kernels, but no CUDA toolkit with nvcc "
            "was found; install one (12.8 or newer), name it in CUDA_HOME, or leave that out."
        )
    return home


def extension(home: Path | None) -> CppExtension:
    if home is None:
        return CppExtension(
            "fused_ce._C", SOURCES, extra_compile_args=CXX_FLAGS, py_limited_api=True
        )
    cpp_extension.CUDA_HOME = str(home)
    # The runtime is linked statically and torch through its stable ABI: their versions may differ.
    cpp_extension._check_cuda_version = lambda *_: None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return CppExtension(
        "fused_ce._C",
        SOURCES + CUDA_SOURCES,
        include_dirs=[str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        # Nothing in libtorch is used directly, but it brings along torch's CUDA part where there is
        # one, in which the weak symbol is to be found.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        py_limited_api=True,
    )


class SharedObjects(BuildExtension.with_options(no_python_abi_suffix=True)):
    """Keeps its objects in one place; setuptools would throw those of an editable install away."""

    def finalize_options(self):
        self.build_temp = self.build_temp or str(Path("build", "objects"))
        super().finalize_options()


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for one platform and any Python."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


cuda = wanted_cuda_home()
setup(
    version=version(has_cuda=cuda is not None),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    # What is up to date is for ninja to say: it knows the headers, the flags and the wish for CUDA.
    options={"build_ext": {"force": True}},
    ext_modules=[extension(cuda)],
    cmdclass={
        "bdist_wheel": AnyPythonWheel,
        "build_ext": SharedObjects,
    },
)
