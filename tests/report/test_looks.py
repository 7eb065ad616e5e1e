import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import cenote.report
from cenote.core import InputError
from cenote.report.attention import Attention, Item
from cenote.report.looks import (
    BAR_HEIGHT,
    HEAVIEST,
    LEVELS,
    MOST_BARS,
    bars,
    effective_tokens,
    overlay,
    picture,
    samples,
    shares_per_head,
    strength,
)
from tests.report.factory import keep_attention, make_comparison, photograph, write_attention


def pixels(address: str) -> np.ndarray:
    kind, _, text = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA"))


def heights(path: str) -> dict[int, int]:
    return {int(i): BAR_HEIGHT - int(y) for i, y in re.findall(rf"M(\d+)\.5 {BAR_HEIGHT}V(\d+)", path)}


def test_the_overlay_is_strongest_where_the_weight_is() -> None:
    w = np.full(12, 0.01)
    w[7] = 0.89
    image = pixels(overlay(w, (3, 4)))
    assert image.shape == (3, 4, 4)
    assert np.unravel_index(image[..., 3].argmax(), (3, 4)) == (1, 3)
    assert np.sort(image[..., 3].ravel())[-2] < 0.1 * image[..., 3].max()


def test_an_even_weight_is_pale() -> None:
    even = pixels(overlay(np.full(196, 1 / 196), (14, 14)))[..., 3]
    assert even.max() == even.min() < 100
    assert strength(np.full(196, 1 / 196)).max() == pytest.approx(0.25)


def test_patches_that_were_not_kept_are_clear() -> None:
    image = pixels(overlay(np.full(6, 1 / 6), (3, 4)))[..., 3].ravel()
    assert (image[:6] > 0).all()
    assert (image[6:] == 0).all()


def test_a_fine_grid_is_made_coarser_and_keeps_its_place() -> None:
    w = np.zeros((64, 48))
    w[32:, 24:] = 1 / (32 * 24)
    image = pixels(overlay(w.ravel(), (64, 48)))[..., 3]
    assert image.shape == (32, 24)
    assert image[20, 18] > 200
    assert image[:16].max() == 0


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=700),
    st.lists(st.booleans(), max_size=700),
)
def test_bars_keep_the_largest_of_each_kind(values: list[float], marks: list[bool]) -> None:
    shares = shares_per_head(np.array([values]))[0]
    if not shares.any():
        return
    drawn = bars(shares, marks)
    assert drawn.count <= MOST_BARS
    assert drawn.count * drawn.per_bar >= len(values)
    marked = np.zeros(len(values), dtype=bool)
    known = marks[: len(values)]
    marked[: len(known)] = known
    for path, kind in ((drawn.plain, ~marked), (drawn.labelled, marked)):
        expected = np.where(kind, np.round(strength(shares) * BAR_HEIGHT), 0).max()
        assert max(heights(path).values(), default=0) == expected
    assert {int(i) for i in re.findall(r"M(\d+)\.5", drawn.marks)} == {
        i // drawn.per_bar for i in np.flatnonzero(marked)
    }
    assert 0 <= drawn.even <= BAR_HEIGHT


def test_weights_that_are_no_numbers_count_as_nothing() -> None:
    shares = shares_per_head(np.array([[np.nan, 1.0, np.inf, -2.0], [0.0, 0.0, 0.0, 0.0]]))
    assert shares.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_pictures_become_small() -> None:
    large = picture(Item("a", "b", 1, base64.b64decode(photograph(700))))
    assert max(large.width, large.height) == 224
    assert not large.crisp
    assert len(large.address) < 40_000
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    small = picture(Item("a", "b", 1, buffer.getvalue()))
    assert small.crisp
    assert (pixels(small.address)[..., 0] == np.arange(64).reshape(8, 8)).all()


@pytest.mark.parametrize("grid", [(14, 14), None])
def test_samples_carry_all_methods(grid: tuple[int, int] | None, tmp_path: Path) -> None:
    c = make_comparison(5)
    write_attention(tmp_path, c, items=4, grid=grid, labelled=True)
    attention = Attention.load(tmp_path)
    assert attention is not None
    raw = json.loads((tmp_path / "attention.json").read_text())
    tensors = load_file(tmp_path / "attention.safetensors")
    drawn = samples(c, attention, 3)
    assert len(drawn) == 3
    for i, s in enumerate(drawn):
        assert [look.method for look in s.looks] == [r.method for r in c.results]
        assert {look.method for look in s.blind} == {"max"}
        assert sum(s.item.labelled or ()) == sum(raw["token_labels"][i])
        for look in s.drawn:
            assert (look.overlay is None) == (grid is None)
            assert look.heads == len(tensors[f"{look.method}/{i}"])
            assert 1 <= look.spread <= s.item.tokens * 1.0001
            heads = [effective_tokens(h) for h in tensors[f"{look.method}/{i}"].double().numpy()]
            assert look.spreads == pytest.approx((min(heads), max(heads)), rel=1e-4)
            assert look.correct == (look.prediction == s.item.label)
            if look.method == "mean":
                assert look.spread == pytest.approx(s.item.tokens, rel=1e-4)


