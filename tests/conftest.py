"""Make the project's packages and the tests' helpers importable from anywhere."""
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
