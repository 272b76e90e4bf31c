"""The config.json of released checkpoints gives the model of the recipe of that system."""

import dataclasses
import importlib
import json

import pytest

from vlmjax import build, hf

LLAMA_3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
EVA2 = {
    "dropout_prob": 0.0,
    "hidden_act": "gelu",
    "in_channels": 3,
    "num_hidden_layers": 63,
    "hidden_size": 1792,
    "patch_size": 14,
    "num_heads": 16,
    "intermediate_size": 15360,
    "layer_norm_eps": 1e-06,
}
COGVLM2 = {
    "architectures": ["CogVLMForCausalLM"],
    "vision_config": EVA2 | {"num_positions": 9217, "image_size": 1344},
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "template_version": "chat",
    "bos_token_id": 128000,
    "pad_token_id": 128002,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "hidden_act": "silu",
}
GLM_4V = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "vision_config": EVA2 | {"num_positions": 6401, "image_size": 1120, "scaling_factor": 8},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 0.00000015625,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 40,
    "original_rope": True,
    "padded_vocab_size": 151552,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
}
MINICPM_V_2 = {
    "architectures": ["MiniCPMV"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dim_model_base": 256,
    "drop_vision_last_layer": True,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "image_size": 448,
    "intermediate_size": 5760,
    "max_position_embeddings": 4096,
    "max_slice_nums": 9,
    "model_type": "minicpmv",
    "num_attention_heads": 36,
    "num_hidden_layers": 40,
    "num_key_value_heads": 36,
    "patch_size": 14,
    "query_num": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "scale_resolution": 448,
    "slice_mode": True,
    "tie_word_embeddings": False,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
    "vocab_size": 122753,
}
MINICPM_V_2_5 = LLAMA_3 | {
    "version": "2.5",
    "architectures": ["MiniCPMV"],
    "drop_vision_last_layer": False,
    "image_size": 448,
    "model_type": "minicpmv",
    "patch_size": 14,
    "query_num": 96,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
    "slice_mode": True,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
CAMBRIAN_8B = LLAMA_3 | {
    "architectures": ["CambrianLlamaForCausalLM"],
    "connector_depth": 3,
    "connector_only": False,
    "image_aspect_ratio": "pad",
    "image_position": 91,
    "image_token_len": 576,
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "sva",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower_aux_list": [
        "siglip/CLIP-ViT-SO400M-14-384",
        "openai/clip-vit-large-patch14-336",
        "facebook/dinov2-giant-res378",
        "clip-convnext-XXL-multi-stage",
    ],
    "mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216],
    "model_type": "llava_llama",
    "num_of_vision_sampler_layers": 10,
    "num_query_group": 1,
    "query_num_list": [576],
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 3,
    "vision_hidden_size": 1024,
}
RELEASED = {
    "cogvlm2": (COGVLM2, "cogvlm2", ""),
    "glm_4v": (GLM_4V, "glm_4v", ""),
    "minicpm_v_2.0": (MINICPM_V_2, "minicpm_v", "version=2.0"),
    "minicpm_v_2.5": (MINICPM_V_2_5, "minicpm_v", "version=2.5"),
    "cambrian_1_8b": (CAMBRIAN_8B, "cambrian_1", "size=8b"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_are_the_recipes(name, tmp_path):
    raw, recipe, arg = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = importlib.import_module(f"configs.{recipe}").get_config(arg)
    want = build.resolve(config).model
    assert dataclasses.replace(hf.read_config(tmp_path), compute=want.compute) == want
