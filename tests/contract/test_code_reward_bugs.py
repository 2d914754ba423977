"""Wrong ways to score a program, and the checks that see them."""

from __future__ import annotations

import os

import pytest

from tests.golden.planted import bug_tests
from zero2llm.train.rl import code_reward
from zero2llm.train.rl.answer import Answer
from zero2llm.train.rl.code_reward import CodeConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX")
TWICE = "def f(x): return 2 * x"


def scores(*pairs, **changes):
    """Of (text, tests); no tests = a record without."""
    answers = [Answer(text, "stop", 1, {} if tests is None else {"answer": tests}) for text, tests in pairs]
    return CodeConfig(seconds=1, **changes).build().score(answers)


def check_share():
    tests = ["assert f(2) == 4", "assert f(3) == 6", "assert f(0) == 1", "assert f(1) > 5"]
    assert scores((TWICE, tests), (TWICE, tests[:2])) == [0.5, 1]
    assert scores((TWICE, tests), (TWICE, tests[:2]), value="all") == [0, 1]


def check_cheats():
    cheats = ["import os\nos._exit(0)", "raise SystemExit(0)", "print(4)", "class A:\n    def __eq__(self, other): return True\nf = lambda x: A()",
              "import os\nos.write(3, b'4')\nos._exit(0)"]  # fmt: skip
    assert scores(*[(cheat, "assert f(2) == 4") for cheat in cheats]) == [0] * len(cheats)
    assert scores(*[(cheat, "f(2) and g()") for cheat in cheats]) == [0] * len(cheats)


def check_apart():
    found = scores((TWICE, "assert f(2) == 4"), ("while True: pass", "assert f(2) == 4"), (TWICE, None), (TWICE, [""]))
    assert found[:2] == [1, 0] and isinstance(found[2], str) and isinstance(found[3], str)
    loops = "def f(x):\n    while x > 2: pass\n    return 2 * x"
    assert scores((loops, ["assert f(9) == 18", "assert f(1) == 2"])) == [0.5]


def check_output():
    pair = {"input": "3", "output": "5 6\n7"}
    cases = ["print('5 6 ')\nprint(4 + int(input()))\nprint()", "print('5 6\\n7\\n8')", "print('5 6\\n7')\nraise SystemExit(1)", "print('5  6\\n7')", "print('x5 6\\n7')"]
    assert scores(*[(code, pair) for code in cases]) == [1, 0, 0, 0, 0]


def check_block():
    assert scores((f"First ```\ndef f(x): return 1\n``` then\n```python\n{TWICE}\n``` done", "assert f(2) == 4"), (TWICE, "assert f(2) == 4")) == [1, 1]


def check_values():
    code = "def f(x): return [x, (x,), {x: {x}}, None, 1.5, 'a']"
    assert scores((code, "assert f(1) == [1, (1,), {1: {1}}, None, 1.5, 'a']"), (code, "assert f(1) == [1, [1], {1: {1}}, None, 1.5, 'a']")) == [1, 0]
    assert scores(("f = lambda x: str(x)", "assert f(1) == 1"), ("f = lambda x: x / 2", "assert f(2) == 1")) == [0, 1]


CHECKS = [check_share, check_cheats, check_apart, check_output, check_block, check_values]


def running_is_passing(patch):
    patch.setattr(code_reward, "passes", lambda test, printed, nonce: printed is not None)


def the_child_compares(patch):
    patch.setattr(code_reward, "as_test", lambda text: code_reward.Test(check=text) if isinstance(text, str) and text else right_as_test(text))


def no_nonce(patch):
    right = code_reward.passes
    patch.setattr(code_reward, "passes", lambda test, printed, nonce: right(test, printed if printed is None or printed.startswith(nonce) else nonce + printed, nonce))


def one_test_is_enough(patch):
    right = code_reward.passes
    done = set()

    def passes(test, printed, nonce):
        if right(test, printed, nonce):
            done.add(nonce)
        return nonce in done

    patch.setattr(code_reward, "passes", passes)


def no_tests_are_failed_tests(patch):
    right = code_reward.asked
    patch.setattr(code_reward, "asked", lambda record: [code_reward.Test(check="1 / 0")] if isinstance(right(record), str) else right(record))


def output_that_holds_it(patch):
    patch.setattr(code_reward, "_lines", lambda text: Within(text))


class Within(str):
    def __eq__(self, other):
        return other.strip() in self

    __hash__ = str.__hash__


def the_first_block(patch):
    patch.setattr(code_reward, "code_of", lambda text: (code_reward.FENCED.findall(text) or [text])[0])


def compared_as_text(patch):
    right = code_reward.passes
    patch.setattr(code_reward, "passes", lambda test, printed, nonce: printed == nonce + test.value if test.value and printed else right(test, printed, nonce))


right_as_test = code_reward.as_test
BUGS = {
    running_is_passing: {"check_share", "check_cheats", "check_output", "check_values"},
    the_child_compares: {"check_cheats"},
    no_nonce: {"check_cheats"},
    one_test_is_enough: {"check_share"},
    no_tests_are_failed_tests: {"check_apart"},
    output_that_holds_it: {"check_output"},
    the_first_block: {"check_block"},
    compared_as_text: {"check_values"},
}
test_scoring, test_bugs_are_caught = bug_tests(BUGS, CHECKS, also=(ValueError,))
