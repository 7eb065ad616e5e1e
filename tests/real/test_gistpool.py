"""Compressed contexts of SmolLM2: nothing lost where nothing is left out, bytes as declared, decoding as recomputing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core.answers import Answered
from cenote.core.planted import FactPrompts, planted, prompts, recalled
from cenote.reduce.gistpool.compressors import AveragePool, Compressor, FullContext, GistPool, NoContext
from cenote.reduce.gistpool.windows import cost

pytestmark = pytest.mark.real("a decoder of 135 million parameters")

PROSE = (
    "The boundary layer on a flat plate was studied at low speed. The flow was found to separate behind the step. Heat "
    "transfer to a blunt body is largest at the stagnation point. The measured values agree with theory. A thin wing at small "
    "incidence was tested in the tunnel. Its lift grows with the angle until the flow leaves the upper side. Pressure was "
    "read at forty holes along the chord. The results are compared with those of other tunnels."
)


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def of(compressor: Compressor, model: Any, asked: FactPrompts) -> Answered:
    """One context, read once, for all its questions."""
    left = compressor.compress(model, asked.context)

    def tell(_: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        return compressor.answer(model, prompt, left.of(torch.zeros(len(prompt), dtype=torch.long)), mask)

    return recalled(tell, asked)


def test_facts_are_recalled_from_the_whole_context_and_from_windows_of_one(smollm2: Any) -> None:
    model, tokenizer = smollm2
    asked = prompts(tokenizer, planted([PROSE], facts=4, seed=3))
    full = of(FullContext(model, adapt=None), model, asked)
    assert full.right.float().mean() >= 0.75
    single = of(AveragePool(model, 1, adapt=None), model, asked)
    assert single.agrees(full).all()
    assert torch.allclose(single.nll, full.nll, atol=0.02)
    none = of(NoContext(model, adapt=None), model, asked)
    assert not none.right.any()
    assert (none.nll > full.nll + 3).all()


@pytest.mark.parametrize("ratio", [2, 4])
def test_a_compressed_context_of_a_real_decoder(smollm2: Any, ratio: int) -> None:
    model, tokenizer = smollm2
    asked = prompts(tokenizer, planted([PROSE], facts=4, seed=3))
    before = model(asked.prompt[:1]).logits
    tokens, config = asked.context.shape[1], model.config
    for compressor in (
        AveragePool(model, ratio, adapt=None),
        GistPool(model, ratio, adapt=None),
        GistPool.plain(model, ratio, adapt=None),
    ):
        left = compressor.compress(model, asked.context)
        kv_heads = config.num_key_value_heads
        width = config.hidden_size // config.num_attention_heads
        declared = cost(tokens, 1, ratio, blocks=config.num_hidden_layers, kv_heads=kv_heads, width=width)
        assert left.bytes == declared.bytes
        assert left.mask.shape == (1, -(-tokens // ratio))
        prompt = asked.prompt[:2, :6]
        two = left.of(torch.tensor([0, 0]))
        made = compressor.generate(model, prompt, two, asked.mask[:2, :6], new_tokens=4)
        again = torch.cat([prompt, made], 1)
        real = torch.nn.functional.pad(asked.mask[:2, :6], (0, 4), value=True)
        logits = compressor.answer(model, again, two, real)
        assert torch.equal(logits[:, 5:-1].argmax(-1), made)
    assert torch.equal(model(asked.prompt[:1]).logits, before)
