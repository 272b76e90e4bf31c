"""LLaVA-NeXT-Interleave, 0.5B, 7B and 14B: SigLIP and Qwen1.5 on several images, videos and views.

python -m vlmjax.main train --workdir runs/llava_next_interleave_7b/stage1 \\
    --config configs/llava_next_interleave.py:size=7b,stage=1
python -m vlmjax.main train --workdir runs/llava_next_interleave_tiny \\
    --config configs/llava_next_interleave.py:tiny

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`. Stages 1 and 2 are those
of LLaVA-NeXT (558K, 760K), stage 3 is M4-Instruct (1177.6K). A lone image is seen by AnyRes, each
of several images and frames as one view. Batch, rates and length of stage 3 are unverified: those
of stage 2, and a length that holds ten views, with which it was trained. Left out: DPO, which needs
its objective.
"""

from ml_collections import ConfigDict

from configs.common import (
    PICTURES,
    PLAIN,
    TINY_SIDE,
    anyres,
    choose,
    parse_arg,
    rates,
    recipe,
    square,
    tiny,
)

LLM = {"0.5b": "qwen1_5_0_5b", "7b": "qwen1_5_7b", "14b": "qwen1_5_14b"}
LR = {1: rates(connector=1e-3), 2: rates(2e-6, 2e-5, 2e-5), 3: rates(2e-6, 2e-5, 2e-5)}
BATCH = {1: 256, 2: 128, 3: 128}
SAMPLES = {1: 558_000, 2: 760_000, 3: 1_177_600}


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="7b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=LLM, stage=LR)
    stage = arg["stage"]
    side = TINY_SIDE if arg["tiny"] else 384
    picture = dict(strategy=square(side, "crop"))
    if stage > 1:
        frames = dict(frame_format=(("layout", "frames"), ("newline", "frame")))
        picture = anyres(side) | dict(several=square(side, "resize")) | frames
    c = recipe(
        f"llava_next_interleave_{arg['size']}",
        arg,
        model=dict(
            vision=dict(preset="siglip_so400m_14_384", features="-2"),
            connector=dict(layers=2, specials=("newline",)),
            llm=dict(preset=LLM[arg["size"]]),
        ),
        lr=LR[stage],
        picture=picture,
        template={1: PLAIN["qwen"]}.get(stage, "qwen"),
        placeholder="<|endoftext|>",
        batch=BATCH[stage],
        steps=SAMPLES[stage] // BATCH[stage],
        tokens={1: 4096, 2: 8192, 3: 16384}[stage],
        length={1: 2048, 2: None, 3: 8192}[stage],
        views={1: 4, 2: 10, 3: 22}[stage],
        per_row={1: 4, 2: 2, 3: 2}[stage],
        video=dict(max_frames=10),
    )
    tasks = (*PICTURES, "multi_image", "video") if stage == 3 else PICTURES
    return ConfigDict(tiny(c, tasks=tasks) if arg["tiny"] else c)
