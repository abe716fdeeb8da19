"""Every size as if it were large, which a test has to ask for."""

import pytest

from fused_ce import huge_pages


@pytest.fixture
def all_is_large(monkeypatch):
    """Small tensors take the way of those of 32 MiB, and their memory is counted."""
    taken = []
    fresh = huge_pages.fresh

    def counted(*arguments):
        taken.append(arguments[0])
        return fresh(*arguments)

    monkeypatch.setattr(huge_pages, "LEAST_BYTES", 0)
    monkeypatch.setattr(huge_pages, "fresh", counted)
    return taken
