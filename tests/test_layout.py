"""The house holds: who imports whom, the links, what `import moss_jt` and `--help` load, the two READMEs.

The rows are those of docs/architecture.md. A new module must be given its row here.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("converters", "kernels", "cli")
ROWS = {
    0: "config messages layout kv_layout errors progress language paths memory pages record device",
    1: "checked_file safetensors_file checkpoint packing plan predict tokenizer template kernels startup native reader limits accelerator sharing",
    2: "ops ops_grad nodes frozen frozen_device launch batch budget cache sampling shortlist tiers weights synthetic device_weights device_products device_ops device_blocks host_share workspace placement",
    3: "model adapter device_check",
    4: "runner engine generation",
    5: "chat tools load hub pull_plan fetch stored doctor bench perplexity converters calibrate measuring fit fit_device finetune",
    6: "server web",
    7: "cli",
}
ROW_OF = {name: row for row, names in ROWS.items() for name in names.split()}
NOT_FOR_CONVERTERS = {"kernels", "startup", "native", "reader", "limits"}
CONVERTERS_SEE = set((ROWS[0] + " " + ROWS[1]).split()) - NOT_FOR_CONVERTERS | {"converters"}
KERNELS_SEE = set(ROWS[0].split()) | {"packing", "kernels"}
WEB_SEES = set(ROWS[0].split()) | {"tools", "web"}  # a server it asks over HTTP; of tools only how answers cite
ONLY_IN = {  # a third-party module -> the parts that may import it
    "jittor": {"startup"},
    "cupy": {"startup", "launch", "kernels"},
    "click": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "tqdm": {"cli"},
    "sympy": {"tools"},
    "mpmath": {"tools"},
    "ddgs": {"tools"},
    "diffusers": set(),
    "tensorboardX": {"finetune"},
    "fastapi": {"server", "web"},
    "starlette": {"server", "web"},
    "uvicorn": {"server", "web"},
    "gradio": {"web"},
    "streamlit": {"web"},
    "httpx": {"web"},
    "markdown_it": {"web"},
    "mdit_py_plugins": {"web"},
    "pydantic": {"server"},
    "prometheus_client": {"server"},
    "torch": set(),
    "transformers": set(),
}
OWN_PROCESS = {"moss_jt/startup/build.py"}  # runs as a child; what it prints is read by its parent
HEAVY = (
    "jittor",
    "cupy",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "torch",
    "sympy",
    "mpmath",
    "fastapi",
    "uvicorn",
    "gradio",
    "streamlit",
    "httpx",
    "markdown_it",
)


def code_files() -> list[Path]:
    """Every module of the package, by its real path."""
    folders = [ROOT / "moss_jt", *(ROOT / room for room in ROOMS)]
    files = [file for folder in folders for file in folder.rglob("*.py") if not is_in_link(file)]
    assert len(files) > 20, "the search for modules finds too few"
    return sorted(set(files))


def is_in_link(file: Path) -> bool:
    """Whether the path goes through one of the links moss_jt/<room>."""
    return file.resolve() != file


def part_of(file: Path) -> str:
    """The part that a file belongs to: the first name below moss_jt, or the room."""
    inside = file.relative_to(ROOT).parts
    if inside[0] in ROOMS:
        return inside[0]
    return inside[1].removesuffix(".py")


@cache
def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(file.read_text("utf-8"), str(file))


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import in a file, those inside functions and for types too."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write the full name instead of a relative import"
            assert node.module, f"{file}:{node.lineno}: an import of nothing"
            if node.module == "moss_jt":
                yield from ((node.lineno, f"moss_jt.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def own_imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of our own parts in a file."""
    for line, name in imports_of(file):
        if name.startswith("moss_jt."):
            yield line, name.split(".")[1]


def place(file: Path, line: int) -> str:
    """file:line, for a message."""
    return f"{file.relative_to(ROOT)}:{line}"


def test_every_part_has_a_row() -> None:
    parts = {part_of(file) for file in code_files()} - {"__init__"}
    assert parts <= set(ROW_OF), (
        f"give these a row in tests/test_layout.py and docs/architecture.md: {parts - set(ROW_OF)}"
    )
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    missing = {part for part in parts if not re.search(rf"^ .*\b{part}\b", text, re.MULTILINE)}
    assert not missing, f"docs/architecture.md does not show {missing}"


def test_imports_go_down_or_sideways() -> None:
    wrong = []
    for file in code_files():
        part = part_of(file)
        if part == "__init__":
            continue  # the face of the package: it names things, and fetches them when asked
        for line, other in own_imports_of(file):
            if other in ROW_OF and ROW_OF[other] > ROW_OF[part]:
                wrong.append(f"{place(file, line)}: {part} (row {ROW_OF[part]}) imports {other} (row {ROW_OF[other]})")
    assert not wrong, "\n".join(wrong)


def test_errors_see_nobody() -> None:
    assert [name for _, name in imports_of(ROOT / "moss_jt" / "errors.py") if name.startswith("moss_jt")] == []


