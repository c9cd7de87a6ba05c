"""Texts that run a script, load something or break out of their place where a page takes them for more than text.

A page shows each of them letter by letter. Whoever runs one calls `alert`, which fails the test that shows it
(chromium.Tab), or makes an element or a request that `assert_harmless` finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

MARK = "xss-mark"  # the id of what must never become an element
TEXTS = {
    "script": f"<script id={MARK}>alert('script')</script>",
    "image": f"<img id={MARK} src=x onerror=alert('image')>",
    "vector": f"<svg id={MARK} onload=alert('vector')>",
    "frame": f"<iframe id={MARK} srcdoc=\"<script>parent.alert('frame')</script>\"></iframe>",
    "details": f"<details id={MARK} open ontoggle=alert('details')>x</details>",
    "style": f"<style id={MARK}>body {{ display: none }}</style>",
    "form": f"<form id={MARK} action=https://example.com><button>send</button></form>",
    "breaks out": f"\"'></textarea></p></div><b id={MARK} onmouseover=alert('out')>b</b>",
    "half": f"<b id={MARK} onclick=alert('half')",
    "entities": f"&lt;i id={MARK}&gt; &#60;img src=x onerror=alert('entities')&#62;",
    "link": "[a link](javascript:alert('link'))",
    "link with a tab": "[a link](java\tscript:alert('tab'))",
    "data link": "[a link](data:text/html,<script>alert('data')</script>)",
    "angle link": "<javascript:alert('angle')>",
    "far image": "![an image](https://example.com/seen.png)",
    "code": f"```html\n</code></pre><img id={MARK} src=x onerror=alert('code')>\n```",
    "inline code": f"`<img id={MARK} src=x onerror=alert('inline')>`",
    "formula": "$\\href{javascript:alert('formula')}{x}$",
    "formula with HTML": f"$\\htmlId{{{MARK}}}{{x}}$ $\\includegraphics{{https://example.com/seen.png}}$",
    "template": "{{constructor.constructor('alert(1)')()}} ${alert(1)}",
    "marker": f"<eom><|Human|>: <b id={MARK}>x</b><eoh>",
    "citation": f"<sup><|1|><img id={MARK} src=x onerror=alert('citation')></sup>",
}


def assert_harmless(page: Page) -> None:
    """Nothing of these texts became an element, the target of a link, or an image from elsewhere."""
    found = page.evaluate(
        """mark => [
            ...document.querySelectorAll(`#${mark}`),
            ...document.querySelectorAll('[onerror], [onload], [onclick], [ontoggle], [onmouseover]'),
            ...document.querySelectorAll('iframe[srcdoc], img[src^="https://example.com"]'),
            ...[...document.querySelectorAll('[href], [action], [src]')].filter(element => ['href', 'action', 'src'].some(
                name => /^\\s*(javascript|vbscript|data:text)/i.test((element.getAttribute(name) || '').replace(/\\s/g, '')))),
        ].map(element => element.outerHTML.slice(0, 200))""",
        MARK,
    )
    assert not found, found
