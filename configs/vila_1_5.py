"""VILA-1.5 (arXiv:2312.07533), 3B to 40B: 2x2 patches side by side, an MLP; three stages.

python -m vlmjax.main train --workdir runs/vila_1_5_8b/stage1 \\
    --config configs/vila_1_5.py:size=8b,stage=1
python -m vlmjax.main train --workdir runs/vila_1_5_tiny --config configs/vila_1_5.py:tiny

Sizes: 3b, 3b_s2 (two scales of the picture side by side), 8b, 13b, 40b. Stage 1 aligns (CC3M-595K),
stage 2 pretrains the decoder (COYO-25M, MMC4-core, ShareGPT4V-PT), stage 3 tunes everything. Stage
1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`. Rates, batches, lengths and
templates are those of the release scripts; the samples of stages 2 and 3 are unverified.

Left out: text between images is not trained, so the documents of MMC4 are as many picture and text
turns; DPO of 8b, which needs its objective.
"""

from ml_collections import ConfigDict

from configs.common import PLAIN, TINY_SIDE, adamw, choose, parse_arg, rates, recipe, square, tiny

SIGLIP = dict(preset="siglip_so400m_14_384", features="-2")
INTERNVIT = dict(preset="internvit_6b_v1_5")
# Encoder, its side in pixels, decoder, template, placeholder.
SIZES = {
    "3b": (SIGLIP, 384, "sheared_llama_2_7b", "vicuna", "<unk>"),
    "3b_s2": (SIGLIP, 384, "sheared_llama_2_7b", "vicuna", "<unk>"),
    "8b": (SIGLIP, 384, "llama3_8b", "vila_llama3", "<|reserved_special_token_0|>"),
    "13b": (SIGLIP, 384, "vicuna_1_5_13b", "vicuna", "<unk>"),
    "40b": (INTERNVIT, 448, "yi_34b", "llava_chatml", "<unk>"),
}
BATCH = {1: 256, 2: 1024, 3: 1024}
SAMPLES = {1: 595_000, 2: 50_000_000, 3: 5_000_000}
PER_ROW = {1: 8, 2: 8, 3: 4}
VIEWS = {1: 8, 2: 8, 3: 16}  # of one scale; stage 3 has videos


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="3b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=SIZES, stage=BATCH)
    size, stage = arg["size"], arg["stage"]
    vision, side, llm, template, placeholder = SIZES[size]
    side, grid = (TINY_SIDE, 4) if arg["tiny"] else (side, 27)
    last, wd = (2e-5, 0.05) if size == "40b" else (1e-4, 0.0)
    batch = 512 if size == "40b" and stage == 3 else BATCH[stage]
    lr = {
        1: rates(connector=1e-3),
        2: rates(connector=5e-5, llm=5e-5),
        3: rates(last, last, last),
    }
    model = dict(
        vision=vision,
        connector=dict(layers=2, window=2, norm="layer"),
        llm=dict(preset=llm),
    )
    # A frame is an image in the text, with the newline that follows each.
    picture = dict(strategy=square(side, "resize"), frame_format=(("between", "\n"),))
    if size == "3b_s2":
        # The map of the four tiles is averaged to the grid of the whole view.
        model["sources"] = (0, 0)
        model["connector"]["reduce"] = "weighted"
        picture["strategy"] = (dict(name="s2", side=side, scales=(side, 2 * side)),)
        picture |= dict(stitch="tiles", resample=((), ("area", (grid, grid))))
    c = recipe(
        f"vila_1_5_{size}",
        arg,
        model=model,
        lr=lr[stage],
        optim=adamw(wd=wd if stage == 3 else 0.0),
        picture=picture,
        template={1: PLAIN[template]}.get(stage, template),
        placeholder=placeholder,
        batch=batch,
        steps=SAMPLES[stage] // batch,
        tokens={1: 4096, 2: 4096, 3: 6144}[stage],
        length=4096,
        views=VIEWS[stage] * (5 if size == "3b_s2" else 1),
        per_row=PER_ROW[stage],
        video=dict(max_frames=8),  # unverified
    )
    return ConfigDict(tiny(c, views=40) if arg["tiny"] else c)
