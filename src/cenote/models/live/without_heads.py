"""A model from which heads are really gone: rows of the maps to queries, keys and values, columns of the map behind the heads.

Found by what happens: the map behind the heads is the module that is given their outputs, the maps before them are those inside
of attention that are as wide as all query heads, or all key heads, together. What is made is compared with the model whose
heads give zeros, and refused where it differs.

Does not know: `torch.nn.MultiheadAttention`, whose maps are no modules, quantised maps, norms across heads.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.edited import edited
from cenote.models.live.edits import HeadRecorder, InputsRecorder, Where
from cenote.models.live.heads import AblatedHeads
from cenote.models.live.places import attentions, blocks
from cenote.models.live.ran import _hooked, _Watched

FORMAT = 1
CARD, STATE = "without_heads.json", "without_heads.safetensors"
CLOSE = 1e-4
"""How far outputs may be from those of masked heads, of the largest."""


@dataclass(frozen=True)
class Cut:
    """What is taken out of one place.

    Attributes:
        path: of the place.
        heads, kv_heads: how many query and key heads there were.
        queries, keys: those that are kept.
        before: paths of the maps to queries, keys and values, inside of the place; one where all three are one matrix.
        behind: path of the map behind the heads, in the model.
        silent: whether no head should be left: one is kept, and its outputs count nothing.
    """

    path: str
    heads: int
    kv_heads: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    before: tuple[str, ...]
    behind: str
    silent: bool = False


@dataclass(frozen=True, eq=False)
class WithoutHeads:
    """A smaller model, and what was taken out of it.

    Attributes:
        model: a copy.
        cuts: of each place.
    """

    model: nn.Module
    cuts: tuple[Cut, ...]

    def save(self, folder: str | Path) -> None:
        """Write what is left of the weights, and what was taken out, to a folder."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        state = {name: t.contiguous().clone() for name, t in self.model.state_dict().items()}
        files.write_saved(where / CARD, where / STATE, {"format": FORMAT, "cuts": list(map(asdict, self.cuts))}, state)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Self:
        """What `save` wrote.

        Args:
            folder: that it was written to.
            model: one of the same architecture with all its heads, whatever its weights; it stays as it is.

        Raises:
            InputError: where the folder holds none, or the model is another.
        """
        where = Path(folder)
        try:
            card, state = files.read_saved(where / CARD, where / STATE, "save it again", format=int, cuts=list)
        except OSError as error:
            raise InputError(
                f"{where}: cannot read it ({error.strerror or error}); name a folder that save wrote"
            ) from None
        files.require_format(where, card, FORMAT)
        made = copy.deepcopy(model)
        try:
            cuts = tuple(_read(one) for one in card["cuts"])
            for cut in cuts:
                _take_out(made, cut)
            made.load_state_dict(state)
        except (AttributeError, RuntimeError, IndexError, TypeError) as error:
            raise InputError(f"model: is not of the architecture that was saved in {where} ({error})") from error
        return cls(made, cuts)


def without_heads(model: nn.Module, heads: Mapping[Place, Collection[int]], inputs: Mapping[str, Any]) -> WithoutHeads:
    """A copy of a model that has lost heads, and gives what it gave with these heads at zero.

    Key heads go with the last of the query heads that read them. Where several query heads share one, as many of each group
    must be left, or none: attention knows no other groups. Of a place that loses all heads one is left whose outputs count
    nothing, so that the place gives the bias of its output projection.

    Args:
        model: in eval mode; it stays as it is.
        heads: of each place the query heads that go, from 0.
        inputs: of its forward, to find the maps with and to compare outputs on.

    Raises:
        InputError: for heads that are not there, groups that are left uneven, maps that cannot be told, and models whose
            outputs are not those of masked heads.
    """
    wanted = {place: sorted(set(gone)) for place, gone in heads.items() if len(gone)}
    if not wanted:
        raise InputError("heads: name at least one")
    if model.training:
        raise InputError("model: is in training mode, in which two runs differ by dropout; call model.eval()")
    known = set(attentions(model))
    strangers = [place.path for place in wanted if place not in known]
    if strangers:
        raise InputError(f"heads: {strangers[0]} is no attention of this model; take places of it")
    found = behind_heads(model, inputs, list(wanted))
    cuts = tuple(_cut(model, place, call, behind, wanted[place]) for place, (call, behind) in found.items())
    made = copy.deepcopy(model)
    for cut in cuts:
        _take_out(made, cut)
    _compare(model, made, wanted, inputs)
    return WithoutHeads(made, cuts)


