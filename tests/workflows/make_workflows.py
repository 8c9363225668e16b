"""`python -m workflows.make_workflows`, from tests/: writes the shipped workflows and their pictures.

The real page builds each graph and serializes it, so that the files carry what the editor writes. What the three
workflows share is written once here; they differ in the loader node, the file names and the note.
"""

import json
import math
import pathlib
import re
import sys
import tempfile
import uuid
from dataclasses import dataclass

from host_harness import browser, inprocess, server
from host_harness.template_files import FP8, TEXT_ENCODER, VAE

WORKFLOWS = inprocess.ROOT / "workflows"
PICTURE_SIZE = 512

COMFY_ORG = "https://huggingface.co/Comfy-Org"
TRANSFORMER_LAB = "https://huggingface.co/transformerlab"

PROMPT = {
    "high_level_description": "A screen-printed travel poster for a lighthouse island, with a large title in the sky.",
    "style_description": {
        "aesthetics": "calm, graphic, slightly worn",
        "lighting": "low sun from the left, long soft shadows",
        "medium": "screen print",
        "art_style": "flat shapes, few colors, fine paper grain, mid-century travel poster",
        "color_palette": ["#0F3B57", "#F2E8CF", "#E76F51", "#F4A259", "#7FB7BE"],
    },
    "compositional_deconstruction": {
        "background": "Pale cream sky over a dark blue sea with a few thin lines of foam.",
        "elements": [
            {
                "type": "text",
                "bbox": [70, 120, 230, 880],
                "text": "SILVER ISLAND",
                "desc": "wide hand-cut capitals, dark blue",
                "color_palette": ["#0F3B57"],
            },
            {
                "type": "obj",
                "bbox": [270, 400, 800, 600],
                "desc": "white lighthouse with one coral band, its lamp lit, standing on a round rock",
                "color_palette": ["#F2E8CF", "#E76F51"],
            },
            {
                "type": "obj",
                "bbox": [690, 120, 830, 330],
                "desc": "small sailing boat heading for the island",
            },
            {
                "type": "text",
                "bbox": [880, 300, 940, 700],
                "text": "ferry daily from pier 4",
                "desc": "small lower-case letters, cream on the dark sea",
                "color_palette": ["#F2E8CF"],
            },
        ],
    },
}


def model_file(url: str, directory: str) -> dict[str, str]:
    """What the page needs to offer a missing file for download."""
    return {"name": url.rpartition("/")[2], "url": url, "directory": directory}


def fp8_files() -> list[dict[str, str]]:
    folder = f"{COMFY_ORG}/Ideogram-4/resolve/main/diffusion_models"
    return [model_file(f"{folder}/{name}", "diffusion_models") for name in FP8]


@dataclass(frozen=True)
class Picture:
    """What a picture says, its number of tones (a bit each) and its two colors."""

    title: str
    format: str
    files: str
    bits: int
    dark: str
    light: str


@dataclass(frozen=True)
class Workflow:
    """What is particular to one workflow.

    loader, widgets: the node type of ours and its widget values in order. models: see `model_file`; the page
    offers no download of GGUF files, so the note alone names those.
    download, cost: the parts of the note that say which files it takes.
    """

    name: str
    loader: str
    widgets: dict[str, str]
    models: list[dict[str, str]]
    download: str
    cost: str
    picture: Picture


INT8 = Workflow(
    name="ideogram4_int8",
    loader="Lowbit_LoadDiffusionModelInt8",
    widgets={
        "checkpoint": "ideogram4-int8-w8a8.safetensors",
        "unconditional": "same file",
        "compute_mode": "auto",
        "dtype": "default",
        "base_checkpoint": FP8[0],
        "base_checkpoint_unconditional": FP8[1],
        "protected_layers": "",
    },
    models=[
        model_file(
            f"{TRANSFORMER_LAB}/ideogram-4-int8-w8a8/resolve/main/ideogram4-int8-w8a8.safetensors", "diffusion_models"
        ),
        *fp8_files(),
    ],
    download=f"""\
| file | from |
| --- | --- |
| ideogram4-int8-w8a8.safetensors | [transformerlab/ideogram-4-int8-w8a8]({TRANSFORMER_LAB}/ideogram-4-int8-w8a8) |
| {FP8[0]} | [Comfy-Org/Ideogram-4]({COMFY_ORG}/Ideogram-4) |
| {FP8[1]} | [Comfy-Org/Ideogram-4]({COMFY_ORG}/Ideogram-4) |""",
    cost="""\
The INT8 file (20.4 GB) has both branches, but linear layers only. The norms and embeddings come from the FP8 release, \
picked as **base_checkpoint** and **base_checkpoint_unconditional**; the rest of those two files (9.3 GB each) is not \
kept in memory. INT8 suits GPUs with INT8 units and no FP8 ones, such as the RTX 30 series. With less memory take \
Q4_K GGUF (10.4 GB): workflow *ideogram4_gguf_q4_k*.""",
    picture=Picture("INT8", "safetensors, W8A8", "20.4 GB, both branches", 8, "#0f2c4d", "#5fa8d3"),
)

