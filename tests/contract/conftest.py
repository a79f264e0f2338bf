import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_only(reason): fakeredis is known to differ here, and must")
