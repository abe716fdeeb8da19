"""The README and the pages of docs/ as tests read them: sections, tables, and the code in them.

A block of Python is run as it stands, after those before it on its page. One with prompts has to
print what it shows; only the instruction set may be another.
"""

import doctest
import re
from typing import Any, NamedTuple

from support.processes import ROOT

INSTRUCTION_SETS = re.compile(r"\b(avx512|avx2|default|neon)\b")


class Block(NamedTuple):
    page: str
    line: int
    code: str

    def run(self, names: dict[str, Any]) -> None:
        if not self.code.startswith(">>>"):
            exec(compile("\n" * self.line + self.code, self.page, "exec"), names)
            return
        test = doctest.DocTestParser().get_doctest(
            self.code, names, self.page, self.page, self.line
        )
        said: list[str] = []
        runner = doctest.DocTestRunner(_OnAnyProcessor(), verbose=False)
        runner.run(test, out=said.append, clear_globs=False)
        names.update(test.globs)
        assert not said, "".join(said)


class _OnAnyProcessor(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        want, got = (INSTRUCTION_SETS.sub("any", text) for text in (want, got))
        return super().check_output(want, got, optionflags)


def pages() -> list[str]:
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def section(page: str, title: str) -> str:
    """What stands under a heading of any level, up to the next one as high."""
    text = text_of(page)
    start = re.search(rf"^(#+) {re.escape(title)}\n", text, re.M)
    assert start, f"{page} has no section {title!r}"
    end = re.search(rf"^#{{1,{len(start[1])}}} ", _without_code(text[start.end() :]), re.M)
    return text[start.end() :][: end.start() if end else None]


def _without_code(text: str) -> str:
    """As long as the text, so that places agree: a comment of Python is no heading."""
    return re.sub(r"```.*?```", lambda block: "x" * len(block[0]), text, flags=re.S)


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]
