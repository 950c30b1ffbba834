"""How good a plan is, and how sure that is, as tables; made of the plain data that `to_dict` gives."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from tidesim.tables import facts_of, table_of

Document = Mapping[str, Any]

_MOST_SHARES = 6
_VERDICTS = {True: "not noise", False: "cannot be told apart", None: "nobody knows"}


def judgement_tables(document: Document) -> RenderableType:
    """`Judgement.to_dict`: the plan on held-out sequences, against rivals, the best in hindsight, and a ceiling."""
    facts = {"throughput": document["score"]["sentence"]}
    facts |= {
        name: document[key]["sentence"]
        for name, key in (("regret", "regret"), ("to the ceiling", "ceiling"))
        if document[key] is not None
    }
    title = "The plan against others, sequence by sequence"
    table = table_of(title, left=("",), right=("plan is faster by", "interval"))
    table.add_column("verdict")
    for row in document["advantages"]:
        cells = (f"{100 * row['gain']:+.1f} %", _percent(row["interval"]))
        table.add_row(row["over"], *cells, _VERDICTS[row["is_told_apart"]])
    return Group(facts_of("Score on sequences held out", facts), table)


def tide_tables(document: Document, replayed: Document | None = None) -> RenderableType:
    """`TideProgramme.to_dict`: its choice, how well its curves fit, how sure both are, and what does not hold.

    `replayed` is `Regret.to_dict` of its choice among the intervals that were replayed, if any were.
    """
    fit, bands = document["fit"], document["bands"]
    start, growth, exponent = fit["misses"]
    drift = f"d = {fit['drift']:.4f} a step" + ("" if bands is None else _between(bands["drift"]))
    facts = {
        "choice": f"refresh every {_steps(document['interval'])} at budget {document['budget']}",
        "drift": f"{drift}; R squared {fit['drift_r_squared']:.3f}",
        "misses": f"f(tau) = {start:.3f} + {growth:.3f} tau^{exponent:.2f}; R squared {fit['misses_r_squared']:.3f}",
    }
    if bands is not None:
        facts["band of f"] = f"{_growth(bands['misses'][0], 1)}, {_growth(bands['misses'][-1], len(bands['misses']))}"
        facts["chosen on other sequences"] = _alike(bands)
        facts["sequences"] = f"{bands['num_sequences']}, drawn again {bands['num_resamples']} times"
        facts |= {"note": bands["caution"]} if bands["caution"] else {}
    if replayed is not None:
        facts["when replayed"] = replayed["sentence"]
    facts |= {assumption["name"]: _assumption(assumption) for assumption in document["assumptions"]}
    return facts_of(f"TIDE's own programme ({document['policy']})", facts)


def _percent(interval: Document | None) -> str:
    return "-" if interval is None else f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f} %"


def _between(interval: Document) -> str:
    return f" ({100 * interval['level']:.0f} % band {interval['low']:.4f} to {interval['high']:.4f})"


def _growth(interval: Document, lag: int) -> str:
    return f"f({lag}) in {interval['low']:.3f} to {interval['high']:.3f}"


def _alike(bands: Document) -> str:
    """Which intervals the trace cannot tell apart, if the programme's formula is right."""
    chosen = ", ".join(f"{interval} ({100 * share:.0f} %)" for interval, share in bands["shares"][:_MOST_SHARES])
    more = ", .." if len(bands["shares"]) > _MOST_SHARES else ""
    if len(bands["alike"]) == 1:
        return f"{chosen}{more}, if its formula is right"
    alike = ", ".join(map(str, bands["alike"]))
    return (
        f"{chosen}{more}; it cannot tell {alike} apart, which cost at most {100 * bands['costs_more']:.1f} % more by "
        "its own formula"
    )


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def _assumption(assumption: Document) -> str:
    return ("FAILS; " if assumption["holds"] is False else "") + str(assumption["sentence"])
