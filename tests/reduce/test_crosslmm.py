"""Merged tokens in a sequence, all others outside of it: exact identities, masks, training stages, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.answers import UNASKED
from cenote.reduce.crosslmm.dual import DualCrossAttention
from cenote.reduce.crosslmm.merging import VisualProjector, token_merge
from cenote.reduce.crosslmm.model import CrossLMM
from cenote.reduce.crosslmm.training import Clips, cost, train_crosslmm, training_stage
from tests import tiny

DIM, GRID, IMAGE = 3, 4, 1


class Patches(nn.Module):
    """Each pixel a token."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(DIM, DIM)

    def forward(self, frames: Tensor) -> Tensor:
        return self.map(frames.flatten(2).transpose(1, 2))


def decoder(kind: str = "Qwen2", layers: int = 3, **others: Any) -> nn.Module:
    library = tiny.transformers()
    settings = {
        "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40, "pad_token_id": 0,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "num_hidden_layers": layers,
        **others,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(**settings)).eval()


def crosslmm(model: nn.Module | None = None, opened: bool = False, **settings: Any) -> CrossLMM:
    torch.manual_seed(1)
    settings = {"dim": DIM, "placeholder": IMAGE, "side": 2, "every": 2, **settings}
    made = CrossLMM(decoder() if model is None else model, Patches(), **settings).eval()
    if opened:
        for name, p in made.layers.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(p, 0.7)
    return made


def frames(batch: int = 2, count: int = 3, seed: int = 2) -> Tensor:
    return torch.randn(batch, count, DIM, GRID, GRID, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 2, tokens: int = 4) -> Tensor:
    return torch.randint(5, 38, (batch, tokens), generator=torch.Generator().manual_seed(3))


def test_merging_is_means_of_windows_and_without_merging_nothing_changes() -> None:
    x = torch.randn(2, 27 * 27, 5)
    means = x.view(2, 3, 9, 3, 9, 5).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(token_merge(x, 3), means, atol=1e-6)
    assert torch.allclose(token_merge(x, 27), x)
    assert torch.allclose(token_merge(x, 27, "bilinear"), x, atol=1e-6)
    constant = torch.ones(729, 2)
    assert torch.allclose(token_merge(constant, 4, "bilinear"), constant[:16], atol=1e-6)
    projector = VisualProjector(5, 8)
    assert torch.equal(projector(token_merge(x, 27)), projector(x))
    with pytest.raises(InputError, match="x: expected a square grid"):
        token_merge(x[:, :10], 2)


def layer(**settings: Any) -> DualCrossAttention:
    torch.manual_seed(4)
    made = DualCrossAttention(16, 4, **settings)
    for name, p in made.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(p, 0.7)
    return made


H, MEMORY = torch.randn(2, 6, 16), torch.randn(2, 12, 16)
VISUAL = torch.tensor([[False, True, True, False, False, False], [True, True, False, False, False, False]])


def test_shut_gates_are_the_identity_and_their_gradients_are_not_zero() -> None:
    torch.manual_seed(0)
    shut = DualCrossAttention(16, 4)
    y = shut(H, shut.remember(MEMORY), VISUAL, ~VISUAL)
    assert torch.equal(y, H)
    y.square().sum().backward()
    for gate in (shut.v2v.gate, shut.t2v.gate, shut.gate):  # type: ignore[union-attr]
        assert gate is not None
        assert gate.grad is not None
        assert float(gate.grad) != 0


def test_a_constant_video_gives_the_value_of_any_of_its_tokens() -> None:
    opened = layer(hidden=0)
    token = torch.randn(1, 1, 16)
    y = opened(H, opened.remember(token.expand(2, 12, 16)), VISUAL, ~VISUAL)
    for where, cross in ((VISUAL, opened.v2v), (~VISUAL, opened.t2v)):
        assert cross is not None
        expected = torch.tanh(cross.gate) * cross.o(cross.v(token[0, 0]))
        assert torch.allclose((y - H)[where], expected.expand(int(where.sum()), -1), atol=1e-6)


