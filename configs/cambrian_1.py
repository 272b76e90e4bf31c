"""Cambrian-1 (arXiv:2406.16860), 8B to 34B: four encoders, SVA in front of and in the decoder.

python -m vlmjax.main train --workdir runs/cambrian_1_8b/stage1 \\
    --config configs/cambrian_1.py:size=8b,stage=1
python -m vlmjax.main train --workdir runs/cambrian_1_tiny --config configs/cambrian_1.py:tiny

SigLIP, CLIP, DINOv2-giant and ConvNeXt-XXL each see the picture padded to a square with their own
mean colour, in their own size; 24x24 queries read their windows of all four. Stage 1 trains the
connector and the blocks in the decoder (2.5M), stage 2 the decoder too (Cambrian-7M). Stage 1
starts from `--config.init.llm=hf:DIR` and, for the encoders, `--config.init.vision=hf:DIR`,
`vision_2`, `vision_3` and `vision_4`. Rates, batches, warm-up, decay, length, templates and places
of the blocks are those of the authors' scripts.

As in training there, padding is not cut off: 24 rows of 25 tokens. To cut it off, set `unpad` of
the format to "original". Left out: the image at one fixed place of all rows, which static shapes on
TPU asked for there.
"""

from ml_collections import ConfigDict

from configs.common import TINY_VIT, adamw, choose, parse_arg, rates, recipe, square, tiny

# Decoder, template, placeholder, blocks of SVA in it and how far apart, batch, rate of stage 2.
SIZES = {
    "8b": ("llama3_8b", "cambrian_llama3", "<|reserved_special_token_0|>", 10, 3, 512, 4e-5),
    "13b": ("vicuna_1_5_13b", "vicuna", "<unk>", 10, 4, 512, 4e-5),
    "34b": ("yi_34b", "cambrian_chatml", "<unk>", 9, 7, 1024, 2e-5),
}
SAMPLES = {1: 2_500_000, 2: 7_000_000}
WARMUP = {1: 0.06, 2: 0.03}
VISION = (
    dict(preset="siglip_so400m_14_384", act="gelu"),
    dict(preset="clip_l_14_336", features="-2"),
    dict(preset="dinov2_g_14"),
    dict(type="convnext", preset="convnext_xxl"),
)
SIDES = (384, 336, 378, 1024)
COLOURS = ((127, 127, 127), (122, 116, 104), (123, 116, 103), (122, 116, 104))
TINY_VISION = (
    TINY_VIT | dict(side=3),
    TINY_VIT,
    TINY_VIT | dict(side=5),
    dict(widths=(8, 12), depths=(1, 1), rows=16, columns=16, grid=8, patch=2),
)
TINY_SIDES = (21, 24, 20, 32)


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="8b", stage=1, slice="v5p-64", tiny=False)
    choose(arg, size=SIZES, stage=SAMPLES)
    stage = arg["stage"]
    llm, template, placeholder, number, stride, batch, peak = SIZES[arg["size"]]
    sides, grid = (TINY_SIDES, 4) if arg["tiny"] else (SIDES, 24)
    views = [square(side, fill=fill) for side, fill in zip(sides, COLOURS, strict=True)]
    to_grid = ("bilinear", (grid, grid))  # 27x27 -> 24x24 for SigLIP and DINOv2
    lr = {
        1: rates(connector=1e-3, first=(("connector/blocks/.*|llm/extra/.*", 1e-4),)),
        2: rates(connector=peak, llm=peak),
    }
    c = recipe(
        f"cambrian_1_{arg['size']}",
        arg,
        model=dict(
            vision=VISION,
            connector=dict(type="sva", reduce="weighted"),
            llm=dict(preset=llm, extra_num=number, extra_stride=stride),
        ),
        lr=lr[stage],
        optim=adamw(warmup=WARMUP[stage]),
        picture=dict(
            strategy=sum(views, ()),
            resample=(to_grid, (), to_grid, ()),
            format=(("layout", "square"), ("newline", "row")),
        ),
        template=template,
        placeholder=placeholder,
        batch=batch,
        steps=SAMPLES[stage] // batch,
        tokens={1: 3072, 2: 4096}[stage],
        length=2048,
        views=4,
        per_row=4,
    )
    small = dict(
        vision=TINY_VISION,
        connector=dict(side=4, windows=(1, 1, 1, 2), width=16, heads=2, layers=2),
        llm=dict(extra_num=2, extra_stride=1),
        views=8,
    )
    return ConfigDict(tiny(c, **small) if arg["tiny"] else c)
