"""MIDAM: the estimator against autograd of its objective, its limits, its memory, its state."""

import gc
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cenote.core import Bags, InputError
from cenote.pool import (
    ABMIL,
    MIDAM,
    AttentionStatistic,
    BagScorer,
    MIDAMAttention,
    MIDAMAttentionLoss,
    MIDAMLoss,
    MIDAMSmoothedMax,
    MIDAMSmoothedMaxLoss,
    MIDAMTrainer,
    SmoothedMaxPool,
    TwoClassBatches,
    sample_instances,
)
from cenote.pool.bags.midam.trainer import sample_rows

BAGS, INSTANCES, WIDTH = 6, 5, 3
Y = torch.tensor([1, 0, 1, 0, 0, 1])


def smoothed(tau: float = 0.5) -> MIDAMSmoothedMax:
    torch.manual_seed(0)
    return MIDAMSmoothedMax(nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1)), tau).double()


def attentive() -> MIDAMAttention:
    torch.manual_seed(0)
    return MIDAMAttention(nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh()), 4, hidden=3).double()


def features(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BAGS, INSTANCES, WIDTH, generator=generator, dtype=torch.float64)


MODES: dict[str, tuple[Any, Any]] = {
    "smoothed max": (smoothed, lambda **k: MIDAMSmoothedMaxLoss(BAGS, tau=0.5, **k).double()),
    "attention": (attentive, lambda **k: MIDAMAttentionLoss(BAGS, **k).double()),
}


