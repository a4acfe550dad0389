"""Options of the tests, and their order."""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as programs that tests start have: the same bits
from util.cluster import devices  # noqa: E402  after the number of threads is set

# The goldens first, while a process is small; the method, then the longest files: the processes end together.
ORDER = ("test_goldens", "tests/models/", "test_reliability", "test_programs", "test_extending", "test_evaluation", "test_app", "test_steps",
         "test_options", "test_fake_cuda", "test_metrics", "test_dry_run", "test_processes", "test_parallel", "test_tour", "test_distill",
         "test_pages", "")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the slow tests too: two hosts, small disks, a batch system")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: next(i for i, part in enumerate(ORDER) if part in item.path.as_posix()))
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish():
    gc.freeze()  # what all tests import: a collection would take 0.3 s, and each training makes one


def pytest_configure(config):
    devices.keep_freed_memory = lambda: None  # a process of tests would grow to gigabytes
    config.addinivalue_line("markers", "slow: only with --slow")
