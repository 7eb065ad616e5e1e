"""Heads of a running decoder: what they write, which write about a concept, and scaling these.

Source: Basile et al. (2025), arXiv 2510.21518.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.core.requirements import require_one_of
from cenote.explain.head_pursuit.pursuit import Criterion, Pursuit, pursue
from cenote.explain.queried import one_hot, real_tokens
from cenote.models.live import AttentionCall, ScaledHeads, Where, final_norm, layers, of_heads, one_stack

Pieces = Literal["first", "all"]
FORMAT = 1
SHARE = 0.01


class Dictionary(NamedTuple):
    """Directions of a concept's words.

    Attributes:
        rows: of the unembedding, `[atoms, dim]`.
        tokens: their numbers.
        split: words of more than one token.
        repeated: words that gave no token of their own.
    """

    rows: Float[Tensor, "atoms dim"]
    tokens: Int[Tensor, "atoms"]
    split: tuple[str, ...]
    repeated: tuple[str, ...]


@torch.no_grad()
def concept_dictionary(
    model: nn.Module, tokenizer: Any, words: Sequence[str], *, pieces: Pieces = "first", fold_norm: bool = False
) -> Dictionary:
    """Rows of the unembedding for words behind a space, each once.

    Args:
        model: a causal language model.
        tokenizer: its own.
        words: of the concept.
        pieces: of a word of several tokens the first, or all.
        fold_norm: times the gain of the final norm (inferred).
    """
    require_one_of(get_args(Pieces), pieces=pieces)
    if not words:
        raise InputError("words: give at least one")
    taken: dict[int, None] = {}
    split, repeated = [], []
    for word in words:
        ids = [int(i) for i in tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
        if len(ids) > 1:
            split.append(word)
        wanted = ids if pieces == "all" else ids[:1]
        if all(i in taken for i in wanted):
            repeated.append(word)
        taken.update(dict.fromkeys(wanted))
    tokens = torch.tensor(list(taken))
    rows = _unembedding(model)[tokens].detach().float()
    if fold_norm:
        norm = final_norm(model, one_stack(model).stack)
        gain = getattr(norm, "weight", None)
        if gain is None:
            raise InputError("fold_norm: the model has no final norm with a gain")
        rows = rows * gain.detach().float()
    return Dictionary(rows, tokens, tuple(split), tuple(repeated))


@torch.no_grad()
def head_outputs(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], stack: str | None = None
) -> Float[Tensor, "layers heads samples dim"]:
    """What each head adds to the residual stream at the last real token of each sample; without the bias, all heads of a layer
    sum to attention's output.

    Args:
        model: any decoder of transformers, of a vision-language model too; heads are query heads.
        batches: inputs of its forward.
        stack: path of the list of blocks, where a model has several.
    """
    found = []
    for inputs in batches:
        ran = layers(model, inputs, stack)
        at = one_hot(real_tokens(inputs, ran[0].call), "last").bool()
        found.append(
            torch.stack(
                [
                    torch.einsum("nhw,hwd->hnd", y.float(), of_heads(layer.projection, layer.call.heads).float())
                    for layer in ran
                    for y in (layer.heads.transpose(1, 2)[at],)
                ]
            )
        )
    if not found:
        raise InputError("batches: give at least one")
    return torch.cat(found, 2)


@dataclass(frozen=True, eq=False)
class ConceptHeads:
    """How much each head writes about a concept.

    Attributes:
        scores: explained variance, less that of random dictionaries where asked for, `[layers, heads]`.
        atoms: tokens of the concept in the order in which each head took them, -1 where it took fewer, `[layers, heads,
            atoms]`.
        explained: behind each, `[layers, heads, atoms]`; the last one repeated where it took fewer.
    """

    scores: Float[Tensor, "layers heads"]
    atoms: Int[Tensor, "layers heads atoms"]
    explained: Float[Tensor, "layers heads atoms"]

    def best(self, k: int | None = None) -> list[tuple[int, int]]:
        """Layer and head of the first k, one in a hundred by default."""
        heads = self.scores.shape[1]
        k = math.ceil(SHARE * self.scores.numel()) if k is None else k
        if not 1 <= k <= self.scores.numel():
            raise InputError(f"k: expected 1 to {self.scores.numel()}, got {k}")
        order = self.scores.flatten().argsort(descending=True, stable=True)[:k]
        return [divmod(i, heads) for i in order.tolist()]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name) for name in ("scores", "atoms", "explained")}
        files.write_tensors(Path(path), tensors, {"concept_heads": json.dumps({"format": FORMAT})})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these.
        """
        try:
            stored = files.read_tensors(Path(path))
            card = json.loads(stored.metadata["concept_heads"])
            found = cls(**{name: stored.tensors[name] for name in ("scores", "atoms", "explained")})
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: holds no heads of a concept ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        return found


