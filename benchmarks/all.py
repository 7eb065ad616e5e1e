"""Every benchmark, one after the other, each in a process of its own; results go to `benchmarks/results`.

A benchmark that needs a package which is not installed, or real models that are not there, is left out, and said so. Then
`scripts/build_benchmark_page.py` makes `docs/benchmarks.md` of the results. With nothing else running, all together
take about 15 minutes on 2 cores.

    python -m benchmarks.all [--only NAMES] [--threads N] [--folder FOLDER] [--models FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "latent_attention": (),
    "efficient_probing": (),
    "products": (),
    "pma": ("torch_geometric",),
    "bags": ("torchmil",),
    "attentive_statistics": (),
    "windows": (),
    "dense_crf": (),
    "power_means": (),
    "attsets": (),
    "aggregations": ("torch_geometric", "sentence_transformers"),
    "ragged": (),
    "scaling": (),
    "startup": (),
    "probe_default": (),
    "probe_loop": (),
    "live": ("transformers",),
    "explain": (),
    "chaining": ("transformers",),
}
"""Name of a benchmark -> the packages of others that it is compared with, or needs."""
FIXED_THREADS = ("probe_default", "live", "explain", "chaining")
OF_REAL_MODELS = ("live", "chaining")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names separated by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="(default %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="of real models (default %(default)s)")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    start, failed = time.perf_counter(), []
    for name in names:
        missing = [package for package in BENCHMARKS[name] if importlib.util.find_spec(package) is None]
        print(f"\n== {name}", flush=True)
        if missing:
            print(f"left out: {', '.join(missing)} not installed; pip install 'cenote[bench]'")
            continue
        if name in OF_REAL_MODELS and not arguments.models.is_dir():
            print(f"left out: no folder {arguments.models} of real models; fetch them with `make models`")
            continue
        began = time.perf_counter()
        words = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(arguments.folder / f"{name}.json")]
        words += [] if name in FIXED_THREADS else ["--threads", str(arguments.threads)]
        words += ["--models", str(arguments.models)] if name in OF_REAL_MODELS else []
        if subprocess.run(words, check=False).returncode:
            failed.append(name)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"\n{len(names)} benchmarks in {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
