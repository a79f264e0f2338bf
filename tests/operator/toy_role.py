"""A stand-in for a role in tests of `millrace up`: answers /ready, dies on request, or will not stop.

python toy_role.py gateway PORT     200 on /ready, until SIGTERM
python toy_role.py idle             nothing, until SIGTERM
python toy_role.py stubborn         ignores the first SIGTERM
python toy_role.py crash            says where and ends with status 3
python toy_role.py misconfigured    ends with status 2 after saying what to do
"""

import http.server
import os
import signal
import sys
import threading


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def main(kind: str) -> None:
    stop = threading.Event()
    terms = 0

    def on_term(number: int, frame: object) -> None:
        nonlocal terms
        terms += 1
        if kind != "stubborn" or terms > 1:
            print(f"{kind} stopped", flush=True)
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"{kind} runs as {os.getpid()} with {os.environ['REDIS_URL'].partition('@')[2]}", flush=True)
    if kind == "crash":
        raise SystemExit(3)
    if kind == "misconfigured":
        print("cannot start: buy a GPU")
        raise SystemExit(2)
    if kind == "gateway":
        server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Ready)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    stop.wait()


if __name__ == "__main__":
    main(sys.argv[1])
