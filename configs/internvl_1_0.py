"""InternVL 1.0 (arXiv:2312.14238) as a chat model: InternViT-6B with an MLP or with QLLaMA, Vicuna.

python -m vlmjax.main train --workdir runs/internvl_1_0_mlp_336_7b/stage1 \\
    --config configs/internvl_1_0.py:variant=mlp_336,size=7b,stage=1
python -m vlmjax.main train --workdir runs/internvl_1_0_tiny --config configs/internvl_1_0.py:tiny

Variants: "mlp_336" takes the features of the fourth-last layer at 336 pixels, "mlp_448" those of
the last layer at 448, both by the recipe of LLaVA-1.5 with the tower frozen; "qllama" has 96
queries in a Llama of its own between tower and decoder, at 224 pixels, and trains that with the
decoder frozen. Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`, of
"qllama" also `--config.init.connector=hf:DIR`.

Unverified: what "qllama" trains and its rates, which are those of LLaVA-1.5 too. Left out: the
contrastive and generative stages, which made the tower and QLLaMA and need their objectives.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, choose, parse_arg, rates, recipe, square, tiny

LLM = {"7b": "vicuna_1_5_7b", "13b": "vicuna_1_5_13b"}
COLOUR = (123, 116, 103)  # around a padded picture, the tower's mean
QLLAMA = dict(type="qformer", queries=96)
# Features, pixels, connector, samples of a row in the two stages, its tokens.
VARIANTS = {
    "mlp_336": ("-4", 336, dict(layers=2), {1: 4, 2: 2}, {1: 2560, 2: 2048}),
    "mlp_448": ("-1", 448, dict(layers=2), {1: 4, 2: 2}, {1: 4608, 2: 3072}),
    "qllama": ("-1", 224, QLLAMA, {1: 4, 2: 4}, {1: 1024, 2: 2048}),
}
LR = {1: rates(connector=1e-3), 2: rates(connector=2e-5, llm=2e-5)}
LR_QLLAMA = {
    1: rates(first=(("connector/out/.*", 1e-3),)),
    2: rates(connector=2e-5),
}
BATCH = {1: 256, 2: 128}
SAMPLES = {1: 558_000, 2: 665_000}


def get_config(arg=None):
    """Returns the config of one variant, size and stage."""
    defaults = dict(variant="mlp_336", size="7b", stage=1, slice="v5p-64", tiny=False)
    arg = parse_arg(arg, **defaults)
    choose(arg, variant=VARIANTS, size=LLM, stage=LR)
    variant, stage = arg["variant"], arg["stage"]
    features, side, connector, per_row, tokens = VARIANTS[variant]
    side = TINY_SIDE if arg["tiny"] else side
    qllama = variant == "qllama"
    c = recipe(
        f"internvl_1_0_{variant}_{arg['size']}",
        arg,
        model=dict(
            # The tower was made at 224 pixels; its table is sampled for larger views.
            vision=dict(preset="internvit_6b_v1_0", features=features, position="bicubic"),
            connector=connector,
            llm=dict(preset=LLM[arg["size"]]),
        ),
        lr=(LR_QLLAMA if qllama else LR)[stage],
        picture=dict(strategy=square(side, {1: "crop", 2: "pad"}[stage], fill=COLOUR)),
        template={1: "plain", 2: "vicuna"}[stage],
        placeholder="<unk>",
        batch=BATCH[stage],
        steps=SAMPLES[stage] // BATCH[stage],
        tokens=tokens[stage],
        length=2048 if tokens[stage] >= 2048 else None,
        views=per_row[stage],
        per_row=per_row[stage],
        init=("vision", "connector", "llm") if qllama else ("vision", "llm"),
    )
    small = dict(queries=4, width=16, mlp=24, layers=2, heads=2) if qllama else {}
    # A table of 3x3 for views of 4x4 patches.
    return ConfigDict(tiny(c, vision=dict(side=3), connector=small) if arg["tiny"] else c)
