"""MiniCPM-V 2.0 and MiniCPM-Llama3-V 2.5: SigLIP on slices, a resampler; alignment, then tuning.

python -m vlmjax.main train --workdir runs/minicpm_v_2.5/stage1 \\
    --config configs/minicpm_v.py:version=2.5,stage=1
python -m vlmjax.main train --workdir runs/minicpm_v_tiny --config configs/minicpm_v.py:tiny

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`. Stage 2 has the numbers
of the authors' fine-tuning code (rate, decay, betas, warm-up, 10K steps); its batch is unverified.
The pretraining in three phases is not published in the repositories: stage 1 stands for it and
trains the resampler as LLaVA-1.5 does its projector (all of it unverified). The tokenizer is that
of the released model, with <image>, </image>, <slice> and </slice>. Left out: the LoRA variant,
RLHF-V and RLAIF-V, which need their objectives.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, TINY_VIT, adamw, choose, parse_arg, rates, recipe, tiny

# Encoder, connector, decoder, template, placeholder.
VERSIONS = {
    "2.0": (
        dict(preset="siglip_minicpm_v_2"),
        dict(type="resampler", queries=64, heads=18, query_pos="sincos"),
        dict(preset="minicpm_2_4b"),
        "minicpm",
    ),
    "2.5": (
        dict(preset="siglip_navit"),
        dict(type="resampler", queries=96, heads=32),
        dict(preset="llama3_8b"),
        "llama3",
    ),
}
PLACEHOLDER = "<unk>"
LR = {1: rates(connector=1e-3), 2: rates(1e-6, 1e-6, 1e-6)}
OPTIM = {1: adamw(), 2: adamw(wd=0.1, b2=0.95, warmup=0.01)}
BATCH = {1: 256, 2: 128}
STEPS = {1: 558_000 // 256, 2: 10_000}


def get_config(arg=None):
    """Returns the config of one version and stage."""
    arg = parse_arg(arg, version="2.5", stage=1, slice="v5p-64", tiny=False)
    choose(arg, version=VERSIONS, stage=LR)
    version, stage = arg["version"], arg["stage"]
    vision, connector, llm, template = VERSIONS[version]
    side, patch = (TINY_SIDE, TINY_VIT["patch"]) if arg["tiny"] else (448, 14)
    slices = dict(name="uhd", side=side, patch=patch, max_slices=4 if arg["tiny"] else 9)
    c = recipe(
        f"minicpm_v_{version}",
        arg,
        model=dict(vision=vision, connector=connector, llm=llm),
        lr=LR[stage],
        optim=OPTIM[stage],
        picture=dict(strategy=(slices,), format=(("layout", "slices"), ("between", "\n"))),
        template=template,
        placeholder=PLACEHOLDER,
        batch=BATCH[stage],
        steps=STEPS[stage],
        tokens=4096,
        length=2048,
        views=4 * 10,
        per_row=4,
    )
    queries = dict(queries=4, heads=4)
    # A table with room for the longest slices.
    wide = dict(side=70) if version == "2.5" else {}
    # Logits are divided by width / 256 in 2.0; its base is 32 here.
    llm = dict(logits_divisor=1.0) if version == "2.0" else {}
    return ConfigDict(tiny(c, vision=wide, connector=queries, llm=llm) if arg["tiny"] else c)
