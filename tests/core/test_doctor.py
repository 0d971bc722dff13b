"""The doctor: faults are found and each one comes with its mend."""

import json
import os
import subprocess
import sys

import pytest

from mindspeed_core import doctor
from tests.harness import run_command


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed: `installed({"torch": "2.13.0"})` gives the findings."""

    def findings(changes, environment=None):
        found = doctor.Findings(versions=doctor._versions() | changes)
        found.cann = doctor.cann(environment or {})
        doctor._check_versions(found)
        doctor._check_cann(found)
        return [f"{problem['what']}; {problem['mend']}" for problem in found.problems]

    return findings


def test_this_environment_has_no_problem_and_two_ranks_talk():
    done = run_command("mindspeed-core", "doctor", "--json", timeout=240)
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, []), done.stderr
    assert found["collectives"]["gloo"] is True
    assert found["megatron"] is True
    assert found["device"]["count"] >= 1
    assert found["versions"]["torch"]


def test_packages_of_different_versions_are_a_problem(installed):
    (problem,) = installed({"mindspeed-core": "0.1.0", "mindspeed-data": "0.2.0"})
    assert "different versions" in problem
    assert "mindspeed-data 0.2.0" in problem


def test_another_megatron_than_the_pinned_one_is_a_problem(installed):
    assert installed({"megatron-core": "0.19.2"}) == [
        "megatron-core is 0.19.2, not 0.16.1; pip install megatron-core==0.16.1"
    ]


@pytest.mark.parametrize(
    ("torch", "npu", "fits"),
    [("2.13.0+cpu", "2.13.0", True), ("2.6.0", "2.6.0.post5", True), ("2.13.0", "2.12.0", False)],
)
def test_torch_and_torch_npu_must_be_of_the_same_release(installed, tmp_path, torch, npu, fits):
    (tmp_path / "version.cfg").write_text("[version]\nrunning_version=[8.5.0]\n")
    problems = installed({"torch": torch, "torch-npu": npu}, {"ASCEND_HOME_PATH": str(tmp_path)})
    assert len(problems) == (0 if fits else 1)


@pytest.mark.parametrize(
    ("release", "number", "fits"),
    [
        ("2.9.1", "8.3.RC1", False),
        ("2.9.1", "8.5.0", True),
        ("2.8.0.post5", "8.3.RC1", True),
        ("2.14.0", "8.5.0", True),
    ],
)
def test_cann_must_not_be_older_than_torch_npu_asks_for(installed, tmp_path, release, number, fits):
    (tmp_path / "version.cfg").write_text(f"[version]\nrunning_version=[{number}]\n")
    problems = installed(
        {"torch": release.partition(".post")[0], "torch-npu": release}, {"ASCEND_HOME_PATH": str(tmp_path)}
    )
    assert [problem for problem in problems if "needs CANN 8.5, not 8.3.RC1" in problem] == problems
    assert len(problems) == (0 if fits else 1)


def test_torch_npu_without_cann_is_told_with_the_way_out(installed):
    (problem,) = installed({"torch": "2.13.0", "torch-npu": "2.13.0"})
    assert "CANN is not set up" in problem
    assert "set_env.sh" in problem


@pytest.mark.parametrize(
    ("file", "text", "number"),
    [
        ("version.cfg", "# version: 1.0\nruntime_running_version=[8.0.RC3:8.0.RC3]\n", "8.0.RC3"),
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.5.0\n", "8.5.0"),
        ("notes.txt", "version=1", "of unknown version"),
    ],
)
def test_the_version_of_cann_is_read_from_its_own_files(tmp_path, file, text, number):
    home = tmp_path / "cann"
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/version.info").write_text("Version=24.1.rc2\n")
    environment = {"ASCEND_HOME_PATH": str(home), "ASCEND_DRIVER_PATH": str(tmp_path / "driver")}
    assert doctor.cann(environment) == {"cann": number, "npu driver": "24.1.rc2"}


def test_a_trial_that_fails_is_told_in_one_line():
    line = [sys.executable, "-c", "raise OSError('libhccl.so: cannot open shared object file')"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    told, error = doctor._result(process)
    assert (told, error) == (None, "OSError: libhccl.so: cannot open shared object file")
    assert "set_env.sh" in doctor._mend_torch(error)


def test_of_errors_that_led_to_one_another_the_first_is_told():
    program = (
        "try:\n    open('/nowhere/at/all')\nexcept OSError as error:\n    raise RuntimeError('later') from error\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert doctor._result(process) == (
        None,
        "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'",
    )


def test_a_problem_is_shown_with_its_mend():
    found = doctor.Findings(versions={"python": "3.11.7"})
    found.problem("the moon is missing", "put it back")
    assert doctor.lines(found)[-1] == "problem: the moon is missing; put it back"