def test_a_grid_that_does_not_fit_an_item_gives_bars(tmp_path: Path) -> None:
    c = make_comparison(2)
    write_attention(tmp_path, c, items=1, grid=(4, 4), without=())
    raw = json.loads((tmp_path / "attention.json").read_text())
    raw["grid"] = [5, 5]
    keep_attention(tmp_path, raw)
    attention = Attention.load(tmp_path)
    assert attention is not None
    assert all(look.bars for s in samples(c, attention, 1) for look in s.looks)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_right_and_wrong_only_where_there_is_one_answer(task: str, tmp_path: Path) -> None:
    c = make_comparison(2)
    c.dataset["task"] = task
    write_attention(tmp_path, c, items=2)
    attention = Attention.load(tmp_path)
    assert attention is not None
    assert {look.correct for s in samples(c, attention, 2) for look in s.looks} == {None}


def test_no_attention_is_no_error(tmp_path: Path) -> None:
    assert Attention.load(tmp_path) is None


@pytest.mark.parametrize("name", ["attention.json", "attention.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "foreign"])
def test_damaged_attention_names_the_file_and_the_remedy(name: str, damage: str, tmp_path: Path) -> None:
    write_attention(tmp_path, make_comparison(2), items=2)
    path = tmp_path / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": raw[: len(raw) // 2], "foreign": b"[1, 2]"}[damage])
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*delete attention\.json and attention\.safetensors"):
        Attention.load(tmp_path)


@pytest.mark.parametrize("image", ["not base64!", base64.b64encode(b"no picture").decode()])
def test_an_image_that_is_none(image: str, tmp_path: Path) -> None:
    c = make_comparison(2)
    write_attention(tmp_path, c, items=1)
    raw = json.loads((tmp_path / "attention.json").read_text())
    raw["items"][0]["image"] = image
    keep_attention(tmp_path, raw)
    c.save(tmp_path)
    with pytest.raises(InputError, match=r"attention\.json"):
        cenote.report.write(tmp_path)


def test_weights_of_an_unknown_item(tmp_path: Path) -> None:
    write_attention(tmp_path, make_comparison(2), items=1)
    keep_attention(tmp_path, json.loads((tmp_path / "attention.json").read_text()), {"mean/9": torch.ones(1, 3)})
    with pytest.raises(InputError, match="mean/9"):
        Attention.load(tmp_path)


def test_levels_reach_full_colour() -> None:
    w = np.zeros(16)
    w[3] = 1.0
    assert pixels(overlay(w, (4, 4)))[0, 3].tolist()[:3] == [255, 232, 128]
    assert LEVELS <= 256


def words_in(out: Path, number: int) -> tuple[list[list[tuple[str, int]]], str]:
    """Of each method the words and the heights of their bars, and what the page says of the item."""
    page = (out / "report.html").read_text("utf-8")
    sample = page.split(f'id="sample-{number}"')[1].split('id="sample-')[0]
    paragraphs = re.findall(r'<p class="words">(.*?)</p>', sample)
    found = [re.findall(r'<i(?: class="on")? style="--h:(\d+)%">(.*?)</i>', text) for text in paragraphs]
    return [[(word, int(height)) for height, word in text] for text in found], sample


def test_words_of_texts(tmp_path: Path) -> None:
    c = make_comparison(3)
    write_attention(tmp_path, c, items=3, grid=None, images=False)
    c.save(tmp_path)
    raw = json.loads((tmp_path / "attention.json").read_text())
    texts = [[" un", "believ", "able", " <b>"], [f" word{i}" for i in range(400)]]
    weights = {}
    for i, words in enumerate(texts):
        raw["items"][i] |= {"tokens": len(words), "words": words}
        share = torch.full((1, len(words)), 0.08 / len(words))
        share[0, 1] += 0.92
        weights |= {f"{r.method}/{i}": share.clone() for r in c.results}
    raw["items"][2] |= {"tokens": 5, "unread": "the model <is> gone"}
    weights |= {f"{r.method}/2": torch.full((1, 5), 0.2) for r in c.results}
    keep_attention(tmp_path, raw, weights)
    cenote.report.write(tmp_path)
    short, page = words_in(tmp_path, 0)
    assert short == [[("un", 2), ("believ", 94), ("able", 2), ("&lt;b&gt;", 2)]] * 3
    assert "believ</i><i" in page
    assert 'class="bars"' not in page
    long, page = words_in(tmp_path, 1)
    assert [word for word, _ in long[0]][:2] == ["word0", "word1"]
    assert len(long[0]) == HEAVIEST
    assert page.count('class="bars"') == 3
    none, page = words_in(tmp_path, 2)
    assert none == []
    assert "their words are not known: the model &lt;is&gt; gone" in page
    assert page.count('class="bars"') == 3


def test_words_for_other_tokens(tmp_path: Path) -> None:
    write_attention(tmp_path, make_comparison(2), items=1)
    raw = json.loads((tmp_path / "attention.json").read_text())
    raw["items"][0]["words"] = [" one"]
    keep_attention(tmp_path, raw)
    with pytest.raises(InputError, match="1 words for 196 tokens"):
        Attention.load(tmp_path)
