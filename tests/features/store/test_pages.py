"""Tokens in pages come out as if they had lain in one piece, and the next shard takes the same pages."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.features.store.pages import Collected, Pages

LENGTHS = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5)


def small(dtype: torch.dtype) -> Pages:
    """Seven tokens of width 3 a page, two pages a slab."""
    token = 3 * torch.empty(0, dtype=dtype).element_size()
    return Pages(dim=3, dtype=dtype, page=7 * token, slab=2 * 7 * token)


@given(LENGTHS, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(1, 30), st.randoms())
def test_any_order_gives_the_bytes_of_one_piece(lengths, dtype, scratch_rows, random):  # type: ignore[no-untyped-def]
    pages = small(dtype)
    tokens = Collected(pages, [2, 5])
    items: list[torch.Tensor] = []
    starts: list[int] = []
    count = 0
    for batch in lengths:
        made = [torch.randn(n, 3) for n in batch]
        begin = tokens.reserve(sum(batch))
        for layer, factor in ((2, 1.0), (5, -2.0)):
            where = list(tokens.put(layer, begin, (piece * factor for piece in made)))
            assert torch.equal(
                torch.cat([torch.empty(0, 3), *where]), torch.cat([torch.empty(0, 3), *made]).mul(factor).to(dtype)
            )
        for piece in made:
            starts.append(count)
            count += len(piece)
        items += made
    order = random.sample(range(len(items)), len(items))
    scratch = np.empty((scratch_rows, pages.token), dtype=np.uint8)
    for layer, factor in ((2, 1.0), (5, -2.0)):
        pieces = tokens.in_order(layer, [starts[i] for i in order], [len(items[i]) for i in order], scratch)
        expected = torch.cat([torch.empty(0, 3), *(items[i] * factor for i in order)]).to(dtype)
        assert b"".join(piece.tobytes() for piece in pieces) == expected.view(torch.uint8).numpy().tobytes()


def test_pages_are_used_again() -> None:
    pages = small(torch.float16)
    taken = []
    for _ in range(3):
        tokens = Collected(pages, [0, 1])
        # each piece begins a page
        begins = [tokens.reserve(7) for _ in range(5)]
        x = torch.randn(7, 3)
        taken.append({next(tokens.put(layer, at, [x])).data_ptr() for layer in (0, 1) for at in begins})
        tokens.free()
    assert len(taken[0]) == 10
    assert taken[0] == taken[1] == taken[2]
    assert next(tokens.in_order(0, [], [], np.empty((1, pages.token), dtype=np.uint8))).size == 0


def test_a_token_wider_than_a_page() -> None:
    pages = Pages(dim=2**18, dtype=torch.float32)
    tokens = Collected(pages, [0])
    x = torch.randn(3, 2**18)
    assert torch.equal(torch.cat(list(tokens.put(0, tokens.reserve(3), [x]))), x)
    scratch = np.empty((1, pages.token), dtype=np.uint8)
    assert (
        b"".join(p.tobytes() for p in tokens.in_order(0, [2, 0, 1], [1, 1, 1], scratch))
        == x[[2, 0, 1]].numpy().tobytes()
    )
