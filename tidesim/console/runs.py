"""Tables of traces, of runs side by side, and of plans."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from tidesim.console.printing import Document
from tidesim.execution import GIB
from tidesim.explained import critical_path_tables
from tidesim.result import PARTS
from tidesim.tables import facts_of, table_of

# --- traces ---


def recording_table(document: Document) -> RenderableType:
    """What a tracing run did."""
    tokens, seconds = document["generated_tokens"], document["generate_s"]
    return facts_of(
        "Recorded",
        {
            "file": document["path"],
            "sequences": document["num_sequences"],
            "tokens generated": f"{tokens} in {seconds:.1f} s ({tokens / seconds:.0f} tok/s here)",
            "forwards": document["num_forwards"],
            "cost of recording": f"{100 * document['overhead']:.2f} % of generation time",
        },
    )


def trace_table(document: Document) -> RenderableType:
    """What a trace is."""
    how = "with KV cache" if document["kv_cache"] else "without KV cache"
    return facts_of(
        "Trace",
        {
            "file": document["path"],
            "origin": document["origin"] + ("" if document["is_complete"] else ", stopped before its end"),
            "model": f"{document['model']}: {document['num_layers']} MoE layers, {document['num_experts']} experts, "
            f"top-{document['top_k']}, blocks of {document['block_length']}, {how}",
            "sequences": f"{document['num_sequences']}, {document['generated_tokens']} tokens generated",
            "forwards": f"{document['num_forwards']}, {document['routed_tokens']} routed tokens",
        },
    )


# What was published for LLaDA2.0-mini (19 MoE layers, 256 experts, top-8, block 32, threshold 0.95) or, where said,
# for its kin: the column that a trace is read against.
_PUBLISHED = {
    "distinct_experts": "65.9 to 71.5 (dMoE, arXiv 2605.30876)",
    "distinct_experts_sd": "10 to 12 (dMoE, layer 10)",
    "kept_share": "0.77 (0.82 for SDAR-30B-A3B, dMoE)",
    "shared_experts": "3.3 to 3.5, both still masked (refineserve)",
    "accepted_per_step": "2.55; 1.24 to 5.16 by task (LLaDA2.0/2.1)",
    "forwards_per_block_mean": "12.5; 6 to 26 by task",
    "single_step_share": "about 0.5 (small sample)",
    "popularity": "0.25 to 0.50 (DeepSeek-V3/R1)",
}


def statistics_tables(document: Document) -> RenderableType:
    """A trace and the statistics of its routing, beside published figures."""
    found = document["statistics"]
    names = {
        "distinct_experts": "distinct experts per layer and forward",
        "distinct_experts_sd": "  its deviation over forwards",
        "distinct_experts_uniform": "  if tokens drew uniformly",
        "kept_share": "experts a position keeps to the next forward",
        "shared_experts": "experts shared by two positions of a block",
        "shared_experts_masked": "  while the whole block is masked",
        "accepted_per_step": "tokens accepted per denoise forward",
        "tokens_per_forward": "  of which answers keep (cut at their end)",
        "forwards_per_block_mean": "denoise forwards per block",
        "single_step_share": "forwards that accept one token",
        "popularity": "routing to the hottest eighth of experts",
        "used_share": "experts ever used",
    }
    origin = document["trace"]["origin"]
    table = table_of("Routing statistics", left=("quantity",), right=(f"this trace ({origin})",))
    table.add_column("published")
    for key, name in names.items():
        table.add_row(name, _figure(found[key]), _PUBLISHED.get(key, ""))
    if found["lookahead_share"] is not None:
        table.add_row("experts foretold by the layer before", _figure(found["lookahead_share"]))
        for kind, share in found["lookahead_share_by_kind"].items():
            if kind != "denoise":
                table.add_row(f"  in {kind} forwards", _figure(share))
        table.add_row("  if named at random", _figure(found["lookahead_share_random"]))
    for regime, key, published in (
        ("block-only", "cosine_block", ""),
        ("full", "cosine_full", "0.985 .. > 0.95 .. (TIDE, second hand)"),
    ):
        cosines = found[key]
        shown = " ".join(f"{cosines[lag - 1]:.3f}" for lag in (1, 2, 5, 8) if lag <= len(cosines))
        table.add_row(f"cosine of counts at lag 1 2 5 8, {regime}", shown or "-", published)
    cache = _cache_table(document["lru_hits_and_copies"])
    return Group(trace_table(document["trace"]), table, _layer_table(found), cache)


def _cache_table(curve: Document) -> Table:
    """Hits and copies beside each other, as more of the former may take more of the latter."""
    title = "LRU cache by budget (hits do not rank policies by time)"
    table = table_of(title, left=(), right=("experts a layer", "hits", "copies per 1000 routed pairs"))
    most = len(curve["hits"]) - 1
    for eighths in (1, 2, 3, 4, 6):
        budget = most * eighths // 8
        copies = (curve["promotions"][budget] + curve["drops"][budget]) / (
            curve["hits"][budget] + curve["misses"][budget]
        )
        table.add_row(str(budget), f"{100 * curve['hit_rate'][budget]:.1f} %", f"{1000 * copies:.1f}")
    return table


def _layer_table(found: Document) -> Table:
    columns = {
        "distinct experts": "distinct_experts_by_layer",
        "deviation": "distinct_experts_sd_by_layer",
        "kept": "kept_share_by_layer",
        "hottest eighth": "popularity_by_layer",
        "ever used": "used_share_by_layer",
    }
    if found["lookahead_share"] is not None:
        columns["foretold"] = "lookahead_share_by_layer"
    table = table_of("By MoE layer", left=(), right=("layer", *columns))
    for layer in range(len(found["distinct_experts_by_layer"])):
        cells = [found[key][layer] if layer < len(found[key]) else None for key in columns.values()]
        table.add_row(str(layer), *map(_figure, cells))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


# --- runs ---


def result_tables(document: Document) -> RenderableType:
    """One run: what was run, what it came to, where the time went, and what it waited for if that was asked."""
    how = "measured" if document["is_measured"] else "predicted"
    facts = {
        "model": document["model"],
        "routing" if document["is_measured"] else "trace": document["trace_origin"],
        "machine": document["hardware"],
        "execution": f"{document['execution']}, context {document['context']}" + _batch(document["batch_size"]),
        "policy": document["policy"] + _refreshes(document),
        "budget": f"{_per_layer(document['budget'])} experts a layer",
        "throughput": f"{document['tok_per_s']:.2f} tok/s {how} ({document['generated_tokens']} tokens "
        f"in {document['makespan_s']:.2f} s, {document['num_forwards']} forwards)",
        "hit rate": f"{100 * document['hit_rate']:.1f} % of routed pairs",
        "moved": f"{document['promotions']} promotions, {_gb(document['h2d_bytes'])} to the device, "
        f"{_gb(document['d2h_bytes'])} to the host",
        "busy": ", ".join(f"{name} {100 * share:.0f} %" for name, share in document["busy_share"].items()),
    }
    if document["is_measured"]:
        names = {"experts": "experts", "non_experts": "other weights", "kv_cache": "KV cache", "transient": "transient"}
        taken = {name: document["device_memory_bytes"][key] for key, name in names.items()}
        listed = " + ".join(f"{name} {num_bytes / GIB:.3f}" for name, num_bytes in taken.items())
        facts["device memory"] = f"{listed} = {sum(taken.values()) / GIB:.3f} GiB"
    title = "Measured run" if document["is_measured"] else "Simulated run"
    tables: list[RenderableType] = [facts_of(title, facts), part_table(document)]
    if "critical_path" in document:
        tables.append(critical_path_tables(document["critical_path"]))
    return Group(*tables)


def part_table(document: Document) -> Table:
    """Where the time of one run goes: each part in seconds and as a share of the makespan, and what it is."""
    table = table_of("Where the time goes", left=("part",), right=("time", "share"))
    table.add_column("what it is")
    for part, meaning in PARTS.items():
        part_s = document["breakdown_s"][part]
        table.add_row(
            part.replace("_", " "), f"{part_s:.3f} s", f"{100 * part_s / document['makespan_s']:.1f} %", meaning
        )
    return table


def breakdown_table(documents: Sequence[Document]) -> Table:
    """Runs side by side: milliseconds a forward, and the share of the makespan by part."""
    parts = [part.replace("_", " ") for part in PARTS]
    table = table_of("Where the time goes", left=("run",), right=("ms a forward", *parts))
    for document in documents:
        shares = [100 * document["breakdown_s"][part] / document["makespan_s"] for part in PARTS]
        forward_ms = 1e3 * document["makespan_s"] / document["num_forwards"]
        table.add_row(document["label"], f"{forward_ms:.2f}", *(f"{share:.0f} %" for share in shares))
    return table


def comparison_tables(document: Document) -> RenderableType:
    """Policies side by side, the fastest first: of those that refresh, at every step and at their best interval."""
    ceiling, pooled = document["ceiling"], document["pooled_ceiling"]
    facts = {
        "model": document["model"],
        "trace": f"{document['trace_origin']}; compared on sequences {_ids(document['sequences'])}; "
        f"known before: {_ids(document['corpus'])}",
        "machine": document["hardware"],
        "execution": f"{document['execution']}, context {document['context']}"
        + _batch(document["batch_size"])
        + (", but for systems with their own" if document["has_own_executions"] else ""),
        "budget": f"{document['budget']} experts a layer, the same bytes for all",
        "ceiling": f"no policy is faster than {ceiling['tok_per_s']:.2f} tok/s "
        f"({pooled['tok_per_s']:.2f} with slots that all layers share)",
        "most hits": f"{100 * document['hit_ceiling']:.1f} % in a cache that is filled on demand",
    }
    parts = {"dense": "dense", "device": "device", "launch": "launch", "host_wait": "host", "copy_wait": "copies"}
    columns = ("tok/s", "of ceiling", "hits", "GB copied", *parts.values(), "link")
    is_whole = document["has_own_executions"]
    left = ("policy", "execution") if is_whole else ("policy",)
    table = table_of("Policies, by predicted throughput", left=left, right=columns)
    for row in document["rows"]:
        if row["is_best_of_family"] or row["refresh_interval"] == 1:
            shares = [100 * row["breakdown_s"][part] / row["makespan_s"] for part in parts]
            cells = [f"{row['tok_per_s']:.2f}", f"{100 * row['ceiling_share']:.0f} %", f"{100 * row['hit_rate']:.1f} %"]
            cells.append(f"{(row['h2d_bytes'] + row['d2h_bytes']) / 1e9:.0f}")
            cells += [f"{share:.0f} %" for share in (*shares, 100 * row["busy_share"]["h2d"])]
            table.add_row(*([row["name"], row["execution"]] if is_whole else [row["name"]]), *cells)
    notes = [f"Note: {warning}" for warning in document["warnings"]]
    notes += [f"Left out: {name}, {reason}" for name, reason in document["left_out"].items()]
    return Group(facts_of("Comparison", facts), table, "\n".join(notes))


def _batch(batch_size: int) -> str:
    return f", {batch_size} sequences at a time" if batch_size > 1 else ""


def _ids(sequences: Sequence[int]) -> str:
    return ", ".join(map(str, sequences)) if len(sequences) <= 8 else f"{len(sequences)} sequences"


def _refreshes(document: Document) -> str:
    if document["refresh_steps"] is not None:
        return f", refresh at {shown_steps(document['refresh_steps'])}"
    interval = document["refresh_interval"]
    return "" if interval is None else f", refresh every {_per_layer(interval)} steps"


def shown_steps(refresh_steps: Sequence[int] | Sequence[Sequence[int]]) -> str:
    """Steps of a block, the same for all layers or some for each."""
    rows = [row for row in refresh_steps if not isinstance(row, int)]
    common = list(rows[0]) if rows else [step for step in refresh_steps if isinstance(step, int)]
    if any(list(row) != common for row in rows):
        lengths = [len(row) for row in rows]
        span = str(min(lengths)) if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
        return f"each layer's own steps of a block, {span} of them"
    if len(common) > 2 and common == [*range(common[0], common[-1] + 1)]:
        return f"steps {common[0]} to {common[-1]} of each block"
    return f"steps {_per_layer(common)} of each block" if common else "no step"


def _per_layer(value: int | Sequence[int]) -> str:
    return str(value) if isinstance(value, int) else ",".join(map(str, value))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
