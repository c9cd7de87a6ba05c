"""Drawing back ends that run elsewhere: servers that answer as AUTOMATIC1111's web UI or as ComfyUI do."""

from __future__ import annotations

import base64
import binascii
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moss_jt.errors import ToolError
from moss_jt.language import pick
from moss_jt.tools.drawing import SECONDS
from moss_jt.tools.tool import Status
from moss_jt.tools.web import check_url, fetch, fetch_json, with_query

TIMEOUT = 10.0
STEPS = 20
SIZE = 512
ASK_EVERY_S = 0.5
_BLANK = "{description}"  # in a user's own workflow


class Automatic1111:
    """A server with the API of AUTOMATIC1111's web UI (`--api`), or one compatible with it.

    Args:
        url: as http://127.0.0.1:7860.
    """

    name = "a1111"
    note = ""

    def __init__(self, url: str) -> None:
        self._url = check_url(url)

    def draw(self, description: str) -> bytes:
        """Ask for one picture."""
        wanted = {"prompt": description, "steps": STEPS, "width": SIZE, "height": SIZE, "batch_size": 1}
        found = fetch_json(f"{self._url}/sdapi/v1/txt2img", timeout=SECONDS, send=wanted)
        images = found.get("images") if isinstance(found, dict) else None
        if not isinstance(images, list) or not images or not isinstance(images[0], str):
            raise ToolError(f"{self._url} sent no picture.")
        try:
            return base64.b64decode(images[0].rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise ToolError(f"{self._url} sent a picture that is not base64.") from error

    def check(self) -> Status:
        """Ask which models it has."""
        return _reached(lambda: len(fetch_json(f"{self._url}/sdapi/v1/sd-models", timeout=TIMEOUT)))


class ComfyUi:
    """A ComfyUI server.

    Args:
        url: as http://127.0.0.1:8188.
        workflow: a workflow saved in API format, in which the text {description} stands for what is to be drawn;
            a plain one with the server's first model if None.
    """

    name = "comfyui"
    note = ""

    def __init__(self, url: str, workflow: Path | None = None) -> None:
        self._url = check_url(url)
        self._workflow = workflow

    def draw(self, description: str) -> bytes:
        """Queue a workflow, wait for it, and fetch its first picture."""
        queued = fetch_json(f"{self._url}/prompt", timeout=TIMEOUT, send={"prompt": self._filled(description)})
        number = queued.get("prompt_id") if isinstance(queued, dict) else None
        if not isinstance(number, str):
            raise ToolError(f"{self._url} did not take the workflow.")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            history = fetch_json(f"{self._url}/history/{number}", timeout=TIMEOUT)
            done = history.get(number) if isinstance(history, dict) else None
            if isinstance(done, dict):
                return self._picture(done)
            time.sleep(ASK_EVERY_S)
        raise ToolError(f"{self._url} made no picture within {SECONDS:g} s.")

    def check(self) -> Status:
        """Ask which models it has."""
        return _reached(lambda: len(self._models()))

    def _picture(self, done: dict[str, Any]) -> bytes:
        """The first picture of a finished workflow."""
        outputs = done.get("outputs")
        for output in outputs.values() if isinstance(outputs, dict) else ():
            for image in output.get("images", ()) if isinstance(output, dict) else ():
                values = {key: str(image.get(key, "")) for key in ("filename", "subfolder", "type")}
                return fetch(with_query(f"{self._url}/view", values), timeout=TIMEOUT)
        raise ToolError(f"{self._url} finished the workflow without a picture.")

    def _models(self) -> list[str]:
        found = fetch_json(f"{self._url}/object_info/CheckpointLoaderSimple", timeout=TIMEOUT)
        try:
            return [str(name) for name in found["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]]
        except (KeyError, IndexError, TypeError) as error:
            raise ToolError(f"{self._url} does not answer as ComfyUI does.") from error

    def _filled(self, description: str) -> Any:
        """The workflow with the description in its place."""
        if self._workflow is None:
            models = self._models()
            if not models:
                raise ToolError(f"the ComfyUI at {self._url} has no model.")
            return _plain_workflow(models[0], description)
        try:
            text = self._workflow.read_text("utf-8")
            if _BLANK not in text:
                raise ToolError(f"{self._workflow} has no {_BLANK} where the description belongs.")
            return json.loads(text.replace(_BLANK, json.dumps(description)[1:-1]))
        except (OSError, ValueError) as error:
            raise ToolError(f"{self._workflow} cannot be read as a workflow: {error}.") from error


def _plain_workflow(model: str, description: str) -> dict[str, Any]:
    """Model, two texts, an empty picture, sampling, decoding, saving."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    sampled = {"seed": random.getrandbits(48), "steps": STEPS, "cfg": 7.0, "sampler_name": "euler", "denoise": 1.0}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=model),
        "2": node("CLIPTextEncode", text=description, clip=["1", 1]),
        "3": node("CLIPTextEncode", text="", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "5": node(
            "KSampler",
            model=["1", 0],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            scheduler="normal",
            **sampled,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="moss-jt"),
    }


def _reached(count: Callable[[], int]) -> Status:
    """Whether a server answers, and how many models it has."""
    try:
        models = count()
    except (ToolError, TypeError) as error:
        return Status("fail", str(error))
    if not models:
        return Status("fail", pick("it has no model", "没有模型"))
    return Status("ok", pick(f"answers; models: {models}", f"可以连接；模型数：{models}"))
