"""TPU slices by name: their devices, and what is known of their chips.

A name is "v5e:4x4" (chips along each dimension) or that of a Cloud slice, "v5e-16", "v5p-64" (the
v5p counts two cores a chip: 32 chips) or "v6e-256". "2xv5e-16" is two of them, joined by the
network of the data centre.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      hbm_bytes: what XLA lets a program use.
      hbm_bandwidth: bytes/s, from the data sheet.
      clock: Hz of the cycles XLA estimates.
      link_bandwidth: bytes/s of one ICI link in one direction, as commonly achieved
        (https://jax-ml.github.io/scaling-book/tpus).
      network_bandwidth: bytes/s of a chip's share of the network between slices in one direction,
        from the data sheets (https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e): 6.4 Tbit/s of
        256 chips, 50 Gbit/s of one, 25.6 Tbit/s of 256.
      cores: in the name of a Cloud slice, for each chip.
      host_bandwidth: bytes/s to the memory of the host over PCIe; an assumption.
    """

    hbm_bytes: int
    hbm_bandwidth: float
    clock: float
    link_bandwidth: float
    network_bandwidth: float
    cores: int = 1
    host_bandwidth: float = 16e9


GiB = 2**30
HOP = 1e-6  # seconds from chip to chip, however little is sent; also of the scaling book
CHIPS = {
    "v5e": Chip(int(15.75 * GiB), 0.819e12, 1.5e9, 45e9, 3.125e9),
    "v5p": Chip(int(95.73 * GiB), 2.765e12, 1.75e9, 90e9, 6.25e9, cores=2),
    "v6e": Chip(int(31.24 * GiB), 1.640e12, 1.75e9, 90e9, 12.5e9),
}
# The slices that Cloud TPU sells, named there by their number of chips (v5p: of cores).
SOLD_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLD_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {
    kind: {math.prod(map(int, dims.split("x"))): dims for dims in sold}
    for kind, sold in (("v5e", SOLD_2D), ("v5p", SOLD_3D), ("v6e", SOLD_2D))
}
# Without these libtpu asks a metadata server, and says on stderr that it got no answer.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class Topology:
    """The devices of a slice, or of several equal ones.

    Attributes:
      name: "v5e:4x4" or "2xv5e:4x4".
      slices: how many.
      chip: its `Chip`.
      kind: key of `CHIPS`.
      devices: as jax gives them; `sharding.make_mesh` takes them.
      shape: chips along each dimension of a slice.
      wrap: whether a dimension is a ring.
    """

    def __init__(self, name):
        self.slices, self.kind, self.shape = parse(name)
        one = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        self.name = one if self.slices == 1 else f"{self.slices}x{one}"
        self.chip = CHIPS[self.kind]
        self.wrap = wraps(self.kind, self.shape)
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                "compiling for a TPU needs libtpu, which is not installed; "
                "pip install 'vlmjax[aot]'"
            )
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        try:
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=one,
                wrap=[*self.wrap, False][:3],
                num_slices=self.slices,
            )
        except jax.errors.JaxRuntimeError as e:
            raise ValueError(f"--topology={name!r} is refused by libtpu: {e}; {EXAMPLES}") from e
        self.devices = found.devices

    def collective_seconds(self, kind, num_bytes, members):
        """Returns the seconds a collective takes at least, by the ICI links of its worst chip.

        All links of a chip that lead along dimensions the group spans work at once: two of a ring,
        one at the end of a line. Of an all-to-all half crosses the middle of the longest dimension.
        Data goes round every dimension, or half round a ring, at `HOP` a chip.

        Args:
          kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
          num_bytes: of the whole array (all-gather: gathered; reduce-scatter: before scattering),
            on one chip.
          members: devices of one slice that take part together.
        """
        n = len(members)
        coords = np.array([d.coords for d in members])[:, : len(self.shape)]
        lengths = [len(set(c)) for c in coords.T]
        rings = [w and e == s for w, e, s in zip(self.wrap, lengths, self.shape, strict=True)]
        links = sum(1 + ring for ring, e in zip(rings, lengths, strict=True) if e > 1)
        if n == 1 or not links:
            return 0.0
        one = num_bytes / self.chip.link_bandwidth
        if kind == "collective-permute":
            return one + HOP
        way = sum((e - 1) / (1 + ring) for e, ring in zip(lengths, rings, strict=True)) * HOP
        if kind == "all-to-all":
            e = max(lengths)
            return way + one * e / (8 if rings[lengths.index(e)] else 4)
        return (way + one / links * (n - 1) / n) * (2 if kind == "all-reduce" else 1)

    def sent_bytes(self, kind, num_bytes):
        """Returns the bytes that a chip sends to other slices in a collective, at the least.

        Args:
          kind: as above; there is one chip of each slice in it.
          num_bytes: what the chip gives to it.
        """
        n = self.slices
        shares = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
        return num_bytes * shares.get(kind, (n - 1) / n)


EXAMPLES = "known are v5e:4x4, v5p:2x4x4, v6e:16x16 and the like, or Cloud names " + ", ".join(
    f"{kind}-{chips * CHIPS[kind].cores}" for kind in SLICES for chips in (16, 64, 256)
)
EXAMPLES += "; several slices are 2xv5e-16 and the like"


def parse(name):
    """Returns (slices, kind, chips along each dimension of one) of a name.

    Raises:
      ValueError: an unknown name, with examples.
    """
    slices, one = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name).groups()
    kind, _, dims = one.partition(":")
    if not dims and "-" in one:
        kind, _, count = one.partition("-")
        cores = CHIPS[kind].cores if kind in CHIPS else 1
        chips = int(count) // cores if count.isdigit() and not int(count) % cores else None
        dims = SLICES.get(kind, {}).get(chips, "")
    sizes = dims.split("x")
    rank = {"v5e": 2, "v5p": 3, "v6e": 2}.get(kind)
    if len(sizes) != rank or not all(s.isdigit() and int(s) for s in sizes):
        raise ValueError(f"--topology={name!r} is unknown; {EXAMPLES}")
    return int(slices or 1), kind, tuple(map(int, sizes))


def wraps(kind, shape):
    """Returns for each dimension whether its ends are linked.

    A v5p slice is a torus when it is made of whole 4x4x4 cubes; v5e and v6e have rings along
    dimensions of 16 only (https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm).
    """
    if kind == "v5p":
        return (all(s % 4 == 0 for s in shape),) * 3
    return tuple(s == 16 for s in shape)