def test_the_memory_is_a_set() -> None:
    opened = layer()
    y = opened(H, opened.remember(MEMORY), VISUAL, ~VISUAL)
    again = opened(H, opened.remember(MEMORY[:, torch.randperm(12)]), VISUAL, ~VISUAL)
    assert torch.allclose(y, again, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_of_queries_change_nothing(chunk: int) -> None:
    opened, in_chunks = layer(), layer(chunk=chunk)
    memory = opened.remember(MEMORY)
    assert torch.allclose(opened(H, memory, VISUAL, ~VISUAL), in_chunks(H, memory, VISUAL, ~VISUAL), atol=1e-6)


def test_attention_is_that_of_torch() -> None:
    opened = layer(hidden=0, text=False)
    cross = opened.v2v
    assert cross is not None
    q, k, v = (m(x).unflatten(2, (4, 4)).transpose(1, 2) for m, x in
               ((cross.q, opened.norm(H)), (cross.k, MEMORY), (cross.v, MEMORY)))  # fmt: skip
    read = torch.tanh(cross.gate) * cross.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    expected = H + read * VISUAL[..., None]
    assert torch.allclose(opened(H, opened.remember(MEMORY), VISUAL, ~VISUAL), expected, atol=1e-6)


def test_who_asks() -> None:
    for settings, asks in (({"text": False}, VISUAL), ({"visual": False}, ~VISUAL), ({"shared": True}, VISUAL | True)):
        opened = layer(**settings)
        y = opened(H, opened.remember(MEMORY), VISUAL, ~VISUAL)
        if settings.get("visual", True) is False:
            asks = torch.ones_like(VISUAL)  # its feed-forward part acts on all
        assert torch.equal((y != H).any(-1), asks)
    shared = layer(shared=True)
    assert shared.t2v is shared.v2v
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in layer(text=False).parameters())
    with pytest.raises(InputError, match="nothing would read"):
        layer(visual=False, text=False)


def test_padded_memory_changes_nothing_even_as_nan() -> None:
    opened = layer()
    mask = torch.tensor([[True] * 7 + [False] * 5, [False] * 12])
    y = opened(H, opened.remember(MEMORY.masked_fill(~mask[..., None], float("nan")), mask), VISUAL, ~VISUAL)
    alone = opened(H[:1], opened.remember(MEMORY[:1, :7]), VISUAL[:1], ~VISUAL[:1])
    assert torch.allclose(y[:1], alone, atol=1e-6)
    assert torch.equal(y[1], H[1])


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("inside", ["before", "after attention"])
def test_at_the_start_it_is_the_decoder_on_merged_tokens_to_the_bit(kind: str, inside: str) -> None:
    base = decoder(kind)
    model = crosslmm(base, inside=inside)
    plain = base(text()).logits
    state = {name: p.clone() for name, p in base.state_dict().items()}
    ids, mask = model.prompt(text(), frames())
    x = torch.cat([model.see(frames()).tokens, base.get_input_embeddings()(text())], 1)
    assert torch.equal(model(ids, frames(), mask), base(inputs_embeds=x, attention_mask=mask.long()).logits)
    opened = crosslmm(base, opened=True, inside=inside)
    changed = opened(ids, frames(), mask)
    assert not torch.allclose(changed, model(ids, frames(), mask), atol=1e-4)
    assert torch.equal(base(text()).logits, plain)
    assert all(torch.equal(p, state[name]) for name, p in base.state_dict().items())


def test_the_two_places_of_a_layer_differ() -> None:
    base = decoder()
    ids, mask = crosslmm(base).prompt(text(), frames())
    first, second = (crosslmm(base, opened=True, inside=w)(ids, frames(), mask) for w in ("before", "after attention"))
    assert not torch.allclose(first, second, atol=1e-4)


