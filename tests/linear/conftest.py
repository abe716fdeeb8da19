"""The heads' tests meet the same steps on every processor: bfloat16 is computed in itself.

Where oneDNN does not take it that is slow, and the library computes it in float32, which has fewer
steps. Tests that are about this say so.
"""

import pytest


@pytest.fixture(autouse=True)
def as_on_other_processors(bfloat16_in_itself):
    pass
