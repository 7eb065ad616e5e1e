"""Caches that are written in place, and decoding by grouped rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.live import zoo
from tests.models.live.test_decoding import generated, padded

from cenote.core import InputError
from cenote.mix import SinkWindow
from cenote.models.live import edited
from cenote.models.live.heads import ScaledHeads
from cenote.models.live.store import KeyValueStore, StoreLayer, adopt, exact_decoding, in_place, nbytes
from cenote.testing.as_found import AsFound

DECODERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt_oss", "gpt2", "gpt_neox", "phi", "llava"]
ATTENTIONS = [(name, a) for name in DECODERS for a in ("sdpa", "eager") if (name, a) in zoo.REACHED]


def inputs_of(case: zoo.Case) -> dict[str, Any]:
    return dict(case.inputs) if len(case.inputs) > 1 else padded()[0]


@pytest.mark.parametrize(("name", "attention"), zoo.one_by_one(ATTENTIONS))
def test_written_in_place_is_equal_to_the_bit_and_grouped_rows_to_rounding(name: str, attention: str) -> None:
    case = zoo.MODELS[name](attention)
    inputs = inputs_of(case)
    plain = generated(case.model, inputs, max_new_tokens=12)
    found = AsFound(case.model, lambda: case.model(**inputs))
    with in_place(case.model):
        stored = generated(case.model, inputs, max_new_tokens=12)
    assert torch.equal(torch.stack(stored.logits), torch.stack(plain.logits))
    with exact_decoding(case.model):
        exact = generated(case.model, inputs, max_new_tokens=12)
    assert torch.equal(exact.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(exact.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)
    assert found.changed() is None


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}]
)
def test_beams_and_drafts(options: dict[str, int]) -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    inputs = padded((9,) if "prompt_lookup_num_tokens" in options else (9, 7, 4, 6))[0]
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    plain = model.generate(**inputs, **settings)
    for entered in (in_place, exact_decoding):
        with entered(model):
            assert torch.equal(model.generate(**inputs, **settings), plain)


def test_a_half_precision_store_is_equal_to_the_bit() -> None:
    model = zoo.MODELS["llama"]("sdpa").model.bfloat16()
    inputs = padded()[0]
    plain = generated(model, inputs)
    with in_place(model):
        assert torch.equal(torch.stack(generated(model, inputs).logits), torch.stack(plain.logits))


def test_a_loop_of_ones_own_and_a_cache_that_came_filled() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    words = zoo.ids(2, 9)
    with torch.no_grad():
        expected = model(words).logits[:, -1]
        cache = model(words[:, :4], use_cache=True).past_key_values
        with in_place(model):
            for i in range(4, 9):
                logits = model(words[:, i : i + 1], past_key_values=cache).logits
        assert all(isinstance(layer, StoreLayer) for layer in cache.layers)
        torch.testing.assert_close(logits[:, -1], expected, atol=1e-5, rtol=1e-5)
        # what was left behind goes on by itself
        cache.crop(-1)
        torch.testing.assert_close(model(words[:, 8:], past_key_values=cache).logits, logits)


@torch.no_grad()
def test_room_doubles_and_bytes_are_declared() -> None:
    layer = StoreLayer()
    k = torch.randn(2, 3, 1, 4)
    sizes = []
    for _ in range(200):
        keys, values = layer.update(k, k + 1)
        sizes.append(layer.nbytes)
    assert keys.shape == values.shape == (2, 3, 200, 4)
    assert torch.equal(keys, k.expand(-1, -1, 200, -1))
    assert torch.equal(values, (k + 1).expand(-1, -1, 200, -1))
    row = 2 * 2 * 3 * 4 * 4
    assert sorted(set(sizes)) == [64 * row, 128 * row, 256 * row]
    assert layer.nbytes == sum(x.untyped_storage().nbytes() for x in (keys, values))


def test_room_is_asked_for_beforehand() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    store = KeyValueStore(model.config, room=100)
    with torch.no_grad():
        model(zoo.ids(2, 9), past_key_values=store)
    assert store.seen_tokens == 9
    assert store.nbytes == nbytes(store) == 3 * 2 * 2 * 2 * 100 * 8 * 4


def test_cropped_repeated_and_selected_as_a_growing_cache_is() -> None:
    library = pytest.importorskip("transformers")
    ours, theirs = KeyValueStore(), library.DynamicCache()
    generator = torch.Generator().manual_seed(0)

    def both(tokens: int, batch: int) -> None:
        k, v = torch.randn(2, batch, 2, tokens, 4, generator=generator)
        for x, y in zip(ours.update(k, v, 0), theirs.update(k, v, 0), strict=True):
            assert torch.equal(x, y)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)

    both(5, 2)
    for cache in (ours, theirs):
        cache.crop(-2)
    both(1, 2)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    both(3, 4)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    both(1, 4)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([True, False, False, True]))
    both(70, 2)
    for cache in (ours, theirs):
        cache.reset()
    both(2, 3)


def test_what_is_forgotten_is_gone_and_tokens_are_counted_still() -> None:
    layer = StoreLayer()
    k = torch.arange(2 * 2 * 300 * 1.0).view(2, 2, 300, 1)
    layer.update(k, -k)
    before = layer.nbytes
    layer.per_key["score"] = k[..., 0]
    kept = torch.zeros(2, 2, 300, dtype=torch.bool)
    kept[0, 0, [3, 7, 299]] = kept[0, 1, [0, 1, 2]] = kept[1, 0, 5] = kept[1, 1, [9, 8, 298]] = True
    layer.forget(kept)
    assert layer.nbytes < before / 3
    assert layer.numbers is not None
    assert layer.numbers.tolist() == [[[3, 7, 299], [0, 1, 2]], [[5, -1, -1], [8, 9, 298]]]
    keys, values = layer.update(torch.full((2, 2, 1, 1), -1.0), torch.full((2, 2, 1, 1), 1.0))
    assert keys[1, 1].flatten().tolist() == [*k[1, 1, [8, 9, 298], 0].tolist(), -1.0]
    assert torch.equal(keys, -values)
    assert layer.per_key["score"][0, 0].tolist() == [3.0, 7.0, 299.0, 0.0]
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (301, (302, 0))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.numbers[0].tolist() == [[5, -1, -1, 300], [8, 9, 298, 300]]
    with pytest.raises(InputError, match="cache: keys were forgotten"):
        layer.crop(-1)


def test_gradients_flow_through_keys() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    words = zoo.ids(1, 6)
    cache = KeyValueStore(model.config)
    model(words[:, :4], past_key_values=cache)
    out = model(words[:, 4:], past_key_values=cache).logits.sum()
    (found,) = torch.autograd.grad(out, model.model.embed_tokens.weight)
    expected = torch.autograd.grad(model(words).logits[:, 4:].sum(), model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def gradients_of_steps(model: Any, trained: str) -> list[torch.Tensor]:
    """Of a prompt and four steps behind it, backwards once through all."""
    words, needed = zoo.ids(1, 14), [x for name, x in model.named_parameters() if trained in name]
    for name, x in model.named_parameters():
        x.requires_grad_(trained in name)
    out = model(words[:, :10], use_cache=True)
    total = out.logits.sum()
    for i in range(10, 14):
        out = model(words[:, i : i + 1], past_key_values=out.past_key_values)
        total = total + out.logits.pow(2).sum()
    return list(torch.autograd.grad(total, needed))


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "layers.1.mlp", ""])
@pytest.mark.parametrize("entered", [in_place, exact_decoding, SinkWindow(200).on])
def test_gradients_of_steps_are_those_of_a_copied_cache(entered: Any, trained: str) -> None:
    """Whatever is trained: autograd keeps keys that need no gradient themselves, for the queries'."""
    model = zoo.MODELS["llama"]("sdpa").model
    plain = gradients_of_steps(model, trained)
    with entered(model):
        found = gradients_of_steps(model, trained)
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("trained", ["q_proj", ""])
def test_gradients_flow_where_keys_are_forgotten(trained: str) -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    with SinkWindow(6, 2).on(model):
        kept = gradients_of_steps(model, trained)
    with SinkWindow(6, 2, forgets=True).on(model):
        forgot = gradients_of_steps(model, trained)
    torch.testing.assert_close(forgot, kept, atol=1e-3, rtol=1e-4)


