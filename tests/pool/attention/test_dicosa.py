import math

import pytest
import torch
import torch.nn.functional as F
from tests.pools import randn, shaken
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cenote.core import InputError
from cenote.pool.attention.dicosa.query_bank import query_bank_normalise
from cenote.pool.attention.dicosa.retrieval import multiply_adds_per_pair, retrieved
from cenote.pool.attention.dicosa.similarity import DiCoSA
from cenote.pool.attention.dicosa.temporal import TemporalTransformer
from cenote.pool.attention.dicosa.training import Pairs, TemporalLSTM, TextVideoRetrieval, train_retrieval


def constant(head: DiCoSA, factor: float = 1.0) -> DiCoSA:
    with torch.no_grad():
        head.weight_fc[2].weight.zero_()
        head.weight_fc[2].bias.fill_(factor)
    return head


def data(videos: int = 3, frames: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(videos, frames, dtype=torch.bool)
    mask[1, 3:] = False
    return randn(4, 8), randn(videos, frames, 8), mask


def test_similarity_is_its_equation() -> None:
    head = shaken(DiCoSA(8, blocks=4, temp=2.0))
    text, frames, mask = data()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for a in range(4):
        for b in range(3):
            real = frames[b, mask[b]]
            v = ((real @ text[a]) / 2.0).softmax(0) @ real
            for k in range(4):
                t_k, v_k = text[a, 2 * k : 2 * k + 2], v[2 * k : 2 * k + 2]
                expected[a, b] += head.weight_fc(torch.cat([t_k, v_k]))[0] * F.cosine_similarity(t_k, v_k, dim=0)
    torch.testing.assert_close(head(text, frames, mask), expected, atol=1e-7, rtol=1e-7)
    factors, cosines = head.concept_scores(text, frames, mask)
    torch.testing.assert_close((factors * cosines).sum(-1), head(text, frames, mask))
    head.texts_at_once = 3
    torch.testing.assert_close(head(text, frames, mask), expected, atol=1e-7, rtol=1e-7)


def test_constant_factors_and_one_block_give_the_plain_cosine() -> None:
    text, frames, mask = data()
    one = constant(shaken(DiCoSA(8, blocks=1)))
    weights = one.frame_weights(text, frames, mask)
    pooled = torch.einsum("abv,bvd->abd", weights, frames)
    plain = F.cosine_similarity(text.unsqueeze(1), pooled, dim=-1)
    torch.testing.assert_close(one(text, frames, mask), plain, atol=1e-7, rtol=1e-7)
    blocks = constant(shaken(DiCoSA(8, blocks=4)), 0.5)
    each = F.cosine_similarity(text.view(4, 1, 4, 2), pooled.view(4, 3, 4, 2), dim=-1)
    torch.testing.assert_close(blocks(text, frames, mask), 0.5 * each.sum(-1), atol=1e-6, rtol=1e-6)


def test_heat_gives_the_mean_frame_and_cold_the_best() -> None:
    text, frames, mask = data()
    hot = DiCoSA(8, temp=1e9).double().frame_weights(text, frames, mask)
    torch.testing.assert_close(hot, (mask / mask.sum(1, keepdim=True)).double().expand(4, -1, -1), atol=1e-7, rtol=0)
    cold = DiCoSA(8, temp=1e-9).double().frame_weights(text, frames, mask)
    scores = torch.einsum("ad,bvd->abv", text, frames).masked_fill(~mask, -1e9)
    assert torch.equal(cold, F.one_hot(scores.argmax(-1), 5).double())


def test_what_changes_nothing_and_what_does() -> None:
    head = shaken(DiCoSA(8, blocks=4))
    text, frames, mask = data()
    order = torch.randperm(5)
    torch.testing.assert_close(head(text, frames[:, order], mask[:, order]), head(text, frames, mask))
    blocks = torch.randperm(4).repeat_interleave(2) * 2 + torch.arange(8) % 2
    torch.testing.assert_close(head(text[:, blocks], frames[..., blocks], mask), head(text, frames, mask))
    single = head.pool(text, head._checked(text, frames[:, :1], None))
    torch.testing.assert_close(single, frames[:, 0].expand(4, -1, -1))
    assert not torch.allclose(head.frame_weights(text, 2 * frames), head.frame_weights(text, frames))


def test_padding_is_not_seen() -> None:
    head = shaken(DiCoSA(8, blocks=4))
    text, frames, mask = data()
    dirty = frames.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    torch.testing.assert_close(head(text, dirty, mask)[:, 1], head(text, frames[1:2, :3])[:, 0])
    (grad,) = torch.autograd.grad(head(text, dirty, mask).sum(), dirty)
    assert grad.isfinite().all()
    assert not grad[~mask].any()
    mask[2] = False
    losses = head.losses(text[:3], dirty, mask)
    assert losses.total.isfinite()
    assert not head(text, dirty, mask)[:, 2].any()


def test_padded_frames_take_their_share_as_with_the_authors() -> None:
    text, frames, mask = data()
    ours, theirs = DiCoSA(8, blocks=4).double(), DiCoSA(8, blocks=4, renormalise=False).double()
    raw = (torch.einsum("ad,bvd->abv", text, frames) / 3).softmax(-1) * mask
    weights = theirs.frame_weights(text, frames, mask)
    torch.testing.assert_close(weights, raw)
    assert (weights[:, 1].sum(-1) < 0.999).all()
    even = torch.ones(4, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.frame_weights(text, frames, mask).sum(-1), even)
    theirs.load_state_dict(ours.state_dict())
    factors, cosines = theirs.concept_scores(text, frames, mask)
    torch.testing.assert_close((factors * cosines).sum(-1), theirs(text, frames, mask))
    torch.testing.assert_close(theirs(text, frames[::2], mask[::2]), ours(text, frames[::2]))


def test_losses_are_their_equations() -> None:
    head = shaken(DiCoSA(8, blocks=4, alpha=0.3, beta=0.2, normaliser=3))
    text, frames, mask = data(4)
    losses = head.losses(text, frames, mask)
    logits = head(text, frames, mask) * head.logit_scale.exp().clamp(max=100)
    rows = -torch.stack([logits[i].log_softmax(0)[i] for i in range(4)]).mean()
    columns = -torch.stack([logits[:, i].log_softmax(0)[i] for i in range(4)]).mean()
    torch.testing.assert_close(losses.contrastive, ((rows + columns) / 2).detach())
    video = torch.stack([head.frame_weights(text, frames, mask)[i, i] @ frames[i] for i in range(4)])
    t, v = ((s.view(4, 4, 2) - s.view(4, 4, 2).mean(-1, keepdim=True)) for s in (text, video))
    t, v = t / t.std(-1, keepdim=True), v / v.std(-1, keepdim=True)
    c = sum(t[i] @ v[i].T for i in range(4)) / (4 * 3)
    off = c[~torch.eye(4, dtype=torch.bool)]
    expected = 0.3 * (c.diagonal() - 1).square().sum() + 0.2 * off.square().sum()
    torch.testing.assert_close(losses.decoupling, expected.detach())
    torch.testing.assert_close(losses.total, losses.contrastive + expected)


def test_matched_concepts_cost_least() -> None:
    """Identical sides of independent concepts have correlation 1 on the diagonal and near 0 elsewhere."""
    torch.manual_seed(0)
    head = DiCoSA(256, blocks=4).double()
    x = randn(400, 256)
    alike, other = head.decoupling(x, x), head.decoupling(x, randn(400, 256))
    assert alike < 1e-4
    assert other > 0.03
    assert DiCoSA(4, blocks=4).double().decoupling(torch.ones(2, 4), torch.ones(2, 4)).isfinite()


def test_start_is_the_authors() -> None:
    torch.manual_seed(0)
    head = DiCoSA(512)
    assert head.blocks == 8
    assert head.weight_fc[0].weight.shape == (256, 128)
    assert head.weight_fc[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.weight_fc[0].bias.any()
    assert head.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert head.temp == 3.0


def test_temporal_transformer_is_clips_layers_added_to_the_frames() -> None:
    model = shaken(TemporalTransformer(8, layers=1, heads=2, frames=6))
    x = randn(2, 5, 8)
    layer = model.layers[0]
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    state = {
        "in_proj_weight": layer.attn.qkv.weight,
        "in_proj_bias": layer.attn.qkv.bias,
        "out_proj.weight": layer.attn.proj.weight,
        "out_proj.bias": layer.attn.proj.bias,
    }
    reference.load_state_dict(state)
    z = x + model.position_embedding[:5]
    n = layer.norm1(z)
    z = z + reference(n, n, n, need_weights=False)[0]
    hidden = layer.mlp.fc1(layer.norm2(z))
    z = z + layer.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(model(x), x + z)
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    short = model(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    torch.testing.assert_close(short[0, :3], model(x[:1, :3])[0])
    assert not short[~mask].any()


def test_clip_weights_load_by_name() -> None:
    transformers = pytest.importorskip("transformers", reason="cenote[transformers] is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    source = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=50, max_position_embeddings=9, hidden_act="quick_gelu", **sizes)
    ).eval()
    for p in source.parameters():
        nn.init.normal_(p, std=0.3)
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in source.state_dict().items()}
    model = TemporalTransformer(8, 2, 2, frames=6)
    model.load_clip_text(state)
    assert torch.equal(model.position_embedding, state["text_model.embeddings.position_embedding.weight"][:6])
    z = torch.randn(1, 5, 8)
    encoder = getattr(source, "text_model", source).encoder
    for layer, theirs in zip(model.layers, encoder.layers, strict=False):
        found = theirs(z, attention_mask=None)
        z = layer(z)
        torch.testing.assert_close(z, found[0] if isinstance(found, tuple) else found)
    del state["text_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.fc1\.bias"):
        model.load_clip_text(state)
    with pytest.raises(InputError, match="expected"):
        TemporalTransformer(4, 1, 1).load_clip_text(state)


def test_query_bank_takes_from_items_that_suit_everybody() -> None:
    torch.manual_seed(0)
    s, bank = randn(6, 5).tanh(), randn(9, 5).tanh()
    for top_k in (1, 2):
        out = query_bank_normalise(s, bank, beta=3.0, top_k=top_k)
        retrieved = {int(i) for row in bank for i in row.topk(top_k).indices}
        for q in range(6):
            raw = (3.0 * s[q]).exp()
            row = raw / (3.0 * bank).exp().sum(0) if int(s[q].argmax()) in retrieved else raw
            torch.testing.assert_close(out[q].exp(), row)
    assert query_bank_normalise(1e4 * s, bank, beta=70.0).isfinite().all()


def test_what_is_retrieved_both_ways() -> None:
    torch.manual_seed(0)
    s = randn(30, 30) + 2 * torch.eye(30)
    for way, found in ((s, retrieved(s).text_to_video), (s.T, retrieved(s).video_to_text)):
        ranks = [way[i].argsort(descending=True).tolist().index(i) + 1 for i in range(30)]
        assert found.recall == {k: sum(r <= k for r in ranks) / 30 for k in (1, 5, 10)}
        assert found.mean_rank == pytest.approx(sum(ranks) / 30)
        assert found.median_rank == pytest.approx((sorted(ranks)[14] + sorted(ranks)[15]) / 2)
    # a similarity that knows nothing finds its own in the middle
    assert retrieved(torch.zeros(9, 9)).text_to_video.mean_rank == 5


def test_multiply_adds_of_a_pair_are_those_that_are_counted() -> None:
    head = DiCoSA(32, blocks=4)

    def counted(videos: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(torch.randn(1, 32), torch.randn(videos, 6, 32))
        return counter.get_total_flops() // 2

    # the counter sees products of matrices, and not the cosines
    assert counted(9) - counted(8) == multiply_adds_per_pair(32, 4, 6) - 2 * 32


def test_errors() -> None:
    head = DiCoSA(8, blocks=4)
    text, frames, mask = torch.randn(3, 8), torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    for call, name in (
        (lambda: DiCoSA(8, blocks=3), "blocks"),
        (lambda: DiCoSA(8, temp=0.0), "temp"),
        (lambda: DiCoSA(8, normaliser=0), "normaliser"),
        (lambda: DiCoSA(8, texts_at_once=0), "texts_at_once"),
        (lambda: head(text[:, :4], frames), "text"),
        (lambda: head(text, frames[0]), "frames"),
        (lambda: head(text, frames, mask.long()), "mask"),
        (lambda: head.losses(text[:2], frames), "text"),
        (lambda: TemporalTransformer(8, layers=0), "layers"),
        (lambda: TemporalTransformer(8, frames=4)(frames), "x"),
        (lambda: query_bank_normalise(text, text[:, :3]), "bank"),
        (lambda: query_bank_normalise(text, text, beta=0.0), "beta"),
        (lambda: query_bank_normalise(text, text, top_k=9), "top_k"),
        (lambda: retrieved(text), "similarity"),
    ):
        with pytest.raises(InputError, match=name):
            call()
    assert math.isclose(float(head(text[:0], frames).sum().detach()), 0.0)


def towers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(3, 8).double(), nn.Sequential(nn.Flatten(), nn.Linear(12, 8)).double()


@pytest.mark.parametrize("aggregation", ["transformer", "lstm", "none"])
def test_the_whole_model_is_its_parts(aggregation: str) -> None:
    text_tower, frame_tower = towers()
    model = TextVideoRetrieval(8, text_tower, frame_tower, aggregation, layers=1, frames=6, blocks=2).double()
    texts, videos = randn(4, 3), randn(3, 5, 3, 4)
    mask = torch.arange(5) < torch.tensor([[5], [3], [2]])
    frames = torch.stack([frame_tower(video) for video in videos])
    if model.temporal is not None:
        frames = model.temporal(frames, mask)
    expected = model.similarity(text_tower(texts), frames, mask)
    torch.testing.assert_close(model(texts, videos, mask), expected)
    index = model.index(videos, mask)
    torch.testing.assert_close(torch.cat([model.search(t, index, mask) for t in texts.split(1)]), expected)
    torch.testing.assert_close(model(texts, videos[1:2, :3]), expected[:, 1:2])


def test_frames_of_an_lstm_know_those_before_them() -> None:
    lstm, x = TemporalLSTM(4).double(), randn(2, 5, 4)
    changed = x.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(lstm(changed)[:, :3], lstm(x)[:, :3])
    assert (lstm(changed)[:, 4] != lstm(x)[:, 4]).all()
    mask = torch.arange(5) < torch.tensor([[5], [0]])
    assert torch.equal(lstm(x, mask)[1], torch.zeros(5, 4, dtype=torch.float64))


def test_towers_learn_at_a_rate_of_their_own() -> None:
    text_tower, frame_tower = towers()
    model = TextVideoRetrieval(8, text_tower, frame_tower, layers=1, frames=6, blocks=2).double()
    new, old = model.parameter_groups()
    assert (new["lr"], old["lr"]) == (1e-4, 1e-7)
    assert {id(p) for p in old["params"]} == {id(p) for t in (text_tower, frame_tower) for p in t.parameters()}
    assert len(new["params"]) + len(old["params"]) == len(list(model.parameters()))
    shared = TextVideoRetrieval(8, text_tower, text_tower, "none", blocks=2)
    assert len(shared.parameter_groups()[1]["params"]) == 2
    pairs = Pairs(randn(6, 3), randn(6, 5, 3, 4), torch.ones(6, 5, dtype=torch.bool))
    frames = model.index(pairs.frames, pairs.mask)
    expected = model.similarity.losses(model.texts(pairs.text), frames, pairs.mask).total
    torch.testing.assert_close(model.loss(pairs), expected)
    before = text_tower.weight.detach().clone()
    history = train_retrieval(model, lambda: [pairs, pairs], passes=3, lr=1e-2, tower_lr=1e-5, warm_up=0.2)
    assert history.losses[-1] < history.losses[0]
    assert 0 < (text_tower.weight - before).abs().max() < 1e-4
    with pytest.raises(InputError, match="batches: gave nothing"):
        train_retrieval(model, list)


def test_the_loss_is_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextVideoRetrieval(8, aggregation="none", blocks=2).double()
    text, frames = randn(6, 8), randn(6, 5, 8)
    whole = model.loss(Pairs(text, frames))
    others = {(3, 8): text[3:], (3, 5, 8): frames[3:]}
    monkeypatch.setattr(
        "cenote.pool.attention.dicosa.training.gathered", lambda own: torch.cat([own, others[tuple(own.shape)]])
    )
    torch.testing.assert_close(model.loss(Pairs(text[:3], frames[:3])), whole)
