"""Scores a model of the demo on held-out records, by generation, against chance and wrong pictures.

python -m vlmjax.main eval --config configs/demo.py:stage=4 --workdir runs/demo/stage4 \
    --output runs/demo
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmjax import build
from vlmjax.batch import Budget
from vlmjax.data.demo import TASKS, DemoSource
from vlmjax.evals import pictures, report, scores
from vlmjax.evals.loss import mean_loss
from vlmjax.evals.swap import media, swap_media
from vlmjax.generate.chat import Chat

REQUIRED = ("name", "digits", "ocr", "video")
_SLOTS, _ROWS = 512, 4  # tokens, patches and visual tokens of a packed row; rows
_STREAM_TOKENS = 8  # of an answer in a stream, which is a word


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a model did on one task.

    Attributes:
      scores: f64[n], 0 to 1 each.
      wrong_scores: f64[n] with another record's media, None for a task without media.
      chance: score of the best answer that does not depend on the picture.
      loss, wrong_loss: nats per supervised token, teacher forced.
      records, samples, predictions: n records, their `Sample`s, and what the model said.
    """

    task: str
    scores: np.ndarray
    wrong_scores: np.ndarray | None
    chance: float
    loss: float
    wrong_loss: float | None
    records: list
    samples: list
    predictions: list


def is_demo(config):
    """Returns whether a config trains on the demo and names no other held-out sources."""
    run = build.resolve(config)
    sources = [source.spec for source in run.data.mixed]
    return all(s.startswith("demo:") for s in sources) and not run.eval.sources


def run(config, workdir, output, export_dir=None):
    """Returns the report of a run of the demo; writes report.json, report.md and samples.png.

    Args:
      config: ConfigDict of the run.
      workdir: the run, for its newest checkpoint; the stages beside it are listed in the report.
      output: folder of the report.
      export_dir: Hugging Face directory that the report names; None = "hf" in the output folder if
        there is one.
    """
    settings = build.resolve(config).eval
    chat = Chat.from_run(workdir, config, settings.rows)
    results = evaluate(chat, settings)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    export_dir = Path(export_dir) if export_dir else output / "hf"
    if not (export_dir / "config.json").is_file():
        export_dir = None
    found = report.write(results, output, report.read_stages(Path(workdir).parent), export_dir)
    pictures.draw(results).save(output / "samples.png")
    return found


def evaluate(chat, settings):
    """Returns the `TaskResult` of every task of the demo, and prints a line for each.

    Args:
      chat: a `Chat`.
      settings: a `build.EvalConfig`.
    """
    results = []
    for task in TASKS:
        if task == "stream" and chat.processor.show is not None:
            print("stream: left out, a processor with `picture` knows no streams", flush=True)
            continue
        count = settings.required_samples if task in REQUIRED else settings.samples
        began = time.monotonic()
        results.append(evaluate_task(chat, task, count, settings))
        print(report.progress(results[-1], time.monotonic() - began), flush=True)
    return results


def evaluate_task(chat, task, count, settings):
    """Returns the `TaskResult` of the first `count` held-out records of a task."""
    source = DemoSource(task, "test", settings.seed)
    records = [source[i] for i in range(count)]
    wrong = swap_media(records, source) if any(media(records[0])) else []
    if task == "stream":
        said = [watch(chat, record) for record in records + wrong]
    else:
        said = answer(chat, records + wrong, settings.max_new_tokens)
    truths = [record["answer"] for record in records]
    rated = [scores.score(task, s, t) for s, t in zip(said, truths * 2, strict=False)]
    samples = [chat.processor(record) for record in records]
    wrong_samples = [chat.processor(record) for record in wrong]
    return TaskResult(
        task=task,
        scores=np.array(rated[:count]),
        wrong_scores=np.array(rated[count:]) if wrong else None,
        chance=scores.chance(task, truths),
        loss=_loss(chat, samples),
        wrong_loss=_loss(chat, wrong_samples) if wrong else None,
        records=records,
        samples=samples,
        predictions=said[:count],
    )


def answer(chat, records, max_new_tokens):
    """Returns the greedy answer of the model to each record."""
    prompts = [record["messages"][:-1] for record in records]
    return chat.generate(prompts, max_new_tokens)


def watch(chat, record):
    """Returns what the model says in a live stream, and when: "2.0s cat", "" if it only watches.

    The frames arrive one by one; after each the model itself decides to wait or to speak, and what
    it said stays in its context. The assistant messages of the record are not shown to it.
    """
    stream, said = chat.stream(max_new_tokens=_STREAM_TOKENS), []
    for message in record["messages"]:
        if message["role"] == "stream":
            (part,) = message["content"]
            words = stream.add_frame(part["image"], part["time"])
            if words is not None:
                said.append(f"{part['time']:.1f}s {words}")
        elif message["role"] != "assistant":
            stream.add_message(message["role"], message["content"])
    return " ".join(said)


def _loss(chat, samples):
    config = chat.processor.config
    if config.picture is None:
        group = max(config.image_merge, config.video_merge) ** 2
        budget = Budget(_SLOTS, _SLOTS, _SLOTS, group)
    else:  # what a view takes depends on the system; a row holds any of the samples
        budget = chat.generator.budget(samples)
    return mean_loss(chat.generator, samples, budget, _ROWS)[0]
