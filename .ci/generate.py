#!/usr/bin/env python3
"""Writes what is made from the configuration schema: config.example.toml and the settings table in README.md.

    python .ci/generate.py            write them
    python .ci/generate.py --check    only say whether they are up to date (exit 1 if not)
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import proxai  # noqa: E402

BEGIN, END = "<!-- settings: made by .ci/generate.py -->\n", "<!-- settings: end -->\n"


def settings_table() -> str:
    """The table of all settings, as Markdown."""
    lines = ["| key | default | must be | meaning |", "|---|---|---|---|"]
    for key, default, wants, doc in proxai.settings_rows():
        cells = [f"`{key}`", f"`{default}`" if default else "", wants, doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README's text with the table between its marks replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit("README.md lacks the marks around the settings table")
    return before + BEGIN + settings_table() + END + after


def main() -> int:
    """Write the files, or check them."""
    readme = ROOT / "README.md"
    wanted = {ROOT / "config.example.toml": proxai.example_toml(), readme: with_table(readme.read_text("utf-8"))}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not what the schema makes; run python .ci/generate.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], "utf-8", newline="\n")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
