"""The real host as a subprocess, and a client of its HTTP API.

with ComfyServer(base_directory) as server:
    outputs = server.queue(prompt, on_progress=lambda step: print(step.node, step.value, step.maximum))
    images = server.files(outputs)
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from . import inprocess

PACK_NAME = "lowbit"
TEST_NODES = pathlib.Path(__file__).resolve().parent / "small_ideogram4"


class HostError(RuntimeError):
    """The host did not start, did not answer or stopped."""


class PromptError(RuntimeError):
    """The host refused a prompt, or one of its nodes failed: `node_type`, `node_id` and the text that the user sees."""

    def __init__(self, message: str, node_id: str = "", node_type: str = "", traceback: str = ""):
        super().__init__(f"{node_type} ({node_id}): {message}" if node_type else message)
        self.message, self.node_id, self.node_type, self.traceback = message, node_id, node_type, traceback


@dataclass(frozen=True)
class Progress:
    """A node has started (`maximum` 0) or has come to `value` of `maximum`; `time_s` counts from the prompt's start."""

    node_id: str
    node: str
    value: int
    maximum: int
    time_s: float


def link_folder(source: pathlib.Path, link: pathlib.Path) -> None:
    """Makes `link` show `source`: a symlink, on Windows a junction; nothing happens when it does already."""
    source = source.resolve()
    if link.exists() and link.resolve() == source:
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise FileExistsError(f"{link} is in the way of a link to {source}: remove it")
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(source), str(link))
    else:
        link.symlink_to(source, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class ComfyServer:
    """Starts the host on entry and stops it on exit. The host's own lines go to the file `log`.

    pack: link this node pack into custom_nodes; test_nodes: also the small models' patch and the LowbitTest_ nodes.
    """

    def __init__(
        self,
        base_directory: str | os.PathLike,
        *,
        host: str | os.PathLike | None = None,
        port: int | None = None,
        cpu: bool = True,
        pack: bool = True,
        test_nodes: bool = True,
        arguments: tuple[str, ...] = (),
        start_timeout_s: float = 120.0,
    ):
        path = pathlib.Path(host) if host is not None else inprocess.find_host()
        if path is None:
            raise HostError(inprocess.missing_host_reason())
        self.path = path
        self.base_directory = pathlib.Path(base_directory).resolve()
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.base_directory / "comfy.log"
        self.start_timeout_s = start_timeout_s
        self.process: subprocess.Popen | None = None
        self._links = {PACK_NAME: inprocess.ROOT if pack else None, TEST_NODES.name: TEST_NODES if test_nodes else None}
        self._arguments = (*(("--cpu",) if cpu else ()), *arguments)

    def __enter__(self) -> "ComfyServer":
        for folder in ("custom_nodes", "models", "input", "output"):
            (self.base_directory / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._links.items():
            link = self.base_directory / "custom_nodes" / name
            if source is not None:
                link_folder(source, link)
            elif link.is_symlink():
                link.unlink()
        command = [sys.executable, str(self.path / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base_directory)]
        command += ["--database-url", f"sqlite:///{(self.base_directory / 'comfy.db').as_posix()}"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *self._arguments]
        # On the CPU, small models are fastest on one thread, and far faster where other programs want the cores too.
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "--cpu" in self._arguments else {})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.start_timeout_s
        while time.monotonic() < end:
            self._check_alive()
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout_s=5)
                return
            time.sleep(0.1)
        raise HostError(f"the host did not answer within {self.start_timeout_s:.0f} s:\n{self.log_tail()}")

    def _check_alive(self) -> None:
        if self.process is None:
            raise HostError("the host is not running")
        if self.process.poll() is not None:
            raise HostError(f"the host stopped with exit code {self.process.returncode}:\n{self.log_tail()}")

    def stop(self, timeout_s: float = 10.0) -> None:
        """Asks the host to end, and ends it after `timeout_s`."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def failed_imports(self) -> list[str]:
        """The custom node folders that the host could not import."""
        return [
            pathlib.Path(line.rpartition(": ")[2]).name
            for line in self.log_text().splitlines()
            if "(IMPORT FAILED)" in line
        ]

    # HTTP

    def get(self, path: str, timeout_s: float = 30.0):
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
            return json.loads(response.read())

    def post(self, path: str, data: dict, timeout_s: float = 30.0):
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read()
        return json.loads(text) if text else None

    def object_info(self, node_type: str | None = None) -> dict:
        """The host's description of every node type, or of one (an empty dict when it has no such type)."""
        if node_type is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{node_type}").get(node_type, {})

    def queue(
        self, prompt: dict, *, on_progress: Callable[[Progress], None] | None = None, timeout_s: float = 300.0
    ) -> dict[str, dict]:
        """Runs a prompt (API format) and waits; returns {node id: what its node shows}, raises PromptError."""
        self._check_alive()
        run = self._run(prompt, on_progress or (lambda step: None), timeout_s)
        # A thread of its own: the caller may have an event loop already, as Playwright's fixtures do.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            return executor.submit(asyncio.run, run).result()

    async def _run(self, prompt: dict, on_progress: Callable[[Progress], None], timeout_s: float) -> dict[str, dict]:
        import aiohttp

        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as response:
                answer = await response.json()
            if response.status != 200:
                raise _refused(answer, prompt)
            try:
                return await asyncio.wait_for(
                    self._follow(socket_, answer["prompt_id"], prompt, on_progress), timeout_s
                )
            except asyncio.TimeoutError:
                await session.post(f"{self.url}/interrupt")
                raise HostError(f"the prompt did not end within {timeout_s:.0f} s:\n{self.log_tail()}") from None

    async def _follow(self, socket_, prompt_id: str, prompt: dict, on_progress) -> dict[str, dict]:
        import aiohttp

        outputs, start = {}, time.monotonic()
        async for message in socket_:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            node_id = str(data.get("node") or data.get("node_id") or "")
            node = prompt.get(node_id, {}).get("class_type", "")
            if kind == "executing" and node_id:
                on_progress(Progress(node_id, node, 0, 0, time.monotonic() - start))
            elif kind == "progress":
                on_progress(Progress(node_id, node, data["value"], data["max"], time.monotonic() - start))
            elif kind == "executed":
                outputs[node_id] = data.get("output") or {}
            elif kind == "execution_error":
                traceback = "".join(data.get("traceback") or [])
                raise PromptError(data["exception_message"].strip(), node_id, data.get("node_type", node), traceback)
            elif kind == "execution_interrupted":
                raise PromptError("the prompt was interrupted", node_id, node)
            elif kind == "execution_success":
                return outputs
        self._check_alive()
        raise HostError(f"the host closed the connection:\n{self.log_tail()}")

    def files(self, outputs: dict[str, dict]) -> list[pathlib.Path]:
        """The files that the nodes of a prompt have written to the output folder."""
        items = [item for output in outputs.values() for value in output.values() for item in value]
        return [
            self.base_directory / item["type"] / item.get("subfolder", "") / item["filename"]
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]


def _refused(answer: dict, prompt: dict) -> PromptError:
    for node_id, errors in (answer.get("node_errors") or {}).items():
        text = "; ".join(f"{error['message']}: {error['details']}" for error in errors["errors"])
        return PromptError(text, node_id, errors.get("class_type", prompt.get(node_id, {}).get("class_type", "")))
    error = answer.get("error") or {}
    return PromptError(error.get("message", str(answer)) if isinstance(error, dict) else str(error))


def copy_file(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(shutil.copyfile(source, target))
