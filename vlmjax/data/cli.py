"""The commands python -m vlmjax.main data ..."""

from pathlib import Path

from vlmjax.data import contact_sheet, inspection
from vlmjax.data.sources import open_source

# (kind, name, default, text) of the flags that only these commands have.
FLAGS = (
    ("string", "source", None, "KIND:WHERE; see vlmjax/data/sources.py"),
    ("string", "media_root", None, "folder of media that are given by path"),
    ("integer", "samples", 64, "inspect: records of each source to look at"),
)


def pack(source, media_root, output):
    """Writes a source as an ArrayRecord file; returns a line that says what came of it.

    Args:
      source: spec KIND:WHERE.
      media_root: folder of media that are given by path; None = the one it is run in.
      output: OUT.array_record.
    """
    from vlmjax.data import convert  # only here the file format is needed

    if not output.endswith(".array_record"):
        raise ValueError(f"--output={output} must end with .array_record: rename it")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    written, bad = convert.pack(open_source(source, media_root or ".", 0), output)
    line = f"{written:,} records in {output}, {Path(output).stat().st_size:,} bytes"
    if not bad:
        return f"{line}; all were usable"
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(bad.items()))
    return f"{line}; {sum(bad.values()):,} left out ({reasons}), see {output}.errors.jsonl"


def inspect(sources, processor, samples, output=None):
    """Returns what is in sources in words; writes contact_sheet.png into a folder if one is given.

    Args:
      sources: {spec: source}.
      processor: a `Processor`.
      samples: records of each source to look at.
      output: folder, or None.
    """
    found = [inspection.survey(*item, processor, samples) for item in sources.items()]
    text = inspection.report(found)
    if output is not None:
        file = Path(output) / "contact_sheet.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet.draw(found, processor.tokenizer).save(file)
        text += f"\n\n{file}"
    return text
