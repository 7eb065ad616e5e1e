"""Models of transformers, and the transformer inside a saved sentence-transformers model.

What a model is follows from what its forward takes (`main_input_name`) and from the parts of its configuration; no list of
model names is kept.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models import sources
from cenote.models.base import Backbone, Identity, Kind, Layout, Prepared, States, to_device

TOWERS: dict[Kind, tuple[str, ...]] = {
    "image": ("vision_model", "vision_tower", "vision_encoder", "visual", "image_encoder"),
    "audio": ("audio_model", "audio_tower", "audio_encoder"),
    "text": ("text_model", "language_model", "text_encoder"),
}
CONFIGS: dict[Kind, str] = {"image": "vision_config", "audio": "audio_config", "text": "text_config"}
INPUTS: dict[str, Kind] = {
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
    "input_ids": "text",
}
BIGGER_THAN_ANY = 10**9


def load(
    name: str,
    kind: Kind | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    precision: torch.dtype,
    max_length: int | None,
) -> Backbone:
    """The adapter of a local folder or of a model on the hub; see `cenote.models.load`."""
    with _quiet():
        transformers = _transformers()
    top, found_revision = sources.model_folder(name, revision, allow_pickle, trust_remote_code)
    folder, sentence = transformer_inside(top)
    files = sources.require_safetensors(folder, allow_pickle)
    if _is_timm(folder):
        from cenote.models.timm import TimmBackbone

        return TimmBackbone(name, found_revision, folder, files, precision)
    with _quiet(), torch.random.fork_rng(devices=[]):
        # what the file does not hold is drawn at random: the same each time
        torch.manual_seed(0)
        try:
            model, info = transformers.AutoModel.from_pretrained(
                folder,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                dtype=precision,
                output_loading_info=True,
                # told below, with the names
                ignore_mismatched_sizes=True,
            )
        except (SafetensorError, UnpicklingError) as error:
            raise InputError(
                f"backbone: {name}: its weights cannot be read ({_why(error, trust_remote_code)}); is the file whole, and no "
                f"pointer of Git LFS? fetch it again"
            ) from error
        except (ValueError, OSError, RuntimeError, KeyError, ImportError, TypeError) as error:
            raise InputError(f"backbone: {name}: {_why(error, trust_remote_code)}") from error
        except Exception as error:
            if not trust_remote_code:
                raise
            raise InputError(
                f"backbone: {name}: its own Python code failed ({type(error).__name__}: {_why(error, True)})"
            ) from error
    _require_fitting(name, info)
    chosen = _kind(model, kind, name)
    if max_length is not None and chosen != "text":
        raise InputError(f"max_length: cuts texts, and {name} takes {chosen}; leave it out")
    part, attribute = _tower(model, chosen)
    identity = Identity(
        name=name,
        revision=found_revision,
        library="sentence-transformers" if sentence is not None else "transformers",
        model_class=type(model).__name__ + (f".{attribute}" if attribute else ""),
        weights_sha256=sources.weights_sha256(files),
        config_sha256=sources.config_sha256(folder),
    )
    notes = _loading_notes(info, attribute)
    from cenote.models.audio import AudioBackbone
    from cenote.models.text import TextBackbone
    from cenote.models.vision import VisionBackbone

    if chosen == "image":
        return VisionBackbone(part.eval(), folder, identity, notes, trust_remote_code)
    if chosen == "audio":
        return AudioBackbone(part.eval(), folder, identity, notes, trust_remote_code)
    settings = sentence or {}
    return TextBackbone(
        part.eval(),
        folder,
        identity,
        notes,
        trust_remote_code,
        max_length or settings.get("max_seq_length"),
        bool(settings.get("do_lower_case", False)),
    )


class HuggingFaceBackbone(Backbone):
    """What the adapters of the three kinds share."""

    def __init__(self, model: nn.Module, identity: Identity, notes: Sequence[str]) -> None:
        self.model: Any = model.requires_grad_(False)
        self.identity = identity
        self.takes = set(inspect.signature(model.forward).parameters)
        weight = next(model.parameters())
        self.device, self.precision = weight.device, weight.dtype
        self.notes = list(notes)
        self.layout = self._layout()

    @property
    def config(self) -> Any:
        """Of the part of the model that is used."""
        return self.model.config

    @abstractmethod
    def sample(self) -> tuple[Any, str]:
        """One item, and what it is in words."""

    @abstractmethod
    def mask(self, prepared: Prepared, output: Any) -> Tensor | None:
        """Which of the output's tokens are real."""

    @abstractmethod
    def lie(self, prepared: Prepared, tokens: int) -> tuple[int, tuple[int, int] | None]:
        """Prefix tokens and grid of the sample."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Of the preprocessing."""

    def to(self, device: str) -> HuggingFaceBackbone:
        """The same on another device."""
        self.model = self.model.to(device)
        self.device = next(self.model.parameters()).device
        return self

    def twin(self) -> HuggingFaceBackbone | None:
        """On a CPU: a model keeps tables for the length that it saw last, so that two threads need one each."""
        if self.device.type != "cpu":
            return None
        other = copy.copy(self)
        try:
            other.model = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        except Exception:  # a model's own code may hold anything
            return None
        return other

    @torch.inference_mode()
    def forward(self, prepared: Prepared) -> Any:
        """The model's own forward."""
        return self.model(**self.arguments(prepared))

    @torch.inference_mode()
    def states(self, prepared: Prepared, layers: Sequence[int] | None = None, attentions: bool = False) -> States:
        """See `Backbone.states`."""
        blocks = self.layout.blocks
        wanted = (blocks,) if layers is None else tuple(layers)
        for number in wanted:
            if not 0 <= number <= blocks:
                raise InputError(f"layers: there is no layer {number}; numbers go from 0 to {blocks}")
        with self._giving_attentions() if attentions else _nothing():
            output = self._run(prepared, hidden=any(n < blocks for n in wanted), attentions=attentions)
        mask = self.mask(prepared, output)
        found = {n: _tokens(_hidden(output, n, blocks)) for n in wanted}
        weights = getattr(output, "attentions", None) if attentions else None
        if attentions and (not weights or any(w is None for w in weights)):
            raise InputError(f"attentions: {self.identity.model_class} gives no attention weights")
        return States(found, mask, None if weights is None else tuple(weights))

    def arguments(self, prepared: Prepared) -> dict[str, Tensor]:
        """What the model's forward is called with."""
        known = {k: v for k, v in prepared.inputs.items() if k in self.takes or "kwargs" in self.takes}
        return to_device(known, self.device, self.precision)

    def _run(self, prepared: Prepared, hidden: bool, attentions: bool = False) -> Any:
        options: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        if attentions:
            options["output_attentions"] = True
        if "use_cache" in self.takes:
            options["use_cache"] = False
        return self.model(**self.arguments(prepared), **options)

    @contextmanager
    def _giving_attentions(self) -> Iterator[None]:
        before = getattr(self.config, "_attn_implementation", None)
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if before is not None:
                self.model.set_attn_implementation(before)

    @torch.inference_mode()
    def _layout(self) -> Layout:
        item, words = self.sample()
        prepared = self.prepare([item])
        output = self._run(prepared, hidden=True)
        again = self._run(prepared, hidden=False)
        last = _tokens(output.last_hidden_state)
        if not torch.equal(last, _tokens(again.last_hidden_state)) and not torch.allclose(
            last, _tokens(again.last_hidden_state), atol=1e-3, rtol=1e-3, equal_nan=True
        ):
            raise InputError(
                f"backbone: {self.identity.model_class} gives other tokens each time (random masking?); "
                f"features of such a model cannot be reproduced"
            )
        if not bool(torch.isfinite(last).all()):
            self.notes.append("its output for the sample holds NaN or infinite numbers")
        hidden = getattr(output, "hidden_states", None)
        if not hidden:
            self.notes.append("gives no hidden states: only its output can be extracted")
        states = [_tokens(h) for h in hidden[:-1]] if hidden else []
        states.append(last)
        mask = self.mask(prepared, output)
        prefix, grid = self.lie(prepared, last.shape[1])
        return Layout(
            kind=self.kind(),
            blocks=len(states) - 1,
            dims=tuple(s.shape[2] for s in states),
            tokens=tuple(
                s.shape[1] if mask is None or mask.shape[1] != s.shape[1] else int(mask.sum()) for s in states
            ),
            prefix_tokens=prefix,
            grid=grid,
            heads=_number(self.config, "num_attention_heads", "encoder_attention_heads", "num_heads", "n_head"),
            parameters=sum(p.numel() for p in self.model.parameters()),
            sample=words,
            preprocessing=dict(self.settings()),
            notes=tuple(self.notes),
        )

    @abstractmethod
    def kind(self) -> Kind:
        """What it takes."""


