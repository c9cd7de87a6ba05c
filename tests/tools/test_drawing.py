"""Text2Image: servers in two dialects, diffusers in its own process, and the picture that says there is none."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Asked, LocalServer, serving

from moss_jt import paths
from moss_jt.errors import ConfigError, ToolError, ToolLimitError
from moss_jt.tools.backends import drawing_backend
from moss_jt.tools.drawing import Placeholder, drawing_tool
from moss_jt.tools.drawing_diffusers import Diffusers
from moss_jt.tools.drawing_servers import Automatic1111, ComfyUi
from moss_jt.tools.png import encode
from moss_jt.tools.tool import Picture

PNG = encode([bytes(range(8))] * 8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moss_jt.tools.drawing_servers.ASK_EVERY_S", 0.001)
    with serving() as local:
        yield local


def chunks(content: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG file, each checksum checked."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length) == (zlib.crc32(kind + body),)
        found[kind] = body
        at += 12 + length
    return found


def test_the_placeholder_says_plainly_what_it_is() -> None:
    picture = drawing_tool(Placeholder()).run("一只猫", "a cat")
    assert isinstance(picture, Picture)
    assert "only a placeholder: no image back end is set" in picture.note
    assert picture.path.parent == paths.home() / "images"
    found = chunks(picture.path.read_bytes())
    width, height, depth, colour = struct.unpack(">IIBB", found[b"IHDR"][:10])
    assert (width, height, depth, colour) == (512, 320, 8, 0)
    pixels = zlib.decompress(found[b"IDAT"])
    rows = [pixels[at + 1 : at + 1 + width] for at in range(0, len(pixels), width + 1)]
    dark = [number for number, row in enumerate(rows) if min(row) < 100]
    assert len(rows) == height and 60 < len(dark) < 200, "three lines of letters in the middle"
    assert "一只猫, a cat".encode() in found[b"iTXt"]
    assert picture.path.stat().st_mode & 0o077 == 0


def test_two_pictures_have_two_names() -> None:
    tool = drawing_tool(Placeholder())
    first, second = tool.run("a"), tool.run("a")
    assert isinstance(first, Picture) and isinstance(second, Picture)
    assert first.path != second.path
    with pytest.raises(ToolError, match="the description is empty"):
        tool.run(" ")


def test_automatic1111(server: LocalServer) -> None:
    server.routes["/sdapi/v1/txt2img"] = (200, {"images": [base64.b64encode(PNG).decode()]})
    server.routes["/sdapi/v1/sd-models"] = (200, [{"title": "m"}])
    backend = Automatic1111(server.url)
    picture = drawing_tool(backend).run("a cat")
    assert isinstance(picture, Picture)
    assert (picture.path.read_bytes(), picture.path.suffix, picture.note) == (PNG, ".png", "")
    assert server.asked[0].body["prompt"] == "a cat"
    assert backend.check().state == "ok"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"images": []}, "sent no picture"),
        ({"detail": "x"}, "sent no picture"),
        ({"images": ["%%%"]}, "not base64"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, "did not send a picture that is PNG"),
    ],
)
def test_automatic1111_that_fails(server: LocalServer, answer: object, words: str) -> None:
    server.routes["/sdapi/v1/txt2img"] = (200, answer)
    with pytest.raises(ToolError, match=words):
        drawing_tool(Automatic1111(server.url)).run("x")
    assert Automatic1111(server.url).check().state == "fail"


def comfy(server: LocalServer, outputs: object) -> None:
    """A ComfyUI that needs three questions until it is done."""
    polls: list[Asked] = []

    def history(asked: Asked) -> tuple[int, object]:
        polls.append(asked)
        return 200, {"job-1": {"outputs": outputs}} if len(polls) == 3 else {}

    models = {"CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["m.safetensors"]]}}}}
    server.routes |= {
        "/object_info/CheckpointLoaderSimple": (200, models),
        "/prompt": (200, {"prompt_id": "job-1"}),
        "/history/job-1": history,
        "/view": (200, PNG),
    }


def test_comfyui(server: LocalServer) -> None:
    comfy(server, {"7": {"images": [{"filename": "f.png", "subfolder": "s", "type": "output"}]}})
    assert ComfyUi(server.url).draw("a cat") == PNG
    workflow = next(asked.body["prompt"] for asked in server.asked if asked.path == "/prompt")
    assert workflow["1"]["inputs"] == {"ckpt_name": "m.safetensors"}
    assert workflow["2"]["inputs"]["text"] == "a cat"
    for node in workflow.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow, "every wire leads to a node"
    assert server.asked[-1].values == {"filename": "f.png", "subfolder": "s", "type": "output"}
    assert ComfyUi(server.url).check().state == "ok"


def test_comfyui_with_a_workflow_of_the_users_own(server: LocalServer, tmp_path: Path) -> None:
    comfy(server, {"9": {"images": [{"filename": "f.png"}]}})
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"4": {"class_type": "T", "inputs": {"text": "best, {description}"}}}))
    assert ComfyUi(server.url, path).draw('a "quoted"\ncat') == PNG
    assert server.asked[0].body["prompt"]["4"]["inputs"]["text"] == 'best, a "quoted"\ncat'
    path.write_text("{}")
    with pytest.raises(ToolError, match=r"has no {description} where"):
        ComfyUi(server.url, path).draw("x")
    path.write_text("{description")
    with pytest.raises(ToolError, match=r"has no|cannot be read as a workflow"):
        ComfyUi(server.url, path).draw("x")
    with pytest.raises(ToolError, match="cannot be read as a workflow"):
        ComfyUi(server.url, tmp_path / "missing.json").draw("x")


def test_comfyui_that_fails(server: LocalServer) -> None:
    comfy(server, {})
    with pytest.raises(ToolError, match="finished the workflow without a picture"):
        ComfyUi(server.url).draw("x")
    server.routes["/prompt"] = (400, {"error": "bad"})
    with pytest.raises(ToolError, match="refuses: 400"):
        ComfyUi(server.url).draw("x")
    server.routes["/object_info/CheckpointLoaderSimple"] = (200, {})
    with pytest.raises(ToolError, match="does not answer as ComfyUI does"):
        ComfyUi(server.url).draw("x")


DIFFUSERS = """
import os, pathlib
class Image:
    def save(self, path): pathlib.Path(path).write_bytes(bytes.fromhex({png!r}))
