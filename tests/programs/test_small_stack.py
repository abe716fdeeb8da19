"""A thread with as little stack as stock's loss can do with: a program may start thousands of them.

In a process of its own, which would end where the stack does.
"""

import pytest
from support.processes import run

PROGRAM = """
import sys, threading, torch, fused_ce
import torch.nn.functional as F

# Rows beside one another, turned over and as they lie; by themselves; and few that threads share.
SHAPES = (64, 10), (75, 3, 8, 8), (2, 5, 40, 40), (8, 1000), (1, 300_000)
DTYPES = torch.float32, torch.float64, torch.bfloat16
MODES = {}, {"grad_in_forward": False}, {"inplace": True}

def calls(loss, modes):
    results = []
    for shape in SHAPES:
        for dtype in DTYPES:
            torch.manual_seed(0)
            logits, probabilities = torch.randn(2, *shape).to(dtype)
            probabilities = probabilities.softmax(1).requires_grad_()
            indices = torch.randint(shape[1], shape[:1] + shape[2:])
            for mode in modes:
                for target in indices, probabilities:
                    leaves = [logits.clone().requires_grad_()]
                    leaves += [target] if target.requires_grad else []
                    value = loss(leaves[0], target, **mode)
                    scale = torch.tensor(0.25, dtype=value.dtype)
                    results += [value.detach(), *torch.autograd.grad(value, leaves, scale)]
                    with torch.no_grad():
                        results += [loss(logits, target, reduction="none")]
    return results

torch.set_num_threads(int(sys.argv[1]))
here = calls(fused_ce.cross_entropy, MODES)
there = []
threading.stack_size(64 * 1024)
for loss, modes in (F.cross_entropy, [{}]), (fused_ce.cross_entropy, MODES):
    thread = threading.Thread(target=lambda: there.append(calls(loss, modes)))
    thread.start()
    thread.join()
print(len(here), all(map(torch.equal, here, there[1])))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_with_a_small_stack_gets_the_same_answer(threads):
    # Of five shapes, three types and three modes: three for indices and four for probabilities.
    assert run("-c", PROGRAM, str(threads)).split() == [str(5 * 3 * 3 * 7), "True"]
