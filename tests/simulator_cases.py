"""Timetables of runs on the machine of round numbers, and runs of any kind for properties."""

import inspect
from dataclasses import replace

import numpy as np
from erratic import Erratic
from hypothesis import strategies as st
from toy import TOY, toy_execution, toy_hardware, toy_workload

from tidesim.policies import POLICIES, policy
from tidesim.policies.predictors import Noisy, Oracle, Previous
from tidesim.simulator import simulate

# Rows of counts for the eight experts of the toy network: three rows, two experts each.
SWAPPED = [0, 0, 3, 3, 0, 0, 0, 0]
MIXED = [2, 2, 1, 1, 0, 0, 0, 0]

# They copy even where every expert has a slot: they begin with nobody, and keep nobody.
EMPTY_AT_FIRST = ("all-host", "pre-gated")


def data_of(name, workload, predictor):
    """Parameters that a policy cannot do without: what only a caller has."""
    known = {"popularity": workload.counts.sum(axis=0), "corpus": workload, "predictor": predictor}
    return {key: known[key] for key in inspect.signature(POLICIES[name]).parameters if key in known}


def hardware(part: str, **changes):
    plain = toy_hardware()
    return replace(plain, **{part: replace(getattr(plain, part), **changes)})


def play(tables, name="tide", *, budget=2, machine=None, kinds=None, steps=None, first_block=False, **changes):
    """The timetable as sorted (resource, name, start, end), and the result, of forwards with one MoE layer each.

    `name` is that of a policy, or the policy itself.
    """
    workload = toy_workload(*([row] for row in tables), kinds=kinds, steps=steps, first_block=first_block)
    params = {"popularity": [[2, 2, 1, 1, 0, 0, 0, 0]]} if name == "static" else {}
    timeline = []
    result = simulate(
        workload,
        TOY,
        machine or toy_hardware(),
        policy(name, **params) if isinstance(name, str) else name,
        budget=budget,
        execution=toy_execution(**changes),
        timeline=timeline,
        is_memory_checked=False,
    )
    timeline.sort(key=lambda interval: (interval.start_ns, interval.resource))
    return [tuple(interval[:4]) for interval in timeline], result


def parts(result, layer="0"):
    """Nanoseconds of one layer, in the order of `PARTS`."""
    return [round(1e9 * seconds) for seconds in result.breakdown_by_layer_s[layer].values()]


@st.composite
def cases(draw: st.DrawFn):
    """A model, a machine, an execution, a policy and a workload with up to two layers."""
    num_layers, num_rows = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_forwards = draw(st.integers(1, 6))
    picks = np.argsort(rng.random((num_forwards, num_layers, num_rows, 8)) - rng.random(8), axis=-1)[..., :2]
    counts = (picks[..., None] == np.arange(8)).sum(axis=(2, 3))
    kinds = "".join(draw(st.lists(st.sampled_from("ddddcp"), min_size=num_forwards, max_size=num_forwards)))
    workload = toy_workload(*counts, kinds=kinds, first_block=draw(st.booleans()))
    name = draw(st.sampled_from([*sorted(POLICIES), "erratic", "erratic"]))
    budgets = (
        [8] * num_layers
        if name == "all-device"
        else draw(st.lists(st.integers(1, 8), min_size=num_layers, max_size=num_layers))
    )
    predictor = draw(st.sampled_from([Oracle(workload), Noisy(workload, 0.5), Previous()]))
    params = data_of(name, workload, predictor) if name in POLICIES else {}
    drawn = {
        "refresh_interval": st.integers(1, 3),
        "margin": st.sampled_from([0.0, 0.5]),
        "min_dwell": st.integers(0, 2),
        "keep": st.sampled_from([0.5, 0.9]),
        "strategy": st.sampled_from(["uniform", "frequency", "front-loading", "random"]),
        "mode": st.sampled_from(["coded", "published"]),
        "cpu_offload": st.booleans(),
        "threshold": st.integers(1, 4),
        "distance": st.integers(1, 2),
    }
    takes = inspect.signature(POLICIES[name]).parameters if name in POLICIES else {}
    params |= {param: draw(drawn[param]) for param in takes if param in drawn}
    if "refresh_steps" in takes and draw(st.booleans()):
        steps = st.sets(st.integers(0, 5), max_size=4).map(sorted)
        del params["refresh_interval"]
        params["refresh_steps"] = draw(st.one_of(steps, st.lists(steps, min_size=num_layers, max_size=num_layers)))
    if name == "erratic":
        params = {"scope": draw(st.sampled_from(["layer", "network"])), "scratch": draw(st.integers(1, 3))}
    choices = {
        "is_pinned": st.booleans(),
        "copies": st.sampled_from(["blocking", "background"]),
        "copies_per_expert": st.sampled_from([1, 3, 200]),
        "write_back": st.booleans(),
        "kernels": st.sampled_from(["loop", "grouped"]),
        "host": st.sampled_from(["serial", "parallel"]),
        "host_calls": st.sampled_from(["expert", "layer"]),
        "is_async": st.booleans(),
    }
    used = toy_execution(**{key: draw(choice) for key, choice in choices.items()})
    if not used.write_back:
        used = replace(used, home=draw(st.sampled_from(["host", "disk"])))
    machine = hardware(
        "device", eager_op_s=draw(st.sampled_from([0.0, 30e-9])), gemm_overhead_s=draw(st.sampled_from([0.0, 150e-9]))
    )
    return workload, replace(TOY, num_layers=num_layers), machine, (name, params), budgets, used


def make_policy(name, params):
    return Erratic(**params) if name == "erratic" else policy(name, **params)


def run_case(case, **changes):
    workload, model, machine, (name, params), budgets, used = case
    return simulate(
        workload,
        model,
        changes.get("machine", machine),
        make_policy(name, params),
        budget=budgets,
        execution=used,
        decisions=changes.get("decisions"),
        timeline=changes.get("timeline"),
        tasks=changes.get("tasks"),
        is_memory_checked=False,
    )
