"""One thread per test process: two run side by side, and tiny tensors gain nothing from more.

`--oracles=FILE` writes what the tests marked ``oracle("part:name", of="...", way="forward" | "backward" | "both")`` measured:
the largest difference that their assert_close calls saw, relative to the largest value where that is above 1. `zero2llm conformance` reads it.
"""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from zero2llm.core.log import console, err_console

torch.set_num_threads(1)
FOUND: dict[str, dict] = {}


def pytest_addoption(parser):
    parser.addoption("--oracles", help="write the errors of the oracle tests to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "oracle(*names, of, way): compares the named mechanisms with an independent implementation")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    console.cache_clear()  # its width is read from the environment once
    err_console.cache_clear()


@pytest.fixture(autouse=True)
def _oracle_errors(request, monkeypatch):
    mark = request.node.get_closest_marker("oracle")
    if mark is None or not request.config.getoption("--oracles"):
        yield
        return
    seen, right = [], torch.testing.assert_close

    def measure(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            a, b = a.detach().double(), b.detach().double()
            if a.numel():
                seen.append(float((a - b).abs().nan_to_num().max() / b.abs().max().clamp(min=1.0)))
        elif isinstance(a, (tuple, list)):
            for x, y in zip(a, b, strict=True):
                measure(x, y)
        elif isinstance(a, dict):
            for key in a:
                measure(a[key], b[key])

    def assert_close(actual, expected, **more):
        right(actual, expected, **more)
        measure(actual, expected)

    monkeypatch.setattr(torch.testing, "assert_close", assert_close)
    yield
    for name in mark.args if seen else ():
        for way in ("forward", "backward") if mark.kwargs["way"] == "both" else (mark.kwargs["way"],):
            old = FOUND.setdefault(name, {}).setdefault(way, {"error": 0.0, "of": []})
            old["error"] = max(old["error"], *seen)
            old["of"] += [mark.kwargs["of"]] if mark.kwargs["of"] not in old["of"] else []


def pytest_sessionfinish(session):
    if session.config.getoption("--oracles"):
        for ways in FOUND.values():
            for way in ways.values():
                way["of"] = ", ".join(way["of"])
        with open(session.config.getoption("--oracles"), "w", encoding="utf-8") as file:
            json.dump(FOUND, file, indent=1)
