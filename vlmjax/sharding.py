"""Meshes, and what logical axes mean on them. The only module that knows mesh axis names."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "seq", "tensor")
ROWS = ("data", "fsdp")  # rows of a batch are spread over these
ACROSS = "data"  # the one axis that may cross the network between TPU slices

# Logical axis -> mesh axis. The vision tower is spread by rows, not by heads: ahead of time for a
# So400m ViT on v5e 4x4 that costs 0.03 GiB of collectives per step, against 2.51 GiB when it is
# tensor-parallel like the decoder.
RULES = (
    (r"(vision(_\d+)?|connector)/.*", dict(embed="fsdp")),
    (".*", dict(embed="fsdp", mlp="tensor", heads="tensor", kv_heads="tensor", vocab="tensor")),
)


def make_mesh(data=-1, fsdp=1, seq=1, tensor=1, devices=None):
    """Returns a mesh with axes data, fsdp, seq, tensor; one of them may be -1 for "the rest".

    Of several TPU slices only data crosses the network between them, and data is the axis over
    which nothing but gradients is sent: its first blocks are the slices, one after the other.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or data is no multiple of the
        number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, seq, tensor]
    known = 1
    for s in sizes:
        known *= max(s, 1) if s != -1 else 1
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    given = f"mesh data={data}, fsdp={fsdp}, seq={seq}, tensor={tensor}"
    if known != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"{given} does not fit {len(devices)} devices; the sizes must multiply to that number "
            "(one may be -1 for the rest)"
        )
    slices = num_slices(devices)
    if sizes[0] % slices:
        raise ValueError(
            f"{given} does not fit {slices} slices of {len(devices) // slices} chips: data is "
            f"{sizes[0]} and must be a multiple of {slices}, for it alone crosses the network "
            f"between slices; give data={slices} fsdp=-1, or another multiple"
        )
    # Where an axis must take a part of a dimension of the slice it may; no other is ever split.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_slices(devices):
    """Returns the number of TPU slices that the devices belong to; 1 for other devices.

    jax numbers the hosts of GPUs as slices too. Any axis may cross these, as it may within one.
    """
    tpu = devices[0].platform == "tpu"
    # Devices of a topology with a single slice have no number.
    return len({getattr(d, "slice_index", 0) for d in devices}) if tpu else 1


def spec_of(path, axes, shape, mesh):
    """Returns the PartitionSpec of a parameter; an axis that does not divide evenly stays whole.

    Args:
      path: "llm/blocks/attn/q/kernel".
      axes: logical names, right-aligned against shape.
    """
    rules = next(rule for pattern, rule in RULES if re.fullmatch(pattern, path))
    names = [None] * (len(shape) - len(axes)) + [rules.get(a) for a in axes]
    return P(
        *(
            n if n and size % mesh.shape[n] == 0 else None
            for n, size in zip(names, shape, strict=True)
        )
    )


def rows_sharding(mesh):
    """Returns the sharding of arrays with rows in front: rows over data x fsdp."""
    return NamedSharding(mesh, P(ROWS))


def local_rows(mesh, rows):
    """Returns the numbers of the rows, of so many in all, that devices of this process hold."""
    slices = rows_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (at,) in slices for row in range(rows)[at]}))


def place(x, sharding):
    """Returns a host array as a jax array.

    Every process has the whole array and puts the shards of its own devices in place.
    """
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def place_rows(mesh, x, local=None, rows=None):
    """Returns a host array with rows in front as a jax array with `rows_sharding`.

    Args:
      mesh: the devices.
      x: all rows, or those of `local`.
      local: of `local_rows`; None = all.
      rows: how many rows there are in all, where `local` is given.
    """
    if local is None:
        return place(x, rows_sharding(mesh))

    def shard(at):
        begin, stop, _ = at[0].indices(rows)
        first = local.index(begin)
        return x[first : first + stop - begin]

    return jax.make_array_from_callback((rows, *x.shape[1:]), rows_sharding(mesh), shard)


