"""The network on an accelerator: what lies between two layers' routed experts is begun with one call to the device.

An accelerator computes the small operations of a layer faster than a host begins them. So everything from one layer's
routed experts to the next one's is captured as a graph (see `device_calls.Graphs`) when it first runs, and replayed
from then on. A graph knows fixed addresses, hence everything that it reads and writes lies in a `Room`, and keys and
values in one cache that all sequences use. How many tokens a row may look at changes from block to block: rows attend
to a span of the cache that is rounded up to a power of two, under a mask that is computed from how much is filled.

What is computed is what `tidesim.engine.model` says. Sums are in another order, and the rotation rounds once less.

Letters: T tokens, D hidden size, H query heads, G key/value heads, R = H / G, C head size, C' its rotating part,
S span, L MoE layers, K top-k, I width of a gated MLP.
"""

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidesim.engine.device_calls import DeviceCalls, Work
from tidesim.engine.model import MLP, KVCache, Layer, LLaDA2, MoE, NetworkConfig, RMSNorm, Routing

MOST_ROOMS = 8  # kept, with their graphs; without a cache each block needs another one
_SHORTEST_SPAN = 256
_SPAN_STEP = 64  # caches are multiples of it: masks of other lengths are copied before they are used


class _Kind(NamedTuple):
    """Forwards that are computed by the same operations on the same shapes."""

    num_rows: int
    span: int
    is_cached: bool
    is_masked: bool


class Room:
    """What the graphs of one kind of forward read and write.

    Attributes
    ----------
    tokens, positions : [T]. start : [1], tokens before the rows. limits : [T], leading tokens that a row may look at.
    cos [T, 1, C], sin [T, 1, C'] : rotation tables, with ones where a head does not rotate, and the sign of each half.
    mask : [R * T, S], what is added to the scores of the R query heads of a group, one head after another.
    x, normed, shared : [T, D], the hidden state, the same behind a layer's second norm, and its shared expert's output.
    routed : [T, D] float32, the sum over the routed experts.
    ids : [L, T, K] in pinned memory. weights : [L, T, K] float32.
    hidden : [T, D], behind the final norm.
    """

    def __init__(self, config: NetworkConfig, kind: _Kind, like: Tensor, calls: DeviceCalls) -> None:
        T, D, S = kind.num_rows, config.hidden_size, kind.span
        num_layers = config.num_hidden_layers - config.first_k_dense_replace
        groups = config.num_attention_heads // config.num_key_value_heads
        device = like.device
        self.kind = kind
        self.tokens, self.positions, self.limits = torch.zeros(3, T, dtype=torch.long, device=device).unbind()
        self.start = torch.zeros(1, dtype=torch.long, device=device)
        self.rows, self.columns = torch.arange(T, device=device), torch.arange(S, device=device)
        self.cos, self.sin = like.new_ones(T, 1, config.head_dim), like.new_zeros(T, 1, config.rotary_dim)
        self.mask = like.new_zeros(groups * T, S)
        self.x, self.normed, self.shared, self.hidden = (like.new_zeros(T, D) for _ in range(4))
        self.routed = torch.zeros(T, D, device=device)
        choice = (num_layers, T, config.num_experts_per_tok)
        self.ids, self.weights = calls.pinned(choice, torch.long), torch.zeros(choice, device=device)
        self.again: list[Work] = []


def room_bytes(hidden_size: int, groups: int, num_rows: int, span: int, element_bytes: int) -> int:
    """Device memory of a `Room` with masks for the `groups` query heads of a key, without its smaller parts."""
    return num_rows * (hidden_size * (4 * element_bytes + 4) + groups * span * element_bytes)


class _GatedMLP:
    """A gated MLP whose first two maps are one."""

    def __init__(self, mlp: MLP) -> None:
        self._gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))  # [2 I, D]
        # The memory is held once.
        gate, up = self._gate_up.chunk(2)
        mlp.gate_proj.weight, mlp.up_proj.weight = (nn.Parameter(half, requires_grad=False) for half in (gate, up))
        self._down = mlp.down_proj.weight.t()  # [I, D]

    def run(self, x: Tensor, out: Tensor) -> Tensor:
        """x [T, D] -> out [T, D]."""
        gate, up = functional.linear(x, self._gate_up).chunk(2, dim=-1)  # [T, I] each
        return torch.mm(functional.silu(gate) * up, self._down, out=out)


