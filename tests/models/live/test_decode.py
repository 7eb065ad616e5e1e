"""Branches: one forward of all rows is each branch by itself, and one token is drawn for all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.live import zoo
from tests.models.live.test_decoding import ATTENTIONS, Towards, padded
from tests.models.live.test_models import fingerprint
from torch import Tensor

from cenote.core import InputError
from cenote.models.live import (
    AblatedHeads,
    AddedStates,
    AttentionCall,
    AttentionEdit,
    BlockEdit,
    Branch,
    Branches,
    HeadRecorder,
    RowRecorder,
    Where,
    decode,
    edited,
    plausible,
    stacks,
)

DECODERS = ["llama", "qwen2", "gpt2", "gemma3", "mistral"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 0}


def model_of(name: str, attention: str = "sdpa") -> Any:
    return zoo.MODELS[name](attention).model


def first(logits: Tensor, step: int) -> Tensor:
    return logits[0]


def words(batch: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(5, 38, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def several() -> list[Branch]:
    """Three prompts of other lengths of four items, one of them itself padded."""
    ragged, _ = padded()
    return [
        Branch({"input_ids": words(4, 6, 2)}, 1.5),
        Branch(ragged, -1.0),
        Branch({"input_ids": words(4, 3, 4), "attention_mask": torch.ones(4, 3, dtype=torch.long)}, 0.5),
    ]


class Kept:
    """Adds the branches up, and keeps what each gave."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        self.weights, self.logits, self.steps = weights, [], []

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        self.logits.append(logits.clone())
        self.steps.append(step)
        return torch.einsum("b,bnv->nv", torch.tensor(self.weights), logits)


def alone(model: Any, inputs: Mapping[str, Any], drawn: Tensor, **more: Any) -> list[Tensor]:
    """A branch's logits by itself, step by step, where these tokens are drawn."""

    class Forced:
        def __init__(self) -> None:
            self.step = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = torch.full_like(scores, float("-inf"))
            scores[torch.arange(len(scores)), drawn[:, self.step]] = 0.0
            self.step += 1
            return scores

    options = {**GREEDY, "max_new_tokens": drawn.shape[1], **more}
    out = model.generate(
        **inputs, **options, logits_processor=[Forced()], output_logits=True, return_dict_in_generate=True
    )
    return list(out.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED, {**GREEDY, "use_cache": False}])
def test_one_branch_is_generate(name: str, attention: str, options: dict[str, Any]) -> None:
    model = model_of(name, attention)
    options = {**options, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    for inputs in ({"input_ids": words(2, 6, 1)}, padded()[0]):
        torch.manual_seed(3)
        plain = model.generate(**inputs, **options)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        ours = Branches([Branch(inputs)]).generate(model, **options)
        assert torch.equal(torch.get_rng_state(), after)
        assert type(ours) is type(plain)
        assert torch.equal(ours.sequences, plain.sequences)
        assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
        assert torch.equal(torch.stack(ours.scores), torch.stack(plain.scores))


@pytest.mark.parametrize("end", [None, 0])
def test_padding_without_a_mask_is_what_generate_takes_for_it(end: int | None) -> None:
    model, ragged = model_of("llama"), padded()[0]["input_ids"]
    options = {**GREEDY, "eos_token_id": end}
    plain = model.generate(ragged, **options)
    two = [Branch({"input_ids": ragged}), Branch({"input_ids": words(4, 11, 2)})]
    assert torch.equal(Branches(two, first).generate(model, **options), plain)


@pytest.mark.parametrize("combine", ["sum", "mixture", "lowest", first])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_equal_branches_are_one(options: dict[str, Any], combine: Any) -> None:
    model = model_of("llama")
    inputs, _ = padded()
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)
    for parts in (1, 2, 3):
        for of in ("logits", "log-probabilities"):
            torch.manual_seed(3)
            equal = Branches([Branch(inputs, 1 / parts)] * parts, combine, of)
            assert torch.equal(equal.generate(model, **options), plain)


def test_how_branches_become_one() -> None:
    model, branches = model_of("llama"), several()
    weighted = [Branch(branch.inputs, weight) for branch, weight in zip(branches, (2.0, 1.0, 0.5), strict=True)]

    def last(**more: Any) -> tuple[Tensor, Tensor]:
        step = list(Branches(weighted, **more).steps(model, **GREEDY))[-1]
        return step.logits, step.combined

    logits, combined = last()
    assert torch.allclose(combined, 2 * logits[0] + logits[1] + 0.5 * logits[2], atol=1e-6)
    logits, combined = last(of="log-probabilities")
    p = logits.softmax(-1)
    assert torch.allclose(combined, (p[0] ** 2 * p[1] * p[2] ** 0.5).log(), atol=1e-5)
    logits, combined = last(combine="mixture")
    p = logits.softmax(-1)
    assert torch.allclose(combined.exp(), (2 * p[0] + p[1] + 0.5 * p[2]) / 3.5, atol=1e-6)
    logits, combined = last(combine="lowest")
    assert torch.allclose(combined.exp(), logits.softmax(-1).amin(0), atol=1e-6)
    given: list[Tensor] = []

    def kept(x: Tensor, step: int) -> Tensor:
        given.append(x)
        return x[0]

    logits, _ = last(combine=kept, of="log-probabilities")
    assert torch.equal(given[-1], logits.log_softmax(-1))


