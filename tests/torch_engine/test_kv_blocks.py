"""The block pool: every block in one place, whatever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.torch_engine.kv_blocks import NULL_BLOCK, BlockPool, BlockTableError, chain_hash

ACTIONS = st.lists(st.tuples(st.sampled_from(["take", "release", "publish", "reuse"]), st.integers(0, 9)), max_size=80)


@given(ACTIONS)
def test_no_order_of_actions_loses_or_doubles_a_block(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, 4)
    tables: list[list[int]] = []
    for action, number in actions:
        if action == "take" and number <= pool.free:
            tables.append(pool.take(number))
        elif action == "release" and tables:
            pool.release(tables.pop(number % len(tables)))
        elif action == "publish" and tables:
            for block in tables[number % len(tables)]:
                pool.publish(block, chain_hash(b"", [block, number]))
        elif action == "reuse" and pool.by_hash:
            block = list(pool.by_hash.values())[number % len(pool.by_hash)]
            pool.reuse(block)
            tables.append([block])

        pool.check_integrity(tables)


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(5, 4)

    assert NULL_BLOCK not in pool.take(5)


def test_a_released_block_keeps_its_content_until_it_is_needed() -> None:
    """Oldest first: what was used last is most likely to be asked for again."""
    pool = BlockPool(3, 4)
    first, second, third = pool.take(3)
    for block, name in ((first, b"1"), (second, b"2"), (third, b"3")):
        pool.publish(block, name)
    pool.release([first])
    pool.release([second])
    pool.release([third])

    taken = pool.take(1)

    assert taken == [first]
    assert pool.find(b"1") is None
    assert pool.find(b"2") == second


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.take(1)
    pool.publish(block, b"name")
    pool.reuse(block)

    pool.release([block])

    assert pool.free == 1
    pool.release([block])
    assert pool.free == 2


def test_releasing_what_nobody_owns_is_an_error_that_changes_nothing() -> None:
    pool = BlockPool(2, 4)

    with pytest.raises(BlockTableError):
        pool.release([1])

    pool.check_integrity([])


def test_a_block_without_a_name_cannot_be_shared() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.take(1)

    with pytest.raises(BlockTableError):
        pool.reuse(block)


def test_equal_names_mean_equal_tokens_from_the_start() -> None:
    same_end = [5, 6]

    assert chain_hash(chain_hash(b"", [1, 2]), same_end) != chain_hash(chain_hash(b"", [1, 3]), same_end)
