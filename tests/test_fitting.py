"""Where to get a trace that fits a network."""

from tidesim.trace.fitting import how_to_fit


def test_shipped_traces_that_fit_are_named() -> None:
    by_hand = "`tidesim synthesize --shape MODEL --out trace.h5` makes one for the shape of any --model"
    assert how_to_fit(256, 8) == f"of the shipped ones llada2-tiny, llada2.0-mini-synthetic, and {by_hand}"
    assert how_to_fit(64, 8) == f"none is shipped, and {by_hand}"
