import copy
import math
from functools import partial

import pytest
import torch
from tests.pools import by_rules, randn
from torch import nn
from torch.optim import Adam

from cenote.core import Bags, InputError
from cenote.pool import AttSets, AttSetsConv, FASet
from cenote.pool.attention.attsets.faset import Batch
from cenote.pool.attention.attsets.occupancy import best_threshold, iou, iou_by_views, occupancy_loss
from cenote.pool.attention.attsets.running import RunningAttSets
from cenote.testing import check_pool


def pool_of(dim: int, **settings: object) -> AttSets:
    pool = AttSets(dim, **settings).double()
    nn.init.normal_(pool.score.bias)
    return pool


def test_it_is_its_equation() -> None:
    pool = pool_of(6, outputs=2)
    x = randn(3, 5, 6)
    w, b = pool.score.weight.T, pool.score.bias
    expected = []
    for m in range(2):
        c = (x @ w[:, 6 * m : 6 * m + 6] + b[6 * m : 6 * m + 6]).exp()
        expected.append((c / c.sum(1, keepdim=True) * x).sum(1))
    torch.testing.assert_close(pool(x), torch.cat(expected, -1))


def test_one_element_passes_through() -> None:
    x = randn(4, 1, 6)
    assert torch.equal(pool_of(6)(x), x[:, 0])
    assert torch.equal(pool_of(6, outputs=3)(x), x[:, 0].repeat(1, 3))


def test_zero_scores_give_the_mean_and_huge_ones_the_token_of_the_best_score() -> None:
    pool = pool_of(6)
    x = randn(3, 5, 6)
    scores = pool.score(x)
    with torch.no_grad():
        pool.score.weight *= 1e6
        pool.score.bias *= 1e6
    best = x.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(pool(x), best)
    nn.init.zeros_(pool.score.weight)
    nn.init.zeros_(pool.score.bias)
    torch.testing.assert_close(pool(x), x.mean(1))


def test_bias_is_without_effect() -> None:
    pool = pool_of(6, outputs=2)
    x = randn(3, 5, 6)
    y = pool(x)
    (gradient,) = torch.autograd.grad((y * randn(3, 12)).sum(), pool.score.bias)
    assert gradient.abs().max() < 1e-14
    with torch.no_grad():
        pool.score.bias += randn(12)
    torch.testing.assert_close(pool(x), y)


def test_a_copy_of_every_element_changes_nothing() -> None:
    pool = pool_of(6)
    x = randn(3, 5, 6)
    torch.testing.assert_close(pool(torch.cat([x, x], 1)), pool(x))


def test_channel_weights_sum_to_one_over_real_tokens() -> None:
    pool = pool_of(6, outputs=2)
    x = randn(3, 5, 6)
    mask = torch.tensor([[True] * 5, [True, False] * 2 + [False], [True] + [False] * 4])
    weights = pool.channel_weights(x, mask)
    assert weights.shape == (3, 5, 2, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 2, 6, dtype=torch.float64))
    assert not weights[~mask].any()
    torch.testing.assert_close(pool.channel_weights(Bags.from_padded(x, mask)), weights[mask])
    torch.testing.assert_close(pool.attend(x, mask).weights, weights.mean(-1).transpose(1, 2))


def test_softmax_aggregation_is_the_special_case_of_a_scaled_identity() -> None:
    """`softmax(t x)` per channel, PyTorch Geometric's SoftmaxAggregation, is `W = t I`, `b = 0`."""
    pool = pool_of(6)
    with torch.no_grad():
        pool.score.weight.copy_(0.7 * torch.eye(6))
        pool.score.bias.zero_()
    x = randn(3, 5, 6)
    torch.testing.assert_close(pool(x), ((0.7 * x).softmax(1) * x).sum(1))


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"tanh": True}, {"outputs": 3}, {"outputs": 2, "tanh": True}])
def test_further_settings_keep_the_contract(settings: dict[str, object], left_out: tuple[str, ...]) -> None:
    check_pool(AttSets(8, **settings), leave_out=left_out)


