"""Guards the error bounds of exp, log1p and tanh that cpu/math.h states.

No bound on the loss or the gradient can be met with a worse exp, so it is measured on its own, for
each instruction set, over floats of its whole domain: a sample, and in the slow test every one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.products import COMPILER, KERNELS, kept

NATIVE = Path(__file__).parent / "native"
FLAGS = (
    "-std=c++20 -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-ffp-contract=fast"
).split()

# In ulp, as stated in cpu/math.h.
BOUNDS = {
    "exp_float": 1.2,
    "exp_normal_float": 1.2,
    "exp_avx512": 1.0,
    "exp_avx2": 1.2,
    "exp_avx2_half": 64.0,  # 17 bits and more, for results that are rounded to 8 or 11
    "exp_double": 1.1,
    "log1p_double": 2.0,
    "log1p_float": 2.0,
    "tanh_double": 2.0,
    "tanh_float": 2.0,
}
# Loops in one instruction set's own instructions: the one asked for, or as wide as the machine has.
AVX2, AVX512 = {"exp_avx2", "exp_avx2_half"}, {"exp_avx512"}
WITH_LOOPS = {"default": [set()], "avx2": [AVX2, set()], "avx512": [AVX512, AVX2, set()]}


@pytest.fixture(scope="session")
def program() -> Path:
    source = NATIVE / "math_accuracy.cpp"

    def build(place):
        subprocess.run([COMPILER, *FLAGS, source, "-o", place / "math_accuracy"], check=True)

    return kept("math_accuracy", build, KERNELS, source, of=FLAGS) / "math_accuracy"


def measure(program: Path, capability: str, step: int) -> dict[str, float]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [program, str(step)], env=environment, capture_output=True, text=True, check=True
    )
    sys.stdout.write(result.stdout)
    return {name: float(error) for name, error, *_ in map(str.split, result.stdout.splitlines())}


# A prime step meets every low bit pattern of the mantissa.
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_functions_are_as_accurate_as_stated(program, capability):
    errors = measure(program, capability, 1009)
    assert errors.keys() - AVX2 - AVX512 == BOUNDS.keys() - AVX2 - AVX512
    assert errors.keys() & (AVX2 | AVX512) in WITH_LOOPS[capability]
    for name, error in errors.items():
        assert error <= BOUNDS[name], name


@pytest.mark.rare  # a push has the sample, which meets every low bit pattern
@pytest.mark.slow
def test_functions_of_every_float_are_as_accurate_as_stated(program):
    for name, error in measure(program, "avx512", 1).items():
        assert error <= BOUNDS[name], name
