"""What steps were estimated to need and take when last improved (jax 0.10.2, libtpu 0.0.51;
they hold with 0.0.52).

They compile for minutes: pytest -m long tests/aot/test_aot_baselines.py
"""

import importlib

import pytest

from vlmjax import build
from vlmjax.aot.plan import make_plan

pytestmark = pytest.mark.long
# (config, argument, topology, share of supervised tokens):
#   ({key of the plan: value when last improved}, {key: most allowed})
BASELINES = {
    # 1 x 4,096 tokens a chip, full remat; MaxText 0.2.5 takes 1.02 s and 4.99 GB.
    ("text_qwen2_5", "size=1.5b,chips=16", "v5e:4x4", 1.0): (
        dict(op_seconds=0.3070, exposed_communication_seconds=0.1015, peak_bytes=2.756e9),
        dict(op_seconds=0.40, peak_bytes=4.5e9),
    ),
    # MaxText 1.94 s and 7.79 GB.
    ("text_qwen2_5", "size=7b,chips=32", "v5p-64", 1.0): (
        dict(op_seconds=0.5444, exposed_communication_seconds=0.1483, peak_bytes=6.808e9),
        dict(op_seconds=0.80, peak_bytes=7.5e9),
    ),
    ("videollama3", "size=2b,stage=2,slice=v5p-32", "v5p-32", 0.25): (
        dict(seconds=4.604, exposed_communication_seconds=0.2368, peak_bytes=51.98e9),
        {},
    ),
}
LEAST_MFU = 0.50  # of VideoLLaMA3 on v5p


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, id=" ".join(what[:3])) for what in BASELINES],
)
def test_plans_do_not_get_worse(what):
    config, argument, topology, supervised = what
    run = build.resolve(importlib.import_module(f"configs.{config}").get_config(argument))
    plan = make_plan(run, argument, topology, supervised=supervised)
    before, most = BASELINES[what]
    assert {key: plan[key] for key, value in before.items() if plan[key] > 1.03 * value} == {}
    assert {key: plan[key] for key, value in most.items() if plan[key] > value} == {}
    assert plan["fits"] and (config != "videollama3" or plan["mfu_estimate"] >= LEAST_MFU)
