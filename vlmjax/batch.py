"""The packed `Batch`: the only thing that crosses from the host to the device.

Made by the host (numpy), consumed by the device (jax); a NamedTuple, so it is a jax
pytree without importing jax.

A batch has B independent rows with fixed budgets: T token slots, P patch slots and U visual-token
slots. Several samples share a row; a sample never spans two rows, so nothing about a row ever needs
another row. Example of one row with T=12, P=9, U=3 and merge size 2 holding an image of 2x4 patches
(two visual tokens) and a text-only sample:

    tokens     <u> <img> <img> what ? <a> cat <e> | hi <e> | - -
    segments    1    1     1    1   1  1   1   1  |  2  2  | 0 0      0 is padding
    positions   0    1     2    3   4  5   6   7  |  0  1  | 0 0      restart at 0 in each sample
    source     -1    0     1   -1  -1 -1  -1  -1  | -1 -1  | -1 -1    visual token of the slot
    targets     .    .     .    .   . cat <e>  .  | <e> .  | . .      the next token (shifted)
    weights     0    0     0    0   0  1   1   0  |  1  0  | 0 0      of each target in the loss

    patches.segments  1 1 1 1 1 1 1 1 0     one segment per image, frame or tile
    units.index       (0 1 2 3) (4 5 6 7) (-1 -1 -1 -1)   the patches of each kept visual token

Each encoder has its own patch buffer (Cambrian-1 has four), each source of the connector its own
units: what a connector maps at once, a window of patches or a whole picture. The learned vectors of
a connector (an image's newline, the marks of its begin and end) follow the visual tokens.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class UnitRule:
    """Which patches a connector maps at once: a window of a grid, or a whole map.

    A grid is that of a view, or of several views laid side by side. In a list of units, i32[U, G]
    slots of the encoder's output, -1 is no patch (the connector reads zeros) and -2 - slot a patch
    that is there but must not be attended to.

    Attributes:
      kind: "window" or "map".
      side: rows and columns of a window; its patches come in reading order.
      pad: whether windows at the right and bottom edge may be incomplete; otherwise the rest of the
        grid is left out.
      order: of windows, "row" or "column" after column; of the patches of a map, "row" or "cell"
        after cell of an `out` grid of equal rectangles.
      out: rows and columns of the tokens of a map, None where a token has no place in it.
      prefix: slots in front of the patches of a map: class token, registers.
    """

    kind: str = "window"
    side: int = 1
    pad: bool = True
    order: str = "row"
    out: tuple[int, int] | None = None
    prefix: int = 0

    def __post_init__(self):
        orders = {"window": ("row", "column"), "map": ("row", "cell")}
        if self.kind not in orders or self.order not in orders[self.kind] or self.side < 1:
            raise ValueError(
                f"{self} is not a rule: kind is one of {sorted(orders)} with order "
                f"{' or '.join(map(str, orders.values()))}, and side is at least 1"
            )
        if self.order == "cell" and self.out is None:
            raise ValueError(
                f"{self}: order='cell' needs the grid of cells; set out=(rows, columns)"
            )


class Patches(NamedTuple):
    """Packed patches of one encoder: views (images, frames or tiles) one after another in each row.

    The slots in front of a view are those of its class token (k = 0) and registers (k = 1, ...);
    their pixels are arbitrary and their coordinates are (-1 - k, 0).
    """

    pixels: np.ndarray  # u8[B, P, C*p*p] raw, or floating: already normalised; channel-major
    segments: np.ndarray  # i32[B, P]; one number for each view, in order; 0 = padding at the end
    coords: np.ndarray  # f32[B, P, 2]; row and column in the frame of the encoder


class Units(NamedTuple):
    """What one source gives the connector, or visual tokens that are pooled after it."""

    index: np.ndarray  # i32[B, U, G]; slots of the encoder's output, -1 = none
    weights: np.ndarray | None = None  # f32[B, U, G]
    size: np.ndarray | None = None  # i32[B, U, 2]; rows and columns of the unit


class Routed(NamedTuple):
    """The token slots that parameters of their own serve (visual experts, in-decoder SVA)."""

    slots: np.ndarray  # i32[B, W]; -1 = none
    index: np.ndarray  # i32[B, T]; index into W, or -1


@dataclasses.dataclass(frozen=True)
class TowerForm:
    """What the host knows of an encoder.

    Attributes:
      patch: pixels on a side of a patch.
      prefix: slots in front of the patches of each view.
      position: where patches lie in the frame of the encoder, a key of `data.coords.COORDS`.
      side: of its position table.
      out: (rows, columns) of its output slots of a view; None = one for each input slot.
    """

    patch: int
    prefix: int = 0
    position: str = "grid"
    side: int = 0
    out: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """What the batches of a model hold, whatever their budgets.

    Attributes:
      towers: of each encoder.
      encoders: the encoder of each source of the connector.
      weighted: whether units carry weights.
      unit: what the units of a picture are.
      groups: (sources, tokens): the connector maps the units of these sources together, each unit
        to so many visual tokens; those of the first group come first.
      specials: names of the learned vectors behind the visual tokens.
      pool: of visual tokens after the connector, "none", "max" or "weighted".
      routed: which tokens have parameters of their own: "none", "expert" (those of a picture but
        the last) or "queries" (each visual token before pooling, for SVA in the decoder).
    """

    towers: tuple = (TowerForm(0),)
    encoders: tuple = (0,)
    weighted: bool = False
    unit: UnitRule = UnitRule()
    groups: tuple = (((0,), 1),)
    specials: tuple = ()
    pool: str = "none"
    routed: str = "none"

    def visual(self, budget):
        """Returns the slots of visual tokens in a row."""
        if self.pool != "none":
            return budget.pool[0]
        return sum(budget.visual[sources[0]] * tokens for sources, tokens in self.groups)


def _tuple(value):
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),)


@dataclasses.dataclass(frozen=True, order=True)
class Budget:
    """Slots of a row. A number in place of a tuple stands for a tuple of one.

    Attributes:
      tokens: of the decoder.
      patches: of each encoder, prefix tokens included.
      visual: units of each source of the connector.
      group: patches of a unit, at most, of each source.
      pool: visual tokens after pooling, and how many of them form one at most.
      routed: tokens served by parameters of their own.
    """

    tokens: int
    patches: tuple
    visual: tuple
    group: tuple = (4,)
    pool: tuple = (0, 0)
    routed: int = 0

    def __post_init__(self):
        for name in ("patches", "visual", "group"):
            object.__setattr__(self, name, _tuple(getattr(self, name)))
        if self.tokens < 1 or min(self.group) < 1 or min(self.patches + self.visual) < 0:
            raise ValueError(
                f"{self} is not a budget: tokens and group must be at least 1, patches and visual "
                "at least 0 (0 for text-only rows)"
            )
        if len(self.visual) != len(self.group) or len(set(map(bool, self.limits[1:-2]))) > 1:
            raise ValueError(
                f"{self}: patches and visual must all be positive, or all 0 for text-only rows, "
                "and visual and group have a number for each source of the connector"
            )

    @classmethod
    def largest(cls, budgets):
        """Returns the budget whose rows hold what a row of any of these holds."""
        fields = [f.name for f in dataclasses.fields(cls)]
        values = {name: [np.asarray(getattr(b, name)) for b in budgets] for name in fields}
        most = {name: np.max(v, 0).tolist() for name, v in values.items()}
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in most.items()})

    @property
    def limits(self):
        """The slots that samples share, as `data.pack.size` counts what a sample takes."""
        return (self.tokens, *self.patches, *self.visual, self.pool[0], self.routed)

    @property
    def names(self):
        """Of the entries of `limits`."""

        def numbered(name, values):
            return [f"{name} of {i}" if len(values) > 1 else name for i in range(len(values))]

        return (
            "tokens",
            *numbered("patches", self.patches),
            *numbered("visual tokens", self.visual),
            "pooled visual tokens",
            "routed tokens",
        )


class Batch(NamedTuple):
    """B packed rows. Arrays are numpy on the host, jax on the device; see the module docstring."""

    tokens: np.ndarray  # i32[B, T]; placeholders keep their id, `source` decides
    positions: np.ndarray  # i32[B, T]
    segments: np.ndarray  # i32[B, T]; 1, 2, ... in order, 0 = padding at the end
    targets: np.ndarray  # i32[B, T]; arbitrary where the weight is 0
    weights: np.ndarray  # f32[B, T]
    source: np.ndarray  # i32[B, T]; index into visual tokens and, after them, specials; or -1
    patches: tuple[Patches, ...]  # of each encoder
    units: tuple[Units, ...]  # of each source of the connector
    pool: Units | None = None  # of visual tokens
    routed: Routed | None = None

    @property
    def has_vision(self):
        """Whether rows have patch slots; without, no vision tower runs."""
        return bool(self.patches) and self.patches[0].segments.shape[1] > 0


def empty_batch(rows, budget, form):
    """Returns a Batch of padding only, to be filled by the packer or to stand for shapes.

    Args:
      rows: B.
      budget: a `Budget`.
      form: the `Form` of the model's batches.
    """
    b, t = rows, budget.tokens

    def none(*shape):
        return np.full((b, *shape), -1, np.int32)

    def zeros(*shape, dtype=np.int32):
        return np.zeros((b, *shape), dtype)

    return Batch(
        tokens=zeros(t),
        positions=zeros(t),
        segments=zeros(t),
        targets=zeros(t),
        weights=zeros(t, dtype=np.float32),
        source=none(t),
        patches=tuple(
            Patches(
                zeros(p, 3 * tower.patch**2, dtype=np.uint8),
                zeros(p),
                zeros(p, 2, dtype=np.float32),
            )
            for p, tower in zip(budget.patches, form.towers, strict=True)
        ),
        units=tuple(
            Units(
                none(u, g),
                zeros(u, g, dtype=np.float32) if form.weighted else None,
                zeros(u, 2) if form.unit.kind == "map" else None,
            )
            for u, g in zip(budget.visual, budget.group, strict=True)
        ),
        pool=Units(none(*budget.pool), zeros(*budget.pool, dtype=np.float32))
        if form.pool != "none"
        else None,
        routed=Routed(none(budget.routed), none(t)) if budget.routed else None,
    )
