"""Core neurons and core tokens of a running model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.reduced import Reduced
from cenote.core.requirements import require_one_of
from cenote.models.live import AttentionCall, AttentionEdit, BlockEdit, Edit, Place, Shorten, Where, one_stack
from cenote.models.live.neurons import NeuronRecorder, SlicedNeurons
from cenote.reduce.base import Budget
from cenote.reduce.basic.controls import TopTokens
from cenote.reduce.corematching.matching import core_neurons, matching, token_neurons
from cenote.reduce.corematching.reducers import ElbowTokens

Score = Literal["core", "last_token", "active"]
SCORES = ("core", "last_token", "active")
RELEASED = range(6, 20)
"""Blocks in which the authors' code zeroes keys and values."""


class CoreMatching(BlockEdit):
    """Decoding with core neurons alone, behind a prompt of which only core tokens went on: an edit of a running model.

    Core neurons are the `share` of a block's neurons that are among the strongest for most tokens of the prompt. A token of
    the span scores by how many of them it activates, `m(x) = #{n in core : a_n > 0}`, and goes on behind `block` where that is
    at least the elbow of the sorted scores; all other tokens go on. The prompt runs with all neurons. For use with
    `cenote.models.live.edited`.

    Args:
        block: the block whose neurons are matched, and behind which tokens are fewer; None for all tokens.
        span: where tokens may be dropped: the name of a span, or bool `[batch, tokens]`.
        neurons: numbers of the blocks that decode with core neurons; None for none.
        share: `beta`, of the neurons.
        token_share: `rho`, of the positive neurons of a token.
        one_limit: as in `core_neurons`.
        keep: a number of tokens in place of the elbow, as `Budget(fraction=0.25)`.
        strict, minimum: of the elbow, as in `ElbowTokens`.
        score: `"core"`; `"last_token"`, what is active for the fifth token from the end too, as in the authors' code;
            `"active"`, the number of active neurons, without matching.
        zeroed: drop nothing, but decode with keys and values of zero in place of those of dropped tokens, chosen anew in
            each of these blocks, as the authors' code does in blocks 6 to 19 (`RELEASED`); zero keys still draw attention.
        stack: path of the list of blocks, where there are several.

    Attributes:
        scores: of a block, `[batch, tokens]`, of the tokens that the prompt had there.
        kept: of a block, which of these went on.
        core: of a block, the neurons that are decoded with, bool `[batch, neurons]`.
        shortened: what became of the prompt's tokens.

    Raises:
        InputError: where nothing would be done; at entry, where a block has no neurons that can be told.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cenote.models.live import edited
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> image = torch.tensor([[False, *[True] * 6, False, False]])
        >>> core = CoreMatching(block=0, neurons=range(3), keep=Budget(tokens=2))
        >>> with edited(model, core, spans={"image": image}):
        ...     _ = model.generate(torch.arange(1, 10)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
        >>> int(core.kept[0].sum()), core.core[1].sum().item()
        (5, 9)

    Source:
        Wang et al. 2025, "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
        Comprehensive Acceleration of Vision-Language Models", arXiv 2505.19235, ICML.

    Note:
        The authors' code matches with one token of the prompt, zeroes keys in place of dropping tokens, and has no neurons:
        `score="last_token", strict=True, zeroed=RELEASED`. Decoding with core neurons is from CoreInfer, arXiv 2410.18311.
    """

    def __init__(
        self,
        block: int | None = 2,
        span: str | Bool[Tensor, "_batch tokens"] = "image",
        *,
        neurons: Collection[int] | None = None,
        share: float = 0.4,
        token_share: float = 0.2,
        one_limit: bool = False,
        keep: Budget | None = None,
        strict: bool = False,
        minimum: int = 1,
        score: Score = "core",
        zeroed: Collection[int] | None = None,
        stack: str | None = None,
    ) -> None:
        require_one_of(SCORES, score=score)
        if zeroed is not None:
            block = None
        if block is None and neurons is None and zeroed is None:
            raise InputError("block: None, and no neurons either, would leave all as it is; give one of them")
        self.block, self.span, self.neurons, self.stack = block, span, neurons, stack
        self.share, self.token_share, self.one_limit, self.score = share, token_share, one_limit, score
        self.zeroed = zeroed
        self.reducer = ElbowTokens(strict=strict, minimum=minimum) if keep is None else TopTokens(**vars(keep))
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.core: dict[int, Tensor] = {}
        self._cut: Shorten | None = None

    @property
    def shortened(self) -> Any:
        return None if self._cut is None else self._cut.found

    def parts(self, model: nn.Module) -> Sequence[Edit]:
        self.scores, self.kept, self.core = {}, {}, {}
        stack = one_stack(model, self.stack).stack
        found: list[Edit] = []
        for number in [self.block] if self.zeroed is None else self.zeroed:
            if number is None:
                continue
            seen = NeuronRecorder(Where([number], stack=stack))
            cut = _Cut(self, seen, number, self.span, stack) if self.zeroed is None else None
            self._cut = cut or self._cut
            found += [seen, cut or _Zeroed(self, seen, number, self.span, stack)]
        if self.neurons is not None:
            found.append(SlicedNeurons(self._chosen, Where(self.neurons, stack=stack)))
        return [part for edit in found for part in edit.parts(model)]

    def scored(
        self, activations: Float[Tensor, "batch tokens neurons"], real: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        """How many neurons each token shares with the core, or what stands for it."""
        if self.score == "active":
            return (activations > 0).sum(-1).float()
        wanted = token_neurons(activations, mask=real) if self.score == "last_token" else self._core(activations, real)
        return matching(activations, wanted).float()

    def keeps(
        self, number: int, x: Tensor, mask: Tensor, activations: Tensor, real: Tensor, sizes: Tensor | None = None
    ) -> Reduced:
        """Fewer of the tokens of this mask."""
        scores = self.scored(activations, real)
        found: Reduced = self.reducer(x, sizes, mask, saliency=scores)
        self.scores[number] = scores
        self.kept[number] = (real & ~mask) | (found.assignment >= 0)
        return found

    def _core(self, activations: Tensor, real: Tensor) -> Bool[Tensor, "batch neurons"]:
        return core_neurons(activations, self.share, self.token_share, real, one_limit=self.one_limit)

    def _chosen(self, activations: Tensor, real: Tensor, number: int) -> Bool[Tensor, "batch neurons"]:
        self.core[number] = self._core(activations, real)
        return self.core[number]


class _Cut(Shorten):
    """Only core tokens go on; an elbow may lie below all of them."""

    def __init__(
        self, whole: CoreMatching, seen: NeuronRecorder, block: int, span: str | Tensor, stack: str | None
    ) -> None:
        def reducer(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
            (place,) = seen.found
            self._run.looks(self)
            return whole.keeps(block, x, mask, seen.found[place], seen.real[place], sizes)

        super().__init__(reducer, block, span=span, stack=stack)


class _Zeroed(AttentionEdit):
    """Keys and values of dropped tokens are zero for what is decoded; the prompt and the cache stay as they are."""

    def __init__(
        self, whole: CoreMatching, seen: NeuronRecorder, block: int, span: str | Tensor, stack: str | None
    ) -> None:
        self.whole, self.seen, self.block, self.span = whole, seen, block, span
        self.at = Where([block], ["self"], stack)
        self.asks = (span,) if isinstance(span, str) else ()

    def begins(self) -> None:
        self.whole.kept.pop(self.block, None)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        if not call.query_start:
            self.whole.kept.pop(self.block, None)
            return call
        kept = self._kept(call)
        gone = nn.functional.pad(~kept, (0, call.keys - kept.shape[1]))[:, None, :, None]
        return call.replace(k=call.k.masked_fill(gone, 0.0), v=call.v.masked_fill(gone, 0.0))

    def _kept(self, call: AttentionCall) -> Bool[Tensor, "batch tokens"]:
        if self.block not in self.whole.kept:
            place: Place = next(iter(self.seen.found))
            activations, real = self.seen.found[place], self.seen.real[place]
            if isinstance(self.span, str):
                span = call.keys_in(self.span)[:, : real.shape[1]]
            else:
                span = self.span.to(real.device).expand_as(real)
            self.whole.keeps(self.block, activations, real & span, activations, real)
            self.whole.kept[self.block] |= ~real
        return self.whole.kept[self.block]
