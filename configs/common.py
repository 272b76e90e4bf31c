"""What configs share. Imports nothing of the library."""

# Slices by their Cloud names (of a v5p half the number are chips), and hosts of GPUs: how a run is
# spread over them and what its backward pass may keep of the decoder and of the vision tower.
# Planned with `aot`: 2B fits the first two and v5p-32, 7B fits v5p-64 and v6e-256; for GPUs nothing
# was planned. Rows are independent, so they are what is spread first; where there are more chips
# than rows, seq shares out a row.
SLICES = {
    "v5e-16": dict(mesh=dict(fsdp=16), remat="attention", vision_remat="attention"),
    "v6e-16": dict(mesh=dict(fsdp=16), remat="attention", vision_remat="attention"),
    "v6e-256": dict(mesh=dict(fsdp=64, seq=4), remat="dots", vision_remat="attention"),
    "v5p-32": dict(mesh=dict(fsdp=16), remat="dots", vision_remat="dots"),
    "v5p-64": dict(mesh=dict(fsdp=32), remat="dots", vision_remat="dots"),
    "h200-1": dict(mesh=dict(), remat="dots", vision_remat="dots"),
    "h200-8": dict(mesh=dict(fsdp=8), remat="dots", vision_remat="dots"),
}


def slice_preset(name, rows):
    """Returns (mesh, compute, accumulate) for `rows` rows a step.

    `mesh` has every axis, `compute` the remat policies, and each shard takes a row at a time.
    "2xv5e-16" is two slices: each is spread as one, and data goes over both.

    Raises:
      ValueError: an unknown slice, or rows that do not divide over its shards.
    """
    slices, times, one = name.rpartition("x")
    slices = slices if times else "1"
    if one not in SLICES or not slices.isdecimal() or not int(slices):
        raise ValueError(
            f"slice={name!r} is none of {sorted(SLICES)}, nor several of one, as 2xv5e-16; for "
            "another, start from one of them and change --config.mesh, --config.train.accumulate "
            "and --config.model.compute.remat"
        )
    preset = dict(SLICES[one])
    mesh = dict(data=1, fsdp=1, seq=1, tensor=1) | preset.pop("mesh")
    mesh["data"] *= int(slices)
    shards = mesh["data"] * mesh["fsdp"]
    if rows % shards:
        raise ValueError(
            f"slice={name!r} spreads rows over {shards} shards, which do not divide the {rows} "
            "rows of a step: choose another slice or number of slices, or leave slice out and give "
            "--config.mesh, --config.train.accumulate and --config.model.compute.remat"
        )
    return mesh, preset, rows // shards


