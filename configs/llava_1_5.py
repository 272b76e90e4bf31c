"""LLaVA-1.5 (arXiv:2310.03744), 7B and 13B: CLIP L/14-336, two linear maps, Vicuna 1.5; two stages.

python -m vlmjax.main train --workdir runs/llava_1_5_7b/stage1 \\
    --config configs/llava_1_5.py:size=7b,stage=1
python -m vlmjax.main train --workdir runs/llava_tiny --config configs/llava_1_5.py:tiny

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`. Rates, batches, lengths
and data are those of the authors' scripts: LCS-558K, then mix-665K. Left out: the LoRA variant, and
batches of either images or text only, whose place packing takes.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, choose, parse_arg, rates, recipe, square, tiny

LLM = {"7b": "vicuna_1_5_7b", "13b": "vicuna_1_5_13b"}
LR = {1: rates(connector=1e-3), 2: rates(connector=2e-5, llm=2e-5)}
BATCH = {1: 256, 2: 128}
SAMPLES = {1: 558_000, 2: 665_000}
PER_ROW = {1: 4, 2: 2}


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="7b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=LLM, stage=LR)
    stage = arg["stage"]
    side = TINY_SIDE if arg["tiny"] else 336
    c = recipe(
        f"llava_1_5_{arg['size']}",
        arg,
        model=dict(
            vision=dict(preset="clip_l_14_336", features="-2"),
            connector=dict(layers=2),
            llm=dict(preset=LLM[arg["size"]]),
        ),
        lr=LR[stage],
        # Pictures are padded to a square only in stage 2.
        picture=dict(strategy=square(side, {1: "crop", 2: "pad"}[stage])),
        template={1: "plain", 2: "vicuna"}[stage],
        placeholder="<unk>",
        batch=BATCH[stage],
        steps=SAMPLES[stage] // BATCH[stage],
        tokens={1: 2560, 2: 2048}[stage],
        length=2048,
        views=PER_ROW[stage],
        per_row=PER_ROW[stage],
    )
    return ConfigDict(tiny(c) if arg["tiny"] else c)
