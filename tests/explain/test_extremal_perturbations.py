from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import ExtremalPerturbation, extremal_channels
from cenote.explain.extremal_perturbations import pointing, rivals
from cenote.explain.extremal_perturbations.explainers import inverted
from cenote.explain.extremal_perturbations.masks import Pyramid, SmoothMask, gaussian_blur, ranked_area
from cenote.explain.extremal_perturbations.optimise import extremal_masks, reward
from cenote.explain.images import class_scores
from cenote.testing import check_explainer
from tests.models.live import zoo

FAST = {"iterations": 6, "step": 4, "sigma": 4}


def cnn(channels: int = 4, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes),
    )  # fmt: skip
    return layers.eval()


def images(count: int = 2, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def corner(rows: slice, columns: slice) -> Callable[[Tensor], Tensor]:
    """Class 1 is the light in one region."""
    return lambda x: torch.stack([-x[:, :, rows, columns].mean((1, 2, 3)), x[:, :, rows, columns].mean((1, 2, 3))], 1)


@pytest.mark.parametrize("perturbing", ["blur", "fade"])
def test_a_mask_of_ones_is_the_image_and_one_of_zeros_nothing_of_it(perturbing: str) -> None:
    image = images(1)[0]
    pyramid = Pyramid(image, perturbing)
    ones = torch.ones(1, 1, 12, 16)
    assert torch.equal(pyramid(ones)[0], image)
    assert torch.equal(pyramid(0 * ones)[0], gaussian_blur(image, 20.0) if perturbing == "blur" else 0 * image)


def test_the_pyramid_is_linear_between_levels() -> None:
    pyramid = Pyramid(images(1)[0])
    masks = torch.tensor([2.0, 2.25, 3.0]).view(3, 1, 1, 1).expand(3, 1, 12, 16) / 7
    low, between, high = pyramid(masks)
    assert torch.allclose(between, 0.75 * low + 0.25 * high, atol=1e-6)


def test_no_parameters_give_no_mask_and_all_of_them_a_mask_near_one() -> None:
    masks = SmoothMask(21, 28, step=7, sigma=7)
    full, inside = masks(torch.zeros(1, 1, *masks.grid))
    assert not full.any()
    assert not inside.any()
    _, inside = masks(torch.ones(1, 1, *masks.grid))
    assert inside.shape == (1, 1, 21, 28)
    assert float(inside[..., 7:14, 7:21].min()) > 0.85
    assert float(inside.max()) <= 1


def test_parameters_moved_by_a_cell_move_the_mask_by_a_step() -> None:
    masks = SmoothMask(40, 40, step=4, sigma=4)
    here = torch.zeros(1, 1, *masks.grid)
    here[..., 4, 5] = 1
    moved = here.roll((1, -2), (2, 3))
    assert torch.allclose(masks(here)[0].roll((4, -8), (2, 3)), masks(moved)[0], atol=1e-6)


@pytest.mark.parametrize("size", [(13, 17), (15, 22), (7, 30)])
def test_images_that_no_step_divides_have_masks_of_their_size(size: tuple[int, int]) -> None:
    masks = SmoothMask(*size, step=7, sigma=14)
    _, inside = masks(torch.rand(2, 1, *masks.grid))
    assert inside.shape == (2, 1, *size)
    found = extremal_masks(cnn(), images(1, *size)[0], 0, (0.2,), iterations=2, step=7, sigma=14)
    assert found.masks.shape == (1, 1, *size)


@pytest.mark.parametrize("smoothing", ["maximum", "sum", "sigmoid"])
def test_other_smoothings_are_their_formulas(smoothing: str) -> None:
    masks = SmoothMask(12, 12, step=4, sigma=4, smoothing=smoothing)
    parameters = torch.zeros(1, 1, *masks.grid)
    parameters[..., 1, 1] = 0.5
    found = masks(parameters)[0]
    v = SmoothMask(12, 12, step=4, sigma=4, smoothing="sum")(parameters)[0]
    assert torch.allclose(found, (20 * v - 3).sigmoid() if smoothing == "sigmoid" else v, atol=1e-6)


def test_the_area_term_is_zero_only_for_a_mask_of_that_area() -> None:
    mask = torch.zeros(1, 1, 4, 5)
    mask.view(-1)[[3, 7, 8, 19]] = 1
    assert ranked_area(mask, [0.2]).item() == 0
    assert ranked_area(mask, [0.25]).item() == pytest.approx(1 / 20)
    assert ranked_area(mask * 0.9, [0.2]).item() > 0
    assert ranked_area(torch.ones(1, 9), [1.0]).item() == 0


def test_an_area_of_one_keeps_the_mask_of_ones() -> None:
    found = extremal_masks(lambda x: 0 * x.mean((2, 3)), images(1)[0], 0, (1.0,), iterations=2, step=4, sigma=8)
    start, _ = SmoothMask(12, 16, 4, 8)(torch.ones(1, 1, 3, 4))
    assert start.mean() > 0.5
    assert float(found.masks.min()) > 0.7


def test_rewards_of_several_areas_stay_one_each() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 0.0]])
    assert reward(scores, 1).tolist() == [5.0, 3.0]
    assert reward(scores, 1, "contrastive").tolist() == [3.0, -1.0]
    found = extremal_masks(cnn(), images(1)[0], 1, (0.1, 0.3), kind="contrastive", **FAST)
    assert found.history.shape == (2, 2, 6)
    assert torch.allclose(found.history[0, 0, 0], found.history[1, 0, 0])


