"""What looking into a running language model costs: SmolLM2-135M as it's loaded, with rows recorded and edited, and in eager.

All ways run in turn in one process, each round in another order; a ratio is of two runs of one round. What is wanted is asked
of processor seconds, those that the process itself spent (not the system for it), as others may use the machine meanwhile.
Extra memory is a run's peak above what was resident before it, each in a process of its
own; the model's logits are asked for of the last token alone.

    python -m benchmarks.live [--models FOLDER] [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import Spread, machine
from torch import Tensor

from cenote.models.live import AttentionCall, RowEdit, RowRecorder, edited

MODEL = "smollm2-135m-instruct"
TOKENS, LONG, PROMPT, DECODED = 1024, 8192, 256, 64
LOADED, RECORDED, EDITED, EAGER, MAPS = (
    "as loaded",
    "rows recorded",
    "rows recorded and edited",
    "eager",
    "eager, all maps",
)
DECODING, DECODING_EDITED = "decoding", "decoding, rows edited"
AT_MOST = {RECORDED: 1.05, EDITED: 1.10}
DECODING_AT_LEAST = 0.90
RECORDING_BYTES, LONG_BYTES = 20e6, 1.5e9
WARM_UP_TOKENS = 64


class Towards(RowEdit):
    """The last row gives the first half of the keys twice the weight."""

    def queries(self, call: AttentionCall) -> Tensor:
        return call.last()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        half = torch.arange(call.keys, device=weights.device) < call.keys // 2
        new = torch.where(half, 2.0 * weights, weights)
        return new / new.sum(-1, keepdim=True)


class Ways:
    """The model, and what is done with it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def forward(self, way: str, words: Tensor) -> Any:
        """Once; what was recorded, or the last token's logits."""
        options = {"use_cache": False, "logits_to_keep": 1}
        if way == LOADED:
            return self.model(words, **options).logits
        if way in (RECORDED, EDITED):
            recorder = RowRecorder()
            with edited(self.model, *([Towards()] if way == EDITED else []), recorder):
                self.model(words, **options)
            return recorder.found.stack()
        with self.eager():
            output = self.model(words, **options, output_attentions=way == MAPS)
            return output.attentions if way == MAPS else output.logits

    @torch.no_grad()
    def decode(self, way: str, words: Tensor) -> Tensor:
        settings = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(words)
        if way == DECODING:
            return self.model.generate(words, attention_mask=mask, **settings)
        with edited(self.model, Towards()):
            return self.model.generate(words, attention_mask=mask, **settings)

    @contextmanager
    def eager(self) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)


def random_words(tokens: int) -> Tensor:
    return torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))


def require_same_rows(ways: Ways) -> float:
    """The largest difference between recorded rows and those of eager's maps.

    Raises:
        AssertionError: where it's above 1e-5.
    """
    words = random_words(TOKENS)
    rows = ways.forward(RECORDED, words)
    maps = ways.forward(MAPS, words)
    difference = max(float((a - m[:, :, -1:]).abs().max()) for a, m in zip(rows, maps, strict=True))
    if not difference <= 1e-5:
        raise AssertionError(f"recorded rows differ from eager's by {difference:.1e}")
    return difference


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each, a pair per round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), user_seconds()
            calls[name]()
            spent = time.perf_counter() - wall, user_seconds() - cpu
            # the first round is a warm-up
            if number:
                found[name].append(spent)
    return found


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def row(name: str, times: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, Any]:
    walls, cpus = zip(*times, strict=True)
    base_walls, base_cpus = zip(*base, strict=True)
    return {
        "name": name,
        "wall_s": asdict(Spread.of(walls)),
        "cpu_s": asdict(Spread.of(cpus)),
        "wall_ratio": asdict(Spread.of([a / b for a, b in zip(walls, base_walls, strict=True)])),
        "cpu_ratio": asdict(Spread.of([a / b for a, b in zip(cpus, base_cpus, strict=True)])),
    }


