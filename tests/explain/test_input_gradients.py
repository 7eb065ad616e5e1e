from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import InputGradients

LENGTHS = (5, 3, 4)


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=30, intermediate_size=16, pad_token_id=0, initializer_range=0.5, **sizes)
    return LlamaForSequenceClassification(config)


def encoder() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=20, pad_token_id=0, initializer_range=0.5, **sizes)
    return RobertaForSequenceClassification(config)


@pytest.mark.parametrize("form", ["times input", "norm", "integrated"])
@pytest.mark.parametrize("made", [decoder, encoder])
def test_what_a_model_reads_off_its_numbers_of_tokens_stays(made, form) -> None:  # type: ignore[no-untyped-def]
    """Where a text ends, and positions: a batch with padding is explained as its texts are alone."""
    torch.manual_seed(0)
    model = made().eval()
    texts = [torch.randint(3, 30, (1, n)) for n in LENGTHS]
    # a classifier that reads the last token finds it by the padding's number
    padded: Tensor = torch.cat([nn.functional.pad(t, (0, max(LENGTHS) - t.shape[1])) for t in texts])
    target = torch.tensor([0, 1, 0])
    explainer = InputGradients(form, steps=4)
    found = explainer.explain(model, {"input_ids": padded, "attention_mask": (padded != 0).long()}, target)
    for item, text in enumerate(texts):
        alone = explainer.explain(model, {"input_ids": text}, target[item : item + 1])
        torch.testing.assert_close(found.scores[item, : text.shape[1]], alone.scores[0], atol=1e-5, rtol=1e-4)


def test_embeddings_that_read_no_tokens_are_named() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.unused, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.unused

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.table(input_ids).mean(1))

    with pytest.raises(InputError, match="do not read the numbers of the tokens"):
        InputGradients().explain(Other().eval(), {"input_ids": torch.tensor([[1, 2]])})
