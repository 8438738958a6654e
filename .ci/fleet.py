#!/usr/bin/env python3
"""Restarts two proxies behind HAProxy one after the other, under load: no request may be lost, no stream cut.

    python .ci/fleet.py [--secs N]      needs haproxy

Prints a line of numbers; exit status 1 where something was lost.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVENTS = 40  # of a stream, EVENT_SECS apart
EVENT_SECS = 0.05

PROXY = """[server]
port = {port}
shutdown_delay_secs = 1.5
[mcp]
port = 0
[logging]
level = "warn"
[routing.default_provider_names]
openai_chat_completions = "p"
[providers.p]
protocol = "openai_chat_completions"
base_url = "http://127.0.0.1:{provider}"
api_key = "k-of-the-fleet"
"""

# As the README shows it; the checks are quick so that a restart is noticed within the delay.
BALANCER = """defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  option redispatch
  retries 3
frontend f
  bind 127.0.0.1:{port}
  default_backend proxies
backend proxies
  balance roundrobin
  option httpchk GET /readyz
  http-check send hdr Host localhost
  default-server check inter 200ms fall 2 rise 1
  server one 127.0.0.1:{one}
  server two 127.0.0.1:{two}
"""


class Provider(BaseHTTPRequestHandler):
    """A provider that answers at once, or streams slowly."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer one Chat request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not body.get("stream"):
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": body["messages"][0]["content"]},
                                            "finish_reason": "stop"}]}).encode()
            self.answer("application/json", f"content-length: {len(data)}", data)
            return
        self.answer("text/event-stream", "transfer-encoding: chunked", b"")
        for i in range(EVENTS):
            self.part(b'data: {"choices":[{"index":0,"delta":{"content":"%d "}}]}\n\n' % i)
            time.sleep(EVENT_SECS)
        self.part(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, kind: str, length: str, data: bytes) -> None:
        """Write a head and what follows at once."""
        self.wfile.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{length}\r\n\r\n".encode() + data)

    def part(self, data: bytes) -> None:
        """Write one chunk."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port}")


class Load:
    """Clients that ask until they are told to stop, and what came of it."""

    def __init__(self, port: int) -> None:
        self.port, self.stop = port, threading.Event()
        self.whole = self.streams = 0
        self.lost: list[str] = []
        self.threads = [threading.Thread(target=self.run, args=(i % 2 == 0,)) for i in range(8)]

    def run(self, stream: bool) -> None:
        """One client: on one connection as long as that is kept."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        n = 0
        while not self.stop.is_set():
            n += 1
            said = f"{threading.get_ident()}-{n}"
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(
                    {"model": "m", "stream": stream, "messages": [{"role": "user", "content": said}]}),
                    {"content-type": "application/json"})
                reply = connection.getresponse()
                text = reply.read().decode()
                good = (text.count('"content":"') == EVENTS and text.endswith("data: [DONE]\n\n") if stream
                        else said in text)
                if reply.status != 200 or not good:
                    self.lost.append(f"{'stream' if stream else 'request'} got {reply.status}: {text[-200:]!r}")
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(f"{'stream' if stream else 'request'}: {error!r}")
                connection.close()
            if stream:
                self.streams += 1
            else:
                self.whole += 1
                time.sleep(0.005)


def main() -> int:
    """Run the fleet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--secs", type=float, default=2.0, help="load before, between and after the restarts")
    secs = parser.parse_args().secs
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if not haproxy:
        raise SystemExit("haproxy is not installed")
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    ports, front = [free_port(), free_port()], free_port()
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)

        def start(index: int) -> subprocess.Popen[bytes]:
            config = home / f"{index}.toml"
            config.write_text(PROXY.format(port=ports[index], provider=provider.server_address[1]), "utf-8")
            process = subprocess.Popen([sys.executable, str(ROOT / "proxai.py"), "--config", str(config)],
                                       stdout=subprocess.DEVNULL, env={**os.environ, "HOME": folder})
            started.append(process)
            wait_for(ports[index])
            return process

        try:
            proxies = [start(0), start(1)]
            (home / "haproxy.cfg").write_text(BALANCER.format(port=front, one=ports[0], two=ports[1]), "utf-8")
            balancer = subprocess.Popen([haproxy, "-db", "-q", "-f", str(home / "haproxy.cfg")])
            started.append(balancer)
            wait_for(front)
            time.sleep(0.5)
            load = Load(front)
            for thread in load.threads:
                thread.start()
            time.sleep(secs)
            for index, process in enumerate(proxies):
                process.send_signal(signal.SIGTERM)
                if process.wait(60) != 0:
                    load.lost.append(f"proxy {index} ended with {process.returncode}")
                proxies[index] = start(index)
                time.sleep(secs)
            load.stop.set()
            for thread in load.threads:
                thread.join(60)
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)
            provider.shutdown()
    print(f"rolling restart: {load.whole} requests, {load.streams} streams, {len(load.lost)} lost")
    for line in load.lost[:10]:
        print("  " + re.sub(r"\s+", " ", line))
    return 1 if load.lost or load.whole < 100 or load.streams < 8 else 0


if __name__ == "__main__":
    sys.exit(main())
