"""Compile what most tests need, once: else each of the processes that share them would."""

from tidesim.replay import compile_now, is_compiled
from tidesim.workers import Workers


def compile_replay() -> None:
    compile_now()


def compile_engine() -> None:
    """The tiny model's weights are float32, and those of a real one bfloat16."""
    try:
        import torch
    except ImportError:
        return
    from engine_cases import small_network

    from tidesim.engine.cores import Cores
    from tidesim.engine.cpu_network import on_cores
    from tidesim.engine.kernel import compile_experts

    on_cores(small_network(seed=0), Cores(1))
    for dtype in (torch.float32, torch.bfloat16):
        compile_experts(dtype)


def compile_all() -> None:
    """In two processes, unless a run before has done it."""
    if not is_compiled():
        with Workers(None, 2) as pool:
            list(pool.map(_compile, (compile_engine, compile_replay)))


def _compile(_: None, part) -> None:
    part()
