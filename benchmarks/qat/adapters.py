"""What of an adapter is in the file: `qat-lora` for GGUF's Q4_0, beside QLoRA merged and rounded; judged in llama.cpp.

    qlora        an adapter over NF4, merged, exported as Q4_0 (what is done today)
    HOLD         `qat-lora` over a base held in bf16, int8, codes, zero-points: the sum goes through Q4_0 in training
    HOLD+q8_0    the same, the layers' inputs rounded as llama.cpp rounds them at run time

Effect: the projection of what the file changes of the base's logits onto what the adapter changed, the base being the
one that the adapter was trained over; runtime KL: llama.cpp's logits against those of the trained model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from store import Cell, Store, cpu_seconds

import strop
from strop.demo import model_path
from strop.layers.quant_linear import QuantLinear
from strop.models import load
from strop.recipes.export_proof import measure_export

FORMAT: Final = "gguf:q4_0"
ARMS: Final = ("qlora", "bf16", "int8", "codes", "zero-points", "bf16+q8_0")
KEY = ("seed", "arm", "settings")
STEPS: Final = 90
TEST_ROWS: Final = 300


def measure(work: Path, store: Store, rows: Path, seed: int, arm: str, settings: dict[str, Any]) -> Cell:
    """One arm with one seed."""
    wanted = {"seed": seed, "arm": arm, "settings": settings}

    def found() -> Cell:
        folder = work / f"seed-{seed}" / arm
        shutil.rmtree(folder, ignore_errors=True)
        with cpu_seconds() as taken:
            run = _tuned(folder / "run", rows / "train.jsonl", seed, arm, settings)
            seconds = taken()
        file = folder / "model.gguf"
        source: Path | str = run.best_path
        if arm == "qlora":
            strop.merge(run.best_path, folder / "merged", force=True)
            strop.export(folder / "merged", file, format=FORMAT, verify=False)
        else:
            strop.export(run.best_path, file, format=FORMAT, verify=False)
        test = _rows(rows / "test.jsonl", folder / "asked.jsonl")
        proof = measure_export(file, source, data=test, seconds=150)
        score = strop.compare([str(source), str(file)], test, task="exact-match", speed=False, max_rows=TEST_ROWS)
        trained, runtime = (model.score for model in score.models)
        assert trained is not None
        assert runtime is not None
        return {
            "effect": proof.effect,
            "kl": proof.trained.kl,
            "top1": proof.trained.top1,
            "kl_of_codes": None if proof.codes is None else proof.codes.kl,
            "trained_score": trained.estimate,
            "file_score": runtime.estimate,
            "rows": TEST_ROWS,
            "codes_that_differ": None if arm == "qlora" else differing_codes(run.best_path, file),
            "cpu_seconds": seconds,
            "peak_bytes": run.report["peak_bytes"],
        }

    return store.once(wanted, found)


def _tuned(folder: Path, train: Path, seed: int, arm: str, settings: dict[str, Any]) -> Any:
    shared = {"max_steps": STEPS, "batch_size": 32, "max_length": 256, "valid_fraction": 0.0, "rank": 16} | settings
    hold, _, activations = arm.partition("+")
    own: dict[str, Any] = {"method": "qlora"}
    if arm != "qlora":
        own = {"method": "qat-lora", "format": FORMAT, "hold": hold, "activations": activations or None}
    return strop.tune(model_path(), train, output=folder, seed=seed, **own, **shared)


def _rows(source: Path, target: Path) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:TEST_ROWS]
    target.write_text("".join(lines), encoding="utf-8")
    return target


def differing_codes(trained: Path, file: Path) -> int:
    """Codes that the file holds otherwise than the trained model; scales that differ count each."""
    one, other = load(trained, tokenizer=False).model, load(file, tokenizer=False).model
    found = layers = 0
    for name, module in one.named_modules():
        if isinstance(module, QuantLinear):
            layer = other.get_submodule(name)
            assert isinstance(layer, QuantLinear), name
            mine, its = module.qtensor, layer.qtensor
            found += int((mine.stored_codes() != its.stored_codes()).sum())
            assert mine.scale is not None
            assert its.scale is not None
            found += int((mine.scale.float() != its.scale.float()).sum())
            layers += 1
    if not layers:
        raise SystemExit(f"{trained}: holds no quantized layer")
    return found


def adapter_table(cells: list[Cell]) -> list[str]:
    """Means over seeds (least to most)."""
    lines = [
        "| arm | seeds | effect kept | runtime KL, nats | codes that differ | trained, % | file in llama.cpp, % |",
        "|---" * 7 + "|",
    ]
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        own = [cell for cell in cells if cell["arm"] == arm]

        def spread(name: str, form: str, factor: float = 1, own: list[Cell] = own) -> str:
            values = [factor * cell[name] for cell in own if cell[name] is not None]
            if not values:
                return ""
            mean = sum(values) / len(values)
            return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"

        lines.append(
            f"| {arm} | {len(own)} | {spread('effect', '.4f')} | {spread('kl', '.1e')} | "
            f"{spread('codes_that_differ', '.0f')} | {spread('trained_score', '.1f', 100)} | "
            f"{spread('file_score', '.1f', 100)} |"
        )
    return lines
