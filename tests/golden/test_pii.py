"""Personal data by hand: every kind that must go, its neighbours that must stay, planted bugs in the checksums, linear time."""

import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zero2llm.core.config import parse
from zero2llm.data.document import Document
from zero2llm.data.steps import pii
from zero2llm.data.steps.pii import PiiConfig

STEP = PiiConfig().build()


def mask(text: str, step=STEP) -> str:
    return step(Document(text, "here")).text


MASKED = [
    ("write to jo.hn+x@mail.example.co.uk.", "write to <EMAIL>."),
    ("请联系zhang_san@163.com谢谢", "请联系<EMAIL>谢谢"),
    ("'a@b.org', <c@d.net>", "'<EMAIL>', <<EMAIL>>"),
    ("电话+86 138 1234 5678。", "电话<PHONE>。"),
    ("手机13812345678,备用139-8765-4321", "手机<PHONE>,备用<PHONE>"),
    ("3,13812345678,19912345678\n", "3,<PHONE>,<PHONE>\n"),
    ("编号17 8613812345678", "编号17 <PHONE>"),
    ("座机010-62345678转801，(0755) 86013388", "座机<PHONE>转801，<PHONE>"),
    ("call (212) 555-0123 or 212.555.0199", "call <PHONE> or <PHONE>"),
    ("1-800-555-0123; +1 (415) 555-2671 2 times", "<PHONE>; <PHONE> 2 times"),
    ("London +44 20 7946 0958.", "London <PHONE>."),
    ("+4915112345678", "<PHONE>"),
    ("身份证号11010519491231002X，男", "身份证号<ID>，男"),
    ("440308199901101512", "<ID>"),
    ("Visa 4111 1111 1111 1111, CVC 123", "Visa <CARD>, CVC 123"),
    ("4111 1111 1111 1111 123", "<CARD> 123"),
    ("5500-0055-5555-5559 378282246310005 3782 822463 10005", "<CARD> <CARD> <CARD>"),
    ("银联卡6222021234567890128", "银联卡<CARD>"),
    ("from 203.113.17.45:8080 and 81.2.69.142/24.", "from <IP>:8080 and <IP>/24."),
    ("host 2001:4860:4860::8888.", "host <IP>."),
    ("2a00:1450:4001:81b:0:0:0:200e", "<IP>"),
]

KEPT = [
    "ISBN 978-0-306-40615-7, 9780306406157 and 0-306-40615-2",
    "3.14159265358979323846 and 2.7182813812345678",
    "0.4111111111111111 4111111111111112 1234567890123456",
    "In 1819-08-01, 2024.11.21 12:30:45, 20241121123045, 1732192245123 ms",
    "pages 212-555, 1998-2003, 100,000,000 and 1,234,567.89",
    "11010519491231002x0 110105194913310021 990105194912310020",  # goes on; month 13; no such province
    "110105194912310021 110105194912310029",  # wrong check digit
    "version 1.2.3.44, v1.2.3.44, 1.2.3.44-beta, section 10.20.30.40, 版本 4.3.2.100",
    "1.2.3.4 Title; 8.8.8.8; 192.168.1.1; 10.0.0.200; 127.0.0.1; 255.255.255.0; 300.1.2.3; 1.2.3.4.5",
    "std::abc::def dead::beef 12:30:45 ::1 fe80::1 2001:db8::1",
    "logo@2x.png @handle user@localhost pkg@1.2.3 a @ b",
    "138123456789 1381234567 12812345678 x13812345678 13812345678abc",
    "第13章 138 1234 5678 9012 3456",
    "《静夜思》床前明月光，疑是地上霜。一二三四五六七八九十百千万",
    "order 0000000000000000 and 1111111111111111",
]


@pytest.mark.parametrize(("text", "expected"), MASKED, ids=range(len(MASKED)))
def test_masked(text, expected):
    assert mask(text) == expected


@pytest.mark.parametrize("text", KEPT, ids=range(len(KEPT)))
def test_kept(text):
    assert mask(text) == text


def test_notes_count_by_class():
    doc = STEP(Document("a@b.cn c@d.cn 13812345678 81.2.69.142 4111111111111111 11010519491231002X", "here"))
    assert doc.notes == {"e-mail": 2, "phone": 1, "IP address": 1, "card number": 1, "ID number": 1}