def parse_arg(arg, **defaults):
    """Returns a dict of `defaults` updated from "key=value,key=value", typed as the defaults.

    Raises:
      ValueError: an unknown key, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r} is unknown; allowed are {sorted(defaults)}")
        kind = type(defaults[key])
        if kind is bool:
            if text not in ("True", "true", "1", "", "False", "false", "0"):
                raise ValueError(f"config argument {key}={text!r} must be true or false")
            values[key] = text in ("True", "true", "1", "")
        else:
            try:
                values[key] = kind(text)
            except ValueError as e:
                raise ValueError(f"config argument {key}={text!r} must be a {kind.__name__}") from e
    return values


def data(**settings):
    """Returns the data section: `settings` over the defaults of `vlmjax.data.mix.DataConfig`."""
    return (
        dict(
            buckets=(),
            normalisation="token",
            media_root=".",
            groups=(),
            absent="error",
            pool=256,
            index="",
            window=32768,
            balance="step",
            epochs=0.0,
            workers=0,
            ahead=16,
            stall=300.0,
            quota=0.001,
            changed_at=0,
        )
        | settings
    )


def evaluation(**settings):
    """Returns the eval section: `settings` over the defaults of `vlmjax.build.EvalConfig`."""
    return (
        dict(
            sources=(),
            every=0,
            samples=120,
            required_samples=200,
            seed=1,
            rows=64,
            max_new_tokens=32,
        )
        | settings
    )


def choose(arg, **tables):
    """Raises ValueError unless each named argument is a key of its table."""
    wrong = {name: table for name, table in tables.items() if arg[name] not in table}
    if wrong:
        raise ValueError(
            "; ".join(f"{name}={arg[name]!r} is none of {sorted(t)}" for name, t in wrong.items())
        )


def rates(vision=None, connector=None, llm=None, first=()):
    """Returns an lr table of the modules, `first` its first rows; None freezes.

    All encoders of a system (`vision`, `vision_2`, ...) have the rate of `vision`.
    """
    return (*first, ("vision[^/]*/.*", vision), ("connector/.*", connector), ("llm/.*", llm))


def adamw(**settings):
    """Returns AdamW, its rates rising over 3 % of the steps and falling as a cosine, unless told.

    Gradients are clipped at a global norm of 1, the default of the Trainer that most of these
    systems were trained with; no source that was read says so of any of them (unverified).
    """
    return (
        dict(
            name="adamw",
            moment_dtype="float32",
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            wd=0.0,
            clip="global_norm",
            clip_at=1.0,
            skip_above=0.0,
            schedule="cosine",
            warmup=0.03,
        )
        | settings
    )


def square(side, mode="pad", **fill):
    """Returns the strategy of one square view, for one encoder."""
    return (dict(name="square", side=side, mode=mode) | fill,)


# Template of captions alone, those of stage 1, by the template of conversations.
PLAIN = {
    "vicuna": "plain",
    "mistral": "plain",
    "llava_llama3": "plain_llama3",
    "vila_llama3": "plain_llama3",
    "llava_chatml": "plain_chatml",
    "qwen": "plain_chatml",
}
# Canvases of AnyRes in tiles, (width, height): the released ones, and those of anyres_max_N.
ANYRES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ANYRES_6X6 = tuple((i, j) for i in range(1, 7) for j in range(1, 7))


def anyres(side, grids=ANYRES, max_tiles=0):
    """Returns the strategy and the format of AnyRes pictures, for one encoder."""
    pinpoints = tuple((i * side, j * side) for i, j in grids)
    return dict(
        strategy=(dict(name="anyres", side=side, pinpoints=pinpoints),),
        format=(
            ("layout", "tiles"),
            ("unpad", "original"),
            ("newline", "row"),
            ("max_tiles", max_tiles),
        ),
    )


def recipe(
    name,
    arg,
    *,
    model,
    lr,
    picture,
    template,
    placeholder,
    batch,
    steps,
    tokens,
    views,
    per_row=2,
    length=None,
    optim=None,
    init=("vision", "llm"),
    video=None,
):
    """Returns the config, as a dict, of a stage of a system that sees pictures by a strategy.

    No slice was planned for these systems: whether one holds a size is for `aot` to say.

    Args:
      name: folder of its runs.
      arg: of `parse_arg`, with `stage` and `slice`.
      model: sections vision, connector, llm and what else a model has.
      lr: table.
      picture: settings of `data.picture.PictureConfig`.
      template: of conversations.
      placeholder: a token that stands where visual tokens go; its embedding is never read.
      batch: samples of a step. A row holds about `per_row` of them, so many rows a step has.
      steps: of the stage.
      tokens, views: slots of a row, see `DataConfig.budget`.
      length: most tokens of a sample; None = as many as a row has.
      optim: None = `adamw()`.
      init: modules whose weights stage 1 must be given, the others start at random; or the folder
        of the run that it goes on from.
      video: how frames are taken: settings of the processor.
    """
    stage, rows = arg["stage"], batch // per_row
    mesh, compute, accumulate = slice_preset(arg["slice"], rows)
    start = f"runs/{name}/stage{stage - 1}" if stage > 1 else _first(model, init)
    return dict(
        stage=stage,
        model=model | dict(compute=dict(dtype="bfloat16", **compute)),
        init=start,
        objective="sft",
        lr=lr,
        optim=optim or adamw(),
        processor=dict(
            template=template,
            image_token=placeholder,
            video_token=placeholder,
            max_length=length or tokens,
            picture=picture,
            **(video or {}),
        ),
        data=data(
            sources=(("json:annotations.jsonl", 1.0),),
            tokenizer="tokenizer",
            budget=(tokens, views),
        ),
        train=dict(
            steps=steps,
            rows=rows,
            accumulate=accumulate,
            seed=42,
            log_every=10,
            save_every=1000,
            keep=2,
            frozen_dtype="bfloat16",
        ),
        mesh=mesh,
        eval=evaluation(),
    )


def _first(model, init):
    """Returns what stage 1 starts from; "" stands for a directory that must be given."""
    if isinstance(init, str):
        return init
    towers = len(model["vision"]) if isinstance(model["vision"], tuple) else 1
    modules = ["connector", "llm", "vision", *(f"vision_{k}" for k in range(2, towers + 1))]
    return {m: "" if m.split("_")[0] in init else "random" for m in modules}


# Sizes of tiny variants, over those of the presets; what else a preset says stays.
TINY_VIT = dict(width=24, mlp=32, layers=5, heads=2, patch=6, side=4)
TINY_LLM = dict(vocab=832, width=32, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=8)
TINY_SIDE = TINY_VIT["side"] * TINY_VIT["patch"]  # pixels of a view
PICTURES = ("name", "digits", "ocr", "count", "where", "caption")


def tiny(c, *, vision=None, connector=None, llm=None, tasks=PICTURES, tokens=384, views=24):
    """Returns a recipe made small enough for a minute on two cores.

    Its structure, template, token format and what is frozen stay. It learns tasks of the demo with
    the demo's tokenizer, to which the control tokens it lacks are added behind its own, and starts
    at random: its decoder knows nothing, and no score means anything.

    Args:
      c: of `recipe`, with pictures of a size for `TINY_SIDE`.
      vision: sizes over `TINY_VIT`; for several encoders a tuple of all their sizes.
      connector, llm: sizes of the connector, and of the decoder over `TINY_LLM`.
      tasks: of the demo.
      tokens, views: of a row.
    """
    model, start = dict(c["model"]), None  # None: at random
    if isinstance(model["vision"], tuple):
        model["vision"] = tuple(a | b for a, b in zip(model["vision"], vision, strict=True))
    else:
        model["vision"] = model["vision"] | TINY_VIT | (vision or {})
    model["connector"] = model["connector"] | (connector or {})
    model["llm"] = model["llm"] | TINY_LLM | (llm or {})
    model["compute"] = dict(
        dtype="float32",
        remat="dots",
        attention="blockwise",
        vision_block=32,
        llm_block=64,
        loss_chunk=256,
    )
    if c["stage"] > 1:
        start = f"{c['init'].rpartition('/')[0]}_tiny/stage{c['stage'] - 1}"
    text = dict(image_token="<|image_pad|>", video_token="<|video_pad|>", max_length=tokens)
    other = dict(
        sources=tuple((f"demo:{task}", 1.0) for task in tasks),
        tokenizer="demo",
        budget=(tokens, views),
        pool=32,
    )
    small = dict(steps=200, rows=4, accumulate=1, save_every=100, frozen_dtype="float32")
    return c | dict(
        model=model,
        init=start,
        lr=tuple((path, None if peak is None else 1e-2) for path, peak in c["lr"]),
        optim=c["optim"] | dict(warmup=0.1),
        processor=c["processor"] | text,
        data=c["data"] | other,
        train=c["train"] | small,
        mesh=dict(data=-1, fsdp=1, seq=1, tensor=1),
    )
