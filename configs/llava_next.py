"""LLaVA-NeXT (1.6, with AnyRes) and its stronger decoders, 7B to 110B; two stages.

python -m vlmjax.main train --workdir runs/llava_next_vicuna_7b/stage1 \\
    --config configs/llava_next.py:size=vicuna_7b,stage=1
python -m vlmjax.main train --workdir runs/llava_next_tiny --config configs/llava_next.py:tiny

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`; 1.6 itself took the
connectors of LLaVA-1.5. Rates, batches and data are those of the authors' posts (558K, then 760K;
790K with the stronger decoders). Stage 1.5 of the ablations ("high-quality knowledge") is stage 2
on other data.

`max_tiles=N` is their "higher AnyRes" (anyres_max_N): any grid up to 6x6, its map shrunk to the
tokens of N tiles. The ablation of resolutions used size=so400m_qwen1_5_0_5b with N = 4, 9, 16.
"""

from ml_collections import ConfigDict

from configs.common import (
    ANYRES,
    ANYRES_6X6,
    PLAIN,
    TINY_SIDE,
    anyres,
    choose,
    parse_arg,
    rates,
    recipe,
    square,
    tiny,
)

CLIP = dict(preset="clip_l_14_336", features="-2")
SIGLIP = dict(preset="siglip_so400m_14_384", features="-2")
QWEN = "qwen", "<|endoftext|>"
# Encoder, its side in pixels, decoder, template of stage 2 and placeholder.
SIZES = {
    "vicuna_7b": (CLIP, 336, "vicuna_1_5_7b", "vicuna", "<unk>"),
    "vicuna_13b": (CLIP, 336, "vicuna_1_5_13b", "vicuna", "<unk>"),
    "mistral_7b": (CLIP, 336, "mistral_7b_v0_2", "mistral", "<unk>"),
    "hermes_yi_34b": (CLIP, 336, "yi_34b", "llava_chatml", "<unk>"),
    "llama3_8b": (CLIP, 336, "llama3_8b", "llava_llama3", "<|reserved_special_token_0|>"),
    **{
        f"qwen1_5_{n}": (CLIP, 336, f"qwen1_5_{n}", *QWEN)
        for n in ("0_5b", "1_8b", "4b", "7b", "14b", "32b", "72b", "110b")
    },
    "so400m_qwen1_5_0_5b": (SIGLIP, 384, "qwen1_5_0_5b", *QWEN),
}
LARGE = ("hermes_yi_34b", "qwen1_5_32b", "qwen1_5_72b", "qwen1_5_110b")  # 32B and more
STRONGER = ("llama3_8b", "qwen1_5_72b", "qwen1_5_110b")
# max_tiles -> slots of a row: the cap may be passed by a fifth, and there is text.
CAPPED = {0: 6144, 4: 6144, 9: 10240, 16: 18432}


def get_config(arg=None):
    """Returns the config of one size and stage."""
    arg = parse_arg(arg, size="vicuna_7b", stage=1, max_tiles=0, slice="v5p-64", tiny=False)
    choose(arg, size=SIZES, stage=(1, 2), max_tiles=CAPPED)
    size, stage, most = arg["size"], arg["stage"], arg["max_tiles"]
    vision, side, llm, template, placeholder = SIZES[size]
    side = TINY_SIDE if arg["tiny"] else side
    peak = 1e-5 if size in LARGE else 2e-5
    picture = dict(strategy=square(side, "crop"))
    if stage == 2:
        picture = anyres(side, ANYRES_6X6 if most else ANYRES, most) | dict(
            frame=square(side, "resize"), frame_format=(("layout", "frames"),)
        )
    batch = {1: 256, 2: 64 if size.startswith("so400m") else 128}[stage]
    samples = {1: 558_000, 2: 790_000 if size in STRONGER or most else 760_000}[stage]
    one = stage == 2 and most > 0  # sample a row: it may have 37 views
    c = recipe(
        f"llava_next_{size}" + (f"_max{most}" if most else ""),
        arg,
        model=dict(
            vision=vision,
            connector=dict(layers=2, specials=("newline",)),
            llm=dict(preset=llm),
            pool="weighted" if most else "none",
        ),
        lr={1: rates(connector=1e-3), 2: rates(2e-6, peak, peak)}[stage],
        picture=picture,
        template={1: PLAIN[template], 2: template}[stage],
        placeholder=placeholder,
        batch=batch,
        steps=samples // batch,
        tokens={1: 4096, 2: CAPPED[most]}[stage],
        length={1: 2048, 2: None}[stage],
        views={1: 4, 2: 37 if one else 10}[stage],
        per_row={1: 4, 2: 1 if one else 2}[stage],
    )
    return ConfigDict(tiny(c, views=37 if most else 24, tokens=512) if arg["tiny"] else c)
