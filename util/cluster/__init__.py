"""Processes, devices and precision, how a program ends."""
from util.cluster.devices import (AUTOCAST, PRECISIONS, autocast, exact_products, memory_gib, select_device,
                                  set_deterministic, set_precision)
from util.cluster.processes import (TIMEOUT, agree, all_reduce_sum, barrier, fetch, first_on_host, from_main,
                                    gather_to_main, init, is_main, log, pretend, rank, world_size)
from util.cluster.stopping import RESTART, STOP_SIGNALS, Preempted, StopSignals, run_main, stop_signals

__all__ = ["AUTOCAST", "PRECISIONS", "RESTART", "STOP_SIGNALS", "TIMEOUT", "Preempted", "StopSignals", "agree",
           "all_reduce_sum", "autocast", "barrier", "exact_products", "fetch", "first_on_host", "from_main",
           "gather_to_main", "init", "is_main", "log", "memory_gib", "pretend", "rank", "run_main", "select_device",
           "set_deterministic", "set_precision", "stop_signals", "world_size"]