def _read(one: dict[str, Any]) -> Cut:
    """Of JSON, which knows no tuples."""
    told: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
    return Cut(**told)


def behind_heads(
    model: nn.Module, inputs: Mapping[str, Any], places: Sequence[Place]
) -> dict[Place, tuple[AttentionCall, nn.Module]]:
    """Of places of any kind the call, and the module that the outputs of the heads go through next.

    Args:
        model: in eval mode.
        inputs: of its forward.
        places: where attention happens in blocks of the model.

    Raises:
        InputError: where one cannot be reached, runs more than once, or has no output projection that is a module of its own.
    """
    of_block = {(place.stack, place.block): place for place in blocks(model)}
    ats = [Where([place.block], [place.kind], place.stack) for place in places]
    calls, heads = [InputsRecorder(at) for at in ats], [HeadRecorder(at) for at in ats]
    watched = [
        _Watched(place, of_block[place.stack, place.block].module if place.stack else place.module, own)
        for place, own in zip(places, heads, strict=True)
    ]
    with torch.no_grad(), edited(model, *calls, *heads), _hooked(watched):
        model(**inputs)
    found = {}
    for place, call, seen in zip(places, calls, watched, strict=True):
        if len(call.found.get(place, [])) != 1:
            raise InputError(
                f"model: {place.path} ran {len(call.found.get(place, []))} times in one forward; expected once"
            )
        if seen.projection is None:
            raise InputError(
                f"model: no module of the block of {place.path} is given the outputs of its heads; the output projection must "
                f"be a module of its own"
            )
        found[place] = (call.found[place][0], seen.projection)
    return found


