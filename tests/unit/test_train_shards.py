"""Checkpoints: small files that stay readable after a kill at any moment."""

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from models.errors import WeightsError
from models.train import shards
from tests.support.forked import Forked

MIB = 1 << 20


def kill_during_saves(folder: Path, seed: int) -> int:
    """Kill processes that save generation after generation, at random moments, and load after each
    kill. Runs in a process without OpenMP threads, which a forked one would wait for."""
    chance = random.Random(seed)
    shards.LIMIT = MIB
    began = time.monotonic()
    shards.save(folder, generation(0), {"n": 0})
    save_s = time.monotonic() - began
    before = kills = 0
    while kills < 15 or not before:
        kills += 1
        child = os.fork()
        if not child:
            save_forever(folder, before)
        time.sleep(chance.uniform(0, 8 * save_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = load_consistent(folder)
        assert after >= before, (after, before)
        before = after
    return 0


def generation(n: int) -> shards.State:
    """Tensors that all have the value `n`."""
    return {
        part: {"w": torch.full((300_000,), float(n)), "b": torch.full((7,), float(n))}
        for part in ("net", "average", "optimiser")
    }


def save_forever(folder: Path, n: int) -> NoReturn:
    while True:
        n += 1
        shards.save(folder, generation(n), {"n": n})


def load_consistent(folder: Path) -> int:
    """The number of the generation, which all its tensors have as their value."""
    tensors, facts = shards.load(folder)
    values = {v for part in tensors.values() for t in part.values() for v in set(t.tolist())}
    assert values == {float(facts["n"])}, (values, facts)
    return int(facts["n"])


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
    folder, log = tmp_path / "run", tmp_path / "log"
    process = Forked(partial(kill_during_saves, folder, 3), os.environ, log)
    assert process.wait(120) == 0, log.read_text()


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
