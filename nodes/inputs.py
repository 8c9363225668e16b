"""Inputs and outputs that the loader nodes share: one wording, one order, required inputs first as on the page."""

from comfy_api.latest import io

from ..host import files, model


def checkpoint(names: list[str], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("checkpoint", options=names, tooltip=tooltip)


def unconditional(names: list[str]) -> io.Combo.Input:
    return io.Combo.Input(
        "unconditional",
        options=[model.SAME_FILE, model.NONE, *names],
        default=model.SAME_FILE,
        tooltip="Where model_negative comes from. 'same file': the file's own unconditional branch; for models with "
        "one weight set, such as Flux, model_negative is the same model. 'none': always the same model. Or pick the "
        "file of the unconditional branch.",
    )


def compute_mode() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_mode",
        options=list(model.COMPUTE_MODES),
        default="auto",
        tooltip="auto: int8 for INT8 files and GGUF types below 6 bits where the Triton kernels run (NVIDIA, RTX 30 or "
        "newer), else exact. exact: "
        "weights are unpacked and computed in the model's dtype, what the file means. int8: activations are quantized "
        "too and INT8 units compute the product, a little less exact.",
    )


def dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=list(model.DTYPES),
        default="default",
        tooltip="Of activations and unquantized weights. 'default' lets ComfyUI choose for this model and GPU; fp16 "
        "gives black images with models that overflow in it.",
        advanced=True,
    )


def base_checkpoint(name: str, names: list[str], of_what: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=[model.NONE, *names],
        default=model.NONE,
        optional=True,
        tooltip=f"Only for INT8 files that hold linear layers alone: the FP8 or BF16 release{of_what}, which supplies "
        "norms and embeddings. It is compared with the INT8 file, so a wrong one is noticed.",
    )


def protected_layers() -> io.String.Input:
    return io.String.Input(
        "protected_layers",
        default="",
        optional=True,
        advanced=True,
        tooltip="Only while quantizing a BF16, FP16 or FP8 checkpoint: parts of layer names, separated by commas, "
        "or patterns with *, that stay unquantized: feed_forward.w2, layers.0.*. Costs memory and speed, gains "
        "quality.",
    )


def tune_kernels() -> io.Boolean.Input:
    return io.Boolean.Input(
        "tune_kernels",
        default=True,
        optional=True,
        advanced=True,
        tooltip="Measures once which variant of the INT8 kernel is fastest on this GPU, at most 3 seconds in the first "
        "image, and remembers it. Off: uses the variant that is usually best.",
    )


def text_encoder_device(stock: dict) -> io.Combo.Input:
    """stock: the inputs of the host's own node."""
    return io.Combo.Input(
        "device",
        options=list(stock["optional"]["device"][0]),
        default="default",
        optional=True,
        advanced=True,
        tooltip="default: the GPU, where there is one. cpu: encodes on the CPU, slow, without GPU memory.",
    )


def model_outputs() -> list[io.Model.Output]:
    return [
        io.Model.Output(
            "model", display_name="model", tooltip="The model; the conditional branch of a two-branch one."
        ),
        io.Model.Output(
            "model_negative",
            display_name="model_negative",
            tooltip="The unconditional branch, for the input of the same name of Dual Model CFG Guider; the same "
            "model where there is none.",
        ),
    ]


def fingerprint(*names: str | None) -> list[str]:
    """What ComfyUI compares to tell whether a loader has to run again: the state of every file picked in its widgets.

    Names that come through a link are not known here, and are None: their loader runs again once its file was refused.
    """
    states = picked_states(*names)
    return states if names[0] is not None else [*states, str(files.refusals())]


def text_encoder_fingerprint(*names: str | None) -> list[str]:
    """`fingerprint` for files of models/text_encoders."""
    states = [repr(files.file_state(files.text_encoder_path(name))) for name in names if name is not None]
    return [*states, str(files.refusals())] if None in names else states


def picked_states(*names: str | None) -> list[str]:
    """The state of every file among the names that are picked in a node's widgets; None came through a link."""
    picked = [name for name in names if name not in (None, model.SAME_FILE, model.NONE)]
    return [repr(files.file_state(files.full_path(name))) for name in picked]


def path_or_choice(name: str) -> str:
    """The path of a picked file; `same file` and `none` stay as they are."""
    return name if name in (model.SAME_FILE, model.NONE) else files.full_path(name)


def optional_path(name: str) -> str | None:
    """The path of a picked file, None for `none`."""
    return None if name == model.NONE else files.full_path(name)
