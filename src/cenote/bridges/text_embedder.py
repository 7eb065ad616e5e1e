"""A language model of transformers as an encoder of texts: attention, pooling, low-rank adaptation, training, search.

Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.bridges.transformers import width_of
from cenote.core import InputError, files
from cenote.core.requirements import require_at_least, require_one_of
from cenote.models.low_rank import LINEARS, LowRank
from cenote.pool.fitting import FittedPool, Known, form_of, named_pool
from cenote.pool.layers.base import stack_layers
from cenote.pool.layers.multi_layer_trainable.contrastive import Nearest, Triple, hard_negative_loss, nearest
from cenote.pool.training import History, in_batches, linear_schedule, train

FORMAT = 1
CARD, STATE, BACKBONE, TOKENIZER = "embedder.json", "embedder.safetensors", "backbone", "tokenizer"
DESIGNS: dict[int, tuple[str, bool, dict[str, Any]]] = {
    1: ("last", False, {}),
    2: ("last-layer-trainable", False, {"last_only": True}),
    3: ("multi-layer-trainable", False, {"tokens": "last"}),
    4: ("last-layer-trainable", True, {}),
    5: ("multi-layer-trainable", True, {"tokens": "mean"}),
}
"""The paper's five models: pooling, whether attention is bidirectional, and what the pooling is told."""


@dataclass(frozen=True)
class EmbedderConfig:
    """What an embedder is built from.

    Attributes:
        pool: name of a pool of tokens or of layers.
        bidirectional: whether the causal mask of a decoder is taken away; padding stays masked.
        settings: of the pool.
        rank, alpha, adapted_dropout, targets: of the low-rank adaptation, see `LowRank`; with rank 0 the model stays frozen.
        instruction: stands before queries, and not before passages; `""`: nothing does.
        longest: most tokens of a text.
    """

    pool: str
    bidirectional: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 16
    alpha: float = 32.0
    adapted_dropout: float = 0.1
    targets: tuple[str, ...] = LINEARS
    instruction: str = ""
    longest: int = 1024

    @classmethod
    def design(cls, number: int, settings: dict[str, Any] | None = None, **others: Any) -> EmbedderConfig:
        """One of the paper's models, 1 to 5.

        Args:
            number: of the model.
            settings: of its pool besides (fewer latents for a small model).
            others: of the config.

        >>> EmbedderConfig.design(5).pool, EmbedderConfig.design(5).bidirectional
        ('multi-layer-trainable', True)
        """
        require_one_of(DESIGNS, number=number)
        pool, bidirectional, told = DESIGNS[number]
        return cls(pool, bidirectional, {**told, **(settings or {})}, **others)


