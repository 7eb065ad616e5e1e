"""CenotePooling in a real pipeline, with the weights of all-MiniLM-L6-v2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from cenote.bridges.sentence_transformers import CenotePooling, replace_pooling
from cenote.core import Bags, InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
st = pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: pip install 'cenote[sentence-transformers]'"
)

real = pytest.mark.real("a sentence encoder of 23 million parameters")
TEXTS = ["A cenote is a natural pool.", "It forms where limestone collapses and shows the groundwater below.", "Deep."]


@pytest.fixture(scope="module")
def minilm(model_folder: Callable[[str], Path]) -> Any:
    return st.SentenceTransformer(str(model_folder("minilm-l6-v2")), device="cpu")


def with_pool(minilm: Any, name: str, **settings: Any) -> Any:
    return st.SentenceTransformer(modules=[minilm[0], CenotePooling(name, **settings)], device="cpu")


@real
def test_mean_reproduces_the_original(minilm: Any) -> None:
    torch.testing.assert_close(
        replace_pooling(minilm, "mean").encode(TEXTS, convert_to_tensor=True),
        minilm.encode(TEXTS, convert_to_tensor=True),
        atol=1e-6,
        rtol=0,
    )


def test_what_a_model_was_told_stays(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tiny.made(
        tmp_path, "BertModel", tiny.words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    old = st.SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(32, pooling_mode="mean", include_prompt=False)],
        device="cpu",
        prompts={"query": "a b c "},
        default_prompt_name="query",
        truncate_dim=8,
        similarity_fn_name="dot",
    )
    new = replace_pooling(old, "mean-all")
    assert new[1].include_prompt is False
    assert new.truncate_dim == 8
    assert new.similarity_fn_name == "dot"
    assert new.default_prompt_name == "query"
    torch.testing.assert_close(
        new.encode(["d e"], convert_to_tensor=True), old.encode(["d e"], convert_to_tensor=True), atol=1e-6, rtol=0
    )
    assert replace_pooling(old, "mean", include_prompt=True)[1].include_prompt is True


@real
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("cls", "cls"), ("max", "max"), ("last", "lasttoken"), ("position-weighted-mean", "weightedmean")],
)
def test_the_usual_poolings_are_theirs(minilm: Any, ours: str, theirs: str) -> None:
    from sentence_transformers.models import Pooling

    reference = st.SentenceTransformer(modules=[minilm[0], Pooling(384, pooling_mode=theirs)], device="cpu")
    torch.testing.assert_close(
        with_pool(minilm, ours).encode(TEXTS, convert_to_tensor=True),
        reference.encode(TEXTS, convert_to_tensor=True),
        atol=1e-5,
        rtol=0,
    )


@real
@pytest.mark.parametrize(
    ("name", "settings"), [("simpool", {}), ("statistics", {}), ("weighted-layer-sum", {}), ("pma", {"seeds": 2})]
)
def test_saves_and_loads(minilm: Any, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = with_pool(minilm, name, **settings)
    before = model.encode(TEXTS, convert_to_tensor=True)
    assert before.shape == (3, model.get_embedding_dimension())
    model.save(str(tmp_path))
    again = st.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), before)
    assert isinstance(again[1], CenotePooling)
    assert not list(tmp_path.rglob("*.bin"))


@real
def test_trains_with_its_trainer(minilm: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="sentence-transformers' Trainer needs datasets")
    pytest.importorskip("accelerate", reason="sentence-transformers' Trainer needs accelerate")
    model = with_pool(minilm, "simpool")
    model[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    pairs = datasets.Dataset.from_dict(
        {"anchor": ["cold water", "hot fire", "tall tree"], "positive": ["a chilly lake", "burning wood", "a high oak"]}
    )
    settings = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=3, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model=model, args=settings, train_dataset=pairs, loss=loss).train()
    moved = [k for k, v in model[1].state_dict().items() if not torch.equal(v, before[k])]
    assert moved


@real
def test_attention_of_a_sentence(minilm: Any) -> None:
    model = with_pool(minilm, "simpool")
    features = model[0](model.tokenize(TEXTS))
    weights = model[1].attend(features).weights
    mask = features["attention_mask"].bool()
    assert weights.shape == (3, 1, mask.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1))
    assert weights[:, 0][~mask].eq(0).all()


def test_prompt_can_be_left_out() -> None:
    x, mask = torch.randn(2, 6, 4), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    features = {"token_embeddings": x, "attention_mask": mask, "prompt_length": 2}
    y = CenotePooling("mean", dim=4, include_prompt=False)(features)["sentence_embedding"]
    torch.testing.assert_close(y, torch.stack([x[0, 2:].mean(0), x[1, 4:].mean(0)]))


def test_a_prompt_left_out_keeps_the_prefix() -> None:
    x, mask = torch.randn(2, 6, 4), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    padded = {"token_embeddings": x, "attention_mask": mask, "prompt_length": 3}
    flat = {
        "token_embeddings": x[mask.bool()].unsqueeze(0),
        "cu_seq_lens_q": torch.tensor([0, 6, 10], dtype=torch.int32),
        "prompt_length": 3,
    }
    for features in (padded, flat):
        cls = CenotePooling("cls", 4, include_prompt=False, prefix_tokens=1)(dict(features))["sentence_embedding"]
        torch.testing.assert_close(cls, torch.stack([x[0, 0], x[1, 2]]))
        mean = CenotePooling("mean", 4, include_prompt=False, prefix_tokens=1)(dict(features))["sentence_embedding"]
        torch.testing.assert_close(mean, torch.stack([x[0, 3:].mean(0), x[1, 5]]))


def test_unpadded_input() -> None:
    x = torch.randn(1, 7, 4)
    features = {"token_embeddings": x, "cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}
    y = CenotePooling("max", dim=4)(dict(features))["sentence_embedding"]
    torch.testing.assert_close(y, Bags(x[0], torch.tensor([0, 3, 7])).max())
    with pytest.raises(InputError, match="reads all layers"):
        CenotePooling("max-cls", dim=4)(dict(features))


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give dim="):
        CenotePooling("mean").get_embedding_dimension()
    with pytest.raises(InputError, match="no method is called"):
        CenotePooling("meen", dim=4)
    with pytest.raises(InputError, match="must be told tokens"):
        CenotePooling("abmilp-positions", dim=4)
    with pytest.raises(InputError, match="holds no whole CenotePooling"):
        CenotePooling.load(str(tmp_path))
    with pytest.raises(InputError, match="found 0"):
        replace_pooling([torch.nn.Identity()], "mean")
