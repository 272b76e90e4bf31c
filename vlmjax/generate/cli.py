"""The `generate` command: one answer about images, videos or text.

python -m vlmjax.main generate --model DIR --image a.png --image b.png --prompt "Compare them."
"""

from pathlib import Path

from vlmjax.generate.chat import Chat

# (kind of absl flag, name, default, help) of what `run` takes.
FLAGS = (
    ("string", "model", None, "directory of a Hugging Face model, or the workdir of a run"),
    ("multi_string", "image", [], "image file; repeat for several"),
    ("multi_string", "video", [], "video file; repeat for several"),
    ("string", "prompt", "", "what to ask"),
    ("string", "system", None, "system message"),
    ("integer", "max_new_tokens", 256, "most tokens of the answer"),
    ("float", "temperature", 0.0, "of sampling; 0 takes the best token"),
    ("integer", "top_k", 0, "sample from the k best tokens; 0 = all"),
    ("float", "top_p", 1.0, "sample from the best tokens that have this probability together"),
    ("float", "repetition_penalty", 1.0, "on generated tokens; 1 = none"),
    ("integer", "seed", 0, "of sampling"),
    ("string", "dtype", None, "float32 or bfloat16, for a Hugging Face model; default: as stored"),
)


def load(directory, dtype=None):
    """Returns the `Chat` of a Hugging Face directory or of a run's work directory."""
    if (Path(directory) / "checkpoints").is_dir():
        if dtype is not None:
            raise ValueError(
                f"dtype={dtype} is not allowed: {directory} is a run, which computes as its config "
                "says; leave it out, or export the run first"
            )
        return Chat.from_run(directory)
    return Chat.from_pretrained(directory, dtype)


def messages_of(images=(), videos=(), prompt="", system=None):
    """Returns the messages of a question about media."""
    if not (images or videos or prompt):
        raise ValueError("nothing to answer: give --prompt, --image or --video")
    content = [{"type": "image", "image": path} for path in images]
    content += [{"type": "video", "video": path} for path in videos]
    content += [{"type": "text", "text": prompt}] if prompt else []
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": content}]


def run(
    model,
    image=(),
    video=(),
    prompt="",
    system=None,
    max_new_tokens=256,
    seed=0,
    dtype=None,
    **sampling,
):
    """Returns the answer of a model.

    Args:
      model: directory of a Hugging Face model, or the work directory of a run.
      image, video: files.
      prompt: text of the user.
      system: text of the system message.
      max_new_tokens: most tokens of the answer.
      seed: of sampling.
      dtype: "float32", "bfloat16", or None for what is stored.
      sampling: fields of `SamplingConfig`.
    """
    messages = messages_of(image, video, prompt, system)
    return load(model, dtype).generate(messages, max_new_tokens, seed, **sampling)
