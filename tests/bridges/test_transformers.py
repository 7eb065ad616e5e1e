from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cenote.bridges.transformers import PooledModel
from cenote.core import InputError
from cenote.core.files import sealed
from cenote.pool import MaxPool, SimPool

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'cenote[models]'")


def backbone() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()}


def test_pools_the_last_hidden_states() -> None:
    body, batch = backbone(), inputs()
    hidden = body(**batch).last_hidden_state
    out = PooledModel(body, "mean")(**batch)
    for i, n in enumerate((7, 4, 1)):
        torch.testing.assert_close(out.embedding[i], hidden[i, :n].mean(0))
        torch.testing.assert_close(out.weights[i, 0], (torch.arange(7) < n) / n)
    assert out.to_tuple()[0] is out.embedding
    assert isinstance(out, transformers.utils.ModelOutput)
    own = MaxPool(16)
    torch.testing.assert_close(PooledModel(body, own)(**batch).embedding, own(hidden, batch["attention_mask"].bool()))


def test_prefix_tokens_are_kept_from_pools_of_patches() -> None:
    body, batch = backbone(), inputs()
    hidden = body(**batch).last_hidden_state
    out = PooledModel(body, "mean", prefix_tokens=1)(**batch)
    torch.testing.assert_close(out.embedding[1], hidden[1, 1:4].mean(0))
    torch.testing.assert_close(PooledModel(body, "cls", prefix_tokens=1)(**batch).embedding, hidden[:, 0])


def test_layer_pools_read_all_layers() -> None:
    body, batch = backbone(), inputs()
    states = body(**batch, output_hidden_states=True).hidden_states
    out = PooledModel(body, "max-cls", last=2)(**batch)
    torch.testing.assert_close(out.embedding, torch.maximum(states[-1][:, 0], states[-2][:, 0]))
    assert PooledModel(body, "weighted-layer-sum")(**batch).weights.shape == (3, 1, 3, 7)


@pytest.mark.parametrize("name", ["mean", "simpool", "weighted-layer-sum", "pma"])
def test_saves_and_loads(name: str, tmp_path: Path) -> None:
    model, batch = PooledModel(backbone(), name, outputs=2).eval(), inputs()
    model.save_pretrained(tmp_path)
    again = PooledModel.from_pretrained(tmp_path)
    first, second = model(**batch), again(**batch)
    torch.testing.assert_close(second.embedding, first.embedding)
    torch.testing.assert_close(second.logits, first.logits)
    assert not list(tmp_path.rglob("*.bin"))


def of_format_1(folder: Path) -> None:
    """The card of a folder, as if an earlier version had written it."""
    card = json.loads((folder / "pooled.json").read_text("utf-8"))
    (folder / "pooled.json").write_text(json.dumps(sealed({**card, "format": 1})), "utf-8")


@pytest.mark.parametrize(
    ("name", "saved", "shown"),
    [
        # that version showed pools of layers the prefix, did not say how long it is, and was right otherwise
        ("weighted-layer-sum", 2, 0),
        ("cls-mean", 2, 1),
        ("mean", 2, 2),
    ],
)
def test_format_1_gives_what_it_gave(name: str, saved: int, shown: int, tmp_path: Path) -> None:
    body, batch = backbone(), inputs()
    PooledModel(body, name, saved).save_pretrained(tmp_path)
    of_format_1(tmp_path)
    then = PooledModel(body, name, shown).eval()(**batch).embedding
    again = PooledModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).embedding, then)
    # and goes on doing so
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PooledModel.from_pretrained(tmp_path / "again")(**batch).embedding, then)


def test_what_cannot_be_had_again_of_format_1_is_told(tmp_path: Path) -> None:
    PooledModel(backbone(), "drasp").save_pretrained(tmp_path)
    PooledModel.from_pretrained(tmp_path)
    of_format_1(tmp_path)
    with pytest.warns(UserWarning, match="drasp counted masked slots"):
        PooledModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prefix_tokens": None}, "prefix_tokens: expected int, got None"),
        ({"prefix_tokens": "1"}, "prefix_tokens: expected int, got '1'"),
        ({"outputs": True}, "outputs: expected int or null, got True"),
        ({"settings": []}, r"settings: expected dict, got \[\]"),
        ({"settings": {"bones": 2}}, "simpool: got an unexpected keyword argument 'bones'; it takes dim, heads, gamma"),
        ({"settings": {"backbone": 2}}, "cannot be built again"),
        ({"method": "simplepool"}, "no method is called 'simplepool'; did you mean simpool"),
        ({"format": 3}, "was saved in format 3; this cenote reads 1 and 2"),
        ({"outputs": 2}, "does not fit pooled.json"),
    ],
)
def test_a_damaged_card_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    PooledModel(backbone(), "simpool").save_pretrained(tmp_path)
    card = json.loads((tmp_path / "pooled.json").read_text("utf-8"))
    (tmp_path / "pooled.json").write_text(json.dumps(sealed({**card, **change})), "utf-8")
    with pytest.raises(InputError, match=told) as caught:
        PooledModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::cenote.core.files.UncheckedWarning")
@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{", "[" * 100_000])
def test_a_card_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    PooledModel(backbone(), "mean").save_pretrained(tmp_path)
    (tmp_path / "pooled.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"pooled\.json: is damaged"):
        PooledModel.from_pretrained(tmp_path)


def test_trains_with_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (64, 6), generator=g)
    labels = torch.arange(64) % 2
    ids[labels == 1, 3] = 1
    data = [
        {"input_ids": i, "attention_mask": torch.ones(6, dtype=torch.long), "labels": y}
        for i, y in zip(ids, labels, strict=True)
    ]
    model = PooledModel(backbone(), "simpool", outputs=2)
    before = {k: v.clone() for k, v in model.pool.state_dict().items()}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=16, num_train_epochs=8, learning_rate=1e-2, report_to=[],
        save_strategy="epoch", save_total_limit=1, use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start / 2
    assert any(not torch.equal(v, before[k]) for k, v in model.pool.state_dict().items())
    assert list(tmp_path.glob("checkpoint-*/model.safetensors"))


def test_losses() -> None:
    batch = inputs()
    model = PooledModel(backbone(), "mean", outputs=1)
    y = torch.tensor([0.5, 1.0, 2.0])
    out = model(**batch, labels=y)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - y).square().mean())
    with pytest.raises(InputError, match="outputs"):
        PooledModel(backbone(), "mean")(**batch, labels=y)


def test_wrong_input_is_named(tmp_path: Path) -> None:
    body = backbone()
    with pytest.raises(InputError, match="no method is called"):
        PooledModel(body, "meen")
    with pytest.raises(InputError, match="pools maps"):
        PooledModel(body, "softpool")
    with pytest.raises(InputError, match="width 8"):
        PooledModel(body, SimPool(8))
    with pytest.raises(InputError, match="settings"):
        PooledModel(body, SimPool(16), heads=2)
    with pytest.raises(InputError, match="prefix_tokens"):
        PooledModel(body, prefix_tokens=-1)
    with pytest.raises(InputError, match="name it"):
        PooledModel(body, SimPool(16)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no model"):
        PooledModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="config"):
        PooledModel(torch.nn.Linear(2, 2))
