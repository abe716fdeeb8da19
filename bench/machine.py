"""What a figure has to be read with: the machine, the versions and the settings of this run."""

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.devices import Device

ROOT = Path(__file__).resolve().parent.parent
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def commit() -> str | None:
    """Of this tree; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
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
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "fused_ce": fused_ce_facts(),
        "commit": commit(),
    }


def headline(facts: dict[str, Any]) -> str:
    instructions = facts["fused_ce"]["instruction_set"] or facts["torch_instruction_set"].lower()
    return (
        f"{facts['model']}, {facts['threads']} threads, {instructions}, torch {facts['torch']}, "
        f"huge pages {facts['huge_pages']}"
    )
