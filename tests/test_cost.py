"""What training and boundaries cost: traces of graphs, threads and the size of the state."""

from cases import blobs, compiled, moved
from threadpoolctl import threadpool_info, threadpool_limits

from keras_dwd.groupings.gmm import GaussianMixtureGrouping


class Noting(GaussianMixtureGrouping):
    """Notes how many threads linear algebra has at a boundary."""

    def apply(self, context):
        self.threads = {library["num_threads"] for library in threadpool_info()}
        return super().apply(context)


def test_linear_algebra_at_a_boundary_takes_one_thread_and_leaves_the_setting_as_it_was():
    model = compiled(grouping=Noting())
    with threadpool_limits(2):
        before = threadpool_info()
        moved(model).consolidate(*blobs(), verbose=0)
        assert threadpool_info() == before
    assert {library["num_threads"] for library in before} == {2}
    assert model.grouping.threads == {1}
