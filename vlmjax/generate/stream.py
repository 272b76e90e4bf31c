"""Streaming conversations: frames arrive one by one into one cache, the model waits or speaks.

    stream = vlm.stream(capacity=4096)
    stream.add_message("user", "Tell me when the light turns green.")
    for time, image in camera:
        answer = stream.add_frame(image, time)     None while the model keeps watching

The cache holds exactly the tokens of the whole conversation, as if it had been tokenised at once:
the messages are rendered by `data.chat`, and unchanged regions are pruned against the frame before
(DiffFP). No streaming code was released with VideoLLaMA3; the loop follows from its training
format, in which the token after a frame is <|stream_start|> (the next frame: wait) or <|im_start|>
(speak).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.batch import Budget
from vlmjax.data import chat
from vlmjax.data.diffp import next_mask
from vlmjax.data.image import load_image
from vlmjax.data.media import Medium
from vlmjax.data.pack import pack
from vlmjax.data.resize import patch_rows
from vlmjax.data.sample import Item, Sample
from vlmjax.generate.decode import LEAST_NEW, LEAST_PATCHES, LEAST_TOKENS, bucket, decode
from vlmjax.generate.sampling import GREEDY
from vlmjax.llm.decoder import init_cache
from vlmjax.nn import bind
from vlmjax.vlm import place_tokens

LEAST_CHUNK, CHUNK = 16, 256  # new tokens are fed in chunks of 16, 32, ... 256 slots


@functools.partial(jax.jit, static_argnames=("graphdef",))
def encode(graphdef, params, batch):
    """Returns the visual tokens [1, U, D] of a batch of one row."""
    return bind(graphdef, params).encode(batch).tokens


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def extend(graphdef, params, cache, tokens, source, visual, start, last):
    """Returns (f32[1, V] scores after the last real token, cache with a chunk appended).

    Slots after the last real token get leftovers, which the next chunk overwrites.

    Args:
      graphdef, params: of `nn.unbind`.
      cache: with room for T more slots; donated.
      tokens: i32[1, T].
      source: i32[1, T] index into the visual tokens, or -1 for text.
      visual: [1, U, D] or None.
      start: i32[] tokens in the cache.
      last: i32[] index of the last real token of the chunk.
    """
    model = bind(graphdef, params)
    x = model.llm.embed(tokens, jnp.dtype(model.cfg.compute.dtype))
    if visual is not None:
        x = place_tokens(x, visual, source)
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, cache = model.llm(x, positions, cache=cache)
    return model.llm.logits(hidden[:, last]), cache


class Stream:
    """A conversation that grows; made by `Chat.stream`.

    Attributes:
      tokens: list of the ids in the cache.
      scores: f32[V], the scores of the token that comes next.
      num_frames: frames seen.
    """

    def __init__(
        self,
        generator,
        processor,
        stop_ids,
        *,
        capacity,
        max_frames=None,
        max_new_tokens=64,
        sampling=GREEDY,
        seed=0,
    ):
        """Makes an empty stream.

        Args:
          generator: a `Generator`.
          processor: a `Processor` whose tokenizer has <|stream_start|> and <|stream_end|>.
          stop_ids: tokens that end an answer.
          capacity: most tokens of the whole stream.
          max_frames: most frames; the budget of visual tokens is shared by that many, as the
            processor shares it in a conversation with that many frames. None = any number, each as
            large as in a conversation that does not reach the budget.
          max_new_tokens: most tokens of an answer.
          sampling: a `SamplingConfig`.
          seed: of what is drawn.
        """
        if processor.show is not None:
            raise ValueError(
                "this processor has `picture`: its pictures are cut into views and their tokens "
                "arranged, which streams do not know; they show frames in native size, pruned "
                "against the one before. Use generate, or a system without `picture`"
            )
        limits = dict(capacity=capacity, max_frames=max_frames, max_new_tokens=max_new_tokens)
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 1; raise it")
        if generator.max_length is not None and capacity > generator.max_length:
            raise ValueError(
                f"capacity={capacity} is not allowed: the model takes at most "
                f"{generator.max_length} tokens; lower it"
            )
        self.generator, self.processor, self.tokenizer = generator, processor, processor.tokenizer
        self.capacity, self.max_frames, self.max_new_tokens = capacity, max_frames, max_new_tokens
        self.sampling, self.seed, self.stop_ids = sampling, seed, np.array(stop_ids, np.int32)
        self.tokens, self.num_frames, self.num_answers = [], 0, 0
        self._wait, self._speak = map(self.tokenizer.id, ("<|stream_start|>", "<|im_start|>"))
        self._previous = self._shape = self._size = self._logits = None
        dtype = jnp.dtype(generator.config.compute.dtype)
        # Padding of the last chunk may be written past the capacity.
        self._cache = init_cache(generator.config.llm, 1, capacity + CHUNK, dtype)

    @property
    def scores(self):
        if self._logits is None:
            raise ValueError(
                "the stream is empty, there is nothing to score: add a message or frame"
            )
        return np.asarray(self._logits[0])

    @property
    def margin(self):
        """Score of speaking minus score of waiting, after a frame."""
        scores = self.scores
        return float(scores[self._speak] - scores[self._wait])

    def add_message(self, role, text):
        """Appends a whole text message of a system, user or assistant."""
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"role {role!r} is not allowed: messages are of system, user or assistant; frames "
                "come with add_frame"
            )
        self._append(self._sample({"role": role, "content": text}))

    def add_frame(self, image, time):
        """Appends one frame; returns the answer of the assistant, or None if it waits.

        Args:
          image: PIL image, path, or u8[h, w, 3]; all frames of a stream have one size.
          time: seconds.
        """
        if self.max_frames is not None and self.num_frames == self.max_frames:
            raise ValueError(
                f"the stream has {self.num_frames} frames, max_frames is {self.max_frames}: start "
                "a new stream or raise max_frames"
            )
        item = self._item(np.asarray(load_image(image)))
        part = {"type": "image", "image": image, "time": time}
        self._append(self._sample({"role": "stream", "content": [part]}, item))
        self._previous, self.num_frames = item.patches, self.num_frames + 1
        return self.reply() if self.margin > 0 else None

    def reply(self):
        """Returns the text of an assistant message decoded now; it stays in the conversation."""
        encode_text = self.tokenizer.encode_text
        header = [self._speak, *encode_text("assistant\n")]
        footer = [self.tokenizer.id("<|im_end|>"), *encode_text("\n")]
        room = self.capacity - len(self.tokens) - len(header) - len(footer)
        if room < 1:
            raise ValueError(
                f"the stream has {len(self.tokens)} tokens and an answer takes at least "
                f"{len(header) + 1 + len(footer)} more, capacity is {self.capacity}: start a new "
                "stream or make one with more capacity"
            )
        self._feed(np.array(header, np.int32))
        answer, in_cache = self._decode(min(self.max_new_tokens, room))
        self.tokens += answer[:in_cache]
        self._feed(np.array(answer[in_cache:] + footer, np.int32))
        self.num_answers += 1
        return self.tokenizer.decode(answer)

    def _item(self, image):
        """Returns the `Item` of a decoded frame, pruned against the frame before."""
        config, shape = self.processor.config, image.shape[:2]
        if self._shape is None:
            frames = [image] * (self.max_frames or 1)
            (self._size,) = self.processor.sizes([Medium("stream", True, *shape, frames)])
            self._shape = shape
        if shape != self._shape:
            raise ValueError(
                f"frame {self.num_frames} is {shape[1]}x{shape[0]}, the first is "
                f"{self._shape[1]}x{self._shape[0]}: all frames of a stream must have one size"
            )
        merge = config.video_merge
        patches = patch_rows(image, self._size, config.patch, merge)
        previous = self._previous if config.compression else None
        keep = next_mask(previous, patches, merge, config.threshold, config.min_kept)
        grid = self._size[0] // config.patch, self._size[1] // config.patch
        return Item(patches, grid, merge, keep, config.prune)

    def _sample(self, message, item=None):
        """Returns the `Sample` of one message, as it is in the whole conversation."""
        items = () if item is None else (item,)
        chat.check_messages([message])
        pictures = [int(np.count_nonzero(i.keep)) for i in items]
        encoded = self.processor.encode([message], pictures, seed=None)
        return Sample("stream", encoded.tokens, encoded.labels, items, encoded.visual)

    def _append(self, sample):
        """Feeds a message, its frame encoded first; ValueError and no change if it does not fit."""
        n = len(sample.tokens)
        if len(self.tokens) + n > self.capacity:
            raise ValueError(
                f"the stream has {len(self.tokens)} tokens and the message {n} "
                f"({int(sample.visual.sum())} visual), capacity is {self.capacity}: start a new "
                "stream or make one with more capacity"
            )
        if not sample.visual.any():
            return self._feed(sample.tokens)
        (item,), generator = sample.items, self.generator
        tokens = bucket(n + int((~item.keep).sum()), LEAST_TOKENS)  # the same for every frame
        patches = bucket(item.num_encoded, LEAST_PATCHES)
        budget = Budget(tokens, patches, tokens, max(4, item.merge**2))
        batch, _ = pack([[sample]], budget, generator.config.form)
        generator.programs.add(("encode", budget))
        visual = encode(generator.graphdef, generator.params, batch)
        return self._feed(sample.tokens, batch.source[0, :n], visual)

    def _feed(self, tokens, source=None, visual=None):
        """Appends tokens to the cache, chunk by chunk."""
        generator = self.generator
        for at in range(0, len(tokens), CHUNK):
            piece = tokens[at : at + CHUNK]
            pad = (0, bucket(len(piece), LEAST_CHUNK) - len(piece))
            if source is not None:
                places = np.pad(source[at : at + CHUNK], pad, constant_values=-1)[None]
            chunk = np.pad(piece, pad)[None]
            slots = 0 if visual is None else visual.shape[1]
            generator.programs.add(("extend", chunk.shape[1], self._cache[0].shape[2], slots))
            self._logits, self._cache = extend(
                generator.graphdef,
                generator.params,
                self._cache,
                chunk,
                None if source is None else places,
                visual,
                np.int32(len(self.tokens)),
                np.int32(len(piece) - 1),
            )
            self.tokens += piece.tolist()

    def _decode(self, limit):
        """Returns (answer ids, how many of them are in the cache already)."""
        generator = self.generator
        done = decode(
            generator.graphdef,
            generator.params,
            self._cache,
            self._logits,
            np.array([len(self.tokens)], np.int32),
            np.array([self.num_answers], np.int32),
            np.int32(self.seed),
            self.stop_ids,
            np.int32(limit),
            new=bucket(self.max_new_tokens, LEAST_NEW),
            sampling=self.sampling,
        )
        self._cache = done.cache
        answer = np.asarray(done.tokens)[0, : int(done.counts[0])].tolist()
        return answer, len(answer) if bool(done.stopped[0]) else len(answer) - 1
