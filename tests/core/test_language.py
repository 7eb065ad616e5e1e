from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.language import encoded, log_probabilities
from cenote.testing.as_found import AsFound
from tests import tiny
from tests.models.live import zoo


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of bytes with a few merges, as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = ["a", "b", "c", "d", "e", ".", "Ġ"]
    merges = [("a", "b"), ("Ġ", "c"), ("d", "e")]
    names = ["<eos>", *letters, *("".join(m) for m in merges)]
    assert set(letters) <= set(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tiny.transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = zoo.MODELS[request.param]("sdpa").model
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def by_hand(model: nn.Module, prompt: list[int], continuation: list[int]) -> list[float]:
    logs = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
    return [float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(continuation)]


CHOICES = [" c", " cab", " c de c", " e"]


def test_scores_are_those_of_the_whole_strings_token_by_token(model: nn.Module, bytes_of: Any) -> None:
    found = AsFound(model, lambda: model(torch.tensor([[3, 4, 5]])))
    scored = log_probabilities(model, bytes_of, "ab ade", CHOICES)
    assert not found.changed()
    ids = encoded(bytes_of, "ab ade", CHOICES)
    for i, (choice, tokens) in enumerate(zip(CHOICES, ids.continuations, strict=True)):
        assert bytes_of("ab ade" + choice).input_ids == ids.prompt + tokens
        each = by_hand(model, ids.prompt, tokens)
        assert float(scored.total[i]) == pytest.approx(sum(each), abs=1e-4)
        assert float(scored.first[i]) == pytest.approx(each[0], abs=1e-4)
        assert int(scored.tokens[i]) == len(each)
        assert float(scored.per_token[i]) == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_batch_mates_change_nothing(model: nn.Module, bytes_of: Any) -> None:
    together = log_probabilities(model, bytes_of, "ab ade", CHOICES).total
    alone = torch.cat([log_probabilities(model, bytes_of, "ab ade", [choice]).total for choice in CHOICES])
    assert torch.allclose(together, alone, atol=1e-5)


def test_without_a_cache_it_is_the_same(model: nn.Module, bytes_of: Any) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Any:
            return type("Output", (), {"logits": self.inner(ids).logits})()

    expected = log_probabilities(model, bytes_of, "ab ade", CHOICES).total
    assert torch.allclose(log_probabilities(Bare(), bytes_of, "ab ade", CHOICES).total, expected, atol=1e-5)


def test_space_at_the_end_of_a_prompt_belongs_to_the_continuation(bytes_of: Any) -> None:
    assert encoded(bytes_of, "ab ", ["c"]) == encoded(bytes_of, "ab", [" c"])


def test_an_empty_prompt_begins_with_the_tokenizers_own_token(model: nn.Module, bytes_of: Any) -> None:
    assert encoded(bytes_of, "", ["ab"]).prompt == [0]
    bare = tiny.transformers().PreTrainedTokenizerFast(tokenizer_object=bytes_of.backend_tokenizer)
    with pytest.raises(InputError, match="question 7: is empty, and the tokenizer has no token"):
        log_probabilities(model, bare, "", ["ab"], item="question 7")


def test_what_the_tokenizer_puts_behind_is_dropped(tmp_path: Path) -> None:
    tiny.words(tmp_path)
    letters = tiny.transformers().AutoTokenizer.from_pretrained(tmp_path)
    found = encoded(letters, "a b", [" c", " d e"])
    cls, a, b = found.prompt
    assert (cls, letters.convert_ids_to_tokens([a, b])) == (2, ["a", "b"])
    assert [letters.convert_ids_to_tokens(c) for c in found.continuations] == [["c"], ["d", "e"]]
    assert encoded(letters, "a b", [" c"], special_tokens=False).prompt == [a, b]


@pytest.mark.parametrize(
    ("prompt", "choices", "message"),
    [
        ("ea", ["b"], r"question 3: the prompt's end 'ea' and 'b' merge into the token 'ab'"),
        ("e", [" c", "  "], "question 3: a continuation is empty"),
        ("e", [], "question 3: has no continuations"),
        ("e" * 30, [" c" * 5], "question 3: prompt and continuation are 35 tokens, and the model takes 32"),
    ],
)
def test_what_cannot_be_scored_is_named(
    model: nn.Module, bytes_of: Any, prompt: str, choices: list[str], message: str
) -> None:
    if not hasattr(model.config, "max_position_embeddings") or model.config.max_position_embeddings != 32:
        model.config.max_position_embeddings = 32
    with pytest.raises(InputError, match=message):
        log_probabilities(model, bytes_of, prompt, choices, item="question 3")
