"""Prompts in the host's API format: the stock Ideogram 4 graph, and workflows of the editor turned into prompts."""

import copy

# The kinds of input that the editor shows as a widget in the node, with its value in `widgets_values`.
_WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
_COMMENTS = {"Note", "MarkdownNote"}
_MUTED, _BYPASSED = 2, 4

Prompt = dict[str, dict]


class WorkflowError(ValueError):
    """A workflow that cannot become a prompt."""


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def stock_ideogram4(
    files: dict[str, str],
    *,
    text: str | None = "a lighthouse at dawn",
    width: int = 256,
    height: int = 256,
    steps: int = 2,
    cfg: float = 7.0,
    seed: int = 0,
    filename_prefix: str = "lowbit_test",
    latent: str | None = None,
) -> Prompt:
    """The stock graph on the files that `small_models.write_stand_ins` names.

    text: None takes the conditioning of the test node instead of the text encoder's. latent: also write the final
    latent to <latent>.safetensors in the output folder. Node ids are the names below, so that a test can swap a node.
    """
    prompt = {
        "model": node("UNETLoader", unet_name=files["conditional"], weight_dtype="default"),
        "model_negative": node("UNETLoader", unet_name=files["unconditional"], weight_dtype="default"),
        "cfg_override": node("CFGOverride", model=["model", 0], cfg=3.0, start_percent=0.7, end_percent=1.0),
        "guider": node(
            "DualModelGuider",
            model=["cfg_override", 0],
            model_negative=["model_negative", 0],
            positive=["positive", 0],
            cfg=cfg,
        ),
        "positive": node("LowbitTest_Conditioning", seed=seed, tokens=16, width=832, pooled_width=0),
        "noise": node("RandomNoise", noise_seed=seed),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Ideogram4Scheduler", steps=steps, width=width, height=height, mu=0.0, std=1.75),
        "empty": node("EmptyFlux2LatentImage", width=width, height=height, batch_size=1),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "vae": node("VAELoader", vae_name=files["vae"]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=filename_prefix),
    }
    if text is not None:
        prompt["clip"] = node("CLIPLoader", clip_name=files["text_encoder"], type="ideogram4", device="default")
        prompt["positive"] = node("CLIPTextEncode", clip=["clip", 0], text=text)
    if latent is not None:
        prompt["latent"] = node("LowbitTest_SaveLatent", latent=["sample", 0], filename=latent)
    return prompt


def nodes_of(prompt: Prompt, class_type: str) -> list[str]:
    return [node_id for node_id, entry in prompt.items() if entry["class_type"] == class_type]


def with_inputs(prompt: Prompt, class_type: str, **inputs) -> Prompt:
    """A copy in which every node of a type has these inputs (of those that the node has)."""
    prompt = copy.deepcopy(prompt)
    for node_id in nodes_of(prompt, class_type):
        present = prompt[node_id]["inputs"]
        present |= {name: value for name, value in inputs.items() if name in present}
    return prompt


def rewired(prompt: Prompt, links: dict[tuple[str, int], tuple[str, int]]) -> Prompt:
    """A copy in which everything that was fed by an output (node id, slot) is fed by another."""
    prompt = copy.deepcopy(prompt)
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list) and tuple(value) in links:
                entry["inputs"][name] = list(links[tuple(value)])
    return prompt


def _is_widget(specification: list) -> bool:
    kind, options = specification[0], specification[1] if len(specification) > 1 else {}
    return (isinstance(kind, list) or kind in _WIDGET_TYPES) and not options.get("forceInput")


def _widget_values(entry: dict, information: dict) -> dict:
    """Names for the `widgets_values` of a node, in the order in which the host lists the node's inputs."""
    values = entry.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    named, rest = {}, list(values)
    for group in ("required", "optional"):
        for name, specification in (information["input"].get(group) or {}).items():
            if not rest or not _is_widget(specification):
                continue
            named[name] = rest.pop(0)
            if specification[0] == "INT" and rest and rest[0] in _SEED_CONTROLS:
                rest.pop(0)
    return named


def from_workflow(workflow: dict, object_info: dict) -> Prompt:
    """A workflow in the editor's format as a prompt: what the page sends when Run is pressed.

    Understands links, widgets, notes, reroutes, primitives, muted and bypassed nodes; refuses subgraphs.
    """
    nodes = {entry["id"]: entry for entry in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs", [])}

    def source(link_id: int | None):
        """What feeds a link: [node id, slot], a primitive's value as ("value", x), or None."""
        if link_id is None or link_id not in links:
            return None
        node_id, slot = links[link_id]
        entry = nodes[node_id]
        if entry["type"] == "PrimitiveNode":
            return ("value", entry["widgets_values"][0])
        if entry["type"] == "Reroute":
            return source(entry["inputs"][0].get("link"))
        if entry.get("mode") == _MUTED:
            return None
        if entry.get("mode") == _BYPASSED:
            wanted = entry["outputs"][slot]["type"]
            same = [item for item in entry.get("inputs", []) if item["type"] == wanted]
            return source(same[0].get("link")) if same else None
        return [str(node_id), slot]

    prompt: Prompt = {}
    for node_id, entry in nodes.items():
        kind = entry["type"]
        if kind in _COMMENTS | {"Reroute", "PrimitiveNode"} or entry.get("mode") in (_MUTED, _BYPASSED):
            continue
        if kind in subgraphs:
            raise WorkflowError(f"node {node_id} is a subgraph: unpack it in the editor")
        if kind not in object_info:
            raise WorkflowError(f"the host has no node {kind} (node {node_id})")
        inputs = _widget_values(entry, object_info[kind])
        for item in entry.get("inputs", []):
            fed = source(item.get("link"))
            if isinstance(fed, tuple):
                inputs[item["name"]] = fed[1]
            elif fed is not None:
                inputs[item["name"]] = fed
        prompt[str(node_id)] = {"class_type": kind, "inputs": inputs}
    return prompt
