"""Write docs/benchmarks.md and its plots from benchmarks/results/*.json.

python scripts/build_benchmark_page.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
MARK = "<!-- written by scripts/build_benchmark_page.py; do not edit -->"
TITLES = {
    "latent_attention": "Latent queries against `nn.MultiheadAttention`",
    "efficient_probing": "Efficient probing against its formula",
    "pma": "Pooling by multihead attention against PyTorch Geometric",
    "bags": "Ragged bags against padding",
    "attentive_statistics": "Attentive statistics against concatenation",
    "windows": "Window pools against unfold",
    "dense_crf": "The fully connected CRF on a lattice against all pairs",
    "power_means": "Power means of a huge set",
    "attsets": "AttSets against its formula",
    "explain": "Norms of what tokens contribute: Gram form against vectors",
    "aggregations": "Other libraries' aggregations",
    "ragged": "Sums over ragged sets",
    "startup": "Start-up",
}
BOUNDS = {
    "dense_crf": "Over all pairs the kernel is kept up to 64 x 64 pixels and made anew in every step beyond, so that memory "
    "stays where it is. Of the time at 375 x 500 most is the smoothness kernel, which is summed exactly: two products with "
    "matrices of 375 x 375 and 500 x 500 for each class and step.",
}
COLOURS = {"cross_attention": "#00796b", "MultiheadAttention": "#b23c17", "mean": "#777777"}
LOOP_TARGET = 3
AXES = {"tokens": "tokens", "dim": "width of a token", "queries": "queries", "sets": "sets of 196 tokens"}


def main() -> None:
    names = (*TITLES, "products", "scaling", "probe_default", "probe_loop", "streaming_memory", "live", "gpu")
    paths = [RESULTS / f"{name}.json" for name in sorted(names)]
    found = {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}
    PLOTS.mkdir(exist_ok=True)
    lines = [MARK, "", "# Benchmarks", "", *introduction(found)]
    for name, title in TITLES.items():
        if "pairs" in found.get(name, {}):
            lines += section(title, found[name])
            lines += [BOUNDS[name], ""] if name in BOUNDS else []
    if "products" in found:
        lines += products(found["products"])
    if "scaling" in found:
        lines += scaling(found["scaling"])
    if "probe_default" in found:
        lines += probe(found["probe_default"])
    if "probe_loop" in found:
        lines += loop(found["probe_loop"])
    if "streaming_memory" in found:
        lines += stream(found["streaming_memory"])
    if "live" in found:
        lines += live(found["live"])
    lines += gpu(found.get("gpu"))
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def introduction(found: dict[str, Any]) -> list[str]:
    machines = {describe(content["machine"]) for content in found.values() if "machine" in content}
    missing = [title for name, title in TITLES.items() if name not in found]
    lines = [
        "Two ways of computing the same numbers are called in turn (A B A B ...) after a warm-up, and each pair of "
        "neighbouring calls gives one ratio. Shown is the median ratio and, in brackets, what the middle 80 % of the rounds "
        "gave. Results are compared before that: float32 to 1e-5 and float64 to 1e-10 of their largest number; the "
        "sums over ragged sets and the scaling runs to looser bounds that stand in their files; the CRF's lattice is an "
        "approximation, which must give 99 % of the pixels the same class. "
        "Extra memory is what a call takes at its peak above what is there before it.",
        "",
        f"Measured on {'; '.join(sorted(machines))}. `make bench` measures again.",
        "",
    ]
    if missing:
        lines += [f"Not measured yet: {'; '.join(missing)}.", ""]
    return lines


def brief(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{number:.3g}'):g}"


def describe(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}, torch {machine['torch']}"


def section(title: str, content: dict[str, Any]) -> list[str]:
    pairs = content["pairs"]
    memory = any(p.get("ours_bytes") is not None for p in pairs)
    header = ["", "ours", "ms", "theirs", "ms", "times faster", "wanted"]
    header += ["our extra MB", "theirs", "wanted"] if memory else []
    rows = []
    for p in pairs:
        ratio = p["ratio"]
        wanted = p.get("target")
        row = [
            p["name"],
            f"`{p['ours']}`",
            brief(p["ours_ms"]["median"]),
            p["theirs"],
            brief(p["theirs_ms"]["median"]),
            f"**{ratio['median']:.3g}** ({ratio['low']:.3g} to {ratio['high']:.3g})",
            "" if wanted is None else f"{wanted:g}{'' if ratio['median'] >= wanted else ', missed'}",
        ]
        if memory:
            ours, theirs, target = p.get("ours_bytes"), p.get("theirs_bytes"), p.get("memory_target")
            row += ["" if b is None else f"{b / 1e6:.3g}" for b in (ours, theirs)]
            met = target is None or ours is None or ours * target <= theirs
            row.append("" if target is None else f"1/{target:g}{'' if met else ', missed'}")
        rows.append(row)
    notes = [note for note in dict.fromkeys(p.get("note", "") for p in pairs) if note]
    load = content.get("load_before")
    lines = [f"## {title}", "", *table(header, rows), ""]
    for note in notes:
        lines += [note, ""]
    busy = "" if not load else f", 1-minute load before the start {load[0]:.2f}"
    threads = content["machine"]["threads"]
    busy = f", {threads} thread{'s' if threads > 1 else ''}{busy}"
    return [*lines, f"`{content['command']}`{busy}, {pairs[0]['rounds']} rounds.", ""]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def scaling(content: dict[str, Any]) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cenote"
    import matplotlib.pyplot as plt

    for kind, unit, factor in (("seconds", "milliseconds", 1e3), ("extra_bytes", "extra memory, MB", 1e-6)):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
        for axis, (sweep, label) in zip(axes, AXES.items(), strict=True):
            points = [p for p in content["points"] if p["sweep"] == sweep]
            for way, colour in COLOURS.items():
                # less than a page of memory is not told from none
                drawn = [(p["at"], p[kind][way] * factor) for p in points if p[kind].get(way, 0) * factor > 1e-2]
                if drawn:
                    axis.loglog(*zip(*drawn, strict=True), "o-", color=colour, markersize=3, label=way)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(unit)
        handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axes[0].legend(handles.values(), handles.keys(), fontsize=8, frameon=False)
        figure.savefig(PLOTS / f"scaling_{kind}.svg", metadata={"Date": None})
        plt.close(figure)
    low, high = content["wanted"]
    slopes = "; ".join(f"{way} {slope:.2f}" for way, slope in content["slopes"].items())
    ours = content["slopes"]["cross_attention"]
    verdict = "met" if low <= ours <= high else "missed"
    tail = content.get("slopes_from_1000", {}).get("cross_attention")
    return [
        "## Scaling",
        "",
        "One query, 12 heads, forward, one set of 4,096 tokens of width 384 unless varied.",
        "",
        "![Time against tokens, width, queries and sets](benchmarks/scaling_seconds.svg)",
        "",
        "![Extra memory against tokens, width, queries and sets](benchmarks/scaling_extra_bytes.svg)",
        "",
        f"Slope of time against tokens in log-log, 10^2 to 10^6: {slopes}; wanted {low} to {high}: {verdict}."
        + (
            ""
            if tail is None
            else f" From 10^3 on it is {tail:.2f}: below, mapping the queries, which does not depend on the tokens, bounds the "
            "time."
        ),
        "",
        f"`{content['command']}`, {content['machine']['threads']} thread(s).",
        "",
    ]


def products(content: dict[str, Any]) -> list[str]:
    best = content["square"]["rate"]
    names = list(dict.fromkeys(row["name"] for row in content["rows"]))
    rows = []
    for name in names:
        ours, theirs = (row for row in content["rows"] if row["name"] == name)
        spent = ", ".join(f"{op.removeprefix('aten::')} {share:.0%}" for op, share in ours["shares"].items())
        rows.append(
            [
                name,
                f"{ours['operations'] / 1e9:.2f}",
                f"{theirs['operations'] / 1e9:.2f}",
                f"{theirs['operations'] / ours['operations']:.1f}",
                f"{ours['rate'] / 1e9:.0f}",
                f"{theirs['rate'] / 1e9:.0f}",
                f"{theirs['operations'] / ours['operations'] * best / theirs['rate']:.1f}",
                spent,
            ]
        )
    side = content["square"]["side"]
    one = next(row for row in content["rows"] if row["name"].startswith("1 query, forward"))
    header = ["", "our GFLOP", "theirs", "fewer", "our GFLOP/s", "theirs", "most there can be", "our time goes to"]
    return [
        "## What bounds these pools",
        "",
        f"A square product of {side} x {side} in float32 runs at {best / 1e9:.0f} GFLOP/s on these "
        f"{content['machine']['threads']} threads. The table counts what the matrix products of both sides do and how fast; "
        '"most there can be" is how many times faster a pool would be that does our operations at the rate of the square '
        "product and nothing else. torch maps every token to a key and a value in products about as wide as the square one; "
        "12 columns a query are narrow, and so each number that is read serves few operations. `bmm`, `mm` and `addmm` are "
        "products; a percentage is of the whole call.",
        "",
        *table(header, rows),
        "",
        f"At the rate of the square product the {one['operations'] / 1e9:.2f} GFLOP of one query take "
        f"{1e3 * one['operations'] / best:.1f} ms; a plain mean reads the same tokens in the time that stands above. "
        "For every number that it reads, a query of 12 heads does 48 operations, a mean one.",
        "",
        f"`{content['command']}`, 1-minute load before the start {content['load_before']}.",
        "",
    ]


def probe(content: dict[str, Any]) -> list[str]:
    total = sum(content["methods"].values())
    slowest = sorted(content["methods"].items(), key=lambda item: -item[1])
    rows = [[f"`{name}`", f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in slowest]
    return [
        "## Where the seconds of `make probe` go",
        "",
        f"{len(rows)} methods, 3 seeds, on the embedded digits: {content['total_s']} s in all, {content['cpu_s']} s of the "
        f"processors. Training takes {total:.1f} s, summed over methods that run {content['threads']} at a time; 1-minute load "
        f"before the start {content['load_before']}.",
        "",
        *table(["method", "seconds", "of the training"], rows),
        "",
        "`python -m benchmarks.probe_default`.",
        "",
    ]


def loop(content: dict[str, Any]) -> list[str]:
    rows, largest = [], 0.0
    for run in content["runs"]:
        gaps = [
            abs(statistics.mean(row["test_accuracy_together"]) - statistics.mean(row["test_accuracy_one_by_one"]))
            for row in run["methods"].values()
        ]
        largest = max(largest, *gaps)
        met = "" if run["faster"] >= LOOP_TARGET else ", missed"
        rows.append(
            [
                f"{run['epochs']} epochs, {len(gaps)} methods",
                f"{run['together_s']:.1f}",
                f"{run['one_by_one_s']:.1f}",
                f"**{run['faster']:.2f}**",
                f"{LOOP_TARGET}{met}",
            ]
        )
    return [
        "## `cenote probe` against a plain loop",
        "",
        "The same probes, trained together by `cenote probe` and one by one in a plain loop. What is done once, starting "
        "processes and testing among it, is in our time; the loop's is training and validation alone.",
        "",
        *table(["", "`cenote probe`, s", "one by one, s", "times faster", "wanted"], rows),
        "",
        f"Mean test accuracies of the methods differ by {100 * largest:.2f} points at most. "
        f"{content['machine']['threads']} threads, 1-minute load before the start {content['load_before']}.",
        "",
        "Together the probes of a method share one read of the tokens and the calls of one step, which is what a step of a "
        "cheap pool consists of, and a pool without parameters pools each item once for all epochs. What bounds the rest are "
        "the products of the probes themselves, which a loop on two threads does almost as fast (`efficient-probing`, "
        "`abmil`).",
        "",
        f"`{content['command']}`.",
        "",
    ]


def stream(content: dict[str, Any]) -> list[str]:
    memory, state = content["resident_bytes"], content["state_bytes"]
    return [
        "## An hour of a stream",
        "",
        f"`AttentiveTemporalPool` over {content['frames']:,} frames of width {content['dim']}, {content['chunk']} at a time: "
        f"{content['seconds']} s on one thread. Resident memory, read after every minute of the stream: "
        f"{min(memory) / 2**20:.1f} to {max(memory) / 2**20:.1f} MiB, growth **{100 * content['growth']:.2f} %** (allowed 5). "
        f"State of the stream: {max(state):,} bytes, at its largest.",
        "",
        f"`{content['command']}`.",
        "",
    ]


def live(content: dict[str, Any]) -> list[str]:
    def ratio(spread: dict[str, float]) -> str:
        return f"**{spread['median']:.3f}** ({spread['low']:.3f} to {spread['high']:.3f})"

    rows = []
    plain, *others = content["forward"]
    extra = content["extra_bytes"]
    for found in (plain, *others):
        name, spent = found["name"], found["cpu_ratio"]
        most = content["at_most"].get(name)
        rows.append(
            [
                name,
                f"{found['cpu_s']['median']:.2f}",
                "" if found is plain else ratio(spent),
                "" if most is None else f"at most {most:.2f}{met(spent['median'] <= most)}",
                f"{extra[name] / 1e6:.1f}" if name in extra else "",
            ]
        )
    base, edited = content["decoding"]
    # tokens per second: the other way round
    spent = edited["cpu_ratio"]
    speed = {"median": 1 / spent["median"], "low": 1 / spent["high"], "high": 1 / spent["low"]}
    least = content["decoding_at_least"]
    steps = [
        [base["name"], f"{base['cpu_s']['median']:.2f}", "", ""],
        [
            edited["name"],
            f"{edited['cpu_s']['median']:.2f}",
            ratio(speed),
            f"at least {least:.2f}{met(speed['median'] >= least)}",
        ],
    ]
    more, most = (extra["rows recorded"] - extra["as loaded"]) / 1e6, content["recording_bytes_at_most"] / 1e6
    long = {name: value / 1e6 for name, value in content["long_extra_bytes"].items()}
    long_most = content["long_bytes_at_most"] / 1e6
    share = plain["cpu_s"]["median"] / plain["wall_s"]["median"]
    return [
        "## Looking into a running model",
        "",
        f"`cenote.models.live` on SmolLM2-135M (30 blocks, 9 heads), float32, {content['tokens']:,} tokens, logits of the last "
        "one: as it is loaded (sdpa), with the last row of all layers recorded, recorded and edited, and in eager. Seconds are "
        "the processor's, the system's work left out; a ratio is of two runs of one round.",
        "",
        *table(["", "s", "of as loaded", "wanted", "extra MB"], rows),
        "",
        f"Recorded rows are eager's to {content['largest_difference']:.0e}. Recording takes {more:.1f} MB more than the model "
        f"as it is loaded (wanted at most {most:.0f}{met(more <= most)}). At {content['long_tokens']:,} tokens a run takes "
        f"{long['as loaded']:.0f} MB, with rows recorded {long['rows recorded']:.0f} MB (wanted at most "
        f"{long_most:.0f}{met(long['rows recorded'] <= long_most)}).",
        "",
        f"Decoding {content['decoded_tokens']} tokens behind {content['prompt_tokens']}, the last row of all layers edited at "
        "each:",
        "",
        *table(["", "s", "tokens a second, of decoding as loaded", "wanted"], steps),
        "",
        f"`{content['command']}`, {content['machine']['threads']} thread(s), {content['rounds']} rounds. 1-minute load before "
        f"the start {content['load_before'][0]:.2f} on {content['machine']['cores']} cores; of a second on the clock the "
        f"process had {share:.2f} s of a core.",
        "",
    ]


def met(is_met: bool) -> str:
    return "" if is_met else ", missed"


def gpu(content: dict[str, Any] | None) -> list[str]:
    lines = ["## GPU", ""]
    if content is None:
        return [
            *lines,
            "Not measured: no machine with a GPU was at hand. The kernels are tested under Triton's interpreter against "
            "float64 and compiled for Hopper; `python -m benchmarks.gpu` measures them on a CUDA GPU, and ends with exit "
            "code 2 elsewhere.",
        ]
    rates = [[r["name"], f"{r['bytes_per_second'] / 1e9:.0f}", f"{r['of_copy']:.0%}"] for r in content["rates"]]
    header = ["", "GB/s of tokens", "of a measured copy"]
    return [*lines, f"{content['device']}, torch {content['torch']}.", "", *table(header, rates), ""]


if __name__ == "__main__":
    main()
