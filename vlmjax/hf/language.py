"""A decoder from the checkpoint of the language model that it grows out of.

Three things the decoder of a vision-language model may have which that model lacks: rows of the
vocabulary for tokens of its own, a visual expert in each layer (CogVLM starts it as a copy of the
language weights) and blocks of SVA between layers (which nothing can stand for).
"""

import dataclasses

import numpy as np

from vlmjax.hf import remote
from vlmjax.hf.decoders import EMBED, KINDS, find_kind
from vlmjax.hf.systems import LAYOUTS, find_layout
from vlmjax.hf.tensors import TensorDirectory
from vlmjax.hf.weights import load_module
from vlmjax.vlm import VLMConfig


def load_decoder(directory, cfg: VLMConfig, dtype=None) -> tuple[dict, list[str]]:
    """The parameters under "llm", and in words what of them the checkpoint did not hold.

    Blocks of SVA that it does not hold are absent.

    Args:
      directory: in any layout that holds a decoder.
      cfg: of the whole model.
      dtype: as in `weights.load_module`.
    """
    lacking = {} if remote.is_remote(directory) else _lacking(directory, cfg)
    plain = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, **lacking))
    params, notes = load_module("llm", directory, plain, dtype), []
    if "vocab" in lacking:
        params["embed"]["embedding"] = _longer(params["embed"]["embedding"], 0, cfg.llm.vocab)
        if "head" in params:
            params["head"]["kernel"] = _longer(params["head"]["kernel"], 1, cfg.llm.vocab)
        added = cfg.llm.vocab - lacking["vocab"]
        notes.append(f"{added} rows of the vocabulary are the mean of the {lacking['vocab']} there")
    if "expert" in lacking:
        params["blocks"]["expert"] = _expert(params["blocks"])
        notes.append("the visual expert is a copy of the language weights")
    if "extra_num" in lacking:
        notes.append(f"{cfg.llm.extra_num} blocks of SVA between layers start at random")
    return params, notes


def _lacking(directory, cfg: VLMConfig) -> dict:
    """Fields of the decoder's configuration that the checkpoint has other values of."""
    tensors = TensorDirectory(directory)
    layout = LAYOUTS[find_layout(tensors)]
    if "llm" not in layout.prefixes:
        return {}  # `load_module` says what there is
    lacking, prefix = {}, layout.prefixes["llm"]
    kind = KINDS[find_kind(tensors, prefix)]
    if cfg.llm.extra_num and not layout.extra:
        lacking["extra_num"] = 0
    if cfg.llm.expert != "none" and "expert" not in kind.options:
        lacking["expert"] = "none"
    key = next(prefix + key for path, key, _ in kind.rows if path == EMBED[0])
    if key in tensors and tensors.shape(key)[0] < cfg.llm.vocab:
        lacking["vocab"] = tensors.shape(key)[0]
    return lacking


def _longer(table: np.ndarray, axis: int, number: int) -> np.ndarray:
    """A table whose new entries along an axis are the mean of those there."""
    mean = table.mean(axis, keepdims=True, dtype=np.float32).astype(table.dtype)
    return np.concatenate([table, mean.repeat(number - table.shape[axis], axis)], axis)


def _expert(blocks: dict) -> dict:
    """The weights of a second set like the first, with biases of queries, keys and values."""
    attn = {name: {"kernel": blocks["attn"][name]["kernel"]} for name in "qkvo"}
    for name in "qkv":
        layers, _, *heads = attn[name]["kernel"].shape
        none = np.zeros((layers, *heads), attn[name]["kernel"].dtype)
        attn[name]["bias"] = blocks["attn"][name].get("bias", none)
    mlp = {name: {"kernel": blocks["mlp"][name]["kernel"]} for name in ("gate", "up", "down")}
    return {"attn": attn, "mlp": mlp}
