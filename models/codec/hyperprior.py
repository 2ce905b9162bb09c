"""Entropy coding of latents: with a hyperprior, and with none.

`h_s` predicts a scale for every symbol of y, which selects the CDF that codes it, and in most
architectures a mean. Encoder and decoder must therefore agree on every scale index. There are two
profiles, of which only `mbt2018-mean` has the second:

- `float` computes `h_s` in float32, as CompressAI does on a CPU. If a stream does not decode, `h_s`
  is computed again with other roundings (`models.codec.recovery`), one of which the encoder's
  machine may have used.
- `exact` computes `h_s` in integers (stored in float64, all sums below 2^53). The result does not
  depend on threads, backend or machine.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import tiles
from models.codec import rans, recovery
from models.codec.exact import ExactHyperSynthesis
from models.codec.networks import Network
from models.errors import CorruptStream, DesynchronisedStream, LengthMismatch
from models.geometry import STRIDE_Y, STRIDE_Z

SCALE_MIN = 0.11
"""Lower bound of a latent's scale: the first entry of CompressAI's scale table."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The result of entropy decoding.

    `symbols` (M, h, w) int32 are the coded integers; `y_hat` (1, M, h, w) float32 is symbols +
    means; `bits` (h, w) float32 is the number of bits at each position, summed over channels;
    `arithmetic` tells how `h_s` was computed: "exact", "float", or one of `recovery.ARITHMETICS`.
    """

    y_hat: Tensor
    symbols: rans.Int32Array
    bits: NDArray[np.float32]
    arithmetic: str = ""


class LatentCoder:
    """Entropy encoder and decoder of y and z, with the CDF tables of one set of weights."""

    def __init__(
        self,
        net: Network,
        z_tables: rans.Tables,
        y_tables: rans.Tables,
        medians: Tensor,
        scale_table: Tensor,
    ) -> None:
        self.net = net
        self.z_tables = z_tables
        self.y_tables = y_tables
        self.medians = medians.reshape(1, -1, 1, 1)
        self.scale_table = scale_table
        self._has_means = net.architecture.prior != "scale"
        if net.architecture.prior == "mean":
            self._exact = ExactHyperSynthesis(net.h_s, net.M, scale_table)

    def encode(self, x: Tensor, profile: str) -> tuple[bytes, bytes, Latents]:
        """Encode `x` (1, 3, H, W) in [0, 1], sides multiples of 64.

        Returns the y string, the z string and the latents. Raises `ValueError` for other shapes.
        """
        check_padded(x)
        with torch.inference_mode():
            y = tiles.analyse(self.net.g_a, x, self.net.M, self.net.architecture.overlap)
            z = self.net.h_a(y if self._has_means else y.abs())
            z_symbols = torch.round(z - self.medians)[0].to(torch.int32).numpy()
            z_string = rans.encode(z_symbols, _channels(z_symbols.shape), self.z_tables)
            y_string, latents = self._encode_y(y, z_symbols, profile)
        return y_string, z_string, latents

    def decode(
        self, y_string: bytes, z_string: bytes, size: tuple[int, int], profile: str
    ) -> Latents:
        """Decode the strings of a picture whose padded size (H, W) is `size`.

        Raises `CorruptStream` or `DesynchronisedStream`, `Unavailable` as `_recover` does, and
        `LengthMismatch` if a side of `size` is not a multiple of 64.
        """
        latent_shape(size, STRIDE_Z)
        rans.parse_words(y_string)  # checks y before the time for `h_s` is spent
        z_symbols = self.decode_z(z_string, size)
        with torch.inference_mode():
            return self._decode_y(y_string, z_symbols, profile)

    def decode_z(self, z_string: bytes, size: tuple[int, int]) -> rans.Int32Array:
        """Decode the z string of a picture whose padded size (H, W) is `size`: (N, h, w).

        Raises `CorruptStream`, `DesynchronisedStream` or `LengthMismatch` as `decode` does.
        """
        shape = (self.net.N, *latent_shape(size, STRIDE_Z))
        return rans.decode(z_string, _channels(shape), self.z_tables)

    def fits(self, y_string: bytes, z_string: bytes, size: tuple[int, int]) -> bool:
        """Return True if the first string ends in the state in which encoders start.

        With the weights of another codec, this happens with a probability of about 2e-11.
        """
        try:
            self.decode_z(z_string, size)
        except (CorruptStream, DesynchronisedStream):
            return False
        return True

    def _encode_y(
        self, y: Tensor, z_symbols: rans.Int32Array, profile: str
    ) -> tuple[bytes, Latents]:
        """Encode y (1, M, h, w); return the y string and the latents."""
        indexes, means = self._prior(z_symbols, profile)
        symbols = torch.round(y - means)[0].to(torch.int32).numpy()
        y_string = rans.encode(symbols, indexes, self.y_tables)
        return y_string, self._latents(symbols, indexes, means, profile)

    def _decode_y(self, y_string: bytes, z_symbols: rans.Int32Array, profile: str) -> Latents:
        """Decode the y string. Raises as `decode` does."""
        indexes, means = self._prior(z_symbols, profile)
        try:
            symbols = rans.decode(y_string, indexes, self.y_tables)
        except (CorruptStream, DesynchronisedStream) as e:  # a wrong scale causes one of the two
            if profile == "exact":
                raise
            return self._recover(y_string, z_symbols, indexes, e)
        return self._latents(symbols, indexes, means, profile)

    def _recover(
        self,
        y_string: bytes,
        z_symbols: rans.Int32Array,
        indexes: rans.Int32Array,
        failure: CorruptStream | DesynchronisedStream,
    ) -> Latents:
        """Decode the y string with the first of `recovery.ARITHMETICS` that succeeds.

        Arithmetics that give the same scale indexes as one before are skipped. Raises `Unavailable`
        if the process that computes them is busy or dies: the bitstream may decode later.
        """
        tried = {_fingerprint(indexes)}
        for arithmetic, indexes, means in self._recovery_priors(z_symbols):
            if _fingerprint(indexes) in tried:
                continue
            tried.add(_fingerprint(indexes))
            try:
                symbols = rans.decode(y_string, indexes, self.y_tables)
            except (CorruptStream, DesynchronisedStream):
                continue
            return self._latents(symbols, indexes, means, arithmetic)
        raise failure

    def _recovery_priors(
        self, z_symbols: rans.Int32Array
    ) -> Iterator[tuple[str, rans.Int32Array, Tensor]]:
        """Yield name, scale indexes and means for each of `recovery.ARITHMETICS`."""
        z_hat = self._z_hat(z_symbols)
        for arithmetic in recovery.ARITHMETICS:
            out = recovery.PROCESS.evaluate(self._h_s_digest, self.net.h_s, z_hat, arithmetic)
            scales_hat, means_hat = self._split(out)
            yield arithmetic, self._indexes(scales_hat), means_hat

    def _prior(self, z_symbols: rans.Int32Array, profile: str) -> tuple[rans.Int32Array, Tensor]:
        """Compute scale indexes (M, 4h, 4w) and means (1, M, 4h, 4w) from z symbols (N, h, w)."""
        if profile == "exact":
            return self._exact(torch.from_numpy(z_symbols)[None], self.medians)
        scales_hat, means_hat = self._split(self.net.h_s(self._z_hat(z_symbols)))
        return self._indexes(scales_hat), means_hat

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and means, which are 0 if the architecture has none, of the result."""
        if not self._has_means:
            return out, out.new_zeros(1, 1, 1, 1)
        scales_hat, means_hat = out.chunk(2, 1)
        return scales_hat, means_hat

    def _z_hat(self, z_symbols: rans.Int32Array) -> Tensor:
        return torch.from_numpy(z_symbols)[None].float() + self.medians

    def _indexes(self, scales_hat: Tensor) -> rans.Int32Array:
        indexes = torch.bucketize(scales_hat.clamp(min=SCALE_MIN), self.scale_table[:-1])
        return indexes[0].to(torch.int32).numpy()

    @cached_property
    def _h_s_digest(self) -> str:
        digest = hashlib.sha256()
        for t in self.net.h_s.state_dict().values():
            digest.update(t.numpy().tobytes())
        return digest.hexdigest()

    def _latents(
        self, symbols: rans.Int32Array, indexes: rans.Int32Array, means: Tensor, arithmetic: str
    ) -> Latents:
        y_hat = torch.from_numpy(symbols)[None].float() + means
        bits = rans.bits(symbols, indexes, self.y_tables).sum(0, dtype=np.float32)
        return Latents(y_hat, symbols, bits, arithmetic)