def test_a_contrast_among_plausible_tokens() -> None:
    model, branches = model_of("llama"), several()
    steps = Branches(branches, lambda logits, _: plausible(logits[0] - logits[1], logits[0], 0.9)).steps(
        model, **GREEDY
    )
    for step in steps:
        p = step.logits[0].softmax(-1)
        kept = p >= 0.9 * p.amax(-1, keepdim=True)
        assert torch.equal(step.combined.isfinite(), kept)
        assert kept.gather(1, step.tokens[:, None]).all()
    with pytest.raises(InputError, match="alpha: 2"):
        plausible(torch.zeros(1, 3), torch.zeros(1, 3), 2)


@pytest.mark.parametrize(("name", "attention"), zoo.one_by_one(ATTENTIONS))
def test_each_branch_is_as_alone(name: str, attention: str) -> None:
    model, branches = model_of(name, attention), several()
    kept = Kept((1.5, -1.0, 0.5))
    out = Branches(branches, kept).generate(model, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert kept.steps == list(range(5))
    # what is given back is of the first branch, at its own length
    assert torch.equal(out.sequences[:, :6], branches[0].inputs["input_ids"])
    drawn = out.sequences[:, 6:]
    for step, (logits, given) in enumerate(zip(kept.logits, out.logits, strict=True)):
        summed = 1.5 * logits[0] - logits[1] + 0.5 * logits[2]
        assert torch.allclose(given, summed, atol=1e-6)
        assert torch.equal(drawn[:, step], given.argmax(-1))
    for number, branch in enumerate(branches):
        for step, expected in enumerate(alone(model, branch.inputs, drawn)):
            assert torch.allclose(kept.logits[step][number], expected, atol=1e-5)
    assert torch.equal(Branches(branches).generate(model, **GREEDY), out.sequences)
    recomputed = Kept((1.5, -1.0, 0.5))
    uncached = Branches(branches, recomputed).generate(model, **GREEDY, use_cache=False)
    assert torch.equal(uncached, out.sequences)
    assert torch.allclose(torch.stack(recomputed.logits), torch.stack(kept.logits), atol=1e-5)


def test_a_model_without_attention() -> None:
    settings = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    model, branches = zoo.built("MambaForCausalLM", settings, None), several()
    plain = model.generate(**branches[1].inputs, **GREEDY)
    assert torch.equal(Branches(branches[1:2], first).generate(model, **GREEDY), plain)
    kept = Kept((1.0, -0.5, 0.5))
    drawn = Branches(branches, kept).generate(model, **GREEDY)[:, 6:]
    for number, branch in enumerate(branches):
        for step, expected in enumerate(alone(model, branch.inputs, drawn)):
            assert torch.allclose(kept.logits[step][number], expected, atol=1e-5)


def test_an_item_is_as_alone() -> None:
    model, branches = model_of("llama"), several()
    together = Branches(branches).generate(model, **GREEDY)
    for item in range(4):
        own = []
        for branch in branches:
            mask = branch.inputs.get("attention_mask", torch.ones_like(branch.inputs["input_ids"]))
            real = mask[item].bool()
            own.append(Branch({"input_ids": branch.inputs["input_ids"][item : item + 1, real]}, branch.weight))
        assert torch.equal(Branches(own).generate(model, **GREEDY)[0], together[item])


def test_one_token_is_drawn_for_all_branches() -> None:
    model, branches = model_of("llama"), several()
    kept = Kept((0.4, 0.3, 0.3))
    torch.manual_seed(0)
    out = Branches(branches, kept).generate(model, **SAMPLED, num_return_sequences=2)
    assert out.shape == (8, 11)
    assert not torch.equal(out[0::2, 6:], out[1::2, 6:])
    for number, branch in enumerate(branches):
        twice = {key: value.repeat_interleave(2, 0) for key, value in branch.inputs.items()}
        for step, expected in enumerate(alone(model, twice, out[:, 6:])):
            assert torch.allclose(kept.logits[step][number], expected, atol=1e-5)


def test_items_end_by_themselves() -> None:
    model, branches = model_of("llama"), several()
    free = Branches(branches).generate(model, **{**GREEDY, "max_new_tokens": 8})[:, 6:]
    # a token that ends one item before another
    eos = int(free[0, 1])
    out = Branches(branches).generate(model, **{**GREEDY, "max_new_tokens": 8, "eos_token_id": eos})[:, 6:]
    for ours, whole in zip(out, free, strict=True):
        ends = (whole == eos).nonzero()
        length = int(ends[0]) + 1 if len(ends) else out.shape[1]
        assert torch.equal(ours[:length], whole[:length][: len(ours)])
        assert (ours[length:] == 0).all()
    assert (out == 0).any()
    assert len({tuple(row.tolist()) for row in out}) > 1


def test_what_acts_in_the_loop_sees_items_and_not_rows() -> None:
    model, branches = model_of("llama"), several()
    seen: list[Any] = []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            seen.append(tokens)

        def end(self) -> None:
            seen.append("end")

    def forbid(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 4
        return scores.index_fill(1, torch.tensor([7, 9, 11]), float("-inf"))

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # as the first branch's prompt is, six tokens
        return torch.full((len(input_ids),), input_ids.shape[1] == 9)

    out = Branches(branches).generate(
        model,
        **GREEDY,
        streamer=Streamer(),
        logits_processor=[forbid],
        stopping_criteria=[stop],
        repetition_penalty=1.3,
    )
    assert out.shape == (4, 9)
    assert not torch.isin(out[:, 6:], torch.tensor([7, 9, 11])).any()
    assert torch.equal(seen[0], branches[0].inputs["input_ids"])
    assert torch.equal(torch.stack(seen[1:-1], 1), out[:, 6:])
    assert seen[-1] == "end"


class Countdown:
    """A processor with a state of each row: forbids the token that this row was given before last."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.given.append(input_ids[:, -1])
        if len(self.given) < 2:
            return scores
        return scores.scatter(1, self.given[-2][:, None], float("-inf"))


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(2, 30))},
    "min_length": {"min_length": 11, "eos_token_id": list(range(2, 30))},
    "max_length": {"max_new_tokens": None, "max_length": 12},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(30))},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(20)]},
    "sequence_bias": {"sequence_bias": [[[7], 9.0], [[7, 8], 20.0]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda item, ids: [8 + item, 9 + len(ids)]},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 5.0},
    "top_p": {"do_sample": True, "top_p": 0.5, "top_k": 5, "temperature": 0.7},
    "eos": {"eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], "pad_token_id": 3, "max_new_tokens": 9},
    "eos without padding": {"eos_token_id": list(range(5, 16)), "pad_token_id": None, "max_new_tokens": 9},
}


@pytest.mark.parametrize("kind", [*PROCESSORS, "state of each row"])
@pytest.mark.parametrize("ragged", [False, True])
def test_processors_and_lengths_are_those_of_the_first_branch(kind: str, ragged: bool) -> None:
    """As without the others, which are longer, shorter and padded."""
    model = model_of("llama")
    main = padded((7, 5, 2, 6))[0] if ragged else {"input_ids": words(4, 7, 5)}
    others = several()

    def options() -> dict[str, Any]:
        if kind in PROCESSORS:
            return {**GREEDY, **PROCESSORS[kind], "output_scores": True, "return_dict_in_generate": True}
        return {**GREEDY, "logits_processor": [Countdown()], "output_scores": True, "return_dict_in_generate": True}

    torch.manual_seed(3)
    plain = model.generate(**main, **options())
    torch.manual_seed(3)
    ours = Branches([Branch(main), *others], first).generate(model, **options())
    assert torch.equal(ours.sequences, plain.sequences)
    for a, b in zip(ours.scores, plain.scores, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_generator_of_its_own() -> None:
    model, branches = model_of("llama"), several()

    def drawn(seed: int) -> Tensor:
        return Branches(branches).generate(model, **SAMPLED, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), before)


def letters(folder: Any) -> Any:
    """A tokenizer of one token per letter: "a" is 2, "b" is 3..."""
    from tokenizers import Tokenizer, decoders, models

    names = ["<eos>", "<unk>", *map(chr, range(97, 123))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tiny.transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.mark.parametrize("in_config", [False, True])
def test_strings_stop(tmp_path: Any, in_config: bool) -> None:
    tokenizer, model, branches = letters(tmp_path), model_of("llama"), several()[:2]

    def alphabet(logits: Tensor, step: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((4,), 5 + step), logits.shape[-1]).float()

    options: dict[str, Any] = {**GREEDY, "stop_strings": ["ef"]}
    if in_config:
        options = {"generation_config": tiny.transformers().GenerationConfig(**options)}
        given = options["generation_config"].to_dict()
    out = Branches(branches, alphabet).generate(model, **options, tokenizer=tokenizer)
    assert out[:, 6:].tolist() == [[5, 6, 7]] * 4
    assert not in_config or options["generation_config"].to_dict() == given
    with pytest.raises(InputError, match="need the tokenizer"):
        Branches(branches).generate(model, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_an_edit_acts_on_its_branch_alone(name: str, attention: str) -> None:
    model = model_of(name, attention)
    ragged, spans = padded()
    short = {"input_ids": words(4, 6, 2)}
    recorder = RowRecorder()
    edits = [Towards(), AddedStates({1: torch.ones(32)}), recorder]
    kept = Kept((0.5, 0.5))
    branches = Branches([Branch(short), Branch(ragged, edits=edits, spans=spans)], kept)
    out = branches.generate(model, **GREEDY)
    drawn = out[:, 6:]
    assert {step for _, step in branches.effect} == set(range(5))
    for step, expected in enumerate(alone(model, short, drawn)):
        assert torch.allclose(kept.logits[step][0], expected, atol=1e-5)
    single = RowRecorder()
    with edited(model, Towards(), AddedStates({1: torch.ones(32)}), single, spans=spans) as run:
        theirs = alone(model, ragged, drawn)
    assert dict(run.effect) == dict(branches.effect)
    for step, expected in enumerate(theirs):
        assert torch.allclose(kept.logits[step][1], expected, atol=2e-5)
        assert torch.allclose(recorder.found.stack(step), single.found.stack(step), atol=1e-5)
    assert not torch.allclose(theirs[0], alone(model, ragged, drawn)[0], atol=1e-3)


class Hidden(AttentionEdit):
    """Nothing reads the span; scores, weights and heads pass through."""

    asks = ("named",)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, keys = call.allowed, ~call.keys_in("named")[:, None, None]
        return call.replace(
            q=1.5 * call.q,
            scale=call.scale / 1.25,
            allowed=lambda rows: keys if before is None else before(rows) & keys,
        )


class Everything(Hidden):
    def scores(self, call: AttentionCall, scores: Tensor) -> Tensor:
        return 0.9 * scores

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights.square()

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return 1.1 * y


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("edit", [Hidden, Everything])
def test_all_kinds_of_edits_act_on_their_branch_alone(edit: type[AttentionEdit], attention: str) -> None:
    model = model_of("llama", attention)
    ragged, spans = padded()
    kept = Kept((0.5, 0.25, 0.25))
    three = [Branch(ragged), Branch(ragged, edits=[edit()], spans=spans), Branch({"input_ids": words(4, 5, 3)})]
    drawn = Branches(three, kept).generate(model, **GREEDY)[:, 9:]
    with edited(model, edit(), spans=spans):
        theirs = alone(model, ragged, drawn)
    for number, expected in enumerate([alone(model, ragged, drawn), theirs, alone(model, three[2].inputs, drawn)]):
        for step, logits in enumerate(expected):
            assert torch.allclose(kept.logits[step][number], logits, atol=1e-5)
    assert not torch.allclose(kept.logits[0][0], kept.logits[0][1], atol=1e-3)


def test_recorders_of_two_branches() -> None:
    model, branches = model_of("llama"), several()[:2]
    ours = [HeadRecorder(), HeadRecorder()]
    recorded = [Branch(b.inputs, b.weight, [r]) for b, r in zip(branches, ours, strict=True)]
    plain = Branches(branches).generate(model, **GREEDY)
    assert torch.equal(Branches(recorded).generate(model, **GREEDY), plain)
    for branch, recorder in zip(branches, ours, strict=True):
        theirs = HeadRecorder()
        with edited(model, theirs):
            alone(model, branch.inputs, plain[:, 6:])
        length = branch.inputs["input_ids"].shape[1]
        real = branch.inputs.get("attention_mask", torch.ones(4, length)).bool()
        for place, heads in recorder.found.items():
            for step, found in enumerate(heads):
                expected = theirs.found[place][step].transpose(1, 2)
                found = found.transpose(1, 2)[:, -expected.shape[1] :]
                where = real if step == 0 else torch.ones(4, 1, dtype=torch.bool)
                assert torch.allclose(found[where], expected[where], atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_with_and_without_the_image(name: str, attention: str) -> None:
    case = zoo.MODELS[name](attention)
    model, image = case.model, dict(case.inputs)
    if zoo.old():
        image.pop("mm_token_type_ids", None)
    text = {"input_ids": words(2, 5, 3).clamp(max=30)}
    dark = {**image, "pixel_values": torch.zeros_like(image["pixel_values"])}
    kept = Kept((2.0, -0.5, -0.5))
    branches = [Branch(image, edits=[Last(1.0)]), Branch(text), Branch(dark, edits=[Last(0.5)])]
    drawn = Branches(branches, kept).generate(model, **GREEDY)[:, image["input_ids"].shape[1] :]
    for number, inputs in enumerate((image, text)):
        for step, expected in enumerate(alone(model, inputs, drawn)):
            assert torch.allclose(kept.logits[step][number], expected, atol=1e-5)
    tower = Where(stack=next(stack for stack in stacks(model) if "language_model" in stack))
    with edited(model, Last(0.5, tower)):
        assert torch.allclose(kept.logits[0][2], alone(model, dark, drawn)[0], atol=1e-2)


class Last(AttentionEdit):
    """The decoder's heads times a factor."""

    def __init__(self, factor: float, at: Where | None = None) -> None:
        self.factor, self.at = factor, at or Where()

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        assert call.batch == 2
        return self.factor * y


def test_embedded_prompts() -> None:
    model, branches = model_of("llama"), several()
    plain = Branches(branches).generate(model, **GREEDY)
    embed = model.get_input_embeddings()
    embedded = []
    for branch in branches:
        # what is None is as if it was not there
        inputs = {**branch.inputs, "inputs_embeds": embed(branch.inputs["input_ids"]), "input_ids": None}
        embedded.append(Branch(inputs, branch.weight))
    with torch.no_grad():
        assert torch.equal(Branches(embedded).generate(model, **GREEDY), plain[:, 6:])


def test_a_cache_with_room_for_more() -> None:
    model, branches = model_of("llama"), several()
    plain = Branches(branches).generate(model, **GREEDY)
    before = fingerprint(model)
    assert torch.equal(Branches(branches).generate(model, **GREEDY, cache_implementation="static"), plain)
    assert fingerprint(model) == before


def test_step_by_step() -> None:
    model, ragged = model_of("llama"), padded()
    recorder = RowRecorder()
    branches = Branches(
        [Branch({"input_ids": words(4, 6, 2)}), Branch(ragged[0], -0.5, [recorder, Towards()], ragged[1])]
    )
    whole = branches.generate(model, **GREEDY)
    plain = model.generate(**ragged[0], **GREEDY)
    for number, step in enumerate(branches.steps(model, **GREEDY)):
        assert step.number == number
        assert step.logits.shape == (2, 4, 40)
        assert torch.equal(step.combined, step.logits[0] - 0.5 * step.logits[1])
        assert torch.equal(step.tokens, step.scores.argmax(-1))
        assert torch.equal(step.sequences, whole[:, : 7 + number])
        assert step.running.all() == (number < 4)
        assert recorder.found.stack(number).shape == (3, 4, 4, 1, 9 + number)
        # in between the model is free: another run of it is neither edited nor counted
        assert torch.equal(model.generate(**ragged[0], **GREEDY), plain)
    assert number == 4
    assert {step for _, step in branches.effect} == set(range(5))
    assert set(branches.effect.values()) == {8}


@pytest.mark.parametrize("how", ["closed", "dropped", "never begun"])
def test_steps_that_are_not_taken(how: str) -> None:
    model, ragged = model_of("llama"), padded()
    plain, before = model.generate(**ragged[0], **GREEDY), fingerprint(model)
    steps: Any = Branches([Branch(ragged[0], edits=[Towards()], spans=ragged[1])]).steps(model, **GREEDY)
    if how != "never begun":
        next(steps)
        next(steps)
    if how == "closed":
        steps.close()
    del steps
    gc.collect()
    assert fingerprint(model) == before
    assert torch.equal(model.generate(**ragged[0], **GREEDY), plain)


def test_steps_are_heard_in_the_thread_that_takes_them() -> None:
    model, ragged = model_of("llama"), padded()
    branches = Branches([Branch(ragged[0], edits=[Towards()], spans=ragged[1])])
    expected = [step.logits for step in branches.steps(model, **GREEDY)]
    steps = branches.steps(model, **GREEDY)
    taken = [next(steps).logits]
    with ThreadPoolExecutor(1) as pool:
        taken += pool.submit(lambda: [step.logits for step in steps]).result()
    assert torch.equal(torch.stack(taken), torch.stack(expected))


def test_two_at_once() -> None:
    """Steps of two contrasts of one model, in turns."""
    model, ragged = model_of("llama"), padded()
    one = Branches([Branch(ragged[0], edits=[Towards()], spans=ragged[1]), Branch({"input_ids": words(4, 3, 1)}, -0.5)])
    two = Branches([Branch({"input_ids": words(4, 6, 2)}, edits=[AblatedHeads([(0, 1)])])])
    expected = [one.generate(model, **GREEDY), two.generate(model, **GREEDY)]
    in_turns = list(zip(one.steps(model, **GREEDY), two.steps(model, **GREEDY), strict=True))
    for step, whole in zip(in_turns[-1], expected, strict=True):
        assert torch.equal(step.sequences, whole)


ENCODERS = {"T5ForConditionalGeneration": zoo.T5, "BartForConditionalGeneration": zoo.BART}


def sequence_model(name: str) -> Any:
    return zoo.built(name, {**ENCODERS[name], "num_beams": 1}, "eager" if name.startswith("T5") else "sdpa")


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLED, {**GREEDY, "use_cache": False}, {**GREEDY, "repetition_penalty": 2.0}]
)
def test_encoder_decoders(name: str, options: dict[str, Any]) -> None:
    model = sequence_model(name)
    # an encoder is padded on the right
    ragged = {key: value.flip(1) for key, value in padded()[0].items()}
    for main in (ragged, {"input_ids": words(4, 7, 1)}):
        torch.manual_seed(3)
        plain = model.generate(**main, **options)
        torch.manual_seed(3)
        assert torch.equal(Branches([Branch(main)]).generate(model, **options), plain)
        torch.manual_seed(3)
        kept = Kept((1.0, 0.0))
        other = {"input_ids": words(4, 12, 2), "decoder_input_ids": words(4, 2, 3)}
        main = {**main, "decoder_input_ids": words(4, 2, 4)}
        out = Branches([Branch(main), Branch(other)], kept).generate(model, **options)
        drawn = out[:, -options["max_new_tokens"] :]
        for number, inputs in enumerate((main, other)):
            for step, expected in enumerate(alone(model, inputs, drawn)):
                assert torch.allclose(kept.logits[step][number], expected, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_edits_of_an_encoder_decoder(name: str) -> None:
    if name.startswith("T5") and zoo.old():
        pytest.skip("T5 of transformers 5.0 writes its attention out")
    model = sequence_model(name)
    inputs = {"input_ids": words(4, 7, 1)}
    span = torch.zeros(4, 7, dtype=torch.bool)
    span[:, 2:4] = True
    across = Where(kinds=["cross"])
    towards = Towards()
    towards.at = across
    encoder = next(stack for stack in stacks(model) if "encoder" in stack)
    added = AddedStates({1: torch.full((32,), 3.0)}, Where(stack=encoder))
    edits = [towards, AblatedHeads([(0, 1)], across), added]
    kept = Kept((1.0, 1.0))
    branches = Branches(
        [Branch({"input_ids": words(4, 9, 2)}), Branch(inputs, edits=edits, spans={"named": span})], kept
    )
    drawn = branches.generate(model, **GREEDY)[:, 1:]
    with edited(model, *edits, spans={"named": span}) as run:
        theirs = alone(model, inputs, drawn)
    assert dict(run.effect) == dict(branches.effect)
    for step, expected in enumerate(theirs):
        assert torch.allclose(kept.logits[step][1], expected, atol=1e-5)
    for step, expected in enumerate(alone(model, {"input_ids": words(4, 9, 2)}, drawn)):
        assert torch.allclose(kept.logits[step][0], expected, atol=1e-5)
    assert not torch.allclose(theirs[0], alone(model, inputs, drawn)[0], atol=1e-3)


def test_an_encoder_of_sound() -> None:
    whole = zoo.whisper("sdpa").model
    model = zoo.built("WhisperForConditionalGeneration", whole.config.to_dict(), "sdpa")
    waves = zoo.whisper("sdpa").inputs["input_features"]
    heard = {"input_features": waves, "decoder_input_ids": torch.tensor([[1, 5, 6]] * 2)}
    silence = {**heard, "input_features": torch.zeros_like(waves)}
    plain = tiny.transformers().GenerationMixin.generate(model, **heard, **GREEDY)
    assert torch.equal(Branches([Branch(heard)]).generate(model, **GREEDY), plain)
    kept = Kept((1.0, -0.5))
    Branches([Branch(heard), Branch(silence)], kept).generate(model, **GREEDY)
    assert not torch.allclose(kept.logits[0][0], kept.logits[0][1])
    with pytest.raises(InputError, match="a generate\\(\\) of its own; give each branch decoder_input_ids"):
        Branches([Branch({"input_features": waves})]).generate(model, **GREEDY)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before(error: type[BaseException] | None) -> None:
    model = model_of("llama")
    ragged, spans = padded()
    plain, before = model.generate(**ragged, **GREEDY), fingerprint(model)

    def combine(logits: Tensor, step: int) -> Tensor:
        # the model is free to be used in between
        assert torch.equal(model.generate(**ragged, **GREEDY), plain)
        if step == 2 and error is not None:
            raise error("inside")
        return logits.mean(0)

    run = Branches([Branch(ragged), Branch(ragged)], combine)
    if error is None:
        run.generate(model, **GREEDY)
    else:
        with pytest.raises(error, match="inside"):
            run.generate(model, **GREEDY)
        with pytest.raises(error, match="inside"):
            Branches([Branch(ragged, edits=[Towards()], spans=spans)], raising(error)).generate(model, **GREEDY)
    assert fingerprint(model) == before
    assert torch.equal(model.generate(**ragged, **GREEDY), plain)


def test_an_interruption_between_steps_leaves_the_model_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ragged, spans) = model_of("llama"), padded()
    before = fingerprint(model)
    branches = Branches([Branch(ragged, edits=[Towards()], spans=spans)])

    class Interrupted:
        @property
        def sequences(self) -> Tensor:
            raise KeyboardInterrupt

    # generate() looks at a step when it is outside of the steps
    monkeypatch.setattr(decode, "DecodingStep", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt) as caught:
        branches.generate(model, **GREEDY)
    # while the traceback still holds its frames
    assert caught.tb is not None
    assert fingerprint(model) == before


