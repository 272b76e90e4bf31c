"""VideoLLaMA3 (arXiv:2501.13106), 2B and 7B, four stages; each starts from the stage before.

python -m vlmjax.main train --workdir runs/vl3_2b/stage1 \\
    --config configs/videollama3.py:size=2b,stage=1

Stage 1 starts from `--config.init.vision=hf:DIR --config.init.llm=hf:DIR`: Qwen2.5-Instruct, and
for 2b SigLIP so400m/14-384; 7b starts from the tower that 2b was trained to. The sources are those
of the paper's Tables 1 to 4, as DATA/NAME.jsonl with media in DATA (the argument data=DATA); what
is there shares the table's count of its group, and what is absent is said before the first step.
Measure them with `data index` and set --config.data.index. The learning rates, lengths, merge sizes
and batch are those of the authors' scripts and paper.
"""

from ml_collections import ConfigDict

from configs.common import data, evaluation, parse_arg, slice_preset

LLM = {"2b": "qwen2_5_1_5b", "7b": "qwen2_5_7b"}
# Stage -> group -> (millions of samples, names), Tables 1 to 4. The text of stage 2 is that of
# Figure 2 (the table says 6.25, which its own sum does not hold). How much a name has of its group
# is not published, nor which parts the authors' own sets have.
MIX = {
    1: {
        "scene image": (11.84, "VL3-Syn7M-short LLaVA-Pretrain-558k Objects365-Recap SA-1B-Recap"),
        "scene text": (0.93, "BLIP3-OCR-Recap"),
        "document": (2.8, "pdfa-eng-wds idl-wds"),
    },
    2: {
        "scene image": (
            12.56,
            "VL3-Syn7M-detailed Objects365-Recap SA-1B-Recap COCO2017-Recap "
            "ShareGPT4o TextCaps ShareGPT4V DenseFusion LLaVA-ReCap-LCS-558K",
        ),
        "scene text": (4.69, "Laion-OCR COCO-Text TextOCR BLIP3-OCR-Recap LSVT ReCTS"),
        "document": (
            2.68,
            "SynthDoG-EN SynthDoG-ZH UReader-TR FUNSD DUDE Vary-600k pdfa-eng-wds idl-wds",
        ),
        "chart": (0.04, "Chart-to-Text"),
        "fine-grained": (1.0, "Osprey-724K MDVP-Data ADE20K-Recap Object365 Flickr-30K GranD"),
        "text": (
            1.0,
            "Evol-Instruct-143K Infinity-Instruct-code Infinity-Instruct-commonsense "
            "Infinity-Instruct-math",
        ),
    },
    3: {
        "general": (
            9.87,
            "LLaVA-SFT-665K LLaVA-OV-SI Cambrian-cleaned Pixmo-docs Pixmo-cap "
            "Pixmo-points Pixmo-cap-qa Pixmo-ask-model-anything",
        ),
        "document": (1.31, "DocVQA Docmatix"),
        "chart": (1.0, "ChartQA MMC_Instruction DVQA LRV_Instruction ChartGemma InfoVQA PlotQA"),
        "ocr": (0.83, "MultiUI in-house-ocr"),
        "grounding": (0.5, "RefCoco VCR in-house-grounding"),
        "several images": (0.41, "Demon-Full Contrastive_Caption"),
        "text": (2.21, "Magpie Magpie-Pro Synthia Infinity-Instruct-subjective NuminaMath"),
        "video": (
            2.92,
            "LLaVA-Video-178K ShareGPT4o-Video FineVideo CinePile ShareGemini-k400 "
            "ShareGemini-WebVID VCG-Human VCG-Plus VideoLLaMA2-in-house "
            "in-house-temporal-grounding",
        ),
    },
    4: {
        "video": (
            3.03,
            "LLaVA-Video-178K ShareGPT4o-Video FineVideo CinePile ShareGemini-k400 "
            "ShareGemini-WebVID VCG-Human VCG-Plus VideoRefer VideoLLaMA2-in-house "
            "in-house-synthetic",
        ),
        "stream": (0.0362, "ActivityNet-stream YouCook2-stream Ego4D-narration Ego4D-livechat"),
        "temporal grounding": (
            0.21,
            "ActivityNet YouCook2 ViTT QuerYD HiREST Charades-STA Moment-10M COIN",
        ),
        "image": (0.88, "LLaVA-SFT-665K LLaVA-OV-SI"),
        "text": (1.56, "Magpie Tulu-3"),
    },
}
GLOBAL_BATCH = 128


def get_config(arg=None):
    """Returns the config of one size and stage for a slice of `configs.common.SLICES`."""
    arg = parse_arg(arg, size="2b", stage=1, slice="v5e-16", data="data")
    size, stage = arg["size"], arg["stage"]
    if size not in LLM or stage not in MIX:
        raise ValueError(
            f"size={size!r}, stage={stage}: size is one of {sorted(LLM)}, stage one of 1, 2, 3, 4"
        )
    rows = GLOBAL_BATCH // 2
    mesh, compute, accumulate = slice_preset(arg["slice"], rows)
    c = ConfigDict()
    c.stage = stage
    c.model = dict(
        vision=dict(preset="siglip_so400m_14"),
        connector=dict(layers=2),
        llm=dict(preset=LLM[size]),
        compute=dict(dtype="bfloat16", vision_segment=1024, llm_segment=8192, **compute),
    )
    if stage == 1:
        c.init = dict(vision="", connector="random", llm="")  # "": must be given
    else:
        c.init = f"runs/vl3_{size}/stage{stage - 1}"
    c.objective = "sft"
    c.lr = {
        1: (("vision/.*", 1e-5), ("connector/.*", 1e-3), ("llm/.*", None)),
    }.get(stage, (("vision/.*", 2e-6), ("connector/.*", 1e-5), ("llm/.*", 1e-5)))
    c.optim = dict(
        name="adamw",
        moment_dtype="float32",
        wd=0.0,
        clip="none",
        skip_above=0.0,
        schedule="cosine",
        warmup=0.03,
    )
    c.processor = dict(
        patch=14,
        image_merge=2 if stage == 4 else 1,
        video_merge=2,
        max_visual_tokens=10240,
        max_length=16384,
        fps=1.0,
        max_frames=180,
        frame_sampling="last_of_second",
        compression=stage >= 3,
        prune="after_encoder",
    )
    # A row holds about two samples, as the authors' micro-batch did: 64 rows are a global batch
    # of about 128.
    c.data = data(
        sources=tuple(
            dict(spec=f"json:{arg['data']}/{name}.jsonl", name=name, group=group)
            for group, (_, names) in MIX[stage].items()
            for name in names.split()
        ),
        groups=tuple((group, millions) for group, (millions, _) in MIX[stage].items()),
        absent="report",
        tokenizer="tokenizer",
        budget=(16384, 40960, 10240, 4),
        media_root=arg["data"],
    )
    samples = sum(millions for millions, _ in MIX[stage].values())
    steps = round(samples * 1e6 / GLOBAL_BATCH)
    c.train = dict(
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        seed=42,
        log_every=10,
        save_every=1000,
        keep=2,
        frozen_dtype="bfloat16",
    )
    c.mesh = mesh
    c.eval = evaluation()
    return c
