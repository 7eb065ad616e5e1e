import torch

from cenote.core import routing

GENERATOR = torch.Generator().manual_seed(0)
K = torch.randn(2, 3, 10, 4, generator=GENERATOR)
PAGES = torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 1, 2, 2]], [[-1, -1, -1, 0, 0, 0, 0, 1, 1, 1]]])


def test_what_stands_for_a_page_is_made_of_its_keys_alone() -> None:
    means = routing.page_means(K, PAGES, 4)
    low, high = routing.page_bounds(K, PAGES, 4)
    for item in range(2):
        for page in range(4):
            inside = K[item][:, PAGES[item, 0] == page]
            if inside.shape[1]:
                torch.testing.assert_close(means[item, :, page], inside.mean(1))
                assert torch.equal(low[item, :, page], inside.amin(1))
                assert torch.equal(high[item, :, page], inside.amax(1))
            else:
                assert not any(x[item, :, page].any() for x in (means, low, high))


def test_no_key_of_a_page_is_above_its_bound_and_one_can_reach_it() -> None:
    q = torch.randn(2, 6, 2, 4, generator=GENERATOR)
    low, high = routing.page_bounds(K, PAGES, 3)
    bounds = routing.bounded(q, low, high)
    products = q @ K.repeat_interleave(2, 1).mT
    for item in range(2):
        for page in range(3):
            inside = products[item][..., PAGES[item, 0] == page]
            if inside.numel():
                assert (inside <= bounds[item, ..., page, None] + 1e-5).all()
    torch.testing.assert_close(routing.bounded(q, K, K), products)


def test_the_best_are_so_many_and_the_first_of_equal_ones() -> None:
    scores = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 3.0], [0.0, -torch.inf, 0.0, -torch.inf, -torch.inf]]])
    assert routing.best(scores, 3).tolist() == [[[True, True, False, False, True], [True, False, True, False, False]]]
    real = torch.tensor([[[True, False, True, True, False]]])
    assert routing.best(scores, 2, real)[0, 0].tolist() == [True, False, True, False, False]
    assert routing.best(scores, 9)[0, 1].tolist() == [True, False, True, False, False]
    assert not routing.best(scores, 0).any()


def test_chosen_keys_are_packed_and_counted_once_for_a_group() -> None:
    chosen = torch.rand(2, 6, 10, generator=GENERATOR) < 0.4
    chosen[0, 3] = False
    numbers, valid = routing.packed(chosen)
    for item in range(2):
        for head in range(6):
            assert numbers[item, head][valid[item, head]].tolist() == chosen[item, head].nonzero()[:, 0].tolist()
    counts = routing.counted(numbers, valid, 3, 10)
    assert counts.tolist() == routing.union(chosen, 3).sum(-1).tolist()
    assert routing.packed(torch.zeros(1, 2, 3, dtype=torch.bool))[0].shape == (1, 2, 0)


def test_the_best_by_their_numbers_are_the_best() -> None:
    for scores in (torch.randn(2, 3, 9, generator=GENERATOR), torch.randint(3, (2, 3, 9), generator=GENERATOR).float()):
        for count in (0, 1, 4, 8, 9, 20):
            for real in (None, torch.rand(2, 1, 9, generator=GENERATOR) < 0.5):
                numbers, valid = routing.best_numbers(scores, count, real)
                expected, there = routing.packed(routing.best(scores, count, real))
                assert torch.equal(valid, there)
                assert torch.equal(numbers[valid], expected[there])


def test_pages_spread_to_their_keys_and_never_to_padding() -> None:
    chosen = torch.tensor([[[True, False, True]], [[True, False, False]]])
    found = routing.spread(chosen, PAGES)
    assert found[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 8, 9]
    assert found[1, 0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


def test_one_number_for_a_group() -> None:
    x = torch.tensor([[[1.0], [4.0], [2.0], [2.0]]])
    assert routing.over_group(x, 2).flatten().tolist() == [4.0, 2.0]
    assert routing.over_group(x, 2, "sum").flatten().tolist() == [5.0, 4.0]
    assert routing.over_group(x, 2, "mean").flatten().tolist() == [2.5, 2.0]