def raising(error: type[BaseException]) -> Any:
    def combine(logits: Tensor, step: int) -> Tensor:
        raise error("inside")

    return combine


def test_hooks_of_the_model_are_heard_once_per_step() -> None:
    model, heard = model_of("llama"), []
    handle = model.register_forward_hook(lambda _, __, out: heard.append(out.logits.shape[0]))
    Branches(several()).generate(model, **GREEDY)
    handle.remove()
    assert heard == [12] * 5


def test_nothing_is_kept_from_step_to_step() -> None:
    model = model_of("llama")
    seen: list[Any] = []
    counts: list[int] = []

    def combine(logits: Tensor, step: int) -> Tensor:
        assert not any(ref() is not None for ref in seen)
        seen.append(weakref.ref(logits))
        if step in (4, 11):
            gc.collect()
            counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
        return logits.mean(0)

    Branches(several(), combine).generate(model, **{**GREEDY, "max_new_tokens": 12})
    assert len(seen) == 12
    assert len(set(counts)) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_equal_to_the_bit(name: str, attention: str) -> None:
    """An edit that changes nothing changes no bit; one of a branch changes no bit of the others."""
    model, (ragged, spans) = model_of(name, attention), padded()

    def logits(*edits: Any) -> Tensor:
        branches = [Branch({"input_ids": words(4, 6, 2)}), Branch(ragged, edits=edits, spans=spans)]
        return torch.stack([step.logits for step in Branches(branches, first).steps(model, **GREEDY)])

    plain = logits()
    assert torch.equal(logits(AttentionEdit(), BlockEdit(), RowRecorder()), plain)
    edited_ones = logits(Towards())
    assert torch.equal(edited_ones[:, 0], plain[:, 0])
    assert not torch.allclose(edited_ones[:, 1], plain[:, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("branches", "options", "says"),
    [
        ([{"input_ids": words(4, 3, 1)}], {"num_beams": 2}, "beam_search"),
        ([{"input_ids": words(4, 3, 1)}], {"prompt_lookup_num_tokens": 2}, "assisted"),
        ([{"input_ids": words(4, 3, 1)}], {"assistant_model": object()}, "assistant_model"),
        ([{"input_ids": words(4, 3, 1)}], {"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ([{"input_ids": words(4, 3, 1)}], {"guidance_scale": 2.0}, "guidance_scale: runs the model once more"),
        ([{"input_ids": words(4, 3, 1)}], {"output_attentions": True}, "give a branch a recorder"),
        ([{"input_ids": words(4, 3, 1)}], {"custom_generate": print}, "a loop of their own"),
        ([{"input_ids": words(4, 3, 1)}], {"max_new_tokens": None, "max_length": 2}, "options: .* Input length"),
        ([{"input_ids": words(4, 3, 1)}], {"max_new_tokins": 3}, "max_new_tokins: is no option"),
        ([{"input_ids": words(4, 3, 1)}], {"pixel_values": torch.ones(1)}, "belong to the branches"),
        ([{"input_ids": words(4, 3, 1)}], {"logits_to_keep": 2}, "logits_to_keep: is no option"),
        ([{"input_ids": words(4, 3, 1), "position_ids": torch.ones(3, 4, 3)}], {}, "position_ids of branch 0"),
        ([{"input_ids": words(4, 3, 1)}], {"input_ids": words(4, 3, 1)}, "belong to the branches"),
        ([{"input_ids": words(4, 3, 1)}, {"input_ids": words(3, 3, 1)}], {}, "of 4, 3 items"),
        ([{"input_ids": words(4, 3, 1)}, {"pixel_values": words(3, 3, 1)}], {}, "all need input_ids"),
        ([{"inputs_embeds": torch.ones(4, 3, 32)}, {"input_ids": words(4, 3, 1)}], {}, "or all inputs_embeds"),
        ([{"input_ids": words(4, 3, 1), "past_key_values": ()}], {}, "brings a cache"),
        (
            [{"input_ids": words(2, 2, 1), "attention_mask": torch.tensor([[1, 1], [1, 0]])}],
            {},
            "padded on the right",
        ),
        (
            [{"input_ids": words(1, 2, 1), "position_ids": torch.tensor([[0, 1]])}, {"input_ids": words(1, 2, 1)}],
            {},
            "position_ids is given for 1 of 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(branches: list[Any], options: dict[str, Any], says: str) -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match=says):
        Branches([Branch(inputs) for inputs in branches]).generate(model, **{**GREEDY, **options})


def test_what_cannot_be_edited_is_refused() -> None:
    model = model_of("llama")
    ragged, spans = padded()
    with pytest.raises(InputError, match="at least one"):
        Branches([])
    with pytest.raises(InputError, match="needs 'named'"):
        Branches([Branch(ragged, edits=[Towards()])]).generate(model, **GREEDY)
    wrong: list[tuple[Any, str]] = [
        (lambda: Branches([ragged]), r"expected Branch\(inputs\), got dict as branch 0"),  # type: ignore[list-item]
        (lambda: Branches(Branch(ragged)), "give a list"),  # type: ignore[arg-type]
        (lambda: Branch(ragged["input_ids"]), "inputs: expected those of model.generate by name"),  # type: ignore[arg-type]
        (lambda: Branch(ragged, "2"), "weight: expected a finite number, got '2'"),  # type: ignore[arg-type]
        (lambda: Branch(ragged, float("nan")), "weight: expected a finite number, got nan"),
        (lambda: Branch(ragged, edits=Towards()), "edits: expected a list of them, got Towards"),  # type: ignore[arg-type]
        (lambda: Branches([Branch({"input_ids": torch.ones(1, 3)})]).generate(model, **GREEDY), "are torch.float32"),
        (
            lambda: Branches([Branch({"input_ids": words(1, 2, 1), "attention_mask": [[1, 1]]})]).generate(
                model, **GREEDY
            ),
            "attention_mask of branch 0 is list",
        ),
    ]
    for make, says in wrong:
        with pytest.raises(InputError, match=says):
            make()
    recorder = RowRecorder()
    with pytest.raises(InputError, match="this RowRecorder is given twice"):
        Branches([Branch(ragged, edits=[recorder])] * 2).generate(model, **GREEDY)
    two = [Branch(ragged), Branch({"input_ids": words(4, 6, 2)}, edits=[Towards()], spans=spans)]
    with pytest.raises(InputError, match=r"of branch 1 is \(4, 9\)"):
        Branches(two).generate(model, **GREEDY)
    with pytest.raises(InputError, match="give edits and spans to the branches"), edited(model, Towards(), spans=spans):
        Branches([Branch(ragged)]).generate(model, **GREEDY)
    with pytest.raises(InputError, match="combine: gave"):
        Branches([Branch(ragged)], lambda logits, step: logits).generate(model, **GREEDY)
    with pytest.raises(InputError, match="no finite highest number at step 0"):
        Branches([Branch(ragged)], lambda logits, step: logits[0] * float("nan")).generate(model, **GREEDY)
    with pytest.raises(InputError, match="cannot generate"):
        Branches([Branch(ragged)]).generate(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="AddedStates has no place"):
        Branches([Branch(ragged, edits=[AddedStates({7: torch.ones(32)})])]).generate(model, **GREEDY)
    with pytest.raises(InputError, match="Never did nothing"):
        Branches([Branch(ragged), Branch(ragged, edits=[Never()])]).generate(model, **GREEDY)
    with pytest.raises(InputError, match="'mean'; there are 'sum'"):
        Branches([Branch(ragged)], "mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a mixture is of weights that are not negative"):
        Branches([Branch(ragged, -1.0)], "mixture")
    with pytest.raises(InputError, match="of: 'odds'"):
        Branches([Branch(ragged)], of="odds")  # type: ignore[arg-type]


class Never(Towards):
    """Chooses no query."""

    asks = ()

    def queries(self, call: AttentionCall) -> Tensor:
        return torch.zeros(call.batch, call.queries, dtype=torch.bool)
