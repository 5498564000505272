"""A million broken files: `python -m benchmarks.fuzz_files --cases 1000000 --seed 0`, from the project's root (POSIX).

Half of the cases are GGUF files, half safetensors ones, made and read as in tests/files/fuzzing.py. Every one must be
read or refused with an error of strop's own, within 10 seconds and 256 MB; those that are not are printed with the seed
and the number that make them again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.files.fuzzing import KINDS, run_cases

from strop.memory import PeakMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="strop-fuzz-", dir=_memory_folder()) as temporary:
        for kind in KINDS:
            began = time.monotonic()
            with PeakMemory() as peak:
                outcome = run_cases(kind, chosen.seed, chosen.cases // len(KINDS), Path(temporary))
            refused = ", ".join(f"{count:,} {name}" for name, count in sorted(outcome.refused.items()))
            print(
                f"{kind}: {outcome.cases:,} cases, {outcome.accepted:,} read, {refused or 'none refused'}, "
                f"{len(outcome.failures)} failures; slowest {1000 * outcome.slowest_seconds:.0f} ms, peak "
                f"{peak.peak_bytes / 1e6:.1f} MB, {time.monotonic() - began:.0f} s"
            )
            for failure in outcome.failures[:20]:
                print(f"  {failure}")
            failed |= bool(outcome.failures)
    raise SystemExit(1 if failed else 0)


def _memory_folder() -> str | None:
    """A file system in memory where there is one, for a million files would wear a disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
