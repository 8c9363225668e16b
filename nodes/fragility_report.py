from comfy_api.latest import io, ui

from ..host import profile_activations as profiling
from .profile_activations import Record


class FragilityReport(io.ComfyNode):
    """Ranks the layers of a profiled model and writes the files that conversions read."""

    @classmethod
    def define_schema(cls):
        after = io.MatchType.Template("after", [io.Image, io.Latent])
        return io.Schema(
            node_id="Lowbit_FragilityReport",
            display_name="Fragility Report (Lowbit)",
            category="model/quantization",
            description="Shows which layers suffer most from INT8, and writes the activation record and the report "
            "that Save as INT8 and Save as GGUF read.",
            search_aliases=["lowbit", "calibration", "outliers", "protected layers", "smoothquant", "imatrix"],
            is_output_node=True,
            inputs=[
                Record.Input("record", tooltip="From Profile Activations."),
                io.MatchType.Input(
                    "after",
                    template=after,
                    tooltip="The sampler's latent, or the image made of it: this node waits for it and passes it on.",
                ),
                io.Int.Input(
                    "protect_count",
                    default=profiling.PROTECT_COUNT,
                    min=0,
                    max=10_000,
                    tooltip="How many of the most fragile layers of a branch should stay unquantized: framed in the "
                    "picture, marked in the table. 17 is what the published recipe for Ideogram 4 protects.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(profiling.MEASURES),
                    default=profiling.MEASURES[0],
                    tooltip="By what layers are ranked. spikiness: how far the loudest input channel stands out. "
                    "output error: of the layer when it alone is INT8, on 64 tokens. The table shows both.",
                    advanced=True,
                ),
                io.String.Input(
                    "filename_prefix",
                    default="lowbit/profile",
                    tooltip="Of the files, in the output folder; a number is added.",
                ),
            ],
            outputs=[
                io.MatchType.Output(template=after, display_name="after", tooltip="What came in, unchanged."),
                io.String.Output("report", display_name="report", tooltip="The ranking, as text."),
                io.Image.Output("picture", display_name="picture", tooltip="Both measures by kind of layer and depth."),
                io.String.Output(
                    "record_files", display_name="record_files", tooltip="For activation_record of the save nodes."
                ),
                io.String.Output(
                    "report_files", display_name="report_files", tooltip="For fragility_report of the save nodes."
                ),
            ],
        )

    @classmethod
    def execute(cls, record, after, protect_count, measure, filename_prefix) -> io.NodeOutput:
        found = profiling.fragility_report(record, profiling.ReportRequest(protect_count, measure, filename_prefix))
        shown = ui.PreviewImage(found.picture, cls=cls).as_dict() | ui.PreviewText(found.text).as_dict()
        return io.NodeOutput(after, found.text, found.picture, found.records, found.reports, ui=shown)
