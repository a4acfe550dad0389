"""Processes, devices, precision, who is alive, how a program ends."""
from util.cluster.collection import collect_by_hand, collect_garbage
from util.cluster.devices import (AUTOCAST, PRECISIONS, HostCopy, autocast, check_compiler, exact_products, memory_gib,
                                  select_device, set_deterministic, set_precision)
from util.cluster.ending import RESTART, Preempted, StopSignals, end_worker, run_main, stop_signals
from util.cluster.limits import is_shortage
from util.cluster.processes import (TIMEOUT, agree, all_reduce_sum, barrier, fetch, first_on_host, from_main,
                                    gather_to_main, init, is_main, log, pretend, rank, sharers, together,
                                    world_size)
from util.cluster.watch import activity, before_leaving, set_way_on

__all__ = ["AUTOCAST", "PRECISIONS", "RESTART", "TIMEOUT", "HostCopy", "Preempted", "StopSignals", "activity", "agree",
           "all_reduce_sum", "autocast", "barrier", "before_leaving", "check_compiler", "collect_by_hand",
           "collect_garbage", "end_worker", "exact_products", "fetch", "first_on_host", "from_main", "gather_to_main",
           "init", "is_main", "is_shortage", "log", "memory_gib", "pretend", "rank", "run_main", "select_device",
           "set_deterministic", "set_precision", "set_way_on", "sharers", "stop_signals", "together", "world_size"]
