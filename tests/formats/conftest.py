import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "ggml_blocks.npz"


@pytest.fixture(scope="session")
def golden():
    """What the C library made of the matrix `src`: `<type>_bytes` and `<type>_values` of each type."""
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays.files}
