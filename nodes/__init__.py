"""The nodes: schema, tooltips, validation, one call into `host/`. One class a file."""

from ..host import compat

compat.check_host()  # a host that is too old is told so before an import of what it lacks fails

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from ..host.files import register_gguf_folder  # noqa: E402
from .compile_model import CompileModel  # noqa: E402
from .fragility_report import FragilityReport  # noqa: E402
from .inspect_quantized_model import InspectQuantizedModel  # noqa: E402
from .load_clip_gguf import LoadClipGguf  # noqa: E402
from .load_diffusion_model_gguf import LoadDiffusionModelGguf  # noqa: E402
from .load_diffusion_model_int8 import LoadDiffusionModelInt8  # noqa: E402
from .load_dual_clip_gguf import LoadDualClipGguf  # noqa: E402
from .profile_activations import ProfileActivations  # noqa: E402
from .save_as_gguf import SaveAsGguf  # noqa: E402
from .save_as_int8 import SaveAsInt8  # noqa: E402
from .verify_quantized import VerifyQuantized  # noqa: E402


class LowbitExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def on_load(self) -> None:
        register_gguf_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadDiffusionModelInt8,
            LoadDiffusionModelGguf,
            LoadClipGguf,
            LoadDualClipGguf,
            CompileModel,
            InspectQuantizedModel,
            SaveAsInt8,
            SaveAsGguf,
            ProfileActivations,
            FragilityReport,
            VerifyQuantized,
        ]
