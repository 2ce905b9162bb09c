"""Checkpoints: small files that stay readable after a kill at any moment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import WeightsError
from models.train import shards

MIB = 1 << 20

KILL_DURING_SAVE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from models.train import shards

folder = Path(sys.argv[1])

def state(n):
    return {part: {"w": torch.full((300_000,), float(n)), "b": torch.full((7,), float(n))}
            for part in ("net", "average", "optimiser")}

def save_on(n):
    while True:
        n += 1
        shards.save(folder, state(n), {"n": n})

def load_consistent():
    tensors, facts = shards.load(folder)
    values = {float(v) for part in tensors.values() for t in part.values() for v in t.unique()}
    assert values == {float(facts["n"])}, (values, facts)
    return facts["n"]

torch.set_num_threads(1)  # a forked child would wait for OpenMP threads that it does not have
shards.LIMIT = 1 << 20
began = time.monotonic()
shards.save(folder, state(0), {"n": 0})
save_s = time.monotonic() - began
random.seed(int(sys.argv[2]))
before = kills = 0
while kills < 15 or not before:
    kills += 1
    child = os.fork()
    if not child:
        save_on(before)
    time.sleep(random.uniform(0, 8 * save_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    after = load_consistent()
    assert after >= before
    before = after
"""


def some_state() -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return {
        "net": {
            "large": torch.randn(3000, 3000, generator=g),  # 34 MiB
            "conv": torch.randn(8, 6, 3, 3, generator=g).to(memory_format=torch.channels_last),
            "half": torch.randn(5, generator=g).half(),
            "none": torch.zeros(0, 4),
        },
        "optimiser": {"0/step": torch.tensor(7.0), "seen": torch.tensor([True, False])},
    }


def test_a_saved_state_is_loaded_unchanged(tmp_path: Path) -> None:
    shards.save(tmp_path, some_state(), {"stage": 1})
    state, facts = shards.load(tmp_path)
    assert facts == {"stage": 1}
    for part, tensors in some_state().items():
        assert list(state[part]) == list(tensors)
        for name, value in tensors.items():
            assert state[part][name].dtype == value.dtype
            assert torch.equal(state[part][name], value)


def test_no_file_is_larger_than_16_mib(tmp_path: Path) -> None:
    many = {f"layer {i}": torch.zeros(1000, 1000) for i in range(10)}
    shards.save(tmp_path, some_state() | {"average": many}, {})
    sizes = [p.stat().st_size for p in tmp_path.iterdir()]
    assert max(sizes) <= 16 * MIB
    assert sum(sizes) > 70 * MIB


def test_only_the_last_generation_is_kept(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "000002-net-009.safetensors").touch()  # left by a killed save
        shards.save(tmp_path, {"net": {"w": torch.tensor(n)}}, {"n": n})
    assert len(list(tmp_path.iterdir())) == 2
    assert shards.load(tmp_path)[1] == {"n": 2}


def test_a_killed_save_leaves_the_previous_or_the_new_generation(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", KILL_DURING_SAVE, str(tmp_path), "3"]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.parametrize("damage", ["altered", "missing", "cut"])
def test_a_damaged_file_is_named_in_the_error(tmp_path: Path, damage: str) -> None:
    shards.save(tmp_path, some_state(), {})
    file = sorted(tmp_path.glob("*net-001*"))[0]
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data if damage == "altered" else data[:-1])
    with pytest.raises(WeightsError, match=file.name):
        shards.load(tmp_path)


def test_an_intact_generation_is_loaded_if_a_newer_one_is_damaged(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    shards.save(run, {"net": {"w": torch.tensor(1.0)}}, {"n": 1})
    shutil.copytree(run, copy)
    shards.save(run, {"net": {"w": torch.tensor(2.0)}}, {"n": 2})
    next(run.glob("*.safetensors")).write_bytes(b"")
    shutil.copytree(copy, run, dirs_exist_ok=True)
    state, facts = shards.load(run)
    assert (float(state["net"]["w"]), facts["n"]) == (1.0, 1)


def test_an_empty_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert not shards.exists(tmp_path)
    with pytest.raises(WeightsError, match="no checkpoint"):
        shards.load(tmp_path)
