"""The test harness itself: results by rank, and every way to fail told with its rank."""

import os
import time

import pytest
import torch

from tests.harness import RankError, run_ranks


def total(values):
    rank = torch.distributed.get_rank()
    tensor = torch.tensor(values[rank])
    torch.distributed.all_reduce(tensor)
    return rank, tensor.item(), torch.get_num_threads()


def fail_on(rank):
    if torch.distributed.get_rank() == rank:
        raise ValueError("the middle is missing")
    torch.distributed.barrier()


def die_on(rank):
    if torch.distributed.get_rank() == rank:
        os._exit(7)
    torch.distributed.barrier()


def hang_on(rank):
    if torch.distributed.get_rank() == rank:
        time.sleep(600)


def environment():
    return os.environ["MINDSPEED_TEST_WORD"]


def test_results_come_back_by_rank_and_each_rank_has_one_thread():
    assert run_ranks(total, 2, [3, 4]) == [(0, 7, 1), (1, 7, 1)]


def test_the_environment_of_the_test_reaches_the_ranks(monkeypatch):
    monkeypatch.setenv("MINDSPEED_TEST_WORD", "hello")
    assert run_ranks(environment, 2) == ["hello", "hello"]


def test_the_rank_that_failed_is_told_with_its_traceback_not_its_victims():
    with pytest.raises(RankError, match="the middle is missing") as caught:
        run_ranks(fail_on, 2, 1)
    assert caught.value.rank == 1
    assert isinstance(caught.value.error, ValueError)


def test_a_rank_that_died_is_told_with_its_exit_code():
    with pytest.raises(RankError, match="rank 0 failed: its process ended with exit code 7"):
        run_ranks(die_on, 2, 0)


def test_a_rank_that_hangs_is_named_with_the_place_where_it_stands():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not answer(.|\n)*hang_on"):
        run_ranks(hang_on, 2, 1, timeout=3)
    assert time.monotonic() - start < 20
