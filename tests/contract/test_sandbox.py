"""Programs of a model: what they may do, what they may not, and that nothing of them is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zero2llm.train.rl import code_reward
from zero2llm.train.rl.answer import Answer
from zero2llm.train.rl.code_reward import CodeConfig, code_of
from zero2llm.train.rl.sandbox import Limits, Program, protections, run, run_all

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX")
FAST = Limits(1, 256)
CONFINED = sys.platform == "linux" and {"seccomp", "landlock"} <= set(protections())
confined = pytest.mark.skipif(not CONFINED, reason="this kernel offers no seccomp or no landlock")


def printed(code: str, given: str = "") -> str | None:
    return run(Program("program", code, given), FAST)


def test_a_program_computes_reads_and_prints():
    assert printed("import math, json, re, collections\nprint(int(input()) + math.floor(1.5))", "41\n") == "42\n"
    assert printed("import os\nprint(sorted(os.environ), os.path.isfile('answer.py'))").split("]")[1] == " True\n"
    assert len({printed("print(hash('the sea'))") for _ in range(2)}) == 1, "hashing is the same in every run"


@pytest.mark.parametrize("code", ["x = 'a' * 10**9", "x = []\nwhile True: x.append('a' * 10**6)", "def", "import numpy", "import zero2llm", "raise SystemExit(3)", "import os\nos.abort()", "print('ok')\nimport os\nos._exit(1)"])  # fmt: skip
def test_what_fails_gives_nothing(code):
    assert printed(code) is None


@pytest.mark.parametrize("code", ["while True: pass", "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\nwhile True: pass"])  # fmt: skip
def test_an_endless_loop_ends(code):
    began = time.monotonic()
    assert printed(code) is None and time.monotonic() - began < 10


def test_sleep_ends_by_the_clock_and_output_is_capped():
    began = time.monotonic()
    assert printed("import time\ntime.sleep(1000)") is None and time.monotonic() - began < 10
    assert printed("while True: print('x' * 1000)") is None


@confined
@pytest.mark.parametrize(
    "code",
    [
        "os.fork()", "import threading\nthreading.Thread(target=print).start()", "import subprocess\nsubprocess.run(['true'])",
        "import socket\nsocket.socket()", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "os.kill(os.getppid(), 0)",
        "os.setsid()", "os.unlink('answer.py')", "open('x', 'w')", "open(os.path.join(os.path.expanduser('~'), 'x'), 'w')",
        "os.chmod('answer.py', 0o777)", "os.mkdir('x')", "open('/etc/hostname').read()", "os.listdir('/')", "open('/proc/self/environ').read()",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", f"open({__file__!r}).read()", "os.execv('/bin/true', ['true'])",
    ],
)  # fmt: skip
def test_what_a_program_may_not(code):
    assert printed(f"import os\ntry:\n    {code.replace(chr(10), chr(10) + '    ')}\nexcept (OSError, RuntimeError, ValueError):\n    print('refused')") == "refused\n"


@confined
def test_a_fork_bomb_stays_one_process():
    before = set(psutil.pids())
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert printed(code) is None
    mine = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not mine


def test_many_run_side_by_side_in_order():
    assert run_all([Program("program", f"print({i})", "") for i in range(12)], FAST) == [f"{i}\n" for i in range(12)]


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is told on Linux alone")
def test_a_killed_run_leaves_no_orphan(tmp_path):
    code = f"from zero2llm.train.rl.sandbox import *\nrun(Program('program', 'import time\\ntime.sleep(60)  # {tmp_path}', ''), Limits(30, 256))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    found: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
        found = psutil.Process(process.pid).children()
    time.sleep(0.5)  # it confines itself first
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(found, timeout=10)
    assert found and not alive


# The reward


def score(text: str, tests, **changes) -> float | str:
    return CodeConfig(seconds=1, **changes).build().score([Answer(text, "stop", 1, {"answer": tests})])[0]


RIGHT = "Here it is:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
TESTS = ["assert f(2) == 4", "assert f('a') == 'aa', 'texts too'", "assert f(1) > 1", "for i in range(3):\n    assert f(i) == 2 * i"]


def test_share_and_all():
    assert score(RIGHT, TESTS) == 1
    half = "def f(x):\n    return 4"
    assert score(half, TESTS) == 0.5 and score(half, TESTS, value="all") == 0 and score(RIGHT, TESTS, value="all") == 1
    pairs = [{"input": "2 3\n", "output": "5"}, {"input": "1 1", "output": "2\n\n"}, {"input": "0 0", "output": "1"}]
    assert score("a, b = map(int, input().split())\nprint(a + b, ' ')", pairs) == pytest.approx(2 / 3)


def test_values_are_compared_as_plain_containers():
    code = "from collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\ndef f(s): return Counter(s)\ndef g(): return [P(1, 2)]\ndef h(): return frozenset('a')"
    assert score(code, ["assert f('aab') == {'a': 2, 'b': 1}", "assert g() == [(1, 2)]", "assert h() == {'a'}"]) == 1


CHEATS = [
    "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "print('passed')\nprint('4')", "import builtins\nbuiltins.AssertionError = ValueError",
    "class Any:\n    def __eq__(self, other): return True\n    def __gt__(self, other): return False\ndef f(x): return Any()",
    "import os\ndef f(x): os.write(1, b'4'); os._exit(0)", "import atexit\natexit.register(lambda: print('4'))\ndef f(x): raise ValueError",
    "def f(x):\n    import sys\n    sys.exit(0)", "def f(x): return f(x)", "f = 4", "", "```python\n```", "def f(x:\n", "x" * 100_000,
    "class R:\n    def __repr__(self): return '4 if 1 else 5'\n    def __gt__(self, other): return False\ndef f(x): return R()",
]  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_only_looks_like_success_is_none(cheat):
    assert score(cheat, ["assert f(2) == 4", "assert f(2) > 3"]) == 0


def test_the_right_value_is_never_in_the_child(monkeypatch):
    seen = []
    monkeypatch.setattr(code_reward, "run_all", lambda programs, limits: seen.extend(programs) or [None] * len(programs))
    score(RIGHT, ["assert f(2) == 987654321", {"input": "2", "output": "987654321"}])
    assert len(seen) == 2 and not any("987654321" in text for p in seen for text in (p.code, p.check, p.given))


def test_one_bad_answer_costs_no_other():
    rule = CodeConfig(seconds=1).build()
    answer = lambda text, **record: Answer(text, "stop", 1, record)
    found = rule.score([answer(RIGHT, answer=TESTS[0]), answer("while True: pass", answer=TESTS[0]), answer(RIGHT), answer(RIGHT, answer=["assert f(2) =="]),
                        answer(RIGHT, answer=[7]), answer(RIGHT, answer=[]), answer(RIGHT, gt=["assert f(2) == 4"])])  # fmt: skip
    assert found[:2] == [1, 0] and found[6] == 1
    assert "no tests" in found[2] and "no Python" in found[3] and "not 7" in found[4] and "no tests" in found[5]


def test_the_last_block_is_the_program():
    assert code_of("```\na\n```\ntext\n```python\nb\n") == "b\n" and code_of("plain") == "plain"


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="seconds = 0"):
        CodeConfig(seconds=0)
    with pytest.raises(ValueError, match="memory = 8"):
        CodeConfig(memory=8)
    monkeypatch.setattr(code_reward.os, "name", "nt")
    with pytest.raises(ValueError, match="'nt'"):
        CodeConfig()
