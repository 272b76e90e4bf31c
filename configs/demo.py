"""A small VideoLLaMA3 learns from real data on two CPU cores: configs/videollama3.py, tiny.

bash launch/local.sh demo       all stages in sequence, then scores, export and a chat
python -m vlmjax.main train --config configs/demo.py:stage=1 --workdir runs/demo/stage1

Stage 0 makes the small language model from text, where the paper takes Qwen2.5. Stages 1 to 4
are the paper's.
"""

from ml_collections import ConfigDict

from configs.common import data, evaluation, parse_arg

STEPS = {0: 400, 1: 500, 2: 1100, 3: 800, 4: 800}
# Tokens, patches, visual tokens of a row, patches of a visual token at most: the mix of the stage
# fills both buffers evenly.
BUDGET = {
    0: (512, 0, 0, 4),
    1: (512, 256, 256, 4),
    2: (512, 256, 256, 4),
    3: (512, 320, 256, 4),
    4: (512, 512, 128, 4),
}
# Task -> share of the draws. Stage 0 reads every task in words instead of pictures; "letter" and
# "digit" are single glyphs, the first step towards reading.
MIX = {
    0: dict(
        name_as_text=1.0,
        digits_as_text=1.0,
        ocr_as_text=2.0,
        count_as_text=1.0,
        where_as_text=1.0,
        caption_as_text=1.0,
        chart_as_text=1.0,
        multi_image_as_text=1.0,
        video_as_text=1.5,
        stream_as_text=1.0,
        text=1.0,
    ),
    1: dict(name=1.0, digit=1.0, letter=1.5),
    2: dict(name=1.0, digits=1.0, ocr=2.0, letter=0.5, count=0.8, caption=0.6, chart=0.5, text=0.3),
    3: dict(
        name=0.5,
        digits=0.5,
        ocr=1.2,
        count=0.6,
        where=0.7,
        caption=0.4,
        chart=0.4,
        multi_image=0.7,
        video=1.0,
        text=0.3,
    ),
    4: dict(
        name=0.4,
        digits=0.4,
        letter=0.2,
        ocr=0.7,
        count=0.5,
        where=0.4,
        caption=0.4,
        chart=0.4,
        multi_image=0.4,
        video=1.3,
        stream=2.0,
        text=0.2,
    ),
}


def get_config(arg=None):
    """Returns the config of one stage; `scale` multiplies the steps, `root` holds the stages."""
    arg = parse_arg(arg, stage=1, scale=1.0, root="runs/demo")
    stage = arg["stage"]
    if stage not in STEPS:
        raise ValueError(f"stage={stage} is not allowed; choose one of {sorted(STEPS)}")
    c = ConfigDict()
    c.stage = stage
    c.model = dict(
        vision=dict(width=128, mlp=384, layers=3, heads=4, patch=8),
        connector=dict(layers=2),
        llm=dict(
            vocab=800,
            width=128,
            mlp=384,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=32,
            tie=True,
            rope_theta=1e4,
        ),
        compute=dict(
            remat="dots",
            dtype="float32",
            attention="blockwise",
            vision_block=32,
            llm_block=64,
            loss_chunk=256,
        ),
    )
    c.init = f"{arg['root']}/stage{stage - 1}" if stage else None
    c.objective = "sft"
    c.lr = {
        0: (("vision/.*", None), ("connector/.*", None), ("llm/.*", 2e-3)),
        1: (("vision/.*", 1e-3), ("connector/.*", 1e-3), ("llm/.*", None)),
    }.get(stage, ((".*", 1e-3),))
    c.optim = dict(
        name="adamw",
        moment_dtype="float32",
        b2=0.98,
        wd=0.0,
        clip="global_norm",
        clip_at=1.0,
        skip_above=0.0,
        schedule="cosine",
        warmup=0.03,
    )
    c.processor = dict(
        patch=8,
        image_merge=2 if stage == 4 else 1,
        video_merge=2,
        min_visual_tokens=1,
        max_visual_tokens=128,
        max_length=512,
        compression=stage >= 3,
        prune="after_encoder",
    )
    c.data = data(
        sources=tuple((f"demo:{task}", share) for task, share in MIX[stage].items()),
        tokenizer="demo",
        budget=BUDGET[stage],
        pool=128,
        normalisation="sqrt",
    )
    c.train = dict(
        steps=max(round(STEPS[stage] * arg["scale"]), 1),
        rows=4,
        accumulate=1,
        seed=0,
        log_every=20,
        save_every=250,
        keep=2,
        frozen_dtype="float32",
    )
    c.mesh = dict(data=-1, fsdp=1, seq=1, tensor=1)
    c.eval = evaluation()
    return c