class TextEmbedder(nn.Module):
    """Unit vectors of texts: `y = pool(h) / ||pool(h)||` with `h` the states of a language model, adapted by low rank.

    The mask comes from the lengths of the texts, never from what their tokens are; where the tokenizer appends no end token, it
    is appended. What a text becomes does not depend on its batch mates.

    Args:
        backbone: a model of transformers that gives `last_hidden_state`; its parameters are frozen.
        tokenizer: its tokenizer.
        config: pool, attention and adaptation.

    Raises:
        InputError: where a causal model is asked for and this one is not, or its causal mask cannot be taken away.

    ```python
    model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    embedder = TextEmbedder(model, tokenizer, EmbedderConfig.design(5, {"latents": 16, "heads": 4}))
    embedder.fit([Triple(query, positive, negative), ...])
    found = embedder.search(queries, passages)
    ```

    Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Any, config: EmbedderConfig) -> None:
        super().__init__()
        require_at_least(0, rank=config.rank)
        require_at_least(2, longest=config.longest)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config
        known = Known(width_of(backbone.config), layers=getattr(backbone.config, "num_hidden_layers", None))
        self.pool: Any = named_pool(config.pool, known, dict(config.settings))
        backbone.requires_grad_(False)
        adapts = (config.targets, config.rank, config.alpha, config.adapted_dropout)
        self.adapted = LowRank(backbone, *adapts) if config.rank else None
        self._whole_masks = False
        causal = not self._sees_ahead()
        if config.bidirectional and causal:
            self._whole_masks = True
            if not self._sees_ahead():
                raise InputError(
                    "bidirectional: the causal mask of this model cannot be taken away; give bidirectional=False"
                )
        elif not config.bidirectional and not causal:
            raise InputError("bidirectional: this model is not causal; give bidirectional=True")

    def forward(self, texts: Sequence[str], query: bool = False) -> Float[Tensor, "texts dim"]:
        """Unit vectors of texts, with gradients; before queries stands the instruction."""
        ids, mask = self.tokens(texts, query)
        hidden = self._states(ids, mask)
        x = stack_layers(hidden.hidden_states) if form_of(self.pool) == "layers" else hidden.last_hidden_state
        return F.normalize(FittedPool(self.pool).pooled(x.float(), mask), dim=-1)

    def tokens(
        self, texts: Sequence[str], query: bool = False
    ) -> tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]:
        """`(numbers, mask)`, padded on the right; a text that is cut keeps its end token.

        Raises:
            InputError: where there is no text.
        """
        if not texts:
            raise InputError("texts: expected at least one, got none")
        before = f"Instruct: {self.config.instruction}\nQuery: " if query and self.config.instruction else ""
        end = self.tokenizer.eos_token_id
        rows = []
        for text in texts:
            row = list(self.tokenizer(before + text, truncation=True, max_length=self.config.longest)["input_ids"])
            if end is not None and (not row or row[-1] != end):
                row = [*row[: self.config.longest - 1], end]
            rows.append(row)
        device = next(self.backbone.parameters()).device
        mask = torch.arange(max(map(len, rows)), device=device) < torch.tensor(
            [[len(row)] for row in rows], device=device
        )
        ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
        ids[mask] = torch.tensor([number for row in rows for number in row], device=device)
        return ids, mask

    def encode(self, texts: Sequence[str], query: bool = False, batch: int = 32) -> Float[Tensor, "texts dim"]:
        """Unit vectors of any number of texts of any length, in eval mode, those of similar length together."""
        require_at_least(1, batch=batch)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(order), batch):
                    chosen = order[start : start + batch]
                    for i, vector in zip(chosen, self([texts[i] for i in chosen], query), strict=True):
                        found[i] = vector
        finally:
            self.train(training)
        return torch.stack(found) if found else torch.empty(0, self.pool.out_dim)

    def search(self, queries: Sequence[str], passages: Sequence[str], k: int = 10) -> Nearest:
        """The passages that are nearest to each query, by exact cosine search."""
        return nearest(self.encode(queries, query=True), self.encode(passages), k)

    def fit(
        self,
        triples: Sequence[Triple],
        *,
        steps: int = 1000,
        batch: int = 1,
        accumulate: int = 256,
        lr: float = 1e-5,
        warm_up: int = 100,
        weight_decay: float = 0.01,
        scale: float = 50.0,
        bf16: bool = False,
        seed: int = 0,
    ) -> History:
        """Learn by `hard_negative_loss` and AdamW: the pool whole, the model by its low-rank part.

        Args:
            triples: all with a hard negative, or none of them.
            steps: of the optimiser.
            batch: triples that are negatives to each other, on each process.
            accumulate: batches in a step.
            lr: highest rate, after the warm-up; it then falls linearly.
            warm_up: steps in which the rate rises.
            weight_decay: of AdamW.
            scale: of the cosines.
            bf16: whether the model runs in half precision.
            seed: of order and dropout.

        Raises:
            InputError: where there is no triple, or some have negatives and others do not.
        """
        given = {t.negative is not None for t in triples}
        if len(given) != 1:
            raise InputError("triples: expected at least one, all with a negative or none")
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(seed)
        device = next(self.backbone.parameters()).device.type
        cast = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()

        def endless() -> Iterator[Int[Tensor, "chosen"]]:
            while True:
                yield from in_batches(len(triples), batch, generator)

        def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
            taken = [triples[i] for i in chosen.tolist()]
            with cast:
                queries = self([t.query for t in taken], query=True)
                positives = self([t.positive for t in taken])
                hard = [t.negative for t in taken if t.negative is not None]
                negatives = self(hard).float() if hard else None
            return hard_negative_loss(queries.float(), positives.float(), negatives, scale)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return train(
                self,
                lambda: itertools.islice(endless(), steps * accumulate),
                loss,
                optimizer,
                passes=1,
                accumulate=accumulate,
                schedule=linear_schedule(optimizer, steps, min(warm_up, steps - 1)),
            )

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer, pool and adaptation as one folder, which `load` reads."""
        folder = Path(folder)
        backbone: Any = self.backbone
        backbone.save_pretrained(folder / BACKBONE)
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        files.write_saved(folder / CARD, folder / STATE, {"format": FORMAT, "config": asdict(self.config)}, state)

    @classmethod
    def load(cls, folder: str | Path) -> TextEmbedder:
        """Read what `save` wrote, in eval mode.

        Raises:
            InputError: naming the folder and what is wrong with it.
        """
        import transformers

        folder = Path(folder)
        try:
            remedy = "save the embedder again"
            card, state = files.read_saved(folder / CARD, folder / STATE, remedy, format=int, config=dict)
            files.require_format(folder, card, FORMAT)
            if card["config"].keys() != {f.name for f in fields(EmbedderConfig)}:
                raise InputError(f"{folder}: {CARD} is damaged; save the embedder again")
            told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()}
            config = EmbedderConfig(**told)
            backbone = transformers.AutoModel.from_pretrained(folder / BACKBONE)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER)
            embedder = cls(backbone, tokenizer, config)
            missing, unexpected = embedder.load_state_dict(state, strict=False)
        except InputError:
            raise
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"{folder}: holds no embedder that can be built again ({said}); save it again") from error
        wrong = [*(k for k in missing if not k.startswith("backbone.")), *unexpected]
        if wrong:
            raise InputError(f"{folder}: {STATE} does not fit {CARD} ({', '.join(wrong)}); save the embedder again")
        return embedder.eval()

    def _states(self, ids: Tensor, mask: Tensor) -> Any:
        seen: Tensor = mask.long()
        if self._whole_masks:
            dtype = next(self.backbone.parameters()).dtype
            seen = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=dtype, device=ids.device)
            seen = seen.masked_fill(~mask[:, None, None, :], torch.finfo(dtype).min)
        with nullcontext() if self.adapted is None else self.adapted.on(self.backbone):
            return self.backbone(input_ids=ids, attention_mask=seen, output_hidden_states=True, return_dict=True)

    def _sees_ahead(self) -> bool:
        """Whether the first token's state hangs on the second: tried, not guessed from the model's name."""
        training = self.training
        self.eval()
        ids = torch.tensor([[1, 2], [1, 3]], device=next(self.backbone.parameters()).device)
        with torch.no_grad():
            first = self._states(ids, torch.ones_like(ids, dtype=torch.bool)).last_hidden_state[:, 0]
        self.train(training)
        return not torch.allclose(first[0], first[1], atol=1e-6)
