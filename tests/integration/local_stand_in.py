"""A stand-in for `moe-pod` in tests of the local shell: a process that answers probes, and nothing else.

Arguments steer it: `exit N` ends with N after it wrote its environment, `daemon` leaves a detached process behind.
"""

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> int:
    state = Path(os.environ["MOERATOR_STATE_DIR"])
    runs = state / "runs"
    runs.write_text(f"{runs.read_text() if runs.exists() else ''}{os.getpid()}\n")
    (state / "environment.json").write_text(json.dumps(dict(os.environ)))
    if "daemon" in sys.argv:
        daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (state / "daemon").write_text(str(daemon.pid))
    if "exit" in sys.argv:
        return int(sys.argv[sys.argv.index("exit") + 1])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    port = os.environ.get("MOERATOR_HEALTH_PORT") or os.environ.get("STAND_IN_PORT")
    if port:
        HTTPServer(("127.0.0.1", int(port)), Health).serve_forever()
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