def processor(cls_name: str, folder: Path, trust_remote_code: bool, what: str) -> Any:
    """The preprocessing that is saved beside a model.

    Raises:
        InputError: where none is.
    """
    with _quiet():
        transformers = _transformers()
        try:
            return getattr(transformers, cls_name).from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ValueError, OSError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise InputError(
                f"backbone: {folder} does not say how {what} are prepared ({_why(error, trust_remote_code)}); "
                f"save the model's processor or tokenizer into the folder"
            ) from error


def plain(value: Any) -> Any:
    """Settings as JSON can hold them, without what only tells where they came from."""
    if isinstance(value, Mapping):
        left_out = (
            "processor_class",
            "name_or_path",
            "_name_or_path",
            "transformers_version",
            "feature_extractor_type",
        )
        return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])) if k not in left_out}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)


def _hidden(output: Any, number: int, blocks: int) -> Tensor:
    return output.last_hidden_state if number == blocks else output.hidden_states[number]


def _tokens(state: Tensor) -> Tensor:
    """`[batch, tokens, dim]`, also of a feature map `[batch, dim, height, width]`."""
    return state.flatten(2).transpose(1, 2) if state.dim() == 4 else state


def _number(config: Any, *names: str) -> int | None:
    found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
    return None if found is None else int(found)


