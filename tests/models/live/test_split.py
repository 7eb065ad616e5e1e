from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cenote.core import InputError
from cenote.models.live import from_states, recorded, stack_blocks, states_before
from tests import tiny

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
ROTARY = {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0}
ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
FAMILIES: dict[str, dict[str, Any]] = {
    "BertModel": SIZES,
    "RobertaModel": SIZES,
    "MPNetModel": SIZES,
    "DistilBertModel": DISTIL,
    "ModernBertModel": {**ROTARY, **ENDS},
    "T5EncoderModel": T5,
}


def made(family: str) -> nn.Module:
    library = tiny.transformers()
    cls = getattr(library, family)
    torch.manual_seed(0)
    return cls(cls.config_class(**FAMILIES[family])).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_parts_together_are_the_model_to_the_bit(family: str) -> None:
    model = made(family)
    ids, mask = torch.randint(3, 40, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with recorded(model, "states") as found:
        whole = model(**inputs).last_hidden_state
    written = [found["state 0"].stack()[0], *found["states"].stack()]
    for block in range(4):
        states = states_before(model, inputs, block)
        assert torch.equal(states, written[block])
        # what is read of the second part's inputs is masks and positions
        other = from_states(model, states, {**inputs, "input_ids": torch.full_like(ids, 5)}, block)
        assert torch.equal(other.last_hidden_state[mask.bool()], whole[mask.bool()])
    assert torch.equal(model(**inputs).last_hidden_state, whole)
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_that_stand_aside_do_not_run_and_are_back_after_an_error() -> None:
    model = made("BertModel")
    ids = torch.randint(3, 40, (2, 5))
    states = states_before(model, {"input_ids": ids}, 2)
    from_states(model, states, {"input_ids": ids}, 2)
    ran: list[int] = []
    for place in stack_blocks(model):
        place.module.intermediate.register_forward_hook(lambda *_, n=place.block: ran.append(n))
    from_states(model, states, {"input_ids": ids}, 2)
    assert ran == [2]
    with pytest.raises(RuntimeError):
        from_states(model, states[..., :3], {"input_ids": ids}, 2)
    ran.clear()
    states_before(model, {"input_ids": ids}, 1)
    assert ran == [0]
    model(ids)
    assert ran == [0, 0, 1, 2]


@pytest.mark.parametrize("family", ["BertModel", "T5EncoderModel"])
def test_gradients_are_those_of_the_whole(family: str) -> None:
    model = made(family)
    ids = torch.randint(3, 40, (2, 5))
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(ids).last_hidden_state.square().sum(), parameters, allow_unused=True)
    states = states_before(model, {"input_ids": ids}, 2)
    parts = from_states(model, states, {"input_ids": ids}, 2).last_hidden_state
    found = torch.autograd.grad(parts.square().sum(), parameters, allow_unused=True)
    for a, b in zip(whole, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_said() -> None:
    model, ids = made("BertModel"), torch.randint(3, 40, (1, 4))
    with pytest.raises(InputError, match="block: expected a number from 0 to 3, got 4"):
        states_before(model, {"input_ids": ids}, 4)
    with pytest.raises(InputError, match="stack: expected the path"):
        stack_blocks(model, "nowhere")
    with pytest.raises(InputError, match="there are: none"):
        stack_blocks(nn.Linear(2, 2))
    block = stack_blocks(model)[0].module
    block.forward = block.forward
    with pytest.raises(InputError, match="block 0 has a forward of its own"):
        from_states(model, torch.zeros(1, 4, 16), {"input_ids": ids}, 1)
    assert "forward" in vars(block)
