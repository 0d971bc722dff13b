"""Give all six packages the next version: `hatch run bump major|minor|patch|X.Y.Z`.

Writes the versions, the pins between the packages and the heading of the changelog; commits nothing.
"""

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: bump.py major|minor|patch|X.Y.Z")
    print(bump(ROOT, sys.argv[1], datetime.date.today()))


def bump(root: Path, wanted: str, today: datetime.date) -> str:
    """Write the next version into the repository at `root`; the version."""
    projects = sorted(root.glob("packages/*/pyproject.toml"))
    old = _replace(projects[0].read_text(), r'^version = "(.+)"$')[0]
    new = following(old, wanted)
    minor = ".".join(new.split(".")[:2])
    written = {}
    for file in projects:
        text = file.read_text()
        found, text = _replace(text, r'^version = "(.+)"$', f'version = "{new}"')
        if found != old:
            sys.exit(f"{file}: version {found}, where the others have {old}; make them agree first")
        written[file] = re.sub(r'"(mindspeed-\w+)==[^"]+"', rf'"\1=={minor}.*"', text)
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text()
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    if unreleased is None or not unreleased[1].strip():
        sys.exit(f"{changelog}: nothing stands under [Unreleased]; say first what the new version brings")
    written[changelog] = text.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{new}] - {today.isoformat()}\n", 1)
    for file, text in written.items():
        file.write_text(text)
    return new


def following(old: str, wanted: str) -> str:
    """The version that `wanted` (a part or a version) names after `old`."""
    numbers = [int(part) for part in old.split(".")]
    parts = ["major", "minor", "patch"]
    if wanted in parts:
        place = parts.index(wanted)
        return ".".join(map(str, [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]))
    if not re.fullmatch(r"\d+\.\d+\.\d+", wanted):
        sys.exit(f"{wanted}: neither major, minor, patch nor a version such as 0.2.0")
    if [int(part) for part in wanted.split(".")] <= numbers:
        sys.exit(f"{wanted} does not come after {old}")
    return wanted


def _replace(text: str, pattern: str, new: str | None = None) -> tuple[str, str]:
    match = re.search(pattern, text, flags=re.MULTILINE)
    if match is None:
        sys.exit(f"no line matches {pattern}")
    return match[1], text if new is None else text[: match.start()] + new + text[match.end() :]


if __name__ == "__main__":
    main()
