"""The largest number that fits, where to see that one does takes long and that one does not is
soon over."""

from collections.abc import Callable


def largest_that_fits(fits: Callable[[int], bool], guess: int) -> int:
    """Of what fits up to some number and not beyond; 0 where 1 does not. It begins above the guess,
    since what fits takes a whole step to show it."""
    low, high, stride = 0, max(guess, 0) + 1, 1
    if fits(high):
        low = high
        while fits(low + stride):
            low, stride = low + stride, 2 * stride
        high = low + stride
    else:
        while low < high - stride:
            if fits(high - stride):
                low = high - stride
                break
            high, stride = high - stride, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
