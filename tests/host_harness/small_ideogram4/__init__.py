"""Test-only custom node folder: makes the host accept the small models, and adds nodes that a test needs."""


async def comfy_entrypoint():
    from .nodes import SmallModelsExtension
    from .patch import patch

    patch()
    return SmallModelsExtension()
