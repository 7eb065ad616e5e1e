"""Concept tokens in a running diffusion transformer.

Source: Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features" (2025), arXiv
2502.04320.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.explain.concept_attention.attention import Order, Reads, concept_rows, heat_maps, similarities
from cenote.models.concept_streams import Seen, looking_on

Space = Literal["output", "cross", "cross keys", "value"]
LAST = 4
"""Blocks whose scores count by default: the last ones, as 15 to 18 of Flux' 19."""


class ConceptMaps:
    """What was seen of concepts while a model ran; filled as it runs.

    Attributes:
        scores: by step and block, `[batch, concepts, pixels]`.
        prompt: attention of the prompt's tokens to the image by step and block, `[batch, prompt, pixels]`: the rival.
    """

    def __init__(self) -> None:
        self.scores: dict[tuple[int, int], Tensor] = {}
        self.prompt: dict[tuple[int, int], Tensor] = {}

    def maps(
        self,
        grid: tuple[int, int] | None = None,
        *,
        blocks: Collection[int] | None = None,
        steps: Collection[int] | None = None,
        order: Order = "per layer",
        temperature: float = 1.0,
    ) -> Float[Tensor, "batch concepts *places"]:
        """A heat map of each concept; at each pixel they sum to one.

        Args:
            grid: rows and columns of the image's tokens; flat without it.
            blocks: whose scores count; by default the last four.
            steps: forward passes that count; all by default.
            order, temperature: see `heat_maps`.

        Raises:
            InputError: where nothing was seen in these blocks and steps.
        """
        found = heat_maps(self._chosen(self.scores, blocks, steps), order, temperature)
        return found if grid is None else found.unflatten(2, grid)

    def prompt_maps(
        self, blocks: Collection[int] | None = None, steps: Collection[int] | None = None
    ) -> Float[Tensor, "batch prompt pixels"]:
        """Attention of each token of the prompt to the image, mean over heads, blocks and steps."""
        return torch.stack(self._chosen(self.prompt, blocks, steps)).mean(0)

    def _chosen(
        self,
        held: dict[tuple[int, int], Tensor],
        blocks: Collection[int] | None,
        steps: Collection[int] | None,
    ) -> list[Tensor]:
        there = sorted({block for _, block in held})
        wanted = there[-LAST:] if blocks is None else blocks
        chosen = [s for (step, block), s in held.items() if block in wanted and (steps is None or step in steps)]
        if not chosen:
            raise InputError(f"blocks, steps: nothing was seen there; the blocks that were: {there or 'none'}")
        return chosen


class ConceptAttention:
    """Where a diffusion transformer sees a word: concept tokens look on while it runs, and change nothing.

    `s_cp = <o_c, o_p>`: attention outputs of concepts and pixels, before their projection, over all heads.

    Args:
        space: `"output"`; `"cross"`: queries of both, as the authors' code has it; `"cross keys"`: queries with keys;
        `"value"`. reads: what the concepts read, see `concept_rows`.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> model = FluxTransformer2DModel(
        ...     in_channels=4, num_layers=2, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        ...     joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 4, 8),
        ... ).eval()
        >>> inputs = {
        ...     "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 12),
        ...     "pooled_projections": torch.randn(1, 6), "timestep": torch.tensor([0.5]),
        ...     "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
        ... }
        >>> with torch.no_grad(), ConceptAttention().on(model, torch.randn(1, 2, 12)) as seen:
        ...     _ = model(**inputs)
        >>> seen.maps((2, 3)).shape
        torch.Size([1, 2, 2, 3])

    Source: Helbling et al. (2025), arXiv 2502.04320.
    """

    def __init__(self, space: Space = "output", reads: Reads = "both") -> None:
        require_one_of(get_args(Space), space=space)
        require_one_of(get_args(Reads), reads=reads)
        self.space, self.reads = space, reads

    @contextmanager
    def on(self, model: nn.Module, concepts: Float[Tensor, "items concepts dim"]) -> Iterator[ConceptMaps]:
        """Watch a model for as long as the block lasts: one forward pass, or a whole loop of a pipeline around it.

        Args:
            model: the transformer, see `cenote.models.concept_streams.looking_on`.
            concepts: embeddings of words, see `cenote.models.concept_streams.words_encoded`; without any nothing is seen.
        """
        found = ConceptMaps()
        if not concepts.shape[1]:
            yield found
            return

        def look(seen: Seen) -> Tensor:
            y = concept_rows(seen.q, seen.k, seen.v, seen.image_k, seen.image_v, self.reads)
            both = {
                "output": (y, seen.image_y),
                "cross": (seen.q, seen.image_q),
                "cross keys": (seen.q, seen.image_k),
                "value": (seen.v, seen.image_v),
            }[self.space]
            found.scores[seen.step, seen.place.block] = similarities(*both)
            found.prompt[seen.step, seen.place.block] = seen.prompt_to_image
            return y

        with looking_on(model, concepts, look):
            yield found
