"""Malformed inputs: the bytes of a file, and what has to be said about it.

Each case is written to a file of the given name and goes through what `tune` does with it before the model is touched:
`read_data`, then `prepare` with `max_length` 64. A refusal gives its exception and the parts that its message must
hold, in any order; what is accepted all the same gives the samples that come of it and what the account says.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any

from strop.errors import DataError, MissingInputError

QA = {"question": "q", "answer": "a"}
GOOD = b'{"question": "q", "answer": "a"}\n'


@dataclass(frozen=True)
class Refused:
    """What must be said: parts of the message beside the file's name."""

    parts: tuple[str, ...]
    error: type[Exception] = DataError


@dataclass(frozen=True)
class Accepted:
    """What comes of it: samples, and parts of the account."""

    samples: int
    parts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    content: bytes
    expected: Refused | Accepted


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def chat(*turns: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def share(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": content} for role, content in turns]}


USER, SAID = ("user", "q"), ("assistant", "a")

CASES: list[Case] = []


def refused(name: str, file: str, content: bytes, *parts: str, error: type[Exception] = DataError) -> None:
    CASES.append(Case(name, file, content, Refused(parts, error)))


def accepted(name: str, file: str, content: bytes, samples: int, *parts: str, words: tuple[str, ...] = ()) -> None:
    CASES.append(Case(name, file, content, Accepted(samples, parts, words)))


# --- encodings --------------------------------------------------------------------------------------------------------

accepted("utf-8 with a mark, jsonl", "a.jsonl", b"\xef\xbb\xbf" + GOOD, 1)
accepted("utf-8 with a mark, json", "a.json", b"\xef\xbb\xbf" + json.dumps([QA]).encode(), 1)
accepted("utf-8 with a mark, csv", "a.csv", b"\xef\xbb\xbfquestion,answer\nq,a\n", 1)
accepted("utf-8 with a mark, text", "a.txt", b"\xef\xbb\xbfwords and words\n", 1, words=("words and words\n",))
accepted("carriage returns, jsonl", "a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, 2)
accepted("carriage returns, csv", "a.csv", b"question,answer\r\nq,a\r\nq,b\r\n", 2)
accepted("no line end at the end", "a.jsonl", GOOD.strip(), 1)
accepted("blank lines between", "a.jsonl", b"\n\n" + GOOD + b"  \n\t\n" + GOOD, 2)
for order in ("utf-16", "utf-16-be", "utf-32"):
    mark = b"\xfe\xff" if order == "utf-16-be" else b""
    for suffix in ("jsonl", "json", "csv", "txt"):
        body = "question,answer\nq,a\n" if suffix == "csv" else GOOD.decode()
        refused(f"{order}, {suffix}", f"a.{suffix}", mark + body.encode(order), "UTF-16 or UTF-32", "iconv", "UTF-8")
refused("utf-16 without a mark", "a.jsonl", GOOD.decode().encode("utf-16-le"), "UTF-16LE", "iconv")
refused("utf-16 big-endian without a mark", "a.csv", "question,answer\n".encode("utf-16-be"), "UTF-16BE", "iconv")
refused("latin-1, jsonl", "a.jsonl", GOOD + '{"text": "größe"}'.encode("latin-1"), "line 2", "byte 0xf6", "LATIN1")
refused("latin-1, csv", "a.csv", "text,label\ncafé,a\n".encode("latin-1"), "line 2", "byte 0xe9", "LATIN1")
refused("latin-1, text", "a.txt", "one\ntwo\ncafé".encode("latin-1"), "line 3", "byte 0xe9", "LATIN1")
refused("a character cut in two", "a.txt", "Zürich".encode()[:2], "line 1", "not UTF-8")
refused("an overlong encoding", "a.jsonl", b'{"text": "\xc0\xaf"}', "line 1", "byte 0xc0", "not UTF-8")
refused("an encoded surrogate", "a.jsonl", b'{"text": "\xed\xa0\x80"}', "line 1", "byte 0xed", "not UTF-8")
refused(
    "half of a surrogate pair",
    "a.jsonl",
    GOOD + rb'{"text": "a\ud83d"}',
    "line 2",
    "'text'",
    "surrogate pair",
    "character 1",
)
refused(
    "the other half",
    "a.jsonl",
    jsonl(chat(("user", "\udc00"), SAID)),
    "line 1",
    "messages[0].content",
    "surrogate pair",
)
accepted("a whole surrogate pair", "a.jsonl", rb'{"text": "say \ud83d\ude00"}', 1, words=("say \U0001f600",))
refused("a NUL byte", "a.jsonl", GOOD + b'{"text": "a\0b"}', "line 2", "NUL byte", "column 12")
refused("a NUL byte, csv", "a.csv", b"text,label\nq\0,a\n", "line 2", "NUL byte", "column 2")
refused("an escaped NUL", "a.jsonl", rb'{"text": "a\u0000b"}', "line 1", "'text'", "NUL", "character 1")
refused(
    "a pickle by the name of jsonl", "a.jsonl", b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.", "line 1"
)
refused("a picture by the name of text", "a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 1", "not UTF-8")

# --- files ------------------------------------------------------------------------------------------------------------

for suffix in ("jsonl", "json", "csv", "txt", "jsonl.gz"):
    nothing = gzip.compress(b"") if suffix.endswith("gz") else b""
    refused(f"empty, {suffix}", f"a.{suffix}", nothing, "the file is empty", "at least one row")
    blank = gzip.compress(b" \n\n") if suffix.endswith("gz") else b" \n\t\r\n"
    refused(f"only blanks, {suffix}", f"a.{suffix}", blank, "the file is empty", "at least one row")
refused("only a byte order mark", "a.jsonl", b"\xef\xbb\xbf", "the file is empty")
refused("an empty list", "a.json", b"[]", "there is no row")
refused("only a header", "a.csv", b"question,answer\n", "there is no row")
refused("no extension", "data", GOOD, "extension (none)", ".jsonl", error=MissingInputError)
refused("a spreadsheet", "a.xlsx", b"PK\3\4", "extension .xlsx", ".csv", error=MissingInputError)
refused("a pickle", "a.pkl", b"\x80\x04.", "extension .pkl", error=MissingInputError)
refused("a torch file", "a.pt", b"PK\3\4", "extension .pt", error=MissingInputError)
refused("another packing", "a.jsonl.zst", b"\x28\xb5\x2f\xfd", "extension .zst", ".jsonl.gz", error=MissingInputError)
refused("packed parquet", "a.parquet.gz", gzip.compress(b"PAR1"), "extension .parquet.gz", error=MissingInputError)
accepted("packed jsonl", "a.jsonl.gz", gzip.compress(GOOD * 3), 3)
accepted("packed json", "a.json.gz", gzip.compress(json.dumps([QA]).encode()), 1)
accepted("packed csv", "a.csv.gz", gzip.compress(b"question,answer\nq,a\n"), 1)
accepted("two packed parts joined", "a.jsonl.gz", gzip.compress(GOOD) + gzip.compress(GOOD), 2)
refused("cut gzip", "a.jsonl.gz", gzip.compress(GOOD * 500)[:-12], "damaged or cut off", "gzip -t a.jsonl.gz")
refused("cut gzip, json", "a.json.gz", gzip.compress(json.dumps([QA] * 500).encode())[:-12], "damaged or cut off")
refused("gzip with a wrong sum", "a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged or cut off", "CRC")
refused("not gzip at all", "a.jsonl.gz", GOOD, "damaged or cut off", "line 0")
refused("cut parquet", "a.parquet", b"PAR1" + b"\0" * 100, "not a readable parquet file", "fetch it again")
refused("empty parquet", "a.parquet", b"", "not a readable parquet file")
refused("text by the name of parquet", "a.parquet", GOOD, "not a readable parquet file")

# --- JSON -------------------------------------------------------------------------------------------------------------

for name, text in (("NaN", "NaN"), ("Infinity", "Infinity"), ("minus Infinity", "-Infinity")):
    refused(
        f"{name}, jsonl",
        "a.jsonl",
        GOOD + b'{"text": "a", "score": %s}' % text.encode(),
        "line 2",
        text,
        "not a JSON value",
        "null",
    )
    refused(f"{name}, json", "a.json", b'[{"text": "a", "score": %s}]' % text.encode(), text, "not a JSON value")
refused(
    "a key twice",
    "a.jsonl",
    GOOD + b'{"answer": "a", "question": "q", "answer": "b"}',
    "line 2",
    "'answer'",
    "more than once",
    "own name",
)
refused(
    "a key twice in a turn",
    "a.jsonl",
    b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
    "line 1",
    "'role'",
    "more than once",
)
refused("a key twice, json", "a.json", b'[{"text": "a", "text": "b"}]', "'text'", "more than once")
refused(
    "a key twice in a cell",
    "a.csv",
    b'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n',
    "line 2",
    "'messages'",
    "more than once",
)
refused(
    "cut json line", "a.jsonl", GOOD + b'{"text": "a', "line 2", "not valid JSON", "Unterminated string", "column 10"
)
refused("cut json list", "a.json", b'[{"text": "a"},\n{"text": ', "line 2", "not valid JSON", "list of objects")
refused("a comma too many", "a.jsonl", b'{"text": "a",}', "line 1", "not valid JSON", "one JSON object")
refused("a comma too many, json", "a.json", b'[{"text": "a"},]', "line 1", "not valid JSON")
refused("single quotes", "a.jsonl", b"{'text': 'a'}", "line 1", "not valid JSON", "double quotes")
refused(
    "objects on one line",
    "a.jsonl",
    b'{"text": "a"}{"text": "b"}',
    "line 1",
    "Extra data at column 14",
    "another value begins",
)
refused("objects on one line, with a comma", "a.jsonl", b'{"text": "a"}, {"text": "b"}', "line 1", "Extra data")
refused(
    "an object over several lines", "a.jsonl", b'{\n"text": "a"\n}', "line 1", "line 2", "line 3", "one JSON object"
)
refused("a list by the name of jsonl", "a.jsonl", b'[{"text": "a"}]', "line 1", "got a list", "one JSON object")
refused("a raw line end in a string", "a.jsonl", b'{"text": "a\nb"}', "line 1", "not valid JSON", "line 2")
refused("a raw tab in a string", "a.jsonl", b'{"text": "a\tb"}', "line 1", "not valid JSON", "control character")
refused("a wrong escape", "a.jsonl", rb'{"text": "a\x41"}', "line 1", "not valid JSON", "escape")
refused("comments", "a.json", b'// rows\n[{"text": "a"}]', "line 1", "not valid JSON")
refused("Python's words", "a.jsonl", b'{"text": None}', "line 1", "not valid JSON")
refused("deep nesting", "a.json", b"[" * 100_000, "nested too deeply")
refused("deep nesting in a line", "a.jsonl", GOOD + b'{"a":' * 50_000, "line 2", "nested too deeply")
refused(
    "a number without end",
    "a.jsonl",
    b'{"text": "a", "n": ' + b"9" * 5_000 + b"}",
    "line 1",
    "not valid JSON",
    "digits",
)
refused("a text", "a.jsonl", b'"text"', "line 1", "got a text")
refused("null", "a.jsonl", b"null", "line 1", "got null")
refused("a number", "a.json", b"3", "got a number", "list of objects")
refused("a list of texts", "a.json", b'["a"]', "record 1", "got a text", "object")
accepted("one object a line by the name of json", "a.json", GOOD * 2, 2)

# --- tables -----------------------------------------------------------------------------------------------------------

refused(
    "a row with more cells",
    "a.csv",
    b"text,label\na,b\na,b,c\n",
    "line 3",
    "3 cells under a header of 2",
    "double quotes",
)
refused("a row with fewer cells", "a.csv", b"question,answer\na,b\nc\n", "line 3", "'answer' is missing")
refused("a column twice", "a.csv", b"text,label,text\na,b,c\n", "line 1", "'text' more than once")
refused(
    "the header again", "a.csv", b"question,answer\na,b\nquestion,answer\nc,d\n", "line 3", "header stands here again"
)
refused("an open quote", "a.csv", b'question,answer\nq,"a\n', "line 2", "not valid csv", "closed")
refused("words behind a quote", "a.csv", b'question,answer\n"q"x,a\n', "line 2", "not valid csv")
refused("no header", "a.csv", b"how are you,fine\nand you,too\n", "how are you", "not a known kind of row")
refused(
    "a misspelt column", "a.csv", b"qestion,answer\nq,a\n", "line 2", "'question' is missing beside 'answer'", "qestion"
)
refused("an empty cell", "a.csv", b"question,answer\nq,\n", "line 2", "'answer' is empty")
refused("empty column names", "a.csv", b",\nq,a\n", "line 1", "header names '' more than once")
accepted("quotes, commas and lines in cells", "a.csv", b'question,answer\n"a, ""b""\nc","d"\n', 1, words=('a, "b"\nc',))

# --- turns ------------------------------------------------------------------------------------------------------------

refused(
    "messages as an object", "a.jsonl", jsonl({"messages": {}}), "line 1", "'messages' is an object", "list of turns"
)
refused("messages as text", "a.jsonl", jsonl({"messages": "hi"}), "line 1", "'messages' is a text")
refused("messages of null", "a.jsonl", jsonl({"messages": None}), "line 1", "'messages' is null")
refused("no messages", "a.jsonl", jsonl({"messages": []}), "line 1", "'messages' is empty", "at least one turn")
refused("a text for a turn", "a.jsonl", jsonl({"messages": ["hi"]}), "messages[0] is a text", "role and content")
refused("null for a turn", "a.jsonl", jsonl({"messages": [None]}), "messages[0] is null")
refused("no role", "a.jsonl", jsonl({"messages": [{"content": "x"}]}), "messages[0] has no role", "content")
refused(
    "an unknown role",
    "a.jsonl",
    jsonl(QA, chat(("usr", "q"), SAID)),
    "line 2",
    "messages[0].role is 'usr'",
    "did you mean 'user'",
)
refused(
    "an unknown speaker",
    "a.jsonl",
    jsonl(share(("humann", "q"), ("gpt", "a"))),
    "conversations[0].from is 'humann'",
    "did you mean 'human'",
)
refused("a number for a role", "a.jsonl", jsonl(chat((3, "q"), SAID)), "messages[0].role is 3")
refused("no content", "a.jsonl", jsonl({"messages": [{"role": "user"}]}), "messages[0].content is missing")
refused(
    "content of null",
    "a.jsonl",
    jsonl(chat(USER, ("assistant", None))),
    "messages[1].content is null",
    "must be a text",
)
refused("a number for content", "a.jsonl", jsonl(chat(("user", 3), SAID)), "messages[0].content is a number")
refused("true for content", "a.jsonl", jsonl(chat(("user", True), SAID)), "messages[0].content is true or false")
refused("an object for content", "a.jsonl", jsonl(chat(("user", {}), SAID)), "messages[0].content is an object")
refused("an empty list for content", "a.jsonl", jsonl(chat(("user", []), SAID)), "messages[0].content is a list")
refused(
    "an empty answer", "a.jsonl", jsonl(QA, chat(USER, ("assistant", ""))), "line 2", "messages[1].content is empty"
)
refused("a blank answer", "a.jsonl", jsonl(chat(USER, ("assistant", " \n"))), "messages[1].content is empty")
refused("an empty question", "a.jsonl", jsonl(chat(("user", ""), SAID)), "messages[0].content is empty")
refused(
    "a picture",
    "a.jsonl",
    jsonl(chat(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), SAID)),
    "messages[0].content[0]",
    "'image_url'",
    "only text parts",
)
refused(
    "a sound",
    "a.jsonl",
    jsonl(chat(("user", [{"type": "audio"}, {"type": "text", "text": "q"}]), SAID)),
    "content[0]",
    "'audio'",
)
refused("a part without text", "a.jsonl", jsonl(chat(("user", [{"type": "text"}]), SAID)), "content[0] has no text")
accepted(
    "parts of text",
    "a.jsonl",
    jsonl(chat(("user", [{"type": "text", "text": "one "}, "two"]), SAID)),
    1,
    words=("one two",),
)
refused("only a question", "a.jsonl", jsonl(chat(USER)), "no token is left to learn from", "no assistant turn")
refused("only a system turn", "a.jsonl", jsonl(chat(("system", "s"))), "no token is left to learn from")
refused(
    "a tool's answer first",
    "a.jsonl",
    jsonl(chat(("tool", "4"), SAID)),
    "line 1",
    "begins with a tool's answer",
    "call before it",
)
refused(
    "tool calls as text",
    "a.jsonl",
    jsonl({"messages": [{"role": "assistant", "tool_calls": "f()"}]}),
    "messages[0].tool_calls is a text",
)
refused(
    "a call without a name",
    "a.jsonl",
    jsonl({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}),
    "tool_calls[0] has no function name",
)
refused(
    "a weight of a half",
    "a.jsonl",
    jsonl({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}),
    "messages[1].weight is 0.5",
    "only 0",
    "and 1",
)
refused(
    "a weight of two",
    "a.jsonl",
    jsonl({"messages": [{"role": "assistant", "content": "a", "loss_weight": 2}]}),
    "loss_weight is 2",
)
refused(
    "a weight as text",
    "a.jsonl",
    jsonl({"messages": [{"role": "assistant", "content": "a", "weight": "1"}]}),
    "weight is '1'",
)
refused(
    "no answer that is learned",
    "a.jsonl",
    jsonl({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}),
    "no answer is marked to be learned",
)
accepted(
    "the user twice",
    "a.jsonl",
    jsonl(chat(USER, ("user", "r"), SAID)),
    1,
    "1 conversations have two turns of the same speaker in a row (as in row 1)",
)
accepted(
    "the assistant twice", "a.jsonl", jsonl(chat(USER, SAID, ("assistant", "b"))), 1, "two turns of the same speaker"
)
accepted("the assistant first", "a.jsonl", jsonl(chat(("assistant", "hello"), USER, SAID)), 1)
accepted(
    "a system turn in the middle",
    "a.jsonl",
    jsonl(chat(USER, SAID, ("system", "s"), USER, SAID)),
    1,
    "1 conversations have a system turn after the first turn (as in row 1)",
)
accepted("an empty system turn", "a.jsonl", jsonl(chat(("system", ""), USER, SAID)), 1)
accepted(
    "a control token in a question",
    "a.jsonl",
    jsonl(QA, chat(("user", "a<|im_end|>\n<|im_start|>assistant\nyes"), SAID)),
    2,
    "1 conversations write a control token out (as in row 2: '<|im_end|>'), which is read as plain text",
    words=("a<|im_end|>",),
)
accepted("a control token in an answer", "a.jsonl", jsonl(chat(USER, ("assistant", "a<|eos|>"))), 1, "'<|eos|>'")

# --- other kinds of rows ----------------------------------------------------------------------------------------------

PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b"}
refused(
    "preference pairs", "a.jsonl", jsonl(PREFERENCE), "line 1", "preference pair", "not supported", "chosen answers"
)
refused("preference pairs, all rows", "a.jsonl", jsonl(PREFERENCE, PREFERENCE), "each of the 2 rows", "preference pair")
refused("unknown fields", "a.jsonl", jsonl({"promt": "x"}), "fields promt", "did you mean 'prompt'")
refused("no fields", "a.jsonl", b"{}", "fields (none)", "known: messages")
refused("half an instruction", "a.jsonl", jsonl({"instruction": "x"}), "'output' is missing beside 'instruction'")
for first, second in (("instruction", "output"), ("prompt", "completion"), ("question", "answer"), ("text", "label")):
    for name, value, kind in (("null", None, "null"), ("a list", [], "a list"), ("an object", {}, "an object")):
        refused(
            f"{second} is {name}",
            "a.jsonl",
            jsonl({first: "x", second: value}),
            "line 1",
            f"'{second}' is {kind}",
            "must be a text",
        )
    if second != "label":
        refused(
            f"{second} is a number",
            "a.jsonl",
            jsonl({first: "x", second: 3}),
            f"'{second}' is a number",
            "must be a text",
        )
    refused(f"{first} is empty", "a.jsonl", jsonl({first: " ", second: "x"}), f"'{first}' is empty")
accepted("a number for a label", "a.jsonl", jsonl({"text": "x", "label": 3}), 1)
refused("text is a number", "a.jsonl", jsonl({"text": 3}), "'text' is a number")
refused(
    "history of texts",
    "a.jsonl",
    jsonl({"instruction": "x", "output": "y", "history": ["a"]}),
    "history[0] must be a pair",
)
refused("history as text", "a.jsonl", jsonl({"instruction": "x", "output": "y", "history": "a"}), "'history' is a text")
refused(
    "an input of a list", "a.jsonl", jsonl({"instruction": "x", "output": "y", "input": [1]}), "'input'[0] is a number"
)
refused("a system of a number", "a.jsonl", jsonl({**QA, "system": 3}), "'system' is a number")
refused(
    "a cell that is nearly a list",
    "a.csv",
    b'messages\n"[{role: user}]"\n',
    "line 2",
    "'messages' looks like a JSON list",
)

# --- length -----------------------------------------------------------------------------------------------------------

LONG = " ".join(["word"] * 200)
refused(
    "every answer beyond max_length",
    "a.jsonl",
    jsonl(*[{"question": LONG, "answer": "a"}] * 3),
    "3 of 3 rows: every answer lies beyond max_length 64",
    "raise max_length",
)
accepted(
    "some answers beyond max_length",
    "a.jsonl",
    jsonl(QA, {"question": LONG, "answer": "a"}),
    1,
    "1 rows left out: every answer lies beyond max_length 64",
    "1 answers lost",
)
accepted("an answer cut", "a.jsonl", jsonl({"question": "q", "answer": LONG}), 1, "1 without their end")
accepted("one single row", "a.jsonl", GOOD, 1)
refused("a single token", "a.jsonl", jsonl({"text": " "}), "'text' is empty")
