"""The results of the serving benchmark as Markdown tables, and a plot of how many sequences share a KV pool."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.markdown_page import markdown_table
from benchmarks.serve.prefix_caching import WITH, WITHOUT
from benchmarks.serve.servers import FULL, PEERS, PLAN, PLAN_STREAMS, TRANSFORMERS

SECTION = "serve"
"""Name of the page's markers."""

MEBIBYTE = 2**20
MISSING, FAILED = "–", "failed"

LOAD_COLUMNS = (
    "TTFT p50 / p99",
    "TPOT p50 / p99",
    "requests/s",
    "tokens/s",
    "goodput/s",
    "completed",
    "rejected",
    "failed",
    "KV allocated",
)

Results = Mapping[str, Any]


def format_tables(results: Results) -> str:
    """Return a table of measurements with their aims, then one per load; `transformers serve` comes first."""
    config = results["config"]
    lengths = f"{config.get('prompt_tokens', 0):,} + {config.get('output_tokens', 0)} tokens"
    tables = []
    if rows := _aim_rows(results):
        tables.append(markdown_table(["serving", "measured", "aim"], rows))
    if "pinned_prefix" in results:
        title = f"{config['concurrency']} clients with one pinned prefix, {lengths}"
        tables.append(_format_loads(results["pinned_prefix"], title))
    if "prefix_caching" in results:
        tables.append(_prefix_caching_table(results["prefix_caching"], config))
    if "closed_loop" in results:
        title = f"closed loop, {config['concurrency']} clients, {lengths}"
        tables.append(_format_loads(results["closed_loop"], title))
        tables += [
            f"{name} failed: {load['error']}" for name, load in results["closed_loop"].items() if "error" in load
        ]
    if "open_loop" in results:
        shortest, longest = config["prompt_token_range"]
        title = f"open loop, {shortest:,} to {longest:,} + {config['output_tokens']} tokens"
        rows = [[row["server"], f"{row['rate']:.3f}", *_load_cells(row)] for row in results["open_loop"]]
        tables.append(markdown_table([title, "requests/s sent", *LOAD_COLUMNS], rows))
    return "\n\n".join(tables)


def _aim_rows(results: Results) -> list[list[str]]:
    rows = []
    for part, format_rows in (
        ("closed_loop", _closed_loop_rows),
        ("concurrent_sequences", _concurrent_sequences_rows),
        ("pinned_prefix", _pinned_prefix_rows),
        ("engine_overhead", _engine_overhead_rows),
        ("decode_alongside_prefill", _alongside_prefill_rows),
    ):
        if part in results:
            rows += format_rows(results[part], results["config"])
    return rows


def _closed_loop_rows(loads: Results, config: Results) -> list[list[str]]:
    ours = loads[PLAN]
    load = f"{config['concurrency']} clients, prompts of {config['prompt_tokens']:,} tokens"
    streams = _latency_ratio(loads[PLAN_STREAMS], loads[TRANSFORMERS], "tpot")
    prompts = ours["prompts_per_second"]
    alone = f"{ours['requests_per_second'] / prompts:.2f} ×" if prompts else FAILED
    rows = []
    for peer in PEERS:
        theirs, aims = loads[peer], ("≥ 1.3 ×", "≤ 0.8 ×", "≤ 1.5 ×") if peer == TRANSFORMERS else ("", "", "")
        rows += [
            [f"requests per second over those of `{peer}`, {load}", _rate_ratio(ours, theirs), aims[0]],
            [f"median TTFT over that of `{peer}`", _latency_ratio(ours, theirs, "ttft"), aims[1]],
            [f"median TPOT over that of `{peer}`", _latency_ratio(ours, theirs, "tpot"), aims[2]],
        ]
    return [
        *rows,
        [f"the same over `{TRANSFORMERS}`, with {PLAN_STREAMS.rpartition(', ')[2]}", streams, "≤ 1.0 ×"],
        ["requests per second over those with one token after each prompt", alone, "≥ 0.85 ×"],
        ["median TPOT over that of our own full plan", _latency_ratio(ours, loads[FULL], "tpot"), ""],
    ]


def _concurrent_sequences_rows(counts: Results, config: Results) -> list[list[str]]:
    ours, full = counts[PLAN], counts[FULL]
    pool = f"{config['pool_bytes'] / MEBIBYTE:.0f} MiB"
    label = f"sequences of {config['prompt_tokens']:,} tokens that ran together in {pool}, over the full plan's"
    ratio = ours["running"] / max(1, full["running"])
    measured = f"{ours['running']} / {full['running']} = {ratio:.1f} ×, {ours['failed'] + full['failed']} failed"
    return [[label, measured, "≥ 6 ×, none failed"]]


def _pinned_prefix_rows(loads: Results, config: Results) -> list[list[str]]:
    load = f"{config['concurrency']} clients with one pinned prefix of {config['prompt_tokens']:,} tokens"
    ratio = _rate_ratio(loads[PLAN], loads[FULL])
    return [[f"requests per second over those of our own full plan, {load}", ratio, "≥ 3 ×"]]


