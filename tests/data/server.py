"""A file server on this machine that can break off, ignore ranges, refuse, and counts what it sends."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves a folder.

    Attributes
    ----------
    url
        Its address.
    cuts
        For each answer with content to come: after how many bytes the connection is cut; then none is.
    served
        Bytes of content sent so far.
    asked
        (method, path, first byte) of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cuts: list[int] = []
        self.ranges, self.status, self.head, self.md5 = True, 200, True, None
        self.served, self.asked = 0, []
        self.url = ""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, server_state: Server, *args, **kwargs) -> None:
        self.state = server_state
        super().__init__(*args, directory=str(server_state.folder), **kwargs)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self.state.head:
            self.send_error(405)
        else:
            self.answer(content=False)

    def do_GET(self) -> None:
        self.answer(content=True)

    def answer(self, content: bool) -> None:
        state, path = self.state, Path(self.translate_path(self.path))
        found = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        start = int(found[1]) if found and state.ranges else 0
        state.asked.append((self.command, self.path, int(found[1]) if found else None))
        if state.status != 200:
            return self.send_error(state.status)
        if path.is_dir():
            return super().do_GET() if content else super().do_HEAD()
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        elif state.md5:
            self.send_header("Content-MD5", state.md5)
        self.end_headers()
        if content:
            end = start + state.cuts.pop(0) if state.cuts else len(data)
            self.wfile.write(data[start:end])
            state.served += len(data[start:end])
            if end < len(data):
                self.wfile.flush()
                self.connection.close()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        pass  # of connections that the tests cut


@contextmanager
def serving(folder: Path):
    state = Server(folder)
    http = _Quiet(("127.0.0.1", 0), partial(_Handler, state))
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
