import sys
from pathlib import Path

import pytest

from cenote.core.memory import HeldMemory, return_holes

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
def test_what_is_held_beyond_the_first_pieces_goes_back() -> None:
    held = HeldMemory()
    first = [bytes([1]) * 100_000 for _ in range(1000)]
    assert not held.settle()
    held.learning = False
    del first[:900]
    return_holes()
    assert not held.settle()
    more = [bytes([1]) * 100_000 for _ in range(2000)]
    full = resident_pages()
    del more[::2]
    assert held.settle()
    assert full - resident_pages() > 10_000
    # what is in use is more than there was, and no reason to ask again
    assert not held.settle()
    assert (len(first), len(more)) == (100, 1000)
