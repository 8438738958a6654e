#!/usr/bin/env python3
"""Benchmark of proxai.py against no proxy at all and against the floor of asyncio.

    bench.py                          every scenario, 3 rounds, about 8 minutes
    bench.py --quick                  the same in brief, some 2 minutes: smoke test, rough figures
    bench.py --list                   what can be measured
    bench.py --scenarios small-c64,stream-c1 --rounds 9 --json result.json
    bench.py --scenarios translated-stream,translated-micro --pairs chat-messages
    bench.py --proxai-cmd 'old=python3 old/proxai.py --config {config}'

Targets, taking turns within every round (A B C A B C ...):

    direct    the load generator talks to the mock provider, nothing in between
    floor     a minimal HTTP relay on asyncio streams, tuned: what the technology allows
    proxai    proxai.py from the directory above, with a generated configuration
    NAME      one more for every --proxai-cmd: {config} becomes the path of its configuration,
              `python3` the interpreter that runs this; the name proxai replaces ours

The translated scenarios run on the proxies only, once for each of the --pairs: CLIENT-PROVIDER, of
the protocols chat, messages and responses; the same one twice passes through, for comparison.
translated-micro calls the functions of a pair in a process of its own, without any HTTP.

Mock, floor, proxies and load generators are processes of their own. All of it stays on 127.0.0.1,
is bounded in time and ended by process id, also when this is ended by a signal. The mock answers in
the protocol of the path, and what the end of the model name says, `bench-EVENTS-ARGUMENTS-PER_WRITE-PAUSE`:
an answer in one piece for no events, else a stream of that many, the last of them pieces of a tool
call's arguments, so many per write, with that many milliseconds in between.

Every answer is checked: status, framing, JSON, text, arguments, number and order of events, the
last event. Whatever is not right counts as failed, is printed, and makes the exit status 1. Figures
are medians over the rounds (min..max); "x floor" and "added" compare within the same round. CPU time
is the figure that survives a busy machine; it and memory come from /proc and are left out where
there is none. Yet other processes add to it too, by the caches they take, so that for the
translated scenarios the least of all slices of 0.1 s in all rounds counts ("best").
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import select
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

# argparse, asyncio, importlib, resource, shlex, subprocess and tempfile are imported where they are
# used: the floor runs from this file too, and its start time and memory are measured.

HERE = Path(__file__).resolve()
PROXAI = HERE.parent.parent / "proxai.py"
PYTHON = os.path.realpath(sys.executable)  # a pyenv shim would add its own start time
LOOPBACK = "127.0.0.1"
PROC = Path("/proc")
HAS_PROC = Path("/proc/self/smaps_rollup").exists()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LIFETIME_SECS = 4 * 3600  # mock and floor end by themselves should their parent be killed outright
ANSWER_SECS = 10  # an answer that takes longer has failed
START_SECS = 20
RAMP_SECS = 1.0  # over which the open streams are started
SLICE_SECS = 0.1
MAX_FAILURES = 100  # per sample; beyond that a failed connection is not opened again
RECV_BYTES = 1 << 18
KEPT_BYTES = 1 << 13  # of a request in the mock: head and model name are within

PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
# The beginnings tell routing the provider, and translation what the model can do.
MODELS = {"chat": "bench", "messages": "claude-opus-4-8-bench", "responses": "gpt-5.5-bench"}
PAIRS = ("responses-messages", "responses-chat", "chat-messages", "messages-responses",
         "messages-chat", "chat-responses")
MARKER = "BENCH-OK"
CLIENT_KEY, PROVIDER_KEY = "sk-client", "sk-bench"

LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)
CLOSE = re.compile(rb"\r\nconnection: *close", re.I)
REPLACED = re.compile(rb"\r\n(?:host|authorization|connection):[^\r]*", re.I)
SHAPE = re.compile(rb'"model": ?"[a-z0-9.-]*?bench-(\d+)-(\d+)-(\d+)-(\d+)"')

Json = dict[str, Any]


class Scenario(NamedTuple):
    """A load; the kinds start and memory get a fresh process each time."""

    title: str
    kind: str  # which table it gets
    mode: str = "closed"
    conns: int = 1
    size: int = 1024  # of the request
    tools: int = 0  # that it declares; with tools it also has a system text, a call and its result
    events: int = 0
    arguments: int = 0  # of the events; without events, whether the answer has a tool call
    per_write: int = 1
    pause_ms: int = 0
    rate: int = 0
    secs: float = 2.0


# == 1  Messages =============================================================
# What client and provider say, as bytes: built once, never per request.

SENTENCE = "The proxy hands the request to its provider and the answer back to the client. "
CODE = 'def page(rows, cursor):\n\t"""Rows after the \\"cursor\\"."""\n\treturn [r for r in rows]\n'
TOOL, CALL = "read_rows_0", "call_WUrc0ckNt2RVcCeUqMvoqGa5"
SCHEMA = {"type": "object", "required": ["path"], "additionalProperties": False, "properties": {
    "path": {"type": "string", "description": "File to read, relative to the workspace."},
    "rows": {"type": "array", "items": {"type": "integer"}, "description": "Rows to return."},
    "mode": {"type": "string", "enum": ["text", "lines"], "description": "What comes back."}}}
USAGE = {"prompt_tokens": 219, "completion_tokens": 110, "total_tokens": 329,
         "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
         "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0}}


def compact(value: Any) -> bytes:
    """JSON as the vendors send it, without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


