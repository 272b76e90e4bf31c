"""VideoLLaMA3 (arXiv:2501.13106), 2B and 7B, four stages; each starts from the stage before.

python -m vlmjax.main train --workdir runs/vl3_2b/stage1 \\
    --config configs/videollama3.py:size=2b,stage=1

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR` (SigLIP so400m/14-384 and
Qwen2.5-Instruct); give annotation files with `--config.data.sources` and their folder with
`--config.data.media_root`.
The learning rates, lengths, merge sizes and batch are those of the authors' scripts and paper.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg, slice_preset

LLM = {"2b": "qwen2_5_1_5b", "7b": "qwen2_5_7b"}
# Samples of one epoch, in millions (Tables 1 to 4; stage 2 as in Figure 2).
SAMPLES = {1: 15.57, 2: 21.97, 3: 19.05, 4: 5.71}
GLOBAL_BATCH = 128


def get_config(arg=None):
    """Returns the config of one size and stage for a slice of `configs.common.SLICES`."""
    arg = parse_arg(arg, size="2b", stage=1, slice="v5e-16")
    size, stage = arg["size"], arg["stage"]
    if size not in LLM or stage not in SAMPLES:
        raise ValueError(
            f"size={size!r}, stage={stage}: size is one of {sorted(LLM)}, stage one of 1, 2, 3, 4"
        )
    rows = GLOBAL_BATCH // 2
    mesh, compute, accumulate = slice_preset(arg["slice"], rows)
    c = ConfigDict()
    c.stage = stage
    c.model = dict(
        vision=dict(preset="siglip_so400m_14"),
        connector=dict(layers=2),
        llm=dict(preset=LLM[size]),
        compute=dict(dtype="bfloat16", vision_segment=1024, llm_segment=8192, **compute),
    )
    if stage == 1:
        c.init = dict(vision="", connector="random", llm="")  # "": must be given
    else:
        c.init = f"runs/vl3_{size}/stage{stage - 1}"
    c.objective = "sft"
    c.lr = {
        1: (("vision/.*", 1e-5), ("connector/.*", 1e-3), ("llm/.*", None)),
    }.get(stage, (("vision/.*", 2e-6), ("connector/.*", 1e-5), ("llm/.*", 1e-5)))
    c.optim = dict(
        name="adamw", moment_dtype="float32", wd=0.0, clip="none", schedule="cosine", warmup=0.03
    )
    c.processor = dict(
        patch=14,
        image_merge=2 if stage == 4 else 1,
        video_merge=2,
        max_visual_tokens=10240,
        max_length=16384,
        fps=1.0,
        max_frames=180,
        frame_sampling="last_of_second",
        compression=stage >= 3,
        prune="after_encoder",
    )
    # A row holds about two samples, as the authors' micro-batch did: 64 rows are a global batch
    # of about 128.
    c.data = dict(
        sources=(("json:annotations.jsonl", 1.0),),
        tokenizer="tokenizer",
        budget=(16384, 40960, 10240, 4),
        buckets=(),
        pool=256,
        normalisation="token",
        media_root=".",
    )
    steps = round(SAMPLES[stage] * 1e6 / GLOBAL_BATCH)
    c.train = dict(
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        seed=42,
        log_every=10,
        save_every=1000,
        keep=2,
        frozen_dtype="bfloat16",
    )
    c.mesh = mesh
    c.eval = dict()
    return c
