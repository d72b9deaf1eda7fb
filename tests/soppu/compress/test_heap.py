"""Memory that was freed goes back to the system, whatever small blocks lie between."""

import subprocess
import sys

import pytest

# a process of its own: what a long test run has freed before would be used first, and fill the holes
_MEASURE = """
from pathlib import Path
import torch
from soppu.compress.fleet import heap

BLOCKS, SIZE = 800, 1 << 16  # bytes: below what is ever a mapping of its own


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


large, small = [], []
for _ in range(BLOCKS):
    large.append(torch.ones(SIZE // 4))
    small.append(torch.ones(16))
held = resident()
large.clear()
heap.trim()
assert all(float(one.sum()) == 16 for one in small)
print((held - resident()) / (BLOCKS * SIZE))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident size is read from /proc")
def test_freed_memory_between_small_blocks_that_stay_is_given_back():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.8
