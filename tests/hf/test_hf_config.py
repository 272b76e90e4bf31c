"""config.json of every supported kind, and settings that are refused instead of ignored."""

import json

import pytest

from vlmjax import hf

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
# As written by transformers 5, by transformers 4 and by the original code.
FIVE = {
    "model_type": "video_llama_3",
    "text_config": {k: v for k, v in TEXT.items() if "rope" not in k}
    | {
        "model_type": "qwen2",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 28,
    },
    "vision_config": VISION
    | {
        "model_type": "video_llama_3_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    },
}
FOUR = {
    "model_type": "video_llama_3",
    "text_config": {k: v for k, v in TEXT.items() if k not in ("vocab_size", "hidden_act")},
    "vision_config": VISION,
}
HUB = TEXT | {
    "model_type": "videollama3_qwen2",
    "vision_encoder": None,
    "vision_encoder_config": VISION | {"model_type": "videollama3_vision_encoder"},
    "mm_projector_type": "mlp2x_gelu",
    "image_token_index": 151665,
}


@pytest.fixture
def write(tmp_path):
    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("config", [FIVE, FOUR, HUB], ids=["five", "four", "hub"])
def test_released_2b_in_three_spellings(config, write):
    cfg = hf.read_config(write(config))
    v, t = cfg.vision, cfg.llm
    assert (v.width, v.mlp, v.layers, v.heads, v.patch) == (1152, 4304, 27, 16, 14)
    assert (v.act, v.eps, v.rope_theta) == ("gelu_tanh", 1e-6, 1e4)
    assert (t.vocab, t.width, t.mlp, t.layers) == (151936, 1536, 8960, 28)
    assert (t.heads, t.kv_heads, t.head_dim) == (12, 2, 128)
    assert (t.rope_theta, t.eps, t.qkv_bias, t.tie) == (1e6, 1e-6, True, True)


def test_defaults_of_bare_towers_and_decoders(write):
    siglip = {"model_type": "siglip", "vision_config": VISION, "text_config": {}}
    assert hf.read_module_config(write(siglip), "vision").layers == 27
    llama = {"model_type": "llama", "vocab_size": 99, "rms_norm_eps": 1e-5}
    cfg = hf.read_module_config(write(llama), "llm")
    assert (cfg.kv_heads, cfg.head_dim, cfg.rope_theta) == (32, 128, 1e4)
    assert (cfg.qkv_bias, cfg.tie) == (False, False)


def _changed(section, **settings):
    return FIVE | {section: FIVE[section] | settings}


@pytest.mark.parametrize(
    "config, message",
    [
        (_changed("text_config", use_sliding_window=True), "sliding window"),
        (_changed("text_config", layer_types=["sliding_attention"]), "sliding window"),
        (_changed("text_config", rope_parameters={"rope_type": "yarn", "factor": 4}), "yarn"),
        (_changed("text_config", rope_scaling={"type": "dynamic", "factor": 2}), "dynamic"),
        (_changed("text_config", rope_parameters={"partial_rotary_factor": 0.5}), "whole head"),
        (_changed("text_config", hidden_act="gelu"), "hidden_act='gelu'"),
        (_changed("text_config", model_type="gpt2"), "llama or mistral or qwen2 or qwen3"),
        (_changed("text_config", model_type="internlm2", bias=True), "bias=True"),
        (_changed("text_config", model_type="cogvlm"), "CogVLM2 has it"),
        (_changed("text_config", model_type="mistral", sliding_window=4096), "sliding_window=4096"),
        (_changed("text_config", attention_dropout=0.1), "attention_dropout=0.1"),
        (_changed("vision_config", hidden_act="quick_gelu"), "hidden_act='quick_gelu'"),
        (_changed("vision_config", num_channels=1), "num_channels=1"),
        (_changed("vision_config", patch_size=[14, 16]), "patches are square"),
        (FIVE | {"quantization_config": {"bits": 4}}, "quantised"),
        (HUB | {"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        (HUB | {"vision_encoder_config": None}, "vision_encoder_config"),
        ({"model_type": "blip_2"}, "supported are video_llama_3, videollama3_qwen2"),
        ({"model_type": "qwen2"}, "describes llm and not 'vision'"),
    ],
)
def test_what_the_model_does_not_have_is_refused(config, message, write):
    with pytest.raises(ValueError, match=message):
        hf.read_config(write(config))
