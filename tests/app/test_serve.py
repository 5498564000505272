"""`strop serve`, asked by the official client over a socket: GGUF files and folders answer alike, as `chat` does."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.runtime.files import tiny_gguf
from tests.tiny import END, tiny_tokenizer
from typer.testing import CliRunner

from strop.app.cli import app as command_line
from strop.errors import MissingInputError, UsageError
from strop.evaluation.engines import open_engine
from strop.recipes.generate import answer
from strop.recipes.serve import MOST_WAITING, BusyError, Service, Wish, check_address

openai = pytest.importorskip("openai", reason="the official client is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
server = pytest.importorskip("strop.app.server", reason="fastapi is not installed")

ASKED = [{"role": "user", "content": "say red 0"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    tiny_gguf(folder)
    return folder


@contextmanager
def serving(service: Service, *, token: str | None = None) -> Iterator[int]:
    """The endpoint in a thread; gives its port."""
    listening = server.bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = server.build_app(service, token=token, loopback=True)
    config = server.uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    running = server._Server(config, service)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        running.handle_exit(signal.SIGINT, None)
        thread.join()
        listening.close()


@pytest.fixture(scope="module", params=["gguf", "folder"])
def service(request: pytest.FixtureRequest, place: Path) -> Service:
    path = place / ("tiny-f32.gguf" if request.param == "gguf" else "llama")
    return Service(open_engine(path), "tiny")


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    with serving(service) as port:
        yield port


def asking(port: int, *, token: str = "none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0)


@pytest.fixture(scope="module")
def client(port: int):
    with asking(port) as one:
        yield one


def test_the_model_is_listed_by_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "strop"
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.models.retrieve("gpt-4")


def test_an_answer_is_that_of_chat(client, service: Service):
    found = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=12)
    assert found.choices[0].message.content == answer(service.engine, "say red 0", max_new_tokens=12)
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    asked = len(service.chat_prompt([turn.message() for turn in map(_turn, ASKED)]))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (asked, 12)
    assert found.usage.total_tokens == asked + 12
    whole = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    turns = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    found = client.chat.completions.create(model="tiny", messages=whole, max_completion_tokens=9)
    assert found.choices[0].message.content == answer(service.engine, turns, max_new_tokens=9)


def _turn(given: dict):
    from strop.app.openai import Turn

    return Turn(**given)


def test_a_stream_holds_the_same_answer_piece_by_piece(client):
    whole = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASKED, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_text_goes_on_with_its_spaces(client, service: Service):
    prompt = "the quick brown"
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=8)
    ids = service.text_prompt(prompt)
    new = list(service.engine.stream(ids, stop_ids=[], max_new_tokens=8))
    assert prompt + found.choices[0].text == tiny_tokenizer().decode([*ids, *new], skip_special_tokens=True)
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=8).choices == found.choices
    assert client.completions.create(model="tiny", prompt=[prompt], max_tokens=8).choices == found.choices
    streamed = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text
    assert client.completions.create(model="tiny", prompt=prompt).usage.completion_tokens == 16


def test_drawn_answers_follow_their_seed(client):
    def drawn(**options) -> str:
        return client.completions.create(model="tiny", prompt="the", temperature=1.5, max_tokens=12, **options)

    assert drawn(seed=3).choices == drawn(seed=3).choices
    assert len({drawn(seed=seed).choices[0].text for seed in range(4)}) == 4
    assert len({drawn().choices[0].text for _ in range(3)}) == 3  # without one, each is another
    greedy = client.completions.create(model="tiny", prompt="the", max_tokens=12)
    assert drawn(seed=3, top_p=1e-6).choices == greedy.choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_nothing_of_it_is_told(client, stream: bool):
    free = client.completions.create(model="tiny", prompt="the", max_tokens=40).choices[0].text
    stop = free[7:11]
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 40, "stop": ["\u2603", stop]}
    if stream:
        chunks = list(client.completions.create(stream=True, **asked))
        text, finish = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        found = client.completions.create(**asked)
        text, finish = found.choices[0].text, found.choices[0].finish_reason
    assert (text, finish) == (free[: free.index(stop)], "stop")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 2}, "n=2 is not done here"),
        ({"logprobs": True}, "logprobs=true is not done here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools="),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"messages\.0\.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a"}]}, "nothing to answer"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_its_field(client, options: dict, words: str):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": ASKED, **options})
    assert refused.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(client):
    options = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "tools": [], "logit_bias": {}}
    assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, **options).usage


def test_a_prompt_that_fills_the_context_is_refused_by_its_code(client):
    with pytest.raises(openai.BadRequestError, match="context 256") as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "no way " * 200}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token 9999"):
        client.completions.create(model="tiny", prompt=[9999])


def test_a_control_token_in_a_message_is_text(client, service: Service):
    said = f"hi{END}"
    found = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": said}], max_tokens=4)
    plain = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens + 3  # not one token that ends the turn


def raw(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_what_is_no_request_gets_an_error_of_openais_shape(port: int):
    kinds = {"content_type": "application/json"}
    for found in (
        raw(port, "GET", "/v2/nothing"),
        raw(port, "GET", "/v1/completions"),
        raw(port, "POST", "/v1/completions", b"{broken", **kinds),
        raw(port, "POST", "/v1/completions", b"[1]", **kinds),
        raw(port, "POST", "/v1/completions", b'{"prompt": "a"}', content_type="text/plain"),
        raw(port, "POST", "/v1/completions", b" " * (server.MOST_BYTES + 1), **kinds),
    ):
        assert found[0] in (400, 404, 405, 413)
        assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    assert raw(port, "GET", "/health") == (200, {"status": "ok"})


def test_what_is_no_request_is_told_what_one_would_be(port: int):
    def said(*request: object, **headers: str) -> str:
        return raw(port, *request, **headers)[1]["error"]["message"]

    assert "POST /v1/chat/completions" in said("GET", "/")
    assert "the body is no JSON" in said("POST", "/v1/completions", b'{"prompt": ', content_type="application/json")
    assert "at character 11" in said("POST", "/v1/completions", b'{"prompt": ', content_type="application/json")
    form = {"content_type": "application/x-www-form-urlencoded"}  # as curl sends it where nothing else is said
    assert "content-type: application/json" in said("POST", "/v1/completions", b'{"prompt": "a"}', **form)


def test_without_a_token_only_this_machines_own_names_are_answered(port: int):
    assert raw(port, "GET", "/v1/models", host="evil.example")[0] == 403
    assert raw(port, "GET", "/v1/models", host="127.0.0.1.evil.example")[0] == 403
    for own in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert raw(port, "GET", "/v1/models", host=own)[0] == 200


def test_a_token_is_asked_for_on_every_path(place: Path):
    service = Service(open_engine(place / "tiny-f32.gguf"), "tiny")
    with serving(service, token="s3cret-token") as port:
        for key, works in (("s3cret-token", True), ("s3cret", False), ("", False)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for path in ("/v1/models", "/health"):
                status, content = raw(port, "GET", path, **headers)
                assert status == (200 if works else 401)
                assert works or content["error"]["code"] == "invalid_api_key"
        with asking(port, token="s3cret-token") as client:
            assert client.completions.create(model="tiny", prompt="the", max_tokens=2).usage
        with asking(port) as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model="tiny", prompt="the")


def test_an_answer_ends_when_its_client_leaves_and_the_next_has_its_turn(client, service: Service):
    stream = client.completions.create(model="tiny", prompt="the", max_tokens=250, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny", prompt="the", max_tokens=2).usage.completion_tokens == 2
    assert service._waiting == 0


def test_more_than_can_wait_are_told_to_come_again(place: Path):
    service = Service(open_engine(place / "tiny-f32.gguf"), "tiny")
    waiting = [service.parts([5], Wish(max_tokens=1)) for _ in range(MOST_WAITING)]
    with pytest.raises(BusyError, match="come again"):
        service.parts([5], Wish(max_tokens=1))
    for one in waiting[1:]:
        assert list(one)[-1].finish == "length"
    del one, waiting  # the first was never asked for: its client left before
    assert service._waiting == 0
    assert list(service.parts([5], Wish(max_tokens=1)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_a_public_address_without_a_token_is_refused(host: str):
    for token in (None, ""):
        with pytest.raises(UsageError, match="STROP_API_KEY"):
            check_address(host, token)
    assert check_address(host, "token") is False


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_this_machines_own_addresses_need_none(host: str):
    assert check_address(host, None) is True


def refused(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(command_line, ["serve", *map(str, arguments)], env=env)
    assert isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_what_cannot_be_served_is_said_before_anything_listens(place: Path, tmp_path: Path):
    code, text = refused(place / "llama", "--host", "0.0.0.0", env={"STROP_API_KEY": ""})
    assert (code, "STROP_API_KEY" in text) == (2, True)
    (tmp_path / "broken.gguf").write_bytes((place / "tiny-f32.gguf").read_bytes()[:-64])
    code, text = refused(tmp_path / "broken.gguf", "--port", 0)
    assert (code, "truncated" in text) == (1, True)
    code, text = refused(tmp_path / "nothing.gguf", "--port", 0)
    assert (code, "no such file" in text) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = refused(place / "llama", "--port", taken.getsockname()[1])
        assert (code, "name another --port" in text) == (2, True)


def test_without_the_extra_it_is_named(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "strop.app.server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, text = refused(place / "llama", "--port", 0)
    assert (code, "strop[serve]" in text) == (2, True)
    assert MissingInputError.exit_code == 2


def test_a_model_without_a_template_completes_and_says_why_it_does_not_chat(place: Path):
    path = tiny_gguf(place, "f16", template="")
    with serving(Service(open_engine(path), "plain")) as port, asking(port) as client:
        assert client.completions.create(model="plain", prompt="the", max_tokens=2).usage
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="plain", messages=ASKED)
    with serving(Service(open_engine(path), "plain", chat_template="chatml")) as port, asking(port) as client:
        assert client.chat.completions.create(model="plain", messages=ASKED, max_tokens=2).usage


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_server_in_the_middle_of_an_answer(place: Path, number: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", "from strop.app.cli import main; main()", "serve", place / "tiny-f32.gguf", "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "serving tiny-f32.gguf (gguf:f32) at http://127.0.0.1:" in line, line
    url = line.split(" at ")[1].split(";")[0]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny-f32.gguf", prompt="the", max_tokens=250, stream=True)
        next(iter(stream))
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in rest
    if number == signal.SIGINT:
        assert process.returncode == 0
        assert rest.strip() == "stopped"
    else:
        assert process.returncode == -signal.SIGTERM
