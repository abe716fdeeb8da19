"""The fuzzer as its user meets it: it finds what is wrong, and what it prints shows it again.

That it finds nothing where nothing is wrong takes hours and is for whoever runs it; here a batch of
each kind of case has to pass.
"""

import pytest
from fuzz.__main__ import BATCH
from fuzz.cases import CASES
from support.processes import environment, finish

# Something goes wrong in the package, then the real program runs.
FAULTY = """
import os, sys
import fused_ce
{fault}
from fuzz.__main__ import main
sys.exit(main())
"""

FAULTS = {
    "loss": """
right = fused_ce.cross_entropy
fused_ce.cross_entropy = lambda *a, **k: right(*a, **k) * (1.01 if k.get("label_smoothing") else 1)
""",
    "head": """
right = fused_ce.linear_cross_entropy
fused_ce.linear_cross_entropy = lambda x, w, *a, **k: right(
    x, 1.01 * w - 0.01 * w.detach(), *a, **k
)
""",
    "divergence": """
right = fused_ce.kl_div_with_logits
fused_ce.kl_div_with_logits = lambda *a, **k: right(*a, **k) * (1.01 if k["reverse"] else 1)
""",
    # Written before the error.
    "operator": """
from fuzz import checks
right = checks.check_operator

def check(operator, arguments):
    def writes(**given):
        given.get("input", given.get("grad")).fill_(7)
        operator(**given)
    right(writes, arguments)

checks.CHECKS["operator"] = check
""",
}


def fuzz(program, *options):
    command = ("-c", program) if program else ("-m", "fuzz")
    return finish(*command, "--seconds", "0.1", *options, env=environment())


def test_nothing_is_found_where_nothing_is_wrong():
    done = fuzz(None)
    assert done.returncode == 0, done.stdout + done.stderr
    found = "; ".join(f"{kind}: {BATCH} cases" for kind in CASES)
    assert f"{found} without a fault" in done.stdout


@pytest.mark.parametrize("kind", ["loss", "head", "divergence"])
def test_wrong_answer_is_found_and_printed_as_a_program(kind):
    done = fuzz(FAULTY.format(fault=FAULTS[kind]), "--only", kind)
    assert done.returncode == 1, done.stdout
    reason, *program = done.stdout.splitlines()
    assert reason.startswith("# AssertionError: the ") and " off, stock's " in reason
    assert len(program) <= 14
    shown = finish("-c", done.stdout)
    assert shown.returncode == 0, shown.stderr
    assert "tensor" in shown.stdout


def test_crash_has_a_case():
    crash = "fused_ce.cross_entropy = lambda *a, **k: os.abort()"
    done = fuzz(FAULTY.format(fault=crash), "--only", "loss")
    assert done.returncode == 1
    assert done.stdout.startswith("# the process ended: SIGABRT\nimport fused_ce\nimport torch\n")


def test_what_is_written_before_an_error_is_found():
    done = fuzz(FAULTY.format(fault=FAULTS["operator"]), "--only", "operator")
    assert done.returncode == 1, done.stdout
    assert done.stdout.startswith("# AssertionError: ")
    assert " was written before the error" in done.stdout.splitlines()[0]
