"""What was made of each block, kept on the disk until the model is written; a killed run goes on from the last one.

    plan.json            what the blocks are being made of and how, and its digest
    block-0003.json      layers with their schemes and shapes, notes, the block's error
    block-0003.safetensors

The JSON file is renamed into place last, so a block is there whole or not at all. A folder whose plan is another is
cleared: nothing of it could be used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from strop.calibrate.stream import BlockError
from strop.errors import StropError
from strop.files.folders import read_json, sync, write_json
from strop.files.shards import read_file, read_header, read_tensor
from strop.methods import BlockResult
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import parse_scheme

PLAN = "plan.json"
_OTHER = "other|"


class Results:
    """Results by block in a folder.

    Args:
        folder: Made where it is not there.
        plan: All that decides the results, as JSON values; results made under another plan are removed.

    Attributes:
        found: Blocks that were there already.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder.is_dir() and not self._same(plan):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PLAN).is_file():
            _write(folder / PLAN, plan)
        self.found = len(list(folder.glob("block-*.json")))

    @contextmanager
    def kept_if_of_use(self) -> Iterator[None]:
        """Remove the folder where the work inside ends with an error that the same input gives again, or unbegun."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, StropError) or not any(self.folder.glob("block-*.json")):
                self.remove()
            raise

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._path(index, "json").is_file()

    def put(self, index: int, result: BlockResult, error: BlockError) -> None:
        """Keep a block's result; on return it is on the disk."""
        tensors = {f"{_OTHER}{name}": tensor.detach().contiguous() for name, tensor in result.others.items()}
        for layer, quantized in result.weights.items():
            tensors |= {f"{layer}|{part}": tensor.contiguous() for part, tensor in quantized.tensors().items()}
        path = self._path(index, "safetensors")
        save_file(tensors, path)
        sync(path)
        layers = {name: {"scheme": q.scheme.name, "shape": list(q.shape)} for name, q in result.weights.items()}
        about = {"layers": layers, "notes": list(result.notes), "tokens": dict(result.tokens), "error": asdict(error)}
        _write(self._path(index, "json"), about)

    def get(self, index: int) -> tuple[BlockResult, BlockError]:
        """A finished block, bit for bit."""
        listed = read_json(self._path(index, "json"))
        tensors = read_file(self._path(index, "safetensors"))
        weights: dict[str, QuantizedTensor] = {}
        for layer, about in listed["layers"].items():
            parts = {name.rpartition("|")[2]: part for name, part in tensors.items() if name.startswith(f"{layer}|")}
            rows, columns = about["shape"]
            weights[layer] = QuantizedTensor.from_tensors(parts, parse_scheme(about["scheme"]), (rows, columns))
        others = {name.removeprefix(_OTHER): part for name, part in tensors.items() if name.startswith(_OTHER)}
        return BlockResult(weights, others, listed["notes"], listed["tokens"]), BlockError(**listed["error"])

    def others(self, index: int) -> dict[str, Tensor]:
        """Parameters beside the weights that changed in a finished block; nothing else is read."""
        path = self._path(index, "safetensors")
        header = read_header(path)
        names = [name for name in header.entries if name.startswith(_OTHER)]
        return {name.removeprefix(_OTHER): read_tensor(path, name, header=header) for name in names}

    def remove(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int, kind: str) -> Path:
        return self.folder / f"block-{index:04}.{kind}"

    def _same(self, plan: Mapping[str, Any]) -> bool:
        return (self.folder / PLAN).is_file() and read_json(self.folder / PLAN) == plan


class Taken:
    """What layers became, by name; one block's results are in memory at a time.

    Args:
        results: All blocks are finished.
        names: The blocks in the model's order.
    """

    def __init__(self, results: Results, names: Sequence[str]) -> None:
        self._results, self._names = results, names
        self._open: tuple[int, BlockResult] | None = None

    def weight(self, name: str) -> QuantizedTensor:
        """A layer's weight."""
        index = next(i for i, block in enumerate(self._names) if name.startswith(f"{block}."))
        if self._open is None or self._open[0] != index:
            self._open = (index, self._results.get(index)[0])
        return self._open[1].weights[name]

    def others(self) -> dict[str, Tensor]:
        """Parameters beside the weights that changed, of all blocks."""
        return {
            name: tensor for index in range(len(self._names)) for name, tensor in self._results.others(index).items()
        }


def _write(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    write_json(part, value)
    sync(part)
    os.replace(part, path)
