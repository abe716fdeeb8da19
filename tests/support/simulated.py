"""Runs the CUDA kernels on the simulator in tests/cuda/simulator: tensors in, tensors out.

The kernels' own sources are compiled with g++, once for each set of flags. The calls run in another
process, so that a kernel that fails takes no test with it but its own: the next call starts a fresh
one.
"""

import ctypes
import math
import os
import select
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from support.layouts import class_axis, row_axes
from support.products import COMPILER, CUDA_SOURCES, KERNELS, ROOT, kept

SIMULATOR = ROOT / "tests" / "cuda" / "simulator"
SIMULATOR_SOURCES = sorted(path for path in SIMULATOR.rglob("*") if path.suffix in (".cpp", ".h"))
PROGRAM = "run_cases"
PLAIN = ("-O1", "-fPIC")  # objects that a library can be made of as well
FLAGS = ("-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")

MAX_ROW_DIMS = 24
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.uint8),
)
REDUCTION_NUMBERS = ("none", "mean", "sum")
FORWARD, BACKWARD, BACKWARD_TARGET, SCALE = range(4)
UNWRITTEN = 0xCD  # what results hold before the kernels write them


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_uint64),
        ("dtype", ctypes.c_uint8),
        ("class_stride", ctypes.c_int64),
        ("row_strides", ctypes.c_int64 * MAX_ROW_DIMS),
    ]


STATISTICS = "row_max", "row_rest", "row_mass", "row_mass_low"
OPERANDS = (
    *("input", "target", "grad", "target_grad", "scale_grad", "loss", "grad_output"),
    *STATISTICS,
)


class Values(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_uint64),
        ("dtype", ctypes.c_uint8),
        ("count", ctypes.c_int64),
    ]


