"""PoNet's views against brute force, its encoders, training, and its place in the encoders of others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.core import InputError
from cenote.mix.ponet.cost import growth
from cenote.mix.ponet.live import ponet_for_attention
from cenote.mix.ponet.mixer import VIEWS, PoNetMixer, pooled_views
from cenote.mix.ponet.model import PoNetClassifier, PoNetEncoder, PoNetForPretraining, variants
from cenote.mix.ponet.segments import fixed_segments, segments_between, special_tokens
from cenote.mix.ponet.training import (
    CLS,
    MASK,
    SEP,
    finetune,
    masked_words,
    pretrain_ponet,
    read_texts,
    segment_pairs,
)
from cenote.testing import check_mixer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer(**settings: Any) -> PoNetMixer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PoNetMixer(6, 2, **{"segments": 3, **settings}).double()


def views(x: Tensor, segments: Tensor, module: PoNetMixer, window: int = 3) -> Tensor:
    """One text without padding, token by token."""
    q, k, o, s, near = (
        linear(x)
        for linear in (module.dense_q, module.dense_k, module.dense_o, module.dense_segment, module.dense_local)
    )
    out = torch.zeros_like(x)
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        weights = (k[:, part] @ q[:, part].mean(0) / 3**0.5).softmax(0)
        g = weights @ k[:, part]
        for n in range(len(x)):
            most = s[segments == segments[n]].amax(0)[part]
            local = near[max(n - window // 2, 0) : n + window // 2 + 1].amax(0)[part]
            out[n, part] = (g + most) * o[n, part] + local
    return out


@pytest.mark.parametrize("window", [1, 3, 5])
def test_views_token_by_token(window: int) -> None:
    module, x = mixer(window=window, out=False), randn(1, 11, 6)
    segments = torch.tensor([[4, 4, 4, 9, 9, -2, -2, 4, 0, 0, 100]])
    torch.testing.assert_close(module.view(x, segments=segments).output[0], views(x[0], segments[0], module, window))


def test_masked_tokens_behind_change_nothing_and_inputs_are_not_written_over() -> None:
    module, x = mixer(), randn(2, 9, 6)
    padded = F.pad(x, (0, 0, 0, 4), value=torch.nan)
    mask = torch.tensor([[True] * 9 + [False] * 4] * 2)
    before = padded.clone()
    found = module.view(padded, mask)
    torch.testing.assert_close(found.output[:, :9], module.view(x).output)
    assert not found.output[:, 9:].any()
    assert not found.weights[..., 9:].any()
    torch.testing.assert_close(padded, before, equal_nan=True)


def test_segments_of_equal_length_and_between_special_tokens() -> None:
    assert fixed_segments(torch.ones(1, 7, dtype=torch.bool), 3).tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    left = torch.tensor([[False, False, True, True, True]])
    assert fixed_segments(left, 1)[:, 2:].tolist() == [[0, 0, 0]]
    ids = torch.tensor([[101, 5, 6, 102, 7, 102, 102, 8]])
    special = special_tokens(ids, (101, 102))
    assert segments_between(special).tolist() == [[0, 1, 1, 2, 3, 4, 6, 7]]
    assert segments_between(~special & special).tolist() == [[0] * 8]


def test_special_tokens_keep_to_themselves() -> None:
    module, x = mixer(out=False), randn(1, 7, 6)
    special = torch.tensor([[True, False, False, True, False, False, True]])
    found = module.view(x, segments=segments_between(special), special=special).output
    g = (module.view(x).weights.unsqueeze(-1) * module.dense_k(x).unflatten(-1, (2, 3)).transpose(1, 2)).sum(2)
    alone = g.flatten(1).unsqueeze(1) * module.dense_o(x)
    torch.testing.assert_close(found[special], alone[special])
    near = module.dense_local(x)
    most = module.dense_segment(x)[:, 4:6].amax(1)
    torch.testing.assert_close(found[:, 5], (g.flatten(1) + most) * module.dense_o(x)[:, 5] + near[:, 4:6].amax(1))


def test_one_token_none_and_even_windows() -> None:
    module, x = mixer(out=False), randn(2, 1, 6)
    k, o, s, near = (d(x) for d in (module.dense_k, module.dense_o, module.dense_segment, module.dense_local))
    torch.testing.assert_close(module.view(x).output, (k + s) * o + near)
    y = randn(2, 4, 6).requires_grad_()
    found = module.view(y, torch.tensor([[True] * 4, [False] * 4]))
    assert not found.output[1].any()
    for gradient in torch.autograd.grad(found.output.sum(), [y, *module.parameters()]):
        assert bool(gradient.isfinite().all())
    with pytest.raises(InputError, match="window"):
        PoNetMixer(6, 2, window=4)


def test_limits_of_the_views() -> None:
    module, x = mixer(out=False, window=1), randn(2, 8, 6)
    every = module.view(x, segments=torch.zeros(2, 8, dtype=torch.long))
    o, near, s, k = (d(x) for d in (module.dense_o, module.dense_local, module.dense_segment, module.dense_k))
    q = module.dense_q(x)
    by_head = [t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k)]
    g = F.scaled_dot_product_attention(by_head[0].mean(2, keepdim=True), by_head[1], by_head[1]).flatten(1)
    torch.testing.assert_close(every.output, (g.unsqueeze(1) + s.amax(1, keepdim=True)) * o + near)
    own = module.view(x, segments=torch.arange(8).expand(2, -1))
    torch.testing.assert_close(own.output, (g.unsqueeze(1) + s) * o + near)
    order = torch.tensor([2, 0, 1, 3, 4, 7, 5, 6])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]] * 2)
    torch.testing.assert_close(
        module.view(x[:, order], segments=segments).output, module.view(x, segments=segments).output[:, order]
    )
    with torch.no_grad():
        module.dense_q.weight.zero_()
        module.dense_q.bias.zero_()
    torch.testing.assert_close(module.view(x).weights, torch.full((2, 2, 8), 1 / 8, dtype=torch.float64))
    mean = module.view(x, segments=torch.arange(8).expand(2, -1)).output
    torch.testing.assert_close(mean, (k.mean(1, keepdim=True) + s) * o + near)


def test_ablations_are_what_their_names_say() -> None:
    x, mask = randn(2, 8, 6), torch.ones(2, 8, dtype=torch.bool)
    segments = fixed_segments(mask, 3)
    q, k, o = (randn(2, 2, 8, 3, seed=i) for i in range(3))
    s, near = randn(2, 8, 6, seed=4), randn(2, 8, 6, seed=5)

    def of(**settings: Any) -> Tensor:
        return pooled_views(q, k, o, s, near, mask, segments, **settings).output

    flat = o.transpose(1, 2).flatten(2)
    torch.testing.assert_close(of() - of(views=("global", "segment")), of(views=("local",)))
    torch.testing.assert_close(
        of(product=False) - of(product=False, views=("segment", "local")), of(views=("global",)) / flat
    )
    torch.testing.assert_close(of(views=("global",), weighted=False), k.mean(2).flatten(1).unsqueeze(1) * flat)
    torch.testing.assert_close(of(views=("global",), value=0 * k), 0 * x)


@pytest.mark.parametrize("name", [n for n in variants() if n not in ("ponet", "separate value", "attention", "mean")])
def test_variants_and_rivals_keep_the_contract_of_mixers(name: str) -> None:
    leave_out = ["export"] + ["half precision"] * (name == "nystrom")
    check_mixer(variants(2)[name](8, 2, 12), leave_out=leave_out)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("separate_value", [True, False])
@pytest.mark.parametrize("product", [True, False])
def test_parameters_that_no_gradient_reaches_are_told(weighted: bool, separate_value: bool, product: bool) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"weighted": weighted, "separate_value": separate_value, "product": product}
    for count in range(4):
        for views in itertools.combinations(VIEWS, count):
            mixer = PoNetMixer(4, 2, 2, views=views, **settings).double()
            y = mixer(torch.randn(2, 7, 4, dtype=torch.float64))
            (y * torch.randn_like(y)).sum().backward()
            dead = {n for n, p in mixer.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-12}
            assert dead == set(mixer.inert_parameters), (views, settings)


@pytest.mark.parametrize("name", list(variants()))
def test_an_encoder_takes_every_mixer(name: str) -> None:
    encoder = PoNetEncoder.lra(20, 12, 4, mixer=name, dim=8, inner=12).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 0, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    net = PoNetClassifier(encoder, 5)
    found = net(ids, mask)
    torch.testing.assert_close(found[1:], net(ids[1:, :3]), atol=1e-5, rtol=1e-5)
    has_weights = len(encoder(ids, mask).weights)
    assert has_weights == (2 if isinstance(encoder.blocks[0].mixer, PoNetMixer) else 0)


def test_the_published_shapes() -> None:
    with torch.device("meta"):
        base, lra = PoNetEncoder(30522, special=(101, 102)), PoNetEncoder.lra(256, 1024, 32)
    assert (len(base.blocks), base.blocks[0].mixer.heads, base.order) == (12, 12, "post")  # type: ignore[union-attr]
    # BERT-base has four maps of attention in each block, PoNet six, and as large all else
    block = 6 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert sum(p.numel() for p in base.parameters()) == 12 * block + (30522 + 512 + 2) * 768 + 2 * 768
    assert (len(lra.blocks), lra.blocks[0].mixer.segments, lra.order) == (2, 32, "pre")  # type: ignore[union-attr]


def test_padding_of_a_text_is_told_from_its_ids() -> None:
    encoder = PoNetEncoder(30, dim=8, heads=2, depth=2, inner=16, longest=12, special=(1, 2)).eval()
    ids = torch.tensor([[1, 5, 6, 2, 7, 2, 0, 0]])
    found = encoder(ids)
    torch.testing.assert_close(found.states[:, :6], encoder(ids[:, :6]).states)
    assert not found.states[:, 6:].any()
    with pytest.raises(InputError, match="longest"):
        encoder(torch.ones(1, 13, dtype=torch.long))


TEXT = "the cat sat\non a mat\nit was red\n\ntwo dogs ran home\nthey were late\n"


def test_pretraining_from_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    texts = read_texts([tmp_path / "a.txt"], 40)
    assert [len(d) for d in texts.documents] == [3, 2]
    assert texts.words[CLS] == "[CLS]"
    generator = torch.Generator().manual_seed(0)
    pairs = segment_pairs(texts.documents, 30, 14, generator)
    assert set(pairs.order.tolist()) == {0, 1, 2}
    for row, order in zip(pairs.ids.tolist(), pairs.order.tolist(), strict=True):
        assert row[0] == CLS
        assert row.count(SEP) == 2
        a, b = row[1 : row.index(SEP)], [i for i in row[row.index(SEP) + 1 :] if i not in (0, SEP)]
        whole = [[word for sentence in document for word in sentence] for document in texts.documents]
        both = [w for w in whole if all(x in w for x in a + b)]
        assert bool(both) == (order != 2)
        if both and order != 2:
            first, second = (a, b) if order == 0 else (b, a)
            assert both[0].index(first[-1]) < both[0].index(second[0])
    hidden, chosen = masked_words(pairs.ids, len(texts.words), generator, 0.5)
    assert not chosen[pairs.ids < 5].any()
    assert torch.equal(hidden[~chosen], pairs.ids[~chosen])
    assert 0.5 < float((hidden[chosen] == MASK).float().mean()) < 0.95
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = PoNetEncoder(
            len(texts.words), dim=16, heads=2, depth=1, inner=24, longest=14, special=(CLS, SEP), dropout=0.0
        )
        model = PoNetForPretraining(encoder)
    losses = pretrain_ponet(model, texts.documents, steps=25, batch=16, length=14, learning_rate=1e-2, warm_up=3)
    assert sum(losses[-1]) < sum(losses[0])
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no sentence"):
        read_texts([tmp_path / "b.txt"])
    with pytest.raises(InputError, match="two sentences"):
        segment_pairs([[[5, 6]]], 1, 9, generator)


def test_fine_tuning_learns_which_word_is_there() -> None:
    ids = torch.randint(3, 9, (32, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = torch.where(torch.arange(32) % 2 == 0, 9, ids[:, 3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PoNetClassifier(PoNetEncoder.lra(10, 6, 2, dim=8, inner=12, dropout=0.0), 2)
    losses = finetune(net, ids, torch.arange(32) % 2, epochs=24, batch=16, learning_rate=3e-2)
    assert losses[-1] < 0.3 < losses[0]


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_it_stands_for_attention_and_is_taken_off_again(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    inputs: dict[str, Tensor]
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
        ids = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 5, 3, 0, 0, 0]])
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        special = special_tokens(ids, (2, 3))
        more: dict[str, Any] = {"special": special, "segments": segments_between(special)}
    else:
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
        inputs, more = {"pixel_values": torch.rand(2, 3, 8, 8)}, {}
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with ponet_for_attention(model, inputs, **more) as standing:
            changed = model(**inputs).last_hidden_state
            assert not torch.allclose(changed, plain)
            weights = standing[1].weights
            assert weights is not None
            tokens = changed.shape[1]
            assert weights.shape == (2, 3, tokens)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
            if kind == "bert":
                assert not weights[1, :, 3:].any()
        ones = [{k: v[i : i + 1] for k, v in inputs.items()} for i in (0, 1)]
        for number, one in enumerate(ones):
            own = {k: v[number : number + 1] for k, v in more.items()}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                with ponet_for_attention(model, one, **own):
                    alone = model(**one).last_hidden_state
                torch.manual_seed(0)
                with ponet_for_attention(model, inputs, **more):
                    torch.testing.assert_close(model(**inputs).last_hidden_state[number : number + 1], alone)
        assert torch.equal(model(**inputs).last_hidden_state, plain)


def test_no_map_of_tokens_by_tokens_is_made() -> None:
    found = growth(PoNetMixer(8, 2, 4), 8, (128, 256), repeats=1)
    # a row for padding beside those of segments
    assert found.largest == {128: 129 * 8, 256: 257 * 8}
    attention = growth(variants()["nystrom"](8, 2, 256), 8, (128, 256), repeats=1)
    assert attention.largest[256] >= 2 * 32 * 256
    assert set(found.seconds) == {128, 256}
    with pytest.raises(InputError, match="lengths"):
        growth(PoNetMixer(8, 2, 4), 8, (128,))


def test_a_causal_model_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=3, **sizes)).eval()
    with (
        pytest.raises(InputError, match="left to right"),
        ponet_for_attention(model, {"input_ids": torch.tensor([[4, 5]])}),
    ):
        pass


@pytest.mark.real("MiniLM")
def test_attention_of_minilm_is_swapped_and_restored_to_the_bit(minilm: Any) -> None:
    inputs = dict(minilm.processor(["A cat sat on the mat.", "It rained."], return_tensors="pt", padding=True))
    with torch.no_grad():
        plain = minilm.model(**inputs).last_hidden_state
        with ponet_for_attention(minilm.model, inputs) as standing:
            assert len(standing) == 6
            assert not torch.allclose(minilm.model(**inputs).last_hidden_state, plain)
        assert torch.equal(minilm.model(**inputs).last_hidden_state, plain)


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(1, 4, 6)
    for call, said in (
        (lambda: PoNetMixer(6, 4), "heads"),
        (lambda: PoNetMixer(6, 2, views=("all",)), "views"),  # type: ignore[arg-type]
        (lambda: PoNetMixer(6, 2).view(x, segments=torch.zeros(1, 3, dtype=torch.long)), "segments"),
        (lambda: PoNetEncoder(9, dim=8, mixer="rnn"), "mixer"),
    ):
        with pytest.raises(InputError, match=said):
            call()
