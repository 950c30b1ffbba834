#!/bin/sh
# The main job: generate with a real model, record its routing, replay it, plan for a machine; and run with a budget.
# Called by `make demo` with BIN (the environment's programs) and RUNS (where results go).
set -eu
mkdir -p "$RUNS"
say() { printf '\n$ tidesim %s\n' "$*"; "$BIN/tidesim" "$@"; }

say trace --model llada2-tiny --limit 1 --gen-length 64 --show-text --overwrite --out "$RUNS/one.h5"
say trace --model llada2-tiny --gen-length 96 --overwrite --out "$RUNS/trace.h5"
say inspect "$RUNS/trace.h5"
say simulate --trace "$RUNS/trace.h5" --model llada2.0-mini --hardware rtx4090.yaml --policy tide --budget 96
say compare --trace "$RUNS/trace.h5" --model llada2.0-mini --hardware rtx4090.yaml --budget 96 \
    --policy gain --policy tide-as-coded --policy lru --policy freetoken-hybrid
say plan --trace "$RUNS/trace.h5" --model llada2.0-mini --hardware rtx4090.yaml --out "$RUNS/plan.json"
say run --model llada2-tiny --policy tide-as-coded --budget 64 --limit 1 --gen-length 64
