"""A short run of `make fuzz`, and tests that the fuzzer detects failures."""

import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from models.codec.codec import Codec
from models.image import Pixels
from tests.fuzz import bitstreams, mutate
from tests.fuzz.bitstreams import Fuzzer
from tests.support.forked import Forked
from worker.settings import WorkerSettings, prepare_process

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def fuzzer(shipped: Codec, photo: Pixels) -> Fuzzer:
    return Fuzzer({2: shipped}, mutate.seeds([shipped], photo, 3, (64, 64)), 0)


def test_a_thousand_mutated_bitstreams_cause_no_failure(tmp_path: Path) -> None:
    failures, log = tmp_path / "failures", tmp_path / "log"
    failures.mkdir()
    options = ("1000", "--full-size", "0", "--cuts", "3", "--failures", str(failures))
    process = Forked(partial(run, options), os.environ, log)
    assert process.wait(600) == 0, log.read_text()
    assert "others of at most 128×128: 1000 in all" in log.read_text()
    assert "cheng2020-attn): 50 in all" in log.read_text()
    assert not list(failures.iterdir())


def run(options: tuple[str, ...]) -> int:
    """What the process of `make fuzz` runs."""
    warnings.simplefilter("ignore")
    sys.argv[1:] = options
    prepare_process(WorkerSettings())
    return bitstreams.main()


def test_the_same_number_gives_the_same_input(fuzzer: Fuzzer, shipped: Codec) -> None:
    again = Fuzzer({2: shipped}, fuzzer.seeds, 0)
    assert all(fuzzer.mutant(i).data == again.mutant(i).data for i in range(100))


def test_most_inputs_pass_the_header_and_half_of_the_msh_inputs_pass_the_checksum(
    fuzzer: Fuzzer,
) -> None:
    passed, checked, n = 0, 0, 1000
    for i in range(n):
        m = fuzzer.mutant(i)
        assert m.data != m.seed.data
        stage, _ = bitstreams.judge(fuzzer.library, m, False)
        passed += stage != "header"
        checked += m.seed.parsed.format == "msh" and stage not in {"header", "checksum"}
    assert passed > 0.8 * n
    assert 0.18 * n < checked < 0.32 * n


def test_mutations_of_class_one_bit_change_one_bit(fuzzer: Fuzzer) -> None:
    flips = [m for m in map(fuzzer.mutant, range(300)) if m.kind == "one bit" and not m.recomputed]
    assert flips
    for m in flips:
        changed = np.frombuffer(m.data, np.uint8) ^ np.frombuffer(m.seed.data, np.uint8)
        assert np.unpackbits(changed).sum() == 1


def test_a_wrong_decode_is_detected(fuzzer: Fuzzer) -> None:
    """With the file of another picture in place of a mutant."""
    for format in ("msh", "compressai"):
        one, other = [s for s in fuzzer.seeds if s.parsed.format == format][::2][:2]
        stage, changed = bitstreams.judge(
            fuzzer.library, mutate.Mutant(other.data, one, "header", True), True
        )
        assert stage == "accepted, other symbols"
        assert changed > 100


def test_bytes_that_do_not_round_trip_are_detected(fuzzer: Fuzzer) -> None:
    seed = next(s for s in fuzzer.seeds if s.parsed.format == "compressai")
    codec = fuzzer.library.codec(seed.parsed)
    latents = codec.latents(seed.parsed)
    coder = codec.latent_coder
    assert isinstance(coder, bitstreams.CachingCoder)
    assert bitstreams.canonical(seed.parsed, coder, latents.arithmetic)
    longer = replace(seed.parsed, z_string=seed.parsed.z_string + bytes(4))
    assert not bitstreams.canonical(longer, coder, latents.arithmetic)
