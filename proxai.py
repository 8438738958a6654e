#!/usr/bin/env python3
"""ProxAI: a local LLM proxy in one file. Any client protocol, any provider, nothing to install.

    python proxai.py --demo                  try it without a key
    python proxai.py --config config.toml    run it

Two axes, everywhere: names, logs, errors, documentation.

  protocol  what the bytes mean: openai_responses, openai_chat_completions, anthropic_messages
  phase     where they are: inbound_request -> provider_request -> upstream_response
            -> outbound_response

The request path decides the inbound protocol, the selected provider's `protocol` decides the wire
format upstream; the name of a provider is a label. The same protocol on both sides passes through
untouched, different ones go through one explicit pair, and nothing falls through silently.

    client --bytes--> Server --RequestHead--> Pipeline --Exchange--> Upstream --bytes--> provider
                        |          inbound_request | provider_request
    client <--bytes-- Server <----bytes------ Pipeline <--payload--- Upstream <--bytes-- provider
                               outbound_response | upstream_response

Everything that decides or converts is a plain function over values; everything that waits is
`async` and converts nothing. Data is pulled the whole way, so a slow reader slows the writer by not
reading.

Sections, each using only the ones above it (a test holds the file to that):

   1  Names and limits
   2  JSON
   3  Errors
   4  Routing
   5  Configuration
   6  HTTP grammar
   7  Event streams
   8  Providers
   9  Capabilities
  10  Conversations
  11  Requests
  12  Answers
  13  Pairs
  14  Observation
  15  Metrics
  16  Credentials
  17  Logs
  18  Captures
  19  Upstream
  20  Tokens
  21  Server
  22  Pipeline
  23  Control
  24  Demo provider
  25  Command line
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import sys
import textwrap
import threading
import time
import tomllib
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, dataclass_transform
from urllib.parse import (
    parse_qs,
    quote,
    quote_plus,
    unquote,
    unquote_to_bytes,
    urlencode,
    urlsplit,
)

__all__ = ["Config", "ConfigError", "ProxyError", "load_config", "main"]
__version__ = "0.1.0"



# ============================================================================
#  1  Names and limits
# ============================================================================
# The vocabulary and every number that is not a setting. Knows nothing else;
# a limit states the precedent it was chosen by.

Json = dict[str, Any]


class Protocol(NamedTuple):
    """What the bytes mean. `word` names it in code, `name` in configuration, logs and documents."""

    word: str
    name: str
    alias: str  # in human log lines
    title: str  # in messages to people
    path: str  # where a provider of this protocol takes requests
    wants: str  # the member that must be there beside `model`
    wants_types: tuple[type, ...]


RESPONSES = Protocol("responses", "openai_responses", "resp", "OpenAI Responses",
                     "/v1/responses", "input", (str, list))
CHAT = Protocol("chat", "openai_chat_completions", "chat", "OpenAI Chat Completions",
                "/v1/chat/completions", "messages", (list,))
MESSAGES = Protocol("messages", "anthropic_messages", "ant", "Anthropic Messages",
                    "/v1/messages", "messages", (list,))
PROTOCOLS = {p.name: p for p in (RESPONSES, CHAT, MESSAGES)}
MODEL_PATHS = {path: p for p in PROTOCOLS.values() for path in (p.path, p.path.removeprefix("/v1"))}
COUNT_PATHS = tuple(f"{path}/count_tokens" for path, p in MODEL_PATHS.items() if p is MESSAGES)
HEALTH_PATHS = ("/healthz", "/readyz", "/health", "/livez")
MODELS_PATHS = ("/v1/models", "/models")

PHASES = ("inbound_request", "provider_request", "upstream_response", "outbound_response")
APP_DIRECTORY = ".proxai"
ANTHROPIC_VERSION = b"2023-06-01"
USER_AGENT = b"ProxAI/" + __version__.encode()

READ_BYTES = 256 << 10  # one read(): what asyncio's own recv() takes at most
# StreamReader limit: reading pauses at twice this, so it bounds a stream's memory
STREAM_LIMIT = 128 << 10
CAPTURE_QUEUE_PIECES = 1024  # on their way to the disk (contract 9.6)
CAPTURE_QUEUE_BYTES = 64 << 20  # of them, unless one alone is larger
CAPTURE_REST = 9  # times as long as it wrote does the writer rest: requests have that time,
CAPTURE_REST_SECS = (0.01, 0.2)  # and so long at least and at most
CAPTURE_DROP_SECS = 1.0  # between two lines that tell of drops
CAPTURE_CLOSE_SECS = 2.0  # for what is queued when the proxy ends
CONTROL_BODY_BYTES = 64 << 10  # of a request to the control listener
DISCARD_BYTES = 256 << 10  # an unread request body up to this is read away to keep the connection
LINGER_BYTES = 64 << 20  # and how much (so that a whole refused body still passes)
CUT_SECS = 1.0  # after the grace of a shutdown: for the last words to clients that are cut
LINGER_SECS = 2.0  # how long a refused client may go on sending before the socket closes (nginx: 5)
CHUNK_LINE_BYTES = 4096  # chunk size with extensions (hyper 16 KiB for all extensions, node 16 KiB)
TRAILER_BYTES = 16 << 10  # trailers of a chunked body (node 16 KiB with the head)
RESPONSE_HEAD_BYTES = 256 << 10  # providers with many cookies; aiohttp 8 KiB a line, node 16 KiB
RESPONSE_HEAD_FIELDS = 256
INTERIM_RESPONSES = 16  # 1xx answers before the final one
FIELD_CACHE_LINES = 1024  # header lines kept parsed, see parse_field()
FIELD_CACHE_BYTES = 256
CACHED_BYTES = 512  # longest other line whose reading is remembered (a host name has at most 255)
GLOB_ALTERNATIVES = 256  # that the { } of one glob may stand for
MODEL_CHARS = 1024  # a model name; bounds what a configured regular expression is run over
ERROR_BODY_BYTES = 1 << 20  # of a provider's error answer
ERROR_TEXT_CHARS = 4096  # of a provider's error text in a message to the client
LOG_TEXT_CHARS = 300  # of a provider's error text in a log line
CHECKED_RESPONSE_BYTES = 8 << 20  # a non-stream answer is held and checked up to this, then relayed
INFLATE_FREE_BYTES = 1 << 20  # decompressed output that is never suspicious,
INFLATE_RATIO = 200  # beyond it, output over input (JSON reaches about 40, a bomb 1030)
DROPPED_NAMES, DROPPED_BYTES = 20, 1000  # in the header that tells what a translation left out
OBSERVED_THINGS = 4096  # items, calls and so on of one answer that are told apart
OBSERVED_CHARS = 200  # of a provider's word in a log line
IDLE_LINKS_PER_ORIGIN = 256  # kept-alive connections to one provider (httpx 20, Go 2, nginx 32-512)
IDLE_LINK_SECS = 60.0  # vendors close idle connections after 60-400 s
SWEEP_SECS = 5.0  # how often idle connections are looked over, and `wait` lines are written
DRAIN_SECS = 0.05  # that a client's next request waits for the end of a stream it has whole
AFTER_TERMINAL_SECS = 5.0  # how long a provider may take to end a stream that is complete
DISCOVERY_WAIT_SECS = 3.0  # how long a client that lists models waits for providers' lists,
DISCOVERY_SECS = 15.0  # how long one may take,
DISCOVERY_FRESH_SECS = 600.0  # and how long it is good
DISCOVERED_MODELS = 5000  # of one provider
BACKLOG = 1024
LOG_QUEUE_LINES = 10_000  # lines waiting for a blocked terminal before they are counted and dropped
MCP_VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")  # the newest last
MCP_BATCH_VERSION, MCP_BATCH = "2025-03-26", 32  # the one with batches; messages in one
MCP_BODY_BYTES = 4 << 20
MCP_READ_BYTES = 1 << 20  # of each file of a capture that a tool reads,
MCP_TEXT_CHARS = 200_000  # and of what it makes of them
MCP_SESSIONS, MCP_IDLE_SECS = 64, 300.0
MCP_KEEPALIVE_SECS = 15.0



# ============================================================================
#  2  JSON
# ============================================================================
# Strict reading, compact writing, and changing one member of a document by
# position so that every other byte stays as it was. Knows no protocol.


def refuse_constant(name: str) -> Any:
    """Python reads NaN and Infinity; JSON does not know them (RFC 8259 6)."""
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    """A number with a fraction or an exponent; one beyond a float would be written back
    as Infinity."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite)
LENIENT_DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def load(raw: bytes, decoder: json.JSONDecoder = DECODER) -> Any:
    """The value of a UTF-8 JSON text; ValueError says what is wrong with it, and where."""
    try:
        text = raw.decode("utf-8")
        if text[:1] == "{":  # no blanks around it, as machines write: one step less for each body
            value, end = decoder.raw_decode(text)
            if end == len(text):
                return value
        return decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


# Made once, as dumps() does not.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dump(value: Any) -> bytes:
    """`value` as compact UTF-8 JSON, keys in their order;
    ValueError where it is nested too deeply."""
    try:
        text = ENCODER.encode(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; as an escape it survives
        return LONE_SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", text).encode("utf-8")


def number(value: Any) -> int:
    """A usage counter. Quirk(glm-5.1): some come as strings, some as null."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    return int(value) if type(value) in (int, float) and 0 <= value < 1 << 53 else 0


def word(value: Any) -> str | None:
    """A provider's short string; None for anything else."""
    return value[:OBSERVED_CHARS] if isinstance(value, str) and value else None


def text_of(value: Any) -> str:
    """A string, or an empty one for anything else."""
    return value if isinstance(value, str) else ""


def key_of(*values: Any) -> str | int | None:
    """The first of `values` that can tell one thing from another: a string or a whole number."""
    for value in values:
        if type(value) is int or (isinstance(value, str) and value):
            return value if isinstance(value, int) else value[:OBSERVED_CHARS]
    return None


def mapping(value: Any) -> Json:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """`value` if it is an array, else an empty one."""
    return value if isinstance(value, list) else []


def member_spans(text: str, name: str) -> list[tuple[int, int]]:
    """Where the values of the top-level member `name` stand in `text`, a valid JSON object.

    More than one span means the member is repeated, and readers differ in which one they take.
    """
    spans = []
    at = SPACE.match(text, SPACE.match(text, 0).end() + 1).end()  # type: ignore[union-attr]
    while text[at] != "}":
        key, at = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
        start = SPACE.match(text, SPACE.match(text, at).end() + 1).end()  # type: ignore[union-attr]
        _, end = DECODER.scan_once(text, start)  # type: ignore[attr-defined]
        if key == name:
            spans.append((start, end))
        at = SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[at] == ",":
            at = SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    return spans


def model_may_repeat(raw: bytes) -> bool:
    """Whether a glance at the bytes leaves it open that the member `model` is there twice."""
    # An escape \u006x can spell any letter of `model`; those are rare, so they pay for the full
    # look.
    return raw.count(b'"model"') != 1 or b"\\u006" in raw


def replace_member(raw: bytes, name: str, value: Any) -> bytes:
    """`raw` with the value of its top-level member `name` replaced, and no other byte changed."""
    text = raw.decode("utf-8")
    for start, end in reversed(member_spans(text, name)):
        text = text[:start] + dump(value).decode("utf-8") + text[end:]
    return text.encode("utf-8")


def put_member(raw: bytes, name: str, value: Any) -> bytes:
    """Like `replace_member`; a member that is not there,
    in an object that is not empty, is added in front."""
    text = raw.decode("utf-8")
    if member_spans(text, name):
        return replace_member(raw, name, value)
    head, _, rest = text.partition("{")
    return f"{head}{{{dump(name).decode()}:{dump(value).decode('utf-8')},{rest}".encode()



# ============================================================================
#  3  Errors
# ============================================================================
# What a client is told: what happened, whose fault, what to do; and the only
# code that renders it. Raised where it is noticed, caught at two edges: the
# server (an HTTP body or an SSE event) and `main` (one line, exit 1).

ABSENT: Any = object()

# The closed set of `type` values (contract 6.2). It may only grow.
INVALID_REQUEST = "invalid_request_error"
INTERNAL = "internal_error"
UPSTREAM_REQUEST = "upstream_request_error"
UPSTREAM = "upstream_error"
UPSTREAM_BODY_READ = "upstream_response_body_read_error"
UPSTREAM_EMPTY = "upstream_error_body_empty"
UPSTREAM_NON_JSON = "upstream_error_body_non_json"
UPSTREAM_UNKNOWN_SHAPE = "upstream_error_body_unknown_shape"
STREAM_TRANSLATION = "stream_translation_error"


class ProxyError(Exception):
    """Something a client is told; `fix` says what to do about it and ends the message.

    `code` and `param` appear only where given (a param of None is rendered as null), `fields` are
    extra header lines, `retry` False adds `x-should-retry: false`, which the official SDKs obey.
    `kind` is the provider's own type of it. `events` are what a client whose stream was translated
    gets before it. `details` are a native member of Anthropic's errors.
    """

    status, type = 500, INTERNAL

    def __init__(self, message: str, *, fix: str = "", status: int = 0, type: str = "",
                 code: str | None = None, param: Any = ABSENT, fields: Sequence[bytes] = (),
                 retry: bool = True, kind: str = "", events: Sequence[Json] = (),
                 details: Json | None = None) -> None:
        self.message = f"{message}; {fix}" if fix else message
        super().__init__(self.message)
        # the provider's own body, where the client knows its shape
        self.native: bytes | None = None
        self.status = status or self.status
        self.type = type or self.type
        self.code, self.param, self.fields, self.retry = code, param, fields, retry
        self.kind, self.events, self.details = kind, events, details

    def payload(self) -> Json:
        """The error object of the `json` format, keys in the order of the contract."""
        out: Json = {"message": self.message, "type": self.type}
        if self.code is not None:
            out["code"] = self.code
        if self.param is not ABSENT:
            out["param"] = self.param
        out["status"] = self.status
        return out


class RequestError(ProxyError):
    """The client's fault: refused before anything was sent upstream."""

    status, type = 400, INVALID_REQUEST


class SetupError(ProxyError):
    """A fault in the configuration that only a request brings to light;
    trying again cannot help."""

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message, retry=False, **more)


class UpstreamError(ProxyError):
    """The provider's fault, or that of the way there."""

    status, type = 502, UPSTREAM_REQUEST


class ConfigError(Exception):
    """Why the program cannot start: every fault of a configuration at once, one line each."""

    def __init__(self, faults: Sequence[str], hint: str = "") -> None:
        self.faults, self.hint = list(faults), hint
        super().__init__("\n".join([*self.faults, *([hint] if hint else [])]))


class FramingError(Exception):
    """Bytes that are not the HTTP they claim to be; `status` is what a server answers them with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# Types (OpenAI: and codes) of the vendors' own errors by status: translation-chat.md 1.8,
# -responses.md 1.9.
ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
                   403: "permission_error", 404: "not_found_error", 408: "timeout_error",
                   413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
                   504: "timeout_error", 529: "overloaded_error"}
OPENAI_TYPES = {401: ("authentication_error", "invalid_api_key"),
                402: ("insufficient_quota", "insufficient_quota"), 403: ("permission_error", None),
                413: ("invalid_request_error", "request_too_large"),
                429: ("rate_limit_error", "rate_limit_exceeded"),
                503: ("overloaded_error", "overloaded"), 504: ("server_error", "timeout"),
                529: ("overloaded_error", "overloaded")}
OVERLOADED = (503, 529)
CONTEXT_CODE = "context_length_exceeded"
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
# Types of both vendors (Anthropic's, OpenAI's) by code, for codes that say more than a status.
CODE_TYPES = {
    CONTEXT_CODE: ("invalid_request_error", "invalid_request_error"),
    "rate_limit_exceeded": ("rate_limit_error", "rate_limit_error"),
    **dict.fromkeys(QUOTA_CODES, ("billing_error", "insufficient_quota")),
    **dict.fromkeys(("overloaded", "server_is_overloaded", "slow_down"),
                    ("overloaded_error", "overloaded_error")),
}


def native_error(error: ProxyError, protocol: Protocol) -> Json:
    """The error body that the SDKs of `protocol` expect."""
    status, client_fault = error.status, 400 <= error.status < 500
    known = CODE_TYPES.get(error.code or "")
    if protocol is MESSAGES:
        kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if client_fault else "api_error")
        body = {"type": known[0] if known else kind, "message": error.message}
        return {"type": "error", "error": body | (
            {"details": error.details} if error.details else {})}
    kind, code = OPENAI_TYPES.get(
        status, ("invalid_request_error" if client_fault else "server_error", None))
    kind = known[1] if known else kind
    if status == 404 and "model" in error.message.lower():
        code = "model_not_found"
    if status in OVERLOADED and protocol is RESPONSES:
        code = "server_is_overloaded"  # what Codex looks for
    param = None if error.param is ABSENT else error.param
    return {"error": {"message": error.message, "type": kind, "param": param,
                      "code": error.code or code, "status": status}}


def render_error(error: ProxyError, style: str, protocol: Protocol | None) -> tuple[bytes, bytes]:
    """Content type and body of an error answer in the configured `style`: text, json or native.

    Where the path named no protocol there is no native shape, and `json` is used.
    """
    if error.native is not None:
        return b"application/json", error.native
    if style == "text":
        return b"text/plain; charset=utf-8", error.message.encode("utf-8", "replace")
    if style == "native" and protocol:
        return b"application/json", dump(native_error(error, protocol))
    return b"application/json", dump({"error": error.payload()})


def render_error_event(error: ProxyError, style: str, protocol: Protocol,
                       sequence: int | None = None, nested: bool = False) -> bytes:
    """The SSE event that tells a client of `protocol` that its stream has failed.

    A Responses client always gets the top-level shape of its own protocol (contract 7.7); `nested`
    adds the other one, where openai-python and Zed look.
    """
    if protocol is RESPONSES:
        told = native_error(error, protocol)["error"]
        body: Json = {"type": "error", "sequence_number": sequence, "code": error.code,
                      "message": error.message, "param": told.pop("param")}
        if nested:
            body["error"] = told
    elif style == "native":
        body = native_error(error, protocol)
        if protocol is CHAT:
            return b"data: " + dump(body) + b"\n\n"
    else:
        body = {"type": "error", "error": error.payload()}
    return b"event: error\ndata: " + dump(body) + b"\n\n"


def upstream_error(status: int, body: bytes, fields: Sequence[bytes] = ()) -> ProxyError:
    """A provider's non-2xx answer as an error for the client (contract 6.3).

    The message is the first of /error/message, /error, /detail, /message that exists; if that one
    is no string, only a /detail list of objects is still tried. Nothing is invented.
    """
    text = body.decode("utf-8", "replace").strip()

    def failed(type: str, message: str, **more: Any) -> ProxyError:
        retry = not (status == 402 or more.get("code") in QUOTA_CODES)
        return UpstreamError(message, status=status, type=type, fields=fields, retry=retry, **more)

    if not text:
        return failed(UPSTREAM_EMPTY, f"the provider answered {status} with an empty body")
    shown = text if len(text) <= ERROR_TEXT_CHARS else text[:ERROR_TEXT_CHARS] + "..."
    try:
        value = load(text.encode("utf-8"))
    except ValueError:
        return failed(UPSTREAM_NON_JSON,
                      f"the provider answered {status} with a body that is not JSON: {shown}")
    message = first_of(value, "/error/message", "/error", "/detail", "/message")
    if not isinstance(message, str):
        message = joined_detail(value)
    if message is None:
        return failed(UPSTREAM_UNKNOWN_SHAPE,
                      f"the provider answered {status} with an error of unknown shape: {shown}")
    code, param = first_of(value, "/error/code", "/code"), first_of(value, "/error/param", "/param")
    return failed(UPSTREAM, message, kind=text_of(first_of(value, "/error/type")),
                  code=code if isinstance(code, str) else None,
                  param=param if param is not ABSENT and fits(param) else ABSENT)


def fits(value: Any) -> bool:
    """Whether a provider's value is of a size to be repeated in an error."""
    for _ in range(32):  # it will stand deeper in the error, and depth is bounded too
        value = [value]
    try:
        return len(dump(value)) <= ERROR_TEXT_CHARS
    except ValueError:
        return False


def first_of(value: Any, *pointers: str) -> Any:
    """The value at the first of the JSON `pointers` that exists, else ABSENT."""
    for pointer in pointers:
        at = value
        for key in pointer[1:].split("/"):
            at = at.get(key, ABSENT) if isinstance(at, dict) else ABSENT
        if at is not ABSENT:
            return at
    return ABSENT


# What an error is about whatever its status, found in "status type code message" as providers
# write them, and the code that clients know it by. A rate limit that ends by itself is no spent
# quota, and a max_tokens that is too large no prompt that is.
CAUSES = tuple((code, re.compile(words, re.I | re.S)) for code, words in (
    (CONTEXT_CODE, r"(?!429 )(?!.*max_(?:completion_)?tokens\W* is too large).*(?:"
     r"context_length_exceeded|model_max_prompt_tokens_exceeded|exceed_context_size"
     r"|prompt is too long|exceed context limit|maximum context length|maximum prompt length"
     r"|available context size|(?:longer than|exceeds?) the (?:model's|maximum model|context)"
     r" (?:context )?(?:length|window)|exceeds the context window|prompt token count of"
     r"|input token count|input tokens exceed|exceeded model token limit)"),
    (QUOTA_CODES[0], rf"402 |.*(?:{'|'.join(QUOTA_CODES)}|exceeded_current_quota|billing_error)"
     r"|429 (?!.*(?:try again|retry) in\b).*(?:billing|credit)"),
    ("overloaded", r".*(?:overloaded_error|server_is_overloaded|slow_down|server_busy)"
     r"|(?:429|5\d\d) .*(?:overloaded|capacity|no healthy upstream)"),
))
OVERFLOW_WORDS = "the maximum context length of the model is exceeded: "
# Where a text on an overflow has the size of the prompt (N, or N + P) and the limit (M).
CONTEXT_SIZES = tuple(
    re.compile(re.sub("([NPM])", r"(?P<\1>[0-9][0-9,]{0,14})", words), re.I | re.S) for words in (
        r"\bN tokens > M\b",
        r"context limit: N \+ P > M\b",
        r"(?:length is|length of|limit of) M tokens.{1,60}?(?:resulted in|requested(?: a total of"
        r"| about)?|has|contains) N\b",
        r"\((?:length )?N(?: tokens)?\) .{1,60}?\(?M\b",
        r"count of N exceeds the limit of M\b",
        r"length is M\b.{1,60}?contains N\b",
        r"contains N tokens.{1,60}?model with M\b",
        r"token limit: M \(requested: N\b",
        r"(?:context|prompt) (?:length|window|size) (?:is|of) M\b",
    ))


def translated_error(error: ProxyError, protocol: Protocol, estimate: int = 0) -> ProxyError:
    """A provider's error for a client of another protocol, with the code, and for an overflow the
    words, that clients of `protocol` react to (translation-chat.md 1.8, -responses.md 1.9). Doing
    it twice changes nothing more.

    `estimate` is our own count of the prompt's tokens, for a provider that does not tell.
    """
    cause = cause_of(error)
    message, code = error.message, cause or error.code
    if cause and CODE_TYPES.get(error.code or "") == CODE_TYPES[cause]:
        code = error.code
    if cause == CONTEXT_CODE:
        message = overflow_message(error.message, protocol, estimate)
    elif cause == "overloaded" and protocol is RESPONSES:
        code = "server_is_overloaded"
    return UpstreamError(message, status=error.status, type=error.type, code=code,
                         param=error.param, fields=error.fields, kind=error.kind,
                         retry=error.retry and cause != QUOTA_CODES[0], events=error.events)


def cause_of(error: ProxyError) -> str | None:
    """What a provider's error is about whatever its status: the code of a row of CAUSES."""
    said = f"{error.status} {error.kind} {error.code or ''} {error.message}"[:ERROR_TEXT_CHARS]
    return next((code for code, words in CAUSES if words.match(said)), None)


def overflow_message(said: str, protocol: Protocol, estimate: int) -> str:
    """The words for a prompt that is too long. Claude Code makes room only when it reads exactly
    these, numbers included; others look for the words of OpenAI."""
    text = said[:ERROR_TEXT_CHARS]
    found = next(filter(None, (words.search(text) for words in CONTEXT_SIZES)), None)
    size = {name: int(digits.replace(",", "")) for name, digits in
            (found.groupdict() if found else {}).items()}
    limit, tokens = size.get("M", 0), size.get("N", 0) + size.get("P", 0)
    if protocol is not MESSAGES and not (limit and tokens):
        return OVERFLOW_WORDS + said.removeprefix(OVERFLOW_WORDS)
    tokens = max(tokens or estimate, limit + 1, 2)
    limit = limit or tokens - 1
    if protocol is MESSAGES:
        return f"prompt is too long: {tokens} tokens > {limit} maximum"
    return (f"This model's maximum context length is {limit} tokens. However, your messages"
            f" resulted in {tokens} tokens. Please reduce the length of the messages.")


def joined_detail(value: Any) -> str | None:
    """The texts of a FastAPI-style `detail` list, joined; None where there are none."""
    texts = [next((item[key] for key in ("msg", "message") if isinstance(item.get(key), str)), "")
             for item in map(mapping, listing(first_of(value, "/detail")))]
    return "; ".join(filter(None, texts)) or None



# ============================================================================
#  4  Routing
# ============================================================================
# From a model name and an inbound protocol to a provider and a model name to
# send. Pure; knows patterns and routes, does not know where routes come from.

LOOKS_GLOB = re.compile(r"[*?]")
LOOKS_REGEX = re.compile(r"^\^|\$$|[(\[|+\\]")
# What RE2 spells in another way than Python, (?<name> and $; escapes and classes are passed over.
FOREIGN_REGEX = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<(?![=!])|\$", re.DOTALL)
FOREIGN_SPELLINGS = {"(?<": "(?P<", "$": r"\Z"}
TEMPLATE_PART = re.compile(r"\$(?:\$|\{([0-9A-Za-z_]+)\}|([0-9A-Za-z_]+))")


class Route(NamedTuple):
    """A compiled route."""

    name: str | None
    protocol: str | None  # the inbound protocol it is only for
    pattern: re.Pattern[str]
    regex: bool  # whether `upstream_model` is a template over the pattern's groups
    provider: str
    upstream_model: str | None
    fallback: Sequence[tuple[str, str | None]] = ()  # providers, with models of their own


class Decision(NamedTuple):
    """Where a request goes; `model` is what the provider is asked for."""

    provider: str
    model: str
    route: str | None
    thinking: str = ""  # what a suffix asks for, see split_thinking()
    named: bool = False  # chosen by a name that the provider goes by
    tier: int = 0  # 1 and up for what is used only when all before it fail


class Names(NamedTuple):
    """The names that providers go by (gateway 1.2)."""

    published: Mapping[str, Sequence[tuple[str, str]]]  # folded name -> (provider, upstream model)
    listed: Mapping[str, str]  # name as clients see it -> the first provider that has it
    prefixes: Sequence[str]
    open: Sequence[tuple[str, str]]  # (prefix, provider): any model that is named so
    excluded: Mapping[str, Sequence[re.Pattern[str]]]  # models that a provider does not take
    forced: Sequence[str]  # providers that take nothing without their prefix

    def takes(self, provider: str, model: str) -> bool:
        """Whether a provider may be sent a model (named without a prefix)."""
        return not any(pattern.search(model) for pattern in self.excluded.get(provider, ()))


NO_NAMES = Names({}, {}, (), (), {}, ())
THINKING_SUFFIX = re.compile(
    r"(.*\S)\s*\((none|auto|-1|minimal|low|medium|high|xhigh|max|[0-9]{1,9})\)",
    re.IGNORECASE | re.DOTALL)


def pattern_kind(kind: str, pattern: str) -> str:
    """exact, glob or regex for a configured `match_kind`; auto looks at the pattern."""
    if kind != "auto":
        return kind
    return ("glob" if LOOKS_GLOB.search(pattern) else "regex" if LOOKS_REGEX.search(pattern)
            else "exact")


def compile_pattern(kind: str, pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression (re.error: what is wrong with it); exact and glob match
    whole names, regex searches; none minds case."""
    kind = pattern_kind(kind, pattern)
    if kind == "regex":
        source = FOREIGN_REGEX.sub(lambda m: FOREIGN_SPELLINGS.get(m[0], m[0]), pattern)
        return re.compile(source, re.IGNORECASE)
    sources = [re.escape(pattern)] if kind == "exact" else map(glob_source, expand_braces(pattern))
    return re.compile(rf"\A(?:{'|'.join(sources)})\Z", re.IGNORECASE | re.DOTALL | re.ASCII)


GLOB_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)  # a class is one token, whatever is in it


def expand_braces(pattern: str) -> list[list[str]]:
    """The tokens of the globs without {a,b} that a glob stands for."""
    done: list[list[str]] = []
    todo = [GLOB_TOKEN.findall(pattern)]
    while todo:
        if len(done) + len(todo) > GLOB_ALTERNATIVES:
            raise re.error(f"the {{ }} stand for more than {GLOB_ALTERNATIVES} patterns", pattern)
        tokens = todo.pop(0)
        close = tokens.index("}") if "}" in tokens else 0
        opens = [i for i in range(close) if tokens[i] == "{"]
        if opens:  # the innermost pair
            inside = tokens[opens[-1] + 1:close]
            commas = [-1, *(i for i, token in enumerate(inside) if token == ","), len(inside)]
            todo += [tokens[:opens[-1]] + inside[a + 1:b] + tokens[close + 1:]
                     for a, b in itertools.pairwise(commas)]
        elif "{" in tokens:
            raise re.error("the { has no }", pattern)
        else:
            done.append(tokens)
    return done


def glob_source(tokens: list[str]) -> str:
    """A glob as a regular expression: * ? [a-z] [!a-z]; a backslash is only itself. A * takes the
    first place that fits (an atomic group), so that many of them do not multiply the time."""
    parts = [""]  # between the stars
    for i, token in enumerate(tokens):
        if token == "*":
            parts.append("")
        elif token == "?":
            parts[-1] += "."
        elif token in ("[", "[]", "[!]"):
            raise re.error("the [ has no ]", "".join(tokens), len("".join(tokens[:i])))
        elif len(token) > 1:
            inside = re.sub(r"([\\\[\]&~|^])", r"\\\1", token[1:-1].removeprefix("!"))
            inside = inside.replace("--", "\\--")  # no set difference
            parts[-1] += f"[{'^' if token[1] == '!' else ''}{inside}]"
        else:
            parts[-1] += re.escape(token)
    if len(parts) == 1:
        return parts[0]
    return parts[0] + "".join(f"(?>.*?{part})" for part in parts[1:-1] if part) + ".*" + parts[-1]


def expand_template(template: str, match: re.Match[str]) -> str:
    """`template` with $1, $name, ${name} and $$ filled in; a group that is not there is empty."""
    def part(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        with contextlib.suppress(IndexError):
            return match[int(name) if name.isdigit() else name] or "" if name else "$"
        return ""

    return TEMPLATE_PART.sub(part, template)


def compile_routes(routes: Iterable[Any]) -> list[Route]:
    """The configured routes (see RouteConfig), ready to match."""
    return [Route(r.name, r.request_protocol, compile_pattern(r.match_kind, r.model_pattern),
                  pattern_kind(r.match_kind, r.model_pattern) == "regex",
                  r.provider, r.upstream_model,
                  [(f.provider, f.upstream_model) for f in r.fallback])
            for r in routes]


def matched(route: Route, protocol: str, model: str) -> tuple[re.Match[str] | None, bool, str]:
    """Where a route's pattern fits a model's name, whether the route takes the request, and what
    the name's suffix asks for: nothing where the route is for the name with its suffix."""
    base, wish = split_thinking(model)
    match = route.pattern.search(base)
    if match is None and wish:
        match, wish = route.pattern.search(model), ""
    return match, match is not None and route.protocol in (None, protocol), wish


def split_thinking(model: str) -> tuple[str, str]:
    """A model's name without its thinking suffix, and what that asks for: an effort level, none,
    auto, or a number of tokens (gateway 1.6); "gpt-5.5(High)" gives ("gpt-5.5", "high")."""
    match = THINKING_SUFFIX.fullmatch(model) if model.endswith(")") else None
    if match is None:
        return model, ""
    value = match[2].lower()
    value = str(int(value)) if value.isdigit() else value
    return match[1], {"-1": "auto", "0": "none"}.get(value, value)


def compile_names(providers: Mapping[str, Any], forced: bool) -> Names:
    """The names of the providers; with `forced`, one with a prefix takes nothing without it."""
    published: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    also: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)  # names behind an alias
    listed: dict[str, str] = {}
    excluded = {name: [compile_pattern("glob", glob) for glob in p.excluded_models]
                for name, p in providers.items() if p.excluded_models}
    prefixes = {name: f"{p.prefix}/" for name, p in providers.items() if p.prefix}
    for name, provider in providers.items():
        prefix = prefixes.get(name, "")
        for model in provider.models:
            shown = model.alias or model.name
            if any(pattern.search(shown) for pattern in excluded.get(name, ())):
                continue
            plain_too = not (forced and prefix) or provider.prefix == shown
            for lead in dict.fromkeys([prefix, *([""] if plain_too else [])]):
                if lead + shown.lower() not in published:
                    listed[lead + shown] = name
                for table, known in ((published, shown), (also, model.name)):
                    pool = table[lead + known.lower()]
                    pool += [(name, model.name)] if (name, model.name) not in pool else []
    names = Names({**also, **published}, listed, tuple(prefixes.values()),
                  [(prefix, name) for name, prefix in prefixes.items()
                   if not providers[name].models],
                  excluded, tuple(prefixes) if forced else ())
    return names if any(names) else NO_NAMES


def resolve_names(names: Names, model: str) -> list[Decision]:
    """All that a model may mean by the providers' names, the first choice first (gateway 1.2)."""
    base, thinking = split_thinking(model)
    if base.lower() == "auto" and "auto" not in names.published:
        base = next(iter(names.listed), base)
    for name, wish in dict.fromkeys([(base, thinking), (model, "")]):
        prefix = max((p for p in names.prefixes if name.startswith(p)), key=len, default="")
        found = names.published.get(prefix + name[len(prefix):].lower()) or [
            (provider, name[len(prefix):]) for prefix, provider in names.open
            if name.startswith(prefix) and name != prefix
            and names.takes(provider, name[len(prefix):])]
        if found:
            return [Decision(provider, sent, None, own or wish, True)
                    for provider, upstream in found for sent, own in [split_thinking(upstream)]]
    return []


def choose(routes: Sequence[Route], defaults: Mapping[str, str], protocol: str,
           model: str, names: Names = NO_NAMES) -> Decision:
    """The first of `choose_all`."""
    return choose_all(routes, defaults, protocol, model, names)[0]


def choose_all(routes: Sequence[Route], defaults: Mapping[str, str], protocol: str,
               model: str, names: Names = NO_NAMES) -> list[Decision]:
    """Where a request may go: by the first route that fits, with its fallbacks, else to the
    providers that go by the name, else to the protocol's default provider; else a ProxyError, which
    names a route whose pattern fits and whose protocol does not."""
    mismatch = None
    for route in routes:
        match, taken, wish = matched(route, protocol, model)
        if match and taken:
            return route_decisions(route, match, wish)
        mismatch = mismatch or (route if match else None)
    base, thinking = split_thinking(model)
    if names is not NO_NAMES and (found := resolve_names(names, model)):
        return found
    if mismatch:
        named = f"route `{mismatch.name}`" if mismatch.name else "a route without a name"
        raise SetupError(f"{named} matches the model {model}, but its request_protocol is"
                         f" {mismatch.protocol} and the request's protocol is {protocol}",
                         fix="remove request_protocol from the route, or change it")
    default = defaults.get(protocol)
    if names is not NO_NAMES and not (
            default and default not in names.forced and names.takes(default, base)):
        raise RequestError(f"unknown provider for model {model}", code="model_not_found",
                           param="model", fix="GET /v1/models lists the models")
    if not default:
        raise SetupError(f"no route takes the model {model} and"
                         f" routing.default_provider_names.{protocol} is not set",
                         fix="set that key, or routing.default_provider, to the name of a provider,"
                             " or add a route")
    return [Decision(default, base, None, thinking)]


def route_decisions(route: Route, match: re.Match[str], wish: str) -> list[Decision]:
    """Where a route that fits leads: to its provider, then to its fallbacks."""
    sent, own = match.string, ""
    if route.upstream_model is not None:  # a regex replaces only what it matched (contract 5.3)
        sent, own = split_thinking(
            sent[:match.start()] + expand_template(route.upstream_model, match) + sent[match.end():]
            if route.regex else route.upstream_model)
    out = [Decision(route.provider, sent, route.name, own or wish)]
    for tier, (provider, model) in enumerate(route.fallback, 1):
        base, own_wish = split_thinking(model) if model else (sent, own)
        out.append(Decision(provider, base, route.name, own_wish or wish, tier=tier))
    return out


def route_tries(routes: Sequence[Route], protocol: str, model: str) -> list[Json]:
    """What `choose` finds at each route, up to the one that takes the request."""
    tries: list[Json] = []
    for route in routes:
        match, taken, _ = matched(route, protocol, model)
        why = ("the pattern matches" if taken else "the pattern does not match" if not match else
               f"the pattern matches, but request_protocol is {route.protocol}")
        tries.append({"route": route.name, "takes": taken, "why": why})
        if taken:
            break
    return tries



# ============================================================================
#  5  Configuration
# ============================================================================
# The dataclasses below are the only place where a setting, its type, default,
# check and description stand: loading, the example file and the table of the
# README are made from them. Knows TOML and files; does not know sockets.

# -- kinds of values ---------------------------------------------------------

REQUIRED: Any = dataclasses.MISSING
PATTERN_FAULTS = (re.error, OverflowError, RecursionError)


class Kind(NamedTuple):
    """How a TOML value is checked: `read` gives what is kept; ValueError says what it must be."""

    wants: str
    read: Callable[[Any], Any]


def kind_of(wants: str, good: Callable[[Any], Any],
            keep: Callable[[Any], Any] = lambda value: value) -> Kind:
    """The kind of the values that `good` accepts without an error, kept as `keep` makes them."""
    def read(value: Any) -> Any:
        with contextlib.suppress(ValueError, *PATTERN_FAULTS):
            if good(value):
                return keep(value)
        raise ValueError(f"must be {wants}")

    return Kind(wants, read)


def text_of_kind(wants: str, good: Callable[[str], Any] = bool,
                 keep: Callable[[str], str] = str) -> Kind:
    """Like `kind_of`, for strings with something in them, without the blanks around it."""
    return kind_of(wants, lambda value: isinstance(value, str) and value.strip()
                   and good(value.strip()), lambda value: keep(value.strip()))


def whole(low: int, high: int = 1 << 62) -> Kind:
    """A whole number in a range."""
    return kind_of(f"a whole number from {low} to {high}" if high < 1 << 62
                   else f"a whole number, {low} or more",
                   lambda value: type(value) is int and low <= value <= high)


def choice(*allowed: str) -> Kind:
    """One of a few words."""
    return kind_of("one of " + ", ".join(f'"{word}"' for word in allowed),
                   lambda value: isinstance(value, str) and value in allowed)


def array_of(wants: str, read: Callable[[Any, str, Faults], Any]) -> Kind:
    """An array of what `read` makes of a value and its place, where it notes faults."""
    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"must be {wants}")
        faults = Faults()
        found = tuple(read(item, f"item {i}", faults) for i, item in enumerate(value))
        if faults:
            raise ValueError("; ".join(faults))
        return found

    return Kind(wants, read_all)


def several(kind: Kind) -> Kind:
    """An array of values of one kind."""
    def read(item: Any, place: str, faults: Faults) -> Any:
        try:
            return kind.read(item)
        except ValueError as error:
            faults.append(f"{place} {error}")

    return array_of(f"an array; each item {kind.wants}", read)


def tables_of(cls: type, bare: str, wants: str) -> Kind:
    """An array of tables of a schema class; a string stands for one that has only `bare`."""
    return array_of(wants, lambda item, place, faults: read_table(
        cls, {bare: item} if isinstance(item, str) else item, place, faults))


def plain(text: str) -> bool:
    """Whether a text can stand in a header field: one that cannot would silently not be sent."""
    return text.isascii() and text.isprintable() and " " not in text


def is_http_url(text: str) -> bool:
    """Whether a text is an absolute http or https URL; ValueError says no, too."""
    url = urlsplit(text)
    return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0


def is_base_url(text: str) -> bool:
    """Whether a text is a URL without a user name that can stand in a request."""
    return plain(text) and is_http_url(text) and "@" not in urlsplit(text).netloc


def is_proxy(text: str) -> bool:
    """Whether a text is a forward proxy's URL, or the word direct."""
    return text.lower() == "direct" or (is_http_url(text) and urlsplit(text).path in ("", "/")
                                        and text.isascii() and text.isprintable())


def is_origin(text: str) -> bool:
    """Whether a text is a browser origin as the Origin header spells it."""
    url = urlsplit(text.lower())
    return text.lower() == "null" or bool(url.scheme and url.netloc and not url.path)


def is_endpoint(text: str) -> bool:
    """Whether a text is a URL that secrets may be sent to (6749 3.2): https, or on this machine."""
    return is_base_url(text) and (text.lower().startswith("https:")
                                  or is_loopback(urlsplit(text).hostname or ""))


# but for what is ours to write: framing, the way there, the key
FIELD_NAME = re.compile(
    r"(?!(?i:host|connection|content-length|transfer-encoding|te|trailer|upgrade|expect|keep-alive"
    r"|proxy-.*|accept|accept-encoding|content-encoding|authorization|x-api-key|x-goog-api-key)\Z)"
    r"[A-Za-z0-9!#%&'*+.^_`|~-]+")


def is_headers(value: Any) -> bool:
    """Whether a value is a table of header fields that a user may set, or copy by $name."""
    return isinstance(value, dict) and all(
        FIELD_NAME.fullmatch(name) and isinstance(text, str)
        and text.strip() and text.isascii() and text.isprintable()
        and (text.strip()[0] != "$" or FIELD_NAME.fullmatch(text.strip()[1:]))
        for name, text in value.items())


HASHED_KEY = "sha256:"


def key_digest(key: str) -> bytes:
    """The hash of a client's key, which the configuration holds plain or hashed."""
    return (bytes.fromhex(key.removeprefix(HASHED_KEY)) if key.startswith(HASHED_KEY)
            else hashlib.sha256(key.encode("ascii")).digest())


def expiry_time(value: datetime.date) -> float:
    """When a date in a configuration is over, in seconds since 1970."""
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time()) + datetime.timedelta(days=1)
    return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()


def base_of(text: str) -> str:
    """A URL without its query, ending in a slash."""
    url = urlsplit(text)
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}/"


BOOLEAN = kind_of("true or false", lambda value: type(value) is bool)
TEXT = text_of_kind("a non-empty string")
# as it is; an empty one takes no model
PATTERN = kind_of("a string", lambda value: isinstance(value, str))
SECRET = text_of_kind("a non-empty string of printable ASCII without blanks", plain)
CLIENT_KEY = text_of_kind(
    f"a key of printable ASCII without blanks, or {HASHED_KEY} and the 64 hex digits of its hash",
    lambda text: plain(text) and (not text.startswith(HASHED_KEY)
                                  or re.fullmatch("[0-9a-fA-F]{64}", text[len(HASHED_KEY):])))
# a date ends with its day; what names no zone is UTC
EXPIRY = kind_of("a date or a date with a time, such as 2027-12-31",
                 lambda value: isinstance(value, datetime.date), expiry_time)
# a key that was put there by mistake mostly is none
VARIABLE = text_of_kind("the name of an environment variable",
                        re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch)
LABEL = text_of_kind("a non-empty name", keep=str.lower)
# compared without case, so kept in lower case; blank means none
NAME = kind_of("the name of a provider", lambda value: isinstance(value, str),
               lambda value: value.strip().lower())
# zero would mean `never` to some and `at once` to others, so it is refused
SECONDS = kind_of("a number of seconds, more than 0 and at most a year",
                  lambda value: type(value) in (int, float) and 0 < value <= 86400 * 366, float)
DELAY = kind_of("a number of seconds, 0 to a year",
                lambda value: type(value) in (int, float) and 0 <= value <= 86400 * 366, float)
ADDRESS = text_of_kind('an IP address such as "127.0.0.1"', ipaddress.ip_address,
                       lambda text: str(ipaddress.ip_address(text)))
URL = text_of_kind(
    'an absolute ASCII URL without a user name, such as "https://api.example.com/v1"', is_base_url,
    base_of)
PROXY = text_of_kind('"http://[user:password@]host:port", the same with https, or "direct"',
                     is_proxy, lambda text: "direct" if text.lower() == "direct" else text)
ENDPOINT = text_of_kind("an https URL, or an http one of this machine", is_endpoint)
COMMAND = kind_of("an array of strings: a program and its arguments",
                  lambda value: isinstance(value, list) and value and value[0]
                  and all(isinstance(item, str) and "\0" not in item for item in value), tuple)
HEADERS = kind_of("a table of header names with values of printable ASCII; those that carry a"
                  " key or frame the request can be neither set nor copied", is_headers,
                  lambda value: {name.lower(): text.strip() for name, text in value.items()})
TEXTS = kind_of("a table of strings", lambda value: isinstance(value, dict)
                and all(isinstance(item, str) for item in value.values()))
ORIGIN = text_of_kind('an origin such as "https://app.example.com", without a path', is_origin,
                      str.lower)
PROTOCOL = choice(*PROTOCOLS)
PREFIX = text_of_kind("a word in front of model names, without blanks and the slash behind it",
                      lambda text: plain(text) and not text.endswith("/"))
GLOB = text_of_kind('a glob such as "*-preview"', lambda text: compile_pattern("glob", text))
PRESET = text_of_kind("one of the names that `proxai.py presets` lists",
                      lambda text: text.lower() in PRESETS, str.lower)


class Section(NamedTuple):
    """A kind that is a table (`shape` one), one that may be missing (`shape` maybe), an array of
    tables (`shape` list) or named tables (`shape` dict)."""

    of: type
    shape: str = "one"


def setting(kind: Kind | Section, doc: str, default: Any = REQUIRED, *, example: Any = None,
            secret: bool = False) -> Any:
    """A field of the schema, with a value for the example file if that is not the default."""
    given: Json = {"default": default}
    if isinstance(kind, Section):
        given = {"default_factory": {"one": kind.of, "maybe": type(None), "list": tuple,
                                     "dict": dict}[kind.shape]}
    return dataclasses.field(**given, repr=not secret,
                             metadata={"kind": kind, "doc": doc, "example": example})


def maybe(doc: str, example: Any, kind: Kind = BOOLEAN, *, secret: bool = False) -> Any:
    """A field of the schema that has no default, with a value for the example file."""
    return setting(kind, doc, None, example=example, secret=secret)


# -- presets -----------------------------------------------------------------
# Where vendors and local servers are and how they want their keys; what they take is in the tables
# of section 9. Facts of 2026 that a provider's own settings override one by one.

class Preset(NamedTuple):
    """What `preset = "<name>"` fills in. `paths` says which protocols it speaks natively and
    where below `root`; what it does not speak is translated to the first one."""

    names: str  # the first one is listed, the others are as good
    root: str  # { } stands for what only its user knows, so base_url must be given
    paths: str  # "<protocol> <protocol> <path>, <protocol> <path>"
    variable: str = ""  # environment variable that usually holds the key
    note: str = ""
    auth: str = "bearer"  # none: a key is sent only where one is given
    traits: str = ""  # versionless; unlisted: /models does not name what can be asked for


PRESETS: dict[str, Preset] = {name: preset for preset in (
    Preset(*map(str.strip, row.split("|"))) for row in """\
anthropic claude | https://api.anthropic.com | messages /v1 | ANTHROPIC_API_KEY | | x-api-key
openai | https://api.openai.com | responses chat /v1 | OPENAI_API_KEY
gemini | https://generativelanguage.googleapis.com | chat /v1beta/openai | GEMINI_API_KEY
mistral | https://api.mistral.ai | chat /v1 | MISTRAL_API_KEY
groq | https://api.groq.com | responses chat /openai/v1 | GROQ_API_KEY
deepseek | https://api.deepseek.com | chat /v1, messages /anthropic/v1 | DEEPSEEK_API_KEY
openrouter | https://openrouter.ai | chat responses messages /api/v1 | OPENROUTER_API_KEY
together | https://api.together.ai | chat /v1 | TOGETHER_API_KEY
fireworks | https://api.fireworks.ai | chat responses messages /inference/v1 | FIREWORKS_API_KEY
novita | https://api.novita.ai | chat /openai/v1, messages /anthropic/v1 | NOVITA_API_KEY \
    | messages: not for all models
siliconflow | https://api.siliconflow.com | chat /v1 | SILICONFLOW_API_KEY \
    | China, with other keys: base_url = https://api.siliconflow.cn/v1
minimax | https://api.minimax.io | chat responses /v1, messages /anthropic/v1 | MINIMAX_API_KEY \
    | China: base_url = https://api.minimaxi.com/v1
moonshot kimi | https://api.moonshot.ai | chat responses /v1, messages /anthropic/v1 \
    | MOONSHOT_API_KEY | China, with other keys: base_url = https://api.moonshot.cn/v1
kimi-code | https://api.kimi.com | messages /coding/v1 | KIMI_API_KEY | the key of a subscription
zai | https://api.z.ai | chat /api/paas/v4, messages /api/anthropic/v1 | ZAI_API_KEY | | bearer \
    | unlisted
zai-coding | https://api.z.ai \
    | chat /api/coding/paas/v4, responses /api/v1, messages /api/anthropic/v1 | ZAI_API_KEY \
    | the key of a coding plan | bearer | unlisted
zhipu | https://open.bigmodel.cn | chat /api/paas/v4, messages /api/anthropic/v1 | ZHIPU_API_KEY \
    | China
xai | https://api.x.ai | responses chat /v1 | XAI_API_KEY
cerebras | https://api.cerebras.ai | chat /v1 | CEREBRAS_API_KEY
nvidia | https://integrate.api.nvidia.com | chat /v1 | NVIDIA_API_KEY
github-models | https://models.github.ai | chat /inference | GITHUB_TOKEN \
    | a token with the scope models | bearer | versionless
azure | https://{resource}.openai.azure.com | responses chat /openai/v1 | AZURE_OPENAI_API_KEY \
    | a model is the name of your deployment | api-key | unlisted
bedrock | https://bedrock-mantle.{region}.api.aws | responses chat /v1, messages /anthropic/v1 \
    | AWS_BEARER_TOKEN_BEDROCK | Bedrock API keys only
vertex | https://{region}-aiplatform.googleapis.com \
    | chat /v1/projects/{project}/locations/{region}/endpoints/openapi | \
    | the key is a token of one hour | bearer | versionless
huggingface | https://router.huggingface.co | chat /v1 | HF_TOKEN
deepinfra | https://api.deepinfra.com | chat /v1/openai | DEEPINFRA_API_KEY
alibaba | https://dashscope-intl.aliyuncs.com \
    | chat responses /compatible-mode/v1, messages /apps/anthropic/v1 | DASHSCOPE_API_KEY
opencode-zen | https://opencode.ai | chat responses messages /zen/v1 | OPENCODE_API_KEY \
    | each model speaks one of them: set protocol
chutes | https://llm.chutes.ai | chat /v1
poe | https://api.poe.com | chat /v1
cohere | https://api.cohere.ai | chat /compatibility/v1
vercel | https://ai-gateway.vercel.sh | chat messages /v1
baseten | https://inference.baseten.co | chat /v1
nebius | https://api.tokenfactory.nebius.com | chat /v1
llama | https://api.llama.com | chat /compat/v1
kilo | https://api.kilo.ai | chat responses messages /api/gateway | KILO_API_KEY | | bearer \
    | versionless
copilot | https://api.githubcopilot.com | chat / | \
    | private: documented for GitHub's own clients only; bring a token | bearer | versionless
kiro | http://{bridge} | chat messages /v1 | | private protocol: base_url is a bridge that you run
roo | https://api.roocode.com | chat /v1 | ROO_API_KEY | discontinued: the service ended in May 2026
ollama | http://localhost:11434 | chat responses messages /v1 | | | none
llamacpp | http://127.0.0.1:8080 | chat messages /v1 | | | none
vllm | http://localhost:8000 | chat responses messages /v1 | | | none
lmstudio | http://localhost:1234 | chat responses messages /v1 | | | none
mlx | http://127.0.0.1:8000 | chat /v1 | | Apple silicon | none
sglang | http://{host} | chat /v1 | | | none
tgi | http://{host} | chat /v1 | | | none
""".splitlines()) for name in preset.names.split()}


def preset_bases(preset: Preset, given: str | None) -> dict[str, str]:
    """The base URL for each protocol (by name) of a preset, the first one first; with one that
    is `given` the others move along where it has the preset's layout, else they are not there."""
    words = {p.word: name for name, p in PROTOCOLS.items()}
    paths = {words[word]: path for part in preset.paths.split(", ")
             for *each, path in [part.split()] for word in each}
    root, first = preset.root, next(iter(paths.values()))
    if given is not None:
        root = given.rstrip("/").removesuffix(first.rstrip("/"))
        if urlsplit(given).path.strip("/") and f"{root}/" == given:
            return {name: given for name, path in paths.items() if path == first}
    return {name: base_of(f"{root}{path}") for name, path in paths.items()}


# -- the schema --------------------------------------------------------------

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def schema(cls: type[T]) -> type[T]:
    """A table of the configuration: frozen, so that what was checked stays what is used."""
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)


@schema
class ProfileConfig:
    """What a provider takes, for translated requests. What is not set comes from a table of known
    hosts and models; pass-through never looks at it."""

    vision: bool | None = maybe("Images can be sent.", True)
    max_tokens_cap: int | None = maybe("Largest output limit that is sent.", 32000, whole(1))
    default_max_tokens: int | None = maybe(
        "messages: output limit when the client named none.", 32000, whole(1))
    web_search: str | None = maybe(
        "How web search is asked for.", "off", choice("off", "native", "options", "openrouter"))
    cache: str | None = maybe(
        "Prompt cache marks. messages: on sets them where the client has none; auto is on for"
        " api.anthropic.com. Others: on forwards the client's.", "auto", choice("off", "auto",
        "on"))
    vendor_fields: bool | None = maybe(
        "Fields that only the vendor itself takes (service_tier, prompt_cache_key, ...).", False)
    max_tokens_field: str | None = maybe(
        "chat: name of the output limit.", "max_tokens", choice("max_tokens",
        "max_completion_tokens"))
    reasoning_control: str | None = maybe(
        "chat: dialect of reasoning control.", "effort", choice("effort", "effort-basic",
        "effort-lowhigh", "openrouter", "deepseek", "kimi", "glm", "qwen", "groq", "mistral",
        "template"))
    reasoning_replay: str | None = maybe(
        "chat: field that takes back earlier reasoning; auto: the one it came in.", "auto",
        choice("none", "reasoning_content", "reasoning", "reasoning_details", "auto"))
    reasoning_required: str | None = maybe(
        "chat: assistant messages that must have it.", "off", choice("off", "calls", "all"))
    late_system: str | None = maybe(
        "chat: system messages within a conversation stay, or become reminders in user messages.",
        "fold", choice("keep", "fold"))
    tool_images: str | None = maybe(
        "chat: where images of tool results go.", "user", choice("user", "inline", "drop"))
    files: str | None = maybe("chat: file parts are taken.", "drop", choice("native", "drop"))
    json_schema: str | None = maybe(
        "chat: response_format that is taken.", "schema", choice("schema", "object"))
    stream_usage: bool | None = maybe("chat: stream_options.include_usage is taken.", True)
    top_k: bool | None = maybe("chat: top_k is taken.", True)
    call_ids: str | None = maybe(
        "chat: ids of tool calls: any, at most 40 characters, or exactly 9 letters and digits.",
        "any", choice("any", "40", "9"))
    parallel_tool_calls: bool | None = maybe("chat: parallel_tool_calls is taken.", True)
    strict_tools: bool | None = maybe("strict is taken on tools and schemas.", False)
    lenient_done: bool | None = maybe(
        "chat: [DONE] without a finish_reason ends a complete answer.", True)
    tool_arguments: str | None = maybe(
        "Arguments pass as they come, or repaired and whole.", "stream", choice("stream", "buffer"))
    think_tags: str | None = maybe(
        "chat: <think> at the start of a text is reasoning.", "auto", choice("auto", "off"))
    deferred_tools: str | None = maybe(
        "Which deferred tools are sent.", "referenced", choice("referenced", "all"))
    count_native: bool | None = maybe("chat, responses: the provider counts tokens itself.", False)
    custom_tools: bool | None = maybe("Custom (free text) tools are taken.", False)
    allowed_tools: bool | None = maybe("chat: tool_choice allowed_tools is taken.", False)
    model_class: str | None = maybe(
        "messages: class of Claude models, from K0 (3.5 and older) to K5 (newest); X is another"
        " model.", "K4", choice("K0", "K1", "K2", "K3", "K4", "K5", "X"))
    lenient_thinking: bool | None = maybe("messages: thinking without a signature is taken.", False)
    native_system: bool | None = maybe("messages: role system within messages is taken.", False)
    thinking_binding: bool | None = maybe("messages: thinking is bound to its prefix.", False)
    reasoning: bool | None = maybe("responses: the model reasons.", True)
    efforts: tuple[str, ...] | None = maybe(
        "responses: effort levels that are taken.", ["low", "medium", "high"],
        several(choice("none", "minimal", "low", "medium", "high", "xhigh", "max")))
    encrypted_reasoning: bool | None = maybe(
        "responses: encrypted reasoning can be asked for.", True)
    reasoning_summary: bool | None = maybe("responses: reasoning summaries can be asked for.", True)
    sampling: bool | None = maybe("responses: temperature and top_p are taken.", False)
    max_output_tokens: bool | None = maybe("responses: max_output_tokens is taken.", True)
    output_lists: bool | None = maybe("responses: tool outputs may have images.", True)
    phase: bool | None = maybe("responses: phase is taken on assistant messages.", False)


@schema
class OAuthConfig:
    """A key from an OAuth 2.0 server, by a client that is registered there for you. It is renewed
    before it expires; tokens are kept in the folder tokens of the app directory."""

    flow: str = setting(
        choice("device", "client_credentials", "refresh_token"), "How the first token is had:"
        " `proxai.py login PROVIDER` shows a code to confirm in a browser (RFC 8628), the client's"
        " own credentials, or a refresh token that you have.", example="device")
    token_url: str = setting(ENDPOINT, "The server's token endpoint.",
                             example="https://auth.example.com/token", secret=True)
    device_authorization_url: str | None = maybe(
        "device: the server's device authorization endpoint.", "https://auth.example.com/device",
        ENDPOINT, secret=True)
    client_id: str = setting(SECRET, "The client's id.", example="my-client")
    client_secret: str | None = maybe(
        "The client's secret, sent as HTTP Basic authentication. Public clients have none.",
        "my-secret", SECRET, secret=True)
    client_secret_env: str | None = maybe(
        "Environment variable that holds the secret.", "CLIENT_SECRET", VARIABLE, secret=True)
    scope: str | None = maybe(
        "What to ask for, with blanks between.", "models.read models.write", TEXT)
    refresh_token: str | None = maybe(
        "refresh_token: the token to begin with; where the server gives a new one, that one is"
        " kept.", "my-refresh-token", SECRET, secret=True)
    refresh_token_env: str | None = maybe(
        "Environment variable that holds the refresh token.", "REFRESH_TOKEN", VARIABLE,
        secret=True)
    parameters: dict[str, str] | None = maybe(
        "More members of the forms: audience, resource, or a client_secret where the server does"
        " not take it in the header.", {"audience": "https://api.example.com"}, TEXTS, secret=True)


@schema
class KeyConfig:
    """Where a key comes from, and how requests that carry it go out."""

    api_key: str | None = setting(
        SECRET, "The key, sent in the header the protocol wants. One of api_key, api_key_env,"
        " api_key_file, api_key_command and oauth must be given.", None, secret=True)
    api_key_env: str | None = maybe(
        "Environment variable that holds the key.", "OPENAI_API_KEY", VARIABLE, secret=True)
    api_key_file: str | None = maybe(
        "File that holds the key (~ is the home directory).", "~/.config/openai.key", TEXT)
    api_key_command: tuple[str, ...] | None = maybe(
        "Program that prints the key, run without a shell when a request needs it: plain, or a JSON"
        " object with token, access_token or api_key, and expires_in or expires_at. Run again when"
        " that time is near, and once when the provider answers 401.",
        ["gcloud", "auth", "print-access-token"], COMMAND, secret=True)
    oauth: OAuthConfig | None = setting(Section(OAuthConfig, "maybe"), "")
    proxy_url: str | None = maybe(
        "Forward proxy for this provider; \"direct\" ignores HTTPS_PROXY, HTTP_PROXY and"
        " ALL_PROXY.", "http://user:password@proxy.example.com:3128", PROXY, secret=True)
    headers: dict[str, str] | None = maybe(
        "Header fields of each request to the provider. A value that begins with $ is the client's"
        " header of that name; there is none where the client sent none.",
        {"x-team": "tools", "x-user": "$x-user"}, HEADERS, secret=True)


@schema
class CredentialConfig(KeyConfig):
    """One of several keys of a provider. Each has its own api_key, api_key_env, api_key_file,
    api_key_command or oauth, and may have its own proxy_url and headers; the provider has no key
    then."""

    name: str = setting(LABEL, "A name for logs and `login`.", example="work")
    priority: int = setting(whole(-1000, 1000), "Keys of a higher priority are used first.", 0)
    weight: int = setting(whole(0, 1_000_000),
                          "Share of the requests, among keys of the same priority.", 1)
    disabled: bool = setting(BOOLEAN, "Takes the key out of use.", False)


@schema
class NativeConfig:
    """Base URLs of further protocols that the provider speaks: a client of one of them is passed
    through, not translated. A preset fills them."""

    openai_responses: str | None = maybe(
        "For clients of Responses.", "https://api.example.com/v1", URL, secret=True)
    openai_chat_completions: str | None = maybe(
        "For clients of Chat Completions.", "https://api.example.com/v1", URL, secret=True)
    anthropic_messages: str | None = maybe(
        "For clients of Messages.", "https://api.example.com/anthropic/v1", URL, secret=True)


@schema
class ModelConfig:
    """A model that a provider goes by: clients ask for the alias, or the name without one."""

    name: str = setting(TEXT, "As the provider calls it; (high) and the like behind it sets the"
                              " reasoning effort.")
    alias: str | None = setting(TEXT, "As clients call it.", None)


@schema
class ProviderConfig(KeyConfig):
    """One place to send requests to. Its name is a label; `protocol` decides the wire format."""

    preset: str | None = maybe(
        "A vendor or local server that `proxai.py presets` lists: fills in what is not set of"
        " protocol, base_url, base_urls, auth, versionless and api_key_env. Not needed where the"
        " provider has a preset's name and neither protocol nor base_url.", "openrouter", PRESET)
    protocol: str = setting(PROTOCOL, "What the provider speaks. Required without a preset; with"
                            " one, the only protocol of it that is used.", None)
    base_url: str = setting(
        URL, "Where it is. The path of the protocol is appended; a version that is there already is"
        " not doubled. Required without a preset.", None, secret=True)
    base_urls: NativeConfig = setting(Section(NativeConfig), "Where it speaks further protocols.")
    versionless: bool | None = maybe(
        "The path of the protocol is appended without its /v1.", False, BOOLEAN)
    auth: str | None = maybe(
        "The header that carries the key. Not set: x-api-key for anthropic_messages, else bearer;"
        " none takes no key.", "bearer", choice("bearer", "x-api-key", "api-key", "x-goog-api-key",
        "none"))
    prefix: str | None = maybe(
        "Clients may ask for `prefix/model`; without models, for any model behind it.", "or",
        PREFIX)
    models: tuple[ModelConfig, ...] = setting(
        tables_of(ModelConfig, "name", "an array of names and of {name, alias}"), "Models that go"
        " to this provider when no route takes them: by alias or name, with the prefix or without.",
        (), example=["gpt-5.5", {"name": "gpt-5.5-mini", "alias": "fast"}])
    excluded_models: tuple[str, ...] = setting(
        several(GLOB), "Models that this provider is not asked for, as clients name them without"
        " the prefix. Routes do not look at this.", ())
    discover: bool | None = maybe(
        "Its own list of models is asked for when a client wants a list, unless models are set"
        " here. Not set: true, but for presets without a list.", False, BOOLEAN)
    response_model: str | None = maybe(
        "The model that answers name. Not set: the requested one where a name or a thinking suffix"
        " led here, else what the provider says.", "requested", choice("requested", "upstream"))
    compatibility: str = setting(
        choice("strict", "anthropic_compatible"), "Only for anthropic_messages:"
        " anthropic_compatible fills members that the vendor always sends and others leave out;"
        " strict leaves answers as they are.", "anthropic_compatible")
    connect_timeout_secs: float = setting(
        SECONDS, "Limit for DNS, TCP, proxy and TLS handshake together.", 10.0)
    read_idle_timeout_secs: float = setting(
        SECONDS, "Limit for silence: before the answer and between its bytes. Never for the whole"
        " answer.", 120.0)
    ca_file: str | None = maybe(
        "PEM file of certificates to trust beside the system's.", "/etc/ssl/company-ca.pem", TEXT)
    credentials: tuple[CredentialConfig, ...] = setting(Section(CredentialConfig, "list"), "")
    profile: ProfileConfig = setting(
        Section(ProfileConfig), "What the provider takes, where the table of hosts is wrong.")


@schema
class FallbackConfig:
    """A provider that is asked when those before it fail."""

    provider: str = setting(NAME, "Where the request goes.")
    upstream_model: str | None = setting(TEXT, "The model name to send instead.", None)


@schema
class RouteConfig:
    """Sends the models that match to a provider. The first route that fits wins."""

    name: str | None = setting(TEXT, "A name for logs and --route-override.", None)
    request_protocol: str | None = maybe(
        "Only for requests of this protocol.", RESPONSES.name, PROTOCOL)
    match_kind: str = setting(
        choice("auto", "exact", "glob", "regex"), "How model_pattern is read, never minding case."
        " auto: * or ? make a glob; ^ in front, $ behind or any of ( [ | + \\ a regex; else exact.",
        "auto")
    model_pattern: str = setting(PATTERN, "Which models, as the client names them.")
    provider: str = setting(NAME, "Where they go.")
    upstream_model: str | None = maybe(
        "The model name to send instead; with a regex $1, ${name} and $$ work.", "gpt-5.5", TEXT)
    fallback: tuple[FallbackConfig, ...] = setting(
        tables_of(FallbackConfig, "provider", "an array of providers and of {provider,"
                  " upstream_model}"), "Providers to ask when this one fails before the client has"
        " seen anything of an answer, in their order; also of other protocols.", (),
        example=["openai", {"provider": "local", "upstream_model": "qwen3-coder:30b"}])


@schema
class DefaultsConfig:
    """The provider of requests that no route takes, for each inbound protocol."""

    openai_responses: str = setting(NAME, "For /v1/responses.", "")
    openai_chat_completions: str = setting(NAME, "For /v1/chat/completions.", "")
    anthropic_messages: str = setting(NAME, "For /v1/messages.", "")


@schema
class RoutingConfig:
    """Which provider gets which request."""

    default_provider_names: DefaultsConfig = setting(
        Section(DefaultsConfig), "Used when no route takes a request.")
    default_provider: str = setting(
        NAME, "The provider of requests that no route takes, for protocols that have none of their"
        " own in default_provider_names.", "")
    force_model_prefix: bool = setting(
        BOOLEAN, "Providers with a prefix take only requests that name it.", False)
    strategy: str = setting(
        choice("round-robin", "weighted", "fill-first"), "Which of several keys, or of several"
        " providers of a model, is used next: each in turn, by weight, or the first until it"
        " rests.",
        "round-robin")
    session_affinity_secs: float = setting(
        DELAY, "How long a session without requests keeps its key, so that the provider's prompt"
        " cache stays warm; 0: each request is on its own.", 3600.0)
    probe_interval_secs: float = setting(
        DELAY, "A key whose provider said when it may be used again gets one request in this time"
        " before that; 0: none.", 3600.0)
    max_attempts: int = setting(
        whole(1, 100), "How often a request is tried, with several keys or providers.", 4)
    retry_budget_secs: float = setting(
        DELAY, "How long after its arrival a request is tried again.", 60.0)
    routes: tuple[RouteConfig, ...] = setting(Section(RouteConfig, "list"), "Tried from the top.")


@schema
class ClientKeyConfig:
    """A client's key with a name, and what it is good for."""

    name: str = setting(TEXT, "Who has it: what the log calls it.")
    key: str = setting(CLIENT_KEY, "The key, or its hash.", secret=True)
    models: tuple[str, ...] = setting(several(GLOB), "Models it may ask for; none: all.", ())
    requests_per_minute: int | None = setting(whole(1, 100_000), "How often.", None)
    expires: float | None = setting(EXPIRY, "How long.", None)


@schema
class ServerConfig:
    """The listener that clients talk to, and its limits."""

    host: str = setting(ADDRESS, "Address to listen on.", "127.0.0.1")
    port: int = setting(whole(0, 65535), "Port to listen on; 0 takes a free one.", 18080)
    api_keys: tuple[str, ...] = setting(
        several(CLIENT_KEY), "Keys clients must send (Authorization: Bearer, x-api-key or"
        " x-goog-api-key), plain or hashed. None here and in keys: no key is asked for.", (),
        secret=True)
    keys: tuple[ClientKeyConfig, ...] = setting(
        tables_of(ClientKeyConfig, "key", "an array of {name, key, models, requests_per_minute,"
        " expires}"), "More of them, with a name for the log and limits: models as globs, a number"
        " of requests per minute, the last day. Name and key are required.", (), secret=True,
        example=[{"name": "ci", "key": "replace-me", "models": ["gpt-*"], "requests_per_minute": 60,
                  "expires": datetime.date(2027, 12, 31)}])
    allow_unauthenticated: bool = setting(
        BOOLEAN, "Allows a host that is not loopback without api_keys or keys.", False)
    allowed_hosts: tuple[str, ...] = setting(
        several(TEXT), "Host names beside loopback ones that requests to a loopback listener may"
        " carry.", ())
    cors_allow_origins: tuple[str, ...] = setting(
        several(ORIGIN), "Browser origins that may call; all others are refused.", ())
    max_request_body_bytes: int = setting(whole(1), "Largest request body.", 52428800)
    max_concurrent_requests: int = setting(
        whole(1), "Requests waiting for a provider's answer at one time; more wait for their turn.",
        64)
    max_request_line_bytes: int = setting(whole(256), "Longest request line.", 8192)
    max_head_bytes: int = setting(whole(1024), "Largest request head.", 65536)
    max_headers: int = setting(whole(8), "Most header lines in a request.", 128)
    max_sse_event_bytes: int = setting(
        whole(1024), "Largest event that is looked into; larger ones pass unseen.", 16777216)
    head_timeout_secs: float = setting(
        SECONDS, "Limit for a request head once its first byte is there.", 30.0)
    body_timeout_secs: float = setting(SECONDS, "Limit for silence within a request body.", 60.0)
    keepalive_timeout_secs: float = setting(
        SECONDS, "How long an unused connection stays open.", 75.0)
    write_timeout_secs: float = setting(
        SECONDS, "How long a client may take no bytes of its answer.", 300.0)
    workers: int = setting(
        whole(1, 64), "Processes that share the listening socket (not on Windows). Each has its own"
        " control listener, at mcp.port and the ports after it.", 1)
    shutdown_delay_secs: float = setting(
        DELAY, "After SIGTERM or Ctrl-C: how long to go on accepting while /healthz says 503, so"
        " that a load balancer turns away first.", 0.0)
    shutdown_grace_secs: float = setting(
        SECONDS, "How long open requests may go on after SIGTERM or Ctrl-C.", 30.0)
    first_event_hold_secs: float = setting(
        SECONDS, "Translated streams: how long the 200 is held back for the first event, so that an"
        " early failure keeps its status.", 10.0)
    sse_keepalive_secs: float = setting(
        SECONDS, "Translated streams: a sign of life to the client after this much silence.", 15.0)


@schema
class ToolCallsConfig:
    """Watching tool calls that a provider streams."""

    timeout_secs: float = setting(
        SECONDS, "Ends a stream whose tool-call arguments began and then stopped coming.", 120.0)


@schema
class TranslationConfig:
    """Which pairs of protocols are translated."""

    extended_pairs: bool = setting(
        BOOLEAN, "Adds anthropic_messages -> openai_chat_completions and openai_chat_completions ->"
        " openai_responses.", False, example=True)


@schema
class ErrorsConfig:
    """How errors are told to clients."""

    format: str = setting(
        choice("text", "json", "native"), "text: the message; json: one shape for all; native: what"
        " the SDKs of the client's protocol expect.", "text", example="native")


@schema
class ThresholdsConfig:
    """Colour of durations on a terminal."""

    warn_ms: int = setting(whole(0), "Yellow from here.", 5000)
    error_ms: int = setting(whole(0), "Red from here.", 15000)


@schema
class LoggingConfig:
    """What is told on standard output, and in a file."""

    level: str = setting(
        choice("trace", "debug", "info", "warn", "error"), "Least important lines to print.",
        "info")
    output_format: str = setting(
        choice("human", "json"), "Lines for people or for programs.", "human")
    use_color: bool = setting(
        BOOLEAN, "Colour for human lines on a terminal, unless NO_COLOR is set.", True)
    file: str | None = maybe(
        "File for the same lines without colour: a path, or a name within the app directory's logs."
        " Each proxy needs a file of its own; further workers add their number.", "proxai.log",
        TEXT)
    file_max_bytes: int = setting(
        whole(1024), "Size at which the file becomes FILE.1 and a new one is begun.", 10485760)
    file_backups: int = setting(
        whole(1, 1000), "How many older files are kept, FILE.1 the newest.", 5)
    duration_thresholds: ThresholdsConfig = setting(
        Section(ThresholdsConfig), "Colour of durations.")


@schema
class CaptureConfig:
    """Which phases of an exchange are written to files, below the app directory. The files hold
    what was said."""

    inbound_request_enabled: bool = setting(BOOLEAN, "What the client sent.", False)
    provider_request_enabled: bool = setting(BOOLEAN, "What was sent to the provider.", False)
    upstream_response_enabled: bool = setting(BOOLEAN, "What the provider answered.", False)
    outbound_response_enabled: bool = setting(BOOLEAN, "What the client got.", False)
    max_files: int = setting(whole(16), "Files that are kept; the oldest exchanges go first.", 2000)
    max_total_bytes: int = setting(whole(1 << 20), "Bytes that are kept.", 1 << 30)


@schema
class McpConfig:
    """The control listener: MCP at /mcp, the page at /, /metrics and /status."""

    host: str = setting(ADDRESS, "Loopback address to listen on.", "127.0.0.1")
    port: int = setting(whole(0, 65535), "Port to listen on; 0 takes a free one.", 18081)


@schema
class Config:
    """A whole configuration, checked."""

    providers: dict[str, ProviderConfig] = setting(Section(ProviderConfig, "dict"), "")
    routing: RoutingConfig = setting(Section(RoutingConfig), "")
    server: ServerConfig = setting(Section(ServerConfig), "")
    tool_calls: ToolCallsConfig = setting(Section(ToolCallsConfig), "")
    translation: TranslationConfig = setting(Section(TranslationConfig), "")
    error_responses: ErrorsConfig = setting(Section(ErrorsConfig), "")
    logging: LoggingConfig = setting(Section(LoggingConfig), "")
    capture: CaptureConfig = setting(Section(CaptureConfig), "")
    mcp: McpConfig = setting(Section(McpConfig), "")


# -- loading -----------------------------------------------------------------

RECOVERY = ("compare the file with config.example.toml in the same directory, or move it away"
            " to regenerate defaults")


class Faults(list[str]):
    """All that is wrong with a configuration; `flags`: which flag set the value at a path."""

    def __init__(self, flags: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.flags = flags or {}

    def add(self, path: str, message: str) -> None:
        """Note one fault, naming the key and, where a flag set it, the flag."""
        flag = self.flags.get(path)
        self.append(f"{path}: {message}" + (f" (from {flag})" if flag else ""))

    def told(self, *starts: str) -> bool:
        """Whether a fault begins so; paths spell names as the file does."""
        return any(fault.lower().startswith(starts) for fault in self)


def load_config(text: str, source: str, *, environ: Mapping[str, str] = os.environ,
                overrides: Callable[[Json], Sequence[Override]] = lambda tables: ()) -> Config:
    """The configuration in a TOML `text` with the `overrides` for its tables; ConfigError lists
    every fault with its full path and `source`."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{source}: not valid TOML: {error}"], RECOVERY) from None
    faults = Faults(apply_overrides(tables, overrides(tables)))
    config = cross_check(read_table(Config, tables, "", faults), faults, environ)
    if faults:
        raise ConfigError([f"{source}: {fault}" for fault in faults], RECOVERY)
    return config


def read_table(cls: Any, table: Any, path: str, faults: Faults) -> Any:
    """An instance of the schema class `cls`; for a faulty value, shown unless it is secret, the
    default stands in."""
    if not isinstance(table, dict):
        faults.add(path, f"must be a table ([{path}])")
        table = {}
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in [key for key in table if key not in known]:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "the keys here are " + ", ".join(known)
        faults.add(join_path(path, key), f"unknown key; {hint}")
    values = {}
    for name, field in known.items():
        here, kind = join_path(path, name), field.metadata["kind"]
        if isinstance(kind, Section):
            if name in table:
                values[name] = read_section(kind, table[name], here, faults)
            continue
        values[name] = None if field.default is REQUIRED else field.default
        if name in table:
            try:
                values[name] = kind.read(table[name])
            except ValueError as error:
                shown = field.repr and not isinstance(table[name], dict)
                faults.add(here, f"{error}, is {short(table[name])}" if shown else f"{error}")
        elif field.default is REQUIRED:
            faults.add(here, f"is missing; must be {kind.wants}")
    return cls(**values)


def read_section(kind: Section, value: Any, path: str, faults: Faults) -> Any:
    """The table, the tables of an array, or the named tables at `path`."""
    if kind.shape in ("one", "maybe"):
        return read_table(kind.of, value, path, faults)
    if kind.shape == "list":
        if not isinstance(value, list):
            faults.add(path, f"must be an array of tables ([[{path}]])")
            return ()
        return tuple(read_table(kind.of, item, f"{path}[{i}]", faults)
                     for i, item in enumerate(value))
    if not isinstance(value, dict):
        faults.add(path, f"must be a table of tables ([{path}.<name>])")
        return {}
    named: Json = {}
    for label, item in value.items():
        name = label.strip().lower()
        if not name or name in named:
            faults.add(f"{path}.{label}", "a name must be non-empty and, without case, unique")
        named[name] = read_table(kind.of, item, f"{path}.{label}", faults)
    return named


def join_path(path: str, key: str) -> str:
    """The full path of `key` in the table at `path`."""
    return f"{path}.{key}" if path else key


def short(value: Any) -> str:
    """A configuration value as a fault shows it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def cross_check(config: Config, faults: Faults, environ: Mapping[str, str]) -> Config:
    """Note what is wrong between settings; `config` with its keys read from where they are."""
    routes, defaults = config.routing.routes, config.routing.default_provider_names
    if not config.providers:
        faults.add("providers", "at least one provider is needed ([providers.<name>])")
    fallback = config.routing.default_provider
    named = [("default_provider", fallback or None)]
    named += [(f"default_provider_names.{protocol}", getattr(defaults, protocol) or None)
              for protocol in PROTOCOLS]
    named += [(f"routes[{i}].{place}", name) for i, r in enumerate(routes) for place, name in [
        ("provider", r.provider), *(("fallback", f.provider) for f in r.fallback)]]
    for path, name in named:
        if name is not None and name not in config.providers:
            faults.add(f"routing.{path}", f"no provider is named {name or '(blank)'} (there are:"
                                          f" {', '.join(config.providers) or 'none'})")
    for i, route in enumerate(routes):
        if route.name and route.name in [earlier.name for earlier in routes[:i]]:
            faults.add(f"routing.routes[{i}].name",
                       f"`{route.name}` names an earlier route too; names must be unique")
        try:
            compile_pattern(route.match_kind, route.model_pattern or "")
        except PATTERN_FAULTS as error:
            faults.add(f"routing.routes[{i}].model_pattern",
                       f"invalid route: the pattern {route.model_pattern} does not work: {error}")
    check_listeners(config, faults)
    providers = {name: with_keys(with_preset(provider, name, faults, environ),
                                 f"providers.{name}", faults, environ)
                 for name, provider in config.providers.items()}
    names = DefaultsConfig(**{name: getattr(defaults, name) or fallback for name in PROTOCOLS})
    return dataclasses.replace(config, providers=providers, routing=dataclasses.replace(
        config.routing, default_provider_names=names))


def check_listeners(config: Config, faults: Faults) -> None:
    """A listener that others can reach needs keys; control is never one (rulings 11, 5)."""
    server = config.server
    digests = [key_digest(key) for key in (*dict.fromkeys(server.api_keys), *(
        key.key for key in server.keys if key.key))]
    template = "still holds a template key; replace it"
    for wrong, path, message in (
        (not (is_loopback(server.host) or server.api_keys or server.keys
              or server.allow_unauthenticated), "server.host",
         f"{server.host} can be reached from other machines: set server.api_keys, or"
         " server.allow_unauthenticated = true if that is what you want"),
        (any(map(TEMPLATE_KEY.search, server.api_keys)), "server.api_keys", template),
        (any(TEMPLATE_KEY.search(key.key or "") for key in server.keys), "server.keys", template),
        (len({key.name for key in server.keys}) < len(server.keys), "server.keys",
         "two keys have the same name; names must be unique"),
        (len(set(digests)) < len(digests), "server.keys", "a key is there twice, or in"
         " server.api_keys too, and only the limits of the first one would hold"),
        (not is_loopback(config.mcp.host), "mcp.host",
         f"must be a loopback address, is {config.mcp.host}"),
        (server.workers > 1 and not hasattr(os, "fork"), "server.workers",
         "several processes need a system with fork; use 1 here"),
        (config.mcp.port and config.mcp.port + server.workers > 65536, "mcp.port",
         f"leaves no port for each of {server.workers} workers"),
    ):
        if wrong:
            faults.add(path, message)


def with_preset(provider: ProviderConfig, name: str, faults: Faults,
                environ: Mapping[str, str]) -> ProviderConfig:
    """`provider` with what its preset says of what the file does not set."""
    path = f"providers.{name}"
    kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(provider)
             if field.name in ("protocol", "base_url") and getattr(provider, field.name) is None}
    preset = PRESETS.get(provider.preset or (name if len(kinds) == 2 else ""))
    if preset is None:
        for field, kind in kinds.items():
            if not faults.told(f"{path}.{field}:", f"{path}.preset:"):
                faults.add(f"{path}.{field}", f"is missing; must be {kind.wants}, or set preset")
        return provider
    bases = preset_bases(preset, provider.base_url)
    if provider.base_url is None and "{" in preset.root:
        form = base_of(next(iter(bases.values()))).rstrip("/")
        faults.add(f"{path}.base_url", f"is missing; for this preset it has the form {form}")
    protocol = provider.protocol or next(iter(bases))
    base_url = provider.base_url or bases.get(protocol, "")
    if not base_url:
        faults.add(f"{path}.protocol", f"the preset speaks {', '.join(bases)}")
    if provider.protocol is None:
        urls = bases | {name: url for name in PROTOCOLS
                        if (url := getattr(provider.base_urls, name))}
        provider = dataclasses.replace(provider, base_urls=NativeConfig(**urls))
    keyed = bool(provider.credentials or given_of(provider, KEY_SOURCES))
    if not keyed and preset.variable in environ:
        provider = dataclasses.replace(provider, api_key_env=preset.variable)
    auth = "bearer" if preset.auth == "none" and keyed else preset.auth
    return dataclasses.replace(
        provider, protocol=protocol, base_url=base_url, auth=provider.auth or auth,
        discover=provider.discover if provider.discover is not None
        else "unlisted" not in preset.traits, versionless=provider.versionless
        if provider.versionless is not None else "versionless" in preset.traits)


def native_urls(provider: ProviderConfig) -> dict[str, str]:
    """The base URL for each protocol that a provider speaks, by the protocol's name."""
    urls = {name: url for name in PROTOCOLS if (url := getattr(provider.base_urls, name))}
    return urls | {provider.protocol: provider.base_url}


def wire_protocol(provider: ProviderConfig, inbound: str) -> str:
    """The protocol that a provider is asked in: the client's own where it speaks that."""
    return inbound if inbound in native_urls(provider) else provider.protocol


def with_keys(provider: ProviderConfig, path: str, faults: Faults,
              environ: Mapping[str, str]) -> ProviderConfig:
    """`provider` with its key or keys read from where they are kept."""
    if provider.ca_file is not None:
        try:
            ssl.create_default_context(cafile=str(Path(provider.ca_file).expanduser()))
        except (OSError, ValueError) as error:
            faults.add(f"{path}.ca_file", f"cannot be used: {error}")
    several = provider.credentials
    if not several:
        return with_key(provider, path, faults, environ)
    for source in given_of(provider, KEY_SOURCES):
        faults.add(f"{path}.{source}", "goes into a table of credentials where there are any")
    for i, credential in enumerate(several):
        if credential.name in [earlier.name for earlier in several[:i]]:
            faults.add(f"{path}.credentials[{i}].name",
                       f"`{credential.name}` names an earlier one too; names must be unique")
    if all(credential.disabled for credential in several):
        faults.add(f"{path}.credentials", "all are disabled")
    return dataclasses.replace(provider, credentials=tuple(
        with_key(credential, f"{path}.credentials[{i}]", faults, environ)
        for i, credential in enumerate(several)))


KEY_SOURCES = ("api_key", "api_key_env", "api_key_file", "api_key_command", "oauth")
K = TypeVar("K", bound=KeyConfig)


def given_of(table: Any, names: Sequence[str]) -> list[str]:
    """Those of the settings `names` that a table has and that are set."""
    return [name for name in names if getattr(table, name, None) is not None]


def with_key(table: K, path: str, faults: Faults, environ: Mapping[str, str]) -> K:
    """`table` with the secrets of its one key source read from where they are kept."""
    sources = given_of(table, KEY_SOURCES)
    told = faults.told(f"{path}.api_key", f"{path}.oauth")
    if not sources and getattr(table, "auth", None) == "none":
        return table
    if len(sources) != 1 and not told:
        preset = PRESETS.get(getattr(table, "preset", None) or path.removeprefix("providers."))
        usual = (f", or set {preset.variable} in the environment" if preset and preset.variable
                 else "")
        faults.add(f"{path}.api_key", f"is missing; give one of {', '.join(KEY_SOURCES)}{usual}"
                   if not sources else "give only one of " + ", ".join(sources))
    if len(sources) != 1 or told:
        return table
    if table.oauth is None:
        key = secret_of(table, "api_key", path, faults, environ)
        return dataclasses.replace(table, api_key=key)
    oauth, path = table.oauth, f"{path}.oauth"
    for flow, needed in (("device", "device_authorization_url"),
                         ("refresh_token", "refresh_token")):
        if oauth.flow == flow and not given_of(oauth, (needed, f"{needed}_env")):
            faults.add(f"{path}.{needed}", f'is missing; flow = "{flow}" needs it')
    return dataclasses.replace(table, oauth=dataclasses.replace(
        oauth, client_secret=secret_of(oauth, "client_secret", path, faults, environ),
        refresh_token=secret_of(oauth, "refresh_token", path, faults, environ)))


def secret_of(table: Any, name: str, path: str, faults: Faults,
              environ: Mapping[str, str]) -> str | None:
    """The secret `name` of a table from the one place that was named; a fault is noted."""
    sources = given_of(table, (name, f"{name}_env", f"{name}_file"))
    if len(sources) > 1:
        faults.add(f"{path}.{name}", "give only one of " + ", ".join(sources))
    if len(sources) != 1:
        return None
    source, value = sources[0], getattr(table, sources[0])
    try:
        if source.endswith("_file"):
            value = SECRET.read(Path(value).expanduser().read_text("utf-8-sig"))
        elif source.endswith("_env"):
            if value not in environ:
                raise ValueError(f"the environment variable {value} is not set")
            value = SECRET.read(environ[value])
        return str(value)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        faults.add(f"{path}.{source}", f"no key from there: {reason}")
        return None


class Credential(NamedTuple):
    """One key of a provider and how requests with it go out, ready to be chosen from."""

    provider: str
    name: str
    path: str  # in the configuration
    source: KeyConfig
    proxy_url: str | None
    ca_file: str | None
    headers: Mapping[str, str]
    priority: int = 0
    weight: int = 1

    @property
    def dynamic(self) -> bool:
        """Whether the key is fetched while the program runs."""
        return bool(self.source.api_key_command or self.source.oauth)

    @property
    def label(self) -> str:
        """How messages name it."""
        return (f"provider `{self.provider}`" if self.name == self.provider
                else f"provider `{self.provider}`, credential `{self.name}`")


def credentials_of(name: str, settings: ProviderConfig) -> tuple[Credential, ...]:
    """The keys of a provider that are in use, the highest priority first."""
    common = settings.headers or {}
    if not settings.credentials:
        return (Credential(name, name, f"providers.{name}", settings, settings.proxy_url,
                           settings.ca_file, common),)
    found = [Credential(name, c.name, f"providers.{name}.credentials[{i}]", c,
                        c.proxy_url or settings.proxy_url, settings.ca_file,
                        {**common, **(c.headers or {})}, c.priority, c.weight)
             for i, c in enumerate(settings.credentials) if not c.disabled]
    return tuple(sorted(found, key=lambda credential: -credential.priority))


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only be this machine."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# A key that was never replaced: refused when a request would use it.
TEMPLATE_KEY = re.compile(
    r"(?i)^<.*>$|your[-_ ]?(api[-_ ]?)?key|replace[-_ ]?me|change[-_ ]?me|\.\.\.$|x{6,}")


# -- overrides from the command line -----------------------------------------

class Override(NamedTuple):
    """A value that a flag puts in place of the file's; `at` is a path into the TOML tables."""

    flag: str
    at: tuple[str | int, ...]
    value: Any  # None removes the key


def apply_overrides(tables: Json, overrides: Sequence[Override]) -> dict[str, str]:
    """Change `tables` in place; returns which flag is behind which path, for error messages."""
    flags = {}
    for flag, at, value in overrides:
        here: Any = tables
        for key in at[:-1]:
            here = here.setdefault(key, {}) if isinstance(here, dict) else here[key]
        if not isinstance(here, dict):
            continue  # the file's own fault, reported with its path
        if value is None:
            here.pop(at[-1], None)
        else:
            here[at[-1]] = value
        flags["".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in at)[1:]] = flag
    return flags


ROUTE_FIELDS = tuple(f.name for f in dataclasses.fields(RouteConfig) if f.name != "name")


def route_override(spec: str, tables: Json) -> Override:
    """The override that `--route-override ROUTE.FIELD=VALUE` asks for, else a ConfigError."""
    selector, equals, value = spec.partition("=")
    route, dot, field = (part.strip() for part in selector.partition("."))
    allowed = {"request_protocol": (*PROTOCOLS, ""),
               "match_kind": ("auto", "exact", "glob", "regex")}.get(field, ())
    value = value.strip().lower() if allowed else value.strip()
    found = [i for i, r in enumerate(listing(mapping(tables.get("routing")).get("routes")))
             if isinstance(name := mapping(r).get("name"), str) and name.strip() == route]
    for wrong, why in (
        (not equals or not dot, "the form is ROUTE.FIELD=VALUE"),
        (not route or not field, "ROUTE and FIELD must both be non-empty"),
        (field not in ROUTE_FIELDS, f"the field {field} is not one of {', '.join(ROUTE_FIELDS)}"),
        (not found, f"no route is named {route}"),
        (len(found) > 1, f"the route name {route} is not unique"),
        (allowed and value not in allowed, f"{value or 'an empty value'} is not one of"
                                           f" {', '.join(filter(None, allowed))}"),
    ):
        if wrong:
            raise ConfigError([f"cannot apply --route-override {spec}: {why}"])
    clears = field in ("request_protocol", "upstream_model") and not value
    return Override(f"--route-override {spec}", ("routing", "routes", found[0], field),
                    None if clears else value)


# -- the example file and the documentation ----------------------------------

KEY_HERE = "replace-me"
EXAMPLE_PROVIDERS: dict[str, Json] = {
    "openai": {"protocol": RESPONSES.name, "base_url": "https://api.openai.com/v1",
               "api_key": KEY_HERE},
    "minimax_chat": {"protocol": CHAT.name, "base_url": "https://api.minimaxi.com/v1",
                     "api_key": KEY_HERE},
    "anthropic": {"protocol": MESSAGES.name, "base_url": "https://api.anthropic.com",
                  "api_key": KEY_HERE, "compatibility": "strict"},
}
EXAMPLE_DEFAULTS = {given["protocol"]: name for name, given in EXAMPLE_PROVIDERS.items()}
EXAMPLE_ROUTES: list[Json] = [
    {"name": "openai", "model_pattern": "gpt-*", "provider": "openai"},
    {"name": "mimo_chat_ant", "model_pattern": "mimo-*", "provider": "anthropic"},
    {"name": "minimax_chat", "model_pattern": "MiniMax-*", "provider": "minimax_chat"},
]
EXAMPLE_COMMENTED_ROUTES: list[Json] = [
    {"name": "fast", "match_kind": "exact", "model_pattern": "fast", "provider": "openai",
     "upstream_model": "gpt-5.5-mini"},
    {"name": "mini", "match_kind": "regex",
     "model_pattern": r"^gpt-(?<major>\d+)-(?<minor>\d+)-mini$",
     "provider": "openai", "upstream_model": "gpt-$major.$minor-mini"},
]


def toml_value(value: Any) -> str:
    """`value` as TOML."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {toml_value(v)}" for name, v in value.items()) + " }"
    if isinstance(value, str) and "\\" in value and "'" not in value:
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False)


def wrapped(text: str) -> list[str]:
    """`text` as comment lines."""
    return textwrap.wrap(" ".join(text.split()), 98, initial_indent="# ", subsequent_indent="# ",
                         break_long_words=False, break_on_hyphens=False)


def fields_of(cls: Any, told: Sequence[Any] = ()) -> list[Any]:
    """The fields of a schema class that were not `told`; where it has a base its own required ones
    come first."""
    return sorted((field for field in dataclasses.fields(cls) if field not in told),
                  key=lambda field: issubclass(cls, KeyConfig) and field.default is not REQUIRED)


def example_table(cls: Any, path: str, given: Json, *, brief: bool = False,
                  frame: str = "[{}]", told: Sequence[Any] = (), tables: bool = True) -> list[str]:
    """One table of the example file and, with `tables`, those within it: every key that was not
    `told` under its description, unset ones commented out; if `brief`, only the `given` ones."""
    lines = ["", *([] if brief else wrapped(cls.__doc__)), frame.format(path)]
    inner: list[str] = []
    fields = fields_of(cls, told)
    for field in fields:
        name, kind, example = field.name, field.metadata["kind"], field.metadata["example"]
        if (brief and name not in given) or (isinstance(kind, Section) and not tables):
            continue
        if isinstance(kind, Section):
            frame = "[[{}]]" if kind.shape == "list" else "[{}]"
            table = example_table(kind.of, f"{path}.{name}", {}, frame=frame, told=fields)
            inner += table if kind.shape == "one" else [
                line if line.startswith("#") or not line else f"# {line}" for line in table]
            continue
        if not brief:
            allowed = f" ({kind.wants})" if kind.wants.startswith("one of") else ""
            lines += wrapped(field.metadata["doc"] + allowed)
        unset = name not in given and (field.default in (None, REQUIRED)
                                       or (field.default == () and example is not None))
        shown = (name if unset else field.default) if example is None else example
        lines.append(f"{'# ' if unset else ''}{name} = {toml_value(given.get(name, shown))}")
    return lines + inner


def example_toml() -> str:
    """The text of config.example.toml, made from the schema."""
    lines = wrapped("ProxAI configuration. Replace the keys of the providers you use, remove the"
                    " others, and run: python proxai.py --config config.toml. Lines that start with"
                    " # show settings that are not set.")
    for i, (name, given) in enumerate(EXAMPLE_PROVIDERS.items()):
        lines += example_table(ProviderConfig, f"providers.{name}", given, brief=i > 0)
    lines += example_table(RoutingConfig, "routing", {}, tables=False)
    lines += example_table(DefaultsConfig, "routing.default_provider_names", EXAMPLE_DEFAULTS)
    route = functools.partial(example_table, RouteConfig, "routing.routes", frame="[[{}]]")
    for i, given in enumerate(EXAMPLE_ROUTES):
        lines += route(given, brief=i > 0)
    for given in EXAMPLE_COMMENTED_ROUTES:
        lines += ["", *(f"# {line}" for line in route(given, brief=True)[1:])]
    for field in dataclasses.fields(Config):
        if field.name not in ("providers", "routing"):
            lines += example_table(field.metadata["kind"].of, field.name, {})
    return "\n".join(lines) + "\n"


def settings_rows(cls: Any = Config, path: str = "",
                  told: Sequence[Any] = ()) -> Iterator[tuple[str, str, str, str]]:
    """(key, default, what it must be, description) of every setting that was not `told`."""
    fields = fields_of(cls, told)
    for field in fields:
        kind, here = field.metadata["kind"], join_path(path, field.name)
        if isinstance(kind, Section):
            yield from settings_rows(
                kind.of, here + {"list": "[]", "dict": ".<name>"}.get(kind.shape, ""), fields)
        else:
            default = "required" if field.default is REQUIRED else "" if field.default is None \
                else toml_value(field.default)
            yield here, default, kind.wants, field.metadata["doc"]


# -- the app directory -------------------------------------------------------


def app_directory(environ: Mapping[str, str]) -> Path:
    """Where the app directory is: under HOME, else USERPROFILE, else what the system says."""
    home = environ.get("HOME") or environ.get("USERPROFILE") or os.path.expanduser("~")
    if not home or home == "~":
        raise ConfigError(["there is no home directory for the app directory; set HOME, or use"
                           " --config"])
    return Path(home) / APP_DIRECTORY


def bootstrap(environ: Mapping[str, str]) -> tuple[Path, bool]:
    """Make what is missing of the app directory; where it is, and if its config.toml is new."""
    base, created = app_directory(environ), False
    try:
        for folder in (base, base / "logs", base / "captures", base / "diagnostics"):
            folder.mkdir(mode=0o700, parents=folder == base, exist_ok=True)
        for name in ("config.example.toml", "config.toml"):
            with contextlib.suppress(FileExistsError):
                # it will hold keys
                handle = os.open(base / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                    file.write(example_toml())
                created = name == "config.toml"
    except OSError as error:
        raise ConfigError([f"cannot create the app directory {base}: {error.strerror}"]) from None
    return base, created


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put data into a file of the app directory or of a folder in it, in one step, for its owner
    alone unless `mode` says more."""
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    fresh.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.chmod(mode)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)



# ============================================================================
#  6  HTTP grammar
# ============================================================================
# HTTP/1.1 heads, framing and bodies for both roles, as functions and machines
# over bytes (RFC 9110, 9112). No socket, no protocol of ours. What is ambiguous
# is a FramingError, never repaired: that is where requests are smuggled.

# -- heads -------------------------------------------------------------------

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)")
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
TARGET = re.compile(rb"(?:(?i:https?)://([^/?#]+)|(?=/))(/[^?#]*)?(\?[^#]*)?")
BARE_LF = re.compile(rb"(?<!\r)\n")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")


class Field(NamedTuple):
    """One header line: the name in lower case, the value without blanks around it,
    the line as it came."""

    name: bytes
    value: bytes
    line: bytes


class RequestHead(NamedTuple):
    """What a server needs to know of a request; `length` is None for a chunked body."""

    method: bytes
    path: str
    query: str  # with its "?" when there is one
    http11: bool
    host: str  # without the port; "" when an HTTP/1.0 client sent none
    fields: list[Field]
    length: int | None
    keep_alive: bool
    expects_continue: bool
    values: dict[bytes, bytes]  # by name; of a repeated header the last


class ResponseHead(NamedTuple):
    """What a client needs to know of a response; `length` is None for chunked, -1 for
    "until the end"."""

    status: int
    fields: list[Field]
    length: int | None
    keep_alive: bool
    values: dict[bytes, bytes]  # by name; of a repeated header the last


class HeadLimits(NamedTuple):
    """How large a head may be."""

    line_bytes: int = 8192
    head_bytes: int = 65536
    fields: int = 128


# What is wrong with a header line, the first that fits, in words that show none of it.
FIELD_FAULTS = tuple((re.compile(pattern, re.DOTALL), fault) for pattern, fault in (
    (rb"[ \t]", "it starts with a blank (a folded line)"),
    (rb"[^:]*\Z", "it has no colon"),
    (rb"(?!" + TOKEN + rb":)", "its name has a blank or another forbidden character"),
    (rb".*[\r\n]", "it has a bare CR or LF"),
    (rb"", "its value has a control character")))


field_cache: dict[bytes, Field] = {}


def parse_field(line: bytes) -> Field:
    """One header line; FramingError for anything but `token: value` in one line (9112 5).

    Peers send the same lines with every request, so a line that was read once is not read again.
    """
    found = field_cache.get(line)
    if found is not None:
        return found
    match = FIELD_LINE.fullmatch(line)
    if match is None:
        raise FramingError("a header line is malformed: "
                           + next(fault for sign, fault in FIELD_FAULTS if sign.match(line)))
    field = Field(match[1].lower(), match[2].rstrip(b" \t"), line)
    if len(line) <= FIELD_CACHE_BYTES:
        if len(field_cache) >= FIELD_CACHE_LINES:
            field_cache.clear()
        field_cache[line] = field
    return field


def parse_fields(block: bytes, limits: HeadLimits) -> list[Field]:
    """The header lines of a head, `block` being what stands between its first line and
    the empty one."""
    if not block:
        return []
    lines = block.split(b"\r\n")
    if len(lines) > limits.fields:
        raise FramingError(f"more than {limits.fields} header lines", 431)
    cached = field_cache.get
    return [cached(line) or parse_field(line) for line in lines]


def check_unfinished(data: bytes, limits: HeadLimits, scanned: int = 0) -> None:
    """Refuse the beginning of a request head that no further bytes could make right; the first
    `scanned` bytes were looked at before."""
    end = data.find(b"\r\n", 0, limits.line_bytes + 2)
    if (len(data.removesuffix(b"\r")) if end < 0 else end) > limits.line_bytes:
        raise FramingError(f"the request line is longer than {limits.line_bytes} bytes", 414)
    if len(data) > limits.head_bytes + 3:  # three bytes of the empty line may be there
        raise FramingError(f"the request head is larger than {limits.head_bytes} bytes", 431)
    if data[:1] == b"\x16":
        raise FramingError("this looks like TLS; the proxy speaks plain HTTP, use http:// in the"
                           " client's base URL")
    if BARE_LF.search(data, max(scanned - 1, 0)):
        raise FramingError("a line ends in a bare LF")


def parse_request_head(block: bytes, limits: HeadLimits) -> RequestHead:
    """A request head without its final empty line; FramingError carries the status to
    answer with."""
    line, _, rest = block.partition(b"\r\n")
    if len(line) > limits.line_bytes or not line.endswith((b"HTTP/1.1", b"HTTP/1.0")):
        check_unfinished(block, limits)
    if len(block) > limits.head_bytes:
        raise FramingError(f"the request head is larger than {limits.head_bytes} bytes", 431)
    read_line = parse_request_line if len(line) <= CACHED_BYTES else parse_request_line.__wrapped__
    method, path, query, authority, http11 = read_line(line)
    fields = parse_fields(rest, limits)
    values = field_values(fields)
    host = values.get(b"host")
    if host is None and http11:
        raise FramingError("the Host header is missing")
    if len(host or b"") > CACHED_BYTES:
        raise FramingError("the Host header is longer than any name")
    named = parse_host(host or b"")
    if authority is not None:
        named = parse_host(authority)  # 9112 3.2.2: an absolute target beats the Host header
    if not http11 and b"transfer-encoding" in values:
        raise FramingError("HTTP/1.0 has no Transfer-Encoding")
    return RequestHead(method, path, query, http11, named, fields, body_length(values, 0),
                       persists(values, http11), expects_continue(values.get(b"expect"), http11),
                       values)


@functools.lru_cache(maxsize=256)
def parse_request_line(line: bytes) -> tuple[bytes, str, str, bytes | None, bool]:
    """Method, path, query with "?", authority of an absolute-form target,
    and whether it is HTTP/1.1."""
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise FramingError("the request line is malformed")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise FramingError(f"HTTP/{major.decode()}.{minor.decode()} is not spoken here,"
                           " use HTTP/1.1", 505)
    return method, *split_target(method, target), minor != b"0"


# Headers that say where a message ends or whom it is for: which of two a peer means is anybody's
# guess.
SINGLE_FIELDS = (b"host", b"content-length", b"transfer-encoding", b"expect", b"origin")


def field_values(fields: Sequence[Field]) -> dict[bytes, bytes]:
    """Header values by name; several Connection headers are joined,
    several of SINGLE_FIELDS refused."""
    values = {name: value for name, value, _ in fields}
    if len(values) != len(fields):
        names = [field.name for field in fields]
        for name in SINGLE_FIELDS:
            if names.count(name) > 1:
                raise FramingError(f"there is more than one {name.decode().title()} header")
        if b"connection" in values:
            values[b"connection"] = b",".join(f.value for f in fields if f.name == b"connection")
    return values


def split_target(method: bytes, target: bytes) -> tuple[str, str, bytes | None]:
    """Path, query with "?", and the authority of an absolute-form target (9112 3.2)."""
    if (method, target) == (b"OPTIONS", b"*") or (method == b"CONNECT" and HOST.fullmatch(target)):
        return target.decode("ascii"), "", None  # these forms name no resource here
    match = TARGET.fullmatch(target)
    if match is None:
        raise FramingError("the request target has a fragment" if b"#" in target
                           else "the request target is malformed")
    authority, path, query = match.groups()
    return (path or b"/").decode("ascii"), (query or b"").decode("ascii"), authority


@functools.lru_cache(maxsize=256)
def parse_host(value: bytes) -> str:
    """The name of a Host header without its port, in lower case."""
    match = HOST.fullmatch(value)
    if match is None:
        raise FramingError("the Host header is malformed")
    return match[1].decode("ascii").lower()


# 9112 6.3: without chunked as the last coding the length is anybody's guess
CHUNKED_LAST = re.compile(rb"(?i)(?:(?!chunked\b)" + TOKEN + rb"[ \t]*,[ \t]*)+chunked")


def body_length(values: Mapping[bytes, bytes], unsaid: int) -> int | None:
    """How long a body is: None for chunked, `unsaid` where the head does not tell (9112 6.3)."""
    length, encoding = values.get(b"content-length"), values.get(b"transfer-encoding")
    if encoding is None:
        return unsaid if length is None else parse_length(length)
    if length is not None:
        raise FramingError("there are both Content-Length and Transfer-Encoding")
    if encoding.lower() != b"chunked":
        raise FramingError("the only Transfer-Encoding understood here is a single chunked",
                           501 if CHUNKED_LAST.fullmatch(encoding) else 400)
    return None


def parse_length(value: bytes) -> int:
    """A Content-Length: digits and nothing else."""
    if not value.isdigit():  # bytes.isdigit() knows ASCII digits only
        raise FramingError("the Content-Length is not a number")
    if len(value) > 18:
        raise FramingError("the Content-Length is beyond any limit", 413)
    return int(value)


def persists(values: Mapping[bytes, bytes], http11: bool) -> bool:
    """Whether the connection goes on after this message (9112 9.3)."""
    if b"connection" not in values:
        return http11
    options = connection_options(values)
    return b"close" not in options and (http11 or b"keep-alive" in options)


def connection_options(values: Mapping[bytes, bytes]) -> frozenset[bytes]:
    """What the Connection header lists: options, and names of headers for this hop only
    (9110 7.6.1)."""
    listed = values.get(b"connection")
    if listed is None:
        return frozenset()
    return frozenset(option.strip().lower() for option in listed.split(b","))


def expects_continue(expect: bytes | None, http11: bool) -> bool:
    """Whether the client waits for a 100 before it sends the body (9110 10.1.1)."""
    if expect is None or not http11:
        return False
    if expect.lower() != b"100-continue":
        raise FramingError("the only Expect understood here is 100-continue", 417)
    return True


@functools.lru_cache(maxsize=64)
def parse_status_line(line: bytes) -> tuple[bool, int]:
    """Whether an answer is HTTP/1.1, and its status."""
    match = STATUS_LINE.fullmatch(line)
    if match is None:
        raise FramingError("the status line is malformed")
    return match[1] != b"0", int(match[2])


ANSWER_LIMITS = HeadLimits(fields=RESPONSE_HEAD_FIELDS)


def parse_response_head(block: bytes) -> ResponseHead:
    """A provider's response head without its final empty line, as strict as a request's."""
    line, _, rest = block.partition(b"\r\n")
    if len(line) > CACHED_BYTES:
        raise FramingError("the status line is too long")
    http11, status = parse_status_line(line)
    fields = parse_fields(rest, ANSWER_LIMITS)
    values = field_values(fields)
    empty = status < 200 or status in (204, 304)
    size = 0 if empty and b"transfer-encoding" not in values else body_length(values, -1)
    # 9112 6.1: Transfer-Encoding in HTTP/1.0 is a fault of the peer's; its connection is not used
    # again
    keeps = size != -1 and persists(values, http11) and (http11 or size is not None)
    return ResponseHead(status, fields, 0 if empty else size, keeps, values)


REASONS = {status.value: status.phrase.encode() for status in HTTPStatus} | {529: b"Overloaded"}


def format_lines(*lines: bytes) -> bytes:
    """Lines of a head with the empty one that ends it."""
    return b"\r\n".join((*lines, b"", b""))


def format_head(status: int, lines: Iterable[bytes]) -> bytes:
    """A response head, final empty line included."""
    return format_lines(b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b"")), *lines)


DAYS, MONTHS = "MonTueWedThuFriSatSun", "JanFebMarAprMayJunJulAugSepOctNovDec"
HTTP_DATE = re.compile(
    r"[A-Z][a-z]{2}, (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d):(\d\d):(\d\d) GMT", re.A)


@functools.lru_cache(maxsize=2)
def http_date(at: int) -> bytes:
    """A Unix time as the Date header writes it (9110 5.6.7), whatever the locale."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(at)
    name, moon = DAYS[3 * weekday:3 * weekday + 3], MONTHS[3 * month - 3:3 * month]
    return f"{name}, {day:02d} {moon} {year} {hour:02d}:{minute:02d}:{second:02d} GMT".encode()


def parse_http_date(text: str) -> float | None:
    """The Unix time of such a date; None for anything else."""
    found = HTTP_DATE.fullmatch(text)
    if found is None or found[2] not in MONTHS:
        return None
    day, year, *clock = map(int, found.group(1, 3, 4, 5, 6))
    return iso_time(f"{year:04d}-{MONTHS.index(found[2]) // 3 + 1:02d}-{day:02d}"
                    f"T{clock[0]:02d}:{clock[1]:02d}:{clock[2]:02d}")


def iso_time(text: str) -> float | None:
    """The Unix time of an RFC 3339 text, UTC where it names no zone; None for anything else."""
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return at.replace(tzinfo=at.tzinfo or datetime.UTC).timestamp()


# -- bodies ------------------------------------------------------------------

class LengthDecoder:
    """A body of a declared length: `feed` returns the payload in what came,
    `rest` is what lies behind it."""

    __slots__ = ("finished", "left", "rest")

    def __init__(self, length: int) -> None:
        self.left, self.rest, self.finished = length, b"", length == 0

    def feed(self, data: bytes) -> bytes:
        """The part of `data` that belongs to the body."""
        if len(data) < self.left:
            self.left -= len(data)
            return data
        data, self.rest = data[:self.left], data[self.left:]
        self.left, self.finished = 0, True
        return data

    def close(self) -> None:
        """The peer has closed: an error unless the body is whole."""
        if not self.finished:
            raise FramingError(f"the connection closed {self.left} bytes before the end of"
                               f" the body")


class EndDecoder:
    """A body that ends with the connection."""

    __slots__ = ("finished", "rest")

    def __init__(self) -> None:
        self.finished, self.rest = False, b""

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data

    def close(self) -> None:
        """The end."""
        self.finished = True


QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
CHUNK_EXTENSIONS = (rb"(?:[ \t]*;[ \t]*" + TOKEN
                    + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + QUOTED + rb"))?)*")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:" + CHUNK_EXTENSIONS + rb")?")
CHUNK_LINE_BEGINNING = re.compile(rb"[0-9A-Fa-f]{1,15}(?:[ \t;\r]|$)")
chunk_sizes: dict[bytes, int] = {}


def parse_chunk_size(line: bytes) -> int:
    """The size on a chunk's line, without its CRLF. Streams repeat few sizes,
    so short lines are remembered."""
    match = CHUNK_LINE.fullmatch(line) if len(line) <= CHUNK_LINE_BYTES else None
    if match is None:
        raise FramingError("a chunk size is malformed")
    size = int(match[1], 16)
    if len(line) <= 8:
        if len(chunk_sizes) >= FIELD_CACHE_LINES:
            chunk_sizes.clear()
        chunk_sizes[line] = size
    return size


class ChunkDecoder:
    """A chunked body (9112 7.1), strict: `feed` returns the payload in what came,
    `rest` is what lies behind.

    Extensions and trailers are checked and dropped. Between feeds only an unfinished line is kept.
    """

    __slots__ = ("finished", "left", "line", "rest", "trailer_bytes", "trailers")

    def __init__(self) -> None:
        self.left = 0  # of the open chunk, its final CRLF included
        self.line = b""  # an unfinished chunk line or trailer line
        self.rest = b""
        self.trailers = self.finished = False
        self.trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; FramingError as soon as the bytes cannot be right."""
        if self.line:
            data, self.line = self.line + data, b""
        out: list[bytes] = []
        at = self.open_chunk(data, 0, out) if self.left else 0
        size = len(data)
        find, starts, sizes = data.find, data.startswith, chunk_sizes
        while at < size and not self.trailers:
            end = find(b"\r\n", at)
            if end < 0:
                self.keep_line(data[at:])
                break
            line = data[at:end]
            length = sizes[line] if line in sizes else parse_chunk_size(line)
            at = end + 2
            if length == 0:
                self.trailers = True
            elif starts(b"\r\n", end := at + length):  # the whole chunk is here: the common case
                out.append(data[at:end])
                at = end + 2
            else:
                self.left = length + 2
                at = self.open_chunk(data, at, out)
        if self.trailers:
            self.read_trailers(data, at)
        return out[0] if len(out) == 1 else b"".join(out)

    def open_chunk(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Take what `data` has of the chunk that `left` counts; returns where it ends."""
        have = min(self.left, len(data) - at)
        payload = min(have, max(self.left - 2, 0))
        if payload:
            out.append(data[at:at + payload])
        if have > payload:  # bytes of the final CRLF
            ending = data[at + payload:at + have]
            if not b"\r\n"[2 - (self.left - payload):].startswith(ending):
                raise FramingError("a chunk is longer than its size says")
        self.left -= have
        return at + have

    def keep_line(self, line: bytes) -> None:
        """Hold an unfinished chunk line back, unless it can never become one."""
        size = len(line.removesuffix(b"\r"))
        if b"\n" in line or size > CHUNK_LINE_BYTES or not CHUNK_LINE_BEGINNING.match(line):
            raise FramingError("a chunk size is malformed")
        self.line = line

    def read_trailers(self, data: bytes, at: int) -> None:
        """Check trailer lines up to the empty one, and set `rest` behind it."""
        while not self.finished:
            end = data.find(b"\r\n", at)
            if end < 0:
                self.line = data[at:]
                size = len(self.line.removesuffix(b"\r"))
                if size and self.trailer_bytes + size + 2 > TRAILER_BYTES:
                    raise FramingError("the trailers are too large", 431)
                if b"\n" in self.line:
                    raise FramingError("a trailer line ends in a bare LF")
                return
            if end == at:
                self.rest, self.finished = data[end + 2:], True
                return
            self.trailer_bytes += end + 2 - at
            if self.trailer_bytes > TRAILER_BYTES:
                raise FramingError("the trailers are too large", 431)
            parse_field(data[at:end])
            at = end + 2

    def close(self) -> None:
        """The peer has closed: an error unless the final chunk was there."""
        if not self.finished:
            raise FramingError("the connection closed before the final chunk")


BodyDecoder = LengthDecoder | ChunkDecoder | EndDecoder


def body_decoder(length: int | None) -> BodyDecoder:
    """The machine for a body of that `length` as heads give it: None chunked, -1 until the end."""
    return (ChunkDecoder() if length is None else EndDecoder() if length < 0
            else LengthDecoder(length))


class Inflater:
    """A gzip or deflate body that nobody asked for, unpacked with a limit on how much may come of
    how little."""

    def __init__(self, coding: bytes) -> None:
        self.coding, self.read, self.written = coding.decode(), 0, 0
        # 32 + 15 takes gzip and zlib; "deflate" without the zlib wrapper exists in the wild
        self.machine = zlib.decompressobj(32 + zlib.MAX_WBITS)

    def feed(self, data: bytes) -> bytes:
        """What `data` unpacks to; FramingError if it is damaged or a bomb."""
        if not self.read and data and self.coding == "deflate" and data[0] & 0x0F != 8:
            self.machine = zlib.decompressobj(-zlib.MAX_WBITS)
        self.read += len(data)
        out = []
        while data:
            if self.machine.eof:
                if self.coding == "deflate":
                    raise FramingError("the deflate body has bytes behind its end")
                # the next member (RFC 1952 2.2)
                self.machine = zlib.decompressobj(32 + zlib.MAX_WBITS)
            allowed = INFLATE_FREE_BYTES + INFLATE_RATIO * self.read - self.written
            try:
                out.append(self.machine.decompress(data, max(allowed, 1)))
            except zlib.error:
                raise FramingError(f"the {self.coding} body is damaged") from None
            if self.machine.unconsumed_tail:
                raise FramingError(f"the {self.coding} body unpacks to more than"
                                   f" {INFLATE_RATIO} times its size")
            self.written += len(out[-1])
            data = self.machine.unused_data
        return b"".join(out)

    def close(self) -> None:
        """The body is over: an error unless the compressed data is."""
        if not self.machine.eof:
            raise FramingError(f"the {self.coding} body is cut short")


INFLATABLE = (b"gzip", b"x-gzip", b"deflate")



# ============================================================================
#  7  Event streams
# ============================================================================
# Bytes to server-sent events and back, by the WHATWG rules, at any split of
# the bytes. No protocol is known here: a payload is text. Nothing waits.

LINE_END = re.compile(r"\r\n|\n|\r")
# Two line ends make a blank line. Atomic, so that one CRLF is never taken for two ends.
BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One server-sent event; `name` is `message` where the stream gave none."""

    name: str
    data: str


class EventSplitter:
    """Cuts a stream behind its last blank line, so that what is handed on holds whole events only.

    `feed` returns the bytes up to there, unchanged; the unfinished tail waits. An event above
    `limit` bytes is handed on in pieces: then `whole_from` is where in the returned block whole
    events begin.
    """

    __slots__ = ("after_cr", "limit", "oversize", "parts", "size", "whole_from")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[bytes] = []  # of the unfinished event, joined once
        self.size = self.whole_from = 0
        self.oversize = False  # whether pieces of the unfinished event were handed on already
        # whether an LF that comes next belongs to a line end that was handed on
        self.after_cr = False

    def feed(self, data: bytes) -> bytes:
        """All whole events that are complete with `data`, or b""."""
        if not self.parts and data.endswith(b"\n\n") and b"\r" not in data:
            self.whole_from = 0
            return data  # whole events only: how nearly all providers send
        if not data:
            return b""
        lead = b""
        if self.after_cr and data.startswith(b"\n"):
            lead, data = b"\n", data[1:]
        # A blank line can begin up to three bytes (CR LF CR) before what is new.
        before = b"".join(self.parts[-3:])[-3:] if self.parts else b""
        cut = last_blank_line(before + data) - len(before)
        if cut <= 0:
            if data:
                self.parts.append(data)
                self.size += len(data)
            self.after_cr = self.after_cr and not lead and not data
            self.whole_from = len(lead)
            return lead + self.spill() if self.size > self.limit else lead
        block, rest = lead + b"".join((*self.parts, data[:cut])), data[cut:]
        self.parts, self.size = [rest] if rest else [], len(rest)
        self.after_cr = not rest and block.endswith(b"\r")
        self.whole_from = 0
        if self.oversize:
            blank = BLANK_LINE.search(block)
            self.oversize, self.whole_from = False, blank.end() if blank else len(block)
        return block

    def spill(self) -> bytes:
        """Hand on a piece of an event that is too large to hold,
        but for the bytes a blank line may begin in."""
        whole = b"".join(self.parts)
        self.parts, self.size, self.oversize = [whole[-3:]], 3, True
        self.whole_from = len(whole)
        return whole[:-3]

    def close(self) -> bytes:
        """The unfinished tail at the end of the stream."""
        tail = b"".join(self.parts)
        self.parts, self.size = [], 0
        return tail


def last_blank_line(data: bytes) -> int:
    """The index behind the last blank line in `data`, 0 if there is none."""
    if b"\r" not in data:
        return data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
    return max((match.end() for match in BLANK_LINE.finditer(data)), default=0)


def split_events(block: bytes) -> list[bytes]:
    """The single events of a block of whole ones, each with its blank line."""
    if b"\r" not in block:
        if block.find(b"\n\n") == len(block) - 2:
            return [block]
        frames = block.split(b"\n\n")
        return [frame + b"\n\n" for frame in frames[:-1]] + ([frames[-1]] if frames[-1] else [])
    out, at = [], 0
    for match in BLANK_LINE.finditer(block):
        out.append(block[at:match.end()])
        at = match.end()
    return out + ([block[at:]] if at < len(block) else [])


def marked_spans(block: bytes, markers: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where in a block the events stand that have one of `markers` in them, in order.

    Most events of a stream are text that nobody here needs to look at; this finds the others
    without touching those.
    """
    if b"\r" in block:
        spans, at = [], 0
        for frame in split_events(block):
            if any(marker in frame for marker in markers):
                spans.append((at, at + len(frame)))
            at += len(frame)
        return spans
    found = set()
    for marker in markers:
        at = block.find(marker)
        while at >= 0:
            start, end = block.rfind(b"\n\n", 0, at), block.find(b"\n\n", at)
            span = (start + 2 if start >= 0 else 0, end + 2 if end >= 0 else len(block))
            found.add(span)
            at = block.find(marker, span[1])
    return sorted(found)


def parse_event(frame: bytes) -> Event | None:
    """The event in one frame; None where it has no data,
    as comments and bare retry lines have not."""
    end = len(frame) - 2
    # How nearly all events look: data alone or behind a name, each on one line.
    at = frame.find(b"\n") + 1 if frame.startswith(b"event: ") else 0
    if (frame.startswith(b"data: ", at) and frame.find(b"\n", at) == end > at + 6
            and b"\r" not in frame):
        found = frame[7:at - 1].decode("utf-8", "replace") if at else ""
        return Event(found or "message", frame[at + 6:end].decode("utf-8", "replace"))
    if frame.startswith(BOM):
        frame = frame[3:]
    name, data, text = "", [], frame.decode("utf-8", "replace")
    for line in text.split("\n") if "\r" not in text else LINE_END.split(text):
        key, _, value = line.partition(":")
        if key == "data":
            data.append(value.removeprefix(" "))
        elif key == "event":
            name = value.removeprefix(" ")
    text = "\n".join(data)
    return Event(name or "message", text) if text else None


def format_event(name: str | None, data: bytes) -> bytes:
    """An event as bytes; `data` is one line, as compact JSON is."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data



# ============================================================================
#  8  Providers
# ============================================================================
# From an accepted request to what a provider gets, and the quirks of providers
# in what it answers: URL, headers, body. Pure; knows protocols and header
# lines, does not know sockets or routes.

# -- what the client asked for -----------------------------------------------

class ModelRequest(NamedTuple):
    """A request body that routing and translation can work with; `raw` is what the client sent."""

    raw: bytes
    body: Json
    model: str


def read_model_request(protocol: Protocol, raw: bytes) -> ModelRequest:
    """Check what routing and translation need and nothing more (ruling 13), else a RequestError."""
    fault = f"the body of {protocol.title} requests must be a JSON object with a non-empty `model`"
    try:
        body = load(raw)
    except ValueError as error:
        raise RequestError(f"{fault}: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(fault)
    model = body.get("model")
    if not isinstance(model, str) or not model.strip():
        raise RequestError(f"{protocol.title} requests need a non-empty `model`", param="model")
    if len(model) > MODEL_CHARS or LONE_SURROGATE.search(model):
        raise RequestError(f"`model` must be at most {MODEL_CHARS} characters of valid Unicode",
                           param="model")
    if model_may_repeat(raw) and len(member_spans(raw.decode("utf-8"), "model")) > 1:
        raise RequestError("`model` is there twice, and readers differ in which one they take",
                           param="model")
    wanted = body.get(protocol.wants)
    if (not isinstance(wanted, protocol.wants_types)
            and (protocol is not RESPONSES or wanted is not None)):
        types = " or ".join("a string" if t is str else "an array" for t in protocol.wants_types)
        raise RequestError(f"{protocol.title} requests need `{protocol.wants}` to be {types}",
                           param=protocol.wants)
    return ModelRequest(raw, body, model.strip())


def lift_system_items(body: Json) -> Json:
    """The members of a Responses body that change when its system items, which providers
    do not know in `input`, become `instructions` (contract 4.1, rulings 14 and 15)."""
    items = listing(body.get("input"))
    kept = [item for item in items if mapping(item).get("role") != "system"]
    if len(kept) == len(items):
        return {}
    texts = [text for item in items if mapping(item).get("role") == "system"
             and (text := system_text(item.get("content")))]
    if not texts:
        return {"input": kept}
    before = text_of(body.get("instructions"))
    texts += [before] if before.strip() else []
    return {"input": kept, "instructions": "\n\n".join(texts)}


def system_text(content: Any) -> str:
    """The text of a system item's content: a string, or its text parts on lines of their own."""
    return content if isinstance(content, str) else "\n".join(
        part["text"] for part in map(mapping, listing(content))
        if part.get("type") in ("input_text", "text") and isinstance(part.get("text"), str))


def pass_through_body(protocol: Protocol, request: ModelRequest, model: str) -> bytes:
    """The body for a provider of the client's protocol: the client's bytes, but for system items
    of Responses and a model that a route rewrites (ruling 14)."""
    raw = request.raw
    lifted = lift_system_items(request.body) if protocol is RESPONSES else {}
    try:
        for name, value in lifted.items():
            raw = put_member(raw, name, value)
        return raw if model == request.body["model"] else replace_member(raw, "model", model)
    except ValueError as error:
        raise RequestError(f"the request body is {error}") from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None


# -- where it goes and with which headers ------------------------------------

VERSION_SEGMENT = re.compile(r"v[0-9]+(?:(?:alpha|beta)[0-9]*)?")


def join_target(base: str, path: str, query: str) -> str:
    """The target for a protocol's `path` under a provider's `base` path (contract 3.2, ruling 9):
    a base that begins the path is not doubled, nor is the version where one of the last two
    segments of the base is one (/api/v1, /v1beta/openai)."""
    base, path = base.strip("/"), path.lstrip("/")
    if not base:
        return f"/{path}{query}"
    if path == base or path.startswith(base + "/"):
        path = path[len(base):].lstrip("/")
    elif path.startswith("v1/") and any(VERSION_SEGMENT.fullmatch(s) for s in base.split("/")[-2:]):
        path = path[3:]
    return f"/{base}/{path}{query}" if path else f"/{base}{query}"


HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
                        b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"))
NOT_UPSTREAM = HOP_BY_HOP | {b"host", b"content-length", b"accept-encoding", b"expect",
                              b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"}
NOT_DOWNSTREAM = HOP_BY_HOP | {
    b"content-length", b"content-type", b"x-proxai-request-id",
    # what the provider's own web pages may do is not what those that may call us may
    b"access-control-allow-origin", b"access-control-allow-credentials",
    b"access-control-expose-headers",
}
ERROR_FIELDS = frozenset((b"retry-after", b"retry-after-ms", b"x-request-id", b"request-id",
                           b"openai-processing-ms", b"x-should-retry"))
ERROR_FIELD_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-")
# What a provider of another protocol is told of a client's headers: who it is and whose trace the
# request belongs to. The others are options, versions, accounts and sessions of the client's own
# protocol, which mean nothing there or the wrong thing, or are none of that vendor's business.
TRANSLATED_FIELDS = frozenset((b"user-agent", b"accept-language", b"traceparent", b"tracestate",
                               b"x-request-id"))
# How Anthropic names what OpenAI tells in its headers.
TO_OPENAI = {b"request-id": b"x-request-id"} | {
    b"anthropic-ratelimit-%b-%b" % (what, kind): b"x-ratelimit-%b-%b" % (kind, what)
    for what in (b"requests", b"tokens") for kind in (b"limit", b"remaining", b"reset")}
TO_ANTHROPIC = {theirs: name for name, theirs in TO_OPENAI.items()}


EMPTY: Mapping[bytes, bytes] = {}


def auth_line(protocol: Protocol, key: str, auth: str | None = None) -> bytes:
    """The header line that carries a provider's key: the one of `auth`, else the protocol's."""
    auth = auth or ("x-api-key" if protocol is MESSAGES else "bearer")
    return ("authorization: Bearer " if auth == "bearer" else f"{auth}: ").encode() + key.encode()


def own_fields(headers: Mapping[str, str], client: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The header fields that a configuration adds; $name is the `client`'s field, if it sent it."""
    out = {}
    for name, text in headers.items():
        value = (text.encode("ascii") if text[0] != "$"
                 else client.get(text[1:].lower().encode("ascii")))
        if value is not None:
            out[name.encode("ascii")] = value
    return out


def provider_lines(head: RequestHead, protocol: Protocol, fixed: Sequence[bytes], length: int,
                   translated: Sequence[bytes] | None = None,
                   own: Mapping[bytes, bytes] = EMPTY) -> list[bytes]:
    """The header lines of a provider request: the client's, but for those of its own hop and its
    keys, then ours: the `fixed` ones (host, key), the `translated` ones of a request that keeps few
    of the client's, and the configuration's `own` fields, which replace the client's."""
    values: Mapping[bytes, bytes] = head.values
    dropped = NOT_UPSTREAM
    if own:
        values, dropped = {**values, **own}, dropped.union(own)
    if b"connection" in values:
        options = connection_options(values)
        dropped, values = (dropped | options,
                           {name: values[name] for name in values.keys() - options})
    lines = [line for name, _, line in head.fields
             if name not in dropped and (translated is None or name in TRANSLATED_FIELDS)]
    lines += fixed
    lines += [b"%b: %b" % field for field in own.items()]
    lines.append(b"content-length: %d" % length)
    if b"user-agent" not in values:
        lines.append(b"user-agent: " + USER_AGENT)
    if translated is not None:
        lines += translated
    elif b"accept" not in values:
        lines.append(b"accept: */*")
    if protocol is MESSAGES and b"anthropic-version" not in (own if translated is not None
                                                             else values):
        lines.append(b"anthropic-version: " + ANTHROPIC_VERSION)
    return lines


def translated_lines(stream: bool, more: Iterable[bytes]) -> list[bytes]:
    """The header lines that a translated request has of its own."""
    return [b"content-type: application/json",
            b"accept: " + (b"text/event-stream" if stream else b"application/json"), *more]


def client_lines(head: ResponseHead, decoded: bool) -> list[bytes]:
    """The header lines of a provider's 2xx answer that the client gets."""
    dropped = NOT_DOWNSTREAM
    if b"connection" in head.values:
        dropped = dropped | connection_options(head.values)
    if decoded:
        dropped = dropped | {b"content-encoding"}
    return [line for name, _, line in head.fields if name not in dropped]


def without_key(raw: bytes, key: str) -> bytes:
    """A provider's error without its key, unless that is so short that it may stand anywhere."""
    return raw.replace(key.encode("ascii"), b"<redacted>") if len(key) >= 8 else raw


def error_lines(fields: Iterable[Field]) -> list[bytes]:
    """The lines of a provider's error that the client gets: when to retry, ids, rate limits."""
    return [field.line for field in fields
            if field.name in ERROR_FIELDS or field.name.startswith(ERROR_FIELD_PREFIXES)]


def mapped_lines(fields: Iterable[Field], inbound: Protocol, provider: Protocol,
                 now: int) -> list[bytes]:
    """The header lines of a provider's answer that a client of another protocol gets: when to
    retry, and its id and rate limits by the names of the client's vendor."""
    names: dict[bytes, bytes] = {}  # both protocols of OpenAI name them alike
    kept = {b"date", b"retry-after", b"retry-after-ms", b"x-should-retry"}
    if MESSAGES in (inbound, provider):
        names = TO_ANTHROPIC if inbound is MESSAGES else TO_OPENAI
    else:
        kept |= ERROR_FIELDS
    lines = []
    for name, value, line in fields:
        if name in names:
            if b"-reset" in name:
                value = mapped_reset(value.decode("latin-1"), now)
            if value:
                lines.append(b"%b: %b" % (names[name], value))
        elif name in kept or (not names and name.startswith(b"x-ratelimit-")):
            lines.append(line)
    return lines


RESET_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|milli|[smhd])")
RESET_UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def reset_secs(text: str) -> float | None:
    """The seconds of a duration such as 6m0s (OpenAI) or 20 seconds; None where it is none."""
    parts = RESET_PART.findall(text[:64])
    return sum(float(n) * RESET_UNITS[unit] for n, unit in parts) if parts else None


def mapped_reset(text: str, now: int) -> bytes:
    """When a rate limit ends, as the other vendor tells it: OpenAI a duration, Anthropic the time
    (RFC 3339); b"" for what is neither."""
    secs = reset_secs(text)
    if "-" not in text:
        return b"" if secs is None else time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + min(secs, 1e9))).encode()
    at = iso_time(text)
    return b"" if at is None else b"%ds" % max(at - now, 0)


DROPPED_FIELD = b"x-proxai-dropped: "
NOT_PRINTABLE = re.compile(r"[^ -~]")


def dropped_lines(paths: Iterable[str]) -> list[bytes]:
    """The header line that names what a translation left out, cut where there is too much of it."""
    told = ""
    for count, path in enumerate(paths):
        longer = (f"{told}, " if told else "") + NOT_PRINTABLE.sub("?", path[:DROPPED_BYTES])
        if count == DROPPED_NAMES or len(longer) > DROPPED_BYTES:
            told += ", ..." if told else "..."
            break
        told = longer
    return [DROPPED_FIELD + told.encode("ascii")] if told else []


def is_event_stream(content_type: bytes | None) -> bool:
    """Whether a Content-Type says text/event-stream, in any case and with any parameter."""
    return (content_type is not None
            and content_type.partition(b";")[0].strip().lower() == b"text/event-stream")


# -- gaps in Anthropic-compatible answers (contract 8) -----------------------
# Only absent members are added; nothing is overwritten or removed. Each table
# maps a place to the members it must have.

NULLS: Callable[..., Json] = dict.fromkeys
MESSAGE_GAPS = NULLS(("container", "stop_details", "stop_reason", "stop_sequence"))
STOP_DETAILS_GAPS = NULLS(("category", "explanation"))
USAGE_GAPS = NULLS(("cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens",
                    "inference_geo", "server_tool_use", "service_tier"))
DELTA_USAGE_GAPS = NULLS(("cache_creation_input_tokens", "cache_read_input_tokens", "input_tokens",
                          "server_tool_use"))
# Quirk(GLM 5.1): only one of the counters
SERVER_TOOL_GAPS = {"web_fetch_requests": 0, "web_search_requests": 0}
BLOCK_GAPS: dict[str, Json] = {
    "text": {"citations": None},
    "thinking": {"signature": ""},  # Quirk(MiniMax)
    "tool_use": {"caller": {"type": "direct"}},  # Quirk(MiMo)
}
CITATION_GAPS = {
    **dict.fromkeys(("char_location", "page_location", "content_block_location"),
                    NULLS(("document_title", "file_id"))),
    **dict.fromkeys(("web_search_result_location", "search_result_location"), NULLS(("title",))),
}
EDITOR_RESULT_GAPS = {
    "text_editor_code_execution_str_replace_result": NULLS(
        ("lines", "new_lines", "new_start", "old_lines", "old_start")),
    "text_editor_code_execution_view_result": NULLS(("num_lines", "start_line", "total_lines")),
    "text_editor_code_execution_tool_result_error": NULLS(("error_message",)),
}


def fill(target: Any, gaps: Mapping[str, Any]) -> bool:
    """Add the members of `gaps` that the object `target` lacks; whether any was."""
    missing = [key for key in gaps if key not in target] if isinstance(target, dict) else []
    for key in missing:
        target[key] = copy.copy(gaps[key])
    return bool(missing)


def fill_usage(usage: Any, gaps: Mapping[str, Any]) -> bool:
    """The gaps of a usage object and of the server tool counters in it."""
    return fill(usage, gaps) | fill(mapping(usage).get("server_tool_use"), SERVER_TOOL_GAPS)


def fill_message(message: Json) -> bool:
    """The gaps of a whole message, its usage and its blocks."""
    return any([fill(message, {"type": "message", **MESSAGE_GAPS}),
                fill(message.get("stop_details"), STOP_DETAILS_GAPS),
                fill_usage(message.get("usage"), USAGE_GAPS),
                *map(fill_block, listing(message.get("content")))])


def fill_block(block: Any) -> bool:
    """The gaps of a content block, by its type."""
    kind, content = mapping(block).get("type"), mapping(block).get("content")
    if not isinstance(kind, str):
        return False
    places = [(block, BLOCK_GAPS.get(kind, {}))]
    if kind == "text":
        places += [(citation, CITATION_GAPS.get(str(mapping(citation).get("type")), {}))
                   for citation in listing(block.get("citations"))]
    elif kind == "web_search_tool_result":
        places += [(item, NULLS(("page_age",))) for item in listing(content)]
    elif kind == "web_fetch_tool_result":
        for item in content if isinstance(content, list) else [content]:
            if "error_code" not in mapping(item):
                places += [(item, NULLS(("retrieved_at",))),
                           (mapping(item).get("content"), NULLS(("citations", "title")))]
    elif kind == "tool_search_tool_result" and "error_code" in mapping(content):
        places.append((content, NULLS(("error_message",))))
    elif kind == "text_editor_code_execution_tool_result":
        places.append((content, EDITOR_RESULT_GAPS.get(str(mapping(content).get("type")), {})))
    return any([fill(*place) for place in places])


WHOLE_MESSAGE = ("id", "role", "model", "content", "usage")


def fill_gaps_in_body(body: Any) -> bool:
    """Fill an answer in place if it is a message; whether anything was added."""
    return (isinstance(body, dict) and body.get("role") == "assistant"
            and all(key in body for key in WHOLE_MESSAGE) and fill_message(body))


def fill_gaps_in_event(event: Any) -> bool:
    """Fill the payload of a stream event in place; whether anything was added."""
    event = mapping(event)
    kind, delta = event.get("type"), event.get("delta")
    if kind == "message_start" and isinstance(event.get("message"), dict):
        return fill_message(event["message"])
    if kind == "content_block_start":
        return fill_block(event.get("content_block"))
    return kind == "message_delta" and (
        fill(delta, MESSAGE_GAPS) | fill(mapping(delta).get("stop_details"), STOP_DETAILS_GAPS)
        | fill_usage(event.get("usage"), DELTA_USAGE_GAPS))


# Events that can have gaps; a frame with none of these words is not even parsed.
GAP_MARKERS = (b"message_start", b"content_block_start", b"message_delta")


def fill_gaps_in_block(block: bytes) -> bytes:
    """A block of whole events with gaps filled; events without gaps keep their bytes."""
    for start, end in reversed(marked_spans(block, GAP_MARKERS)):
        filled = fill_gaps_in_frame(block[start:end])
        if filled is not None:
            block = block[:start] + filled + block[end:]
    return block


# Where answers and events name their model, by protocol, and the events that do.
NAMING_MEMBERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "responses": (("model",), ("response", "model")), "chat": (("model",),),
    "messages": (("model",), ("message", "model")),
}
NAMING_MARKERS = {"responses": (b'"response":',), "chat": (b'"model"',),
                  "messages": (b"message_start",)}
EVENT_DATA = re.compile(rb"^data: ?(\{.*\})\r?$", re.MULTILINE)


def rename_model(raw: bytes, protocol: Protocol, model: str) -> bytes:
    """An answer or an event's payload with `model` for its model's name where it has one, and no
    other byte changed."""
    try:
        text = raw.decode("utf-8")
        if not isinstance(load(raw), dict):
            return raw
        for path in NAMING_MEMBERS[protocol.word]:
            start, end = 0, len(text)
            for name in path:
                inner = text[start:end]
                spans = member_spans(inner, name) if inner.lstrip().startswith("{") else []
                if not spans:
                    break
                start, end = start + spans[0][0], start + spans[0][1]
            else:
                if text[start] == '"':
                    text = text[:start] + dump(model).decode() + text[end:]
    except ValueError:
        return raw
    return text.encode("utf-8")


def rename_in_block(block: bytes, protocol: Protocol, model: str) -> bytes:
    """A block of whole events in which those that name a model name `model`."""
    for start, end in reversed(marked_spans(block, NAMING_MARKERS[protocol.word])):
        found = EVENT_DATA.search(block, start, end)
        if found:
            block = (block[:found.start(1)] + rename_model(found[1], protocol, model)
                     + block[found.end(1):])
    return block


def fill_gaps_in_frame(frame: bytes) -> bytes | None:
    """One event, with its name for a `type`, encoded anew if a gap was filled."""
    event = parse_event(frame)
    if event is None:
        return None
    with contextlib.suppress(ValueError):
        payload = load(event.data.encode("utf-8"))
        if isinstance(payload, dict) and "type" not in payload:
            payload = {"type": event.name, **payload}
        if fill_gaps_in_event(payload):
            return format_event(payload["type"], dump(payload))
    return None



# ============================================================================
#  9  Capabilities
# ============================================================================
# What hosts and models take, as tables that [providers.<name>.profile]
# overrides key by key. Nothing below decides by a host's or a model's name;
# all facts about vendors that may change stand here.

# What is assumed of a host that no row below names (translation-chat.md 1.1, last row;
# translation-responses.md 1.2). Every key is one of ProfileConfig.
PROFILE_DEFAULTS: Mapping[str, Json] = {
    "chat": {
        "vision": True, "max_tokens_field": "max_tokens", "reasoning_control": "template",
        "reasoning_replay": "auto", "reasoning_required": "off", "late_system": "fold",
        "tool_images": "user", "files": "drop", "json_schema": "schema", "stream_usage": True,
        "top_k": True, "call_ids": "any", "cache": "off", "parallel_tool_calls": True,
        "strict_tools": False, "lenient_done": True, "tool_arguments": "stream",
        "think_tags": "auto", "deferred_tools": "referenced", "web_search": "off",
        "custom_tools": False, "allowed_tools": False, "vendor_fields": False,
    },
    "messages": {
        "vision": True, "cache": "auto", "lenient_thinking": False, "native_system": False,
        "web_search": "off", "vendor_fields": False, "thinking_binding": False,
        "strict_tools": True,
    },
    "responses": {
        "vision": True, "max_output_tokens": True, "output_lists": False, "web_search": "off",
        "custom_tools": False, "phase": False, "vendor_fields": False, "cache": "off",
        "strict_tools": True, "deferred_tools": "referenced", "tool_arguments": "stream",
    },
}
# (protocol, host, what differs there): the first row whose pattern is the whole host wins. A host
# has its port where that is not the default one.
HOST_PROFILES: tuple[tuple[str, str, Json], ...] = (
    ("chat", r"api\.openai\.com|.*\.openai\.azure\.com",
     {"max_tokens_field": "max_completion_tokens", "reasoning_control": "effort",
      "reasoning_replay": "none", "late_system": "keep", "files": "native", "top_k": False,
      "call_ids": "40", "strict_tools": True, "custom_tools": True, "allowed_tools": True,
      "vendor_fields": True, "web_search": "options"}),
    ("chat", r"openrouter\.ai",
     {"reasoning_control": "openrouter", "reasoning_replay": "reasoning_details",
      "late_system": "keep", "files": "native", "cache": "on", "strict_tools": True,
      "web_search": "openrouter"}),
    ("chat", r"api\.deepseek\.com",
     {"reasoning_control": "deepseek", "reasoning_replay": "reasoning_content",
      "reasoning_required": "all", "json_schema": "object", "top_k": False}),
    ("chat", r"api\.moonshot\..*|api\.kimi\.com",
     {"reasoning_control": "kimi", "reasoning_replay": "reasoning_content",
      "reasoning_required": "calls", "json_schema": "object", "top_k": False}),
    ("chat", r"(.*\.)?(z\.ai|bigmodel\.cn)",
     {"reasoning_control": "glm", "reasoning_replay": "reasoning_content",
      "json_schema": "object", "top_k": False}),
    ("chat", r"dashscope.*",
     {"reasoning_control": "qwen", "reasoning_replay": "reasoning_content",
      "json_schema": "object"}),
    ("chat", r"api\.groq\.com",
     {"max_tokens_field": "max_completion_tokens", "reasoning_control": "groq",
      "reasoning_replay": "reasoning", "tool_images": "drop", "top_k": False}),
    ("chat", r"api\.mistral\.ai",
     {"reasoning_control": "mistral", "reasoning_replay": "none", "stream_usage": False,
      "top_k": False, "call_ids": "9"}),
    ("chat", r"api\.x\.ai",
     {"max_tokens_field": "max_completion_tokens", "reasoning_control": "effort-lowhigh",
      "reasoning_replay": "reasoning_content", "late_system": "keep", "top_k": False}),
    ("chat", r"generativelanguage\.googleapis\.com",
     {"reasoning_control": "effort", "reasoning_replay": "none", "top_k": False}),
    ("chat", r"api\.cerebras\.ai",
     {"max_tokens_field": "max_completion_tokens", "reasoning_control": "effort-basic",
      "parallel_tool_calls": False, "top_k": False}),
    ("chat", r"(.*\.)?api\.fireworks\.ai|models\.github\.ai|localhost:1234",
     {"reasoning_control": "effort-basic"}),
    ("chat", r"api\.novita\.ai|api\.siliconflow\..*", {"reasoning_control": "qwen"}),
    ("chat", r"api\.minimaxi?\..*", {"reasoning_replay": "reasoning_details"}),
    ("chat", r"api\.kilo\.ai",
     {"reasoning_control": "openrouter", "reasoning_replay": "reasoning_details"}),
    ("chat", r".*:11434|(.*\.)?ollama(\..*)?",
     {"reasoning_control": "effort-basic", "reasoning_replay": "reasoning",
      "tool_images": "inline", "top_k": False}),
    ("messages", r"api\.anthropic\.com",
     {"native_system": True, "web_search": "native", "vendor_fields": True}),
    ("responses", r"api\.openai\.com|.*\.openai\.azure\.com",
     {"output_lists": True, "web_search": "native", "custom_tools": True, "vendor_fields": True}),
    ("responses", r"chatgpt\.com", {"max_output_tokens": False, "output_lists": True}),
)
FIRST_PARTY_ANTHROPIC = re.compile(r"api\.anthropic\.com|bedrock.*|.*aiplatform\.googleapis\.com")
# Models that take no sampling parameters and reason: OpenAI's own names.
REASONING_MODEL = re.compile(r"o[1-9]|gpt-[5-9]|.*codex|gpt-oss")
FIXED_SAMPLING_MODEL = re.compile(r"o\d|gpt-[5-9]|kimi-k2[.-][5-9]|kimi-k[3-9]")


class ModelClass(NamedTuple):
    """What a class of Claude models takes (translation-chat.md 1.2)."""

    name: str
    manual: bool  # thinking enabled with a budget
    adaptive: bool
    disabled: bool  # whether thinking may be switched off by name
    sampling: bool
    forced: bool  # whether a tool may be forced
    prefill: bool
    schema: bool  # native JSON schema
    system: bool  # role system within messages
    max_tokens: int
    default_max_tokens: int = 32000


MODEL_CLASSES = {c.name: c for c in (
    ModelClass("K0", False, False, False, True, True, True, False, False, 4096, 4096),
    ModelClass("K1", True, False, True, True, True, True, False, False, 64000),
    ModelClass("K2", True, True, True, True, True, False, True, False, 128000),
    ModelClass("K3", False, True, True, False, True, False, True, False, 128000),
    ModelClass("K4", False, True, True, False, True, False, True, True, 128000),
    ModelClass("K5", False, True, False, False, True, False, True, True, 128000),
    ModelClass("X", True, False, True, True, True, True, False, False, 1 << 30, 8192),
)}
CLAUDE_NAME = re.compile(r"(?:(opus|sonnet|haiku|fable|mythos)-(\d+|preview)(?:-(\d{1,2}))?(?!\d)"
                         r"|claude-(?:v|instant-v?)?(\d)(?:-(\d{1,2}))?(?!\d))")


@functools.lru_cache(maxsize=64)
def model_class(model: str) -> ModelClass:
    """The class of a model by its id, any vendor prefix; an unknown Claude is taken for a new one.

    >>> model_class("anthropic/claude-sonnet-4.5").name
    'K1'
    """
    name = re.sub(r"[._]", "-", model.lower())
    match = CLAUDE_NAME.search(name)
    if not match:
        return MODEL_CLASSES["K4" if "claude" in name else "X"]
    family = match[1] or (m[0] if (m := re.search("opus|sonnet|haiku", name)) else "")
    version = (int(match[2] or match[4]) if match[2] != "preview" else 5,
               int(match[3] or match[5] or 0))
    if "instant" in name or version < (3, 7):
        limit = 8192 if version >= (3, 5) else 4096
        return MODEL_CLASSES["K0"]._replace(max_tokens=limit)
    if family in ("fable", "mythos") or (version >= (5, 5) and family != "haiku"):
        return MODEL_CLASSES["K5"]._replace(forced=version == (5, 0),
                                            system=match[2] != "preview")
    if version < (4, 6):
        return MODEL_CLASSES["K1"]._replace(
            schema=version == (4, 5),
            max_tokens=32000 if family == "opus" and version >= (4, 0) else 64000)
    return MODEL_CLASSES["K2" if version == (4, 6) else "K3" if version == (4, 7) else "K4"]


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Thinking budgets for effort levels, chosen so that a round trip gives the level again.
BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768,
           "max": 63999}
BUDGET_LEVELS = ((32768, "xhigh"), (8192, "high"), (2048, "medium"), (1024, "low"), (1, "minimal"))


def budget_level(budget: int) -> str:
    """The effort level of a thinking budget (translation-chat.md 1.3a)."""
    return next((level for least, level in BUDGET_LEVELS if budget >= least), "none")


def openai_efforts(model: str) -> tuple[str, ...]:
    """The effort levels a model of OpenAI takes (translation-responses.md 1.2)."""
    if re.match(r"gpt-5[.-][1-9]|gpt-[6-9]", model):
        return ("none", "low", "medium", "high", "xhigh")
    return ("minimal", "low", "medium", "high") if model.startswith("gpt-5") else EFFORTS[2:5]


def clamp_effort(level: str, levels: Sequence[str]) -> str:
    """`level`, or the nearest lower one of `levels`, or the lowest; little is not none."""
    known = [e for e in levels if e != "none" or level == "none"] or levels
    lower = [e for e in known if EFFORTS.index(e) <= EFFORTS.index(level)]
    return max(lower, key=EFFORTS.index) if lower else min(known, key=EFFORTS.index)


@functools.lru_cache(maxsize=256)
def capabilities(protocol: str, host: str, model: str, profile: ProfileConfig) -> ProfileConfig:
    """The profile of a provider for a model: its own settings, else the model's, else the host's,
    else the defaults."""
    found: Json = dict(PROFILE_DEFAULTS[protocol])
    found |= next((row for word, pattern, row in HOST_PROFILES
                   if word == protocol and re.fullmatch(pattern, host)), {})
    name = model.lower().rsplit("/", 1)[-1]
    if protocol == "chat" and re.match(r"kimi-k(2[.-][6-9]|[3-9])", name):
        found["max_tokens_field"] = "max_completion_tokens"
    if protocol == "responses":
        reasons = bool(REASONING_MODEL.match(name)) and "-chat" not in name
        reasons = reasons if profile.reasoning is None else profile.reasoning
        found |= {"reasoning": reasons, "encrypted_reasoning": reasons,
                  "reasoning_summary": reasons, "sampling": not reasons,
                  "efforts": openai_efforts(name)}
    if protocol == "messages":
        kind = MODEL_CLASSES[profile.model_class] if profile.model_class else model_class(model)
        first_party = bool(FIRST_PARTY_ANTHROPIC.fullmatch(host))
        found |= {"model_class": kind.name,
                  "lenient_thinking": not first_party and kind.name == "X",
                  "default_max_tokens": kind.default_max_tokens,
                  "thinking_binding": host == "api.anthropic.com" and (
                      not kind.forced or "haiku-5-5" in name.replace(".", "-"))}
    found |= {field.name: value for field in dataclasses.fields(profile)
              if (value := getattr(profile, field.name)) is not None}
    if found["cache"] == "auto":
        found["cache"] = "on" if host == "api.anthropic.com" else "off"
    return ProfileConfig(**found)



# ============================================================================
#  10  Conversations
# ============================================================================
# What all pairs share: the neutral form of a request, ids and names of tools,
# pairing of calls and results, arguments, JSON schemas, media, reasoning
# carriers, token estimates. Pure; no wire format is written here.

# -- one exchange ------------------------------------------------------------

DONE = "[DONE]"
PING: Any = object()  # asks a stream for a sign of life, see `translated()`


class Context:
    """What one exchange's translation knows beside the payload.

    `inbound` and `provider` are protocol words, `host` is the provider's (with its port where that
    is not the default one), `realm` tells one provider's reasoning from another's, `now` is in
    seconds. A request fills what its answer needs; `dropped` maps paths to reasons.
    """

    __slots__ = ("alias", "caps", "dropped", "echo", "estimate", "headers", "host", "ids",
                 "inbound", "include_usage", "kind", "legacy", "model", "now", "provider",
                 "realm", "seed", "shown", "stops", "stream", "thinking", "tools", "unpacked",
                 "wants_thinking", "web_search")

    def __init__(self, inbound: str, provider: str, model: str, *, host: str = "",
                 profile: Any = None, realm: str | None = None, now: int = 0,
                 seed: str = "") -> None:
        self.inbound, self.provider, self.model, self.now = inbound, provider, model, now
        self.seed = seed  # makes ids of answers that come without one
        self.host, self.alias = host, model
        if not isinstance(profile, ProfileConfig):
            options: Json = {key: tuple(value) if isinstance(value, list) else value
                             for key, value in (profile or {}).items()}
            profile = ProfileConfig(**options)
        self.caps = capabilities(provider, host, model, profile)
        self.kind, given = model_class(model), self.caps.model_class
        if given and given != self.kind.name:
            self.kind = MODEL_CLASSES[given]
        self.realm = sha(realm if realm is not None else host)[:6]
        self.dropped: dict[str, str] = {}
        self.unpacked = 0  # bytes of carriers
        self.headers: list[bytes] = []
        self.tools: dict[str, Tool] = {}  # by the name that goes over the wire
        self.echo: Json = {}  # what a Responses answer repeats of its request
        self.ids: set[str] = set()  # of the tool calls in the request's history
        self.stream = self.legacy = self.web_search = False
        # what an answer has unless its request says otherwise
        self.include_usage = self.wants_thinking = True
        self.stops: list[str] = []
        self.estimate = 0  # of the input, in tokens
        self.thinking = ""  # what the suffix of the model asks for, see split_thinking()
        self.shown = ""  # the model that answers name, "" for the provider's word

    def drop(self, path: str, reason: str = "") -> None:
        """Note that something of the request is not carried over."""
        if len(self.dropped) < DROPS_NOTED:
            self.dropped.setdefault(path, reason or f"{TITLES[self.provider]} has no such field")


TITLES = {p.word: p.title for p in PROTOCOLS.values()}
DROPS_NOTED = 1000  # of one request


class Part(NamedTuple):
    """A piece of content: text, image, file, audio, refusal, or `raw` (a block of the target)."""

    kind: str
    text: str = ""
    url: str | None = None
    media: str | None = None
    data: str | None = None  # base64
    id: str | None = None  # in the vendor's file store
    name: str | None = None
    detail: str | None = None
    mark: Json | None = None  # a cache mark, in Anthropic's form
    path: str = ""
    current: bool = False  # of the request at hand, not of its history
    type: str = ""  # what the client called it
    raw: Any = None


class User(NamedTuple):
    """What the user said, in one message."""

    parts: list[Part]


class System(NamedTuple):
    """A system or developer message within the conversation."""

    parts: list[Part]
    role: str = "system"


class Said(NamedTuple):
    """What the assistant said, in one message or block."""

    parts: list[Part]


class Thought(NamedTuple):
    """A piece of reasoning as a carrier kept it: `kind` as in translation-responses.md 1.5, or
    `search` for a web search that was made."""

    kind: str
    text: str
    body: Any


class Call(NamedTuple):
    """A tool call; `input` where its kind has one of its own shape, else `arguments`."""

    id: str
    name: str
    arguments: str = ""
    input: Json | None = None
    kind: str = "function"
    space: str = ""
    mark: Json | None = None
    missing: bool = False  # its result never came


class Out(NamedTuple):
    """The result of a tool call."""

    id: str
    parts: list[Part]
    error: bool = False
    name: str = ""
    kind: str = "function"
    mark: Json | None = None
    stub: bool = False


Atom = User | System | Said | Thought | Call | Out


class Tool(NamedTuple):
    """A tool that a client declared."""

    kind: str
    name: str
    description: str | None = None
    schema: Json | None = None
    space: str = ""
    strict: bool | None = None
    mark: Json | None = None
    raw: Any = None  # what the client sent
    deferred: bool = False
    path: str = ""


class Choice(NamedTuple):
    """A wish about tools: mode auto, none, required, tool (the one in `names`) or allowed."""

    mode: str
    names: tuple[tuple[str, str], ...] = ()  # of (space, name)
    required: bool = False  # of mode allowed
    path: str = "tool_choice"


class Effort(NamedTuple):
    """How much reasoning is wanted; `display` how it is to be shown."""

    level: str | None = None
    budget: int | None = None
    display: str | None = None  # summarized, omitted
    switched: str | None = None  # on or off by name, whatever the level


class Format(NamedTuple):
    """The shape an answer must have: `schema` None for any JSON object."""

    schema: Json | None
    name: str = "output"
    strict: bool | None = None
    description: str | None = None


@dataclasses.dataclass(slots=True)
class Ask:
    """A request in neutral form: what a reader found, and a writer puts into a wire format."""

    model: str
    system: list[Part] = dataclasses.field(default_factory=list)
    atoms: list[Atom] = dataclasses.field(default_factory=list)
    tools: list[Tool] = dataclasses.field(default_factory=list)
    choice: Choice | None = None
    parallel: bool | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] = dataclasses.field(default_factory=list)
    effort: Effort | None = None
    format: Format | None = None
    user: str | None = None
    tier: str | None = None  # in OpenAI's words
    ttl: str | None = None  # of cache marks that name none
    marks: bool = True  # whether marks may be set where there are none
    search: Json | None = None  # web search options
    more: Json = dataclasses.field(default_factory=dict)  # as both sides call it


class Fields:
    """An object of a request while a reader takes it apart.

    Checks types (400 with the path), and at the end knows what nobody asked for.
    """

    __slots__ = ("ctx", "left", "path")

    def __init__(self, ctx: Context, value: Any, path: str = "") -> None:
        if type(value) is not dict:
            raise RequestError(f"`{path}` must be an object", param=path)
        self.ctx, self.path, self.left = ctx, path, dict(value)

    def at(self, key: str) -> str:
        """The path of a member."""
        return f"{self.path}.{key}" if self.path else key

    def wrong(self, key: str, wants: str) -> RequestError:
        """The error that a member is not what it must be."""
        return RequestError(f"`{self.at(key)}` must be {wants}", param=self.at(key))

    def get(self, key: str, *kinds: type) -> Any:
        """A member that is null, missing or of one of `kinds` (of any, where none is named)."""
        value = self.left.pop(key, None)
        if kinds and value is not None and type(value) not in kinds:
            raise self.wrong(key, " or ".join(dict.fromkeys(TYPE_NAMES[kind] for kind in kinds)))
        return value

    def text(self, key: str) -> str | None:
        """A string."""
        value: str | None = self.get(key, str)
        return value

    def name(self, key: str = "name") -> str:
        """A string that must be there."""
        if value := self.text(key):
            return value
        raise self.wrong(key, "a non-empty string")

    def flag(self, key: str) -> bool | None:
        """A boolean."""
        value: bool | None = self.get(key, bool)
        return value

    def number(self, key: str) -> float | None:
        """A number."""
        value: float | None = self.get(key, int, float)
        return value

    def count(self, key: str) -> int | None:
        """A whole number."""
        value = self.number(key)
        return None if value is None else int(value)

    def list(self, key: str) -> list[Any]:
        """An array; empty where there is none."""
        return self.get(key, list) or []

    def object(self, key: str) -> Fields | None:
        """An object, to be taken apart in turn."""
        value = self.get(key, dict)
        return None if value is None else Fields(self.ctx, value, self.at(key))

    def objects(self, key: str) -> Iterator[Fields]:
        """The objects of an array, each to be taken apart in turn."""
        return (Fields(self.ctx, value, f"{self.at(key)}[{i}]")
                for i, value in enumerate(self.list(key)))

    def json(self, key: str) -> Json | None:
        """An object as it is."""
        value: Json | None = self.get(key, dict)
        return value

    def mark(self) -> Json | None:
        """A client's cache mark."""
        return cache_mark(self.left.pop("cache_control", None))

    def close(self, reason: str = "", trifles: Collection[str] = ()) -> None:
        """Report what is left and no trifle."""
        for key, value in self.left.items():
            if value is not None and value != [] and value != {} and key not in trifles:
                self.ctx.drop(self.at(key), reason)


def cache_mark(value: Any) -> Json | None:
    """A cache_control object, with nothing in it but what is known."""
    if not isinstance(value, dict):
        return None
    ttl = value.get("ttl")
    return {"type": "ephemeral", "ttl": ttl} if ttl in ("5m", "1h") else {"type": "ephemeral"}


TYPE_NAMES = {str: "a string", int: "a number", float: "a number", bool: "true or false",
              list: "an array", dict: "an object"}

# -- ids ---------------------------------------------------------------------

SAFE_ID = re.compile(r"[a-zA-Z0-9_-]+")
ENCODED_ID = re.compile(r"pxid_[0-9a-f]{8}")
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def sha(text: str) -> str:
    """SHA-256 in hexadecimal: ids that look random and are the same each time."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_base64url(data: bytes) -> str:
    """Base64 with the alphabet of URLs and no padding."""
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def from_base64url(text: str) -> bytes | None:
    """The bytes of such a text, None where it is none."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError:
        return None


def encode_id(id: str, seed: str | None = None) -> str:
    """A foreign id in Anthropic's alphabet, from which original_id() gets it back.

    >>> encode_id("c.1:x")
    'pxid_817f150cYy4xOng'
    """
    data = id.encode("utf-8", "surrogatepass")
    return f"pxid_{sha(id if seed is None else seed)[:8]}{to_base64url(data)}"


def original_id(id: str) -> str:
    """The id a client got from the provider, in the provider's own form."""
    if ENCODED_ID.match(id):
        data = from_base64url(id[13:])
        if data is not None:
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode("utf-8") or "call_" + sha(id)[:24]
    return id


def short_call_id(id: str) -> str:
    """An id within the 64 characters of the Responses API."""
    return id if len(id) <= 64 else f"{id[:43]}_{sha(id)[:20]}"


def nine_characters(id: str) -> str:
    """An id in the form that Mistral demands: nine letters and digits."""
    if len(id) == 9 and id.isascii() and id.isalnum():
        return id
    value, out = int(sha(id), 16), ""
    while len(out) < 9:
        value, digit = divmod(value, 62)
        out += BASE62[digit]
    return out


def forty_characters(id: str) -> str:
    """An id within the 40 characters of OpenAI's Chat Completions."""
    return id if len(id) <= 40 else "call_" + sha(id)[:35]


CALL_IDS: Mapping[str, Callable[[str], str]] = {
    "any": str, "40": forty_characters, "9": nine_characters}


def safe_id(id: str) -> str:
    """An id as Anthropic takes it."""
    return id if SAFE_ID.fullmatch(id) else encode_id(id)


def bare_id(id: Any) -> str:
    """A provider's response id without the prefix of its kind, in Anthropic's alphabet."""
    text = re.sub(r"^(chatcmpl[-_]|resp_|msg_)", "", id if isinstance(id, str) else "")
    return re.sub(r"[^a-zA-Z0-9_-]", "_", text)[:64]


# -- names of tools ----------------------------------------------------------

BAD_NAME = re.compile(r"[^a-zA-Z0-9_-]")


def full_name(space: str, name: str) -> str:
    """The one name of a tool within a namespace."""
    if space in ("", "functions"):
        return name
    return space + name if space.endswith("__") else f"{space}__{name}"


class ToolNames:
    """Names of tools as a provider takes them, one for each (namespace, name).

    Names that are valid keep themselves, whatever stands before them in the request.
    """

    def __init__(self, tools: Iterable[Tool], limit: int) -> None:
        self.limit = limit
        self.wire: dict[tuple[str, str], str] = {}
        self.taken: set[str] = set()
        self.declared: dict[str, Tool] = {}
        listed = list(tools)
        for valid in (True, False):
            for tool in listed:
                if self.valid(full_name(tool.space, tool.name)) is valid:
                    self.declared.setdefault(self.of(tool.space, tool.name), tool)

    def valid(self, name: str) -> bool:
        """Whether a provider takes the name."""
        return 0 < len(name) <= self.limit and not BAD_NAME.search(name)

    def of(self, space: str, name: str) -> str:
        """The wire name of a tool; one that was never declared is cleaned the same way."""
        key = (space, name)
        if key not in self.wire:
            whole = full_name(space, name)
            clean = BAD_NAME.sub("_", whole) or "_"
            if len(clean) > self.limit or clean in self.taken:
                clean = f"{clean[:self.limit - 9]}_{sha(whole)[:8]}"
            self.wire[key] = clean
            self.taken.add(clean)
        return self.wire[key]

    def pick(self, choice: Choice) -> list[str]:
        """The wire names of a choice, each of them declared; else 400."""
        names = [self.of(*name) for name in choice.names]
        for (_, name), wire in zip(choice.names, names, strict=True):
            if wire not in self.declared:
                raise RequestError(f"tool_choice names `{name}`, which is not among the tools",
                                   param=choice.path)
        return names


def unique_tools(tools: Iterable[Tool]) -> list[Tool]:
    """Tools without a second definition of the same name: the first stays, so that a longer
    conversation does not change what stood before."""
    seen: dict[tuple[str, str], Tool] = {}
    for tool in tools:
        seen.setdefault((tool.space, tool.name), tool)
    return list(seen.values())


def settle_choice(ask: Ask, names: ToolNames,
                  narrows: bool = True) -> tuple[str | None, str | None]:
    """What a choice comes to: a mode (auto, none, required, tool) and the tool's wire name.

    allowed_tools leaves only its tools in `ask.tools`, where the provider has no such choice
    (`narrows`). Without tools there is no choice.
    """
    choice = ask.choice
    if not choice or not ask.tools:
        return None, None
    if choice.mode == "allowed" and narrows:
        wanted = set(choice.names)
        ask.tools = [t for t in ask.tools if (t.space, t.name) in wanted]
        if not ask.tools:
            raise RequestError("none of the allowed tools is declared", param=choice.path)
        if not choice.required:
            return "auto", None
        if len(ask.tools) == 1:
            return "tool", names.of(ask.tools[0].space, ask.tools[0].name)
        return "required", None
    if choice.mode == "tool":
        return "tool", names.pick(choice)[0]
    return choice.mode, None


# -- pairing of calls and results (translation-responses.md 1.8) ------------

# What stands for a result that never came.
NO_RESULT = Out("", [Part("text", "[no result was recorded for this call]")], error=True, stub=True)


def pair_up(atoms: Sequence[Atom], wire: Callable[[str], str], ctx: Context) -> list[Atom]:
    """The atoms with each run of the assistant followed by the results of its calls, in call order.

    Results without a call and later different ones become user text; a missing one becomes a stub.
    Ids become what `wire` makes of them, unique over the request. What an appended item changes
    is at the end only.
    """
    answers, strays = match_results(atoms)
    used: dict[str, int] = {}
    out: list[Atom] = []
    results: list[Out] = []  # of the calls of the run at hand
    calls = 0
    for atom in atoms:
        if isinstance(atom, Call):
            ctx.ids.add(atom.id)
            wired = unique_id(atom.id or f"call_px_{calls}", wire, used)
            calls += 1
            results.append(answers.get(id(atom), NO_RESULT)._replace(
                id=wired, kind=atom.kind, name=atom.name))
            out.append(atom._replace(id=wired))
            continue
        if results and not isinstance(atom, (Said, Thought)):
            out += results
            results = []
        if not isinstance(atom, Out):
            out.append(atom)
        elif note := strays.get(id(atom)):
            out.append(User(noted(note, atom.parts)))
    return out + results


def noted(note: str, parts: list[Part]) -> list[Part]:
    """The parts of a result that has no place, with a word on where they come from."""
    if parts and parts[0].kind == "text":
        return [parts[0]._replace(text=f"{note}\n{parts[0].text}"), *parts[1:]]
    return [Part("text", note), *parts]


def same(one: list[Part], other: list[Part]) -> bool:
    """Whether two contents say the same, wherever they stood."""
    return [p._replace(path="") for p in one] == [p._replace(path="") for p in other]


def match_results(atoms: Sequence[Atom]) -> tuple[dict[int, Out], dict[int, str]]:
    """The result of each call, and what is to be said of results that belong to none; by id()."""
    current: dict[str, Call] = {}
    open_calls: dict[int, Call] = {}
    answers: dict[int, Out] = {}
    strays: dict[int, str] = {}
    for atom in atoms:
        if isinstance(atom, Call):
            current[atom.id] = open_calls[id(atom)] = atom
        elif isinstance(atom, Out):
            call = current.get(atom.id)
            if not atom.id:
                waiting = list(open_calls.values())
                call = next((c for c in waiting if atom.name and c.name == atom.name),
                            waiting[0] if waiting else None)
            if call is None:
                strays[id(atom)] = f"[result of unknown tool call {atom.id}]"
            elif id(call) not in answers:
                answers[id(call)] = atom
                open_calls.pop(id(call), None)
            elif not same(answers[id(call)].parts, atom.parts):
                strays[id(atom)] = f"[later result of tool call {atom.id}]"
    return answers, strays


def unique_id(id: str, wire: Callable[[str], str], used: dict[str, int]) -> str:
    """The wire id of a call: a second call of the same id gets _2, and so on. `used` counts."""
    found, n = wire(id), used.get(id, 1)
    while found in used:
        n += 1
        found = wire(f"{id}_{n}")
    used[id] = n
    used.setdefault(found, 1)
    return found


def runs(atoms: Iterable[Atom]) -> Iterator[tuple[bool, list[Atom]]]:
    """The atoms in groups: of the assistant (True), or between two of its turns."""
    for own, group in itertools.groupby(atoms, lambda a: isinstance(a, (Said, Thought, Call))):
        yield own, list(group)


# -- arguments ---------------------------------------------------------------

def parse_arguments(value: Any) -> Json:
    """Tool arguments as an object, whatever a model wrote (translation-chat.md 1.6)."""
    found = value
    if isinstance(value, str):
        found = read_arguments(value) if value.strip() else None
    if found is ABSENT:
        return {"raw_arguments": value}
    return found if isinstance(found, dict) else {} if found is None else {"value": found}


def read_arguments(text: str) -> Any:
    """The value that a text means, by ever more lenient readings; ABSENT where none fits."""
    found = loose_json(text)
    if isinstance(found, str):
        inner = loose_json(found)
        found = found if inner is ABSENT else inner
    if found is not ABSENT:
        return found
    bare = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    found = loose_json(re.sub(r",(\s*[}\]])", r"\1", bare))
    if found is ABSENT and bare.startswith(("{'", '{"')) and len(bare) <= LITERAL_CHARS:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            literal = ast.literal_eval(bare)
            dump(literal)
            found = literal
    return found


LITERAL_CHARS = 100_000  # of a Python dict that is tried as arguments


def loose_json(text: str) -> Any:
    """A JSON text, control characters in strings allowed; ABSENT where it is none."""
    try:
        return LOOSE_DECODER.decode(text)
    except (ValueError, RecursionError):
        return ABSENT


LOOSE_DECODER = json.JSONDecoder(strict=False, parse_constant=refuse_constant, parse_float=finite)


def dump_arguments(value: Json) -> str:
    """Arguments as text; what parse_arguments() could not read is what it was."""
    raw = value.get("raw_arguments")
    return raw if isinstance(raw, str) and len(value) == 1 else compact(value)


def compact(value: Any) -> str:
    """A value as compact JSON text."""
    return dump(value).decode("utf-8")


def is_object(text: str) -> bool:
    """Whether arguments are complete: the text of one JSON object."""
    return text.rstrip()[-1:] == "}" and isinstance(loose_json(text), dict)


# -- JSON schemas (translation-chat.md 1.7) ----------------------------------

EMPTY_SCHEMA: Json = {"type": "object", "properties": {}}
FORMATS_KEPT = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6",
                "uuid")
SCHEMA_KEPT = ("type", "title", "description", "properties", "required", "items", "anyOf", "allOf",
               "enum", "const", "$ref", "$defs", "definitions", "default")


def input_schema(schema: Any) -> Json:
    """A tool's parameters with an object at their root, as Anthropic demands."""
    if not isinstance(schema, dict):
        return dict(EMPTY_SCHEMA)
    out = {**schema, "type": "object"}
    properties, required = dict(mapping(schema.get("properties"))), listing(schema.get("required"))
    for union in ("anyOf", "oneOf", "allOf"):
        for branch in map(mapping, listing(out.pop(union, None))):
            for name, value in mapping(branch.get("properties")).items():
                properties.setdefault(name, value)
            if union == "allOf":
                required = [*required, *(r for r in listing(branch.get("required"))
                                         if r not in required)]
    out["properties"] = properties
    return out | ({"required": required} if required else {})


def closed_schema(schema: Any) -> Json:
    """A schema in the form that Anthropic's structured output takes: objects closed, and what it
    cannot say moved into descriptions."""
    if not isinstance(schema, dict):
        return {"type": "string"}
    out: Json = {key: {name: closed_schema(s) for name, s in schema[key].items()}
                 for key in ("$defs", "definitions") if isinstance(schema.get(key), dict)}
    if isinstance(schema.get("$ref"), str):
        return {**out, "$ref": schema["$ref"]}
    said: list[str] = []
    for key, value in schema.items():
        if value is None or key in ("$defs", "definitions", "additionalProperties") or (
                key == "type" and ("enum" in schema or "const" in schema)):
            continue
        if key == "properties" and isinstance(value, dict):
            out[key] = {name: closed_schema(s) for name, s in value.items()}
        elif key == "items" and isinstance(value, dict):
            out[key] = closed_schema(value)
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            out["anyOf" if key == "oneOf" else key] = [closed_schema(s) for s in value]
        elif (key in SCHEMA_KEPT or (key == "format" and value in FORMATS_KEPT)
              or (key == "minItems" and value in (0, 1) and type(value) is int)):
            out[key] = value
        else:
            said.append(f"{key}: {value if isinstance(value, str) else compact(value)}")
    if said:
        note = "{" + ", ".join(said) + "}"
        before = out.get("description")
        out["description"] = f"{before}\n\n{note}" if isinstance(before, str) and before else note
    if out.get("type") == "object" or "properties" in out:
        out["additionalProperties"] = False
    if not any(key in out for key in ("type", "anyOf", "allOf", "enum", "const")):
        out["type"] = "object" if "properties" in out else "string"
    return out


def is_strict(schema: Any) -> bool:
    """Whether a schema is what OpenAI's strict mode demands: all objects closed, all required."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    properties = mapping(schema.get("properties"))
    if schema.get("type") == "object" or "properties" in schema:
        required = {r for r in listing(schema.get("required")) if isinstance(r, str)}
        if schema.get("additionalProperties") is not False or set(properties) != required:
            return False
    if any(key in schema for key in ("oneOf", "allOf", "not", "patternProperties", "if")):
        return False
    named = (mapping(schema.get(key)).values() for key in ("$defs", "definitions"))
    return is_strict([schema.get("items"), schema.get("anyOf"), *properties.values(),
                      *itertools.chain(*named)])


def filled_schema(schema: Any, root: bool = True) -> Any:
    """A schema whose objects all have `properties`, which several Chat servers demand."""
    if isinstance(schema, list):
        return [filled_schema(s, False) for s in schema]
    if not isinstance(schema, dict):
        return dict(EMPTY_SCHEMA) if root else schema
    out = {key: filled_schema(value, False)
           if key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties")
           else {name: filled_schema(s, False) for name, s in value.items()}
           if key in ("properties", "$defs", "definitions") and isinstance(value, dict)
           else value for key, value in schema.items()}
    if out.get("type") == "object" and "properties" not in out:
        out["properties"] = {}
    return out or dict(EMPTY_SCHEMA)


# -- media -------------------------------------------------------------------

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
MAGIC = ((b"\xff\xd8", "image/jpeg"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"),
         (b"RIFF", "image/webp"), (b"%PDF", "application/pdf"))
TEXT_TYPES = re.compile(r"text/.*|application/(json|xml|csv|yaml|x-yaml|toml|javascript)")
DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*?)(;base64)?,", re.IGNORECASE)


def read_data_url(url: str) -> tuple[str, str] | None:
    """Media type and base64 of a data: URL; None for any other."""
    match = DATA_URL.match(url)
    if not match:
        return None
    data = url[match.end():]
    if not match[3]:
        data = base64.b64encode(unquote_to_bytes(data)).decode("ascii")
    media = match[1].lower().strip().replace("image/jpg", "image/jpeg")
    if media in ("", "application/octet-stream", "binary/octet-stream"):
        media = sniffed(data) or media
    return media, data


def sniffed(data: str) -> str | None:
    """The media type that the first bytes of base64 data tell."""
    with contextlib.suppress(ValueError):
        first = base64.b64decode(data[:16] + "=" * (-len(data[:16]) % 4))
        return next((media for magic, media in MAGIC if first.startswith(magic)), None)
    return None


def media_part(url: str, **more: Any) -> Part:
    """An image or a file from a URL of either kind."""
    found = read_data_url(url)
    return Part(media=found[0], data=found[1], **more) if found else Part(url=url, **more)


def decoded_text(part: Part) -> str:
    """The text of a file that is one."""
    try:
        return base64.b64decode(part.data or "").decode("utf-8", "replace")
    except ValueError:
        return ""


def document_text(name: str | None, text: str) -> str:
    """A document as text for a model that takes no files."""
    title = f' title="{name}"' if name else ""
    return f"<document{title}>\n{text}\n</document>"


def data_url(part: Part) -> str:
    """A part with data as a URL."""
    return f"data:{part.media};base64,{part.data}"


def join_lines(texts: Iterable[str]) -> str:
    """Texts on lines of their own (the join rule of translation-chat.md 3.2)."""
    out = ""
    for text in texts:
        out += text if not out or out.endswith("\n") else "\n" + text
    return out


def texts_of(parts: Iterable[Part]) -> list[str]:
    """The texts among parts, empty ones left out."""
    return [p.text for p in parts if p.kind in ("text", "refusal") and p.text.strip()]


REMINDER = re.compile(r"\s*<system-reminder>(?:(?!</system-reminder>).)*</system-reminder>\s*",
                      re.DOTALL)


def reminder(text: str) -> str:
    """A late system text as part of what the user says."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


# -- reasoning carriers (translation-responses.md 1.5) -----------------------

CARRIER = "px1."
CARRIER_BYTES = (4 << 20) + 1  # of what a packed carrier may hold


def seal(kind: str, body: str, text: str, ctx: Context) -> str:
    """Opaque reasoning as one string for the client's own opaque field."""
    bound = text if kind == "at" else ""
    check = sha("\0".join((kind, ctx.realm, bound, body)))[:8]
    return f"{CARRIER}{kind}.{ctx.realm}.{check}.{len(body)}.{body}"


def unseal(value: Any, text: str, ctx: Context) -> Thought | None:
    """What seal() put in; None for foreign, cut or edited strings, and for another provider's."""
    parts = value.split(".", 5) if isinstance(value, str) else []
    if len(parts) != 6 or value != seal(parts[1], parts[5], text, ctx):
        return None
    kind, body = parts[1], parts[5]
    found = unpack(body, ctx) if kind in ("ab", "cd") else body
    return None if found is ABSENT else Thought(kind, text, found)


def pack(value: Any) -> str:
    """A value as the body of a carrier."""
    return to_base64url(zlib.compress(dump(value), 9))


def unpack(body: str, ctx: Context) -> Any:
    """What pack() was given; ABSENT where that cannot be told, or is too much for one request."""
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(from_base64url(body) or b"", CARRIER_BYTES - ctx.unpacked)
        ctx.unpacked += len(raw)
        return load(raw) if inflater.eof else ABSENT
    except (ValueError, zlib.error):
        return ABSENT


# -- token estimates (translation-chat.md 4) ---------------------------------

IMAGE_TOKENS, LEAST_IMAGE, MOST_IMAGE = 1600, 85, 4784
PDF_TOKENS, MOST_PDF = 1500, 100_000
MESSAGE_TOKENS, TOOL_TOKENS, TOOLS_TOKENS = 4, 8, 250
# Members that no model reads.
SILENT_KEYS = frozenset(("type", "role", "id", "call_id", "tool_use_id", "tool_call_id", "status",
                         "detail", "media_type", "signature", "encrypted_content", "cache_control"))
MEDIA_KEYS = frozenset(("data", "url", "file_data", "image_url", "file_url"))


def text_tokens(text: str) -> int:
    """Tokens of a text, a little high: late compaction hurts more than early."""
    ascii_ = len(text) if text.isascii() else len(text.encode("ascii", "ignore"))
    return math.ceil(ascii_ / 3.6) + len(text) - ascii_


def estimate_tokens(payload: Json) -> int:
    """Input tokens of a request body of any protocol; deterministic, and linear in its size."""
    total = sum(content_tokens(payload.get(name)) for name in ("system", "instructions"))
    for name in ("messages", "input"):
        value = payload.get(name) or []
        for item in value if isinstance(value, list) else [value]:
            total += content_tokens(item) + MESSAGE_TOKENS
    for i, tool in enumerate(map(mapping, listing(payload.get("tools")))):
        tool = mapping(tool.get("function")) or tool
        schema = tool.get("input_schema") or tool.get("parameters") or {}
        total += TOOL_TOKENS + text_tokens(compact(schema)) + (TOOLS_TOKENS if i == 0 else 0)
        total += sum(text_tokens(text_of(tool.get(key))) for key in ("name", "description"))
    return max(1, total)


def content_tokens(value: Any) -> int:
    """Tokens of the texts and media at any depth of a value."""
    total, todo = 0, [value]
    while todo:
        at = todo.pop()
        if type(at) is str:
            total += text_tokens(at)
        elif type(at) is list:
            todo += at
        elif type(at) is dict:
            for key, inner in at.items():
                if key in MEDIA_KEYS and type(inner) is str and at.get("type") != "text":
                    total += media_tokens(inner)
                elif key == "input" and type(inner) is dict:  # of a call: names and numbers count
                    total += text_tokens(compact(inner))
                elif key not in SILENT_KEYS:
                    todo.append(inner)
    return total


def media_tokens(text: str) -> int:
    """Tokens of an image or a document: a data: URL, bare base64, or the address of one."""
    if text.startswith(("http://", "https://")):
        return IMAGE_TOKENS
    found = read_data_url(text)
    media, data = found or (sniffed(text), text)
    if media == "application/pdf":
        return min(MOST_PDF, max(PDF_TOKENS, len(data) // 37))
    if media is not None and media.startswith("text/"):
        return text_tokens(data) * 3 // 4
    width, height = image_size(data)
    if not width or not height:
        return IMAGE_TOKENS
    return min(MOST_IMAGE, max(LEAST_IMAGE, width * height // 750))


def image_size(data: str) -> tuple[int, int]:
    """Width and height by an image's own header (PNG, GIF, JPEG, WebP); zeros where it has none."""
    try:
        raw = base64.b64decode(data[:65536 - 65536 % 4] + "=" * (-len(data[:65536]) % 4))
    except ValueError:
        return 0, 0
    big = raw.startswith((b"\x89PNG", b"\xff\xd8"))

    def at(start: int, size: int = 2) -> int:
        return int.from_bytes(raw[start:start + size], "big" if big else "little")

    if raw.startswith(b"\x89PNG"):
        return at(16, 4), at(20, 4)
    if raw.startswith(b"GIF8"):
        return at(6), at(8)
    if raw[12:16] == b"VP8X":
        return at(24, 3) + 1, at(27, 3) + 1
    if raw[12:16] == b"VP8 ":
        return at(26) & 0x3FFF, at(28) & 0x3FFF
    if raw[12:16] == b"VP8L":
        return (at(21, 4) & 0x3FFF) + 1, (at(21, 4) >> 14 & 0x3FFF) + 1
    place = 2
    while big and place + 9 <= len(raw):  # the segments of a JPEG
        if 0xC0 <= raw[place + 1] <= 0xCF and raw[place + 1] not in (0xC4, 0xC8, 0xCC):
            return at(place + 7), at(place + 5)
        place += 2 + at(place + 2)
    return 0, 0



# ============================================================================
#  11  Requests
# ============================================================================
# One reader for each inbound protocol (body to Ask) and one writer for each
# provider protocol (Ask to body); a pair is a reader and a writer. Every field
# is read, reported as dropped, or refused with its path. Pure.

# -- reading Responses (translation-responses.md 2.1, 4.1) -------------------

STATEFUL = ("background", "previous_response_id", "conversation", "prompt")
ECHOED: Json = {
    "instructions": None, "metadata": {}, "max_output_tokens": None, "max_tool_calls": None,
    "temperature": None, "top_p": None, "top_logprobs": 0, "tools": [], "tool_choice": "auto",
    "parallel_tool_calls": True, "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}}, "truncation": "disabled", "user": None,
    "safety_identifier": None, "prompt_cache_key": None, "service_tier": None, "prompt": None,
}
# What history carries and no other protocol has a place for: not worth a word.
ITEM_TRIFLES = frozenset((
    "id", "status", "phase", "type", "internal_chat_message_metadata_passthrough", "agent",
    "caller", "created_by"))


def begin(fields: Fields) -> Ask:
    """A request with what all protocols call by the same names."""
    return Ask(fields.text("model") or fields.ctx.model, stream=fields.flag("stream"),
               temperature=fields.number("temperature"), top_p=fields.number("top_p"))


def read_responses(body: Json, ctx: Context) -> Ask:
    """A Responses request in neutral form."""
    fields = Fields(ctx, body)
    for name in STATEFUL:
        if fields.get(name):
            raise RequestError(f"`{name}` needs state, and this proxy keeps no state;"
                               " send the full input", param=name)
    ctx.echo = {name: default if body.get(name) is None else body[name]
                for name, default in ECHOED.items()}
    ask = begin(fields)
    ask.max_tokens = fields.count("max_output_tokens")
    if ask.max_tokens is not None and ask.max_tokens < 1:
        raise fields.wrong("max_output_tokens", "1 or more")
    if instructions := fields.text("instructions"):
        ask.system.append(Part("text", instructions, path="instructions"))
    read_settings(ask, fields)
    read_openai_common(ask, fields)
    if fields.count("top_logprobs"):
        ask.more["top_logprobs"] = ("top_logprobs", body["top_logprobs"])
    if "message.output_text.logprobs" in fields.list("include"):
        ask.more.setdefault("logprobs", ("include", True))
    for name in ("stream_options", "store"):
        fields.get(name)
    for tool in fields.objects("tools"):
        ask.tools += read_responses_tool(tool)
    ask.choice = read_choice(fields.get("tool_choice", str, dict), ctx)
    read_responses_input(ask, fields.get("input", str, list), ctx)
    fields.close()
    finish_tools(ask, ctx)
    return ask


def keep(ask: Ask, fields: Fields, *names: str) -> None:
    """Keep members for a provider that has the same; the others' writers report them."""
    for name in names:
        if (value := fields.left.pop(name, None)) is not None:
            ask.more[name] = (fields.at(name), value)


def read_openai_common(ask: Ask, fields: Fields) -> None:
    """What Responses and Chat call by the same names: parallel calls, user, tier, cache."""
    ask.parallel = fields.flag("parallel_tool_calls")
    metadata = fields.json("metadata")
    ids = [mapping(metadata).get("user_id"), fields.left.get("safety_identifier"),
           fields.left.get("user")]
    if fields.ctx.inbound == CHAT.word:
        ids = ids[:0:-1]
    ask.user = next((id for id in ids if isinstance(id, str) and id), None)
    if metadata and (list(metadata) != ["user_id"] or fields.ctx.inbound == CHAT.word):
        ask.more["metadata"] = ("metadata", metadata)
    ask.tier = fields.text("service_tier")
    options = fields.json("prompt_cache_options") or {}
    if options.get("ttl") in LONG_TTLS or fields.left.get("prompt_cache_retention") == "24h":
        ask.ttl = "1h"
    ask.marks = options.get("mode") != "explicit"
    if options:
        ask.more["prompt_cache_options"] = ("prompt_cache_options", options)
    for name in ("safety_identifier", "user", "prompt_cache_key", "prompt_cache_retention"):
        fields.left[name] = fields.text(name)
        keep(ask, fields, name)
    if (moderation := fields.left.get("moderation")) and "block" in compact(moderation):
        raise RequestError("`moderation` cannot be done by this provider", param="moderation")


LONG_TTLS = ("30m", "12h", "1h")  # for which a cache mark of an hour is the nearest


def read_settings(ask: Ask, fields: Fields) -> None:
    """Reasoning and text of a Responses request, or of a configuration_update in its input: the
    last one holds."""
    if wish := fields.object("reasoning"):
        level, older = known_effort(wish, "effort"), wish.get("generate_summary")
        summary = wish.text("summary") or older
        if level or summary:
            before = ask.effort or Effort(display="omitted")
            ask.effort = before._replace(level=level or before.level,
                                         display="summarized" if summary else before.display)
        wish.close()
    if text := fields.object("text"):
        ask.format = read_format(text.object("format")) or ask.format
        if not fields.path:
            keep(ask, text, "verbosity")
            text.close()


def known_effort(fields: Fields | None, name: str) -> str | None:
    """An effort level that is one."""
    level = fields.text(name) if fields else None
    if fields and level is not None and level not in EFFORTS:
        fields.ctx.drop(fields.at(name), "unknown effort level")
        return None
    return level


def read_format(fields: Fields | None) -> Format | None:
    """The answer's format: flat in Responses, its schema one level deeper in Chat Completions."""
    kind = fields.text("type") if fields else None
    if fields is None or kind in (None, "text"):
        return None
    if kind == "json_object":
        return Format(None)
    inner = None
    if kind == "json_schema":
        inner = fields.object(kind) if fields.ctx.inbound == CHAT.word else fields
    if inner is None:
        raise fields.wrong("type", "text, json_object or json_schema")
    return Format(inner.json("schema") or {}, inner.text("name") or "output",
                  inner.flag("strict"), inner.text("description"))


STRING: Json = {"type": "string"}
INTEGER: Json = {"type": "integer"}
STRINGS: Json = {"type": "array", "items": STRING}
INTEGERS: Json = {"type": "array", "items": INTEGER}


def object_schema(properties: Json, *required: str) -> Json:
    """The schema of a tool's arguments."""
    named = {"required": list(required)} if required else {}
    return {"type": "object", "properties": properties, **named}


# Built-in tools that the client runs, as the function tools that stand for them (1.4).
CLIENT_TOOLS: Mapping[str, tuple[str, Json]] = {
    "local_shell": ("Runs a command on the user's machine.", object_schema(
        {"command": STRINGS, "workdir": STRING, "timeout_ms": INTEGER,
         "env": {"type": "object", "additionalProperties": STRING}}, "command")),
    "shell": ("Runs shell commands on the user's machine.", object_schema(
        {"commands": STRINGS, "timeout_ms": INTEGER, "max_output_length": INTEGER}, "commands")),
    "apply_patch": ("Creates, changes or deletes a file.", object_schema(
        {"type": {**STRING, "enum": ["create_file", "update_file", "delete_file"]},
         "path": STRING, "diff": STRING}, "type", "path")),
    "tool_search": ("", object_schema({"query": STRING, "limit": INTEGER})),
}
def read_responses_tool(fields: Fields, space: str = "", about: str = "") -> list[Tool]:
    """One entry of `tools` (a namespace holds several)."""
    value, path = dict(fields.left), fields.path
    kind = fields.text("type") or "function"
    if kind == "namespace":
        space, about = fields.text("name") or "", fields.text("description") or ""
        return [tool for child in fields.objects("tools")
                for tool in read_responses_tool(child, space, about)]
    deferred = bool(fields.flag("defer_loading"))
    if kind == "tool_search" and fields.text("execution") != "client":
        return [Tool("hosted_search", kind, path=path)]
    if kind in CLIENT_TOOLS:
        text, schema = CLIENT_TOOLS[kind]
        if kind == "tool_search":
            schema = fields.json("parameters") or schema
        return [Tool(kind, kind, fields.text("description") or text, schema, raw=value, path=path)]
    if kind.startswith("web_search"):
        return [Tool("web_search", "web_search", raw=value, path=path)]
    if kind not in ("function", "custom"):
        return [Tool("hosted", kind, raw=value, path=path)]
    name, description = fields.name(), fields.text("description")
    if about and len(about) < 200:
        description = f"[{about}] {description or ''}".rstrip()
    schema_ = fields.json("parameters") if kind == "function" else None
    return [Tool(kind, name, description, schema_, space, fields.flag("strict"), raw=value,
                 deferred=deferred, path=path)]


def read_choice(value: Any, ctx: Context) -> Choice | None:
    """The tool_choice of a Responses or a Chat request; the latter nests what it names, and knows
    Anthropic's words, too."""
    chat = ctx.inbound == CHAT.word
    if value is None or isinstance(value, str):
        if value not in (None, "auto", "none", "required", "any" if chat else None):
            raise RequestError("`tool_choice` must be auto, none, required or an object",
                               param="tool_choice")
        return Choice("required" if value == "any" else value) if value else None
    fields = Fields(ctx, value, "tool_choice")
    kind = fields.text("type") or ("function" if chat else "")
    if chat and kind in ("auto", "none", "any", "tool"):
        name = fields.text("name") or ""
        return Choice({"any": "required"}.get(kind, kind), (("", name),) if name else ())
    inner = (chat and fields.object(kind)) or fields
    if kind == "allowed_tools":
        names = [choice_name(tool, tool.text("type") or "") for tool in inner.objects("tools")]
        return Choice("allowed", tuple(names), inner.text("mode") == "required")
    return Choice("tool", (choice_name(inner, kind),))


def choice_name(fields: Fields, kind: str) -> tuple[str, str]:
    """Which tool a choice means: (namespace, name); built-in tools of Responses are named by their
    type."""
    if fields.ctx.inbound == CHAT.word:
        fields, kind = fields.object(kind or "function") or fields, ""
    name = fields.text("name") or kind
    return fields.text("namespace") or "", "web_search" if name.startswith("web_search_") else name


def finish_tools(ask: Ask, ctx: Context) -> None:
    """Leave the tools that can be sent: deferred ones once they were loaded, hosted ones not."""
    by_client = any(tool.kind == "tool_search" for tool in ask.tools)
    forced = ask.choice.names[0][1] if ask.choice and ask.choice.mode == "tool" else None
    kept = []
    for tool in unique_tools(sorted(ask.tools, key=lambda t: t.deferred and by_client)):
        searches = (ctx.caps.web_search != "off"
                    and mapping(tool.raw).get("external_web_access") is not False)
        if tool.kind in ("hosted", "hosted_search") or (tool.kind == "web_search" and not searches):
            ctx.drop(tool.path, f"no {tool.name} with this provider")
            if forced == tool.name:
                raise RequestError(f"tool_choice forces `{tool.name}`, which this provider"
                                   " does not have", param="tool_choice")
        elif not (tool.deferred and by_client):
            kept.append(tool)
    lost = ("hosted", "web_search") if ctx.provider == CHAT.word else ("hosted",)
    if not kept and not by_client and any(tool.kind in lost for tool in ask.tools):
        raise RequestError(f"tool `{ask.tools[0].name}` is not available with this provider",
                           param="tools")
    ask.tools = kept


def read_responses_input(ask: Ask, value: Any, ctx: Context) -> None:
    """`input` as atoms; leading system texts become the system text."""
    if value is None or (not value and not ask.system):
        raise RequestError("`input` must be a non-empty string or an array", param="input")
    if isinstance(value, str):
        ask.atoms.append(User([Part("text", value, path="input", current=True)]))
        return
    for i, item in enumerate(value):
        fields = Fields(ctx, item, f"input[{i}]")
        kind = fields.text("type") or ("message" if "role" in fields.left else None)
        if kind in (None, "item_reference"):
            raise RequestError(f"`input[{i}]` refers to an item that only OpenAI has stored;"
                               " send the item itself", param=f"input[{i}]")
        if kind not in RESPONSES_ITEMS:
            ctx.drop(fields.path, f"no {brief_kind(kind)} items with this provider")
            ask.atoms.append(User([Part("text", omitted_words("item", kind, ctx))]))
            continue
        atom = RESPONSES_ITEMS[kind](ask, fields, kind)
        fields.close(trifles=ITEM_TRIFLES)
        if isinstance(atom, System) and not ask.atoms:
            ask.system += [part._replace(type=atom.role) if part.kind == "text" else part
                           for part in atom.parts]  # the role decides only how a text is sent
        elif atom is not None:
            ask.atoms.append(atom)


TRANSLATED_TO = {"messages": "Anthropic", "chat": "Chat Completions", "responses": "Responses"}


def omitted_words(what: str, kind: str, ctx: Context) -> str:
    """The words that stand for a piece of a Responses request that the provider cannot be told."""
    return (f"[OpenAI Responses {what} `{kind}` omitted during"
            f" {TRANSLATED_TO[ctx.provider]} translation]")


def read_message_item(ask: Ask, fields: Fields, kind: str) -> Atom | None:
    """A message of any role."""
    role = fields.text("role")
    parts = read_content(fields, "content", responses_part_of)
    if role == "user":
        return User(parts)
    if role in ("system", "developer"):
        return System(parts, role)
    if role != "assistant":
        raise RequestError(f"`{fields.at('role')}` must be user, assistant, system or developer",
                           param=fields.path)
    return Said(parts)


def read_content(fields: Fields, key: str, read: Callable[[Fields, str], Part]) -> list[Part]:
    """A content member, string or array, as parts; a bare string in an array is text."""
    value, path = fields.get(key, str, list), fields.at(key)
    if isinstance(value, str):
        return [Part("text", value, path=path)] if value else []
    out: list[Part] = []
    for i, entry in enumerate(value or ()):
        if isinstance(entry, str):
            out.append(Part("text", entry, path=f"{path}[{i}]"))
        else:
            inner = Fields(fields.ctx, entry, f"{path}[{i}]")
            part = read(inner, inner.text("type") or "")
            out += part.raw if part.kind == "several" else (part,)
    return out


def responses_part_of(fields: Fields, kind: str) -> Part:
    """A content part of a Responses item."""
    path, mark = fields.path, openai_mark(fields)
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return Part("text", fields.text("text") or "", path=path, mark=mark, type=kind)
    if kind == "refusal":
        return Part("refusal", fields.text("refusal") or "", path=path, type=kind)
    if kind == "input_image":
        url, id, detail = fields.text("image_url"), fields.text("file_id"), fields.text("detail")
        more: Json = {"kind": "image", "detail": detail, "path": path, "mark": mark, "type": kind}
        return media_part(url, **more) if url else Part(id=id or "", **more)
    if kind == "input_file":
        return file_part(fields, mark, kind, fields.text("file_url"))
    return Part("audio" if kind == "input_audio" else "unknown", path=path, type=kind,
                raw=dict(fields.left))


def openai_mark(fields: Fields) -> Json | None:
    """A prompt_cache_breakpoint as a cache mark."""
    value = mapping(fields.left.get("prompt_cache_breakpoint"))
    if value.get("mode") != "explicit":
        return None
    return cache_mark({"ttl": "1h" if value.get("ttl") in LONG_TTLS else None})


def file_part(fields: Fields, mark: Json | None, kind: str, url: str | None = None) -> Part:
    """A file part of either OpenAI protocol: data as data: URL or bare base64, a URL, or an id."""
    name, data, id = fields.text("filename"), fields.text("file_data"), fields.text("file_id")
    more: Json = {"kind": "file", "name": name, "path": fields.path, "mark": mark, "type": kind}
    if data and not data.startswith(("data:", "http://", "https://")):
        media = "application/pdf" if data.startswith("JVBER") else MEDIA_OF.get(
            (name or "").rsplit(".", 1)[-1].lower(), "application/octet-stream")
        return Part(media=media, data=data, **more)
    if data or url:
        part = media_part(data or url or "", **more)
        return part._replace(media="application/pdf") if (
            part.media in ("", "application/octet-stream")
            and (name or "").lower().endswith(".pdf")) else part
    return Part(id=id or "", **more)


MEDIA_OF = {"pdf": "application/pdf", "txt": "text/plain", "md": "text/markdown",
            "csv": "text/csv", "json": "application/json", "xml": "text/xml", "html": "text/html",
            "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "gif": "image/gif",
            "webp": "image/webp"}


def read_reasoning_item(ask: Ask, fields: Fields, kind: str) -> Atom | None:
    """A reasoning item whose carrier is ours and whole; foreign ones go without a word."""
    texts = [text for part in fields.list("summary")
             if isinstance(text := mapping(part).get("text"), str)]
    fields.get("content")
    return own_thought(fields, fields.text("encrypted_content") or None, "\n\n".join(texts))


def own_thought(fields: Fields, sealed: str | None, text: str) -> Thought | None:
    """The reasoning in a carrier of ours; None, and a word in the report, for a foreign one."""
    thought = unseal(sealed, text, fields.ctx)
    if thought is None and sealed is not None:
        fields.ctx.drop(fields.path, "reasoning_foreign: not of this provider, cut or edited")
    return thought


def read_call_item(ask: Ask, fields: Fields, kind: str) -> Atom:
    """A call of a function or a custom tool."""
    call = read_call(fields, fields.text("call_id") or "", "input" in fields.left)
    return call._replace(space=fields.text("namespace") or "")


def read_call(fields: Fields, id: str, custom: bool, mark: Json | None = None) -> Call:
    """A call of either OpenAI protocol by the object that has its name."""
    name = fields.text("name") or ""
    if custom:
        text = fields.text("input") or ""
        return Call(id, name, compact({"input": text}), {"input": text}, "custom", mark=mark)
    value = fields.get("arguments", str, dict)
    arguments = compact(value) if isinstance(value, dict) else value or ""
    return Call(id, name, arguments, mark=mark)


def read_output_item(ask: Ask, fields: Fields, kind: str) -> Atom:
    """The result of a call; older clients name a local shell's call by `id`."""
    failed = fields.left.get("status") == "incomplete"
    id = fields.text("call_id") or ""
    if kind == "local_shell_call_output":
        id = id or fields.text("id") or ""
    value = fields.left.get("output")
    if isinstance(value, list) and all(isinstance(mapping(v).get("type"), str) for v in value):
        return Out(id, read_content(fields, "output", responses_part_of), failed)
    fields.get("output")
    text = value if isinstance(value, str) else "" if value is None else compact(value)
    return Out(id, [Part("text", text)] if text else [], failed)


# Calls of built-in tools that the client runs: kind, the member with what is to be done, and what
# the arguments of CLIENT_TOOLS are called in it, where that differs.
CLIENT_CALLS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "local_shell_call": ("local_shell", "action", {"workdir": "working_directory"}),
    "shell_call": ("shell", "action", {}),
    "apply_patch_call": ("apply_patch", "operation", {}),
}


def read_client_call(ask: Ask, fields: Fields, kind: str) -> Atom:
    """A call of a built-in tool as a call with the arguments of CLIENT_TOOLS."""
    tool, member, names = CLIENT_CALLS[kind]
    action = fields.json(member) or {}
    return client_call(fields, tool, {
        name: value for name in CLIENT_TOOLS[tool][1]["properties"]
        if (value := action.get(names.get(name, name))) not in (None, {})})


def client_call(fields: Fields, kind: str, input: Json) -> Call:
    """A call of a built-in tool that the client runs."""
    id = fields.text("call_id") or fields.text("id") or ""
    return Call(id, kind, compact(input), input, kind)


def read_shell_output(ask: Ask, fields: Fields, kind: str) -> Atom:
    """A shell_call_output as text: what the commands wrote, and how they ended."""
    value = fields.get("output", str, list)
    texts: list[str] = [value] if isinstance(value, str) else []
    for entry in map(mapping, listing(value)):
        outcome = mapping(entry.get("outcome"))
        wrote = text_of(entry.get("stdout")), text_of(entry.get("stderr"))
        texts += [wrote[0]] if wrote[0] else []
        texts += [f"[stderr]\n{wrote[1]}"] if wrote[1] else []
        texts.append("[timed out]" if outcome.get("type") == "timeout"
                     else f"[exit code {outcome.get('exit_code', 0)}]")
    text = join_lines(texts)
    id = fields.text("call_id") or fields.text("id") or ""
    return Out(id, [Part("text", text)] if text else [], kind="shell")


def read_patch_output(ask: Ask, fields: Fields, kind: str) -> Atom:
    """An apply_patch_call_output as text."""
    status, text = fields.text("status") or "completed", fields.text("output")
    return Out(fields.text("call_id") or "", [Part("text", text or status)], status == "failed")


def read_search_call(ask: Ask, fields: Fields, kind: str) -> Atom | None:
    """A tool_search_call that the client runs; the server's own need no words."""
    if not fields.left.get("call_id"):
        return None
    return client_call(fields, "tool_search", parse_arguments(fields.get("arguments", str, dict)))


def read_found_tools(ask: Ask, fields: Fields, kind: str) -> Atom | None:
    """Tools that are there from now on; after a search the model is told their names."""
    found = [tool._replace(deferred=False) for entry in fields.objects("tools")
             for tool in read_responses_tool(entry)]
    ask.tools += found
    if kind == "additional_tools":
        fields.get("role")
        return None
    id = fields.text("call_id")
    names = ", ".join(full_name(tool.space, tool.name) for tool in found)
    return Out(id, [Part("text", f"Loaded tools: {names}")]) if id else None


RESPONSES_ITEMS: Mapping[str, Callable[[Ask, Fields, str], Atom | None]] = {
    "message": read_message_item, "reasoning": read_reasoning_item,
    "function_call": read_call_item, "function_call_output": read_output_item,
    "custom_tool_call": read_call_item, "custom_tool_call_output": read_output_item,
    "local_shell_call": read_client_call, "local_shell_call_output": read_output_item,
    "shell_call": read_client_call, "shell_call_output": read_shell_output,
    "apply_patch_call": read_client_call, "apply_patch_call_output": read_patch_output,
    "tool_search_call": read_search_call, "tool_search_output": read_found_tools,
    "additional_tools": read_found_tools,
    "configuration_update": lambda ask, fields, kind: read_settings(ask, fields),
    "web_search_call": lambda ask, fields, kind: fields.left.clear(),  # needs no words
}

# -- reading Chat Completions (translation-chat.md 2.2-2.6) ------------------

# Known members that nobody else has; a value that changes nothing is no loss.
CHAT_ONLY: Json = {
    "n": 1, "seed": None, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0,
    "prediction": None, "logprobs": False, "top_logprobs": 0, "store": False}


def read_chat(body: Json, ctx: Context) -> Ask:
    """A Chat Completions request in neutral form."""
    fields = Fields(ctx, body)
    ask, messages = begin(fields), read_messages_member(fields)
    if (fields.count("n") or 1) > 1:
        raise RequestError("`n` above 1 is not possible with this provider", param="n")
    if "audio" in fields.list("modalities"):
        raise RequestError("audio output is not possible with this provider", param="modalities")
    limits = [fields.count("max_completion_tokens"), fields.count("max_tokens")]
    ask.max_tokens = next((max(limit, 1) for limit in limits if limit is not None), None)
    ask.top_k = fields.count("top_k")
    stop = fields.get("stop", str, list)
    ask.stop = [s for s in (stop if isinstance(stop, list) else [stop])
                if isinstance(s, str) and s.strip()]
    read_chat_reasoning(ask, fields)
    read_openai_common(ask, fields)
    ask.format = read_format(fields.object("response_format"))
    ask.search = fields.json("web_search_options")
    options = fields.object("stream_options")
    usage = options.flag("include_usage") if options else None
    if options:
        keep(ask, options, "include_obfuscation")
    ctx.include_usage = bool(usage) or not ask.stream  # an answer in one piece always has it
    for name, idle in CHAT_ONLY.items():
        if fields.left.get(name) == idle:
            fields.get(name)
    keep(ask, fields, *CHAT_ONLY, "verbosity")
    read_chat_tools(ask, fields, ctx)
    read_chat_messages(ask, messages, ctx)
    fields.close()
    return ask


def read_messages_member(fields: Fields) -> list[Any]:
    """The member `messages`, which may not be empty."""
    if messages := fields.list("messages"):
        return messages
    raise fields.wrong("messages", "a non-empty array")


def read_chat_reasoning(ask: Ask, fields: Fields) -> None:
    """The reasoning wish, in one of the four ways that Chat clients know."""
    level = known_effort(fields, "reasoning_effort")
    wish, thinking = fields.object("reasoning"), fields.object("thinking")
    output = known_effort(fields.object("output_config"), "effort")
    found = Effort(level, display="summarized") if level else None
    if wish:
        budget, enabled = wish.count("max_tokens"), wish.flag("enabled")
        named = known_effort(wish, "effort") or (
            None if enabled is None else "medium" if enabled else "none")
        if budget is None:
            level = level or named
        else:
            level = None if budget else "none"
        if level or budget:
            found = Effort(level, budget or None, "summarized")
        if found and wish.flag("exclude"):
            found = found._replace(display=None)
        wish.close()
    if thinking:
        kind, budget = thinking.text("type"), thinking.count("budget_tokens")
        display = thinking.text("display") or ("summarized" if kind == "enabled" else None)
        found = Effort("none") if kind == "disabled" else Effort(
            output or (None if budget else level), budget, display, kind)
    elif output:
        found = Effort(output, display="summarized")
    ask.effort = found


ANTHROPIC_TOOL = re.compile(r"(bash|text_editor|computer|memory|web_search|web_fetch"
                            r"|code_execution)_\d{8}")


def read_chat_tools(ask: Ask, fields: Fields, ctx: Context) -> None:
    """Tools, functions (their older form) and the wishes about them."""
    tools = [read_chat_tool(tool, ctx) for tool in fields.objects("tools")]
    functions = [read_function(old, "function", None) for old in fields.objects("functions")]
    if functions:
        ctx.legacy, ask.parallel = True, False
    choice = fields.get("tool_choice", str, dict)
    if choice is None and (old := fields.get("function_call", str, dict)) is not None:
        choice = {"type": "function", "function": old} if isinstance(old, dict) else old
    ask.choice = read_choice(choice, ctx)
    last = {tool.name: tool for tool in (*tools, *functions)}
    ask.tools = [tool for tool in last.values() if tool.kind != "hosted"]
    unserved = [tool for tool in tools if tool.kind == "hosted"]
    for tool in unserved:
        ctx.drop(tool.path, f"no {tool.name} with this provider")
    if unserved and not ask.tools:
        raise RequestError(f"tool `{unserved[0].name}` is not available with this provider",
                           param=unserved[0].path)


def read_chat_tool(fields: Fields, ctx: Context) -> Tool:
    """One entry of `tools`."""
    value, path = dict(fields.left), fields.path
    kind, mark = fields.text("type") or "function", fields.mark()
    if kind in ("function", "custom"):
        inner = fields.object(kind) or (fields if "name" in fields.left else None)
        if inner is None:
            raise fields.wrong(kind, "an object")
        return read_function(inner, kind, mark)
    if ANTHROPIC_TOOL.fullmatch(kind) and ctx.provider == MESSAGES.word:
        return Tool("raw", fields.text("name") or kind, raw=value, path=path)
    if kind.startswith("web_search") and ctx.caps.web_search == "native":
        return Tool("web_search", "web_search", raw=value, path=path)
    return Tool("hosted", kind, path=path)


def read_function(fields: Fields, kind: str, mark: Json | None) -> Tool:
    """The inner object of a function or custom tool."""
    name, own_mark = fields.name(), fields.mark()
    extra = {key: fields.left.pop(key) for key in ("defer_loading", "eager_input_streaming",
                                                   "input_examples")
             if isinstance(fields.left.get(key), (bool, list))}
    raw = {"format": fields.json("format")} if kind == "custom" else extra
    schema = fields.get("parameters")
    found = Tool(kind, name, fields.text("description"),
                 schema if isinstance(schema, dict) else None, strict=fields.flag("strict"),
                 mark=mark or own_mark, raw=raw, path=fields.path)
    fields.close()
    return found


def read_chat_messages(ask: Ask, messages: list[Any], ctx: Context) -> None:
    """`messages` as atoms. What follows the assistant's last word is the request at hand: only
    there can a part that the provider cannot take be refused."""
    last = max((i for i, m in enumerate(messages) if mapping(m).get("role") == "assistant"),
               default=-1)
    legacy: list[tuple[str, str]] = []  # name and id of function_call without a result
    for i, message in enumerate(messages):
        fields = Fields(ctx, message, f"messages[{i}]")
        role, mark = fields.text("role") or "", fields.mark()
        if role == "assistant":
            ask.atoms += read_assistant(fields, i, legacy, mark)
        else:
            atom = read_chat_turn(fields, role, mark, legacy, i > last)
            if isinstance(atom, System) and not ask.atoms:
                ask.system += atom.parts
            else:
                ask.atoms.append(atom)
        fields.close(trifles=MESSAGE_TRIFLES)


MESSAGE_TRIFLES = frozenset(("annotations", "parsed", "id", "provider_specific_fields"))


def mark_last(parts: list[Part], mark: Json | None) -> None:
    """Put a message's cache mark on the last of its parts that is sent."""
    for at in reversed(range(len(parts) if mark else 0)):
        if parts[at].kind != "text" or parts[at].text.strip():
            parts[at] = parts[at]._replace(mark=mark)
            return


def read_chat_turn(fields: Fields, role: str, mark: Json | None, legacy: list[tuple[str, str]],
                   current: bool) -> Atom:
    """A message of anyone but the assistant."""
    result = role in ("tool", "function")
    content = fields.left.get("content")
    if result and type(content) in (int, float, bool, dict):
        fields.left["content"] = compact(content)
    parts = read_content(fields, "content", chat_part_of)
    if result:
        name = fields.text("name") or ""
        found = next((pair for pair in reversed(legacy) if pair[0] == name), None)
        id = own_id(fields, "tool_call_id") if role == "tool" else found[1] if found else name
        if found and role == "function":
            legacy.remove(found)
        return Out(id, parts, name=name, mark=mark)
    if current and role == "user":
        parts = [part._replace(current=True) for part in parts]
    mark_last(parts, mark)
    if role in ("system", "developer"):
        return System(parts, role)
    if role != "user":
        fields.ctx.drop(fields.at("role"), "unknown role, taken for the user's")
    return User(parts)


def read_assistant(fields: Fields, i: int, legacy: list[tuple[str, str]],
                   mark: Json | None) -> list[Atom]:
    """An assistant message: reasoning at its place among text and calls, as `x_at` says."""
    parts = read_content(fields, "content", chat_part_of)
    if refusal := fields.text("refusal"):
        parts.append(Part("refusal", refusal, path=fields.at("refusal")))
    calls = [read_chat_call(call) for call in fields.objects("tool_calls")]
    if (old := fields.object("function_call")) is not None:
        name = old.text("name") or ""
        legacy.append((name, f"fc_{i}"))
        calls.append(Call(f"fc_{i}", name, old.text("arguments") or ""))
    if mark and calls:
        calls[-1] = calls[-1]._replace(mark=mark)
    else:
        mark_last(parts, mark)
    if fields.get("audio"):
        fields.ctx.drop(fields.at("audio"))
    thoughts = read_details(fields)
    if any(at and at[0] > sum(len(p.text) for p in parts) for at, _ in thoughts):
        fields.ctx.drop(fields.at("reasoning_details"), "the text it belongs to was edited")
        thoughts = []
    return place_thoughts(thoughts, parts, calls)


def place_thoughts(thoughts: list[tuple[tuple[int, int] | None, Thought]], parts: list[Part],
                   calls: list[Call]) -> list[Atom]:
    """Text, then calls, with each thought at (characters of text, calls) that came before it."""
    out: list[Atom] = [thought for at, thought in thoughts if at is None]
    placed = [(at, thought) for at, thought in thoughts if at is not None]
    done = 0
    for part in parts:
        while placed and placed[0][0][1] == 0 and placed[0][0][0] < done + len(part.text):
            (chars, _), thought = placed.pop(0)
            cut = chars - done
            if cut > 0:
                out.append(Said([part._replace(text=part.text[:cut], mark=None)]))
                part, done = part._replace(text=part.text[cut:]), chars
            out.append(thought)
        out.append(Said([part]))
        done += len(part.text)
    for n, call in enumerate(calls):
        while placed and placed[0][0][1] <= n:
            out.append(placed.pop(0)[1])
        out.append(call)
    return out + [thought for _, thought in placed]


def own_id(fields: Fields, name: str) -> str:
    """The id of a call, decoded if it was made for Anthropic's alphabet and goes elsewhere."""
    id = fields.text(name) or ""
    return id if fields.ctx.provider == MESSAGES.word else original_id(id)


def read_chat_call(fields: Fields) -> Call:
    """One entry of tool_calls."""
    kind, id, mark = fields.text("type") or "function", own_id(fields, "id"), fields.mark()
    custom = kind == "custom"
    return read_call(fields.object("custom" if custom else "function") or fields, id, custom, mark)


def read_details(fields: Fields) -> list[tuple[tuple[int, int] | None, Thought]]:
    """The reasoning of an assistant message that can be sent back, with its places."""
    ctx, left = fields.ctx, fields.left
    plain, older = left.pop("reasoning_content", None), left.pop("reasoning", None)
    details, blocks = left.pop("reasoning_details", None), left.pop("thinking_blocks", None)
    plain = plain or older
    blocks = blocks or mapping(left.get("provider_specific_fields")).get("thinking_blocks")
    found: list[tuple[tuple[int, int] | None, Thought]] = []
    for entry in map(mapping, listing(details)):
        at = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(entry.get("x_at")))
        if thought := detail_thought(entry, ctx):
            found.append(((int(at[1]), int(at[2])) if at else None, thought))
    if not found:  # Anthropic's own blocks, as LiteLLM hands them to clients
        found = [(None, thought) for block in map(mapping, listing(blocks))
                 if (thought := signed_thought(block.get("thinking"), block))]
    if not found and isinstance(plain, str) and plain and ctx.caps.lenient_thinking:
        found = [(None, Thought("at", plain, ""))]
    elif plain and not found:
        ctx.drop(fields.at("reasoning_content"), "no signature of this provider came with it")
    return found


def detail_thought(entry: Json, ctx: Context) -> Thought | None:
    """An entry of reasoning_details that this provider's own answer was the source of."""
    if text_of(data := entry.get("data")).startswith(CARRIER):
        return unseal(data, "", ctx)
    if entry.get("format") in (None, "anthropic-claude-v1"):
        return signed_thought(entry.get("text"), entry)
    return None


def signed_thought(text: Any, block: Json) -> Thought | None:
    """Reasoning of Anthropic's, with its signature or as data that is redacted."""
    signature, data = block.get("signature"), block.get("data")
    if isinstance(signature, str) and isinstance(text, str):
        return Thought("at", text, signature)
    return Thought("ar", "", data) if isinstance(data, str) and data else None


def chat_part_of(fields: Fields, kind: str) -> Part:
    """A content part of a Chat message."""
    path, raw = fields.path, fields.left
    mark = cache_mark(raw.get("cache_control")) or openai_mark(fields)
    if kind in ("text", "input_text", "output_text") or (not kind and "text" in raw):
        return Part("text", fields.text("text") or "", path=path, mark=mark, type=kind)
    if kind == "refusal":
        return Part("refusal", fields.text("refusal") or "", path=path, type=kind)
    if kind == "image_url":
        value = fields.get("image_url", str, dict)
        inner = Fields(fields.ctx, {"url": value} if isinstance(value, str) else value or {},
                       f"{path}.image_url")
        url = inner.text("url") or ""
        more: Json = {"kind": "image", "detail": inner.text("detail"), "path": path,
                      "mark": mark, "type": kind}
        return media_part(url, **more) if url and not url.startswith("file_") else Part(
            id=url, **more)
    if kind == "file":
        return file_part(fields.object("file") or fields, mark, kind)._replace(path=path)
    if kind in ("tool_result", "search_result") or (
            kind in ("image", "document") and "source" in raw):
        return Part("raw", path=path, type=kind, raw={"type": kind, **raw})
    return Part("audio" if kind == "input_audio" else "unknown", path=path, type=kind, raw=raw)

# -- reading Anthropic Messages (translation-responses.md 3.1, -chat.md 3.2-3.5)

SERVER_STATE = ("mcp_servers", "thread", "compaction")
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:\s*(?:[\w.-]+=[^;\n]*;?[ \t]*)*\n?")
MESSAGES_ONLY = ("container", "context_management", "fallbacks", "fallback_credit_token",
                 "inference_geo", "diagnostics", "user_profile_id", "workspace_id", "betas",
                 "billing_policy")


def read_messages(body: Json, ctx: Context) -> Ask:
    """An Anthropic Messages request in neutral form."""
    fields = Fields(ctx, body)
    ask, messages = begin(fields), read_messages_member(fields)
    for name in SERVER_STATE:
        if fields.get(name):
            raise RequestError(
                f"`{name}` needs a server of Anthropic; this provider has none", param=name,
                # what makes Anthropic's SDKs go on without a thread
                details={"error_code": f"{name}_unsupported_request", "unsupported": [name]})
    ask.max_tokens, ask.top_k = fields.count("max_tokens"), fields.count("top_k")
    ask.stop = [s for s in fields.list("stop_sequences") if isinstance(s, str) and s]
    fields.left["chat_template_kwargs"] = fields.json("chat_template_kwargs")
    keep(ask, fields, "chat_template_kwargs")
    ask.system = [part._replace(text=BILLING_HEADER.sub("", part.text))
                  for part in read_content(fields, "system", messages_part_of)
                  if part.kind == "text"]
    read_messages_wishes(ask, fields, ctx)
    tools = MessagesTools(ask, ctx)
    for tool in fields.objects("tools"):
        tools.add(tool)
    effort = read_message_list(ask, messages, ctx, tools)
    if ctx.provider == CHAT.word:
        clear_thinking(ask, fields.json("context_management") or {})
    if effort and not (ask.effort and ask.effort.switched):
        ask.effort = (ask.effort or Effort())._replace(level=effort)
    if choice := fields.object("tool_choice"):
        read_messages_choice(choice, ask)
    tools.settle()
    for name in MESSAGES_ONLY:
        if fields.get(name):
            ctx.drop(name)
    fields.get("cache_control")
    fields.close()
    return ask


def clear_thinking(ask: Ask, management: Json) -> None:
    """Do what clear_thinking asks for: only the last turns of the assistant keep their thinking."""
    keeps = [mapping(edit.get("keep")).get("value") for edit in map(
        mapping, listing(management.get("edits"))) if edit.get("type") == "clear_thinking_20251015"]
    if not keeps or type(keeps[0]) is not int:
        return
    groups = [(own, group) for own, group in runs(ask.atoms)]
    turns = sum(own for own, _ in groups)
    ask.atoms = []
    for own, group in groups:
        cleared = own and turns > keeps[0]
        turns -= own
        ask.atoms += [a for a in group if not (cleared and isinstance(a, Thought))]


def read_messages_wishes(ask: Ask, fields: Fields, ctx: Context) -> None:
    """Thinking, effort, format, user and tier."""
    output, thinking = fields.object("output_config"), fields.object("thinking")
    kind = thinking.text("type") if thinking else None
    level = known_effort(output, "effort")
    # a Chat provider's reasoning must come back, whether or not it was asked for
    ctx.wants_thinking = kind in ("enabled", "adaptive") or ctx.provider == CHAT.word
    if thinking:
        budget, display = thinking.count("budget_tokens"), thinking.text("display")
        off = kind in ("disabled", "between_tools")
        ask.effort = Effort("none" if off else level, budget if kind == "enabled" else None,
                            display or (None if off else "summarized"),
                            "off" if off else "on")
    elif level:
        ask.effort = Effort(level)
    older = fields.object("output_format")
    if form := (output.object("format") if output else None) or older:
        if form.text("type") != "json_schema":
            raise form.wrong("type", "json_schema")
        name = "output" if ctx.provider == CHAT.word else "anthropic_json_schema"
        ask.format = Format(form.json("schema") or {}, name)
    if output:
        output.close()
    metadata = fields.object("metadata")
    ask.user = metadata.text("user_id") if metadata else None
    ask.tier = {"auto": "auto", "standard_only": "default"}.get(fields.text("service_tier") or "")
    if fields.text("speed") == "fast":
        ask.tier = "priority" if ctx.caps.vendor_fields else ask.tier
        if not ctx.caps.vendor_fields:
            ctx.drop("speed", "not taken by this provider")


def read_messages_choice(fields: Fields, ask: Ask) -> None:
    """The tool_choice of a Messages request."""
    kind = fields.text("type")
    if fields.flag("disable_parallel_tool_use"):
        ask.parallel = False
    if kind not in ("auto", "any", "none", "tool"):
        raise fields.wrong("type", "auto, any, none or tool")
    names = (("", fields.text("name") or ""),) if kind == "tool" else ()
    ask.choice = Choice("required" if kind == "any" else kind, names)


def read_message_list(ask: Ask, messages: list[Any], ctx: Context,
                      tools: MessagesTools) -> str | None:
    """`messages` as atoms; the effort that the last system message among them asks for."""
    effort: str | None = None
    last = max((i for i, m in enumerate(messages) if mapping(m).get("role") == "user"), default=-1)
    for i, message in enumerate(messages):
        fields = Fields(ctx, message, f"messages[{i}]")
        role = fields.text("role")
        if role not in ("user", "assistant", "system"):
            raise fields.wrong("role", "user or assistant")
        content = fields.get("content", str, list)
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        if role == "system":
            effort = known_effort(fields.object("output_config"), "effort") or effort
            if fields.text("clear_at") == "next_user_message" and i < last:
                continue
        atoms: list[Atom] = []
        for k, block in enumerate(blocks):
            part = Fields(ctx, block, f"{fields.path}.content[{k}]")
            found = read_block(part, part.text("type") or "", role, tools, ctx)
            before, after = rendered(atoms[-1:]), rendered(found)
            if before and after:  # a server tool's call and its result are one text
                found = [Said([before._replace(text=join_lines([before.text, after.text]))])]
                atoms.pop()
            atoms += found
        add_message(ask, role, atoms)
    return effort


def add_message(ask: Ask, role: str, atoms: list[Atom]) -> None:
    """Put a message's atoms in: results first, and user parts together."""
    if role == "user":
        parts = [part for atom in atoms if isinstance(atom, User) for part in atom.parts]
        ask.atoms += [atom for atom in atoms if isinstance(atom, Out)]
        if parts:
            ask.atoms.append(User(parts))
    elif role == "system":
        parts = [part for atom in atoms if isinstance(atom, (User, Said)) for part in atom.parts]
        if texts_of(parts) and not ask.atoms:
            ask.system += parts
        elif texts_of(parts):
            ask.atoms.append(System(parts, "developer"))
    else:
        ask.atoms += atoms


def read_block(fields: Fields, kind: str, role: str, tools: MessagesTools,
               ctx: Context) -> list[Atom]:
    """One content block as atoms."""
    if kind == "tool_use" and role == "assistant":
        name = fields.text("name") or ""
        tools.named.append(name)
        id = original_id(fields.text("id") or "")
        input = parse_arguments(fields.get("input"))
        return [Call(id, name, dump_arguments(input), input)]
    if kind == "tool_result":
        parts = read_content(fields, "content", messages_part_of)
        tools.named += [part.name or "" for part in parts if part.type == "tool_reference"]
        return [Out(original_id(fields.text("tool_use_id") or ""), parts,
                    bool(fields.flag("is_error")))]
    if kind in THINKING and role == "assistant":
        key = "signature" if kind == "thinking" else "data"
        text = (fields.text("thinking") or "") if kind == "thinking" else ""
        sealed = fields.text(key) or ""
        if text and ctx.provider == CHAT.word and not sealed.startswith(CARRIER):
            return [Thought("foreign", text, sealed)]  # plain text that a Chat provider can read
        thought = own_thought(fields, sealed, text)
        return [thought] if thought else []
    if kind in ("tool_addition", "tool_removal"):
        tools.change(fields, kind)
        return []
    if kind == "compaction":
        text = fields.text("content") or ""
        return [User([Part("text", f"<summary>\n{text}\n</summary>")])] if text else []
    if kind in SERVER_BLOCKS or kind.endswith("_tool_result"):
        return read_server_block(fields, kind, tools, ctx)
    part = messages_part_of(fields, kind)
    if part.kind == "unknown":
        ctx.drop(fields.path, f"no {brief_kind(kind)} blocks with this provider")
        return []
    parts = part.raw if part.kind == "several" else [part]
    return [Said(parts)] if role == "assistant" else [User(parts)]


def rendered(atoms: list[Atom]) -> Part | None:
    """The text of an atom that tells what a server's tool did; None where there is none."""
    said = atoms[0] if atoms else None
    return said.parts[0] if isinstance(said, Said) and said.parts[0].type == "rendered" else None


def brief_kind(kind: str) -> str:
    """A type from a request as it can stand in a log line."""
    return kind if re.fullmatch(r"[a-z0-9_]{1,40}", kind) else "unknown"


SERVER_BLOCKS = ("server_tool_use", "mcp_tool_use", "mcp_tool_result", "advisor_tool_result")
THINKING = ("thinking", "redacted_thinking")
RENDERED_CHARS = 8000  # of a server tool's result in a history rendered as text


def read_server_block(fields: Fields, kind: str, tools: MessagesTools,
                      ctx: Context) -> list[Atom]:
    """What a server's tool did, as the text that another provider's model can read."""
    called = kind in ("server_tool_use", "mcp_tool_use")
    id = fields.text("id" if called else "tool_use_id") or ""
    own = id.startswith("srvtoolu_px_") and ctx.caps.web_search == "native"
    if not called:
        text = "" if own else rendered_result(fields.get("content"), tools)
        return [Said([Part("text", text, type="rendered")])] if text else []
    input, name = mapping(fields.get("input")), fields.text("name") or "tool"
    if own:
        inner = from_base64url(id.removeprefix("srvtoolu_px_")) or b""
        query = str(input.get("query") or "")
        return [Thought("search", "", (inner.decode("utf-8", "replace"), query))]
    said = next((str(input[k]) for k in ("query", "url", "command", "code")
                 if isinstance(input.get(k), str)), "")
    return [Said([Part("text", f'[{name} "{said}"]' if said else f"[{name}]", type="rendered")])]


def rendered_result(content: Any, tools: MessagesTools) -> str:
    """The result of a server tool as text; encrypted content stays out."""
    texts: list[str] = [content] if isinstance(content, str) else []
    if isinstance(content, dict):
        if isinstance(content.get("error_code"), str):
            return f"[failed: {content['error_code']}]"
        if references := listing(content.get("tool_references")):
            names = [str(mapping(r).get("tool_name")) for r in references]
            tools.named += names
            return "Found tools: " + ", ".join(names)
        texts = [str(content[k]) for k in ("url", "stdout", "stderr") if content.get(k)]
        source = mapping(mapping(content.get("content")).get("source"))
        if isinstance(source.get("data"), str) and source.get("type") == "text":
            texts.append(source["data"])
    for entry in map(mapping, listing(content)):
        if isinstance(entry.get("url"), str):
            texts.append(f"- {entry.get('title') or entry['url']}: {entry['url']}")
        elif isinstance(entry.get("text"), str):
            texts.append(entry["text"])
    return join_lines(texts)[:RENDERED_CHARS]


def messages_part_of(fields: Fields, kind: str) -> Part:
    """A content block that is a piece of content."""
    more: Json = {"path": fields.path, "mark": fields.mark(), "type": kind}
    if kind == "text":
        return Part("text", fields.text("text") or "", **more)
    if kind in ("image", "document"):
        return source_part(fields, kind, more)
    if kind == "search_result":
        source = text_of(fields.get("source"))
        lines = [f"Title: {fields.text('title') or ''}", f"Source: {source}"]
        lines += [text for block in fields.list("content")
                  if isinstance(text := mapping(block).get("text"), str)]
        return Part("text", join_lines(lines), **more)
    if kind == "tool_reference":
        name = fields.text("tool_name") or fields.text("name") or ""
        return Part("text", f"Tool loaded: {name}", name=name, **more)
    if kind == "container_upload":
        return Part("text", "[container file omitted]", **more)
    if fields.path.count(".content") > 1:  # within a tool result: better said than lost
        return Part("text", compact({"type": kind, **fields.left})[:2000], **more)
    return Part("unknown", **more)


def source_part(fields: Fields, kind: str, more: Json) -> Part:
    """An image or document block by its source."""
    source, title = fields.object("source"), fields.text("title")
    what = source.text("type") if source else None
    if source is None or what is None:
        return Part("text", f"[{kind} omitted]", **more)
    shape = "image" if kind == "image" else "file"
    if what == "base64":
        media = (source.text("media_type") or "").lower()
        return Part(shape, media=media, data=source.text("data") or "", name=title, **more)
    if what == "url":
        return Part(shape, url=source.text("url") or "", name=title, **more)
    if what == "text":
        text = document_text(title, source.text("data") or "")
        return Part("text", text, name=title, **more)
    if what == "content":
        return Part("several", raw=read_content(source, "content", messages_part_of), **more)
    id = source.text("file_id") or ""
    return Part("text", f"[{kind} omitted: file {id}]" if fields.ctx.provider == CHAT.word
                else f"[file {id} omitted]", **more)


EDIT_FIELDS: Json = {"path": STRING, "old_str": STRING, "new_str": STRING, "insert_line": INTEGER,
                     "insert_text": STRING, "file_text": STRING, "view_range": INTEGERS}


def command_schema(key: str, values: str, properties: Json, *required: str) -> Json:
    """The schema of a tool with one field that says what to do."""
    schema = object_schema({key: {**STRING, "enum": values.split()}, **properties})
    return {"type": "object", "required": [key, *required], **schema}


# Tools that Anthropic's models know by name and clients run: (pattern, description, schema).
ANTHROPIC_TOOLS: tuple[tuple[str, str, Json], ...] = (
    ("bash_", "Runs a command in a shell that keeps its state.", object_schema(
        {"command": STRING, "restart": {"type": "boolean"}})),
    ("text_editor_2024|text_editor_20250124", "Views and edits text files.", command_schema(
        "command", "view create str_replace insert undo_edit", EDIT_FIELDS, "path")),
    ("text_editor_", "Views and edits text files.", command_schema(
        "command", "view create str_replace insert", EDIT_FIELDS, "path")),
    ("memory_", "Keeps notes in files between conversations.", command_schema(
        "command", "view create str_replace insert delete rename",
        {**EDIT_FIELDS, "old_path": STRING, "new_path": STRING})),
    ("computer_", "Uses a screen, mouse and keyboard.", command_schema(
        "action", "key type mouse_move left_click left_click_drag right_click middle_click"
        " double_click triple_click left_mouse_down left_mouse_up scroll hold_key wait screenshot"
        " cursor_position zoom",
        {"coordinate": INTEGERS, "start_coordinate": INTEGERS, "text": STRING,
         "scroll_direction": STRING, "scroll_amount": INTEGER, "duration": {"type": "number"},
         "region": INTEGERS})),
)
SEARCH_TOOL = re.compile(r"tool_search_tool_(regex|bm25)")
HOSTED_TOOL = re.compile(r"(web_search|web_fetch|code_execution|advisor|mcp_toolset|tool_search)"
                         r"|.*_toolset_.*")


class MessagesTools:
    """The tools of a Messages request: declared, loaded on the way, or dropped (-chat.md 3.5)."""

    def __init__(self, ask: Ask, ctx: Context) -> None:
        self.ask, self.ctx = ask, ctx
        self.named: list[str] = []  # by calls and references, in their order
        self.dropped: list[str] = []
        self.server_search = False

    def add(self, fields: Fields, loaded: bool = False) -> None:
        """One declared tool, or one `loaded` on the way; those that only Anthropic's servers run
        are dropped."""
        kind, path = fields.text("type") or "custom", fields.path
        known = next((row for row in ANTHROPIC_TOOLS if re.match(row[0], kind)), None)
        if kind.startswith("web_search_") and self.ctx.caps.web_search != "off":
            raw = {key: fields.left[key] for key in ("allowed_domains", "user_location", "max_uses")
                   if fields.left.get(key) is not None}
            self.ask.tools.append(Tool("web_search", "web_search", raw=raw, path=path))
        elif HOSTED_TOOL.match(kind) or not (known or kind in ("custom", "function")):
            self.server_search = self.server_search or bool(SEARCH_TOOL.match(kind))
            self.dropped.append(kind)
            self.ctx.drop(path, f"no {brief_kind(kind)} with this provider")
        elif known:
            about = known[1]
            if kind.startswith("computer_"):
                width, height = (fields.left.get(f"display_{k}_px") for k in ("width", "height"))
                about += f" The display is {width} x {height} pixels."
            self.ask.tools.append(Tool("function", fields.name(), about, known[2], path=path))
        else:
            tool = self.function((kind == "function" and fields.object(kind)) or fields)
            self.ask.tools.append(tool._replace(deferred=tool.deferred and not loaded))

    def function(self, fields: Fields) -> Tool:
        """A tool that the client defines."""
        name, text = fields.name(), fields.text("description")
        if examples := fields.list("input_examples"):
            text = f"{text or ''}\n\nExamples: {compact(examples)}"
        schema = fields.json("input_schema") or fields.json("parameters")
        return Tool("function", name, text, schema, strict=fields.flag("strict"),
                    deferred=bool(fields.flag("defer_loading")), path=fields.path,
                    mark=fields.mark())

    def change(self, fields: Fields, kind: str) -> None:
        """A tool_addition or tool_removal block within the conversation."""
        found = fields.object("tool_definition") or fields.object("tool")
        if found and found.left.get("type") == "tool_definition":
            found = found.object("tool") or found.object("definition") or found
        inner = found.left if found else fields.left
        name = inner.get("name") or inner.get("tool_name")
        if kind == "tool_removal":
            self.ask.tools = [tool for tool in self.ask.tools if tool.name != name]
        elif found and inner.get("type") != "tool_reference":
            self.add(found, loaded=True)
        elif isinstance(name, str):
            self.named.append(name)

    def settle(self) -> None:
        """Leave the tools that are sent: deferred ones behind, in the order they were named."""
        tools = unique_tools(self.ask.tools)
        if self.ask.choice:
            self.named += [name for _, name in self.ask.choice.names]
        plain = [tool for tool in tools if not tool.deferred]
        if plain and not self.server_search and self.ctx.caps.deferred_tools == "referenced":
            deferred = {tool.name: tool for tool in tools if tool.deferred}
            loaded = [deferred.pop(name) for name in self.named if name in deferred]
            for tool in deferred.values():
                self.ctx.drop(tool.path, "deferred, and nothing has named it")
            tools = plain + loaded
        if self.dropped and not tools:
            raise RequestError(f'server tool "{brief_kind(self.dropped[0])}" is not available with'
                               " this provider", param="tools")
        self.ask.tools = tools

# -- what the writers share --------------------------------------------------

WORDS = ("text", "refusal")  # the kinds of part that are text
NO_SAMPLING = "this model takes no sampling parameters"
IN_JSON, BY_SCHEMA = "Answer in JSON.", "Answer only with JSON that matches this JSON schema:\n"
STOP_NAMES = {"responses": "stop", "chat": "stop", "messages": "stop_sequences"}


def spoken(parts: Iterable[Part]) -> list[Part]:
    """Parts without texts that are empty."""
    return [part for part in parts if part.kind not in WORDS or part.text.strip()]


def words_for(part: Part, ctx: Context) -> str:
    """The text of a part, or the words that stand for what the provider does not take; in a Chat
    request at hand that is refused instead."""
    if part.kind in WORDS:
        return part.text
    if part.kind == "image" and not ctx.caps.vision:
        return "[image omitted: this model cannot see images]"
    what = part.kind if part.kind in ("image", "file", "audio") else "part"
    if part.current:
        said = f" of type {part.media}" if part.media else ""
        raise RequestError(f"this provider takes no such {what}{said}", param=part.path)
    if ctx.inbound == RESPONSES.word:
        where = f" ({part.url})" if part.url else ""
        return omitted_words("content", brief_kind(part.type), ctx) + where
    if ctx.provider == CHAT.word and part.kind != "image":
        return (f"[document: {part.url}]" if part.url else
                f'[document "{part.name or ""}" omitted: provider takes no files]')
    note = part.media if part.kind == "image" else part.name
    return f"[{what} omitted: {note}]" if note and ctx.provider == MESSAGES.word \
        else f"[{what} omitted]"


def marked(block: Json, mark: Json | None) -> Json:
    """A block with a cache mark, where there is one."""
    if mark is not None:
        block["cache_control"] = mark
    return block


def asked_level(ask: Ask) -> str | None:
    """The effort level that a request comes to, None where it asks for none in particular."""
    wish = ask.effort or Effort()
    return budget_level(wish.budget) if not wish.level and wish.budget is not None else wish.level


def write_tools(ask: Ask, names: ToolNames, ctx: Context,
                write: Callable[[Tool, str, Context], Json],
                search: Callable[[Json], Json] | None) -> list[Json]:
    """The tools, each remembered under the name it goes by. `search` makes a tool of a wish for
    web search, where the protocol has it as a tool."""
    found: list[Json] = []
    for tool in ask.tools:
        if tool.kind == "raw":
            found.append(dict(tool.raw))
        elif tool.kind != "web_search":
            wire = names.of(tool.space, tool.name)
            ctx.tools[wire] = tool
            found.append(write(tool, wire, ctx))
        elif search:
            found.append(search(mapping(tool.raw)))
            ctx.web_search = True
    if search and ask.search is not None:
        if ctx.caps.web_search == "native":
            found.append(search(ask.search))
            ctx.web_search = True
        else:
            ctx.drop("web_search_options")
    return found


def function_of(tool: Tool, wire: str, key: str, schema: Json) -> Json:
    """A tool as a function with its schema at `key`. A free text tool has one string; its grammar
    is only told."""
    description = tool.description
    if tool.kind == "custom":
        schema = {"type": "object", "properties": {"input": {"type": "string"}},
                  "required": ["input"], "additionalProperties": False}
        format_ = mapping(mapping(tool.raw).get("format"))
        grammar = mapping(format_.get("grammar")) or format_
        if isinstance(definition := grammar.get("definition"), str):
            note = (f'"input" must match this {grammar.get("syntax") or ""} grammar:\n'
                    f"```\n{definition}\n```")
            description = f"{description}\n\n{note}" if description else note
    return {"name": wire, **({"description": description} if description else {}), key: schema}


def native_custom(tool: Tool, wire: str, ctx: Context) -> Json:
    """A free text tool as OpenAI has it; a grammar is nested in Chat, flat in Responses."""
    out: Json = {"name": wire, **({"description": tool.description} if tool.description else {})}
    form = mapping(mapping(tool.raw).get("format"))
    if form.get("type") == "grammar":
        inner = mapping(form.get("grammar")) or {
            key: form[key] for key in ("syntax", "definition") if key in form}
        form = {"type": "grammar", **({"grammar": inner} if ctx.provider == CHAT.word else inner)}
    return {**out, "format": form} if form else out


def call_kind(tool: Tool, ctx: Context) -> str:
    """Whether a tool goes to the provider as a custom tool or as a function."""
    return "custom" if tool.kind == "custom" and ctx.caps.custom_tools else "function"


def is_strict_tool(tool: Tool, schema: Json, ctx: Context) -> bool:
    """Whether a tool's schema is to be strict; Anthropic's strict is the weaker one."""
    return bool(tool.strict and ctx.caps.strict_tools
                and (ctx.inbound != MESSAGES.word or is_strict(schema)))


def is_strict_format(form: Format, ctx: Context) -> bool:
    """Whether an answer's schema is to be strict; Anthropic's always is, as far as it can be."""
    if ctx.inbound != MESSAGES.word:
        return bool(form.strict)
    return bool(ctx.caps.strict_tools) and is_strict(form.schema)


def put_tools(ask: Ask, names: ToolNames, mode: str | None, forced: str | None, tools: list[Json],
              ctx: Context, out: Json) -> None:
    """tools, tool_choice and parallel_tool_calls of either OpenAI protocol; Chat Completions nests
    what a choice names."""
    if not tools:
        return
    nested = ctx.provider == CHAT.word

    def named(wire: str) -> Json:
        kind = call_kind(names.declared[wire], ctx)
        return {"type": kind, kind: {"name": wire}} if nested else {"type": kind, "name": wire}

    out["tools"] = tools
    if mode == "tool" and forced:
        search = names.declared[forced].kind == "web_search" and not nested
        out["tool_choice"] = {"type": "web_search"} if search else named(forced)
    elif mode == "allowed" and ask.choice:
        allowed: Json = {"mode": "required" if ask.choice.required else "auto",
                         "tools": [named(wire) for wire in names.pick(ask.choice)]}
        out["tool_choice"] = {"type": "allowed_tools",
                              **({"allowed_tools": allowed} if nested else allowed)}
    elif mode:
        out["tool_choice"] = mode
    if ctx.caps.parallel_tool_calls is not False and (
            ask.parallel is False or (ask.parallel and ctx.inbound == CHAT.word)):
        out["parallel_tool_calls"] = ask.parallel


def put_sampling(ask: Ask, ctx: Context, out: Json, **reasons: str | None) -> None:
    """temperature, top_p and top_k, each unless there is a reason against it."""
    for name, reason in reasons.items():
        value = getattr(ask, name)
        if value is not None and reason is None:
            out[name] = value
        elif value is not None:
            ctx.drop(name, reason or "")


def put_user(ask: Ask, ctx: Context, out: Json) -> None:
    """Anthropic's user_id for OpenAI, in a form that names nobody; for others it stays here."""
    if ctx.inbound == MESSAGES.word and ask.user:
        if ctx.caps.vendor_fields:
            plain = len(ask.user) <= 64 and not ask.user.startswith("{")
            out["safety_identifier"] = ask.user if plain else sha(ask.user)
            out["prompt_cache_key"] = sha(ask.user)[:32]
        else:
            ctx.drop("metadata.user_id", "stays here: it may name an account")


def put_extras(ask: Ask, ctx: Context, out: Json, taken: Iterable[str], tier: str | None) -> None:
    """The members of `ask.more` that are `taken`, and the tier; what is left is dropped."""
    for name in taken:
        if name in ask.more:
            out[name] = ask.more.pop(name)[1]
    if tier and ctx.caps.vendor_fields:
        out["service_tier"] = tier
    elif ask.tier:
        ctx.drop("service_tier", "not taken by this provider")
    for path, _ in ask.more.values():
        ctx.drop(path)

# -- writing Anthropic Messages (translation-responses.md 2.1, -chat.md 2.2-2.8)

CACHED_FROM = 2048  # tokens, below which a cache mark costs more than it saves
MARKS = 4  # cache marks that Anthropic takes


def write_messages(ask: Ask, ctx: Context) -> Json:
    """A neutral request as the body of an Anthropic Messages request."""
    names = ToolNames(ask.tools, 64 if ctx.inbound == RESPONSES.word else 128)
    mode, tool = settle_choice(ask, names)
    tools = write_tools(ask, names, ctx, anthropic_tool, anthropic_search)
    system = [text_block(part) for part in system_parts(ask.system, ctx) if part.text.strip()]
    atoms = pair_up(ask.atoms, safe_id, ctx)
    messages = messages_turns(atoms, names, ctx)
    out: Json = {"model": ctx.model, "max_tokens": 0, "messages": messages}
    if ask.stream is not None:
        out["stream"] = ask.stream
    calls = [atom for atom in atoms if isinstance(atom, Call)]
    if not tools and calls:
        tools = [{"name": name, "description": "(no longer available)",
                  "input_schema": dict(EMPTY_SCHEMA)}
                 for name in dict.fromkeys(names.of(c.space, c.name) for c in calls)]
        mode, tool = "none", None
    choice, nudge = messages_choice(mode, tool, ask, ctx)
    system += [text_block(Part("text", text)) for text in (*format_texts(ask, ctx, out), *nudge)]
    ask_for_thinking(ask, ctx, out, choice)
    fit_tokens(ask, ctx, out)
    if tools:
        out["tools"] = tools
        if choice:
            out["tool_choice"] = choice
    if system:
        out["system"] = system
    messages_sampling(ask, ctx, out)
    messages_extras(ask, ctx, out)
    finish_thinking(ctx, out)
    end_with_user(out, ctx.kind)
    set_marks(ask, ctx, out)
    shorten(out)
    return out


def system_parts(parts: list[Part], ctx: Context) -> list[Part]:
    """The texts of a system message; nothing else has a place in one."""
    out = []
    for part in parts:
        if part.kind == "text":
            out.append(part)
        elif ctx.inbound == RESPONSES.word:
            out.append(Part("text", words_for(part, ctx)))
        else:
            ctx.drop(part.path, "only text has a place in a system message")
    return out


def text_block(part: Part) -> Json:
    """A text block, with its cache mark."""
    return marked({"type": "text", "text": part.text}, part.mark)


def anthropic_blocks(part: Part, ctx: Context) -> list[Json]:
    """A part as content blocks: none for an empty text."""
    if part.kind in WORDS:
        return [text_block(part)] if part.text.strip() else []
    if part.kind == "raw":
        return [copy.deepcopy(part.raw)]
    block = None
    if part.kind != "image" or ctx.caps.vision:
        block = anthropic_media(part)
        if part.detail:
            ctx.drop(f"{part.path}.{'image_url.' if part.type == 'image_url' else ''}detail")
    if block is None:
        return [text_block(Part("text", words_for(part, ctx)))]
    return [marked(block, part.mark)]


def anthropic_media(part: Part) -> Json | None:
    """An image or document block; None for what Anthropic takes in no form."""
    if part.url and (part.kind == "image" or part.type == "input_file"
                     or part.url.split("?")[0].endswith(".pdf")):
        return {"type": "image" if part.kind == "image" else "document",
                "source": {"type": "url", "url": part.url}}
    if not part.data:
        return None
    source: Json = {"type": "base64", "media_type": part.media, "data": part.data}
    if part.media in IMAGE_TYPES:
        return {"type": "image", "source": source}
    if part.media != "application/pdf":
        if part.kind != "file" or not TEXT_TYPES.fullmatch(part.media or ""):
            return None
        source = {"type": "text", "media_type": "text/plain", "data": decoded_text(part)}
    return {"type": "document", "source": source, **({"title": part.name} if part.name else {})}


def messages_turns(atoms: list[Atom], names: ToolNames, ctx: Context) -> list[Json]:
    """Messages that alternate: the user's begin with tool results, late system texts have their
    place behind them."""
    out: list[Json] = []
    between: list[Atom] = []
    for own, group in runs(atoms):
        if not own:
            between += group
        elif blocks := assistant_blocks(group, names, ctx):
            add_between(out, between, ctx)
            add_turn(out, "assistant", blocks)
            between = []
    add_between(out, between, ctx)
    if not out or out[0]["role"] != "user":
        out.insert(0, {"role": "user", "content": [{"type": "text", "text": "."}]})
    return out


def add_between(out: list[Json], group: list[Atom], ctx: Context) -> None:
    """Append what stands between two turns of the assistant: results, what the user said, and
    late system texts, behind it or within it."""
    native = ctx.caps.native_system and ctx.kind.system
    blocks = [block for atom in group if isinstance(atom, Out)
              for block in result_blocks(atom, ctx)]
    late: list[Json] = []
    turns = any(isinstance(atom, (Out, User)) for atom in group)
    for atom in group:
        if isinstance(atom, User):
            for part in atom.parts:
                blocks += anthropic_blocks(part, ctx)
        elif isinstance(atom, System):
            texts = [p.text for p in system_parts(atom.parts, ctx) if p.text.strip()]
            if native and turns:
                late += [{"type": "text", "text": text} for text in texts]
            elif texts:
                blocks.append({"type": "text", "text": reminder("\n".join(texts))})
    if blocks:
        add_turn(out, "user", blocks)
    if late:
        add_turn(out, "system" if blocks else "user", late)


def add_turn(out: list[Json], role: str, blocks: list[Json]) -> None:
    """Append a message, or its blocks to the last one of the same role."""
    if out and out[-1]["role"] == role:
        out[-1]["content"] += blocks
    else:
        out.append({"role": role, "content": blocks})


def assistant_blocks(group: list[Atom], names: ToolNames, ctx: Context) -> list[Json]:
    """One run of the assistant as blocks; thinking that nothing follows is left out."""
    blocks: list[Json] = []
    for atom in group:
        if isinstance(atom, Said):
            for part in atom.parts:
                blocks += anthropic_blocks(part, ctx)
        elif isinstance(atom, Call):
            input = atom.input if atom.input is not None else parse_arguments(atom.arguments)
            blocks.append(marked({"type": "tool_use", "id": atom.id,
                                  "name": names.of(atom.space, atom.name), "input": input},
                                 atom.mark))
        elif isinstance(atom, Thought):
            blocks += thought_blocks(atom, ctx)
    while blocks and blocks[-1]["type"] in THINKING:
        blocks.pop()
    answered = {block.get("tool_use_id") for block in blocks}
    return [block for i, block in enumerate(blocks) if block["type"] != "server_tool_use"
            or block.get("id") in answered or i == len(blocks) - 1]


def thought_blocks(thought: Thought, ctx: Context) -> list[Json]:
    """Reasoning as the provider gave it; that of another protocol's provider is left out."""
    if thought.kind == "at" and (thought.body or ctx.caps.lenient_thinking):
        return [{"type": "thinking", "thinking": thought.text, "signature": thought.body}]
    if thought.kind == "ar":
        return [{"type": "redacted_thinking", "data": thought.body}]
    return [block for block in listing(thought.body) if thought.kind == "ab"
            and isinstance(mapping(block).get("type"), str)]


def result_blocks(out: Out, ctx: Context) -> list[Json]:
    """The result of a call as a block."""
    block: Json = {"type": "tool_result", "tool_use_id": out.id}
    if len(out.parts) == 1 and out.parts[0].kind == "text" and not out.parts[0].mark:
        block["content"] = out.parts[0].text
    elif content := [b for part in out.parts for b in anthropic_blocks(part, ctx)]:
        block["content"] = content
    if out.error:
        block["is_error"] = True
    return [marked(block, out.mark)]


def anthropic_tool(tool: Tool, wire: str, ctx: Context) -> Json:
    """A function for Anthropic."""
    item = function_of(tool, wire, "input_schema", input_schema(tool.schema))
    closed = item["input_schema"].get("additionalProperties") is False
    if tool.strict and closed and ctx.kind.schema and ctx.caps.strict_tools:
        item["strict"] = True
    elif tool.strict:
        ctx.drop(f"{tool.path}.strict", "needs a closed schema and a newer model")
    if ctx.inbound == CHAT.word and tool.kind == "function":
        item |= mapping(tool.raw)
    return marked(item, tool.mark)


SEARCH_USES = {"low": 1, "medium": 5, "high": 10}


def anthropic_search(options: Json) -> Json:
    """Anthropic's web search by the options of either OpenAI protocol."""
    out: Json = {"type": "web_search_20250305", "name": "web_search"}
    filters = mapping(options.get("filters"))
    for key in ("allowed_domains", "blocked_domains"):
        if value := listing(options.get(key)) or listing(filters.get(key)):
            out[key] = value
    location = mapping(options.get("user_location"))
    place = mapping(location.get("approximate")) or location
    place = {key: place[key] for key in ("city", "region", "country", "timezone")
             if isinstance(place.get(key), str)}
    if place:
        out["user_location"] = {"type": "approximate", **place}
    uses = SEARCH_USES.get(str(options.get("search_context_size")))
    if uses and "type" not in options:
        out["max_uses"] = uses
    return out


def messages_choice(mode: str | None, tool: str | None, ask: Ask,
                    ctx: Context) -> tuple[Json | None, list[str]]:
    """tool_choice, and the words that stand in for a choice that the model refuses."""
    nudge: list[str] = []
    plain = ctx.inbound == RESPONSES.word  # to these `auto` is the same as no choice
    if mode in ("required", "tool") and not ctx.kind.forced:
        nudge = [f'Call the tool "{tool}" to answer.' if tool
                 else "Call one of the tools to answer."]
        mode = None if plain else "auto"
    elif mode == "auto" and plain and ask.choice and ask.choice.mode == "auto":
        mode = None
    if mode is None and ask.parallel is False and (ask.tools or ask.search):
        mode = "auto"
    if mode is None:
        return None, nudge
    choice: Json = {"type": "any" if mode == "required" else mode}
    if mode == "tool":
        choice["name"] = tool
    if ask.parallel is False and mode != "none":
        choice["disable_parallel_tool_use"] = True
    return choice, nudge


def format_texts(ask: Ask, ctx: Context, out: Json) -> list[str]:
    """The answer's format: native where the class has it, else words for the system text."""
    form = ask.format
    if form is None:
        return []
    if form.schema is None:
        return ["Answer with one JSON object only."]
    if not ctx.kind.schema:
        return [BY_SCHEMA + compact(form.schema)]
    out["output_config"] = {"format": {"type": "json_schema",
                                       "schema": closed_schema(form.schema)}}
    return []


def ask_for_thinking(ask: Ask, ctx: Context, out: Json, choice: Json | None) -> None:
    """thinking and output_config.effort by the model's class (-chat.md 2.6, -responses.md
    2.1.8)."""
    wish, kind = ask.effort, ctx.kind
    if wish is None:
        return
    if not kind.manual and not kind.adaptive:
        ctx.drop("thinking" if wish.switched else "reasoning", "this model does not reason")
        return
    level, effort = asked_level(ask), None
    forced = choice is not None and choice["type"] in ("any", "tool")
    disabled = {"type": "disabled"}
    if level == "none":
        if kind.disabled and kind.name != "K1":
            out["thinking"] = disabled
        elif kind.name == "K5":
            effort = "low"
    elif kind.adaptive and not (kind.manual and wish.switched == "enabled" and wish.budget):
        shown = {"display": wish.display} if wish.display else {}
        out["thinking"] = disabled if forced and kind.disabled else {"type": "adaptive", **shown}
        effort = {"minimal": "low", "xhigh": "max" if kind.name == "K2" else "xhigh"}.get(
            level or "", level)
    elif not forced:
        budget = wish.budget if wish.budget is not None else BUDGETS[level or "medium"]
        out["thinking"] = {"type": "enabled", "budget_tokens": max(budget, 1024)}
    elif ctx.inbound == RESPONSES.word:
        out["thinking"] = disabled
    if effort in ("xhigh", "max") and "opus-5" in ctx.model and out.get("thinking") == disabled:
        effort = "high"
    if effort:
        out.setdefault("output_config", {})["effort"] = effort


def fit_tokens(ask: Ask, ctx: Context, out: Json) -> None:
    """max_tokens, and the thinking budget that must be below it."""
    thinking = mapping(out.get("thinking"))
    budget = thinking.get("budget_tokens")
    wanted = ask.max_tokens
    if wanted is None:
        wanted = (ctx.caps.default_max_tokens or ctx.kind.default_max_tokens) + (budget or 0)
    limit = min(ctx.kind.max_tokens, ctx.caps.max_tokens_cap or 1 << 30)
    out["max_tokens"] = max(1, min(wanted, limit))
    if budget is not None:
        thinking["budget_tokens"] = min(budget, out["max_tokens"] - 1024)
        if thinking["budget_tokens"] < 1024:
            del out["thinking"]
            ctx.drop("reasoning", "the output limit leaves no room for thinking")


def messages_sampling(ask: Ask, ctx: Context, out: Json) -> None:
    """temperature, top_p and top_k where the class takes them; never beside thinking."""
    why = None if ctx.kind.sampling else NO_SAMPLING
    if mapping(out.get("thinking")).get("type") in ("enabled", "adaptive"):
        why = "not beside thinking"
    one = "not beside temperature" if ask.temperature is not None and (
        ctx.kind.name in ("K1", "K2")) else None
    put_sampling(ask, ctx, out, temperature=why, top_p=why or one, top_k=why)
    if "temperature" in out:
        out["temperature"] = max(0, min(out["temperature"], 1.0))


MAIL_OR_PHONE = re.compile(r"[^@\s]+@[^@\s]+|\+?[\d\s().-]{7,}")


def messages_extras(ask: Ask, ctx: Context, out: Json) -> None:
    """Stop sequences, user, tier; what is left of the request is dropped."""
    if ask.stop:
        out["stop_sequences"] = ask.stop
    if user := ask.user:
        if len(user) > 256 or not user.isprintable() or MAIL_OR_PHONE.fullmatch(user):
            user = sha(user)
        out["metadata"] = {"user_id": user}
    for name in ("user", "safety_identifier"):
        ask.more.pop(name, None)
    put_extras(ask, ctx, out, (), {"auto": "auto", "default": "standard_only"}.get(ask.tier or ""))


def finish_thinking(ctx: Context, out: Json) -> None:
    """Thinking and the history's thinking blocks, so that they go together (-chat.md 1.5a)."""
    messages = out["messages"]
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    if turns and ctx.kind.name == "K1" and messages[-1]["role"] == "user" and \
            mapping(out.get("thinking")).get("type") == "enabled":
        called = any(b["type"] == "tool_use" for b in turns[-1])
        answered = any(b["type"] == "tool_result" for b in messages[-1]["content"])
        if called and answered and turns[-1][0]["type"] not in THINKING:
            del out["thinking"]
            strip_thinking(messages)
            ctx.drop("reasoning", "the last tool call came without its thinking")
    if not ctx.caps.thinking_binding:
        return
    if ctx.kind.disabled and "thinking" not in out:
        strip_thinking(messages)
    elif "thinking" in out or any(b["type"] in THINKING for blocks in turns for b in blocks):
        thinking = out.setdefault("thinking", {"type": "adaptive"})
        thinking["block_binding"] = {"prefix_mismatch_behavior": "drop_block"}
        ctx.headers.append(b"anthropic-beta: thinking-binding-controls-2026-08-01")


def strip_thinking(messages: list[Json]) -> None:
    """Leave all thinking blocks out, and messages that had nothing else."""
    kept: list[Json] = []
    for message in messages:
        if content := [b for b in message["content"] if b["type"] not in THINKING]:
            add_turn(kept, message["role"], content)
    messages[:] = kept


def end_with_user(out: Json, kind: ModelClass) -> None:
    """A conversation that ends with the assistant is a prefill, where the class knows that."""
    last = out["messages"][-1]
    block = last["content"][-1]
    if last["role"] != "assistant" or block["type"] == "server_tool_use" or \
            block["type"].endswith("_tool_result"):
        return
    if not kind.prefill:
        add_turn(out["messages"], "user", [{"type": "text", "text": "Continue."}])
    elif block["type"] == "text":
        last["content"][-1] = {**block, "text": block["text"].rstrip()}


def set_marks(ask: Ask, ctx: Context, out: Json) -> None:
    """Cache marks: the client's own, at most four, else automatic ones (-chat.md 2.7)."""
    messages, tools, system = out["messages"], out.get("tools", []), out.get("system", [])
    fixed = [b for b in (*tools, *system) if "cache_control" in b]
    moving = [b for m in messages for b in m["content"] if "cache_control" in b]
    moving += [b for m in messages for result in m["content"] if result["type"] == "tool_result"
               for b in map(mapping, listing(result.get("content"))) if "cache_control" in b]
    if fixed or moving:
        keep_marks(fixed, moving, ask.ttl)
        return
    worth = tools or any(m["role"] == "assistant" for m in messages)
    if ctx.caps.cache == "on" and ask.marks and worth and estimate_tokens(out) >= CACHED_FROM:
        users = [m["content"] for m in messages if m["role"] == "user"][-2:]
        for place in (tools, system, *users):
            if place:
                place[-1] = {**place[-1], "cache_control": cache_mark({"ttl": ask.ttl})}


def keep_marks(fixed: list[Json], moving: list[Json], ttl: str | None) -> None:
    """At most four marks, those of system and tools first, then the last; none of five minutes
    stands before one of an hour."""
    kept = fixed[:MARKS]
    kept += moving[len(moving) - min(len(moving), MARKS - len(kept)):]
    for block in (*fixed, *moving):
        if not any(block is k for k in kept):
            del block["cache_control"]
    long = False
    for block in reversed(kept):
        block["cache_control"] = {"ttl": ttl, **block["cache_control"]} if ttl else block[
            "cache_control"]
        long = long or block["cache_control"].get("ttl") == "1h"
        if long:
            block["cache_control"] = {"type": "ephemeral", "ttl": "1h"}


def shorten(out: Json) -> None:
    """Write a content of one unmarked text as a string."""
    places = [(m, "content") for m in out["messages"] if m["role"] != "system"]
    for place, key in (*places, (out, "system")):
        blocks = place.get(key, ())
        if len(blocks) == 1 and blocks[0].keys() == {"type", "text"}:
            place[key] = blocks[0]["text"]

# -- writing Chat Completions (translation-responses.md 4.1) -----------------

THINK, END_THINK = "<think>", "</think>"
MESSAGES_LIMIT = 4096  # of a Messages request without the limit it should have


def write_chat(ask: Ask, ctx: Context) -> Json:
    """A neutral request as the body of a Chat Completions request."""
    caps, names = ctx.caps, ToolNames(ask.tools, 64)
    mode, tool = settle_choice(ask, names, narrows=not caps.allowed_tools)
    atoms = pair_up(ask.atoms, CALL_IDS[caps.call_ids or "any"], ctx)
    level = asked_level(ask)
    messages = chat_system(ask, ctx) + chat_turns(atoms, names, level, ctx)
    if not any(message["role"] not in ("system", "developer") for message in messages):
        messages.append({"role": "user", "content": " " if ctx.inbound == MESSAGES.word else "."})
    out: Json = {"model": ctx.model, "messages": messages}
    if ask.stream is not None:
        out["stream"] = ask.stream
        if ask.stream and caps.stream_usage:
            out["stream_options"] = {"include_usage": True}
    if ask.max_tokens is None and ctx.inbound == MESSAGES.word:
        ask.max_tokens = MESSAGES_LIMIT
    if ask.max_tokens is not None:
        limit = max(ask.max_tokens, 1)
        out[caps.max_tokens_field or "max_tokens"] = min(limit, caps.max_tokens_cap or limit)
    for options in (*(mapping(t.raw) for t in ask.tools if t.kind == "web_search"), ask.search):
        if options is not None:
            search_fields(options, ctx, out)
    put_tools(ask, names, mode, tool, write_tools(ask, names, ctx, chat_tool, None), ctx, out)
    chat_sampling(ask, level, ctx, out)
    out |= reasoning_fields(ask, level, "tools" in out, ctx)
    if "chat_template_kwargs" in ask.more:
        out["chat_template_kwargs"] = {**mapping(out.get("chat_template_kwargs")),
                                       **ask.more.pop("chat_template_kwargs")[1]}
    chat_format(ask, ctx, out)
    chat_extras(ask, ctx, out)
    return out


def chat_system(ask: Ask, ctx: Context) -> list[Json]:
    """The leading system messages: as they were, or in one, which is what templates accept."""
    texts = texts_of(ask.system)
    if texts and ctx.caps.late_system == "keep" and ctx.inbound == RESPONSES.word:
        return [{"role": "developer" if part.type == "developer" else "system",
                 "content": part.text} for part in ask.system if part.text.strip()]
    if texts and ctx.caps.cache == "on" and any(part.mark for part in ask.system):
        return [{"role": "system", "content": [chat_part(part, ctx) for part in ask.system]}]
    return [{"role": "system", "content": join_lines(texts)}] if texts else []


def chat_turns(atoms: list[Atom], names: ToolNames, level: str | None,
               ctx: Context) -> list[Json]:
    """The conversation: one message for each run of the assistant, its results, what follows."""
    out: list[Json] = []
    fold = ctx.caps.late_system == "fold"
    for own, group in runs(atoms):
        if own:
            if message := chat_assistant(group, names, level, ctx):
                out.append(message)
            continue
        images: list[Json] = []
        for atom in group:
            if isinstance(atom, Out):
                shown = sum(part["type"] != "text" for part in images)
                message, media = chat_result(atom, shown, ctx)
                out.append(message)
                images += media
        if images:
            out.append({"role": "user", "content": images})
        for atom in group:
            if isinstance(atom, User):
                parts = atom.parts
                if ctx.inbound == MESSAGES.word and out and out[-1]["role"] == "tool":
                    # a word of the client beside a result is no turn of the user
                    if told := [p.text for p in parts if REMINDER.fullmatch(p.text)]:
                        out[-1]["content"] = merged(out[-1]["content"], join_lines(told))
                    parts = [p for p in parts if not REMINDER.fullmatch(p.text)]
                content = chat_content(parts, ctx)
                if content and fold and out and out[-1]["role"] == "user":
                    out[-1]["content"] = merged(out[-1]["content"], content)
                elif content:
                    out.append({"role": "user", "content": content})
            elif isinstance(atom, System):
                add_late_system(out, atom, ctx)
    return out


def add_late_system(out: list[Json], atom: System, ctx: Context) -> None:
    """A system text within the conversation: in place, or as a reminder in what stands before it;
    behind the assistant it is a user message, which the next one joins."""
    text = join_lines(texts_of(atom.parts))
    if not text:
        return
    if ctx.caps.late_system == "keep":
        role = "system" if ctx.inbound == MESSAGES.word else atom.role
        out.append({"role": role, "content": text})
    elif out and out[-1]["role"] in ("user", "tool"):
        out[-1]["content"] = merged(out[-1]["content"], reminder(text))
    else:
        out.append({"role": "user", "content": reminder(text)})


def merged(before: Any, after: Any) -> Any:
    """Two contents as one: a text with the other on new lines, or an array of parts."""
    if isinstance(before, str) and isinstance(after, str):
        return join_lines([before, after])
    return [*as_parts(before), *as_parts(after)]


def as_parts(content: Any) -> list[Json]:
    """A content as an array of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def chat_content(parts: list[Part], ctx: Context) -> Any:
    """The content of a user message: a string where it is all text, else parts in order."""
    parts = spoken(parts)
    found = [chat_part(part, ctx) for part in parts]
    texts = [part["text"] for part in found if part["type"] == "text"]
    lists = ctx.caps.files == "native" and ctx.inbound == RESPONSES.word
    marks = ctx.caps.cache == "on" and any(part.mark for part in parts)
    if len(texts) == len(found) and (len(found) < 2 or not lists) and not marks:
        return join_lines(texts)
    return found


def chat_part(part: Part, ctx: Context) -> Json:
    """A piece of content as a Chat part."""
    if part.kind == "image" and ctx.caps.vision and (part.url or part.media in IMAGE_TYPES):
        image: Json = {"url": part.url or data_url(part)}
        if part.detail:
            image["detail"] = "high" if part.detail == "original" else part.detail
        return {"type": "image_url", "image_url": image}
    if part.kind == "file" and (file := chat_file(part, ctx)):
        return file
    if part.kind == "audio" and ctx.caps.vendor_fields and isinstance(part.raw, dict):
        return {"type": "input_audio", **part.raw}
    found: Json = {"type": "text", "text": words_for(part, ctx)}
    return marked(found, part.mark) if ctx.caps.cache == "on" and part.kind in WORDS else found


def chat_file(part: Part, ctx: Context) -> Json | None:
    """A file as a Chat part: native where files are taken, text where it is text."""
    file: Json = {"filename": part.name or "document.pdf"}
    if part.data and part.media in IMAGE_TYPES:
        return {"type": "image_url", "image_url": {"url": data_url(part)}}
    if part.data and TEXT_TYPES.fullmatch(part.media or ""):
        return {"type": "text", "text": document_text(part.name, decoded_text(part))}
    if part.data and part.media == "application/pdf" and ctx.caps.files == "native":
        return {"type": "file", "file": {**file, "file_data": data_url(part)}}
    if part.id and ctx.caps.vendor_fields:
        return {"type": "file", "file": {"file_id": part.id}}
    if part.url and ctx.caps.web_search == "openrouter":
        return {"type": "file", "file": {**file, "file_data": part.url}}
    return None


def chat_result(out: Out, shown: int, ctx: Context) -> tuple[Json, list[Json]]:
    """A tool message, and the images that must go into a user message behind all of them, where
    `shown` stand already."""
    texts: list[str] = []
    media: list[Json] = []
    for part in out.parts:
        found = chat_part(part, ctx)
        if found["type"] == "text":
            texts.append(found["text"])
        elif ctx.caps.tool_images == "drop":
            texts.append(words_for(part, ctx))
        else:
            media.append(found)
            if ctx.caps.tool_images == "user":
                texts.append(f"[see image {shown + len(media)} below]")
    text = "\n".join(texts)
    if out.error and ctx.inbound == MESSAGES.word and not out.stub:
        text = with_error(text)
    message: Json = {"role": "tool", "tool_call_id": out.id, "content": text}
    if media and ctx.caps.tool_images == "inline":
        message["content"] = [*(as_parts(text) if text else ()), *media]
    elif media:
        return message, [{"type": "text", "text": f"Images from tool result {out.id}:"}, *media]
    return message, []


def with_error(text: str) -> str:
    """A failed tool's text that says so."""
    return text if "error" in text[:200].lower() else f"Error: {text}"


def chat_assistant(group: list[Atom], names: ToolNames, level: str | None,
                   ctx: Context) -> Json | None:
    """One run of the assistant as one message; None where nothing of it can be said."""
    texts, refusals, calls, thoughts = [], [], [], []
    for atom in group:
        if isinstance(atom, Said):
            own = [p for p in atom.parts if p.kind != "refusal" or not ctx.caps.vendor_fields]
            refusals += [p.text for p in atom.parts if p not in own]
            text = "".join(chat_part(part, ctx).get("text", "") for part in own)
            if text.strip():
                texts.append(text)
        elif isinstance(atom, Call):
            calls.append(chat_call(atom, names, ctx))
        elif isinstance(atom, Thought):
            thoughts.append(atom)
    if not (texts or refusals or calls):
        return None
    join = "\n\n".join if ctx.inbound == RESPONSES.word else join_lines
    message: Json = {"role": "assistant", "content": join(texts) if texts else None}
    if refusals:
        message["refusal"] = "\n".join(refusals)
    if calls:
        message["tool_calls"] = calls
    return message | replayed_reasoning(thoughts, message["content"], calls, level, ctx)


def chat_call(call: Call, names: ToolNames, ctx: Context) -> Json:
    """A tool call of the history. Arguments that do not parse are repaired for servers whose
    templates read them."""
    name = names.of(call.space, call.name)
    if call.kind == "custom" and ctx.caps.custom_tools:
        return {"id": call.id, "type": "custom",
                "custom": {"name": name, "input": mapping(call.input).get("input", "")}}
    text = call.arguments if call.arguments.strip() else "{}"
    if not ctx.caps.vendor_fields and not isinstance(loose_json(text), dict):
        text = compact(parse_arguments(text))
    return {"id": call.id, "type": "function", "function": {"name": name, "arguments": text}}


def replayed_reasoning(thoughts: list[Thought], content: str | None, calls: list[Json],
                       level: str | None, ctx: Context) -> Json:
    """Reasoning fields of an assistant message, as the provider wants to see its own again."""
    found: list[tuple[str, str, list[Any]]] = []
    out: Json = {}
    signatures: Json = {}
    for thought in thoughts:
        if thought.kind == "cr":
            found.append((thought.text, str(thought.body), []))
        elif thought.kind == "cd" and isinstance(thought.body, dict):
            found.append((thought.text, "reasoning_details", [
                with_text(d, thought.text) for d in map(mapping, listing(thought.body.get("d")))]))
            signatures |= mapping(thought.body.get("t"))
        elif thought.kind == "foreign" and ctx.caps.reasoning_replay != "auto":
            signed = {"signature": thought.body, "format": "anthropic-claude-v1"}
            claude = ctx.model.startswith("anthropic/")
            found.append((thought.text, "foreign", [{
                "type": "reasoning.text", "text": thought.text, "index": len(found),
                **(signed if claude else {})}]))
    text = "\n\n".join(text for text, _, _ in found if text)
    field = ctx.caps.reasoning_replay or "none"
    details = [detail for _, _, d in found for detail in d]
    if field == "auto" and found:
        field = "reasoning_details" if details else str(found[0][1])
    if found and field == "reasoning_details":
        out[field] = details or [{"type": "reasoning.text", "text": text, "index": 0}]
    elif found and text and field in ("reasoning_content", "reasoning"):
        out[field] = text
    elif text and field == "think":
        out["content"] = f"{THINK}\n{text}\n{END_THINK}\n\n{content or ''}"
    elif text and field == "thinking":
        out["content"] = [{"type": "thinking", "thinking": [{"type": "text", "text": text}]},
                          *as_parts(content or "")]
    required = ctx.caps.reasoning_required
    if required != "off" and level != "none" and (calls or required == "all") and \
            field in ("reasoning_content", "reasoning") and not out.get(field):
        out[field] = " "
    for call in calls:
        if call["id"] in signatures:
            call["extra_content"] = {"google": {"thought_signature": signatures[call["id"]]}}
    return out


def with_text(detail: Json, text: str) -> Json:
    """A reasoning detail with the text that its carrier did not repeat."""
    key = {"reasoning.text": "text", "reasoning.summary": "summary"}.get(str(detail.get("type")))
    return {**detail, key: text} if key and key not in detail else detail


def chat_tool(tool: Tool, wire: str, ctx: Context) -> Json:
    """A function or a custom tool of Chat Completions."""
    if call_kind(tool, ctx) == "custom":
        return {"type": "custom", "custom": native_custom(tool, wire, ctx)}
    function = function_of(tool, wire, "parameters", filled_schema(tool.schema))
    if is_strict_tool(tool, function["parameters"], ctx):
        function["strict"] = True
    elif tool.strict:
        ctx.drop(f"{tool.path}.strict", "not taken by this provider")
    item = {"type": "function", "function": function}
    return marked(item, tool.mark) if ctx.caps.cache == "on" else item


def search_fields(options: Json, ctx: Context, out: Json) -> None:
    """Web search, in the way of the provider."""
    if ctx.caps.web_search == "openrouter":
        uses = options.get("max_uses") or SEARCH_USES.get(str(options.get("search_context_size")))
        out["plugins"] = [{"id": "web", **({"max_results": uses} if uses else {})}]
    elif ctx.caps.web_search != "off":
        names = ("search_context_size", "user_location")
        out["web_search_options"] = {n: options[n] for n in names if options.get(n)}
        ctx.web_search = True


def chat_sampling(ask: Ask, level: str | None, ctx: Context, out: Json) -> None:
    """temperature, top_p, top_k, stop; models that reason take none of the first two."""
    name = ctx.model.lower().rsplit("/", 1)[-1]
    fixed = (bool(FIXED_SAMPLING_MODEL.match(name)) and "-chat" not in name
             and not (level == "none" and "none" in openai_efforts(name)))
    thinks = ctx.caps.reasoning_control == "deepseek" and level not in (None, "none")
    why = NO_SAMPLING if fixed or thinks else None
    put_sampling(ask, ctx, out, temperature=why, top_p=why, top_k=None if ctx.caps.top_k else "")
    if ask.stop and ctx.caps.vendor_fields and fixed:
        ctx.drop(STOP_NAMES[ctx.inbound])
    elif ask.stop:
        stop = ask.stop[:4] if ctx.caps.vendor_fields else ask.stop
        out["stop"] = stop[0] if len(stop) == 1 else stop


def reasoning_fields(ask: Ask, level: str | None, tools: bool, ctx: Context) -> Json:
    """Reasoning control in the provider's dialect (translation-chat.md 1.3b)."""
    dialect, model = ctx.caps.reasoning_control or "", ctx.model.lower().rsplit("/", 1)[-1]
    if level is None:
        return {"reasoning_format": "parsed"} if dialect == "groq" else {}
    off, budget = level == "none", ask.effort.budget if ask.effort else None
    if dialect == "effort":
        if tools and not off and re.match(r"gpt-5[.-]([4-9]|\d\d)", model):
            ctx.drop("reasoning.effort", "this model takes no effort beside tools here")
            return {}
        if re.match(r"gpt-[34]", model):
            ctx.drop("reasoning.effort", "this model does not reason")
            return {}
        if (off and not re.match(r"gpt-5[.-][1-9]|gpt-[6-9]", model)
                and not (ctx.thinking and REASONING_MODEL.match(model))):
            return {}
        known = openai_efforts(model) if model.startswith("gpt") else EFFORTS[2:5]
        return {"reasoning_effort": clamp_effort(level, known)}
    basic = {"xhigh": "high", "max": "high", "minimal": "low"}.get(level, level)
    parsed, disabled, qwen = {"reasoning_format": "parsed"}, {"type": "disabled"}, "qwen" in model
    dialects: Mapping[str, tuple[Json, Json]] = {  # what switches reasoning off, and what on
        "effort-basic": ({"reasoning_effort": "none"}, {"reasoning_effort": basic}),
        "effort-lowhigh": ({}, {} if model.startswith("grok-4") else {
            "reasoning_effort": "low" if basic == "low" else "high"}),
        "openrouter": ({"reasoning": {"enabled": False}}, {
            "reasoning": {"max_tokens": budget} if budget else
            {"effort": "xhigh" if level == "max" else level}}),
        "deepseek": ({"thinking": disabled}, {
            "thinking": {"type": "enabled"},
            "reasoning_effort": "max" if level in ("xhigh", "max") else "high"}),
        "kimi": ({"thinking": disabled}, {"thinking": {"type": "enabled"}}),
        "glm": ({"thinking": disabled}, {
            "thinking": {"type": "enabled", "clear_thinking": False}}),
        "qwen": ({"enable_thinking": False}, {
            "enable_thinking": True, **({"thinking_budget": budget} if budget else {})}),
        "groq": ({**parsed, "reasoning_effort": "none"} if qwen else parsed,
                 {**parsed, "reasoning_effort": "default" if qwen else basic}),
        "mistral": ({}, {"prompt_mode": "reasoning"} if model.startswith("magistral") else {}),
        "template": ({"chat_template_kwargs": {"enable_thinking": False}}, {
            "chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": basic}),
    }
    switched_off, switched_on = dialects.get(dialect, ({}, {}))
    return switched_off if off else switched_on


def chat_format(ask: Ask, ctx: Context, out: Json) -> None:
    """response_format; servers that know no schema are told it in words."""
    form = ask.format
    if form is None:
        return
    if form.schema is not None and ctx.caps.json_schema == "schema":
        inner: Json = {"name": form.name, "schema": form.schema}
        strict = is_strict_format(form, ctx)
        if strict or (form.strict is not None and ctx.inbound != MESSAGES.word):
            inner["strict"] = strict
        if form.description:
            inner["description"] = form.description
        out["response_format"] = {"type": "json_schema", "json_schema": inner}
        return
    out["response_format"] = {"type": "json_object"}
    if form.schema is not None:
        add_system(out["messages"], BY_SCHEMA + compact(form.schema))
    elif not any("json" in str(m.get("content")).lower() for m in out["messages"]):
        add_system(out["messages"], IN_JSON)


def add_system(messages: list[Json], text: str) -> None:
    """Add to the leading system message."""
    if messages and messages[0]["role"] in ("system", "developer"):
        messages[0]["content"] = merged(messages[0]["content"], text)
    else:
        messages.insert(0, {"role": "system", "content": text})


# Members that OpenAI's own Chat Completions takes as a client sent them.
CHAT_EXTRAS = ("verbosity", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
               "prompt_cache_options")


def chat_extras(ask: Ask, ctx: Context, out: Json) -> None:
    """What OpenAI's Chat Completions has and others may not know."""
    put_user(ask, ctx, out)
    if "top_logprobs" in ask.more or "logprobs" in ask.more:
        out["logprobs"] = True
        ask.more.pop("logprobs", None)
    taken = CHAT_EXTRAS if ctx.caps.vendor_fields else ()
    put_extras(ask, ctx, out, ("user", "top_logprobs", *taken), ask.tier)

# -- writing Responses (translation-responses.md 3.1, 5.1) -------------------

LEAST_OUTPUT_TOKENS = 16  # that the Responses API takes


def write_responses(ask: Ask, ctx: Context) -> Json:
    """A neutral request as the body of a Responses request."""
    caps, names = ctx.caps, ToolNames(ask.tools, 64)
    out: Json = {"model": ctx.model}
    mode, tool = settle_choice(ask, names, narrows=False)
    texts = texts_of(ask.system)
    instructions = join_lines(texts) if ctx.inbound == MESSAGES.word else "\n\n".join(texts)
    items = response_items(pair_up(ask.atoms, short_call_id, ctx), names, ctx)
    if ask.format and ask.format.schema is None and \
            "json" not in (instructions + compact(items)).lower():
        instructions = join_lines([instructions, IN_JSON] if instructions else [IN_JSON])
    if instructions:
        out["instructions"] = instructions
    out["input"] = items or [message_item("user", [Part("text", ".")], ctx)]
    if ask.stream is not None:
        out["stream"] = ask.stream
        if ask.stream and "include_obfuscation" in ask.more:
            shown = ask.more.pop("include_obfuscation")[1]
            out["stream_options"] = {"include_obfuscation": shown}
    if ask.max_tokens is not None and caps.max_output_tokens:
        limit = min(ask.max_tokens, caps.max_tokens_cap or ask.max_tokens)
        out["max_output_tokens"] = max(limit, LEAST_OUTPUT_TOKENS)
    elif ask.max_tokens is not None:
        ctx.drop("max_tokens", "not taken by this provider")
    tools = write_tools(ask, names, ctx, response_tool, response_search)
    put_tools(ask, names, mode, tool, tools, ctx, out)
    effort = response_reasoning(ask, ctx, out)
    why = None if caps.sampling or effort == "none" else NO_SAMPLING
    put_sampling(ask, ctx, out, temperature=why, top_p=why, top_k="")
    if ask.stop:
        ctx.drop(STOP_NAMES[ctx.inbound])
    response_text(ask, ctx, out)
    include = {"reasoning.encrypted_content": caps.encrypted_reasoning and ctx.wants_thinking,
               "web_search_call.action.sources": ctx.web_search and caps.web_search == "native",
               "message.output_text.logprobs": "logprobs" in ask.more and not caps.reasoning}
    response_extras(ask, ctx, out)
    out["store"] = False
    if any(include.values()):
        out["include"] = [name for name, wanted in include.items() if wanted]
    return out


def response_items(atoms: list[Atom], names: ToolNames, ctx: Context) -> list[Json]:
    """The conversation as items."""
    out: list[Json] = []
    for own, group in runs(atoms):
        if own:
            out += assistant_items(group, names, ctx)
            continue
        media: list[Part] = []
        for atom in group:
            if isinstance(atom, Out):
                item, more = output_item(atom, ctx)
                out.append(item)
                media += more
        if media:
            out.append(message_item("user", media, ctx))
        for atom in group:
            if isinstance(atom, User) and (parts := spoken(atom.parts)):
                out.append(message_item("user", parts, ctx))
            elif isinstance(atom, System) and (texts := texts_of(atom.parts)):
                out.append(message_item("developer", [Part("text", join_lines(texts))], ctx))
    return out


def message_item(role: str, parts: list[Part], ctx: Context) -> Json:
    """A message item of the user or a developer."""
    return {"type": "message", "role": role,
            "content": [response_part(part, ctx) for part in parts]}


def response_part(part: Part, ctx: Context) -> Json:
    """A piece of content as an input part."""
    if part.kind == "image" and ctx.caps.vision and (part.url or part.media in IMAGE_TYPES):
        found: Json = {"type": "input_image", "image_url": part.url or data_url(part),
                       "detail": part.detail or "auto"}
    elif part.kind == "file" and part.url:
        found = {"type": "input_file", "file_url": part.url}
    elif part.kind == "file" and part.data:
        found = {"type": "input_file", "filename": part.name or "document.pdf",
                 "file_data": data_url(part)}
    elif part.kind == "file" and part.id:
        found = {"type": "input_file", "file_id": part.id}
    else:
        found = {"type": "input_text", "text": words_for(part, ctx)}
    if part.mark and ctx.caps.cache == "on":
        found["prompt_cache_breakpoint"] = {"mode": "explicit"}
    return found


def assistant_items(group: list[Atom], names: ToolNames, ctx: Context) -> list[Json]:
    """One run of the assistant as items; reasoning that nothing follows is left out."""
    out: list[Json] = []
    for k, atom in enumerate(group):
        if isinstance(atom, Said) and (parts := [output_part(p) for p in spoken(atom.parts)]):
            if out and out[-1]["type"] == "message":
                out[-1]["content"] += parts
                continue
            out.append({"type": "message", "role": "assistant", "content": parts})
            if ctx.caps.phase:
                calls = any(isinstance(later, Call) for later in group[k:])
                out[-1]["phase"] = "commentary" if calls else "final_answer"
        elif isinstance(atom, Call):
            out.append(call_item(atom, names, ctx))
        elif isinstance(atom, Thought):
            out += thought_items(atom, ctx)
    while out and out[-1]["type"] == "reasoning":
        out.pop()
    return out


def output_part(part: Part) -> Json:
    """A piece of what the assistant said."""
    if part.kind == "refusal":
        return {"type": "refusal", "refusal": part.text}
    text = part.text if part.kind == "text" else f"[{part.kind} omitted]"
    return {"type": "output_text", "text": text}


def call_item(call: Call, names: ToolNames, ctx: Context) -> Json:
    """A call; without an id, for one would make the API demand its reasoning item."""
    name = names.of(call.space, call.name)
    if call.kind == "custom" and ctx.caps.custom_tools:
        return {"type": "custom_tool_call", "call_id": call.id, "name": name,
                "input": mapping(call.input).get("input", "")}
    return {"type": "function_call", "call_id": call.id, "name": name,
            "arguments": call.arguments if call.arguments.strip() else "{}"}


def thought_items(thought: Thought, ctx: Context) -> list[Json]:
    """Reasoning that came from this provider, and web searches that it made."""
    if thought.kind == "search":
        id, query = thought.body
        return [{"type": "web_search_call", "id": id, "status": "completed",
                 "action": {"type": "search", "query": query}}]
    if thought.kind != "or":
        return []
    id, _, sealed = str(thought.body).partition(":")
    text, named = thought.text, {"id": id} if id else {}
    if sealed:
        summary = [{"type": "summary_text", "text": text}] if text else []
        return [{"type": "reasoning", **named, "summary": summary, "encrypted_content": sealed}]
    if text and not ctx.caps.encrypted_reasoning:
        return [{"type": "reasoning", "summary": [],
                 "content": [{"type": "reasoning_text", "text": text}]}]
    return []


def output_item(out: Out, ctx: Context) -> tuple[Json, list[Part]]:
    """The result of a call, and the media that must go into a user message behind all results."""
    custom = out.kind == "custom" and ctx.caps.custom_tools
    said = "\n".join(p.text for p in out.parts if p.kind in WORDS)
    media = [p for p in out.parts if p.kind not in WORDS]
    text = with_error(said) if out.error and not out.stub else said
    item: Json = {"type": f"{'custom_tool' if custom else 'function'}_call_output",
                  "call_id": out.id, "output": text}
    if not media:
        return item, []
    if not ctx.caps.output_lists:
        return item, [Part("text", f"Images from tool result {out.id}:"), *media]
    parts = out.parts
    if text != said:
        first = parts[0]
        parts = [first._replace(text=f"Error: {first.text}"), *parts[1:]] \
            if first.kind in WORDS else [Part("text", "Error:"), *parts]
    item["output"] = [response_part(part, ctx) for part in parts]
    return item, []


def response_tool(tool: Tool, wire: str, ctx: Context) -> Json:
    """A function or a custom tool of Responses."""
    if call_kind(tool, ctx) == "custom":
        return {"type": "custom", **native_custom(tool, wire, ctx)}
    function = function_of(tool, wire, "parameters", filled_schema(tool.schema))
    return {"type": "function", **function,
            "strict": is_strict_tool(tool, function["parameters"], ctx)}


def response_search(options: Json) -> Json:
    """The hosted web search by the options of another protocol."""
    out: Json = {"type": "web_search"}
    if domains := listing(options.get("allowed_domains")):
        out["filters"] = {"allowed_domains": domains}
    if size := options.get("search_context_size"):
        out["search_context_size"] = size
    location = mapping(options.get("user_location"))
    if location:
        out["user_location"] = {"type": "approximate", **mapping(location.get("approximate")),
                                **{k: v for k, v in location.items() if k != "approximate"}}
    return out


def response_reasoning(ask: Ask, ctx: Context, out: Json) -> str | None:
    """The reasoning wish, clamped to what the model takes; the effort that is sent."""
    wish, caps = ask.effort, ctx.caps
    if wish is None and ctx.inbound == CHAT.word and caps.reasoning:
        wish = Effort()  # so that there is reasoning to show
    if wish is None or not caps.reasoning:
        if wish is not None:
            ctx.drop("thinking" if ctx.inbound == MESSAGES.word else "reasoning_effort",
                     "this model does not reason")
        return None
    level = asked_level(ask)
    found: Json = {}
    if level is not None:
        found["effort"] = clamp_effort(level, caps.efforts or EFFORTS[2:5])
    shown = wish.switched == "on" if ctx.inbound == MESSAGES.word else level != "none"
    if shown and wish.display != "omitted" and caps.reasoning_summary:
        found["summary"] = "auto"
    if found:
        out["reasoning"] = found
    return found.get("effort")


def response_text(ask: Ask, ctx: Context, out: Json) -> None:
    """The answer's format and verbosity."""
    text: Json = {}
    form = ask.format
    if form is not None and form.schema is None:
        text["format"] = {"type": "json_object"}
    elif form is not None:
        text["format"] = {"type": "json_schema", "name": form.name, "schema": form.schema,
                          "strict": is_strict_format(form, ctx)}
        if form.description:
            text["format"]["description"] = form.description
    if "verbosity" in ask.more:
        text["verbosity"] = ask.more.pop("verbosity")[1]
    if text:
        out["text"] = text


# Members that OpenAI's own Responses API takes as a Chat client sent them.
RESPONSES_EXTRAS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                    "prompt_cache_options", "metadata")


def response_extras(ask: Ask, ctx: Context, out: Json) -> None:
    """What OpenAI's Responses API has and others may not know."""
    put_user(ask, ctx, out)
    taken = RESPONSES_EXTRAS if ctx.caps.vendor_fields else ()
    if not ctx.caps.reasoning:
        taken = (*taken, "top_logprobs")
        ask.more.pop("logprobs", None)
    put_extras(ask, ctx, out, taken, ask.tier if ask.tier != "scale" else None)


# -- thinking by the name of the model ---------------------------------------

def suffix_effort(thinking: str) -> Effort:
    """The wish for reasoning that a suffix of a model's name is, see split_thinking()."""
    budget = int(thinking) if thinking.isdigit() else None
    level = None if budget or thinking == "auto" else thinking
    return Effort(level, budget, "summarized", None if level == "none" else "on")


# What says how much a request is to reason, by protocol, and what does not go with it.
THINKING_MEMBERS = {
    "responses": ("reasoning",),
    "chat": ("reasoning_effort", "reasoning", "thinking", "enable_thinking", "thinking_budget",
             "reasoning_format", "prompt_mode"),
    "messages": ("thinking",),
}
NOT_BESIDE_THINKING = ("temperature", "top_p", "top_k")


def with_thinking(body: Json, ctx: Context) -> Json:
    """A request in the provider's own protocol with the reasoning that the suffix of its model's
    name asks for, and none that the body asks for."""
    limit = body.get("max_tokens")
    ask = Ask(ctx.model, effort=suffix_effort(ctx.thinking),
              max_tokens=limit if type(limit) is int else None)
    members = THINKING_MEMBERS[ctx.provider]
    out = {name: value for name, value in body.items() if name not in members} | {
        "model": ctx.model}
    if ctx.provider == CHAT.word:
        return out | reasoning_fields(ask, asked_level(ask), bool(body.get("tools")), ctx)
    if ctx.provider == RESPONSES.word:
        kept = {name: value for name, value in mapping(body.get("reasoning")).items()
                if name != "effort"}
        response_reasoning(ask, ctx, out)
        if ctx.caps.reasoning and (kept or "reasoning" in out):
            out["reasoning"] = mapping(out.get("reasoning")) | kept
        return out
    config = mapping(out.pop("output_config", None))
    if kept := {name: value for name, value in config.items() if name != "effort"}:
        out["output_config"] = kept
    choice = mapping(body.get("tool_choice"))
    ask_for_thinking(ask, ctx, out, choice if "type" in choice else None)
    fit_tokens(ask, ctx, out)
    if mapping(out.get("thinking")).get("type") in ("enabled", "adaptive"):
        for name in NOT_BESIDE_THINKING:
            if out.pop(name, None) is not None:
                ctx.drop(name, "not beside thinking")
    return out



# ============================================================================
#  12  Answers
# ============================================================================
# One reader for each provider protocol (events of its stream to segments) and
# one writer for each client protocol (segments to the client's events). A pair
# is a reader and a writer; an answer in one piece goes the same way, so both
# agree. Pure: a stream is a generator that is sent events.

# -- what readers and writers share ------------------------------------------

class Usage(NamedTuple):
    """Tokens of an answer; `input` with what came from the cache and went into it."""

    input: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0
    reasoning: int | None = None
    tier: str | None = None
    total: int = 0  # as the provider tells it


class Stop(NamedTuple):
    """Why an answer ended: end, tool, sequence, length, context, pause, refusal or filter."""

    reason: str
    text: str | None = None  # a refusal's explanation, or the stop sequence
    category: str | None = None


class Citation(NamedTuple):
    """A source of a text: a span of it, or what it quotes."""

    url: str
    title: str
    start: int | None = None
    end: int | None = None
    quote: str = ""


class Segment:
    """A stretch of an answer that has a beginning and an end: text, refusal, thinking, call,
    custom (a call with free text), opaque (a block nobody else knows) or search."""

    __slots__ = ("at", "citations", "closed", "decoder", "form", "id", "index", "item", "kind",
                 "live", "name", "raw", "shown", "text", "thought", "where")

    def __init__(self, kind: str, id: str = "", name: str = "", raw: Any = None) -> None:
        self.kind, self.id, self.name, self.raw = kind, id, name, raw
        self.text: list[str] = []
        self.thought = "", ""  # kind and body of its carrier
        self.citations: list[Citation] = []
        self.live = self.closed = False
        # the writer's own marks
        self.shown, self.index, self.at = False, -1, (0, 0)
        self.item, self.where = cast(Json, {}), cast(Json, {})
        self.form, self.decoder = CALL_FORMS["function"], cast("InputDecoder | None", None)

    def whole(self) -> str:
        """All text so far."""
        if len(self.text) > 1:
            self.text = ["".join(self.text)]
        return self.text[0] if self.text else ""


class Writer:
    """Segments to events. Where the client takes one segment at a time (`serial`), the others
    wait in the order in which they began."""

    serial = True

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.usage = ctx, cast("Usage | None", None)
        self.events: list[Any] = []
        self.queue: deque[Segment] = deque()
        self.held: Segment | None = None  # one whose end is not told before the answer's is known
        self.begun = self.done = False
        self.calls = 0  # tool calls that began
        self.characters = 0  # of text

    def begin(self, id: Any, model: Any, created: Any = None) -> None:
        """The answer begins; only the first word counts."""
        if not self.begun:
            self.begun = True
            self.start_answer(text_of(id), self.ctx.shown or text_of(model) or self.ctx.alias,
                              created if type(created) is int and created > 0 else self.ctx.now)

    def open(self, segment: Segment) -> Segment:
        """A segment begins, with the text it has already."""
        self.begin(None, None)
        if self.serial:
            self.queue.append(segment)
        if len(self.queue) <= 1:
            self.show(segment)
        return segment

    def show(self, segment: Segment) -> None:
        """A segment has its turn, with all that it gathered while it waited."""
        segment.live = True
        self.start(segment)
        if segment.text:
            self.write(segment, segment.whole())
        if segment.closed:
            self.stop(segment)

    def add(self, segment: Segment, text: Any) -> None:
        """A segment goes on; what is no text, or empty, is no matter."""
        if text and type(text) is str:
            segment.text.append(text)
            if segment.live and not segment.closed:
                self.write(segment, text)

    def close(self, segment: Segment) -> None:
        """A segment ends; those that waited have their turn."""
        if segment.closed:
            return
        segment.closed = True
        if segment.live:
            self.stop(segment)
            if self.serial and self.held is None:
                self.advance()

    def advance(self) -> None:
        """The first segment is over: show those that waited, up to one that is not."""
        self.queue.popleft()
        while self.queue:
            self.show(self.queue[0])
            if not self.queue[0].closed or self.held:
                break
            self.queue.popleft()

    def ping(self) -> None:
        """A sign of life, where the protocol has one of its own."""

    def start_answer(self, id: str, model: str, created: int) -> None:
        """The first events."""

    def start(self, segment: Segment) -> None:
        """The events that open a segment."""

    def write(self, segment: Segment, text: str) -> None:
        """The event of a piece of a segment."""

    def stop(self, segment: Segment) -> None:
        """The events that close a segment."""

    def sealed(self, segment: Segment) -> str:
        """The carrier of a segment of reasoning."""
        return seal(*segment.thought, segment.whole(), self.ctx)

    def finish(self, stop: Stop) -> None:
        """The last events of a whole answer."""

    def fail(self, error: ProxyError) -> ProxyError:
        """An error in the client's words, with what the client must get before it."""
        protocol = next(p for p in PROTOCOLS.values() if p.word == self.ctx.inbound)
        return translated_error(error, protocol, self.ctx.estimate)


class Reader:
    """Events of a provider's stream to segments of a writer."""

    def __init__(self, out: Writer, ctx: Context) -> None:
        self.out, self.ctx = out, ctx

    def take(self, event: Json) -> None:
        """One event; unknown ones are no matter."""

    def end(self, done: bool = False) -> None:
        """The stream ended; `done` by [DONE]."""


Stream = Generator[list[Any], Any, list[Any]]


def translated(reader: Reader, out: Writer) -> Stream:
    """The stream of a pair: is sent events of the provider, yields lists of the client's.

    Send parsed events, DONE, None at the end of the provider's stream, PING for a sign of life, or
    the ProxyError of a transport that failed. Returns the last events of a whole answer; raises a
    ProxyError whose `events` go to the client before the error itself.
    """
    item: Any = yield []
    while True:
        try:
            if isinstance(item, dict):
                reader.take(item)
            elif item is None or item == DONE:
                reader.end(item == DONE)
            elif item is PING:
                out.ping()
            else:
                raise item if isinstance(item, ProxyError) else broken(
                    "an event is no JSON object")
        except ProxyError as error:
            raise out.fail(error) from None
        except (RecursionError, ValueError):  # of values that cannot be written
            raise out.fail(broken("an event is nested too deeply")) from None
        events, out.events = out.events, []
        if out.done:
            return events
        item = yield events


def broken(what: str) -> UpstreamError:
    """A provider's stream that cannot be translated."""
    return UpstreamError(f"the provider's stream is unusable: {what}", type=STREAM_TRANSLATION)


def cut_short(terminal: str) -> UpstreamError:
    """A provider's stream that ended in the middle."""
    return UpstreamError(f"upstream stream ended before {terminal}", type=STREAM_TRANSLATION)


# Status of an error that comes in a 2xx answer, by the words of its code or type.
FAULT_STATUS = {
    "invalid_request_error": 400, "invalid_prompt": 400, "context_length_exceeded": 400,
    "authentication_error": 401, "invalid_api_key": 401, "billing_error": 402,
    "insufficient_quota": 402, "permission_error": 403, "not_found_error": 404,
    "api_error": 500, "request_too_large": 413, "rate_limit_error": 429, "rate_limit_exceeded": 429,
    "too_many_requests": 429, "usage_limit_reached": 429, "timeout_error": 504, "timeout": 504,
    "overloaded_error": 529, "overloaded": 503, "server_is_overloaded": 529,
    "insufficient_system_resource": 529,
}


def fault_of(error: Any) -> UpstreamError:
    """The error that a provider's own error object in an event or answer stands for."""
    error = {"message": error} if isinstance(error, str) else mapping(error)
    code, kind = error.get("code"), word(error.get("type")) or ""
    status = FAULT_STATUS.get(text_of(code)) or FAULT_STATUS.get(kind) or (
        code if type(code) is int and 400 <= code < 600 else 502)
    text = text_of(error.get("message")) or "the provider sent an error"
    return UpstreamError(text[:ERROR_TEXT_CHARS], status=status, type=UPSTREAM, code=word(code),
                         kind=kind)


def url_citation(found: Json) -> list[Citation]:
    """A source as OpenAI tells it; none without an address."""
    url = found.get("url")
    return [Citation(url, text_of(found.get("title")) or url, number(found.get("start_index")),
                     number(found.get("end_index")))] if isinstance(url, str) else []


def counter(*values: Any) -> int | None:
    """The first of some usage counters that is there."""
    return next((number(value) for value in values if value is not None), None)


# -- reading Anthropic Messages (translation-responses.md 2.3, -chat.md 2.10)

MESSAGES_STOPS = {"tool_use": "tool", "max_tokens": "length", "compaction": "context",
                  "model_context_window_exceeded": "context", "pause_turn": "pause",
                  "refusal": "refusal"}
# What content blocks are, those with a text by the name of its member.
BLOCK_KINDS = {"text": "text", "thinking": "thinking", "redacted_thinking": "thinking",
               "tool_use": "call"}
BLOCK_CARRIERS = {"thinking": ("at", "signature"), "redacted_thinking": ("ar", "data")}
DELTA_TEXTS = {"text_delta": "text", "thinking_delta": "thinking",
               "input_json_delta": "partial_json"}


class MessagesReader(Reader):
    """Reads the stream of an Anthropic Messages provider."""

    def __init__(self, out: Writer, ctx: Context) -> None:
        super().__init__(out, ctx)
        self.blocks: dict[Any, Segment] = {}  # open ones by index
        self.counts: Json = {}
        self.reason: Any = None
        self.details: Json = {}

    def take(self, event: Json) -> None:
        """One event; unknown ones are no matter."""
        kind, index = event.get("type"), event.get("index")
        index = index if type(index) is int else key_of(index)
        if kind == "content_block_delta":
            self.delta(index, mapping(event.get("delta")))
        elif kind == "content_block_start":
            self.start(index, mapping(event.get("content_block")))
        elif kind == "content_block_stop":
            self.stop(index)
        elif kind == "message_start":
            message = mapping(event.get("message")) or event
            self.count(message.get("usage"))
            self.out.begin(message.get("id"), message.get("model"))
        elif kind == "message_delta":
            delta = mapping(event.get("delta"))
            self.count(event.get("usage"))
            self.reason = delta.get("stop_reason") or self.reason
            self.details = mapping(delta.get("stop_details")) or self.details
        elif kind == "message_stop":
            self.finish()
        elif kind == "error":
            raise fault_of(event.get("error"))

    def count(self, usage: Any) -> None:
        """Take counters over; they are totals, and null says nothing."""
        self.counts |= {name: n for name, n in mapping(usage).items() if n is not None}

    def start(self, index: Any, block: Json) -> Segment:
        """A block begins."""
        self.stop(index)
        type_ = text_of(block.get("type"))
        kind = BLOCK_KINDS.get(type_, "opaque")
        segment = self.blocks[index] = self.out.open(Segment(
            kind, text_of(block.get("id")), text_of(block.get("name")),
            block if kind in ("call", "opaque") else None))
        if type_ in BLOCK_CARRIERS:
            carrier, member = BLOCK_CARRIERS[type_]
            segment.thought = carrier, text_of(block.get(member))
        if kind in ("text", "thinking"):
            self.out.add(segment, block.get(kind))
            for citation in listing(block.get("citations")):
                self.cite(segment, mapping(citation))
        return segment

    def delta(self, index: Any, delta: Json) -> None:
        """A piece of a block; a block that never began begins with it."""
        kind, segment = text_of(delta.get("type")), self.blocks.get(index)
        if segment is None:
            if kind not in ("text_delta", "thinking_delta"):
                return
            segment = self.start(index, {"type": kind.removesuffix("_delta")})
        if kind in DELTA_TEXTS:
            self.out.add(segment, delta.get(DELTA_TEXTS[kind]))
        elif kind == "signature_delta":
            segment.thought = "at", text_of(delta.get("signature"))
        elif kind == "citations_delta":
            self.cite(segment, mapping(delta.get("citation")))

    def cite(self, segment: Segment, citation: Json) -> None:
        """A source; only addresses can be told to clients of other protocols."""
        member = "url" if citation.get("type") == "web_search_result_location" else "source"
        url = text_of(citation.get(member))
        if url.startswith(("http://", "https://")):
            segment.citations.append(Citation(url, text_of(citation.get("title")) or url,
                                              quote=text_of(citation.get("cited_text"))))

    def stop(self, index: Any) -> None:
        """A block ends."""
        if (segment := self.blocks.pop(index, None)) is None:
            return
        if segment.kind == "call" and not segment.text:
            self.out.add(segment, dump_arguments(mapping(segment.raw.get("input"))))
        elif segment.kind == "opaque" and segment.text:
            segment.raw = {**segment.raw, "input": parse_arguments(segment.whole())}
        self.out.close(segment)

    def finish(self) -> None:
        """The message is whole."""
        if self.reason is None and self.ctx.inbound == RESPONSES.word:
            raise broken("it has no stop_reason")
        for index in list(self.blocks):
            self.stop(index)
        self.out.begin(None, None)
        self.out.usage = messages_usage(self.counts)
        reason = MESSAGES_STOPS.get(text_of(self.reason), "end")
        said = text_of(self.details.get("explanation")) if reason == "refusal" else ""
        self.out.finish(Stop(reason, said or None, word(self.details.get("category"))))

    def end(self, done: bool = False) -> None:
        """The stream ended: whole if the reason is known and no block is open."""
        if self.reason is None or self.blocks:
            raise cut_short("message_stop")
        self.finish()


def messages_usage(counts: Json) -> Usage | None:
    """Usage as Anthropic counts it: cached tokens beside the input."""
    if not counts:
        return None
    fresh, cached, written, output = (number(counts.get(f"{name}_tokens")) for name in (
        "input", "cache_read_input", "cache_creation_input", "output"))
    thinking = mapping(counts.get("output_tokens_details")).get("thinking_tokens")
    return Usage(fresh + cached + written, cached, written, output, counter(thinking),
                 word(counts.get("service_tier")))


# -- reading Chat Completions (translation-responses.md 4.3, -chat.md 3.9) ---

CHAT_STOPS = {
    "tool_calls": "tool", "function_call": "tool", "tool_use": "tool", "length": "length",
    "max_tokens": "length", "max_output_tokens": "length", "model_length": "context",
    "model_context_window_exceeded": "context", "content_filter": "filter", "sensitive": "filter",
    "safety": "filter", "refusal": "filter",
}
PLAIN_DELTA = {"role", "content"}  # the members of nearly all chunks
CHAT_FAULTS = ("error", "network_error", "abort", "cancelled", "insufficient_system_resource")


GROWING = ("text", "summary", "data", "signature")  # members of reasoning details


class ChatCall:
    """A tool call as fragments of it come in; its segment is opened when it has `begun`."""

    __slots__ = ("begun", "braces", "custom", "id", "index", "name", "segment")

    def __init__(self, index: int | None) -> None:
        self.index, self.id, self.name = index, "", ""
        self.begun = self.custom = False
        self.segment = Segment("call")
        self.braces = 0  # open ones, those in strings too: a quick no

    def complete(self) -> bool:
        """Whether the arguments are a whole JSON object."""
        return self.braces <= 0 and is_object(self.segment.whole())


class ChatReader(Reader):
    """Reads the stream of a Chat Completions provider. Its writers are serial."""

    def __init__(self, out: Writer, ctx: Context) -> None:
        super().__init__(out, ctx)
        self.open: Segment | None = None  # of text, refusal or thinking
        self.calls: list[ChatCall] = []
        self.usage: Json = {}
        self.tier: str | None = None
        self.reason: str | None = None
        self.matched = ""  # the stop sequence, where the provider tells it
        self.refusal: list[str] = []
        self.blank = ""  # whitespace that came before anything else
        self.spoke = False
        self.tags = "start" if ctx.caps.think_tags == "auto" else "off"
        self.held = ""  # of a text that may begin a tag
        self.source = ""  # the field that reasoning comes in
        self.details: dict[Any, Json] = {}
        self.signatures: Json = {}

    def take(self, event: Json) -> None:
        """One chunk."""
        if event.get("error") or event.get("object") == "error":
            raise fault_of(event.get("error") or event)
        choice: Json | None = None
        for one in listing(event.get("choices")):
            if isinstance(one, dict) and one.get("index") in (0, None):
                choice = one
                break
        usage = event.get("usage") or (choice and choice.get("usage"))
        if "x_groq" in event:
            usage = usage or mapping(event["x_groq"]).get("usage")
        self.usage = mapping(usage) or self.usage
        if "service_tier" in event:
            self.tier = word(event["service_tier"]) or self.tier
        if choice is not None:
            if not self.out.begun:
                self.out.begin(event.get("id"), event.get("model"), event.get("created"))
            if self.reason is None:
                self.delta(mapping(choice.get("delta") or choice.get("message")),
                           mapping(choice.get("logprobs")).get("content"))
            if choice.get("finish_reason"):
                self.finished(choice)
        if self.reason is not None and mapping(usage):
            self.finish()

    def finished(self, choice: Json) -> None:
        """A finish_reason, the first of which counts."""
        reason = choice["finish_reason"]
        if not isinstance(reason, str):
            return
        if reason in CHAT_FAULTS or isinstance(choice.get("error"), dict):
            raise fault_of(choice.get("error") or {
                "message": f"the provider ended the answer with {reason}", "type": reason})
        if self.reason is None or (reason == "tool_calls" and self.reason == "stop"):
            self.reason = reason
        self.matched = (self.matched or text_of(choice.get("stop_reason"))
                        or text_of(choice.get("matched_stop")))

    def delta(self, delta: Json, logprobs: Any) -> None:
        """What a chunk adds: reasoning, text, refusal, calls, in this order."""
        plain = delta.keys() <= PLAIN_DELTA
        if not plain:
            self.reasoning(delta)
        content = delta.get("content")
        if type(content) is str:
            self.content(content, logprobs)
            if plain:
                return
        parts = 0
        for part in map(mapping, listing(content)):
            if part.get("type") == "thinking":
                self.think("".join(text_of(mapping(p).get("text")) for p in
                                   listing(part.get("thinking"))), "thinking")
            elif text := text_of(part.get("text")):
                if parts and self.ctx.inbound == RESPONSES.word:  # which knows parts
                    self.close_open()
                parts += 1
                self.say(text)
        if refusal := text_of(delta.get("refusal")):
            self.refusal.append(refusal)
            self.out.add(self.segment("refusal"), refusal)
        for annotation in map(mapping, listing(delta.get("annotations"))):
            if self.open:
                self.open.citations += url_citation(mapping(annotation.get("url_citation")))
        used: list[ChatCall] = []
        for call in map(mapping, listing(delta.get("tool_calls"))):
            self.call(call, used)
        if isinstance(delta.get("function_call"), dict):
            self.call({"index": 0, "function": delta["function_call"]}, used)

    def reasoning(self, delta: Json) -> None:
        """Reasoning text, in the first field that had some; its opaque part is collected."""
        texts = {name: text for name in ("reasoning_content", "reasoning", "thinking")
                 if (text := text_of(delta.get(name)))}
        details = [mapping(detail) for detail in listing(delta.get("reasoning_details"))]
        for detail in details:
            self.merge(detail)
        if not texts:
            texts["reasoning_details"] = "".join(
                text_of(d.get("text")) or text_of(d.get("summary")) for d in details)
        source = self.source or next(iter(texts))
        self.think(texts.get(source, ""), source)

    def merge(self, detail: Json) -> None:
        """A piece of a reasoning detail: strings of growing members are joined."""
        index = detail.get("index")
        key = (index if isinstance(index, (int, str)) else len(self.details),
               text_of(detail.get("type")))
        known = self.details.setdefault(key, {})
        for name, value in detail.items():
            if name in GROWING and isinstance(value, str):
                known.setdefault(name, []).append(value)  # joined once, by carrier()
            elif value is not None:
                known[name] = value

    def think(self, text: str, source: str) -> None:
        """Reasoning goes on."""
        if text:
            self.source = self.source or source
            self.tags = "off" if self.tags == "start" else self.tags
            self.out.add(self.segment("thinking"), text)

    def content(self, text: str, logprobs: Any) -> None:
        """Text, or reasoning between think tags at its start."""
        if self.tags == "start":
            self.held += text
            bare = self.held.lstrip()
            if len(bare) < len(THINK) and THINK.startswith(bare):
                return
            text, self.held = self.held, ""
            self.tags = "off"
            if bare.startswith(THINK):
                self.tags, text = "inside", bare[len(THINK):].lstrip("\n")
        if self.tags == "inside":
            before, tag, after = (self.held + text).partition(END_THINK)
            if not tag:
                # what may begin the tag, and line ends before it: not the reasoning's
                keep_ = next((n for n in range(len(END_THINK) - 1, 0, -1)
                              if before.endswith(END_THINK[:n])), 0)
                said = before[:len(before) - keep_].rstrip("\n")
                self.held = before[len(said):]
                self.think(said, "think")
                return
            self.held = ""
            self.think(before.rstrip("\n"), "think")
            self.close_open()
            self.tags, text = "after", after
        if self.tags == "after":
            text = text.lstrip()
            self.tags = "off" if text else "after"
        self.say(text, logprobs)

    def say(self, text: str, logprobs: Any = None) -> None:
        """Text goes on; whitespace before anything else waits for what follows."""
        if not self.spoke and not text.strip():
            self.blank += text
        elif text:
            segment = self.segment("text")
            if isinstance(logprobs, list) and logprobs:
                segment.raw = logprobs
            self.out.add(segment, self.blank + text)
            self.blank = ""

    def segment(self, kind: str) -> Segment:
        """The open segment, if it is of this kind, or a new one."""
        if self.open is None or self.open.kind != kind:
            self.close_open()
            self.make_way()
            self.open = self.out.open(Segment(kind))
        self.spoke = self.spoke or kind != "thinking"
        return self.open

    def close_open(self) -> None:
        """End the segment of text or reasoning that is open."""
        if self.open is not None:
            if self.open.kind == "thinking":
                self.open.thought = self.carrier(self.open.whole())
            self.out.close(self.open)
            self.open = None

    def carrier(self, text: str) -> tuple[str, str]:
        """Kind and body of the carrier of a stretch of reasoning."""
        if not self.details and not self.signatures:
            return "cr", self.source or "reasoning_content"
        whole = [{name: "".join(value) if name in GROWING and isinstance(value, list) else value
                  for name, value in detail.items()} for detail in self.details.values()]
        body: Json = {"d": [{name: value for name, value in detail.items()
                             if not (name in ("text", "summary") and value == text)}
                            for detail in whole]}
        if self.signatures:
            body["t"] = self.signatures
        self.details, self.signatures = {}, {}
        return "cd", pack(body)

    def leave_details(self) -> None:
        """End what is open; opaque reasoning that is left has a segment of its own."""
        self.close_open()
        if self.details or self.signatures:
            self.open = self.out.open(Segment("thinking"))
            self.close_open()

    def make_way(self, beginning: ChatCall | None = None) -> None:
        """Something begins: so do calls that waited for arguments, and complete ones end."""
        for call in itertools.takewhile(lambda c: c is not beginning, self.calls):
            if call.name and not call.begun:
                self.begin_call(call)
        for call in self.calls:
            if call.begun and not call.segment.closed and call.complete():
                self.out.close(call.segment)

    def call(self, part: Json, used: list[ChatCall]) -> None:
        """A fragment of a tool call."""
        function = mapping(part.get("function")) or mapping(part.get("custom"))
        name, id = text_of(function.get("name")), text_of(part.get("id"))
        arguments = function.get("arguments", function.get("input"))
        text = arguments if isinstance(arguments, str) else "" if arguments is None \
            else compact(arguments)
        call = self.slot(part.get("index"), id, name, text, used)
        used.append(call)
        call.id = call.id or id
        if not call.begun and name != call.name:
            call.name = name if name.startswith(call.name) else call.name + name
        google = mapping(mapping(part.get("extra_content")).get("google"))
        if call.id and (signature := text_of(google.get("thought_signature"))):
            self.signatures[call.id] = signature
        if "custom" in part:
            call.custom = True
        else:
            text = self.news(call, text)
            call.braces += text.count("{") - text.count("}")
        self.out.add(call.segment, text)
        if not call.begun and call.name and call.segment.text:
            self.begin_call(call)
        elif call.begun and text and len(self.out.queue) > 1 and call.complete():
            self.out.close(call.segment)

    def begin_call(self, call: ChatCall) -> None:
        """A call begins: its name is known, and arguments came or nothing more will."""
        self.leave_details()
        self.make_way(call)
        self.blank, self.held, self.spoke, call.begun = "", "", True, True
        call.segment.kind = "custom" if call.custom else "call"
        call.segment.id, call.segment.name = call.id, call.name
        self.out.open(call.segment)

    def news(self, call: ChatCall, text: str) -> str:
        """What of a fragment is new: some providers send all the arguments again each time."""
        if not text.startswith("{"):
            return text  # the rule; looking at all arguments each time would take long
        before = call.segment.whole()
        again = text.startswith(before) and (
            len(before) >= 8 or (text == before and is_object(text)))
        return text[len(before):] if again else text

    def slot(self, index: Any, id: str, name: str, text: str, used: list[ChatCall]) -> ChatCall:
        """The call that a fragment belongs to, whatever the provider says or leaves out."""
        last = self.calls[-1] if self.calls else None
        found: ChatCall | None = None
        if type(index) is int:
            found = next((c for c in reversed(self.calls) if c.index == index), None)
            if found and name and (
                    (id and found.id and id != found.id
                     and (found.complete() or (found.name and not found.segment.text)))
                    or (not id and text.strip() and found.complete()
                        and text != found.segment.whole())):
                found = None
        elif id:
            found = next((c for c in self.calls if c.id == id), None)
        elif last and last not in used and not (name and last.complete()):
            found = last
        if found is None:
            found = ChatCall(index if type(index) is int else None)
            self.calls.append(found)
        return found

    def finish(self) -> None:
        """The answer is whole: all that was held comes out, and all segments end."""
        text, self.held = self.held, ""
        if self.tags == "inside":
            self.think(text.rstrip("\n"), "think")
        elif text.strip() and self.tags == "start":
            self.tags = "off"
            self.say(text)
        self.leave_details()
        self.make_way()
        for call in self.calls:
            if call.begun:
                if call.segment.kind == "call" and not call.segment.text:
                    self.out.add(call.segment, "{}")
                self.out.close(call.segment)
        self.out.begin(None, None)
        self.out.usage = chat_usage(self.usage, self.tier)
        stop = Stop(CHAT_STOPS.get((self.reason or "stop").lower(), "end"))
        if self.refusal and self.ctx.inbound == MESSAGES.word:
            stop = Stop("refusal", "".join(self.refusal))
        elif stop.reason == "end" and self.matched in self.ctx.stops:
            stop = Stop("sequence", self.matched)
        self.out.finish(stop)

    def end(self, done: bool = False) -> None:
        """[DONE] or the end of the bytes: lenient where a whole answer has no finish_reason."""
        whole = all(call.complete() or not call.segment.text for call in self.calls)
        if self.reason is None and not (
                done and whole and (self.spoke or self.open) and self.ctx.caps.lenient_done):
            raise broken("it emitted [DONE] before a terminal finish_reason") if done \
                else cut_short("finish_reason")
        self.finish()


def chat_usage(usage: Json, tier: str | None) -> Usage | None:
    """Usage in the dialects of Chat providers (translation-chat.md 3.8)."""
    if not usage:
        return None
    prompt = mapping(usage.get("prompt_tokens_details"))
    cached = counter(prompt.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"),
                     usage.get("cached_tokens"), usage.get("cache_read_input_tokens"))
    written = counter(prompt.get("cache_write_tokens"), usage.get("cache_creation_tokens"),
                      usage.get("cache_creation_input_tokens"))
    reasoning = counter(mapping(usage.get("completion_tokens_details")).get("reasoning_tokens"))
    sent, got, total = (number(usage.get(f"{what}_tokens"))
                        for what in ("prompt", "completion", "total"))
    if reasoning and total == sent + got + reasoning:
        got += reasoning  # xAI counts them beside the completion
    return Usage(sent, cached or 0, written or 0, got, reasoning, tier, total)


# -- reading Responses (translation-responses.md 3.3, 5.3) -------------------

REFUSAL_CODES = ("invalid_prompt", "cyber_policy")
PART_KINDS = {"output_text": "text", "refusal": "refusal"}
CALL_ITEMS = {"function_call": "call", "custom_tool_call": "custom"}
ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


def place_of(event: Json, kind: str) -> tuple[Any, Any]:
    """What tells the segment of an event from others: its item, and its content part or kind."""
    part = kind if kind in ("thinking", "call") else key_of(event.get("content_index"))
    return key_of(event.get("output_index")), part


class ResponsesReader(Reader):
    """Reads the stream of a Responses provider."""

    def __init__(self, out: Writer, ctx: Context) -> None:
        super().__init__(out, ctx)
        self.segments: dict[tuple[Any, Any], Segment] = {}  # by place_of()
        self.over: set[Any] = set()  # output_index of whole items
        self.summaries: set[Any] = set()  # items whose summary came, so their raw text is not shown
        self.lost = False  # an item that the client cannot be told

    def take(self, event: Json) -> None:
        """One event, by the table of its type; progress and unknown ones are no matter."""
        type_ = text_of(event.get("type"))
        if step := RESPONSES_STEPS.get(type_):
            self.out.begin(None, None)
            step[0](self, event, step[1])
        elif type_ in ("response.created", "response.queued", "response.in_progress"):
            self.begin(mapping(event.get("response")))
        elif type_ in ENDS:
            self.terminal(mapping(event.get("response")), type_.removeprefix("response."))
        elif type_ == "error":
            raise fault_of(event.get("error") or event)

    def begin(self, response: Json) -> None:
        """The first word about the answer."""
        self.out.begin(response.get("id"), response.get("model"), response.get("created_at"))

    def segment(self, event: Json, kind: str) -> Segment:
        """The segment that an event is about, a new one if it is the first."""
        place = place_of(event, kind)
        if place not in self.segments:
            self.segments[place] = self.out.open(Segment(kind, name=f"item {place[0]}"))
        return self.segments[place]

    def delta(self, event: Json, kind: str) -> None:
        """A text, a refusal or a summary goes on."""
        if text := text_of(event.get("delta")):
            segment = self.segment(event, kind)
            segment.raw = listing(event.get("logprobs")) or segment.raw
            self.out.add(segment, text)

    def done(self, event: Json, kind: str) -> None:
        """A text or a refusal is whole: what of it was not streamed comes now."""
        if text := text_of(event.get(kind)):
            self.rest(self.segment(event, kind), text)

    def rest(self, segment: Segment, text: str) -> None:
        """Add what `text` has beyond what was streamed."""
        before = segment.whole()
        if not segment.closed and text.startswith(before):
            self.out.add(segment, text[len(before):])

    def annotation(self, event: Json, kind: str) -> None:
        """A source of a text."""
        found = mapping(event.get("annotation"))
        if found.get("type") == "url_citation" and (citations := url_citation(found)):
            self.segment(event, kind).citations += citations

    def part_added(self, event: Json, _: str) -> None:
        """A content part begins."""
        if kind := PART_KINDS.get(text_of(mapping(event.get("part")).get("type"))):
            self.segment(event, kind)

    def part_done(self, event: Json, _: str) -> None:
        """A content part is whole, with all that is in it; an empty one need not begin for that."""
        part = mapping(event.get("part"))
        kind = PART_KINDS.get(text_of(part.get("type")), "")
        text = text_of(part.get(kind))
        if not kind or not (text or place_of(event, kind) in self.segments):
            return
        segment = self.segment(event, kind)
        if not segment.closed and not segment.citations:
            for annotation in listing(part.get("annotations")):
                self.annotation({**event, "annotation": annotation}, kind)
        segment.raw = segment.raw or listing(part.get("logprobs"))
        self.rest(segment, text)
        self.out.close(segment)

    # -- reasoning

    def summary_added(self, event: Json, kind: str) -> None:
        """A further part of a summary begins."""
        segment = self.segments.get(place_of(event, kind))
        if segment and segment.text and number(event.get("summary_index")):
            self.out.add(segment, "\n\n")

    def summary_delta(self, event: Json, kind: str) -> None:
        """A summary goes on."""
        if event.get("delta"):
            self.summaries.add(key_of(event.get("output_index")))
        self.delta(event, kind)

    def raw_delta(self, event: Json, kind: str) -> None:
        """Raw reasoning goes on, shown while there is no summary."""
        if key_of(event.get("output_index")) not in self.summaries:
            self.delta(event, kind)

    def end_reasoning(self, event: Json, item: Json) -> None:
        """A reasoning item is whole: its carrier closes it."""
        texts = [text_of(mapping(part).get("text"))
                 for part in listing(item.get("summary")) or listing(item.get("content"))]
        text, sealed = "\n\n".join(filter(None, texts)), text_of(item.get("encrypted_content"))
        if text or sealed or place_of(event, "thinking") in self.segments:
            segment = self.segment(event, "thinking")
            self.rest(segment, text)
            segment.thought = "or", f"{text_of(item.get('id'))}:{sealed}"
            self.out.close(segment)

    # -- calls and other items

    def call_segment(self, event: Json, item: Json) -> Segment | None:
        """The segment of a call; None for an item that is no call, or has no name."""
        place, kind = place_of(event, "call"), CALL_ITEMS.get(text_of(item.get("type")))
        if place not in self.segments and kind and item.get("name"):
            name = full_name(text_of(item.get("namespace")), text_of(item["name"]))
            self.segments[place] = self.out.open(Segment(kind, text_of(item.get("call_id")), name))
        return self.segments.get(place)

    def call_delta(self, event: Json, kind: str) -> None:
        """Arguments go on."""
        if segment := self.segments.get(place_of(event, kind)):
            self.out.add(segment, event.get("delta"))

    def call_done(self, event: Json, kind: str) -> None:
        """Arguments are whole, as an event or an item tells them; {} may mean that it does not."""
        segment = self.segments.get(place_of(event, kind))
        told = mapping(event.get("item")) or event
        text = text_of(told.get("arguments")) or text_of(told.get("input"))
        if segment and text != "{}":
            self.rest(segment, text)

    def item_added(self, event: Json, _: str) -> None:
        """An item begins; calls once their name is known."""
        item = mapping(event.get("item"))
        if item.get("call_id") and key_of(event.get("output_index")) not in self.over:
            self.call_segment(event, item)

    def item_done(self, event: Json, _: str) -> None:
        """An item is whole, whether or not it was seen to begin."""
        item, index = mapping(event.get("item")), key_of(event.get("output_index"))
        kind = item.get("type")
        if index in self.over:
            return
        self.over.add(index)
        if kind == "reasoning":
            self.end_reasoning(event, item)
        elif kind == "message":
            for k, part in enumerate(listing(item.get("content"))):
                self.part_done({"output_index": index, "content_index": k, "part": part}, "")
            self.close_all(index)
        elif segment := self.call_segment(event, item):
            self.call_done(event, "call")
            self.out.close(segment)
        elif kind == "web_search_call" and self.ctx.web_search:
            self.segments[index, "search"] = self.out.open(Segment("search", raw=item))
            self.out.close(self.segments[index, "search"])
        else:
            self.lost = True

    def close_all(self, item: Any = ABSENT) -> None:
        """End the open segments of an item, or of all."""
        for (index, _), segment in self.segments.items():
            if item is ABSENT or index == item:
                self.out.close(segment)

    # -- the end

    def terminal(self, response: Json, kind: str) -> None:
        """The last word: items that were never seen, usage, and why it ended."""
        self.begin(response)
        error = mapping(response.get("error"))
        refused = kind == "failed" and error.get("code") in REFUSAL_CODES
        if refused or kind in ("completed", "incomplete"):
            for i, item in enumerate(map(mapping, listing(response.get("output")))):
                cut = item.get("status") == "incomplete" and "call" in text_of(item.get("type"))
                if not cut or is_object(text_of(item.get("arguments"))):
                    self.item_done({"item": item, "output_index": i}, "")
        self.out.usage = responses_usage(response.get("usage"), word(response.get("service_tier")))
        if self.lost and not self.segments:
            raise broken("it holds nothing that this client can be told")
        if kind in ("failed", "cancelled") and not refused:
            raise fault_of(error or {"message": f"the provider's answer has status {kind}"})
        self.close_all()
        self.out.finish(self.stop_of(response, kind, error))

    def stop_of(self, response: Json, kind: str, error: Json) -> Stop:
        """Why the answer ended."""
        if kind == "failed":
            category = "cyber" if error.get("code") == "cyber_policy" else None
            return Stop("refusal", text_of(error.get("message")) or None, category)
        reason = mapping(response.get("incomplete_details")).get("reason")
        if kind == "incomplete" and reason != "steered":
            return Stop("filter" if reason == "content_filter" else "length")
        segments = self.segments.values()
        if any(segment.kind in ("call", "custom") for segment in segments):
            return Stop("tool")
        if refused := "".join(s.whole() for s in segments if s.kind == "refusal"):
            return Stop("refusal", refused)
        return Stop("pause" if response.get("end_turn") is False else "end")

    def end(self, done: bool = False) -> None:
        """The stream ended before its terminal event."""
        raise cut_short("response.completed")


# What an event does, and to which kind of segment.
RESPONSES_STEPS: dict[str, tuple[Callable[[ResponsesReader, Json, str], None], str]] = {
    "response.content_part.added": (ResponsesReader.part_added, ""),
    "response.content_part.done": (ResponsesReader.part_done, ""),
    "response.output_text.delta": (ResponsesReader.delta, "text"),
    "response.output_text.done": (ResponsesReader.done, "text"),
    "response.output_text.annotation.added": (ResponsesReader.annotation, "text"),
    "response.refusal.delta": (ResponsesReader.delta, "refusal"),
    "response.refusal.done": (ResponsesReader.done, "refusal"),
    "response.reasoning_summary_part.added": (ResponsesReader.summary_added, "thinking"),
    "response.reasoning_summary_text.delta": (ResponsesReader.summary_delta, "thinking"),
    "response.reasoning_text.delta": (ResponsesReader.raw_delta, "thinking"),
    "response.reasoning.delta": (ResponsesReader.raw_delta, "thinking"),
    "response.function_call_arguments.delta": (ResponsesReader.call_delta, "call"),
    "response.function_call_arguments.done": (ResponsesReader.call_done, "call"),
    "response.custom_tool_call_input.delta": (ResponsesReader.call_delta, "call"),
    "response.custom_tool_call_input.done": (ResponsesReader.call_done, "call"),
    "response.output_item.added": (ResponsesReader.item_added, ""),
    "response.output_item.done": (ResponsesReader.item_done, ""),
}


def responses_usage(usage: Any, tier: str | None) -> Usage | None:
    """Usage as the Responses API counts it."""
    if not isinstance(usage, dict):
        return None
    sent, got = (mapping(usage.get(f"{way}_tokens_details")) for way in ("input", "output"))
    return Usage(number(usage.get("input_tokens")), number(sent.get("cached_tokens")),
                 number(sent.get("cache_write_tokens")), number(usage.get("output_tokens")),
                 counter(got.get("reasoning_tokens")), tier)


# -- writing Responses (translation-responses.md 2.2, 2.3, 4.2, 4.3) ---------

STRING_PIECE = re.compile(
    r'(?:[^"\\\ud800-\udfff]|\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r'|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*')
INPUT_BEGINS = re.compile(r'\s*\{\s*"input"\s*:\s*"')


class InputDecoder:
    """Takes the text out of {"input": "..."} while it comes in (translation-responses.md 2.3.3)."""

    __slots__ = ("began", "off", "rest", "sent")

    def __init__(self) -> None:
        self.rest, self.sent = "", cast("list[str]", [])
        self.began = self.off = False  # off: ended, or not of this form

    def feed(self, text: str) -> str:
        """What can be said of the text with one more fragment."""
        if self.off:
            return ""
        self.rest += text
        if not self.began:
            match = INPUT_BEGINS.match(self.rest)
            if not match:
                bare = re.sub(r"\s", "", self.rest)
                self.off = len(self.rest) > 64 or not '{"input":"'.startswith(bare)
                return ""
            self.began, self.rest = True, self.rest[match.end():]
        piece = STRING_PIECE.match(self.rest)
        assert piece
        self.rest = self.rest[piece.end():]
        self.off = self.rest.startswith('"')
        found: str = LOOSE_DECODER.decode(f'"{piece[0]}"')
        self.sent.append(found)
        return found

    def close(self, whole: str) -> tuple[str, str]:
        """The input by all the arguments, and what of it was not said yet."""
        sent, value = "".join(self.sent), loose_json(whole)
        found: Any = sent if self.began else whole
        if isinstance(value, dict):
            found = value.get("input")
            if not isinstance(found, str):
                only = next(iter(value.values()), None)
                found = only if len(value) == 1 and isinstance(only, str) else compact(value)
        return (found, found[len(sent):]) if found.startswith(sent) else (sent, "")


# What restores the calls of built-in tools from their arguments; None where those do not fit.

def are_texts(value: Any) -> bool:
    """Whether a value is an array of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def shell_action(input: Json) -> Json | None:
    """The action of a local_shell_call."""
    return {"action": {
        "type": "exec", "command": input["command"], "env": mapping(input.get("env")),
        "timeout_ms": input.get("timeout_ms"), "working_directory": input.get("workdir"),
        "user": None}} if are_texts(input.get("command")) else None


def commands_action(input: Json) -> Json | None:
    """The action of a shell_call."""
    names = ("commands", "timeout_ms", "max_output_length")
    return ({"action": {name: input.get(name) for name in names}}
            if are_texts(input.get("commands")) else None)


def patch_operation(input: Json) -> Json | None:
    """The operation of an apply_patch_call."""
    return ({"operation": {key: input[key] for key in ("type", "path", "diff") if key in input}}
            if are_texts([input.get("type"), input.get("path")]) else None)


def search_arguments(input: Json) -> Json | None:
    """The arguments of a tool_search_call."""
    return {"arguments": input, "execution": "client"}


class CallForm(NamedTuple):
    """How a tool call looks to a Responses client."""

    type: str
    prefix: str  # of item ids
    member: str = ""  # that grows; else the call is restored when it is whole
    restore: Callable[[Json], Json | None] = search_arguments


CALL_FORMS = {
    "function": CallForm("function_call", "fc", "arguments"),
    "custom": CallForm("custom_tool_call", "ctc", "input"),
    "local_shell": CallForm("local_shell_call", "lsh", restore=shell_action),
    "shell": CallForm("shell_call", "sh", restore=commands_action),
    "apply_patch": CallForm("apply_patch_call", "apc", restore=patch_operation),
    "tool_search": CallForm("tool_search_call", "ts", restore=search_arguments),
}
# Why an answer was cut off, by the reason of its end.
INCOMPLETE = {"length": "max_output_tokens", "context": "max_output_tokens",
              "filter": "content_filter"}


def new_part(kind: str) -> Json:
    """An empty content part of a text or a refusal."""
    return ({"type": "refusal", "refusal": ""} if kind == "refusal" else
            {"type": "output_text", "text": "", "annotations": [], "logprobs": []})


class ResponsesWriter(Writer):
    """Writes the stream of a Responses client, and with its last event the whole answer.

    A segment's `item` is its output item, of text and refusals the content part; `where` is what
    all its events name it by.
    """

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.sequence = 0
        self.output: list[Json] = []
        # open items, with their place in the output
        self.message: tuple[Json, int] | None = None
        self.searches: dict[str, tuple[Json, int]] = {}  # by the id of their block
        self.blocks: list[Json] = []  # opaque ones that await their carrier
        self.base: Json = {}

    def emit(self, type_: str, where: Json, **more: Any) -> None:
        """One event, numbered."""
        more |= where
        more["type"], more["sequence_number"] = type_, self.sequence
        self.sequence += 1
        self.events.append(more)

    def start_answer(self, id: str, model: str, created: int) -> None:
        """created and in_progress, with what the request said."""
        ctx = self.ctx
        self.bare = bare_id(id) or sha(f"{compact(ctx.echo)}{ctx.now}{ctx.seed}")[:24]
        self.base = {
            "id": f"resp_{(id or self.bare).removeprefix('resp_')}", "object": "response",
            "created_at": created, "completed_at": None, "status": "in_progress", "error": None,
            "incomplete_details": None, **(ctx.echo or ECHOED), "model": model, "output": [],
            "usage": None, "store": False, "background": False, "previous_response_id": None}
        for step in ("created", "in_progress"):
            self.emit(f"response.{step}", {"response": self.base})

    # -- items

    def open_item(self, prefix: str, type_: str, hidden: bool = False,
                  **more: Any) -> tuple[Json, int]:
        """A new item of the output, announced if it is not `hidden`; and its place."""
        index = len(self.output)
        item = {"id": short_call_id(f"{prefix}_{self.bare}_{index}"), "type": type_,
                "status": "in_progress", **more}
        self.output.append(item)
        if not hidden:
            self.emit("response.output_item.added", {"output_index": index}, item=dict(item))
        return item, index

    def close_item(self, item: Json, index: int, status: str = "completed") -> None:
        """An item is whole."""
        item["status"] = status
        self.emit("response.output_item.done", {"output_index": index}, item=item)

    def end_message(self, status: str = "completed") -> None:
        """The open message is whole."""
        if self.message:
            self.close_item(*self.message, status)
            self.message = None

    # -- segments

    def start(self, segment: Segment) -> None:
        """Open what a segment is in, and close what it is not in; texts wait for some text."""
        kind = segment.kind
        if kind not in ("text", "refusal"):
            self.end_message()
        if kind != "opaque":
            self.end_opaque()
        if kind == "thinking":
            segment.item, index = self.open_item("rs", "reasoning", summary=[])
            segment.where = {"item_id": segment.item["id"], "output_index": index,
                             "summary_index": 0}
        elif kind in ("call", "custom"):
            self.start_call(segment)

    def start_part(self, segment: Segment) -> None:
        """A content part, in a message that is opened for it if none is."""
        if self.message is None:
            self.message = self.open_item("msg", "message", role="assistant", content=[])
            self.message[0]["content"] = []  # not the list that was announced
        (item, index), segment.item = self.message, new_part(segment.kind)
        segment.where = {"item_id": item["id"], "output_index": index,
                         "content_index": len(item["content"])}
        item["content"].append(segment.item)
        self.emit("response.content_part.added", segment.where, part=new_part(segment.kind))

    def start_call(self, segment: Segment) -> None:
        """A call item; those of built-in tools are held until they are whole."""
        tool = self.tool_of(segment.name)
        form = segment.form = CALL_FORMS.get(tool.kind if tool else segment.kind,
                                             CALL_FORMS["function"])
        more = {"call_id": self.call_id(segment.id)}
        if form.member:
            more |= {"name": tool.name if tool else segment.name, form.member: ""}
            if tool and tool.space:
                more["namespace"] = tool.space
        if form.member == "input" and segment.kind == "call":
            segment.decoder = InputDecoder()
        segment.item, index = self.open_item(form.prefix, form.type, not form.member, **more)
        segment.where = {"item_id": segment.item["id"], "output_index": index}

    def tool_of(self, name: str) -> Tool | None:
        """The declared tool of a name that the model used, whatever the case of its letters."""
        tools = self.ctx.tools
        alike = [tools[name]] if name in tools else [
            tool for wire, tool in tools.items() if wire.lower() == name.lower()]
        return alike[0] if len(alike) == 1 else None

    def call_id(self, id: str) -> str:
        """The provider's id of a call; a new one where it has none, or used it before."""
        if self.ctx.provider == CHAT.word and (not id or id in self.ctx.ids):
            id = "call_" + sha(f"{self.base['id']}{len(self.output)}")[:24]
        self.ctx.ids.add(id)
        return id

    def write(self, segment: Segment, text: str) -> None:
        """A delta of whatever is open."""
        kind = segment.kind
        if kind in ("text", "refusal") and not segment.where:
            self.start_part(segment)
        if kind == "text":
            logprobs, segment.raw = segment.raw or [], None
            segment.item["logprobs"] += logprobs
            self.emit("response.output_text.delta", segment.where, delta=text, logprobs=logprobs)
        elif kind == "refusal":
            self.emit("response.refusal.delta", segment.where, delta=text)
        elif kind == "thinking":
            if not segment.shown:
                segment.shown = True
                self.emit("response.reasoning_summary_part.added", segment.where,
                          part={"type": "summary_text", "text": ""})
            self.emit("response.reasoning_summary_text.delta", segment.where, delta=text)
        elif kind in ("call", "custom") and segment.form.member:
            if segment.decoder:
                text = segment.decoder.feed(text)
            if text:
                self.emit(f"response.{segment.form.type}_{segment.form.member}.delta",
                          segment.where, delta=text)

    def stop(self, segment: Segment) -> None:
        """The events that make a segment whole; a text that never came was never there."""
        kind, text = segment.kind, segment.whole()
        if kind == "opaque":
            self.stop_opaque(segment.raw)
        elif kind == "thinking":
            self.stop_thinking(segment, text)
        elif kind == "call" and not isinstance(loose_json(text), dict):
            self.held = segment  # done if the answer ends well, cut off if not
        elif kind in ("call", "custom"):
            self.stop_call(segment)
        elif segment.where:
            self.stop_part(segment, text)

    def stop_part(self, segment: Segment, text: str) -> None:
        """A content part is whole."""
        part, where = segment.item, segment.where
        part[segment.kind] = text
        for k, found in enumerate(segment.citations):
            annotation = {"type": "url_citation", "url": found.url, "title": found.title,
                          "start_index": found.start or 0,
                          "end_index": len(text) if found.end is None else found.end}
            part["annotations"].append(annotation)
            self.emit("response.output_text.annotation.added", where, annotation_index=k,
                      annotation=annotation)
        if segment.kind == "text":
            self.emit("response.output_text.done", where, text=text, logprobs=part["logprobs"])
        else:
            self.emit("response.refusal.done", where, refusal=text)
        self.emit("response.content_part.done", where, part=part)

    def stop_thinking(self, segment: Segment, text: str) -> None:
        """A reasoning item is whole, with its carrier where something could be sent back."""
        item, where = segment.item, segment.where
        part = {"type": "summary_text", "text": text}
        if segment.shown:
            self.emit("response.reasoning_summary_text.done", where, text=text)
            self.emit("response.reasoning_summary_part.done", where, part=part)
            item["summary"] = [part]
        useless = segment.thought == ("at", "") and not self.ctx.caps.lenient_thinking
        item["encrypted_content"] = None if useless else self.sealed(segment)
        self.close_item(item, where["output_index"])

    def stop_call(self, segment: Segment, status: str = "completed") -> None:
        """A call is whole; one that was cut off gets no done events, for clients run those."""
        item, form, where, whole = segment.item, segment.form, segment.where, segment.whole()
        item["status"] = status
        if not form.member:
            self.restore(segment, whole)
            return
        item[form.member], more = (segment.decoder.close(whole) if segment.decoder
                                   else (whole, ""))
        if status == "completed":
            event = f"response.{form.type}_{form.member}"
            if more:
                self.emit(f"{event}.delta", where, delta=more)
            name = {"name": item["name"]} if form.member == "arguments" else {}
            self.emit(f"{event}.done", where, **{form.member: item[form.member]}, **name)
            self.close_item(item, where["output_index"])

    def restore(self, segment: Segment, whole: str) -> None:
        """The call of a built-in tool; a plain function call where its arguments do not fit."""
        item, index, value = segment.item, segment.where["output_index"], loose_json(whole)
        item |= (segment.form.restore(value) if isinstance(value, dict) else None) or {
            "type": "function_call", "name": segment.name, "arguments": whole,
            "id": short_call_id(f"fc_{self.bare}_{index}")}
        if item["status"] == "completed":
            self.emit("response.output_item.added", {"output_index": index},
                      item={**item, "status": "in_progress"})
            self.close_item(item, index)

    # -- blocks that nobody else knows

    def stop_opaque(self, block: Json) -> None:
        """Keep a block for its carrier; a web search is shown."""
        self.blocks.append(block)
        kind, content = block.get("type"), block.get("content")
        if kind == "server_tool_use" and block.get("name") == "web_search":
            item, index = self.open_item("ws", "web_search_call")
            self.searches[text_of(block.get("id"))] = item, index
            for step in ("in_progress", "searching"):
                self.emit(f"response.web_search_call.{step}",
                          {"item_id": item["id"], "output_index": index})
            query = text_of(mapping(block.get("input")).get("query"))
            item["action"] = {"type": "search", "query": query, "queries": [query], "sources": []}
        elif kind == "web_search_tool_result":
            id = text_of(block.get("tool_use_id"))
            sources = [{"type": "url", "url": entry["url"]} for entry in map(
                mapping, listing(content)) if isinstance(entry.get("url"), str)]
            self.end_search(id, sources, "completed" if isinstance(content, list) else "failed")

    def end_search(self, id: str, sources: list[Json], status: str) -> None:
        """A web search is over."""
        if id in self.searches:
            item, index = self.searches.pop(id)
            item["action"]["sources"] = sources
            if status == "completed":
                self.emit("response.web_search_call.completed",
                          {"item_id": item["id"], "output_index": index})
            self.close_item(item, index, status)

    def end_opaque(self) -> None:
        """The carrier of the blocks that were kept."""
        if self.blocks:
            for id in list(self.searches):
                self.end_search(id, [], "failed")
            blocks, self.blocks = self.blocks, []
            item, index = self.open_item("rs", "reasoning", summary=[], encrypted_content=None)
            item["encrypted_content"] = seal("ab", pack(blocks), "", self.ctx)
            self.close_item(item, index)

    # -- the end

    def finish(self, stop: Stop) -> None:
        """The terminal event, with the whole answer; what a refusal left open is discarded."""
        refused, cut = stop.reason == "refusal", INCOMPLETE.get(stop.reason)
        status = "failed" if refused else "incomplete" if cut else "completed"
        while self.held:
            segment, self.held = self.held, None
            self.stop_call(segment, "incomplete" if cut else "completed")
            self.advance()
        if not refused:
            self.end_opaque()
            self.end_message(status)
        elif self.message:
            self.message[0]["status"] = "incomplete"
        if cut and not self.ctx.stream and self.output and "call_id" in self.output[-1]:
            # in one piece, a call that the limit cut off cannot be told from a whole one
            self.output[-1] = {**self.output[-1], "status": "incomplete"}
        answer = {**self.base, "status": status, "output": self.output,
                  "usage": responses_counts(self.usage)}
        if status == "completed":
            answer["completed_at"] = self.ctx.now
        if cut:
            answer["incomplete_details"] = {"reason": cut}
        if refused:
            about = f" (category {stop.category})" if stop.category else ""
            answer["error"] = {"code": "invalid_prompt", "message":
                               stop.text or f"The model refused to answer{about}."}
        if stop.reason == "pause":
            answer["end_turn"] = False
        if self.usage and self.usage.tier:
            tiers = {"standard": "default", "batch": self.base["service_tier"]}
            answer["service_tier"] = tiers.get(self.usage.tier, self.usage.tier)
        self.emit(f"response.{status}", {"response": answer})
        self.done = True

    def fail(self, error: ProxyError) -> ProxyError:
        """response.failed, with what there is; the transport sends the error event behind it."""
        error = super().fail(error)
        if not self.begun:
            return error
        for segment in (s for s in self.queue if s.where):
            if segment.kind in ("call", "custom"):
                self.stop_call(segment, "incomplete")
            elif segment.kind != "thinking":
                segment.item[segment.kind] = segment.whole()
            elif segment.shown:
                segment.item["summary"] = [{"type": "summary_text", "text": segment.whole()}]
        for item in self.output:
            if item["status"] == "in_progress":
                item["status"] = "incomplete"
        told = native_error(error, RESPONSES)["error"]
        self.emit("response.failed", {"response": {
            **self.base, "status": "failed", "output": self.output,
            "error": {"code": told["code"] or "server_error", "message": told["message"]}}})
        error.events = self.events
        return error


def responses_counts(usage: Usage | None) -> Json | None:
    """Usage as a Responses client counts it."""
    return None if usage is None else {
        "input_tokens": usage.input, "output_tokens": usage.output,
        "total_tokens": usage.total or usage.input + usage.output,
        "input_tokens_details": {"cached_tokens": usage.cached,
                                 "cache_write_tokens": usage.written},
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0}}


# -- writing Chat Completions (translation-chat.md 2.9, 2.10) ----------------

CHAT_ENDS = {"length": "length", "context": "length", "pause": "length", "refusal": "stop",
             "filter": "content_filter"}
CALL_MEMBERS = {"call": ("function", "arguments"), "custom": ("custom", "input")}


class ChatWriter(Writer):
    """Writes the stream of a Chat Completions client."""

    serial = False  # the index of a tool call tells fragments apart

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.own = ctx.provider == MESSAGES.word  # the provider's text may be the refusal
        self.base: Json = {}
        self.annotations: list[Json] = []
        self.entries = self.indexes = 0  # of reasoning_details, of tool_calls
        self.message: str | None = None  # what tells the provider's message items apart
        self.seen_ids: set[str] = set()  # of calls
        self.thought = self.opaque = False  # whether reasoning, or blocks of a server, came
        self.refusal: list[str] = []

    def emit(self, delta: Json, finish: str | None = None, logprobs: Any = None) -> None:
        """One chunk."""
        self.events.append({**self.base, "choices": [
            {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]})

    def start_answer(self, id: str, model: str, created: int) -> None:
        """The only chunk with a role: SDKs join the strings of all."""
        bare = bare_id(id) or sha(f"{self.ctx.model}{created}{self.ctx.seed}")[:24]
        self.base = {"id": f"chatcmpl_{id or bare}" if self.own else f"chatcmpl-{bare}",
                     "object": "chat.completion.chunk", "created": created, "model": model}
        if self.ctx.include_usage and self.ctx.stream:
            self.base["usage"] = None
        self.emit({"role": "assistant", "content": ""})

    def start(self, segment: Segment) -> None:
        """Calls are announced; other segments begin with their text."""
        kind = segment.kind
        segment.at = (self.characters, self.calls)
        if kind == "opaque":
            self.opaque |= segment.raw.get("type") in ("server_tool_use", "mcp_tool_use")
        elif kind in CALL_MEMBERS:
            self.calls += 1
            tool = self.ctx.tools.get(segment.name)
            segment.name = tool.name if tool else segment.name
            if kind == "custom" or not tool or tool.kind != "custom":
                self.announce(segment, kind)  # others come whole, known to be a text

    def announce(self, segment: Segment, kind: str, text: str = "") -> None:
        """The first fragment of a call; SDKs want indexes without gaps."""
        if not segment.id or segment.id in self.seen_ids:
            segment.id = "call_" + sha(f"{self.base['id']}{self.calls}")[:24]
        self.seen_ids.add(segment.id)
        segment.index, self.indexes = self.indexes, self.indexes + 1
        key, member = CALL_MEMBERS[kind]
        function = {"name": segment.name, member: text}
        if not self.ctx.legacy:
            self.emit({"tool_calls": [{"index": segment.index, "id": segment.id, "type": key,
                                       key: function}]})
        elif segment.index == 0:
            self.emit({"function_call": {"name": segment.name, "arguments": text}})

    def write(self, segment: Segment, text: str) -> None:
        """A piece of a segment."""
        kind = segment.kind
        if kind == "text":
            self.write_text(segment, text)
        elif kind == "thinking":
            apart = "\n\n" if self.thought and not segment.shown else ""
            self.emit({"reasoning_content": apart + text})
            self.thought = segment.shown = True
        elif kind == "refusal":
            self.refusal.append(text)
        elif kind in CALL_MEMBERS and segment.index >= 0:
            key, member = CALL_MEMBERS[kind]
            if not self.ctx.legacy:
                self.emit({"tool_calls": [{"index": segment.index, key: {member: text}}]})
            elif segment.index == 0:
                self.emit({"function_call": {"arguments": text}})

    def write_text(self, segment: Segment, text: str) -> None:
        """A piece of content; messages of a Responses provider stand apart."""
        if not segment.shown:
            apart = "" if self.message in (None, segment.name) else "\n\n"
            segment.shown, self.message = True, segment.name
            segment.at = (self.characters + len(apart), self.calls)
            text = apart + text
        self.characters += len(text)
        found, segment.raw = segment.raw, None
        self.emit({"content": text}, None, {"refusal": None, "content": [
            {"bytes": None, "top_logprobs": [], **mapping(e)} for e in found]} if found else None)

    def stop(self, segment: Segment) -> None:
        """A reasoning block leaves its opaque part, a text its sources."""
        if segment.kind == "thinking" and not self.opaque:
            self.leave_detail(segment)
        elif segment.kind == "text":
            self.cite(segment)
        elif segment.kind == "call" and segment.index < 0:
            self.announce(segment, "custom", InputDecoder().close(segment.whole())[0])
        elif segment.kind == "call" and not segment.text:
            self.write(segment, "{}")

    def leave_detail(self, segment: Segment) -> None:
        """One entry of reasoning_details, whole: SDKs join strings of the same index."""
        kind, body = segment.thought
        if not body or (kind == "or" and body.endswith(":")):
            return  # nothing was sealed
        entry: Json = {"type": "reasoning.text", "text": segment.whole(), "signature": body,
                       "format": "anthropic-claude-v1"}
        if kind == "ar":
            entry = {"type": "reasoning.encrypted", "data": body, "format": "anthropic-claude-v1"}
        elif kind == "or":
            entry = {"type": "reasoning.encrypted", "id": body.partition(":")[0],
                     "format": "openai-responses-v1", "data": seal(kind, body, "", self.ctx)}
        entry |= {"index": self.entries, "x_at": f"{segment.at[0]}:{segment.at[1]}"}
        self.entries += 1
        self.emit({"reasoning_details": [entry]})

    def cite(self, segment: Segment) -> None:
        """Sources of a text as spans of the whole content."""
        text, base, at = segment.whole(), segment.at[0], 0
        for found in segment.citations:
            start, end = found.start, found.end
            if start is None or end is None:
                place = text.find(found.quote, at) if found.quote else -1
                start, end = (place, place + len(found.quote)) if place >= 0 else (0, len(text))
                at = end if place >= 0 else at
            self.annotations.append({"type": "url_citation", "url_citation": {
                "start_index": base + start, "end_index": base + end, "title": found.title,
                "url": found.url}})

    def finish(self, stop: Stop) -> None:
        """Refusal, sources, the reason, usage, [DONE]."""
        refused, said = stop.reason == "refusal", self.own and self.characters > 0
        if refused and said and not self.ctx.stream:
            self.emit({"content": None})  # in one piece, the text is the refusal
        elif refused and not said and not self.refusal:
            self.emit({"refusal": stop.text or "The model declined to answer."})
        elif self.refusal:
            self.emit({"refusal": "".join(self.refusal)})
        if self.annotations:
            self.emit({"annotations": self.annotations})
        if self.usage and self.usage.tier and not self.own:
            self.base["service_tier"] = self.usage.tier
        called = "function_call" if self.ctx.legacy else "tool_calls"
        self.emit({}, CHAT_ENDS.get(stop.reason) or (called if self.calls else "stop"))
        if self.ctx.include_usage and self.usage is not None:
            self.events.append({**self.base, "choices": [], "usage": chat_counts(self.usage)})
        self.events.append(DONE)
        self.done = True


def chat_counts(usage: Usage) -> Json:
    """Usage as a Chat client counts it."""
    out: Json = {"prompt_tokens": usage.input, "completion_tokens": usage.output,
                 "total_tokens": usage.input + usage.output,
                 "prompt_tokens_details": {"cached_tokens": usage.cached,
                                           "cache_write_tokens": usage.written}}
    if usage.reasoning is not None:
        out["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return out


# -- writing Anthropic Messages (translation-responses.md 3.2, 3.3) ----------

MESSAGES_ENDS = {"end": "end_turn", "tool": "tool_use", "sequence": "stop_sequence",
                 "length": "max_tokens", "context": "model_context_window_exceeded",
                 "pause": "pause_turn", "refusal": "refusal", "filter": "refusal"}


class MessagesWriter(Writer):
    """Writes the stream of an Anthropic Messages client."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.index = -1
        self.searches = 0
        self.id = ""

    def emit(self, type_: str, **more: Any) -> None:
        """One event."""
        self.events.append({"type": type_, **more})

    def ping(self) -> None:
        """A sign of life, which has its place behind message_start."""
        self.begin(None, None)
        self.emit("ping")

    def start_answer(self, id: str, model: str, created: int) -> None:
        """message_start; the real numbers come at the end. The model is the one that was asked for:
        Claude Code gives thinking back to that one only."""
        self.id = id if self.ctx.provider == RESPONSES.word and id else \
            "msg_" + (bare_id(id) or sha(f"{self.ctx.model}{created}{self.ctx.seed}")[:24])
        self.emit("message_start", message={
            "id": self.id, "type": "message", "role": "assistant", "model": self.ctx.alias,
            "content": [],
            "stop_reason": None, "stop_sequence": None, "stop_details": None,
            "usage": {"input_tokens": self.ctx.estimate, "cache_creation_input_tokens": 0,
                      "cache_read_input_tokens": 0, "output_tokens": 0}})

    def block(self, block: Json) -> int:
        """A content block begins."""
        self.index += 1
        self.emit("content_block_start", index=self.index, content_block=block)
        return self.index

    def delta(self, index: int, kind: str, **more: Any) -> None:
        """A piece of a block."""
        more["type"] = kind
        self.events.append({"type": "content_block_delta", "index": index, "delta": more})

    def start(self, segment: Segment) -> None:
        """Text and calls open at once, thinking with its first text."""
        if segment.kind in ("text", "refusal"):
            segment.index = self.block({"type": "text", "text": ""})
        elif segment.kind in ("call", "custom"):
            self.calls += 1
            tool = self.ctx.tools.get(segment.name)
            segment.index = self.block({"type": "tool_use", "id": self.call_id(segment.id),
                                        "name": tool.name if tool else segment.name, "input": {}})
            if segment.kind == "custom":
                self.delta(segment.index, "input_json_delta", partial_json='{"input":"')

    def call_id(self, id: str) -> str:
        """A provider's call id in Anthropic's alphabet, unused in the conversation."""
        if not SAFE_ID.fullmatch(id) or id in self.ctx.ids:
            id = encode_id(id, f"{self.id}{self.calls}")
        self.ctx.ids.add(id)
        return id

    def write(self, segment: Segment, text: str) -> None:
        """A piece of a segment."""
        kind = segment.kind
        self.characters += len(text)
        if kind in ("text", "refusal"):
            self.delta(segment.index, "text_delta", text=text)
        elif kind == "thinking" and self.ctx.wants_thinking:
            if segment.index < 0:
                segment.index = self.block({"type": "thinking", "thinking": "", "signature": ""})
            self.delta(segment.index, "thinking_delta", thinking=text)
        elif kind == "custom":
            self.delta(segment.index, "input_json_delta", partial_json=compact(text)[1:-1])
        elif kind == "call" and self.ctx.caps.tool_arguments != "buffer":
            self.delta(segment.index, "input_json_delta", partial_json=text)

    def stop(self, segment: Segment) -> None:
        """The end of a block: a signature, sources, or all that was held."""
        kind = segment.kind
        if kind == "thinking" and self.ctx.wants_thinking:
            self.stop_thinking(segment)
        elif kind == "search":
            self.show_search(segment.raw)
        elif kind == "text" and self.ctx.web_search:
            for found in segment.citations:
                self.delta(segment.index, "citations_delta", citation={
                    "type": "web_search_result_location", "url": found.url, "title": found.title,
                    "cited_text": segment.whole()[found.start:found.end], "encrypted_index": ""})
        elif kind == "custom":
            self.delta(segment.index, "input_json_delta", partial_json='"}')
        elif kind == "call" and self.ctx.caps.tool_arguments == "buffer":
            self.delta(segment.index, "input_json_delta",
                       partial_json=compact(parse_arguments(segment.whole())))
        if segment.index >= 0:
            self.emit("content_block_stop", index=segment.index)

    def stop_thinking(self, segment: Segment) -> None:
        """The carrier: as the signature, or as a redacted block where there is no text."""
        body = segment.thought[1]
        if segment.index >= 0:
            self.delta(segment.index, "signature_delta", signature=self.sealed(segment))
        elif body and not body.endswith(":"):
            segment.index = self.block({"type": "redacted_thinking", "data": self.sealed(segment)})

    def show_search(self, item: Json) -> None:
        """A web search as Anthropic shows its own."""
        action = mapping(item.get("action"))
        if action.get("type") not in (None, "search"):
            return
        self.searches += 1
        id = "srvtoolu_px_" + to_base64url(text_of(item.get("id")).encode())
        index = self.block({"type": "server_tool_use", "id": id, "name": "web_search",
                            "input": {}})
        query = {"query": text_of(action.get("query"))}
        self.delta(index, "input_json_delta", partial_json=compact(query))
        self.emit("content_block_stop", index=index)
        content: Any = [{"type": "web_search_result", "url": s["url"], "title": s["url"],
                         "encrypted_content": "", "page_age": None}
                        for s in map(mapping, listing(action.get("sources")))
                        if isinstance(s.get("url"), str)]
        if item.get("status") == "failed":
            content = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
        index = self.block({"type": "web_search_tool_result", "tool_use_id": id,
                            "content": content})
        self.emit("content_block_stop", index=index)

    def finish(self, stop: Stop) -> None:
        """message_delta with the real numbers, and message_stop."""
        reason = "tool" if self.calls and stop.reason in ("end", "refusal") else stop.reason
        reason = "end" if reason == "tool" and not self.calls else reason
        details = {"type": "refusal", "category": stop.category, "explanation": stop.text}
        self.emit("message_delta", usage=self.counts(), delta={
            "stop_reason": MESSAGES_ENDS[reason],
            "stop_sequence": stop.text if reason == "sequence" else None,
            "stop_details": details if reason in ("refusal", "filter") else None})
        self.emit("message_stop")
        self.done = True

    def counts(self) -> Json:
        """Usage as Anthropic counts it: never 0, which Claude Code takes for unknown."""
        usage = self.usage or Usage(self.ctx.estimate, output=-(-self.characters // 4))
        out: Json = {
            "input_tokens": max(1, usage.input - usage.cached - usage.written),
            "cache_creation_input_tokens": usage.written, "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.output, "server_tool_use": None,
            "service_tier": {"default": "standard", "priority": "priority"}.get(usage.tier or "")}
        if usage.reasoning is not None:
            out["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
        if self.searches:
            out["server_tool_use"] = {"web_search_requests": self.searches,
                                      "web_fetch_requests": 0}
        return out



# ============================================================================
#  13  Pairs
# ============================================================================
# One explicit pair for each (inbound, provider) combination of different
# protocols, and the only place that knows about pairs; how an answer in one
# piece goes through the stream of its pair. Pure: payload to payload.

# -- an answer in one piece, as the events of its stream ---------------------

def messages_events(body: Json) -> list[Any]:
    """An Anthropic message as events; an error object is one, too."""
    if body.get("type") == "error" or ("error" in body and "content" not in body):
        return [{"type": "error", "error": body.get("error")}]
    blocks = body.get("content")
    if not isinstance(blocks, list):
        raise unusable("content")
    out: list[Any] = [{"type": "message_start", "message": {**body, "content": []}}]
    for index, block in enumerate(blocks):
        out.append({"type": "content_block_start", "index": index, "content_block": block})
        out.append({"type": "content_block_stop", "index": index})
    return [*out, {"type": "message_delta", "delta": body}, {"type": "message_stop"}]


def chat_events(body: Json) -> list[Any]:
    """A Chat completion as one chunk."""
    if body.get("error") or body.get("object") == "error":
        return [body]
    choice = next((c for c in map(mapping, listing(body.get("choices")))
                   if c.get("index") in (0, None)), {})
    message, reason = mapping(choice.get("message")), text_of(choice.get("finish_reason"))
    if not reason and not any(message.get(key) for key in (
            "content", "tool_calls", "function_call", "refusal", "reasoning_content", "reasoning")):
        raise unusable("choices with a message")
    calls = [{**mapping(call), "index": k} for k, call in enumerate(
        listing(message.get("tool_calls")))]
    choice = {**choice, "index": 0, "delta": {**message, "tool_calls": calls},
              "finish_reason": reason or ("tool_calls" if calls else "stop")}
    return [{**body, "choices": [choice]}, DONE]


def responses_events(body: Json) -> list[Any]:
    """A Response as its first and last event: the last has all items."""
    whole, status = isinstance(body.get("output"), list), body.get("status")
    status = "completed" if status is None else status
    if body.get("error") and not whole:
        return [{"type": "error", "error": body["error"]}]
    if not whole or f"response.{status}" not in ENDS:
        raise unusable("output and a final status")
    return [{"type": "response.created", "response": body},
            {"type": f"response.{status}", "response": body}]


def unusable(wants: str) -> UpstreamError:
    """A provider's answer in one piece that cannot be translated."""
    return UpstreamError(f"the provider's answer has no {wants}", type=UPSTREAM)


# -- a client's events, as an answer in one piece ----------------------------

def collect_responses(events: list[Any]) -> Json:
    """The answer that the terminal event of a Responses stream holds."""
    body: Json = events[-1]["response"]
    return body


def collect_chat(events: list[Any]) -> Json:
    """A Chat completion of its chunks."""
    chunks = [chunk for chunk in events if chunk != DONE]
    message: Json = {"role": "assistant", "content": None, "refusal": None}
    texts: dict[str, list[str]] = {}
    calls: list[Json] = []
    logprobs: list[Any] = []
    reason = None
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        reason = choice["finish_reason"] or reason
        logprobs += mapping(choice["logprobs"]).get("content") or []
        for name, value in choice["delta"].items():
            if value is None and name in texts:  # content is taken back: it is the refusal
                texts["refusal"] = texts.pop(name)
            elif name == "tool_calls":
                for call in value:
                    collect_call(calls, call)
            elif name == "function_call":
                known = message.setdefault(name, {"name": "", "arguments": ""})
                for key, text in value.items():
                    known[key] += text
            elif isinstance(value, list):
                message[name] = message.get(name, []) + value
            elif value and name != "role":
                texts.setdefault(name, []).append(value)
    message |= {name: "".join(parts) for name, parts in texts.items()}
    if calls:
        message["tool_calls"] = calls
    first, last = chunks[0], chunks[-1]
    tier = {"service_tier": last["service_tier"]} if "service_tier" in last else {}
    found = {"content": logprobs, "refusal": None} if logprobs else None
    return {"id": first["id"], "object": "chat.completion", "created": first["created"],
            "model": first["model"], "choices": [{
                "index": 0, "message": message, "logprobs": found, "finish_reason": reason}],
            "usage": last.get("usage"), "system_fingerprint": None, **tier}


def collect_call(calls: list[Json], part: Json) -> None:
    """A fragment of a tool call joins its call."""
    index = part["index"]
    if index == len(calls):
        calls.append({key: part[key] for key in ("id", "type", part["type"])})
        return
    kind = calls[index]["type"]
    for key, text in part[kind].items():
        calls[index][kind][key] += text


def collect_messages(events: list[Any]) -> Json:
    """An Anthropic message of its events."""
    message: Json = {}
    content: list[Json] = []
    texts: dict[tuple[int, str], list[str]] = {}  # by block and member
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = dict(event["message"])
        elif kind == "content_block_start":
            content.append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            index, delta = event["index"], event["delta"]
            if delta["type"] == "citations_delta":
                content[index].setdefault("citations", []).append(delta["citation"])
            else:
                member = DELTA_TEXTS.get(delta["type"], "signature")
                texts.setdefault((index, member), []).append(delta[member])
        elif kind == "message_delta":
            message |= {**event["delta"], "usage": {**message["usage"], **event["usage"]}}
    cut = message["stop_reason"] == "max_tokens"
    for (index, member), parts in texts.items():
        block, text = content[index], "".join(parts)
        if member != "partial_json":
            block[member] += text
        elif cut and block["type"] == "tool_use" and not is_object(text):
            block.clear()  # a call that was cut off must not run
        else:
            block["input"] = parse_arguments(text)
    for block in content:
        if block.get("type") == "text":
            block.setdefault("citations", None)
    return {**message, "content": list(filter(None, content)), "container": None}


EXPLODE: dict[str, Callable[[Json], list[Any]]] = {
    "messages": messages_events, "chat": chat_events, "responses": responses_events}
COLLECT: dict[str, Callable[[list[Any]], Json]] = {
    "messages": collect_messages, "chat": collect_chat, "responses": collect_responses}


def explode(provider: str, body: Any) -> list[Any]:
    """A provider's answer in one piece as the events of its stream."""
    if not isinstance(body, dict):
        raise UpstreamError("the provider's answer is no JSON object", type=UPSTREAM)
    return EXPLODE[provider](body)


def collect(inbound: str, events: list[Any]) -> Json:
    """A whole stream of a client's events as the answer in one piece."""
    return COLLECT[inbound](events)


# -- the pairs ---------------------------------------------------------------

class Pair(NamedTuple):
    """The three functions of a pair, named by the way the data travels."""

    request: Callable[[Json, Context], Json]
    response: Callable[[Any, Context], Json]
    stream: Callable[[Context], Stream]


def rewritten(read: Callable[[Json, Context], Ask], write: Callable[[Ask, Context], Json],
              body: Json, ctx: Context) -> Json:
    """A request through a reader and a writer; RequestError for what the provider cannot do."""
    try:
        ask = read(body, ctx)
        if ctx.thinking:
            ask.effort = suffix_effort(ctx.thinking)
        ctx.alias, ctx.stream, ctx.stops = ask.model, bool(ask.stream), ask.stop
        payload = write(ask, ctx)
        if ctx.inbound == MESSAGES.word:
            ctx.estimate = estimate_tokens(payload)
        return payload
    except (RecursionError, ValueError):  # of dump(), which takes less depth than load()
        raise RequestError("the request body is nested too deeply") from None


def streamed(read: Callable[[Writer, Context], Reader], write: Callable[[Context], Writer],
             ctx: Context) -> Stream:
    """A stream through a reader and a writer, see translated()."""
    out = write(ctx)
    return translated(read(out, ctx), out)


def answered(streams: Callable[[Context], Stream], body: Any, ctx: Context) -> Json:
    """An answer in one piece through the stream of its pair."""
    stream = streams(ctx)
    next(stream)
    out: list[Any] = []
    try:
        for event in [*explode(ctx.provider, body), None]:
            out += stream.send(event)
    except StopIteration as stop:
        return collect(ctx.inbound, out + stop.value)
    raise cut_short("its end")


through = functools.partial
responses_to_messages_request = through(rewritten, read_responses, write_messages)
messages_to_responses_stream = through(streamed, MessagesReader, ResponsesWriter)
messages_to_responses_response = through(answered, messages_to_responses_stream)

responses_to_chat_request = through(rewritten, read_responses, write_chat)
chat_to_responses_stream = through(streamed, ChatReader, ResponsesWriter)
chat_to_responses_response = through(answered, chat_to_responses_stream)

chat_to_messages_request = through(rewritten, read_chat, write_messages)
messages_to_chat_stream = through(streamed, MessagesReader, ChatWriter)
messages_to_chat_response = through(answered, messages_to_chat_stream)

messages_to_responses_request = through(rewritten, read_messages, write_responses)
responses_to_messages_stream = through(streamed, ResponsesReader, MessagesWriter)
responses_to_messages_response = through(answered, responses_to_messages_stream)

messages_to_chat_request = through(rewritten, read_messages, write_chat)
chat_to_messages_stream = through(streamed, ChatReader, MessagesWriter)
chat_to_messages_response = through(answered, chat_to_messages_stream)

chat_to_responses_request = through(rewritten, read_chat, write_responses)
responses_to_chat_stream = through(streamed, ResponsesReader, ChatWriter)
responses_to_chat_response = through(answered, responses_to_chat_stream)

PAIRS: dict[tuple[str, str], Pair] = {
    ("responses", "messages"): Pair(responses_to_messages_request, messages_to_responses_response,
                                    messages_to_responses_stream),
    ("responses", "chat"): Pair(responses_to_chat_request, chat_to_responses_response,
                                chat_to_responses_stream),
    ("chat", "messages"): Pair(chat_to_messages_request, messages_to_chat_response,
                               messages_to_chat_stream),
    ("messages", "responses"): Pair(messages_to_responses_request, responses_to_messages_response,
                                    responses_to_messages_stream),
    ("messages", "chat"): Pair(messages_to_chat_request, chat_to_messages_response,
                               chat_to_messages_stream),
    ("chat", "responses"): Pair(chat_to_responses_request, responses_to_chat_response,
                                responses_to_chat_stream),
}
# Need translation.extended_pairs.
EXTENDED_PAIRS = (("messages", "chat"), ("chat", "responses"))


def pair_for(inbound: Protocol, provider: Protocol, extended: bool = False) -> Pair | None:
    """The pair to translate with, None for the same protocol; SetupError for an extended pair
    unless `extended` pairs are on."""
    if inbound is provider:
        return None
    key = (inbound.word, provider.word)
    if key in EXTENDED_PAIRS and not extended:
        raise SetupError(f"translation {inbound.name} -> {provider.name} is switched off",
                         fix="add `extended_pairs = true` under [translation] in the configuration")
    return PAIRS[key]



# ============================================================================
#  14  Observation
# ============================================================================
# What an exchange tells about itself without its content: hints of a request,
# usage, outcome, the state of tool calls. Looks at payloads that pass by and
# never changes them. Pure, but for the record of one exchange that it fills.

# -- one exchange ------------------------------------------------------------

class TokenCounts:
    """The tokens that a provider has counted."""

    __slots__ = ("cache_creation", "cached", "input", "output", "reasoning", "total")

    def __init__(self) -> None:
        self.input = self.output = self.total = self.cached = self.cache_creation = \
            self.reasoning = 0


class Observed(TokenCounts):
    """What was seen of a provider's answer, whole or streamed."""

    __slots__ = ("calls", "effort", "error_code", "error_message", "error_param", "failed",
                 "finish", "incomplete_reason", "items", "model", "pending", "response_id", "seen",
                 "sequence", "server_tools", "sources", "status", "terminal", "tier")

    def __init__(self) -> None:
        super().__init__()
        self.response_id: str | None = None
        self.model: str | None = None
        self.tier: str | None = None
        self.status: str | None = None
        self.effort: str | None = None
        self.incomplete_reason: str | None = None
        self.error_code: str | None = None
        self.error_message: str | None = None
        self.error_param: Any = None
        self.sequence: int | None = None
        self.items: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.server_tools: dict[str, int] = {}  # as Anthropic's usage counts them
        self.finish: dict[str, int] = {}
        self.seen: set[Any] = set()  # items and calls that were counted
        # tool calls whose arguments are coming, with the time of the last part
        self.pending: dict[Any, float] = {}
        self.terminal = self.failed = False

    def count(self, table: dict[str, int], name: Any, key: Any) -> None:
        """Count `name` once for each `key`; names come from the provider, so they are bounded."""
        name = word(name)
        if name and key not in self.seen and len(self.seen) < OBSERVED_THINGS:
            self.seen.add(key)
            table[name] = table.get(name, 0) + 1

    def call(self, name: Any, source: str, key: Any) -> None:
        """Count one tool call by name and by source."""
        if isinstance(name, str) and name:
            self.count(self.sources, source, ("source", key))
            self.count(self.calls, name, ("call", key))

    def argument(self, key: Any, now: float) -> None:
        """Arguments of the tool call `key` are coming."""
        if key is not None and (key in self.pending or len(self.pending) < OBSERVED_THINGS):
            self.pending[key] = now

    def finished(self) -> None:
        """The terminal event of a stream has come."""
        self.terminal = True
        self.pending.clear()

    def restart_items(self) -> None:
        """A last word on the output follows: what was counted on the way does not
        count any more."""
        for table in (self.items, self.calls, self.sources):
            table.clear()
        self.seen = {key for key in self.seen if key[0] == "finish"}

    def fail(self, error: Any) -> None:
        """Take the words of an error that came inside a stream or an answer."""
        self.failed = True
        if isinstance(error, str):
            error = {"message": error}
        if isinstance(error, dict):
            kind, message, param = word(error.get("type")), error.get("message"), error.get("param")
            self.error_code = word(error.get("code")) or (kind if kind != "error" else None)
            self.error_message = message[:LOG_TEXT_CHARS] if isinstance(message, str) else None
            self.error_param = None if param is None else brief_param(param)


class Exchange:
    """Everything about one request that is told afterwards, in the log and in headers."""

    __slots__ = ("attempts", "body", "captured", "choices", "chunks", "client", "content_type",
                 "credential", "down", "dropped",
                 "dropped_paths", "encoding", "error", "error_type", "estimate", "head_at", "id",
                 "inbound", "inbound_bytes", "last_byte_at", "method", "model", "observed", "path",
                 "phase", "provider", "provider_bytes", "provider_protocol", "rates", "route",
                 "sse", "started", "status", "tokens", "upstream_model", "usage")

    def __init__(self, id: int, method: str, path: str, started: float) -> None:
        self.id, self.method, self.path, self.started = id, method, path, started
        self.phase = PHASES[0]
        self.inbound: Protocol | None = None
        self.provider_protocol: Protocol | None = None
        self.provider = self.model = self.upstream_model = ""
        self.client = ""  # the name of its key
        self.route: str | None = None
        self.body: Json | None = None  # of the client's request, for hints
        self.choices = 1  # answers that a Chat request asks for
        self.inbound_bytes = self.provider_bytes = 0
        self.status = self.down = self.chunks = 0
        self.head_at = self.last_byte_at = 0.0
        self.content_type: bytes | None = None
        self.encoding: str | None = None  # the Transfer-Encoding of the answer
        self.sse = False
        self.dropped = 0  # how many parts a translation has left out, as far as was told
        self.dropped_paths: Sequence[str] = ()  # the first of them
        self.estimate = 0  # of the tokens of a request that was translated
        self.rates: Sequence[Field] = ()
        self.observed: Observed | None = None
        self.usage: Any = None  # of an answer that was not looked at yet
        self.tokens: TokenCounts | None = None  # of one of which nothing else is told
        self.error: str | None = None
        self.error_type: str | None = None
        self.credential = ""  # the name of the key that was used, where there are several
        self.attempts: list[Any] = []  # of a request that could go several ways (Attempt)
        self.captured = False

    def shrink(self) -> None:
        """Let go of what only a request on its way needs, for a record of it may stay."""
        self.body, self.rates, seen = None, (), self.observed
        if seen:
            for table in (seen.seen, seen.items, seen.calls, seen.sources, seen.finish):
                table.clear()


def translation_name(exchange: Exchange) -> str:
    """`a->b` where protocols differ, else nothing."""
    a, b = exchange.inbound, exchange.provider_protocol
    return f"{a.name}->{b.name}" if a and b and a is not b else ""


def milliseconds(secs: float) -> int:
    """A duration as whole milliseconds."""
    return round(secs * 1000)


class RequestIds:
    """Unique ids that sort by time: microseconds since 1970, counted on where two fall together."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        """The next id."""
        self.last = max(self.last + 1, time.time_ns() // 1000)
        return self.last


# -- answers -----------------------------------------------------------------

def observe_openai_usage(seen: TokenCounts, usage: Any) -> None:
    """Token counts of both OpenAI protocols; `input` is without what the cache gave."""
    if not isinstance(usage, dict):
        return
    sent = usage.get("input_tokens", usage.get("prompt_tokens"))
    details = mapping(usage.get("input_tokens_details") or usage.get("prompt_tokens_details"))
    more = mapping(usage.get("output_tokens_details") or usage.get("completion_tokens_details"))
    seen.cached = number(details.get("cached_tokens"))
    seen.input = max(number(sent) - seen.cached, 0)
    seen.output = number(usage.get("output_tokens", usage.get("completion_tokens")))
    seen.reasoning = number(more.get("reasoning_tokens"))
    seen.total = number(usage.get("total_tokens"))


def observe_messages_usage(seen: TokenCounts, usage: Any) -> None:
    """Token counts of Anthropic Messages; in streams later ones replace earlier ones."""
    for attribute, key in (("input", "input_tokens"), ("output", "output_tokens"),
                           ("cached", "cache_read_input_tokens"),
                           ("cache_creation", "cache_creation_input_tokens")):
        value = mapping(usage).get(key)
        if value is not None:
            setattr(seen, attribute, number(value))
    if not isinstance(seen, Observed):
        return
    for key, count in list(mapping(mapping(usage).get("server_tool_use")).items())[:32]:
        if number(count) and len(seen.server_tools) < 64:
            seen.server_tools[key.removesuffix("_requests")[:OBSERVED_CHARS]] = number(count)


def observe_common(seen: Observed, body: Json) -> None:
    """The members that all protocols name alike."""
    for attribute, key in (("response_id", "id"), ("model", "model"), ("tier", "service_tier")):
        value = word(body.get(key))
        if value:
            setattr(seen, attribute, value)


def observe_responses_item(seen: Observed, item: Any, index: Any) -> None:
    """One output item, counted by its id or, where it has none, by kind and place."""
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        return
    kind = item["type"]
    key = key_of(item.get("id")) or (kind, key_of(index))
    seen.count(seen.items, kind, ("item", key))
    if kind in ("function_call", "custom_tool_call"):
        seen.call(item.get("name"), "function", key)
    elif kind == "mcp_call" and item.get("name"):
        seen.call(f"{item.get('server_label') or 'mcp'}/{item['name']}", "mcp", key)


def observe_responses_object(seen: Observed, body: Json) -> None:
    """A Response object, from a whole answer or from an event that carries one."""
    observe_common(seen, body)
    seen.status = word(body.get("status")) or seen.status
    seen.effort = word(mapping(body.get("reasoning")).get("effort")) or seen.effort
    seen.incomplete_reason = (word(mapping(body.get("incomplete_details")).get("reason"))
                              or seen.incomplete_reason)
    observe_openai_usage(seen, body.get("usage"))
    if listing(body.get("output")):
        seen.restart_items()
    for index, item in enumerate(listing(body.get("output"))):
        observe_responses_item(seen, item, index)
    if body.get("error"):
        seen.fail(body["error"])


RESPONSES_TERMINAL = frozenset(("response.completed", "response.incomplete", "response.failed",
                                "response.cancelled", "response.error", "error"))
ARGUMENT_DELTAS = frozenset((
    "response.function_call_arguments.delta", "response.custom_tool_call_input.delta",
    "response.mcp_call_arguments.delta"))


def observe_responses_event(seen: Observed, kind: str, event: Json, now: float) -> None:
    """One event of a Responses stream."""
    id, place = key_of(event.get("item_id")), key_of(event.get("output_index"))
    if kind in ARGUMENT_DELTAS:
        if id is not None or place is not None:  # some compatible providers leave out item_id
            seen.argument((id, place), now)
    elif kind.endswith(("_arguments.done", "_input.done")):
        end_responses_call(seen, id, place)
    elif kind in ("response.output_item.added", "response.output_item.done"):
        item = mapping(event.get("item"))
        observe_responses_item(seen, item, event.get("output_index"))
        if kind.endswith("done"):
            end_responses_call(seen, key_of(item.get("id")), place)
    elif isinstance(event.get("response"), dict):
        observe_responses_object(seen, event["response"])
    if kind in RESPONSES_TERMINAL:
        seen.finished()
        if kind in ("error", "response.error"):
            seen.fail(event.get("error") if isinstance(event.get("error"), dict) else event)


def end_responses_call(seen: Observed, id: Any, place: Any) -> None:
    """The arguments of an item are complete: that of `id`,
    or that at `place` where either side has no id."""
    seen.pending = {k: at for k, at in seen.pending.items()
                    if (k[0] != id if id is not None and k[0] is not None else k[1] != place)}


def observe_chat_object(seen: Observed, body: Json) -> None:
    """A whole Chat Completion."""
    observe_common(seen, body)
    observe_openai_usage(seen, body.get("usage"))
    for place, choice_ in enumerate(listing(body.get("choices"))):
        choice_ = mapping(choice_)
        seen.count(seen.finish, choice_.get("finish_reason"), ("finish", place))
        message = mapping(choice_.get("message"))
        if message:
            seen.count(seen.items, "message", ("item", place))
        for index, call in enumerate(listing(message.get("tool_calls"))):
            observe_chat_call(seen, mapping(call), (place, index))


def observe_chat_call(seen: Observed, call: Json, key: Any) -> None:
    """One tool call of a Chat answer, or the first part of it."""
    for kind, source in (("function", "tool"), ("custom", "custom_tool")):
        seen.call(mapping(call.get(kind)).get("name"), source, key)


def observe_chat_event(seen: Observed, kind: str, event: Json, now: float) -> None:
    """One chunk of a Chat stream."""
    observe_common(seen, event)
    observe_openai_usage(seen, event.get("usage"))
    for choice_ in listing(event.get("choices")):
        choice_ = mapping(choice_)
        place, delta = key_of(choice_.get("index"), 0), mapping(choice_.get("delta"))
        seen.count(seen.items, "message", ("item", place))
        for position, call in enumerate(listing(delta.get("tool_calls"))):
            call = mapping(call)
            key = (place, key_of(call.get("index"), position))
            observe_chat_call(seen, call, key)
            # Chat has no end of a call; the next one's first part is the end of this one.
            seen.pending = {k: at for k, at in seen.pending.items() if k[0] != place or k == key}
            if any(mapping(call.get(k)).get(v)
                   for k, v in (("function", "arguments"), ("custom", "input"))):
                seen.argument(key, now)
        if choice_.get("finish_reason"):
            seen.count(seen.finish, choice_["finish_reason"], ("finish", place))
            seen.pending = {k: at for k, at in seen.pending.items() if k[0] != place}
    if event.get("error"):
        seen.fail(event["error"])
        seen.finished()


def observe_messages_object(seen: Observed, body: Json) -> None:
    """A whole Anthropic message, or the beginning of a streamed one."""
    observe_common(seen, body)
    observe_messages_usage(seen, body.get("usage"))
    seen.tier = word(mapping(body.get("usage")).get("service_tier")) or seen.tier
    seen.count(seen.finish, body.get("stop_reason"), ("finish", 0))
    for index, block in enumerate(listing(body.get("content"))):
        observe_messages_block(seen, mapping(block), index)
    if body.get("type") == "error":
        seen.fail(body.get("error"))


def observe_messages_block(seen: Observed, block: Json, index: Any) -> None:
    """One content block."""
    kind = block.get("type")
    seen.count(seen.items, kind, ("item", index))
    if kind == "tool_use":
        seen.call(block.get("name"), "tool", index)
    elif kind in ("server_tool_use", "mcp_tool_use"):
        seen.call(block.get("name"), "server_tool", index)


def observe_messages_event(seen: Observed, kind: str, event: Json, now: float) -> None:
    """One event of an Anthropic stream."""
    index = key_of(event.get("index"))
    if kind == "message_start":
        observe_messages_object(seen, mapping(event.get("message")))
    elif kind == "content_block_start":
        observe_messages_block(seen, mapping(event.get("content_block")), index)
    elif kind == "content_block_delta":
        if mapping(event.get("delta")).get("partial_json"):
            seen.argument(index, now)
    elif kind == "content_block_stop":
        seen.pending.pop(index, None)
    elif kind == "message_delta":
        observe_messages_usage(seen, event.get("usage"))
        seen.count(seen.finish, mapping(event.get("delta")).get("stop_reason"), ("finish", 0))
    elif kind in ("message_stop", "error"):
        seen.finished()
        if kind == "error":
            seen.fail(event.get("error"))


class Watcher(NamedTuple):
    """How answers of one protocol are looked at: a frame with none of `markers` is not even parsed.

    `loose` markers are for a stream whose JSON is not written as vendors write it.
    """

    event: Callable[[Observed, str, Json, float], None]
    whole: Callable[[Observed, Json], None]
    markers: tuple[bytes, ...]
    loose: tuple[bytes, ...] = ()


CHAT_MARKERS = (b"[DONE]", b"tool_calls", b"prompt_tokens", b'"error"')
WATCHERS = {
    "responses": Watcher(observe_responses_event, observe_responses_object, (
        b"response.created", b"response.completed", b"response.incomplete", b"response.failed",
        b"response.cancelled", b"error", b"_arguments.", b"_input.", b"output_item.")),
    # Each Chat chunk has "finish_reason":null; only another value is worth a look.
    "chat": Watcher(observe_chat_event, observe_chat_object,
                    (*CHAT_MARKERS, b'"finish_reason":"', b'"finish_reason": "'),
                    (*CHAT_MARKERS, b"finish_reason")),
    "messages": Watcher(observe_messages_event, observe_messages_object, (
        b"message_start", b"message_delta", b"message_stop", b"content_block_start",
        b"content_block_stop", b"partial_json", b"error")),
}
# How the first chunk of a Chat stream shows that its JSON is written as vendors write it.
COMMON_SPELLINGS = (b'"finish_reason":null', b'"finish_reason": null')


# NaN, which local servers write into log probabilities, must not reach a client.
def finite_or_none(text: str) -> float | None:
    """A number that JSON can say again."""
    value = float(text)
    return value if math.isfinite(value) else None


STREAM_DECODER = json.JSONDecoder(parse_constant=lambda name: None, parse_float=finite_or_none)


def not_translatable(name: str, fault: str) -> UpstreamError:
    """The failure of a stream at an event that no pair can be given."""
    return UpstreamError(f"stream translation error: the provider sent an event `{brief(name)}`"
                         f" that {fault}", type=STREAM_TRANSLATION)


class StreamObserver:
    """Watches a provider's stream beside its way to the client; `seen` is what it knows so far.

    `choices` is how many answers a Chat request asked for.
    """

    __slots__ = ("choices", "markers", "opened", "seen", "splitter", "watcher")

    def __init__(self, protocol: Protocol, limit: int, choices: int = 1) -> None:
        self.watcher, self.choices = WATCHERS[protocol.word], choices
        self.markers = self.watcher.loose or self.watcher.markers
        self.splitter = EventSplitter(limit)
        self.seen = Observed()
        self.opened = False  # whether an event was parsed: the first tells the id and the model

    def feed(self, data: bytes, now: float) -> bytes:
        """Look at what became whole with `data`, and return it: a block of whole events, or b""."""
        block = self.splitter.feed(data)
        whole_from = self.splitter.whole_from
        if whole_from < len(block):
            self.look(block[whole_from:] if whole_from else block, now)
        return block

    def look(self, block: bytes, now: float) -> None:
        """Parse the events of a block that have something to tell:
        the first, and those with a marker."""
        at = 0
        while not self.opened and at < len(block):
            blank = BLANK_LINE.search(block, at)
            end = blank.end() if blank else len(block)
            self.look_at(block[at:end], now)
            if any(spelling in block[at:end] for spelling in COMMON_SPELLINGS):
                self.markers = self.watcher.markers
            at = end
        if at:
            block = block[at:]
        for start, end in marked_spans(block, self.markers):
            self.look_at(block[start:end], now)

    def look_at(self, frame: bytes, now: float) -> None:
        """Take note of one event."""
        event = parse_event(frame)
        if event is None:
            return
        self.opened = True
        if event.data == "[DONE]" and self.watcher.event is observe_chat_event:
            self.seen.finished()
            return
        try:
            payload = json.loads(event.data)
        except (ValueError, RecursionError):
            return
        if isinstance(payload, dict):
            self.note(event, payload, now)

    def note(self, event: Event, payload: Json, now: float) -> None:
        """Take note of an event that is parsed already."""
        kind = payload.get("type")
        kind = kind if isinstance(kind, str) else event.name
        self.watcher.event(self.seen, kind, payload, now)
        # it is also what its name says it is (contract 7.1)
        if event.name not in ("message", kind):
            self.watcher.event(self.seen, event.name, payload, now)
        if type(payload.get("sequence_number")) is int:
            self.seen.sequence = payload["sequence_number"]

    def payloads(self, data: bytes, now: float) -> Iterator[Any]:
        """What became whole with `data`, parsed for a translation and looked at on the way: objects
        with their `type`, and the DONE of a Chat stream. UpstreamError for what is neither."""
        block = self.splitter.feed(data)
        if self.splitter.oversize:
            raise UpstreamError("the provider sent an event larger than server.max_sse_event_bytes",
                                type=STREAM_TRANSLATION)
        chat = self.watcher.event is observe_chat_event
        for frame in split_events(block):
            event = parse_event(frame)
            if event is None or event.data.isspace():
                continue
            name, text = event
            if text == DONE:
                if chat:
                    self.seen.finished()
                    yield DONE
                continue
            try:
                try:
                    payload, end = STREAM_DECODER.raw_decode(text)
                except ValueError:
                    end = -1
                if end != len(text):  # blanks around it, or a fault: decode() knows which
                    payload = STREAM_DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                raise not_translatable(name, f"is not JSON: {error}") from None
            if not isinstance(payload, dict):
                raise not_translatable(name, "is not a JSON object")
            if name != "message" and "type" not in payload:
                payload["type"] = name
            if not self.opened:
                self.opened = True
                if any(spelling in frame for spelling in COMMON_SPELLINGS):
                    self.markers = self.watcher.markers
                self.note(event, payload, now)
            else:
                for marker in self.markers:
                    if marker in frame:
                        self.note(event, payload, now)
                        break
            yield payload

    def stall_at(self, timeout: float) -> float:
        """When the tool call that has been silent longest has been so for `timeout` seconds."""
        return min(self.seen.pending.values()) + timeout

    @property
    def complete(self) -> bool:
        """Whether the answer was whole: its terminal event,
        or (Chat) the reason each choice finished."""
        if self.seen.terminal or self.watcher.event is not observe_chat_event:
            return self.seen.terminal
        return len([key for key in self.seen.seen if key[0] == "finish"]) >= self.choices


def observe_body(protocol: Protocol, body: Any) -> Observed:
    """What a whole answer tells."""
    seen = Observed()
    if isinstance(body, dict):
        WATCHERS[protocol.word].whole(seen, body)
    return seen


# -- hints of a request (contract 9.4) ---------------------------------------
# Only presence and short values of known members, never content.

def brief(value: Any, pattern: str = r"[a-z0-9][a-z0-9_.:/-]{0,31}") -> str:
    """A value that may stand in a log line, such as a word of the protocol;
    any other is only a question mark."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return (f"{value:g}" if isinstance(value, float)
                else str(value) if abs(value) < 1 << 53 else "?")
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else "?"


def brief_name(value: Any) -> str:
    """The name of a tool, which clients choose by the vendors' rules."""
    return brief(value, r"[A-Za-z0-9_.:/-]{1,64}")


def brief_param(value: Any) -> str:
    """The path in a request that an error is about."""
    return brief(value, r"[A-Za-z0-9_.:/\[\]-]{1,64}")


class Hint(NamedTuple):
    """One token: shown when the member at `path` is there (`show` present),
    is true, or with its value."""

    token: str
    path: str
    show: str = "present"  # present, true, value
    unless: tuple[Any, ...] = ()


RESPONSES_HINTS = (
    Hint("bg", "background", "true"), Hint("conv", "conversation"),
    Hint("ptc", "parallel_tool_calls", "true"), Hint("store", "store", "true"),
    Hint("mtc", "max_tool_calls", "value"), Hint("pck", "prompt_cache_key"),
    Hint("prompt", "prompt"), Hint("pcr", "prompt_cache_retention", "value"),
    Hint("instr", "instructions"), Hint("meta", "metadata"), Hint("sid", "safety_identifier"),
    Hint("temp", "temperature", "value"), Hint("top_p", "top_p", "value"),
    Hint("tlp", "top_logprobs", "value"), Hint("tr", "truncation", "value"),
    Hint("so:no-obf", "stream_options/include_obfuscation", "false"),
    Hint("tier", "service_tier", "value", ("auto", "default")),
    Hint("rs", "reasoning/summary", "value", ("auto",)),
    Hint("prev", "previous_response_id", "tail"), Hint("tc", "tool_choice", "choice"),
    Hint("", "include", "include"), Hint("tv", "text/verbosity", "value"),
    Hint("tf", "text/format/type", "value", ("text",)),
)
CHAT_HINTS = (
    Hint("ptc", "parallel_tool_calls", "true"), Hint("store", "store", "true"),
    Hint("pck", "prompt_cache_key"), Hint("meta", "metadata"), Hint("sid", "safety_identifier"),
    Hint("temp", "temperature", "value"), Hint("top_p", "top_p", "value"),
    Hint("tlp", "top_logprobs", "value"), Hint("logprobs", "logprobs", "true"),
    Hint("n", "n", "value", (1,)), Hint("so:usage", "stream_options/include_usage", "true"),
    Hint("so:no-obf", "stream_options/include_obfuscation", "false"),
    Hint("tier", "service_tier", "value", ("auto", "default")), Hint("v", "verbosity", "value"),
    Hint("tc", "tool_choice", "choice"), Hint("rf", "response_format/type", "value"),
)
MESSAGES_HINTS = (
    Hint("container", "container"), Hint("meta", "metadata"), Hint("tier", "service_tier", "value"),
    Hint("output_config", "output_config"), Hint("system", "system"),
    Hint("temp", "temperature", "value"), Hint("top_k", "top_k", "value"),
    Hint("top_p", "top_p", "value"), Hint("stop", "stop_sequences"),
    Hint("tc", "tool_choice", "choice"), Hint("think", "thinking/type", "thinking"),
)
HINTS = {"responses": RESPONSES_HINTS, "chat": CHAT_HINTS, "messages": MESSAGES_HINTS}

# Category of a tool by its type; the order is the order of the token.
TOOL_CATEGORIES: dict[str, tuple[tuple[str, str], ...]] = {
    "responses": (("function", "f"), ("mcp", "mcp"), ("custom", "c"), ("web_search", "web"),
                  ("file_search", "fs"), ("computer", "pc"), ("code_interpreter", "code"),
                  ("image_generation", "img"), ("local_shell", "sh"), ("shell", "sh"),
                  ("apply_patch", "patch"), ("namespace", "ns"), ("tool_search", "tool_search")),
    "chat": (("function", "f"), ("custom", "c")),
    "messages": (("custom", "c"), ("bash", "bash"), ("code_execution", "code"), ("memory", "mem"),
                 ("text_editor", "edit"), ("web_fetch", "web_fetch"), ("web_search", "web"),
                 ("tool_search", "tool_search")),
}
TOOL_ALIASES = {
    "copy_path": "cp", "create_directory": "mkdir", "delete_path": "rm", "diagnostics": "diag",
    "edit_file": "e", "fetch": "fetch", "find_path": "fd", "grep": "rg", "list_directory": "ls",
    "move_path": "mv", "now": "t", "open": "o", "read_file": "r",
    "restore_file_from_disk": "restore", "save_file": "save", "skill": "sk", "spawn_agent": "spawn",
    "terminal": "sh", "write_file": "w",
}


def tool_hint(protocol: Protocol, tools: Any) -> str | None:
    """`tools[category:count(names)]`, categories in their fixed order."""
    found: dict[str, list[Json]] = {}
    for tool in listing(tools):
        tool = mapping(tool)
        kind = word(tool.get("type")) or ("function" if protocol is not MESSAGES else "custom")
        category = next((c for t, c in TOOL_CATEGORIES[protocol.word] if kind.startswith(t)),
                        "other")
        found.setdefault(category, []).append(tool)
    order = [*dict.fromkeys(c for _, c in TOOL_CATEGORIES[protocol.word]), "other"]
    parts = []
    for category in (c for c in order if c in found):
        names = sorted({name for tool in found[category] if (name := tool_name(tool, category))})
        count = len(found[category])
        if names:
            parts.append(f"{category}:{count}({','.join(names)})")
        else:
            parts.append(category if count == 1 else f"{category}:{count}")
    return f"tools[{';'.join(parts)}]" if parts else None


def tool_name(tool: Json, category: str) -> str | None:
    """A tool's name as hints show it."""
    if category == "mcp":
        label, allowed = brief_name(tool.get("server_label") or "mcp"), tool.get("allowed_tools")
        names = listing(mapping(allowed).get("tool_names", allowed))
        if isinstance(mapping(allowed).get("read_only"), bool) and not names:
            return f"{label}[{'ro' if mapping(allowed)['read_only'] else 'rw'}]"
        return ",".join(sorted({f"{label}/{brief_name(name)}" for name in names})) or label
    name = (tool.get("name") or mapping(tool.get("function")).get("name")
            or mapping(tool.get("custom")).get("name"))
    return TOOL_ALIASES.get(name, brief_name(name)) if isinstance(name, str) else None


def choice_hint(value: Any) -> str:
    """A tool_choice in a word: its mode, or kind and name of the tool it forces."""
    if not isinstance(value, dict):
        return brief(value)
    kind = word(value.get("type")) or "?"
    inner = mapping(value.get(kind))
    if kind == "allowed_tools":
        return f"allowed_tools:{len(listing(value.get('tools') or inner.get('tools')))}"
    name = value.get("name") or inner.get("name")
    return f"{brief(kind)}:{brief_name(name)}" if name else brief(kind)


def render_hint(hint: Hint, value: Any) -> str | None:
    """The token for a member's value, None where it has nothing to tell."""
    if value is ABSENT or value is None or value in hint.unless or value in ("", [], {}):
        return None
    match hint.show:
        case "present":
            return hint.token
        case "true" | "false":
            return hint.token if value is (hint.show == "true") else None
        case "value":
            return f"{hint.token}:{brief(value)}"
        case "tail":
            return f"{hint.token}=...{brief_name(value[-8:] if isinstance(value, str) else None)}"
        case "choice":
            return f"{hint.token}:{choice_hint(value)}"
        case "thinking":
            return f"{hint.token}:{brief('legacy_enabled' if value == 'enabled' else value)}"
    kinds = ["rsn.enc" if v == "reasoning.encrypted_content" else brief(v) for v in listing(value)]
    return f"include[{','.join(kinds)}]" if kinds else None


def request_hints(protocol: Protocol, body: Json) -> list[str]:
    """The hint tokens of a provider request, in the order of the contract."""
    tokens = [render_hint(hint, first_of(body, "/" + hint.path)) for hint in HINTS[protocol.word]]
    return [token for token in (*tokens, tool_hint(protocol, body.get("tools"))) if token]


def request_effort(protocol: Protocol, body: Json) -> str | None:
    """The reasoning effort that a provider request asks for."""
    if protocol is MESSAGES:
        effort = mapping(body.get("output_config")).get("effort")
        thinking = mapping(body.get("thinking")).get("type")
        effort = effort or ("legacy_enabled" if thinking == "enabled" else thinking)
    else:
        effort = mapping(body.get("reasoning")).get("effort") or body.get("reasoning_effort")
    return brief(effort) if effort else None


def request_max_tokens(body: Json) -> int | None:
    """The output limit that a provider request sets."""
    return next((body[key] for key in ("max_output_tokens", "max_completion_tokens", "max_tokens")
                 if type(body.get(key)) is int), None)



# ============================================================================
#  15  Metrics
# ============================================================================
# Counters and histograms of what was served, and a short memory of the latest
# requests; bounded whatever clients send. Pure: takes exchanges that have ended.

TTFB_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)
DURATION_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MODEL_SERIES = 200  # that are counted apart; clients choose the names of models
OTHER_MODELS = "_other"  # the model of all beyond these
LABEL_CHARS = 100
RECENT_REQUESTS = 200
COUNTED_TOGETHER = 64
HISTORY_MINUTES = 60
MEDIAN_SAMPLES = 200  # the newest times, of which a median is told
# as Observed has them; all but the last are in records
TOKEN_KINDS = ("input", "output", "cached", "reasoning", "cache_creation")
NO_ERRORS = ("end", "closed")  # a client that goes away is no error

# -- one request -------------------------------------------------------------

def request_record(exchange: Exchange, outcome: str, now_wall: float, clock: float) -> Json:
    """What is told of a request by the control listener and beside its captures. `now_wall` and
    `clock` are the same moment: the end, or now where the outcome is "open"."""
    inbound, provider = exchange.inbound, exchange.provider_protocol
    seen = exchange.observed or exchange.tokens
    return {
        "id": str(exchange.id), "at": wall_text(now_wall - (clock - exchange.started)),
        "method": exchange.method, "path": exchange.path[:OBSERVED_CHARS],
        "protocol": inbound.name if inbound else None,
        "provider_protocol": provider.name if provider else None,
        "translation": translation_name(exchange), "provider": exchange.provider,
        "route": exchange.route, "model": exchange.model[:OBSERVED_CHARS],
        "upstream_model": exchange.upstream_model[:OBSERVED_CHARS],
        "status": exchange.status, "outcome": outcome,
        "error": exchange.error, "error_type": exchange.error_type, "stream": exchange.sse,
        "ttfb_ms": milliseconds(exchange.head_at - exchange.started) if exchange.head_at else None,
        "duration_ms": milliseconds(clock - exchange.started),
        "bytes_in": exchange.inbound_bytes, "bytes_out": exchange.down,
        **{f"{kind}_tokens": getattr(seen, kind) if seen else 0 for kind in TOKEN_KINDS[:-1]},
        "dropped": list(exchange.dropped_paths), "captured": exchange.captured,
        "credential": exchange.credential,
        "attempts": [attempt._asdict() for attempt in exchange.attempts],
    }


def wall(exchange: Exchange, clock: float) -> float:
    """The wall clock's time at a moment of `clock`: the id of an exchange is when it came."""
    return exchange.id / 1e6 + clock - exchange.started


def wall_text(at: float) -> str:
    """A moment in UTC: 2026-11-21T08:40:01.123Z"""
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def health_told(exchange: Exchange, outcome: str) -> str | None:
    """What the end of a request tells of its provider's health; None where that is nothing."""
    status = exchange.status
    if exchange.phase == PHASES[0] or outcome == "closed":
        return None
    if outcome == "end":
        return "ok" if exchange.head_at else None  # a count may be an estimate of ours
    if outcome == "hdr-error" and status < 500:
        return None if status == 429 else "failing" if status in (401, 402, 403) else "ok"
    if outcome == "request-failed" and status not in (502, 504):
        return None  # a bug or the end of this proxy
    return "failing"


# What a try that failed tells of its provider's health, where it is not `failing`.
HEALTH_AFTER = {"quota": "", "capacity": "", "dropped": "", "request": "ok", "unsupported": "ok",
                "missing": "ok"}


def other_tries(exchange: Exchange) -> list[Any]:
    """The tries of a request but for the one that it is told to have ended with."""
    tries = exchange.attempts
    told = max((i for i, tried in enumerate(tries) if tried.provider == exchange.provider
                and exchange.credential in ("", tried.credential)), default=0)
    return tries[:told] + tries[told + 1:]


# -- counting ----------------------------------------------------------------

class Histogram:
    """How many values were at most each of some bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


LABELS = ("provider", "model", "protocol", "provider_protocol")  # that requests are counted by


class Series:
    """What was counted for one provider, model and pair of protocols."""

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = dict(zip(LABELS, labels, strict=True))
        self.requests: defaultdict[tuple[int, str], int] = defaultdict(int)  # by hundred, outcome
        self.errors: defaultdict[str, int] = defaultdict(int)  # by type
        self.ttfb, self.duration = Histogram(TTFB_BOUNDS), Histogram(DURATION_BOUNDS)
        self.received = self.sent = self.dropped = 0
        self.tokens = dict.fromkeys(TOKEN_KINDS, 0)


class Tally:
    """Requests of a while or of a provider: how many, and the newest times in seconds."""

    def __init__(self, at: int = 0) -> None:
        self.at = at  # the minute
        self.requests = self.errors = self.input = self.output = 0
        self.ttfbs: deque[float] = deque(maxlen=MEDIAN_SAMPLES)
        self.durations: deque[float] = deque(maxlen=MEDIAN_SAMPLES)
        self.last_at: float | None = None
        self.last_status: int | None = None
        self.last_error: str | None = None
        self.health = "unknown"

    def add(self, now: float, failed: bool, ttfb: float | None = None, status: int | None = None,
            error: str | None = None, health: str | None = None) -> None:
        """Count a request."""
        self.requests += 1
        self.errors += failed
        self.last_at, self.last_status = now, status
        self.health = health or self.health
        if failed:
            self.last_error = error
        if ttfb is not None:
            self.ttfbs.append(ttfb)


def median_ms(values: Collection[float]) -> int | None:
    """The median of seconds, in milliseconds; None of nothing."""
    return milliseconds(sorted(values)[len(values) // 2]) if values else None


class Metrics:
    """What was served since `started`. Times are given, by the wall and by the clock that
    exchanges are timed with; count() brings up to date what is read."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.open: set[Exchange] = set()
        self.series: dict[tuple[str, ...], Series] = {}  # by labels
        self.providers: defaultdict[str, Tally] = defaultdict(Tally)
        self.minutes: deque[Tally] = deque(maxlen=HISTORY_MINUTES)
        self.ended_count = self.error_count = 0
        self.pending: list[tuple[Exchange, str, float]] = []  # over, and not counted yet
        # number, exchange, outcome and when it was over
        self.recent: deque[tuple[int, Exchange, str, float]] = deque(maxlen=RECENT_REQUESTS)

    def began(self, exchange: Exchange) -> None:
        """A request is here."""
        self.open.add(exchange)

    def forget(self, exchange: Exchange) -> None:
        """What is here was no request for a model, so it is not counted."""
        self.open.discard(exchange)

    def ended(self, exchange: Exchange, outcome: str, clock: float) -> None:
        """A request is over, which is counted once: many at a time, for that is much faster."""
        if exchange in self.open:
            self.open.discard(exchange)
            exchange.shrink()
            self.pending.append((exchange, outcome, clock))
            if len(self.pending) >= COUNTED_TOGETHER:
                self.count()

    def count(self) -> None:
        """Count what is over."""
        for exchange, outcome, clock in self.pending:
            if exchange.usage:
                exchange.tokens = seen = TokenCounts()
                of_messages = exchange.provider_protocol is MESSAGES
                (observe_messages_usage if of_messages else observe_openai_usage)(
                    seen, exchange.usage)
                exchange.usage = None
            self.count_one(exchange, outcome, clock - exchange.started)
            self.recent.append((self.ended_count, exchange, outcome, clock))
        self.pending.clear()

    def count_one(self, exchange: Exchange, outcome: str, duration: float) -> None:
        """Count one request."""
        seen, failed = exchange.observed or exchange.tokens, outcome not in NO_ERRORS
        now = wall(exchange, exchange.started + duration)
        ttfb = exchange.head_at - exchange.started if exchange.head_at else None
        self.ended_count += 1
        self.error_count += failed
        minute = self.minute(now)
        minute.add(now, failed, ttfb)
        minute.durations.append(duration)
        if exchange.provider:
            for tried in other_tries(exchange):
                self.providers[tried.provider].add(
                    now, True, None, tried.status or None, tried.what,
                    HEALTH_AFTER.get(tried.what, "failing"))
            self.providers[exchange.provider].add(
                now, failed, ttfb, exchange.status, exchange.error, health_told(exchange, outcome))
        series = self.series_of(exchange)
        series.requests[exchange.status // 100, outcome] += 1
        if failed:
            series.errors[exchange.error_type or outcome] += 1
        series.duration.add(duration)
        if ttfb is not None:
            series.ttfb.add(ttfb)
        series.received += exchange.inbound_bytes
        series.sent += exchange.down
        series.dropped += exchange.dropped
        if seen:
            minute.input += seen.input
            minute.output += seen.output
            for kind in TOKEN_KINDS:
                if tokens := getattr(seen, kind):
                    series.tokens[kind] += tokens

    def minute(self, now: float) -> Tally:
        """The tally of this minute; of the last one where the wall clock went back."""
        at = int(now) // 60 * 60
        if not self.minutes or self.minutes[-1].at < at:
            self.minutes.append(Tally(at))
        return self.minutes[-1]

    def series_of(self, exchange: Exchange) -> Series:
        """Where a request is counted."""
        inbound, provider = exchange.inbound, exchange.provider_protocol
        key = (exchange.provider, exchange.upstream_model[:LABEL_CHARS],
               inbound.name if inbound else "", provider.name if provider else "")
        series = self.series.get(key)
        if series is None:
            if len(self.series) >= MODEL_SERIES:
                key = (key[0], OTHER_MODELS, *key[2:])
            series = self.series.setdefault(key, Series(key))
        return series

    # -- what is told

    def history(self, now: float) -> list[Json]:
        """The minutes up to this one, oldest first."""
        known, latest = {tally.at: tally for tally in self.minutes}, int(now) // 60 * 60
        tallies = [known.get(at) or Tally(at)
                   for at in range(latest - 60 * (HISTORY_MINUTES - 1), latest + 1, 60)]
        return [{"at": tally.at, "requests": tally.requests, "errors": tally.errors,
                 "ttfb_ms_p50": median_ms(tally.ttfbs),
                 "duration_ms_p50": median_ms(tally.durations),
                 "input_tokens": tally.input, "output_tokens": tally.output} for tally in tallies]

    def models(self) -> list[Json]:
        """The counts of each provider, model and pair."""
        return [{"provider": series.labels["provider"], "model": series.labels["model"],
                 "pair": f"{series.labels['protocol']}->{series.labels['provider_protocol']}",
                 "requests": sum(series.requests.values()), "errors": sum(series.errors.values()),
                 **{f"{kind}_tokens": series.tokens[kind] for kind in TOKEN_KINDS[:-1]}}
                for series in self.series.values() if series.labels["provider"]]

    def provider(self, name: str) -> Json:
        """What is known of a provider."""
        tally = self.providers.get(name) or Tally()
        return {"requests": tally.requests, "errors": tally.errors,
                "in_flight": sum(exchange.provider == name for exchange in self.open),
                "last_status": tally.last_status, "last_error": tally.last_error,
                "last_at": None if tally.last_at is None else wall_text(tally.last_at),
                "ttfb_ms_p50": median_ms(tally.ttfbs), "health": tally.health}

    def requests(self, after: int, limit: int) -> list[Json]:
        """The records of the latest requests that are over, newest first."""
        wanted = [entry for entry in reversed(self.recent) if entry[0] > after][:limit]
        return [{"seq": seq, **request_record(exchange, outcome, wall(exchange, clock), clock)}
                for seq, exchange, outcome, clock in wanted]

    def open_requests(self, now: float, clock: float) -> list[Json]:
        """The records of the requests in flight, newest first."""
        return [{"seq": 0, **request_record(exchange, "open", now, clock)}
                for exchange in sorted(self.open, key=lambda e: -e.id)[:RECENT_REQUESTS]]

# -- the text that Prometheus reads (exposition format 0.0.4) ----------------

Sample = tuple[str, Mapping[str, str], float]  # what is added to the name, labels, value


def histogram_samples(histogram: Histogram) -> Iterator[Sample]:
    """Each bucket counts what the ones before it count too."""
    bounds = (*map(str, histogram.bounds), "+Inf")
    counts = list(itertools.accumulate(histogram.counts))
    for bound, count in zip(bounds, counts, strict=True):
        yield "_bucket", {"le": bound}, count
    yield "_sum", {}, histogram.total
    yield "_count", {}, counts[-1]


# Each metric, and its samples of one series.
FAMILIES: tuple[tuple[str, str, str, Callable[[Series], Iterable[Sample]]], ...] = (
    ("proxai_requests_total", "counter", "Requests that are over, refused ones too.",
     lambda s: [("", {"status": f"{hundred}xx" if hundred else "none", "outcome": outcome}, n)
                for (hundred, outcome), n in s.requests.items()]),
    ("proxai_request_errors_total", "counter", "Requests that failed, by type of the error.",
     lambda s: [("", {"type": kind}, n) for kind, n in s.errors.items()]),
    ("proxai_time_to_first_byte_seconds", "histogram",
     "From the request to the head of the provider's answer.", lambda s: histogram_samples(s.ttfb)),
    ("proxai_request_duration_seconds", "histogram", "From the request to its end.",
     lambda s: histogram_samples(s.duration)),
    ("proxai_request_bytes_total", "counter", "Bytes of request bodies from clients.",
     lambda s: [("", {}, s.received)]),
    ("proxai_response_bytes_total", "counter", "Bytes of answers from providers.",
     lambda s: [("", {}, s.sent)]),
    ("proxai_tokens_total", "counter",
     "Tokens as providers count them; input is without cached, output with reasoning.",
     lambda s: [("", {"kind": kind}, n) for kind, n in s.tokens.items()]),
    ("proxai_dropped_fields_total", "counter", "What translations have left out.",
     lambda s: [("", {}, s.dropped)]),
)


LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def label_text(labels: Mapping[str, str]) -> str:
    """Labels in their braces, whatever their values are made of."""
    pairs = [f'{name}="{value.translate(LABEL_ESCAPES)}"' for name, value in labels.items()]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def metrics_text(metrics: Metrics, providers: Collection[str], version: str, connections: int,
                 captures_dropped: int) -> str:
    """All metrics; what is open is told for each of the providers, and for none."""
    metrics.count()
    open_ = {name: 0 for name in ("", *providers)}
    for exchange in metrics.open:
        open_[exchange.provider] += 1
    told: list[tuple[str, str, str, Iterable[tuple[str, str, float]]]] = [
        ("proxai_build_info", "gauge", "The version that runs.",
         [("", label_text({"version": version}), 1.0)]),
        ("process_start_time_seconds", "gauge", "When it started, since 1970.",
         [("", "", metrics.started)]),
        ("proxai_open_connections", "gauge", "Connections of clients.", [("", "", connections)]),
        ("proxai_requests_in_flight", "gauge", "Requests that are not over.",
         [("", label_text({"provider": name}), count) for name, count in open_.items()]),
        ("proxai_captures_dropped_total", "counter", "Captures that were not written.",
         [("", "", captures_dropped)])]
    common = [(series, label_text(series.labels)[:-1]) for series in metrics.series.values()]
    told += [(name, kind, help, [
        (suffix, f"{text},{label_text(labels)[1:]}" if labels else text + "}", value)
        for series, text in common for suffix, labels, value in samples(series)])
        for name, kind, help, samples in FAMILIES]
    lines = []
    for name, kind, help, rows in told:
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}",
                  *(f"{name}{suffix}{labels} {value}" for suffix, labels, value in rows)]
    return "\n".join([*lines, ""])



# ============================================================================
#  16  Credentials
# ============================================================================
# Which of a provider's credentials a request uses, and when one rests: functions
# over visible state, with the time as an argument. No sockets, no clock.

# -- values ------------------------------------------------------------------

STRATEGIES = ("round-robin", "weighted", "fill-first")
GUESSED_SECS = 900.0  # longest rest on a guess; others bench for hours on one 404
PROBE_SECS = 3600.0  # between requests let through to a credential that rests by declaration
TRIAL_SECS = 120.0  # how long one request may take to decide whether a guessed rest is over
AFFINITY_SECS = 3600.0  # a session stays with its credential; vendors keep prompts 5-60 minutes
DECLARED_SECS = 366 * 86400.0  # a deadline further away is a mistake
RESTS, SESSIONS, POOLS = 4096, 4096, 4096  # remembered at most; the longest unused go first
WHY_CHARS = 100  # of a provider's hint that is shown
CLAUDE_CODE_SECS = 59  # a longer Retry-After makes Claude Code give up

Key = tuple[str, str, str | None]  # provider, credential, model; None where it is all models


class Candidate(NamedTuple):
    """A credential that a request may use. `tier` is 0 for the provider of the route, then 1 and
    up for its fallbacks; `model` is the name the provider knows it by."""

    provider: str
    credential: str
    model: str
    priority: int = 0
    weight: int = 1
    tier: int = 0

    @property
    def key(self) -> Key:
        """Which credential it is, for which model."""
        return self.provider, self.credential, self.model


class Window(NamedTuple):
    """A time in which a credential rests: until a deadline that the provider declared, or for as
    long as we guess. `tried` is when a request was last let through to see."""

    declared: bool
    reason: str
    source: str
    raw: str
    since: float
    until: float
    level: int = 0
    tried: float = 0.0


class Scheduler:
    """All that is remembered between requests: which credentials rest, which one each session of
    a model has and until when, which one came last, and the sums that weights are shared by."""

    def __init__(self, strategy: str = STRATEGIES[0], affinity_secs: float = AFFINITY_SECS,
                 probe_secs: float = PROBE_SECS) -> None:
        self.strategy, self.affinity_secs, self.probe_secs = strategy, affinity_secs, probe_secs
        self.rests: dict[Key, Window] = {}
        self.bindings: dict[tuple[str, str], tuple[Key, float]] = {}
        self.cursors: dict[str, Key] = {}
        self.currents: dict[str, tuple[Sequence[Any], dict[Key, int]]] = {}


def remember(table: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Put `value` in a table where the entries that were not put again for longest are lost."""
    table.pop(key, None)
    table[key] = value
    while len(table) > limit:
        del table[next(iter(table))]


# -- sessions ----------------------------------------------------------------
# Providers keep prompts warm per account, so a session stays with one credential.

SESSION_FIELDS = (b"x-claude-code-session-id", b"session-id", b"session_id", b"x-session-id",
                  b"x-session-affinity", b"x-client-request-id")  # Codex, OpenCode, SDKs
CLAUDE_CODE_USER = re.compile(r'(?:_session_|"session_id"\s*:\s*")([\w-]{8,64})')
OPENING_CHARS = 100  # of each text that tells one conversation from another
OPENING_ITEMS = 64


def session_keys(headers: Mapping[bytes, bytes], body: Json) -> tuple[str, ...]:
    """The names of the session that a request belongs to, the most telling first: of what clients
    send, else of how the conversation begins. None where there is neither."""
    user = text_of(mapping(body.get("metadata")).get("user_id"))[:2048]
    inside = CLAUDE_CODE_USER.search(user)
    first, *others = ((headers.get(name, b"").decode("latin-1"),) for name in SESSION_FIELDS)
    talk = body.get("conversation")
    for names in (first, (inside and inside[1],), *others,
                  (body.get("session_id"),), (body.get("sessionId"),),
                  (body.get("prompt_cache_key"), mapping(talk).get("id") or talk),
                  (user,), (body.get("conversation_id"),)):
        keys = [sha(name[:2048])[:16] for name in names if isinstance(name, str) and name.strip()]
        if keys:
            return tuple(keys)
    said = opening(body)
    if not said.get("user"):
        return ()
    # The second turn is the first that has an answer, and must find the first one's name.
    start = [said.get("system", ""), said["user"]]
    starts = [[*start, said["assistant"]]] if said.get("assistant") else []
    return tuple(sha("\0".join(texts))[:16] for texts in (*starts, start))


def opening(body: Json) -> dict[str, str]:
    """How the first texts of a conversation begin, by role; a look at a few items of any body."""
    said = {"system": beginning(body.get("system") or body.get("instructions"))}
    items = body.get("messages") or body.get("input")
    if isinstance(items, str):
        said["user"] = beginning(items)
    for item in map(mapping, listing(items)[:OPENING_ITEMS]):
        role = "system" if item.get("role") == "developer" else item.get("role")
        if isinstance(role, str) and not said.get(role):
            said[role] = beginning(item.get("content"))
        if said.get("assistant"):
            break
    return said


def beginning(content: Any) -> str:
    """The first characters of a content's text."""
    if isinstance(content, str):
        return content[:OPENING_CHARS]
    parts = (text_of(mapping(part).get("text"))[:OPENING_CHARS] for part in listing(content)[:8])
    return "".join(parts)[:OPENING_CHARS]


# -- hints -------------------------------------------------------------------

class Reset(NamedTuple):
    """When a provider takes requests again, where and how it said so; `whole` for all models."""

    at: float
    source: str
    raw: str
    whole: bool


PLAIN_NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")
UNIFIED = re.compile(r"anthropic-ratelimit-unified-(?:5h|7d)-reset")
LIMIT_RESET = re.compile(r"(?:x-|anthropic-)?ratelimit-(?!unified)(?:[\w-]+-)?reset(?:-[\w-]+)?")
RESET_TEXT = re.compile(
    r"\b(?:again|retry(?:ing)?|resets?|wait|available|after)\b[^0-9\n]{0,24}?"
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:]{8}(?:\.[0-9]{1,6})?(?:Z|[+-][0-9]{2}:[0-9]{2})?"
    r"|(?:[0-9]{1,9}(?:\.[0-9]{1,9})? ?(?:ms|milli[a-z]*|s|secs?|seconds?|m|mins?|minutes?|h|hours?"
    r"|d|days?)(?![a-z])[ ,]{0,2}(?:and )?)+)", re.I)


def reset_time(text: str, now: float) -> float | None:
    """When a limit ends, however a vendor writes it: seconds from now, a Unix time (also in
    milliseconds), a duration, a date. None for what is none of these, past or absurd."""
    text = text.strip()[:64]
    if PLAIN_NUMBER.fullmatch(text):
        count = float(text)
        at = count / 1000 if count >= 1e11 else count if count >= 1e9 else now + count
    else:
        at = parse_http_date(text) or iso_time(text) or now + (reset_secs(text.lower()) or 0.0)
    return at if now < at <= now + DECLARED_SECS else None


def reset_hint(status: int, headers: Mapping[bytes, bytes], body: Any, text: str,
               now: float) -> Reset | None:
    """When a failure ends, by the source that says most; of several limits the last to end."""
    named = {name.decode(): value.decode("latin-1") for name, value in headers.items()}
    used_up = [name for name in named if UNIFIED.fullmatch(name)
               and named.get(name.removesuffix("reset") + "status") == "rejected"]
    empty = [name for name in named if status == 429 and LIMIT_RESET.fullmatch(name)
             and named.get(name.replace("reset", "remaining"), "0") == "0"]
    found = RESET_TEXT.search(text[:ERROR_TEXT_CHARS])
    for told in ([(f"header {name}", named[name]) for name in used_up], body_resets(body),
                 [("header retry-after-ms", named.get("retry-after-ms", "") + "ms")],
                 [("header retry-after", named.get("retry-after", ""))],
                 [(f"header {name}", named[name]) for name in empty],
                 [("text", found[1].strip(" ,"))] if found else []):
        resets = [Reset(at, source, raw[:WHY_CHARS], bool(used_up)) for source, raw in told
                  if (at := reset_time(raw, now)) is not None]
        if resets:
            return max(resets)
    return None


def body_resets(body: Any) -> list[tuple[str, str]]:
    """The deadlines that OpenAI (Codex) and Google have in the body of an error."""
    error = mapping(first_of(body, "/error", "/response/error"))
    details = [mapping(detail) for detail in listing(error.get("details"))[:32]]
    told = [(name, value) for holder, name in (
        (error, "resets_at"), (error, "resets_in_seconds"),
        *((mapping(detail.get("metadata")), "quotaResetDelay") for detail in details),
        *((detail, "retryDelay") for detail in details))
        if isinstance(value := holder.get(name), (str, int, float))]
    return [(f"body {name}", str(value)) for name, value in told[:1]]


# -- what a failure means ----------------------------------------------------

class Rule(NamedTuple):
    """What follows from a kind of outcome: how long to rest without a hint, and whether that
    doubles each time; whether another credential may do better (`rotate`), and whether all may
    later (`again`); whether a hint on the time is looked for."""

    secs: float = 0.0
    grows: bool = False
    rotate: bool = True
    again: bool = False
    hints: bool = False


RULES = {
    "ok": Rule(rotate=False),
    "client": Rule(rotate=False),  # it has gone
    "request": Rule(rotate=False),  # its fault: no other credential can help
    "dropped": Rule(),  # the connection ended without an answer, which says nothing
    "network": Rule(60),  # no connection at all
    "quota": Rule(1, grows=True, again=True, hints=True),
    "capacity": Rule(1, again=True, hints=True),
    "challenge": Rule(10, grows=True, again=True, hints=True),
    "billing": Rule(GUESSED_SECS, hints=True),
    "auth": Rule(GUESSED_SECS),
    "forbidden": Rule(GUESSED_SECS, again=True, hints=True),
    "unsupported": Rule(GUESSED_SECS),
    "missing": Rule(GUESSED_SECS),
    "transient": Rule(60, again=True, hints=True),
    "unknown": Rule(60, hints=True),
}
REQUEST_CODES = ("cyber_policy|context_length_exceeded|message_too_big|string_above_max_length"
                 "|invalid_prompt|invalid_value|unsupported_value|previous_response_not_found")
REQUEST_TYPES = "invalid_request|invalid_request_error|bad_request_error"
# What a failure is by "status type code", a line feed and its message; the first that matches.
# Vendors say invalid_request_error with 401 to 404 too, where it is about the credential.
SIGNS = tuple((re.compile(words, re.I), what) for words, what in (
    (r"(?:403|429|503) [^\n]*\n(?s:.*)(?:cf-chl-|challenge-platform|<title>just a moment"
     r"|attention required! \| cloudflare)", "challenge"),
    (r"404 [^\n]*\n(?s:.*)not found(?s:.*)\bstore\b", "request"),
    (r"40[01] (?s:.*)\binvalid_grant\b", "auth"),
    (r"4(?:00|22) (?s:.*)(?:model_not_(?:supported|found|available)|\bunsupported model\b"
     r"|\bmodel(?: id)?[ :]{0,2}[`'\"]?[\w./:@-]{0,80}?[`'\"]? ?(?:is |was )?(?:(?:currently )?"
     r"(?:not (?:supported|available|found|allowed|enabled)|unsupported|unavailable)"
     r"|does not exist|not exist)|\bnot a valid model\b|\bunknown model\b"
     r"|\bnot available (?:for|on|in) your (?:plan|account|organization|region))", "unsupported"),
    (r"400 (?s:.*)\bcredit balance is too low\b", "billing"),
    (rf"(?!401|402|429)[^\n]* (?:{REQUEST_CODES})(?: |\n)", "request"),
    (rf"(?!40[1-4]|429)[^\n]* (?:{REQUEST_TYPES})(?: |\n)", "request"),
    (r"4(?:00|09|13|22) ", "request"),
    (r"401 ", "auth"),
    (r"402 ", "billing"),
    (r"403 ", "forbidden"),
    (r"404 ", "missing"),
    (r"429 ", "quota"),
    (r"(?:408|50[0234]|529) ", "transient"),
    (r"", "unknown"),
))
KEY_FAULTS = ("auth", "billing")  # what is wrong with a key is so for every model
CAUSE_SIGNS = {CONTEXT_CODE: "request", QUOTA_CODES[0]: "billing"}


class Verdict(NamedTuple):
    """What came of a request to a provider: a word of RULES, and until when the provider says it
    wants no more, for all models or this one."""

    what: str
    until: float | None = None
    source: str = ""
    raw: str = ""
    whole: bool = False

    @property
    def rule(self) -> Rule:
        """What follows from it."""
        return RULES[self.what]


def classify(error: ProxyError | None, headers: Mapping[bytes, bytes], body: Any, now: float,
             fault: str = "") -> Verdict:
    """What an outcome means: an `error` of the provider, in its answer or inside a stream, with
    the headers and the JSON that came with it; or a `fault` (client, dropped, network) where no
    answer came. Neither is a success."""
    if fault or error is None:
        return Verdict(fault or "ok", source="connection" if fault else "")
    line = f"{error.status} {error.kind} {error.code or ''}"
    said = f"{line} \n{error.message}"[:ERROR_TEXT_CHARS]
    what = next(what for words, what in SIGNS if words.match(said))
    cause = cause_of(error)
    if cause and what not in ("challenge", "unsupported"):
        what = CAUSE_SIGNS.get(cause, "capacity" if error.status == 429 else what)
    body = body[0] if isinstance(body, list) and body else body  # Google's come in an array
    hint = (reset_hint(error.status, headers, body, error.message, now)
            if RULES[what].hints else None)
    if hint:
        return Verdict(what, *hint)
    if what == "quota" and not any(b"ratelimit" in name for name in headers):
        what = "capacity"  # a full house, not an empty purse
    raw = " ".join(line.split()[1:])[:WHY_CHARS]
    return Verdict(what, source=f"status {error.status}", raw=raw)


# -- who rests ---------------------------------------------------------------

def places_of(candidate: Candidate) -> tuple[Key, Key]:
    """Where the rests of a candidate are kept: those for its model, and those for all models."""
    return candidate.key, (candidate.provider, candidate.credential, None)


def resting(state: Scheduler, candidate: Candidate, now: float) -> Window | None:
    """What keeps a candidate from being used now, the longer one of two; None if nothing does. A
    guess that is over lets one request decide; a declaration lets one through at times, for
    providers are wrong too."""
    windows = filter(None, map(state.rests.get, places_of(candidate)))
    blocked = [w for w in windows if now < (next_probe(state, w) if w.declared else max(
        w.until, w.tried + TRIAL_SECS if w.tried else 0))]
    return max(blocked, key=lambda w: w.until) if blocked else None


def next_probe(state: Scheduler, window: Window) -> float:
    """When a request may be let through before a declared rest is over; its end if none may."""
    last = max(window.since, window.tried)
    return min(window.until, last + state.probe_secs) if state.probe_secs else window.until


def usable(state: Scheduler, candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that the strategy leaves: a weight of 0 takes one out where weights count."""
    return [c for c in candidates if c.weight > 0 or state.strategy != "weighted"]


def note_result(state: Scheduler, candidates: Sequence[Candidate], candidate: Candidate,
                verdict: Verdict, now: float, *, began: float, model: str = "",
                session: Sequence[str] = ()) -> None:
    """Learn from the outcome of a request that `began` at that time. A success ends what rests
    began before it. A failure begins one, and its session loses the credential; but a guess never
    rests the only one there is."""
    places = places_of(candidate)
    if verdict.what == "ok":
        for place in places:
            if place in state.rests and state.rests[place].since <= began:
                del state.rests[place]
        if bound_key(state, model, session, now) in (None, candidate.key):
            keep_session(state, candidate, model, session, now)
        return
    for place in places:  # who was let through has come back
        window = state.rests.get(place)
        if window and not window.declared and window.tried:
            state.rests[place] = window._replace(tried=0.0)
    if verdict.rule.secs == 0:
        return
    for name in session:
        if state.bindings.get((name, model), (None,))[0] == candidate.key:
            del state.bindings[name, model]
    place = places[1 if verdict.whole else 0]
    if verdict.until is not None or any(c.key != candidate.key and not resting(state, c, now)
                                        for c in usable(state, candidates)):
        window = next_window(state.rests.get(place), verdict, now, began)
        remember(state.rests, place, window, RESTS)


def next_window(old: Window | None, verdict: Verdict, now: float, began: float) -> Window:
    """The rest that follows a failure where `old` was the last one. Failures side by side count
    once, so one inside of an open window changes nothing. A longer declaration stays, but for what
    a request that was let through during it was told."""
    rule, level = verdict.rule, 0
    if verdict.until is not None:
        if old and old.declared and old.until >= verdict.until and old.since >= began:
            return old
        return Window(True, verdict.what, verdict.source, verdict.raw, now, verdict.until)
    if old and now < old.until:
        return old
    if old and not old.declared and now < old.until + GUESSED_SECS:  # older failures are forgotten
        level = old.level + 1
    secs = min(rule.secs * 2 ** min(level, 20) if rule.grows else rule.secs, GUESSED_SECS)
    return Window(False, verdict.what, verdict.source, verdict.raw, now, now + secs, level)


# -- who is chosen -----------------------------------------------------------

def choose_credential(state: Scheduler, candidates: Sequence[Candidate], model: str,
                      session: Sequence[str], now: float,
                      tried: Collection[Key] = ()) -> Candidate | None:
    """The credential for a request for `model` (the client's name of it), but for those that it
    has `tried`; None where all rest. The order of `candidates` is that of their configuration.
    Only the first tier with a ready credential counts. Then a session keeps its credential, even
    where one of a higher priority is back. Guesses alone never make an outage: where nothing else
    is left, the credential whose rest ends first is used."""
    left = [c for c in usable(state, candidates) if c.key not in tried]
    ready = [c for c in left if not resting(state, c, now)]
    if ready:
        tier = min(c.tier for c in ready)
        ready = [c for c in ready if c.tier == tier]
        bound = bound_key(state, model, session, now)
        chosen = next((c for c in ready if c.key == bound), None)
        if chosen is None:
            priority = max(c.priority for c in ready)
            chosen = PICKS[state.strategy](
                state, model, candidates, [c for c in ready if c.priority == priority])
    else:
        guessed = {c: w for c in left if (w := resting(state, c, now)) and not w.declared}
        if not guessed or tried:
            return None
        chosen = min(guessed, key=lambda c: (c.tier, guessed[c].until))
    for place in places_of(chosen):
        if window := state.rests.get(place):  # this request is the one that is let through
            state.rests[place] = window._replace(tried=now)
    keep_session(state, chosen, model, session, now)
    return chosen


def keep_session(state: Scheduler, candidate: Candidate, model: str, session: Sequence[str],
                 now: float) -> None:
    """Let a session keep a credential from now on."""
    for name in session if state.affinity_secs else ():
        remember(state.bindings, (name, model), (candidate.key, now + state.affinity_secs),
                 SESSIONS)


def bound_key(state: Scheduler, model: str, session: Sequence[str], now: float) -> Key | None:
    """The credential of a session, by the first of its names that has one."""
    found = (state.bindings.get((name, model)) for name in session)
    return next((binding[0] for binding in found if binding and binding[1] > now), None)


def pick_next(state: Scheduler, model: str, candidates: Sequence[Candidate],
              ready: Sequence[Candidate]) -> Candidate:
    """The ready one after the last one used, in one circle for all providers of a model."""
    keys = [c.key for c in candidates]
    last = state.cursors.get(model)
    start = keys.index(last) + 1 if last in keys else 0
    places = {c.key: (place - start) % len(keys) for place, c in enumerate(candidates)}
    chosen = min(ready, key=lambda c: places[c.key])
    remember(state.cursors, model, chosen.key, POOLS)
    return chosen


def pick_weighted(state: Scheduler, model: str, candidates: Sequence[Candidate],
                  ready: Sequence[Candidate]) -> Candidate:
    """By weight, as evenly spread as can be (nginx's smooth rotation): each gains its weight, the
    richest is used and pays for all."""
    vector = [(c.key, c.weight) for c in candidates]
    known, currents = state.currents.get(model, ((), {}))
    if known != vector:
        currents = {}
    for c in ready:
        currents[c.key] = currents.get(c.key, 0) + c.weight
    chosen = max(ready, key=lambda c: currents[c.key])
    currents[chosen.key] -= sum(c.weight for c in ready)
    remember(state.currents, model, (vector, currents), POOLS)
    return chosen


PICKS: dict[str, Callable[..., Candidate]] = {
    "round-robin": pick_next, "weighted": pick_weighted,
    "fill-first": lambda state, model, candidates, ready: ready[0]}  # until it rests


# -- a stream before anything of it is seen ----------------------------------

# Events that show a client nothing yet; Chat has chunks with nothing but a role.
QUIET_EVENTS = frozenset((
    "message_start", "ping", "content_block_start", "response.created", "response.queued",
    "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.reasoning_summary_part.added", "keepalive"))


def stream_fault(protocol: Protocol, event: Any) -> UpstreamError | None:
    """The error that an event of a provider's stream tells; None for other events."""
    if event == DONE:
        return None
    if protocol is CHAT:
        told = event.get("error") or next(
            (choice.get("error") or {"message": "the provider ended its answer with an error"}
             for choice in map(mapping, listing(event.get("choices")))
             if choice.get("finish_reason") == "error"), None)
        return fault_of(told) if told else None
    kind, told = event.get("type"), event.get("error")
    if kind == "response.failed":
        return fault_of(mapping(event.get("response")).get("error") or event)
    return fault_of(told or event) if kind == "error" or (told and kind is None) else None


def answer_fault(value: Any) -> UpstreamError | None:
    """The error that an answer in one piece is in spite of its status; None for other answers."""
    told = mapping(value).get("error")
    return fault_of(told) if told else None


def is_visible(protocol: Protocol, event: Any) -> bool:
    """Whether an event shows a client something that another provider's answer would contradict."""
    if event == DONE:
        return False
    if protocol is not CHAT:
        return word(event.get("type")) not in QUIET_EVENTS
    return any(choice.get("finish_reason")
               or any(value for name, value in mapping(choice.get("delta")).items()
                      if name != "role")
               for choice in map(mapping, listing(event.get("choices"))))


# -- one request after a failure ---------------------------------------------

class Attempt(NamedTuple):
    """One try of a request, for its log line."""

    provider: str
    credential: str
    status: int
    what: str
    ms: int


class Budget(NamedTuple):
    """How far a request goes: tries, seconds, longest wait for the same credential, for any."""

    attempts: int = 4
    secs: float = 60.0
    short_secs: float = 5.0
    wait_secs: float = 30.0


PATIENT = Budget()
ROUND_SECS = 1.0  # between rounds at least


class Step(NamedTuple):
    """What a request does after a failure: stop, refresh (the credential, and use it again), same
    (again with it), next (another one), round (all over); and how long it waits before."""

    what: str
    wait_secs: float = 0.0


def next_step(state: Scheduler, candidates: Sequence[Candidate], tried: Collection[Key],
              attempts: Sequence[Attempt], verdict: Verdict, spent_secs: float, now: float, *,
              budget: Budget = PATIENT, refreshable: bool = False, jitter: float = 0.0) -> Step:
    """What to do after the failed last one of `attempts`; `tried` holds what this round has used,
    `jitter` (0 to 1) keeps requests that wait for the same moment apart. A short wait is better
    than a cold prompt cache elsewhere, but only once; a request never sleeps while another
    credential is ready. Where there is only one, its client is told at once."""
    rule, left = verdict.rule, budget.secs - spent_secs
    if len(attempts) >= budget.attempts or left <= 0 or not rule.rotate:
        return Step("stop")
    repeated = len(attempts) > 1 and attempts[-2][:2] == attempts[-1][:2]
    if verdict.what == "auth" and refreshable and not repeated:
        return Step("refresh")
    wait = (verdict.until or now) - now
    if 0 < wait <= min(budget.short_secs, left) and not repeated:
        return Step("same", wait)
    if any(c.key not in tried and not resting(state, c, now) for c in usable(state, candidates)):
        return Step("next")
    soonest = recovery(state, candidates, now)
    if not rule.again or soonest is None or len(usable(state, candidates)) < 2:
        return Step("stop")
    soonest = max(soonest, ROUND_SECS)
    wait = min(soonest + jitter * min(soonest / 4, 2.0), max(soonest, budget.wait_secs))
    return Step("round", wait) if wait <= min(budget.wait_secs, left) else Step("stop")


def recovery(state: Scheduler, candidates: Iterable[Candidate], now: float) -> float | None:
    """The seconds until one of the candidates is ready; None where there is none."""
    rests = [resting(state, c, now) for c in usable(state, candidates)]
    return min((max(w.until - now, 0.0) if w else 0.0 for w in rests), default=None)


# The most useful of several failures, best first: what the user can mend, with the time it ends
# before what has none, and what may be over in a second last.
USEFUL = ("request", "quota", "billing", "auth", "forbidden", "unsupported", "missing", "capacity",
          "challenge", "transient", "unknown", "network", "dropped", "client", "ok")


def most_useful(failures: Sequence[tuple[Verdict, ProxyError]]) -> ProxyError:
    """The error that tells a client most about what to do, of all credentials' failures."""
    return min(failures, key=lambda f: (USEFUL.index(f[0].what), f[0].until or math.inf))[1]


def unavailable(state: Scheduler, candidates: Sequence[Candidate], model: str, protocol: Protocol,
                now: float) -> ProxyError:
    """The error for a request that found no credential: when to come back, or that it is in vain.
    Claude Code is told a time that it waits for; the real one is in the message."""
    if not candidates:
        return SetupError(f"no credential serves the model {model}",
                          fix="add one to its provider", status=503, code="auth_not_found")
    soonest = recovery(state, candidates, now)
    if not soonest:
        return UpstreamError(f"no credential for the model {model} is usable now", status=503,
                             fix=f"`why {model}` tells the reasons", code="auth_unavailable")
    secs = math.ceil(soonest)
    told = min(secs, CLAUDE_CODE_SECS) if protocol is MESSAGES else secs
    ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + secs))
    return UpstreamError(
        f"all credentials for the model {model} are cooling down, the first one for {secs}"
        f" seconds, until {ends}", fix=f"`why {model}` tells the reasons", status=429,
        code="model_cooldown", fields=[b"retry-after: %d" % told], retry=told <= 60)


# -- what people see and change ----------------------------------------------

def why(state: Scheduler, candidates: Sequence[Candidate], now: float) -> list[Json]:
    """For each candidate: whether it is used now, and if not, why, who says so, and until when."""
    sessions: dict[Key, int] = defaultdict(int)
    for key, until in state.bindings.values():
        sessions[key] += until > now
    rows = []
    for c in candidates:
        rest = resting(state, c, now)
        row: Json = {"provider": c.provider, "credential": c.credential, "model": c.model,
                     "eligible": rest is None and bool(usable(state, [c])), "reason": "ready",
                     "tier": c.tier, "priority": c.priority, "weight": c.weight,
                     "sessions": sessions[c.key]}
        if rest:
            row |= rest_fields(rest) | {
                "next_probe": next_probe(state, rest) if rest.declared else rest.until}
            if now >= rest.until:
                row["reason"] = "another request is deciding"
        elif not row["eligible"]:
            row["reason"] = f"its weight is {c.weight}"
        rows.append(row)
    return rows


SAVED = ("reason", "source", "raw", "since", "until", "tried")


def rest_fields(window: Window) -> Json:
    """A rest as people see it."""
    return {"kind": "declared" if window.declared else "guessed",
            **{name: getattr(window, name) for name in SAVED[:-1]}}


def rests_of(state: Scheduler, provider: str, credential: str, now: float) -> list[Json]:
    """What keeps a credential from being used, for each model; a model that is None is any."""
    return [{"model": key[2], **rest_fields(window)} for key, window in state.rests.items()
            if key[:2] == (provider, credential) and window.until > now]


def reset_rests(state: Scheduler, name: str) -> int:
    """End the rests of a credential, `name` or `provider/name`, or of "all"; gives how many."""
    ended = [key for key in state.rests if name in ("all", key[1], f"{key[0]}/{key[1]}")]
    for key in ended:
        del state.rests[key]
    return len(ended)


def dump_state(state: Scheduler, now: float) -> Json:
    """What must survive a restart: the deadlines that providers declared."""
    return {"version": 1, "rests": [
        {"provider": key[0], "credential": key[1], "model": key[2]}
        | {name: getattr(window, name) for name in SAVED}
        for key, window in state.rests.items() if window.declared and window.until > now]}


def load_state(state: Scheduler, value: Any, now: float) -> int:
    """Take back what `dump_state` gave, as far as it still holds; gives how many rests that are."""
    taken = 0
    for row in map(mapping, listing(mapping(value).get("rests"))[-RESTS:]):
        key: Any = tuple(row.get(name) for name in ("provider", "credential", "model"))
        texts: list[Any] = [row.get(name) for name in SAVED[:3]]
        times: list[Any] = [row.get(name) for name in SAVED[3:]]
        since, until, tried = (at if type(at) in (int, float) else math.nan for at in times)
        if (all(isinstance(text, str) for text in (*key[:2], *texts))
                and isinstance(key[2], str | None)
                and texts[0] in RULES and 0 <= since <= now < until <= now + DECLARED_SECS
                and 0 <= tried <= now):
            window = Window._make((True, *texts, since, until, 0, tried))
            remember(state.rests, key, window, RESTS)
            taken += 1
    return taken



# ============================================================================
#  17  Logs
# ============================================================================
# What an operator reads: one line for people or one JSON object for programs
# per event, never a body, a key, a query or a provider's URL. Rendering is
# pure; writing happens on a thread of its own, for a paused terminal blocks.

TRACE = 5
LEVELS = {"trace": TRACE, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING,
          "error": logging.ERROR}
LEVEL_NAMES = {number_: name for name, number_ in LEVELS.items()}

# -- fields of the events ----------------------------------------------------

def base_fields(exchange: Exchange) -> Json:
    """What each line about an exchange begins with."""
    fields = {"request_id": str(exchange.id), "method": exchange.method, "path": exchange.path}
    return fields | {"client": exchange.client} if exchange.client else fields


def fwd_fields(exchange: Exchange) -> Json:
    """The fields of `fwd`: a provider request is on its way (contract 9.4)."""
    inbound, provider, body = exchange.inbound, exchange.provider_protocol, exchange.body or {}
    assert inbound and provider
    hints = request_hints(inbound, body)
    stream = body.get("stream")
    return {
        **base_fields(exchange),
        "provider_request_bytes": exchange.provider_bytes,
        "inbound_request_bytes": exchange.inbound_bytes,
        "request_delta_bytes": exchange.provider_bytes - exchange.inbound_bytes,
        "request_protocol": inbound.name, "provider": exchange.provider,
        **({"credential": exchange.credential} if exchange.credential else {}),
        "route_name": exchange.route, "provider_protocol": provider.name,
        "translation": translation_name(exchange), "request_protocol_alias": inbound.alias,
        "translation_alias": "" if inbound is provider else f"{inbound.alias}->{provider.alias}",
        "provider_protocol_alias": provider.alias,
        "model": exchange.upstream_model, "reasoning_effort": request_effort(inbound, body),
        "stream": stream if isinstance(stream, bool) else None,
        "max_output_tokens": request_max_tokens(body),
        "request_hints": " ".join(hints), "request_hint_parts": hints,
    }


def end_fields(exchange: Exchange) -> Json:
    """The fields of the line that closes an exchange (contract 9.5): the whole story in one."""
    now = time.perf_counter()
    seen, inbound, provider = exchange.observed, exchange.inbound, exchange.provider_protocol
    fields: Json = {
        **base_fields(exchange),
        "request_protocol": inbound.name if inbound else None,
        "provider": exchange.provider or None,
        "provider_protocol": provider.name if provider else None,
        "translation": translation_name(exchange), "route_name": exchange.route,
        "status": exchange.status,
        "ttfb_ms": milliseconds(exchange.head_at - exchange.started) if exchange.head_at else None,
        "duration_ms": milliseconds(now - exchange.started),
        "up": exchange.provider_bytes, "down": exchange.down,
        "te": exchange.encoding, "chunks": exchange.chunks,
        "avg_chunk_bytes": exchange.down // exchange.chunks if exchange.chunks else 0,
        "ct": exchange.content_type.decode("latin-1")[:100] if exchange.content_type else None,
        "sse": exchange.sse,
        "model": (seen.model if seen and seen.model else exchange.upstream_model) or None,
    }
    if seen and provider:
        fields |= observed_fields(seen, provider)
    fields |= rate_fields(exchange.rates)
    if exchange.attempts:
        fields["attempts"] = [attempt._asdict() for attempt in exchange.attempts]
    if exchange.error:
        fields |= {"phase": exchange.phase, "err": exchange.error}
    return fields


def wait_fields(exchange: Exchange, idle: float) -> Json:
    """The fields of `wait`: a stream has been silent for `idle` seconds."""
    seen = exchange.observed or Observed()
    return {**base_fields(exchange), "idle_ms": milliseconds(idle),
            "duration_ms": milliseconds(time.perf_counter() - exchange.started),
            "chunks": exchange.chunks, "down": exchange.down,
            "response_id": seen.response_id[-8:] if seen.response_id else None,
            "seq": seen.sequence, "response_status": seen.status, "pending": len(seen.pending)}


def observed_fields(seen: Observed, provider: Protocol) -> Json:
    """What a provider's answer told, as its protocol tells it."""
    total = seen.total or seen.input + seen.output + seen.cached + seen.cache_creation
    calls = seen.calls | {name: max(count, seen.calls.get(name, 0))
                          for name, count in seen.server_tools.items()}
    sources = dict(seen.sources)
    if seen.server_tools:
        sources["server_tool"] = max(sum(seen.server_tools.values()), sources.get("server_tool", 0))
    fields: Json = {
        "response_id": seen.response_id[-8:] if seen.response_id else None,
        "service_tier": seen.tier, "tok": total, "input": seen.input, "output": seen.output,
        "output_items": bounded(seen.items), "calls": bounded(calls), "calls_by_source": sources,
    }
    if provider is MESSAGES:
        fields |= {"cache_read": seen.cached, "cache_creation": seen.cache_creation,
                   "stop_reason": next(iter(seen.finish), None),
                   "stop_reasons": bounded(seen.finish)}
    else:
        fields |= {"cache": seen.cached, "reasoning": seen.reasoning} | (
            {"finish_reasons": bounded(seen.finish)} if provider is CHAT else
            {"reasoning_effort": seen.effort, "response_status": seen.status,
             "incomplete_reason": seen.incomplete_reason, "seq": seen.sequence})
    if seen.error_code or seen.error_message:
        fields |= {"error_code": seen.error_code, "error_message": seen.error_message,
                   "error_param": seen.error_param}
    return fields


def bounded(counts: dict[str, T]) -> dict[str, T]:
    """The first of many counts: a log line is no place for thousands."""
    return dict(list(counts.items())[:64])


CODEX_NUMBERS = tuple(f"{window}-{what}" for window in ("primary", "secondary")
                      for what in ("used-percent", "reset-after-seconds", "window-minutes"))


def rate_fields(fields: Sequence[Field]) -> Json:
    """The rate limits that a provider's headers tell, as numbers."""
    values = {f.name.decode("ascii"): f.value.decode("latin-1") for f in fields
              if f.name.startswith((b"x-rate", b"x-codex"))}
    out: Json = {}
    for what in ("requests", "tokens"):
        for kind in ("limit", "remaining"):
            text = values.get(f"x-ratelimit-{kind}-{what}", "")
            if text.isdecimal() and len(text) < 16:
                out[f"rate_limit_{kind}_{what}"] = int(text)
        secs = reset_secs(values.get(f"x-ratelimit-reset-{what}", ""))
        if secs is not None:
            out[f"rate_limit_reset_{what}_ms"] = round(1000 * secs)
    for name in (*CODEX_NUMBERS, "primary-over-secondary-limit-percent"):
        text = values.get(f"x-codex-{name}", "")
        if PLAIN_NUMBER.fullmatch(text):
            key = name.replace("seconds", "secs").replace("-limit", "").replace("-", "_")
            out[f"codex_{key}"] = float(text)
    return out


# -- lines for people --------------------------------------------------------

def count_text(value: int) -> str:
    """4096 -> 4.1K"""
    return next((f"{value / size:.1f}{unit}" for unit, size in (("M", 1_000_000), ("K", 1000))
                 if value >= size), str(value))


def bytes_text(value: int) -> str:
    """2048 -> 2.0KB"""
    return next((f"{value / (1 << bits):.1f}{unit}" for unit, bits in (
        ("GB", 30), ("MB", 20), ("KB", 10)) if value >> bits), f"{value}B")


def secs_text(value: float) -> str:
    """Milliseconds as seconds: 5500 -> 5.5s"""
    return f"{value / 1000:.3f}".rstrip("0").rstrip(".") + "s"


def span_text(secs: float) -> str:
    """3723 -> 1h2m3s"""
    minutes, rest = divmod(round(secs), 60)
    amounts = ((minutes // 60, "h"), (minutes % 60, "m"), (rest, "s"))
    return "".join(f"{amount}{unit}" for amount, unit in amounts if amount) or "0s"


def base36(value: int) -> str:
    """`value` in base 36."""
    digits = ""
    while value or not digits:
        value, digit = divmod(value, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def short_id(id: str) -> str:
    """The last six characters of an id, of a number in base 36."""
    return (base36(int(id)) if id.isdecimal() else id)[-6:]


def printable(text: str) -> str:
    """`text` with what could move a cursor or begin a new line as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                   for c in text)


def clean(value: Any) -> Any:
    """`value` with every text in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


PAINT = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36, "dim": 2}
EVENT_PAINT = {"fwd": "cyan", "hdr": "blue", "wait": "yellow", "closed": "yellow", "end": "green"}
LEVEL_PAINT = {"info": "green", "warn": "yellow", "error": "red", "debug": "blue", "trace": "dim"}
OUTPUT_ALIASES = {
    "message": "m", "function_call": "fn", "custom_tool_call": "ct", "mcp_call": "mcp",
    "web_search_call": "web", "file_search_call": "file", "computer_call": "comp",
    "code_interpreter_call": "code", "image_generation_call": "img", "reasoning": "rsn",
    "tool_use": "tu", "server_tool_use": "stu", "text": "txt", "thinking": "think",
}


class HumanLines:
    """Renders events as lines for people (contract 9.3)."""

    def __init__(self, color: bool, warn_ms: int = 5000, error_ms: int = 15000,
                 details: bool = False) -> None:
        self.color, self.warn_ms, self.error_ms = color, warn_ms, error_ms
        # whether `hdr` of an answer that ends with a line of its own is shown
        self.details = details

    def paint(self, text: str, color: str, bold: bool = False) -> str:
        """`text` in a colour, if there is colour."""
        return f"\x1b[{'1;' if bold else ''}{PAINT[color]}m{text}\x1b[0m" if self.color else text

    def render(self, at: float, level: str, event: str, fields: Json) -> str | None:
        """The line; None for an event that people are not shown."""
        if event == "hdr" and not self.details:
            return None
        parts = {"fwd": self.fwd_parts, "hdr": self.hdr_parts, "wait": self.wait_parts}.get(
            event, self.end_parts if "duration_ms" in fields else self.plain_parts)
        clock, color = time.strftime("%H:%M:%S", time.localtime(at)), LEVEL_PAINT[level]
        label = self.paint(f"{level.upper():>5}", color, level in ("info", "warn", "error"))
        name = self.paint(event, EVENT_PAINT.get(
            event, "red" if level in ("warn", "error") else color), True)
        return f"{clock}.{int(at % 1 * 1000):03d} {label} {name} " + "".join(
            f" {part}" for part in parts(clean(fields)) if part)

    def plain_parts(self, fields: Json) -> Iterator[str]:
        """key=value for what has no layout of its own."""
        return (f"{key}={value}" for key, value in fields.items() if value not in (None, ""))

    def route_part(self, fields: Json) -> str:
        """in->provider/out"""
        inbound, outbound = (PROTOCOLS.get(fields.get(k) or "")
                             for k in ("request_protocol", "provider_protocol"))
        if not inbound or not outbound:
            return inbound.alias if inbound else ""
        provider = str(fields.get("provider")).removesuffix("_default")
        return f"{inbound.alias}->{provider}/{outbound.alias}"

    def fwd_parts(self, fields: Json) -> Iterator[str]:
        """A provider request on its way."""
        effort = fields.get("reasoning_effort")
        yield fields["method"]
        yield fields["path"]
        yield f"↑{bytes_text(fields['provider_request_bytes'])}"
        yield fields["model"] + (f"/{effort}" if effort else "")
        yield self.route_part(fields)
        yield "stream" if fields.get("stream") else ""
        yield f"max={fields['max_output_tokens']}" if fields.get("max_output_tokens") else ""
        yield from fields["request_hint_parts"]
        yield "capture" if fields.get("capture") else ""
        yield f"req={short_id(fields['request_id'])}"

    def wait_parts(self, fields: Json) -> Iterator[str]:
        """A stream that is silent for now."""
        yield f"idle={self.timed(fields['idle_ms'], span_text(fields['idle_ms'] / 1000))}"
        yield f"dur={span_text(fields['duration_ms'] / 1000)}"
        yield f"↓{bytes_text(fields['down'])}"
        yield f"chunks={fields['chunks']}"
        yield from self.place_parts(fields)
        yield self.state_part(fields)
        yield f"pending={fields['pending']}" if fields.get("pending") else ""
        yield f"req={short_id(fields['request_id'])}"

    def hdr_parts(self, fields: Json) -> Iterator[str]:
        """The head of an answer."""
        yield self.status_part(fields)
        yield fields.get("ct") or ""
        yield fields.get("te") or ""
        yield f"req={short_id(fields['request_id'])}"

    def status_part(self, fields: Json) -> str:
        """The status in its colour."""
        status = fields.get("status") or 0
        color = "green" if status < 300 else "yellow" if status < 400 else "red"
        return self.paint(str(status), color, True) if status else ""

    def timed(self, ms: int, text: str) -> str:
        """`text` in the colour of a duration."""
        return self.paint(
            text, "red" if ms >= self.error_ms else "yellow" if ms >= self.warn_ms else "green",
            ms >= self.warn_ms)

    def end_parts(self, fields: Json) -> Iterator[str]:
        """The end of an exchange, good or bad."""
        if not fields.get("provider"):
            yield f"{fields['method']} {fields['path']}"
        yield self.status_part(fields)
        ttfb, duration = fields.get("ttfb_ms"), fields.get("duration_ms") or 0
        if ttfb is not None:
            yield self.timed(max(ttfb, duration), f"lat[{secs_text(ttfb)}/{secs_text(duration)}]")
        else:
            yield f"dur={self.timed(duration, secs_text(duration))}"
        yield f"↑{bytes_text(fields['up'])}" if fields.get("up") else ""
        yield f"↓{bytes_text(fields['down'])}" if fields.get("down") else ""
        yield tokens_part(fields)
        effort = fields.get("reasoning_effort")
        yield (fields.get("model") or "") + (f"/{effort}" if effort else "")
        yield self.route_part(fields)
        yield (fields.get("ct") or "") if not fields.get("sse") else ""
        yield (f"stream[{fields['chunks']}/{bytes_text(fields['avg_chunk_bytes'])}]"
               if fields.get("sse") else "")
        yield from self.outcome_parts(fields)
        yield f"req={short_id(fields['request_id'])}"
        yield fields.get("err") or ""

    def state_part(self, fields: Json) -> str:
        """What a Responses provider says its answer is, in its colour."""
        state = fields.get("response_status")
        color = {"completed": "green", "failed": "red"}.get(state or "", "yellow")
        return f"state={self.paint(state, color)}" if state else ""

    def place_parts(self, fields: Json) -> Iterator[str]:
        """Which answer it is, and how far it has come."""
        yield f"resp=...{fields['response_id']}" if fields.get("response_id") else ""
        yield f"seq={fields['seq']}" if fields.get("seq") is not None else ""

    def outcome_parts(self, fields: Json) -> Iterator[str]:
        """What the provider's answer told of itself."""
        yield self.state_part(fields)
        if fields.get("service_tier") not in (None, "default", "standard"):
            yield f"tier={fields['service_tier']}"
        yield f"inc={fields['incomplete_reason']}" if fields.get("incomplete_reason") else ""
        yield f"err={fields['error_code']}" if fields.get("error_code") else ""
        yield f"param={fields['error_param']}" if fields.get("error_param") else ""
        yield rate_part(fields)
        yield codex_part(fields)
        yield from self.place_parts(fields)
        timeout = fields.get("timeout_ms")
        yield f"timeout={secs_text(timeout)}" if timeout is not None else ""
        items = {k: v for k, v in (fields.get("output_items") or {}).items()
                 if not k.startswith("stream_")}
        if items and items not in ({"message": 1}, {"text": 1}):
            yield f"out[{counts_text({OUTPUT_ALIASES.get(k, k): v for k, v in items.items()})}]"
        calls = fields.get("calls")
        if calls:
            yield f"calls[{counts_text({TOOL_ALIASES.get(k, k): v for k, v in calls.items()})}]"
        if tries := fields.get("attempts"):
            yield "tries[" + ",".join(f"{one['provider']}/{one['credential']}:{one['what']}"
                                      for one in tries) + "]"


def counts_text(counts: Mapping[str, int]) -> str:
    """fn:2,m:1"""
    return ",".join(f"{name}:{count}" for name, count in counts.items())


def tokens_part(fields: Json) -> str:
    """tok[↑in ↓out Σtotal $cache ?reasoning $rREAD $wWRITE], zeros left out."""
    signs = (("↑", "input"), ("↓", "output"), ("Σ", "tok"), ("$", "cache"), ("?", "reasoning"),
             ("$r", "cache_read"), ("$w", "cache_creation"))
    parts = [f"{sign}{count_text(fields[key])}" for sign, key in signs if fields.get(key)]
    return f"tok[{' '.join(parts)}]" if parts else ""


def rate_part(fields: Json) -> str:
    """rl[r:remaining/limit t:remaining/limit rr:reset rt:reset]"""
    parts = []
    for sign, what in (("r", "requests"), ("t", "tokens")):
        limit, left = (fields.get(f"rate_limit_limit_{what}"),
                       fields.get(f"rate_limit_remaining_{what}"))
        if limit is not None or left is not None:
            shown = [count_text(v) if v is not None else "-" for v in (left, limit)]
            parts.append(f"{sign}:{'/'.join(shown)}")
    for sign, what in (("rr", "requests"), ("rt", "tokens")):
        reset = fields.get(f"rate_limit_reset_{what}_ms")
        if reset:
            parts.append(f"{sign}:{span_text(reset / 1000)}")
    return f"rl[{' '.join(parts)}]" if parts else ""


def codex_part(fields: Json) -> str:
    """codex[p:42.5%/5h@10m s:... p/s:1.0%]"""
    parts = []
    for sign, window in (("p", "primary"), ("s", "secondary")):
        used = fields.get(f"codex_{window}_used_percent")
        if used is not None:
            minutes = fields.get(f"codex_{window}_window_minutes")
            reset = fields.get(f"codex_{window}_reset_after_secs")
            parts.append(f"{sign}:{used:.1f}%" + (f"/{span_text(minutes * 60)}" if minutes else "")
                         + (f"@{span_text(reset)}" if reset else ""))
    over = fields.get("codex_primary_over_secondary_percent")
    if over is not None:
        parts.append(f"p/s:{over:.1f}%")
    return f"codex[{' '.join(parts)}]" if parts else ""


def json_line(at: float, level: str, event: str, fields: Json) -> str:
    """The event as one JSON object."""
    text = time.strftime(f"%Y-%m-%dT%H:%M:%S.{int(at % 1 * 1000):03d}%z", time.localtime(at))
    stamp = f"{text[:-2]}:{text[-2:]}"
    return dump({"log_schema": "proxai.v1", "level": level, "event": event, "ts": stamp,
                 **fields}).decode("utf-8")


# -- writing -----------------------------------------------------------------

class LogFile(logging.handlers.RotatingFileHandler):
    """The file of the log. What cannot be written to it is lost, which is told once."""

    def __init__(self, settings: LoggingConfig, environ: Mapping[str, str]) -> None:
        self.told = False
        path = log_path(settings.file or "", environ)
        try:
            super().__init__(path, maxBytes=settings.file_max_bytes,
                             backupCount=settings.file_backups, encoding="utf-8",
                             errors="backslashreplace")
        except OSError as error:
            raise ConfigError([f"logging.file: cannot write {path}: {error.strerror}"],
                              "name a file in a folder that you may write to") from None

    def _open(self) -> Any:
        """The file, made for its owner alone."""
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors,
                    opener=lambda path, flags: os.open(path, flags, 0o600))

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell that the log cannot be written."""
        if not self.told:
            self.told = True
            with contextlib.suppress(OSError, ValueError):
                print(f"proxai: logging.file: cannot write {self.baseFilename}:"
                      f" {sys.exc_info()[1]}", file=sys.stderr)


def log_path(name: str, environ: Mapping[str, str]) -> Path:
    """Where the file `name` is: unless absolute within the app directory's logs, made for it."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return path
    base = app_directory(environ)
    with contextlib.suppress(OSError):  # opening the file will tell
        for folder in (base, base / "logs"):
            folder.mkdir(mode=0o700, parents=folder == base, exist_ok=True)
    return base / "logs" / path


Renderer = Callable[[float, str, str, Json], str | None]


def renderer(settings: LoggingConfig, color: bool) -> Renderer:
    """What makes a line of an event."""
    limits = settings.duration_thresholds
    return json_line if settings.output_format == "json" else HumanLines(
        color, limits.warn_ms, limits.error_ms, LEVELS[settings.level] <= logging.DEBUG).render


class Line(NamedTuple):
    """An event as it is shown, and as the file has it."""

    event: str
    shown: str
    kept: str


def has_color(stream: Any, settings: LoggingConfig, environ: Mapping[str, str]) -> bool:
    """Whether what goes to `stream` may have colour."""
    terminal = bool(getattr(stream, "isatty", bool)())
    return settings.use_color and terminal and not environ.get("NO_COLOR")


class LineWriter(logging.Handler):
    """Prints and files records on a thread of its own; drops lines while nobody reads them."""

    def __init__(self, stream: Any, settings: LoggingConfig, environ: Mapping[str, str]) -> None:
        super().__init__()
        color = has_color(stream, settings, environ)
        self.render, self.plain = renderer(settings, color), renderer(settings, False)
        # `wait` lines overwrite one another on a terminal
        self.in_place = color and settings.output_format != "json"
        self.file = LogFile(settings, environ) if settings.file else None
        self.stream, self.dropped = stream, 0
        self.open_line = self.gone = False  # whether the next overwrites it; nobody reads any more
        self.queue: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.write_lines, name="proxai-log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Render a record and queue its line."""
        fields = getattr(record, "fields", None)
        event = record.msg if fields is not None else "internal"
        if fields is None:  # a library's own words, such as asyncio's
            fields = {"source": record.name, "message": record.getMessage()[:2000]}
        if record.exc_info:
            fields = {**fields, "traceback": logging.Formatter().formatException(record.exc_info)}
        level = LEVEL_NAMES.get(record.levelno, "error")
        try:
            line = self.line(record.created, level, event, fields)
        except Exception:  # a line that cannot be rendered must not take a request with it
            line = self.line(time.time(), "error", "log-fault", {"lost": event})
        if line and self.queue.qsize() >= LOG_QUEUE_LINES:
            self.dropped += 1
        elif line:
            self.queue.put(line)

    def line(self, at: float, level: str, event: str, fields: Json) -> Line | None:
        """The line of an event; None where it has none."""
        shown = self.render(at, level, event, fields)
        if shown is None:
            return None
        kept = self.plain(at, level, event, fields) if self.file and self.in_place else None
        return Line(event, shown, kept or shown)

    def write_lines(self) -> None:
        """The thread: write what is queued until told to end."""
        while (item := self.queue.get()) is not None:
            more = None
            if self.dropped:
                fields, self.dropped = {"count": self.dropped}, 0
                more = self.line(time.time(), "warn", "log-lines-dropped", fields)
            for line in filter(None, (item, more)):
                if self.file:
                    self.file.handle(logging.makeLogRecord({"msg": line.kept}))
                self.show(line)
            if self.gone and not self.file:
                return
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()
        if self.file:
            self.file.close()

    def show(self, line: Line) -> None:
        """Print a line, while anybody reads."""
        if self.gone:
            return
        before = "\r\x1b[2K" if self.open_line else ""
        self.open_line = self.in_place and line.event == "wait"
        try:
            self.stream.write(before + line.shown + ("" if self.open_line else "\n"))
            if self.queue.empty():
                self.stream.flush()
        except (OSError, ValueError):
            self.gone = True

    def close(self) -> None:
        """Print what is left, for a little while."""
        self.queue.put(None)
        self.thread.join(2.0)
        super().close()


class Log:
    """The events of this program, at the levels that are on."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        # asked once, for it is asked for each request
        self.info_on = logger.isEnabledFor(logging.INFO)
        self.debug_on = logger.isEnabledFor(logging.DEBUG)

    def event(self, level: int, name: str, fields: Json) -> None:
        """Tell one event."""
        if self.logger.isEnabledFor(level):
            self.logger.log(level, name, extra={"fields": fields})


def start_log(settings: LoggingConfig, stream: Any,
              environ: Mapping[str, str]) -> tuple[Log, LineWriter]:
    """Send this program's events, and warnings of asyncio, to `stream`."""
    writer = LineWriter(stream, settings, environ)
    logging.addLevelName(TRACE, "TRACE")
    for name, level in (("proxai", LEVELS[settings.level]), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [writer]
        logger.propagate = False
        logger.setLevel(level)
    return Log(logging.getLogger("proxai")), writer



# ============================================================================
#  18  Captures
# ============================================================================
# The four phases of an exchange in files of the app directory: switches, the
# writer behind the event loop, retention, and reading them back.


class CaptureSwitches:
    """Which phases are captured from a request's start: as configured, unless overridden."""

    def __init__(self, settings: CaptureConfig) -> None:
        self.overrides: dict[str, bool | None] = dict.fromkeys(PHASES)
        self.configure(settings)

    def configure(self, settings: CaptureConfig) -> None:
        """Take the configuration's switches; what was overridden stays so."""
        self.defaults = {phase: bool(getattr(settings, f"{phase}_enabled")) for phase in PHASES}
        self.override("", None)

    def effective(self, phase: str) -> bool:
        """Whether a phase is captured now."""
        override = self.overrides[phase]
        return self.defaults[phase] if override is None else override

    def override(self, target: str, value: bool | None) -> None:
        """Override one phase, or `all`; None goes back to the configuration."""
        self.overrides |= {phase: value for phase in PHASES if target in (phase, "all")}
        self.active = frozenset(filter(self.effective, PHASES))  # asked for each request

    def status(self) -> Json:
        """Each phase as it is configured, overridden and in effect."""
        return {phase: {"default": self.defaults[phase], "override": self.overrides[phase],
                        "effective": self.effective(phase)} for phase in PHASES}


# -- what the files say ------------------------------------------------------

CAPTURE_STEMS = {phase: phase.replace("_", "-") for phase in PHASES}
CAPTURE_JSON = json.JSONEncoder(separators=(",\n", ": "))  # a line for each member
CAPTURE_FILE = re.compile(
    r"([0-9]{9,10})-([0-9A-Za-z]{1,40})-"
    rf"(?:exchange\.json|({'|'.join(PHASES).replace('_', '-')})"
    r"\.(?:metadata\.json|headers\.json|body\.(?:json|sse|bin)))")
# limits that providers tell in tokens are no secrets
SECRET_HEADER = re.compile(r"(?!.*(?:ratelimit|token-count))"
                           r".*(?:auth|cookie|credential|key|passw|secret|token)", re.IGNORECASE)
REDACTED = "<redacted>"


def shown_headers(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as a file may have them, names in lower case; of a repeated one the last, of a
    secret one only that it was there (contract 9.6)."""
    shown = {}
    for raw, value in fields:
        name = raw.decode("latin-1").lower()
        try:
            shown[name] = REDACTED if SECRET_HEADER.match(name) else value.decode()
        except UnicodeDecodeError:
            shown[name] = "<non-utf8>"
    return shown


def split_head(head: bytes) -> tuple[list[bytes], dict[str, str]]:
    """The words of the first line of a head of ours, and its headers as a file may have them."""
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    return first.split(b" "), shown_headers((name, value.strip()) for name, _, value in pairs)


def inbound_metadata(head: RequestHead, size: int | None) -> Json:
    """What is told of a client's request; `size` is None where its body was not read."""
    return {"method": head.method.decode("ascii"), "path": head.path + head.query,
            "headers": shown_headers((field.name, field.value) for field in head.fields),
            "inbound_request_body_bytes": size}


def provider_metadata(origin: str, head: bytes, body: bytes, asked: bytes | None) -> Json:
    """What is told of a provider request, made from the client's body `asked`."""
    (method, target, *_), headers = split_head(head)
    url = (origin if target.startswith(b"/") else "") + target.decode("ascii")
    return {"method": method.decode("ascii"), "url": url, "headers": headers,
            "provider_request_body_bytes": len(body), "normalized": body != asked}


def upstream_metadata(head: ResponseHead, ttfb_ms: int) -> Json:
    """What is told of a provider's answer."""
    headers = shown_headers((field.name, field.value) for field in head.fields)
    return {"status": head.status, "content_type": headers.get("content-type"),
            "content_length": head.length if head.length != -1 else None,
            "transfer_encoding": headers.get("transfer-encoding"), "ttfb_ms": ttfb_ms,
            "headers": headers}


def outbound_metadata(head: bytes) -> Json:
    """What is told of the answer that the client got."""
    words, headers = split_head(head)
    return {"status": int(words[1]), "content_type": headers.get("content-type"),
            "headers": headers}


def surplus(kept: Mapping[str, Mapping[str, int]], busy: Collection[str], files: int,
            size: int) -> list[str]:
    """The oldest exchanges, without the busy ones, that must go to be rid of so many files and
    bytes; `kept` has the sizes of the files of each, the oldest first."""
    gone = []
    for prefix, sizes in kept.items():
        if files <= 0 and size <= 0:
            break
        if prefix not in busy:
            gone.append(prefix)
            files -= len(sizes)
            size -= sum(sizes.values())
    return gone


# -- writing -----------------------------------------------------------------

class Piece(NamedTuple):
    """Something of a phase on its way to the files. What `make` gives begins the phase, anew
    where it has begun; `data` is of a body that is `json`, `sse` or `bin`. Without a phase it
    is the end."""

    capture: Capture
    phase: str
    make: Callable[[], Json] | None = None
    data: bytes = b""
    kind: str = "json"


class Capture:
    """What is captured of one request. The event loop hands over what it has as it is; the
    thread of the store makes files of it."""

    def __init__(self, store: CaptureStore, id: int, phases: Collection[str],
                 head: RequestHead) -> None:
        self.store, self.phases = store, phases
        self.id, self.prefix = str(id), f"{id // 1_000_000}-{id}"  # the id is in microseconds
        self.head: RequestHead | None = head  # until it is told
        self.asked: bytes | None = None  # the client's body, until the provider request is told
        self.kind = self.upstream_kind = "bin"
        self.record: Json | None = None  # of the exchange, at its end
        self.begun = False  # whether the thread knows of it
        self.halted = False  # a piece was dropped, and what follows would be torn
        self.failed = False  # the thread could not write

    def put(self, piece: Piece) -> None:
        """Hand a piece over."""
        if piece.phase not in self.phases or self.halted:
            return
        if self.store.offer(piece):
            self.begun = True
        else:
            self.halted = True
            self.store.tell_drop(self.id, piece.phase)

    def inbound(self, body: bytes | None) -> None:
        """The client's request; None where its body was not read."""
        assert self.head
        make = functools.partial(inbound_metadata, self.head, None if body is None else len(body))
        self.put(Piece(self, PHASES[0], make, body or b""))
        self.head, self.asked = None, body

    def provider(self, origin: str, head: bytes, body: bytes) -> None:
        """The request for a provider at `origin`."""
        make = functools.partial(provider_metadata, origin, head, body, self.asked)
        self.put(Piece(self, PHASES[1], make, body))
        self.asked = None

    def upstream(self, head: ResponseHead, ttfb_ms: int) -> None:
        """The provider's answer begins."""
        self.upstream_kind = "sse" if is_event_stream(head.values.get(b"content-type")) else "bin"
        self.put(Piece(self, PHASES[2], functools.partial(upstream_metadata, head, ttfb_ms)))

    def upstream_part(self, data: bytes) -> None:
        """Bytes of the provider's answer."""
        self.put(Piece(self, PHASES[2], data=data, kind=self.upstream_kind))

    def outbound(self, head: bytes, body: bytes) -> None:
        """The client's answer begins."""
        self.kind = "sse" if b"\r\ncontent-type: text/event-stream\r\n" in head else "bin"
        self.put(Piece(self, PHASES[3], functools.partial(outbound_metadata, head), body,
                       self.kind))

    def outbound_part(self, data: bytes) -> None:
        """Bytes of the client's answer."""
        self.put(Piece(self, PHASES[3], data=data, kind=self.kind))

    def end(self) -> None:
        """The exchange is over."""
        if self.head:
            self.inbound(None)
        self.halted = True
        if self.begun:
            self.store.queue.put(Piece(self, ""))


class CaptureStore:
    """The captures of a proxy. One thread writes them, from the first one on; when it cannot
    follow, or the disk is full, captures suffer and requests do not."""

    def __init__(self, settings: CaptureConfig, directory: Path, log: Log) -> None:
        self.settings, self.directory, self.log = settings, directory, log
        self.switches, self.dropped = CaptureSwitches(settings), 0
        self.queue: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self.quiet_until = 0.0  # when a drop is told again
        self.offered = self.written = 0  # bytes; each is counted by one thread only
        self.thread: threading.Thread | None = None
        self.closing = False
        self.folder = f"{directory}{os.sep}"
        # the rest is the thread's: prefix -> file -> bytes, the oldest first, and the totals
        self.kept: dict[str, dict[str, int]] = {}
        self.busy: set[str] = set()
        self.files = self.bytes = 0

    def configure(self, settings: CaptureConfig) -> None:
        """Hold to these settings from now on."""
        self.settings = settings
        self.switches.configure(settings)

    def status(self) -> Json:
        """Where captures go, which phases are captured, how many captures are torn."""
        return {"directory": str(self.directory), "phases": self.switches.status(),
                "dropped": self.dropped}

    def begin(self, id: int, head: RequestHead) -> Capture | None:
        """The capture of a request that starts; None where it is off or would be torn."""
        phases = self.switches.active
        if not phases:
            return None
        if self.queue.qsize() >= CAPTURE_QUEUE_PIECES // 2:
            self.tell_drop(str(id), "all")
            return None
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, name="proxai-capture", daemon=True)
            self.thread.start()
        return Capture(self, id, phases, head)

    def offer(self, piece: Piece) -> bool:
        """Queue a piece, if it fits."""
        waiting, size = self.offered - self.written, len(piece.data)
        if (self.queue.qsize() >= CAPTURE_QUEUE_PIECES
                or (waiting and waiting + size > CAPTURE_QUEUE_BYTES)):
            return False
        self.offered += size
        self.queue.put(piece)
        return True

    def tell_drop(self, request_id: str, phase: str) -> None:
        """A capture is torn; where there are many of those, a line tells of some."""
        self.dropped += 1
        now = time.monotonic()
        if now >= self.quiet_until:
            self.quiet_until = now + CAPTURE_DROP_SECS
            self.log.event(logging.WARNING, "capture_drop", {
                "request_id": request_id, "kind": phase, "dropped": self.dropped,
                "reason": "the queue to the disk is full"})

    def close(self) -> None:
        """Write out what is queued, for a little while."""
        if self.thread:
            self.closing = True
            self.queue.put(None)
            self.thread.join(CAPTURE_CLOSE_SECS)

    # -- the thread

    def work(self) -> None:
        """Write what is queued until told to end."""
        self.scan()
        while self.write_some():
            pass

    def write_some(self) -> bool:
        """Wait for pieces, write each file in one go, then rest a while; whether more may come."""
        taken, phases = [self.queue.get()], defaultdict(list)
        begun = time.perf_counter()
        with contextlib.suppress(queue.Empty):
            while taken[-1] and len(taken) < CAPTURE_QUEUE_PIECES:
                taken.append(self.queue.get_nowait())
        for piece in filter(None, taken):
            phases[piece.capture, piece.phase].append(piece)
        for (capture, phase), pieces in phases.items():
            self.save(capture, phase, pieces)
            self.written += sum(len(piece.data) for piece in pieces)
        if not self.closing:  # the event loop wants the interpreter too
            least, most = CAPTURE_REST_SECS
            time.sleep(min(max(CAPTURE_REST * (time.perf_counter() - begun), least), most))
        return taken[-1] is not None

    def scan(self) -> None:
        """Learn what is in the folder."""
        with contextlib.suppress(OSError):
            for entry in sorted(os.scandir(self.directory), key=lambda entry: entry.name):
                if found := CAPTURE_FILE.fullmatch(entry.name):
                    end = found.end(2)
                    self.count(entry.name[:end], entry.name[end + 1:],
                               entry.stat(follow_symlinks=False).st_size)

    def count(self, prefix: str, name: str, size: int) -> None:
        """A file is there, or has grown."""
        sizes = self.kept.setdefault(prefix, {})
        self.files += name not in sizes
        self.bytes += size
        sizes[name] = sizes.get(name, 0) + size

    def forget(self, prefix: str, name: str) -> None:
        """Remove a file."""
        self.files -= 1
        self.bytes -= self.kept[prefix].pop(name)
        with contextlib.suppress(OSError):
            os.unlink(f"{self.folder}{prefix}-{name}")

    def save(self, capture: Capture, phase: str, pieces: Sequence[Piece]) -> None:
        """Write pieces of a phase; what fails is told once, and ends the capture."""
        try:
            if not capture.failed and phase:
                self.busy.add(capture.prefix)
                self.write_phase(capture, phase, pieces)
            elif not phase:
                self.finish(capture)
        except Exception as error:  # the thread goes on, for the other captures
            capture.failed = True
            said = error.strerror if isinstance(error, OSError) else type(error).__name__
            self.log.event(logging.WARNING, "capture_failed", {
                "request_id": capture.id, "kind": phase or "exchange",
                "error": f"{said}: {self.directory}"})

    def write_phase(self, capture: Capture, phase: str, pieces: Sequence[Piece]) -> None:
        """Write pieces of a phase."""
        stem = CAPTURE_STEMS[phase]
        start = max((at for at, piece in enumerate(pieces) if piece.make), default=0)
        if make := pieces[start].make:
            for name in [n for n in self.kept.get(capture.prefix, ()) if n.startswith(stem)]:
                self.forget(capture.prefix, name)
            what = "metadata" if phase.endswith("request") else "headers"
            self.write(capture, f"{stem}.{what}.json",
                       CAPTURE_JSON.encode({"request_id": capture.id, **make()}).encode())
        if body := b"".join([piece.data for piece in pieces[start:]]):
            self.write(capture, f"{stem}.body.{pieces[-1].kind}", body)

    def finish(self, capture: Capture) -> None:
        """Write the record of an exchange that is over, and tell what there is of it."""
        self.busy.discard(capture.prefix)
        sizes = self.kept.get(capture.prefix)
        if not sizes or capture.failed:
            return
        for phase, stem in CAPTURE_STEMS.items() if self.log.info_on else ():
            if names := [name for name in sizes if name.startswith(stem)]:
                self.log.event(logging.INFO, "capture", {
                    "request_id": capture.id, "kind": phase,
                    "paths": [f"{capture.prefix}-{name}" for name in names],
                    "bytes": sum(sizes[name] for name in names)})
        self.write(capture, "exchange.json", CAPTURE_JSON.encode(capture.record or {}).encode())

    def write(self, capture: Capture, name: str, data: bytes) -> None:
        """Append to a file, made where it is not there yet, and keep the limits."""
        prefix, handle = capture.prefix, self.open(capture.prefix, name)
        try:
            self.count(prefix, name, 0)
            rest = memoryview(data)
            while rest:
                done = os.write(handle, rest)
                self.count(prefix, name, done)
                rest = rest[done:]
        finally:
            os.close(handle)
        most = self.settings.max_total_bytes
        files, size = self.files - self.settings.max_files, self.bytes - most
        if files > 0 or size > 0:
            for old in surplus(self.kept, {*self.busy, prefix}, files, size):
                for each in list(self.kept[old]):
                    self.forget(old, each)
                del self.kept[old]
            if self.bytes > most:
                raise OSError(0, f"more than capture.max_total_bytes = {most}")

    def open(self, prefix: str, name: str) -> int:
        """A file that can be appended to; a new one is for the owner only."""
        path, flags = f"{self.folder}{prefix}-{name}", os.O_WRONLY | getattr(os, "O_BINARY", 0)
        if name in self.kept.get(prefix, ()):
            return os.open(path, flags | os.O_APPEND)
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            for folder in (self.directory.parent, self.directory):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)


# -- switches in the configuration file --------------------------------------

TOML_TABLE_END = re.compile(r"^(?:[ \t]*(?:#.*)?\r?\n)*(?=[ \t]*\[|\Z)", re.M)
TOML_BRACE = re.compile(r"(\{)?[ \t]*\}")  # that ends an inline table


def set_capture_keys(text: str, values: Mapping[str, bool]) -> str:
    """A TOML text with keys of `capture` set and all else as it was; ConfigError where it fails."""
    try:
        wanted = tomllib.loads(text)
        for key, value in values.items():
            wanted["capture"] = {**mapping(wanted.get("capture")), key: value}
            text = next(edited for edited in capture_edits(text, key, toml_value(value))
                        if reads_as(edited, wanted))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"not valid TOML: {error}"], RECOVERY) from None
    except StopIteration:
        raise ConfigError(["[capture] is written in a way that cannot be edited from here"],
                          "set by hand, in [capture]: " + ", ".join(
                              f"{key} = {toml_value(value)}"
                              for key, value in values.items())) from None
    return text


def capture_edits(text: str, key: str, value: str) -> Iterator[str]:
    """The ways to set a key of `capture` in a TOML text, as far as a text can tell: strings and
    comments may look like statements, so a parser must say which of them is right."""
    yield text
    end, statement = "\r\n" if "\r\n" in text else "\n", f"{key} = {value}"
    for found in re.finditer(rf"\b{key}[\"']?[ \t]*=[ \t]*([^\s#,}}]+)", text):
        yield text[:found.start(1)] + value + text[found.end(1):]
    text += end if text and not text.endswith("\n") else ""
    name = r"""[ \t]*["']?capture["']?[ \t]*"""
    for table in re.finditer(rf"^[ \t]*\[{name}\]", text, re.M):  # behind its last statement
        for found in TOML_TABLE_END.finditer(text, table.end()):
            yield f"{text[:found.start()]}{statement}{end}{text[found.start():]}"
    for line in re.finditer(rf"^{name}=.*", text, re.M):
        for found in TOML_BRACE.finditer(text, *line.span()):
            yield f"{text[:found.start()]}{found[1] or ','} {statement} }}{text[found.end():]}"
    for found in re.finditer(rf"^{name}\..*\n", text, re.M):
        yield f"{text[:found.end()]}capture.{statement}{end}{text[found.end():]}"
    yield f"{text}{end if text.strip() else ''}[capture]{end}{statement}{end}"


def reads_as(text: str, tables: Json) -> bool:
    """Whether a text is the TOML of these tables."""
    try:
        return tomllib.loads(text) == tables
    except ValueError:
        return False


def replace_file(path: Path, text: str) -> None:
    """Put a text in the place of a file's, at once and with the same rights; a link stays one."""
    target = Path(os.path.realpath(path))
    try:
        write_private(target, text.encode("utf-8"), stat.S_IMODE(target.stat().st_mode))
    except OSError as error:
        raise ConfigError([f"cannot write {path}: {error.strerror}"]) from None


# -- reading them back -------------------------------------------------------

CAPTURE_READ_BYTES = 64 << 20  # of one file; a request body is at most 50 MiB by default
SHOWN_LINES, SHOWN_CHARS = 20_000, 2 << 20  # of one body that is shown
DIFF_LINES, DIFF_PAIRS = 4000, 10_000  # on each side, and equal ones: difflib gets slow with both


class StoredCapture(NamedTuple):
    """The files of one exchange by phase, those of its record under `exchange`."""

    prefix: str
    id: str
    files: dict[str, list[str]]


class CapturedPhase(NamedTuple):
    """What was kept of one phase; `cut` tells that the body is longer than what is read."""

    head: Json | None
    body: bytes | None
    cut: bool
    files: list[str]

    @property
    def sse(self) -> bool:
        """Whether the body is an event stream."""
        return any(name.endswith(".sse") for name in self.files)


class CapturedExchange(NamedTuple):
    """A stored exchange; `phases` has those that were captured."""

    id: str
    record: Json | None
    phases: dict[str, CapturedPhase]


def captures_directory(environ: Mapping[str, str]) -> Path:
    """Where captures are."""
    return app_directory(environ) / "captures"


def stored_captures(directory: Path) -> list[StoredCapture]:
    """The exchanges that have files in a directory, newest first; other files are passed over."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([f"cannot read {directory}: {error.strerror}"]) from None
    found: dict[str, StoredCapture] = {}
    for name in names:
        if match := CAPTURE_FILE.fullmatch(name):
            prefix = name[:match.end(2)]
            stored = found.setdefault(prefix, StoredCapture(prefix, match[2], {}))
            phase = (match[3] or "exchange").replace("-", "_")
            stored.files.setdefault(phase, []).append(name)
    return sorted(found.values(), reverse=True, key=lambda stored: (
        int(stored.prefix.partition("-")[0]), len(stored.id), stored.id))


def find_capture(directory: Path, word: str) -> StoredCapture:
    """The exchange with an id, or with an id that ends so: in full, or as the log shortens it."""
    captures = stored_captures(directory)
    found = [stored for stored in captures if word in (stored.id, stored.prefix)]
    if not found and len(word) >= 4:
        found = [stored for stored in captures
                 if stored.id.endswith(word) or short_id(stored.id).endswith(word.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError([f"the id {printable(word)} is that of {len(found)} captures: "
                           + ", ".join(stored.id for stored in found[:5])], "give more of it")
    raise ConfigError([f"there is no capture with the id {printable(word)} in {directory}"],
                      "`proxai.py captures` lists them; the last four characters of an id are the"
                      " least to give")


def read_captured(path: Path, limit: int = CAPTURE_READ_BYTES) -> bytes | None:
    """A file, up to one byte more than `limit`; None where a running proxy has removed it."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None


def read_captured_json(path: Path) -> Json | None:
    """The JSON object in a file of ours; None where it has gone meanwhile."""
    if (raw := read_captured(path)) is None:
        return None
    try:
        value = load(raw)
    except ValueError as error:
        raise ConfigError([f"{path} is damaged, it is not JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise ConfigError([f"{path} is damaged, it is not a JSON object"])
    return value


def read_record(directory: Path, stored: StoredCapture) -> Json | None:
    """The record of an exchange; None where it has none (yet)."""
    names = stored.files.get("exchange")
    return read_captured_json(directory / names[0]) if names else None


def read_capture(directory: Path, word: str, limit: int = CAPTURE_READ_BYTES) -> CapturedExchange:
    """A stored exchange by its id (see `find_capture`), of each body `limit` bytes."""
    stored, phases = find_capture(directory, word), {}
    for phase in PHASES:
        head = body = None
        names = stored.files.get(phase, [])
        for name in names:
            if ".body." in name:
                body = read_captured(directory / name, limit)
            else:
                head = read_captured_json(directory / name)
        if head is not None or body is not None:
            phases[phase] = CapturedPhase(head, body and body[:limit],
                                          len(body or b"") > limit, names)
    record = read_record(directory, stored)
    if not phases and record is None:
        raise ConfigError([f"the capture {stored.id} was removed while it was read"])
    return CapturedExchange(stored.id, record, phases)


# -- looking at them ---------------------------------------------------------

def pretty(value: Any) -> str:
    """JSON for people."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=2)
    except RecursionError:
        return "(nested too deeply to show)"


def loaded(raw: bytes) -> Any:
    """The JSON value of a text, ABSENT where it is none."""
    try:
        return load(raw)
    except ValueError:
        return ABSENT


def stream_events(raw: bytes) -> Iterator[Event]:
    """The events of a whole stream."""
    return filter(None, map(parse_event, split_events(raw)))


def body_text(body: bytes, sse: bool, view: Callable[[Any], Any] = lambda value: value) -> str:
    """A body for people: JSON spread out, event by event; `view` is what to show of a value."""
    if sse:
        return "\n\n".join(f"event: {event.name}\n{body_text(event.data.encode(), False, view)}"
                           for event in stream_events(body))
    value = loaded(body)
    if value is not ABSENT:
        return pretty(view(value))
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # cut within a character
            return body[:error.start].decode("utf-8")
        return f"({len(body)} bytes that are no text)"


# What differs from one answer to the next though nothing has changed.
VOLATILE_KEYS = frozenset((
    "id", "created", "created_at", "completed_at", "item_id", "response_id", "call_id",
    "tool_call_id", "tool_use_id", "request_id", "system_fingerprint", "obfuscation"))


def settled(value: Any) -> Any:
    """JSON without what differs each time."""
    if isinstance(value, dict):
        return {key: f"<{key}>" if key in VOLATILE_KEYS and item is not None else settled(item)
                for key, item in value.items()}
    return [settled(item) for item in value] if isinstance(value, list) else value


def shown_lines(text: str, lines: int = SHOWN_LINES) -> list[str]:
    """The lines of a text as a terminal can have them, so many at most."""
    rows = text[:SHOWN_CHARS].split("\n")
    cut = len(rows) > lines or len(text) > SHOWN_CHARS
    return [*map(printable, rows[:lines]), *["(cut here; the file has the rest)"] * cut]


def masked(name: str, value: Any) -> str:
    """A header's value, unless its name says that it is a secret."""
    return REDACTED if SECRET_HEADER.match(name) else printable(text_of(value))


def headers_of(phase: CapturedPhase | None) -> dict[str, str]:
    """The headers of a phase, secrets masked."""
    headers = mapping(mapping(phase.head if phase else None).get("headers"))
    return {name.lower(): masked(name, value) for name, value in headers.items()}


def phase_lines(name: str, phase: CapturedPhase) -> list[str]:
    """One phase to read: what is known of it, its headers, its body."""
    told = [f"{key}: {printable(str(value))}" for key, value in (phase.head or {}).items()
            if key not in ("headers", "request_id") and value is not None]
    headers = [f"{key}: {value}" for key, value in headers_of(phase).items()]
    body, size = phase.body or b"", f"body, {len(phase.body or b'')} bytes"
    text = ("\n".join(f"{event.name}  {event.data}" for event in stream_events(body))
            if phase.sse else body_text(body, False))
    shown = [size + (", and more in the file" if phase.cut else "") + ":",
             *shown_lines(text)] if body else ["no body"]
    return [f"== {name} ==", *told, "", *headers, "", *shown, ""]


def capture_lines(capture: CapturedExchange) -> list[str]:
    """A stored exchange to read, phase by phase."""
    lines = [f"== exchange {capture.id} =="]
    lines += [f"{key}: {printable(value if isinstance(value, str) else toml_value(value))}"
              for key, value in (capture.record or {}).items() if value not in (None, "", [])]
    lines.append("")
    for name in PHASES:
        phase = capture.phases.get(name)
        lines += phase_lines(name, phase) if phase else [not_captured(name), ""]
    return lines


def not_captured(phase: str) -> str:
    """What to do about a phase that was not captured."""
    return (f"{phase} was not captured; `proxai.py capture enable {phase}` has it captured from"
            " now on")


def diff_of(before: str, after: str, names: Sequence[str]) -> list[str]:
    """The unified diff of two texts; of long ones, of their beginnings."""
    limit = DIFF_LINES
    while True:
        old, new = shown_lines(before, limit), shown_lines(after, limit)
        counts = Counter(new)
        if sum(counts[line] for line in old if counts[line] <= limit // 100 + 1) <= DIFF_PAIRS:
            return list(difflib.unified_diff(old, new, names[0], names[1], lineterm=""))
        limit //= 2


DIFFS = {"request": PHASES[:2], "response": PHASES[2:]}


def capture_diff(capture: CapturedExchange, names: Sequence[str]) -> list[str]:
    """The unified diff of the bodies of two captured phases; nothing where one is missing."""
    phases = [capture.phases.get(name) for name in names]
    texts = [body_text(phase.body or b"", phase.sse) for phase in phases if phase]
    return diff_of(texts[0], texts[1], names) if len(texts) == 2 else []


def header_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """How two sets of headers differ, a line for each name."""
    return [f"{sign}{name}: {headers[name]}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)
            for sign, headers in (("-", before), ("+", after)) if name in headers]


def difference_lines(capture: CapturedExchange) -> list[str]:
    """What the proxy changed between the client and the provider, and on the way back."""
    lines = []
    for title, names in DIFFS.items():
        found = [not_captured(name) for name in names if name not in capture.phases]
        if not found:
            before, after = (headers_of(capture.phases[name]) for name in names)
            changed, body = header_changes(before, after), capture_diff(capture, names)
            found = ["headers:", *changed] if changed else ["headers: no difference"]
            found += ["body:", *body] if body else ["body: no difference"]
        lines += [f"== {title}: {names[0]} -> {names[1]} ==", *found, ""]
    return lines


def capture_summary(directory: Path, stored: StoredCapture) -> Json:
    """What a list says of a stored exchange: its record, where it has one that can be read."""
    try:
        record = read_record(directory, stored) or {}
    except ConfigError:
        record = {"outcome": "damaged"}
    at = time.gmtime(int(stored.prefix.partition("-")[0]))
    return {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", at), **record, "id": stored.id,
            "prefix": stored.prefix, "phases": [name for name in PHASES if name in stored.files]}


def list_captures(directory: Path, limit: int) -> list[Json]:
    """The newest stored exchanges, so many at most."""
    return [capture_summary(directory, stored) for stored in stored_captures(directory)[:limit]]


def capture_row(summary: Json) -> list[str]:
    """A stored exchange in a list: time, id (short too), protocols, models, status, outcome."""
    pairs = [" -> ".join(dict.fromkeys(filter(None, (text_of(summary.get(key)) for key in keys))))
             for keys in (("protocol", "provider_protocol"), ("model", "upstream_model"))]
    return [printable(str(cell or "-")) for cell in (
        summary["at"], summary["id"], short_id(summary["id"]), *pairs, summary.get("status"),
        summary.get("outcome"))]


CAPTURE_JSON_BYTES = 1 << 20  # of one body in the answer of the control listener


def capture_json(capture: CapturedExchange) -> Json:
    """A stored exchange for programs."""
    phases: Json = {}
    for name, phase in capture.phases.items():
        text = None if phase.body is None else body_text(phase.body, phase.sse)
        cut = phase.cut or len(text or "") > CAPTURE_JSON_BYTES
        phases[name] = {"head": phase.head and {**phase.head, "headers": headers_of(phase)},
                        "body": text and text[:CAPTURE_JSON_BYTES],
                        "files": phase.files} | ({"truncated": True} if cut else {})
    return {"id": capture.id, "record": capture.record, "phases": phases,
            "diffs": {name: capture_diff(capture, names) for name, names in DIFFS.items()}}

# -- exporting them ----------------------------------------------------------
#   kept      structure, numbers, ids, names of tools and parameters, the words of KEPT_KEYS
#   filled    every other text: a filler for each character that is no blank; JSON in a text stays
#             JSON, pieces of it stay those pieces, base64 stays base64

FILLER = "A"  # nothing but zeros as base64
FILLED = re.compile(r"[^\s=]")
KEPT_START = re.compile(r"(?:data:[\w.+/-]{1,100};base64,|https?://)?")
KEPT_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_.$-]{0,63}")
KEPT_WORD = re.compile(r"[A-Za-z0-9_$#][A-Za-z0-9_.:/@#$\[\]+-]{0,255}")
KEPT_KEYS = frozenset((
    "type", "role", "model", "id", "call_id", "tool_call_id", "tool_use_id", "item_id", "name",
    "namespace", "object", "status", "phase", "stop_reason", "finish_reason", "effort",
    "reasoning_effort", "verbosity", "service_tier", "summary", "detail", "media_type",
    "tool_choice", "mode", "truncation", "include", "modalities", "required", "syntax", "ttl",
    "format", "$ref"))
# Keys that hold a word in one place and a text in another: the words.
KEPT_VALUES = {"summary": ("auto", "concise", "detailed"), "detail": ("auto", "low", "high")}
# What is in these is somebody's own, whatever it looks like.
FREE_KEYS = frozenset(("metadata", "arguments", "input", "default", "const", "examples", "enum",
                       "logit_bias", "bytes", "variables"))
NAMING_KEYS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
KEPT_HEADERS = ("content-type", "accept", "anthropic-version", "anthropic-beta", "openai-beta",
                "retry-after", "content-encoding", "transfer-encoding")
KEPT_OF_HEAD = ("method", "path", "status", "content_type", "ttfb_ms")
JSON_PIECE = re.compile(
    r'"((?:[^"\\]|\\.)*)("\s*:|"|\\?\Z)|true|false|null|(-?[0-9.]+)([eE][+-]?[0-9]+)?'
    r'|[^\s\[\]{}:,"]', re.DOTALL)


def filled(text: str) -> str:
    """A filler as long as `text`."""
    start = KEPT_START.match(text).end()  # type: ignore[union-attr]
    return text[:start] + FILLED.sub(FILLER, text[start:])


def filled_json(text: str) -> str:
    """A filler for JSON that may be unfinished: the same members, other values of their length."""
    def piece(found: re.Match[str]) -> str:
        if found[1] is not None:
            kept = found[2].endswith(":") and KEPT_NAME.fullmatch(found[1])
            return f'"{found[1] if kept else FILLER * len(found[1])}{found[2]}'
        if found[3]:
            return re.sub("[0-9]", "1", found[3]) + (found[4] or "")
        return found[0] if len(found[0]) > 1 else FILLER

    return JSON_PIECE.sub(piece, text)


class Sanitizer:
    """Replaces what people and models wrote in a JSON value, or in the events of a stream, whose
    pieces of arguments are put together for that."""

    def __init__(self) -> None:
        # where pieces stand that belong together, by the indexes around them
        self.pieces: dict[Any, list[tuple[Json, str, str]]] = defaultdict(list)

    def stream(self, events: Iterable[Event]) -> list[Json]:
        """The events of a stream."""
        out = []
        for event in events:
            value = loaded(event.data.encode())
            out.append({
                "event": event.name if KEPT_WORD.fullmatch(event.name) else filled(event.name),
                "data": self.value(value, place=(0,)) if value is not ABSENT else
                event.data if event.data == DONE else filled(event.data)})
        for pieces in self.pieces.values():
            text = filled_json("".join(piece for _, _, piece in pieces))
            for holder, name, piece in pieces:
                holder[name], text = text[:len(piece)], text[len(piece):]
        return out

    def value(self, value: Any, key: str = "", free: bool = False, place: Any = ()) -> Any:
        """A JSON value under `key`; in a `free` one nothing is structure. `place` holds the
        indexes around it, of a value in a stream."""
        if isinstance(value, dict):
            return self.members(value, key, free, place)
        if isinstance(value, list):
            return [self.value(item, key, free, place) for item in value]
        if isinstance(value, str):
            kept = (not free and key in KEPT_KEYS and KEPT_WORD.fullmatch(value)
                    and value in KEPT_VALUES.get(key, (value,)))
            return (value if kept else
                    filled_json(value) if key in ("arguments", "partial_json") else filled(value))
        return 1 if free and type(value) in (int, float) else value

    def members(self, value: Json, key: str, free: bool, place: Any) -> Json:
        """The members of an object; their names decide nothing where `key` is of NAMING_KEYS."""
        if place:
            place += tuple(value[name] for name in ("index", "output_index")
                           if type(value.get(name)) is int)
        out: Json = {}
        kind = value.get("type")
        for name, item in value.items():
            new = name if KEPT_NAME.fullmatch(name) else filled(name)
            while new in out:
                new += FILLER
            word = "" if key in NAMING_KEYS else name
            if word == "name" and "role" in value:  # of a person
                word = ""
            if word == "code" and "message" in value:  # of an error
                word = "type"
            out[new] = self.value(item, word, free or (word in FREE_KEYS and (
                word != "input" or isinstance(item, dict))), place)
            if place and isinstance(item, str) and (
                    name == "partial_json" or (name == "arguments" and kind is None)
                    or (name == "delta" and text_of(kind).endswith("arguments.delta"))):
                self.pieces[place].append((out, new, item))
        return out


def exported_phase(phase: CapturedPhase, sanitize: bool) -> Json:
    """The head and the body of a phase for a fixture."""
    head, body = phase.head or {}, phase.body or b""
    headers = headers_of(phase)
    if sanitize:
        head = {key: head[key] for key in KEPT_OF_HEAD if key in head}
        if "path" in head:
            head["path"] = text_of(head["path"]).partition("?")[0]
        headers = {name: value for name, value in headers.items() if name in KEPT_HEADERS}
    out: Any = None
    if phase.sse:
        events = stream_events(body)
        out = (Sanitizer().stream(events) if sanitize else
               [{"event": event.name, "data": event.data if value is ABSENT else value}
                for event in events for value in [loaded(event.data.encode())]])
    elif body:
        value = loaded(body)
        out = body.decode("utf-8", "replace") if value is ABSENT else value
        out = Sanitizer().value(out) if sanitize else out
    return {"head": {**head, "headers": headers}, "body": out}


def fixture(capture: CapturedExchange, sanitize: bool) -> Json:
    """An exchange as one JSON value, to keep as a test or, sanitized, to show to others."""
    large = [name for name, phase in capture.phases.items() if phase.cut]
    if large:
        raise ConfigError([f"the body of {large[0]} is too large to export"])
    record = capture.record or {}
    path, protocol = request_place(capture)
    if sanitize:
        record = {**record, "path": path, "error": filled(text_of(record.get("error"))) or None,
                  "dropped": [name if KEPT_WORD.fullmatch(name) else filled(name)
                              for name in map(str, listing(record.get("dropped")))]}
    out = {"id": capture.id, "protocol": record.get("protocol") or protocol,
           "provider_protocol": record.get("provider_protocol"), "path": path, "record": record}
    return out | {name: phase and exported_phase(phase, sanitize)
                  for name in PHASES for phase in [capture.phases.get(name)]}


def request_place(capture: CapturedExchange) -> tuple[str, str | None]:
    """The path of a stored request without its query, and the protocol it is of."""
    heads = [mapping(phase.head) for phase in capture.phases.values()]
    found = [text_of(said.get("path")) for said in ((capture.record or {}), *heads)]
    path = next(filter(None, found), "").partition("?")[0]
    protocol = MESSAGES if path in COUNT_PATHS else MODEL_PATHS.get(path)
    return path, protocol and protocol.name



# ============================================================================
#  19  Upstream
# ============================================================================
# Connections to providers: forward proxies, TLS, the pool, one request and its
# answer's bytes. Knows HTTP, does not know clients, protocols or JSON.

# -- time limits -------------------------------------------------------------

class Watch:
    """One time limit at a time; `fire` is called with the reason of the one that ran out.

    Setting a limit only notes it. The loop's timer is moved when it fires too early, so a limit
    that is set for each read costs two assignments and not two heap operations.
    """

    __slots__ = ("due", "fire", "loop", "progress", "reason", "secs", "timer", "when")

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Callable[[str], None]) -> None:
        self.loop, self.fire = loop, fire
        self.timer: asyncio.TimerHandle | None = None
        self.due = self.when = FOREVER
        self.secs, self.reason = 0.0, ""
        self.progress: Callable[[], bool] | None = None

    def arm(self, secs: float, reason: str, progress: Callable[[], bool] | None = None) -> None:
        """From now on, `secs` for what `reason` names, and again while there is `progress`."""
        self.secs, self.reason, self.progress = secs, reason, progress
        self.when = when = self.loop.time() + secs
        if when < self.due:
            self.move(when)

    def disarm(self) -> None:
        """No limit."""
        self.when = FOREVER

    def move(self, when: float) -> None:
        """Let the loop's timer ring at `when`."""
        if self.timer:
            self.timer.cancel()
        self.due, self.timer = when, self.loop.call_at(when, self.ring)

    def ring(self) -> None:
        """The timer's time has come; whether the limit's has is another question."""
        self.timer, self.due = None, FOREVER
        if self.when == FOREVER:
            return
        if self.when > self.loop.time():
            self.move(self.when)
        elif self.progress and self.progress():
            self.arm(self.secs, self.reason, self.progress)
        else:
            self.when = FOREVER
            self.fire(self.reason)

    def stop(self) -> None:
        """Let go of the timer."""
        self.when = self.due = FOREVER
        if self.timer:
            self.timer.cancel()


def taking(transport: asyncio.WriteTransport) -> Callable[[], bool]:
    """A function that says whether the other side has taken bytes since it was last called."""
    left = transport.get_write_buffer_size()

    def took_some() -> bool:
        nonlocal left
        before, left = left, transport.get_write_buffer_size()
        return left < before

    return took_some


FOREVER = float("inf")

# -- where a provider is -----------------------------------------------------

class Origin(NamedTuple):
    """One place that connections go to; they are pooled by it."""

    scheme: str
    host: str
    port: int
    proxy: str | None = None  # URL of a forward proxy
    ca_file: str | None = None

    @property
    def authority(self) -> str:
        """The host as the Host header names it."""
        host = bracketed(self.host)
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


DEFAULT_PORTS = {"http": 80, "https": 443}


def bracketed(host: str) -> str:
    """A host as it stands in front of a port."""
    return f"[{host}]" if ":" in host else host


def place(url: str, ca_file: str | None = None) -> Origin:
    """Where a URL leads."""
    parts = urlsplit(url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme],
                  ca_file=ca_file)


def origin_of(base_url: str, proxy_url: str | None, ca_file: str | None,
              environ: Mapping[str, str]) -> Origin:
    """The origin of a provider, with the forward proxy of its setting or the environment."""
    origin = place(base_url, ca_file)
    if proxy_url == "direct":
        return origin
    return origin._replace(proxy=proxy_url or proxy_from_environment(
        origin.scheme, origin.host, origin.port, environ))


def proxy_from_environment(scheme: str, host: str, port: int,
                           environ: Mapping[str, str]) -> str | None:
    """The forward proxy for a host by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY."""
    def variable(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name.upper()) or ""

    url = variable(f"{scheme}_proxy") or variable("all_proxy")
    if not url or is_loopback(host) or bypasses(host, port, variable("no_proxy")):
        return None
    try:
        return str(PROXY.read(url if "://" in url else f"http://{url}"))
    except ValueError as error:
        raise ConfigError([f"{scheme.upper()}_PROXY or ALL_PROXY in the environment cannot be used:"
                           f" it {error}"]) from None


def bypasses(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names `host`: exactly, as a parent domain, as a network, or with *."""
    for entry in filter(None, (e.strip().lower() for e in no_proxy.replace(" ", ",").split(","))):
        if entry == "*":
            return True
        name, colon, wanted = entry.rpartition(":")
        if colon and wanted.isdecimal() and ":" not in name:
            if int(wanted) != port:
                continue
            entry = name
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:
            entry = entry.lstrip("*").lstrip(".")
            if host == entry or host.endswith("." + entry):
                return True
    return False


def proxy_authorization(proxy: Any) -> list[bytes]:
    """The Proxy-Authorization line for the user that a forward proxy's URL names, if any."""
    if proxy.username is None:
        return []
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return [b"proxy-authorization: Basic " + base64.b64encode(pair)]


def first_line(origin: Origin, method: str, target: str) -> bytes:
    """The request line without the version; absolute for a proxy of plain HTTP (9112 3.2.2)."""
    absolute = origin.proxy and origin.scheme == "http"
    return f"{method} {f'http://{origin.authority}' if absolute else ''}{target}".encode("ascii")


def way_lines(origin: Origin) -> list[bytes]:
    """The header lines that lead to an origin: its name, and what its forward proxy asks for."""
    lines = [b"host: " + origin.authority.encode("ascii")]
    if origin.proxy and origin.scheme == "http":
        lines += proxy_authorization(urlsplit(origin.proxy))
    return lines


# -- one connection ----------------------------------------------------------


class LinkProtocol(asyncio.StreamReaderProtocol):
    """The stream protocol of a connection, watchful while it lies in the pool: whatever comes then,
    bytes that nobody asked for or the end, makes it useless."""

    idle: asyncio.WriteTransport | None = None  # the connection's, while it lies there

    def data_received(self, data: bytes) -> None:
        """Bytes from the provider."""
        if self.idle:
            self.idle.abort()
        else:
            super().data_received(data)

    def eof_received(self) -> bool | None:
        """The provider sends no more."""
        return super().eof_received() and not self.idle


class Link:
    """A connection to a provider; `used` once it has carried a request."""

    __slots__ = ("idle_since", "origin", "protocol", "reader", "used", "writer")

    def __init__(self, origin: Origin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                 protocol: LinkProtocol) -> None:
        self.origin, self.reader, self.writer, self.protocol = origin, reader, writer, protocol
        self.used, self.idle_since = False, 0.0

    @property
    def dead(self) -> bool:
        """Whether it can carry nothing more."""
        return self.writer.transport.is_closing() or self.reader.at_eof()

    def send(self, head: bytes, body: bytes) -> None:
        """Put a request on the way. What the socket does not take now waits in the transport, so
        that an answer that comes before the whole request has gone is read at once."""
        if len(body) > READ_BYTES:
            self.writer.write(head)
            self.writer.write(memoryview(body))
        else:
            self.writer.write(head + body)

    def abort(self) -> None:
        """Close at once."""
        self.writer.transport.abort()


class LinkDied(FramingError):
    """The connection ended before a byte of the answer."""


MAC_CERTIFICATES = "/etc/ssl/cert.pem"  # where Python from python.org does not look


@functools.cache
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """The context for `ca_file` beside the system's certificates; made once, as that reads all."""
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"] and os.path.exists(MAC_CERTIFICATES):
        context.load_verify_locations(MAC_CERTIFICATES)
    if ca_file:
        context.load_verify_locations(str(Path(ca_file).expanduser()))
        # Python 3.13 refuses certificates with small faults of form; those of companies have them,
        # and who names one here trusts it. Names, dates and signatures are checked all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    return context


def own_resolver(loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    """A `getaddrinfo` for `loop` with a thread for each name that is being looked up.

    The loop's own pool is small and is waited for at exit, so that a name server which does not
    answer would hold up other providers and the end of the program.
    """
    running: dict[Any, asyncio.Future[Any]] = {}

    async def getaddrinfo(host: Any, port: Any, **hints: Any) -> Any:
        key = (host, port, *sorted(hints.items()))
        if key not in running:
            running[key] = loop.create_future()
            running[key].add_done_callback(lambda done: (running.pop(key), done.exception()))
            threading.Thread(target=look_up, args=(running[key], host, port, hints),
                             daemon=True).start()
        return await asyncio.shield(running[key])

    def look_up(found: asyncio.Future[Any], host: Any, port: Any, hints: Json) -> None:
        try:
            put, value = found.set_result, socket.getaddrinfo(host, port, **hints)
        except Exception as error:
            put, value = found.set_exception, error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(put, value)

    return getaddrinfo


async def open_link(origin: Origin) -> Link:
    """A fresh connection to `origin`, through its forward proxy and with TLS as it needs."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=STREAM_LIMIT, loop=loop)
    protocol = LinkProtocol(reader, loop=loop)
    proxy = place(origin.proxy, origin.ca_file) if origin.proxy else None
    if proxy and origin.scheme == "https":
        transport = await loop.start_tls(await open_tunnel(proxy, origin), protocol,
                                         tls_context(origin.ca_file), server_hostname=origin.host)
        if transport is None:
            raise ConnectionResetError
        protocol.connection_made(transport)
    else:
        transport = await dial(protocol, proxy or origin)
    return Link(origin, reader, asyncio.StreamWriter(transport, protocol, reader, loop), protocol)


async def dial(protocol: LinkProtocol, origin: Origin) -> Any:
    """The transport of a connection straight to `origin`."""
    secure = tls_context(origin.ca_file) if origin.scheme == "https" else None
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: protocol, origin.host, origin.port, ssl=secure,
        server_hostname=origin.host if secure else None, happy_eyeballs_delay=0.25)
    return transport


async def open_tunnel(proxy: Origin, origin: Origin) -> Any:
    """The transport of a tunnel that a forward proxy opens to `origin` (9110 9.3.6)."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=STREAM_LIMIT, loop=loop)
    transport = await dial(LinkProtocol(reader, loop=loop), proxy)
    try:
        target = f"{bracketed(origin.host)}:{origin.port}".encode("ascii")
        transport.write(format_lines(b"CONNECT %b HTTP/1.1" % target, b"host: " + target,
                                     *proxy_authorization(urlsplit(origin.proxy))))
        head = parse_response_head((await reader.readuntil(b"\r\n\r\n"))[:-4])
        if not 200 <= head.status < 300:
            raise UpstreamError("upstream request failed: the forward proxy refused the connection"
                                f" with status {head.status}",
                                fix="check the user name and password in proxy_url or HTTPS_PROXY"
                                if head.status == 407 else "check that it allows this host")
        return transport
    except BaseException as error:
        transport.abort()
        if isinstance(error, (asyncio.IncompleteReadError, asyncio.LimitOverrunError,
                              FramingError)):
            raise UpstreamError("upstream request failed: the forward proxy did not answer as"
                                " one") from None
        raise


def connect_fault(error: BaseException) -> str:
    """Why a connection could not be opened, without addresses or URLs."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"its TLS certificate is not trusted ({error.verify_message}); if your network"
                " re-signs TLS, set ca_file for this provider")
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed ({error.reason or 'no reason given'})"
    if isinstance(error, socket.gaierror):
        return ("its host name cannot be resolved; check base_url and DNS, and HTTPS_PROXY where"
                " one is needed")
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused; is it running, and is the port in base_url right?"
    if isinstance(error, ConnectionError):
        return "the connection was closed while it was opened"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return "none of its addresses could be reached"


# -- the pool and one exchange -----------------------------------------------

class Pool:
    """Connections that wait for the next request to their origin, the most recently used first."""

    def __init__(self) -> None:
        self.idle: defaultdict[Origin, deque[Link]] = defaultdict(deque)
        self.sweeper: asyncio.TimerHandle | None = None

    def take(self, origin: Origin) -> Link | None:
        """A live connection to `origin`, if one waits."""
        links = self.idle.get(origin)
        while links:
            link = links.pop()
            link.protocol.idle = None
            if not link.dead:
                return link
            link.abort()
        return None

    def give(self, link: Link) -> None:
        """Keep a connection whose answer was read to its end and not a byte further."""
        # The next answer would begin with bytes that nobody has read, and one that came before
        # the request was sent whole leaves the rest of it unsent.
        unread = link.reader._buffer  # type: ignore[attr-defined]
        if link.dead or unread or link.writer.transport.get_write_buffer_size():
            link.abort()
            return
        links = self.idle[link.origin]
        link.protocol.idle, link.used = link.writer.transport, True
        link.idle_since = time.monotonic()
        links.append(link)
        if len(links) > IDLE_LINKS_PER_ORIGIN:
            links.popleft().abort()
        if self.sweeper is None:
            self.sweeper = asyncio.get_running_loop().call_later(SWEEP_SECS, self.sweep)

    def sweep(self) -> None:
        """Close what has waited too long, and come back while something waits."""
        self.sweeper = None
        oldest = time.monotonic() - IDLE_LINK_SECS
        for origin, links in list(self.idle.items()):
            while links and (links[0].idle_since < oldest or links[0].dead):
                links.popleft().abort()
            if not links:
                del self.idle[origin]
        if self.idle:
            self.sweeper = asyncio.get_running_loop().call_later(SWEEP_SECS, self.sweep)

    def close(self) -> None:
        """Close all that wait."""
        if self.sweeper:
            self.sweeper.cancel()
        for link in itertools.chain(*self.idle.values()):
            link.abort()
        self.idle.clear()

    async def exchange(self, origin: Origin, head: bytes, body: bytes, watch: Watch,
                       connect_secs: float, idle_secs: float,
                       sent: Callable[[], None]) -> tuple[Link, ResponseHead, bytes]:
        """Send one request; the connection, the answer's head and the bytes behind it.

        A connection from the pool may have died unnoticed. If it ends before a byte of the answer,
        the request goes out once more on a fresh one: a provider that had taken it would have said
        something.
        """
        link = self.take(origin)
        while True:
            if link is None:
                watch.arm(connect_secs, "connect")
                try:
                    link = await open_link(origin)
                except (OSError, UnicodeError) as error:
                    raise UpstreamError(
                        f"upstream request failed: {connect_fault(error)}") from None
            try:
                link.send(head, body)
                sent()
                return link, *await read_response_head(
                    link.reader, functools.partial(watch.arm, idle_secs, "upstream",
                                                   taking(link.writer.transport)))
            except BaseException as error:
                link.abort()
                if not isinstance(error, FramingError):
                    raise
                if not (isinstance(error, LinkDied) and link.used):
                    raise UpstreamError(f"upstream request failed: {error}") from None
                link = None


async def read_response_head(reader: asyncio.StreamReader,
                             waiting: Callable[[], None]) -> tuple[ResponseHead, bytes]:
    """The final head of an answer, interim ones passed over, and the bytes behind it; `waiting` is
    called before each wait for bytes."""
    data, interim = b"", 0
    while True:
        scanned = 0
        while (end := data.find(b"\r\n\r\n", max(scanned - 3, 0))) < 0:
            check_unfinished_answer(data, scanned)
            scanned = len(data)
            waiting()
            try:
                more = await reader.read(READ_BYTES)
            except OSError:
                more = b""
            if not more and (data or interim):
                raise FramingError("the connection closed within the head of the answer")
            if not more:
                raise LinkDied("the connection closed before an answer")
            data += more
        head = parse_response_head(data[:end])
        data = data[end + 4:]
        if head.status >= 200:
            return head, data
        interim += 1
        if head.status == 101 or interim > INTERIM_RESPONSES:
            raise FramingError("the provider sent interim answers that nobody asked for")


def check_unfinished_answer(data: bytes, scanned: int) -> None:
    """Refuse the beginning of an answer that no further bytes could make right."""
    if not data:
        return
    if not b"HTTP/1.".startswith(data[:7]):
        raise FramingError("the provider does not speak HTTP/1.1; check the scheme and the port in"
                           " base_url")
    if len(data) > RESPONSE_HEAD_BYTES:
        raise FramingError(f"the head of the answer is larger than {RESPONSE_HEAD_BYTES} bytes")
    if BARE_LF.search(data, max(scanned - 1, 0)):
        raise FramingError("a line in the head of the answer ends in a bare LF")


class ResponseBody:
    """The payload of an answer as it comes: chunks taken apart, compression undone."""

    __slots__ = ("decoded", "decoder", "held", "inflater", "link", "rest", "tap")

    def __init__(self, link: Link, head: ResponseHead, rest: bytes) -> None:
        self.link, self.rest = link, rest
        self.held: list[bytes] = []  # pieces that were looked at, to be read once more
        self.decoder = body_decoder(head.length)
        self.tap: Callable[[bytes], None] | None = None  # is given what is read
        self.inflater: Inflater | None = None
        coding = head.values.get(b"content-encoding", b"identity").lower()
        self.decoded = coding in INFLATABLE
        if self.decoded:
            self.inflater = Inflater(coding)
        elif coding != b"identity":
            raise FramingError(f"the provider sent the content coding {coding.decode('latin-1')},"
                               f" though none was asked for")

    async def read(self) -> bytes:
        """The next piece, b"" at the end; FramingError or OSError when it does not end well."""
        if self.held:
            return self.held.pop(0)
        decoder = self.decoder
        while not decoder.finished:
            data, self.rest = self.rest or await self.link.reader.read(READ_BYTES), b""
            if not data:
                decoder.close()
                break
            data = decoder.feed(data)
            if self.inflater and data:
                data = self.inflater.feed(data)
            if data:
                if self.tap:
                    self.tap(data)
                return data
        if self.inflater and self.inflater.read:
            self.inflater.close()
            self.inflater = None
        return b""

    def take_whole(self) -> bytes | None:
        """The whole payload where all of it came with the head, else None."""
        decoder = self.decoder
        if (self.inflater or self.held or not isinstance(decoder, LengthDecoder)
                or len(self.rest) != decoder.left):
            return None
        data, self.rest = decoder.feed(self.rest), b""
        if self.tap:
            self.tap(data)
        return data

    def clean(self, head: ResponseHead) -> bool:
        """Whether the connection can carry another request: all was read, nothing is behind it."""
        return head.keep_alive and self.decoder.finished and not self.decoder.rest and not self.rest


# -- requests of our own -----------------------------------------------------

FETCH_SECS = 30.0  # for all of one
FETCH_BYTES = 16 << 20  # of its answer; lists of models are large (OpenRouter: 1 MB)


class Fetched(NamedTuple):
    """An answer to a request of our own."""

    status: int
    values: Mapping[bytes, bytes]
    body: bytes


async def fetch(pool: Pool, origin: Origin, url: str, method: str = "GET",
                lines: Sequence[bytes] = (), body: bytes = b"",
                secs: float = FETCH_SECS) -> Fetched:
    """The answer of `origin` to a request for `url`; see fetch_with()."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not any(line.startswith(b"user-agent:") for line in lines):
        lines = [b"user-agent: " + USER_AGENT, *lines]
    head = format_lines(
        first_line(origin, method, target) + b" HTTP/1.1", *way_lines(origin),
        b"accept-encoding: identity", *lines,
        *([b"content-length: %d" % len(body)] if body else []))
    return await fetch_with(pool, origin, head, body, secs)


async def fetch_with(pool: Pool, origin: Origin, head: bytes, body: bytes, secs: float,
                     tap: Callable[[bytes], None] | None = None) -> Fetched:
    """The answer to a request with this head, or UpstreamError; `tap` sees it as it comes."""
    # the limit for all of it is the only one
    watch = Watch(asyncio.get_running_loop(), lambda reason: None)
    link: Link | None = None
    try:
        async with asyncio.timeout(secs):
            link, answer, rest = await pool.exchange(origin, head, body, watch, secs, secs,
                                                     lambda: None)
            payload, data = ResponseBody(link, answer, rest), bytearray()
            payload.tap = tap
            while piece := await payload.read():
                data += piece
                if len(data) > FETCH_BYTES:
                    raise FramingError(f"it is larger than {FETCH_BYTES} bytes")
        if payload.clean(answer):
            pool.give(link)
            link = None
        return Fetched(answer.status, answer.values, bytes(data))
    except TimeoutError:
        raise UpstreamError(f"there was no answer within {secs:g} seconds") from None
    except (FramingError, OSError) as error:
        said = error if isinstance(error, FramingError) else "the connection broke"
        raise UpstreamError(f"the answer could not be read: {said}") from None
    finally:
        watch.stop()
        if link:
            link.abort()



# ============================================================================
#  20  Tokens
# ============================================================================
# Keys that come from elsewhere than the configuration: commands, OAuth 2.0 token
# endpoints, the token files of the app directory. Waits on processes and providers.

# -- what a token is ---------------------------------------------------------

SKEW_SECS, SKEW_SHARE = 60.0, 0.1  # how long before its end a key is renewed: the shorter one
RENEW_PAUSE_SECS = 300.0  # after a renewal that failed, while the old key still holds
FAULT_PAUSE_SECS = 5.0  # after one that failed while no key holds
REFUSED_PAUSE_SECS = 60.0  # between two renewals because a provider refused the key
ENDED_PAUSE_SECS = 30.0  # for a key that had ended when it came: clocks differ


class Token(NamedTuple):
    """A key that was fetched, its times in seconds since 1970, and what renews it."""

    key: str
    due: float = FOREVER
    expires_at: float = FOREVER
    refresh_token: str = ""


def token_of(value: Any, now: float, refresh_token: str = "") -> Token:
    """The token in an OAuth server's answer or a command's output; ValueError: what is wrong with
    it. A refresh token that is not replaced stays (6749 6)."""
    try:
        key = str(SECRET.read(first_of(value, "/access_token", "/token", "/api_key")))
    except ValueError as error:
        raise ValueError(f"its token {error}") from None
    end = expiry_of(value, now)
    due = end - min(SKEW_SECS, (end - now) * SKEW_SHARE) if end > now else now + ENDED_PAUSE_SECS
    return Token(key, due, end, text_of(value.get("refresh_token")) or refresh_token)


def expiry_of(value: Json, now: float) -> float:
    """When a token ends: by expires_in, else by expires_at, a number or RFC 3339; else never."""
    for name, since in (("expires_in", now), ("expires_at", 0.0)):
        said = value.get(name)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(secs := float(said)):  # type: ignore[arg-type]
                return since + secs
        if isinstance(said, str) and name == "expires_at":
            return expiry_time(datetime.datetime.fromisoformat(said))
    return FOREVER


def printed_token(output: bytes, now: float) -> Token:
    """The token that a command printed; ValueError says why there is none."""
    if len(output) >= COMMAND_BYTES:
        raise ValueError(f"that is {COMMAND_BYTES} bytes or more")
    text = output.decode("utf-8-sig").strip()
    return token_of(load(text.encode()) if text.startswith("{") else {"token": text}, now)


# -- commands ----------------------------------------------------------------

COMMAND_SECS = 30.0
COMMAND_BYTES = 64 << 10  # of what a command prints


async def run_command(command: Sequence[str]) -> tuple[int, bytes, bytes]:
    """Run a program without a shell: its exit status, and how its two outputs begin. OSError: it
    cannot start; TimeoutError: it does not end, and it and its children were killed."""
    program = os.path.expanduser(command[0])
    process = await asyncio.create_subprocess_exec(
        shutil.which(program) or program, *command[1:], stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True)
    try:
        async with asyncio.timeout(COMMAND_SECS):
            out, err, status = await asyncio.gather(
                read_beginning(process.stdout), read_beginning(process.stderr), process.wait())
        return status, out, err
    except BaseException:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        await process.wait()
        raise


async def read_beginning(reader: asyncio.StreamReader | None) -> bytes:
    """The first COMMAND_BYTES of a pipe that is read to its end."""
    kept = b""
    while reader and (data := await reader.read(READ_BYTES)):
        kept = (kept + data)[:COMMAND_BYTES]
    return kept


# -- OAuth 2.0: forms and answers --------------------------------------------

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DESCRIPTION_CHARS = 200


def oauth_form(oauth: OAuthConfig, members: Mapping[str, str]) -> tuple[list[bytes], bytes]:
    """The header lines and the form of a request to an OAuth server; a client's secret goes into
    the header (6749 2.3.1)."""
    lines = [b"content-type: application/x-www-form-urlencoded", b"accept: application/json"]
    form = {**members, **(oauth.parameters or {})}
    if oauth.client_secret:
        pair = f"{quote_plus(oauth.client_id)}:{quote_plus(oauth.client_secret)}".encode("ascii")
        lines.append(b"authorization: Basic " + base64.b64encode(pair))
    else:
        form["client_id"] = oauth.client_id
    return lines, urlencode(form).encode("ascii")


def grant_members(oauth: OAuthConfig, refresh_token: str) -> dict[str, str]:
    """What asks for a token: by the refresh token (6749 6), else as the client itself (4.4)."""
    if refresh_token:
        return {"grant_type": "refresh_token", "refresh_token": refresh_token}
    return {"grant_type": "client_credentials", **({"scope": oauth.scope} if oauth.scope else {})}


def oauth_answer(label: str, status: int, body: bytes) -> Json:
    """The object in an OAuth server's answer, or its error (6749 5.2) with its `code`."""
    value = mapping(loaded(body))
    code = word(value.get("error"))
    if 200 <= status < 300 and value and not code:
        return value
    said = printable(text_of(value.get("error_description")))[:DESCRIPTION_CHARS]
    message = (f"the OAuth server of {label} answered {status}"
               + (f" {printable(code)}" if code else "") + (f" ({said})" if said else ""))
    if status >= 500 or status == 429 or not code:
        raise UpstreamError(message)
    raise SetupError(message, code=code, fix="check its client and its scope")


class DeviceCode(NamedTuple):
    """What a device authorization endpoint answers (8628 3.2)."""

    code: str
    user_code: str
    url: str
    complete_url: str
    interval: float
    expires_in: float


def device_code_of(label: str, value: Json) -> DeviceCode:
    """The device code in an answer; UpstreamError where there is none."""
    code, user_code, url, google_url, complete_url = (
        printable(text_of(value.get(name))) for name in (
            "device_code", "user_code", "verification_uri", "verification_url",
            "verification_uri_complete"))
    if not (code and user_code and (url or google_url)):
        raise UpstreamError(f"the OAuth server of {label} gave no device code")
    return DeviceCode(code, user_code, url or google_url, complete_url,
                      min(max(secs_of(value.get("interval"), 5.0), 0.1), 600.0),
                      min(secs_of(value.get("expires_in"), 600.0), 3600.0))


def secs_of(value: Any, unsaid: float) -> float:
    """A time that an answer tells, else what goes `unsaid`."""
    return float(min(value, 1e9)) if type(value) in (int, float) and value >= 0 else unsaid


def next_poll(code: str | None, interval: float) -> float | None:
    """How long to wait after an error `code` (8628 3.5); None where it is the last word."""
    return {"authorization_pending": interval, "slow_down": interval + 5}.get(code or "")


# -- the store ---------------------------------------------------------------

def token_path(credential: Credential, environ: Mapping[str, str]) -> Path:
    """The file for the token of a credential."""
    names = (quote(name, safe="") for name in (credential.provider, credential.name))
    return app_directory(environ) / "tokens" / f"{'@'.join(names)}.json"


def read_token(path: Path, oauth: OAuthConfig) -> Token | None:
    """The token in a file; None where there is none that this client got from this server."""
    try:
        value = mapping(load(path.read_bytes()))
        if (value["token_url"], value["client_id"]) != (oauth.token_url, oauth.client_id):
            return None
        due, end = (float(value.get(name, FOREVER)) for name in ("due", "expires_at"))
        return Token(SECRET.read(value["key"]), due, end, text_of(value.get("refresh_token")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_token(path: Path, oauth: OAuthConfig, token: Token) -> None:
    """Put a token into its file, in one step, for its owner alone."""
    value = {"token_url": oauth.token_url, "client_id": oauth.client_id,
             **{name: said for name, said in token._asdict().items() if said not in (FOREVER, "")}}
    write_private(path, dump(value))


# -- keys while the program runs ---------------------------------------------

class KeySource:
    """The key of one credential, fetched once for all that wait, renewed when it is due; `renew`
    makes the token that follows one."""

    __slots__ = ("clock", "failed_at", "fault", "refused_at", "renew", "task", "token")

    def __init__(self, renew: Callable[[Token | None], Awaitable[Token]],
                 clock: Callable[[], float] = time.time) -> None:
        self.renew, self.clock = renew, clock
        self.token: Token | None = None
        self.task: asyncio.Future[Token] | None = None
        self.fault: ProxyError | None = None  # of the last renewal
        self.failed_at = self.refused_at = -FOREVER

    async def key(self) -> str:
        """The key for a request now; ProxyError says why there is none."""
        token, now = self.token, self.clock()
        holds = token is not None and now < token.expires_at
        if token and (now < token.due or (holds and now < self.failed_at + RENEW_PAUSE_SECS)):
            return token.key
        try:
            return (await self.renewed(token)).key
        except ProxyError:
            if token and holds:
                return token.key
            raise

    async def refused(self, key: str) -> bool:
        """Note that a provider refused `key`; whether there is another now. Some refuse every
        key, so it is not renewed again and again."""
        token, now = self.token, self.clock()
        if token is None or token.key != key:
            return True
        if now < self.refused_at + REFUSED_PAUSE_SECS:
            return False
        self.refused_at = now
        with contextlib.suppress(ProxyError):  # the client is told what the provider said
            return (await self.renewed(token)).key != key
        return False

    async def renewed(self, stale: Token | None) -> Token:
        """The token that follows `stale`. The renewal goes on when who waits for it goes away: a
        refresh token may be good for one use only."""
        if self.fault and self.clock() < self.failed_at + FAULT_PAUSE_SECS:
            raise copy.copy(self.fault)
        if self.task is None:
            self.task = asyncio.ensure_future(self.fetch(stale))
        try:
            return await asyncio.shield(self.task)
        except ProxyError as error:
            raise copy.copy(error) from None  # each request adds its own to it

    async def fetch(self, stale: Token | None) -> Token:
        """Renew, and remember how that went."""
        try:
            self.token, self.fault = await self.renew(stale), None
            return self.token
        except ProxyError as error:
            self.fault, self.failed_at = error, self.clock()
            raise
        finally:
            self.task = None


class Tokens:
    """The keys of credentials that are fetched while the program runs."""

    def __init__(self, pool: Pool, log: Log, environ: Mapping[str, str]) -> None:
        self.pool, self.log, self.environ = pool, log, environ
        self.sources: dict[tuple[str, str], tuple[Credential, KeySource]] = {}

    async def key(self, credential: Credential) -> str:
        """The key for a request now; ProxyError says why there is none."""
        return (await self.source(credential).key() if credential.dynamic
                else credential.source.api_key or "")

    def last(self, credential: Credential) -> str:
        """The key of the latest request; "" where there is none."""
        if not credential.dynamic:
            return credential.source.api_key or ""
        token = self.source(credential).token
        return token.key if token else ""

    async def refused(self, credential: Credential, key: str) -> bool:
        """Note that a provider refused `key` with 401; whether there is a new one to try."""
        return credential.dynamic and await self.source(credential).refused(key)

    def source(self, credential: Credential) -> KeySource:
        """Where the key of a credential, as it is configured now, comes from."""
        name = (credential.provider, credential.name)
        if name not in self.sources or self.sources[name][0] != credential:
            self.sources[name] = credential, KeySource(functools.partial(self.renew, credential))
        return self.sources[name][1]

    async def renew(self, credential: Credential, stale: Token | None) -> Token:
        """The token that follows `stale`, told in the log."""
        fields = {"provider": credential.provider, "credential": credential.name}
        try:
            token = await (self.granted(credential, stale) if credential.source.oauth
                           else self.printed(credential))
        except ProxyError as error:
            self.log.event(logging.WARNING, "token-failed", {**fields, "error": error.message})
            raise
        secs = token.expires_at - time.time()
        self.log.event(logging.DEBUG, "token", {
            **fields, "expires_in_secs": round(secs) if secs < FOREVER else None})
        return token

    async def printed(self, credential: Credential) -> Token:
        """The token that the command of a credential prints."""
        status, err = 0, b""
        try:
            status, out, err = await run_command(credential.source.api_key_command or ())
            if not status:
                return printed_token(out, time.time())
            why = f"ended with status {status}"
        except TimeoutError:
            why = f"did not end within {COMMAND_SECS:g} seconds"
        except OSError as error:
            why = f"cannot be run: {error.strerror}"
        except ValueError as error:
            why = f"printed no key: {error}"
        self.log.event(logging.WARNING, "command-failed", {
            "provider": credential.provider, "credential": credential.name, "status": status,
            "stderr": err.decode("utf-8", "replace")[:DESCRIPTION_CHARS]})
        raise SetupError(f"the api_key_command of {credential.label} {why}",
                         fix="the log has what it said; run it by hand")

    async def granted(self, credential: Credential, stale: Token | None) -> Token:
        """The token that another process has stored, else one that the OAuth server gives for the
        newest refresh token it takes, or to the client itself."""
        oauth, path = oauth_of(credential), token_path(credential, self.environ)
        used: set[str] = set()
        while True:
            kept = await asyncio.to_thread(read_token, path, oauth)
            if kept and kept.key != (stale and stale.key) and time.time() < kept.due:
                return kept
            known = (*(t.refresh_token for t in (kept, stale) if t), oauth.refresh_token or "")
            refresh = next((r for r in known if r and r not in used), "")
            if not refresh and oauth.flow != "client_credentials":
                flags = (f" --credential {credential.name}"
                         if credential.name != credential.provider else "")
                raise SetupError(
                    f"{credential.label} is not logged in, or no longer",
                    fix=f"run `proxai.py login {credential.provider}{flags}`"
                    if oauth.flow == "device" else "give another refresh_token")
            try:
                return await self.ask(credential, grant_members(oauth, refresh), refresh)
            except SetupError as error:
                if error.code != "invalid_grant" or not refresh:
                    raise
                used.add(refresh)

    async def ask(self, credential: Credential, members: Mapping[str, str],
                  refresh_token: str = "") -> Token:
        """A token from the token endpoint, stored."""
        oauth, path = oauth_of(credential), token_path(credential, self.environ)
        value = await self.post(credential, oauth.token_url, members)
        try:
            token = token_of(value, time.time(), refresh_token)
        except ValueError as error:
            raise UpstreamError(f"the OAuth server of {credential.label} gave no token:"
                                f" {error}") from None
        try:
            await asyncio.to_thread(write_token, path, oauth, token)
        except OSError as error:
            fault = f"cannot write {path}: {error.strerror}"
            if "device_code" in members:  # a login for nothing
                raise SetupError(fault) from None
            self.log.event(logging.WARNING, "token-failed", {
                "provider": credential.provider, "credential": credential.name, "error": fault})
        return token

    async def post(self, credential: Credential, url: str, members: Mapping[str, str]) -> Json:
        """What an OAuth server answers to a form."""
        lines, form = oauth_form(oauth_of(credential), members)
        origin = origin_of(url, credential.proxy_url, credential.ca_file, self.environ)
        try:
            answer = await fetch(self.pool, origin, url, "POST", lines, form)
        except UpstreamError as error:
            raise UpstreamError(f"the OAuth server of {credential.label}:"
                                f" {error.message}") from None
        return oauth_answer(credential.label, answer.status, answer.body)

    async def log_in(self, credential: Credential, say: Callable[[str], None]) -> Token:
        """Get and store a first token, by the device flow (8628) with what `say` tells the user."""
        oauth = oauth_of(credential)
        if oauth.flow != "device":
            return await self.granted(credential, read_token(
                token_path(credential, self.environ), oauth))
        asked = {"scope": oauth.scope} if oauth.scope else {}
        device = device_code_of(credential.label, await self.post(
            credential, oauth.device_authorization_url or "", asked))
        say(f"Open {device.url}\nand enter the code: {device.user_code}")
        if device.complete_url:
            say(f"or open {device.complete_url}")
        members = {"grant_type": DEVICE_GRANT, "device_code": device.code}
        interval: float | None = device.interval
        ends = time.monotonic() + device.expires_in
        while interval is not None and time.monotonic() < ends:
            await asyncio.sleep(interval)
            try:
                return await self.ask(credential, members)
            except UpstreamError:
                interval *= 2  # 8628 3.5: a server that cannot be reached is asked less often
            except SetupError as error:
                interval = next_poll(error.code, interval)
                if interval is None:
                    raise
        raise SetupError("the code was not confirmed in time", fix="run login again")


def oauth_of(credential: Credential) -> OAuthConfig:
    """The OAuth settings of a credential that has them."""
    return cast(OAuthConfig, credential.source.oauth)



# ============================================================================
#  21  Server
# ============================================================================
# Client connections: heads, bodies, limits, answers, the end of it all. Knows
# HTTP and sockets, does not know what requests mean: a handler does.


class Connection:
    """One client connection, serving requests in their order.

    Whatever ends a wait from outside, a time limit, a client that is gone or the shutdown, goes
    through `interrupt`: it cancels the connection's task with a reason, and whoever waits decides
    by that.
    """

    def __init__(self, server: Server, reader: asyncio.StreamReader) -> None:
        self.server, self.reader = server, reader
        self.transport: asyncio.WriteTransport
        self.watch = Watch(server.loop, self.interrupt)
        self.rest = b""  # bytes read beyond the last request
        self.head: RequestHead | None = None
        self.keep = True  # whether the connection goes on after this answer
        self.body_unread = False
        self.answered = False  # whether the head of the answer has been written
        self.chunked = False
        self.exchanging = False  # whether a client that goes away ends the exchange
        self.busy = self.gone = False
        self.reason: str | None = None
        self.task: asyncio.Task[Any] | None = None
        self.extra: list[bytes] = []  # header lines for every answer to this request
        self.tap: Capture | None = None  # is given the answer

    # -- ends from outside

    def interrupt(self, reason: str) -> None:
        """End the current wait; the first reason counts."""
        if self.reason is None and self.task:
            self.reason = reason
            self.task.cancel()

    def take_reason(self) -> str:
        """Why the wait was ended, for who handles it; a cancellation that is not ours goes on."""
        reason, self.reason = self.reason, None
        if reason is None or self.task is None:
            raise asyncio.CancelledError
        self.task.uncancel()
        return reason

    def lost(self) -> None:
        """The client sends no more, which is how one that went away looks."""
        self.gone = True
        if self.exchanging:
            self.interrupt("client_gone")

    # -- the loop over requests

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the connection until it ends."""
        self.writer = writer
        self.task = asyncio.current_task()
        try:
            while await self.serve_one():
                pass
            if self.body_unread or self.rest:
                await self.linger()
        except asyncio.CancelledError:
            self.take_reason()
        except OSError:
            pass
        finally:
            self.close()

    async def serve_one(self) -> bool:
        """Serve one request; whether the connection can take another."""
        try:
            self.head, self.answered, self.chunked, self.busy, self.extra = (
                None, False, False, False, [])
            head = self.head = await self.read_head()
            if head is None:
                return False
            self.busy = True
            self.keep = head.keep_alive
            self.body_unread = head.length != 0
            await self.server.handler(self, head)
            await self.flush()  # what the client does not take must not pile up
            self.watch.disarm()
            if self.rest:
                await asyncio.sleep(0)  # a client with more in its pipeline is not the only one
            if self.body_unread and self.keep:
                await self.read_body(DISCARD_BYTES)
        except FramingError as error:
            self.refuse(malformed(error))
        except asyncio.CancelledError:
            if self.take_reason() != "head":
                return False
            self.refuse(RequestError("the request head did not arrive in time", status=408))
        return self.keep

    def refuse(self, error: ProxyError) -> None:
        """Answer what cannot be read any further, and be done with the connection."""
        self.keep, self.body_unread = False, True
        if not self.answered:
            self.server.refuse(self, error)

    async def read_head(self) -> RequestHead | None:
        """The next request head, None when the client sends no more."""
        server, data = self.server, self.rest
        if not data:
            self.watch.arm(server.settings.keepalive_timeout_secs, "idle")
            if server.draining:
                return None
            data = await self.reader.read(READ_BYTES)
        scanned = 0
        while True:
            if data.startswith(b"\r\n"):  # 9112 2.2: empty lines before a request are passed over
                data = EMPTY_LINES.sub(b"", data, 1)
            end = data.find(b"\r\n\r\n", max(scanned - 3, 0))
            if end >= 0:
                self.rest = data[end + 4:]
                return parse_request_head(data[:end], server.limits)
            if not data and self.reader.at_eof():
                return None
            check_unfinished(data, server.limits, scanned)
            if not scanned:
                self.watch.arm(server.settings.head_timeout_secs, "head")
                self.busy = True
            scanned = len(data) or 1
            more = await self.reader.read(READ_BYTES)
            if not more:
                return None
            data += more

    async def read_body(self, limit: int) -> bytes:
        """The request's body; RequestError 413 beyond `limit` bytes, declared or counted."""
        head = self.head
        assert head
        length, rest = head.length, self.rest
        if length is not None and length > limit:
            raise too_large(limit)
        if length is not None and len(rest) >= length:
            body, self.rest = rest[:length], rest[length:]
            self.body_unread = False
            return body
        if head.expects_continue and not rest:
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        decoder, parts, size = body_decoder(length), [], 0
        # a body that is left half read ends the connection
        keep, self.keep, self.rest = self.keep, False, b""
        while True:
            part = decoder.feed(rest)
            size += len(part)
            if size > limit:
                raise too_large(limit)
            parts.append(part)
            if decoder.finished:
                break
            self.watch.arm(self.server.settings.body_timeout_secs, "body")
            rest = await self.reader.read(READ_BYTES)
            if not rest:
                raise ConnectionResetError
        self.keep, self.rest, self.body_unread = keep, decoder.rest, False
        return b"".join(parts)

    async def linger(self) -> None:
        """Tell the client that nothing more comes, and read on for a moment: closing with bytes
        unread resets the connection, and the client would lose the answer that explains why."""
        self.exchanging = False
        if self.transport.is_closing() or self.reader.at_eof() or self.server.draining:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.watch.arm(LINGER_SECS, "linger")
        left = LINGER_BYTES
        while left > 0 and (data := await self.reader.read(READ_BYTES)):
            left -= len(data)

    # -- answers

    def write_head(self, status: int, lines: list[bytes], length: int | None,
                   body: bytes = b"") -> None:
        """Begin an answer of `length` bytes, None for a stream; `body` goes out with its head."""
        self.answered = True
        if self.body_unread and self.head and (self.head.expects_continue
                                               or self.head.length is None
                                               or self.head.length > DISCARD_BYTES):
            self.keep = False  # reading such a body away would cost more than a new connection
        lines += self.extra
        http11 = self.head is None or self.head.http11
        if status in (204, 304):
            body = b""  # 9110 6.4.1: the message ends with its head
        elif length is not None:
            lines.append(b"content-length: %d" % length)
        elif http11:
            self.chunked = True
            lines.append(b"transfer-encoding: chunked")
        else:
            # HTTP/1.0 knows the end of a stream only as the end of the connection
            self.keep = False
        if not self.keep or self.server.leaving:
            self.keep = False
            lines.append(b"connection: close")
        elif not http11:
            lines.append(b"connection: keep-alive")
        head = format_head(status, lines)
        if self.head is not None and self.head.method == b"HEAD":
            body = b""
        if self.tap:
            self.tap.outbound(head, body)
        if len(body) > READ_BYTES:
            self.writer.write(head)
            self.writer.write(body)
        else:
            self.writer.write(head + body)

    def write_part(self, data: bytes) -> None:
        """A piece of a stream."""
        if self.tap:
            self.tap.outbound_part(data)
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def write_end(self) -> None:
        """The end of a stream that is whole."""
        if self.chunked:
            self.writer.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """End a stream that is not whole so that no client can take it for complete."""
        self.keep = False
        if not self.chunked:
            # Without chunks a plain close would look like the end, so the close must be a reset.
            raw = self.transport.get_extra_info("socket")
            # struct linger: on, 0 s
            on = b"\x01\0\0\0\0\0\0\0" if os.name == "posix" else b"\x01\0\0\0"
            with contextlib.suppress(OSError, AttributeError):  # the socket is gone
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on)
            self.transport.abort()

    async def flush(self) -> None:
        """Wait while the client takes its answer more slowly than it comes."""
        if self.transport.get_write_buffer_size():
            self.watch.arm(self.server.settings.write_timeout_secs, "client_write",
                           taking(self.transport))
            await self.writer.drain()

    def close(self) -> None:
        """Let go; bytes on their way to the client get their time, but not for ever."""
        self.watch.stop()
        self.writer.close()
        if self.transport.get_write_buffer_size():
            self.server.loop.call_later(self.server.settings.write_timeout_secs,
                                        self.transport.abort)


def malformed(error: FramingError) -> RequestError:
    """The answer to bytes that are no HTTP request."""
    return RequestError(f"malformed request: {error}", status=error.status)


def too_large(limit: int) -> RequestError:
    """The refusal of a request body above the limit."""
    return RequestError(f"the request body is larger than the length limit of {limit} bytes",
                        status=413, fix="send less, or raise server.max_request_body_bytes")


class ClientProtocol(asyncio.StreamReaderProtocol):
    """The stream protocol of a client connection, telling it when the client is gone."""

    def __init__(self, server: Server) -> None:
        reader = asyncio.StreamReader(limit=STREAM_LIMIT, loop=server.loop)
        self.connection = Connection(server, reader)
        super().__init__(reader, self.connection.run, loop=server.loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self.connection.transport = transport  # type: ignore[assignment]
        self.connection.server.connections.add(self.connection)
        super().connection_made(transport)

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        self.connection.lost()
        return super().eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone, and every byte with it that was still on its way."""
        self.connection.server.connections.discard(self.connection)
        self.connection.lost()
        super().connection_lost(error)


def bound_socket(host: str, port: int,
                 hint: str = "choose another with --port or server.port") -> socket.socket:
    """A socket bound to an address. ConfigError names one that cannot be taken."""
    try:
        # on Windows this option would let two programs share a port
        made = socket.create_server((host, port), backlog=BACKLOG, reuse_port=False,
                                    family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # asyncio turns Nagle's algorithm off only where the protocol is named; each event of a
        # stream would wait for the client's acknowledgement, which takes 40 ms
        return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError([f"cannot listen on {host}:{port}: {reason}"], hint) from None


class Server:
    """A listener and its connections. `handler` serves a request, `refuse` answers what is none."""

    def __init__(self, settings: ServerConfig, handler: Callable[[Connection, RequestHead], Any],
                 refuse: Callable[[Connection, ProxyError], None]) -> None:
        self.handler, self.refuse = handler, refuse
        self.configure(settings)
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.leaving = False  # the end is announced
        self.draining = False  # no more requests are taken
        self.listener: asyncio.AbstractServer | None = None
        self.url = ""

    def configure(self, settings: ServerConfig) -> None:
        """Hold to these limits from the next request on."""
        self.settings = settings
        self.limits = HeadLimits(settings.max_request_line_bytes, settings.max_head_bytes,
                                 settings.max_headers)

    async def listen(self, at: socket.socket) -> int:
        """Begin to accept at a bound socket; returns its port."""
        self.listener = await self.loop.create_server(
            lambda: ClientProtocol(self), sock=at, backlog=BACKLOG)
        host, port = at.getsockname()[:2]
        self.url = f"http://{bracketed(host)}:{port}"
        return int(port)

    async def drain(self, grace: float, hurry: asyncio.Event, delay: float = 0) -> None:
        """Go on for `delay` seconds, then accept no more and let open requests end for `grace`
        seconds, then cut the rest; `hurry` ends each wait."""
        self.leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await hurry.wait()
        self.draining = True
        if self.listener:
            self.listener.close()
        for connection in list(self.connections):
            if not connection.busy:
                connection.interrupt("shutdown")
        deadline = self.loop.time() + grace
        while self.connections and not hurry.is_set() and self.loop.time() < deadline:
            await asyncio.sleep(0.02)
        deadline = self.loop.time() + CUT_SECS
        while self.connections and self.loop.time() < deadline:
            for connection in list(self.connections):
                connection.interrupt("shutdown")
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.transport.abort()



# ============================================================================
#  22  Pipeline
# ============================================================================
# One request through the four phases: admitted, read, routed, prepared, sent,
# answered. The only place that joins what the sections above know.

# -- admission ---------------------------------------------------------------

def protocol_of(path: str) -> Protocol | None:
    """The protocol that a path is of; None where there is nothing."""
    return MESSAGES if path in COUNT_PATHS else MODEL_PATHS.get(path)


def admit(head: RequestHead, settings: ServerConfig) -> tuple[Protocol | int, ClientKey | None]:
    """The protocol of a request that is let in, or the status it is answered with here, and the
    key it came with; RequestError says why not (rulings 16 and 5)."""
    check_host(head, settings)
    if head.path in HEALTH_PATHS:
        check_method(head, b"GET", b"HEAD")
        return 200, None
    if (head.method == b"OPTIONS" and b"origin" in head.values
            and b"access-control-request-method" in head.values):
        return 204, None
    key = check_key(head.fields, client_keys(settings.api_keys, settings.keys), time.time())
    protocol = protocol_of(head.path)
    if protocol is None and asked_model(head.path) is not None:
        check_method(head, b"GET", b"HEAD")
        return 200, key
    if protocol is None:
        paths = ", ".join((*MODEL_PATHS, *COUNT_PATHS, *MODELS_PATHS))
        raise RequestError("there is nothing at this path", status=404,
                           fix=f"the paths are {paths}")
    check_method(head, b"POST")
    return protocol, key


def check_method(head: RequestHead, *allowed: bytes) -> None:
    """RequestError for a method that is none of those that would do."""
    if head.method not in allowed:
        told = b", ".join(allowed)
        raise RequestError("this method is not allowed here", status=405,
                           fix=f"use {told.decode()}", fields=[b"allow: " + told])


def check_origin(head: RequestHead, settings: ServerConfig) -> list[bytes]:
    """The header lines that let a browser's page see the answer; RequestError if it may not call.

    Browsers reach loopback too: without this any web page could use the proxy.
    """
    origin = head.values.get(b"origin")
    if origin is None:
        return []
    if origin.decode("latin-1").lower() not in settings.cors_allow_origins:
        raise RequestError("requests from this web origin are refused", status=403,
                           fix="list the origin in server.cors_allow_origins if it may use your"
                           " providers")
    return [b"access-control-allow-origin: " + origin, b"vary: origin",
            b"access-control-expose-headers: *"]


def check_host(head: RequestHead, settings: ServerConfig) -> None:
    """On a loopback listener the Host must mean this machine; DNS rebinding brings others."""
    if (is_loopback(settings.host) and (head.host or head.http11) and not is_loopback(head.host)
            and head.host not in (name.lower() for name in settings.allowed_hosts)):
        raise RequestError("the Host of this request is not this machine", status=403,
                           fix="list the name in server.allowed_hosts if it is yours")


class ClientKey(NamedTuple):
    """A key that clients may send; one without a name has no limits."""

    digest: bytes
    name: str = ""
    models: Sequence[re.Pattern[str]] = ()
    requests_per_minute: int | None = None
    expires: float = FOREVER

    def allows(self, model: str) -> bool:
        """Whether it is good for a model, whatever thinking that is to do."""
        base, _ = split_thinking(model)
        return not self.models or any(pattern.search(base) for pattern in self.models)


@functools.lru_cache(maxsize=16)
def client_keys(plain_keys: tuple[str, ...],
                keys: tuple[ClientKeyConfig, ...]) -> tuple[ClientKey, ...]:
    """The configured keys, ready to compare."""
    return (*(ClientKey(key_digest(key)) for key in plain_keys), *(
        ClientKey(key_digest(k.key), k.name, [compile_pattern("glob", glob) for glob in k.models],
                  k.requests_per_minute, FOREVER if k.expires is None else k.expires)
        for k in keys))


def check_key(fields: Iterable[Field], keys: Sequence[ClientKey], now: float) -> ClientKey | None:
    """The key in one of the headers that carry keys, None where no key is asked for; RequestError
    if there is none of ours. All are compared, by hash, so that time tells nothing."""
    found: ClientKey | None = None
    for name, value, _ in fields if keys else ():
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            value = value[7:].strip()
        if name in (b"authorization", b"x-api-key", b"x-goog-api-key"):
            sent = hashlib.sha256(value).digest()
            for key in keys:
                if hmac.compare_digest(sent, key.digest):
                    found = found or key
    challenge = [b"www-authenticate: Bearer"]
    if keys and found is None:
        raise RequestError("a valid API key of this proxy is needed", status=401, fields=challenge,
                           fix="send one of server.api_keys as Authorization: Bearer or x-api-key")
    if found and now >= found.expires:
        raise RequestError(f"the API key `{found.name}` of this proxy has expired", status=401,
                           fix="ask whoever runs the proxy for another", fields=challenge)
    return found


def take_turn(times: Sequence[float], limit: int, now: float) -> tuple[list[float], float]:
    """The last minute's requests with this one, and 0; without it, and how long it has to wait."""
    recent = [at for at in times if at > now - 60]
    if len(recent) >= limit:
        return recent, recent[-limit] + 60 - now
    return [*recent, now], 0.0


# -- the list of models ------------------------------------------------------

def asked_model(path: str) -> str | None:
    """The model that a path below /v1/models is about, "" for all, None for another path."""
    for base in MODELS_PATHS:
        if path.rstrip("/") == base:
            return ""
        if path.startswith(f"{base}/"):
            return unquote(path[len(base) + 1:])
    return None


class Listed(NamedTuple):
    """A model as lists tell of it; 0 is not known."""

    id: str
    owner: str  # a provider here
    context: int = 0
    output: int = 0


CONTEXT_MEMBERS = ("context_length", "context_window", "max_context_length", "max_model_len",
                   "max_input_tokens")
NO_CHAT_TYPES = ("embedding", "image", "audio", "video", "moderation", "rerank", "transcribe")
NO_CHAT_NAME = re.compile(r"embed|whisper|(^|[-/])tts([-/]|$)|dall-e|moderation|rerank",
                          re.IGNORECASE)


def read_models(raw: bytes, owner: str) -> list[Listed]:
    """The models that can chat in a list of one of three shapes; ValueError where it is none."""
    value = load(raw)
    items = value if isinstance(value, list) else mapping(value).get(
        "data", mapping(value).get("models"))
    if not isinstance(items, list):
        raise ValueError("not a list of models")
    out = []
    for item in items[:DISCOVERED_MODELS]:
        item = {"id": item} if isinstance(item, str) else mapping(item)
        id = (word(item.get("id")) or word(item.get("name")) or "").removeprefix("models/")
        if id and item.get("type") not in NO_CHAT_TYPES and not NO_CHAT_NAME.search(id):
            context = next(filter(None, (number(item.get(name)) for name in CONTEXT_MEMBERS)), 0)
            out.append(Listed(id, owner, context, number(item.get("max_tokens"))))
    return out


def leads_of(config: Config, names: Names, provider: str) -> list[str]:
    """What may stand in front of any of a provider's own model names; none where all are listed."""
    leads = [prefix for prefix, name in names.open if name == provider]
    if (provider in default_providers(config).values() and provider not in names.forced
            and not config.providers[provider].models):
        leads.append("")
    return leads


def list_models(config: Config, names: Names,
                found: Mapping[str, Sequence[Listed]]) -> dict[str, Listed]:
    """All models that clients may ask for: of exact routes, providers' names, and `found` lists."""
    out = {r.model_pattern: Listed(r.model_pattern, r.provider) for r in config.routing.routes
           if pattern_kind(r.match_kind, r.model_pattern) == "exact" and r.model_pattern}
    for id, provider in names.listed.items():
        out.setdefault(id, Listed(id, provider))
    for provider, models in found.items():
        for lead in leads_of(config, names, provider):
            for model in models:
                if names.takes(provider, model.id):
                    out.setdefault(lead + model.id, model._replace(id=lead + model.id))
    return out


def openai_model(model: Listed) -> Json:
    """A model as OpenAI lists it."""
    return {"id": model.id, "object": "model", "created": 0, "owned_by": model.owner}


def anthropic_model(model: Listed) -> Json:
    """A model as Anthropic lists it."""
    return {"type": "model", "id": model.id, "display_name": model.id,
            "created_at": "1970-01-01T00:00:00Z", "max_input_tokens": model.context or 200_000,
            "max_tokens": model.output or 64_000}


CODEX_EFFORTS = [{"effort": effort, "description": f"{effort} reasoning effort"}
                 for effort in ("low", "medium", "high", "xhigh")]
CODEX_INSTRUCTIONS = (
    "You are a coding agent in the user's terminal. Read before you change, use the tools until the"
    " task is done, keep changes small, check them, and say in a few words what you did.")


def codex_model(model: Listed) -> Json:
    """A model as Codex wants it, with every member that it cannot do without."""
    return {"slug": model.id, "display_name": model.id, "description": f"By {model.owner}",
            "default_reasoning_level": "medium", "supported_reasoning_levels": CODEX_EFFORTS,
            "shell_type": "shell_command", "visibility": "list", "supported_in_api": True,
            "priority": 1, "upgrade": None, "base_instructions": CODEX_INSTRUCTIONS,
            "supports_reasoning_summaries": True, "support_verbosity": False,
            "default_verbosity": None, "apply_patch_tool_type": "freeform",
            "truncation_policy": {"mode": "tokens", "limit": 10_000},
            "supports_parallel_tool_calls": True, "prefer_websockets": False,
            "context_window": model.context or 200_000,
            "max_context_window": model.context or 200_000, "experimental_supported_tools": []}


def models_shape(head: RequestHead) -> str:
    """Whose shape a client wants the list in: codex, messages or chat (gateway 1.11)."""
    if re.search(r"[?&]client_version=", head.query):
        return "codex"
    agent = head.values.get(b"user-agent", b"")
    anthropic = b"anthropic-version" in head.values or agent.startswith(b"claude-cli")
    return "messages" if anthropic else "chat"


def render_models(models: Sequence[Listed], shape: str) -> Json:
    """The list in a client's shape."""
    if shape == "codex":
        return {"models": [codex_model(model) for model in models]}
    if shape == "chat":
        return {"object": "list", "data": [openai_model(model) for model in models]}
    data = [anthropic_model(model) for model in sorted(models)]
    ids = [model["id"] for model in data] or [None]
    return {"data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


RENDER_MODEL = {"codex": codex_model, "messages": anthropic_model, "chat": openai_model}


class Catalogue:
    """Providers' own lists of models, asked for when a client wants one, and again when old."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.found: dict[str, list[Listed]] = {}
        self.fresh_until = 0.0
        self.task: asyncio.Task[None] | None = None

    async def models(self) -> dict[str, Listed]:
        """All models that clients may ask for. Only the first client waits for providers."""
        proxy, now = self.proxy, time.monotonic()
        if now >= self.fresh_until and self.task is None:
            self.task = asyncio.create_task(self.refresh())
        if self.task and not self.fresh_until:
            await asyncio.wait({self.task}, timeout=DISCOVERY_WAIT_SECS)
        return list_models(proxy.config, proxy.names, self.found)

    async def refresh(self) -> None:
        """Ask all whose models are not configured; a list that cannot be had replaces none."""
        proxy, config = self.proxy, self.proxy.config
        asked = [provider for name, provider in proxy.providers.items()
                 if leads_of(proxy.config, proxy.names, name)
                 and provider.settings.discover is not False and not provider.template_key]
        try:
            await asyncio.gather(*map(self.ask, asked))
        finally:
            self.task = None
            if proxy.config is config:  # else others are to be asked
                self.fresh_until = time.monotonic() + DISCOVERY_FRESH_SECS

    async def ask(self, provider: Provider) -> None:
        """Take over one provider's list; why that is impossible goes to the log."""
        credential = provider.credential
        try:
            async with asyncio.timeout(DISCOVERY_SECS):
                key = (await self.proxy.tokens.key(credential) if credential.dynamic
                       else credential.source.api_key or "")
                target, lines = provider.list_request(key)
                answer = await fetch(self.proxy.pool, provider.origin, target, lines=lines,
                                     secs=DISCOVERY_SECS)
            if answer.status != 200:
                raise UpstreamError(f"it answered {answer.status}")
            self.found[provider.name] = read_models(answer.body, provider.name)
        except (ProxyError, FramingError, OSError, ValueError) as error:
            self.proxy.log.event(logging.WARNING, "models", {
                "provider": provider.name, "err": str(error)[:LOG_TEXT_CHARS] or "timeout"})


# -- the proxy ---------------------------------------------------------------

class Provider:
    """A configured provider in one protocol and with one of its credentials, with what is the same
    for each of its requests made ready. `natives` has it in the further protocols it speaks,
    `others` with its further credentials."""

    def __init__(self, name: str, settings: ProviderConfig, environ: Mapping[str, str],
                 credential: Credential | None = None) -> None:
        self.name, self.settings = name, settings
        self.protocol = PROTOCOLS[settings.protocol]
        self.credentials = credentials_of(name, settings)
        self.others = {} if credential else {
            c.name: Provider(name, settings, environ, c) for c in self.credentials[1:]}
        self.credential = credential = credential or self.credentials[0]
        self.natives = {
            protocol: Provider(name, dataclasses.replace(
                settings, protocol=protocol, base_url=url, base_urls=NativeConfig()), environ,
                credential)
            for protocol, url in native_urls(settings).items() if protocol != settings.protocol}
        self.origin = origin_of(settings.base_url, credential.proxy_url, settings.ca_file, environ)
        self.fills_gaps = (self.protocol is MESSAGES
                           and settings.compatibility == "anthropic_compatible")
        key = credential.source.api_key or ""
        self.way = [*way_lines(self.origin), b"accept-encoding: identity"]
        self.fixed = [*self.way, *self.auth_lines(key)]
        copies = any(text.startswith("$") for text in credential.headers.values())
        self.own = None if copies else own_fields(credential.headers, EMPTY)
        self.template_key = bool(TEMPLATE_KEY.search(key))
        self.target = self.target_of(self.protocol.path)
        self.first = first_line(self.origin, "POST", self.target)

    def speaking(self, inbound: Protocol) -> Provider:
        """This provider in a client's own protocol if it speaks that, else in its first one."""
        return self.natives.get(inbound.name, self)

    def target_of(self, path: str) -> str:
        """The request target for a path of a protocol."""
        return join_target(urlsplit(self.settings.base_url).path, path.removeprefix("/v1")
                           if self.settings.versionless else path, "")

    def request_head(self, head: RequestHead, length: int,
                     translated: Sequence[bytes] | None = None, path: str = "",
                     key: str = "") -> bytes:
        """The head of a provider request, final empty line included; `path` is another one than
        the protocol's, `key` the one of a dynamic credential. The query of a translated one stays
        here, for it is the client's protocol that knows its words."""
        query = b"" if translated is not None else head.query.encode("ascii")
        first = self.first if not path else first_line(self.origin, "POST", self.target_of(path))
        own = own_fields(self.credential.headers, head.values) if self.own is None else self.own
        return format_lines(b"%b%b HTTP/1.1" % (first, query), *provider_lines(
            head, self.protocol, self.fixed if not key else [*self.way, *self.auth_lines(key)],
            length, translated, own))

    def list_request(self, key: str) -> tuple[str, list[bytes]]:
        """The target and the header lines to ask for its list of models."""
        own = own_fields(self.credential.headers, EMPTY)
        lines, pages = {b"accept": b"application/json"}, ""
        if self.protocol is MESSAGES:
            lines[b"anthropic-version"] = ANTHROPIC_VERSION
            pages = "?limit=1000"  # else 20 at a time
        return self.target_of(MODELS_PATHS[0]) + pages, [
            *self.auth_lines(key), *(b"%b: %b" % field for field in {**lines, **own}.items())]

    def auth_lines(self, key: str) -> list[bytes]:
        """The header line with a key, where there is one."""
        # OAuth's tokens are bearer tokens (6750) whatever the protocol has for keys
        auth = "bearer" if self.credential.source.oauth else self.settings.auth
        return [auth_line(self.protocol, key, auth)] if key and auth != "none" else []


def default_providers(config: Config) -> dict[str, str]:
    """The names of the providers that take what no route does, by protocol."""
    names = config.routing.default_provider_names
    return {name: getattr(names, name) for name in PROTOCOLS}


def ready_pair(inbound: Protocol, provider: Provider, config: Config) -> Pair | None:
    """The pair to a provider, None for the client's own protocol; SetupError for no real key."""
    if provider.template_key:
        raise SetupError(f"{provider.credential.path}.api_key is still the template's",
                         fix="put your key there, or name api_key_env or api_key_file")
    return pair_for(inbound, provider.protocol, config.translation.extended_pairs)


# Where providers count tokens, of those that do; vLLM and llama.cpp have Anthropic's path.
COUNT_TARGETS = {"messages": COUNT_PATHS[0], "chat": COUNT_PATHS[0],
                 "responses": f"{RESPONSES.path}/input_tokens"}
COUNTED_MEMBERS = ("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls",
                   "reasoning", "text")
CANNOT_COUNT = (404, 405, 501)


def counted_tokens(status: int, raw: bytes) -> int | None:
    """The count in a provider's answer; None where it gave none."""
    try:
        count = mapping(load(raw)).get("input_tokens")
    except ValueError:
        return None
    return count if 200 <= status < 300 and type(count) is int else None


def count_ask(provider: Provider, ask: Json, payload: Json) -> Json | None:
    """What a provider is asked to count, None if it cannot; `payload` is `ask` translated."""
    if provider.protocol is not MESSAGES and not provider.settings.profile.count_native:
        return None
    if provider.protocol is RESPONSES:
        ask = {name: payload[name] for name in COUNTED_MEMBERS if name in payload}
    return {name: value for name, value in ask.items() if name not in ("max_tokens", "stream")}


class Job(NamedTuple):
    """How one exchange is translated; `lines` are header lines of the provider request."""

    pair: Pair
    ctx: Context
    lines: list[bytes]


def context_of(inbound: Protocol, provider: Provider, decision: Decision, shown: str,
               seed: str) -> Context:
    """What a translation is to know of a request; `shown` is the model its answer is to name."""
    ctx = Context(inbound.word, provider.protocol.word, decision.model,
                  host=provider.origin.authority, now=int(time.time()),
                  profile=provider.settings.profile, seed=seed)
    ctx.thinking, ctx.shown = decision.thinking, shown
    return ctx


def shown_model(model: str, decision: Decision, settings: ProviderConfig) -> str:
    """The model that an answer is to name, "" where that is the provider's word for it."""
    said = settings.response_model
    renamed = model != decision.model and said != "upstream" and (
        said or decision.named or decision.thinking)
    return model if renamed else ""


def body_bytes(body: Json) -> bytes:
    """A body for a provider; RequestError for one that cannot be written."""
    try:
        return dump(body)
    except ValueError as error:
        raise RequestError(f"the request body is {error}") from None


def translated_request(pair: Pair, body: Json, ctx: Context) -> tuple[bytes, Job]:
    """The body for a provider of another protocol, or RequestError, and how it is answered."""
    payload = pair.request(body, ctx)
    return body_bytes(payload), Job(
        pair, ctx, translated_lines(payload.get("stream") is True, ctx.headers))


def thinking_request(body: Json, inbound: Protocol, ctx: Context) -> bytes:
    """The body in the client's own protocol, with the thinking that the model's name asks for."""
    if inbound is RESPONSES:
        body = {**body, **lift_system_items(body)}
    return body_bytes(with_thinking(body, ctx))


def event_bytes(protocol: Protocol, event: Any) -> bytes:
    """An event for a client as its protocol writes events; ValueError if it is nested too deep."""
    if protocol is CHAT:
        return format_event(None, DONE.encode() if event == DONE else dump(event))
    return format_event(event["type"], dump(event))


class Outlet:
    """The client's side of a translated answer: what the pair makes of the provider's events, and
    how that goes out.

    Where it is `live`, events go out as they come, with the first of them the 200 that was held
    back for it, and signs of life when there are none. Else they are gathered until the end.
    """

    def __init__(self, connection: Connection, inbound: Protocol, job: Job, lines: list[bytes],
                 live: bool) -> None:
        self.connection, self.inbound, self.ctx = connection, inbound, job.ctx
        self.lines, self.live, self.settings = lines, live, connection.server.settings
        self.clock = connection.server.loop.time
        self.stream = job.pair.stream(job.ctx)
        next(self.stream)
        self.done = self.ended = False  # whether the client's stream is whole, the provider's over
        self.events: list[Any] = []
        self.last: Any = None  # the event that was written last
        # when the client is to hear something
        self.due = self.clock() + self.settings.first_event_hold_secs if live else FOREVER

    def feed(self, items: Iterable[Any]) -> None:
        """Translate; what becomes of it goes out in one write, also if a ProxyError ends it."""
        send, out = self.stream.send, []
        try:
            for item in items:
                out += send(item)
        except StopIteration as end:
            out += end.value or ()
            self.done = True
        finally:
            if out:
                self.put(out)

    def end_input(self) -> None:
        """The provider's stream is over: the pair knows whether it was whole."""
        self.ended = True
        self.feed([None])
        if not self.done:
            raise UpstreamError("stream translation finish error: the upstream stream ended before"
                                " its terminal event", type=STREAM_TRANSLATION)

    def put(self, events: list[Any]) -> None:
        """Write events, or gather them."""
        if not self.live:
            self.events += events
            return
        try:
            data = b"".join([event_bytes(self.inbound, event) for event in events])
        except ValueError as error:
            raise UpstreamError(f"stream translation error: an event is {error}",
                                type=STREAM_TRANSLATION) from None
        self.begin()
        self.connection.write_part(data)
        self.last = events[-1]
        self.due = self.clock() + self.settings.sse_keepalive_secs

    def begin(self) -> None:
        """Write the head that was held back."""
        if not self.connection.answered:
            self.connection.write_head(200, [*self.lines, b"content-type: text/event-stream"], None)

    def sign(self) -> None:
        """Show a client that hears nothing that all is well."""
        if not self.connection.answered:
            self.begin()
        elif self.inbound is MESSAGES:
            self.feed([PING])
        else:
            self.connection.write_part(b": keepalive\n\n")
        self.due = self.clock() + self.settings.sse_keepalive_secs

    def end(self) -> None:
        """Write what is gathered, and the end."""
        if self.ctx.stream:
            self.live = True
            if self.events:
                self.put(self.events)
            self.begin()
            self.connection.write_end()
        else:
            write_json(self.connection, self.lines, collect(self.inbound.word, self.events))

    def failed(self, error: ProxyError) -> ProxyError:
        """What the pair makes of a failure: with its last words in `events`."""
        try:
            self.stream.send(error)
        except ProxyError as told:
            return told
        except StopIteration:  # it is the pair that has failed
            pass
        return error

    def fail(self, error: ProxyError, style: str) -> None:
        """End a stream that has begun with what its protocol has for that; nothing follows."""
        last = mapping(error.events[-1] if error.events else self.last)
        data = [event_bytes(self.inbound, event) for event in error.events]
        data.append(render_error_event(error, style, self.inbound,
                                       last.get("sequence_number", -1) + 1, nested=True))
        self.connection.write_part(b"".join(data))
        self.connection.write_end()


def write_json(connection: Connection, lines: list[bytes], value: Json) -> None:
    """Answer with a translated body."""
    try:
        body = dump(value)
    except ValueError as error:
        raise UpstreamError(f"the translated answer is {error}", type=INTERNAL) from None
    connection.write_head(200, [*lines, b"content-type: application/json"], len(body), body)


Ways = dict[Candidate, tuple[Decision, Provider]]
KNOWN_WAYS = 1024  # models whose ways are remembered


class Proxy:
    """Serves requests by one configuration; the handler of a `Server`."""

    def __init__(self, config: Config, log: Log, environ: Mapping[str, str]) -> None:
        self.log, self.environ = log, environ
        self.pool, self.ids, self.metrics = Pool(), RequestIds(), Metrics(time.time())
        self.tokens = Tokens(self.pool, log, environ)
        self.captures = CaptureStore(config.capture, captures_directory(environ), log)
        self.catalogue = Catalogue(self)
        self.turns: dict[str, list[float]] = {}  # times of the last minute, by the key's name
        self.scheduler = Scheduler()
        self.providers: dict[str, Provider] = {}
        self.configure(config)
        self.streams: set[Exchange] = set()
        self.drains: set[asyncio.Task[None]] = set()
        self.ticker: asyncio.TimerHandle | None = None

    def configure(self, config: Config) -> None:
        """Serve by `config` from the next request on; those on their way keep what they chose."""
        # first what may fail, for then nothing is to change
        providers = {name: Provider(name, settings, self.environ)
                     for name, settings in config.providers.items()}
        for name in providers.keys() & self.providers.keys():
            for c in providers[name].credentials:
                if c not in self.providers[name].credentials:  # its key was mended
                    reset_rests(self.scheduler, f"{name}/{c.name}")
        self.providers = providers
        self.config, self.style = config, config.error_responses.format
        self.routes = compile_routes(config.routing.routes)
        self.defaults = default_providers(config)
        routing, state = config.routing, self.scheduler
        self.known_ways: dict[tuple[str, str], Ways] = {}
        self.names = compile_names(config.providers, routing.force_model_prefix)
        state.strategy, state.affinity_secs, state.probe_secs = (
            routing.strategy, routing.session_affinity_secs, routing.probe_interval_secs)
        self.budget = Budget(routing.max_attempts, routing.retry_budget_secs)
        self.slots = asyncio.Semaphore(config.server.max_concurrent_requests)
        self.captures.configure(config.capture)
        self.catalogue.fresh_until = 0.0

    def ways(self, inbound: Protocol, model: str) -> Ways:
        """All that could serve a request for `model`, in the order of the configuration; a
        ProxyError where nothing could. A request keeps them when the configuration changes."""
        known = self.known_ways.get((inbound.name, model))
        if known is not None:
            return known
        found: dict[Key, tuple[Candidate, tuple[Decision, Provider]]] = {}
        for decision in choose_all(self.routes, self.defaults, inbound.name, model, self.names):
            provider = self.providers[decision.provider]
            for c in provider.credentials:
                way = Candidate(decision.provider, c.name, decision.model, c.priority, c.weight,
                                decision.tier)
                found.setdefault(way.key, (way, (decision, provider)))
        known = dict(found.values())
        if len(model) <= OBSERVED_CHARS:
            if len(self.known_ways) >= KNOWN_WAYS:
                self.known_ways.clear()
            self.known_ways[inbound.name, model] = known
        return known

    def close(self) -> None:
        """Let go of connections and timers."""
        self.pool.close()
        for task in (*self.drains, *filter(None, [self.catalogue.task])):
            task.cancel()
        if self.ticker:
            self.ticker.cancel()
        self.captures.close()

    async def serve(self, connection: Connection, head: RequestHead) -> None:
        """Answer one request, whatever happens."""
        await Turn(self, connection, head.method.decode("ascii"), head.path).serve(head)

    def refuse(self, connection: Connection, error: ProxyError) -> None:
        """Answer bytes that are no request, or that stopped coming."""
        Turn(self, connection, "-", "-").fail(error)

    # -- streams that are silent

    def watch(self, exchange: Exchange) -> None:
        """Have `wait` lines written while a stream is silent, where such lines are wanted."""
        if self.log.info_on:
            loop = asyncio.get_running_loop()
            exchange.last_byte_at = loop.time()
            self.streams.add(exchange)
            self.ticker = self.ticker or loop.call_later(SWEEP_SECS, self.tick)

    def tick(self) -> None:
        """Write a `wait` line for each stream that has been silent for a while."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for exchange in self.streams:
            idle = now - exchange.last_byte_at
            if idle >= SWEEP_SECS:
                self.log.event(logging.INFO, "wait", wait_fields(exchange, idle))
        self.ticker = loop.call_later(SWEEP_SECS, self.tick) if self.streams else None


class Interrupted(Exception):
    """A wait was ended from outside for this reason, and who noticed has no answer to that."""


class Turn:
    """One request on its way through a proxy; what is known of it grows on the way."""

    def __init__(self, proxy: Proxy, connection: Connection, method: str, path: str) -> None:
        self.proxy, self.log, self.connection = proxy, proxy.log, connection
        self.exchange = Exchange(proxy.ids.next(), method, path, time.perf_counter())
        proxy.metrics.began(self.exchange)
        connection.extra = [b"x-proxai-request-id: %d" % self.exchange.id]
        self.head: RequestHead
        self.inbound: Protocol
        self.provider: Provider
        self.idle_secs: float  # how long the provider may be silent
        self.stall_secs = proxy.config.tool_calls.timeout_secs
        self.shown = ""  # the model that the answer is to name, "" for the provider's word
        self.decision: Decision
        self.job: Job | None = None  # None where nothing is translated
        self.capture: Capture | None = None
        self.link: Link | None = None  # until another request may have it
        self.answer: ResponseHead
        self.body: ResponseBody
        self.lines: list[bytes]  # of the answer's head

    async def serve(self, head: RequestHead) -> None:
        """Answer the request, whatever happens."""
        connection, self.head = self.connection, head
        try:
            await self.run()
        except ProxyError as error:
            self.fail(error)
        except asyncio.CancelledError:
            self.interrupted(connection.take_reason())
        except Interrupted as cut:
            self.interrupted(str(cut))
        except FramingError as error:  # in the client's body
            connection.keep = False
            self.fail(malformed(error))
        except OSError:
            self.log_end(logging.INFO, "closed", ENDED_BY["client_gone"])
            raise
        except Exception:
            self.log.logger.exception("a bug in the proxy",
                                      extra={"fields": base_fields(self.exchange)})
            self.fail(ProxyError("the proxy failed; this is a bug, its log has the details"))
        finally:
            self.end_exchange()
            connection.watch.disarm()
            self.cut_link()
            if self.capture:
                connection.tap = None
                self.capture.end()

    async def run(self) -> None:
        """The way of a request that is let in."""
        head, exchange, connection = self.head, self.exchange, self.connection
        settings = self.proxy.config.server
        if self.log.debug_on:
            self.log.event(logging.DEBUG, "recv",
                           {**base_fields(exchange), "content_length": head.length})
        # so that a refusal has the shape the client expects
        exchange.inbound = protocol_of(head.path)
        if exchange.inbound and head.method == b"POST":
            self.begin_capture()
        if exchange.inbound is None and asked_model(head.path) is not None:
            exchange.inbound = MESSAGES if models_shape(head) == "messages" else CHAT
        connection.extra += check_origin(head, settings)
        protocol, key = admit(head, settings)
        exchange.client = key.name if key else ""
        if isinstance(protocol, int):
            if protocol == 200 and head.path not in HEALTH_PATHS:
                await self.answer_models(key)
            elif protocol == 200 and connection.server.leaving and head.path != "/livez":
                self.answer_here(503, b'{"status":"leaving"}')
            else:
                self.answer_here(protocol, b'{"status":"ok"}')
            return
        self.inbound = protocol
        raw = await connection.read_body(settings.max_request_body_bytes)
        exchange.inbound_bytes = len(raw)
        if self.capture:
            self.capture.inbound(raw)
        request = read_model_request(protocol, raw)
        if key:
            self.check_limits(key, request.model)
        exchange.model = request.model
        ways = self.proxy.ways(protocol, request.model)
        if head.path in COUNT_PATHS:
            await self.count(request.body, self.aim_ready(ways))
            return
        way: Candidate | None = None
        if len(ways) == 1:
            self.aim(*next(iter(ways.values())))
            await self.send(request.body, self.prepare(request), self.job and self.job.lines)
        elif (way := await self.try_each(ways, request)) is None:
            return
        del raw, request  # a stream may take hours, and bodies megabytes
        exchange.body = None
        await self.respond()
        if way:
            self.note_late(list(ways), way)

    def begin_capture(self) -> None:
        """Capture the request in the phases that are on now."""
        capture = self.capture = self.proxy.captures.begin(self.exchange.id, self.head)
        if capture:
            self.exchange.captured = True
            self.connection.tap = capture if PHASES[3] in capture.phases else None

    async def answer_models(self, key: ClientKey | None) -> None:
        """Tell which models there are, or of one of them, as the client's vendor would."""
        shape, wanted = models_shape(self.head), asked_model(self.head.path)
        models = {id: model for id, model in (await self.proxy.catalogue.models()).items()
                  if key is None or key.allows(id)}
        if wanted and wanted not in models:
            raise RequestError(f"there is no model {wanted[:MODEL_CHARS]}", status=404,
                               code="model_not_found", param="model",
                               fix="GET /v1/models lists the models")
        body = dump(RENDER_MODEL[shape](models[wanted]) if wanted
                    else render_models(list(models.values()), shape))
        self.exchange.down = len(body)
        self.answer_here(200, body)

    def check_limits(self, key: ClientKey, model: str) -> None:
        """RequestError where a key is not good for a model, or not now; count_tokens is free."""
        if not key.allows(model):
            raise RequestError(f"the API key `{key.name}` may not use the model {model}",
                               status=403, param="model")
        if key.requests_per_minute and self.head.path not in COUNT_PATHS:
            turns = self.proxy.turns
            turns[key.name], wait = take_turn(
                turns.get(key.name, ()), key.requests_per_minute, time.monotonic())
            if wait:
                raise RequestError(
                    f"the API key `{key.name}` has made its {key.requests_per_minute} requests"
                    f" of a minute", status=429, code="rate_limit_exceeded",
                    fields=[b"retry-after: %d" % math.ceil(wait)])

    def answer_here(self, status: int, body: bytes) -> None:
        """A list, health, or the preflight of a browser that may call (Fetch, CORS protocol)."""
        lines = [b"content-type: application/json", date_line()]
        if status == 204:
            body = b""
            wanted = self.head.values.get(b"access-control-request-headers", b"*")
            lines = [b"access-control-allow-methods: POST",
                     b"access-control-allow-headers: " + wanted, b"access-control-max-age: 600"]
        self.connection.write_head(status, lines, len(body), body)
        self.exchange.status = status
        self.proxy.metrics.forget(self.exchange)
        self.log_end(logging.DEBUG, "end")

    def aim(self, decision: Decision, first: Provider, credential: str = "") -> None:
        """Choose a provider and one of its credentials, its first one if none is named."""
        exchange = self.exchange
        self.provider = provider = first.others.get(credential, first).speaking(self.inbound)
        self.decision, self.job = decision, None
        self.idle_secs = provider.settings.read_idle_timeout_secs
        exchange.provider, exchange.provider_protocol = provider.name, provider.protocol
        exchange.credential = provider.credential.name if first.others else ""
        exchange.route, exchange.upstream_model = decision.route, decision.model
        self.shown = shown_model(exchange.model, decision, provider.settings)
        if exchange.dropped:  # for another provider
            self.tell_dropped({})

    def aim_ready(self, ways: Ways) -> Pair | None:
        """Choose what does not rest, for a request that tells nothing about that; the pair."""
        state, now = self.proxy.scheduler, time.time()
        way = next((way for way in ways if not resting(state, way, now)), next(iter(ways)))
        self.aim(*ways[way], way.credential)
        return ready_pair(self.inbound, self.provider, self.proxy.config)

    def prepare(self, request: ModelRequest) -> bytes:
        """The body for the provider that was chosen; a ProxyError where there is none."""
        pair = ready_pair(self.inbound, self.provider, self.proxy.config)
        if pair:
            return self.translate_request(pair, request.body)
        self.exchange.choices = number(request.body.get("n")) or 1
        if self.decision.thinking:
            ctx = self.context()
            raw = thinking_request(request.body, self.inbound, ctx)
            self.tell_dropped(ctx.dropped)
            return raw
        return pass_through_body(self.inbound, request, self.exchange.upstream_model)

    # -- several credentials or providers

    async def try_each(self, ways: Ways, request: ModelRequest) -> Candidate | None:
        """Send the request to one after the other until one answers it; which one did. Where none
        does, the client is told of the failure that helps it most."""
        state, exchange, candidates = self.proxy.scheduler, self.exchange, list(ways)
        session = session_keys(self.head.values, request.body)
        model, _ = split_thinking(request.model)  # thinking more is no other session
        tried: set[Key] = set()
        failures: list[tuple[Candidate, Verdict, ProxyError]] = []
        way = choose_credential(state, candidates, model, session, time.time())
        if way is None:
            raise unavailable(state, candidates, request.model, self.inbound, time.time())
        while way:
            tried.add(way.key)
            self.aim(*ways[way], way.credential)
            began = time.time()
            verdict, error = await self.attempt(request)
            now = time.time()
            note_result(state, candidates, way, verdict, now, began=began, model=model,
                        session=session)
            exchange.attempts.append(Attempt(way.provider, way.credential, exchange.status,
                                             verdict.what, milliseconds(now - began)))
            if error is None:
                return way
            failures.append((way, verdict, error))
            self.cut_link()
            step = next_step(state, candidates, tried, exchange.attempts, verdict,
                             time.perf_counter() - exchange.started, now,
                             budget=self.proxy.budget, jitter=random.random())
            if step.what == "stop":
                break
            self.connection.watch.disarm()
            await asyncio.sleep(step.wait_secs)  # ended by a client that goes away
            if step.what == "round":
                tried.clear()
            # another name of the model at the same key comes first, unless the key is what failed
            names = [c for c in candidates if step.what == "next" and verdict.what not in KEY_FAULTS
                     and (*c[:2], c.tier) == (*way[:2], way.tier)]
            for some in (names, candidates) if step.what != "same" else ():
                if way := choose_credential(state, some, model, session, time.time(), tried):
                    break
        told = most_useful([(verdict, error) for _, verdict, error in failures])
        way, verdict = next((way, verdict) for way, verdict, error in failures if error is told)
        self.aim(*ways[way], way.credential)
        self.fail(told, "timeout" if verdict.source == TIME_LIMIT else
                  "hdr-error" if verdict.source.startswith("status") or verdict.until
                  else "request-failed")
        return None

    def note_late(self, candidates: Sequence[Candidate], way: Candidate) -> None:
        """Learn from an error inside a stream that had begun: the next request goes elsewhere."""
        seen, now = self.exchange.observed, time.time()
        if seen and seen.failed:
            error = fault_of({"code": seen.error_code, "message": seen.error_message})
            note_result(self.proxy.scheduler, candidates, way,
                        classify(error, self.answer.values, None, now), now, began=now)

    async def attempt(self, request: ModelRequest) -> tuple[Verdict, ProxyError | None]:
        """Send the request to the provider that was chosen. What came of it, and the error where no
        answer did; an answer's stream is read up to the first thing that a client would see."""
        exchange, connection = self.exchange, self.connection
        exchange.status, exchange.head_at, exchange.rates, exchange.sse = 0, 0.0, (), False
        failed: ProxyError | None
        value: Any = None
        try:
            await self.send(request.body, self.prepare(request), self.job and self.job.lines)
            if 200 <= exchange.status < 300:
                failed = await (self.peek() if exchange.sse else self.check())
            else:
                failed, raw = await self.read_error()
                with contextlib.suppress(ValueError):
                    value = load(raw)
        except RequestError as error:  # this provider cannot be told; another may
            return Verdict("dropped", source="translation"), error
        except SetupError as error:
            return Verdict("auth", source="configuration"), error
        except UpstreamError as error:
            fault = "network" if exchange.phase == PHASES[1] else "dropped"
            return classify(None, {}, None, time.time(), fault), error
        except asyncio.CancelledError:
            reason = connection.take_reason()
            if reason not in TIMEOUTS:
                raise Interrupted(reason) from None
            return (Verdict("network" if reason == "connect" else "transient", source=TIME_LIMIT),
                    self.timeout_error(reason))
        if failed is None:
            return Verdict("ok"), None
        return classify(failed, self.answer.values, value, time.time()), failed

    async def check(self) -> ProxyError | None:
        """The error that an answer in one piece is, if any. What was read is read again."""
        raw, complete = await self.read_up_to(CHECKED_RESPONSE_BYTES)
        self.body.held = [raw]
        try:
            return answer_fault(load_answer(raw, self.answer.status)[0]) if complete else None
        except UpstreamError as error:
            return error

    async def peek(self) -> ProxyError | None:
        """Read a stream until it shows something, or for as long as its head may be held back; the
        error where it fails before. What was read is read again."""
        connection, body, protocol = self.connection, self.body, self.provider.protocol
        settings, clock = self.proxy.config.server, connection.server.loop.time
        observer = StreamObserver(protocol, settings.max_sse_event_bytes, 1)
        held: list[bytes] = []
        until = clock() + settings.first_event_hold_secs
        try:
            while (left := until - clock()) > 0:
                connection.watch.arm(min(self.idle_secs, left), "peek")
                data = await body.read()
                if not data:
                    return UpstreamError("the stream ended before it began"
                                         f" (provider `{self.provider.name}`)",
                                         type=UPSTREAM_BODY_READ)
                held.append(data)
                for event in observer.payloads(data, clock()):
                    if failed := stream_fault(protocol, event):
                        return failed
                    if is_visible(protocol, event):
                        left = 0
                if not left:
                    break
        except asyncio.CancelledError:
            reason = connection.take_reason()
            if reason != "peek" or connection.gone:
                raise Interrupted("client_gone" if connection.gone else reason) from None
        except UpstreamError as error:
            if self.job or not observer.splitter.oversize:  # who translates cannot hold it
                return error
        except (FramingError, OSError) as error:
            return self.unreadable(error)
        body.held = held
        return None

    async def count(self, body: Json, pair: Pair | None) -> None:
        """Answer count_tokens: by the provider where it can count, else with an estimate, which a
        header tells. Claude Code asks often, so this never fails for want of a counter."""
        exchange, provider = self.exchange, self.provider
        ask: Json = {**body, "model": exchange.upstream_model}
        payload = load(self.translate_request(pair, body)) if pair else ask
        counted: int | None = None
        asked = count_ask(provider, ask, payload)
        if asked is not None:
            await self.send(asked, dump(asked), translated_lines(False, ()) if pair else None,
                            COUNT_TARGETS[provider.protocol.word])
            if not pair and exchange.status not in CANNOT_COUNT:
                await self.respond()
                return
            found, complete = await self.read_up_to(ERROR_BODY_BYTES)
            self.release(complete)
            counted = counted_tokens(exchange.status, found)
        lines = [b"content-type: application/json", date_line()]
        if counted is None:
            counted = estimate_tokens(payload)
            lines.append(b"x-proxai-token-count: estimate")
        raw = dump({"input_tokens": counted})
        exchange.status, exchange.phase, exchange.down = 200, PHASES[3], len(raw)
        self.connection.write_head(200, lines, len(raw), raw)
        self.log_end(logging.INFO, "end")

    def context(self) -> Context:
        """What a translation is to know of this request."""
        return context_of(self.inbound, self.provider, self.decision, self.shown,
                          str(self.exchange.id))

    def translate_request(self, pair: Pair, body: Json) -> bytes:
        """The body for a provider of another protocol; RequestError for what it cannot express."""
        raw, self.job = translated_request(pair, body, self.context())
        self.exchange.estimate = self.job.ctx.estimate
        self.tell_dropped(self.job.ctx.dropped)
        return raw

    def tell_dropped(self, dropped: Mapping[str, str]) -> None:
        """Name what was left out so far to the client, and to the log with the reasons."""
        connection, exchange = self.connection, self.exchange
        if len(dropped) == exchange.dropped:
            return
        connection.extra = [line for line in connection.extra if not line.startswith(DROPPED_FIELD)]
        connection.extra += dropped_lines(dropped)
        if self.log.debug_on and dropped:
            fresh = list(dropped.items())[exchange.dropped:]
            told = {path[:OBSERVED_CHARS]: reason for path, reason in fresh}
            self.log.event(logging.DEBUG, "dropped",
                           {"request_id": str(exchange.id), "dropped": bounded(told)})
        exchange.dropped = len(dropped)
        exchange.dropped_paths = [path[:OBSERVED_CHARS]
                                  for path in itertools.islice(dropped, DROPPED_NAMES)]

    async def send(self, asked: Json, body: bytes, translated: Sequence[bytes] | None,
                   path: str = "") -> None:
        """Send the provider request when its turn has come, and read the answer's head; that is
        how long a slot is held. `asked` is what its line in the log tells of."""
        connection, exchange, provider = self.connection, self.exchange, self.provider
        exchange.body, exchange.provider_bytes, exchange.phase = asked, len(body), PHASES[1]
        if connection.gone:
            raise ConnectionResetError
        connection.exchanging = True
        connection.watch.disarm()
        tokens, credential, origin = self.proxy.tokens, provider.credential, provider.origin
        key = await tokens.key(credential) if credential.dynamic else ""
        async with self.proxy.slots:
            for again in (True, False):  # once more where a refused key can be renewed
                head = provider.request_head(self.head, len(body), translated, path, key)
                if self.capture:
                    self.capture.provider(f"{origin.scheme}://{origin.authority}", head, body)
                try:
                    link, self.answer, rest = await self.proxy.pool.exchange(
                        origin, head, body, connection.watch,
                        provider.settings.connect_timeout_secs, self.idle_secs, self.log_sent)
                except UpstreamError as error:
                    error.message = f"{error.message} (provider `{provider.name}`)"
                    raise
                self.link = link
                if self.answer.status != 401 or not key or not again:
                    break
                connection.watch.disarm()
                if not await tokens.refused(credential, key):
                    break
                link.abort()  # nobody is to see its answer
                key = await tokens.key(credential)
        self.note_head(link, rest)

    def log_sent(self) -> None:
        """The line for a request that is on its way, once, also when it had to be sent again."""
        exchange = self.exchange
        if exchange.phase == PHASES[2]:
            return
        exchange.phase = PHASES[2]
        if self.log.info_on:
            self.log.event(logging.INFO, "fwd", {
                **fwd_fields(exchange),
                "capture": bool(self.capture and PHASES[1] in self.capture.phases)})
        thinking = mapping(mapping(exchange.body).get("thinking"))
        if thinking.get("type") == "enabled" and self.inbound is MESSAGES:
            self.log.event(logging.WARNING, "anthropic_legacy_thinking_budget",
                           {**base_fields(exchange), "model": exchange.model,
                            "budget_tokens": number(thinking.get("budget_tokens"))})

    # -- answers

    def note_head(self, link: Link, rest: bytes) -> None:
        """Take the head of the answer into the story of the exchange; its body can be read."""
        exchange, answer, capture = self.exchange, self.answer, self.capture
        exchange.head_at = time.perf_counter()
        if capture:
            capture.upstream(answer, milliseconds(exchange.head_at - exchange.started))
        try:
            self.body = ResponseBody(link, answer, rest)
        except FramingError as error:  # a coding that we cannot undo
            raise self.unreadable(error) from None
        if capture and PHASES[2] in capture.phases:
            self.body.tap = capture.upstream_part
        content_type = answer.values.get(b"content-type")
        exchange.status, exchange.sse = answer.status, is_event_stream(content_type)
        exchange.content_type, exchange.encoding = (
            content_type, None if answer.length is not None else "chunked")
        exchange.rates = answer.fields

    async def respond(self) -> None:
        """Give the client what the provider answered."""
        exchange, answer, job = self.exchange, self.answer, self.job
        if not 200 <= answer.status < 300:
            self.fail((await self.read_error())[0], "hdr-error")
            return
        if self.log.info_on:
            self.log.event(logging.INFO, "hdr", end_fields(exchange))
        self.lines = self.mapped(job) if job else client_lines(answer, decoded=self.body.decoded)
        if b"date" not in answer.values:
            self.lines.append(date_line())
        if job:
            await (self.translate_stream if exchange.sse else self.translate_whole)(job)
        elif exchange.sse:
            self.lines.append(b"content-type: text/event-stream")
            await self.stream()
        else:
            self.lines.append(b"content-type: application/json")
            await self.whole()

    async def read_up_to(self, limit: int) -> tuple[bytes, bool]:
        """The answer's payload, and whether it is whole: reading stops behind `limit` bytes."""
        whole = self.body.take_whole()
        if whole is not None:
            return whole, True
        parts: list[bytes] = []
        size = 0
        try:
            while size <= limit:
                self.connection.watch.arm(self.idle_secs, "upstream_body")
                data = await self.body.read()
                if not data:
                    return b"".join(parts), True
                parts.append(data)
                size += len(data)
        except (FramingError, OSError) as error:
            raise self.unreadable(error) from None
        return b"".join(parts), False

    def unreadable(self, error: Exception) -> UpstreamError:
        """The answer cannot be read to its end."""
        said = str(error) if isinstance(error, FramingError) else "the connection broke"
        return UpstreamError(f"the provider's answer could not be read: {said}"
                             f" (provider `{self.provider.name}`)", type=UPSTREAM_BODY_READ)

    def mapped(self, job: Job) -> list[bytes]:
        """The header lines of the answer for a client of another protocol."""
        return mapped_lines(self.answer.fields, self.inbound, self.provider.protocol, job.ctx.now)

    async def read_error(self) -> tuple[ProxyError, bytes]:
        """A provider's own error, and its body, which a client that knows its shape gets."""
        raw, complete = await self.read_up_to(ERROR_BODY_BYTES)
        raw = without_key(raw, self.proxy.tokens.last(self.provider.credential))
        lines = self.mapped(self.job) if self.job else error_lines(self.answer.fields)
        error = upstream_error(self.answer.status, raw, lines)
        self.release(complete)
        self.exchange.down = len(raw)
        if (self.proxy.style == "native" and self.inbound is self.provider.protocol
                and error.type == UPSTREAM and complete):
            error.native = raw
        return error, raw

    async def whole(self) -> None:
        """An answer in one piece: held until it is known to be JSON, relayed if too large."""
        exchange, provider = self.exchange, self.provider
        raw, complete = await self.read_up_to(CHECKED_RESPONSE_BYTES)
        exchange.down, exchange.phase = len(raw), PHASES[3]
        if not complete:
            await self.relay_rest(raw)
            return
        value, strict = load_answer(raw, self.answer.status)
        if provider.fills_gaps and strict and fill_gaps_in_body(value):
            with contextlib.suppress(ValueError):
                raw = dump(value)
        if self.shown:
            raw = rename_model(raw, provider.protocol, self.shown)
        self.connection.write_head(self.answer.status, self.lines, len(raw), raw)
        self.release(True)
        await self.connection.flush()
        if self.log.info_on or exchange.captured or len(raw) > READ_BYTES:
            exchange.observed = observe_body(provider.protocol, value)
        elif isinstance(value, dict):
            exchange.usage = value.get("usage")
        self.log_end(logging.INFO, "end")

    async def relay_rest(self, data: bytes) -> None:
        """An answer beyond what is held for checking: its bytes pass as they come."""
        connection, length = self.connection, self.answer.length
        connection.write_head(self.answer.status, self.lines,
                              length if length and length > 0 and not self.body.decoded else None)
        try:
            while data:
                connection.write_part(data)
                await connection.flush()
                connection.watch.arm(self.idle_secs, "upstream_body")
                data = await self.body.read()
                self.exchange.down += len(data)
        except (FramingError, OSError) as error:
            connection.cut()
            self.log_end(logging.WARNING, "stream-error", str(error))
            return
        connection.write_end()
        self.release(True)
        self.log_end(logging.INFO, "end")

    def release(self, complete: bool) -> None:
        """Give the connection back if another request can use it."""
        link, self.link = self.body.link, None
        if complete and self.body.clean(self.answer):
            self.proxy.pool.give(link)
        else:
            link.abort()

    def cut_link(self) -> None:
        """End a connection that nobody was given."""
        if self.link:
            self.link.abort()
            self.link = None

    # -- streams

    def observe(self) -> StreamObserver:
        """Begin to watch the stream that the answer is."""
        self.exchange.phase = PHASES[3]
        observer = StreamObserver(self.provider.protocol,
                                  self.proxy.config.server.max_sse_event_bytes,
                                  self.exchange.choices)
        self.exchange.observed = observer.seen
        self.proxy.watch(self.exchange)
        return observer

    async def stream(self) -> None:
        """A stream of the client's own protocol: bytes as they come, watched beside their way."""
        connection, observer = self.connection, self.observe()
        connection.write_head(self.answer.status, self.lines, None)
        fault: str | None = None
        try:
            await self.pass_stream(observer)
        except (FramingError, OSError) as error:
            fault = (str(error) if isinstance(error, FramingError)
                     else "the connection to the provider broke")
        except asyncio.CancelledError:
            fault = connection.take_reason()
        level, outcome, said = self.stream_outcome(observer, fault)
        whole = observer.seen.terminal or (fault is None and observer.complete)
        if fault == "tool_stall" and (self.edits or not observer.splitter.size):
            stalled = UpstreamError(said or "", status=504, type=UPSTREAM_BODY_READ)
            connection.write_part(render_error_event(stalled, self.proxy.style, self.inbound,
                                                     observer.seen.sequence))
            whole = True
        if whole:
            connection.write_end()
        else:
            connection.cut()
        self.release(fault is None)
        self.log_end(level, outcome, said)

    async def pass_stream(self, observer: StreamObserver) -> None:
        """Relay a stream to its end, reading no faster than the client does."""
        connection, body, exchange = self.connection, self.body, self.exchange
        watch, clock, seen = connection.watch, connection.server.loop.time, observer.seen
        idle_secs, edits = self.idle_secs, self.edits
        while True:
            if seen.pending:
                left = observer.stall_at(self.stall_secs) - clock()
                watch.arm(min(left, idle_secs),
                          "tool_stall" if left < idle_secs else "upstream_idle")
            elif seen.terminal:
                watch.arm(min(AFTER_TERMINAL_SECS, idle_secs), "after_terminal")
            else:
                watch.arm(idle_secs, "upstream_idle")
            data = await body.read()
            if not data:
                break
            exchange.chunks += 1
            exchange.down += len(data)
            exchange.last_byte_at = now = clock()
            block = observer.feed(data, now)
            if edits:
                torn = observer.splitter.whole_from  # of an event too large to hold
                data = block[:torn] + self.edited(block[torn:])
                if not data:
                    continue
            connection.write_part(data)
            if connection.transport.get_write_buffer_size():
                await connection.flush()
        if edits and (tail := observer.splitter.close()):
            connection.write_part(tail)

    @property
    def edits(self) -> bool:
        """Whether events of the client's own protocol may change on their way."""
        return self.provider.fills_gaps or bool(self.shown)

    def edited(self, block: bytes) -> bytes:
        """A block of whole events as the client gets it."""
        if self.provider.fills_gaps:
            block = fill_gaps_in_block(block)
        return rename_in_block(block, self.inbound, self.shown) if self.shown else block

    # -- translated answers

    async def translate_whole(self, job: Job) -> None:
        """An answer in one piece for another protocol's client, who may have asked for a stream."""
        exchange, provider = self.exchange, self.provider
        raw, complete = await self.read_up_to(self.proxy.config.server.max_sse_event_bytes)
        exchange.down, exchange.phase = len(raw), PHASES[3]
        self.release(complete)
        if not complete:
            raise UpstreamError("the provider's answer is larger than server.max_sse_event_bytes",
                                type=UPSTREAM_BODY_READ)
        value, _ = load_answer(raw, self.answer.status, [STREAM_DECODER])
        if not isinstance(value, dict):
            raise UpstreamError("the provider's answer is not a JSON object", type=INTERNAL)
        exchange.observed = observe_body(provider.protocol, value)
        if job.ctx.stream:
            outlet = Outlet(self.connection, self.inbound, job, self.lines, live=False)
            outlet.feed(explode(provider.protocol.word, value))
            if not outlet.done:
                outlet.end_input()
            outlet.end()
        else:
            translated = job.pair.response(value, job.ctx)
            self.tell_dropped(job.ctx.dropped)
            write_json(self.connection, self.lines, translated)
        await self.connection.flush()
        self.log_end(logging.INFO, "end")

    async def translate_stream(self, job: Job) -> None:
        """A stream for a client of another protocol, which may have asked for one piece."""
        connection, observer = self.connection, self.observe()
        outlet = Outlet(connection, self.inbound, job, self.lines, live=job.ctx.stream)
        fault: str | None = None
        error: ProxyError | None = None
        try:
            fault = await self.pull_stream(observer, outlet)
            if fault is None:
                outlet.end()
        except ProxyError as raised:
            error = raised
        except (FramingError, OSError) as broken:
            error = self.unreadable(broken)
        except asyncio.CancelledError:
            fault = connection.take_reason()
        self.tell_dropped(job.ctx.dropped)
        if fault in ENDED_BY:
            self.interrupted(fault)
            return
        level, event, said = self.stream_outcome(
            observer, fault or (error.message if error and not outlet.ended else None))
        if fault:
            error = UpstreamError(said or fault, status=504, type=UPSTREAM_BODY_READ)
        if error:
            error = outlet.failed(error)
            self.exchange.error_type = error.type
            if event == "end":  # the provider thinks so
                level, event, said = logging.WARNING, "stream-error", error.message
            if connection.answered:
                outlet.fail(self.as_told(error), self.proxy.style)
                self.log_end(level, event, said)
            else:
                self.fail(error, event)
            return
        if not observer.seen.failed:  # a pair may take an end for whole that nobody announced
            level, event, said = logging.INFO, "end", None
        self.log_end(level, event, said)
        await self.drain()

    async def pull_stream(self, observer: StreamObserver, outlet: Outlet) -> str | None:
        """Translate a stream until the client's is whole; the reason if something else ended it."""
        connection, body, exchange = self.connection, self.body, self.exchange
        clock, transport = outlet.clock, connection.transport
        seen, chat = observer.seen, self.provider.protocol is CHAT
        heard = clock()
        while not outlet.done:
            if transport.get_write_buffer_size():
                await connection.flush()
            limits = [(heard + self.idle_secs, "upstream_idle"), (outlet.due, "silence")]
            if seen.pending:
                limits.append((observer.stall_at(self.stall_secs), "tool_stall"))
            if chat and seen.finish:  # all is said, and [DONE] may not come
                limits.append((heard + AFTER_TERMINAL_SECS, "finished"))
            when, reason = min(limits)
            connection.watch.arm(when - clock(), reason)
            try:
                data = await body.read()
            except asyncio.CancelledError:
                # The limit has ended the wait and nothing else: what comes is read the next time.
                reason = connection.take_reason()
                if reason == "silence" and not connection.gone:
                    outlet.sign()
                    continue
                if reason != "finished":
                    return "client_gone" if reason == "silence" else reason
                body.link.abort()
                data = b""
            if not data:
                outlet.end_input()
                break
            exchange.chunks += 1
            exchange.down += len(data)
            exchange.last_byte_at = heard = clock()
            outlet.feed(observer.payloads(data, heard))
        return None

    async def drain(self) -> None:
        """Let the provider end a stream that is complete, so that its connection can carry
        another request. The client's next request does not wait for that."""
        self.end_exchange()
        self.connection.watch.disarm()
        self.link = None
        task = asyncio.create_task(self.read_rest())
        self.proxy.drains.add(task)
        task.add_done_callback(self.proxy.drains.discard)
        try:
            await asyncio.wait({task}, timeout=DRAIN_SECS)
        except asyncio.CancelledError:
            self.connection.take_reason()

    async def read_rest(self) -> None:
        """Read a provider's stream to its end, if that comes soon."""
        complete = False
        try:
            async with asyncio.timeout(AFTER_TERMINAL_SECS):
                while await self.body.read():
                    pass
            complete = True
        except (FramingError, OSError):
            pass
        finally:
            self.release(complete)

    # -- ends

    def end_exchange(self) -> None:
        """The client has all it gets: it may go away, and nobody waits for the stream."""
        self.connection.exchanging = False
        self.proxy.streams.discard(self.exchange)

    def as_told(self, error: ProxyError) -> ProxyError:
        """An error as the client understands it."""
        exchange = self.exchange
        if isinstance(error, UpstreamError) and exchange.inbound and translation_name(exchange):
            return translated_error(error, exchange.inbound, exchange.estimate)
        return error

    def fail(self, error: ProxyError, event: str = "request-failed") -> None:
        """Answer with an error; a stream that has begun can only be cut."""
        connection, error = self.connection, self.as_told(error)
        self.exchange.error_type = error.type
        if connection.answered:
            connection.cut()
            self.log_end(logging.WARNING, "stream-error", error.message)
            return
        self.exchange.status = error.status
        write_error(connection, error, self.proxy.style, self.exchange.inbound)
        self.log_end(logging.WARNING, event, error.message, {
            "error_type": error.type, "error_code": error.code,
            "error_param": None if error.param in (ABSENT, None) else brief_param(error.param)})

    def timeout_error(self, reason: str) -> UpstreamError:
        """The error for a time limit of the provider."""
        kind, said = TIMEOUTS[reason]
        return UpstreamError(f"{said} (provider `{self.exchange.provider}`)", type=kind)

    def interrupted(self, reason: str) -> None:
        """A wait that was ended from outside before a stream began."""
        connection = self.connection
        if reason in TIMEOUTS:
            self.fail(self.timeout_error(reason), "timeout")
        elif reason == "body" or (reason == "shutdown" and not connection.answered):
            connection.keep = False
            self.fail(RequestError("the request body did not arrive in time", status=408)
                      if reason == "body" else ProxyError("the proxy is shutting down", status=503))
        else:
            connection.cut()
            self.log_end(logging.INFO, "closed", ENDED_BY.get(reason, reason))

    def log_end(self, level: int, event: str, said: str | None = None,
                more: Json | None = None) -> None:
        """The line that closes an exchange, and its place in the metrics."""
        exchange = self.exchange
        exchange.error = said[:LOG_TEXT_CHARS] if said else None
        if self.capture:
            self.capture.record = request_record(exchange, event, time.time(), time.perf_counter())
        if self.log.logger.isEnabledFor(level):
            fields = {**end_fields(exchange), **(more or {})}
            if event == "timeout":
                connecting = exchange.phase == PHASES[1]
                fields["timeout_ms"] = milliseconds(
                    self.provider.settings.connect_timeout_secs if connecting else self.idle_secs)
            self.log.event(level, event, fields)
        self.proxy.metrics.ended(exchange, event, time.perf_counter())

    def stream_outcome(self, observer: StreamObserver,
                       fault: str | None) -> tuple[int, str, str | None]:
        """Level, event and words for a stream's end; `fault` is None for a clean one."""
        seen = observer.seen
        if fault == "tool_stall":
            return (logging.WARNING, "stream-error",
                    "upstream SSE stalled while streaming tool arguments:"
                    f" none for tool_calls.timeout_secs = {self.stall_secs:g}")
        if seen.failed:
            return (logging.WARNING, "stream-error",
                    seen.error_message or "the provider sent an error")
        if seen.terminal or (fault is None and observer.complete):
            return logging.INFO, "end", None
        if fault == "upstream_idle":
            return (logging.WARNING, "timeout",
                    f"the provider was silent for read_idle_timeout_secs = {self.idle_secs:g}")
        if fault in ENDED_BY:
            return logging.INFO, "closed", ENDED_BY[fault]
        if fault:
            return logging.WARNING, "stream-error", fault
        if seen.pending:
            return (logging.WARNING, "unfinished-tool",
                    "the stream ended within the arguments of a tool call")
        return logging.INFO, "closed", "the stream ended before its terminal event"


TIME_LIMIT = "time limit"
ENDED_BY = {"client_gone": "the client went away",
            "client_write": "the client took no bytes for write_timeout_secs",
            "shutdown": "the proxy shut down"}
TIMEOUTS = {
    "connect": (UPSTREAM_REQUEST,
                "upstream request failed: no connection within connect_timeout_secs"),
    "upstream": (UPSTREAM_REQUEST,
                 "upstream request failed: no answer within read_idle_timeout_secs"),
    "upstream_body": (UPSTREAM_BODY_READ,
                      "the provider's answer stopped for read_idle_timeout_secs"),
}


def load_answer(raw: bytes, status: int, decoders: Iterable[json.JSONDecoder] = (
        DECODER, LENIENT_DECODER)) -> tuple[Any, bool]:
    """The JSON of an answer, and whether it is so to the letter: local servers write NaN."""
    for decoder in decoders:
        with contextlib.suppress(ValueError):
            return load(raw, decoder), decoder is DECODER
    raise UpstreamError(f"the provider answered {status} with a body that is not JSON", status=502,
                        type=INTERNAL, fix="check that base_url is the address of an API")


def date_line() -> bytes:
    """The Date header of an answer that has none from a provider."""
    return b"date: " + http_date(int(time.time()))


def write_error(connection: Connection, error: ProxyError, style: str,
                protocol: Protocol | None) -> None:
    """Answer with an error in the configured style."""
    content_type, body = render_error(error, style, protocol)
    lines = [*error.fields, b"content-type: " + content_type, date_line()]
    # the provider itself may have said if trying again helps
    if not (error.retry
            or any(line.lower().startswith(b"x-should-retry:") for line in error.fields)):
        lines.append(b"x-should-retry: false")
    connection.write_head(error.status, lines, len(body), body)


# -- dry runs ----------------------------------------------------------------

# What belongs to the client's own connection, or to the page it runs in.
NOT_REPEATED = HOP_BY_HOP | {b"host", b"content-length", b"accept-encoding", b"expect", b"origin"}


def repeated_lines(headers: Mapping[str, Any]) -> list[bytes]:
    """The header lines to send stored headers again; secrets were not stored."""
    return [f"{name}: {value}".encode() for name, value in headers.items()
            if name.lower().encode() not in NOT_REPEATED and value not in (REDACTED, "<non-utf8>")]


def explain(config: Config, path: str, lines: Sequence[bytes], raw: bytes,
            environ: Mapping[str, str]) -> Json:
    """What would become of a request with a path, header lines and a body, up to what the provider
    would get. Nothing is sent, and no key of the client is asked for. `answer` is the error that
    the client would get."""
    report: Json = {
        "path": path, "protocol": None, "model": None, "routes": [], "route": None,
        "provider": None, "provider_protocol": None, "translation": "", "upstream_model": None,
        "url": None, "headers": [], "body": None, "changes": [], "dropped": {}, "note": "",
        "candidates": [], "named": False, "answer": None}
    try:
        block = b"\r\n".join([b"POST %b HTTP/1.1" % path.encode("utf-8", "replace"),
                             b"host: 127.0.0.1", *lines])
        explain_request(report, config, parse_request_head(block, HeadLimits()), raw, environ)
    except (FramingError, ProxyError) as error:
        report["answer"] = (malformed(error) if isinstance(error, FramingError)
                            else error).payload()
    return report


def explain_request(report: Json, config: Config, head: RequestHead, raw: bytes,
                    environ: Mapping[str, str]) -> None:
    """Fill a report step by step, as `Turn.run` goes; ProxyError where that ends."""
    check_origin(head, config.server)
    protocol, _ = admit(head, dataclasses.replace(config.server, api_keys=(), keys=()))
    if isinstance(protocol, int):  # no POST
        return
    report["protocol"] = protocol.name
    if len(raw) > config.server.max_request_body_bytes:
        raise too_large(config.server.max_request_body_bytes)
    request = read_model_request(protocol, raw)
    report["model"] = request.model
    routes = compile_routes(config.routing.routes)
    tries = route_tries(routes, protocol.name, request.model)
    report["routes"] = [
        {**tried, "pattern": f"{pattern_kind(r.match_kind, r.model_pattern)} {r.model_pattern}"}
        for tried, r in zip(tries, config.routing.routes, strict=False)]
    decisions = choose_all(routes, default_providers(config), protocol.name, request.model,
                           compile_names(config.providers, config.routing.force_model_prefix))
    report["candidates"] = [
        {"provider": d.provider, "credential": c.name, "model": d.model, "tier": d.tier}
        for d in decisions for c in credentials_of(d.provider, config.providers[d.provider])]
    decision = decisions[0]
    report["named"] = decision.named
    provider = Provider(decision.provider, config.providers[decision.provider],
                        environ).speaking(protocol)
    report.update(provider=provider.name, provider_protocol=provider.protocol.name,
                  route=decision.route, upstream_model=decision.model)
    pair = ready_pair(protocol, provider, config)
    lines, target = None, ""
    ctx = context_of(protocol, provider, decision, "", "")
    if pair:
        body, job = translated_request(pair, request.body, ctx)
        lines = job.lines
        report.update(translation=f"{protocol.name}->{provider.protocol.name}",
                      dropped=job.ctx.dropped)
    elif decision.thinking:
        body = thinking_request(request.body, protocol, ctx)
        report["dropped"] = ctx.dropped
    else:
        body = pass_through_body(protocol, request, decision.model)
    if head.path in COUNT_PATHS:
        asked = count_ask(provider, {**request.body, "model": decision.model}, load(body))
        if asked is None:
            report["note"] = "the provider cannot count; the proxy answers with an estimate"
            return
        body, target = dump(asked), COUNT_TARGETS[provider.protocol.word]
        lines = translated_lines(False, ()) if pair else None
    explain_sent(report, provider, provider.request_head(head, len(body), lines, target), body)
    report["note"] = "the bytes pass through untouched" if body == raw else ""
    report["changes"] = diff_of(pretty(request.body), pretty(report["body"]), PHASES[:2])


def explain_sent(report: Json, provider: Provider, head: bytes, body: bytes) -> None:
    """Tell the provider request of which these are the head and the body."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    target = first.split(" ")[1]
    report["url"] = (f"{provider.origin.scheme}://{provider.origin.authority}{target}"
                     if target.startswith("/") else target)
    report["headers"] = [f"{name}: {masked(name, value.strip())}"
                         for name, _, value in (line.partition(":") for line in lines)]
    report["body"] = load(body)


def explain_lines(report: Json) -> list[str]:
    """A report of `explain` for people."""
    lines = [f"{report['path']}: {report['protocol'] or 'no protocol'},"
             f" model {printable(report['model'] or '-')}"]
    for i, tried in enumerate(report["routes"], 1):
        lines.append(f"  {'->' if tried['takes'] else '  '} {i}. {tried['route'] or '(no name)'}:"
                     f" {tried['pattern']}: {tried['why']}")
    if report["provider"]:
        lines.append(f"provider: {report['provider']}, "
                     + ("by that route" if report["routes"] and report["routes"][-1]["takes"]
                        else "by its names" if report["named"]
                        else f"the default of {report['protocol']}"))
        if len(report["candidates"]) > 1:
            lines.append("candidates: " + ", ".join(
                f"{c['provider']}/{c['credential']}{' when others fail' if c['tier'] else ''}"
                for c in report["candidates"]) + "; `why` tells which are ready")
        lines.append(f"protocol: {report['translation'] or report['provider_protocol']}")
        lines.append(f"model: {printable(report['upstream_model'])}")
    if report["url"]:
        lines += [f"POST {report['url']}", *(f"  {line}" for line in report["headers"]),
                  "body:", *shown_lines(pretty(report["body"]))]
        lines += ["changes:", *report["changes"]] if report["changes"] else []
    lines += [f"note: {report['note']}"] if report["note"] else []
    lines += [f"dropped: {printable(path)}: {why}" for path, why in report["dropped"].items()]
    if report["answer"]:
        lines.append("the client would get: {status} {type}: {message}".format(**report["answer"]))
    return lines



# ============================================================================
#  23  Control
# ============================================================================
# The control listener: health, what the proxy does and did, switches. Loopback
# only and for this machine's own programs; model requests never pass here.


class Control:
    """Serves the control listener; a handler of a `Server`, like `Proxy`."""

    def __init__(self, proxy: Proxy, server: Server) -> None:
        self.proxy, self.host = proxy, ServerConfig(host=proxy.config.mcp.host)
        self.server = server  # that clients talk to
        self.sessions = McpSessions()

    async def serve(self, connection: Connection, head: RequestHead) -> None:
        """Answer one request, whatever happens."""
        try:
            check_host(head, self.host)
            check_control_origin(head)
            below = head.path.startswith(CAPTURE_PATH)  # one capture, by its id
            methods = CONTROL_PATHS.get(CAPTURE_PATH if below else head.path)
            if methods is None:
                raise RequestError("there is nothing at this path of the control listener",
                                   status=404, fix="the paths are " + ", ".join(CONTROL_PATHS))
            check_method(head, *map(str.encode, methods))
            value = await methods[head.method.decode("ascii")](self, connection, head)
            if value is not None:
                write_text(connection, dump(value).decode(), "application/json")
        except ProxyError as error:
            self.refuse(connection, error)
        except FramingError as error:
            connection.keep = False
            self.refuse(connection, malformed(error))
        except asyncio.CancelledError:
            connection.take_reason()
            connection.cut()
        except OSError:
            raise
        except Exception:
            self.proxy.log.logger.exception("a bug in the control listener")
            self.refuse(connection, ProxyError("the proxy failed; its log has the details"))
        finally:
            connection.watch.disarm()

    def refuse(self, connection: Connection, error: ProxyError) -> None:
        """Answer with an error; an answer that has begun can only be cut."""
        if connection.answered:
            connection.cut()
        else:
            write_error(connection, error, "json", None)


def check_control_origin(head: RequestHead) -> None:
    """Pages of other sites may not call: a browser reaches loopback too (ruling 11)."""
    origin = head.values.get(b"origin")
    if origin is not None and not is_loopback(urlsplit(origin.decode("latin-1")).hostname or ""):
        raise RequestError("requests from this web origin are refused", status=403,
                           fix="use the control listener from this machine")


def query_number(head: RequestHead, name: str, default: int, most: int) -> int:
    """A whole number of the query, at most `most`; RequestError for anything else."""
    texts = parse_qs(head.query[1:], keep_blank_values=True).get(name)
    if texts is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", texts[-1]):
        raise RequestError(f"`{name}` must be a whole number", param=name,
                           fix=f"leave it out for {default}")
    return min(int(texts[-1]), most)


async def control_health(control: Control, connection: Connection, head: RequestHead) -> None:
    """GET /health: that the process runs (contract 10)."""
    write_text(connection, "OK")


CAPTURE_PATH = "/captures/"


async def control_captures(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /captures?limit=N: the stored exchanges, newest first."""
    limit = query_number(head, "limit", 50, 1000)
    found = await read_aside(list_captures, control.proxy.captures.directory, limit)
    return {"captures": found}


async def control_one_capture(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /captures/ID: one of them, with its phases and what changed between them."""
    directory, word = control.proxy.captures.directory, head.path[len(CAPTURE_PATH):]
    return mapping(await read_aside(
        lambda: capture_json(read_capture(directory, word, CAPTURE_JSON_BYTES * 2))))


async def read_aside(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader of captures returns, read beside the event loop."""
    try:
        return await asyncio.to_thread(read, *arguments)
    except ConfigError as error:
        raise RequestError(error.faults[0], status=404, fix=error.hint) from None


async def control_metrics(control: Control, connection: Connection, head: RequestHead) -> None:
    """GET /metrics: all counts, for Prometheus."""
    proxy = control.proxy
    write_text(connection, metrics_text(proxy.metrics, proxy.providers, __version__,
                                        len(control.server.connections), proxy.captures.dropped),
               "text/plain; version=0.0.4")


async def control_status(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /status: what the proxy does and did; of a provider's URL no more than where it is."""
    proxy, now = control.proxy, time.time()
    metrics = proxy.metrics
    metrics.count()
    providers = [{"name": name, "protocol": provider.protocol.name,
                  "base_url": f"{provider.origin.scheme}://{provider.origin.authority}",
                  **metrics.provider(name)} for name, provider in proxy.providers.items()]
    return {"version": __version__, "started_at": wall_text(metrics.started),
            "uptime_secs": int(now - metrics.started), "listen": control.server.url,
            "in_flight": len(metrics.open), "credentials": credentials_view(proxy, now),
            "requests": {"total": metrics.ended_count, "errors": metrics.error_count},
            "providers": providers, "captures": proxy.captures.status(),
            "history": metrics.history(now), "models": metrics.models(),
            "recent": metrics.requests(0, 20)}


async def control_requests(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /requests: the latest requests behind the number `after`, and those in flight."""
    metrics = control.proxy.metrics
    metrics.count()
    after = query_number(head, "after", 0, 1 << 50)
    limit = query_number(head, "limit", 50, RECENT_REQUESTS)
    return {"latest": metrics.ended_count,
            "open": metrics.open_requests(time.time(), time.perf_counter()),
            "requests": metrics.requests(after, limit)}


def credentials_view(proxy: Proxy, now: float) -> list[Json]:
    """Every credential in use, by its name, with what it rests from."""
    return [{"provider": name, "credential": c.name, "priority": c.priority, "weight": c.weight,
             "rests": rests_of(proxy.scheduler, name, c.name, now)}
            for name, provider in proxy.providers.items() for c in provider.credentials]


def why_view(proxy: Proxy, model: str, now: float) -> Json:
    """For each protocol that clients speak: all that could serve a model, and what keeps it from
    being used, or why nothing could."""
    out: Json = {"model": model, "protocols": {}}
    for protocol in PROTOCOLS.values():
        try:
            rows = why(proxy.scheduler, list(proxy.ways(protocol, model)), now)
        except ProxyError as error:
            out["protocols"][protocol.name] = {"error": error.message}
        else:
            out["protocols"][protocol.name] = {"candidates": rows}
    return out


async def control_why(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /why?model=NAME: who could serve a model."""
    model = parse_qs(head.query[1:]).get("model", [""])[0]
    if not model:
        raise RequestError("`model` is missing", param="model", fix="ask for /why?model=NAME")
    return why_view(control.proxy, model, time.time())


async def control_credentials(control: Control, connection: Connection, head: RequestHead) -> Json:
    """GET /credentials: all credentials, and which of them rest."""
    return {"credentials": credentials_view(control.proxy, time.time())}


async def control_reset(control: Control, connection: Connection, head: RequestHead) -> Json:
    """POST /credentials/reset: end the rests of a credential, or of all."""
    wanted = (await read_control_body(connection, head)).get("name")
    proxy = control.proxy
    known = {name for row in credentials_view(proxy, 0) for name in (
        row["credential"], f"{row['provider']}/{row['credential']}")}
    if wanted not in known | {"all"}:
        raise RequestError(f"there is no credential {wanted if isinstance(wanted, str) else ''}",
                           status=404, fix=f"there are {', '.join(sorted(known))}, all")
    ended = reset_rests(proxy.scheduler, wanted)
    proxy.log.event(logging.INFO, "credentials_reset", {"name": wanted, "ended": ended})
    return {"reset": ended}


async def read_control_body(connection: Connection, head: RequestHead) -> Json:
    """The JSON object that a request to the control listener has; no page of another site can send
    one unasked."""
    content_type = head.values.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        raise RequestError("the body must be JSON", status=415,
                           fix="send content-type: application/json")
    try:
        return mapping(load(await connection.read_body(CONTROL_BODY_BYTES)))
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def write_text(connection: Connection, text: str, content_type: str = "text/plain") -> None:
    """Answer with a text that nobody may keep."""
    body = text.encode()
    connection.write_head(200, [f"content-type: {content_type}; charset=utf-8".encode(),
                                b"cache-control: no-store", b"x-content-type-options: nosniff",
                                date_line()], len(body), body)


# -- MCP ---------------------------------------------------------------------
# Streamable HTTP at /mcp (contract 10). What a message is answered with depends on the message and
# the proxy alone; headers, sessions and event streams are the transport's, further below.

INVALID_MESSAGE, NO_METHOD, INVALID_PARAMS = -32600, -32601, -32602
JSON_TYPES = {"string": str, "integer": int, "object": dict}
MCP_WORDS = {True: "true", False: "false", None: "none"}
MCP_SESSION = b"mcp-session-id"
MCP_ACCEPT = {b"POST": (b"application/json", b"text/event-stream"), b"GET": (b"text/event-stream",)}
MCP_PRIMING = b"id:0\nretry:3000\ndata:\n\n"


class RpcError(Exception):
    """Why a request of JSON-RPC has no result, with its code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class McpTool(NamedTuple):
    """What a client is told of a tool, and what makes its text of the proxy and the arguments."""

    title: str
    description: str
    run: Callable[[Proxy, Json], str]
    arguments: Json  # name -> JSON schema
    required: tuple[str, ...] = ()
    changes: bool = False  # whether it changes what the proxy does
    aside: bool = False  # whether it takes a while, and so runs on a thread


def tool_capture_status(proxy: Proxy, arguments: Json) -> str:
    """The switches of the phases, and where captures go."""
    switches = proxy.captures.switches
    views: Mapping[str, Mapping[str, bool | None]] = {
        "defaults": switches.defaults, "overrides": switches.overrides,
        "effective": {phase: switches.effective(phase) for phase in PHASES}}
    return "\n".join([*(f"{view}.{phase}_enabled: {MCP_WORDS[values[phase]]}"
                        for view, values in views.items() for phase in PHASES),
                      f"captures_dir: {proxy.captures.directory}"])


def tool_capture_override(value: bool | None, proxy: Proxy, arguments: Json) -> str:
    """Override switches with `value`, and tell how they are then."""
    proxy.captures.switches.override(arguments["target"], value)
    return tool_capture_status(proxy, arguments)


def tool_capture_list(proxy: Proxy, arguments: Json) -> str:
    """The newest captures, a line each."""
    return "\n".join(
        " ".join([f"request_id={stored.id} prefix={stored.prefix}",
                  *(f"{phase}={MCP_WORDS[phase in stored.files]}" for phase in PHASES)])
        for stored in stored_captures(proxy.captures.directory)[:arguments["limit"]]
    ) or "There are no captures yet."


def tool_capture_show_latest(proxy: Proxy, arguments: Json) -> str:
    """The files of the newest capture, or of the newest that has the phase `target`."""
    target, directory = arguments.get("target"), proxy.captures.directory
    newest = next((stored for stored in stored_captures(directory)
                   if not target or target in stored.files), None)
    if newest is None:
        return f"There are no captures{f' of {target}' if target else ''} yet."
    return "\n".join([
        f"request_id: {newest.id}", f"prefix: {newest.prefix}",
        *(f"{phase}.{name[len(f'{newest.prefix}-{phase}.'):].partition('.')[0]}: {directory / name}"
          for phase in ([target] if target else PHASES) for name in newest.files.get(phase, ()))])


def tool_capture_read(proxy: Proxy, arguments: Json) -> str:
    """What was captured of a request: for each phase its head and its body."""
    directory = proxy.captures.directory
    capture = read_capture(directory, arguments["id"], MCP_READ_BYTES)
    parts = [f"request_id: {capture.id}"]
    for name, phase in capture.phases.items():
        if arguments.get("phase", name) == name:
            parts += [f"{name}.head:\n{pretty(phase.head)}",
                      f"{name}.body:\n{body_text(phase.body or b'', phase.sse)}"]
    text = "\n\n".join(parts)
    return text if len(text) <= MCP_TEXT_CHARS else (
        f"{text[:MCP_TEXT_CHARS]}\n\n(cut here; all of it is in the files of {directory})")


def tool_explain(proxy: Proxy, arguments: Json) -> str:
    """What would become of a request."""
    lines = [f"{name}: {value}".encode() for name, value in arguments["headers"].items()]
    return pretty(explain(proxy.config, arguments["path"], lines, dump(arguments["body"]),
                          proxy.environ))


def tool_recent_requests(proxy: Proxy, arguments: Json) -> str:
    """The records of the latest requests."""
    proxy.metrics.count()
    return pretty(proxy.metrics.requests(0, arguments["limit"]))


def tool_providers(proxy: Proxy, arguments: Json) -> str:
    """Where requests can go, and which do; never a key or the path of an address."""
    routes = proxy.config.routing.routes
    return pretty([{
        "name": name, "protocol": provider.protocol.name,
        "base_url": f"{provider.origin.scheme}://{provider.origin.authority}",
        "default_for": [protocol for protocol, default in proxy.defaults.items()
                        if default == name],
        "routes": [{key: value for key in ("name", "request_protocol", "model_pattern",
                                           "upstream_model")
                    if (value := getattr(route, key))}
                   for route in routes if route.provider == name],
    } for name, provider in proxy.providers.items()])


async def mcp_initialize(proxy: Proxy, params: Json) -> Json:
    """Who we are, in the version the client asks for, or in our newest."""
    asked = params.get("protocolVersion")
    if not isinstance(asked, str):
        raise RpcError(INVALID_PARAMS, "protocolVersion must be a string")
    return {"protocolVersion": asked if asked in MCP_VERSIONS else MCP_VERSIONS[-1],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "proxai", "version": __version__},
            "instructions": "These tools look into this machine's ProxAI, a proxy for model"
                            " requests, and switch its captures; changes last until it restarts."}


async def mcp_tools(proxy: Proxy, params: Json) -> Json:
    """All tools."""
    return {"tools": [
        {"name": name, "description": tool.description, "inputSchema": tool_schema(tool),
         "annotations": {"title": tool.title, "readOnlyHint": not tool.changes,
                         "destructiveHint": False, "idempotentHint": True,
                         "openWorldHint": False}}
        for name, tool in MCP_TOOLS.items()]}


def tool_schema(tool: McpTool) -> Json:
    """The JSON schema of a tool's arguments."""
    return {"type": "object", "properties": tool.arguments, "required": list(tool.required),
            "additionalProperties": False}


async def mcp_call(proxy: Proxy, params: Json) -> Json:
    """The result of a tool: its text, or what went wrong in it, which the model may read."""
    name = params.get("name")
    tool = MCP_TOOLS.get(name) if isinstance(name, str) else None
    if tool is None:
        raise RpcError(INVALID_PARAMS,
                       f"there is no tool {short(name)}; there are {', '.join(MCP_TOOLS)}")
    given = {} if (found := params.get("arguments")) is None else found
    if not isinstance(given, dict):
        raise RpcError(INVALID_PARAMS, "arguments must be an object")
    # models write null for what they leave out
    given = {key: value for key, value in given.items() if value is not None}
    if faults := list(argument_faults(tool_schema(tool), given)):
        raise RpcError(INVALID_PARAMS, f"{name}: {'; '.join(faults)}")
    arguments = {key: schema["default"] for key, schema in tool.arguments.items()
                 if "default" in schema} | given
    wrong = False
    try:
        text = (await asyncio.to_thread(tool.run, proxy, arguments) if tool.aside
                else tool.run(proxy, arguments))
    except (ProxyError, ConfigError, OSError, ValueError) as error:  # ValueError: half a surrogate
        text, wrong = str(error), True
    return {"content": [{"type": "text", "text": text}], "isError": wrong}


async def mcp_ping(proxy: Proxy, params: Json) -> Json:
    """That we are there."""
    return {}


def argument_faults(schema: Json, given: Json) -> Iterator[str]:
    """What a tool's schema forbids of arguments; it has the words that our tools use."""
    yield from (f"{key} is missing" for key in schema["required"] if key not in given)
    for key, value in given.items():
        one = schema["properties"].get(key)
        if one is None:
            yield f"there is no argument {short(key)}"
        elif type(value) is not JSON_TYPES[one["type"]]:
            yield f"{key} must be of type {one['type']}"
        elif value not in one.get("enum", (value,)):
            yield f"{key} must be one of {', '.join(one['enum'])}"
        elif one["type"] == "integer" and not one["minimum"] <= value <= one["maximum"]:
            yield f"{key} must be from {one['minimum']} to {one['maximum']}"


def is_rpc(value: Any) -> bool:
    """Whether a value is a message of JSON-RPC: a request, a notification or an answer."""
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        return False
    if "id" in value and type(value["id"]) not in (int, str):
        return False
    return isinstance(value.get("method"), str) or (
        "id" in value and ("result" in value or "error" in value))


async def mcp_answer(proxy: Proxy, message: Any) -> Json | None:
    """The answer to a message; None for a notification or an answer, that want none."""
    reply: Json = {"jsonrpc": "2.0", "id": None}
    try:
        if not is_rpc(message):
            raise RpcError(INVALID_MESSAGE, "this is no message of JSON-RPC 2.0")
        if "id" not in message or "method" not in message:
            return None
        reply["id"] = message["id"]
        method = MCP_METHODS.get(message["method"])
        if method is None:
            raise RpcError(NO_METHOD, f"there is no method {short(message['method'])}")
        params = message.get("params", {})
        if not isinstance(params, dict):
            raise RpcError(INVALID_PARAMS, "params must be an object")
        reply["result"] = await method(proxy, params)
    except RpcError as error:
        reply["error"] = {"code": error.code, "message": str(error)}
    return reply


MCP_TARGET = {"type": "string", "enum": [*PHASES, "all"], "default": "all",
          "description": "Which phase of requests; all of them without it."}
MCP_PHASE = {"type": "string", "enum": [*PHASES], "description": "Only this phase."}
MCP_LIMIT = {"type": "integer", "minimum": 1, "maximum": 200, "default": 10,
             "description": "How many, at most."}


MCP_TOOLS = {
    "capture_status": McpTool(
        "Capture status", "Which phases of requests are captured to files: by the configuration,"
        " by overrides, in effect.", tool_capture_status, {}),
    "capture_enable": McpTool(
        "Enable captures", "Capture a phase of the requests that start from now on. Captures hold"
        " prompts and answers; they stay on this machine.",
        functools.partial(tool_capture_override, True), {"target": MCP_TARGET}, changes=True),
    "capture_disable": McpTool(
        "Disable captures", "Capture a phase no longer.",
        functools.partial(tool_capture_override, False), {"target": MCP_TARGET}, changes=True),
    "capture_clear": McpTool(
        "Clear overrides", "Capture a phase as the configuration says again.",
        functools.partial(tool_capture_override, None), {"target": MCP_TARGET}, changes=True),
    "capture_show_latest": McpTool(
        "Latest capture", "The files of the newest capture.", tool_capture_show_latest,
        {"target": MCP_PHASE}, aside=True),
    "capture_list": McpTool(
        "List captures", "The captures, newest first, with the phases that each has.",
        tool_capture_list, {"limit": MCP_LIMIT}, aside=True),
    "capture_read": McpTool(
        "Read a capture", "Heads and bodies of a captured request, as text; keys are redacted.",
        tool_capture_read,
        {"id": {"type": "string", "description": "The request_id of a capture."},
         "phase": MCP_PHASE}, ("id",), aside=True),
    "explain": McpTool(
        "Explain a request", "What the proxy would do with a request, without sending it: route,"
        " provider, translation, what is dropped.", tool_explain,
        {"path": {"type": "string", "description": "Such as /v1/responses."},
         "body": {"type": "object", "description": "The body of the request."},
         "headers": {"type": "object", "default": {}, "description": "Its headers, by name.",
                     "additionalProperties": {"type": "string"}}}, ("path", "body"), aside=True),
    "recent_requests": McpTool(
        "Recent requests", "The latest requests: models, providers, status, times, tokens, errors;"
        " no contents.", tool_recent_requests, {"limit": {**MCP_LIMIT, "default": 20}}),
    "providers": McpTool(
        "Providers", "The providers, with the routes that lead to them and the protocols they are"
        " the default of.", tool_providers, {}),
    "why": McpTool(
        "Why a model is or is not served", "Every provider and credential that could serve a model:"
        " whether it is used now, and if not, why, who said so, and until when.",
        lambda proxy, arguments: pretty(why_view(proxy, arguments["model"], time.time())),
        {"model": {"type": "string", "description": "As a client asks for it."}}, ("model",)),
    "credentials": McpTool(
        "Credentials", "The credentials of the providers, by name, and which of them rest.",
        lambda proxy, arguments: pretty(credentials_view(proxy, time.time())), {}),
}

MCP_METHODS = {"initialize": mcp_initialize, "ping": mcp_ping, "tools/list": mcp_tools,
               "tools/call": mcp_call}


class McpSession:
    """A client of /mcp from its `initialize` on."""

    def __init__(self, version: str, now: float) -> None:
        self.id, self.version, self.used = os.urandom(16).hex(), version, now
        self.streams = 0  # that wait for what the server says of its own accord
        self.ended = asyncio.Event()


class McpSessions:
    """The sessions of /mcp by id. One that is idle for too long ends, and of too many the one
    that was idle longest; while a stream is open a session is not idle."""

    def __init__(self) -> None:
        self.open: dict[str, McpSession] = {}

    def begin(self, version: str, now: float) -> McpSession:
        """A new session."""
        self.sweep(now)
        if len(self.open) >= MCP_SESSIONS:
            self.end(min(self.open.values(), key=lambda one: (one.streams > 0, one.used)))
        session = McpSession(version, now)
        self.open[session.id] = session
        return session

    def find(self, head: RequestHead, now: float) -> McpSession:
        """The session that a request names."""
        self.sweep(now)
        id = head.values.get(MCP_SESSION)
        if id is None:
            raise RequestError("the header Mcp-Session-Id is missing")
        session = self.open.get(id.decode("latin-1"))
        if session is None:
            raise RequestError("there is no such MCP session", status=404,
                               fix="begin a new one with initialize")
        session.used = now
        return session

    def sweep(self, now: float) -> None:
        """End the sessions that are idle for too long."""
        for session in list(self.open.values()):
            if not session.streams and now - session.used > MCP_IDLE_SECS:
                self.end(session)

    def end(self, session: McpSession) -> None:
        """End a session and its streams."""
        session.ended.set()
        self.open.pop(session.id, None)


def check_mcp(head: RequestHead) -> None:
    """Refuse a request whose headers are not those of the transport."""
    accepted = head.values.get(b"accept", b"").lower()
    for kind in MCP_ACCEPT.get(head.method, ()):
        if kind not in accepted:
            raise RequestError(f"Accept must contain {kind.decode()}", status=406)
    kind = head.values.get(b"content-type", b"").lower()
    if head.method == b"POST" and not kind.startswith(b"application/json"):
        raise RequestError("Content-Type must be application/json", status=415)
    version = head.values.get(b"mcp-protocol-version")
    if version is not None and version.decode("latin-1") not in MCP_VERSIONS:
        raise RequestError(f"there is no MCP-Protocol-Version {short(version.decode('latin-1'))}"
                           " here", fix=f"there are {', '.join(MCP_VERSIONS)}")


def rpc_messages(raw: bytes, version: str | None) -> list[Any]:
    """The messages of a body: one, or several where the version of the session knows batches."""
    try:
        value = load(raw)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", status=415) from None
    if isinstance(value, list) and version == MCP_BATCH_VERSION and 0 < len(value) <= MCP_BATCH:
        return value
    if not is_rpc(value):
        raise RequestError("the body is no message of JSON-RPC 2.0", status=415,
                           fix=f"batches are for {MCP_BATCH_VERSION}, up to {MCP_BATCH} messages"
                           if isinstance(value, list) else "")
    return [value]


async def control_mcp(control: Control, connection: Connection, head: RequestHead) -> None:
    """POST /mcp: a client's messages, answered as events."""
    check_mcp(head)
    now, sessions = connection.server.loop.time(), control.sessions
    session = sessions.find(head, now) if MCP_SESSION in head.values else None
    messages = rpc_messages(await connection.read_body(MCP_BODY_BYTES),
                             session.version if session else None)
    first = mapping(messages[0])
    begins = first.get("method") == "initialize" and "id" in first
    if session is None and not begins:
        raise RequestError("a session begins with initialize", status=422,
                           fix="later requests name it in Mcp-Session-Id")
    answers = [answer for message in messages
               if (answer := await mcp_answer(control.proxy, message)) is not None]
    if not answers:
        connection.write_head(202, [date_line()], 0)
        return
    lines = mcp_lines()
    if begins and "result" in answers[0]:
        session = sessions.begin(answers[0]["result"]["protocolVersion"], now)
        lines.append(b"%b: %b" % (MCP_SESSION, session.id.encode()))
    body = MCP_PRIMING + b"".join(b"data: %b\n\n" % dump(answer) for answer in answers)
    connection.write_head(200, lines, len(body), body)


async def control_mcp_stream(control: Control, connection: Connection, head: RequestHead) -> None:
    """GET /mcp: a stream for what the server says of its own accord, which is nothing; it lasts as
    long as the session."""
    check_mcp(head)
    session = control.sessions.find(head, connection.server.loop.time())
    if connection.gone:
        raise ConnectionResetError
    connection.exchanging, session.streams = True, session.streams + 1
    try:
        connection.write_head(200, mcp_lines(), None)
        connection.write_part(MCP_PRIMING)
        while not session.ended.is_set():
            await connection.flush()
            connection.watch.disarm()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.ended.wait(), MCP_KEEPALIVE_SECS)
                break
            connection.write_part(b":\n\n")
    finally:
        connection.exchanging, session.streams = False, session.streams - 1
        session.used = connection.server.loop.time()
    connection.write_end()


async def control_mcp_end(control: Control, connection: Connection, head: RequestHead) -> None:
    """DELETE /mcp: the end of a session."""
    check_mcp(head)
    control.sessions.end(control.sessions.find(head, connection.server.loop.time()))
    connection.write_head(202, [date_line()], 0)


def mcp_lines() -> list[bytes]:
    """The head of an event stream."""
    return [b"content-type: text/event-stream", b"cache-control: no-cache", date_line()]


async def control_capture(control: Control, connection: Connection, head: RequestHead) -> Json:
    """POST /capture: override the switch of a phase, or of `all`, for requests that start from
    now on; null goes back to the configuration."""
    wanted = await read_control_body(connection, head)
    phase, enabled = wanted.get("phase"), wanted.get("enabled", ABSENT)
    if phase not in (*PHASES, "all") or not (enabled is None or isinstance(enabled, bool)):
        raise RequestError('the body must be {"phase": PHASE, "enabled": true, false or null}',
                           fix=f"PHASE is one of {', '.join(PHASES)}, all")
    captures = control.proxy.captures
    captures.switches.override(phase, enabled)
    captures.log.event(logging.INFO, "capture_switch", {"phase": phase, "enabled": enabled})
    return captures.status()


async def control_page(control: Control, connection: Connection, head: RequestHead) -> None:
    """GET /: the page for people, in one document."""
    body = PAGE.encode()
    connection.write_head(200, [*page_headers(), date_line()], len(body), body)


@functools.cache
def page_headers() -> tuple[bytes, ...]:
    """The headers of the page: nothing runs or loads but what the document itself brings."""
    style, script = (base64.b64encode(hashlib.sha256(
        PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()).decode()
        for tag in ("style", "script"))
    policy = (f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{style}'; "
              f"script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'; require-trusted-types-for 'script'")
    return (b"content-type: text/html; charset=utf-8", b"cache-control: no-store",
            b"content-security-policy: " + policy.encode(), b"x-content-type-options: nosniff",
            b"referrer-policy: no-referrer", b"cross-origin-opener-policy: same-origin",
            b"x-frame-options: DENY")


# path -> method -> handler, which returns the JSON to answer with, or has answered
ControlHandler = Callable[[Control, Connection, RequestHead], Awaitable[Json | None]]
CONTROL_PATHS: dict[str, dict[str, ControlHandler]] = {
    "/": {"GET": control_page, "HEAD": control_page},
    "/health": {"GET": control_health},
    "/captures": {"GET": control_captures},
    CAPTURE_PATH: {"GET": control_one_capture},
    "/metrics": {"GET": control_metrics},
    "/requests": {"GET": control_requests},
    "/status": {"GET": control_status},
    "/why": {"GET": control_why},
    "/credentials": {"GET": control_credentials},
    "/credentials/reset": {"POST": control_reset},
    "/mcp": {"GET": control_mcp_stream, "POST": control_mcp, "DELETE": control_mcp_end},
    "/capture": {"POST": control_capture},
}

# The page: rebuilt from /status, /requests, /capture and /captures, which it polls. What comes from
# outside becomes text nodes only; the headers above forbid all else.
PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>ProxAI</title>
<style>
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1a1f26; --soft: #59636e;
  --line: #dde1e6; --edge: #7d8792; --a: #0a5fc2; --b: #8250c4; --good: #176b34; --bad: #b8281c;
  --warn: #855200; --hover: #f0f4fa; --added: #e2f3e7; --cut: #fbe6e4;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0e1116; --card: #161a21; --ink: #e4e8ee; --soft: #98a3b0; --line: #2a313b;
    --edge: #6b7683; --a: #6aaeff; --b: #c09bf5; --good: #57c785; --bad: #ff8b80; --warn: #e2b04a;
    --hover: #1d232d; --added: #12291c; --cut: #331c1c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 0 20px 48px; background: var(--ground);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2, h3, p, dl, dd, ul, figure { margin: 0; padding: 0; }
h1 { font-size: 18px; } h2 { font-size: 14px; } h3 { font-size: 13px; margin: 20px 0 6px; }
small, .soft, dt { color: var(--soft); font-size: 12px; font-weight: 400; }
code, pre, .mono { font-family: var(--mono); font-size: 12px; }
button, input { font: inherit; color: inherit; }
button, [type=search] { border: 1px solid var(--edge); border-radius: 6px; background: var(--card);
  padding: 3px 10px; }
[type=search] { width: 260px; max-width: 100%; }
button { cursor: pointer; flex: none; }
button:hover, tbody tr:hover, tbody tr:focus-within { background: var(--hover); }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
html:has(dialog[open]) { overflow: hidden; }
[hidden] { display: none !important; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 16px; }
.bar > :first-child { margin-right: auto; }
header.bar { padding: 16px 0; }
header dl, .list dl, .legend { display: flex; flex-wrap: wrap; gap: 0 20px; }
header dl div, .list dl div { display: flex; gap: 6px; align-items: baseline; }
main { display: grid; gap: 16px; grid-template-columns: repeat(6, minmax(0, 1fr)); }
main > * { grid-column: span 6; }
main > figure { grid-column: span 2; } main > .half { grid-column: span 3; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.busy { color: var(--a); }
.dot::before, .legend span::before { content: ""; display: inline-block; width: 8px; height: 8px;
  margin-right: 7px; border-radius: 50%; background: currentColor; }
.dot.busy::before { animation: pulse 1.6s ease-in-out infinite; }
@keyframes pulse { 50% { opacity: .3; } }
svg { display: block; width: 100%; height: 140px; margin: 10px 0 6px; border-radius: 4px; }
svg text { font-size: 11px; fill: var(--soft); }
svg line { stroke: var(--line); }
svg .cursor { fill: var(--ink); opacity: .1; }
.a { --look: var(--a); } .b { --look: var(--b); } .bad { --look: var(--bad); }
rect { fill: var(--look); }
path { fill: none; stroke: var(--look); stroke-width: 2; stroke-linecap: round;
  stroke-linejoin: round; }
.legend { font-size: 12px; } .legend span { color: inherit; }
.legend span::before { border-radius: 2px; background: var(--look); }
.list { list-style: none; margin-top: 6px; }
.list li { padding: 9px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.list li:first-child { border: 0; }
.list li.bar { flex-wrap: nowrap; padding: 7px 0; }
[role=switch] { width: 40px; height: 22px; padding: 0; border-radius: 11px; position: relative; }
[role=switch]::after { content: ""; position: absolute; top: 3px; left: 3px; width: 14px;
  height: 14px; border-radius: 50%; background: var(--edge); transition: left .12s; }
[role=switch][aria-checked=true] { background: var(--a); border-color: var(--a); }
[role=switch][aria-checked=true]::after { left: 21px; background: var(--card); }
table { width: 100%; border-collapse: collapse; table-layout: fixed; margin-top: 8px; }
th, td { padding: 6px 10px; border-top: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 4px; }
th { text-align: left; font-size: 12px; font-weight: 500; color: var(--soft); border: 0; }
td > span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
th.time, th.dropped { width: 78px; } th.ttft, th.duration { width: 84px; }
th.tokens { width: 124px; } th.route { width: 14%; } th.outcome { width: 18%; }
.ttft, .duration, .tokens, .dropped { text-align: right; }
tbody tr { cursor: pointer; }
tbody tr:focus-within { outline: 2px solid var(--a); outline-offset: -2px; border-radius: 4px; }
td button, td button:is(:hover, :focus) { border: 0; background: none; padding: 0; outline: 0; }
dialog { position: fixed; inset: 0 0 0 auto; width: min(820px, 100vw); height: 100dvh;
  max-height: none; max-width: none; margin: 0; padding: 18px 22px 40px; border: 0;
  background: var(--card); color: var(--ink); overflow: hidden auto; }
dialog::backdrop { background: #0008; }
dialog h2 { font-size: 16px; } dialog .bar { flex-wrap: nowrap; }
dialog dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 10px 20px; margin-top: 14px; }
dialog h2, dialog dd, dialog li, #fault { overflow-wrap: anywhere; min-width: 0; }
#fault { margin-top: 12px; padding: 8px 12px; border-left: 3px solid; background: var(--cut); }
#dropped { padding-left: 18px; }
[role=tablist] { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 8px; }
[role=tab] { border-color: transparent; padding: 3px 9px; }
[role=tab][aria-selected=true] { border-color: var(--a); color: var(--a); }
pre { margin: 8px 0; padding: 10px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--ground); white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
pre span { display: block; }
pre .add { color: var(--good); background: var(--added); }
pre .cut { color: var(--bad); background: var(--cut); }
@media (max-width: 1000px) {
  main > figure, main > .half { grid-column: span 6; }
  body { padding: 0 12px 32px; }
  header dl { order: 1; flex-basis: 100%; }
  dialog { padding: 14px 14px 32px; }
  thead { display: none; }
  table, td { display: block; }
  tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
    gap: 0 28px; }
  tbody tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 4px 12px;
    align-content: start; padding: 10px 4px; border-top: 1px solid var(--line); }
  td[class] { padding: 0; border: 0; text-align: left; }
  td.route > span { white-space: normal; }
  td::before { content: attr(data-label); font-size: 12px; color: var(--soft); }
  td.time::before, td.model::before, td.outcome::before { content: none; }
  td.model { order: -2; grid-column: span 3; font-weight: 600; }
  td.time, td.outcome { order: -1; }
  td.outcome { grid-column: span 2; }
}
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation: none !important; transition: none !important; }
}
</style>
</head>
<body>
<header class="bar">
<h1>ProxAI <small id="version"></small></h1>
<dl id="facts"></dl>
<span id="state" class="dot warn">connecting</span>
<button type="button" id="pause" aria-pressed="false">Pause</button>
</header>
<p id="say" class="unseen" role="status"></p>
<noscript>This page needs JavaScript; GET /status tells the same as JSON.</noscript>
<main>
<template id="chart"><figure class="card">
<figcaption class="bar"><h2></h2><small></small></figcaption>
<svg role="img" tabindex="0"></svg><p class="legend"></p>
</figure></template>
<section class="card half" aria-labelledby="h-providers">
<h2 id="h-providers">Providers</h2>
<ul id="providers" class="list"></ul>
</section>
<section class="card half" aria-labelledby="h-captures">
<h2 id="h-captures">Captures</h2>
<p class="soft">Captured requests and answers, prompts included, are kept as files on this disk,
in <code id="directory"></code>. A switch holds for requests that start after it, until the proxy
stops.</p>
<ul id="switches" class="list"></ul>
<p id="capture-fault" class="bad" hidden></p>
</section>
<section class="card" aria-labelledby="h-requests">
<div class="bar"><h2 id="h-requests">Requests <small id="shown"></small></h2>
<label><input type="checkbox" id="failed"> Errors only</label>
<label><span class="unseen">Filter requests</span>
<input type="search" id="filter" placeholder="Filter: model, provider, id …"></label></div>
<table role="table" aria-labelledby="h-requests">
<thead role="rowgroup"><tr role="row" id="columns"></tr></thead>
<tbody role="rowgroup" id="rows"></tbody>
</table>
<p id="nothing" class="soft">Waiting for the proxy.</p>
</section>
</main>
<dialog id="detail" aria-labelledby="h-detail">
<div class="bar"><h2 id="h-detail"></h2><span id="verdict"></span>
<button type="button" id="close">Close</button></div>
<p id="fault" class="bad" hidden></p>
<dl id="record"></dl>
<div id="drops"><h3>Dropped: the provider's protocol has no place for them</h3>
<ul id="dropped" class="mono"></ul></div>
<h3>Captured exchange</h3>
<p id="capture-note" class="soft"></p>
<div id="tabs" role="tablist" aria-label="Captured exchange"></div>
<div id="panel" role="tabpanel" tabindex="0"></div>
</dialog>
<script>
"use strict";
const ROWS = 200, TICK = 1000, STATUS_TICK = 5000, SLOWEST = 15000, LINES = 4000;
const PHASES = {
  inbound_request: ["Client request", "what the client sent"],
  provider_request: ["Provider request", "what the provider was sent"],
  upstream_response: ["Provider answer", "what the provider answered"],
  outbound_response: ["Client answer", "what the client got"],
};
const DIFFS = {
  request: ["Request diff", ["inbound_request", "provider_request"]],
  response: ["Answer diff", ["upstream_response", "outbound_response"]],
};
const PROTOCOLS = { openai_responses: "Responses", openai_chat_completions: "Chat",
  anthropic_messages: "Messages", responses: "Responses", chat: "Chat", messages: "Messages" };
const HEALTH = { ok: "good", failing: "bad", unknown: "soft" };

// -- values as text

const $ = id => document.getElementById(id);
const count = n => (n ?? 0).toLocaleString("en");
const short = n => n < 1e4 ? count(n)
  : n < 1e6 ? +(n / 1e3).toPrecision(3) + "k" : +(n / 1e6).toPrecision(3) + "M";
const clock = (at, seconds) => new Date(at).toLocaleTimeString("en-GB",
  { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined });
const ms = n => n == null ? "–" : n < 1000 ? Math.round(n) + " ms"
  : n < 1e4 ? (n / 1e3).toFixed(2) + " s" : n < 6e4 ? (n / 1e3).toFixed(1) + " s" : span(n / 1e3);
const span = secs => {
  const [d, h, m, s] = [secs / 86400, secs / 3600 % 24, secs / 60 % 60, secs % 60].map(Math.floor);
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
};
const protocol = name => PROTOCOLS[name] ?? name ?? "";
const pair = r => r.translation ? r.translation.split("->").map(protocol).join(" → ")
  : protocol(r.protocol);
const failed = r => Boolean(r.error && r.outcome !== "closed") || r.status >= 400
  || !["open", "end", "closed"].includes(r.outcome);
const mood = r => r.outcome === "open" ? "busy" : failed(r) ? "bad"
  : r.outcome === "closed" ? "warn" : "good";
const verdict = r => r.outcome === "open" ? "running"
  : [r.status || "", r.outcome === "end" ? (failed(r) ? "" : "ok") : r.outcome].join(" ").trim();

function dress(node, attributes, ...inside) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}

const el = (tag, ...rest) => dress(document.createElement(tag), ...rest);

const facts = pairs => pairs.filter(([, value]) => value !== "" && value != null)
  .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))));

function put(node, text) {  // an unchanged text keeps its selection
  if (node.textContent !== text) node.textContent = text;
}

function fill(node, key, ...inside) {  // likewise for many nodes
  if (node.dataset.key !== key) node.replaceChildren(...inside);
  node.dataset.key = key;
}

const say = text => put($("say"), text);

async function call(path, options) {
  const reply = await fetch(path, { signal: AbortSignal.timeout(8000), ...options });
  const data = await reply.json().catch(() => null);
  if (reply.ok && data) return data;
  const error = data?.error?.message ?? `the proxy answered with status ${reply.status}`;
  throw Object.assign(new Error(error), { status: reply.status });
}

// -- charts of the last hour

const SUM = values => values.reduce((all, value) => all + value, 0);
const LAST = values => values.findLast(value => value != null) ?? null;
const CHARTS = [
  { name: "Requests", format: count, axis: short, when: "last hour", sum: SUM, least: 4, strips: [
    [["ok", "a", m => m.requests - m.errors], ["errors", "bad", m => m.errors]]] },
  { name: "Latency, median", format: ms, axis: n => n < 1000 ? n + " ms" : n / 1000 + " s",
    line: true, when: "latest", sum: LAST, least: 100, strips: [
      [["first token", "a", m => m.ttfb_ms_p50], ["whole answer", "b", m => m.duration_ms_p50]]] },
  { name: "Tokens", format: short, axis: short, when: "last hour", sum: SUM, least: 100, strips: [
    [["in", "a", m => m.input_tokens]], [["out", "b", m => m.output_tokens]]] },
];
const MARGINS = [50, 6];  // left and right of the minutes
let past = [];

function nice(most) {  // the next round number, even so that its half is round too
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 3, 4, 5, 6, 8, 10].map(n => n * unit).find(n => n >= most && n % 2 === 0);
}

function draw(chart) {
  const svg = chart.svg, width = Math.max(svg.clientWidth, 200), height = 140;
  const [left, right] = MARGINS, floor = height - 20, gap = 16, parts = [];
  const add = (tag, ...rest) =>
    parts.push(dress(document.createElementNS(svg.namespaceURI, tag), ...rest));
  const step = (width - left - right) / Math.max(past.length, 1), x = i => left + i * step;
  const high = (floor - 8 - gap * (chart.strips.length - 1)) / chart.strips.length;
  const title = `${chart.name}, ${told(chart)}`;
  add("title", {}, title);
  dress(svg, { "aria-label": title, viewBox: `0 0 ${width} ${height}` });
  chart.strips.forEach((series, strip) => {
    const base = 8 + high + strip * (high + gap);
    const values = past.map(m => series.map(([, , value]) => value(m)));
    const sizes = values.map(v => chart.line ? Math.max(...v) : SUM(v));
    const peak = nice(Math.max(chart.least, ...sizes));
    const y = value => base - value / peak * high;
    for (const tick of chart.strips.length > 1 ? [0, peak] : [0, peak / 2, peak]) {
      add("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
      add("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, chart.axis(tick));
    }
    series.forEach(([, look], s) => {
      if (chart.line) {
        const at = i => `${x(i + .5).toFixed(1)} ${y(values[i][s]).toFixed(1)}`;
        add("path", { class: look, d: values.map((v, i) => v[s] == null ? ""
          : i && values[i - 1][s] != null ? "L" + at(i) : `M${at(i)}h0`).join("") });
      } else values.forEach((v, i) => {
        const under = SUM(v.slice(0, s)), tall = v[s] && Math.max(v[s] / peak * high, 1);
        if (tall) add("rect", { class: look, x: x(i) + step * .1, width: step * .8,
          y: y(under) - tall, height: tall });
      });
    });
  });
  past.forEach((m, i) => {
    if (m.at / 60 % 15 === 0 && x(i) < width - 40)
      add("text", { x: x(i + .5), y: height - 4, "text-anchor": "middle" }, clock(m.at * 1000));
  });
  if (chart.at != null && past[chart.at])
    add("rect", { class: "cursor", x: x(chart.at), width: step, y: 0, height: floor });
  svg.replaceChildren(...parts);
  const minute = past[chart.at], [when, said] = readout(chart, minute);
  put(svg.parentNode.querySelector("small"), when);
  svg.nextElementSibling.replaceChildren(...said.map(([look, text]) =>
    el("span", { class: look }, text)));
}

function readout(chart, minute) {  // of the whole hour without a minute
  return [minute ? clock(minute.at * 1000) : chart.when,
    chart.strips.flat().map(([name, look, value]) =>
      [look, `${chart.format(minute ? value(minute) : chart.sum(past.map(value)))} ${name}`])];
}

function told(chart, minute) {
  const [when, said] = readout(chart, minute);
  return `${when}: ${said.map(([, text]) => text).join(", ")}`;
}

function point(chart, at) {
  if (chart.at === at) return;
  chart.at = at;
  draw(chart);
}

for (const chart of CHARTS) {
  const figure = $("chart").content.firstElementChild.cloneNode(true);
  const svg = chart.svg = figure.querySelector("svg");
  figure.querySelector("h2").append(chart.name);
  $("chart").before(figure);
  svg.addEventListener("pointermove", event => {
    const inside = (event.offsetX - MARGINS[0]) / (svg.clientWidth - SUM(MARGINS));
    point(chart, inside < 0 || inside >= 1 ? null : Math.floor(inside * past.length));
  });
  svg.addEventListener("focus", () => point(chart, past.length - 1));
  for (const event of ["pointerleave", "blur"])
    svg.addEventListener(event, () => point(chart, null));
  svg.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !past.length) return;
    event.preventDefault();
    point(chart, Math.min(Math.max((chart.at ?? past.length) + move, 0), past.length - 1));
    say(told(chart, past[chart.at]));
  });
}
new ResizeObserver(() => CHARTS.forEach(draw)).observe(CHARTS[0].svg);

// -- the state of the proxy

let status = null, directory = "";

function showStatus(data) {
  if (status && status.started_at !== data.started_at) forget();
  status = data;
  put($("version"), data.version);
  fill($("facts"), JSON.stringify([data.uptime_secs, data.in_flight, data.requests]), ...facts([
    ["listens at", data.listen], ["up", span(data.uptime_secs)], ["in flight", data.in_flight],
    ["requests", count(data.requests.total)], ["errors", count(data.requests.errors)]]));
  past = data.history;
  CHARTS.forEach(draw);
  fill($("providers"), JSON.stringify([data.providers, data.credentials]),
    ...data.providers.map(p => provider(p, data.credentials)));
  showCaptures(data.captures);
  arrange();
}

function provider(p, credentials) {
  const rests = credentials.filter(c => c.provider === p.name).flatMap(c => c.rests.map(rest =>
    `${c.credential} rests for ${rest.model ?? "all models"} until ${
      clock(new Date(1000 * rest.until).toISOString())}: ${rest.reason}`));
  const last = p.last_at && [p.last_status, "at", clock(p.last_at, true)].filter(Boolean).join(" ");
  return el("li", {},
    el("div", { class: "bar" },
      el("span", {}, el("strong", {}, p.name), " ", el("small", {}, protocol(p.protocol))),
      el("span", { class: `dot ${HEALTH[p.health] ?? "soft"}` }, p.health)),
    el("small", { class: "mono" }, p.base_url),
    el("dl", {}, ...facts([["requests", count(p.requests)], ["errors", count(p.errors)],
      ["in flight", p.in_flight], ["first token", ms(p.ttfb_ms_p50)], ["last", last]])),
    ...p.last_error ? [el("p", { class: p.health === "ok" ? "soft" : "bad" }, p.last_error)] : [],
    ...rests.map(text => el("p", { class: "warn" }, text)));
}

// -- capture switches

const switches = Object.fromEntries([...Object.entries(PHASES), ["all", ["All four", ""]]]
  .map(([phase, [name, what]]) => {
    const flip = el("button", { type: "button", role: "switch", "aria-checked": "false",
      "aria-label": `Capture: ${name}`, id: `switch-${phase}` });
    const back = el("button", { type: "button", "aria-label": `${name}: back to config` },
      "Back to config");
    const note = el("small", {});
    flip.addEventListener("click", () =>
      capture(phase, flip.getAttribute("aria-checked") !== "true"));
    back.addEventListener("click", () => capture(phase, null).then(() => flip.focus()));
    const label = el("span", {}, el("strong", {}, name), " ", el("small", {}, what),
      el("br", {}), note);
    $("switches").append(el("li", { class: "bar" }, label, back, flip));
    return [phase, { flip, back, note, name }];
  }));

function showCaptures(captures) {
  directory = captures.directory;
  put($("directory"), directory);
  const all = Object.values(captures.phases), word = on => on ? "on" : "off";
  const phases = { ...captures.phases, all: { effective: all.every(p => p.effective),
    override: all.some(p => p.override != null) ? true : null } };
  for (const [phase, { flip, back, note }] of Object.entries(switches)) {
    const { effective, override, default: usual } = phases[phase];
    flip.setAttribute("aria-checked", effective);
    back.hidden = override == null;
    put(note, phase === "all" ? `${all.filter(p => p.effective).length} of ${all.length} on`
      : override == null ? `${word(usual)}, as in the config`
      : `switched ${word(override)} here, ${word(usual)} in the config`);
  }
  const lost = captures.dropped;
  if (lost) fault(`${count(lost)} captures were left out: the disk was too slow, or full.`);
}

function fault(text) {
  put($("capture-fault"), text);
  $("capture-fault").hidden = !text;
}

async function capture(phase, enabled) {
  try {
    const answer = await call("/capture", { method: "POST",
      headers: { "content-type": "application/json" }, body: JSON.stringify({ phase, enabled }) });
    fault("");
    showCaptures(answer);
    const on = switches[phase].flip.getAttribute("aria-checked") === "true" ? "on" : "off";
    say(`Capture of ${switches[phase].name}: ${on}`);
  } catch (error) { fault(`The switch did not move: ${error.message}`); say("Capture unchanged"); }
}

// -- requests

const COLUMNS = [  // class, heading, [main text, second text] of a record
  ["time", "Time", r => [clock(r.at, true), ""]],
  ["model", "Model", r => [r.model || r.path,
    r.upstream_model && r.upstream_model !== r.model ? `→ ${r.upstream_model}` : ""]],
  ["route", "Route", r => [r.provider || "–", pair(r)]],
  ["outcome", "Outcome", r => [verdict(r), r.error ?? ""]],
  ["ttft", "First token", r => [ms(r.ttfb_ms), ""]],
  ["duration", "Duration", r => [ms(lasted(r)), ""]],
  ["tokens", "Tokens in / out", r => [r.input_tokens || r.output_tokens
    ? `${short(r.input_tokens)} / ${short(r.output_tokens)}` : "–",
    r.cached_tokens ? `${short(r.cached_tokens)} cached` : ""]],
  ["dropped", "Dropped", r => [String(r.dropped?.length || "–"), ""]],
];
const rows = new Map();  // id -> its row
let finished = new Map(), open = new Map(), latest = 0, heard = 0, current = null;

$("columns").append(...COLUMNS.map(([look, heading]) =>
  el("th", { role: "columnheader", scope: "col", class: look }, heading)));
const record = id => open.get(id) ?? finished.get(id);
const lasted = r => r.duration_ms + (r.outcome === "open" ? performance.now() - heard : 0);
const button = row => row.querySelector("button");
const visible = () => [...rows.values()].filter(row => !row.hidden)
  .sort((a, b) => a.rowIndex - b.rowIndex);

function newRow(id) {
  const row = el("tr", { role: "row" }, ...COLUMNS.map(([look, heading]) => {
    const main = look === "time" ? el("button", { type: "button", tabindex: "-1",
      "aria-haspopup": "dialog" }) : el("span", {});
    return el("td", { role: "cell", class: look, "data-label": heading }, main,
      el("span", { class: "soft" }));
  }));
  row.dataset.id = id;
  rows.set(id, row);
  return row;
}

function fillRow(row, r) {
  COLUMNS.forEach(([look, , texts], i) => {
    const [main, second] = row.cells[i].children, [text, more] = texts(r);
    put(main, text);
    put(second, more);
    if (look === "model" || look === "outcome") row.cells[i].title = `${text} ${more}`;
    if (look === "outcome") main.className = `dot ${mood(r)}`;
  });
  button(row).setAttribute("aria-label", `${clock(r.at, true)} ${r.model ?? ""}: details`);
}

function matches(r) {
  if ($("failed").checked && !failed(r)) return false;
  const text = [r.id, r.model, r.upstream_model, r.provider, r.route, r.path, pair(r), verdict(r),
    r.error].join(" ").toLowerCase();
  return $("filter").value.toLowerCase().split(" ").every(word => text.includes(word));
}

function arrange() {  // the rows as they must be; what has the focus keeps it
  const body = $("rows"), focus = document.activeElement;
  const wanted = [...[...open.values()].sort((a, b) => b.at.localeCompare(a.at)),
    ...finished.values()];
  let at = body.firstChild, fits = 0;
  for (const r of wanted) {
    const row = rows.get(r.id) ?? newRow(r.id);
    fillRow(row, r);
    row.hidden = !matches(r);
    fits += !row.hidden;
    if (row === at) at = at.nextSibling;
    else body.insertBefore(row, at);
  }
  while (at) {
    const next = at.nextSibling;
    rows.delete(at.dataset.id);
    at.remove();
    at = next;
  }
  if (focus.isConnected && focus !== document.activeElement) focus.focus({ preventScroll: true });
  if (!current?.isConnected || current.hidden) choose(visible()[0]);
  put($("shown"), fits < wanted.length ? `${fits} of ${wanted.length}` : `${fits || ""}`);
  $("nothing").hidden = fits > 0;
  if (status) put($("nothing"), wanted.length ? "No request fits the filter."
    : `No request yet. Point a client at ${status.listen}`);
}

function choose(row) {  // the one row that Tab stops at
  if (current) button(current).tabIndex = -1;
  current = row ?? null;
  if (current) button(current).tabIndex = 0;
}

function take(data) {
  if (data.latest < latest) return forget();
  latest = data.latest;
  heard = performance.now();
  open = new Map(data.open.map(r => [r.id, r]));
  finished = new Map([...data.requests.map(r => [r.id, r]), ...finished].slice(0, ROWS));
  arrange();
  if (shown != null && record(shown)) showRecord(record(shown));
}

function forget() {  // the proxy is another one than before
  [finished, open, latest] = [new Map(), new Map(), 0];
  arrange();
}

$("rows").addEventListener("click", event => {
  const row = event.target.closest("tr");
  if (!row || event.detail && String(getSelection())) return;  // text was being selected
  choose(row);
  button(row).focus();
  location.hash = row.dataset.id;
});
$("rows").addEventListener("focusin", event => choose(event.target.closest("tr")));
$("rows").addEventListener("keydown", event => {
  const all = visible(), at = all.indexOf(current);
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  button(all[Math.min(Math.max(to, 0), all.length - 1)]).focus();
});
$("failed").addEventListener("change", arrange);
$("filter").addEventListener("input", arrange);

// -- the detail of one request

let shown = null, exchange = null, part = Object.keys(PHASES)[0];
const TABS = { ...PHASES, ...DIFFS };

function showRecord(r) {
  put($("verdict"), verdict(r));
  $("verdict").className = `dot ${mood(r)}`;
  $("fault").hidden = !r.error;
  put($("fault"), [r.error_type, r.error].filter(Boolean).join(": "));
  const tokens = [["tokens in", "input"], ["cached", "cached"], ["tokens out", "output"],
    ["reasoning", "reasoning"]].map(([name, key]) => [name, count(r[`${key}_tokens`])]);
  fill($("record"), JSON.stringify(r), ...facts([
    ["time", r.at && `${r.at.slice(0, 10)} ${clock(r.at, true)}`],
    ["request", `${r.method} ${r.path}`],
    ["model", r.model],
    ["model upstream", r.upstream_model === r.model ? "" : r.upstream_model],
    ["provider", r.provider], ["key", r.credential], ["route", r.route], ["protocols", pair(r)],
    ["tries", (r.attempts || []).map(a => `${a.provider}/${a.credential}: ${a.what}`).join(", ")],
    ["answer", r.stream ? "stream" : "whole"], ["first token", ms(r.ttfb_ms)],
    ["duration", ms(lasted(r))], ["bytes in", count(r.bytes_in)], ["bytes out", count(r.bytes_out)],
    ...r.input_tokens || r.output_tokens ? tokens : []]));
  $("drops").hidden = !r.dropped?.length;
  fill($("dropped"), JSON.stringify(r.dropped ?? []), ...(r.dropped ?? []).map(drop =>
    el("li", {}, drop.path ? `${drop.path}: ${drop.reason}` : drop)));
  if (!exchange && r.outcome !== "open") load(r.id);
}

async function load(id) {
  const known = record(id);
  exchange ??= { note: "Reading …" };
  if (known && !known.captured) exchange.note = "Nothing of this request was captured. Switch"
    + " phases on under Captures; that holds for requests that start afterwards.";
  else {
    const found = await call(`/captures/${encodeURIComponent(id)}`).catch(error => ({
      note: error.status !== 404 ? `The capture cannot be read: ${error.message}`
        : known ? "Its capture is not on the disk: still being written, or removed."
        : "This request is neither among the last ones nor among the captures." }));
    if (shown !== id) return;
    exchange = found;
    if (found.record && !known) showRecord(found.record);
    if (!found.record && known && Date.now() - Date.parse(known.at) - known.duration_ms < 5000)
      setTimeout(() => shown === id && load(id), 1000);  // its last file is not there yet
  }
  showExchange();
}

function showExchange() {
  const some = Object.keys(exchange?.phases ?? {}).length > 0;
  put($("capture-note"), exchange ? exchange.note ?? "Nothing of it is on the disk."
    : "The request is running; what is captured of it can be read when it is over.");
  $("capture-note").hidden = some;
  $("tabs").hidden = $("panel").hidden = !some;
  for (const tab of $("tabs").children) {
    const on = tab.id === `tab-${part}`;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", `tab-${part}`);
  $("panel").replaceChildren(...!some ? [] : DIFFS[part] ? diff(part) : phase(part));
}

const lacking = phases => phases.filter(name => !exchange.phases[name]);
const notCaptured = phases => el("p", { class: "soft" }, "Not captured: "
  + phases.map(name => PHASES[name][0]).join(", ") + ". Switch it on under Captures, or in the"
  + ` configuration: ${phases.map(name => `capture.${name}_enabled = true`).join(", ")}.`);

function phase(name) {
  if (lacking([name]).length) return [notCaptured([name])];
  const { head, body, files, truncated } = exchange.phases[name];
  return [
    ...truncated ? [el("p", { class: "warn" },
      `The body is longer than what is shown here; its file in ${directory} has all of it.`)] : [],
    ...head ? [el("pre", { "aria-label": "Headers" }, JSON.stringify(head, null, 2))] : [],
    body == null ? el("p", { class: "soft" }, "There is no body.")
      : el("pre", { "aria-label": "Body" }, body),
    el("p", { class: "soft mono" }, (files ?? []).join(", ")),
  ];
}

function diff(name) {
  const lines = exchange.diffs?.[name] ?? [], missing = lacking(DIFFS[name][1]);
  if (missing.length) return [notCaptured(missing)];
  if (!lines.length) return [el("p", { class: "soft" }, "Both bodies are the same.")];
  const look = line => /^(---|[+]{3}|@@)/.test(line) ? "soft"
    : line[0] === "+" ? "add" : line[0] === "-" ? "cut" : "same";
  const all = lines.map(look), times = word => all.filter(one => one === word).length;
  const more = lines.length - LINES;
  return [
    el("p", { class: "soft" }, `${times("add")} lines added, ${times("cut")} removed`
      + (more > 0 ? `; ${count(more)} lines more are not shown` : "")),
    el("pre", {}, ...lines.slice(0, LINES).map((line, i) =>
      el("span", { class: all[i] }, line.trimEnd() || " "))),
  ];
}

$("tabs").append(...Object.entries(TABS).map(([name, [label]]) =>
  el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel" },
    label)));
$("tabs").addEventListener("click", event => turn(event.target.closest("[role=tab]")));
$("tabs").addEventListener("keydown", event => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], all = [...$("tabs").children];
  if (move) turn(all.at((all.indexOf(event.target) + move) % all.length));
});

function turn(tab) {
  if (!tab) return;
  part = tab.id.slice(4);
  showExchange();
  tab.focus();
}

function follow() {  // the address says whose detail is open
  const id = location.hash.slice(1), dialog = $("detail");
  if (!id) return dialog.close();
  shown = id;
  exchange = null;
  put($("h-detail"), `Request ${id}`);
  put($("verdict"), $("verdict").className = "");
  fill($("record"), "");
  $("fault").hidden = $("drops").hidden = true;
  showExchange();
  if (record(id)) showRecord(record(id));
  else load(id);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("click", event => event.target === $("detail")
  && event.offsetX < 0 && $("detail").close());
$("detail").addEventListener("close", () => {
  history.replaceState(null, "", location.pathname);
  const row = rows.get(shown);
  shown = exchange = null;
  if (row && !row.hidden) button(row).focus();
});
addEventListener("hashchange", follow);

// -- listening

let paused = false, busy = false, asked = -Infinity, wait = TICK, timer = 0;

function tell(text, look) {
  if ($("state").textContent !== text) say(text);
  put($("state"), text);
  $("state").className = `dot ${look}`;
}

async function poll() {
  if (busy || paused || document.hidden) return;
  busy = true;
  try {
    if (performance.now() - asked >= STATUS_TICK) {
      showStatus(await call("/status"));
      asked = performance.now();
    }
    take(await call(`/requests?after=${latest}&limit=${ROWS}`));
    wait = TICK;
    if (!paused) tell("live", "good");
  } catch (error) {
    asked = -Infinity;
    wait = Math.min(wait * 2, SLOWEST);
    tell("disconnected, trying again", "bad");
  }
  busy = false;
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  if (paused) tell("paused", "warn");
  else { asked = -Infinity; poll(); }
});
document.addEventListener("visibilitychange", poll);
setInterval(() => {  // the clocks of what runs
  if (paused || document.hidden) return;
  for (const r of open.values()) fillRow(rows.get(r.id), r);
}, 250);
poll().then(() => location.hash && follow());
</script>
</body>
</html>
"""



# ============================================================================
#  24  Demo provider
# ============================================================================
# A provider that needs no key: it speaks all three protocols over real HTTP,
# says back what it was told, calls a tool when it is offered one. Its replies
# are pure functions; `Demo` only writes them to a connection.


class DemoTurn(NamedTuple):
    """What the demo provider says next: text, or a call of the tool `tool`."""

    model: str
    text: str
    tool: str | None
    arguments: Json
    tokens: int  # a word counts as one
    id: str


def demo_text(content: Any) -> str:
    """The text in a message's content, string or parts."""
    if isinstance(content, str):
        return content
    return " ".join(demo_text(p.get("text", p.get("content", p.get("output"))))
                    for p in map(mapping, listing(content)))


def demo_last_text(content: Any) -> str:
    """What the user wrote: a string, or the last text part;
    agents put reminders of their own before it."""
    if isinstance(content, str):
        return content
    return next((t for part in reversed(listing(content)) if (t := demo_text([part]).strip())), "")


def demo_turn(protocol: Protocol, body: Json, number_: int) -> DemoTurn:
    """Decide the turn: a tool's result is reported, an offered tool is called,
    anything else is said back."""
    wanted = body.get(protocol.wants)
    items = [{"role": "user", "content": wanted}] if isinstance(wanted, str) else listing(wanted)
    last = mapping(items[-1]) if items else {}
    tokens = sum(len(demo_text(mapping(i).get("content")).split()) for i in items)
    usable = [t for t in map(mapping, listing(body.get("tools"))) if demo_tool_name(t)]
    choice = body.get("tool_choice")
    tool, arguments, result = None, {}, tool_result_text(last)
    if result is not None:
        text = f"The tool answered: {result}"
    elif usable and "none" not in (choice, mapping(choice).get("type")):
        inner = mapping(usable[0].get("function")) or usable[0]
        schema_ = mapping(inner.get("parameters") or inner.get("input_schema"))
        text, tool, arguments = "", demo_tool_name(usable[0]), demo_arguments(schema_)
    else:
        text = f"You said: {demo_last_text(last.get('content')).strip() or 'nothing'}"
    return DemoTurn(str(body.get("model")), text, tool, arguments, tokens, f"demo{number_:06d}")


def demo_tool_name(tool: Json) -> str | None:
    """The name of a tool that the client runs and that takes JSON; None for any other."""
    if (tool.get("type", "function") not in ("function", "custom")
            or (tool.get("type") == "custom" and "input_schema" not in tool)):
        return None
    name = mapping(tool.get("function")).get("name") or tool.get("name")
    return name if isinstance(name, str) and name else None


def tool_result_text(item: Json) -> str | None:
    """The text of a tool's result if the last item is one."""
    if item.get("role") == "tool":
        return demo_text(item.get("content"))
    if str(item.get("type", "")).endswith("_call_output"):
        return demo_text(item.get("output"))
    results = [b for b in map(mapping, listing(item.get("content")))
               if b.get("type") == "tool_result"]
    return demo_text(results[-1].get("content")) if results else None


def demo_arguments(schema_: Json) -> Json:
    """Arguments that a tool's JSON schema accepts, of the plain kinds:
    what it requires, else all it knows."""
    samples: Json = {"string": "demo", "integer": 1, "number": 1, "boolean": True, "array": [],
                     "null": None}

    def value(kind: Json) -> Any:
        if "const" in kind or listing(kind.get("enum")):
            return kind["const"] if "const" in kind else kind["enum"][0]
        name = kind.get("type")
        name = name[0] if isinstance(name, list) and name else name
        return demo_arguments(kind) if name == "object" else samples.get(str(name), "demo")

    properties = mapping(schema_.get("properties"))
    wanted = listing(schema_.get("required")) or list(properties)
    return {name: value(mapping(properties.get(name))) for name in wanted if isinstance(name, str)}


def words(text: str) -> list[str]:
    """`text` word by word, blanks kept."""
    return re.findall(r"\S+\s*|\s+", text)


def demo_chunks(turn: DemoTurn, now: int, prefix: str) -> Iterator[Json]:
    """The turn as Chat chunks, a word in each; the last has the usage."""
    def chunk(delta: Json | None, finish: str | None = None, **more: Any) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {"id": f"chatcmpl-{turn.id}", "object": "chat.completion.chunk", "created": now,
                "model": turn.model, "choices": [choice] if delta is not None else [], **more}

    yield chunk({"role": "assistant", "content": None if turn.tool else ""})
    if turn.tool:
        yield chunk({"tool_calls": [{"index": 0, "id": f"{prefix}_{turn.id}", "type": "function",
                                     "function": {"name": turn.tool, "arguments": ""}}]})
        for part in words(json.dumps(turn.arguments)):
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
    for word in words(turn.text):
        yield chunk({"content": word})
    yield chunk({}, "tool_calls" if turn.tool else "stop")
    out = len(words(turn.text)) or 1
    yield chunk(None, usage={"prompt_tokens": turn.tokens, "completion_tokens": out,
                             "total_tokens": turn.tokens + out})


def demo_events(protocol: Protocol, turn: DemoTurn, now: int, body: Json) -> Iterator[Any]:
    """The turn as the events of a client of `protocol`: Chat chunks, or what their pair makes
    of them."""
    chunks = [*demo_chunks(turn, now, "toolu" if protocol is MESSAGES else "call"), DONE]
    if protocol is CHAT:
        if body.get("stream") and not mapping(body.get("stream_options")).get("include_usage"):
            del chunks[-2]
        return iter(chunks)
    ctx = Context(protocol.word, CHAT.word, turn.model, now=now)
    ctx.estimate = turn.tokens
    ctx.echo = ECHOED | {k: v for k, v in body.items() if k in ECHOED and v is not None}
    return pair_events(PAIRS[protocol.word, CHAT.word].stream(ctx), chunks)


def pair_events(stream: Stream, items: Iterable[Any]) -> Iterator[Any]:
    """The client's events that the stream of a pair makes of a provider's."""
    next(stream)
    try:
        for item in items:
            yield from stream.send(item)
    except StopIteration as stop:
        yield from stop.value


class Demo:
    """The demo provider as the handler of a `Server`."""

    def __init__(self, word_secs: float) -> None:
        self.word_secs, self.turns = word_secs, 0

    async def serve(self, connection: Connection, head: RequestHead) -> None:
        """Answer one request."""
        protocol = protocol_of(head.path)
        try:
            admit(head, ServerConfig())
            if protocol is None:
                connection.write_head(200, [b"content-type: application/json"], 2, b"{}")
                return
            body = read_model_request(protocol, await connection.read_body(64 << 20)).body
            if head.path in COUNT_PATHS:
                data = dump({"input_tokens": estimate_tokens(body)})
                connection.write_head(200, [b"content-type: application/json"], len(data), data)
                return
            await self.answer(connection, protocol, body)
        except ProxyError as error:
            write_error(connection, error, "native", protocol)
        except asyncio.CancelledError:
            connection.take_reason()
            connection.cut()

    async def answer(self, connection: Connection, protocol: Protocol, body: Json) -> None:
        """Say the next turn, whole or word by word."""
        self.turns += 1
        turn, now = demo_turn(protocol, body, self.turns), int(time.time())
        events = demo_events(protocol, turn, now, body)
        if not body.get("stream"):
            data = dump(collect(protocol.word, list(events)))
            connection.write_head(200, [b"content-type: application/json"], len(data), data)
            return
        connection.exchanging = True
        connection.write_head(200, [b"content-type: text/event-stream"], None)
        for event in events:
            connection.write_part(event_bytes(protocol, event))
            await connection.flush()
            await asyncio.sleep(self.word_secs)
        connection.exchanging = False
        connection.write_end()

    def refuse(self, connection: Connection, error: ProxyError) -> None:
        """Answer what is no request."""
        write_error(connection, error, "json", None)


def demo_config(port: int) -> str:
    """The configuration of a proxy in front of the demo provider, as TOML."""
    lines = ["[routing.default_provider_names]",
             *(f'{name} = "demo_{p.word}"' for name, p in PROTOCOLS.items())]
    for name, p in PROTOCOLS.items():
        lines += [f"[providers.demo_{p.word}]", f'protocol = "{name}"',
                  f'base_url = "http://127.0.0.1:{port}"', 'api_key = "demo"',
                  'proxy_url = "direct"']
    return "\n".join([*lines, "[error_responses]", 'format = "native"'])



# ============================================================================
#  25  Command line
# ============================================================================
# Flags, the banner, signals, and the order in which things start and stop.

GOOD_BYE_SECS = 0.2


def port_number(text: str) -> int:
    """A port as a flag gives it."""
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="proxai.py", allow_abbrev=False,
        description="A local LLM proxy: any client protocol, any provider.",
        epilog="Without --config the file in the app directory (~/.proxai/config.toml) is used,"
               " and made if missing. Commands with a --help of their own: " + ", ".join(COMMANDS))
    add = parser.add_argument
    add("command", nargs="?", choices=["check"],
        help="check: load the configuration, show what would run, and exit")
    add("--config", metavar="PATH", help="configuration file")
    add("--demo", action="store_true",
        help="run in front of an embedded provider; no key, no configuration")
    add("--upstream", metavar="URL", help="base_url of the default openai_responses provider")
    add("--api-key", metavar="KEY", help="api_key of the default openai_responses provider")
    add("--port", type=port_number, metavar="N", help="server.port; 0 takes a free one")
    add("--mcp-port", type=port_number, metavar="N",
        help="mcp.port, of the control listener; 0 takes a free one")
    add("--log-level", metavar="L",
        help="logging.level: trace, debug, info, warn or error")
    add("--log-format", metavar="F", help="logging.output_format: human or json")
    add("--route-override", metavar="ROUTE.FIELD=VALUE", action="append", default=[],
        help="change a field of the named route for this run; may be repeated")
    for phase in PHASES:
        add(f"--capture-{phase.replace('_', '-')}", action="store_const", const=True,
            help=f"capture.{phase}_enabled for this run")
    add("-V", "--version", action="version", version=f"proxai {__version__}")
    return parser


PROTOCOL_WORDS = {name: p for p in PROTOCOLS.values() for name in (p.name, p.word)}


def translate(args: Any, environ: Mapping[str, str]) -> int:
    """Print a translation, and on standard error what it left out; 1 where there is none."""
    inbound, provider = PROTOCOL_WORDS[args.from_], PROTOCOL_WORDS[args.to_]
    if args.kind != "request":
        inbound, provider = provider, inbound
    pair = pair_for(inbound, provider, extended=True)
    if pair is None:
        raise ConfigError(["--from and --to are the same protocol, which passes through untouched"])
    raw = (sys.stdin.buffer.read() if args.file == "-"
           else read_file(Path(args.file)).encode("utf-8"))
    asked = (load_object(read_file(Path(args.asked)).encode("utf-8"), args.asked) if args.asked
             else {})
    first = load_object(raw, args.file) if args.kind != "stream" else {}
    model = args.model or (asked or first).get("model")
    ctx = Context(inbound.word, provider.word, model if isinstance(model, str) else "",
                  host=args.host, now=int(time.time()))
    try:
        if asked:
            pair.request(asked, ctx)
        if args.kind == "stream":
            sys.stdout.writelines(translated_events(pair, ctx, provider, inbound, raw))
        else:
            step = pair.request if args.kind == "request" else pair.response
            print(json.dumps(step(first, ctx), ensure_ascii=False, indent=2))
    except ProxyError as error:
        where = f" ({error.param})" if isinstance(error.param, str) else ""
        print(f"Error: {error.message}{where}", file=sys.stderr)
        return 1
    finally:
        for path, reason in ctx.dropped.items():
            print(f"dropped: {path}: {reason}", file=sys.stderr)
    return 0


def translated_events(pair: Pair, ctx: Context, provider: Protocol, inbound: Protocol,
                      raw: bytes) -> Iterator[str]:
    """A stream translated, as text; its failure is the last event, and raised."""
    payloads = StreamObserver(provider, len(raw) + 1).payloads(raw + b"\n\n", 0.0)
    try:
        for event in pair_events(pair.stream(ctx), [*payloads, None]):
            yield event_bytes(inbound, event).decode()
    except ProxyError as error:
        for event in error.events:
            yield event_bytes(inbound, event).decode()
        yield render_error_event(error, "native", inbound, nested=True).decode()
        raise


def load_object(raw: bytes, name: str) -> Json:
    """The JSON object in a file; ConfigError where there is none."""
    try:
        value = load(raw)
    except ValueError as error:
        raise ConfigError([f"{name} is not JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise ConfigError([f"{name} is not a JSON object"])
    return value


def oauth_credential(args: Any, environ: Mapping[str, str]) -> Credential:
    """The credential that the command line names; ConfigError where there is none with OAuth."""
    config = load_from(args.config, environ)
    settings = config.providers.get(args.provider.strip().lower())
    if settings is None:
        raise ConfigError([f"no provider is named {args.provider} (there are:"
                           f" {', '.join(config.providers)})"])
    found = {c.name: c for c in credentials_of(args.provider.strip().lower(), settings)
             if c.source.oauth}
    if not found:
        raise ConfigError([f"provider `{args.provider}` has no key from OAuth, so there is nothing"
                           " to log in to"], f"set providers.{args.provider}.oauth")
    name = args.credential.strip().lower() if args.credential else next(iter(found))
    if name not in found or (len(found) > 1 and not args.credential):
        raise ConfigError([f"provider `{args.provider}` has these credentials with OAuth:"
                           f" {', '.join(found)}"], "name one with --credential")
    return found[name]


def login(args: Any, environ: Mapping[str, str]) -> int:
    """Log in to a provider's OAuth server."""
    credential = oauth_credential(args, environ)

    async def work() -> Token:
        with contextlib.closing(Pool()) as pool:
            return await Tokens(pool, Log(logging.getLogger("proxai")), environ).log_in(
                credential, tell)

    try:
        token = asyncio.run(work())
    except ProxyError as error:
        raise ConfigError([error.message]) from None
    secs = token.expires_at - time.time()
    tell(f"{credential.label} is logged in"
         + (f"; the token ends in {secs:.0f} seconds" if secs < FOREVER else "")
         + (" and is renewed" if token.refresh_token else ""))
    return 0


def logout(args: Any, environ: Mapping[str, str]) -> int:
    """Remove a stored token."""
    credential = oauth_credential(args, environ)
    path = token_path(credential, environ)
    try:
        path.unlink()
    except FileNotFoundError:
        raise ConfigError([f"{credential.label} is not logged in"]) from None
    except OSError as error:
        raise ConfigError([f"cannot remove {path}: {error.strerror}"]) from None
    tell(f"{credential.label} is logged out")
    return 0


def flag_overrides(args: Any, tables: Json) -> list[Override]:
    """What the flags put in place of the file's values."""
    rows = [("--port", ("server", "port"), args.port),
            ("--mcp-port", ("mcp", "port"), args.mcp_port),
            ("--log-level", ("logging", "level"), args.log_level),
            ("--log-format", ("logging", "output_format"), args.log_format),
            *((f"--capture-{phase.replace('_', '-')}", ("capture", f"{phase}_enabled"),
               getattr(args, f"capture_{phase}")) for phase in PHASES)]
    out = [Override(flag, at, value.strip().lower() if isinstance(value, str) else value)
           for flag, at, value in rows if value is not None]
    for flag, key, others, text in (
            ("--upstream", "base_url", (), args.upstream),
            ("--api-key", "api_key", (*KEY_SOURCES[1:], "credentials"), args.api_key)):
        if text and text.strip():
            at = ("providers", default_responses_provider(flag, tables))
            out += [Override(flag, (*at, other), None) for other in others]
            out.append(Override(flag, (*at, key), text.strip()))
    return out + [route_override(spec, tables) for spec in args.route_override]


def default_responses_provider(flag: str, tables: Json) -> str:
    """The key of the provider that --upstream and --api-key are about, as the file spells it."""
    wanted = first_of(tables, f"/routing/default_provider_names/{RESPONSES.name}",
                      "/routing/default_provider")
    for label in mapping(tables.get("providers")):
        if isinstance(wanted, str) and label.strip().lower() == wanted.strip().lower() != "":
            return str(label)
    raise ConfigError([f"{flag} is about the default provider of {RESPONSES.name},"
                       " and there is none"],
                      f"set routing.default_provider_names.{RESPONSES.name}")


def read_file(path: Path, encoding: str = "utf-8-sig", newline: str | None = None) -> str:
    """The text of a configuration file; ConfigError names the path and the reason."""
    try:  # Windows editors put a byte order mark in front
        with path.open(encoding=encoding, newline=newline) as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError([f"cannot read {path}: {reason}"]) from None


def capture(args: Any, environ: Mapping[str, str]) -> int:
    """Show the capture switches of the configuration file, or set them in its text."""
    directory, _ = bootstrap(environ)
    path = Path(args.config or directory / "config.toml")
    if args.action == "status":
        settings = load_from(str(path), environ).capture
        rows = {f"{phase}_enabled": toml_value(on)
                for phase, on in CaptureSwitches(settings).defaults.items()}
        rows["captures_dir"] = str(captures_directory(environ))
    else:
        value = args.action == "enable"
        chosen = [phase for phase, stem in CAPTURE_STEMS.items() if args.phase in ("all", stem)]
        switch_captures(path, {f"{phase}_enabled": value for phase in chosen})
        rows = {f"{phase}_enabled": toml_value(value) if phase in chosen else "unchanged"
                for phase in PHASES}
    print("\n".join(["capture", f"  config: {path}",
                     *(f"  {label}: {shown}" for label, shown in rows.items())]))
    return 0


def switch_captures(path: Path, values: Mapping[str, bool]) -> None:
    """Set capture switches in a configuration file."""
    text = read_file(path, "utf-8", "")  # every byte of it stays
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    try:
        edited = mark + set_capture_keys(text.removeprefix(mark), values)
    except ConfigError as error:
        raise ConfigError([f"{path}: {fault}" for fault in error.faults], error.hint) from None
    if edited != text:
        replace_file(path, edited)


# -- what is printed ---------------------------------------------------------

HINT_LEGEND = {
    "ptc": "parallel tool calls", "pck": "prompt cache key", "instr": "instructions",
    "include[...]": "include", "rsn": "reasoning", "rsn.enc": "encrypted reasoning",
    "tc:*": "tool choice", "tools[...]": "tools", "mtc": "max tool calls",
    "pcr": "prompt cache retention", "rs": "reasoning summary", "tlp": "top logprobs",
}


def legend(entries: Mapping[str, str]) -> str:
    """alias=meaning, three on a line, aligned."""
    pairs = [f"{alias}={meaning}" for alias, meaning in entries.items()]
    width = max(map(len, pairs)) + 2
    rows = ["".join(f"{pair:{width}}" for pair in pairs[i:i + 3]).rstrip()
            for i in range(0, len(pairs), 3)]
    return "\n    ".join(rows)


def banner(config: Config, ports: Sequence[tuple[int, int]], source: str, notes: Sequence[str],
           environ: Mapping[str, str] = os.environ) -> str:
    """What is told when the proxy starts (contract 2.4): what runs, where, by which configuration.
    `ports` has the proxy's and the control listener's of each worker."""
    host, control = (f"[{h}]" if ":" in h else h for h in (config.server.host, config.mcp.host))
    names, logs = config.routing.default_provider_names, config.logging
    default = config.providers.get(names.openai_responses)
    base, switches = app_directory(environ), CaptureSwitches(config.capture)
    keys = len(config.server.api_keys) + len(config.server.keys)
    rows = [
        ("listen", f"http://{host}:{ports[0][0]}"),
        ("mcp", ", ".join(f"http://{control}:{at}/mcp" for _, at in ports)),
        ("paths", ", ".join(f"{p.path} ({name})" for name, p in PROTOCOLS.items())),
        ("max_request_body_bytes", config.server.max_request_body_bytes),
        ("max_concurrent_requests", config.server.max_concurrent_requests),
        ("default_provider.responses", names.openai_responses or "none"),
        ("default_provider.chat", names.openai_chat_completions or "none"),
        ("default_provider.anthropic", names.anthropic_messages or "none"),
        ("default_upstream", default.base_url.rstrip("/") if default else "none"),
        ("app_dir", base), ("config", source), ("config_example", base / "config.example.toml"),
        *(("note", note) for note in notes),
        ("providers", ", ".join(f"{n} ({p.protocol})" for n, p in config.providers.items())),
        ("client_keys", f"{keys} accepted" if keys else "not asked for"),
        ("tool_aliases", legend({alias: name for name, alias in TOOL_ALIASES.items()})),
        ("request_hints", legend(HINT_LEGEND)),
        ("log_level", logs.level), ("log_format", logs.output_format),
        ("log_use_color", toml_value(logs.use_color)),
        ("error_response_format", config.error_responses.format),
        ("route_count", len(config.routing.routes)),
        ("read_idle_timeout_secs", f"{default.read_idle_timeout_secs:g}" if default else "none"),
        ("tool_calls.timeout_secs", f"{config.tool_calls.timeout_secs:g}"),
        *((f"capture.{phase}_enabled", toml_value(on)) for phase, on in switches.defaults.items()),
        ("capture", captures_directory(environ) if switches.active else "disabled"),
    ]
    return "\n".join([f"ProxAI {__version__}", *(f"  {label}: {value}" for label, value in rows)])


def tell(text: str) -> None:
    """Print, where anybody reads; a reader that is gone does not end the proxy."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text + "\n")  # in one piece: the log writes here too
        sys.stdout.flush()


def start_notes(config: Config) -> list[str]:
    """What an operator should know before the first request."""
    notes = [f"{credential.path}.api_key is still the template's; requests to it are refused"
             for name, settings in config.providers.items()
             for credential in credentials_of(name, settings)
             if TEMPLATE_KEY.search(credential.source.api_key or "")]
    notes += [f"providers.{name} is {preset.note}" for name, settings in config.providers.items()
              if (preset := PRESETS.get(settings.preset or name))
              and preset.note.startswith("discontinued")
              and settings.base_url.startswith(preset.root)]
    if not (config.routing.routes or any(default_providers(config).values())
            or any(p.prefix or p.models for p in config.providers.values())):
        notes.append("no request leads to a provider yet: set routing.default_provider")
    return notes


def check_report(config: Config, source: str, environ: Mapping[str, str]) -> str:
    """What would run: providers with their URLs, routes in order,
    defaults, and what will not work."""
    lines = [f"{source}: valid", f"listen: {config.server.host} port {config.server.port}",
             "providers:"]
    for name, settings in config.providers.items():
        provider = Provider(name, settings, environ)
        origin, via = provider.origin, ""
        if origin.proxy:
            proxy = place(origin.proxy)
            via = f", through the forward proxy {proxy.host}:{proxy.port}"
        keys = [("" if c.name == name else f"{c.name} ") + f"from {source_report(c, environ)}"
                for c in provider.credentials if settings.auth != "none"]
        key = f"key{'s' if len(keys) > 1 else ''} {', '.join(keys)}" if keys else "no key"
        lines += [f"  {name}: {each.protocol.name} at {each.origin.scheme}://"
                  f"{each.origin.authority}{each.target}, {key}{via}"
                  for each in (provider, *provider.natives.values())]
    lines.append("routes, first match wins:" if config.routing.routes else "routes: none")
    for i, route in enumerate(config.routing.routes):
        kind = pattern_kind(route.match_kind, route.model_pattern)
        guard = f" for {route.request_protocol}" if route.request_protocol else ""
        sent = f" as {route.upstream_model}" if route.upstream_model else ""
        missing = [name for name in PROTOCOLS if route.request_protocol in (None, name)
                   and translation_fault(config, name, route.provider)]
        lines.append(f"  {i + 1}. {route.name or '(no name)'}: {kind} {route.model_pattern}{guard}"
                     f" -> {route.provider}{sent}"
                     + (f" (not for {' and '.join(missing)}: needs translation.extended_pairs)"
                        if missing else ""))
    lines += names_report(compile_names(config.providers, config.routing.force_model_prefix))
    defaults = [f"  {name} -> {default_report(config, name)}" for name in PROTOCOLS]
    return "\n".join([*lines, "defaults:", *defaults,
                      *(f"note: {note}" for note in start_notes(config))])


def source_report(credential: Credential, environ: Mapping[str, str]) -> str:
    """Where a key comes from, and for OAuth whether it is there."""
    # the key itself is read from the others
    source = given_of(credential.source, KEY_SOURCES)[-1]
    oauth = credential.source.oauth
    if oauth is None:
        return source
    stored = "" if read_token(token_path(credential, environ), oauth) else ", not logged in"
    return f"oauth ({oauth.flow}{stored if oauth.flow == 'device' else ''})"


def names_report(names: Names) -> list[str]:
    """The names that providers go by, and which of them several do."""
    lines = []
    for name in names.listed:
        first, *others = dict.fromkeys(found.provider for found in resolve_names(names, name))
        lines.append(f"  {name} -> {first}" + (
            f" (served by {1 + len(others)} providers: {', '.join(others)} too)" if others else ""))
    lines += [f"  {prefix}* -> {provider}" for prefix, provider in names.open]
    return ["names:", *lines] if lines else []


def translation_fault(config: Config, inbound: str, provider: str) -> str:
    """Why requests of a protocol cannot go to a provider; "" where they can."""
    try:
        pair_for(PROTOCOLS[inbound], PROTOCOLS[wire_protocol(config.providers[provider], inbound)],
                 config.translation.extended_pairs)
    except SetupError as error:
        return error.message
    return ""


def default_report(config: Config, inbound: str) -> str:
    """Where requests of a protocol go by default, and whether that pair works."""
    name = getattr(config.routing.default_provider_names, inbound)
    if not name:
        return "none: requests that no route takes are refused"
    if fault := translation_fault(config, inbound, name):
        return f"{name}: {fault}"
    passes = wire_protocol(config.providers[name], inbound) == inbound
    return f"{name} ({'passed through' if passes else 'translated'})"


# -- running -----------------------------------------------------------------

def tune_process() -> None:
    """Settings of the process that make a long run cheaper, and room for many connections."""
    bytes(1 << 20)  # freed at once, it makes glibc keep memory of that size and not map it anew
    gc.collect()
    gc.freeze()  # what is there now stays; no need to look at it again and again
    gc.set_threshold(20_000, 50, 50)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        # a stream takes two; shells allow 1024, macOS refuses "unlimited"
        for files in (hard, 65536, 10240):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
                break


def on_signals(loop: asyncio.AbstractEventLoop, names: Iterable[str],
               stop: Callable[[], None]) -> None:
    """Call `stop` in the loop for each of these signals that the system knows."""
    for number_ in filter(None, (getattr(signal, name, None) for name in names)):
        try:
            loop.add_signal_handler(number_, stop)
        except (NotImplementedError, RuntimeError):  # Windows
            signal.signal(number_, lambda *_: loop.call_soon_threadsafe(stop))


class Sockets(NamedTuple):
    """The bound sockets of one process."""

    proxy: socket.socket
    control: socket.socket


def ports(sockets: Sockets) -> tuple[int, int]:
    """The ports of the proxy and of the control listener."""
    return sockets.proxy.getsockname()[1], sockets.control.getsockname()[1]


def bind(config: Config) -> list[Sockets]:
    """The sockets of each worker: all have the proxy's, and each has a control listener."""
    server, mcp = config.server, config.mcp
    proxy = bound_socket(server.host, server.port)
    return [Sockets(proxy, bound_socket(
        mcp.host, mcp.port and mcp.port + i,
        "choose another control port with --mcp-port or mcp.port; 0 takes a free one"))
        for i in range(server.workers)]


class ConfigFile(NamedTuple):
    """Where the configuration comes from, what reads it, flags included, and its state before it
    was read first."""

    path: Path
    load: Callable[[], Config]
    state: tuple[int, int, int] | None


async def serve(config: Config, log: Log, environ: Mapping[str, str], sockets: Sockets,
                started: Callable[[], Any], file: ConfigFile | None = None) -> None:
    """Run the proxy until a signal ends it: the first drains, the second cuts. `started` is
    called when it accepts, and a change of `file` is followed."""
    proxy = Proxy(config, log, environ)
    server = Server(config.server, proxy.serve, proxy.refuse)
    control = Control(proxy, server)
    switchboard = Server(dataclasses.replace(config.server, host=config.mcp.host),
                         control.serve, control.refuse)
    await server.listen(sockets.proxy)
    await switchboard.listen(sockets.control)
    stopped, hurry, wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()
    server.loop.getaddrinfo = own_resolver(server.loop)  # type: ignore[method-assign]
    on_signals(server.loop, ("SIGINT", "SIGTERM", "SIGBREAK"),
               lambda: hurry.set() if stopped.is_set() else stopped.set())
    if file:
        on_signals(server.loop, ("SIGHUP",), wanted.set)
    tune_process()
    await started()
    upkeep = asyncio.create_task(keep_current(proxy, server, file, stopped, wanted))
    await stopped.wait()
    upkeep.cancel()
    log.event(logging.INFO, "shutdown",
              {"open": len(server.connections), "grace_secs": config.server.shutdown_grace_secs})
    settings = proxy.config.server
    await server.drain(settings.shutdown_grace_secs, hurry, settings.shutdown_delay_secs)
    await switchboard.drain(GOOD_BYE_SECS, hurry)
    state = dump_state(proxy.scheduler, time.time())
    if state["rests"]:
        keep_state(state, cooldowns_path(environ), log)
    proxy.close()


# -- a configuration that changes --------------------------------------------

LOOK_SECS = 1.0  # between two looks at the configuration file
# What is bound or begun at the start stays as it is until the next one.
FIXED_SETTINGS = ("server.host", "server.port", "server.workers", "mcp.", "logging.")


async def keep_current(proxy: Proxy, server: Server, file: ConfigFile | None,
                       stopped: asyncio.Event, wanted: asyncio.Event) -> None:
    """Put a changed configuration file in force, looking at it now and then, and at once where that
    is `wanted`. Keeps what must survive a restart. Ends a worker whose parent is gone."""
    parent, seen = os.getppid(), file and file.state
    with contextlib.suppress(OSError, ValueError):  # what was kept of the last run
        load_state(proxy.scheduler, load(cooldowns_path(proxy.environ).read_bytes()), time.time())
    kept = dump_state(proxy.scheduler, time.time())
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECS):
                await wanted.wait()
        if proxy.config.server.workers > 1 and os.getppid() != parent:
            stopped.set()
        now = file_state(file.path) if file else None
        # an editor that still writes changes the file again, and it is read again
        if file and (wanted.is_set() or now not in (seen, None)):
            wanted.clear()
            seen = now
            reload(proxy, server, file)
        state = dump_state(proxy.scheduler, time.time())
        if state != kept:
            kept = state
            await asyncio.to_thread(keep_state, state, cooldowns_path(proxy.environ), proxy.log)


def file_state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None while there is nothing in it to read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found.st_size else None


def reload(proxy: Proxy, server: Server, file: ConfigFile) -> None:
    """Serve by the configuration as it is now; one with a fault changes nothing."""
    before = proxy.config
    try:
        config = file.load()
        proxy.configure(config)
    except ConfigError as error:
        proxy.log.event(logging.WARNING, "reload-failed",
                        {"config": str(file.path), "error": "; ".join(error.faults),
                         "kept": "the configuration from before"})
        return
    server.configure(config.server)
    proxy.log.logger.setLevel(LEVELS[config.logging.level])
    changed = changed_settings(before, config)
    late = [name for name in changed if name.startswith(FIXED_SETTINGS) and name != "logging.level"]
    proxy.log.event(logging.INFO, "reload",
                    {"config": str(file.path), "changed": changed[:64],
                     **({"needs_restart": late} if late else {})})


def changed_settings(before: Config, after: Config) -> list[str]:
    """The names of the settings that differ; never their values."""
    def leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            yield at, value
            return
        for key, item in value.items():
            yield from leaves(item, f"{at}.{key}" if at else key)

    old, new = (dict(leaves(dataclasses.asdict(c), "")) for c in (before, after))
    return sorted(key for key in {*old, *new} if old.get(key, ABSENT) != new.get(key, ABSENT))


# -- what survives a restart -------------------------------------------------

def cooldowns_path(environ: Mapping[str, str]) -> Path:
    """Where is kept until when providers want no more requests."""
    return app_directory(environ) / "cooldowns.json"


def keep_state(state: Json, path: Path, log: Log) -> None:
    """Keep what must survive."""
    try:
        write_private(path, dump(state))
    except OSError as error:
        log.event(logging.WARNING, "cooldowns_failed",
                  {"err": f"cannot write {path}: {error.strerror}"})


# -- workers -----------------------------------------------------------------

RESTART_SECS = 1.0  # before a worker that ended by itself is started again


def of_worker(config: Config, index: int) -> Config:
    """The configuration of one worker: the first has the log file as it is named, each of the
    others its own, for two processes cannot turn one file over."""
    if not index or not config.logging.file:
        return config
    name, suffix = os.path.splitext(config.logging.file)
    return dataclasses.replace(config, logging=dataclasses.replace(
        config.logging, file=f"{name}.{index}{suffix}"))


def run_workers(sockets: Sequence[Sockets], work: Callable[[int], int]) -> int:
    """Run `work` in a process for each of `sockets`, start those anew that end by themselves, and
    hand signals on to them; returns when all have ended after one."""
    children: dict[int, int] = {}
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    stopping = False

    def start(index: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, names)  # none may come while it is half begun
        pid = None if stopping else os.fork()
        if pid == 0:
            status = 1
            try:
                for name in names:
                    signal.signal(name, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, names)
                status = work(index)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        if pid:
            children[pid] = index
        signal.pthread_sigmask(signal.SIG_UNBLOCK, names)

    def hand_on(number_: int, frame: Any) -> None:
        nonlocal stopping
        if number_ != signal.SIGHUP:
            stopping = True
            for each in {one for pair in sockets for one in pair}:
                each.close()  # or clients would go on to connect
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number_)

    for name in names:
        signal.signal(name, hand_on)
    for index in range(len(sockets)):
        start(index)
    while children:
        ended = children.pop(os.wait()[0], None)  # None: an orphan that a container gave to us
        if ended is not None and not stopping:
            time.sleep(RESTART_SECS)
            start(ended)
    return 0


def load_demo(args: Any, port: int, environ: Mapping[str, str]) -> Config:
    """The configuration of the demo with what the flags say of it."""
    return load_config(demo_config(port), "the demo", environ=environ,
                       overrides=lambda tables: flag_overrides(args, tables))


async def run_demo(args: Any, log: Log, environ: Mapping[str, str]) -> None:
    """Run the proxy in front of the demo provider, and show one request through it."""
    demo = Demo(word_secs=0.02)
    provider = Server(ServerConfig(), demo.serve, demo.refuse)
    config = load_demo(args, await provider.listen(bound_socket("127.0.0.1", 0)), environ)
    if args.port is None and is_taken(config.server.port):
        config = dataclasses.replace(config, server=dataclasses.replace(config.server, port=0))
    if args.mcp_port is None and is_taken(config.mcp.port):
        config = dataclasses.replace(config, mcp=dataclasses.replace(config.mcp, port=0))

    sockets = bind(config)[0]
    port, control_port = ports(sockets)

    async def started() -> None:
        tell(f"ProxAI {__version__}, demo\n  listen: http://127.0.0.1:{port}\n"
             f"  control: http://127.0.0.1:{control_port}\n"
             "  provider: embedded, it says back what it is told")
        question = "Hello, is anybody there?"
        answer = await ask(port, question)
        tell(f"\nOne request went through the proxy.\n  asked:    {question}\n"
             f"  answered: {answer}\n\nTry it yourself:")
        for protocol in PROTOCOLS.values():
            tell(f"\n{curl_line(protocol, port)}")
        tell("\nCtrl-C ends the demo.")

    await serve(config, log, environ, sockets, started)
    await provider.drain(GOOD_BYE_SECS, asyncio.Event())


def is_taken(port: int) -> bool:
    """Whether something answers on a port of this machine already."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def post(port: int, path: str, lines: Sequence[bytes], body: bytes) -> tuple[bytes, str]:
    """The answer to a request to the proxy on `port`, head and body, and what broke it off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(format_lines(b"POST %b HTTP/1.0" % path.encode(), *lines,
                              b"content-length: %d" % len(body)) + body)
    parts, size, broken = [], 0, ""
    try:
        while size <= CAPTURE_READ_BYTES and (data := await reader.read(READ_BYTES)):
            parts.append(data)
            size += len(data)
    except OSError:
        broken = "the answer broke off"
    writer.close()
    if size > CAPTURE_READ_BYTES:
        broken = f"only the first {CAPTURE_READ_BYTES >> 20} MiB of the answer were read"
    return b"".join(parts), broken


async def ask(port: int, question: str) -> str:
    """One Chat request through the proxy on `port`, and the answer's text."""
    body = dump({"model": "demo", "messages": [{"role": "user", "content": question}]})
    raw, _ = await post(port, CHAT.path, (), body)
    return str(json.loads(raw.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"])


def curl_line(protocol: Protocol, port: int) -> str:
    """A command that sends a streaming request of `protocol` to the proxy."""
    said = "Tell me a story"
    body: Json = {"model": "demo", "stream": True, protocol.wants: said}
    if protocol is not RESPONSES:
        body[protocol.wants] = [{"role": "user", "content": said}]
    if protocol is MESSAGES:
        body["max_tokens"] = 100
    return (f"curl -N http://127.0.0.1:{port}{protocol.path} -H 'content-type: application/json'"
            f" \\\n  -d '{json.dumps(body)}'")


# -- clients -----------------------------------------------------------------

class Client(NamedTuple):
    """How a client is pointed at this proxy. `text` goes into `file`; a client without one takes
    `variables` of the environment. @BASE, @KEY and @MODEL stand for what differs."""

    title: str
    model: str
    variables: Mapping[str, str]
    file: str = ""
    text: str = ""


OPENAI_VARIABLES = {"OPENAI_BASE_URL": "@BASE/v1", "OPENAI_API_KEY": "@KEY"}
CLIENTS = {
    "codex": Client("Codex", "gpt-5.5", {"PROXAI_KEY": "@KEY"}, "~/.codex/config.toml", """\
model = "@MODEL"
model_provider = "proxai"

[model_providers.proxai]
name = "ProxAI"
base_url = "@BASE/v1"
wire_api = "responses"
env_key = "PROXAI_KEY"
"""),
    "claude": Client("Claude Code", "claude-opus-4-8",
                     {"ANTHROPIC_BASE_URL": "@BASE", "ANTHROPIC_AUTH_TOKEN": "@KEY"}),
    "zed": Client("Zed", "", {"OPENAI_API_KEY": "@KEY", "ANTHROPIC_API_KEY": "@KEY"},
                  "settings.json", """\
{"language_models": {"openai": {"api_url": "@BASE/v1"},
                     "anthropic": {"api_url": "@BASE"}}}
"""),
    "opencode": Client("opencode", "gpt-5.5", {}, "opencode.json", """\
{"provider": {"proxai": {"npm": "@ai-sdk/openai-compatible", "name": "ProxAI",
                         "options": {"baseURL": "@BASE/v1", "apiKey": "@KEY"},
                         "models": {"@MODEL": {}}}},
 "model": "proxai/@MODEL"}
"""),
    "aider": Client("aider, started with --model openai/@MODEL", "gpt-5.5",
                    {"OPENAI_API_BASE": "@BASE/v1", "OPENAI_API_KEY": "@KEY"}),
    "openai": Client("the OpenAI SDKs", "", OPENAI_VARIABLES),
    "anthropic": Client("the Anthropic SDKs", "",
                        {"ANTHROPIC_BASE_URL": "@BASE", "ANTHROPIC_API_KEY": "@KEY"}),
}


def client_settings(client: Client, base: str, key: str, model: str = "",
                    windows: bool = False) -> str:
    """What points a client at the proxy at `base`, as lines for a shell and a file's text."""
    def filled(text: str) -> str:
        for mark, value in (("@BASE", base), ("@KEY", key), ("@MODEL", model or client.model)):
            text = text.replace(mark, value)
        return text

    form = "$env:{} = '{}'" if windows else "export {}={}"
    lines = [f"# {filled(client.title)}",
             *(form.format(name, filled(value)) for name, value in client.variables.items())]
    if client.file:
        lines += [f"# in {client.file}:", filled(client.text).rstrip("\n")]
    return "\n".join(lines)


def env(args: Any, environ: Mapping[str, str]) -> int:
    """Print how a client is pointed at the proxy of a configuration."""
    there = args.config or (app_directory(environ) / "config.toml").exists()
    server = load_from(args.config, environ).server if there else ServerConfig()
    host = server.host
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if ":" not in host else "::1"
    base = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
    key = ("a-key-of-server.api_keys" if server.api_keys else
           "a-key-of-server.keys" if server.keys else "any")
    print(client_settings(CLIENTS[args.client], base, key, args.model, os.name == "nt"))
    return 0


# -- captures ----------------------------------------------------------------

def captures(args: Any, environ: Mapping[str, str]) -> int:
    """List stored exchanges, or do something with one."""
    directory = captures_directory(environ)
    if args.action == "list":
        return print_captures(list_captures(directory, max(args.limit, 1)), args, directory)
    if not args.id:
        raise ConfigError([f"captures {args.action} needs the id of a capture"],
                          "`proxai.py captures` lists them")
    CAPTURE_ACTIONS[args.action](read_capture(directory, args.id), args)
    return 0


def print_captures(found: list[Json], args: Any, directory: Path) -> int:
    """Print a list of stored exchanges."""
    if args.json:
        for summary in found:
            print(dump(summary).decode())
        return 0
    rows = [capture_row(summary) for summary in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    if not rows:
        print(f"no captures in {directory}; `proxai.py capture enable` has requests captured from"
              " now on")
    return 0


def export_capture(capture: CapturedExchange, args: Any) -> None:
    """Print an exchange as one JSON value, or write it to a new file."""
    try:
        text = json.dumps(fixture(capture, args.sanitize), ensure_ascii=False, indent=2)
    except RecursionError:
        raise ConfigError(["the bodies of this capture are nested too deeply to export"]) from None
    if not args.sanitize:
        print("Warning: prompts and answers are in it as they were; --sanitize replaces them.",
              file=sys.stderr)
    if not args.output:
        print(text)
        return
    try:
        handle = os.open(args.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError as error:
        raise ConfigError([f"cannot write {args.output}: {error.strerror}"]) from None


CAPTURE_ACTIONS: dict[str, Callable[[CapturedExchange, Any], None]] = {
    "show": lambda capture, args: print("\n".join(capture_lines(capture))),
    "diff": lambda capture, args: print("\n".join(difference_lines(capture))),
    "export": export_capture,
}


def stored_request(capture: CapturedExchange) -> tuple[str, list[bytes], bytes]:
    """Path, header lines and body to send a stored request again; ConfigError where that was not
    stored whole."""
    phase = capture.phases.get(PHASES[0])
    if phase is None or phase.head is None or phase.body is None or phase.cut:
        raise ConfigError([f"the capture {capture.id} has no whole inbound request"],
                          not_captured(PHASES[0]) if phase is None else "")
    path = text_of(phase.head.get("path"))
    lines = repeated_lines(mapping(phase.head.get("headers")))
    try:
        parse_request_line(b"POST %b HTTP/1.0" % path.encode())
        for line in lines:
            parse_field(line)
    except (FramingError, UnicodeEncodeError) as error:
        raise ConfigError([f"the inbound request of the capture {capture.id} is damaged:"
                           f" {error}"]) from None
    return path, lines, phase.body


def load_from(path: str | None, environ: Mapping[str, str]) -> Config:
    """The configuration in a file, or that of the app directory."""
    file = Path(path) if path is not None else app_directory(environ) / "config.toml"
    return load_config(read_file(file), str(file), environ=environ)


def check_provider(config: Config, name: str) -> None:
    """Raise a ConfigError unless there is a provider of that name."""
    if name not in config.providers:
        raise ConfigError([f"there is no provider {name!r} in the configuration"],
                          "there are " + ", ".join(config.providers))


def replay_config(config: Config, provider: str | None) -> Config:
    """A configuration for one request from this process: no captures, no key of ours asked for,
    and where `provider` is given nowhere else to go."""
    routing = config.routing
    if provider is not None:
        check_provider(config, provider)
        names = DefaultsConfig(**dict.fromkeys(PROTOCOLS, provider))
        routing = dataclasses.replace(routing, routes=(), default_provider_names=names)
    server = dataclasses.replace(config.server, host="127.0.0.1", port=0, api_keys=())
    return dataclasses.replace(config, server=server, routing=routing, capture=CaptureConfig())


def replay(args: Any, environ: Mapping[str, str]) -> int:
    """Send a stored request again; 0 where the answer is a 2xx."""
    capture = read_capture(captures_directory(environ), args.id)
    config = replay_config(load_from(args.config, environ), args.provider)
    request = stored_request(capture)
    log, writer = start_log(dataclasses.replace(config.logging, level="warn"), sys.stderr, environ)
    return run_logged(replay_request(config, log, environ, capture, request), writer)


async def replay_request(config: Config, log: Log, environ: Mapping[str, str],
                         capture: CapturedExchange, request: tuple[str, list[bytes], bytes]) -> int:
    """Send a request through a proxy of this process, and print what came of it."""
    path, lines, body = request
    report = explain(config, path, lines, body, environ)
    print(f"POST {path}, {len(body)} bytes, to "
          + (f"the provider {report['provider']}, {report['url']}" if report["url"] else
             "no provider"), flush=True)
    proxy, started = Proxy(config, log, environ), time.perf_counter()
    server = Server(config.server, proxy.serve, proxy.refuse)
    server.loop.getaddrinfo = own_resolver(server.loop)  # type: ignore[method-assign]
    port = await server.listen(bound_socket(config.server.host, 0))
    try:
        raw, broken = await post(port, path, lines, body)
    finally:
        await server.drain(GOOD_BYE_SECS, asyncio.Event())
        proxy.close()
    block, _, answer = raw.partition(b"\r\n\r\n")
    try:
        head = parse_response_head(block)
    except FramingError:
        raise ConfigError([broken or "the proxy gave no answer"]) from None
    print(f"answered {head.status}, {len(answer)} bytes, in"
          f" {milliseconds(time.perf_counter() - started)} ms" + (f"; {broken}" if broken else ""))
    print("\n".join(replay_lines(capture, head, answer)))
    return 0 if 200 <= head.status < 300 and not broken else 1


def replay_lines(capture: CapturedExchange, head: ResponseHead, answer: bytes) -> list[str]:
    """How an answer differs from the stored one, but for ids and times; all of it where none was
    stored."""
    sse, stored = is_event_stream(head.values.get(b"content-type")), capture.phases.get(PHASES[3])
    if stored is None or stored.body is None:
        return [not_captured(PHASES[3]), *shown_lines(body_text(answer, sse))]
    status = mapping(stored.head).get("status")
    lines = [] if status == head.status else [f"-status: {status}", f"+status: {head.status}"]
    lines += diff_of(body_text(stored.body, stored.sse, settled), body_text(answer, sse, settled),
                     ("stored", "now"))
    return lines or ["the same answer as the stored one, but for ids and times"]


# -- explain -----------------------------------------------------------------

CAPTURE_WORD = re.compile(r"[0-9A-Za-z-]+")


def explain_source(args: Any, environ: Mapping[str, str]) -> tuple[str, list[bytes], bytes]:
    """Path, header lines and body of the request to explain."""
    source, lines = args.source, [line.encode("utf-8", "replace") for line in args.header]
    if source != "-" and CAPTURE_WORD.fullmatch(source) and not Path(source).exists():
        path, stored, raw = stored_request(read_capture(captures_directory(environ), source))
        return args.path or path, [*stored, *lines], raw
    if not args.path:
        raise ConfigError(["--path is needed beside a body"],
                          "give one of " + ", ".join((*MODEL_PATHS, *COUNT_PATHS)))
    raw = (sys.stdin.buffer.read() if source == "-" else read_file(Path(source)).encode("utf-8"))
    return args.path, lines, raw


def explain_command(args: Any, environ: Mapping[str, str]) -> int:
    """Print what would become of a request; 1 where that is an error."""
    config = load_from(args.config, environ)
    path, lines, raw = explain_source(args, environ)
    report = explain(config, path, lines, raw, environ)
    print(pretty(report) if args.json else "\n".join(explain_lines(report)))
    return 1 if report["answer"] else 0


# -- credentials of a proxy that runs ----------------------------------------

def ask_control(args: Any, environ: Mapping[str, str], path: str, body: Json | None = None) -> Json:
    """What the control listener of the proxy that runs answers; ConfigError where none does."""
    found = args.config or (app_directory(environ) / "config.toml").exists()
    mcp = load_from(args.config, environ).mcp if found else McpConfig()
    port = args.mcp_port if args.mcp_port is not None else mcp.port
    link = http.client.HTTPConnection(mcp.host, port, timeout=10)
    try:
        link.request("GET" if body is None else "POST", path, dump(body) if body else None,
                     {"content-type": "application/json", "host": "localhost"})
        reply = link.getresponse()
        value = mapping(load(reply.read()))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError([f"no proxy answers at {mcp.host}:{port}: {error}"],
                          "start it, or name its control port with --mcp-port") from None
    finally:
        link.close()
    if reply.status != 200:
        raise ConfigError([text_of(mapping(value.get("error")).get("message"))
                           or f"the proxy answered {reply.status}"])
    return value


def ask_why(args: Any, environ: Mapping[str, str]) -> int:
    """Print who could serve a model."""
    found = ask_control(args, environ, f"/why?model={quote(args.model, safe='')}")
    print(pretty(found) if args.json else "\n".join(why_lines(found, time.time())))
    return 0


def why_lines(found: Json, now: float) -> list[str]:
    """An answer of /why for people; protocols with the same answer stand together."""
    lines: list[str] = []
    answers: Json = found["protocols"]
    for protocol, told in answers.items():
        same = [other for other in answers if answers[other] == told]
        if same[0] != protocol:
            continue
        lines.append(f"{found['model']}, asked for by {', '.join(same)}:")
        lines += [f"  nobody: {told['error']}"] if "error" in told else [
            f"  {row['provider']}/{row['credential']} as {row['model']}: "
            + ("ready" if row["eligible"] else f"rests, {rest_text(row, now)}")
            + (f"; only when others fail ({row['tier']})" if row["tier"] else "")
            for row in told["candidates"]]
    return lines


def rest_text(rest: Json, now: float) -> str:
    """Why something rests, who said so, and until when."""
    if "until" not in rest:
        return str(rest["reason"])
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rest["until"]))
    said = f"{rest['source']}: {rest['raw']}" if rest["raw"] else rest["source"]
    return (f"{rest['reason']}, {rest['kind']} ({said}), until {until}, in"
            f" {math.ceil(max(rest['until'] - now, 0))} s")


def credentials(args: Any, environ: Mapping[str, str]) -> int:
    """Print the credentials of the proxy that runs, or end a rest."""
    if args.action == "reset":
        if not args.name:
            raise ConfigError(["credentials reset needs the name of a credential, or all"],
                              "`proxai.py credentials` lists them")
        ended = ask_control(args, environ, "/credentials/reset", {"name": args.name})["reset"]
        print(f"{ended} rest{'' if ended == 1 else 's'} ended")
        return 0
    rows = ask_control(args, environ, "/credentials")["credentials"]
    if args.json:
        print(pretty(rows))
        return 0
    for row in rows:
        print(f"{row['provider']}/{row['credential']}: priority {row['priority']}, weight"
              f" {row['weight']}{'' if row['rests'] else ', ready'}")
        for rest in row["rests"]:
            print(f"  rests for {rest['model'] or 'all models'}: {rest_text(rest, time.time())}")
    return 0


# -- doctor ------------------------------------------------------------------

DOCTOR_SECS = 20.0  # for each check
DOCTOR_LINKS = 8  # credentials that are looked at side by side
CERTIFICATE_DAYS = 14  # when it is time to renew one
SAID_CHARS = 200  # of a provider's own words
# The checks in their order, each with those that it cannot do without.
CHECKS = {"dns": (), "tcp": ("dns",), "tls": ("tcp",), "key": (), "models": ("tls", "key"),
          "chat": ("models",), "tool": ("chat",), "stream": ("chat",)}
DOCTOR_NOTE = ("The doctor sends up to three tiny requests with each key. They may cost a fraction"
               " of a cent.")


PROBE_TEXT = [{"role": "user", "content": "Reply with the word OK."}]
PROBE_TOOL = {"type": "function", "function": {
    "name": "say_word", "description": "Say a word.", "parameters": {
        "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}
# A request of the doctor, in Chat form, and the limit of its answer in tokens.
PROBES: dict[str, tuple[int, Json]] = {
    "chat": (16, {"messages": PROBE_TEXT}),
    "tool": (512, {  # models that think do so before the call
        "messages": [{"role": "user", "content": "Call the tool with the word OK."}],
        "tools": [PROBE_TOOL], "tool_choice": "required"}),
    "stream": (16, {"messages": PROBE_TEXT, "stream": True}),
}
PROBE_HEAD = parse_request_head(b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type:"
                                b" application/json" % CHAT.path.encode(), HeadLimits())
# What a check comes to, and what is told of it, by a word for what went wrong: those of
# `failure_of` for the way there, those of RULES, and a few more, for answers.
ADVICE = {
    "unresolved": ("fail", "the host name {host} cannot be found; check base_url and DNS, and"
                   " HTTPS_PROXY where the network needs one"),
    "refused": ("fail", "nothing listens at {place}; see that the server is running, and that"
                " its port is right"),
    "unreachable": ("fail", "{place} cannot be reached ({said}); is it running, is base_url right,"
                    " does the network need HTTPS_PROXY?"),
    "silent": ("fail", "{place} does not answer within {secs} seconds; see that base_url is right,"
               " and whether the network needs HTTPS_PROXY"),
    "timeout": ("fail", "no whole answer within {secs} seconds; try again, or a larger --timeout"),
    "untrusted": ("fail", "the certificate of {origin} is not trusted ({said}); if your network"
                  " re-signs TLS, set ca_file to its CA"),
    "plain": ("fail", "base_url says https, but {origin} speaks plain http"),
    "tls": ("fail", "the TLS handshake with {origin} failed ({said}); check the scheme and the port"
            " in base_url"),
    "broken": ("fail", "{said}"),
    "template": ("fail", "{path}.api_key is still the template's; put your key there"),
    "no model": ("skip", "no model is known; name one with --model, or in"
                 " providers.{provider}.models"),
    "auth": ("fail", "the key from {source} is refused; see that it is whole, valid, and"
             " this provider's{quote}"),
    "forbidden": ("fail", "the key from {source} may not do this{quote}"),
    "missing": ("fail", "there is nothing at {url}; check the path in base_url, or try another"
                " protocol ({others}){quote}"),
    "unsupported": ("fail", "the provider does not know the model {model}{near}{quote}"),
    "quota": ("warn", "the key works, but its quota or rate limit is used up{again}{quote}"),
    "capacity": ("warn", "the key works, but the provider takes no more requests now{again}"
                 "{quote}"),
    "billing": ("fail", "the key works, but there is no credit left{again}{quote}"),
    "challenge": ("fail", "the network in front of the provider asks for a browser; try another"
                  " network, or proxy_url"),
    "transient": ("fail", "the provider has a fault of its own (status {status}); try again"
                  " later{quote}"),
    "request": ("fail", "the provider refuses the request (status {status}){quote}"),
    "unknown": ("fail", "the provider answered with status {status}{quote}"),
    "limit": ("ok", "it works; the model thinks longer than this check allows"),
    "page": ("fail", "{url} is a web page, not an API; check the path in base_url"),
    "moved": ("fail", "{url} leads elsewhere (status {status}); put the address it leads to into"
              " base_url{quote}"),
    "shape": ("fail", "the answer is none of {protocol}; try another protocol ({others}){quote}"),
    "cut": ("fail", "the stream ended before its last event{quote}"),
    "whole": ("fail", "no stream came, but an answer in one piece"),
}


class Unwell(Exception):
    """Why a check cannot go on: a word of ADVICE, and what its sentence tells."""

    def __init__(self, what: str, **facts: Any) -> None:
        super().__init__(what)
        self.what, self.facts = what, facts


def failure_of(error: Exception, check: str) -> Unwell:
    """What ended a check."""
    late = "silent" if check in ("dns", "tcp", "tls") else "timeout"
    for kind, what in ((TimeoutError, late), (ssl.SSLCertVerificationError, "untrusted"),
                       (ssl.SSLError, "tls"), (socket.gaierror, "unresolved"),
                       (ConnectionRefusedError, "refused"), (OSError, "unreachable")):
        if isinstance(error, kind):
            said = getattr(error, "verify_message", "") or getattr(error, "reason", "") or (
                error.strerror if isinstance(error, OSError) and error.strerror else "")
            if what == "tls" and said in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                what = "plain"
            return Unwell(what, said=said or "no reason given")
    if isinstance(error, Unwell):
        return error
    return Unwell("broken", said=error.message if isinstance(error, ProxyError) else str(error))


def advice(failure: Unwell, facts: Mapping[str, Any]) -> tuple[str, str]:
    """What a check comes to, and a sentence on it. The provider's own words stand behind it."""
    status, text = ADVICE[failure.what]
    told = {"said": "", "near": "", "again": "", **facts, **failure.facts}
    said = textwrap.shorten(str(told["said"]), SAID_CHARS, placeholder=" ...")
    quote = f"; it says: {said}" if said else ""
    return status, text.format(**{**told, "said": said, "quote": quote})


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """`text` without secrets, and without beginnings and ends of them, as errors quote them."""
    for secret in secrets:
        for size in range(len(secret), min(len(secret), 8) - 1, -1):
            for piece in {secret[:size], secret[-size:]} if size > 3 else ():
                text = text.replace(piece, REDACTED)
    return text


WEB_PAGE = re.compile(rb"\s*(?:<!doctype html|<html)", re.I)
OUTPUT_LIMIT = re.compile(r"max_(?:completion_|output_)?tokens or model output limit", re.I)
KEY_FAULT = re.compile(r"\bapi[ _-]?key\b.{0,40}\b(?:valid|invalid|expired|missing)\b"
                       r"|\b(?:invalid|expired|missing)\b.{0,20}\bapi[ _-]?key\b", re.I)


def judge(answer: Fetched, model: str, now: float) -> None:
    """Raise what is wrong with an answer by its status; 200 with a web page is so too."""
    status, page = answer.status, WEB_PAGE.match(answer.body)
    if status < 300 and not page:
        return
    if status < 300:
        raise Unwell("page")
    if status < 400:
        leads = answer.values.get(b"location", b"").decode("latin-1").partition("?")[0]
        raise Unwell("moved", status=status, said=leads)
    error = upstream_error(status, answer.body[:ERROR_BODY_BYTES])
    try:
        body = load(answer.body)
    except ValueError:
        body = None
    verdict = classify(error, answer.values, body, now)
    what, said = verdict.what, "" if page else error.message
    if what == "missing" and model and model in said:
        what = "unsupported"
    elif what == "request" and OUTPUT_LIMIT.search(said):
        what = "limit"
    elif what == "request" and KEY_FAULT.search(said):  # Google answers 400 there
        what = "auth"
    again = f", for {verdict.until - now:.0f} seconds more" if verdict.until else ""
    raise Unwell(what, status=status, said=said, again=again)


# -- which model the doctor asks ---------------------------------------------

NO_PLAIN_CHAT = re.compile(
    r"image|audio|video|realtime|transcri|speech|sora|veo|guard|ocr|search|research|instruct"
    r"|davinci|babbage|codex|computer|live|robotics|aqa", re.I)
CHEAP = re.compile(
    r"(?:^|[-/.:_ ])(?:nano|mini|lite|flash|haiku|small|tiny|free)(?:$|[-/.:_ ])", re.I)


def doctor_model(config: Config, provider: str, asked: str, listed: Sequence[str]) -> str:
    """The provider's name of the model to ask: the one that was `asked` for, one of the
    configuration, or of its own list one that can chat, rather a cheap one. "" for none."""
    routes = [r.upstream_model or r.model_pattern for r in config.routing.routes
              if r.provider == provider and "$" not in (r.upstream_model or "")
              and (r.upstream_model or pattern_kind(r.match_kind, r.model_pattern) == "exact")]
    configured = [model.name for model in config.providers[provider].models]
    plain = [id for id in listed if not NO_PLAIN_CHAT.search(id)] or list(listed)
    found = [*filter(None, [asked]), *configured, *routes, *filter(CHEAP.search, plain), *plain]
    return split_thinking(found[0])[0] if found else ""


def near_models(model: str, listed: Sequence[str]) -> str:
    """What a sentence on an unknown model goes on with: names that are like it, else some."""
    near = difflib.get_close_matches(model, listed, 5, 0.5)
    some = near or listed[:5]
    return f"; {'it has names like' if near else 'it has'} {', '.join(some)}" if some else ""


# -- what the doctor's requests are answered ---------------------------------

def check_chat(choice: Json, message: Json) -> tuple[str, str]:
    """What the answer to the first probe shows."""
    if text := text_of(message.get("content")).strip():
        return "ok", f"answered {textwrap.shorten(text, 40, placeholder='...')!r}"
    if choice.get("finish_reason") == "length" or any(
            message.get(name) for name in ("reasoning", "reasoning_content")):
        return "ok", ADVICE["limit"][1]
    raise Unwell("shape")


def check_tool(choice: Json, message: Json) -> tuple[str, str]:
    """What the answer to the probe with a tool shows."""
    called = next(iter(listing(message.get("tool_calls"))), None)
    call = mapping(mapping(called).get("function"))
    if not call:
        why = ("the model thinks longer than this check allows" if choice.get("finish_reason")
               == "length" else "clients that need tools will not get far with it")
        return "warn", f"it did not call the tool; {why}"
    try:
        mapping(load(text_of(call.get("arguments")).encode()))["word"]
    except (ValueError, KeyError):
        return "warn", "it called the tool, with arguments that do not fit it"
    return "ok", f"called {text_of(call.get('name'))} as asked"


def check_stream(protocol: Protocol, raw: bytes, pair: Pair | None, ctx: Context) -> int:
    """The number of events in a provider's stream, which must be whole and translatable."""
    observer = StreamObserver(protocol, len(raw) + 1)
    events = list(observer.payloads(raw + b"\n\n", 0.0))
    if not events:
        raise Unwell("whole")
    if observer.seen.error_message or not observer.complete:
        raise Unwell("cut", said=observer.seen.error_message or "")
    if pair:
        deque(pair_events(pair.stream(ctx), [*events, None]), 0)
    return len(events)


# -- the doctor's round ------------------------------------------------------

class Examination:
    """The checks of one provider with one of its credentials, one after another."""

    def __init__(self, provider: Provider, config: Config, tokens: Tokens, asked: str,
                 secs: float) -> None:
        self.provider, self.config, self.tokens = provider, config, tokens
        self.asked, self.secs, self.pool = asked, secs, tokens.pool
        self.key, self.model, self.target = "", "", provider.target
        self.listed: list[str] = []
        origin = provider.origin
        self.way = place(origin.proxy) if origin.proxy else origin
        self.via = f" (of the forward proxy {self.way.authority})" if origin.proxy else ""
        self.steps: dict[str, Callable[[], Awaitable[tuple[str, str]]]] = {
            "dns": self.dns, "tcp": self.tcp, "tls": self.tls, "key": self.find_key,
            "models": self.models, "chat": functools.partial(self.answered, "chat", check_chat),
            "tool": functools.partial(self.answered, "tool", check_tool), "stream": self.stream}

    async def run(self) -> Json:
        """The report on them."""
        checks: list[Json] = []
        lost: dict[str, str] = {}  # a check -> the one that it failed by
        for name, needs in CHECKS.items():
            culprit = next((lost[need] for need in needs if need in lost), None)
            began = time.perf_counter()
            status, text, ended = (("skip", f"needs {culprit}", culprit) if culprit
                                   else await self.check(name))
            ms = None if status == "skip" else milliseconds(time.perf_counter() - began)
            checks.append({"check": name, "status": status, "ms": ms, "text": text})
            if ended:
                lost[name] = ended
        provider = self.provider
        return {"provider": provider.name, "credential": provider.credential.name,
                "protocol": provider.protocol.name, "url": self.url(provider.target),
                "model": self.model or None, "checks": checks}

    async def check(self, name: str) -> tuple[str, str, str | None]:
        """What a check came to: ok, warn, fail or skip, and a sentence; and the check itself where
        those that need it are in vain."""
        ended = None
        try:
            async with asyncio.timeout(self.secs):
                status, text = await self.steps[name]()
        except (Unwell, ProxyError, OSError, ValueError) as error:
            status, text = advice(failure_of(error, name), self.facts())
            ended = name
        text += self.via if name in ("dns", "tcp") else ""
        return status, printable(without_secrets(text, self.secrets())), ended

    def facts(self) -> Json:
        """What sentences of ADVICE may tell."""
        provider = self.provider
        return {"host": self.way.host, "place": f"{self.way.host}:{self.way.port}",
                "origin": provider.origin.authority, "secs": f"{self.secs:g}",
                "path": provider.credential.path, "provider": provider.name,
                "source": source_report(provider.credential, self.tokens.environ),
                "url": self.url(self.target), "model": self.model,
                "near": near_models(self.model, self.listed), "protocol": provider.protocol.title,
                "others": " or ".join(name for name, p in PROTOCOLS.items()
                                      if p is not provider.protocol)}

    def secrets(self) -> list[str]:
        """What must not be printed, though an answer may repeat it."""
        headers = self.provider.credential.headers.items()
        return [self.key, *(value for name, value in headers if SECRET_HEADER.match(name))]

    def url(self, target: str) -> str:
        """A URL of the provider, without the query."""
        origin = self.provider.origin
        return f"{origin.scheme}://{origin.authority}{target.partition('?')[0]}"

    async def dns(self) -> tuple[str, str]:
        """Look up the host, the forward proxy's where there is one."""
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(self.way.host)
            return "skip", f"{self.way.host} is an address"
        found = await asyncio.get_running_loop().getaddrinfo(
            self.way.host, self.way.port, type=socket.SOCK_STREAM)
        count = len({address[4][0] for address in found})
        return "ok", f"{self.way.host} has {count} address{'es' * (count > 1)}"

    async def tcp(self) -> tuple[str, str]:
        """Connect, and no more."""
        _, writer = await asyncio.open_connection(self.way.host, self.way.port,
                                                  happy_eyeballs_delay=0.25)
        writer.transport.abort()
        return "ok", f"connected to port {self.way.port}"

    async def tls(self) -> tuple[str, str]:
        """Connect as requests do; they use the connection then."""
        origin = self.provider.origin
        if origin.scheme == "http":
            return "skip", "plain http"
        link = await open_link(origin)
        tls = link.writer.get_extra_info("ssl_object")
        self.pool.give(link)
        ends = ssl.cert_time_to_seconds(tls.getpeercert()["notAfter"])
        days = int((ends - time.time()) // 86400)
        return ("ok" if days >= CERTIFICATE_DAYS else "warn",
                f"{tls.version()}; the certificate ends in {days} days")

    async def find_key(self) -> tuple[str, str]:
        """Get the key."""
        provider = self.provider
        if provider.settings.auth == "none":
            return "skip", "the provider takes none"
        if provider.template_key:
            raise Unwell("template")
        self.key = await self.tokens.key(provider.credential)
        return "ok", f"from {source_report(provider.credential, self.tokens.environ)}"

    async def models(self) -> tuple[str, str]:
        """Ask for the list of models, and choose one of them."""
        provider = self.provider
        choose_model = functools.partial(doctor_model, self.config, provider.name, self.asked)
        self.model = choose_model(())
        if provider.settings.discover is False:
            return "skip", "`discover` is off for this provider"
        self.target, lines = provider.list_request(self.key)
        # check() has the limit
        answer = await fetch(self.pool, provider.origin, self.target, lines=lines, secs=FOREVER)
        try:
            judge(answer, "", time.time())
        except Unwell as failure:
            # keys may be good for chats only, and not all providers have a list
            if failure.what not in ("forbidden", "missing") and answer.status not in (405, 501):
                raise
            return "warn", (f"no list at {self.url(self.target)} (status {answer.status}); base_url"
                            " may be wrong, or the provider has none for this key")
        try:
            self.listed = [model.id for model in read_models(answer.body, provider.name)]
        except ValueError:
            return "warn", f"what {self.url(self.target)} answers is no list of models"
        self.model = choose_model(self.listed)
        return "ok", f"{len(self.listed)} models"

    async def send(self, probe: str, tap: Callable[[bytes], None] | None = None) -> tuple[
            Fetched, Pair | None, Context]:
        """The answer to a probe that was translated and sent as the proxy does it."""
        provider = self.provider
        self.target = provider.target
        if not self.model:
            raise Unwell("no model")
        ctx = context_of(CHAT, provider, Decision(provider.name, self.model, None), "", "doctor")
        tokens, body = PROBES[probe]
        body = {"model": self.model, **body, ctx.caps.max_tokens_field or "max_tokens": tokens}
        pair = pair_for(CHAT, provider.protocol, True)
        raw, lines = dump(body), None
        if pair:
            raw, job = translated_request(pair, body, ctx)
            lines = job.lines
        head = provider.request_head(PROBE_HEAD, len(raw), lines, "", self.key)
        answer = await fetch_with(self.pool, provider.origin, head, raw, FOREVER, tap)
        judge(answer, self.model, time.time())
        return answer, pair, ctx

    async def answered(self, probe: str,
                       look: Callable[[Json, Json], tuple[str, str]]) -> tuple[str, str]:
        """Send a probe, and look at its answer in Chat form: the first choice, and its message."""
        answer, pair, ctx = await self.send(probe)
        try:
            value = load(answer.body)
            chat = mapping(pair.response(value, ctx) if pair else value)
            choice = mapping(next(iter(listing(chat.get("choices"))), None))
            return look(choice, mapping(choice.get("message")))
        except ValueError:
            raise Unwell("shape") from None

    async def stream(self) -> tuple[str, str]:
        """Send a probe that is answered by a stream."""
        began, pieces = time.perf_counter(), []
        answer, pair, ctx = await self.send(
            "stream", lambda piece: pieces.append(time.perf_counter()))
        count = check_stream(self.provider.protocol, answer.body, pair, ctx)
        return "ok", f"{count} events, the first after {milliseconds(pieces[0] - began)} ms"


def seconds(text: str) -> float:
    """A time limit as a flag gives it."""
    try:
        return float(SECONDS.read(float(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def doctor_lines(report: Json, paint: Callable[[str, str], str]) -> list[str]:
    """The report on one credential for people."""
    own = report["credential"] == report["provider"]
    name = report["provider"] + ("" if own else f", {report['credential']}")
    colors = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
    lines = [f"{name}: {report['protocol']} at {report['url']}"
             + (f", model {printable(report['model'])}" if report["model"] else "")]
    for check in report["checks"]:
        status, ms = check["status"], "" if check["ms"] is None else f"{check['ms']} ms"
        said = paint(f"{'FAIL' if status == 'fail' else status:4}", colors[status])
        lines.append(f"  {said}  {check['check']:6}  {ms:>8}  {check['text']}")
    return lines


async def examine(providers: Sequence[Provider], config: Config, args: Any,
                  environ: Mapping[str, str], show: Callable[[Json], None]) -> list[Json]:
    """The reports on these, some at a time, each one shown when it and those before it are
    there."""
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(DOCTOR_LINKS)
    loop.getaddrinfo = own_resolver(loop)  # type: ignore[method-assign]
    log = Log(logging.Logger("doctor", logging.CRITICAL))  # the report tells what it would

    async def visit(provider: Provider) -> Json:
        async with gate:
            return await Examination(provider, config, tokens, args.model, args.timeout).run()

    reports = []
    with contextlib.closing(Pool()) as pool:
        tokens = Tokens(pool, log, environ)
        for task in [asyncio.create_task(visit(provider)) for provider in providers]:
            reports.append(await task)
            show(reports[-1])
    return reports


def doctor(args: Any, environ: Mapping[str, str]) -> int:
    """Try providers with their keys; 1 where a check failed."""
    config = load_from(args.config, environ)
    names = list(dict.fromkeys(name.strip().lower() for name in args.providers))
    for name in names:
        check_provider(config, name)
    print(DOCTOR_NOTE, file=sys.stderr)
    paint = HumanLines(has_color(sys.stdout, config.logging, environ)).paint
    providers = [each for name in names or config.providers
                 for provider in [Provider(name, config.providers[name], environ)]
                 for each in (provider, *provider.others.values())]
    if args.protocol:
        providers = [each.speaking(PROTOCOL_WORDS[args.protocol]) for each in providers]
    reports = asyncio.run(examine(providers, config, args, environ, lambda report: None if args.json
                                  else tell("\n" + "\n".join(doctor_lines(report, paint)))))
    done = [check["status"] for report in reports for check in report["checks"]
            if check["status"] != "skip"]
    failed = done.count("fail")
    print(pretty(reports) if args.json else f"\n{failed} of {len(done)} checks failed")
    return 1 if failed else 0


# -- subcommands -------------------------------------------------------------

def list_presets(args: Any, environ: Mapping[str, str]) -> int:
    """Print the presets, a line for each protocol of theirs."""
    for preset in {preset.names: preset for preset in PRESETS.values()}.values():
        name, *others = preset.names.split()
        lead = name + "".join(f", {other}" for other in others)
        key = "no key" if preset.auth == "none" else preset.variable or "a key"
        print(f"{lead} ({key})" + (f": {preset.note}" if preset.note else ""))
        for protocol, url in preset_bases(preset, None).items():
            print(f"  {protocol:24}{url.rstrip('/')}")
    return 0


Argument = tuple[str, Json]  # its name, and what a parser does with it


class Command(NamedTuple):
    """A subcommand: what runs it and returns the exit status, and its command line. A ConfigError
    of its is told in a line, with exit status 1."""

    run: Callable[[Any, Mapping[str, str]], int]
    description: str
    arguments: Sequence[Argument | list[Argument]] = ()  # of those in a list one may be given
    epilog: str | None = None
    actions: Mapping[str, tuple[str, Sequence[Argument]]] = {}  # name -> help, arguments


def argument(name: str, metavar: str | None, help: str | None, **how: Any) -> Argument:
    """An argument of a subcommand."""
    return name, {"help": help, **({"metavar": metavar} if metavar else {}), **how}


def add_arguments(parser: Any, arguments: Iterable[Argument | list[Argument]]) -> None:
    """Have a parser, or a group of it, take arguments."""
    for each in arguments:
        if isinstance(each, list):
            add_arguments(parser.add_mutually_exclusive_group(), each)
        else:
            parser.add_argument(each[0], **each[1])


def subcommand_line(name: str) -> argparse.ArgumentParser:
    """The parser of a subcommand."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"proxai.py {name}", allow_abbrev=False,
                                     description=command.description, epilog=command.epilog)
    add_arguments(parser, command.arguments)
    if command.actions:
        actions = parser.add_subparsers(dest="action", required=True,
                                        metavar="|".join(command.actions))
        for action, (does, arguments) in command.actions.items():
            add_arguments(actions.add_parser(action, help=does, allow_abbrev=False), arguments)
    return parser


CONFIG = argument("--config", "PATH", "configuration file")
CAPTURE_PHASE = argument(
    "phase", "PHASE", f"{', '.join(CAPTURE_STEMS.values())}, or all (the default)", nargs="?",
    choices=[*CAPTURE_STEMS.values(), "all"], default="all")
OF_CREDENTIAL = (
    argument("provider", "PROVIDER", "name of a provider"),
    argument("--credential", "NAME", "one of its credentials, where it has several"), CONFIG)
OF_CONTROL = (
    argument("--config", "PATH", "configuration file of that proxy"),
    argument("--mcp-port", "N", "its control port", type=port_number),
    argument("--json", None, "as JSON", action="store_true"))
COMMANDS = {
    "translate": Command(
        translate, "Translate a request, an answer or a stream, and tell what is left out.", (
            *(argument(flag, "P", text, dest=flag[2:] + "_", type=str.lower, required=True,
                       choices=PROTOCOL_WORDS)
              for flag, text in (("--from", "protocol of FILE: " + ", ".join(PROTOCOLS)),
                                 ("--to", "protocol to translate to"))),
            [argument(f"--{name}", None, f"FILE is a {text}", dest="kind", action="store_const",
                      const=name, default="request")
             for name, text in (("request", "request (the default)"),
                                ("response", "provider's answer"),
                                ("stream", "provider's event stream"))],
            argument("--model", "NAME", "model name at the provider, which decides what it takes"),
            argument("--host", "HOST", "the provider's host, which does so too", default=""),
            argument("--asked", "FILE", "the client's request that FILE answers"),
            argument("file", "FILE", "a file, or - for standard input")),
        "A request goes from the client's protocol to the provider's, answers and streams come"
        " from the provider's to the client's."),
    "env": Command(
        env, "Print the settings that point a client at this proxy.", (
            argument("client", "CLIENT", ", ".join(CLIENTS), choices=CLIENTS),
            argument("--config", "PATH", "configuration file, for the address"),
            argument("--model", "NAME", "the model to ask for", default=""))),
    "captures": Command(
        captures, "Look at stored exchanges.", (
            argument("action", None, "list: newest first (the default); show: the phases of one;"
                     " diff: what the proxy changed; export: one JSON file of it all",
                     nargs="?", choices=["list", *CAPTURE_ACTIONS], default="list"),
            argument("id", "ID", "the exchange to show, diff or export", nargs="?"),
            argument("--limit", "N", "list: so many at most (20)", type=int, default=20),
            argument("--json", None, "list: as JSON, a line for each", action="store_true"),
            argument("--sanitize", None, "export: texts replaced by fillers of the same length,"
                     " few headers, no secrets", action="store_true"),
            argument("--output", "FILE", "export: a new file, readable for you only")),
        "An ID is that of the x-proxai-request-id header, its end (four characters at least), or"
        " the req= of the log."),
    "replay": Command(
        replay, "Send a stored request again, to a provider as the configuration is now, and show"
        " how the answer differs from the stored one.", (
            argument("id", "ID", "as `proxai.py captures` lists it"),
            argument("--provider", "NAME", "send it to this one, whatever the routes say"),
            CONFIG)),
    "explain": Command(
        explain_command, "Tell what would become of a request: route, provider, URL, headers, body."
        " Nothing is sent.", (
            argument("source", "FILE", "a request body, - for standard input (the default), or the"
                     " id of a capture", nargs="?", default="-"),
            argument("--path", None, "where the client would send it, like /v1/messages"),
            argument("--header", "'NAME: VALUE'", "a header of the client; may be repeated",
                     action="append", default=[]),
            CONFIG, argument("--json", None, "print the report as JSON", action="store_true"))),
    "capture": Command(
        capture, "Show or set which phases the configuration file captures. A proxy that runs by"
        " that file follows within a second.", actions={
            "status": ("show the switches", [CONFIG]),
            "enable": ("switch on", [CONFIG, CAPTURE_PHASE]),
            "disable": ("switch off", [CONFIG, CAPTURE_PHASE])}),
    "login": Command(login, "Get a provider's first OAuth token, and store it.", OF_CREDENTIAL),
    "logout": Command(logout, "Remove a provider's stored OAuth token. A proxy that runs keeps its"
                      " own until that ends.", OF_CREDENTIAL),
    "presets": Command(list_presets, "List what a provider's `preset` can be: protocols, base URLs,"
                       " the environment variable that usually holds the key."),
    "why": Command(
        ask_why, "Ask the proxy that runs who could serve a model, and what keeps them from it.",
        (*OF_CONTROL, argument("model", "MODEL", "the model, as a client asks for it"))),
    "credentials": Command(
        credentials, "List the credentials of the proxy that runs, or let one be used again that"
        " rests.", (
            *OF_CONTROL,
            argument("action", None, None, nargs="?", choices=["list", "reset"], default="list"),
            argument("name", "NAME", "reset: a credential, provider/credential, or all",
                     nargs="?"))),
    "doctor": Command(
        doctor, "Try each provider with each of its keys, from the name of its host to a streamed"
        " answer, and say in plain words what is wrong.", (
            argument("providers", "PROVIDER", "names of providers; all without", nargs="*"), CONFIG,
            argument("--model", "NAME", "the model to ask, as the provider names it", default=""),
            argument("--protocol", "P", "the one to try where a provider speaks several; without,"
                     " its first", type=str.lower, choices=PROTOCOL_WORDS),
            argument("--timeout", "SECS", f"limit for each check ({DOCTOR_SECS:g})", type=seconds,
                     default=DOCTOR_SECS),
            argument("--json", None, "print the reports as JSON", action="store_true")),
        DOCTOR_NOTE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(argv[0]) if argv else None
    parser = subcommand_line(argv[0]) if command else command_line()
    args = parser.parse_args(argv[1:] if command else argv)
    if not command and args.demo and (args.config or args.command):
        parser.error("--demo has its own configuration and goes with neither --config nor check")
    open_outputs()
    try:
        return command.run(args, os.environ) if command else run(args, os.environ)
    except ConfigError as error:
        for fault in error.faults:
            print(f"Error: {fault}", file=sys.stderr)
        if error.hint:
            print(f"Hint: {error.hint}.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads on, like `head`
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        flush_output()


def open_outputs() -> None:
    """Make standard output and error such that writing to them can neither crash nor be missing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed
            # for as long as we run
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(args: Any, environ: Mapping[str, str]) -> int:
    """Do what the flags say."""
    if args.demo:
        log, writer = start_log(load_demo(args, 1, environ).logging, sys.stdout, environ)
        return run_logged(run_demo(args, log, environ), writer)
    notes = []
    if args.config is not None:
        path = Path(args.config)
    elif args.command == "check":
        path = app_directory(environ) / "config.toml"
    else:
        directory, created = bootstrap(environ)
        path = directory / "config.toml"
        if created:
            notes.append(f"{path} was just created; put your keys there")
    file = ConfigFile(path, lambda: load_config(
        read_file(path), str(path), environ=environ,
        overrides=lambda tables: flag_overrides(args, tables)), file_state(path))
    config = file.load()
    if args.command == "check":
        print(check_report(config, str(path), environ))
        return 0
    sockets = bind(config)
    told = banner(config, [ports(one) for one in sockets], str(path),
                  [*notes, *start_notes(config)], environ)

    def work(index: int) -> int:
        async def started() -> None:
            if index == 0:
                tell(told)

        own = file._replace(load=lambda: of_worker(file.load(), index))
        now = of_worker(config, index)
        if len(sockets) > 1:  # one that is started anew begins with today's file
            with contextlib.suppress(ConfigError):
                now = own.load()
        log, writer = start_log(now.logging, sys.stdout, environ)
        return run_logged(serve(now, log, environ, sockets[index], started, own), writer)

    return work(0) if len(sockets) == 1 else run_workers(sockets, work)


def flush_output() -> None:
    """Hand on what was printed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # nobody reads it; the interpreter's own flush must not fail
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_logged(work: Any, writer: LineWriter) -> int:
    """Run `work` in an event loop, and print the log's last lines; the exit status, `work`'s own
    where it returns one."""
    try:
        return asyncio.run(work) or 0
    finally:
        writer.close()
        flush_output()
        # nobody reads our output; waiting for that would hang the exit
        if writer.thread.is_alive():
            os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
