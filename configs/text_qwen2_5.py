"""The Qwen2.5 decoder alone on packed text: a text-only baseline, and what MaxText is held against.

python -m vlmjax.main aot --config configs/text_qwen2_5.py:size=1.5b,chips=16 --topology v5e:4x4

A row of 4,096 tokens for each chip, full remat, AdamW with float32 masters and moments.
"""

from ml_collections import ConfigDict

from configs.common import data, evaluation, parse_arg

PRESET = {"1.5b": "qwen2_5_1_5b", "7b": "qwen2_5_7b"}


def get_config(arg=None):
    """Returns the config of one size."""
    arg = parse_arg(arg, size="1.5b", chips=16, slots=4096)
    size, slots = arg["size"], arg["slots"]
    if size not in PRESET:
        raise ValueError(f"size={size!r} is one of {sorted(PRESET)}")
    c = ConfigDict()
    c.stage = 1
    c.model = dict(
        vision=None,
        llm=dict(preset=PRESET[size]),
        compute=dict(dtype="bfloat16", remat="full", llm_segment=1024),
    )
    c.init = dict(llm="")  # must be given: hf:DIR or random
    c.objective = "sft"
    c.lr = (("llm/.*", 1e-5),)
    c.optim = dict(
        name="adamw",
        moment_dtype="float32",
        wd=0.0,
        clip="global_norm",
        skip_above=0.0,
        schedule="cosine",
        warmup=0.03,
    )
    c.processor = dict(max_length=slots)
    c.data = data(
        sources=(("json:annotations.jsonl", 1.0),), tokenizer="tokenizer", budget=(slots, 0, 0, 4)
    )
    c.train = dict(
        steps=1000,
        rows=arg["chips"],
        accumulate=1,
        seed=42,
        log_every=10,
        save_every=500,
        keep=2,
        frozen_dtype="bfloat16",
    )
    c.mesh = dict(data=1, fsdp=-1, seq=1, tensor=1)
    c.eval = evaluation()
    return c
