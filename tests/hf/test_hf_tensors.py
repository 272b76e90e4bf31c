"""Safetensors: what we write others read, and the reverse; broken files are refused."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vlmjax.hf.tensors import INDEX, SINGLE, Tensor, TensorDirectory, write_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def _arrays():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "d": (), "e": (1, 9), "f": (11, 2)}
    dtypes = [BF16, np.float32, np.float16]
    return {
        name: rng.normal(size=shape).astype(dtypes[i % 3])
        for i, (name, shape) in enumerate(shapes.items())
    }


def _tensors(arrays):
    return [Tensor(k, v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()]


def _assert_same(reader, arrays):
    assert set(reader) == set(arrays)
    for name, array in arrays.items():
        read = reader.read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


def test_one_file_is_read_by_safetensors_and_by_us(tmp_path):
    arrays = _arrays()
    (file,) = write_tensors(tmp_path, _tensors(arrays))
    assert file.name == SINGLE
    _assert_same(TensorDirectory(tmp_path), arrays)
    with safe_open(file, "pt") as f:
        assert f.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            read = f.get_tensor(name)
            assert tuple(read.shape) == array.shape
            assert read.float().numpy().tobytes() == array.astype(np.float32).tobytes()


def test_shards_stay_below_the_limit_and_replace_an_earlier_export(tmp_path):
    arrays = {f"t{i}": np.full((100 + i,), i, np.float32) for i in range(9)}
    write_tensors(tmp_path, _tensors(_arrays()))
    files = write_tensors(tmp_path, _tensors(arrays), max_shard_size=2000)
    assert len(files) > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f.name for f in files), INDEX])
    assert all(f.stat().st_size < 2000 for f in files)
    _assert_same(TensorDirectory(tmp_path), arrays)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "np") as f:
            assert name in f.keys()  # noqa: SIM118


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    size = 250_000
    tensors = [
        Tensor(f"t{i}", np.dtype(np.float32), (size,), lambda i=i: np.full(size, i, np.float32))
        for i in range(12)
    ]
    tracemalloc.start()
    write_tensors(tmp_path, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * size


def test_a_truncated_file_is_refused(tmp_path):
    save_file(_arrays() | {"z": np.zeros(1000, np.float32)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for length in (4, 100, len(whole) - 1):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            TensorDirectory(tmp_path)


def test_shards_that_are_absent_or_elsewhere_are_refused(tmp_path):
    arrays = {f"t{i}": np.zeros(100, np.float32) for i in range(4)}
    files = write_tensors(tmp_path, _tensors(arrays), max_shard_size=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": {"x": files[0].name}}))
    with pytest.raises(ValueError, match="lacks 1 tensors .*: x"):
        TensorDirectory(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="every shard is a file of that directory"):
        TensorDirectory(tmp_path)


def test_pickles_and_integer_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="never from pickles"):
        TensorDirectory(tmp_path)
    save_file({"a": np.zeros(3, np.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="stored as I8"):
        TensorDirectory(tmp_path).read("a")
