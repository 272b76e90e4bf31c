"""Checkpoints: written by orbax in the background, sealed by sha256, verified when read.

    <workdir>/checkpoints/<step>/arrays/         orbax: parameters, optimizer state, step
    <workdir>/checkpoints/<step>/meta.json       position and identity of the data, stage
    <workdir>/checkpoints/<step>/manifest.json   sha256 of every file above, written last

A directory without a manifest was interrupted and does not count. Orbax does not notice bit rot, so
every byte is hashed on restore.
"""

import hashlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged."""


def _digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digests(folder, names):
    """Returns {name: sha256} of files, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(16) as pool:
        paths = (folder / name for name in names)
        return dict(zip(names, pool.map(_digest, paths), strict=True))


def seal(folder):
    """Writes the manifest of a finished checkpoint directory, atomically."""
    entries = _digests(folder, [str(p.relative_to(folder)) for p in _files(folder)])
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps(entries, indent=1))
    part.rename(folder / MANIFEST)


def verify(folder):
    """Checks every byte of a checkpoint.

    Raises:
      CheckpointError: naming what is missing or which file changed.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: the save was interrupted")
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except ValueError as e:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {e}") from e
    for name in entries:
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing, though the manifest lists it")
    for name, digest in _digests(folder, list(entries)).items():
        if digest != entries[name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its sha256 is not the one in the manifest"
            )
    extra = {str(p.relative_to(folder)) for p in _files(folder)} - set(entries)
    if extra:
        raise CheckpointError(
            f"{folder} holds files that its manifest does not list: {sorted(extra)}"
        )


def steps(workdir):
    """Returns the steps of all sealed checkpoints, in order."""
    folder = Path(workdir) / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdigit() and (p / MANIFEST).exists())


def newest(workdir):
    """Returns the newest intact checkpoint directory, or None when there is none at all.

    A damaged one is reported and passed over.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    damage = []
    for step in reversed(steps(workdir)):
        folder = Path(workdir) / "checkpoints" / str(step)
        try:
            verify(folder)
        except CheckpointError as e:
            damage.append(str(e))
            logging.error("%s; falling back to the checkpoint before it", e)
            continue
        return folder
    if damage:
        raise CheckpointError("no intact checkpoint is left: " + "; ".join(damage))
    return None


def restore(folder, like):
    """Returns (arrays, meta) of a verified checkpoint directory.

    Args:
      folder: of `newest`.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s with the wanted shardings.
    """
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore((folder / "arrays").absolute(), like)
    return arrays, json.loads((folder / "meta.json").read_text())


def restore_params(workdir, place=None):
    """Returns ({path: array}, meta) of the newest checkpoint of a finished or interrupted run.

    Args:
      workdir: of the run.
      place: function {path: ShapeDtypeStruct} of what is saved -> {path: sharding}; None = all on
        the first device of this process.

    Raises:
      CheckpointError: the run has none.
    """
    folder = newest(workdir)
    if folder is None:
        raise CheckpointError(
            f"{workdir} holds no complete checkpoint; run that stage first, or point init at a "
            "run that did, at a Hugging Face model (init=hf:DIR) or at nothing (init=random)"
        )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        path = (folder / "arrays").absolute()
        saved = reader.metadata(path).item_metadata.tree
        like = {
            part: {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in saved[part].items()}
            for part in ("trainable", "frozen")
        }
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = place(like["trainable"] | like["frozen"]) if place else {}
        like = {
            part: {p: x.update(sharding=where.get(p, device)) for p, x in params.items()}
            for part, params in like.items()
        }
        how = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
        arrays = reader.restore(path, args=args)
    return arrays["trainable"] | arrays["frozen"], json.loads((folder / "meta.json").read_text())


class Saver:
    """Saves in the background, keeps the last `keep`. Use as a context manager: exit waits."""

    def __init__(self, workdir, keep):
        self.folder, self.keep = Path(workdir).absolute() / "checkpoints", keep
        self.writer, self.sealer, self.error = ocp.StandardCheckpointer(), None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        self.writer.close()

    def wait(self):
        """Waits for the save under way; raises what went wrong in it."""
        if self.sealer is not None:
            self.sealer.join()
            self.sealer = None
        if self.error is not None:
            raise self.error

    def save(self, step, arrays, meta):
        """Starts saving; returns once the arrays are copied to the host.

        Args:
          step: int.
          arrays: pytree of jax arrays.
          meta: a json-able dict.
        """
        self.wait()
        target = self.folder / str(step)
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)  # an interrupted save of the same step
            target.mkdir(parents=True)
            (target / "meta.json").write_text(json.dumps(meta, indent=1))
        self.writer.save(target / "arrays", arrays)
        self.sealer = threading.Thread(
            target=self._finish, args=(target,), name="vlmjax-checkpoint"
        )
        self.sealer.start()

    def _finish(self, target):
        try:
            self.writer.wait_until_finished()
            if jax.process_index() == 0:
                seal(target)
                for step in steps(self.folder.parent)[: -self.keep]:
                    shutil.rmtree(self.folder / str(step))
        except Exception as e:  # raised by wait() in the main thread
            self.error = e
