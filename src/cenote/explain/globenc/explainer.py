"""GlobEnc of a running encoder.

Source: Modarressi et al. (2022), arXiv 2205.03286.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.chain import BLOCK, chained
from cenote.core.requirements import require_one_of
from cenote.explain.base import Attribution, Explainer
from cenote.explain.globenc.norms import EncoderLayer, Quadratic, Variant, head_norms, mixing_ratio, norms, quadratic
from cenote.explain.queried import Query, one_hot, real_tokens
from cenote.models.live import Layer, frozen, layers, of_heads


class GlobEnc(Explainer):
    """What one token of the top layer holds of each input token, by the norms of the vectors that layers pass on.

    `N_l [i, j]` is the norm of what token j contributes to token i in layer l: its values through the output projection, times
    attention, with both residuals and both LayerNorms at the statistics that they met; only the feed-forward part is left out.
    The chosen row of `N_L ... N_1` is chained from the top down, each layer a block of rows at a time; one forward pass, no
    gradients, and the attention function that was loaded stays. Scores of an item sum to one.

    Args:
        variant: what is taken in, see `quadratic`.
        query: the token that is explained: `"first"` ([CLS]) or `"last"`, of the real ones.
        pre_norm: also take models whose norms stand before attention; not in the paper (inferred): values are those of the
            normalised states, and the residual is added as it is.
        stack: path of the list of blocks, where a model has several.
        block: rows at a time.

    Raises:
        InputError: from `explain`, for pre-norm models, decoders and models without attention.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=20, **sizes)).eval()
        >>> found = GlobEnc().explain(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
        >>> round(float(found.scores.sum()), 4)
        1.0

    Source: Modarressi et al. (2022), arXiv 2205.03286.
    """

    class_agnostic = True
    family = "decomposition"

    def __init__(
        self,
        variant: Variant = "n_enc",
        query: Query = "first",
        *,
        pre_norm: bool = False,
        stack: str | None = None,
        block: int = BLOCK,
    ) -> None:
        require_one_of(get_args(Variant), variant=variant)
        require_one_of(get_args(Query), query=query)
        if block < 1:
            raise InputError(f"block: expected at least 1, got {block}")
        self.variant, self.query, self.pre_norm, self.stack, self.block = variant, query, pre_norm, stack, block

    @torch.no_grad()
    def explain(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Int[Tensor, "batch"] | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Explain; it speaks of no target, see `Explainer.explain`."""
        found = self._ran(model, inputs)
        mask = found[0].mask
        row = one_hot(mask, self.query).double()
        for layer in reversed(found):
            row = chained(row, [layer.rows], self.block)
            row = row / row.sum(1, keepdim=True)
        return Attribution(row.float(), mask)

    @torch.no_grad()
    def matrices(self, model: nn.Module, inputs: Mapping[str, Any], *, padding: bool = False) -> dict[str, Tensor]:
        """Each layer's own matrices, `[batch, layers, tokens, tokens]`; for short inputs.

        Args:
            model, inputs: as of `explain`.
            padding: leave rows of padding as they come out, not zero.

        Returns:
            Of `"w"` (attention, mean over heads) and of every variant that the model's layers have; `"head_n"`
            `[batch, layers, heads, tokens, tokens]`; and of each variant `"ratio_..."`, the mixing ratio `[batch, layers,
            tokens]`.
        """
        made: dict[str, list[Tensor]] = {}
        for layer in self._ran(model, inputs):
            weights = layer.ran.call.weights()
            kept = layer.mask | padding
            real = kept[:, :, None]
            made.setdefault("w", []).append(weights.mean(1) * real)
            made.setdefault("head_n", []).append(head_norms(layer.parts, weights) * real[:, None])
            for variant in get_args(Variant) if layer.parts.first is not None else ("n", "n_res"):
                made.setdefault(variant, []).append(norms(layer.parts, weights, variant) * real)
                ratio = mixing_ratio(layer.parts, weights, variant)
                made.setdefault(f"ratio_{variant}", []).append(ratio * kept)
        return {name: torch.stack(found, 1) for name, found in made.items()}

    def _ran(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[_Ran]:
        ran = layers(model, inputs, self.stack)
        mask = real_tokens(inputs, ran[0].call)
        return [_Ran(layer, self._parts(layer), mask, self._taken) for layer in ran]

    @property
    def _taken(self) -> Variant:
        return "n_res" if self.pre_norm and self.variant in ("n_resln", "n_enc") else self.variant

    def _parts(self, layer: Layer) -> EncoderLayer:
        path = layer.call.place.path
        first = torch.zeros(layer.call.batch, layer.call.queries, dtype=torch.bool, device=layer.read.device)
        first[:, 0] = True
        readable = layer.call.only(first).readable()
        if readable is not None and not bool(readable[..., 1:].any()) and layer.call.keys > 1:
            raise InputError(
                f"model: {path} reads backwards only; GlobEnc is of encoders, and AttentionRollout(query='last') takes decoders"
            )
        if layer.order != "post" and not (self.pre_norm and layer.order == "pre"):
            raise InputError(
                f"model: the norms of the block of {path} do not stand behind its sums; GlobEnc is of encoders with "
                f"post-norms (BERT, RoBERTa, ELECTRA); AttentionRollout takes this model, and GlobEnc(pre_norm=True) those "
                f"with pre-norms, by a form that is not in the paper"
            )
        maps = of_heads(layer.projection, layer.call.heads)
        values = layer.call.v.repeat_interleave(layer.call.heads // layer.call.v.shape[1], 1)
        post = [frozen(*norm) for norm in layer.norms] if layer.order == "post" else [None, None]
        return EncoderLayer(layer.read, values, maps, *post)


class _Ran:
    """A layer as it ran, and its rows when they are asked for."""

    def __init__(self, ran: Layer, parts: EncoderLayer, mask: Bool[Tensor, "batch tokens"], variant: Variant) -> None:
        self.ran, self.parts, self.mask, self.variant = ran, parts, mask, variant

    @cached_property
    def quadratic(self) -> Quadratic:
        return quadratic(self.parts, self.variant)

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch rows tokens"]:
        chosen = torch.zeros_like(self.mask)
        chosen[:, start:stop] = True
        found = self.quadratic.rows(self.ran.call.only(chosen).weights(), start)
        return found * self.mask[:, start:stop, None]
