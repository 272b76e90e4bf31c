"""Talks with a model: the object of `vlmjax.from_pretrained`.

vlm = vlmjax.from_pretrained("path/to/model")
picture = {"type": "image", "image": "cat.jpg"}
vlm.generate([{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}])
"""

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from vlmjax import build, checkpoint, hf
from vlmjax.data.chat import named_media
from vlmjax.data.processor import Processor
from vlmjax.generate.decode import Generator
from vlmjax.generate.sampling import SamplingConfig
from vlmjax.generate.stream import Stream
from vlmjax.nn import unflatten


class Chat:
    """A model with its tokenizer and processor.

    Attributes:
      config: the `VLMConfig`.
      params: nested dict of arrays.
      processor: makes samples of messages.
      generator: the `Generator` that runs the model.
      max_length: most tokens of a conversation.
      stop_ids: tokens that end an answer.
    """

    def __init__(self, config, params, processor, max_length=None, rows=64):
        """Makes it.

        Args:
          config: a `VLMConfig`.
          params: nested dict of arrays.
          processor: a `Processor`.
          max_length: most tokens of a conversation; None = what the processor allows.
          rows: most prompts that run together.
        """
        allowed = processor.config.max_length
        self.max_length = min(max_length or allowed, allowed)
        self.generator = Generator(config, params, rows, self.max_length)
        self.config, self.params = config, self.generator.params
        self.processor, self.tokenizer = processor, processor.tokenizer
        stops = processor.template.stops
        self.stop_ids = [self.tokenizer.id(t) for t in stops if self.tokenizer.has(t)]

    @classmethod
    def from_pretrained(cls, hf_dir, dtype=None, template=None):
        """Returns the model of a Hugging Face directory, in any layout that `vlmjax.hf` reads.

        Args:
          hf_dir: the directory.
          dtype: "float32" or "bfloat16", of weights and computation; None = as stored.
          template: of conversations, a key of `data.templates.TEMPLATES`; None = that of the
            checkpoint, see `hf.load_processor`.
        """
        config = hf.read_config(hf_dir)
        params = hf.load_params(hf_dir, config, dtype)
        stored = str(params["llm"]["embed"]["embedding"].dtype)
        kind = "bfloat16" if stored == "bfloat16" else "float32"
        compute = dataclasses.replace(config.compute, dtype=kind)
        tokenizer, settings = hf.load_processor(hf_dir, template)
        processor = Processor(settings, tokenizer, config.form)
        config = dataclasses.replace(config, compute=compute)
        return cls(config, params, processor, hf.read_max_position(hf_dir))

    @classmethod
    def from_run(cls, workdir, config=None, rows=64):
        """Returns the model of the newest checkpoint of a training run.

        Args:
          workdir: the run.
          config: ConfigDict to use; None = the one the run was started with.
          rows: most prompts that run together.
        """
        if config is None:
            file = Path(workdir) / "config.json"
            if not file.is_file():
                raise ValueError(
                    f"{workdir} has no config.json: give the --workdir of a `vlmjax.main train` run"
                )
            config = ConfigDict(json.loads(file.read_text()))
        run = build.resolve(config)
        params, _ = checkpoint.restore_params(workdir)
        tokenizer = build.make_tokenizer(run)
        processor = Processor(run.processor, tokenizer, run.model.form)
        return cls(run.model, unflatten(params), processor, rows=rows)

    def logits(self, messages):
        """Returns f32[T, V]: the scores of what follows each token of a conversation."""
        record = {"id": "conversation", "messages": named_media(messages)}
        return self.generator.logits(self.processor(record))

    def generate(self, messages, max_new_tokens=64, seed=0, **sampling):
        """Returns the text of the assistant's next message.

        Args:
          messages: a conversation as transformers takes it, or a list of conversations, which gives
            a list of texts.
          max_new_tokens: most tokens of an answer.
          seed: of what is drawn.
          sampling: fields of `SamplingConfig`; greedy when absent.
        """
        if not isinstance(messages, (list, tuple)):
            raise ValueError(
                f"messages are a {type(messages).__name__}: give a conversation, a list such as "
                "[{'role': 'user', 'content': 'hi'}], or a list of conversations"
            )
        many = bool(messages) and not isinstance(messages[0], dict)
        samples = [self.processor.prompt(m) for m in (messages if many else [messages])]
        texts = [
            self.tokenizer.decode(completion.tokens)
            for completion in self.generator.generate_samples(
                samples, max_new_tokens, make_sampling(sampling), self.stop_ids, seed
            )
        ]
        return texts if many else texts[0]

    def stream(self, capacity=None, max_frames=None, max_new_tokens=64, seed=0, **sampling):
        """Returns a `Stream`, a conversation whose frames arrive one by one.

        Args:
          capacity: most tokens of the whole stream; None = `max_length`.
          max_frames: most frames; the budget of visual tokens is shared by that many. None = any
            number, each as large as in a conversation that does not reach the budget.
          max_new_tokens: most tokens of an answer.
          seed: of what is drawn.
          sampling: fields of `SamplingConfig`; greedy when absent.
        """
        return Stream(
            self.generator,
            self.processor,
            self.stop_ids,
            capacity=self.max_length if capacity is None else capacity,
            max_frames=max_frames,
            max_new_tokens=max_new_tokens,
            sampling=make_sampling(sampling),
            seed=seed,
        )

    def save_pretrained(self, out_dir, **options):
        """Writes a directory that transformers loads; `options` are of `hf.save_pretrained`."""
        options = {"max_position": self.max_length} | options
        parts = self.config, self.params, self.tokenizer, self.processor.config
        return hf.save_pretrained(out_dir, *parts, **options)


from_pretrained = Chat.from_pretrained


def make_sampling(values):
    """Returns the `SamplingConfig` of keyword arguments; ValueError naming unknown ones."""
    known = [f.name for f in dataclasses.fields(SamplingConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown sampling options {unknown}; known are {known}; rename them")
    return SamplingConfig(**values)
