from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.pools import shaken
from torch import Tensor

from cenote.core import InputError
from cenote.pool import (
    Caption,
    MultimodalTransformer,
    RecurrentTranslator,
    Subwords,
    TranslationBatch,
    Translator,
    TranslatorConfig,
    back_translated,
    bleu,
    choose_in_domain,
    imagination_loss,
    meteor_like,
    read_image_text,
    read_parallel,
    sense_accuracy,
    train_translator,
    translate,
    translate_lines,
    translation_loss,
)
from cenote.pool.sequence.cuni_multimodal.decoding import length_penalty
from cenote.pool.sequence.cuni_multimodal.training import batches_of, shifted, total_loss
from cenote.pool.sequence.cuni_multimodal.translator import RULES, Rule
from cenote.pool.sequence.subwords import END, PAD, START

WORDS, CHANNELS = 9, 5
SOURCE = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0], [8, 4, 2, 0]])
TARGET = torch.tensor([[5, 6, 2, 0], [7, 8, 4, 2], [8, 2, 0, 0]])
MODELS = [MultimodalTransformer, RecurrentTranslator]


def config(rule: Rule = "serial", **others: object) -> TranslatorConfig:
    sizes = {"dim": 8, "layers": 2, "hidden": 12, "heads": 2, "image_channels": CHANNELS} | others
    return TranslatorConfig(WORDS, rule, **sizes)


