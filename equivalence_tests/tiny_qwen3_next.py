"""A tiny Qwen3-Next with seeded weights, written as a checkpoint: what the model tests serve."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    # Large: the norm behind a GDN core would hide a wrong scale of its output.
    "rms_norm_eps": 1e-3,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    # As many as are chosen: a router at a tie would make two right answers differ by a whole expert.
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "bos_token_id": 0,
    "eos_token_id": 511,
}
"""K = V = 64 and HV = 2 H, as vLLM's kernel for CPUs takes them; GDN layers before and after attention."""

NUM_GDN_LAYERS = CONFIG["layer_types"].count("linear_attention")
_SHARD = "model.safetensors"


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write config and weights to a folder, and return it; equal seeds write equal weights.

    The weights have the scale that keeps every activation near 1, so that each layer, and in a GDN layer each
    gate, moves the logits: vLLM's own dummy weights leave the GDN outputs near 1e-11.
    """
    from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file(dict(_weights(torch.Generator().manual_seed(seed))), str(folder / _SHARD))
    return folder


def _weights(generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)
        return weight.to(torch.bfloat16)

    def norm(size: int, center: float) -> torch.Tensor:
        return (center + 0.1 * torch.randn(size, generator=generator)).to(torch.bfloat16)

    yield "model.embed_tokens.weight", linear(vocab, hidden, math.sqrt(hidden))
    for i, kind in enumerate(CONFIG["layer_types"]):
        layer = f"model.layers.{i}"
        # Qwen3-Next's norms scale by 1 + weight; but for the one inside a GDN layer.
        yield f"{layer}.input_layernorm.weight", norm(hidden, 0)
        yield f"{layer}.post_attention_layernorm.weight", norm(hidden, 0)
        if kind == "linear_attention":
            yield from _gdn_weights(f"{layer}.linear_attn", linear, norm, generator)
        else:
            yield from _attention_weights(f"{layer}.self_attn", linear, norm)
        yield from _expert_weights(f"{layer}.mlp", linear)
    yield "model.norm.weight", norm(hidden, 0)
    yield "lm_head.weight", linear(vocab, hidden, 1.5)


def _gdn_weights(layer: str, linear, norm, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    hidden = CONFIG["hidden_size"]
    heads = CONFIG["linear_num_value_heads"]
    keys = CONFIG["linear_num_key_heads"] * CONFIG["linear_key_head_dim"]
    values = heads * CONFIG["linear_value_head_dim"]
    yield f"{layer}.in_proj_qkvz.weight", linear(2 * keys + 2 * values, hidden)
    yield f"{layer}.in_proj_ba.weight", linear(2 * heads, hidden)
    yield f"{layer}.conv1d.weight", linear(2 * keys + values, CONFIG["linear_conv_kernel_dim"], 2.0)[:, None]
    # Rates from slow to fast: some heads remember the whole prompt, some a few tokens.
    yield f"{layer}.A_log", torch.linspace(math.log(0.01), math.log(1.0), heads).to(torch.bfloat16)
    yield f"{layer}.dt_bias", (0.5 * torch.randn(heads, generator=generator)).to(torch.bfloat16)
    yield f"{layer}.norm.weight", norm(CONFIG["linear_value_head_dim"], 1)
    yield f"{layer}.out_proj.weight", linear(hidden, values, 2.0)


def _attention_weights(layer: str, linear, norm) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, dim = CONFIG["hidden_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    yield f"{layer}.q_proj.weight", linear(2 * queries, hidden)  # and the gate of the output
    yield f"{layer}.k_proj.weight", linear(keys, hidden)
    yield f"{layer}.v_proj.weight", linear(keys, hidden)
    yield f"{layer}.o_proj.weight", linear(hidden, queries)
    yield f"{layer}.q_norm.weight", norm(dim, 0)
    yield f"{layer}.k_norm.weight", norm(dim, 0)


def _expert_weights(layer: str, linear) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    names = [f"experts.{i}" for i in range(CONFIG["num_experts"])] + ["shared_expert"]
    for name in names:
        yield f"{layer}.{name}.gate_proj.weight", linear(inner, hidden)
        yield f"{layer}.{name}.up_proj.weight", linear(inner, hidden)
        yield f"{layer}.{name}.down_proj.weight", linear(hidden, inner)
    yield f"{layer}.gate.weight", linear(CONFIG["num_experts"], hidden)
    yield f"{layer}.shared_expert_gate.weight", linear(1, hidden)
