"""What a user of transformers does with exported directories; run with no vlmjax to import.

python remote_run.py FOLDER: FOLDER holds models and, for each, NAME.json, the conversations to
answer; NAME.npz is written with the scores of each, alone and together, and greedy answers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
import torchvision_shim

sys.modules["av"] = None  # only videos need it
sys.modules["numba"] = None  # makes resizing fast, no more
torchvision_shim.install()
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

NEW = 10
torch.set_num_threads(1)  # for a handful of weights


def run(folder, name):
    how = dict(trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto", **how).eval()
    processor = AutoProcessor.from_pretrained(folder / name, **how)
    chats = json.loads((folder / f"{name}.json").read_text())
    found = {}
    with torch.inference_mode():
        for k, chat in enumerate(chats):
            inputs = processor(chat)
            found[f"tokens_{k}"] = inputs["input_ids"][0]
            found[f"logits_{k}"] = model(**inputs).logits[0]
            found[f"answer_{k}"] = answer(model, inputs)[0]
        together = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        logits = model(**together).logits
        for k in range(len(chats)):
            found[f"together_{k}"] = logits[k][together["attention_mask"][k].bool()]
        found["answers"] = answer(model, together)
        found["uncached"] = answer(model, inputs, use_cache=False)[0]
    np.savez(folder / f"{name}.npz", **{k: v.numpy() for k, v in found.items()})
    return model, processor


def answer(model, inputs, **how):
    """Greedy tokens, no end of an answer."""
    how = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0) | how
    return model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]


def refusals(model, inputs):
    for name, wrong in (("pictures", inputs["input_ids"]), ("coords_0", inputs["coords_0"].half())):
        try:
            model(**(inputs | {name: wrong}))
        except ValueError as error:
            assert name in str(error), error
        else:
            raise AssertionError(name)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for file in sorted(folder.glob("*.json")):
        model, processor = run(folder, file.stem)
    inputs = dict(processor(json.loads(file.read_text())[0]))
    refusals(model, inputs)
    # Saved again by transformers and loaded as the other class.
    model.save_pretrained(folder / "again")
    processor.save_pretrained(folder / "again")
    again = AutoModelForImageTextToText.from_pretrained(folder / "again", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder / "again", trust_remote_code=True)
    inputs = processor(json.loads(file.read_text())[0])
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not [name for name in sys.modules if name.split(".")[0] in ("vlmjax", "jax")]
