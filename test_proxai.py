"""Tests of proxai.py, in the order of its sections.

    python test_proxai.py [pytest arguments]     makes .venv with pytest in it if there is none

Pure parts are tables of cases. End-to-end tests start the real program and talk to it over a socket,
with a scripted provider on loopback. Timing decides nothing but how long a test waits at most.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import contextlib
import datetime
import dis
import email.utils
import functools
import gzip
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "proxai.py"

if __name__ == "__main__":  # the one command that works with only Python on the machine
    if importlib.util.find_spec("pytest") is None:
        import venv

        python = HERE / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.exists():
            venv.create(HERE / ".venv", with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "pytest"], check=True)
        sys.exit(subprocess.call([str(python), __file__, *sys.argv[1:]]))
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *sys.argv[1:]]))

import pytest

import proxai

SOURCE = PROGRAM.read_text("utf-8")
CHAT, MESSAGES, RESPONSES = proxai.CHAT, proxai.MESSAGES, proxai.RESPONSES
PATIENCE = 10.0  # seconds that a test waits for what must happen


# ============================================================================
#  Helpers
# ============================================================================

def three_ways(make: Callable[[], Any], data: bytes, expected: bytes, tail: bytes = b"") -> None:
    """Feed a decoder whole, byte by byte, and with bytes behind the end: all must give the same."""
    whole = make()
    assert whole.feed(data) == expected
    single = make()
    assert b"".join(single.feed(data[i:i + 1]) for i in range(len(data))) == expected
    assert whole.finished == single.finished
    if tail:
        more = make()
        assert more.feed(data + tail) == expected
        assert more.finished and more.rest == tail


class Received(NamedTuple):
    """A request as the scripted provider got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int  # which connection it came on, from 1

    def header(self, name: str) -> str | None:
        """The value of a header that is there once; None if it is not there."""
        found = [v for n, v in self.headers if n.lower() == name]
        assert len(found) < 2, f"{name} is there {len(found)} times"
        return found[0] if found else None

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Peer:
    """The provider's side of a connection, for a script."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.buffer, self.closed = sock, b"", False

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        self.sock.close()

    def reset(self) -> None:
        """Close the connection with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def gone(self, timeout: float = PATIENCE) -> bool:
        """Whether the proxy closes its side within the time."""
        self.sock.settimeout(timeout)
        try:
            while self.sock.recv(65536):
                pass
            return True
        except TimeoutError:
            return False
        except OSError:
            return True

    def read_request(self, number: int) -> Received | None:
        """The next request, or None when there is no more."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                return None
            self.buffer += data
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines)]
        length = int(next((v for n, v in headers if n.lower() == "content-length"), 0))
        while len(self.buffer) < length:
            data = self.sock.recv(1 << 20)
            if not data:
                return None
            self.buffer += data
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        method, target, _ = first.split(" ")
        return Received(method, target, headers, body, number)


Script = Callable[[Peer, Received], None]


class Upstream:
    """A scripted provider on loopback: what it answers is decided by the model a request asks for.

    `on(model, *scripts)` sets what the first, second, ... request for `model` gets; the last repeats.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.scripts: dict[str, list[Script]] = {}
        self.requests: dict[str, list[Received]] = {}
        self.connections = 0
        self.context = context
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def on(self, model: str, *scripts: Script) -> None:
        """What requests for `model` get."""
        self.scripts[model] = list(scripts)

    def got(self, model: str) -> list[Received]:
        """The requests for `model` so far."""
        return self.requests.get(model, [])

    def accept(self) -> None:
        """Take connections until closed."""
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                self.open.append(sock)
                threading.Thread(target=self.talk, args=(sock, self.connections), daemon=True).start()

    def talk(self, sock: socket.socket, number: int) -> None:
        """Serve one connection."""
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
                self.open.append(sock)
            peer = Peer(sock)
            while not peer.closed and (request := peer.read_request(number)):
                model = json.loads(request.body)["model"]
                before = self.requests.setdefault(model, [])
                before.append(request)
                scripts = self.scripts[model]
                scripts[min(len(before), len(scripts)) - 1](peer, request)
            peer.close()

    def close(self) -> None:
        """Stop."""
        self.listener.close()
        for sock in self.open:
            sock.close()


def answer(status: int, body: bytes, *headers: str, reason: str = "X") -> Script:
    """A script: one whole answer with its length."""
    lines = [f"HTTP/1.1 {status} {reason}", f"content-length: {len(body)}", *headers, "", ""]
    return lambda peer, request: peer.send("\r\n".join(lines).encode() + body)


def answer_json(value: Any, status: int = 200, *headers: str) -> Script:
    """A script: one JSON answer."""
    return answer(status, json.dumps(value).encode(), "content-type: application/json", *headers)


def chunk(data: bytes) -> bytes:
    """`data` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def answer_stream(*frames: bytes, end: bool = True) -> Script:
    """A script: a chunked event stream, each frame a chunk; without `end` it stays open."""
    def script(peer: Peer, request: Received) -> None:
        peer.send(SSE_HEAD)
        for frame in frames:
            peer.send(chunk(frame))
        if end:
            peer.send(b"0\r\n\r\n")
        else:
            peer.gone(30)
    return script


class Reply(NamedTuple):
    """What a client got; `broken` when the answer did not end as HTTP says it must."""

    status: int
    headers: dict[str, str]
    body: bytes
    broken: bool = False

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Running:
    """The real program in a process of its own."""

    def __init__(self, home: Path, *arguments: str, config: str | None = None, env: dict[str, str] | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (home / "config.toml").write_text(config, "utf-8")
            arguments = ("--config", str(home / "config.toml"), "--port", "0", *arguments)
        clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, encoding="utf-8", errors="replace",
            env={**clean, "HOME": str(home), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **(env or {})})
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        found = self.wait_line(r"^  listen: http://\S+:(\d+)$")
        self.port = int(found[1])

    def read(self) -> None:
        """Collect what the program prints."""
        assert self.process.stdout
        for line in self.process.stdout:
            with self.news:
                self.lines.append(line.rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.lines.append("")
            self.news.notify_all()

    def wait_line(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """The first line printed so far, or from now on, in which `pattern` is found."""
        deadline, at = time.monotonic() + timeout, 0
        with self.news:
            while True:
                while at < len(self.lines):
                    if found := re.search(pattern, self.lines[at]):
                        return found
                    at += 1
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self.reader.is_alive()):
                    raise AssertionError(f"no line with {pattern!r} in:\n" + "\n".join(self.lines))
                self.news.wait(min(left, 0.2))

    def events(self, request_id: str) -> list[dict[str, Any]]:
        """The JSON log lines about a request, once its last one is there."""
        self.wait_line(rf'"event":"(end|closed|timeout|stream-error|unfinished-tool|request-failed|hdr-error)".*"request_id":"{request_id}"')
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{") and request_id in line]
        return [f for f in found if f.get("request_id") == request_id]

    def post(self, path: str, body: Any, *headers: str, method: str = "POST", timeout: float = PATIENCE) -> Reply:
        """One request on a connection of its own; `headers` as "name: value"."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(raw)}", *headers]
        if not any(h.lower().startswith("connection:") for h in headers):
            lines.append("connection: close")
        return read_reply(self.talk("\r\n".join([*lines, "", ""]).encode() + raw, timeout), method)

    def talk(self, data: bytes, timeout: float = PATIENCE) -> bytes:
        """Send bytes, and return all that comes until the proxy closes."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return read_all(sock)

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        """A connection to the program."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def stop(self) -> int:
        """End the program as a service manager does; returns its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        if self.process.stdout:
            self.process.stdout.close()
        return status


def read_all(sock: socket.socket) -> bytes:
    """All bytes until the peer closes or resets."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 20):
            parts.append(data)
    return b"".join(parts)


def read_reply(data: bytes, method: str = "POST") -> Reply:
    """The first answer in `data`, read by the standard library's own client."""
    class Source:
        def makefile(self, *_: Any) -> Any:
            import io
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Source(), method=method)  # type: ignore[arg-type]
    response.begin()
    headers = {n.lower(): v for n, v in response.getheaders()}
    try:
        return Reply(response.status, headers, response.read())
    except http.client.IncompleteRead as error:
        return Reply(response.status, headers, error.partial, broken=True)


def config_for(url: str, *more: str, protocol: str = "openai_chat_completions", provider: str = "", server: str = "") -> str:
    """A configuration that sends each protocol to a provider of its own kind at `url`, fully logged."""
    lines = ["[server]", server, "[logging]", 'level = "debug"', 'output_format = "json"', "[routing.default_provider_names]"]
    lines += [f'{name} = "{p.word}_default"' for name, p in proxai.PROTOCOLS.items()]
    for name, p in proxai.PROTOCOLS.items():
        lines += [f"[providers.{p.word}_default]", f'protocol = "{name}"', f'base_url = "{url}"',
                  'api_key = "test-upstream-key"', provider]
    return "\n".join([*lines, *more]) + "\n"


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """A scripted provider that tests share; each uses model names of its own."""
    server = Upstream()
    yield server
    server.close()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts the program with a configuration, or hands out the one that runs with it already."""
    running: dict[Any, Running] = {}

    def start(config: str, *arguments: str, env: dict[str, str] | None = None) -> Running:
        key = (config, arguments, tuple(sorted((env or {}).items())))
        if key not in running or running[key].process.poll() is not None:
            running[key] = Running(tmp_path_factory.mktemp("home"), *arguments, config=config, env=env)
        return running[key]

    yield start
    for program in running.values():
        program.stop()


@pytest.fixture
def program(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program with the plain configuration: each protocol to its own kind, text errors."""
    return programs(config_for(upstream.url))


model_names = itertools.count(1)


@pytest.fixture
def model() -> str:
    """A model name that no other test uses."""
    return f"m{next(model_names)}"


def body_for(protocol: proxai.Protocol, model: str, **more: Any) -> dict[str, Any]:
    """A small valid request."""
    said: Any = "hi" if protocol is RESPONSES else [{"role": "user", "content": "hi"}]
    extra = {"max_tokens": 64} if protocol is MESSAGES else {}
    return {"model": model, protocol.wants: said, **extra, **more}



# ============================================================================
#  1  Names and limits
# ============================================================================

def test_the_path_alone_decides_the_protocol():
    assert {path: protocol.name for path, protocol in proxai.MODEL_PATHS.items()} == {
        "/v1/responses": "openai_responses", "/responses": "openai_responses",
        "/v1/chat/completions": "openai_chat_completions", "/chat/completions": "openai_chat_completions",
        "/v1/messages": "anthropic_messages", "/messages": "anthropic_messages"}


def test_the_two_axes_have_the_names_of_the_contract():
    assert list(proxai.PROTOCOLS) == ["openai_responses", "openai_chat_completions", "anthropic_messages"]
    assert [(p.name, p.word, p.alias, p.path) for p in (RESPONSES, CHAT, MESSAGES)] == [
        ("openai_responses", "responses", "resp", "/v1/responses"),
        ("openai_chat_completions", "chat", "chat", "/v1/chat/completions"),
        ("anthropic_messages", "messages", "ant", "/v1/messages")]
    assert proxai.PHASES == ("inbound_request", "provider_request", "upstream_response", "outbound_response")



# ============================================================================
#  2  JSON
# ============================================================================

@pytest.mark.parametrize("raw", [
    b"", b" ", b"nul", b"NaN", b"[NaN]", b"Infinity", b"-Infinity", b'{"a":-Infinity}', b"{", b'{"a":1,}',
    b"[1,]",
    b"{'a':1}", b'{"a":1} x', b'{"a":1}{"b":2}', b'{a:1}', b"01", b"1.", b".5", b"+1", b"0x10", b"1e", b"- 1",
    b"\xef\xbb\xbf{}", b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"a\nb"', b'"a\x00b"', b'"\\x41"',
    b'"\\u12"',
    b'"\\ud8zz"', b'"open', b"\x0b1", b"\xc2\xa01", b"True", b"// c\n1", "\uff11".encode(),
    "{}".encode("utf-16"),
], ids=repr)
def test_what_is_no_json_is_refused_with_a_reason(raw):
    with pytest.raises(ValueError) as caught:
        proxai.load(raw)
    assert str(caught.value)


@pytest.mark.parametrize("raw, value", [
    (b"\r\n\t 1 \n", 1), (b'"\\u00e9\\n\\/"', "é\n/"), ("\"é😀\"".encode(), "é😀"),
    (b'"\\ud83d\\ude00"', "😀"),
    (b'"\\ud800"', "\ud800"), (b"-0", 0), (b"1E+2", 100.0),
    (b"123456789012345678901234567890", 123456789012345678901234567890),
    (b'{"a":1,"a":2}', {"a": 2}), (b"[]", []), (b"null", None), (b'"\x7f\xc2\x85"', "\x7f\x85"),
], ids=repr)
def test_json_is_read_as_the_standard_says(raw, value):
    assert proxai.load(raw) == value
    assert type(proxai.load(raw)) is type(value)


@pytest.mark.parametrize("raw", [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000])
def test_endless_nesting_is_a_fault_of_the_text(raw):
    with pytest.raises(ValueError):
        proxai.load(raw)


@pytest.mark.parametrize("value, raw", [
    ({"b": 1, "a": [1, 2.5, None, True]}, '{"b":1,"a":[1,2.5,null,true]}'),
    ("é😀\u2028", '"é😀\u2028"'),
    ('"\\\n\x00\x7f', '"\\"\\\\\\n\\u0000\x7f"'),
    ("\ud800", '"\\ud800"'),
    ("é\udfffé😀", '"é\\udfffé😀"'),
    ({"\udead": "\\udead"}, '{"\\udead":"\\\\udead"}'),
    ("\udc00\ud800", '"\\udc00\\ud800"'),
    (12345678901234567890123, "12345678901234567890123"),
    ({}, "{}"),
])
def test_json_is_written_compactly_and_reads_back(value, raw):
    assert proxai.dump(value) == raw.encode("utf-8")
    assert proxai.load(proxai.dump(value)) == value


@pytest.mark.parametrize("raw", [b"[1e999]", b'{"a":-1e400}', b"[1e308,1e309]"])
def test_a_number_beyond_all_floats_does_not_become_something_that_is_no_json(raw):
    try:
        value = proxai.load(raw)
    except ValueError:
        return
    proxai.load(proxai.dump(value))


@pytest.mark.parametrize("raw, expected", [
    ('{"model":"a"}', '{"model":"NEW"}'),
    ('{"model" : "a" }', '{"model" : "NEW" }'),
    (' \r\n{\t"model"\n:\r"a"\t,\n"x":1.0 } \n', ' \r\n{\t"model"\n:\r"NEW"\t,\n"x":1.0 } \n'),
    ('{"x":{"model":"in"},"model":"a","y":[{"model":"in"}]}',
     '{"x":{"model":"in"},"model":"NEW","y":[{"model":"in"}]}'),
    ('{"x":"\\"model\\":\\"a\\"","model":"a"}', '{"x":"\\"model\\":\\"a\\"","model":"NEW"}'),
    ('{"x":"model","model":"model"}', '{"x":"model","model":"NEW"}'),
    ('{"model":"a","MODEL":"b"," model":"c","model ":"d","models":"e"}',
     '{"model":"NEW","MODEL":"b"," model":"c","model ":"d","models":"e"}'),
    ('{"m\\u006fdel":"a"}', '{"m\\u006fdel":"NEW"}'),
    ('{"\\u006D\\u006F\\u0064\\u0065\\u006C":"a"}', '{"\\u006D\\u006F\\u0064\\u0065\\u006C":"NEW"}'),
    ('{"model":"\\u0061\\/\\"}","x":"é\\u00e9\\/😀"}', '{"model":"NEW","x":"é\\u00e9\\/😀"}'),
    ('{"x":1E+2,"y":-0,"z":1.10,"model":"a","n":12345678901234567890}',
     '{"x":1E+2,"y":-0,"z":1.10,"model":"NEW","n":12345678901234567890}'),
    ('{"model":null}', '{"model":"NEW"}'),
    ('{"model":{"model":"a"}}', '{"model":"NEW"}'),
    ('{"model":[1,"}",{"a":[]}] ,"b":{}}', '{"model":"NEW" ,"b":{}}'),
    ('{"model":-1.5e3}', '{"model":"NEW"}'),
    ('{"model":true}', '{"model":"NEW"}'),
    ('{"model":"a","x":1,"model":"b"}', '{"model":"NEW","x":1,"model":"NEW"}'),
    ('{"model":"a","mode\\u006c":"b"}', '{"model":"NEW","mode\\u006c":"NEW"}'),
    ('{"😀":"\\ud83d\\ude00","model":"😀"}', '{"😀":"\\ud83d\\ude00","model":"NEW"}'),
    ('{"x":"\\ud800","model":"a"}', '{"x":"\\ud800","model":"NEW"}'),
    ('{"x":{"model":"in"}}', '{"x":{"model":"in"}}'),
    ('{"":1,"x":[]}', '{"":1,"x":[]}'),
    ("{}", "{}"),
    (" { } ", " { } "),
])
def test_replacing_a_member_changes_no_other_byte(raw, expected):
    assert proxai.replace_member(raw.encode(), "model", "NEW") == expected.encode()


@pytest.mark.parametrize("value, written", [
    ("gpt-5", '"gpt-5"'), ('a"b\\c', '"a\\"b\\\\c"'), ("é😀", '"é😀"'), ("\ud800", '"\\ud800"'),
    ("$1\\1\\g<0>", '"$1\\\\1\\\\g<0>"'),
    ("", '""'), (None, "null"), ({"a": [1]}, '{"a":[1]}'),
])
def test_a_replaced_member_is_written_as_json(value, written):
    raw = b' {"a" : 1,"model":"x" ,"z":[ ]}'
    assert proxai.replace_member(raw, "model", value) == f' {{"a" : 1,"model":{written} ,"z":[ ]}}'.encode()


@pytest.mark.parametrize("text, values", [
    ('{"model":"a"}', ['"a"']), ('{"a":1}', []), ("{}", []), ('{"model" :\n[ 1 ] }', ["[ 1 ]"]),
    ('{"a":{"model":1},"model":2,"\\u006dodel":{"model":3}}', ["2", '{"model":3}']),
])
def test_the_spans_of_a_member_are_those_of_its_values(text, values):
    assert [text[start:end] for start, end in proxai.member_spans(text, "model")] == values


SPELLINGS = ('"model"', '"m\\u006fdel"', '"\\u006D\\u006f\\u0064\\u0065\\u006C"')  # all are the name `model`
OTHER_KEYS = ('"Model"', '"models"', '"input"', '""', '"\\"model\\""', '"é"', '"😀"', '"\\ud800"', '"{"',
              '"m\\\\u006fdel"')
SCALARS = ("0", "-0", "1.50", "1E+2", "12345678901234567890123", "true", "false", "null", '"model"', '"}"',
           '"],\\"model\\":"',
           '"é\\u00e9\\/"', '"😀\\ud83d\\ude00"', '"\\udc00"', '""', "[]", "{}", '"\\\\"')


def random_json(rng: random.Random, depth: int) -> str:
    """A JSON text with blanks in odd places; inside it `model` means nothing."""
    def blank() -> str:
        return "".join(rng.choices(" \t\r\n", k=rng.choice((0, 0, 0, 1, 3))))

    kind = rng.random() if depth else 0
    if kind < 0.5:
        return rng.choice(SCALARS)
    items = [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 0.75:
        return f"[{','.join(blank() + item + blank() for item in items)}{'' if items else blank()}]"
    members = [blank() + rng.choice(SPELLINGS + OTHER_KEYS) + blank() + ":" + blank() + item + blank()
               for item in items]
    return f"{{{','.join(members)}{'' if items else blank()}}}"


def random_object(rng: random.Random) -> list[tuple[str, bool]]:
    """A JSON object in pieces; the marked ones are the values of its members named `model`."""
    pieces = [(rng.choice(("", " ", "\r\n\t")) + "{" + rng.choice(("", " \n")), False)]
    for i in range(rng.randrange(6)):
        named = rng.random() < 0.4
        key = rng.choice(SPELLINGS if named else OTHER_KEYS)
        comma = rng.choice((",", " ,", ",\t ")) if i else ""
        before = comma + key + rng.choice((":", " :", ":  ", "\n:\r"))
        pieces += [(before, False), (random_json(rng, 3), named)]
    return [*pieces, (rng.choice(("}", " }", "\n} \r\n")), False)]


def test_in_random_objects_a_member_is_found_and_replaced_and_nothing_else():
    rng = random.Random(20)
    repeated = 0
    for _ in range(1500):
        pieces = random_object(rng)
        raw = "".join(text for text, _ in pieces).encode()
        values = [text for text, named in pieces if named]
        whole = json.loads(raw)
        assert ("model" in whole) == bool(values)
        assert [raw.decode()[a:b] for a, b in proxai.member_spans(raw.decode(), "model")] == values
        new = rng.choice(("n", "é\"", "\ud800", "😀", "a\\u006d"))
        spliced = "".join(proxai.dump(new).decode() if named else text for text, named in pieces).encode()
        assert proxai.replace_member(raw, "model", new) == spliced
        if values:
            assert json.loads(spliced) == {**whole, "model": new}
        repeated += len(values) > 1
    assert repeated > 100



# ============================================================================
#  3  Errors
# ============================================================================

ABSENT = proxai.ABSENT
STYLES = ("text", "json", "native")


@pytest.mark.parametrize("body, message, code, param", [
    ('{"error":{"message":"m","code":"c","param":"p"}}', "m", "c", "p"),
    ('{"type":"error","error":{"type":"overloaded_error","message":"m"}}', "m", None, ABSENT),
    ('{"error":"m"}', "m", None, ABSENT),
    ('{"message":"m"}', "m", None, ABSENT),
    ('{"detail":"m"}', "m", None, ABSENT),
    ('{"detail":[{"msg":"a"},{"message":"b"}]}', "a; b", None, ABSENT),
    ('{"error":{"message":"m","code":429,"param":null}}', "m", None, None),
    # order of the places: error.message, error, detail, message
    ('{"message":"4","detail":"3","error":"2"}', "2", None, ABSENT),
    ('{"message":"4","detail":"3"}', "3", None, ABSENT),
    ('{"message":"4","detail":"3","error":{"message":"1"}}', "1", None, ABSENT),
    # code and param beside the error, and inside it first
    ('{"error":"m","code":"c","param":"p"}', "m", "c", "p"),
    ('{"message":"m","code":"c","param":["x",1]}', "m", "c", ["x", 1]),
    ('{"error":{"message":"m","code":"in"},"code":"out"}', "m", "in", ABSENT),
    ('{"error":{"message":"m","code":429},"code":"out"}', "m", None, ABSENT),
    ('{"error":{"message":"m","code":null},"code":"out"}', "m", None, ABSENT),
    ('{"error":{"message":"m"},"code":"out","param":0}', "m", "out", 0),
    ('{"error":{"message":"m","param":null},"param":"out"}', "m", None, None),
    ('{"error":{"message":"m","param":{"a":[false]}}}', "m", None, {"a": [False]}),
    # a list of details: the string msg of each item, else its string message; what has neither is left out
    ('{"detail":[{"msg":"a","message":"b"}]}', "a", None, ABSENT),
    ('{"detail":[{"msg":null,"message":"b"}]}', "b", None, ABSENT),
    ('{"detail":[{"msg":7,"message":"b"},{"loc":[]},"x",{"msg":"c"}]}', "b; c", None, ABSENT),
    ('{"message":"4","detail":[{"msg":"a"}]}', "a", None, ABSENT),
    ('{"error":{"message":5},"detail":[{"msg":"a"}]}', "a", None, ABSENT),
    ('{"error":{"message":""}}', "", None, ABSENT),
    (' \r\n\t{"error":{"message":" m "}}\n ', " m ", None, ABSENT),
    ('{"error":{"message":"caf\\u00e9 \\ud83d\\ude00"}}', "café 😀", None, ABSENT),
])
def test_the_message_of_a_provider_error_is_found_by_the_contracts_order(body, message, code, param):
    error = proxai.upstream_error(418, body.encode())
    assert (error.type, error.status, error.message, error.code) == ("upstream_error", 418, message, code)
    assert error.param is ABSENT if param is ABSENT else error.param == param
    expected = {"message": message, "type": "upstream_error", "code": code, "param": param, "status": 418}
    drop = [*(["code"] if code is None else []), *(["param"] if param is ABSENT else [])]
    assert list(error.payload().items()) == [(k, v) for k, v in expected.items() if k not in drop]


@pytest.mark.parametrize("body, kind", [
    ('{"error":{"type":"x"},"message":"m"}', "unknown_shape"),
    ('{"error":null,"message":"m"}', "unknown_shape"),
    ('{"error":{"message":null},"detail":"m"}', "unknown_shape"),
    ('{"error":["m"],"message":"m"}', "unknown_shape"),
    ('{"detail":[]}', "unknown_shape"),
    ('{"detail":["x"]}', "unknown_shape"),
    ('{"detail":[{"loc":1}],"message":"m"}', "unknown_shape"),
    ('{"message":{"text":"m"}}', "unknown_shape"),
    ('{"Error":"m"}', "unknown_shape"),
    ('"text"', "unknown_shape"),
    ("[]", "unknown_shape"),
    ("{}", "unknown_shape"),
    ("null", "unknown_shape"),
    ("17", "unknown_shape"),
    ("oops", "non_json"),
    ("<html><body>502 Bad Gateway</body></html>", "non_json"),
    ('{"error":{"message":"m"}', "non_json"),
    ('{"error":"m"} trailing', "non_json"),
    ("{'error':'m'}", "non_json"),
    ("NaN", "non_json"),
    ('{"error":{"message":"m","param":NaN}}', "non_json"),
    ('{"error":{"message":"m","param":-Infinity}}', "non_json"),
])
def test_a_provider_error_without_a_message_is_told_with_its_text(body, kind):
    error = proxai.upstream_error(503, f"\n {body} \n".encode())
    assert (error.type, error.status) == (f"upstream_error_body_{kind}", 503)
    assert body in error.message and error.message != body
    assert (error.code, error.param) == (None, ABSENT)


@pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t \n", "\u2003\u00a0".encode()])
def test_a_blank_provider_error_is_called_empty(body):
    error = proxai.upstream_error(500, body)
    assert (error.type, error.status) == ("upstream_error_body_empty", 500)
    assert "empty" in error.message


def test_bytes_that_are_no_utf8_are_replaced_in_a_provider_error():
    plain = proxai.upstream_error(500, b"caf\xe9 \xff\xfe")
    assert plain.type == "upstream_error_body_non_json" and "caf\ufffd \ufffd\ufffd" in plain.message
    assert proxai.upstream_error(500, b'{"error":"caf\xe9"}').message == "caf\ufffd"


def test_a_long_provider_text_is_cut_but_a_message_never_is():
    text = proxai.upstream_error(500, b"x" * 100_000).message
    assert "x" * 2048 in text and len(text) < 5000
    shape = proxai.upstream_error(500, b'{"a":"%b"}' % (b"x" * 100_000)).message
    assert "x" * 2048 in shape and len(shape) < 5000
    assert proxai.upstream_error(500, b'{"error":"%b"}' % (b"x" * 100_000)).message == "x" * 100_000


@pytest.mark.parametrize("raw", [
    b'{"error":{"message":"\\ud800","param":"\\udfff","code":"\\udc00"}}',
    b'{"error":{"message":"m","param":1e999}}',
    b'{"error":{"message":"m","param":[{"\\ud800":-1e400}]}}',
    b'{"error":{"message":"a\\u0000\\r\\n\\nb\\u2028","param":"\\u0085"}}',
    b'\xff\x00<\x1b[31m>',
])
@pytest.mark.parametrize("style", STYLES)
def test_what_clients_get_is_well_formed_whatever_a_provider_says(style, raw):
    error = proxai.upstream_error(500, raw)
    content_type, body = proxai.render_error(error, style, CHAT)
    body.decode("utf-8")
    if content_type == b"application/json":
        assert proxai.load(body)["error"]["status"] == 500
    for protocol in (RESPONSES, CHAT, MESSAGES):
        event = proxai.render_error_event(error, style, protocol)
        *head, data, last, end = event.decode("utf-8").split("\n")
        assert "\r" not in event.decode("utf-8") and (last, end) == ("", "")
        assert head == ([] if (style, protocol) == ("native", CHAT) else ["event: error"])
        assert "error" in proxai.load(data.removeprefix("data: ").encode()) or protocol is RESPONSES


@pytest.mark.parametrize("style", STYLES)
def test_a_provider_error_is_told_however_deep_it_is_nested(style):
    limit = sys.getrecursionlimit()
    for depth in [5, *range(limit - 120, limit + 60), 100_000]:
        nest = b"[" * depth + b"]" * depth
        error = proxai.upstream_error(500, b'{"error":{"message":"m","param":%b}}' % nest)
        assert proxai.render_error(error, style, CHAT)[1]
        assert proxai.render_error_event(error, style, MESSAGES).endswith(b"}\n\n")


@pytest.mark.parametrize("status, body, retry", [
    (402, b"", False),
    (402, b'{"error":{"message":"m"}}', False),
    (402, b"<html>", False),
    (429, b'{"error":{"message":"m","code":"insufficient_quota"}}', False),
    (429, b'{"message":"m","code":"insufficient_quota"}', False),
    (403, b'{"error":{"message":"m","code":"insufficient_quota"}}', False),
    (429, b'{"error":{"message":"m","code":"rate_limit_exceeded"}}', True),
    (429, b'{"error":{"message":"m"}}', True),
    (429, b"", True),
    (500, b'{"error":{"message":"m"}}', True),
    (529, b'{"type":"error","error":{"type":"overloaded_error","message":"m"}}', True),
])
def test_only_a_quota_that_is_used_up_makes_a_retry_pointless(status, body, retry):
    assert proxai.upstream_error(status, body).retry is retry


@pytest.mark.parametrize("error, status, kind, retry", [
    (proxai.RequestError("m"), 400, "invalid_request_error", True),
    (proxai.RequestError("m", status=413), 413, "invalid_request_error", True),
    (proxai.ProxyError("m"), 500, "internal_error", True),
    (proxai.SetupError("m"), 500, "internal_error", False),
    (proxai.UpstreamError("m"), 502, "upstream_request_error", True),
    (proxai.UpstreamError("m", type=proxai.UPSTREAM_BODY_READ), 502, "upstream_response_body_read_error",
     True),
    (proxai.UpstreamError("m", type=proxai.STREAM_TRANSLATION), 502, "stream_translation_error", True),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None)
def test_each_class_of_error_has_its_status_and_type(error, status, kind, retry):
    assert error.payload() == {"message": "m", "type": kind, "status": status}
    assert error.retry is retry


def test_a_remedy_ends_the_message():
    assert proxai.RequestError("what happened", fix="what to do").message.endswith("what to do")
    assert str(proxai.RequestError("what happened", fix="what to do")).startswith("what happened")


PLAIN = proxai.RequestError("no \"é\"\n", status=422)
FULL = proxai.UpstreamError("m", status=429, type=proxai.UPSTREAM, code="c", param=None)


@pytest.mark.parametrize("style, error, protocol, content_type, body", [
    ("text", PLAIN, CHAT, b"text/plain; charset=utf-8", 'no "é"\n'),
    ("text", PLAIN, None, b"text/plain; charset=utf-8", 'no "é"\n'),
    ("text", FULL, MESSAGES, b"text/plain; charset=utf-8", "m"),
    ("json", PLAIN, CHAT, b"application/json",
     '{"error":{"message":"no \\"é\\"\\n","type":"invalid_request_error","status":422}}'),
    ("json", PLAIN, None, b"application/json",
     '{"error":{"message":"no \\"é\\"\\n","type":"invalid_request_error","status":422}}'),
    ("json", FULL, MESSAGES, b"application/json",
     '{"error":{"message":"m","type":"upstream_error","code":"c","param":null,"status":429}}'),
    ("native", FULL, MESSAGES, b"application/json",
     '{"type":"error","error":{"type":"rate_limit_error","message":"m"}}'),
])
def test_an_error_body_in_each_format(style, error, protocol, content_type, body):
    assert proxai.render_error(error, style, protocol) == (content_type, body.encode())


@pytest.mark.parametrize("status, kind", [
    (400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error"),
    (403, "permission_error"),
    (404, "not_found_error"), (405, "invalid_request_error"), (408, "timeout_error"),
    (413, "request_too_large"), (415, "invalid_request_error"), (422, "invalid_request_error"),
    (429, "rate_limit_error"), (500, "api_error"),
    (502, "api_error"), (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"),
])
def test_a_native_error_for_a_messages_client_has_the_vendors_type(status, kind):
    error = proxai.UpstreamError("m", status=status, code="c", param="p")
    assert proxai.native_error(error, MESSAGES) == {"type": "error", "error": {"type": kind, "message": "m"}}


def test_an_exhausted_quota_is_a_billing_error_for_a_messages_client_and_keeps_its_status():
    error = proxai.upstream_error(429, b'{"error":{"message":"m","code":"insufficient_quota"}}')
    assert error.status == 429
    assert proxai.native_error(error, MESSAGES)["error"]["type"] == "billing_error"


@pytest.mark.parametrize("protocol", [CHAT, RESPONSES], ids=lambda p: p.word)
@pytest.mark.parametrize("status, kind, code", [
    (400, "invalid_request_error", None), (401, "authentication_error", "invalid_api_key"),
    (402, "insufficient_quota", "insufficient_quota"), (403, "permission_error", None),
    (404, "invalid_request_error", None), (409, "invalid_request_error", None),
    (413, "invalid_request_error", "request_too_large"), (429, "rate_limit_error", "rate_limit_exceeded"),
    (500, "server_error", None), (502, "server_error", None), (504, "server_error", "timeout"),
])
def test_a_native_error_for_an_openai_client_has_the_vendors_type_and_code(protocol, status, kind, code):
    error = proxai.UpstreamError("m", status=status)
    assert proxai.native_error(error, protocol) == {
        "error": {"message": "m", "type": kind, "param": None, "code": code, "status": status}}


@pytest.mark.parametrize("status", [503, 529])
@pytest.mark.parametrize("protocol, code", [(CHAT, "overloaded"), (RESPONSES, "server_is_overloaded")],
                         ids=["chat", "responses"])
def test_an_overloaded_provider_has_the_code_that_clients_of_the_protocol_know(protocol, code, status):
    error = proxai.UpstreamError("m", status=status)
    assert proxai.native_error(error, protocol)["error"] == {
        "message": "m", "type": "overloaded_error", "param": None, "code": code, "status": status}


@pytest.mark.parametrize("protocol", [CHAT, RESPONSES], ids=lambda p: p.word)
def test_a_missing_model_has_its_own_code_for_an_openai_client(protocol):
    error = proxai.UpstreamError("The model `m` does not exist", status=404)
    assert proxai.native_error(error, protocol)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("protocol", [CHAT, RESPONSES], ids=lambda p: p.word)
def test_what_the_provider_said_beats_the_table(protocol):
    raw = b'{"error":{"message":"m","code":"insufficient_quota","param":"model"}}'
    told = proxai.native_error(proxai.upstream_error(429, raw), protocol)["error"]
    assert (told["code"], told["param"], told["status"]) == ("insufficient_quota", "model", 429)


GENERIC = ('{"type":"error","error":{"message":"m\\n","type":"upstream_error","code":"c","param":null,'
           '"status":429}}')


@pytest.mark.parametrize("style, protocol, event", [
    ("text", CHAT, f"event: error\ndata: {GENERIC}\n\n"),
    ("text", MESSAGES, f"event: error\ndata: {GENERIC}\n\n"),
    ("json", CHAT, f"event: error\ndata: {GENERIC}\n\n"),
    ("json", MESSAGES, f"event: error\ndata: {GENERIC}\n\n"),
    ("native", CHAT, 'data: {"error":{"message":"m\\n","type":"rate_limit_error","param":null,"code":"c",'
                     '"status":429}}\n\n'),
    ("native", MESSAGES, 'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error",'
                         '"message":"m\\n"}}\n\n'),
])
def test_an_error_event_in_each_format(style, protocol, event):
    error = proxai.UpstreamError("m\n", status=429, type=proxai.UPSTREAM, code="c", param=None)
    assert proxai.render_error_event(error, style, protocol).decode() == event


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sequence", [None, 0, 7])
def test_a_stalled_responses_stream_ends_with_the_top_level_event_of_its_protocol(style, sequence):
    event = proxai.render_error_event(proxai.UpstreamError("stalled"), style, RESPONSES, sequence).decode()
    name, data, *rest = event.split("\n")
    assert (name, rest) == ("event: error", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error", "sequence_number": sequence, "code": None, "message": "stalled", "param": None}


# -- errors as clients get them ----------------------------------------------

def faulty_config(url: str, style: str) -> str:
    """A configuration with the faults that only a request brings to light."""
    routes = [("guarded", "chat_default", 'request_protocol = "openai_chat_completions"'),
              ("unfilled", "template", ""), ("unreachable", "refusing", ""), ("crossed", "chat_default", "")]
    more = [f'[[routing.routes]]\nname = "{name}"\nmodel_pattern = "{name}"\nprovider = "{provider}"\n{guard}'
            for name, provider, guard in routes]
    more += ['[providers.template]\nprotocol = "anthropic_messages"\nbase_url = "https://h.example"\n'
             'api_key = "replace-me"',
             '[providers.refusing]\nprotocol = "anthropic_messages"\nbase_url = "http://127.0.0.1:1"\n'
             'api_key = "k-1"\nproxy_url = "direct"',
             f'[error_responses]\nformat = "{style}"']
    return config_for(url, *more).replace('openai_responses = "responses_default"\n', "")


class Told(NamedTuple):
    """What a request is answered: its status, its types in the json and the native format, what it names."""

    status: int
    type: str
    native: str
    retry: bool
    names: tuple[str, ...]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path, model_name, told", [
    ("/v1/messages", "guarded", Told(500, "internal_error", "api_error", False, (
        "`guarded`", "openai_chat_completions", "anthropic_messages"))),
    ("/v1/messages", "unfilled", Told(500, "internal_error", "api_error", False,
                                      ("providers.template.api_key",))),
    ("/v1/messages", "crossed", Told(500, "internal_error", "api_error", False, (
        "anthropic_messages -> openai_chat_completions",))),
    ("/v1/responses", "unrouted", Told(500, "internal_error", "server_error", False, (
        "routing.default_provider_names.openai_responses",))),
    ("/v1/messages", "unreachable", Told(502, "upstream_request_error", "api_error", True,
                                         ("upstream request failed",))),
    ("/messages", "  ", Told(400, "invalid_request_error", "invalid_request_error", True, ("model",))),
    ("/nowhere", "any", Told(404, "invalid_request_error", "invalid_request_error", True, ())),
], ids=["guard", "template", "pair", "default", "refused", "request", "path"])
def test_our_own_errors_reach_the_client_in_the_configured_format(programs, upstream, style, path, model_name,
                                                                  told):
    program = programs(faulty_config(upstream.url, style))
    protocol = proxai.MODEL_PATHS.get(path)
    reply = program.post(path, body_for(protocol or CHAT, model_name))
    assert reply.status == told.status
    assert reply.headers.get("x-should-retry") == (None if told.retry else "false")
    if style == "text":
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        message = reply.body.decode()
        assert message and not message.startswith("{")
    else:
        assert reply.headers["content-type"] == "application/json"
        error = reply.json["error"]
        message = error["message"]
        assert error["type"] == (told.native if style == "native" and protocol else told.type)
        assert ("status" in error) is not (style == "native" and protocol is MESSAGES)
        assert error.get("status", told.status) == told.status
    for name in told.names:
        assert name in message


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("status, body, kind, retry", [
    (429, b'{"error":{"message":"slow down","code":"rate_limit_exceeded"}}', "upstream_error", True),
    (429, b'{"error":{"message":"slow down","code":"insufficient_quota"}}', "upstream_error", False),
    (402, b"slow down", "upstream_error_body_non_json", False),
    (503, b'{"text":"slow down"}', "upstream_error_body_unknown_shape", True),
], ids=["busy", "quota", "billing", "shape"])
def test_a_provider_error_keeps_its_status_and_its_diagnostic_headers_in_each_format(
        programs, upstream, model, style, status, body, kind, retry):
    upstream.on(model, answer(status, body, "retry-after: 7", "x-request-id: r1",
                              "x-ratelimit-remaining-requests: 0",
                              "set-cookie: secret=1", "x-internal: 1"))
    reply = programs(faulty_config(upstream.url, style)).post("/v1/chat/completions", body_for(CHAT, model))
    assert reply.status == status
    assert (reply.headers["retry-after"], reply.headers["x-request-id"]) == ("7", "r1")
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert "set-cookie" not in reply.headers and "x-internal" not in reply.headers
    assert reply.headers.get("x-should-retry") == (None if retry else "false")
    if style == "text":
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert reply.body == b"slow down" if kind == "upstream_error" else b"slow down" in reply.body
    else:
        assert reply.headers["content-type"] == "application/json"
        assert "slow down" in reply.json["error"]["message"]
        if style == "json":
            assert (reply.json["error"]["type"], reply.json["error"]["status"]) == (kind, status)



# ============================================================================
#  4  Routing
# ============================================================================

DEFAULTS = {p.name: f"{p.word}_default" for p in (RESPONSES, CHAT, MESSAGES)}


def routes(*fields: dict[str, Any]) -> list[proxai.Route]:
    """Compiled routes; each sends to the provider `to` unless it says otherwise."""
    return proxai.compile_routes(proxai.RouteConfig(**{"provider": "to", **f}) for f in fields)


def route_model(kind: str, pattern: str, model: str, upstream_model: str | None = None) -> str | None:
    """The model that a single route sends; None when the request goes to the default provider."""
    one = routes({"match_kind": kind, "model_pattern": pattern, "upstream_model": upstream_model})
    decision = proxai.choose(one, DEFAULTS, CHAT.name, model)
    return decision.model if decision.provider == "to" else None


@pytest.mark.parametrize("kind, pattern, model, matches", [
    # exact: the whole name, without ASCII case, nothing special
    ("exact", "gpt-5", "gpt-5", True),
    ("exact", "gpt-5", "GPT-5", True),
    ("exact", "GPT-5", "gpt-5", True),
    ("exact", "gpt-5", "gpt-5-mini", False),
    ("exact", "gpt-5", "my-gpt-5", False),
    ("exact", "gpt-5", "openai/gpt-5", False),
    ("exact", "gpt-5", "gpt-5\n", False),
    ("exact", "gpt-5", "x\ngpt-5", False),
    ("exact", "gpt.5", "gpt-5", False),
    ("exact", "gpt-*", "gpt-*", True),
    ("exact", "gpt-*", "gpt-5", False),
    ("exact", "a?[b]{c,d}\\e", "A?[B]{C,D}\\E", True),
    ("exact", "^a|b$", "a", False),
    ("exact", "^a|b$", "^A|b$", True),
    ("exact", "k", "\u212a", False),
    ("exact", "s", "\u017f", False),
    ("exact", "é", "É", False),
    # glob: the whole name, without case
    ("glob", "gpt-*", "GPT-5.5", True),
    ("glob", "gpt-*", "gpt-", True),
    ("glob", "gpt-*", "my-gpt-5", False),
    ("glob", "gpt-*", "gpt", False),
    ("glob", "*mini", "gpt-5-mini", True),
    ("glob", "*mini", "gpt-5-mini-2", False),
    ("glob", "*", "any/thing at\nall", True),
    ("glob", "a*c", "a/b/c", True),
    ("glob", "a*c", "A\nC", True),
    ("glob", "a?c", "a/c", True),
    ("glob", "a?c", "ac", False),
    ("glob", "a?c", "abbc", False),
    ("glob", "a?c", "a😀c", True),
    ("glob", "gpt", "gpt-5", False),
    ("glob", "gpt-5.?", "gpt-5x1", False),
    ("glob", "a**b", "a/x/b", True),
    ("glob", "a**b", "ab", True),
    ("glob", "**/b", "a/a/b", True),
    ("glob", "a***b", "axb", True),
    ("glob", "gpt-[45]", "gpt-4", True),
    ("glob", "gpt-[45]", "gpt-6", False),
    ("glob", "gpt-[45]", "gpt-45", False),
    ("glob", "gpt-[3-5]", "gpt-4", True),
    ("glob", "[a-c]x", "Bx", True),
    ("glob", "gpt-[!45]", "gpt-6", True),
    ("glob", "gpt-[!45]", "gpt-4", False),
    ("glob", "gpt-[!45]", "gpt-", False),
    ("glob", "[!a-c]", "B", False),
    ("glob", "[!a]", "/", True),
    ("glob", "[a!]", "!", True),
    ("glob", "[*?]", "*", True),
    ("glob", "[*?]", "a", False),
    ("glob", "[{,}]", ",", True),
    ("glob", "[\\d]", "5", False),
    ("glob", "[\\d]", "\\", True),
    ("glob", "[.]", "a", False),
    ("glob", "[&&a]", "&", True),
    ("glob", "{gpt,o}-*", "o-1", True),
    ("glob", "{gpt,o}-*", "gpt-1", True),
    ("glob", "{gpt,o}-*", "g-1", False),
    ("glob", "{gpt,o}-*", "xgpt-1", False),
    ("glob", "gpt-{4,5}", "gpt-5", True),
    ("glob", "gpt-{4,5}", "gpt-45", False),
    ("glob", "gpt-{4,5}", "gpt-{4,5}", False),
    ("glob", "{a*,?b}c", "axxc", True),
    ("glob", "{a*,?b}c", "zbc", True),
    ("glob", "{a*,?b}c", "zzbc", False),
    ("glob", "{a,b}", "a", True),
    ("glob", "{a,b}", "ax", False),
    ("glob", "{a,b}", "xb", False),
    ("glob", "x{,-mini}", "x", True),
    ("glob", "x{,-mini}", "x-mini", True),
    ("glob", "{a.c,[xy]}", "abc", False),
    ("glob", "{a.c,[xy]}", "Y", True),
    ("glob", "a,b*", "a,bc", True),
    ("glob", "gpt\\*", "gpt\\5", True),
    ("glob", "gpt\\*", "gpt*", False),
    ("glob", "a\\?", "a\\x", True),
    ("glob", "a\\?", "a?", False),
    ("glob", "\\[a]", "\\a", True),
    ("glob", "\\[a]", "[a]", False),
    ("glob", "(a|b)+^$*", "(a|b)+^$x", True),
    ("glob", "(a|b)+^$*", "ax", False),
    # regex: found anywhere, without case
    ("regex", "gpt", "my-GPT-5", True),
    ("regex", "^gpt", "my-gpt-5", False),
    ("regex", "gpt$", "gpt-5", False),
    ("regex", "^gpt-5$", "GPT-5", True),
    ("regex", "^gpt-5$", "gpt-5\n", False),
    ("regex", "[$]5$", "a$5", True),
    ("regex", "\\$5", "a$5x", True),
    ("regex", "a|b", "xbx", True),
    ("regex", "É", "é", True),
    ("regex", "^\\w+$", "modèle", True),
    ("regex", "^o\\d", "o4-mini", True),
    ("regex", "x{2}", "axxb", True),
    ("regex", "(?<n>gpt)-(?<m>.)", "gpt-5", True),
    ("regex", "(?P<n>gpt)-5", "gpt-5", True),
    ("regex", "a\\(?<b>", "a<b>", True),
    ("regex", "a\\(?<b>", "a(<b>", True),
    ("regex", "a\\(?<b>", "ab", False),
    ("regex", "[(?<b>]+x", "?<x", True),
    ("regex", "[](?<]x", "]x", True),
    ("regex", "\\\\(?<n>x)", "\\x", True),
])
def test_a_pattern_of_each_kind_matches(kind, pattern, model, matches):
    assert (route_model(kind, pattern, model) is not None) is matches


@pytest.mark.parametrize("pattern, kind", [
    ("gpt-5.5", "exact"), ("{a,b}", "exact"), ("a.b", "exact"), ("a/b:c@d", "exact"), ("a^b", "exact"),
    ("a$b", "exact"),
    ("a]b", "exact"), ("a)b", "exact"), ("a!b", "exact"),
    ("gpt-*", "glob"), ("gpt-?", "glob"), ("^gpt-.*$", "glob"), ("(?<x>a)", "glob"), ("a|b*", "glob"),
    ("\\d*", "glob"),
    ("^gpt", "regex"), ("gpt$", "regex"), ("^", "regex"), ("$", "regex"), ("^gpt-(.+)$", "regex"),
    ("(a)", "regex"),
    ("[ab]", "regex"), ("a|b", "regex"), ("a+", "regex"), ("gpt-\\d", "regex"),
])
def test_auto_looks_at_the_pattern(pattern, kind):
    assert proxai.pattern_kind("auto", pattern) == kind
    for fixed in ("exact", "glob", "regex"):
        assert proxai.pattern_kind(fixed, pattern) == fixed


@pytest.mark.parametrize("kind, pattern, template, model, sent", [
    # exact and glob: the name as it stands
    ("exact", "fast", "gpt-5.5", "FAST", "gpt-5.5"),
    ("exact", "fast", "$1 ${name} $$ \\1", "fast", "$1 ${name} $$ \\1"),
    ("glob", "gpt-*", "$1$0", "gpt-5", "$1$0"),
    ("auto", "gpt-*", "mapped", "GPT-5.5", "mapped"),
    ("glob", "*", None, "Any-Model", "Any-Model"),
    # regex: the span that matched, once
    ("auto", "^gpt-(.+)$", "openai/$1", "gpt-5.5", "openai/5.5"),
    ("auto", "^gpt-(.+)$", None, "gpt-5.5", "gpt-5.5"),
    ("regex", "gpt-(\\d)", "o$1", "x-gpt-5-mini", "x-o5-mini"),
    ("regex", "a", "b", "banana", "bbnana"),
    ("regex", "a+", "", "baana", "bna"),
    ("regex", "^", "openai/", "gpt-5", "openai/gpt-5"),
    ("regex", "$", "-latest", "gpt-5", "gpt-5-latest"),
    ("regex", "^.*$", "fixed", "gpt-5", "fixed"),
    ("regex", "(GPT)", "$1", "gPt-5", "gPt-5"),
    # templates
    ("regex", "(?<major>\\d)\\.(?<minor>\\d)", "$major-${minor}", "v5.4", "v5-4"),
    ("regex", "(?P<n>\\d)", "<$n>", "a1", "a<1>"),
    ("regex", "^(.)(.)$", "$2$1", "ab", "ba"),
    ("regex", "^(.)(.)$", "${2}a${1}", "ab", "baa"),
    ("regex", "^(.)$", "$1a", "x", ""),
    ("regex", "^(.)$", "${1}a", "x", "xa"),
    ("regex", "^(.)$", "$1-a", "x", "x-a"),
    ("regex", "^(.)$", "$1.$1_", "x", "x."),
    ("regex", "^(.)$", "$1é", "x", "xé"),
    ("regex", "^(.)$", "$0$0", "x", "xx"),
    ("regex", "^(.)$", "$2|$nobody|${nobody}|$99999999999999999999", "x", "|||"),
    ("regex", "^a(b)?$", "[$1]", "a", "[]"),
    ("regex", "^(.)$", "$$1 $$$1 $$$$", "x", "$1 $x $$"),
    ("regex", "^(.)$", "$ $- a$", "x", "$ $- a$"),
    ("regex", "^(.)$", "\\1\\g<1>\\n", "x", "\\1\\g<1>\\n"),
    ("regex", "^(.)$", "$1", "$", "$"),
    ("regex", "^(.+)$", "<$1>", "$1", "<$1>"),
    ("regex", "^(?<n1>.)$", "$n1 ${n1}x $n1x", "a", "a ax "),
])
def test_the_model_that_is_sent(kind, pattern, template, model, sent):
    assert route_model(kind, pattern, model, template) == sent


def test_globs_of_stars_and_question_marks_mean_what_shells_mean():
    import fnmatch

    rng = random.Random(4)
    for _ in range(3000):
        pattern = "".join(rng.choices("ab.*?", k=rng.randrange(1, 8)))
        name = "".join(rng.choices("ab.", k=rng.randrange(1, 8)))
        found = route_model("glob", pattern, name) is not None
        assert found is fnmatch.fnmatchcase(name, pattern), (pattern, name)


def test_a_glob_with_several_stars_decides_about_any_name():
    code = ("import proxai; p = proxai.compile_pattern('glob', '*-*-*-*-*-*-*-mini');"
            "print(*(bool(p.search('-' * (proxai.MODEL_CHARS - 5) + end)) for end in ('-mini', '-maxi')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.stdout.split() == ["True", "False"], done.stderr


GUARDED = {"name": "only-chat", "model_pattern": "m*", "request_protocol": CHAT.name, "provider": "guarded"}
OPEN = {"name": "open", "model_pattern": "m*", "provider": "open"}


@pytest.mark.parametrize("table, protocol, model, expected", [
    ([], CHAT, "m1", ("chat_default", "m1", None)),
    ([], MESSAGES, "m1", ("messages_default", "m1", None)),
    ([], RESPONSES, "m1", ("responses_default", "m1", None)),
    ([GUARDED], CHAT, "m1", ("guarded", "m1", "only-chat")),
    ([GUARDED], MESSAGES, "x", ("messages_default", "x", None)),
    ([OPEN], MESSAGES, "M1", ("open", "M1", "open")),
    ([GUARDED, OPEN], CHAT, "m1", ("guarded", "m1", "only-chat")),
    ([OPEN, GUARDED], CHAT, "m1", ("open", "m1", "open")),
    ([GUARDED, OPEN], MESSAGES, "m1", ("open", "m1", "open")),
    ([GUARDED, {"model_pattern": "m1", "provider": "unnamed"}], MESSAGES, "m1", ("unnamed", "m1", None)),
    ([{"model_pattern": "a", "upstream_model": "m1"}, OPEN], CHAT, "a", ("to", "m1", None)),
    ([{"model_pattern": "m1", "upstream_model": "x"}, OPEN], CHAT, "m2", ("open", "m2", "open")),
])
def test_the_first_route_that_fits_wins_else_the_default(table, protocol, model, expected):
    assert tuple(proxai.choose(routes(*table), DEFAULTS, protocol.name, model)) == expected


def test_a_request_that_only_a_guard_keeps_from_its_route_is_an_error_that_names_the_first_such_route():
    second = {**GUARDED, "name": "only-responses", "request_protocol": RESPONSES.name}
    with pytest.raises(proxai.SetupError) as caught:
        proxai.choose(routes(GUARDED, second), DEFAULTS, MESSAGES.name, "m-one")
    error = caught.value
    assert (error.status, error.type, error.retry) == (500, "internal_error", False)
    for part in ("`only-chat`", "m-one", "openai_chat_completions", "anthropic_messages", "request_protocol",
                 "remove", "change"):
        assert part in error.message
    assert "only-responses" not in error.message


def test_a_guard_mismatch_beats_the_default_provider_and_needs_no_route_name():
    with pytest.raises(proxai.SetupError) as caught:
        proxai.choose(routes({**GUARDED, "name": None}), DEFAULTS, MESSAGES.name, "m-one")
    assert "m-one" in caught.value.message and "`" not in caught.value.message


@pytest.mark.parametrize("defaults", [{}, {RESPONSES.name: ""}, {CHAT.name: "x"}])
def test_a_default_that_is_needed_and_missing_is_an_error_that_names_its_key(defaults):
    with pytest.raises(proxai.SetupError) as caught:
        proxai.choose(routes(GUARDED), defaults, RESPONSES.name, "other")
    error = caught.value
    assert (error.status, error.type, error.retry) == (500, "internal_error", False)
    assert "routing.default_provider_names.openai_responses" in error.message



# ============================================================================
#  5  Configuration
# ============================================================================

MINIMAL = '[providers.p]\nprotocol = "openai_responses"\nbase_url = "https://h.example/v1"\napi_key = "k-1"\n'


def load_text(text: str, *specs: str, **environ: str) -> proxai.Config:
    """The configuration in `text`, with `--route-override` specs."""
    return proxai.load_config(text, "here.toml", environ=environ,
                              overrides=lambda tables: [proxai.route_override(s, tables) for s in specs])


def faults_of(text: str, *specs: str, **environ: str) -> list[str]:
    """The faults of a configuration, each without the source it names."""
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(text, *specs, **environ)
    assert all(fault.startswith("here.toml: ") for fault in caught.value.faults)
    return [fault.removeprefix("here.toml: ") for fault in caught.value.faults]


def paths_of(text: str, **environ: str) -> list[str]:
    """The keys that the faults of a configuration are about."""
    return sorted(fault.split(": ")[0] for fault in faults_of(text, **environ))


def with_provider(*lines: str) -> str:
    """The minimal configuration with lines more in its provider, or other ones for its keys."""
    names = {line.split(" =")[0] for line in lines}
    kept = [line for line in MINIMAL.splitlines() if line.split(" =")[0] not in names]
    return "\n".join([*kept, *lines]) + "\n"


FULL_SAMPLE = """
[server]
host = "127.0.0.2"
port = 1
api_keys = ["client-1", " client-2 "]
allow_unauthenticated = true
allowed_hosts = ["box.lan"]
cors_allow_origins = ["https://App.example:8443", "null"]
max_request_body_bytes = 1
max_concurrent_requests = 2
max_request_line_bytes = 4000
max_head_bytes = 5000
max_headers = 60
max_sse_event_bytes = 7000
head_timeout_secs = 1.5
body_timeout_secs = 2
keepalive_timeout_secs = 3
write_timeout_secs = 4
shutdown_grace_secs = 5
first_event_hold_secs = 6
sse_keepalive_secs = 7
[mcp]
host = "::1"
port = 65535
[routing.default_provider_names]
openai_responses = "One"
openai_chat_completions = " two "
anthropic_messages = "two"
[[routing.routes]]
name = " r1 "
request_protocol = "anthropic_messages"
match_kind = "regex"
model_pattern = '^a(?<n>\\d+)$'
provider = "ONE"
upstream_model = "b-$n"
[[routing.routes]]
model_pattern = "c-*"
provider = "two"
[providers.one]
protocol = "openai_responses"
base_url = "https://h.example/v1?x=1#y"
api_key = " k-1 "
connect_timeout_secs = 0.25
read_idle_timeout_secs = 8
proxy_url = "http://proxy.example:3128"
[providers.TWO]
protocol = "anthropic_messages"
base_url = "http://127.0.0.1:9/"
api_key_env = "KEY_2"
compatibility = "strict"
[tool_calls]
timeout_secs = 9
[translation]
extended_pairs = true
[error_responses]
format = "json"
[logging]
level = "trace"
output_format = "json"
use_color = false
[logging.duration_thresholds]
warn_ms = 0
error_ms = 1
[capture]
inbound_request_enabled = true
provider_request_enabled = true
upstream_response_enabled = true
outbound_response_enabled = true
"""


def setting_at(config: proxai.Config, path: str) -> Any:
    """The value of a setting by its path, such as routing.routes.0.name."""
    found: Any = config
    for key in path.split("."):
        if isinstance(found, dict):
            found = found[key]
        else:
            found = found[int(key)] if key.isdigit() else getattr(found, key)
    return found


FULL_PROFILE = {
    "vision": False, "max_tokens_cap": 1, "default_max_tokens": 2, "web_search": "native", "cache": "on",
    "vendor_fields": True, "max_tokens_field": "max_completion_tokens", "reasoning_control": "effort-lowhigh",
    "reasoning_replay": "reasoning_details", "reasoning_required": "calls", "late_system": "keep",
    "tool_images": "inline", "files": "native", "json_schema": "object", "stream_usage": False, "top_k": False,
    "call_ids": "9", "parallel_tool_calls": False, "strict_tools": True, "lenient_done": False,
    "tool_arguments": "buffer", "think_tags": "off", "deferred_tools": "all", "custom_tools": True,
    "allowed_tools": True, "model_class": "K3", "lenient_thinking": True, "native_system": True,
    "thinking_binding": True, "reasoning": True, "efforts": ("low", "max"), "encrypted_reasoning": False,
    "reasoning_summary": False, "sampling": True, "max_output_tokens": False, "output_lists": True, "phase": True, "count_native": True,
}
FULL_VALUES = {
    "server.host": "127.0.0.2", "server.port": 1, "server.api_keys": ("client-1", "client-2"),
    "server.allow_unauthenticated": True, "server.allowed_hosts": ("box.lan",),
    "server.cors_allow_origins": ("https://app.example:8443", "null"),
    "server.max_request_body_bytes": 1, "server.max_concurrent_requests": 2,
    "server.max_request_line_bytes": 4000, "server.max_head_bytes": 5000, "server.max_headers": 60,
    "server.max_sse_event_bytes": 7000,
    "server.head_timeout_secs": 1.5, "server.body_timeout_secs": 2, "server.keepalive_timeout_secs": 3,
    "server.write_timeout_secs": 4, "server.shutdown_grace_secs": 5, "server.first_event_hold_secs": 6,
    "server.sse_keepalive_secs": 7, "mcp.host": "::1", "mcp.port": 65535,
    "routing.default_provider_names.openai_responses": "one",
    "routing.default_provider_names.openai_chat_completions": "two",
    "routing.default_provider_names.anthropic_messages": "two",
    "routing.routes.0.name": "r1", "routing.routes.0.request_protocol": "anthropic_messages",
    "routing.routes.0.match_kind": "regex", "routing.routes.0.model_pattern": "^a(?<n>\\d+)$",
    "routing.routes.0.provider": "one", "routing.routes.0.upstream_model": "b-$n",
    "routing.routes.1.name": None, "routing.routes.1.request_protocol": None,
    "routing.routes.1.match_kind": "auto", "routing.routes.1.model_pattern": "c-*",
    "routing.routes.1.provider": "two", "routing.routes.1.upstream_model": None,
    "providers.one.protocol": "openai_responses", "providers.one.base_url": "https://h.example/v1/",
    "providers.one.api_key": "k-1", "providers.one.connect_timeout_secs": 0.25,
    "providers.one.read_idle_timeout_secs": 8, "providers.one.proxy_url": "http://proxy.example:3128",
    "providers.two.protocol": "anthropic_messages", "providers.two.base_url": "http://127.0.0.1:9/",
    "providers.two.api_key": "k-2", "providers.two.api_key_env": "KEY_2",
    "providers.two.compatibility": "strict",
    **{f"providers.one.profile.{key}": value for key, value in FULL_PROFILE.items()},
    "providers.two.profile.vision": None,
    "tool_calls.timeout_secs": 9, "translation.extended_pairs": True, "error_responses.format": "json",
    "logging.level": "trace", "logging.output_format": "json", "logging.use_color": False,
    "logging.duration_thresholds.warn_ms": 0, "logging.duration_thresholds.error_ms": 1,
    **{f"capture.{phase}_enabled": True for phase in proxai.PHASES},
}


def test_a_full_file_gives_every_setting_its_checked_value():
    profile = "\n".join(f"{key} = {json.dumps(value)}" for key, value in FULL_PROFILE.items())
    config = load_text(f"{FULL_SAMPLE}[providers.one.profile]\n{profile}\n", KEY_2=" k-2\n")
    assert {path: setting_at(config, path) for path in FULL_VALUES} == FULL_VALUES
    assert list(config.providers) == ["one", "two"] and len(config.routing.routes) == 2
    tested = {path.rpartition(".")[2] for path in FULL_VALUES} | {"api_key_file", "ca_file"}
    assert tested == {key.rpartition(".")[2] for key, *_ in proxai.settings_rows()}


SPECIFIED = {
    "server.host": "127.0.0.1", "server.port": 18080, "server.max_request_body_bytes": 52428800,
    "server.max_concurrent_requests": 64, "server.max_sse_event_bytes": 16 * 1024 * 1024,
    "server.shutdown_grace_secs": 30, "server.first_event_hold_secs": 10, "server.sse_keepalive_secs": 15,
    "server.api_keys": (), "server.allow_unauthenticated": False, "server.allowed_hosts": (),
    "server.cors_allow_origins": (),
    "mcp.host": "127.0.0.1", "mcp.port": 18081,
    "routing.default_provider_names.openai_responses": "",
    "routing.default_provider_names.openai_chat_completions": "",
    "routing.default_provider_names.anthropic_messages": "",
    "routing.routes.0.name": None, "routing.routes.0.request_protocol": None,
    "routing.routes.0.match_kind": "auto",
    "routing.routes.0.upstream_model": None,
    "providers.p.compatibility": "anthropic_compatible", "providers.p.read_idle_timeout_secs": 120,
    "tool_calls.timeout_secs": 120, "translation.extended_pairs": False, "error_responses.format": "text",
    "logging.level": "info", "logging.output_format": "human", "logging.use_color": True,
    "logging.duration_thresholds.warn_ms": 5000, "logging.duration_thresholds.error_ms": 15000,
    "capture.inbound_request_enabled": False, "capture.provider_request_enabled": False,
    "capture.upstream_response_enabled": False, "capture.outbound_response_enabled": False,
}


@pytest.mark.parametrize("path, value", SPECIFIED.items())
def test_a_setting_that_is_not_given_has_the_default_of_the_specification(path, value):
    config = load_text(MINIMAL + '[[routing.routes]]\nmodel_pattern = "m"\nprovider = "p"\n')
    found = setting_at(config, path)
    assert found == value and type(found) in (type(value), float)


def test_without_routes_there_are_none():
    assert load_text(MINIMAL).routing.routes == ()


@pytest.mark.parametrize("text, path, near", [
    ("[servr]", "servr", "server"),
    ("[Server]", "Server", "server"),
    ("prot = 1", "prot", ""),
    ("[server]\nprot = 1", "server.prot", "port"),
    ("[server]\nPort = 1", "server.Port", "port"),
    ("[server]\nread_idle_timeout_secs = 1", "server.read_idle_timeout_secs", ""),
    ("[providers.p.headers]", "providers.p.headers", ""),
    ("[providers.p2]\napi_kee = 1", "providers.p2.api_kee", "api_key"),
    ("[[routing.routes]]\nmodle_pattern = 1", "routing.routes[0].modle_pattern", "model_pattern"),
    ("[[routing.route]]", "routing.route", "routes"),
    ("[routing.default_provider_names]\nopenai_response = 1",
     "routing.default_provider_names.openai_response",
     "openai_responses"),
    ("[logging]\ncolor = true", "logging.color", "use_color"),
    ("[logging.duration_thresholds]\nwarn_mss = 1", "logging.duration_thresholds.warn_mss", "warn_ms"),
    ("[error_responses]\nformt = 1", "error_responses.formt", "format"),
    ("[capture]\ninbound_request = true", "capture.inbound_request", "inbound_request_enabled"),
    ("[tool_calls]\ntimeout = 1", "tool_calls.timeout", "timeout_secs"),
    ("[mcp]\nzzz = 1", "mcp.zzz", ""),
])
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(text, path, near):
    found = [f for f in faults_of(f"{text}\n{MINIMAL}") if f.startswith(f"{path}: ")]
    assert len(found) == 1 and "unknown" in found[0]
    assert near in found[0]
    if path == "mcp.zzz":
        assert "host" in found[0] and "port" in found[0]


@pytest.mark.parametrize("lines, path", [
    ('[server]\nport = "18080"', "server.port"),
    ("[server]\nport = 1.0", "server.port"),
    ("[server]\nport = true", "server.port"),
    ("[server]\nport = -1", "server.port"),
    ("[server]\nport = 65536", "server.port"),
    ("[server.port]", "server.port"),
    ("[server]\nport = 2020-01-01", "server.port"),
    ("[server]\nport = nan", "server.port"),
    ('[server]\nhost = "localhost"', "server.host"),
    ('[server]\nhost = "127.0.0.256"', "server.host"),
    ('[server]\nhost = ""', "server.host"),
    ("[server]\nhost = 127", "server.host"),
    ('[server]\nallow_unauthenticated = "yes"', "server.allow_unauthenticated"),
    ("[server]\nallow_unauthenticated = 1", "server.allow_unauthenticated"),
    ('[server]\napi_keys = "k"', "server.api_keys"),
    ('[server]\napi_keys = ["k", ""]', "server.api_keys"),
    ('[server]\napi_keys = ["a b"]', "server.api_keys"),
    ("[server]\napi_keys = [1]", "server.api_keys"),
    ('[server]\napi_keys = ["replace-me"]', "server.api_keys"),
    ('[server]\nallowed_hosts = [""]', "server.allowed_hosts"),
    ('[server]\ncors_allow_origins = ["app.example"]', "server.cors_allow_origins"),
    ('[server]\ncors_allow_origins = ["https://app.example/"]', "server.cors_allow_origins"),
    ('[server]\ncors_allow_origins = ["https://["]', "server.cors_allow_origins"),
    ('[mcp]\nhost = "localhost"', "mcp.host"),
    ('[mcp]\nhost = "0.0.0.0"', "mcp.host"),
    ('[mcp]\nhost = "192.168.1.2"', "mcp.host"),
    ('[mcp]\nhost = "::"', "mcp.host"),
    ("[mcp]\nport = 65536", "mcp.port"),
    ('[logging]\nlevel = "INFO"', "logging.level"),
    ('[logging]\nlevel = "verbose"', "logging.level"),
    ('[logging]\noutput_format = "JSON"', "logging.output_format"),
    ('[logging]\nuse_color = "true"', "logging.use_color"),
    ("[logging.duration_thresholds]\nwarn_ms = -1", "logging.duration_thresholds.warn_ms"),
    ("[logging]\nduration_thresholds = 1", "logging.duration_thresholds"),
    ('[error_responses]\nformat = "Native"', "error_responses.format"),
    ('[error_responses]\nformat = ""', "error_responses.format"),
    ("[capture]\ninbound_request_enabled = 1", "capture.inbound_request_enabled"),
    ("[translation]\nextended_pairs = 1", "translation.extended_pairs"),
    ('[routing.default_provider_names]\nopenai_responses = "Missing"',
     "routing.default_provider_names.openai_responses"),
    ("[routing.default_provider_names]\nopenai_responses = 1",
     "routing.default_provider_names.openai_responses"),
    ("[routing]\nroutes = {}", "routing.routes"),
    ("[routing]\nroutes = [1]", "routing.routes[0]"),
    ("[[server]]", "server"),
])
def test_a_value_that_cannot_be_is_refused_with_its_path(lines, path):
    assert path in paths_of(f"{lines}\n{MINIMAL}")


@pytest.mark.parametrize("line, path", [
    ('protocol = "OpenAI_Responses"', "providers.p.protocol"),
    ('protocol = "openai"', "providers.p.protocol"),
    ('compatibility = "Strict"', "providers.p.compatibility"),
    ('api_key = ""', "providers.p.api_key"),
    ('api_key = "  "', "providers.p.api_key"),
    ("api_key = 5", "providers.p.api_key"),
    ('api_key = "a b"', "providers.p.api_key"),
    ('api_key = "a\\nb"', "providers.p.api_key"),
    ('api_key = "clé"', "providers.p.api_key"),
    ('proxy_url = "proxy.example:3128"', "providers.p.proxy_url"),
    ('proxy_url = "socks5://proxy.example:1080"', "providers.p.proxy_url"),
    ('proxy_url = "http://proxy.example/path"', "providers.p.proxy_url"),
    ('proxy_url = "http://proxy.example:99999"', "providers.p.proxy_url"),
    ('proxy_url = "http://proxy.example:port"', "providers.p.proxy_url"),
    ('proxy_url = "http://[::1"', "providers.p.proxy_url"),
    ('proxy_url = ""', "providers.p.proxy_url"),
    ('ca_file = "no/such/file.pem"', "providers.p.ca_file"),
    ('ca_file = ""', "providers.p.ca_file"),
])
def test_a_setting_of_a_provider_that_cannot_be_is_refused_once(line, path):
    assert paths_of(with_provider(line)) == [path]


@pytest.mark.parametrize("missing", ["protocol", "base_url", "api_key"])
def test_a_provider_without_what_it_needs_is_refused(missing):
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(missing)]
    assert paths_of("\n".join(kept)) == [f"providers.p.{missing}"]


@pytest.mark.parametrize("text, path", [("", "providers"), ("[providers]", "providers"),
                                        ("[server]\nport = 1", "providers")])
def test_at_least_one_provider_is_needed(text, path):
    assert paths_of(text) == [path]


LIMITS = ["providers.p.connect_timeout_secs", "providers.p.read_idle_timeout_secs",
          "providers.p.profile.max_tokens_cap",
          "server.max_request_body_bytes",
          "server.max_concurrent_requests", "server.max_request_line_bytes", "server.max_head_bytes",
          "server.max_headers",
          "server.max_sse_event_bytes", "server.head_timeout_secs", "server.body_timeout_secs",
          "server.keepalive_timeout_secs", "server.write_timeout_secs", "server.shutdown_grace_secs",
          "server.first_event_hold_secs", "server.sse_keepalive_secs", "tool_calls.timeout_secs"]


@pytest.mark.parametrize("path", LIMITS)
def test_a_timeout_or_limit_that_is_not_positive_is_refused(path):
    table, _, key = path.rpartition(".")
    values = ["0", "-1", "true", '"1"', "[1]"]
    values += ["0.0", "-0.0", "-0.5", "nan", "inf", "-inf"] if key.endswith("_secs") else ["1.5", "nan"]
    for value in values:
        line = f"{key} = {value}"
        text = with_provider(line) if table == "providers.p" else f"[{table}]\n{line}\n{MINIMAL}"
        assert paths_of(text) == [path], value


def test_no_timeout_or_limit_is_missing_from_the_test_above():
    keys = {key.replace("<name>", "p"): wants for key, _, wants, _ in proxai.settings_rows()}
    assert sorted(k for k, wants in keys.items() if k.endswith("_secs") or (
        ".max_" in k and "number" in wants)) == sorted(LIMITS)


def test_times_may_be_fractions_and_the_smallest_limits_work():
    limits = "max_request_body_bytes = 1\nmax_concurrent_requests = 1\nhead_timeout_secs = 0.001\n"
    text = f"[server]\n{limits}{MINIMAL}"
    assert load_text(text).server.head_timeout_secs == 0.001


MANY_FAULTS = """
top = 1
[server]
port = 70000
hots = "x"
max_concurrent_requests = 0
[mcp]
host = "10.0.0.1"
[routing.default_provider_names]
anthropic_messages = "nobody"
[[routing.routes]]
name = "same"
model_pattern = "("
match_kind = "regex"
provider = "p"
[[routing.routes]]
name = " same "
model_pattern = "m"
provider = "Nowhere"
[[routing.routes]]
match_kind = "Glob"
[providers.p]
protocol = "soap"
base_url = "h.example"
api_key = " "
read_idle_timeout_secs = 0
[tool_calls]
timeout_secs = -1
[logging]
level = "loud"
[logging.duration_thresholds]
warn = 1
"""


def test_all_faults_are_told_at_once_each_with_its_full_path():
    assert paths_of(MANY_FAULTS) == sorted([
        "top", "server.port", "server.hots", "server.max_concurrent_requests", "mcp.host",
        "routing.default_provider_names.anthropic_messages", "routing.routes[0].model_pattern",
        "routing.routes[1].name",
        "routing.routes[1].provider", "routing.routes[2].match_kind", "routing.routes[2].model_pattern",
        "routing.routes[2].provider", "providers.p.protocol", "providers.p.base_url", "providers.p.api_key",
        "providers.p.read_idle_timeout_secs", "tool_calls.timeout_secs", "logging.level",
        "logging.duration_thresholds.warn"])


def test_faults_name_what_is_wrong_and_how_to_recover():
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(MANY_FAULTS)
    text = str(caught.value)
    assert "config.example.toml" in text and "regenerate defaults" in text
    by_path = {fault.split(": ")[1]: fault for fault in caught.value.faults}
    assert "`same`" in by_path["routing.routes[1].name"]
    assert "nowhere" in by_path["routing.routes[1].provider"]
    assert "invalid route" in by_path["routing.routes[0].model_pattern"]
    assert "nobody" in by_path["routing.default_provider_names.anthropic_messages"]
    assert "non-empty" in by_path["providers.p.api_key"]
    assert "10.0.0.1" in by_path["mcp.host"]
    assert "70000" in by_path["server.port"]


@pytest.mark.parametrize("text", ["[server", "port = ", 'a = "open', "a = 1\na = 2", "[a]\n[a]", "\x00",
                                  "a = sk-1", "a = " + "[" * 5000, "a = " + "1" * 5000],
                         ids=lambda text: repr(text[:20]))
def test_what_is_no_toml_is_refused_with_the_source_and_the_hint(text):
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(text)
    assert str(caught.value).startswith("here.toml: ")
    assert "config.example.toml" in str(caught.value) and "regenerate defaults" in str(caught.value)


@pytest.mark.parametrize("kind, pattern", [
    ("regex", "("), ("regex", "[a"), ("regex", "*a"), ("regex", "(?<n>a)(?<n>b)"), ("regex", "a{2,1}"),
    ("auto", "(a"),
    ("auto", "a\\"), ("glob", "gpt-["), ("glob", "gpt-[!"), ("glob", "{a,b"), ("glob", "[z-a]"),
    ("auto", "*[a"),
    ("regex", "a{4294967296}"), ("regex", "(" * 5000 + ")" * 5000),
], ids=lambda value: value[:20])
def test_a_pattern_that_does_not_work_is_refused_and_shown(kind, pattern):
    route = f"match_kind = '{kind}'\nmodel_pattern = '{pattern}'\nprovider = 'p'\n"
    (fault,) = faults_of(f"{MINIMAL}[[routing.routes]]\n{route}")
    assert fault.startswith("routing.routes[0].model_pattern: ") and pattern in fault


@pytest.mark.parametrize("given, kept", [
    ("https://h.example", "https://h.example/"), ("https://h.example/v1", "https://h.example/v1/"),
    ("https://h.example/v1/", "https://h.example/v1/"), (" http://h:8080/a/b ", "http://h:8080/a/b/"),
    ("http://127.0.0.1:1", "http://127.0.0.1:1/"), ("http://[::1]:8080/v1", "http://[::1]:8080/v1/"),
    ("https://h.example/v1?key=1#frag", "https://h.example/v1/"),
    ("https://h.example?x", "https://h.example/"),
    ("HTTPS://h.example/V1", "https://h.example/V1/"),
    ("https://h.example/a%20b", "https://h.example/a%20b/"),
])
def test_a_base_url_loses_its_query_and_ends_in_a_slash(given, kept):
    assert load_text(with_provider(f'base_url = "{given}"')).providers["p"].base_url == kept


@pytest.mark.parametrize("given", [
    "", " ", "h.example", "localhost:8080", "/v1", "//h.example/v1", "ftp://h.example", "file:///etc",
    "https://", "https:///v1",
    "http://:80", "http://h:0", "http://h:99999", "http://h:x", "http://[::1", "http://h exa", "http://h/a b",
    "http://h/\\ta",
    "http://h/\\na", "https://h.example/é", "https://u@h.example",
])
def test_what_is_no_base_url_is_refused(given):
    assert paths_of(with_provider(f'base_url = "{given}"')) == ["providers.p.base_url"]


def keyed(tmp_path: Path, content: bytes) -> str:
    """A provider whose key is in a file with `content`."""
    (tmp_path / "key").write_bytes(content)
    return MINIMAL.replace('api_key = "k-1"', f"api_key_file = '{tmp_path / 'key'}'")


def test_a_key_comes_from_the_file_the_environment_or_the_text(tmp_path):
    by_env = MINIMAL.replace("api_key =", "api_key_env =").replace("k-1", "MY_KEY")
    assert load_text(MINIMAL, MY_KEY="other").providers["p"].api_key == "k-1"
    assert load_text(by_env, MY_KEY=" k-2 ").providers["p"].api_key == "k-2"
    assert load_text(keyed(tmp_path, b"\tk-3\r\n")).providers["p"].api_key == "k-3"


def test_a_key_file_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "key").write_text("k-4\n")
    text = MINIMAL.replace('api_key = "k-1"', 'api_key_file = "~/key"')
    assert load_text(text).providers["p"].api_key == "k-4"


@pytest.mark.parametrize("lines, environ, path", [
    (['api_key_env = "MY_KEY"'], {}, "providers.p.api_key_env"),
    (['api_key_env = "MY_KEY"'], {"MY_KEY": ""}, "providers.p.api_key_env"),
    (['api_key_env = "MY_KEY"'], {"MY_KEY": " \n"}, "providers.p.api_key_env"),
    (['api_key_env = "MY_KEY"'], {"MY_KEY": "a\nb"}, "providers.p.api_key_env"),
    (['api_key_env = ""'], {"": "k"}, "providers.p.api_key_env"),
    (['api_key_file = "no/such/file"'], {}, "providers.p.api_key_file"),
    (['api_key_file = "."'], {}, "providers.p.api_key_file"),
    (['api_key = "k"', 'api_key_env = "MY_KEY"'], {"MY_KEY": "k"}, "providers.p.api_key"),
    (['api_key = "k"', 'api_key_file = "f"'], {}, "providers.p.api_key"),
    (['api_key_env = "MY_KEY"', 'api_key_file = "f"'], {"MY_KEY": "k"}, "providers.p.api_key"),
    ([], {}, "providers.p.api_key"),
])
def test_a_key_that_cannot_be_had_or_is_there_twice_is_refused(lines, environ, path):
    text = MINIMAL.replace('api_key = "k-1"\n', "") + "\n".join(lines)
    assert paths_of(text, **environ) == [path]


def test_a_byte_order_mark_in_front_of_a_key_or_a_configuration_does_no_harm(tmp_path):
    text = keyed(tmp_path, b"\xef\xbb\xbfk-1")
    assert proxai.load_config(text, "f", environ={}).providers["p"].api_key == "k-1"
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert proxai.read_file(tmp_path / "c.toml") == MINIMAL


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", b"k-1\nk-2\n", b"\xff\xfe", "clé".encode()])
def test_a_key_file_without_one_plain_key_is_refused(tmp_path, content):
    assert paths_of(keyed(tmp_path, content)) == ["providers.p.api_key_file"]


@pytest.mark.parametrize("key", [
    "replace-me", "REPLACE_ME", "your-api-key", "your_api_key-1", "YOUR_KEY", "<your key here>", "<key>",
    "changeme",
    "sk-...", "sk-xxxxxxxx",
])
def test_the_keys_of_templates_are_known(key):
    assert proxai.TEMPLATE_KEY.search(key)


@pytest.mark.parametrize("key", [
    "test-upstream-key", "sk-proj-4f9Kd0QmZr7xXyT1", "sk-ant-api03-Zx81-abc_DEF-000AA", "demo", "k", "ollama",
    "EMPTY", "gsk_1a2b3c",
])
def test_real_keys_are_not_taken_for_a_templates(key):
    assert not proxai.TEMPLATE_KEY.search(key)


@pytest.mark.parametrize("label, default, provider", [
    ("openai", "OpenAI", " OPENAI "), ("OpenAI", "openai", "openai"), ('" OpenAI "', " oPENai", "Openai"),
])
def test_names_of_providers_are_compared_without_case_and_blanks(label, default, provider):
    text = MINIMAL.replace("providers.p", f"providers.{label}")
    text += f'[routing.default_provider_names]\nopenai_responses = "{default}"\n'
    text += f'[[routing.routes]]\nmodel_pattern = "m"\nprovider = "{provider}"\n'
    config = load_text(text)
    assert list(config.providers) == ["openai"]
    assert (config.routing.default_provider_names.openai_responses,
            config.routing.routes[0].provider) == ("openai", "openai")


@pytest.mark.parametrize("label", ['""', '" "', "P", '" p"'])
def test_a_name_of_a_provider_that_is_blank_or_there_twice_is_refused(label):
    (fault,) = faults_of(MINIMAL + MINIMAL.replace("providers.p", f"providers.{label}"))
    assert fault.startswith("providers.")


def test_a_fault_of_a_provider_is_told_once_however_its_name_is_spelled():
    (fault,) = faults_of(MINIMAL.replace("providers.p", "providers.OpenAI").replace("k-1", " "))
    assert fault.lower().startswith("providers.openai.api_key: ")


def test_a_default_may_be_absent_or_blank():
    text = MINIMAL + '[routing.default_provider_names]\nanthropic_messages = " "\n'
    names = load_text(text).routing.default_provider_names
    assert (names.openai_responses, names.anthropic_messages) == ("", "")


@pytest.mark.parametrize("host, more, allowed", [
    ("127.0.0.1", "", True), ("127.1.2.3", "", True), ("::1", "", True),
    ("0.0.0.0", "", False), ("::", "", False), ("192.168.1.5", "", False), ("fe80::1", "", False),
    ("0.0.0.0", 'api_keys = ["client-1"]', True), ("0.0.0.0", "api_keys = []", False),
    ("0.0.0.0", "allow_unauthenticated = true", True), ("0.0.0.0", "allow_unauthenticated = false", False),
])
def test_a_host_that_others_can_reach_needs_keys_or_a_plain_word(host, more, allowed):
    text = f'[server]\nhost = "{host}"\n{more}\n{MINIMAL}'
    if allowed:
        assert load_text(text).server.host == host
    else:
        (fault,) = faults_of(text)
        assert fault.startswith("server.host: ") and "api_keys" in fault and "allow_unauthenticated" in fault


@pytest.mark.parametrize("host, loopback", [
    ("127.0.0.1", True), ("127.255.0.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("LOCALHOST", True),
    ("localhost.", True), ("a.localhost", True), ("example.com", False), ("192.168.0.1", False),
    ("0.0.0.0", False),
    ("::", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
    ("notlocalhost", False), ("", False),
    ("128.0.0.1", False), ("2130706433", False),
])
def test_what_is_a_loopback_host(host, loopback):
    assert proxai.is_loopback(host) is loopback


# -- secrets -----------------------------------------------------------------

HIDDEN = "s3cr3t-VALUE-9"


@pytest.mark.parametrize("text", [
    with_provider(f'api_key = "{HIDDEN} x"'),
    with_provider(f'api_key = ["{HIDDEN}"]'),
    with_provider(f'api_key = {{ value = "{HIDDEN}" }}'),
    with_provider(f'api_kee = "{HIDDEN}"'),
    with_provider(f'api_key = "{HIDDEN}"', 'api_key_env = "MY_KEY"'),
    with_provider(f'api_key = "{HIDDEN}"', 'base_url = ""'),
    with_provider(f'base_url = "https://user:{HIDDEN}@h.example/v1"'),
    with_provider(f'base_url = "ftp://h.example/v1?key={HIDDEN}"'),
    with_provider(f'base_url = "https://user:{HIDDEN}/x@h.example/v1"'),
    with_provider(f'base_url = "https://user:{HIDDEN}@h.example:odd/v1"'),
    with_provider(f'base_url = "https://user@h.example:{HIDDEN}/v1"'),
    with_provider(f'base_url = "https://user:{HIDDEN}@[::1/v1"'),
    with_provider(f'proxy_url = "http://user:{HIDDEN}/x@proxy.example:3128"'),
    with_provider(f'proxy_url = "socks5://user:{HIDDEN}@proxy.example:1080"'),
    with_provider(f'proxy_url = "http://user:{HIDDEN}@proxy.example:3128/path"'),
    with_provider(f'proxy_url = ["http://user:{HIDDEN}@proxy.example:3128"]'),
    MINIMAL.replace("api_key =", "api_key_env =").replace("k-1", "MY_KEY"),
    f'[server]\napi_keys = ["{HIDDEN} x"]\n{MINIMAL}',
    f'[server]\napi_keys = "{HIDDEN}"\n{MINIMAL}',
    f'[server]\napi_keys = [["{HIDDEN}"]]\n{MINIMAL}',
    f'[server]\napi_keys = ["<your-key-{HIDDEN}>"]\n{MINIMAL}',
    f'[server]\napi_key = "{HIDDEN}"\n{MINIMAL}',
    f'[providers]\np = "{HIDDEN}"',
    f'providers = "{HIDDEN}"',
    f"[providers.p]\napi_key = {HIDDEN}",
    f'[providers.p]\napi_key = "{HIDDEN}',
    f'{MINIMAL}api_key = "{HIDDEN}"',
])
def test_a_fault_never_shows_a_secret(text):
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(text, MY_KEY=f"{HIDDEN} x")
    assert HIDDEN not in str(caught.value) and HIDDEN not in repr(caught.value)


def test_a_fault_in_a_key_file_does_not_show_its_text(tmp_path):
    assert not any(HIDDEN in fault for fault in faults_of(keyed(tmp_path, HIDDEN.encode() + b"\nmore")))


def test_the_representation_of_a_configuration_shows_no_secret(tmp_path):
    (tmp_path / "key").write_text(HIDDEN + "3")
    second = MINIMAL.replace("providers.p", "providers.q")
    second = second.replace("api_key =", "api_key_env =").replace("k-1", "MY_KEY")
    third = keyed(tmp_path, f"{HIDDEN}3".encode()).replace("providers.p", "providers.r")
    config = load_text(f'[server]\napi_keys = ["{HIDDEN}0"]\n{MINIMAL.replace("k-1", HIDDEN + "1")}'
                       f'proxy_url = "http://user:{HIDDEN}4@proxy.example:3128"\n{second}{third}',
                       MY_KEY=HIDDEN + "2")
    assert [p.api_key for p in config.providers.values()] == [f"{HIDDEN}{i}" for i in (1, 2, 3)]
    for value in (config, config.server, *config.providers.values()):
        assert HIDDEN not in repr(value) and HIDDEN not in str(value)


# -- overrides ---------------------------------------------------------------

ROUTED = MINIMAL + MINIMAL.replace("providers.p", "providers.q") + """
[[routing.routes]]
model_pattern = "zero"
provider = "p"
[[routing.routes]]
name = "first"
request_protocol = "openai_responses"
match_kind = "exact"
model_pattern = "a"
provider = "p"
upstream_model = "b"
"""


def overridden(*specs: str) -> tuple[Any, ...]:
    """The fields of the route `first` under overrides."""
    route = load_text(ROUTED, *specs).routing.routes[1]
    return (route.request_protocol, route.match_kind, route.model_pattern, route.provider,
            route.upstream_model)


@pytest.mark.parametrize("specs, fields", [
    ((), ("openai_responses", "exact", "a", "p", "b")),
    (("first.request_protocol=anthropic_messages", "first.match_kind=glob", "first.model_pattern=x-*",
      "first.provider=q", "first.upstream_model=y"), ("anthropic_messages", "glob", "x-*", "q", "y")),
    (("first.request_protocol=Anthropic_MESSAGES", "first.match_kind=REGEX"),
     ("anthropic_messages", "regex", "a", "p", "b")),
    (("first.request_protocol=", "first.upstream_model="), (None, "exact", "a", "p", None)),
    (("first.request_protocol= ", "first.upstream_model=\t"), (None, "exact", "a", "p", None)),
    ((" first . model_pattern = x ",), ("openai_responses", "exact", "x", "p", "b")),
    (("first.model_pattern=a=b=c",), ("openai_responses", "exact", "a=b=c", "p", "b")),
    (("first.model_pattern=a.b",), ("openai_responses", "exact", "a.b", "p", "b")),
    (("first.upstream_model=GPT-5.5",), ("openai_responses", "exact", "a", "p", "GPT-5.5")),
    (("first.provider=Q",), ("openai_responses", "exact", "a", "q", "b")),
    (("first.model_pattern=1", "first.model_pattern=2"), ("openai_responses", "exact", "2", "p", "b")),
    (("first.upstream_model=", "first.upstream_model=z"), ("openai_responses", "exact", "a", "p", "z")),
    (("first.upstream_model=z", "first.upstream_model="), ("openai_responses", "exact", "a", "p", None)),
])
def test_overrides_change_the_named_route_in_their_order(specs, fields):
    assert overridden(*specs) == fields


@pytest.mark.parametrize("spec, parts", [
    ("", ("ROUTE.FIELD=VALUE",)),
    ("first", ("first", "ROUTE.FIELD=VALUE")),
    ("first.provider", ("first.provider", "ROUTE.FIELD=VALUE")),
    ("first=p", ("first=p", "ROUTE.FIELD=VALUE")),
    ("first=a.b", ("first=a.b", "ROUTE.FIELD=VALUE")),
    (".provider=p", ("non-empty",)),
    (" .provider=p", ("non-empty",)),
    ("first.=p", ("non-empty",)),
    ("first. =p", ("non-empty",)),
    (".=", ("non-empty",)),
    ("second.provider=p", ("apply --route-override second.provider=p", "second")),
    ("First.provider=p", ("apply --route-override", "First")),
    ("first.request_protocol=http", ("http",)),
    ("first.match_kind=fuzzy", ("fuzzy",)),
    ("first.match_kind=", ("match_kind",)),
    ("first.name=x", ("name",)),
    ("first.color=x", ("color", "request_protocol", "match_kind", "model_pattern", "provider",
                       "upstream_model")),
    ("first.Provider=p", ("Provider", "request_protocol", "match_kind", "model_pattern", "provider",
                          "upstream_model")),
    ("first.provider.x=p", ("provider.x", "upstream_model")),
])
def test_an_override_that_does_not_work_says_why(spec, parts):
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(ROUTED, spec)
    assert "--route-override" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_an_override_of_a_name_that_two_routes_have_is_refused():
    with pytest.raises(proxai.ConfigError) as caught:
        load_text(ROUTED + '[[routing.routes]]\nname = "first"\nmodel_pattern = "c"\nprovider = "p"\n',
                  "first.provider=p")
    assert "not unique" in str(caught.value)


@pytest.mark.parametrize("spec, path", [
    ("first.provider=", "routing.routes[1].provider"),
    ("first.provider=nobody", "routing.routes[1].provider"),
    ("first.match_kind=regex|first.model_pattern=(", "routing.routes[1].model_pattern"),
])
def test_a_fault_that_an_override_makes_names_the_flag(spec, path):
    (fault,) = faults_of(ROUTED, *spec.split("|"))
    assert fault.startswith(f"{path}: ") and "--route-override" in fault


@pytest.mark.parametrize("text", ["routing = 1", "[routing]\nroutes = 1", "[routing]\nroutes = [1]",
                                  "[[routing.routes]]\nname = 1", ""])
def test_an_override_of_a_file_without_such_routes_is_an_error_and_no_more(text):
    with pytest.raises(proxai.ConfigError):
        load_text(f"{text}\n{MINIMAL}", "first.provider=p")


@pytest.mark.parametrize("at, value, path", [
    (("server", "port"), 70000, "server.port"), (("logging", "level"), "loud", "logging.level"),
    (("providers", "p", "base_url"), "nowhere", "providers.p.base_url"),
    (("providers", "p", "api_key"), HIDDEN + " x", "providers.p.api_key"),
])
def test_a_flags_bad_value_is_told_with_the_key_and_the_flag(at, value, path):
    with pytest.raises(proxai.ConfigError) as caught:
        proxai.load_config(MINIMAL, "here.toml", environ={},
                           overrides=lambda tables: [proxai.Override("--flag", at, value)])
    (fault,) = caught.value.faults
    assert path in fault and "--flag" in fault and HIDDEN not in fault


@pytest.mark.parametrize("text", ["server = 1", "[[server]]", "server = []"])
def test_a_flag_for_a_table_that_is_none_leaves_the_files_fault_to_be_told(text):
    with pytest.raises(proxai.ConfigError) as caught:
        proxai.load_config(f"{text}\n{MINIMAL}", "here.toml", environ={},
                           overrides=lambda tables: [proxai.Override("--port", ("server", "port"), 1)])
    assert [fault.split(": ")[1] for fault in caught.value.faults] == ["server"]


# -- the example -------------------------------------------------------------

def test_the_example_in_the_repository_is_made_from_the_schema():
    assert (HERE / "config.example.toml").read_text("utf-8") == proxai.example_toml()


def test_the_example_loads_and_every_default_names_a_provider_of_the_same_protocol():
    config = load_text(proxai.example_toml())
    for protocol in proxai.PROTOCOLS:
        name = getattr(config.routing.default_provider_names, protocol)
        assert config.providers[name].protocol == protocol
    assert all(proxai.TEMPLATE_KEY.search(p.api_key or "") for p in config.providers.values())
    assert {p.read_idle_timeout_secs for p in config.providers.values()} == {120}
    assert config.providers["anthropic"].compatibility == "strict"


@pytest.mark.parametrize("model, provider", [
    ("gpt-5.5", "openai"), ("GPT-5", "openai"), ("mimo-v2", "anthropic"), ("minimax-m2", "minimax_chat"),
    ("MiniMax-M2", "minimax_chat"),
])
def test_the_routes_of_the_example_go_where_it_says(model, provider):
    config = load_text(proxai.example_toml())
    decision = proxai.choose(proxai.compile_routes(config.routing.routes), {}, CHAT.name, model)
    assert (decision.provider, decision.model) == (provider, model)


def test_the_example_changes_only_what_the_rulings_say():
    example = load_text(proxai.example_toml())
    plain = load_text(MINIMAL)
    for section in ("server", "mcp", "logging", "capture", "tool_calls"):
        assert getattr(example, section) == getattr(plain, section)
    assert (example.error_responses.format, plain.error_responses.format) == ("native", "text")
    assert (example.translation.extended_pairs, plain.translation.extended_pairs) == (True, False)


def test_the_samples_of_the_example_work_when_they_are_uncommented():
    lines = proxai.example_toml().splitlines()
    starts = [i for i, line in enumerate(lines) if line == "# [[routing.routes]]"]
    assert len(starts) == 2
    for start in starts:
        for i in itertools.count(start):
            if i >= len(lines) or not lines[i].startswith("# "):
                break
            lines[i] = lines[i].removeprefix("# ")
    config = load_text("\n".join(lines))
    kinds = [r.match_kind for r in config.routing.routes]
    assert sorted(kinds) == ["auto", "auto", "auto", "exact", "regex"]
    (exact,) = (r for r in config.routing.routes if r.match_kind == "exact")
    (regex,) = (r for r in config.routing.routes if r.match_kind == "regex")
    decide = [proxai.choose(proxai.compile_routes([r]), {}, CHAT.name, model)
              for r, model in ((exact, exact.model_pattern.upper()), (regex, "gpt-5-4-mini"))]
    assert [d.model for d in decide] == [exact.upstream_model, "gpt-5.4-mini"]


def test_every_setting_of_the_example_is_a_setting_when_it_is_uncommented():
    lines = proxai.example_toml().splitlines()
    samples = lines.index("# [[routing.routes]]"), lines.index("[server]")
    unset = [i for i, line in enumerate(lines)
             if re.match(r"# \w+ = ", line) and not samples[0] < i < samples[1]]
    assert {"api_key_env", "api_key_file", "proxy_url", "ca_file"} <= {lines[i].split()[1] for i in unset}
    for i in unset:
        changed = [*lines[:i], lines[i].removeprefix("# "), *lines[i + 1:]]
        try:
            load_text("\n".join(changed))
        except proxai.ConfigError as error:
            assert "unknown" not in str(error) and "not valid TOML" not in str(error), lines[i]


def test_the_example_and_the_table_of_settings_know_every_setting():
    rows = list(proxai.settings_rows())
    assert all(wants and doc for _, _, wants, doc in rows)
    paths = {p.replace("routes.0", "routes[]").replace("providers.p", "providers.<name>") for p in SPECIFIED}
    assert paths <= {key for key, *_ in rows}
    named = set(re.findall(r"(?m)^(?:# )?(\w+) = ", proxai.example_toml()))
    assert named == {key.rpartition(".")[2] for key, *_ in rows}


# -- the app directory -------------------------------------------------------

def test_a_first_start_makes_the_app_directory_and_later_ones_touch_nothing(tmp_path):
    home = {"HOME": str(tmp_path)}
    first = proxai.bootstrap(home)
    base = tmp_path / ".proxai"
    assert (first.path, first.created) == (base, True)
    assert sorted(p.name for p in base.iterdir()) == ["captures", "config.example.toml", "config.toml",
                                                      "diagnostics", "logs"]
    assert all((base / name).is_dir() for name in ("captures", "diagnostics", "logs"))
    for name in ("config.toml", "config.example.toml"):
        assert (base / name).read_bytes() == proxai.example_toml().encode()
    assert proxai.bootstrap(home) == (base, False)
    (base / "config.example.toml").write_bytes(b"edited\r\n")
    (base / "config.toml").write_bytes(b"")
    (base / "logs" / "kept").write_bytes(b"x")
    assert proxai.bootstrap(home) == (base, False)
    assert (base / "config.example.toml").read_bytes() == b"edited\r\n"
    assert (base / "config.toml").read_bytes() == b"" and (base / "logs" / "kept").read_bytes() == b"x"


def test_only_what_is_missing_of_the_app_directory_is_made(tmp_path):
    home, base = {"HOME": str(tmp_path)}, tmp_path / ".proxai"
    (base / "captures").mkdir(parents=True)
    (base / "config.example.toml").write_text("mine")
    assert proxai.bootstrap(home) == (base, True)
    assert (base / "config.example.toml").read_text() == "mine"
    (base / "config.toml").write_text("mine")
    (base / "config.example.toml").unlink()
    assert proxai.bootstrap(home) == (base, False)
    assert (base / "config.toml").read_text() == "mine"
    assert (base / "config.example.toml").read_text("utf-8") == proxai.example_toml()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_nobody_else_can_read_the_app_directory(tmp_path):
    before = os.umask(0)
    try:
        base = proxai.bootstrap({"HOME": str(tmp_path)}).path
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (base, *base.iterdir())} == {
        ".proxai": 0o700, "captures": 0o700, "diagnostics": 0o700, "logs": 0o700, "config.toml": 0o600,
        "config.example.toml": 0o600}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_modes_of_what_is_there_stay(tmp_path):
    base = tmp_path / ".proxai"
    base.mkdir()
    (base / "config.toml").write_text("mine")
    base.chmod(0o755)
    (base / "config.toml").chmod(0o644)
    proxai.bootstrap({"HOME": str(tmp_path)})
    assert (base.stat().st_mode & 0o777, (base / "config.toml").stat().st_mode & 0o777) == (0o755, 0o644)


@pytest.mark.parametrize("environ, expected", [
    ({"HOME": "one", "USERPROFILE": "two"}, "one"), ({"USERPROFILE": "two"}, "two"),
    ({"HOME": "", "USERPROFILE": "two"}, "two"),
    ({}, "system"), ({"HOME": "", "USERPROFILE": ""}, "system"),
])
def test_the_home_directory_is_asked_for_in_order(monkeypatch, environ, expected):
    monkeypatch.setattr(proxai.os.path, "expanduser", lambda path: path.replace("~", "system"))
    assert proxai.app_directory(environ) == Path(expected) / ".proxai"


def test_without_a_home_directory_the_start_fails(monkeypatch):
    monkeypatch.setattr(proxai.os.path, "expanduser", lambda path: path)
    with pytest.raises(proxai.ConfigError) as caught:
        proxai.bootstrap({})
    assert "HOME" in str(caught.value)


def test_an_app_directory_that_cannot_be_made_is_told_with_its_path(tmp_path):
    (tmp_path / ".proxai").write_text("a file")
    with pytest.raises(proxai.ConfigError) as caught:
        proxai.bootstrap({"HOME": str(tmp_path)})
    assert ".proxai" in str(caught.value)
    assert (tmp_path / ".proxai").read_text() == "a file"


def test_a_start_without_a_configuration_makes_one_and_refuses_requests_until_it_has_a_key(tmp_path):
    program = Running(tmp_path, "--port", "0", env={"USERPROFILE": str(tmp_path)})
    try:
        config = tmp_path / ".proxai" / "config.toml"
        assert program.wait_line(r"^  config: (.*)$")[1] == str(config)
        program.wait_line(r"^  note: .*config\.toml.*created")
        assert config.read_text("utf-8") == proxai.example_toml()
        reply = program.post("/v1/responses", body_for(RESPONSES, "gpt-5"))
        assert (reply.status, reply.headers["x-should-retry"]) == (500, "false")
        assert "providers.openai.api_key" in reply.json["error"]["message"]
    finally:
        program.stop()


def test_a_start_with_a_configuration_of_its_own_needs_no_app_directory(tmp_path, upstream):
    program = Running(tmp_path, config=config_for(upstream.url), env={"USERPROFILE": str(tmp_path)})
    program.stop()
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]



# ============================================================================
#  6  HTTP grammar
# ============================================================================

FramingError = proxai.FramingError
HEAD_LIMITS = proxai.HeadLimits()
HOST_LINE = b"Host: h"


def request_head(*lines: bytes, limits: Any = HEAD_LIMITS) -> Any:
    """The parsed request head of these lines."""
    return proxai.parse_request_head(b"\r\n".join(lines), limits)


def response_head(*lines: bytes) -> Any:
    """The parsed response head of these lines."""
    return proxai.parse_response_head(b"\r\n".join(lines))


def framing_refusal(call: Callable[..., Any], *arguments: Any) -> int:
    """The status with which the bytes are refused."""
    with pytest.raises(FramingError) as caught:
        call(*arguments)
    assert str(caught.value), "a refusal says what is wrong"
    return caught.value.status


def body_outcome(make: Callable[[], Any], pieces: list[bytes]) -> tuple[Any, ...]:
    """What a decoder makes of a body that comes in these pieces and then ends."""
    decoder, out, at = make(), [], 0
    try:
        while at < len(pieces) and not decoder.finished:
            out.append(decoder.feed(pieces[at]))
            at += 1
        decoder.close()
    except FramingError:
        return ("refused",)
    return ("whole", b"".join(out), getattr(decoder, "rest", b"") + b"".join(pieces[at:]))


def bytewise(data: bytes) -> list[bytes]:
    """Each byte a piece."""
    return [data[i:i + 1] for i in range(len(data))]


def two_pieces(data: bytes) -> Iterator[list[bytes]]:
    """The data cut at each place."""
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]


def random_pieces(dice: random.Random, data: bytes) -> list[bytes]:
    """The data cut at random places."""
    cuts = sorted(dice.choices(range(len(data) + 1), k=dice.randint(0, 6)))
    return [p for p in (data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)) if p]


def mutated_bytes(dice: random.Random, data: bytes) -> bytes:
    """`data` with a few random edits of the kind that upsets parsers."""
    odd = [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"5", b"-", b"+", b"\xff",
           b"\x7f", b'"', b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
           b"Host: x\r\n", b"\r\n ", b"HTTP/1.1"]
    for _ in range(dice.randint(1, 3)):
        at, size = dice.randrange(len(data) + 1), dice.choice((0, 0, 1, 2, 5))
        new = dice.choice((dice.choice(odd), bytes([dice.randrange(256)]), data[at:at + 9] * 2, b""))
        data = data[:at] + new + data[at + size:]
    return data


REQUEST_HEADS: list[tuple[str, list[bytes], dict[str, Any]]] = [
    ("origin form", [b"POST /v1/messages?beta=true HTTP/1.1", b"Host: localhost:18080"],
     {"method": b"POST", "path": "/v1/messages", "query": "?beta=true", "http11": True, "host": "localhost",
      "length": 0, "keep_alive": True, "expects_continue": False}),
    ("no query", [b"GET / HTTP/1.1", HOST_LINE], {"path": "/", "query": ""}),
    ("empty query", [b"GET /a? HTTP/1.1", HOST_LINE], {"path": "/a", "query": "?"}),
    ("query with a question mark", [b"GET /a?b?c=/d HTTP/1.1", HOST_LINE],
     {"path": "/a", "query": "?b?c=/d"}),
    ("percent is not decoded", [b"GET /a%2Fb%00 HTTP/1.1", HOST_LINE], {"path": "/a%2Fb%00"}),
    ("two slashes are a path", [b"GET //evil/x HTTP/1.1", HOST_LINE], {"path": "//evil/x", "host": "h"}),
    ("any method", [b"M-SEARCH!# / HTTP/1.1", HOST_LINE], {"method": b"M-SEARCH!#"}),
    ("methods keep their case", [b"post / HTTP/1.1", HOST_LINE], {"method": b"post"}),
    ("asterisk form", [b"OPTIONS * HTTP/1.1", HOST_LINE], {"path": "*", "query": ""}),
    ("authority form", [b"CONNECT h:443 HTTP/1.1", b"Host: h:443"], {"method": b"CONNECT", "path": "h:443"}),
    ("absolute form beats Host", [b"POST http://LocalHost:99/v1/messages?q HTTP/1.1", b"Host: other"],
     {"path": "/v1/messages", "query": "?q", "host": "localhost"}),
    ("absolute form, scheme in capitals", [b"GET HTTPS://a/b HTTP/1.1", HOST_LINE],
     {"path": "/b", "host": "a"}),
    ("absolute form without path", [b"GET http://a HTTP/1.1", HOST_LINE],
     {"path": "/", "query": "", "host": "a"}),
    ("absolute form, query without path", [b"GET http://a?q HTTP/1.1", HOST_LINE],
     {"path": "/", "query": "?q", "host": "a"}),
    ("absolute form, IPv6", [b"GET http://[::1]:8/p HTTP/1.1", HOST_LINE], {"path": "/p", "host": "[::1]"}),
    ("HTTP/1.0 closes", [b"POST / HTTP/1.0", HOST_LINE], {"http11": False, "keep_alive": False}),
    ("HTTP/1.0 without Host", [b"POST / HTTP/1.0"], {"http11": False, "host": "", "length": 0}),
    ("HTTP/1.0 keep-alive", [b"POST / HTTP/1.0", HOST_LINE, b"Connection: Keep-Alive"], {"keep_alive": True}),
    ("HTTP/1.0 keep-alive and close", [b"POST / HTTP/1.0", HOST_LINE, b"Connection: keep-alive, close"],
     {"keep_alive": False}),
    ("a higher minor version is 1.1", [b"POST / HTTP/1.2", HOST_LINE], {"http11": True, "keep_alive": True}),
    ("Host in capitals", [b"GET / HTTP/1.1", b"HOST:LocalHost"], {"host": "localhost"}),
    ("blanks around Host", [b"GET / HTTP/1.1", b"Host: \t localhost \t "], {"host": "localhost"}),
    ("empty Host is grammatical", [b"GET / HTTP/1.1", b"Host:"], {"host": ""}),
    ("Host with an empty port", [b"GET / HTTP/1.1", b"Host: h:"], {"host": "h"}),
    ("Host IPv6", [b"GET / HTTP/1.1", b"Host: [::1]:18080"], {"host": "[::1]"}),
    ("Host IPv4", [b"GET / HTTP/1.1", b"Host: 127.0.0.1:1"], {"host": "127.0.0.1"}),
    ("length", [b"POST / HTTP/1.1", HOST_LINE, b"Content-Length: 5"], {"length": 5}),
    ("length zero", [b"POST / HTTP/1.1", HOST_LINE, b"Content-Length: 0"], {"length": 0}),
    ("length with zeros in front", [b"POST / HTTP/1.1", HOST_LINE, b"Content-Length: 0005"], {"length": 5}),
    ("length with blanks around", [b"POST / HTTP/1.1", HOST_LINE, b"content-length:\t5 \t"], {"length": 5}),
    ("length in a name that only contains it", [b"POST / HTTP/1.1", HOST_LINE, b"X-Content-Length: 9"],
     {"length": 0}),
    ("chunked", [b"POST / HTTP/1.1", HOST_LINE, b"Transfer-Encoding: chunked"], {"length": None}),
    ("chunked in any case", [b"POST / HTTP/1.1", HOST_LINE, b"TRANSFER-ENCODING:  ChunKed "],
     {"length": None}),
    ("close", [b"POST / HTTP/1.1", HOST_LINE, b"Connection: CLOSE"], {"keep_alive": False}),
    ("close in a list", [b"POST / HTTP/1.1", HOST_LINE, b"Connection: x ,, close\t,y"],
     {"keep_alive": False}),
    ("close in a second line", [b"POST / HTTP/1.1", HOST_LINE, b"Connection: keep-alive",
                                b"Connection: close"],
     {"keep_alive": False}),
    ("closed is not close", [b"POST / HTTP/1.1", HOST_LINE, b"Connection: closed"], {"keep_alive": True}),
    ("Proxy-Connection means nothing", [b"POST / HTTP/1.1", HOST_LINE, b"Proxy-Connection: close"],
     {"keep_alive": True}),
    ("Expect", [b"POST / HTTP/1.1", HOST_LINE, b"Expect: 100-Continue", b"Content-Length: 1"],
     {"expects_continue": True}),
    ("Expect from HTTP/1.0 is ignored", [b"POST / HTTP/1.0", HOST_LINE, b"Expect: 100-continue"],
     {"expects_continue": False}),
]


@pytest.mark.parametrize("lines, expected", [c[1:] for c in REQUEST_HEADS], ids=[c[0] for c in REQUEST_HEADS])
def test_a_good_request_head_is_read(lines, expected):
    head = request_head(*lines)
    assert {key: getattr(head, key) for key in expected} == expected


@pytest.mark.parametrize("lines", [c[1] for c in REQUEST_HEADS], ids=[c[0] for c in REQUEST_HEADS])
def test_no_beginning_of_a_good_request_head_is_refused(lines):
    whole = b"\r\n".join(lines) + b"\r\n\r\n"
    for i in range(len(whole)):
        proxai.check_unfinished(whole[:i], HEAD_LIMITS)


def test_header_lines_are_kept_in_order_and_as_they_came():
    head = request_head(b"POST / HTTP/1.1", HOST_LINE, b"X-One:  a\tb \t", b"x-one:", b"X-Two:b:c\xff",
                        b"!#$%&'*+.^_`|~9Z:z")
    assert [tuple(f) for f in head.fields] == [
        (b"host", b"h", b"Host: h"), (b"x-one", b"a\tb", b"X-One:  a\tb \t"), (b"x-one", b"", b"x-one:"),
        (b"x-two", b"b:c\xff", b"X-Two:b:c\xff"), (b"!#$%&'*+.^_`|~9z", b"z", b"!#$%&'*+.^_`|~9Z:z")]


def test_thousands_of_different_header_lines_are_all_read_right():
    for i in range(3 * proxai.FIELD_CACHE_LINES):
        line = b"X-%d: %d" % (i % 700, i)
        assert proxai.parse_field(line) == (b"x-%d" % (i % 700), b"%d" % i, line)
        assert proxai.parse_field(HOST_LINE) == (b"host", b"h", HOST_LINE)


REFUSED_LINES: list[tuple[bytes, int]] = [
    # the request line
    (b"", 400), (b"GET", 400), (b"GET /", 400), (b"GET / ", 400), (b" GET / HTTP/1.1", 400),
    (b"GET / HTTP/1.1 ", 400), (b"GET  / HTTP/1.1", 400), (b"GET /  HTTP/1.1", 400),
    (b"GET\t/ HTTP/1.1", 400), (b"GET / / HTTP/1.1", 400), (b"GET /a b HTTP/1.1", 400),
    (b"G(T / HTTP/1.1", 400), (b"G\xc3\x89T / HTTP/1.1", 400), (b"/ HTTP/1.1", 400),
    (b"GET /\xc3\xa9 HTTP/1.1", 400), (b"GET /\x7f HTTP/1.1", 400), (b"GET /\x00 HTTP/1.1", 400),
    (b"\x00GET / HTTP/1.1", 400), (b"GET /a\rb HTTP/1.1", 400), (b"GET /\nX: y HTTP/1.1", 400),
    (b"GET / HTTP/1.1\r", 400), (b"GET / HTTP/1.1\n", 400), (b"GET / HTTP/1.1\nHost: a", 400),
    (b"\nGET / HTTP/1.1", 400), (b"\rGET / HTTP/1.1", 400),
    # the version
    (b"GET / HTTP/1", 400), (b"GET / HTTP/1.", 400), (b"GET / HTTP/.1", 400), (b"GET / HTTP/1.10", 400),
    (b"GET / HTTP/11.1", 400), (b"GET / HTTP/01.1", 400), (b"GET / HTTP/1,1", 400), (b"GET / http/1.1", 400),
    (b"GET / Http/1.1", 400), (b"GET / XHTTP/1.1", 400), (b"GET / HTTP 1.1", 400), (b"GET / HTTP/ 1.1", 400),
    (b"GET / HTTP/-1.1", 400), (b"GET / HTTP/1.1.1", 400), (b"GET / ICY/1.1", 400), (b"GET / HTTP/1.x", 400),
    (b"GET / HTTP/2.0", 505), (b"PRI * HTTP/2.0", 505), (b"GET / HTTP/3.1", 505), (b"GET / HTTP/0.9", 505),
    # the target
    (b"GET /a#b HTTP/1.1", 400), (b"GET /# HTTP/1.1", 400), (b"GET /a?b#c HTTP/1.1", 400),
    (b"GET http://h/a#b HTTP/1.1", 400), (b"GET http://h#a HTTP/1.1", 400),
    (b"GET http:///v1/messages HTTP/1.1", 400), (b"GET http://u@h/ HTTP/1.1", 400),
    (b"GET http://u:p@h/ HTTP/1.1", 400), (b"GET http://h:x/ HTTP/1.1", 400),
    (b"GET http://h:1:2/ HTTP/1.1", 400), (b"GET http://[::1/ HTTP/1.1", 400),
    (b"GET http://h\\x/ HTTP/1.1", 400),
    # TLS to a plain port
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
]


@pytest.mark.parametrize("line, status", REFUSED_LINES)
def test_a_bad_request_line_is_refused(line, status):
    assert framing_refusal(request_head, line, HOST_LINE) == status


REFUSED_FIELDS: list[tuple[str, list[bytes], int]] = [
    ("Host missing", [], 400),
    ("Host twice, different", [b"Host: a", b"Host: b"], 400),
    ("Host twice, equal", [b"Host: a", b"host: a"], 400),
    ("Host a list", [b"Host: a, b"], 400),
    ("Host with a path", [b"Host: a/b"], 400),
    ("Host with a user", [b"Host: u@a"], 400),
    ("Host with a blank", [b"Host: a b"], 400),
    ("Host with a scheme", [b"Host: http://a"], 400),
    ("Host with a query", [b"Host: a?b"], 400),
    ("Host with a fragment", [b"Host: a#b"], 400),
    ("Host with a backslash", [b"Host: a\\b"], 400),
    ("Host with a quote", [b'Host: "a"'], 400),
    ("Host port not digits", [b"Host: a:80x"], 400),
    ("Host port negative", [b"Host: a:-1"], 400),
    ("Host two ports", [b"Host: a:1:2"], 400),
    ("Host bare IPv6", [b"Host: ::1"], 400),
    ("Host open bracket", [b"Host: [::1"], 400),
    ("Host behind the bracket", [b"Host: [::1]x"], 400),
    ("Host bracketed name", [b"Host: [localhost]"], 400),
    ("Host not ASCII", [b"Host: h\xc3\xa9"], 400),
    ("Content-Length empty", [HOST_LINE, b"Content-Length:"], 400),
    ("Content-Length plus", [HOST_LINE, b"Content-Length: +5"], 400),
    ("Content-Length minus", [HOST_LINE, b"Content-Length: -5"], 400),
    ("Content-Length minus zero", [HOST_LINE, b"Content-Length: -0"], 400),
    ("Content-Length hex", [HOST_LINE, b"Content-Length: 0x5"], 400),
    ("Content-Length hex digit", [HOST_LINE, b"Content-Length: a"], 400),
    ("Content-Length list of equals", [HOST_LINE, b"Content-Length: 5, 5"], 400),
    ("Content-Length list", [HOST_LINE, b"Content-Length: 5,6"], 400),
    ("Content-Length fraction", [HOST_LINE, b"Content-Length: 5.0"], 400),
    ("Content-Length exponent", [HOST_LINE, b"Content-Length: 1e3"], 400),
    ("Content-Length underscore", [HOST_LINE, b"Content-Length: 1_000"], 400),
    ("Content-Length blank inside", [HOST_LINE, b"Content-Length: 1 0"], 400),
    ("Content-Length quoted", [HOST_LINE, b'Content-Length: "5"'], 400),
    ("Content-Length superscript", [HOST_LINE, b"Content-Length: \xb2"], 400),
    ("Content-Length Arabic digit", [HOST_LINE, b"Content-Length: \xd9\xa5"], 400),
    ("Content-Length semicolon", [HOST_LINE, b"Content-Length: 5;"], 400),
    ("Content-Length huge", [HOST_LINE, b"Content-Length: " + b"9" * 19], 413),
    ("Content-Length absurd", [HOST_LINE, b"Content-Length: " + b"9" * 5000], 413),
    ("Content-Length twice, equal", [HOST_LINE, b"Content-Length: 5", b"Content-Length: 5"], 400),
    ("Content-Length twice, different", [HOST_LINE, b"Content-Length: 5", b"content-length: 6"], 400),
    ("both framings", [HOST_LINE, b"Content-Length: 5", b"Transfer-Encoding: chunked"], 400),
    ("both framings, other order", [HOST_LINE, b"Transfer-Encoding: chunked", b"Content-Length: 0"], 400),
    ("both framings, odd coding", [HOST_LINE, b"Transfer-Encoding: x", b"Content-Length: 0"], 400),
    ("Transfer-Encoding twice", [HOST_LINE, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
     400),
    ("Transfer-Encoding twice, different",
     [HOST_LINE, b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked"], 400),
    # 9112 6.3: where chunked is not the last coding the length cannot be known, and the answer is 400
    ("Transfer-Encoding empty", [HOST_LINE, b"Transfer-Encoding:"], 400),
    ("Transfer-Encoding identity", [HOST_LINE, b"Transfer-Encoding: identity"], 400),
    ("Transfer-Encoding gzip", [HOST_LINE, b"Transfer-Encoding: gzip"], 400),
    ("Transfer-Encoding chunked not last", [HOST_LINE, b"Transfer-Encoding: chunked, gzip"], 400),
    ("Transfer-Encoding chunked, identity", [HOST_LINE, b"Transfer-Encoding: chunked, identity"], 400),
    ("Transfer-Encoding chunked twice in it", [HOST_LINE, b"Transfer-Encoding: chunked, chunked"], 400),
    ("Transfer-Encoding xchunked", [HOST_LINE, b"Transfer-Encoding: xchunked"], 400),
    ("Transfer-Encoding chunkedx", [HOST_LINE, b"Transfer-Encoding: chunkedx"], 400),
    ("Transfer-Encoding x chunked", [HOST_LINE, b"Transfer-Encoding: x chunked"], 400),
    ("Transfer-Encoding with a parameter", [HOST_LINE, b"Transfer-Encoding: chunked;q=1"], 400),
    ("Transfer-Encoding quoted", [HOST_LINE, b'Transfer-Encoding: "chunked"'], 400),
    ("Transfer-Encoding with a vertical tab", [HOST_LINE, b"Transfer-Encoding: \x0bchunked"], 400),
    ("Transfer-Encoding with a NUL", [HOST_LINE, b"Transfer-Encoding: chunked\x00"], 400),
    ("Transfer-Encoding with a CR", [HOST_LINE, b"Transfer-Encoding: \rchunked"], 400),
    ("Transfer-Encoding with a no-break space", [HOST_LINE, b"Transfer-Encoding: chunked\xa0"], 400),
    ("Transfer-Encoding with a blank before the colon", [HOST_LINE, b"Transfer-Encoding : chunked"], 400),
    ("Transfer-Encoding with a tab before the colon", [HOST_LINE, b"Transfer-Encoding\t: chunked"], 400),
    ("Transfer-Encoding with a blank in front", [HOST_LINE, b" Transfer-Encoding: chunked"], 400),
    ("Transfer-Encoding folded", [HOST_LINE, b"Transfer-Encoding:", b" chunked"], 400),
    ("Transfer-Encoding behind a bare LF", [HOST_LINE, b"X: y\nTransfer-Encoding: chunked"], 400),
    ("Transfer-Encoding behind a bare CR", [HOST_LINE, b"X: y\rTransfer-Encoding: chunked"], 400),
    # 9112 6.1: an understood last coding with one that is not
    ("Transfer-Encoding gzip, chunked", [HOST_LINE, b"Transfer-Encoding: gzip, chunked"], 501),
    ("Expect something else", [HOST_LINE, b"Expect: 200-ok"], 417),
    ("Expect empty", [HOST_LINE, b"Expect:"], 417),
    ("Expect twice", [HOST_LINE, b"Expect: 100-continue", b"Expect: 100-continue"], 400),
    ("folded with a blank", [HOST_LINE, b"X: a", b" b"], 400),
    ("folded with a tab", [HOST_LINE, b"X: a", b"\tb"], 400),
    ("first line folded", [b" X: a", HOST_LINE], 400),
    ("a line of blanks", [HOST_LINE, b"  "], 400),
    ("an empty line inside", [HOST_LINE, b"", b"X: a"], 400),
    ("no colon", [HOST_LINE, b"X"], 400),
    ("no name", [HOST_LINE, b": a"], 400),
    ("blank before the colon", [b"Host : h"], 400),
    ("blank in the name", [HOST_LINE, b"X Y: a"], 400),
    ("bracket in the name", [HOST_LINE, b"X[]: a"], 400),
    ("name not ASCII", [HOST_LINE, b"X\xc3\xa9: a"], 400),
    ("NUL in the name", [HOST_LINE, b"X\x00: a"], 400),
    ("NUL in the value", [HOST_LINE, b"X: a\x00b"], 400),
    ("CR in the value", [HOST_LINE, b"X: a\rb"], 400),
    ("CR at the end of the value", [HOST_LINE, b"X: a\r", b"Y: b"], 400),
    ("LF in the value", [HOST_LINE, b"X: a\nb"], 400),
    ("LF before CRLF", [HOST_LINE, b"X: a\n"], 400),
    ("DEL in the value", [HOST_LINE, b"X: a\x7f"], 400),
    ("escape in the value", [HOST_LINE, b"X: \x1b[0m"], 400),
    ("vertical tab in the value", [HOST_LINE, b"X: a\x0b"], 400),
]


@pytest.mark.parametrize("lines, status", [c[1:] for c in REFUSED_FIELDS], ids=[c[0] for c in REFUSED_FIELDS])
def test_bad_request_headers_are_refused(lines, status):
    assert framing_refusal(request_head, b"POST / HTTP/1.1", *lines) == status


@pytest.mark.parametrize("lines", [
    [b"Transfer-Encoding: chunked"], [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
    [b"Transfer-Encoding: gzip"],
], ids=["chunked", "both framings", "gzip"])
def test_http_1_0_with_a_transfer_encoding_is_refused(lines):
    assert framing_refusal(request_head, b"POST / HTTP/1.0", HOST_LINE, *lines) == 400


@pytest.mark.parametrize("lines", [[b"Content-Length: x"], [b"Content-Length: 5", b"Content-Length: 5"],
                                   [b"Host: a b"], [b"Host: a", b"Host: a"], [b"X: a", b" b"]])
def test_http_1_0_is_read_no_less_strictly(lines):
    assert framing_refusal(request_head, b"POST / HTTP/1.0", *lines) == 400


def test_a_trailing_comma_behind_chunked_is_refused_one_way_or_the_other():
    assert framing_refusal(request_head, b"POST / HTTP/1.1", HOST_LINE,
                           b"Transfer-Encoding: chunked,") in (400, 501)
    assert framing_refusal(request_head, b"POST / HTTP/1.1", HOST_LINE,
                           b"Transfer-Encoding: ,chunked") in (400, 501)


@pytest.mark.parametrize("byte", [b"\0", b"\r", b"\n"], ids=["NUL", "CR", "LF"])
def test_a_stray_control_byte_anywhere_in_a_head_is_refused(byte):
    whole = b"POST /v1/messages?q HTTP/1.1\r\nHost: h\r\nX-A: b\r\nContent-Length: 5"
    for i in range(len(whole) + 1):
        assert framing_refusal(proxai.parse_request_head, whole[:i] + byte + whole[i:], HEAD_LIMITS) == 400, i
    response = b"HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 5"
    for i in range(len(response) + 1):
        framing_refusal(proxai.parse_response_head, response[:i] + byte + response[i:])


SMALL_LIMITS = proxai.HeadLimits(line_bytes=40, head_bytes=100, fields=3)


def request_line_of(size: int) -> bytes:
    """A request line of so many bytes."""
    return b"GET /" + b"a" * (size - 14) + b" HTTP/1.1"


def request_head_of(size: int) -> bytes:
    """A request head of so many bytes, its final empty line not counted."""
    start = b"GET / HTTP/1.1\r\nHost: h\r\nX: "
    return start + b"a" * (size - len(start))


def first_refusal(whole: bytes, limits: Any) -> int | None:
    """The status with which a head that comes byte by byte is refused before it is complete."""
    for i in range(len(whole)):
        try:
            proxai.check_unfinished(whole[:i], limits)
        except FramingError as error:
            return error.status
    return None


@pytest.mark.parametrize("head, status", [
    (request_line_of(40) + b"\r\nHost: h", None),
    (request_line_of(41) + b"\r\nHost: h", 414),
    (request_line_of(200) + b"\r\nHost: h", 414),  # above the limit of the head as well: it is still the line
    (request_head_of(100), None),
    (request_head_of(101), 431),
    (request_head_of(300), 431),
], ids=["line at the limit", "line one above", "line far above", "head at the limit", "head one above",
        "head far above"])
def test_the_size_limits_hold_to_the_byte_however_a_head_comes(head, status):
    if status is None:
        proxai.parse_request_head(head, SMALL_LIMITS)
    else:
        assert framing_refusal(proxai.parse_request_head, head, SMALL_LIMITS) == status
    early = first_refusal(head + b"\r\n\r\n", SMALL_LIMITS)
    assert early == status or (status is not None
                               and early is None), "judged otherwise when it comes byte by byte"


def test_what_grows_beyond_a_limit_is_refused_before_it_ends():
    assert first_refusal(b"GET /" + b"a" * 500, SMALL_LIMITS) == 414
    assert first_refusal(b"GET / HTTP/1.1\r\nX: " + b"a" * 500, SMALL_LIMITS) == 431
    assert first_refusal(b"GET / HTTP/1.1\nHost: h\n\n", SMALL_LIMITS) == 400
    assert first_refusal(b"\x16\x03\x01", SMALL_LIMITS) == 400


@pytest.mark.parametrize("head, status", [
    (request_line_of(40) + b"\r\nHost: h", None),
    (request_head_of(100), None),
    (request_line_of(41) + b"\r\nHost: h", 414),
    (b"GET /" + b"a" * 500, 414),
    (request_head_of(300), 431),
    *[(b"GET / HTTP/1.1\r\nHost: h\r\n"[:at] + b"\n" + b"X: aaaaaaaa", 400) for at in (5, 14, 20, 23)],
    (b"GET / HTTP/1.1\r\nHost: h\r\n\n", 400),
    (b"GET / HTTP/1.1\r\n\nHost: h", 400),
    (b"\nGET / HTTP/1.1", 400),
], ids=repr)
def test_a_head_that_comes_in_small_pieces_is_judged_as_a_whole_one(head, status):
    def refusal(pieces: list[bytes]) -> int | None:
        """The status with which it is refused while each look begins where the last one ended."""
        data, scanned = b"", 0
        for piece in pieces:
            data += piece
            try:
                proxai.check_unfinished(data, SMALL_LIMITS, scanned)
            except FramingError as error:
                return error.status
            scanned = len(data)
        return None

    dice = random.Random(6)
    anyhow = [random_pieces(dice, head) for _ in range(50)]
    for pieces in ([head], bytewise(head), *two_pieces(head), *anyhow):
        assert refusal(pieces) == status


def test_long_lines_are_read_and_not_kept():
    caches = [proxai.parse_request_line, proxai.parse_host, proxai.parse_status_line]
    request_head(b"GET / HTTP/1.1", HOST_LINE)  # the short lines of this test are kept from here on
    before = [cache.cache_info().currsize for cache in caches]
    for i in range(20):
        path = f"/{i}-" + "a" * 4000
        assert request_head(f"GET {path} HTTP/1.1".encode(), HOST_LINE).path == path
        host = b"%d" % i + b"a" * proxai.CACHED_BYTES
        assert framing_refusal(request_head, b"GET / HTTP/1.1", b"Host: " + host) == 400
        framing_refusal(response_head, b"HTTP/1.1 200 " + host)
    assert [cache.cache_info().currsize for cache in caches] == before


@pytest.mark.parametrize("size, fits", [(512, True), (513, False), (60_000, False)])
def test_a_host_header_may_be_as_long_as_any_name(size, fits):
    lines = [b"GET / HTTP/1.1", b"Host: " + b"a" * size]
    if fits:
        assert request_head(*lines).host == "a" * size
    else:
        assert framing_refusal(request_head, *lines) == 400


def test_the_number_of_header_lines_is_limited():
    limits = proxai.HeadLimits(fields=3)
    assert len(request_head(b"GET / HTTP/1.1", HOST_LINE, b"A: 1", b"A: 2", limits=limits).fields) == 3
    with pytest.raises(FramingError) as caught:
        request_head(b"GET / HTTP/1.1", HOST_LINE, b"A: 1", b"A: 2", b"A: 3", limits=limits)
    assert caught.value.status == 431


def test_a_header_line_of_blanks_does_not_hold_the_program_up():
    code = """
import proxai
for start, blank in ((b"a:", b" "), (b"a:", b"\\t"), (b"a: b", b" ")):
    try:
        proxai.parse_field(start + blank * 60000 + b"\\0")
    except proxai.FramingError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.stdout.split() == ["refused"] * 3, done.stderr


RESPONSE_HEADS: list[tuple[str, list[bytes], int | None, bool]] = [
    ("length", [b"HTTP/1.1 200 OK", b"Content-Length: 5"], 5, True),
    ("length zero", [b"HTTP/1.1 200 OK", b"Content-Length: 0"], 0, True),
    ("chunked", [b"HTTP/1.1 200 OK", b"Transfer-Encoding: Chunked"], None, True),
    ("chunked and close", [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", b"Connection: close"], None,
     False),
    ("until the end", [b"HTTP/1.1 200 OK"], -1, False),
    ("until the end, whatever it says", [b"HTTP/1.1 200 OK", b"Connection: keep-alive"], -1, False),
    ("close", [b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Connection: Close"], 5, False),
    ("close in a second line", [b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Connection: x",
                                b"connection: close"], 5, False),
    ("HTTP/1.0", [b"HTTP/1.0 200 OK", b"Content-Length: 5"], 5, False),
    ("HTTP/1.0 keep-alive", [b"HTTP/1.0 200 OK", b"Content-Length: 5", b"Connection: keep-alive"], 5, True),
    ("100 has no body", [b"HTTP/1.1 100 Continue"], 0, True),
    ("103 has no body, whatever it says", [b"HTTP/1.1 103 Early Hints", b"Content-Length: 5", b"Link: x"], 0,
     True),
    ("204 has no body", [b"HTTP/1.1 204 No Content"], 0, True),
    ("204 has no body, whatever it says", [b"HTTP/1.1 204 No Content", b"Content-Length: 5"], 0, True),
    ("204 is not chunked either", [b"HTTP/1.1 204 No Content", b"Transfer-Encoding: chunked"], 0, True),
    ("304 has no body", [b"HTTP/1.1 304 Not Modified", b"Content-Length: 1000"], 0, True),
    ("205 is framed as any other", [b"HTTP/1.1 205 Reset Content", b"Content-Length: 0"], 0, True),
    ("an error is framed as any other", [b"HTTP/1.1 529 Overloaded", b"Content-Length: 7"], 7, True),
    ("no reason", [b"HTTP/1.1 200 ", b"Content-Length: 5"], 5, True),
    ("an odd reason", [b"HTTP/1.1 200 \tJa  \xfc 200", b"Content-Length: 5"], 5, True),
]


@pytest.mark.parametrize("lines, length, keep_alive", [c[1:] for c in RESPONSE_HEADS],
                         ids=[c[0] for c in RESPONSE_HEADS])
def test_a_good_response_head_is_read(lines, length, keep_alive):
    head = response_head(*lines)
    assert head.status == int(lines[0][9:12])
    assert (head.length, head.keep_alive) == (length, keep_alive)
    assert [f.line for f in head.fields] == lines[1:]


@pytest.mark.parametrize("lines", [
    [b""], [b"HTTP/1.1"], [b"HTTP/1.1 "], [b"HTTP/1.1 20 OK"], [b"HTTP/1.1 2000 OK"], [b"HTTP/1.1 099 X"],
    [b"HTTP/1.1 2x0 X"], [b"HTTP/1.1 +20 X"], [b"HTTP/1.1 -20 X"], [b"HTTP/1.1  200 OK"],
    [b" HTTP/1.1 200 OK"], [b"HTTP/1.1\t200 OK"], [b"HTTP/1.1 200OK"], [b"HTTP/1.1 200\tOK"],
    [b"http/1.1 200 OK"], [b"HTTP/2 200 OK"], [b"HTTP/2.0 200 OK"], [b"HTTP/0.9 200 OK"],
    [b"HTTP/1.11 200 OK"], [b"ICY 200 OK"], [b"<html>"], [b"220 smtp ready"], [b"SSH-2.0-x"],
    [b"HTTP/1.1 200 O\0K"], [b"HTTP/1.1 200 O\rK"], [b"HTTP/1.1 200 OK\n"], [b"HTTP/1.1 200 OK\nX: y"],
    [b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    [b"HTTP/1.1 200 OK", b"Content-Length: 5", b"Content-Length: 5"],
    [b"HTTP/1.1 200 OK", b"Content-Length: 5, 5"], [b"HTTP/1.1 200 OK", b"Content-Length: +5"],
    [b"HTTP/1.1 200 OK", b"Content-Length:"], [b"HTTP/1.1 200 OK", b"Content-Length: -1"],
    [b"HTTP/1.1 200 OK", b"Content-Length: " + b"9" * 4000],
    [b"HTTP/1.1 200 OK", b"Transfer-Encoding: gzip, chunked"],
    [b"HTTP/1.1 200 OK", b"Transfer-Encoding: identity"],
    [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked, chunked"], [b"HTTP/1.1 200 OK", b"Transfer-Encoding:"],
    [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    [b"HTTP/1.1 200 OK", b"X : a"], [b"HTTP/1.1 200 OK", b"X: a", b" b"], [b"HTTP/1.1 200 OK", b"X: a\0"],
    [b"HTTP/1.1 200 OK", b"X"], [b"HTTP/1.1 200 OK", b"X: a\nY: b"], [b"HTTP/1.1 200 OK", b"", b"X: a"],
])
def test_a_bad_response_head_is_refused(lines):
    framing_refusal(response_head, *lines)


def test_the_header_lines_of_a_response_are_limited():
    most = [b"HTTP/1.1 200 OK", *[b"Set-Cookie: a=%d" % i for i in range(proxai.RESPONSE_HEAD_FIELDS)]]
    assert len(response_head(*most).fields) == proxai.RESPONSE_HEAD_FIELDS
    framing_refusal(response_head, *most, b"X: one too many")


def test_an_http_1_0_response_with_a_transfer_encoding_never_keeps_its_connection():
    try:  # 9112 6.1: the framing counts as faulty
        head = response_head(b"HTTP/1.0 200 OK", b"Transfer-Encoding: chunked", b"Connection: keep-alive")
    except FramingError:
        return
    assert not head.keep_alive


GOOD_HEADS = [b"\r\n".join(lines) for _, lines, _ in REQUEST_HEADS]


def test_mutated_request_heads_are_read_or_refused_and_what_is_read_is_sound():
    dice = random.Random(6)
    read = 0
    for _ in range(6000):
        block = mutated_bytes(dice, dice.choice(GOOD_HEADS))
        with contextlib.suppress(FramingError):
            proxai.check_unfinished(block, HEAD_LIMITS)
        try:
            head = proxai.parse_request_head(block, HEAD_LIMITS)
        except FramingError as error:
            assert error.status in (400, 413, 414, 417, 431, 501, 505), block
            continue
        read += 1
        assert not re.search(rb"\0|\r(?!\n)|(?<!\r)\n|\r\n[ \t]", block), block
        names = [line.partition(b":")[0].lower() for line in block.split(b"\r\n")[1:]]
        assert [f.name for f in head.fields] == names, block
        framing = [n for n in names if n in (b"content-length", b"transfer-encoding")]
        assert len(framing) < 2, block
        assert names.count(b"host") == 1 or (not head.http11 and b"host" not in names), block
        assert (head.length is None) == (framing == [b"transfer-encoding"]), block
    assert read > 500, "too few mutations leave a head that can be read, so little was tested"


def test_mutated_response_heads_are_read_or_refused():
    dice = random.Random(7)
    read = 0
    for _ in range(4000):
        block = mutated_bytes(dice, b"\r\n".join(dice.choice(RESPONSE_HEADS)[1]))
        try:
            head = proxai.parse_response_head(block)
        except FramingError:
            continue
        read += 1
        assert 100 <= head.status <= 999 and not re.search(rb"\0|\r(?!\n)|(?<!\r)\n|\r\n[ \t]", block), block
    assert read > 500


@pytest.mark.parametrize("at, expected", [
    (0, b"Thu, 01 Jan 1970 00:00:00 GMT"), (784111777, b"Sun, 06 Nov 1994 08:49:37 GMT"),
    (951782400, b"Tue, 29 Feb 2000 00:00:00 GMT"), (1767225599.9, b"Wed, 31 Dec 2025 23:59:59 GMT"),
    (4102444800, b"Fri, 01 Jan 2100 00:00:00 GMT"),
])
def test_dates_are_written_as_http_wants_them(at, expected):
    assert proxai.http_date(at) == expected


def test_dates_agree_with_the_mail_package_all_year_round():
    for at in range(0, 4_000_000_000, 9_876_543):
        assert proxai.http_date(at).decode() == email.utils.formatdate(at, usegmt=True)


@pytest.mark.parametrize("status, lines, expected", [
    (200, [b"a: b", b"c: d"], b"HTTP/1.1 200 OK\r\na: b\r\nc: d\r\n\r\n"),
    (404, [], b"HTTP/1.1 404 Not Found\r\n\r\n"),
    (599, [], b"HTTP/1.1 599 \r\n\r\n"),  # the blank stays where a reason is not known
])
def test_a_head_is_written(status, lines, expected):
    assert proxai.format_head(status, lines) == expected


# -- bodies ------------------------------------------------------------------

NEXT_REQUEST = b"POST / HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED_BODIES: list[tuple[str, bytes, bytes]] = [
    ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("no chunk", b"0\r\n\r\n", b""),
    ("three chunks", b"1\r\na\r\n2\r\nbc\r\n3\r\ndef\r\n0\r\n\r\n", b"abcdef"),
    ("hex in both cases", b"a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n", b"01234567890123456789a"),
    ("zeros in front", b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    ("line ends in the data", b"8\r\n\r\n0\r\n\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r\n\r"),
    ("only line ends", b"2\r\n\r\n\r\n1\r\n\r\r\n1\r\n\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    ("extension", b"5;a\r\nhello\r\n0;b=c\r\n\r\n", b"hello"),
    ("extensions with blanks", b"5 ; a = b\t;c\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("quoted extension", b'5;a="b;c\\"\\\\ \t=\xff,"\r\nhello\r\n0;x=""\r\n\r\n', b"hello"),
    ("quoted extension like a chunk", b'5;a="5";b="0"\r\nhello\r\n0\r\n\r\n', b"hello"),
    ("trailers", b"5\r\nhello\r\n0\r\nA: b\r\nC:\r\nDigest:  x \r\n\r\n", b"hello"),
    ("trailers that look like framing", b"0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
    ("many small", b"1\r\nx\r\n" * 40 + b"0\r\n\r\n", b"x" * 40),
]


@pytest.mark.parametrize("data, payload", [c[1:] for c in CHUNKED_BODIES], ids=[c[0] for c in CHUNKED_BODIES])
def test_a_good_chunked_body_is_read_at_any_split(data, payload):
    three_ways(proxai.ChunkDecoder, data, payload, NEXT_REQUEST)
    three_ways(proxai.ChunkDecoder, data, payload, b"\r\n")
    for pieces in two_pieces(data + NEXT_REQUEST):
        assert body_outcome(proxai.ChunkDecoder, pieces) == ("whole", payload, NEXT_REQUEST), pieces
    for i in range(len(data)):
        assert body_outcome(proxai.ChunkDecoder, [data[:i]]) == ("refused",)


def test_the_payload_of_a_chunk_comes_out_before_the_chunk_is_whole():
    decoder = proxai.ChunkDecoder()
    assert [decoder.feed(p) for p in (b"fff", b"ffff\r", b"\nabc", b"\r\n0\r\n", b"x")] == [
        b"", b"", b"abc", b"\r\n0\r\n", b"x"]
    assert not decoder.finished
    framing_refusal(decoder.close)


CHUNKED_REFUSED: list[tuple[str, bytes]] = [
    *((f"size {size[:20]!r}", size + b"\r\nhello\r\n0\r\n\r\n") for size in (
        b"0x5", b"0X5", b"+5", b"-5", b" 5", b"\t5", b"5 ", b"5\t", b"5;;", b"5;", b"5; ", b"5;;a", b"5;a;",
        b"5;=b", b"5;a=", b"5;a= ", b"5;a b", b"5;a=b c", b"5,5", b"5.0", b"5h", b"x5", b"g", b"", b"\r\n5",
        b";a", b"5_", b"0_5", b"#5", b"5#", b"'5'", b'5;"a"', b'5;a="b', b'5;a="b"c', b'5;a="b\\',
        b'5;a="\x00"', b'5;a="\x7f"', b"5;a=\x00", b"5;a\xff", b"5;a=\xe9", b"5;[a]",
        b"5\r", b"5\rx", b"\r5", b"5;a\r", b"5;a=b\rc", b"5;a=\"\r\"", b"5\x00", b"\xef\xbc\x95", b"\xd9\xa5",
        b"10000000000000005", b"ffffffffffffffff", b"8000000000000000", b"-0", b"1" * 5000)),
    ("size with a bare LF", b"5\nhello\r\n0\r\n\r\n"),
    ("extension with a bare LF", b"5;a\nhello\r\n0\r\n\r\n"),
    ("quoted extension over a line end", b'5;a="\r\nhello\r\n0\r\n\r\n'),
    ("quoted extension with a bare LF", b'5;a="\n"\r\nhello\r\n0\r\n\r\n'),
    ("data without its line end", b"5\r\nhello0\r\n\r\n"),
    ("data longer than its size", b"4\r\nhello\r\n0\r\n\r\n"),
    ("data shorter than its size", b"6\r\nhello\r\n0\r\n\r\n"),
    ("data with a bare LF behind it", b"5\r\nhello\n0\r\n\r\n"),
    ("data with a bare CR behind it", b"5\r\nhello\r0\r\n\r\n"),
    ("data with two CR behind it", b"5\r\nhello\r\r\n0\r\n\r\n"),
    ("data with LF CR behind it", b"5\r\nhello\n\r0\r\n\r\n"),
    ("a blank line between the chunks", b"5\r\nhello\r\n\r\n0\r\n\r\n"),
    ("the end with bare LF", b"0\n\n"),
    ("the end with a bare LF second", b"0\r\n\n"),
    ("a trailer without colon", b"0\r\nA\r\n\r\n"),
    ("a trailer with a blank before the colon", b"0\r\nA : b\r\n\r\n"),
    ("a trailer without name", b"0\r\n: b\r\n\r\n"),
    ("a folded trailer", b"0\r\nA: b\r\n c\r\n\r\n"),
    ("a trailer with a blank in front", b"0\r\n A: b\r\n\r\n"),
    ("a trailer with a bare LF", b"0\r\nA: b\n\r\n"),
    ("a trailer with a bare CR", b"0\r\nA: b\rC: d\r\n\r\n"),
    ("a trailer with NUL", b"0\r\nA: \x00\r\n\r\n"),
    ("the next request instead of the end", b"0\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
]


@pytest.mark.parametrize("data", [c[1] for c in CHUNKED_REFUSED], ids=[c[0] for c in CHUNKED_REFUSED])
def test_a_bad_chunked_body_is_refused_at_any_split(data):
    assert body_outcome(proxai.ChunkDecoder, [data]) == ("refused",)
    assert body_outcome(proxai.ChunkDecoder, bytewise(data)) == ("refused",)
    for pieces in two_pieces(data[:60]):
        assert body_outcome(proxai.ChunkDecoder, [*pieces, data[60:]]) == ("refused",), pieces


def line_with_extension(size: int) -> bytes:
    """A chunk line of so many bytes, its line end counted."""
    return b"5;" + b"a" * (size - 4) + b"\r\n"


CHUNK_LIMITS = {
    f"line {extra:+}": line_with_extension(proxai.CHUNK_LINE_BYTES + extra) + b"hello\r\n0\r\n\r\n"
    for extra in (-1, 0, 1, 2, 3, 900)
}
CHUNK_LIMITS |= {
    f"trailer {extra:+}": b"0\r\nA: " + b"b" * (proxai.TRAILER_BYTES - 5 + extra) + b"\r\n\r\n"
    for extra in (-2, -1, 0, 1, 2, 900)
}


@pytest.mark.parametrize("data", CHUNK_LIMITS.values(), ids=CHUNK_LIMITS)
def test_the_limits_of_chunk_lines_and_trailers_do_not_depend_on_the_split(data):
    verdict = body_outcome(proxai.ChunkDecoder, [data])
    for pieces in (bytewise(data), [data[:-3], data[-3:]], [data[:-1], data[-1:]], [data[:100], data[100:]],
                   [data[:proxai.CHUNK_LINE_BYTES], data[proxai.CHUNK_LINE_BYTES:]]):
        assert body_outcome(proxai.ChunkDecoder, pieces) == verdict, [len(p) for p in pieces[:3]]


def test_chunk_lines_and_trailers_are_limited():
    endless = [(b"5;", b"a" * 1000), (b'5;a="', b"a" * 1000), (b"5", b" " * 1000),
               (b"0\r\n", b"A: b\r\n" * 200), (b"0\r\nA: ", b"b" * 1000)]
    for start, more in endless:
        decoder = proxai.ChunkDecoder()
        with pytest.raises(FramingError):
            decoder.feed(start)
            for _ in range(100):
                decoder.feed(more)


def test_mutated_chunked_bodies_are_judged_the_same_at_any_split():
    dice = random.Random(8)
    verdicts = {"whole": 0, "refused": 0}
    for _ in range(3000):
        data = dice.choice(CHUNKED_BODIES)[1]
        if dice.random() < 0.9:
            data = mutated_bytes(dice, data)
        verdict = body_outcome(proxai.ChunkDecoder, [data])
        verdicts[verdict[0]] += 1
        assert body_outcome(proxai.ChunkDecoder, bytewise(data)) == verdict, data
        for _ in range(3):
            pieces = random_pieces(dice, data)
            assert body_outcome(proxai.ChunkDecoder, pieces) == verdict, pieces
    assert min(verdicts.values()) > 300, verdicts


def test_random_bodies_survive_being_cut_into_chunks():
    dice = random.Random(9)
    for _ in range(300):
        payload = bytes(dice.choices(b"\r\n0;5ab", k=dice.randrange(60)))
        data = b"".join(chunk(p) for p in random_pieces(dice, payload)) + b"0\r\n\r\n"
        pieces = random_pieces(dice, data + NEXT_REQUEST)
        assert body_outcome(proxai.ChunkDecoder, pieces) == ("whole", payload, NEXT_REQUEST), pieces


@pytest.mark.parametrize("length, data, payload", [(5, b"hello", b"hello"), (1, b"\n", b"\n"), (0, b"", b"")])
def test_a_body_of_a_declared_length_is_read(length, data, payload):
    three_ways(lambda: proxai.LengthDecoder(length), data, payload, NEXT_REQUEST)
    assert proxai.LengthDecoder(length).finished == (length == 0)
    for i in range(length):
        assert body_outcome(lambda: proxai.LengthDecoder(length), [data[:i]]) == ("refused",)


def test_a_body_until_the_end_takes_all_and_ends_with_the_connection():
    decoder = proxai.EndDecoder()
    assert [decoder.feed(p) for p in (b"0\r\n\r\n", b"", b"x")] == [b"0\r\n\r\n", b"", b"x"]
    assert not decoder.finished and decoder.rest == b""
    decoder.close()
    assert decoder.finished


@pytest.mark.parametrize("length, kind", [(None, proxai.ChunkDecoder), (-1, proxai.EndDecoder),
                                          (0, proxai.LengthDecoder), (7, proxai.LengthDecoder)])
def test_a_head_decides_on_the_decoder(length, kind):
    assert type(proxai.body_decoder(length)) is kind


def raw_deflate(data: bytes) -> bytes:
    """Deflate data without the zlib wrapper."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return machine.compress(data) + machine.flush()


def inflated(coding: bytes, pieces: list[bytes]) -> bytes:
    """What a compressed body in these pieces unpacks to."""
    machine = proxai.Inflater(coding)
    out = b"".join([machine.feed(p) for p in pieces])
    machine.close()
    return out


PLAIN_BODY = json.dumps([{"id": i, "text": "The quick brown fox \u00e4\u4e2d" * (i % 3)}
                         for i in range(60)]).encode()
COMPRESSED_BODIES: list[tuple[str, bytes, bytes]] = [
    ("gzip", b"gzip", gzip.compress(PLAIN_BODY, mtime=0)),
    ("x-gzip", b"x-gzip", gzip.compress(PLAIN_BODY, mtime=0)),
    ("gzip, stored", b"gzip", gzip.compress(PLAIN_BODY, 0, mtime=0)),
    ("gzip with a file name", b"gzip",
     b"\x1f\x8b\x08\x08" + bytes(5) + b"\xffname.json\0" + gzip.compress(PLAIN_BODY, mtime=0)[10:]),
    ("deflate with the zlib wrapper", b"deflate", zlib.compress(PLAIN_BODY)),
    ("deflate, fast", b"deflate", zlib.compress(PLAIN_BODY, 1)),
    ("deflate without a wrapper", b"deflate", raw_deflate(PLAIN_BODY)),
]
each_compressed = pytest.mark.parametrize("coding, data", [c[1:] for c in COMPRESSED_BODIES],
                                          ids=[c[0] for c in COMPRESSED_BODIES])


@each_compressed
def test_compressed_bodies_unpack_at_any_split(coding, data):
    assert inflated(coding, [data]) == PLAIN_BODY
    assert inflated(coding, bytewise(data)) == PLAIN_BODY
    assert inflated(coding, [b"", *bytewise(data[:12]), b"", data[12:]]) == PLAIN_BODY
    for pieces in list(two_pieces(data))[::17]:
        assert inflated(coding, pieces) == PLAIN_BODY


@each_compressed
def test_compressed_bodies_that_are_cut_short_are_refused(coding, data):
    for i in [*range(12), *range(12, len(data), 13), len(data) - 1]:
        framing_refusal(inflated, coding, [data[:i]])


@pytest.mark.parametrize("coding, data", [
    (b"gzip", b"{}"), (b"gzip", b"<html></html>"), (b"deflate", b"\xff\xff\xff"), (b"deflate", b"{}hello"),
    (b"gzip", gzip.compress(PLAIN_BODY, mtime=0)[:-8] + bytes(8)),
    (b"deflate", zlib.compress(PLAIN_BODY)[:-4] + bytes(4)),
    (b"gzip", b"\x1f\x8b\x09" + gzip.compress(PLAIN_BODY, mtime=0)[3:]),
], ids=["gzip that is JSON", "gzip that is HTML", "deflate that is noise", "deflate that is JSON",
        "wrong CRC", "wrong checksum", "unknown method"])
def test_damaged_compressed_bodies_are_refused(coding, data):
    framing_refusal(inflated, coding, [data])
    framing_refusal(inflated, coding, bytewise(data))


def test_mutated_compressed_bodies_are_unpacked_or_refused():
    dice = random.Random(10)
    for _ in range(1500):
        _, coding, data = dice.choice(COMPRESSED_BODIES)
        with contextlib.suppress(FramingError):
            inflated(coding, random_pieces(dice, mutated_bytes(dice, data)))


@pytest.mark.parametrize("coding, pack", [(b"gzip", gzip.compress), (b"deflate", zlib.compress),
                                          (b"deflate", raw_deflate)])
def test_a_bomb_is_refused_and_what_may_come_of_little_is_bounded(coding, pack):
    bomb = pack(bytes(24 << 20))
    for size in (len(bomb), 1000):
        machine, out = proxai.Inflater(coding), 0
        with pytest.raises(FramingError):
            for at in range(0, len(bomb), size):
                out += len(machine.feed(bomb[at:at + size]))
        assert out <= proxai.INFLATE_FREE_BYTES + proxai.INFLATE_RATIO * len(bomb)


@pytest.mark.parametrize("coding, pack", [(b"gzip", gzip.compress), (b"deflate", zlib.compress),
                                          (b"deflate", raw_deflate)])
def test_what_compresses_well_but_is_small_is_no_bomb(coding, pack):
    small = bytes(proxai.INFLATE_FREE_BYTES)
    packed = pack(small)
    assert inflated(coding, [packed]) == small
    assert inflated(coding, bytewise(packed)) == small


@pytest.mark.parametrize("pieces", [
    [gzip.compress(b"one") + gzip.compress(b"two") + gzip.compress(b"")],
    [gzip.compress(b"one"), gzip.compress(b"two")],
    bytewise(gzip.compress(b"one") + gzip.compress(b"two")),
], ids=["whole", "one by one", "bytewise"])
def test_a_gzip_body_of_several_members_is_all_of_them(pieces):
    assert inflated(b"gzip", pieces) == b"onetwo"  # RFC 1952 2.2


@pytest.mark.parametrize("more", [b"x", b"{}", b"\x1f\x8b", gzip.compress(b"two")[:-1]],
                         ids=["a byte", "JSON", "half a header", "a cut member"])
def test_bytes_behind_the_end_of_a_gzip_body_are_refused(more):
    framing_refusal(inflated, b"gzip", [gzip.compress(b"one") + more])
    framing_refusal(inflated, b"gzip", [gzip.compress(b"one"), more])


@pytest.mark.parametrize("pack", [zlib.compress, raw_deflate], ids=["zlib", "raw"])
def test_bytes_behind_the_end_of_a_deflate_body_are_refused(pack):
    framing_refusal(inflated, b"deflate", [pack(b"one") + b"x"])
    framing_refusal(inflated, b"deflate", [pack(b"one"), pack(b"two")])



# ============================================================================
#  7  Event streams
# ============================================================================

Event, EventSplitter = proxai.Event, proxai.EventSplitter
NO_LIMIT = 1 << 20


def events_in(block: bytes) -> list[tuple[str, str]]:
    """The events of a block of whole ones."""
    return [tuple(e) for e in map(proxai.parse_event, proxai.split_events(block)) if e]


def through_splitter(pieces: list[bytes], limit: int = NO_LIMIT) -> list[tuple[str, str]]:
    """The events of a stream that comes in pieces; that no byte is lost is checked on the way."""
    splitter, out, found = EventSplitter(limit), [], []
    for piece in pieces:
        block = splitter.feed(piece)
        out.append(block)
        found += events_in(block[splitter.whole_from:])
    out.append(splitter.close())
    assert b"".join(out) == b"".join(pieces)
    return found


def by_the_standard(data: bytes) -> list[tuple[str, str]]:
    """The events of a whole stream as the WHATWG says, but for those of empty data, which are none here."""
    found, name, text = [], "", ""
    lines = re.split("\r\n|\n|\r", data.decode("utf-8", "replace").removeprefix("\ufeff"))
    for line in lines[:-1]:  # what has no line end is no line yet
        if not line:
            if text[:-1]:
                found.append((name or "message", text[:-1]))
            name, text = "", ""
        elif line[0] != ":":
            field, _, value = line.partition(":")
            value = value[1:] if value[:1] == " " else value
            if field == "data":
                text += value + "\n"
            elif field == "event":
                name = value
    return found


EVENT_STREAMS: list[tuple[str, list[str], list[tuple[str, str]]]] = [
    ("two events", ["data: one", "", "event: two", "data: 2", ""], [("message", "one"), ("two", "2")]),
    ("several data lines", ["data: a", "data:", "data", "data:  b", ""], [("message", "a\n\n\n b")]),
    ("one blank goes, the others stay", ["data:a", "", "data:  a ", "", "data:\ta", ""],
     [("message", "a"), ("message", " a "), ("message", "\ta")]),
    ("comments", [":", ": c", "data: a", ":data: no", "", ": only", "", "data: b", ""],
     [("message", "a"), ("message", "b")]),
    ("retry and id", ["retry: 10", "", "id: 7", "data: a", "", "id", "retry: x", ""], [("message", "a")]),
    ("the last event name counts", ["event: a", "event: b", "data: x", "", "event: c", "event:", "data: y",
                                    ""],
     [("b", "x"), ("message", "y")]),
    ("the name is forgotten behind an event without data", ["event: a", "", "data: x", ""],
     [("message", "x")]),
    ("no data", ["event: ping", "", "data", "", "data:", "", "data: ", "", "", ""], []),
    ("unknown fields", ["foo: bar", "Data: no", " data: no", "data : no", "datas: no", "data: x", "x", ""],
     [("message", "x")]),
    ("colons in the data", ["data: a: b", "data::c", "event: x:y", ""], [("x:y", "a: b\n:c")]),
    ("many blank lines", ["", "", "data: x", "", "", "", "data: y", "", ""],
     [("message", "x"), ("message", "y")]),
    ("separators that are no line ends", ["data: a\u2028b\x85c\x0bd\x0ce\x1cf", ""],
     [("message", "a\u2028b\x85c\x0bd\x0ce\x1cf")]),
    ("code points of every length", ["data: \u00e4\u4e2d\U0001f600", "event: \u00e9", ""],
     [("\u00e9", "\u00e4\u4e2d\U0001f600")]),
    ("a mark inside is data", ["data: \ufeffx\ufeff", ""], [("message", "\ufeffx\ufeff")]),
    ("an unfinished event is none", ["data: x", "", "data: y", "event: z"], [("message", "x")]),
    ("done", ['data: {"a":1}', "", "data: [DONE]", ""], [("message", '{"a":1}'), ("message", "[DONE]")]),
    ("nothing", [], []),
    ("only line ends", ["", "", ""], []),
]
LINE_ENDS: dict[str, list[bytes]] = {"LF": [b"\n"], "CRLF": [b"\r\n"], "CR": [b"\r"],
                                     "LF CRLF": [b"\n", b"\r\n"], "CRLF CR LF": [b"\r\n", b"\r", b"\n"],
                                     "CR CRLF LF": [b"\r", b"\r\n", b"\n"]}


def stream_bytes(lines: list[str], ends: list[bytes]) -> bytes:
    """Lines with their ends in turn; a CR that an LF would make one end of is written CRLF."""
    out = b""
    for line, end in zip(lines, itertools.cycle(ends), strict=False):
        if not line and end == b"\n" and out.endswith(b"\r"):
            out = out[:-1] + b"\r\n"
        out += line.encode() + end
    return out


@pytest.mark.parametrize("ends", LINE_ENDS.values(), ids=LINE_ENDS)
@pytest.mark.parametrize("lines, expected", [c[1:] for c in EVENT_STREAMS], ids=[c[0] for c in EVENT_STREAMS])
def test_events_are_the_same_with_every_line_ending_and_every_split(lines, expected, ends):
    for mark in (b"", b"\xef\xbb\xbf"):
        data = mark + stream_bytes(lines, ends)
        assert by_the_standard(data) == expected, "the table is wrong"
        assert through_splitter([data]) == expected
        assert through_splitter(bytewise(data)) == expected
        for pieces in two_pieces(data):
            assert through_splitter(pieces) == expected, pieces


@pytest.mark.parametrize("ends", LINE_ENDS.values(), ids=LINE_ENDS)
def test_events_are_the_same_in_any_three_pieces(ends):
    data = stream_bytes(["data: \u00e4", "", "", "event: e", "data: 1", "data: 2", "", ": c", ""], ends)
    for i, j in itertools.combinations(range(len(data) + 1), 2):
        pieces = [data[:i], data[i:j], data[j:]]
        assert through_splitter(pieces) == [("message", "\u00e4"), ("e", "1\n2")], pieces


@pytest.mark.parametrize("data, expected", [
    (b"data: a\xffb\n\n", "a\ufffdb"),
    (b"data: \xe2\n\n", "\ufffd"),  # a character that the line end cuts off
    (b"data: \xf0\x9f\x98\ndata: \x80\n\n", "\ufffd\n\ufffd"),
    (b"data: \xed\xa0\x80\n\n", "\ufffd\ufffd\ufffd"),  # half of a surrogate pair
    (b"data: \xc0\xafx\n\n", "\ufffd\ufffdx"),
    (b"data: a\0b\n\n", "a\0b"),
])
def test_invalid_utf_8_is_replaced_and_never_fatal(data, expected):
    for pieces in ([data], bytewise(data), *two_pieces(data)):
        assert through_splitter(pieces) == [("message", expected)], pieces


def test_only_the_first_of_two_byte_order_marks_is_skipped():
    assert events_in(b"\xef\xbb\xbf\xef\xbb\xbfdata: x\n\ndata: y\n\n") == [("message", "y")]


@pytest.mark.parametrize("data", [b"data: x\n\n", b"data: x\r\r", b"data: x\r\n\r\n", b"data: x\n\r",
                                  b"data: x\r\n\r", b"data: x\n\r\n", b": ping\n\n", b"\n\n"])
def test_an_event_is_handed_on_with_its_last_byte(data):
    splitter = EventSplitter(NO_LIMIT)
    assert splitter.feed(data[:-1]) + splitter.feed(data[-1:]) == data
    assert splitter.close() == b""


def test_an_unfinished_event_waits_and_comes_out_at_the_end():
    splitter = EventSplitter(NO_LIMIT)
    assert splitter.feed(b"data: x\n\ndata: y\r") == b"data: x\n\n"
    assert splitter.feed(b"\nevent: z\r\n") == b""
    assert splitter.close() == b"data: y\r\nevent: z\r\n"
    assert splitter.close() == b""


def test_random_streams_are_read_as_the_standard_says_at_any_split():
    dice = random.Random(11)
    bits = [b"\r", b"\n", b"\r\n", b"\n\n", b"data", b"data: a", b"data:b\r\n", b"data: c\n", b"data:d\r",
            b"event: e", b"event", b":", b" ", b"x", b"id: 1", b"\xc3", b"\xa9"]
    found = 0
    for _ in range(3000):
        data = b"".join(dice.choices(bits, k=dice.randrange(1, 20)))
        expected = by_the_standard(data)
        found += len(expected)
        for pieces in ([data], bytewise(data), random_pieces(dice, data)):
            assert through_splitter(pieces) == expected, (data, pieces)
    assert found > 1000


def test_random_streams_above_the_limit_lose_events_but_never_change_them():
    dice = random.Random(13)
    bits = [b"\r", b"\n", b"\r\n", b"\n\n", b"data: a", b"data:bb\r\n", b"data: c\n", b"data:d\r",
            b"event: e", b"x" * 9]
    found = 0
    for _ in range(3000):
        data = b"".join(dice.choices(bits, k=dice.randrange(1, 20)))
        expected = by_the_standard(data)
        for pieces in (bytewise(data), random_pieces(dice, data)):
            left = iter(expected)
            for event in through_splitter(pieces, dice.choice((3, 8, 14, 30))):
                found += 1
                assert event in left, (data, pieces, event)
    assert found > 500


def test_the_events_with_a_marker_are_found_in_random_blocks():
    dice = random.Random(12)
    bits = [b"\n", b"\n\n", b"data: a", b"data: x1", b"x2", b"\ndata: b x1x2\n\n", b"data: c\n\n",
            b"event: x2\ndata: y\n\n"]
    found = 0
    for ends in (b"\n", b"\r\n", b"\r"):
        for _ in range(600):
            block = b"".join(dice.choices(bits, k=dice.randrange(8))).replace(b"\n", ends) + ends * 2
            spans = proxai.marked_spans(block, (b"x1", b"x2"))
            marked = [e for f in proxai.split_events(block) if b"x1" in f or b"x2" in f for e in events_in(f)]
            assert [e for start, end in spans for e in events_in(block[start:end])] == marked, block
            assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), block
            found += len(marked)
    assert found > 1000


def test_the_blocks_of_a_split_stream_hold_single_events_in_order():
    block = b"data: a\n\nevent: b\r\ndata: c\r\n\r\n: d\n\n"
    frames = proxai.split_events(block)
    assert frames == [b"data: a\n\n", b"event: b\r\ndata: c\r\n\r\n", b": d\n\n"]
    assert proxai.split_events(b"data: a\n\ndata: b\n\n") == [b"data: a\n\n", b"data: b\n\n"]
    assert proxai.split_events(b"") == []


def test_an_event_of_a_megabyte_in_small_pieces_comes_out_whole():
    data = b"data: " + b"x" * (1 << 20) + b"\n\n"
    pieces = [data[i:i + 1024] for i in range(0, len(data), 1024)]
    assert through_splitter(pieces, 2 << 20) == [("message", "x" * (1 << 20))]


def test_an_event_that_comes_byte_by_byte_comes_out_whole():
    data = b"data: " + b"\r\ndata: ".join([b"y" * 90] * 500) + b"\r\n\r\n"
    assert through_splitter(bytewise(data)) == [("message", "\n".join(["y" * 90] * 500))]


def test_an_event_of_the_limit_is_no_oversize():
    data = b"data: " + b"x" * 56 + b"\n\n"
    assert through_splitter(bytewise(data), len(data)) == [("message", "x" * 56)]


@pytest.mark.parametrize("size", [1, 7, 50, 63, 64, 65, 100], ids=str)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_event_above_the_limit_is_handed_on_in_pieces_and_the_next_ones_are_read(size, end):
    small, after = b"data: s" + end * 2, b"event: e" + end + b"data: after" + end * 2
    big = b"data: " + b"x" * 2000 + end * 2
    data = small + big + after
    splitter, held, out = EventSplitter(64), 0, b""
    flags = set()
    for at in range(0, len(data), size):
        piece = data[at:at + size]
        block = splitter.feed(piece)
        out += block
        held = max(held, at + len(piece) - len(out))
        if len(small) + 200 < at < len(small) + 1900:
            flags.add(splitter.oversize)
    assert out + splitter.close() == data
    assert held <= 64 + size, "more is held back than the limit allows"
    assert flags == {True}
    pieces = [data[i:i + size] for i in range(0, len(data), size)]
    assert through_splitter(pieces, 64) == [("message", "s"), ("e", "after")]


def test_no_line_of_an_event_above_the_limit_is_taken_for_an_event():
    """Its end comes out together with what follows; a line in it must not pass for an event of its own."""
    big = b"data: " + b"x" * 100 + b"\n"
    for pieces in ([big, b"data: [DONE]\n\n", b"data: after\n\n"], [big, b"data: [DONE]\n\ndata: after\n\n"],
                   [big[:-1], b"\ndata: [DONE]\n", b"\ndata: after\n\n"],
                   [big, b"event: x\ndata: [DONE]\n\ndata: after\n\n"]):
        assert through_splitter(pieces, 64) == [("message", "after")], pieces


def test_an_endless_event_of_line_ends_that_are_no_blank_line_keeps_its_bytes():
    data = b"data: x\r\n" * 100 + b"\r\ndata: y\r\n\r\n"
    for size in (1, 2, 3, 10):
        through_splitter([data[i:i + size] for i in range(0, len(data), size)], 20)


@pytest.mark.parametrize("name, data, expected", [
    (None, b"[DONE]", b"data: [DONE]\n\n"), ("ping", b"{}", b"event: ping\ndata: {}\n\n"),
    ("", b"{}", b"data: {}\n\n"),
    ("\u00e9", "\u4e2d".encode(), b"event: \xc3\xa9\ndata: \xe4\xb8\xad\n\n"),
])
def test_an_event_is_written_and_reads_back(name, data, expected):
    assert proxai.format_event(name, data) == expected
    assert proxai.parse_event(expected) == Event(name or "message", data.decode())



# ============================================================================
#  8  Providers
# ============================================================================

for_each_protocol = pytest.mark.parametrize("protocol", [RESPONSES, CHAT, MESSAGES], ids=lambda p: p.word)


def read_body(protocol: proxai.Protocol, raw: bytes | str) -> Any:
    """A request body as accepted."""
    return proxai.read_model_request(protocol, raw.encode() if isinstance(raw, str) else raw)


def refused_body(protocol: proxai.Protocol, raw: bytes | str) -> proxai.RequestError:
    """The error that a request body is refused with."""
    with pytest.raises(proxai.RequestError) as caught:
        read_body(protocol, raw)
    assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


def passed_on(protocol: proxai.Protocol, raw: bytes | str, model: str | None = None) -> bytes:
    """What a provider of the same protocol gets for a body, with the model as it is or as a route has it."""
    request = read_body(protocol, raw)
    return proxai.pass_through_body(protocol, request, request.model if model is None else model)


# -- what the client asked for -----------------------------------------------

NO_JSON_OBJECTS = [
    b"", b" ", b"x", b"{", b"{}}", b'{"model":"m"', b'{"model":"m"} x', b'{"model":"m"}{}', b'{"model":"m",}',
    b"{'model':'m'}", b'\xef\xbb\xbf{"model":"m","messages":[],"input":[]}',
    '{"model":"m","messages":[],"input":[]}'.encode("utf-16"),
    '{"model":"m","messages":[],"input":[]}'.encode("utf-16-le"),
    '{"model":"m","messages":[],"input":[]}'.encode("utf-32"), b'{"model":"m\xff","messages":[],"input":[]}',
    b'{"model":"m","messages":[],"input":[],"x":"\xed\xa0\x80"}',
    b'{"model":"m","messages":[],"input":[],"x":NaN}', b'{"model":"m","messages":[],"input":[],"x":Infinity}',
    b'{"model":"m","messages":[],"input":[],"x":-Infinity}', b'{"model":"m","messages":[],"input":[],"x":01}',
    b'{"model":"m","messages":[],"input":[],"x":"a\nb"}',
    b'{"model":"m","messages":[],"input":[],"x":"\\x41"}',
    b'{"model":"m","messages":[],"input":[],"x":/**/1}', b'{"model":"m","messages":[],"input":[],"x":.5}',
    b'{"model":"m","messages":[],"input":[]}\0', b"\0",
    gzip.compress(b'{"model":"m","messages":[],"input":[]}'),
    b'{"model":"m","messages":' + b"[" * 200_000 + b"]" * 200_000 + b',"input":[]}', b"[" * 200_000,
    b"[]", b'[{"model":"m"}]', b"null", b"true", b"1", b'"model"',
]


@for_each_protocol
@pytest.mark.parametrize("raw", NO_JSON_OBJECTS, ids=[repr(raw[:44]) for raw in NO_JSON_OBJECTS])
def test_a_body_that_is_no_json_object_is_refused(protocol, raw):
    message = refused_body(protocol, raw).message
    assert "JSON" in message and "`model`" in message and protocol.title in message


@for_each_protocol
@pytest.mark.parametrize("member", ["", '"model":null,', '"model":"",', '"model":" \\t\\n",',
                                    '"model":"\\u3000",', '"model":1,', '"model":true,', '"model":["m"],',
                                    '"model":{"id":"m"},', '"Model":"m",', '"model ":"m",'])
def test_a_body_without_a_model_is_refused(protocol, member):
    error = refused_body(protocol, f'{{{member}"messages":[],"input":[]}}')
    assert protocol.title in error.message and "non-empty" in error.message and "`model`" in error.message
    assert error.param == "model"


@for_each_protocol
@pytest.mark.parametrize("body", [
    '{"model":"a","model":"b",%s}', '{"model":"a",%s,"model":"a"}', '{"model":"a","\\u006dodel":"b",%s}',
    '{"\\u006Dodel":"a","mod\\u0065l":"b",%s}', '{"model":"a","mode\\u006C":"b",%s}',
    '{ "model" : "a" , %s , "model"\n:\t"b" }', '{"model":null,%s,"model":"b"}',
    '{"model":{"model":"x"},"model":"b",%s}',
])
def test_a_body_with_two_models_is_refused(protocol, body):
    error = refused_body(protocol, body % '"messages":[],"input":[]')
    assert "`model`" in error.message and error.param == "model"


@for_each_protocol
@pytest.mark.parametrize("body", [
    '{"model":"a",%s,"metadata":{"model":"b"}}',
    '{"metadata":{"model":"b","x":[{"model":"c"}]},%s,"model":"a"}', '{"x":"model",%s,"model":"a"}',
    '{"x":"\\"model\\":",%s,"model":"a"}', '{"\\u006dodel":"a",%s}', '{"models":1,"model":"a",%s}',
    '{"model":"a",%s,"x":["model","model"],"y":"\\u006d"}', '\r\n\t {"model":"a",%s} \n',
])
def test_one_model_is_enough_wherever_else_the_word_stands(protocol, body):
    raw = body % '"messages":[],"input":[]'
    assert read_body(protocol, raw).model == "a"
    assert passed_on(protocol, raw) == raw.encode()


@for_each_protocol
@pytest.mark.parametrize("model", ['"\\ud800"', '"a\\udfffb"', '"\\ude00\\ud83d"',
                                   '"%s"' % ("m" * (proxai.MODEL_CHARS + 1))],
                         ids=["high half", "low half", "wrong order", "too long"])
def test_a_model_that_can_be_no_name_is_refused(protocol, model):
    assert refused_body(protocol, f'{{"model":{model},"messages":[],"input":[]}}').param == "model"


@for_each_protocol
@pytest.mark.parametrize("model", ["m", "a/b:c@d+e", "\u6a21\U0001f600", "m" * proxai.MODEL_CHARS, '"\\'],
                         ids=["short", "signs", "not ASCII", "long", "quote"])
def test_any_other_model_is_taken(protocol, model):
    raw = json.dumps({"model": model, "messages": [], "input": []})
    assert read_body(protocol, raw).model == model
    assert passed_on(protocol, raw) == raw.encode()


@pytest.mark.parametrize("protocol, raw, member", [
    *((protocol, f'{{"model":"m"{wrong}}}', "messages") for protocol in (CHAT, MESSAGES) for wrong in (
        "", ',"messages":null', ',"messages":"hi"', ',"messages":{}', ',"messages":1', ',"messages":true',
        ',"input":"hi"')),
    *((RESPONSES, f'{{"model":"m","input":{wrong}}}', "input") for wrong in ("{}", "1", "true", "0.5")),
])
def test_messages_or_input_of_the_wrong_type_are_refused_by_name(protocol, raw, member):
    error = refused_body(protocol, raw)
    assert f"`{member}`" in error.message and protocol.title in error.message and error.param == member


VENDOR_INPUT: list[tuple[str, proxai.Protocol, str]] = [
    ("chat: minimal", CHAT, '{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'),
    ("chat: no messages", CHAT, '{"model":"m","messages":[]}'),
    ("chat: modalities", CHAT,
     '{"model":"m","messages":[],"modalities":["text","audio"],"audio":{"voice":"alloy","format":"wav"}}'),
    ("chat: prediction", CHAT,
     '{"model":"m","messages":[],"prediction":{"type":"content","content":[{"type":"text","text":"x"}]}}'),
    ("chat: custom tools", CHAT,
     '{"model":"m","messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"custom",'
     '"custom":{"name":"n","input":"i"}}]}],"tools":[{"type":"custom",'
     '"custom":{"name":"n","format":{"type":"grammar","grammar":'
     '{"syntax":"lark","definition":"x"}}}}]}'),
    ("chat: allowed tools", CHAT,
     '{"model":"m","messages":[],"tool_choice":{"type":"allowed_tools","allowed_tools":{"mode":"auto",'
     '"tools":[{"type":"function","function":{"name":"f"}}]}}}'),
    ("chat: new efforts and roles", CHAT,
     '{"model":"m","messages":[{"role":"critic","content":{"new":1}},7],"reasoning_effort":"max"}'),
    ("chat: odd numbers", CHAT,
     '{"model":"m","messages":[],"max_tokens":99999999999999999999,"temperature":1e-400,"n":-0,"x":1.0E+2}'),
    ("messages: minimal", MESSAGES,
     '{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}'),
    ("messages: no max_tokens", MESSAGES, '{"model":"m","messages":[]}'),
    ("messages: tool without type", MESSAGES,
     '{"model":"m","max_tokens":5,"messages":[],"tools":[{"name":"f","input_schema":{}}]}'),
    ("messages: newer server tool", MESSAGES,
     '{"model":"m","max_tokens":5,"messages":[],"tools":[{"type":"computer_20991231",'
     '"name":"c","allowed_callers":["code_execution_20991231"]}]}'),
    ("messages: tool results in the history", MESSAGES,
     '{"model":"m","max_tokens":5,"messages":[{"role":"assistant","content":['
     '{"type":"web_search_tool_result","tool_use_id":"t","content":[]},'
     '{"type":"bash_code_execution_tool_result","tool_use_id":"u",'
     '"content":{"type":"bash_code_execution_result"}},{"type":"fallback"}]}]}'),
    ("messages: thinking", MESSAGES,
     '{"model":"m","max_tokens":5,"messages":[],"thinking":{"type":"enabled","budget_tokens":1024},'
     '"context_management":{"edits":[]},'
     '"system":[{"type":"text","text":"s","cache_control":{"type":"ephemeral","ttl":"1h"}}]}'),
    ("responses: text", RESPONSES, '{"model":"m","input":"plain text"}'),
    ("responses: no input", RESPONSES, '{"model":"m","prompt":{"id":"p","variables":{"a":"b"}}}'),
    ("responses: null input", RESPONSES, '{"model":"m","input":null,"previous_response_id":"r"}'),
    ("responses: items", RESPONSES,
     '{"model":"m","input":[{"role":"developer","content":"d"},{"type":"function_call","call_id":"c",'
     '"name":"f","arguments":"{}"},{"type":"reasoning","id":"r","summary":[],"encrypted_content":"px"},'
     '{"type":"new"},"s",null,1,[]]}'),
    ("responses: image without detail", RESPONSES,
     '{"model":"m","input":[{"role":"user","content":[{"type":"input_image",'
     '"image_url":"u"}]}]}'),
]


@pytest.mark.parametrize("protocol, raw", [c[1:] for c in VENDOR_INPUT], ids=[c[0] for c in VENDOR_INPUT])
def test_valid_vendor_input_passes_with_every_byte(protocol, raw):
    assert passed_on(protocol, raw) == raw.encode()
    spaced = "\n " + raw.replace(":", " :\t ").replace(",", "\r\n, ") + "\n\n"
    assert passed_on(protocol, spaced) == spaced.encode()


@pytest.mark.parametrize("raw, model, expected", [
    ('{"model":"a","messages":[]}', "b", '{"model":"b","messages":[]}'),
    ('{"messages":[],"model":"a"}', "b", '{"messages":[],"model":"b"}'),
    (' {\n\t"messages" : [ {"model" : "a"} ] ,\r\n "model"\t:\n "a"  } \n', "b",
     ' {\n\t"messages" : [ {"model" : "a"} ] ,\r\n "model"\t:\n "b"  } \n'),
    ('{"\\u006dod\\u0065l":"a","messages":[]}', "b", '{"\\u006dod\\u0065l":"b","messages":[]}'),
    ('{"x":"\\"model\\":\\"a\\"","model":"a","messages":["model","a"]}', "b",
     '{"x":"\\"model\\":\\"a\\"","model":"b","messages":["model","a"]}'),
    ('{"\u00e4\U0001f600":"\u4e2d","model":"\u6a21","messages":[]}', "b",
     '{"\u00e4\U0001f600":"\u4e2d","model":"b","messages":[]}'),
    ('{"model":"a","messages":[]}', 'q"\\\u00e9\n', '{"model":"q\\"\\\\\u00e9\\n","messages":[]}'),
    ('{"model":"a","messages":[],"n":1.0,"m":1E+2,"o":12345678901234567890123,"p":-0,"q":1e-400,"r":0.10}',
     "b",
     '{"model":"b","messages":[],"n":1.0,"m":1E+2,"o":12345678901234567890123,"p":-0,"q":1e-400,"r":0.10}'),
    ('{"model":"a","k":1,"k":2,"messages":[],"s":"\\ud83d\\/\\u00e9"}', "b",
     '{"model":"b","k":1,"k":2,"messages":[],"s":"\\ud83d\\/\\u00e9"}'),
    # the same model in other letters: nothing to write
    ('{"model":"g\\u0070t","messages":[]}', "gpt", '{"model":"g\\u0070t","messages":[]}'),
    ('{"model":"a","messages":[]}', "a.b", '{"model":"a.b","messages":[]}'),
    ('{"model":"long-name-of-a-model","messages":[],"":{"":[{"model":{"model":[]}}]}}', "s",
     '{"model":"s","messages":[],"":{"":[{"model":{"model":[]}}]}}'),
])
def test_a_rewritten_model_changes_its_own_bytes_only(raw, model, expected):
    assert passed_on(CHAT, raw, model) == expected.encode()
    assert passed_on(MESSAGES, raw, model) == expected.encode()
    raw, expected = (text.replace('"messages"', '"input"') for text in (raw, expected))
    assert passed_on(RESPONSES, raw, model) == expected.encode()


def test_a_responses_model_is_routed_and_sent_without_blanks_around_it():
    assert read_body(RESPONSES, '{"model":" gpt\\t","input":"x"}').model == "gpt"
    assert passed_on(RESPONSES, '{"model":" gpt\\t","input":"x"}') == b'{"model":"gpt","input":"x"}'


def strict_json(raw: bytes) -> Any:
    """A JSON value, without the constants that only Python reads."""
    return json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def user_item(text: str) -> dict[str, str]:
    """A user item."""
    return {"role": "user", "content": text}


SYSTEM_ITEMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a string", {"model": "m1", "input": [{"role": "system", "content": "Rule A"}, user_item("hi")]},
     {"model": "m1", "instructions": "Rule A", "input": [user_item("hi")]}),
    ("parts, instructions, a second item",
     {"model": "m1", "instructions": "Base", "input": [
         {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "A1"},
                                                           {"type": "text", "text": "A2"}]},
         user_item("q"), {"role": "system", "content": "B"}]},
     {"model": "m1", "instructions": "A1\nA2\n\nB\n\nBase", "input": [user_item("q")]}),
    ("blank instructions",
     {"model": "m1", "instructions": "  ", "input": [{"role": "system", "content": "X"}]},
     {"model": "m1", "instructions": "X", "input": []}),
    ("no text at all",
     {"model": "m1", "input": [{"role": "system", "content": [{"type": "input_image", "image_url": "u"}]},
                               {"role": "developer", "content": "d"}]},
     {"model": "m1", "input": [{"role": "developer", "content": "d"}]}),
    ("no text leaves the instructions",
     {"model": "m", "instructions": " I ", "input": [{"role": "system", "content": ""}]},
     {"model": "m", "instructions": " I ", "input": []}),
    ("no text leaves odd instructions",
     {"model": "m", "instructions": 7, "input": [{"role": "system"}, {"role": "system", "content": {}}]},
     {"model": "m", "instructions": 7, "input": []}),
    ("null instructions", {"model": "m", "instructions": None, "input": [{"role": "system", "content": "X"}]},
     {"model": "m", "instructions": "X", "input": []}),
    ("odd instructions", {"model": "m", "instructions": [{"x": 1}],
                          "input": [{"role": "system", "content": "X"}]},
     {"model": "m", "instructions": "X", "input": []}),
    ("instructions keep their blanks",
     {"model": "m", "instructions": " I\n", "input": [{"role": "system", "content": " X "}]},
     {"model": "m", "instructions": " X \n\n I\n", "input": []}),
    ("any type of item", {"model": "m", "input": [{"type": "reasoning", "role": "system", "content": "X"},
                                                  user_item("q")]},
     {"model": "m", "instructions": "X", "input": [user_item("q")]}),
    ("parts of other types and shapes",
     {"model": "m", "input": [{"role": "system", "content": [
         {"type": "output_text", "text": "no"}, {"type": "text", "text": "a"}, {"type": "text", "text": 1},
         "no", None, {"type": "Text", "text": "no"}, {"text": "no"}, {"type": "input_text"},
         {"type": "input_text", "text": "b"}]}]},
     {"model": "m", "instructions": "a\nb", "input": []}),
    ("other roles keep their order", {"model": "m", "input": [
        user_item("1"), {"role": "system", "content": "X"}, {"role": "assistant", "content": "2"},
        {"type": "new", "z": [1, {}]}, "s", user_item("3")]},
     {"model": "m", "instructions": "X", "input": [user_item("1"), {"role": "assistant", "content": "2"},
                                                   {"type": "new", "z": [1, {}]}, "s", user_item("3")]}),
    ("all other fields",
     {"stream": True, "model": "m",
      "tools": [{"type": "function", "name": "f", "parameters": {"a": [1.5, None]}}],
      "input": [{"role": "system", "content": "\u00e4\U0001f600\ud83d"}],
      "prompt_cache_key": "k", "big": 2 ** 70},
     {"stream": True, "model": "m",
      "tools": [{"type": "function", "name": "f", "parameters": {"a": [1.5, None]}}],
      "input": [], "prompt_cache_key": "k", "big": 2 ** 70, "instructions": "\u00e4\U0001f600\ud83d"}),
]


@pytest.mark.parametrize("before, after", [c[1:] for c in SYSTEM_ITEMS], ids=[c[0] for c in SYSTEM_ITEMS])
def test_system_items_are_lifted_into_instructions_by_the_table(before, after):
    raw = json.dumps(before)
    assert strict_json(passed_on(RESPONSES, raw)) == after
    assert strict_json(passed_on(RESPONSES, raw, "other")) == {**after, "model": "other"}
    assert read_body(RESPONSES, raw).body == before, "the request as read must not change"


@pytest.mark.parametrize("raw", [
    '{"model":"m1","input":"plain text"}',
    '{ "model":"m1" ,"input":[{"role":"System","content":"s"}]}',
    '{ "model":"m1" ,"input":[{"role":["system"],"content":"s"},{"role":"system "},{"Role":"system"},'
    '["system"],"system"]}',
    '{ "model":"m1" ,"input":[{"role":"developer","content":"s"}],"instructions":"x"}',
    '{ "model":"m1" ,"input":[] , "metadata":{"input":[{"role":"system","content":"s"}]}}',
    '{ "model":"m1" ,"input":[{"role":"user","content":[],"input":[{"role":"system","content":"s"}]}]}',
    '{ "model":"m1" ,"tools":[{"input":[{"role":"system","content":"s"}]}],"input":"x"}',
    '{ "model":"m1" ,"messages":[{"role":"system","content":"s"}]}',
])
def test_a_responses_body_without_system_items_in_its_input_keeps_every_byte(raw):
    assert passed_on(RESPONSES, raw) == raw.encode()


@pytest.mark.parametrize("protocol", [CHAT, MESSAGES], ids=lambda p: p.word)
def test_system_items_are_lifted_for_responses_only(protocol):
    item = '[{"role":"system","content":"s"}]'
    raw = f'{{"model":"m", "messages":{item}, "input":{item}}}'.encode()
    assert passed_on(protocol, raw) == raw


def test_numbers_beyond_a_float_are_refused_or_stay_json_when_system_items_are_lifted():
    raw = '{"model":"m","input":[{"role":"system","content":"s"}],"temperature":1e999,"x":[-1e999]}'
    with contextlib.suppress(proxai.RequestError):
        strict_json(passed_on(RESPONSES, raw))


def test_a_body_is_passed_on_or_refused_however_deep_it_is():
    def nested(depth: int) -> bytes:
        start = b'{"model":"m","input":[{"role":"system","content":"s"}],"x":'
        return start + b"[" * depth + b"]" * depth + b"}"

    low, high = 1, 400_000  # accepted and refused
    while high - low > 1:
        middle = (low + high) // 2
        try:
            read_body(RESPONSES, nested(middle))
            low = middle
        except proxai.RequestError:
            high = middle
    assert low > 100
    for depth in range(low - 12, low + 1):
        with contextlib.suppress(proxai.RequestError):
            assert b"[" * depth + b"]" * depth in passed_on(RESPONSES, nested(depth), "other")
    assert b"[" * 50 in passed_on(RESPONSES, nested(50))


# -- where it goes and with which headers ------------------------------------

@pytest.mark.parametrize("base, path, query, expected", [
    ("", "/v1/responses", "?stream=true", "/v1/responses?stream=true"),
    ("/", "/v1/responses", "", "/v1/responses"),
    ("/v1", "/v1/responses", "", "/v1/responses"),
    ("/v1/", "/v1/responses", "", "/v1/responses"),
    ("/openai", "/v1/chat/completions", "", "/openai/v1/chat/completions"),
    ("/openai/", "/v1/chat/completions", "?a=b", "/openai/v1/chat/completions?a=b"),
    ("/v1", "/v1", "", "/v1"),
    ("/v1", "/v1", "?c=n", "/v1?c=n"),
    ("/v1", "/v11/messages", "", "/v1/v11/messages"),
    ("/v1/messages", "/v1/messages", "", "/v1/messages"),
    ("/v1/messages/", "/v1/messages", "?beta=true", "/v1/messages?beta=true"),
    ("/v1/chat", "/v1/chat/completions", "", "/v1/chat/completions"),
    # the version of a base is never doubled
    ("/api/v1", "/v1/chat/completions", "", "/api/v1/chat/completions"),
    ("/api/v1/", "/v1/chat/completions", "?x", "/api/v1/chat/completions?x"),
    ("/openai/v1", "/v1/responses", "", "/openai/v1/responses"),
    ("/v1beta/openai", "/v1/chat/completions", "", "/v1beta/openai/chat/completions"),
    ("/v1beta/openai/", "/v1/chat/completions", "", "/v1beta/openai/chat/completions"),
    ("/api/paas/v4", "/v1/chat/completions", "", "/api/paas/v4/chat/completions"),
    ("/v2", "/v1/messages", "", "/v2/messages"),
    # what only looks like one
    ("/v", "/v1/messages", "", "/v/v1/messages"),
    ("/version", "/v1/messages", "", "/version/v1/messages"),
    ("/vip1", "/v1/messages", "", "/vip1/v1/messages"),
    ("/v1x", "/v1/messages", "", "/v1x/v1/messages"),
    ("/anthropic", "/v1/messages", "", "/anthropic/v1/messages"),
    ("/a/b/c", "/v1/messages", "", "/a/b/c/v1/messages"),
    # a query is never looked into
    ("/v1", "/v1/messages", "?u=/v1/v1?x", "/v1/messages?u=/v1/v1?x"),
    ("/openai", "/v1/messages", "?", "/openai/v1/messages?"),
])
def test_the_target_is_joined(base, path, query, expected):
    assert proxai.join_target(base, path, query) == expected


@pytest.mark.parametrize("protocol, expected", [
    (RESPONSES, b"authorization: bearer k-1"), (CHAT, b"authorization: bearer k-1"),
    (MESSAGES, b"x-api-key: k-1")])
def test_each_protocol_has_its_own_header_for_the_key(protocol, expected):
    line = proxai.auth_line(protocol, "k-1")
    assert line.lower() == expected
    assert line.endswith(b"k-1") and (protocol is MESSAGES or b": Bearer " in line)


def provider_headers(protocol: proxai.Protocol, *lines: bytes) -> list[tuple[bytes, bytes]]:
    """The headers that a provider gets for a request with these header lines."""
    head = request_head(b"POST /v1/x HTTP/1.1", b"Host: localhost", *lines)
    fixed = [b"host: provider.example", proxai.auth_line(protocol, "k-1")]
    out = [line.split(b":", 1) for line in proxai.provider_lines(head, protocol, fixed, 5)]
    return [(name.lower(), value.strip()) for name, value in out]


KEY_HEADER = {RESPONSES: (b"authorization", b"Bearer k-1"), CHAT: (b"authorization", b"Bearer k-1"),
              MESSAGES: (b"x-api-key", b"k-1")}


@for_each_protocol
@pytest.mark.parametrize("line", [
    b"Connection: x", b"Keep-Alive: timeout=5", b"Proxy-Authenticate: Basic",
    b"Proxy-Authorization: Basic client-secret", b"TE: trailers", b"Trailer: X",
    b"Transfer-Encoding: chunked", b"Upgrade: websocket", b"Accept-Encoding: gzip, br",
    b"Content-Length: 99", b"Expect: 100-continue", b"Authorization: Bearer client-secret",
    b"X-API-Key: client-secret",
])
def test_headers_of_the_client_s_own_hop_and_its_keys_stop_here(protocol, line):
    name = line.split(b":")[0].lower()
    headers = provider_headers(protocol, line)
    ours = dict([(b"content-length", b"5"), KEY_HEADER[protocol]])
    assert [v for n, v in headers if n == name] == [v for n, v in ours.items() if n == name]
    assert not any(b"client-secret" in v for _, v in headers)


@for_each_protocol
@pytest.mark.parametrize("line", [
    b"Anthropic-Version: 2024-01-01", b"anthropic-beta: a,b", b"OpenAI-Organization: o", b"openai-beta: x",
    b"X-Stainless-Lang: python", b"Cookie: a=b", b"Origin: http://localhost",
    b"Content-Type: application/json; charset=utf-8", b"User-Agent: me/1", b"Accept: text/x",
    b"x-codex-turn-metadata: {\"a\":1}", b"X-Forwarded-For: 1.2.3.4", b"session-id: \xe9", b"X-Empty:",
    b"Content-Encoding: identity",
])
def test_every_other_header_is_forwarded_once(protocol, line):
    name, value = (part.strip() for part in line.split(b":", 1))
    assert [v for n, v in provider_headers(protocol, line) if n == name.lower()] == [value]


def test_repeated_headers_are_forwarded_in_order():
    headers = provider_headers(MESSAGES, b"anthropic-beta: a", b"X: 1", b"Anthropic-Beta: b", b"Cookie: c=d",
                               b"cookie: e=f")
    assert [v for n, v in headers if n == b"anthropic-beta"] == [b"a", b"b"]
    assert [v for n, v in headers if n == b"cookie"] == [b"c=d", b"e=f"]


@for_each_protocol
def test_a_request_has_host_length_and_key_of_the_provider_once(protocol):
    headers = provider_headers(protocol, b"Authorization: a", b"x-api-key: b", b"Content-Length: 7")
    for expected in ((b"host", b"provider.example"), (b"content-length", b"5"), KEY_HEADER[protocol]):
        assert [(n, v) for n, v in headers if n == expected[0]] == [expected]
    assert ({b"authorization", b"x-api-key"} & {n for n, _ in headers}) == {KEY_HEADER[protocol][0]}


@for_each_protocol
def test_what_a_client_leaves_out_is_added(protocol):
    headers = provider_headers(protocol)
    assert [v for n, v in headers if n == b"user-agent"] == [b"ProxAI/" + proxai.__version__.encode()]
    assert [v for n, v in headers if n == b"accept"] == [b"*/*"]
    version = [b"2023-06-01"] if protocol is MESSAGES else []
    assert [v for n, v in headers if n == b"anthropic-version"] == version


def test_a_content_type_is_forwarded_as_sent_and_never_added():
    assert [v for n, v in provider_headers(CHAT, b"Content-Type: text/plain")
            if n == b"content-type"] == [b"text/plain"]
    assert [v for n, v in provider_headers(CHAT) if n == b"content-type"] == []


@for_each_protocol
def test_headers_that_connection_names_stop_here(protocol):
    headers = provider_headers(protocol, b"Connection: keep-alive, X-Hop", b"X-Hop: 1", b"X-Stay: 2",
                               b"connection: X-Other", b"x-other: 3")
    names = [n for n, _ in headers]
    assert b"x-stay" in names and not {b"x-hop", b"x-other", b"connection"} & set(names)


@for_each_protocol
def test_headers_that_connection_names_are_absent_and_so_are_added_or_set(protocol):
    listed = b"accept, user-agent, anthropic-version, host, content-length, authorization, x-api-key"
    headers = provider_headers(protocol, b"Connection: " + listed, b"Accept: a/b", b"User-Agent: me",
                               b"anthropic-version: 1")
    for expected in ((b"accept", b"*/*"), (b"host", b"provider.example"), (b"content-length", b"5")):
        assert expected in headers
    assert KEY_HEADER[protocol] in headers
    assert [v[:7] for n, v in headers if n == b"user-agent"] == [b"ProxAI/"]
    version = [b"2023-06-01"] if protocol is MESSAGES else []
    assert [v for n, v in headers if n == b"anthropic-version"] == version


ANSWER_LINES = [b"Content-Type: application/json; charset=utf-8", b"Content-Length: 7", b"Set-Cookie: a=b",
                b"set-cookie: c=d", b"X-RateLimit-Limit-Requests: 9", b"x-codex-primary-used-percent: 5",
                b"Content-Encoding: gzip", b"Request-Id: r", b"Date: Thu, 01 Jan 1970 00:00:00 GMT",
                b"Server: s", b"X-Odd:  v "]
HOP_LINES = [b"Connection: keep-alive, X-Hop", b"Keep-Alive: timeout=5", b"Proxy-Authenticate: Basic",
             b"Proxy-Authorization: x", b"TE: x", b"Trailer: X", b"Upgrade: h2c", b"X-Hop: 1"]


def test_the_headers_of_a_good_answer_pass_but_for_those_of_this_hop_and_of_the_body():
    head = response_head(b"HTTP/1.1 200 OK", *HOP_LINES[:3], *ANSWER_LINES, *HOP_LINES[3:])
    assert proxai.client_lines(head, False) == ANSWER_LINES[2:]
    assert proxai.client_lines(head, True) == [line for line in ANSWER_LINES[2:]
                                               if line != b"Content-Encoding: gzip"]
    chunked = response_head(b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked",
                            b"content-type: text/event-stream", b"X: y")
    assert proxai.client_lines(chunked, False) == [b"X: y"]


def test_only_the_listed_headers_of_an_error_pass():
    kept = [b"Retry-After: 5", b"X-Request-Id: a", b"request-id: b", b"OpenAI-Processing-Ms: 7",
            b"x-ratelimit-remaining-tokens: 0", b"X-RateLimit-Reset: 1",
            b"anthropic-ratelimit-requests-remaining: 0"]
    others = [b"Content-Type: application/json", b"Content-Length: 2", b"Set-Cookie: a=b",
              b"x-codex-primary-used-percent: 5", b"Server: s", b"Date: d", b"Content-Encoding: gzip",
              b"x-ratelimit: 1", b"anthropic-version: 1", b"my-x-ratelimit-a: 1", b"Connection: close",
              b"WWW-Authenticate: x", b"Location: /"]
    lines = [line for pair in itertools.zip_longest(others, kept) for line in pair if line]
    assert proxai.error_lines(response_head(b"HTTP/1.1 429 X", *lines).fields) == kept


@pytest.mark.parametrize("value, expected", [
    (b"text/event-stream", True), (b"text/event-stream; charset=utf-8", True),
    (b"text/event-stream;charset=utf-8", True), (b"TEXT/Event-Stream ; Charset=UTF-8", True),
    (b"application/json", False), (b"text/plain", False), (b"", False), (None, False),
    (b"application/text/event-stream", False), (b"text/event", False), (b"x; text/event-stream", False),
])
def test_an_event_stream_is_known_by_its_content_type_in_any_case(value, expected):
    assert proxai.is_event_stream(value) is expected


# -- gaps in Anthropic-compatible answers ------------------------------------

WHOLE_USAGE = {
    "input_tokens": 1, "output_tokens": 2, "cache_creation": None, "cache_creation_input_tokens": None,
    "cache_read_input_tokens": None, "inference_geo": None, "server_tool_use": None, "service_tier": None}
WHOLE_MESSAGE = {
    "id": "i", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": WHOLE_USAGE,
    "container": None, "stop_details": None, "stop_reason": None, "stop_sequence": None}
WHOLE_DELTA = {
    "type": "message_delta",
    "delta": {"container": None, "stop_details": None, "stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"output_tokens": 2, "cache_creation_input_tokens": None, "cache_read_input_tokens": None,
              "input_tokens": None, "server_tool_use": None}}


def without_members(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """`value` without these members."""
    return {k: v for k, v in value.items() if k not in names}


def filled_body(body: Any) -> tuple[bool, Any]:
    """Whether anything was filled, and the body after that."""
    copy = json.loads(json.dumps(body))
    return proxai.fill_gaps_in_body(copy), copy


def frame_of(payload: Any, name: str | None = None) -> bytes:
    """An event as a provider may write it: spaced, not as the proxy writes it."""
    start = f"event: {name}\n".encode() if name else b""
    return start + b"data:  " + json.dumps(payload, indent=None, separators=(" , ", " : ")).encode() + b"\n\n"


def filled_event(payload: Any, name: str | None = None) -> Any:
    """The payload of an event after its gaps were filled; it must then be encoded as the contract says."""
    frame = frame_of(payload, name)
    block = proxai.fill_gaps_in_block(frame)
    if block != frame:
        start, data = block.split(b"\n", 1)
        assert start == b"event: " + json.loads(data[6:])["type"].encode()
        assert block.endswith(b"\n\n") and block.count(b"\n") == 3
        compact = json.dumps(json.loads(data[6:]), separators=(",", ":"), ensure_ascii=False)
        assert compact.encode() == data[6:-2]
    event = proxai.parse_event(block)
    assert event
    return json.loads(event.data)


MESSAGE_GAPS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nothing but what makes it a message",
     {**without_members(WHOLE_MESSAGE, "type", "container", "stop_details", "stop_reason", "stop_sequence"),
      "usage": {"input_tokens": 1, "output_tokens": 2}},
     WHOLE_MESSAGE),
    ("no type", without_members(WHOLE_MESSAGE, "type"), WHOLE_MESSAGE),
    *((f"no {name}", without_members(WHOLE_MESSAGE, name), WHOLE_MESSAGE)
      for name in ("container", "stop_details", "stop_reason", "stop_sequence")),
    *((f"no {name} in the usage", {**WHOLE_MESSAGE, "usage": without_members(WHOLE_USAGE, name)},
       WHOLE_MESSAGE) for name in (
        "cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens", "inference_geo",
        "server_tool_use", "service_tier")),
    ("stop details", {**WHOLE_MESSAGE, "stop_details": {"type": "refusal"}},
     {**WHOLE_MESSAGE, "stop_details": {"type": "refusal", "category": None, "explanation": None}}),
    ("stop details, one there", {**WHOLE_MESSAGE, "stop_details": {"explanation": "e"}},
     {**WHOLE_MESSAGE, "stop_details": {"explanation": "e", "category": None}}),
    ("one counter (GLM)",
     {**WHOLE_MESSAGE, "usage": {**WHOLE_USAGE, "server_tool_use": {"web_search_requests": 1}}},
     {**WHOLE_MESSAGE,
      "usage": {**WHOLE_USAGE, "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0}}}),
    ("the other counter",
     {**WHOLE_MESSAGE, "usage": {**WHOLE_USAGE, "server_tool_use": {"web_fetch_requests": 3}}},
     {**WHOLE_MESSAGE,
      "usage": {**WHOLE_USAGE, "server_tool_use": {"web_fetch_requests": 3, "web_search_requests": 0}}}),
    ("no counter", {**WHOLE_MESSAGE, "usage": {**WHOLE_USAGE, "server_tool_use": {}}},
     {**WHOLE_MESSAGE,
      "usage": {**WHOLE_USAGE, "server_tool_use": {"web_fetch_requests": 0, "web_search_requests": 0}}}),
    ("other members stay", {**without_members(WHOLE_MESSAGE, "type"), "x": {"y": [1]},
                            "usage": {**WHOLE_USAGE, "z": 1}},
     {**WHOLE_MESSAGE, "x": {"y": [1]}, "usage": {**WHOLE_USAGE, "z": 1}}),
]


@pytest.mark.parametrize("before, after", [c[1:] for c in MESSAGE_GAPS], ids=[c[0] for c in MESSAGE_GAPS])
def test_gaps_of_a_message_are_filled_in_a_body_and_in_message_start(before, after):
    assert filled_body(before) == (True, after)
    start = filled_event({"type": "message_start", "message": before}, "message_start")
    assert start == {"type": "message_start", "message": after}


BLOCK_GAPS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("text", {"type": "text", "text": "t"}, {"type": "text", "text": "t", "citations": None}),
    *((f"{kind} citation", {"type": "text", "text": "t", "citations": [{"type": kind, "cited_text": "c"}]},
       {"type": "text", "text": "t",
        "citations": [{"type": kind, "cited_text": "c", "document_title": None, "file_id": None}]})
      for kind in ("char_location", "page_location", "content_block_location")),
    *((f"{kind} citation",
       {"type": "text", "text": "t", "citations": [{"type": kind, "url": "u"}, {"type": kind, "title": "T"}]},
       {"type": "text", "text": "t", "citations": [{"type": kind, "url": "u", "title": None},
                                                   {"type": kind, "title": "T"}]})
      for kind in ("web_search_result_location", "search_result_location")),
    ("thinking (MiniMax)", {"type": "thinking", "thinking": "t"},
     {"type": "thinking", "thinking": "t", "signature": ""}),
    ("tool_use (MiMo)", {"type": "tool_use", "id": "i", "name": "n", "input": {}},
     {"type": "tool_use", "id": "i", "name": "n", "input": {}, "caller": {"type": "direct"}}),
    ("web search", {"type": "web_search_tool_result", "tool_use_id": "i", "content": [
        {"type": "web_search_result", "url": "u"}, {"type": "web_search_result", "page_age": "1d"}, "odd"]},
     {"type": "web_search_tool_result", "tool_use_id": "i", "content": [
         {"type": "web_search_result", "url": "u", "page_age": None},
         {"type": "web_search_result", "page_age": "1d"}, "odd"]}),
    ("web fetch", {"type": "web_fetch_tool_result", "content": [{"url": "u", "content": {"type": "document"}},
                                                                {"retrieved_at": "t"}]},
     {"type": "web_fetch_tool_result", "content": [
         {"url": "u", "content": {"type": "document", "citations": None, "title": None},
          "retrieved_at": None}, {"retrieved_at": "t"}]}),
    ("tool search",
     {"type": "tool_search_tool_result", "content": {"type": "x", "error_code": "unavailable"}},
     {"type": "tool_search_tool_result", "content": {"type": "x", "error_code": "unavailable",
                                                     "error_message": None}}),
    *((f"text editor {kind}", {"type": "text_editor_code_execution_tool_result", "content": {"type": kind}},
       {"type": "text_editor_code_execution_tool_result", "content": {"type": kind, **dict.fromkeys(names)}})
      for kind, names in (
          ("text_editor_code_execution_str_replace_result", ("lines", "new_lines", "new_start", "old_lines",
                                                             "old_start")),
          ("text_editor_code_execution_view_result", ("num_lines", "start_line", "total_lines")),
          ("text_editor_code_execution_tool_result_error", ("error_message",)))),
]


@pytest.mark.parametrize("before, after", [c[1:] for c in BLOCK_GAPS], ids=[c[0] for c in BLOCK_GAPS])
def test_gaps_of_a_block_are_filled_in_a_body_and_where_a_block_starts(before, after):
    full = {"type": "text", "text": "", "citations": []}
    filled = {**WHOLE_MESSAGE, "content": [full, after, full]}
    assert filled_body({**WHOLE_MESSAGE, "content": [full, before, full]}) == (True, filled)
    start = {"type": "content_block_start", "index": 0, "content_block": before}
    assert filled_event(start) == {**start, "content_block": after}
    message = {"type": "message_start", "message": {**WHOLE_MESSAGE, "content": [before]}}
    assert filled_event(message)["message"] == {**WHOLE_MESSAGE, "content": [after]}


@pytest.mark.parametrize("before", [
    {**WHOLE_DELTA, "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    *({**WHOLE_DELTA, "delta": without_members(WHOLE_DELTA["delta"], name)}
      for name in ("container", "stop_details", "stop_sequence")),
    *({**WHOLE_DELTA, "usage": without_members(WHOLE_DELTA["usage"], name)} for name in (
        "cache_creation_input_tokens", "cache_read_input_tokens", "input_tokens", "server_tool_use")),
])
def test_gaps_of_message_delta_are_filled(before):
    assert filled_event(before) == WHOLE_DELTA
    assert filled_event(without_members(before, "type"), "message_delta") == WHOLE_DELTA


def test_gaps_inside_the_objects_of_message_delta_are_filled():
    before = json.loads(json.dumps(WHOLE_DELTA))
    before["delta"]["stop_details"] = {"category": "c"}
    before["usage"]["server_tool_use"] = {"web_search_requests": 1}
    after = filled_event(before)
    assert after["delta"] == {**WHOLE_DELTA["delta"], "stop_details": {"category": "c", "explanation": None}}
    assert after["usage"] == {**WHOLE_DELTA["usage"],
                              "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0}}


def test_a_missing_stop_reason_of_message_delta_is_null():
    filled = filled_event({**WHOLE_DELTA, "delta": {}})
    assert filled["delta"] == {**WHOLE_DELTA["delta"], "stop_reason": None}


STRANGE_MESSAGE = {
    "id": 1, "type": "other", "role": "assistant", "model": None, "container": "c", "stop_reason": 7,
    "stop_sequence": ["s"], "stop_details": {"category": 1, "explanation": []},
    "usage": {**dict.fromkeys(WHOLE_USAGE, "u"),
              "server_tool_use": {"web_fetch_requests": None, "web_search_requests": "x"}},
    "content": [
        {"type": "text", "citations": []}, {"type": "text", "citations": "odd"},
        {"type": "text", "citations": [{"type": "new"}, {"type": ["x"]}, {}, None, 7]},
        {"type": "thinking", "signature": None}, {"type": "tool_use", "caller": None},
        {"type": "web_search_tool_result",
         "content": {"type": "web_search_tool_result_error", "error_code": "x"}},
        {"type": "web_fetch_tool_result", "content": [{"retrieved_at": 1, "content": "text"}]},
        {"type": "tool_search_tool_result", "content": {"tool_references": []}},
        {"type": "text_editor_code_execution_tool_result",
         "content": {"type": "text_editor_code_execution_create_result"}},
        {"type": "server_tool_use", "id": "i", "name": "n", "input": {}}, {"type": "new"}, {"type": ["text"]},
        {}, "odd", None, 7]}


def test_nothing_that_is_there_is_overwritten_or_removed():
    assert filled_body(STRANGE_MESSAGE) == (False, STRANGE_MESSAGE)
    frame = frame_of({"type": "message_start", "message": STRANGE_MESSAGE}, "message_start")
    assert proxai.fill_gaps_in_block(frame) == frame


def test_an_error_object_of_a_web_fetch_is_not_a_result_with_gaps():
    error = {"type": "web_fetch_tool_result_error", "error_code": "unavailable"}
    body = {**WHOLE_MESSAGE, "content": [{"type": "web_fetch_tool_result", "content": error}]}
    assert filled_body(body) == (False, body)


@pytest.mark.parametrize("body", [
    *(without_members(WHOLE_MESSAGE, "type", name) for name in ("id", "role", "model", "content", "usage")),
    {**without_members(WHOLE_MESSAGE, "type"), "role": "user"}, {**without_members(WHOLE_MESSAGE, "type"),
                                                                 "role": None},
    {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, {}, [],
    [without_members(WHOLE_MESSAGE, "type")], None, "x", 1,
])
def test_a_body_that_is_no_message_stays_as_it_is(body):
    assert filled_body(body) == (False, body)


@pytest.mark.parametrize("more", [{"content": None}, {"content": "text"}, {"content": {}}, {"usage": None},
                                  {"usage": []}, {"stop_details": "s"}, {"content": [None, 1, "x", [], {}]},
                                  {"usage": {**WHOLE_USAGE, "server_tool_use": 1}}])
def test_odd_members_of_a_message_do_no_harm(more):
    body = {**WHOLE_MESSAGE, **more}
    assert filled_body(body) == (False, body)
    assert filled_body(without_members(body, "type")) == (True, body)


UNCHANGED_FRAMES = [
    b"", b"\n\n", b": message_start\n\n", b"event: message_start\n\n",
    b"event: message_start\ndata: not json\n\n", b'event:message_start\ndata:{"type":"message_start"}\n\n',
    b'data: {"type":"message_start","message":null}\n\n', b'data: {"type":"message_start","message":[1]}\n\n',
    b'data: ["message_start"]\n\n', b'data: "message_start"\n\n',
    b'data: {"type":"ping","x":"message_start"}\n\n', b'data: {"type":7,"x":"message_start"}\n\n',
    b"data: [DONE]\n\n", b'event: content_block_delta\ndata: { "type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"message_delta"} }\n\n',
    b'event: message_stop\r\ndata: {"type":"message_stop"}\r\n\r\n',
    b"id: 7\nretry: 1\n: c\ndata: {\"type\": \"content_block_stop\"}\n\n",
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"message_start"}}\n\n',
    b'data: {"type":"content_block_start","content_block":{"type":"server_tool_use","id":"i","name":"n",'
    b'"input":{}}}\n\n',
    b'data: {"type":"content_block_start","content_block":null}\n\n',
    b'data: {"type":"content_block_start"}\n\n', b'data: {"type":"message_delta"}\n\n',
    b'data: {"type":"message_delta","delta":null,"usage":null}\n\n',
    b'data: {"type":"content_block_start","x":NaN,"content_block":{"type":"text"}}\n\n',
    b'\xef\xbb\xbfid: 1\r: c\rdata:  { "type" :\rdata: "content_block_start" , '
    b'"content_block" : {"type":"text" , "citations":[]}}\r\r',
    frame_of({"type": "message_start", "message": WHOLE_MESSAGE}, "message_start"), frame_of(WHOLE_DELTA),
    frame_of(WHOLE_DELTA, "other"),
    b'data: {"type":"content_block_start","content_block":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n",
]


@pytest.mark.parametrize("frame", UNCHANGED_FRAMES, ids=range(len(UNCHANGED_FRAMES)))
def test_an_event_without_gaps_keeps_its_bytes(frame):
    assert proxai.fill_gaps_in_block(frame) == frame


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_only_the_events_with_gaps_are_written_anew(end):
    before = b": c" + end * 2 + b'data: { "type":"ping" }' + end * 2
    gap = end.join([b"id: 1", b'data: {"type":"content_block_start","index":0,',
                    b'data: "content_block":{"type":"thinking"}}', b"", b""])
    after = end.join([b'data: { "type" : "message_delta" }', b"", b"event: message_stop",
                      b'data: {"type":"message_stop"}', b"", b""])
    filled = (b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
              b'"content_block":{"type":"thinking","signature":""}}\n\n')
    assert proxai.fill_gaps_in_block(before + gap + after + gap) == before + filled + after + filled


def test_an_event_without_type_is_known_by_its_name():
    payload = {"index": 0, "content_block": {"type": "tool_use"}}
    assert filled_event(payload, "content_block_start") == {
        "type": "content_block_start", "index": 0,
        "content_block": {"type": "tool_use", "caller": {"type": "direct"}}}
    for name in (None, "message", "content_block_stop"):
        frame = frame_of({**payload, "x": "content_block_start"}, name)
        assert proxai.fill_gaps_in_block(frame) == frame


def test_text_of_any_kind_survives_in_an_event_that_is_written_anew():
    text = "\u00e4\u4e2d\U0001f600\u2028\x85\r\n\\\"\x00\x7f\ufeff"
    frame = b'data: {"type":"content_block_start","content_block":{"type":"text","text":%b}}\n\n'
    for spelled in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
        found = events_in(proxai.fill_gaps_in_block(frame % spelled.encode()))
        assert len(found) == 1
        assert json.loads(found[0][1])["content_block"] == {"type": "text", "text": text, "citations": None}
    half = proxai.fill_gaps_in_block(frame % b'"\\ud83d"')
    assert b'"text":"\\ud83d","citations":null' in half


def test_an_event_that_is_written_anew_is_json_whatever_its_numbers():
    frame = b'data: {"type":"content_block_start","x":1e999,"content_block":{"type":"text"}}\n\n'
    strict_json(events_in(proxai.fill_gaps_in_block(frame))[0][1].encode())


def test_defaults_that_are_objects_are_not_shared():
    one = {"type": "content_block_start", "content_block": {"type": "tool_use"}}
    two = json.loads(json.dumps(one))
    assert proxai.fill_gaps_in_event(one) and proxai.fill_gaps_in_event(two)
    one["content_block"]["caller"]["type"] = "changed"
    assert two["content_block"]["caller"] == {"type": "direct"}



# ============================================================================
#  9  Translation
# ============================================================================

@for_each_protocol
def test_the_same_protocol_on_both_sides_needs_no_pair(protocol):
    assert proxai.pair_for(protocol, protocol) is None


@pytest.mark.parametrize("inbound, provider", list(itertools.permutations([RESPONSES, CHAT, MESSAGES], 2)),
                         ids=lambda p: p.word)
def test_a_pair_that_is_not_there_is_an_explicit_error_that_names_it(monkeypatch, inbound, provider):
    monkeypatch.setattr(proxai, "PAIRS", {})
    with pytest.raises(proxai.SetupError) as caught:
        proxai.pair_for(inbound, provider)
    error = caught.value
    assert (error.status, error.type, error.retry) == (500, "internal_error", False)
    assert f"{inbound.name} -> {provider.name}" in error.message


def test_a_pair_is_looked_up_in_its_own_direction(monkeypatch):
    pair = proxai.Pair(len, len, len, len)
    monkeypatch.setattr(proxai, "PAIRS", {("chat", "messages"): pair})
    assert proxai.pair_for(CHAT, MESSAGES) is pair
    with pytest.raises(proxai.SetupError):
        proxai.pair_for(MESSAGES, CHAT)



# ============================================================================
#  10  Observation
# ============================================================================

ID = 1778228311188  # `wn82ac` in base 36


def sse(protocol, *events, **style):
    """A stream: objects become events as the protocol writes them, bytes stay as they are."""
    frames = []
    for event in events:
        if isinstance(event, dict):
            name = b"" if protocol is CHAT else b"event: %b\n" % event["type"].encode()
            event = name + b"data: " + json.dumps(event, **style).encode() + b"\n\n"
        frames.append(event)
    return b"".join(frames)


def watched(protocol, *events, limit=1 << 20):
    """An observer that saw a whole stream, each event at the second of its place."""
    observer = proxai.StreamObserver(protocol, limit)
    for at, event in enumerate(events):
        observer.feed(sse(protocol, event), float(at))
    return observer


def exchange_of(protocol, inbound=None, /, **more):
    """An exchange of the sizes and times that the expected lines below have."""
    exchange = proxai.Exchange(ID, "POST", (inbound or protocol).path, 100.0)
    known = {"inbound": inbound or protocol, "provider_protocol": protocol, "provider": "openai_default",
             "upstream_model": "up-model", "status": 200, "head_at": 101.2,
             "content_type": b"text/event-stream", "sse": True, "provider_bytes": 2048,
             "inbound_bytes": 2000, "down": 4096, "chunks": 16, "body": {}}
    for name, value in (known | more).items():
        setattr(exchange, name, value)
    return exchange


def told(protocol, *events):
    """The fields of the line that ends a stream."""
    return proxai.end_fields(exchange_of(protocol, observed=watched(protocol, *events).seen))


def state_of(observer):
    """All that an observer knows, but for times."""
    seen = observer.seen
    known = {name: getattr(seen, name) for name in proxai.Observed.__slots__}
    return known | {"pending": set(seen.pending), "complete": observer.complete}


def tool_delta(item, index=0, text="{"):
    """A part of the arguments of a function call, as Responses streams it."""
    return {"type": "response.function_call_arguments.delta", "item_id": item, "output_index": index,
            "delta": text}


def choice_of(index=0, finish=None, **delta):
    """A chunk of a Chat stream."""
    return {"id": "chatcmpl-0123456789a", "object": "chat.completion.chunk", "model": "gpt-4.1",
            "service_tier": "default", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def call_part(text, index=0, choice=0, **more):
    """A chunk of a Chat stream with a part of a tool call."""
    return choice_of(choice, tool_calls=[{"index": index, "function": {"arguments": text}, **more}])


def block_delta(index, **delta):
    """A delta of an Anthropic stream."""
    return {"type": "content_block_delta", "index": index, "delta": delta}


def block_start(index, **block):
    """The start of a content block of an Anthropic stream."""
    return {"type": "content_block_start", "index": index, "content_block": block}


WEATHER = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "get_weather",
           "arguments": '{"c":1}'}
SAID = {"type": "message", "id": "msg_1", "role": "assistant",
        "content": [{"type": "output_text", "text": "Hé 😀"}]}
ANSWER = {"id": "resp_0123456789abcdef", "object": "response", "status": "completed", "model": "gpt-5.5",
          "service_tier": "priority", "reasoning": {"effort": "high", "summary": None}, "error": None,
          "incomplete_details": None, "output": [WEATHER, SAID],
          "usage": {"input_tokens": 1500, "input_tokens_details": {"cached_tokens": 500},
                    "output_tokens": 4096, "output_tokens_details": {"reasoning_tokens": 96},
                    "total_tokens": 5596}}
BEGUN = {**ANSWER, "status": "in_progress", "output": [], "usage": None}
RESPONSES_STREAM = [
    {"type": "response.created", "sequence_number": 0, "response": BEGUN},
    {"type": "response.in_progress", "sequence_number": 1, "response": BEGUN},
    {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0,
     "item": {**WEATHER, "arguments": "", "status": "in_progress"}},
    {**tool_delta("fc_1", 0, '{"c"'), "sequence_number": 3},
    b": a comment\n\n",
    {**tool_delta("fc_1", 0, ":1}"), "sequence_number": 4},
    {"type": "response.function_call_arguments.done", "sequence_number": 5, "item_id": "fc_1",
     "output_index": 0, "arguments": '{"c":1}'},
    {"type": "response.output_item.done", "sequence_number": 6, "output_index": 0, "item": WEATHER},
    {"type": "response.output_item.added", "sequence_number": 7, "output_index": 1,
     "item": {**SAID, "content": []}},
    {"type": "response.output_text.delta", "sequence_number": 8, "item_id": "msg_1", "output_index": 1,
     "delta": "Hé 😀 \"type\":\"response.failed\""},
    {"type": "response.output_item.done", "sequence_number": 9, "output_index": 1, "item": SAID},
    {"type": "response.completed", "sequence_number": 10, "response": ANSWER},
]
CHAT_USAGE = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens": 20,
              "completion_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 120}
DONE = b"data: [DONE]\n\n"
CHAT_STREAM = [
    choice_of(role="assistant", content=""),
    choice_of(content="Hé 😀 data: [DONE]"),
    call_part("", id="call_1", type="function", function={"name": "get_weather", "arguments": ""}),
    b": a comment\n\n",
    call_part('{"c"'),
    call_part(":1}"),
    call_part("{}", 1, id="call_2", type="function", function={"name": "get_time", "arguments": "{}"}),
    choice_of(finish="tool_calls"),
    {**choice_of(), "choices": [], "usage": CHAT_USAGE},
    DONE,
]
MESSAGES_STREAM = [
    {"type": "message_start", "message": {
        "id": "msg_0123456789abcdef", "type": "message", "role": "assistant", "model": "claude-x",
        "content": [],
        "stop_reason": None, "usage": {"input_tokens": 10, "cache_read_input_tokens": 25, "output_tokens": 1,
                                       "cache_creation_input_tokens": 5, "service_tier": "standard"}}},
    block_start(0, type="text", text=""),
    {"type": "ping"},
    block_delta(0, type="text_delta", text="Hé 😀 message_stop"),
    {"type": "content_block_stop", "index": 0},
    block_start(1, type="tool_use", id="toolu_1", name="get_weather", input={}),
    block_delta(1, type="input_json_delta", partial_json=""),
    block_delta(1, type="input_json_delta", partial_json='{"c":1}'),
    b": a comment\n\n",
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
     "usage": {"output_tokens": 20}},
    {"type": "message_stop"},
]
STREAMS = {"responses": (RESPONSES, RESPONSES_STREAM), "chat": (CHAT, CHAT_STREAM),
           "messages": (MESSAGES, MESSAGES_STREAM)}
CHAT_BODY = {
    "id": "chatcmpl-0123456789a", "object": "chat.completion", "model": "gpt-4.1", "service_tier": "default",
    "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
        "role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
            {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
            {"id": "call_3", "type": "custom", "custom": {"name": "exec", "input": "x"}}]}}],
    "usage": CHAT_USAGE}
MESSAGES_BODY = {
    "id": "msg_0123456789abcdef", "type": "message", "role": "assistant", "model": "claude-x",
    "content": [{"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search",
                 "input": {"query": "q"}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
                {"type": "text", "text": "hi"},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 25,
              "cache_creation_input_tokens": 5, "service_tier": "priority",
              "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0}}}


# -- what a stream and a body tell

RESPONSES_TOLD = {
    "response_id": "89abcdef", "model": "gpt-5.5", "service_tier": "priority", "tok": 5596, "input": 1000,
    "cache": 500, "output": 4096, "reasoning": 96, "reasoning_effort": "high", "response_status": "completed",
    "incomplete_reason": None, "output_items": {"function_call": 1, "message": 1},
    "calls": {"get_weather": 1}, "calls_by_source": {"function": 1}}
CHAT_TOLD = {"response_id": "3456789a", "model": "gpt-4.1", "service_tier": "default", "tok": 120,
             "input": 60, "cache": 40, "output": 20, "reasoning": 5, "finish_reasons": {"tool_calls": 1}}
MESSAGES_TOLD = {"response_id": "89abcdef", "model": "claude-x", "input": 10, "output": 20, "cache_read": 25,
                 "cache_creation": 5, "stop_reason": "tool_use", "stop_reasons": {"tool_use": 1}}


@pytest.mark.parametrize("word, expected", [
    ("responses", RESPONSES_TOLD | {"seq": 10}),
    ("chat", CHAT_TOLD | {"calls": {"get_weather": 1, "get_time": 1}, "calls_by_source": {"tool": 2}}),
    ("messages", MESSAGES_TOLD | {"service_tier": "standard", "output_items": {"text": 1, "tool_use": 1},
                                  "calls": {"get_weather": 1}, "calls_by_source": {"tool": 1}}),
])
def test_a_whole_stream_tells_its_ids_usage_and_calls(word, expected):
    protocol, events = STREAMS[word]
    fields = told(protocol, *events)
    assert {name: fields.get(name) for name in expected} == expected
    observer = watched(protocol, *events)
    seen = observer.seen
    assert seen.terminal and observer.complete and not seen.failed and not seen.pending


@pytest.mark.parametrize("protocol, body, expected", [
    (RESPONSES, ANSWER, RESPONSES_TOLD),
    (CHAT, CHAT_BODY, CHAT_TOLD | {"calls": {"get_weather": 2, "exec": 1},
                                   "calls_by_source": {"tool": 2, "custom_tool": 1}}),
    # The search is in the content and in the usage: still one call.
    (MESSAGES, MESSAGES_BODY, MESSAGES_TOLD | {
        "service_tier": "priority", "calls": {"web_search": 1, "get_weather": 1},
        "calls_by_source": {"server_tool": 1, "tool": 1},
        "output_items": {"server_tool_use": 1, "web_search_tool_result": 1, "text": 1, "tool_use": 1}}),
], ids=["responses", "chat", "messages"])
def test_a_whole_body_tells_the_same_as_a_stream(protocol, body, expected):
    seen = proxai.observe_body(protocol, body)
    fields = proxai.end_fields(exchange_of(protocol, observed=seen, sse=False))
    assert {name: fields.get(name) for name in expected} == expected
    assert not seen.failed


@pytest.mark.parametrize("usage, expected", [
    ({"input_tokens": 7, "output_tokens": 2}, (7, 0, 2, 0, 9)),
    ({"input_tokens": 7, "input_tokens_details": {"cached_tokens": 7}, "output_tokens": 2}, (0, 7, 2, 0, 9)),
    ({"input_tokens": 7, "input_tokens_details": {"cached_tokens": 9}, "total_tokens": 7}, (0, 9, 0, 0, 7)),
    ({"input_tokens": 7, "input_tokens_details": None, "output_tokens_details": None}, (7, 0, 0, 0, 7)),
    (None, (0, 0, 0, 0, 0)),
], ids=["no details", "all cached", "more cached than sent", "null details", "none"])
def test_openai_input_tokens_are_without_the_cached_ones(usage, expected):
    fields = told(RESPONSES, {"type": "response.completed", "response": {**ANSWER, "usage": usage}})
    assert tuple(fields[name] for name in ("input", "cache", "output", "reasoning", "tok")) == expected
    chat = {k.replace("input", "prompt").replace("output", "completion"): v for k, v in (usage or {}).items()}
    fields = told(CHAT, {**choice_of(), "usage": usage and chat})
    assert tuple(fields[name] for name in ("input", "cache", "output", "reasoning", "tok")) == expected


def test_names_that_are_empty_do_not_replace_names():
    first, empty = choice_of(content="x"), {"id": "", "model": "", "service_tier": None}
    for chunks in ([first, choice_of(finish="stop") | empty], [first | empty, choice_of(finish="stop")]):
        fields = told(CHAT, *chunks)
        found = [fields[name] for name in ("response_id", "model", "service_tier")]
        assert found == ["3456789a", "gpt-4.1", "default"]


def test_the_last_usage_of_a_chat_stream_counts():
    fields = told(CHAT, *({**choice_of(content="x"), "usage": usage} for usage in (
        {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}, CHAT_USAGE, None)))
    assert {name: fields[name] for name in ("input", "cache", "output", "reasoning", "tok")} == {
        "input": 60, "cache": 40, "output": 20, "reasoning": 5, "tok": 120}


def test_later_anthropic_usage_replaces_what_it_names_and_keeps_the_rest():
    fields = told(MESSAGES, MESSAGES_STREAM[0], *(
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage} for usage in (
            {"input_tokens": 30, "output_tokens": 8, "cache_read_input_tokens": None}, {"output_tokens": 9})))
    expected = {"input": 30, "output": 9, "cache_read": 25, "cache_creation": 5}
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("usage, calls, sources", [
    ({"web_search_requests": 2, "web_fetch_requests": 0}, {"web_search": 2}, {"server_tool": 2}),
    ({"web_search_requests": 2}, {"web_search": 2}, {"server_tool": 2}),
    ({"web_search_requests": 2, "web_fetch_requests": 1}, {"web_search": 2, "web_fetch": 1},
     {"server_tool": 3}),
    (None, {}, {}),
], ids=["search", "sparse", "two kinds", "none"])
def test_server_tools_are_counted_from_the_usage_of_an_anthropic_stream(usage, calls, sources):
    fields = told(MESSAGES, MESSAGES_STREAM[0], {
        "type": "message_delta", "delta": {}, "usage": {"output_tokens": 1, "server_tool_use": usage}})
    assert (fields["calls"], fields["calls_by_source"]) == (calls, sources)


def test_sparse_tool_blocks_count_and_a_server_tool_counts_once():
    fields = told(MESSAGES, MESSAGES_STREAM[0], block_start(0, type="tool_use", name="grep"),
                  block_start(1, type="server_tool_use", name="web_search"), {
        "type": "message_delta", "delta": {}, "usage": {"server_tool_use": {"web_search_requests": 1}}})
    assert fields["calls"] == {"grep": 1, "web_search": 1}
    assert fields["calls_by_source"] == {"tool": 1, "server_tool": 1}


def added(item, index=0):
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def finished(item, index=0):
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def completed(*output):
    return {"type": "response.completed", "response": {**ANSWER, "output": list(output)}}


@pytest.mark.parametrize("events, items, calls", [
    ([added(WEATHER), finished(WEATHER)], {"function_call": 1}, {"get_weather": 1}),
    ([added(WEATHER), finished(WEATHER), completed(WEATHER)], {"function_call": 1}, {"get_weather": 1}),
    ([added(WEATHER), finished({**WEATHER, "name": "later"})], {"function_call": 1}, {"get_weather": 1}),
    ([added({**WEATHER, "name": ""}), finished(WEATHER)], {"function_call": 1}, {"get_weather": 1}),
    ([added(WEATHER), added({**WEATHER, "id": "fc_2"}, 1)], {"function_call": 2}, {"get_weather": 2}),
    ([added({"type": "reasoning"}), finished({"type": "reasoning"}), added({"type": "reasoning"}, 1)],
     {"reasoning": 2}, {}),
    ([added({"type": "mcp_call", "id": "mcp_1"}),
      {"type": "response.mcp_call.in_progress", "item_id": "mcp_1", "output_index": 0},
      finished({"type": "mcp_call", "id": "mcp_1", "server_label": "wiki", "name": "ask"})],
     {"mcp_call": 1}, {"wiki/ask": 1}),
    ([added({"type": "custom_tool_call", "id": "ct_1", "name": "exec"})], {"custom_tool_call": 1},
     {"exec": 1}),
    ([added(WEATHER), finished(WEATHER), completed()], {"function_call": 1}, {"get_weather": 1}),
    ([finished(WEATHER), completed({**WEATHER, "id": "another"})], {"function_call": 1}, {"get_weather": 1}),
    ([finished(WEATHER), completed(SAID)], {"message": 1}, {}),
], ids=["added and done", "and listed at the end", "a later name", "a name that comes late", "two calls",
        "no ids", "mcp", "custom", "an empty list at the end", "other ids at the end",
        "other items at the end"])
def test_output_items_are_counted_once(events, items, calls):
    fields = told(RESPONSES, *events)
    assert (fields["output_items"], fields["calls"]) == (items, calls)


@pytest.mark.parametrize("events, calls, finish", [
    (CHAT_STREAM[2:6], {"get_weather": 1}, {}),
    ([CHAT_STREAM[2], CHAT_STREAM[2]], {"get_weather": 1}, {}),
    ([choice_of(finish="stop"), choice_of(finish="stop")], {}, {"stop": 1}),
    ([choice_of(finish="stop"), choice_of(1, finish="stop"), choice_of(2, finish="length")], {},
     {"stop": 2, "length": 1}),
    ([call_part("", 0, n, function={"name": "f"}) for n in (0, 1, 0)], {"f": 2}, {}),
    ([choice_of(tool_calls=[{"index": n, "function": {"name": "f", "arguments": "{}"}} for n in (0, 1)])],
     {"f": 2}, {}),
], ids=["two parts", "a repeated part", "a repeated finish", "three choices", "a call in two choices",
        "at once"])
def test_chat_calls_and_finish_reasons_are_counted_once_for_a_choice_and_an_index(events, calls, finish):
    fields = told(CHAT, *events)
    assert (fields["calls"], fields["finish_reasons"]) == (calls, finish)


# -- the end of a stream

@pytest.mark.parametrize("protocol, frame, terminal", [
    (RESPONSES, b'event: response.completed\ndata: {"response":{}}\n\n', True),
    (RESPONSES, b'event: response.incomplete\ndata: {"response":{}}\n\n', True),
    (RESPONSES, b'event: response.failed\ndata: {"response":{}}\n\n', True),
    (RESPONSES, b'event: response.error\ndata: {"message":"m"}\n\n', True),
    (RESPONSES, b'event: error\ndata: {"message":"m"}\n\n', True),
    (RESPONSES, b'data: {"type":"response.completed"}\n\n', True),
    (RESPONSES, b'data: {"type":"response.incomplete"}\n\n', True),
    (RESPONSES, b'data: {"type":"response.failed"}\n\n', True),
    (RESPONSES, b'data: {"type": "error","error":{"message":"m"}}\n\n', True),
    (RESPONSES, b'event: response.completed\ndata: {"type":"completed"}\n\n', True),
    (RESPONSES, b'event: message\ndata: {"type":"response.completed"}\n\n', True),
    (RESPONSES, b'event: response.created\ndata: {"type":"response.created","response":{}}\n\n', False),
    (RESPONSES, sse(RESPONSES, RESPONSES_STREAM[6]), False),
    (RESPONSES, sse(RESPONSES, RESPONSES_STREAM[10]), False),
    (RESPONSES, b'data: {"type":"response.output_text.delta","delta":"\\"type\\":\\"error\\""}\n\n', False),
    (RESPONSES, b'data: {"type":"response.output_text.delta","delta":"response.completed"}\n\n', False),
    (RESPONSES, DONE, False),
    (RESPONSES, b'event: response.completed\n\n', False),
    (RESPONSES, b': response.completed\n\n', False),
    (CHAT, DONE, True),
    (CHAT, b"data:[DONE]\n\n", True),
    (CHAT, b"event: message\ndata: [DONE]\n\n", True),
    (CHAT, b": note\nid: 7\nretry: 10\ndata: [DONE]\n\n", True),
    (CHAT, b"\xef\xbb\xbfdata: [DONE]\n\n", True),
    (CHAT, b'data: "[DONE]"\n\n', False),
    (CHAT, b"data: [DONE]x\n\n", False),
    (CHAT, b"data: [DONE]\ndata: [DONE]\n\n", False),
    (CHAT, b": [DONE]\n\n", False),
    (CHAT, b"event: [DONE]\ndata: {}\n\n", False),
    (CHAT, sse(CHAT, choice_of(content="[DONE]")), False),
    (CHAT, sse(CHAT, choice_of(finish="stop")), False),
    (MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
    (MESSAGES, b'event: message_stop\ndata: {}\n\n', True),
    (MESSAGES, b'data: {"type":"message_stop"}\n\n', True),
    (MESSAGES, b'data: {"type":"message_stop","more":{"a":1}}\n\n', True),
    (MESSAGES, sse(MESSAGES, MESSAGES_STREAM[10]), False),
    (MESSAGES, sse(MESSAGES, MESSAGES_STREAM[3]), False),
    (MESSAGES, DONE, False),
])
def test_only_a_terminal_event_of_the_protocol_ends_a_stream(protocol, frame, terminal):
    first = proxai.StreamObserver(protocol, 1 << 20)
    first.feed(frame, 0.0)
    assert first.seen.terminal is terminal
    later = watched(protocol, STREAMS[protocol.word][1][0])
    later.feed(frame, 1.0)
    assert later.seen.terminal is terminal


@pytest.mark.parametrize("word", STREAMS)
def test_a_stream_without_its_terminal_event_is_not_whole_and_has_not_failed(word):
    protocol, events = STREAMS[word]
    cut = events[:7] if protocol is CHAT else events[:-1]
    observer = watched(protocol, *cut)
    assert not observer.seen.terminal and not observer.complete and not observer.seen.failed
    observer.feed(sse(protocol, events[-1]).rstrip(b"\n") + b"\n", 99.0)  # its blank line never comes
    assert not observer.seen.terminal


def test_a_chat_stream_is_not_whole_while_a_choice_has_not_finished():
    observer = proxai.StreamObserver(CHAT, 1 << 20, choices=2)
    observer.feed(sse(CHAT, choice_of(0, content="a"), choice_of(1, content="b"),
                      choice_of(0, finish="stop"), choice_of(1, content="c")), 0.0)
    assert not observer.complete
    observer.feed(sse(CHAT, choice_of(1, finish="stop"), DONE), 9.0)
    assert observer.complete and observer.seen.finish == {"stop": 2}


@pytest.mark.parametrize("protocol, event, code, message, param", [
    (RESPONSES, {"type": "error", "sequence_number": 7, "error": {"code": "c", "message": "m", "param": "p"}},
     "c", "m", "p"),
    (RESPONSES, {"type": "error", "sequence_number": 7, "code": "c", "message": "m", "param": "p"},
     "c", "m", "p"),
    (RESPONSES, {"type": "error", "sequence_number": 7, "code": None, "message": "m", "param": None},
     None, "m", None),
    (RESPONSES, {"type": "response.failed", "sequence_number": 7,
                 "response": {**BEGUN, "status": "failed", "error": {"code": "c", "message": "m"}}},
     "c", "m", None),
    (CHAT, {"error": {"code": "c", "message": "m", "param": "p"}}, "c", "m", "p"),
    (CHAT, {"error": {"code": 429, "message": "m"}}, None, "m", None),
    (MESSAGES, {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
     "overloaded_error", "m", None),
], ids=["nested", "flat", "flat, no code", "failed", "chat", "chat, number", "messages"])
def test_an_error_inside_a_stream_is_remembered_with_its_words(protocol, event, code, message, param):
    observer = watched(protocol, STREAMS[protocol.word][1][0], event)
    seen = observer.seen
    assert seen.failed and seen.terminal and not seen.pending
    assert (seen.error_code, seen.error_message, seen.error_param) == (code, message, param)
    assert protocol is not RESPONSES or seen.sequence == 7


MUCH = "much " * 20_000


@pytest.mark.parametrize("protocol, make", [
    (RESPONSES, lambda e: {"type": "error", "error": e}), (CHAT, lambda e: {"error": e}),
    (MESSAGES, lambda e: {"type": "error", "error": e}),
], ids=["responses", "chat", "messages"])
@pytest.mark.parametrize("name", ["message", "code", "param"])
def test_what_is_logged_of_a_providers_error_is_short(protocol, make, name):
    fields = told(protocol, make({"message": "m", name: MUCH}))
    assert len(json.dumps(fields)) < 3000
    assert len(fields["error_message"]) <= 300


@pytest.mark.parametrize("protocol, event", [
    (RESPONSES, {"type": "response.completed", "response": {**ANSWER, **dict.fromkeys(
        ("id", "model", "service_tier", "status"), MUCH)}}),
    (RESPONSES, {"type": "response.completed", "response": {**ANSWER, "reasoning": {"effort": MUCH}}}),
    (RESPONSES, {"type": "response.incomplete", "response": {"incomplete_details": {"reason": MUCH}}}),
    (RESPONSES, {"type": "response.completed", "response": {"output": [{"type": MUCH}, {
        "type": "mcp_call", "name": MUCH, "server_label": MUCH}]}}),
    (CHAT, choice_of(finish=MUCH) | dict.fromkeys(("id", "model", "service_tier"), MUCH)),
    (CHAT, call_part("{", function={"name": MUCH})),
    (MESSAGES, {"type": "message_start", "message": {
        **dict.fromkeys(("id", "model", "stop_reason"), MUCH),
        "usage": {"service_tier": MUCH, "server_tool_use": {MUCH: 1}}}}),
    (MESSAGES, block_start(0, type=MUCH)),
    (MESSAGES, block_start(0, type="tool_use", name=MUCH)),
], ids=["response", "effort", "reason", "output", "chat", "chat call", "message", "block", "tool"])
def test_what_is_logged_of_an_answer_is_short(protocol, event):
    assert len(json.dumps(told(protocol, event))) < 4000


# Contract 7.7: such a part belongs to no call that could be watched.
@pytest.mark.parametrize("more, pending", [
    ({}, 0), ({"item_id": ""}, 0), ({"item_id": None}, 0), ({"item_id": [1]}, 0), ({"output_index": 0}, 1),
    ({"item_id": "", "output_index": 2}, 1),
], ids=["none", "empty", "null", "list", "only a place", "empty, with a place"])
def test_an_argument_delta_without_an_item_id_is_known_by_its_place(more, pending):
    observer = watched(RESPONSES, RESPONSES_STREAM[0],
                       {"type": "response.function_call_arguments.delta", "delta": "{", **more})
    assert len(observer.seen.pending) == pending
    assert not observer.seen.failed


# -- the state of tool calls

def custom_delta(item, kind="custom_tool_call_input"):
    return {"type": f"response.{kind}.delta", "item_id": item, "output_index": 0, "delta": "x"}


def done_of(item, kind="function_call_arguments"):
    return {"type": f"response.{kind}.done", "item_id": item, "output_index": 0}


TEXT = {"type": "response.output_text.delta", "item_id": "m", "output_index": 5,
        "delta": "_arguments. tool_calls"}
JSON_PART = {"type": "input_json_delta", "partial_json": "{"}
STOP = {"type": "content_block_stop"}


@pytest.mark.parametrize("protocol, events, pending", [
    (RESPONSES, [added(WEATHER)], []),
    (RESPONSES, [tool_delta("a")], [0]),
    (RESPONSES, [tool_delta("a"), tool_delta("a"), tool_delta("a")], [2]),
    (RESPONSES, [tool_delta("a"), tool_delta("b", 1)], [0, 1]),
    (RESPONSES, [tool_delta("a"), tool_delta("b", 1), tool_delta("a")], [1, 2]),
    (RESPONSES, [tool_delta("a"), done_of("a")], []),
    (RESPONSES, [tool_delta("a"), tool_delta("b", 1), done_of("a")], [1]),
    (RESPONSES, [tool_delta("a"), done_of("b")], [0]),
    (RESPONSES, [tool_delta("fc_1"), finished(WEATHER)], []),
    (RESPONSES, [tool_delta("fc_1"), finished({**WEATHER, "id": None})], []),
    (RESPONSES, [tool_delta("a"), tool_delta("fc_1", 1), finished(WEATHER, 1)], [0]),
    (RESPONSES, [tool_delta("a"), TEXT, {"type": "response.in_progress", "response": BEGUN}, b": c\n\n",
                 added(SAID, 3), finished(SAID, 3), {"type": "response.new_thing", "item_id": "a"},
                 b"data: no json\n\n"], [0]),
    (RESPONSES, [custom_delta("a"), custom_delta("b", "mcp_call_arguments")], [0, 1]),
    (RESPONSES, [custom_delta("a"), done_of("a", "custom_tool_call_input")], []),
    (RESPONSES, [custom_delta("a", "mcp_call_arguments"), done_of("a", "mcp_call_arguments")], []),
    (RESPONSES, [tool_delta("a"), tool_delta("b", 1), {"type": "response.completed"}], []),
    (RESPONSES, [tool_delta("a"), {"type": "response.incomplete"}], []),
    (RESPONSES, [tool_delta("a"), {"type": "response.failed"}], []),
    (RESPONSES, [tool_delta("a"), {"type": "error", "message": "m"}], []),
    (RESPONSES, [tool_delta("a"), done_of("a"), tool_delta("a")], [2]),
    (CHAT, [CHAT_STREAM[2]], []),
    (CHAT, [CHAT_STREAM[2], call_part("{")], [1]),
    (CHAT, [call_part("{"), call_part("a"), call_part("")], [1]),
    (CHAT, [call_part("{"), call_part("{", 1)], [1]),
    (CHAT, [call_part("{"), call_part("", 1, id="x", function={"name": "f", "arguments": ""})], []),
    (CHAT, [call_part("{", 0, 0), call_part("{", 0, 1)], [0, 1]),
    (CHAT, [call_part("{", 0, 0), call_part("{", 0, 1), choice_of(0, "tool_calls")], [1]),
    (CHAT, [call_part("{"), choice_of(1, "stop")], [0]),
    (CHAT, [call_part("{"), choice_of(content='"tool_calls"'), b": c\n\n",
            {**choice_of(), "choices": [], "usage": CHAT_USAGE}, b"data: no json\n\n"], [0]),
    (CHAT, [call_part("", type="custom", custom={"name": "exec", "input": "x"})], [0]),
    (CHAT, [call_part("{"), choice_of(0, "tool_calls")], []),
    (CHAT, [call_part("{"), DONE], []),
    (CHAT, [call_part("{"), {"error": {"message": "m"}}], []),
    (MESSAGES, [block_start(1, type="tool_use", name="f", input={})], []),
    (MESSAGES, [block_delta(1, type="input_json_delta", partial_json="")], []),
    (MESSAGES, [block_delta(1, **JSON_PART)], [0]),
    (MESSAGES, [block_delta(1, **JSON_PART), block_delta(2, **JSON_PART), block_delta(1, **JSON_PART)],
     [1, 2]),
    (MESSAGES, [block_delta(1, **JSON_PART), {"type": "ping"}, b": c\n\n", MESSAGES_STREAM[3],
                {**STOP, "index": 0}, block_start(2, type="text", text="partial_json"),
                MESSAGES_STREAM[10]], [0]),
    (MESSAGES, [block_delta(1, **JSON_PART), block_delta(2, **JSON_PART), {**STOP, "index": 1}], [1]),
    (MESSAGES, [block_delta(0, **JSON_PART), {**STOP, "index": 0}], []),
    (MESSAGES, [block_delta(1, **JSON_PART), {"type": "message_stop"}], []),
    (MESSAGES, [block_delta(1, **JSON_PART), {"type": "error", "error": {"message": "m"}}], []),
])
def test_a_tool_call_is_pending_from_its_first_argument_part_until_it_is_complete(protocol, events, pending):
    observer = watched(protocol, *events)
    assert sorted(observer.seen.pending.values()) == pending
    if pending:
        assert observer.stall_at(30.0) == pending[0] + 30.0
    together = proxai.StreamObserver(protocol, 1 << 20)  # in one network read: the same calls are pending
    together.feed(sse(protocol, *events), 5.0)
    assert set(together.seen.pending) == set(observer.seen.pending)


@pytest.mark.parametrize("protocol, make", [
    (RESPONSES, lambda n: tool_delta(f"item{n}", n)),
    (RESPONSES, lambda n: added({"type": f"kind{n}", "id": f"item{n}"}, n)),
    (CHAT, lambda n: call_part("{", n, n, function={"name": f"name{n}", "arguments": "{"})),
    (MESSAGES, lambda n: block_delta(n, **JSON_PART)),
    (MESSAGES, lambda n: {"type": "message_delta", "delta": {},
                          "usage": {"server_tool_use": {f"tool{n}_requests": 1}}}),
], ids=["pending items", "kinds", "chat calls", "blocks", "server tools"])
def test_what_is_remembered_of_a_stream_is_bounded(protocol, make):
    seen = watched(protocol, *map(make, range(6000))).seen
    for name in ("pending", "items", "calls", "sources", "finish"):
        assert len(getattr(seen, name)) < 5000


# -- bytes

@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("word", STREAMS)
def test_every_split_of_a_stream_gives_the_same_state(word, end):
    protocol, events = STREAMS[word]
    for stream in (events, events[:9 if word == "messages" else 6]):  # whole, and cut within a tool call
        data = sse(protocol, *stream, ensure_ascii=False).replace(b"\n", end)

        def state(*cuts, data=data):
            observer = proxai.StreamObserver(protocol, 1 << 20)
            passed = [observer.feed(data[a:b], 0.0) for a, b in itertools.pairwise((0, *cuts, len(data)))]
            assert b"".join(passed) + observer.splitter.close() == data
            return state_of(observer)

        expected = state()
        assert expected["terminal"] is (stream is events)
        assert len(expected["pending"]) == (stream is not events)
        assert state(*range(1, len(data))) == expected
        line_ends = [n for m in re.finditer(rb"[\r\n]+", data) for n in range(m.start() - 1, m.end() + 2)]
        for cut in {*line_ends, *range(1, len(data), 13)}:
            assert state(cut) == expected, cut
        rng = random.Random(f"{word}{end!r}")
        for _ in range(50):
            cuts = sorted(rng.sample(range(1, len(data)), rng.randint(2, 30)))
            assert state(*cuts) == expected, cuts


@pytest.mark.parametrize("style", [
    {"separators": (",", ":")}, {"separators": (", ", ": ")}, {"separators": (" , ", " : ")},
    {"separators": (",\t", "  :\t ")}, {"indent": 1}, {"ensure_ascii": False},
], ids=["compact", "spaced", "spaced before", "tabs", "indented", "utf-8"])
@pytest.mark.parametrize("word", STREAMS)
def test_the_way_json_is_written_changes_nothing(word, style):
    protocol, events = STREAMS[word]
    events = [choice_of(finish="stop") if e == choice_of(finish="tool_calls") else e for e in events]
    observer = proxai.StreamObserver(protocol, 1 << 20)
    for event in events:
        if isinstance(event, dict):
            lines = json.dumps(event, **style).encode().split(b"\n")
            event = b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"
        observer.feed(event, 0.0)
    assert state_of(observer) == state_of(watched(protocol, *events))


@pytest.mark.parametrize("word", STREAMS)
def test_bytes_that_are_no_events_harm_nothing(word):
    protocol, events = STREAMS[word]
    odd = [b"\xff\xfe data\n\n", b"data: {\n\n", b"data: [1, \"error\"]\n\n", b"data: null error\n\n",
           b"data: \xff\xff error _arguments. partial_json \"tool_calls\"\n\n",
           b"\n\n\n\n", b"data\n\n", b"data:\n\n", b"event: error\n\n",
           b"data: " + b"[" * 100_000 + b"\n\n", b"data: {\"error\":" + b"9" * 5000 + b"x}\n\n", b"\x00\n\n",
           b'data: {"error":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n\n" if protocol is not CHAT else b"\n\n"]
    observer = watched(protocol, *(part for event in events for part in (*odd, event)))
    assert state_of(observer) == state_of(watched(protocol, *events))


@pytest.mark.parametrize("word", STREAMS)
def test_an_event_of_just_the_limit_is_seen_at_every_split(word):
    protocol, events = STREAMS[word]
    last = sse(protocol, events[-1])
    for cut in range(len(last) + 1):
        observer = proxai.StreamObserver(protocol, len(last))
        assert observer.feed(last[:cut], 0.0) + observer.feed(last[cut:], 0.0) == last
        assert observer.seen.terminal, cut


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_what_follows_an_event_above_the_limit_is_seen_and_all_bytes_pass(end):
    large = b"data: {\"usage\":{\"x\":\"" + b"y" * 400 + b"\"}}\n\n"
    small = sse(CHAT, choice_of(finish="stop"))
    data = (large + small + DONE).replace(b"\n", end)
    for cut in range(1, len(data)):
        observer = proxai.StreamObserver(CHAT, len(small) + 20)
        passed = observer.feed(data[:cut], 0.0) + observer.feed(data[cut:], 0.0)
        assert passed + observer.splitter.close() == data
        assert observer.seen.terminal and observer.seen.finish == {"stop": 1}, cut


def test_the_last_line_of_an_event_above_the_limit_is_not_taken_for_an_event():
    observer = proxai.StreamObserver(CHAT, 100)
    observer.feed(b"data: " + b"x" * 200, 0.0)
    observer.feed(b"\ndata: [DONE]\n\n", 0.0)
    assert not observer.seen.terminal
    observer.feed(DONE, 0.0)
    assert observer.seen.terminal


# -- payloads of wrong types

SWAPS = [None, True, 0, -1, 2.5, math.inf, math.nan, 1 << 70, "", "x", "9" * 20, "\ud800", [], ["x"], [[]],
         [{}], {}, {"type": []}, {"x": {"x": []}}]


def swapped(value):
    """`value` again and again, each time with one of its parts replaced by something else."""
    yield from SWAPS
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: other} for other in swapped(part))
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1:]] for other in swapped(part))


def twice_swapped(value, seed, count):
    """`count` copies of `value` with two parts or more replaced."""
    rng = random.Random(seed)
    once = list(swapped(value))
    for _ in range(count):
        first = rng.choice(once)
        yield rng.choice(list(swapped(first))) if isinstance(first, (dict, list)) else first


def refuse(word):
    raise ValueError(f"{word} is not JSON")


def assert_lines(event, fields):
    """An event can be told to people and to programs, in one line each."""
    line = proxai.json_line(0.0, "info", event, fields)
    assert json.loads(line, parse_constant=refuse)["event"] == event and "\n" not in line
    human = proxai.HumanLines(False, details=True).render(0.0, "info", event, fields)
    assert human.isprintable() and len(human) < 20_000


@pytest.mark.parametrize("word", STREAMS)
def test_events_of_wrong_types_never_raise(word):
    protocol, events = STREAMS[word]
    events = [e for e in events if isinstance(e, dict)]
    errors = [{"type": "error", "error": {"code": "c", "message": "m", "param": ["p"]}, "sequence_number": 3}]
    for event in (*events, *errors):
        name = b"event: %b\ndata: " % event.get("type", "message").encode()
        for odd in (*swapped(event), *twice_swapped(event, word, 40)):
            observer = proxai.StreamObserver(protocol, 1 << 20)
            frame = name + json.dumps(odd).encode() + b"\n\n"
            try:
                observer.feed(frame, 0.0)
                observer.feed(sse(protocol, *events[:4]) + frame, 1.0)
            except Exception as error:
                pytest.fail(f"{error!r} of {odd!r}")
        assert observer.seen.pending == {} or observer.stall_at(1.0) <= 2.0


@pytest.mark.parametrize("protocol, body", [
    (RESPONSES, ANSWER), (RESPONSES, {**ANSWER, "error": {"code": "c", "message": "m", "param": ["p"]}}),
    (CHAT, CHAT_BODY), (CHAT, {"error": {"code": "c", "message": "m", "param": ["p"]}}),
    (MESSAGES, MESSAGES_BODY),
    (MESSAGES, {"type": "error", "error": {"type": "t", "message": "m", "param": ["p"]}}),
], ids=["responses", "responses error", "chat", "chat error", "messages", "messages error"])
def test_bodies_of_wrong_types_never_raise_and_can_be_told(protocol, body):
    for number, odd in enumerate((*swapped(body), *twice_swapped(body, protocol.word, 200))):
        try:
            seen = proxai.observe_body(protocol, odd)
            if number % 5 == 0:
                assert_lines("end", proxai.end_fields(exchange_of(protocol, observed=seen)))
        except Exception as error:
            pytest.fail(f"{error!r} of {odd!r}")


def test_errors_with_params_of_any_type_can_be_told():
    for param in (*swapped({"a": [1]}), "messages[0].content", "x\n\x1b[31m", [["deep"]]):
        for protocol in (RESPONSES, CHAT, MESSAGES):
            fields = told(protocol, {"type": "error", "error": {"code": "c", "message": "m", "param": param}})
            assert_lines("stream-error", fields | {"err": "m"})


# -- identifiers

@pytest.mark.parametrize("clock", [
    [5_000_000] * 50, list(range(5_000_000, 5_000_000 - 50_000, -1000)), [5_000_000 + n for n in range(50)],
    [5_000_000, 9_000_000, 1000, 1000, 9_000_000, 9_000_000, 9_001_000],
], ids=["stands still", "goes back", "too fine", "jumps"])
def test_request_ids_are_unique_and_increase_whatever_the_clock_does(clock, monkeypatch):
    times = iter(clock)
    monkeypatch.setattr(proxai.time, "time_ns", lambda: next(times))
    ids = proxai.RequestIds()
    given = [ids.next() for _ in clock]
    assert given == sorted(set(given))


# -- hints of a request

EVERY_RESPONSES_HINT = {
    "model": "m", "input": "hi", "background": True, "conversation": {"id": "conv_1"}, "store": True,
    "parallel_tool_calls": True, "max_tool_calls": 3, "prompt_cache_key": "k", "prompt": {"id": "pmpt_1"},
    "prompt_cache_retention": "24h", "instructions": "be nice", "metadata": {"a": "b"},
    "safety_identifier": "u", "temperature": 0.7, "top_p": 0.9, "top_logprobs": 5, "truncation": "auto",
    "stream_options": {"include_obfuscation": False}, "service_tier": "flex",
    "reasoning": {"summary": "detailed"}, "previous_response_id": "resp_0123456789abcdef",
    "tool_choice": "required", "include": ["reasoning.encrypted_content"],
    "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": {}}},
    "tools": [{"type": "function", "name": "lookup"}]}
EVERY_CHAT_HINT = {
    "model": "m", "messages": [], "parallel_tool_calls": True, "store": True, "prompt_cache_key": "k",
    "metadata": {"a": "b"}, "safety_identifier": "u", "temperature": 0.7, "top_p": 0.9, "top_logprobs": 5,
    "logprobs": True, "n": 2, "stream_options": {"include_usage": True, "include_obfuscation": False},
    "service_tier": "priority", "verbosity": "high", "tool_choice": "none",
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "lookup"}}]}
EVERY_MESSAGES_HINT = {
    "model": "m", "messages": [], "max_tokens": 5, "container": "container_1", "metadata": {"user_id": "u"},
    "service_tier": "standard_only", "output_config": {"effort": "high"}, "system": "be nice",
    "temperature": 0.7, "top_k": 40, "top_p": 0.9, "stop_sequences": ["x"], "tool_choice": {"type": "any"},
    "thinking": {"type": "adaptive"}, "tools": [{"name": "lookup", "input_schema": {}}]}


def hints_of(protocol, **body):
    return proxai.request_hints(protocol, {"model": "m", **body})


@pytest.mark.parametrize("protocol, body, expected", [
    (RESPONSES, EVERY_RESPONSES_HINT, [
        "bg", "conv", "ptc", "store", "mtc:3", "pck", "prompt", "pcr:24h", "instr", "meta", "sid", "temp:0.7",
        "top_p:0.9", "tlp:5", "tr:auto", "so:no-obf", "tier:flex", "rs:detailed", "prev=...89abcdef",
        "tc:required", "include[rsn.enc]", "tv:low", "tf:json_schema", "tools[f:1(lookup)]"]),
    (CHAT, EVERY_CHAT_HINT, [
        "ptc", "store", "pck", "meta", "sid", "temp", "top_p", "tlp", "logprobs", "n:2", "so:usage",
        "so:no-obf", "tier:priority", "v:high", "tc:none", "rf:json_object", "tools[f:1(lookup)]"]),
    (MESSAGES, EVERY_MESSAGES_HINT, [
        "container", "meta", "tier:standard_only", "output_config", "system", "temp", "top_k", "top_p",
        "stop", "tc:any", "think:adaptive", "tools[c:1(lookup)]"]),
], ids=["responses", "chat", "messages"])
def test_hints_come_in_the_order_of_the_contract(protocol, body, expected):
    for shuffled in (body, dict(reversed(body.items()))):
        found = proxai.request_hints(protocol, shuffled)
        if protocol is not RESPONSES:  # whether these four have values is left open there
            found = [re.sub(r"^(temp|top_p|top_k|tlp):[0-9.]+$", r"\1", token) for token in found]
        assert found == expected


@pytest.mark.parametrize("protocol, body", [
    (RESPONSES, {"service_tier": "auto", "reasoning": {"summary": "auto"}, "tools": [], "include": [],
                 "text": {"format": {"type": "text"}}, "stream_options": {"include_obfuscation": True}}),
    (RESPONSES, {"service_tier": "default", "background": False, "parallel_tool_calls": False,
                 "stream_options": None, "reasoning": None, "text": None}),
    (RESPONSES, dict.fromkeys(EVERY_RESPONSES_HINT)),
    (RESPONSES, {}),
    (CHAT, {"n": 1, "service_tier": "auto", "logprobs": False, "stream_options": {"include_usage": False}}),
    (CHAT, {"service_tier": "default", "response_format": None}),
    (CHAT, dict.fromkeys(EVERY_CHAT_HINT)),
    (MESSAGES, dict.fromkeys(EVERY_MESSAGES_HINT)),
    (MESSAGES, {"stream": True, "max_tokens": 5}),
])
def test_defaults_and_null_give_no_hints(protocol, body):
    assert hints_of(protocol, **body) == []


@pytest.mark.parametrize("protocol, body, expected", [
    (RESPONSES, {"temperature": 0, "top_p": 1, "top_logprobs": 0}, ["temp:0", "top_p:1", "tlp:0"]),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, ["tf:json_object"]),
    (RESPONSES, {"include": ["file_search_call.results", "reasoning.encrypted_content"]},
     ["include[file_search_call.results,rsn.enc]"]),
    (RESPONSES, {"include": ["message.input_image.image_url"]}, ["include[message.input_image.image_url]"]),
    (RESPONSES, {"tool_choice": "auto"}, ["tc:auto"]),
    (RESPONSES, {"tool_choice": {"type": "function", "name": "lookup"}}, ["tc:function:lookup"]),
    (RESPONSES, {"tool_choice": {"type": "custom", "name": "exec"}}, ["tc:custom:exec"]),
    (RESPONSES, {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{}, {}]}},
     ["tc:allowed_tools:2"]),
    (CHAT, {"tool_choice": "required"}, ["tc:required"]),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "lookup"}}}, ["tc:function:lookup"]),
    (CHAT, {"tool_choice": {"type": "custom", "custom": {"name": "exec"}}}, ["tc:custom:exec"]),
    (CHAT, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}, {}]}}},
     ["tc:allowed_tools:2"]),
    (CHAT, {"response_format": {"type": "text"}}, ["rf:text"]),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "secret"}}},
     ["rf:json_schema"]),
    (MESSAGES, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ["tc:auto"]),
    (MESSAGES, {"tool_choice": {"type": "none"}}, ["tc:none"]),
    (MESSAGES, {"tool_choice": {"type": "tool", "name": "lookup"}}, ["tc:tool:lookup"]),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 9000}}, ["think:legacy_enabled"]),
    (MESSAGES, {"thinking": {"type": "disabled"}}, ["think:disabled"]),
    (MESSAGES, {"service_tier": "auto", "tool_choice": {"type": "tool", "name": "grab"},
                "thinking": {"type": "adaptive"}, "tools": [{"name": "grab"}]},
     ["tier:auto", "tc:tool:grab", "think:adaptive", "tools[c:1(grab)]"]),
])
def test_the_forms_of_a_hint(protocol, body, expected):
    assert hints_of(protocol, **body) == expected


LONG_NAME = "mcp__some_server_of_mine__a_tool_with_all_the_letters_it_may_have"[:64]


@pytest.mark.parametrize("protocol, tools, expected", [
    (RESPONSES, [{"type": "tool_search"}, {"type": "namespace", "name": "ns1"}, {"type": "apply_patch"},
                 {"type": "local_shell"}, {"type": "shell"}, {"type": "image_generation"},
                 {"type": "code_interpreter"}, {"type": "computer_use_preview"}, {"type": "file_search"},
                 {"type": "web_search_preview"}, {"type": "custom", "name": "exec"},
                 {"type": "mcp", "server_label": "wiki"}, {"type": "function", "name": "b"},
                 {"type": "function", "name": "a"}],
     "f:2(a,b);mcp:1(wiki);c:1(exec);web;fs;pc;code;img;sh:2;patch;ns:1(ns1);tool_search"),
    (RESPONSES, [{"type": "web_search"}, {"type": "web_search"}], "web:2"),
    (RESPONSES, [{"type": "mcp", "server_label": "wiki", "allowed_tools": ["search", "ask"]}],
     "mcp:1(wiki/ask,wiki/search)"),
    (RESPONSES, [{"type": "mcp", "server_label": "wiki", "allowed_tools": {"tool_names": ["ask"]}}],
     "mcp:1(wiki/ask)"),
    (RESPONSES, [{"type": "mcp", "server_label": "wiki", "allowed_tools": {"read_only": True}}],
     "mcp:1(wiki[ro])"),
    (RESPONSES, [{"type": "mcp", "server_label": "wiki", "allowed_tools": {"read_only": False}}],
     "mcp:1(wiki[rw])"),
    (RESPONSES, [{"type": "mcp", "server_label": "wiki", "require_approval": "never", "authorization": "key",
                  "server_url": "https://h/?key=key", "headers": {"k": "key"}}], "mcp:1(wiki)"),
    (RESPONSES, [{"type": "function", "name": n} for n in ("terminal", "grep", "grep", "lookup")],
     "f:4(lookup,rg,sh)"),
    (RESPONSES, [{"type": "function", "name": LONG_NAME}], f"f:1({LONG_NAME})"),
    (RESPONSES, [{"type": "function"}], "f"),
    (CHAT, [{"type": "custom", "custom": {"name": "exec"}},
            {"type": "function", "function": {"name": "read_file"}},
            {"type": "function", "function": {"name": "edit_file"}}], "f:2(e,r);c:1(exec)"),
    (MESSAGES, [{"type": "tool_search_tool_bm25_20251119"}, {"type": "web_search_20250305"},
                {"type": "web_fetch_20250910"}, {"type": "text_editor_20250728"}, {"type": "memory_20250818"},
                {"type": "code_execution_20250825"}, {"type": "bash_20250124"}, {"name": "b"},
                {"type": "custom", "name": "a"}],
     "c:2(a,b);bash;code;mem;edit;web_fetch;web;tool_search"),
    (MESSAGES, [{"name": "a b\nc"}, {"name": "\x1b[31m"}], "c:2(?)"),
])
def test_the_tools_of_a_request_by_category(protocol, tools, expected):
    assert hints_of(protocol, tools=tools) == [f"tools[{expected}]"]


def test_the_aliases_of_tools():
    names = ("copy_path create_directory delete_path diagnostics edit_file fetch find_path grep"
             " list_directory move_path now open read_file restore_file_from_disk save_file skill spawn_agent"
             " terminal write_file").split()
    aliases = "cp mkdir rm diag e fetch fd rg ls mv t o r restore save sk spawn sh w".split()
    for name, alias in zip(names, aliases, strict=True):
        assert hints_of(MESSAGES, tools=[{"name": name}]) == [f"tools[c:1({alias})]"]


HINTED = {
    "responses": (
        "background conversation parallel_tool_calls store max_tool_calls prompt_cache_key prompt"
        " prompt_cache_retention instructions metadata safety_identifier temperature top_p top_logprobs"
        " truncation stream_options stream_options/include_obfuscation service_tier reasoning"
        " reasoning/summary reasoning/effort previous_response_id tool_choice tool_choice/type include text"
        " text/verbosity text/format text/format/type max_output_tokens stream input tools"),
    "chat": (
        "parallel_tool_calls store prompt_cache_key metadata safety_identifier temperature top_p top_logprobs"
        " logprobs n stream_options stream_options/include_usage service_tier verbosity tool_choice"
        " tool_choice/type response_format response_format/type reasoning_effort max_completion_tokens stream"
        " messages tools"),
    "messages": (
        "container metadata service_tier output_config output_config/effort system temperature top_k top_p"
        " stop_sequences tool_choice tool_choice/type thinking thinking/type max_tokens stream messages"
        " tools"),
}


def placed(path, value):
    """An object with `value` at the place that `path` says."""
    for name in reversed(path.split("/")):
        value = {name: value}
    return value


@pytest.mark.parametrize("text", [
    "Tell nobody: LEAKED-7 is the plan", "ghp_LEAKED-7abcdefghijklmnopqrstuvwxyz01",
    "sk-proj-LEAKED-7" + "a1B2" * 12, "https://user:LEAKED-7@host/path", "LEAKED-7\nname",
    "ends with\x1b[0m LEAKED-7 and more",
], ids=["prompt", "short key", "long key", "url", "lines", "escape"])
@pytest.mark.parametrize("word", HINTED)
def test_hints_never_show_content(word, text):
    protocol = STREAMS[word][0]
    for path in HINTED[word].split():
        for value in (text, [text], {"type": text}, {text: text}, [{"type": text, "text": text}],
                      {"tools": text}, {"type": "function", "description": text},
                      [{"type": "mcp", "server_url": text, "headers": {"k": text}}]):
            body = {"model": "m", **placed(path, value)}
            fields = proxai.fwd_fields(exchange_of(protocol, body=body))
            assert "LEAKED-7" not in json.dumps(fields), (path, value)


@pytest.mark.parametrize("protocol, body", [
    (RESPONSES, EVERY_RESPONSES_HINT), (CHAT, EVERY_CHAT_HINT), (MESSAGES, EVERY_MESSAGES_HINT),
], ids=["responses", "chat", "messages"])
def test_requests_of_wrong_types_never_raise_and_can_be_told(protocol, body):
    tools = [{"type": "mcp", "server_label": "w", "allowed_tools": {"tool_names": ["a"], "read_only": True}},
             {"type": "function", "name": "a", "function": {"name": "b"}}]
    choices = [{"type": "function", "name": "a"}, {"type": "allowed_tools", "allowed_tools": {"tools": [{}]}}]
    bodies = [body, {"tools": tools}, *({"tool_choice": c} for c in choices)]
    odd_ones = [odd for b in bodies for odd in (*swapped(b), *twice_swapped(b, protocol.word, 100))]
    for number, odd in enumerate(odd_ones):
        if isinstance(odd, dict):
            try:
                fields = proxai.fwd_fields(exchange_of(protocol, body=odd))
                if number % 5 == 0:
                    assert_lines("fwd", fields)
            except Exception as error:
                pytest.fail(f"{error!r} of {odd!r}")


def test_a_value_as_deep_as_the_reader_takes_is_no_problem_for_hints():
    depth = sys.getrecursionlimit() - len(list(iter_frames())) - 20
    deep = json.loads("[" * depth + "]" * depth)
    body = {**EVERY_RESPONSES_HINT, "temperature": deep, "tool_choice": {"type": deep},
            "previous_response_id": deep, "tools": [{"type": deep, "name": deep}], "include": [deep]}
    exchange = exchange_of(RESPONSES, body=body)

    def from_below(levels):
        return from_below(levels - 1) if levels else proxai.fwd_fields(exchange)

    assert "instr" in from_below(60)["request_hint_parts"]


def iter_frames():
    """The frames of this call, from the inside."""
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back



# ============================================================================
#  11  Logs
# ============================================================================

@pytest.fixture
def half_past(monkeypatch):
    """The moment at which exchanges of this file have lasted 5.5 seconds."""
    monkeypatch.setattr(proxai.time, "perf_counter", lambda: 105.5)


def human(event, fields, level="info", color=False, **options):
    """The line for people, without its clock."""
    line = proxai.HumanLines(color, details=True, **options).render(1778228311.25, level, event, fields)
    assert re.match(r"\d\d:\d\d:\d\d\.250 ", line)
    return line[13:]


# -- fields

def test_fwd_tells_programs_all_about_a_request():
    exchange = exchange_of(MESSAGES, CHAT, provider="anthropic", route="mimo", provider_bytes=1990, body={
        "seed": 1, "stream": True, "max_tokens": 64, "temperature": 0.5, "reasoning_effort": "high"})
    assert proxai.fwd_fields(exchange) == {
        "request_id": "1778228311188", "method": "POST", "path": "/v1/chat/completions",
        "provider_request_bytes": 1990, "inbound_request_bytes": 2000, "request_delta_bytes": -10,
        "request_protocol": "openai_chat_completions", "provider": "anthropic", "route_name": "mimo",
        "provider_protocol": "anthropic_messages",
        "translation": "openai_chat_completions->anthropic_messages", "request_protocol_alias": "chat",
        "translation_alias": "chat->ant", "provider_protocol_alias": "ant", "model": "up-model",
        "reasoning_effort": "high", "stream": True, "max_output_tokens": 64,
        "request_hints": "temp:0.5", "request_hint_parts": ["temp:0.5"]}


@pytest.mark.parametrize("protocol, body, effort, most, stream", [
    (RESPONSES, {"reasoning": {"effort": "xhigh"}, "max_output_tokens": 9, "stream": False},
     "xhigh", 9, False),
    (RESPONSES, {}, None, None, None),
    (CHAT, {"reasoning_effort": "none", "max_completion_tokens": 7, "max_tokens": 5, "stream": None},
     "none", 7, None),
    (CHAT, {"max_tokens": 5, "stream": True}, None, 5, True),
    (MESSAGES, {"output_config": {"effort": "max"}, "thinking": {"type": "enabled"}, "max_tokens": 5},
     "max", 5, None),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, "adaptive", None, None),
    (MESSAGES, {"thinking": {"type": "disabled"}, "max_tokens": True}, "disabled", None, None),
    (MESSAGES, {"output_config": {"format": {}}, "max_tokens": "5"}, None, None, None),
])
def test_effort_limit_and_stream_of_a_request(protocol, body, effort, most, stream):
    fields = proxai.fwd_fields(exchange_of(protocol, body=body))
    assert [fields[k] for k in ("reasoning_effort", "max_output_tokens", "stream")] == [effort, most, stream]
    assert (fields["translation"], fields["translation_alias"], fields["route_name"]) == ("", "", None)


COMMON_FIELDS = {"request_id": "1778228311188", "status": 200, "ttfb_ms": 1200, "duration_ms": 5500,
                 "down": 4096, "chunks": 16, "avg_chunk_bytes": 256, "ct": "text/event-stream", "sse": True}


@pytest.mark.parametrize("word, expected, absent", [
    ("responses", RESPONSES_TOLD | {"seq": 10, "rate_limit_limit_requests": 50},
     {"cache_read", "cache_creation", "stop_reason", "stop_reasons", "finish_reasons"}),
    ("chat", CHAT_TOLD, {"cache_read", "cache_creation", "stop_reason", "response_status", "seq"}),
    ("messages", MESSAGES_TOLD, {"cache", "reasoning", "finish_reasons", "response_status", "seq"}),
])
def test_end_tells_programs_the_whole_story(word, expected, absent, half_past):
    protocol, events = STREAMS[word]
    rates = [proxai.Field(b"x-ratelimit-limit-requests", b"50", b"")]
    fields = proxai.end_fields(exchange_of(protocol, observed=watched(protocol, *events).seen, rates=rates))
    expected = COMMON_FIELDS | expected
    assert {name: fields.get(name) for name in expected} == expected
    assert not absent & fields.keys() and not {"lat", "resp", "tok[", "up_text", "out"} & fields.keys()
    line = json.loads(proxai.json_line(0.0, "info", "end", fields))
    assert {name: line[name] for name in expected} == expected


def test_end_of_an_exchange_that_never_got_anywhere_can_be_told():
    exchange = proxai.Exchange(7, "-", "-", 100.0)
    exchange.status, exchange.error = 400, "no request"
    assert_lines("request-failed", proxai.end_fields(exchange))
    assert human("request-failed", proxai.end_fields(exchange), "warn").endswith(" req=7 no request")


@pytest.mark.parametrize("headers, expected", [
    ({"x-ratelimit-limit-requests": "5000", "x-ratelimit-remaining-requests": "0"},
     {"rate_limit_limit_requests": 5000, "rate_limit_remaining_requests": 0}),
    ({"x-ratelimit-limit-tokens": "160000", "x-ratelimit-remaining-tokens": "159976"},
     {"rate_limit_limit_tokens": 160000, "rate_limit_remaining_tokens": 159976}),
    ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"},
     {"rate_limit_reset_requests_ms": 1000, "rate_limit_reset_tokens_ms": 360000}),
    ({"x-ratelimit-reset-requests": "20ms"}, {"rate_limit_reset_requests_ms": 20}),
    ({"x-ratelimit-reset-requests": "8.64s"}, {"rate_limit_reset_requests_ms": 8640}),
    ({"x-ratelimit-reset-tokens": "1h2m3s"}, {"rate_limit_reset_tokens_ms": 3723000}),
    ({"x-ratelimit-reset-tokens": "2m59.56s"}, {"rate_limit_reset_tokens_ms": 179560}),
    ({"x-codex-primary-used-percent": "42.5", "x-codex-primary-reset-after-seconds": "600",
      "x-codex-primary-window-minutes": "300", "x-codex-secondary-used-percent": "7",
      "x-codex-secondary-reset-after-seconds": "86400", "x-codex-secondary-window-minutes": "10080",
      "x-codex-primary-over-secondary-limit-percent": "1"},
     {"codex_primary_used_percent": 42.5, "codex_primary_reset_after_secs": 600,
      "codex_primary_window_minutes": 300, "codex_secondary_used_percent": 7,
      "codex_secondary_reset_after_secs": 86400, "codex_secondary_window_minutes": 10080,
      "codex_primary_over_secondary_percent": 1}),
    ({"x-ratelimit-limit-requests": "many", "x-ratelimit-remaining-tokens": "-1",
      "x-ratelimit-reset-tokens": "soon", "x-ratelimit-limit-tokens": "",
      "x-codex-primary-used-percent": "nan", "x-codex-secondary-used-percent": "1e3"}, {}),
    ({"x-ratelimit-limit-images": "5", "x-request-id": "5", "retry-after": "5"}, {}),
    ({}, {}),
], ids=["requests", "tokens", "resets", "ms", "fraction", "hours", "minutes", "codex", "not numbers",
        "others", "none"])
def test_rate_limits_are_read_from_headers(headers, expected):
    fields = [proxai.Field(name.encode(), value.encode(), b"") for name, value in headers.items()]
    assert proxai.rate_fields(fields) == expected


@pytest.mark.parametrize("value", [
    b"9" * 400, b"9" * 5000, b"9" * 400 + b"s", b"1..2s", b".s", b"1s" * 5000, b"\xb2s", b"\xb2", b"0",
    b"1.2.3", b"9" * 400 + b".5", b"inf", b"-0s"], ids=lambda v: ascii(v[:9]))
@pytest.mark.parametrize("name", ["x-ratelimit-limit-requests", "x-ratelimit-reset-tokens",
                                  "x-codex-primary-used-percent", "x-codex-primary-reset-after-seconds",
                                  "x-codex-primary-over-secondary-limit-percent"])
def test_rate_limits_that_nobody_can_mean_harm_nothing(name, value):
    rates = [proxai.Field(b"x-codex-primary-used-percent", b"1", b""),
             proxai.Field(name.encode(), value, b"")]
    assert_lines("end", proxai.end_fields(exchange_of(RESPONSES, rates=rates)))


# -- formats

@pytest.mark.parametrize("function, value, expected", [
    ("count_text", 0, "0"), ("count_text", 999, "999"), ("count_text", 1000, "1.0K"),
    ("count_text", 4096, "4.1K"), ("count_text", 1_000_000, "1.0M"),
    ("bytes_text", 0, "0B"), ("bytes_text", 256, "256B"), ("bytes_text", 1023, "1023B"),
    ("bytes_text", 1024, "1.0KB"), ("bytes_text", 2048, "2.0KB"), ("bytes_text", 3 << 19, "1.5MB"),
    ("secs_text", 5500, "5.5s"), ("secs_text", 12345, "12.345s"), ("secs_text", 5000, "5s"),
    ("secs_text", 0, "0s"), ("secs_text", 7, "0.007s"), ("secs_text", 10_000, "10s"),
    ("secs_text", 100_000, "100s"),
    ("span_text", 3723, "1h2m3s"), ("span_text", 59, "59s"), ("span_text", 0, "0s"), ("span_text", 300, "5m"),
    ("base36", 0, "0"), ("base36", 35, "z"), ("base36", 36, "10"),
    ("short_id", "1778228311188", "wn82ac"), ("short_id", "request-abcdef", "abcdef"),
    ("short_id", "36", "10"), ("short_id", "", ""),
])
def test_formats_of_numbers_and_ids(function, value, expected):
    assert getattr(proxai, function)(value) == expected


# -- lines for people

@pytest.mark.parametrize("exchange, expected", [
    (exchange_of(RESPONSES, body={"stream": True, "max_output_tokens": 4096, "reasoning": {"effort": "high"},
                                  "instructions": "i", "tool_choice": "auto", "input": "hi", "tools": [
                                      {"type": "function", "name": n} for n in ("terminal", "grep")]}),
     " INFO fwd  POST /v1/responses ↑2.0KB up-model/high resp->openai/resp stream max=4096 instr tc:auto"
     " tools[f:2(rg,sh)] req=wn82ac"),
    (exchange_of(CHAT, provider="minimax_chat", route="a route", provider_bytes=100, body={
        "max_completion_tokens": 256, "parallel_tool_calls": True, "messages": []}),
     " INFO fwd  POST /v1/chat/completions ↑100B up-model chat->minimax_chat/chat max=256 ptc req=wn82ac"),
    (exchange_of(MESSAGES, CHAT, provider="anthropic", body={
        "max_tokens": 64, "stream": False, "reasoning_effort": "low", "n": 1, "parallel_tool_calls": True,
        "tools": [{"type": "function", "function": {"name": "look"}}]}),
     " INFO fwd  POST /v1/chat/completions ↑2.0KB up-model/low chat->anthropic/ant max=64 ptc"
     " tools[f:1(look)] req=wn82ac"),
    (exchange_of(MESSAGES, path="/messages", provider="my_default_thing"),
     " INFO fwd  POST /messages ↑2.0KB up-model ant->my_default_thing/ant req=wn82ac"),
], ids=["responses", "chat", "translated", "bare"])
def test_the_line_of_a_request_on_its_way(exchange, expected):
    assert human("fwd", proxai.fwd_fields(exchange)) == expected


def seen_in(protocol, *events):
    """What an observer knows after a stream."""
    return watched(protocol, *events).seen


RATES = [proxai.Field(name.encode(), value.encode(), b"") for name, value in {
    "x-ratelimit-limit-requests": "5000", "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-reset-requests": "1s", "x-ratelimit-limit-tokens": "160000",
    "x-ratelimit-reset-tokens": "6m3s",
    "x-codex-primary-used-percent": "42.5", "x-codex-primary-reset-after-seconds": "600",
    "x-codex-primary-window-minutes": "300", "x-codex-secondary-used-percent": "7",
    "x-codex-primary-over-secondary-limit-percent": "1"}.items()]
ENDS = "200 lat[1.2s/5.5s] ↑2.0KB ↓4.0KB"


@pytest.mark.parametrize("event, level, make, expected", [
    ("end", "info", lambda: exchange_of(
        RESPONSES, observed=seen_in(RESPONSES, *RESPONSES_STREAM), rates=RATES),
     f" INFO end  {ENDS} tok[↑1.0K ↓4.1K Σ5.6K $500 ?96] gpt-5.5/high resp->openai/resp stream[16/256B]"
     " state=completed tier=priority rl[r:0/5.0K t:-/160.0K rr:1s rt:6m3s]"
     " codex[p:42.5%/5h@10m s:7.0% p/s:1.0%] resp=...89abcdef seq=10 out[fn:1,m:1]"
     " calls[get_weather:1] req=wn82ac"),
    ("end", "info", lambda: exchange_of(RESPONSES, observed=seen_in(RESPONSES, {
        "type": "response.incomplete", "sequence_number": 0, "response": {
            "id": "resp_1", "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"},
            "service_tier": "default", "output": [SAID]}})),
     f" INFO end  {ENDS} up-model resp->openai/resp stream[16/256B] state=incomplete inc=max_output_tokens"
     " resp=...resp_1 seq=0 req=wn82ac"),
    ("end", "info", lambda: exchange_of(CHAT, provider="minimax_chat", observed=seen_in(
        CHAT, CHAT_STREAM[0], choice_of(finish="stop"), CHAT_STREAM[8], DONE)),
     f" INFO end  {ENDS} tok[↑60 ↓20 Σ120 $40 ?5] gpt-4.1 chat->minimax_chat/chat stream[16/256B]"
     " resp=...3456789a req=wn82ac"),
    ("end", "info", lambda: exchange_of(MESSAGES, provider="anthropic",
                                        observed=seen_in(MESSAGES, *MESSAGES_STREAM)),
     f" INFO end  {ENDS} tok[↑10 ↓20 Σ60 $r25 $w5] claude-x ant->anthropic/ant stream[16/256B]"
     " resp=...89abcdef out[txt:1,tu:1] calls[get_weather:1] req=wn82ac"),
    ("end", "info", lambda: exchange_of(
        MESSAGES, CHAT, provider="anthropic", sse=False, content_type=b"application/json", chunks=0,
        observed=proxai.observe_body(MESSAGES, {**MESSAGES_BODY, "content": [{"type": "text"}]})),
     f" INFO end  {ENDS} tok[↑10 ↓20 Σ60 $r25 $w5] claude-x chat->anthropic/ant application/json"
     " tier=priority resp=...89abcdef calls[web_search:1] req=wn82ac"),
    ("closed", "info", lambda: exchange_of(CHAT, observed=seen_in(CHAT)),
     f" INFO closed  {ENDS} up-model chat->openai/chat stream[16/256B] req=wn82ac"),
    ("closed", "info", lambda: exchange_of(
        CHAT, head_at=0.0, status=0, down=0, chunks=0, sse=False, content_type=None),
     " INFO closed  dur=5.5s ↑2.0KB up-model chat->openai/chat req=wn82ac"),
    ("stream-error", "warn", lambda: exchange_of(
        RESPONSES, error="the tool went wrong", observed=seen_in(RESPONSES, {
            "type": "error", "sequence_number": 4,
            "error": {"code": "server_error", "message": "m", "param": "input"}})),
     f" WARN stream-error  {ENDS} up-model resp->openai/resp stream[16/256B] err=server_error param=input"
     " seq=4 req=wn82ac the tool went wrong"),
    ("stream-error", "warn", lambda: exchange_of(CHAT, error="m", observed=seen_in(CHAT, {
        "error": {"code": "c", "message": "m", "param": "messages[0].content"}})),
     f" WARN stream-error  {ENDS} up-model chat->openai/chat stream[16/256B] err=c param=messages[0].content"
     " req=wn82ac m"),
    ("stream-error", "warn", lambda: exchange_of(MESSAGES, error="Overloaded", observed=seen_in(MESSAGES, {
        "type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})),
     f" WARN stream-error  {ENDS} up-model ant->openai/ant stream[16/256B] err=overloaded_error"
     " req=wn82ac Overloaded"),
    ("timeout", "warn", lambda: exchange_of(MESSAGES, error="silent for 120 s", observed=seen_in(MESSAGES)),
     f" WARN timeout  {ENDS} up-model ant->openai/ant stream[16/256B] req=wn82ac silent for 120 s"),
    ("unfinished-tool", "warn", lambda: exchange_of(RESPONSES, error="ended early", observed=seen_in(
        RESPONSES, added({**WEATHER, "id": "fc_9"}))),
     f" WARN unfinished-tool  {ENDS} up-model resp->openai/resp stream[16/256B] out[fn:1]"
     " calls[get_weather:1] req=wn82ac ended early"),
    ("hdr", "info", lambda: exchange_of(CHAT, sse=False, content_type=b"application/json", down=0, chunks=0),
     " INFO hdr  200 application/json req=wn82ac"),
], ids=["responses", "responses, one message", "chat", "messages", "not a stream", "closed", "closed early",
        "responses error", "chat error", "messages error", "timeout", "unfinished tool", "hdr"])
def test_the_line_that_ends_an_exchange(event, level, make, expected, half_past):
    assert human(event, proxai.end_fields(make()), level) == expected


@pytest.mark.parametrize("items, expected", [
    ({"message": 1}, ""), ({"text": 1}, ""), ({}, ""), (None, ""), ({"message": 2}, " out[m:2]"),
    ({"message": 1, "reasoning": 1}, " out[m:1,rsn:1]"), ({"stream_text": 3, "message": 1}, ""),
    ({"custom_tool_call": 1, "mcp_call": 1, "web_search_call": 1, "file_search_call": 1, "computer_call": 1,
      "code_interpreter_call": 1, "image_generation_call": 1, "tool_use": 1, "server_tool_use": 1,
      "thinking": 1, "unheard_of": 1},
     " out[ct:1,mcp:1,web:1,file:1,comp:1,code:1,img:1,tu:1,stu:1,think:1,unheard_of:1]"),
])
def test_output_items_are_told_unless_it_is_the_usual_one(items, expected, half_past):
    fields = proxai.end_fields(exchange_of(RESPONSES)) | {"output_items": items}
    line = f" INFO end  {ENDS} up-model resp->openai/resp stream[16/256B]{expected} req=wn82ac"
    assert human("end", fields) == line


def test_the_line_of_a_silent_stream():
    fields = {"request_id": "1778228311188", "method": "POST", "path": "/v1/responses", "idle_ms": 5000,
              "duration_ms": 42_000, "chunks": 3, "down": 2048}
    assert human("wait", fields) == " INFO wait  idle=5s dur=42s ↓2.0KB chunks=3 req=wn82ac"


def test_an_event_without_a_layout_tells_its_fields_in_order():
    fields = {"zebra": "z", "apple": 1, "path": "a b"}
    assert human("recv", fields, "debug") == "DEBUG recv  zebra=z apple=1 path=a b"
    assert human("capture_failed", {"kind": "k"}, "error") == "ERROR capture_failed  kind=k"
    assert human("listen", {"port": 1}, "trace") == "TRACE listen  port=1"


def test_people_see_the_head_of_an_answer_only_where_details_are_wanted():
    fields = proxai.end_fields(exchange_of(CHAT))
    assert proxai.HumanLines(False).render(0.0, "info", "hdr", fields) is None
    assert proxai.HumanLines(False, details=True).render(0.0, "info", "hdr", fields)
    assert "hdr" in proxai.json_line(0.0, "info", "hdr", fields)


# -- colours

COLORS = {"31": "red", "32": "green", "33": "yellow", "34": "blue", "36": "cyan", "2": "dim", "1": "bold"}


def painted(line):
    """The pieces of a line that have a colour: text -> its words of colour."""
    return {text.strip(): {COLORS.get(code, code) for code in codes.split(";")}
            for codes, text in re.findall(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0?m", line)}


@pytest.mark.parametrize("level, expected", [
    ("info", {"green", "bold"}), ("warn", {"yellow", "bold"}), ("error", {"red", "bold"}),
    ("debug", {"blue"}), ("trace", {"dim"})])
def test_the_colour_of_a_level(level, expected):
    assert painted(human("some", {"a": 1}, level, True))[level.upper()] == expected


@pytest.mark.parametrize("event, level, color", [
    ("fwd", "info", "cyan"), ("hdr", "info", "blue"), ("wait", "info", "yellow"),
    ("closed", "info", "yellow"),
    ("end", "info", "green"), ("stream-error", "warn", "red"), ("timeout", "warn", "red"),
    ("hdr-error", "warn", "red"), ("unfinished-tool", "warn", "red")])
def test_the_colour_of_an_event(event, level, color):
    fields = proxai.end_fields(exchange_of(CHAT)) | proxai.fwd_fields(exchange_of(CHAT)) | {"idle_ms": 1}
    assert painted(human(event, fields, level, True))[event] == {color, "bold"}


@pytest.mark.parametrize("status, color", [(200, "green"), (299, "green"), (300, "yellow"), (399, "yellow"),
                                           (400, "red"), (503, "red")])
def test_the_colour_of_a_status(status, color):
    line = human("end", proxai.end_fields(exchange_of(CHAT, status=status)), color=True)
    assert painted(line)[str(status)] == {color, "bold"}


@pytest.mark.parametrize("state, color", [
    ("completed", "green"), ("incomplete", "yellow"), ("cancelled", "yellow"), ("failed", "red")])
def test_the_colour_of_a_state(state, color):
    fields = proxai.end_fields(exchange_of(RESPONSES)) | {"response_status": state}
    assert color in painted(human("end", fields, color=True))[state]


@pytest.mark.parametrize("ttfb, duration, colors", [
    (0, 0, {"green"}), (100, 1999, {"green"}), (100, 2000, {"yellow", "bold"}),
    (100, 2999, {"yellow", "bold"}), (100, 3000, {"red", "bold"}), (2500, 100, {"yellow", "bold"})])
def test_the_colour_of_a_duration(ttfb, duration, colors):
    fields = proxai.end_fields(exchange_of(CHAT)) | {"ttfb_ms": ttfb, "duration_ms": duration}
    found = painted(human("end", fields, color=True, warn_ms=2000, error_ms=3000))
    assert next(v for k, v in found.items() if k.startswith("lat[")) == colors
    waiting = {"request_id": "1", "idle_ms": max(ttfb, duration), "duration_ms": 9, "chunks": 0, "down": 0}
    line = human("wait", waiting, color=True, warn_ms=2000, error_ms=3000)
    assert next(v for k, v in painted(line).items() if k not in ("INFO", "wait")) == colors


def test_colour_changes_nothing_but_colour():
    exchange = exchange_of(CHAT)
    for event, fields in (("end", proxai.end_fields(exchange)), ("fwd", proxai.fwd_fields(exchange))):
        assert re.sub(r"\x1b\[[0-9;]*m", "", human(event, fields, color=True)) == human(event, fields)


# -- hostile text

HOSTILE = ["\x1b[31mred\x1b[0m", "\x1b[8mhidden", "\x1b]0;title\x07", "\x1b[2J\x1b[H", "a\r\nb 200 fake",
           "a\rb", "\x9b2J", "\u202eevil", "\u2028", "\ud800", "\x00", "\x7f\x08\x08", "x\x1b", "\x1b"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("color", [False, True], ids=["plain", "colour"])
def test_control_characters_never_reach_a_terminal(text, color):
    chat = choice_of(finish=text) | {"id": text, "model": text, "service_tier": text, "error": {
        "code": text, "message": text, "param": text}}
    streams = [
        (CHAT, [chat, call_part("", function={"name": text})]),
        (RESPONSES, [{"type": "response.completed", "response": {
            **ANSWER, "id": text, "status": text, "model": text, "reasoning": {"effort": text},
            "incomplete_details": {"reason": text}, "output": [{"type": text}, {**WEATHER, "name": text}]}}]),
        (MESSAGES, [{"type": "message_start", "message": {"id": text, "model": text, "stop_reason": text}},
                    block_start(0, type="tool_use", name=text)])]
    events = []
    for protocol, streamed in streams:
        exchange = exchange_of(protocol, provider=text, observed=seen_in(protocol, *streamed), error=text,
                               content_type=text.encode("utf-8", "replace"), sse=False)
        events.append(("end", proxai.end_fields(exchange)))
    body = {"reasoning_effort": text, "service_tier": text, "tools": [{"function": {"name": text}}],
            "tool_choice": text}
    events += [("fwd", proxai.fwd_fields(exchange_of(CHAT, upstream_model=text, path=text, body=body))),
               ("internal", {"source": text, "message": text}), ("listen", {"at": text})]
    for event, fields in events:
        line = human(event, fields, color=color)
        if color:  # each escape is one of a pair of our own
            harmless = json.loads(json.dumps(fields).replace(json.dumps(text)[1:-1], "t"))
            ours = human(event, harmless, color=True)
            assert line.count("\x1b") == ours.count("\x1b"), line
            line = re.sub(r"\x1b\[[0-9;]*m", "", line)
        assert line.isprintable(), line


# -- lines for programs

@pytest.mark.parametrize("level", ["trace", "debug", "info", "warn", "error"])
def test_a_line_for_programs_has_its_schema(level):
    line = json.loads(proxai.json_line(1778228311.188, level, "end",
                                       {"request_id": "7", "a": None, "b": {"c": 1}}))
    at = line.pop("ts")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+[+-]\d\d:\d\d", at)
    assert abs(datetime.datetime.fromisoformat(at).timestamp() - 1778228311.188) < 0.01
    assert line == {"log_schema": "proxai.v1", "level": level, "event": "end", "request_id": "7", "a": None,
                    "b": {"c": 1}}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_line_for_programs_is_one_line_of_utf_8(text):
    line = proxai.json_line(0.0, "info", "end", {"model": text, text: [text]})
    assert not re.search(r"[\x00-\x1f]", line)
    assert json.loads(line.encode("utf-8"))["model"] == text


# -- writing

class Screen(io.StringIO):
    """Where lines are written: perhaps a terminal, perhaps one that is paused until `resumed`."""

    def __init__(self, terminal=False, paused=False):
        super().__init__()
        self.terminal, self.begun, self.resumed = terminal, threading.Event(), threading.Event()
        self.flushed = ""
        if not paused:
            self.resumed.set()

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.begun.set()
        assert self.resumed.wait(PATIENCE)
        return super().write(text)

    def flush(self):
        self.flushed = self.getvalue()


@pytest.fixture
def writers():
    """Makes writers, and ends them."""
    made = []

    def make(stream, environ=None, **settings):
        made.append(proxai.LineWriter(stream, proxai.LoggingConfig(**settings), environ or {}))
        return made[-1]

    yield make
    for writer in made:
        if isinstance(writer.stream, Screen):
            writer.stream.resumed.set()
        writer.close()
        assert not writer.thread.is_alive()


def tell(writer, event, fields=None, level=logging.INFO, **more):
    """Give a writer one event."""
    writer.handle(logging.makeLogRecord({"name": "proxai", "levelno": level, "msg": event,
                                         "fields": fields or {}, **more}))


def shown(text):
    """What a terminal shows after `text`: carriage returns go back, and lines are cleared."""
    lines = [""]
    for part in re.findall(r"\n|\r|\x1b\[[0-2]?K|\x1b\[[0-9;]*m|[^\n\r\x1b]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\r" or part.endswith("K"):
            lines[-1] = "" if part.endswith("K") else lines[-1]
        elif not part.startswith("\x1b"):
            lines[-1] += part
    return lines


WAIT = {"request_id": "1", "idle_ms": 5000, "duration_ms": 6000, "chunks": 0, "down": 0}


def test_lines_are_written_in_order_and_closing_waits_for_them(writers):
    screen = Screen()
    writer = writers(screen)
    for number in range(500):
        tell(writer, "some", {"number": number})
    writer.close()
    assert not writer.thread.is_alive()
    assert re.findall(r"number=(\d+)\n", screen.flushed) == [str(n) for n in range(500)]
    writer.close()  # twice does no harm


def test_lines_for_a_paused_terminal_are_dropped_and_counted(writers, monkeypatch):
    monkeypatch.setattr(proxai, "LOG_QUEUE_LINES", 5)
    screen = Screen(paused=True)
    writer = writers(screen)
    tell(writer, "some", {"number": 0})
    assert screen.begun.wait(PATIENCE)  # the writer hangs in write() from here on
    for number in range(1, 9):
        tell(writer, "some", {"number": number})
    screen.resumed.set()
    deadline = time.monotonic() + PATIENCE
    while "number=5\n" not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    tell(writer, "some", {"number": 9})
    writer.close()
    assert re.findall(r"number=(\d+)\n", screen.getvalue()) == ["0", "1", "2", "3", "4", "5", "9"]
    notice, = (line for line in screen.getvalue().splitlines() if "dropped" in line)
    assert notice.endswith("count=3")


@pytest.mark.parametrize("error", [
    BrokenPipeError(), ValueError("I/O operation on closed file"), OSError(5, "gone"),
], ids=["pipe", "closed", "gone"])
def test_a_stream_that_is_closed_ends_nothing_but_the_log(writers, error, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    class Closed(Screen):
        def write(self, text):
            raise error

    writer = writers(Closed())
    for number in range(3):
        tell(writer, "some", {"number": number})
        writer.thread.join(0.05)
    writer.close()
    assert not writer.thread.is_alive() and not raised


def test_a_text_that_the_stream_cannot_write_does_not_end_the_log(writers):
    raw = io.BytesIO()
    writer = writers(io.TextIOWrapper(raw, "ascii", errors="backslashreplace", write_through=True))
    tell(writer, "some", {"text": "↑ é 😀"})
    tell(writer, "some", {"text": "later"})
    writer.close()
    assert raw.getvalue().decode("ascii").splitlines()[-1].endswith("text=later")


def test_waiting_overwrites_its_line_on_a_terminal(writers):
    screen = Screen(terminal=True)
    writer = writers(screen)
    for event in ("some", "wait", "wait", "wait", "other", "wait", "last"):
        tell(writer, event, WAIT if event == "wait" else {"a": 1})
    writer.close()
    assert [line.split()[2] for line in shown(screen.getvalue()) if line] == ["some", "other", "last"]
    assert screen.getvalue().count("\n") == 3


@pytest.mark.parametrize("terminal, settings, environ", [
    (False, {}, {}), (True, {"use_color": False}, {}), (True, {}, {"NO_COLOR": "1"}),
], ids=["no terminal", "no colour", "NO_COLOR"])
def test_there_is_no_colour_where_it_is_not_wanted(writers, terminal, settings, environ):
    screen = Screen(terminal=terminal)
    writer = writers(screen, environ, **settings)
    tell(writer, "end", proxai.end_fields(exchange_of(CHAT)))
    writer.close()
    assert "\x1b[3" not in screen.getvalue() and "\x1b[1" not in screen.getvalue()
    if not terminal:
        assert "\x1b" not in screen.getvalue()


def test_each_wait_has_a_line_where_there_is_no_terminal(writers):
    screen = Screen()
    writer = writers(screen)
    for event in ("wait", "wait", "some"):
        tell(writer, event, WAIT if event == "wait" else {"a": 1})
    writer.close()
    assert [line.split()[2] for line in screen.getvalue().splitlines()] == ["wait", "wait", "some"]


def test_there_is_colour_on_a_terminal_and_an_empty_no_color_says_nothing(writers):
    screen = Screen(terminal=True)
    writer = writers(screen, {"NO_COLOR": ""})
    tell(writer, "end", proxai.end_fields(exchange_of(CHAT)))
    writer.close()
    assert painted(screen.getvalue())["200"] == {"green", "bold"}


def test_lines_for_programs_are_plain_on_a_terminal_too(writers):
    screen = Screen(terminal=True)
    writer = writers(screen, output_format="json")
    for event in ("some", "wait", "wait", "end"):
        tell(writer, event, WAIT)
    writer.close()
    told_events = [json.loads(line)["event"] for line in screen.getvalue().splitlines()]
    assert told_events == ["some", "wait", "wait", "end"]
    assert "\x1b" not in screen.getvalue()


def test_lines_for_programs_stay_json_whatever_happens(writers, monkeypatch):
    monkeypatch.setattr(proxai, "LOG_QUEUE_LINES", 3)
    screen = Screen(paused=True)
    writer = writers(screen, output_format="json")
    try:
        raise LookupError("first\nsecond")
    except LookupError:
        tell(writer, "a bug", {"request_id": "7"}, logging.ERROR, exc_info=sys.exc_info())
    assert screen.begun.wait(PATIENCE)
    tell(writer, "odd", {"request_id": "8", "value": object()})
    writer.handle(logging.makeLogRecord({"name": "asyncio", "levelno": logging.WARNING, "msg": "slow\n%s",
                                         "args": ("x",)}))
    for _ in range(3):
        tell(writer, "many")
    screen.resumed.set()
    writer.close()
    lines = [json.loads(line) for line in screen.getvalue().splitlines()]
    assert all({"log_schema", "level", "event", "ts"} <= line.keys() for line in lines)
    assert "LookupError" in json.dumps(lines) and "slow\\nx" in json.dumps(lines)


@pytest.mark.parametrize("event", ["fwd", "wait", "end"])
def test_an_event_that_cannot_be_told_does_not_raise(writers, event):
    screen = Screen()
    writer = writers(screen)
    tell(writer, event, {"duration_ms": "x", "status": []})
    tell(writer, "later")
    writer.close()
    assert len(screen.getvalue().splitlines()) == 2 and event in screen.getvalue()


def test_a_bug_is_told_to_people_with_its_traceback(writers):
    screen = Screen()
    writer = writers(screen)
    try:
        raise LookupError("what")
    except LookupError:
        tell(writer, "a bug", {"request_id": "7"}, logging.ERROR, exc_info=sys.exc_info())
    writer.close()
    assert "ERROR a bug" in screen.getvalue() and "LookupError: what" in screen.getvalue()


@pytest.fixture
def loggers():
    """Puts the loggers back that start_log() takes over."""
    kept = [(logger, logger.handlers[:], logger.level, logger.propagate)
            for logger in (logging.getLogger("proxai"), logging.getLogger("asyncio"))]
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize("output_format", ["human", "json"])
@pytest.mark.parametrize("level, expected", [
    ("trace", ["debug", "hdr", "info", "warn"]), ("debug", ["debug", "hdr", "info", "warn"]),
    ("info", ["hdr", "info", "warn"]), ("warn", ["warn"]), ("error", [])])
def test_the_level_decides_which_events_are_told(loggers, level, expected, output_format):
    screen = Screen()
    log, writer = proxai.start_log(proxai.LoggingConfig(level=level, output_format=output_format), screen, {})
    levels = {"debug": logging.DEBUG, "hdr": logging.INFO, "info": logging.INFO, "warn": logging.WARNING}
    for event, number in levels.items():
        log.event(number, event, proxai.end_fields(exchange_of(CHAT)))
    writer.close()
    assert not writer.thread.is_alive()
    if output_format == "json":
        found = [json.loads(line)["event"] for line in screen.getvalue().splitlines()]
    else:
        found = [line.split()[2] for line in screen.getvalue().splitlines()]
        expected = [e for e in expected if e != "hdr" or level in ("trace", "debug")]
    assert found == expected
    assert log.info_on is (level in ("trace", "debug", "info"))


def test_words_of_libraries_are_told_as_events(loggers):
    screen = Screen()
    _, writer = proxai.start_log(proxai.LoggingConfig(), screen, {})
    logging.getLogger("asyncio").warning("slow\x1b[31m callback\n%s", "x")
    logging.getLogger("asyncio").info("not this")
    writer.close()
    line, = screen.getvalue().splitlines()
    assert "slow" in line and "\x1b" not in line and "not this" not in line



# ============================================================================
#  12  Upstream
# ============================================================================

# -- time limits and places: plain values ------------------------------------

class FakeLoop:
    """A loop whose clock moves when a test says so."""

    def __init__(self):
        self.now, self.timers = 100.0, []

    def time(self):
        return self.now

    def call_at(self, when, ring):
        timer = FakeTimer(when, ring)
        self.timers.append(timer)
        return timer

    def advance(self, secs):
        """Let time pass, ringing timers in their order."""
        end = self.now + secs
        while due := sorted((t for t in self.timers if t.when <= end), key=lambda t: t.when):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0].when)
            if not due[0].cancelled:
                due[0].ring()
        self.now = end


class FakeTimer:
    """What `call_at` returns."""

    def __init__(self, when, ring):
        self.when, self.ring, self.cancelled = when, ring, False

    def cancel(self):
        self.cancelled = True


ARM, DISARM, BLOCK_STOP = "arm", "disarm", "stop"


@pytest.mark.parametrize("steps, expected", [
    ([(ARM, 5, "a"), 4.9], []),
    ([(ARM, 5, "a"), 5.1], ["a"]),
    ([(ARM, 5, "a"), 50], ["a"]),
    ([(ARM, 5, "a"), 4, (ARM, 5, "b"), 4.9], []),
    ([(ARM, 5, "a"), 4, (ARM, 5, "b"), 5.1], ["b"]),
    ([(ARM, 50, "a"), 1, (ARM, 2, "b"), 2.1], ["b"]),
    ([(ARM, 50, "a"), 1, (ARM, 2, "b"), 100], ["b"]),
    ([(ARM, 2, "a"), 1, (ARM, 50, "b"), 49], []),
    ([(ARM, 2, "a"), 1, (ARM, 50, "b"), 50.1], ["b"]),
    ([(ARM, 5, "a"), DISARM, 100], []),
    ([(ARM, 5, "a"), DISARM, (ARM, 3, "b"), 3.1], ["b"]),
    ([(ARM, 3, "a"), DISARM, 10, (ARM, 3, "b"), 3.1], ["b"]),
    ([(ARM, 3, "a"), 3.1, (ARM, 3, "b"), 3.1], ["a", "b"]),
    ([(ARM, 5, "a"), BLOCK_STOP, 100], []),
    ([BLOCK_STOP, 100], []),
    ([DISARM, 100], []),
], ids=str)
def test_a_watch_rings_once_for_the_limit_that_was_set_last(steps, expected):
    loop, fired = FakeLoop(), []
    watch = proxai.Watch(loop, fired.append)
    for step in steps:
        if isinstance(step, tuple):
            watch.arm(*step[1:])
        elif isinstance(step, str):
            getattr(watch, step)()
        else:
            loop.advance(step)
    assert fired == expected


def test_a_watch_waits_on_as_long_as_there_is_progress():
    loop, fired, progress = FakeLoop(), [], iter([True, True, False])
    watch = proxai.Watch(loop, fired.append)
    watch.arm(2, "a", lambda: next(progress))
    loop.advance(5.9)
    assert fired == []
    loop.advance(0.2)
    assert fired == ["a"]


def test_a_limit_without_progress_forgets_the_progress_of_the_one_before():
    loop, fired = FakeLoop(), []
    watch = proxai.Watch(loop, fired.append)
    watch.arm(2, "a", lambda: True)
    watch.arm(2, "b")
    loop.advance(2.1)
    assert fired == ["b"]


@pytest.mark.parametrize("host, port, no_proxy, expected", [
    ("api.example.com", 443, "", False),
    ("api.example.com", 443, " , ,", False),
    ("api.example.com", 443, "*", True),
    ("api.example.com", 443, "other.com, *", True),
    ("api.example.com", 443, "api.example.com", True),
    ("api.example.com", 443, "API.Example.COM", True),
    ("api.example.com", 443, "example.com", True),
    ("api.example.com", 443, ".example.com", True),
    ("api.example.com", 443, "*.example.com", True),
    ("example.com", 443, "example.com", True),
    ("notexample.com", 443, "example.com", False),
    ("notexample.com", 443, ".example.com", False),
    ("example.com.evil.net", 443, "example.com", False),
    ("example.co", 443, "example.com", False),
    ("example.com", 443, "api.example.com", False),
    ("api.example.com", 443, "other.com,example.com", True),
    ("api.example.com", 443, "other.com , example.com ", True),
    ("api.example.com", 443, "other.com example.com", True),
    ("api.example.com", 443, "example.com:443", True),
    ("api.example.com", 8443, "example.com:443", False),
    ("api.example.com", 8443, "example.com:443,example.com:8443", True),
    ("10.1.2.3", 80, "10.0.0.0/8", True),
    ("11.1.2.3", 80, "10.0.0.0/8", False),
    ("10.1.2.3", 80, "10.1.2.3", True),
    ("10.1.2.3", 80, "10.1.2.3:80", True),
    ("10.1.2.3", 80, "10.1.2.3:81", False),
    ("10.1.2.33", 80, "10.1.2.3", False),
    ("api.example.com", 443, "10.0.0.0/8", False),
    ("2001:db8::1", 443, "2001:db8::1", True),
    ("2001:db8::1", 443, "[2001:db8::1]", True),
    ("2001:db8::1", 443, "2001:db8::/32", True),
    ("2001:db9::1", 443, "2001:db8::/32", False),
])
def test_no_proxy_names_hosts_domains_networks_and_ports(host, port, no_proxy, expected):
    assert proxai.bypasses(host, port, no_proxy) is expected


@pytest.mark.parametrize("scheme, host, environ, expected", [
    ("https", "api.test", {}, None),
    ("https", "api.test", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
    ("https", "api.test", {"https_proxy": "http://p:1"}, "http://p:1"),
    ("https", "api.test", {"HTTP_PROXY": "http://p:1"}, None),
    ("http", "api.test", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
    ("http", "api.test", {"http_proxy": "http://p:1"}, "http://p:1"),
    ("http", "api.test", {"HTTPS_PROXY": "http://p:1"}, None),
    ("http", "api.test", {"ALL_PROXY": "http://p:1"}, "http://p:1"),
    ("https", "api.test", {"all_proxy": "http://p:1"}, "http://p:1"),
    ("https", "api.test", {"ALL_PROXY": "http://all:1", "HTTPS_PROXY": "http://own:2"}, "http://own:2"),
    ("https", "api.test", {"HTTPS_PROXY": ""}, None),
    ("https", "api.test", {"HTTPS_PROXY": "", "ALL_PROXY": "http://p:1"}, "http://p:1"),
    ("https", "api.test", {"HTTPS_PROXY": "p.test:3128"}, "http://p.test:3128"),
    ("https", "api.test", {"HTTPS_PROXY": "https://u:w@p.test:3128"}, "https://u:w@p.test:3128"),
    ("https", "api.test", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "api.test"}, None),
    ("https", "api.test", {"HTTPS_PROXY": "http://p:1", "no_proxy": ".test"}, None),
    ("https", "api.test", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.test"}, "http://p:1"),
    ("https", "api.test", {"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
    ("http", "localhost", {"HTTP_PROXY": "http://p:1"}, None),
    ("http", "127.0.0.1", {"HTTP_PROXY": "http://p:1"}, None),
    ("http", "127.9.9.9", {"ALL_PROXY": "http://p:1"}, None),
    ("https", "::1", {"HTTPS_PROXY": "http://p:1"}, None),
    ("http", "192.168.1.5", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
], ids=str)
def test_the_environment_names_a_forward_proxy_in_either_case(scheme, host, environ, expected):
    assert proxai.proxy_from_environment(scheme, host, 443, environ) == expected


@pytest.mark.parametrize("value", ["socks5://u:hidden-word@p.test:1", "http://",
                                   "http://u:hidden-word@p.test/path"])
def test_a_forward_proxy_in_the_environment_that_cannot_be_used_is_a_configuration_fault(value):
    with pytest.raises(proxai.ConfigError) as caught:
        proxai.proxy_from_environment("https", "api.test", 443, {"HTTPS_PROXY": value})
    assert "hidden-word" not in str(caught.value)


ENVIRON = {"HTTP_PROXY": "http://env:1", "HTTPS_PROXY": "http://env:2"}


@pytest.mark.parametrize("base_url, setting, expected, authority", [
    ("http://api.test/", None, ("http", "api.test", 80, "http://env:1"), "api.test"),
    ("https://api.test/v1/", None, ("https", "api.test", 443, "http://env:2"), "api.test"),
    ("http://api.test:80/", "direct", ("http", "api.test", 80, None), "api.test"),
    ("https://api.test:443/", "direct", ("https", "api.test", 443, None), "api.test"),
    ("http://api.test:443/", "direct", ("http", "api.test", 443, None), "api.test:443"),
    ("https://api.test:8443/v1/", "http://own:3", ("https", "api.test", 8443, "http://own:3"),
     "api.test:8443"),
    ("http://127.0.0.1:9/", None, ("http", "127.0.0.1", 9, None), "127.0.0.1:9"),
    ("http://127.0.0.1:9/", "http://own:3", ("http", "127.0.0.1", 9, "http://own:3"), "127.0.0.1:9"),
    ("http://[::1]:9/", None, ("http", "::1", 9, None), "[::1]:9"),
    ("https://[2001:db8::1]/", "direct", ("https", "2001:db8::1", 443, None), "[2001:db8::1]"),
])
def test_an_origin_is_where_connections_to_a_provider_go(base_url, setting, expected, authority):
    origin = proxai.origin_of(base_url, setting, None, ENVIRON)
    assert (origin.scheme, origin.host, origin.port, origin.proxy) == expected
    assert origin.authority == authority


def test_providers_that_trust_different_certificates_do_not_share_connections():
    assert (proxai.origin_of("https://api.test/", None, "a.pem", {})
            != proxai.origin_of("https://api.test/", None, "b.pem", {}))


# -- looking up names --------------------------------------------------------

class NameServer:
    """Stands in for `socket.getaddrinfo`: names with "slow" wait for `go`, names with "lost" are unknown."""

    def __init__(self):
        self.asked, self.threads, self.go = [], [], threading.Event()

    def __call__(self, host, port, **hints):
        self.asked.append(host)
        self.threads.append(threading.current_thread())
        if "slow" in host:
            assert self.go.wait(2 * PATIENCE)
        if "lost" in host:
            raise socket.gaierror(socket.EAI_NONAME, host)
        return [host, port, hints]


@pytest.fixture
def name_server(monkeypatch):
    """A name server that is asked instead of the real one; its threads end with the test."""
    server = NameServer()
    with monkeypatch.context() as patch:
        patch.setattr(proxai.socket, "getaddrinfo", server)
        yield server
        server.go.set()
        for thread in server.threads:
            thread.join(PATIENCE)


def looking_up(scenario):
    """Run `scenario(resolve)` in a loop; what the loop was told of errors that nobody handled."""
    unhandled = []

    async def run():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(PATIENCE):
            await scenario(proxai.own_resolver(loop))

    asyncio.run(run())
    return unhandled


async def several(resolve, count, host, port=443):
    """So many look-ups of one name, all begun."""
    tasks = [asyncio.create_task(resolve(host, port, type=socket.SOCK_STREAM)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_look_ups_of_one_name_at_one_time_share_a_thread_and_its_result(name_server):
    async def scenario(resolve):
        tasks = await several(resolve, 3, "slow.example")
        other = await several(resolve, 2, "slow.example", 80)  # another question
        name_server.go.set()
        hints = {"type": socket.SOCK_STREAM}
        assert await asyncio.gather(*tasks) == [["slow.example", 443, hints]] * 3
        assert await asyncio.gather(*other) == [["slow.example", 80, hints]] * 2
        assert len(name_server.asked) == len(set(name_server.threads)) == 2
        await resolve("slow.example", 443, type=socket.SOCK_STREAM)  # nothing is kept for later
        assert len(name_server.asked) == 3

    assert looking_up(scenario) == []


def test_an_error_of_a_look_up_reaches_all_who_wait_for_it(name_server):
    async def scenario(resolve):
        tasks = await several(resolve, 3, "slow.lost.example")
        name_server.go.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in errors] == [socket.gaierror] * 3
        with pytest.raises(socket.gaierror):
            await resolve("lost.example", 443)

    assert looking_up(scenario) == []
    assert len(name_server.asked) == 2


def test_one_who_waits_no_longer_for_a_look_up_takes_nothing_from_the_others(name_server):
    async def scenario(resolve):
        first, second = await several(resolve, 2, "slow.example")
        first.cancel()
        left = await several(resolve, 2, "slow.lost.example")
        for task in left:
            task.cancel()
        await asyncio.gather(first, *left, return_exceptions=True)
        assert first.cancelled() and not second.done()
        name_server.go.set()
        assert (await second)[0] == "slow.example"

    looking_up(scenario)
    assert sorted(name_server.asked) == ["slow.example", "slow.lost.example"]


def test_names_that_are_not_found_out_do_not_delay_another(name_server):
    async def scenario(resolve):
        hanging = [task for i in range(50) for task in await several(resolve, 1, f"slow{i}.example")]
        assert (await resolve("quick.example", 443))[0] == "quick.example"
        assert not any(task.done() for task in hanging)
        name_server.go.set()
        await asyncio.gather(*hanging)

    assert looking_up(scenario) == []


@pytest.mark.skipif(os.name != "posix", reason="there are no signals to send")
def test_a_second_signal_ends_the_program_although_a_look_up_hangs(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import socket, sys, time\n"
        "real = socket.getaddrinfo\n"
        "def slow(host, *more, **hints):\n"
        "    if host in ('slow.example', b'slow.example'):\n"
        "        sys.stdout.write('it hangs\\n')\n"
        "        time.sleep(60)\n"
        "    return real(host, *more, **hints)\n"
        "socket.getaddrinfo = slow\n", "utf-8")
    config = config_for("http://slow.example", server="shutdown_grace_secs = 300")
    program = Running(tmp_path, config=config, env={"PYTHONPATH": str(tmp_path / "site")})
    try:
        with program.connect() as sock:
            raw = json.dumps(body_for(CHAT, "m")).encode()
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                         b"content-length: %d\r\n\r\n%b" % (len(raw), raw))
            program.wait_line("it hangs")
            program.process.send_signal(signal.SIGTERM)
            program.wait_line('"event":"shutdown"')
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(PATIENCE) == 0
    finally:
        program.stop()
    assert [line for line in program.lines if "Traceback" in line] == []


# -- what the tests below share ----------------------------------------------

KEY = "test-upstream-key"
OK = {"id": "fine", "choices": []}


def ask(program, protocol, model, *headers, query="", **more):
    """One small request; `more` goes into its body."""
    return program.post(protocol.path + query, body_for(protocol, model, **more), *headers)


def outcome(program, reply):
    """The log line that closed the exchange of a reply."""
    return program.events(reply.headers["x-proxai-request-id"])[-1]


def forget(server):
    """Close the connections that lie idle, and wait until the proxy has let go of them: the next is fresh."""
    for sock in server.open:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + PATIENCE
    for sock in server.open:
        with contextlib.suppress(OSError, ValueError):  # its thread closes it meanwhile
            while not select.select([sock], [], [], 0.01)[0]:
                assert time.monotonic() < deadline, "the proxy keeps a connection that is closed"
    server.open.clear()


def send(*parts):
    """A script: bytes as they are, each part in a write of its own, and the connection stays."""
    def script(peer, request):
        for part in parts:
            peer.send(part)
    return script


def send_and_close(*parts):
    """A script: bytes as they are, then the end of the connection."""
    def script(peer, request):
        for part in parts:
            peer.send(part)
        peer.close()
    return script


def send_and_reset(*parts):
    """A script: bytes as they are, a moment for them to arrive, then a reset."""
    def script(peer, request):
        for part in parts:
            peer.send(part)
        time.sleep(0.05)
        peer.reset()
    return script


def at_once(check, cases):
    """`check(case, number)` for all cases at one time, as each spends its time waiting."""
    failures = []

    def run(number, case):
        try:
            check(case, number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


ALL = (RESPONSES, CHAT, MESSAGES)


class Witness:
    """A script that sends, waits for the proxy to let go of the connection, and remembers that it did."""

    def __init__(self, *parts, every=b""):
        self.parts, self.every, self.released = parts, every, threading.Event()

    def __call__(self, peer, request):
        for part in self.parts:
            peer.send(part)
        with contextlib.suppress(OSError):
            while self.every:  # a sign of life again and again, until nobody takes it
                if peer.gone(0.05):
                    break
                peer.sock.settimeout(PATIENCE)
                peer.send(self.every)
        if peer.gone():
            self.released.set()

    def wait(self):
        """Whether the proxy lets go in time."""
        return self.released.wait(PATIENCE)


def whole(body, *headers, status=200):
    """The bytes of an answer with its length."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


GOOD = whole(json.dumps(OK).encode(), "content-type: application/json")


def styled(upstream, style):
    """A configuration with that format of errors, impatient with tool calls; with text it is strict, too."""
    return config_for(upstream.url, "[error_responses]", f'format = "{style}"', "[tool_calls]",
                      "timeout_secs = 0.15",
                      "[[routing.routes]]", 'name = "own"', 'model_pattern = "ask-for-it"',
                      'upstream_model = "given"',
                      'provider = "messages_default"', 'request_protocol = "anthropic_messages"',
                      way("alias", upstream.url + "/v1"),
                      way("quick", upstream.url, "read_idle_timeout_secs = 0.2"),
                      provider='compatibility = "strict"' if style == "text" else "",
                      server='cors_allow_origins = ["https://app.example"]')


@pytest.fixture
def exact(programs, upstream):
    """The program with strict providers, which touches no byte of what they say."""
    return programs(styled(upstream, "text"))


@pytest.fixture
def told_program(programs, upstream):
    """The program with errors in the json format, which tells their type."""
    return programs(styled(upstream, "json"))


@pytest.fixture
def single(programs, upstream):
    """The program with room for one request that waits for its answer, for small events,
    and some patience with tool calls."""
    return programs(config_for(upstream.url, "[tool_calls]", "timeout_secs = 0.4",
                               server="max_concurrent_requests = 1\nmax_sse_event_bytes = 2000"))


def way(name, url, *lines, protocol="openai_chat_completions", upstream_model=""):
    """A provider, and the route there for the models that begin with its name."""
    return "\n".join([f"[providers.{name}]", f'protocol = "{protocol}"', f'base_url = "{url}"',
                      f'api_key = "{KEY}"',
                      *lines, "[[routing.routes]]", f'model_pattern = "^{name}-(.+)$"',
                      f'provider = "{name}"',
                      'upstream_model = "$1"'])


@pytest.fixture
def hasty(programs, upstream):
    """The program with a short limit for silence; a longer one for models called patient-..."""
    return programs(config_for(upstream.url, "[error_responses]", 'format = "json"',
                               way("patient", upstream.url, "read_idle_timeout_secs = 0.6"),
                               provider="read_idle_timeout_secs = 0.2"))


class Wire(Upstream):
    """A listener whose `handle` gets each connection as it is, before anything was read."""

    def __init__(self):
        super().__init__()
        self.handle = Peer.close

    def talk(self, sock, number):
        with contextlib.suppress(OSError):
            self.handle(Peer(sock))
        sock.close()


class Tunnel(Upstream):
    """A forward proxy: answers CONNECT with `reply`, and is then the provider behind the tunnel itself."""

    def __init__(self, context):
        super().__init__(context)
        self.reply = b"HTTP/1.1 200 Connected\r\n\r\n"
        self.heads, self.released = [], threading.Event()

    def talk(self, sock, number):
        with contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            self.heads.append(head.decode())
            sock.sendall(self.reply)
            if self.reply.startswith(b"HTTP/1.1 200"):
                super().talk(sock, number)
            elif Peer(sock).gone():
                self.released.set()
        sock.close()


class Ways(NamedTuple):
    """A program with a provider for each way there, and what stands at their ends."""

    program: Running
    wire: Wire
    forward: Upstream
    tunnel: Tunnel
    secure: Upstream
    other: Upstream


@pytest.fixture(scope="session")
def ways(programs, tmp_path_factory):
    """Providers that are reached in every way there is, with TLS only where openssl can make certificates."""
    home = tmp_path_factory.mktemp("tls")
    contexts = make_certificates(home) if shutil.which("openssl") else [None, None]
    wire, forward, tunnel = Wire(), Upstream(), Tunnel(contexts[0])
    secure, other, closed = Upstream(contexts[0]), Upstream(contexts[1]), socket.socket()
    closed.bind(("127.0.0.1", 0))  # a port that is taken, and where nobody listens
    authority = f'ca_file = "{(home / "ca.pem").as_posix()}"' if contexts[0] else ""
    user = "us%65r:p%40ss:w"  # user, p@ss:w
    config = config_for(
        forward.url, "[error_responses]", 'format = "json"',
        way("refused", f"http://127.0.0.1:{closed.getsockname()[1]}"),
        way("nowhere", "http://nothing.invalid", "connect_timeout_secs = 3"),
        way("raw", wire.url, "read_idle_timeout_secs = 0.7"),
        way("silent", wire.url.replace("http:", "https:"), "connect_timeout_secs = 0.2"),
        way("mute", "https://proxied.test", "connect_timeout_secs = 0.2", f'proxy_url = "{wire.url}"'),
        way("plain", "http://proxied.test:8080/base",
            f'proxy_url = "http://{user}@127.0.0.1:{forward.port}"'),
        way("tunnel", "https://proxied.test", f'proxy_url = "http://{user}@127.0.0.1:{tunnel.port}"',
            authority),
        way("secure", f"https://localhost:{secure.port}", authority),
        way("number", f"https://127.0.0.1:{secure.port}", authority),
        way("stranger", f"https://localhost:{secure.port}"),
        way("other", f"https://localhost:{other.port}", authority),
        way("unspoken", wire.url.replace("http:", "https:"), authority))
    yield Ways(programs(config), wire, forward, tunnel, secure, other)
    closed.close()
    for server in (wire, forward, tunnel, secure, other):
        server.close()


def make_certificates(home):
    """Server contexts for localhost and proxied.test, and for another host, both signed by home/ca.pem."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=home, check=True, capture_output=True, timeout=60)

    (home / "ca.cnf").write_text("[req]\ndistinguished_name=dn\nx509_extensions=ca\nprompt=no\n"
                                 "[dn]\nCN=Test CA\n[ca]\n"
                                 "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
                                 "subjectKeyIdentifier=hash\n")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-config", "ca.cnf", "-keyout", "ca.key", "-out", "ca.pem", "-days",
            "2")
    contexts = []
    for name, names in (("good", "DNS:localhost,DNS:proxied.test,IP:127.0.0.1"),
                        ("other", "DNS:elsewhere.test")):
        (home / f"{name}.ext").write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n"
                                          "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
        openssl("req", *new_key, "-config", "ca.cnf", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-extfile", f"{name}.ext", "-out", f"{name}.pem", "-days", "2")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home / f"{name}.pem", home / f"{name}.key")
        contexts.append(context)
    return contexts


needs_openssl = pytest.mark.skipif(not shutil.which("openssl"),
                                   reason="certificates are made with the openssl command")


def assert_unreached(reply):
    """The provider could not be reached or said nothing of use: 502 in the contract's words."""
    assert (reply.status, reply.json["error"]["type"]) == (502, "upstream_request_error")
    assert reply.json["error"]["status"] == 502


# -- providers that cannot be reached ----------------------------------------

@pytest.mark.parametrize("name", ["refused", "nowhere"])
def test_a_provider_that_cannot_be_reached_is_a_502_that_names_it(ways, model, name):
    reply = ask(ways.program, CHAT, f"{name}-{model}")
    assert_unreached(reply)
    assert f"`{name}`" in reply.json["error"]["message"]
    assert outcome(ways.program, reply)["status"] == 502


@pytest.mark.parametrize("name", ["silent", "mute"])
def test_a_handshake_that_never_ends_is_over_after_connect_timeout_secs(ways, model, name):
    witness = Witness()
    ways.wire.handle = lambda peer: witness(peer, None)
    reply = ask(ways.program, CHAT, f"{name}-{model}")
    assert_unreached(reply)
    assert "connect_timeout_secs" in reply.json["error"]["message"]
    assert witness.wait()


@pytest.mark.parametrize("script", [
    send_and_close(),
    send_and_reset(),
    send_and_close(b"H"),
    send_and_close(b"HTTP/1.1 200 OK\r\n"),
    send_and_close(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"),
    send_and_reset(b"HTTP/1.1 200 OK\r\ncontent-le"),
    send_and_close(b"HTTP/1.1 100 Continue\r\n\r\n"),
], ids=["close", "reset", "H", "status line", "fields", "reset in fields", "after 100"])
def test_a_fresh_connection_that_ends_before_the_answer_is_not_tried_again(told_program, upstream, model, script):
    forget(upstream)
    upstream.on(model, script)
    assert_unreached(ask(told_program, CHAT, model))
    assert len(upstream.got(model)) == 1


@pytest.mark.parametrize("head", [
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x15\x03\x03\x00\x02\x02\x46",  # a TLS alert
    b"HTTP/2 200 OK\r\n\r\n{}",
    b"HTTP/1.1 20 OK\r\n\r\n{}",
    b"HTTP/1.1 2000 OK\r\n\r\n{}",
    b"HTTP/1.1 200OK\r\n\r\n{}",
    b"HTTP/1.1  200 OK\r\n\r\n{}",
    b"HTTP/1.1 abc OK\r\n\r\n{}",
    b"http/1.1 200 OK\r\n\r\n{}",
    b"ICY 200 OK\r\n\r\n{}",
    b"\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    b"<html>no head at all</html>\r\n\r\n",
    b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nx-a: 1\r\n folded\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nx-a: a\0b\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nx-a: a\rb: c\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nno colon\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\n: empty\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0x2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2, 3\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000,
    b"HTTP/1.1 200 OK\r\n" + b"x-filler: y\r\n" * 30_000 + b"content-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nx-endless: " + b"y" * 2_000_000,
], ids=lambda head: repr(head[:70]))
def test_a_head_that_is_not_http_is_refused_and_its_connection_closed(told_program, upstream, model, head):
    witness = Witness(head)
    upstream.on(model, witness, answer_json(OK))
    assert_unreached(ask(told_program, CHAT, model))
    assert witness.wait()
    assert len(upstream.got(model)) == 1
    assert ask(told_program, CHAT, model).status == 200


@pytest.mark.parametrize("interim", [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\n\r\n",  # 9110 15.2: an interim answer has no body
], ids=["100", "102 and 103", "103 with a length"])
@pytest.mark.parametrize("split", [False, True], ids=["at once", "apart"])
def test_interim_answers_are_passed_over(program, upstream, model, interim, split):
    def apart(peer, request):
        peer.send(interim)
        time.sleep(0.03)
        peer.send(GOOD)

    upstream.on(model, apart if split else send(interim + GOOD))
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.json) == (200, OK)
    assert "link" not in reply.headers


def test_a_head_and_a_body_may_come_byte_by_byte(program, upstream, model):
    data = b"HTTP/1.1 200 OK\r\ncontent-type: x\r\nx-b: c\r\ntransfer-encoding: chunked\r\n\r\n" \
           b"1;a=b\r\n{\r\n1\r\n}\r\n0\r\nx-trailer: t\r\n\r\n"
    upstream.on(model, send(*(data[i:i + 1] for i in range(len(data)))))
    replies = [ask(program, CHAT, model) for _ in range(2)]
    assert [(r.status, r.body, r.headers["x-b"]) for r in replies] == [(200, b"{}", "c")] * 2
    assert "x-trailer" not in replies[0].headers
    assert len({r.connection for r in upstream.got(model)}) == 1


# -- silence before the answer -----------------------------------------------

def test_a_provider_that_takes_the_request_and_says_nothing_is_a_502(hasty, upstream, model):
    witness = Witness()
    upstream.on(model, witness)
    reply = ask(hasty, CHAT, model)
    assert_unreached(reply)
    assert "read_idle_timeout_secs" in reply.json["error"]["message"]
    assert witness.wait()
    assert outcome(hasty, reply)["status"] == 502


def test_a_provider_that_stops_within_its_head_is_a_502(hasty, upstream, model):
    upstream.on(model, Witness(b"HTTP/1.1 200 OK\r\ncontent-"))
    assert_unreached(ask(hasty, CHAT, model))


def test_any_byte_of_a_head_or_a_stream_is_a_sign_of_life(hasty, upstream, model):
    def check(parts, number):
        def slowly(peer, request):
            for part in parts:
                peer.send(part)
                time.sleep(0.15)

        upstream.on(f"{model}-{number}", slowly)
        reply = ask(hasty, CHAT, f"patient-{model}-{number}")
        assert (reply.status, reply.broken) == (200, False)

    at_once(check, [[b"HTTP/1.1 102 Processing\r\n\r\n"] * 6 + [GOOD],
                    [GOOD[:9], *(GOOD[i:i + 1] for i in range(9, 14)), GOOD[14:]],
                    [SSE_HEAD, *[chunk(b":\n\n")] * 5, CHAT_DONE],
                    [SSE_HEAD, b"5", b"\r", b"\n: a", b"\n\n", b"\r\n" + CHAT_DONE],
                    [GOOD[:-5], *(GOOD[i:i + 1] for i in range(len(GOOD) - 5, len(GOOD)))]])


def test_a_large_request_may_take_longer_to_send_than_the_provider_may_be_silent(ways, model):
    def read_slowly(peer):
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        left = 0
        while left > 0 or not left and b"\r\n\r\n" not in peer.buffer:
            data = peer.sock.recv(1 << 18)
            if not left:
                peer.buffer += data
                head, end, rest = peer.buffer.partition(b"\r\n\r\n")
                left = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) - len(rest) if end else 0
            else:
                left -= len(data)
                time.sleep(0.02 * len(data) / (1 << 18))
        peer.send(whole(json.dumps(OK).encode(), "connection: close"))

    ways.wire.handle = read_slowly
    reply = ask(ways.program, CHAT, f"raw-{model}", padding="x" * (12 << 20))
    assert (reply.status, reply.json) == (200, OK)


# -- an answer before the whole request --------------------------------------

@pytest.mark.parametrize("status, more", [(200, ""), (413, "connection: close")])
def test_an_answer_that_comes_while_the_request_is_still_being_sent_reaches_the_client(
        ways, model, status, more):
    released = threading.Event()

    def answer_early(peer):
        peer.sock.recv(1000)
        body = json.dumps({"error": {"message": "too early"}}).encode()
        peer.send(whole(body, "content-type: application/json", more or "x-a: b", status=status))
        if more:
            peer.sock.shutdown(socket.SHUT_WR)
        released.wait(PATIENCE)  # and only then the rest of the request would be read

    ways.wire.handle = answer_early
    try:
        reply = ask(ways.program, CHAT, f"raw-{model}", padding="x" * (10 << 20))
    finally:
        released.set()
    assert (reply.status, reply.json["error"]["message"]) == (status, "too early")


def test_a_connection_with_an_unfinished_request_is_not_used_again(ways, model):
    seen, released = [], threading.Event()

    def answer_early(peer):
        seen.append(peer.sock.recv(1000))
        peer.send(GOOD)
        released.wait(PATIENCE)

    ways.wire.handle = answer_early
    try:
        replies = [ask(ways.program, CHAT, f"raw-{model}", padding="x" * (10 << 20)) for _ in range(2)]
    finally:
        released.set()
    assert [r.status for r in replies] == [200, 200]
    assert [data[:5] for data in seen] == [b"POST ", b"POST "]


# -- the pool ----------------------------------------------------------------

CHUNKED_OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"{}") + b"0\r\n\r\n"
CHAT_DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@pytest.mark.parametrize("data", [
    GOOD, CHUNKED_OK, whole(b'{"error":"m"}', status=429), whole(b"", status=500), SSE_HEAD + CHAT_DONE,
    b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}",
    whole(b"{}", "connection: Keep-Alive"),
], ids=["length", "chunked", "error", "empty error", "stream", "1.0 keep-alive", "keep-alive"])
def test_a_connection_is_used_again_after_an_answer_that_was_read_to_its_end(program, upstream, model, data):
    upstream.on(model, send(data))
    for _ in range(3):
        ask(program, CHAT, model)
    assert len({r.connection for r in upstream.got(model)}) == 1


def test_a_client_that_leaves_its_answer_does_not_disturb_who_uses_the_connection_next(
        program, upstream, model):
    go, size = threading.Event(), 7_900_000

    def next_one(peer, request):
        peer.send(SSE_HEAD + chunk(b'data: {"choices":[]}\n\n'))
        go.wait(PATIENCE)
        peer.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.on(model, send(whole(json.dumps({"x": "x" * size}).encode(), "content-type: application/json")))
    upstream.on(model + "b", next_one)
    body = json.dumps(body_for(CHAT, model))
    with socket.socket() as leaver:
        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        leaver.settimeout(PATIENCE)
        leaver.connect(("127.0.0.1", program.port))
        leaver.sendall(f"POST {CHAT.path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
                       f"{body}".encode())
        head = read_until(leaver, b"\r\n\r\n").decode("latin-1")
        with open_stream(program, CHAT, model + "b") as sock:
            begun = read_until(sock, b'"choices"')
            leaver.close()  # with most of its answer unread
            program.wait_line(rf'"event":"(closed|end)".*"model":"{model}"')
            go.set()
            reply = read_reply(begun + read_all(sock))
    assert (reply.body, reply.broken) == (b'data: {"choices":[]}\n\ndata: [DONE]\n\n', False)
    assert upstream.got(model)[0].connection == upstream.got(model + "b")[0].connection
    assert outcome(program, reply)["event"] == "end"
    told = [e["event"] for e in program.events(re.search("(?i)x-proxai-request-id: (\\S+)", head)[1])]
    assert told == ["recv", "fwd", "hdr", "closed"]


@pytest.mark.parametrize("data", [
    whole(b"{}", "connection: close"),
    whole(b"{}", "connection: x, Close"),
    b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    GOOD + b"!",
    GOOD + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
    CHUNKED_OK + b"\r\n",
    CHUNKED_OK + GOOD,
    SSE_HEAD + CHAT_DONE + GOOD,
    whole(b'{"error":"m"}', status=429) + GOOD,
    b"HTTP/1.1 204 No Content\r\n\r\n{}",
], ids=["close", "close in a list", "HTTP/1.0", "a byte more", "an answer more", "chunked and a line",
        "chunked and an answer", "stream and an answer", "error and an answer", "204 with a body"])
def test_a_connection_that_says_more_or_means_to_close_is_not_used_again(program, upstream, model, data):
    upstream.on(model, Witness(data), answer_json(OK))
    ask(program, CHAT, model)
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.json) == (200, OK)
    first, second = upstream.got(model)
    assert first.connection != second.connection


def test_bytes_that_wait_unread_behind_an_answer_keep_the_connection_out_of_the_pool(upstream):
    async def take_after_give():
        origin = proxai.origin_of(upstream.url, None, None, {})
        pool, link = proxai.Pool(), await proxai.open_link(origin, {})
        link.reader.feed_data(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")  # arrived, and never read
        pool.give(link)
        try:
            return pool.take(origin)
        finally:
            link.abort()
            pool.close()

    assert asyncio.run(take_after_give()) is None


def test_an_answer_that_ends_with_the_connection_is_whole(program, upstream, model):
    upstream.on(model, send_and_close(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n", b'{"a":',
                                      b"1}"),
                answer_json(OK))
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.body, reply.headers["content-length"]) == (200, b'{"a":1}', "7")
    assert ask(program, CHAT, model).json == OK


def test_a_connection_that_the_provider_closes_between_requests_is_noticed(program, upstream, model):
    upstream.on(model, answer_json(OK))
    assert ask(program, CHAT, model).status == 200
    forget(upstream)
    assert ask(program, CHAT, model).status == 200
    first, second = upstream.got(model)
    assert first.connection != second.connection


def test_bytes_that_nobody_asked_for_end_an_idle_connection(program, upstream, model):
    answered, let_go = threading.Event(), threading.Event()

    def speak_up(peer, request):
        peer.send(GOOD)
        assert answered.wait(PATIENCE)
        peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        if peer.gone():
            let_go.set()

    upstream.on(model, speak_up, answer_json({"id": "second"}))
    assert ask(program, CHAT, model).json == OK
    answered.set()
    assert let_go.wait(PATIENCE)
    assert ask(program, CHAT, model).json == {"id": "second"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dies", [send_and_close(), send_and_reset()], ids=["close", "reset"])
def test_a_reused_connection_that_dies_before_an_answer_is_replaced_once(
        program, upstream, model, dies, stream):
    forget(upstream)
    upstream.on(model, answer_json(OK), dies,
                send(SSE_HEAD + CHAT_DONE) if stream else answer_json({"id": "again"}))
    assert ask(program, CHAT, model).status == 200
    reply = ask(program, CHAT, model, stream=stream)
    assert (reply.status, reply.body) == (200, b"data: [DONE]\n\n" if stream else b'{"id": "again"}')
    first, second, third = upstream.got(model)
    assert first.connection == second.connection != third.connection
    assert (second.target, second.headers, second.body) == (third.target, third.headers, third.body)


def test_the_fresh_connection_of_a_second_try_is_the_last(told_program, upstream, model):
    forget(upstream)
    upstream.on(model, answer_json(OK), send_and_close())
    assert ask(told_program, CHAT, model).status == 200
    assert_unreached(ask(told_program, CHAT, model))
    assert len(upstream.got(model)) == 3


def test_a_second_try_does_not_take_another_idle_connection(program, upstream, model):
    forget(upstream)
    both = threading.Barrier(2)

    def together(peer, request):  # two requests at one time make two connections
        both.wait(PATIENCE)
        peer.send(GOOD)

    upstream.on(model, together, together, send_and_close(), answer_json(OK))
    threads = [threading.Thread(target=ask, args=(program, CHAT, model)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert ask(program, CHAT, model).status == 200
    old, reused, fresh = {r.connection for r in upstream.got(model)[:2]}, *upstream.got(model)[2:]
    assert len(old) == 2 and reused.connection in old and fresh.connection not in old


@pytest.mark.parametrize("script", [
    send_and_close(b"H"), send_and_close(b"HTTP/1.1 200 OK\r\n"),
    send_and_close(b"HTTP/1.1 100 Continue\r\n\r\n"),
    send_and_reset(b"HTTP/1.1"), send_and_close(GOOD[:-1]), send_and_close(SSE_HEAD),
], ids=["H", "status line", "100", "reset", "body", "stream"])
def test_a_request_is_never_sent_again_once_a_byte_of_the_answer_has_come(told_program, upstream, model, script):
    forget(upstream)
    upstream.on(model, answer_json(OK), script)
    assert ask(told_program, CHAT, model).status == 200
    reply = ask(told_program, CHAT, model)
    assert reply.status == 502 or reply.broken
    first, second = upstream.got(model)
    assert first.connection == second.connection


def test_silence_on_a_reused_connection_is_not_tried_again(hasty, upstream, model):
    upstream.on(model, answer_json(OK), Witness())
    assert ask(hasty, CHAT, model).status == 200
    assert_unreached(ask(hasty, CHAT, model))
    assert len(upstream.got(model)) == 2


# -- forward proxies ---------------------------------------------------------

AUTHORIZATION = "Basic " + base64.b64encode(b"user:p@ss:w").decode()


def test_plain_http_goes_through_a_forward_proxy_in_absolute_form(ways, model):
    ways.forward.on(model, answer_json(OK))
    reply = ask(ways.program, CHAT, f"plain-{model}", "proxy-authorization: Basic client", query="?a=b")
    assert (reply.status, reply.json) == (200, OK)
    got, = ways.forward.got(model)
    assert (got.method, got.target) == ("POST", "http://proxied.test:8080/base/v1/chat/completions?a=b")
    assert got.header("host") == "proxied.test:8080"
    assert got.header("proxy-authorization") == AUTHORIZATION
    assert got.header("authorization") == f"Bearer {KEY}"


@needs_openssl
def test_https_goes_through_a_tunnel_that_stays_open(ways, model):
    before = len(ways.tunnel.heads)
    ways.tunnel.on(model, answer_json(OK))
    replies = [ask(ways.program, CHAT, f"tunnel-{model}") for _ in range(2)]
    assert [r.status for r in replies] == [200, 200], replies
    assert len(ways.tunnel.heads) == before + 1
    first, *lines = ways.tunnel.heads[-1].split("\r\n")
    assert first == "CONNECT proxied.test:443 HTTP/1.1"
    fields = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines if line)}
    assert fields["host"] == "proxied.test:443"
    assert fields["proxy-authorization"] == AUTHORIZATION
    assert KEY not in ways.tunnel.heads[-1]
    got = ways.tunnel.got(model)[0]
    assert (got.target, got.header("host"), got.header("proxy-authorization")) == (CHAT.path, "proxied.test",
                                                                                   None)


@pytest.mark.parametrize("answered, word", [
    (b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\n\r\n",
     "407"),
    (b"HTTP/1.1 403 Forbidden\r\ncontent-length: 4\r\n\r\nbody", "403"),
    (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502"),
    (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "forward proxy"),
    (b"HTTP/1.1 twohundred\r\n\r\n", "forward proxy"),
    (b"x" * 600_000, "forward proxy"),
], ids=["407", "403", "502", "no HTTP", "no status", "endless"])
def test_a_forward_proxy_that_opens_no_tunnel_is_named_and_let_go(ways, model, monkeypatch, answered, word):
    monkeypatch.setattr(ways.tunnel, "reply", answered)
    ways.tunnel.released.clear()
    if ways.tunnel.context:
        forget(ways.tunnel)
    reply = ask(ways.program, CHAT, f"tunnel-{model}")
    assert_unreached(reply)
    message = reply.json["error"]["message"]
    assert word in message and "proxy" in message
    assert "p@ss" not in message and "p%40ss" not in message and "127.0.0.1" not in message
    assert ways.tunnel.released.wait(PATIENCE), "the connection to the forward proxy stays open"


def test_the_environment_names_the_forward_proxy_of_a_provider(programs, upstream, model):
    config = config_for("http://proxied.test", way("direct", "http://proxied.test", 'proxy_url = "direct"'),
                        way("spared", "http://spared.test"), way("local", upstream.url))
    program = programs(config, env={"HTTP_PROXY": f"http://127.0.0.1:{upstream.port}",
                                    "NO_PROXY": "spared.test"})
    upstream.on(model, answer_json(OK))
    assert ask(program, CHAT, model).status == 200
    assert ask(program, CHAT, f"local-{model}").status == 200
    assert [r.target for r in upstream.got(model)] == ["http://proxied.test" + CHAT.path, CHAT.path]
    assert upstream.got(model)[0].header("proxy-authorization") is None
    for name in ("direct", "spared"):  # these names lead nowhere, so the request fails, and not at the proxy
        assert ask(program, CHAT, f"{name}-{model}").status == 502
    assert len(upstream.got(model)) == 2


# -- TLS ---------------------------------------------------------------------

@needs_openssl
@pytest.mark.parametrize("name", ["secure", "number"])
def test_a_certificate_that_ca_file_vouches_for_is_trusted(ways, model, name):
    ways.secure.on(model, answer_json(OK))
    assert [ask(ways.program, CHAT, f"{name}-{model}").status for _ in range(2)] == [200, 200]
    got = ways.secure.got(model)
    assert got[0].connection == got[1].connection
    assert got[0].header("authorization") == f"Bearer {KEY}"


@needs_openssl
def test_a_tls_connection_that_the_provider_closes_between_requests_is_noticed(ways, model):
    ways.secure.on(model, answer_json(OK))
    assert ask(ways.program, CHAT, f"secure-{model}").status == 200
    forget(ways.secure)
    assert ask(ways.program, CHAT, f"secure-{model}").status == 200


@needs_openssl
def test_a_stream_comes_through_tls_as_it_is(ways, model):
    ways.secure.on(model, answer_stream(b": hi\n\n", b"data: {}\n\n", b"data: [DONE]\n\n"))
    reply = ask(ways.program, CHAT, f"secure-{model}", stream=True)
    assert (reply.body, reply.broken) == (b": hi\n\ndata: {}\n\ndata: [DONE]\n\n", False)


@needs_openssl
@pytest.mark.parametrize("name, words", [
    ("stranger", ["certificate", "ca_file"]),
    ("other", ["certificate", "localhost"]),
    ("unspoken", ["TLS"]),
], ids=["unknown authority", "another host's", "no TLS there"])
def test_a_provider_whose_tls_is_not_right_gets_no_request(ways, model, name, words):
    ways.wire.handle = lambda peer: (peer.sock.recv(1000), peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    for server in (ways.secure, ways.other):
        server.on(model, answer_json(OK))
    reply = ask(ways.program, CHAT, f"{name}-{model}")
    assert_unreached(reply)
    assert [w for w in words if w not in reply.json["error"]["message"]] == []
    assert not any(server.got(model) for server in (ways.secure, ways.other))



# ============================================================================
#  13  Server
# ============================================================================

class Tape(io.BytesIO):
    """Bytes from which the standard library's client reads one answer after another."""

    def makefile(self, *_: Any) -> Any:
        """What the client asks a socket for."""
        return self

    def close(self) -> None:
        """The client closes what it read an answer from; the next one is still on the tape."""


def replies(data: bytes, *methods: str) -> list[Reply]:
    """All answers in `data`; `methods` are those of the requests, POST where none is given."""
    tape, found = Tape(data), []
    while tape.tell() < len(data):
        method = methods[len(found)] if len(found) < len(methods) else "POST"
        found.append(read_one(tape, method))
    return found


def read_one(source: Any, method: str = "POST") -> Reply:
    """The next answer from a socket or a tape."""
    response = http.client.HTTPResponse(source, method=method)
    response.begin()
    return Reply(response.status, {n.lower(): v for n, v in response.getheaders()}, response.read())


def statuses(data: bytes, *methods: str) -> list[int]:
    """The statuses of all answers in `data`."""
    return [reply.status for reply in replies(data, *methods)]


def values(data: bytes, name: str) -> list[str]:
    """The values of all header lines `name` in the first answer in `data`."""
    lines = data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return [value.strip() for n, _, value in (line.partition(":") for line in lines) if n.lower() == name]


def to_bytes(first: str, *lines: str, body: bytes = b"", host: str = "host: localhost") -> bytes:
    """A request as it goes over the wire, with no header but Host and those given."""
    return "\r\n".join([first, *([host] if host else []), *lines, "", ""]).encode("latin-1") + body


def sized(first: str, body: bytes, *lines: str, host: str = "host: localhost") -> bytes:
    """A request that declares the length of its body."""
    return to_bytes(first, f"content-length: {len(body)}", *lines, body=body, host=host)


def chat(model: str, *lines: str, version: str = "1.1", path: str = CHAT.path, **more: Any) -> bytes:
    """A Chat request for `model` with its length."""
    body = json.dumps(body_for(CHAT, model, **more)).encode()
    return sized(f"POST {path} HTTP/{version}", body, *lines)


def chat_of_size(model: str, size: int) -> bytes:
    """A Chat body of exactly `size` bytes."""
    empty = len(json.dumps(body_for(CHAT, model, user="")))
    return json.dumps(body_for(CHAT, model, user="x" * (size - empty))).encode()


def chunked(body: bytes, size: int) -> bytes:
    """`body` in chunks of `size` bytes, whole."""
    return b"".join(chunk(body[i:i + size]) for i in range(0, len(body), size)) + b"0\r\n\r\n"


def all_at_once(program: Running, *requests: bytes) -> list[bytes]:
    """What each of several connections answers to its request, all open at the same time until they close."""
    with contextlib.ExitStack() as stack:
        socks = []
        for data in requests:
            socks.append(stack.enter_context(program.connect()))
            with contextlib.suppress(ConnectionError):
                socks[-1].sendall(data)
        return [read_all(sock) for sock in socks]


def settings(**values: Any) -> str:
    """Lines for the `[server]` table."""
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


POST = "POST /v1/chat/completions HTTP/1.1"
CLOSE = "connection: close"
CHUNKED = "transfer-encoding: chunked"
HEALTH = to_bytes("GET /healthz HTTP/1.1")
LAST = to_bytes("GET /healthz HTTP/1.1", CLOSE)
FINE = answer_json({"said": True})
LINE_LIMIT, HEAD_LIMIT, FIELD_LIMIT, BODY_LIMIT = 256, 1024, 16, 65536


@pytest.fixture
def tight(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program with small limits of size."""
    return programs(config_for(upstream.url, server=settings(
        max_request_line_bytes=LINE_LIMIT, max_head_bytes=HEAD_LIMIT, max_headers=FIELD_LIMIT,
        max_request_body_bytes=BODY_LIMIT)))


BRISK = settings(head_timeout_secs=0.25, body_timeout_secs=0.4, keepalive_timeout_secs=0.25)


@pytest.fixture
def brisk(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program with short limits of time."""
    return programs(config_for(upstream.url, server=BRISK))


# -- connections that go on and that end

@pytest.mark.parametrize("version, lines, stays", [
    ("1.1", [], True),
    ("1.1", ["connection: keep-alive"], True),
    ("1.1", ["connection: x-other"], True),
    ("1.1", ["connection: close"], False),
    ("1.1", ["Connection: x-other ,\tCLOSE"], False),
    ("1.1", ["connection: x-other", "connection: close"], False),
    ("1.1", ["connection: keep-alive, close"], False),
    ("1.0", [], False),
    ("1.0", ["connection: x-other"], False),
    ("1.0", ["connection: keep-alive"], True),
    ("1.0", ["Connection: Keep-Alive"], True),
    ("1.0", ["connection: keep-alive, close"], False),
])
def test_a_connection_persists_as_version_and_options_say(program, upstream, model, version, lines, stays):
    upstream.on(model, FINE)
    with program.connect() as sock:
        sock.sendall(chat(model, *lines, version=version))
        first = read_one(sock)
        assert (first.status, first.body) == (200, b'{"said": true}')
        if not stays:
            assert first.headers["connection"] == "close"
            assert read_all(sock) == b""
            return
        assert first.headers.get("connection") == ("keep-alive" if version == "1.0" else None)
        sock.sendall(chat(model, version=version))
        assert read_one(sock).status == 200


def test_fifty_requests_share_one_connection(program, upstream, model):
    upstream.on(model, *[answer_json({"n": n}) for n in range(50)])
    got = []
    with program.connect() as sock:
        for n in range(50):
            sock.sendall(chat(model, padding="x" * (n * 97)))
            got.append(read_one(sock).json["n"])
    assert got == list(range(50))
    assert len({request.connection for request in upstream.got(model)}) == 1


def test_a_stream_to_an_old_client_is_not_chunked_and_ends_with_the_connection(program, upstream, model):
    upstream.on(model, answer_stream(b'data: {"id":"1"}\n\n', b"data: [DONE]\n\n"))
    raw = program.talk(chat(model, "connection: keep-alive", version="1.0", stream=True))
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert values(raw, "transfer-encoding") == values(raw, "content-length") == []
    assert values(raw, "connection") == ["close"]
    assert raw.split(b"\r\n\r\n", 1)[1] == b'data: {"id":"1"}\n\ndata: [DONE]\n\n'


def test_a_stream_to_an_old_client_that_is_not_whole_ends_with_a_reset(program, upstream, model):
    upstream.on(model, answer_stream(b'data: {"id":"1"}\n\n'))
    with program.connect() as sock:
        sock.sendall(chat(model, version="1.0", stream=True))
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass


def test_nothing_is_served_behind_a_stream_that_broke(program, upstream, model):
    upstream.on(model, answer_stream(b"data: {}\n\n"), FINE)
    raw = program.talk(chat(model, stream=True) + chat(model) + HEALTH)
    assert raw.count(b"HTTP/1.1 ") == 1
    reply = read_reply(raw)
    assert (reply.status, reply.body, reply.broken) == (200, b"data: {}\n\n", True)
    assert len(upstream.got(model)) == 1


def test_pipelined_requests_are_answered_in_order(program, upstream, model):
    def slow(peer: Peer, request: Received) -> None:
        time.sleep(0.1)
        answer_json({"n": 1})(peer, request)

    upstream.on(model, slow, answer_stream(b"data: {}\n\n", b"data: [DONE]\n\n"), answer_json({"n": 3}))
    raw = program.talk(
        chat(model) + HEALTH + to_bytes("POST /v1/messages HTTP/1.1", "content-length: 3", body=b"{]}")
        + to_bytes("HEAD /healthz HTTP/1.1") + chat(model, stream=True) + b"\r\n"
        + to_bytes("GET /nothing HTTP/1.1") + chat(model) + LAST)
    found = replies(raw, "POST", "GET", "POST", "HEAD")
    assert [reply.status for reply in found] == [200, 200, 400, 200, 200, 404, 200, 200]
    assert found[0].json == {"n": 1} and found[6].json == {"n": 3}
    assert found[4].body == b"data: {}\n\ndata: [DONE]\n\n"
    ids = [int(reply.headers["x-proxai-request-id"]) for reply in found]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("size", [300_000, 262_144 + 3, 70_000])
def test_large_pipelined_bodies_arrive_whole(program, upstream, model, size):
    upstream.on(model, FINE)
    bodies = [json.dumps(body_for(CHAT, model, n=n, user="x" * size)).encode() for n in range(3)]
    last = to_bytes(POST, CHUNKED, body=chunked(bodies[2], 99_991))
    assert statuses(program.talk(sized(POST, bodies[0]) + sized(POST, bodies[1]) + last + LAST)) == [200] * 4
    assert [request.body for request in upstream.got(model)] == bodies


def test_what_follows_a_request_that_closes_is_not_served(program, upstream, model):
    upstream.on(model, FINE)
    assert statuses(program.talk(chat(model, CLOSE) + chat(model))) == [200]
    assert len(upstream.got(model)) == 1


def test_blank_lines_before_a_request_are_passed_over(program, upstream, model):
    upstream.on(model, FINE)
    data = b"\r\n\r\n" + chat(model) + b"\r\n" + chat(model) + b"\r\n\r\n\r\n" + LAST
    assert statuses(program.talk(data)) == [200] * 3


def test_a_flood_of_blank_lines_is_no_work(tmp_path, upstream):
    running = Running(tmp_path, config=config_for(upstream.url))
    try:
        with running.connect() as sock:
            with contextlib.suppress(ConnectionError):  # it may be refused before its end
                sock.sendall(b"\r\n" * (4 << 20) + LAST)
            assert statuses(read_all(sock)) in ([200], [400], [431])
    finally:
        running.stop()


def test_requests_may_come_byte_by_byte(program, upstream, model):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    data = b"\r\n" + chat(model) + to_bytes("POST /chat/completions HTTP/1.1", "Transfer-Encoding: chunked",
                                            body=b'5;a="b;c"\r\n' + body[:5] + b"\r\n" + chunk(body[5:])
                                            + b"00\r\nx-t: 1\r\n\r\n") + LAST
    with program.connect() as sock:
        for i in range(len(data)):
            sock.sendall(data[i:i + 1])
        assert statuses(read_all(sock)) == [200] * 3
    assert [request.body for request in upstream.got(model)] == [body, body]


def test_a_client_that_closes_within_a_head_gets_nothing(program):
    with program.connect() as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""


@pytest.mark.parametrize("reset, length", [(False, 98701), (True, 98702)], ids=["closed", "reset"])
def test_a_client_that_goes_away_within_its_body_reaches_no_provider(program, upstream, model, reset, length):
    upstream.on(model, FINE)
    before = len(program.lines)
    with program.connect() as sock:
        sock.sendall(to_bytes(POST, f"content-length: {length}", body=chat_of_size(model, 1000)))
        line = rf'"event":"recv".*"request_id":"([0-9]+)".*"content_length":{length}'
        request_id = program.wait_line(line)[1]
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert [event["event"] for event in program.events(request_id)] == ["recv", "closed"]
    assert [line for line in program.lines[before:] if "Traceback" in line] == []
    assert upstream.got(model) == []


# -- requests that two readers could take for different ones

BAD_HEADS = {
    "length and chunked": ("host: a.localhost", "content-length: {n}", CHUNKED),
    "chunked and length": ("host: a.localhost", CHUNKED, "content-length: {n}"),
    "two lengths": ("host: a.localhost", "content-length: {n}", "content-length: 0"),
    "two equal lengths": ("host: a.localhost", "content-length: {n}", "content-length: {n}"),
    "a list of lengths": ("host: a.localhost", "content-length: {n}, {n}"),
    "a length with a plus": ("host: a.localhost", "content-length: +{n}"),
    "a negative length": ("host: a.localhost", "content-length: -{n}"),
    "a length in hex": ("host: a.localhost", "content-length: 0x{n}"),
    "a length with an underscore": ("host: a.localhost", "content-length: 1_0"),
    "a length with a blank": ("host: a.localhost", "content-length: 1 0"),
    "a length with a fraction": ("host: a.localhost", "content-length: {n}.0"),
    "a length in other digits": ("host: a.localhost", "content-length: \xb2"),
    "an empty length": ("host: a.localhost", "content-length:"),
    "an empty length and another": ("host: a.localhost", "content-length:", "content-length: {n}"),
    "a blank before the colon": ("host: a.localhost", "transfer-encoding : chunked", "content-length: {n}"),
    "a tab before the colon": ("host: a.localhost", "transfer-encoding\t: chunked", "content-length: {n}"),
    "a folded line": ("host: a.localhost", "x: y\r\n transfer-encoding: chunked", "content-length: {n}"),
    "a folded value": ("host: a.localhost", "transfer-encoding:\r\n chunked"),
    "a fold with a tab": ("host: a.localhost", "content-length: {n}\r\n\t0"),
    "a fold as the first line": (" content-length: {n}", "host: a.localhost"),
    "a bare LF in a line": ("host: a.localhost", "x: y\ntransfer-encoding: chunked", "content-length: {n}"),
    "a bare CR in a line": ("host: a.localhost", "x: y\rtransfer-encoding: chunked", "content-length: {n}"),
    "a NUL in a value": ("host: a.localhost", "x: a\0b", "content-length: {n}"),
    "a DEL in a value": ("host: a.localhost", "x: a\x7fb", "content-length: {n}"),
    "a NUL in a name": ("host: a.localhost", "x\0: b", "content-length: {n}"),
    "a letter beyond ASCII in a name": ("host: a.localhost", "x\xe4: b", "content-length: {n}"),
    "an empty name": ("host: a.localhost", ": chunked", "content-length: {n}"),
    "a line without a colon": ("host: a.localhost", "content-length {n}"),
    "chunked twice, in two lines": ("host: a.localhost", CHUNKED, CHUNKED),
    "chunked behind a control character": ("host: a.localhost", "transfer-encoding: \x0bchunked"),
    "no host": ("content-length: {n}",),
    "two hosts": ("host: a.localhost", "host: b.localhost", "content-length: {n}"),
    "two equal hosts": ("host: a.localhost", "host: a.localhost", "content-length: {n}"),
    "a host with a path": ("host: a.localhost/x", "content-length: {n}"),
    "a host with a user": ("host: a@localhost", "content-length: {n}"),
    "a list of hosts": ("host: a.localhost, b.localhost:1", "content-length: {n}"),
    "a host with a port of letters": ("host: localhost:http", "content-length: {n}"),
}


@pytest.mark.parametrize("lines", BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_malformed_head_gets_one_400_and_nothing_behind_is_served(program, upstream, model, lines):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    head = "\r\n".join([POST, *lines, "", ""]).format(n=len(body))
    raw = program.talk(head.encode("latin-1") + body + chat(model) + HEALTH)
    assert statuses(raw) == [400]
    assert values(raw, "connection") == ["close"]
    assert upstream.got(model) == []


@pytest.mark.parametrize("coding", [
    "identity", "gzip, chunked", "chunked, chunked", "chunked, gzip", "xchunked", "chunked;q=1", '"chunked"',
    ",chunked", "chunked,", "", "chun ked"])
def test_a_transfer_coding_other_than_chunked_is_refused(program, upstream, model, coding):
    upstream.on(model, FINE)
    body = chunked(json.dumps(body_for(CHAT, model)).encode(), 20)
    raw = program.talk(to_bytes(POST, f"transfer-encoding: {coding}", body=body) + chat(model))
    assert statuses(raw) in ([400], [501])  # 501 is what RFC 9112 6.1 wants for a coding that is not known
    assert values(raw, "connection") == ["close"]
    assert upstream.got(model) == []


def test_an_old_client_cannot_send_chunks(program, upstream, model):
    upstream.on(model, FINE)
    body = chunked(json.dumps(body_for(CHAT, model)).encode(), 20)
    data = to_bytes("POST /v1/chat/completions HTTP/1.0", CHUNKED, "connection: keep-alive", body=body)
    assert statuses(program.talk(data + chat(model))) == [400]
    assert upstream.got(model) == []


BAD_CHUNKS = {  # what comes instead of the chunk line "10\r\n", or behind the sixteen bytes of the chunk
    "a plus": (b"+10\r\n", b"\r\n0\r\n\r\n"),
    "a minus": (b"-10\r\n", b"\r\n0\r\n\r\n"),
    "a prefix": (b"0x10\r\n", b"\r\n0\r\n\r\n"),
    "a blank in front": (b" 10\r\n", b"\r\n0\r\n\r\n"),
    "a blank within": (b"1 0\r\n", b"\r\n0\r\n\r\n"),
    "an underscore": (b"1_0\r\n", b"\r\n0\r\n\r\n"),
    "no size": (b"\r\n", b"\r\n0\r\n\r\n"),
    "no size but an extension": (b";a=b\r\n", b"\r\n0\r\n\r\n"),
    "no hex digit": (b"1g\r\n", b"\r\n0\r\n\r\n"),
    "a bare LF behind the size": (b"10\n", b"\r\n0\r\n\r\n"),
    "a bare CR behind the size": (b"10\r", b"\r\n0\r\n\r\n"),
    "a bare LF in an extension": (b"10;a\nb\r\n", b"\r\n0\r\n\r\n"),
    "a bare CR in an extension": (b"10;a\rb\r\n", b"\r\n0\r\n\r\n"),
    "a NUL in an extension": (b"10;a=\0\r\n", b"\r\n0\r\n\r\n"),
    "an extension with an open quote": (b'10;a="b\r\n', b"\r\n0\r\n\r\n"),
    "an endless extension": (b"10;a=" + b"b" * 70_000 + b"\r\n", b"\r\n0\r\n\r\n"),
    "more than the size": (b"10\r\n", b"x\r\n0\r\n\r\n"),
    "less than the size": (b"11\r\n", b"\r\n0\r\n\r\n"),
    "no line end behind the data": (b"10\r\n", b"0\r\n\r\n"),
    "a bare LF behind the data": (b"10\r\n", b"\n0\r\n\r\n"),
    "a bare CR behind the data": (b"10\r\n", b"\r0\r\n\r\n"),
    "a trailer without a colon": (b"10\r\n", b"\r\n0\r\nx y\r\n\r\n"),
    "a trailer with a blank before the colon": (b"10\r\n", b"\r\n0\r\nx : y\r\n\r\n"),
    "a trailer with a bare LF": (b"10\r\n", b"\r\n0\r\nx: y\nz: a\r\n\r\n"),
    "a folded trailer": (b"10\r\n", b"\r\n0\r\nx: y\r\n z\r\n\r\n"),
    "a bare LF at the end": (b"10\r\n", b"\r\n0\r\n\n"),
}


@pytest.mark.parametrize("size, after", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_malformed_chunk_gets_one_400_and_nothing_behind_is_served(program, upstream, model, size, after):
    upstream.on(model, FINE)
    head = to_bytes(POST, CHUNKED)
    rest = size + b'{"messages": [],' + after + chat(model) + HEALTH
    with program.connect() as whole, program.connect() as split:
        split.sendall(head)
        whole.sendall(head + rest)
        answers = [read_all(whole)]
        split.sendall(rest)
        answers.append(read_all(split))
    for raw in answers:
        assert (statuses(raw), values(raw, "connection")) == ([400], ["close"])
    assert upstream.got(model) == []


@pytest.mark.parametrize("first, expected", [
    ("POST /nothing HTTP/1.1", 404),
    ("PUT /v1/chat/completions HTTP/1.1", 405),
    ("POST http://example.com/v1/chat/completions HTTP/1.1", 403),
    ("GET /healthz HTTP/1.1", 200),
    ("HEAD /healthz HTTP/1.1", 200),
    ("OPTIONS * HTTP/1.1", 404),
    ("POST /v1/messages HTTP/1.1", 400),
])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_unwanted_body_is_not_taken_for_a_request(program, upstream, model, first, expected, framing):
    upstream.on(model, FINE)
    inner = chat(model)
    if framing == "length":
        data = sized(first, inner)
    else:
        data = to_bytes(first, CHUNKED, body=chunked(inner, len(inner)))
    raw = program.talk(data + LAST)
    found = replies(raw, first.split()[0], "GET")
    assert found[0].status == expected
    assert upstream.got(model) == []
    if len(found) == 1:
        assert found[0].headers["connection"] == "close"  # RFC 9112 9.6: who closes says so
    else:
        assert [reply.status for reply in found] == [expected, 200]


@pytest.mark.parametrize("data, expected", [
    (b"GET /\r\n\r\n", 400),
    (b"GET  /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz  HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET\t/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b" GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1 \r\nhost: localhost\r\n\r\n", 400),
    (b"GET /health z HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz\x80 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz#x HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz http/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz HTTP/1\r\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.10\r\nhost: localhost\r\n\r\n", 400),
    (b"G@T /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\nhost: localhost\n\n", 400),
    (b"GET /healthz HTTP/1.1\nhost: localhost\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\n", 400),
    (b"GET /healthz HTTP/2.0\r\nhost: localhost\r\n\r\n", 505),
    (b"GET /healthz HTTP/0.9\r\nhost: localhost\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    (b"\n\nGET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    (b"\0\0\0\0\n", 400),
], ids=repr)
def test_what_is_no_request_gets_one_answer_and_the_connection_closes(program, data, expected):
    raw = program.talk(data + HEALTH)
    assert statuses(raw) == [expected]
    assert values(raw, "connection") == ["close"]
    assert len(values(raw, "x-proxai-request-id")) == len(values(raw, "date")) == 1


def test_a_higher_minor_version_is_served_as_this_one(program):
    assert statuses(program.talk(to_bytes("GET /healthz HTTP/1.2") + LAST)) == [200, 200]


def test_a_client_that_speaks_tls_is_told_so(program):
    out = ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    reply, = replies(program.talk(out.read()))
    assert reply.status == 400 and b"http://" in reply.body


# -- bodies

@pytest.mark.parametrize("size, extension, trailer", [
    (1, b"", b""),
    (7, b";a", b"x-checksum: 1\r\n"),
    (16, b";a=b;c=\"d;\\\"\"", b"x-checksum: 1\r\nx-other:\r\n"),
    (1000, b" ; a = b", b"transfer-encoding: chunked\r\ncontent-length: 1\r\n"),
    (1 << 20, b";a=" + b"b" * 1000, b""),
])
def test_a_chunked_body_arrives_whole_with_its_length(program, upstream, model, size, extension, trailer):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model, user="\u00e4\r\n0\r\n\r\n" * 300), ensure_ascii=False).encode()
    parts = [body[i:i + size] for i in range(0, len(body), size)]
    data = b"".join(b"%03X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    data += b"0%b\r\n%b\r\n" % (extension, trailer)
    raw = program.talk(to_bytes(POST, "Transfer-Encoding: Chunked", "trailer: x-checksum", body=data) + LAST)
    assert statuses(raw) == [200, 200]
    got, = upstream.got(model)
    assert got.body == body
    assert got.header("content-length") == str(len(body))
    assert got.header("transfer-encoding") is got.header("x-checksum") is got.header("trailer") is None


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_client_that_waits_for_100_gets_it_and_sends_its_body(program, upstream, model, expect, framing):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    length = f"content-length: {len(body)}" if framing == "length" else CHUNKED
    with program.connect() as sock:
        for _ in range(2):
            sock.sendall(to_bytes(POST, length, f"expect: {expect}"))
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body if framing == "length" else chunked(body, 9))
            assert read_one(sock).status == 200
    assert [(got.body, got.header("expect")) for got in upstream.got(model)] == [(body, None)] * 2


@pytest.mark.parametrize("first, length, expected", [
    ("POST /nothing HTTP/1.1", 100, 404),
    ("PUT /v1/chat/completions HTTP/1.1", 100, 405),
    ("POST http://example.com/v1/chat/completions HTTP/1.1", 100, 403),
    (POST, BODY_LIMIT + 1, 413),
])
def test_a_body_that_is_not_wanted_is_refused_without_a_100(tight, first, length, expected):
    with tight.connect() as sock:
        sock.sendall(to_bytes(first, f"content-length: {length}", "expect: 100-continue"))
        raw = read_all(sock)
    assert raw.startswith(b"HTTP/1.1 %d " % expected)
    assert values(raw, "connection") == ["close"]  # else the next bytes could be the body or a request


def test_an_expectation_that_is_not_known_gets_417(program, upstream, model):
    upstream.on(model, FINE)
    assert statuses(program.talk(chat(model, "expect: 200-ok") + HEALTH)) == [417]
    assert upstream.got(model) == []


@pytest.mark.parametrize("version, expected", [("1.0", b"HTTP/1.1 200 "), ("1.1", b"HTTP/1.1 ")])
def test_a_body_that_comes_with_its_expectation_is_served(program, upstream, model, version, expected):
    upstream.on(model, FINE)
    raw = program.talk(chat(model, "expect: 100-continue", CLOSE, version=version))
    assert raw.startswith(expected)  # an old client must not get a 100
    assert statuses(raw) == [200]


def test_an_old_client_that_expects_100_is_not_answered_with_one(program, upstream, model):
    upstream.on(model, FINE)
    data = chat(model, "expect: 100-continue", version="1.0")
    with program.connect() as sock:
        sock.sendall(data[:-10])
        time.sleep(0.05)
        sock.sendall(data[-10:])
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


# -- limits of size

@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size, expected", [(BODY_LIMIT - 1, 200), (BODY_LIMIT, 200), (BODY_LIMIT + 1, 413)])
def test_a_body_may_be_as_large_as_the_limit(tight, upstream, model, framing, size, expected):
    upstream.on(model, FINE)
    body = chat_of_size(model, size)
    assert len(body) == size
    if framing == "length":
        data = to_bytes(POST, f"content-length: {size}", body=body)
    else:
        data = to_bytes(POST, CHUNKED, body=chunked(body, 1000))
    raw = tight.talk(data + LAST)
    assert statuses(raw)[0] == expected
    assert len(upstream.got(model)) == (expected == 200)
    if expected == 413:
        assert str(BODY_LIMIT).encode() in raw
        assert len(replies(raw)) == 2 or values(raw, "connection") == ["close"]


@pytest.mark.parametrize("length", [BODY_LIMIT + 1, 10**9, 10**18, 10**40])
def test_a_declared_length_beyond_the_limit_is_refused_before_the_body_comes(tight, length):
    with tight.connect() as sock:
        sock.sendall(to_bytes(POST, f"content-length: {length}"))
        assert read_one(sock).status == 413


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nothing"])
def test_a_client_that_sends_all_of_a_refused_body_first_still_gets_the_answer(tight, framing, path):
    body = b"x" * (6 << 20)
    length = f"content-length: {len(body)}" if framing == "length" else CHUNKED
    with tight.connect() as sock:
        sock.sendall(to_bytes(f"POST {path} HTTP/1.1", length))
        sock.sendall(body if framing == "length" else chunked(body, 100_000))
        raw = read_all(sock)
    assert statuses(raw) == [404 if path == "/nothing" else 413]
    assert values(raw, "connection") == ["close"]


@pytest.mark.parametrize("size, expected", [(LINE_LIMIT - 1, 200), (LINE_LIMIT, 200), (LINE_LIMIT + 1, 414)])
@pytest.mark.parametrize("split", [0, -1, 1])
def test_a_request_line_may_be_as_long_as_the_limit(tight, size, expected, split):
    line = "GET /healthz?" + "x" * (size - len("GET /healthz? HTTP/1.1")) + " HTTP/1.1"
    assert len(line) == size
    data = to_bytes(line, CLOSE)
    with tight.connect() as sock:
        if split:  # two packets, the first ending around the line's CR
            sock.sendall(data[:size + split])
            time.sleep(0.05)
        sock.sendall(data[size + split:] if split else data)
        assert statuses(read_all(sock)) == [expected]


def test_an_endless_request_line_is_refused_before_it_ends(tight):
    assert statuses(tight.talk(b"GET /" + b"x" * LINE_LIMIT)) == [414]


@pytest.mark.parametrize("size", range(HEAD_LIMIT - 1, HEAD_LIMIT + 6))
def test_how_a_head_is_split_does_not_decide_whether_it_is_too_large(tight, size):
    start = to_bytes("GET /healthz HTTP/1.1", CLOSE)[:-2] + b"x: "
    data = start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"
    assert len(data) == size
    socks = [tight.connect() for _ in range(5)]
    for missing, sock in enumerate(socks):
        sock.sendall(data[:size - missing])
    time.sleep(0.03)
    for missing, sock in enumerate(socks):
        with contextlib.suppress(OSError):
            sock.sendall(data[size - missing:])
    found = [statuses(read_all(sock)) for sock in socks]
    for sock in socks:
        sock.close()
    assert found == [found[0]] * 5
    assert found[0] == [200] if size <= HEAD_LIMIT else found[0] in ([200], [431])
    assert found[0] == [431] or size <= HEAD_LIMIT + 4  # the limit may or may not count the empty line


@pytest.mark.parametrize("data", [
    to_bytes("GET /healthz HTTP/1.1", "x: " + "x" * HEAD_LIMIT),
    to_bytes("GET /healthz HTTP/1.1", "x: " + "x" * HEAD_LIMIT)[:-4],
    to_bytes("GET /healthz HTTP/1.1", *["x: " + "x" * 90] * 14)[:-2],
], ids=["one line", "an unfinished line", "an unfinished head"])
def test_a_head_that_is_too_large_is_refused(tight, data):
    assert statuses(tight.talk(data)) == [431]


@pytest.mark.parametrize("data, expected", [
    (to_bytes("GET /healthz HTTP/1.1", "x: a", CLOSE), 200),
    (b"GET /healthz HTTP/1.1\r\nhost: localhost\nx: " + b"a" * 100, 400),
    (b"GET /healthz HTTP/1.1\nhost: localhost\r\nx: " + b"a" * 100, 400),
    (b"GET /" + b"a" * 2 * LINE_LIMIT, 414),
    (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2 * HEAD_LIMIT, 431),
], ids=["good", "bare LF", "bare LF behind the first line", "long line", "large head"])
def test_a_head_in_small_pieces_meets_the_same_rules(tight, data, expected):
    with tight.connect() as sock:
        with contextlib.suppress(ConnectionError):
            for piece in range(0, len(data), 7):
                sock.sendall(data[piece:piece + 7])
                time.sleep(0.0005)
        assert statuses(read_all(sock)) == [expected]


@pytest.mark.parametrize("size, expected", [(512, 403), (513, 400)])
def test_a_host_header_longer_than_any_name_is_no_request(program, size, expected):
    request = to_bytes("GET /healthz HTTP/1.1", CLOSE, host="host: " + "a" * size)
    assert statuses(program.talk(request)) == [expected]


@pytest.mark.parametrize("count, expected", [(FIELD_LIMIT, 200), (FIELD_LIMIT + 1, 431)])
def test_a_head_may_have_as_many_lines_as_the_limit(tight, count, expected):
    lines = [f"x-{n}: {n}" for n in range(count - 2)]
    assert statuses(tight.talk(to_bytes("GET /healthz HTTP/1.1", CLOSE, *lines))) == [expected]


# -- limits of time

def test_an_idle_connection_is_closed_without_a_word(brisk):
    answers = all_at_once(brisk, b"", HEALTH, HEALTH + HEALTH)
    assert [statuses(raw) for raw in answers] == [[], [200], [200, 200]]


UNFINISHED_HEADS = (b"P", b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n",
                    to_bytes(POST, "x: y")[:-1], b"\r\nP")


def test_a_head_that_does_not_come_gets_408(brisk):
    for raw in all_at_once(brisk, *UNFINISHED_HEADS):
        assert (statuses(raw), values(raw, "connection")) == ([408], ["close"])


def test_a_head_that_only_trickles_gets_408(brisk):
    data = to_bytes("GET /healthz HTTP/1.1", "x: " + "x" * 8000)
    with brisk.connect() as sock:
        sock.settimeout(0.02)
        for i in range(len(data)):
            sock.sendall(data[i:i + 1])
            with contextlib.suppress(TimeoutError):
                raw = sock.recv(65536)
                break
        sock.settimeout(PATIENCE)
        assert statuses(raw + read_all(sock)) == [408]


UNFINISHED_BODIES = {
    "half of it": (["content-length: 1000"], b'{"model":'),
    "none of it": (["content-length: 1000"], b""),
    "none after 100": (["content-length: 1000", "expect: 100-continue"], b""),
    "no chunk": ([CHUNKED], b""),
    "half a chunk line": ([CHUNKED], b"5"),
    "half a chunk": ([CHUNKED], b"5\r\nhell"),
    "no end of the trailers": ([CHUNKED], b"5\r\nhello\r\n0\r\nx: y\r\n"),
}


def test_a_body_that_stops_gets_408(brisk):
    answers = all_at_once(brisk, *(to_bytes(POST, *lines, body=part)
                                   for lines, part in UNFINISHED_BODIES.values()))
    for name, raw in zip(UNFINISHED_BODIES, answers, strict=True):
        raw = raw.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert (name, statuses(raw), values(raw, "connection")) == (name, [408], ["close"])


def test_a_slow_but_steady_body_is_served(brisk, upstream, model):
    upstream.on(model, FINE)
    data = chat(model)
    with brisk.connect() as sock:
        sock.sendall(data[:-12])
        for i in range(-12, -1):
            sock.sendall(data[i:i + 1])
            time.sleep(0.05)
        sock.sendall(data[-1:])
        assert read_one(sock).status == 200


def test_the_limits_of_the_client_do_not_end_its_wait_for_an_answer(brisk, upstream, model):
    def slow(peer: Peer, request: Received) -> None:
        time.sleep(0.45)
        peer.send(SSE_HEAD + chunk(b"data: {}\n\n"))
        time.sleep(0.45)
        peer.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream.on(model, slow)
    reply = brisk.post(CHAT.path, body_for(CHAT, model, stream=True))
    assert (reply.body, reply.broken) == (b"data: {}\n\ndata: [DONE]\n\n", False)


# -- slow readers

def slow_reader(program: Running, buffer: int = 32768) -> socket.socket:
    """A client that the kernel holds little for."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", program.port))
    return sock


def resident(program: Running) -> int:
    """How many bytes of memory the program has in use, 0 where that cannot be known."""
    try:
        pages = Path(f"/proc/{program.process.pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_a_client_that_does_not_read_stalls_the_provider_and_gets_every_byte_later(program, upstream, model):
    frame = b'data: {"x":"' + b"x" * 65000 + b'"}\n\n'
    count = 600
    stalled: list[int] = []
    news = threading.Event()

    def push(peer: Peer, request: Received) -> None:
        data = SSE_HEAD + chunk(frame) * count + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        view, at = memoryview(data), 0
        peer.sock.settimeout(0.4)
        while at < len(data):
            try:
                at += peer.sock.send(view[at:at + 65536])
            except TimeoutError:
                stalled.append(at)
                news.set()
                peer.sock.settimeout(PATIENCE)
        news.set()

    upstream.on(model, push)
    upstream.on(model + "x", FINE)
    assert program.post(CHAT.path, body_for(CHAT, model + "x")).status == 200
    before = resident(program)
    with slow_reader(program) as sock:
        sock.sendall(chat(model, CLOSE, stream=True))
        assert news.wait(PATIENCE)
        grown = resident(program) - before
        assert program.post(CHAT.path, body_for(CHAT, model + "x")).status == 200  # nobody else waits
        raw = read_all(sock)
    assert stalled and stalled[0] < 24 << 20  # of 39 MB; what is on its way sits in the kernel's buffers
    assert grown < 8 << 20
    reply = read_reply(raw)
    assert not reply.broken
    assert reply.body == frame * count + b"data: [DONE]\n\n"


@pytest.mark.parametrize("asked", [HEALTH, sized("POST /nothing HTTP/1.1", b"")], ids=["health", "nothing"])
def test_a_client_that_asks_on_and_on_and_never_reads_is_not_read_either(programs, upstream, model, asked):
    running = programs(config_for(upstream.url), "--log-level", "error")
    upstream.on(model, FINE)
    assert running.post(CHAT.path, body_for(CHAT, model)).status == 200
    before, accepted, data = resident(running), 0, asked * 1000
    with slow_reader(running) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while accepted < 48 << 20:
                at = accepted % len(data)
                accepted += sock.send(data[at:at + 65536])
                if accepted < 200_000:
                    assert running.post(CHAT.path, body_for(CHAT, model)).status == 200
        assert running.post(CHAT.path, body_for(CHAT, model)).status == 200
        grown = resident(running) - before
    assert accepted < 16 << 20  # what is on its way sits in the kernel's buffers
    assert grown < 16 << 20


def test_bodies_are_let_go_once_the_answer_has_begun(program, upstream, model):
    if not resident(program):
        pytest.skip("how much memory the program has cannot be known here")
    said = [{"role": "user", "content": "word " * 20}] * 8000  # 1 MB
    upstream.on(model, answer_stream(b"data: {}\n\n", end=False))
    data = chat(model, stream=True, messages=said)
    with contextlib.ExitStack() as stack:
        def begin() -> None:
            sock = stack.enter_context(program.connect())
            sock.sendall(data)
            begun = b""
            while b"data: {}" not in begun:
                more = sock.recv(65536)
                assert more
                begun += more

        begin()
        begin()
        before = resident(program)
        for _ in range(20):
            begin()
        grown = resident(program) - before
    assert len(data) > 1_000_000 and grown < 10 << 20


@pytest.fixture
def impatient(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program that does not wait long for clients to take their answers."""
    return programs(config_for(upstream.url, server=settings(write_timeout_secs=0.6)))


def test_a_client_that_takes_nothing_for_too_long_is_cut_and_the_provider_freed(impatient, upstream, model):
    gone: list[bool] = []
    done = threading.Event()

    def push(peer: Peer, request: Received) -> None:
        peer.send(SSE_HEAD)
        try:
            for _ in range(1000):
                peer.send(chunk(b'data: {"x":"' + b"x" * 65000 + b'"}\n\n'))
            gone.append(False)
        except OSError:
            gone.append(True)
        done.set()

    upstream.on(model, push)
    with slow_reader(impatient) as sock:
        sock.sendall(chat(model, stream=True))
        assert done.wait(PATIENCE)
        assert gone == [True]
        assert read_reply(read_all(sock)).broken


def test_a_client_that_takes_a_large_answer_slowly_gets_all_of_it(impatient, upstream, model):
    body = json.dumps({"x": "x" * 7_900_000}).encode()
    upstream.on(model, answer(200, body, "content-type: application/json"))
    parts, size = [], 0
    with slow_reader(impatient) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(chat(model, CLOSE))
        for goal in range(0, 6_000_000, 1_500_000):  # it takes some twice in each limit, but all in two
            while size < goal and (data := sock.recv(65536)):
                parts.append(data)
                size += len(data)
            time.sleep(0.3)
        parts.append(read_all(sock))
    reply = read_reply(b"".join(parts))
    assert (len(reply.body), reply.broken) == (len(body), False)


# -- clients that go away

@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within the stream"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_goes_away_releases_the_provider(program, upstream, model, reset, begun, version):
    before = len(program.lines)
    arrived, done, gone = threading.Event(), threading.Event(), []

    def wait(peer: Peer, request: Received) -> None:
        if begun:
            peer.send(SSE_HEAD + chunk(b"data: {}\n\n"))
        arrived.set()
        gone.append(peer.gone())
        done.set()
        peer.close()

    upstream.on(model, wait)
    with program.connect() as sock:
        sock.sendall(chat(model, stream=True, version=version))
        assert arrived.wait(PATIENCE)
        if begun:
            assert sock.recv(65536)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert done.wait(PATIENCE)
    assert gone == [True]
    program.wait_line(rf'"event":"closed".*"model":"{model}"', 2)
    assert [line for line in program.lines[before:] if "Traceback" in line] == []


class Torn:
    """A transport whose socket is gone in one way or the other."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.aborted = raw, 0

    def get_extra_info(self, name: str) -> Any:
        """The socket, if it is still there."""
        return self.raw

    def abort(self) -> None:
        """Count."""
        self.aborted += 1


def refuse_option(*_: Any) -> None:
    """A setsockopt() that fails, as on macOS once the peer has reset the connection."""
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("raw", [types.SimpleNamespace(setsockopt=refuse_option), None],
                         ids=["fails", "gone"])
def test_a_cut_ends_the_connection_although_its_socket_takes_no_option(raw):
    connection = proxai.Connection(types.SimpleNamespace(loop=FakeLoop()), types.SimpleNamespace())
    connection.transport = transport = Torn(raw)
    connection.cut()
    assert (transport.aborted, connection.keep) == (1, False)


# -- the end

def drained(running: Running) -> int:
    """Wait until the program has ended by itself; its exit status."""
    try:
        return running.process.wait(PATIENCE)
    finally:
        running.stop()


needs_signals = pytest.mark.skipif(os.name != "posix", reason="there are no signals to send")


@needs_signals
def test_open_requests_end_before_the_program_does(tmp_path, upstream, model):
    go = threading.Event()

    def stream(peer: Peer, request: Received) -> None:
        peer.send(SSE_HEAD + chunk(b"data: {}\n\n"))
        go.wait(PATIENCE)
        peer.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def whole(peer: Peer, request: Received) -> None:
        go.wait(PATIENCE)
        FINE(peer, request)

    upstream.on(model, stream)
    upstream.on(model + "w", whole)
    upstream.on(model + "u", FINE)
    running = Running(tmp_path, config=config_for(upstream.url))
    try:
        with running.connect() as idle, running.connect() as fresh, running.connect() as open_stream, \
                running.connect() as waiting, running.connect() as uploading:
            idle.sendall(HEALTH)
            assert read_one(idle).status == 200
            waiting.sendall(chat(model + "w"))
            uploading.sendall(chat(model + "u")[:-5])
            open_stream.sendall(chat(model, stream=True))
            head = open_stream.recv(65536)
            assert b" 200 " in head
            deadline = time.monotonic() + PATIENCE
            while not upstream.got(model + "w") and time.monotonic() < deadline:
                time.sleep(0.01)
            running.process.send_signal(signal.SIGTERM)
            assert read_all(idle) == b""
            assert read_all(fresh) == b""
            with pytest.raises(ConnectionRefusedError):
                running.connect()
            assert running.process.poll() is None
            uploading.sendall(chat(model + "u")[-5:])
            uploaded = replies(read_all(uploading))
            go.set()
            reply = read_reply(head + read_all(open_stream))
            assert (reply.body, reply.broken) == (b"data: {}\n\ndata: [DONE]\n\n", False)
            answered = replies(read_all(waiting))
            for reply, in (uploaded, answered):
                assert (reply.status, reply.json) == (200, {"said": True})
                assert reply.headers["connection"] == "close"
        assert drained(running) == 0
    finally:
        running.stop()


@needs_signals
@pytest.mark.parametrize("grace, signals", [
    (0.2, [signal.SIGTERM]),
    (300, [signal.SIGTERM, signal.SIGTERM]),
    (300, [signal.SIGINT, signal.SIGTERM]),
], ids=["the grace is over", "a second signal", "a second signal of another kind"])
def test_what_is_open_is_cut_when(tmp_path, upstream, model, grace, signals):
    ends: list[bool] = []
    ended = threading.Semaphore(0)

    def hang(peer: Peer, request: Received) -> None:
        if request.json.get("stream"):
            peer.send(SSE_HEAD + chunk(b"data: {}\n\n"))
        ends.append(peer.gone())
        ended.release()
        peer.close()

    upstream.on(model, hang)
    running = Running(tmp_path, config=config_for(upstream.url, server=settings(shutdown_grace_secs=grace)))
    try:
        with running.connect() as open_stream, running.connect() as waiting:
            waiting.sendall(chat(model))
            open_stream.sendall(chat(model, stream=True))
            head = open_stream.recv(65536)
            while len(upstream.got(model)) < 2:
                time.sleep(0.01)
            running.process.send_signal(signals[0])
            running.wait_line(r'"event":"shutdown"')
            for number in signals[1:]:
                running.process.send_signal(number)
            assert read_reply(head + read_all(open_stream)).broken
            assert all(status >= 500 for status in statuses(read_all(waiting)))
        assert drained(running) == 0
        assert ended.acquire(timeout=PATIENCE) and ended.acquire(timeout=PATIENCE)
        assert ends == [True, True]
    finally:
        running.stop()


@needs_signals
@pytest.mark.parametrize("size, lines", [
    (6_000_000, [CLOSE]), (6_000_000, []), (12_000_000, [CLOSE]), (12_000_000, [])],
    ids=["held", "held, keeps", "relayed", "relayed, keeps"])
def test_a_slow_client_gets_the_tail_of_its_answer_before_the_program_ends(
        tmp_path, upstream, model, size, lines):
    body = json.dumps({"x": "x" * size}).encode()
    upstream.on(model, answer(200, body, "content-type: application/json"))
    running = Running(tmp_path, config=config_for(upstream.url))
    try:
        with slow_reader(running) as sock:
            sock.sendall(chat(model, *lines))
            parts = [sock.recv(1000)]
            running.process.send_signal(signal.SIGTERM)
            running.wait_line(r'"event":"shutdown"')
            with contextlib.suppress(ConnectionError):
                while data := sock.recv(65536):
                    parts.append(data)
                    time.sleep(0.002)
        reply = read_reply(b"".join(parts))
        assert (len(reply.body), reply.broken) == (len(body), False)
        assert drained(running) == 0
    finally:
        running.stop()


@needs_signals
@pytest.mark.parametrize("data, answered", [
    (to_bytes("POST /nothing HTTP/1.1", "content-length: 99999999", body=b"x" * 1000), b"HTTP/1.1 404"),
    (b"GARBAGE\r\n\r\n" + b"x" * 1000, b"HTTP/1.1 400"),
    (None, b"HTTP/1.1 200"),
    (to_bytes(POST, "content-length: 100", body=b"abc"), b""),
    (to_bytes(POST, "content-length: 100")[:-9], b""),
], ids=["lingering", "malformed", "reads nothing", "within its body", "within its head"])
def test_a_second_signal_does_not_wait_for_a_client_that_stays(tmp_path, upstream, model, data, answered):
    upstream.on(model, answer_json({"x": "x" * 7_900_000}))
    patience = settings(shutdown_grace_secs=300, write_timeout_secs=300)
    running = Running(tmp_path, config=config_for(upstream.url, server=patience))
    try:
        with slow_reader(running) as sock:
            sock.sendall(data or chat(model, CLOSE))
            if answered:
                assert sock.recv(20).startswith(answered)
            assert statuses(running.talk(LAST)) == [200]  # what was sent before has been seen, too
            running.process.send_signal(signal.SIGTERM)
            running.wait_line(r'"event":"shutdown"')
            running.process.send_signal(signal.SIGTERM)
            assert drained(running) == 0
    finally:
        running.stop()
    assert [line for line in running.lines if "Traceback" in line] == []


@needs_signals
def test_no_client_loses_what_the_kernel_had_no_room_for_when_the_end_came(tmp_path, upstream, model):
    """The program still holds the tails of the largest answers that it counts as done."""
    sizes = {f"{model}-{size}": size for size in range(60_000, 4_800_000, 60_000)}
    for name, size in sizes.items():
        upstream.on(name, answer_json("x" * size))
    running = Running(tmp_path, config=config_for(upstream.url))
    try:
        with contextlib.ExitStack() as stack:
            socks = {name: stack.enter_context(slow_reader(running)) for name in sizes}
            for name, sock in socks.items():
                sock.sendall(chat(name, CLOSE))
            heads = {name: sock.recv(1000) for name, sock in socks.items()}
            assert statuses(running.talk(LAST)) == [200]
            running.wait_line(r'"event":"end".*"path":"/healthz"')
            ended = [json.loads(line) for line in list(running.lines) if '"event":"end"' in line]
            done = [name for name in sizes if any(line.get("model") == name for line in ended)][-2:]
            for name in sizes.keys() - set(done):
                socks[name].close()
            running.process.send_signal(signal.SIGTERM)
            running.wait_line(r'"event":"shutdown"')
            time.sleep(0.3)  # for a program that would end too early
            found = {name: read_reply(heads[name] + read_all(socks[name])) for name in done}
        assert len(done) == 2
        assert [len(found[name].body) for name in done] == [sizes[name] + 2 for name in done]
        assert drained(running) == 0
    finally:
        running.stop()


# -- anything at all

def mutations(count: int) -> Iterator[bytes]:
    """Requests with a few bytes changed, the same ones each time."""
    chance = random.Random(9112)
    body = json.dumps(body_for(CHAT, "fuzz")).encode()
    plain = sized(POST, body, "accept: */*")
    seeds = [
        plain,
        plain + plain + LAST,
        to_bytes("POST /chat/completions HTTP/1.1", CHUNKED,
                 body=b"a;x=y\r\n" + body[:10] + b"\r\n" + chunk(body[10:]) + b"0\r\nx-t: 1\r\n\r\n"),
        sized("POST http://localhost/v1/chat/completions?a=b HTTP/1.0", body, "connection: keep-alive"),
        sized(POST, body, "expect: 100-continue"),
        HEALTH + plain,
    ]
    spice = [b"\r\n", *(bytes([code]) for code in b'\r\n\0 \t:,;09-\x7f\xff"{\\')]
    for n in range(count):
        data = seeds[n % len(seeds)]
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data = chance.choice([
                data[:at] + chance.randbytes(1) + data[at + 1:],
                data[:at] + data[at + 1:],
                data[:at] + chance.choice(spice) + data[at:],
                data[:at] + chance.choice(spice) + data[at + 1:],
                data[:at] + data[max(at - 20, 0):],
                data[:max(at, 1)],
            ])
        yield data


def test_changed_bytes_never_hang_a_connection_nor_break_the_program(programs):
    provider = Upstream()
    provider.scripts = collections.defaultdict(lambda: [FINE])
    try:
        running = programs(config_for(provider.url, server=BRISK))
        found: collections.Counter[int] = collections.Counter()
        for raw in all_at_once(running, *mutations(200)):  # one that does not close in time fails here
            found.update(statuses(raw.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")))
        assert found[200] > 20 and found[400] > 20
        # 501 and 505 blame the client: a transfer coding, a version that RFC 9110 has such a status for
        assert [status for status in found if status >= 500 and status not in (501, 505)] == []
        assert statuses(running.talk(LAST)) == [200]
        faults = re.compile(r'Traceback|"event":"internal"|a bug in')
        assert [line for line in running.lines if faults.search(line)] == []
    finally:
        provider.close()



# ============================================================================
#  14  Pipeline
# ============================================================================

# -- admission: methods, paths and health

MODEL_TARGETS = ("/v1/responses", "/responses", "/v1/chat/completions", "/chat/completions", "/v1/messages",
                 "/messages")


@pytest.mark.parametrize("method, target, expected, allow", [
    *[("GET", target, 405, {"POST"}) for target in MODEL_TARGETS],
    *[(method, "/v1/messages", 405, {"POST"}) for method in (
        "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "X-ODD")],
    ("GET", "/v1/chat/completions?a=b", 405, {"POST"}),
    *[(method, "/healthz", 405, {"GET", "HEAD"}) for method in ("POST", "PUT", "OPTIONS", "get")],
    *[("POST", target, 404, None) for target in (
        "/", "/health", "/healthz/", "/v1", "/v1/models", "/v1/messages/", "/v1/messages/count_tokens",
        "/V1/messages", "//v1/messages", "/v1/%6dessages", "/v1/./messages", "/x/../v1/messages",
        "/v1/messages;x", "/v2/messages", "/?/v1/messages")],
    ("GET", "/nothing", 404, None), ("HEAD", "/nothing", 404, None), ("PUT", "/nothing", 404, None),
    ("OPTIONS", "*", 404, None),
    ("CONNECT", "localhost:443", 404, None),
])
def test_only_post_on_the_model_paths_and_get_on_health_are_served(program, method, target, expected, allow):
    found = replies(program.talk(to_bytes(f"{method} {target} HTTP/1.1") + LAST), method, "GET")
    assert [reply.status for reply in found] == [expected, 200]  # the connection survives
    assert bool(found[0].body) is (method != "HEAD")
    assert int(found[0].headers["content-length"]) > 0
    assert {m.strip() for m in found[0].headers.get("allow", "").split(",") if m} == (allow or set())


@pytest.mark.parametrize("start", [
    "http://localhost", "HTTP://LOCALHOST:1", "http://127.0.0.1:8080", "http://[::1]"])
def test_an_absolute_target_is_served_by_its_path(program, upstream, model, start):
    upstream.on(model, FINE)
    raw = program.talk(chat(model, CLOSE, path=start + "/v1/chat/completions?a=b"))
    assert statuses(raw) == [200]
    assert upstream.got(model)[0].target == "/v1/chat/completions?a=b"


@pytest.mark.parametrize("target, method", [
    ("/healthz", "GET"), ("/healthz?x=y", "GET"), ("/healthz", "HEAD"), ("http://localhost/healthz", "GET")])
def test_health_is_answered_here(program, target, method):
    raw = program.talk(to_bytes(f"{method} {target} HTTP/1.1") + LAST)
    first, second = replies(raw, method, "GET")
    assert first.status == second.status == 200
    assert first.body == (b"" if method == "HEAD" else second.body)
    assert first.headers["content-length"] == second.headers["content-length"] == str(len(second.body))
    assert first.headers["content-type"] == "application/json"


def test_health_is_in_the_log_at_debug_level(program):
    reply, = replies(program.talk(LAST), "GET")
    line = program.events(reply.headers["x-proxai-request-id"])[-1]
    assert (line["event"], line["level"], line["status"]) == ("end", "debug", 200)
    assert line["path"] == "/healthz"


def test_every_answer_has_one_date(program, upstream, model):
    upstream.on(model, FINE, answer_json({}, 200, "Date: Thu, 01 Jan 1970 00:00:00 GMT"),
                answer_stream(b"data: [DONE]\n\n"), answer_json({"error": {"message": "no"}}, 429))
    cases = {
        "health": LAST,
        "unknown path": to_bytes("GET /nothing HTTP/1.1", CLOSE),
        "no request": b"nonsense\r\n\r\n",
        "an answer without": chat(model, CLOSE),
        "an answer with": chat(model, CLOSE),
        "a stream": chat(model, CLOSE),
        "an error": chat(model, CLOSE),
    }
    found = {name: len(values(program.talk(data), "date")) for name, data in cases.items()}
    assert found == dict.fromkeys(cases, 1)


# -- request ids

def test_every_answer_has_an_id_of_its_own_that_the_log_knows(brisk, upstream, model):
    upstream.on(model, FINE)
    upstream.on(model + "s", answer_stream(b"data: [DONE]\n\n"))
    upstream.on(model + "e", answer_json({"error": {"message": "no"}}, 429))
    cases = {
        chat(model, CLOSE): 200, chat(model + "s", CLOSE, stream=True): 200, chat(model + "e", CLOSE): 429,
        LAST: 200, to_bytes("GET /healthz HTTP/1.1", CLOSE, host="host: example.com"): 403,
        to_bytes("GET /nothing HTTP/1.1", CLOSE): 404, to_bytes("PUT /v1/messages HTTP/1.1", CLOSE): 405,
        to_bytes(POST, CLOSE): 400, b"nonsense\r\n\r\n": 400,
        b"GET /slow": 408, to_bytes(POST, "content-length: 9"): 408,
    }
    answers = all_at_once(brisk, *cases)
    assert [statuses(raw) for raw in answers] == [[status] for status in cases.values()]
    ids = [one for raw in answers for one in values(raw, "x-proxai-request-id")]
    assert len(set(ids)) == len(ids) == len(cases)
    for one in ids:
        brisk.wait_line(rf'"request_id":"{one}"', 2)


def test_a_request_keeps_its_id_when_its_body_is_malformed(program):
    raw = program.talk(to_bytes("POST /v1/messages HTTP/1.1", CHUNKED, body=b"+5\r\n"))
    one, = values(raw, "x-proxai-request-id")
    program.wait_line(rf'"event":"recv".*"request_id":"{one}"', 2)


def test_the_id_of_a_provider_that_is_this_program_too_does_not_pass(program, upstream, model):
    upstream.on(model, answer_json({}, 200, "x-proxai-request-id: 1"))
    one, = values(program.talk(chat(model, CLOSE)), "x-proxai-request-id")
    assert one != "1"


# -- errors, before routing and after

def faulty(fault: str, path: str, body: bytes) -> bytes:
    """A request that goes wrong in the way that `fault` names."""
    post, key = f"POST {path} HTTP/1.1", "x-api-key: client-key-1"
    return {
        "no request": b"nonsense\r\n\r\n",
        "head too large": to_bytes(post, *[f"x: {n}" for n in range(129)]),
        "unknown path": to_bytes(f"POST {path}/x HTTP/1.1", key, CLOSE),
        "no key": to_bytes(post, CLOSE),
        "foreign host": to_bytes(post, key, CLOSE, host="host: example.com"),
        "foreign origin": to_bytes(post, key, CLOSE, "origin: http://example.com"),
        "wrong method": to_bytes(f"GET {path} HTTP/1.1", key, CLOSE),
        "body too large": to_bytes(post, key, CLOSE, f"content-length: {BODY_LIMIT + 1}"),
        "too large, counted": to_bytes(post, key, CHUNKED, body=chunk(b"x" * BODY_LIMIT) + chunk(b"x")),
        "malformed chunk": to_bytes(post, key, CHUNKED, body=b"+5\r\n"),
        "not JSON": sized(post, b"{]", key, CLOSE),
        "no provider answers": sized(post, body, key, CLOSE),
    }[fault]


BAD, LARGE = "invalid_request_error", "request_too_large"
FAULTS = {  # status; type in the json format; type for Anthropic's SDKs; type and code for OpenAI's
    "no request": (400, BAD, None, None),
    "head too large": (431, BAD, None, None),
    "unknown path": (404, BAD, None, None),
    "no key": (401, BAD, "authentication_error", ("authentication_error", "invalid_api_key")),
    "foreign host": (403, BAD, "permission_error", ("permission_error", None)),
    "foreign origin": (403, BAD, "permission_error", ("permission_error", None)),
    "wrong method": (405, BAD, BAD, (BAD, None)),
    "body too large": (413, BAD, LARGE, (BAD, LARGE)),
    "too large, counted": (413, BAD, LARGE, (BAD, LARGE)),
    "malformed chunk": (400, BAD, BAD, (BAD, None)),
    "not JSON": (400, BAD, BAD, (BAD, None)),
    "no provider answers": (502, "upstream_request_error", "api_error", ("server_error", None)),
}


@pytest.mark.parametrize("fault, expected", FAULTS.items(), ids=FAULTS)
@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_every_error_has_a_body_in_the_configured_format(programs, upstream, model, style, fault, expected):
    upstream.on(model, lambda peer, request: peer.close())
    style_lines = f'[error_responses]\nformat = "{style}"'
    running = programs(config_for(upstream.url, style_lines, server=settings(
        api_keys=["client-key-1"], max_request_body_bytes=BODY_LIMIT)))
    status, kind, anthropic, openai = expected
    for protocol in proxai.PROTOCOLS.values():
        body = json.dumps(body_for(protocol, model)).encode()
        reply, = replies(running.talk(faulty(fault, protocol.path, body)))
        assert reply.status == status
        assert reply.headers["x-proxai-request-id"].isdecimal()
        if style == "text":
            assert reply.headers["content-type"] == "text/plain; charset=utf-8"
            assert reply.body.strip() and not reply.body.startswith(b"{")
            continue
        assert reply.headers["content-type"] == "application/json"
        message = reply.json["error"]["message"]
        assert message.strip()
        if style == "json" or openai is None:  # no path, no protocol: the shape that has the most
            shape = {"error": {"message": message, "type": kind, "status": status}}
        elif protocol is MESSAGES:
            shape = {"type": "error", "error": {"type": anthropic, "message": message}}
        else:
            shape = {"error": {"message": message, "type": openai[0], "param": None, "code": openai[1],
                               "status": status}}
        assert reply.json == shape, protocol.word


# -- keys of clients, browsers and names of this machine

ORIGIN = "origin: https://app.example.com"
MY_KEY = "x-api-key: client-key-1"


@pytest.fixture
def guarded(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program that asks for keys, knows one web origin and one more name of its own."""
    return programs(config_for(upstream.url, server=settings(
        api_keys=["client-key-1", "client-key-2"], allowed_hosts=["Proxy.Internal"],
        cors_allow_origins=["https://app.example.com", "http://localhost:3000"])))


@pytest.mark.parametrize("lines, expected", [
    (["authorization: Bearer client-key-1"], 200),
    (["Authorization: bearer   client-key-2"], 200),
    (["x-api-key: client-key-2"], 200),
    (["X-Goog-Api-Key: client-key-1"], 200),
    (["x-api-key: wrong", "authorization: Bearer client-key-1"], 200),
    (["authorization: Bearer wrong", "x-goog-api-key: client-key-2"], 200),
    ([], 401),
    (["authorization: Bearer wrong"], 401),
    (["authorization: Bearer"], 401),
    (["authorization:"], 401),
    (["authorization: Basic client-key-1"], 401),
    (["authorization: Bearer client-key-"], 401),
    (["authorization: Bearer client-key-11"], 401),
    (["authorization: Bearer client-key-1, client-key-2"], 401),
    (["x-api-key: CLIENT-MY_KEY-1"], 401),
    (["x-api-key: client-key-1\xe4"], 401),
    (["x-api-key:"], 401),
    (["x-api-key: client-key-1client-key-2"], 401),
    (["x-key: client-key-1"], 401),
    (["cookie: x-api-key=client-key-1"], 401),
    (["proxy-authorization: Bearer client-key-1"], 401),
])
def test_a_key_of_this_proxy_is_needed_and_goes_no_further(guarded, upstream, model, lines, expected):
    upstream.on(model, FINE)
    for protocol, name, value in ((CHAT, "authorization", "Bearer test-upstream-key"),
                                  (MESSAGES, "x-api-key", "test-upstream-key")):
        body = json.dumps(body_for(protocol, model)).encode()
        raw = guarded.talk(sized(f"POST {protocol.path} HTTP/1.1", body, CLOSE, *lines))
        assert statuses(raw) == [expected]
        if expected == 200:
            got = upstream.got(model)[-1]
            assert got.header(name) == value
            assert "client-key" not in repr(got)
        else:
            assert values(raw, "www-authenticate") == ["Bearer"]  # RFC 9110 15.5.2: must be there
    assert len(upstream.got(model)) == (2 if expected == 200 else 0)
    assert not any("client-key" in line for line in guarded.lines)


@pytest.mark.parametrize("first, lines, expected", [
    ("GET /healthz HTTP/1.1", [], 200),
    ("HEAD /healthz HTTP/1.1", [], 200),
    ("GET /healthz HTTP/1.1", ["authorization: Bearer wrong"], 200),
    ("POST /healthz HTTP/1.1", [], 405),
    ("GET /healthz/ HTTP/1.1", [], 401),
    ("GET /nothing HTTP/1.1", [], 401),
    ("GET /nothing HTTP/1.1", [MY_KEY], 404),
    ("GET /v1/messages HTTP/1.1", [], 401),
    ("GET /v1/messages HTTP/1.1", [MY_KEY], 405),
    ("OPTIONS /v1/messages HTTP/1.1", [], 401),
    ("GET /v1/messages?key=client-key-1 HTTP/1.1", [], 401),
])
def test_only_health_needs_no_key(guarded, first, lines, expected):
    assert statuses(guarded.talk(to_bytes(first, CLOSE, *lines)), first.split()[0]) == [expected]


@pytest.mark.parametrize("origin", [
    "https://evil.example", "null", "", "https://app.example.com.evil.example", "http://app.example.com",
    "https://app.example.com:8443", "https://evil.example, https://app.example.com",
    "https://app.example.com/", "app.example.com", "http://localhost", "http://localhost:30000",
    "https://\xe4.example", "*"])
def test_a_foreign_web_origin_is_refused_everywhere(guarded, upstream, model, origin):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    answers = all_at_once(guarded, *(
        sized(first, body, f"origin: {origin}", MY_KEY, "access-control-request-method: POST", CLOSE)
        for first in (POST, "GET /healthz HTTP/1.1", "GET /nothing HTTP/1.1", "OPTIONS /messages HTTP/1.1")))
    assert [statuses(raw) for raw in answers] == [[403]] * 4
    assert not any(b"access-control" in raw.lower() for raw in answers)
    assert upstream.got(model) == []


@pytest.mark.parametrize("allowed_first", [True, False])
def test_of_two_web_origins_none_counts(guarded, allowed_first):
    lines = sorted([ORIGIN, "origin: https://evil.example"], reverse=not allowed_first)
    assert statuses(guarded.talk(to_bytes("GET /healthz HTTP/1.1", CLOSE, *lines)))[0] in (400, 403)


@pytest.mark.parametrize("origin", ["https://app.example.com", "http://localhost:3000"])
def test_a_browser_may_ask_first_without_a_key(guarded, origin):
    lines = ["access-control-request-method: POST", "access-control-request-headers: content-type,x-api-key"]
    raw = guarded.talk(to_bytes("OPTIONS /v1/messages HTTP/1.1", f"origin: {origin}", *lines) + LAST)
    assert statuses(raw, "OPTIONS") == [204, 200]
    assert values(raw, "access-control-allow-origin") == [origin]
    assert "origin" in ",".join(values(raw, "vary")).lower()
    assert "POST" in values(raw, "access-control-allow-methods")[0]
    allowed = values(raw, "access-control-allow-headers")[0].lower()
    assert {name.strip() for name in allowed.split(",")} >= {"content-type", "x-api-key"}
    assert values(raw, "content-length") == values(raw, "transfer-encoding") == []  # RFC 9110 8.6


def test_an_allowed_web_origin_can_read_every_answer(guarded, upstream, model):
    own = "access-control-allow-origin: *"
    upstream.on(model, answer_json({}), answer_stream(b"data: [DONE]\n\n"), answer_json({}, 200, own),
                answer_json({"error": {"message": "no"}}, 429, own), lambda peer, request: peer.close())
    found = [guarded.talk(data) for data in (
        *[chat(model, MY_KEY, ORIGIN, CLOSE)] * 5,
        to_bytes(POST, MY_KEY, ORIGIN, CLOSE),
        to_bytes("GET /healthz HTTP/1.1", ORIGIN, CLOSE),
        to_bytes("GET /nothing HTTP/1.1", MY_KEY, ORIGIN, CLOSE),
        to_bytes("GET /v1/messages HTTP/1.1", MY_KEY, ORIGIN, CLOSE),
        chat(model, ORIGIN, CLOSE))]
    seen = [(statuses(raw)[0], values(raw, "access-control-allow-origin")) for raw in found]
    assert seen == [(status, ["https://app.example.com"])
                    for status in (200, 200, 200, 429, 502, 400, 200, 404, 405, 401)]
    assert all("origin" in ",".join(values(raw, "vary")).lower() for raw in found)


def test_answers_to_clients_that_are_no_browsers_have_no_cors_lines(guarded, upstream, model):
    upstream.on(model, FINE)
    assert b"access-control" not in guarded.talk(chat(model, MY_KEY, CLOSE)).lower()


HOSTS = {
    200: ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:18080", "127.8.9.10:1", "[::1]", "[::1]:18080",
          "proxy.internal", "PROXY.INTERNAL:9"),
    403: ("example.com", "example.com:18080", "127.0.0.1.example.com", "localhost.example.com", "xlocalhost",
          "notproxy.internal", "x.proxy.internal", "0.0.0.0", "[::]", "192.168.0.1", "2130706433", "127.1",
          "[::ffff:192.168.0.1]", "", ":18080"),
}


@pytest.mark.parametrize("host, expected", [(host, n) for n, hosts in HOSTS.items() for host in hosts])
def test_only_names_of_this_machine_are_served(guarded, upstream, model, host, expected):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    requests = [sized(POST, body, MY_KEY, CLOSE, host=f"host: {host}")]
    if host[:1] not in ("", ":"):  # RFC 9112 3.2.2: what an absolute target says beats Host
        other = "host: example.com" if expected == 200 else "host: localhost"
        requests.append(sized(f"POST http://{host}/messages HTTP/1.1", body, MY_KEY, CLOSE, host=other))
    assert [statuses(raw) for raw in all_at_once(guarded, *requests)] == [[expected]] * len(requests)
    assert len(upstream.got(model)) == (len(requests) if expected == 200 else 0)


def test_an_old_client_needs_no_host(program, upstream, model):
    upstream.on(model, FINE)
    body = json.dumps(body_for(CHAT, model)).encode()
    assert statuses(program.talk(sized("POST /v1/chat/completions HTTP/1.0", body, host=""))) == [200]


# -- turns

def test_a_hundred_connections_are_served_four_at_a_time(programs, upstream, model):
    running = programs(config_for(upstream.url, server=settings(max_concurrent_requests=4)))
    lock, now, most = threading.Lock(), [0], [0]

    def count(peer: Peer, request: Received) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        answer_json({"n": request.json["n"]})(peer, request)

    upstream.on(model, count)
    socks = [running.connect() for _ in range(100)]
    for n, sock in enumerate(socks):
        sock.sendall(chat(model, CLOSE, n=n))
    found = [replies(read_all(sock))[0] for sock in socks]
    for sock in socks:
        sock.close()
    assert [(reply.status, reply.json["n"]) for reply in found] == [(200, n) for n in range(100)]
    assert len({reply.headers["x-proxai-request-id"] for reply in found}) == 100
    assert most[0] == 4


@pytest.fixture
def one_by_one(programs: Callable[..., Running], upstream: Upstream) -> Running:
    """The program that serves one request at a time."""
    return programs(config_for(upstream.url, server=settings(max_concurrent_requests=1)))


def test_a_turn_ends_with_the_head_of_the_answer(one_by_one, upstream, model):
    upstream.on(model, answer_stream(b"data: {}\n\n", end=False))
    upstream.on(model + "x", FINE)
    with one_by_one.connect() as sock:
        sock.sendall(chat(model, stream=True))
        assert b" 200 " in sock.recv(65536)
        assert one_by_one.post(CHAT.path, body_for(CHAT, model + "x")).status == 200


@pytest.mark.parametrize("script", [
    lambda peer, request: peer.close(),
    lambda peer, request: peer.send(b"nonsense\r\n\r\n"),
    answer_json({"error": {"message": "no"}}, 500),
], ids=["closes", "talks nonsense", "fails"])
def test_a_turn_ends_when_the_provider_fails(one_by_one, upstream, model, script):
    upstream.on(model, script)
    assert [one_by_one.post(CHAT.path, body_for(CHAT, model)).status // 100 for _ in range(3)] == [5, 5, 5]


def test_a_client_that_goes_away_loses_its_turn_to_the_next(one_by_one, upstream, model):
    go = threading.Event()

    def hold(peer: Peer, request: Received) -> None:
        go.wait(PATIENCE)
        FINE(peer, request)

    upstream.on(model, hold)
    upstream.on(model + "gone", FINE)
    upstream.on(model + "next", FINE)
    try:
        with one_by_one.connect() as first, one_by_one.connect() as second, one_by_one.connect() as third:
            first.sendall(chat(model))
            one_by_one.wait_line(rf'"event":"fwd".*"model":"{model}"')
            second.sendall(chat(model + "gone"))
            third.sendall(chat(model + "next"))
            time.sleep(0.05)
            second.close()
            one_by_one.wait_line(rf'"event":"closed".*"model":"{model}gone"')
            go.set()
            assert read_one(first).status == read_one(third).status == 200
    finally:
        go.set()
    assert upstream.got(model + "gone") == []


def test_a_client_that_goes_away_within_its_turn_frees_it(one_by_one, upstream, model):
    arrived = threading.Event()

    def hang(peer: Peer, request: Received) -> None:
        arrived.set()
        peer.gone()
        peer.close()

    upstream.on(model, hang)
    upstream.on(model + "next", FINE)
    with one_by_one.connect() as first:
        first.sendall(chat(model))
        assert arrived.wait(PATIENCE)
    assert one_by_one.post(CHAT.path, body_for(CHAT, model + "next")).status == 200


# -- what the provider gets --------------------------------------------------

ODD_BODY = (b'\t{ "messages" : [ {"role":"user","content":"\\u0041\xc3\xa9 \\/ \\ud83d"} ],\r\n'
            b' "x":{"model":"inner"},"n":1.0,"big":123456789012345678901234567890,"e":1E+2, "model"\n:  "%b" ,'
            b'"max_tokens":7,"x":[],"unknown":null }\n ')


@pytest.mark.parametrize("protocol", [CHAT, MESSAGES], ids=lambda p: p.word)
def test_a_request_passes_byte_by_byte(program, upstream, model, protocol):
    upstream.on(model, answer_json(OK))
    raw = ODD_BODY % model.encode()
    assert program.post(protocol.path, raw).status == 200
    assert upstream.got(model)[0].body == raw


def test_a_responses_request_without_system_items_passes_byte_by_byte(program, upstream, model):
    upstream.on(model, answer_json(OK))
    raw = b'{ "input":[{"role":"developer"} ], "meta":{"input":[{"role":"system"}]},"model":"%b" }'
    assert program.post("/responses", raw % model.encode()).status == 200
    assert upstream.got(model)[0].body == raw % model.encode()


@pytest.mark.parametrize("raw", [
    ODD_BODY,
    b'{"model":"%b","messages":[]}',
    b'{"messages":[{"model":"model","a":"\\"model\\":"}],"a\\\\":"\\"","model" :\t"%b"}',
], ids=["odd", "first", "look-alikes"])
def test_a_route_changes_the_bytes_of_the_model_and_no_others(told_program, upstream, model, raw):
    upstream.on(model, answer_json(OK))
    assert told_program.post(CHAT.path + "?a", raw % f"alias-{model}".encode()).status == 200
    got, = upstream.got(model)
    assert got.body == raw % model.encode()
    assert got.target == "/v1/chat/completions?a"  # the version in its base_url is not doubled


def test_an_exact_guarded_route_decides_the_model_that_the_provider_sees(told_program, upstream):
    upstream.on("given", answer_json(OK))
    assert ask(told_program, MESSAGES, "Ask-For-It").status == 200
    assert upstream.got("given")[0].json == body_for(MESSAGES, "given")


def test_system_items_of_responses_become_instructions(program, upstream, model):
    upstream.on(model, answer_json({"id": "resp_1", "output": []}))
    items = [{"role": "system", "content": "Rule A"}, {"role": "user", "content": "hi"}]
    reply = program.post("/v1/responses", {"model": model, "input": items, "stream": True},
                         "authorization: Bearer dummy", "x-api-key: dummy")
    assert (reply.status, reply.json) == (200, {"id": "resp_1", "output": []})
    got, = upstream.got(model)
    assert got.json == {"model": model, "input": items[1:], "stream": True, "instructions": "Rule A"}
    assert (got.target, got.header("authorization"), got.header("x-api-key")) == ("/v1/responses",
                                                                                  f"Bearer {KEY}", None)


def around_the_deepest(works):
    """Depths around the deepest for which `works` says yes: near it readers and writers give up."""
    low, high = 1, 1 << 17
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return range(max(low - 40, 1), low + 40)


@pytest.fixture
def deep_provider(programs):
    """A provider that answers as `answered` says, whatever the depth of a request, and its program."""
    wire = Wire()

    def handle(peer):
        while request := peer.read_request(0):
            peer.send(whole(wire.answered(request), "content-type: application/json"))

    wire.handle, wire.answered = handle, lambda request: b"{}"
    program = programs(config_for(wire.url))
    yield wire, program
    program.stop()
    wire.close()


def test_a_system_item_in_a_deep_request_is_lifted_or_the_request_refused(deep_provider):
    _, program = deep_provider

    def status(depth):
        body = b'{"model":"m","input":[{"role":"system","content":"s"},%b%b]}' % (b"[" * depth, b"]" * depth)
        return program.post(RESPONSES.path, body).status

    found = [status(depth) for depth in around_the_deepest(lambda depth: status(depth) == 200)]
    assert found == sorted(found) and set(found) == {200, 400}


def test_a_deep_answer_whose_gaps_cannot_be_filled_passes_as_it_is(deep_provider):
    wire, program = deep_provider

    def answered(request):
        depth = request.json["depth"]
        return (b'{"id":"x","role":"assistant","model":"m","content":[],"usage":{},"x":%b%b}'
                % (b"[" * depth, b"]" * depth))

    def outcome_of(depth):
        body = body_for(MESSAGES, "m", depth=depth)
        reply = program.post(MESSAGES.path, body)
        if reply.status == 200:
            as_it_is = reply.body == answered(Received("", "", [], json.dumps(body).encode(), 0))
            return "as it is" if as_it_is else "filled" if b'"stop_reason":null' in reply.body else "changed"
        return reply.status

    wire.answered = answered
    depths = around_the_deepest(lambda depth: outcome_of(depth) == "filled")
    assert {outcome_of(depth) for depth in depths} <= {"filled", "as it is", 502}


def test_a_deep_event_whose_gaps_cannot_be_filled_passes_as_it_is():
    def filled(depth):
        data = frame({"type": "message_start", "message": {**SPARSE, "own": "deep"}})
        assert data.count(b'"deep"') == 1
        return proxai.fill_gaps_in_frame(data.replace(b'"deep"', b"[" * depth + b"]" * depth)) is not None

    depths = around_the_deepest(filled)  # nothing raises
    assert {filled(depth) for depth in depths} == {True, False}


@pytest.mark.parametrize("protocol, ours, theirs", [
    (RESPONSES, ("authorization", f"Bearer {KEY}"), "x-api-key"),
    (CHAT, ("authorization", f"Bearer {KEY}"), "x-api-key"),
    (MESSAGES, ("x-api-key", KEY), "authorization"),
], ids=lambda v: getattr(v, "word", None))
@pytest.mark.parametrize("short", [False, True], ids=["/v1", "without"])
def test_the_provider_gets_the_configured_key_and_the_client_s_other_headers(
        program, upstream, model, protocol, ours, theirs, short):
    upstream.on(model, answer_json(OK))
    path = protocol.path.removeprefix("/v1") if short else protocol.path
    program.post(path + "?beta=true&x=%2F", body_for(protocol, model), "authorization: Bearer client-key",
                 "x-api-key: client-key", "x-goog-api-key: client-key", "proxy-authorization: Basic eA==",
                 "connection: close, x-hop", "x-hop: 1", "keep-alive: 5", "te: trailers",
                 "accept-encoding: br",
                 "x-custom: one", "x-custom: two", "user-agent: some-agent", "accept: text/x", "cookie: a=b",
                 "content-type: application/json; charset=utf-8", "anthropic-beta: b",
                 "openai-organization: o")
    got, = upstream.got(model)
    assert (got.method, got.target) == ("POST", protocol.path + "?beta=true&x=%2F")
    assert got.header(ours[0]) == ours[1]
    for name in (theirs, "x-goog-api-key", "proxy-authorization", "x-hop", "keep-alive", "te",
                 "transfer-encoding"):
        assert got.header(name) is None, name
    assert "client-key" not in str(got.headers)
    assert [v for n, v in got.headers if n.lower() == "x-custom"] == ["one", "two"]
    kept = {n: got.header(n) for n in ("user-agent", "accept", "cookie", "content-type", "anthropic-beta",
                                       "openai-organization", "host", "content-length")}
    assert kept == {"user-agent": "some-agent", "accept": "text/x", "cookie": "a=b", "anthropic-beta": "b",
                    "content-type": "application/json; charset=utf-8", "openai-organization": "o",
                    "host": f"127.0.0.1:{upstream.port}", "content-length": str(len(got.body))}
    assert got.header("accept-encoding") in (None, "identity")


def test_headers_that_a_provider_needs_are_added_where_the_client_sent_none(program, upstream, model):
    upstream.on(model, answer_json(OK))
    ask(program, CHAT, model)
    got, = upstream.got(model)
    assert got.header("accept") == "*/*"
    assert got.header("user-agent").startswith("ProxAI/")
    assert got.header("anthropic-version") is None


@pytest.mark.parametrize("sent, expected",
                         [((), "2023-06-01"), (("Anthropic-Version: 2099-01-01",), "2099-01-01")])
def test_anthropic_version_is_added_only_where_the_client_sent_none(program, upstream, model, sent, expected):
    upstream.on(model, answer_json(OK))
    ask(program, MESSAGES, model, *sent)
    assert upstream.got(model)[0].header("anthropic-version") == expected


# -- whole answers -----------------------------------------------------------

ODD_ANSWER = b'{ "id" : "\\u0041\\/",\r\n "n":1,"e":1E5, "big":12345678901234567890, "a":1,"a":2,"s":"\\ud83d"}\n'


@pytest.mark.parametrize("protocol", [RESPONSES, CHAT, MESSAGES], ids=lambda p: p.word)
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_a_json_answer_passes_byte_by_byte_whatever_was_asked_for(program, upstream, model, protocol, stream):
    upstream.on(model, answer(200, ODD_ANSWER, "content-type: text/json; charset=utf-8"))
    reply = ask(program, protocol, model, stream=stream)
    assert (reply.status, reply.body) == (200, ODD_ANSWER)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["content-length"] == str(len(ODD_ANSWER))


@pytest.mark.parametrize("status", [200, 201, 202, 299])
def test_the_status_of_an_answer_is_kept(program, upstream, model, status):
    upstream.on(model, answer_json(OK, status))
    assert ask(program, CHAT, model).status == status


def test_headers_of_an_answer_pass_but_for_those_of_one_hop(program, upstream, model):
    upstream.on(model, answer_json(OK, 200, "set-cookie: a=1", "set-cookie: b=2",
                                   "X-RateLimit-Limit-Requests: 9",
                                   "x-codex-primary-used-percent: 1", "x-request-id: req",
                                   "connection: keep-alive, x-hop",
                                   "x-hop: 1", "keep-alive: timeout=5", "proxy-authenticate: Basic",
                                   "trailer: x",
                                   "upgrade: h2c", "date: Mon, 01 Jan 2024 00:00:00 GMT",
                                   "x-proxai-request-id: theirs"))
    body = json.dumps(body_for(CHAT, model)).encode()
    first = f"POST {CHAT.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}"
    head = program.talk(first.encode() + b"\r\n\r\n"
                        + body).partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    fields = sorted((n.lower(), v) for n, v in (line.split(": ", 1) for line in head))
    own, = (v for n, v in fields if n == "x-proxai-request-id")  # one, and it is the one in the log
    assert [f for f in fields if f[0] not in ("x-proxai-request-id", "server")] == [
        ("connection", "close"), ("content-length", str(len(json.dumps(OK)))),
        ("content-type", "application/json"),
        ("date", "Mon, 01 Jan 2024 00:00:00 GMT"), ("set-cookie", "a=1"), ("set-cookie", "b=2"),
        ("x-codex-primary-used-percent", "1"), ("x-ratelimit-limit-requests", "9"), ("x-request-id", "req")]
    assert own.isdigit() and program.events(own)


def test_an_answer_without_a_date_gets_one(program, upstream, model):
    upstream.on(model, answer_json(OK))
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT",
                        ask(program, CHAT, model).headers.get("date", ""))


def test_a_provider_s_word_on_web_origins_does_not_stand_beside_ours(told_program, upstream, model):
    upstream.on(model, answer_json(OK, 200, "access-control-allow-origin: *"))
    body = json.dumps(body_for(CHAT, model))
    raw = told_program.talk(f"POST {CHAT.path} HTTP/1.1\r\nhost: localhost\r\norigin: https://app.example\r\n"
                    f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    assert re.findall(rb"(?i)access-control-allow-origin: (.*)\r", raw) == [b"https://app.example"]


@pytest.mark.parametrize("data", [
    whole(b"<html>nice page</html>", "content-type: text/html"),
    whole(b"<html>nice page</html>", "content-type: application/json"),
    whole(b""),
    whole(b"  \n"),
    whole(b'{"cut":'),
    whole(b'{"a":1} trailing'),
    whole(b'\xff\xfe{"a":"\xff"}'),
    whole(b"[" * 100_000),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
], ids=["HTML", "HTML that says JSON", "empty", "blank", "cut", "trailing", "bytes", "deep", "204",
        "204 with length",
        "no chunk"])
def test_a_2xx_answer_that_is_not_json_is_a_502_internal_error(told_program, upstream, model, data):
    upstream.on(model, send(data), answer_json(OK))
    reply = ask(told_program, CHAT, model)
    assert (reply.status, reply.json["error"]["type"],
            reply.json["error"]["status"]) == (502, "internal_error", 502)
    assert "nice page" not in reply.json["error"]["message"]
    assert ask(told_program, CHAT, model).status == 200


@pytest.mark.parametrize("script", [
    send_and_close(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", b'{"a":1}'),
    send_and_close(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"),
    send_and_reset(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", b'{"a":1}'),
    send_and_reset(b"HTTP/1.1 200 OK\r\n\r\n", b'{"a":1}'),
    send_and_close(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", chunk(b'{"a":1}')),
    send_and_close(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", chunk(b'{"a":1}') + b"0\r\n"),
    send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
    send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{}\r\n"),
    send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n{}\r\n"),
    send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\n{}\n0\n\n"),
    send_and_close(b"HTTP/1.1 500 X\r\ncontent-length: 100\r\n\r\n", b'{"error":"m"}'),
], ids=["short", "nothing", "reset", "reset before the end", "no last chunk", "no end of trailers", "no size",
        "long chunk", "negative", "bare LF", "short error"])
def test_an_answer_that_breaks_off_or_is_badly_framed_is_a_502(told_program, upstream, model, script):
    upstream.on(model, script, answer_json(OK))
    reply = ask(told_program, CHAT, model)
    assert (reply.status, reply.json["error"]["type"]) == (502, "upstream_response_body_read_error")
    assert outcome(told_program, reply)["status"] == 502
    assert ask(told_program, CHAT, model).status == 200
    assert len(upstream.got(model)) == 2


def test_silence_within_an_answer_is_a_502(hasty, upstream, model):
    def check(begin, number):
        witness = Witness(begin)
        upstream.on(f"{model}-{number}", witness)
        reply = ask(hasty, CHAT, f"{model}-{number}")
        assert (reply.status, reply.json["error"]["type"]) == (502, "upstream_response_body_read_error")
        assert witness.wait()

    at_once(check, [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n{}",
                    b"HTTP/1.1 429 X\r\ncontent-length: 100\r\n\r\n{"])


@functools.cache
def big_json(size):
    """A JSON answer of about that many bytes, that does not compress well."""
    return b'{"big":"' + base64.b64encode(random.Random(1).randbytes(size * 3 // 4)) + b'"}'


@pytest.mark.parametrize("form", ["length", "chunked", "gzip"])
def test_a_large_answer_is_relayed_intact(program, upstream, model, form):
    body = big_json((20 if form == "length" else 9) << 20)
    if form == "length":
        upstream.on(model, answer(200, body))
    elif form == "chunked":
        pieces = (chunk(body[i:i + 1_000_003]) for i in range(0, len(body), 1_000_003))
        upstream.on(model, send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", *pieces,
                                b"0\r\n\r\n"))
    else:
        upstream.on(model, answer(200, gzip.compress(body, 1), "content-encoding: gzip"))
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.broken, reply.headers["content-type"]) == (200, False, "application/json")
    assert reply.body == body
    assert outcome(program, reply)["down"] == len(body)


@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_large_answer_that_breaks_off_is_cut(program, upstream, model, form):
    body = big_json(9 << 20)
    head = b"content-length: 20000000" if form == "length" else b"transfer-encoding: chunked"
    upstream.on(model, send_and_close(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n",
                                      body if form == "length" else chunk(body)))
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.broken) == (200, True)
    assert body.startswith(reply.body)
    assert outcome(program, reply)["event"] == "stream-error"


def test_a_large_answer_that_falls_silent_is_cut(hasty, upstream, model):
    witness = Witness(b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n", big_json(9 << 20))
    upstream.on(model, witness)
    reply = ask(hasty, CHAT, model)
    assert (reply.status, reply.broken) == (200, True)
    assert witness.wait()


# -- compressed answers that nobody asked for --------------------------------

def deflated(data, wbits):
    """`data` compressed in one of zlib's forms."""
    machine = zlib.compressobj(wbits=wbits)
    return machine.compress(data) + machine.flush()


CODINGS = [
    ("gzip", gzip.compress), ("GZip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress),
    ("deflate", lambda data: deflated(data, -15)),  # without the zlib wrapper, as some servers send it
    ("gzip", lambda data: gzip.compress(data[:10]) + gzip.compress(data[10:])),  # 1952 2.2: several members
    ("identity", bytes),
]
CODING_IDS = ["gzip", "GZip", "x-gzip", "deflate", "raw deflate", "two members", "identity"]
LONG_ANSWER = json.dumps({"id": "x", "text": "words and more words " * 100}).encode()


@pytest.mark.parametrize("coding, pack", CODINGS, ids=CODING_IDS)
def test_a_compressed_answer_is_unpacked(program, upstream, model, coding, pack):
    upstream.on(model, answer(200, pack(LONG_ANSWER), f"content-encoding: {coding}",
                              "content-type: application/json"))
    reply = ask(program, CHAT, model)
    assert (reply.status, reply.body, reply.headers["content-length"]) == (200, LONG_ANSWER,
                                                                           str(len(LONG_ANSWER)))
    assert reply.headers.get("content-encoding", "identity") == "identity"


@pytest.mark.parametrize("coding, pack", CODINGS, ids=CODING_IDS)
def test_a_compressed_stream_is_unpacked(program, upstream, model, coding, pack):
    text = b"".join(b'data: {"id":"%d","choices":[]}\n\n' % i for i in range(50)) + b"data: [DONE]\n\n"
    packed = pack(text)
    parts = [packed[i:i + 9] for i in range(0, len(packed), 9)]
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: " + coding.encode() + b"\r\n\r\n")
    upstream.on(model, send(head, *map(chunk, parts), b"0\r\n\r\n"))
    reply = ask(program, CHAT, model, stream=True)
    assert (reply.body, reply.broken) == (text, False)
    assert reply.headers.get("content-encoding", "identity") == "identity"
    assert outcome(program, reply)["event"] == "end"


def test_events_of_a_compressed_stream_pass_as_they_come(program, upstream, model):
    seen = threading.Event()

    def script(peer, request):
        machine = zlib.compressobj(wbits=31)
        peer.send(SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"))
        peer.send(chunk(machine.compress(b'data: {"id":"first"}\n\n') + machine.flush(zlib.Z_SYNC_FLUSH)))
        if seen.wait(PATIENCE):
            peer.send(chunk(machine.compress(b"data: [DONE]\n\n") + machine.flush()) + b"0\r\n\r\n")

    upstream.on(model, script)
    with open_stream(program, CHAT, model) as sock:
        read_until(sock, b"first")
        seen.set()
        assert b"[DONE]" in read_all(sock)


def open_stream(program, protocol, model, version="1.1", size=None):
    """A connection on which a streaming request has been sent; `size` makes its receive buffer small."""
    sock = program.connect()
    if size:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    body = json.dumps(body_for(protocol, model, stream=True))
    sock.sendall(f"POST {protocol.path} HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n"
                 f"content-length: {len(body)}\r\n\r\n{body}".encode())
    return sock


def read_until(sock, wanted):
    """What comes up to the point where `wanted` is in it."""
    data = b""
    while wanted not in data:
        more = sock.recv(65536)
        assert more, f"the answer ended before {wanted!r}: {data!r}"
        data += more
    return data


@pytest.mark.parametrize("coding, body", [
    ("gzip", gzip.compress(b'"' + b"0" * (8 << 20) + b'"')),
    ("deflate", zlib.compress(b'"' + b"0" * (8 << 20) + b'"')),
    ("gzip", gzip.compress(LONG_ANSWER)[:-9]),
    ("gzip", gzip.compress(LONG_ANSWER)[:-8] + bytes(8)),
    ("gzip", LONG_ANSWER),
    ("deflate", b"\x78\x9cnonsense"),
    ("br", b"\x0b\x02\x80{}\x03"),
    ("zstd", b"{}"),
    ("gzip, gzip", gzip.compress(gzip.compress(LONG_ANSWER))),
], ids=["gzip bomb", "deflate bomb", "cut", "wrong checksum", "not gzip", "damaged", "br", "zstd", "twice"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_compressed_answer_that_is_a_bomb_or_damaged_or_unknown_is_a_502(
        told_program, upstream, model, coding, body, status):
    upstream.on(model, answer(status, body, f"content-encoding: {coding}"), answer_json(OK))
    reply = ask(told_program, CHAT, model)
    assert (reply.status, reply.json["error"]["type"]) == (502, "upstream_response_body_read_error")
    assert ask(told_program, CHAT, model).status == 200


@pytest.mark.parametrize("body", [
    gzip.compress(b"data: {}\n\n" + b"0" * (8 << 20)),
    gzip.compress(b"data: {}\n\ndata: [DONE]\n\n")[:-12],
    b"data: {}\n\n",
], ids=["bomb", "cut", "not gzip"])
def test_a_compressed_stream_that_cannot_be_unpacked_is_cut(program, upstream, model, body):
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    upstream.on(model, send(head, chunk(body), b"0\r\n\r\n"))
    reply = ask(program, CHAT, model, stream=True)
    assert reply.broken and len(reply.body) < 6 << 20
    assert outcome(program, reply)["event"] == "stream-error"


# -- error answers -----------------------------------------------------------

UNKNOWN, NON_JSON, EMPTY = ("upstream_error_body_unknown_shape", "upstream_error_body_non_json",
                            "upstream_error_body_empty")
ERROR_BODIES = [  # what the provider says; message, code and param that the client is told
    ('{"error":{"message":"m","code":"c","param":"p"}}', {"message": "m", "code": "c", "param": "p"}),
    ('{"type":"error","error":{"type":"overloaded_error","message":"m"}}', {"message": "m"}),
    ('{"error":"m"}', {"message": "m"}),
    ('{"message":"m"}', {"message": "m"}),
    ('{"detail":"m"}', {"message": "m"}),
    ('{"detail":[{"msg":"a"},{"message":"b"}]}', {"message": "a; b"}),
    ('{"error":{"message":"m","code":429,"param":null}}', {"message": "m", "param": None}),
    ('{"message":"m","code":"c","param":{"a":[1]}}', {"message": "m", "code": "c", "param": {"a": [1]}}),
    (' \n{"error":{"message":"ünï"}} \r\n', {"message": "ünï"}),
]
ODD_ERROR_BODIES = [
    (b'{"error":{"type":"x"},"message":"m"}', UNKNOWN), (b'"text"', UNKNOWN), (b"[]", UNKNOWN),
    (b"{}", UNKNOWN),
    (b"null", UNKNOWN), (b'{"error":null}', UNKNOWN), (b'{"detail":[]}', UNKNOWN), (b"7", UNKNOWN),
    (b"oops", NON_JSON), (b"<html><h1>Bad gateway</h1></html>", NON_JSON), (b'{"error":', NON_JSON),
    (b"caf\xe9", NON_JSON), (b"", EMPTY), (b" \r\n\t", EMPTY),
]


@pytest.mark.parametrize("body, expected", ERROR_BODIES, ids=[b for b, _ in ERROR_BODIES])
@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_an_error_of_the_provider_is_told_in_the_configured_format(
        programs, upstream, model, style, body, expected):
    upstream.on(model, answer(418, body.encode(), "content-type: application/problem+json"))
    reply = ask(programs(styled(upstream, style)), CHAT, model)
    assert reply.status == 418
    if style == "text":
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert reply.body.decode() == expected["message"]
    elif style == "json":
        assert reply.headers["content-type"] == "application/json"
        payload = {"message": expected["message"], "type": "upstream_error", **expected, "status": 418}
        assert reply.json == {"error": payload}
        assert list(reply.json["error"]) == list(payload)
    else:
        assert (reply.headers["content-type"], reply.body) == ("application/json", body.encode())


@pytest.mark.parametrize("body, kind", ODD_ERROR_BODIES, ids=[repr(b) for b, _ in ODD_ERROR_BODIES])
@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_an_error_without_words_for_the_client_is_described(programs, upstream, model, style, body, kind):
    upstream.on(model, answer(503, body, "content-type: application/json"))
    reply = ask(programs(styled(upstream, style)), CHAT, model)
    assert reply.status == 503
    message = reply.body.decode() if style == "text" else reply.json["error"]["message"]
    assert body.decode("utf-8", "replace").strip() in message
    assert "503" in message
    if style == "json":
        assert reply.json == {"error": {"message": message, "type": kind, "status": 503}}
    elif style == "native":
        assert set(reply.json["error"]) == {"message", "type", "param", "code", "status"}


@pytest.mark.parametrize("status, kind", [
    (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
    (404, "not_found_error"),
    (413, "request_too_large"), (429, "rate_limit_error"), (500, "api_error"), (502, "api_error"),
    (529, "overloaded_error")])
def test_a_native_error_has_the_type_that_anthropic_clients_expect(programs, upstream, model, status, kind):
    upstream.on(model, answer(status, b"no JSON"))
    reply = ask(programs(styled(upstream, "native")), MESSAGES, model)
    message = reply.json["error"]["message"]
    assert (reply.status, reply.json) == (status,
                                          {"type": "error", "error": {"type": kind, "message": message}})


@pytest.mark.parametrize("protocol", [RESPONSES, CHAT, MESSAGES], ids=lambda p: p.word)
@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_an_error_keeps_the_headers_that_say_when_to_try_again_and_no_others(
        programs, upstream, model, protocol, style):
    kept = {"retry-after": "7", "x-request-id": "req_1", "request-id": "req_2", "openai-processing-ms": "12",
            "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-tokens": "6m0s",
            "anthropic-ratelimit-requests-remaining": "0"}
    dropped = {"set-cookie": "a=b", "server": "cloud", "x-codex-primary-used-percent": "99", "location": "/x",
               "www-authenticate": "Bearer", "cache-control": "no-store", "x-internal-host": "h"}
    upstream.on(model, answer_json({"error": {"message": "slow down"}}, 429,
                                   *(f"{n.title()}: {v}" for n, v in (kept | dropped).items())))
    reply = ask(programs(styled(upstream, style)), protocol, model)
    assert reply.status == 429
    assert "slow down" in reply.body.decode()
    assert {n: v for n, v in reply.headers.items() if n in kept} == kept
    assert [n for n in dropped if n in reply.headers and reply.headers[n] == dropped[n]] == []
    assert upstream.got(model)[0].target == protocol.path


@pytest.mark.parametrize("status, body, header, expected", [
    (429, '{"error":{"message":"m"}}', "x-a: b", None),
    (500, '{"error":{"message":"m"}}', "x-a: b", None),
    (402, '{"error":{"message":"m"}}', "x-a: b", "false"),
    (429, '{"error":{"message":"m","code":"insufficient_quota"}}', "x-a: b", "false"),
    (429, '{"error":{"message":"m","code":"insufficient_quota"}}', "x-should-retry: true", "true"),
    (503, '{"error":{"message":"m"}}', "x-should-retry: false", "false"),
])
@pytest.mark.parametrize("style", ["text", "native"])
def test_an_error_that_time_does_not_heal_is_marked(
        programs, upstream, model, style, status, body, header, expected):
    upstream.on(model, answer(status, body.encode(), header))
    reply = ask(programs(styled(upstream, style)), CHAT, model)
    assert (reply.status, reply.headers.get("x-should-retry")) == (status, expected)


def test_a_compressed_error_is_understood(programs, upstream, model):
    raw = b'{"error":{"message":"quota"} }'
    upstream.on(model, answer(429, gzip.compress(raw), "content-encoding: gzip"))
    assert ask(programs(styled(upstream, "text")), CHAT, model).body == b"quota"
    reply = ask(programs(styled(upstream, "native")), CHAT, model)
    assert (reply.body, reply.headers.get("content-encoding")) == (raw, None)


@pytest.mark.parametrize("body", [b"x" * (3 << 20), b'{"nothing":"' + b"y" * (3 << 20) + b'"}'],
                         ids=["text", "JSON"])
@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_a_huge_error_body_is_cut_down(programs, upstream, model, style, body):
    upstream.on(model, answer(500, body), answer_json(OK))
    program = programs(styled(upstream, style))
    reply = ask(program, CHAT, model)
    assert reply.status == 500
    assert len(reply.body) < 20_000
    assert len(outcome(program, reply)["err"]) <= 300
    assert ask(program, CHAT, model).status == 200


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308, 399])
def test_a_redirect_is_an_error_and_not_followed(told_program, upstream, model, status):
    upstream.on(model, answer(status, b"", f"location: {upstream.url}/v1/chat/completions"))
    reply = ask(told_program, CHAT, model)
    assert (reply.status, reply.json["error"]["type"]) == (status, EMPTY)
    assert "location" not in reply.headers and upstream.url not in reply.body.decode()
    assert len(upstream.got(model)) == 1


def test_an_error_whose_status_allows_no_body_leaves_the_client_s_connection_in_order(told_program, upstream, model):
    upstream.on(model, send(b"HTTP/1.1 304 Not Modified\r\n\r\n"), answer_json(OK))
    body = json.dumps(body_for(CHAT, model))
    head = f"POST {CHAT.path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    raw = told_program.talk(f"{head}\r\n{body}{head}connection: close\r\n\r\n{body}".encode())
    first, _, rest = raw.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 304 ")
    assert rest.startswith(b"HTTP/1.1 200 ")  # 9112 6.3: a 304 ends with its head, whatever its length says


def test_stream_of_an_error_is_an_error(told_program, upstream, model):
    upstream.on(model, send(SSE_HEAD.replace(b"200 OK", b"429 X") + chunk(b'data: {"error":"m"}\n\n')
                            + b"0\r\n\r\n"))
    reply = ask(told_program, CHAT, model, stream=True)
    assert (reply.status, reply.json["error"]["type"], reply.json["error"]["status"]) == (429, NON_JSON, 429)


# -- streams that are whole --------------------------------------------------

def frame(value, name=""):
    """An event with a JSON payload; Anthropic and Responses events carry their type as its name."""
    name = name or (value.get("type", "") if "choices" not in value else "")
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(value).encode() + b"\n\n"


def frames_in(body):
    """The events of a stream as (name, payload)."""
    out = []
    for block in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        lines = [line.partition(":") for line in block.decode().split("\n")]
        data = "\n".join(v.removeprefix(" ") for n, _, v in lines if n == "data")
        if data:
            out.append((next((v.strip() for n, _, v in lines if n == "event"), None),
                        data if data == "[DONE]" else json.loads(data)))
    return out


def nulls(*names, **more):
    """An object with members that are null."""
    return {**dict.fromkeys(names), **more}


USAGE = nulls("cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens", "inference_geo",
              "server_tool_use", "service_tier", input_tokens=5, output_tokens=1)
MESSAGE = nulls("container", "stop_details", "stop_reason", "stop_sequence", id="msg_12345678",
                type="message",
                role="assistant", model="claude", content=[], usage=USAGE)
CHAT_CHUNK = {"id": "chatcmpl-12345678", "object": "chat.completion.chunk", "model": "gpt"}
COMPLETED = {"type": "response.completed", "sequence_number": 9,
             "response": {"id": "resp_12345678", "status": "completed"}}
WHOLE_STREAMS = {  # a whole stream of each protocol, its terminal event last
    "responses": [
        frame({"type": "response.created", "sequence_number": 0,
               "response": {"id": "resp_12345678", "output": []}}),
        frame({"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "delta": "hé",
               "sequence_number": 1}),
        frame(COMPLETED)],
    "chat": [
        frame({**CHAT_CHUNK, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        frame({**CHAT_CHUNK, "choices": [{"index": 0, "delta": {"content": "hé"}, "finish_reason": None}]}),
        b"data: [DONE]\n\n"],
    "messages": [
        frame({"type": "message_start", "message": MESSAGE}),
        frame({"type": "content_block_start", "index": 0,
               "content_block": {"type": "text", "text": "", "citations": None}}),
        frame({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hé"}}),
        frame({"type": "content_block_stop", "index": 0}),
        frame({"type": "message_delta", "delta": nulls("container", "stop_details", "stop_sequence",
                                                       stop_reason="end_turn"),
               "usage": nulls("cache_creation_input_tokens", "cache_read_input_tokens", "input_tokens",
                              "server_tool_use", output_tokens=2)}),
        frame({"type": "message_stop"})],
}
THREE = pytest.mark.parametrize("protocol", [RESPONSES, CHAT, MESSAGES], ids=lambda p: p.word)


def around(protocol, *frames):
    """A whole stream with `frames` before its terminal event."""
    return [*WHOLE_STREAMS[protocol.word][:-1], *frames, WHOLE_STREAMS[protocol.word][-1]]


@THREE
@pytest.mark.parametrize("inside", [
    [],
    [b": comment\n\n", b":\n\n", b": ping\n"],
    [b"event: response.made.up\ndata: {\"type\":\"response.made.up\",\"x\":[null]}\n\n"],
    [b"id: 7\nretry: 3000\n\n", b"id: 8\nevent: unknown\nfoo: bar\ndata\ndata: {}\n\n"],
    [b"event: empty\n\n", b"\n\n\n"],
    [b"data: not json at all\n\n", b"data: [1,\ndata: 2]\n\n", b"data:{}\n\n", b"data:  {}\n\n"],
    [b"data: {\"a\":1}\r\n\r\n", b": c\r\n\r\n", b"data: {\"a\":2}\r\r", b"data: {}\n\r\n"],
    [b"data: \xff\xfe \xf0\x9f\n\n", b"\xef\xbb\xbfdata: {}\n\n"],
    [b'data: {"session_id":null,"other":""}\n\n', b'data: {"session_id":"","other":null}\n\n'],
    [b'data: {"n": 1.0, "e":1E5,"k":"\\u00e9","k":2}\n\n'],
    [b"data: {\"big\":\"" + b"z" * 300_000 + b"\"}\n\n"],
    [b"data: " + b"[" * 5000 + b"\n\n"],
], ids=["plain", "comments", "unknown", "ids", "empty", "odd data", "line ends", "bytes", "null and empty",
        "numbers",
        "large", "deep"])
def test_a_stream_passes_byte_by_byte(exact, upstream, model, protocol, inside):
    frames = around(protocol, *inside)
    upstream.on(model, answer_stream(*frames))
    reply = ask(exact, protocol, model, stream=True)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    assert (reply.body, reply.broken) == (b"".join(frames), False)
    assert reply.headers.get("transfer-encoding") == "chunked" and "content-length" not in reply.headers
    assert outcome(exact, reply)["event"] == "end"


@THREE
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_passes_byte_by_byte_however_it_is_cut_into_pieces(exact, upstream, model, protocol, size):
    raw = b"".join(around(protocol, b": c\r\n\r\n", b"data: {}\r\n\r\n")).replace(b"\n\n", b"\r\n\r\n")
    upstream.on(model, answer_stream(*(raw[i:i + size] for i in range(0, len(raw), size))))
    reply = ask(exact, protocol, model, stream=True)
    assert (reply.body, reply.broken, outcome(exact, reply)["event"]) == (raw, False, "end")


@THREE
def test_a_stream_without_gaps_passes_byte_by_byte_by_default(program, upstream, model, protocol):
    upstream.on(model, answer_stream(*WHOLE_STREAMS[protocol.word]))
    reply = ask(program, protocol, model, stream=True)
    assert (reply.body, reply.broken) == (b"".join(WHOLE_STREAMS[protocol.word]), False)


@THREE
@pytest.mark.parametrize("size", [1999, 2000, 2001, 300_000])
@pytest.mark.parametrize("step", [997, 1 << 20])
def test_an_event_beyond_max_sse_event_bytes_passes_unseen(single, upstream, model, protocol, size, step):
    large = b"data: {}".ljust(size - 2) + b"\n\n"
    raw = b"".join(around(protocol, large, b": small\n\n", large, large + b"data: {}\n\n"))
    upstream.on(model, answer_stream(*(raw[i:i + step] for i in range(0, len(raw), step))))
    reply = ask(single, protocol, model, stream=True)
    assert (reply.body, reply.broken, outcome(single, reply)["event"]) == (raw, False, "end")


def test_gaps_are_filled_again_behind_an_event_beyond_max_sse_event_bytes(single, upstream, model):
    raw = b"data: {}".ljust(9000) + b"\n\n" + SPARSE_STREAM[4] + WHOLE_STREAMS["messages"][-1]
    upstream.on(model, answer_stream(*(raw[i:i + 1000] for i in range(0, len(raw), 1000))))
    (_, _), (_, block), (_, last) = frames_in(ask(single, MESSAGES, model, stream=True).body)
    assert block["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert last == {"type": "message_stop"}


@THREE
def test_bytes_behind_the_terminal_event_pass_too(exact, upstream, model, protocol):
    frames = [*WHOLE_STREAMS[protocol.word], b": bye\n\n", b"data: tail without an end"]
    upstream.on(model, answer_stream(*frames))
    reply = ask(exact, protocol, model, stream=True)
    assert (reply.body, reply.broken) == (b"".join(frames), False)


def test_a_stream_of_128_chunks_of_chinese_passes_whatever_its_characters_are_cut_into(
        program, upstream, model):
    event = 'data: {"type":"response.output_text.delta","delta":"你好世界，龘"}\n\n'.encode()
    stream = event * 300
    stream += frame(COMPLETED)
    step = len(stream) // 128 + 1
    upstream.on(model, answer_stream(*(stream[i:i + step] for i in range(0, len(stream), step))))
    reply = ask(program, RESPONSES, model, stream=True)
    assert (reply.body, reply.broken, outcome(program, reply)["event"]) == (stream, False, "end")


def test_events_without_payload_types_pass_as_they_are(program, upstream, model):
    frames = [b'event: response.created\ndata: {"response":{"id":"resp_1"}}\n\n',
              b'event: response.completed\ndata: {"response":{"id":"resp_1"}}\n\n']
    upstream.on(model, answer_stream(*frames))
    reply = ask(program, RESPONSES, model, stream=True)
    assert (reply.headers["content-type"], reply.body, reply.broken) == ("text/event-stream",
                                                                         b"".join(frames), False)
    assert outcome(program, reply)["event"] == "end"


def test_headers_of_a_stream_pass_but_for_those_of_one_hop(program, upstream, model):
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\nx-ratelimit-remaining-tokens: 5\r\n"
                            b"x-codex-primary-used-percent: 42.5\r\nset-cookie: a=b\r\n"
                            b"connection: keep-alive, x-hop\r\nx-hop: 1\r\n\r\n")
    upstream.on(model, send(head + CHAT_DONE))
    headers = ask(program, CHAT, model, stream=True).headers
    assert (headers["x-ratelimit-remaining-tokens"], headers["x-codex-primary-used-percent"]) == ("5", "42.5")
    assert headers["set-cookie"] == "a=b" and "x-hop" not in headers


@pytest.mark.parametrize("content_type", [
    "text/event-stream", "text/event-stream; charset=utf-8", "text/event-stream;charset=UTF-8",
    "Text/Event-Stream",
    "TEXT/EVENT-STREAM ; x=y", "text/event-stream ;charset=utf-8"])
@pytest.mark.parametrize("stream", [False, True], ids=["not asked for", "asked for"])
def test_an_event_stream_is_known_by_its_content_type(program, upstream, model, content_type, stream):
    upstream.on(model, send(SSE_HEAD.replace(b"text/event-stream", content_type.encode()) + CHAT_DONE))
    reply = ask(program, CHAT, model, stream=stream)
    assert (reply.status, reply.body) == (200, b"data: [DONE]\n\n")
    assert reply.headers["content-type"] == "text/event-stream"


@THREE
@pytest.mark.parametrize("form", ["length", "until the end"])
def test_a_stream_needs_no_chunks_to_be_whole(exact, upstream, model, protocol, form):
    raw = b"".join(WHOLE_STREAMS[protocol.word])
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    upstream.on(model, send(head + b"content-length: %d\r\n\r\n" % len(raw), raw) if form == "length"
                else send_and_close(head + b"\r\n", raw))
    reply = ask(exact, protocol, model, stream=True)
    assert (reply.body, reply.broken, outcome(exact, reply)["event"]) == (raw, False, "end")


@THREE
def test_events_pass_as_they_come(program, upstream, model, protocol):
    seen = threading.Event()

    def script(peer, request):
        peer.send(SSE_HEAD + chunk(WHOLE_STREAMS[protocol.word][0]))
        if seen.wait(PATIENCE):
            peer.send(b"".join(map(chunk, WHOLE_STREAMS[protocol.word][1:])) + b"0\r\n\r\n")

    upstream.on(model, script)
    with open_stream(program, protocol, model) as sock:
        read_until(sock, WHOLE_STREAMS[protocol.word][0])
        seen.set()
        assert read_all(sock).endswith(b"0\r\n\r\n")


def test_a_provider_that_lingers_behind_its_terminal_event_does_not_hold_the_client(hasty, upstream, model):
    def check(protocol, number):
        name = f"{model}-{number}"
        witness = Witness(SSE_HEAD, *map(chunk, WHOLE_STREAMS[protocol.word]))
        upstream.on(name, witness)
        reply = ask(hasty, protocol, name, stream=True)
        assert (reply.body, reply.broken) == (b"".join(WHOLE_STREAMS[protocol.word]), False)
        assert outcome(hasty, reply)["event"] == "end"
        assert witness.wait()

    at_once(check, ALL)


# -- streams that are not ----------------------------------------------------

@THREE
@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"", b"zz\r\n", b"5\r\n: c"],
                         ids=["end", "close", "no chunk", "half a chunk"])
def test_a_stream_that_ends_before_its_terminal_event_is_cut(program, upstream, model, protocol, end):
    frames = WHOLE_STREAMS[protocol.word][:-1]
    upstream.on(model, send_and_close(SSE_HEAD, *map(chunk, frames), end))
    reply = ask(program, protocol, model, stream=True)
    assert (reply.status, reply.broken) == (200, True)
    assert (b"".join(frames) + b": c").startswith(reply.body)
    assert outcome(program, reply)["event"] == ("closed" if end == b"0\r\n\r\n" else "stream-error")


@THREE
def test_a_stream_without_any_event_is_cut(program, upstream, model, protocol):
    upstream.on(model, answer_stream())
    reply = ask(program, protocol, model, stream=True)
    assert (reply.status, reply.body, reply.broken) == (200, b"", True)
    assert outcome(program, reply)["event"] == "closed"


def test_a_stream_until_the_end_of_the_connection_that_stops_early_is_cut(program, upstream, model):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    upstream.on(model, send_and_close(head + b"data: {}\n\n"))
    reply = ask(program, CHAT, model, stream=True)
    assert (reply.body, reply.broken, outcome(program, reply)["event"]) == (b"data: {}\n\n", True, "closed")


def test_a_cut_stream_ends_the_client_s_connection(program, upstream, model):
    upstream.on(model, answer_stream(*WHOLE_STREAMS["chat"][:-1]))
    body = json.dumps(body_for(CHAT, model, stream=True))
    head = f"POST {CHAT.path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    raw = program.talk((head + body).encode())
    assert raw.endswith(WHOLE_STREAMS["chat"][-2] + b"\r\n")
    raw = program.talk(2 * (head + body).encode())  # and a second request behind it gets no answer
    assert raw.count(b"HTTP/1.1 200 OK") == 1 and b"\r\n0\r\n\r\n" not in raw


def test_a_reset_within_a_stream_cuts_it(program, upstream, model):
    upstream.on(model, send_and_reset(SSE_HEAD, chunk(WHOLE_STREAMS["chat"][0])))
    reply = ask(program, CHAT, model, stream=True)
    assert (reply.body, reply.broken, outcome(program, reply)["event"]) == (WHOLE_STREAMS["chat"][0], True,
                                                                            "stream-error")


LAST_CHUNK = {**CHAT_CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def test_a_chat_stream_that_ends_well_behind_its_finish_reason_is_whole(program, upstream, model):
    upstream.on(model, answer_stream(*WHOLE_STREAMS["chat"][:-1], frame(LAST_CHUNK)))  # some providers send no [DONE]
    reply = ask(program, CHAT, model, stream=True)
    assert b"[DONE]" not in reply.body
    assert (reply.broken, outcome(program, reply)["event"]) == (False, "end")


def test_a_chat_stream_is_cut_while_one_of_its_choices_has_not_finished(program, upstream, model):
    upstream.on(model, answer_stream(*WHOLE_STREAMS["chat"][:-1], frame(LAST_CHUNK)))
    reply = ask(program, CHAT, model, stream=True, n=2)
    assert (reply.broken, outcome(program, reply)["event"]) == (True, "closed")


def test_a_finish_reason_does_not_excuse_a_connection_that_breaks(program, upstream, model):
    upstream.on(model, send_and_reset(SSE_HEAD, chunk(WHOLE_STREAMS["chat"][0]), chunk(frame(LAST_CHUNK))))
    reply = ask(program, CHAT, model, stream=True)
    assert (reply.broken, outcome(program, reply)["event"]) == (True, "stream-error")


@pytest.mark.parametrize("word", ["response.completed", "response.incomplete", "response.failed"])
def test_each_terminal_event_of_responses_ends_a_stream_well(program, upstream, model, word):
    last = frame({"type": word, "response": {"id": "resp_1", "status": word.removeprefix("response.")}})
    upstream.on(model, answer_stream(WHOLE_STREAMS["responses"][0], last))
    reply = ask(program, RESPONSES, model, stream=True)
    assert (reply.body, reply.broken) == (WHOLE_STREAMS["responses"][0] + last, False)
    assert outcome(program, reply)["response_status"] == word.removeprefix("response.")


def test_the_end_of_tool_arguments_is_not_the_end_of_a_responses_stream(program, upstream, model):
    upstream.on(model, answer_stream(WHOLE_STREAMS["responses"][0], *CALLS["responses"]))
    reply = ask(program, RESPONSES, model, stream=True)
    assert (reply.broken, outcome(program, reply)["event"]) == (True, "closed")


def test_words_that_look_like_a_terminal_event_inside_a_text_are_none(program, upstream, model):
    text = frame({"type": "response.output_text.delta",
                  "delta": '"type":"error" response.completed [DONE] message_stop'})
    upstream.on(model, answer_stream(text))
    reply = ask(program, RESPONSES, model, stream=True)
    assert (reply.body, reply.broken) == (text, True)


@pytest.mark.parametrize("protocol, event, clean", [
    (RESPONSES, frame({"type": "error", "error": {"type": "x", "code": "c1", "message": "boom"}}), True),
    (RESPONSES, frame({"type": "error", "sequence_number": 3, "code": "c1", "message": "boom",
                       "param": None}), True),
    (CHAT, b'data: {"error":{"code":"c1","message":"boom"}}\n\ndata: [DONE]\n\n', True),
    (CHAT, b'event: error\ndata: {"error":{"code":"c1","message":"boom"}}\n\n', None),
    (MESSAGES, frame({"type": "error", "error": {"type": "c1", "message": "boom"}}), None),
], ids=["responses nested", "responses flat", "chat", "chat event", "messages"])
def test_an_error_inside_a_stream_passes_as_it_is_and_is_logged(
        program, upstream, model, protocol, event, clean):
    frames = [*WHOLE_STREAMS[protocol.word][:-1], event]
    upstream.on(model, answer_stream(*frames))
    reply = ask(program, protocol, model, stream=True)
    assert reply.body == b"".join(frames)
    assert clean is None or reply.broken is not clean
    line = outcome(program, reply)
    assert (line["error_code"], line["error_message"]) == ("c1", "boom")


def test_silence_within_a_stream_cuts_it(hasty, upstream, model):
    def check(protocol, number):
        name = f"{model}-{number}"
        witness = Witness(SSE_HEAD, *map(chunk, WHOLE_STREAMS[protocol.word][:-1]))
        upstream.on(name, witness)
        reply = ask(hasty, protocol, name, stream=True)
        assert (reply.body, reply.broken) == (b"".join(WHOLE_STREAMS[protocol.word][:-1]), True)
        assert outcome(hasty, reply)["event"] == "timeout"
        assert witness.wait()

    at_once(check, ALL)


def test_silence_before_the_first_event_of_a_stream_cuts_it(hasty, upstream, model):
    upstream.on(model, Witness(SSE_HEAD))
    reply = ask(hasty, CHAT, model, stream=True)
    assert (reply.status, reply.body, reply.broken, outcome(hasty, reply)["event"]) == (200, b"", True,
                                                                                        "timeout")


def http10(program, model):
    """What an HTTP/1.0 client gets of a stream, and whether its connection ended in a reset."""
    with open_stream(program, CHAT, model, version="1.0") as sock:
        data = b""
        try:
            while more := sock.recv(65536):
                data += more
        except ConnectionResetError:
            return data, True
        return data, False


@pytest.mark.parametrize("frames, reset", [(WHOLE_STREAMS["chat"], False), (WHOLE_STREAMS["chat"][:-1], True)],
                         ids=["whole", "not"])
def test_a_client_of_http_1_0_can_tell_a_cut_stream_from_a_whole_one(program, upstream, model, frames, reset):
    upstream.on(model, answer_stream(*frames))
    data, was_reset = http10(program, model)
    assert b"\r\ntransfer-encoding" not in data.lower()
    assert was_reset is reset
    assert reset or data.partition(b"\r\n\r\n")[2] == b"".join(frames)


# -- tool calls that stall ---------------------------------------------------

STALLED = "upstream SSE stalled while streaming tool arguments"


def arguments(word, key, text='{"a"'):
    """A piece of a tool call's arguments."""
    call = {"index": key, "id": f"call_{key}", "type": "function",
            "function": {"name": "f", "arguments": text}}
    return frame({
        "responses": {"type": "response.function_call_arguments.delta", "item_id": f"fc_{key}",
                      "output_index": key,
                      "delta": text, "sequence_number": 4},
        "chat": {**CHAT_CHUNK, "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]},
        "messages": {"type": "content_block_delta", "index": key + 1,
                     "delta": {"type": "input_json_delta", "partial_json": text}}}[word])


def opened(word, key):
    """The event that opens a tool call, where the protocol has one."""
    item = {"type": "function_call", "id": f"fc_{key}", "call_id": f"c{key}", "name": "f", "arguments": ""}
    block = {"type": "tool_use", "id": f"tu_{key}", "name": "f", "input": {}, "caller": {"type": "direct"}}
    return b"" if word == "chat" else frame({
        "responses": {"type": "response.output_item.added", "output_index": key, "sequence_number": 3,
                      "item": item},
        "messages": {"type": "content_block_start", "index": key + 1, "content_block": block}}[word])


def finished_item(word, key):
    """The event that says a tool call is complete."""
    return frame({
        "responses": {"type": "response.function_call_arguments.done", "item_id": f"fc_{key}",
                      "output_index": key,
                      "arguments": "{}", "sequence_number": 5},
        "chat": {**CHAT_CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        "messages": {"type": "content_block_stop", "index": key + 1}}[word])


CALLS = {word: [opened(word, 0), arguments(word, 0), finished_item(word, 0)] for word in WHOLE_STREAMS}
TEXTS = {  # traffic that has nothing to do with a tool call
    "responses": frame({"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 9,
                        "delta": "text"}),
    "chat": frame({**CHAT_CHUNK, "choices": [{"index": 0, "delta": {"content": "text"}}]}),
    "messages": frame({"type": "content_block_delta", "index": 0,
                       "delta": {"type": "text_delta", "text": "text"}}),
}


def assert_stalled(program, protocol, style, reply, before):
    """The stream went on to `before`, then came one error event in the right shape, then a clean end."""
    assert reply.status == 200 and not reply.broken
    assert reply.body.startswith(before)
    tail = reply.body[len(before):]
    *_, (name, event) = frames_in(tail)
    assert tail.count(STALLED.encode()) == 1 and tail.endswith(b"\n\n")
    if protocol is RESPONSES:
        message = event["message"]
        assert (name, event) == ("error",
                                 {"type": "error", "sequence_number": 4, "code": None, "message": message,
                                           "param": None})
    elif style != "native":
        message = event["error"]["message"]
        assert (name, event["type"], set(event)) == ("error", "error", {"type", "error"})
        assert list(event["error"]) == ["message", "type", "status"]
        assert event["error"]["type"] in ("upstream_response_body_read_error", "upstream_request_error")
        assert type(event["error"]["status"]) is int
    elif protocol is CHAT:
        message = event["error"]["message"]
        assert (name, set(event), event["error"]["param"]) == (None, {"error"}, None)
        assert set(event["error"]) >= {"message", "type", "param", "code"}
    else:
        message = event["error"]["message"]
        assert (name, event) == ("error",
                                 {"type": "error", "error": {"type": "timeout_error", "message": message}})
    assert STALLED in message
    line = outcome(program, reply)
    assert (line["event"], line["level"]) == ("stream-error", "warn")
    assert STALLED in line["err"]


@pytest.mark.parametrize("style", ["text", "json", "native"])
def test_a_stalled_tool_call_ends_the_stream_with_an_error(programs, upstream, model, style):
    program = programs(styled(upstream, style))

    def check(protocol, number):
        name = f"{model}-{number}"
        frames = [*WHOLE_STREAMS[protocol.word][:1], *CALLS[protocol.word][:2]]
        witness = Witness(SSE_HEAD, *(chunk(f) for f in frames if f))
        upstream.on(name, witness)
        reply = ask(program, protocol, name, stream=True)
        assert_stalled(program, protocol, style, reply, b"".join(frames))
        assert len(frames_in(reply.body)) == len(frames_in(b"".join(frames))) + 1
        assert witness.wait()

    at_once(check, ALL)


@pytest.mark.parametrize("noise", ["comment", "ping", "text"])
def test_other_traffic_does_not_hide_a_stalled_tool_call(exact, upstream, model, noise):
    def check(protocol, number):
        name = f"{model}-{number}"
        every = {"comment": b": still here\n\n", "ping": b'event: ping\ndata: {"type": "ping"}\n\n',
                 "text": TEXTS[protocol.word]}[noise]
        frames = b"".join(CALLS[protocol.word][:2])
        witness = Witness(SSE_HEAD, chunk(frames), every=chunk(every))
        upstream.on(name, witness)
        reply = ask(exact, protocol, name, stream=True)
        assert_stalled(exact, protocol, "text", reply, frames)
        assert every in reply.body
        assert witness.wait()

    at_once(check, ALL)


def test_each_tool_call_is_watched_by_itself(exact, upstream, model):
    others = {"responses": arguments("responses", 1), "messages": arguments("messages", 1),
              "chat": arguments("chat", 0).replace(b'"index": 0, "delta"', b'"index": 1, "delta"')}

    def check(protocol, number):
        name, word = f"{model}-{number}", protocol.word
        frames = b"".join(CALLS[word][:2]) + opened(word, 1)
        upstream.on(name, Witness(SSE_HEAD, chunk(frames), every=chunk(others[word])))
        reply = ask(exact, protocol, name, stream=True)
        assert_stalled(exact, protocol, "text", reply, frames)
        assert others[word] in reply.body

    at_once(check, ALL)


def test_the_second_of_two_tool_calls_can_stall_after_the_first_is_complete(exact, upstream, model):
    def check(protocol, number):
        name = f"{model}-{number}"
        word = protocol.word
        middle = b"" if protocol is CHAT else finished_item(word, 0)
        frames = b"".join(CALLS[word][:2]) + middle + opened(word, 1) + arguments(word, 1)
        upstream.on(name, Witness(SSE_HEAD, chunk(frames)))
        assert_stalled(exact, protocol, "text", ask(exact, protocol, name, stream=True), frames)

    at_once(check, ALL)


def test_a_tool_call_that_is_complete_may_be_followed_by_silence(exact, upstream, model):
    def check(protocol, number):
        name = f"{model}-{number}"
        frames = around(protocol, *filter(None, CALLS[protocol.word]))

        def script(peer, request):
            peer.send(SSE_HEAD + b"".join(map(chunk, frames[:-1])))
            time.sleep(0.3)
            peer.send(chunk(frames[-1]) + b"0\r\n\r\n")

        upstream.on(name, script)
        reply = ask(exact, protocol, name, stream=True)
        assert (reply.body, reply.broken, outcome(exact, reply)["event"]) == (b"".join(frames), False, "end")

    at_once(check, ALL)


def test_arguments_that_keep_coming_do_not_stall(single, upstream, model):
    def check(protocol, number):
        name = f"{model}-{number}"
        frames = around(protocol, *filter(None, [opened(protocol.word, 0), *[arguments(protocol.word, 0)] * 6,
                                                 finished_item(protocol.word, 0)]))

        def script(peer, request):
            peer.send(SSE_HEAD)
            for each in frames:
                peer.send(chunk(each))
                time.sleep(0.08 if each == arguments(protocol.word, 0) else 0)
            peer.send(b"0\r\n\r\n")

        upstream.on(name, script)
        reply = ask(single, protocol, name, stream=True)
        assert (reply.body, reply.broken, outcome(single, reply)["event"]) == (b"".join(frames), False, "end")

    at_once(check, ALL)


def test_a_stall_within_a_half_sent_event_does_not_glue_an_error_to_it(exact, upstream, model):
    half = arguments("responses", 0)[:-20]
    upstream.on(model, Witness(SSE_HEAD, chunk(arguments("responses", 0)), chunk(half)))
    reply = ask(exact, RESPONSES, model, stream=True)
    assert (reply.body, reply.broken) == (arguments("responses", 0) + half, True)
    assert outcome(exact, reply)["event"] == "stream-error"


@THREE
def test_a_stream_that_ends_within_a_tool_call_is_cut_and_nothing_is_invented(
        program, upstream, model, protocol):
    frames = CALLS[protocol.word][:2]
    upstream.on(model, answer_stream(*filter(None, frames)))
    reply = ask(program, protocol, model, stream=True)
    assert (reply.body, reply.broken) == (b"".join(frames), True)
    assert outcome(program, reply)["event"] in ("unfinished-tool", "closed")


def test_a_responses_stream_that_ends_within_a_tool_call_is_logged_as_unfinished(program, upstream, model):
    upstream.on(model, answer_stream(*CALLS["responses"][:2]))
    line = outcome(program, ask(program, RESPONSES, model, stream=True))
    assert (line["event"], line["level"], line["calls"]) == ("unfinished-tool", "warn", {"f": 1})


# -- gaps in the answers of Anthropic-compatible providers -------------------

SPARSE = {"id": "m", "role": "assistant", "model": "claude", "content": [
              {"type": "tool_use", "id": "t", "name": "f", "input": {"n": 1.5, "s": "é"}}],
          "usage": {"input_tokens": 3, "server_tool_use": {"web_search_requests": 1}}, "own": [None]}


def test_gaps_in_an_anthropic_message_are_filled_by_default(program, upstream, model):
    upstream.on(model, answer_json(SPARSE))
    assert ask(program, MESSAGES, model).json == {
        **SPARSE, "type": "message", **nulls("container", "stop_details", "stop_reason", "stop_sequence"),
        "content": [{**SPARSE["content"][0], "caller": {"type": "direct"}}],
        "usage": {**SPARSE["usage"], **nulls("cache_creation", "cache_creation_input_tokens",
                                             "cache_read_input_tokens",
                                             "inference_geo", "service_tier"),
                  "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0}}}


def test_a_strict_provider_s_message_stays_as_it_is(exact, upstream, model):
    raw = json.dumps(SPARSE, indent=1).encode()
    upstream.on(model, answer(200, raw))
    assert ask(exact, MESSAGES, model).body == raw


@pytest.mark.parametrize("raw", [
    b'{"id":"m","type":"error"}', b'{ "id":"m","role":"user","model":"x","content":[],"usage":{} }',
    b'["id"]', b"null", json.dumps({**MESSAGE, "content": []}, indent=2).encode(),
], ids=["error", "user", "array", "null", "without gaps"])
def test_an_answer_that_is_no_message_or_has_no_gaps_keeps_its_bytes(program, upstream, model, raw):
    upstream.on(model, answer(200, raw))
    assert ask(program, MESSAGES, model).body == raw


@pytest.mark.parametrize("number", ["1e999", "-1e999", "123456789012345678901234567890", "1e-400"])
def test_filling_gaps_leaves_json_that_every_reader_takes(program, upstream, model, number):
    raw = json.dumps(SPARSE).replace("1.5", number).replace("\\u00e9", "\\ud83d").encode()
    upstream.on(model, answer(200, raw))
    reply = ask(program, MESSAGES, model)
    assert reply.status == 200
    value = json.loads(reply.body.decode("utf-8"),
                       parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert value["content"][0]["input"] == json.loads(raw)["content"][0]["input"]


SPARSE_STREAM = [
    b'event: message_start\ndata: {"id":"m","role":"assistant"}\n\n',  # bare: not repaired
    frame({"type": "message_start", "message": {k: v for k, v in SPARSE.items()}}),
    b'event: content_block_start\n'
    b'data: {"index":0,"content_block":{"type":"tool_use","id":"t","name":"f","input":{}}}\n\n',
    b": a comment\n\n",
    frame({"type": "content_block_start", "index": 1, "content_block": {"type": "thinking", "thinking": ""}}),
    frame({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 2}}),
    frame({"type": "message_stop"})]


@pytest.mark.parametrize("size", [None, 1, 50])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_gaps_in_an_anthropic_stream_are_filled_by_default(program, upstream, model, size, ending):
    raw = b"".join(SPARSE_STREAM).replace(b"\n", ending)
    upstream.on(model, answer_stream(*([raw[i:i + size] for i in range(0, len(raw), size)]
                                       if size else [raw])))
    reply = ask(program, MESSAGES, model, stream=True)
    assert (reply.headers["content-type"], reply.broken) == ("text/event-stream", False)
    events = [event for _, event in frames_in(reply.body)]
    assert [name for name, _ in frames_in(reply.body)] == ["message_start", "message_start",
                                                           "content_block_start",
                                                           "content_block_start", "message_delta",
                                                           "message_stop"]
    assert events[0].items() >= {"id": "m", "role": "assistant"}.items() and "container" not in events[0]
    assert events[1]["message"]["type"] == "message"
    assert events[1]["message"]["content"][0]["caller"] == {"type": "direct"}
    assert events[1]["message"]["usage"]["server_tool_use"] == {"web_search_requests": 1,
                                                                "web_fetch_requests": 0}
    assert events[2] == {"type": "content_block_start", "index": 0, "content_block": {
        "type": "tool_use", "id": "t", "name": "f", "input": {}, "caller": {"type": "direct"}}}
    assert events[3]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[4] == {"type": "message_delta",
                         "delta": nulls("container", "stop_details", "stop_sequence", stop_reason="tool_use"),
                         "usage": nulls("cache_creation_input_tokens", "cache_read_input_tokens",
                                        "input_tokens",
                                        "server_tool_use", output_tokens=2)}
    assert events[5] == {"type": "message_stop"}


def test_a_strict_provider_s_stream_stays_as_it_is(exact, upstream, model):
    upstream.on(model, answer_stream(*SPARSE_STREAM))
    assert ask(exact, MESSAGES, model, stream=True).body == b"".join(SPARSE_STREAM)


def test_an_anthropic_stream_that_ends_after_its_start_gets_no_message_stop(program, upstream, model):
    upstream.on(model, answer_stream(WHOLE_STREAMS["messages"][0]))
    reply = ask(program, MESSAGES, model, stream=True)
    assert (reply.body, reply.broken) == (WHOLE_STREAMS["messages"][0], True)


# -- clients that go away, and slow ones -------------------------------------

@THREE
def test_a_client_that_goes_away_within_a_stream_releases_the_provider(program, upstream, model, protocol):
    witness = Witness(SSE_HEAD, chunk(WHOLE_STREAMS[protocol.word][0]), every=chunk(b": ping\n\n"))
    upstream.on(model, witness)
    with open_stream(program, protocol, model) as sock:
        head = read_until(sock, WHOLE_STREAMS[protocol.word][0])
    assert witness.wait()
    id = re.search(rb"x-proxai-request-id: (\d+)", head)[1].decode()
    assert program.events(id)[-1]["event"] == "closed"


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", SSE_HEAD],
                         ids=["before the head", "within an answer", "before the first event"])
def test_a_client_that_goes_away_while_it_waits_releases_the_provider(program, upstream, model, begin):
    witness = Witness(begin)
    upstream.on(model, witness)
    with open_stream(program, CHAT, model):
        deadline = time.monotonic() + PATIENCE
        while not upstream.got(model) and time.monotonic() < deadline:
            time.sleep(0.005)
    assert witness.wait()


def test_a_client_that_does_not_read_stops_the_provider(program, upstream, model):
    sent, stuck, released = [], threading.Event(), threading.Event()

    def flood(peer, request):
        peer.send(SSE_HEAD)
        peer.sock.settimeout(0.2)
        piece = chunk(b"data: " + b"x" * 65526 + b"\n\n")
        try:
            while len(sent) < 1000:  # 64 MiB
                peer.send(piece)
                sent.append(1)
        except TimeoutError:
            stuck.set()
        if peer.gone():
            released.set()

    upstream.on(model, flood)
    with open_stream(program, CHAT, model, size=8192) as sock:
        read_until(sock, b"data: x")
        assert stuck.wait(PATIENCE), f"the proxy took {len(sent)} pieces"
    assert released.wait(PATIENCE)


def test_exchanges_at_one_time_do_not_mix(program, upstream, model):
    def check(number, _):
        name = f"{model}-{number}"
        text = f"{number} " * (1 + number * 397 % 20_000)
        for stream in (number % 2 == 0, number % 3 == 0, number % 5 == 0):
            frames = [frame({"choices": [], "text": text}), b"data: [DONE]\n\n"]
            upstream.on(name, answer_stream(*frames) if stream else answer_json([text]))
            reply = ask(program, CHAT, name, stream=stream)
            assert (reply.status, reply.broken) == (200, False)
            assert reply.body == (b"".join(frames) if stream else json.dumps([text]).encode())

    at_once(check, range(30))


# -- turns -------------------------------------------------------------------

def in_background(results, program, model):
    """Ask in a thread, and add the reply to `results`."""
    thread = threading.Thread(target=lambda: results.append(ask(program, CHAT, model)), daemon=True)
    thread.start()
    return thread


def test_requests_beyond_the_limit_wait_for_the_head_of_an_answer(single, upstream, model):
    head, replies = threading.Event(), []

    def hold(peer, request):
        if head.wait(PATIENCE):
            peer.send(GOOD)

    upstream.on(model, hold)
    upstream.on(f"{model}b", answer_json({"id": "b"}))
    first = in_background(replies, single, model)
    while not upstream.got(model):
        time.sleep(0.005)
    second = in_background(replies, single, f"{model}b")
    time.sleep(0.2)
    assert upstream.got(f"{model}b") == []
    head.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert sorted(r.json["id"] for r in replies) == ["b", "fine"]


def test_a_stream_that_has_begun_leaves_its_place_to_the_next(single, upstream, model):
    upstream.on(model, Witness(SSE_HEAD, chunk(WHOLE_STREAMS["chat"][0])))
    upstream.on(f"{model}b", answer_json(OK))
    with open_stream(single, CHAT, model) as sock:
        read_until(sock, b"data:")
        assert ask(single, CHAT, f"{model}b").status == 200


@pytest.mark.parametrize("script", [Witness(), send_and_close(), send(b"nonsense\r\n\r\n")],
                         ids=["gone", "died", "broken"])
def test_a_request_that_fails_leaves_its_place_to_the_next(single, upstream, model, script):
    upstream.on(model, script)
    upstream.on(f"{model}b", answer_json(OK))
    if isinstance(script, Witness):
        with open_stream(single, CHAT, model):
            while not upstream.got(model):
                time.sleep(0.005)
    else:
        assert ask(single, CHAT, model).status == 502
    assert ask(single, CHAT, f"{model}b").status == 200


def test_a_client_that_goes_away_while_it_waits_for_its_turn_is_not_served(single, upstream, model):
    head, replies = threading.Event(), []

    def hold(peer, request):
        if head.wait(PATIENCE):
            peer.send(GOOD)

    upstream.on(model, hold)
    upstream.on(f"{model}b", answer_json(OK))
    upstream.on(f"{model}c", answer_json(OK))
    first = in_background(replies, single, model)
    while not upstream.got(model):
        time.sleep(0.005)
    with open_stream(single, CHAT, f"{model}b"):
        time.sleep(0.1)
    single.wait_line(rf'"event":"closed".*"model":"{model}b"')
    head.set()
    first.join(PATIENCE)
    assert ask(single, CHAT, f"{model}c").status == 200
    assert upstream.got(f"{model}b") == []


# -- what the log tells ------------------------------------------------------

RATE_HEADERS = ["x-ratelimit-limit-requests: 100", "x-ratelimit-remaining-requests: 99",
         "x-ratelimit-limit-tokens: 5000",
         "x-ratelimit-remaining-tokens: 4000", "x-ratelimit-reset-requests: 1s",
         "x-ratelimit-reset-tokens: 6m0s",
         "x-codex-primary-used-percent: 42.5", "x-codex-primary-window-minutes: 300",
         "x-codex-primary-reset-after-seconds: 600"]
RICH = {
    "responses": ([
        frame({"type": "response.created", "sequence_number": 0,
               "response": {"id": "resp_abc12345678", "model": "gpt-r"}}),
        frame({"type": "response.completed", "sequence_number": 7, "response": {
            "id": "resp_abc12345678", "model": "gpt-r", "status": "completed", "service_tier": "flex",
            "reasoning": {"effort": "high"}, "output": [
                {"type": "message", "id": "m1"}, {"type": "function_call", "id": "f1", "name": "read_file"},
                {"type": "function_call", "id": "f2", "name": "read_file"},
                {"type": "mcp_call", "id": "f3", "name": "go",
                                                                             "server_label": "srv"}],
            "usage": {"input_tokens": 100, "output_tokens": 30, "total_tokens": 130,
                      "input_tokens_details": {"cached_tokens": 40},
                      "output_tokens_details": {"reasoning_tokens": 10}}}})],
        {"response_id": "12345678", "model": "gpt-r", "service_tier": "flex", "tok": 130, "input": 60,
         "output": 30,
         "cache": 40, "reasoning": 10, "reasoning_effort": "high", "response_status": "completed",
         "incomplete_reason": None, "seq": 7,
         "output_items": {"message": 1, "function_call": 2, "mcp_call": 1},
         "calls": {"read_file": 2, "srv/go": 1}, "calls_by_source": {"function": 2, "mcp": 1},
         "rate_limit_limit_requests": 100, "rate_limit_remaining_requests": 99,
         "rate_limit_limit_tokens": 5000,
         "rate_limit_remaining_tokens": 4000, "rate_limit_reset_requests_ms": 1000,
         "rate_limit_reset_tokens_ms": 360000,
         "codex_primary_used_percent": 42.5, "codex_primary_window_minutes": 300,
         "codex_primary_reset_after_secs": 600}),
    "chat": ([
        frame({"id": "chatcmpl-abc12345678", "model": "gpt-c", "service_tier": "default", "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": "sesame-answer"},
             "finish_reason": None}]}),
        frame({"id": "chatcmpl-abc12345678", "model": "gpt-c",
               "choices": [{"index": 0, "delta": {"tool_calls": [
            {"index": 0, "id": "c", "type": "function",
             "function": {"name": "grep", "arguments": "{}"}}]}}]}),
        frame({"id": "chatcmpl-abc12345678", "model": "gpt-c", "choices": [
            {"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
        frame({"id": "chatcmpl-abc12345678", "model": "gpt-c", "choices": [], "usage": {
            "prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130,
            "prompt_tokens_details": {"cached_tokens": 40},
            "completion_tokens_details": {"reasoning_tokens": 10}}}),
        b"data: [DONE]\n\n"],
        {"response_id": "12345678", "model": "gpt-c", "service_tier": "default", "tok": 130, "input": 60,
         "output": 30,
         "cache": 40, "reasoning": 10, "finish_reasons": {"tool_calls": 1}, "calls": {"grep": 1},
         "calls_by_source": {"tool": 1}}),
    "messages": ([
        frame({"type": "message_start", "message": {**MESSAGE, "id": "msg_abc12345678", "usage": {
            **USAGE, "input_tokens": 60, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 7}}}),
        frame({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        frame({"type": "content_block_start", "index": 1,
               "content_block": {"type": "tool_use", "id": "t", "name": "grep"}}),
        frame({"type": "message_delta", "delta": {"stop_reason": "tool_use"},
               "usage": {"output_tokens": 30}}),
        frame({"type": "message_stop"})],
        {"response_id": "12345678", "model": "claude", "input": 60, "output": 30, "cache_read": 40,
         "cache_creation": 7,
         "stop_reason": "tool_use", "stop_reasons": {"tool_use": 1},
         "output_items": {"text": 1, "tool_use": 1},
         "calls": {"grep": 1}, "calls_by_source": {"tool": 1}}),
}


@THREE
def test_the_last_line_of_a_stream_tells_its_whole_story(exact, upstream, model, protocol):
    frames, expected = RICH[protocol.word]
    head = SSE_HEAD.replace(b"\r\n\r\n", ("\r\n" + "\r\n".join(RATE_HEADERS) + "\r\n\r\n").encode())
    upstream.on(model, send(head, *map(chunk, frames), b"0\r\n\r\n"))
    reply = ask(exact, protocol, model, stream=True)
    recv, fwd, hdr, end = exact.events(reply.headers["x-proxai-request-id"])
    assert [e["event"] for e in (recv, fwd, hdr, end)] == ["recv", "fwd", "hdr", "end"]
    assert {e["log_schema"] for e in (recv, fwd, hdr, end)} == {"proxai.v1"}
    assert (end["level"], end["status"], end["ct"], end["sse"]) == ("info", 200, "text/event-stream", True)
    assert {key: end.get(key) for key in expected} == expected
    assert end["down"] == len(reply.body)
    assert 1 <= end["chunks"] <= len(frames) and end["avg_chunk_bytes"] == end["down"] // end["chunks"]
    assert 0 <= end["ttfb_ms"] <= end["duration_ms"] <= PATIENCE * 1000


@THREE
def test_the_lines_before_the_last_tell_what_was_asked(exact, upstream, model, protocol):
    upstream.on(model, answer_json(OK))
    limit = {CHAT: "max_completion_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}[protocol]
    reply = ask(exact, protocol, model, query="?secret=1", stream=False, **{limit: 99})
    recv, fwd, hdr, end = exact.events(reply.headers["x-proxai-request-id"])
    size = len(upstream.got(model)[0].body)
    assert (recv["event"], recv["level"], recv["method"], recv["path"]) == ("recv", "debug", "POST",
                                                                            protocol.path)
    assert recv["content_length"] == size
    assert {key: fwd[key] for key in fwd if key not in ("ts", "request_id", "reasoning_effort",
                                                        "request_hints",
                                                        "request_hint_parts", "capture")} == {
        "log_schema": "proxai.v1", "level": "info", "event": "fwd", "method": "POST", "path": protocol.path,
        "provider_request_bytes": size, "inbound_request_bytes": size, "request_delta_bytes": 0,
        "request_protocol": protocol.name, "provider": f"{protocol.word}_default", "route_name": None,
        "provider_protocol": protocol.name, "translation": "", "request_protocol_alias": protocol.alias,
        "translation_alias": "", "provider_protocol_alias": protocol.alias, "model": model, "stream": False,
        "max_output_tokens": 99}
    assert (hdr["event"], hdr["status"], hdr["ct"], hdr["sse"]) == ("hdr", 200, "application/json", False)
    assert hdr["ttfb_ms"] >= 0 and end["down"] == len(reply.body)


def test_an_error_answer_has_a_line_with_what_the_provider_said(exact, upstream, model):
    upstream.on(model, answer_json({"error": {"message": "m" * 1000, "code": "c", "param": "p"}}, 429))
    reply = ask(exact, CHAT, model)
    line = outcome(exact, reply)
    assert (line["event"], line["level"], line["status"], line["sse"]) == ("hdr-error", "warn", 429, False)
    assert (line["error_code"], line["error_param"]) == ("c", "p")
    assert len(reply.body) == 1000 and line["err"].startswith("mmm") and len(line["err"]) <= 300


@pytest.mark.parametrize("name", ["end", "closed", "unfinished-tool", "stream-error", "hdr-error", "timeout"])
def test_no_line_of_the_log_holds_a_prompt_a_key_a_query_or_the_provider_s_address(
        programs, upstream, model, name):
    program = programs(styled(upstream, "native"))
    text = frame({**CHAT_CHUNK, "choices": [{"index": 0, "delta": {"content": "sesame-answer"}}]})
    call = arguments("chat", 0, '{"sesame-arguments"')
    upstream.on(model, {
        "end": answer_stream(text, b"data: [DONE]\n\n"), "closed": answer_stream(text),
        "unfinished-tool": answer_stream(text, call), "stream-error": Witness(SSE_HEAD, chunk(call)),
        "hdr-error": answer_json({"error": {"message": "refused"}, "sesame-answer": upstream.url}, 400),
        "timeout": Witness(SSE_HEAD, chunk(text))}[name])
    wanted = f"quick-{model}" if name == "timeout" else model
    reply = program.post("/v1/chat/completions?key=sesame-query", {
        "model": wanted, "messages": [{"role": "user", "content": "sesame-prompt"}], "stream": True,
        "user": "sesame-user",
        "tools": [{"type": "function", "function": {"name": "f", "description": "sesame-tool"}}]},
        "authorization: Bearer sesame-client-key", "x-api-key: sesame-client-key", "cookie: sesame=1")
    line = outcome(program, reply)
    assert line["event"] == name or (name, line["event"]) == ("unfinished-tool", "closed")
    written = "\n".join(line for line in program.lines if line.startswith("{"))
    for secret in ("sesame", KEY, f"127.0.0.1:{upstream.port}", "http://"):
        assert secret not in written, secret


@pytest.mark.parametrize("name", ["refused", "nowhere", "stranger", "tunnel"])
def test_no_line_about_a_provider_that_cannot_be_reached_holds_its_address(ways, model, monkeypatch, name):
    monkeypatch.setattr(ways.tunnel, "reply", b"HTTP/1.1 407 X\r\n\r\n")
    reply = ask(ways.program, CHAT, f"{name}-{model}", query="?key=sesame-query")
    assert reply.status in (200, 502)
    outcome(ways.program, reply)
    written = "\n".join(line for line in ways.program.lines if line.startswith("{"))
    for secret in ("sesame", KEY, "127.0.0.1", "p%40ss", "p@ss", "nothing.invalid", "http://"):
        assert secret not in written, secret



# ============================================================================
#  15  Demo provider
# ============================================================================

WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]}, "version": {"const": 3},
        "near": {"type": ["null", "string"]}, "tags": {"type": "array", "items": {"type": "string"}},
        "wind": {"type": "object", "properties": {"speed": {"type": "number"}}, "required": ["speed"]},
    },
    "required": ["place"],
}


def weather_tool(protocol: proxai.Protocol, schema: Any = WEATHER_SCHEMA) -> dict[str, Any]:
    """The declaration of a tool `get_weather`."""
    if protocol is MESSAGES:
        return {"name": "get_weather", "input_schema": schema}
    function = {"name": "get_weather", "parameters": schema}
    return {"type": "function", **({"function": function} if protocol is CHAT else function)}


RESULT_OF_A_TOOL = {
    "chat": [{"role": "assistant", "content": None, "tool_calls": [
                 {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]},
             {"role": "tool", "tool_call_id": "c1", "content": "21 degrees"}],
    "messages": [{"role": "assistant", "content": [
                     {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {}}]},
                 {"role": "user", "content": [
                     {"type": "tool_result", "tool_use_id": "c1", "content": "21 degrees"}]}],
    "responses": [{"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c1", "output": "21 degrees"}],
}
NO_TOOL = {"chat": "none", "messages": {"type": "none"}, "responses": "none"}
EACH_PROTOCOL = pytest.mark.parametrize("protocol", [CHAT, MESSAGES, RESPONSES], ids=lambda p: p.word)


class Said(NamedTuple):
    """What a reply says, whatever its protocol."""

    text: str
    calls: list[tuple[str, Any]]
    finish: str


FINISHED = {"chat": "stop", "messages": "end_turn", "responses": "completed"}
CALLING = {"chat": "tool_calls", "messages": "tool_use", "responses": "completed"}


def demo_request(protocol: proxai.Protocol, *items: Any, text: str = "Hello  there,\nyou!", **more: Any):
    """A request of `protocol` that says `text`, then has `items`."""
    return {**body_for(protocol, "demo"), protocol.wants: [{"role": "user", "content": text}, *items], **more}


def demo_reply(protocol: proxai.Protocol, body: dict[str, Any]) -> Any:
    """The whole reply, by way of JSON as a client gets it."""
    turn = proxai.demo_turn(protocol, body, 7)
    return json.loads(json.dumps(proxai.DEMO_WHOLE[protocol.word](turn, 1700000000, body)))


def demo_frames(protocol: proxai.Protocol, body: dict[str, Any]) -> list[tuple[str | None, str]]:
    """(event name, data) of the streamed reply."""
    turn = proxai.demo_turn(protocol, body, 7)
    return frames_of(b"".join(proxai.DEMO_STREAM[protocol.word](turn, 1700000000, body)))


def frames_of(raw: bytes) -> list[tuple[str | None, str]]:
    """(event name, data) of each event in `raw`, read without the code under test."""
    found = []
    for frame in raw.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        found.append((fields.get("event"), fields["data"]))
    return found


def said_whole(protocol: proxai.Protocol, reply: Any) -> Said:
    """What a whole reply says."""
    if protocol is CHAT:
        choice, = reply["choices"]
        functions = [call["function"] for call in choice["message"].get("tool_calls", [])]
        text, finish = choice["message"]["content"] or "", choice["finish_reason"]
        return Said(text, [(f["name"], json.loads(f["arguments"])) for f in functions], finish)
    if protocol is MESSAGES:
        text = "".join(b["text"] for b in reply["content"] if b["type"] == "text")
        calls = [(b["name"], b["input"]) for b in reply["content"] if b["type"] == "tool_use"]
        return Said(text, calls, reply["stop_reason"])
    text = "".join(p["text"] for i in reply["output"] if i["type"] == "message" for p in i["content"])
    calls = [(i["name"], json.loads(i["arguments"])) for i in reply["output"] if i["type"] == "function_call"]
    return Said(text, calls, reply["status"])


def said_streamed(protocol: proxai.Protocol, frames: list[tuple[str | None, str]]) -> Said:
    """What a streamed reply says, put together from its pieces only."""
    text, name, arguments, finish = "", "", "", ""
    if protocol is CHAT:
        assert frames[-1] == (None, "[DONE]")
        for choice in (json.loads(data)["choices"] for _, data in frames[:-1]):
            for delta in (c["delta"] for c in choice):
                text += delta.get("content") or ""
                for call in delta.get("tool_calls", []):
                    name += call["function"].get("name", "")
                    arguments += call["function"]["arguments"]
            finish = next((c["finish_reason"] for c in choice if c["finish_reason"]), finish)
    for kind, data in frames if protocol is not CHAT else []:
        event = json.loads(data)
        assert event["type"] == kind
        delta = event.get("delta")
        if kind == "content_block_delta":
            text += delta.get("text", "")
            arguments += delta.get("partial_json", "")
        elif kind == "content_block_start":
            name = event["content_block"].get("name", "")
        elif kind == "message_delta":
            finish = delta["stop_reason"]
        elif kind == "response.output_item.added":
            name = event["item"].get("name", "")
        elif kind == "response.output_text.delta":
            text += delta
        elif kind == "response.function_call_arguments.delta":
            arguments += delta
        elif kind == "response.completed":
            finish = event["response"]["status"]
    return Said(text, [(name, json.loads(arguments))] if name else [], finish)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON schema of the plain kinds accepts `value`."""
    kinds = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
             "array": (list,), "object": (dict,), "null": (type(None),)}
    named = schema.get("type", [])
    allowed = [kind for name in ([named] if isinstance(named, str) else named) for kind in kinds[name]]
    if allowed and type(value) not in allowed:
        return False
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        complete = set(schema.get("required", ())) <= value.keys()
        return complete and all(fits(v, inner.get(k, {})) for k, v in value.items())
    return True


@EACH_PROTOCOL
@pytest.mark.parametrize("ways", ["whole", "streamed"])
class TestDemoReplies:
    """Each reply says the same whole and streamed."""

    def said(self, protocol, ways, body):
        if ways == "whole":
            return said_whole(protocol, demo_reply(protocol, body))
        return said_streamed(protocol, demo_frames(protocol, {**body, "stream": True}))

    def test_text_is_said_back_with_its_blanks(self, protocol, ways):
        said = self.said(protocol, ways, demo_request(protocol))
        assert said == Said("You said: Hello  there,\nyou!", [], FINISHED[protocol.word])

    def test_a_text_of_any_script_survives(self, protocol, ways):
        text = "größe 漢字 😀\u2028\u00a0x \ud83d"[:-1] + "\"\\"
        assert self.said(protocol, ways, demo_request(protocol, text=text)).text == f"You said: {text}"

    def test_nothing_said_is_answered_too(self, protocol, ways):
        said = self.said(protocol, ways, demo_request(protocol, text=" \n "))
        assert said == Said("You said: nothing", [], FINISHED[protocol.word])

    @pytest.mark.parametrize("required", [
        ["place"], list(WEATHER_SCHEMA["properties"]), [], ["place", "wind"]], ids=len)
    def test_an_offered_tool_is_called_with_arguments_by_its_schema(self, protocol, ways, required):
        schema = {**WEATHER_SCHEMA, "required": required}
        said = self.said(protocol, ways, demo_request(protocol, tools=[weather_tool(protocol, schema)]))
        (name, arguments), = said.calls
        assert (said.text, name, said.finish) == ("", "get_weather", CALLING[protocol.word])
        assert fits(arguments, schema), arguments

    def test_a_tool_without_parameters_is_called_with_an_empty_object(self, protocol, ways):
        tool = {"chat": {"type": "function", "function": {"name": "now"}},
                "responses": {"type": "function", "name": "now"},
                "messages": {"name": "now", "input_schema": {"type": "object"}}}[protocol.word]
        assert self.said(protocol, ways, demo_request(protocol, tools=[tool])).calls == [("now", {})]

    def test_the_result_of_a_tool_is_told(self, protocol, ways):
        body = demo_request(protocol, *RESULT_OF_A_TOOL[protocol.word], tools=[weather_tool(protocol)])
        said = self.said(protocol, ways, body)
        assert said == Said("The tool answered: 21 degrees", [], FINISHED[protocol.word])

    def test_a_tool_is_not_called_against_tool_choice_none(self, protocol, ways):
        body = demo_request(protocol, text="hi", tools=[weather_tool(protocol)],
                            tool_choice=NO_TOOL[protocol.word])
        assert self.said(protocol, ways, body) == Said("You said: hi", [], FINISHED[protocol.word])

    def test_content_in_parts_is_read(self, protocol, ways):
        kind = "input_text" if protocol is RESPONSES else "text"
        item = {"role": "user", "content": [{"type": kind, "text": "one"}, {"type": kind, "text": "two"}]}
        said = self.said(protocol, ways, demo_request(protocol, item))
        assert re.fullmatch("You said: (one )?two", said.text)


@pytest.mark.parametrize("protocol, tool", [
    (RESPONSES, {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}),
    (RESPONSES, {"type": "namespace", "name": "functions", "tools": []}),
    (RESPONSES, {"type": "web_search"}),
    (MESSAGES, {"type": "web_search_20250305", "name": "web_search"}),
    (CHAT, {"type": "custom", "custom": {"name": "apply_patch"}}),
], ids=["responses-custom", "responses-namespace", "responses-web", "messages-web", "chat-custom"])
def test_the_demo_makes_no_function_call_of_a_tool_that_is_no_function(protocol, tool):
    body = demo_request(protocol, tools=[tool], text="hi")
    assert said_whole(protocol, demo_reply(protocol, body)).calls == []
    body["tools"].append(weather_tool(protocol))
    assert [name for name, _ in said_whole(protocol, demo_reply(protocol, body)).calls] == ["get_weather"]


@pytest.mark.parametrize("protocol, result", [
    (MESSAGES, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "21 degrees"}]},
        {"type": "text", "text": "a reminder"}]}),
    (RESPONSES, {"type": "function_call_output", "call_id": "c1",
                 "output": [{"type": "input_text", "text": "21 degrees"}]}),
    (RESPONSES, {"type": "custom_tool_call_output", "call_id": "c1", "output": "21 degrees"}),
    (CHAT, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21 degrees"}]}),
], ids=["messages-parts-and-text", "responses-parts", "responses-custom", "chat-parts"])
def test_the_demo_reads_the_result_of_a_tool_in_each_form(protocol, result):
    body = demo_request(protocol, result, tools=[weather_tool(protocol)])
    assert said_whole(protocol, demo_reply(protocol, body)) == Said(
        "The tool answered: 21 degrees", [], FINISHED[protocol.word])


@EACH_PROTOCOL
@pytest.mark.parametrize("more", [
    {"tools": None}, {"tools": "x"}, {"tools": [1, None, {}, {"function": {"name": ""}}, {"name": None}]},
    {"tools": [{"type": "function", "name": "f", "function": {"description": "no name in here"}}]},
    {"tools": [{"type": "function", "name": "f", "parameters": {"properties": {"a": {"enum": "abc"}}}}]},
    {"tools": [{"name": "f", "input_schema": {"properties": {"a": {"enum": [], "type": []}, "b": 1}}}]},
    {"tools": [{"name": "f", "input_schema": {"properties": {"c": {"type": 7}, "d": None}}}]},
    {"tools": [{"type": "function", "name": "f", "parameters": {"properties": [1]}}], "tool_choice": [1]},
    {"stream_options": [1]}, {"reasoning": None, "metadata": {"a": "b"}},
    {"extra": [1]}, {"extra": [None]}, {"extra": [{"role": "tool"}]},
    {"extra": [{"role": 1, "content": {"text": 2}}]},
    {"extra": [{"type": 5, "content": [1, None, {"type": "tool_result"}]}]},
], ids=lambda m: json.dumps(m)[:50])
def test_no_valid_json_makes_the_demo_fail(protocol, more):
    body = demo_request(protocol, *more.pop("extra", []), **more)
    whole = said_whole(protocol, demo_reply(protocol, body))
    assert whole.text or whole.calls
    assert said_streamed(protocol, demo_frames(protocol, body)) == whole


def test_the_demo_answers_a_request_without_any_item():
    for protocol, empty in ((CHAT, []), (MESSAGES, []), (RESPONSES, []), (RESPONSES, "")):
        reply = demo_reply(protocol, {"model": "demo", protocol.wants: empty})
        assert said_whole(protocol, reply).text == "You said: nothing"


def test_the_demo_answers_a_responses_input_that_is_a_string():
    body = {"model": "demo", "input": "Hello  there"}
    assert said_whole(RESPONSES, demo_reply(RESPONSES, body)).text == "You said: Hello  there"
    assert said_streamed(RESPONSES, demo_frames(RESPONSES, body)).text == "You said: Hello  there"


def test_a_demo_chat_reply_has_what_a_chat_completion_has():
    reply = demo_reply(CHAT, demo_request(CHAT, text="one two"))
    assert (reply["object"], reply["model"], reply["created"]) == ("chat.completion", "demo", 1700000000)
    assert reply["id"].startswith("chatcmpl-")
    assert reply["choices"][0]["index"] == 0 and reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_a_demo_chat_call_has_no_content_and_an_id():
    message = demo_reply(CHAT, demo_request(CHAT, tools=[weather_tool(CHAT)]))["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["type"] == "function" and message["tool_calls"][0]["id"]


def test_a_demo_chat_stream_is_one_completion_that_begins_with_its_role():
    frames = demo_frames(CHAT, demo_request(CHAT, stream=True))
    chunks = [json.loads(data) for _, data in frames[:-1]]
    assert {name for name, _ in frames} == {None}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert {c["id"] for c in chunks} == {demo_reply(CHAT, demo_request(CHAT))["id"]}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in c and c["usage"] for c in chunks)


def test_a_demo_chat_stream_ends_with_usage_when_asked():
    body = demo_request(CHAT, text="one two", stream=True, stream_options={"include_usage": True})
    *others, last = [json.loads(data) for _, data in demo_frames(CHAT, body)[:-1]]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert not any(c.get("usage") for c in others)


def test_the_id_and_the_name_of_a_demo_chat_call_come_once():
    body = demo_request(CHAT, tools=[weather_tool(CHAT)], stream=True)
    choices = [json.loads(data)["choices"][0] for _, data in demo_frames(CHAT, body)[:-1]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    begun = [("id" in c, "name" in c["function"]) for c in calls]
    assert begun == [(True, True)] + [(False, False)] * (len(calls) - 1)
    assert len(calls) > 2 and {c["index"] for c in calls} == {0}


def test_a_demo_message_has_what_a_message_has():
    reply = demo_reply(MESSAGES, demo_request(MESSAGES, text="one two"))
    assert (reply["type"], reply["role"], reply["model"]) == ("message", "assistant", "demo")
    assert reply["id"].startswith("msg_") and reply["stop_sequence"] is None
    assert (reply["usage"]["input_tokens"], reply["usage"]["output_tokens"]) == (2, 4)
    call = demo_reply(MESSAGES, demo_request(MESSAGES, tools=[weather_tool(MESSAGES)]))["content"][0]
    assert call["id"].startswith("toolu_")


@pytest.mark.parametrize("tools", [[], [weather_tool(MESSAGES)]], ids=["text", "tool"])
def test_the_events_of_a_demo_message_are_in_the_order_of_the_protocol(tools):
    frames = demo_frames(MESSAGES, demo_request(MESSAGES, tools=tools, stream=True))
    kinds = [name for name, _ in frames if name != "ping"]
    inner = len(kinds) - 5
    assert inner > 1
    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * inner,
                     "content_block_stop", "message_delta", "message_stop"]
    start = json.loads(frames[0][1])["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] == 3
    block = json.loads(frames[1][1])["content_block"]
    assert block.get("input") == {} if tools else block["text"] == ""


def test_a_demo_response_has_what_a_response_has():
    body = demo_request(RESPONSES, text="one two", instructions="Be brief", temperature=0.5)
    reply = demo_reply(RESPONSES, body)
    assert (reply["object"], reply["status"], reply["error"]) == ("response", "completed", None)
    assert reply["id"].startswith("resp_") and reply["created_at"] == 1700000000
    assert (reply["instructions"], reply["temperature"]) == ("Be brief", 0.5)
    assert [reply["usage"][f"{kind}_tokens"] for kind in ("input", "output", "total")] == [2, 4, 6]
    assert reply["output"][0]["status"] == "completed"


@pytest.mark.parametrize("tools, inner", [
    ([], ["response.content_part.added", "response.output_text.delta", "response.output_text.done",
          "response.content_part.done"]),
    ([weather_tool(RESPONSES)],
     ["response.function_call_arguments.delta", "response.function_call_arguments.done"]),
], ids=["text", "tool"])
def test_the_events_of_a_demo_response_are_numbered_and_in_order(tools, inner):
    body = demo_request(RESPONSES, tools=tools, stream=True)
    events = [json.loads(data) for _, data in demo_frames(RESPONSES, body)]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(e["type"] for e in events)]
    assert kinds == ["response.created", "response.in_progress", "response.output_item.added", *inner,
                     "response.output_item.done", "response.completed"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[-1]["response"] == demo_reply(RESPONSES, body)
    assert events[-2]["item"] == events[-1]["response"]["output"][0]
    done = next(e for e in events if e["type"].endswith(("text.done", "arguments.done")))
    assert done.get("text", done.get("arguments")) == "".join(
        e["delta"] for e in events if e["type"].endswith((".delta",)))


@pytest.mark.parametrize("text", ["", " ", "a", " a  b\n\nc ", "\t", "a\u00a0b", "漢字"])
def test_words_lose_nothing(text):
    assert "".join(proxai.words(text)) == text


# -- the demo as a program ---------------------------------------------------

@pytest.fixture(scope="session")
def demo_program(tmp_path_factory):
    """`python proxai.py --demo`, once it has printed all that it prints at the start."""
    program = Running(tmp_path_factory.mktemp("demo"), "--demo", "--port", "0", "--log-level", "debug")
    program.wait_line("Ctrl-C")
    yield program
    program.stop()


def test_the_demo_shows_a_request_that_went_through_the_proxy(demo_program):
    asked = demo_program.wait_line(r"asked: +(.+)$")[1]
    assert demo_program.wait_line(r"answered: (.+)$")[1] == f"You said: {asked}"
    assert demo_program.wait_line(r" end .*chat->demo_chat/chat")


def test_the_demo_tells_that_no_real_provider_is_behind_it(demo_program):
    assert demo_program.wait_line("embedded")


@EACH_PROTOCOL
def test_a_curl_line_of_the_demo_works_as_it_is(demo_program, protocol):
    printed = "\n".join(demo_program.lines)
    lines = [shlex.split(found) for found in re.findall(r"^curl (?:.*\\\n)*.*$", printed, re.M)]
    assert len(lines) == 3 and all(line[0] == "curl" for line in lines)
    line = next(found for found in lines for word in found if word.endswith(protocol.path))
    url = next(word for word in line if word.startswith("http"))
    assert url == f"http://127.0.0.1:{demo_program.port}{protocol.path}"
    body, header = line[line.index("-d") + 1], line[line.index("-H") + 1]
    reply = demo_program.post(protocol.path, body.encode(), header)
    assert (reply.status, reply.headers["content-type"], reply.broken) == (200, "text/event-stream", False)
    assert said_streamed(protocol, frames_of(reply.body)).text == "You said: Tell me a story"


@EACH_PROTOCOL
def test_the_demo_answers_each_protocol_whole(demo_program, protocol):
    reply = demo_program.post(protocol.path, demo_request(protocol, text="hi"))
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert said_whole(protocol, reply.json).text == "You said: hi"


@EACH_PROTOCOL
def test_the_demo_calls_a_tool_and_answers_after_its_result(demo_program, protocol):
    tools = [weather_tool(protocol)]
    reply = demo_program.post(protocol.path, demo_request(protocol, tools=tools, stream=True))
    (name, arguments), = said_streamed(protocol, frames_of(reply.body)).calls
    assert name == "get_weather" and fits(arguments, WEATHER_SCHEMA)
    body = demo_request(protocol, *RESULT_OF_A_TOOL[protocol.word], tools=tools, stream=True)
    reply = demo_program.post(protocol.path, body)
    assert said_streamed(protocol, frames_of(reply.body)).text == "The tool answered: 21 degrees"


@EACH_PROTOCOL
def test_an_error_of_the_demo_has_the_native_shape(demo_program, protocol):
    reply = demo_program.post(protocol.path, {"model": " "})
    assert reply.status == 400 and reply.json["error"]["type"] == "invalid_request_error"
    assert (reply.json.get("type") == "error") is (protocol is MESSAGES)


def test_the_demo_needs_no_configuration_and_leaves_none(tmp_path):
    (tmp_path / ".proxai").mkdir()
    (tmp_path / ".proxai" / "config.toml").write_text("this is not TOML", "utf-8")
    program = Running(tmp_path, "--demo", "--port", "0", "--log-level", "WARN", "--log-format", "JSON")
    program.wait_line("Ctrl-C")
    assert program.stop() == 0
    assert [p.name for p in tmp_path.rglob("*")] == [".proxai", "config.toml"]
    assert not [line for line in program.lines if '"fwd"' in line or " fwd " in line]



# ============================================================================
#  16  Command line
# ============================================================================

NO_TRACEBACK = "Traceback (most recent call last)"
TWO_PROVIDERS = """
[routing.default_provider_names]
openai_responses = " Main "
openai_chat_completions = "second"

[[routing.routes]]
name = "fast"
request_protocol = "openai_chat_completions"
match_kind = "exact"
model_pattern = "fast"
provider = "second"
upstream_model = "small-1"

[[routing.routes]]
name = "wide"
model_pattern = "gpt-*"
provider = "main"

[providers.Main]
protocol = "openai_responses"
base_url = "https://main.example.com/v1?x=1"
api_key = "sk-main-key"

[providers.second]
protocol = "openai_chat_completions"
base_url = "https://second.example.com/openai"
api_key = "sk-second-key"
proxy_url = "http://someone:pass-word@proxy.example.com:3128"
"""


def run_program(home: Path, *arguments: str, env: dict[str, str] | None = None) -> Any:
    """The program run to its end."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], cwd=home, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE * 3,
        env={**clean, "HOME": str(home), "USERPROFILE": str(home), **(env or {})})


def config_with(*flags: str, text: str = TWO_PROVIDERS) -> proxai.Config:
    """What a configuration becomes under `flags`."""
    args = proxai.command_line().parse_args(flags)
    return proxai.load_config(text, "x.toml", environ={},
                              overrides=lambda tables: proxai.flag_overrides(args, tables))


@pytest.fixture
def check(tmp_path, capsys):
    """Runs `check` on a configuration within this process; returns status, output and errors."""
    def run(text: str, *flags: str) -> tuple[int, str, str]:
        path = tmp_path / "check.toml"
        path.write_text(text, "utf-8")
        status = proxai.main(["check", "--config", str(path), *flags])
        return status, *capsys.readouterr()
    return run


# -- flags -------------------------------------------------------------------

@pytest.mark.parametrize("short, long", [("-V", "--version"), ("-h", "--help")])
def test_a_short_flag_is_the_long_one(short, long, capsys):
    said = []
    for flag in (short, long):
        with pytest.raises(SystemExit) as stopped:
            proxai.main([flag])
        assert stopped.value.code == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1] and said[0].err == "" and said[0].out


def test_version_is_told(tmp_path):
    done = run_program(tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"proxai {proxai.__version__}\n", "")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag(tmp_path):
    done = run_program(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--config", "--upstream", "--api-key", "--port", "--log-level", "--log-format",
                 "--route-override", "--capture-inbound-request", "--capture-provider-request",
                 "--capture-upstream-response", "--capture-outbound-response", "--demo", "--help", "-h",
                 "--version", "-V", "check"):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout), flag
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [
    ["--port", "65536"], ["--port", "-1"], ["--port", "x"], ["--port", ""], ["--port", "80.0"],
    ["--port", "\uff11"], ["--port", "0x50"], ["--port", "8_0"], ["--port"], ["--config"], ["--no-such-flag"],
    ["serve"], ["check", "check"],
    ["--confi", "x.toml"], ["--capture-inbound"], ["--log-l", "info"],
], ids=" ".join)
def test_a_usage_error_ends_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        proxai.main(["check", *arguments] if arguments[0].startswith("--") else arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage:" in err


def test_a_usage_error_of_the_program_is_told_on_stderr(tmp_path):
    done = run_program(tmp_path, "--port", "70000")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--port" in done.stderr and "70000" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_that_is_missing_is_named_with_the_reason(tmp_path):
    done = run_program(tmp_path, "--config", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ") and NO_TRACEBACK not in done.stderr
    assert str(tmp_path / "none.toml") in done.stderr and os.strerror(2) in done.stderr
    assert list(tmp_path.iterdir()) == []  # with --config no app directory is needed


@pytest.mark.parametrize("content, said", [
    (None, os.strerror(21)), (b"\xff\xfe[server]", "UTF-8"), (b"[server", "TOML"), (b"", "providers"),
], ids=["directory", "not-utf8", "not-toml", "empty"])
def test_a_config_file_that_cannot_be_used_ends_with_1(content, said, tmp_path, capsys):
    path = tmp_path / "config.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert proxai.main(["--config", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and str(path) in err and said in err


@pytest.mark.parametrize("flags, path, expected", [
    (["--port", "0"], "server.port", 0),
    (["--port", "65535"], "server.port", 65535),
    (["--log-level", "TRACE"], "logging.level", "trace"),
    (["--log-level", "Warn"], "logging.level", "warn"),
    (["--log-format", "JSON"], "logging.output_format", "json"),
    (["--log-format", "human"], "logging.output_format", "human"),
    (["--capture-inbound-request"], "capture.inbound_request_enabled", True),
    (["--capture-provider-request"], "capture.provider_request_enabled", True),
    (["--capture-upstream-response"], "capture.upstream_response_enabled", True),
    (["--capture-outbound-response"], "capture.outbound_response_enabled", True),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_flag_changes_its_setting_and_nothing_else(flags, path, expected):
    plain, changed = dict(flat(config_with())), dict(flat(config_with(*flags)))
    assert changed[path] == expected
    assert {k for k in plain if plain[k] != changed[k]} <= {path}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting in a configuration."""
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, tuple) else None
    if inner is None and hasattr(value, "__dataclass_fields__"):
        inner = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if inner is None:
        yield path, value
    for name, more in (inner or {}).items():
        yield from flat(more, f"{path}.{name}" if path else str(name))


def test_a_flag_wins_over_the_file_and_the_file_over_the_default():
    text = TWO_PROVIDERS + '[server]\nport = 9\n[logging]\nlevel = "error"\n'
    text += "[capture]\ninbound_request_enabled = true\n"
    assert config_with(text=text).server.port == 9
    config = config_with("--port", "10", "--log-level", "debug", text=text)
    assert (config.server.port, config.logging.level, config.logging.output_format) == (10, "debug", "human")
    assert config.capture.inbound_request_enabled is True  # a flag cannot switch a phase off


def test_upstream_and_api_key_change_the_default_responses_provider_only():
    config = config_with("--upstream", " http://other.example.com:8080/api?x=1 ", "--api-key", "  new-key  ")
    assert config.providers["main"].base_url == "http://other.example.com:8080/api/"
    assert config.providers["main"].api_key == "new-key"
    assert config.providers["second"] == config_with().providers["second"]


@pytest.mark.parametrize("flags", [
    ["--upstream", ""], ["--upstream", " \t"], ["--api-key", ""], ["--api-key", "  "]], ids=repr)
def test_a_blank_upstream_or_key_is_ignored(flags):
    assert config_with(*flags) == config_with()
    without = TWO_PROVIDERS.replace('openai_responses = " Main "', "")
    assert config_with(*flags, text=without) == config_with(text=without)


@pytest.mark.parametrize("source", ['api_key_env = "PROXAI_TEST_ABSENT"', 'api_key_file = "not/there"'])
def test_the_key_of_a_flag_takes_the_place_of_where_the_key_was_kept(source):
    text = TWO_PROVIDERS.replace('api_key = "sk-main-key"', source)
    assert config_with("--api-key", "new-key", text=text).providers["main"].api_key == "new-key"
    with pytest.raises(proxai.ConfigError):
        config_with(text=text)


@pytest.mark.parametrize("flags, said", [
    (["--log-level", "loud"], ["--log-level", "loud", "trace", "error"]),
    (["--log-level", ""], ["--log-level"]),
    (["--log-format", "xml"], ["--log-format", "xml", "human", "json"]),
    (["--upstream", "no url"], ["--upstream"]),
    (["--upstream", "ftp://h/"], ["--upstream"]),
    (["--upstream", "http://"], ["--upstream"]),
    (["--upstream", "http://[::1/"], ["--upstream"]),
    (["--api-key", "two words"], ["--api-key"]),
    (["--api-key", "caf\u00e9"], ["--api-key"]),
], ids=lambda v: " ".join(v)[:40])
def test_a_bad_value_of_a_flag_names_the_flag_and_the_value(flags, said, check):
    status, out, err = check(TWO_PROVIDERS, *flags)
    assert (status, out) == (1, "") and err.startswith("Error: ")
    assert [word for word in said if word not in err] == []
    if flags[0] == "--api-key":
        assert flags[1] not in err


@pytest.mark.parametrize("flags", [["--upstream", "http://h/"], ["--api-key", "k"]], ids=" ".join)
def test_flags_of_the_default_responses_provider_need_one(flags, check):
    text = TWO_PROVIDERS.replace('openai_responses = " Main "', "")
    status, out, err = check(text, *flags)
    assert (status, out) == (1, "")
    assert flags[0] in err and "routing.default_provider_names.openai_responses" in err


@pytest.mark.parametrize("text", [
    "providers = 1", "[providers]\nmain = 1\n[routing.default_provider_names]\nopenai_responses = 'main'",
    "routing = []",
    "server = 1\nlogging = [1]\ncapture = 'x'", "[[providers]]", "[routing]\nroutes = 5",
    "[routing]\nroutes = [1, {name = 'fast'}]",
], ids=repr)
def test_flags_on_a_file_of_the_wrong_shape_end_with_faults(text, check):
    plain = ["--port", "1", "--log-level", "info", "--capture-inbound-request"]
    status, out, err = check(text, *plain, "--upstream", "http://h/", "--api-key", "k",
                             "--route-override", "fast.provider=second")
    assert (status, out) == (1, "") and "Error: " in err
    status, out, err = check(text, *plain)
    assert (status, out) == (1, "") and "Error: " in err


@pytest.mark.parametrize("flags, said", [
    (["--log-level", "loud"], ["--log-level", "loud"]), (["--log-format", "xml"], ["--log-format", "xml"]),
], ids=" ".join)
def test_a_bad_value_of_a_flag_is_told_in_the_demo_too(flags, said, tmp_path):
    process = subprocess.Popen([sys.executable, str(PROGRAM), "--demo", "--port", "0", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the demo runs with a flag that means nothing")
    assert process.returncode == 1 and NO_TRACEBACK not in err
    assert [word for word in said if word not in err] == []


# -- route overrides ---------------------------------------------------------

@pytest.mark.parametrize("specs, expected", [
    (["fast.request_protocol=ANTHROPIC_Messages"], {"request_protocol": "anthropic_messages"}),
    (["fast.request_protocol="], {"request_protocol": None}),
    (["fast.match_kind=REGEX"], {"match_kind": "regex"}),
    (["fast.model_pattern=^a=b.c$"], {"model_pattern": "^a=b.c$"}),
    (["fast.model_pattern=MiniMax-*"], {"model_pattern": "MiniMax-*"}),
    (["fast.model_pattern="], {"model_pattern": ""}),
    (["fast.provider=main"], {"provider": "main"}),
    (["fast.provider=MAIN"], {"provider": "main"}),
    (["fast.upstream_model=org/model=1"], {"upstream_model": "org/model=1"}),
    (["fast.upstream_model="], {"upstream_model": None}),
    (["fast.upstream_model=  "], {"upstream_model": None}),
    ([" fast . upstream_model = big "], {"upstream_model": "big"}),
    (["fast.upstream_model=a", "fast.upstream_model=b"], {"upstream_model": "b"}),
    (["fast.provider=nobody", "fast.provider=main"], {"provider": "main"}),
    (["fast.upstream_model=", "fast.upstream_model=x"], {"upstream_model": "x"}),
    (["fast.request_protocol=anthropic_messages", "fast.match_kind=regex", "fast.model_pattern=^x-(.+)$",
      "fast.provider=main", "fast.upstream_model=y-$1"],
     {"request_protocol": "anthropic_messages", "match_kind": "regex", "model_pattern": "^x-(.+)$",
      "provider": "main", "upstream_model": "y-$1"}),
], ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_a_route_override_changes_the_field_of_the_named_route(specs, expected):
    config = config_with(*(word for spec in specs for word in ("--route-override", spec)))
    fast, wide = config.routing.routes
    plain, other = config_with().routing.routes
    assert wide == other and fast.name == "fast"
    for field in ("request_protocol", "match_kind", "model_pattern", "provider", "upstream_model"):
        assert getattr(fast, field) == expected.get(field, getattr(plain, field)), field


def test_route_overrides_of_several_routes_are_chained():
    specs = ["wide.upstream_model=w", "fast.upstream_model=f", "wide.provider=second"]
    config = config_with(*(f"--route-override={spec}" for spec in specs))
    assert [(r.name, r.provider, r.upstream_model) for r in config.routing.routes] == [
        ("fast", "second", "f"), ("wide", "second", "w")]


@pytest.mark.parametrize("spec, said", [
    ("fast.provider", ["ROUTE.FIELD=VALUE"]),
    ("fast=main", ["ROUTE.FIELD=VALUE"]),
    ("fast=main.provider", ["ROUTE.FIELD=VALUE"]),
    ("", ["ROUTE.FIELD=VALUE"]),
    ("=", ["ROUTE.FIELD=VALUE"]),
    (".provider=main", ["non-empty"]),
    ("  .provider=main", ["non-empty"]),
    ("fast.=main", ["non-empty"]),
    (".=", ["non-empty"]),
    ("nobody.provider=main", ["apply --route-override", "nobody"]),
    ("FAST.provider=main", ["apply --route-override", "FAST"]),
    ("fast.request_protocol=openai", ["openai", "anthropic_messages"]),
    ("fast.match_kind=fuzzy", ["fuzzy", "glob"]),
    ("fast.match_kind=", ["exact", "glob"]),
    ("fast.name=slow", ["name"]),
    ("fast.color=red", ["request_protocol", "match_kind", "model_pattern", "provider", "upstream_model"]),
    ("fast.Provider=main", ["Provider", "upstream_model"]),
    ("fast.a.provider=main", ["a.provider", "upstream_model"]),
    ("fast.provider=nobody", ["nobody"]),
    ("fast.provider=", ["provider"]),
    ("fast.match_kind=regex", []),
    ("wide.match_kind=regex", ["gpt-*"]),
], ids=repr)
def test_a_route_override_that_cannot_be_applied_is_quoted(spec, said, check):
    status, out, err = check(TWO_PROVIDERS, "--route-override", spec)
    if not said or spec == "wide.match_kind=regex":  # a glob may be a working regex too
        assert status == 0 and err == ""
        return
    assert (status, out) == (1, "") and err.startswith("Error: ")
    assert [word for word in ["--route-override", spec, *said] if word not in err] == []


def test_a_route_override_makes_a_pattern_that_does_not_work_a_fault_that_names_it(check):
    status, out, err = check(TWO_PROVIDERS, "--route-override", "fast.match_kind=regex",
                             "--route-override", "fast.model_pattern=a(b")
    assert (status, out) == (1, "") and "a(b" in err and "routing.routes[0].model_pattern" in err


def test_a_route_name_that_is_there_twice_cannot_be_overridden(check):
    text = TWO_PROVIDERS.replace('name = "wide"', 'name = " fast"')
    status, out, err = check(text, "--route-override", "fast.provider=main")
    assert (status, out) == (1, "") and "not unique" in err


# -- check -------------------------------------------------------------------

def test_check_prints_what_would_run(tmp_path):
    (tmp_path / "c.toml").write_text(TWO_PROVIDERS, "utf-8")
    done = run_program(tmp_path, "check", "--config", str(tmp_path / "c.toml"), "--port", "4242")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()

    def line_of(word: str, start: int = 0) -> str:
        return next(line for line in lines[start:] if line.strip().startswith(word))

    main, second = line_of("main"), line_of("second")
    assert "openai_responses" in main and "https://main.example.com/v1" in main and "x=1" not in main
    assert "https://second.example.com/openai/v1/chat/completions" in second
    assert "openai_chat_completions" in second and "proxy.example.com:3128" in second
    fast, wide = (next(i for i, line in enumerate(lines) if f" {word}" in line) for word in ("fast", "wide"))
    assert fast < wide
    assert all(word in lines[fast] for word in ("exact", "openai_chat_completions", "second", "small-1"))
    assert all(word in lines[wide] for word in ("glob", "gpt-*", "main"))
    assert "main" in line_of("openai_responses", wide)
    assert "second" in line_of("openai_chat_completions", wide)
    assert "none" in line_of("anthropic_messages", wide)
    assert "127.0.0.1" in done.stdout and "4242" in done.stdout and str(tmp_path / "c.toml") in done.stdout
    assert not re.search("sk-main-key|sk-second-key|pass-word|someone", done.stdout)
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]


def test_check_shows_the_model_of_a_route_override(check):
    status, out, _ = check(TWO_PROVIDERS, "--route-override", "wide.upstream_model=other-model")
    assert status == 0 and "other-model" in out


@pytest.mark.parametrize("guard", [None, *proxai.PROTOCOLS])
@pytest.mark.parametrize("provider", list(proxai.PROTOCOLS))
def test_check_tells_which_protocols_a_route_cannot_serve(provider, guard, check):
    def missing(name: str) -> bool:
        try:
            proxai.pair_for(proxai.PROTOCOLS[name], proxai.PROTOCOLS[provider])
        except proxai.SetupError:
            return True
        return False

    text = (f'[providers.a]\nprotocol = "{provider}"\nbase_url = "http://h"\napi_key = "k"\n'
            '[[routing.routes]]\nname = "claude"\nmodel_pattern = "claude*"\nprovider = "a"\n'
            + (f'request_protocol = "{guard}"\n' if guard else ""))
    status, out, _ = check(text)
    line = next(line for line in out.splitlines() if " claude" in line)
    names = [name for name in proxai.PROTOCOLS if guard in (None, name) and missing(name)]
    assert status == 0
    assert ("not translated" in line) is bool(names)
    assert not names or f"not for {' and '.join(names)}" in line


@pytest.mark.parametrize("key", ["replace-me", "your-api-key", "<key>"])
def test_check_tells_of_template_keys(key, check):
    status, out, _ = check(TWO_PROVIDERS.replace("sk-main-key", key))
    assert status == 0 and "providers.main.api_key" in out and "providers.second.api_key" not in out


def test_check_tells_that_captures_are_not_written_yet(check):
    noted = re.compile("note: .*capture")
    assert noted.search(check(TWO_PROVIDERS, "--capture-inbound-request")[1])
    assert not noted.search(check(TWO_PROVIDERS)[1])


def test_check_without_a_file_ends_with_1_and_creates_nothing(tmp_path):
    done = run_program(tmp_path, "check")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(tmp_path / ".proxai" / "config.toml") in done.stderr
    assert list(tmp_path.iterdir()) == []


FAULTY = """
unknown_key = 1
[server]
host = "0.0.0.0"
port = 65536
max_request_body_bytes = 0
max_concurrent_requests = true
prot = 1
[mcp]
host = "192.0.2.1"
[logging]
level = "INFO"
[tool_calls]
timeout_secs = 0
[routing.default_provider_names]
openai_responses = "nobody"
[[routing.routes]]
name = "r"
model_pattern = "a(b"
match_kind = "regex"
provider = "p"
[[routing.routes]]
name = "r"
model_pattern = "x"
provider = "nowhere"
[providers.p]
protocol = "openai"
base_url = "example.com"
api_key = " "
read_idle_timeout_secs = -1
[providers.q]
protocol = "anthropic_messages"
api_key = "sk-hidden-key"
api_key_env = "PROXAI_TEST_ABSENT"
"""
MANY_CLI_FAULTS = [
    "unknown_key", "server.host", "server.port", "server.max_request_body_bytes",
    "server.max_concurrent_requests", "server.prot", "mcp.host", "logging.level", "tool_calls.timeout_secs",
    "routing.default_provider_names.openai_responses", "routing.routes[0].model_pattern",
    "routing.routes[1].name", "routing.routes[1].provider", "providers.p.protocol", "providers.p.base_url",
    "providers.p.api_key", "providers.p.read_idle_timeout_secs", "providers.q.base_url",
    "providers.q.api_key"]


def test_check_lists_every_fault_at_once(tmp_path):
    (tmp_path / "c.toml").write_text(FAULTY, "utf-8")
    done = run_program(tmp_path, "check", "--config", str(tmp_path / "c.toml"), "--log-format", "xml")
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    for path in [*MANY_CLI_FAULTS, "logging.output_format"]:
        found = [line for line in errors if f" {path}: " in line]
        assert len(found) == 1, (path, done.stderr)
        assert str(tmp_path / "c.toml") in found[0]
    assert len(errors) == len(MANY_CLI_FAULTS) + 1
    assert "config.example.toml" in done.stderr and "regenerate defaults" in done.stderr
    assert "did you mean port" in done.stderr and "--log-format" in done.stderr
    assert "sk-hidden-key" not in done.stderr


def test_a_fault_in_a_provider_whose_name_has_capitals_is_told_once(check):
    status, _, err = check(TWO_PROVIDERS.replace('"sk-main-key"', '""'))
    assert status == 1 and err.count("Error: ") == 1


def a_route(pattern: str) -> str:
    """TWO_PROVIDERS with that regular expression."""
    route = f'match_kind = "regex"\nmodel_pattern = "{pattern}"\nprovider = "main"\n'
    return f"{TWO_PROVIDERS}[[routing.routes]]\n{route}"


@pytest.mark.parametrize("text, env, said", [
    (a_route("a{4294967296}"), {}, "routing.routes[2].model_pattern"),
    (a_route("(" * 5000 + ")" * 5000), {}, "routing.routes[2].model_pattern"),
    (f"[server]\nport = {'1' * 5000}\n{TWO_PROVIDERS}", {}, "not valid TOML"),
    (TWO_PROVIDERS, {"HTTPS_PROXY": "socks5://u:s3cr3t@p.test:1"}, "HTTPS_PROXY"),
    (TWO_PROVIDERS, {"https_proxy": "http://u:s3cr3t@p.test/path"}, "HTTPS_PROXY"),
    (TWO_PROVIDERS, {"HTTPS_PROXY": "http://u:s3cr3t/x@p.test:1"}, "HTTPS_PROXY"),
    (TWO_PROVIDERS, {"HTTPS_PROXY": "http://u@p.test:s3cr3t"}, "HTTPS_PROXY"),
], ids=["repetition", "parentheses", "digits", "socks proxy", "proxy with a path", "proxy with an odd port",
        "proxy without a port"])
@pytest.mark.parametrize("command", [["check"], ["--port", "0"]], ids=["check", "start"])
def test_what_no_reader_takes_is_one_fault(command, text, env, said, tmp_path):
    (tmp_path / "c.toml").write_text(text, "utf-8")
    done = run_program(tmp_path, *command, "--config", "c.toml", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    fault, *rest = [line for line in done.stderr.splitlines() if not line.startswith("Hint: ")]
    assert fault.startswith("Error: ") and said in fault and rest == []
    assert "s3cr3t" not in fault


@pytest.mark.parametrize("old, new", [
    ('api_key = "sk-main-key"', 'api_key = "s3cr3t with blanks"'),
    ('api_key = "sk-main-key"', 'api_key = ["s3cr3t"]'),
    ('api_key = "sk-main-key"', 'api_key = {key = "s3cr3t"}'),
    ('api_key = "sk-main-key"', 'api_key = "s3cr3t'),
    ('api_key = "sk-main-key"', 'api_key = s3cr3t'),
    ('api_key = "sk-main-key"', 'api_kye = "s3cr3t"'),
    ('api_key = "sk-main-key"', 'api_key = "s3cr3t"\napi_key_env = "X"'),
    ('[providers.Main]', '[server]\napi_keys = "s3cr3t"\n[providers.Main]'),
    ('[providers.Main]', '[server]\napi_keys = ["s3cr3t s3cr3t"]\n[providers.Main]'),
    ('[providers.Main]', '[server]\napi_keys = [["s3cr3t"]]\n[providers.Main]'),
    ("https://main.example.com", "https://user:s3cr3t@main.example.com"),
    ("https://main.example.com", "https://user:s3cr3t/x@main.example.com"),
    ("https://main.example.com", "https://user:s3cr3t@main.example.com:odd"),
    ("http://someone:pass-word@", "htp://someone:s3cr3t@"),
    ("http://someone:pass-word@proxy.example.com:3128", "http://someone:s3cr3t@proxy.example.com:3128/path"),
], ids=lambda v: v[:48])
def test_check_never_shows_a_secret(old, new, check):
    assert old in TWO_PROVIDERS
    status, out, err = check(TWO_PROVIDERS.replace(old, new))
    assert status == 1 and out == "" and "Error: " in err
    assert "s3cr3t" not in err


@pytest.mark.parametrize("flags", [
    ["--api-key", "s3cr3t s3cr3t"], ["--upstream", "http://user:s3cr3t@h/"]], ids=repr)
def test_a_fault_in_a_flag_never_shows_a_secret(flags, check):
    status, out, err = check(TWO_PROVIDERS, *flags)
    assert status == 1 and flags[0] in err and "s3cr3t" not in out + err


# -- running -----------------------------------------------------------------

@pytest.fixture(scope="session")
def flagged(tmp_path_factory, upstream):
    """A program whose flags contradict its file in everything."""
    text = TWO_PROVIDERS.replace('api_key = "sk-main-key"', 'api_key_env = "PROXAI_TEST_ABSENT"')
    text = text.replace("https://second.example.com/openai", upstream.url).replace(
        'proxy_url = "http://someone:pass-word@proxy.example.com:3128"', "")
    text += f'[server]\nport = {upstream.port}\n[logging]\nlevel = "error"\n'
    program = Running(
        tmp_path_factory.mktemp("flagged"), "--upstream", f"{upstream.url}/base/", "--api-key", " flag-key ",
        "--log-level", "INFO", "--log-format", "Json", "--capture-inbound-request",
        "--route-override", "fast.model_pattern=quick-*", "--route-override", "fast.match_kind=glob",
        "--route-override", "fast.upstream_model=", config=text)
    yield program
    program.stop()


def test_the_flags_win_in_the_running_program(flagged, upstream, model):
    upstream.on(model, answer_json({"id": "r"}))
    assert flagged.post("/v1/responses", body_for(RESPONSES, model)).status == 200
    got, = upstream.got(model)
    assert (got.target, got.header("authorization")) == ("/base/v1/responses", "Bearer flag-key")
    name = f"quick-{model}"
    upstream.on(name, answer_json({"id": "c"}))
    reply = flagged.post("/v1/chat/completions", body_for(CHAT, name))
    assert reply.status == 200
    got, = upstream.got(name)
    assert (got.target, got.header("authorization")) == ("/v1/chat/completions", "Bearer sk-second-key")
    events = flagged.events(reply.headers["x-proxai-request-id"])
    assert [e["event"] for e in events] == ["fwd", "hdr", "end"]  # info, so no recv
    assert events[0]["route_name"] == "fast"
    assert any("capture" in line and "note" in line for line in flagged.lines)


def banner_of(program: Running) -> dict[str, list[str]]:
    """The lines of the banner: label -> values."""
    start = next(i for i, line in enumerate(program.lines) if line.startswith("ProxAI"))
    rows: dict[str, list[str]] = {}
    for line in itertools.takewhile(lambda line: line.startswith("  "), program.lines[start + 1:]):
        if line.startswith("    "):  # goes on with what the line above tells
            value = line.strip()
        else:
            label, _, value = line.strip().partition(": ")
        rows.setdefault(label, []).append(value)
    return rows


def test_the_banner_tells_what_runs_and_shows_no_key(flagged):
    banner = "\n".join(f"{label}: {value}" for label, rows in banner_of(flagged).items() for value in rows)
    config = next(line for line in banner.splitlines() if line.startswith("config: "))
    assert config.endswith("config.toml") and f"http://127.0.0.1:{flagged.port}" in banner
    for said in ("main", "second", "openai_responses", "openai_chat_completions", "anthropic_messages",
                 "52428800", "64", "120", "text", "info", "json"):
        assert re.search(rf"(?i)\b{said}\b", banner), said
    assert not re.search("flag-key|sk-second-key", "\n".join(flagged.lines))


def test_the_banner_has_the_lines_of_the_contract(flagged):
    expected = {
        "listen": r"http://127\.0\.0\.1:\d+", "max_request_body_bytes": "52428800",
        "max_concurrent_requests": "64", "default_provider.responses": "main",
        "default_provider.chat": "second", "default_provider.anthropic": ".*",
        "default_upstream": r"http://127\.0\.0\.1:\d+/base",
        "app_dir": r".*\.proxai", "config": r".*config\.toml", "config_example": r".*config\.example\.toml",
        "tool_aliases": ".*rg=grep.*", "request_hints": ".*pck.*", "log_level": "info",
        "log_format": "(?i)json",
        "log_use_color": "true|false", "error_response_format": "(?i)text", "route_count": "2",
        "read_idle_timeout_secs": "120", "tool_calls.timeout_secs": "120",
        "capture.inbound_request_enabled": "true", "capture.provider_request_enabled": "false",
        "capture.upstream_response_enabled": "false", "capture.outbound_response_enabled": "false",
        "capture": ".+"}
    rows = {label: "  ".join(values) for label, values in banner_of(flagged).items()}
    assert [label for label in expected if label not in rows] == []
    wrong = [label for label, value in rows.items() if not re.fullmatch(expected.get(label, ".*"), value)]
    assert wrong == []
    assert [label for label in rows if label in expected] == list(expected)


@pytest.mark.parametrize("host, address", [
    ("127.0.0.1", "http://127.0.0.1:4242"), ("::1", "http://[::1]:4242")])
def test_the_banner_has_an_address_that_can_be_opened(host, address):
    config = config_with(text=f'{TWO_PROVIDERS}[server]\nhost = "{host}"\n')
    lines = proxai.banner(config, 4242, "x.toml", ["one", "two"]).splitlines()
    assert lines[0].startswith("ProxAI") and lines[1] == f"  listen: {address}"
    assert [line for line in lines if line.startswith("  note: ")] == ["  note: one", "  note: two"]


def test_every_log_line_is_json_in_json_mode(flagged, upstream, model):
    upstream.on(model, answer_json({"error": {"message": "no\nno \u2028 \x1b[31m"}}, 500))
    flagged.post("/v1/responses", body_for(RESPONSES, model))
    stream = f"s-{model}"
    upstream.on(stream, answer_stream(b'data: {"type":"response.created"}\n\n'))
    flagged.post("/v1/responses", body_for(RESPONSES, stream, stream=True))
    flagged.post("/nope", {})
    flagged.talk(b"NOT HTTP\r\n\r\n")
    reply = flagged.post("/v1/responses", b"[")
    flagged.events(reply.headers["x-proxai-request-id"])
    start = next(i for i, line in enumerate(flagged.lines) if line.startswith("ProxAI"))
    rest = itertools.dropwhile(lambda line: line.startswith("  "), flagged.lines[start + 1:])
    lines = [json.loads(line) for line in rest if line]
    assert {"request-failed", "hdr-error", "closed"} <= {line["event"] for line in lines}
    for line in lines:
        assert line["log_schema"] == "proxai.v1" and {"level", "event", "ts"} <= line.keys()


def test_a_traceback_and_dropped_lines_are_json_in_json_mode():
    stream = io.StringIO()
    writer = proxai.LineWriter(stream, proxai.LoggingConfig(output_format="json"), {})
    try:
        raise RuntimeError("a\nb")
    except RuntimeError:
        writer.emit(logging.LogRecord("proxai", logging.ERROR, "x.py", 1, "it failed", (), sys.exc_info()))
    writer.dropped = 3
    writer.emit(logging.LogRecord("asyncio", logging.WARNING, "x.py", 1, "two\nlines", (), None))
    writer.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert isinstance(json.loads(line), dict)
    assert "RuntimeError" in stream.getvalue() and "3" in stream.getvalue()


@pytest.mark.parametrize("block", ["home is a file", "directory is a file", "config is a directory"])
def test_an_app_directory_that_cannot_be_made_is_named(block, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    if block == "home is a file":
        home.write_text("x", "utf-8")
    elif block == "directory is a file":
        home.mkdir()
        (home / ".proxai").write_text("x", "utf-8")
    else:
        (home / ".proxai" / "config.toml").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert proxai.main(["--port", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and str(home / ".proxai") in err


def test_what_cannot_be_printed_is_printed_as_escapes(tmp_path):
    text = TWO_PROVIDERS.replace('"second"', '"gr\u00f6\u00dfe"')
    text = text.replace("[providers.second]", '[providers."gr\u00f6\u00dfe"]')
    (tmp_path / "\u6f22.toml").write_text(text, "utf-8")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_program(tmp_path, "check", "--config", "\u6f22.toml", env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout and "\\u6f22" in done.stdout
    done = run_program(tmp_path, "check", "--config", "\u4e2d.toml", env=ascii_only)
    assert (done.returncode, done.stdout) == (1, "")
    assert "\\u4e2d" in done.stderr and NO_TRACEBACK not in done.stderr


def test_the_first_run_makes_the_app_directory_and_runs(tmp_path):
    program = Running(tmp_path, "--port", "0")
    home = tmp_path / ".proxai"
    assert sorted(p.name for p in home.iterdir()) == [
        "captures", "config.example.toml", "config.toml", "diagnostics", "logs"]
    assert (home / "config.toml").read_text("utf-8") == (home / "config.example.toml").read_text("utf-8")
    reply = program.post("/v1/responses", body_for(RESPONSES, "x"))
    assert program.stop() == 0
    banner = banner_of(program)
    assert str(home / "config.toml") in banner["config"][0]
    assert any(str(home / "config.toml") in note and "created" in note for note in banner["note"])
    assert reply.status == 500 and reply.headers["x-should-retry"] == "false"
    assert "providers.openai.api_key" in reply.json["error"]["message"]

    (home / "config.example.toml").write_text("# mine", "utf-8")
    again = Running(tmp_path, "--port", "0")
    assert again.stop() == 0
    assert not any("created" in note for note in banner_of(again).get("note", []))
    assert (home / "config.example.toml").read_text("utf-8") == "# mine"


@pytest.mark.parametrize("arguments", [["--config", "c.toml"], ["--demo"]], ids=" ".join)
def test_a_port_in_use_ends_the_start_and_names_the_address(arguments, tmp_path, upstream):
    (tmp_path / "c.toml").write_text(TWO_PROVIDERS, "utf-8")
    done = run_program(tmp_path, *arguments, "--port", str(upstream.port))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"127.0.0.1:{upstream.port}" in done.stderr and done.stderr.startswith("Error: ")
    assert NO_TRACEBACK not in done.stderr


def test_an_address_that_is_not_ours_ends_the_start_and_is_named(tmp_path):
    text = TWO_PROVIDERS + '[server]\nhost = "192.0.2.1"\nallow_unauthenticated = true\n'
    (tmp_path / "c.toml").write_text(text, "utf-8")
    done = run_program(tmp_path, "--config", "c.toml", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "192.0.2.1" in done.stderr and NO_TRACEBACK not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_program_with_0(number, tmp_path):
    program = Running(tmp_path, config=TWO_PROVIDERS)
    with program.connect():  # an idle client does not hold it up
        program.process.send_signal(getattr(signal, number))
        assert program.process.wait(PATIENCE) == 0
    assert program.stop() == 0
    assert NO_TRACEBACK not in "\n".join(program.lines)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_demo_with_0(number, tmp_path):
    program = Running(tmp_path, "--demo", "--port", "0")
    program.process.send_signal(getattr(signal, number))  # perhaps in the middle of its own request
    assert program.process.wait(PATIENCE) == 0
    assert program.stop() == 0
    assert NO_TRACEBACK not in "\n".join(program.lines)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status after SIGTERM, and what was on stderr."""
    process.terminate()
    try:
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the program does not end")
    return process.returncode, err.decode()


def answers(port: int, count: int) -> None:
    """Have `count` requests answered, and logged in more bytes than a pipe holds if there are many."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n" * count)
        data, got = b"", 0
        while got < count:
            more = sock.recv(1 << 20)
            assert more
            data += more
            got = data.count(b"HTTP/1.1 404")


@pytest.mark.skipif(os.name == "nt", reason="pipes and descriptors of POSIX")
@pytest.mark.parametrize("reader", ["goes away", "does not read"])
def test_output_that_nobody_takes_holds_up_neither_requests_nor_the_end(reader, tmp_path):
    (tmp_path / "c.toml").write_text(TWO_PROVIDERS, "utf-8")
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "--config", "c.toml", "--port", "0", "--log-level", "debug",
         "--log-format", "json"], cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    try:
        said = b""
        while not (found := re.search(rb"listen: http://127\.0\.0\.1:(\d+)\n", said)):
            more = os.read(ours, 65536)
            assert more
            said += more
        answers(int(found[1]), 1)
        if reader == "goes away":
            os.close(ours)
        answers(int(found[1]), 400)
        assert ended(process) == (0, "")
    finally:
        process.kill()
        process.communicate()
        if reader != "goes away":
            os.close(ours)


@pytest.mark.skipif(os.name == "nt", reason="pipes and descriptors of POSIX")
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_the_start_without_an_output_needs_no_traceback(redirection, tmp_path):
    if redirection == ">/dev/full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "c.toml").write_text(TWO_PROVIDERS, "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = shlex.join([sys.executable, str(PROGRAM), "--config", "c.toml", "--port", str(port)])
    process = subprocess.Popen(["sh", "-c", f"exec {command} {redirection}"], cwd=tmp_path,
                               stderr=subprocess.PIPE)
    try:
        deadline, served = time.monotonic() + PATIENCE, False
        while not served and process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, AssertionError):
                answers(port, 3)
                served = True
            time.sleep(0.02)
        status, err = ended(process)
        assert NO_TRACEBACK not in err
        if redirection == ">&-":
            assert (served, status, err) == (True, 0, "")
    finally:
        process.kill()
        process.communicate()


IMPORTER = """
import asyncio, gc, json, logging, os, signal, sys, threading, warnings

def state():
    return {
        "threads": threading.active_count(), "cwd": os.listdir("."), "environ": sorted(os.environ.items()),
        "gc": [gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()],
        "handlers": [len(logging.getLogger(n).handlers) for n in ("", "proxai", "asyncio")],
        "levels": [logging.getLevelName(5), logging.getLogger("proxai").level],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "streams": [str(sys.stdout), str(sys.stderr), str(sys.excepthook)],
        "policy": str(type(asyncio.get_event_loop_policy()))}

warnings.simplefilter("ignore")
before = state()
import proxai
after = state()
print(json.dumps([[k, str(before[k]), str(after[k])] for k in before if before[k] != after[k]]))
print(json.dumps([name for name in proxai.__all__ if not hasattr(proxai, name)]))
"""


def test_importing_has_no_side_effects(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", IMPORTER], cwd=tmp_path, capture_output=True, text=True,
                          timeout=PATIENCE * 3, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[]\n[]\n"
    assert list(tmp_path.iterdir()) == []



# ============================================================================
#  Official SDKs
# ============================================================================

# One program between the SDKs and two providers: the demo, and the scripted one.

SDK_KEY = "client-key-1"


@pytest.fixture(scope="session")
def demo_provider():
    """The port of a demo provider within this process, in a thread of its own."""
    ready: list[Any] = []
    there = threading.Event()

    async def run() -> None:
        demo = proxai.Demo(word_secs=0)
        server = proxai.Server(proxai.ServerConfig(), demo.serve, demo.refuse)
        stop = asyncio.Event()
        ready.extend([await server.listen("127.0.0.1", 0), asyncio.get_running_loop(), stop])
        there.set()
        await stop.wait()
        await server.drain(1.0, asyncio.Event())

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert there.wait(PATIENCE)
    port, loop, stop = ready
    yield port
    loop.call_soon_threadsafe(stop.set)
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def sdk_program(programs, upstream, demo_provider):
    """The program that all SDK tests share: model `demo` goes to the demo provider, others to the script."""
    more = []
    for name, p in proxai.PROTOCOLS.items():
        for model, url, key in (("demo", f"http://127.0.0.1:{demo_provider}", "demo-key"),
                                ("unset", "http://127.0.0.1:9", "replace-me")):
            more += ["[[routing.routes]]", f'model_pattern = "{model}"', f'request_protocol = "{name}"',
                     f'provider = "{model}_{p.word}"',
                     f"[providers.{model}_{p.word}]", f'protocol = "{name}"', f'base_url = "{url}"',
                     f'api_key = "{key}"']
    more += ["[error_responses]", 'format = "native"', "[tool_calls]", "timeout_secs = 0.4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in [n for n in os.environ if n.startswith(("OPENAI_", "ANTHROPIC_"))]:
            patch.delenv(name)
        yield programs(config_for(upstream.url, *more, server=f'api_keys = ["another-key", "{SDK_KEY}"]'))


class Sdk(NamedTuple):
    """An official package, and a client of it that talks to the shared program."""

    package: Any
    client: Any
    where: dict[str, Any]  # what makes another client like it


@pytest.fixture(scope="session")
def oai(sdk_program):
    """The openai package."""
    package = pytest.importorskip("openai")
    where = {"base_url": f"http://127.0.0.1:{sdk_program.port}/v1", "api_key": SDK_KEY, "max_retries": 0,
             "timeout": PATIENCE}
    with package.OpenAI(**where) as client:
        yield Sdk(package, client, where)


@pytest.fixture(scope="session")
def ant(sdk_program):
    """The anthropic package."""
    package = pytest.importorskip("anthropic")
    where = {"base_url": f"http://127.0.0.1:{sdk_program.port}", "api_key": SDK_KEY, "max_retries": 0,
             "timeout": PATIENCE}
    with package.Anthropic(**where) as client:
        yield Sdk(package, client, where)


ASKED = [{"role": "user", "content": "Hello, you two"}]
ANSWERED = "You said: Hello, you two"
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"],
         "additionalProperties": False}


def test_openai_chat_create(oai):
    done = oai.client.chat.completions.create(model="demo", messages=ASKED)
    assert done.choices[0].message.content == ANSWERED
    assert (done.choices[0].finish_reason, done.usage.total_tokens) == ("stop", 8)


def test_openai_chat_stream(oai):
    chunks = list(oai.client.chat.completions.create(
        model="demo", messages=ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWERED
    assert chunks[-1].usage.total_tokens == 8


def test_openai_chat_stream_helper(oai):
    with oai.client.chat.completions.stream(model="demo", messages=ASKED) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        done = stream.get_final_completion()
    assert text == done.choices[0].message.content == ANSWERED


def test_openai_responses_create(oai):
    done = oai.client.responses.create(model="demo", input="Hello, you two", instructions="Be brief")
    assert (done.output_text, done.status, done.instructions) == (ANSWERED, "completed", "Be brief")
    assert done.usage.total_tokens == 8


def test_openai_responses_stream(oai):
    events = list(oai.client.responses.create(model="demo", input=ASKED, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWERED


def test_openai_responses_stream_helper(oai):
    with oai.client.responses.stream(model="demo", input="Hello, you two") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        done = stream.get_final_response()
    assert text == done.output_text == ANSWERED


def test_anthropic_messages_create(ant):
    done = ant.client.messages.create(model="demo", max_tokens=64, messages=ASKED)
    assert (done.content[0].text, done.stop_reason) == (ANSWERED, "end_turn")
    assert (done.usage.input_tokens, done.usage.output_tokens) == (3, 5)


def test_anthropic_messages_stream(ant):
    events = list(ant.client.messages.create(model="demo", max_tokens=64, messages=ASKED, stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == ANSWERED


def test_anthropic_messages_stream_helper(ant):
    with ant.client.messages.stream(model="demo", max_tokens=64, messages=ASKED) as stream:
        text = "".join(stream.text_stream)
        done = stream.get_final_message()
    assert text == done.content[0].text == ANSWERED
    assert (done.stop_reason, done.usage.output_tokens) == ("end_turn", 5)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_openai_chat_tool_loop(oai, streamed):
    request = {"model": "demo", "messages": list(ASKED), "tools": [
        {"type": "function", "function": {"name": "get_weather", "parameters": PLACE, "strict": True}}]}
    for _ in range(2):
        if streamed:
            with oai.client.chat.completions.stream(**request) as stream:
                message = stream.get_final_completion().choices[0].message
        else:
            message = oai.client.chat.completions.create(**request).choices[0].message
        if not message.tool_calls:
            break
        call, = message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"place": "demo"})
        request["messages"] += [message.model_dump(include={"role", "content", "tool_calls"}),
                                {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    assert message.content == "The tool answered: 21 degrees"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_openai_responses_tool_loop(oai, streamed):
    request = {"model": "demo", "input": list(ASKED), "tools": [
        {"type": "function", "name": "get_weather", "parameters": PLACE, "strict": True}]}
    for _ in range(2):
        if streamed:
            with oai.client.responses.stream(**request) as stream:
                done = stream.get_final_response()
        else:
            done = oai.client.responses.create(**request)
        calls = [item for item in done.output if item.type == "function_call"]
        if not calls:
            break
        call, = calls
        assert (call.name, call.status) == ("get_weather", "completed")
        assert json.loads(call.arguments) == {"place": "demo"}
        request["input"] += [
            call.model_dump(include={"type", "id", "call_id", "name", "arguments", "status"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    assert done.output_text == "The tool answered: 21 degrees"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_anthropic_tool_loop(ant, streamed):
    request = {"model": "demo", "max_tokens": 64, "messages": list(ASKED),
               "tools": [{"name": "get_weather", "input_schema": PLACE}]}
    for _ in range(2):
        if streamed:
            with ant.client.messages.stream(**request) as stream:
                done = stream.get_final_message()
        else:
            done = ant.client.messages.create(**request)
        if done.stop_reason != "tool_use":
            break
        call, = done.content
        assert (call.name, call.input) == ("get_weather", {"place": "demo"})
        request["messages"] += [{"role": "assistant", "content": done.content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}]}]
    assert done.content[0].text == "The tool answered: 21 degrees"


def test_the_tool_runner_of_anthropic(ant):
    if not hasattr(ant.package, "beta_tool"):
        pytest.skip("this version has no tool runner")

    @ant.package.beta_tool
    def get_weather(place: str) -> str:
        """The weather at a place."""
        return f"21 degrees in {place}"

    runner = ant.client.beta.messages.tool_runner(
        model="demo", max_tokens=64, messages=ASKED, tools=[get_weather])
    assert runner.until_done().content[0].text == "The tool answered: 21 degrees in demo"


def test_openai_async_clients_work_side_by_side(oai):
    async def chat(client):
        done = await client.chat.completions.create(model="demo", messages=ASKED)
        return done.choices[0].message.content

    async def chat_stream(client):
        stream = await client.chat.completions.create(model="demo", messages=ASKED, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def responses(client):
        return (await client.responses.create(model="demo", input=ASKED)).output_text

    async def responses_stream(client):
        async with client.responses.stream(model="demo", input=ASKED) as stream:
            return (await stream.get_final_response()).output_text

    async def everything():
        async with oai.package.AsyncOpenAI(**oai.where) as client:
            ways = (chat, chat_stream, responses, responses_stream) * 4
            return await asyncio.gather(*(way(client) for way in ways))

    assert asyncio.run(everything()) == [ANSWERED] * 16


def test_anthropic_async_clients_work_side_by_side(ant):
    async def create(client):
        return (await client.messages.create(model="demo", max_tokens=64, messages=ASKED)).content[0].text

    async def stream(client):
        async with client.messages.stream(model="demo", max_tokens=64, messages=ASKED) as events:
            return (await events.get_final_message()).content[0].text

    async def everything():
        async with ant.package.AsyncAnthropic(**ant.where) as client:
            return await asyncio.gather(*(way(client) for way in (create, stream) * 6))

    assert asyncio.run(everything()) == [ANSWERED] * 12


# -- errors ------------------------------------------------------------------

OPENAI_WAYS = {
    "chat": lambda client, model: client.chat.completions.create(model=model, messages=ASKED),
    "responses": lambda client, model: client.responses.create(model=model, input=ASKED),
}


def anthropic_way(client, model):
    """A request of the anthropic package."""
    return client.messages.create(model=model, max_tokens=64, messages=ASKED)


@pytest.mark.parametrize("way", OPENAI_WAYS)
@pytest.mark.parametrize("status, kind, code, name", [
    (400, "invalid_request_error", "unsupported_value", "BadRequestError"),
    (401, "invalid_request_error", "invalid_api_key", "AuthenticationError"),
    (403, "permission_error", None, "PermissionDeniedError"),
    (404, "invalid_request_error", "model_not_found", "NotFoundError"),
    (409, "invalid_request_error", None, "ConflictError"),
    (422, "invalid_request_error", None, "UnprocessableEntityError"),
    (429, "tokens", "rate_limit_exceeded", "RateLimitError"),
    (500, "server_error", None, "InternalServerError"),
    (503, "server_error", "server_is_overloaded", "InternalServerError"),
    (529, "overloaded_error", None, "InternalServerError"),
])
def test_an_error_of_the_provider_reaches_openai(oai, upstream, model, way, status, kind, code, name):
    error = {"message": f"went wrong {status}", "type": kind, "param": "input[0]", "code": code}
    upstream.on(model, answer_json({"error": error}, status, "x-request-id: req_1", "retry-after: 7"))
    with pytest.raises(getattr(oai.package, name)) as raised:
        OPENAI_WAYS[way](oai.client, model)
    found = raised.value
    assert type(found) is getattr(oai.package, name) and found.status_code == status
    assert (found.type, found.param, found.code) == (kind, "input[0]", code)
    assert f"went wrong {status}" in found.message
    assert found.request_id == "req_1" and found.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("status, kind, name", [
    (400, "invalid_request_error", "BadRequestError"),
    (401, "authentication_error", "AuthenticationError"),
    (403, "permission_error", "PermissionDeniedError"),
    (404, "not_found_error", "NotFoundError"),
    (413, "request_too_large", "APIStatusError"),
    (429, "rate_limit_error", "RateLimitError"),
    (500, "api_error", "InternalServerError"),
    (504, "timeout_error", "InternalServerError"),
    (529, "overloaded_error", "InternalServerError"),
])
def test_an_error_of_the_provider_reaches_anthropic(ant, upstream, model, status, kind, name):
    error = {"type": kind, "message": f"went wrong {status}"}
    body = {"type": "error", "error": error, "request_id": "req_2"}
    upstream.on(model, answer_json(body, status, "request-id: req_2", "retry-after: 7"))
    with pytest.raises(getattr(ant.package, name)) as raised:
        anthropic_way(ant.client, model)
    found = raised.value
    assert (found.status_code, found.body, found.request_id) == (status, body, "req_2")
    assert f"went wrong {status}" in found.message and found.response.headers["retry-after"] == "7"


HTML = b"<html><body>Bad gateway</body></html>"


def html(status: int) -> Script:
    """A script: a page for people."""
    return answer(status, HTML, "content-type: text/html")


PLAIN_429 = answer(429, b"slow down", "content-type: text/plain")


@pytest.mark.parametrize("way", OPENAI_WAYS)
@pytest.mark.parametrize("script, status, name, said", [
    (PLAIN_429, 429, "RateLimitError", "slow down"),
    (html(502), 502, "InternalServerError", "Bad gateway"),
    (answer(529, b""), 529, "InternalServerError", "529"),
    (html(200), 502, "InternalServerError", "JSON"),
    (answer(302, b"", "location: http://127.0.0.1:9/"), 302, "APIStatusError", "302"),
    (lambda peer, request: peer.close(), 502, "InternalServerError", "upstream request failed"),
], ids=["plain-429", "html-502", "empty-529", "html-200", "redirect", "closed"])
def test_a_failure_without_a_native_body_gets_one_for_openai(
        oai, upstream, model, way, script, status, name, said):
    upstream.on(model, script)
    with pytest.raises(getattr(oai.package, name)) as raised:
        OPENAI_WAYS[way](oai.client, model)
    found = raised.value
    assert found.status_code == status and found.type and said in found.message
    assert found.body["status"] == status


@pytest.mark.parametrize("script, status, kind, name, said", [
    (PLAIN_429, 429, "rate_limit_error", "RateLimitError", "slow down"),
    (html(502), 502, "api_error", "InternalServerError", "Bad gateway"),
    (html(503), 503, "overloaded_error", "InternalServerError", "Bad gateway"),
    (answer(529, b""), 529, "overloaded_error", "InternalServerError", "529"),
    (html(200), 502, "api_error", "InternalServerError", "JSON"),
    (lambda peer, request: peer.close(), 502, "api_error", "InternalServerError", "upstream request failed"),
], ids=["plain-429", "html-502", "html-503", "empty-529", "html-200", "closed"])
def test_a_failure_without_a_native_body_gets_one_for_anthropic(
        ant, upstream, model, script, status, kind, name, said):
    upstream.on(model, script)
    with pytest.raises(getattr(ant.package, name)) as raised:
        anthropic_way(ant.client, model)
    found = raised.value
    assert (found.status_code, found.body["type"], found.body["error"]["type"]) == (status, "error", kind)
    assert said in found.body["error"]["message"]


@pytest.mark.parametrize("key", ["wrong-key", SDK_KEY + "x", SDK_KEY[:-1], SDK_KEY.upper()])
def test_a_wrong_client_key_is_an_authentication_error(oai, ant, key):
    for way in OPENAI_WAYS.values():
        with pytest.raises(oai.package.AuthenticationError) as raised:
            way(oai.client.with_options(api_key=key), "demo")
        assert raised.value.code == "invalid_api_key" and key not in str(raised.value)
    with pytest.raises(ant.package.AuthenticationError) as other:
        anthropic_way(ant.client.with_options(api_key=key), "demo")
    assert other.value.body["error"]["type"] == "authentication_error"


def test_the_key_of_the_client_stays_with_the_proxy(oai, ant, upstream, model):
    upstream.on(model, answer_json({"id": "x", "object": "chat.completion", "choices": []}))
    oai.client.chat.completions.create(model=model, messages=ASKED)
    ant.client.messages.create(model=model, max_tokens=64, messages=ASKED)
    chat, messages = upstream.got(model)
    assert (chat.header("authorization"), chat.header("x-api-key")) == ("Bearer test-upstream-key", None)
    assert (messages.header("authorization"), messages.header("x-api-key")) == (None, "test-upstream-key")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", messages.header("anthropic-version"))
    assert SDK_KEY not in str(upstream.got(model))


@pytest.mark.parametrize("model_", ["", "   "])
def test_a_request_without_a_model_is_a_bad_request(oai, ant, model_):
    for way in OPENAI_WAYS.values():
        with pytest.raises(oai.package.BadRequestError, match="model"):
            way(oai.client, model_)
    with pytest.raises(ant.package.BadRequestError, match="model"):
        anthropic_way(ant.client, model_)


def test_a_path_that_is_not_there_is_not_found(oai, ant):
    with pytest.raises(oai.package.NotFoundError):
        oai.client.embeddings.create(model="demo", input="x")
    with pytest.raises(ant.package.NotFoundError):
        ant.client.models.list()
    with pytest.raises(oai.package.APIStatusError) as raised:
        oai.client.responses.retrieve("resp_1")
    assert raised.value.status_code in (404, 405)


def test_a_fault_of_the_configuration_is_not_tried_again(sdk_program, oai, ant):
    def count() -> int:
        failed = [line for line in list(sdk_program.lines) if '"event":"request-failed"' in line]
        return sum("providers.unset_" in line for line in failed)

    for client, error, ask in ((oai.client, oai.package.InternalServerError, OPENAI_WAYS["chat"]),
                               (ant.client, ant.package.InternalServerError, anthropic_way)):
        before = count()
        with pytest.raises(error) as raised:
            ask(client.with_options(max_retries=2), "unset")
        assert "api_key" in raised.value.message
        sdk_program.events(raised.value.response.headers["x-proxai-request-id"])
        assert count() == before + 1


@pytest.mark.parametrize("status, error", [
    (429, {"message": "No quota is left", "type": "insufficient_quota", "code": "insufficient_quota"}),
    (402, {"message": "Pay first", "type": "billing", "code": None}),
], ids=["quota", "billing"])
def test_a_quota_that_is_used_up_is_not_tried_again(oai, upstream, model, status, error):
    upstream.on(model, answer_json({"error": error}, status))
    with pytest.raises(oai.package.APIStatusError) as raised:
        OPENAI_WAYS["chat"](oai.client.with_options(max_retries=2), model)
    assert raised.value.status_code == status and len(upstream.got(model)) == 1


# -- streams that go wrong ---------------------------------------------------

def named_frames(*events: Any) -> list[bytes]:
    """Events as frames; those with a `type` get it as their name."""
    names = [f"event: {e['type']}\n" if "type" in e else "" for e in events]
    return [f"{name}data: {json.dumps(e)}\n\n".encode() for name, e in zip(names, events, strict=True)]


def chat_chunk(**delta: Any) -> dict[str, Any]:
    """A chunk of a Chat stream."""
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


CHAT_TEXT = chat_chunk(role="assistant", content="Hel")
CHAT_CALL = chat_chunk(tool_calls=[
    {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}])
MESSAGE_START = {"type": "message_start", "message": {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
    "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}}
MESSAGE_TEXT = [
    MESSAGE_START,
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}}]
MESSAGE_CALL = [
    MESSAGE_START,
    {"type": "content_block_start", "index": 0, "content_block": {
        "type": "tool_use", "id": "t", "name": "f", "input": {}}},
    {"type": "content_block_delta", "index": 0, "delta": {
        "type": "input_json_delta", "partial_json": '{"a":'}}]
RESPONSE_TEXT = {
    "type": "response.output_text.delta", "sequence_number": 4, "item_id": "i", "output_index": 0,
    "content_index": 0, "delta": "Hel", "logprobs": []}
RESPONSE_CALL = [
    {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0, "item": {
        "id": "f1", "type": "function_call", "call_id": "t", "name": "f", "arguments": "",
        "status": "in_progress"}},
    {"type": "response.function_call_arguments.delta", "sequence_number": 2, "item_id": "f1",
     "output_index": 0, "delta": '{"a":'}]


def chat_stream(oai: Sdk, model: str) -> Any:
    """A stream of the openai package."""
    return oai.client.chat.completions.create(model=model, messages=ASKED, stream=True)


def responses_stream(oai: Sdk, model: str) -> Any:
    """Another stream of the openai package."""
    return oai.client.responses.create(model=model, input=ASKED, stream=True)


def messages_stream(ant: Sdk, model: str) -> Any:
    """A stream of the anthropic package."""
    return ant.client.messages.create(model=model, max_tokens=9, messages=ASKED, stream=True)


def test_a_stream_that_is_cut_is_never_complete_for_the_sdks(oai, ant, upstream, model):
    upstream.on(f"{model}-c", answer_stream(*named_frames(CHAT_TEXT)))
    upstream.on(f"{model}-r", answer_stream(*named_frames(RESPONSE_TEXT)))
    upstream.on(f"{model}-a", answer_stream(*named_frames(*MESSAGE_TEXT)))
    for stream in (chat_stream(oai, f"{model}-c"), responses_stream(oai, f"{model}-r"),
                   messages_stream(ant, f"{model}-a")):
        assert next(iter(stream))
        with pytest.raises(Exception, match=r"(?i)connection|incomplete|closed"):
            list(stream)


def test_an_error_within_a_stream_is_an_error_of_the_sdks(oai, ant, upstream, model):
    error = {"error": {"message": "went wrong", "type": "server_error"}}
    upstream.on(f"{model}-c", answer_stream(*named_frames(CHAT_TEXT, error)))
    upstream.on(f"{model}-a", answer_stream(*named_frames(
        *MESSAGE_TEXT, {"type": "error", "error": {"type": "overloaded_error", "message": "went wrong"}})))
    with pytest.raises(oai.package.APIError, match="went wrong"):
        list(chat_stream(oai, f"{model}-c"))
    with pytest.raises(ant.package.APIStatusError, match="went wrong"):
        list(messages_stream(ant, f"{model}-a"))


def test_a_tool_call_that_stalls_is_an_error_of_the_sdks(oai, ant, upstream, model):
    upstream.on(f"{model}-c", answer_stream(*named_frames(CHAT_CALL), end=False))
    upstream.on(f"{model}-a", answer_stream(*named_frames(*MESSAGE_CALL), end=False))
    upstream.on(f"{model}-r", answer_stream(*named_frames(*RESPONSE_CALL), end=False))
    with pytest.raises(oai.package.APIError, match="stalled"):
        list(chat_stream(oai, f"{model}-c"))
    with pytest.raises(ant.package.APIStatusError, match="stalled"):
        list(messages_stream(ant, f"{model}-a"))
    *_, last = responses_stream(oai, f"{model}-r")
    assert last.type == "error" and "stalled" in last.message and last.sequence_number == 2



# ============================================================================
#  Layout
# ============================================================================

TREE = ast.parse(SOURCE)
BANNERS = [(number, int(m[1]), m[2]) for number, line in enumerate(SOURCE.splitlines(), 1)
           if (m := re.fullmatch(r"#  (\d+)  (.+)", line))]
FIVE_FILES = {"proxai.py", "test_proxai.py", "config.example.toml", "README.md", "LICENSE"}


def section_of(line: int) -> int:
    """The number of the section that a line of the source is in; 0 above the first."""
    return max((number for start, number, _ in BANNERS if start <= line), default=0)


def definitions() -> Iterator[tuple[str, int]]:
    """(name, line) of everything the module defines or imports at its top level."""
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (((alias.asname or alias.name).split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((n.id, node.lineno) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def global_names(code: types.CodeType) -> Iterator[tuple[str, int]]:
    """(name, line) of every use of a module-level name in compiled code; annotations are no code here."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.positions and step.positions.lineno:
            yield step.argval, step.positions.lineno
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from global_names(inner)


def tracked_files() -> list[str]:
    """The repository's files, those included that are not added yet."""
    if not (HERE / ".git").exists():
        pytest.skip("not a clone")
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git cannot list the files")
    return [name for name in done.stdout.decode().split("\0") if name and (HERE / name).is_file()]


def test_the_table_of_the_docstring_is_the_list_of_the_banners():
    table = re.findall(r"^ +(\d+)  (\S.*)$", ast.get_docstring(TREE) or "", re.M)
    assert [(int(number), title) for number, title in table] == [banner[1:] for banner in BANNERS]
    assert [number for _, number, _ in BANNERS] == list(range(1, len(BANNERS) + 1))


def test_banners_have_one_shape():
    lines = SOURCE.splitlines()
    rule = "# " + "=" * 76
    for start, _, _ in BANNERS:
        assert lines[start - 2] == lines[start] == rule
        assert lines[start + 1].startswith("# ") and lines[start - 5:start - 2] == [""] * 3
    assert lines.count(rule) == 2 * len(BANNERS)


def test_sections_only_look_up():
    where = {name: section_of(line) for name, line in definitions()}
    last_line = max(node.lineno for node in TREE.body)
    down = {f"{name} of section {where[name]} in section {section_of(line)}, line {line}"
            for name, line in global_names(compile(SOURCE, "proxai.py", "exec"))
            if line < last_line and where.get(name, 0) > section_of(line)}
    assert sorted(down) == []


def test_every_name_is_defined_once():
    names = [name for name, _ in definitions()]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_public_function_and_class_has_a_docstring():
    missing = [node.name for node in TREE.body
               if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
               and not node.name.startswith("_") and not (ast.get_docstring(node) or "").strip()]
    assert missing == []


def test_only_the_standard_library_is_imported():
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").split(".")[0])
    assert modules - sys.stdlib_module_names == set()


def test_what_is_promised_is_there():
    assert [name for name in proxai.__all__ if not hasattr(proxai, name)] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", proxai.__version__)


def test_nothing_is_left_to_be_done():
    assert re.findall(r"\b(?:TODO|FIXME)\b", SOURCE) == []


def test_the_readme_mentions_every_flag():
    text = (HERE / "README.md").read_text("utf-8")
    flags = re.findall(r"(?<![\w-])--[a-z-]+", proxai.command_line().format_help())
    assert len(set(flags)) > 10
    assert [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", text)] == []


def test_the_readme_mentions_every_setting():
    text = (HERE / "README.md").read_text("utf-8")
    keys = [key for key, *_ in proxai.settings_rows()]
    assert len(keys) > 50
    assert [key for key in keys if not re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text)] == []


def test_the_configurations_in_the_readme_load():
    text = (HERE / "README.md").read_text("utf-8")
    blocks = [b for b in re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S) if "[providers." in b]
    assert blocks
    for block in blocks:
        environ = dict.fromkeys(re.findall(r'^api_key_env = "(.+)"', block, re.M), "a-key")
        proxai.load_config(block, "README.md", environ=environ)


def test_the_licence_is_mit():
    text = " ".join((HERE / "LICENSE").read_text("utf-8").split())
    assert text.startswith("MIT License") and "Copyright (c)" in text
    assert "Permission is hereby granted, free of charge, to any person obtaining a copy" in text
    assert 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND' in text


def test_the_top_of_the_repository_holds_the_five_files():
    top = {name.split("/")[0] for name in tracked_files()}
    assert {name for name in top if not name.startswith(".")} == FIVE_FILES


def test_no_file_names_a_place_on_one_machine():
    place = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work|tmp|var/folders)/\w|\b[A-Z]:\\Users\\")
    found = [f"{name}: {m[0]}" for name in tracked_files()
             for m in place.finditer((HERE / name).read_text("utf-8", "replace"))]
    assert found == []
