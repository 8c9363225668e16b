"""Checkpoint files: from an untrusted file to named tensors and quantized weights, as views on the file."""

from .checkpoint import CheckpointFile, Omitted, StoredTensor
from .checkpoint_file import open_checkpoint
from .errors import CheckpointError
from .mapped_file import MappedFile

__all__ = ["CheckpointError", "CheckpointFile", "MappedFile", "Omitted", "StoredTensor", "open_checkpoint"]
