"""Several variants of the inputs decoded together: one forward of branch x batch rows, one drawn token for all of them.

`generate` of transformers prepares all rows as one batch, with its masks, positions and cache. Its decoding loop then runs on a
stand-in of the model, which shows it the first branch's rows and the combined logits. So whatever acts in the loop (sampling,
processors, stopping, streaming) works as ever and once per item, and the model itself is not touched.

What it does not know: beams, assisted decoding, prefilling in chunks, encoder-decoders, compiled steps, a cache given from
before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core import InputError
from cenote.models.live import places, seats
from cenote.models.live.calls import Place
from cenote.models.live.edited import Run, check_spans, edited
from cenote.models.live.edits import Edit
from cenote.models.live.parts import of_part

Combine = Callable[[Float[Tensor, "branches batch vocab"], int], Float[Tensor, "batch vocab"]]
CACHES = ("past_key_values", "cache", "cache_params")
MODES = ("greedy_search", "sample")


@dataclass(frozen=True, eq=False)
class Branch:
    """One variant of the inputs, of the same items as the other branches.

    Args:
        inputs: as for `model.generate`: input_ids or inputs_embeds, attention_mask, pixel_values... Prompts of several lengths are
            padded on the left.
        weight: of its logits, where branches are summed.
        edits: act on this branch's rows alone, in the decoder.
        spans: of this branch's tokens, `[batch, tokens]`.
    """

    inputs: Mapping[str, Any]
    weight: float = 1.0
    edits: Sequence[Edit] = ()
    spans: Mapping[str, Bool[Tensor, "batch tokens"]] | None = None


class Branches:
    """Branches, and how their next-token logits become one.

    Args:
        branches: one or more.
        combine: logits `[branches, batch, vocab]` in float32, and the number of the step -> `[batch, vocab]`; by default the sum
            with the branches' weights (1 + a and -a contrast two).

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
    """

    def __init__(self, branches: Sequence[Branch], combine: Combine | None = None) -> None:
        if not branches:
            raise InputError("branches: give at least one")
        self.branches = tuple(branches)
        self.combine = combine or self._summed
        self.effect: Counter[tuple[Place, int]] = Counter()

    def generate(self, model: Any, *, streamer: Any = None, **options: Any) -> Any:
        """What `model.generate` gives for the first branch, with tokens drawn from the combined logits.

        Processors, stopping criteria and limits of length see the first branch, padded to the longest branch's length.

        Args:
            model: a decoder of transformers.
            streamer: as for `model.generate`.
            options: of `model.generate`, without inputs: do_sample, max_new_tokens, logits_processor, return_dict_in_generate...
                Logits and scores that it returns are the combined ones; a cache, attentions and states are of all rows.

        Raises:
            InputError: where inputs don't fit together; for beams, assistants, prefilling in chunks, encoder-decoders; as
                `edited` for the branches' edits.
        """
        _check(model, options)
        pad = _padding(model, options)
        inputs, lengths, batch = _joined([branch.inputs for branch in self.branches], pad)
        options = _with_stop_strings(options)
        loop = _Loop(self.combine, len(self.branches), max(lengths) - lengths[0], "inputs_embeds" in inputs, streamer)
        with ExitStack() as stack:
            run = self._enter(stack, model, lengths, batch)
            if run is not None:
                self.effect = run.effect
            return model.generate(**{"disable_compile": True, **options}, **inputs, custom_generate=loop.decode)

    def _summed(self, logits: Tensor, step: int) -> Tensor:
        weights = logits.new_tensor([branch.weight for branch in self.branches])
        return (weights[:, None, None] * logits).sum(0)

    def _enter(self, stack: ExitStack, model: nn.Module, lengths: Sequence[int], batch: int) -> Run | None:
        edits: list[Edit] = []
        decoder: list[str] | None = None
        for number, branch in enumerate(self.branches):
            if not branch.edits:
                continue
            if decoder is None:
                decoder = _stacks_of_decoder(model)
            spans = dict(branch.spans or {})
            check_spans(spans)
            for name, span in spans.items():
                if span.shape != (batch, lengths[number]):
                    raise InputError(
                        f"spans: {name!r} of branch {number} is {tuple(span.shape)}, and its inputs are {(batch, lengths[number])}"
                    )
            spans = {name: F.pad(span, (max(lengths) - lengths[number], 0)) for name, span in spans.items()}
            edits += [of_part(edit, number, len(self.branches), spans, decoder) for edit in branch.edits]
        return stack.enter_context(edited(model, *edits)) if edits else None


class _Loop:
    """The decoding loop of transformers, on a stand-in of the model."""

    def __init__(self, combine: Combine, branches: int, extra: int, embeds: bool, streamer: Any) -> None:
        self.combine, self.branches, self.extra, self.embeds, self.streamer = combine, branches, extra, embeds, streamer
        self.step = 0

    def decode(
        self,
        model: Any,
        input_ids: Int[Tensor, "rows tokens"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate` when all is prepared, for all rows."""
        _check_mode(generation_config)
        lead = input_ids[: len(input_ids) // self.branches]
        # of embedded prompts no tokens are known
        extra = 0 if self.embeds else self.extra
        if self.streamer is not None:
            self.streamer.put(lead[:, extra:].cpu())
        out = type(model)._sample(
            self._standing_in(model, input_ids),
            lead,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=self.streamer,
            **model_kwargs,
        )
        if isinstance(out, Tensor):
            return out[:, extra:]
        out.sequences = out.sequences[:, extra:]
        return out

    def _standing_in(self, model: Any, prompts: Int[Tensor, "rows tokens"]) -> Any:
        """An object of the model's class with the model's parts, whose steps are of the rows of all branches."""

        def prepare(input_ids: Int[Tensor, "batch tokens"], *args: Any, **kwargs: Any) -> Any:
            drawn = input_ids[:, prompts.shape[1] :].repeat(self.branches, 1)
            return model.prepare_inputs_for_generation(torch.cat([prompts, drawn], 1), *args, **kwargs)

        def forward(**inputs: Any) -> Any:
            out = model(**inputs)
            logits = out.logits[:, -1].to(torch.float32, copy=True)
            logits = logits.view(self.branches, -1, logits.shape[-1])
            combined = self.combine(logits, self.step)
            if not isinstance(combined, Tensor) or combined.shape != logits.shape[1:]:
                got = tuple(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
                raise InputError(f"combine: gave {got}, expected [batch, vocab] {tuple(logits.shape[1:])}")
            self.step += 1
            out.logits = combined[:, None]
            return out

        double = object.__new__(type(model))
        double.__dict__.update(model.__dict__)
        # hooks belong to the model, which is called from within
        hooks = {name: type(held)() for name, held in vars(model).items() if isinstance(held, dict) and "_hooks" in name}
        double.__dict__.update(hooks, prepare_inputs_for_generation=prepare, forward=forward)
        return double


def _check(model: Any, options: Mapping[str, Any]) -> None:
    if not hasattr(model, "generate"):
        raise InputError(f"model: {type(model).__name__} has no generate(); give a decoder of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model: {type(model).__name__} is an encoder-decoder; branches are of decoders")
    for name in ("input_ids", "inputs", "inputs_embeds", "attention_mask", "custom_generate"):
        if name in options:
            raise InputError(f"{name}: is no option here; inputs belong to the branches")
    if options.get("assistant_model") is not None:
        raise InputError("assistant_model: assisted decoding draws several tokens at once; decode without it")
    for module in model.modules():
        for seated in seats.at(module):
            if getattr(seated.run, "spans", None):
                raise InputError(
                    "spans: the model is edited with spans of one batch, and branches have rows and lengths of their own; give "
                    "edits and spans to the branches"
                )


def _check_mode(config: Any) -> None:
    mode = str(config.get_generation_mode().value)
    if mode not in MODES:
        raise InputError(f"options: ask for {mode}; branches are decoded greedily or sampled: num_beams=1, no assistant")
    if getattr(config, "prefill_chunk_size", None) is not None:
        raise InputError("prefill_chunk_size: branches are prefilled in one piece; leave it out")


def _padding(model: Any, options: Mapping[str, Any]) -> int:
    config = options.get("generation_config") or model.generation_config
    for token in (options.get("pad_token_id"), config.pad_token_id, options.get("eos_token_id"), config.eos_token_id):
        if token is not None:
            return int(token if isinstance(token, int) else torch.as_tensor(token).flatten()[0])
    return 0


def _with_stop_strings(options: Mapping[str, Any]) -> dict[str, Any]:
    """`generate` loses the tokenizer where it's given a loop."""
    options = dict(options)
    tokenizer = options.pop("tokenizer", None)
    strings = options.pop("stop_strings", None)
    if strings is None:
        return options
    if tokenizer is None:
        raise InputError("stop_strings: need the tokenizer; give tokenizer=")
    from transformers import StoppingCriteriaList, StopStringCriteria

    own = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    return {**options, "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or []), own])}


def _stacks_of_decoder(model: Any) -> list[str]:
    """Rows of other towers are images, not items."""
    inside = set(model.get_decoder().modules())
    return [stack for stack in places.stacks(model) if model.get_submodule(stack) in inside]


def _joined(branches: Sequence[Mapping[str, Any]], pad: int) -> tuple[dict[str, Any], list[int], int]:
    """Inputs of all branches as one batch, branch by branch; how long each one's prompt is; items of a branch."""
    key = "inputs_embeds" if "inputs_embeds" in branches[0] else "input_ids"
    sizes: list[tuple[int, int]] = []
    for number, inputs in enumerate(branches):
        prompt = inputs.get(key)
        if not isinstance(prompt, Tensor) or (key == "input_ids") == ("inputs_embeds" in inputs):
            raise InputError(
                f"branches: branch {number} has {', '.join(inputs) or 'no inputs'}; all need input_ids, or all inputs_embeds"
            )
        if prompt.dim() != (2 if key == "input_ids" else 3) or not prompt.numel():
            raise InputError(f"branches: {key} of branch {number} is {tuple(prompt.shape)}, expected [batch, tokens...]")
        if any(inputs.get(name) is not None for name in CACHES):
            raise InputError(f"branches: branch {number} brings a cache; give its whole prompt")
        sizes.append((prompt.shape[0], prompt.shape[1]))
    batch = sizes[0][0]
    if any(size[0] != batch for size in sizes):
        raise InputError(f"branches: are of {', '.join(str(size[0]) for size in sizes)} items; all need the same")
    of_tokens = _of_tokens(branches, key, sizes, pad)
    names = dict.fromkeys(name for inputs in branches for name, value in inputs.items() if value is not None)
    joined: dict[str, Any] = {name: torch.cat(values) for name, values in of_tokens.items()}
    for name in names:
        if name not in joined:
            given = [inputs[name] for inputs in branches if inputs.get(name) is not None]
            joined[name] = _other(name, given, len(branches))
    return joined, [length for _, length in sizes], batch


def _of_tokens(
    branches: Sequence[Mapping[str, Any]], key: str, sizes: Sequence[tuple[int, int]], pad: int
) -> dict[str, list[Tensor]]:
    """What has one entry per token, padded on the left to one length."""
    most = max(length for _, length in sizes)
    needed = any(length != most for _, length in sizes) or any(b.get("attention_mask") is not None for b in branches)
    types = {name for inputs in branches for name in inputs if name.endswith("token_type_ids")}
    found: dict[str, list[Tensor]] = {}
    for number, (inputs, size) in enumerate(zip(branches, sizes, strict=True)):
        given = {name: value for name, value in inputs.items() if value is not None}
        if needed and "attention_mask" not in given:
            if key == "input_ids" and (given[key] == pad).any():
                raise InputError(
                    f"branches: input_ids of branch {number} hold the padding token {pad}; give its attention_mask too"
                )
            given["attention_mask"] = torch.ones(size, dtype=torch.long, device=given[key].device)
        for name in types - given.keys():
            given[name] = torch.zeros(size, dtype=torch.long, device=given[key].device)
        if "attention_mask" in given and not given["attention_mask"][:, -1].all():
            raise InputError(f"branches: branch {number} is padded on the right; set padding_side='left'")
        for name, value in given.items():
            per_token = isinstance(value, Tensor) and value.shape == size and name.endswith(("_ids", "_mask"))
            if name == key or per_token:
                front = (0, 0) * (value.dim() - 2) + (most - size[1], 0)
                padded = F.pad(value, front, value=pad if name == "input_ids" else 0)
                found.setdefault(name, []).append(padded)
    for name, values in found.items():
        if len(values) < len(branches):
            raise InputError(f"branches: {name} is given for {len(values)} of {len(branches)}; give it for all or none")
    return found


def _other(name: str, values: Sequence[Any], branches: int) -> Any:
    """What has entries of images, or is one for all."""
    if all(isinstance(value, Tensor) and value.dim() for value in values):
        if len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise InputError(f"branches: {name} is {shapes}; all but the first dimension have to be the same")
        return torch.cat(list(values))
    if len(values) < branches or any(value is not values[0] and value != values[0] for value in values):
        raise InputError(f"branches: {name} is no tensor, and not the same for all")
    return values[0]
