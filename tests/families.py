"""Tiny random models of many decoder families, each with its characteristic feature (a window, ALiBi, experts, …).

PYTHONPATH=. python tests/families.py          prints the table of docs/models.md: what each family gives in each action
"""

from pathlib import Path

from conftest import make_tokenizer

WINDOW = 24
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
OLD = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}  # GPT-2's names
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 48,
    "factor": 8.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = ["sliding_attention", "full_attention"] * 2

# name → (model type of transformers, its configuration)
FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", OLD),
    "gpt-neo (local attention)": ("gpt_neo", {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": WINDOW,
                                  "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 512}),
    "gpt-j": ("gptj", {**OLD, "rotary_dim": 4}),
    "gpt-neox": ("gpt_neox", {**SMALL, "intermediate_size": 64, "rotary_pct": 0.5}),
    "opt": ("opt", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom (ALiBi)": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "falcon (ALiBi)": ("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True}),
    "mpt (ALiBi)": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}),
    "llama": ("llama", GROUPED),
    "llama (dynamic rope)": ("llama", {**GROUPED, "max_position_embeddings": 64, "rope_parameters": DYNAMIC}),
    "llama (yarn)": ("llama", {**GROUPED, "rope_parameters": YARN}),
    "mistral (window)": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**GROUPED, **EXPERTS}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 (window)": ("qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW,
                                 "max_window_layers": 2}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "qwen3-moe": ("qwen3_moe", {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 16}),
    "qwen3-next (hybrid)": ("qwen3_next", {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 8}),
    "gemma2 (window, softcap)": ("gemma2", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING,
                                 "query_pre_attn_scalar": 8}),
    "gemma3 (window)": ("gemma3_text", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING,
                        "query_pre_attn_scalar": 8}),
    "gpt-oss (sinks)": ("gpt_oss", {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": WINDOW,
                                    "layer_types": SLIDING}),
    "phi": ("phi", {**GROUPED, "num_key_value_heads": 4}),
    "phi3 (longrope)": ("phi3", {**GROUPED, "rope_parameters": LONG, "original_max_position_embeddings": 48,
                                 "pad_token_id": 0}),
    "olmo2": ("olmo2", GROUPED),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {**GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "cohere": ("cohere", GROUPED),
    "cohere2 (window)": ("cohere2", {**GROUPED, "sliding_window": WINDOW, "layer_types": SLIDING}),
    "stablelm": ("stablelm", {**GROUPED, "partial_rotary_factor": 0.5}),
    "starcoder2 (window)": ("starcoder2", {**GROUPED, "sliding_window": WINDOW}),
    "smollm3": ("smollm3", {**GROUPED, "pad_token_id": 0, "no_rope_layers": [1, 0, 1, 0]}),
    "llama4 (chunks)": ("llama4_text", {**GROUPED, "head_dim": 8, "num_local_experts": 2,
                        "attention_chunk_size": WINDOW, "intermediate_size_mlp": 64, "pad_token_id": 0}),
    "deepseek-v3 (latent attention)": ("deepseek_v3", {**GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}),
    "mamba2": ("mamba2", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "num_heads": 8, "head_dim": 8,
               "n_groups": 1, "chunk_size": 16}),
    "recurrent-gemma": ("recurrent_gemma", {**SMALL, "intermediate_size": 64, "attention_window_size": WINDOW,
                        "lru_width": 32, "num_key_value_heads": 1, "head_dim": 8}),
    "falcon-h1 (hybrid)": ("falcon_h1", {**GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                           "mamba_d_state": 8, "mamba_chunk_size": 16}),
    "jamba (hybrid)": ("jamba", {**GROUPED, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8,
                       "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "pad_token_id": 0}),
}  # fmt: skip

# every action's test in test_families.py is run on every family
STEP, PRIVATE, MERGE, SWEEP, SCORE, PERPLEXITY = (
    "one step, reloaded",
    "one step with `--dp`",
    "merge",
    "greedy sweep, prompts beyond the window",
    "score",
    "perplexity",
)
ACTIONS = (STEP, PRIVATE, MERGE, SWEEP, SCORE, PERPLEXITY)

# LoRA's layers where `--target_modules all-linear` is refused: experts and state spaces keep weights outside of layers
SOME_LAYERS = {
    "mixtral": ["q_proj", "o_proj"],
    "qwen3-moe": ["q_proj", "o_proj"],
    "qwen3-next (hybrid)": ["q_proj", "o_proj"],
    "olmoe": ["q_proj", "o_proj"],
    "gpt-oss (sinks)": ["q_proj", "o_proj"],
    "llama4 (chunks)": ["q_proj", "v_proj"],
    "deepseek-v3 (latent attention)": ["q_a_proj", "o_proj"],
    "jamba (hybrid)": ["q_proj", "in_proj", "out_proj", "down_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
    "falcon-h1 (hybrid)": ["q_proj", "in_proj"],
}
DYNAMIC = "llama (dynamic rope)"
# (family, action) → part of the one line that refuses it
REFUSED = {
    ("recurrent-gemma", SWEEP): "keeps its state in its modules",
    (DYNAMIC, SWEEP): "use at most 64 tokens",  # where its rotary embedding begins to depend on the length
}


def table() -> list[str]:
    """The lines of the table in docs/models.md."""
    lines = [f"| family | {' | '.join(ACTIONS)} |", "|---" * (len(ACTIONS) + 1) + "|"]
    for name in FAMILIES:
        layers = "equal, layers named" if name in SOME_LAYERS else "equal"
        found = {action: layers if action in (STEP, PRIVATE) else "equal" for action in ACTIONS}
        found |= {action: f"refused: {words}" for (family, action), words in REFUSED.items() if family == name}
        lines.append(f"| {name} | {' | '.join(found.values())} |")
    return lines


def make_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A random model of a family with its tokenizer in `folder`; weights scaled up so that predictions are peaked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    kind, sizes = FAMILIES[name]
    given = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, **sizes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in key and "wte" not in key and "conv" not in key:
                parameter.mul_(4)
        head = model.get_output_embeddings()
        head.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print("\n".join(table()))
