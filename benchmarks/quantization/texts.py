"""Token windows to calibrate and to judge with: text cut into documents, dealt to splits, tokenized and padded.

    python benchmarks/quantization/texts.py demo runs/demo.safetensors
    python benchmarks/quantization/texts.py STUDY_MODEL STUDY_MODEL/windows.safetensors --data FOLDER

`Texts` holds three disjoint sets of documents. Calibration windows are full, cut from the training documents joined by
their start and end tokens. Held-out windows never span two documents: they are padded with -1 behind their tokens, and
`*_documents` says which document each is from, so that an interval can be drawn over documents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

WINDOW = 256
SHORTEST = 32  # tokens; a shorter rest of a document is dropped
PADDING = -1


@dataclass(frozen=True)
class Texts:
    """Documents by split; `calibration` is what the model was trained on."""

    calibration: list[str]
    development: list[str]
    test: list[str]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each split, its documents joined by a zero byte."""
        return {
            name: hashlib.sha256("\0".join(documents).encode()).hexdigest() for name, documents in vars(self).items()
        }


def stories(text: str) -> list[str]:
    """TinyStories as this file writes them: paragraphs part by an empty line, stories by a mere line break."""
    return re.split(r"(?<=[^\n])\n(?=[^\n])", text.strip())


def speeches(text: str, together: int = 40) -> list[str]:
    """Shakespeare without marks between scenes: every 40 speeches in a row make a document."""
    every = text.strip().split("\n\n")
    return ["\n\n".join(every[start : start + together]) for start in range(0, len(every), together)]


def articles(text: str) -> list[str]:
    """WikiText: an article begins at a title between single equals signs."""
    return [article.strip() for article in re.split(r"\n(?= = [^=\n]+ = \n)", text) if article.strip()]


def study_texts(folder: Path, held_out: float = 0.06) -> Texts:
    """The three corpora of `folder`; their tails and wikitext2_test are held out, by turns development and test."""
    every_story = stories((folder / "tinystories_4M_lowercase.txt").read_text())
    every_speech = speeches((folder / "tinyshakespeare.txt").read_text())
    train = articles((folder / "wikitext2_valid.txt").read_text())
    kept = articles((folder / "wikitext2_test.txt").read_text())[:24]
    for documents in (every_story, every_speech):
        tail = int(len(documents) * (1 - held_out))
        train += documents[:tail]
        kept += documents[tail:]
    seen = set(train)
    kept = [document for document in dict.fromkeys(kept) if document not in seen]
    return Texts(calibration=train, development=kept[::2], test=kept[1::2])


def demo_texts() -> Texts:
    """Of the bundled model's own generator, other seeds than it was trained with; six short ones make a document."""
    from strop.demo.text import documents

    def drawn(seed: int, count: int) -> list[str]:
        texts = []
        for document in documents(seed=seed, count=6 * count):
            turns = [f"<|user|>{text}<|assistant|>" if role == "user" else f"{text}<|end|>" for role, text in document]
            texts.append("<|bos|>" + "".join(turns))
        joined = ["".join(texts[start : start + 6]) for start in range(0, len(texts), 6)]
        return [text.removeprefix("<|bos|>").removesuffix("<|end|>") for text in joined]

    return Texts(calibration=drawn(1001, 400), development=drawn(1002, 60), test=drawn(1003, 120))


def stream(documents: list[str], tokenizer: Tokenizer, start: int, end: int) -> np.ndarray:
    """All documents as one row of tokens, each between `start` and `end`."""
    pieces = [[start, *encoding.ids, end] for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    return np.fromiter((token for piece in pieces for token in piece), dtype=np.int64)


def held_out_windows(
    documents: list[str], tokenizer: Tokenizer, start: int, *, at_most: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, WINDOW] and their documents [n], of randomly chosen documents, at most two windows of each."""
    order = np.random.default_rng(seed).permutation(len(documents))
    windows: list[list[int]] = []
    owners: list[int] = []
    for document in order:
        tokens = [start, *tokenizer.encode(documents[document], add_special_tokens=False).ids]
        for begin in range(0, min(len(tokens), 2 * WINDOW), WINDOW):
            window = tokens[begin : begin + WINDOW]
            if len(window) >= SHORTEST and len(windows) < at_most:
                windows.append(window + [PADDING] * (WINDOW - len(window)))
                owners.append(int(document))
    return np.array(windows, dtype=np.int64), np.array(owners, dtype=np.int64)


def write_windows(path: Path, texts: Texts, tokenizer: Tokenizer, start: int, end: int, *, seed: int = 0) -> None:
    """`calibration` [128, WINDOW], `development` and `test` with their `*_documents`, as one safetensors file."""
    joined = stream(texts.calibration, tokenizer, start, end)
    begins = np.random.default_rng(seed).choice(len(joined) // WINDOW, size=128, replace=False) * WINDOW
    tensors = {"calibration": np.stack([joined[begin : begin + WINDOW] for begin in np.sort(begins)])}
    for name, at_most in (("development", 48), ("test", 96)):
        windows, owners = held_out_windows(getattr(texts, name), tokenizer, start, at_most=at_most, seed=seed)
        tensors[name], tensors[f"{name}_documents"] = windows, owners
    save_file(tensors, path)


def read_windows(path: Path) -> dict[str, np.ndarray]:
    """What `write_windows` wrote."""
    return load_file(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the study model's folder, or demo")
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, help="folder with the three corpora, for the study model")
    chosen = parser.parse_args()
    if chosen.model == "demo":
        from strop.models.sources import find_folder

        folder, documents = find_folder("demo"), demo_texts()
    else:
        folder, documents = Path(chosen.model), study_texts(chosen.data)
    ends = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    write_windows(chosen.output, documents, tokenizer, ends["bos_token_id"], ends["eos_token_id"])
    print(json.dumps(documents.hashes(), indent=1))


if __name__ == "__main__":
    main()