def test_dual_is_the_sum_of_preserve_and_delete() -> None:
    first = {
        v: extremal_masks(cnn(), images(1)[0], 1, (0.3,), variant=v, **FAST).history[0, 0, 0]
        for v in ("preserve", "delete", "dual")
    }
    assert torch.allclose(first["dual"], first["preserve"] + first["delete"], atol=1e-6)


def test_masks_lie_on_what_makes_the_score() -> None:
    thing = torch.zeros(16, 24, dtype=torch.bool)
    thing[4:10, 2:9] = True
    scores = corner(slice(4, 10), slice(2, 9))
    found = extremal_masks(
        lambda x: 20 * scores(x),
        torch.ones(3, 16, 24),
        1,
        (0.15, 0.3),
        perturbing="fade",
        iterations=150,
        step=2,
        sigma=4,
        jitter=False,
    )
    assert pointing.points_at(pointing.summed(found.masks), thing)
    assert float(found.masks[0, 0][thing].mean()) > 3 * float(found.masks[0, 0][~thing].mean())
    assert float(found.area[0]) < float(found.area[1])
    assert bool((found.kept > 0.8 * found.whole).all())
    assert found.smallest(0.8) == 0
    assert found.smallest(2.0) is None
    assert float(found.history[0, 1, -1]) > float(found.history[0, 1, 0])


def test_a_mean_area_leaves_masks_grey() -> None:
    options = {"perturbing": "fade", "iterations": 60, "step": 2, "sigma": 4, "jitter": False}
    scores = corner(slice(4, 10), slice(2, 9))
    grey = {}
    for term in ("ranked", "mean"):
        found = extremal_masks(scores, torch.ones(3, 16, 24), 1, (0.2,), area_term=term, **options).masks
        grey[term] = float(((found > 0.1) & (found < 0.9)).float().mean())
    assert grey["mean"] > grey["ranked"]


def test_a_constant_model_gives_masks_by_the_area_alone_and_says_so() -> None:
    with pytest.warns(UserWarning, match="the area term alone made these masks"):
        found = extremal_masks(lambda x: 0 * x.mean((2, 3)), images(1)[0], 0, (0.2,), iterations=5, step=4, sigma=4)
    assert not found.heeded
    assert bool(found.masks.isfinite().all())


def test_the_search_is_the_same_each_time_and_of_each_area_alone() -> None:
    both = extremal_masks(cnn(), images(1)[0], 1, (0.1, 0.4), **FAST)
    again = extremal_masks(cnn(), images(1)[0], 1, (0.1, 0.4), **FAST)
    alone = extremal_masks(cnn(), images(1)[0], 1, (0.4,), **FAST)
    assert torch.equal(both.masks, again.masks)
    assert torch.allclose(both.masks[1], alone.masks[0], atol=1e-5)


@pytest.mark.parametrize("perturbing", ["blur", "fade"])
def test_the_explainer_keeps_the_contract(perturbing: str) -> None:
    model = cnn()
    with torch.no_grad():
        model[-1].weight.mul_(10_000)
    explainer = ExtremalPerturbation((0.2,), perturbing=perturbing, iterations=15, step=4, sigma=4, blur=4.0)
    check_explainer(explainer, model, {"input": images()})


def test_a_vision_transformer_is_explained_too() -> None:
    case = zoo.vision("ViTForImageClassification", num_labels=3)("sdpa")
    explainer = ExtremalPerturbation((0.2,), **FAST)
    found = explainer.explain(case.model, case.inputs, torch.tensor([0, 2]))
    assert found.units == "pixels"
    assert found.scores.shape == (2, case.inputs["pixel_values"][0, 0].numel())
    assert found.target.tolist() == [0, 2]
    assert all(p.grad is None for p in case.model.parameters())


def test_dense_outputs_count_by_their_mean() -> None:
    dense = nn.Conv2d(3, 2, 3, padding=1).eval()
    x = images()
    assert torch.allclose(class_scores(dense, {"input": x})(x), dense(x).mean((2, 3)))
    assert len(ExtremalPerturbation((0.2,), **FAST).masks(dense, {"input": x})) == 2


