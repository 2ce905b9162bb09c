"""The processes of a training run: one alone, or one per device, started by `torchrun`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """What happened on all ranks since the last exchange."""

    finite: bool  # no rank had a loss or gradient that is NaN or infinite
    stopping: bool  # at least one rank received a stop signal
    seconds: float  # time of the slowest rank


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process and its device, in a group of ranks that train one model on different crops.

    All ranks start with equal parameters and apply the same averaged gradients, so the parameters
    stay equal.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> "ProcessGroup":
        """Join the group that `torchrun`'s environment describes.

        `device` is `cpu`, `cuda`, or `auto` for CUDA if available.
        """
        world, rank = (int(os.environ.get(k) or d) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        rank_device = torch.device(kind)
        if kind == "cuda":
            rank_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or "0"))
            torch.cuda.set_device(rank_device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        if world > 1:
            if kind == "cuda":
                dist.init_process_group("nccl", device_id=rank_device)
            else:
                dist.init_process_group("gloo")
        return cls(rank, world, rank_device)

    @property
    def is_first(self) -> bool:
        """True for the process that writes the log and the checkpoints."""
        return self.rank == 0

    def broadcast(self, modules: Iterable[nn.Module]) -> None:
        """Copy the first rank's parameters and buffers to all ranks."""
        if self.world > 1:
            for module in modules:
                for tensor in module.state_dict().values():
                    buffer = tensor.contiguous()  # collectives need contiguous memory
                    dist.broadcast(buffer, 0)
                    tensor.copy_(buffer)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over all ranks, in a single all-reduce.

        Parameters without a gradient are skipped; they must be the same ones on every rank.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not grads:
            return
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat.div_(self.world)
        for g, mean in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            g.copy_(mean.view(g.shape))

    def exchange_status(self, failed: Tensor, stopping: bool, seconds: float) -> GroupStatus:
        """Combine the status of all ranks. `failed` is a boolean on the device.

        Reading `failed` waits until the device has finished its queued work.
        """
        if self.world == 1:
            return GroupStatus(not bool(failed), stopping, seconds)
        values = torch.tensor([0.0, stopping, seconds], dtype=torch.float64, device=self.device)
        values[0] = failed
        dist.all_reduce(values, dist.ReduceOp.MAX)
        any_failed, any_stopping, slowest = values.tolist()
        return GroupStatus(not any_failed, bool(any_stopping), slowest)

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Shut down the communication that `join` set up."""
        if self.world > 1:
            dist.destroy_process_group()
