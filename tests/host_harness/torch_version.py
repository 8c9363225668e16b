"""What older releases of torch cannot compile, for tests to skip with the reason."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

HOSTS_COMPILE_NODE = pytest.mark.skipif(
    TORCH < (2, 9), reason=f"ComfyUI's own compile node needs torch 2.9, this is {torch.__version__}"
)
HOSTS_BYPASS_IN_ONE_GRAPH = pytest.mark.skipif(
    TORCH < (2, 8), reason=f"torch 2.8 and newer follow ComfyUI's bypass LoRA, this is {torch.__version__}"
)
