import itertools

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cenote.core import InputError
from cenote.pool import effective_receptive_field, receptive_extent, recommend_rates, sweep_rates, valid_taps
from cenote.pool.spatial.atrous_rates import best_with_ties, receptive_peaks, star_share


def ones(rate: int, channels: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, 1, 3, padding=rate, dilation=rate, bias=False)
    nn.init.ones_(conv.weight)
    return conv


@pytest.mark.parametrize("rate", [1, 2, 4, 7, 8, 9, 15, 16, 20])
@pytest.mark.parametrize("size", [(16, 16), (9, 16)])
def test_valid_taps_are_those_of_a_convolution_of_ones(size: tuple[int, int], rate: int) -> None:
    counted = F.conv2d(torch.ones(1, 1, *size), torch.ones(1, 1, 3, 3), padding=rate, dilation=rate)
    taps, whole, alone = valid_taps(size, rate)
    assert taps == pytest.approx(float(counted.mean()) / 9)
    assert whole == pytest.approx(float((counted == 9).double().mean()))
    assert alone == pytest.approx(float((counted == 1).double().mean()))


def test_rates_of_the_papers() -> None:
    assert recommend_rates(513, 16) == (6, 12, 18)
    assert recommend_rates(512, 8) == recommend_rates(1024, 16) == (12, 23, 35)
    assert recommend_rates(128, 8) == (3, 6, 9)
    assert recommend_rates((128, 512), 8) == ((3, 12), (6, 23), (9, 35))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 500), st.sampled_from([1, 4, 8, 16]), st.integers(1, 6))
def test_rates_rise_with_the_input_and_differ(size: int, more: int, stride: int, branches: int) -> None:
    rates, larger = recommend_rates(size, stride, branches), recommend_rates(size + more, stride, branches)
    assert len(rates) == branches
    assert min(rates) >= 1
    assert all(a < b for a, b in itertools.pairwise(rates))
    assert all(a <= b for a, b in zip(rates, larger, strict=True))


@pytest.mark.parametrize("size", [97, 100, 127, 128, 129, 513])
def test_sizes_round_as_a_striding_network_does(size: int) -> None:
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3, 2, 1) for _ in range(4)))
    side = net(torch.zeros(1, 1, size, size)).shape[-1]
    assert recommend_rates(size, 16) == recommend_rates(side, 1)
    assert sweep_rates(lambda _rates: 0.0, size, 16, (1,)).reach == (3 / side,)


def test_more_coverage_means_larger_rates() -> None:
    assert recommend_rates(513, 16, coverage=0.75)[-1] == 25 > recommend_rates(513, 16, coverage=0.5)[-1] == 16


def test_a_sweep_keeps_every_score() -> None:
    seen = []

    def score(rates: tuple[int, ...]) -> float:
        seen.append(rates)
        return -abs(rates[0] - 4)

    sweep = sweep_rates(score, 256, 16, multipliers=(2, 4, 6))
    assert seen == list(sweep.rates) == [(2, 4, 6), (4, 8, 12), (6, 12, 18)]
    assert sweep.best == (4, 8, 12)
    assert sweep.reach == (6 / 16, 12 / 16, 18 / 16)
    assert sweep.scores == (-2, 0, -2)
    assert sweep.rule == recommend_rates(256, 16) == (3, 6, 9)
    assert sweep.rule_reach == 9 / 16
    assert sweep.inside[0] == pytest.approx(sum(valid_taps(16, r).taps for r in (2, 4, 6)) / 3)


def test_another_size_of_test_is_flagged_with_its_taps() -> None:
    with pytest.warns(UserWarning, match=r"test_size: at 128 pixels 31% .* at 256 57%"):
        sweep = sweep_rates(lambda rates: -rates[0], 256, 16, multipliers=(3, 4), test_size=128)
    assert sweep.inside == tuple(pytest.approx(sum(valid_taps(8, g * i).taps for i in (1, 2, 3)) / 3) for g in (3, 4))
    assert (
        sweep_rates(lambda _rates: 0.0, 256, 16, (3,), test_size=256).inside
        == sweep_rates(lambda _rates: 0.0, 256, 16, (3,)).inside
    )


def test_the_best_and_what_ties_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    scores = torch.tensor([0.0, 4.9, 5.0, 3.0]) + 0.3 * noise
    best, tied = best_with_ties(scores)
    assert best == int(scores.mean(0).argmax())
    expected = [
        g
        for g in range(4)
        if g == best or scipy.stats.ttest_rel(scores[:, best].numpy(), scores[:, g].numpy()).pvalue >= 0.05
    ]
    assert list(tied) == expected
    assert tied == (1, 2)
    # what is behind by the same amount in every seed is behind
    assert best_with_ties(torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)).tied == (1,)


