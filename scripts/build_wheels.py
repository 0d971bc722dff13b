"""Build a wheel of every package into one folder: `hatch run wheels [FOLDER]`. Needs no network."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    for package in sorted((ROOT / "packages").iterdir()):
        line = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        subprocess.run(line, cwd=package, check=True)


if __name__ == "__main__":
    main()