def objective(h: Tensor, loss: MIDAMLoss, factor: float) -> Tensor:
    plus, minus = h[Y == 1], h[Y == 0]
    apart = loss.margin + minus.mean() - plus.mean()
    return (plus - loss.a).square().mean() + (minus - loss.b).square().mean() + factor * loss.alpha * apart


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_with_whole_bags_and_no_memory_the_estimator_is_the_gradient(mode: str, exact: bool) -> None:
    build, build_loss = MODES[mode]
    model, loss = build(), build_loss(gamma=1.0, exact_alpha=exact)
    with torch.no_grad():
        loss.a.fill_(0.3), loss.b.fill_(-0.2), loss.alpha.fill_(0.7)
    parameters = [*model.parameters(), loss.a, loss.b]
    x = features()
    estimated = torch.autograd.grad(loss(model.sampled(x), Y, torch.arange(BAGS)), parameters, allow_unused=True)
    h = model(x) if mode == "smoothed max" else torch.sigmoid(model(x))
    true = torch.autograd.grad(objective(h, loss, 2.0 if exact else 1.0), parameters, allow_unused=True)
    for got, expected in zip(estimated, true, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_estimate_comes_to_point_where_the_whole_bag_points(mode: str) -> None:
    """With the weights held, the mean estimator of many small samples is the gradient of whole bags."""
    build, build_loss = MODES[mode]
    model, loss = build(), build_loss(gamma=0.05)
    generator = torch.Generator().manual_seed(0)
    x, index = features(), torch.arange(BAGS)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for step in range(300):
        sample, _ = sample_instances(list(x), index, 2, generator)
        value = loss(model.sampled(sample), Y, index)
        if step >= 100:
            grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
            total += torch.cat([g.flatten() for g in grads])
    h = model(x) if mode == "smoothed max" else torch.sigmoid(model(x))
    true = torch.autograd.grad(
        objective(h, loss, 1.0), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    cosine = nn.functional.cosine_similarity(total, torch.cat([g.flatten() for g in true]), dim=0)
    assert cosine > 0.95


def test_temperature_goes_from_maximum_to_mean() -> None:
    x = features()
    torch.testing.assert_close(SmoothedMaxPool(WIDTH, 1e-6)(x), x.amax(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(SmoothedMaxPool(WIDTH, 1e6)(x), x.mean(1), atol=1e-4, rtol=0)


def test_smoothed_max_is_its_equation_and_its_weights_its_gradient() -> None:
    pool, x = SmoothedMaxPool(WIDTH, 0.3), features().requires_grad_()
    y, weights = pool.attend(x)
    torch.testing.assert_close(y, 0.3 * torch.log((x / 0.3).exp().mean(1)))
    assert weights is not None
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(weights.squeeze(1), gradient.mean(-1))


def test_equal_attention_is_the_mean_score_and_attention_is_abmil() -> None:
    model, x = attentive(), features()
    mil = ABMIL(4, hidden=3, gated=False).double()
    mil.tanh.load_state_dict(model.attention[0].state_dict())
    mil.score.load_state_dict({"weight": model.attention[2].weight})
    torch.testing.assert_close(model(x), model.score(mil(model.encoder(x))).squeeze(1))
    with torch.no_grad():
        model.attention[2].weight.zero_()
    torch.testing.assert_close(model(x), model.score(model.encoder(x)).squeeze(-1).mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_padding_bags_and_parts_do_not_matter(mode: str) -> None:
    model: BagScorer = MODES[mode][0]()
    x = features()
    mask = torch.ones(BAGS, INSTANCES, dtype=torch.bool)
    mask[2, 3:] = False
    dirty = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(model(dirty, mask), model(Bags.from_padded(x, mask)))
    shown = model.instances(dirty, mask)
    assert shown.shape == (BAGS, INSTANCES)
    assert not bool(shown[2, 3:].any())
    torch.testing.assert_close(model.joined([model.sampled(x[:, :2]), model.sampled(x[:, 2:])], [2, 3]), model(x))


def test_images_as_instances() -> None:
    model = MIDAMSmoothedMax(nn.Sequential(nn.Flatten(-2), nn.Linear(16, 1)))
    assert model(torch.randn(2, 3, 4, 4)).shape == (2,)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_bags_of_a_batch_are_remembered_anew(mode: str) -> None:
    build, build_loss = MODES[mode]
    model, loss = build(), build_loss()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    index = torch.tensor([3, 0])
    loss(model.sampled(features()[index]), Y[index], index)
    for name, now in loss.state_dict().items():
        if now.dim():
            changed = (now != before[name]).nonzero().flatten().tolist()
            assert changed == [0, 3]


def test_the_first_visit_is_not_blown_up_unless_asked_for() -> None:
    index, log_f = torch.tensor([0, 1]), torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    sizes = {}
    for init in ("first_value", "authors"):
        loss = MIDAMSmoothedMaxLoss(BAGS, tau=0.5, gamma=0.1, init=init).double()  # type: ignore[arg-type]
        with torch.no_grad():
            loss.alpha.fill_(1.0), loss.a.copy_(loss.tau * log_f[0]), loss.b.copy_(loss.tau * log_f[1])
            if init == "authors":
                loss.a.add_(loss.tau * np.log(0.1)), loss.b.add_(loss.tau * np.log(0.1))
        sizes[init] = torch.autograd.grad(loss(log_f, Y[index], index), log_f)[0]
    torch.testing.assert_close(sizes["authors"], 10 * sizes["first_value"])


def test_a_small_temperature_does_not_overflow() -> None:
    model = MIDAMSmoothedMax(nn.Linear(WIDTH, 1), tau=1e-3)
    loss = MIDAMSmoothedMaxLoss(BAGS, tau=1e-3)
    value = loss(model.sampled(features().float()), Y, torch.arange(BAGS))
    value.backward()
    assert bool(value.isfinite())
    assert bool(model.phi.weight.grad.isfinite().all())  # type: ignore[union-attr, operator]
    extreme = AttentionStatistic(torch.ones(BAGS, requires_grad=True), torch.full((BAGS,), 500.0, requires_grad=True))
    assert bool(MIDAMAttentionLoss(BAGS, init="authors")(extreme, Y, torch.arange(BAGS)).isfinite())


def test_alpha_rises_to_its_fixed_point_and_stays_above_zero() -> None:
    loss = MIDAMSmoothedMaxLoss(BAGS, margin=0.5)
    for _ in range(200):
        loss.dual_step(0.1)
    assert float(loss.alpha) == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad():
        loss.alpha.zero_(), loss.a.fill_(0.7), loss.b.fill_(0.2)
    loss.dual_step(0.1)
    assert float(loss.alpha) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        loss.a.fill_(3.0)
    loss.dual_step(0.1)
    assert float(loss.alpha) == 0.0


def test_the_optimiser_is_averaged_momentum() -> None:
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    loss = MIDAMSmoothedMaxLoss(BAGS).double()
    optimizer = MIDAM([w], loss, lr=0.1, momentum=0.75, weight_decay=0.5)
    average, value = None, 2.0
    for gradient in (1.0, -2.0, 0.5):
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        decayed = gradient + 0.5 * value
        average = decayed if average is None else 0.75 * average + 0.25 * decayed
        value -= 0.1 * average
        assert w.item() == pytest.approx(value)


def trainer(mode: str = "smoothed max", seed: int = 0) -> MIDAMTrainer:
    build, build_loss = MODES[mode]
    model, loss = build(), build_loss(gamma=0.5)
    bags = [x[: 2 + i % 4] for i, x in enumerate(features())]
    return MIDAMTrainer(model, MIDAM(model.parameters(), loss, 0.05), bags, Y, 3, 2, 2, seed)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(mode: str) -> None:
    whole, first = trainer(mode), trainer(mode)
    expected = whole.fit(11)
    assert first.fit(6) == expected[:6]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    resumed = trainer(mode, seed=9)
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.add_(1.0)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert resumed.fit(5) == expected[6:]
    assert torch.equal(resumed.scores(resumed.bags), whole.scores(whole.bags))


def test_scorer_and_loss_share_mode_temperature_and_bags() -> None:
    bags = list(features())
    for model, loss, named in (
        (smoothed(0.5), MIDAMSmoothedMaxLoss(BAGS, tau=0.1), "tau: the scorer pools at 0.5, the loss at 0.1"),
        (attentive(), MIDAMSmoothedMaxLoss(BAGS), "MIDAMSmoothedMax .* got a MIDAMAttention"),
        (smoothed(), MIDAMAttentionLoss(BAGS), "MIDAMAttention .* got a MIDAMSmoothedMax"),
        (smoothed(), MIDAMSmoothedMaxLoss(BAGS + 1, tau=0.5), "6 of them, 6 labels, 7 estimates"),
    ):
        with pytest.raises(InputError, match=named):
            MIDAMTrainer(model, MIDAM(model.parameters(), loss), bags, Y)


def test_a_state_of_another_temperature_mode_or_number_of_bags_is_refused() -> None:
    model = smoothed(0.2)
    loss = MIDAMSmoothedMaxLoss(BAGS, tau=0.2).double()
    cooler = MIDAMTrainer(model, MIDAM(model.parameters(), loss), list(features()), Y)
    fewer = MIDAMSmoothedMaxLoss(BAGS - 1, tau=0.5).double()
    smaller = MIDAMTrainer(smoothed(), MIDAM(smoothed().parameters(), fewer), list(features())[:-1], Y[:-1])
    for other, named in (
        (cooler, "'tau': 0.2.*'tau': 0.5"),
        (trainer("attention"), "MIDAMAttentionLoss.*MIDAMSmoothedMaxLoss"),
        (smaller, "'bags': 5.*'bags': 6"),
    ):
        with pytest.raises(InputError, match=named):
            trainer().load_state_dict(other.state_dict())
    # states of earlier versions do not say
    state = trainer().state_dict()
    del state["kind"]
    trainer().load_state_dict(state)


def test_a_small_gamma_from_the_first_value_stays_finite() -> None:
    model, loss = smoothed(0.1).float(), MIDAMSmoothedMaxLoss(BAGS, gamma=0.1)
    t = MIDAMTrainer(model, MIDAM(model.parameters(), loss, lr=0.05), list(features().float()), Y, 2)
    assert np.isfinite(t.fit(200)).all()
    assert bool(t.scores(t.bags).isfinite().all())


def test_scores_are_exact_in_pieces() -> None:
    t = trainer("attention")
    whole = torch.cat([t.model(bag.unsqueeze(0)) for bag in t.bags])  # type: ignore[attr-defined]
    torch.testing.assert_close(t.scores(t.bags, rows_at_once=2), whole)


def test_it_learns_which_bags_hold_a_key() -> None:
    generator = torch.Generator().manual_seed(0)
    bags = torch.randn(40, 10, WIDTH, generator=generator)
    y = (torch.arange(40) % 2 == 0).long()
    bags[y == 1, 0, 0] += 7
    torch.manual_seed(0)
    model = MIDAMSmoothedMax(nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)), tau=0.5)
    optimizer = MIDAM(model.parameters(), MIDAMSmoothedMaxLoss(40, 0.5, gamma=0.5), lr=0.1)
    t = MIDAMTrainer(model, optimizer, list(bags), y)
    t.fit(400)
    scores = t.scores(list(bags))
    auc = (scores[y == 1].unsqueeze(1) > scores[y == 0]).double().mean()
    assert auc > 0.95
    assert (model.instances(bags[y == 1]).argmax(1) == 0).double().mean() > 0.8


def test_batches_hold_both_classes_and_no_bag_twice() -> None:
    y = torch.tensor([1] * 3 + [0] * 20)
    batches = TwoClassBatches(y, 8, 6, torch.Generator().manual_seed(0))
    drawn = [batches.draw() for _ in range(9)]
    for index in drawn:
        assert len(index) == 9 == len(index.unique())
        assert int(y[index].sum()) == 3
    # every pass visits all but the remainder that a batch would repeat
    assert len(torch.cat(drawn[:3])[y[torch.cat(drawn[:3])] == 0].unique()) == 18


def test_instances_are_drawn_uniformly_without_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        rows = sample_rows(10, 3, generator)
        assert len(set(rows)) == 3
        counts[rows] += 1
    assert float((counts / 600 - 1).abs().max()) < 0.15
    x, mask = sample_instances(Bags.from_list([torch.ones(2, 3), torch.ones(7, 3)]), torch.tensor([1, 0]), 4)
    assert x.shape == (2, 4, 3)
    assert mask is not None
    assert mask.sum(1).tolist() == [4, 2]


class Endless:
    """A bag of 256 MB that is nowhere: rows are made as they are asked for."""

    asked = 0

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        self.asked += len(rows)
        return np.random.default_rng(rows[0]).normal(size=(len(rows), 64)).astype(np.float32)


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bag_of_a_million_instances_trains_in_the_memory_of_the_sampled_ones() -> None:
    """A step reads 32 rows of 8 bags that hold 2 GB together."""
    bags = [Endless() for _ in range(8)]
    model = MIDAMSmoothedMax(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)))
    t = MIDAMTrainer(model, MIDAM(model.parameters(), MIDAMSmoothedMaxLoss(8)), bags, torch.arange(8) % 2, instances=4)
    t.fit(3)  # what libraries allocate once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    t.fit(20)
    assert status("VmHWM") - before < 4 * 2**20
    assert sum(bag.asked for bag in bags) == 23 * 32


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MIDAMSmoothedMaxLoss(1), "bags"),
        (lambda: MIDAMSmoothedMaxLoss(4, gamma=0.0), "gamma"),
        (lambda: MIDAMSmoothedMaxLoss(4, tau=0.0), "tau"),
        (lambda: MIDAMAttentionLoss(4, init="ones"), "init"),  # type: ignore[arg-type]
        (lambda: SmoothedMaxPool(4, tau=-1.0), "tau"),
        (lambda: MIDAMSmoothedMaxLoss(4)(torch.zeros(2), torch.tensor([1, 0]), torch.tensor([1, 1])), "bag twice"),
        (lambda: MIDAMSmoothedMaxLoss(4)(torch.zeros(2), torch.tensor([1, 1]), torch.tensor([1, 2])), "one class only"),
        (lambda: MIDAMSmoothedMaxLoss(4)(torch.zeros(2), torch.tensor([1, 2]), torch.tensor([1, 2])), "labels 0 and 1"),
        (lambda: MIDAMSmoothedMaxLoss(4)(torch.zeros(2), torch.tensor([1, 0]), torch.tensor([1, 4])), "0 to 3"),
        (lambda: MIDAMSmoothedMaxLoss(4)(torch.zeros(2), torch.tensor([1, 0, 1]), torch.tensor([1, 2])), "y: expected"),
        (lambda: TwoClassBatches(torch.ones(4)), "y: expected"),
        (lambda: MIDAM(smoothed().parameters(), MIDAMSmoothedMaxLoss(4), lr=0.0), "lr"),
        (lambda: sample_instances([torch.ones(0, 3)], torch.tensor([0]), 4), "bag 0 has no instance"),
    ],
)
def test_wrong_input_is_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()