class AutoPipelineForText2Image:
    @classmethod
    def from_pretrained(cls, model):
        if model == "missing": raise OSError("no such model")
        if model == "slow":
            import signal; signal.pause()
        return cls()
    def to(self, device):
        assert device == "cpu"
        return self
    def __call__(self, description, **settings):
        pathlib.Path({log!r}).write_text(description + repr(settings) + str(os.getpid()))
        return type("Made", (), {{"images": [Image()]}})()
"""


@pytest.fixture
def diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The libraries diffusers and torch as far as they are used; gives the file that the pipeline writes."""
    log = tmp_path / "log"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "diffusers.py").write_text(DIFFUSERS.format(png=PNG.hex(), log=str(log)))
    (tmp_path / "lib" / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    return log


def test_diffusers_runs_in_a_process_of_its_own(diffusers: Path) -> None:
    assert Diffusers("some/sd-turbo").draw("a cat; import os") == PNG
    assert diffusers.read_text().startswith("a cat; import os{'num_inference_steps': 2")
    assert "diffusers" not in sys.modules and "torch" not in sys.modules
    assert Diffusers().check().state == "ok"
    with pytest.raises(ToolError, match="made no picture with missing: OSError: no such model"):
        Diffusers("missing").draw("x")
    with pytest.raises(ToolLimitError, match=r"made no picture within 0.5 s"):
        Diffusers("slow", seconds=0.5).draw("x")


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moss_jt.tools.drawing_diffusers.find_spec", lambda name: None)
    with pytest.raises(ToolError, match=r"pip install 'diffusers\[torch\]' transformers"):
        Diffusers().draw("x")
    assert Diffusers().check().state == "off"


def test_choosing_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(drawing_backend(), Placeholder)
    assert isinstance(drawing_backend("diffusers=some/model"), Diffusers)
    assert isinstance(drawing_backend("comfyui=http://127.0.0.1:1,w.json"), ComfyUi)
    monkeypatch.setenv("MOSS_JT_DRAW", "a1111=http://127.0.0.1:1")
    assert isinstance(drawing_backend(), Automatic1111)
    for wrong in ("dalle", "a1111", "comfyui="):
        with pytest.raises(ConfigError, match="is no back end to draw with; wanted is one of placeholder, a1111=URL"):
            drawing_backend(wrong)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="the picture cannot be written to"):
        drawing_tool(Placeholder(), tmp_path / "file" / "images").run("x")
