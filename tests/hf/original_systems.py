"""Tiny models of the systems: config.json as their repositories write it, and our settings."""

from dataclasses import dataclass, field

import torchvision_shim

from vlmjax import build
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.vision.pixels import CLIP, IMAGENET

torchvision_shim.install()  # before transformers looks for torchvision
TOKENS = {t for template in TEMPLATES.values() for t in template.controls}
TOKENS |= {"<image>", "</image>", "<slice>", "</slice>", "<unk>"}
TOKENS |= {"<|reserved_special_token_0|>", "<|reserved_special_token_44|>"}
TOKENIZER = byte_tokenizer(sorted(TOKENS))
VOCAB = TOKENIZER.size
LLM = dict(vocab=VOCAB, width=16, mlp=20, layers=2, heads=2, kv_heads=1, head_dim=8)
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position_embeddings=96,
    attention_bias=False,
    tie_word_embeddings=False,
)
OURS = LLM | dict(rope_theta=5e5, eps=1e-5, qkv_bias=False, tie=False)
_SIZES = dict(width=12, mlp=20, layers=2, heads=2, patch=4, position="table", side=4)
_CLIP = dict(
    _SIZES, **CLIP, act="quick_gelu", eps=1e-5, patch_bias=False, embed_norm=True, prefix=1
)
_SECTION = dict(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
CLIP_SECTION = _SECTION | {"model_type": "clip_vision_model"}
TIMM_NAME = "vit_so400m_patch14_siglip_384.webli"
CLIP_NAME = "openai/clip-vit-large-patch14-336"
_EVA2 = dict(
    dropout_prob=0.0,
    hidden_act="gelu",
    hidden_size=12,
    image_size=16,
    in_channels=3,
    intermediate_size=20,
    layer_norm_eps=1e-6,
    num_heads=2,
    num_hidden_layers=2,
    num_positions=17,
    patch_size=4,
)
_OUR_EVA2 = dict(_SIZES, **CLIP, act="gelu", order="post", final_norm=False, prefix=1, eps=1e-6)
TIMM = dict(_SIZES, act="gelu")
DINOV2 = dict(_SIZES, **IMAGENET, act="gelu", layer_scale=1.0, prefix=1, position="bicubic", side=6)
CONVNEXT = dict(widths=(8, 12), depths=(1, 2), rows=16, columns=16, grid=8, eps=1e-5)
_SQUARE = dict(name="square", side=16)
SHARED = dict(vectors=("boi", "eoi"), positions="shared")


@dataclass(frozen=True)
class System:
    """A tiny model: config.json there, a `model` section and a picture here."""

    layout: str
    raw: dict
    model: dict
    picture: dict
    template: str
    token: str
    kind: str | None = None
    parts: dict = field(default_factory=dict)  # folder -> config.json

    @property
    def config(self):
        return build.model_config(self.model)


def _vila(**more):
    llama = LLAMA | {"model_type": "llama"}
    return dict(
        layout="vila",
        raw={
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaModel"],
            "llm_cfg": {},
            "vision_tower_cfg": {},
            "mm_projector_cfg": {},
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
            "image_aspect_ratio": "resize",
            "num_video_frames": 6,
            **more,
        },
        template="vila_llama3",
        token="<image>",
        parts={
            "llm": llama,
            "vision_tower": _SECTION | {"model_type": "siglip_vision_model"},
            "mm_projector": {
                "model_type": "v2l_projector",
                "mm_projector_type": "mlp_downsample",
            },
        },
    )


_VILA_MODEL = dict(
    vision=dict(_SIZES, features="-2"),
    connector=dict(window=2, norm="layer"),
    llm=OURS,
)
_FRAMES = dict(frame_format=dict(between="\n"))
_WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
_OURS_WIDE = OURS | dict(width=128, head_dim=64, kv_heads=2)
SYSTEMS = {
    "360vl": System(
        "360vl",
        LLAMA
        | {
            "model_type": "QH_360VL",
            "architectures": ["QH360_VL_LlamaForCausalLM"],
            "image_aspect_ratio": "pad",
            "mm_hidden_size": 12,
            "mm_num_tokens": 17,
            "mm_projector_config": "qihoo360/360VL-8B",
            "mm_projector_type": "c-abs",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": CLIP_NAME,
            "proj_2": True,
            "visual_projector_config": {
                "depth": 2,
                "mlp_depth": 2,
                "hidden_size": 20,
                "num_queries": 4,
                "num_eos_tokens": 0,
                "pos_emb": True,
                "prenorm": False,
                "encoder_hidden_size": 12,
            },
        },
        dict(
            vision=dict(_CLIP, features="-2"),
            connector=dict(
                type="c_abstractor",
                queries=4,
                width=20,
                depth=2,
                side=4,
                copies=("ctt", "ori"),
            ),
            llm=OURS,
            sources=(0, 0),
        ),
        dict(
            strategy=(
                dict(name="grid2x2", side=16, whole="canvas", pad="square", fill=(122, 116, 104)),
            ),
            stitch="tiles",
        ),
        "llama3",
        "<|reserved_special_token_44|>",
    ),
    "cambrian": System(
        "cambrian",
        LLAMA
        | {
            "model_type": "llava_llama",
            "architectures": ["CambrianLlamaForCausalLM"],
            "connector_depth": 2,
            "connector_only": False,
            "image_aspect_ratio": "pad",
            "image_position": 91,
            "image_token_len": 16,
            "mm_projector_type": "sva",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower_aux_list": [
                "siglip/CLIP-ViT-SO400M-14-384",
                CLIP_NAME,
                "facebook/dinov2-giant-res20",
                "clip-convnext-XXL-multi-stage",
            ],
            "mm_vision_tower_aux_token_len_list": [16, 16, 16, 64],
            "num_of_vision_sampler_layers": 1,
            "num_query_group": 1,
            "query_num_list": [16],
            "start_of_vision_sampler_layers": 0,
            "stride_of_vision_sampler_layers": 1,
            "vision_hidden_size": 32,
        },
        dict(
            vision=(
                TIMM,
                dict(_CLIP, features="-2"),
                DINOV2,
                dict(CONVNEXT, type="convnext"),
            ),
            connector=dict(
                type="sva",
                side=4,
                windows=(1, 1, 1, 2),
                width=32,
                heads=16,
                layers=2,
                reduce="weighted",
            ),
            llm=OURS | dict(extra_num=1),
        ),
        dict(
            strategy=tuple(
                dict(name="square", side=side, mode="pad", fill=fill)
                for side, fill in zip(
                    (16, 16, 20, 64),
                    ((127, 127, 127), (122, 116, 104), (123, 116, 103), (122, 116, 104)),
                    strict=True,
                )
            ),
            format=dict(layout="square", unpad="original", newline="row"),
            resample=((), (), ("bilinear", (4, 4)), ()),
        ),
        "cambrian_llama3",
        "<image>",
    ),
    "cogvlm2": System(
        "cogvlm2",
        {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta")}
        | {
            "architectures": ["CogVLMForCausalLM"],
            "num_multi_query_heads": 1,
            "template_version": "chat",
            "vision_config": _EVA2,
        },
        dict(
            vision=_OUR_EVA2,
            connector=dict(type="conv_glu", hidden=20),
            llm=OURS | dict(expert="visual"),
        ),
        dict(strategy=(_SQUARE | {"mode": "resize"},), format=SHARED),
        "cogvlm",
        "<|reserved_special_token_0|>",
        "cogvlm",
    ),
    "glm4v": System(
        "glm4v",
        {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "vision_config": _EVA2 | {"scaling_factor": 8},
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "ffn_hidden_size": 20,
            "hidden_size": 16,
            "kv_channels": 8,
            "layernorm_epsilon": 1.5625e-07,
            "multi_query_attention": True,
            "multi_query_group_num": 1,
            "num_attention_heads": 2,
            "num_layers": 2,
            "original_rope": True,
            "padded_vocab_size": VOCAB,
            "post_layer_norm": True,
            "rmsnorm": True,
            "rope_ratio": 2,
            "seq_length": 96,
            "tie_word_embeddings": False,
        },
        dict(
            vision=_OUR_EVA2,
            connector=dict(type="conv_glu", hidden=20, conv="out", scaling=8.0),
            llm=OURS | dict(qkv_bias=True, rotary=4, eps=1.5625e-7, rope_theta=2e4),
        ),
        dict(strategy=(_SQUARE | {"mode": "resize"},), format=SHARED),
        "glm4",
        "<|endoftext|>",
        "chatglm",
    ),
    "minicpm-v 2.0": System(
        "minicpm-v 2.0",
        LLAMA
        | _WIDE
        | {
            "model_type": "minicpmv",
            "architectures": ["MiniCPMV"],
            "dim_model_base": 16,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "drop_vision_last_layer": True,
            "max_slice_nums": 3,
            "scale_resolution": 16,
            "patch_size": 4,
            "query_num": 4,
            "slice_mode": True,
            "vision_encoder": TIMM_NAME,
        },
        dict(
            vision=dict(TIMM, layers=1, position="bicubic_antialias"),
            connector=dict(type="resampler", queries=4, heads=1, query_pos="sincos"),
            llm=_OURS_WIDE
            | dict(embed_multiplier=12.0, residual_multiplier=1.4 / 2**0.5, logits_divisor=8.0),
        ),
        dict(
            strategy=(dict(name="uhd", side=16, patch=4, max_slices=3),),
            format=dict(layout="slices", between="\n"),
        ),
        "minicpm",
        "<unk>",
    ),
    "minicpm-v 2.5": System(
        "minicpm-v 2.5",
        LLAMA
        | _WIDE
        | {
            "model_type": "minicpmv",
            "architectures": ["MiniCPMV"],
            "version": "2.5",
            "drop_vision_last_layer": False,
            "query_num": 4,
            "slice_config": {
                "max_slice_nums": 3,
                "patch_size": 4,
                "scale_resolution": 16,
                "model_type": "minicpmv",
            },
            "slice_mode": True,
            "vision_config": _SECTION | {"model_type": "idefics2", "image_size": 64},
        },
        dict(
            vision=dict(_SIZES, position="bucket", side=16),
            connector=dict(type="resampler", queries=4, heads=1),
            llm=_OURS_WIDE,
        ),
        dict(
            strategy=(dict(name="uhd", side=16, patch=4, max_slices=3),),
            format=dict(layout="slices", between="\n"),
        ),
        "llama3",
        "<unk>",
    ),
    "vila": System(
        **_vila(),
        model=_VILA_MODEL,
        picture=dict(strategy=(_SQUARE | {"mode": "resize", "fill": (127, 127, 127)},), **_FRAMES),
    ),
    "vila s2": System(
        **_vila(s2=True, s2_scales="16,32", s2_max_split_size=16),
        model=_VILA_MODEL
        | dict(connector=_VILA_MODEL["connector"] | {"reduce": "weighted"}, sources=(0, 0)),
        picture=dict(
            strategy=(dict(name="s2", side=16, scales=(16, 32)),),
            stitch="tiles",
            resample=((), ("area", (4, 4))),
            **_FRAMES,
        ),
    ),
}
