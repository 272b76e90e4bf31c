"""Layouts of the systems that transformers has no class for: rows of `systems.LAYOUTS`, as data.

Where the names come from: those of 360VL, Cambrian-1, CogVLM2, MiniCPM-V and VILA from the code of
their repositories and the files that pin our modules to it; those of GLM-4V from the converter of
chatglm.cpp, which lists them all. Unverified: the tower's names in 360VL, whose released files may
not hold it.
"""

_CLIP = {"clip": ("clip", "vision_model."), "siglip": ("siglip", "vision_model.")}
_EVA2 = ("linear_proj.", "conv.", "boi", "eoi")  # the adapter, beside the tower


def _eva2(vision: str, llm: str, head: str, marker: str) -> dict:
    return dict(
        prefixes={"vision": vision, "connector": vision, "llm": llm},
        owned={"connector": tuple(vision + key for key in _EVA2)},
        marker=marker,
        tower="eva2",
        connector="conv_glu",
        head=head,
    )


ORIGINALS = {
    "360vl": dict(
        prefixes={
            "vision": "model.vision_tower.vision_tower.vision_model.",
            "connector": "model.mm_projector_",
            "llm": "model.",
        },
        marker="model.mm_projector_ctt.pos_emb",
        tower="clip",
        connector="360vl",
        elsewhere=True,
    ),
    "cambrian": dict(
        prefixes={
            "vision": "model.vision_tower_aux_list.{}.vision_tower.",
            "connector": "model.",
            "llm": "model.",
        },
        owned={
            "connector": (
                "model.mm_projector",
                "model.vision_sampler_0.",
                "model.vision_query",
                "model.image_newline",
            )
        },
        marker="model.vision_query",
        towers={
            "clip": ("clip", "vision_model."),
            "siglip": ("timm", ""),  # by open_clip
            "dinov2": ("dinov2", ""),
            "convnext": ("convnext", ""),
        },
        connector="cambrian",
        extra="model.vision_sampler_layers.{}.layers.0.",
        elsewhere=True,
    ),
    "cogvlm2": _eva2(
        "model.vision.",
        "model.",
        "",
        "model.layers.0.self_attn.language_expert_query_key_value.weight",
    ),
    "glm4v": _eva2(
        "transformer.vision.",
        "transformer.",
        "transformer.",
        "transformer.vision.patch_embedding.cls_embedding",
    ),
    "minicpm-v 2.0": dict(
        prefixes={"vision": "vpm.", "connector": "resampler.", "llm": "llm.model."},
        marker="vpm.pos_embed",
        tower="timm",
        connector="resampler",
        head="llm.",
    ),
    "minicpm-v 2.5": dict(
        prefixes={"vision": "vpm.", "connector": "resampler.", "llm": "llm.model."},
        marker="vpm.embeddings.patch_embedding.weight",
        tower="siglip",
        connector="resampler",
        head="llm.",
    ),
    # Three directories, whose names `tensors` puts in front of the keys.
    "vila": dict(
        prefixes={
            "vision": "vision_tower.",
            "connector": "mm_projector.layers.",
            "llm": "llm.model.",
        },
        marker="llm.model.embed_tokens.weight",
        towers=_CLIP | {"internvit": ("internvit", "")},
        connector="vila",
        head="llm.",
    ),
}
# Bare towers of Cambrian-1.
TOWERS = {
    "dinov2": dict(prefixes={"vision": ""}, marker="embeddings.cls_token", tower="dinov2"),
    "open_clip siglip": dict(
        prefixes={"vision": "visual.trunk."},
        marker="visual.trunk.patch_embed.proj.weight",
        tower="timm",
        dropped=(r"text\..*", "logit_scale", "logit_bias"),
    ),
    "open_clip convnext": dict(
        prefixes={"vision": "visual.trunk."},
        marker="visual.trunk.stem.0.weight",
        tower="convnext",
        dropped=(
            r"visual\.head\..*",
            r"(transformer|token_embedding|ln_final)\..*",
            "positional_embedding|text_projection|attn_mask|logit_scale",
        ),
    ),
}
