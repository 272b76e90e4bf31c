"""Reads the text of XLA:TPU's scheduled program (`*after_codegen.txt` of `xla_dump_to`).

`compiled.as_text()` is not used: it fails for programs with work on the SparseCore.
"""

import re
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Op(NamedTuple):
    """One instruction. `text` is its line after the operands; of a constant, from its value on."""

    name: str
    shape: str
    kind: str
    operands: tuple
    text: str
    root: bool

    def attribute(self, name):
        """Returns the computation or the word after `name=`, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def op_name(self):
        """The path of named scopes that jax gave the operation, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def cycles(self):
        """XLA's own estimate, or None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @property
    def target(self):
        """What a custom call calls, or None."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found and found[1]


class Module(NamedTuple):
    """A program: {name: list of `Op` in the order of the schedule}, and the entry's name."""

    computations: dict
    entry: str

    def inside(self, op):
        """Yields the ops that a fusion or an asynchronous op calls, and what these call."""
        for name in re.findall(r"\b(?:calls|called_computations)=\{?%([\w.\-]+)", op.text):
            for x in self.computations.get(name, ()):
                yield x
                yield from self.inside(x)


def split_shape(text):
    """Returns (shape, rest) of "(f32[2]{0}, s32[]) fusion(...)": shapes may nest parentheses."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def instruction(line):
    """Returns the `Op` of a line, or None."""
    found = INSTRUCTION.match(line)
    if not found:
        return None
    shape, rest = split_shape(found[3])
    kind, _, rest = rest.partition("(")
    inside, _, text = rest.partition(")")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    text = rest if kind == "constant" else text
    return Op(found[2], shape, kind, operands, text, bool(found[1]))


def parse(text):
    """Returns the `Module` of a dump."""
    computations, entry, current = {}, None, None
    # The metadata of kernels may run over several lines.
    for line in re.sub(r"\n(?=[^\s%}E]|\}\})", " ", text).split("\n"):
        if header := HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (op := instruction(line)):
            current.append(op)
    return Module(computations, entry)


def num_bytes(shape):
    """Returns the bytes of a shape, or of a tuple of shapes, without layout padding."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        width = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
        total += width * np.prod([int(d) for d in dims.split(",") if d], dtype=np.float64)
    return int(total)


def members(text):
    """Returns the devices of a collective that work together, as a list of lists of partitions.

    Args:
      text: of the op. Groups are written {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), or
        mesh['a'=2,'b'=8] {'a','b':(2)4}, where 'b':(2)4 is the middle axis of b cut in 2 x 4 x 1;
        of a permutation, source_target_pairs={{0,1},{1,0}}, each pair is a list.
    """
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return _lists(found[1])
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return _lists(found[1])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\]\S*)", text):
        return _iota(found[3]).reshape(int(found[1]), int(found[2])).tolist()
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text
    )
    if not found:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    shape, names = [], []
    for name, size in sizes.items():
        # A name with sub-axes is cut at all their borders.
        cuts = {1, size}
        for pre, part in re.findall(rf"'{re.escape(name)}':\((\d+)\)(\d+)", found[3]):
            cuts |= {int(pre), int(pre) * int(part)}
        cuts = sorted(cuts)
        for a, b in zip(cuts, cuts[1:], strict=False):
            shape.append(b // a)
            names.append((name, a))
    inside = set()
    for name, pre, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        low = int(pre or 1)
        high = low * int(part) if part else sizes[name]
        inside |= {(n, a) for n, a in names if n == name and low <= a < high}
    if found[2] and "[" in found[2]:
        ids = _iota(found[2]).ravel()
    else:
        ids = [int(d) for d in found[2].split(",")] if found[2] else range(int(np.prod(shape)))
    axes = [i for i, n in enumerate(names) if n not in inside]
    axes += [i for i, n in enumerate(names) if n in inside]
    size = int(np.prod([s for s, n in zip(shape, names, strict=True) if n in inside]))
    return np.array(ids).reshape(shape).transpose(axes).reshape(-1, size).tolist()


def _lists(text):
    return [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text):
    """Returns the array "[2,4]T(1,0)" stands for: numbers in order, reshaped, transposed."""
    dims, perm = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    x = np.arange(np.prod([int(d) for d in dims.split(",")])).reshape(
        [int(d) for d in dims.split(",")]
    )
    return x.transpose([int(p) for p in perm.split(",")]) if perm else x


def trips(module, computation, loop):
    """Returns how often a while loop runs, or None when its bound is not a constant.

    Args:
      computation: name of the one that has the loop.
      loop: the while `Op`; its condition compares a counter, from 0 or another constant, with a
        constant, or with an element of the carry that no iteration changes.
    """
    ops = {op.name: op for op in module.computations[computation]}
    condition = {op.name: op for op in module.computations[loop.attribute("condition")]}
    root = next(op for op in condition.values() if op.root)
    if root.kind != "compare" or "direction=LT" not in root.text:
        return None
    initial = ops.get(loop.operands[0])

    def value(op):
        if op.kind == "get-tuple-element" and initial is not None and initial.kind == "tuple":
            op = ops.get(initial.operands[int(op.attribute("index"))])
            while op is not None and op.kind in ("copy", "bitcast", "copy-done", "copy-start"):
                op = ops.get(op.operands[0])
        found = op is not None and op.kind == "constant" and re.match(r"-?\d+", op.text)
        return int(found[0]) if found else None

    counter, bound = (value(condition[name]) for name in root.operands)
    return None if bound is None else max(bound - (counter or 0), 0)
