"""Launch scripts, with commands of the same name in place of gcloud, git and srun."""

import os
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlmjax import main
from vlmjax.train import loop

LAUNCH = Path(__file__).parents[1] / "launch"
TRAIN = ["--config", "configs/x.py:stage=1", "--config.data.sources=(('json:my file.json', 1.0),)"]


@pytest.fixture
def launch(tmp_path):
    """Runs a script; returns the commands it gave, as lists of words."""
    (tmp_path / "bin").mkdir()
    for name in ("gcloud", "git", "srun"):
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" $'\\1' >> {tmp_path}/log\n")
        file.chmod(0o755)

    def run(script, *args):
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        subprocess.run(["bash", LAUNCH / script, *args], env=env, check=True, cwd=tmp_path)
        return [c.split("\0")[:-1] for c in (tmp_path / "log").read_text().split("\1\0")[:-1]]

    return run


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_what_a_run_needs(python):
    """One version of each of our dependencies, within what pyproject.toml allows."""
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [p for p in pins if not p.marker or p.marker.evaluate({"python_version": python})]
    version = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in here}
    assert len(version) == len(here)
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["data"]]
    for need in map(Requirement, wanted):
        assert version[canonicalize_name(need.name)] in need.specifier, need


def test_tpu_vm(launch):
    """Copies the commit and trains on all hosts, with the flags of the chip; words stay words."""
    archive, copy, run = launch("tpu_vm.sh", "my-slice", "zone-a", "v5e", *TRAIN)
    assert archive[:3] == ["git", "archive", "--format=tar.gz"]
    assert copy[-5:] == [archive[4], "my-slice:vlmjax.tgz", "--zone", "zone-a", "--worker=all"]
    assert run[1:-1] == [*copy[1:4], "ssh", "my-slice", *copy[-3:], "--command"]
    *before, last = run[-1].splitlines()
    assert shlex.split(last)[3:] == ["train", "--distributed", *TRAIN]
    flags = "$(.venv/bin/python -m vlmjax.aot.flags v5e)"
    assert before[-1] == f'export LIBTPU_INIT_ARGS="{flags}"'
    assert not subprocess.run(["bash", "-n", "-c", run[-1]]).returncode


def test_tpu_vm_of_several_slices(launch, monkeypatch):
    """All hosts of all nodes of a queued resource."""
    monkeypatch.setenv("NODES", "all")
    _, copy, run = launch("tpu_vm.sh", "my-slices", "zone-a", "v5e", *TRAIN)
    where = ["--zone", "zone-a", "--worker=all", "--node=all"]
    assert copy[1:5] == ["compute", "tpus", "queued-resources", "scp"] and copy[-4:] == where
    assert run[3:-2] == ["queued-resources", "ssh", "my-slices", *where]


def test_slurm_starts_a_stopped_run_again(tmp_path):
    for name, code in (("srun", 75), ("scontrol", 0)):
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\necho {name} $* >> {tmp_path}/log; exit {code}\n")
        file.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sh", *TRAIN], env=env)
    assert done.returncode == 75
    assert (tmp_path / "log").read_text().splitlines()[-1] == "scontrol requeue 7"


def test_a_run_that_was_stopped_exits_with_the_code_for_it(monkeypatch):
    config = SimpleNamespace(train=SimpleNamespace(steps=5))
    given = dict(config=config, workdir="x", profile=None, distributed=False, tensorboard=False)
    monkeypatch.setattr(main, "FLAGS", SimpleNamespace(**given))
    monkeypatch.setattr(loop, "train", lambda *_: {"steps": 5})
    main.train()
    monkeypatch.setattr(loop, "train", lambda *_: {"steps": 3})
    with pytest.raises(SystemExit) as stopped:
        main.train()
    assert stopped.value.code == 75


def test_slurm(launch):
    (command,) = launch("slurm.sh", *TRAIN)
    python = [".venv/bin/python", "-m", "vlmjax.main", "train"]
    assert command == ["srun", "--kill-on-bad-exit=1", *python, *TRAIN]
