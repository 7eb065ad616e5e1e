import subprocess
import sys
from pathlib import Path

import pytest

from cenote.core.memory import freed_blocks_returned, return_holes

STATM = Path("/proc/self/statm")


on_linux = pytest.mark.skipif(not (sys.platform == "linux" and STATM.exists()), reason="reads /proc of Linux")


def resident_pages() -> int:
    return int(STATM.read_text().split()[1])


@on_linux
def test_holes_go_back_to_the_system() -> None:
    blocks = [bytes([1]) * 100_000 for _ in range(1000)]
    full = resident_pages()
    del blocks[::2]
    assert return_holes()
    # 50 MB of 100 were freed, in holes of 24 whole pages
    assert full - resident_pages() > 10_000
    assert len(blocks) == 500


@on_linux
def test_large_blocks_go_back_as_soon_as_they_are_freed() -> None:
    # what glibc keeps follows from all that a process has freed before
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    from_heap, from_system, half = (int(word) for word in done.stdout.split())
    assert from_system < half * 1.1
    assert from_heap > half * 1.5


def left_over(size: int, count: int) -> int:
    """Pages that stay when every second block is freed."""
    before = resident_pages()
    blocks = [bytes([1]) * size for _ in range(count)]
    del blocks[::2]
    return resident_pages() - before


if __name__ == "__main__":
    block, blocks = 5 * 2**20, 20
    # a block of 31 MiB, freed, teaches glibc to take smaller ones from the heap
    bytes(31 * 2**20)
    kept = left_over(block, blocks)
    with freed_blocks_returned():
        returned = left_over(block, blocks)
    print(kept, returned, block * blocks // 2 // 4096)
