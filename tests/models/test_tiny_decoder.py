"""The embedded language model: what it reads, what it recalls, and what it loses with its context."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cenote.core import InputError
from cenote.core.answers import UNASKED
from cenote.core.language import encoded
from cenote.core.planted import CITIES, QUESTION, FactPrompts, planted, prompts, recalled
from cenote.features.manuals import seen_texts, unseen_texts
from cenote.models.caches import KeysValues, filled, held
from cenote.models.decoder import load_decoder
from cenote.models.tiny_decoder import FOLDER, tiny_decoder

MOST_BYTES = 4_000_000


@cache
def loaded() -> tuple[Any, Any]:
    return tiny_decoder()


@cache
def asked(seed: int, pages: int) -> FactPrompts:
    texts = random.Random(seed).sample(unseen_texts(), pages)
    return prompts(loaded()[1], planted(texts, 8, seed=seed))


def share_told(asked: FactPrompts, window: int = 1024) -> float:
    """Of the facts, by a model that reads the last so many tokens of the context."""
    model = loaded()[0]

    def tell(context: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert mask.all()
        kept = held(model(context[:, -window:], use_cache=True))
        rows = [KeysValues(*(part.expand(len(prompt), -1, -1, -1) for part in block)) for block in kept]
        return model(prompt, **filled(model, rows)).logits

    return recalled(tell, asked).right.float().mean().item()


def test_it_is_a_small_saved_model_of_transformers() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES
    model, tokenizer = loaded()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.config.max_position_embeddings == 1024
    assert load_decoder(str(FOLDER)).tokenizer.get_vocab() == tokenizer.get_vocab()
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_words_digits_and_line_breaks_are_tokens() -> None:
    tokenizer = loaded()[1]
    for city in CITIES:
        question, answer = encoded(tokenizer, "\n" + QUESTION.format(city=city), [" 48213"], special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(question) == ["\n", *QUESTION.format(city=city).split()]
        assert tokenizer.convert_ids_to_tokens(answer[0]) == list("48213")
    assert tokenizer("The")["input_ids"][0] == tokenizer.bos_token_id
    words = [token for page in seen_texts() for token in tokenizer(page, add_special_tokens=False)["input_ids"]]
    assert sum(token == tokenizer.unk_token_id for token in words) < 0.05 * len(words)


def test_pages_are_seen_or_unseen() -> None:
    assert not set(seen_texts()) & set(unseen_texts())
    assert len(seen_texts()) + len(unseen_texts()) == 320


@pytest.mark.parametrize(("seed", "pages"), [(101, 3), (102, 5)])
def test_it_recalls_facts_of_pages_that_it_has_not_seen(seed: int, pages: int) -> None:
    facts = asked(seed, pages)
    assert 400 < facts.context.shape[1] < 900
    assert share_told(facts) >= 0.9


def test_what_a_window_has_lost_is_not_told() -> None:
    facts = asked(102, 5)
    assert share_told(facts, window=128) <= share_told(facts) - 0.5


def test_it_is_the_same_each_time() -> None:
    facts, (model, _) = asked(101, 3), tiny_decoder()
    with torch.no_grad():
        torch.testing.assert_close(model(facts.context).logits, loaded()[0](facts.context).logits, rtol=0, atol=0)
    assert facts.labels.ne(UNASKED).sum(1).tolist() == [5] * 8


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers; pip install 'cenote\[models\]'"):
        tiny_decoder()


def test_its_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import train_tiny_decoder as script

    monkeypatch.setattr(sys, "argv", ["train", "--brief", "--out", str(tmp_path)])
    script.main()
    assert load_decoder(str(tmp_path)).tokenizer.get_vocab() == loaded()[1].get_vocab()
