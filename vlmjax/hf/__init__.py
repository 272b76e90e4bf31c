"""Hugging Face directories: configs, weights and processors from them, whole models to them."""

from vlmjax.hf.config import read_config, read_max_position, read_module_config
from vlmjax.hf.export import save_pretrained
from vlmjax.hf.language import load_decoder
from vlmjax.hf.processor import load_processor
from vlmjax.hf.weights import load_module, load_params

__all__ = [
    "load_decoder",
    "load_module",
    "load_params",
    "load_processor",
    "read_config",
    "read_max_position",
    "read_module_config",
    "save_pretrained",
]
