"""Guards every CUDA kernel's arithmetic, indexing and barriers, on machines without a GPU.

The kernels run on the simulator and are compared with stock PyTorch in float64. Each case also runs
with its threads and blocks in another order, which must not change a bit, and fails if a byte is
touched that is not the kernel's to touch.
"""

import pytest
import torch
from support.grids import DTYPES, together
from support.kernel_cases import Case, check_backward, check_forward

OFFSETS = ("odd offset", "offset of 2", "offset of 3")

# 1 and 2: degenerate rows; 33: a lane of a warp more than a warp; 255 and 257: around a block's
# threads; 1030: a block to a row.
CASES = [
    *(Case(c, dtype=t) for c in (1, 2, 10, 33, 257, 1030) for t in DTYPES),
    *(Case(130, reduction=r, smoothing=s, weight=w) for r in ("none", "mean", "sum")
      for s in (0.0, 0.1) for w in (False, True)),
    *(Case(c, target=t, smoothing=s, weight=w, reduction=r)
      for c, t in ((7, torch.float32), (1100, torch.float64))
      for s, w, r in ((0.0, False, "mean"), (0.2, True, "none"), (0.0, True, "sum"))),
    *(Case(100, target=t) for t in (torch.int32, torch.int16, torch.uint8)),
    *(Case(19, rows=(2, 6, 7), layout=layout) for layout in
      ("contiguous", "classes last", "every second element", "classes last, gap")),
    Case(40, rows=(3, 5), layout="next token"),
    Case(21, rows=(4,), layout="transposed"),
    Case(12, rows=(2, 1, 3, 2, 2), layout="classes last"),
    # Rows on chip: held by a warp, by 128 and 256 threads, and by clusters of 2, 4 and 8 blocks,
    # from both sides of where one layout gives way to the next; odd, so that most are misaligned.
    *(Case(c, rows=(3,), dtype=torch.bfloat16) for c in (263, 2049, 2063, 8191, 16391)),
    *(Case(c, rows=(2,), dtype=torch.bfloat16) for c in (32777, 50257, 65543, 131072, 131079)),
    Case(262144, rows=(1,), dtype=torch.bfloat16, ignored=False),
    *(Case(c, rows=(3,)) for c in (1025, 4095, 8200, 16384, 32001)),
    *(Case(2000, dtype=t, layout=offset) for t in DTYPES[1:] for offset in OFFSETS),
    *(Case(c, rows=(3,), dtype=t, smoothing=0.1) for c in (300, 5000, 33000) for t in DTYPES[1:]),
    *(Case(1500, smoothing=s, weight=w, reduction=r, offset=1000.0) for s in (0.0, 0.1)
      for w in (False, True) for r in ("none", "sum")),
    Case(1000, rows=(3, 5), layout="next token", dtype=torch.bfloat16),
    Case(1001, rows=(3, 5), layout="next token", dtype=torch.float16),
    Case(999, rows=(3, 5), layout="classes last, gap"),
    # Tiles of short rows: the largest and smallest row of each number of lanes, several tiles, the
    # last of them not full, at every distance from a 16-byte boundary.
    *(Case(c, rows=(300,), dtype=t, smoothing=0.1 * (c % 2)) for c in (8, 9, 16, 17)
      for t in DTYPES[1:]),
    *(Case(c, rows=(40,), dtype=torch.float16, weight=c % 2 == 0) for c in (32, 64, 65, 128, 256)),
    *(Case(13, rows=(150,), dtype=t, layout=offset, smoothing=0.1, weight=offset == "offset of 2")
      for t in DTYPES[1:] for offset in OFFSETS),
    # The same length without clusters, and longer than any cluster holds: read twice, or once where
    # a block to each row keeps the device busy.
    *(Case(c, rows=(3,), dtype=t, clusters=False, smoothing=s) for c in (8200, 16391)
      for t in DTYPES[1:] for s in (0.0, 0.1)),
    Case(262153, rows=(2,), dtype=torch.bfloat16),
    Case(8205, rows=(7,), dtype=torch.float16),
    # Strided classes: kept, and read twice; threads beyond the last row, rows of one block in two
    # images, and every kind of target.
    *(Case(c, rows=(2, 11, 13), dtype=t, smoothing=0.1 * (c % 2)) for c in (2, 21, 32, 33, 70)
      for t in DTYPES),
    *(Case(c, rows=(3, 150), dtype=t, weight=True, reduction=r, smoothing=s) for c in (19, 50)
      for t, r, s in ((torch.float16, "none", 0.2), (torch.float32, "sum", 0.0))),
    *(Case(c, rows=(2, 40), target=t, weight=w, smoothing=0.1 * w, reduction="none")
      for c in (9, 45) for t in (torch.float32, torch.float64) for w in (False, True)),
    Case(300, rows=(70,), layout="transposed", dtype=torch.bfloat16, target=torch.int32),
    # More rows than blocks, and blocks that have none left.
    Case(3, rows=(1500,)), Case(1030, rows=(29,)),
]  # fmt: skip
IDS = list(map(str, CASES))


# With a gradient there are row statistics too.
@together
@pytest.mark.parametrize("mode", ["no grad", "gradient", "in place"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_agrees_with_float64(kernels, case, mode):
    check_forward(kernels, case, mode)


@together
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_backward_agrees_with_float64(kernels, case, in_place):
    check_backward(kernels, case, in_place)