GGUF_Q4_K = Workflow(
    name="ideogram4_gguf_q4_k",
    loader="Lowbit_LoadDiffusionModelGguf",
    widgets={
        "checkpoint": "ideogram4-q4_k.gguf",
        "unconditional": "same file",
        "compute_mode": "auto",
        "dtype": "default",
    },
    models=[],
    download=f"""\
| file | from |
| --- | --- |
| ideogram4-q4_k.gguf | [transformerlab/ideogram-4-gguf-q4_k]({TRANSFORMER_LAB}/ideogram-4-gguf-q4_k) |""",
    cost="""\
This one file has both branches, so **unconditional** is *same file*. Q4_K (10.4 GB) is the small one and loses some \
detail. ideogram4-q8_0.gguf (19.7 GB, same owner) loses the least: pick it as **checkpoint** instead. INT8 (20.4 GB, \
and the FP8 release beside it) is in the workflow *ideogram4_int8*.""",
    picture=Picture("Q4_K", "GGUF, one file", "10.4 GB, both branches", 4, "#143528", "#63c294"),
)

GGUF_TWO_FILES = Workflow(
    name="ideogram4_gguf_two_files",
    loader="Lowbit_LoadDiffusionModelGguf",
    widgets={
        "checkpoint": "ideogram4-Q4_0.gguf",
        "unconditional": "ideogram4_uncond-Q4_0.gguf",
        "compute_mode": "auto",
        "dtype": "default",
    },
    models=[],
    download="""\
| file | from |
| --- | --- |
| ideogram4-Q4_0.gguf | [leejet/ideogram-4-GGUF](https://huggingface.co/leejet/ideogram-4-GGUF) |
| ideogram4_uncond-Q4_0.gguf | [leejet/ideogram-4-GGUF](https://huggingface.co/leejet/ideogram-4-GGUF) |""",
    cost="""\
One file a branch: the conditional one is **checkpoint**, the one with *uncond* or *unconditional* in its name is \
**unconditional**. The two may have different types. Files of stduhpf, molbal and rectangleworm work the same way. \
Q4_0 and Q4_K take 4.5 bits a weight, some 5.2 GB a branch, Q4_K with the smaller error (workflow \
*ideogram4_gguf_q4_k*); Q8_0 takes 8.5 and loses the least.""",
    picture=Picture("Q4_0", "GGUF, two files", "one file a branch", 4, "#3c1437", "#c878a6"),
)

ALL = (INT8, GGUF_Q4_K, GGUF_TWO_FILES)

# File names stand as they are: the page's newer node design shows code in a note blue on blue.
NOTE = """\
# Ideogram 4, text to image

## 1 Models
**models/diffusion_models**

{download}

**models/text_encoders**

| file | from |
| --- | --- |
| {text_encoder} | [Comfy-Org/Qwen3-VL]({comfy_org}/Qwen3-VL) |

**models/vae**

| file | from |
| --- | --- |
| {vae} | [Comfy-Org/flux2-dev]({comfy_org}/flux2-dev) |

Press R after copying a file, so that the lists show it. The weights of Ideogram 4 are for non-commercial use: see \
the license on their pages.

{cost}

**compute_mode**
- *auto*: *int8* where it is faster and costs little quality, else *exact*.
- *exact*: weights are unpacked and computed in the model's own dtype, what the file means.
- *int8*: activations are quantized too and INT8 units compute the product, a little less exact.

**LoRA**: put *Load LoRA* between the loader's **model** and *CFG Override*. The weights stay quantized. \
A LoRA made for the unconditional branch goes between **model_negative** and the guider.

## 2 Prompt
Ideogram 4 was trained on captions written as JSON. A plain sentence works too, with less control. *bbox* is \
[top, left, bottom, right] in thousandths of the image. Write into the node *Prompt*: the box of *CLIP Text Encode* \
itself removes braces, and JSON is nothing without them. There is no negative prompt: the unconditional branch sees no \
text.

## 3 Sampling
| preset | steps | mu | std |
| --- | --- | --- | --- |
| Quality | 48 | 0.0 | 1.5 |
| Default | 20 | 0.0 | 1.75 |
| Turbo | 12 | 0.5 | 1.75 |

Set them in *Ideogram 4 Scheduler*. Width and height: multiples of 16, from 256 to 2048. *CFG Override* lowers the \
guidance from 7 to 3 for the last part of the steps.
"""