def concept_heads(
    outputs: Float[Tensor, "layers heads samples dim"],
    dictionary: Dictionary,
    atoms: int = 10,
    *,
    criterion: Criterion = "l1",
    baseline: Float[Tensor, "vocab dim"] | None = None,
    draws: int = 3,
    seed: int = 0,
) -> ConceptHeads:
    """Rank heads by how much of what they write the concept's words explain.

    Args:
        outputs: of `head_outputs`.
        dictionary: of `concept_dictionary`.
        atoms: how many words are taken at most.
        criterion: see `pursue`.
        baseline: the unembedding, of which random dictionaries of equal size are drawn; their mean is subtracted, for explained
            variance grows with size and with depth (inferred).
        draws: how many of them.
        seed: of the draws.
    """
    several = min(atoms, len(dictionary.rows))
    shape = outputs.shape[:2]
    scores, curves = torch.zeros(shape), torch.zeros(*shape, several)
    taken = torch.full((*shape, several), -1)
    generator = torch.Generator().manual_seed(seed)
    others = (
        []
        if baseline is None
        else [
            baseline[torch.randperm(len(baseline), generator=generator)[: len(dictionary.rows)]] for _ in range(draws)
        ]
    )
    for layer in range(shape[0]):
        for head in range(shape[1]):
            h = outputs[layer, head]
            found: Pursuit = pursue(h, dictionary.rows, several, criterion=criterion)
            chance = [pursue(h, rows, several, criterion=criterion).score for rows in others]
            scores[layer, head] = found.score - (sum(chance) / len(chance) if chance else 0.0)
            count = len(found.atoms)
            taken[layer, head, :count] = dictionary.tokens[found.atoms]
            curves[layer, head] = found.score
            curves[layer, head, :count] = found.explained
    return ConceptHeads(scores, taken, curves)


class SteeredHeads(ScaledHeads):
    """Chosen heads times a factor: -1 turns them round, 0 takes them out, above 1 makes more of them, 1 changes nothing.

    Args:
        heads: pairs of layer and head.
        factor: of their outputs, before the output projection.
        of: how many heads a layer has.
        generated_only: leave the prompt alone.
        at: the places, of those layers.

    Example:
        >>> from cenote.models.live import edited
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)).eval()
        >>> with edited(model, SteeredHeads([(1, 0)], -1.0, 2)):
        ...     _ = model(torch.tensor([[5, 6, 7]]))
    """

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        factor: float,
        of: int,
        *,
        generated_only: bool = False,
        at: Where | None = None,
    ) -> None:
        factors: dict[int, Tensor] = {}
        for layer, head in heads:
            if not 0 <= head < of:
                raise InputError(f"heads: {head} of layer {layer}, and there are {of}")
            factors.setdefault(layer, torch.ones(of))[head] = factor
        if not factors:
            raise InputError("heads: give at least one")
        super().__init__(factors, at)
        self.generated_only = generated_only

    def context(
        self, call: AttentionCall, y: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries width"]:
        return y if self.generated_only and call.step == 0 else super().context(call, y)


def random_heads(
    heads: Sequence[tuple[int, int]], layers: int, of: int, *, same_layers: bool = True, seed: int = 0
) -> list[tuple[int, int]]:
    """A control: as many other heads, of the same layers or of any.

    >>> sorted(random_heads([(1, 0), (1, 1)], 2, 4))
    [(1, 2), (1, 3)]
    """
    generator = torch.Generator().manual_seed(seed)
    free = [at for at in ((layer, head) for layer in range(layers) for head in range(of)) if at not in set(heads)]
    free = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()]
    found = []
    for layer, _ in heads:
        at = next((i for i, (own, _) in enumerate(free) if own == layer or not same_layers), None)
        if at is None:
            raise InputError(f"heads: too many of layer {layer} to draw as many others")
        found.append(free.pop(at))
    return found


def _unembedding(model: nn.Module) -> Tensor:
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(find() if callable(find) else None, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"model: {type(model).__name__} has no unembedding with weights that can be read; load the causal language model, "
            f"without quantisation"
        )
    return weight