def test_without_frames_the_decoder_runs_as_it_is() -> None:
    model = crosslmm(opened=True)
    assert torch.equal(model(text()), model.decoder(text()).logits)
    made = model.generate(text(), new_tokens=3)
    ids = text()
    for _ in range(3):
        ids = torch.cat([ids, model.decoder(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids[:, 4:])


def test_padded_frames_have_no_influence_even_as_nan_and_rows_are_those_of_single_runs() -> None:
    model = crosslmm(opened=True)
    shown = torch.tensor([[True, True, False], [True, True, True]])
    clip = frames().masked_fill(~shown.view(2, 3, 1, 1, 1), float("nan"))
    ids, mask = model.prompt(text(), clip, frame_mask=shown)
    both = model(ids, clip, mask, shown)
    first = model(*model.prompt(text()[:1], clip[:1, :2])[:1], clip[:1, :2])
    second = model(*model.prompt(text()[1:], clip[1:])[:1], clip[1:])
    assert torch.allclose(both[0][mask[0]], first[0], atol=1e-5)
    assert torch.allclose(both[1], second[0], atol=1e-5)


def test_text_before_the_video_asks_too() -> None:
    model = crosslmm(opened=True, layer={"visual": False})
    ids = torch.cat([text()[:, :2], torch.full((2, 12), IMAGE), text()[:, 2:]], 1)
    first, second = model(ids, frames()), model(ids, frames(seed=5))
    assert not torch.allclose(first[:, :2], second[:, :2], atol=1e-5)
    shut = crosslmm()
    assert torch.allclose(shut(ids, frames())[:, :2], shut(ids, frames(seed=5))[:, :2], atol=1e-6)


@pytest.mark.parametrize("inside", ["before", "after attention"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_decoding_with_what_is_kept_is_recomputing(inside: str, chunk: int | None) -> None:
    model = crosslmm(opened=True, inside=inside, layer={"chunk": chunk})
    shown = torch.tensor([[True, True, False], [True, True, True]])
    ids, mask = model.prompt(text(), frames(), frame_mask=shown)
    made = model.generate(ids, frames(), mask, shown, new_tokens=4)
    for step in range(4):
        logits = model(ids, frames(), mask, shown)[:, -1].index_fill(1, torch.tensor([IMAGE]), -1e9)
        assert torch.equal(logits.argmax(-1), made[:, step])
        ids = torch.cat([ids, made[:, step : step + 1]], 1)
        mask = F.pad(mask, (0, 1), value=True)
    ended = model.generate(ids[:1, :-4], frames()[:1], mask[:1, :-4], shown[:1], new_tokens=9, end=int(made[0, 1]))
    assert torch.equal(ended[0], made[0, : ended.shape[1]])
    assert ended.shape[1] <= 2


def test_wrong_numbers_of_placeholders_are_errors() -> None:
    model = crosslmm()
    with pytest.raises(InputError, match=r"ids: has \[0, 0\] placeholders"):
        model(text(), frames())
    with pytest.raises(InputError, match="frame_mask: expected bool"):
        model.see(frames(), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="encoder: expected tokens"):
        CrossLMM(decoder(), lambda x: x, dim=DIM, placeholder=IMAGE).see(frames())
    with pytest.raises(InputError, match="placeholder: 99"):
        crosslmm(placeholder=99)


def asked(model: CrossLMM) -> Clips:
    ids, mask = model.prompt(torch.tensor([[20, 5], [20, 6]]), frames())
    labels = torch.full_like(ids, UNASKED)
    labels[:, -1] = ids[:, -1]
    return Clips(ids, labels, frames(), mask)


def test_the_first_stage_trains_projector_and_v2v_the_second_everything() -> None:
    model = crosslmm(every=1)
    clips = asked(model)
    first = training_stage(model, 1)
    assert [group["lr"] for group in first] == [1e-4]
    losses = train_crosslmm(model, lambda: clips, [{**first[0], "lr": 1e-2}], steps=3)
    assert len(losses) == 3
    assert model.decoder.get_input_embeddings().weight.grad is None  # type: ignore[operator]
    layers = list(model.layers.values())
    for dual in layers:
        assert dual.t2v.gate.grad is None  # type: ignore[union-attr]
        assert float(dual.t2v.gate) == 0  # type: ignore[union-attr, arg-type]
        assert float(dual.v2v.gate) != 0  # type: ignore[union-attr, arg-type]
    assert {"v2v", "t2v", "ffn"} == set(model.gates()[0])
    second = training_stage(model, 2)
    assert [group["lr"] for group in second] == [1e-5, 2e-6]
    assert {id(p) for p in model.encoder.parameters()} == {id(p) for p in second[1]["params"]}  # type: ignore[union-attr]
    train_crosslmm(model, lambda: clips, second, steps=1)
    assert all(float(dual.t2v.gate) != 0 for dual in layers)  # type: ignore[union-attr, arg-type]
    both = training_stage(model, 1, text=True)
    assert any(p is layers[0].t2v.gate for p in both[0]["params"])  # type: ignore[union-attr]


def test_it_learns_from_what_only_the_memory_holds() -> None:
    model = crosslmm(decoder(layers=1, initializer_range=0.3), every=1, side=1)
    clip = frames(count=1)
    clip = clip - clip.mean((3, 4), keepdim=True)
    ids, mask = model.prompt(torch.tensor([[20, 5], [20, 6]]), clip)
    labels = torch.full_like(ids, UNASKED)
    labels[:, -1] = ids[:, -1]
    clips = Clips(ids, labels, clip, mask)
    losses = train_crosslmm(model, lambda: clips, training_stage(model, 2, lr=2e-2), steps=25)
    assert losses[-1] < 0.4
    assert any(abs(gate) > 0.02 for gates in model.gates().values() for gate in gates.values())


def test_costs_are_a_hand_sum() -> None:
    found = cost(4, 729, 50, side=3, dim=64, blocks=8, every=4, kv_dim=16)
    s, m = 50 + 36, 4 * 729
    assert found.sequence == s
    assert found.products == 2 * s * s * 64 * 8 + 2 * s * m * 64 * 2
    assert found.cached == 2 * s * 16 * 8 + 2 * 2 * m * 64 * 2
    whole = cost(4, 729, 50, side=27, dim=64, blocks=8, every=None, kv_dim=16)
    assert (whole.sequence, whole.cross) == (50 + m, 0)
    assert found.products < whole.products / 10