class FactorizedCoder(LatentCoder):
    """Entropy encoder and decoder of y without a hyperprior: one CDF per channel, and no z."""

    def __init__(self, net: Network, tables: rans.Tables, medians: Tensor) -> None:
        self.net, self.y_tables = net, tables
        self.medians = medians.reshape(1, -1, 1, 1)

    def encode(self, x: Tensor, profile: str) -> tuple[bytes, bytes, Latents]:
        """Encode `x` as `LatentCoder` does; the z string is empty."""
        check_padded(x)
        with torch.inference_mode():
            y = tiles.analyse(self.net.g_a, x, self.net.M, self.net.architecture.overlap)
            symbols = torch.round(y - self.medians)[0].to(torch.int32).numpy()
        indexes = _channels(symbols.shape)
        y_string = rans.encode(symbols, indexes, self.y_tables)
        return y_string, b"", self._latents(symbols, indexes, self.medians, profile)

    def decode(
        self, y_string: bytes, z_string: bytes, size: tuple[int, int], profile: str
    ) -> Latents:
        """Decode the y string as `LatentCoder` does."""
        indexes = _channels((self.net.M, *latent_shape(size, STRIDE_Y)))
        symbols = rans.decode(y_string, indexes, self.y_tables)
        return self._latents(symbols, indexes, self.medians, profile)

    def fits(self, y_string: bytes, z_string: bytes, size: tuple[int, int]) -> bool:
        """Tell whether the y string decodes."""
        try:
            self.decode(y_string, z_string, size, "float")
        except (CorruptStream, DesynchronisedStream):
            return False
        return True


def latent_shape(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return rows and columns of latents with this stride, for a padded size (H, W).

    Raises `LengthMismatch` if a side is not a multiple of 64.
    """
    if size[0] % STRIDE_Z or size[1] % STRIDE_Z:
        raise LengthMismatch(f"padded size {size}: both sides must be multiples of {STRIDE_Z}")
    return size[0] // stride, size[1] // stride


def check_padded(x: Tensor) -> None:
    """Raise `ValueError` unless `x` is (1, 3, H, W) with sides that are multiples of 64."""
    if x.shape[0] != 1 or x.shape[2] % STRIDE_Z or x.shape[3] % STRIDE_Z:
        raise ValueError(
            f"x has the shape {tuple(x.shape)}; "
            f"(1, 3, H, W) with sides that are multiples of {STRIDE_Z} is needed"
        )


def _channels(shape: tuple[int, ...]) -> rans.Int32Array:
    """Return the CDF index of each z symbol (N, h, w), which is its channel."""
    channel = np.arange(shape[0], dtype=np.int32)[:, None, None]
    return np.ascontiguousarray(np.broadcast_to(channel, shape))


def _fingerprint(indexes: rans.Int32Array) -> bytes:
    return hashlib.sha256(indexes.tobytes()).digest()
