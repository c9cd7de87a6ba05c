"""A server with the toy engine as a program: python serve_toy.py FOLDER [PORT]; prints its URL."""

from __future__ import annotations

import sys
from pathlib import Path

from toy_engine import MakeToy

from moss_jt.server.running import serve
from moss_jt.server.settings import ServerSettings


def main() -> None:
    """Serve until told to end."""
    settings = ServerSettings(Path(sys.argv[1]) / "moss.db", port=0, name="toy", grace_s=5)
    serve(settings, MakeToy(), on_listening=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
