"""The tables of docs/DOCTOR.md: everything that `doctor` and `verify` can say.

python -m tests.doctor_page      writes them anew
"""

from mnist_dist.checks.findings import CHECKS, COMPARISONS, SENTENCES
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "DOCTOR.md"
BEGIN = "<!-- The tables below are written by python -m tests.doctor_page. -->\n"


def make_tables() -> str:
    """A table a check: what can be said, the cause, the cure."""
    parts = []
    for title, checks in (("What doctor says", CHECKS), ("What verify says", COMPARISONS)):
        parts.append(f"\n## {title}\n")
        for check, passed in checks.items():
            parts.append(f"\n**{check}** passes where {passed}.\n\n| | it says | cause | cure |\n|---|---|---|---|\n")
            for sentence in SENTENCES.values():
                if sentence.check == check:
                    cells = (str(sentence.status), sentence.text, sentence.cause, sentence.cure)
                    parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    skipped = SENTENCES["skipped"]
    parts.append(f"\n**Any check** that cannot be done: {skipped.status}, {skipped.text}; {skipped.cure}.\n")
    return "".join(parts)


def main() -> None:
    """Write them."""
    head, _, _ = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + make_tables())


if __name__ == "__main__":
    main()
