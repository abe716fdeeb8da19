"""Builds the operator library, fused_ce/_C, against the LibTorch stable ABI.

The library holds no Python symbols and asks for nothing newer than torch 2.10, so one wheel serves
every Python, free-threaded ones too, and every torch from there on; fused_ce.ops loads it.
"""

import re
import shutil
import sys

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

from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler  # noqa: E402

if shutil.which(get_cxx_compiler()) is None:
    sys.exit(
        f"fused_ce: no C++ compiler called {get_cxx_compiler()!r} was found; install g++ 11 or "
        "newer (or clang 14), or name one in the environment variable CXX."
    )

SOURCES = [
    "csrc/ops.cpp",
    "csrc/checks.cpp",
    "csrc/cpu/kernels.cpp",
    "csrc/cpu/register.cpp",
    "csrc/cpu/scale.cpp",
]

# NaN and infinity keep their meaning (no -ffast-math); what is given up here is errno, traps, the
# sign of zero, and separate rounding of a product that is added to something.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-g0",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for one platform and any Python."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[
        CppExtension("fused_ce._C", SOURCES, extra_compile_args=CXX_FLAGS, py_limited_api=True)
    ],
    cmdclass={
        "bdist_wheel": AnyPythonWheel,
        "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
    },
)
