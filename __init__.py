"""Lowbit: quantized diffusion transformers (INT8 W8A8 and GGUF) for ComfyUI.

Importing the package costs nothing: ComfyUI calls `comfy_entrypoint`, and only that imports the nodes.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that ComfyUI registers."""
    from .nodes import LowbitExtension

    return LowbitExtension()
