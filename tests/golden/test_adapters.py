"""Adapters hold for configs that no golden case shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.deconstructing_attention.indicators import indicators
from cenote.mix.local_attention_tkl.model import TKL
from cenote.mix.maps import on_map
from cenote.mix.metaformer.block import MetaFormerBlock
from cenote.mix.metaformer.pooling import PoolMixer
from tests.golden.cases import ADAPTERS, Case, load_adapters
from tests.golden.words import activation_of

load_adapters()
COPE = ("contextual-position-encoding", "ContextPosSelfAttn")
FORMS = ("deconstructing-attention", "equations 7, 8, 6 and appendix recurrence; indicators of section 4.4")
LONG = ("local-attention-tkl", "matchmaker.models.published.sigir20_tkl.TKL_sigir20")


def run(
    key: tuple[str, str],
    config: dict[str, Any],
    inputs: dict[str, Tensor],
    params: dict[str, Tensor] | None = None,
    expected: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    given = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    wanted = dict.fromkeys(expected, torch.zeros(()))
    return ADAPTERS[key](Case(*key, config, given, params or {}, wanted, Path(), {}))


def randomised(module: nn.Module) -> nn.Module:
    for value in module.parameters():
        nn.init.normal_(value, std=0.3)
    return module.eval()


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("GELU", nn.GELU()),
        ("GELU(exact)", nn.GELU()),
        ("nn.GELU(approximate='none')", nn.GELU()),
        ("GELU(tanh)", nn.GELU("tanh")),
        ("gelu_approx", nn.GELU("tanh")),
        ("Tanh", nn.Tanh()),
        ("nn.SiLU", nn.SiLU()),
        ("swish", nn.SiLU()),
        ("torch.nn.LeakyReLU()", nn.LeakyReLU()),
        ("ReLU6", nn.ReLU6()),
    ],
)
def test_words_of_activations(word: str, same: nn.Module) -> None:
    x = torch.linspace(-8, 8, 33)
    assert activation_of(word)()(x).equal(same(x))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(KeyError, match="Wave"):
        activation_of("Wave")


def test_attentive_convolution_of_another_activation() -> None:
    torch.manual_seed(0)
    mixer = randomised(ATConv(4, 3, act=nn.Tanh))
    x = torch.randn(2, 4, 5, 6)
    found = run(
        ("attentive-convolution", "ATConv"), {"dim": 4, "act_layer": "Tanh"}, {"x": x}, dict(mixer.state_dict())
    )
    torch.testing.assert_close(found["y"], on_map(mixer, x))


def test_metaformer_of_another_activation() -> None:
    torch.manual_seed(0)
    made = randomised(MetaFormerBlock(6, PoolMixer(), ratio=2.0, norm="layer", act=nn.SiLU))
    x = torch.randn(2, 6, 5, 4)
    config = {"dim": 6, "mlp_ratio": 2.0, "norm_layer": "models.LayerNormChannel", "act_layer": "nn.SiLU"}
    found = run(("metaformer", "PoolFormerBlock"), config, {"x": x}, dict(made.state_dict()))
    torch.testing.assert_close(found["y"], made(x))


def test_metaformer_of_cells_given_as_their_number() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 2, 3), torch.randn(6, 6)
    plain = randomised(MetaFormerBlock(6, PoolMixer(), norm="layer"))
    params = {**plain.state_dict(), "token_mixer.fc.weight": weight}
    config = {"dim": 6, "token_mixer": "SpatialFc", "spatial_shape": 6}
    found = run(("metaformer", "MetaFormerBlock"), config, {"x": x}, params)["y"]
    mixed = (plain.norm1(x).flatten(2) @ weight.T).view_as(x) * plain.layer_scale_1[:, None, None]
    after = x + mixed
    after = after + plain.mlp(plain.norm2(after)) * plain.layer_scale_2[:, None, None]
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("population", [True, False])
def test_deviation_over_heads_of_a_population_or_a_sample(population: bool) -> None:
    torch.manual_seed(0)
    given = {n: torch.randn(1, 3, 5, 4, dtype=torch.float64) for n in ("q_pre", "k", "v")}
    found = run(FORMS, {"causal": True, "std": "population" if population else "sample"}, given)
    deviation = found["attn"].tril().std(1, correction=0 if population else 1)
    torch.testing.assert_close(found["head_diversity"], deviation.sum((1, 2)) / 15)


def test_one_head_is_no_sample() -> None:
    with pytest.raises(ValueError, match="one makes no sample"):
        indicators(torch.ones(1, 1, 1), population=False)


def test_forms_that_are_not_causal() -> None:
    torch.manual_seed(0)
    given = {n: torch.randn(1, 2, 5, 4, dtype=torch.float64) for n in ("q_pre", "k", "v")}
    found = run(FORMS, {"causal": False}, given)
    q, k, v = given["q_pre"], given["k"], given["v"]
    products = q @ k.mT / 2
    torch.testing.assert_close(found["attn"], products.softmax(-1))
    pooled = (((nn.functional.silu(q) * k).sum(-1) / 2).softmax(-1).unsqueeze(2) @ v).expand_as(v)
    torch.testing.assert_close(found["out_nonapprox"], pooled)
    joint = 1 + products + products.square() / 2
    torch.testing.assert_close(found["out_taylor_joint"], joint @ v / joint.sum(-1, keepdim=True))
    orders = [torch.ones_like(products), q @ k.mT, q.square() @ k.square().mT]
    torch.testing.assert_close(found["out_taylor_literal"], sum(w @ v / w.sum(-1, keepdim=True) for w in orders))


@pytest.mark.parametrize("distances", [3, 6])
def test_contextual_positions_beside_relative_ones(distances: int) -> None:
    torch.manual_seed(0)
    n, width = 6, 4
    given = {name: torch.randn(2, n, width, dtype=torch.float64) for name in ("query", "key", "val")}
    given["attn_mask"] = torch.ones(2, n, n, dtype=torch.float64).tril()
    given["pos_emb"] = torch.zeros(1, width, 7, dtype=torch.float64)
    # the last column is the token itself
    table = torch.randn(1, width, distances, dtype=torch.float64)
    config = {"head_dim": width, "cope_npos": None, "block_size": n, "pos_emb": "cope+rel"}
    found = run(COPE, config, given, {"rel_pos_emb.emb": table}, ("grad.query",))
    scores = given["query"] @ given["key"].mT
    for i in range(n):
        for j in range(i + 1):
            if i - j < distances:
                scores[:, i, j] += given["query"][:, i] @ table[0, :, distances - 1 - (i - j)]
    scores = (scores / 2).masked_fill(given["attn_mask"] == 0, -torch.inf)
    torch.testing.assert_close(found["attn"], scores.softmax(-1))
    # layers between those that count have relative positions alone
    del given["pos_emb"]
    between = run(COPE, {**config, "cope_layers": 2, "lay_ind": 0}, given, {"rel_pos_emb.emb": table})
    torch.testing.assert_close(between["attn"], scores.softmax(-1))


@pytest.mark.parametrize("rows", [4, 1])
def test_long_documents_by_logarithms(rows: int) -> None:
    torch.manual_seed(0)
    model = randomised(
        TKL(8, heads=2, layers=1, hidden=8, saturation="log", queries=4, documents=50, published=True)
    ).double()
    multiples = torch.rand(rows, 1, 1, 1, 11, dtype=torch.float64) + 0.5
    with torch.no_grad():
        model.saturated.gain.copy_(multiples[0].flatten())
    own = dict(model.state_dict())
    params = {
        "mu": own["saturated.means"],
        "sigma": own["saturated.deviations"],
        "positional_features_q": own["reader.query_positions"][None],
        "positional_features_d": own["reader.document_positions"][None],
        "mixer": own["reader.mixer"],
        "mixer_sat": torch.rand(1),
        "mixer_end": torch.rand(1),
        "kernel_mult": multiples,
        "chunk_scoring": own["top.weights"][None],
        "dense.weight": own["saturated.dense.weight"],
        "sat_emb_reduce1.weight": torch.randn(1, 8),
        "sat_normer.weight": torch.ones(2),
        "sat_normer.bias": torch.ones(2),
    }
    for number in ("", "2", "3"):
        params |= {
            f"saturation_linear{number}.weight": torch.ones(1, 2),
            f"saturation_linear{number}.bias": torch.ones(1),
        }
    encoder = "reader.encoder."
    params |= {f"contextualizer.{n.removeprefix(encoder)}": x for n, x in own.items() if n.startswith(encoder)}
    config = {
        "_embsize": 8,
        "kernels_mu": own["saturated.means"].tolist(),
        "kernels_sigma": own["saturated.deviations"].tolist(),
        "att_heads": 2,
        "att_layer": 1,
        "att_ff_dim": 8,
        "use_pos_encoding": True,
        "use_diff_posencoding": True,
        "saturation_type": "log",
        "chunk_size": 40,
        "overlap": 5,
        "sliding_window_size": 30,
        "top_k_chunks": 3,
    }
    query, document = (torch.randn(2, n, 8, dtype=torch.float64) for n in (4, 60))
    masks = [torch.ones(2, n, dtype=torch.float64) for n in (4, 60)]
    inputs = {"query": query, "doc": document, "query_mask": masks[0], "doc_mask": masks[1]}
    found = run(LONG, config, inputs, params)
    torch.testing.assert_close(found["score"], model(query, document, *(m.bool() for m in masks)))
