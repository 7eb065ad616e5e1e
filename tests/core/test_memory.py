import sys
from pathlib import Path

import pytest

from cenote.core.memory import return_holes

STATM = Path("/proc/self/statm")


def resident_pages() -> int:
    return int(STATM.read_text().split()[1])


@pytest.mark.skipif(not (sys.platform == "linux" and STATM.exists()), reason="reads /proc of Linux")
def test_holes_go_back_to_the_system() -> None:
    blocks = [bytes([1]) * 100_000 for _ in range(1000)]
    full = resident_pages()
    del blocks[::2]
    assert return_holes()
    # 50 MB of 100 were freed, in holes of 24 whole pages
    assert full - resident_pages() > 10_000
    assert len(blocks) == 500
