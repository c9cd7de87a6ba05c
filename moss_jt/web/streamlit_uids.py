"""The uids of one's conversations, kept by the browser: a server without keys lists none, since there they are the secret.

A reload of the page, or another one of the same browser, finds them again. Nothing else is kept there.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

MOST = 200
_SCRIPT = """
export default function ({ data, setStateValue }) {
  const read = () => {
    try {
      const found = JSON.parse(localStorage.getItem(data.name));
      return Array.isArray(found) ? found.filter((uid) => typeof uid === "string") : [];
    } catch {
      return [];
    }
  };
  const stored = read();
  const uids = [...new Set([...data.added, ...stored])].filter((uid) => !data.dropped.includes(uid)).slice(0, data.most);
  try {
    if (JSON.stringify(uids) !== JSON.stringify(stored)) localStorage.setItem(data.name, JSON.stringify(uids));
  } catch {} // a browser that keeps nothing: this session still has them
  if (JSON.stringify(uids) !== JSON.stringify(data.known)) setStateValue("uids", uids);
}
"""


def remember(server: str, *, known: Sequence[str], added: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """Tell the browser of new and deleted conversations; give those that it has, the newest first.

    The first time that a page is drawn nothing has come from the browser yet; it is drawn again when it has.

    Args:
        server: the address; each has conversations of its own.
        known: what was given the last time.
        added: the newest first.
    """
    component = st.components.v2.component("moss_jt_uids", js=_SCRIPT)
    data = {
        "name": f"moss-jt {server}",
        "known": list(known),
        "added": list(added),
        "dropped": list(dropped),
        "most": MOST,
    }
    found = component(key="uids", data=data, default={"uids": list(known)}, on_uids_change=lambda: None, height=0)
    return [str(uid) for uid in found.uids or ()]
