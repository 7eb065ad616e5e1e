"""Where a model's files lie, and what they hash to."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from cenote.core import InputError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_folder(
    name: str, revision: str | None, pickles: bool, remote_code: bool, cached: bool = False
) -> tuple[Path, str | None]:
    """The local folder of a model, and its revision on the hub.

    A folder is taken as it is. Any other name is one on the Hugging Face hub: its safetensors, configuration and vocabulary
    are fetched, or found in the cache (only there where `cached`, or with HF_HUB_OFFLINE=1); Python code and pickles are not,
    unless allowed.

    Raises:
        InputError: where there is neither such a folder nor such a model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise InputError(f"backbone: {folder} is a folder without config.json; expected one of a saved model")
        if revision is not None:
            raise InputError(f"revision: {folder} is a local folder, and has only one; leave revision out")
        return folder.resolve(), None
    if folder.is_file():
        raise InputError(f"backbone: {folder} is a file; name the folder of the saved model")
    if name.startswith((".", "/", "~")):
        raise InputError(f"backbone: there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError("backbone: models of the hub need transformers; pip install 'cenote[models]'") from error
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    wanted += ["*.bin"] if pickles else []
    wanted += ["*.py"] if remote_code else []
    try:
        found = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["onnx/*", "openvino/*", "*/checkpoint-*"],
                local_files_only=cached,
            )
        )
    except Exception as error:  # the hub's client has a dozen exceptions, of three libraries
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"backbone: {name!r} is no local folder, and was not found on the hub or in its cache ({why})"
        ) from error
    return found, found.name


def require_safetensors(folder: Path, pickles: bool) -> list[Path]:
    """The weight files.

    Raises:
        InputError: where there are none, or only pickles and these are not allowed.
    """
    safe = sorted(folder.glob("*.safetensors"))
    for file in safe:
        if not os.access(file, os.R_OK):
            raise InputError(
                f"backbone: {file} may not be read, or is a link that leads nowhere; allow it, or fetch it again"
            )
    if safe:
        return safe
    pickled = sorted(file for pattern in PICKLED for file in folder.glob(pattern))
    if pickled and pickles:
        return pickled
    if pickled:
        raise InputError(
            f"backbone: {folder} has its weights in {pickled[0].name} only, a pickle, which can run code when it is read; "
            f"save them as safetensors, or allow it with --allow-pickle (read with weights_only)"
        )
    raise InputError(
        f"backbone: {folder} holds no .safetensors file; save the model there with save_pretrained, or fetch it again"
    )


def weights_sha256(files: list[Path]) -> str:
    """SHA-256 over the weight files, in the order of their names."""
    return _hashed(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=8)
def _hashed(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def config_sha256(folder: Path) -> str:
    """SHA-256 over the small files that decide how a model computes: configuration, preprocessing, vocabulary."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".model") and file.is_file() and not file.name.endswith(".index.json"):
            digest.update(f"{file.name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def transformer_inside(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the transformer in a saved sentence-transformers model, and its settings; any other folder as it is."""
    if not (folder / "modules.json").is_file():
        return folder, None
    modules = json_of(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if str(module.get("type", "")).endswith(".Transformer"):
            # a bare name only: the part must lie in this folder
            inner = folder / Path(str(module.get("path", ""))).name
            settings = [inner / f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert")]
            found: Any = next((json_of(file) for file in settings if file.is_file()), {})
            return inner, found if isinstance(found, dict) else {}
    raise InputError(
        f"backbone: {folder} is a sentence-transformers model without a Transformer module; it has no tokens to give"
    )


def json_of(path: Path) -> Any:
    """What a JSON file of a model holds.

    Raises:
        InputError: where it is none.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"backbone: {path} is no JSON file ({error})") from error
