from comfy_api.latest import io

from ..host import profile_activations

Record = io.Custom("LOWBIT_RECORD")


class ProfileActivations(io.ComfyNode):
    """Records what the linear layers of a model read while samplers run it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lowbit_ProfileActivations",
            display_name="Profile Activations (Lowbit)",
            category="model/quantization",
            description="Records what every linear layer reads, over all steps and prompts that are sampled with the "
            "models that come out: what Fragility Report needs to tell which layers suffer from INT8.",
            search_aliases=["lowbit", "calibration", "calibrate", "smoothquant", "imatrix", "outliers", "quantize"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to record, best in BF16 or FP8, from a Lowbit loader or any other one. While "
                    "it is recorded it samples a little slower and takes 0.15 GB more, for Ideogram 4.",
                ),
                io.Model.Input(
                    "model_negative",
                    optional=True,
                    tooltip="The unconditional branch, if the model has two weight sets: it gets a record of its own.",
                ),
                io.Int.Input(
                    "record_number",
                    default=1,
                    min=1,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Every prompt that is run adds to the record. Another number starts a new one.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The same model, for the sampler or guider."),
                io.Model.Output("model_negative", display_name="model_negative", tooltip="Likewise."),
                Record.Output("record", display_name="record", tooltip="For Fragility Report."),
            ],
        )

    @classmethod
    def execute(cls, model, model_negative=None, record_number=1) -> io.NodeOutput:
        return io.NodeOutput(*profile_activations.profile_models(model, model_negative))
