"""Several variants of the inputs decoded together: one forward of branch x item rows, one drawn token for all of an item.

`generate` of transformers prepares twice and decodes not at all: once the first branch alone, for the processors, the criteria
of stopping and the lengths, which so see that branch as they would without the others; once all rows as one batch, for masks,
positions and cache. The loop is here. Edits act while the model runs for a step, and not in between, where it is free.

What it does not know: beams, assistants, prefilling in chunks, compiled steps, a cache that was filled before, several
processes.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cenote.core import InputError
from cenote.core.requirements import require_finite
from cenote.models.live import places, seats
from cenote.models.live.calls import Place
from cenote.models.live.edited import check_spans, edited
from cenote.models.live.edits import Edit
from cenote.models.live.parts import of_part

Combine = Callable[[Float[Tensor, "branches items vocab"], int], Float[Tensor, "items vocab"]]
Named = Literal["sum", "mixture", "lowest"]
Scale = Literal["logits", "log-probabilities"]

CACHES = ("past_key_values", "cache", "cache_params")
INPUTS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "decoder_input_ids")
MODES = ("greedy_search", "sample")
LEFT_BEHIND = ("_cache", "_previous_max_cache_length")
"""What `generate` keeps on a model of a cache with room for more, in one version or another."""
RECORDED = ("output_attentions", "output_hidden_states")
NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
"""What rows of all branches are prepared with: their processors are not used."""


@dataclass(frozen=True, eq=False)
class Branch:
    """One variant of the inputs, of the same items as the other branches.

    Args:
        inputs: as for `model.generate`: input_ids or inputs_embeds `[items, tokens, ...]`, attention_mask, pixel_values... of a
            decoder padded on the left, if at all.
        weight: of its logits, or of its probabilities.
        edits: act on this branch's rows alone; recorders too see these alone.
        spans: of this branch's tokens, `[items, tokens]`; of the encoder's in an encoder-decoder.
    """

    inputs: Mapping[str, Any]
    weight: float = 1.0
    edits: Sequence[Edit] = ()
    spans: Mapping[str, Bool[Tensor, "items tokens"]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            raise InputError(
                f"inputs: expected those of model.generate by name, such as {{'input_ids': tokens}}, got "
                f"{type(self.inputs).__name__}"
            )
        require_finite(weight=self.weight)
        if not isinstance(self.edits, Sequence) or isinstance(self.edits, str):
            raise InputError(f"edits: expected a list of them, got {type(self.edits).__name__}")


class DecodingStep(NamedTuple):
    """One step of decoding. What is called an item here is an item of the inputs times `num_return_sequences`.

    Attributes:
        number: from 0, which reads the prompts; recorders of the branches hold what they saw under the same number.
        logits: of the next token, of each branch, as the model gave them, `[branches, items, vocab]`, float32.
        combined: what they became, `[items, vocab]`.
        scores: and after the processors: from these the token is drawn.
        tokens: drawn, `[items]`; the padding token where an item had ended before.
        sequences: the first branch's prompt and all that was drawn, `[items, tokens]`.
        running: False where an item has ended.
    """

    number: int
    logits: Float[Tensor, "branches items vocab"]
    combined: Float[Tensor, "items vocab"]
    scores: Float[Tensor, "items vocab"]
    tokens: Int[Tensor, "items"]
    sequences: Int[Tensor, "items tokens"]
    running: Bool[Tensor, "items"]


def plausible(
    combined: Float[Tensor, "items vocab"], main: Float[Tensor, "items vocab"], alpha: float = 0.1
) -> Float[Tensor, "items vocab"]:
    """`-inf` where `p_main < alpha max p_main`: a contrast is only taken among tokens that the main branch finds likely.

    Args:
        combined: the contrast, `[items, vocab]`.
        main: logits or log-probabilities of the main branch, of the same shape.
        alpha: part of the highest probability, from 0 to 1.

    Raises:
        InputError: for another alpha.

    Example:
        >>> main = torch.tensor([[0.6, 0.39, 0.01]]).log()
        >>> plausible(torch.zeros(1, 3), main).tolist()
        [[0.0, 0.0, -inf]]

    Source: Li et al. 2023, Contrastive Decoding: Open-ended Text Generation as Optimization.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: {alpha}, expected a part of the highest probability, from 0 to 1")
    p = main.softmax(-1)
    return combined.masked_fill(p < alpha * p.amax(-1, keepdim=True), float("-inf"))


