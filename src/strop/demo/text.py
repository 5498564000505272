"""The pretraining text: what every Python brings along, and what our own grammar and drills write.

A document is a list of (role, text) pairs: one pair of role "text" for prose, alternating "user" and "assistant" for
chat. The same seed gives the same documents under the same Python version; `text_hash` is what `provenance.json`
pins. The standard library is read as source and parsed with `ast`, never imported, so that nothing runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from strop.demo.drills import drill
from strop.demo.everyday import dialogue, paragraph

Document = list[tuple[str, str]]

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo", "__pycache__"}
)
PROSE = re.compile(r"[A-Za-z ,.;:'()\-]")


@functools.cache
def library_paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose from the standard library's topics and docstrings, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    paragraphs: list[str] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for text in _strings(tree, topics=relative.as_posix() == "pydoc_data/topics.py"):
            for paragraph_text in _prose(text):
                if paragraph_text not in seen:
                    seen.add(paragraph_text)
                    paragraphs.append(paragraph_text)
    return tuple(paragraphs)


def _strings(tree: ast.Module, *, topics: bool) -> Iterator[str]:
    """Every docstring of a module, or, for the topics, every value of its one dictionary."""
    for node in ast.walk(tree):
        if topics and isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _prose(text: str) -> Iterator[str]:
    """The paragraphs that read like sentences: ASCII, at least 60 characters, nine tenths of them plain."""
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r"[*`]+", "", re.sub(r"\s+", " ", block)).strip().lower()
        if len(line) >= 60 and line.isascii() and len(PROSE.findall(line)) >= 0.9 * len(line):
            yield line


def documents(*, seed: int, count: int) -> Iterator[Document]:
    """`count` documents: 8% library prose, 17% everyday prose, 10% dialogues, 65% drills, in mixed order.

    Chat documents hold one exchange, at times two or three. The library's paragraphs are walked in a shuffled order and
    begun again when they are used up.
    """
    rng = random.Random(seed)
    library = list(library_paragraphs())
    rng.shuffle(library)
    used = 0
    for _ in range(count):
        kind = rng.random()
        if kind < 0.08:
            yield [("text", library[used % len(library)][:900])]
            used += 1
        elif kind < 0.25:
            yield [("text", paragraph(rng))]
        else:
            chat: Document = []
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                question, answer = dialogue(rng) if kind < 0.35 else drill(rng)
                chat += [("user", question), ("assistant", answer)]
            yield chat


def text_hash(stream: Iterable[Document]) -> str:
    """SHA-256 over the documents, one JSON line each."""
    digest = hashlib.sha256()
    for document in stream:
        digest.update(json.dumps(document, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
