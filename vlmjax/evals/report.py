"""The report of the demo: report.json for programs, report.md for people."""

import json
from pathlib import Path

from vlmjax.evals.scores import standard_error

_CLEAR = 3  # standard errors that count as a difference

_NOTES = f"""
Every answer is generated, greedily, on held-out records. **Score**: the mean over the samples, each
rated 0 to 1; an entry of a list counts as a part of the list. **±**: its standard error.
**Chance**: the best that an answer can score which does not depend on the picture. **Wrong image**:
the same questions, words and times, each asked with the pixels of another sample, which shows
whether the model looks: it should score as chance, or below it, since it answers what it sees. The
losses are nats per supervised token of the true answer, with the right and with the wrong image.
From {_CLEAR} standard errors on a score is called above or below chance, else at chance.
"""


def read_stages(folder):
    """Returns the summaries of the stages in a folder (FOLDER/*/summary.json), in order."""
    found = [json.loads(file.read_text()) for file in Path(folder).glob("stage*/summary.json")]
    return sorted(found, key=lambda summary: summary["stage"])


def numbers(result):
    """Returns the entry of a `TaskResult` in report.json."""
    wrong = result.wrong_scores
    return {
        "score": float(result.scores.mean()),
        "chance": result.chance,
        "wrong_image": None if wrong is None else float(wrong.mean()),
        "n": len(result.scores),
        "standard_error": standard_error(result.scores),
        "loss": result.loss,
        "loss_wrong_image": result.wrong_loss,
    }


def progress(result, seconds):
    """Returns the line printed when a task is done."""
    found = numbers(result)
    shown = f"{result.task:<12} score {found['score']:.3f}  chance {found['chance']:.3f}"
    if result.wrong_scores is not None:
        shown += f"  wrong image {found['wrong_image']:.3f}"
    return f"{shown}  {found['n']} samples, {found['n'] / seconds:.0f}/s"


def verdict(result):
    """Returns in words how a score compares with chance, and what the wrong image does."""
    found = numbers(result)
    errors = (found["score"] - found["chance"]) / found["standard_error"]
    words = "at chance"
    if abs(errors) >= _CLEAR:
        words = f"{'above' if errors > 0 else 'below'} chance by {abs(errors):.1f} standard errors"
    if result.wrong_scores is None:
        return words
    excess = found["wrong_image"] - found["chance"]
    if excess > _CLEAR * standard_error(result.wrong_scores):
        words += "; **the wrong image scores above chance**"
    if found["loss"] >= found["loss_wrong_image"]:
        words += "; the right image does not lower the loss"
    return words


def write(results, output, stages, export_dir):
    """Writes report.json and report.md; returns what is in report.json.

    Args:
      results: list of `TaskResult`.
      output: existing folder.
      stages: of `read_stages`.
      export_dir: Hugging Face directory, or None.
    """
    report = {
        "tasks": {result.task: numbers(result) for result in results},
        "stages": stages,
        "export": str(export_dir) if export_dir else None,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text(_markdown(results, report))
    return report


def _markdown(results, report):
    lines = [
        "# Demo: scores on held-out data",
        "",
        *_table(
            ("task", "score", "±", "chance", "wrong image", "loss", "wrong loss", "n", "verdict"),
            [_row(result) for result in results],
        ),
        _NOTES,
    ]
    if report["stages"]:
        names = ("stage", "steps", "seconds", "compiles", "loss_first", "loss_last")
        rows = [[_cell(stage.get(name)) for name in names] for stage in report["stages"]]
        lines += ["## Stages", "", *_table([n.replace("_", " ") for n in names], rows), ""]
    lines.append("`samples.png` shows the first held-out samples of each task.")
    if report["export"]:
        lines.append(f"The model in Hugging Face layout: `{report['export']}`.")
    return "\n".join(lines) + "\n"


def _row(result):
    found = numbers(result)
    keys = ("score", "standard_error", "chance", "wrong_image", "loss", "loss_wrong_image", "n")
    return [result.task, *(_cell(found[key]) for key in keys), verdict(result)]


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(head, rows):
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