def test_masks_are_chosen_and_kinds_left_alone():
    step = parse(PiiConfig, {"email": "[邮箱]", "phone": None, "private_ip": True}).build()
    assert mask("a@b.cn 13812345678 192.168.1.1 fe80::1", step) == "[邮箱] 13812345678 <IP> <IP>"
    for bad in ("", "EMAIL", "<a1>", "<@>", "_X_", "<a:b>"):
        with pytest.raises(ValueError, match="a mask stands in brackets"):
            PiiConfig(email=bad)


SECRETS = [
    ("git clone https://bob:hunter2@git.example.com/x", "git clone https://<KEY>@git.example.com/x"),
    ("key=sk-abcdefghijklmnopqrstuvwx.", "key=<KEY>."),
    ("AKIAIOSFODNN7EXAMPLE", "<KEY>"),
    ("token ghp_" + "a1" * 18, "token <KEY>"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n", "<KEY>\n"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", "<KEY>"),
    ("sk-short https://example.com:8080/@x task-abcdefghijklmnopqrstuvwx", None),
]


@pytest.mark.parametrize(("text", "expected"), SECRETS, ids=range(len(SECRETS)))
def test_secrets_only_where_asked_for(text, expected):
    assert mask(text, PiiConfig(email=None, secret="<KEY>").build()) == (text if expected is None else expected)
    assert mask(text, PiiConfig(email=None).build()) == text


PARTS = st.sampled_from([t for t, _ in MASKED] + KEPT + [*"0123456789 .-:+@()xX中"])


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=12).map("".join))
@example("13812345678a@b.com")
@example("https://a:b@c.com@d.com")
def test_idempotent(text):
    for step in (STEP, PiiConfig(secret="***", private_ip=True).build()):
        once = mask(text, step)
        again = step(Document(once, "here"))
        assert again.text == once and not again.notes


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789 .-:+()aXx中,", max_size=60))
@example("1.2.3.4 " + "81.2.69.142")
def test_runs_miss_nothing(text):
    """Looking only at runs of digits and their signs finds what looking everywhere finds."""
    for pattern, back in ((pii.ID_NUMBER, 0), (pii.CARD, 0), (pii.IPV4, 0), (pii.PHONE, 0)):
        assert [m.span() for m in pii.within_runs(pattern, text, back)] == [m.span() for m in pattern.finditer(text)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["2001:4860", "::", ":", "8888", "2a00", "c", "0", ".", " ", "x"]), max_size=10).map(
        "".join
    )
)
def test_runs_miss_no_address(text):
    everywhere = [m.span() for m in pii.IPV6.finditer(text) if pii.is_line(m[0], False)]
    assert list(pii.ipv6s(text, False)) == everywhere


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1 ",
        "1-",
        "+1",
        "a",
        "a.",
        "a@",
        "@",
        "a@a.",
        ":",
        "a:",
        "::1",
        "1.",
        "(0",
        "(212) ",
        "138 ",
        "4111 ",
        "sk-",
        "://a:",
        "eyJaaaaaaaaaa.",
        "中",
        " ",
        "\n",
    ]
    + ["-----BEGIN PRIVATE KEY-----", "1.1.1.1", "4111111111111111", "+44 20 7946 ", "x@y."],
)
def test_time_is_linear(unit):
    step = PiiConfig(secret="<KEY>").build()
    text = (unit * 100_000)[:100_000]
    start = time.process_time()
    step(Document(text + "!", "here"))
    assert time.process_time() - start < 3


def by_hand(number: str) -> bool:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # printed in GB 11643-1999
    return "10X98765432"[sum(int(d) * w for d, w in zip(number, weights, strict=False)) % 11] == number[17].upper()


def check_id_numbers():
    for i in range(200):
        body = f"110105{1950 + i % 60}{1 + i % 12:02}{1 + i % 28:02}{i * 37 % 1000:03}"
        for last in "0123456789X":
            assert pii.is_id_number(body + last) == by_hand(body + last), body + last
    assert pii.is_id_number("11010519491231002x")
    for wrong in (
        "11010519490231002",
        "99010519491231002",
        "11010519001301002",
        "11010519000229002",
    ):  # 31 February, province 99 ...
        assert not any(pii.is_id_number(wrong + last) for last in "0123456789X"), wrong


