"""What this machine can run: versions, device, CANN, Megatron, collectives; each fault comes with its mend.

Everything that can break an interpreter (an installed torch_npu without CANN does) is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

OURS = ("core", "data", "convert", "train", "eval", "serve")
OTHERS = ("torch", "torch-npu", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")
TIMEOUT = 180.0  # seconds for one trial; the first import after an installation is slow
# the oldest CANN that the torch_npu of a release of torch runs on, by the table in torch_npu's README
OLDEST_CANN = {
    "2.6": (8, 2),
    "2.7": (8, 3),
    "2.8": (8, 3),
    "2.9": (8, 5),
    "2.10": (8, 5),
    "2.11": (8, 5),
    "2.12": (8, 5),
}


@dataclass
class Findings:
    """What was found; `problems` holds what is wrong and how to mend it."""

    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    cann: dict[str, str] = field(default_factory=dict)
    megatron: bool = False
    collectives: dict[str, bool] = field(default_factory=dict)  # backend -> an all-reduce over ranks gave the sum
    problems: list[dict[str, str]] = field(default_factory=list)

    def problem(self, what: str, mend: str) -> None:
        self.problems.append({"what": what, "mend": mend})


def examine() -> Findings:
    """Look at everything; takes some ten seconds."""
    findings = Findings()
    findings.versions = _versions()
    _check_versions(findings)
    findings.cann = cann(os.environ)
    _check_cann(findings)
    if "torch" in findings.versions:
        _try_device(findings)
        _try_megatron(findings)
        _try_collectives(findings)
    return findings


def lines(findings: Findings) -> list[str]:
    """The findings as a person reads them."""
    device = findings.device
    shown = [f"{name:14} {number}" for name, number in findings.versions.items()]
    if device:
        memory = f", {device['memory'] / 2**30:.0f} GiB" if device.get("memory") else ""
        shown.append(f"{'device':14} {device['count']} x {device['type']} ({device['name']}{memory})")
    shown += [f"{name:14} {number}" for name, number in findings.cann.items()]
    if findings.megatron:
        shown.append(f"{'megatron':14} loads")
    shown += [
        f"{backend:14} {'two ranks add up' if works else 'fails'}" for backend, works in findings.collectives.items()
    ]
    shown += [f"problem: {problem['what']}; {problem['mend']}" for problem in findings.problems]
    return shown if findings.problems else [*shown, "no problems found"]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*(f"mindspeed-{part}" for part in OURS), *OTHERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _check_versions(findings: Findings) -> None:
    versions = findings.versions
    ours = {name: number for name, number in versions.items() if name.startswith("mindspeed-")}
    minors = {".".join(number.split(".")[:2]) for number in ours.values()}
    if len(minors) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in ours.items())
        findings.problem(f"the packages are of different versions ({listed})", "install the same minor version of all")
    for name in ("torch", "megatron-core"):
        if name not in versions:
            findings.problem(f"{name} is not installed", "pip install mindspeed-core")
    for name, wanted in _pins().items():
        if name in versions and versions[name] != wanted:
            findings.problem(f"{name} is {versions[name]}, not {wanted}", f"pip install {name}=={wanted}")
    npu, torch = versions.get("torch-npu"), versions.get("torch")
    if npu and torch and not _pair(torch, npu):
        release = torch.partition("+")[0]
        findings.problem(
            f"torch_npu {npu} is made for another torch than {torch}", f"pip install 'torch-npu=={release}.*'"
        )


def _pins() -> dict[str, str]:
    """The exact versions that mindspeed-core asks for."""
    required = distribution("mindspeed-core").requires or []
    return {found[1]: found[2] for text in required if (found := re.match(r"([\w-]+)==([\d.]+)$", text))}


def _pair(torch: str, npu: str) -> bool:
    """torch_npu 2.6.0.post5 belongs to torch 2.6.0."""
    return re.findall(r"\d+", torch)[:3] == re.findall(r"\d+", npu)[:3]


def cann(environment: Mapping[str, str]) -> dict[str, str]:
    """The versions of CANN and of the NPU driver as their own files give them."""
    found = {}
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if home:
        patterns = ("version.cfg", "*/ascend_toolkit_install.info", "*/version.info")
        found["cann"] = _version_in([file for pattern in patterns for file in sorted(Path(home).glob(pattern))])
    driver = Path(environment.get("ASCEND_DRIVER_PATH", "/usr/local/Ascend/driver")) / "version.info"
    if driver.is_file():
        found["npu driver"] = _version_in([driver])
    return found


def _version_in(files: list[Path]) -> str:
    for file in files:
        match = re.search(r"(?im)^\s*(?:\w+_)*version\s*=\s*\[?\W*([\w.]*\d[\w.]*)", file.read_text(errors="replace"))
        if match:
            return match[1]
    return "of unknown version"


def _check_cann(findings: Findings) -> None:
    if "torch-npu" in findings.versions and "cann" not in findings.cann:
        findings.problem(
            "torch_npu is installed, but CANN is not set up in this shell",
            "source CANN's set_env.sh (often /usr/local/Ascend/ascend-toolkit/set_env.sh), or pip uninstall torch-npu: "
            "without CANN it keeps torch from being imported",
        )
    release = ".".join(findings.versions.get("torch-npu", "").split(".")[:2])
    oldest, found = OLDEST_CANN.get(release), re.match(r"(\d+)\.(\d+)", findings.cann.get("cann", ""))
    if oldest is not None and found is not None and (int(found[1]), int(found[2])) < oldest:
        wanted = ".".join(map(str, oldest))
        findings.problem(
            f"torch_npu {findings.versions['torch-npu']} needs CANN {wanted}, not {findings.cann['cann']}",
            f"install CANN {wanted} or newer, or the torch and torch_npu of an older release",
        )
    if "npu driver" in findings.cann and "torch-npu" not in findings.versions:
        findings.problem(
            "this machine has an NPU driver, but torch_npu is missing", "pip install 'mindspeed-core[npu]'"
        )


# ------------------------------------------------------------------------------- trials, each in its own processes


def _try_device(findings: Findings) -> None:
    told, error = _trial("device")
    if told is None:
        findings.problem(f"torch does not start: {error}", _mend_torch(error))
        return
    findings.device = told
    if findings.cann.get("cann") and told["type"] != "npu":
        findings.problem("CANN is set up, but torch sees no NPU", "check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES")


def _mend_torch(error: str) -> str:
    if "undefined symbol" in error:
        return "torch, torch_npu and CANN do not fit; the table in torch_npu's README names versions that do"
    if any(sign in error for sign in ("torch_npu", "ASCEND_", "libascend", "libhccl")):
        return "source CANN's set_env.sh, or pip uninstall torch-npu"
    return "pip install --force-reinstall torch"


def _try_megatron(findings: Findings) -> None:
    if not findings.device or "megatron-core" not in findings.versions:
        return
    told, error = _trial("megatron")
    findings.megatron = told is not None
    if told is None:
        findings.problem(f"megatron.core does not load: {error}", "pip install --force-reinstall mindspeed-core")


def _try_collectives(findings: Findings) -> None:
    """An all-reduce over two ranks, on gloo and, where there are two devices, on theirs."""
    if not findings.device:
        return
    backends = {"gloo": "cpu"}
    if findings.device["count"] > 1 and findings.device["type"] != "cpu":
        backends[findings.device["backend"]] = findings.device["type"]
    for backend, device in backends.items():
        error = _all_reduce(device)
        findings.collectives[backend] = error is None
        if error is not None:
            mend = {
                "gloo": "check that the loopback interface is up and that the temporary folder can be written",
                "hccl": "check `hccn_tool` links and that all devices are free (npu-smi info)",
            }.get(backend, "check that all devices are free")
            findings.problem(f"two {backend} ranks cannot talk: {error}", mend)


def _trial(*arguments: str) -> tuple[Any, str]:
    """(what the trial printed, "") or (None, its error in one line)."""
    process = _start(*arguments)
    return _result(process)


def _all_reduce(device: str) -> str | None:
    """None when two ranks got the sum, else the error in one line."""
    with tempfile.TemporaryDirectory(prefix="mindspeed-doctor-") as folder:
        ranks = [_start("collective", device, str(rank), f"{folder}/store") for rank in range(2)]
        try:
            results = [_result(rank) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    errors = [error for told, error in results if told is None]
    wrong = [f"the sum was {told} instead of 3" for told, _ in results if told not in (None, 3)]
    return next(iter([*errors, *wrong]), None)


def _start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    line = [sys.executable, "-m", "mindspeed_core.doctor", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _result(process: subprocess.Popen[str]) -> tuple[Any, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"no answer within {TIMEOUT:.0f} s"
    if process.returncode == 0:
        return json.loads(out.strip().splitlines()[-1]), ""
    return None, _cause(err) or f"exit code {process.returncode}"


def _cause(text: str) -> str:
    """The line that says why, of a traceback that may show how one error led to another; torch_npu adds lines in brackets."""
    first = text.partition("The above exception was the direct cause")[0]
    lines = [line.strip() for line in first.splitlines() if line.strip() and not line.startswith("[")]
    return lines[-1] if lines else ""


def _device() -> dict[str, Any]:
    from mindspeed_core.device import Device

    device = Device.open("auto")
    facts = {"type": device.type, "backend": device.backend, "count": device.count()}
    if device.module is None:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {**facts, "name": f"{platform.machine()}, {os.cpu_count()} cores", "memory": pages}
    import torch

    torch.ones(2, 2, device=device.torch).mm(torch.ones(2, 2, device=device.torch)).cpu()
    properties = device.module.get_device_properties(device.index)
    return {**facts, "name": properties.name, "memory": properties.total_memory}


def _megatron() -> bool:
    from mindspeed_core import megatron
    from mindspeed_core.device import Device

    megatron.load(Device.open("auto"))
    import megatron.core.models.gpt

    return True


def _collective(name: str, rank: str, store: str) -> float:
    os.environ["LOCAL_RANK"] = rank
    import torch
    import torch.distributed as dist

    from mindspeed_core.device import Device

    device = Device.open(name)
    dist.init_process_group(device.backend, init_method=f"file://{store}", rank=int(rank), world_size=2)
    value = torch.full((4,), float(rank) + 1, device=device.torch)
    dist.all_reduce(value)
    dist.barrier()
    dist.destroy_process_group()
    return value[0].item()


if __name__ == "__main__":
    trial, *rest = sys.argv[1:]
    print(json.dumps({"device": _device, "megatron": _megatron, "collective": _collective}[trial](*rest)))
