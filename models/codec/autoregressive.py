"""Entropy coding of latents with a hyperprior and a context model."""

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from models.codec import rans, recovery
from models.codec.context import ContextModel, Positions
from models.codec.hyperprior import LatentCoder, Latents
from models.errors import CorruptStream, DesynchronisedStream


class ContextCoder(LatentCoder):
    """Entropy encoder and decoder of z, and of y position by position."""

    @cached_property
    def context(self) -> ContextModel:
        """The layers after `h_s`."""
        net = self.net
        return ContextModel(net.context_prediction, net.entropy_parameters, self.scale_table)

    def _encode_y(
        self, y: Tensor, z_symbols: rans.Int32Array, profile: str
    ) -> tuple[bytes, Latents]:
        p = self.context.quantize(y, self.net.h_s(self._z_hat(z_symbols)))
        return rans.encode(p.symbols, p.indexes, self.y_tables), self._at(p, profile)

    def _decode_y(self, y_string: bytes, z_symbols: rans.Int32Array, profile: str) -> Latents:
        z_hat = self._z_hat(z_symbols)
        try:
            p = self.context.decode(y_string, self.net.h_s(z_hat), self.y_tables)
        except (CorruptStream, DesynchronisedStream) as failure:
            return self._recover_y(y_string, z_hat, failure)
        return self._at(p, profile)

    def _recover_y(
        self, y_string: bytes, z_hat: Tensor, failure: CorruptStream | DesynchronisedStream
    ) -> Latents:
        """Decode the y string with the first of `recovery.ARITHMETICS` that succeeds."""
        for arithmetic in recovery.ARITHMETICS:
            features = recovery.PROCESS.evaluate(self._h_s_digest, self.net.h_s, z_hat, arithmetic)
            try:
                p = recovery.PROCESS.call(
                    self._context_digest, _Decoding(self.context, self.y_tables), arithmetic,
                    y_string, features,
                )  # fmt: skip
            except (CorruptStream, DesynchronisedStream):
                continue
            return self._at(p, arithmetic)
        raise failure

    def _at(self, p: Positions, arithmetic: str) -> Latents:
        symbols, indexes = (
            np.ascontiguousarray(a.transpose(2, 0, 1)) for a in (p.symbols, p.indexes)
        )
        means = torch.from_numpy(p.means).permute(2, 0, 1)[None]
        return self._latents(symbols, indexes, means.contiguous(), arithmetic)

    @cached_property
    def _context_digest(self) -> str:
        digest = hashlib.sha256()
        for part in (self.net.context_prediction, self.net.entropy_parameters):
            for t in part.state_dict().values():
                digest.update(t.numpy().tobytes())
        for table in (self.y_tables.cdf, self.y_tables.length, self.y_tables.offset):
            digest.update(table.tobytes())
        digest.update(self.scale_table.numpy().tobytes())
        return digest.hexdigest()


class _Decoding:
    """The task of the recovery process: decode a y string with other roundings."""

    def __init__(self, context: ContextModel, tables: rans.Tables) -> None:
        self.context, self.tables = context, tables

    def __call__(self, arithmetic: str, y_string: bytes, features: Tensor) -> Positions:
        dtype = torch.float64 if arithmetic == "float64" else torch.float32
        with recovery.settings(arithmetic):
            return self.context.decode(y_string, features, self.tables, dtype)