class Branches:
    """Branches, and how their next-token logits become one.

    The first branch is the main one: its prompt is what processors and criteria of stopping see, and what is given back.

    Args:
        branches: one or more, of the same items in the same order.
        combine: from `[branches, items, vocab]`, float32, and the number of the step to `[items, vocab]`; or one of
            "sum" (`sum_b w_b l_b`; weights 1 + a and -a contrast with and without a context, g and 1 - g guide),
            "mixture" (`log sum_b w_b p_b / sum_b w_b`),
            "lowest" (`min_b log p_b`; weights are not used).
        of: what a sum, or a combine of your own, is given: logits as they are, or log-probabilities.

    Raises:
        InputError: for no branch, a combine of another name, weights that are no mixture.

    Attributes:
        effect: what the branches' edits did in the last run, as `Run.effect`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> whole, short = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[8]])
        >>> contrast = Branches([Branch({"input_ids": whole}, 2.0), Branch({"input_ids": short}, -1.0)])
        >>> contrast.generate(model, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None).shape
        torch.Size([1, 7])
        >>> steps = contrast.steps(model, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        >>> [tuple(step.logits.shape) for step in steps]
        [(2, 1, 20), (2, 1, 20), (2, 1, 20)]

    Source: Sanchez et al. 2023, Stay on topic with Classifier-Free Guidance; Shi et al. 2024, Trusting Your Evidence:
        Hallucinate Less with Context-aware Decoding; Li et al. 2023, Contrastive Decoding.
    """

    def __init__(self, branches: Sequence[Branch], combine: Combine | Named = "sum", of: Scale = "logits") -> None:
        if isinstance(branches, Branch) or not branches:
            raise InputError("branches: give a list of at least one")
        for number, branch in enumerate(branches):
            if not isinstance(branch, Branch):
                raise InputError(f"branches: expected Branch(inputs), got {type(branch).__name__} as branch {number}")
        if not callable(combine) and combine not in ("sum", "mixture", "lowest"):
            raise InputError(f"combine: {combine!r}; there are 'sum', 'mixture', 'lowest', or give a function")
        if of not in ("logits", "log-probabilities"):
            raise InputError(f"of: {of!r}, expected 'logits' or 'log-probabilities'")
        weights = [float(branch.weight) for branch in branches]
        if combine == "mixture" and (min(weights) < 0 or sum(weights) <= 0):
            raise InputError(f"weight: a mixture is of weights that are not negative, and not all 0; got {weights}")
        self.branches = tuple(branches)
        self.combine = combine
        self.of = of
        self.effect: Counter[tuple[Place, int]] = Counter()

    def generate(
        self, model: Any, *, streamer: Any = None, generator: torch.Generator | None = None, **options: Any
    ) -> Any:
        """What `model.generate` gives for the first branch, with tokens drawn from the combined logits.

        Args:
            model: a decoder or an encoder-decoder of transformers.
            streamer: as for `model.generate`.
            generator: where tokens are sampled from; the global one by default.
            options: of `model.generate`, without inputs: do_sample, max_new_tokens, logits_processor, tokenizer...

        Returns:
            Tokens `[items, tokens]`; with `return_dict_in_generate` sequences, scores and logits, the combined ones.

        Raises:
            InputError: as `steps`.
        """
        plan = self._planned(model, streamer, generator, options)
        config = plan.main.config
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        sequences = plan.main.ids
        # an interruption leaves the model at once, and not when its traceback is forgotten
        with closing(self._steps(plan)) as steps:
            for step in steps:
                sequences = step.sequences
                if config.return_dict_in_generate and config.output_scores:
                    scores.append(step.scores)
                if config.return_dict_in_generate and config.output_logits:
                    logits.append(step.combined)
                # what a step holds is large, and the next is computed while the name lasts
                del step
        if not config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

        kind: Any = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        return kind(
            sequences=sequences,
            scores=tuple(scores) if config.output_scores else None,
            logits=tuple(logits) if config.output_logits else None,
        )

    def steps(
        self, model: Any, *, streamer: Any = None, generator: torch.Generator | None = None, **options: Any
    ) -> Iterator[DecodingStep]:
        """The same step by step, for methods that look in between.

        Between steps the model may be run, and does what it did before. Edits are heard in the thread that takes the step.
        Steps that are closed or dropped leave the model as it was found.

        Args:
            model, streamer, generator, options: as for `generate`.

        Raises:
            InputError: at once, where inputs don't fit together, for beams, assistants, prefilling in chunks, guidance_scale
                (a branch does that), attentions and states (give a branch a recorder), models that decode in a way of their
                own; at the first step as `edited`, for the branches' edits; where combine gives something else than numbers
                `[items, vocab]`; at the end, where an edit did nothing.
        """
        return self._steps(self._planned(model, streamer, generator, options))

    def _planned(
        self, model: Any, streamer: Any, generator: torch.Generator | None, options: Mapping[str, Any]
    ) -> _Plan:
        inputs = [{name: value for name, value in b.inputs.items() if value is not None} for b in self.branches]
        _check(model, inputs, options)
        key, sizes = _prompts(model, inputs)
        main = _prepared_main(model, inputs[0], _with_stop_strings(model, options))
        _check_mode(main.config)
        joined = _joined(model, inputs, key, sizes, main.config)
        stacks = _stacks(model) if any(branch.edits for branch in self.branches) else []
        edits: list[Edit] = []
        for number, branch in enumerate(self.branches):
            spans = _fitting(branch.spans or {}, number, joined)
            edits += [of_part(edit, number, len(self.branches), spans, stacks) for edit in branch.edits]
        return _Plan(model, main, joined, edits, streamer, generator)

    def _steps(self, plan: _Plan) -> Generator[DecodingStep, None, None]:
        model, main, branches = plan.model, plan.main, len(self.branches)
        config, drawn = main.config, main.ids
        running = torch.ones(len(drawn), dtype=torch.bool, device=drawn.device)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in main.criteria)
        keeps = config.return_dict_in_generate and config.output_scores
        scores: tuple[Tensor, ...] | None = () if keeps else None
        number = 0
        with ExitStack() as stack:
            run = stack.enter_context(edited(model, *plan.edits)) if plan.edits else None
            self.effect = Counter() if run is None else run.effect
            rows = _Rows(model, plan.joined.inputs, config, drawn.shape[1])
            if plan.streamer is not None:
                plan.streamer.put(drawn.cpu())
            while running.any():
                with torch.no_grad():
                    logits = rows.logits().to(drawn.device).unflatten(0, (branches, -1))
                with nullcontext() if run is None else run.paused():
                    with torch.no_grad():
                        combined = self._combined(logits, number)
                        processed = main.processors(drawn, combined.clone())
                        tokens = _drawn(processed, config.do_sample, plan.generator)
                    if ends:
                        tokens = torch.where(running, tokens, config._pad_token_tensor.to(tokens.device))
                    drawn = torch.cat([drawn, tokens[:, None]], 1)
                    if scores is not None:
                        scores = (*scores, processed)
                    running = running & ~main.criteria(drawn, scores)
                    if plan.streamer is not None:
                        plan.streamer.put(tokens.cpu())
                    yield DecodingStep(number, logits, combined, processed, tokens, drawn, running)
                    del logits, combined, processed
                rows.append(tokens.repeat(branches))
                number += 1
        if plan.streamer is not None:
            plan.streamer.end()

    def _combined(self, logits: Tensor, step: int) -> Tensor:
        given = logits
        if self.of == "log-probabilities" or self.combine == "lowest":
            given = logits.log_softmax(-1)
        if callable(self.combine):
            combined = self.combine(given, step)
        else:
            weights = logits.new_tensor([branch.weight for branch in self.branches])[:, None, None]
            if self.combine == "sum":
                combined = (weights * given).sum(0)
            elif self.combine == "lowest":
                combined = given.amin(0)
            else:
                combined = (logits.log_softmax(-1) + (weights / weights.sum()).log()).logsumexp(0)
        if not isinstance(combined, Tensor) or combined.shape != logits.shape[1:]:
            got = tuple(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
            raise InputError(f"combine: gave {got}, expected [items, vocab] {tuple(logits.shape[1:])}")
        if not combined.amax(-1).isfinite().all():
            raise InputError(f"combine: gave an item no finite highest number at step {step}; is there an inf - inf?")
        return combined


class _Main(NamedTuple):
    """What `generate` prepared for the first branch."""

    ids: Int[Tensor, "items tokens"]
    processors: Any
    criteria: Any
    config: Any


class _Joined(NamedTuple):
    """Inputs of all branches as one batch, branch by branch."""

    inputs: dict[str, Any]
    lengths: Sequence[int]
    items: int
    left: bool


class _Plan(NamedTuple):
    model: Any
    main: _Main
    joined: _Joined
    edits: Sequence[Edit]
    streamer: Any
    generator: torch.Generator | None


class _Rows:
    """The rows of all branches in the model: tokens, masks, positions, cache."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], config: Any, prompt: int) -> None:
        self.model = model
        config = copy.deepcopy(config)
        config.update(**NEUTRAL)
        config.max_new_tokens, config.max_length = config.max_length - prompt, None
        config.min_new_tokens = config.min_length = config.stop_strings = None
        self.ids, _, _, self.config, self.known = _prepared(model, inputs, generation_config=config)
        self.begun = False

    def logits(self) -> Float[Tensor, "rows vocab"]:
        """Of the next token."""
        model, known = self.model, self.known
        if self.begun:
            # 5.0 has cache_position among what is known instead
            tells = "next_sequence_length" in inspect.signature(_mixin().prepare_inputs_for_generation).parameters
            length = {"next_sequence_length": 1 if known["use_cache"] else None} if tells else {}
            out = model(**model.prepare_inputs_for_generation(self.ids, **length, **known), return_dict=True)
        else:
            out = model._prefill(self.ids, self.config, known)
            self.begun = True
        self.known = model._update_model_kwargs_for_generation(
            out, known, is_encoder_decoder=model.config.is_encoder_decoder
        )
        return out.logits[:, -1].to(torch.float32, copy=True)

    def append(self, tokens: Int[Tensor, "rows"]) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids.device)], 1)


def _mixin() -> Any:
    from transformers import GenerationMixin

    return GenerationMixin


def _prepared(model: Any, inputs: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """All that `generate` has ready when its loop begins."""

    def loop(
        _: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **known: Any
    ) -> Any:
        return input_ids, logits_processor, stopping_criteria, generation_config, known

    kept = {name: vars(model).pop(name) for name in LEFT_BEHIND if name in vars(model)}
    try:
        return _mixin().generate(model, **inputs, **options, custom_generate=loop)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"options: {type(model).__name__}.generate says: {error}") from error
    finally:
        for name in LEFT_BEHIND:
            vars(model).pop(name, None)
        vars(model).update(kept)


def _prepared_main(model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> _Main:
    """Of the first branch alone, without what encoders would read: these run once, with all rows."""
    shown = {
        name: value
        for name, value in inputs.items()
        if name == "inputs_embeds"
        or name.endswith("_mask")
        or not (isinstance(value, Tensor) and value.is_floating_point())
    }
    if model.config.is_encoder_decoder:
        from transformers.modeling_outputs import BaseModelOutput

        shown.pop("inputs_embeds", None)
        some = next(value for value in inputs.values() if isinstance(value, Tensor))
        nothing = torch.zeros(len(some), 1, 1, device=some.device)
        shown["encoder_outputs"] = BaseModelOutput(last_hidden_state=nothing)
    ids, processors, criteria, config, _ = _prepared(model, shown, **options)
    return _Main(ids, processors, criteria, config)


def _drawn(
    scores: Float[Tensor, "items vocab"], sample: bool, generator: torch.Generator | None
) -> Int[Tensor, "items"]:
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)


def _check(model: Any, branches: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    if not isinstance(model, _mixin()) or not model.can_generate():
        raise InputError(f"model: {type(model).__name__} cannot generate; give a decoder of transformers")
    _check_ways(model, branches)
    known = {"tokenizer", *inspect.signature(_mixin().generate).parameters, *vars(model.generation_config)}
    for name in options:
        if name in INPUTS or name in CACHES or name not in known:
            raise InputError(
                f"{name}: is no option here; inputs belong to the branches, and the cache is made for them"
            )
    if options.get("custom_generate") is not None:
        raise InputError("custom_generate: branches have a loop of their own; leave it out")
    if options.get("assistant_model") is not None:
        raise InputError("assistant_model: assisted decoding draws several tokens at once; decode without it")
    for module in model.modules():
        for seated in seats.at(module):
            if getattr(seated.run, "spans", None):
                raise InputError(
                    "spans: the model is edited with spans of one batch, and branches have rows and lengths of their own; give "
                    "edits and spans to the branches"
                )


def _check_ways(model: Any, branches: Sequence[Mapping[str, Any]]) -> None:
    """Whether the model decodes as others do."""
    name = type(model).__name__
    if type(model)._sample is not _mixin()._sample:
        raise InputError(f"model: {name} draws tokens in a way of its own, which branches don't know")
    if type(model).generate is _mixin().generate:
        return
    # around its decoding such a generate() makes prompts, or embeds images; with a prompt of tokens, and its
    # encoder's inputs as its own, nothing is left for it to do
    encodes = model.config.is_encoder_decoder and model.get_encoder().main_input_name == model.main_input_name
    if not encodes or not all("decoder_input_ids" in inputs for inputs in branches):
        what = "give each branch decoder_input_ids, its whole prompt" if encodes else "branches don't know what it does"
        raise InputError(f"model: {name} has a generate() of its own; {what}")


def _check_mode(config: Any) -> None:
    mode = str(config.get_generation_mode().value)
    if mode not in MODES:
        raise InputError(
            f"options: ask for {mode}; branches are decoded greedily or sampled: num_beams=1, no assistant"
        )
    if getattr(config, "prefill_chunk_size", None) is not None:
        raise InputError("prefill_chunk_size: branches are prefilled in one piece; leave it out")
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise InputError(
            "guidance_scale: runs the model once more beside the branches; give a branch without the condition, and weights "
            "g and 1 - g"
        )
    for name in RECORDED:
        if getattr(config, name, None):
            raise InputError(f"{name}: are of rows of all branches; give a branch a recorder among its edits")


def _padding(config: Any) -> tuple[int, bool]:
    """The token to pad with, and whether `generate` takes it for padding where it's given no mask: not if it's also an end."""
    pad, end = config._pad_token_tensor, config._eos_token_tensor
    if pad is None:
        return 0, False
    return int(pad), end is None or not torch.isin(end, pad).any().item()


def _with_stop_strings(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """`generate` loses the tokenizer where it's given a loop."""
    options = dict(options)
    tokenizer = options.pop("tokenizer", None)
    strings = options.pop("stop_strings", None)
    config = options.get("generation_config")
    if strings is None and config is not None and config.stop_strings is not None:
        strings = config.stop_strings
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].stop_strings = None
    if model.generation_config.stop_strings is not None:
        raise InputError("stop_strings: stand in model.generation_config; give them as an option, and take them off it")
    if strings is None:
        return options
    if tokenizer is None:
        raise InputError("stop_strings: need the tokenizer; give tokenizer=")
    from transformers import StoppingCriteriaList, StopStringCriteria

    own = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    return {**options, "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or []), own])}


def _stacks(model: Any) -> list[str]:
    """Where rows are items: rows of towers beside a decoder are images."""
    inside = set((model if model.config.is_encoder_decoder else model.get_decoder()).modules())
    return [stack for stack in places.stacks(model) if model.get_submodule(stack) in inside]


def _fitting(spans: Mapping[str, Tensor], number: int, joined: _Joined) -> dict[str, Bool[Tensor, "items tokens"]]:
    """A branch's spans, padded as its tokens."""
    check_spans(spans)
    expected = (joined.items, joined.lengths[number])
    for name, span in spans.items():
        if span.shape != expected:
            raise InputError(
                f"spans: {name!r} of branch {number} is {tuple(span.shape)}, and its inputs are {expected}"
            )
    return {name: F.pad(span, _beside(expected[1], joined.lengths, joined.left)) for name, span in spans.items()}


def _beside(length: int, lengths: Sequence[int], left: bool) -> tuple[int, int]:
    missing = max(lengths) - length
    return (missing, 0) if left else (0, missing)


def _prompts(model: Any, branches: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """What the prompt is called, and its items and tokens in each branch; no tokens where an encoder reads features."""
    key = _key(model, branches)
    sizes: list[tuple[int, int]] = []
    for number, inputs in enumerate(branches):
        prompt = inputs[key]
        for name, value in inputs.items():
            if name.endswith(("_ids", "_mask")) and not isinstance(value, Tensor):
                raise InputError(
                    f"branches: {name} of branch {number} is {type(value).__name__}, expected a tensor [items, tokens]"
                )
        if key == "input_ids" and (prompt.is_floating_point() or prompt.dtype == torch.bool):
            raise InputError(
                f"branches: input_ids of branch {number} are {prompt.dtype}, expected whole numbers; vectors are inputs_embeds"
            )
        dims = {"input_ids": 2, "inputs_embeds": 3}.get(key)
        if (dims is not None and prompt.dim() != dims) or not prompt.numel():
            raise InputError(
                f"branches: {key} of branch {number} is {tuple(prompt.shape)}, expected [items, tokens...]"
            )
        if any(name in inputs for name in CACHES):
            raise InputError(f"branches: branch {number} brings a cache; give its whole prompt")
        if "position_ids" in inputs and inputs["position_ids"].shape != prompt.shape[:2]:
            raise InputError(f"branches: position_ids of branch {number} are not [items, tokens]; leave them out")
        sizes.append((prompt.shape[0], 0 if dims is None else prompt.shape[1]))
    if len({items for items, _ in sizes}) > 1:
        counts = ", ".join(str(items) for items, _ in sizes)
        raise InputError(f"branches: are of {counts} items; all need the same")
    if len({tokens for _, tokens in sizes}) > 1 and "attention_mask" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"branches: prompts are of several lengths, and {type(model).__name__} takes no attention_mask"
        )
    return key, sizes


def _joined(
    model: Any, branches: Sequence[Mapping[str, Any]], key: str, sizes: Sequence[tuple[int, int]], config: Any
) -> _Joined:
    encodes = bool(model.config.is_encoder_decoder)
    items, tokens = sizes[0]
    of_tokens = _of_tokens(branches, key, sizes, config, left=not encodes) if tokens else {}
    joined: dict[str, Any] = {name: torch.cat(values) for name, values in of_tokens.items()}
    for name in dict.fromkeys(name for inputs in branches for name in inputs):
        if name not in joined:
            given = [inputs[name] for inputs in branches if name in inputs]
            # an encoder reads one of each per item; images of a decoder are as many as its tokens ask for
            joined[name] = _other(name, given, len(branches), items if encodes else None)
    return _Joined(joined, [length for _, length in sizes], items, left=not encodes)


def _key(model: Any, branches: Sequence[Mapping[str, Any]]) -> str:
    """What the prompt is called: the same in all branches."""
    names = ["inputs_embeds", "input_ids"]
    if model.config.is_encoder_decoder and model.main_input_name not in names:
        names = [model.main_input_name]
    found = [[name for name in names if isinstance(inputs.get(name), Tensor)] for inputs in branches]
    for number, (inputs, has) in enumerate(zip(branches, found, strict=True)):
        if len(has) != 1 or has != found[0]:
            wanted = ", or all ".join(reversed(names))
            raise InputError(f"branches: branch {number} has {', '.join(inputs) or 'no inputs'}; all need {wanted}")
    return found[0][0]


def _of_tokens(
    branches: Sequence[Mapping[str, Any]], key: str, sizes: Sequence[tuple[int, int]], config: Any, left: bool
) -> dict[str, list[Tensor]]:
    """What has one entry per token, padded to one length: a decoder's on the left, an encoder's on the right."""
    lengths = [length for _, length in sizes]
    pad, inferred = _padding(config)
    needed = len(set(lengths)) > 1 or any("attention_mask" in inputs for inputs in branches)
    types = {name for inputs in branches for name in inputs if name.endswith("token_type_ids")}
    found: dict[str, list[Tensor]] = {}
    for number, (inputs, size) in enumerate(zip(branches, sizes, strict=True)):
        given = dict(inputs)
        if needed and "attention_mask" not in given:
            mask = torch.ones(size, dtype=torch.long, device=given[key].device)
            # as `generate` does for a decoder
            given["attention_mask"] = (given[key] != pad).long() if key == "input_ids" and left and inferred else mask
        for name in types - given.keys():
            given[name] = torch.zeros(size, dtype=torch.long, device=given[key].device)
        if left and "attention_mask" in given and not given["attention_mask"][:, -1].all():
            raise InputError(f"branches: branch {number} is padded on the right; set padding_side='left'")
        for name, value in given.items():
            per_token = isinstance(value, Tensor) and value.shape == size and name.endswith(("_ids", "_mask"))
            if name == key or (per_token and not name.startswith("decoder_")):
                beside = (0, 0) * (value.dim() - 2) + _beside(size[1], lengths, left)
                padded = F.pad(value, beside, value=pad if name == "input_ids" else 0)
                found.setdefault(name, []).append(padded)
    for name, values in found.items():
        if len(values) < len(branches):
            raise InputError(f"branches: {name} is given for {len(values)} of {len(branches)}; give it for all or none")
    return found


def _other(name: str, values: Sequence[Any], branches: int, items: int | None) -> Any:
    """What has entries of images or of items, or is one for all."""
    if all(isinstance(value, Tensor) and value.dim() for value in values):
        if len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise InputError(f"branches: {name} is {shapes}; all but the first dimension have to be the same")
        if items is not None and (len(values) < branches or any(len(value) != items for value in values)):
            counts = ", ".join(str(len(value)) for value in values)
            raise InputError(
                f"branches: {name} is of {counts} items; {branches} branches of {items} items need it each"
            )
        return torch.cat(list(values))
    if len(values) < branches or any(value is not values[0] and value != values[0] for value in values):
        raise InputError(f"branches: {name} is no tensor, and not the same for all")
    return values[0]
