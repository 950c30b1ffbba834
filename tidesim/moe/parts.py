"""The parts in which mixture-of-experts networks differ from LLaDA2."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which small parts a network has beside its large matrices. The defaults are those of LLaDA2.

    Parameters
    ----------
    qk_norm : norms of queries and keys: one weight for each dimension of a head ("head"), one for each dimension of all
        heads together ("full"), or no such norms (None).
    has_qkv_bias : whether the projections of queries, keys and values add a bias.
    has_router_bias : whether the router keeps a number for each expert besides its row.
    has_shared_gate : whether the shared expert is weighted by a router of its own, of one row.
    is_tied : whether lm_head is the embedding, which is then stored once.
    """

    qk_norm: Literal["head", "full"] | None = "head"
    has_qkv_bias: bool = False
    has_router_bias: bool = True
    has_shared_gate: bool = False
    is_tied: bool = False


LLADA2_LAYOUT = Layout()


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """DeepSeek's attention (MLA), whose cache keeps one short vector a token in place of the keys and values of heads.

    Parameters
    ----------
    query_rank : width of the vector that queries are made from; 0 if they are made from the hidden state at once.
    kv_rank : width of the vector that keys and values are made from. The cache keeps it.
    rope_dim : rotated dimensions of a query, and of the one key that all heads share. The cache keeps that too.
    nope_dim : further dimensions of a head's query and key.
    value_dim : dimensions of a head's value.
    """

    query_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    def params(self, hidden_size: int, num_heads: int) -> int:
        """Parameters of one layer's projections, and of the norms between them."""
        query_width = num_heads * (self.nope_dim + self.rope_dim)
        rank = self.query_rank
        queries = rank * (hidden_size + 1 + query_width) if rank else hidden_size * query_width
        latent = hidden_size * (self.kv_rank + self.rope_dim) + self.kv_rank
        heads = self.kv_rank * num_heads * (self.nope_dim + self.value_dim)
        return queries + latent + heads + num_heads * self.value_dim * hidden_size

    @property
    def cached_width(self) -> int:
        """Numbers that a token leaves in one layer's cache."""
        return self.kv_rank + self.rope_dim

    def flops_per_pair(self, num_heads: int) -> int:
        """Operations of one query and one cached token: scores over what is cached, and a sum of latent vectors."""
        return 2 * num_heads * (self.cached_width + self.kv_rank)
