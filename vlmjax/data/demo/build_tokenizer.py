"""Makes assets/tokenizer: a byte-level BPE of about 800 ids in the layout of Qwen2's tokenizer.

Words of the demo's templates are one token each, with and without a leading space; capital letters
and digits stay one token each, as OCR and timestamps want them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from vlmjax.data.demo.classes import COLORS, NAMES, PHOTOS, PLACES, SHOTS
from vlmjax.data.tokenizer import SPECIAL_TOKENS as SPECIAL

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "user assistant system stream Time what is this that which image video read the text digits "
    "count all list how many where describe chart bars highest lowest frames when at in it of on "
    "say see you first last letter word letters symbol element for name named plus and with big "
    "small images shows show find none new things picture objects left right top bottom center "
    "thing are there a s value time second number bar high largest smallest has written as places "
    "iron gold silver"
)
TEXT_CHARACTERS = 60_000


def corpus() -> list[str]:
    """Returns the texts the merges are learned from; only "Time" has a capital letter."""
    words = WORDS.split() + list(NAMES) + list(COLORS) + list(PHOTOS) + list(SHOTS)
    words += " ".join(PLACES).split()
    texts = []
    for word in dict.fromkeys(words):
        texts += [word, " " + word] * 2000
    plain = re.sub(r"[^a-z ,.\n'()-]+", " ", "".join(topics[k] for k in sorted(topics)).lower())
    texts.append(re.sub(r" +", " ", plain)[:TEXT_CHARACTERS])
    return texts + [",", ";", ":", " ~"] * 500


def build_tokenizer(folder: Path, size: int = 800) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size - len(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
