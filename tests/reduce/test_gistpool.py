"""Compressed contexts: windows, gists, average pooling, what prompts read, and that the model stays as it is."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.answers import UNASKED, answer_loss
from cenote.models.live import HeadRecorder, InputsRecorder, edited
from cenote.models.low_rank import LowRank
from cenote.models.own_weights import OwnWeights
from cenote.reduce.gistpool.compressed import Compressed
from cenote.reduce.gistpool.compressors import AveragePool, Compressor, FullContext, GistPool, NoContext
from cenote.reduce.gistpool.training import AskedContexts, distance, told, train_compressor
from cenote.reduce.gistpool.windows import cost, dilution_bound, interleaved, readable, windows
from tests import tiny

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40, "pad_token_id": 0}
WIDTHS = {"num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 10000.0}
small = partial(LowRank, targets=("q_proj", "v_proj", "down_proj"), rank=2, alpha=4.0, dropout=0.0)


def decoder(layers: int = 2, kind: str = "Llama", attention: str = "sdpa", **settings: Any) -> nn.Module:
    library = tiny.transformers()
    config = getattr(library, f"{kind}Config")(**{**SIZES, **WIDTHS, "num_hidden_layers": layers, **settings})
    torch.manual_seed(0)
    return getattr(library, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention).eval()


def words(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(5, 38, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def stirred(compressor: Compressor) -> Compressor:
    """With weights that are no longer those of the model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in compressor.parameters():
            p += 0.1 * torch.randn_like(p)
    return compressor.eval()


def compressors(model: nn.Module) -> list[Compressor]:
    return [
        FullContext(model, small),
        AveragePool(model, 3, adapt=small),
        AveragePool(model, 3, pooled="keys", adapt=small),
        GistPool(model, 3, adapt=small),
        GistPool(model, 3, adapt=OwnWeights),
        GistPool.plain(model, 3, adapt=small),
        NoContext(model, small),
    ]


PADDED = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])


def test_the_last_window_is_short_and_its_mean_is_of_what_it_holds() -> None:
    x = torch.arange(5.0).view(1, 5, 1)
    cut = windows(torch.ones(1, 5, dtype=torch.bool), 2)
    assert cut.means(x)[0, :, 0].tolist() == [0.5, 2.5, 4.0]
    assert cut.middle().tolist() == [[0, 2, 4]]
    assert windows(torch.ones(1, 7, dtype=torch.bool), 4).middle().tolist() == [[1, 5]]


def test_fewer_tokens_than_the_ratio_are_one_window_and_ratio_one_is_a_window_each() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert windows(mask, 8).members.tolist() == [[[True] * 3]]
    assert torch.equal(windows(mask, 1).members[0], torch.eye(3, dtype=torch.bool))


def test_pads_belong_to_no_window_not_even_as_nan() -> None:
    cut = windows(PADDED, 2)
    assert not cut.members.any(1)[0, :2].any()
    assert cut.mask.tolist() == [[False, True, True, True], [True] * 4]
    x = torch.randn(2, 7, 3)
    spoiled = x.masked_fill(~PADDED[..., None], float("nan"))
    alone = windows(torch.ones(1, 5, dtype=torch.bool), 2).means(x[:1, 2:])
    assert torch.allclose(cut.means(spoiled)[0, 1:], alone[0])
    assert torch.equal(cut.means(spoiled)[0, 0], torch.zeros(3))


def test_windows_may_overlap() -> None:
    cut = windows(torch.ones(1, 5, dtype=torch.bool), 2, overlap=1)
    assert cut.members[0].int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_an_empty_context_is_an_error_that_says_so() -> None:
    with pytest.raises(InputError, match="context: is empty"):
        windows(torch.zeros(1, 3, dtype=torch.bool), 2)
    model = decoder()
    for compressor in compressors(model):
        with pytest.raises(InputError, match="context: is empty in some item"):
            compressor.compress(model, words(2, 3), torch.tensor([[True] * 3, [False] * 3]))
        with pytest.raises(InputError, match="context: is empty in some item"):
            compressor.compress(model, words(2, 0))


