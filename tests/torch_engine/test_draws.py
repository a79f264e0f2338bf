"""Random numbers by seed and position."""

from gpu_worker.torch_engine.draws import uniform


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert [uniform(3, n) for n in range(50)] == [uniform(3, n) for n in range(50)]
    assert uniform(3, 10) != uniform(4, 10)
    assert uniform(3, 10) != uniform(3, 11)


def test_the_numbers_are_pinned() -> None:
    """Another version of the engine must draw the same, or a resumed answer would turn."""
    assert [round(uniform(42, n), 6) for n in range(3)] == [0.343292, 0.950438, 0.446588]


def test_draws_fill_the_unit_interval_evenly() -> None:
    counts = [0] * 10
    for seed in range(20):
        for position in range(500):
            counts[int(uniform(seed, position) * 10)] += 1

    assert all(900 < count < 1100 for count in counts)


def test_any_integer_is_a_seed() -> None:
    for seed in (0, -1, 2**63, -(2**63), 2**64 + 5):
        assert 0.0 <= uniform(seed, 0) < 1.0
