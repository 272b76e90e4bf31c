"""CogVLM2, 19B: EVA2-CLIP-E at 1344 pixels, a convolution and a gated MLP, Llama 3 with experts.

python -m vlmjax.main train --workdir runs/cogvlm2/stage1 --config configs/cogvlm2.py:stage=1
python -m vlmjax.main train --workdir runs/cogvlm2_tiny --config configs/cogvlm2.py:tiny

Each layer of the decoder has a second set of weights for the tokens of pictures; a picture has 2306
tokens at three positions. Stage 1 pretrains those weights and the connector, stage 2 tunes the
decoder too. Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`; the experts
are to begin as copies of the language weights, which an imported checkpoint has to bring.

The authors have not published how CogVLM2 was trained: what is trained, steps, batches, rates and
decay are those of the paper of CogVLM (arXiv:2311.03079) as remembered, all of them unverified.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, adamw, choose, parse_arg, rates, recipe, square, tiny

EXPERT = "llm/blocks/expert/.*"
LR = {1: rates(connector=1e-4, first=((EXPERT, 1e-4),)), 2: rates(1e-6, 1e-5, 1e-5)}
BATCH = {1: 8192, 2: 1024}
STEPS = {1: 120_000, 2: 6000}


def get_config(arg=None):
    """Returns the config of one stage."""
    arg = parse_arg(arg, stage=1, slice="v5p-64", tiny=False)
    choose(arg, stage=LR)
    stage = arg["stage"]
    side = TINY_SIDE if arg["tiny"] else 1344
    c = recipe(
        "cogvlm2",
        arg,
        model=dict(
            vision=dict(preset="eva2_clip_e", side=96),
            connector=dict(type="conv_glu", hidden=14336),
            llm=dict(preset="cogvlm2_llama3_8b"),
        ),
        lr=LR[stage],
        optim=adamw(wd=0.05, b2=0.95, warmup=0.1 if stage == 1 else 0.03),
        picture=dict(
            strategy=square(side, "resize"),
            format=(("vectors", ("boi", "eoi")), ("positions", "shared")),
        ),
        template="cogvlm",
        placeholder="<|reserved_special_token_0|>",
        batch=BATCH[stage],
        steps=STEPS[stage],
        tokens=6144,
        views=2,
    )
    return ConfigDict(tiny(c, connector=dict(hidden=40)) if arg["tiny"] else c)
