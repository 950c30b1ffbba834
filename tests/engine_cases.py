"""A small LLaDA2 network with random weights, for tests of the engine."""

import torch

from tidesim.engine.model import LLaDA2, NetworkConfig, StackedExperts

SMALL = NetworkConfig(
    num_hidden_layers=3,
    first_k_dense_replace=1,
    hidden_size=48,
    intermediate_size=96,
    moe_intermediate_size=24,
    num_experts=32,
    num_experts_per_tok=4,
    num_shared_experts=1,
    n_group=8,
    topk_group=3,
    routed_scaling_factor=2.5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    partial_rotary_factor=0.5,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    vocab_size=128,
)


def small_network(seed: int, config: NetworkConfig = SMALL) -> LLaDA2:
    """A float32 network whose weights, norms and expert biases are all random, so that each of them matters."""
    network = LLaDA2(config)
    for moe in network.moe_layers:
        moe.experts = StackedExperts(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    for moe in network.moe_layers:
        moe.gate.expert_bias.normal_(0.0, 0.2, generator=generator)
    return network.eval().requires_grad_(False)
