from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import Concepts, Craft, sobol_masks, split_at, total_indices
from cenote.explain.craft import orders
from cenote.explain.craft.craft import crops_of
from cenote.explain.craft.dictionary import (
    coefficient_gradient,
    coefficients,
    dictionary,
    high,
    joint_gradient,
    matched,
)
from tests.models.live import zoo


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cnn(channels: int = 8, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes),
    )  # fmt: skip
    return layers.eval()


def fitted(concepts: int = 3, images: Tensor | None = None, **options: object) -> Concepts:
    images = drawn(8, 3, 16, 16) if images is None else images
    return Craft(*split_at(cnn(), "3", images), concepts=concepts, patch=8, **options).fit(images)


def planted(rows: int = 400, concepts: int = 5, width: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations made of known directions, each mostly on channels of its own."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.rand(concepts, width, generator=generator)
    for k in range(concepts):
        w[k, k * (width // concepts) : (k + 1) * (width // concepts)] += 1
    u = torch.rand(rows, concepts, generator=generator) * (torch.rand(rows, concepts, generator=generator) < 0.4)
    return u @ w, u, w


def test_crops_go_row_by_row() -> None:
    images = torch.arange(2 * 36.0).view(2, 1, 6, 6)
    found = crops_of(images, 3)
    assert found.shape == (8, 1, 3, 3)
    assert torch.equal(found[1], images[0, :, :3, 2:5])
    assert torch.equal(found[2], images[0, :, 2:5, :3])
    assert torch.equal(found[4], images[1, :, :3, :3])


@pytest.mark.parametrize("sampler", ["halton", "sobol", "latin hypercube"])
def test_the_design_is_that_of_scipy(sampler: str) -> None:
    from scipy.stats import qmc

    masks = sobol_masks(3, 16, sampler).view(5, 16, 3)
    engine = {
        "halton": lambda: qmc.Halton(6, scramble=False),
        "sobol": lambda: qmc.Sobol(6, scramble=False),
        "latin hypercube": lambda: qmc.LatinHypercube(6, rng=0),
    }[sampler]()
    both = torch.as_tensor(engine.random(16)).float()
    assert torch.equal(torch.cat([masks[0], masks[1]], 1), both)
    for i in range(3):
        assert torch.equal(masks[2 + i, :, i], masks[1, :, i])
        others = [j for j in range(3) if j != i]
        assert torch.equal(masks[2 + i][:, others], masks[0][:, others])


@pytest.mark.parametrize("estimator", ["jansen", "homma", "janon", "glen", "saltelli"])
def test_indices_of_a_sum_are_the_shares_of_squares(estimator: str) -> None:
    weights = torch.tensor([3.0, 2.0, 1.0, 0.0])
    masks = sobol_masks(4, 4096)
    found = total_indices(masks @ weights, 4, estimator)
    assert torch.allclose(found, weights**2 / (weights**2).sum(), atol=0.02)


def test_an_unused_concept_has_exactly_nothing_and_a_constant_gives_zeros() -> None:
    masks = sobol_masks(3, 32)
    found = total_indices(masks[:, 0] * masks[:, 2], 3)
    assert found[1] == 0
    assert bool((found[[0, 2]] > 0).all())
    assert not total_indices(torch.full((160,), 0.7), 3).any()


def test_one_concept_has_all_of_the_variance() -> None:
    assert total_indices(sobol_masks(1, 4096)[:, 0] ** 2, 1).item() == pytest.approx(1, abs=0.02)


def test_coefficients_are_those_of_scipy() -> None:
    from scipy.optimize import nnls

    w, a = drawn(4, 10), drawn(20, 10, seed=1)
    expected = np.stack([nnls(w.double().numpy().T, row)[0] for row in a.double().numpy()])
    found = coefficients(a, w)
    assert torch.allclose(found, torch.as_tensor(expected).float(), atol=1e-6)
    assert bool((found == 0).any())


def test_directions_have_one_hot_coefficients() -> None:
    w = drawn(4, 10)
    assert torch.allclose(coefficients(w, w), torch.eye(4), atol=1e-6)


def test_planted_directions_are_recovered() -> None:
    a, _, w = planted()
    _, found = dictionary(a, 5)
    assert float(matched(found, w).min()) > 0.95
    drawn_rows = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(3))[:5]]
    assert float(matched(drawn_rows, w).min()) < 0.95


def test_only_concepts_that_the_model_uses_have_an_index() -> None:
    a, _, w = planted()
    reader = torch.linalg.pinv(w).T[[0, 3]].sum(0)
    _, directions = dictionary(a, 5)
    concepts = Concepts(
        torch.zeros(1, 1, 1, 1), torch.zeros(1, 5), directions, 1, None, lambda x: (x @ reader).relu()[:, None]
    )
    found = concepts.importance(a[:40], 0, 64, given="activations").mean(0)
    order = torch.nn.functional.cosine_similarity(w[:, None], directions[None], dim=-1).argmax(1)
    assert bool((found[order[[0, 3]]] > 0.1).all())
    assert bool((found[order[[1, 2, 4]]] < 0.1).all())


@pytest.mark.parametrize("factoring", ["nmf", "k-means", "pca"])
def test_other_dictionaries(factoring: str) -> None:
    a, _, _ = planted(60)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    u, w = dictionary(a, 5, factoring)
    assert u.shape == (60, 5)
    assert w.shape == (5, 24)
    assert torch.equal(u, dictionary(a, 5, factoring)[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert bool((before[1] == np.random.get_state()[1]).all())
    if factoring == "k-means":
        assert torch.equal(u.sum(1), torch.ones(60))


def test_the_gradient_of_coefficients_is_that_of_finite_differences() -> None:
    w, a = drawn(4, 10).double(), drawn(6, 10, seed=1).double()
    u = coefficients(a, w)
    assert float(u[u > 0].min()) > 1e-3
    steps = 1e-5 * torch.eye(10, dtype=torch.float64)
    slopes = (coefficients(a + steps[:, None], w) - coefficients(a - steps[:, None], w)) / 2e-5
    for concept in range(4):
        assert torch.allclose(coefficient_gradient(u, w, concept), slopes[..., concept].T, atol=1e-4)


def test_the_joint_gradient_is_that_of_factoring_again() -> None:
    u, w = (drawn(6, 2, seed=1).double() + 0.2), (drawn(2, 5, seed=2).double() + 0.2)
    a = u @ w + 0.05 * drawn(6, 5, seed=3).double()

    def factored(a: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Alternating least squares, which stay above zero here."""
        for _ in range(1000):
            u = torch.linalg.solve(w @ w.T, w @ a.T).T
            w = torch.linalg.solve(u.T @ u, u.T @ a)
        return u, w

    u, w = factored(a, u, w)
    assert float(u.min()) > 0
    assert float(w.min()) > 0
    # weights of U that no change of basis, U M and M^-1 W, can change
    towards = drawn(6, 2, seed=4).double()
    towards = towards - u @ torch.linalg.solve(u.T @ u, u.T @ towards)
    found = joint_gradient(a, u, w, towards)
    for row, column in [(0, 0), (2, 3), (5, 4)]:
        step = torch.zeros_like(a)
        step[row, column] = 1e-5
        up, down = factored(a + step, u, w)[0], factored(a - step, u, w)[0]
        assert float(found[row, column]) == pytest.approx(float((towards * (up - down)).sum()) / 2e-5, abs=1e-4)


def test_a_whole_model_gives_concepts_maps_and_importances() -> None:
    images = drawn(8, 3, 16, 16)
    found = fitted()
    assert found.crops.shape == (32, 3, 8, 8)
    assert bool((found.u >= 0).all())
    assert bool((found.w >= 0).all())
    assert found.transform(images).shape == (8, 16, 16, 3)
    assert torch.equal(found.transform(images), found.transform(cnn()[:4](images).detach(), given="activations"))
    assert found.maps(images).shape == (8, 3, 16, 16)
    importance = found.importance(images, 1, 16)
    assert importance.shape == (8, 3)
    assert bool((importance >= 0).all())
    assert found.best_crops(1, 4).tolist() == found.u[:, 1].sort(descending=True).indices[:4].tolist()
    assert 0 < found.error(images) < 1


def test_importance_asks_only_the_second_half_and_only_by_reconstructions() -> None:
    images, model = drawn(2, 3, 16, 16), cnn()
    calls: list[int] = []

    def h(a: Tensor) -> Tensor:
        calls.append(len(a))
        return model[4:](a)

    found = Craft(model[:4], h, 3, 8, batch_size=16).fit(images)
    activations = model[:4](images).detach()
    calls.clear()
    found.importance(activations, 1, 8, given="activations")
    assert sum(calls) == 2 * 8 * 5
    assert max(calls) <= 16


def test_outputs_that_are_shuffled_say_nothing_of_the_model() -> None:
    a, _, w = planted(60)
    reader = torch.linalg.pinv(w).T[0]
    concepts = Concepts(torch.zeros(1, 1, 1, 1), torch.zeros(1, 5), w, 1, None, lambda x: (x @ reader)[:, None])
    plain = concepts.importance(a[:30], 0, 32, given="activations").mean(0)
    shuffled = concepts.importance(a[:30], 0, 32, given="activations", shuffled=True).mean(0)
    assert plain.argmax() == 0
    assert float(plain[1:].max()) < 0.25
    assert float(shuffled.min()) > 0.5


def test_vectors_have_no_maps() -> None:
    model, images = cnn(), drawn(6, 3, 16, 16)
    found = Craft(nn.Sequential(model[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten()), model[6], 2, 8).fit(images)
    assert found.transform(images).shape == (6, 2)
    assert found.importance(images, 0, 8).shape == (6, 2)
    with pytest.raises(InputError, match="g: gives one vector per image"):
        found.maps(images)


def test_any_layer_of_any_module_splits_it() -> None:
    case = zoo.vision("ViTForImageClassification", num_labels=3)("sdpa")
    path = next(name for name, m in case.model.named_modules() if name.endswith("layernorm"))
    x = case.inputs["pixel_values"]
    g, h = split_at(case.model, path, x)
    assert torch.allclose(h(g(x)), case.model(x).logits, atol=1e-6)
    with pytest.raises(InputError, match="activations: the smallest is -"):
        Craft(lambda images: g(images).mT[..., None], h, 2, 8).fit(x)


def test_a_concept_is_split_by_an_earlier_layer() -> None:
    """Crops of one upper kind are of two lower kinds, which only the earlier layer tells apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(90, 3, 8, 8)
    kind = torch.arange(90) % 3
    light = 0.5 + 0.5 * torch.rand(90, generator=generator)
    images[kind == 0, 0] = light[kind == 0, None, None]
    images[kind == 1, 1] = light[kind == 1, None, None]
    images[kind == 2, 2] = light[kind == 2, None, None]

    def early(x: Tensor) -> Tensor:
        return x

    def late(a: Tensor) -> Tensor:
        return torch.stack([a[:, 0] + a[:, 1], a[:, 2]], 1)

    found = Craft(lambda x: late(early(x)), None, 2, 8).fit(images)
    upper = int(found.w[:, 0].argmax())
    lower = found.split(upper, early, 2, percentile=40)
    assert found.under[upper] is lower
    assert float(matched(lower.w, torch.eye(3)[:2]).min()) > 0.95
    assert high(found.u, upper, 40).sum() == len(lower.u)


def test_a_concept_map_lies_where_the_concept_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AvgPool2d(2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0, :4, :4] = 1
    images[:, 1, 4:, 4:] = 1
    found = Craft(model, None, 2, 4).fit(images)
    first = int(found.w[:, 0].argmax())
    maps = found.attribution_map(images, first, model[:2], model[2])
    assert float(maps[0, :3, :3].mean()) > 10 * float(maps[0, 4:, 4:].abs().mean())


def test_curves_of_deletion_and_insertion_by_hand() -> None:
    w, reader = torch.eye(3), torch.tensor([[1.0], [2.0], [4.0]])
    concepts = Concepts(torch.zeros(1, 1, 1, 1), torch.zeros(1, 3), w, 1, None, lambda a: a @ reader)
    a = torch.ones(1, 3)
    assert concepts.deletion(a, 0, [2, 0, 1], given="activations").tolist() == [[7.0, 3.0, 2.0, 0.0]]
    assert concepts.deletion(a, 0, [2, 0, 1], insertion=True, given="activations").tolist() == [[0.0, 4.0, 5.0, 7.0]]
    assert concepts.error(torch.tensor([[1.0, -1.0, 0.0]]), given="activations") == pytest.approx(0.5)


def test_other_orders() -> None:
    w, reader = torch.eye(3), torch.tensor([[1.0], [-2.0], [0.0]])
    concepts = Concepts(torch.zeros(1, 1, 1, 1), torch.zeros(1, 3), w, 1, None, lambda a: a @ reader)
    a = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]])
    assert orders.mean_coefficients(concepts, a, given="activations").tolist() == [2.0, 1.0, 3.0]
    assert orders.gradients(concepts, a, 0, given="activations").tolist() == [1.0, 2.0, 0.0]
    assert orders.tcav(concepts, a, 0, given="activations").tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(orders.at_random(concepts, 1), orders.at_random(concepts, 1))


def test_concepts_are_saved_and_loaded_without_their_model(tmp_path: Path) -> None:
    found, images = fitted(), drawn(2, 3, 16, 16)
    found.save(tmp_path / "concepts.safetensors")
    alone = Concepts.load(tmp_path / "concepts.safetensors")
    assert torch.equal(alone.w, found.w)
    with pytest.raises(InputError, match="g: these concepts were loaded without their model"):
        alone.transform(images)
    again = Concepts.load(tmp_path / "concepts.safetensors", found.g, found.h)
    assert torch.equal(again.importance(images, 0, 8), found.importance(images, 0, 8))
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no concepts"):
        Concepts.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitted(images=drawn(2, 3, 16, 12)), "images: expected square ones, got"),
        (lambda: crops_of(drawn(1, 3, 8, 8), 9), "patch: expected 1 to 8 pixels"),
        (lambda: dictionary(torch.randn(20, 4), 2), "activations: the smallest is"),
        (lambda: dictionary(drawn(3, 4), 5), "concepts: 5 of 3 items"),
        (lambda: sobol_masks(2, 12, "sobol"), "points: a Sobol sequence has a power of 2, got 12"),
        (lambda: total_indices(torch.rand(9), 2), r"outputs: expected N \* 4"),
        (lambda: fitted().importance(drawn(1, 3, 16, 16), 9, 8), "target: expected a class"),
        (lambda: fitted().deletion(drawn(1, 3, 16, 16), 0, [0, 1]), "order: expected each of 3 concepts once"),
        (lambda: split_at(cnn().train(), "3", drawn(1, 3, 8, 8)), "model: expected one in eval mode"),
        (lambda: coefficients(drawn(2, 3), drawn(2, 4)), "activations: expected 4 channels"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
