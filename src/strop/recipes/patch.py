"""`diff` and `apply`: a tuned GGUF file as a small patch on the file that it came from, and back.

    diff    base.gguf, tuned.gguf -> task.patch     applied once, and compared, before it has its name
    apply   base.gguf, task.patch -> tuned.gguf     the very bytes of the tuned file, or nothing

When only codes and scales moved (training on a file's own grid), many tasks share one base on a disk or a device, and
each is a few percent of it; a restored file runs as any other. Memory holds a piece of a tensor. Nothing here loads
torch, so that applying takes about as long as reading the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from strop import __version__
from strop.errors import DiskFullError, FileFormatError, UsageError
from strop.files.folders import sha256_file
from strop.files.gguf.patch import PatchFile, Stamp, Summary, check_same_tensors, write_patch
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.writer import atomic_file, check_disk, check_file_target

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PatchResult:
    """A patch that was made, or applied.

    Attributes:
        path: what was written: the patch (`diff`), the restored file (`apply`).
        patch_bytes: of the patch.
        base: the file that the patch belongs to.
        tuned: the file that it makes of it.
        summary: what moved.
        verb: which of the two verbs wrote it.
    """

    path: Path
    patch_bytes: int
    base: Stamp
    tuned: Stamp
    summary: Summary
    verb: str

    @property
    def share(self) -> float:
        """The patch's bytes per byte of the tuned file."""
        return self.patch_bytes / self.tuned.nbytes

    def lines(self) -> list[str]:
        """The result in sentences."""
        lines = []
        for name, moves in self.summary.types.items():
            parts = [
                f"{moves.moved[role]:,} of {count:,} {role} moved ({moves.moved[role] / count:.2%})"
                for role, count in sorted(moves.numbers.items())
            ]
            lines.append(f"{name}: {', '.join(parts)}, in {moves.tensors_moved:,} of {moves.tensors:,} tensors")
        lines.append(f"outside the tensors: {self.summary.new_bytes:,} new bytes")
        lines += [f"base   {self.base}", f"tuned  {self.tuned}"]
        size = f"{self.patch_bytes:,} bytes, {self.share:.2%} of the tuned file"
        if self.verb == "diff":
            return [*lines, f"{self.path}: {size}; applied once to the base, it gave the tuned file's bytes"]
        return [*lines, f"{self.path}: restored from a patch of {size}; its SHA-256 is the tuned file's"]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "path": str(self.path),
            "patch_bytes": self.patch_bytes,
            "share": self.share,
            "base": {"bytes": self.base.nbytes, "sha256": self.base.sha256},
            "tuned": {"bytes": self.tuned.nbytes, "sha256": self.tuned.sha256},
            "new_bytes": self.summary.new_bytes,
            "types": {
                name: {
                    "tensors": moves.tensors,
                    "tensors_moved": moves.tensors_moved,
                    "numbers": dict(moves.numbers),
                    "moved": {role: moves.moved[role] for role in moves.numbers},
                }
                for name, moves in self.summary.types.items()
            },
        }


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> PatchResult:
    """Write what makes `tuned` of `base`, two GGUF files with the same tensors (names, types, shapes).

    Args:
        base: the GGUF file that everybody has.
        tuned: the GGUF file that is to be sent.
        output: the patch.
        overwrite: replace what stands at `output`.

    Raises:
        UsageError: the files hold other tensors, or something stands at `output`.
        MissingInputError: one of the files is not there.
        FileFormatError: one is not a GGUF file, or the patch did not give the tuned file again (nothing is kept).
        DiskFullError: the disk has no room for the patch.
    """
    _check_output(output, base, tuned, overwrite=overwrite)
    old, new = GgufFile.open(base), GgufFile.open(tuned)
    check_same_tensors(old, new)
    with _room(Path(output), new.nbytes), atomic_file(output, overwrite=overwrite) as temporary:
        with temporary.open("wb") as file:
            summary = write_patch(file, old, new, made_by=f"strop {__version__}")
        patch = PatchFile.open(temporary)
        digest = hashlib.sha256()
        for piece in patch.restored(old, Summary()):
            digest.update(piece)
        if digest.hexdigest() != patch.tuned.sha256:
            raise FileFormatError(
                f"{output}: applied to {base}, the patch did not give {tuned} again; one of them changed while it was "
                "read. Nothing was kept; run it once more"
            )
    return PatchResult(Path(output), patch.nbytes, patch.base, patch.tuned, summary, "diff")


def apply(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> PatchResult:
    """Restore the tuned file from the base and a patch; it has the SHA-256 of the one that `diff` was given.

    Args:
        base: the very file that the patch was made from.
        patch: what `diff` wrote.
        output: the restored file.
        overwrite: replace what stands at `output`.

    Raises:
        UsageError: `base` is another file, or something stands at `output`.
        MissingInputError: one of the files is not there.
        FileFormatError: the patch is damaged, truncated, of a newer version, or makes another file than it says.
        DiskFullError: the disk has no room for the file.
    """
    _check_output(output, base, patch, overwrite=overwrite)
    opened = PatchFile.open(patch)
    old, summary = GgufFile.open(base), Summary()
    opened.check_base(old)
    check_disk(Path(output).absolute().parent, opened.tuned.nbytes)
    with _room(Path(output), opened.tuned.nbytes), atomic_file(output, overwrite=overwrite) as temporary:
        with temporary.open("wb") as file:
            for piece in opened.restored(old, summary):
                file.write(piece)
        found = sha256_file(temporary)
        if found != opened.tuned.sha256:
            raise FileFormatError(
                f"{patch}: makes a file of SHA-256 {found}, and {opened.tuned.sha256} is what it promises. Nothing was "
                "kept; fetch the patch again from who made it"
            )
    return PatchResult(Path(output), opened.nbytes, opened.base, opened.tuned, summary, "apply")


def _check_output(output: str | os.PathLike[str], *inputs: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse an output that cannot be written, or that would replace what it is made from."""
    target = check_file_target(output, overwrite=overwrite)
    for path in inputs:
        if target.exists() and os.path.exists(path) and os.path.samefile(target, path):
            raise UsageError(f"{output}: is read to make the output; choose another name for that")


@contextlib.contextmanager
def _room(output: Path, needed_bytes: int) -> Iterator[None]:
    """Say of a disk that ran full what it had to hold."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFullError(
            f"{output}: no room to write it ({error.strerror}); up to {needed_bytes:,} bytes are needed. Nothing was "
            "kept; free that much, or choose an output on another disk"
        ) from None
