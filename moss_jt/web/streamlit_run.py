"""Runs Streamlit with our page, in a process of its own that ends with the one that started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moss_jt.errors import ConfigError, MossError

PORT = 8501
STARTING_S = 60.0
ENDING_S = 10.0
LOOK_S = 0.1
SCRIPT = Path(__file__).parent / "streamlit_script" / "page.py"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SETTINGS = {  # as variables, not as options: a Streamlit that does not know one passes over it
    "BROWSER_GATHER_USAGE_STATS": "false",
    "CLIENT_SHOW_ERROR_DETAILS": "none",
    "CLIENT_TOOLBAR_MODE": "minimal",
    "LOGGER_LEVEL": "error",
    "SERVER_ENABLE_STATIC_SERVING": "false",
    "SERVER_FILE_WATCHER_TYPE": "none",
    "SERVER_HEADLESS": "true",  # it opens no browser, and asks for no e-mail address
}


def serve(
    server: str,
    key: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    on_listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Show the page until Ctrl-C comes.

    Args:
        server: address of the server that it asks.
        key: of that server. Who sees the page uses it.
        host: where to listen.
        port: 0 takes a free one.
        on_listening: called with the address of the page once it is there.

    Raises:
        ConfigError: the address cannot be used.
        MossError: Streamlit does not start, or ends by itself.
    """
    port = _free_port(host, port)
    line = [sys.executable, "-m", __name__]
    variables = _variables(server, key, host, port)
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=variables, start_new_session=True
    ) as process:
        assert process.stdin is not None, "it was asked for"
        try:
            _await(process, host, port)
            on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            status = process.wait()
            raise MossError(f"Streamlit has ended by itself, with the status {status}; what it said is above.")
        except KeyboardInterrupt:
            pass
        finally:
            process.stdin.close()  # it ends
            _end(process)


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"the page cannot listen at {host}, port {port}: {reason}. Choose another --port.") from error


def _variables(server: str, key: str | None, host: str, port: int) -> dict[str, str]:
    """The environment of Streamlit; what others set for it there is left out."""
    settings = {**SETTINGS, "SERVER_ADDRESS": host, "SERVER_PORT": str(port)}
    if host in LOOPBACK:
        settings["SERVER_ALLOWED_HOSTS"] = " ".join(LOOPBACK)  # no name of another site leads here
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLIT_")}
    kept |= {f"STREAMLIT_{name}": value for name, value in settings.items()}
    kept |= {"MOSS_JT_SERVER": server, "MOSS_JT_KEY": key or ""}
    package = str(Path(__file__).parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(part for part in (package, kept.get("PYTHONPATH", "")) if part)
    return kept


def _await(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Wait until it takes connections."""
    deadline = time.monotonic() + STARTING_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MossError(f"Streamlit did not start: it ended with the status {process.returncode}.")
        try:
            socket.create_connection((host, port), LOOK_S).close()
            return
        except OSError:
            time.sleep(LOOK_S)
    raise MossError(f"Streamlit did not start within {STARTING_S:.0f} s.")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()


def main() -> None:
    """Be the process of Streamlit; it ends when its standard input does, however that came."""
    from streamlit.web.cli import main as streamlit

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["streamlit", "run", str(SCRIPT)]
    streamlit()


if __name__ == "__main__":
    main()
