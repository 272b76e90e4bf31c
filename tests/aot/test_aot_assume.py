"""What a plan assumes of the data."""

from types import SimpleNamespace

import pytest

from vlmjax.aot.assume import Mixture, loop_trips


@pytest.mark.parametrize(
    "mesh, tokens, trips",
    [
        (dict(fsdp=4), 4096, 64),  # 4 rows a chip, 256 tokens a chunk
        (dict(fsdp=4, tensor=4), 4096, 16),  # tokens are shared out over tensor too
        (dict(fsdp=4, seq=2, tensor=2), 4096, 16),
        (dict(fsdp=4, tensor=3), 4096, 64),  # which they are not where they do not divide
    ],
)
def test_the_loop_of_the_loss_runs_over_the_tokens_of_a_chip(mesh, tokens, trips):
    run = SimpleNamespace(
        train=SimpleNamespace(rows=16, accumulate=1),
        model=SimpleNamespace(compute=SimpleNamespace(loss_chunk=256)),
    )
    shape = dict(data=1, fsdp=1, seq=1, tensor=1) | mesh
    found = loop_trips(
        Mixture(1, 1024, 1.0), run, SimpleNamespace(tokens=tokens), SimpleNamespace(shape=shape)
    )
    assert found == {"loss": trips}
