"""Every clause of CONTRACT.md has exactly one test, and every test is a clause, word for word."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from messaging_sdk.capabilities import FLAGS
from messaging_sdk_contract.contract_text import all_cases, clause_line
from messaging_sdk_contract.doubles import DOUBLES
from messaging_sdk_contract.probes import PROBES

DOCUMENT = Path(__file__).parents[1] / "CONTRACT.md"
CLAUSE = re.compile(r"- \*\*([A-Z]{3}-\d\d)\*\* ")
WHOLE_FAMILIES = ("DEL", "ACK", "RED", "ORD", "GRP", "MSG", "BAT", "LIF")
ALSO = [f"CAP-0{n}" for n in range(1, 6)] + ["FLT-01", "FLT-02", "FLT-04", "FLT-05", "FLT-10"]


def written() -> dict[str, str]:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    found = [(match[1], line) for line in lines if (match := CLAUSE.match(line))]
    assert len(found) == len(dict(found)), "a clause is written twice"
    return dict(found)


def test_every_clause_has_a_test_and_every_test_a_clause() -> None:
    tested = Counter(case.id for case in all_cases())
    assert set(written()) == set(tested)
    assert tested.most_common(1)[0][1] == 1, "two tests of one clause"


def test_a_clause_says_what_its_test_says() -> None:
    assert {case.id: clause_line(case) for case in all_cases()} == written()


def test_the_families_that_were_promised_are_there() -> None:
    clauses = set(written())
    assert clauses >= set(ALSO)
    assert {c.split("-")[0] for c in clauses} >= set(WHOLE_FAMILIES)


def test_a_test_is_named_after_its_clause() -> None:
    for case in all_cases():
        prefix = f"test_{case.id.lower().replace('-', '_')}_"
        assert case.body.__name__.startswith(prefix)


def test_every_flag_has_a_probe_and_cases_name_only_flags() -> None:
    assert set(PROBES) == set(FLAGS)
    assert {flag for case in all_cases() for flag in case.flags} <= set(FLAGS)


def test_every_double_names_clauses_that_exist() -> None:
    clauses = set(written())
    assert len({d.name for d in DOUBLES}) == len(DOUBLES) >= 28
    for double in DOUBLES:
        assert double.bug and double.why
        assert {c.split(".")[0] for c in double.clauses} <= clauses, double.name
