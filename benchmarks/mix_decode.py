"""Decoding with SmolLM2-135M: as it is loaded, with its cache written in place, with grouped rows, and with policies on these.

Every way decodes the same tokens behind the same keys, in turn, each round in another order; a ratio is of two runs of one
round, in processor seconds. Up to 8,192 tokens the keys are those of a prompt; beyond, where the model has no positions, they
are drawn at random and only time is measured. Before anything is timed, the exact path must give the logits of the model as it
is loaded to 1e-4 and the same greedy tokens, and the cache written in place the same logits to the bit. The last rows are one
layer alone: how long it takes to read all of 16,384 keys, and 256 of them.

    python -m benchmarks.mix_decode [--models FOLDER] [--tokens NUMBERS] [--decoded N] [--rounds N] [--json FILE] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import Spread, machine
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core import grouped
from cenote.mix import KVPolicy, OracleTopK, Quest, SinkWindow, TidalDecode
from cenote.mix.tidaldecode.policy import select_scores
from cenote.models.caches import held
from cenote.models.live.store import adopt, cache_argument, exact_decoding, in_place

MODEL = "smollm2-135m-instruct"
TOKENS = (1024, 4096, 8192, 16384)
POSITIONS = 8192
DECODED, ROUNDS, BUDGET = 24, 5, 256
LOADED, IN_PLACE, EXACT = "as loaded", "in place", "exact path"
LAYER_TOKENS, LAYER_ROUNDS = 16384, 200
Way = Callable[[nn.Module], AbstractContextManager[Any]]


def policies() -> dict[str, KVPolicy]:
    return {
        "sink and window": SinkWindow(BUDGET),
        "TidalDecode (2, 9), shared": TidalDecode(BUDGET, share="kv_head"),
        "TidalDecode (2, 9)": TidalDecode(BUDGET),
        "Quest, pages of 4": Quest(BUDGET, page=4),
        "oracle": OracleTopK(BUDGET),
    }


def ways() -> dict[str, Way]:
    """How each way enters a model; policies stand on the exact path."""
    found: dict[str, Way] = {LOADED: lambda _: nullcontext(), IN_PLACE: in_place, EXACT: exact_decoding}
    return found | {name: _on_exact(policy) for name, policy in policies().items()}


def _on_exact(policy: KVPolicy) -> Way:
    @contextmanager
    def entered(model: nn.Module) -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(exact_decoding(model))
            yield stack.enter_context(policy.on(model))

    return entered


class Prompt:
    """Keys and values of so many tokens, of which each run gets a cache of its own."""

    def __init__(self, model: Any, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(1000, 40000, (1, tokens), generator=generator)
        self.random = tokens >= POSITIONS
        if self.random:
            config = model.config
            shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
            self.held = [tuple(torch.randn(2, *shape, generator=generator)) for _ in range(config.num_hidden_layers)]
        else:
            with torch.no_grad():
                output = model(self.words, use_cache=True, logits_to_keep=1)
            self.held = [(block.keys, block.values) for block in held(output)]

    def cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.held):
            cache.update(keys, values, number)
        return cache


@torch.no_grad()
def decoded(model: Any, prompt: Prompt, way: Way, tokens: int, growing: bool) -> tuple[float, Tensor, Any]:
    """Processor seconds of decoding greedily, the logits, and what entering gave; the first step is not timed."""
    cache = prompt.cache()
    if not growing:
        # one copy of the prompt's keys, as later ones are for the growing cache
        adopt(cache)
    found = []
    with way(model) as run:
        word = prompt.words[:, -1:]
        # where there are no positions further on, all tokens are at the last one
        at = {"position_ids": torch.full((1, 1), POSITIONS - 1)} if prompt.random else {}
        for step in range(tokens + 1):
            if step == 1:
                start = time.process_time()
            logits = model(word, **{cache_argument(model): cache}, **at).logits[:, -1]
            word = logits.argmax(-1, keepdim=True)
            found.append(logits)
        took = time.process_time() - start
    return took, torch.cat(found), run


def require_exact(model: Any, prompt: Prompt, tokens: int) -> float:
    """The largest difference of the exact path's logits.

    Raises:
        AssertionError: where it is above 1e-4, other tokens are drawn, or the cache written in place differs at all.
    """
    kinds = ways()
    loaded, placed, exact = (
        decoded(model, prompt, kinds[name], tokens, name == LOADED)[1] for name in (LOADED, IN_PLACE, EXACT)
    )
    apart = float((loaded - exact).abs().max())
    if not torch.equal(loaded, placed):
        raise AssertionError(f"in place differs by {float((loaded - placed).abs().max()):.1e}")
    if apart > 1e-4 or not torch.equal(loaded.argmax(-1), exact.argmax(-1)):
        raise AssertionError(f"the exact path differs by {apart:.1e}, or draws other tokens")
    return apart


def measured(model: Any, tokens: int, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per token of every way, and how many times faster than both baselines."""
    prompt, kinds = Prompt(model, tokens), ways()
    apart = None if prompt.random else require_exact(model, prompt, min(count, 8))
    names, taken, shares = list(kinds), {name: [] for name in kinds}, {}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            seconds, _, run = decoded(model, prompt, kinds[name], count, name == LOADED)
            taken[name].append(seconds / count * 1e3)
            shares[name] = getattr(run, "share", 1.0)
    rows = {
        name: {
            "ms": asdict(Spread.of(ms)),
            "times the model as loaded": asdict(Spread.of(_ratios(taken[LOADED], ms))),
            "times the exact path": asdict(Spread.of(_ratios(taken[EXACT], ms))),
            "keys read": shares[name],
        }
        for name, ms in taken.items()
    }
    return {"tokens": tokens, "random keys": prompt.random, "exact path off by": apart, "ways": rows}


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


