"""The tokenizer: a thin wrapper of a transformers fast tokenizer, and a byte-level one for tests.

User text can never become a control token: `encode_text` encodes a literal "<|im_start|>" as
ordinary text pieces. `encode` is for trusted templates and recognises them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vlmjax.data.health import BadRecord

_CACHE_ENTRIES = 65536
_CACHE_LENGTH = 256  # longer texts rarely repeat
FIRST, NEVER = b'"prepend_scheme":"first"', '"prepend_scheme":"never"'
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|stream_start|>",
    "<|stream_end|>",
)


class Tokenizer:
    """Wraps a fast tokenizer, given as the object or as the directory that holds it.

    Attributes:
      hf: the tokenizer of transformers.
      longest: most characters that one token may stand for.
    """

    def __init__(self, source):
        if isinstance(source, (str, Path)):
            source = _load(Path(source))
        if not getattr(source, "is_fast", False):
            raise ValueError(
                f"{type(source).__name__} is not a fast tokenizer: give a directory with "
                "tokenizer.json or a "
                "transformers fast tokenizer"
            )
        self.hf = source
        self._backend = source.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._reserved = {i for i, token in source.added_tokens_decoder.items() if token.special}
        self._texts, self._plain = _inner(self._backend), None
        self._cache: dict[str, tuple[int, ...]] = {}
        # In a vocabulary of bytes a character stands for one.
        self.longest = max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def __reduce__(self):
        return Tokenizer, (self.hf,)

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.hf)

    def id(self, token: str) -> int:
        """Returns the id of one token given by name."""
        index = self._backend.token_to_id(token)
        if index is None:
            special = sorted(str(t) for t in self.hf.added_tokens_decoder.values())
            raise ValueError(
                f"the tokenizer has no token {token!r}; its added tokens are {special}: set the "
                "token name in the "
                "processor config or add the token to the tokenizer"
            )
        return index

    def add(self, tokens: Sequence[str]) -> None:
        """Gives control tokens that it lacks the ids behind its own."""
        from tokenizers import AddedToken

        new = [t for t in dict.fromkeys(tokens) if not self.has(t)]
        if new:
            made = [AddedToken(t, special=True, normalized=False) for t in new]
            self.hf.add_tokens(made, special_tokens=True)
            self.__init__(self.hf)

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides which ids a text becomes."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    @property
    def reserved(self) -> set[int]:
        """Ids of the special tokens, which text never becomes."""
        return self._reserved

    def has(self, token: str) -> bool:
        return self._backend.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a trusted text: special tokens are recognised, none are added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Returns the ids of untrusted text, in which a literal special token is only text.

        It is taken for a part of a longer one that a control token opens: where a tokenizer puts a
        space before the first word only, that is not here.
        """
        ids = self._cache.get(text)
        if ids is None:
            ids = self._encode_text(text)
            if len(text) <= _CACHE_LENGTH:
                if len(self._cache) >= _CACHE_ENTRIES:
                    self._cache.clear()
                self._cache[text] = ids
        return ids

    def _encode_text(self, text: str) -> tuple[int, ...]:
        try:
            ids = self._texts.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as e:  # half of a surrogate pair, as JSON may hold it
            raise BadRecord("malformed", f"text {text[:80]!r} is no Unicode: repair it") from e
        if self._reserved.isdisjoint(ids):
            return tuple(ids)
        if self._plain is None:
            self._plain = type(self._backend).from_str(self._texts.to_str())
            self._plain.encode_special_tokens = True
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self._reserved.isdisjoint(ids):
            raise BadRecord(
                "malformed",
                f"text {text[:80]!r} contains a special token that cannot be encoded as text: "
                "remove it",
            )
        return tuple(ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of the ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def render_chat(
        self, messages: Sequence[dict], generation: bool = False, jinja: str | None = None
    ) -> str:
        """Returns what a chat template says, the tokenizer's own where `jinja` gives none.

        Raises:
          ValueError: the template refuses the messages.
        """
        how = dict(tokenize=False, add_generation_prompt=generation, chat_template=jinja)
        try:
            return self.hf.apply_chat_template(list(messages), **how)
        except Exception as e:  # a template is a program: it may raise anything
            raise ValueError(
                f"the tokenizer's chat template refuses the roles {[m['role'] for m in messages]}: "
                f"{e}; choose another template"
            ) from e

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.hf.save_pretrained(str(directory))


def _inner(backend):
    """Returns what encodes texts that do not open a sequence."""
    before = backend.pre_tokenizer
    if before is None or FIRST not in before.__getstate__():
        return backend
    made = json.loads(backend.to_str())
    rule = json.dumps(made["pre_tokenizer"], separators=(",", ":"))
    made["pre_tokenizer"] = json.loads(rule.replace(FIRST.decode(), NEVER))
    return type(backend).from_str(json.dumps(made))


def _load(directory: Path):
    from transformers import (
        CONFIG_MAPPING,
        AutoTokenizer,
        PreTrainedConfig,
        PreTrainedTokenizerFast,
    )

    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise ValueError(
            f"{str(directory)!r} holds no tokenizer.json or vocab.json: give a tokenizer directory"
        )
    how = dict(trust_remote_code=False, local_files_only=True)
    model, reader = directory / "config.json", AutoTokenizer
    if model.is_file() and (directory / "tokenizer.json").is_file():
        # AutoTokenizer reads the config.json beside it, too: it fails for models that transformers
        # has no class for, and where their class does not load. It needs their kind only.
        kind, named = json.loads(model.read_text()).get("model_type"), {}
        if (settings := directory / "tokenizer_config.json").is_file():
            named = json.loads(settings.read_text())
        if kind not in CONFIG_MAPPING:
            reader = PreTrainedTokenizerFast
        elif named.get("tokenizer_class"):
            how["config"] = PreTrainedConfig()
            how["config"].model_type = kind
    return reader.from_pretrained(str(directory), **how)


def byte_tokenizer(special: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Returns a tokenizer of the 256 UTF-8 bytes (id = byte), then the special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend(
        models.BPE(vocab={char: byte for byte, char in _byte_alphabet().items()}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    named = {name: token for name, token in named.items() if token in special}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **named))


def _byte_alphabet() -> dict[int, str]:
    """Returns GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return alphabet | {byte: chr(256 + k) for k, byte in enumerate(others)}
