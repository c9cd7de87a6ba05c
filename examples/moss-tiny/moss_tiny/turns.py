"""Turns of a conversation: a question with thoughts, commands, results and answer, for the tools that are on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moss_jt.errors import ToolError
from moss_jt.template import Turn
from moss_jt.tools.wording import NOTHING_RAN
from moss_tiny.intents import Intent
from moss_tiny.results import Search, calls_of, results_of, value_of
from moss_tiny.sums import Task
from moss_tiny.wordings import Language

Tools = Collection[str]  # keys of moss_jt.template.TOOLS

TOOL_OF = {"Calculate": "calc", "Solve": "solve", "Search": "search", "Text2Image": "draw"}
LONGEST_NUMBER = 12  # characters of a result that an answer repeats; a longer fraction is cut
LONGEST_ROOTS = 48  # characters of a solution; equations with longer ones are not asked

THOUGHTS = {  # those before the calculator and the solver come with their tasks
    "search": {"en": "I should search the documentation.", "zh": "需要搜索文档。"},
    "draw": {"en": "I need to make a picture.", "zh": "需要画一张图。"},
    "": {"en": "No tool is needed.", "zh": "不需要工具。"},
}
DISABLED = {
    "calc": {"en": "The calculator is disabled.", "zh": "计算器没有打开。"},
    "solve": {"en": "The equation solver is disabled.", "zh": "方程求解器没有打开。"},
    "draw": {"en": "Text-to-image is disabled.", "zh": "文生图没有打开。"},
}
UNABLE = {
    "calc": {
        "en": "I cannot calculate without the calculator. Start me with --tools calc.",
        "zh": "没有计算器我算不了，请用 --tools calc 启动。",
    },
    "solve": {
        "en": "I cannot solve equations without the solver. Start me with --tools solve.",
        "zh": "没有求解器我解不了方程，请用 --tools solve 启动。",
    },
    "draw": {
        "en": "I cannot draw without the picture tool. Start me with --tools draw.",
        "zh": "没有画图工具我画不了，请用 --tools draw 启动。",
    },
}
NOTHING_FOUND = {
    "en": "The search found nothing about that, and I am too small to know it.",
    "zh": "没有搜索到相关内容；我太小了，不知道这个。",
}
RESULT = {"en": "The result is ", "zh": "结果是 "}
PICTURE = {"en": "Here is your picture.", "zh": "图片画好了。"}


@dataclass(frozen=True)
class Answered:
    """A turn, and the number that a next question may go on with, if there is one."""

    turn: Turn
    number: str | None = None


def plain_turn(question: str, answer: str, language: Language, tools: Tools) -> Turn:
    """A turn in which nothing is called."""
    if not tools:
        return Turn(question, moss=answer)
    return Turn(question, THOUGHTS[""][language], None, NOTHING_RAN, answer)


def task_turn(task: Task, language: Language, tools: Tools) -> Answered | None:
    """A turn for the calculator, the solver or the painter; None where its result is missing or too long."""
    calls = calls_of(task.command)
    tool = TOOL_OF[calls[0].name]
    if tool not in tools:
        return Answered(_refused(task.question, tool, language, tools))
    if tool == "draw":
        return Answered(_called(task, tool, language, PICTURE[language]))
    try:
        values = [value_of(call.name, call.arguments[0]) for call in calls]
    except ToolError:
        return None
    if tool == "solve":
        return _solved(task, values[0], language)
    said = [_shortened(value) for value in values]
    number = said[0] if len(said) == 1 and _goes_on(said[0]) else None
    return Answered(_called(task, tool, language, _numbers(said, language)), number)


def search_call(query: str) -> str:
    """The call of the search."""
    return f'Search("{query}")'


def search_turn(intent: Intent, question: str, language: Language, search: Search) -> Turn:
    """A turn that looks an intent up; the answer names the first source that holds the fact, if one does."""
    command = search_call(intent.query(language))
    hits = [hit.text.lower() for hit in search(intent.query(language))]
    sources = [number for number, text in enumerate(hits, 1) if intent.fact[language].lower() in text]
    answer = intent.say[language] + (f"<sup><|{sources[0]}|></sup>" if sources else "")
    return _called(Task(question, command), "search", language, answer, search)


def lost_turn(question: str, language: Language, search: Search) -> Turn:
    """A turn that looks up what the documentation cannot know."""
    command = search_call(question.rstrip(".?!。？！"))
    return _called(Task(question, command), "search", language, NOTHING_FOUND[language], search)


def _called(task: Task, tool: str, language: Language, answer: str, search: Search | None = None) -> Turn:
    results = results_of(task.command, search)
    return Turn(task.question, task.thought or THOUGHTS[tool][language], task.command, results, answer)


def _refused(question: str, tool: str, language: Language, tools: Tools) -> Turn:
    """A turn that would need a tool that is off."""
    answer = UNABLE[tool][language]
    if not tools:
        return Turn(question, moss=answer)
    return Turn(question, DISABLED[tool][language], None, NOTHING_RAN, answer)


def _solved(task: Task, value: str, language: Language) -> Answered | None:
    said = ", ".join(value.split("\n"))
    if len(said) > LONGEST_ROOTS:
        return None
    answer = {"en": f"The solution is {said}.", "zh": f"解是 {said}。"}[language]
    return Answered(_called(task, "solve", language, answer))


def _numbers(said: list[str], language: Language) -> str:
    if len(said) == 1:
        end = "" if said[0].endswith("…") else {"en": ".", "zh": "。"}[language]
        return RESULT[language] + said[0] + end
    return {"en": f"The results are {' and '.join(said)}.", "zh": f"结果分别是 {' 和 '.join(said)}。"}[language]


def _shortened(value: str) -> str:
    """A result as it is said: the fraction of a long one is cut, and dots say so."""
    if len(value) <= LONGEST_NUMBER or "." not in value[: LONGEST_NUMBER - 2] or "e" in value:
        return value
    return value[:LONGEST_NUMBER].rstrip(".") + "…"


def _goes_on(value: str) -> bool:
    """Whether a next question may use the number: short, positive, complete."""
    return len(value) <= 8 and not value.startswith("-") and not value.endswith("…") and "e" not in value
