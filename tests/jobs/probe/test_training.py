import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tests.jobs.probe.conftest import make_dataset
from tests.pools import QUICK_SETTINGS, first_of_bases, thoroughly_but
from torch import Tensor, nn

import cenote
from cenote.compare.metrics import accuracy, auroc, mean_average_precision, r2
from cenote.core import InputError
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import compare, training
from cenote.jobs.probe.module import Probe, build_probe
from cenote.jobs.probe.recipe import Recipe

QUICK = Recipe(learning_rates=(3e-3, 3e-2), epochs=12, batch_size=32)
METHODS = [m.name for m in cenote.methods(room="pool", kind="sets")]


@pytest.fixture
def float64() -> Iterator[None]:
    """Adam divides by the size of the gradient: in float32, rounding of tiny gradients would be all that is compared."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_by_one(data: TokenDataset, name: str, seed: int, rate: float, epochs: int) -> Probe:
    """The same recipe in the plainest loop: one probe, torch's own BatchNorm."""
    probe = training._seeded(lambda: build_probe(name, data), seed)
    items = data.indices("train")
    optimiser = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=QUICK.weight_decay)
    passes = 5  # 30 items in batches of 16 are 2 steps, and an epoch has at least 10
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, QUICK.epochs * 10)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        probe.train()
        for batch in (b for _ in range(passes) for b in training.logical_batches(items, 16, order)):
            x, mask = data.batch(batch)
            loss = nn.functional.cross_entropy(probe(x, mask), data.y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return probe.eval()


@pytest.mark.parametrize("name", ["mean", "simpool", "efficient-probing", "abmil"])
@pytest.mark.usefixtures("float64")
def test_training_together_equals_training_one_by_one(name: str) -> None:
    toy = make_dataset()
    trained = training.train(lambda: build_probe(name, toy), toy, accuracy, (0, 1), QUICK)
    for seed, (probe, epochs) in enumerate(zip(trained.probes, trained.epochs, strict=True)):
        alone = one_by_one(toy, name, seed, trained.learning_rate, epochs)
        test = toy.indices("test")
        torch.testing.assert_close(probe(toy.x[test]), alone(toy.x[test]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "times"), [("statistics", 1), ("simpool", 8)])
def test_a_pool_without_parameters_pools_each_item_once(
    name: str, times: int, ragged: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = 0
    batch = type(ragged).batch

    def counted(data: TokenDataset, items: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal sets
        sets += len(items)
        return batch(data, items)

    monkeypatch.setattr(type(ragged), "batch", counted)
    recipe = dataclasses.replace(QUICK, epochs=8, least_steps=1, patience=8)
    training.train(lambda: build_probe(name, ragged), ragged, accuracy, (0, 1), recipe)
    assert sets == times * (len(ragged.indices("train")) + len(ragged.indices("val")))


def test_pools_without_parameters_draw_nothing_at_random(ragged: TokenDataset) -> None:
    fixed = 0
    for name in METHODS:
        try:
            probe = build_probe(name, ragged).train()
        except InputError:
            continue
        if any(True for _ in probe.pool.parameters()) or any(True for _ in probe.pool.buffers()):
            continue
        x, mask = ragged.batch(torch.arange(6))
        assert torch.equal(probe.pooled(x, mask), probe.pooled(x, mask)), name
        fixed += 1
    assert fixed > 5


@pytest.mark.usefixtures("float64")
def test_sets_whose_hidden_layers_are_computed_again_train_as_one_by_one() -> None:
    toy = make_dataset(tokens=400)
    assert training.ROWS_AT_ONCE < 16 * 400
    probes = [training._seeded(lambda: build_probe("abmil", toy, {"hidden": 4}), seed) for seed in (0, 1)]
    ensemble = training._Ensemble(probes, (1e-3,))
    ensemble.train()
    loss = training._losses(ensemble.logits(toy, torch.arange(16), 10**6), toy.y[:16], toy.task)
    found = torch.autograd.grad(loss.sum(), ensemble.parameters[0]["pool.tanh.weight"])[0]
    for member, probe in enumerate(probes):
        alone = nn.functional.cross_entropy(probe.train()(toy.x[:16]), toy.y[:16])
        torch.testing.assert_close(found[member], torch.autograd.grad(alone, probe.pool.tanh.weight)[0])


@pytest.mark.parametrize(
    "name", thoroughly_but(first_of_bases(METHODS), METHODS, "trains a method whose base class another one has")
)
def test_every_method_trains_on_images_and_where_it_can_on_bags(name: str, ragged: TokenDataset) -> None:
    images = dataclasses.replace(make_dataset(tokens=17, dim=16), prefix_tokens=1, grid=(4, 4))
    short = Recipe(learning_rates=(1e-2,), epochs=2, batch_size=32)
    settings = QUICK_SETTINGS.get(name)
    trained = training.train(lambda: build_probe(name, images, settings), images, accuracy, (0, 1), short)
    assert len(trained.probes) == 2
    test = images.indices("test")
    scores = training.predict(trained.probes[0], images, test, 4096)
    assert scores.isfinite().all()
    try:
        build_probe(name, ragged, settings)
    except cenote.InputError:
        return
    trained = training.train(lambda: build_probe(name, ragged, settings), ragged, auroc, (0,), short)
    assert training.predict(trained.probes[0], ragged, ragged.indices("test"), 50).isfinite().all()


def test_pieces_change_no_result(ragged: TokenDataset) -> None:
    probe = build_probe("abmil", ragged).eval()
    items = ragged.indices("test")
    small = training.predict(probe, ragged, items, 5)
    torch.testing.assert_close(small, training.predict(probe, ragged, items, 10**6), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small, probe(ragged.x.select(items)).detach(), atol=1e-5, rtol=1e-5)


def test_pieces_cover_every_item_once_within_the_bound(ragged: TokenDataset) -> None:
    items = ragged.indices("train")
    seen = []
    for where, part in training.pieces(ragged, items, 20):
        lengths = ragged.lengths()[part]
        assert len(part) == 1 or len(part) * int(lengths.max()) <= 20
        assert int(lengths.max()) <= int(lengths.min()) * 1.125
        assert torch.equal(items[where], part)
        seen += where.tolist()
    assert sorted(seen) == list(range(len(items)))


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    sizes = [len(b) for b in training.logical_batches(torch.arange(65), 32, torch.Generator())]
    assert sizes == [32, 33]


def test_early_stop_and_progress(toy: TokenDataset) -> None:
    shares: list[float] = []
    recipe = Recipe(learning_rates=(1e-9,), epochs=50, patience=2)
    trained = training.train(lambda: build_probe("mean", toy), toy, accuracy, (0,), recipe, shares.append)
    assert len(shares) == len(trained.validation_curve[0]) < 50
    assert shares == sorted(shares)


def test_validation_chooses_rate_and_epoch(toy: TokenDataset) -> None:
    recipe = Recipe(learning_rates=(1e-9, 1e-2), epochs=15)
    trained = training.train(lambda: build_probe("mean", toy), toy, accuracy, (0, 1), recipe)
    assert trained.learning_rate == 1e-2
    for best, epoch, curve in zip(trained.validation, trained.epochs, trained.validation_curve, strict=True):
        assert best == max(curve) == curve[epoch - 1]


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_learn(task: str) -> None:
    data = make_dataset(items=240)
    y = torch.stack([data.x[:, :, 0].mean(1), data.x[:, :, 1].mean(1)], 1)
    target = (y > 0.3).float() if task == "multilabel" else y
    data = dataclasses.replace(data, y=target, task=task, classes=("a", "b"))
    metric = mean_average_precision if task == "multilabel" else r2
    trained = training.train(lambda: build_probe("mean", data), data, metric, (0,), Recipe(epochs=60, patience=60))
    assert trained.validation[0] > 0.9


def test_a_pool_that_vmap_cannot_batch_is_trained_all_the_same(toy: TokenDataset) -> None:
    class Stubborn(cenote.pool.MeanPool):
        def __init__(self) -> None:
            super().__init__(8)
            self.gain = nn.Parameter(torch.ones(8))

        def pool(self, tokens: cenote.core.Tokens) -> cenote.pool.Pooled:
            return cenote.pool.Pooled(self.pool_only(tokens), None)

        def pool_only(self, tokens: cenote.core.Tokens) -> torch.Tensor:
            y = tokens.mean() * self.gain
            return y * 2 if float(y.detach().sum()) > -1e9 else y

    trained = training.train(lambda: Probe(Stubborn(), 3), toy, accuracy, (0, 1), Recipe(epochs=40))
    assert min(trained.validation) > 0.6


def test_a_probe_that_an_earlier_version_pickled_drops_what_it_dropped() -> None:
    probe = Probe(cenote.create("mean", dim=4), 2, prefix_tokens=1).eval()
    state = {k: v for k, v in probe.__dict__.items() if k != "prefix_tokens"} | {"drop": 1}
    old = Probe.__new__(Probe)
    old.__setstate__(state)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(old(x), probe(x))


def test_logits_that_are_no_numbers_are_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_dataset(classes=2)
    predict, calls = training._Ensemble.predict, []

    def broken(ensemble: training._Ensemble, data: TokenDataset, items: Tensor, recipe: Recipe) -> Tensor:
        logits = predict(ensemble, data, items, recipe)
        calls.append(len(logits))
        # all of one learning rate, and of the other those of the first epochs
        logits[1] = float("nan")
        logits[0] = float("nan") if len(calls) < 3 else logits[0]
        return logits

    monkeypatch.setattr(training._Ensemble, "predict", broken)
    trained = training.train(lambda: build_probe("mean", toy), toy, auroc, (0,), QUICK)
    assert trained.learning_rate == QUICK.learning_rates[0]
    assert trained.epochs[0] >= 3
    assert 0.5 < trained.validation[0] <= 1
    assert trained.by_rate[1] == -float("inf")


def test_features_whose_squares_overflow_are_told() -> None:
    data = make_dataset(classes=2)
    with pytest.raises(InputError, match="mean: gives NaN or infinity on 30 of 30 units"):
        compare(dataclasses.replace(data, x=data.x * 1e30), ["mean"], seeds=1, recipe=QUICK, references=False)
