"""Whole models: an encoder with a classifier, and an encoder-decoder that writes the label.

Source: Milbauer et al. (2023), arXiv 2305.19585.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.reduce.lait.cache import SegmentCache
from cenote.reduce.lait.encoder import Joint, LAITEncoder

IGNORED = -100
"""Of label texts: no target."""


class LAITClassifier(nn.Module):
    """Logits from the mean of all real tokens, or from the first token of all.

    Args:
        encoder: of the segments.
        dim: width of its states.
        classes: of the output.
        pool: `"mean"`, or `"first"`, where the first segment begins with [CLS].

    Source: Milbauer et al. (2023), arXiv 2305.19585, whose models write labels; with a linear head for BERT-like encoders.
    """

    def __init__(self, encoder: LAITEncoder, dim: int, classes: int, pool: Literal["mean", "first"] = "mean") -> None:
        super().__init__()
        require_at_least(1, dim=dim, classes=classes)
        require_one_of(("mean", "first"), pool=pool)
        self.encoder, self.pool, self.output = encoder, pool, nn.Linear(dim, classes)

    def forward(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        also: Mapping[str, Shaped[Tensor, "batch segments length"]] | None = None,
        cache: SegmentCache | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Name the class; see `LAITEncoder.forward`."""
        return self.read(self.encoder(input_ids, mask, also, cache=cache))

    def read(self, joint: Joint) -> Float[Tensor, "batch classes"]:
        """Logits of what the encoder gave."""
        if self.pool == "first":
            first = joint.mask.to(torch.uint8).argmax(1)
            return self.output(joint.states[torch.arange(len(first), device=first.device), first])
        return self.output(joint.states.sum(1) / joint.mask.sum(1, keepdim=True))

    def loss(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        target: Int[Tensor, "batch"],
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the classes."""
        return F.cross_entropy(self(input_ids, mask), target)


class LAITSeq2Seq(nn.Module):
    """A T5-like encoder-decoder whose encoder sees segments apart in its first blocks; the decoder reads all of them.

    Args:
        model: of transformers, with `get_encoder()`, as `T5ForConditionalGeneration`; its parameters are the only ones.
        split: P.
        positions: see `LAITEncoder`.

    Source: Milbauer et al. (2023), arXiv 2305.19585.
    """

    def __init__(
        self, model: nn.Module, split: int, positions: Literal["per_segment", "global"] = "per_segment"
    ) -> None:
        super().__init__()
        if not hasattr(model, "get_encoder") or not hasattr(model, "generate"):
            raise InputError(f"model: expected an encoder-decoder of transformers, got {type(model).__name__}")
        self.model = model
        self.encoder = LAITEncoder(model.get_encoder(), split, positions)  # type: ignore[operator]

    def forward(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        labels: Int[Tensor, "batch target"] | None = None,
        decoder_input_ids: Int[Tensor, "batch target"] | None = None,
        cache: SegmentCache | None = None,
    ) -> Any:
        """The model's own output.

        Args:
            input_ids, mask: of the segments, each with its own prefix.
            labels: tokens of the label text, -100 where there is none.
            decoder_input_ids: what stands before each token that is written; of the labels by default.
            cache: of segments.
        """
        return self.model(
            **self._encoded(input_ids, mask, cache), labels=labels, decoder_input_ids=decoder_input_ids, use_cache=False
        )

    def loss(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        target: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the tokens of the label texts."""
        return self(input_ids, mask, labels=target).loss

    @torch.no_grad()
    def write(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        most: int = 8,
        decoder_cache: bool = True,
        cache: SegmentCache | None = None,
    ) -> Int[Tensor, "batch written"]:
        """The label text, always the likeliest token; what starts the decoder included.

        Args:
            input_ids, mask: as for `forward`.
            most: longest text.
            decoder_cache: keep the decoder's keys and values; if not, each step reads all again, to the same end.
            cache: of segments.
        """
        require_at_least(1, most=most)
        given = self._encoded(input_ids, mask, cache)
        return self.model.generate(  # type: ignore[operator]
            **given, max_new_tokens=most, do_sample=False, num_beams=1, use_cache=decoder_cache
        )

    @torch.no_grad()
    def score(
        self,
        input_ids: Int[Tensor, "batch segments length"],
        mask: Bool[Tensor, "batch segments length"],
        labels: Int[Tensor, "labels target"],
        cache: SegmentCache | None = None,
    ) -> Float[Tensor, "batch labels"]:
        """Log-probability of each allowed label text.

        Args:
            input_ids, mask: as for `forward`.
            labels: tokens of each, -100 behind its end.
            cache: of segments.
        """
        found = self.encoder.joined(self.encoder.encode_segments(input_ids, mask, cache=cache), mask)
        scores = []
        for label in labels:
            own = label.repeat(len(mask), 1)
            logits = self.model(
                encoder_outputs=found.output, attention_mask=found.mask.long(), labels=own, use_cache=False
            ).logits
            each = logits.log_softmax(-1).gather(-1, own.clamp(min=0)[..., None])[..., 0]
            scores.append(each.masked_fill(own == IGNORED, 0.0).sum(1))
        return torch.stack(scores, 1)

    def _encoded(self, input_ids: Tensor, mask: Tensor, cache: SegmentCache | None) -> dict[str, Any]:
        found = self.encoder.joined(self.encoder.encode_segments(input_ids, mask, cache=cache), mask)
        return {"encoder_outputs": found.output, "attention_mask": found.mask.long()}
