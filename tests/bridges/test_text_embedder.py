from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cenote.bridges.text_embedder import DESIGNS, EmbedderConfig, TextEmbedder
from cenote.core import InputError
from cenote.models.low_rank import LowRank
from cenote.pool import Triple, nearest
from cenote.pool.training import History

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'cenote[models]'")

WORDS = (
    *("a", "dog", "cat", "runs", "sits", "sleeps", "the", "red", "blue"),
    *("house", "is", "far", "near", "Instruct", ":", "Query", "find"),
)
FEW = {"latents": 4, "heads": 2, "head_dim": 4}


def tokenizer(end: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<unk>": 0, "</s>": 1} | {word: i for i, word in enumerate(WORDS, 2)}
    made = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    # the padding token is the end token, as of many decoders
    special = {"eos_token": "</s>", "pad_token": "</s>"} if end else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaModel(config).eval()


def embedder(number: int = 5, **others: Any) -> TextEmbedder:
    settings = {} if number == 1 else FEW
    torch.manual_seed(1)
    return TextEmbedder(decoder(), tokenizer(), EmbedderConfig.design(number, settings, **{"rank": 2} | others)).eval()


def stirred(model: TextEmbedder) -> TextEmbedder:
    """With an adaptation that does something, as after training."""
    with torch.no_grad():
        for up in model.adapted.up:
            up.normal_(std=0.3)
    return model


TEXTS = ["a dog runs", "the red house is far", "cat"]


@pytest.mark.parametrize("number", DESIGNS)
def test_vectors_do_not_hang_on_batch_mates_or_padding(number: int) -> None:
    model = stirred(embedder(number))
    vectors = model.encode(TEXTS)
    assert vectors.shape == (3, 16)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    for text, vector in zip(TEXTS, vectors, strict=True):
        torch.testing.assert_close(model.encode([text])[0], vector, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(TEXTS, batch=1), vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", DESIGNS)
def test_the_causal_mask_is_there_or_taken_away(number: int) -> None:
    model = embedder(number)
    ids, mask = model.tokens(["a dog runs", "a dog sits far"])
    states = model._states(ids, mask).last_hidden_state
    same = torch.allclose(states[0, :2], states[1, :2], atol=1e-6)
    assert same == (not DESIGNS[number][1])
    if number == 1:
        plain = model.backbone(input_ids=ids[1:]).last_hidden_state[0, -1]
        torch.testing.assert_close(model.encode(["a dog sits far"])[0], plain / plain.norm())


def test_the_end_is_appended_once_and_kept_when_a_text_is_cut() -> None:
    model = embedder(longest=4)
    ids, mask = model.tokens(["a dog", "a dog runs far", "a dog </s>"])
    assert ids[0].tolist()[:3] == [2, 3, 1]
    assert mask.sum(1).tolist() == [3, 4, 3]
    assert ids[1].tolist() == [2, 3, 5, 1]
    assert ids[2].tolist()[:3] == [2, 3, 1]
    without = TextEmbedder(decoder(), tokenizer(end=False), EmbedderConfig.design(1, rank=0))
    assert without.tokens(["a dog"])[0].tolist() == [[2, 3]]
    with pytest.raises(InputError, match="texts: expected at least one"):
        model.tokens([])


def test_the_instruction_stands_before_queries_alone() -> None:
    model = embedder(instruction="find a dog")
    said = model.tokenizer("Instruct: find a dog\nQuery: a cat")["input_ids"]
    assert model.tokens(["a cat"], query=True)[0][0].tolist() == [*said, 1]
    assert model.tokens(["a cat"])[0][0].tolist() == [2, 4, 1]
    assert not torch.allclose(model.encode(["a cat"], query=True), model.encode(["a cat"]))


def test_adaptation_starts_at_nothing_is_low_rank_and_leaves_the_model() -> None:
    body = decoder()
    ids = torch.tensor([[2, 3, 4]])
    before = body(input_ids=ids).last_hidden_state
    names = list(body.state_dict())
    adapted = LowRank(body, ("q_proj", "down_proj"), rank=2, alpha=8.0).eval()
    assert len(adapted.names) == 6
    with adapted.on(body):
        assert torch.equal(body(input_ids=ids).last_hidden_state, before)
    with torch.no_grad():
        for up in adapted.up:
            up.normal_()
    layer, x = body.layers[0].self_attn.q_proj, torch.randn(2, 16)
    with adapted.on(body):
        expected = x @ (layer.weight + 4 * adapted.up[0] @ adapted.down[0]).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(body(input_ids=ids).last_hidden_state, before)
    assert list(body.state_dict()) == names
    assert not any(p.requires_grad for p in body.parameters())
    with pytest.raises(InputError, match="targets: the model has no linear layer"):
        LowRank(body, ("nothing",))


def test_all_seven_linear_layers_are_adapted_by_default() -> None:
    config = EmbedderConfig.design(3)
    assert (config.rank, config.alpha, config.adapted_dropout, config.longest) == (16, 32.0, 0.1, 1024)
    assert len(embedder(3).adapted.names) == 7 * 3


@pytest.mark.parametrize("number", [1, pytest.param(5, marks=pytest.mark.thorough("half a minute for another design"))])
def test_embedders_learn_from_hard_negatives(number: int) -> None:
    model = embedder(number, rank=4, adapted_dropout=0.0)
    pairs = [
        ("a dog", "the red house", "the blue house"),
        ("a cat", "the blue house", "the red house"),
        ("is far", "is near", "a dog"),
    ]
    triples = [Triple(*pair) for pair in pairs]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit(triples, steps=150, batch=3, accumulate=1, lr=5e-3, warm_up=10)
    changed = {k.partition(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"adapted"} if number == 1 else {"adapted", "pool"})
    found = model.search([p[0] for p in pairs], [p[1] for p in pairs], k=1)
    assert found.indices.squeeze(1).tolist() == [0, 1, 2]
    again = nearest(model.encode([p[0] for p in pairs], query=True), model.encode([p[1] for p in pairs]), 1)
    torch.testing.assert_close(again.cosines, found.cosines)


def test_steps_gather_batches_and_the_recipe_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    from cenote.bridges import text_embedder

    seen: dict[str, Any] = {}

    def watched(model: Any, batches: Any, loss: Any, optimizer: Any, **how: Any) -> History:
        seen.update(
            how, batches=[len(b) for b in batches()], loss=float(loss(torch.tensor([0, 1]))), optimizer=optimizer
        )
        return History([], [], -1)

    monkeypatch.setattr(text_embedder, "train", watched)
    model = embedder()
    triples = [Triple("a", "dog", "cat"), Triple("the", "red", "blue")]
    model.fit(triples, steps=5, bf16=True)
    assert seen["batches"] == [1] * 5 * 256
    assert (seen["accumulate"], seen["passes"]) == (256, 1)
    group = seen["optimizer"].param_groups[0]
    assert isinstance(seen["optimizer"], torch.optim.AdamW)
    assert (group["initial_lr"], group["weight_decay"]) == (1e-5, 0.01)
    assert seen["loss"] > 0
    with pytest.raises(InputError, match="triples: expected at least one, all with a negative"):
        model.fit([*triples, Triple("a", "b")])


def test_one_folder_holds_all(tmp_path: Path) -> None:
    model = stirred(embedder(3, instruction="find"))
    model.save(tmp_path)
    loaded = TextEmbedder.load(tmp_path)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.encode(TEXTS, query=True), model.encode(TEXTS, query=True))
    (tmp_path / "embedder.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"embedder\.safetensors: is damaged .*; save the embedder again"):
        TextEmbedder.load(tmp_path)
    with pytest.raises(InputError, match="holds no embedder"):
        TextEmbedder.load(tmp_path / "nowhere")


def test_a_model_that_is_not_causal_is_told() -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    body = transformers.BertModel(config).eval()
    with pytest.raises(InputError, match="bidirectional: this model is not causal"):
        TextEmbedder(body, tokenizer(), EmbedderConfig.design(1, rank=0))
    model = TextEmbedder(body, tokenizer(), EmbedderConfig.design(5, FEW, rank=2, targets=("query", "value"))).eval()
    torch.testing.assert_close(model.encode(TEXTS)[2], model.encode(TEXTS[2:])[0], rtol=1e-4, atol=1e-5)