@pytest.mark.parametrize(
    ("room", "sees"), [("converters", CONVERTERS_SEE), ("kernels", KERNELS_SEE), ("web", WEB_SEES)]
)
def test_rooms_see_little(room: str, sees: set[str]) -> None:
    wrong = [
        f"{place(file, line)} imports {other}"
        for file in code_files()
        if part_of(file) == room
        for line, other in own_imports_of(file)
        if other not in sees
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for file in code_files():
        part = part_of(file)
        if part != "__init__":
            arrows.setdefault(part, set()).update(other for _, other in own_imports_of(file) if other != part)

    def walk(part: str, path: list[str]) -> None:
        assert part not in path, " -> ".join([*path, part])
        for other in arrows.get(part, set()):
            walk(other, [*path, part])

    for part in arrows:
        walk(part, [])


def test_third_party_modules_stay_in_their_place() -> None:
    wrong = [
        f"{place(file, line)}: {part_of(file)} imports {name}"
        for file in code_files()
        for line, name in imports_of(file)
        if name.split(".")[0] in ONLY_IN and part_of(file) not in ONLY_IN[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["gradio", "streamlit"])
def test_one_file_knows_a_library_of_pages(name: str) -> None:
    knowing = {file.name for file in code_files() for _, imported in imports_of(file) if imported.split(".")[0] == name}
    assert all(file.startswith(name) or file == "page.py" for file in knowing), knowing


def test_nobody_imports_a_room_by_its_bare_name() -> None:
    everywhere = [*code_files(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    wrong = [
        f"{place(file, line)} imports {name}; write moss_jt.{name}"
        for file in everywhere
        for line, name in imports_of(file)
        if name.split(".")[0] in ROOMS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        place(file, node.lineno)
        for file in code_files()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
        and part_of(file) != "cli"
        and file.relative_to(ROOT).as_posix() not in OWN_PROCESS
    ]
    assert not wrong, f"prints outside of cli: {', '.join(wrong)}"


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_rooms(room: str) -> None:
    link = ROOT / "moss_jt" / room
    assert link.is_symlink(), f"{link} is not a link: run `ln -sfn ../{room} moss_jt/{room}`"
    assert link.readlink() == Path("..", room)
    assert link.resolve() == ROOT / room
    assert (link / "__init__.py").is_file()


def run_python(code: str, *arguments: str) -> str:
    """The standard output of a fresh interpreter in the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    code = "import json, sys, moss_jt; print(json.dumps([n for n in sys.argv[1:] if n in sys.modules]))"
    assert json.loads(run_python(code, *HEAVY)) == []


HELP = """
import json, sys
from importlib import import_module
module, words, heavy = json.loads(sys.argv[1])
sys.argv = ["program", *words, "--help"]
try:
    import_module(module).main()
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code, "loaded": [n for n in heavy if n in sys.modules]}))
"""

FIND_COMMANDS = """
import json, click
from moss_jt.cli.main import make_group
def walk(command, words):
    yield words
    if isinstance(command, click.Group):
        with click.Context(command) as ctx:
            for name in command.list_commands(ctx):
                yield from walk(command.get_command(ctx, name), [*words, name])
print(json.dumps([*walk(make_group(), [])]))
"""


def test_help_loads_nothing_heavy() -> None:
    calls = [("moss_jt.cli.main", words) for words in json.loads(run_python(FIND_COMMANDS))]
    assert len(calls) > 8, calls
    for module, words in [*calls, ("moss_jt.cli.convert", [])]:
        last = run_python(HELP, json.dumps([module, words, HEAVY])).splitlines()[-1]
        assert json.loads(last) == {"code": 0, "loaded": []}, f"{module} {' '.join(words)} --help: {last}"


def headings(text: str) -> list[int]:
    """The levels of a page's headings, in order, those in code blocks left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]


def code_blocks(text: str) -> list[str]:
    """The code blocks of a page without their comments and what a program answered in words."""
    blocks = re.findall(r"^```(?:sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s*#.*", "", block) for block in blocks]


def test_both_readmes_say_the_same() -> None:
    english = (ROOT / "README.md").read_text("utf-8")
    chinese = (ROOT / "README.zh.md").read_text("utf-8")
    assert headings(english) == headings(chinese)
    assert len(headings(english)) > 5
    assert code_blocks(english) == code_blocks(chinese)
    assert len(code_blocks(english)) > 3
    names = re.compile(r"`[^`\n]+`")
    assert sorted(set(names.findall(english))) == sorted(set(names.findall(chinese)))
    numbers = re.compile(r"\d+\.\d+")
    assert sorted(numbers.findall(english)) == sorted(numbers.findall(chinese))


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh.md", "docs/architecture.md", "docs/tools.md", "docs/web.md", "CHANGELOG.md"]
)
def test_links_of_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing, f"{page} links to {missing}"


def test_every_kernel_has_a_test_and_a_bench() -> None:
    headers = [file for file in (ROOT / "kernels" / "cpu").glob("*.h")]
    assert headers, "no CPU kernels found"
    tested = "\n".join(file.read_text("utf-8") for file in sorted((ROOT / "tests" / "kernels").glob("*.py")))
    for header in headers:
        assert re.search(rf"\b{header.stem}\b", tested), f"no test names kernels/cpu/{header.name}"
    for program in (ROOT / "kernels" / "host").glob("*.cpp"):
        named = [f for f in (ROOT / "tests").glob("*.py") if f"host/{program.name}" in f.read_text("utf-8")]
        assert named, f"no test names kernels/host/{program.name}"
    launched = "\n".join(file.read_text("utf-8") for file in (ROOT / "moss_jt").glob("device_*.py"))
    for source in (ROOT / "kernels").glob("*.cu"):
        assert f'kernels_of("{source.stem}"' in tested, f"no test runs {source.name} on the host"
        assert f'"{source.stem}"' in launched, f"nothing launches {source.name}"


def test_no_file_is_long() -> None:
    long = {str(f.relative_to(ROOT)): n for f in code_files() if (n := len(f.read_text("utf-8").splitlines())) > 500}
    assert not long, f"more than 500 lines usually holds two ideas: {long}"