def prose(length: int) -> str:
    """That many characters which need no escapes."""
    return (SENTENCE * (length // len(SENTENCE) + 1))[:length]


# -- requests

def chat_item(who: str, text: str) -> Json:
    """A turn of a conversation in a Chat request."""
    if who == "call":
        function = {"name": TOOL, "arguments": text}
        return {"role": "assistant", "content": None, "tool_calls": [
            {"id": CALL, "type": "function", "function": function}]}
    return {"role": "tool", "tool_call_id": CALL, "content": text} if who == "result" else {
        "role": who, "content": text}


def messages_item(who: str, text: str) -> Json:
    """A turn of a conversation in a Messages request."""
    if who == "call":
        call = {"type": "tool_use", "id": CALL, "name": TOOL, "input": json.loads(text)}
        return {"role": "assistant", "content": [call]}
    return {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": CALL, "content": text} if who == "result" else
        {"type": "text", "text": text}]}


def responses_item(who: str, text: str) -> Json:
    """A turn of a conversation in a Responses request."""
    if who == "call":
        return {"type": "function_call", "call_id": CALL, "name": TOOL, "arguments": text}
    return {"type": "function_call_output", "call_id": CALL, "output": text} if who == "result" else {
        "type": "message", "role": who, "content": [{"type": "input_text", "text": text}]}


def request_body(load: Scenario, inbound: str = "chat", provider: str = "chat") -> bytes:
    """A request of exactly `load.size` bytes. Without tools (Chat only) it is turns of code, which
    JSON escapes, then prose."""
    shape = (load.events, load.arguments, load.per_write, load.pause_ms)
    body: Json = {"model": "-".join(map(str, (MODELS[provider], *shape)))}
    body["max_output_tokens" if inbound == "responses" else "max_tokens"] = 1024
    if load.events:
        body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if inbound == "chat" else {})
    system, tools = prose(600), [
        {"name": f"read_rows_{index}", "description": prose(90), "parameters": SCHEMA} for index in range(load.tools)]
    name, turns, last = "messages", [("user", CODE * 4), ("call", '{"path":"src/page.py","mode":"text"}')], "result"
    if not tools:
        turn = len(compact(chat_item("assistant", CODE * 40))) + 1
        turns, last = [(who, CODE * 40) for who in ("user", "assistant") * (load.size // turn)], "user"
        turns = turns[:(load.size - 400) // turn]
    elif inbound == "chat":
        body["tools"] = [{"type": "function", "function": each} for each in tools]
        turns.insert(0, ("system", system))
    elif inbound == "messages":
        body["system"] = [{"type": "text", "text": system}]
        body["tools"] = [{"input_schema" if key == "parameters" else key: value for key, value in each.items()}
                         for each in tools]
    else:
        name, body["instructions"] = "input", system
        body |= {"store": False, "tools": [{"type": "function", **each} for each in tools]}
    item = {"chat": chat_item, "messages": messages_item, "responses": responses_item}[inbound]
    said = [item(*turn) for turn in turns]
    missing = load.size - len(compact({**body, name: [*said, item(last, "")]}))
    return compact({**body, name: [*said, item(last, prose(missing))]})


def http_request(port: int, key: str, body: bytes, inbound: str = "chat") -> bytes:
    """The whole request as a client sends it."""
    more = "anthropic-version: 2023-06-01\r\n" if inbound == "messages" else ""
    head = (f"POST {PATHS[inbound]} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\nAccept: application/json\r\n"
            f"User-Agent: bench\r\nAuthorization: Bearer {key}\r\n{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


# -- answers

def pieces(events: int, arguments: int) -> tuple[list[str], list[str]]:
    """The pieces of text and of arguments in an answer, different so that order and loss show."""
    texts = [f" tick{index}" for index in range(events - arguments)]
    numbers = [f",{index}" for index in range(arguments)]
    if numbers:
        numbers[0] = '{"rows":[0'
        numbers[-1] += "]}"
    return texts or [f"{MARKER} {prose(620)}"], numbers


def chat_answer(texts: list[str], arguments: list[str], stream: bool) -> list[Any]:
    """What a Chat provider sends."""
    def completion(choice: Json | None, usage: Json | None = USAGE) -> Json:
        return {"id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
                "object": "chat.completion.chunk" if stream else "chat.completion", "created": 1741569952,
                "model": "bench", "service_tier": "default", "system_fingerprint": "fp_fc9f1d7035",
                "choices": [{"index": 0, **choice}] if choice else [], "usage": usage}

    def chunk(delta: Json, reason: str | None = None) -> Json:
        return completion({"delta": delta, "logprobs": None, "finish_reason": reason}, None)

    reason, message = "stop", {"role": "assistant", "content": "" if stream else "".join(texts), "refusal": None}
    calls: list[Json] = []
    if arguments:
        first = {"name": TOOL, "arguments": "" if stream else "".join(arguments)}
        reason, calls = "tool_calls", [{"id": CALL, "type": "function", "function": first}]
    if not stream:
        message |= {"tool_calls": calls} if calls else {}
        return [completion({"message": message, "logprobs": None, "finish_reason": reason})]
    calls += [{"function": {"arguments": each}} for each in arguments]
    return [chunk(message), *(chunk({"content": text}) for text in texts),
            *(chunk({"tool_calls": [{"index": 0, **call}]}) for call in calls),
            chunk({}, reason), completion(None), "[DONE]"]


def messages_answer(texts: list[str], arguments: list[str], stream: bool) -> list[Any]:
    """What a Messages provider sends."""
    def message(content: list[Json], reason: str | None) -> Json:
        return {"id": "msg_01XFDUDYJgAACzvnptvVoYEL", "type": "message", "role": "assistant",
                "model": "claude-opus-4-8", "content": content, "stop_reason": reason, "stop_sequence": None,
                "usage": {"input_tokens": 219, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
                          "output_tokens": 110, "service_tier": "standard"}}

    reason = "tool_use" if arguments else "end_turn"
    # The blocks as they begin, as they end, and what comes in between.
    blocks: list[tuple[Json, Json, list[Json]]] = [({"type": "text", "text": ""}, {"text": "".join(texts)}, [
        {"type": "text_delta", "text": each} for each in texts])]
    if arguments:
        blocks.append(({"type": "tool_use", "id": "toolu_01T1x1fJ34qAmk2tNTrN7Up6", "name": TOOL, "input": {}},
                       {"input": json.loads("".join(arguments))},
                       [{"type": "input_json_delta", "partial_json": each} for each in arguments]))
    if not stream:
        return [message([begun | ended for begun, ended, _ in blocks], reason)]
    events: list[Json] = [{"type": "message_start", "message": message([], None)}]
    for index, (begun, _, deltas) in enumerate(blocks):
        events += [{"type": "content_block_start", "index": index, "content_block": begun}, {"type": "ping"},
                   *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
                   {"type": "content_block_stop", "index": index}]
    return [*events, {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None},
                      "usage": {"output_tokens": 110}}, {"type": "message_stop"}]


def responses_answer(texts: list[str], arguments: list[str], stream: bool) -> list[Any]:
    """What a Responses provider sends."""
    def response(status: str, output: list[Json]) -> Json:
        usage = {"input_tokens": 219, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 110,
                 "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 329}
        return {"id": "resp_67ccd2bed1ec8190", "object": "response", "created_at": 1741476542, "status": status,
                "error": None, "incomplete_details": None, "instructions": None, "max_output_tokens": 1024,
                "model": "gpt-5.5", "output": output, "parallel_tool_calls": True, "previous_response_id": None,
                "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": 1.0,
                "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": 1.0,
                "truncation": "disabled", "usage": usage if output else None, "user": None, "metadata": {}}

    def part(text: str) -> Json:
        return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}

    text, whole = "".join(texts), "".join(arguments)
    output: list[Json] = [{"id": "msg_67ccd2bf17f08190", "type": "message", "status": "completed",
                           "role": "assistant", "content": [part(text)]}]
    at: Json = {"item_id": output[0]["id"], "output_index": 0, "content_index": 0}
    inner = [("content_part.added", {**at, "part": part("")}),
             *(("output_text.delta", {**at, "delta": each, "logprobs": []}) for each in texts),
             ("output_text.done", {**at, "text": text, "logprobs": []}),
             ("content_part.done", {**at, "part": part(text)})]
    items = [(output[0] | {"content": []}, inner)]
    if arguments:
        output.append({"id": "fc_67ccd2bf17f08191", "type": "function_call", "status": "completed",
                       "call_id": CALL, "name": TOOL, "arguments": whole})
        at = {"item_id": output[1]["id"], "output_index": 1}
        items.append((output[1] | {"arguments": ""}, [
            *(("function_call_arguments.delta", {**at, "delta": each}) for each in arguments),
            ("function_call_arguments.done", {**at, "arguments": whole})]))
    if not stream:
        return [response("completed", output)]
    events = [(kind, {"response": response("in_progress", [])}) for kind in ("created", "in_progress")]
    for index, (begun, more) in enumerate(items):
        events += [("output_item.added", {"output_index": index, "item": begun | {"status": "in_progress"}}), *more,
                   ("output_item.done", {"output_index": index, "item": output[index]})]
    events.append(("completed", {"response": response("completed", output)}))
    return [{"type": f"response.{kind}", "sequence_number": number, **more}
            for number, (kind, more) in enumerate(events)]


def answer_events(word: str, events: int, arguments: int) -> list[bytes]:
    """What a provider sends: the events of a stream as they are written, else one body."""
    make = {"chat": chat_answer, "messages": messages_answer, "responses": responses_answer}[word]
    said = make(*pieces(events, arguments), bool(events))
    if not events:
        return [compact(said[0])]
    names = ["" if word == "chat" else f"event: {each['type']}\n" for each in said]
    return [b"%bdata: %b\n\n" % (name.encode(), each.encode() if isinstance(each, str) else compact(each))
            for name, each in zip(names, said, strict=True)]


def http_answer(status: str, body: bytes) -> bytes:
    """A whole answer with a Content-Length."""
    head = (f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"x-request-id: req_bench\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def answer_writes(word: str, events: int, arguments: int, per_write: int) -> list[bytes]:
    """An answer, cut as the mock writes it; of a stream: head, chunk-framed events, last chunk."""
    said = answer_events(word, events, arguments)
    if not events:
        return [http_answer("200 OK", said[0])]
    chunks = [b"%x\r\n%b\r\n" % (len(each), each) for each in said]
    writes = [b"".join(chunks[at:at + per_write]) for at in range(0, len(chunks), per_write)]
    writes[0] = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                 b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n") + writes[0]
    writes[-1] += b"0\r\n\r\n"
    return writes


# -- checks

def unchunk(body: bytes) -> bytes:
    """The payload of a complete chunked body; ValueError where its framing is wrong."""
    parts, at = [], 0
    while size := int(body[at:(end := body.index(b"\r\n", at))], 16):
        at = end + 4 + size
        parts.append(body[end + 2:at - 2])
        if body[at - 2:at] != b"\r\n":
            raise ValueError("chunk without its end")
    if body[end:] != b"\r\n\r\n":
        raise ValueError("bytes behind the last chunk")
    return b"".join(parts)


def told(word: str, event: Json) -> tuple[str, str]:
    """Text and arguments in an event for a client, or in an answer in one piece."""
    if word == "chat":
        choice = event["choices"][0] if event["choices"] else {"delta": {}}
        message = choice["delta" if "delta" in choice else "message"]
        calls = message.get("tool_calls") or ()
        return message.get("content") or "", "".join(call["function"].get("arguments", "") for call in calls)
    if word == "messages":
        blocks = event["content"] if "content" in event else [event.get("delta", {})]
        return ("".join(block.get("text", "") for block in blocks),
                "".join(compact(block["input"]).decode() if "input" in block else block.get("partial_json", "")
                        for block in blocks))
    if "output" in event:
        return ("".join(part["text"] for item in event["output"] for part in item.get("content", ())),
                "".join(item.get("arguments", "") for item in event["output"]))
    return (event["delta"] if event["type"] == "response.output_text.delta" else "",
            event["delta"] if event["type"] == "response.function_call_arguments.delta" else "")


def check_payload(word: str, payload: bytes, events: int, arguments: int) -> None:
    """ValueError unless this is all that the mock sends, in order."""
    texts, numbers = pieces(events, arguments)
    if not events:
        if told(word, json.loads(payload)) != ("".join(texts), "".join(numbers)):
            raise ValueError("another text, or other arguments")
        return
    frames = payload.split(b"\n\n")
    records = [frame.rpartition(b"data: ")[2] for frame in frames[:-1] if not frame.startswith(b":")]
    if frames[-1] or (word == "chat" and records.pop() != b"[DONE]"):
        raise ValueError("the end is missing")
    found = [json.loads(record) for record in records]
    if word != "chat" and found[-1]["type"] not in ("message_stop", "response.completed"):
        raise ValueError("the last event is missing")
    both = [told(word, event) for event in found]
    said = [text for text, _ in both if text]
    if said != texts or [more for _, more in both if more] != numbers:
        raise ValueError(f"{len(said)} texts instead of {len(texts)}, or out of order, or other arguments")


# == 2  Mock provider ========================================================
# Mock and load generator are bare sockets around one selector: asyncio would be slower than what
# it measures.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def prime_malloc() -> None:
    """Make glibc take receive buffers from the heap.

    Freeing a block of 1 MB raises its mmap threshold; until then every recv() of 256 KB maps and
    unmaps its buffer.
    """
    bytes(1 << 20)


class Loop:
    """Non-blocking sockets, each with the state of its connection."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def add(self, state: Any) -> None:
        """Watch a connection."""
        state.sock.setblocking(False)
        state.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(state.sock, READ, state)

    def drop(self, state: Any) -> None:
        """Forget a connection."""
        self.selector.unregister(state.sock)
        state.sock.close()

    def block(self, state: Any, blocked: bool) -> None:
        """Watch for room to write, or no longer."""
        self.selector.modify(state.sock, READ | WRITE if blocked else READ, state)


class Peer:
    """One connection to the mock: what was read of a request, what is left to write."""

    __slots__ = ("blocked", "kept", "left", "pause", "queue", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.kept = b""
        self.left = 0  # bytes of the body still to come
        self.queue: deque[bytes] = deque()
        self.pause = 0.0
        self.blocked = False


class Mock(Loop):
    """A provider of all protocols out of prebuilt bytes."""

    def __init__(self, port: str) -> None:
        super().__init__()
        self.server = socket.create_server((LOOPBACK, int(port)), backlog=1024)
        self.selector.register(self.server, READ)
        self.paced: deque[tuple[float, Peer]] = deque()  # in order, as a run has but one pause
        self.answers: dict[tuple[bytes, ...], list[bytes]] = {}  # by path and shape
        self.words = {path.encode(): word for word, path in PATHS.items()}
        self.refusal = http_answer("400 Bad Request", b'{"error":"not what a proxy should send"}')
        self.key = f" {PROVIDER_KEY}\r\n".encode()  # in whatever line its protocol wants

    def run(self) -> None:
        """Serve until ended."""
        signal.alarm(LIFETIME_SECS)
        prime_malloc()
        while True:
            pause = max(0.0, self.paced[0][0] - time.monotonic()) if self.paced else None
            for key, mask in self.selector.select(pause):
                peer = key.data
                if peer is None:
                    self.add(Peer(self.server.accept()[0]))
                elif mask & READ:
                    self.readable(peer)
                else:
                    self.pump(peer)
            if self.paced:
                self.tick()

    def readable(self, peer: Peer) -> None:
        """Read on; answer when the request is whole. Big bodies are counted, not kept."""
        try:
            data = peer.sock.recv(RECV_BYTES)
        except OSError:
            data = b""
        if not data:
            peer.queue.clear()
            self.drop(peer)
            return
        if len(peer.kept) < KEPT_BYTES:
            peer.kept += data
        if peer.left:
            peer.left -= len(data)
        else:
            end = peer.kept.find(b"\r\n\r\n")
            if end < 0:
                return
            length = LENGTH.search(peer.kept, 0, end + 2)
            peer.left = end + 4 + (int(length[1]) if length else 0) - len(peer.kept)
        if peer.left <= 0:
            self.answer(peer)

    def answer(self, peer: Peer) -> None:
        """Answer as path and model name say, or refuse what no proxy should have sent."""
        request, left = peer.kept, peer.left
        peer.kept, peer.left, peer.pause = b"", 0, 0.0
        shape, path = SHAPE.search(request), request[5:request.find(b" HTTP/1.1\r\n")]
        if not shape or left or self.key not in request or path not in self.words:
            peer.queue.append(self.refusal)
        else:
            kind = (path, *shape.groups())
            if kind not in self.answers:
                self.answers[kind] = answer_writes(self.words[path], *map(int, shape.groups()[:3]))
            peer.queue.extend(self.answers[kind])
            peer.pause = int(shape[4]) / 1000
        if peer.pause:
            self.paced.append((time.monotonic(), peer))
        else:
            self.pump(peer)

    def tick(self) -> None:
        """Write the paced events that are due."""
        now = time.monotonic()
        while self.paced and self.paced[0][0] <= now:
            due, peer = self.paced.popleft()
            self.pump(peer, max(0, len(peer.queue) - 1))
            if peer.queue:
                self.paced.append((due + peer.pause, peer))

    def pump(self, peer: Peer, leave: int = 0) -> None:
        """Write what the socket takes, until so many writes are left."""
        queue, send, blocked = peer.queue, peer.sock.send, False
        try:
            while len(queue) > leave:
                data = queue.popleft()
                sent = send(data)
                if sent < len(data):
                    queue.appendleft(data[sent:])
        except BlockingIOError:
            queue.appendleft(data)
            blocked = True
        except OSError:
            queue.clear()  # the reading side drops the connection
        if blocked != peer.blocked:
            peer.blocked = blocked
            self.block(peer, blocked)


# == 3  Floor ================================================================
# The least that an HTTP proxy on asyncio streams can do: find the ends of messages, replace Host
# and Authorization, pool connections. No JSON, no routing, no limits, no errors.


class ChunkEnd:
    """Finds the end of a chunked body (without trailers) and does not take it apart."""

    __slots__ = ("cut", "last", "skip")

    def __init__(self) -> None:
        self.skip = 0  # bytes before the next size line
        self.cut = b""  # a size line of which the rest is still to come
        self.last = False

    def feed(self, data: bytes) -> bool:
        """True when the body ends with this data."""
        at, data, self.cut = self.skip, self.cut + data, b""
        size = len(data)
        while at < size and not self.last:
            end = data.find(b"\r\n", at)
            if end < 0:
                self.cut, at = data[at:], size
                break
            length = int(data[at:end], 16)
            self.last = not length
            at = end + 4 + length
        self.skip = at - size
        return self.last and not self.skip


class Floor:
    """The relay."""

    LIMIT = 1 << 23  # the default of 64 KB pauses and resumes reading every 128 KB

    def __init__(self, port: str, mock: str) -> None:
        self.port, self.mock = int(port), int(mock)
        self.pool: list[tuple[Any, Any]] = []
        self.added = (f"\r\nHost: {LOOPBACK}:{mock}\r\n"
                      f"Authorization: Bearer {PROVIDER_KEY}\r\n\r\n").encode()

    def run(self) -> None:
        """Serve until ended."""
        import asyncio
        signal.alarm(LIFETIME_SECS)
        prime_malloc()
        asyncio.run(self.serve())

    async def serve(self) -> None:
        """Accept clients for good."""
        import asyncio
        server = await asyncio.start_server(self.client, LOOPBACK, self.port, backlog=1024, limit=self.LIMIT)
        gc.collect()
        gc.freeze()
        await server.serve_forever()

    async def connect(self) -> tuple[Any, Any]:
        """A new connection to the provider."""
        import asyncio
        return await asyncio.open_connection(LOOPBACK, self.mock, limit=self.LIMIT)

    @staticmethod
    async def read_head(reader: Any) -> tuple[bytes, int, int]:
        """What was read, where the head in it ends, what is missing of the body (-1: chunked)."""
        data = await reader.read(RECV_BYTES)
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = await reader.read(RECV_BYTES)
            if not more:
                raise ConnectionError("closed")
            data += more
        length = LENGTH.search(data, 0, end + 2)
        return data, end, int(length[1]) - (len(data) - end - 4) if length else -1

    async def client(self, reader: Any, writer: Any) -> None:
        """One exchange after the other on a client's connection."""
        try:
            while True:
                data, end, left = await self.read_head(reader)
                body = [data[end + 4:]]
                while left > 0:
                    body.append(await reader.read(RECV_BYTES))
                    if not body[-1]:
                        return
                    left -= len(body[-1])
                await self.exchange(REPLACED.sub(b"", data[:end]) + self.added, body, writer)
        except OSError:
            pass  # one side is gone, which the load generator counts if it matters
        finally:
            writer.close()

    async def exchange(self, head: bytes, body: list[bytes], client: Any) -> None:
        """Send one request and relay its answer."""
        reader, writer = self.pool.pop() if self.pool else await self.connect()
        try:
            if len(body) == 1:
                writer.write(head + body[0])
            else:
                writer.write(head)
                writer.write(memoryview(b"".join(body)))
            if writer.transport.get_write_buffer_size():
                await writer.drain()
            await self.relay(reader, client)
        except BaseException:
            writer.close()
            raise
        self.pool.append((reader, writer))

    async def relay(self, reader: Any, client: Any) -> None:
        """Relay one answer in whatever pieces it comes, up to its end."""
        data, end, left = await self.read_head(reader)
        client.write(data)
        chunks = ChunkEnd() if left < 0 else None
        ended = chunks.feed(data[end + 4:]) if chunks else left == 0
        while not ended:
            data = await reader.read(RECV_BYTES)
            if not data:
                raise ConnectionError("closed")
            client.write(data)
            if client.transport.get_write_buffer_size():
                await client.drain()
            left -= len(data)
            ended = chunks.feed(data) if chunks else left <= 0


# == 4  Load generator =======================================================
# One engine, three modes. closed: a connection sends again when it was answered. open: by the
# clock, answered or not. once: every connection one request.


class Link:
    """One connection of the load generator and its request in flight."""

    __slots__ = ("body_at", "have", "need", "parts", "since", "sock", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def expect(self, since: float) -> None:
        """Wait for a new answer."""
        self.since = since
        self.unsent: memoryview | None = None
        self.parts: list[bytes] = []
        self.have = self.body_at = 0  # no body: the head is not complete
        self.need = -1  # bytes of the whole answer; -1 when chunked


class Load(Loop):
    """Sends requests, checks every answer, measures those within a window of time."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = json.loads(spec)
        self.scenario = Scenario(*self.spec["scenario"])
        self.port, self.inbound = self.spec["port"], self.spec["pair"][0]
        body = request_body(self.scenario, *self.spec["pair"])
        self.request = http_request(self.port, self.spec["key"], body, self.inbound)
        self.idle: list[Link] = []
        self.looping = self.scenario.mode == "closed"
        self.known_body = self.known_payload = b""
        self.busy = self.failed = self.bytes = 0
        self.latencies: list[float] = []
        self.slice = (0.0, 0.0, 0)  # when it ends, CPU seconds and answers at its beginning
        self.least: float | None = None  # CPU seconds for an answer, in any slice
        self.first_error = ""

    def run(self) -> None:
        """Run the load and print the result as one line of JSON."""
        spec, load, now = self.spec, self.scenario, time.monotonic()
        self.count_at = now + spec["warm_secs"]
        self.end_at = self.count_at + spec["secs"]
        signal.alarm(int(self.end_at - now) + 3 * ANSWER_SECS)
        prime_malloc()
        gc.disable()  # nothing here is cyclic
        number, step = load.conns, 0.0
        if load.mode == "open":
            number, step = int((self.end_at - now) * load.rate), 1 / load.rate
        elif load.mode == "once":
            step = RAMP_SECS / number
        self.starts = deque(now + index * step for index in range(number))
        result = self.loop()
        if self.busy:
            self.failed += self.busy
            self.first_error = self.first_error or f"no whole answer in {ANSWER_SECS} s"
        print(json.dumps({**result, "failed": self.failed, "first_error": self.first_error}))

    def loop(self) -> Json:
        """Work until the end of the window, then wait for the answers still on their way."""
        begun: Json = {}
        result: Json = {}
        while not result or (self.busy and time.monotonic() < self.end_at + ANSWER_SECS):
            now = time.monotonic()
            while self.starts and self.starts[0] <= now:
                self.start(self.starts.popleft())
            if not begun and now >= self.count_at:
                begun, self.latencies, self.bytes = self.clocks(), [], 0
                self.slice = (now + SLICE_SECS, begun["cpu"], 0)
            if begun and not result and (now >= self.end_at or not (self.busy or self.starts)):
                result = self.result(begun, self.clocks())
                self.looping = False
                self.starts.clear()
            for key, mask in self.wait():
                if mask & WRITE:
                    self.push(key.data)
                if mask & READ:
                    self.readable(key.data)
        return result

    def wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for sockets, or for the next start."""
        if not self.starts:
            return self.selector.select(0.02)
        # epoll counts in milliseconds, select in microseconds; 1 ms late would be what we measure.
        pause = min(0.02, max(0.0, self.starts[0] - time.monotonic()))
        ready, _, _ = select.select([self.selector.fileno()], [], [], pause)
        return self.selector.select(0) if ready else []

    def clocks(self) -> Json:
        """Time, and CPU seconds of everyone involved."""
        return {"secs": time.monotonic(), "cpu": cpu_seconds(self.spec["pids"]),
                "mock_cpu": cpu_seconds(self.spec["mock_pids"]), "load_cpu": time.process_time(),
                "machine_cpu": machine_seconds()}

    def result(self, begun: Json, ended: Json) -> Json:
        """What happened between two readings of the clocks."""
        spent = {key: ended[key] - begun[key] for key in begun}
        ordered, secs = sorted(self.latencies), spent["secs"]
        done, events = len(ordered), self.scenario.events
        used = spent["cpu"] if HAS_PROC and self.spec["pids"] else None
        each = 1e6 * used / (done * (events or 1)) if used and done else None
        others = spent["machine_cpu"] - spent["cpu"] - spent["mock_cpu"] - spent["load_cpu"]
        return {**spent, "ok": done, "rps": done / secs, "events_s": done * events / secs,
                "mb_s": self.bytes / secs / 1e6,
                "p50_ms": 1000 * ordered[(done - 1) // 2] if done else None,
                "p99_ms": 1000 * ordered[(done - 1) * 99 // 100] if done else None,
                "cpu_us": each, "best_us": 1e6 * self.least / (events or 1) if self.least else each,
                "cpu_percent": used and 100 * used / secs,
                "others": others / secs}

    def start(self, due: float) -> None:
        """Start a request on an idle connection or on a new one."""
        self.busy += 1
        try:
            link = self.idle.pop() if self.idle else self.connect()
        except OSError as error:
            self.fail(None, f"connect: {error.strerror or error}")
        else:
            self.send(link, due)

    def connect(self) -> Link:
        """A new connection."""
        link = Link(socket.create_connection((LOOPBACK, self.port), ANSWER_SECS))
        self.add(link)
        return link

    def send(self, link: Link, since: float) -> None:
        """Send the request, as much of it as the socket takes at once."""
        link.expect(since)
        try:
            sent = link.sock.send(self.request)
        except OSError as error:
            self.fail(link, f"send: {error.strerror or error}")
            return
        if sent < len(self.request):
            link.unsent = memoryview(self.request)[sent:]
            self.block(link, True)

    def push(self, link: Link) -> None:
        """Send more of a big request."""
        try:
            link.unsent = link.unsent[link.sock.send(link.unsent):]
        except OSError:
            return  # the reading side reports it
        if not link.unsent:
            self.block(link, False)

    def readable(self, link: Link) -> None:
        """Read on; finish when the answer is whole."""
        try:
            data = link.sock.recv(RECV_BYTES)
        except OSError:
            data = b""
        if not data:
            if link in self.idle:
                self.idle.remove(link)
                self.drop(link)
            else:
                self.fail(link, f"closed after {link.have} bytes of the answer")
            return
        link.have += len(data)
        link.parts.append(data)
        if not (link.body_at or self.head_complete(link)):
            return
        if link.have >= link.need if link.need >= 0 else self.ends_chunks(link.parts):
            self.finish(link)

    @staticmethod
    def head_complete(link: Link) -> bool:
        """Find the end of the head and how long the answer is."""
        data = b"".join(link.parts)
        link.parts = [data]
        link.body_at = data.find(b"\r\n\r\n") + 4
        if link.body_at < 4:
            link.body_at = 0
            return False
        length = LENGTH.search(data, 0, link.body_at)
        if length:
            link.need = link.body_at + int(length[1])
        return True

    @staticmethod
    def ends_chunks(parts: list[bytes]) -> bool:
        """Whether the last chunk seems to be here; the check of the whole body is strict."""
        last = parts[-1] if len(parts[-1]) >= 5 else b"".join(parts[-5:])
        return last.endswith(b"0\r\n\r\n")

    def finish(self, link: Link) -> None:
        """Check the answer, count it, send the next request."""
        now = time.monotonic()
        answer = link.parts[0] if len(link.parts) == 1 else b"".join(link.parts)
        # A body that is byte for byte one checked before needs no second check: only that makes
        # checking every answer affordable.
        body = answer[link.body_at:]
        if body != self.known_body or not answer.startswith(b"HTTP/1.1 200"):
            try:
                self.check(answer, body, chunked=link.need < 0)
            except (ValueError, LookupError, TypeError) as error:
                self.fail(link, f"{type(error).__name__}: {error}")
                return
        self.latencies.append(now - link.since)
        if now >= self.slice[0] and self.scenario.conns == 1 and self.slice[1]:
            self.cut(now)
        self.bytes += len(self.known_payload)  # not the framing: a proxy may chunk differently
        if CLOSE.search(answer, 0, link.body_at):
            self.drop(link)
            self.busy -= 1
            if self.looping:
                self.starts.append(now)
        elif self.looping:
            self.send(link, now)
        else:
            self.busy -= 1
            self.idle.append(link)

    def cut(self, now: float) -> None:
        """End a slice of time, between two requests, so that it holds whole ones only."""
        (_, before, since), cpu, done = self.slice, cpu_seconds(self.spec["pids"]), len(self.latencies)
        if done > since:
            spent = (cpu - before) / (done - since)
            self.least = spent if self.least is None else min(self.least, spent)
        self.slice = (now + SLICE_SECS, cpu, done)

    def check(self, answer: bytes, body: bytes, *, chunked: bool) -> None:
        """Raise for whatever is wrong with an answer."""
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"answer {answer[9:300]!r}")
        if chunked and not CHUNKED.search(answer):
            raise ValueError("neither Content-Length nor chunked")
        payload = unchunk(body) if chunked else body
        if payload != self.known_payload:
            check_payload(self.inbound, payload, self.scenario.events, self.scenario.arguments)
        self.known_body, self.known_payload = body, payload

    def fail(self, link: Link | None, why: str) -> None:
        """Count a failure; a closed loop goes on with a new connection, but not for ever."""
        self.busy -= 1
        self.failed += 1
        self.first_error = self.first_error or why
        if link:
            self.drop(link)
        if self.looping and self.failed < MAX_FAILURES:
            self.starts.append(time.monotonic() + 0.01)


# == 5  Functions of the pairs ===============================================
# What of a translated exchange is translation: its functions in this process, without any HTTP.


class Micro:
    """The least CPU time of many short rounds, in µs; of a whole step and of its parts."""

    def __init__(self, spec: str) -> None:
        import importlib.util
        self.spec, self.found = json.loads(spec), cast(Json, {})
        self.pair = tuple(self.spec["pair"])
        signal.alarm(int(self.spec["secs"]) + START_SECS)
        module: Any = importlib.util.spec_from_file_location("proxai", self.spec["file"])
        self.proxai = sys.modules["proxai"] = importlib.util.module_from_spec(module)
        module.loader.exec_module(self.proxai)

    def run(self) -> None:
        """Measure one pair, unless it is none, and print the result as one line of JSON."""
        if self.pair in getattr(self.proxai, "PAIRS", {}):
            self.proxai.tune_process()
            self.profile = self.proxai.ProfileConfig()
            self.whole(self.proxai.PAIRS[self.pair])
            self.stream(self.proxai.PAIRS[self.pair])
        print(json.dumps(self.found))

    def time(self, key: str, per: int, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> Any:
        """Note what it takes to work on something prepared; returns what came of it."""
        until, least, out = time.monotonic() + self.spec["secs"] / 10, 1e9, None
        while time.monotonic() < until or out is None:
            given = [prepare() for _ in range(10 if per == 1 else 1)]
            begun = time.process_time()
            for each in given:
                out = work(each)
            least = min(least, (time.process_time() - begun) / len(given) / per)
        self.found[f"{key}_us"] = 1e6 * least
        return out

    def context(self) -> Any:
        """What the proxy makes for an exchange."""
        return self.proxai.Context(*self.pair, MODELS[self.pair[1]], host=LOOPBACK,
                                   profile=self.profile, now=int(time.time()))

    def asked(self, raw: bytes) -> Any:
        """The same after the pair filled it from a request."""
        ctx = self.context()
        self.proxai.PAIRS[self.pair].request(self.proxai.load(raw), ctx)
        return ctx

    def whole(self, pair: Any) -> None:
        """Requests, and an answer in one piece."""
        load, dump = self.proxai.load, self.proxai.dump
        bodies = [request_body(SCENARIOS[name], *self.pair) for name in ("translated-request", "translated-request-20")]
        for key, raw in zip(("request", "request20"), bodies, strict=True):
            self.time(f"{key}_pair", 1, functools.partial(load, raw), lambda body: pair.request(body, self.context()))
            self.time(key, 1, lambda raw=raw: raw, lambda raw: dump(pair.request(load(raw), self.context())))
        answer = answer_events(self.pair[1], 0, 1)[0]
        self.time("answer_pair", 1, lambda: (load(answer), self.asked(bodies[0])), lambda both: pair.response(*both))
        body = self.time("answer", 1, lambda: self.asked(bodies[0]), lambda ctx: dump(pair.response(load(answer), ctx)))
        check_payload(self.pair[0], body, 0, 1)

    def stream(self, pair: Any) -> None:
        """A stream: split and parsed, translated, written; `event` is all of that as the proxy does it."""
        words = {each.word: each for each in self.proxai.PROTOCOLS.values()}
        client, provider = (words[word] for word in self.pair)
        scenario = SCENARIOS["translated-stream"]
        events, raw = scenario.events, request_body(scenario, *self.pair)
        frames = answer_events(provider.word, events, scenario.arguments)

        def observer() -> Any:
            return self.proxai.StreamObserver(provider, 1 << 24)

        def begun() -> Any:
            stream = pair.stream(self.asked(raw))
            next(stream)
            return stream

        def send(stream: Any, items: Any) -> list[Any]:
            out: list[Any] = []
            try:
                for item in items:
                    out += stream.send(item)
            except StopIteration as end:
                out += end.value or ()
            return out

        def write(said: list[Any]) -> bytes:
            return b"".join([self.proxai.event_bytes(client, each) for each in said])

        items = self.time("split", events, observer, lambda each: [list(each.payloads(one, 0.0)) for one in frames])
        said = self.time("translate", events, begun, lambda stream: [send(stream, one) for one in items])
        self.time("write", events, lambda: said, lambda said: [write(one) for one in said])
        written = self.time("event", events, lambda: (begun(), observer()), lambda both: [
            write(send(both[0], both[1].payloads(one, 0.0))) for one in frames])
        check_payload(client.word, b"".join(written), events, scenario.arguments)


# == 6  Processes ============================================================


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far, to the nanosecond; 0 without /proc."""
    # Linux has a clock for each process; /proc/PID/stat counts the same in steps of 10 ms.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids) if HAS_PROC else 0.0


def machine_seconds() -> float:
    """CPU seconds of the whole machine that were not idle; 0 without /proc."""
    if not HAS_PROC:
        return 0.0
    user, nice, system, _, _, *interrupts = (PROC / "stat").read_text().split("\n")[0].split()[1:8]
    return sum(map(int, [user, nice, system, *interrupts])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pids: list[int]) -> dict[str, float]:
    """Memory of these processes as {"Rss": ..., "Pss": ...}; empty without /proc."""
    total: dict[str, float] = {}
    for pid in pids if HAS_PROC else []:
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        for name, kilobytes in re.findall(r"^(Rss|Pss): +(\d+)", rollup, re.M):
            total[name] = total.get(name, 0) + int(kilobytes) / 1024
    return total


def process_tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it has ended
            for children in PROC.glob(f"{parent}/task/*/children"):
                found += map(int, children.read_text().split())
    return found


class BenchError(Exception):
    """A sample cannot be taken."""


class Processes:
    """Everything that was started, so that everything is ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: list[Any] = []

    def spawn(self, name: str, command: list[str], **env: str) -> Any:
        """Start a process in a session of its own: Ctrl-C reaches only us, who end the others."""
        import subprocess
        output, errors = self.directory / f"{name}.out", self.directory / f"{name}.err"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | env,
                start_new_session=True)
        self.running.append(process)
        return process

    def said(self, name: str, where: str) -> str:
        """The end of what a process wrote to out or err."""
        return (self.directory / f"{name}.{where}").read_text(errors="replace")[-4000:].strip()

    def stop(self, process: Any) -> None:
        """End a process and its descendants, by force if need be."""
        pids = process_tree(process.pid) if process.poll() is None else []
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            give_up = time.monotonic() + 3
            while process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.01)
            pids = pids if process.poll() is None else pids[1:]
        self.running.remove(process)

    def stop_all(self) -> None:
        """End whatever still runs, also what a signal kept from being noted."""
        while self.running:
            self.stop(self.running[-1])
        for pid in process_tree(os.getpid())[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# == 7  Targets ==============================================================

CONFIG = """[server]
host = "127.0.0.1"
port = {port}
max_concurrent_requests = 4096
[translation]
extended_pairs = true
[routing.default_provider_names]
openai_responses = "chat"
openai_chat_completions = "chat"
anthropic_messages = "chat"
[[routing.routes]]
model_pattern = "claude-*"
provider = "messages"
[[routing.routes]]
model_pattern = "gpt-*"
provider = "responses"
[logging]
level = "warn"
[mcp]
port = 0
""" + "".join(f"""[providers.{word}]
protocol = "{name}"
base_url = "http://127.0.0.1:{{mock}}"
api_key = "sk-bench"
""" for word, name in (("chat", "openai_chat_completions"), ("messages", "anthropic_messages"),
                       ("responses", "openai_responses")))
FIRST = Scenario("the first request of all", "plain")


class Target:
    """Something to send requests to; without a command it is the mock itself."""

    def __init__(self, name: str, command: list[str], processes: Processes, mock: int) -> None:
        self.name, self.command, self.processes, self.mock = name, command, processes, mock
        # The mock refuses the client's key: a proxy has to put the provider's in its place.
        self.key = CLIENT_KEY if command else PROVIDER_KEY
        self.process: Any = None
        self.port, self.start_ms = mock, 0.0

    def pids(self) -> list[int]:
        """The processes whose CPU time and memory count."""
        return process_tree(self.process.pid) if self.process else []

    def start(self) -> None:
        """Start it, again if need be, and wait for its first answer."""
        if self.process:
            self.processes.stop(self.process)
        home = self.processes.directory / self.name
        home.mkdir(exist_ok=True)
        self.port, config = free_port(), home / "config.toml"
        config.write_text(CONFIG.format(port=self.port, mock=self.mock))
        command = [word.replace("{config}", str(config)).replace("{port}", str(self.port))
                   for word in self.command]
        request = http_request(self.port, self.key, request_body(FIRST))
        begun = time.monotonic()
        self.process = self.processes.spawn(self.name, command, HOME=str(home), NO_PROXY="*")
        while wrong := first_answer(self.port, request):
            if self.process.poll() is not None or time.monotonic() - begun > START_SECS:
                said = self.processes.said(self.name, "err")
                raise BenchError(f"does not serve, {wrong}; stderr: {said}")
            time.sleep(0.005)
        self.start_ms = 1000 * (time.monotonic() - begun)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        return probe.getsockname()[1]


def first_answer(port: int, request: bytes) -> str:
    """What is wrong with the answer to a real request; nothing if it is as it should be."""
    answer = b""
    try:
        with socket.create_connection((LOOPBACK, port), ANSWER_SECS) as sock:
            sock.sendall(request)
            while MARKER.encode() not in answer and (data := sock.recv(RECV_BYTES)):
                answer += data
    except OSError as error:
        return str(error)
    right = answer.startswith(b"HTTP/1.1 200") and MARKER.encode() in answer
    return "" if right else f"answer {answer[:300]!r}"


def make_targets(commands: list[str], processes: Processes, mock: int) -> list[Target]:
    """direct, floor, and every proxai.py."""
    import shlex
    found = {"direct": [], "floor": [PYTHON, str(HERE), "--role", "floor", "{port}", str(mock)]}
    if PROXAI.exists():
        found["proxai"] = [PYTHON, str(PROXAI), "--config", "{config}"]
    elif not any(each.startswith("proxai=") for each in commands):
        log("skipped: target proxai, as there is no proxai.py")
    for name, _, command in (each.partition("=") for each in commands):
        words = shlex.split(command)
        found[name] = [PYTHON, *words[1:]] if words[0] in ("python", "python3") else words
    return [Target(name, command, processes, mock) for name, command in found.items()]


# == 8  Scenarios ============================================================

TWO_TOOLS = Scenario("system text, two tools, a call and its result, 3 KB; answer with text and a call",
                     "translated", size=3000, tools=2, arguments=1, secs=1)
STREAMED = TWO_TOOLS._replace(title="such a request, stream of 400 events, 100 of them arguments, one per write",
                              kind="translated stream", events=400, arguments=100)
SCENARIOS = {
    "small-c1": Scenario("1 KB request, 1.2 KB answer, concurrency 1", "plain"),
    "small-c16": Scenario("the same, concurrency 16", "plain", conns=16),
    "small-c64": Scenario("the same, concurrency 64", "plain", conns=64),
    "open-50": Scenario("the same, 50 requests/s by the clock", "plain", "open", rate=50, secs=5),
    # With one event per write the mock is soon the limit, with eight the proxy is.
    "stream-c1": Scenario("streams of 200 events, one per write, concurrency 1", "stream", events=200),
    "stream-c16": Scenario("the same, concurrency 16", "stream", conns=16, events=200),
    "stream-bulk": Scenario("the same, concurrency 16, eight events per write", "stream", conns=16,
                            events=200, per_write=8),
    "body-100k": Scenario("100 KB request, concurrency 4", "plain", conns=4, size=100_000),
    "body-5m": Scenario("5 MB request, concurrency 2", "plain", conns=2, size=5_000_000, secs=3),
    "start": Scenario("start to first answer, memory when idle", "start"),
    "streams-500": Scenario("500 open streams, 20 events/s each for 4 s", "memory", "once", conns=500,
                            events=80, pause_ms=50),
    "translated-request": TWO_TOOLS,
    "translated-request-20": TWO_TOOLS._replace(title="the same with 20 tools and 20 KB", size=20_000, tools=20),
    # What comes in faster than it is translated is read several events at a time, so that only
    # those with a pause wake the proxy one by one, as those of a model do.
    "translated-stream": STREAMED,
    "translated-stream-bulk": STREAMED._replace(title="the same, sixteen events per write", per_write=16),
    "translated-stream-paced": STREAMED._replace(
        title="the same, 20 streams, each an event every 2 ms", mode="once", conns=20, pause_ms=2),
    "translated-micro": Scenario("functions of a pair: µs for a request, an answer in one piece, an event", "micro"),
}


def run_role(role: str, spec: Json, processes: Processes, watch: Callable[[], None] | None = None) -> Json:
    """What a process says that runs a role from this file; it ends by itself: see its alarm."""
    process = processes.spawn(role, [PYTHON, str(HERE), "--role", role, json.dumps(spec)])
    while watch and process.poll() is None:
        watch()
        time.sleep(0.2)
    process.wait()
    processes.running.remove(process)
    if process.returncode:
        raise BenchError(f"{role}: {processes.said(role, 'err')}")
    return json.loads(processes.said(role, "out"))


def run_load(target: Target, scenario: Scenario, pair: list[str], mock_pids: list[int], share: float) -> Json:
    """One sample by a load generator of its own; watches the memory if that is the point."""
    once, secs, pids, peak = scenario.mode == "once", scenario.secs * share, target.pids(), [0.0]
    spec = {"scenario": scenario, "pair": pair, "port": target.port, "key": target.key, "pids": pids,
            "mock_pids": mock_pids, "secs": RAMP_SECS + ANSWER_SECS if once else secs,
            "warm_secs": 0 if once else secs / 5}
    found = run_role("load", spec, target.processes,
                     (lambda: peak.append(memory_mb(pids).get("Pss", 0))) if once else None)
    return found | {"peak_mb": max(peak)}


def sample(target: Target, scenario: Scenario, pair: list[str], mock_pids: list[int], share: float) -> Json:
    """One measurement of one target."""
    if scenario.kind == "micro":
        file = next((word for word in target.command if word.endswith(".py")), "")
        return {"ok": 1, "failed": 0} | run_role(
            "micro", {"file": file, "pair": pair, "secs": scenario.secs * share}, target.processes)
    fresh = scenario.kind in ("start", "memory")
    if target.command and (fresh or not target.process or target.process.poll() is not None):
        target.start()
    if not fresh:
        return run_load(target, scenario, pair, mock_pids, share)
    time.sleep(0.5)
    memory = memory_mb(target.pids())
    found: Json = {"ok": 1, "failed": 0, "start_ms": target.start_ms,
                   "rss_mb": memory.get("Rss"), "pss_mb": memory.get("Pss")}
    if scenario.kind == "memory":
        found |= run_load(target, scenario, pair, mock_pids, 1)
        if memory:
            found["kb_per_stream"] = 1024 * (found["peak_mb"] - found["pss_mb"]) / scenario.conns
    return found


# == 9  Results ==============================================================


class Results:
    """All samples, by scenario, row of its table and round."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[Json]]] = {}

    def figures(self, scenario: str, row: str, how: str, key: str) -> list[float]:
        """A figure in every round: its value, its ratio to the floor, what is added to direct; or the best of all."""
        rows = self.samples.get(scenario, {})
        mine = [each.get(key) for each in rows.get(row, [])]
        if how in ("value", "best"):
            found = [one for one in mine if one is not None]
            return [min(found)] if found and how == "best" else found
        others = [each.get(key) for each in rows.get("floor" if how == "ratio" else "direct", [])]
        both = [(one, two) for one, two in zip(mine, others, strict=False) if one is not None and two is not None]
        if how == "ratio":
            return [one / two for one, two in both if two]
        return [one - two for one, two in both if row != "direct"]

    def failed(self, scenario: str, row: str) -> int:
        """Failed answers; a round that could not be run is one."""
        return sum(each["failed"] for each in self.samples[scenario][row])


class Goal(NamedTuple):
    """What a scenario has to show."""

    text: str
    scenario: str
    how: str
    key: str
    bound: float
    at_least: bool = False


CPU = {"x floor (CPU)": ("ratio", "cpu_us"), "CPU %": ("value", "cpu_percent")}
TABLES = {
    "plain": {"requests/s": ("value", "rps"), "x floor": ("ratio", "rps"),
              "p50 ms": ("value", "p50_ms"), "added p50 ms": ("added", "p50_ms"),
              "added p99 ms": ("added", "p99_ms"), "CPU µs/request": ("value", "cpu_us"), **CPU},
    "stream": {"events/s": ("value", "events_s"), "MB/s": ("value", "mb_s"),
               "x floor": ("ratio", "mb_s"), "CPU µs/event": ("value", "cpu_us"), **CPU},
    "start": {"first answer after ms": ("value", "start_ms"), "x floor": ("ratio", "start_ms"),
              "idle RSS MB": ("value", "rss_mb"), "idle PSS MB": ("value", "pss_mb")},
    "memory": {"KB per open stream": ("value", "kb_per_stream"), "p50 ms": ("value", "p50_ms"),
               "CPU µs/event": ("value", "cpu_us"), **CPU},
    "translated": {"CPU µs/request, best": ("best", "best_us"), "CPU µs/request": ("value", "cpu_us"),
                   "requests/s": ("value", "rps"), "p50 ms": ("value", "p50_ms")},
    "translated stream": {"CPU µs/event, best": ("best", "best_us"), "CPU µs/event": ("value", "cpu_us"),
                          "events/s": ("value", "events_s"), "p50 ms": ("value", "p50_ms")},
    "micro": {name: ("best", f"{key}_us") for name, key in {
        "request": "request", "(the pair)": "request_pair", "20 tools": "request20",
        "(their pair)": "request20_pair", "answer": "answer", "(its pair)": "answer_pair", "event": "event",
        "(split, parse)": "split", "(translate)": "translate", "(write)": "write"}.items()},
}
GOALS = [
    Goal("small pass-through (c=64): requests/s >= 0.5 of the floor", "small-c64", "ratio", "rps",
         0.5, at_least=True),
    Goal("streaming (c=1): bytes/s >= 0.8 of the floor", "stream-c1", "ratio", "mb_s", 0.8, at_least=True),
    Goal("streaming (c=16): bytes/s >= 0.8 of the floor", "stream-c16", "ratio", "mb_s", 0.8, at_least=True),
    Goal("added p50 at 50 requests/s <= 0.3 ms", "open-50", "added", "p50_ms", 0.3),
    Goal("idle memory (RSS) <= 40 MB", "start", "value", "rss_mb", 40),
    Goal("memory per open stream <= 100 KB", "streams-500", "value", "kb_per_stream", 100),
    Goal("start to first answer <= 400 ms", "start", "value", "start_ms", 400),
    Goal("translated request with two tools: CPU <= 500 µs", "translated-request", "best", "best_us", 500),
    Goal("translated stream: CPU per event <= 20 µs", "translated-stream", "best", "best_us", 20),
]


def median(values: list[float]) -> float:
    """The middle value."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def short(value: float) -> str:
    """A number with three digits or so."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def spread(values: list[float]) -> str:
    """The median, and the extremes around it."""
    if len(set(values)) < 2:
        return short(values[0]) if values else "-"
    return f"{short(median(values))} ({short(min(values))}..{short(max(values))})"


def table(results: Results, name: str) -> list[str]:
    """The table of one scenario."""
    columns = TABLES[SCENARIOS[name].kind]
    lines = [f"\n### {name}: {SCENARIOS[name].title}\n", f"| target | {' | '.join(columns)} | failed |",
             "|---" * (len(columns) + 2) + "|"]
    for row in results.samples[name]:
        cells = [spread(results.figures(name, row, *column)) for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(cells)} | {results.failed(name, row)} |")
    return lines + notes(results, name)


def notes(results: Results, name: str) -> list[str]:
    """What to keep in mind: a load generator not clearly faster than the floor, a busy machine."""
    found = []
    direct = results.figures(name, "direct", "ratio", "rps")
    if SCENARIOS[name].mode == "closed" and direct and median(direct) < 1.5:
        found.append("direct is less than 1.5 times the floor: mock and load generator are part "
                     "of the limit, so compare CPU time rather than throughput.")
    busy = [cores for row in results.samples[name] for cores in results.figures(name, row, "value", "others")]
    if busy and max(busy) > 0.25:
        found.append(f"Other processes used up to {short(max(busy))} cores meanwhile (median "
                     f"{short(median(busy))}): measure again when the machine is quiet.")
    return [f"\n{line}" for line in found]


def goal_rows(results: Results) -> list[Json]:
    """Goal by goal, what was measured and whether that is enough."""
    rows = []
    for goal in GOALS:
        floor = spread(results.figures(goal.scenario, "floor", goal.how, goal.key))
        for row in results.samples.get(goal.scenario, {}):
            if row in ("direct", "floor"):
                continue
            found = results.figures(goal.scenario, row, goal.how, goal.key)
            met = "not measured"
            if results.failed(goal.scenario, row):
                met = "**no**, answers failed"
            elif found:
                good = median(found) >= goal.bound if goal.at_least else median(found) <= goal.bound
                met = "yes" if good else "**no**"
            rows.append({"target": row, "goal": goal.text, "measured": spread(found), "met": met, "floor": floor})
    return rows


def machine() -> str:
    """Where the figures come from, in one line."""
    system = os.uname()
    return (f"{os.cpu_count()} cores, {system.sysname} {system.machine}, "
            f"{sys.implementation.name} {sys.version.split()[0]}")


def report(results: Results, goals: list[Json], rounds: int) -> str:
    """The whole report in Markdown."""
    lines = ["## Benchmark\n", f"{machine()}; {rounds} rounds, median (min..max). What else runs only ever adds to CPU "
             "time: \"best\" is the least of the rounds, or of their slices of 0.1 s where there is one connection."]
    for name in results.samples:
        lines += table(results, name)
    if goals:
        lines += ["\n### Goals\n", "| target | goal | measured | met | floor itself |",
                  "|---" * 5 + "|"]
        lines += ["| " + " | ".join(row.values()) + " |" for row in goals]
    return "\n".join(lines)


# == 10  Command line ========================================================


def log(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> Any:
    """The command line; exits where it makes no sense."""
    import argparse
    import shlex
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), metavar="A,B", help="all by default")
    parser.add_argument("--pairs", default=",".join(PAIRS), metavar="A-B,C-D",
                        help="of the translated scenarios: client's and provider's protocol; all six by default")
    parser.add_argument("--rounds", type=int, help="3 by default, 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="a fifth of the time per sample")
    parser.add_argument("--proxai-cmd", action="append", default=[], metavar="NAME=CMD",
                        help="one more proxai.py; may be repeated")
    parser.add_argument("--captures", action="store_true",
                        help="one more target: proxai.py that captures all phases, as far as its disk follows")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    parser.add_argument("--list", action="store_true", help="list scenarios and goals")
    options = parser.parse_args()
    if options.captures:
        phases = "inbound-request", "provider-request", "upstream-response", "outbound-response"
        flags = " ".join(f"--capture-{phase}" for phase in phases)
        options.proxai_cmd.append(f"captures=python3 {shlex.quote(str(PROXAI))} --config {{config}} {flags}")
    options.names = options.scenarios.split(",")
    options.pairs = [each.split("-") for each in options.pairs.split(",")]
    options.rounds = options.rounds or (2 if options.quick else 3)
    if unknown := set(options.names) - set(SCENARIOS):
        parser.error(f"unknown scenario {min(unknown)}, use {', '.join(SCENARIOS)}")
    if not all(len(each) == 2 and set(each) <= set(PATHS) for each in options.pairs):
        parser.error(f"--pairs wants two of {', '.join(PATHS)} in each, such as {PAIRS[0]}")
    if not all(re.fullmatch(r"[\w.-]+=\s*\S.*", each) for each in options.proxai_cmd):
        parser.error("--proxai-cmd wants NAME=CMD")
    return options


def rows_of(scenario: Scenario, targets: list[Target],
            pairs: list[list[str]]) -> list[tuple[str, Target, list[str]]]:
    """The rows of a scenario's table, in the order in which they take turns."""
    if scenario.kind in ("plain", "stream", "start", "memory"):
        fresh = scenario.kind in ("start", "memory")
        return [(each.name, each, ["chat", "chat"]) for each in targets if each.command or not fresh]
    return [(f"{each.name} {'-'.join(pair)}", each, pair) for pair in pairs for each in targets
            if each.name not in ("direct", "floor")]


def measure(targets: list[Target], mock_pids: list[int], options: Any, results: Results) -> None:
    """Every scenario, its rows in turn."""
    for name in options.names:
        scenario = SCENARIOS[name]
        samples = results.samples[name] = {}
        turns = 1 if options.quick and scenario.kind == "memory" else options.rounds
        for row, target, pair in rows_of(scenario, targets, options.pairs) * turns:
            try:
                found = sample(target, scenario, pair, mock_pids, 0.2 if options.quick else 1)
            except (BenchError, OSError) as error:
                found = {"ok": 0, "failed": 1, "first_error": str(error)}
            samples.setdefault(row, []).append(found)
            if found["failed"]:
                log(f"FAILED {name} {row}: {found['failed']} of "
                    f"{found['failed'] + found['ok']}; first: {found['first_error']}")
        log(f"done: {name}")


def run(options: Any, directory: Path, results: Results) -> None:
    """Start the mock and measure."""
    processes = Processes(directory)
    try:
        mock = Target("mock", [PYTHON, str(HERE), "--role", "mock", "{port}"], processes, 0)
        mock.key = PROVIDER_KEY
        mock.start()
        measure(make_targets(options.proxai_cmd, processes, mock.port), mock.pids(), options, results)
    finally:
        try:
            processes.stop_all()
        finally:
            processes.stop_all()  # a signal may have cut the first one short; there is only one


def interrupted(number: int, _: Any) -> None:
    """End by a signal, once: whatever comes next must not cut the clean-up short."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    os.write(2, b"interrupted\n")
    raise SystemExit(128 + number)


def raise_file_limit() -> None:
    """500 streams need 1000 descriptors in a proxy, which inherits the limit from here."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """Measure and report; 1 if any answer was wrong."""
    import tempfile
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{name:24} {each.title}" for name, each in SCENARIOS.items()))
        print("\n".join(f"{'goal':24} {goal.text}" for goal in GOALS))
        return 0
    for number in SIGNALS:
        signal.signal(number, interrupted)  # even where a shell ignores Ctrl-C
    raise_file_limit()
    results = Results()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        run(options, Path(directory), results)
    goals = goal_rows(results)
    print(report(results, goals, options.rounds))
    if options.json:
        Path(options.json).write_text(json.dumps(
            {"machine": machine(), "rounds": options.rounds, "quick": options.quick,
             "scenarios": results.samples, "goals": goals}, indent=1))
    return int(any(results.failed(name, row) for name, rows in results.samples.items() for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        {"mock": Mock, "floor": Floor, "load": Load, "micro": Micro}[sys.argv[2]](*sys.argv[3:]).run()
    else:
        sys.exit(main())