@pytest.mark.parametrize("rate", [1, 3, 5])
def test_one_atrous_filter_shows_nine_spots(rate: int) -> None:
    field = effective_receptive_field(ones(rate, 2), torch.randn(3, 2, 17, 15))
    expected = torch.zeros(17, 15)
    for i in (-rate, 0, rate):
        for j in (-rate, 0, rate):
            expected[8 + i, 7 + j] = 1
    torch.testing.assert_close(field, expected)
    assert receptive_extent(field, share=1.0) == rate


@pytest.mark.parametrize("stride", [1, 2])
def test_the_star_of_a_pyramid_and_its_peaks(stride: int) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([ones(3), ones(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x[..., ::stride, ::stride]
            return sum(branch(x) for branch in self.branches)

    side = 16 * stride + 1
    field = effective_receptive_field(Pyramid(), torch.randn(1, 1, side, side))
    middle = side // 2
    around = {
        (middle + i * r * stride, middle + j * r * stride) for r in (3, 6) for i in (-1, 0, 1) for j in (-1, 0, 1)
    }
    assert set(receptive_peaks(field)) == around
    assert receptive_peaks(field)[0] == (middle, middle)
    assert receptive_peaks(field, least=0.9) == [(middle, middle)]
    assert star_share(field, (3, 6), stride) == 1
    # both branches look at the middle, each at eight other cells
    assert star_share(field, (6,), stride) == pytest.approx(10 / 18)
    assert star_share(torch.zeros(5, 5), (1,)) == 0


def test_the_identity_looks_at_itself() -> None:
    field = effective_receptive_field(nn.Identity(), torch.randn(2, 3, 9, 9), position=(2, 5))
    assert field.nonzero().tolist() == [[2, 5]]
    assert receptive_extent(field, (2, 5)) == 0


def test_a_deep_net_stays_inside_of_its_theoretical_field() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU())
    images = torch.randn(4, 3, 21, 21)
    field = effective_receptive_field(net, images, batch=3)
    assert (field >= 0).all()
    assert field.max() == 1
    rows, columns = field.nonzero().T
    assert int((rows - 10).abs().max()) <= 3
    assert int((columns - 10).abs().max()) <= 3
    by_hand = []
    for image in images:
        x = image.unsqueeze(0).requires_grad_()
        by_hand.append(torch.autograd.grad(net(x)[0, :, 10, 10].sum(), x)[0].abs().sum((0, 1)))
    mean = torch.stack(by_hand).mean(0)
    torch.testing.assert_close(field, mean / mean.max())


def test_the_net_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        first, second = (effective_receptive_field(net, torch.ones(2, 3, 7, 7)) for _ in range(2))
    assert torch.equal(first, second)
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_an_output_that_depends_on_nothing() -> None:
    field = effective_receptive_field(lambda x: torch.zeros(len(x), 2, 3, 3), torch.randn(2, 3, 7, 7))
    assert field.tolist() == torch.zeros(7, 7).tolist()
    assert receptive_extent(field) == 0


def test_half_of_the_mass_lies_nearer() -> None:
    field = torch.zeros(11, 21)
    field[5, 10], field[5, 12], field[5, 18] = 2.0, 1.0, 1.0
    assert [receptive_extent(field, share=s) for s in (0.5, 0.75, 1.0)] == [0, 2, 8]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: valid_taps(0, 1), "size"),
        (lambda: valid_taps(4, (1, 2, 3)), "rate"),
        (lambda: recommend_rates(0), "input_size"),
        (lambda: recommend_rates(64, 0), "output_stride"),
        (lambda: recommend_rates(64, branches=0), "branches"),
        (lambda: recommend_rates(64, coverage=0.0), "coverage"),
        (lambda: sweep_rates(lambda r: 0.0, 64, multipliers=()), "multipliers"),
        (lambda: effective_receptive_field(nn.Identity(), torch.zeros(3, 4, 4)), "images"),
        (lambda: effective_receptive_field(nn.Flatten(), torch.zeros(1, 3, 4, 4)), "model"),
        (lambda: effective_receptive_field(nn.Identity(), torch.zeros(1, 3, 4, 4), (4, 0)), "position"),
        (lambda: receptive_extent(torch.zeros(3, 3), share=0.0), "share"),
        (lambda: receptive_peaks(torch.zeros(3, 3), least=0.0), "least"),
        (lambda: star_share(torch.zeros(3, 3), ()), "rates"),
        (lambda: best_with_ties(torch.zeros(1, 3)), "scores"),
    ],
)
def test_wrong_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()
