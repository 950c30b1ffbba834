"""Which routing may be run at the sizes of a network."""

from tidesim.shipped import shipped_folder, shipped_names
from tidesim.trace.reading import Trace

_SUFFIX = ".h5"


def how_to_fit(num_experts: int, top_k: int) -> str:
    """Where to get a trace of `num_experts` experts of which a token takes `top_k`: the shipped ones, or by hand."""
    fitting = []
    for name in shipped_names("traces"):
        if name.endswith(_SUFFIX):
            with Trace.open(shipped_folder("traces") / name) as opened:
                if (opened.num_experts, opened.top_k) == (num_experts, top_k):
                    fitting.append(name.removesuffix(_SUFFIX))
    shipped = f"of the shipped ones {', '.join(fitting)}" if fitting else "none is shipped"
    return f"{shipped}, and `tidesim synthesize --shape MODEL --out trace.h5` makes one for the shape of any --model"
