"""The processes of one run: alone, or those that `torchrun` started, one per device."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know after a look around."""

    finite: bool  # every loss and gradient since the last look, on every rank
    stopping: bool  # some rank was asked to stop
    seconds: float  # the slowest rank's time since the last look


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those of the run; data parallel by hand.

    Parameters start equal and receive the same averaged gradients, so they stay equal.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> "Ranks":
        """From `torchrun`'s environment; `auto` is CUDA where there is one."""
        world, rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        own = torch.device(kind)
        if kind == "cuda":
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(own)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        if world > 1:
            if kind == "cuda":
                dist.init_process_group("nccl", device_id=own)
            else:
                dist.init_process_group("gloo")
        return cls(rank, world, own)

    @property
    def first(self) -> bool:
        """Whether this process writes the log and the checkpoints."""
        return self.rank == 0

    def equalise(self, modules: Iterable[nn.Module]) -> None:
        """Give every rank the first one's parameters and buffers."""
        if self.world > 1:
            for module in modules:
                for tensor in module.state_dict().values():
                    own = tensor.contiguous()  # a collective wants rows one after another
                    dist.broadcast(own, 0)
                    tensor.copy_(own)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over ranks, in one message. Which parameters have one is
        the same on all: the others are left alone."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not grads:
            return
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat.div_(self.world)
        for g, mean in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            g.copy_(mean.view(g.shape))

    def agree(self, failed: Tensor, stopping: bool, seconds: float) -> Agreement:
        """`failed` is a boolean on the device; reading it is what waits for the device."""
        if self.world == 1:
            return Agreement(not bool(failed), stopping, seconds)
        told = torch.tensor([0.0, stopping, seconds], dtype=torch.float64, device=self.device)
        told[0] = failed
        dist.all_reduce(told, dist.ReduceOp.MAX)
        bad, stop, slowest = told.tolist()
        return Agreement(not bad, bool(stop), slowest)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """End what `join` began."""
        if self.world > 1:
            dist.destroy_process_group()
