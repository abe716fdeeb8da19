"""Runs programs as their user does: a process, what it prints and how it ends.

A test file that measures a process runs itself as a program; `environment` gives it the package
that is being tested, wherever that was imported from, and this folder's `support`.
"""

import os
import subprocess
import sys
from pathlib import Path

import fused_ce

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = Path(fused_ce.__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # `bench` is not installed


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (PACKAGE, TESTS, ROOT))), **more}


def run(*command: str, ends_with: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == ends_with, done.stdout
    return done.stdout


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
