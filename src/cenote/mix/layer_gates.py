"""A gate beside each attention layer of a frozen decoder: what such gates have in common, and how they are distilled."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.core.language import accepted
from cenote.core.requirements import require_at_least, require_positive
from cenote.core.rotary import Angles, unrotated
from cenote.models.live import AttentionCall, AttentionEdit, Edit, Place, Where, attentions, edited, one_stack
from cenote.models.live.rotary import AnglesRecorder

Texts = tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"] | None]
"""Numbers of tokens, and which are real; None for all."""
FORMAT = "cenote gates 1"


class Heads(NamedTuple):
    """Heads of queries and of keys, and their width."""

    queries: int
    keys: int
    width: int


def heads_of(model: nn.Module) -> Heads:
    """As the model's configuration has them.

    Raises:
        InputError: where it does not say.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    queries = getattr(config, "num_attention_heads", None)
    dim = getattr(config, "hidden_size", None)
    if config is None or not isinstance(queries, int) or not isinstance(dim, int):
        raise InputError(f"model: the configuration of {type(model).__name__} does not tell its heads; give a decoder")
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or dim // queries)


class LayerGates(nn.Module, ABC):
    """A gate for each block of a decoder; it is saved and loaded without the decoder.

    Args:
        model: a causal decoder with rotary positions.
        blocks: numbers of the blocks that have one; None for all.
        settings: of each gate.

    Raises:
        InputError: where a block has no attention.
    """

    def __init__(self, model: nn.Module, blocks: Collection[int] | None, **settings: Any) -> None:
        super().__init__()
        self.at = one_stack(model)
        there = [place.block for place in attentions(model) if place in self.at]
        wanted = there if blocks is None else sorted(blocks)
        missing = sorted(set(wanted) - set(there))
        if missing or not wanted:
            raise InputError(f"blocks: {missing or 'none'} named, and attention is in {there}")
        self.settings: dict[str, Any] = settings
        self.gates = nn.ModuleDict({str(number): self.gate(heads_of(model), **settings) for number in wanted})

    @staticmethod
    @abstractmethod
    def gate(heads: Heads, **settings: Any) -> nn.Module:
        """One gate."""

    @property
    def where(self) -> Where:
        """The attention that has gates."""
        return Where([int(number) for number in self.gates], self.at.kinds, self.at.stack)

    def of(self, place: Place) -> nn.Module:
        """The gate of an attention."""
        return self.gates[str(place.block)]

    def save(self, path: Path) -> None:
        """Write the gates alone, whole, as safetensors with its SHA-256."""
        card = {"format": FORMAT, "kind": type(self).__name__, "settings": self.settings}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        files.write_tensors(Path(path), tensors, {"gates": json.dumps(card)})

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> Self:
        """The gates that `save` wrote, for the same model.

        Raises:
            InputError: where it is no such file, was changed, or is of a model of other heads or blocks.
        """
        try:
            stored = files.read_tensors(Path(path), old=False)
        except (ValueError, OSError) as error:
            raise InputError(f"path: {path} cannot be read ({error}); save the gates again") from error
        card = json.loads(stored.metadata.get("gates", "{}"))
        if card.get("format") != FORMAT or card.get("kind") != cls.__name__:
            raise InputError(f"path: {path} holds {card.get('kind', 'no gates')}, expected {cls.__name__}")
        blocks = sorted({int(name.split(".")[1]) for name in stored.tensors})
        gates = cls(model, blocks=blocks, **card["settings"])
        wrong = [name for name, own in gates.state_dict().items() if stored.tensors[name].shape != own.shape]
        if wrong:
            raise InputError(
                f"path: {path} is of a model with other heads: {wrong[0]} has another shape than of this model"
            )
        gates.load_state_dict(stored.tensors)
        return gates


class BeforePositions(AttentionEdit):
    """Base of edits that see queries and keys as they were before positions, beside each gate.

    Args:
        gates: of the model.
        at: the places; those that have gates by default.
    """

    def __init__(self, gates: LayerGates, at: Where | None = None) -> None:
        self.gates = gates
        self.at = gates.where if at is None else at
        self.angles = AnglesRecorder(self.at)

    def parts(self, model: nn.Module) -> Sequence[Edit]:
        heads = heads_of(model)
        for gate in self.gates.gates.values():
            own: Any = gate
            if (own.heads, own.width) != (heads.queries, heads.width):
                raise InputError(
                    f"gates: are of {own.heads} heads of width {own.width}, and the model has {heads.queries} of width "
                    f"{heads.width}; make them from this model"
                )
        return self.angles, self

    def before(self, call: AttentionCall) -> tuple[Tensor, Tensor, Angles]:
        """Queries, the keys of the same tokens, and their angles."""
        gate: Any = self.gates.of(call.place)
        if (gate.heads, gate.kv_heads) != (call.heads, call.k.shape[1]):
            raise InputError(
                f"gates: {call.place.path} has {call.heads} heads of queries and {call.k.shape[1]} of keys, its gate is for "
                f"{gate.heads} and {gate.kv_heads}, as the model's configuration says"
            )
        by = self.angles.of(call.place)
        return unrotated(call.q, by), unrotated(call.k[:, :, -call.queries :], by), by


