"""Tables of plans, and of machines by their plans."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from tidesim.console.printing import Document
from tidesim.console.runs import breakdown_table, shown_steps
from tidesim.execution import GIB
from tidesim.explained import critical_path_tables, near_optimal_table, shadow_price_table
from tidesim.scored import judgement_tables, tide_tables
from tidesim.tables import facts_of, table_of


def plan_tables(document: Document) -> RenderableType:
    """A plan: what to use, what to expect, what it was compared with, and where the time goes."""
    chosen, scored = document["chosen"], document["held_out"]
    score = "" if scored is None else f"; {scored['tok_per_s']:.2f} on {len(scored['sequences'])} sequences held out"
    tide_code = chosen["tide_code"]
    facts = {
        "model": document["predicted"]["model"],
        "trace": f"{document['trace_origin']}, {len(document['split']['training'])} sequences to plan on",
        "machine": chosen["hardware"]["name"],
        "execution": f"{chosen['execution']}, context {chosen['context']}",
        "policy": chosen["policy"],
        "budget": f"{_spread(chosen['budget'])} experts a layer, {sum(chosen['budget'])} of {document['slots']} slots",
        "refresh": _planned_refreshes(chosen),
        "expect": f"{document['predicted']['tok_per_s']:.2f} tok/s{score}",
        "optimal": f"{_proof(document)}; {document['num_runs']} runs, {document['total_s']:.1f} s",
        "as a whole": _rescored(document["rescored"]),
        "device memory": _memory(document, chosen),
        "in TIDE's code": f"max_gpu_experts_per_layer={tide_code['max_gpu_experts_per_layer']}, "
        f"jump_steps={tide_code['jump_steps']}",
    }
    runs = [{**document["predicted"], "label": "this plan"}, *_labelled(document["baselines"])]
    return Group(
        facts_of("Plan", facts), _ranking(document), breakdown_table(runs), *_judged(document), *_explained(document)
    )


def _proof(document: Document) -> str:
    """How good the programme's choice is in its table."""
    solver = document["solver"]
    if solver["status"] != "optimal":
        return f"best when {solver['solver']}'s time was up, at most {100 * document['gap']:.2g} % off in its table"
    return f"proven in its table, gap {100 * document['gap']:.1g} % ({solver['solver']})"


def _rescored(document: Document) -> str:
    """What whole runs made of the programme's choice."""
    gain = document["before_s"] / document["after_s"] - 1
    around = f"{document['num_neighbours']} neighbours run, {100 * gain:+.2f} % by the best of them"
    programme = f"the programme's choice runs in {document['programme_s']:.3f} s"
    return f"{programme}, the plan in {document['after_s']:.3f} s; {around}"


def _judged(document: Document) -> list[RenderableType]:
    """How sure the score is, and what TIDE's own programme says."""
    judged = [] if document["judgement"] is None else [judgement_tables(document["judgement"])]
    listed = [_listed_steps(document["listed_steps"])] if document["listed_steps"] else []
    return [*judged, *listed, *(tide_tables(tide, tide["replayed"]) for tide in document["tide"])]


def _listed_steps(compared: Sequence[Document]) -> RenderableType:
    """What it brings to choose the steps that are refreshed, and not only how often."""
    table = table_of(
        "Listed refresh steps beside constant intervals, the best plan of each kind",
        left=("policy", "listed", "constant"),
        right=("listed tok/s", "constant", "gain", "held out, tok/s", "constant", "gain"),
    )
    for one in compared:
        table.add_row(
            one["policy"],
            shown_steps(one["refresh_steps"]),
            f"every {_spread(one['refresh_interval'])} steps",
            *_both(one["tok_per_s"], one["constant_tok_per_s"], one["gain"]),
            *_both(one["held_out_tok_per_s"], one["held_out_constant_tok_per_s"], one["held_out_gain"]),
        )
    return table


def _both(listed: float | None, constant: float | None, gain: float | None) -> tuple[str, str, str]:
    if listed is None or constant is None or gain is None:
        return "-", "-", "-"
    return f"{listed:.2f}", f"{constant:.2f}", f"{100 * gain:+.1f} %"


