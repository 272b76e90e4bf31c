"""The demo's evaluation: the form of the report, streams, and the commands that lead to it."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import demo as demo_config
from configs import videollama3
from vlmjax import main
from vlmjax.data.demo import TASKS, DemoSource
from vlmjax.evals import demo, report
from vlmjax.evals.scores import score
from vlmjax.generate.stream import Stream

NUMBERS = ["score", "chance", "wrong_image", "n", "standard_error", "loss", "loss_wrong_image"]
STAGE = ["stage", "steps", "seconds", "compiles", "loss_first", "loss_last"]


@pytest.fixture(scope="module")
def output(config, workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    demo.run(config, workdir, folder)
    return folder


@pytest.mark.parametrize(("module", "found"), [(demo_config, True), (videollama3, False)])
def test_the_demo_is_told_by_its_sources(module, found):
    """Also where these are named and grouped."""
    assert demo.is_demo(module.get_config()) is found


def test_the_report_has_every_task(config, output):
    found = json.loads((output / "report.json").read_text())
    assert list(found) == ["tasks", "stages", "export"] and found["export"] is None
    assert list(found["tasks"]) == list(TASKS)
    for task, numbers in found["tasks"].items():
        assert list(numbers) == NUMBERS
        assert numbers["n"] == config.eval.samples and 0 <= numbers["score"] <= 1
        without = [name for name, value in numbers.items() if value is None]
        assert without == (["wrong_image", "loss_wrong_image"] if task == "text" else [])
        assert 0.8 < numbers["loss"] / np.log(800) < 1.3  # a random model knows nothing
    assert [list(stage) for stage in found["stages"]] == [STAGE] * 2
    text = (output / "report.md").read_text()
    assert all(f"| {task} |" in text for task in TASKS)


def test_the_pictures_are_written(output):
    with Image.open(output / "samples.png") as page:
        assert page.width == 1280 and page.height > 1500
        assert len(page.getcolors(1 << 24)) > 1000


@pytest.mark.parametrize(
    "scores, wrong, losses, words",
    [
        ([1] * 90 + [0] * 10, [0] * 100, (0.1, 3.0), "above chance by 26.5 standard errors"),
        ([1] * 12 + [0] * 88, [0] * 100, (0.1, 3.0), "at chance"),
        ([1] * 90 + [0] * 10, [1] * 50 + [0] * 50, (3.0, 3.0), "the wrong image scores above"),
        ([0] * 100, [0] * 100, (0.1, 3.0), "below chance by 10"),
        ([0, 1] + [0] * 8, [0] * 10, (3.0, 3.0), "at chance; the right image does not lower"),
    ],
)
def test_verdicts(scores, wrong, losses, words):
    scores, wrong = np.array(scores, float), np.array(wrong, float)
    result = demo.TaskResult("name", scores, wrong, 0.1, *losses, [], [], [])
    assert words in report.verdict(result)


@pytest.mark.parametrize("spoken", [(), (1,), (0, 2)])
def test_a_stream_tells_what_is_said_and_when(chat, monkeypatch, spoken):
    source = DemoSource("stream", "test", 1)
    record = next(r for r in map(source.__getitem__, range(50)) if r["answer"][:1] == "1")
    shown = []
    add_message = Stream.add_message
    monkeypatch.setattr(
        Stream, "add_message", lambda self, *a: (shown.append(a[0]), add_message(self, *a))
    )
    monkeypatch.setattr(
        Stream, "margin", property(lambda self: 1.0 if self.num_frames - 1 in spoken else -1.0)
    )
    target = record["answer"].split()[1]
    monkeypatch.setattr(Stream, "reply", lambda self: target)
    said = demo.watch(chat, record)
    assert said == " ".join(f"{k}.0s {target}" for k in spoken)
    assert score("stream", said, record["answer"]) == (spoken == (1,))
    assert shown == ["user"]  # the true answer is never shown


def test_export_and_generate(workdir, output, capsys):
    picture = output / "picture.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    export = ["export", f"--workdir={workdir}", f"--output={output / 'hf'}"]
    ask = ["--prompt=what is this?", f"--image={picture}", "--max_new_tokens=4"]
    answers = []
    for arguments in (
        export,
        ["generate", f"--model={output / 'hf'}", *ask],
        ["generate", f"--model={workdir}", *ask],
    ):
        with flagsaver.flagsaver():
            main.main(flags.FLAGS(["vlmjax.main", *arguments]))
        answers.append(capsys.readouterr().out)
    assert answers[0].strip() == str(output / "hf")
    assert answers[1] == answers[2]
