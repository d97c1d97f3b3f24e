"""Who may speak to the server and how much, tried with requests that no well-behaved client sends."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from apps.server.leaving import Streamed
from apps.server.settings import Limits, ServerSettings
from runtime.errors import EdgeOmniError
from tests.serving import NAME, Running, running

HELLO = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "hello"}]}).encode()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def up():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def locked():
    with running(ServerSettings(NAME, port=0, token="a long secret")) as server:
        yield server


def ask(
    up: Running, path: str = CHAT, body: bytes | None = HELLO, host: str | None = None, **headers: str
) -> tuple[int, dict]:
    """Status and JSON of one request, its headers as they are given here."""
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=60)
    connection.putrequest("POST" if body is not None else "GET", path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{up.port}")
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8080", "LOCALHOST", "[::1]:80", "192.168.1.20:8080"])
def test_a_host_that_no_foreign_page_can_take_is_served(up: Running, host: str):
    assert ask(up, "/v1/models", None, host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.io", "x:y"]
)
def test_a_name_that_was_made_to_point_here_is_refused(up: Running, host: str):
    status, body = ask(up, "/v1/models", None, host)
    assert status == 403 and body["error"]["type"] == "permission_error" and "Host" in body["error"]["message"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_a_request_from_another_sites_page_is_refused(up: Running, origin: str):
    status, body = ask(up, Origin=origin)
    assert status == 403 and "Origin" in body["error"]["message"]


def test_a_page_of_this_server_is_served(up: Running):
    assert ask(up, Origin=f"http://127.0.0.1:{up.port}")[0] == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "Basic a long secret", "Bearer a long secre\u00df"]
)
def test_without_the_token_nothing_is_served_but_the_state_of_health(locked: Running, given: str | None):
    headers = {} if given is None else {"Authorization": given}
    for path, body in ((CHAT, HELLO), ("/v1/models", None), ("/nothing", None)):
        status, answer = ask(locked, path, body, **headers)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert ask(locked, "/healthz", None, **headers) == (200, {"status": "ok", "active": 0, "places": 8})


def test_with_the_token_the_sdk_is_served(locked: Running):
    assert locked.client("a long secret").models.list().data[0].id == NAME
    with pytest.raises(openai.AuthenticationError):
        locked.client("wrong").models.list()


def test_a_header_that_two_readers_may_read_differently_is_refused(up: Running):
    with socket.create_connection(("127.0.0.1", up.port), timeout=30) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nOrigin: null\r\n\r\n")
        assert b" 400 " in raw.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.20", "::", "example.org"])
def test_it_does_not_open_itself_to_a_network_without_a_token(host: str):
    with pytest.raises(EdgeOmniError, match="add --token"):
        ServerSettings(NAME, host)
    assert ServerSettings(NAME, host, token="secret").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_this_machine_alone_no_token_is_needed(host: str):
    assert ServerSettings(NAME, host).token is None


def test_the_token_is_not_shown_where_the_settings_are():
    assert "secret" not in repr(ServerSettings(NAME, token="secret"))


def test_a_body_that_is_too_long_is_refused_whether_it_says_so_or_not():
    with running(ServerSettings(NAME, port=0, limits=Limits(body=1000))) as up:
        status, body = ask(up, body=HELLO + b" " * 1000)
        assert status == 413 and "1000 bytes" in body["error"]["message"]
        connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=30)
        connection.request("POST", CHAT, iter([HELLO, b" " * 1000]), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
        assert ask(up, body=HELLO)[0] == 200


def beginning(up: Running) -> socket.socket:
    """A connection on which a request has begun whose body does not come."""
    raw = socket.create_connection(("127.0.0.1", up.port), timeout=30)
    raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    return raw


def test_a_body_that_does_not_come_is_not_waited_for():
    with running(ServerSettings(NAME, port=0, limits=Limits(body_seconds=0.2))) as up, beginning(up) as raw:
        assert b" 408 " in raw.recv(4096).split(b"\r\n")[0]


def test_no_more_requests_are_open_than_allowed():
    with running(ServerSettings(NAME, port=0, limits=Limits(open_requests=1))) as up, beginning(up):
        until = time.monotonic() + 10
        while (status := ask(up, "/v1/models", None)[0]) == 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert status == 429


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON"),
        (b"hello", "no JSON"),
        (b"\xff\xfe{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "no JSON"),
        (b"[]", "valid dictionary"),
        (b"null", "valid dictionary"),
        (b'{"model": "nano"}', "messages: Field required"),
        (b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "nano", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature"),
        (b'{"model": "nano", "messages": [{"role": "wizard", "content": "a"}]}', "messages[0]"),
    ],
)
def test_a_body_that_is_no_request_is_refused_in_the_apis_own_shape(up: Running, body: bytes, words: str):
    status, answer = ask(up, body=body)
    assert status == 400 and words in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_what_is_not_there_and_what_cannot_be_done_say_so_in_the_apis_own_shape(up: Running):
    assert ask(up, "/v1/nothing", None)[1]["error"]["code"] == "not_found"
    status, answer = ask(up, CHAT, None)
    assert status == 405 and answer["error"]["code"] == "method_not_allowed"
    assert ask(up, "/v1/models/%2e%2e%2fetc%2fpasswd", None)[0] == 404


def test_a_reader_that_takes_nothing_is_dropped():
    closed: list[bool] = []

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    async def never(*_: object) -> Any:
        await asyncio.sleep(60)

    stream = Streamed(pieces(), "text/event-stream", lambda: closed.append(True), stall=0.05)
    start = time.monotonic()
    asyncio.run(stream({"type": "http"}, never, never))
    assert closed == [True] and time.monotonic() - start < 30


def edgeomni(*arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "apps", "serve", "--port", "0", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_it_serves_serves_and_stops_when_told(how: signal.Signals):
    started = edgeomni(EDGEOMNI_TOKEN="from the environment")
    try:
        assert started.stderr is not None
        lines = iter(started.stderr.readline, "")
        address = next(line for line in lines if "is served at" in line).split()[-1]
        client = openai.OpenAI(base_url=address, api_key="from the environment", max_retries=0)
        answer = client.chat.completions.create(
            model="edgeomni-nano", messages=[{"role": "user", "content": "what is two plus three"}]
        )
        assert answer.choices[0].message.content == " two plus three is five"
        started.send_signal(how)
        assert started.wait(20) in (130, -how)
        rest = started.stderr.read()
        assert "POST /v1/chat/completions 200" in rest and "Traceback" not in rest
    finally:
        started.kill()
        started.wait()


def test_a_port_that_is_taken_and_a_network_without_a_token_are_one_message_each():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, words in (
            (["--port", str(taken.getsockname()[1])], "cannot be listened on"),
            (["--host", "0.0.0.0"], "add --token"),
        ):
            done = edgeomni(*arguments)
            _, said = done.communicate(timeout=120)
            assert done.returncode == 2 and words in said and "Traceback" not in said