def _kind(model: Any, wanted: Kind | None, name: str) -> Kind:
    parts = [kind for kind, attribute in CONFIGS.items() if getattr(model.config, attribute, None) is not None]
    if len(parts) < 2:
        own = INPUTS.get(model.main_input_name)
        if own is None:
            raise InputError(
                f"backbone: {name} takes {model.main_input_name!r}; cenote knows models of images, audio and text "
                f"({', '.join(INPUTS)})"
            )
        parts = [own]
    if wanted is None:
        if len(parts) > 1:
            raise InputError(f"kind: {name} takes {' and '.join(parts)}; name one")
        return parts[0]
    if wanted not in parts:
        raise InputError(f"backbone: {name} takes {' and '.join(parts)}, but the data are {wanted}")
    return wanted


def _tower(model: Any, kind: Kind) -> tuple[nn.Module, str]:
    """The part of a model with several encoders that takes one kind, or the encoder of an encoder-decoder."""
    if sum(getattr(model.config, attribute, None) is not None for attribute in CONFIGS.values()) > 1:
        holders = [("", model), ("model.", getattr(model, "model", None))]
        for before, holder in holders:
            for attribute in TOWERS[kind]:
                part = getattr(holder, attribute, None)
                if isinstance(part, nn.Module):
                    return part, before + attribute
        raise InputError(f"backbone: {type(model).__name__} has no part called {', '.join(TOWERS[kind])}")
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder(), "encoder"
    return model, ""


def transformer_inside(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the transformer in a saved sentence-transformers model, and its settings; any other folder as it is."""
    if not (folder / "modules.json").is_file():
        return folder, None
    modules = _json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if str(module.get("type", "")).endswith(".Transformer"):
            # a bare name only: the part must lie in this folder
            inner = folder / Path(str(module.get("path", ""))).name
            settings = [inner / f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert")]
            found: Any = next((_json(file) for file in settings if file.is_file()), {})
            return inner, found if isinstance(found, dict) else {}
    raise InputError(
        f"backbone: {folder} is a sentence-transformers model without a Transformer module; it has no tokens to give"
    )


def _is_timm(folder: Path) -> bool:
    config = _json(folder / "config.json")
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"backbone: {path} is no JSON file ({error})") from error


def _require_fitting(name: str, info: Mapping[str, Any]) -> None:
    odd = sorted(info.get("mismatched_keys", ()))
    if odd:
        key, stored, wanted = odd[0]
        raise InputError(
            f"backbone: {name}: its weights do not fit its config.json: {key} is {list(stored)} in the file, and should be "
            f"{list(wanted)}" + (f", and {len(odd) - 1} more" if len(odd) > 1 else "") + "; take both from one model"
        )


def _loading_notes(info: Mapping[str, Any], attribute: str) -> list[str]:
    missing = sorted(map(str, info.get("missing_keys", ())))
    # parts that are not used, and poolers, which stand behind the tokens
    missing = [k for k in missing if "pooler" not in k and (not attribute or k.startswith(attribute.split(".")[-1]))]
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return [f"weights not in the file, drawn at random: {shown}"]


def _why(error: Exception, trusted: bool) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not trusted:
        return "needs Python code from its own repository; read that code, then allow it with --trust-remote-code"
    return text[:400] or type(error).__name__


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("backbone: needs transformers; pip install 'cenote[models]'") from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice of transformers while it loads."""
    transformers = _transformers()
    logger, bars = logging.getLogger("transformers"), typing.cast(Any, transformers.utils.logging)
    before, had_bars = logger.level, bars.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if had_bars:
            bars.enable_progress_bar()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


__all__ = ["BIGGER_THAN_ANY", "HuggingFaceBackbone", "load", "plain", "processor"]
