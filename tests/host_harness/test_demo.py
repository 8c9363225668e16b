"""The demo's prompts: any shipped workflow becomes a prompt on the small files, with our loader or the stock ones."""

from host_harness import demo, graphs

FILES = {"conditional": "c", "unconditional": "u", "text_encoder": "small_text.safetensors", "vae": "taef2"}
COMBO = ["COMBO", {"options": ["first", "second"]}]
INFORMATION = {
    "input": {"required": {"checkpoint": COMBO, "unconditional": COMBO, "compute_mode": [["auto", "int8", "exact"]]}}
}


def test_our_loader_takes_the_place_of_the_stock_ones_and_back():
    stock = graphs.stock_ideogram4(FILES)
    variant = demo.QUANTIZED[-1]
    ours = demo.with_our_loader(stock, variant, INFORMATION)
    assert not graphs.nodes_of(ours, "UNETLoader")
    assert ours["loader"]["inputs"] == variant.inputs
    assert ours["cfg_override"]["inputs"]["model"] == ["loader", 0]
    assert ours["guider"]["inputs"]["model_negative"] == ["loader", 1]
    back = demo.with_stock_loaders(ours, ("c", "u"))
    assert back == stock


def test_inputs_that_the_node_lacks_are_left_out():
    variant = next(variant for variant in demo.QUANTIZED if "base_checkpoint" in variant.inputs)
    ours = demo.with_our_loader(graphs.stock_ideogram4(FILES), variant, INFORMATION)
    assert ours["loader"]["inputs"].keys() == INFORMATION["input"]["required"].keys()


def test_fit_makes_the_prompt_small():
    prompt = demo.fit(graphs.stock_ideogram4(FILES, width=1024, height=1024, steps=48), FILES)
    assert prompt["sigmas"]["inputs"]["steps"] == demo.STEPS
    assert {prompt[node_id]["inputs"]["width"] for node_id in ("sigmas", "empty")} == {demo.SIZE}
    assert prompt["clip"]["inputs"]["clip_name"] == FILES["text_encoder"]


def test_workflow_with_reroute_bypass_note_and_primitive():
    """The features that a person's workflow has and the page's own export of a prompt has not."""
    object_info = {
        "Load": {"input": {"required": {"name": [["a", "b"]]}}},
        "Change": {"input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {}]}}},
        "Sample": {"input": {"required": {"model": ["MODEL"], "seed": ["INT", {}], "steps": ["INT", {}]}}},
    }
    workflow = {
        "nodes": [
            {"id": 1, "type": "Load", "widgets_values": ["b"], "outputs": [{"type": "MODEL"}]},
            {
                "id": 2,
                "type": "Change",
                "mode": 4,
                "widgets_values": [0.5],
                "inputs": [{"name": "model", "type": "MODEL", "link": 10}],
                "outputs": [{"type": "MODEL"}],
            },
            {"id": 3, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 11}], "outputs": [{"type": "*"}]},
            {"id": 4, "type": "Note", "widgets_values": ["read me"]},
            {"id": 5, "type": "PrimitiveNode", "widgets_values": [7, "fixed"], "outputs": [{"type": "INT"}]},
            {
                "id": 6,
                "type": "Sample",
                "widgets_values": [1, "randomize", 20],
                "inputs": [
                    {"name": "model", "type": "MODEL", "link": 12},
                    {"name": "steps", "type": "INT", "link": 13, "widget": {"name": "steps"}},
                ],
            },
        ],
        "links": [
            [10, 1, 0, 2, 0, "MODEL"],
            [11, 2, 0, 3, 0, "*"],
            [12, 3, 0, 6, 0, "MODEL"],
            [13, 5, 0, 6, 1, "INT"],
        ],
    }
    assert graphs.from_workflow(workflow, object_info) == {
        "1": graphs.node("Load", name="b"),
        "6": graphs.node("Sample", model=["1", 0], seed=1, steps=7),
    }
