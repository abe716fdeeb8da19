"""The examples of other people's training loops, with the real packages: stock's curve in each.

They run in this process, which has imported the packages for the tests beside it.
"""

import re
import runpy
import sys

import pytest
from support.processes import ROOT, environment, finish
from support.reference import one_thread

pytestmark = pytest.mark.xdist_group("transformers")
# The package that it needs, the lines that it prints, how far the loss falls, and how far apart the
# curves may be: in float16 by roundings.
EXAMPLES = {
    "accelerate_fp16": ("accelerate", 6, 3.0, 5e-3),
    "lightning_module": ("lightning", 4, 0.8, 1e-5),
    "segmentation": (None, 6, 1.0, 1e-5),
    "timm_mixup": ("timm", 6, 0.4, 1e-5),
}


# Lightning takes seconds to import; test_frameworks.py trains with it in every run.
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == "lightning_module" else ())
    for name in EXAMPLES
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_takes_the_curve_of_stock(name, capsys, monkeypatch):
    package, lines, falls, most = EXAMPLES[name]
    if package is not None:
        pytest.importorskip(package, reason="requirements-dev.txt names it")
    if package == "accelerate":  # it allows one precision in a process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "argv", [name])
    with one_thread():
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    if package == "accelerate":
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
    printed = capsys.readouterr().out
    (apart,) = re.findall(r"largest relative difference: (\S+)", printed)
    assert float(apart) < most
    losses = [float(loss) for loss in re.findall(r"^ *\d+ +\d+\.\d+ +(\d+\.\d+)$", printed, re.M)]
    assert len(losses) == lines and losses[0] - losses[-1] > falls
    right = re.findall(r"pixels that are right: (\S+)", printed)
    assert all(float(share) > 0.95 for share in right) and len(right) == (name == "segmentation")


def test_a_script_that_is_not_changed_prints_the_same_losses():
    script = "examples/train_script_unchanged.py"
    runs = [
        finish(*command, script, "--steps", "20", env=environment())
        for command in ((), ("-m", "fused_ce", "run"))
    ]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert runs[0].stdout == runs[1].stdout
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", runs[0].stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] < 2
    assert not runs[0].stderr and "cross_entropy" in runs[1].stderr
