"""What a figure has to be read with: the machine, its state, and the versions of everything.

All of it goes into the JSON, the part that moves figures most also onto the terminal and the
charts. What a system does not tell is None.
"""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.common.devices import Device

ROOT = Path(__file__).resolve().parents[2]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def commit(folder: Path = ROOT) -> str | None:
    """Of the tree there; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def fused_ce_facts() -> dict[str, str | None]:
    try:
        import fused_ce
        from fused_ce import ops
    except ImportError:
        return {"version": None, "instruction_set": None}
    return {"version": fused_ce.__version__, "instruction_set": ops.instruction_set()}


def huge_pages() -> str | None:
    """A gradient of fresh memory costs several times more where this says never."""
    try:
        words = HUGE_PAGES.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def describe(device: Device) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "model": device.model(),
        **device.facts(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": round(os.getloadavg()[0], 2),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "fused_ce": fused_ce_facts(),
        "commit": commit(),
    }


def headline(facts: dict[str, Any]) -> str:
    parts = [facts["model"] or facts["architecture"]]
    if facts["device"] == "cpu":
        parts.append(f"{facts['threads']} threads")
        parts.append(facts["fused_ce"]["instruction_set"] or facts["torch_instruction_set"].lower())
    else:
        parts.append(f"driver {facts['driver'] or 'unknown'}")
    parts.append(f"torch {facts['torch']}")
    if facts["device"] == "cpu" and facts["huge_pages"]:
        parts.append(f"huge pages {facts['huge_pages']}")
    return ", ".join(parts)


def busy(facts: dict[str, Any]) -> str:
    """A warning, or nothing. Threads that wait for one another suffer most from other work: where
    it holds a core, a call of microseconds takes milliseconds."""
    load = facts["load_average"]
    if load <= 0.5:
        return ""
    return f"load average {load}: other work on this machine will disturb the figures"
