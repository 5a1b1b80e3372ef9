"""Everything that doctor and verify can say is in docs/DOCTOR.md, with cause and cure, and is said somewhere."""

import re
from pathlib import Path

from mnist_dist.checks.findings import CHECKS, COMPARISONS, SENTENCES
from tests.doctor_page import make_tables

REPOSITORY = Path(__file__).parents[3]


def test_the_page_lists_every_sentence() -> None:
    page = (REPOSITORY / "docs" / "DOCTOR.md").read_text()
    assert page.endswith(make_tables()), "write the tables anew: python -m tests.doctor_page"


def test_every_sentence_belongs_to_a_check_and_is_used() -> None:
    code = "".join(path.read_text() for path in (REPOSITORY / "mnist_dist").rglob("*.py"))
    for name, sentence in SENTENCES.items():
        assert sentence.check in {*CHECKS, *COMPARISONS, "{check}"}
        assert code.count(f'"{name}"') > 1, f"{name} is never said"
        for part in (sentence.text, sentence.cause, sentence.cure):
            assert part.strip()
            assert not part.endswith(".")
    assert {s.check for s in SENTENCES.values()} >= {*CHECKS, *COMPARISONS}


def test_fields_are_the_same_words_for_the_same_things() -> None:
    fields = {field for s in SENTENCES.values() for field in re.findall(r"{(\w+)", s.text + s.cause + s.cure)}
    assert not fields & {"node", "worker", "gpu", "process"}
