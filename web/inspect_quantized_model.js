// Shows the reports of our nodes on the nodes themselves: the page draws text outputs of its own nodes only.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NODES = [
    "Lowbit_InspectQuantizedModel",
    "Lowbit_SaveAsInt8",
    "Lowbit_SaveAsGguf",
    "Lowbit_FragilityReport",
    "Lowbit_VerifyQuantized",
];

function show(node, text) {
    let widget = node.widgets?.find((candidate) => candidate.name === "shown_report");
    if (!widget) {
        widget = ComfyWidgets.STRING(node, "shown_report", ["STRING", { multiline: true }], app).widget;
        // What a run found out belongs neither to the prompt nor to the saved workflow.
        widget.serialize = false;
        widget.options.serialize = false;
        const element = widget.element ?? widget.inputEl;
        element.readOnly = true;
        element.style.fontFamily = "monospace";
        element.style.whiteSpace = "pre";
        node.setSize([Math.max(node.size[0], 560), Math.max(node.size[1], 380)]);
    }
    widget.value = text;
    app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
    name: "Lowbit.ShownReports",
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!NODES.includes(nodeData.name)) {
            return;
        }
        const onExecuted = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            show(this, output.text.join("\n"));
        };
    },
});
