"""Norms whose weight lies in the model's dtype, for the operations class of a load."""

from __future__ import annotations


class LowbitNorm:
    """A norm's weight is loaded in the dtype that the model was built in.

    GGUF files hold vectors in float32. With dynamic VRAM the host casts them to that dtype anyway, but keeps what is
    larger than 16 KiB among the weights that it looks after at every call, which takes as long as launching a kernel:
    Ideogram 4's four norms of a block have 18 KiB each in float32 and 9 in bfloat16.
    """

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, parameter in self.named_parameters(recurse=False):
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"].to(parameter.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
