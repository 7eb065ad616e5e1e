import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from cenote.core.seeded import seeded


def test_threads_draw_the_same_and_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    at_once = threading.Barrier(4)

    def draw(_: int) -> list[float]:
        at_once.wait()
        with seeded(7):
            return [float(torch.rand(())) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(draw, range(4))
    assert all(other == first for other in others)
    assert torch.equal(torch.get_rng_state(), before)
