"""Memory that was freed goes back to the system, whatever small blocks lie between."""

import sys
from pathlib import Path

import pytest
import torch

from soppu.compress import heap

BLOCKS, SIZE = 800, 1 << 16  # bytes: below what is ever a mapping of its own


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident size is read from /proc")
def test_freed_memory_between_small_blocks_that_stay_is_given_back():
    heap.trim()
    large, small = [], []
    for _ in range(BLOCKS):
        large.append(torch.ones(SIZE // 4))
        small.append(torch.ones(16))
    held = resident()
    large.clear()
    heap.trim()
    assert held - resident() > 0.8 * BLOCKS * SIZE
    assert all(float(one.sum()) == 16 for one in small)


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096.0