def note(workflow: Workflow) -> str:
    parts = {"text_encoder": TEXT_ENCODER, "vae": VAE, "comfy_org": COMFY_ORG}
    return NOTE.format(download=workflow.download, cost=workflow.cost, **parts)


def caption(prompt: dict) -> str:
    """JSON as a person would write it: lists of numbers and of colors on one line."""
    text = json.dumps(prompt, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


def graph(workflow: Workflow) -> dict:
    """What the page is to build: nodes by name, links between named slots, groups around named nodes."""
    encoder_url = f"{COMFY_ORG}/Qwen3-VL/resolve/main/text_encoders/{TEXT_ENCODER}"
    vae_url = f"{COMFY_ORG}/flux2-dev/resolve/main/split_files/vae/{VAE}"

    def node(kind: str, place: tuple[int, int, int, int], *, title=None, models=(), **widgets) -> dict:
        pack = server.PACK_NAME if kind == workflow.loader else "comfy-core"
        properties = {} if kind == "MarkdownNote" else {"cnr_id": pack}
        if models:
            properties["models"] = list(models)
        x, y, w, h = place
        return {
            "type": kind,
            "pos": [x, y],
            "size": [w, h],
            "title": title,
            "properties": properties,
            "widgets": widgets,
        }

    # The links of the loader run above the prompt, the link of the VAE below everything.
    nodes = {
        "note": node("MarkdownNote", (0, 70, 520, 950), title="Read me first", text=note(workflow)),
        "loader": node(
            workflow.loader, (580, 70, 460, 80 + 24 * len(workflow.widgets)), models=workflow.models, **workflow.widgets
        ),
        "clip": node(
            "CLIPLoader",
            (580, 390, 460, 130),
            models=[model_file(encoder_url, "text_encoders")],
            clip_name=TEXT_ENCODER,
            type="ideogram4",
            device="default",
        ),
        "vae": node("VAELoader", (580, 940, 460, 80), models=[model_file(vae_url, "vae")], vae_name=VAE),
        # A text node of its own: the page reads braces in the box of CLIP Text Encode as alternatives and removes them.
        "text": node("PrimitiveStringMultiline", (1100, 470, 440, 440), title="Prompt", value=caption(PROMPT)),
        "prompt": node("CLIPTextEncode", (1600, 270, 220, 90), title="CLIP Text Encode"),
        "override": node("CFGOverride", (1880, 70, 280, 120), cfg=3.0, start_percent=0.7, end_percent=1.0),
        "width": node("PrimitiveInt", (1880, 540, 280, 90), title="Width", value=1024),
        "height": node("PrimitiveInt", (1880, 700, 280, 90), title="Height", value=1024),
        "noise": node("RandomNoise", (2220, 70, 280, 90), noise_seed=42, control_after_generate="randomize"),
        "guider": node("DualModelGuider", (2220, 230, 280, 130), cfg=7.0),
        "sampler": node("KSamplerSelect", (2220, 430, 280, 70), sampler_name="euler"),
        "scheduler": node(
            "Ideogram4Scheduler", (2220, 570, 280, 160), steps=20, width=1024, height=1024, mu=0.0, std=1.75
        ),
        "latent": node("EmptyFlux2LatentImage", (2220, 800, 280, 110), width=1024, height=1024, batch_size=1),
        "sample": node("SamplerCustomAdvanced", (2580, 70, 240, 130)),
        "decode": node("VAEDecode", (2900, 940, 200, 60)),
        "save": node("SaveImage", (3160, 70, 560, 950), filename_prefix=workflow.name),
    }
    links = [
        ("loader", "model", "override", "model"),
        ("override", "MODEL", "guider", "model"),
        ("loader", "model_negative", "guider", "model_negative"),
        ("clip", "CLIP", "prompt", "clip"),
        ("text", "STRING", "prompt", "text"),
        ("prompt", "CONDITIONING", "guider", "positive"),
        ("width", "INT", "scheduler", "width"),
        ("height", "INT", "scheduler", "height"),
        ("width", "INT", "latent", "width"),
        ("height", "INT", "latent", "height"),
        ("noise", "NOISE", "sample", "noise"),
        ("guider", "GUIDER", "sample", "guider"),
        ("sampler", "SAMPLER", "sample", "sampler"),
        ("scheduler", "SIGMAS", "sample", "sigmas"),
        ("latent", "LATENT", "sample", "latent_image"),
        ("sample", "output", "decode", "samples"),
        ("vae", "VAE", "decode", "vae"),
        ("decode", "IMAGE", "save", "images"),
    ]
    groups = [
        {"title": title, "bounding": [x, 0, width, 1040], "color": color}
        for title, x, width, color in (
            ("1 Models", 560, 500, "#3f789e"),
            ("2 Prompt", 1080, 760, "#5a8a5a"),
            ("3 Sampling", 1860, 1000, "#a1832f"),
            ("4 Image", 2880, 860, "#8a4f9e"),
        )
    ]
    return {"nodes": nodes, "links": links, "groups": groups}


BUILD = """
async ({nodes, links, groups}) => {
  const graph = window.app.graph
  graph.clear()
  const made = {}
  for (const [name, wanted] of Object.entries(nodes)) {
    const node = window.LiteGraph.createNode(wanted.type)
    if (!node) throw new Error(`no node ${wanted.type}`)
    graph.add(node)
    made[name] = node
    if (wanted.title) node.title = wanted.title
    Object.assign(node.properties, wanted.properties)
    const widgets = node.widgets ?? []
    const names = Object.keys(wanted.widgets)
    for (const [index, key] of names.entries()) {
      // A note's one widget has no name to rely on.
      const widget = widgets.find(item => item.name === key) ?? (widgets.length === 1 ? widgets[0] : null)
      if (!widget) throw new Error(`${wanted.type} has no widget ${key}: ${widgets.map(item => item.name)}`)
      widget.value = wanted.widgets[key]
    }
  }
  for (const [from, output, to, input] of links) {
    const outSlot = made[from].outputs.findIndex(slot => slot.name === output)
    const inSlot = made[to].inputs.findIndex(slot => slot.name === input)
    if (outSlot < 0 || inSlot < 0) throw new Error(`no slot for ${from}.${output} -> ${to}.${input}`)
    made[from].connect(outSlot, made[to], inSlot)
  }
  await new Promise(done => setTimeout(done, 300))
  const needed = {}
  for (const [name, wanted] of Object.entries(nodes)) {
    needed[name] = [...made[name].computeSize()]
    made[name].pos = wanted.pos
    made[name].setSize(wanted.size)
  }
  for (const wanted of groups) {
    const group = new window.LiteGraph.LGraphGroup(wanted.title)
    group.configure({...wanted, flags: {}})
    graph.add(group)
  }
  await new Promise(done => setTimeout(done, 300))
  return {workflow: graph.serialize(), needed}
}
"""


def build(page, workflow: Workflow) -> dict:
    """The workflow as the page serializes it, without what depends on the page's own state."""
    result = page.evaluate(BUILD, graph(workflow))
    made = result["workflow"]
    made["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lowbit/{workflow.name}"))
    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
    made["extra"] = {"ds": {"scale": 0.4, "offset": [180, 200]}, "frontendVersion": version}
    return made


