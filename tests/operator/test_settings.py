"""Settings are checked before anything connects; a mistake is one line that says what to do."""

import dataclasses
from pathlib import Path

import pytest

from bus.settings import Settings, SettingsError, env_name, read_settings


def test_the_defaults_fit_together() -> None:
    """An empty environment is a valid fleet of one machine."""
    assert Settings.from_env({}) == Settings()


def test_values_are_parsed_by_the_type_of_their_field() -> None:
    settings = Settings.from_env(
        {"MILLRACE_CELLS": "3", "MILLRACE_OPEN_CHAT": "off", "MILLRACE_THREADS": "2", "MILLRACE_NODE_ALLOW": " a, b "}
    )

    assert (settings.cells, settings.open_chat, settings.threads, settings.node_allow) == (3, False, 2, "a, b")


def test_an_empty_variable_means_the_default() -> None:
    """Compose files and shells pass empty variables for what was not set."""
    assert Settings.from_env({"MILLRACE_LEASE_MS": "", "REDIS_URL": " "}) == Settings()


def test_other_programs_variables_are_none_of_our_business() -> None:
    assert Settings.from_env({"PATH": "/bin", "REDIS_HOST": "x"}) == Settings()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MILLRACE_NODE_ALOW": "*"}, "unknown setting MILLRACE_NODE_ALOW: did you mean MILLRACE_NODE_ALLOW?"),
        ({"MILLRACE_REDIS_URL": "*"}, "unknown setting MILLRACE_REDIS_URL: did you mean REDIS_URL?"),
        ({"MILLRACE_XYZZY": "1"}, "unknown setting MILLRACE_XYZZY; README.md lists them all"),
        ({"MILLRACE_CELLS": "two"}, "MILLRACE_CELLS='two' is not a whole number"),
        ({"MILLRACE_CELLS": "0"}, "MILLRACE_CELLS=0 is below its least value 1"),
        ({"MILLRACE_OPEN_CHAT": "maybe"}, "MILLRACE_OPEN_CHAT='maybe' is neither `on` nor `off`"),
        ({"MILLRACE_ENGINE": "vllm"}, "MILLRACE_ENGINE='vllm' is not one of torch, relay, echo"),
        ({"MILLRACE_GATEWAY_PORT": "70000"}, "MILLRACE_GATEWAY_PORT=70000 is no port: 1 to 65535"),
        (
            {"MILLRACE_MODEL": "my model"},
            "MILLRACE_MODEL='my model' is no model name: 1 to 128 of A-Z a-z 0-9 _./@+:- and not :parts at its end",
        ),
        ({"MILLRACE_RENEW_MS": "4000"}, "MILLRACE_RENEW_MS=4000 is over a third of MILLRACE_LEASE_MS=10000: lower it"),
        (
            {"MILLRACE_BEAT_MS": "20000"},
            "MILLRACE_BEAT_MS=20000 is over a third of MILLRACE_NODE_TTL_MS=30000: lower it",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_env(environ)

    assert str(error.value) == said


def test_a_worker_must_fence_itself_before_its_lease_ends() -> None:
    """Otherwise another worker could publish the same job at the same time."""
    with pytest.raises(SettingsError, match="MILLRACE_SELF_FENCE_MS=10000 must lie between"):
        Settings().changed(self_fence_ms=10_000)


def test_a_child_process_gets_the_same_settings() -> None:
    settings = Settings().changed(redis_url="redis://h", open_chat=False, threads=3, echo_poison="die", cells=2)

    assert Settings.from_env(settings.to_env()) == settings


def test_a_role_finds_the_server_of_the_running_fleet(tmp_path: Path) -> None:
    """`millrace up` leaves the address of its server in the var folder."""
    (tmp_path / "redis-url").write_text("redis://found\n")

    assert read_settings({"MILLRACE_VAR_DIR": str(tmp_path)}).redis_url == "redis://found"
    assert read_settings({"MILLRACE_VAR_DIR": str(tmp_path), "REDIS_URL": "redis://given"}).redis_url == "redis://given"


def test_a_role_without_a_server_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"REDIS_URL is not set and no fleet runs here .* set REDIS_URL, or start one"
    ):
        read_settings({"MILLRACE_VAR_DIR": str(tmp_path)})


def test_every_setting_has_a_line_for_the_readme() -> None:
    for setting in dataclasses.fields(Settings):
        assert setting.metadata["doc"], env_name(setting)
