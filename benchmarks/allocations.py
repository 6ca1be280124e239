"""Peak bytes that a piece of work holds at once beyond what was there before it.

Counted from the allocator's own events (torch.profiler, profile_memory=True): scratch inside kernels is
counted, views are not, and both sides of a comparison are counted alike. Memory that a kernel library takes
past PyTorch's allocator is not seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Highest sum of allocations minus frees while ``work`` runs, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def top_operations(work: Callable[[], object], rows: int = 18) -> str:
    """Table of the operations that take most of the time of ``work``, by their own time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    averages = profiler.key_averages()
    return str(averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=45))
