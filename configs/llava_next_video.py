"""LLaVA-NeXT-Video, 7B and 34B: images by AnyRes, the frames of videos pooled to 12x12 tokens.

python -m vlmjax.main train --workdir runs/llava_next_video_7b/stage1 \\
    --config configs/llava_next_video.py:size=7b
python -m vlmjax.main train --workdir runs/llava_next_video_tiny \\
    --config configs/llava_next_video.py:tiny

The one stage goes on from stage 2 of configs/llava_next.py (vicuna_7b, hermes_yi_34b) with 760K
images and 100K videos in the same batches. Its batch and rates are those of that stage
(unverified). Frames are pooled behind the connector, as in the authors' code; transformers pools in
front of it. Without newlines, as in the released 7B. At inference positions may be divided, for
more frames: set rope_scale of the decoder. Left out: DPO (17K pairs, beta 0.1, rate 5e-7), which
needs its objective.
"""

from ml_collections import ConfigDict

from configs.common import (
    PICTURES,
    TINY_SIDE,
    anyres,
    choose,
    parse_arg,
    rates,
    recipe,
    square,
    tiny,
)

# Decoder, template, the run of configs/llava_next.py to go on from, rate of the decoder.
SIZES = {
    "7b": ("vicuna_1_5_7b", "vicuna", "vicuna_7b", 2e-5),
    "34b": ("yi_34b", "llava_chatml", "hermes_yi_34b", 1e-5),
}
BATCH = 128


def get_config(arg=None):
    """Returns the config of one size."""
    arg = parse_arg(arg, size="7b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=SIZES, stage=(1,))
    llm, template, start, peak = SIZES[arg["size"]]
    side = TINY_SIDE if arg["tiny"] else 336
    frames = (("layout", "frames"), ("pool", "average"), ("stride", 2))
    c = recipe(
        f"llava_next_video_{arg['size']}",
        arg,
        model=dict(
            vision=dict(preset="clip_l_14_336", features="-2"),
            connector=dict(layers=2, specials=("newline",)),
            llm=dict(preset=llm),
            pool="weighted",
        ),
        lr=rates(2e-6, peak, peak),
        picture=anyres(side) | dict(frame=square(side, "resize"), frame_format=frames),
        template=template,
        placeholder="<unk>",
        batch=BATCH,
        steps=(760_000 + 100_000) // BATCH,
        tokens=6144,
        views=32,
        length=4096,
        init=f"runs/llava_next_{start}/stage2",
        video=dict(max_frames=16),
    )
    return ConfigDict(tiny(c, tasks=(*PICTURES, "video")) if arg["tiny"] else c)