class Planted(nn.Module):
    """Class 1 is the sum of channels 1 and 4 of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 1)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer(x).relu().mean((2, 3))
        return torch.stack([a[:, 0] - 2 * a[:, 3], 20 * (a[:, 1] + a[:, 4])], 1)


@pytest.mark.parametrize("together", [False, True])
def test_the_channels_that_make_the_score_are_found(together: bool) -> None:
    model = Planted().eval()
    target = torch.ones(2, dtype=torch.long)
    found = extremal_channels(
        model, {"x": images()}, "layer", target, (1 / 3,), together=together, iterations=150, area_weight=3.0
    )
    assert found.masks.shape == (1 if together else 2, 1, 6)
    assert sorted(found.top(2).tolist()) == [1, 4]
    assert not model.layer._forward_hooks


def test_an_image_is_found_that_gives_what_is_left_of_the_channels() -> None:
    model, inputs = cnn(), {"input": images()}
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    with torch.no_grad():
        wanted = model[:2](inputs["input"]) * mask.view(1, -1, 1, 1)
        off = [float(((model[:2](x) - wanted) ** 2).mean()) for x in (
            inverted(model, inputs, "1", mask, iterations=1), inverted(model, inputs, "1", mask, iterations=100)
        )]  # fmt: skip
    assert off[1] < 0.3 * off[0]
    with pytest.raises(InputError, match="mask: expected one value per channel of '1', 4, got"):
        inverted(model, inputs, "1", mask[:3])


MAPS = {
    "gradient": rivals.gradient_map,
    "occlusion": lambda *a: rivals.occlusion_map(*a, window=4, stride=2),
    "RISE": lambda *a: rivals.rise_map(*a, masks=200, cells=5),
    "traded mask": lambda *a: rivals.traded_mask(*a, iterations=60, weight=0.02, variation=0.0, perturbing="fade"),
}


@pytest.mark.parametrize("name", MAPS)
def test_rivals_point_at_what_makes_the_score(name: str) -> None:
    thing = torch.zeros(16, 24, dtype=torch.bool)
    thing[4:10, 2:9] = True
    scores = corner(slice(4, 10), slice(2, 9))
    state = torch.get_rng_state()
    found = MAPS[name](scores, torch.ones(3, 16, 24), 1)
    assert torch.equal(state, torch.get_rng_state())
    assert found.shape == (16, 24)
    assert float(found[thing].mean()) > 1.05 * float(found[~thing].mean())
    if name != "traded mask":  # whose largest value is that of all that it takes away
        assert pointing.points_at(found, thing, 0.0)


def test_grad_cam_of_the_last_maps_is_the_weighted_sum_of_the_classifier() -> None:
    model, x = cnn(), images(1)
    found = rivals.grad_cam(model, "3")(class_scores(model, {"input": x}, 0), x[0], 1)
    maps = model[:4](x)[0]
    expected = (model[6].weight[1].view(-1, 1, 1) * maps).sum(0).relu() / maps[0].numel()
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(InputError, match="layer: '5' gives"):
        rivals.grad_cam(model, "5")(class_scores(model, {"input": x}, 0), x[0], 1)


def test_controls_know_nothing_of_the_model() -> None:
    centre = rivals.centre_map(cnn(), images(1)[0], 0)
    assert divmod(int(centre.argmax()), 16) in [(r, c) for r in (5, 6) for c in (7, 8)]
    assert torch.equal(rivals.random_map(cnn(), images(1)[0], 0), rivals.random_map(cnn(seed=1), images(1)[0], 1))


def test_what_a_mask_keeps_is_the_probability_of_the_image_under_it() -> None:
    model, image = cnn(), images(1)[0]
    found = pointing.kept_probability(model, image, 2, torch.stack([torch.ones(12, 16), torch.zeros(12, 16)]))
    with torch.no_grad():
        assert torch.allclose(found[0], model(image[None]).softmax(1)[0, 2])
        assert torch.allclose(found[1], model(gaussian_blur(image, 20.0)[None]).softmax(1)[0, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SmoothMask(9, 9, step=7, sigma=10), "sigma: expected a multiple of step=7, got 10"),
        (lambda: ExtremalPerturbation(()), "areas: expected shares above 0"),
        (lambda: ExtremalPerturbation((1.5,)), "areas: expected shares above 0"),
        (lambda: ExtremalPerturbation(variant="keep"), "variant: expected 'preserve', 'delete' or 'dual', got 'keep'"),
        (lambda: extremal_masks(cnn(), images(1)[0], 3, iterations=1), "target: expected a class from 0 to 2, got 3"),
        (lambda: ExtremalPerturbation().masks(cnn(), {"x": torch.rand(2, 3)}), "inputs: expected one batch of images"),
        (lambda: ExtremalPerturbation().masks(cnn().train(), {"input": images()}), "model: expected one in eval mode"),
        (lambda: extremal_channels(cnn(), {"input": images()}, "9"), "at: the model has no module '9'"),
        (lambda: reward(torch.rand(2, 1), 0, "contrastive"), "at least two classes"),
        (lambda: pointing.points_at(torch.rand(2, 2), torch.zeros(2, 2).bool()), "thing: expected"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[], object], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=message):
            call()