def zeroed(heads: Mapping[Place, Sequence[int]]) -> list[AblatedHeads]:
    """Edits by which these heads give zeros."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for place, gone in heads.items():
        groups.setdefault((place.stack, place.kind), []).extend((place.block, head) for head in gone)
    return [
        AblatedHeads(pairs, Where(stack=stack, kinds=[kind]))  # type: ignore[list-item]
        for (stack, kind), pairs in groups.items()
    ]


def _cut(model: nn.Module, place: Place, call: AttentionCall, behind: nn.Module, gone: Sequence[int]) -> Cut:
    heads, kv_heads = call.heads, call.k.shape[1]
    if not 0 <= gone[0] <= gone[-1] < heads:
        raise InputError(f"heads: {list(gone)} of {place.path}, which has {heads}, counted from 0")
    group = heads // kv_heads
    left = [head for head in range(heads) if head not in set(gone)]
    silent = not left
    left = left or [0]
    counts = {kv: sum(head // group == kv for head in left) for kv in sorted({head // group for head in left})}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"heads: of {place.path} {counts} query heads would be left of its groups, which must be as many of each, or none; "
            f"mask them instead, or take whole groups of {group}"
        )
    widths = {heads * call.q.shape[3], kv_heads * call.k.shape[3], kv_heads * call.v.shape[3]}
    before = [
        path
        for path, module in place.module.named_modules()
        if module is not behind and not any(True for _ in module.children()) and _outputs(module) in widths
    ]
    whole = (heads * call.q.shape[3]) + kv_heads * (call.k.shape[3] + call.v.shape[3])
    if not before:
        before = [
            path
            for path, module in place.module.named_modules()
            if module is not behind and not any(True for _ in module.children()) and _outputs(module) == whole
        ]
    if len(before) not in (1, 3) or (len(before) == 1 and _outputs(place.module.get_submodule(before[0])) != whole):
        raise InputError(
            f"model: expected three maps to queries, keys and values, or one, inside of {place.path}, found {len(before)}"
            f"{' (' + ', '.join(before) + ')' if before else ''}; heads can be masked there, not taken out"
        )
    name = next(path for path, module in model.named_modules() if module is behind)
    return Cut(place.path, heads, kv_heads, tuple(left), tuple(counts), tuple(before), name, silent)


@torch.no_grad()
def _take_out(model: nn.Module, cut: Cut) -> None:
    module = model.get_submodule(cut.path)
    linears = [module.get_submodule(path) for path in cut.before]
    if len(linears) == 1:
        _shrink(linears[0], _places_in_one(_outputs(linears[0]) or 0, cut), outputs=True)
        linears = []
    widths = [_outputs(linear) or 0 for linear in linears]
    for linear, width in zip(linears, widths, strict=True):
        # where there are as many of both, both keep the same
        of_keys = cut.kv_heads != cut.heads and width < max(widths)
        number, kept = (cut.kv_heads, cut.keys) if of_keys else (cut.heads, cut.queries)
        _shrink(linear, _places(width, number, kept), outputs=True)
    behind = model.get_submodule(cut.behind)
    weight = behind.weight
    assert isinstance(weight, Tensor)
    _shrink(behind, _places(weight.shape[int(isinstance(behind, nn.Linear))], cut.heads, cut.queries), outputs=False)
    if cut.silent:
        behind.weight.zero_()  # type: ignore[operator]
    for name, value in vars(module).items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if "group" in name and value == cut.heads // cut.kv_heads:
            setattr(module, name, len(cut.queries) // len(cut.keys))
        elif "head" in name and ("kv" in name or "key_value" in name) and value == cut.kv_heads:
            setattr(module, name, len(cut.keys))
        elif "head" in name and value == cut.heads and "dim" not in name and "size" not in name:
            setattr(module, name, len(cut.queries))
        elif name in ("all_head_size", "split_size"):
            setattr(module, name, value // cut.heads * len(cut.queries))


def _places(width: int, heads: int, kept: Sequence[int]) -> Int[Tensor, "kept"]:
    """Numbers of the outputs of these heads, of a map that is so wide."""
    return torch.arange(width).view(heads, -1)[list(kept)].flatten()


def _places_in_one(width: int, cut: Cut) -> Int[Tensor, "kept"]:
    """The same of a map to queries, keys and values at once, of heads that are all as wide."""
    each = width // (cut.heads + 2 * cut.kv_heads)
    queries, keys = cut.heads * each, cut.kv_heads * each
    own = _places(keys, cut.kv_heads, cut.keys)
    return torch.cat([_places(queries, cut.heads, cut.queries), own + queries, own + queries + keys])


def _shrink(module: nn.Module, kept: Int[Tensor, "kept"], outputs: bool) -> None:
    """A map with these outputs, or inputs, alone."""
    weight, bias = module.weight, getattr(module, "bias", None)
    transposed = not isinstance(module, nn.Linear)
    assert isinstance(weight, Tensor)
    along = int(outputs == transposed)
    trained = weight.requires_grad
    module.weight = nn.Parameter(weight.index_select(along, kept.to(weight.device)), requires_grad=trained)
    if outputs and isinstance(bias, Tensor):
        module.bias = nn.Parameter(bias[kept.to(bias.device)], requires_grad=bias.requires_grad)
    name = ("nf" if transposed else "out_features") if outputs else ("nx" if transposed else "in_features")
    if hasattr(module, name):
        setattr(module, name, len(kept))


def _outputs(module: nn.Module) -> int | None:
    """How wide what a map gives is; None where it is no map of numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[0]
    return weight.shape[1] if hasattr(module, "nf") else None


@torch.no_grad()
def _compare(
    model: nn.Module, made: nn.Module, heads: Mapping[Place, Sequence[int]], inputs: Mapping[str, Any]
) -> None:
    with edited(model, *zeroed(heads)):
        masked = _first(model(**inputs))
    try:
        smaller = _first(made(**inputs))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"model: {type(model).__name__} does not run without these heads ({error}); they can be masked, not taken out"
        ) from error
    off = float((masked - smaller).abs().max() / masked.abs().max().clamp(min=1e-12))
    if not off <= CLOSE:
        raise InputError(
            f"model: without these heads {type(model).__name__} gives something else than with them at zero (off by "
            f"{off:.1e}); they can be masked, not taken out"
        )


def _first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
