from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    Comet,
    CometExplainer,
    LossWeights,
    SmallClassifier,
    SmallSelector,
    accuracies,
    covered,
    grad_cam,
    insertion_and_deletion,
    masked_pair,
    pretrain_detector,
    selector_objective,
    train_comet,
)
from cenote.explain.comprehensive_attribution.model import filling, top_pixels
from cenote.explain.comprehensive_attribution.training import IMAGENET9
from cenote.testing.as_found import AsFound


def images(items: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A bright square in the upper or lower half: images, labels, the square's pixels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(items) % 2
    x = 0.1 * torch.randn(items, 1, 8, 8, generator=generator)
    truth = torch.zeros(items, 8, 8, dtype=torch.bool)
    for n in range(items):
        row = int(torch.randint(0, 3, (), generator=generator)) + 4 * int(y[n])
        column = int(torch.randint(0, 6, (), generator=generator))
        truth[n, row : row + 2, column : column + 2] = True
    return x + 2.0 * truth[:, None], y, truth


class Halves(nn.Module):
    """A classifier that can see where brightness is."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.output = nn.Linear(4 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x).flatten(1))


def comet(detector: bool | None = True, fill: str = "mean") -> Comet:
    torch.manual_seed(0)
    selector, predictor, other = SmallSelector(1, 8), Halves(), Halves()
    return Comet(selector, predictor, {True: other, False: None, None: predictor}[detector], fill).eval()  # type: ignore[arg-type]


def test_the_pair_is_the_image_and_the_fill() -> None:
    x = torch.randn(2, 3, 4, 4)
    for fill in ("mean", "black", "blur"):
        q = filling(x, fill, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.5, 0.5]))  # type: ignore[arg-type]
        s = torch.rand(2, 1, 4, 4)
        pair = masked_pair(x, s, q)
        assert torch.allclose(pair.selected + pair.left, x + q, atol=1e-6)
        ones, zeros = masked_pair(x, torch.ones_like(s), q), masked_pair(x, torch.zeros_like(s), q)
        assert torch.equal(ones.selected, x)
        assert torch.equal(ones.left, q)
        assert torch.equal(zeros.selected, q)
        assert torch.equal(zeros.left, x)
    assert torch.allclose(filling(x, "black", torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)), torch.tensor(-2.0))
    assert torch.allclose(filling(torch.ones(1, 1, 8, 8), "blur"), torch.ones(1, 1, 8, 8))


def test_a_mask_within_its_area_costs_exactly_nothing() -> None:
    mask = torch.full((2, 1, 4, 4), 0.2, requires_grad=True)
    zero = torch.zeros(())
    loss = selector_objective(zero, None, mask, LossWeights(area=0.25))
    assert float(loss) == 0
    assert float(selector_objective(zero, None, mask, LossWeights(area=0.1, b=10.0))) == pytest.approx(1.0)
    # the area is that of each image, so that an empty one does not pay for a full one
    uneven = torch.cat([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)])
    assert float(selector_objective(zero, None, uneven, LossWeights(area=0.25, b=1.0))) == pytest.approx(0.125)


def test_a_detector_that_is_worse_by_the_gap_presses_no_more() -> None:
    p, d = torch.tensor(0.5, requires_grad=True), torch.tensor(1.6, requires_grad=True)
    mask = torch.zeros(1, 1, 2, 2)
    loss = selector_objective(p, d, mask, LossWeights(gap=1.0, a=3.0))
    gradients = torch.autograd.grad(loss, (p, d))
    assert float(loss) == 0.5
    assert [float(g) for g in gradients] == [1.0, 0.0]
    pressed = selector_objective(p, d, mask, LossWeights(gap=2.0, a=3.0))
    assert float(pressed) == pytest.approx(0.5 + 3 * 0.9)
    assert float(selector_objective(p, d, mask, LossWeights("paper", a=3.0))) == pytest.approx(0.5 - 4.8)
    assert (IMAGENET9.a, IMAGENET9.b, IMAGENET9.area, IMAGENET9.gap) == (4.0, 100.0, 0.6, 2.0)


def test_the_selectors_loss_leaves_no_gradient_in_the_others() -> None:
    x, y, _ = images(8)
    model = comet()
    before = copy.deepcopy(model.detector.state_dict())  # type: ignore[union-attr]
    train_comet(model, x, y, epochs=1, batch=8)
    assert all(p.grad is None for p in model.detector.parameters())  # type: ignore[union-attr]
    # the predictor's is that of its own loss on the masked images
    other = comet()
    selected = other.masked(x, other.mask_of(x)).selected.detach()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(other.predictor(selected[order]), y[order]).backward()
    for p, q in zip(model.predictor.parameters(), other.predictor.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-7)
    assert all(torch.equal(v, before[k]) for k, v in model.detector.state_dict().items())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in model.parameters())


def test_without_weight_the_detector_changes_nothing_to_the_bit() -> None:
    x, y, _ = images(16)
    models = [comet(True), comet(False)]
    for model in models:
        train_comet(model, x, y, LossWeights(a=0.0), epochs=2, batch=8)
    for name in ("selector", "predictor"):
        pairs = zip(getattr(models[0], name).parameters(), getattr(models[1], name).parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("players", [1, 2, 3])
def test_each_number_of_players_trains_what_it_should(players) -> None:  # type: ignore[no-untyped-def]
    x, y, _ = images(8)
    model = comet(None if players == 1 else True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    played = train_comet(model, x, y, players=players, epochs=1, batch=4)
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"selector", "predictor"} | ({"detector"} if players != 2 else set())
    assert len(played.selector) == 2
    assert not model.training


def test_without_the_areas_term_it_is_said_that_the_mask_fills_the_image() -> None:
    x, y, _ = images(8)
    with pytest.warns(UserWarning, match="without the area's term the mask fills the image"):
        train_comet(comet(), x, y, LossWeights(b=0.0), epochs=1)


def test_an_empty_mask_is_not_what_comes_out() -> None:
    x, y, truth = images(48)
    model = comet()
    pretrain_detector(model.detector, x, y, epochs=20, batch=12, lr=1e-2)  # type: ignore[arg-type]
    train_comet(model, x, y, LossWeights(area=0.1, a=4.0, b=10.0), epochs=40, batch=12, lr=5e-3, milestones=())
    with torch.no_grad():
        mask = model.mask_of(x)[:, 0]
    assert float(mask[truth].mean()) > 0.5 > float(mask[~truth].mean())
    found = accuracies(model, x, y, truth)
    assert found.masked > 0.9
    assert found.left is not None
    assert 0 <= found.swapped <= 1


def test_rates_rise_and_fall() -> None:
    x, y, _ = images(8)
    slow, fast = comet(), comet()
    before = [p.clone() for p in slow.selector.parameters()]
    train_comet(slow, x, y, epochs=1, batch=8, warm_up=99)
    train_comet(fast, x, y, epochs=1, batch=8, warm_up=0)
    far = [
        max(float((p - q).abs().max()) for p, q in zip(m.selector.parameters(), before, strict=True))
        for m in (slow, fast)
    ]
    assert far[0] == pytest.approx(far[1] / 100, rel=0.1)
    late = comet()
    train_comet(late, x, y, epochs=1, batch=8, warm_up=0, milestones=(0,))
    moved = max(float((p - q).abs().max()) for p, q in zip(late.selector.parameters(), before, strict=True))
    assert moved == pytest.approx(far[1] / 10, rel=0.1)


def test_batch_mates_and_order_change_nothing_and_the_detector_is_not_asked() -> None:
    x, _, _ = images(6)
    model = comet()
    whole = model.explained(x)
    back = model.explained(x.flip(0))
    assert torch.allclose(whole.logits, back.logits.flip(0), atol=1e-6)
    assert torch.allclose(whole.mask[2:3], model.explained(x[2:3]).mask, atol=1e-6)
    model.detector = None
    assert torch.equal(model.explained(x).logits, whole.logits)
    rounded = model.explained(x, quantile=0.75).mask
    assert set(rounded.unique().tolist()) == {0.0, 1.0}
    assert rounded.flatten(1).sum(1).tolist() == [16.0] * 6


def test_segmentation_networks_are_selectors_too() -> None:
    class Segmentation(SmallSelector):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    x, _, _ = images(4)
    plain, other = comet(), comet()
    other.selector = Segmentation(1, 8)
    other.selector.load_state_dict(plain.selector.state_dict())
    assert torch.equal(plain.mask_of(x), other.mask_of(x))


def test_it_explains_itself_and_is_left_as_it_was() -> None:
    x, _, _ = images(6)
    model = comet()
    before = AsFound(model, lambda: model(pixel_values=x))
    found = CometExplainer().explain(model, {"pixel_values": x})
    assert found.units == "pixels"
    assert torch.equal(found.scores.view(6, 8, 8), model.explained(x).mask)
    assert torch.equal(found.scores, CometExplainer().explain(model, {"pixel_values": x}).scores)
    assert before.changed() is None


@pytest.mark.parametrize("detector", [True, False, None])
def test_what_is_saved_comes_back(detector: bool | None, tmp_path: Path) -> None:
    x, _, _ = images(4)
    model = comet(detector)
    model.save(tmp_path / "c.safetensors")
    other = comet(detector)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(other.load(tmp_path / "c.safetensors")(x).logits, model(x).logits)
    with pytest.raises(InputError, match="is not there"):
        other.load(tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="does not hold the parameters"):
        Comet(SmallSelector(1, 5), Halves()).load(tmp_path / "c.safetensors")


def test_maps_are_judged_at_the_same_area() -> None:
    _, _, truth = images(6)
    perfect = covered(truth.float() * 0.1, truth)
    assert torch.equal(perfect.coverage, torch.ones(6).double())
    assert torch.equal(covered(truth.float(), truth).iou, perfect.iou)
    half = truth.clone()
    half[:, :, ::2] = False
    found = covered(half.float() - truth.float() * 0.0, truth)
    assert bool((found.coverage < 1).all())
    assert torch.allclose(found.iou, found.coverage / (2 - found.coverage))
    assert int(top_pixels(torch.rand(2, 4, 4), 5).sum()) == 10


def test_good_maps_insert_early_and_grad_cam_leaves_no_hook() -> None:
    x, y, truth = images(24)
    box = Halves()
    right, _ = pretrain_detector(box, x, y, epochs=20, batch=8, lr=1e-2)
    assert right > 0.6
    q = filling(x)
    good, bad = (insertion_and_deletion(box, x, y, m, q) for m in (truth.float(), (~truth).float()))
    assert good[0] > bad[0]
    assert good[1] < bad[1]
    before = AsFound(box, lambda: box(x))
    cam = grad_cam(box, box.features, x, y)
    assert cam.shape == (24, 8, 8)
    assert bool((cam >= 0).all())
    assert before.changed() is None
    assert SmallClassifier(1, 2)(x).shape == (24, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filling(torch.zeros(1, 1, 2, 2), "white"), "fill: expected"),
        (lambda: filling(torch.zeros(1, 1, 2, 2), "black"), "mean, std: expected those of the normalisation"),
        (lambda: comet(fill="black"), "mean, std: expected those of the normalisation"),
        (lambda: Comet(nn.Conv2d(1, 2, 1), Halves())(torch.zeros(1, 1, 8, 8)), r"selector: expected \[1, 1, 8, 8\]"),
        (lambda: comet().explained(torch.zeros(1, 1, 8, 8), 1.0), "quantile: expected a share"),
        (lambda: train_comet(comet(False), *images(4)[:2]), "detector: expected one of its own with players=2"),
        (lambda: train_comet(comet(), *images(4)[:2], players=1), "detector: expected the predictor itself"),
        (lambda: LossWeights("sum"), "objective: expected"),
        (lambda: CometExplainer().explain(Halves(), {}), "model: expected a Comet"),
        (lambda: CometExplainer().explain(comet(), {}), "inputs: expected pixel_values"),
        (lambda: covered(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).bool()), "truth: expected"),
        (
            lambda: pretrain_detector(Halves(), torch.zeros(20, 1, 8, 8), torch.arange(20) % 2, epochs=1),
            "detector: names 50% of held-out images rightly",
        ),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
