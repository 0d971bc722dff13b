"""The scripts of a release: the next version is written everywhere, and wheels install as they say."""

import datetime
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TODAY = datetime.date(2030, 1, 2)


@pytest.fixture
def bump():
    spec = importlib.util.spec_from_file_location("bump", ROOT / "scripts/bump.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    """The files that a bump touches, with something to release."""
    for file in ROOT.glob("packages/*/pyproject.toml"):
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0]\n")
    return tmp_path


def test_a_bump_writes_versions_pins_and_changelog(bump, repository):
    assert bump.bump(repository, "1.2.0", TODAY) == "1.2.0"
    train = (repository / "packages/mindspeed-train/pyproject.toml").read_text()
    assert 'version = "1.2.0"' in train
    assert '"mindspeed-core==1.2.*"' in train
    assert '"mindspeed-data==1.2.*"' in train
    assert "megatron-core==0.16.1" in (repository / "packages/mindspeed-core/pyproject.toml").read_text()
    changelog = (repository / "CHANGELOG.md").read_text()
    assert changelog.startswith(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2030-01-02\n\n### Added\n\n- A thing.\n"
    )


@pytest.mark.parametrize(
    ("old", "wanted", "new"),
    [
        ("0.1.0", "patch", "0.1.1"),
        ("0.1.3", "minor", "0.2.0"),
        ("0.9.3", "major", "1.0.0"),
        ("0.1.0", "0.1.5", "0.1.5"),
    ],
)
def test_a_part_names_the_next_version(bump, old, wanted, new):
    assert bump.following(old, wanted) == new


@pytest.mark.parametrize(("wanted", "reason"), [("next", "neither major"), ("0.0.9", "does not come after")])
def test_a_version_that_makes_no_sense_is_refused(bump, wanted, reason):
    with pytest.raises(SystemExit, match=reason):
        bump.following("0.1.0", wanted)


def test_nothing_is_written_where_the_changelog_is_silent(bump, repository):
    (repository / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [0.1.0]\n")
    before = {file: file.read_text() for file in repository.rglob("*.*") if file.is_file()}
    with pytest.raises(SystemExit, match="nothing stands under"):
        bump.bump(repository, "minor", TODAY)
    assert before == {file: file.read_text() for file in before}


def test_wheels_hold_the_sources_their_data_and_the_licence(tmp_path):
    pytest.importorskip("hatchling")
    line = [sys.executable, str(ROOT / "scripts/build_wheels.py"), str(tmp_path)]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    wheels = {wheel.name.partition("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in tmp_path.glob("*.whl")}
    assert len(wheels) == 6
    for name, files in wheels.items():
        sources = ROOT / f"packages/{name.replace('_', '-')}/src"
        wanted = {
            file.relative_to(sources).as_posix()
            for file in sources.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert wanted <= set(files)
        assert any(file.endswith("licenses/LICENSE") for file in files), name
