"""Published diffusion language models as classes of ``transformers``: what their settings and weights are called there.

Their own code is not needed, and never run. A family is a row of :data:`FAMILIES`: the class whose computation it is,
how its settings translate, and new names for its weights. Attention is bidirectional (or within and before a block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tasks import UnmaskError

Settings = Mapping[str, Any]


class Family(NamedTuple):
    """How a published model is one of ``transformers``.

    Attributes:
        architecture: the class. settings: from the published configuration to its. required: values of published
            settings that the class computes; any other is refused.
        weights: patterns of published names of weights, and what they are called there; empty: the same.
        shifted: the logits at a position are of the next one. blocks: attention sees whole blocks, up to its own.
    """

    architecture: str
    settings: Callable[[Settings], dict[str, Any]]
    required: dict[str, tuple[Any, ...]]
    weights: Mapping[str, str] | None = None
    shifted: bool = False
    blocks: bool = False


def _llada(published: Settings) -> dict[str, Any]:
    return {
        "vocab_size": published.get("embedding_size") or published["vocab_size"],
        "hidden_size": published["d_model"],
        "intermediate_size": published.get("mlp_hidden_size") or published["mlp_ratio"] * published["d_model"],
        "num_hidden_layers": published["n_layers"],
        "num_attention_heads": published["n_heads"],
        "num_key_value_heads": published.get("n_kv_heads") or published["n_heads"],
        "max_position_embeddings": published["max_sequence_length"],
        "rms_norm_eps": published.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": published["rope_theta"]},
        "tie_word_embeddings": published.get("weight_tying", False),
        "pad_token_id": published.get("pad_token_id"),
    }


def _same_names(published: Settings) -> dict[str, Any]:
    """Of Dream and SDAR, whose settings are those of Qwen already."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    optional = {name: published[name] for name in ("head_dim", "attention_bias", "pad_token_id") if name in published}
    scaled = published.get("rope_scaling") or {"rope_type": "default"}
    rope = {"rope_parameters": {**scaled, "rope_theta": published["rope_theta"]}}
    return {name: published[name] for name in kept} | optional | rope


_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
FAMILIES: dict[str, Family] = {  # by the published model_type
    "llada": Family(
        "LlamaForCausalLM",
        _llada,
        {
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "rope": (True,),
            "alibi": (False,),
            "attention_layer_norm": (False,),
            "bias_for_layer_norm": (False, None),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "multi_query_attention": (False, None),
        },
        {
            _BLOCK + r"attn_norm\.": r"model.layers.\1.input_layernorm.",
            _BLOCK + r"q_proj\.": r"model.layers.\1.self_attn.q_proj.",
            _BLOCK + r"k_proj\.": r"model.layers.\1.self_attn.k_proj.",
            _BLOCK + r"v_proj\.": r"model.layers.\1.self_attn.v_proj.",
            _BLOCK + r"attn_out\.": r"model.layers.\1.self_attn.o_proj.",
            _BLOCK + r"ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
            _BLOCK + r"ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
            _BLOCK + r"up_proj\.": r"model.layers.\1.mlp.up_proj.",
            _BLOCK + r"ff_out\.": r"model.layers.\1.mlp.down_proj.",
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
        },
    ),
    "dream": Family(
        "Qwen2ForCausalLM",
        _same_names,
        {"use_sliding_window": (False,), "hidden_act": ("silu",)},
        shifted=True,
    ),
    "sdar": Family(
        "Qwen3ForCausalLM",
        _same_names,
        {"use_sliding_window": (False,), "hidden_act": ("silu",)},
        blocks=True,
    ),
}


def family_of(published: Settings) -> Family | None:
    """The family of a published configuration; None of another model.

    LLaDA-MoE has LLaDA's ``model_type`` in some releases and layers of experts, which no class here computes.
    """
    name = str(published.get("model_type", "")).lower()
    return None if name == "llada" and "num_experts" in published else FAMILIES.get(name)


def configure(family: Family, published: Settings, source: str) -> Any:
    """The configuration of ``transformers`` for a published one.

    Raises:
        UnmaskError: a setting that is missing, or of a variant that the class does not compute.
    """
    import transformers

    for name, allowed in family.required.items():
        if name in published and published[name] not in allowed:
            raise UnmaskError(
                f"the model {source} has {name}={published[name]!r} in its configuration; of its family only "
                f"{name}={allowed[0]!r} can be read"
            )
    kind = getattr(transformers, family.architecture)
    try:
        config = kind.config_class(**family.settings(published))
    except KeyError as missing:
        raise UnmaskError(f"the configuration of the model {source} lacks {missing}") from None
    except Exception as error:  # transformers checks types and ranges with errors of its own
        raise UnmaskError(f"the configuration of the model {source} is not valid: {error}") from None
    config.is_causal = False
    config.mask_token_id = published.get("mask_token_id")
    config.block_length = published.get("block_size", 4) if family.blocks else None
    if family.blocks and (type(config.block_length) is not int or config.block_length < 1):
        raise UnmaskError(f"the model {source} has block_size={config.block_length!r} in its configuration")
    return config
