"""A directory that transformers loads with `trust_remote_code`, for any model we can train.

It carries its own code: the torch model of `hf/template/` and, for pictures and texts, our host
modules as they are, under names of their own and with relative imports. All of it lies flat in the
directory, which is where transformers looks for it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from vlmjax.data.derive import choose_template
from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import remote
from vlmjax.hf.processor import OURS, PROCESSOR, write_tokenizer
from vlmjax.hf.tensors import MAX_SHARD_SIZE, write_tensors
from vlmjax.hf.weights import table_tensors
from vlmjax.vlm import VLMConfig

PACKAGE = Path(__file__).parents[1]
TEMPLATE = Path(__file__).parent / "template"
HOST = ("data/processor.py", "data/pack.py")  # and what these import
MODEL, PROCESS = "modeling_vlmjax.VLMJaxForConditionalGeneration", "processing_vlmjax"
AUTO_MAP = {
    "AutoConfig": "configuration_vlmjax.VLMJaxConfig",
    "AutoModelForCausalLM": MODEL,
    "AutoModelForImageTextToText": MODEL,
}
# In place of `import av`, without which pictures are read all the same.
OPTIONAL = """try:
    import av
except ImportError:
    av = None  # the processor asks for it when a video comes"""

NOTE = (
    "{directory} carries its own code, because transformers has no class for such models: load it "
    "with AutoModelForCausalLM and AutoProcessor and trust_remote_code=True."
)

CARD = """---
{front}
---

# {name}

A vision-language model trained with vlmjax: {parameters:,} parameters, {dtype}.

| part | what it is |
|---|---|
{table}

transformers has no class for such models, so the directory carries its own code, in torch, and
`trust_remote_code=True` is needed: read the `.py` files before you run them. They need torch,
numpy, Pillow and transformers, and PyAV for videos.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
image = {{"type": "image", "image": "picture.png"}}
question = {{"type": "text", "text": "What is this?"}}
inputs = processor([{{"role": "user", "content": [image, question]}}]).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`vlmjax.from_pretrained("{name}")` loads it in JAX, with the same parameters bit for bit.
`config.json` describes the architecture under `model`, `processor_config.json` what becomes of
pictures and texts under `vlmjax`.
"""


def save(
    out_dir,
    cfg: VLMConfig,
    params: Mapping,
    tokenizer: Tokenizer,
    processor_config: ProcessorConfig,
    dtype=None,
    generation: Mapping | None = None,
    model_name: str | None = None,
    card: Mapping | None = None,
    max_position: int = 32768,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Writes the directory and prints that it needs trust_remote_code.

    The arguments are those of `hf.save_pretrained`.
    """
    out_dir = Path(out_dir)
    if tokenizer.size > cfg.llm.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens and the embedding {cfg.llm.vocab} rows; "
            "every token needs a row; export with the tokenizer the model was trained with"
        )
    tensors = table_tensors(remote.rows(cfg), params, dtype)
    kinds = sorted({t.dtype.name for t in tensors})
    write_tensors(out_dir, tensors, max_shard_size)
    stops = choose_template(processor_config, tokenizer).stops
    stops = [tokenizer.id(token) for token in stops if tokenizer.has(token)]
    pad = tokenizer.hf.pad_token_id
    ids = {"eos_token_id": stops, "pad_token_id": (stops or [0])[0] if pad is None else pad}
    ids = ids if stops else {"pad_token_id": ids["pad_token_id"]}
    config = {
        "architectures": [MODEL.split(".")[1]],
        "model_type": remote.KIND,
        "auto_map": AUTO_MAP | {"AutoProcessor": f"{PROCESS}.VLMJaxProcessor"},
        "dtype": kinds[0] if len(kinds) == 1 else "float32",
        "max_position_embeddings": max_position,
        "model": remote.describe(cfg),
        **ids,
    }
    _write(out_dir / remote.CONFIG, config)
    _write(out_dir / "generation_config.json", ids | dict(generation or {"do_sample": False}))
    write_processor(out_dir, cfg, tokenizer, processor_config)
    for name, text in code().items():
        (out_dir / name).write_text(text)
    facts = {"parameters": sum(t.size for t in tensors), "dtype": " and ".join(kinds)}
    name = model_name or out_dir.resolve().name
    (out_dir / "README.md").write_text(_card(name, facts, config["model"], card or {}))
    print(NOTE.format(directory=out_dir))
    return out_dir


def write_processor(out_dir, cfg: VLMConfig, tokenizer: Tokenizer, config: ProcessorConfig):
    """Writes the tokenizer and processor_config.json."""
    name = {"processor_class": "VLMJaxProcessor"}
    write_tokenizer(out_dir, tokenizer, name)
    ours = {OURS: dataclasses.asdict(config), "form": dataclasses.asdict(cfg.form)}
    auto = {"auto_map": {"AutoProcessor": f"{PROCESS}.VLMJaxProcessor"}}
    _write(out_dir / PROCESSOR, name | auto | ours)


def code() -> dict[str, str]:
    """Returns the Python files of a directory by name."""
    files = {file.name: file.read_text() for file in sorted(TEMPLATE.glob("*.py"))}
    todo = list(HOST)
    while todo:
        file = PACKAGE / todo.pop()
        name = f"vlmjax_{file.stem}.py"
        if name not in files:
            files[name], needed = relocated(file.read_text())
            todo += needed
    return files


def relocated(text: str) -> tuple[str, list[str]]:
    """Returns a host module with relative imports, and the files of the package that it imports."""
    needed = []

    def one(match):
        module, names = match.groups()
        needed.append(f"{module.replace('.', '/')}.py")
        return f"from .vlmjax_{module.split('.')[-1]} import {names}"

    def modules(match):
        folder = (match[1] or "").replace(".", "/").strip("/")
        names = [name.strip() for name in match[2].split(",")]
        needed.extend(f"{folder}/{name}.py".lstrip("/") for name in names)
        return "from . import " + ", ".join(f"vlmjax_{name} as {name}" for name in names)

    text = re.sub(r"^from vlmjax\.(data\.\w+|batch) import (.*)$", one, text, flags=re.M)
    text = re.sub(r"^from vlmjax(\.data)? import ([\w, ]+)$", modules, text, flags=re.M)
    text = re.sub(r"^import av$", OPTIONAL, text, flags=re.M)
    left = re.findall(r"^\s*(?:from|import) vlmjax\b.*$", text, flags=re.M)
    assert not left, f"imports that no rule makes relative: {left}"
    return text, needed


def _card(name: str, facts: dict, model: dict, more: Mapping) -> str:
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmjax", "custom_code"],
        **more,
    }
    towers = model["vision"] if isinstance(model["vision"], list) else [model["vision"]]
    parts = [("vision tower", tower) for tower in towers if tower]
    parts += [("connector", model["connector"])] if model["connector"] else []
    table = [
        f"| {part} | {_words(entries)} |" for part, entries in [*parts, ("decoder", model["llm"])]
    ]
    return CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        name=name,
        table="\n".join(table),
        **facts,
    )


def _words(entries: dict) -> str:
    """Sizes and kinds in words; what is absent or empty is not told."""
    kind = entries.get("type")
    told = [
        f"{k} {v}" for k, v in entries.items() if k != "type" and v not in ("none", "", 0, (), [])
    ]
    shown = [x for x in told if not x.startswith(("mean", "std", "rope_short", "rope_long"))]
    return ", ".join([*([kind] if kind else []), *shown])


def _write(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