class Options(ctypes.Structure):
    """As csrc/options.h lists them."""

    _fields_ = [
        ("weight", Values),
        ("denominator", Values),
        ("logit_scale", Values),
        ("sample_weight", Operand),
        ("reduction", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("label_smoothing", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("z_loss", ctypes.c_double),
        ("focal_gamma", ctypes.c_double),
        ("on_all_ignored", ctypes.c_int64),
        ("on_out_of_range", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("classes", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("first_class", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row_dims", ctypes.c_int32),
        ("row_sizes", ctypes.c_int64 * MAX_ROW_DIMS),
        *((name, Operand) for name in OPERANDS),
        ("row_gaps", Operand),  # of shards, which no call here has
        ("totals", ctypes.c_uint64),
        ("probabilities", ctypes.c_bool),
        ("options", Options),
        ("known_totals", ctypes.c_double * 3),
    ]


class Elements(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_uint64),
        ("dtype", ctypes.c_uint8),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * (MAX_ROW_DIMS + 1)),
        ("strides", ctypes.c_int64 * (MAX_ROW_DIMS + 1)),
    ]


class Call(ctypes.Structure):
    """As tests/cuda/simulator/run_cases.cpp reads it."""

    _fields_ = [
        ("call_bytes", ctypes.c_int32),
        ("operation", ctypes.c_int32),
        ("when", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("has_clusters", ctypes.c_int32),
        ("buffer_count", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("problem", Problem),
        ("elements", Elements),
    ]


class SimulatedDevice(NamedTuple):
    multiprocessors: int = 3
    has_clusters: bool = True


class SimulatorError(Exception):
    """What the program said before it ended."""


class Program:
    """The simulator's process. It takes calls until one of them ends it."""

    LIMIT = 300  # seconds for a call

    def __init__(self, path):
        self.path = path
        self.process = None

    def start(self):
        self.said = tempfile.TemporaryFile()
        # A race ends the program at once, and not with the last call.
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [self.path], stdin=pipe, stdout=pipe, stderr=self.said, env=environment
        )

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.said.close()
            self.process = None

    def error(self):
        """Why the process has ended, or does not answer; it is gone afterwards."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            code = "no answer"
        self.said.seek(0)
        said = self.said.read().decode()[-4000:]
        self.close()
        if code == -signal.SIGSEGV:
            return SimulatorError("memory outside of a buffer was touched")
        return SimulatorError(said or f"exit {code}")

    def call(self, message, answer_bytes):
        if not self.process:
            self.start()
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.error() from None
        if not select.select([self.process.stdout], [], [], self.LIMIT)[0]:
            raise self.error()
        answer = self.process.stdout.read(answer_bytes)
        if len(answer) < answer_bytes:
            raise self.error()
        return answer


def build(directory, *flags, sources=KERNELS, base=None, only=None):
    """Compiles simulator and kernels, these from another place than csrc if `sources` says so.

    With `only`, no more than the kernels of these names are compiled; the others are those that
    were built in the directory `base`.
    """
    flags = flags or PLAIN
    kernels = Path(sources) / "cuda"
    # What architecture.cu asks is a question to the CUDA runtime, which is not simulated.
    files = [unit for unit in kernels.rglob("*.cu") if unit.name != "architecture.cu"]
    units = [*sorted(files), *sorted(SIMULATOR.glob("*.cpp"))]
    wanted = [unit for unit in units if only is None or unit.stem in only]

    def target(unit):
        return Path(directory if unit in wanted else base) / (unit.name + ".o")

    def compile_one(unit):
        command = [COMPILER, *FLAGS, *flags, f"-I{SIMULATOR}", f"-I{kernels}", "-x", "c++"]
        if unit.name == "engine.cpp":
            # The threads of a kernel share what is the simulator's own, one at a time.
            command.append("-fno-sanitize=thread")
        subprocess.run([*command, "-c", unit, "-o", target(unit)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, wanted))
    # Of the functions in headers every unit has a copy; the linker keeps the first one it meets.
    units.sort(key=lambda unit: unit not in wanted)
    subprocess.run([COMPILER, *flags, *map(target, units), "-o", directory / PROGRAM], check=True)


def built(name, *flags):
    """The folder of the unchanged kernels, compiled with these flags."""
    made_from = (FLAGS, flags)
    sources = *CUDA_SOURCES, *SIMULATOR_SOURCES
    return kept(name, lambda place: build(place, *flags), *sources, of=made_from)


class _Calls:
    """One call in the making: the problem, and the tensors' storages as buffers."""

    def __init__(self, operation, device, seed):
        self.call = Call(
            call_bytes=ctypes.sizeof(Call),
            operation=operation,
            seed=seed,
            multiprocessors=device.multiprocessors,
            has_clusters=device.has_clusters,
        )
        self.storages, self.written = [], []
        self.row_strides = {}

    def place(self, tensor, written=False):
        storage = tensor.untyped_storage()
        for i, known in enumerate(self.storages):
            if known.data_ptr() == storage.data_ptr() and storage.nbytes():
                self.written[i] |= written
                break
        else:
            i = len(self.storages)
            self.storages.append(storage)
            self.written.append(written)
        return (i + 1) << 40 | tensor.storage_offset() * tensor.element_size()

    def operand(self, name, tensor, *, written=False, classes=False, rows=True):
        operand = getattr(self.call.problem, name)
        operand.data = self.place(tensor, written)
        operand.dtype = DTYPES.index(tensor.dtype)
        if classes:
            operand.class_stride = tensor.stride(class_axis(tensor))
            self.row_strides[name] = [tensor.stride(d) for d in row_axes(tensor)]
        elif rows:
            self.row_strides[name] = list(tensor.stride())

    def lay_out(self, sizes):
        """As ProblemBuilder::build in checks.cpp."""
        p = self.call.problem
        inputs = self.row_strides["input"]
        order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -inputs[d])
        dims = []
        for d in order:
            strides = {name: strides[d] for name, strides in self.row_strides.items()}
            outer = dims[-1] if dims else None
            if outer and all(outer[1][n] == strides[n] * sizes[d] for n in strides):
                dims[-1] = (outer[0] * sizes[d], strides)
            else:
                dims.append((sizes[d], strides))
        dims = dims or [(1, dict.fromkeys(self.row_strides, 1))]
        size, strides = dims[-1]
        if strides["input"] != 1 or size < 16:
            longest = max(range(len(dims)), key=lambda d: (dims[d][0], -d))
            dims[-1], dims[longest] = dims[longest], dims[-1]
        p.row_dims = len(dims)
        for d, (size, strides) in enumerate(dims):
            p.row_sizes[d] = size
            for name, stride in strides.items():
                getattr(p, name).row_strides[d] = stride

    def run(self, program):
        self.call.buffer_count = len(self.storages)
        message = [bytes(self.call)]
        for storage, written in zip(self.storages, self.written, strict=True):
            message.append(storage.nbytes().to_bytes(8, "little"))
            message.append(int(written).to_bytes(8, "little"))
            if storage.nbytes():
                message.append(bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy()))
        pairs = zip(self.storages, self.written, strict=True)
        answer_bytes = 4 + sum(storage.nbytes() for storage, written in pairs if written)
        answer = program.call(b"".join(message), answer_bytes)
        at = 4
        for storage, written in zip(self.storages, self.written, strict=True):
            if written and storage.nbytes():
                end = at + storage.nbytes()
                result = torch.frombuffer(bytearray(answer[at:end]), dtype=torch.uint8)
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(result)
                at = end
        return int.from_bytes(answer[:4], "little")


def unwritten(like, dtype=None, layout=None):
    """A tensor that no kernel has written, in the given layout's strides or contiguous."""
    if layout is not None:
        storage = torch.full((layout.untyped_storage().nbytes(),), UNWRITTEN, dtype=torch.uint8)
        result = torch.empty(0, dtype=layout.dtype).set_(storage.untyped_storage())
        return result.as_strided(layout.shape, layout.stride(), layout.storage_offset())
    size = math.prod(like) * dtype.itemsize
    return torch.full((size,), UNWRITTEN, dtype=torch.uint8).view(dtype).view(like)


class Kernels:
    """The functions of csrc/cuda/kernels.h, on tensors, by the program that `build` has made."""

    def __init__(self, directory):
        self.directory = directory
        self.program = Program(directory / PROGRAM)
        self.launches = 0  # of the last call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.program.close()

    def _problem(
        self,
        operation,
        input,
        target,
        *,
        weight=None,
        denominator=None,
        reduction="mean",
        ignore_index=-100,
        label_smoothing=0.0,
        device=SimulatedDevice(),  # noqa: B008
        seed=0,
    ):
        calls = _Calls(operation, device, seed)
        p = calls.call.problem
        p.classes = input.shape[class_axis(input)]
        sizes = [input.shape[d] for d in row_axes(input)]
        p.rows = math.prod(sizes)
        p.probabilities = target.is_floating_point()
        p.options.reduction = REDUCTION_NUMBERS.index(reduction)
        p.options.ignore_index = ignore_index
        p.options.label_smoothing = label_smoothing
        calls.operand("input", input, classes=True)
        calls.operand("target", target, classes=p.probabilities)
        for values, tensor in ((p.options.weight, weight), (p.options.denominator, denominator)):
            if tensor is not None:
                values.data, values.dtype = calls.place(tensor), DTYPES.index(tensor.dtype)
                values.count = tensor.numel()
        return calls, sizes

    def _statistics(self, calls, sizes, stats, written):
        rows, totals = stats
        for name, row in zip(STATISTICS, rows, strict=False):
            calls.operand(name, row.view(sizes), written=written)
        calls.call.problem.totals = calls.place(totals, written)

    def forward(
        self,
        input,
        target,
        *,
        grad=None,
        grad_output=None,
        keeps_stats=False,
        loss_dtype=None,
        **options,
    ):
        """Returns the loss, and the row statistics and the totals if asked to keep them."""
        calls, sizes = self._problem(FORWARD, input, target, **options)
        none = options.get("reduction") == "none"
        loss = unwritten(sizes if none else [], loss_dtype or input.dtype)
        calls.operand("loss", loss, written=True, rows=none)
        stats = None
        if keeps_stats:
            dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
            kinds = 4 if target.is_floating_point() else 2
            stats = unwritten([kinds, math.prod(sizes)], dtype), unwritten([3], torch.float64)
            self._statistics(calls, sizes, stats, True)
        if grad_output is not None:
            calls.operand("grad_output", grad_output, rows=none)
        if grad is not None:
            calls.operand("grad", grad, written=True, classes=True)
        calls.lay_out(sizes)
        self.launches = calls.run(self.program)
        return loss, stats

    def backward(self, input, target, stats, grad_output, grad, *, unless_one=False, **options):
        calls, sizes = self._problem(BACKWARD, input, target, **options)
        calls.call.when = int(unless_one)
        self._statistics(calls, sizes, stats, False)
        none = options.get("reduction") == "none"
        calls.operand("grad_output", grad_output, rows=none)
        calls.operand("grad", grad, written=True, classes=True)
        calls.lay_out(sizes)
        self.launches = calls.run(self.program)

    def backward_target(self, input, target, stats, grad_output, target_grad, **options):
        calls, sizes = self._problem(BACKWARD_TARGET, input, target, **options)
        self._statistics(calls, sizes, stats, False)
        none = options.get("reduction") == "none"
        calls.operand("grad_output", grad_output, rows=none)
        calls.operand("target_grad", target_grad, written=True, classes=True)
        calls.lay_out(sizes)
        self.launches = calls.run(self.program)

    def scale(self, tensor, factor, *, device=SimulatedDevice(), seed=0):  # noqa: B008
        calls = _Calls(SCALE, device, seed)
        elements = calls.call.elements
        elements.data = calls.place(tensor, True)
        elements.dtype = DTYPES.index(tensor.dtype)
        dims = sorted(
            (d for d in range(tensor.dim()) if tensor.shape[d] != 1),
            key=lambda d: -tensor.stride(d),
        ) or [0]
        elements.dims = len(dims)
        for i, d in enumerate(dims):
            elements.sizes[i], elements.strides[i] = tensor.shape[d], tensor.stride(d)
        calls.operand("grad_output", factor, rows=False)
        self.launches = calls.run(self.program)