def pictures(rule: Rule, batch: int = 3) -> Tensor | None:
    patches = torch.randn(batch, 6, CHANNELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return None if rule == "text only" else patches


def steps(model: Translator, words: Tensor, image: Tensor | None, beam: int = 1) -> Tensor:
    kept, found = model.start(model.encode(SOURCE, image), beam), []
    for word in words.repeat_interleave(beam, 0).unbind(1):
        logits, kept = model.step(word, kept)
        found.append(logits)
    return torch.stack(found, 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", MODELS)
def test_word_by_word_is_as_all_words_at_once(build: type[Translator], rule: Rule) -> None:
    model, image = shaken(build(config(rule))), pictures(rule)
    words = shifted(TARGET)
    once = model(SOURCE, words, image)
    torch.testing.assert_close(steps(model, words, image), once)
    torch.testing.assert_close(steps(model, words, image, beam=2)[::2], once)


@pytest.mark.parametrize("build", MODELS)
def test_no_word_sees_what_comes_later_and_padding_is_not_read(build: type[Translator]) -> None:
    model, image = shaken(build(config())), pictures("serial")
    words = shifted(TARGET)
    whole = model(SOURCE, words, image)
    later = words.clone()
    later[:, 2:] = 5
    torch.testing.assert_close(model(SOURCE, later, image)[:, :2], whole[:, :2])
    alone = model(SOURCE[1:2, :2], words[1:2], image[1:2])
    torch.testing.assert_close(alone, whole[1:2])


def test_the_transformer_written_out() -> None:
    model, image = shaken(MultimodalTransformer(config("flat", layers=1))), pictures("flat")
    encoded = model.encode(SOURCE, image)
    layer = model.encoder[0]
    mask = SOURCE != PAD
    angles = torch.arange(4).unsqueeze(1) * 10_000.0 ** -(torch.arange(4) / 3)
    x = model.embedding(SOURCE) * 8**0.5 + torch.cat([angles.sin(), angles.cos()], 1).double()
    n = layer.attended.norm(x)
    maps = (layer.attention.to_q, layer.attention.to_k, layer.attention.to_v)
    q, k, v = (m(n).unflatten(-1, (2, 4)).transpose(1, 2) for m in maps)
    found = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)
    x = x + layer.attention.to_out(found)
    w1, _, _, w2 = layer.forward_layer
    x = x + w2(torch.relu(w1(layer.fed.norm(x))))
    torch.testing.assert_close(model.encoder_norm(x)[mask], encoded.states[mask], rtol=1e-6, atol=1e-6)
    decoded = model.decode(shifted(TARGET), encoded)
    assert decoded.logits.shape == (3, 4, WORDS)
    total = decoded.text_weights.sum(-1) + decoded.image_weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_defaults_are_those_of_the_submission_and_output_is_tied() -> None:
    sizes = TranslatorConfig(100)
    assert (sizes.rule, sizes.dim, sizes.layers, sizes.hidden, sizes.heads, sizes.dropout) == (
        "serial",
        512,
        6,
        4096,
        16,
        0.1,
    )
    model = MultimodalTransformer(config())
    names = [name for name, p in model.named_parameters() if WORDS in p.shape]
    assert names == ["embedding.weight"]


def greedy(model: Translator, image: Tensor | None, longest: int) -> list[tuple[int, ...]]:
    found = []
    for i in range(len(SOURCE)):
        words = [START]
        own = None if image is None else image[i : i + 1]
        while words[-1] != END and len(words) <= longest:
            logits = model(SOURCE[i : i + 1], torch.tensor([words]), own)[0, -1]
            logits[[PAD, START]] = -torch.inf
            words.append(int(logits.argmax()))
        found.append(tuple(words[1:]))
    return found


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_beam_of_one_is_greedy(build: type[Translator], seed: int) -> None:
    model, image = shaken(build(config()), seed), pictures("serial")
    found = translate(model, SOURCE, image, beam=1, longest=6)
    assert [t.words for t in found] == greedy(model, image, 6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sentences(alpha: float) -> None:
    model, longest = shaken(MultimodalTransformer(config("text only", layers=1)), 4), 3
    inner = [n for n in range(WORDS) if n not in (PAD, START, END)]
    sentences = [(*s, END) for n in range(longest) for s in itertools.product(inner, repeat=n)]
    sentences += list(itertools.product(inner, repeat=longest))

    def score(i: int, words: tuple[int, ...]) -> float:
        logits = model(SOURCE[i : i + 1], torch.tensor([[START, *words[:-1]]]))[0]
        logits[:, [PAD, START]] = -torch.inf
        likely = logits.log_softmax(-1).gather(1, torch.tensor(words).unsqueeze(1)).sum()
        return float(likely) / length_penalty(len(words), alpha)

    for i, found in enumerate(translate(model, SOURCE, beam=400, alpha=alpha, longest=longest)):
        best = max(sentences, key=lambda s, i=i: score(i, s))
        assert found.words == best
        assert found.score == pytest.approx(score(i, best))


def test_batch_mates_do_not_matter_and_weights_belong_to_the_words() -> None:
    model, image = shaken(MultimodalTransformer(config("hierarchical"))).train(), pictures("hierarchical")
    together = translate(model, SOURCE, image, beam=3, longest=7)
    assert model.training
    for i, found in enumerate(together):
        length = int((SOURCE[i] != PAD).sum())
        (alone,) = translate(model, SOURCE[i : i + 1, :length], image[i : i + 1], beam=3, longest=7)
        assert found.words == alone.words
        assert found.score == pytest.approx(alone.score)
        assert found.image_weights.shape == (2, 2, len(found.words), 6)
        torch.testing.assert_close(found.image_weights, alone.image_weights)


def test_pictures_are_asked_for_where_they_are_read() -> None:
    blind = MultimodalTransformer(config("text only"))
    with pytest.raises(InputError, match="image: a translator with rule 'serial' takes a picture"):
        translate(MultimodalTransformer(config()), SOURCE)
    with pytest.raises(InputError, match="takes no picture"):
        blind.encode(SOURCE, torch.randn(3, 6, CHANNELS))
    with pytest.raises(InputError, match="image: expected 3 pictures"):
        MultimodalTransformer(config()).encode(SOURCE, torch.randn(2, 6, CHANNELS))
    with pytest.raises(InputError, match="rule: expected"):
        TranslatorConfig(WORDS, "sideways")
    with pytest.raises(InputError, match="imagination: this translator has none"):
        blind.imagined(blind.encode(SOURCE))


def test_smoothed_labels_by_hand() -> None:
    logits = torch.randn(1, 2, 4, dtype=torch.float64)
    log = logits.log_softmax(-1)
    expected = -(0.9 * log[0, 0, 3] + 0.1 * log[0, 0].mean())
    torch.testing.assert_close(translation_loss(logits, torch.tensor([[3, PAD]])), expected)


def test_the_total_is_weighted_and_imagination_needs_no_translation() -> None:
    model = shaken(MultimodalTransformer(config("text only", imagination=5)))
    vector = torch.randn(3, 5, dtype=torch.float64)
    both = TranslationBatch(SOURCE, TARGET, None, vector)
    encoded = model.encode(SOURCE)
    imagined = imagination_loss(model.imagined(encoded), vector)
    translated = translation_loss(model.decode(shifted(TARGET), encoded).logits, TARGET)
    torch.testing.assert_close(total_loss(model, both, weight=0.7), 0.7 * translated + 0.3 * imagined)
    torch.testing.assert_close(total_loss(model, both._replace(target=None)), imagined)
    torch.testing.assert_close(total_loss(model, both._replace(vector=None)), translated)
    assert len(translate(model, SOURCE, beam=2, longest=3)) == 3
    seeing = shaken(MultimodalTransformer(config(imagination=5)))
    assert total_loss(seeing, both._replace(target=None)).isfinite()
    with pytest.raises(InputError, match="batch: has neither"):
        total_loss(model, TranslationBatch(SOURCE))
    with pytest.raises(InputError, match="vector: this translator has no imagination"):
        total_loss(MultimodalTransformer(config("text only")), both)


@pytest.mark.parametrize("in_turn", [False, True])
def test_training_learns_both_tasks_and_averages_its_last_states(in_turn: bool) -> None:
    torch.manual_seed(0)
    model = MultimodalTransformer(config("text only", imagination=5, layers=1, dropout=0.0))
    items = TranslationBatch(SOURCE, TARGET, None, torch.randn(3, 5))
    before = float(total_loss(model, items))
    history = train_translator(
        model, lambda: batches_of(items, 2), passes=12, lr=1e-2, warm_up=4, in_turn=in_turn, weight=0.6, average=3
    )
    assert len(history.losses) == 12
    assert not model.training
    assert float(total_loss(model, items)) < 0.7 * before


def test_the_mean_of_the_last_states_is_what_the_model_has() -> None:
    states = []

    def watched(model: Translator) -> list[TranslationBatch]:
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return [TranslationBatch(SOURCE, TARGET)]

    weights = []
    for average in (1, 2):
        torch.manual_seed(0)
        model = MultimodalTransformer(config("text only", layers=1, dropout=0.0))
        states.clear()
        train_translator(model, lambda m=model: watched(m), passes=3, lr=1e-2, warm_up=2, average=average)
        weights.append(model.embedding.weight.detach().clone())
    torch.testing.assert_close(weights[1], (states[2]["embedding.weight"] + weights[0]) / 2)
    with pytest.raises(InputError, match="average: the mean of the last"):
        train_translator(model, list, passes=2, average=2, score=lambda: 0.0)


def test_subwords_merge_the_most_frequent_pairs() -> None:
    subwords = Subwords.learn(["ab ab ab", "abc bc"], 2)
    assert list(subwords.merges) == [("a", "b▁"), ("b", "c▁")]
    assert subwords.split("ab abc") == ["ab▁", "a", "bc▁"]
    numbers = subwords.encode("ab x")
    assert numbers[-1] == END
    assert subwords.text([START, *numbers, 4]) == "ab <unk>"
    assert subwords.batch(["ab", "abc"]).tolist()[0][-1] == PAD
    with pytest.raises(InputError, match="lines: have no word"):
        Subwords.learn(["  "], 1)
    with pytest.raises(InputError, match="lines: expected at least one word"):
        translate_lines(MultimodalTransformer(config("text only")), subwords, [""])


def test_bleu_is_counted_as_sacrebleu_does() -> None:
    # what sacrebleu 2.6.0 gives
    assert bleu(["The cat sat on a mat."], ["The cat sat on the mat."]) == pytest.approx(48.892302243490086)
    two = bleu(["the cat", "two dogs run, fast!"], ["the dog", "two dogs run very fast!"])
    assert two == pytest.approx(35.355339059327385)
    assert bleu(["a man in 1.5-ton truck"], ["a man in his 1.5-ton truck."]) == pytest.approx(44.68310718440574)
    assert bleu(["a b"], ["a c"]) == 0.0
    assert bleu(["no"], ["yes"]) == 0.0
    with pytest.raises(InputError, match="translations: expected one for each of 1"):
        bleu([], ["yes"])


def test_meteor_by_hand() -> None:
    # 3 of 4 words match in 2 chunks: P = R = 3/4, F = 3/4, penalty 0.5 (2/3)^3
    assert meteor_like(["a big dog sits"], ["a dog sits down"]) == pytest.approx(100 * 0.75 * (1 - 0.5 * (2 / 3) ** 3))
    assert meteor_like(["x"], ["y"]) == 0.0
    assert meteor_like(["dogs"], ["dog"], stem=lambda w: w.rstrip("s")) == pytest.approx(50.0)


def test_senses_are_counted() -> None:
    said = ["der Schläger fällt", "die Fledermaus fällt", "Schläger und Fledermaus", "nichts"]
    assert sense_accuracy(said, ["Schläger"] * 4, ["Schläger", "Fledermaus"]) == 0.25


def test_corpora_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("a dog\na cat\n", "utf-8")
    (tmp_path / "a.de").write_text("ein Hund\neine Katze\n", "utf-8")
    (tmp_path / "images").write_text("1.jpg#0\n2.jpg\n", "utf-8")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    found = read_parallel(tmp_path / "a.en", tmp_path / "a.de", tmp_path / "images")
    assert found[0] == Caption("a dog", "ein Hund", tmp_path / "1.jpg")
    assert read_parallel(tmp_path / "a.en", tmp_path / "a.de")[1].image is None
    (tmp_path / "captions").write_text("2.jpg#3\ta cat sits\n", "utf-8")
    assert read_image_text(tmp_path / "captions") == [Caption("a cat sits", None, tmp_path / "2.jpg")]
    (tmp_path / "captions").write_text("9.jpg\ta cat sits\n", "utf-8")
    with pytest.raises(InputError, match=r"there is no file .*9\.jpg, which line 1 names"):
        read_image_text(tmp_path / "captions")
    (tmp_path / "captions").write_text("a cat sits\n", "utf-8")
    with pytest.raises(InputError, match="a name, a tab and a caption"):
        read_image_text(tmp_path / "captions")
    (tmp_path / "a.de").write_text("ein Hund\n", "utf-8")
    with pytest.raises(InputError, match="target: expected 2 lines"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")
    with pytest.raises(InputError, match="source: there is no file"):
        read_parallel(tmp_path / "b.en", tmp_path / "a.de")


def test_text_of_the_domain_comes_first_and_captions_are_translated_back() -> None:
    candidates = [Caption("the treaty is signed"), Caption("a dog runs"), Caption("the law of the land")]
    chosen = choose_in_domain(candidates, ["a dog sits", "a man runs"], 2)
    assert chosen[0].source == "a dog runs"
    assert len(chosen) == 2
    with pytest.raises(InputError, match="k: expected 0 to 3"):
        choose_in_domain(candidates, ["a"], 4)
    back = back_translated(
        [Caption("x", "ein Hund"), Caption("eine Katze")], lambda lines: [line.upper() for line in lines]
    )
    assert back == [Caption("EIN HUND", "ein Hund"), Caption("EINE KATZE", "eine Katze")]
