"""Whoever pools bags can ask which instances counted."""

import inspect

import pytest
import torch
from tests.pools import QUICK_SETTINGS, randn, shaken

import cenote
from cenote.core import Bags
from cenote.pool import DeepSet
from cenote.pool.attention.adaptive_noise_pooling.attenuator import Attenuator
from cenote.pool.sequence.layer_aware_tdnn.model import LayerAwareTDNN

# learn something for each place of a fixed number of tokens, which bags have not
FIXED = {"abmilp-positions", "clip", "cbam"}
SMALL = {"latents": 4, "heads": 2, "channels": 16, "hidden": 8, "loss_heads": 1}
METHODS = [m.name for m in cenote.methods(room="pool", kind="sets") if m.name not in FIXED]


def bags() -> Bags:
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Bags(values, torch.tensor([0, 5, 12]))


@pytest.mark.parametrize("name", METHODS)
def test_every_pool_of_bags_scores_their_instances(name: str) -> None:
    pool = shaken(cenote.create(name, dim=8))
    weights = pool.attend(bags()).weights
    assert weights is not None
    assert weights.shape[-1] == 12
    assert bool(weights.isfinite().all())
    assert bool((weights != 0).any())


@pytest.mark.parametrize("name", sorted(FIXED) + [m.name for m in cenote.methods(room="pool", kind="layers")])
def test_pools_of_fixed_sets_and_of_layers_score_their_tokens(name: str) -> None:
    sizes = {"tokens": 9} if name in FIXED else {"layers": 3}
    settings = QUICK_SETTINGS.get(name, {}) | (SMALL if name.startswith(("multi-layer-tr", "layer-aware")) else {})
    accepted = inspect.signature(cenote.method(name).load()).parameters
    given = {k: v for k, v in (sizes | settings).items() if k in accepted}
    pool = shaken(cenote.create(name, dim=8, **given))
    x = randn(2, 9, 8) if name in FIXED else randn(2, 3, 9, 8)
    weights = pool.attend(x).weights
    assert weights is not None
    assert weights.shape[2:] == x.shape[1:-1]
    assert bool(weights.isfinite().all())
    assert bool((weights != 0).any())


def test_layer_aware_weights_are_shares_of_layers_times_those_of_frames() -> None:
    pool = shaken(LayerAwareTDNN(8, layers=3, front=None, hidden=4, heads=2, out_dim=5))
    x, mask = randn(2, 3, 7, 8), torch.arange(7) < torch.tensor([[7], [4]])
    weights = pool.attend(x, mask).weights
    assert weights is not None
    torch.testing.assert_close(weights.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    assert not weights[1, :, :, 4:].any()
    y = pool.layer_pool.projected(x.permute(0, 3, 1, 2), mask)
    by_head = y.unflatten(1, (2, -1)) * pool.layer_gates(x, mask).unsqueeze(2)
    winner = by_head.flatten(1, 2).argmax(2)[0, :, 2]
    shares = weights[0, 0, :, 2] / weights[0, 0, :, 2].sum()
    torch.testing.assert_close(shares, torch.bincount(winner, minlength=3).double() / 4)
    assert shares.max() < 1


def test_a_learned_token_shows_what_it_took_in_the_last_layer() -> None:
    model = shaken(Attenuator(8, pooling="cls", layers=1, heads=2, cls_tokens=2, cls_index=1, query_embedding=False))
    x = randn(1, 5, 8)
    _, weights = model.attend(x)
    layer = model.layers[0]
    tokens = layer.norm1(torch.cat([model.cls_token, x], 1))[0]
    q, k, _ = layer.attn.qkv(tokens).chunk(3, -1)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        row = torch.softmax(q[1, part] @ k[:, part].T / 8**0.5, -1)
        torch.testing.assert_close(weights[0, head], row[2:])


@pytest.mark.parametrize("padded", [False, True])
def test_pools_that_read_places_show_which(padded: bool) -> None:
    x: Bags | torch.Tensor = bags()
    mask = None
    if padded:
        x, mask = bags().to_padded()
        # padding may stand anywhere
        x, mask = x.flip(1), mask.flip(1)
    for name, heads in (("cls", 1), ("last", 1), ("cls-mean", 2)):
        pool = cenote.create(name, dim=8)
        output, weights = pool.attend(x, mask)
        assert weights is not None
        for i, values in enumerate(bags()):
            rows = weights[i][:, mask[i]] if mask is not None else weights[:, [slice(0, 5), slice(5, 12)][i]]
            assert rows.sum(-1).tolist() == pytest.approx([1.0] * heads)
            if mask is not None:
                assert not weights[i][:, ~mask[i]].any()
            inside = x[i] if mask is None else x[i][mask[i]]
            assert torch.equal(inside.sort(0).values, values.sort(0).values)
            torch.testing.assert_close((rows @ inside).flatten(), output[i])


def test_one_more_block_shows_attention_rolled_out() -> None:
    pool = shaken(cenote.create("dinovit", dim=8, heads=2))
    x = bags()[1].unsqueeze(0)
    _, weights = pool.attend(x)
    norm, qkv = pool.block.norm1(x), pool.block.attn.qkv.weight
    for head in range(2):
        q, k = (norm @ qkv[8 * part + 4 * head : 8 * part + 4 * head + 4].T for part in (0, 1))
        seen = torch.softmax(q @ k.transpose(1, 2) / 2, -1)
        rolled = ((seen + torch.eye(7)) / 2).mean(1)
        torch.testing.assert_close(weights[:, head], rolled)
    assert weights.sum(-1).flatten().tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("reduce", "total"), [("mean", 1.0), ("max", 1.0), ("sum", 5.0)])
def test_deep_sets_show_the_weights_of_the_pooling_inside(reduce: str, total: float) -> None:
    pool = shaken(DeepSet(8, reduce=reduce))  # type: ignore[arg-type]
    output, weights = pool.attend(bags())
    torch.testing.assert_close(output, pool(bags()))
    assert weights is not None
    assert float(weights[0, :5].sum()) == pytest.approx(total)
    assert bool((weights >= 0).all())
