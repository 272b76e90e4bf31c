"""GLM-4V-9B: EVA2-CLIP-E at 1120 pixels, a convolution and a gated MLP, GLM-4-9B without experts.

python -m vlmjax.main train --workdir runs/glm_4v/stage1 --config configs/glm_4v.py:stage=1
python -m vlmjax.main train --workdir runs/glm_4v_tiny --config configs/glm_4v.py:tiny

A picture has 1602 tokens at three positions, divided by 8 (the 8 and the size of the vocabulary are
unverified). Stage 1 trains the connector, stage 2 the whole model. Stage 1 starts from
`--config.init.vision=hf:DIR --config.init.llm=hf:DIR`.

The authors say no more of its training than that it is that of CogVLM2: stages, steps, batches,
rates and decay are those of configs/cogvlm2.py and unverified.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, adamw, choose, parse_arg, rates, recipe, square, tiny

LR = {1: rates(connector=1e-4), 2: rates(1e-6, 1e-5, 1e-5)}
BATCH = {1: 8192, 2: 1024}
STEPS = {1: 120_000, 2: 6000}


def get_config(arg=None):
    """Returns the config of one stage."""
    arg = parse_arg(arg, stage=1, slice="v5p-64", tiny=False)
    choose(arg, stage=LR)
    stage = arg["stage"]
    side = TINY_SIDE if arg["tiny"] else 1120
    c = recipe(
        "glm_4v",
        arg,
        model=dict(
            vision=dict(preset="eva2_clip_e", side=80),
            connector=dict(type="conv_glu", hidden=13696, conv="out", scaling=8.0),
            llm=dict(preset="glm4_9b"),
        ),
        lr=LR[stage],
        optim=adamw(wd=0.05, b2=0.95, warmup=0.1 if stage == 1 else 0.03),
        picture=dict(
            strategy=square(side, "resize"),
            format=(("vectors", ("boi", "eoi")), ("positions", "shared")),
        ),
        template="glm4",
        placeholder="<|endoftext|>",
        batch=BATCH[stage],
        steps=STEPS[stage],
        tokens=4096,
        views=2,
    )
    small = dict(connector=dict(hidden=40), llm=dict(rotary=4))
    return ConfigDict(tiny(c, **small) if arg["tiny"] else c)
