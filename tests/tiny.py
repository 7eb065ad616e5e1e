"""Small models with random weights, made from configurations and saved to a folder: every family, no download."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SIZE = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 32}
VISION = {"image_size": SIZE, "patch_size": 8}
DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **VISION}
WAVES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (5, 4, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


def transformers() -> Any:
    """The library, silent; the test is skipped where it is not installed."""
    found = pytest.importorskip("transformers", reason="cenote[models] is not installed")
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


def timm() -> Any:
    """The library; the test is skipped where it is not installed, or lies beside a torchvision made for another torch."""
    try:
        import timm
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported ({error}); install it and a torchvision built for this torch")
    return timm


def timm_models() -> Any:
    """The library for its models alone: where there is no torchvision, which these do not need, something stands for it while
    timm is imported."""
    stand_in = _StandIn()
    sys.meta_path.append(stand_in)
    try:
        return pytest.importorskip("timm", reason="timm is not installed; pip install --no-deps timm is enough")
    finally:
        sys.meta_path.remove(stand_in)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Nothing)]:
            del sys.modules[name]


class _Nothing(ModuleType):
    """A module in which every name is an empty class, and every name in this is a text."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type("Names", (type,), {"__getattr__": lambda _, inner: inner})(name, (), {})


class _StandIn(Loader, MetaPathFinder):
    """Behind all others: found only where torchvision is not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def images(folder: Path) -> None:
    transformers().ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def words(folder: Path) -> None:
    """A tokenizer of letters, with [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip


def words_without_padding(folder: Path) -> None:
    """As causal language models have it: an end of text, no [CLS], nothing to pad with."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<eos>", "<unk>", *map(chr, range(97, 123))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


def waves(masked: bool) -> Callable[[Path], None]:
    return lambda folder: transformers().Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)


def made(folder: Path, model: str, *savers: Callable[[Path], None], **settings: Any) -> Path:
    """Save a model of that class with these settings of its configuration, and what it needs to prepare its input."""
    library = transformers()
    cls = getattr(library, model)
    torch.manual_seed(0)
    cls(cls.config_class(**settings)).save_pretrained(folder)
    for save in savers:
        save(folder)
    return folder


def vit(folder: Path, **settings: Any) -> Path:
    return made(folder, "ViTModel", images, **{**SMALL, **VISION, **settings})


def bert(folder: Path, **settings: Any) -> Path:
    return made(folder, "BertModel", words, **{**TEXT, **settings})


def wav2vec2(folder: Path) -> Path:
    return made(folder, "Wav2Vec2Model", waves(masked=False), **WAVES)
