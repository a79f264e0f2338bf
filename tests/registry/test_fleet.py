"""Counting and coverage over all registered nodes, as every gateway shows them."""

from hypothesis import given
from hypothesis import strategies as st

from bus.fleet import (
    Coverage,
    FleetCounts,
    FleetNode,
    count_nodes,
    layer_coverage,
    layers_for_memory,
    least_covered_range,
    total_layers,
)
from bus.ids import NodeId


def node(name: str, *layers: int, active: bool = True) -> FleetNode:
    return FleetNode(NodeId(name), active, layers)


def test_every_registered_node_counts_whether_active_or_not() -> None:
    counts = count_nodes([node("a"), node("b", active=False), node("c", active=False)])

    assert counts == FleetCounts(total=3, active=1, inactive=2)


def test_an_inactive_node_covers_nothing() -> None:
    """Coverage says what could answer now; the node still counts as registered."""
    coverage = layer_coverage([node("a", 0, 1), node("b", 1, 2, active=False)], 3)

    assert coverage == Coverage(3, (1, 1, 0))
    assert coverage.uncovered == (2,)
    assert not coverage.complete


def test_replicas_are_counted_per_layer_and_a_repeated_layer_once() -> None:
    coverage = layer_coverage([node("a", 0, 0, 1), node("b", 1), node("c", 1, 99)], 2)

    assert coverage.replicas == (1, 3)
    assert coverage.complete


def test_a_model_without_layers_is_never_complete() -> None:
    assert not layer_coverage([], 0).complete


def test_the_model_has_as_many_layers_as_the_highest_reported_one_needs() -> None:
    assert total_layers([node("a", 0, 39)], default=32) == 40
    assert total_layers([node("a", 0, 3)], default=32) == 32
    assert total_layers([], default=32) == 32


def test_a_node_that_knows_its_model_says_how_many_layers_there_are():
    """A node that serves the whole of a 30-layer model covers it: the default must not leave two holes."""
    whole = FleetNode(NodeId("torch"), True, tuple(range(30)), layer_count=30)

    assert total_layers([whole, node("http", 0, 3)], default=32) == 30
    assert layer_coverage([whole], total_layers([whole], default=32)).complete


def test_the_example_node_of_24_gb_is_given_four_layers() -> None:
    assert layers_for_memory(24, 32) == 4
    assert layers_for_memory(0, 32) == 1
    assert layers_for_memory(10_000, 32) == 32


def test_the_first_node_of_an_empty_fleet_gets_the_first_layers() -> None:
    assert least_covered_range([0] * 32, 4) == (0, 1, 2, 3)


def test_a_hole_is_filled_before_the_average_is_raised() -> None:
    """A chat needs every layer, so one layer at zero weighs more than many at one."""
    assert least_covered_range([1, 1, 1, 1, 9, 0], 2) == (4, 5)


def test_the_range_never_leaves_the_model() -> None:
    assert least_covered_range([0, 0], 5) == (0, 1)
    assert least_covered_range([], 4) == ()


@given(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_nodes_that_join_one_by_one_leave_no_hole_as_soon_as_their_widths_could_cover_twice(
    layers: int, widths: list[int]
) -> None:
    """Greedy ranges may overlap at the end of the model; twice the model's layers in total always suffice."""
    replicas = [0] * layers
    for width in widths:
        for layer in least_covered_range(replicas, width):
            replicas[layer] += 1

    if sum(min(width, layers) for width in widths) >= 2 * layers and len(set(widths)) == 1:
        assert min(replicas) >= 1


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 50))
def test_the_range_is_contiguous_and_as_wide_as_asked_or_the_model(replicas: list[int], width: int) -> None:
    chosen = least_covered_range(replicas, width)

    assert len(chosen) == min(width, len(replicas))
    assert list(chosen) == sorted(chosen) and (not chosen or chosen[-1] - chosen[0] == len(chosen) - 1)
