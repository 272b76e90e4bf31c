"""The processor: one record -> one `Sample`, the same for training, evaluation and inference.

    processor = Processor(ProcessorConfig(), Tokenizer("path/to/model"))
    picture = {"type": "image", "image": "cat.jpg"}
    sample = processor({"id": "0", "messages": [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."}]})

Nothing is cut but where `overlong` says so, and that is counted: a record that does not fit its
budgets is a BadRecord with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmjax.batch import Form
from vlmjax.data import chat, diffp
from vlmjax.data.arrange import control_of
from vlmjax.data.derive import OWN, choose_template
from vlmjax.data.grounding import GROUNDING
from vlmjax.data.health import BadRecord
from vlmjax.data.media import Media, Medium, check_stream_frames, gather
from vlmjax.data.picture import PictureConfig, Show, place
from vlmjax.data.resize import RULES, Clip, blank, blank_rows, patch_rows
from vlmjax.data.sample import PRUNE, Item, Sample
from vlmjax.data.sampling import SAMPLERS
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.data.video_file import Limits


@dataclass(frozen=True)
class ProcessorConfig:
    """How records become samples; defaults are the released VideoLLaMA3 in its transformers layout.

    Attributes:
      patch: side of a patch in pixels.
      image_merge, video_merge: side of the window of patches that becomes one visual token.
      max_visual_tokens: budget before pruning, shared by all images and frames of a sample
        ("videollama3") or granted to each image and video ("transformers").
      min_visual_tokens: smallest size an image or frame is enlarged to.
      image_token, video_token: placeholders; the original layout uses "<image>" for both.
      fps, max_frames, frame_sampling: which frames of a video file are shown.
      video_deadline: seconds of computing that reading one video may take.
      compression: prune unchanged visual tokens of videos and streams (DiffFP).
      threshold, min_kept: of DiffFP.
      prune: "after_encoder" (VideoLLaMA3: the vision tower sees whole frames) or "before_encoder"
        (as in RLT, arXiv:2411.05222: it sees the patches of kept tokens only; their positions in
        the frame stay).
      resize: "videollama3" or "transformers".
      max_stream_frames: most frames of a stream.
      max_length: most tokens of a sample.
      overlong: what becomes of a conversation or stream that has more: "error", it cannot be used;
        or "cut_at_turns", its last rounds are left out, as many as it takes, and counted.
      template: of conversations, a key of `templates.TEMPLATES`, or "tokenizer" for what the
        chat template of the tokenizer renders.
      grounding: how boxes and spans of time are written, a key of `grounding.GROUNDING`.
      picture: settings of a `picture.PictureConfig` for models that do not see pictures in native
        size; merge sizes, budgets of visual tokens, resizing and DiffFP above do not count then.
    """

    patch: int = 14
    image_merge: int = 1
    video_merge: int = 2
    max_visual_tokens: int = 16384
    min_visual_tokens: int = 16
    image_token: str = "<|image_pad|>"
    video_token: str = "<|video_pad|>"
    fps: float = 1.0
    max_frames: int = 180
    frame_sampling: str = "last_of_second"
    video_deadline: float = 120.0
    compression: bool = True
    threshold: float = 0.1
    min_kept: int = 1
    prune: str = "after_encoder"
    resize: str = "videollama3"
    max_stream_frames: int = 400
    max_length: int = 32768
    overlong: str = "error"
    template: str = "videollama3"
    grounding: str = "videollama3"
    picture: dict | None = None

    def __post_init__(self):
        choices = ("resize", RULES), ("frame_sampling", SAMPLERS), ("prune", PRUNE)
        choices += (("overlong", ("error", "cut_at_turns")),)
        choices += ("template", (*TEMPLATES, OWN)), ("grounding", GROUNDING)
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {sorted(known)}")
        for name in (
            "patch",
            "image_merge",
            "video_merge",
            "max_visual_tokens",
            "max_frames",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, it must be at least 1: correct the config"
                )
        for name in ("fps", "video_deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, it must be above 0: correct the config"
                )


def control_tokens(config: ProcessorConfig) -> tuple[str, ...]:
    """Returns the control tokens that samples may hold and answers may end with."""
    template = TEMPLATES.get(config.template)  # the tokenizer knows those of its own
    spoken = (*template.controls, *template.stops) if template else ()
    formats = []
    if config.picture is not None:
        formats = [dict(config.picture.get(k, ())) for k in ("format", "frame_format")]
    shown = [token for form in formats for token in control_of(form)]
    placeholders = (config.image_token, config.video_token)
    marks = GROUNDING[config.grounding].controls
    return tuple(dict.fromkeys((*spoken, *placeholders, *shown, *marks)))


class Processor:
    """Turns records into samples; stateless but for the tokenizer's cache."""

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer, form: Form | None = None):
        """Makes it; `form`, that of the model, is needed where the config has `picture`."""
        self.config, self.tokenizer, self.form = config, tokenizer, form
        self.template = choose_template(config, tokenizer)
        for token in self.template.controls:
            if not token.startswith("<|stream"):
                tokenizer.id(token)
        self.show = None
        if config.picture is not None:
            if self.template.video != "whole":
                raise ValueError(
                    f"the template {config.template!r} shows the frames of videos one by one, as "
                    "pictures in native size are: remove `picture` or choose another template"
                )
            self.show = Show(PictureConfig(**dict(config.picture)), form)

    def __call__(self, record: dict, pixels: str = "decoded") -> Sample:
        """Returns the sample of a record {"id", "messages", ...}, answers trained.

        Args:
          record: see `data.sources`.
          pixels: "decoded", or "blank": only headers of its media are read. Every size is then as
            of the decoded sample before unchanged parts of videos are pruned.

        Raises:
          BadRecord: it cannot be used.
        """
        for key in ("id", "messages"):
            if key not in record:
                raise BadRecord(
                    "malformed", f"the record has keys {sorted(record)}, {key!r} is missing: add it"
                )
        name, found = str(record["id"]), self.gather(record["messages"])
        repairs = dict(record.get("repairs", {}))
        if found.dropped:
            repairs["dropped_messages"] = found.dropped
        if self.config.overlong == "cut_at_turns":
            kept, cut = chat.cut_at_turns(found.messages, lambda m: self._fits(found, m, name))
            repairs |= {"cut_messages": cut} if cut else {}
            found = found.first(len(kept))
        sample = self._sample(found, name, decode=pixels == "decoded")
        return replace(sample, repairs=repairs)

    def gather(self, messages) -> Media:
        """Returns what messages show; headers are read, nothing is decoded."""
        config = self.config
        chat.check_messages(messages)
        return gather(
            messages,
            max_frames=config.max_frames,
            max_stream_frames=config.max_stream_frames,
            overlong=config.overlong,
            fps=config.fps,
            sampling=config.frame_sampling,
            limits=Limits(deadline=config.video_deadline),
        )

    def _fits(self, found, messages, name):
        """Whether the first messages are within the limits, videos unpruned."""
        try:
            self._sample(found.first(len(messages)), name, decode=False)
        except BadRecord as error:
            if error.reason != "too_long":
                raise
            return False
        return True

    def prompt(self, messages: Sequence[dict]) -> Sample:
        """Returns the sample of messages that an answer is to follow; nothing is trained."""
        messages = chat.named_media(messages)
        chat.check_messages(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "the prompt ends with an assistant message: remove the answer that is to be "
                "generated"
            )
        return self._sample(self.gather(messages), "prompt", generation=True)

    def _sample(self, found: Media, name, generation=False, decode=True) -> Sample:
        messages, media = found.messages, found.media
        check_stream_frames(media, self.config.max_stream_frames)
        if self.show is not None:
            return self._shown(messages, media, name, generation, decode)
        sizes = self.sizes(media)
        make = self._items if decode else self._blank_items
        frames = [make(medium, size) for medium, size in zip(media, sizes, strict=True)]
        items = tuple(frames[medium][frame] for medium, frame in found.slots)
        pictures = [int(np.count_nonzero(item.keep)) for item in items]
        encoded = self.encode(messages, pictures, seed=name, generation=generation)
        self._check_length(name, encoded)
        return Sample(name, encoded.tokens, encoded.labels, items, encoded.visual)

    def _shown(self, messages, media, name, generation, decode):
        """Returns the sample of messages whose pictures are seen as the config's `picture` says."""
        images = sum(not m.is_video for m in media)

        def look(frames):
            return [self.show(frames(m), video=m.is_video, images=images) for m in media]

        seen = look(lambda m: [blank(m.height, m.width)] * len(m.sources))
        pieces = [s.arrangement.pieces for s in seen]
        encoded = self.encode(messages, pieces, seed=name, generation=generation)
        self._check_length(name, encoded)
        if decode:  # only what fits, one frame after another
            seen = look(Medium.frames)
        items = tuple(item for s in seen for item in s.items)
        placement = place(seen, encoded, self.form) if seen else None
        return Sample(name, encoded.tokens, encoded.labels, items, encoded.visual, placement)

    def encode(self, messages, pictures, seed, generation=False) -> chat.Encoded:
        """Returns checked messages as tokens, see `chat.encode`."""
        characters, most = chat.text_length(messages), self.config.max_length
        if characters > most * self.tokenizer.longest:  # to tokenise it would take long
            raise BadRecord(
                "too_long",
                f"record {seed!r} says {characters} characters, with tokens of at most "
                f"{self.tokenizer.longest} these are more than max_length = {most}: shorten it",
            )
        return chat.encode(
            messages,
            pictures,
            self.tokenizer,
            image_token=self.config.image_token,
            video_token=self.config.video_token,
            seed=seed,
            generation=generation,
            template=self.template,
            grounding=GROUNDING[self.config.grounding],
        )

    def _check_length(self, name, encoded):
        config, visual = self.config, int(encoded.visual.sum())
        fewer = "max_visual_tokens" if self.show is None else "the views of picture.strategy"
        if len(encoded.tokens) > config.max_length:
            raise BadRecord(
                "too_long",
                f"record {name!r} has {len(encoded.tokens)} tokens ({visual} visual), max_length "
                f"is {config.max_length}: shorten it, lower {fewer} or max_frames, or raise "
                "max_length",
            )

    def _merge(self, medium: Medium) -> int:
        return self.config.video_merge if medium.is_video else self.config.image_merge

    def sizes(self, media: list[Medium]) -> list[tuple[int, int]]:
        """Returns the resized (height, width) of each medium; ValueError over the budget."""
        if not media:
            return []
        config = self.config
        clips = [Clip(m.height, m.width, len(m.sources), self._merge(m)) for m in media]
        limits = dict(
            patch=config.patch,
            min_tokens=config.min_visual_tokens,
            max_tokens=config.max_visual_tokens,
        )
        sizes = RULES[config.resize](clips, **limits)
        counts = [
            clip.frames
            * (height // (config.patch * clip.merge))
            * (width // (config.patch * clip.merge))
            for clip, (height, width) in zip(clips, sizes, strict=True)
        ]
        needed = sum(counts) if config.resize == "videollama3" else max(counts)
        if needed > config.max_visual_tokens or not min(counts):
            shapes = ", ".join(
                f"{c.frames} x {c.width}x{c.height} -> {n} tokens"
                for c, n in zip(clips, counts, strict=True)
            )
            raise BadRecord(
                "too_long",
                f"visual tokens needed: {needed} ({shapes}), max_visual_tokens is "
                f"{config.max_visual_tokens} and every image needs at least 1: use fewer or less "
                "elongated images and frames, lower min_visual_tokens or raise max_visual_tokens",
            )
        return sizes

    def _blank_items(self, medium: Medium, size: tuple[int, int]) -> list[Item]:
        """What `_items` makes but for pixels, before pruning."""
        config, merge = self.config, self._merge(medium)
        rows, grid = blank_rows(size, config.patch), tuple(n // config.patch for n in size)
        whole = np.ones(len(rows) // merge**2, bool)
        return [Item(rows, grid, merge, whole, config.prune)] * len(medium.sources)

    def _items(self, medium: Medium, size: tuple[int, int]) -> list[Item]:
        config, merge = self.config, self._merge(medium)
        grid = (size[0] // config.patch, size[1] // config.patch)
        whole = np.ones(grid[0] * grid[1] // merge**2, bool)
        rows = [patch_rows(frame, size, config.patch, merge) for frame in medium.frames()]
        if medium.is_video and config.compression:
            masks = diffp.keep_masks(rows, merge, config.threshold, config.min_kept)
        else:
            masks = [whole] * len(rows)
        return [
            Item(r, grid, merge, mask, config.prune) for r, mask in zip(rows, masks, strict=True)
        ]
