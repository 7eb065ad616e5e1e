import pytest
import torch

from cenote.core import InputError
from cenote.pool import DenseCRF, search_crf, unary_from_labels, unary_from_probabilities
from cenote.pool.spatial.deeplab.dense_crf import DenseKernel, SeparableKernel, mean_field, pixel_features

H, W, L = 9, 11, 3


def energies(batch: int = 2, classes: int = L, seed: int = 0) -> torch.Tensor:
    p = torch.rand(batch, classes, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return unary_from_probabilities(p.softmax(1))


def photograph(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (batch, 3, H, W), generator=torch.Generator().manual_seed(seed))


def written_out(unary: torch.Tensor, image: torch.Tensor, w: tuple, s: tuple, steps: int) -> torch.Tensor:
    """Mean field of one image, pixel by pixel."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    place = torch.stack([x, y], -1).flatten(0, 1).double()
    colour = image.flatten(1).T.double()
    apart = (place[:, None] - place[None]).square().sum(-1)
    unlike = (colour[:, None] - colour[None]).square().sum(-1)
    total = 0
    for weight, k in zip(
        w,
        (torch.exp(-apart / (2 * s[0] ** 2) - unlike / (2 * s[1] ** 2)), torch.exp(-apart / (2 * s[2] ** 2))),
        strict=True,
    ):
        d = k.sum(1).rsqrt()
        total = total + weight * d[:, None] * k * d
    u = unary.flatten(1).T
    q = (-u).softmax(1)
    for _ in range(steps):
        q = (-u + total @ q).softmax(1)
    return q.T.reshape(unary.shape)


def test_mean_field_written_out() -> None:
    unary, image = energies(), photograph()
    crf = DenseCRF(4.0, 5.0, 60.0, 2.0, 1.5, iterations=4)
    expected = [written_out(u, i, (4.0, 2.0), (5.0, 60.0, 1.5), 4) for u, i in zip(unary, image, strict=True)]
    torch.testing.assert_close(crf(unary, image), torch.stack(expected))


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_probabilities_sum_to_one_and_labels_have_no_order(method: str) -> None:
    unary, image = energies(), photograph()
    crf = DenseCRF(5.0, 6.0, 30.0, 3.0, 2.0, method=method)
    q = crf(unary, image)
    torch.testing.assert_close(q.sum(1), torch.ones(2, H, W, dtype=q.dtype))
    torch.testing.assert_close(crf(unary.flip(1), image), q.flip(1))


def test_no_step_and_no_weight_leave_the_softmax() -> None:
    unary, image = energies(), photograph()
    torch.testing.assert_close(DenseCRF(iterations=0)(unary, image), (-unary).softmax(1))
    torch.testing.assert_close(DenseCRF(0.0, smoothness_weight=0.0)(unary, image), (-unary).softmax(1))


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_what_says_nothing_stays_so(method: str) -> None:
    crf, image = DenseCRF(method=method), photograph()
    q = crf(torch.full((2, L, H, W), 0.7, dtype=torch.float64), image)
    torch.testing.assert_close(q, torch.full_like(q, 1 / L))
    one = crf(energies(classes=1), image)
    torch.testing.assert_close(one, torch.ones_like(one))


def test_on_an_image_of_one_colour_the_appearance_kernel_is_a_gaussian() -> None:
    flat = torch.full((2, 3, H, W), 77)
    both = (DenseCRF(3.0, 2.0, 5.0, 0.0, method="exact"), DenseCRF(0.0, 2.0, 5.0, 3.0, 2.0))
    torch.testing.assert_close(*(crf(energies(), flat) for crf in both))


def test_separable_is_the_gaussian_of_positions_with_a_sigma_per_axis() -> None:
    values = energies(1).flatten(2)[0].T
    features = pixel_features(H, W, (2.0, 3.0)).double()
    torch.testing.assert_close(SeparableKernel(H, W, (2.0, 3.0), values)(values), DenseKernel(features)(values))


def test_a_kernel_made_block_by_block_is_the_kept_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, values = pixel_features(H, W, (2.0, 2.0)).double(), energies(1).flatten(2)[0].T
    kept = DenseKernel(features)(values)
    monkeypatch.setattr("cenote.pool.spatial.deeplab.dense_crf.EXACT_PIXELS", 32)
    assert DenseKernel(features).kept is None
    torch.testing.assert_close(DenseKernel(features)(values), kept)


def test_lattice_names_nearly_the_same_labels() -> None:
    blocks = torch.zeros(1, 3, 24, 24)
    blocks[..., 12:] = 200.0
    truth = (blocks[:, 0] > 0).long()
    noise = torch.rand(1, 2, 24, 24, generator=torch.Generator().manual_seed(0))
    unary = unary_from_probabilities((torch.stack([1 - truth, truth], 1) + 2 * noise).softmax(1))
    exact, lattice = (DenseCRF(method=m)(unary, blocks).argmax(1) for m in ("exact", "lattice"))
    assert (exact == lattice).double().mean() > 0.98
    before = (unary.argmin(1) == truth).double().mean()
    assert (exact == truth).double().mean() > before + 0.1


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", "none"])
def test_normalizations(normalization: str) -> None:
    f, unary = pixel_features(2, 3, (1.0, 1.0)).double(), energies()[0].flatten(1).T[:6]
    k = torch.exp(-torch.cdist(f, f).square() / 2)
    d = k.sum(1)
    whole = {
        "symmetric": d.rsqrt()[:, None] * k * d.rsqrt(),
        "before": k / d,
        "after": k / d[:, None],
        "none": k,
    }[normalization]
    expected = (-unary + 2.0 * whole @ (-unary).softmax(1)).softmax(1)
    torch.testing.assert_close(mean_field(unary, [(2.0, DenseKernel(f))], 1, normalization), expected)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gradients_reach_the_energies(method: str) -> None:
    crf = DenseCRF(3.0, 2.0, 40.0, 1.0, 1.0, iterations=2, method=method)
    unary, image = energies(1)[..., :3, :4].clone().requires_grad_(), photograph(1)[..., :3, :4]
    assert torch.autograd.gradcheck(lambda u: crf(u, image), (unary,), fast_mode=True)


def test_batch_mates_do_not_matter_and_half_precision_is_close() -> None:
    unary, image, crf = energies(), photograph(), DenseCRF(method="exact")
    torch.testing.assert_close(
        torch.cat([crf(unary[i : i + 1], image[i : i + 1]) for i in range(2)]), crf(unary, image)
    )
    # rounded energies can tip a pixel over; computing with them must not add to that
    rounded = unary.bfloat16()
    half = crf(rounded, image)
    assert half.dtype == torch.bfloat16
    assert (half.double() - crf(rounded.double(), image)).abs().max() < 0.01


def test_refine_moves_a_heat_map_to_the_edge_of_the_image() -> None:
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6:] = 255.0
    heat = torch.linspace(0, 1, 12).expand(1, 12, 12).clone()
    # blurred and one column too far to the left
    heat[..., 5] = 0.6
    on = DenseCRF(6.0, 20.0, 10.0, 0.0).refine(heat, image)
    assert on.shape == heat.shape
    assert (on[..., :6] < 0.5).all()
    assert (on[..., 6:] > 0.5).all()


def test_hard_labels_have_the_confidence_given_and_unknown_ones_none() -> None:
    labels = torch.tensor([[[0, 2, 255, -1]]])
    p = (-unary_from_labels(labels, 3, 0.8)).exp()
    torch.testing.assert_close(p[0, :, 0, 0], torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(p[0, :, 0, 1], torch.tensor([0.1, 0.1, 0.8]))
    torch.testing.assert_close(p[0, :, 0, 2:], torch.full((3, 2), 1 / 3))


def test_search_takes_what_scores_best() -> None:
    truth = torch.zeros(1, 12, 12, dtype=torch.long)
    truth[..., 6:] = 1
    image = 200.0 * truth.unsqueeze(1).expand(-1, 3, -1, -1)
    noise = torch.rand(1, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    unary = unary_from_probabilities((torch.stack([1 - truth, truth], 1) + 2 * noise).softmax(1))
    found = search_crf(unary, image, truth, (0.1, 6.0), (1.0, 20.0), (5.0,), iterations=3)
    assert len(found.tried) == 4
    assert found.tried[6.0, 20.0, 5.0] == found.score > found.tried[0.1, 1.0, 5.0]
    assert found.crf.appearance_weight == 6.0
    assert found.crf.iterations == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"position_sigma": 0.0}, "position_sigma"),
        ({"smoothness_sigma": (1.0, -1.0)}, "smoothness_sigma"),
        ({"iterations": -1}, "iterations"),
        ({"method": "fast"}, "method"),
        ({"normalization": "sum"}, "normalization"),
    ],
)
def test_wrong_arguments_are_named(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        DenseCRF(**options)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(InputError, match="unary"):
        DenseCRF()(energies()[0], photograph())
    with pytest.raises(InputError, match="image"):
        DenseCRF()(energies(), photograph()[..., 1:])
    with pytest.raises(InputError, match="confidence"):
        unary_from_labels(torch.zeros(1, 2, 2).long(), 3, 1.0)
    with pytest.raises(InputError, match="labels"):
        search_crf(energies(), photograph(), torch.full((2, H, W), 255))
