"""`load`: the adapter of a model, chosen by what the model is.

That follows from what its forward takes (`main_input_name`) and from the parts of its configuration; no list of model names is
kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.core.seeded import seeded
from cenote.models import sources
from cenote.models.audio import AudioBackbone
from cenote.models.base import Backbone, Identity, Kind
from cenote.models.hugging_face import HuggingFaceBackbone, quiet, required_transformers, why
from cenote.models.text import TextBackbone
from cenote.models.timm import TimmBackbone
from cenote.models.vision import VisionBackbone

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
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    kind: str | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    max_length: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Backbone:
    """A frozen model that gives tokens, hidden states and attentions.

    Args:
        name: a folder of a saved transformers, timm or sentence-transformers model, or a model's name on the hub.
        kind: image, audio or text; needed where a model takes several, as dual encoders do.
        revision: branch, tag or commit on the hub.
        device: to compute on.
        precision: to compute in: float32, bfloat16 or float16.
        max_length: texts are cut to so many tokens; default: the model's own limit.
        trust_remote_code: run Python code that lies with the model. Never without reading it.
        allow_pickle: also take weights from a pickle (read with `weights_only`).

    Raises:
        InputError: where there is no such model, or it cannot be used, saying why.
    """
    require_one_of(PRECISIONS, precision=precision)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r} cannot be used ({str(error).splitlines()[0]})") from error
    backbone, _ = load_whole(
        name,
        kind,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        precision=PRECISIONS[precision],
        max_length=max_length,
    )
    return backbone if device == "cpu" else backbone.to(device)


def load_whole(
    name: str,
    kind: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    precision: torch.dtype = torch.float32,
    max_length: int | None = None,
) -> tuple[Backbone, nn.Module]:
    """As `load`, on the CPU, and the whole model that it was taken from: with its other towers, or its decoder."""
    if kind is not None:
        require_one_of(get_args(Kind), kind=kind)
    with quiet():
        transformers = required_transformers()
    top, found_revision = sources.model_folder(name, revision, allow_pickle, trust_remote_code)
    folder, sentence = sources.transformer_inside(top)
    sources.require_own_files(folder, allow_pickle)
    files = sources.require_safetensors(folder, allow_pickle)
    if _is_timm(folder):
        timm = TimmBackbone(name, found_revision, folder, files, precision)
        return timm, timm.model
    # what the file does not hold is drawn at random: the same each time
    with quiet(), seeded(0):
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
                f"backbone: {name}: its weights cannot be read ({why(error, trust_remote_code)}); is the file whole, and no "
                f"pointer of Git LFS? fetch it again"
            ) from error
        except (ValueError, OSError, RuntimeError, KeyError, ImportError, TypeError) as error:
            raise InputError(f"backbone: {name}: {why(error, trust_remote_code)}") from error
        except Exception as error:
            what = "its own Python code failed" if trust_remote_code else "cannot be built from its config.json"
            raise InputError(
                f"backbone: {name}: {what} ({type(error).__name__}: {why(error, trust_remote_code)})"
            ) from error
    _require_fitting(name, info)
    chosen = _kind(model, kind, name)  # type: ignore[arg-type]
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
    backbone: HuggingFaceBackbone
    try:
        if chosen == "image":
            backbone = VisionBackbone(part.eval(), folder, identity, notes, trust_remote_code)
        elif chosen == "audio":
            backbone = AudioBackbone(part.eval(), folder, identity, notes, trust_remote_code)
        else:
            settings = sentence or {}
            backbone = TextBackbone(
                part.eval(),
                folder,
                identity,
                notes,
                trust_remote_code,
                max_length or settings.get("max_seq_length"),
                bool(settings.get("do_lower_case", False)),
            )
    except (ArithmeticError, StopIteration) as error:
        raise InputError(
            f"backbone: {name}: cannot take a sample ({type(error).__name__}: {why(error, trust_remote_code)}); is its "
            f"config.json whole?"
        ) from error
    if trust_remote_code:
        code = sources.code_sha256(folder, *model.modules(), *vars(backbone).values())
        backbone.identity = replace(backbone.identity, code_sha256=code)
    return backbone, model


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


def _is_timm(folder: Path) -> bool:
    config = sources.json_of(folder / "config.json")
    return isinstance(config, dict) and "architecture" in config and "model_type" not in config


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
