"""Drawing with the library diffusers where it is installed (the extra "draw"), in a process of its own.

The process brings torch with it, whose gigabytes must not stay beside the language model's: it is started for a
picture and ends with it. It gets the description on its stdin and writes the picture to a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from moss_jt.errors import ToolError, ToolLimitError
from moss_jt.language import pick
from moss_jt.tools.drawing import SECONDS
from moss_jt.tools.tool import Status

MODEL = "stabilityai/sd-turbo"
_INSTALL = "pip install 'diffusers[torch]' transformers"
_PROGRAM = """
import json, sys
wanted = json.load(sys.stdin)
from diffusers import AutoPipelineForText2Image
pipeline = AutoPipelineForText2Image.from_pretrained(wanted["model"])
import torch
pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
settings = {"num_inference_steps": 2, "guidance_scale": 0.0} if "turbo" in wanted["model"] else {}
pipeline(wanted["description"], **settings).images[0].save(wanted["path"])
"""


class Diffusers:
    """Pictures by diffusers.

    Args:
        model: its name on a hub or its folder.
        seconds: that a picture may take; the process is killed after them.
    """

    name = "diffusers"
    note = ""

    def __init__(self, model: str = MODEL, *, seconds: float = SECONDS) -> None:
        self._model = model
        self._seconds = seconds

    def draw(self, description: str) -> bytes:
        """Start the process, wait for it, read the picture."""
        if find_spec("diffusers") is None:
            raise ToolError(f"the library diffusers is not installed. Run: {_INSTALL}")
        with tempfile.TemporaryDirectory(prefix="moss-jt-") as folder:
            path = Path(folder, "picture.png")
            wanted = {"model": self._model, "description": description, "path": str(path)}
            try:
                done = subprocess.run(
                    [sys.executable, "-c", _PROGRAM],
                    input=json.dumps(wanted),
                    capture_output=True,
                    text=True,
                    timeout=self._seconds,
                    check=False,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired as error:
                raise ToolLimitError(f"diffusers made no picture within {self._seconds:g} s.") from error
            if done.returncode or not path.exists():
                last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
                raise ToolError(f"diffusers made no picture with {self._model}: {last[:300]}")
            return path.read_bytes()

    def check(self) -> Status:
        """Whether it is installed; the model is not loaded."""
        if find_spec("diffusers") is None or find_spec("torch") is None:
            return Status("off", pick(_INSTALL, f"请安装：{_INSTALL}"))
        return Status("ok", pick(f"installed; model {self._model}", f"已安装；模型 {self._model}"))
