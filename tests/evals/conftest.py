"""A tiny random model of the demo, saved as a run."""

import dataclasses
import json

import pytest

from configs import demo as demo_config
from vlmjax import build, checkpoint
from vlmjax.generate.chat import Chat


@pytest.fixture(scope="session")
def config():
    c = demo_config.get_config("stage=4")
    c.model.vision = dict(width=16, mlp=16, layers=1, heads=2, patch=8)
    c.model.llm = dict(
        vocab=800, width=16, mlp=16, layers=1, heads=2, kv_heads=1, head_dim=8, tie=True
    )
    c.eval = dataclasses.asdict(build.EvalConfig(samples=4, required_samples=4, rows=8))
    return c


@pytest.fixture(scope="session")
def save_run():
    """Function (config, folder): saves random weights as the first step of a run."""

    def save(config, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(config.to_json_best_effort())
        params = build.random_params(build.resolve(config).model, 0)
        with checkpoint.Saver(folder, 1) as saver:
            saver.save(1, {"trainable": params, "frozen": {}}, {"position": [0, []]})

    return save


@pytest.fixture(scope="session")
def workdir(config, save_run, tmp_path_factory):
    """A run of one saved step, and the summaries of two stages."""
    root = tmp_path_factory.mktemp("stages")
    folder = root / "stage4"
    for stage in (1, 4):
        (root / f"stage{stage}").mkdir()
        summary = {"stage": stage, "steps": 1, "seconds": 2.0, "compiles": 1}
        summary |= {"loss_first": 3.0, "loss_last": 2.0}
        (root / f"stage{stage}" / "summary.json").write_text(json.dumps(summary))
    save_run(config, folder)
    return folder


@pytest.fixture(scope="session")
def chat(workdir, config):
    return Chat.from_run(workdir, config, rows=8)
