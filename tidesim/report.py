"""Pictures of runs: the timeline, in the event format that Perfetto and chrome://tracing open, and figures (PNG).

matplotlib is imported when a figure is asked for: it comes with the engine, and nothing else needs it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidesim.errors import InputError
from tidesim.result import PARTS, RESOURCES, Interval, RunResult


def save_timeline(intervals: Sequence[Interval], result: RunResult, path: Path) -> None:
    """Write who ran when as a Trace Event file (Trace Event Format, JSON object form): one track a resource.

    Times in the file are microseconds, as the format asks; `result` is kept beside the events as metadata.
    """
    tracks = {resource: number for number, resource in enumerate(RESOURCES)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": resource}}
        for resource, number in tracks.items()
    ]
    events = [
        {
            "ph": "X",
            "name": interval.name,
            "pid": 0,
            "tid": tracks[interval.resource],
            "ts": interval.start_ns / 1e3,
            "dur": (interval.end_ns - interval.start_ns) / 1e3,
            "args": {"forward": interval.forward, "layer": interval.layer},
        }
        for interval in intervals
    ]
    document = {"traceEvents": names + events, "displayTimeUnit": "ms", "metadata": result.to_dict()}
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


# Categorical colours that stay apart for most colour-blind readers: Okabe and Ito, Color Universal Design (2008).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def check_picture(path: Path) -> None:
    """Find out before long work whether a figure can be drawn into `path` after it.

    Raise InputError if matplotlib is not installed, if the folder does not exist, or if the file's ending is that of no
    picture.
    """
    known = _new_figure(1, 1).canvas.get_supported_filetypes()
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written (no folder {path.parent}); make it first.")
    if path.suffix and path.suffix[1:].lower() not in known:
        raise InputError(f"{path}: no picture ends so; take .png, or one of {', '.join(sorted(known))}.")


def save_comparison(document: Mapping[str, Any], path: Path) -> None:
    """Draw a comparison (`Comparison.to_dict`): milliseconds a token by policy and part, the fastest first, and the
    ceilings as lines. Of those that refresh, every step and the best interval are shown. Where systems run under their
    own executions, each has a mark at its own ceiling instead of the lines.

    Raise InputError if matplotlib is not installed or the file cannot be written.
    """
    rows = [row for row in document["rows"] if row["is_best_of_family"] or row["refresh_interval"] == 1]
    figure = _new_figure(11, 0.3 * len(rows) + 2.5)
    axes = figure.subplots()
    for number, row in enumerate(rows):
        _draw_bar(axes, number, row["breakdown_s"], row["generated_tokens"], is_labelled=number == 0)
    _draw_ceilings(axes, document, rows)
    axes.set_yticks(range(len(rows)), [f"{row['name']}  {row['tok_per_s']:.1f} tok/s" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms a generated token, predicted")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{document['model']} ({document['trace_origin']} routing) on {document['hardware']}, execution "
        f"{document['execution']}, {document['budget']} experts a layer",
        fontsize=10,
    )
    _save(figure, path)


def save_validation(document: Mapping[str, Any], path: Path) -> None:
    """Draw a validation (`Validation.to_dict`): predicted over measured by policy, and where the time goes in both.

    Raise InputError if matplotlib is not installed or the file cannot be written.
    """
    rows = document["rows"]
    figure = _new_figure(14, 0.24 * len(rows) + 4)
    scatter, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _draw_scatter(scatter, rows)
    _draw_parts(bars, rows, document["num_forwards"])
    figure.suptitle(
        f"{document['model']} ({document['trace_origin']} routing)\non {document['machine']}: median error "
        f"{100 * document['median_error']:.1f} %, worst {100 * document['worst_error']:.1f} %, "
        f"Kendall's tau {document['kendall_tau']:.2f}",
        fontsize=10,
    )
    _save(figure, path)


def _draw_ceilings(axes: Any, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The bounds as lines over all bars, or a mark on each bar where they differ by execution."""
    if document["has_own_executions"]:
        least_ms = [1e3 * row["ceiling_share"] / row["tok_per_s"] for row in rows]
        axes.plot(least_ms, range(len(rows)), "|", color="0.2", markersize=12, label="ceiling of its execution")
        return
    for name, style in (("ceiling", "-"), ("pooled_ceiling", ":")):
        least_ms = 1e3 / document[name]["tok_per_s"]
        axes.axvline(least_ms, color="0.2", linestyle=style, label=name.replace("_", " "))


def _new_figure(width_in: float, height_in: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("drawing needs matplotlib: install the extra, pip install 'tidesim[engine]'.") from None
    return Figure(figsize=(width_in, height_in), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None


def _draw_bar(
    axes: Any,
    place: float,
    parts_s: Mapping[str, float],
    number: int,
    *,
    is_labelled: bool,
    height: float = 0.7,
    alpha: float = 1.0,
) -> None:
    """Milliseconds by part, one after another, of one of so many forwards or tokens that took `parts_s`."""
    left = 0.0
    for colour, part in zip(_COLOURS, PARTS, strict=False):
        width = 1e3 * parts_s[part] / number
        label = part.replace("_", " ") if is_labelled else None
        axes.barh(place, width, height, left=left, color=colour, alpha=alpha, label=label)
        left += width


def _draw_scatter(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each case as a point with the range of its repeats; on the diagonal, prediction and measurement agree."""
    for number, name in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        mine = [row for row in rows if row["policy"] == name]
        measured = [row["measured_tok_per_s"] for row in mine]
        below = [row["measured_tok_per_s"] - min(row["repeats_tok_per_s"]) for row in mine]
        above = [max(row["repeats_tok_per_s"]) - row["measured_tok_per_s"] for row in mine]
        axes.errorbar(
            measured,
            [row["predicted_tok_per_s"] for row in mine],
            xerr=[below, above],
            fmt="o",
            markersize=5,
            color=_COLOURS[number % len(_COLOURS)],
            label=name,
        )
    ends = [min(min(row["repeats_tok_per_s"]) for row in rows), max(max(row["repeats_tok_per_s"]) for row in rows)]
    axes.plot(ends, ends, color="0.4", linewidth=1, label="equal")
    axes.fill_between(ends, [0.95 * end for end in ends], [1.05 * end for end in ends], color="0.9", label="within 5 %")
    axes.set(xlabel="measured, tok/s (median, range of repeats)", ylabel="predicted, tok/s", title="Throughput")
    axes.legend(frameon=False)


def _draw_parts(axes: Any, rows: Sequence[Mapping[str, Any]], num_forwards: int) -> None:
    """Milliseconds a forward by part: measured above, predicted below, a pair of bars for each case."""
    for number, row in enumerate(rows):
        for offset, side, alpha in ((-0.2, "measured", 1.0), (0.2, "predicted", 0.55)):
            is_labelled = number == 0 and side == "measured"
            parts_s = row[f"{side}_parts_s"]
            _draw_bar(axes, number + offset, parts_s, num_forwards, is_labelled=is_labelled, height=0.38, alpha=alpha)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms a forward: measured above, predicted (paler) below", title="Where the time goes")
    axes.legend(frameon=False, fontsize=8)
