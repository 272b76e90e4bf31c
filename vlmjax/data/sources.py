"""Sources: random-access sequences of records, opened by a spec "KIND:WHERE".

demo:TASK[#SPLIT]     records of the embedded demo, train or test, without end
json:FILE             LLaVA / VideoLLaMA3 annotations, a JSON list or JSON lines
parquet:FILES         Hugging Face parquet, conversations or messages with pictures as columns
tar:FILES             webdataset shards, not compressed
array_record:FILES    what `data pack` writes, media included
tfds:DIR[#SPLIT]      a prepared TFDS dataset in ArrayRecord format

FILES is a path, a glob, or braces as in "shard-{00000..00010}.tar". Media paths are inside the
media root. A source is:

    len(source)           how many records; the demo's have no length
    source[i]             {"id", "messages", ...}; health.BadRecord where it cannot be used
    source.id(i)          a name for record i, also of one that cannot be used; nothing is read
    source.fingerprint    hex digest that changes with the content, the same on every host
    source.keep(folder)   writes where its records lie, where finding that takes time (json, tar)

Sources can be pickled and read by several threads. Media that files hold stay encoded, as bytes.
The digest is that of a JSON file, or of the index that others have of their content (a medium that
is changed in place, its size kept, goes unnoticed); media in files of their own do not count. Kept
places are of files by path, size and time of change.
"""


def _demo(task, media_root, seed, folder):
    from vlmjax.data.demo import DemoSource

    task, _, split = task.partition("#")
    return DemoSource(task, split or "train", seed)


def _json(file, media_root, seed, folder):
    from vlmjax.data.jsonl import JsonSource

    return JsonSource(file, media_root, folder)


def _parquet(files, media_root, seed, folder):
    from vlmjax.data.parquet import ParquetSource

    return ParquetSource(files, media_root)


def _tar(files, media_root, seed, folder):
    from vlmjax.data.tar import TarSource

    return TarSource(files, media_root, folder)


def _array_record(files, media_root, seed, folder):
    from vlmjax.data.array_record import ArrayRecordSource

    return ArrayRecordSource(files)


def _tfds(where, media_root, seed, folder):
    from vlmjax.data.tfds import TfdsSource

    return TfdsSource(where, media_root)


# Kind -> function of (where, media root, seed, folder), and the extra that it needs.
KINDS = {
    "demo": (_demo, None),
    "json": (_json, None),
    "parquet": (_parquet, "data"),
    "tar": (_tar, None),
    "array_record": (_array_record, "data"),
    "tfds": (_tfds, "data"),
}


def open_source(spec, media_root, seed, folder=None):
    """Returns the source of a spec "KIND:WHERE".

    Args:
      spec: str.
      media_root: folder that media paths are relative to; they may not leave it.
      seed: of sources that draw their records.
      folder: of the source's length index; where it keeps places of these files, those are not
        looked for again.
    """
    kind, _, where = spec.partition(":")
    if kind not in KINDS or not where:
        raise ValueError(
            f"data source {spec!r} is not allowed: write KIND:NAME with KIND one of {sorted(KINDS)}"
        )
    make, extra = KINDS[kind]
    try:
        return make(where, media_root, seed, folder)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise ValueError(
            f"data source {spec!r} needs the package {error.name!r}, which is not there: install "
            f'"vlmjax[{extra}]"'
        ) from error
