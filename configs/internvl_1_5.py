"""InternVL 1.1, 1.2 and 1.5 (arXiv:2404.16821) and Mini-InternVL, 2B to 40B; two stages.

python -m vlmjax.main train --workdir runs/internvl_1.5_26b/stage1 \\
    --config configs/internvl_1_5.py:size=26b,stage=1
python -m vlmjax.main train --workdir runs/internvl_tiny --config configs/internvl_1_5.py:tiny

InternViT, 2x2 patches side by side through two linear maps, InternLM2, Yi, Phi-3 or Llama 2.
Sizes of version 1.5 are 26b, 40b and Mini-InternVL's 2b and 4b, whose pictures are cut into 1 to 12
tiles; 1.1 (19b) and 1.2 (40b) see one view, and their tokens come column after column (the first
version of the pixel shuffle). Stage 1 starts from `--config.init.vision=hf:DIR
--config.init.llm=hf:DIR`. What is trained, samples, batches, rates, decay and lengths are those of
the authors' posts; what they leave out is marked.

Left out: drop-path (0.1 to 0.4 of the tower in most stages), random JPEG compression of training
pictures, and the LongRoPE factors of Phi-3-mini-128k, which come with its config.json: give them as
rope_short, rope_long and rope_factors of the decoder.
"""

from ml_collections import ConfigDict

from configs.common import TINY_SIDE, adamw, parse_arg, rates, recipe, square, tiny

V6B, V300M = dict(preset="internvit_6b_v1_5"), dict(preset="internvit_300m")
# The features of the fourth-last of its 48 layers, at 448 pixels: unverified.
V1_1 = dict(preset="internvit_6b_v1_0", features="-4", side=32)
# Nine tokens are added to each vocabulary: <img>, </img>, <IMG_CONTEXT>, boxes and references. The
# rows that checkpoints give them are unverified; Phi-3's table has room for them.
INTERNLM2_20B = dict(preset="internlm2_20b", vocab=92553)
INTERNLM2_1_8B = dict(preset="internlm2_1_8b", vocab=92553)
YI = dict(preset="yi_34b", vocab=64009)
PHI3 = dict(preset="phi3_mini_4k")
LLAMA2 = dict(preset="llama2_13b", vocab=32009)  # 1.1: unverified that it is this decoder
# Encoder, decoder, template.
SIZES = {
    ("1.1", "19b"): (V1_1, LLAMA2, "internvl_zh"),
    ("1.2", "40b"): (V6B, YI, "internvl"),
    ("1.5", "26b"): (V6B, INTERNLM2_20B, "internvl_internlm2"),
    ("1.5", "40b"): (V6B, YI, "internvl"),
    ("1.5", "2b"): (V300M, INTERNLM2_1_8B, "internvl_internlm2"),
    ("1.5", "4b"): (V300M, PHI3, "internvl_phi3"),
}
BOTH, MLP, ALL = ("vision", "connector"), ("connector",), ("vision", "connector", "llm")
# What is trained, millions of samples, batch, rate, weight decay, length.
STAGES = {
    ("1.1", "19b", 1): (BOTH, 72, 8192, 2e-5, 0.05, 384),  # decay unverified
    ("1.1", "19b", 2): (ALL, 6, 2048, 2e-5, 0.05, 2048),  # rate, decay and length unverified
    ("1.2", "40b", 1): (BOTH, 39.3, 8192, 2e-5, 0.05, 384),
    ("1.2", "40b", 2): (ALL, 1.2, 512, 1e-5, 0.05, 2048),
    ("1.5", "26b", 1): (BOTH, 200, 2048, 1e-5, 0.05, 4096),
    ("1.5", "26b", 2): (ALL, 5, 1024, 2e-5, 0.05, 4096),
    ("1.5", "40b", 1): (MLP, 3, 2048, 1e-4, 0.05, 4096),
    ("1.5", "40b", 2): (ALL, 5, 1024, 2e-5, 0.05, 4096),
    ("1.5", "2b", 1): (BOTH, 200, 2048, 2e-5, 0.01, 4096),
    ("1.5", "2b", 2): (ALL, 5, 1024, 4e-5, 0.01, 8192),
    ("1.5", "4b", 1): (MLP, 24, 2048, 2e-4, 0.05, 4096),
    ("1.5", "4b", 2): (ALL, 5, 1024, 4e-5, 0.05, 8192),
}


def get_config(arg=None):
    """Returns the config of one version, size and stage."""
    defaults = dict(version="1.5", size="26b", stage=1, slice="v5p-64", tiny=False)
    arg = parse_arg(arg, **defaults)
    version, size, stage = arg["version"], arg["size"], arg["stage"]
    if (version, size, stage) not in STAGES:
        raise ValueError(
            f"version={version!r}, size={size!r}, stage={stage} is none of {sorted(STAGES)}"
        )
    vision, llm, template = SIZES[version, size]
    trained, millions, batch, peak, wd, length = STAGES[version, size, stage]
    tiles = version == "1.5"
    side = TINY_SIDE if arg["tiny"] else 448
    most = 4 if arg["tiny"] else 12
    cut = (dict(name="dynamic", side=side, max_tiles=most),)
    order = "row" if tiles else "column"
    rows = dict(per_row=2, tokens=2 * length, views=2 * 13)
    if not tiles:
        rows = dict(per_row=4, tokens=4 * length, views=4)
    c = recipe(
        f"internvl_{version}_{size}",
        arg,
        model=dict(
            vision=vision,
            connector=dict(layers=2, window=2, norm="layer", order=order),
            llm=llm,
        ),
        lr=rates(**{module: peak for module in trained}),
        optim=adamw(wd=wd),  # warm-up unverified
        picture=dict(
            strategy=cut if tiles else square(side, "resize"),
            format=(("control", ("<img>", "</img>")),),
        ),
        template=template,
        placeholder="<unk>",
        batch=batch,
        steps=round(millions * 1e6 / batch),
        length=length,
        **rows,
    )
    return ConfigDict(tiny(c) if arg["tiny"] else c)
