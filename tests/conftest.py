"""Settings of every test: CPU, and compiled programs kept from one run of the tests to the next.

They are environment variables so that tests without JAX do not import it, and subprocesses obey too.
"""

import os
import sys
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """One process runs every file; kept, the programs of all of them would take 8 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