def _explained(document: Document) -> list[RenderableType]:
    """Why the plan is as fast as it is, if that was asked for."""
    found = document["explanation"]
    if found is None:
        return []
    best = max(row["tok_per_s"] for row in found["alternatives"])
    return [
        shadow_price_table(found["shadow_prices"]),
        near_optimal_table(found["alternatives"], best),
        critical_path_tables(found["critical_path"]),
    ]


def ranking_tables(document: Document) -> RenderableType:
    """Machines, the best first, each with its plan or the reason why there is none."""
    table = table_of(
        f"Machines for objective {document['objective']!r}, the best first",
        left=("machine", "policy"),
        right=("experts", "of", "planned on, tok/s", "held out, tok/s", "slowest block", "device GiB"),
    )
    notes = []
    for row in document["machines"]:
        report = row["report"]
        if report is None:
            table.add_row(row["machine"], "no plan", "-", "-", "-", "-", "-", "-")
            notes.append(f"{row['machine']}: {row['reason']}")
            continue
        chosen = report["chosen"]
        cells = (
            str(sum(chosen["budget"])),
            str(report["slots"]),
            f"{report['predicted']['tok_per_s']:.2f}",
            _rate(report["held_out"]),
            f"{report['slowest_block_s']:.3f} s",
            f"{chosen['hardware']['device_memory_bytes'] / GIB:.1f}",
        )
        table.add_row(row["machine"], chosen["policy"], *cells)
    return Group(table, *notes)


def _planned_refreshes(chosen: Document) -> str:
    if chosen["refresh_steps"] is not None:
        return f"at {shown_steps(chosen['refresh_steps'])}"
    if chosen["refresh_interval"] is not None:
        return f"every {_spread(chosen['refresh_interval'])} steps"
    return "never" if chosen["miss_rule"] == "host" else "never; experts move when they are missed"


def _ranking(document: Document) -> Table:
    """The plan among its baselines, on the sequences that it was made on and on those held out."""
    scored = document["held_out"]
    held_out = {} if scored is None else {run["baseline"]: run for run in scored["baselines"]}
    right = ("planned on, tok/s", "held out, tok/s", "plan is faster by", "hit rate")
    table = table_of("Predicted throughput, with as many experts on the device", left=("",), right=right)
    plan_s = document["predicted"]["tok_per_s"]
    best = scored["tok_per_s"] if scored else None
    table.add_row("this plan", f"{plan_s:.2f}", _rate(scored), "", f"{100 * document['predicted']['hit_rate']:.1f} %")
    for run in document["baselines"]:
        other = held_out.get(run["baseline"])
        ours, theirs = (best, other["tok_per_s"]) if best and other else (plan_s, run["tok_per_s"])
        name = run["baseline"] + (" (reference)" if run["is_reference"] else "")
        gain = f"{100 * (ours / theirs - 1):+.1f} %"
        hit_rate = f"{100 * run['hit_rate']:.1f} %"
        table.add_row(name, f"{run['tok_per_s']:.2f}", _rate(other), gain, hit_rate)
    return table


def _labelled(baselines: Sequence[Document]) -> list[Document]:
    return [{**run, "label": run["baseline"]} for run in baselines]


def _rate(run: Document | None) -> str:
    return "-" if run is None else f"{run['tok_per_s']:.2f}"


def _spread(values: Sequence[int]) -> str:
    """One number if all layers have it, else how many layers have which."""
    counts = sorted(Counter(values).items())
    if len(counts) == 1:
        return str(counts[0][0])
    return ", ".join(f"{value} ({count} layers)" for value, count in counts)


def _memory(document: Document, chosen: Document) -> str:
    memory = document["memory"]
    experts = (sum(chosen["budget"]) + document["scratch"]) * chosen["model"]["expert_bytes"]
    parts = {
        "experts": experts,
        "other weights": memory["non_experts"],
        "KV cache": memory["kv_cache"],
        "transient": memory["transient"],
        "reserve": memory["reserve"],
    }
    listed = " + ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in parts.items())
    return f"{listed} = {sum(parts.values()) / GIB:.2f} GiB of {chosen['hardware']['device_memory_bytes'] / GIB:.2f}"
