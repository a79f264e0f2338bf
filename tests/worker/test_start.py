"""What a worker decides before it serves: its name, its cell, its engine."""

import pytest

from bus.codec.wire import HeldBy, Superseded
from bus.ids import Holder, NodeId, cell_of_model, is_node_id
from bus.link import LinkDown
from bus.process.child import report
from bus.process.exits import EXIT_CONFIG, EXIT_CRASH, EXIT_SUPERSEDED, EXIT_UNAVAILABLE, StartError
from bus.settings import Settings
from gpu_worker.engine import EngineStartError
from gpu_worker.names import is_default_name, node_names
from gpu_worker.worker import choose_cell, is_alive, make_echo_engine


def test_a_worker_without_a_name_tries_numbered_ones_that_are_valid_node_ids():
    names = list(node_names(Settings().changed(engine="echo")))

    assert len(set(names)) == len(names) > 8
    assert all(is_node_id(name) for name in names)
    assert list(node_names(Settings().changed(node_id="mine"))) == ["mine"]


def test_only_a_name_that_nobody_configured_may_be_left():
    settings = Settings().changed(engine="echo")
    chosen = next(iter(node_names(settings)))

    assert is_default_name(settings.changed(node_id=chosen))
    assert not is_default_name(settings.changed(node_id="mine"))


def test_a_holder_lives_when_its_lease_was_renewed_and_not_while_it_only_lapses():
    first, later = HeldBy(NodeId("n"), "n.1", 5_000), HeldBy(NodeId("n"), "n.1", 7_500)

    assert not is_alive(None, first)
    assert not is_alive(first, first)
    assert is_alive(first, later)
    assert not is_alive(first, HeldBy(NodeId("n"), "n.2", 7_500)), "another one: look again"
    assert is_alive(None, HeldBy(NodeId("n"), "the HTTP registration of key k", 0))


def test_a_worker_lives_in_the_cell_of_its_model():
    assert choose_cell(("echo",), 1) == 0
    assert choose_cell(("echo",), 5) == cell_of_model("echo", 5)


def test_models_of_different_cells_need_a_worker_each():
    """A node lives in one cell; a model served from another would never get its jobs."""
    models = tuple(f"model-{number}" for number in range(20))

    with pytest.raises(StartError, match="run a worker for each"):
        choose_cell(models, 5)


@pytest.mark.parametrize("models", ["", " , ", "a b", "fine,not/ok?"])
def test_model_names_that_no_queue_could_have_stop_the_start(models: str):
    with pytest.raises(EngineStartError, match="MILLRACE_ECHO_MODELS"):
        make_echo_engine(Settings().changed(echo_models=models))


def test_the_exit_code_tells_the_parent_what_to_do_next():
    """Only what a person must change ends the parent; an error deep in a group counts like a plain one."""

    superseded = Superseded(NodeId("n"), Holder("n.1"), "n.2")
    down = LinkDown("no server", maybe_sent=False)

    assert report(StartError("no model")) == EXIT_CONFIG
    assert report(ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [superseded])])) == EXIT_SUPERSEDED
    assert report(ExceptionGroup("g", [down])) == EXIT_UNAVAILABLE
    assert report(ExceptionGroup("g", [down, ValueError()])) == EXIT_CRASH
