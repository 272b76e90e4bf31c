"""A run small enough for a test: six annotations, a byte tokenizer, a few thousand weights."""

import json

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vlmjax.data.tokenizer import byte_tokenizer


def annotations(folder, number=6):
    """Writes pictures of odd sizes and annotations.json: images, an image pair, text records."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        names = [f"{i}_{k}.png" for k in range(i % 3)]
        for name in names:
            size = (*rng.integers(16, 60, 2), 3)
            Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
        turns = [
            ("human", "<image>" * len(names) + f"What is it, {i}?"),
            ("gpt", f"Thing {i * 7}."),
        ]
        row = {"id": f"r{i}", "conversations": [{"from": a, "value": b} for a, b in turns]}
        rows.append(row | ({"image": names} if names else {}))
    (folder / "annotations.json").write_text(json.dumps(rows))
    return folder / "annotations.json"


def tiny_config(folder, **changes):
    """Returns the ConfigDict of a tiny run; changes are dotted paths with "__" for dots."""
    byte_tokenizer().save(folder / "tokenizer")
    c = ConfigDict()
    c.stage = 1
    c.model = dict(
        vision=dict(width=24, mlp=40, layers=2, heads=2, patch=8),
        connector=dict(layers=2),
        llm=dict(vocab=272, width=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8),
        compute=dict(vision_block=16, llm_block=32, loss_chunk=16),
    )
    c.init = None
    c.objective = "sft"
    c.lr = (("vision/.*", 1e-3), ("connector/.*", 1e-3), ("llm/.*", 1e-3))
    c.optim = dict(warmup=0.1)
    c.processor = dict(patch=8, min_visual_tokens=1, max_visual_tokens=60)
    c.data = dict(
        sources=((f"json:{annotations(folder)}", 1.0),),
        tokenizer=str(folder / "tokenizer"),
        budget=(160, 80, 80, 4),
        pool=8,
        media_root=str(folder),
    )
    c.train = dict(steps=6, rows=2, log_every=2, save_every=3, frozen_dtype="float32")
    c.mesh = dict(data=1, fsdp=1, seq=1, tensor=1)
    c.eval = dict()
    for path, value in changes.items():
        *parents, name = path.split("__")
        node = c
        for key in parents:
            node = node[key]
        node[name] = value
    return c
