"""Killed, interrupted, out of space, tampered with: the run goes on bit for bit, or says why it cannot."""

from __future__ import annotations

import ast
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import strop
from strop.config import Steps
from strop.errors import DiskFullError, StropError, Terminated
from strop.layers.surgery import attach_lora
from strop.training import checkpoints
from strop.training.checkpoints import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from tests.tiny import tiny_model
from tests.training.helpers import Notes, assert_equal, exported, prepared, ragged_samples, run_loop, trained_tensors
from tests.training.killing import kill_until_done
from tests.training.test_crash_points import is_whole, small

# --- SIGKILL ----------------------------------------------------------------------------------------------------------

KILLS = 200
RUN = {
    "length": Steps(max_steps=12), "save_steps": 1, "eval_steps": 4, "packing": True,
    "batch": {"batch_size": 2, "accumulation": 2, "max_length": 24},
}  # fmt: skip


def narrow() -> torch.nn.Module:
    model = tiny_model("llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=4)
    attach_lora(model, "all-linear", rank=2, alpha=4, dropout=0.1, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.slow
def test_two_hundred_random_kills_change_no_bit(tmp_path):
    straight = narrow()
    run_loop(straight, tmp_path / "straight", **RUN)
    wanted = exported(tmp_path / "straight" / "last")
    draw, killed, runs = random.Random(0), 0, 0
    seconds = 0.15
    while killed < KILLS:
        folder, runs = tmp_path / f"run-{runs}", runs + 1
        kills = kill_until_done(
            lambda folder=folder: run_loop(narrow(), folder, resume=True, **RUN),
            most=min(20, KILLS - killed), within_seconds=seconds, draw=draw,
        )  # fmt: skip
        killed += kills.killed
        seconds = 0.9 * kills.last_seconds if kills.killed < 5 else min(seconds, kills.last_seconds)
        assert_equal(exported(folder / "last"), wanted)
        assert_equal(exported(folder / "best"), exported(tmp_path / "straight" / "best"))
        left = [path.name for path in (folder / "checkpoints").iterdir()]
        assert all(name.startswith("step-") for name in left)
        shutil.rmtree(folder)
    assert killed == KILLS


# --- SIGTERM, SIGHUP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_end_saves_the_last_step_and_the_resumed_run_is_the_same(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # whatever started the tests may have it ignored
    straight = prepared("lora", dropout=0.1)
    run_loop(straight, tmp_path / "straight")
    notes = Notes(lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    with pytest.raises(Terminated, match=signal.Signals(number).name) as ended:
        run_loop(prepared("lora", dropout=0.1), tmp_path / "run", reporter=notes)
    assert ended.value.exit_code == 128 + number
    told = next(note for note in notes.notes if "interrupted after step 3" in note)
    assert "its state is in" in told
    assert "--resume goes on from there" in told
    resumed = prepared("lora", dropout=0.1)
    run_loop(resumed, tmp_path / "run", resume=True)
    assert_equal(trained_tensors(resumed), trained_tensors(straight))
    assert signal.signal(number, before) is signal.SIG_DFL


# --- a full disk ------------------------------------------------------------------------------------------------------


def large(step: int) -> Checkpoint:
    """Three files of tensors, of about 24, 48 and 5 KB."""
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(60, 100, generator=generator)}
    moments = {f"w.{name}": torch.randn(60, 100, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(step, weights, moments, {"cpu": torch.get_rng_state()}, {"mark": 0.0})


def check_refused(root: Path, error: DiskFullError, before: Checkpoint) -> None:
    message = str(error)
    assert "bytes and" in message
    assert "are free" in message
    assert "--resume" in message
    assert [path.name for path in root.iterdir()] == [f"step-{before.step:06d}"]
    found, skipped = newest_checkpoint(root)
    assert found is not None
    assert is_whole(found, before)
    assert not skipped


def test_a_limit_at_any_4_kib_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    before = large(1)
    save_checkpoint(tmp_path, before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    refused = 0
    try:
        for limit in range(0, 64 * 1024, 4096):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                save_checkpoint(tmp_path, large(2))
            except DiskFullError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                check_refused(tmp_path, error, before)
                refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert refused == 12  # the largest file has 48,160 bytes: 11.8 blocks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_disk_that_fills_at_any_4_kib_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    """On a small tmpfs, with the look at the free bytes taken out, so that writing itself runs into the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is refused here: {mounted.stderr.decode().strip()}")
    try:
        root, before = disk / "checkpoints", large(1)
        save_checkpoint(root, before)
        real = checkpoints._check_room
        filler, refused = disk / "filler", 0
        for room in range(0, 128 * 1024, 4096):
            filler.unlink(missing_ok=True)
            filler.write_bytes(b"\0" * max(0, shutil.disk_usage(disk).free - room))
            for check in (lambda path, needed: None, real):
                monkeypatch.setattr(checkpoints, "_check_room", check)
                try:
                    save_checkpoint(root, large(2))
                except DiskFullError as error:
                    check_refused(root, error, before)
                    refused += 1
                else:
                    shutil.rmtree(root / "step-000002")
        assert refused > 30
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_on_a_full_disk_stops_before_it_writes_and_keeps_what_it_has(tmp_path, monkeypatch):
    def usage(path: object) -> object:
        full = (tmp_path / "checkpoints" / "step-000002").is_dir()
        return shutil._ntuple_diskusage(10**9, 10**9, 1000 if full else 10**9)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    with pytest.raises(DiskFullError, match=r"step-000004: .* it needs [\d,]+ bytes and 1,000 are free"):
        run_loop(prepared("lora"), tmp_path, save_steps=2, valid=[])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    resumed, straight = prepared("lora"), prepared("lora")
    run_loop(resumed, tmp_path, save_steps=2, valid=[], resume=True)
    run_loop(straight, tmp_path / "straight", save_steps=2, valid=[])
    assert_equal(trained_tensors(resumed), trained_tensors(straight))


# --- bytes that change ------------------------------------------------------------------------------------------------


def test_every_single_byte_that_changes_is_found(tmp_path):
    tiny = Checkpoint(
        1, {"w": torch.ones(3)}, {"w.step": torch.ones(())}, {"cpu": torch.ones(8, dtype=torch.uint8)}, {"mark": 0.0}
    )
    folder = save_checkpoint(tmp_path, tiny)
    draw, tried = random.Random(0), 0
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for place, byte in enumerate(original):
                file.seek(place)
                file.write(bytes([byte ^ (1 << draw.randrange(8))]))
                with pytest.raises(StropError):
                    load_checkpoint(folder)
                file.seek(place)
                file.write(bytes([byte]))
                tried += 1
    load_checkpoint(folder)
    assert tried == sum(path.stat().st_size for path in folder.iterdir())


# --- pickle -----------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_no_module_can_read_a_pickle():
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("jit", "load")}
    for path in Path(strop.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned & {name.name.split(".")[0] for name in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, path
                assert node.module != "torch" or "load" not in {name.name for name in node.names}, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                assert (owner, node.attr) not in calls, path


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_canary_in_any_file_of_a_checkpoint_is_never_run(tmp_path, form):
    from strop.files.folders import write_manifest

    sung = tmp_path / "sung"
    payload = tmp_path / "payload"
    if form == "pickle":
        payload.write_bytes(pickle.dumps(Canary(sung)))
    else:
        torch.save(Canary(sung), payload)
    names = [path.name for path in save_checkpoint(tmp_path / "run", small(1)).iterdir()]
    for name in [*names, "optimizer.pt", "random.pkl", "training_args.bin", "weights.bin"]:
        folder = save_checkpoint(tmp_path / "run", small(1))
        shutil.copy(payload, folder / name)
        for listed in (False, True):
            if listed and name != "manifest.json":
                write_manifest(folder)  # an attacker can write that too
            try:
                read = load_checkpoint(folder)
            except StropError:
                continue
            assert is_whole(read, small(1))
            assert name not in names
    assert not sung.exists()
    pickle.loads(pickle.dumps(Canary(sung)))
    assert sung.exists()  # the canary can sing


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.safetensors"])
def test_a_canary_in_a_models_folder_is_never_run(tmp_path, name):
    from strop.models import load
    from tests.tiny import tiny_folder

    folder, sung = tiny_folder(tmp_path, "llama"), tmp_path / "sung"
    (folder / "model.safetensors").unlink()
    torch.save({"x": Canary(sung)}, folder / name)
    with pytest.raises(StropError):
        load(folder)
    assert not sung.exists()


def test_a_fresh_start_with_another_seed_is_another_run(tmp_path):
    """The control of every test of bits above: the comparison can fail."""
    ends = []
    for seed in (0, 1):
        model = prepared("lora", dropout=0.1)
        run_loop(model, tmp_path / str(seed), seed=seed, batch={"seed": seed}, samples=ragged_samples(), valid=[])
        ends.append(trained_tensors(model))
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
