"""Numbers added up over all ranks, as training will do every step: is the sum right, and how fast is it?"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from launch.ranks import Ranks
from pretrain.config import Config

SIZES = {"gloo": (2**16, 2**20, 2**23), "nccl": (2**20, 2**24, 2**28)}  # bytes; the last is about a bucket of gradients
LINK_BYTES = {"gloo": 2**22, "nccl": 2**26}
ROUNDS = 3
MATRIX = {"cpu": (512, 4), "cuda": (8192, 20)}  # side, and products; tens of ms


def add_up(config: Config, ranks: Ranks, nodes: list[str], limit: float, at: Callable[[str], None]) -> dict[str, Any]:
    """Join all ranks, add up, and measure; collective. `nodes` holds the node of every rank; no wait is
    longer than `limit` seconds.

    `sum` is what this rank got and `expected` what is right; `bandwidth` by size in bytes per second of the bus
    (2 (n - 1) / n of the bytes of each rank pass its link); `links`, of the first rank of a node, the bytes per second
    that came from the node before it while all nodes send to their next; `products` seconds for matrix products.
    Raises OSError or RuntimeError, naming what could not be reached.
    """
    at("importing torch")
    before = time.monotonic()
    import torch
    import torch.distributed as dist

    from pretrain.engines.gpus import gpu_of

    imported = time.monotonic() - before
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("engine.device is cuda, but torch sees no GPU")
    cuda = torch.cuda.is_available() and config.engine.device != "cpu"
    device = torch.device("cuda", gpu_of(ranks.local_rank, torch.cuda.device_count())) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    at("multiplying matrices")
    products = _products(torch, device)

    before = time.monotonic()
    timeout = datetime.timedelta(seconds=limit)
    at(f"reaching the first node at {ranks.master_addr}:{ranks.master_port}")
    if ranks.rank > 0:
        reach(ranks.master_addr, ranks.master_port or 0, limit)
    store = dist.TCPStore(
        ranks.master_addr if ranks.world_size > 1 else "127.0.0.1",
        ranks.master_port or 0,
        ranks.world_size,
        is_master=ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    at("joining the other ranks")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("preflight", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    dist.barrier()
    joined = time.monotonic() - before
    at("adding up")
    before = time.monotonic()
    ones = torch.full((SIZES[backend][0] // 4,), float(ranks.rank + 1), device=device)
    dist.all_reduce(ones)
    found = {float(ones.min()), float(ones.max())}
    bandwidth = {size: _bandwidth(torch, dist, size, device) for size in SIZES[backend]}
    at("sending to the next node")
    link = _link(torch, dist, ranks.rank, nodes, LINK_BYTES[backend], device)
    dist.barrier()
    added = time.monotonic() - before
    dist.destroy_process_group()
    return {
        "backend": backend,
        "sum": found.pop() if len(found) == 1 else float("inf"),
        "expected": ranks.world_size * (ranks.world_size + 1) / 2,
        "bandwidth": {str(size): value for size, value in bandwidth.items()},
        "link": link,
        "products": products,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "seconds": {"importing torch": imported, "joining": joined, "adding up": added},
    }


def reach(host: str, port: int, seconds: float) -> None:
    """Wait until something listens there; raises OSError naming it, and what happened instead."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, seconds)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(f"can't reach the first node at {host}:{port} within {seconds:.0f} s: {error}") from None
            time.sleep(0.1)


def _products(torch: Any, device: Any) -> float:
    side, count = MATRIX[device.type]
    matrix = torch.full((side, side), 1 / side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
    result = matrix @ matrix  # the first one starts libraries
    _wait(torch, device)
    before = time.monotonic()
    for _ in range(count):
        result = result @ matrix
    _wait(torch, device)
    return time.monotonic() - before


def _bandwidth(torch: Any, dist: Any, size: int, device: Any) -> float:
    tensor, times = torch.zeros(size // 4, device=device), []
    for _ in range(ROUNDS + 1):  # the first one sets up what the others use
        dist.barrier()
        _wait(torch, device)
        before = time.monotonic()
        dist.all_reduce(tensor)
        _wait(torch, device)
        times.append(time.monotonic() - before)
    world = dist.get_world_size()
    return 2 * (world - 1) / world * size / max(statistics.median(times[1:]), 1e-9)


def _link(torch: Any, dist: Any, rank: int, nodes: list[str], size: int, device: Any) -> float | None:
    """All nodes send to the next one at once, by their first ranks; None for the other ranks and for a single node."""
    firsts = [nodes.index(node) for node in dict.fromkeys(nodes)]
    if rank not in firsts or len(firsts) < 2:
        return None
    place = firsts.index(rank)
    after, before = firsts[(place + 1) % len(firsts)], firsts[place - 1]
    out, into, times = torch.zeros(size, dtype=torch.uint8, device=device), None, []
    for _ in range(ROUNDS + 1):
        into = torch.empty_like(out)
        start = time.monotonic()
        work = dist.batch_isend_irecv([dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, into, before)])
        for one in work:
            one.wait()
        _wait(torch, device)
        times.append(time.monotonic() - start)
    return size / max(statistics.median(times[1:]), 1e-9)


def _wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
