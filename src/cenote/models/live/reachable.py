"""Which places of a model can be recorded and edited, which not, and why: before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cenote.models.live import places, sdpa, transformers
from cenote.models.live.calls import Kind, Place

SEATS = {"registry": transformers.why_not, "fused": sdpa.why_not}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Reach:
    """What can be done at the places of one kind in one list of blocks that are alike in this.

    Attributes:
        kind: of the places.
        stack: path of the list of blocks; "" outside of any.
        blocks: numbers of the blocks.
        heads, kv_heads: of queries, and of keys and values, where the modules tell.
        attention: what computes it: transformers' name of it, "scaled_dot_product_attention", "written out" or "a processor".
        edits: methods of an `AttentionEdit` that work there, "allowed" (other masks) and "rows" among them; what can be edited
            can be recorded.
        why_not: what stands against it, in words; None where nothing does.
    """

    kind: Kind
    stack: str
    blocks: tuple[int, ...]
    heads: int | None
    kv_heads: int | None
    attention: str
    edits: tuple[str, ...]
    why_not: str | None


def reach(model: nn.Module) -> list[Reach]:
    """What can be recorded and edited where attention happens in a model, in order.

    Args:
        model: any module; it isn't run.

    Example:
        >>> _ = torch.backends.mha.set_fastpath_enabled(False)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> (found,) = reach(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
        >>> _ = torch.backends.mha.set_fastpath_enabled(True)
        >>> found.kind, found.stack, found.blocks, found.heads, found.why_not
        ('self', 'layers', (0, 1, 2), 2, None)
    """
    ways = places.ways(model)
    inside = set(places.in_blocks(ways))
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, way in ways.items():
        why = why_not(place, way) if place in inside else "it stands outside of the model's blocks"
        attention = _attention(place.module, way)
        found = (place.kind, place.stack, *_heads(place.module), attention, () if why else _edits(attention), why)
        alike.setdefault(found, []).append(place.block)
    return [
        Reach(kind, stack, tuple(dict.fromkeys(numbers)), heads, kv_heads, attention, edits, why)  # type: ignore[arg-type]
        for (kind, stack, heads, kv_heads, attention, edits, why), numbers in alike.items()
    ]


def why_not(place: Place, way: str) -> str | None:
    """What stands against editing attention that is computed this way, in words."""
    if way in SEATS:
        return SEATS[way](place.module)
    if way == "elsewhere":
        name = type(place.module.processor).__name__
        return (
            f"{name} computes it in a function that cannot be edited; set a processor of scaled_dot_product_attention, such as "
            "model.set_attn_processor(AttnProcessor2_0())"
        )
    name = type(place.module).__name__
    return f"{name} writes it out in its own forward; edits of blocks (BlockEdit) work, or give other places"


def _attention(module: nn.Module, way: str) -> str:
    names: Mapping[str, str] = {
        "fused": "scaled_dot_product_attention",
        "written out": "written out",
        "elsewhere": "a processor",
    }
    return names.get(way) or transformers.implementation_of(module)


def _edits(attention: str) -> tuple[str, ...]:
    masks = attention in (*transformers.WITH_MASKS, "scaled_dot_product_attention")
    return ("inputs", *(("allowed",) if masks else ()), "rows", "attends", "scores", "weights", "context")


def _heads(module: nn.Module) -> tuple[int | None, int | None]:
    """Heads of queries, and of keys, as the module says, else its configuration."""
    config = getattr(module, "config", None)
    heads = _number(module, config, HEADS)
    groups = _number(module, None, ("num_key_value_groups",))
    kv_heads = heads // groups if heads and groups else _number(module, config, KV_HEADS)
    return heads, kv_heads or heads


def _number(module: nn.Module, config: object, names: tuple[str, ...]) -> int | None:
    for owner in (module, config):
        for name in names:
            found = getattr(owner, name, None)
            if isinstance(found, int):
                return found
    return None