def text_of(workflow: dict) -> str:
    return json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    WORKFLOWS.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        server.ComfyServer(pathlib.Path(folder), test_nodes=False) as running,
        browser.launch() as launched,
    ):
        page = browser.open_editor(launched, running.url)
        for workflow in ALL:
            path = WORKFLOWS / f"{workflow.name}.json"
            path.write_text(text_of(build(page, workflow)), encoding="utf-8", newline="\n")
            draw(workflow).save(path.with_suffix(".jpg"), quality=88, optimize=True)
    return 0


def draw(workflow: Workflow):
    """The picture that the template list shows: a sun over waves in as few tones as the format has bits."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    picture, size = workflow.picture, PICTURE_SIZE
    dark, light = ImageColor.getrgb(picture.dark), ImageColor.getrgb(picture.light)

    def mix(share: float) -> tuple[int, ...]:
        return tuple(round(a + (b - a) * share) for a, b in zip(dark, light, strict=True))

    scale = 2  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (size * scale, size * scale), mix(0.95))
    drawing = ImageDraw.Draw(image)
    tones, horizon = picture.bits, 0.62 * size * scale
    for tone in range(tones):
        drawing.rectangle(
            [0, horizon * tone / tones, size * scale, horizon * (tone + 1) / tones], fill=mix(0.95 * tone / (tones - 1))
        )
    center, radius = (0.69 * size * scale, 0.55 * size * scale), 0.2 * size * scale
    drawing.ellipse([center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius], fill="#fff4dc")
    for tone in range(tones):
        top = horizon + (size * scale - horizon) * tone / tones
        share = 0.55 * (1 - tone / (tones - 1))
        points = [
            (x, top + 9 * scale * math.sin(x / (size * scale) * math.tau * (1.5 + 0.2 * tone) + 1.3 * tone))
            for x in range(0, size * scale + 1, 4)
        ]
        drawing.polygon([*points, (size * scale, size * scale), (0, size * scale)], fill=mix(share))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    drawing = ImageDraw.Draw(image)
    for text, y, height in (
        ("Ideogram 4", 28, 30),
        (picture.title, 62, 84),
        (picture.format, 418, 34),
        (picture.files, 460, 26),
    ):
        drawing.text((32, y), text, fill="white", font=ImageFont.load_default(height))
    return image


if __name__ == "__main__":
    sys.exit(main())