@torch.no_grad()
def one_layer(rounds: int = LAYER_ROUNDS) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer of SmolLM2's shape with 16,384 keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 9, 1, 64, generator=generator)
    k, v = torch.randn(2, 1, 3, LAYER_TOKENS, 64, generator=generator)
    shared, apart = (torch.randint(LAYER_TOKENS, (1, heads, BUDGET), generator=generator) for heads in (3, 9))

    def gathered(numbers: Tensor) -> Tensor:
        return grouped.attend(q, grouped.gathered(k, numbers), grouped.gathered(v, numbers))

    calls: Mapping[str, Callable[[], Tensor]] = {
        "all, keys repeated": lambda: F.scaled_dot_product_attention(q, *(x.repeat_interleave(3, 1) for x in (k, v))),
        "all, sdpa with enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "all, grouped rows": lambda: grouped.attend(q, k, v),
        "scores and their top 256": lambda: select_scores(q, k, 0.125, "kv_head").topk(BUDGET).indices,
        "256 of each key head": lambda: gathered(shared),
        "256 of each query head": lambda: gathered(apart),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: asdict(Spread.of(ms)) for name, ms in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of real models (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", default=",".join(map(str, TOKENS)), help="separated by commas (default %(default)s)"
    )
    parser.add_argument("--decoded", type=int, default=DECODED, help="tokens (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=1, help="that torch may use (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.models / MODEL, dtype=torch.float32).eval()
    results = []
    for tokens in map(int, arguments.tokens.split(",")):
        found = measured(model, tokens, arguments.decoded, arguments.rounds)
        results.append(found)
        off = "random keys" if found["random keys"] else f"exact path off by {found['exact path off by']:.1e}"
        print(f"\n{tokens} tokens ({off})")
        print(f"{'':28}{'ms/token':>10}{'x loaded':>10}{'x exact':>10}{'keys read':>11}")
        for name, row in found["ways"].items():
            loaded, exact = (row[f"times the {of}"]["median"] for of in ("model as loaded", "exact path"))
            print(
                f"{name:28}{row['ms']['median']:10.1f}{loaded:10.2f}{exact:10.2f}{row['keys read']:11.3f}", flush=True
            )
    layer = one_layer()
    print(f"\none layer, {LAYER_TOKENS} keys")
    for name, spread in layer.items():
        print(f"{name:28}{spread['median']:10.3f} ms")
    if arguments.json:
        result = {"machine": machine(), "decoded": arguments.decoded, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps({**result, "lengths": results, "layer": layer}, indent=1))


if __name__ == "__main__":
    main()
