"""Held-out loss, and the pixels a model sees."""

import json
import shutil

import numpy as np
import pytest
import tiny

from vlmjax.batch import Budget
from vlmjax.data.demo import DemoSource
from vlmjax.evals import demo, loss, pictures


def test_packed_loss_is_the_mean_over_tokens(chat):
    samples = [
        chat.processor(DemoSource(task, "test", 1)[i])
        for task in ("text", "video", "stream", "ocr")
        for i in range(3)
    ]
    budget = Budget(256, 192, 64, 4)
    before = loss._losses._cache_size()
    each = [loss.mean_loss(chat.generator, [s], budget, 2) for s in samples]
    total, tokens = loss.mean_loss(chat.generator, samples, budget, 2)
    assert tokens == sum(n for _, n in each) == sum((s.labels >= 0).sum() for s in samples)
    assert total == pytest.approx(sum(value * n for value, n in each) / tokens, rel=1e-5)
    assert loss._losses._cache_size() <= before + 1


def test_a_run_on_other_data_reports_its_loss(tmp_path, save_run):
    config = tiny.tiny_config(tmp_path)
    save_run(config, tmp_path / "run")
    assert not demo.is_demo(config)
    found = loss.run(config, tmp_path / "run", tmp_path)
    (source,) = found["sources"].values()
    assert source["n"] == 6 and source["loss"] > 0 and not found["held_out"]
    config.eval.sources = (
        f"json:{shutil.copy(tmp_path / 'annotations.json', tmp_path / 'b.json')}",
    )
    same = loss.run(config, tmp_path / "run", tmp_path)
    assert same["held_out"] and list(same["sources"].values()) == [source]
    assert json.loads((tmp_path / "report.json").read_text()) == same


def test_pictures_show_what_the_model_sees(chat):
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    frames[1, :16] = frames[0, :16]
    content = [{"type": "video", "video": frames, "timestamps": [0, 1]}]
    sample = chat.processor({"id": "0", "messages": [{"role": "user", "content": content}]})
    first, second = (pictures.pixels(item) for item in sample.items)
    assert np.array_equal(first, frames[0]) and np.array_equal(second[16:], frames[1, 16:])
    assert np.array_equal(second[:16], frames[1, :16] // 4 + 150)
