"""Processor of a model that was trained with vlmjax: conversations to the inputs of the model.

What it does to pictures and texts is the code of vlmjax itself, in the files `vlmjax_*.py` of this
directory, with the settings of `processor_config.json`.
"""

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

# transformers copies the files that lines of this form name, and those that they name.
from .vlmjax_batch import Budget, Form, TowerForm, UnitRule
from .vlmjax_bicubic import resize  # noqa: F401
from .vlmjax_chat import render
from .vlmjax_diffp import keep_masks  # noqa: F401
from .vlmjax_grounding import GROUNDING
from .vlmjax_pack import pack, size
from .vlmjax_processor import Processor, ProcessorConfig
from .vlmjax_tokenizer import Tokenizer
from .vlmjax_units import view_maps  # noqa: F401
from .vlmjax_video import av


class VLMJaxProcessor(ProcessorMixin):
    """Tokenizer, chat template, and what becomes of pictures."""

    def __init__(self, tokenizer=None, vlmjax=None, form=None, chat_template=None):
        """Makes it.

        Args:
          tokenizer: of transformers.
          vlmjax: settings, those of `vlmjax_processor.ProcessorConfig`.
          form: what the model takes, a `vlmjax_batch.Form` as nested dicts.
          chat_template: not used; the template is one of `vlmjax_templates.py`.
        """
        super().__init__(tokenizer, chat_template=chat_template)
        self.vlmjax, self.form = vlmjax, form
        towers = tuple(TowerForm(**tower) for tower in _frozen(form["towers"]))
        parts = _frozen(form) | {"towers": towers, "unit": UnitRule(**_frozen(form["unit"]))}
        self._form = Form(**parts)
        config = ProcessorConfig(**_frozen(vlmjax))
        self._host = Processor(config, Tokenizer(tokenizer), self._form)

    def __call__(self, conversation, add_generation_prompt=True, return_tensors="pt"):
        """Returns the inputs of the model for one conversation, or for a list of them.

        Rows are as long as the longest of them, padded at the left.

        Args:
          conversation: [{"role": "user", "content": [{"type": "image", "image": ...}, {"type":
            "text", "text": ...}]}, ...]; an image is a path, bytes, a PIL image or u8[h, w, 3].
          add_generation_prompt: whether an answer is to follow.
          return_tensors: "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is supported")
        samples = [self.sample(c, add_generation_prompt) for c in _several(conversation)]
        return BatchFeature(self._inputs(samples))

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        tokenize=False,
        return_dict=True,
        return_tensors="pt",
    ):
        """Returns the text of a conversation or of several, or the inputs of the model."""
        if chat_template is not None or (tokenize and not return_dict):
            raise ValueError(
                "chat_template and return_dict=False are not supported: the template is that of "
                "processor_config.json, and pictures need more inputs than tokens"
            )
        if tokenize:
            return self(conversation, add_generation_prompt, return_tensors)
        host = self._host
        how = (host.config.image_token, host.config.video_token, add_generation_prompt)
        how += (host.template, GROUNDING[host.config.grounding])
        texts = [render(_ours(c), *how) for c in _several(conversation)]
        return texts[0] if isinstance(conversation[0], dict) else texts

    def sample(self, messages, add_generation_prompt=True):
        """Returns the `vlmjax_sample.Sample` of one conversation."""
        messages = _ours(messages)
        if av is None and any(p["type"] == "video" for p in _parts(messages)):
            raise ImportError("videos are decoded by PyAV, which is missing: pip install av")
        if add_generation_prompt:
            return self._host.prompt(messages)
        return self._host({"id": "conversation", "messages": messages})

    def _inputs(self, samples):
        form, budget = self._form, self._budget(samples)
        batch, _ = pack([[s] for s in samples], budget, form)
        lengths = [len(s.tokens) for s in samples]
        pad = self.tokenizer.pad_token_id
        tokens = np.where(batch.segments > 0, batch.tokens, 0 if pad is None else pad)
        made = {
            "input_ids": _left(tokens, lengths).astype(np.int64),
            "attention_mask": _left(batch.segments > 0, lengths).astype(np.int64),
            "position_ids": _left(batch.positions, lengths).astype(np.int64),
        }
        if batch.has_vision:
            made["source"] = _left(batch.source, lengths)
            for e, patches in enumerate(batch.patches):
                made |= {f"{name}_{e}": x for name, x in patches._asdict().items()}
            for k, units in enumerate(batch.units):
                made |= {
                    f"units_{k}": units.index,
                    f"unit_weights_{k}": units.weights,
                    f"unit_sizes_{k}": units.size,
                }
            if batch.pool is not None:
                made |= {"pool_index": batch.pool.index, "pool_weights": batch.pool.weights}
        if batch.routed is not None:
            slots, shift = batch.routed.slots, budget.tokens - np.array(lengths)[:, None]
            made["routed_slots"] = np.where(slots >= 0, slots + shift, -1)
            made["routed_index"] = _left(batch.routed.index, lengths)
        return {
            k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in made.items() if x is not None
        }

    def _budget(self, samples):
        """Returns the slots of rows that each take one of the samples."""
        form, n = self._form, len(self._form.towers)
        least = Budget(1, (0,) * n, *((x,) * len(form.encoders) for x in (0, 1)))
        sizes = np.max([size(s, least) for s in samples], 0).tolist()
        shown = [s.placed() for s in samples if s.items]
        group = (
            [max(a.units[k].index.shape[1] for a in shown) for k in range(len(form.encoders))]
            if shown
            else least.group
        )
        pools = [a.pool.index.shape[1] for a in shown if a.pool is not None]
        pool = (sizes[-2], max(pools, default=0)) if form.pool != "none" else (0, 0)
        return Budget(sizes[0], sizes[1 : 1 + n], sizes[1 + n : -2], group, pool, sizes[-1])


def _left(x, lengths):
    """Returns rows [B, T] whose padding at the end has moved to the front."""
    return np.stack([np.roll(row, len(row) - n) for row, n in zip(x, lengths, strict=True)])


def _several(conversation):
    if not conversation:
        raise ValueError("the conversation is empty: give at least one message")
    return [conversation] if isinstance(conversation[0], dict) else list(conversation)


def _parts(messages):
    return [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]


def _ours(messages):
    """Returns messages with media under the name of their type, where others write "path"."""

    def part(p):
        kind = p.get("type")
        return {**p, kind: p["path"]} if kind in ("image", "video") and "path" in p else p

    return [
        m if isinstance(m["content"], str) else {**m, "content": [part(p) for p in m["content"]]}
        for m in messages
    ]


def _frozen(value):
    """Returns settings with tuples for the lists that JSON has in their place."""
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