def peak(folder: Path, way: str, tokens: int) -> int:
    """In the child: bytes at the peak of one run above what was resident before."""
    from cenote.core.memory import return_freed_blocks, return_holes

    return_freed_blocks()
    ways = Ways(folder)
    ways.forward(way, random_words(WARM_UP_TOKENS))
    words = random_words(tokens)
    return_holes()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = ways.forward(way, words)
    found = status("VmHWM") - before
    del kept
    return found


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peaks(folder: Path, asked: list[tuple[str, int]]) -> list[int]:
    """Of several runs at the same time, each in a process of its own."""
    started = []
    for way, tokens in asked:
        words = [sys.executable, "-m", "benchmarks.live", "--models", str(folder.parent), "--peak", way]
        started.append(subprocess.Popen([*words, str(tokens)], stdout=subprocess.PIPE, text=True))
    found = []
    for process in started:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, process.args))} failed")
        found.append(int(out.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of real models (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is called (default %(default)s)")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "TOKENS"), help="measure one run's memory alone")
    arguments = parser.parse_args()
    folder = arguments.models / MODEL
    if not folder.is_dir():
        parser.error(f"no {MODEL} in {arguments.models}; fetch it with `make models`, or name the folder with --models")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(folder, arguments.peak[0], int(arguments.peak[1])))
        return
    before = machine()
    ways = Ways(folder)
    difference = require_same_rows(ways)
    words, prompt = random_words(TOKENS), random_words(PROMPT)
    whole = timed(
        {way: lambda way=way: ways.forward(way, words) for way in (LOADED, RECORDED, EDITED, EAGER, MAPS)},  # type: ignore[misc]
        arguments.rounds,
    )
    decoded = timed(
        {way: lambda way=way: ways.decode(way, prompt) for way in (DECODING, DECODING_EDITED)},  # type: ignore[misc]
        arguments.rounds,
    )
    del ways
    plain, recorded = peaks(folder, [(LOADED, TOKENS), (RECORDED, TOKENS)])
    (maps,) = peaks(folder, [(MAPS, TOKENS)])
    long_plain, long_recorded = peaks(folder, [(LOADED, LONG), (RECORDED, LONG)])
    forward = [row(name, times, whole[LOADED]) for name, times in whole.items()]
    decoding = [row(name, times, decoded[DECODING]) for name, times in decoded.items()]
    content = {
        "command": "python -m benchmarks.live",
        "machine": before,
        "load_before": before["load"],
        "rounds": arguments.rounds,
        "tokens": TOKENS,
        "long_tokens": LONG,
        "prompt_tokens": PROMPT,
        "decoded_tokens": DECODED,
        "largest_difference": difference,
        "forward": forward,
        "decoding": decoding,
        "extra_bytes": {LOADED: plain, RECORDED: recorded, MAPS: maps},
        "long_extra_bytes": {LOADED: long_plain, RECORDED: long_recorded},
        "at_most": AT_MOST,
        "decoding_at_least": DECODING_AT_LEAST,
        "recording_bytes_at_most": RECORDING_BYTES,
        "long_bytes_at_most": LONG_BYTES,
    }
    show(content)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def show(content: dict[str, Any]) -> None:
    print(f"{'':<28}{'wall s':>9}{'CPU s':>9}{'wall ratio':>12}{'CPU ratio':>11}{'wanted':>9}")
    for found in [*content["forward"], *content["decoding"]]:
        name = found["name"]
        wanted = content["at_most"].get(name, "")
        numbers = [found[key]["median"] for key in ("wall_s", "cpu_s", "wall_ratio", "cpu_ratio")]
        print(f"{name:<28}{numbers[0]:9.3f}{numbers[1]:9.3f}{numbers[2]:12.3f}{numbers[3]:11.3f}{wanted:>9}")
    speed = 1 / content["decoding"][1]["cpu_ratio"]["median"]
    print(f"\ntokens per second with a row edited: {speed:.3f} of decoding, wanted {DECODING_AT_LEAST}")
    print("extra MB:", {name: round(value / 1e6, 1) for name, value in content["extra_bytes"].items()})
    print(f"at {LONG} tokens:", {name: round(value / 1e6, 1) for name, value in content["long_extra_bytes"].items()})


if __name__ == "__main__":
    main()
