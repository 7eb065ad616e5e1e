"""The mean of all tokens for each of them: closed forms, and networks of one's own and of others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.base import Mixer
from cenote.mix.context_broadcasting.broadcasting import (
    ContextBroadcasting,
    ScaledContextBroadcasting,
    SqueezeExcitation,
)
from cenote.mix.context_broadcasting.live import broadcasting
from cenote.mix.context_broadcasting.training import ARMS, train_arms
from cenote.mix.density import attention_density, density_of
from cenote.mix.image_training import Recipe
from cenote.mix.vision import SPOTS, MixedViT, Spot


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_constant_tokens_stay_the_mean_is_kept_and_deviations_are_halved() -> None:
    cb, x = ContextBroadcasting(), randn(2, 7, 5)
    constant = x[:, :1].expand(-1, 7, -1)
    torch.testing.assert_close(cb(constant), constant)
    y, mean = cb(x), x.mean(1, keepdim=True)
    torch.testing.assert_close(y.mean(1, keepdim=True), mean)
    torch.testing.assert_close(y - mean, (x - mean) / 2)
    torch.testing.assert_close(cb(y), x / 4 + 3 * mean / 4)


def test_it_is_half_a_head_without_scores() -> None:
    x = randn(2, 7, 5)
    zeros = torch.zeros_like(x)
    uniform = torch.nn.functional.scaled_dot_product_attention(zeros, zeros, x)
    torch.testing.assert_close(ContextBroadcasting()(x), (x + uniform) / 2)


def test_its_sum_has_a_gradient_of_ones() -> None:
    x = randn(2, 7, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(ContextBroadcasting()(x).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_one_token_and_no_factor() -> None:
    x = randn(2, 1, 5)
    torch.testing.assert_close(ContextBroadcasting()(x), x)
    scaled = ScaledContextBroadcasting(5, 0.5).double()
    torch.testing.assert_close(scaled(x), 1.5 * x)
    y = randn(2, 7, 5)
    torch.testing.assert_close(ScaledContextBroadcasting(5, 0.0).double()(y), y)
    torch.testing.assert_close(scaled(y), y + 0.5 * y.mean(1, keepdim=True))
    assert float((ScaledContextBroadcasting(5).double()(y) - y).abs().max()) < 1e-4


def test_the_running_mean_is_that_of_the_prefix() -> None:
    x = randn(2, 7, 5)
    y = ContextBroadcasting(running=True)(x)
    for n in range(1, 8):
        torch.testing.assert_close(y[:, n - 1], (x[:, n - 1] + x[:, :n].mean(1)) / 2)
    changed = torch.cat([x[:, :4], randn(2, 3, 5, seed=1)], 1)
    torch.testing.assert_close(ContextBroadcasting(running=True)(changed)[:, :4], y[:, :4])


def test_padding_is_not_in_the_mean() -> None:
    x, mask = randn(2, 7, 5), torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    y = ContextBroadcasting()(x, mask)
    torch.testing.assert_close(y[1, :3], ContextBroadcasting()(x[1:, :3])[0])
    assert not y[1, 3:].any()


def test_density_of_uniform_and_one_hot_rows() -> None:
    uniform = torch.full((2, 3, 6, 6), 1 / 6)
    found = attention_density(uniform)
    torch.testing.assert_close(found.nats, torch.full((2, 3), math.log(6)))
    torch.testing.assert_close(found.share, torch.ones(2, 3))
    one_hot = torch.eye(6).expand(2, 3, -1, -1)
    assert not attention_density(one_hot).nats.any()
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    weights = torch.where(mask[:, None, None, :], 1 / mask.sum(1)[:, None, None, None], 0.0).expand(-1, 3, 6, -1)
    torch.testing.assert_close(attention_density(weights, mask).share, torch.ones(2, 3))
    assert attention_density(torch.ones(1, 1, 1, 1)).share.tolist() == [[0.0]]
    with pytest.raises(InputError, match="weights"):
        attention_density(torch.ones(2, 2, 2))  # type: ignore[arg-type]


def vit(spots: Any = None, **settings: Any) -> MixedViT:
    return MixedViT((8, 8), (4, 4), dim=12, depth=2, heads=2, classes=3, spots=spots, channels=1, **settings)


@pytest.mark.parametrize("spot", SPOTS)
def test_it_stands_at_each_place_of_a_branch(spot: Spot) -> None:
    def scaled(dim: int) -> Mixer:
        return ScaledContextBroadcasting(dim, 0.0)

    images = torch.rand(2, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = vit()
        torch.manual_seed(0)
        changed = vit({spot: scaled})
    torch.testing.assert_close(changed(images), plain(images))
    factors = [p for p in changed.parameters() if p.shape in ((12,), (48,)) and not p.any()]
    for name, p in changed.named_parameters():
        if name.endswith("scale"):
            p.data.fill_(0.7)
    assert len(factors) >= 2
    assert not torch.allclose(changed(images), plain(images))


def test_at_the_end_of_the_mlp_it_stands_before_the_skip() -> None:
    net = vit({"mlp end": lambda _dim: ContextBroadcasting()}).double()
    block, x = net.blocks[0], randn(1, 5, 12)
    h = x + block.attn(block.norm1(x))[0]  # type: ignore[operator]
    expected = h + ContextBroadcasting()(block.mlp(block.norm2(h)))  # type: ignore[operator]
    torch.testing.assert_close(block(x)[0], expected)


def test_a_uniform_head_beside_the_others_or_for_one() -> None:
    images = torch.rand(2, 1, 8, 8)
    for uniform, heads in (("added", 3), ("replacing", 2)):
        weights = vit(uniform=uniform).see(images).attentions[0]
        assert weights.shape == (2, heads, 5, 5)
        torch.testing.assert_close(weights[:, -1], torch.full((2, 5, 5), 0.2))


def test_arms_start_from_the_same_numbers() -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(epochs=2, learning_rate=1e-3, per=4, warm_up=1, mixup=0, cutmix=0, magnitude=0, erasing=0)
    arms = {**ARMS, "again": {}, "squeeze": {"mlp end": SqueezeExcitation}}
    nets = train_arms(vit, images, torch.arange(8) % 3, arms, recipe, batch=4)
    assert list(nets) == ["plain", "CB", "CB_S", "again", "squeeze"]
    weights = {name: net.head.weight for name, net in nets.items()}
    assert torch.equal(weights["plain"], weights["again"])
    assert not torch.equal(weights["plain"], weights["CB"])


def encoder(kind: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=2, **sizes))
        return model.eval(), {"pixel_values": torch.rand(2, 3, 8, 8)}
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=20, **sizes, num_key_value_heads=3)
        return transformers.LlamaModel(config).eval(), {"input_ids": torch.tensor([[4, 5, 6, 7]])}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return model, {"input_ids": torch.tensor([[4, 5, 6, 7], [4, 5, 0, 0]]), "attention_mask": mask}


@pytest.mark.parametrize("spot", SPOTS)
def test_a_vit_of_transformers_is_restored_to_the_bit(spot: Spot) -> None:
    model, inputs = encoder("vit")
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with broadcasting(model, inputs, spot=spot) as mixers:
            assert list(mixers) == [0, 1]
            assert not torch.allclose(model(**inputs).last_hidden_state, plain)
        assert torch.equal(model(**inputs).last_hidden_state, plain)
        with broadcasting(model, inputs, lambda dim: ScaledContextBroadcasting(dim, 0.0), spot=spot):
            torch.testing.assert_close(model(**inputs).last_hidden_state, plain)


def test_a_bert_is_told_what_is_padding() -> None:
    model, inputs = encoder("bert")
    mask = inputs["attention_mask"].bool()
    short = {"input_ids": inputs["input_ids"][1:, :2]}
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with broadcasting(model, inputs, mask=mask):
            padded = model(**inputs).last_hidden_state[1, :2]
        with broadcasting(model, short):
            alone = model(**short).last_hidden_state[0]
        torch.testing.assert_close(padded, alone)
        with pytest.raises(RuntimeError), broadcasting(model, inputs):
            raise RuntimeError
        assert torch.equal(model(**inputs).last_hidden_state, plain)
        with (
            pytest.raises(InputError, match="spot: block 0 has no norm"),
            broadcasting(model, inputs, spot="attention front"),
        ):
            pass


def test_a_causal_model_is_refused_unless_the_mean_runs() -> None:
    model, inputs = encoder("llama")
    with pytest.raises(InputError, match="reads from left to right"), broadcasting(model, inputs):
        pass
    other = {"input_ids": torch.tensor([[4, 5, 9, 9]])}
    with torch.no_grad(), broadcasting(model, inputs, lambda _dim: ContextBroadcasting(running=True)):
        one, two = (model(**x).last_hidden_state[:, :2] for x in (inputs, other))
    torch.testing.assert_close(one, two)


def test_density_of_a_running_model() -> None:
    model, inputs = encoder("bert")
    found = density_of(model, inputs, inputs["attention_mask"].bool())
    assert [d.share.shape for d in found] == [(2, 3)] * 2
    assert all(0 < float(d.share.min()) <= float(d.share.max()) <= 1 + 1e-6 for d in found)
