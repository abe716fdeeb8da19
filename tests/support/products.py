"""What the tests compile, kept in build/tests for the runs that follow.

A product is a folder. The first process of a run that needs it makes it, and it is made anew when
one of the files, or anything else that it is made from, has changed.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "tests"
KERNELS = ROOT / "csrc"
# What the CUDA kernels are compiled from.
CUDA_SOURCES = (KERNELS / "cuda", *sorted(KERNELS.glob("*.h")))
COMPILER = os.environ.get("CXX", "g++")


@functools.cache
def contents(path: Path) -> str:
    """A digest of a file, or of all source files under a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        if file.is_file() and file.suffix not in (".so", ".pyc"):
            digest.update(f"{file.relative_to(path.parent)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def kept(
    name: str, make: Callable[[Path], object], *sources: Path, of: object = "", by: str = COMPILER
) -> Path:
    """The folder that `make(folder)` fills from `sources`, with the compiler `by`; `of` is what
    else decides on its contents."""
    made_from = [version(by), torch.__version__, of, *map(contents, sources)]
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    made = PLACE / f"{name}-{digest}"
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for old in PLACE.glob(f"{name}-{'?' * len(digest)}"):
                shutil.rmtree(old)
            unfinished = PLACE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(made)
    return made
