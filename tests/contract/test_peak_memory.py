"""The peak memory that runs and reports show is this program's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from zero2llm.lab.measure import peak_rss_mb


def test_it_grows_with_what_is_held():
    before = peak_rss_mb()
    held = np.ones(int(before * 2**20 / 8) + 2**24)  # as much again, and 128 MiB
    assert peak_rss_mb() >= before + 100 and held[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage counts the new program alone")
def test_it_is_not_that_of_the_program_that_started_this_one():
    held = np.ones(2**27)  # 1 GiB
    child = "from zero2llm.lab.measure import peak_rss_mb; print(peak_rss_mb())"
    found = float(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
    assert found < 1000 <= peak_rss_mb() and held[0] == 1
