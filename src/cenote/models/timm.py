"""Models of timm, where timm can be imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cenote.core import InputError
from cenote.models import sources
from cenote.models.base import Backbone, Identity, Layout, Prepared, States, to_device
from cenote.models.grids import lie
from cenote.models.maps import maps

ELSEWHERE = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}
"""Arguments of `timm.create_model` that name other files than those of the folder."""


class TimmBackbone(Backbone):
    """An image encoder of timm from a folder as timm saves it for the hub: `config.json` and `model.safetensors`.

    Args:
        name: for people.
        revision: on the hub.
        folder: the local one.
        files: the weights.
        precision: to compute in.

    Raises:
        InputError: where timm, or torchvision, which it needs, cannot be imported.
    """

    libraries = ("torchvision",)

    def __init__(
        self, name: str, revision: str | None, folder: Path, files: list[Path], precision: torch.dtype
    ) -> None:
        timm = _timm()
        config = sources.json_of(folder / "config.json")
        architecture, arguments = named(config, folder)
        # no classifier, whatever was saved
        try:
            model = timm.create_model(architecture, **{**arguments, "num_classes": 0})
        except Exception as error:  # of whatever a network makes of its settings
            said = " ".join(str(error).split())
            raise InputError(f"backbone: {folder}: timm cannot build {architecture} ({said})") from error
        if files[0].suffix != ".safetensors":
            raise InputError(
                f"backbone: {folder} holds no .safetensors file; timm models are read from safetensors only"
            )
        from safetensors.torch import load_file

        missing, _ = model.load_state_dict({k: v for f in files for k, v in load_file(f).items()}, strict=False)
        self.model = model.eval().requires_grad_(False).to(precision)
        self.precision, self.device = precision, torch.device("cpu")
        settings = timm.data.resolve_data_config(config.get("pretrained_cfg", {}), model=model)
        self.transform = timm.data.create_transform(**settings, is_training=False)
        self.identity = Identity(
            name, revision, "timm", type(model).__name__, sources.weights_sha256(files), sources.config_sha256(folder)
        )
        notes = [f"weights not in the file, drawn at random: {', '.join(missing[:3])}"] if missing else []
        self.layout = self._layout(settings, notes)

    def to(self, device: str) -> TimmBackbone:
        self.model = self.model.to(device)
        self.device = torch.device(device)
        return self

    def prepare(self, items: Sequence[Any]) -> Prepared:
        """timm's own transform for evaluation."""
        return Prepared({"x": torch.stack([self.transform(image) for image in items])})

    @torch.inference_mode()
    def forward(self, prepared: Prepared) -> Any:
        """The model's own forward."""
        return self.model.forward_features(to_device(prepared.inputs, self.device, self.precision)["x"])

    @torch.inference_mode()
    def states(self, prepared: Prepared, layers: Sequence[int] | None = None, attentions: bool = False) -> States:
        """See `Backbone.states`; timm gives the blocks' outputs but not the embeddings, so layer 0 is not there."""
        blocks = self.layout.blocks
        wanted = (blocks,) if layers is None else tuple(layers)
        if any(not 1 <= n <= blocks for n in wanted):
            raise InputError(f"layers: of a timm model they go from 1 to {blocks}, got {wanted}")
        found: dict[int, Tensor] = {}
        inner = [n - 1 for n in wanted if n < blocks]
        x = to_device(prepared.inputs, self.device, self.precision)["x"]
        with maps(self.model, self.identity.model_class) if attentions else nullcontext() as weights:
            if attentions or blocks in wanted:
                output = self.model.forward_features(x)
        if blocks in wanted:
            found[blocks] = _tokens(output, self._channels_last())
        if inner:
            for number, state in zip(inner, self._inner(x, inner), strict=True):
                found[number + 1] = state
        return States({n: found[n] for n in wanted}, None, None if weights is None else tuple(weights))

    def _inner(self, x: Tensor, numbers: list[int] | None) -> list[Tensor]:
        """Outputs of some blocks or stages, counted from 0; `None`: of all."""
        # only models that have such tokens know the argument
        extra = {"return_prefix_tokens": True} if getattr(self.model, "num_prefix_tokens", 0) else {}
        kept = self.model.forward_intermediates(x, indices=numbers, intermediates_only=True, **extra)
        return [_with_prefix(state) for state in kept]

    def _channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def _layout(self, settings: dict[str, Any], notes: list[str]) -> Layout:
        channels, height, width = settings["input_size"]
        sample = torch.zeros(1, channels, height, width, dtype=self.precision)
        with torch.inference_mode():
            last = _tokens(self.model.forward_features(sample), self._channels_last())
            inner = self._inner(sample, None) if hasattr(self.model, "forward_intermediates") else [last]
        # layer 0 is not there, the last one the model's output
        shapes = [state.shape[1:] for state in (inner[0] if len(inner) > 1 else last, *inner[:-1], last)]
        tokens = last.shape[1]
        prefix = getattr(self.model, "num_prefix_tokens", None)
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        found = lie(tokens, height, width, patch)
        if prefix is not None and prefix != found.prefix_tokens:
            found = found._replace(prefix_tokens=prefix, grid=None, note="the model's own prefix_tokens leave no grid")
        first = next(iter(getattr(self.model, "blocks", ())), None)
        return Layout(
            kind="image",
            blocks=len(inner),
            dims=tuple(width for _, width in shapes),
            tokens=tuple(count for count, _ in shapes),
            prefix_tokens=found.prefix_tokens,
            grid=found.grid,
            heads=getattr(getattr(first, "attn", None), "num_heads", None),
            parameters=sum(p.numel() for p in self.model.parameters()),
            sample=f"an image of {width} x {height} pixels",
            preprocessing={k: v if isinstance(v, int | float | str) else list(v) for k, v in settings.items()},
            notes=(*notes, *([found.note] if found.note else [])),
        )


def named(config: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments that a configuration names, where these lead to no other files.

    Raises:
        InputError: where they do.
    """
    architecture, arguments = config["architecture"], config.get("model_args") or {}
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w.]+", architecture):
        raise InputError(
            f"backbone: {folder}: config.json: architecture: expected a name of timm, got {architecture!r}"
        )
    odd = sorted(set(arguments) & ELSEWHERE) if isinstance(arguments, Mapping) else ["model_args"]
    if odd:
        raise InputError(
            f"backbone: {folder}: config.json: {', '.join(odd)}: may lead to weights elsewhere; take it out of model_args"
        )
    return architecture, dict(arguments)


def _tokens(state: Tensor, channels_last: bool) -> Tensor:
    if state.dim() != 4:
        return state
    return state.flatten(1, 2) if channels_last else state.flatten(2).transpose(1, 2)


def _with_prefix(state: Any) -> Tensor:
    """Patches as a map, prefix tokens apart -> all tokens in one line."""
    if isinstance(state, tuple):
        patches, prefix = state
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1)
    return state.flatten(2).transpose(1, 2)


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"backbone: this is a timm model, and timm cannot be imported here ({error}); install timm and a torchvision that "
            f"fits torch, or take the same model from transformers"
        ) from error
    return timm