def test_other_edits_act_beside_grouped_rows() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    scaled = {0: torch.tensor([1.0, 0.0, 1.0, 1.0])}
    with edited(model, ScaledHeads(scaled)):
        plain = generated(model, padded()[0])
    with exact_decoding(model), edited(model, ScaledHeads(scaled)):
        found = generated(model, padded()[0])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_weights_that_are_asked_for_are_shown(by: str) -> None:
    model = zoo.MODELS["llama"]("eager").model
    options = {"output_attentions": True} if by == "argument" else {}
    model.config.output_attentions = by == "config"
    words = zoo.ids(1, 9)
    with torch.no_grad():
        cache = model(words[:, :8], use_cache=True).past_key_values
        plain = model(words[:, 8:], past_key_values=cache, **options).attentions
        with exact_decoding(model):
            cache = model(words[:, :8], use_cache=True).past_key_values
            found = model(words[:, 8:], past_key_values=cache, **options).attentions
        assert len(plain) == 3
        torch.testing.assert_close(found, plain)
        model.config.output_attentions = False
        with exact_decoding(model):
            made = generated(model, {"input_ids": words}, output_attentions=True)
        assert all(of_layer is not None for of_step in made.attentions for of_layer in of_step)


@pytest.mark.parametrize(
    ("implementation", "kind"), [("static", "of a fixed size"), ("offloaded_static", "fixed|offloaded")]
)
def test_caches_that_cannot_be_written_in_place(implementation: str, kind: str) -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    with pytest.raises(InputError, match=f"cache: .*({kind})"), exact_decoding(model):
        generated(model, padded()[0], cache_implementation=implementation, disable_compile=True)


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("entered", [exact_decoding, SinkWindow(6, 2).on])
def test_attention_that_is_written_out_is_refused_before_anything_runs(entered: Any, alibi: bool) -> None:
    falcon = zoo.text("FalconForCausalLM", True, alibi=alibi, new_decoder_architecture=False)
    model = falcon("eager").model
    with pytest.raises(InputError, match="cannot be reached: under attn_implementation='eager' it is written out"):
        entered(model).__enter__()
    assert not model._forward_pre_hooks
    with in_place(model):
        generated(model, padded()[0])
    model = falcon("sdpa").model
    with entered(model):
        generated(model, padded()[0])


def test_what_takes_no_cache() -> None:
    with pytest.raises(InputError, match="model: ViTModel takes no cache"), in_place(zoo.MODELS["vit"]("sdpa").model):
        pass
    with pytest.raises(InputError, match=r"model: expected a torch\.nn\.Module"), in_place(3):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="cache: expected one of transformers' caches, got tuple"):
        adopt(())
