"""Reducers behind multi-vector encoders of sentence-transformers, with a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from cenote.bridges.sentence_transformers import PooledVectors
from cenote.core import InputError

pytest.importorskip(
    "sentence_transformers.multi_vector_encoder", reason="needs sentence-transformers 6: cenote[sentence-transformers]"
)

TEXTS = ["a b c d e f g h", "c a f e", "d e a f b e e f a c e"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer

    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    return MultiVectorEncoder(modules=[Transformer(str(folder))], device="cpu")


def test_for_one_call(encoder: Any) -> None:
    whole = encoder.encode_document(TEXTS)
    half = encoder.encode_document(TEXTS, token_pooling=PooledVectors("sequential", factor=2))
    for before, after in zip(whole, half, strict=True):
        # [CLS] stays, the others go in pairs
        assert len(after) == 1 + -(-(len(before) - 1) // 2)
        torch.testing.assert_close(after[0], before[0])
        mean = torch.nn.functional.normalize(before[1:3].mean(0), dim=0)
        torch.testing.assert_close(after[1], mean, atol=1e-6, rtol=1e-5)
    queries = encoder.encode_query(TEXTS, token_pooling=PooledVectors("sequential", factor=2))
    assert [len(q) for q in queries] == [len(q) for q in encoder.encode_query(TEXTS)]


def test_hierarchical_is_theirs(encoder: Any) -> None:
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    whole = [torch.nn.functional.normalize(d, dim=1) for d in encoder.encode_document(TEXTS)]
    ours, theirs = (
        pooling.pool(whole) for pooling in (PooledVectors("hierarchical", factor=3), HierarchicalTokenPooling(3))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        # in the order of their first tokens, in the order of the tree's labels
        nearest = (a @ b.T).amax(1)
        torch.testing.assert_close(nearest, torch.ones(len(a)), atol=1e-5, rtol=0)


def test_as_a_module_that_is_saved_with_the_model(encoder: Any, tmp_path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(
        modules=[encoder[0], PooledVectors("hierarchical-raw", factor=2, protect=0)], device="cpu"
    )
    expected = model.encode_document(TEXTS)
    assert [len(d) for d in expected] == [len(d) // 2 for d in encoder.encode_document(TEXTS)]
    model.save_pretrained(str(tmp_path / "model"))
    loaded = MultiVectorEncoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    for a, b in zip(loaded.encode_document(TEXTS), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert [len(q) for q in loaded.encode_query(TEXTS)] == [len(q) for q in encoder.encode_query(TEXTS)]


def test_padded_documents_and_wrong_input(tmp_path: Path) -> None:
    pooling = PooledVectors("sequential", factor=2, protect=0, tasks=["document", "query"])
    x, mask = torch.rand(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, False]])
    padded, single = pooling.pool(x, attention_mask=mask), pooling.pool([x[0], x[1, :2]], task="query")
    assert isinstance(padded, torch.Tensor)
    torch.testing.assert_close(padded[0], single[0])
    torch.testing.assert_close(padded[1, :1], single[1])
    assert torch.equal(pooling.pool([x[0]], task="other")[0], x[0])
    with pytest.raises(InputError, match="give padded documents with attention_mask"):
        pooling.pool(x)
    with pytest.raises(InputError, match="method: simpool does not reduce documents"):
        PooledVectors("simpool")
    with pytest.raises(InputError, match="factor: expected a number above 1, got 1"):
        PooledVectors(factor=1)
    with pytest.raises(InputError, match="holds no PooledVectors"):
        PooledVectors.load(str(tmp_path))
