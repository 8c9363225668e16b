"""Inputs that the two save nodes share, in the order of the page."""

from comfy_api.latest import io

from ..host import convert, files, model
from . import inputs


def files_to_convert(default_name: str) -> list[io.Input]:
    names = sorted([*files.list_safetensors(), *files.list_gguf()])
    return [
        io.Combo.Input(
            "checkpoint",
            options=names,
            tooltip="What to convert, from models/diffusion_models: BF16, FP16, FP32, FP8, INT8 or GGUF. The file is "
            "read piece by piece: it may be larger than the memory.",
        ),
        io.Combo.Input(
            "unconditional",
            options=[model.SAME_FILE, *names],
            default=model.SAME_FILE,
            tooltip="'same file': converts every branch that the checkpoint holds. Or pick the file of the "
            "unconditional branch, beside which the checkpoint gives the conditional one.",
        ),
        io.String.Input(
            "filename",
            default=default_name,
            tooltip=f"Name of the file to write, in output/{convert.TARGET_FOLDER}, where the loaders find it (press "
            "R).",
        ),
        io.Combo.Input(
            "branches",
            options=list(convert.BRANCH_FILES),
            default=convert.BRANCH_FILES[0],
            tooltip="Only for two branches. 'one file each': the unconditional branch is written to <filename>_uncond; "
            "other programs read such files too. 'one file for both': Lowbit's loaders read it.",
        ),
        io.Boolean.Input(
            "overwrite", default=False, tooltip="Whether a file of this name is replaced. Off: the node refuses."
        ),
    ]


def protection() -> list[io.Input]:
    return [
        io.String.Input(
            "protected_layers",
            default="",
            optional=True,
            tooltip="Layers that stay unquantized, separated by commas: names, parts of names such as feed_forward.w2, "
            "or patterns such as layers.3?.*. Costs size, gains quality.",
        ),
        io.String.Input(
            "fragility_report",
            default="",
            optional=True,
            advanced=True,
            tooltip="JSON file in the output folder that lists the most fragile layers first; two files, separated by "
            "a comma, for two branches, the conditional one first.",
        ),
        io.Int.Input(
            "protect_count",
            default=convert.PROTECT_COUNT,
            min=1,
            max=10_000,
            optional=True,
            advanced=True,
            tooltip="How many of the report's layers stay unquantized, in each branch. Only with a report.",
        ),
    ]


def activation_record(use: str) -> io.String.Input:
    return io.String.Input(
        "activation_record",
        default="",
        optional=True,
        advanced=True,
        tooltip=f"Safetensors file in the output folder with the activations that a calibration run measured; two "
        f"files, separated by a comma, for two branches, the conditional one first. {use}",
    )


def device() -> io.Combo.Input:
    return io.Combo.Input(
        "device",
        options=list(convert.DEVICES),
        default=convert.DEVICES[0],
        optional=True,
        advanced=True,
        tooltip="default: the GPU, where there is one (NVIDIA or AMD). cpu: slower, and takes no GPU memory.",
    )


def request(
    checkpoint,
    unconditional,
    filename,
    branches,
    overwrite,
    protected_layers="",
    fragility_report="",
    protect_count=convert.PROTECT_COUNT,
    activation_record="",
    device=convert.DEVICES[0],
) -> convert.SaveRequest:
    """What the inputs of this module ask for, by their ids."""
    return convert.SaveRequest(
        checkpoint, unconditional, filename, branches, overwrite, protected_layers, fragility_report, protect_count,
        activation_record, device,
    )  # fmt: skip


def fingerprint(
    checkpoint=None,
    unconditional=None,
    fragility_report=None,
    activation_record=None,
    policy_file=None,
    **_others,
) -> list[str]:
    """What ComfyUI compares to tell whether a save node has to run again: the state of every file that it reads.

    Names that come through a link are not known here, and are None.
    """
    named = convert.states_in_output_folder(fragility_report, activation_record, policy_file)
    return [*inputs.picked_states(checkpoint, unconditional), *named]


def report() -> io.String.Output:
    return io.String.Output("report", tooltip="What was written, as text.")
