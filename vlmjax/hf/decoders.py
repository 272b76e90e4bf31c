"""Where each parameter of a decoder lies in the checkpoints of each family, in the form of `table`.

    rows = decoder_rows(cfg, find_kind(keys, "model."), "model.")

Paths are below `path`, keys below `key`; the head has a key of its own. Kinds that transformers has
a class for are written by it with the same keys; `internlm2`, `chatglm` and `cogvlm` are those of
their own code.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vlmjax.hf.llm_config import kind_of
from vlmjax.hf.table import Row, make_rows
from vlmjax.llm.decoder import DecoderConfig

EMBED = ("embed/embedding", "embed_tokens.weight", "V D -> V D")
NORMS = (
    ("blocks/attn_norm/scale", "layers.{}.input_layernorm.weight", "D -> D"),
    ("blocks/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight", "D -> D"),
    ("norm/scale", "norm.weight", "D -> D"),
)
O = ("blocks/attn/o/kernel", "layers.{}.self_attn.o_proj.weight", "D (N H) -> N H D")
DOWN = ("blocks/mlp/down/kernel", "layers.{}.mlp.down_proj.weight", "D M -> M D")
GATE_UP = (
    ("blocks/mlp/gate/kernel", "layers.{}.mlp.gate_up_proj.weight", "([M]+M) D -> D M"),
    ("blocks/mlp/up/kernel", "layers.{}.mlp.gate_up_proj.weight", "(M+[M]) D -> D M"),
)
LLAMA = (  # also Mistral, Qwen, Yi, MiniCPM and Granite
    EMBED,
    *NORMS,
    ("blocks/attn/q/kernel", "layers.{}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    ("blocks/attn/k/kernel", "layers.{}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    ("blocks/attn/v/kernel", "layers.{}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    O,
    ("blocks/mlp/gate/kernel", "layers.{}.mlp.gate_proj.weight", "M D -> D M"),
    ("blocks/mlp/up/kernel", "layers.{}.mlp.up_proj.weight", "M D -> D M"),
    DOWN,
)
QKV_BIAS = (
    ("blocks/attn/q/bias", "layers.{}.self_attn.q_proj.bias", "(N H) -> N H"),
    ("blocks/attn/k/bias", "layers.{}.self_attn.k_proj.bias", "(K H) -> K H"),
    ("blocks/attn/v/bias", "layers.{}.self_attn.v_proj.bias", "(K H) -> K H"),
)
O_BIAS = (("blocks/attn/o/bias", "layers.{}.self_attn.o_proj.bias", "D -> D"),)
MLP_BIAS = (
    ("blocks/mlp/gate/bias", "layers.{}.mlp.gate_proj.bias", "M -> M"),
    ("blocks/mlp/up/bias", "layers.{}.mlp.up_proj.bias", "M -> M"),
    ("blocks/mlp/down/bias", "layers.{}.mlp.down_proj.bias", "D -> D"),
)
QK_NORM = (
    ("blocks/attn/q_norm/scale", "layers.{}.self_attn.q_norm.weight", "H -> H"),
    ("blocks/attn/k_norm/scale", "layers.{}.self_attn.k_norm.weight", "H -> H"),
)
PHI3 = (
    EMBED,
    *NORMS,
    ("blocks/attn/q/kernel", "layers.{}.self_attn.qkv_proj.weight", "([N]+K+K H) D -> D N H"),
    ("blocks/attn/k/kernel", "layers.{}.self_attn.qkv_proj.weight", "(N+[K]+K H) D -> D K H"),
    ("blocks/attn/v/kernel", "layers.{}.self_attn.qkv_proj.weight", "(N+K+[K] H) D -> D K H"),
    O,
    *GATE_UP,
    DOWN,
)
GLM = (  # rotary pairs are interleaved
    EMBED,
    *NORMS,
    ("blocks/attn/q/kernel", "layers.{}.self_attn.q_proj.weight", "(N H~) D -> D N H"),
    ("blocks/attn/k/kernel", "layers.{}.self_attn.k_proj.weight", "(K H~) D -> D K H"),
    ("blocks/attn/v/kernel", "layers.{}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    O,
    *GATE_UP,
    DOWN,
)
GLM_QKV_BIAS = (
    ("blocks/attn/q/bias", "layers.{}.self_attn.q_proj.bias", "(N H~) -> N H"),
    ("blocks/attn/k/bias", "layers.{}.self_attn.k_proj.bias", "(K H~) -> K H"),
    ("blocks/attn/v/bias", "layers.{}.self_attn.v_proj.bias", "(K H) -> K H"),
)
_CHATGLM_QKV = "encoder.layers.{}.self_attention.query_key_value"
_CHATGLM_UP = "encoder.layers.{}.mlp.dense_h_to_4h.weight"
CHATGLM = (  # GLM-4 in its own code: the function of GLM, all of it fused
    ("embed/embedding", "embedding.word_embeddings.weight", "V D -> V D"),
    ("blocks/attn_norm/scale", "encoder.layers.{}.input_layernorm.weight", "D -> D"),
    ("blocks/mlp_norm/scale", "encoder.layers.{}.post_attention_layernorm.weight", "D -> D"),
    ("norm/scale", "encoder.final_layernorm.weight", "D -> D"),
    ("blocks/attn/q/kernel", f"{_CHATGLM_QKV}.weight", "([N]+K+K H~) D -> D N H"),
    ("blocks/attn/k/kernel", f"{_CHATGLM_QKV}.weight", "(N+[K]+K H~) D -> D K H"),
    ("blocks/attn/v/kernel", f"{_CHATGLM_QKV}.weight", "(N+K+[K] H) D -> D K H"),
    (
        "blocks/attn/o/kernel",
        "encoder.layers.{}.self_attention.dense.weight",
        "D (N H) -> N H D",
    ),
    ("blocks/mlp/gate/kernel", _CHATGLM_UP, "([M]+M) D -> D M"),
    ("blocks/mlp/up/kernel", _CHATGLM_UP, "(M+[M]) D -> D M"),
    ("blocks/mlp/down/kernel", "encoder.layers.{}.mlp.dense_4h_to_h.weight", "D M -> M D"),
)
CHATGLM_QKV_BIAS = (
    ("blocks/attn/q/bias", f"{_CHATGLM_QKV}.bias", "([N]+K+K H~) -> N H"),
    ("blocks/attn/k/bias", f"{_CHATGLM_QKV}.bias", "(N+[K]+K H~) -> K H"),
    ("blocks/attn/v/bias", f"{_CHATGLM_QKV}.bias", "(N+K+[K] H) -> K H"),
)
INTERNLM2 = (  # for each key-value head, the G query heads that read it, the key and the value
    ("embed/embedding", "tok_embeddings.weight", "V D -> V D"),
    ("blocks/attn_norm/scale", "layers.{}.attention_norm.weight", "D -> D"),
    ("blocks/attn/q/kernel", "layers.{}.attention.wqkv.weight", "(K [G]+1+1 H) D -> D (K G) H"),
    ("blocks/attn/k/kernel", "layers.{}.attention.wqkv.weight", "(K G+[1]+1 H) D -> D K H"),
    ("blocks/attn/v/kernel", "layers.{}.attention.wqkv.weight", "(K G+1+[1] H) D -> D K H"),
    ("blocks/attn/o/kernel", "layers.{}.attention.wo.weight", "D (N H) -> N H D"),
    ("blocks/mlp_norm/scale", "layers.{}.ffn_norm.weight", "D -> D"),
    ("blocks/mlp/gate/kernel", "layers.{}.feed_forward.w1.weight", "M D -> D M"),
    ("blocks/mlp/up/kernel", "layers.{}.feed_forward.w3.weight", "M D -> D M"),
    ("blocks/mlp/down/kernel", "layers.{}.feed_forward.w2.weight", "D M -> M D"),
    ("norm/scale", "norm.weight", "D -> D"),
)


def _cogvlm(path: str, kind: str) -> tuple[tuple[str, str, str], ...]:
    """One of the two sets of weights of each layer."""
    qkv = f"layers.{{}}.self_attn.{kind}_expert_query_key_value.weight"
    return (
        (f"{path}/attn/q/kernel", qkv, "([N]+K+K H) D -> D N H"),
        (f"{path}/attn/k/kernel", qkv, "(N+[K]+K H) D -> D K H"),
        (f"{path}/attn/v/kernel", qkv, "(N+K+[K] H) D -> D K H"),
        (
            f"{path}/attn/o/kernel",
            f"layers.{{}}.self_attn.{kind}_expert_dense.weight",
            "D (N H) -> N H D",
        ),
        (f"{path}/mlp/gate/kernel", f"layers.{{}}.mlp.{kind}_mlp.gate_proj.weight", "M D -> D M"),
        (f"{path}/mlp/up/kernel", f"layers.{{}}.mlp.{kind}_mlp.up_proj.weight", "M D -> D M"),
        (f"{path}/mlp/down/kernel", f"layers.{{}}.mlp.{kind}_mlp.down_proj.weight", "D M -> M D"),
    )


_VISION_BIAS = "layers.{}.self_attn.vision_expert_query_key_value.bias"
COGVLM = (
    EMBED,
    *NORMS,
    *_cogvlm("blocks", "language"),
    *_cogvlm("blocks/expert", "vision"),
    ("blocks/expert/attn/q/bias", _VISION_BIAS, "([N]+K+K H) -> N H"),
    ("blocks/expert/attn/k/bias", _VISION_BIAS, "(N+[K]+K H) -> K H"),
    ("blocks/expert/attn/v/bias", _VISION_BIAS, "(N+K+[K] H) -> K H"),
)


@dataclass(frozen=True)
class Kind:
    """How one family names things.

    Attributes:
      rows: of every model.
      marker: how a key of layer 0 ends that only this family has (`KINDS` is searched in order).
      options: {field of `DecoderConfig`: {value: rows it adds}}. A model may differ from Llama in a
        field of `OPTIONAL` only to the values here.
      head: key of the untied head, beside the prefix of the others.
    """

    rows: tuple
    marker: str
    options: dict[str, dict]
    head: str = "lm_head.weight"


LLAMA_OPTIONS = {
    "qkv_bias": {True: QKV_BIAS},
    "o_bias": {True: O_BIAS},
    "mlp_bias": {True: MLP_BIAS},
    "qk_norm": {"head": QK_NORM},
}
KINDS = {
    "internlm2": Kind(INTERNLM2, "layers.0.attention.wqkv.weight", {}, "output.weight"),
    "chatglm": Kind(
        CHATGLM,
        "encoder.layers.0.self_attention.query_key_value.weight",
        {"qkv_bias": {True: CHATGLM_QKV_BIAS}},
        "output_layer.weight",
    ),
    "cogvlm": Kind(
        COGVLM,
        "layers.0.self_attn.language_expert_query_key_value.weight",
        {"expert": {"visual": ()}},
    ),
    "phi3": Kind(PHI3, "layers.0.self_attn.qkv_proj.weight", {}),
    "glm": Kind(GLM, "layers.0.mlp.gate_up_proj.weight", {"qkv_bias": {True: GLM_QKV_BIAS}}),
    "llama": Kind(LLAMA, "layers.0.self_attn.q_proj.weight", LLAMA_OPTIONS),
}
HEADS = tuple({kind.head: None for kind in KINDS.values()})
# Fields that decide which parameters there are, and their values in Llama.
OPTIONAL = {
    "qkv_bias": False,
    "o_bias": False,
    "mlp_bias": False,
    "qk_norm": "none",
    "expert": "none",
}


def find_kind(keys: Iterable[str], prefix: str = "model.") -> str:
    """Name of the kind whose keys are below `prefix`."""
    keys = set(keys)
    for name, kind in KINDS.items():
        if prefix + kind.marker in keys:
            return name
    raise ValueError(
        f"no known decoder below {prefix!r}; known ones and the key each is told by: "
        f"{', '.join(f'{n} ({prefix}{k.marker})' for n, k in KINDS.items())}; give the prefix of "
        "the decoder, or convert the checkpoint"
    )


def written_kind(cfg: DecoderConfig) -> str:
    """Name of the kind in which transformers stores a decoder."""
    kind = kind_of(cfg)
    return kind if kind in KINDS else "llama"


def decoder_rows(
    cfg: DecoderConfig,
    kind: str = "llama",
    key: str = "model.",
    head: str | None = None,
    path: str = "llm/",
) -> list[Row]:
    """The rows of a decoder, extra blocks excluded (they are of the caller).

    Args:
      kind: of `KINDS`.
      key: prefix of the keys.
      head: key of the untied head; that of the kind when absent.
      path: prefix of our paths.
    """
    known = KINDS[kind]
    rows = list(known.rows)
    for name, usual in OPTIONAL.items():
        value, allowed = getattr(cfg, name), {usual: ()} | known.options.get(name, {})
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} has no place in checkpoints of the kind {kind!r}, which take "
                f"{list(allowed)}; change it or use another kind"
            )
        rows += allowed[value]
    sizes = {
        "V": cfg.vocab,
        "D": cfg.width,
        "M": cfg.mlp,
        "N": cfg.heads,
        "K": cfg.kv_heads,
        "G": cfg.heads // cfg.kv_heads,
        "H": cfg.head_dim,
        "R": cfg.rotated,
    }
    made = make_rows(rows, sizes, cfg.layers, path, key)
    if not cfg.tie:
        made += make_rows((("head/kernel", head or known.head, "V D -> D V"),), sizes, path=path)
    return made
