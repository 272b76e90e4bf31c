"""Sizes of released decoders: rows of `DecoderConfig`.

What no source that was read confirms is marked "unverified".
"""

_LLAMA = dict(head_dim=128, rope_theta=1e4, eps=1e-5, qkv_bias=False, tie=False)
_LLAMA3 = _LLAMA | dict(vocab=128256, rope_theta=5e5, kv_heads=8)
_QWEN = dict(head_dim=128, rope_theta=1e6, eps=1e-6, qkv_bias=True)
_QWEN3 = _QWEN | dict(vocab=151936, qkv_bias=False, qk_norm="head", kv_heads=8)
_INTERNLM2 = _LLAMA | dict(vocab=92544, rope_theta=1e6, kv_heads=8)


def _sizes(width, mlp, layers, heads, kv_heads=None):
    return dict(width=width, mlp=mlp, layers=layers, heads=heads, kv_heads=kv_heads or heads)


PRESETS = {
    "llama2_7b": _LLAMA | dict(vocab=32000) | _sizes(4096, 11008, 32, 32),
    "llama2_13b": _LLAMA | dict(vocab=32000) | _sizes(5120, 13824, 40, 40),
    "vicuna_1_5_7b": _LLAMA | dict(vocab=32000) | _sizes(4096, 11008, 32, 32),
    "vicuna_1_5_13b": _LLAMA | dict(vocab=32000) | _sizes(5120, 13824, 40, 40),
    "sheared_llama_2_7b": _LLAMA | dict(vocab=32000) | _sizes(2560, 6912, 32, 20),
    "llama3_8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8),
    "llama3_70b": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8),
    "mistral_7b_v0_2": _LLAMA | dict(vocab=32000, rope_theta=1e6) | _sizes(4096, 14336, 32, 32, 8),
    "yi_34b": _LLAMA | dict(vocab=64000, rope_theta=5e6) | _sizes(7168, 20480, 60, 56, 8),
    "qwen1_5_0_5b": _QWEN | dict(vocab=151936, head_dim=64, tie=True) | _sizes(1024, 2816, 24, 16),
    "qwen1_5_1_8b": _QWEN | dict(vocab=151936, tie=False) | _sizes(2048, 5504, 24, 16),
    # rope_theta unverified
    "qwen1_5_4b": _QWEN
    | dict(vocab=151936, rope_theta=5e6, tie=False)
    | _sizes(2560, 6912, 40, 20),
    "qwen1_5_7b": _QWEN | dict(vocab=151936, tie=False) | _sizes(4096, 11008, 32, 32),
    "qwen1_5_14b": _QWEN | dict(vocab=152064, tie=False) | _sizes(5120, 13696, 40, 40),
    "qwen1_5_32b": _QWEN | dict(vocab=152064, tie=False) | _sizes(5120, 27392, 64, 40, 8),
    "qwen1_5_72b": _QWEN | dict(vocab=152064, tie=False) | _sizes(8192, 24576, 80, 64),
    "qwen1_5_110b": _QWEN | dict(vocab=152064, tie=False) | _sizes(8192, 49152, 80, 64, 8),
    "qwen2_0_5b": _QWEN | dict(vocab=151936, head_dim=64, tie=True) | _sizes(896, 4864, 24, 14, 2),
    "qwen2_1_5b": _QWEN | dict(vocab=151936, tie=True) | _sizes(1536, 8960, 28, 12, 2),
    "qwen2_7b": _QWEN | dict(vocab=152064, tie=False) | _sizes(3584, 18944, 28, 28, 4),
    "qwen2_72b": _QWEN | dict(vocab=152064, tie=False) | _sizes(8192, 29568, 80, 64, 8),
    "qwen2_5_0_5b": _QWEN
    | dict(vocab=151936, head_dim=64, tie=True)
    | _sizes(896, 4864, 24, 14, 2),
    "qwen2_5_1_5b": _QWEN | dict(vocab=151936, tie=True) | _sizes(1536, 8960, 28, 12, 2),
    "qwen2_5_3b": _QWEN | dict(vocab=151936, tie=True) | _sizes(2048, 11008, 36, 16, 2),
    "qwen2_5_7b": _QWEN | dict(vocab=152064, tie=False) | _sizes(3584, 18944, 28, 28, 4),
    # eps of the base models of 14B and more unverified
    "qwen2_5_14b": _QWEN | dict(vocab=152064, tie=False) | _sizes(5120, 13824, 48, 40, 8),
    "qwen2_5_32b": _QWEN | dict(vocab=152064, tie=False) | _sizes(5120, 27648, 64, 40, 8),
    "qwen2_5_72b": _QWEN | dict(vocab=152064, tie=False) | _sizes(8192, 29568, 80, 64, 8),
    "qwen3_0_6b": _QWEN3 | dict(tie=True) | _sizes(1024, 3072, 28, 16, 8),
    "qwen3_1_7b": _QWEN3 | dict(tie=True) | _sizes(2048, 6144, 28, 16, 8),
    "qwen3_4b": _QWEN3 | dict(tie=True) | _sizes(2560, 9728, 36, 32, 8),
    "qwen3_8b": _QWEN3 | dict(tie=False) | _sizes(4096, 12288, 36, 32, 8),
    "qwen3_14b": _QWEN3 | dict(tie=False) | _sizes(5120, 17408, 40, 40, 8),
    "qwen3_32b": _QWEN3 | dict(tie=False) | _sizes(5120, 25600, 64, 64, 8),
    "internlm2_1_8b": _INTERNLM2 | _sizes(2048, 8192, 24, 16, 8),
    "internlm2_20b": _INTERNLM2 | _sizes(6144, 16384, 48, 48, 8),  # unverified
    "minicpm_2_4b": _LLAMA
    | dict(vocab=122753, head_dim=64, embed_multiplier=12.0, logits_divisor=9.0)
    | dict(residual_multiplier=1.4 / 40**0.5)
    | _sizes(2304, 5760, 40, 36),
    # The 128k variant has LongRoPE factors, which come with its config.json.
    "phi3_mini_4k": _LLAMA | dict(vocab=32064, head_dim=96) | _sizes(3072, 8192, 32, 32),
    "glm4_9b": _LLAMA
    | dict(vocab=151552, eps=1.5625e-7, qkv_bias=True, rotary=64)  # vocab unverified
    | _sizes(4096, 13696, 40, 32, 2),
    "cogvlm2_llama3_8b": _LLAMA3 | dict(expert="visual") | _sizes(4096, 14336, 32, 32, 8),
}
