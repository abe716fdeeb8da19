"""Tiny models of Transformers, of every architecture that a small configuration can build.

A configuration names its sizes as it likes, so those of all architectures stand in one table and
each takes those that it has. Where they contradict each other some are left out, and where that
does not help either the sizes are written by hand. Nothing is downloaded.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
VOCABULARY, WIDTH, INNER = 99, 32, 64
MOST_PARAMETERS = 8e6  # what is larger took no notice of the sizes
_VALUES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    WIDTH: "hidden_size n_embd d_model embed_dim word_embed_proj_dim emb_dim d_embed lru_width "
    "attention_hidden_size",
    INNER: "intermediate_size ffn_dim d_ff ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim "
    "inner_dim max_position_embeddings n_positions n_ctx max_seq_len",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
    "mamba_d_head attention_window_size sliding_window",
    8: "head_dim attention_head_dim d_kv kv_lora_rank q_lora_rank v_head_dim state_size "
    "mamba_d_state linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
    "query_pre_attn_scalar index_head_dim chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "qk_rope_head_dim qk_nope_head_dim mamba_n_heads time_step_rank conv_kernel "
    "linear_num_value_heads laurel_rank rotary_dim index_topk adapter_rank",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
    "encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok mamba_expand "
    "mamba_dt_rank linear_num_key_heads moe_k moe_topk altup_num_inputs index_n_heads "
    "num_mem_blocks n_mamba_heads num_mem_heads",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts",
    0: "num_kv_shared_layers use_mamba_kernels",
}
_SIZES = {name: value for value, names in _VALUES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LEFT_OUT = (
    (),
    ("head_dim",),
    ("head_dim", "layer_types"),
    ("head_dim", "layer_types", "num_hidden_layers", "num_layers"),
    ("layer_types", "n_group", "topk_group", "first_k_dense_replace"),
)
# What every configuration written by hand starts from, and its own.
_BY_HAND = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": INNER,
    "attention_dropout": 0.0,
    **_TOKENS,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_OWN = {
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8, **_MAMBA},
    "dbrx": {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "deepseek_v2": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "topk_method": "greedy",
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.5,
        **_MAMBA,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "logits_scaling": 4.0,
        "shared_intermediate_size": 16,
        **_MAMBA,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "expand": 2,
        "state_size": 8,
        "chunk_size": 8,
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "nemotron_h": {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
    },
    "qwen4_exp": {"head_dim": 8},
    "qwen4_exp_text": {"head_dim": 8},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": WIDTH,
        "attention_window_size": 16,
        "head_dim": 8,
        "logits_soft_cap": 30.0,
    },
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
}


Step = TypeVar("Step")


class Tiny(NamedTuple):
    """An architecture in a configuration that it can be built in."""

    model: Callable[[], nn.Module]  # always of the same parameters, in training
    inputs: dict[str, Tensor]  # with labels, of which some are ignored


class NotBuilt(Exception):
    """No configuration of the architecture makes a training step, with the last one's reason."""


def first_step(kind: str, model_type: str, step: Callable[[Tiny], Step]) -> tuple[Tiny, Step]:
    """The architecture in the first configuration in which the step works, and what it gives."""
    reason = None
    for config in _configurations(model_type):
        try:
            tiny = _tiny(kind, model_type, config())
            return tiny, step(tiny)
        except Exception as error:  # of any kind: the next configuration is tried
            reason = error
    raise NotBuilt(f"{model_type}: {type(reason).__name__}: {reason}") from reason


def _tiny(kind: str, model_type: str, config) -> Tiny:
    names = KINDS[kind][model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    if hasattr(config, "is_decoder") and kind != "seq2seq":
        config.is_decoder = kind == "causal"
    if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = _TOKENS["bos_token_id"]
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    return Tiny(_maker(model_class, config), _inputs(model_class, config))


def _configurations(model_type: str) -> Iterator[Callable]:
    config_class = CONFIG_MAPPING[model_type]
    yield functools.partial(config_class, **_BY_HAND | _OWN.get(model_type, {}))
    for names in _LEFT_OUT:
        yield functools.partial(_from_sizes, config_class, names)


def _from_sizes(config_class: type, left_out: tuple[str, ...]):
    default = config_class()
    text = default.get_text_config()
    if text is not default:
        config_class, default = type(text), text
    renamed = getattr(config_class, "attribute_map", {})
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if getattr(default, name, None) is not None or name in renamed
    }
    sizes = {name: value for name, value in sizes.items() if renamed.get(name) not in sizes}
    for name, value in vars(default).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
            sizes[name] = 0.0
    sizes = {name: value for name, value in sizes.items() if name not in left_out}
    sizes |= {name: token for name, token in _TOKENS.items() if hasattr(default, name)}
    layers = getattr(default, "layer_types", None)
    if isinstance(layers, (list, tuple)):
        different = sorted(set(layers), key=layers.index)
        sizes["layer_types"] = (different + list(layers))[:2]
    for _ in range(3):
        try:
            return config_class(**sizes)
        except Exception as error:
            refused = [
                n for n in sizes if n in str(error) and n not in ("vocab_size", "hidden_size")
            ]
            if not refused:
                raise
            sizes = {name: value for name, value in sizes.items() if name not in refused}
    return config_class(**sizes)


def _maker(model_class: type, config) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = model_class(config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            # Some start at zero, and of these a loss would say nothing.
            if parameter.dim() >= 2 and parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.05)
        return model.train()

    return make


def _inputs(model_class: type, config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, min(config.vocab_size, VOCABULARY), (2, 16), generator=generator)
    labels = tokens.clone()
    labels[0, 9:] = labels[1, :2] = -100
    inputs = {"input_ids": tokens, "labels": labels}
    if "attention_mask" in inspect.signature(model_class.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)
    return inputs
