"""The ComfyUI side: how quantized weights become the host's own tensors, modules and models."""
