"""Context parallelism of blockwise attention: rows are cut over ranks, and each needs the last block of the one before.

Axes: b batch, n tokens of a rank, w tokens in a block, m tensors in a message.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def block_before(mesh: DeviceMesh, w: int, *tensors: Tensor) -> Tensor:
    """The last w tokens that the rank before has of each of these tensors (b, n, ...): (m, b, w, ...).

    (m, b, 0, ...) on the first rank. All ranks must call it, with as many tensors of the same shape but for n; one
    message goes to the next rank, and one comes back with its gradients. It is waited for when it is first read.
    """
    # Private, but what torch names in place of its public functions that differentiate: those are deprecated, and break
    # graphs.
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    rank, size = mesh.get_local_rank(), mesh.size()
    sent, received = ([w * (to == rank + step) for to in range(size)] for step in (1, -1))
    last = rearrange([t[:, -w:] for t in tensors], "m b w ... -> w m b ...")[: sum(sent)]
    return rearrange(all_to_all_single_autograd(last.contiguous(), received, sent, mesh), "w m b ... -> m b w ...")


def joined(before: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors (b, n, ...), each after its part of what `block_before` gave."""
    return [torch.cat(pair, dim=1) for pair in zip(before.unbind(), tensors, strict=True)]
