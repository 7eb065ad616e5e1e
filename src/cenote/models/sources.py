"""Where a model's files lie, and what they hash to."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from cenote.core import InputError
from cenote.core.files import inside, read_json

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


def require_own_files(folder: Path, pickles: bool) -> None:
    """That a model's files name no others outside of its folder, and no pickle that is not allowed.

    Raises:
        InputError: naming the file that does.
    """
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"backbone: {file} is neither a file nor a folder; take it out")
    for index in sorted(folder.glob("*.index.json")):
        content = json_of(index)
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict):
            raise InputError(f"backbone: {index} names no weights; fetch it again")
        for name in sorted({str(name) for name in named.values()}):
            if _own(folder, name, index).suffix != ".safetensors" and not pickles:
                raise InputError(
                    f"backbone: {index.name} names {name}, which may be a pickle, which can run code when it is read; take "
                    f"safetensors, or allow it with --allow-pickle (read with weights_only)"
                )
    if (
        (folder / "adapter_config.json").is_file()
        and not pickles
        and not any(folder.glob("adapter_model*.safetensors"))
    ):
        raise InputError(
            f"backbone: {folder} has an adapter without .safetensors; merge it into the model, or allow a pickle with "
            f"--allow-pickle"
        )
    for file in sorted(folder.glob("*_config.json")):
        content = json_of(file)
        for key, value in content.items() if isinstance(content, dict) else ():
            # what once lay in somebody's cache is named in many configurations, and lies nowhere here
            if key.endswith("_file") and isinstance(value, str) and (folder / value).exists():
                _own(folder, value, file)


def _own(folder: Path, name: str, said: Path) -> Path:
    try:
        return inside(folder, name)
    except ValueError as error:
        raise InputError(f"backbone: {said}: {error}; name files in it only") from None


def weights_sha256(files: list[Path]) -> str:
    """SHA-256 over the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def code_sha256(folder: Path, *parts: object) -> str:
    """SHA-256 over the Python code that lies with a model, and over what parts of it were made by, wherever that lay."""
    files = set(folder.glob("*.py"))
    for part in parts:
        for cls in type(part).__mro__:
            file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            if cls.__module__.startswith("transformers_modules.") and file:
                files.update(Path(file).parent.glob("*.py"))
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


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
        if isinstance(module, dict) and str(module.get("type", "")).endswith(".Transformer"):
            inner = _own(folder, str(module.get("path", "")), folder / "modules.json")
            if not inner.is_dir():
                raise InputError(
                    f"backbone: {folder / 'modules.json'} names {inner}, which is no folder; fetch it again"
                )
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
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"backbone: {path} is no JSON file ({error})") from error