def _prefix_caching_table(results: Results, config: Results) -> str:
    """Return latencies and rates of the loads that share prefixes, and what a remembered prompt takes."""
    rows = []
    for kind, singular in (("documents", "question about a document"), ("chats", "turn of a chat")):
        loads, plain = results[WITH][kind], results[WITHOUT][kind]
        for part in ("first", "later"):
            ours, theirs = loads[part], plain[part]
            rows.append(
                [
                    f"{part} {singular}",
                    f"{ours['requests']}, {ours['failed'] + theirs['failed']} failed",
                    " / ".join(
                        FAILED if _has_failed(load) else f"{load['ttft']['p50']:.2f} s" for load in (ours, theirs)
                    ),
                    _latency_ratio(ours, theirs, "ttft"),
                    _rate_ratio(ours, theirs),
                ]
            )
    share = results[WITH]["documents"]["cached_bytes_per_prompt"] / results["full_bytes_per_document"]
    title = f"{config['clients']} clients, documents of {config['document_tokens']:,} tokens"
    columns = [title, "requests", "median TTFT with / without", "TTFT", "requests/s"]
    return markdown_table(columns, rows) + f"\n\nA remembered document takes {share:.3f} of its full cache in 16 bits."


def _engine_overhead_rows(steps: Results, config: Results) -> list[list[str]]:
    ours, full_seconds = steps[PLAN], steps[FULL]["step_seconds"]
    overhead = f"{100 * ours['overhead']:.1f} % of {ours['forward_seconds'] * 1000:.0f} ms"
    batch = f"{ours['batch_size']} × {config['prompt_tokens']:,} tokens"
    rows = [
        [f"engine besides the forward, in a decode step of {ours['batch_size']} sequences", overhead, "≤ 3 %"],
        [f"decode step over that of our own full plan, {batch}", f"{ours['step_seconds'] / full_seconds:.2f} ×", ""],
    ]
    for name, step in steps.items():
        if name not in (PLAN, FULL):
            rows.append([f"the same with {name}", f"{step['step_seconds'] / full_seconds:.2f} ×", ""])
    return rows


def _alongside_prefill_rows(latencies: Results, config: Results) -> list[list[str]]:
    ours = latencies[PLAN]
    busy, idle = ours["alongside_prefill"], ours["idle"]
    label = f"p99 between a sequence's tokens while a prompt of {ours['prompt_tokens']:,} enters, over the idle median"
    return [
        [label, f"{busy['p99'] / idle['p50']:.1f} ×", "≤ 2.5 ×"],
        ["the same over the idle p99", f"{busy['p99'] / idle['p99']:.1f} ×", ""],
    ]


def _latency_ratio(ours: Results, theirs: Results, name: str) -> str:
    """Return the ratio of two medians, or "failed" if the other server failed."""
    if _has_failed(theirs):
        return FAILED
    if not ours[name] or not theirs[name]:
        return MISSING
    return f"{ours[name]['p50'] / theirs[name]['p50']:.2f} ×"


def _rate_ratio(ours: Results, theirs: Results) -> str:
    if _has_failed(theirs):
        return FAILED
    return f"{ours['requests_per_second'] / theirs['requests_per_second']:.2f} ×"


def _has_failed(load: Results) -> bool:
    return not load["completed"] or "error" in load


def _format_loads(loads: Results, title: str) -> str:
    return markdown_table([title, *LOAD_COLUMNS], [[name, *_load_cells(load)] for name, load in loads.items()])


def _load_cells(load: Results) -> Sequence[str]:
    allocated = load["peak_gauges"].get("kv_allocated_bytes")
    if not _has_failed(load):
        figures = [
            _format_percentiles(load["ttft"], ".1f"),
            _format_percentiles(load["tpot"], ".2f"),
            f"{load['requests_per_second']:.3f}",
            f"{load['tokens_per_second']:.1f}",
            f"{load['goodput']:.3f}",
        ]
    else:
        figures = [FAILED] * 5
    return [
        *figures,
        str(load["completed"]),
        str(load["rejected"]),
        str(load["failed"]),
        f"{allocated / MEBIBYTE:.0f} MiB" if allocated else MISSING,
    ]


def _format_percentiles(latency: Mapping[str, float] | None, spec: str) -> str:
    return MISSING if latency is None else f"{latency['p50']:{spec}} s / {latency['p99']:{spec}} s"


PLAN_COLOUR, FULL_COLOUR = "#1f5fa8", "#777777"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the engine's computed capacity as lines, and the counts of running sequences as crosses."""
    rows, config = results["pool_capacity"], results["config"]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    for key, name, colour in (("plan", PLAN, PLAN_COLOUR), ("full", FULL, FULL_COLOUR)):
        counts = [row[key] for row in rows]
        axes.plot(tokens, counts, marker="o", markersize=4, color=colour, label=name.removeprefix("baklava, "))
        for length, count in zip(tokens, counts, strict=True):
            axes.annotate(
                str(count), (length, count), textcoords="offset points", xytext=(0, -15), ha="center", color=colour
            )
        if "concurrent_sequences" in results:
            running = results["concurrent_sequences"][name]["running"]
            axes.plot([config["prompt_tokens"]], [running], marker="x", markersize=9, color=colour, linestyle="none")
    axes.set(xlabel="tokens of a sequence", ylabel="concurrent sequences", xscale="log", yscale="symlog")
    axes.set_xticks(tokens, [f"{length:,}" for length in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1.5 * max(max(row["plan"], row["full"]) for row in rows))
    axes.grid(alpha=0.3)
    pool = f"KV pool of {config['pool_bytes'] / 2**20:,.0f} MiB; × counted while they ran"
    axes.set_title(pool, fontsize="medium")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
