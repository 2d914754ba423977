"""Planted bugs: a wrong variant is put in place of the right one, the checks run, and those that fail have caught it.

A file of bugs has checks (functions that raise AssertionError), and a table that says of each bug which checks must catch it.
"""

import pytest
import torch


def name_of(check):
    return check.__name__.removeprefix("test_")


def caught_by(checks, cases=((),), also=()):
    """Names of the checks that fail in any of ``cases`` (tuples of what they are called with).

    also : exceptions that mean failing too.
    """
    return {name_of(check) for check in checks if any(fails(check, case, also) for case in cases)}


def fails(check, case=(), also=()):
    torch.manual_seed(0)
    try:
        check(*case)
    except (AssertionError, *also):
        return True
    return False


def must_catch(must, checks, cases=((),), also=(), alone=None):
    """Every check named in ``must`` catches what is planted; where ``must`` is ``alone``, no other check does."""
    asked = checks if must == alone else [check for check in checks if name_of(check) in must]
    found = caught_by(asked, cases, also)
    assert found >= must, f"not caught by {sorted(must - found)}"
    assert found == must, f"{sorted(found - must)} sees it after all: tighten the table"


def bug_tests(bugs, checks, cases=((),), also=(), alone=None):
    """Two tests: that without a bug every check holds, and that each of ``bugs`` (functions of monkeypatch) is caught by
    the checks named beside it."""

    def holds():
        assert caught_by(checks, cases, also) == set()

    @pytest.mark.parametrize("bug", bugs, ids=lambda bug: bug.__name__)
    def is_caught(bug, monkeypatch):
        bug(monkeypatch)
        must_catch(bugs[bug], checks, cases, also, alone)

    return holds, is_caught
