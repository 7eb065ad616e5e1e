"""Attention rollout of one token of a long text: the row that is chained through all layers of SmolLM2-135M.

The maps of all layers would take 72 GB at 8,192 tokens. Extra memory is the peak above what was resident before.

    python -m benchmarks.chaining [--models FOLDER] [--json FILE] [--threads N] [--tokens N]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from benchmarks.live import LONG, LONG_BYTES, MODEL, random_words, status
from benchmarks.timing import machine

from cenote.core.memory import return_freed_blocks, return_holes
from cenote.explain import AttentionRollout

WARM_UP_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of real models (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=LONG, help="of the text (default %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.models / MODEL
    if not folder.is_dir():
        parser.error(f"no {MODEL} in {arguments.models}; fetch it with `make models`, or name the folder with --models")
    from transformers import AutoModelForCausalLM

    return_freed_blocks()
    torch.set_num_threads(arguments.threads)
    before = machine()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    explainer = AttentionRollout(query="last")
    explainer.explain(model, {"input_ids": random_words(WARM_UP_TOKENS)})
    words = random_words(arguments.tokens)
    return_holes()
    Path("/proc/self/clear_refs").write_text("5")
    resident, start, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    scores = explainer.explain(model, {"input_ids": words}).scores
    content = {
        "command": "python -m benchmarks.chaining",
        "machine": before,
        "tokens": arguments.tokens,
        "extra_bytes": status("VmHWM") - resident,
        "extra_bytes_at_most": LONG_BYTES,
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "sum_of_scores": round(float(scores.sum()), 4),
    }
    print(json.dumps(content, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
