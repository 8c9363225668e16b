"""The shipped workflows: served by the host, opened by its page without a complaint, and run as they are shipped.

The files are small stand-ins under the very names that the workflows ask for, in the same layouts.
"""

import json
import re
import urllib.request

import pytest
from host_harness import graphs, inprocess, server, template_files
from PIL import Image

from . import make_workflows

FOLDER = make_workflows.WORKFLOWS
NAMES = [workflow.name for workflow in make_workflows.ALL]
PAGE_ONLY = {"MarkdownNote"}
SIZE, STEPS = 256, 2

each_workflow = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def nodes_of(workflow: dict, kind: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind]


def our_node(workflow: dict) -> dict:
    (node,) = [node for node in workflow["nodes"] if node["type"].startswith("Lowbit_")]
    return node


def made_small(workflow: dict) -> dict:
    """A copy with few steps and a small image, changed where a person would change them."""
    workflow = json.loads(json.dumps(workflow))
    for node in nodes_of(workflow, "PrimitiveInt"):
        node["widgets_values"][0] = SIZE
    (scheduler,) = nodes_of(workflow, "Ideogram4Scheduler")
    scheduler["widgets_values"][0] = STEPS
    return workflow


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A server of its own: whose model folders hold these files and no others."""
    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    base = tmp_path_factory.mktemp("workflows")
    template_files.write(base)
    with server.ComfyServer(base) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(host):
    return host.object_info()


def fetch(host, path: str) -> tuple[int, str, bytes]:
    with urllib.request.urlopen(host.url + path, timeout=30) as response:
        return response.status, response.headers.get_content_type(), response.read()


# What is in the folder


def test_the_folder_holds_the_workflows_and_their_pictures():
    expected = {f"{name}{suffix}" for name in NAMES for suffix in (".json", ".jpg")}
    assert {path.name for path in FOLDER.iterdir()} == expected


@each_workflow
def test_picture(name):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (make_workflows.PICTURE_SIZE,) * 2
        expected = make_workflows.draw(next(item for item in make_workflows.ALL if item.name == name))
        difference = [
            abs(a - b)
            for a, b in zip(picture.resize((16, 16)).tobytes(), expected.resize((16, 16)).tobytes(), strict=True)
        ]
        assert max(difference) < 24, "the picture is not the one that make_workflows draws"


@each_workflow
def test_no_path_and_no_subgraph(name):
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'"/(?!/)|[A-Za-z]:\\\\|file:|localhost|127\.0\.0\.1|/(?:home|root|Users)/', text)
    workflow = json.loads(text)
    assert not (workflow.get("definitions") or {}).get("subgraphs")


@each_workflow
def test_links_are_consistent(name):
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] == max(nodes)
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) and workflow["last_link_id"] == max(links)
    for link_id, source, output, target, slot, kind in links.values():
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert link_id in given["links"] and taken["link"] == link_id
        assert given["type"] == kind == taken["type"]
    used = [item["link"] for node in nodes.values() for item in node.get("inputs", []) if item.get("link") is not None]
    given = [link for node in nodes.values() for item in node.get("outputs", []) for link in item.get("links") or []]
    assert sorted(used) == sorted(given) == sorted(links)


@each_workflow
def test_nodes_lie_in_their_groups_and_apart(name):
    workflow = read(name)
    title = 30  # the bar above a node's position

    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - title, x + width, y + height

    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for first in boxes:
        for second in boxes:
            a, b = boxes[first], boxes[second]
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert first == second or apart, (first, second)
    groups = {group["title"]: group["bounding"] for group in workflow["groups"]}
    assert list(groups) == ["1 Models", "2 Prompt", "3 Sampling", "4 Image"]
    for node in workflow["nodes"]:
        a = boxes[node["id"]]
        inside = [
            title
            for title, (x, y, width, height) in groups.items()
            if x <= a[0] and y <= a[1] and a[2] <= x + width and a[3] <= y + height
        ]
        assert len(inside) == (node["type"] not in PAGE_ONLY), (node["type"], inside)


@each_workflow
def test_note_names_every_file_and_its_folder(name):
    workflow = read(name)
    (note,) = nodes_of(workflow, "MarkdownNote")
    (text,) = note["widgets_values"]
    picked = [
        value
        for node in workflow["nodes"]
        if node is not note
        for value in node.get("widgets_values") or []
        if isinstance(value, str) and value.endswith((".safetensors", ".gguf"))
    ]
    assert len(set(picked)) == len(picked) >= 3
    assert all(f"| {file} |" in text for file in picked)
    assert all(folder in text for folder in ("models/diffusion_models", "models/text_encoders", "models/vae"))
    assert all(word in text for word in ("Quality | 48", "Default | 20", "Turbo | 12", "LoRA", "compute_mode", "GB"))


@each_workflow
def test_files_for_download_are_files_that_the_node_picks(name):
    for node in read(name)["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}") and "/resolve/main/" in model["url"]


# On the host


@each_workflow
def test_host_serves_workflow_and_picture(host, name):
    listed = host.get("/api/workflow_templates")
    assert sorted(listed[server.PACK_NAME]) == sorted(NAMES)
    address = f"/api/workflow_templates/{server.PACK_NAME}/{name}"
    status, kind, data = fetch(host, f"{address}.json")
    assert (status, kind) == (200, "application/json") and json.loads(data) == read(name)
    status, kind, data = fetch(host, f"{address}.jpg")
    assert (status, kind) == (200, "image/jpeg") and data == (FOLDER / f"{name}.jpg").read_bytes()


def check_choices(prompt: graphs.Prompt, object_info: dict) -> None:
    """Every input of every node is there, and every choice is one that the host offers."""
    for node_id, entry in prompt.items():
        inputs = object_info[entry["class_type"]]["input"]
        assert set(inputs.get("required") or {}) <= set(entry["inputs"]), (node_id, entry["class_type"])
        for input_name, (kind, *rest) in ((inputs.get("required") or {}) | (inputs.get("optional") or {})).items():
            value = entry["inputs"].get(input_name)
            choices = kind if isinstance(kind, list) else (rest[0] if rest else {}).get("options")
            if isinstance(choices, list) and value is not None and not isinstance(value, list):
                assert value in choices, (entry["class_type"], input_name, value)


@each_workflow
def test_nodes_and_widgets_are_those_of_the_host(host, object_info, name):
    workflow = read(name)
    for node in workflow["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        information = object_info[node["type"]]
        ours = node["type"].startswith("Lowbit_")
        assert information["python_module"].startswith(f"custom_nodes.{server.PACK_NAME}" if ours else "nodes") or (
            not ours and information["python_module"].startswith("comfy_extras.")
        )
        assert [output["type"] for output in node.get("outputs", [])] == information["output"]
    node = our_node(workflow)
    inputs = object_info[node["type"]]["input"]
    names = [name for group in ("required", "optional") for name in inputs.get(group) or {}]
    assert len(node["widgets_values"]) == len(names)
    assert [item["name"] for item in node["inputs"]] == names
    check_choices(graphs.from_workflow(workflow, object_info), object_info)


def check_image(host, outputs: dict) -> None:
    (path,) = [path for path in host.files(outputs) if path.suffix == ".png"]
    with Image.open(path) as image:
        assert image.size == (SIZE, SIZE)
        assert all(high - low > 20 for low, high in image.convert("RGB").getextrema()), "the image is nearly constant"


@each_workflow
def test_runs_as_shipped(host, object_info, name):
    prompt = graphs.from_workflow(made_small(read(name)), object_info)
    (sampler,) = graphs.nodes_of(prompt, "SamplerCustomAdvanced")
    steps = []
    outputs = host.queue(prompt, on_progress=steps.append)
    assert max(step.maximum for step in steps if step.node_id == sampler) == STEPS
    check_image(host, outputs)


def test_int8_without_a_base_checkpoint_says_what_to_pick(host, object_info):
    prompt = graphs.from_workflow(made_small(read("ideogram4_int8")), object_info)
    prompt = graphs.with_inputs(prompt, "Lowbit_LoadDiffusionModelInt8", base_checkpoint="none")
    with pytest.raises(server.PromptError, match="base checkpoint") as error:
        host.queue(prompt)
    assert error.value.node_type == "Lowbit_LoadDiffusionModelInt8"
    assert "ideogram4-int8-w8a8.safetensors" in error.value.message


# In the page

MISSING = """() => window.app.graph.nodes
  .filter(node => node.has_errors || !(node.type in window.LiteGraph.registered_node_types)).map(node => node.type)"""
INVALID = """() => window.app.graph.nodes.flatMap(node => (node.widgets ?? [])
  .filter(widget => Array.isArray(widget.options?.values) && !widget.options.values.includes(widget.value))
  .map(widget => `${node.type} ${widget.name}: ${widget.value}`))"""


def complaints(page) -> list[str]:
    """What scripts have thrown or logged as errors, without files that a new installation of the host lacks."""
    return [error for error in page.errors if "404" not in error]


@pytest.fixture
def opened(host, browser_page):
    """open(name) -> the page after it has loaded a template by the address that the template list uses."""

    def open_template(name: str):
        page = browser_page(host.url)
        page.wait_for_load_state("networkidle")
        page.errors.clear()
        page.evaluate(
            """async address => {
              const workflow = await (await fetch(address)).json()
              await window.app.loadGraphData(workflow, true, true, 'template')
            }""",
            f"/api/workflow_templates/{server.PACK_NAME}/{name}.json",
        )
        return page

    return open_template


@each_workflow
def test_page_opens_the_workflow(host, object_info, opened, name):
    page = opened(name)
    assert page.evaluate(MISSING) == []
    assert page.evaluate(INVALID) == []
    assert page.evaluate("() => window.app.graph.nodes.length") == len(read(name)["nodes"])
    assert complaints(page) == []
    prompt = page.evaluate("() => window.app.graphToPrompt().then(result => result.output)")
    check_choices(prompt, object_info)
    converted = graphs.from_workflow(read(name), object_info)
    assert {key: value["inputs"] for key, value in prompt.items()} == {
        key: value["inputs"] for key, value in converted.items()
    }


@each_workflow
def test_page_runs_the_workflow(host, opened, name):
    page = opened(name)
    page.evaluate(
        """([size, steps]) => {
          for (const node of window.app.graph.nodes) {
            if (node.type === 'PrimitiveInt') node.widgets[0].value = size
            if (node.type === 'Ideogram4Scheduler') node.widgets.find(item => item.name === 'steps').value = steps
          }
        }""",
        [SIZE, STEPS],
    )
    prompt = page.evaluate("() => window.app.graphToPrompt().then(result => result.output)")
    check_image(host, host.queue(prompt))
    assert complaints(page) == []


@each_workflow
def test_shipped_file_is_what_the_page_makes(host, opened, name):
    """Holds for the page that wrote the files; another version may write other keys."""
    page, shipped = opened(name), read(name)
    made = make_workflows.build(page, next(item for item in make_workflows.ALL if item.name == name))
    version = shipped["extra"]["frontendVersion"]
    if made["extra"]["frontendVersion"] != version:
        pytest.skip(f"the files were written by version {version} of the page")
    assert made == shipped


def test_inspection_shows_its_report_on_the_node(host, browser_page):
    """The page draws text outputs of its own nodes only: ours brings the widget, which is in no prompt and no file."""
    page = browser_page(host.url)
    prompt = {
        "1": {
            "class_type": "Lowbit_LoadDiffusionModelGguf",
            "inputs": {
                "checkpoint": "ideogram4-q4_k.gguf",
                "unconditional": "same file",
                "compute_mode": "auto",
                "dtype": "default",
            },
        },
        "2": {"class_type": "Lowbit_InspectQuantizedModel", "inputs": {"model": ["1", 0]}},
    }
    page.evaluate("async (prompt) => { await window.app.loadApiJson(prompt, 'inspect'); }", prompt)
    page.evaluate("async () => { await window.app.queuePrompt(0, 1); }")
    shown = """() => window.app.graph.nodes.find((node) => node.type === "Lowbit_InspectQuantizedModel")
        .widgets?.find((widget) => widget.name === "shown_report")?.value"""
    page.wait_for_function(f"() => ({shown})()?.includes('gguf_q4_k')")
    assert "bits/weight" in page.evaluate(shown)
    assert "shown_report" not in json.dumps(page.evaluate("async () => (await window.app.graphToPrompt()).output"))
