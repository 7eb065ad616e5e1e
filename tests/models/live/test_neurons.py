"""Neurons of feed-forward parts: found by shapes, seen as they are, sliced as if the others were zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor

from cenote.core import InputError
from cenote.models.live import NeuronRecorder, SlicedNeurons, Where, edited, feed_forwards

OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def some(activations: Tensor, real: Tensor, block: int) -> Tensor:
    """Other numbers of neurons for each item."""
    of_item = torch.arange(activations.shape[-1]) % (2 + torch.arange(len(real)))[:, None]
    return of_item == block % 2


def silenced(model: Any, chosen: dict[Any, Tensor], prompt: int) -> list[Any]:
    """Hooks that set the other neurons to zero, in steps behind the prompt."""
    handles = []
    for place, known in feed_forwards(model).items():

        def zero(_: Any, args: tuple[Tensor, ...], place: Any = place) -> tuple[Tensor] | None:
            (x,) = args
            return None if x.shape[-2] == prompt else (x.masked_fill(~chosen[place][:, None], 0.0),)

        handles.append(model.get_submodule(known.down).register_forward_pre_hook(zero))
    return handles


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_decoding_with_some_neurons_is_that_with_the_others_at_zero(name: str) -> None:
    case = zoo.MODELS[name]("sdpa")
    model, words = case.model, case.inputs["input_ids"]
    plain = model(words).logits
    sliced = SlicedNeurons(some)
    with edited(model, sliced) as run:
        short = model.generate(words, **OPTIONS)
    assert run.effect
    assert {place.path for place in sliced.chosen} == {place.path for place in feed_forwards(model)}
    handles = silenced(model, sliced.chosen, words.shape[1])
    whole = model.generate(words, **OPTIONS)
    for handle in handles:
        handle.remove()
    assert torch.equal(short.sequences, whole.sequences)
    for ours, theirs in zip(short.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(words).logits, plain)


def test_all_neurons_are_the_model_itself() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    words = case.inputs["input_ids"]
    everything = SlicedNeurons(lambda a, real, block: torch.ones(len(a), a.shape[-1], dtype=torch.bool))
    with edited(case.model, everything):
        same = case.model.generate(words, **OPTIONS)
    whole = case.model.generate(words, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(same.logits, whole.logits, strict=True))


def test_blocks_that_are_not_named_stay() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    sliced = SlicedNeurons(some, Where(blocks=[1]))
    with edited(case.model, sliced):
        case.model.generate(case.inputs["input_ids"], **OPTIONS)
    assert [place.block for place in sliced.chosen] == [1]


def test_neurons_are_seen_as_the_map_back_reads_them() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    words, mask = case.inputs["input_ids"], torch.ones_like(case.inputs["input_ids"])
    mask[0, :3] = 0
    recorder = NeuronRecorder(Where(blocks=[0]))
    with edited(case.model, recorder):
        case.model(words, attention_mask=mask)
    ((place, found),) = recorder.found.items()
    assert found.shape == (*words.shape, feed_forwards(case.model)[place].neurons)
    alone = NeuronRecorder(Where(blocks=[0]))
    with edited(case.model, alone):
        case.model(words[1:])
    torch.testing.assert_close(alone.found[place], found[1:])
    assert recorder.real[place].shape == words.shape
    assert bool(alone.real[place].all())


def test_two_in_one_map_are_sliced_alike() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    assert all(known.gated and known.neurons == 24 for known in feed_forwards(model).values())
    words = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    sliced = SlicedNeurons(some)
    with edited(model, sliced):
        short = model.generate(words, **OPTIONS)
    handles = silenced(model, sliced.chosen, 4)
    whole = model.generate(words, **OPTIONS)
    for handle in handles:
        handle.remove()
    for ours, theirs in zip(short.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_everything_is_put_back_after_an_exception() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    names = [name for name, _ in case.model.named_modules()]

    def fails(activations: Tensor, real: Tensor, block: int) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), edited(case.model, SlicedNeurons(fails)):
        case.model(case.inputs["input_ids"])
    assert [name for name, _ in case.model.named_modules()] == names


def test_what_cannot_be_sliced_says_so() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    with (
        pytest.raises(InputError, match=r"choose: gave torch.float32 .*, expected bool"),
        edited(case.model, SlicedNeurons(lambda a, real, block: a[:, 0])),
    ):
        case.model(case.inputs["input_ids"])
    with (
        pytest.raises(InputError, match="choose: left no neuron"),
        edited(case.model, SlicedNeurons(lambda a, real, block: torch.zeros_like(a[:, 0], dtype=torch.bool))),
    ):
        case.model(case.inputs["input_ids"])
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    square = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    with (
        pytest.raises(InputError, match=r"the neurons of model\.layers\.0 cannot be told"),
        edited(square, NeuronRecorder()),
    ):
        square(torch.tensor([[1, 2]]))
