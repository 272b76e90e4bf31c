"""360VL, 8B and 70B: CLIP L/14-336, two C-Abstractors, Llama 3; 2x2 tiles and the whole picture.

python -m vlmjax.main train --workdir runs/360vl_8b/stage1 \\
    --config configs/qihoo_360vl.py:size=8b,stage=1
python -m vlmjax.main train --workdir runs/360vl_tiny --config configs/qihoo_360vl.py:tiny

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`. The four tiles are one
48x48 map that goes through one abstractor, the whole view goes through the other: 2 * queries
tokens. Architecture and data are those of the released code; it has no training script, so batches,
rates, decay, warm-up and steps are those of the C-Abstractor's paper (Honeybee, arXiv:2312.06742)
and unverified for 360VL. Its schedule ends at a tenth of the peak, here it ends at 0. Left out: the
bilingual system prompt.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, adamw, choose, parse_arg, rates, recipe, tiny

LLM = {"8b": "llama3_8b", "70b": "llama3_70b"}
QUERIES = 144  # unverified for the released weights
LR = {1: rates(connector=1e-4), 2: rates(connector=2e-5, llm=2e-5)}
BATCH = {1: 256, 2: 128}
STEPS = {1: 50_000, 2: 10_000}
WARMUP = {1: 2000, 2: 150}
WD = {1: 1e-2, 2: 1e-4}


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="8b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=LLM, stage=LR)
    stage = arg["stage"]
    side = TINY_SIDE if arg["tiny"] else 336
    c = recipe(
        f"360vl_{arg['size']}",
        arg,
        model=dict(
            vision=dict(preset="clip_l_14_336", features="-2"),
            connector=dict(type="c_abstractor", queries=QUERIES, copies=("ctt", "ori")),
            llm=dict(preset=LLM[arg["size"]]),
            sources=(0, 0),
        ),
        lr=LR[stage],
        optim=adamw(wd=WD[stage], b2=0.98, eps=1e-6, warmup=WARMUP[stage] / STEPS[stage]),
        picture=dict(strategy=(dict(name="grid2x2", side=side),), stitch="tiles"),
        template="llama3",
        placeholder="<|reserved_special_token_44|>",
        batch=BATCH[stage],
        steps=STEPS[stage],
        tokens=2048,
        views=4 * 5,
        per_row=4,
    )
    small = dict(queries=4, width=16, depth=2, side=4)
    return ConfigDict(tiny(c, connector=small, views=30) if arg["tiny"] else c)
