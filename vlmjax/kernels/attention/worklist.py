"""Lists of block pairs for kernels whose grid is as long as the work.

The pairs of blocks that share a segment, packed into one i32 each, in the order in which a kernel
accumulates: query blocks with their key blocks for the forward pass, the other way round for the
backward pass. Made on the device, so one compiled program serves every layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmjax.kernels.attention.intervals import needed_pairs

# An entry is one i32: query block, key block (12 bits each), then flags: the first and the last
# entry of the block that is accumulated, whether there is work, and whether this part of the list
# meets the other block for the first time.
BITS = 12
FIRST, LAST, WORK, NEW = (1 << (2 * BITS + k) for k in range(4))
# Of the 1 MiB of scalar memory of v5e, v5p and v6e, of which the compiler takes some 2 kB.
LIST_BYTES = 2**20 - 2**12


def query_of(entry):
    """Returns the query block of an entry, numbered through all rows."""
    return entry & ((1 << BITS) - 1)


def key_of(entry):
    """Returns the key block of an entry, numbered through all rows."""
    return (entry >> BITS) & ((1 << BITS) - 1)


class Work(NamedTuple):
    """A list of block pairs in the order in which a kernel visits them, cut into one part a core.

    For a cycle simulator, which reads run-time scalars as 0, `pairs` may be a function of the
    position in the list and `parts` a tuple of ints.
    """

    pairs: jax.Array  # i32[B, n * m] packed entries of all rows one after another
    parts: jax.Array  # i32[B, cores + 1] where each part starts and the last one ends; rows equal


class Plan(NamedTuple):
    """The work of one packed layout, shared by all layers that use it."""

    q_segments: jax.Array  # i32[B, T], T a multiple of the block
    kv_segments: jax.Array  # i32[B, S]
    q_start: jax.Array  # i32[B]
    by_query: Work  # forward: query blocks in order, each with its key blocks
    by_key: Work  # backward: key blocks in order, each with its query blocks
    met: jax.Array  # bool[B, cores, T / block], the query blocks that a part of by_key meets


def plan(q_segments, kv_segments, q_start, block, causal, cores=None):
    """Returns the `Plan` of packed rows.

    Args:
      q_segments: i32[B, T], 1, 2, ... in order with padding (0) at the end.
      kv_segments: i32[B, S].
      q_start: i32[], the slot of the row where the queries start.
      block: slots in a block, a multiple of 128.
      causal: whether queries see only earlier keys.
      cores: that share a chip's memory and each take a part; default: what the chip has.

    Raises:
      NotImplementedError: more blocks than an entry can number, or a list that scalar memory cannot
        hold.
    """
    q_segments, kv_segments = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))) for x in (q_segments, kv_segments)
    )
    B, n, m = q_segments.shape[0], q_segments.shape[1] // block, kv_segments.shape[1] // block
    cores = min(cores or _num_cores(), B * n, B * m)
    if max(B * n, B * m) >> BITS or 4 * B * n * m > LIST_BYTES:
        raise NotImplementedError(
            f"{B} rows of {n} x {m} blocks: a device holds at most {1 << BITS} blocks and "
            f"{LIST_BYTES // 4} pairs of them; use a larger block than {block}, fewer rows, or "
            "sequence parallelism"
        )
    needed = needed_pairs(q_segments, kv_segments, q_start, block, causal)
    by_query, _ = _list(needed, cores, lambda outer, inner: outer | inner << BITS)
    by_key, part = _list(needed.swapaxes(1, 2), cores, lambda outer, inner: inner | outer << BITS)
    met = (needed[:, None] & (part[:, None, None] == jnp.arange(cores)[:, None, None])).any(-1)
    q_start = jnp.broadcast_to(jnp.asarray(q_start, jnp.int32), (B,))
    return Plan(q_segments, kv_segments, q_start, by_query, by_key, met)


def _num_cores():
    """Returns the cores of a device of the mesh in use (2 on v4 and v5p), else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", 1) or 1


def _list(needed, cores, pack):
    """Lists each outer block of bool[B, outer, inner] with the inner ones it needs.

    What an outer block needs is one interval. One that needs nothing is listed once, without work,
    so that its output is written. Parts are cut between outer blocks, as equal as that allows.

    Returns:
      (`Work`, i32[B, outer] the part of each outer block).
    """
    B, n, m = needed.shape
    num = needed.sum(-1)
    start = needed.argmax(-1)
    seen = jax.lax.cummax(jnp.where(num > 0, start + num, 0), axis=1)  # inner blocks seen so far
    seen = jnp.pad(seen, ((0, 0), (1, 0)))[:, :-1]
    steps = jnp.maximum(num, 1)
    ends = jnp.cumsum(steps.reshape(-1))
    at = jnp.arange(B * n * m)
    outer = jnp.minimum((ends <= at[:, None]).sum(1), B * n - 1)

    def of(table):  # a gather of scalars is slow on TPU, a masked sum is not
        mine = outer[:, None] == jnp.arange(B * n)
        return jnp.where(mine, table.reshape(-1), 0).sum(1)

    k = at - of(ends - steps.reshape(-1))
    inner = of(start) + k
    flags = FIRST * (k == 0) + LAST * (k == of(steps) - 1)
    flags += WORK * (of(num) > 0)
    # Every part has an outer block: a core without one would still write an output.
    middle = ends[-1] * jnp.arange(1, cores)[:, None] // cores
    cuts = jnp.where(ends <= middle, ends, ends[0]).max(1)
    parts = jnp.concatenate([jnp.zeros(1, cuts.dtype), cuts, ends[-1:]]).astype(jnp.int32)
    # The first time a core meets an inner block: later than those of the outer block before, or
    # the part begins here.
    begins = (parts[:-1, None] == (ends - steps.reshape(-1))).any(0)
    flags += NEW * ((inner >= of(seen)) | (of(begins) > 0))
    pairs = pack(outer, outer // n * m + inner) + flags
    work = Work(pairs.astype(jnp.int32).reshape(B, n * m), jnp.broadcast_to(parts, (B, cores + 1)))
    return work, (ends[:, None] > cuts).sum(1).reshape(B, n)