def test_gists_that_are_not_spread_stand_behind_and_count_as_tokens() -> None:
    cut = windows(PADDED, 2)
    made = interleaved(PADDED, cut, spread=False)
    assert made.gist.int().tolist() == [[0] * 8 + [1] * 3, [0] * 7 + [1] * 4]
    assert made.positions[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert made.ends.tolist() == [8, 11]
    may = readable(made, cut, window=False)
    assert torch.equal(may[1], torch.ones(11, 11, dtype=torch.bool).tril())
    assert not may[0, :3].any()
    assert not may[0, :, :3].any()


@pytest.mark.parametrize("spread", [True, False])
def test_a_gist_reads_its_window_and_itself_and_no_token_reads_a_gist(spread: bool) -> None:
    cut = windows(PADDED, 3)
    made = interleaved(PADDED, cut, spread)
    may = readable(made, cut)
    for item, slot in made.gist.nonzero().tolist():
        read = may[item, slot].nonzero()[:, 0]
        own = read[~made.gist[item, read]]
        members = cut.members[item, made.source[item, slot]].nonzero()[:, 0]
        assert made.source[item, own].tolist() == members.tolist()
        assert read[made.gist[item, read]].tolist() == [slot]
    tokens = made.mask & ~made.gist
    assert not (may & tokens[:, :, None] & made.gist[:, None]).any()


def test_gradients_of_a_gist_stay_in_its_window() -> None:
    model = decoder(layers=1)
    pool = GistPool(model, 3, adapt=None)
    x = nn.Parameter(torch.randn(1, 7, 16))
    ids = torch.zeros(1, 7, dtype=torch.long)
    model.model.embed_tokens.register_forward_hook(lambda *_: x[:, made.source.masked_fill(made.gist, 0)[0]])
    made = interleaved(torch.ones(1, 7, dtype=torch.bool), windows(torch.ones(1, 7, dtype=torch.bool), 3))
    left = pool.compress(model, ids)
    for gist in range(3):
        (grad,) = torch.autograd.grad(left.blocks[0].keys[0, :, gist].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == list(range(3 * gist, min(3 * gist + 3, 7)))


@pytest.mark.parametrize("itself", [True, False])
def test_even_weights_give_the_mean_of_the_values_of_a_window(itself: bool) -> None:
    model = decoder(layers=1)
    pool, heads, calls = GistPool(model, 3, itself=itself, even=True, adapt=None), HeadRecorder(), InputsRecorder()
    with torch.no_grad(), edited(model, heads, calls):
        left = pool.compress(model, words(1, 6))
    (y, _), (call, _) = next(iter(heads.found.values())), next(iter(calls.found.values()))
    v = call.v.repeat_interleave(2, 1)
    for gist in (3, 7):
        assert torch.allclose(y[:, :, gist], v[:, :, gist - 3 : gist + itself].mean(2), atol=1e-6)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        same = GistPool(model, 3, itself=itself, adapt=None).compress(model, words(1, 6))
    assert torch.allclose(same.blocks[0].values, left.blocks[0].values, atol=1e-6)


def test_the_shift_delivers_a_window_one_block_earlier() -> None:
    model = decoder(layers=1)
    context, prompt = words(1, 6), words(1, 2, seed=2)
    other = (context - 5 + 1) % 33 + 5
    for shift, differs in ((True, True), (False, False)):
        pool = GistPool(model, 3, shift=shift, adapt=None)
        first, second = (pool(model, c, prompt) for c in (context, other))
        assert torch.equal(first, second) is not differs


def test_at_the_start_both_sets_are_the_model_and_gradients_reach_both_through_the_cache() -> None:
    model = decoder()
    context, prompt = words(2, 6), words(2, 3, seed=2)
    untrained = GistPool(model, 2, adapt=None)(model, context, prompt)
    for adapt in (small, OwnWeights):
        pool = GistPool(model, 2, adapt=adapt)
        assert torch.equal(pool(model, context, prompt), untrained)
        for up in [p for name, p in pool.named_parameters() if ".up." in name]:
            nn.init.normal_(up, std=0.1)
        pool(model, context, prompt).square().sum().backward()
        assert pool.answering is not None
        assert pool.compressing is not None
        assert all(float(p.grad.abs().sum()) > 0 for p in pool.compressing.parameters() if p.grad is not None)
        for part in (pool.answering, pool.compressing):
            assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
        assert pool.gists.grad is not None
        assert bool(pool.gists.grad.any())
    assert torch.allclose(untrained_gists(model), model.get_input_embeddings().weight.mean(0))


def untrained_gists(model: nn.Module) -> Tensor:
    return GistPool(model, 2, adapt=None).gists[0]


def test_average_pooling_of_single_tokens_is_full_attention() -> None:
    model = decoder()
    context, prompt = words(2, 7), words(2, 3, seed=2)
    whole = model(torch.cat([context[1:], prompt[1:]], 1)).logits[:, 7:]
    for compressor in (
        FullContext(model, adapt=None),
        AveragePool(model, 1, adapt=None),
        AveragePool(model, 1, pooled="keys", adapt=None),
    ):
        assert torch.allclose(compressor(model, context, prompt)[1:], whole, atol=1e-5)


def test_average_pooling_reads_means_of_what_blocks_read() -> None:
    model = decoder()
    context = words(1, 5)
    left = AveragePool(model, 2, adapt=None).compress(model, context)
    block = model.model.layers[1]
    read = model(context, output_hidden_states=True).hidden_states[1]
    mean = torch.stack([read[0, 0:2].mean(0), read[0, 2:4].mean(0), read[0, 4]])
    v = block.self_attn.v_proj(block.input_layernorm(mean)).view(3, 2, 4).transpose(0, 1)
    assert torch.allclose(left.blocks[1].values[0], v, atol=1e-6)


def one_pass(model: nn.Module, context: Tensor, prompt: Tensor, ratio: int) -> Tensor:
    """Gisting as it was published: one sequence, one mask."""
    n, m, p = context.shape[1], -(-context.shape[1] // ratio), prompt.shape[1]
    embed = model.get_input_embeddings()
    gists = embed.weight.mean(0).expand(len(context), m, -1)
    x = torch.cat([embed(context), gists, embed(prompt)], 1)
    may = torch.ones(n + m + p, n + m + p, dtype=torch.bool).tril()
    may[n + m :, :n] = False
    return model(inputs_embeds=x, attention_mask=may.expand(len(context), 1, -1, -1)).logits[:, n + m :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_its_changes_it_is_gisting(attention: str) -> None:
    model = decoder(attention="sdpa")
    context, prompt = words(2, 7), words(2, 3, seed=2)
    expected = one_pass(model, context, prompt, 3)
    model = decoder(attention=attention)
    plain = GistPool(model, 3, shift=False, separate=False, spread=False, window=False, adapt=small)
    assert torch.allclose(plain(model, context, prompt), expected, atol=1e-5)
    again = GistPool.plain(model, 3, adapt=small)(model, context, prompt)
    assert torch.equal(again, plain(model, context, prompt))


@pytest.mark.parametrize("number", range(7))
def test_a_row_alone_is_the_row_of_a_batch_and_pads_change_nothing(number: int) -> None:
    model = decoder()
    compressor = stirred(compressors(model)[number])
    context, prompt = words(2, 7), words(2, 4, seed=2)
    asked = torch.tensor([[True] * 4, [False] + [True] * 3])
    with torch.no_grad():
        both = compressor(model, context, prompt, PADDED, asked)
        first = compressor(model, context[:1, 2:], prompt[:1])
        second = compressor(model, context[1:], prompt[1:, 1:])
        changed = compressor(model, context.masked_fill(~PADDED, 3), prompt, PADDED, asked)
    assert torch.allclose(both[:1], first, atol=1e-5)
    assert torch.allclose(both[1:, 1:], second, atol=1e-5)
    assert torch.allclose(both[asked], changed[asked], atol=1e-6)


@pytest.mark.parametrize("number", range(7))
def test_decoding_behind_a_cache_is_recomputing(number: int) -> None:
    model = decoder()
    compressor = stirred(compressors(model)[number])
    context, prompt = words(2, 7), words(2, 3, seed=2)
    asked = torch.tensor([[True] * 3, [False] + [True] * 2])
    left = compressor.compress(model, context, PADDED)
    before = [tuple(t.detach().clone() for t in block) for block in left.blocks]
    made = compressor.generate(model, prompt, left, asked, new_tokens=5)
    again, real = prompt, asked
    for step in range(5):
        logits = compressor.answer(model, again, left, real)
        assert torch.equal(logits[:, -1].argmax(-1), made[:, step])
        again = torch.cat([again, made[:, step : step + 1]], 1)
        real = torch.nn.functional.pad(real, (0, 1), value=True)
    assert all(torch.equal(a, b) for x, y in zip(before, left.blocks, strict=True) for a, b in zip(x, y, strict=True))


def test_the_model_is_what_it_was() -> None:
    model = decoder()
    context, prompt = words(1, 6), words(1, 2, seed=2)
    before = model(prompt).logits
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for compressor in compressors(model):
        stirred(compressor)(model, context, prompt)
        with pytest.raises(InputError):
            compressor.answer(model, words(3, 2), compressor.compress(model, context))
        assert torch.equal(model(prompt).logits, before)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_one_context_serves_many_prompts_saved_and_loaded(tmp_path: Path) -> None:
    model = decoder()
    pool = stirred(GistPool(model, 2, adapt=small))
    left = pool.compress(model, words(2, 7), PADDED)
    left.save(tmp_path / "left.safetensors")
    loaded = Compressed.load(tmp_path / "left.safetensors")
    prompts = words(3, 4, seed=2)
    items = torch.tensor([1, 1, 0])
    answers = pool.answer(model, prompts, loaded.of(items))
    assert torch.equal(answers, pool.answer(model, prompts, left.of(items)))
    assert torch.allclose(answers[:1], pool.answer(model, prompts[:1], left.of(items[:1])), atol=1e-5)
    with pytest.raises(InputError, match="cannot be read"):
        Compressed.load(tmp_path / "none.safetensors")


def test_bytes_are_as_declared() -> None:
    model = decoder(layers=3)
    left = GistPool(model, 4, adapt=small).compress(model, words(1, 10))
    declared = cost(10, 2, 4, blocks=3, kv_heads=2, width=4)
    assert (left.bytes, left.mask.shape[1]) == (declared.bytes, declared.kept) == (3 * 2 * 2 * 4 * 4 * 3, 3)
    assert left.ratios == pytest.approx([10 / 3])
    counted = readable(interleaved(mask := torch.ones(1, 10, dtype=torch.bool), cut := windows(mask, 4)), cut)
    assert int(counted.sum()) == declared.compressing


def test_no_softmax_over_many_tokens_exceeds_the_bound() -> None:
    for n, b in itertools.product((1, 5, 100), (0.5, 3.0)):
        logits = torch.full((n,), -b, dtype=torch.float64)
        logits[0] = b
        assert float(logits.softmax(0)[0]) == pytest.approx(dilution_bound(n, b))
        drawn = (2 * torch.rand(200, n, dtype=torch.float64) - 1) * b
        assert float(drawn.softmax(1).max()) <= dilution_bound(n, b) + 1e-12


def test_every_change_can_be_left_out_by_itself() -> None:
    model = decoder()
    context, prompt = words(2, 7), words(2, 3, seed=2)
    seen = []
    for shift, separate, spread, window in itertools.product((True, False), repeat=4):
        flags = {"shift": shift, "separate": separate, "spread": spread, "window": window}
        pool = GistPool(model, 3, adapt=small, **flags)  # type: ignore[arg-type]
        assert (pool.compressing is not None) == separate
        seen.append(pool(model, context, prompt, PADDED))
        assert torch.allclose(seen[-1][:1], pool(model, context[:1, 2:], prompt[:1]), atol=1e-5)
    by_flags = torch.stack(seen).unflatten(0, (2, 2, 2, 2))
    assert torch.equal(by_flags[:, 0], by_flags[:, 1])  # both sets start as the model
    for one, other in itertools.combinations(by_flags[:, 0].flatten(0, 2), 2):
        assert not torch.allclose(one, other, atol=1e-6)
    overlapping = GistPool(model, 3, overlap=1, adapt=None)(model, context, prompt)
    centred = GistPool(model, 3, place="centre", adapt=None)(model, context, prompt)
    for other in (overlapping, centred):
        assert not torch.allclose(other, GistPool(model, 3, adapt=None)(model, context, prompt), atol=1e-5)


def test_vectors_of_their_own_for_each_gist() -> None:
    model = decoder()
    pool = GistPool(model, 2, gists=4, adapt=None)
    context = words(1, 7)
    assert torch.equal(pool(model, context, context), GistPool(model, 2, adapt=None)(model, context, context))
    with pytest.raises(InputError, match="gists: 4 vectors"):
        pool.compress(model, words(1, 9))


@pytest.mark.parametrize("kind", ["Qwen2", "GPT2"])
def test_other_decoders(kind: str) -> None:
    settings = {"n_positions": 64, "n_layer": 2} if kind == "GPT2" else {}
    if kind == "GPT2":
        library = tiny.transformers()
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = library.GPT2LMHeadModel(library.GPT2Config(**sizes)).eval()
    else:
        model = decoder(kind=kind, **settings)
    context, prompt = words(2, 6), words(2, 3, seed=2)
    whole = model(torch.cat([context, prompt], 1)).logits[:, 6:]
    assert torch.allclose(AveragePool(model, 1, adapt=None)(model, context, prompt), whole, atol=1e-5)
    assert torch.allclose(
        GistPool.plain(model, 2, adapt=None)(model, context, prompt), one_pass(model, context, prompt, 2), atol=1e-5
    )


def test_what_cannot_be_compressed_is_refused() -> None:
    library = tiny.transformers()
    sliding = library.MistralForCausalLM(
        library.MistralConfig(**{**SIZES, **WIDTHS, "num_hidden_layers": 2, "sliding_window": 4})
    ).eval()
    with pytest.raises(InputError, match="sliding window"):
        GistPool(sliding, 2, adapt=None).compress(sliding, words(1, 6))
    with pytest.raises(InputError, match="model: Linear takes no"):
        GistPool(nn.Linear(2, 2), 2)
    model = decoder()
    with pytest.raises(InputError, match="ratio: expected at least 1"):
        GistPool(model, 0)
    pool = GistPool(model, 2, adapt=None)
    left = pool.compress(model, words(1, 4))
    with pytest.raises(InputError, match="pad prompts on the left"):
        pool.generate(model, words(1, 2), left, torch.tensor([[True, False]]))


def two_answers() -> AskedContexts:
    """One question about two contexts."""
    context = torch.tensor([[11, 7, 8, 9, 10, 12], [11, 13, 8, 9, 10, 12]])
    prompt = torch.tensor([[20, 5], [20, 6]])
    return AskedContexts(context, prompt, torch.tensor([[UNASKED, 5], [UNASKED, 6]]))


def test_training_goes_through_the_cache_and_leaves_the_model() -> None:
    model, asked = decoder(initializer_range=0.3), two_answers()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    pool = GistPool(model, 3, adapt=OwnWeights)
    losses = train_compressor(pool, model, lambda: asked, steps=12, lr=2e-2)
    assert losses[0] > 2
    found = told(pool, model, asked)
    assert found.right.all()
    assert found.nll.max() < 0.7
    swapped = asked._replace(context=asked.context.roll(1, 0))
    assert not told(pool, model, swapped).right.any()
    assert not told(NoContext(model, adapt=None), model, asked).right.all()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(InputError, match="no parameters to train"):
        train_compressor(FullContext(model, adapt=None), model, lambda: asked, steps=1)


def test_distillation_pulls_towards_the_whole_context() -> None:
    model, asked = decoder(), two_answers()
    whole = FullContext(model, adapt=None)(model, asked.context, asked.prompt)
    far = []
    for distilled in (0.0, 100.0):
        pool = AveragePool(model, 2, adapt=small)
        train_compressor(pool, model, lambda: asked, steps=6, lr=1e-2, distilled=distilled)
        far.append(float(distance(pool(model, asked.context, asked.prompt), whole, asked.labels)))
    assert far[1] < 0.5 * far[0]
    with pytest.raises(InputError, match="labels: no token"):
        answer_loss(torch.zeros(1, 2, 4), torch.full((1, 2), UNASKED))