class Layout(NamedTuple):
    """Mesh axes over which activations [rows, slots, ...] and their heads are spread."""

    rows: tuple = ()
    slots: tuple = ()
    heads: tuple = ()

    def constrain(self, x):
        """Pins [B, S, ...] to the mesh in use."""
        return jax.lax.with_sharding_constraint(x, P(self.rows, self.slots)) if self.rows else x

    def whole_rows(self, x):
        """Pins [B, S, ...] so that the devices of a row have all its slots."""
        return self._replace(slots=()).constrain(x)


def layout_of(module, rows, slots, undivided="error"):
    """Returns the `Layout` of the activations of "vision" or "llm" on the mesh in use.

    The decoder spreads rows over data x fsdp, slots over seq and heads over tensor. The vision
    tower has no tensor parallelism: its rows are spread over data x fsdp x tensor, or where there
    are fewer rows its slots over tensor.

    Args:
      module: "vision" or "llm".
      rows, slots: of the activations.
      undivided: "error", or "whole": slots that do not divide over a mesh axis are not spread over
        it, and its devices all compute the same. For whole views, to which no padding can be added.

    Raises:
      ValueError: rows or slots that do not divide evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Layout()
    layout = Layout(ROWS, ("seq",), ("tensor",))
    if module == "vision":
        layout = Layout((*ROWS, "tensor"), ("seq",))
        if rows % _size(mesh, layout.rows):
            layout = Layout(ROWS, ("seq", "tensor"))
    if undivided == "whole":
        layout = layout._replace(slots=_dividing(mesh, layout.slots, slots))
    if rows % _size(mesh, layout.rows) or slots % _size(mesh, layout.slots):
        raise ValueError(
            f"{rows} rows of {slots} slots of {module} do not divide over the mesh "
            f"{dict(mesh.shape)}: rows go over {layout.rows}, slots over {layout.slots}; change "
            "train.rows (or accumulate), data.budget or the mesh"
        )
    return layout


def look_up(table, tokens, dtype):
    """Returns the rows [B, T, D] of a token table f32[V, D], spread as the decoder's activations.

    Devices that share out the columns of the table look theirs up for each other's rows, and then
    exchange. Without this step in between, XLA sends the gradient of all rows to all devices of a
    mesh with data and fsdp: f32[2, 65536, 1536] in Qwen2.5-1.5B on two v5e-16.
    """
    x = jnp.take(table, tokens, axis=0).astype(dtype)
    mesh, (B, T) = jax.sharding.get_abstract_mesh(), tokens.shape
    if mesh.empty or mesh.size == 1 or B % _size(mesh, ROWS) or T % mesh.shape["seq"]:
        return x
    columns = spec_of("llm/embed/embedding", ("vocab", "embed"), table.shape, mesh)[1]
    if columns:
        x = jax.lax.with_sharding_constraint(x, P("data", "seq", columns))
    return Layout(ROWS, ("seq",)).constrain(x)


def _dividing(mesh, axes, number):
    """Returns as many of the mesh axes as divide a number together, the first of them first."""
    chosen = ()
    for axis in axes:
        chosen += (axis,) * (number % _size(mesh, (*chosen, axis)) == 0)
    return chosen


def _size(mesh, axes):
    return math.prod(mesh.shape[a] for a in axes)


def _shard_map(f, in_specs, out_specs):
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def plan_attention(plan, segments, angles, layout):
    """Returns plan(segments of queries, of keys, first query slot, angles of queries, of keys).

    Each device plans its share.

    Args:
      plan: function returning arrays with rows in front.
      segments: i32[B, S].
      angles: f32[B, S, R / 2] or None.
      layout: a `Layout`. Where slots are shared out, arrays get an axis for the shares after B.
    """
    if not layout.rows:
        return plan(segments, segments, 0, angles, angles)

    def share(mine):
        row = jax.lax.all_gather(mine, layout.slots, axis=1, tiled=True)
        start = jax.lax.axis_index(layout.slots) * mine[0].shape[1]
        planned = plan(mine[0], row[0], start, mine[1], row[1])
        return jax.tree.map(lambda x: x[:, None], planned)

    spec = P(layout.rows, layout.slots)
    return _shard_map(share, spec, spec)((segments, angles))


def map_attention(attend, q, k, v, work, layout):
    """Returns attend(q, k, v, work) [B, T, N, H], each device computing its share.

    Args:
      attend: function of q [B, T, N, H], k and v [B, S, K, H] and the work of `plan_attention`.
      layout: a `Layout`. Heads of queries are shared out; those of keys and values where their
        number allows, otherwise each device has all of them and takes what its queries read.
    """
    if not layout.rows:
        return attend(q, k, v, work)
    mesh, N, K = jax.sharding.get_abstract_mesh(), q.shape[2], k.shape[2]
    parts = _size(mesh, layout.heads)
    if N % parts:
        raise ValueError(
            f"{N} heads do not divide over {parts} devices of the mesh axes {layout.heads}; "
            "make that part of the mesh smaller"
        )
    kv_heads = layout.heads if K % parts == 0 else ()
    share_of_q, group = N // parts, N // K
    if not kv_heads and share_of_q % group and group % share_of_q:
        raise ValueError(
            f"{N} heads of queries over {parts} devices of the mesh axes {layout.heads} are "
            f"{share_of_q} each, which read parts of the groups of {group} that share one of {K} "
            "heads of keys; make that part of the mesh divide the heads of keys, or their groups"
        )

    def share(q, k, v, work):
        k, v = (jax.lax.all_gather(x, layout.slots, axis=1, tiled=True) for x in (k, v))
        if not kv_heads and layout.heads:
            first = jax.lax.axis_index(layout.heads) * q.shape[2] * K // N
            number = -(-q.shape[2] * K // N)
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, number, 2) for x in (k, v))
        return attend(q, k, v, jax.tree.map(lambda x: x[:, 0], work))

    of_q, of_kv = (P(layout.rows, layout.slots, heads) for heads in (layout.heads, kv_heads))
    of_work = P(layout.rows, layout.slots)
    return _shard_map(share, (of_q, of_kv, of_kv, of_work), of_q)(q, k, v, work)


def map_slots(f, x, *whole, layout):
    """Returns f(x, *whole) [B, S, ...], each device computing its rows and slots of [B, S, ...].

    Args:
      f: function that treats every slot alone.
      whole: arrays that all devices have.
      layout: a `Layout`.
    """
    if not layout.rows:
        return f(x, *whole)
    spec = P(layout.rows, layout.slots)
    return _shard_map(f, (spec, *(P(),) * len(whole)), spec)(x, *whole)


def map_tokens(f, *args, weight):
    """Returns f(*args, weight, axis), run shard by shard when a mesh is in use.

    For a program whose loops depend on the tokens a device holds: each device runs its own. Tokens
    are shared out over all devices.

    Args:
      f: function of arrays [B, T, ...], a weight and the mesh axis over which its first dimension
        is spread (None: it is whole), returning such an array.
      args: arrays [B, T, ...].
      weight: [D, V] of the head.
    """
    B, T = args[0].shape[:2]
    layout = layout_of("llm", B, T)
    if not layout.rows:
        return f(*args, weight, None)
    mesh = jax.sharding.get_abstract_mesh()
    axis = spec_of("llm/head/kernel", ("embed", "vocab"), weight.shape, mesh)[0]
    slots = (*layout.slots, *layout.heads)
    spec = P(layout.rows, slots if T % _size(mesh, slots) == 0 else layout.slots)
    return _shard_map(lambda *args: f(*args, axis), (*(spec,) * len(args), P(axis)), spec)(
        *args, weight
    )
