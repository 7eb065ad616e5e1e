"""Grouped attention and low-rank weights in a decoder: how it is trained for longer texts, and what came of it.

Source: Zhang (2024), arXiv 2406.05678; the recipe is that of Chen et al., "LongLoRA", ICLR 2024.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.core.answers import UNASKED, answer_loss
from cenote.core.language import accepted
from cenote.core.requirements import require_at_least, require_positive
from cenote.mix.blocks import leftward, masked_attention
from cenote.mix.fitting import in_training
from cenote.mix.layer_gates import Texts, real_keys, require_plain, told, whole_prompt
from cenote.mix.sinklora.attention import Groups, grouped_attention
from cenote.mix.sinklora.patterns import Pattern
from cenote.models.interpolation import interpolated
from cenote.models.live import AttentionCall, AttentionEdit, Where, edited
from cenote.models.live.edits import require_where
from cenote.models.low_rank import LowRank
from cenote.models.own_weights import OwnWeights

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TRAINED = ("embed", "norm")
"""Parts of the names of parameters that are trained whole, as in LongLoRA."""
FORMAT = "cenote sinklora 1"


class GroupedAttention(AttentionEdit):
    """Tokens read their group and the sinks wherever all are read at once; decoding reads everything.

    For training, by `cenote.models.live.edited`; a model is evaluated outside of the block, with full attention.

    Args:
        groups: who reads whom; see `Groups` for SF-Attn, S2-Attn and block-diagonal attention, `Pattern` for rivals, which are
            computed as masks.
        at: the places.

    Raises:
        InputError: in use, for attention with soft caps, sinks of its own or biases.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cenote.models.live import edited
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> with edited(model, GroupedAttention(Groups(sinks=2))):
        ...     model(torch.arange(16)[None]).logits.shape
        torch.Size([1, 16, 20])

    Source: Zhang (2024), arXiv 2406.05678.
    """

    def __init__(self, groups: Groups | Pattern | None = None, at: Where | None = None) -> None:
        self.groups: Groups | Pattern = Groups() if groups is None else groups
        self.at = require_where(at) if at is not None else Where(kinds=["self"])

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        if not whole_prompt(call):
            return fused(call)
        require_plain(call)
        real = real_keys(call)
        mask = None if bool(real.all()) else real
        if isinstance(self.groups, Pattern):
            laid = leftward(real)
            may = self.groups.readable(call.heads, call.keys, call.q.device) & laid.real[:, None, None]
            q, k, v = (laid.laid(x) for x in (call.q, call.k, call.v))
            return laid.back(masked_attention(q, k, v, may, call.scale))
        return grouped_attention(call.q, call.k, call.v, self.groups, mask, call.scale)


class SinkLoRA(nn.Module):
    """What is trained of a decoder for longer texts: low-rank parts of attention's projections, embeddings and norms.

    `W x + (alpha / rank) B A x`, and copies of embeddings and norms in their place; positions are pressed together by new
    length / old. The decoder itself stays as it is, until `merge`.

    Args:
        model: a decoder whose blocks name their layers as Llama's do; it is frozen.
        factor: new length by old.
        rank, alpha, dropout: of the low-rank parts.
        targets: ends of the names of adapted layers.
        trained: parts of the names of parameters that are trained whole.

    Raises:
        InputError: where the model has no such layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> adapter = SinkLoRA(model, factor=2.0, rank=2)
        >>> with adapter.on(model):
        ...     model(torch.arange(8)[None]).logits.shape
        torch.Size([1, 8, 20])

    Source: Zhang (2024), arXiv 2406.05678; Chen et al., "LongLoRA", ICLR 2024.
    """

    def __init__(
        self,
        model: nn.Module,
        factor: float = 1.0,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = TARGETS,
        trained: Sequence[str] = TRAINED,
    ) -> None:
        super().__init__()
        require_positive(factor=factor)
        self.settings = {
            "factor": factor,
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": list(targets),
            "trained": list(trained),
        }
        self.factor = factor
        self.low_rank = LowRank(model, targets, rank, alpha, dropout)
        self.whole = OwnWeights(model, lambda name: any(part in name for part in trained)) if trained else None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model computes with these weights and positions."""
        with ExitStack() as stack:
            stack.enter_context(interpolated(model, self.factor))
            if self.whole is not None:
                stack.enter_context(self.whole.on(model))
            stack.enter_context(self.low_rank.on(model))
            yield

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Write these weights into the model's own. Its positions stay: run it inside of `interpolated(model, factor)`, or set
        `rope_parameters={"rope_type": "linear", "factor": factor, ...}` in its configuration."""
        layers = dict(model.named_modules())
        low = self.low_rank
        for name, down, up in zip(low.names, low.down, low.up, strict=True):
            weight = layers[name].weight
            assert isinstance(weight, Tensor)
            weight += (low.scale * up @ down).to(weight.dtype)
        if self.whole is not None:
            own = dict(model.named_parameters())
            for name, copy in zip(self.whole.names, self.whole.weights, strict=True):
                own[name].copy_(copy)

    def save(self, path: Path) -> None:
        """Write the adapter alone, whole, as safetensors with its SHA-256."""
        card = {"format": FORMAT, "settings": self.settings}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        files.write_tensors(Path(path), tensors, {"adapter": json.dumps(card)})

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> SinkLoRA:
        """The adapter that `save` wrote, for the same model.

        Raises:
            InputError: where it is no such file, was changed, or is of another model.
        """
        try:
            stored = files.read_tensors(Path(path), old=False)
        except (ValueError, OSError) as error:
            raise InputError(f"path: {path} cannot be read ({error}); save the adapter again") from error
        card = json.loads(stored.metadata.get("adapter", "{}"))
        if card.get("format") != FORMAT:
            raise InputError(f"path: {path} holds no adapter of SinkLoRA")
        adapter = cls(model, **card["settings"])
        own = adapter.state_dict()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in stored.tensors.items()}:
            raise InputError(f"path: {path} is of another model; give the one that it was trained on")
        adapter.load_state_dict(stored.tensors)
        return adapter


def train_longer(
    adapter: SinkLoRA,
    model: nn.Module,
    draw: Callable[[], Texts],
    *,
    steps: int,
    groups: Groups | Pattern | None,
    lr: float = 2e-5,
    warmup: int = 20,
) -> list[float]:
    """Train an adapter on long texts under grouped attention; the rate rises over `warmup` steps and stays.

    Args:
        adapter: what is trained.
        model: its decoder, which stays as it is.
        draw: gives the texts of a step.
        steps: how many.
        groups: who reads whom; None for full attention.
        lr: rate.
        warmup: as above.

    Returns:
        The loss of the next token, step by step.
    """
    require_at_least(1, steps=steps)
    require_at_least(0, warmup=warmup)
    require_positive(lr=lr)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    losses = []
    with in_training(adapter):
        for _ in range(steps):
            ids, mask = draw()
            with ExitStack() as stack:
                stack.enter_context(adapter.on(model))
                if groups is not None:
                    stack.enter_context(edited(model, GroupedAttention(groups)))
                logits = model(input_ids=ids, **told(mask), **accepted(model, use_cache=False)).logits
                loss = answer_loss(logits, ids if mask is None else ids.masked_fill(~mask, UNASKED))
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses


def recovered(before: float, full: float, method: float) -> float:
    """Of what training with full attention improves, the share that a method does: `(before - method) / (before - full)`.

    >>> recovered(3.0, 2.0, 2.5)
    0.5
    """
    if not before > full:
        raise InputError(f"full: a loss of {full} is no improvement on {before}; train longer, or on longer texts")
    return (before - method) / (before - full)


def leak(groups: Groups, heads: int, tokens: int) -> float:
    """Of all heads and tokens, the share that reads a later token: 0 where nothing is told before its time.

    >>> leak(Groups.shifted(group=4), heads=2, tokens=16)
    0.0625
    """
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return float((groups.readable(heads, tokens) & later).any(-1).float().mean())


class Passkey(NamedTuple):
    """A text with a number in it, which is asked for at the end.

    Attributes:
        text: up to where the number is to be said.
        key: the number, as text.
    """

    text: str
    key: str


def passkey(sentences: Sequence[str], words: int, depth: float, seed: int = 0) -> Passkey:
    """A passkey among other sentences.

    Args:
        sentences: what fills the text, in turn.
        words: of the filling, about.
        depth: where the key stands, from 0 (first) to 1 (last).
        seed: of the number.

    Raises:
        InputError: for nothing to fill with, or a depth that is none.
    """
    require_at_least(1, words=words)
    if not sentences or not all(sentence.split() for sentence in sentences):
        raise InputError("sentences: give at least one, none of them empty")
    if not 0 <= depth <= 1:
        raise InputError(f"depth: expected from 0 to 1, got {depth}")
    key = str(np.random.default_rng(seed).integers(10_000, 100_000))
    filling: list[str] = []
    while sum(len(sentence.split()) for sentence in filling) < words:
        filling.append(sentences[len(filling) % len(sentences)])
    filling.insert(round(depth * len(filling)), f"The pass key is {key}. Remember it. {key} is the pass key.")
    asked = "There is important information hidden in a text. Find it and remember it."
    return Passkey(f"{asked} {' '.join(filling)} What is the pass key? The pass key is", key)


@torch.no_grad()
def passkey_accuracy(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], words: Sequence[int], trials: int = 10, seed: int = 0
) -> dict[int, float]:
    """By the length of the text, how many passkeys a decoder says, each at another depth; the likeliest tokens count.

    Args:
        model: a causal decoder, in eval mode.
        tokenizer: its own.
        sentences: what fills the texts.
        words: lengths.
        trials: of each length.
        seed: of the numbers.
    """
    require_at_least(1, trials=trials)
    found = {}
    for length in words:
        right = 0
        for trial in range(trials):
            asked = passkey(sentences, length, trial / max(1, trials - 1), seed + trial)
            ids = torch.tensor([tokenizer(asked.text)["input_ids"]])
            whole = torch.tensor([tokenizer(f"{asked.text} {asked.key}")["input_ids"]])
            logits = model(input_ids=whole, **accepted(model, use_cache=False)).logits[:, ids.shape[1] - 1 : -1]
            right += bool(torch.equal(logits.argmax(-1), whole[:, ids.shape[1] :]))
        found[length] = right / trials
    return found