def real_keys(call: AttentionCall) -> Bool[Tensor, "batch keys"]:
    """Which keys are no padding: those that the last query may read.

    Raises:
        InputError: where queries read later keys, or a sliding window leaves out keys.
    """
    whole = torch.ones(call.batch, call.keys, dtype=torch.bool, device=call.q.device)
    last = _row(call, torch.full((call.batch,), call.queries - 1, device=call.q.device))
    if last is None:
        if call.queries > 1:
            raise InputError(f"model: attention at {call.place.path} reads later tokens; give a causal decoder")
        return whole
    first = last.to(torch.uint8).argmax(1)
    before = (first + call.queries - call.keys - 1).clamp(min=0)
    seen = _row(call, before)
    if call.queries > 1 and seen is not None:
        itself = seen.gather(1, (before + call.keys - call.queries)[:, None])[:, 0]
        if bool((itself & ~last[:, 0] & (first > 0)).any()):
            raise InputError(
                f"model: {call.place.path} has a sliding window of fewer tokens than there are, which reads few keys already; "
                f"leave its block out (at=Where(blocks))"
            )
    return last


def _row(call: AttentionCall, number: Int[Tensor, "batch"]) -> Bool[Tensor, "batch keys"] | None:
    """Which keys one query of each item may read; None for all."""
    if call.allowed is None:
        return None
    return call.allowed(number[:, None])[:, :1, -1].expand(call.batch, -1, -1).any(1)


def require_plain(call: AttentionCall) -> None:
    """Raise where scores are more than scaled products: soft caps, sinks, biases are not known to block-wise attention."""
    if call.softcap is not None or call.sinks is not None or _biased(call):
        what = (
            "a soft cap" if call.softcap is not None else "sinks" if call.sinks is not None else "a bias of its scores"
        )
        raise InputError(f"model: attention at {call.place.path} has {what}, which attention by blocks does not know")


def _biased(call: AttentionCall) -> bool:
    if call.bias is None:
        return False
    lowest = torch.finfo(call.bias.dtype).min / 2
    return bool((call.bias.masked_fill(call.bias <= lowest, 0.0) != 0).any())


def whole_prompt(call: AttentionCall) -> bool:
    """Whether all tokens so far are read at once, and there are several."""
    return call.queries == call.keys > 1


class GateLoss(BeforePositions, ABC):
    """What gates have not learned yet: beside each attention its gate's loss is computed, and its gradients, block by block.

    The model runs as it would, and needs no gradients.

    Args:
        gates: that learn.
        scale: factor on the loss.
    """

    def __init__(self, gates: LayerGates, scale: float = 10.0) -> None:
        super().__init__(gates)
        self.scale = scale
        self.losses: list[float] = []

    def begins(self) -> None:
        self.losses.clear()

    def inputs(self, call: AttentionCall) -> AttentionCall:
        if not whole_prompt(call):
            raise InputError("model: gates learn from whole texts; give several tokens at once, without a cache")
        q, k, by = self.before(call)
        with torch.enable_grad():
            seen = call.replace(q=call.q.detach(), k=call.k.detach())
            loss = self.scale * self.loss(seen, q.detach(), k.detach(), by)
            if loss.requires_grad:
                loss.backward()
        self.losses.append(float(loss.detach()))
        return call

    @abstractmethod
    def loss(self, call: AttentionCall, q: Tensor, k: Tensor, by: Angles) -> Float[Tensor, ""]:
        """Of the gate of a call.

        Args:
            call: with queries and keys after positions.
            q, k: the same before positions.
            by: angles of their positions.
        """


def distil_gates(
    learning: GateLoss,
    model: nn.Module,
    draw: Callable[[], Texts],
    *,
    steps: int,
    lr: float = 1e-3,
    last_lr: float = 0.0,
    warmup: int = 20,
) -> list[float]:
    """Train the gates of a decoder, which stays as it is, bit for bit.

    AdamW without decay; the rate rises over `warmup` steps and falls along a cosine.

    Args:
        learning: the loss of the gates.
        model: the decoder, which runs without gradients.
        draw: gives the texts of a step.
        steps: how many.
        lr, last_lr: largest and last rate.
        warmup: as above.

    Returns:
        The loss, summed over blocks, step by step.

    Raises:
        InputError: where the gates have nothing to learn.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr)
    trained = [p for p in learning.gates.parameters() if p.requires_grad]
    if not trained:
        raise InputError("gates: have no parameters to train")
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warmed_cosine(steps, warmup, last_lr / lr))
    losses = []
    for _ in range(steps):
        ids, mask = draw()
        optimiser.zero_grad()
        with torch.no_grad(), edited(model, learning):
            model(input_ids=ids, **told(mask), **accepted(model, use_cache=False, logits_to_keep=1))
        losses.append(sum(learning.losses))
        optimiser.step()
        schedule.step()
    return losses


def warmed_cosine(steps: int, warmup: int, last: float = 0.0) -> Callable[[int], float]:
    """Factor on the rate at each step: up to 1 over the warm-up, then down to `last`.

    >>> [round(warmed_cosine(4, 1)(step), 2) for step in range(5)]
    [1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup + 1) / max(1, steps - warmup + 1))
        return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    return factor


def told(mask: Bool[Tensor, "batch tokens"] | None) -> dict[str, Tensor]:
    """The mask as decoders take it."""
    return {} if mask is None else {"attention_mask": mask.long()}


def divergence(
    logits: Float[Tensor, "*rows blocks"], target: Float[Tensor, "*rows blocks"]
) -> Float[Tensor, "*rows blocks"]:
    """`t (log t - log softmax(logits))`, element by element; 0 where the target is."""
    logs = logits.log_softmax(-1)
    return torch.xlogy(target, target) - target * logs
