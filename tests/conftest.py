"""What all tests share: compiled programs leave the process with the module that compiled them."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Each compiled program of the CPU holds several memory mappings, of which a process may have 65,530.

    The whole suite compiles more than that; later tests find what they share in the compilation cache on the disk.
    """
    yield
    jax.clear_caches()
    gc.collect()
