"""The demo's data: small tasks made on the fly from real icons, digits, words, tables and clips.

source = DemoSource("ocr", "train", seed=0);  source[7] is a record, the same on every machine
DemoSource("ocr_as_text", "train") gives the same records with each picture replaced by its words.
"""

from vlmjax.data.demo.source import TASKS, TOKENIZER, DemoSource, as_text
from vlmjax.data.demo.task import Task

__all__ = ["TASKS", "TOKENIZER", "DemoSource", "Task", "as_text"]