@pytest.mark.parametrize(("space", "places"), [(2, (4, 3)), (3, (2, 4, 3))])
@pytest.mark.parametrize("tanh", [False, True])
def test_conv_with_kernel_one_is_the_plain_form_at_every_place(space: int, places: tuple[int, ...], tanh: bool) -> None:
    plain = pool_of(5, outputs=2, tanh=tanh)
    conv = AttSetsConv(5, outputs=2, space=space, kernel_size=1, tanh=tanh).double()
    with torch.no_grad():
        conv.score.weight.copy_(plain.score.weight.view_as(conv.score.weight))
        conv.score.bias.copy_(plain.score.bias)
    x = randn(2, 6, 5, *places)
    mask = torch.rand(2, 6) > 0.3
    by_place = x.flatten(3).permute(3, 0, 1, 2)
    expected = torch.stack([plain(place, mask) for place in by_place], -1).unflatten(-1, places)
    x = x.masked_fill(~mask.view(2, 6, *[1] * (1 + space)), float("nan"))
    torch.testing.assert_close(conv(x, mask), expected)
    weights = conv.channel_weights(x, mask)
    assert weights.shape == (2, 6, 2, 5, *places)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 2, 5, *places, dtype=torch.float64))


def test_conv_scores_look_at_neighbours_and_one_view_passes_through() -> None:
    conv = AttSetsConv(3).double()
    x = randn(2, 4, 3, 5, 5)
    changed = x.clone()
    changed[:, 0, :, 2, 2] += 1
    moved = (conv(x) != conv(changed)).any(1).any(0)
    assert moved[1:4, 1:4].all()
    assert int(moved.sum()) == 9
    assert torch.equal(conv(x[:, :1]), x[:, 0])
    order = torch.randperm(4)
    torch.testing.assert_close(conv(x[:, order]), conv(x))
    assert not conv(x, torch.zeros(2, 4, dtype=torch.bool)).any()


