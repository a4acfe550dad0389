"""Processes, devices, precision, who is alive, how a program ends."""
from util.cluster.devices import (AUTOCAST, PRECISIONS, HostCopy, autocast, check_compiler, memory_gib, select_device,
                                  set_deterministic, set_precision)
from util.cluster.ending import RESTART, Preempted, StopSignals, run_main, stop_signals
from util.cluster.processes import (TIMEOUT, agree, all_reduce_sum, barrier, first_on_host, from_main, gather_to_main,
                                    init, is_main, log, rank, world_size)

__all__ = ["AUTOCAST", "PRECISIONS", "RESTART", "TIMEOUT", "HostCopy", "Preempted", "StopSignals", "agree",
           "all_reduce_sum", "autocast", "barrier", "check_compiler", "first_on_host", "from_main", "gather_to_main",
           "init", "is_main", "log", "memory_gib", "rank", "run_main", "select_device", "set_deterministic",
           "set_precision", "stop_signals", "world_size"]
