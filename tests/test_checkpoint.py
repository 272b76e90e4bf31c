"""Checkpoints: a flipped byte is an error that names the file, and the one before takes over."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax import checkpoint
from vlmjax.checkpoint import MANIFEST, CheckpointError, Saver


def _state(step):
    return {
        "step": jnp.asarray(step),
        "trainable": {"llm/norm/scale": jnp.arange(300.0) + step},
        "frozen": {"vision/patch/kernel": jnp.full((4, 8), step, jnp.bfloat16)},
        "opt": (jnp.zeros(3), ()),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 2 and 3; that of step 1 was dropped."""
    workdir = tmp_path_factory.mktemp("run")
    with Saver(workdir, keep=2) as saver:
        for step in (1, 2, 3):
            saver.save(step, _state(step), {"position": [step, []], "stage": 1})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def _folder(workdir, step):
    return workdir / "checkpoints" / str(step)


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _flip(file, at=None):
    data = bytearray(file.read_bytes())
    if data:
        data[len(data) // 2 if at is None else at] ^= 0x10
    else:
        data.append(0)
    file.write_bytes(data)


def _scale(workdir):
    params, meta = checkpoint.restore_params(workdir)
    assert set(params) == {"llm/norm/scale", "vision/patch/kernel"}
    return np.asarray(params["llm/norm/scale"])[0], meta["position"][0]


def test_saved_is_restored_and_old_ones_are_dropped(saved):
    assert checkpoint.steps(saved) == [2, 3]
    arrays, meta = checkpoint.restore(checkpoint.newest(saved), _state(0))
    assert meta == {"position": [3, []], "stage": 1}
    for got, want in zip(arrays["opt"][:1], _state(3)["opt"][:1], strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(arrays["step"]) == 3 and _scale(saved) == (3.0, 3)
    assert arrays["frozen"]["vision/patch/kernel"].dtype == jnp.bfloat16


def test_a_flipped_byte_in_any_file_is_an_error_naming_it(workdir):
    folder = _folder(workdir, 3)
    files = _files(folder)
    assert len(files) > 6 and folder / "meta.json" in files
    for file in files:
        before = file.read_bytes()
        _flip(file, 0 if file.name == MANIFEST else None)
        with pytest.raises(CheckpointError) as error:
            checkpoint.verify(folder)
        assert f"{file} is damaged" in str(error.value)
        file.write_bytes(before)
    checkpoint.verify(folder)


def test_a_flipped_byte_anywhere_in_the_manifest_is_an_error(workdir):
    manifest = _folder(workdir, 3) / MANIFEST
    before = manifest.read_bytes()
    for at in range(0, len(before), 17):
        _flip(manifest, at)
        with pytest.raises(CheckpointError):
            checkpoint.verify(manifest.parent)
        manifest.write_bytes(before)


def test_missing_and_extra_files_are_errors_naming_them(workdir):
    folder = _folder(workdir, 3)
    (folder / "arrays" / "left_over").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"files that its manifest does not list: \['arrays/left_over'\]"
    ):
        checkpoint.verify(folder)
    (folder / "arrays" / "left_over").unlink()
    (folder / "meta.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"3/meta\.json is missing, though the manifest lists it"
    ):
        checkpoint.verify(folder)


def test_falls_back_to_the_previous_good_one_and_says_so(workdir, caplog):
    assert _scale(workdir) == (3.0, 3) and not caplog.records
    damaged = max(_files(_folder(workdir, 3) / "arrays"), key=lambda p: p.stat().st_size)
    _flip(damaged)
    assert checkpoint.newest(workdir) == _folder(workdir, 2)
    assert f"{damaged} is damaged" in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text
    assert _scale(workdir) == (2.0, 2)


def test_interrupted_save_does_not_count(workdir, caplog):
    (_folder(workdir, 3) / MANIFEST).unlink()
    assert _scale(workdir) == (2.0, 2) and not caplog.records
    with Saver(workdir, keep=2) as saver:  # the same step is saved again over what is there
        saver.save(3, _state(5), {"position": [5, []]})
    assert _scale(workdir) == (5.0, 5) and checkpoint.steps(workdir) == [2, 3]


def test_nothing_intact_is_an_error(workdir):
    for step in (2, 3):
        _flip(_folder(workdir, step) / "meta.json")
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint is left: .*3/meta\.json.*2/meta\.json"
    ):
        checkpoint.newest(workdir)


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.steps(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; run that stage first"):
        checkpoint.restore_params(tmp_path)


def test_a_failed_save_is_raised(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "seal", fail)
    saver = Saver(tmp_path, keep=1)
    saver.save(1, _state(1), {})
    with pytest.raises(OSError, match="disk full"):
        saver.wait()
    assert checkpoint.newest(tmp_path) is None
    saver.error = None
    saver.__exit__()
