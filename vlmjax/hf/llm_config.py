"""config.json of decoders to our configuration, and ours to that of transformers.

Settings that would change the function and that the model does not have are refused, never ignored.
"""

import dataclasses
import math
from pathlib import Path

from vlmjax.llm.decoder import DecoderConfig

# What the classes of transformers, and of InternLM2, MiniCPM and CogVLM the original code, fill in
# where a config.json is silent (transformers leaves out values equal to the defaults of a class).
_ALL = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA = _ALL | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_QWEN = _ALL | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
TEXT_DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _ALL
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "phi3": _ALL
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "glm": _ALL
    | {
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "granite": _LLAMA
    | {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "internlm2": _LLAMA | {"vocab_size": 103168, "bias": True},
    "minicpm": _LLAMA
    | {"scale_emb": 1, "dim_model_base": 1, "scale_depth": 1, "tie_word_embeddings": True},
    "cogvlm": _LLAMA,
}
ROPE_THETA = 10_000.0


def read_llm(section: dict, file: Path) -> DecoderConfig:
    """The configuration of a decoder from its section of a config.json."""
    kind = section["model_type"]
    if kind not in TEXT_DEFAULTS:
        need(section, file, "model_type", " or ".join(TEXT_DEFAULTS))
    c = TEXT_DEFAULTS[kind] | section
    need(c, file, "hidden_act", "silu")
    need(c, file, "attention_dropout", 0)
    _refuse_window(c, file, kind)
    heads, width = c["num_attention_heads"], c["hidden_size"]
    head_dim = c.get("head_dim") or width // heads
    kv_heads = c["num_key_value_heads"]
    if kind == "cogvlm":
        kv_heads = c.get("num_multi_query_heads")
        if kv_heads is None:
            raise ValueError(
                f"{file} has no num_multi_query_heads; CogVLM2 has it, CogVLM, which is another "
                "function, has not; use a checkpoint of CogVLM2"
            )
    if kind == "internlm2":
        need(c, file, "bias", False)
    qkv_bias = kind == "qwen2" or c["attention_bias"]
    return DecoderConfig(
        vocab=c["vocab_size"],
        width=width,
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        eps=c["rms_norm_eps"],
        qkv_bias=qkv_bias,
        o_bias=qkv_bias and kind not in ("qwen2", "glm"),
        mlp_bias=c["mlp_bias"],
        tie=c["tie_word_embeddings"],
        qk_norm="head" if kind == "qwen3" else "none",
        expert="visual" if kind == "cogvlm" else "none",
        **_rope(c, file, head_dim, kind),
        **_multipliers(c, head_dim, kind),
    )


def _refuse_window(c: dict, file: Path, kind: str):
    """Layers attend fully here: a window is fine only if it is off, or never shorter."""
    window = c.get("sliding_window")
    bites = bool(window) and window < c["max_position_embeddings"]
    if kind in ("qwen2", "qwen3"):  # have a switch; their window is written when it is off, too
        bites = c["use_sliding_window"]
    if bites or "sliding_attention" in (c.get("layer_types") or ()):
        raise ValueError(
            f"{file} turns sliding window attention on (sliding_window={window}, "
            f"max_position_embeddings={c['max_position_embeddings']}); every layer attends fully "
            "here; use a checkpoint without it, or set sliding_window to null there if no sample "
            "will be longer than the window"
        )


def _multipliers(c: dict, head_dim: int, kind: str) -> dict:
    if kind == "granite":
        scale = c["attention_multiplier"]
        return {
            "embed_multiplier": c["embedding_multiplier"],
            "residual_multiplier": c["residual_multiplier"],
            "logits_divisor": c["logits_scaling"],
            "attention_multiplier": 0.0 if math.isclose(scale, head_dim**-0.5) else scale,
        }
    if kind == "minicpm":
        return {
            "embed_multiplier": float(c["scale_emb"]),
            "residual_multiplier": c["scale_depth"] / c["num_hidden_layers"] ** 0.5,
            "logits_divisor": c["hidden_size"] / c["dim_model_base"],
        }
    return {}


def _rope(c: dict, file: Path, head_dim: int, kind: str) -> dict:
    """The rotary fields of `DecoderConfig`."""
    # InternLM2 changes frequencies (dynamic) only beyond max_position_embeddings.
    own = {"phi3": ("longrope",), "internlm2": ("dynamic",)}.get(kind, ())
    rope = _rope_settings(c, file, ("default", "linear", *own), kind in ("glm", "phi3"))
    # A constant of the code of CogVLM2.
    usual = 500_000.0 if kind == "cogvlm" else ROPE_THETA
    found = {"rope_theta": float(rope.get("rope_theta", c.get("rope_theta", usual)))}
    rotary = int(head_dim * rope["partial_rotary_factor"])
    if rotary != head_dim:
        found["rotary"] = rotary
    if rope["rope_type"] == "linear":
        found["rope_scale"] = float(rope["factor"])
    if rope["rope_type"] == "longrope":
        written = c if "original_max_position_embeddings" in c else rope
        context, limit = written["original_max_position_embeddings"], c["max_position_embeddings"]
        longer = limit / context
        usual = math.sqrt(1 + math.log(longer) / math.log(context)) if longer > 1 else 1.0
        # Beyond that context transformers changes to the other factors for the whole sequence;
        # here they are one setting of the run.
        found |= {
            "rope_short": tuple(rope["short_factor"]),
            "rope_long": tuple(rope["long_factor"]),
            "rope_factors": "short",
            "rope_context": context,
            "rope_attention": rope.get("attention_factor") or usual,
        }
    return found


def _rope_settings(c: dict, file: Path, kinds: tuple[str, ...], partial: bool) -> dict:
    """In rope_parameters (transformers 5), or in rope_scaling and beside it (4)."""
    rope = {"rope_type": "default", "partial_rotary_factor": c.get("partial_rotary_factor", 1.0)}
    written = [c[name] for name in ("rope_parameters", "rope_scaling") if c.get(name)]
    for part in [{}, *written]:
        rope |= part | {"rope_type": part.get("rope_type", part.get("type", rope["rope_type"]))}
        if rope["rope_type"] == "su":  # what Phi-3 called it first
            rope["rope_type"] = "longrope"
        if rope["rope_type"] not in kinds or not (partial or rope["partial_rotary_factor"] == 1.0):
            raise ValueError(
                f"{file} has rope settings {rope}; supported are the types {', '.join(kinds)}, "
                f"over {'any part of' if partial else 'the whole head, not a part of'} it; use a "
                "checkpoint without other rope scaling"
            )
    return rope


def rope_theta(c: dict, file: Path, kinds: tuple[str, ...]) -> float:
    """The base frequency of a module whose rotary positions have no other setting."""
    rope = _rope_settings(c, file, kinds, partial=False)
    return float(rope.get("rope_theta", c.get("rope_theta", ROPE_THETA)))


def need(c: dict, file: Path, name: str, value):
    """Raises a ValueError unless a setting has the value."""
    if c.get(name) != value:
        raise ValueError(
            f"{file} has {name}={c.get(name)!r}; supported is {value!r}; use a checkpoint with "
            "that setting"
        )


def kind_of(cfg: DecoderConfig) -> str:
    """The model_type of transformers that is nearest to a decoder."""
    multiplied = (cfg.embed_multiplier, cfg.residual_multiplier, cfg.logits_divisor) != (1, 1, 1)
    if cfg.rope_short:
        return "phi3"
    if cfg.rotated < cfg.head_dim:
        return "glm"
    if multiplied or cfg.attention_multiplier:
        return "granite"
    if cfg.qk_norm == "head":
        return "qwen3"
    return "qwen2" if cfg.qkv_bias and not cfg.o_bias else "llama"


def make_llm(cfg: DecoderConfig, max_position: int) -> dict:
    """The section of a config.json that describes a decoder, for transformers 4 and 5.

    Raises:
      ValueError: no class of transformers computes the same function.
    """
    kind = kind_of(cfg)
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scale != 1:
        rope |= {"rope_type": "linear", "factor": cfg.rope_scale}
    text = {
        "model_type": kind,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope_theta,  # for transformers 4
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.tie,
    }
    text |= _own_settings(cfg, kind, rope)
    want = dataclasses.replace(cfg, rope_factors="short" if cfg.rope_short else "none")
    have, want = (dataclasses.asdict(x) for x in (read_llm(text, Path("the export")), want))
    differ = [f"{name}={want[name]!r}" for name in want if want[name] != have[name]]
    if differ:
        raise ValueError(
            f"transformers has no decoder with all of this: the nearest, {kind}, does not have "
            f"{', '.join(differ)}; export it in the layout of its own code"
        )
    return text


def _own_settings(cfg: DecoderConfig, kind: str, rope: dict) -> dict:
    """What only one model_type has; adds to the rotary settings."""
    if kind == "qwen2":
        return {"use_sliding_window": False}
    if kind == "qwen3":
        return {"use_sliding_window": False, "attention_bias": cfg.qkv_bias}
    if kind in ("glm", "phi3"):
        part = {"partial_rotary_factor": cfg.rotated / cfg.head_dim}
        rope |= part
        if kind == "glm":
            return part | {"attention_bias": cfg.qkv_bias}
        context = {"original_max_position_embeddings": cfg.rope_context}
        rope |= context | {
            "rope_type": "longrope",
            "short_factor": list(cfg.rope_short),
            "long_factor": list(cfg.rope_long),
            "attention_factor": cfg.rope_attention,
        }
        return part | context
    biases = {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}
    if kind == "granite":
        return biases | {
            "embedding_multiplier": cfg.embed_multiplier,
            "attention_multiplier": cfg.attention_multiplier or cfg.head_dim**-0.5,
            "residual_multiplier": cfg.residual_multiplier,
            "logits_scaling": cfg.logits_divisor,
        }
    return biases
