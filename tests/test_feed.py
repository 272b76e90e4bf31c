"""What hosts tell each other about their data, in two real processes."""

import re

import pytest
from processes import finish, start

HEALTH = """
import jax, sys
from pathlib import Path
from vlmjax.data.health import Ledger, TooManyBadRecords
from vlmjax.data.reader import Bad
from vlmjax.train import cluster
from vlmjax.train.feed import Feed, check_alike, gathered
cluster.join()
me, folder = jax.process_index(), Path(sys.argv[1])
ledger = Ledger(folder, {"coco": 1000}, 0.004, me)  # before any host writes to its own
assert gathered({"a": [me] * (1 + 3 * me)}) == [{"a": [0]}, {"a": [1, 1, 1, 1]}]
check_alike("the data", {"seed": 1})

def packed(*ids):
    class packed:
        bad = [Bad("coco", f"{me}:{id}", "missing_file", "gone") for id in ids]
        repairs = {"cut_messages": 1 + me}
    return packed

feed = Feed(None, (me,), {}, ledger, ())
feed.record(packed("a", "b"))
assert feed.health(None) == {"bad/coco/missing_file": 4, "repaired/cut_messages": 3}
feed.record(packed("c") if me else packed())  # of five, this host has met at most three
try:
    feed.health(None)
except TooManyBadRecords as error:
    assert str(error).startswith("5 of the 1000 records of source 'coco' cannot be used"), error
else:
    raise SystemExit("nobody noticed")
try:
    check_alike("the data", {"sources": me})
except ValueError as error:
    print(error)
else:
    raise SystemExit("nobody noticed")
"""


@pytest.mark.slow
def test_hosts_add_up_what_is_bad_and_notice_other_data(tmp_path):
    finish(tmp_path, start(tmp_path, HEALTH, (tmp_path,), 2, 2))
    for process in range(2):
        said = (tmp_path / f"log{process}").read_text()
        assert re.search(rf'disagree about the data .*process {process} has .*"sources"', said)