def check_cards():
    good = [
        "4111111111111111",
        "5500005555555559",
        "378282246310005",
        "6011000990139424",
        "3530111333300000",
        "30569309025904",
        "2223003122003222",
        "4222222222222",
    ]
    for number in good:
        assert pii.is_card(number), number
        for i, digit in enumerate(number):  # Luhn finds every single wrong digit
            for other in set("0123456789") - {digit}:
                assert not pii.luhn(number[:i] + other + number[i + 1 :]), (number, i, other)
    assert pii.luhn("79927398713") and not pii.luhn("79927398710")
    assert (
        not pii.is_card("0000000000000000") and not pii.is_card("9780306406157") and not pii.is_card("411111111111116")
    )


def test_checksums_by_hand():
    check_id_numbers()
    check_cards()


def wrong_total(weight):
    return lambda n: (
        "10X98765432"[sum(int(d) * weight(i) for i, d in enumerate(n[:17])) % 11] == n[17].upper()
        and n[:2] in pii.PROVINCES
        and pii.is_date(n[6:14])
    )


def luhn_from(first: int, add=lambda d: sum(divmod(2 * d, 10)), modulus: int = 10):
    return lambda n: sum(add(int(d)) if i % 2 == first else int(d) for i, d in enumerate(reversed(n))) % modulus == 0


BUGS = {
    "weights from the wrong end": ("is_id_number", wrong_total(lambda i: 2 ** (i + 1) % 11), check_id_numbers),
    "weights one power off": ("is_id_number", wrong_total(lambda i: 2 ** (16 - i) % 11), check_id_numbers),
    "weights not reduced by the right modulus": (
        "is_id_number",
        wrong_total(lambda i: 2 ** (17 - i) % 10),
        check_id_numbers,
    ),
    "any date": ("is_date", lambda digits: True, check_id_numbers),
    "any province": ("PROVINCES", frozenset(f"{i:02}" for i in range(100)), check_id_numbers),
    "small x is not X": ("is_id_number", lambda n, right=pii.is_id_number: right(n) and n[-1] != "x", check_id_numbers),
    "first digit doubled": ("luhn", luhn_from(0), check_cards),
    "doubled digits not summed": ("luhn", luhn_from(1, add=lambda d: 2 * d), check_cards),
    "no digit doubled": ("luhn", luhn_from(1, add=int), check_cards),
    "modulus 5": ("luhn", luhn_from(1, modulus=5), check_cards),
    "doubling from the left": ("luhn", lambda n: luhn_from(1)(n[::-1]), check_cards),
    "any issuer": ("ISSUERS", ((range(13, 20), "0-9"),), check_cards),
    "any length": ("ISSUERS", tuple((range(13, 20), firsts) for _, firsts in pii.ISSUERS), check_cards),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, wrong, check = BUGS[bug]
    monkeypatch.setattr(pii, name, wrong)
    with pytest.raises(AssertionError):
        check()


BOUNDARIES = {
    "numbers may go on": ("ID_NUMBER", lambda p: p.pattern.replace(pii.DONE, "")),
    "decimals are phones": ("PHONE", lambda p: p.pattern.replace(pii.ALONE, "").replace(pii.DONE, "")),
    "every address": ("SMALL", None),
    "versions are addresses": ("VERSION", lambda p: "$^"),
    "cards may go on": ("CARD", lambda p: p.pattern.replace(pii.ALONE, "").replace(pii.DONE, "")),
    "pictures are mail": ("FILE_ENDINGS", None),
}


@pytest.mark.parametrize("bug", BOUNDARIES)
def test_planted_false_alarms_are_caught(bug, monkeypatch):
    name, change = BOUNDARIES[bug]
    empty = 0 if name == "SMALL" else frozenset()
    monkeypatch.setattr(pii, name, re.compile(change(getattr(pii, name))) if change else empty)
    with pytest.raises(AssertionError):
        for text in KEPT:
            test_kept(text)


def test_embedded_books_hold_nothing_to_mask():
    """Every tenth document of the novels, prose and poems in the package: numbers, dates and names, and not one hit."""
    import lzma
    from importlib.resources import files

    n = 0
    for file in sorted(files("zero2llm.data.embedded").iterdir(), key=str):
        if not file.name.endswith(".xz"):
            continue
        for i, line in enumerate(lzma.decompress(file.read_bytes()).decode().splitlines()):
            if i % 10 == 0:
                doc = STEP(Document(json.loads(line)["text"], f"{file.name}, line {i + 1}"))
                assert not doc.notes, (doc.where, doc.notes)
                n += 1
    assert n > 1000
