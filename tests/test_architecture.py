"""The shape of the code: imports point one way, host code never sees jax, files stay short."""

import ast
import graphlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Shipped with exports as it is, never imported here: it runs beside transformers, without us.
TEMPLATE = sorted(ROOT.glob("vlmjax/hf/template/*.py"))
ALL = [*ROOT.glob("vlmjax/**/*.py"), *ROOT.glob("configs/**/*.py")]
FILES = sorted(set(ALL) - set(TEMPLATE))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
BY_HAND = ("vlmjax.data.demo.build_assets", "vlmjax.data.demo.build_tokenizer")

# A module may import those of its own layer and below; the longest matching prefix counts.
LAYERS = {
    "vlmjax.batch": 0,
    "vlmjax.sharding": 0,
    "vlmjax.kernels": 0,
    "vlmjax.data": 0,  # and only the batch: test_data_imports_only_the_batch
    "vlmjax.nn": 1,
    "vlmjax.rope": 1,
    "vlmjax.attention": 1,
    "vlmjax.lora": 1,
    "vlmjax.vision": 2,
    "vlmjax.connectors": 2,
    "vlmjax.llm": 2,
    "vlmjax.vlm": 3,
    "vlmjax.train.optimizer": 3,  # a config section and the pure step, which know no model
    "vlmjax.train.moments": 3,
    "vlmjax.compatible": 4,
    "vlmjax.build": 4,
    "vlmjax.objectives": 4,
    "vlmjax.hf": 4,
    "vlmjax.checkpoint": 4,
    "vlmjax.train": 5,
    "vlmjax.generate": 5,
    "vlmjax.aot": 5,
    "vlmjax.evals": 5,
    "vlmjax.main": 6,
    "vlmjax": 6,  # vlmjax/__init__.py only, a door that opens on use
}
# Package -> the modules that may import it.
ONLY = {
    "torch": (),
    "torchvision": (),
    "safetensors": (),
    "transformers": ("vlmjax.hf", "vlmjax.data.tokenizer"),
    "tokenizers": ("vlmjax.data.tokenizer", *BY_HAND),
    "orbax": ("vlmjax.checkpoint",),
}
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax"}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file) for file in FILES}


def imports(file, top_level=False):
    """The modules a file imports: ours in full, of others the package."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {x if x in NAMES else node.module for x in inner}
    return {x if x.split(".")[0] in ("vlmjax", "configs") else x.split(".")[0] for x in found}


def below(name, prefixes):
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def layer(name):
    fits = [p for p in LAYERS if p == name or (p != "vlmjax" and below(name, [p]))]
    assert fits, f"{name} has no layer; give it one in LAYERS"
    return LAYERS[max(fits, key=len)]


EDGES = {name_of(file): imports(file) for file in FILES}


def test_imports_point_one_way():
    edges = [(a, b) for a, found in EDGES.items() for b in found if b.startswith("vlmjax")]
    assert not [(a, b) for a, b in edges if a.startswith("vlmjax") and layer(b) > layer(a)]
    graph = {name_of(file): imports(file, top_level=True) & NAMES for file in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


def test_data_imports_only_the_batch():
    for name, found in EDGES.items():
        if below(name, ["vlmjax.data", "vlmjax.batch"]):
            ours = {x for x in found if x.startswith("vlmjax")}
            assert all(below(x, ["vlmjax.data", "vlmjax.batch"]) for x in ours), (name, ours)
            assert not found & DEVICE, name


def test_configs_import_only_ml_collections_and_what_configs_share():
    for name, found in EDGES.items():
        if name.startswith("configs"):
            allowed = () if name == "configs.common" else ("ml_collections", "configs.common")
            assert found <= set(allowed), name


@pytest.mark.parametrize("package", ONLY)
def test_confined_packages(package):
    users = {name for name, found in EDGES.items() if package in found}
    assert all(below(name, ONLY[package]) for name in users), users


def test_the_code_of_exports_needs_only_torch_and_transformers():
    """A checkpoint travels without us; beside relative imports of what lies in its directory."""
    for file in TEMPLATE:
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
        outside = {x.split(".")[0] for x in found} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "numpy", "PIL", "transformers"}, file


def test_every_package_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *(x for name in extras if name != "test" for x in extras[name]),
    ]
    distributions = {x.split(">")[0].split("<")[0].split("=")[0].strip() for x in declared}
    renamed = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "PIL"}
    known = {renamed.get(d, d).replace("-", "_") for d in distributions}
    known |= {"tokenizers"}  # comes with transformers
    for name, found in EDGES.items():
        outside = {x for x in found if not x.startswith(("vlmjax", "configs"))} - set(
            sys.stdlib_module_names
        )
        assert outside <= known or name in BY_HAND, (name, outside - known)


def test_host_processing_never_loads_jax():
    """At run time, whatever the imports lead to; also once a tokenizer of transformers is made."""
    code = f"""
import sys
import vlmjax.batch, vlmjax.data.pack, vlmjax.data.processor, vlmjax.data.stream
import vlmjax.data.demo, vlmjax.data.sources, vlmjax.data.strategies, vlmjax.data.arrange
loaded = set(sys.modules) & {DEVICE | {"torch", "transformers"}!r}
from vlmjax.data.tokenizer import byte_tokenizer
byte_tokenizer().encode("a")
print(sorted(loaded | set(sys.modules) & {DEVICE!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_files_and_functions_are_short():
    long = []
    for file in [*FILES, *TEMPLATE, *TESTS]:
        text = file.read_text()
        if (lines := text.count("\n")) > 400:
            long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long, long


def test_no_module_is_a_drawer():
    forbidden = {"utils", "util", "misc", "base", "common", "helpers", "helper"}
    parts = {part for name in NAMES if name.startswith("vlmjax") for part in name.split(".")}
    assert not parts & forbidden
