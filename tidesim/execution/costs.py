"""Model, machine and execution put together: how long each part of a forward takes."""

import numpy as np
import numpy.typing as npt

from tidesim.execution.presets import Execution
from tidesim.hardware import Hardware, Link
from tidesim.moe import MoEConfig

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Costs:
    """Durations in whole nanoseconds of everything that one engine does on one machine.

    Parameters
    ----------
    max_rows : most rows that a forward routes; the tables reach that far.

    Attributes
    ----------
    loop_ns : [max_rows + 1], kernels of one resident expert run alone, by its rows; 0 for 0 rows.
    expert_launch_ns : launching the ops of one such expert.
    fetched_ns : [max_rows + 1], all that `alone_ns` says of an expert that was fetched, by its rows; 0 for 0 rows.
    host_expert_ns : [max_rows + 1], one missed expert on the host, by its rows; 0 for 0 rows.
    grouped_overhead_ns : what a grouped kernel takes besides its experts.
    grouped_bytes_ns, grouped_flops_ns : [E + 1] by experts touched, and [max_rows * K + 1] by rows over all experts:
        the two sides of its roofline.
    has_expert_curve : whether experts on the device take measured times, one after another in a group too.
    promote_ns, evict_ns : one expert from its home to the device, and out again (0 without write-back).
    promote_bytes, evict_bytes : bytes that are copied or read for them (0 where nothing is).
    """

    def __init__(self, model: MoEConfig, hardware: Hardware, execution: Execution, max_rows: int) -> None:
        self.model = model
        self.hardware = hardware
        self.execution = execution
        self.max_rows = max_rows
        # Curves are measured on 16-bit weights, and on whole experts, so that nothing is added for separate GEMMs.
        has_curves = model.weight_bits == 16
        self._device_curve = hardware.device.expert_curve if has_curves else None
        self._host_curve = hardware.host.expert_curve if has_curves else None
        self.has_expert_curve = self._device_curve is not None
        rows = np.arange(max_rows + 1)
        self.loop_ns = _table(self._loop_s(rows))
        self.expert_launch_ns = int(self._launch_ns(execution.ops_per_expert))
        self.grouped_bytes_ns, self.grouped_flops_ns = self._grouped_tables(max_rows)
        self.grouped_overhead_ns = int(_ns(hardware.device.grouped_overhead_s))
        self.host_expert_ns = self._host_table(rows)
        self._copy_costs()
        self.fetched_ns = np.add(*self.alone_ns(self.loop_ns))
        self.fetched_ns[0] = 0

    # --- dense parts ---

    def layer_ns(self, tokens: Rows, context_tokens: Rows, attended_pairs: Rows | None = None) -> tuple[Ints, Ints]:
        """Kernels of an MoE layer's dense part, and the launch time they do not hide; any shape of arguments.

        Dense part: norms, attention, router and shared expert over `tokens` rows that attend to each other and to
        `context_tokens` cached ones. Attention under a block-causal mask is computed in full, as the published
        code and PyTorch's masked kernels do. Rows of several sequences do not attend to each other: then
        `attended_pairs` says how many pairs of a row and a token there are, see `Workload`.
        """
        model = self.model
        params = model.attention_params + model.router_params + model.shared_params
        kernel_ns = _ns(self._layer_s(params, tokens, context_tokens, attended_pairs))
        execution = self.execution
        return self._begun(kernel_ns, execution.ops_per_layer, execution.graph_kernels_per_layer)

    def entry_ns(self, tokens: Rows, context_tokens: Rows, attended_pairs: Rows | None = None) -> tuple[Ints, Ints]:
        """The same of what comes before the MoE layers: the embedding (rows read and written) and the dense layers."""
        model, num_dense = self.model, self.model.num_dense_layers
        params = model.attention_params + model.dense_mlp_params
        embedding_s = 2 * _wide(tokens) * model.hidden_bytes / self.hardware.device.bytes_per_s
        layer_s = self._layer_s(params, tokens, context_tokens, attended_pairs)
        kernel_ns = _ns(embedding_s + num_dense * layer_s)
        execution = self.execution
        num_ops, num_graph_kernels = execution.ops_per_dense_layer, execution.graph_kernels_per_dense_layer
        return self._begun(kernel_ns, num_dense * num_ops, num_dense * num_graph_kernels)

    def head_ns(self, tokens: Rows, logit_tokens: Rows) -> tuple[Ints, Ints]:
        """The same of what comes after the layers: lm_head over the rows that need logits, and sampling.

        A forward that needs no logits (prefill, commit) takes none of it. The ops of the whole forward that belong to
        no layer are counted here.
        """
        vocab, device = self.model.vocab_params, self.hardware.device
        rows = _wide(tokens if self.execution.logits == "all" else logit_tokens)
        if device.head_curve is not None:
            kernel_ns = _ns(device.head_curve.product_s(rows, vocab))
        else:
            kernel_ns = _ns(_roofline_s(2 * vocab, 2 * rows * vocab, device.bytes_per_s, device.flops_per_s))
        execution = self.execution
        kernel_ns = kernel_ns + execution.graph_kernels_per_forward * self._graph_kernel_ns()
        launch_ns = self._unhidden_ns(kernel_ns, self._launch_ns(execution.ops_per_forward))
        has_head = _wide(logit_tokens) > 0
        return np.where(has_head, kernel_ns, 0), np.where(has_head, launch_ns, 0)

    # --- routed experts on the device ---

    def experts_ns(self, loop_kernel_ns: int, num_active: int, num_rows: int) -> tuple[int, int]:
        """Kernels of a layer's resident experts, and the launch time they do not hide.

        `num_active` experts got `num_rows` rows between them; `loop_kernel_ns` is the sum of their `loop_ns`.
        A grouped kernel has its launch in its fixed part. With a curve of the device, its experts take their own times
        one after another; without, they share one roofline.
        """
        if not num_active:
            return 0, 0
        if self.execution.kernels == "loop":
            return loop_kernel_ns, int(self._unhidden_ns(loop_kernel_ns, num_active * self.expert_launch_ns))
        if self._device_curve is not None:
            return self.grouped_overhead_ns + loop_kernel_ns, 0
        work_ns = max(int(self.grouped_bytes_ns[num_active]), int(self.grouped_flops_ns[num_rows]))
        return self.grouped_overhead_ns + work_ns, 0

    def alone_ns(self, loop_kernel_ns: Ints) -> tuple[Ints, Ints]:
        """The same of one expert that runs alone because it was fetched; `loop_kernel_ns` is its `loop_ns`, any shape.

        It takes separate GEMMs; but a group of one where the device is a CPU and its experts were measured. Together
        with others it is begun while its copy is under way; that a group runs behind the last of its copies is left
        out, as experts take a small part of what their copies do.
        """
        execution = self.execution
        if execution.kernels == "grouped" and self._device_curve is not None and not execution.is_async:
            return self.grouped_overhead_ns + loop_kernel_ns, np.zeros_like(loop_kernel_ns)
        is_begun_before = execution.fetched == "together" and execution.copies == "background"
        hidden_ns = loop_kernel_ns + (self.promote_ns if is_begun_before else 0)
        return loop_kernel_ns, self._unhidden_ns(hidden_ns, self.expert_launch_ns)

    # --- missed experts on the host ---

    def host_call_ns(self, rows: Rows | int, pairs: Rows | int) -> Ints:
        """What a layer's host part costs besides its experts, where the host is called once for all; any shape.

        The call, `rows` hidden states out, and back one for each of them or one for each of the `pairs` that are
        missed, as the execution says. Without a missed pair there is no call.
        """
        if self.execution.host_calls == "expert":
            return np.zeros_like(_wide(pairs))
        call_s = self.hardware.host.call_overhead_s + self._rows_s(_wide(rows), _wide(pairs))
        return np.where(_wide(pairs) > 0, _ns(call_s), 0)

    # --- how the figures come about ---

    def _layer_s(self, params: int, tokens: Rows, context_tokens: Rows, attended_pairs: Rows | None) -> Floats:
        """Seconds of one layer whose weights are `params`: they and the cache are read once, at 2 bytes each.

        With a curve for the linear maps, attention comes on top of them by the roofline.
        """
        model, device = self.model, self.hardware.device
        tokens, context_tokens = _wide(tokens), _wide(context_tokens)
        context_bytes = context_tokens * model.kv_bytes_per_token_layer
        pairs = tokens * (context_tokens + tokens) if attended_pairs is None else _wide(attended_pairs)
        attention_flops = pairs * model.attention_flops_per_pair
        if device.dense_curve is not None:
            attention_s = _roofline_s(context_bytes, attention_flops, device.bytes_per_s, device.flops_per_s)
            return device.dense_curve.product_s(tokens, params) + attention_s
        flops = 2 * tokens * params + attention_flops
        return _roofline_s(2 * params + context_bytes, flops, device.bytes_per_s, device.flops_per_s)

    def _begun(self, kernel_ns: Ints, num_ops: int, num_graph_kernels: int) -> tuple[Ints, Ints]:
        """Kernels of a layer, and the launch time that they do not hide: all of it if they are a graph, as its ops are
        begun when it is done."""
        launch_ns = self._launch_ns(num_ops)
        if not num_graph_kernels:
            return kernel_ns, self._unhidden_ns(kernel_ns, launch_ns)
        whole_ns = np.maximum(kernel_ns, num_graph_kernels * self._graph_kernel_ns())
        return whole_ns, np.full_like(whole_ns, launch_ns)

    def _graph_kernel_ns(self) -> int:
        return int(_ns(self.hardware.device.kernel_launch_s))

    def _launch_ns(self, num_ops: int) -> Ints:
        device = self.hardware.device
        op_s = device.eager_op_s if self.execution.launch == "eager" else device.kernel_launch_s
        return _ns(num_ops * op_s)

    def _unhidden_ns(self, kernel_ns: Ints | int, launch_ns: Ints | int) -> Ints:
        """What launching adds to the time of the kernels."""
        hidden_ns = kernel_ns if self.execution.is_async else np.zeros_like(kernel_ns)
        unhidden_ns: Ints = np.maximum(launch_ns - hidden_ns, 0)
        return unhidden_ns

    def _loop_s(self, rows: Ints) -> Floats:
        model, device = self.model, self.hardware.device
        if self._device_curve is not None:
            return self._device_curve.product_s(rows, model.expert_params)
        flops = 2 * rows * model.expert_params
        work_s = _roofline_s(model.expert_bytes, flops, device.bytes_per_s, device.flops_per_s)
        return 3 * device.gemm_overhead_s + work_s

    def _grouped_tables(self, max_rows: int) -> tuple[Ints, Ints]:
        """By experts touched, and by rows over all experts: the two sides of the grouped kernel's roofline."""
        model, device = self.model, self.hardware.device
        active, rows = np.arange(model.num_experts + 1), np.arange(max_rows * model.top_k + 1)
        bytes_ns = _ns(active * model.expert_bytes / device.experts_bytes_per_s)
        return bytes_ns, _ns(2 * rows * model.expert_params / device.grouped_flops_per_s)

    def _host_table(self, rows: Ints) -> Ints:
        """Host time per missed expert, with its call and its rows' copies where it is called alone."""
        model, host = self.model, self.hardware.host
        if self._host_curve is not None:
            work_s = self._host_curve.product_s(rows, model.expert_params)
        else:
            flops = 2 * rows * model.expert_params
            work_s = _roofline_s(model.expert_bytes, flops, host.bytes_per_s, host.bf16_flops_per_s)
        if self.execution.home == "disk":
            work_s = work_s + self._read_s()
        if self.execution.host_calls == "expert":
            work_s = work_s + host.call_overhead_s + self._rows_s(rows, rows)
        return _table(work_s)

    def _rows_s(self, rows: Ints, pairs: Ints) -> Floats:
        """Seconds to copy the hidden states of `rows` tokens to the host and results back, not queued behind weights.

        Nothing where they are on the host already: with unified memory, or where the device is host memory.
        """
        links, execution = self.hardware.links, self.execution
        if links is None or execution.home == "disk":
            return np.zeros(rows.shape)
        pinned = execution.is_pinned
        out, back = (links.d2h_pinned, links.h2d_pinned) if pinned else (links.d2h_pageable, links.h2d_pageable)
        row_bytes = self.model.hidden_size * execution.activation_bytes
        back_bytes = (pairs if execution.returns == "pair" else rows) * row_bytes
        return out.latency_s + rows * row_bytes / out.bytes_per_s + back.latency_s + back_bytes / back.bytes_per_s

    def _copy_costs(self) -> None:
        """Copies of weights. Where device and host share the memory they live in, nothing is copied: moves are free."""
        links, execution = self.hardware.links, self.execution
        self.promote_ns = self.evict_ns = self.promote_bytes = self.evict_bytes = 0
        if execution.home == "disk":
            self.promote_ns, self.promote_bytes = int(_ns(self._read_s())), self.model.expert_bytes
        elif links is not None:
            # Write-back in the background keeps both directions busy at once.
            share = links.duplex_factor if execution.write_back and execution.copies == "background" else 1.0
            promotion = links.h2d_pinned if execution.is_pinned else links.h2d_pageable
            self.promote_ns, self.promote_bytes = self._expert_copy_ns(promotion, share), self.model.expert_bytes
            if execution.write_back:
                # Unpinned, the evicted expert lands in memory that is allocated for it on the spot.
                eviction = links.d2h_pinned if execution.is_pinned else links.d2h_fresh
                self.evict_ns, self.evict_bytes = self._expert_copy_ns(eviction, share), self.model.expert_bytes

    def _read_s(self) -> float:
        """Seconds of one expert's read from the drive."""
        return self.hardware.nvme.copy_s(self.model.expert_bytes)

    def _expert_copy_ns(self, link: Link, share: float) -> int:
        transfer_s = self.model.expert_bytes / (link.bytes_per_s * share)
        return int(_ns(self.execution.copies_per_expert * link.latency_s + transfer_s))


def _wide(rows: Rows | int) -> Ints:
    """As 64 bits: the operations of a forward do not fit 32."""
    return np.asarray(rows, np.int64)


def _roofline_s(num_bytes: Ints | int, flops: Ints, bytes_per_s: float, flops_per_s: float) -> Floats:
    seconds: Floats = np.maximum(num_bytes / bytes_per_s, flops / flops_per_s)
    return seconds


def _ns(seconds: Floats | float) -> Ints:
    """Whole nanoseconds, half to even as Python's `round`."""
    return np.rint(np.asarray(seconds) * 1e9).astype(np.int64)


def _table(seconds: Floats) -> Ints:
    """A table by number of rows, in ns: no rows, no time."""
    table = _ns(seconds)
    table[0] = 0
    return table
