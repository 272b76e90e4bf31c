"""Shared set-up. The folder itself is importable (`import tiny`, `import hf_reference`).

Tests compile hundreds of tiny programs and run each a few times, so compilation is told to hurry,
and its results are shared between tests and with the processes that tests start.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "vlmjax-test-compilations")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
