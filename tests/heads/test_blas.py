import numpy as np
import threadpoolctl

from featurecache.heads.blas import SMALL, one_thread

np.ones((2, 2)) @ np.ones((2, 2))  # so that numpy's library is there to be asked


def threads():
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def test_small_products_have_one_thread_and_all_is_as_before_afterwards():
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with one_thread(SMALL):
            assert set(threads()) == {1}
            with one_thread(1):  # as in another thread
                assert set(threads()) == {1}
            assert set(threads()) == {1}
        assert threads() == before
        with one_thread(SMALL + 1):
            assert threads() == before
