"""Looks for calls with a wrong answer, as long as it is told to: `make fuzz SECONDS=600 SEED=1`.

With --cases it makes as many of each kind, however long that takes.

Hypothesis draws the cases and makes those that fail as small as it can. They run in a process of
their own, which leaves the text of each behind before it runs, so that a crash has a case as well.
What fails is printed as a program; the exit code is 1.
"""

import argparse
import inspect
import os
import signal
import sys
import tempfile
import time
import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings

from .cases import CASES
from .checks import CHECKS

BATCH = 25  # cases, after which the time is looked at and another kind has its turn
OURS = {
    "loss": "print(loss := fused_ce.cross_entropy(input.requires_grad_(), target, **options), "
    "torch.autograd.grad(loss, input, torch.full_like(loss, scale)), mode)",
    "options": "print(loss := fused_ce.cross_entropy(input.requires_grad_(), target, **options), "
    "torch.autograd.grad(loss, input, torch.full_like(loss, scale)), mode)",
    "pointwise": "print(loss := getattr(fused_ce, function)(input.requires_grad_(), target, "
    "**options), torch.autograd.grad(loss, input, torch.full_like(loss, scale)), mode)",
    "head": "print(loss := fused_ce.linear_cross_entropy(input.requires_grad_(), "
    "linear_weight.requires_grad_(), target, linear_bias=linear_bias, **options, **chunks), "
    "torch.autograd.grad(loss.sum(), (input, linear_weight)))",
    "divergence": "print(loss := fused_ce.kl_div_with_logits(input.requires_grad_(), teacher, "
    "**options), torch.autograd.grad(loss, input, torch.full_like(loss, scale)), mode)",
    "operator": "print(operator(**arguments))",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(CASES))
    asked = parser.parse_args()
    with tempfile.TemporaryFile("w+") as note:
        worker = os.fork()
        if not worker:
            status = 1
            try:
                status = work(asked, note)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code < 0:
            note.seek(0)
            kind, _, source = note.read().partition("\n")
            report(kind, source, f"the process ended: {signal.Signals(-code).name}")
    return min(abs(code), 1)


def work(asked: argparse.Namespace, note) -> int:
    kinds = [asked.only] if asked.only else list(CASES)
    counts, ends = dict.fromkeys(kinds, 0), time.monotonic() + asked.seconds
    turn = asked.seed * 1_000_003  # another seed has other batches

    def is_more_wanted():
        if asked.cases is None:
            return time.monotonic() < ends
        return min(counts.values()) < asked.cases

    while is_more_wanted():
        for kind in kinds:
            case, error = failing(kind, turn, note, counts)
            if error is not None:
                report(kind, case, f"{type(error).__name__}: {error}")
                return 1
        turn += 1
    print("; ".join(f"{kind}: {count} cases" for kind, count in counts.items()), "without a fault")
    return 0


def failing(kind: str, turn: int, note, counts: dict) -> tuple[str, Exception | None]:
    """The smallest case of a batch that fails, and how."""
    last = ""

    @seed(turn)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES[kind]())
    def check(source):
        nonlocal last
        last = source
        note.seek(0)
        note.truncate()
        note.write(f"{kind}\n{source}")
        note.flush()
        made = {}
        exec(source, made)
        names = inspect.signature(CHECKS[kind]).parameters
        CHECKS[kind](**{name: made[name] for name in names})
        counts[kind] += 1

    try:
        check()
    except Exception as error:
        return last, error
    return last, None


def report(kind: str, source: str, reason: str) -> None:
    print(f"# {reason}\nimport fused_ce\n{source}\n{OURS[kind]}")


if __name__ == "__main__":
    sys.exit(main())
