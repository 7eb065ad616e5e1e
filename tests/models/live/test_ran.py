from __future__ import annotations

import pytest
import torch
from tests.models.live import zoo
from torch import nn

from cenote.core import InputError
from cenote.models.live import frozen, layers, of_heads, one_stack

PRE = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi", "vit", "dinov2")


@pytest.mark.parametrize("name", [*PRE, "bert", "roberta", "gemma2"])
@torch.no_grad()
def test_projections_and_orders_are_found_by_what_happens(name: str) -> None:
    case = zoo.MODELS[name]("eager" if name in zoo.EAGER_ONLY else "sdpa")
    for layer in layers(case.model, case.inputs):
        maps = of_heads(layer.projection, layer.call.heads)
        y = layer.heads
        expected = layer.projection(y.transpose(1, 2).flatten(2))
        bias = layer.projection.bias if layer.projection.bias is not None else 0.0
        assert torch.allclose((y @ maps).sum(1) + bias, expected, atol=1e-5)
        assert layer.order == ("pre" if name in PRE else "other" if name == "gemma2" else "post")


@pytest.mark.parametrize("dim", [6, 7])
@pytest.mark.parametrize("kind", ["LayerNorm", "LlamaRMSNorm", "Gemma2RMSNorm"])
@torch.no_grad()
def test_norms_are_held_fixed(kind: str, dim: int) -> None:
    norm = {
        "LayerNorm": lambda: nn.LayerNorm(dim, eps=1e-3),
        "LlamaRMSNorm": lambda: __import__("transformers").models.llama.modeling_llama.LlamaRMSNorm(dim, 1e-3),
        "Gemma2RMSNorm": lambda: __import__("transformers").models.gemma2.modeling_gemma2.Gemma2RMSNorm(dim, 1e-3),
    }[kind]()
    for p in norm.parameters():
        p.copy_(torch.randn(p.shape))
    x = torch.randn(2, 3, dim)
    found = frozen(norm, x, norm(x))
    assert found.centres is (kind == "LayerNorm")
    again = found.mapped(x.double()) / found.deviation[..., None] + found.bias
    assert torch.allclose(again, norm(x).double(), atol=1e-5)
    u = torch.randn(dim, dtype=torch.float64)
    assert torch.allclose(found.back(u) @ x[0, 0].double(), u @ found.mapped(x[0, 0].double()))


def test_what_is_no_norm_is_refused() -> None:
    x = torch.randn(2, 3, 6)
    with pytest.raises(InputError, match="Tanh is no norm of the form"):
        frozen(nn.Tanh(), x, nn.Tanh()(x))


def test_a_projection_without_readable_weights_is_refused() -> None:
    class Packed(nn.Module):
        weight = torch.zeros(3, 4, dtype=torch.uint8)

    with pytest.raises(InputError, match="the output projection is a Packed"):
        of_heads(Packed(), 2)


def test_models_with_several_stacks_need_a_name() -> None:
    case = zoo.seq2seq("BartModel", **zoo.BART)("sdpa")
    with pytest.raises(InputError, match="stack: the model has 2 lists of blocks"):
        one_stack(case.model)
    assert {layer.order for layer in layers(case.model, case.inputs, "encoder.layers")} == {"post"}


def test_shared_blocks_are_refused() -> None:
    case = zoo.MODELS["albert"]("sdpa")
    with pytest.raises(InputError, match=r"ran 3 times in one forward; expected once"):
        layers(case.model, case.inputs)
