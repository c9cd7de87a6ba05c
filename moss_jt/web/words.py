"""What the pages say, in both languages, by key; the language of a page changes while it is looked at."""

from __future__ import annotations

from moss_jt.language import Language

LANGUAGES: dict[Language, str] = {"en": "English", "zh": "中文"}

_WORDS: dict[str, tuple[str, str]] = {
    "title": ("MOSS", "MOSS"),
    "ask": ("Say something to MOSS", "和 MOSS 说点什么"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Answer again", "重新回答"),
    "edit": ("Edit the last question", "修改上一个问题"),
    "keep": ("Do not edit", "取消修改"),
    "editing": (
        "Your next message takes the place of the last question and its answer.",
        "下一条消息将替换上一个问题及其回答。",
    ),
    "conversations": ("Conversations", "对话"),
    "new": ("New conversation", "新对话"),
    "delete": ("Delete", "删除"),
    "export": ("Export", "导出"),
    "no_title": ("(no text)", "（无文字）"),
    "empty": ("Nothing has been said yet.", "还没有对话。"),
    "language": ("Language", "语言"),
    "sampling": ("Sampling", "采样设置"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0 always takes the best token.", "0 表示总取概率最大的词元。"),
    "top_p": ("top_p", "top_p"),
    "top_p_info": (
        "Choose among the best tokens that make up this share of the probability.",
        "只在累计概率达到该值的词元中选择。",
    ),
    "top_k": ("top_k", "top_k"),
    "top_k_info": ("Choose among this many tokens; 0 is all of them.", "只在前若干个词元中选择；0 表示不限。"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "repetition_penalty_info": ("1 is none.", "1 表示不惩罚。"),
    "max_new_tokens": ("Longest answer (tokens)", "最长回答（词元）"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("Leave it empty for another answer each time.", "留空则每次的回答不同。"),
    "reset": ("MOSS's own values", "恢复默认值"),
    "thoughts": ("Thoughts and tools", "思考与工具"),
    "thinks": ("Thoughts", "思考"),
    "commands": ("Calls", "调用"),
    "results": ("Results", "结果"),
    "sources": ("Sources", "来源"),
    "picture": ("Picture", "图片"),
    "state": ("Server", "服务器"),
    "loading": ("The model is being loaded: {task} {percent} %", "正在加载模型：{task} {percent} %"),
    "model": ("Model", "模型"),
    "speed": ("Speed", "速度"),
    "tokens_per_s": ("{value} tokens/s", "{value} 词元/秒"),
    "memory": ("Memory", "内存"),
    "resident": ("held in memory", "常驻内存"),
    "streamed": ("read from disk for each pass", "每次计算从磁盘读取"),
    "kv": ("conversations (KV cache)", "对话缓存（KV）"),
    "device": ("on the device", "显存中"),
    "limit": ("allowed", "内存上限"),
    "vram_limit": ("allowed on the device", "显存上限"),
    "queue": ("Queue", "队列"),
    "queued": ("{running} running, {waiting} waiting", "{running} 个进行中，{waiting} 个等待"),
    "tools": ("Tools", "工具"),
    "no_tools": ("none", "无"),
    "stopped": ("Stopped.", "已停止。"),
    "cut_length": ("The answer reached its longest length.", "回答已达到最大长度。"),
    "cut_time": ("The answer reached its longest time.", "回答已达到最长时间。"),
    "waiting": ("Waiting for the server …", "正在等待服务器……"),
    "gone": ("This conversation is no longer on the server.", "服务器上已没有这个对话。"),
    "nothing_to_export": ("There is no conversation to export yet.", "还没有可导出的对话。"),
    "key": ("Your key of the server", "服务器密钥"),
    "login": (
        "Log in with the name of your key and the key itself (moss-jt keys add NAME).",
        "请用密钥名称和密钥登录（moss-jt keys add NAME）。",
    ),
}


def say(key: str, language: Language, **values: object) -> str:
    """The wording of a key; its {names} are filled in."""
    wording = _WORDS[key][1 if language == "zh" else 0]
    return wording.format(**values) if values else wording


def language_of(accepted: str | None) -> Language:
    """The language that a browser's header Accept-Language asks for first."""
    first = (accepted or "").split(",")[0].strip().lower()
    return "zh" if first == "zh" or first.startswith("zh-") else "en"
