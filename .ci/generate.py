#!/usr/bin/env python3
"""Writes what is made from tables in proxai.py: config.example.toml, and in README.md the settings and the clients.

    python .ci/generate.py            write them
    python .ci/generate.py --check    only say whether they are up to date (exit 1 if not)
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import proxai  # noqa: E402



def settings_table() -> str:
    """The table of all settings, as Markdown."""
    lines = ["| key | default | must be | meaning |", "|---|---|---|---|"]
    for key, default, wants, doc in proxai.settings_rows():
        cells = [f"`{key}`", f"`{default}`" if default else "", wants, doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def clients() -> str:
    """How each client is pointed at the proxy, as Markdown."""
    return "\n".join(f"```sh\n{proxai.client_settings(client, 'http://127.0.0.1:18080', 'any')}\n```\n"
                     for client in proxai.CLIENTS.values())


def with_parts(readme: str) -> str:
    """The README's text with what stands between the marks of each generated part replaced."""
    for name, make in (("settings", settings_table), ("clients", clients)):
        first, last = f"<!-- {name}: made by .ci/generate.py -->\n", f"<!-- {name}: end -->\n"
        before, begin, rest = readme.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise SystemExit(f"README.md lacks the marks around the {name}")
        readme = before + first + make() + last + after
    return readme


def main() -> int:
    """Write the files, or check them."""
    readme = ROOT / "README.md"
    wanted = {ROOT / "config.example.toml": proxai.example_toml(), readme: with_parts(readme.read_text("utf-8"))}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not what proxai.py makes; run python .ci/generate.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], "utf-8", newline="\n")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