class Autoencoder(nn.Module):
    """With a BatchNorm and a dropout, so that a stage that should be frozen has buffers to spoil and noise to make."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.attention = AttSets(8)
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder(self.attention(self.encoder(x), mask))


def views(sets: int, count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(sets, 6, generator=generator)
    seen = torch.rand(sets, count, 6, generator=generator) > 0.5
    return Batch(target.unsqueeze(1) * seen, target)


def split(model: Autoencoder) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = copy.deepcopy(model.state_dict())
    attention = {k: v for k, v in state.items() if k.startswith("attention.")}
    return {k: v for k, v in state.items() if k not in attention}, attention


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(a[k], b[k]) for k in a]


def test_each_stage_leaves_the_other_part_alone_bit_for_bit() -> None:
    model = Autoencoder()
    trainer = FASet(model, model.attention, nn.functional.mse_loss, partial(Adam, lr=1e-2, weight_decay=0.1))
    base_0, attention_0 = split(model)
    trainer.base_step(views(8, 5))
    base_1, attention_1 = split(model)
    assert all(same(attention_0, attention_1))
    assert not any(same(base_0, base_1))
    trainer.attention_step(views(8, 5))
    base_2, attention_2 = split(model)
    assert all(same(base_1, base_2))
    assert not torch.equal(attention_1["attention.score.weight"], attention_2["attention.score.weight"])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    trainer.base_step(views(8, 5))
    assert all(same(attention_2, split(model)[1]))


def test_base_step_is_a_step_on_single_elements() -> None:
    model = Autoencoder().eval()
    twin = copy.deepcopy(model)
    batch = views(4, 3)
    trainer = FASet(model, model.attention, nn.functional.mse_loss)
    torch.manual_seed(1)
    loss = trainer.base_step(batch)

    twin.train()
    optimizer = Adam([*twin.encoder.parameters(), *twin.decoder.parameters()], lr=1e-4)
    torch.manual_seed(1)
    singles = batch.x.reshape(12, 1, 6)
    expected = nn.functional.mse_loss(twin(singles), batch.target.repeat_interleave(3, 0))
    expected.backward()
    optimizer.step()
    assert math.isclose(loss, expected.item(), rel_tol=1e-6)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert not model.training


def test_masked_slots_are_no_elements() -> None:
    model, twin = Autoencoder(), Autoencoder()
    twin.load_state_dict(model.state_dict())
    x, target, _ = views(4, 3)
    mask = torch.tensor([[True] * 3] * 4)
    junk = torch.cat([x, torch.full((4, 2, 6), 1e3)], 1)
    padded = Batch(junk, target, torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], 1))
    losses = []
    for net, batch in ((model, padded), (twin, Batch(x, target))):
        trainer = FASet(net, net.attention, nn.functional.mse_loss)
        torch.manual_seed(1)
        losses.append([trainer.base_step(batch), trainer.attention_step(batch)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("alternate", [False, True])
def test_training_lowers_both_losses(alternate: bool) -> None:
    model = Autoencoder()
    trainer = FASet(model, model.attention, nn.functional.mse_loss, partial(Adam, lr=1e-2))
    batches = [tuple(views(16, 6, seed)) for seed in range(4)]
    losses = trainer.fit(batches, base_epochs=25, attention_epochs=15, alternate=alternate)
    assert len(losses.base) == (40 if alternate else 25)
    assert len(losses.attention) == (40 if alternate else 15)
    assert losses.base[-1] < 0.9 * losses.base[0]
    assert losses.attention[-1] < losses.attention[0]


@pytest.mark.parametrize("settings", [{}, {"outputs": 2, "tanh": True}])
def test_views_one_by_one_are_all_at_once(settings: dict[str, object]) -> None:
    pool, x = pool_of(6, **settings), 30 * randn(3, 5, 6)
    mask = torch.tensor([[True] * 5, [False, True, False, True, False], [False] * 5])
    running, masked = RunningAttSets(pool), RunningAttSets(pool)
    for n in range(5):
        torch.testing.assert_close(running.add(x[:, n : n + 1]), pool(x[:, : n + 1]))
        seen = masked.add(x[:, n : n + 1], mask[:, n : n + 1])
        torch.testing.assert_close(seen, pool(x[:, : n + 1], mask[:, : n + 1]))
    pieces = RunningAttSets(pool)
    pieces.add(x[:, 3:])
    torch.testing.assert_close(pieces.add(x[:, :3]), pool(x))
    with pytest.raises(InputError, match="x"):
        pieces.add(x[..., :5])


def test_gradients_of_views_one_by_one() -> None:
    pool, x = pool_of(6), randn(2, 3, 6).requires_grad_()
    running = RunningAttSets(pool)
    for view in x.split(1, 1):
        y = running.add(view)
    inputs = [x, pool.score.weight]
    for got, expected in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(pool(x).square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_occupancy_is_judged_by_its_voxels() -> None:
    p = torch.tensor([[[0.9, 0.6], [0.2, 0.1]], [[0.4, 0.3], [0.2, 0.1]]])
    truth = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    torch.testing.assert_close(iou(p, truth), torch.tensor([1 / 3, 0.0]))
    assert iou(p, torch.zeros_like(truth), 0.95).tolist() == [1.0, 1.0]
    # above 0.25: two of three, and all
    assert best_threshold(p, truth, (0.05, 0.25, 0.5)) == 0.25
    loss = nn.functional.binary_cross_entropy(p, truth.float())
    torch.testing.assert_close(occupancy_loss(p, truth.float()), loss)
    assert occupancy_loss(torch.zeros(1, 3), torch.ones(1, 3)).isfinite()


def test_iou_by_the_number_of_views() -> None:
    truth = torch.tensor([[True, True, False]])
    views = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert iou_by_views(lambda x: x.amax(1), views, truth, (1, 2, 3)) == pytest.approx({1: 0.5, 2: 1.0, 3: 2 / 3})
    with pytest.raises(InputError, match="counts: expected numbers of views from 1 to 3"):
        iou_by_views(lambda x: x.amax(1), views, truth, (4,))
    with pytest.raises(InputError, match="thresholds"):
        best_threshold(views, views > 0, ())


def test_wrong_arguments_are_named() -> None:
    model = Autoencoder()
    with pytest.raises(InputError, match="attention: is no part"):
        FASet(model, AttSets(8), nn.functional.mse_loss)
    with pytest.raises(InputError, match="attention: has no parameter"):
        FASet(model, model.encoder[1], nn.functional.mse_loss)
    with pytest.raises(InputError, match="model: has no parameter"):
        FASet(model, model, nn.functional.mse_loss)
    with pytest.raises(InputError, match="batches"):
        FASet(model, model.attention, nn.functional.mse_loss).fit(iter([views(2, 2)]))
    with pytest.raises(InputError, match="outputs"):
        AttSets(8, outputs=0)
    with pytest.raises(InputError, match="space"):
        AttSetsConv(8, space=1)
    with pytest.raises(InputError, match="kernel_size"):
        AttSetsConv(8, kernel_size=2)
    with pytest.raises(InputError, match="batch, views, 8"):
        AttSetsConv(8)(torch.randn(2, 8, 4, 4))
    with pytest.raises(InputError, match="mask"):
        AttSetsConv(8)(torch.randn(2, 3, 8, 4, 4), torch.ones(2, 4, dtype=torch.bool))