class _DeviceLayer:
    """A layer without its routed experts, in as few operations as PyTorch has for it."""

    def __init__(self, layer: Layer, config: NetworkConfig) -> None:
        attention = layer.attention
        self._num_heads, self._num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._rotary_dim = config.head_dim, config.rotary_dim
        self._norm, self._second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._query_key_value, self._out = attention.query_key_value.weight, attention.dense.weight
        self._head_eps = attention.query_layernorm.eps
        weights = (attention.query_layernorm.weight, attention.key_layernorm.weight)
        repeats = (self._num_heads, self._num_kv_heads)
        parts = [weight.expand(number, -1) for weight, number in zip(weights, repeats, strict=True)]
        self._head_weights = torch.cat(parts)  # [H + G, C]
        mlp = layer.mlp
        self._gate = mlp.gate if isinstance(mlp, MoE) else None
        self._gated = _GatedMLP(mlp.shared_experts if isinstance(mlp, MoE) else mlp)

    def attend(self, room: Room, keys: Tensor | None, values: Tensor | None) -> None:
        """Add attention to `room.x`; keys and values [G, tokens, C] of a cache are written, and read from its start."""
        T, H, G, C = len(room.x), self._num_heads, self._num_kv_heads, self._head_dim
        x = functional.linear(normalized(room.x, self._norm), self._query_key_value)
        heads = x.view(T, H + 2 * G, C)
        scaled = functional.rms_norm(heads, (C,), eps=self._head_eps)[:, : H + G] * self._head_weights
        turned = self._rotated(scaled, room)  # [T, H + G, C]
        key, value = turned[:, H:].transpose(0, 1), heads[:, H + G :].transpose(0, 1)  # [G, T, C]
        if keys is not None and values is not None:
            places = room.start + room.rows
            keys.index_copy_(1, places, key)
            values.index_copy_(1, places, value)
            key, value = keys[:, : room.kind.span], values[:, : room.kind.span]  # [G, S, C]
        query = turned[:, :H].view(T, G, H // G, C).permute(1, 2, 0, 3).reshape(1, G, -1, C)  # [1, G, R * T, C]
        mixed = functional.scaled_dot_product_attention(query, key[None], value[None], attn_mask=room.mask)
        by_row = mixed.view(G, H // G, T, C).permute(2, 0, 1, 3).reshape(T, H * C)
        room.x.add_(functional.linear(by_row, self._out))

    def _rotated(self, heads: Tensor, room: Room) -> Tensor:
        first, second = heads[..., : self._rotary_dim].chunk(2, dim=-1)
        half = torch.cat((second, first), dim=-1)
        turned = heads * room.cos
        turned[..., : self._rotary_dim].addcmul_(half, room.sin)
        return turned

    def run_mlp(self, room: Room) -> None:
        """The rest of a dense layer."""
        room.x.add_(self._gated.run(normalized(room.x, self._second_norm), room.shared))

    def route(self, room: Room, layer: int) -> None:
        """What an MoE layer does before its routed experts: norm, router, shared expert."""
        assert self._gate is not None
        torch.mul(self._second_norm.weight, unscaled(room.x, self._second_norm), out=room.normed)
        routing = self._gate(room.normed)
        room.ids[layer].copy_(routing.expert_ids, non_blocking=True)
        room.weights[layer].copy_(routing.expert_weights)
        self._gated.run(room.normed, room.shared)


def unscaled(x: Tensor, norm: RMSNorm) -> Tensor:
    """What `norm` makes of x before it multiplies its weight; rounded there, as the architecture has it."""
    return functional.rms_norm(x, x.shape[-1:], eps=norm.eps)


def normalized(x: Tensor, norm: RMSNorm) -> Tensor:
    """What `norm` makes of x."""
    return norm.weight * unscaled(x, norm)


class DeviceNetwork(LLaDA2):
    """`network` on the device that `calls` reaches; it takes the modules over.

    One sequence at a time. The routed experts of its layers get ids [T, K] in pinned host memory that are there once
    the current stream has come so far, and all that a forward hands out but the routing is overwritten by the next.
    """

    def __init__(self, network: LLaDA2, calls: DeviceCalls) -> None:
        nn.Module.__init__(self)
        for name, part in network.named_children():
            setattr(self, name, part)
        self.config, self.rotary = network.config, network.rotary
        self._calls, self._graphs = calls, calls.new_graphs()
        self._rooms: dict[_Kind, Room] = {}
        self._cache: KVCache | None = None
        for moe in self.moe_layers:
            moe.gate.float()  # it computes in float32, and would widen its weights each time
        self._parts = [_DeviceLayer(cast(Layer, layer), self.config) for layer in self.layers]
        self._inv_freq = self.rotary.inv_freq.to(calls.device)

    def new_cache(self, max_tokens: int) -> KVCache:
        """See `LLaDA2.new_cache`. It is the memory of the last sequence's, unless that was shorter."""
        if self._cache is None or self._cache.keys[0].shape[2] < max_tokens:
            # Graphs hold addresses of the old one.
            self._rooms, self._graphs, self._cache = {}, self._calls.new_graphs(), None
            self._cache = super().new_cache(-(-max_tokens // _SPAN_STEP) * _SPAN_STEP)
        self._cache.length = 0
        return self._cache

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        has_lookahead: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """See `LLaDA2`; tokens [1, T]. A mask is taken to let every token see some number of the leading ones, as a
        block-causal one does.

        Raise ValueError for several sequences, or a look-ahead, which no run on a device asks for.
        """
        if len(tokens) != 1 or has_lookahead:
            raise ValueError(
                f"{len(tokens)} sequences, has_lookahead={has_lookahead}: on a device there is one, without."
            )
        room = self._room(tokens.shape[1], mask is not None, cache)
        self._fill(room, tokens[0], positions, mask, cache)
        for number, moe in enumerate(self.moe_layers):
            self._run(room, number, cache)
            routing = Routing(room.ids[number], room.weights[number])
            room.routed.copy_(moe.experts(room.normed, routing))
        self._run(room, len(self.moe_layers), cache)
        pairs = zip(room.ids.clone().unbind(), room.weights.clone().unbind(), strict=True)
        return room.hidden[None], [Routing(*pair) for pair in pairs]

    # --- rooms and graphs ---

    def _room(self, num_rows: int, is_masked: bool, cache: KVCache | None) -> Room:
        kind = _Kind(num_rows, num_rows if cache is None else self._span(num_rows, cache), cache is not None, is_masked)
        if not self._is_kept(kind, cache):
            return Room(self.config, kind, self.norm.weight, self._calls)
        room = self._rooms.pop(kind, None) or Room(self.config, kind, self.norm.weight, self._calls)
        self._rooms[kind] = room  # the last one used is the last one to go
        if len(self._rooms) > MOST_ROOMS:
            del self._rooms[next(iter(self._rooms))]
        return room

    def _is_kept(self, kind: _Kind, cache: KVCache | None) -> bool:
        """Whether there will be more such forwards: a prefill comes once, all others once for each step."""
        return cache is None or (cache is self._cache and not kind.is_masked)

    def _span(self, num_rows: int, cache: KVCache) -> int:
        num_tokens = cache.length + num_rows
        return min(int(cache.keys[0].shape[2]), max(_SHORTEST_SPAN, 1 << (num_tokens - 1).bit_length()))

    def _fill(self, room: Room, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None) -> None:
        """Put in place what changes from forward to forward."""
        room.tokens.copy_(tokens)
        room.positions.copy_(positions)
        room.start.fill_(0 if cache is None else cache.length)
        if mask is not None:
            room.limits.copy_(mask.sum(1))

    def run_again(self, num_rows: int, number: int) -> None:
        """The part before the routed experts of MoE layer `number` in the last forward of so many rows, once more."""
        last = [room for room in self._rooms.values() if room.kind.num_rows == num_rows][-1]
        last.again[number]()

    def _run(self, room: Room, number: int, cache: KVCache | None) -> None:
        """The part of a forward before the routed experts of MoE layer `number`, or behind the last ones."""
        if number < len(room.again):
            room.again[number]()
            return
        work = partial(self._part, room, number, cache)
        if self._is_kept(room.kind, cache):
            room.again.append(self._graphs.run(work))
        else:
            work()

    # --- what is computed ---

    def _part(self, room: Room, number: int, cache: KVCache | None) -> None:
        """See `_run`."""
        num_dense = self.config.first_k_dense_replace
        if number == 0:
            self._enter(room)
            for layer in range(num_dense):
                self._attend(room, layer, cache)
                self._parts[layer].run_mlp(room)
        else:
            room.x.add_(room.shared.add_(room.routed.to(room.x.dtype)))
        if number < len(self._parts) - num_dense:
            self._attend(room, num_dense + number, cache)
            self._parts[num_dense + number].route(room, number)
        else:
            torch.mul(self.norm.weight, unscaled(room.x, self.norm), out=room.hidden)

    def _attend(self, room: Room, layer: int, cache: KVCache | None) -> None:
        keys, values = (None, None) if cache is None else (cache.keys[layer][0], cache.values[layer][0])
        self._parts[layer].attend(room, keys, values)

    def _enter(self, room: Room) -> None:
        """Embedding, rotation tables and mask."""
        T, half = len(room.x), len(self._inv_freq)
        torch.index_select(self.word_embeddings.weight, 0, room.tokens, out=room.x)
        angles = room.positions.float()[:, None] * self._inv_freq  # [T, C' / 2]
        cos, sin = angles.cos(), angles.sin()
        room.cos.view(T, -1)[:, : 2 * half].view(T, 2, half).copy_(cos[:, None])
        room.sin.view(T, 2, half).copy_(torch.stack((-sin, sin), dim=1))
        if not room.kind.is_masked:
            room.limits.copy_((room.start + T).expand(T))
        hidden = room.columns >= room.limits[:, None]  # [T, S]
        room.mask.zero_().view(-1, T, room.kind.span).masked_fill_(hidden, float("-inf"))
