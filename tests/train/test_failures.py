"""A rank dies, hangs or goes its own way: the job ends soon, says which one and what the others waited for, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mindspeed_core.checkpoint import native
from mindspeed_core.errors import InputError
from mindspeed_core.recipe import load
from mindspeed_train.config import Recipe
from tests.harness import ROOT, RankError, run_ranks
from tests.train import models, runs

RELATIVE = 1e-5  # fp32 sums in another order
TIMEOUT = 6  # seconds a rank waits for the others
SOON = 40  # seconds from the accident to the end, on a machine that does much else
START = 240  # seconds to come so far
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

OVERLAP = ("distributed", "overlap_grad_reduce", "overlap_param_gather")

Hurt = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def hurt(where: Path, tmp_path: Path) -> Iterator[Hurt]:
    """Run a recipe on some ranks, one of which meets an accident; nothing of it may stay."""
    with tempfile.TemporaryDirectory() as aside:

        def run(
            accident: str,
            *overrides: str,
            launcher: list[str] | None = None,
            model: dict[str, Any] = runs.SIZES,
        ) -> subprocess.CompletedProcess[str]:
            recipe = tmp_path / "recipe.yaml"
            sections = {"train": {"steps": 3}, "checkpoint": {"every": 1}, "model": model}
            recipe.write_text(json.dumps(runs.values(where, tmp_path / "run", **sections)))
            line = [*(launcher or []), "-m", "tests.train.accident", "pretrain", str(recipe), *overrides]
            note = tmp_path / "accident"
            environment = {**os.environ, "ACCIDENT": f"{accident},{note}", "TMPDIR": aside}
            done = subprocess.run(
                [sys.executable, *line],
                capture_output=True,
                text=True,
                timeout=START,
                env=environment,
                cwd=ROOT,
                check=False,
            )
            assert time.time() - note.stat().st_mtime < SOON, done.stderr
            return done

        yield run
        assert not [process.pid for process in psutil.process_iter() if _environment(process).get("TMPDIR") == aside]
        assert list(Path(aside).glob("mindspeed-*")) == []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


KILLED = (
    r"error: rank 1 was killed by SIGKILL; somebody ended it or the machine ran out of memory \(see the system log\)"
)


def test_a_patience_that_no_run_can_keep_is_refused(where: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(runs.values(where, tmp_path / "run")))
    for seconds in ("0", "1e9"):
        with pytest.raises(InputError, match=r"train\.timeout: must be .*\d"):
            load(Recipe, file, [f"train.timeout={seconds}"])


@pytest.mark.parametrize(
    ("layout", "model", "waited"),
    [
        ("tp=2", runs.SIZES, r"all_reduce of tp \(ranks 0, 1\) at \w+\.py:\d+"),
        ("pp=2", runs.SIZES, r"(send|recv) of pp \(ranks 0, 1\) at p2p_communication\.py:\d+"),
        pytest.param(
            "pp=2 vpp=2",
            models.LLAMA,
            r"(send|recv) of pp \(ranks 0, 1\) at schedules\.py:\d+",
            marks=pytest.mark.slow,
        ),
        ("dp=2", runs.SIZES, r"all_reduce of dp x cp \(ranks 0, 1\) at \w+\.py:\d+"),
        ("cp=2", runs.SIZES, r"(send|recv) of cp \(ranks 0, 1\) at ring_attention\.py:\d+"),
        pytest.param(
            "dp=2 ep=2", models.EXPERTS, r"all_to_all of ep \(ranks 0, 1\) at expert\.py:\d+", marks=pytest.mark.slow
        ),
    ],
    ids=["tp", "pp", "vpp", "dp", "cp", "ep"],
)
def test_a_rank_that_is_killed_in_a_step_is_named_and_so_is_what_the_others_waited_for(
    layout: str, model: dict[str, Any], waited: str, hurt: Hurt
) -> None:
    done = hurt("kill,loss,1", *(f"parallel.{axis}" for axis in layout.split()), model=model)
    assert done.returncode == 2
    assert re.fullmatch(f"{KILLED}; rank 0 waited in {waited}, in step \\d", done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_of_sums_beside_the_computation_each_rank_names_its_own(hurt: Hurt) -> None:
    layout = ("parallel.dp=2", "parallel.pp=2", *(f"optim.{name}=true" for name in OVERLAP))
    done = hurt("hang,loss,3", *layout, f"train.timeout={TIMEOUT}")
    assert done.returncode == 2
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: rank 3 did not come: it stood in hang \(accident\.py:\d+\), in step 1; ", told)
    place = r"at \w+\.py:\d+, in step 1"
    for waited in (
        rf"rank 0 waited( 6 s)? in reduce_scatter of dp x cp \(ranks 0, 1\) {place}",
        rf"rank 1 waited( 6 s)? in recv of pp \(ranks 1, 3\) {place}",
        rf"rank 2 waited( 6 s)? in reduce_scatter of dp x cp \(ranks 2, 3\) {place}",
    ):
        assert re.search(waited, told), told
    assert "Traceback" not in done.stderr


EARLY = "ended with exit code 0 before its work was done and gave no reason"


@pytest.mark.parametrize(
    ("accident", "told"),
    [
        ("leave,loss,1", f"error: rank 1 {EARLY}; rank 0 waited in .*, in step \\d"),
        pytest.param(
            "leave,start,0",
            f"error: rank 0 {EARLY}; rank 1 waited in .*, at the start of the run",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "crash,loss,1",
            "error: rank 1 was killed by SIGSEGV; rank 0 waited in .*, in step \\d",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["leaves", "leaves at the start", "crashes"],
)
def test_a_rank_that_ends_without_a_word_is_named(accident: str, told: str, hurt: Hurt) -> None:
    done = hurt(accident, "parallel.tp=2")
    assert done.returncode == 1
    assert re.fullmatch(told, done.stderr.splitlines()[-1]), done.stderr


def test_an_error_on_one_rank_is_told_with_what_the_other_waited_for(hurt: Hurt) -> None:
    done = hurt("fail,loss,1", "parallel.pp=2")
    assert done.returncode == 1
    first, *_, last = re.split(r"\n", done.stderr[done.stderr.index("rank 1") :].rstrip())
    assert re.fullmatch(
        r"rank 1 failed in step \d; rank 0 waited in \w+ of pp \(ranks 0, 1\) at .*, in step \d:", first
    )
    assert last == "ValueError: an accident"
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("place", "stands", "waited"),
    [
        ("loss", "in step 1", r"6 s in all_reduce of tp \(ranks 0, 1\)"),
        pytest.param("meet", "at the start of the run", "in init_process_group of all ranks", marks=pytest.mark.slow),
    ],
    ids=["in a step", "before it joins"],
)
def test_a_rank_that_hangs_is_named_and_where_it_stands(place: str, stands: str, waited: str, hurt: Hurt) -> None:
    done = hurt(f"hang,{place},1", "parallel.tp=2", f"train.timeout={TIMEOUT}")
    assert done.returncode == 2
    told = (
        rf"error: rank 1 did not come: it stood in hang \(accident\.py:\d+\), {stands}; "
        rf"rank 0 waited {waited} at \w+\.py:\d+, {stands}\. .* \(train\.timeout of a recipe\)"
    )
    assert re.fullmatch(told, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_skips_a_collective_is_told_from_one_that_hangs(hurt: Hurt) -> None:
    done = hurt("skip,sum,1", "parallel.tp=2", f"train.timeout={TIMEOUT}")
    assert done.returncode == 1
    told = r"error: the ranks are out of step: rank \d waited 6 s in .*; rank \d waited in .*"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(told, lines[0])
    assert "in all_reduce of all ranks" in lines[0]


def test_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(hurt: Hurt, tmp_path: Path) -> None:
    done = hurt("kill,save,1", "parallel.dp=2", "optim.distributed=true")
    assert done.returncode == 2
    waited = r"rank 0 waited in all_gather_object of all ranks at native\.py:\d+, while step 2 was saved"
    assert re.fullmatch(f"{KILLED}; {waited}", done.stderr.splitlines()[-1]), done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert native.latest(checkpoints) == checkpoints / "step_1"
    runs.train(json.loads((tmp_path / "recipe.yaml").read_text()))  # on one rank
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_2", "step_3"]
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == [1, 2, 3]


def test_under_torchrun_those_that_are_left_say_what_they_waited_for(hurt: Hurt) -> None:
    done = hurt("kill,loss,1", "parallel.tp=2", launcher=TORCHRUN)
    assert done.returncode == 1
    assert (
        len(re.findall(r"^error: rank 0 .* in all_reduce of tp \(ranks 0, 1\) at .*$", done.stderr, flags=re.MULTILINE))
        == 1
    )
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's own report


@pytest.mark.slow
def test_under_torchrun_a_rank_that_hangs_says_where_it_stands(hurt: Hurt) -> None:
    done = hurt("hang,loss,1", "parallel.tp=2", f"train.timeout={TIMEOUT}", launcher=TORCHRUN)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 2, done.stderr
    assert re.fullmatch(
        r"error: rank 0 waited 6 s in all_reduce of tp \(ranks 0, 1\) at .*, and not every rank came", told[0]
    )
    assert re.fullmatch(
        r"error: rank 1 was ended by SIGTERM; it stood in hang \(accident\.py:\d+\), in step \d", told[1]
    )


def _skips(recipe: dict[str, Any]) -> None:
    """One rank of a run in which the second layer hands on its input, and uses none of its weights."""
    from mindspeed_train.config import Recipe
    from mindspeed_train.tasks import TASKS
    from mindspeed_train.trainer import Trainer

    trainer = Trainer(Recipe.model_validate(recipe), TASKS["pretrain"])
    (chunk,) = trainer.chunks
    chunk.module.decoder.layers[1].forward = lambda hidden_states, **_: (hidden_states, None)
    trainer.train()
    trainer.close()


@pytest.mark.parametrize(
    ("layout", "optim"),
    [
        ({"dp": 2}, {}),
        ({"dp": 2}, {"distributed": True}),
        ({"dp": 2}, {"distributed": True, "fused_accumulation": False}),
        ({"tp": 2}, {}),
    ],
    ids=["dp", "distributed", "apart", "tp"],
)
def test_weights_that_nothing_uses_end_as_in_one_process(
    layout: dict[str, int], optim: dict[str, bool], where: Path, tmp_path: Path
) -> None:
    sections = {"train": {"steps": 3}, "optim": {"eps": runs.EPS}}
    one, split = (runs.values(where, tmp_path / name, **sections) for name in ("one", "split"))
    split |= {"parallel": layout, "optim": {**split["optim"], **optim}}
    run_ranks(_skips, 1, one)
    run_ranks(_skips, 2, split)
    for name in ("loss", "grad_norm"):
        found, expected = ([line[name] for line in runs.metrics(tmp_path / run)] for run in ("split", "one"))
        assert found == pytest.approx(expected, rel=RELATIVE), name
    whole = runs.stored(tmp_path / "one" / "checkpoints" / "step_3")
    unused = [key for key in whole if "decoder.layers.1." in key and "exp_avg." in key]
    assert unused
    assert not any(whole[key].any() for key in unused)
    for key, tensor in runs.stored(tmp_path / "split" / "checkpoints" / "step_3").items():
        if not key.startswith("random."):
            assert (tensor - whole[key]).abs().max() <= RELATIVE * whole[key].abs().max(), key


def test_weights_that_nothing_uses_are_named_where_sums_wait_for_them(where: Path, tmp_path: Path) -> None:
    optim = {"distributed": True, "overlap_grad_reduce": True}
    recipe = runs.values(where, tmp_path / "run", parallel={"dp": 2}, optim=optim)
    with pytest.raises(RankError, match=r"made none of decoder\.layers\.1\.[^;]*; set it to false") as caught:
        run_ranks(_skips, 2, recipe)
    assert isinstance(caught.value.error, InputError)
